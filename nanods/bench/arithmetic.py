"""Are experts better at sums? V2 against V1 on addition and multiplication: results/arithmetic.json and .png.

    python -m nanods.bench.arithmetic            about 12 minutes on 2 cores; `make bench-arithmetic`
    python -m nanods.bench.arithmetic --seeds 1 --variants v1-2f v2

The text is lines like `347+582=929` and `47*83=3901`, half of each. Of the pairs of operands one in 8 is held out, (a, b) and
(b, a) together: the answers are counted on those alone, each written greedily after `\\n47*83=` and right if every digit is,
and the line's end. Answers are written as people write them. The units digit first (--units-first) needs no look ahead
for a carry (Lee et al. 2023, arXiv:2307.03381), and yet it was slower to learn at first, for V2 by far (LOG.md).

train.py trains each model, as its preset says but for the size of a batch, at equal tokens: v1 (with MLPs of width 4 C), v1-2f
(of 8 C: the active FLOPs of v2, which uses 2 experts of 4 C) and v2. Attention is dense in all three: the question is about
experts, and a context of 64 is no place to be sparse. Two runs at a time, one thread each; a finished run is taken as it is,
so delete the runs' folder after a change of the presets.
"""

import hashlib
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro

from nanods import plots
from nanods.bench.runs import describe_machine, flags_from_dict, run_training, write_json
from nanods.data.download import write_atomic
from nanods.data.text import load_text
from nanods.gpt import GPT
from nanods.training import checkpoint

DIGITS = {"+": 3, "*": 2}  # of each operand
LONGEST = max(DIGITS["+"] + 1, 2 * DIGITS["*"]) + 1  # an answer's digits and the line's end
CLAIM = 1.22  # what V2 is said to have of V1's accuracy in mathematics; the tick in the picture

