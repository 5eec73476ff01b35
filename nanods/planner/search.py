"""Which ways to share out a training step fit, which is the quickest, and what to change where none does.

A `Job` (what, on what, how long) -> `plan` -> a `Plan`: for each kind of mesh the best `Option`, and the one chosen or the
smallest change that would help. All of it is arithmetic, on nanods/planner/memory.py (bytes) and meshes.py (sending, seconds).

Pinned by tests/planner/test_plan.py: more memory never fits less, more GPUs never hold more each (fsdp), a suggest mends.
"""

from dataclasses import dataclass, replace

import torch

from nanods.build import build_meta_model
from nanods.config import PRESETS, Config
from nanods.distributed.mesh import Mesh as RunMesh
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.planner.cost import MESHES, Mesh, memory_per_gpu, possible, sent, step_seconds
from nanods.planner.hardware import GPUS, Device, device_here, main_memory, room
from nanods.planner.memory import (
    Counts,
    Setting,
    activations,
    counts,
    sequences,
    setting,
)

MOST = 1 << 16  # GPUs that a suggest may ask for
SERVING = (
    "1 x v100-32gb",
    "1 x rtx4090-24gb",
    "1 x h100-80gb",
    "8 x a100-80gb",
    "16 x a100-80gb",
    "8 x h200-141gb",
)


@dataclass(frozen=True)
class Job:
    """What is to be planned."""

    config: Config
    counts: Counts
    flops_per_token: float
    device: Device
    gpus: int
    tokens: float
    mfu: float = 0.4
    load: list[list[int]] | None = None
    """Of each layer's experts."""
    mesh: str = "auto"
    checkpointing: str = "auto"


@dataclass(frozen=True)
class Option:
    """A mesh, with the micro-batch that suits it, and what that means for each GPU."""

    mesh: Mesh
    setting: Setting
    memory: dict[str, float]
    """Bytes by kind."""
    sent: dict[tuple[str, str], float]
    """Bytes in a step, by what is done and among whom."""
    took: dict[str, float]
    """Seconds of a step: computing, waiting, hidden, and "step", the whole."""
    fits: bool

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    job: Job
    options: dict[str, Option]
    """The best of each kind of mesh: the quickest that fits, else the smallest."""
    why: dict[str, str]
    """Of the other kinds, why there is none."""
    chosen: Option | None
    suggestion: str | None
    """Where nothing fits: the smallest change that does."""

    @property
    def hours(self) -> float | None:
        return hours(self.job, self.chosen) if self.chosen else None


