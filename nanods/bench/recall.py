"""Does it matter which blocks a query reads? Associative recall at a distance: results/recall.json and .png.

    python -m nanods.bench.recall                about 20 minutes on one thread; `make bench-recall`
    python -m nanods.bench.recall --seeds 1

A sequence of 256 tokens: 16 pairs of a key and a value stand at random even places among its first 96 tokens (6 blocks of 16),
each key is asked for once, at a random even place after token 192, and its value follows. All else is filler. The model is to
predict those 16 values; the loss is taken there alone, since fillers are noise. Each value is drawn freely from 64, so whoever
cannot look the pair up is right once in 64 times. Through both of its layers a window reaches back 6 blocks, and from the
first question 6 blocks back no pair stands.

The lessons grow: at first 4 pairs in 64 tokens, of which 3 past blocks and the own are all there is, so that recalling can be
learnt before it is a question of distance; then step by step more pairs in longer sequences; at last the whole task. (Started
on the whole task, flat and bound did not come past knowing which values occur: LOG.md.)

Every step draws fresh sequences; what is reported is the share of right answers on held-out ones, and where it comes from:
the share of questions whose pair stands in a block that some head reads. All sparse variants read the same number of keys, 3
past blocks and their own, and all variants have the same steps, batches and learning rates. A finished run is kept in the
JSON and not run again, unless --fresh.

tree: with its default beam of 16 nodes, 16 blocks need no pyramid and it would be flat under another name. Here it opens 4
nodes of 2 blocks each.
"""

import contextlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from nanods import plots
from nanods.attention import AttentionConfig, expand_to_queries
from nanods.bench.runs import write_json
from nanods.errors import UserError, run
from nanods.gpt import GPT, GPTConfig
from nanods.training.muon import Muon, fast_bf16

KINDS = 64  # different keys; as many values, and fillers
HELD_OUT = 1 << 31  # a seed that no run trains with

SPARSE = AttentionConfig("block", block_size=16, top_blocks=3)
VARIANTS = {
    "dense": AttentionConfig("dense"),
    "bound": replace(SPARSE, pool="bound"),
    "flat": SPARSE,
    "tree": replace(SPARSE, method="tree", beam=4, fan_out=2),
    "tile": replace(SPARSE, method="tile"),
    "window": replace(SPARSE, method="window"),
}
BARS = {
    "dense": (">=", 0.98),
    "bound": (">=", 0.97),
    "flat": (">=", 0.90),
    "tree": (">=", 0.90),
} | {
    "tile": (">=", 0.80),
    "window": ("<=", 0.05),
}

