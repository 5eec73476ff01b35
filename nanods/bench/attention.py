"""Sparse attention against PyTorch's dense one: time, memory, decoding, and what the selection finds: results/attention.json.

    python -m nanods.bench.attention                   about 12 minutes; `make bench-v1`
    python -m nanods.bench.attention --only time       one part: time, routes, memory, decode, tree, recall, needle or peer

One thread, fp32, B = 1, 4 heads of 64, blocks of 64, 8 chosen and the own. Rivals take turns in one process, and each figure is
the median of its turns; choosing is part of every time. Memory is the rise of a fresh process's peak above its inputs.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from nanods import plots
from nanods.attention import (
    AttentionConfig,
    block_attention,
    block_mask,
    gathered_block_attention,
    masked_attention,
    query_attention,
    select_blocks,
    summarise,
    tile_attention,
    visible_mask,
)
from nanods.bench.runs import (
    add_exponents,
    describe_machine,
    median_seconds,
    peak_memory_increase,
    write_json,
)
from nanods.gpt import GPT, Attention, GPTConfig, rope_cos_sin

HEADS, D, SIZE, CHOSEN = 4, 64, 64, 8


@dataclass(frozen=True)
class Args:
    only: Literal[
        "all", "time", "routes", "memory", "decode", "tree", "recall", "needle", "peer"
    ] = "all"
    """One part; the others stay as they are in the results."""
    results: Path = Path("results")
    """Where the table and the pictures go."""


def inputs(T: int, heads: int = HEADS) -> tuple[list[Tensor], Tensor]:
    """q, k, v (1, heads, T, D) that want gradients, and the gradient of the output."""
    return [torch.randn(1, heads, T, D, requires_grad=True) for _ in range(3)], torch.randn(
        1, heads, T, D
    )


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention with its scores in memory, as in the article's snippet."""
    return masked_attention(q, k, v, visible_mask(q, k, True, None))


def sparse(method: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, select_blocks(q, k, SIZE, CHOSEN, method), SIZE)

    return attend


BASELINES = {"dense": dense, "tile": sparse("tile"), "flat": sparse("flat"), "unfused": unfused}


