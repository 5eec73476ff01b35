"""Train the tiny presets on several seeds: results/ladder.json and results/expected.json.

    python -m nanods.bench.ladder                 about 50 minutes on 2 cores; `make results`
    python -m nanods.bench.ladder --seeds 1

Two runs at a time, one thread each. train.py compares its runs with `expected.json`: the mean over
the seeds, with a tolerance of 0.02 bits per byte or twice the seeds' spread, whichever is larger.
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
    """Directory of the two result files."""
    runs: Path = Path("runs/ladder")
    """Directory of the runs; finished ones are not repeated."""


def train(args: Args, preset: str, data: str, seed: int) -> dict:
    """Train one preset in a process of its own -> its last validation metrics."""
    out = args.runs / f"{preset}-{data}-{seed}"
    flags = flags_from_dict({"data": data, "seed": seed, "out-dir": out})
    command, rows = run_training(out, [preset, *flags])
    last = rows[-1]
    print(
        f"{preset} {data} seed {seed}: {last['val_bpb']:.4f} bits per byte, "
        f"{last['seconds']:.0f} s",
        flush=True,
    )
    metrics = {name: last[name] for name in ("val_loss", "val_bpb", "seconds")}
    return {"seed": seed, "command": command, **metrics}


def main() -> None:
    """Run all presets and seeds, then write both files."""
    args = tyro.cli(Args, description=__doc__)
    # Loading prepares the data once, before the processes start.
    hashes = {data: load_text(data).sha256 for _, data in RUNS}
    jobs = []
    for preset, data in RUNS:
        seeds = args.seeds if data == "pydocs" else 1
        jobs += [(preset, data, seed) for seed in range(seeds)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: train(args, *job), jobs))

    ladder, expected = {"machine": describe_machine()}, {}
    for run in RUNS:
        rows = [row for job, row in zip(jobs, results, strict=True) if job[:2] == run]
        values = [row["val_bpb"] for row in rows]
        mean, spread = sum(values) / len(values), max(values) - min(values)
        name, data = "/".join(run), run[1]
        ladder[name] = {"mean_val_bpb": mean, "spread": spread, "runs": rows}
        tolerance = max(0.02, 2 * spread)
        expected[name] = {
            "sha256": hashes[data],
            "val_bpb": round(mean, 4),
            "tolerance": round(tolerance, 4),
        }
    write_json(args.results / "ladder.json", ladder)
    update_expected(args.results / "expected.json", expected)


if __name__ == "__main__":
    main()
