"""What experts gain and cost in training.

    python -m nanods.bench.experts             about 2.5 hours on 2 cores, two runs at a time
    python -m nanods.bench.experts --seeds 1   a third of that

The first is `make bench-experts`. Writes results/experts.json and results/experts.png.

Trains on pydocs at the tiny scale. Each run is a train.py of its own on one thread. Finished runs
are stored and not repeated (stored_runs.py). But times are compared: if the results would come
from several machines, those of other machines are repeated, except for runs at equal time.

    balance     v2-tiny with the load-balancing loss; without it (more cures: balance.py)
    quality     V2 against V1 with hidden width 2F (equal active FLOPs) and against unchanged V1, at
                equal tokens; against V1 at equal time
    upcycling   STEPS more steps from a trained V1: as V2, as V1, as V1 for as long as V2 took; and
                V2 from scratch
    stability   the article's three methods together (capacity 1.25, balancing loss, warm start);
                capacity alone; none of them
    domains     how much of a trained V2's selection the byte and the kind of text explain

Time is CPU time of training on one thread, without evaluations. A run at equal time has as many
steps as V1 makes in the time of V2's run, computed from the times of the other runs. Its own time
is not in the table: it may have run on another machine.
"""

import ast
import inspect
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from nanods import plots
from nanods.bench.jobs import Job, ladder_job
from nanods.bench.runs import flags_from_dict, mean_and_each, write_json
from nanods.bench.stored_runs import Machines, TrainingArgs, machine_of, train_all
from nanods.config import PRESETS
from nanods.data.text import load_text
from nanods.errors import run
from nanods.flags import parse_args
from nanods.training import checkpoint
from nanods.training.inspection import chosen_experts

STEPS = 400  # of the short runs: upcycling and stability
WITHOUT_LOSSES = {"moe.balance-coefficient": 0, "moe.z-coefficient": 0}
FULL_STEPS = PRESETS["v2-tiny"].steps
MAX_SEEDS = {"none": 1}  # of this variant
SPIKE_WINDOW = 50  # a spike is compared with this many steps before it
HISTORY_WINDOW = 50  # steps averaged into one column of the load's history


@dataclass(frozen=True)
class Args(TrainingArgs):
    seeds: int = 3
    """Seeds of each variant, except those in MAX_SEEDS."""


def variants(start: Path) -> dict[str, tuple[str, dict]]:
    """Return the preset and the flags of each variant that is trained, by name.

    Some of them start from the run directory `start`, of a trained V1.
    """
    # V1's learning rate after three quarters of its schedule.
    low_lr = {"lr": 0.005, "expert-lr": 0.005}
    warm_start = {"init-from": start, "steps": STEPS, **low_lr}
    capacity = {"moe.capacity-factor": 1.25}
    return {
        "none": ("v2-tiny", WITHOUT_LOSSES | {"steps": FULL_STEPS}),
        "wide": ("v1-tiny", {"hidden-ratio": 8, "steps": FULL_STEPS}),
        "v1": ("v1-tiny", {"steps": FULL_STEPS}),
        "upcycled": ("v2-tiny", warm_start),
        "continued": ("v1-tiny", warm_start),
        "scratch": ("v2-tiny", {"steps": STEPS}),
        "all three": ("v2-tiny", warm_start | capacity),
        "capacity alone": ("v2-tiny", WITHOUT_LOSSES | capacity | {"steps": STEPS}),
        "none of them": ("v2-tiny", WITHOUT_LOSSES | {"steps": STEPS}),
    }


# ---- one run -------------------------------------------------------------------------------------


