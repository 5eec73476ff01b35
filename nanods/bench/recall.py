"""Compare selection methods on associative recall over a distance: results/recall.json and .png.

    python -m nanods.bench.recall                about 20 minutes on one thread
    python -m nanods.bench.recall --seeds 1

`make bench-recall` runs the first line. Does it matter which blocks a query attends to?

The task. A sequence has 256 tokens. 16 (key, value) pairs are at random even positions among the
first 96 tokens (6 blocks of 16). Each key appears once more, as a question, at a random even
position from token 192 on, followed by its value, the answer. All other tokens are filler. The
model predicts the 16 answers; the loss covers only them, since fillers are noise. Each value is
drawn independently from 64, so a model that cannot look up the pair is right once in 64 times.
Through both of its layers a window reaches 6 blocks back, and no pair is that close to a question.

The curriculum. Training starts with 4 pairs in 64 tokens, which are no more than 3 past blocks and
the current one, so the model learns recall before distance matters. Then the number of pairs and
the length grow with every step, up to the whole task. (Without a curriculum, flat and bound learnt
only which values occur: LOG.md.)

The results. Every step draws new sequences. The results are the accuracy on held-out sequences, and
per layer the fraction of questions whose pair is in a block that some head attends to. All sparse
variants attend to the same number of keys, 3 past blocks and the current one. All variants have the
same steps, batches and learning rates. Finished runs are stored and not repeated (stored_runs.py),
unless --fresh.

The variant "tree" opens 4 nodes of 2 blocks each. With the default beam of 16 nodes, 16 blocks need
no tree, and the method would equal flat.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanods import plots
from nanods.attention import AttentionConfig, expand_to_queries
from nanods.bench.jobs import PROBE_STEPS, FunctionJob
from nanods.bench.runs import write_json
from nanods.bench.stored_runs import train_all
from nanods.errors import run
from nanods.flags import parse_args
from nanods.gpt import GPT, GPTConfig
from nanods.training.muon import Muon, fast_bf16

KINDS = 64  # number of different keys, of different values and of different fillers
HELD_OUT = 1 << 31  # a seed that no training run uses

SPARSE = AttentionConfig("block", block_size=16, top_blocks=3)
VARIANTS = {
    "dense": AttentionConfig("dense"),
    "bound": replace(SPARSE, pool="bound"),
    "flat": SPARSE,
    "tree": replace(SPARSE, method="tree", beam=4, fan_out=2),
    "tile": replace(SPARSE, method="tile"),
    "window": replace(SPARSE, method="window"),
}
BARS = {  # the accuracy that each variant should reach, or for the window not exceed
    "dense": (">=", 0.98),
    "bound": (">=", 0.97),
    "flat": (">=", 0.90),
    "tree": (">=", 0.90),
    "tile": (">=", 0.80),
    "window": ("<=", 0.05),
}

# Why each variant scores as it does. "(reached_in_layer)" marks what the runs measure, "presumably"
# marks what they do not.
EXPLANATIONS = {
    "dense": "Every query attends to every key, so only recall itself is left to learn.",
    "bound": "No key in a block scores above its bound, so no strong key among the 16 is missed. "
    "The last layer attends to the block of the pair more often than with the mean "
    "(reached_in_layer).",
    "flat": "One key is only a sixteenth of its block's mean, so the last layer misses the blocks "
    "of many pairs. Their right answers came through a token in between, presumably one that "
    "attended to the pair in the first layer.",
    "tree": "Like flat: it opens 4 nodes of 2 blocks, of at most 8 nodes, and misses little more.",
    "tile": "A tile uses the selection of its first query, which asks for another key or for none: "
    "presumably its blocks suit the other queries only by chance.",
    "window": "It never sees the pairs: six blocks, through both layers, end before them.",
}


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Runs per variant."""
    near_steps: int = 200
    """Optimizer steps on short sequences, at the start."""
    grow_steps: int = 300
    """Optimizer steps during which the sequences grow."""
    far_steps: int = 300
    """Optimizer steps on the whole task, at the end."""
    batch_size: int = 32
    """Sequences per step; twice as many while they are short and cheap."""
    lr: float = 0.02
    """Peak learning rate of Muon, for the matrices."""
    embedding_lr: float = 0.03
    """Peak learning rate of AdamW, for the embedding and the head. train.py's default, half of
    Muon's, is too low here."""
    held_out: int = 1024
    """Held-out sequences that the accuracy is measured on."""
    fresh: bool = False
    """Repeat finished runs. If this is interrupted, continue without it."""
    results: Path = Path("results")
    """Where to write the table and the plot."""


class Task(NamedTuple):
    """The size of the task: `pairs` pairs before position `pairs_end`, questions from
    `questions_start` to the end, in a sequence of T tokens."""

    pairs: int
    pairs_end: int
    questions_start: int
    T: int