SIZE = {"context-length": 64, "batch-size": 32, "attention.kind": "dense", "device": "cpu"}
VARIANTS = {"v1": ("v1-tiny", {}), "v1-2f": ("v1-tiny", {"hidden-ratio": 8}), "v2": ("v2-tiny", {})}


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Runs of each variant: other first weights and batches, the same text."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of v1, v1-2f and v2 to run."""
    steps: int = 500
    """Optimizer steps of 2,048 tokens."""
    lines: int = 120_000
    """Problems in the text."""
    held_out: int = 500
    """Problems of each kind that the answers are counted on."""
    units_first: bool = False
    """Write the answers with their units digit first."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    results: Path = Path("results")
    """Where the table and the picture go."""
    runs: Path = Path("runs/arithmetic")
    """Where the text and the runs go."""


class Problem(NamedTuple):
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
    """One pair in 8, whichever operand comes first; by a hash, so that no list is needed."""
    low, high = sorted((problem.a, problem.b))
    return hashlib.sha256(f"{low}{problem.kind}{high}".encode()).digest()[0] < 32


def draw(random: np.random.Generator, kind: str) -> Problem:
    least = 10 ** (DIGITS[kind] - 1)
    a, b = random.integers(least, 10 * least, 2)
    return Problem(int(a), kind, int(b))


def practice(count: int, seed: int = 0) -> list[Problem]:
    """Problems to learn from, of both kinds in turn at random; none is held out."""
    random, problems = np.random.default_rng([seed, 0]), []
    while len(problems) < count:
        problem = draw(random, "+*"[random.integers(2)])
        if not is_held_out(problem):
            problems.append(problem)
    return problems


def exam(kind: str, count: int, seed: int = 0) -> list[Problem]:
    """Different problems of one kind, all held out."""
    random, problems = np.random.default_rng([seed, 1]), {}
    while len(problems) < count:
        problem = draw(random, kind)
        if is_held_out(problem):
            problems[problem] = None
    return list(problems)


def text_of(problems: Sequence[Problem], units_first: bool) -> str:
    return "".join(problem.question + problem.answer(units_first) for problem in problems)


def answers(model: GPT, questions: Sequence[str]) -> list[str]:
    """What the model writes after each question, up to the end of the line; the questions have one length."""
    prompts = torch.tensor([list(f"\n{question}".encode()) for question in questions])
    columns = list(model.generate(prompts, LONGEST, temperature=0, stop=[ord("\n")]))
    return [
        bytes(t for t in row if t >= 0).decode(errors="replace")
        for row in torch.stack(columns, dim=1).tolist()
    ]


def score(model: GPT, problems: Sequence[Problem], units_first: bool) -> float:
    """The share of problems whose whole answer is right."""
    written = answers(model, [problem.question for problem in problems])
    return statistics.mean(
        text == p.answer(units_first) for text, p in zip(written, problems, strict=True)
    )


def train(args: Args, data: Path, variant: str, seed: int) -> dict:
    """One run in a process of its own -> its command, its time, and its scores."""
    preset, flags = VARIANTS[variant]
    out = data.with_name(f"{data.stem}-{variant}-{args.steps}-{seed}")
    flags = (
        SIZE
        | flags
        | {"data": data, "steps": args.steps, "eval-every": args.steps, "save-every": args.steps}
    )
    command, rows = run_training(
        out, [preset, *flags_from_dict(flags | {"seed": seed, "out-dir": out})]
    )
    model = checkpoint.load_model(checkpoint.load(out))
    scores = {kind: score(model, exam(kind, args.held_out), args.units_first) for kind in DIGITS}
    scores["both"] = statistics.mean(scores.values())
    last = rows[-1]
    words = ", ".join(f"{kind} {value:.1%}" for kind, value in scores.items())
    print(f"{variant} seed {seed}: {words}; {last['cpu_seconds']:.0f} CPU-seconds", flush=True)
    total, active = model.count_parameters()
    size = {"parameters": total, "active": active, "flops_per_token": model.flops_per_token()}
    spent = {
        "seconds": last["seconds"],
        "cpu_seconds": last["cpu_seconds"],
        "val_loss": last["val_loss"],
    }
    return {"variant": variant, "seed": seed, "command": command, "score": scores, **spent, **size}


def summarise(runs: Sequence[dict]) -> dict:
    """Over the seeds of each variant: mean, least and most of each score, and seconds; then V2 beside both V1s."""
    table = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        of = [run for run in runs if run["variant"] == variant]
        table[variant] = {
            "seeds": len(of),
            "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in of),
        }
        for kind in ("both", *DIGITS):
            values = [run["score"][kind] for run in of]
            table[variant][kind] = {
                "mean": statistics.mean(values),
                "least": min(values),
                "most": max(values),
            }
    verdict = {}
    for kind in ("both", *DIGITS):
        mean = {variant: row[kind]["mean"] for variant, row in table.items()}
        for other in mean.keys() & {"v1", "v1-2f"} if "v2" in mean else ():
            verdict.setdefault(f"v2 against {other}", {})[kind] = {
                "points": 100 * (mean["v2"] - mean[other]),
                "ratio": mean["v2"] / mean[other] if mean[other] else None,
            }
    return {"variants": table, "verdict": dict(sorted(verdict.items()))}


def write_text(args: Args) -> Path:
    """The training text, in a file named by its hash, so that runs of another text are not taken for its own."""
    text = text_of(practice(args.lines), args.units_first).encode()
    path = args.runs / f"{hashlib.sha256(text).hexdigest()[:8]}.txt"
    write_atomic(path, lambda file: file.write(text))
    return path


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    data = write_text(args)
    sha256 = load_text(str(data)).sha256  # prepared once, before the processes start
    jobs = [(variant, seed) for seed in range(args.seeds) for variant in args.variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: train(args, data, *job), jobs))
    task = {
        "digits": DIGITS,
        "units_first": args.units_first,
        "lines": args.lines,
        "sha256": sha256,
    }
    summary = summarise(runs)
    table = {
        "machine": describe_machine(),
        "task": task | {"held_out": args.held_out, "steps": args.steps},
        **summary,
        "runs": runs,
    }
    write_json(args.results / "arithmetic.json", table)
    rows, bars = {}, {}
    for kind in ("both", *DIGITS):
        for variant, row in summary["variants"].items():
            rows[f"{variant}, {kind}"] = [
                run["score"][kind] for run in runs if run["variant"] == variant
            ]
            print(
                f"{variant:5} {kind:4} {row[kind]['mean']:.1%} ({row[kind]['least']:.1%} to {row[kind]['most']:.1%})"
            )
        if {"v1", "v2"} <= summary["variants"].keys():
            bars[f"v2, {kind}"] = min(1.0, CLAIM * summary["variants"]["v1"][kind]["mean"])
    plots.save(
        plots.dot_plot(rows, bars, "share of held-out problems whose answer is right"),
        args.results / "arithmetic.png",
    )
    for pair, by_kind in summary["verdict"].items():
        words = (
            f"{kind} {row['points']:+.1f} points"
            + (f" (x {row['ratio']:.2f})" if row["ratio"] else "")
            for kind, row in by_kind.items()
        )
        print(f"{pair}: {', '.join(words)}")


if __name__ == "__main__":
    main()
