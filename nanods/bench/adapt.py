"""Learning something new without forgetting: results/adapt.json and adapt_*.png.

    python -m nanods.bench.adapt               3 seeds; `make bench-adapt`
    python -m nanods.bench.adapt --seeds 1

v1-tiny. A base run of each seed learns pydocs-train for BASE_STEPS. All other runs go on from it
for STEPS, on instructions (nanods/data/instructions.py), except those from random weights. Figures
are bits per byte of answers from modules that no run has read. `plain` is the documentation of
these modules: the general ability. The rise of its bits per byte is what a run has forgotten.

    mixture      all tasks at once, against the base and against random weights at equal tokens;
                 also the share of answers that are exactly correct
    new task     docstring -> source, one way after the other: plain fine-tuning, EWC, an L2 penalty
                 towards the base's weights, replay of 1% and of 10%, the empirical Fisher
                 information, the common mistake (squared gradients of batches), and AdamW in place
                 of Muon
    directly     the new task from random weights, with as many tokens as base and task together
    frontier     the new task for each lambda of EWC and L2, with the first seed
    in a row     a second new task (signature -> docstring) after the first, plain and with EWC

Each lambda is chosen on another task (dialogue) with the first seed: of those that gain within
NEAR bits per byte of plain fine-tuning, the one that forgets least; if none does, the smallest.
The AdamW runs use the lambda chosen for Muon. Learning rates and steps are the same for all arms
and were not tuned.

A run that stops early forgets less too. So each arm's forgetting is also divided by that of plain
fine-tuning at the step where it had gained as much as the arm has in the end.

An evaluation reads EVAL_TOKENS of the held-out rows, the same for every run, spread evenly over the
tasks: before the first step and after the last, and each CURVE_EVERY steps of the arms in CURVES.
Each run uses one thread and is stored when it is finished (stored_runs.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from nanods import plots, plots_adapt
from nanods.bench.jobs import Job
from nanods.bench.runs import write_json
from nanods.bench.stored_runs import TrainingArgs, machine_of, train_all
from nanods.config import PRESETS
from nanods.data.instructions import NAME, PLAIN
from nanods.errors import run
from nanods.flags import parse_args
from nanods.training import consolidation
from nanods.training.finished_run import load_run
from nanods.training.instruction_task import IGNORED, InstructionTask

BENCH = "adapt"
PRESET = "v1-tiny"
BASE_STEPS, STEPS = 800, 100
EVAL_TOKENS = 50_000
EXACT_TOKENS = 110_000  # for answers right to the letter: all of the doctests, which are short
TASKS = ("doctest", "docstring", "source", "dialogue")
TUNED_ON, NEW, SECOND = "dialogue", "source", "docstring"
NEAR = 0.01  # bits per byte: a gain this near to plain fine-tuning's counts as equal
EWC = {"EWC": "sampled", "empirical": "data", "batches": "batch", "L2": "none"}
"""--ewc-fisher of each arm that holds weights."""
LAMBDAS = {
    "EWC": (0.1, 0.3, 1.0, 3.0),
    "empirical": (0.1, 0.3, 1.0, 3.0),
    "batches": (1.0, 3.0, 10.0, 30.0),  # its F is about an eighth, for batches of 8
    "L2": (0.01, 0.04, 0.16, 0.64),  # its F is 1 for every weight
}
FISHER_SEQUENCES = 128
REPLAY = {"replay 1%": 0.01, "replay 10%": 0.1}
FRONTIERS = ("EWC", "L2")
CURVES, CURVE_EVERY = ("plain", *FRONTIERS, "replay 10%"), 20
STEP_SECONDS, RUN_SECONDS = 0.4, 25  # CPU time on the machine of results/, for the forecast


@dataclass(frozen=True)
class Args(TrainingArgs):
    seeds: int = 3
    """Seeds of the weights and the batches."""


# ---- the runs ------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The jobs of one seed, by name."""

    seed: int
    runs: Path
    jobs: dict[str, Job] = field(default_factory=dict)

    def add(self, name: str, needs: Job | None, *words: object) -> Job:
        """Add a run that goes on from `needs`, or from random weights."""
        evaluations = ("--eval-every", self.evaluate_every(name), "--eval-tokens", EVAL_TOKENS)
        flags = [PRESET, "--seed", self.seed, *evaluations, *words]
        if needs:
            start = needs.folder_in(self.runs, BENCH)
            flags += ["--stage", "finetune", "--steps", STEPS, "--init-from", start]
        job = Job(f"{name}, seed {self.seed}", tuple(map(str, flags)), needs=needs)
        self.jobs[name] = job
        return job

    def add_ewc(self, needs: Job, arm: str, strength: float, *words: object, name="") -> Job:
        """Add a run with a penalty towards the weights it starts from."""
        flags = ["--ewc", needs.folder_in(self.runs, BENCH), "--ewc-fisher", EWC[arm]]
        flags += ["--ewc-lambda", strength, "--ewc-sequences", FISHER_SEQUENCES]
        return self.add(name or f"{arm} {strength:g}", needs, *flags, *words)

    @staticmethod
    def evaluate_every(name: str) -> int:
        """Return the steps between evaluations: CURVE_EVERY for runs with a curve, else so many
        that only the start and the end are evaluated."""
        if name in CURVES or name.split(" ")[0] in FRONTIERS:
            return CURVE_EVERY
        return 1_000_000


