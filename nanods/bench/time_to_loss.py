"""Loss against CPU-seconds at nanoGPT's CPU size, one thread: results/time_to_loss.json and .png.

    python -m nanods.bench.time_to_loss          about 3 minutes where the CPU has bf16, 8 where not

4 layers, 4 heads, width 128, context 64, 12 sequences a step, tinyshakespeare: what nanoGPT's README proposes for a laptop,
and reports as 1.88 after 2,000 steps. Evaluations are left out of the time. The whole schedule is run for each length, since
a learning rate that has not come down yet hides what was learnt.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from nanods import plots
from nanods.bench.runs import describe_machine, flags_from_dict, run_training, write_json

SIZE = {"n-layer": 4, "n-head": 4, "n-embd": 128, "context-length": 64, "batch-size": 12}
SIZE |= {"weight-decay": 0.1}  # half of the preset's: a smaller model learns less by heart (LOG.md)


@dataclass(frozen=True)
class Args:
    steps: tuple[int, ...] = (700, 3900)
    """Lengths of the runs, in optimizer steps."""
    results: Path = Path("results")
    """Where the table and the picture go."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    runs = {}
    for steps in args.steps:
        out = Path("runs/time_to_loss") / str(steps)
        flags = SIZE | {
            "steps": steps,
            "eval-every": max(1, steps // 8),
            "save-every": steps,
            "out-dir": out,
            "device": "cpu",
        }
        command, rows = run_training(
            out, ["v0-tiny", "--data", "shakespeare", *flags_from_dict(flags)], fresh=True
        )
        curve = [
            [row["step"], row["cpu_seconds"], row["val_loss"]] for row in rows if "val_loss" in row
        ]
        runs[f"{steps} steps"] = {"command": command, "step_cpu_seconds_val_loss": curve}
        print(
            f"{steps} steps: {curve[-1][1]:.0f} CPU-seconds, validation loss {curve[-1][2]:.4f}",
            flush=True,
        )
    table = {"machine": describe_machine(), "runs": runs}
    write_json(args.results / "time_to_loss.json", table)
    lines = {
        name: tuple(zip(*[row[1:] for row in run["step_cpu_seconds_val_loss"]], strict=True))
        for name, run in runs.items()
    }
    marks = {"nanoGPT's recipe after 2,000 steps: 1.88": 1.88}
    plots.save(
        plots.curves(lines, "CPU-seconds, one thread", "validation loss", marks),
        args.results / "time_to_loss.png",
    )


if __name__ == "__main__":
    main()
