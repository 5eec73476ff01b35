"""Measure the speed of two processes against one: results/scale.json.

    python -m nanods.bench.scale       a few minutes on 2 cores; `make bench-scale`

v2-tiny for STEPS steps of the same batch on gloo, one thread per process: one process, then two
that hold copies (dp), split the experts (ep) or shard all weights (fsdp). The table has medians of
tokens per second, of the optimizers' seconds and of the seconds to average gradients, which include
waiting for the other process. The exchange of tokens (ep) and of weights and gradients (fsdp) is
part of forward and backward.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nanods.bench.runs import (
    describe_machine,
    flags_from_dict,
    run_training,
    training_command,
    write_json,
)
from nanods.errors import run
from nanods.flags import parse_args

STEPS = 60
WARMUP = 5  # steps that the medians leave out
MESHES = {"one process": None, "dp=2": "dp=2", "ep=2": "ep=2", "fsdp=2": "fsdp=2"}
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@dataclass(frozen=True)
class Args:
    results: Path = Path("results")
    """Directory of the table."""
    runs: Path = Path("runs/scale")
    """Directory of the runs, which are always repeated."""


def measure(args: Args, name: str, mesh: str | None) -> dict:
    """Train for STEPS steps -> the command, and medians over the steps after the warm-up."""
    out = args.runs / name.replace(" ", "-")
    flags = {"steps": STEPS, "eval-every": 1000, "micro-batch": 4, "out-dir": out}
    flags["device"] = "cpu"  # the results are times on a CPU
    launch = []
    if mesh:
        flags["mesh"] = mesh
        launch = LAUNCH
    words = ["v2-tiny", *flags_from_dict(flags)]
    rows = run_training(out, words, launch)[WARMUP:]
    tokens_per_second = median(row["tokens_per_second"] for row in rows)
    tokens_per_step = rows[0]["tokens"] / rows[0]["step"]
    metrics = {"tokens_per_second": tokens_per_second}
    for part in ("optimizer_seconds", "communication_seconds"):
        metrics[part] = median(row.get(part, 0.0) for row in rows)
    metrics["step_seconds"] = tokens_per_step / tokens_per_second
    # The rest of 1 is an upper bound on what overlapping communication could gain.
    metrics["busy"] = rows[-1]["cpu_seconds"] / rows[-1]["seconds"]
    print(f"{name}: {metrics}", flush=True)
    return {"command": training_command(words, launch)} | metrics


def main() -> None:
    """Run all meshes, then write the table with their speed relative to one process."""
    args = parse_args(Args, __doc__)
    runs = {name: measure(args, name, mesh) for name, mesh in MESHES.items()}
    base = runs["one process"]["tokens_per_second"]
    times = {name: metrics["tokens_per_second"] / base for name, metrics in runs.items()}
    table = {"machine": describe_machine(), "steps": STEPS, "times": times, "runs": runs}
    write_json(args.results / "scale.json", table)


if __name__ == "__main__":
    run(main)
