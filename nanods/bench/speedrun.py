"""The speedrun: train on tinyshakespeare to nanoGPT's loss with as little CPU time as possible.

    python -m nanods.bench.speedrun                    the newest entry; `make speedrun`
    python -m nanods.bench.speedrun --entry NAME       an older one, to compare on your machine
    python -m nanods.bench.speedrun --data FILE        where there is no network
    python -m nanods.bench.speedrun --nanogpt DIR      first nanoGPT's recipe, in your clone

Trains v0-tiny with the flags of an entry on each seed, one thread a run, and prints CPU-seconds,
tokens and steps, whether every seed has reached TARGET, and a row for lessons/SPEEDRUN.md, which
has the rules. Adds the figures to results/speedrun.json. Evaluations do not count as time. To
join, add an entry below; code that it needs gets a flag that is off by default.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from nanods.bench.jobs import Job
from nanods.bench.runs import (
    describe_machine,
    flags_from_dict,
    machine_words,
    read_json,
    write_json,
)
from nanods.bench.stored_runs import TrainingArgs, machine_of, train_all
from nanods.data.text import SHAKESPEARE_SHA256, load_text
from nanods.errors import UserError, run
from nanods.flags import parse_args

TARGET = 1.4697
"""Validation loss of nanoGPT's 10.7M parameters after 5,000 steps on an A100 (its README)."""

EARLIER = {"conv-width": 1, "sampling": "random"}  # as v0-tiny had them until 2026-11-27
EPOCHS = {"conv-width": 4, "sampling": "epochs"}  # as it has them now

ENTRIES: dict[str, dict[str, object]] = {
    "first v0-tiny": EARLIER | {"steps": 2000},
    "short windows first": EARLIER | {"short-context": 0.5, "steps": 1700},
    "convolution before the MLP": EARLIER | {"conv-width": 4, "short-context": 0.5, "steps": 1100},
    "text read in epochs": EPOCHS | {"short-context": 0.5, "steps": 850},
    "equal neurons": EPOCHS
    | {"short-context": 0.5, "equal-neurons": True, "lr": 0.03, "steps": 800},
}
"""The flags of each entry over the preset v0-tiny, oldest first. An entry is a record if all three
seeds reach the target and their mean time is below that of every earlier record."""

NANOGPT_STEPS = 2000
NANOGPT_RECIPE = (  # what its README proposes for a laptop; a line for each step
    *("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False"),
    *("--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4"),
    *("--n_head=4", "--n_embd=128", f"--max_iters={NANOGPT_STEPS}"),
    *(f"--lr_decay_iters={NANOGPT_STEPS}", "--dropout=0.0"),
)


@dataclass(frozen=True)
class Args(TrainingArgs):
    entry: str = next(reversed(ENTRIES))
    """The entry to train: a name in ENTRIES."""
    seeds: int = 3
    """Seeds of the entry; a record needs three."""
    data: str = "shakespeare"
    """tinyshakespeare: its name, or a file that holds it."""
    nanogpt: Path | None = None
    """A clone of github.com/karpathy/nanoGPT, with its data prepared (python
    data/shakespeare_char/prepare.py), whose recipe for a laptop is timed first."""


# ---- an entry ------------------------------------------------------------------------------------


def entry_job(name: str, seed: int, data: str = "shakespeare") -> Job:
    """Return the run of an entry with a seed."""
    steps = ENTRIES[name]["steps"]
    flags = {"data": data, "device": "cpu", "eval-every": steps} | ENTRIES[name] | {"seed": seed}
    return Job(f"{name}, seed {seed}", ("v0-tiny", *flags_from_dict(flags)))