WHY = {  # measured where a figure stands in the runs (reached_in_layer), otherwise said with "presumably"
    "dense": "Every query reads every key: what is left to learn is recall itself.",
    "bound": "No key of a block can score above its bound, so a strong key is seen among the 16: the last layer reads the "
    "pair's own block more often than by the mean (reached_in_layer).",
    "flat": "In a mean the one key counts a sixteenth: the last layer misses the blocks of many pairs. Answers right all the "
    "same came by a token between, presumably one that had read the pair in the first layer.",
    "tree": "As flat: it opens 4 nodes of 2 blocks of at most 8, and misses little more.",
    "tile": "A tile chooses by its first query, which asks for another key or for none: presumably what it reads suits the "
    "others by luck.",
    "window": "It never sees the pairs: six blocks, through both layers, end before them.",
}


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Runs of each variant."""
    near_steps: int = 200
    """Optimizer steps on short sequences, at first."""
    grow_steps: int = 300
    """Steps in which the sequences grow."""
    far_steps: int = 300
    """Steps on the whole task, at last."""
    batch_size: int = 32
    """Sequences in a step; the short ones, which are cheap, are twice as many."""
    lr: float = 0.02
    """Peak learning rate of Muon, for the matrices."""
    embedding_lr: float = 0.03
    """Peak learning rate of AdamW, for the embedding and the head. train.py's half of Muon's leaves them behind here."""
    held_out: int = 1024
    """Sequences that the answers are counted on."""
    fresh: bool = False
    """Run everything again."""
    results: Path = Path("results")
    """Where the table and the picture go."""


class Task(NamedTuple):
    """How far and how hard: so many pairs, before token `told`; questions and answers from token `asked` to the end, T."""

    pairs: int
    told: int
    asked: int
    T: int


NEAR, FAR = Task(4, 32, 32, 64), Task(16, 96, 192, 256)
# Where content matters and place does not, slow rope_cos_sin and soft scores learn sooner than those that suit text (LOG.md).
SIZE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": FAR.T, "vocab_size": 3 * KINDS}
SIZE |= {"rope_base": 100_000.0, "query_gain": 1.0}


class Batch(NamedTuple):
    tokens: Tensor  # (B, T)
    told: Tensor  # (B, pairs) where each pair's key stands at first; its value is the next token
    asked: Tensor  # (B, pairs) where the same key is asked for; the answer is the next token


def draw(seed: int, step: int, B: int, task: Task = FAR) -> Batch:
    """B sequences by (seed, step) alone. Tokens below 64 are keys, below 128 values, below 192 fillers."""
    random, (pairs, end, first, T) = np.random.default_rng([seed, step]), task
    tokens = random.integers(2 * KINDS, 3 * KINDS, (B, T))
    keys = random.permuted(np.tile(np.arange(KINDS), (B, 1)), axis=1)[:, :pairs]
    values = random.integers(KINDS, 2 * KINDS, (B, pairs))
    (
        told,
        asked,
    ) = (  # even places, so that no pair overlaps another or is cut by the edge of a block
        low + 2 * random.permuted(np.tile(np.arange((high - low) // 2), (B, 1)), axis=1)[:, :pairs]
        for low, high in ((0, end), (first, T))
    )
    for at in (told, asked):
        np.put_along_axis(tokens, at, keys, axis=1)
        np.put_along_axis(tokens, at + 1, values, axis=1)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(told), torch.from_numpy(asked))


def lesson(step: int, args: Args) -> Task:
    """What is practised at a step: NEAR, then what lies between, then FAR."""
    grown = min(1.0, max(0.0, (step - args.near_steps) / max(1, args.grow_steps)))
    pairs, *places = (near + grown * (far - near) for near, far in zip(NEAR, FAR, strict=True))
    return Task(round(pairs), *(2 * round(place / 2) for place in places))


def answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """The logits at the questions (B, pairs, V), what should follow them (B, pairs), and the layers' stats."""
    logits, stats = model(batch.tokens, inspect=True)
    at = batch.asked[..., None].expand(-1, -1, logits.size(-1))
    return logits.gather(1, at).float(), batch.tokens.gather(1, batch.asked + 1), stats