def mix(task: str, replay: float = 0.0) -> tuple[str, str]:
    return "--mix", f"{task}={1 - replay:g}" + (f",{PLAIN}={replay:g}" if replay else "")


def add_base(plan: Plan) -> Job:
    return plan.add("base", None, "--steps", BASE_STEPS, "--data", "pydocs-train")


def plan_tuning(runs: Path) -> Plan:
    """Plan the runs from which each arm's lambda is chosen."""
    plan = Plan(0, runs)
    base = add_base(plan)
    plan.add("tune plain", base, *mix(TUNED_ON))
    for arm, strengths in LAMBDAS.items():
        for strength in strengths:
            plan.add_ewc(base, arm, strength, *mix(TUNED_ON), name=f"tune {arm} {strength:g}")
    return plan


def plan_comparison(
    seed: int, runs: Path, chosen: dict[str, float], lengths: dict[str, float]
) -> Plan:
    """Plan the runs of a seed that are compared. Those of an arm that holds weights are named by
    arm and lambda.

    A run from random weights reads as many tokens as the base run and the run after it together,
    on rows of mean `lengths`.
    """
    plan = Plan(seed, runs)
    base = add_base(plan)
    for name, words in (("mixture", ()), (NEW, mix(NEW))):
        steps = round(BASE_STEPS * PRESETS[PRESET].model.context_length / lengths[name] + STEPS)
        plan.add(f"{name} from random weights", None, "--data", NAME, "--steps", steps, *words)
    plan.add("mixture", base)
    plain = plan.add("plain", base, *mix(NEW))
    plan.add("plain, then plain", plain, *mix(SECOND))
    adamw = ("--optimizer", "adamw")
    plan.add("plain, AdamW", base, *mix(NEW), *adamw)
    for arm, strength in chosen.items():
        held = plan.add_ewc(base, arm, strength, *mix(NEW))
        if arm == "EWC":
            plan.add_ewc(base, arm, strength, *mix(NEW), *adamw, name="EWC, AdamW")
            plan.add_ewc(held, arm, strength, *mix(SECOND), name="EWC, then EWC")
    for arm, share in REPLAY.items():
        plan.add(arm, base, *mix(NEW, share))
    for arm in FRONTIERS if seed == 0 else ():
        for strength in LAMBDAS[arm]:
            plan.add_ewc(base, arm, strength, *mix(NEW))
    return plan


def row_lengths(task: InstructionTask) -> dict[str, float]:
    """Return the mean tokens of the rows of each task, and of the mixture of all."""
    lengths = {
        name: mean(len(row.tokens) for row in rows) for name, rows in task.data.train_rows.items()
    }
    return lengths | {"mixture": mean(lengths.values())}


def forecast(jobs: Iterable[Job]) -> str:
    """Return how many runs a bench has if none is stored, and about how long they take."""
    runs = list(dict.fromkeys(jobs))
    steps = sum(int(job.words[job.words.index("--steps") + 1]) for job in runs)
    minutes = (STEP_SECONDS * steps + RUN_SECONDS * len(runs)) / 60
    return (
        f"planned    {len(runs)} runs of {steps:,} steps in total, evaluated on {EVAL_TOKENS:,} "
        f"held-out tokens before the first step and after the last: about {minutes:.0f} CPU-minutes"
    )


