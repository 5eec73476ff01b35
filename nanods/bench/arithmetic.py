"""Are experts better at arithmetic? V2 against V1 on addition and multiplication.

    python -m nanods.bench.arithmetic          about 75 minutes on 2 cores; `make bench-arithmetic`
    python -m nanods.bench.arithmetic --seeds 1 --variants v1-2f v2

The first writes results/arithmetic.json, and two pictures: arithmetic.png has the accuracy of each
run after its last step, arithmetic_sums.png that of the sums at each checkpoint.

The training text is lines like `347+582=929` and `47*83=3901`, half of each. One in 8 pairs of
operands is held out, (a, b) and (b, a) together, and only these are tested. The model completes
`\\n47*83=` greedily; an answer counts if every digit and the end of the line are right. Answers are
written as people write them. Writing the units digit first (--units-first) avoids looking ahead for
a carry (Lee et al. 2023, arXiv:2307.03381), yet it was learnt more slowly at first, by V2 far more
slowly (LOG.md).

train.py trains each model at equal tokens, as its preset says except for SIZE: v1 (MLPs of width
4 C), v1-2f (8 C, the active FLOPs of v2, which uses 2 experts of 4 C) and v2. Attention is dense in
all three: the question is about experts, and a context of 64 is too short for sparse attention. Two
runs at a time, one thread each. Finished runs are stored and not repeated (stored_runs.py).

A run has learnt to add at the first of its checkpoints, one every SAVE_EVERY steps, that answers at
least 95% (LEARNT) of the held-out sums right. A run that does not get there counts as not learnt;
whether more steps would do is not measured. The checkpoints of a run of V2 take 1.7 GB until it is
finished; then all but the last are deleted.
"""

import hashlib
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from nanods import plots
from nanods.bench.jobs import Job
from nanods.bench.runs import flags_from_dict, is_subset, read_json, write_json
from nanods.bench.stored_runs import Summarise, machine_of, train_all
from nanods.data.download import write_atomic
from nanods.data.text import load_text
from nanods.errors import UserError, run
from nanods.flags import parse_args
from nanods.gpt import GPT
from nanods.training import checkpoint

DIGITS = {"+": 3, "*": 2}  # of each operand
MAX_HELD_OUT = 1027  # products; there are more sums
MAX_ANSWER_LENGTH = max(DIGITS["+"] + 1, 2 * DIGITS["*"]) + 1  # digits and the end of the line
LEARNT = 0.95  # of the held-out sums
SAVE_EVERY = 100  # steps
CLAIMED_RATIO = 1.22  # the article's claim: V2's accuracy over V1's in mathematics; in the plot

SIZE = {"context-length": 64, "batch-size": 32, "attention.kind": "dense", "device": "cpu"}
VARIANTS = {"v1": ("v1-tiny", {}), "v1-2f": ("v1-tiny", {"hidden-ratio": 8}), "v2": ("v2-tiny", {})}


@dataclass(frozen=True)
class Args:
    seeds: int = 5
    """Runs of each variant, with other initial weights and batches but the same text."""
    variants: tuple[Literal[*VARIANTS], ...] = tuple(VARIANTS)
    """Which of v1, v1-2f and v2 to run. Only all of them make the table and the picture."""
    steps: int = 1000
    """Optimizer steps of 2,048 tokens."""
    lines: int = 120_000
    """Problems in the training text."""
    held_out: int = 500
    """Held-out problems of each kind to test."""
    units_first: bool = False
    """Write the answers with their units digit first."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    results: Path = Path("results")
    """Folder for the table and the plot."""
    runs: Path = Path("runs")
    """Folder for the text and the runs; an unfinished run is resumed."""


# ---- problems ------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A sum (kind "+") or a product (kind "*")."""

    a: int
    kind: str
    b: int

    @property
    def question(self) -> str:
        return f"{self.a}{self.kind}{self.b}="

    def answer(self, units_first: bool) -> str:
        digits = str(self.a + self.b if self.kind == "+" else self.a * self.b)
        return (digits[::-1] if units_first else digits) + "\n"


