"""Train the tiny presets on several seeds: results/ladder.json and results/expected.json.

    python -m nanods.bench.ladder                 about an hour on 2 cores; `make results`
    python -m nanods.bench.ladder --seeds 1

Two runs at a time, one thread each; each is stored when it is finished (stored_runs.py). train.py
compares its runs with `expected.json`: the mean over the seeds, with a tolerance.
"""

from dataclasses import dataclass
from pathlib import Path

from nanods.bench.jobs import Job, ladder_job
from nanods.bench.runs import expected_entry, update_expected, write_json
from nanods.bench.stored_runs import machine_of, train_all
from nanods.data.text import load_text
from nanods.errors import run
from nanods.flags import parse_args

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
    runs: Path = Path("runs")
    """Directory of the runs; an unfinished one is resumed."""


def last_metrics(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the figures of a finished run."""
    return {name: rows[-1][name] for name in ("val_loss", "val_bpb", "cpu_seconds")}


def main() -> None:
    """Run all presets and seeds, then write both files."""
    args = parse_args(Args, __doc__)
    # Loading prepares the data once, before the processes start.
    hashes = {data: load_text(data).sha256 for _, data in RUNS}
    jobs = {}
    for preset, data in RUNS:
        seeds = args.seeds if data == "pydocs" else 1
        for seed in range(seeds):
            jobs[preset, data, seed] = ladder_job(preset, seed, data)
    all_jobs = list(jobs.values())
    results = train_all("ladder", all_jobs, last_metrics, args.results, args.runs)

    ladder, expected = {"machine": machine_of("ladder", all_jobs, args.results)}, {}
    for preset_and_data in RUNS:
        rows = []
        for (*job_run, seed), job in jobs.items():
            if tuple(job_run) == preset_and_data:
                rows.append({"seed": seed} | results[job.name])
        values = [row["val_bpb"] for row in rows]
        mean, spread = sum(values) / len(values), max(values) - min(values)
        name, data = "/".join(preset_and_data), preset_and_data[1]
        ladder[name] = {"mean_val_bpb": mean, "spread": spread, "runs": rows}
        expected[name] = expected_entry(hashes[data], "val_bpb", values)
    write_json(args.results / "ladder.json", ladder)
    update_expected(args.results / "expected.json", expected)


if __name__ == "__main__":
    run(main)