# ---- what a run is stored with -------------------------------------------------------------------


def figures(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the bits per byte of each task before the first step (where a run goes on from
    another), at each evaluation and at the end; the Fisher information by parameter of a run that
    holds weights; the exact answers of the base and of the mixtures."""
    result = {"cpu_seconds": rows[-1]["cpu_seconds"]}
    evaluated = [row for row in rows if f"val_bpb_{PLAIN}" in row]
    if evaluated:
        curve = [{name: row[f"val_bpb_{name}"] for name in (*TASKS, PLAIN)} for row in evaluated]
        result["before"] = curve[0] if evaluated[0]["step"] == 0 else None
        result["after"] = curve[-1]
        result["curve"] = {"step": [row["step"] for row in evaluated], "val_bpb": curve}
    else:  # the base run: a text
        result["val_bpb"] = rows[-1]["val_bpb"]
    if job.config.ewc:
        held = consolidation.load(out, torch.device("cpu"), torch.float32)
        result["fisher"] = {name: F.mean().item() for name, F in held.fisher.items()}
    if job.name.startswith(("base", "mixture")):
        result["exact"] = exact_answers(out)
    return result


@torch.no_grad()
def exact_answers(run_dir: Path) -> dict[str, float]:
    """Return the share of each task's held-out answers that a trained model gives exactly, END
    left out, if it always takes the likeliest token.

    It does where each token of the answer is the likeliest after those before it.
    """
    model = load_run(str(run_dir), "cpu").model
    task = InstructionTask(
        replace(PRESETS[PRESET], data=NAME, eval_tokens=EXACT_TOKENS), torch.device("cpu")
    )
    shares = {}
    for name in TASKS:
        exact = []
        for rows in task.validation_batches(name):
            batch = task.collate(rows, 1.0)
            predicted = model(batch.tokens)[0].argmax(dim=-1)  # (B, T)
            is_text = (batch.targets != IGNORED) & (batch.targets != task.end)
            exact += ((predicted == batch.targets) | ~is_text).all(dim=1).tolist()
        shares[name] = mean(exact)
    return shares


# ---- what is found -------------------------------------------------------------------------------


def gain(result: dict, task: str) -> float:
    """Return by how many bits per byte a run has learnt a task."""
    return result["before"][task] - result["after"][task]


def forgotten(result: dict) -> float:
    """Return by how many bits per byte the documentation costs more than before."""
    return result["after"][PLAIN] - result["before"][PLAIN]


def choose_lambdas(tuned: dict[str, dict]) -> dict[str, float]:
    """Return the lambda of each arm: the one that forgets least among those that gain as much as
    plain fine-tuning, within NEAR; else the smallest."""
    wanted = gain(tuned["tune plain"], TUNED_ON) - NEAR
    chosen = {}
    for arm, strengths in LAMBDAS.items():
        results = {strength: tuned[f"tune {arm} {strength:g}"] for strength in strengths}
        good = [s for s, result in results.items() if gain(result, TUNED_ON) >= wanted]
        chosen[arm] = min(good, key=lambda s: forgotten(results[s])) if good else strengths[0]
    return chosen


def forgotten_at_gain(result: dict, wanted: float) -> float:
    """Return what a run had forgotten when it had gained `wanted` on the new task, between two
    evaluations by a line; at its end if it never did."""
    curve = result["curve"]["val_bpb"]
    gains = np.maximum.accumulate([curve[0][NEW] - row[NEW] for row in curve])
    return float(np.interp(wanted, gains, [row[PLAIN] - curve[0][PLAIN] for row in curve]))


def compare_arms(by_seed: list[dict[str, dict]], chosen: dict[str, float]) -> dict[str, dict]:
    """Return gain and forgetting of each way to learn the new task, by seed, beside plain
    fine-tuning with the same optimizer: the difference in gain, and the ratio of forgetting, at the
    end and where plain fine-tuning had gained as much."""
    names = {"plain": "plain"} | {arm: f"{arm} {chosen[arm]:g}" for arm in EWC}
    names |= {arm: arm for arm in (*REPLAY, "plain, AdamW", "EWC, AdamW")}
    table = {}
    for arm, name in names.items():
        plain = "plain, AdamW" if arm.endswith("AdamW") else "plain"
        pairs = [(runs[name], runs[plain]) for runs in by_seed]
        table[arm] = {
            "gain": [gain(result, NEW) for result, _ in pairs],
            "forgotten": [forgotten(result) for result, _ in pairs],
            "gain_minus_plain": [gain(result, NEW) - gain(p, NEW) for result, p in pairs],
            "forgotten_over_plain": [forgotten(result) / forgotten(p) for result, p in pairs],
        }
        if plain == "plain":
            table[arm]["forgotten_over_plain_at_equal_gain"] = [
                forgotten(result) / forgotten_at_gain(p, gain(result, NEW)) for result, p in pairs
            ]
    return table


def compare_mixture(by_seed: list[dict[str, dict]]) -> dict[str, dict]:
    """Return the bits per byte of each task by seed: of the base, after the mixture, and from
    random weights with as many tokens; and the exact answers."""
    scratch = "mixture from random weights"
    table = {}
    for task in (*TASKS, PLAIN):
        base = [runs["mixture"]["before"][task] for runs in by_seed]
        tuned = [runs["mixture"]["after"][task] for runs in by_seed]
        table[task] = {
            "base": base,
            "mixture": tuned,
            scratch: [runs[scratch]["after"][task] for runs in by_seed],
            "mixture_improves_by": [(x - y) / x for x, y in zip(base, tuned, strict=True)],
        }
        if task != PLAIN:
            table[task]["exact"] = {
                name: [runs[name]["exact"][task] for runs in by_seed]
                for name in ("base", "mixture", scratch)
            }
    return table


def compare_directly(by_seed: list[dict[str, dict]]) -> dict[str, dict[str, list[float]]]:
    """Return the bits per byte of the new task and of plain text by seed: after the base, and from
    random weights with as many tokens."""
    names = {"after the base": "plain", "from random weights": f"{NEW} from random weights"}
    return {
        words: {task: [runs[name]["after"][task] for runs in by_seed] for task in (NEW, PLAIN)}
        for words, name in names.items()
    }


def three_in_a_row(by_seed: list[dict[str, dict]], chosen: dict[str, float]) -> dict[str, dict]:
    """Return the matrix of results: the bits per byte of each task, by seed, after the base, after
    the first new task and after the second."""
    table = {}
    for way, first in (("plain", "plain"), ("EWC", f"EWC {chosen['EWC']:g}")):
        stages = {
            "base": [runs[first]["before"] for runs in by_seed],
            f"after {NEW}": [runs[first]["after"] for runs in by_seed],
            f"after {SECOND}": [runs[f"{way}, then {way}"]["after"] for runs in by_seed],
        }
        table[way] = {
            stage: {task: [bpb[task] for bpb in results] for task in (PLAIN, NEW, SECOND)}
            for stage, results in stages.items()
        }
    return table


# ---- pictures and words --------------------------------------------------------------------------


def draw(by_seed: list[dict[str, dict]], chosen: dict[str, float], results: Path) -> None:
    """Draw the frontiers, the Fisher information by layer and forgetting over steps, of the first
    seed."""
    first = by_seed[0]
    ways = {"replay": {"0": "plain", "1%": "replay 1%", "10%": "replay 10%"}}
    for arm in FRONTIERS:
        ways[f"{arm}, by lambda"] = {f"{s:g}": f"{arm} {s:g}" for s in LAMBDAS[arm]}
    points = {
        way: {label: (gain(first[n], NEW), forgotten(first[n])) for label, n in names.items()}
        for way, names in ways.items()
    }
    curve = first["plain"]["curve"]["val_bpb"]
    start = curve[0]
    stopped = [(start[NEW] - row[NEW], row[PLAIN] - start[PLAIN]) for row in curve]
    figure = plots_adapt.frontier(points, stopped, NEW, f"{PRESET}, seed 0, {STEPS} steps")
    plots.save(figure, results / "adapt_frontier.png")

    names = {"plain": "plain", "replay 10%": "replay 10%"}
    names |= {arm: f"{arm} {chosen[arm]:g}" for arm in FRONTIERS}
    lines = {}
    for arm, name in names.items():
        curve = first[name]["curve"]
        lines[arm] = (
            curve["step"],
            [row[PLAIN] - curve["val_bpb"][0][PLAIN] for row in curve["val_bpb"]],
        )
    figure = plots.curves(lines, "step", "forgotten of plain text (bits per byte)", {"none": 0})
    figure.axes[0].set_title(f"Forgetting while {NEW} is learnt ({PRESET}, seed 0)")
    plots.save(figure, results / "adapt_forgetting.png")

    panels = {
        "labels sampled": first[f"EWC {chosen['EWC']:g}"]["fisher"],
        "labels of the data": first[f"empirical {chosen['empirical']:g}"]["fisher"],
        "squares of batches of 8": first[f"batches {chosen['batches']:g}"]["fisher"],
    }
    figure = plots_adapt.fisher_by_layer(panels, f"Fisher information of {PRESET}'s base, seed 0")
    plots.save(figure, results / "adapt_fisher.png")


def spread(values: list[float]) -> str:
    """Return the mean of values, and the smallest and the largest."""
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(table: dict) -> None:
    """Print what is found: means over the seeds, with the smallest and the largest."""
    head = "of plain's, at equal gain (AdamW: at the end)"
    print(f"{'':14} gained on {NEW:15} forgotten               {head}")
    for arm, row in table["arms"].items():
        ratio = row.get("forgotten_over_plain_at_equal_gain", row["forgotten_over_plain"])
        print(f"{arm:14} {spread(row['gain']):25} {spread(row['forgotten'])}  {spread(ratio)}")
    for task, row in table["mixture"].items():
        words = (f"{name} {spread(values)}" for name, values in row.items() if name != "exact")
        print(f"{task:14} {', '.join(words)}")


def main() -> None:
    """Train what is not stored yet, and write the results."""
    args = parse_args(Args, __doc__)
    task = InstructionTask(replace(PRESETS[PRESET], data=NAME), torch.device("cpu"))
    lengths = row_lengths(task)

    def compared(chosen: dict[str, float]) -> list[Plan]:
        return [plan_comparison(s, args.runs, chosen, lengths) for s in range(args.seeds)]

    tuning = plan_tuning(args.runs)
    any_lambda = {arm: strengths[0] for arm, strengths in LAMBDAS.items()}
    jobs = [job for plan in (tuning, *compared(any_lambda)) for job in plan.jobs.values()]
    print(forecast(jobs), flush=True)
    where = {"results": args.results, "runs": args.runs, "workers": args.jobs}
    stored = train_all(BENCH, list(tuning.jobs.values()), figures, **where)
    chosen = choose_lambdas({name: stored[job.name] for name, job in tuning.jobs.items()})
    print(f"chosen     {', '.join(f'{arm}: lambda {s:g}' for arm, s in chosen.items())}")
    plans = compared(chosen)
    jobs = [job for plan in plans for job in plan.jobs.values()]
    stored |= train_all(BENCH, jobs, figures, **where)
    by_seed = [{name: stored[job.name] for name, job in plan.jobs.items()} for plan in plans]
    tuned = {name: stored[job.name] for name, job in tuning.jobs.items() if name != "base"}
    table = {
        "machine": machine_of(BENCH, jobs, args.results),
        "preset": PRESET,
        "seeds": args.seeds,
        "steps": {"base": BASE_STEPS, "fine-tuning": STEPS},
        "evaluated_tokens": EVAL_TOKENS,
        "new_task": NEW,
        "second_task": SECOND,
        "lambda": chosen,
        "lambda_chosen_on": {
            "task": TUNED_ON,
            "gain": {name: gain(result, TUNED_ON) for name, result in tuned.items()},
            "forgotten": {name: forgotten(result) for name, result in tuned.items()},
        },
        "mixture": compare_mixture(by_seed),
        "directly": compare_directly(by_seed),
        "arms": compare_arms(by_seed, chosen),
        "in_a_row": three_in_a_row(by_seed, chosen),
        "runs": by_seed,
    }
    write_json(args.results / "adapt.json", table)
    draw(by_seed, chosen, args.results)
    report(table)


if __name__ == "__main__":
    run(main)