NEAR, FAR = Task(4, 32, 32, 64), Task(16, 96, 192, 256)
# Content matters here and position does not. So slow rotations and soft scores learn faster than
# the values that suit text (LOG.md).
SIZE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 64,
    "context_length": FAR.T,
    "vocab_size": 3 * KINDS,
    "rope_base": 100_000.0,
    "query_gain": 1.0,
}


class Batch(NamedTuple):
    tokens: Tensor  # (B, T)
    pair_positions: Tensor  # (B, pairs): the key of each pair; its value is the next token
    question_positions: Tensor  # (B, pairs): the same key again; the answer is the next token


def draw_batch(seed: int, step: int, B: int, task: Task = FAR) -> Batch:
    """Return B random sequences that depend on (seed, step) alone.

    Tokens below 64 are keys, below 128 values, below 192 fillers.
    """
    random, (pairs, pairs_end, questions_start, T) = np.random.default_rng([seed, step]), task

    def random_even_positions(low: int, high: int) -> np.ndarray:
        # Even, so that no pair overlaps another one or crosses the boundary of a block.
        positions = np.tile(np.arange((high - low) // 2), (B, 1))
        return low + 2 * random.permuted(positions, axis=1)[:, :pairs]

    tokens = random.integers(2 * KINDS, 3 * KINDS, (B, T))
    keys = random.permuted(np.tile(np.arange(KINDS), (B, 1)), axis=1)[:, :pairs]
    values = random.integers(KINDS, 2 * KINDS, (B, pairs))
    pair_positions = random_even_positions(0, pairs_end)
    question_positions = random_even_positions(questions_start, T)
    for positions in (pair_positions, question_positions):
        np.put_along_axis(tokens, positions, keys, axis=1)
        np.put_along_axis(tokens, positions + 1, values, axis=1)
    return Batch(*map(torch.from_numpy, (tokens, pair_positions, question_positions)))


def task_at_step(step: int, args: Args) -> Task:
    """Return the curriculum's task at a step: first NEAR, then growing sizes, finally FAR."""
    progress = min(1.0, max(0.0, (step - args.near_steps) / max(1, args.grow_steps)))
    pairs, *positions = (
        near + progress * (far - near) for near, far in zip(NEAR, FAR, strict=True)
    )
    return Task(round(pairs), *(2 * round(position / 2) for position in positions))


def predict_answers(
    model: nn.Module, batch: Batch
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Return the logits at the questions (B, pairs, V), the answers (B, pairs) and the stats."""
    logits, stats = model(batch.tokens, inspect=True)
    at = batch.question_positions[..., None].expand(-1, -1, logits.size(-1))
    answers = batch.tokens.gather(1, batch.question_positions + 1)
    logits = logits.gather(1, at)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), answers, stats


def reaches_pair(blocks: Tensor, batch: Batch, size: int) -> Tensor:
    """Return whether each head selects, at each question, the block that contains the pair.

    blocks (B, H, R, K), of `size` keys -> bool (B, H, pairs).
    """
    by_query = expand_to_queries(blocks, batch.tokens.size(1), size)  # (B, H, T, K)
    at = batch.question_positions[:, None, :, None]
    at = at.expand(-1, by_query.size(1), -1, by_query.size(-1))
    pair_blocks = batch.pair_positions[:, None, :, None] // size
    return (by_query.gather(2, at) == pair_blocks).any(dim=-1)


@torch.no_grad()
def evaluate(model: GPT, autocast, sequences: int, task: Task) -> dict:
    """Return metrics on held-out sequences.

    `accuracy`: the fraction of questions answered correctly. `reached_in_layer`, for block
    attention: per layer, the fraction of questions whose pair some head reaches.
    """
    attention = model.config.attention
    correct, reached = [], []
    for step in range(-(-sequences // 128)):
        batch = draw_batch(HELD_OUT, step, min(128, sequences - 128 * step), task)
        with autocast:
            logits, answers, stats = predict_answers(model, batch)
        correct.append(logits.argmax(dim=-1) == answers)  # (B, pairs)
        if attention.kind == "block":
            by_layer = [
                reaches_pair(layer["blocks"], batch, attention.block_size).any(dim=1)
                for layer in stats
            ]
            reached.append(torch.stack(by_layer))  # (L, B, pairs)
    metrics = {"accuracy": torch.cat(correct).double().mean().item()}
    if reached:
        fractions = torch.cat(reached, dim=1).double().mean(dim=(1, 2))
        metrics["reached_in_layer"] = fractions.tolist()
    return metrics


def new_model(variant: str, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SIZE, attention=VARIANTS[variant]))


def training_steps(
    model: GPT, seed: int, args: Args, autocast: AbstractContextManager
) -> Iterator[tuple[float, float]]:
    """Train a model from scratch: after each step its loss and accuracy on the batch."""
    muon = Muon(model.blocks.parameters(), lr=args.lr, momentum=0.9)
    adamw = torch.optim.AdamW(
        [*model.embedding.parameters(), *model.head.parameters()],
        lr=args.embedding_lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    peak_lrs = {muon: args.lr, adamw: args.embedding_lr}
    steps = args.near_steps + args.grow_steps + args.far_steps
    for step in range(steps):
        warmup, cooldown = (step + 1) / (0.02 * steps), (steps - step) / (0.6 * steps)
        for optimizer, peak in peak_lrs.items():
            optimizer.param_groups[0]["lr"] = peak * min(1.0, warmup, cooldown)  # as train.py
        task = task_at_step(step, args)
        with autocast:
            batch = draw_batch(seed, step, args.batch_size * (2 if task == NEAR else 1), task)
            logits, answers, _ = predict_answers(model, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in peak_lrs:
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item(), (logits.argmax(dim=-1) == answers).double().mean().item()


def probe(variant: str, seed: int, args: Args) -> list[float]:
    """Return the losses of the first steps in fp64."""
    model = new_model(variant, seed).double()
    steps = training_steps(model, seed, args, contextlib.nullcontext())
    return [loss for loss, _ in islice(steps, PROBE_STEPS)]


def train(variant: str, seed: int, args: Args) -> dict:
    """Train one model from scratch and return its metrics."""
    model = new_model(variant, seed)
    bf16 = fast_bf16(torch.device("cpu"))  # as train.py's --dtype auto
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    steps = args.near_steps + args.grow_steps + args.far_steps
    curve, start, cpu_start = [], time.perf_counter(), time.process_time()
    for step, (_, accuracy) in enumerate(training_steps(model, seed, args, autocast), 1):
        if step % 50 == 0 or step == steps:
            curve.append([step, accuracy])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    near = evaluate(model, autocast, args.held_out, NEAR)
    far = evaluate(model, autocast, args.held_out, FAR)
    print(
        f"{variant}/{seed}: {far['accuracy']:.1%} right, {cpu_seconds:.0f} CPU-seconds", flush=True
    )
    return {
        "torch": torch.__version__,
        **far,
        "accuracy_near": near["accuracy"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "dtype": "bf16" if bf16 else "fp32",
        "step_batch_accuracy": curve,
    }


def accuracies(runs: dict[str, dict], variant: str) -> list[float]:
    """Return the accuracy of each run of a variant; runs are named variant/seed."""
    return [metrics["accuracy"] for name, metrics in runs.items() if name.split("/")[0] == variant]


def summarise(runs: dict[str, dict]) -> dict[str, dict]:
    """Return mean, min and max accuracy over the seeds of each variant, and whether it is met."""
    table = {}
    for variant, (sign, bar) in BARS.items():
        values = accuracies(runs, variant)
        if not values:
            continue
        mean = statistics.mean(values)
        table[variant] = {
            "mean": mean,
            "min": min(values),
            "max": max(values),
            "seeds": len(values),
            "bar": f"{sign} {bar}",
            "met": mean >= bar if sign == ">=" else mean <= bar,
        }
    return table


def run_settings(args: Args) -> dict:
    """Return every setting of the runs."""
    flags = asdict(args)
    for name in ("seeds", "fresh", "results"):
        del flags[name]
    return {
        **flags,
        "size": SIZE,
        "near": NEAR._asdict(),
        "far": FAR._asdict(),
        "variants": {name: asdict(attention) for name, attention in VARIANTS.items()},
    }


def run_job(variant: str, seed: int, args: Args) -> FunctionJob:
    """Return the run of a variant with a seed."""
    flags = run_settings(args)
    flags["variant"] = flags.pop("variants")[variant]
    arguments = variant, seed, args
    return FunctionJob(
        f"{variant}/{seed}", flags, partial(train, *arguments), partial(probe, *arguments)
    )


def main() -> None:
    args = parse_args(Args, __doc__)
    if args.fresh:
        (args.results / "runs/recall.json").unlink(missing_ok=True)
    jobs = [run_job(variant, seed, args) for seed in range(args.seeds) for variant in VARIANTS]
    runs = train_all("recall", jobs, results=args.results, workers=1)
    for result in runs.values():
        del result["command"]
    table = {
        "settings": run_settings(args),
        "summary": summarise(runs),
        "why": EXPLANATIONS,
        "runs": runs,
    }
    write_json(args.results / "recall.json", table)
    rows = {variant: accuracies(runs, variant) for variant in VARIANTS}
    bars = {variant: bar for variant, (_, bar) in BARS.items()}
    figure = plots.dot_plot(rows, bars, "accuracy on held-out sequences")
    plots.save(figure, args.results / "recall.png")
    for variant, row in summarise(runs).items():
        spread = f"{row['mean']:.1%} ({row['min']:.1%} to {row['max']:.1%})"
        print(f"{variant:7} {spread}, bar {row['bar']}: {'met' if row['met'] else 'not met'}")


if __name__ == "__main__":
    run(main)
