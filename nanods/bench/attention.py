"""Compare sparse attention with PyTorch's dense attention: results/attention.json and .png.

    python -m nanods.bench.attention                   about 12 minutes; `make bench-v1`
    python -m nanods.bench.attention --only time       one part

The parts: time, routes, memory, decode, tree, recall, needle and peer. One thread, fp32, B = 1, 4
heads of width 64, blocks of 64 keys, 8 selected and the current one. The compared functions
alternate in one process, and each figure is the median of its calls. Selection is part of every
time. Memory is the increase of a new process's peak above its inputs.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanods import plots
from nanods.attention import (
    AttentionConfig,
    block_attention,
    block_mask,
    gathered_block_attention,
    masked_attention,
    query_attention,
    tile_attention,
    visible_mask,
)
from nanods.attention_selection import BEAM, FAN_OUT, select_blocks, summarise
from nanods.bench.runs import (
    add_exponents,
    describe_machine,
    measure_parts,
    median_seconds,
    peak_memory_increase,
)
from nanods.errors import run
from nanods.flags import parse_args
from nanods.gpt import GPT, Attention, GPTConfig, rope_cos_sin

HEADS, D, BLOCK_SIZE, TOP_BLOCKS = 4, 64, 64, 8


@dataclass(frozen=True)
class Args:
    only: Literal[
        "all", "time", "routes", "memory", "decode", "tree", "recall", "needle", "peer"
    ] = "all"
    """One part; the results of the other parts stay as they are."""
    results: Path = Path("results")
    """Where to write the table and the plot."""


def random_inputs(T: int, heads: int = HEADS) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v (1, heads, T, D) that require gradients, and the gradient of the output."""
    qkv = [torch.randn(1, heads, T, D, requires_grad=True) for _ in range(3)]
    return qkv, torch.randn(1, heads, T, D)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute dense attention by PyTorch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute dense attention with all scores in memory, as in the article's snippet."""
    return masked_attention(q, k, v, visible_mask(q, k, True, None))


