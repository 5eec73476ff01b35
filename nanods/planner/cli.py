"""Plan a run before it starts, without a GPU: does it fit, how long does it take, what to change?

    python train.py v2-full --plan --gpus 512 --gpu a100-80gb --tokens 100e9
    python train.py v2-full --plan --mesh fsdp=64,ep=8 --gpu a100-80gb
    make plan-v2 SCALE=full ARGS="--gpus 512 --gpu a100-80gb"
    python train.py v1-tiny --plan               on this machine
    python -m nanods.planner --where             which preset fits on what

Besides these flags it reads any field of the preset. Parameters and FLOPs are exact. Memory is
added up tensor by tensor (nanods/planner/memory.py): within 25% of what is measured on a CPU, and
not measured on a GPU. Time follows from data sheets (hardware.py), the bytes sent (cost.py) and one
assumption, --mfu.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanods.build import build_meta_model
from nanods.command_line import from_command_line
from nanods.config import Config
from nanods.distributed.mesh import Mesh
from nanods.errors import UserError
from nanods.flags import refuse_out_of_range
from nanods.planner import hardware
from nanods.planner.capacity import capacity_table
from nanods.planner.cost import COLLECTIVES, LINK_EFFICIENCY, MESH_KINDS, expert_flops_fraction
from nanods.planner.memory import (
    MEMORY_KINDS,
    activation_bytes,
    sequence_lengths,
    teacher_bytes,
)
from nanods.planner.search import (
    Candidate,
    Job,
    Plan,
    evaluate,
    load_imbalance,
    make_job,
    plan,
    preference,
    training_hours,
)
from nanods.training.metrics import read_metrics
from nanods.training.teacher import check_sizes, find_teacher

MEASURED_LOAD = Path(__file__).parents[2] / "results" / "experts.json"
INDENT = " " * 11  # under the first column of the report


@dataclass(frozen=True)
class PlanArgs:
    plan: bool = True
    """Plan, do not train."""
    gpus: int | None = None
    """How many. Default: those of --mesh, or 1 of the --gpu named, or all of this machine's."""
    gpu: str | None = None
    """Which, by its name in nanods/planner/hardware.py. Default: this machine."""
    tokens: float | None = None
    """Tokens of the whole run (V3: of all modalities). Default: the preset's steps."""
    mfu: float = 0.4
    """Fraction of its peak that a device reaches while it computes: an assumption."""
    mesh: str = "auto"
    """How the GPUs share the work, such as dp=64,ep=8. auto: the fastest mesh that fits."""
    activation_checkpointing: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep only the input of each block, and compute the rest twice. Without this flag and the
    next: where it is faster, or where nothing else fits."""
    no_activation_checkpointing: tyro.conf.FlagCreatePairsOff[bool] = False
    """Never do so."""
    load: Path | None = None
    """A run whose expert load to use. Default: that of v2-tiny in results/experts.json."""
    where: bool = False
    """Instead, print for all presets which hardware they fit on."""

    @property
    def checkpointing(self) -> bool | None:
        """Whether to use activation checkpointing; None: the planner chooses."""
        if self.activation_checkpointing and self.no_activation_checkpointing:
            raise UserError(
                "--activation-checkpointing and --no-activation-checkpointing: choose one"
            )
        if self.activation_checkpointing or self.no_activation_checkpointing:
            return self.activation_checkpointing
        return None


def main() -> None:
    """Print the plan that the command line asks for: `train.py PRESET --plan`."""
    args, rest = tyro.cli(PlanArgs, description=__doc__, return_unknown_args=True)
    refuse_out_of_range(args)
    if args.where:
        rows = capacity_table()
        print(
            "train / serve: the mesh that trains it, and how many sequences of full context "
            "(V3: examples) are served at a time\n"
        )
        print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
        return
    config = from_command_line(
        "Plan a run of one preset of nanods; --plan --help shows the plan's own flags.", rest
    )
    job, load_source = job_from_args(args, config)
    print(format_plan(plan(job), load_source))


def job_from_args(args: PlanArgs, config: Config) -> tuple[Job, str]:
    """Return the job that the command line describes, and where its expert load is from."""
    mesh, gpus = None, args.gpus
    if args.mesh != "auto":
        mesh = Mesh.parse(args.mesh)
        gpus = mesh.world_size if gpus is None else gpus
    if args.gpu:
        device, available = hardware.find_gpu(args.gpu), 1
    else:
        device, available = hardware.this_machine()
        print("device     no --gpu is named: this machine")
    load, load_source = None, ""
    if config.model.moe.n_expert > 1 or args.load:
        load, load_source = read_load(args.load)
    job = make_job(
        config,
        device,
        available if gpus is None else gpus,
        args.tokens,
        mfu=args.mfu,
        load=load,
        mesh=mesh,
        checkpointing=args.checkpointing,
    )
    return job, load_source


def read_load(path: Path | None) -> tuple[list[list[int]], str]:
    """Return the expert load (L, E) of a run and where it is from.

    `path` is a run directory or its metrics.jsonl. The load is that of the last validation, or else
    of the last step. Without a path it is v2-tiny's. Raises UserError if the run has none.
    """
    if path is None:
        runs = json.loads(MEASURED_LOAD.read_text(encoding="utf-8"))["runs"]["loss"]
        return runs[0]["val_load"], "v2-tiny's on validation text, results/experts.json"
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    if not metrics.is_file():
        raise UserError(
            f"--load {path}: there is no metrics.jsonl; name a run directory, such as runs/v2-tiny"
        )
    rows = read_metrics(metrics)
    for name in ("val_load", "load"):
        with_load = [row for row in rows if name in row]
        if with_load:
            last = with_load[-1]
            return last[name], f"{name} of step {last['step']}, {metrics}"
    raise UserError(
        f"--load {path}: that run has no experts; name one of V2, such as runs/v2-tiny, "
        "or leave the flag out"
    )


# ---- the report ----------------------------------------------------------------------------------


def format_plan(p: Plan, load_source: str = "") -> str:
    """Return the report of a plan."""
    job, config, device = p.job, p.job.config, p.job.device
    tokens = sum(sequence_lengths(config).values())
    steps = job.tokens / tokens / config.batch_size
    in_fp16 = " in fp16" if "v100" in device.name else ""
    lines = [
        f"plan       {config.preset} on {job.gpus:,} x {device.name}: "
        f"{device.memory / 1e9:.4g} GB each, {device.usable_memory / 1e9:.4g} for a step; "
        f"{device.flops / 1e12:.4g} TFLOP/s{in_fp16}",
        f"source     {device.source}",
        f"model      {format_number(job.cost.total)} parameters, "
        f"{format_number(job.cost.active)} used by a token; "
        f"{format_number(job.flops_per_token)} FLOP to train on a token, "
        f"{format_number(job.flops_per_token / 3)} to read one",
        f"run        {format_number(job.tokens)} tokens: "
        f"{steps:,.0f} steps of {config.batch_size:,} x {tokens:,}",
        f"assumed    {job.mfu:.0%} of the peak while computing (--mfu), "
        f"{LINK_EFFICIENCY:.0%} of each link's speed",
    ]
    if job.gpus > config.batch_size:
        lines.append(
            f"idle       {job.gpus - config.batch_size:,} GPUs have no sequence of their own: "
            "raise --batch-size"
        )
    if config.teacher:
        lines.append(describe_teacher(p))
    lines += format_load(p, load_source)
    lines += ["", "memory     of each device, in GB, by kind", memory_table(p)]
    if job.gpus > 1:
        lines += [
            "",
            "sent       by each GPU in a step, in GB, and the time of a step, in seconds",
            time_table(p),
        ]
    lines += ["", *format_choice(p)]
    return "\n".join(lines)


def describe_teacher(p: Plan) -> str:
    """Return the line about the teacher of a run (--teacher), which reads each batch too. Raises
    UserError if there is none."""
    config = p.job.config
    saved, teacher = find_teacher(config)
    check_sizes(config, teacher)
    candidate = p.chosen or min(p.candidates.values(), key=preference)
    more = teacher_bytes(config, teacher, candidate.step)
    model = build_meta_model(teacher)
    forward = model.flops_per_example() / sum(sequence_lengths(teacher).values()) / 3
    return (
        f"teacher    {saved.path}: {format_number(model.count_parameters()[0])} parameters. Not "
        f"counted below: {more / 1e9:.3g} GB on each device, and {format_number(forward)} FLOP a "
        f"token, {forward / p.job.flops_per_token:.0%} more computing"
    )


def format_load(p: Plan, load_source: str) -> list[str]:
    """Return the lines about the load of the experts, none without expert parallelism."""
    load, sizes = p.job.load, sorted({c.mesh.ep for c in p.candidates.values() if c.mesh.ep > 1})
    if not load or not sizes:
        return []
    lines = [f"load       of the experts: {load_source}. The others wait for the busiest device:"]
    experts = expert_flops_fraction(p.job.cost)
    for ep in sizes:
        imbalance = load_imbalance(load, ep)
        used = 1 / (1 + experts * (imbalance - 1))
        lines.append(
            f"{INDENT}mean load / max load over {ep} devices {1 / imbalance:.1%}, "
            f"so {used:.1%} of a step's computing is used"
        )
    return lines


def memory_table(p: Plan) -> str:
    """Return the table of the memory of each candidate, and why other kinds of mesh have none."""
    head = ["", *MEMORY_KINDS, "in all", "micro-batch", "checkpointing", "fits"]
    rows = []
    for candidate in in_order(p):
        row = [describe_mesh(p, candidate.mesh)]
        row += [f"{candidate.memory[kind] / 1e9:.3g}" for kind in MEMORY_KINDS]
        row += [f"{candidate.total_bytes / 1e9:.4g}", f"{candidate.step.micro_batch}"]
        row += ["yes" if candidate.step.checkpointing else "no"]
        row += ["yes" if candidate.fits else "NO"]
        rows.append(row)
    notes = []
    if p.job.gpus > 1:
        notes = [f"{INDENT}{kind}: {reason}" for kind, reason in p.unavailable.items()]
    return "\n".join([format_table(head, rows), *notes])


def time_table(p: Plan) -> str:
    """Return the table of what each candidate sends and how long it takes."""
    parts = ("computing", "waiting", "hidden", "step")
    head = ["", *COLLECTIVES, *parts, "hours", "GPU-hours"]
    rows = []
    for candidate in in_order(p):
        row = [str(candidate.mesh)]
        for name in COLLECTIVES:
            size = sum(
                n for (collective, _), n in candidate.bytes_sent.items() if collective == name
            )
            row.append(f"{size / 1e9:.3g}")
        row += [f"{candidate.seconds[part]:.3g}" for part in parts]
        hours = training_hours(p.job, candidate)
        row += [f"{hours:,.0f}", f"{hours * p.job.gpus:,.0f}"] if candidate.fits else ["-", "-"]
        rows.append(row)
    return format_table(head, rows)


def format_choice(p: Plan) -> list[str]:
    """Return the lines that say what was chosen, why, and how long it takes; or what to change."""
    job, chosen = p.job, p.chosen
    if not chosen:
        smallest = min(p.candidates.values(), key=preference)
        return [
            f"no fit     the smallest is {describe_mesh(p, smallest.mesh)}, "
            f"with {smallest.total_bytes / 1e9:,.4g} GB",
            f"change     {p.suggestion}",
        ]
    reasons = []
    for other in p.candidates.values():
        if other.fits and other is not chosen:
            ratio = other.seconds["step"] / chosen.seconds["step"]
            reasons.append(f"{other.mesh} takes {ratio:.2f} times as long")
    for other in p.candidates.values():
        if not other.fits:
            reasons.append(f"{other.mesh} does not fit ({other.total_bytes / 1e9:,.0f} GB)")
    because = f": {'; '.join(reasons)}" if reasons else ""
    checkpointing = ", with activation checkpointing" if chosen.step.checkpointing else ""
    kept = []
    for use in (False, True):
        candidate = evaluate(job, chosen.mesh, chosen.step.micro_batch, use)
        kept.append(f"{activation_bytes(job.config, job.cost, candidate.step) / 1e9:.3g}")
    gpu_hours = f", {p.hours * job.gpus:,.0f} GPU-hours" if job.device.kind == "cuda" else ""
    return [
        f"chosen     {describe_mesh(p, chosen.mesh)}, micro-batch {chosen.step.micro_batch}"
        f"{checkpointing}{because}",
        f"{INDENT}activations of a micro-batch: {kept[0]} GB, with checkpointing {kept[1]} GB",
        f"time       {format_duration(p.hours)}{gpu_hours}",
    ]


def in_order(p: Plan) -> list[Candidate]:
    """Return the candidates in the order of MESH_KINDS."""
    return [p.candidates[kind] for kind in MESH_KINDS if kind in p.candidates]


def describe_mesh(p: Plan, mesh: Mesh) -> str:
    """Return the mesh as --mesh spells it."""
    return str(mesh) if p.job.gpus > 1 else "one device"


def format_number(number: float) -> str:
    """Return a number with a unit: 1234567 -> 1.235M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:.4g}"


def format_duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """Return an indented table. The first column is aligned left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1])] + [cell.rjust(width) for cell, width in others]
        lines.append((INDENT + "  ".join(cells)).rstrip())
    return "\n".join(lines)
