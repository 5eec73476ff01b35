"""Compare dense and block attention on text of 4,096 tokens: results/long_text.json and .png.

    python -m nanods.bench.long_text             about 10 minutes on one thread
    python -m nanods.bench.long_text --steps 50

`make bench-long-text` runs the first line. Data pydocs, the tiny preset with a context of 4,096
tokens, 2 sequences per step. The dense run takes --steps steps. Each sparse variant (blocks of 64,
8 selected and the current one) runs twice: for the same number of steps as dense, and for as many
steps as fit into the time of the dense run. Each run has its complete learning rate schedule. Time
is CPU time on one thread, without the evaluations; in the picture it is wall-clock time. One seed,
so differences of a few thousandths of a bit mean nothing. Finished runs are stored and not repeated
(stored_runs.py), unless the machine is another one.
"""

from dataclasses import dataclass
from pathlib import Path

from nanods import plots
from nanods.attention import Method
from nanods.bench.jobs import Job
from nanods.bench.runs import flags_from_dict, write_json
from nanods.bench.stored_runs import machine_of, train_all
from nanods.data.text import load_text
from nanods.errors import run
from nanods.flags import parse_args

SIZE = {"context-length": 4096, "batch-size": 2, "device": "cpu", "dtype": "auto", "seed": 0}
SPARSE = {"attention.block-size": 64, "attention.top-blocks": 8}


@dataclass(frozen=True)
class Args:
    steps: int = 80
    """Optimizer steps of the dense run, and of the sparse runs at equal steps."""
    methods: tuple[Method, ...] = ("tile",)
    """Selection methods of the sparse runs."""
    results: Path = Path("results")
    """Where to write the table and the plot."""
    runs: Path = Path("runs")
    """Where to write the runs; an unfinished one is resumed."""


def length_job(preset: str, flags: dict, steps: int) -> Job:
    """Return the run of a preset with some flags for so many steps."""
    name = "-".join(map(str, (preset, *flags.values(), steps)))
    schedule = {"steps": steps, "eval-every": -(-steps // 4), "save-every": 10}
    return Job(name, (preset, *flags_from_dict(SIZE | flags | schedule)))


def run_figures(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the times and the validation curve of a run.

    The curve has one entry [step, seconds, bits per byte] per validation.
    """
    curve = [[row["step"], row["seconds"], row["val_bpb"]] for row in rows if "val_bpb" in row]
    steps, seconds, val_bpb = curve[-1]
    print(f"{job.name}: {seconds:.0f} s, {val_bpb:.4f} bits per byte", flush=True)
    return {
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

    def train(jobs: list[Job]) -> dict[str, dict]:
        where = {"results": args.results, "runs": args.runs, "workers": 1, "same_machine": True}
        return train_all("long_text", jobs, run_figures, **where)

    flags = {method: SPARSE | {"attention.method": method} for method in args.methods}
    dense_job = length_job("v0-tiny", {}, args.steps)
    jobs = {method: length_job("v1-tiny", flags[method], args.steps) for method in args.methods}
    results = train([dense_job, *jobs.values()])
    dense = results[dense_job.name]
    equal_steps = {method: results[job.name] for method, job in jobs.items()}
    longer_jobs = {}
    for method, result in equal_steps.items():
        steps = round(args.steps * dense["cpu_seconds"] / result["cpu_seconds"])
        longer_jobs[method] = length_job("v1-tiny", flags[method], steps)
    results = train(list(longer_jobs.values()))
    runs, differences = {"dense": dense}, {}
    for method, job in longer_jobs.items():
        runs[f"{method}, equal steps"] = equal_steps[method]
        runs[f"{method}, equal time"] = results[job.name]
        differences[method] = compare(dense, equal_steps[method], results[job.name])
        words = (f"{name} {value:+.4f}" for name, value in differences[method].items())
        print(f"{method}: {', '.join(words)}", flush=True)
    all_jobs = [dense_job, *jobs.values(), *longer_jobs.values()]
    table = {
        "machine": machine_of("long_text", all_jobs, args.results),
        "data": {"name": "pydocs", "sha256": sha256},
        "seeds": 1,
        "differences": differences,
        "runs": runs,
    }
    write_json(args.results / "long_text.json", table)
    lines = {}
    for name, result in runs.items():
        _, seconds, bpb = zip(*result["step_seconds_val_bpb"], strict=True)
        lines[name] = (seconds, bpb)
    figure = plots.curves(
        lines, "seconds of training (wall-clock time), one thread", "bits per byte", {}
    )
    plots.save(figure, args.results / "long_text.png")


if __name__ == "__main__":
    run(main)
