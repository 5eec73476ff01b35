"""V1: sparse attention, in which each query attends to selected keys instead of all of them.

Each step of the ladder changes one idea of the step before:

    dense_attention                each query attends to every key in its past
    topk_attention                 ... to its `top_k` highest-scoring keys, but all are still scored
    select_blocks(method="flat")   scores one summary per block of keys, so most keys are not scored
    select_blocks(method="tile")   ... once per tile of queries instead of once per query
    select_blocks(method="tree")   ... top-down in a tree of summaries: most blocks are not scored
      + block_attention            attends to the keys of the selected blocks and the current block

Selection (`select_blocks`) and attention (`block_attention`) are separate functions. So one naive
reference, `block_attention_reference`, tests the attention for every selection method. The fast
implementations are in nanods/attention_kernel.py.

Equations. Dense attention, with D the width of a head (Vaswani et al. 2017, arXiv:1706.03762,
eq. 1):

    attention(q, K, V) = softmax(q K^T / sqrt(D)) V

Block attention (MoBA: Lu et al. 2025, arXiv:2502.13189, eq. 2-6). The current block is the block
of keys that contains the query's position:

    selected(q)     = the top_blocks blocks with the largest score(q, block), among the blocks that
                      lie entirely before q's current block
    attention(q)    = softmax over the keys of selected(q) and of the current block, up to q itself

    pool="mean":    score = q . (mean of the block's keys). Cheap, but the mean can hide one strong
                    key among many.
    pool="bound":   score = sum over channels of max(q_d max_d, q_d min_d), with max and min over
                    the block's keys (Quest: arXiv:2406.10774, eq. 1). No key in the block scores
                    higher, so no strong key is missed, but the bound is loose.

Selection is causal by construction. A block that contains even one key in q's future is never
scored, so its summary cannot leak that key. The current block is always attended to, under the
ordinary causal mask, and is never scored or listed. A tile is one block of queries. Its selection
is computed from its *first* query, because the past of the first query is the past of every query
in the tile. The mean of the tile's queries would leak the last query to the first. Without a
causal order there is no future to leak, so there the mean is used.

Left out on purpose: a gradient through the selection (the model learns which blocks are relevant
through the keys and queries it attends with), and tiles of another size than blocks.

Tested by tests/test_attention.py: top_k >= T equals dense; all blocks selected equals dense; a
beam as wide as the tree equals flat; blocks of one query each make tile equal flat; tokens after a
position change neither its selection nor its output.

Shapes: B batch, H heads, D width of a head, T queries, S keys (S = T unless a cache holds more),
N = ceil(S / block_size) blocks, K = `top_blocks`, R rows of a selection: T (one per query) or
ceil(T / block_size) (one per tile of queries). `positions` (B or 1, T) gives the position of each
query among the keys, for decoding with a cache: a query at position p sees the keys 0..p. By
default query t is at position t.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nanods.attention_kernel import (
    FLEX_BLOCK,
    flex_block_attention,
    query_attention,
    tile_attention,
)

BEAM, FAN_OUT = 16, 4  # nodes that the tree search opens on each level, children per node
QUERY_ROUTE_MIN = 1 << 14  # T * block_size from which sorting pairs beats a mask (choose_route)

Method = Literal["flat", "tile", "tree", "window"]
METHODS, POOLS = get_args(Method), ("mean", "bound")


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
    pool: Literal["mean", "bound"] = "mean"
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


def query_positions(q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor:
    """Return the position of each query among the keys: integers (B or 1, T).

    Raises ValueError if the numbers of queries and keys differ and `positions` is None.
    """
    if positions is not None:
        return positions
    if q.size(-2) != k.size(-2):
        raise ValueError(
            f"{q.size(-2)} queries but {k.size(-2)} keys: pass `positions`, the position of each "
            "query among the keys"
        )
    return torch.arange(q.size(-2), device=q.device)[None]


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


# ---- V1: select blocks ---------------------------------------------------------------------------

MAX_SCORES = 1 << 20  # scores in memory at once during selection, so that memory is linear in T


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    block_size: int,
    top_blocks: int,
    method: str = "flat",
    pool: str = "mean",
    causal: bool = True,
    positions: Tensor | None = None,
    summaries: Tensor | None = None,
    beam: int = BEAM,
    fan_out: int = FAN_OUT,
) -> Tensor:
    """Select the blocks of keys that each query, or each tile of queries, attends to.

    The current block is always attended to and never listed. q (B, H, T, D), k (B, H, S, D) ->
    block indices (B, H, R, top_blocks), best first, -1 where fewer blocks exist. R = T, or
    ceil(T / block_size) for method "tile". `summaries` (B, H, N, P): the result of `summarise`, if
    a cache already holds it. Raises ValueError for an unknown method or pool and for sizes out of
    range.

    flat     scores every past block: T x N products instead of dense attention's T x S
    tile     the same for one query per tile: N x N products
    tree     each level of the tree pools `fan_out` nodes of the level below. From the top level
             down, the `beam` best nodes are opened: T x (beam + 1) x fan_out products per level.
             Misses a block whose parent nodes score low.
    window   the nearest blocks, whatever they contain: the baseline for the other methods
    """
    if method not in METHODS or pool not in POOLS:
        raise ValueError(
            f"method = {method!r} must be one of {METHODS} and pool = {pool!r} one of {POOLS}"
        )
    if block_size < 1 or top_blocks < 0 or beam < 1 or fan_out < 2:
        raise ValueError(
            f"block_size = {block_size} must be at least 1, top_blocks = {top_blocks} at least 0, "
            f"beam = {beam} at least 1, fan_out = {fan_out} at least 2"
        )
    if method == "tile" and positions is not None:
        raise ValueError(
            "method='tile' does not take `positions`: a tile uses the selection of its first "
            "query, so select for that query with method='flat'"
        )
    current = query_positions(q, k, positions) // block_size  # (B or 1, T)
    N = -(-k.size(-2) // block_size)
    if method in POSITION_METHODS:
        blocks = POSITION_METHODS[method](current, N, top_blocks, causal)
        return blocks.expand(*q.shape[:2], -1, -1)
    if method == "tile":
        current = current[:, ::block_size]
        q = q[:, :, ::block_size] if causal else summarise(q, block_size, "mean")
    pyramid = [summarise(k, block_size, pool) if summaries is None else summaries]
    while method == "tree" and pyramid[-1].size(2) > beam * fan_out:
        pyramid.append(summarise_nodes(pyramid[-1], fan_out, pool))
    if pool == "bound":
        # max(q_d max_d, q_d min_d) is q_d max_d where q_d > 0 and q_d min_d elsewhere. So the bound
        # is a dot product again: of (positive part of q, negative part of q) and (max, min).
        q = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
    scores_per_row = N if len(pyramid) == 1 else (beam + 1) * fan_out * q.size(-1)
    step = max(1, MAX_SCORES // (q.size(0) * q.size(1) * scores_per_row))
    # No loop if one pass is enough: torch.compile would unroll it for each length anew.
    starts = range(0, q.size(2), step) if step < q.size(2) else (0,)
    selections = []
    for start in starts:
        rows = slice(start, start + step)
        if positions is None and causal:
            # Only blocks before the current block of the last row can be candidates.
            last = min(start + step, q.size(2)) - 1
            N = last if method == "tile" else last // block_size
        blocks = descend_tree(
            q[:, :, rows], pyramid, current[:, rows], N, top_blocks, causal, beam, fan_out
        )
        # Early queries have fewer than top_blocks candidates: fill up with -1.
        selections.append(F.pad(blocks, (0, top_blocks - blocks.size(-1)), value=-1))
    return torch.cat(selections, dim=2)


def summarise(k: Tensor, block_size: int, pool: str) -> Tensor:
    """Return the summary of each block of keys: (B, H, S, D) -> (B, H, N, P).

    P = D for pool "mean", 2 D for "bound" (maxima, then minima). The last block may be short.
    """
    end = k.size(-2) // block_size * block_size  # end of the last full block
    full_blocks = k[:, :, :end].unflatten(2, (-1, block_size))
    short_block = k[:, :, None, end:]
    parts = [part for part in (full_blocks, short_block) if part.numel()]
    return torch.cat([pool_keys(part, pool) for part in parts], dim=2)


def pool_keys(keys: Tensor, pool: str) -> Tensor:
    """Pool the n keys of each block into one summary: (..., n, D) -> (..., P)."""
    if pool == "mean":
        return keys.mean(dim=-2)
    return torch.cat([keys.amax(dim=-2), keys.amin(dim=-2)], dim=-1)


def summarise_nodes(nodes: Tensor, fan_out: int, pool: str) -> Tensor:
    """Return the next level of the tree: (B, H, M, P) -> (B, H, ceil(M / fan_out), P).

    If the last parent has too few children, its last child is repeated.
    """
    missing = -nodes.size(2) % fan_out
    padding = nodes[:, :, -1:].expand(-1, -1, missing, -1)
    children = torch.cat([nodes, padding], dim=2).unflatten(2, (-1, fan_out))
    if pool == "mean":
        return children.mean(dim=3)
    max_keys, min_keys = children.chunk(2, dim=-1)
    return torch.cat([max_keys.amax(dim=3), min_keys.amin(dim=3)], dim=-1)


def window_blocks(current: Tensor, N: int, top_blocks: int, causal: bool) -> Tensor:
    """Return the blocks nearest to the current one: (B or 1, T) -> (B or 1, 1, T, top_blocks).

    If causal, the blocks before it; otherwise blocks before and after it in turn. -1 where there is
    no such block.
    """
    rank = torch.arange(top_blocks, device=current.device)
    alternating = torch.where(rank % 2 == 0, -1 - rank // 2, 1 + rank // 2)  # -1, 1, -2, 2, ...
    offset = -1 - rank if causal else alternating
    blocks = current[:, None, :, None] + offset
    return blocks.masked_fill((blocks < 0) | (blocks >= N), -1)


POSITION_METHODS = {"window": window_blocks}
"""Methods that select by position alone, without scores: from the name to a function of (current,
N, top_blocks, causal)."""


def descend_tree(
    q: Tensor,
    pyramid: list[Tensor],
    current: Tensor,
    N: int,
    top_blocks: int,
    causal: bool,
    beam: int,
    fan_out: int,
) -> Tensor:
    """Find the best blocks for each query: from the top level down, open the `beam` best nodes.

    A pyramid of one level is flat selection. q (B, H, R, P); pyramid: the summaries (B, H, M, P) of
    each level, blocks first; current (B or 1, R): each row's current block; N: only blocks below it
    are candidates -> block indices (B, H, R, top_blocks or fewer).

    The node that contains the current block is never scored, because its summary may contain keys
    of the future, and it is always opened. A node before it lies entirely in the past, and so do
    its children.
    """
    level = len(pyramid) - 1
    current = current[:, None, :, None]  # (B or 1, 1, R, 1)
    table = pyramid[level][:, :, : max(1, -(-N // fan_out**level))]
    nodes = torch.arange(table.size(2), device=q.device)
    current_node = current // fan_out**level
    hidden = nodes >= current_node if causal else nodes == current_node
    scores = (q @ table.mT).masked_fill_(hidden, float("-inf"))  # (B, H, R, M)
    while level > 0:
        best, index = scores.topk(min(beam, scores.size(-1)), dim=-1)
        nodes = nodes.expand_as(scores).gather(-1, index)  # (B, H, R, beam)
        # A hidden node becomes one beyond the end of the level, whose children are hidden too.
        nodes = nodes.masked_fill_(best == float("-inf"), pyramid[level].size(2))
        nodes = torch.cat([nodes, current_node.expand(*nodes.shape[:3], 1)], dim=-1)
        children = nodes[..., None] * fan_out + torch.arange(fan_out, device=q.device)
        nodes = children.flatten(-2)  # (B, H, R, C) with C = (beam + 1) * fan_out
        level -= 1
        table = pyramid[level]
        current_node = current // fan_out**level
        if causal:
            hidden = nodes >= current_node
        else:
            hidden = (nodes == current_node) | (nodes >= table.size(2))
        head = torch.arange(table.size(0) * table.size(1), device=q.device)
        first_row = head.view(*table.shape[:2], 1, 1) * table.size(2)  # of each head in the table
        index = nodes.clamp(max=table.size(2) - 1) + first_row  # (B, H, R, C)
        keys = table.flatten(0, 2).index_select(0, index.view(-1))
        keys = keys.view(-1, nodes.size(-1), q.size(-1))  # (B*H*R, C, P)
        scores = torch.bmm(q.reshape(-1, 1, q.size(-1)), keys.mT).view(nodes.shape)
        scores = scores.masked_fill_(hidden, float("-inf"))
    best, index = scores.topk(min(top_blocks, scores.size(-1)), dim=-1)
    blocks = nodes.expand_as(scores).gather(-1, index)  # (B, H, R, top_blocks or fewer)
    return blocks.masked_fill_(best == float("-inf"), -1)


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
