"""What a second process brings: results/scale.json.

    python -m nanods.bench.scale       a few minutes on 2 cores; `make bench-scale`

v2-tiny, STEPS steps of the same batch, one thread a process, on gloo: one process, two that are copies (dp), two that share
the experts (ep) or all weights (fsdp). Medians of a step's tokens a second, and of the seconds that the optimizers took, and
adding up the gradients (waiting for the other process included; the journeys of ep's tokens and fsdp's weights and gradients
are part of forward and backward).
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from nanods.bench.runs import describe_machine, run_training, write_json

STEPS = 60
MESHES = {"one process": None, "dp=2": "dp=2", "ep=2": "ep=2", "fsdp=2": "fsdp=2"}


@dataclass(frozen=True)
class Args:
    results: Path = Path("results")
    """Where the table goes."""
    runs: Path = Path("runs/scale")
    """Where the runs go; they are always made anew."""


def run(args: Args, name: str, mesh: str | None) -> dict:
    """Train for a while -> medians over the steps but for the first few."""
    out = args.runs / name.replace(" ", "-")
    words = [
        "v2-tiny",
        "--steps",
        str(STEPS),
        "--eval-every",
        "1000",
        "--micro-batch",
        "4",
        "--out-dir",
        str(out),
    ]
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if mesh else []
    )
    command, rows = run_training(out, [*words, *(["--mesh", mesh] if mesh else [])], True, launch)
    rows = rows[5:]
    told = {"tokens_per_second": median(row["tokens_per_second"] for row in rows)}
    for part in ("optimizer_seconds", "communication_seconds"):
        told[part] = median(row.get(part, 0.0) for row in rows)
    told["step_seconds"] = rows[0]["tokens"] / rows[0]["step"] / told["tokens_per_second"]
    told["busy"] = (
        rows[-1]["cpu_seconds"] / rows[-1]["seconds"]
    )  # no more than the rest can be won by sending meanwhile
    print(f"{name}: {told}", flush=True)
    return {"command": command} | told


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    told = {name: run(args, name, mesh) for name, mesh in MESHES.items()}
    one = told["one process"]["tokens_per_second"]
    times = {name: one_of["tokens_per_second"] / one for name, one_of in told.items()}
    write_json(
        args.results / "scale.json",
        {"machine": describe_machine(), "steps": STEPS, "times": times, "runs": told},
    )


if __name__ == "__main__":
    main()
