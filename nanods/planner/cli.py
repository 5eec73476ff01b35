"""Before a run, and without a GPU: does it fit, how long does it take, what to change.

    python train.py v2-full --plan --gpus 512 --gpu a100-80gb --tokens 100e9      `make plan-v2 SCALE=full ARGS="..."`
    python train.py v1-tiny --plan                                                this machine
    python -m nanods.planner.cli --where                                        which preset fits on what

Beside these flags, any field of the preset. Parameters and FLOPs are exact, memory is counted tensor by tensor
(nanods/planner/memory.py: within 25% of what is measured on a CPU, not measured on a GPU), time follows from data sheets
(hardware.py), what is sent (meshes.py) and one assumption, --mfu.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanods import config as ladder
from nanods.errors import UserError, run
from nanods.planner import hardware
from nanods.planner.cost import MESHES, REACHED, SENT, Mesh, expert_share
from nanods.planner.memory import KINDS, activations, sequences
from nanods.planner.search import Plan, better, hours, make_job, option, overload, plan, where
from nanods.training.metrics import read_metrics

MEASURED = Path(__file__).parents[2] / "results" / "experts.json"


@dataclass(frozen=True)
class PlanArgs:
    plan: bool = True
    """Plan, do not train."""
    gpus: int | None = None
    """How many. Default: 1 of the --gpu named, or this machine's."""
    gpu: str | None = None
    """Which, by its name in nanods/planner/hardware.py. Default: this machine."""
    tokens: float | None = None
    """Tokens of the whole run (V3: of all modalities). Default: the preset's steps."""
    mfu: float = 0.4
    """Share of its peak that a device reaches while it computes: an assumption."""
    mesh: Literal["auto", "dp", "fsdp", "ep", "tp", "dp x ep", "fsdp x ep"] = "auto"
    """auto: the quickest that fits."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep each block's input alone, and compute the rest twice. auto: where it is quickest, or nothing else fits."""
    load: Path | None = None
    """A run whose experts' load to take. Default: v2-tiny's, from results/experts.json."""
    where: bool = False
    """Instead, for all presets: on what they fit."""


def read_load(path: Path | None) -> tuple[list[list[int]], str]:
    """The load (L, E) of a run's last validation, or else of its last step, and where it is from. UserError if it has none."""
    if path is None:
        first = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]["loss"][0]
        return first["val_load"], "v2-tiny's on validation text, results/experts.json"
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    if not metrics.is_file():
        raise UserError(
            f"--load {path}: there is no metrics.jsonl; name the folder of a run, such as runs/v2-tiny"
        )
    rows = read_metrics(metrics)
    for name in ("val_load", "load"):
        if told := [row for row in rows if name in row]:
            return told[-1][name], f"{name} of step {told[-1]['step']}, {metrics}"
    raise UserError(
        f"--load {path}: that run has no experts; name one of V2, such as runs/v2-tiny, or leave the flag out"
    )


# ---- in words ----------------------------------------------------------------------------------------------------------------


def large(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:.4g}"


