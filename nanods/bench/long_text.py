"""Compare dense and block attention on text of 4,096 tokens: results/long_text.json and .png.

    python -m nanods.bench.long_text             about 10 minutes on one thread
    python -m nanods.bench.long_text --steps 50

`make bench-long-text` runs the first line. Data pydocs, the tiny preset with a context of 4,096
tokens, 2 sequences per step. The dense run takes --steps steps. Each sparse variant (blocks of 64,
8 selected and the current one) runs twice: for the same number of steps as dense, and for as many
steps as fit into the time of the dense run. Each run has its complete learning rate schedule. Time
is CPU time on one thread, without the evaluations. One seed, so differences of a few thousandths of
a bit mean nothing. Finished runs are reused; delete the folder of the runs to repeat them.
"""

from dataclasses import dataclass
from pathlib import Path

from nanods import plots
from nanods.bench.runs import describe_machine, flags_from_dict, run_training, write_json
from nanods.data.text import load_text
from nanods.flags import parse_args

SIZE = {"context-length": 4096, "batch-size": 2, "device": "cpu", "dtype": "auto", "seed": 0}
SPARSE = {"attention.block-size": 64, "attention.top-blocks": 8}


@dataclass(frozen=True)
class Args:
    steps: int = 80
    """Optimizer steps of the dense run, and of the sparse runs at equal steps."""
    methods: tuple[str, ...] = ("tile",)
    """Selection methods of the sparse runs."""
    results: Path = Path("results")
    """Where to write the table and the plot."""
    runs: Path = Path("runs/long_text")
    """Where to write the runs."""


def train(args: Args, preset: str, flags: dict, steps: int) -> dict:
    """Run train.py in a new process and return its command, times and validation curve.

    The curve has one entry [step, seconds, bits per byte] per validation.
    """
    out = args.runs / "-".join(map(str, (preset, *flags.values(), steps)))
    schedule = {"steps": steps, "eval-every": -(-steps // 4), "save-every": steps, "out-dir": out}
    command, rows = run_training(out, [preset, *flags_from_dict(SIZE | flags | schedule)])
    curve = [[row["step"], row["seconds"], row["val_bpb"]] for row in rows if "val_bpb" in row]
    _, seconds, val_bpb = curve[-1]
    print(f"{out.name}: {seconds:.0f} s, {val_bpb:.4f} bits per byte", flush=True)
    return {
        "command": command,
        "steps": steps,
        "seconds": seconds,
        "cpu_seconds": rows[-1]["cpu_seconds"],
        "val_bpb": val_bpb,
        "step_seconds_val_bpb": curve,
    }


def compare(dense: dict, equal_steps: dict, equal_time: dict) -> dict[str, float]:
    """Return the differences of two sparse runs to the dense run."""
    return {
        "speed": dense["cpu_seconds"] / equal_steps["cpu_seconds"],
        "bpb_minus_dense_at_equal_steps": equal_steps["val_bpb"] - dense["val_bpb"],
        "bpb_minus_dense_at_equal_time": equal_time["val_bpb"] - dense["val_bpb"],
        "time_over_dense_at_equal_time": equal_time["cpu_seconds"] / dense["cpu_seconds"],
    }


def main() -> None:
    args = parse_args(Args, __doc__)
    sha256 = load_text("pydocs").sha256  # prepared before the first run
    dense = train(args, "v0-tiny", {}, args.steps)
    runs, differences = {"dense": dense}, {}
    for method in args.methods:
        flags = SPARSE | {"attention.method": method}
        equal_steps = train(args, "v1-tiny", flags, args.steps)
        steps = round(args.steps * dense["cpu_seconds"] / equal_steps["cpu_seconds"])
        equal_time = train(args, "v1-tiny", flags, steps)
        runs[f"{method}, equal steps"] = equal_steps
        runs[f"{method}, equal time"] = equal_time
        differences[method] = compare(dense, equal_steps, equal_time)
        words = (f"{name} {value:+.4f}" for name, value in differences[method].items())
        print(f"{method}: {', '.join(words)}", flush=True)
        table = {
            "machine": describe_machine(),
            "data": {"name": "pydocs", "sha256": sha256},
            "seeds": 1,
            "differences": differences,
            "runs": runs,
        }
        write_json(args.results / "long_text.json", table)
    lines = {}
    for name, run in runs.items():
        _, seconds, bpb = zip(*run["step_seconds_val_bpb"], strict=True)
        lines[name] = (seconds, bpb)
    figure = plots.curves(lines, "seconds of training, one thread", "bits per byte", {})
    plots.save(figure, args.results / "long_text.png")


if __name__ == "__main__":
    main()
