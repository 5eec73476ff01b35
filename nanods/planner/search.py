"""Search for the fastest mesh and micro-batch that fit, or for a change that makes them fit.

A `Job` says what to train, on what and for how long. `plan(job)` evaluates the possible meshes and
returns a `Plan`: the best `Candidate` of each kind of mesh and the chosen one, or else the smallest
change after which one fits. Everything is arithmetic on memory.py (bytes) and cost.py (bytes sent,
seconds).

train.py asks `choose_mesh` and `largest_micro_batch` what its flags leave open.

Pinned by tests/planner/test_plan.py: with fsdp more GPUs never hold more each, a larger micro-batch
never takes less memory, and a suggested change makes the job fit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from nanods.build import build_meta_model
from nanods.config import Config
from nanods.distributed.mesh import Mesh
from nanods.errors import UserError
from nanods.planner.cost import (
    MESH_KINDS,
    bytes_sent,
    memory_per_gpu,
    possible_meshes,
    step_seconds,
)
from nanods.planner.hardware import GPUS, Device, local_device, main_memory, usable_memory
from nanods.planner.memory import (
    ModelCost,
    StepConfig,
    evaluation_bytes,
    model_cost,
    sequence_lengths,
    step_config,
    teacher_bytes,
    tokens_per_batch,
)

MAX_GPUS = 1 << 16  # the most that a suggestion asks for


@dataclass(frozen=True)
class Job:
    """What to plan."""

    config: Config
    cost: ModelCost
    flops_per_token: float
    device: Device
    gpus: int
    tokens: float
    """Tokens of the whole run, over all modalities."""
    mfu: float = 0.4
    """Fraction of its peak FLOP/s that a device reaches (model FLOPs utilization)."""
    load: list[list[int]] | None = None
    """Tokens of each expert in each layer. None: an even load."""
    mesh: Mesh | None = None
    """None: any."""
    checkpointing: bool | None = None
    """Whether to use activation checkpointing. None: either."""


@dataclass(frozen=True)
class Candidate:
    """A mesh and a micro-batch, and what they mean for each GPU."""

    mesh: Mesh
    step: StepConfig
    memory: dict[str, float]
    """Bytes by kind."""
    bytes_sent: dict[tuple[str, str], float]
    """Bytes sent in a step, by collective and group."""
    seconds: dict[str, float]
    """Seconds of a step: "computing", "waiting", "hidden" and "step", the whole."""
    fits: bool

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())

    def __str__(self) -> str:
        checkpointing = ", activation checkpointing" if self.step.checkpointing else ""
        return (
            f"{self.mesh}, micro-batch {self.step.micro_batch}{checkpointing}, "
            f"{self.total_bytes / 1e9:.3g} GB"
        )


@dataclass(frozen=True)
class Plan:
    job: Job
    candidates: dict[str, Candidate]
    """The best of each kind of mesh: the fastest that fits, or else the smallest."""
    unavailable: dict[str, str]
    """The kinds of which there is no mesh, and why."""
    chosen: Candidate | None
    """The fastest that fits."""
    suggestion: str | None
    """If none fits, the smallest change after which one does."""

    @property
    def hours(self) -> float | None:
        return training_hours(self.job, self.chosen) if self.chosen else None


def make_job(
    config: Config,
    device: Device,
    gpus: int,
    tokens: float | None = None,
    mfu: float = 0.4,
    load: list[list[int]] | None = None,
    mesh: Mesh | None = None,
    checkpointing: bool | None = None,
) -> Job:
    """Return the job of training `config`, by default for the tokens of its steps.

    Raises UserError for a model that cannot be built, and for numbers out of range.
    """
    if gpus > 1 and not device.link:
        raise UserError(
            f"--gpus {gpus}: {device.name} is not a GPU of the table; "
            f"name one with --gpu ({', '.join(GPUS)})"
        )
    if mesh and mesh.world_size != gpus:
        raise UserError(
            f"--mesh {mesh} is for {mesh.world_size} GPUs, not for --gpus {gpus}: leave --gpus out"
        )
    model = build_meta_model(config)
    flops_per_token = model.flops_per_example() / sum(sequence_lengths(config).values())
    tokens = tokens or config.steps * tokens_per_batch(config)
    cost = model_cost(model)
    return Job(config, cost, flops_per_token, device, gpus, tokens, mfu, load, mesh, checkpointing)


def training_hours(job: Job, candidate: Candidate) -> float:
    """Return the hours that the whole run takes."""
    return job.tokens / tokens_per_batch(job.config) * candidate.seconds["step"] / 3600


def load_imbalance(load: list[list[int]], devices: int) -> float:
    """Return the tokens of the busiest device over the mean of all, averaged over the layers.

    `load` (L, E) counts the tokens of each expert in each layer. The devices hold the experts in
    order, E / devices each. If E does not divide, each expert counts as a device, the worst case.
    """
    imbalances = []
    for layer in load:
        E = len(layer)
        size = E // devices if E % devices == 0 else 1
        tokens = [sum(layer[i : i + size]) for i in range(0, E, size)]
        imbalances.append(max(tokens) * len(tokens) / max(1, sum(tokens)))
    return sum(imbalances) / len(imbalances)


# ---- candidates ----------------------------------------------------------------------------------


def evaluate(job: Job, mesh: Mesh, micro_batch: int, checkpointing: bool) -> Candidate:
    """Return the candidate with this mesh, micro-batch and use of activation checkpointing."""
    imbalance = load_imbalance(job.load, mesh.ep) if mesh.ep > 1 and job.load else 1.0
    step = replace(
        step_config(job.config, job.device.kind, micro_batch),
        checkpointing=checkpointing,
        imbalance=imbalance,
    )
    memory = memory_per_gpu(job.config, job.cost, mesh, step)
    sent = bytes_sent(job.config, job.cost, mesh, step)
    seconds = step_seconds(
        job.config, job.cost, mesh, step, job.device, job.flops_per_token, job.mfu
    )
    fits = sum(memory.values()) <= job.device.usable_memory
    return Candidate(mesh, step, memory, sent, seconds, fits)


def evaluate_mesh(job: Job, mesh: Mesh) -> list[Candidate]:
    """Return the candidates of a mesh, with and without activation checkpointing.

    Each has the largest micro-batch with which it fits, or else the smallest micro-batch.
    """
    local_batch = math.ceil(job.config.batch_size / mesh.batch_shards)
    micro_batches = divisors(local_batch)
    if job.config.micro_batch:
        micro_batches = [min(job.config.micro_batch, local_batch)]
    candidates = []
    for checkpointing in (False, True) if job.checkpointing is None else (job.checkpointing,):
        for micro_batch in micro_batches:
            candidate = evaluate(job, mesh, micro_batch, checkpointing)
            if candidate.fits:
                break
        candidates.append(candidate)
    return candidates


def divisors(n: int) -> list[int]:
    """Return the divisors of n, the largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


