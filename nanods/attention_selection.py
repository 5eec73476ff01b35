"""V1: select the blocks of keys that each query attends to. nanods/attention.py attends to them.

    select_blocks(method="flat")     scores one summary per block of keys: most keys are not scored
    select_blocks(method="tile")     scores summaries once per tile of queries, not per query
    select_blocks(method="tree")     searches a tree of summaries: most blocks are not scored either
    select_blocks(method="window")   takes the nearest blocks, without scores: the baseline

The score of a block (the first one is MoBA's: Lu et al. 2025, arXiv:2502.13189):

    pool="mean":    score = q . (mean of the block's keys). Cheap, but the mean can hide one strong
                    key among many.
    pool="bound":   score = sum over channels of max(q_d max_d, q_d min_d), with max and min over
                    the block's keys (Quest: arXiv:2406.10774, eq. 1). No key in the block scores
                    higher, so no strong key is missed, but the bound is loose.

With causal=True, selection is causal by construction. A block that contains even one key in q's
future is never scored, so its summary cannot leak that key. The current block, which contains the
query's position, is always attended to, under the ordinary causal mask, and is never scored or
listed. A tile is one block of queries. Its selection is computed from its *first* query, because
the past of the first query is the past of every query in the tile. The mean of the tile's queries
would leak the last query to the first. Without a causal order nothing can leak, so there a tile's
selection is computed from the mean of its queries.

Left out on purpose: a gradient through the selection (the model learns which blocks are relevant
through the keys and queries it attends with), and tiles of another size than blocks.

Tested by tests/test_attention.py: a beam as wide as the tree equals flat; blocks of one query each
make tile equal flat; tokens after a position do not change its selection.

Shapes and `positions` as in nanods/attention.py; P is the width of a summary.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

BEAM, FAN_OUT = 16, 4  # nodes that the tree search opens on each level, children per node
MAX_SCORES = 1 << 20  # scores in memory at once during selection, so that memory is linear in T

Method = Literal["flat", "tile", "tree", "window"]
Pool = Literal["mean", "bound"]
METHODS, POOLS = get_args(Method), get_args(Pool)


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
