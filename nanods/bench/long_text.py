"""Compare dense and block attention on text of 4,096 tokens: results/long_text.json and .png.

    python -m nanods.bench.long_text             about 50 minutes on 2 cores; `make bench-long-text`
    python -m nanods.bench.long_text --seeds 1 --steps 50 --results /tmp/long_text

Data pydocs; a small model with a context of 4,096 tokens, one sequence per step. The dense runs
take --steps steps. Each sparse variant (blocks of 64, 8 selected and the current one) runs twice:
for the same number of steps as dense, and for as many steps as fit into the time of the dense runs.
Each run has its complete learning rate schedule. Time is CPU time on one thread, without the
evaluations; two runs at a time share the machine's memory, which changes it by some percent.

Does far text help? The same pieces of 512 held-out tokens are predicted as the last of a window of
512, 1,024, 2,048 or 4,096 tokens. Finished runs are stored and not repeated (stored_runs.py),
unless the machine is another one.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nanods import plots
from nanods.bench.jobs import Job
from nanods.bench.runs import flags_from_dict, is_subset, mean_and_each, write_json
from nanods.bench.stored_runs import Summarise, TrainingArgs, machine_of, train_all
from nanods.data.text import load_text
from nanods.errors import run
from nanods.flags import parse_args
from nanods.gpt import GPT
from nanods.training import checkpoint
from nanods.training.language_task import cross_entropy

SIZE = {"n-layer": 2, "n-head": 4, "n-embd": 128, "context-length": 4096, "batch-size": 1}
SPARSE = {"attention.block-size": 64, "attention.top-blocks": 8}
METHODS = ("tile", "flat")

PIECE = 512  # tokens whose loss is measured
WINDOWS = (512, 1024, 2048, 4096)  # their last PIECE tokens are the same text
N_PIECES = 40


@dataclass(frozen=True)
class Args(TrainingArgs):
    seeds: int = 3
    """Runs of each variant, with other initial weights and batches."""
    steps: int = 600
    """Optimizer steps of the dense runs, and of the sparse runs at equal steps."""
    methods: tuple[Literal[*METHODS], ...] = ("tile",)
    """Selection methods of the sparse runs. Without tile there is no table and no picture."""


def length_job(preset: str, flags: dict, steps: int, seed: int) -> Job:
    """Return the run of a preset with some flags for so many steps."""
    name = "-".join(map(str, (preset, *flags.values(), steps, seed)))
    schedule = {"steps": steps, "eval-every": -(-steps // 4), "save-every": 50, "seed": seed}
    device = {"device": "cpu", "dtype": "auto"}
    return Job(name, (preset, *flags_from_dict(SIZE | flags | schedule | device)))


# ---- the loss of the same text in windows of several lengths -------------------------------------


@torch.no_grad()
def bits_by_window(model: GPT, text: np.ndarray) -> dict[str, float]:
    """Return the bits per token of the same pieces of a text, by the length of the window in which
    they come last. The pieces are evenly spread over the text, each with a whole longest window.

    The model runs in eval mode.
    """
    model.eval()
    tokens = torch.from_numpy(text.astype(np.int64))
    ends = np.linspace(WINDOWS[-1], len(text) - 1, N_PIECES).astype(int)
    bits = {}
    for length in WINDOWS:
        losses = []
        for end in ends:
            window = tokens[None, end - length : end + 1]
            logits, _ = model(window[:, :-1])
            losses.append(cross_entropy(logits[:, -PIECE:], window[:, -PIECE:]).item())
        bits[str(length)] = statistics.mean(losses) / math.log(2)
    return bits


def make_summarise(text: np.ndarray) -> Summarise:
    """Return the function that reads the times and validation curve of a run, one entry [step,
    CPU-seconds, bits per byte] per validation, and measures bits_by_window on the text."""

    def summarise_run(job: Job, out: Path, rows: list[dict]) -> dict:
        evaluated = [row for row in rows if "val_bpb" in row]
        curve = [[row["step"], row["cpu_seconds"], row["val_bpb"]] for row in evaluated]
        steps, seconds, val_bpb = curve[-1]
        model = checkpoint.load_model(checkpoint.load(out))
        by_window = bits_by_window(model, text)
        print(
            f"{job.name}: {seconds:.0f} CPU-seconds, {val_bpb:.4f} bits per byte; at the end of a "
            f"window of {WINDOWS[0]} {by_window[str(WINDOWS[0])]:.4f}, of {WINDOWS[-1]} "
            f"{by_window[str(WINDOWS[-1])]:.4f}",
            flush=True,
        )
        return {
            "steps": steps,
            "cpu_seconds": seconds,
            "val_bpb": val_bpb,
            "step_cpu_seconds_val_bpb": curve,
            "bits_by_window": by_window,
        }

    return summarise_run


# ---- the table -----------------------------------------------------------------------------------


def compare(dense: list[dict], equal_steps: list[dict], equal_time: list[dict]) -> dict:
    """Return the differences of sparse runs to the dense ones, seed by seed."""

    def minus_dense(runs: list[dict]) -> dict:
        pairs = zip(runs, dense, strict=True)
        return mean_and_each([run["val_bpb"] - other["val_bpb"] for run, other in pairs])

    def time_over_dense(runs: list[dict]) -> list[float]:
        pairs = zip(runs, dense, strict=True)
        return [run["cpu_seconds"] / other["cpu_seconds"] for run, other in pairs]

    return {
        "speed": mean_and_each([1 / ratio for ratio in time_over_dense(equal_steps)]),
        "bpb_minus_dense_at_equal_steps": minus_dense(equal_steps),
        "bpb_minus_dense_at_equal_time": minus_dense(equal_time),
        "time_over_dense_at_equal_time": mean_and_each(time_over_dense(equal_time)),
    }


def median_seconds(runs: Sequence[dict]) -> float:
    return statistics.median(run["cpu_seconds"] for run in runs)


def mean_by_window(runs: Sequence[dict]) -> dict[str, float]:
    """Return the mean of bits_by_window over the seeds."""
    windows = runs[0]["bits_by_window"]
    return {w: statistics.mean(run["bits_by_window"][w] for run in runs) for w in windows}


def main() -> None:
    args = parse_args(Args, __doc__)
    text = load_text("pydocs")  # prepared before the first run

    def train(jobs: list[Job]) -> list[dict]:
        where = {"results": args.results, "runs": args.runs, "workers": args.jobs}
        results = train_all("long_text", jobs, make_summarise(text.val), **where, machines="this")
        return [results[job.name] for job in jobs]

    def jobs_of(preset: str, flags: dict, steps: int) -> list[Job]:
        return [length_job(preset, flags, steps, seed) for seed in range(args.seeds)]

    all_jobs = {"dense": jobs_of("v0-tiny", {}, args.steps)}
    flags = {method: SPARSE | {"attention.method": method} for method in args.methods}
    for method in args.methods:
        all_jobs[f"{method}, equal steps"] = jobs_of("v1-tiny", flags[method], args.steps)
    results = train(list(chain(*all_jobs.values())))
    n = args.seeds
    runs = {name: results[i * n : (i + 1) * n] for i, name in enumerate(all_jobs)}
    dense, differences = runs["dense"], {}
    for method in args.methods:
        equal_steps = runs[f"{method}, equal steps"]
        steps = round(args.steps * median_seconds(dense) / median_seconds(equal_steps))
        name = f"{method}, equal time"
        all_jobs[name] = jobs_of("v1-tiny", flags[method], steps)
        runs[name] = train(all_jobs[name])
        differences[method] = compare(dense, equal_steps, runs[name])
    by_window = {name: mean_by_window(rows) for name, rows in runs.items()}
    for name, bits in by_window.items():
        words = ", ".join(f"{int(window):,}: {value:.4f}" for window, value in bits.items())
        print(f"{name}: bits per byte of the same text, windows of {words}", flush=True)
    if is_subset("long_text", args.methods, ("tile",)):
        return
    table = {
        "machine": machine_of("long_text", list(chain(*all_jobs.values())), args.results),
        "data": {"name": "pydocs", "sha256": text.sha256},
        "seeds": args.seeds,
        "size": SIZE | SPARSE,
        "differences": differences,
        "by_window": by_window,
        "runs": runs,
    }
    write_json(args.results / "long_text.json", table)
    lines = {}
    for name, bits in by_window.items():
        label = f"{name}: {runs[name][0]['steps']:,} steps"
        lines[label] = (list(map(int, bits)), list(bits.values()))
    figure = plots.curves(lines, "length of the window in tokens", "bits per byte")
    plots.save(figure, args.results / "long_text.png")


if __name__ == "__main__":
    run(main)