def is_held_out(problem: Problem) -> bool:
    """Return whether a problem is held out: one pair of operands in 8, in either order.

    A hash decides, so that no list needs to be stored.
    """
    low, high = sorted((problem.a, problem.b))
    return hashlib.sha256(f"{low}{problem.kind}{high}".encode()).digest()[0] < 32


def random_problem(generator: np.random.Generator, kind: str) -> Problem:
    low = 10 ** (DIGITS[kind] - 1)
    a, b = generator.integers(low, 10 * low, 2)
    return Problem(int(a), kind, int(b))


def training_problems(count: int, seed: int = 0) -> list[Problem]:
    """Return random problems of both kinds; none is held out."""
    generator, problems = np.random.default_rng([seed, 0]), []
    while len(problems) < count:
        problem = random_problem(generator, "+*"[generator.integers(2)])
        if not is_held_out(problem):
            problems.append(problem)
    return problems


def held_out_problems(kind: str, count: int, seed: int = 0) -> list[Problem]:
    """Return different held-out problems of one kind."""
    generator, problems = np.random.default_rng([seed, 1]), {}
    while len(problems) < count:
        problem = random_problem(generator, kind)
        if is_held_out(problem):
            problems[problem] = None
    return list(problems)


def to_text(problems: Sequence[Problem], units_first: bool) -> str:
    return "".join(problem.question + problem.answer(units_first) for problem in problems)


def write_training_text(args: Args) -> Path:
    """Write the training text and return its path, which contains the hash of the text."""
    text = to_text(training_problems(args.lines), args.units_first).encode()
    path = args.runs / "arithmetic" / f"{hashlib.sha256(text).hexdigest()[:8]}.txt"
    write_atomic(path, lambda file: file.write(text))
    return path


# ---- accuracy ------------------------------------------------------------------------------------


def generate_answers(model: GPT, questions: Sequence[str]) -> list[str]:
    """Return what the model writes after each question, up to the end of the line.

    All questions must have the same length.
    """
    prompts = torch.tensor([list(f"\n{question}".encode()) for question in questions])
    tokens = model.generate(prompts, MAX_ANSWER_LENGTH, temperature=0, stop=[ord("\n")])
    answers = []
    for row in torch.stack(list(tokens), dim=1).tolist():
        answers.append(bytes(t for t in row if t >= 0).decode(errors="replace"))
    return answers


def accuracy(model: GPT, problems: Sequence[Problem], units_first: bool) -> float:
    """Return the fraction of problems whose whole answer is right."""
    answers = generate_answers(model, [problem.question for problem in problems])
    return statistics.mean(
        answer == problem.answer(units_first)
        for answer, problem in zip(answers, problems, strict=True)
    )


# ---- training ------------------------------------------------------------------------------------


def variant_job(args: Args, data: Path, variant: str, seed: int) -> Job:
    """Return the run of a variant. Its name tells apart runs on another text, of another length or
    with other tests."""
    preset, variant_flags = VARIANTS[variant]
    flags = SIZE | variant_flags | {"data": data, "steps": args.steps, "eval-every": args.steps}
    flags |= {"save-every": SAVE_EVERY, "keep-checkpoints": args.steps, "seed": seed}
    name = f"{data.stem}-{variant}-{args.steps}-every-{SAVE_EVERY}-{args.held_out}-{seed}"
    return Job(name, (preset, *flags_from_dict(flags)))


