"""Loss against CPU-seconds at nanoGPT's CPU size on one thread: results/time_to_loss.json and .png.

    python -m nanods.bench.time_to_loss      about 3 minutes on a CPU with bf16, 8 without

4 layers, 4 heads, width 128, context 64, 12 sequences a step, tinyshakespeare: the size that
nanoGPT's README proposes for a laptop, with a loss of 1.88 after 2,000 steps. Evaluations do not
count as time. Each length is a run of its own with the whole learning-rate schedule: before the
learning rate has decayed, the loss is higher than what the model has learnt. Finished runs are
stored and not repeated (stored_runs.py), unless the machine is another one.
"""

from dataclasses import dataclass
from pathlib import Path

from nanods import plots
from nanods.bench.jobs import Job
from nanods.bench.runs import flags_from_dict, write_json
from nanods.bench.stored_runs import machine_of, train_all
from nanods.errors import run
from nanods.flags import parse_args

SIZE = {
    "n-layer": 4,
    "n-head": 4,
    "n-embd": 128,
    "context-length": 64,
    "batch-size": 12,
    "weight-decay": 0.1,  # half of the preset's: a smaller model overfits less (LOG.md)
}


@dataclass(frozen=True)
class Args:
    steps: tuple[int, ...] = (700, 3600)
    """Lengths of the runs, in optimizer steps."""
    results: Path = Path("results")
    """Directory of the table and the picture."""
    runs: Path = Path("runs")
    """Directory of the runs; an unfinished one is resumed."""


def length_job(steps: int) -> Job:
    """Return the run of `steps` steps."""
    flags = SIZE | {"steps": steps, "eval-every": max(1, steps // 8), "device": "cpu"}
    return Job(f"{steps} steps", ("v0-tiny", "--data", "shakespeare", *flags_from_dict(flags)))


def loss_curve(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return step, CPU-seconds and loss of each evaluation."""
    curve = [
        [row["step"], row["cpu_seconds"], row["val_loss"]] for row in rows if "val_loss" in row
    ]
    _, seconds, loss = curve[-1]
    print(f"{job.name}: {seconds:.0f} CPU-seconds, validation loss {loss:.4f}", flush=True)
    return {"step_cpu_seconds_val_loss": curve}


def main() -> None:
    """Train for each length, then write the table and the picture."""
    args = parse_args(Args, __doc__)
    jobs = [length_job(steps) for steps in args.steps]
    runs = train_all(
        "time_to_loss", jobs, loss_curve, args.results, args.runs, workers=1, machines="this"
    )
    machine = machine_of("time_to_loss", jobs, args.results)
    write_json(args.results / "time_to_loss.json", {"machine": machine, "runs": runs})
    lines = {}
    for name, result in runs.items():
        _, seconds, losses = zip(*result["step_cpu_seconds_val_loss"], strict=True)
        lines[name] = (seconds, losses)
    marks = {"nanoGPT's recipe after 2,000 steps: 1.88": 1.88}
    figure = plots.curves(lines, "CPU-seconds, one thread", "validation loss", marks)
    plots.save(figure, args.results / "time_to_loss.png")


if __name__ == "__main__":
    run(main)
