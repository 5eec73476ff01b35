"""Long text: dense against block attention at 4,096 tokens, at equal steps and at equal time: results/long_text.json and .png.

    python -m nanods.bench.long_text             about 10 minutes on one thread; `make bench-long-text`
    python -m nanods.bench.long_text --steps 50

pydocs, the tiny preset with a context of 4,096, 2 sequences a step. Dense runs for --steps; each sparse variant (blocks of 64,
8 chosen and the own) runs twice: for as many steps as dense, and for as many as fit into dense's time, each with the whole
schedule of its learning rate. Time is CPU time on one thread, the training's alone, evaluations left out. One seed, so
differences of a few thousandths of a bit mean nothing. A finished run is taken as it is; delete the runs' folder to repeat it.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from nanods import plots
from nanods.bench.runs import describe_machine, flags_from_dict, run_training, write_json
from nanods.data.text import load_text

SIZE = {"context-length": 4096, "batch-size": 2, "device": "cpu", "dtype": "auto", "seed": 0}
SPARSE = {"attention.block-size": 64, "attention.top-blocks": 8}


@dataclass(frozen=True)
class Args:
    steps: int = 80
    """Optimizer steps of the dense run, and of the sparse runs at equal steps."""
    methods: tuple[str, ...] = ("tile",)
    """How the sparse runs choose their blocks."""
    results: Path = Path("results")
    """Where the table and the picture go."""
    runs: Path = Path("runs/long_text")
    """Where the runs go."""


def train(args: Args, preset: str, flags: dict, steps: int) -> dict:
    """One run in a process of its own -> its command, and [step, seconds, bits per byte] at each validation."""
    out = args.runs / "-".join(map(str, (preset, *flags.values(), steps)))
    flags = (
        SIZE
        | flags
        | {"steps": steps, "eval-every": -(-steps // 4), "save-every": steps, "out-dir": out}
    )
    command, rows = run_training(out, [preset, *flags_from_dict(flags)])
    curve = [[row["step"], row["seconds"], row["val_bpb"]] for row in rows if "val_bpb" in row]
    print(f"{out.name}: {curve[-1][1]:.0f} s, {curve[-1][2]:.4f} bits per byte", flush=True)
    spent = {
        "steps": steps,
        "seconds": curve[-1][1],
        "cpu_seconds": rows[-1]["cpu_seconds"],
        "val_bpb": curve[-1][2],
    }
    return {"command": command, **spent, "step_seconds_val_bpb": curve}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    sha256 = load_text("pydocs").sha256  # prepared before the first run
    runs = {"dense": (dense := train(args, "v0-tiny", {}, args.steps))}
    differences = {}
    for method in args.methods:
        flags = SPARSE | {"attention.method": method}
        equal = runs[f"{method}, equal steps"] = train(args, "v1-tiny", flags, args.steps)
        steps = round(args.steps * dense["cpu_seconds"] / equal["cpu_seconds"])
        timed = runs[f"{method}, equal time"] = train(args, "v1-tiny", flags, steps)
        differences[method] = {
            "speed": dense["cpu_seconds"] / equal["cpu_seconds"],
            "bpb_minus_dense_at_equal_steps": equal["val_bpb"] - dense["val_bpb"],
            "bpb_minus_dense_at_equal_time": timed["val_bpb"] - dense["val_bpb"],
            "time_over_dense_at_equal_time": timed["cpu_seconds"] / dense["cpu_seconds"],
        }
        print(
            f"{method}: {', '.join(f'{name} {value:+.4f}' for name, value in differences[method].items())}",
            flush=True,
        )
        table = {
            "machine": describe_machine(),
            "data": {"name": "pydocs", "sha256": sha256},
            "seeds": 1,
        }
        table |= {"differences": differences, "runs": runs}
        write_json(args.results / "long_text.json", table)
    lines = {
        name: tuple(zip(*[row[1:] for row in run["step_seconds_val_bpb"]], strict=True))
        for name, run in runs.items()
    }
    plots.save(
        plots.curves(lines, "seconds of training, one thread", "bits per byte", {}),
        args.results / "long_text.png",
    )


if __name__ == "__main__":
    main()