def forward_backward(attend: Callable, qkv: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(attend(*qkv), qkv, gradient)


# ---- the parts --------------------------------------------------------------------------------------------------------------


def part_time() -> dict:
    """Seconds forward and backward against T."""
    table = {name: {} for name in ("dense", "tile", "flat")}
    for T, turns in (
        (512, 21),
        (1024, 21),
        (1536, 15),
        (2048, 15),
        (4096, 9),
        (8192, 7),
        (16384, 3),
        (65536, 3),
    ):
        qkv, gradient = inputs(T)
        names = [name for name in table if T <= 16384 or name != "dense"]
        calls = {
            name: lambda a=BASELINES[name], x=qkv, g=gradient: forward_backward(a, x, g)
            for name in names
        }
        for name, seconds in median_seconds(calls, turns).items():
            table[name][str(T)] = seconds
        print(T, {name: f"{1e3 * table[name][str(T)]:.1f} ms" for name in names}, flush=True)
    ratio = {
        n: {T: table["dense"][T] / table[n][T] for T in table["dense"]} for n in ("tile", "flat")
    }
    longer = {name: table[name]["65536"] / table["dense"]["16384"] for name in ("tile", "flat")}
    return add_exponents(table, beyond=4096) | {
        "times_faster": ratio,
        "sparse_65536_over_dense_16384": longer,
    }


def part_routes() -> dict:
    """Milliseconds forward and backward of short sequences: PyTorch's kernel, with a mask and without, and ours."""
    table = {}
    for B, T, width, size, chosen in (
        (8, 256, 32, 16, 2),
        (2, 512, 32, 16, 4),
        (2, 512, 32, 32, 4),
        (1, 1024, 64, 64, 4),
    ):
        qkv = [torch.randn(B, HEADS, T, width, requires_grad=True) for _ in range(3)]
        choices = {
            method: select_blocks(*qkv[:2], size, chosen, method) for method in ("flat", "tile")
        }
        mask = block_mask(*qkv[:2], choices["flat"], size, causal=True)
        calls = {
            "dense": dense,
            "masked": lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
            "by query": lambda q, k, v, b=choices["flat"], s=size: query_attention(q, k, v, b, s),
            "by tile": lambda q, k, v, b=choices["tile"], s=size: tile_attention(q, k, v, b, s),
        }
        gradient = torch.randn(B, HEADS, T, width)
        seconds = median_seconds(
            {n: lambda a=a, x=qkv, g=gradient: forward_backward(a, x, g) for n, a in calls.items()},
            11,
        )
        shape = f"B {B}, T {T}, D {width}, block_size {size}, top_blocks {chosen}"
        table[shape] = {name: 1e3 * value for name, value in seconds.items()}
        print(shape, {name: f"{value:.1f} ms" for name, value in table[shape].items()}, flush=True)
    return table


def part_memory() -> dict:
    """Bytes a token, forward and backward, above the inputs; the unfused one with one head, for its T x T scores."""
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
            command = [
                sys.executable,
                "-m",
                "nanods.bench.attention",
                "--measure-memory",
                name,
                str(T),
                str(heads),
            ]
            used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            table[label][str(T)] = used / T
        print(
            label,
            {T: f"{value:.0f} bytes a token" for T, value in table[label].items()},
            flush=True,
        )
    over = {
        name: {T: table[name][T] / table["dense"][T] for T in table["dense"]}
        for name in ("tile", "flat")
    }
    return {
        "bytes_per_token": table,
        "over_dense": over,
        "unfused_over_shared_16384_one_head": table["unfused, one head"]["16384"]
        / table["shared, one head"]["16384"],
    }


def measure_memory(name: str, T: int, heads: int) -> None:
    """In a process of its own: print how far one forward and backward pass raises its peak memory, in bytes."""
    forward_backward(BASELINES[name], *inputs(256, heads))  # what is made once
    qkv, gradient = inputs(T, heads)
    print(peak_memory_increase(lambda: forward_backward(BASELINES[name], qkv, gradient)))


@torch.no_grad()
def part_decode(S: int = 65536, run: int = 10) -> dict:
    """Milliseconds of one step at S tokens of context: the attention alone, and a whole model of 4 layers.

    Each turn takes `run` steps in a row, as generation does, each with a query of its own.
    """
    queries, (k, v) = torch.randn(run, 1, HEADS, 1, D), torch.randn(2, 1, HEADS, S, D)
    at, summaries = torch.tensor([[S - 1]]), summarise(k, SIZE, "mean")

    def dense_steps() -> None:
        for q in queries:
            F.scaled_dot_product_attention(q, k, v)

    def sparse_steps() -> None:
        for q in queries:
            blocks = select_blocks(q, k, SIZE, CHOSEN, positions=at, summaries=summaries)
            gathered_block_attention(q, k, v, blocks, SIZE, positions=at)

    attention = median_seconds({"dense": dense_steps, "sparse": sparse_steps}, 15)
    steps = {}
    for name, kind in (
        ("V0", AttentionConfig()),
        ("V1", AttentionConfig("block", block_size=SIZE, top_blocks=CHOSEN)),
    ):
        model = GPT(
            GPTConfig(n_layer=4, n_head=HEADS, n_embd=HEADS * D, context_length=S, attention=kind)
        )
        cache = model.new_cache(1)
        for stored in (*cache.keys, *cache.values):
            stored.normal_()
        lengths = torch.tensor([S - 1])

        def model_steps(model: GPT = model, cache=cache, lengths: Tensor = lengths) -> None:
            for token in range(run):
                cache.lengths, cache.max_length = lengths, S - 1  # write the same last place again
                model(torch.tensor([[token]]), cache)

        steps[name] = model_steps
    whole = median_seconds(steps, 7)
    return {
        "context": S,
        "attention_ms": {name: 1e3 * value / run for name, value in attention.items()},
        "attention_times_faster": attention["dense"] / attention["sparse"],
        "model_ms": {name: 1e3 * value / run for name, value in whole.items()},
        "model_times_faster": whole["V0"] / whole["V1"],
    }


def part_tree() -> dict:
    """Seconds to choose for every query of one head, by scoring all and by descent."""
    table = {"flat": {}, "tree": {}}
    for T, turns in ((16384, 5), (32768, 5), (65536, 3), (131072, 3), (262144, 1)):
        q, k = torch.randn(2, 1, 1, T, D)
        calls = {
            name: lambda m=name, q=q, k=k: select_blocks(q, k, SIZE, CHOSEN, m) for name in table
        }
        for name, seconds in median_seconds(calls, turns).items():
            table[name][str(T)] = seconds
        print(T, {name: f"{row[str(T)]:.3f} s" for name, row in table.items()}, flush=True)
    ratio = {T: table["flat"][T] / table["tree"][T] for T in table["flat"]}
    return add_exponents(table) | {"compiled": False, "tree_times_faster": ratio}


def keys_in_topics(T: int, segment: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Keys (T, D) in segments of one topic each, and for each of them a query on some topic that has been normalized_log_mel."""
    topics = torch.randn(-(-T // segment), D)
    k = topics.repeat_interleave(segment, dim=0)[:T] + noise * torch.randn(T, D)
    wanted = (torch.rand(T) * (torch.arange(T) // segment)).long()
    return topics[wanted] + noise * torch.randn(T, D), k


@torch.no_grad()
def part_recall() -> dict:
    """Share of the blocks that scoring all would choose and the descent finds; 2,048 queries of the second half."""
    table = {"iid keys": {}, "topics of 256 tokens": {}}
    for T in (8192, 16384, 32768, 65536, 131072):
        for name, row in table.items():
            q, k = torch.randn(2, T, D) if name == "iid keys" else keys_in_topics(T, 256)
            at = torch.randint(T // 2, T, (2048,)).sort().values
            q, k = q[at][None, None], k[None, None]
            flat, tree = (
                select_blocks(q, k, SIZE, CHOSEN, m, positions=at[None]) for m in ("flat", "tree")
            )
            row[str(T)] = float((flat[..., None] == tree[..., None, :]).any(dim=-1).double().mean())
        print(T, {name: f"{row[str(T)]:.3f}" for name, row in table.items()}, flush=True)
    return {"beam": 16, "fan_out": 4, "found": table}


@torch.no_grad()
def part_needle(T: int = 8192, trials: int = 512) -> dict:
    """How often the block of one key in the query's own direction, at `strength` times the others' norm, is chosen."""
    table = {}
    for strength in (1.0, 1.5, 2.0, 3.0):
        hits = {pool: 0 for pool in ("mean", "bound")}
        for _ in range(trials // 16):
            q, k = torch.randn(16, 1, 1, D), torch.randn(16, 1, T, D)
            place = torch.randint(0, T - SIZE, (16,))
            needle = strength * k.norm(dim=-1).mean() * F.normalize(q[:, 0, 0], dim=-1)  # (16, D)
            k[torch.arange(16), 0, place] = needle
            for pool in hits:
                blocks = select_blocks(
                    q, k, SIZE, CHOSEN, pool=pool, positions=torch.tensor([[T - 1]])
                )
                hits[pool] += int((blocks[:, 0, 0] == place[:, None] // SIZE).sum())
        table[f"{strength:g}x"] = {pool: count / trials for pool, count in hits.items()}
        print(f"{strength:g}x", table[f"{strength:g}x"], flush=True)
    return {"tokens": T, "trials": trials, "found": table}


def part_peer() -> dict:
    """Seconds forward and backward of a whole attention layer: ours and a package that has the same aim (the extra `peers`)."""
    try:
        from native_sparse_attention_pytorch import SparseAttention
    except ImportError:
        print("not installed, left out: make setup EXTRAS=peers")
        return {"installed": False}
    sizes = {
        "sliding_window_size": SIZE,
        "compress_block_size": SIZE,
        "compress_block_sliding_stride": SIZE,
    }
    sizes |= {"selection_block_size": SIZE, "num_selected_blocks": CHOSEN, "causal": True}
    peer = SparseAttention(dim=HEADS * D, dim_head=D, heads=HEADS, **sizes)
    config = GPTConfig(
        n_head=HEADS,
        n_embd=HEADS * D,
        attention=AttentionConfig("block", 32, SIZE, CHOSEN, "tile"),
    )
    ours, table = Attention(config), {"native-sparse-attention-pytorch": {}, "ours, shared": {}}
    for T in (512, 1024):
        x, positions = torch.randn(1, T, HEADS * D, requires_grad=True), torch.arange(T)[None]
        rope = rope_cos_sin(positions, D, x.dtype, config.rope_base)
        calls = {
            "native-sparse-attention-pytorch": lambda x=x: peer(x).sum().backward(),
            "ours, shared": lambda x=x, p=positions, r=rope: ours(x, p, r)[0].sum().backward(),
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


# ---- all of them ----------------------------------------------------------------------------------------------------


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--measure-memory"]:
        return measure_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    args = tyro.cli(Args, description=__doc__)
    path = args.results / "attention.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    for part in PARTS if args.only == "all" else (args.only,):
        print(f"---- {part}", flush=True)
        torch.manual_seed(0)
        table[part] = PARTS[part]()
    shapes = {"B": 1, "heads": HEADS, "D": D, "block_size": SIZE, "top_blocks": CHOSEN}
    table = {"machine": {**describe_machine("fp32"), "shapes": shapes}, **table}
    write_json(path, table)
    if {"time", "memory"} <= table.keys():
        plots.save(plots.cost_against_tokens(table), args.results / "attention.png")


if __name__ == "__main__":
    main()