def summarise_run(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the figures of a run; of the first unchanged V2 also what explains its selections."""
    last = rows[-1]
    print(
        f"{job.name}: {last['cpu_seconds']:.0f} s, {last['val_bpb']:.4f} bits per byte", flush=True
    )
    figures = run_figures(rows)
    if job.name == "loss-0":
        figures["domains"] = explain_selections(out)
    return figures


def run_figures(rows: list[dict]) -> dict:
    """Return the figures of a run from the rows of its metrics, with the history of its load."""
    last, steps = rows[-1], [row for row in rows if row["step"]]
    figures = {name: last[name] for name in ("step", "val_loss", "val_bpb", "cpu_seconds")}
    optimizer_seconds = median(row["optimizer_seconds"] for row in steps)
    figures["optimizer_share_of_time"] = optimizer_seconds / (last["seconds"] / len(steps))
    figures["spikes"] = count_spikes([row.get("ce_loss", row["train_loss"]) for row in steps])
    if rows[0]["step"] == 0:
        figures["val_loss_at_step_0"] = rows[0]["val_loss"]
    if "load" in last:
        for name in ("val_load_max_over_mean", "val_load_entropy", "val_load"):
            figures[name] = last[name]
        val_load = np.array(last["val_load"])  # (L, E)
        min_over_mean = (val_load / val_load.mean(axis=1, keepdims=True)).min()
        figures["val_load_min_over_mean"] = float(min_over_mean)
        figures["train_load_max_over_mean"] = mean(row["load_max_over_mean"] for row in steps)
        figures["dropped"] = mean(row["dropped"] for row in steps)
        figures["load_history"] = load_history(np.array([row["load"] for row in steps]))
    return figures


def load_history(load: np.ndarray) -> list:
    """Average the load over windows of steps, relative to an even load.

    load (steps, L, E) -> nested lists (windows, L, E), rounded.
    """
    history = []
    for window in np.split(load, range(HISTORY_WINDOW, len(load), HISTORY_WINDOW)):
        window_load = window.mean(axis=0)  # (L, E)
        relative_load = window_load / window_load.mean(axis=1, keepdims=True)
        history.append(relative_load.round(3).tolist())
    return history


def count_spikes(losses: list[float]) -> int:
    """Count the steps whose loss exceeds the mean of the SPIKE_WINDOW steps before by 3 standard
    deviations of these.
    """
    losses = np.array(losses)
    before = np.lib.stride_tricks.sliding_window_view(losses, SPIKE_WINDOW)[:-1]
    limit = before.mean(axis=1) + 3 * before.std(axis=1)
    return int((losses[SPIKE_WINDOW:] > limit).sum())


def equal_time_steps(per_step: list[dict], seconds: list[dict]) -> int:
    """Return how many steps of the runs `per_step` take as long as the runs `seconds` on
    average."""
    target = mean(run["cpu_seconds"] for run in seconds)
    return round(target / mean(run["cpu_seconds"] / run["step"] for run in per_step))


# ---- what explains the selection of experts ------------------------------------------------------


def texts_by_kind(size: int = 16_384) -> dict[str, bytes]:
    """Return three kinds of text that come with Python: its reference, docstrings, source code."""
    text = load_text("pydocs")
    return {
        "reference": bytes(text.train[:size].astype("uint8")),
        "docstrings": bytes(text.val[:size].astype("uint8")),
        "source": inspect.getsource(ast).encode()[:size],
    }


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mutual information of two samples of integers (N,), in nats."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(b))
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    occurs = joint > 0
    return float((joint[occurs] * np.log(joint[occurs] / independent[occurs])).sum())


def explained_fraction(experts: np.ndarray, by: np.ndarray) -> float:
    """Return the fraction of the experts' entropy that `by` explains: I(experts; by) / H(experts).

    experts, by: integers (N,). In a finite sample even a shuffled `by` has some mutual information
    with the experts; that much is subtracted.
    """
    frequencies = np.bincount(experts) / len(experts)
    frequencies = frequencies[frequencies > 0]
    entropy = -(frequencies * np.log(frequencies)).sum()
    shuffled = np.random.default_rng(0).permutation(by)
    return (mutual_information(experts, by) - mutual_information(experts, shuffled)) / entropy


def explain_selections(run_dir: Path) -> dict[str, list[float]]:
    """Return how much three features explain of each token's first expert, layer by layer.

    The features are the token's byte, the byte before it, and the kind of text.
    """
    model = checkpoint.load_model(checkpoint.load(run_dir))
    this_byte, byte_before, kind, experts = [], [], [], []
    for kind_number, text in enumerate(texts_by_kind().values()):
        for window in torch.tensor(list(text)).split(model.config.context_length):
            this_byte += window[1:].tolist()
            byte_before += window[:-1].tolist()
            kind += [kind_number] * (len(window) - 1)
            experts.append(chosen_experts(model, window)[:, 1:, 0])  # (L, T - 1)
    features = {"the byte": this_byte, "the byte before": byte_before, "the kind of text": kind}
    layers = np.concatenate(experts, axis=1)  # (L, tokens)
    explained = {}
    for name, values in features.items():
        feature = np.array(values)
        explained[name] = [explained_fraction(layer, feature) for layer in layers]
    return explained


# ---- the table -----------------------------------------------------------------------------------


def summarise(runs: list[dict]) -> dict:
    """Return mean, min and max of each figure over the seeds of a variant."""
    summary = {}
    for name, value in runs[0].items():
        if isinstance(value, int | float) and name not in ("seed", "step"):
            values = [run[name] for run in runs]
            summary[name] = {"mean": mean(values), "min": min(values), "max": max(values)}
    return summary


def gap(runs: dict[str, list[dict]], a: str, b: str) -> dict:
    """Return the bits per byte of variant a minus those of b: seed by seed, and the mean."""
    each = [x["val_bpb"] - y["val_bpb"] for x, y in zip(runs[a], runs[b], strict=False)]
    return mean_and_each(each)


def variant_job(args: Args, name: str, seed: int, label: str = "", **changes) -> Job:
    """Return the run of a variant, under the name `label` if some of its flags are changed."""
    start = ladder_job("v1-tiny", seed, name=f"v1 as it is-{seed}")
    preset, flags = variants(start.folder_in(args.runs, "experts"))[name]
    words = (preset, *flags_from_dict(flags | changes | {"seed": seed}))
    return Job(f"{label or name}-{seed}", words, needs=start if "init-from" in flags else None)


def list_jobs(args: Args) -> dict[str, list[Job]]:
    """Return the runs of each variant, one a seed, except those at equal time."""
    jobs = {}
    for name, preset in (("v1 as it is", "v1-tiny"), ("loss", "v2-tiny")):
        jobs[name] = [ladder_job(preset, seed, name=f"{name}-{seed}") for seed in range(args.seeds)]
    for name in variants(Path()):
        seeds = min(args.seeds, MAX_SEEDS.get(name, args.seeds))
        jobs[name] = [variant_job(args, name, seed) for seed in range(seeds)]
    return jobs


def list_equal_time_jobs(args: Args, runs: dict[str, list[dict]]) -> dict[str, list[Job]]:
    """Return the runs of V1 for as long as V2 took, from the figures of the others."""
    jobs = {}
    for name, slower in (("v1", "loss"), ("continued", "upcycled")):
        steps = equal_time_steps(runs[name], runs[slower])
        jobs[f"{name}, equal time"] = [
            variant_job(args, name, seed, f"{name}, {steps} steps", steps=steps)
            for seed in range(args.seeds)
        ]
    return jobs


def train_variants(
    args: Args, jobs: dict[str, list[Job]], machines: Machines
) -> dict[str, list[dict]]:
    """Train what is not stored. Return the figures of each run by variant."""
    results = train_all(
        "experts",
        [job for of_variant in jobs.values() for job in of_variant],
        summarise_run,
        args.results,
        args.runs,
        workers=args.jobs,
        machines=machines,
    )
    runs = {}
    for name, of_variant in jobs.items():
        runs[name] = [{"seed": i} | results[job.name] for i, job in enumerate(of_variant)]
    return runs


def main() -> None:
    args = parse_args(Args, __doc__)
    sha256 = load_text("pydocs").sha256  # prepares the text before the first run
    jobs = list_jobs(args)
    runs = train_variants(args, jobs, machines="one")
    equal_time_jobs = list_equal_time_jobs(args, runs)
    equal_time_runs = train_variants(args, equal_time_jobs, machines="any")
    for equal_time_run in chain(*equal_time_runs.values()):
        for name in ("cpu_seconds", "optimizer_share_of_time"):
            equal_time_run.pop(name, None)
    runs |= equal_time_runs
    domains = runs["loss"][0].pop("domains")
    all_jobs = [job for of_variant in (jobs | equal_time_jobs).values() for job in of_variant]
    gaps = {
        "balanced minus unbalanced": gap(runs, "loss", "none"),
        "balanced minus unbalanced, short": gap(runs, "scratch", "none of them"),
        "V2 minus V1, equal tokens": gap(runs, "loss", "v1"),
        "V2 minus V1 as it is, which sees more tokens": gap(runs, "loss", "v1 as it is"),
        "V2 minus V1 with 2F, equal tokens and active FLOPs": gap(runs, "loss", "wide"),
        "V2 minus V1, equal time": gap(runs, "loss", "v1, equal time"),
        "upcycled minus from scratch": gap(runs, "upcycled", "scratch"),
        "upcycled minus continued V1, equal steps": gap(runs, "upcycled", "continued"),
        "upcycled minus continued V1, equal time": gap(runs, "upcycled", "continued, equal time"),
    }
    table = {
        "machine": machine_of("experts", all_jobs, args.results),
        "data": {"name": "pydocs", "sha256": sha256},
        "steps": {"full": FULL_STEPS, "short": STEPS},
        "gaps": gaps,
        "summary": {name: summarise(rows) for name, rows in runs.items()},
        "domains": domains,
        "runs": runs,
    }
    for name, rows in runs.items():
        # The histories of two runs, "loss" and "none" with seed 0, are enough for a plot.
        for row in rows[1:] if name in ("loss", "none") else rows:
            row.pop("load_history", None)
    write_json(args.results / "experts.json", table)
    bits_per_byte = {name: [row["val_bpb"] for row in rows] for name, rows in runs.items()}
    plots.save(
        plots.dot_plot(bits_per_byte, {}, "bits per byte on validation"),
        args.results / "experts.png",
    )


if __name__ == "__main__":
    run(main)