def summarise(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the figures of a finished run."""
    last = rows[-1]
    figures = {name: last[name] for name in ("val_loss", "cpu_seconds", "step", "tokens")}
    print(
        f"{job.name}: validation loss {last['val_loss']:.4f}, {last['cpu_seconds']:.0f} "
        f"CPU-seconds, {last['tokens']:,} tokens, {last['step']:,} steps",
        flush=True,
    )
    return figures


def table_row(name: str, entry: dict) -> str:
    """Return the row of an entry in lessons/SPEEDRUN.md."""
    runs = entry["runs"]
    losses = ", ".join(f"{figures['val_loss']:.4f}" for figures in runs)
    seconds = mean(figures["cpu_seconds"] for figures in runs)
    return (
        f"| {name} | {runs[0]['step']:,} | {runs[0]['tokens'] / 1e6:.2f}M | {seconds:.0f} | "
        f"{losses} | {machine_words(entry['machine'])} |"
    )


# ---- nanoGPT -------------------------------------------------------------------------------------


def time_nanogpt(clone: Path) -> dict:
    """Train nanoGPT's recipe for a laptop on one thread. Return its last validation loss and the
    seconds of its steps: the median step times their number, so evaluations do not count.

    nanoGPT prints wall-clock time; on one thread this is CPU time if nothing else runs.
    Raises UserError if the clone is not one, or if its training fails.
    """
    if not (clone / "config" / "train_shakespeare_char.py").exists():
        raise UserError(
            f"--nanogpt {clone}: no nanoGPT there; clone https://github.com/karpathy/nanoGPT"
        )
    command = [sys.executable, *NANOGPT_RECIPE]
    print(f"begun      nanoGPT: {' '.join(['python', *NANOGPT_RECIPE])}", flush=True)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=clone, env=one_thread, capture_output=True, text=True)
    losses = re.findall(r"^step (\d+): .*val loss ([\d.]+)", done.stdout, re.MULTILINE)
    times = re.findall(r"^iter \d+: .*time ([\d.]+)ms", done.stdout, re.MULTILINE)
    if done.returncode or not losses or not times:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(
            f"--nanogpt {clone}: its training ended with {done.returncode} ({' '.join(last)}); "
            "install its packages and prepare its data: python data/shakespeare_char/prepare.py"
        )
    step, loss = losses[-1]
    seconds = median(map(float, times)) / 1000 * NANOGPT_STEPS
    print(f"nanoGPT: validation loss {loss} after {step} steps, {seconds:.0f} CPU-seconds")
    return {"val_loss": float(loss), "step": int(step), "cpu_seconds": seconds}


# ---- the bench -----------------------------------------------------------------------------------


def main() -> None:
    args = parse_args(Args, __doc__)
    if args.entry not in ENTRIES:
        raise UserError(f"--entry {args.entry}: choose one of {', '.join(ENTRIES)}")
    if load_text(args.data).sha256 != SHAKESPEARE_SHA256:
        raise UserError(f"--data {args.data}: this is not tinyshakespeare, so it is no speedrun")
    path = args.results / "speedrun.json"
    table = read_json(path) or {"target": TARGET, "entries": {}}
    if args.nanogpt:
        table["nanogpt"] = time_nanogpt(args.nanogpt) | {"machine": describe_machine("fp32")}
        write_json(path, table)

    jobs = [entry_job(args.entry, seed, args.data) for seed in range(args.seeds)]
    runs = train_all(
        "speedrun", jobs, summarise, args.results, args.runs, args.jobs, machines="this"
    )
    machine = machine_of("speedrun", jobs, args.results)
    entry = {"flags": ENTRIES[args.entry], "runs": list(runs.values()), "machine": machine}
    table["entries"][args.entry] = entry
    write_json(path, table)
    reached = [figures["val_loss"] <= TARGET for figures in runs.values()]
    verdict = "PASS" if all(reached) else "MISS"
    print(f"{verdict}: {sum(reached)} of {len(reached)} seeds at or below {TARGET}")
    if args.seeds < 3:
        print("a record needs three seeds")
    print(table_row(args.entry, entry))


if __name__ == "__main__":
    run(main)
