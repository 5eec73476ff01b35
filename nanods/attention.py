"""V1: sparse attention, in which each query attends to selected keys instead of all of them.

Each step of the ladder changes one idea of the step before:

    dense_attention                each query attends to every key in its past
    topk_attention                 ... to its `top_k` highest-scoring keys, but all are still scored
    block_attention                ... to the keys of selected blocks and of its current block, so
                                   most keys are not scored

`block_attention` is given the selected blocks, which nanods/attention_selection.py computes. So one
naive reference, `block_attention_reference`, tests it for every method of selection. The fast
implementations are in nanods/attention_kernel.py.

Equations. Dense attention, with D the width of a head (Vaswani et al. 2017, arXiv:1706.03762,
eq. 1):

    attention(q, K, V) = softmax(q K^T / sqrt(D)) V

Block attention (MoBA: Lu et al. 2025, arXiv:2502.13189, eq. 2-6). The current block is the block
of keys that contains the query's position:

    selected(q)     = the top_blocks blocks with the largest score (nanods/attention_selection.py),
                      among the blocks that lie entirely before q's current block
    attention(q)    = softmax over the keys of selected(q) and of the current block, up to q itself

Tested by tests/test_attention.py: top_k >= T equals dense; all blocks selected equals dense; tokens
after a position do not change its output.

Shapes: B batch, H heads, D width of a head, T queries, S keys (S = T unless a cache holds more),
N = ceil(S / block_size) blocks, K = `top_blocks`, R rows of a selection: T (one per query) or
ceil(T / block_size) (one per tile of queries). `positions` (B or 1, T) gives the position of each
query among the keys, for decoding with a cache: a query at position p sees the keys 0..p. By
default query t is at position t.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanods.attention_kernel import (
    FLEX_BLOCK,
    flex_block_attention,
    query_attention,
    tile_attention,
)
from nanods.attention_selection import BEAM, FAN_OUT, Method, Pool, query_positions

QUERY_ROUTE_MIN = 1 << 14  # T * block_size from which sorting pairs beats a mask (choose_route)


@dataclass(frozen=True)
class AttentionConfig:
    kind: Literal["dense", "topk", "block"] = "dense"
    """Which keys a query attends to. dense: all (V0). topk: the highest-scoring keys (the article's
    idea). block: the best blocks of keys (V1)."""
    top_k: int = 32
    """Keys per query (topk only)."""
    block_size: int = 64
    """Keys per block (block only)."""
    top_blocks: int = 4
    """Past blocks selected per query, in addition to its current block (block only)."""
    method: Method = "flat"
    """How blocks are selected. flat: per query. tile: per tile of queries. tree: per query, by tree
    search. window: the nearest blocks, without scores (block only)."""
    pool: Pool = "mean"
    """Summary of a block. mean: the mean of its keys. bound: their maxima and minima, which bound
    every score (block only)."""
    beam: int = BEAM
    """Nodes opened on each level of the tree; with at most beam x fan-out blocks, tree equals flat
    (tree only)."""
    fan_out: int = FAN_OUT
    """Children per node of the tree (tree only)."""

    def pairs(self, T: int) -> int:
        """Return the number of (query, key) pairs computed for a causal sequence of T tokens.

        Dense attention computes T (T + 1) / 2.
        """
        if self.kind == "topk":
            return sum(min(t + 1, self.top_k) for t in range(T))
        if self.kind == "block":
            size = self.block_size
            return sum(min(t // size, self.top_blocks) * size + t % size + 1 for t in range(T))
        return T * (T + 1) // 2

    def activation_bytes(
        self, T: int, C: float, H: float, device: str, itemsize: int, masked: bool
    ) -> list[float]:
        """Return the bytes per token that attention keeps for backward, tensor by tensor.

        H heads of total width C read sequences of T tokens on a "cpu" or "cuda" device. Matrix
        products use numbers of `itemsize` bytes. `masked` says whether dense attention has a mask.
        """
        autocast = itemsize < 4
        if device == "cuda" and autocast:
            kept = [*[itemsize * C] * 4, 4 * H]  # q, k, v and output, and log-sum-exp in fp32
        else:
            kept = [4 * C, 4 * C, 4 * H]  # v, output and log-sum-exp, in fp32
        if device != "cuda":
            kept.append(itemsize * C if autocast else 0)  # the output, cast for the next product
        if self.kind == "topk":
            return [*kept, 4 * H * T, 4 * H * T, H * T]  # scores, weights and mask
        if device == "cuda":
            is_masked = self.kind == "block" and not flex_pays(T, self.block_size, self.top_blocks)
            return [*kept, 4 * H * T] if is_masked else kept
        tile = self.method == "tile"
        if self.kind == "block" and (tile or T * self.block_size >= QUERY_ROUTE_MIN):
            sorted_pairs = 0 if tile else 8 * H * self.top_blocks
            return [*kept, 0 if autocast else 4 * C, sorted_pairs]
        if self.kind == "block":
            return [*kept, 4 * H * T]  # the mask, in fp32
        return [*kept, 4 * T if masked else 0]


def visible_mask(q: Tensor, k: Tensor, causal: bool, positions: Tensor | None) -> Tensor:
    """Return which keys each query may attend to at all: bool (B or 1, 1, T, S)."""
    T, S = q.size(-2), k.size(-2)
    if not causal:
        return torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device)
    return torch.arange(S, device=q.device) <= query_positions(q, k, positions)[:, None, :, None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Compute equation 1 over the keys where `mask`, broadcast to (B, H, T, S), is true.

    This is the reference for every other function in this file.
    """
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, H, T, S)
    # Mask before the softmax: masked keys get weight 0 and the other weights sum to 1.
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v  # (B, H, T, D)