def make_summarise(args: Args) -> Summarise:
    """Return the function that tests a trained model: its time, accuracies and size, and the
    accuracy of the sums at its checkpoints."""
    sums, products = (held_out_problems(kind, args.held_out) for kind in "+*")

    def sums_right(saved: checkpoint.Checkpoint) -> float:
        return accuracy(checkpoint.load_model(saved), sums, args.units_first)

    def summarise_run(job: Job, out: Path, rows: list[dict]) -> dict:
        curve = sums_curve(out, job.config.steps, sums_right)
        model = checkpoint.load_model(checkpoint.load(out))
        scores = {"+": curve[-1][2], "*": accuracy(model, products, args.units_first)}
        scores["both"] = statistics.mean(scores.values())
        last, learnt = rows[-1], learnt_at(curve)
        words = ", ".join(f"{kind} {value:.1%}" for kind, value in scores.items())
        words += f"; {LEARNT:.0%} of the sums after {learnt[0]} steps" if learnt else ""
        print(f"{job.name}: {words}; {last['cpu_seconds']:.0f} CPU-seconds", flush=True)
        total, active = model.count_parameters()
        return {
            "score": scores,
            "step_cpu_seconds_sums": curve,
            "learnt": learnt,
            "seconds": last["seconds"],
            "cpu_seconds": last["cpu_seconds"],
            "val_loss": last["val_loss"],
            "parameters": total,
            "active": active,
            "flops_per_token": model.flops_per_token(),
        }

    return summarise_run


def sums_curve(
    out: Path, steps: int, right: Callable[[checkpoint.Checkpoint], float]
) -> list[list[float]]:
    """Return [step, CPU-seconds, accuracy of the sums] of a run at each checkpoint that its
    schedule asks for, not those of an interruption, and delete all but the last.

    Before deleting, it writes the curve to OUT/sums.json; a second call reads that.
    """
    path, (*earlier, newest) = out / "sums.json", checkpoint.list_checkpoints(out)
    curve = read_json(path).get("step_cpu_seconds_sums")
    state = checkpoint.read(newest).state
    if not curve or curve[-1][:2] != [state["step"], state["cpu_seconds"]]:  # not of this run
        curve = []
        for folder in (*earlier, newest):
            saved = checkpoint.read(folder)
            step = saved.state["step"]
            if step % SAVE_EVERY == 0 or step == steps:
                curve.append([step, saved.state["cpu_seconds"], right(saved)])
        write_json(path, {"step_cpu_seconds_sums": curve})
    for folder in earlier:
        shutil.rmtree(folder)
    return curve


def learnt_at(curve: Sequence[Sequence[float]]) -> list[float] | None:
    """Return the step and the CPU-seconds of the first checkpoint [step, seconds, accuracy] that
    has learnt to add; None if none has."""
    return next(([step, seconds] for step, seconds, right in curve if right >= LEARNT), None)


# ---- the table -----------------------------------------------------------------------------------


def summarise(runs: Sequence[dict]) -> dict:
    """Summarise each variant over its seeds, and compare V2 with both V1s.

    Each accuracy has mean, min and max. "learnt" has the step and CPU-seconds at which each run had
    learnt to add, null where it had not. The verdict has V2's lead in percentage points, and its
    ratio to V1 unless V1 has 0.
    """
    kinds = ("both", *DIGITS)
    table = {}
    for variant in dict.fromkeys(row["variant"] for row in runs):
        variant_runs = [row for row in runs if row["variant"] == variant]
        cpu_seconds = statistics.mean(row["cpu_seconds"] for row in variant_runs)
        table[variant] = {"seeds": len(variant_runs), "cpu_seconds": cpu_seconds}
        table[variant]["learnt"] = [row["learnt"] for row in variant_runs]
        for kind in kinds:
            values = [row["score"][kind] for row in variant_runs]
            table[variant][kind] = {
                "mean": statistics.mean(values),
                "min": min(values),
                "max": max(values),
            }
    verdict = {}
    for baseline in ("v1", "v1-2f"):
        if "v2" not in table or baseline not in table:
            continue
        row = {}
        for kind in kinds:
            v2, v1 = table["v2"][kind]["mean"], table[baseline][kind]["mean"]
            row[kind] = {"points": 100 * (v2 - v1), "ratio": v2 / v1 if v1 else None}
        verdict[f"v2 against {baseline}"] = row
    return {"variants": table, "verdict": verdict}


