"""The grader of lesson 05 accepts every correct implementation, and its references are those of
nanods/planner."""

from dataclasses import replace

import pytest
import steps_05
import torch

from nanods.build import build_meta_model
from nanods.config import PRESETS
from nanods.distributed.mesh import Mesh
from nanods.planner.cost import bytes_sent, memory_per_gpu, transfer_seconds
from nanods.planner.hardware import GPUS
from nanods.planner.memory import StepConfig, activation_bytes, model_cost, step_config
from nanods.planner.search import evaluate, make_job
from tests.lessons.wrong_answers import equal_pairs, grade_answer

# ---- other right answers -------------------------------------------------------------------------


def state_in_fp32(outside, experts, adamw, n, ep, is_fsdp):
    share = n if is_fsdp else 1
    here = outside / share + (experts / n if is_fsdp else experts / ep)
    return torch.tensor([4 * here, 4 * here, 4 * here + 4 * adamw / share])


def state_by_optimizer(outside, experts, adamw, n, ep, is_fsdp):
    """Count bytes of Muon's and of AdamW's parameters."""
    muon = (outside - adamw) / n + experts / n if is_fsdp else outside - adamw + experts / ep
    adamw = adamw / n if is_fsdp else adamw
    return torch.stack([torch.tensor(4.0 * muon + x * adamw) for x in (4, 4, 8)])


def state_by_product(outside, experts, adamw, n, ep, is_fsdp):
    counts = torch.tensor([outside, experts, adamw], dtype=torch.float64)
    counts = counts / torch.tensor([n, n, n] if is_fsdp else [1, ep, 1])
    return torch.tensor([[4, 4, 0], [4, 4, 0], [4, 4, 4]], dtype=torch.float64) @ counts


def state_by_integers(outside, experts, adamw, n, ep, is_fsdp):
    here = (outside + experts) // n if is_fsdp else outside + experts // ep
    moments = 4 * adamw // n if is_fsdp else 4 * adamw
    return torch.tensor([4 * here, 4 * here, 4 * here + moments]).float()


def state_by_loops(outside, experts, adamw, n, ep, is_fsdp):
    result = torch.zeros(3, dtype=torch.float64)
    for kind, count in (("muon", outside - adamw), ("adamw", adamw), ("experts", experts)):
        share = n if is_fsdp else (ep if kind == "experts" else 1)
        for i, size in enumerate((4, 4, 8 if kind == "adamw" else 4)):
            result[i] += size * count / share
    return result


def activations_by_time(saved, backward, width, ends, tokens, checkpointing):
    """Follow the memory through backward, block by block."""
    kept = [4.0 * width if checkpointing else float(each) for each in saved]
    fullest = 0.0
    for b in reversed(range(len(saved))):
        again = float(saved[b]) if checkpointing else 0.0
        fullest = max(fullest, sum(kept) + again + float(backward[b]))
    return torch.tensor(tokens * (ends + fullest))


def activations_by_where(saved, backward, width, ends, tokens, checkpointing):
    on = torch.tensor(checkpointing)
    kept = torch.where(on, torch.full_like(saved, 4 * width), saved).sum()
    return tokens * (ends + kept + (backward + on * saved).amax())


def activations_in_fp32(saved, backward, width, ends, tokens, checkpointing):
    saved, backward = saved.float(), backward.float()
    if checkpointing:
        return (torch.max(saved + backward) + 4 * width * saved.numel() + ends) * tokens
    return (saved.sum() + backward.max() + ends) * tokens


def activations_by_sorting(saved, backward, width, ends, tokens, checkpointing):
    beside = (saved + backward if checkpointing else backward).sort().values[-1]
    kept = torch.full((len(saved),), 4.0 * width).sum() if checkpointing else saved.sum()
    return (kept + beside) * tokens + ends * tokens