def make_job(config: Config, device: Device, gpus: int, tokens: float | None = None, **rest) -> Job:
    """Raises UserError for a model that cannot be, and for numbers that mean nothing."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: at least one must compute")
    if gpus > 1 and not device.link:
        raise UserError(
            f"--gpus {gpus}: {device.name} is no GPU of the table; name one with --gpu ({', '.join(GPUS)})"
        )
    if tokens is not None and not 0 < tokens < float("inf"):
        raise UserError(f"--tokens {tokens:g}: must be above 0, such as 100e9")
    if not 0 < rest.get("mfu", 0.4) <= 1:
        raise UserError(
            f"--mfu {rest['mfu']:g}: a share of the peak, above 0 and at most 1; 0.3 to 0.5 is usual"
        )
    model = build_meta_model(config)
    a_step = config.batch_size * sum(sequences(config).values())
    flops = (
        model.flops_per_token()
        if isinstance(model, GPT)
        else model.flops_per_example() / sum(sequences(config).values())
    )
    return Job(config, counts(model), flops, device, gpus, tokens or config.steps * a_step, **rest)


# ---- the experts' load -------------------------------------------------------------------------------------------------------


def overload(load: list[list[int]], devices: int) -> float:
    """Tokens of the busiest of some devices over the mean, a mean over the layers: load (L, E), the experts dealt out in order.

    Where E experts cannot be dealt out evenly, each counts as a device of its own, which is the worst case.
    """
    worst = []
    for row in load:
        E = len(row)
        each = E // devices if E % devices == 0 else 1
        sums = [sum(row[i : i + each]) for i in range(0, E, each)]
        worst.append(max(sums) * len(sums) / max(1, sum(sums)))
    return sum(worst) / len(worst)


# ---- what is possible --------------------------------------------------------------------------------------------------------


def option(job: Job, mesh: Mesh, micro_batch: int, checkpointing: bool) -> Option:
    base = setting(job.config, job.device.kind, micro_batch)
    uneven = overload(job.load, mesh.group) if mesh.group > 1 and job.load else 1.0
    s = replace(base, checkpointing=checkpointing, overload=uneven)
    memory = memory_per_gpu(job.config, job.counts, mesh, s)
    moved = sent(job.config, job.counts, mesh, s)
    took = step_seconds(job.config, job.counts, mesh, s, job.device, job.flops_per_token, job.mfu)
    return Option(mesh, s, memory, moved, took, sum(memory.values()) <= job.device.room)


def options(job: Job, mesh: Mesh) -> list[Option]:
    """With and without checkpointing, each with the largest micro-batch that fits, or else with the smallest."""
    each = -(-job.config.batch_size // mesh.ranks)
    sizes = (
        [job.config.micro_batch]
        if job.config.micro_batch
        else [n for n in range(each, 0, -1) if each % n == 0]
    )
    found = []
    for checkpointing in {"auto": (False, True), "on": (True,), "off": (False,)}[job.checkpointing]:
        tried = (option(job, mesh, min(n, each), checkpointing) for n in sizes)
        found.append(
            next((o for o in tried if o.fits), None)
            or option(job, mesh, min(sizes[-1], each), checkpointing)
        )
    return found


def better(o: Option) -> tuple:
    """What orders options: those that fit by time, the others by memory."""
    return not o.fits, o.took["step"] if o.fits else o.bytes, MESHES.index(o.mesh.kind), o.bytes


def best_per_kind(job: Job) -> tuple[dict[str, Option], dict[str, str]]:
    meshes, why = possible(job.config, job.gpus)
    if job.mesh != "auto":
        meshes = [mesh for mesh in meshes if mesh.kind == job.mesh]
        if not meshes:
            raise UserError(
                f"--mesh {job.mesh}: {why[job.mesh]}; choose another, or leave the flag out"
            )
        why = {}
    best = {}
    for mesh in meshes:
        best[mesh.kind] = min(
            [*options(job, mesh), *filter(None, [best.get(mesh.kind)])], key=better
        )
    return best, why


def plan(job: Job) -> Plan:
    best, why = best_per_kind(job)
    fitting = [o for o in best.values() if o.fits]
    chosen = min(fitting, key=better) if fitting else None
    return Plan(job, best, why, chosen, None if chosen else suggest(job))


def suggest(job: Job) -> str:
    """The smallest change after which a job fits that does not, in words; by trying them one after the other."""
    micro = job.config.micro_batch or 1
    smaller = [n for n in range(micro - 1, 0, -1) if micro % n == 0]
    changes = [
        (f"--micro-batch {n}", replace(job, config=replace(job.config, micro_batch=n)))
        for n in smaller
    ]
    if job.checkpointing == "off":
        changes.append(
            ("activation checkpointing (--checkpointing on)", replace(job, checkpointing="on"))
        )
    if job.mesh != "auto":
        kinds = [
            kind
            for kind in MESHES
            if kind != job.mesh and kind not in possible(job.config, job.gpus)[1]
        ]
        changes += [
            (f"--mesh '{kind}' instead of {job.mesh}", replace(job, mesh=kind)) for kind in kinds
        ]
    free = replace(
        job, mesh="auto", checkpointing="auto", config=replace(job.config, micro_batch=None)
    )
    flags = {
        "mesh": job.mesh != "auto",
        "checkpointing": job.checkpointing != "auto",
        "micro-batch": job.config.micro_batch,
    }
    without = (
        f" without --{', --'.join(flag for flag, given in flags.items() if given)}"
        if free != job
        else ""
    )
    changes += [(without.strip(), free)] if without else []
    changes += [(f"--gpus {n}", replace(job, gpus=n)) for n in more(job)]
    changes += (
        [(f"--gpus {n}{without}", replace(free, gpus=n)) for n in more(job)] if without else []
    )
    larger = sorted(
        (g for g in GPUS.values() if g.memory > job.device.memory), key=lambda g: g.memory
    )
    changes += [(f"--gpu {gpu.name}{without}", replace(free, device=gpu)) for gpu in larger]
    changes += [
        (f"--gpu {g.name} --gpus {n}{without}", replace(free, device=g, gpus=n))
        for g in larger[-1:]
        for n in more(job, True)
    ]
    for words, changed in changes:
        fits = (
            [o for o in best_per_kind(changed)[0].values() if o.fits] if has_mesh(changed) else []
        )
        if fits:
            return f"{words}, then {in_short(min(fits, key=better))}"
    return (
        f"nothing up to {MOST:,} GPUs: make the model smaller (--n-layer, --n-embd, --moe.n-expert)"
    )


def more(job: Job, anyway: bool = False) -> list[int]:
    """Twice, four times, ... as many GPUs; none where there are no links to others."""
    return (
        [job.gpus << i for i in range(1, 17) if job.gpus << i <= MOST]
        if anyway or job.device.link
        else []
    )


def has_mesh(job: Job) -> bool:
    return job.mesh == "auto" or job.mesh not in possible(job.config, job.gpus)[1]


def hours(job: Job, o: Option) -> float:
    return (
        job.tokens
        / (job.config.batch_size * sum(sequences(job.config).values()))
        * o.took["step"]
        / 3600
    )


def in_short(o: Option) -> str:
    kept = ", checkpointing" if o.setting.checkpointing else ""
    return f"{o.mesh}, micro-batch {o.setting.micro_batch}{kept}, {o.bytes / 1e9:.3g} GB"


def choose_mesh(config: Config, processes: int) -> tuple[str | None, str]:
    """The mesh of a training run, and why: what --mesh says, else copies where a step fits so, if only item by item, else fsdp.

    By all of a device's memory, not by what is free: the processes must come to the same.
    """
    if config.mesh or processes == 1:
        return config.mesh, "as asked"
    kind, memory = device_here()
    held, how, has = counts(build_meta_model(config)), setting(config, kind, 1), room(kind, memory) / 1e9
    copy, part = (
        sum(memory_per_gpu(config, held, Mesh(name, processes), how).values()) / 1e9
        for name in ("dp", "fsdp")
    )
    if copy <= has:
        return (
            f"dp={processes}",
            f"a copy's step needs {copy:.3g} GB at least, a process has {has:.3g}",
        )
    return (
        f"fsdp={processes}",
        f"a copy's step needs {copy:.3g} GB, a process has {has:.3g}; shared out {part:.3g}",
    )


# ---- inference ---------------------------------------------------------------------------------------------------------------


def cache_bytes(config: Config) -> int:
    """Bytes of one sequence's cache at full context, as nanods/cache.py keeps it, in bf16; V3 keeps none."""
    m, a = config.model, config.model.attention
    if config.multimodal.modalities:
        return 0
    size = a.block_size if a.kind == "block" else 1
    N = -(-m.context_length // size)
    summaries = N * (2 if a.pool == "bound" else 1) * m.n_embd * 2 + N * m.n_head * a.top_blocks * 8
    return m.n_layer * (4 * m.n_embd * N * size + (summaries if a.kind == "block" else 0))


def served(config: Config, c: Counts, device: Device, gpus: int) -> int:
    """Sequences of full context (V3: items) at a time, weights in bf16 shared out over the GPUs; 0 where they do not fit."""
    free = gpus * device.room - 2 * c.total
    return max(
        0,
        int(free // (cache_bytes(config) or activations(config, setting(config, device.kind, 1)))),
    )


def where(hardware_names: tuple[str, ...] = SERVING) -> list[dict[str, str]]:
    """For each preset of V1 to V3 from small on: how it trains on some hardware, and how many sequences it serves there."""
    rows = []
    for name, config in PRESETS.items():
        if name[:2] == "v0" or name.endswith("tiny"):
            continue
        row = {"preset": name}
        for words in hardware_names:
            number, gpu = words.split(" x ")
            job = make_job(config, GPUS[gpu], int(number))
            best = [o for o in best_per_kind(job)[0].values() if o.fits]
            trains = (
                "no" if not best else "yes" if job.gpus == 1 else min(best, key=better).mesh.kind
            )
            row[words] = f"{trains} / {served(config, job.counts, job.device, job.gpus):,}"
        rows.append(row)
    return rows


# ---- for a run of train.py -------------------------------------------------------------------


def step_memory(config: Config, mesh: RunMesh, device_kind: str, micro_batch: int) -> float:
    """Return the estimated bytes of a training step on each process."""
    model_counts = counts(build_meta_model(config))
    planned = Mesh(" x ".join(mesh.axes), mesh.world_size, mesh.ep)
    setup = setting(config, device_kind, micro_batch)
    return sum(memory_per_gpu(config, model_counts, planned, setup).values())


def largest_micro_batch(config: Config, mesh: RunMesh, device: torch.device) -> int:
    """Return the largest divisor of a process's batch whose step should take at most 80% of the free memory, at least 1."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = main_memory()
    local_batch_size = config.batch_size // mesh.batch_shards
    for micro_batch in range(local_batch_size, 0, -1):
        divides = local_batch_size % micro_batch == 0
        if divides and step_memory(config, mesh, device.type, micro_batch) <= 0.8 * free:
            return micro_batch
    return 1
