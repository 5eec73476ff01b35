"""Experts split over processes give the outputs, gradients and runs of one process."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from nanods.config import PRESETS
from nanods.data.text import TextData
from nanods.data.tokenizer import ByteTokenizer
from nanods.distributed.checkpoint import as_dtensors, restore, save
from nanods.distributed.expert_parallel import (
    expert_parameters,
    experts_parallel,
    local_experts,
    split_experts,
)
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.sharding import clip_grad_norm
from nanods.gpt import GPT
from nanods.moe import MoE, MoEConfig
from nanods.moe_kernel import experts_sorted
from nanods.training import checkpoint
from nanods.training.language_task import LanguageTask
from nanods.training.optimizers import make_optimizers
from nanods.training.task import accumulate_gradients
from tests.distributed.processes import forkserver
from tests.test_moe_kernel import random_case

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)

# ---- one layer ---------------------------------------------------------------------------------

E, C, F = 8, 16, 24
# Tokens of each process: the same in all, unevenly shared; 522 rows for one expert.
TOKENS = {4: (37, 160, 0, 64), 2: (197, 64)}
LOADS = ("even", "skewed", "one", "few", "dropped", "none")
TOP_K = (1, 2, 5)
CASES = [
    (load, K, dtype, False)
    for load in LOADS
    for K in TOP_K
    for dtype in (torch.float32, torch.float64)
]
CASES += [(load, 2, torch.float32, True) for load in LOADS]  # under autocast


def make_case(load, K, dtype):
    """Return x, weights, experts, up, out of one process with all tokens."""
    N = sum(TOKENS[2])
    drop = {"dropped": 0.4, "none": 1.0}.get(load, 0.0)
    x, weights, experts, up, out = random_case(N, C, E, K, F, drop, dtype=dtype)
    if load == "even":
        experts = (torch.arange(N)[:, None] + torch.arange(K)) % E
    elif load == "skewed":  # a third of the tokens goes to the first expert
        experts = (torch.rand(N, K, generator=torch.Generator().manual_seed(1)) ** 4 * E).long()
    elif load == "one":
        experts = torch.full((N, K), 5)
    elif load == "few":  # 6 of 8 experts get no token, and of 4 ranks two get none
        experts = experts.where(experts == 0, 6)
    return x, weights, experts, up, out


def forward_backward(run_experts, case, rows=slice(None)):
    """Return the output of some rows, and the gradients of x, weights, up and out."""
    *tokens, up, out = case
    inputs = [t[rows].detach().requires_grad_(t.is_floating_point()) for t in tokens] + [up, out]
    y = run_experts(*inputs)
    slope = torch.cos(torch.arange(len(tokens[0]) * C, dtype=y.dtype)).view(-1, C)[rows]
    differentiable = [t for t in inputs if t.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * slope).sum(), differentiable)]


def run_layers(rank, groups):
    """Run each case over 4 processes and over 2; return the results of this process's rows."""
    results = {}
    for P, group in groups.items():
        start = sum(TOKENS[P][: rank % P])
        rows = slice(start, start + TOKENS[P][rank % P])

        def run_experts(*tensors, group=group):
            return experts_parallel(*tensors, group)

        for load, K, dtype, autocast in CASES:
            *tokens, up, out = make_case(load, K, dtype)
            up = local_experts(up.detach(), group).requires_grad_()
            out = local_experts(out.detach(), group).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = forward_backward(run_experts, (*tokens, up, out), rows)
            results[P, load, K, dtype, autocast] = result
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of four processes, by rank.

    They start once, from a server that has imported torch, which is the slowest part.
    """
    folder = tmp_path_factory.mktemp("processes")
    forkserver()
    torch.multiprocessing.start_processes(
        run_rank, (str(folder),), nprocs=4, start_method="forkserver"
    )
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(4)]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=4,
        timeout=timedelta(seconds=60),
    )
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    half, replicas = pairs[rank // 2], pairs[2 + rank % 2]
    layers = run_layers(rank, {4: dist.group.WORLD, 2: half})
    runs = train_on_groups(rank, half, replicas)
    resumed = train_and_resume(rank, half, folder)
    torch.save(layers | runs | resumed, f"{folder}/results-{rank}.pt")
    dist.destroy_process_group()


def concatenate_ranks(results, P, *case):
    """Join the rows and the experts of P processes."""
    by_rank = [results[rank][P, *case] for rank in range(P)]
    return [torch.cat(tensors) for tensors in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("P", [2, 4])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("K", TOP_K)
def test_outputs_are_bitwise_those_of_one_process_and_gradients_equal_up_to_rounding(
    results, P, load, K
):
    output, *_ = concatenate_ranks(results, P, load, K, torch.float32, False)
    assert torch.equal(
        output, forward_backward(experts_sorted, make_case(load, K, torch.float32))[0]
    )
    case = make_case(load, K, torch.float64)
    actual = concatenate_ranks(results, P, load, K, torch.float64, False)
    expected = forward_backward(experts_sorted, case)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())
    experts_with_gradient = {e for e in range(E) if actual[3][e].any()}
    assert experts_with_gradient == set(case[2].flatten().tolist()) - {E}


@pytest.mark.parametrize("P", [2, 4])
@pytest.mark.parametrize("load", LOADS)
def test_under_autocast_rows_are_rounded_before_they_are_sent_as_one_process_rounds_them(
    results, P, load
):
    case = make_case(load, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = forward_backward(experts_sorted, case)
    actual = concatenate_ranks(results, P, load, 2, torch.float32, True)
    exact = forward_backward(experts_sorted, case)
    assert torch.equal(actual[0], rounded[0])
    for a, b in zip(actual, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.02 * b.norm()


# ---- a whole run -------------------------------------------------------------------------------

V2 = PRESETS["v2-tiny"]
MODEL = replace(
    V2.model,
    n_layer=2,
    n_head=2,
    n_embd=16,
    context_length=16,
    moe=MoEConfig(4, 2, capacity_factor=1.0, bias_rate=0.01),
)
CONFIG = replace(
    V2,
    model=replace(MODEL, attention=replace(MODEL.attention, block_size=4)),
    batch_size=8,
    clip=0.5,
)
STEPS, MICRO_BATCH = 5, 2


def random_model(seed=0):
    torch.manual_seed(seed)
    model = GPT(CONFIG.model).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)  # a projection that starts at zero would hide what is before it
    return model


def train_steps(model, optimizers, steps, place=None):
    """Take steps as train.py does; return the metrics and gradients of each.

    `place`: this process's number, the group of all that train, and the group of the replicas of
    its experts; None for one process alone.
    """
    text = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint16)
    data = TextData("x", "hash", text, text, ByteTokenizer(), len(text))
    task = LanguageTask(CONFIG, torch.device("cpu"), data)
    number, everyone, replicas = place or (0, None, None)
    W = dist.get_world_size(everyone) if place else 1
    history, experts = [], set(expert_parameters(model))
    for step in steps:
        windows = task.batch(step).chunk(W)[number]
        local_metrics = accumulate_gradients(task, model, windows, MICRO_BATCH)
        metrics = {
            "loss": local_metrics["train_loss"].double() / W,
            "dropped": local_metrics["dropped"] / W,
            "load": local_metrics["load"],
        }
        if place:
            for value in metrics.values():
                dist.all_reduce(value, group=everyone)
            for p in model.parameters():
                group = replicas if p in experts else everyone
                if group:
                    dist.all_reduce(p.grad, group=group)
                p.grad /= W
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        grads = with_all_experts(model, grads)
        norm = clip_grad_norm(model, CONFIG.clip)
        history.append(metrics | {"norm": norm} | grads)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.update_bias(metrics["load"])
    return history


def with_all_experts(model, state):
    """Return `state` with the stacks of all experts in place of those of this process."""
    whole = {}
    for name, value in as_dtensors(model, state).items():
        whole[name] = value.full_tensor() if isinstance(value, DTensor) else value
    return whole


def split_model(group, saved=None):
    """Return a model whose experts are split, and its optimizers, restored if there is `saved`."""
    model = random_model(seed=0 if saved is None else 1)
    split_experts(model, group)
    optimizers = make_optimizers(CONFIG, model)
    if saved:
        restore(model, optimizers, saved)
    return model, optimizers


def train_on_groups(rank, half, replicas):
    """Train with one ep group of 4; with one of 2; and with two of 2, which are replicas."""
    world, results = dist.group.WORLD, {}
    for name, ep_group, place in (
        ("4", world, (rank, world, None)),
        ("2", half, (rank % 2, half, None)),
        ("2 x 2", half, (rank, world, replicas)),
    ):
        model, optimizers = split_model(ep_group)
        history = train_steps(model, optimizers, range(STEPS), place)
        results[name] = history, with_all_experts(model, model.state_dict())
    return results


def train_and_resume(rank, half, folder):
    """Take two steps on 4 processes, save, restore and compare; then go on with 2, and save."""
    processes, world = ProcessGroups.__new__(ProcessGroups), dist.group.WORLD
    processes.world_size, processes.is_main_process = 4, rank == 0
    out = Path(folder) / "run"

    def save_step(step):
        tensors = checkpoint.optimizer_tensors(model, optimizers)
        save(out, step, model, model.state_dict(), tensors, {}, processes)

    def full_state(model, optimizers):
        return model.state_dict() | checkpoint.optimizer_tensors(model, optimizers)

    model, optimizers = split_model(world)
    train_steps(model, optimizers, range(2), (rank, world, None))
    before = full_state(model, optimizers)
    save_step(2)
    saved = checkpoint.load(out, processes.on_main_process)
    after = full_state(*split_model(world, saved))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model, optimizers = split_model(half, saved)
    train_steps(model, optimizers, range(2, 4), (rank % 2, half, None))
    save_step(4)
    return {"run": str(out)}


@pytest.fixture(scope="module")
def one_process():
    """Return the history and the final weights of one process with all experts and tokens."""
    model = random_model()
    history = train_steps(model, make_optimizers(CONFIG, model), range(STEPS))
    return history, model.state_dict()


def assert_close(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name in expected:
        a, b = actual[name].double(), expected[name].double()
        assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("groups", ["4", "2", "2 x 2"])
def test_a_run_on_several_processes_is_that_of_one(results, one_process, groups):
    """Compare loss, load, drops, gradients and their norm at each step, and the weights."""
    history, weights = results[0][groups]
    expected_history, expected_weights = one_process
    assert len(history) == STEPS
    assert min(step["norm"] for step in expected_history) > CONFIG.clip  # gradients were clipped
    for step, expected in zip(history, expected_history, strict=True):
        assert torch.equal(step["load"], expected["load"])
        assert step["load"].sum() == 2 * 2 * 8 * 16  # layers, K, batch, T
        assert step["dropped"] > 0.01
        assert_close(step, expected)
    assert_close(weights, expected_weights)
    before = random_model().state_dict()
    changes = {}
    for name, value in expected_weights.items():
        if name.endswith((".up", ".out")):
            changes[name] = (value - before[name]).flatten(1).norm(dim=1)  # (E,)
    assert len(changes) == 4
    assert all(change.min() > 0.01 for change in changes.values())  # every expert was updated
    norms = [step["norm"].item() for step in history]
    for rank in range(4):  # all processes clip by the same norm
        assert [step["norm"].item() for step in results[rank][groups][0]] == norms


def test_a_checkpoint_of_4_processes_resumes_on_2_and_on_1(results, one_process):
    model = random_model(seed=1)
    optimizers = make_optimizers(CONFIG, model)
    checkpoint.restore(model, optimizers, checkpoint.load(Path(results[0]["run"])))
    (step,) = train_steps(model, optimizers, range(4, 5))
    history, weights = one_process
    assert_close(step, history[4])
    assert_close(model.state_dict(), weights)


# ---- one process, and errors -------------------------------------------------------------------


def test_without_split_experts_nothing_changes():
    model, reference = random_model(), random_model()
    for m in (model, reference):
        m(torch.arange(16)[None])[0].square().sum().backward()
    assert expert_parameters(model) == []
    assert torch.equal(
        clip_grad_norm(model, 0.5), nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    )
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    state = model.state_dict()
    assert list(as_dtensors(model, state).items()) == list(state.items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            MoE(8, 8, MoEConfig(6, 2)),
            "6 experts do not divide over 4 processes: choose --moe.n-expert as a multiple of 4",
        ),
        (
            nn.ModuleList([MoE(8, 8, MoEConfig(4, 2)), MoE(8, 8, MoEConfig(2, 2))]),
            "2 experts do not divide over 4 processes",
        ),
        (nn.Linear(2, 2), "1 expert, a plain MLP, does not divide over 4 processes"),
    ],
)
def test_experts_that_do_not_divide_are_refused_with_a_suggestion(model, message, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        split_experts(model, None)
    assert {name: p.shape for name, p in model.named_parameters()} == before
