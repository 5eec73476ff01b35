"""Train the tiny rungs of the ladder on several seeds and write what they reach: results/ladder.json, results/expected.json.

    python -m nanods.bench.ladder                 about 50 minutes on 2 cores; `make results`
    python -m nanods.bench.ladder --seeds 1

Two runs at a time, one thread each. `expected.json` is what train.py compares a run with: the mean over the seeds, and as
tolerance the larger of 0.02 bits per byte and twice their spread.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanods.bench.runs import (
    describe_machine,
    flags_from_dict,
    run_training,
    update_expected,
    write_json,
)
from nanods.data.text import load_text

RUNS = (
    ("v0-tiny", "pydocs"),
    ("v1-tiny", "pydocs"),
    ("v2-tiny", "pydocs"),
    ("v0-tiny", "shakespeare"),
)


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Seeds for each preset on pydocs; shakespeare gets one."""
    results: Path = Path("results")
    """Where the two files go."""
    runs: Path = Path("runs/ladder")
    """Where the runs go; a finished one is taken as it is."""


def train(args: Args, preset: str, data: str, seed: int) -> dict:
    """One run in a process of its own -> its last validation."""
    out = args.runs / f"{preset}-{data}-{seed}"
    command, rows = run_training(
        out, [preset, *flags_from_dict({"data": data, "seed": seed, "out-dir": out})]
    )
    last = rows[-1]
    print(
        f"{preset} {data} seed {seed}: {last['val_bpb']:.4f} bits per byte, {last['seconds']:.0f} s",
        flush=True,
    )
    return {
        "seed": seed,
        "command": command,
        **{k: last[k] for k in ("val_loss", "val_bpb", "seconds")},
    }


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    hashes = {
        data: load_text(data).sha256 for _, data in RUNS
    }  # prepared once, before the processes start
    jobs = [(p, d, seed) for p, d in RUNS for seed in range(args.seeds if d == "pydocs" else 1)]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda job: train(args, *job), jobs))
    ladder, expected = {"machine": describe_machine()}, {}
    for preset, data in RUNS:
        of = [row for job, row in zip(jobs, rows, strict=True) if job[:2] == (preset, data)]
        values = [row["val_bpb"] for row in of]
        mean, spread = sum(values) / len(values), max(values) - min(values)
        ladder[f"{preset}/{data}"] = {"mean_val_bpb": mean, "spread": spread, "runs": of}
        tolerance = max(0.02, 2 * spread)
        expected[f"{preset}/{data}"] = {
            "sha256": hashes[data],
            "val_bpb": round(mean, 4),
            "tolerance": round(tolerance, 4),
        }
    write_json(args.results / "ladder.json", ladder)
    update_expected(args.results / "expected.json", expected)


if __name__ == "__main__":
    main()