# ---- V0: all keys --------------------------------------------------------------------------------


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    positions: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Compute `masked_attention` over all keys (of the past, if causal) by PyTorch's fused kernel.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Time O(T S), memory O(T): the kernel never
    stores the scores. If `valid` (B, S) is given, queries ignore the keys where it is false; each
    row needs at least one valid key.
    """
    if positions is None and valid is None and q.size(-2) == k.size(-2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    mask = visible_mask(q, k, causal, positions)
    if valid is not None:
        mask = mask & valid[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# ---- the article's idea, corrected: the highest-scoring keys -------------------------------------


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    causal: bool = True,
    positions: Tensor | None = None,
) -> Tensor:
    """Attend to the `top_k` highest-scoring keys of each query, or to all visible ones if fewer.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Correct, but not fast: to find the highest
    scores it computes all of them, so time *and* memory are O(T S), as in the article's snippet
    (which claims O(n log n): V1.1). Raises ValueError if top_k < 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}: each query must attend to at least one key")
    mask = visible_mask(q, k, causal, positions)
    # The selection is discrete and has no gradient; the scores of the selected keys have one.
    with torch.no_grad():
        scores = (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf"))  # (B, H, T, S)
        best = scores.topk(min(top_k, k.size(-2)), dim=-1).indices  # (B, H, T, top_k)
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    # A query with fewer than top_k visible keys has hidden ones in its top k: `mask` removes them.
    return masked_attention(q, k, v, mask & selected)


# ---- V1: attend to the selected blocks -----------------------------------------------------------


def expand_to_queries(blocks: Tensor, T: int, block_size: int) -> Tensor:
    """Repeat the selection of each tile for each of its queries: (B, H, R, K) -> (B, H, T, K).

    Raises ValueError if R fits neither the queries nor the tiles.
    """
    if blocks.size(2) == T:
        return blocks
    if blocks.size(2) != -(-T // block_size):
        raise ValueError(
            f"{blocks.size(2)} rows of blocks for {T} queries: pass one row for each query, or one "
            f"for each tile of {block_size} queries"
        )
    return blocks.repeat_interleave(block_size, dim=2)[:, :, :T]


def widest_float(device: torch.device) -> torch.dtype:
    """Return fp64, or fp32 on Apple's GPUs ("mps"), which have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def sparsity_stats(
    blocks: Tensor,
    T: int,
    D: int,
    block_size: int,
    method: str,
    pool: str,
    beam: int = BEAM,
    fan_out: int = FAN_OUT,
) -> dict[str, Tensor]:
    """Return the cost of a causal selection (B, H, R, K) relative to dense attention.

    `keys_read` (H,): the computed (query, key) pairs as a fraction of dense attention's
    T (T + 1) / 2. `flops` (): the FLOPs as a fraction of dense attention's. They are 4 D per pair
    (q . k and weight . v), plus the selection: 2 D per summary scored (4 D for a bound).
    """
    selected = expand_to_queries(blocks, T, block_size) >= 0
    selected_keys = selected.sum(dim=-1) * block_size  # (B, H, T)
    current_keys = torch.arange(T, device=blocks.device) % block_size + 1  # (T,)
    keys_read = (selected_keys + current_keys).to(widest_float(blocks.device))  # (B, H, T)
    keys_read = keys_read.mean(dim=(0, 2)) * 2 / (T + 1)
    N = -(-T // block_size)
    scored = {"flat": T * (N - 1) / 2, "tile": N * (N - 1) / 2}.get(method, 0)
    while method == "tree" and beam * fan_out < N:
        scored, N = scored + T * (beam + 1) * fan_out, -(-N // fan_out)
    if method == "tree":
        scored += T * N / 2
    selection = scored * 2 * D * (2 if pool == "bound" else 1) / (4 * D * T * (T + 1) / 2)
    return {"keys_read": keys_read, "flops": keys_read.mean() + selection}


def block_mask(
    q: Tensor,
    k: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool,
    positions: Tensor | None = None,
) -> Tensor:
    """Return which keys each query attends to, given its selected blocks: bool (B, H, T, S)."""
    (B, H, T, _), S = q.shape, k.size(-2)
    N = -(-S // block_size)
    blocks = expand_to_queries(blocks, T, block_size)
    current = query_positions(q, k, positions)[:, None, :, None] // block_size  # (B or 1, 1, T, 1)
    # Column N receives the -1s and is cut off afterwards.
    selected = torch.zeros(B, H, T, N + 1, dtype=torch.bool, device=q.device)
    selected.scatter_(-1, blocks.masked_fill(blocks < 0, N), True)
    selected = selected[..., :N] | (torch.arange(N, device=q.device) == current)  # (B, H, T, N)
    selected_keys = selected.repeat_interleave(block_size, dim=-1)[..., :S]  # (B, H, T, S)
    return selected_keys & visible_mask(q, k, causal, positions)


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool = True,
    positions: Tensor | None = None,
) -> Tensor:
    """Compute `block_attention` the naive way: all scores and a mask. Time and memory O(T S)."""
    return masked_attention(q, k, v, block_mask(q, k, blocks, block_size, causal, positions))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool = True,
    positions: Tensor | None = None,
) -> Tensor:
    """Attend to each query's current block and to the blocks selected for it or for its tile.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). blocks (B, H, R, K): block indices, -1 for
    none, each index at most once in a row. Raises ValueError if `positions` are needed and missing.
    `choose_route` picks the implementation; all give the same result, with one exception: the route
    "mask" adds its mask to the scores, so a nan in a hidden key passes through it.
    """
    query_positions(q, k, positions)  # raises if `positions` are needed and missing
    route = choose_route(q, k, blocks, block_size, positions)
    if route == "gather":
        blocks = expand_to_queries(blocks, q.size(2), block_size)
        return gathered_block_attention(q, k, v, blocks, block_size, causal, positions)
    if route == "flex":
        return flex_block_attention(q, k, v, blocks, block_size, causal)
    if route == "tile":
        return tile_attention(q, k, v, blocks, block_size, causal)
    if route == "query":
        return query_attention(q, k, v, blocks, block_size, causal)
    mask = block_mask(q, k, blocks, block_size, causal, positions)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex_pays(T: int, block_size: int, top_blocks: int) -> bool:
    """Return whether FlexAttention pays on a GPU: block_size must be a multiple of FLEX_BLOCK, and
    the selected blocks and the current one must hold fewer than T tokens."""
    return block_size % FLEX_BLOCK == 0 and (top_blocks + 1) * block_size < T


def choose_route(
    q: Tensor, k: Tensor, blocks: Tensor, block_size: int, positions: Tensor | None
) -> Literal["gather", "flex", "tile", "query", "mask"]:
    """Return the name of the fastest implementation of `block_attention` for these tensors.

    gather   gathers the keys of each query: for decoding, with few queries and many keys
    flex     PyTorch's FlexAttention: on a GPU, except in fp64 and where it does not pay (flex_pays)
    tile     tile_attention: on a CPU, for one selection per tile
    query    query_attention: on a CPU, for one selection per query
    mask     PyTorch's fused kernel with a mask: for sequences so short that computing every pair
             costs less than sorting the selected pairs (measured on a CPU: LOG.md); and on a GPU
             without flex

    A test replaces this function to force a route, such as "flex" on a CPU.
    """
    T, S = q.size(2), k.size(2)
    if T * (blocks.size(-1) + 1) * block_size <= S:
        return "gather"
    if positions is not None:
        return "mask"
    if q.is_cuda:
        pays = flex_pays(T, block_size, blocks.size(-1)) and q.dtype != torch.float64
        return "flex" if pays else "mask"
    if blocks.size(2) != T:
        return "tile"
    if T * block_size >= QUERY_ROUTE_MIN:
        return "query"
    return "mask"


def gathered_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool = True,
    positions: Tensor | None = None,
) -> Tensor:
    """Compute `block_attention` from gathered keys: no other key is touched.

    blocks (B, H, T, K), one row per query. Time and memory O(T (K + 1) block_size).
    """
    B, H, T, _ = q.shape
    at = query_positions(q, k, positions)[:, None, :, None]  # (B or 1, 1, T, 1)
    current = at // block_size
    read = torch.cat([current.expand(B, H, T, 1), blocks], dim=-1)  # (B, H, T, K + 1)
    # (B, H, T, K + 1, block_size): the position of each gathered key
    key = read[..., None] * block_size + torch.arange(block_size, device=q.device)
    allowed = (read[..., None] >= 0) & (key < k.size(-2))
    if causal:
        allowed &= key <= at[..., None]

    row = torch.arange(B, device=q.device)[:, None, None, None]
    head = torch.arange(H, device=q.device)[:, None, None]

    def gather(x: Tensor) -> Tensor:
        """Return the vectors of each query's blocks: (B, H, S, D) -> (B, H, T, (K+1)*size, D)."""
        missing = -x.size(2) % block_size
        if missing:  # never with a cache, which holds full blocks: so decoding does not copy x
            x = F.pad(x, (0, 0, 0, missing))
        return x.unflatten(2, (-1, block_size))[row, head, read.clamp(min=0)].flatten(3, 4)

    # Every query has its own keys. For masked_attention that is a batch of single queries:
    # (B, H, T, 1, D).
    out = masked_attention(q[..., None, :], gather(k), gather(v), allowed.view(B, H, T, 1, -1))
    return out.squeeze(-2)