def activations_by_lists(saved, backward, width, ends, tokens, checkpointing):
    pairs = list(zip(saved.tolist(), backward.tolist(), strict=True))
    if checkpointing:
        per_token = sum(4 * width for _ in pairs) + max(s + b for s, b in pairs)
    else:
        per_token = sum(s for s, _ in pairs) + max(b for _, b in pairs)
    return torch.tensor((per_token + ends) * tokens, dtype=torch.float64)


def sent_by_steps(outside, experts, n, ep, micro_batches, is_fsdp):
    """Count the ring's steps: m - 1 of a chunk of 1/m."""

    def ring(size, m):
        return sum(size / m for _ in range(m - 1))

    totals = [0.0, 0.0, 0.0]
    for parameters, m in ((outside, n), (experts / ep, n // ep)):
        if is_fsdp:
            for _ in range(micro_batches):
                totals[1] += ring(2 * parameters, m) + ring(2 * parameters, m)
                totals[2] += ring(4 * parameters, m)
        else:
            totals[0] += 2 * ring(4 * parameters, m)
    return torch.tensor(totals)


def sent_by_shards(outside, experts, n, ep, micro_batches, is_fsdp):
    """Send all but the own shard."""
    size = outside - outside / n + experts / ep - experts / n
    parts = (0, 4 * micro_batches * size, 4 * micro_batches * size) if is_fsdp else (8 * size, 0, 0)
    return torch.tensor(parts, dtype=torch.float64)


def sent_by_dot(outside, experts, n, ep, micro_batches, is_fsdp):
    sizes = torch.tensor([outside, experts / ep], dtype=torch.float64)
    shares = torch.tensor([(n - 1) / n, (n / ep - 1) / (n / ep)], dtype=torch.float64)
    factors = [0, 4 * micro_batches, 4 * micro_batches] if is_fsdp else [8, 0, 0]
    return (sizes @ shares) * torch.tensor(factors, dtype=torch.float64)


def sent_by_filling(outside, experts, n, ep, micro_batches, is_fsdp):
    result = torch.zeros(3)
    bytes_of = 4 * (outside * (1 - 1 / n) + experts * (1 / ep - 1 / n))
    if is_fsdp:
        result[1:] = micro_batches * bytes_of
    else:
        result[0] = 2 * bytes_of
    return result


def sent_as_halves(outside, experts, n, ep, micro_batches, is_fsdp):
    """An all-reduce is a reduce-scatter and an all-gather."""
    half = 4 * (n - 1) * outside / n + 4 * (n - ep) * experts / (ep * n)
    both = torch.tensor([half, half]).double()
    if is_fsdp:
        return torch.cat([torch.zeros(1).double(), both * micro_batches])
    return torch.cat([both.sum()[None], torch.zeros(2).double()])


def seconds_by_loop(tokens, flops, peak, utilization, checkpointing, sent, speed, waits):
    computing, waiting, hidden = tokens * flops / peak / utilization, 0.0, 0.0
    if checkpointing:
        computing += computing / 3
    for size, rate, is_waited in zip(sent.tolist(), speed.tolist(), waits.tolist(), strict=True):
        if is_waited:
            waiting += size / rate
        else:
            hidden += size / rate
    return torch.tensor([computing, waiting, hidden, max(computing + waiting, hidden)])


def seconds_by_products(tokens, flops, peak, utilization, checkpointing, sent, speed, waits):
    times = sent / speed
    result = torch.zeros(4, dtype=torch.float64)
    result[0] = tokens * flops * (3 + checkpointing) / 3 / (utilization * peak)
    result[1] = times @ waits.double()
    result[2] = times.sum() - result[1]
    result[3] = result[:2].sum().maximum(result[2])
    return result


def seconds_in_fp32(tokens, flops, peak, utilization, checkpointing, sent, speed, waits):
    times = (sent / speed).float()
    computing = torch.tensor(tokens * flops / (peak * utilization)).float()
    computing = computing * (4 / 3) if checkpointing else computing
    waiting = times.masked_fill(~waits, 0).sum()
    hidden = times.masked_fill(waits, 0).sum()
    return torch.stack([computing, waiting, hidden, (computing + waiting).clamp(min=hidden)])


def seconds_by_thirds(tokens, flops, peak, utilization, checkpointing, sent, speed, waits):
    forward = tokens * flops / 3 / (peak * utilization)
    computing = forward * (2 if checkpointing else 1) + 2 * forward
    waiting = torch.where(waits, sent / speed, 0).sum().item()
    hidden = torch.where(waits, 0, sent / speed).sum().item()
    exposed = max(0.0, hidden - computing - waiting)
    return torch.tensor([computing, waiting, hidden, computing + waiting + exposed]).double()


def seconds_by_scatter(tokens, flops, peak, utilization, checkpointing, sent, speed, waits):
    sums = torch.zeros(2, dtype=torch.float64).index_add(0, (~waits).long(), sent / speed)
    computing = torch.full((1,), tokens * flops / (peak * utilization), dtype=torch.float64)
    computing = computing * (1 + int(checkpointing) / 3)
    step = torch.cat([computing + sums[0], sums[1:]]).amax()
    return torch.cat([computing, sums, step[None]])


def clusters_by_table(sharded, fixed, capacity, limit):
    n = 2 ** torch.arange(limit.bit_length())
    fits = sharded[:, None] / n + fixed[:, None] <= capacity  # (M, numbers)
    return torch.where(fits.any(1), n[fits.int().argmax(1)], 0)


def clusters_by_loops(sharded, fixed, capacity, limit):
    result = []
    for s, f in zip(sharded.tolist(), fixed.tolist(), strict=True):
        n = 1
        while n <= limit and s / n + f > capacity:
            n = 2 * n
        result.append(n if n <= limit else 0)
    return torch.tensor(result, dtype=torch.int32)


def clusters_from_above(sharded, fixed, capacity, limit):
    result, n = torch.zeros(len(sharded), dtype=torch.int64), 1 << (limit.bit_length() - 1)
    while n:
        result[sharded / n + fixed <= capacity] = n
        n //= 2
    return result


def clusters_by_count(sharded, fixed, capacity, limit):
    """More GPUs never need more memory, so count the numbers that do not fit."""
    numbers = [1 << i for i in range(limit.bit_length())]
    too_few = sum((sharded / n + fixed > capacity).long() for n in numbers)
    return (1 << too_few) * (too_few < len(numbers))


def clusters_by_recursion(sharded, fixed, capacity, limit, n=1):
    if n > limit:
        return torch.zeros(len(sharded), dtype=torch.long)
    more = clusters_by_recursion(sharded, fixed, capacity, limit, 2 * n)
    return torch.where(sharded / n + fixed <= capacity, n, more)


def utilization_by_loops(load, devices):
    per_device = load.size(2) // devices
    times = []
    for group in load.tolist():
        time = 0
        for layer in group:
            starts = range(0, len(layer), per_device)
            time += max(sum(layer[i : i + per_device]) for i in starts)
        times.append(time)
    return torch.tensor(load.sum().item() / (len(load) * devices * max(times)))


def utilization_by_means(load, devices):
    """Divide the mean by the maximum of times that are means themselves."""
    rows = load.double().reshape(*load.shape[:2], devices, -1).mean(-1)
    return rows.mean() / (rows.max(-1).values.mean(-1)).max()


def utilization_by_sums(load, devices):
    R, L, E = load.shape
    ends = torch.arange(devices) * (E // devices) + E // devices - 1
    rows = load.cumsum(-1)[..., ends].diff(dim=-1, prepend=torch.zeros(R, L, 1, dtype=torch.long))
    return load.sum() / (R * devices * rows.max(-1).values.sum(-1).max())


def utilization_by_chunks(load, devices):
    rows = torch.stack([part.sum(-1) for part in load.tensor_split(devices, -1)])  # (G, R, L)
    time = max(group.max(0).values.sum().item() for group in rows.unbind(1))
    return torch.tensor(load.sum().item() / (time * devices * load.size(0)), dtype=torch.float64)


def utilization_by_numpy(load, devices):
    rows = load.numpy().reshape(*load.shape[:2], devices, -1).sum(-1)
    step = rows.max(-1).sum(-1).max()
    return torch.tensor((rows.sum((1, 2)) / (devices * step)).mean())


ANSWERS = [
    *(("state_memory", f) for f in (state_in_fp32, state_by_optimizer, state_by_product)),
    *(("state_memory", f) for f in (state_by_integers, state_by_loops)),
    *(("activation_memory", f) for f in (activations_by_time, activations_by_where)),
    *(("activation_memory", f) for f in (activations_in_fp32, activations_by_sorting)),
    ("activation_memory", activations_by_lists),
    *(("sent_bytes", f) for f in (sent_by_steps, sent_by_shards, sent_by_dot)),
    *(("sent_bytes", f) for f in (sent_by_filling, sent_as_halves)),
    *(("step_seconds", f) for f in (seconds_by_loop, seconds_by_products, seconds_in_fp32)),
    *(("step_seconds", f) for f in (seconds_by_thirds, seconds_by_scatter)),
    *(("smallest_cluster", f) for f in (clusters_by_table, clusters_by_loops)),
    *(("smallest_cluster", f) for f in (clusters_from_above, clusters_by_count)),
    ("smallest_cluster", clusters_by_recursion),
    *(("utilization", f) for f in (utilization_by_loops, utilization_by_means)),
    *(("utilization", f) for f in (utilization_by_sums, utilization_by_chunks)),
    ("utilization", utilization_by_numpy),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_correct_answers_pass(name, function):
    assert grade_answer(steps_05.STEPS, name, function).message == "OK"


def test_the_targets_of_the_stubs_are_right():
    targets = [
        (steps_05.reference_state(100, 800, 10, 8, 4, False), [1200, 1200, 1240]),
        (steps_05.reference_sent(100, 800, 8, 4, 1, False), [1500, 0, 0]),
        (steps_05.reference_sent(100, 800, 8, 4, 2, True), [0, 1500, 1500]),
        (steps_05.parts_of(1, 0.5, 2), [1, 0.5, 2, 2]),
    ]
    blocks = torch.tensor([100.0, 300.0]), torch.tensor([50.0, 20.0]), 5, 10.0, 1
    for checkpointing, size in ((False, 460), (True, 370)):
        targets.append((steps_05.reference_activations(*blocks, checkpointing), size))
    models = torch.tensor([100.0, 100.0]), torch.tensor([10.0, 35.0]), 35.0, 64
    targets.append((steps_05.reference_clusters(*models), [4, 0]))
    for reference, target in targets:
        assert reference.tolist() == target


def test_no_two_mistakes_give_the_same_result():
    """Otherwise the grader never reports one of them. And none gives the right one."""
    model = steps_05.MODEL
    tables = []
    for flag in (False, True):
        case = (*model, 32, 8, flag)
        tables.append((steps_05.known_states(*case), steps_05.reference_state(*case)))
        case = (*steps_05.blocks(), flag)
        tables.append((steps_05.known_activations(*case), steps_05.reference_activations(*case)))
        case = (*model[:2], 32, 8, 3, flag)
        tables.append((steps_05.known_sent(*case), steps_05.reference_sent(*case)))
    case = steps_05.models()
    tables.append((steps_05.known_clusters(*case), steps_05.reference_clusters(*case)))
    for known, right in tables:
        assert not equal_pairs(known | {"right": lambda right=right: right})
    load = steps_05.random_loads()
    utilizations = steps_05.known_utilizations(load.double(), 4)
    utilizations["right"] = steps_05.reference_utilization(load, 4)
    assert not equal_pairs(utilizations, 2e-6)


# ---- the references are the planner's ------------------------------------------------------------

A100 = GPUS["a100-80gb"]
MESHES = [Mesh.of(dp=32), Mesh.of(fsdp=32), Mesh.of(dp=4, ep=8), Mesh.of(fsdp=4, ep=8)]
each_mesh = pytest.mark.parametrize("mesh", MESHES, ids=str)
CONFIG = PRESETS["v2-base"]
COST = model_cost(build_meta_model(CONFIG))


def outside_and_experts():
    return COST.total - COST.experts, COST.experts


@each_mesh
def test_the_state_is_that_of_the_planner(mesh):
    memory = memory_per_gpu(CONFIG, COST, mesh, step_config(CONFIG, "cuda", 1))
    planned = torch.tensor([memory[kind] for kind in steps_05.STATE])
    case = (*outside_and_experts(), COST.adamw, mesh.world_size, mesh.ep, mesh.is_fsdp)
    assert steps_05.agrees(steps_05.reference_state(*case), planned)


@each_mesh
def test_the_bytes_sent_are_those_of_the_planner(mesh):
    step = step_config(CONFIG, "cuda", 2)
    planned = dict.fromkeys(steps_05.COLLECTIVES, 0.0)
    for (collective, _), size in bytes_sent(CONFIG, COST, mesh, step).items():
        if collective in planned:
            planned[collective] += size
    micro_batches = CONFIG.batch_size // mesh.world_size // 2
    case = (*outside_and_experts(), mesh.world_size, mesh.ep, micro_batches, mesh.is_fsdp)
    assert steps_05.agrees(steps_05.reference_sent(*case), torch.tensor(list(planned.values())))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_are_those_of_the_planner(checkpointing):
    step, C = StepConfig("cuda", 2, 3, checkpointing), CONFIG.model.n_embd
    T = CONFIG.model.context_length
    layer = {"itemsize": 2, "tp": 1, "imbalance": 1.0}
    blocks = list(COST.model.trunk_blocks("tokens"))
    masked = "tokens" in COST.model.masked_inputs()
    saved = [sum(b.activation_bytes(T, "cuda", masked=masked, **layer)) for b in blocks]
    backward = [sum(block.backward_bytes(**layer)) for block in blocks]
    case = (torch.tensor(saved), torch.tensor(backward), C, 10.0 * C, 3 * T, checkpointing)
    planned = torch.tensor(activation_bytes(CONFIG, COST, step))
    assert steps_05.agrees(steps_05.reference_activations(*case), planned)


@each_mesh
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_seconds_are_those_of_the_planner(mesh, checkpointing):
    job = make_job(CONFIG, A100, mesh.world_size)
    planned = evaluate(job, mesh, 1, checkpointing)
    tokens = CONFIG.batch_size // mesh.world_size * CONFIG.model.context_length
    sent, speed, waits = [], [], []
    for (collective, group), size in planned.bytes_sent.items():
        sent.append(size)
        speed.append(size / transfer_seconds(size, collective, group, mesh, A100))
        waits.append(collective == "all-to-all")
    lists = (torch.tensor(sent), torch.tensor(speed), torch.tensor(waits))
    case = (tokens, job.flops_per_token, A100.flops, job.mfu, checkpointing, *lists)
    names = ("computing", "waiting", "hidden", "step")
    right = torch.tensor([planned.seconds[name] for name in names])
    assert steps_05.agrees(steps_05.reference_seconds(*case), right)


def test_the_smallest_cluster_is_that_of_the_planner():
    config = replace(PRESETS["v2-full"], batch_size=1 << 10)
    job = make_job(config, A100, 1)
    memory = {n: evaluate(job, Mesh.of(fsdp=n), 1, True) for n in (32, 64)}
    kinds = ("weights", "gradients", "optimizer")
    sharded = 32 * sum(memory[32].memory[kind] for kind in kinds)
    fixed = memory[32].total_bytes - sharded / 32
    number = steps_05.reference_clusters(
        torch.tensor([sharded]), torch.tensor([fixed]), A100.usable_memory, 1 << 10
    ).item()
    assert evaluate(job, Mesh.of(fsdp=number), 1, True).fits
    assert not evaluate(job, Mesh.of(fsdp=number // 2), 1, True).fits