def sparse(method: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return block attention with a selection method, selection included."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = select_blocks(q, k, BLOCK_SIZE, TOP_BLOCKS, method)
        return block_attention(q, k, v, blocks, BLOCK_SIZE)

    return attend


BASELINES = {"dense": dense, "tile": sparse("tile"), "flat": sparse("flat"), "unfused": unfused}


def forward_backward(attend: Callable, qkv: list[Tensor], gradient: Tensor) -> None:
    """Run one forward and one backward pass."""
    torch.autograd.grad(attend(*qkv), qkv, gradient)


# ---- the parts -----------------------------------------------------------------------------------


def part_time() -> dict:
    """Measure seconds forward and backward against T."""
    table = {"dense": {}, "tile": {}, "flat": {}}
    turns_by_length = {
        512: 21,
        1024: 21,
        1536: 15,
        2048: 15,
        4096: 9,
        8192: 7,
        16384: 3,
        65536: 3,
    }
    for T, turns in turns_by_length.items():
        qkv, gradient = random_inputs(T)
        names = [name for name in table if T <= 16384 or name != "dense"]
        calls = {name: partial(forward_backward, BASELINES[name], qkv, gradient) for name in names}
        for name, seconds in median_seconds(calls, turns).items():
            table[name][str(T)] = seconds
        print(T, {name: f"{1e3 * table[name][str(T)]:.1f} ms" for name in names}, flush=True)
    times_faster, longer = {}, {}
    for name in ("tile", "flat"):
        times_faster[name] = {T: table["dense"][T] / table[name][T] for T in table["dense"]}
        longer[name] = table[name]["65536"] / table["dense"]["16384"]
    return add_exponents(table, beyond=4096) | {
        "times_faster": times_faster,
        "sparse_65536_over_dense_16384": longer,
    }


def part_routes() -> dict:
    """Measure milliseconds forward and backward of short sequences for each implementation.

    PyTorch's fused kernel without and with a mask, and our two kernels.
    """
    table = {}
    for B, T, width, block_size, top_blocks in (
        (8, 256, 32, 16, 2),
        (2, 512, 32, 16, 4),
        (2, 512, 32, 32, 4),
        (1, 1024, 64, 64, 4),
    ):
        qkv = [torch.randn(B, HEADS, T, width, requires_grad=True) for _ in range(3)]
        by_query = select_blocks(*qkv[:2], block_size, top_blocks, "flat")
        by_tile = select_blocks(*qkv[:2], block_size, top_blocks, "tile")
        mask = block_mask(*qkv[:2], by_query, block_size, causal=True)
        routes = {
            "dense": dense,
            "masked": partial(F.scaled_dot_product_attention, attn_mask=mask),
            "by query": partial(query_attention, blocks=by_query, block_size=block_size),
            "by tile": partial(tile_attention, blocks=by_tile, block_size=block_size),
        }
        gradient = torch.randn(B, HEADS, T, width)
        calls = {
            name: partial(forward_backward, attend, qkv, gradient)
            for name, attend in routes.items()
        }
        seconds = median_seconds(calls, 11)
        shape = f"B {B}, T {T}, D {width}, block_size {block_size}, top_blocks {top_blocks}"
        table[shape] = {name: 1e3 * value for name, value in seconds.items()}
        print(shape, {name: f"{value:.1f} ms" for name, value in table[shape].items()}, flush=True)
    return table


def part_memory() -> dict:
    """Measure bytes per token, forward and backward, above the inputs.

    The unfused attention runs with one head, because its scores take T x T numbers per head.
    """
    table = {}
    for name, heads in (
        ("dense", HEADS),
        ("tile", HEADS),
        ("flat", HEADS),
        ("unfused", 1),
        ("tile", 1),
    ):
        label = name if heads == HEADS else f"{name}, one head"
        table[label] = {}
        for T in (4096, 8192, 16384):
            module = [sys.executable, "-m", "nanods.bench.attention"]
            command = [*module, "--measure-memory", name, str(T), str(heads)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            table[label][str(T)] = int(result.stdout) / T
        words = {T: f"{value:.0f} bytes per token" for T, value in table[label].items()}
        print(label, words, flush=True)
    over_dense = {}
    for name in ("tile", "flat"):
        over_dense[name] = {T: table[name][T] / table["dense"][T] for T in table["dense"]}
    unfused_bytes, tile_bytes = table["unfused, one head"], table["tile, one head"]
    return {
        "bytes_per_token": table,
        "over_dense": over_dense,
        "unfused_over_tile_16384_one_head": unfused_bytes["16384"] / tile_bytes["16384"],
    }


def measure_memory(name: str, T: int, heads: int) -> None:
    """Print by how many bytes one forward and backward pass increases the peak memory.

    Runs in a process of its own: the peak of a process never falls.
    """
    forward_backward(BASELINES[name], *random_inputs(256, heads))  # one-time allocations
    qkv, gradient = random_inputs(T, heads)
    print(peak_memory_increase(lambda: forward_backward(BASELINES[name], qkv, gradient)))


@torch.no_grad()
def part_decode(S: int = 65536, run: int = 10) -> dict:
    """Measure milliseconds per decoding step at S tokens of context: attention, and a whole model.

    The model has 4 layers. Each call takes `run` steps in a row, as generation does, each with its
    own query.
    """
    queries, (k, v) = torch.randn(run, 1, HEADS, 1, D), torch.randn(2, 1, HEADS, S, D)
    at, summaries = torch.tensor([[S - 1]]), summarise(k, BLOCK_SIZE, "mean")

    def dense_steps() -> None:
        for q in queries:
            F.scaled_dot_product_attention(q, k, v)

    def sparse_steps() -> None:
        for q in queries:
            blocks = select_blocks(q, k, BLOCK_SIZE, TOP_BLOCKS, positions=at, summaries=summaries)
            gathered_block_attention(q, k, v, blocks, BLOCK_SIZE, positions=at)

    def model_steps(model: GPT, cache, lengths: Tensor) -> None:
        for token in range(run):
            cache.lengths, cache.max_length = lengths, S - 1  # overwrite the last position
            model(torch.tensor([[token]]), cache)

    attention = median_seconds({"dense": dense_steps, "sparse": sparse_steps}, 15)
    steps = {}
    for name, config in (
        ("V0", AttentionConfig()),
        ("V1", AttentionConfig("block", block_size=BLOCK_SIZE, top_blocks=TOP_BLOCKS)),
    ):
        size = {"n_layer": 4, "n_head": HEADS, "n_embd": HEADS * D, "context_length": S}
        model = GPT(GPTConfig(**size, attention=config))
        cache = model.new_cache(1)
        for stored in (*cache.keys, *cache.values):
            stored.normal_()
        steps[name] = partial(model_steps, model, cache, torch.tensor([S - 1]))
    whole_model = median_seconds(steps, 7)
    return {
        "context": S,
        "attention_ms": {name: 1e3 * value / run for name, value in attention.items()},
        "attention_times_faster": attention["dense"] / attention["sparse"],
        "model_ms": {name: 1e3 * value / run for name, value in whole_model.items()},
        "model_times_faster": whole_model["V0"] / whole_model["V1"],
    }


def part_tree() -> dict:
    """Measure the seconds of flat and of tree selection, for every query of one head."""
    table = {"flat": {}, "tree": {}}
    for T, turns in ((16384, 5), (32768, 5), (65536, 3), (131072, 3), (262144, 1)):
        q, k = torch.randn(2, 1, 1, T, D)
        calls = {
            method: partial(select_blocks, q, k, BLOCK_SIZE, TOP_BLOCKS, method) for method in table
        }
        for name, seconds in median_seconds(calls, turns).items():
            table[name][str(T)] = seconds
        print(T, {name: f"{row[str(T)]:.3f} s" for name, row in table.items()}, flush=True)
    ratio = {T: table["flat"][T] / table["tree"][T] for T in table["flat"]}
    return add_exponents(table) | {"compiled": False, "tree_times_faster": ratio}


def keys_in_topics(T: int, segment: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return queries and keys (T, D) of a text that changes its topic every `segment` tokens.

    The query at each position looks for a random topic that has already occurred.
    """
    topics = torch.randn(-(-T // segment), D)
    k = topics.repeat_interleave(segment, dim=0)[:T] + noise * torch.randn(T, D)
    wanted = (torch.rand(T) * (torch.arange(T) // segment)).long()
    return topics[wanted] + noise * torch.randn(T, D), k


@torch.no_grad()
def part_recall() -> dict:
    """Measure the fraction of flat's blocks that the tree finds.

    For 2,048 queries of the second half of the sequence.
    """
    table = {"iid keys": {}, "topics of 256 tokens": {}}
    for T in (8192, 16384, 32768, 65536, 131072):
        for name, row in table.items():
            q, k = torch.randn(2, T, D) if name == "iid keys" else keys_in_topics(T, 256)
            at = torch.randint(T // 2, T, (2048,)).sort().values
            q, k = q[at][None, None], k[None, None]
            flat, tree = (
                select_blocks(q, k, BLOCK_SIZE, TOP_BLOCKS, method, positions=at[None])
                for method in ("flat", "tree")
            )
            in_tree = (flat[..., None] == tree[..., None, :]).any(dim=-1)
            row[str(T)] = float(in_tree.double().mean())
        print(T, {name: f"{row[str(T)]:.3f}" for name, row in table.items()}, flush=True)
    return {"beam": BEAM, "fan_out": FAN_OUT, "found": table}


@torch.no_grad()
def part_needle(T: int = 8192, trials: int = 512) -> dict:
    """Measure how often the block of one strong key, the needle, is selected.

    The needle has the query's direction and `strength` times the norm of the other keys.
    """
    table = {}
    for strength in (1.0, 1.5, 2.0, 3.0):
        hits = {"mean": 0, "bound": 0}
        for _ in range(trials // 16):
            q, k = torch.randn(16, 1, 1, D), torch.randn(16, 1, T, D)
            position = torch.randint(0, T - BLOCK_SIZE, (16,))
            needle = strength * k.norm(dim=-1).mean() * F.normalize(q[:, 0, 0], dim=-1)  # (16, D)
            k[torch.arange(16), 0, position] = needle
            at = torch.tensor([[T - 1]])
            for pool in hits:
                blocks = select_blocks(q, k, BLOCK_SIZE, TOP_BLOCKS, pool=pool, positions=at)
                hits[pool] += int((blocks[:, 0, 0] == position[:, None] // BLOCK_SIZE).sum())
        label = f"{strength:g}x"
        table[label] = {pool: count / trials for pool, count in hits.items()}
        print(label, table[label], flush=True)
    return {"tokens": T, "trials": trials, "found": table}


def part_peer() -> dict:
    """Measure seconds forward and backward of a whole attention layer: ours and another package's.

    The package has the same purpose; `make setup EXTRAS=peers` installs it.
    """
    try:
        from native_sparse_attention_pytorch import SparseAttention
    except ImportError:
        print("not installed, left out: make setup EXTRAS=peers")
        return {"installed": False}
    peer = SparseAttention(
        dim=HEADS * D,
        dim_head=D,
        heads=HEADS,
        sliding_window_size=BLOCK_SIZE,
        compress_block_size=BLOCK_SIZE,
        compress_block_sliding_stride=BLOCK_SIZE,
        selection_block_size=BLOCK_SIZE,
        num_selected_blocks=TOP_BLOCKS,
        causal=True,
    )
    attention = AttentionConfig("block", 32, BLOCK_SIZE, TOP_BLOCKS, "tile")
    config = GPTConfig(n_head=HEADS, n_embd=HEADS * D, attention=attention)
    ours = Attention(config)

    def peer_step(x: Tensor) -> None:
        peer(x).sum().backward()

    def our_step(x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        ours(x, positions, rope)[0].sum().backward()

    table = {"native-sparse-attention-pytorch": {}, "ours, tile": {}}
    for T in (512, 1024):
        x, positions = torch.randn(1, T, HEADS * D, requires_grad=True), torch.arange(T)[None]
        rope = rope_cos_sin(positions, D, x.dtype, config.rope_base)
        calls = {
            "native-sparse-attention-pytorch": partial(peer_step, x),
            "ours, tile": partial(our_step, x, positions, rope),
        }
        for name, seconds in median_seconds(calls, 3).items():
            table[name][str(T)] = seconds
    print(table)
    return {
        "installed": True,
        "parameters": sum(p.numel() for p in peer.parameters()),
        "by_tokens": table,
    }


PARTS = {
    "time": part_time,
    "routes": part_routes,
    "memory": part_memory,
    "decode": part_decode,
    "tree": part_tree,
    "recall": part_recall,
    "needle": part_needle,
    "peer": part_peer,
}


# ---- all parts -----------------------------------------------------------------------------------


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--measure-memory"]:
        return measure_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    args = parse_args(Args, __doc__)
    path = args.results / "attention.json"
    shapes = {
        "B": 1,
        "heads": HEADS,
        "D": D,
        "block_size": BLOCK_SIZE,
        "top_blocks": TOP_BLOCKS,
    }
    machine = {**describe_machine("fp32"), "shapes": shapes}
    table = measure_parts(path, PARTS, args.only, lambda: machine)
    if {"time", "memory"} <= table.keys():
        plots.save(plots.cost_against_tokens(table), args.results / "attention.png")


if __name__ == "__main__":
    run(main)