def preference(candidate: Candidate) -> tuple:
    """Return the key that sorts candidates: those that fit by time, then the others by memory."""
    amount = candidate.seconds["step"] if candidate.fits else candidate.total_bytes
    kind = MESH_KINDS.index(candidate.mesh.kind)
    return not candidate.fits, amount, kind, candidate.total_bytes


def best_per_kind(job: Job) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return the best candidate of each kind of mesh, and why the other kinds have none.

    Raises UserError if the job asks for a mesh that is not possible.
    """
    meshes, unavailable = possible_meshes(job.config, job.gpus)
    if job.mesh:
        if job.mesh not in meshes:
            choices = f"the choices are {', '.join(map(str, meshes))}"
            reason = unavailable.get(job.mesh.kind, choices)
            raise UserError(f"--mesh {job.mesh}: {reason}; choose another, or leave the flag out")
        meshes, unavailable = [job.mesh], {}
    best = {}
    for mesh in meshes:
        candidates = evaluate_mesh(job, mesh)
        if mesh.kind in best:
            candidates.append(best[mesh.kind])
        best[mesh.kind] = min(candidates, key=preference)
    return best, unavailable


def plan(job: Job) -> Plan:
    """Return the best candidates for a job, and the choice among them or a suggestion."""
    best, unavailable = best_per_kind(job)
    fitting = [candidate for candidate in best.values() if candidate.fits]
    if fitting:
        return Plan(job, best, unavailable, min(fitting, key=preference), None)
    return Plan(job, best, unavailable, None, suggest(job))


# ---- suggestions ---------------------------------------------------------------------------------


def suggest(job: Job) -> str:
    """Return the smallest change after which a job fits, for a job that does not.

    Tries one change after another.
    """
    for flags, changed in possible_changes(job):
        if changed.mesh and changed.mesh not in possible_meshes(changed.config, changed.gpus)[0]:
            continue
        fitting = [c for c in best_per_kind(changed)[0].values() if c.fits]
        if fitting:
            return f"{flags}, then {min(fitting, key=preference)}"
    return (
        f"nothing fits on up to {MAX_GPUS:,} GPUs: make the model smaller "
        "(--n-layer, --n-embd, --moe.n-expert)"
    )


def possible_changes(job: Job) -> Iterator[tuple[str, Job]]:
    """Yield changes of a job with the flags that make them, the smallest change first."""
    for n in divisors(job.config.micro_batch or 1)[1:]:
        yield f"--micro-batch {n}", replace(job, config=replace(job.config, micro_batch=n))
    if job.checkpointing is False:
        yield "--activation-checkpointing", replace(job, checkpointing=True)
    if job.mesh:
        for candidate in best_per_kind(replace(job, mesh=None))[0].values():
            if candidate.fits:
                flags = f"--mesh {candidate.mesh} instead of {job.mesh}"
                yield flags, replace(job, mesh=candidate.mesh)

    typed = typed_flags(job)
    without = f" without {', '.join(typed)}" if typed else ""
    config = replace(job.config, micro_batch=None)
    free = replace(job, mesh=None, checkpointing=None, config=config)
    if typed:
        yield without.strip(), free
    numbers = larger_numbers(job.gpus) if job.device.link else []
    for n in numbers:
        if job.mesh:  # the outer axis grows
            mesh = Mesh(job.mesh.axes, (job.mesh.sizes[0] * n // job.gpus, *job.mesh.sizes[1:]))
            yield f"--gpus {n} --mesh {mesh}", replace(job, gpus=n, mesh=mesh)
        else:
            yield f"--gpus {n}", replace(job, gpus=n)
    if typed:
        for n in numbers:
            yield f"--gpus {n}{without}", replace(free, gpus=n)
    larger = [gpu for gpu in GPUS.values() if gpu.memory > job.device.memory]
    larger.sort(key=lambda gpu: gpu.memory)
    for gpu in larger:
        yield f"--gpu {gpu.name}{without}", replace(free, device=gpu)
    for gpu in larger[-1:]:
        for n in larger_numbers(job.gpus):
            yield f"--gpu {gpu.name} --gpus {n}{without}", replace(free, device=gpu, gpus=n)


def typed_flags(job: Job) -> list[str]:
    """Return the flags that limit the search."""
    flags = []
    if job.mesh:
        flags.append("--mesh")
    if job.checkpointing is not None:
        flags.append(f"--{'' if job.checkpointing else 'no-'}activation-checkpointing")
    if job.config.micro_batch:
        flags.append("--micro-batch")
    return flags


def larger_numbers(gpus: int) -> list[int]:
    """Return twice, four times, ... as many GPUs, up to MAX_GPUS."""
    return [gpus << i for i in range(1, 17) if gpus << i <= MAX_GPUS]


# ---- for train.py --------------------------------------------------------------------------------


def step_memory(
    config: Config, mesh: Mesh, device: str, micro_batch: int, cost: ModelCost | None = None
) -> float:
    """Return the bytes that a step needs on each "cpu" or "cuda" device.

    `cost` is that of the configuration's model, which is otherwise computed.
    """
    cost = cost or model_cost(build_meta_model(config))
    step = step_config(config, device, micro_batch)
    return sum(memory_per_gpu(config, cost, mesh, step).values())


def run_memory(config: Config, mesh: Mesh, device: str, micro_batch: int, cost: ModelCost) -> float:
    """Return the bytes that a run needs on each device: those of a step or of an evaluation."""
    step = step_config(config, device, micro_batch)
    memory = memory_per_gpu(config, cost, mesh, step)
    kept = sum(memory[kind] for kind in ("weights", "optimizer", "copies", "buffers"))
    return max(sum(memory.values()), kept + evaluation_bytes(config, cost, step))


def choose_mesh(config: Config, world_size: int) -> tuple[str | None, str]:
    """Return the mesh of a training run, as --mesh spells it, and the reason.

    Without --mesh it is dp if a step with one example fits a process that holds the whole model,
    otherwise fsdp. This compares with all of a device's memory, not with what is free, since all
    processes must choose the same mesh.
    """
    if config.mesh or world_size == 1:
        return config.mesh, "as asked"
    kind, memory = local_device()
    cost, available = model_cost(build_meta_model(config)), usable_memory(kind, memory) / 1e9
    dp, fsdp = Mesh.of(dp=world_size), Mesh.of(fsdp=world_size)
    whole = step_memory(config, dp, kind, 1, cost) / 1e9
    sharded = step_memory(config, fsdp, kind, 1, cost) / 1e9
    if whole <= available:
        return str(dp), f"a step needs {whole:.3g} GB at least, a process has {available:.3g}"
    return (
        str(fsdp),
        f"a step with the whole model needs {whole:.3g} GB, a process has {available:.3g}; "
        f"sharded it needs {sharded:.3g}",
    )


def largest_micro_batch(
    config: Config, mesh: Mesh, device: torch.device, teacher: Config | None = None
) -> int:
    """Return the largest micro-batch whose step should take at most 80% of the free memory, that of
    the teacher included.

    It divides the examples of a process. If none fits, it is 1.
    """
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else main_memory()
    cost = model_cost(build_meta_model(config))
    for micro_batch in divisors(config.batch_size // mesh.batch_shards):
        needed = step_memory(config, mesh, device.type, micro_batch, cost)
        if teacher:
            needed += teacher_bytes(config, teacher, step_config(config, device.type, micro_batch))
        if needed <= 0.8 * free:
            return micro_batch
    return 1
