"""Experts on several processes give one's: outputs bit for bit, gradients, whole runs, and checkpoints of one process."""

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
from tests.test_moe_kernel import random_case

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)

# ---- tokens ------------------------------------------------------------------------------------------------------------------

E, C, F = 8, 16, 24
TOKENS = {
    4: (37, 160, 0, 64),
    2: (197, 64),
}  # of each process: the same in all, unevenly shared; 522 rows for one expert
LOADS = ("even", "skewed", "one", "few", "dropped", "nobody")
CHOICES = (1, 2, 5)
NAMES = [
    (load, K, dtype, False)
    for load in LOADS
    for K in CHOICES
    for dtype in (torch.float32, torch.float64)
]
NAMES += [(load, 2, torch.float32, True) for load in LOADS]  # under autocast


def case_of(load, K, dtype):
    """x, weights, experts, up, out of one process with all tokens."""
    N = sum(TOKENS[2])
    x, weights, experts, up, out = random_case(
        N, C, E, K, F, {"dropped": 0.4, "nobody": 1.0}.get(load, 0.0), dtype=dtype
    )
    if load == "even":
        experts = (torch.arange(N)[:, None] + torch.arange(K)) % E
    elif load == "skewed":
        experts = (
            torch.rand(N, K, generator=torch.Generator().manual_seed(1)) ** 4 * E
        ).long()  # a third for the first
    elif load == "one":
        experts = torch.full((N, K), 5)
    elif load == "few":
        experts = experts.where(experts == 0, 6)  # 6 of 8 get nothing, and of 4 owners two
    return x, weights, experts, up, out


def outcome(mix, case, rows=slice(None)):
    """The output of some rows, and the gradients of x, weights, up and out."""
    *tokens, up, out = case
    inputs = [t[rows].detach().requires_grad_(t.is_floating_point()) for t in tokens] + [up, out]
    y = mix(*inputs)
    slope = torch.cos(torch.arange(len(tokens[0]) * C, dtype=y.dtype)).view(-1, C)[rows]
    return [
        y.detach(),
        *torch.autograd.grad((y * slope).sum(), [t for t in inputs if t.requires_grad]),
    ]


def layers(rank, groups):
    """This process's share of each case, over the 4 processes and over 2."""
    made = {}
    for P, group in groups.items():
        first = sum(TOKENS[P][: rank % P])
        rows = slice(first, first + TOKENS[P][rank % P])

        def mix(*tensors, group=group):
            return experts_parallel(*tensors, group)

        for name in NAMES:
            *tokens, up, out = case_of(*name[:3])
            mine = (local_experts(stack.detach(), group).requires_grad_() for stack in (up, out))
            with torch.autocast("cpu", torch.bfloat16, enabled=name[3]):
                made[P, *name] = outcome(mix, (*tokens, *mine), rows)
    return made


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four processes found, by process. They start once, from one that has imported what they need: the longest part."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
        [__name__, "torch._dynamo"]
    )
    torch.multiprocessing.start_processes(
        one_of, (str(folder),), nprocs=4, start_method="forkserver"
    )
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(4)]