def reached(blocks: Tensor, batch: Batch, size: int) -> Tensor:
    """Whether a head reads the block that holds the pair it is asked for: blocks (B, H, R, K) -> (B, H, pairs)."""
    each = expand_to_queries(blocks, batch.tokens.size(1), size)  # (B, H, T, K)
    at = batch.asked[:, None, :, None].expand(-1, each.size(1), -1, each.size(-1))
    return (each.gather(2, at) == batch.told[:, None, :, None] // size).any(dim=-1)


@torch.no_grad()
def evaluate(model: GPT, autocast, sequences: int, task: Task) -> dict:
    """Shares of the held-out questions: answered rightly; in each layer, reached by some head."""
    right, found = [], []
    for step in range(-(-sequences // 128)):
        batch = draw(HELD_OUT, step, min(128, sequences - 128 * step), task)
        with autocast:
            logits, targets, stats = answers(model, batch)
        right.append(logits.argmax(dim=-1) == targets)  # (B, pairs)
        if (attention := model.config.attention).kind == "block":
            found.append(
                torch.stack(
                    [
                        reached(layer["blocks"], batch, attention.block_size).any(dim=1)
                        for layer in stats
                    ]
                )
            )
    share = {"accuracy": torch.cat(right).double().mean().item()}
    return share | (
        {"reached_in_layer": torch.cat(found, dim=1).double().mean(dim=(1, 2)).tolist()}
        if found
        else {}
    )


def train(variant: str, seed: int, args: Args) -> dict:
    """One run, from its first weights to its figures."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZE, attention=VARIANTS[variant]))
    others = [*model.embedding.parameters(), *model.head.parameters()]
    adamw = torch.optim.AdamW(
        others, lr=args.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    optimizers = {
        Muon(model.blocks.parameters(), lr=args.lr, momentum=0.9): args.lr,
        adamw: args.embedding_lr,
    }
    bf16 = fast_bf16(torch.device("cpu"))  # as train.py's --dtype auto
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    steps = args.near_steps + args.grow_steps + args.far_steps
    curve, start, cpu = [], time.perf_counter(), time.process_time()
    for step in range(steps):
        factor = min(
            1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.6 * steps)
        )  # as train.py
        for optimizer, peak in optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * factor
        task = lesson(step, args)
        with autocast:
            batch = draw(seed, step, args.batch_size * (2 if task == NEAR else 1), task)
            logits, targets, _ = answers(model, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            curve.append([step + 1, (logits.argmax(dim=-1) == targets).double().mean().item()])
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    near, far = (evaluate(model, autocast, args.held_out, task) for task in (NEAR, FAR))
    precision = {"dtype": "bf16" if bf16 else "fp32"}
    return (
        far
        | {"accuracy_near": near["accuracy"]}
        | spent
        | precision
        | {"steps_and_accuracy_on_their_batch": curve}
    )


def summarise(runs: dict[str, dict]) -> dict[str, dict]:
    """Over the seeds of each variant that has runs: mean, least and most of the accuracy, and whether its bar is met."""
    table = {}
    for variant, (sign, bar) in BARS.items():
        values = [
            figures["accuracy"] for name, figures in runs.items() if name.split("/")[0] == variant
        ]
        if values:
            mean = statistics.mean(values)
            met = mean >= bar if sign == ">=" else mean <= bar
            spread = {"mean": mean, "least": min(values), "most": max(values)}
            table[variant] = spread | {"seeds": len(values), "bar": f"{sign} {bar}", "met": met}
    return table


def write(path: Path, settings: dict, runs: dict[str, dict]) -> None:
    write_json(path, {"settings": settings, "summary": summarise(runs), "why": WHY, "runs": runs})


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    path = args.results / "recall.json"
    settings = {
        name: value
        for name, value in asdict(args).items()
        if name not in ("seeds", "fresh", "results")
    }
    settings |= {"size": SIZE, "near": NEAR._asdict(), "far": FAR._asdict()}
    settings["variants"] = {name: asdict(attention) for name, attention in VARIANTS.items()}
    known = (
        json.loads(path.read_text())
        if path.exists() and not args.fresh
        else {"settings": settings, "runs": {}}
    )
    if known["settings"] != settings:
        raise UserError(
            f"{path} holds runs with other settings: run them again with --fresh, or choose another --results"
        )
    runs = known["runs"]
    for seed in range(args.seeds):
        for variant in VARIANTS:
            if (name := f"{variant}/{seed}") in runs:
                continue
            runs[name] = {"torch": torch.__version__} | train(variant, seed, args)
            print(
                f"{name}: {runs[name]['accuracy']:.1%} right, {runs[name]['cpu_seconds']:.0f} CPU-seconds",
                flush=True,
            )
            write(path, settings, runs)
    write(path, settings, runs)
    rows = {
        v: [figures["accuracy"] for name, figures in runs.items() if name.split("/")[0] == v]
        for v in VARIANTS
    }
    bars = {variant: bar for variant, (_, bar) in BARS.items()}
    plots.save(
        plots.dot_plot(rows, bars, "share of right answers on held-out sequences"),
        args.results / "recall.png",
    )
    for variant, row in summarise(runs).items():
        print(
            f"{variant:7} {row['mean']:.1%} ({row['least']:.1%} to {row['most']:.1%}), bar {row['bar']}: {row['met']}"
        )


if __name__ == "__main__":
    run(main)