def draw(runs: Sequence[dict], variants: dict[str, dict]) -> Figure:
    """Draw each run's accuracies as dots, and bars at CLAIMED_RATIO times V1's mean accuracy."""
    dots, targets = {}, {}
    for kind in ("both", *DIGITS):
        for variant in variants:
            dots[f"{variant}, {kind}"] = [
                run["score"][kind] for run in runs if run["variant"] == variant
            ]
        if {"v1", "v2"} <= variants.keys():
            targets[f"v2, {kind}"] = min(1.0, CLAIMED_RATIO * variants["v1"][kind]["mean"])
    return plots.dot_plot(dots, targets, "fraction of held-out problems whose answer is right")


def draw_sums(runs: Sequence[dict]) -> Figure:
    """Draw each run's accuracy of sums over its steps, one colour a variant."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    colours = dict(zip(VARIANTS, plots.COLOURS, strict=False))
    labelled = set()
    for row in runs:
        steps, _, right = zip(*row["step_cpu_seconds_sums"], strict=True)
        variant = row["variant"]
        label = None if variant in labelled else variant
        axes.plot(steps, right, "o-", markersize=3, alpha=0.7, color=colours[variant], label=label)
        labelled.add(variant)
    axes.axhline(LEARNT, color=plots.GREY, linestyle="--", linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="fraction of held-out sums that is right")
    axes.legend(frameon=False)
    return figure


def print_summary(summary: dict) -> None:
    for variant, row in summary["variants"].items():
        learnt = sorted(at for at in row["learnt"] if at)
        words = ", ".join(f"{step:,.0f} ({seconds:.0f} s)" for step, seconds in learnt)
        print(
            f"{variant:5} learnt to add in {len(learnt)} of {row['seeds']} runs, after steps "
            f"(CPU-seconds): {words or 'none'}"
        )
    for kind in ("both", *DIGITS):
        for variant, row in summary["variants"].items():
            mean, low, high = (f"{row[kind][name]:.1%}" for name in ("mean", "min", "max"))
            print(f"{variant:5} {kind:4} {mean} ({low} to {high})")
    for pair, row in summary["verdict"].items():
        words = []
        for kind, lead in row.items():
            ratio = f" (x {lead['ratio']:.2f})" if lead["ratio"] else ""
            words.append(f"{kind} {lead['points']:+.1f} points{ratio}")
        print(f"{pair}: {', '.join(words)}")


def main() -> None:
    args = parse_args(Args, __doc__)
    if args.held_out > MAX_HELD_OUT:
        raise UserError(
            f"--held-out {args.held_out}: only {MAX_HELD_OUT:,} products are held out; give at "
            "most so many"
        )
    data = write_training_text(args)
    sha256 = load_text(str(data)).sha256  # prepares the text once, before the processes start
    jobs = {}
    for seed in range(args.seeds):
        for variant in args.variants:
            jobs[variant, seed] = variant_job(args, data, variant, seed)
    all_jobs = list(jobs.values())
    results = train_all(
        "arithmetic", all_jobs, make_summarise(args), args.results, args.runs, workers=args.jobs
    )
    runs = [
        {"variant": variant, "seed": seed} | results[job.name]
        for (variant, seed), job in jobs.items()
    ]
    summary = summarise(runs)
    print_summary(summary)
    if is_subset("arithmetic", args.variants, VARIANTS):
        return
    task = {
        "digits": DIGITS,
        "units_first": args.units_first,
        "lines": args.lines,
        "sha256": sha256,
        "held_out": args.held_out,
        "steps": args.steps,
    }
    table = {
        "machine": machine_of("arithmetic", all_jobs, args.results),
        "task": task,
        **summary,
        "runs": runs,
    }
    write_json(args.results / "arithmetic.json", table)
    plots.save(draw(runs, summary["variants"]), args.results / "arithmetic.png")
    plots.save(draw_sums(runs), args.results / "arithmetic_sums.png")


if __name__ == "__main__":
    run(main)