def one_of(rank, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4, timeout=limit
    )
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    half, across = pairs[rank // 2], pairs[2 + rank % 2]
    made = (
        layers(rank, {4: dist.group.WORLD, 2: half})
        | runs(rank, half, across)
        | passed_on(rank, half, folder)
    )
    torch.save(made, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


def run_distributed(found, P, *name):
    """The shares of P processes as one: rows and experts put after each other."""
    return [
        torch.cat(parts)
        for parts in zip(*(found[rank][P, *name] for rank in range(P)), strict=True)
    ]


@pytest.mark.parametrize("P", [2, 4])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("K", CHOICES)
def test_the_result_is_that_of_one_process_bit_for_bit_and_the_gradients_but_for_rounding(
    found, P, load, K
):
    ours = run_distributed(found, P, load, K, torch.float32, False)
    assert torch.equal(ours[0], outcome(experts_sorted, case_of(load, K, torch.float32))[0])
    case = case_of(load, K, torch.float64)
    ours, believed = (
        run_distributed(found, P, load, K, torch.float64, False),
        outcome(experts_sorted, case),
    )
    for mine, right in zip(ours, believed, strict=True):
        assert mine.shape == right.shape and mine.dtype == right.dtype
        assert (mine - right).abs().max() <= 1e-12 * max(1, right.abs().max())
    assert {e for e in range(E) if ours[3][e].any()} == set(case[2].flatten().tolist()) - {E}


@pytest.mark.parametrize("P", [2, 4])
@pytest.mark.parametrize("load", LOADS)
def test_under_autocast_rows_are_rounded_before_they_travel_as_they_would_be_at_home(
    found, P, load
):
    case = case_of(load, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outcome(experts_sorted, case)
    ours, exact = (
        run_distributed(found, P, load, 2, torch.float32, True),
        outcome(experts_sorted, case),
    )
    assert torch.equal(ours[0], rounded[0])
    for mine, right in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() <= 0.02 * right.norm()


# ---- a whole run -------------------------------------------------------------------------------------------------------------

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
STEPS, SIZE = 5, 2  # of the micro-batches


def whole_model(seed=0):
    torch.manual_seed(seed)
    model = GPT(CONFIG.model).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)  # also what starts at zero, and would hide what is behind it
    return model


def trained(model, optimizers, steps, ways=None):
    """train.py's steps. `ways`: this process's place among those that train, all of them, and those with the same experts.

    -> what it noted of each step, the gradients too."""
    text = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint16)
    task = LanguageTask(
        CONFIG,
        torch.device("cpu"),
        TextData("x", "hash", text, text, ByteTokenizer(), len(text)),
    )
    place, everyone, copies = ways or (0, None, None)
    W = dist.get_world_size(everyone) if ways else 1
    noted, split = [], set(expert_parameters(model))
    for step in steps:
        windows = task.batch(step).chunk(W)[place]
        parts = accumulate_gradients(task, model, windows, SIZE)
        told = {
            "loss": parts["train_loss"].double() / W,
            "dropped": parts["dropped"] / W,
            "load": parts["load"],
        }
        for value in told.values() if ways else ():
            dist.all_reduce(value, group=everyone)
        for p in model.parameters() if ways else ():
            if group := copies if p in split else everyone:
                dist.all_reduce(p.grad, group=group)
            p.grad /= W
        grads = whole(model, {name: p.grad.clone() for name, p in model.named_parameters()})
        noted.append(told | {"norm": clip_grad_norm(model, CONFIG.clip), **grads})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.update_bias(told["load"])
    return noted


def whole(model, state):
    """The stacks of all experts in place of each process's."""
    return {
        n: value.full_tensor() if isinstance(value, DTensor) else value
        for n, value in as_dtensors(model, state).items()
    }


def prepared(group, saved=None):
    """A model whose experts are split, its optimizers, both as they were `saved` if they were."""
    model = whole_model(seed=0 if saved is None else 1)
    split_experts(model, group)
    optimizers = make_optimizers(CONFIG, model)
    if saved:
        restore(model, optimizers, saved)
    return model, optimizers


def states(model, optimizers):
    return model.state_dict() | checkpoint.optimizer_tensors(model, optimizers)


def runs(rank, half, across):
    """All in one group of experts; the same with half of the processes; two such groups, each with copies of the experts."""
    world, made = dist.group.WORLD, {}
    ways = {"4": (rank, world, None), "2": (rank % 2, half, None), "2 x 2": (rank, world, across)}
    for name, way in ways.items():
        model, optimizers = prepared(world if name == "4" else half)
        made[name] = trained(model, optimizers, range(STEPS), way), whole(model, model.state_dict())
    return made


def passed_on(rank, half, folder):
    """Two steps on 4 processes, then two on 2 (and 2 others), by way of checkpoints; the first comes back to 4 as it was."""
    processes, world, folder = (
        ProcessGroups.__new__(ProcessGroups),
        dist.group.WORLD,
        Path(folder) / "run",
    )
    processes.world_size, processes.is_main_process = 4, rank == 0
    model, optimizers = prepared(world)
    trained(model, optimizers, range(2), (rank, world, None))
    had = states(model, optimizers)
    save(
        folder,
        2,
        model,
        model.state_dict(),
        checkpoint.optimizer_tensors(model, optimizers),
        {},
        processes,
    )
    saved = checkpoint.load(folder, processes.on_main_process)
    again = states(*prepared(world, saved))
    assert had.keys() == again.keys() and all(torch.equal(had[name], again[name]) for name in had)
    model, optimizers = prepared(half, saved)
    trained(model, optimizers, range(2, 4), (rank % 2, half, None))
    save(
        folder,
        4,
        model,
        model.state_dict(),
        checkpoint.optimizer_tensors(model, optimizers),
        {},
        processes,
    )
    return {"passed on": str(folder)}


@pytest.fixture(scope="module")
def alone():
    """One process with all experts and all micro-batches: its notes, and its weights at the end."""
    model = whole_model()
    return trained(model, make_optimizers(CONFIG, model), range(STEPS)), model.state_dict()


def near(ours, believed, tolerance=1e-10):
    assert ours.keys() == believed.keys()
    for name, right in believed.items():
        mine, right = ours[name].double(), right.double()
        assert mine.shape == right.shape and (mine - right).norm() <= tolerance * right.norm(), name


@pytest.mark.parametrize("way", ["4", "2", "2 x 2"])
def test_a_run_on_several_processes_is_that_of_one(found, alone, way):
    """Loss, load, what was dropped, gradients and their norm at each step, and the weights that came of it."""
    (notes, weights), (believed, right) = found[0][way], alone
    assert (
        len(notes) == STEPS and min(note["norm"] for note in believed) > CONFIG.clip
    )  # it was clipped
    for note, expected in zip(notes, believed, strict=True):
        assert (
            torch.equal(note["load"], expected["load"])
            and note["load"].sum() == 2 * 2 * 8 * 16
            and note["dropped"] > 0.01
        )
        near(note, expected)
    near(weights, right)
    before = whole_model().state_dict()
    moved = {
        name: (right[name] - before[name]).flatten(1).norm(dim=1)
        for name in right
        if name.endswith((".up", ".out"))
    }
    assert len(moved) == 4 and all(
        each.min() > 0.01 for each in moved.values()
    )  # each expert had its turn
    for rank in range(4):  # all clip alike
        assert [note["norm"].item() for note in found[rank][way][0]] == [
            note["norm"].item() for note in notes
        ]


def test_a_checkpoint_of_4_processes_goes_on_with_2_and_with_1(found, alone):
    model = whole_model(seed=1)
    optimizers = make_optimizers(CONFIG, model)
    checkpoint.restore(model, optimizers, checkpoint.load(Path(found[0]["passed on"])))
    (note,) = trained(model, optimizers, range(4, 5))
    near(note, alone[0][4])
    near(model.state_dict(), alone[1])


# ---- one process, and what cannot be -----------------------------------------------------------------------------------------


def test_where_nothing_is_split_nothing_changes():
    model, again = whole_model(), whole_model()
    for one in (model, again):
        one(torch.arange(16)[None])[0].square().sum().backward()
    assert expert_parameters(model) == []
    assert torch.equal(
        clip_grad_norm(model, 0.5), nn.utils.clip_grad_norm_(again.parameters(), 0.5)
    )
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    state = model.state_dict()
    assert list(as_dtensors(model, state).items()) == list(state.items())


@pytest.mark.parametrize(
    ("model", "words"),
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
def test_experts_that_cannot_be_shared_evenly_are_refused_with_the_mend(model, words, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    before = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        split_experts(model, None)
    assert {name: p.shape for name, p in model.named_parameters()} == before
