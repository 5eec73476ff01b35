"""Tune what keeps the experts' load even: results/balance.json and balance.png.

    python -m nanods.bench.balance             about 25 minutes on 2 cores; `make bench-balance`
    python -m nanods.bench.balance --seeds 1   the search alone

v2-tiny with 2 of its 4 layers on pydocs, STEPS steps from scratch with the whole learning rate
schedule. Each cure stands alone and is tried at several strengths with seed 0; its best strength is
repeated with the other seeds:

    loss             the load-balancing loss, by its coefficient
    bias             the selection bias, by its rate; softmax scores
    bias, sigmoid    the same with sigmoid scores, as in DeepSeek-V3

These three keep the router z-loss, which does not balance. For comparison, with one seed and
without both losses: nothing, and the article's limit of 1.25 shares per expert.

The best strength is the one with the lowest bits per byte among those whose busiest expert has at
most EVEN times the mean load on validation; if there is none, the one with the most even load.
"""

from dataclasses import dataclass
from pathlib import Path

from nanods import plots, plots_experts
from nanods.bench.experts import WITHOUT_LOSSES, run_figures
from nanods.bench.jobs import Job
from nanods.bench.runs import flags_from_dict, write_json
from nanods.bench.stored_runs import TrainingArgs, machine_of, train_all
from nanods.data.text import load_text
from nanods.errors import run
from nanods.flags import parse_args

STEPS = 300
EVEN = 1.35
SMALL = {"n-layer": 2, "steps": STEPS, "eval-every": STEPS}
ONE_SEED = ("none", "capacity")
NO_BALANCE_LOSS = {"moe.balance-coefficient": 0}
SIGMOID = {"moe.scores": "sigmoid"}
FIGURES = (
    "val_load_max_over_mean",
    "val_load_min_over_mean",
    "dropped",
    "spikes",
    "val_bpb",
    "cpu_seconds",
)

CURES: dict[str, tuple[dict, str, tuple[float, ...]]] = {
    "none": (WITHOUT_LOSSES, "moe.bias-rate", (0.0,)),
    "capacity": (WITHOUT_LOSSES, "moe.capacity-factor", (1.25,)),
    "loss": ({}, "moe.balance-coefficient", (0.03, 0.1, 0.3)),
    "bias": (NO_BALANCE_LOSS, "moe.bias-rate", (0.003, 0.01, 0.03)),
    "bias, sigmoid": (NO_BALANCE_LOSS | SIGMOID, "moe.bias-rate", (0.01, 0.03, 0.1, 0.3)),
}
"""The flags of each cure, the flag of its strength, and the strengths that are tried."""


@dataclass(frozen=True)
class Args(TrainingArgs):
    seeds: int = 3
    """Seeds of each cure at its best strength."""


def job_of(cure: str, strength: float, seed: int) -> Job:
    """Return the run of a cure at a strength."""
    flags, flag, _ = CURES[cure]
    flags = SMALL | flags | {flag: strength, "seed": seed}
    return Job(f"{cure} {strength:g} seed {seed}", ("v2-tiny", *flags_from_dict(flags)))


def summarise(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the figures of a finished run."""
    figures = run_figures(rows)
    figures = {name: figures[name] for name in FIGURES}
    print(
        f"{job.name}: busiest expert {figures['val_load_max_over_mean']:.2f} times the mean, "
        f"{figures['val_bpb']:.4f} bits per byte",
        flush=True,
    )
    return figures


def best_strength(by_strength: dict[float, dict]) -> float:
    """Return the best strength of a cure, by the figures of its runs: see the module."""

    def imbalance(strength: float) -> float:
        return by_strength[strength]["val_load_max_over_mean"]

    even = [strength for strength in by_strength if imbalance(strength) <= EVEN]
    if not even:
        return min(by_strength, key=imbalance)
    return min(even, key=lambda strength: by_strength[strength]["val_bpb"])


def main() -> None:
    args = parse_args(Args, __doc__)
    sha256 = load_text("pydocs").sha256  # prepared before the first run
    all_jobs: list[Job] = []

    def train(jobs: list[Job]) -> list[dict]:
        all_jobs.extend(jobs)
        stored = train_all("balance", jobs, summarise, args.results, args.runs, args.jobs)
        return [stored[job.name] for job in jobs]

    search = [(cure, strength) for cure, (_, _, tried) in CURES.items() for strength in tried]
    tried: dict[str, dict[float, dict]] = {cure: {} for cure in CURES}
    found = train([job_of(cure, strength, 0) for cure, strength in search])
    for (cure, strength), figures in zip(search, found, strict=True):
        tried[cure][strength] = figures

    best = {}
    for cure, by_strength in tried.items():
        strength = best_strength(by_strength)
        seeds = 1 if cure in ONE_SEED else args.seeds
        runs = train([job_of(cure, strength, seed) for seed in range(seeds)])
        best[cure] = {"strength": strength, "runs": runs}
    for cure, row in best.items():
        pairs = zip(row["runs"], best["loss"]["runs"], strict=False)
        row["above_loss"] = [ours["val_bpb"] - with_loss["val_bpb"] for ours, with_loss in pairs]
        busiest = ", ".join(f"{figures['val_load_max_over_mean']:.2f}" for figures in row["runs"])
        above = ", ".join(f"{value:+.4f}" for value in row["above_loss"])
        print(f"{cure} {row['strength']:g}: busiest / mean {busiest}; bits per byte {above}")
    table = {
        "machine": machine_of("balance", all_jobs, args.results),
        "data": {"name": "pydocs", "sha256": sha256},
        "size": SMALL,
        "even": EVEN,
        "tried": tried,
        "best": best,
    }
    write_json(args.results / "balance.json", table)
    plots.save(plots_experts.balance_against_loss(table), args.results / "balance.png")


if __name__ == "__main__":
    run(main)