def lasting(h: float) -> str:
    return f"{h:,.1f} hours" if h >= 1 else f"{60 * h:.1f} minutes"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(
            f"{cell:{'<' if i == 0 else '>'}{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    )
    return "\n".join(f"           {line}".rstrip() for line in lines)


def in_words(p: Plan, source: str = "") -> str:
    job, config, d, per_item = (
        p.job,
        p.job.config,
        p.job.device,
        sum(sequences(p.job.config).values()),
    )
    steps = job.tokens / per_item / config.batch_size
    lines = [
        f"plan       {config.preset} on {job.gpus:,} x {d.name}: {d.memory / 1e9:.4g} GB each, {d.room / 1e9:.4g} for a step; "
        f"{d.flops / 1e12:.4g} TFLOP/s{' in fp16' if 'v100' in d.name else ''}",
        f"source     {d.source}",
        f"model      {large(job.counts.total)} parameters, {large(job.counts.active)} of them a token's; "
        f"{large(job.flops_per_token)} FLOP to train on a token, {large(job.flops_per_token / 3)} to read one",
        f"run        {large(job.tokens)} tokens: {steps:,.0f} steps of {config.batch_size:,} x {per_item:,}",
        f"assumed    {job.mfu:.0%} of the peak while computing (--mfu), {REACHED:.0%} of each link's speed",
    ]
    if job.gpus > config.batch_size:
        lines.append(
            f"idle       {job.gpus - config.batch_size:,} GPUs have no sequence of their own: raise --batch-size"
        )
    groups = sorted({o.mesh.group for o in p.options.values() if o.mesh.group > 1})
    if job.load and groups:
        lines.append(
            f"load       of the experts: {source}. The busiest device makes the others wait:"
        )
    for G in groups if job.load else ():
        even = 1 / overload(job.load, G)
        used = 1 / (1 + expert_share(config) * (1 / even - 1))
        lines.append(
            f"           mean load / max load over {G} devices {even:.1%}, so {used:.1%} of a step's computing is used"
        )
    lines += ["", "memory     of each device, in GB, by kind", memory_table(p)]
    if job.gpus > 1:
        lines += [
            "",
            "sent       by each GPU in a step, in GB, and what a step takes, in seconds",
            time_table(p),
        ]
    lines += ["", *verdict(p)]
    return "\n".join(lines)


def memory_table(p: Plan) -> str:
    head = ["", *KINDS, "in all", "micro-batch", "checkpointing", "fits"]
    rows = []
    for kind in MESHES:
        if kind in p.options:
            o = p.options[kind]
            cells = [f"{o.memory[name] / 1e9:.3g}" for name in KINDS] + [
                f"{o.bytes / 1e9:.4g}",
                f"{o.setting.micro_batch}",
            ]
            rows.append(
                [
                    named(p, o.mesh),
                    *cells,
                    "yes" if o.setting.checkpointing else "no",
                    "yes" if o.fits else "NO",
                ]
            )
    notes = [f"           {kind}: {why}" for kind, why in p.why.items() if p.job.gpus > 1]
    return "\n".join([table(head, rows), *notes])


def named(p: Plan, mesh: Mesh) -> str:
    return str(mesh) if p.job.gpus > 1 else "one device"


def time_table(p: Plan) -> str:
    head = ["", *SENT, "computing", "waiting", "hidden", "step", "hours", "GPU-hours"]
    rows = []
    for o in (p.options[kind] for kind in MESHES if kind in p.options):
        moved = [sum(size for (how, _), size in o.sent.items() if how == name) for name in SENT]
        cells = [f"{size / 1e9:.3g}" for size in moved] + [
            f"{o.took[name]:.3g}" for name in ("computing", "waiting", "hidden", "step")
        ]
        h = hours(p.job, o)
        rows.append(
            [
                str(o.mesh),
                *cells,
                *([f"{h:,.0f}", f"{h * p.job.gpus:,.0f}"] if o.fits else ["-", "-"]),
            ]
        )
    return table(head, rows)


def verdict(p: Plan) -> list[str]:
    """What was chosen and why, what it costs; or what to change."""
    job, o = p.job, p.chosen
    if not o:
        least = min(p.options.values(), key=better)
        return [
            f"fits not   {named(p, least.mesh)} comes nearest, with {least.bytes / 1e9:,.4g} GB",
            f"change     {p.suggestion}",
        ]
    others = [x for x in p.options.values() if x.fits and x is not o]
    missing = [x for x in p.options.values() if not x.fits]
    reasons = [
        f"{x.mesh} takes {x.took['step'] / o.took['step']:.2f} times as long" for x in others
    ]
    reasons += [f"{x.mesh} does not fit ({x.bytes / 1e9:,.0f} GB)" for x in missing]
    why = f": {'; '.join(reasons)}" if reasons else ""
    each = [option(job, o.mesh, o.setting.micro_batch, c) for c in (False, True)]
    kept = [f"{activations(job.config, x.setting) / 1e9:.3g}" for x in each]
    return [
        f"chosen     {named(p, o.mesh)}, micro-batch {o.setting.micro_batch}"
        f"{', with activation checkpointing' if o.setting.checkpointing else ''}{why}",
        f"           activations of a micro-batch: {kept[0]} GB, with checkpointing {kept[1]} GB",
        f"time       {lasting(p.hours)}"
        + (f", {p.hours * job.gpus:,.0f} GPU-hours" if job.device.kind == "cuda" else ""),
    ]


def main() -> None:
    """`train.py PRESET --plan ...`, or this module by itself."""
    asked, rest = tyro.cli(PlanArgs, description=__doc__, return_unknown_args=True)
    if asked.where:
        rows = where()
        print(
            "train / serve: the mesh that trains it, and sequences of full context (V3: items) served at a time\n"
        )
        print(table(list(rows[0]), [list(row.values()) for row in rows]))
        return
    config = ladder.from_command_line(
        "Plan a run of one preset of nanods; --plan --help shows the plan's own flags.", rest
    )
    if asked.gpu:
        device, gpus = hardware.named(asked.gpu), 1 if asked.gpus is None else asked.gpus
    else:
        device, present = hardware.this_machine()
        gpus = present if asked.gpus is None else asked.gpus
        print("device     no --gpu is named: this machine")
    load, source = (
        read_load(asked.load) if config.model.moe.n_expert > 1 or asked.load else (None, "")
    )
    job = make_job(
        config,
        device,
        gpus,
        asked.tokens,
        mfu=asked.mfu,
        load=load,
        mesh=asked.mesh,
        checkpointing=asked.checkpointing,
    )
    print(in_words(plan(job), source))


if __name__ == "__main__":
    run(main)
