"""V1's idea: attention in which each query reads only the keys that matter to it.

The ladder, each step the one before with one idea changed:

    dense_attention                every query reads every key of its past
    topk_attention                 ... only its `top_k` highest-scoring keys, but still scores all of them
    select_blocks(method="flat")   ... scores one summary per block of keys, so most keys are never scored at all
    select_blocks(method="tile") ... once for a tile of queries, not for each
    select_blocks(method="tree")   ... or by descent through summaries of summaries, so most blocks are not scored either
      + block_attention            and reads the keys of the chosen blocks and of its own block

Choosing (`select_blocks`) and reading (`block_attention`) are separate, so that one naive reference,
`block_attention_reference`, checks the reading whatever the choice was. The reading that is fast is in
nanods/attention_kernel.py.

Equations. Dense, with D the width of a head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1):

    attention(q, K, V) = softmax(q K^T / sqrt(D)) V

Blocks (MoBA: Lu et al. 2025, arXiv:2502.13189, eq. 2-6):

    chosen(q)       = the top_blocks largest of score(q, block), over blocks that lie wholly before q's own block
    attention(q)    = softmax over the keys of chosen(q) and of q's own block, up to q itself

    pool="mean":     score = q . mean of the keys: cheap, but one strong key among many is averaged away
    pool="bound":    score = sum over channels of max(q_d max_d, q_d min_d), with max and min over the block's keys: no key of
                     the block can score higher, so none is missed, but the bound is loose (Quest: arXiv:2406.10774, eq. 1)

Causal by construction: a block with even one key in q's future is never scored, so no summary can leak it. The own block
is always read, under the ordinary causal mask, and never scored or listed. A tile is one block of queries; its shared choice
is made from its *first* query, the only one whose past is the past of all. (The mean of its queries would tell the first
about the last; without a causal order that is no leak, and the mean it is.)

Left out on purpose: a gradient to the choice (which blocks are best is learnt through the keys and queries that are read),
tiles of another size than blocks.

Pinned by tests/test_attention.py: top_k >= T equals dense; all blocks chosen equals dense; a beam as wide as the tree equals
flat; blocks of one query each make shared equal flat; what comes after a token changes neither its choice nor its output.

Shapes: B batch, H heads, D width of a head, T queries, S keys (S = T unless a cache holds more), N = ceil(S / block_size)
blocks, K = `top_blocks`, R rows of the choice: T, one for each query, or ceil(T / block_size), one for each tile of queries.
`positions` (B or 1, T) says where each query stands among the keys, for decoding with a cache: a query at position p reads
the keys 0..p. By default query t stands at t.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanods.attention_kernel import flex_block_attention, query_attention, tile_attention

BEAM, FAN_OUT = 16, 4  # nodes that a tree opens on each level, children of each


@dataclass(frozen=True)
class AttentionConfig:
    kind: Literal["dense", "topk", "block"] = "dense"
    """dense: every key (V0). topk: the highest-scoring keys (the article's idea). block: the best blocks of keys (V1)."""
    top_k: int = 32
    """Keys that each query reads (topk only)."""
    block_size: int = 64
    """Keys in a block (block only)."""
    top_blocks: int = 4
    """Past blocks that each query reads beside its own (block only)."""
    method: Literal["flat", "tile", "tree", "window"] = "flat"
    """Who chooses the blocks: each query, each tile of queries, each query by descent, or nobody: the nearest (block only)."""
    pool: Literal["mean", "bound"] = "mean"
    """What stands for a block until it is read: the mean of its keys, or a bound from their maxima and minima (block only)."""
    beam: int = BEAM
    """Nodes that a tree opens on each level; up to beam x fan-out blocks it has no levels, and equals flat (tree only)."""
    fan_out: int = FAN_OUT
    """Children of a tree's node (tree only)."""

    def pairs(self, T: int) -> int:
        """CaptionDataset of a query and a key that it reads, over a causal sequence of T tokens; dense reads T (T + 1) / 2."""
        if self.kind == "topk":
            return sum(min(t + 1, self.top_k) for t in range(T))
        if self.kind == "block":
            size = self.block_size
            return sum(min(t // size, self.top_blocks) * size + t % size + 1 for t in range(T))
        return T * (T + 1) // 2

    def activation_bytes(
        self, T: int, C: float, H: float, device: str, itemsize: int, masked: bool
    ) -> list[float]:
        """Return the bytes per token that the attention kernel keeps for backward, tensor by tensor.

        H heads of total width C read sequences of T tokens on a "cpu" or "cuda" device. Matrix
        products use numbers of `itemsize` bytes. `masked` says whether dense attention has a mask.
        """
        autocast = itemsize < 4
        if device == "cuda" and autocast:
            return [*[itemsize * C] * 4, 4 * H]  # q, k, v and output, and log-sum-exp in fp32
        kept = [4 * C, 4 * C, 4 * H]  # v, output and log-sum-exp, in fp32
        if device == "cuda":
            return kept
        kept.append(itemsize * C if autocast else 0)  # the output, cast for the projection after it
        if self.kind == "topk":
            return [*kept, 4 * H * T, 4 * H * T, H * T]  # scores, weights and mask
        tile = self.method == "tile"
        if self.kind == "block" and (tile or T * self.block_size >= 1 << 14):  # see choose_route
            sorted_pairs = 0 if tile else 8 * H * self.top_blocks
            return [*kept, 0 if autocast else 4 * C, sorted_pairs]
        if self.kind == "block":
            return [*kept, 4 * H * T]  # the mask, in fp32
        return [*kept, 4 * T if masked else 0]


def visible_mask(q: Tensor, k: Tensor, causal: bool, positions: Tensor | None) -> Tensor:
    """Which keys a query may read at all: bool (B or 1, 1, T, S)."""
    T, S = q.size(-2), k.size(-2)
    if not causal:
        return torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device)
    return torch.arange(S, device=q.device) <= query_positions(q, k, positions)[:, None, :, None]


def query_positions(q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor:
    """Where the queries stand among the keys: integers (B or 1, T)."""
    if positions is not None:
        return positions
    if q.size(-2) != k.size(-2):
        raise ValueError(
            f"{q.size(-2)} queries among {k.size(-2)} keys: pass `positions` to say where they stand"
        )
    return torch.arange(q.size(-2), device=q.device)[None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The reference for all that follows: equation 1, over the keys where `mask` (broadcast to (B, H, T, S)) is true."""
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, H, T, S)
    scores = scores.masked_fill(
        ~mask, float("-inf")
    )  # before the softmax: a masked key gets weight 0, the rest sum to 1
    return scores.softmax(dim=-1) @ v  # (B, H, T, D)


# ---- V0: every key ----------------------------------------------------------------------------------------------------


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    positions: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Every query reads every key (of its past, if causal): `masked_attention`, by PyTorch's fused kernel.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Time T x S, memory T (the kernel never stores the scores). Keys that
    are not `valid` (B, S) are read by none; each row needs one that is.
    """
    if positions is None and valid is None and q.size(-2) == k.size(-2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    mask = visible_mask(q, k, causal, positions)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if valid is None else mask & valid[:, None, None]
    )


# ---- the article's idea, done right: the highest-scoring keys -----------------------------------------------------------


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    causal: bool = True,
    positions: Tensor | None = None,
) -> Tensor:
    """Each query reads exactly its `top_k` highest-scoring keys, or all it may see where those are fewer.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Right, but not fast: to know the highest scores it computes them
    all, so time *and* memory are T x S, as in the article's snippet (its claim V1.1 is O(n log n)).
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}: each query must read at least one key")
    mask = visible_mask(q, k, causal, positions)
    with torch.no_grad():  # the choice is discrete: no gradient passes through it, only through the scores of the chosen
        scores = (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf"))  # (B, H, T, S)
        best = scores.topk(min(top_k, k.size(-2)), dim=-1).indices  # (B, H, T, top_k)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return masked_attention(
        q, k, v, mask & chosen
    )  # a query with fewer than top_k visible keys "chose" hidden ones


# ---- V1: choose blocks -----------------------------------------------------------------------------------------------------

METHODS, POOLS = ("flat", "tile", "tree", "window"), ("mean", "bound")
SCORES = (
    1 << 20
)  # numbers in memory at once while choosing, so that choosing takes memory linear in T


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
    """Choose the blocks of keys that each query, or each tile of queries, reads beside its own.

    q (B, H, T, D), k (B, H, S, D) -> block numbers (B, H, R, top_blocks), best first, -1 where there is none left; R = T, or
    ceil(T / block_size) if shared. `summaries` (B, H, N, P): those of `summarise`, if known, as in a cache.

    flat     scores every candidate: T x N products instead of dense attention's T x S
    shared   the same for one query a tile: N x N products
    tree     each level of a pyramid pools `fan_out` nodes of the level below; the `beam` best nodes are opened, level by level:
             T x (beam + 1) x fan_out products a level. Misses a block whose parents look dull.
    window   the nearest blocks, whatever they hold: what a choice must beat
    """
    if method not in METHODS or pool not in POOLS:
        raise ValueError(f"method={method!r}, pool={pool!r}: the choices are {METHODS} and {POOLS}")
    if block_size < 1 or top_blocks < 0 or beam < 1 or fan_out < 2:
        raise ValueError(
            f"block_size = {block_size} must be at least 1, top_blocks = {top_blocks} at least 0, "
            f"beam = {beam} at least 1, fan_out = {fan_out} at least 2"
        )
    if method == "tile" and positions is not None:
        raise ValueError(
            "a tile shares the choice of its first query: with `positions`, choose for that one by method='flat'"
        )
    own = query_positions(q, k, positions) // block_size  # (B or 1, T)
    N = -(-k.size(-2) // block_size)
    if method == "window":
        return window_blocks(own, N, top_blocks, causal).expand(*q.shape[:2], -1, -1)
    if method == "tile":
        q, own = (
            q[:, :, ::block_size] if causal else summarise(q, block_size, "mean"),
            own[:, ::block_size],
        )
    pyramid = [summarise(k, block_size, pool) if summaries is None else summaries]
    while method == "tree" and pyramid[-1].size(2) > beam * fan_out:
        pyramid.append(summarise_nodes(pyramid[-1], fan_out, pool))
    if (
        pool == "bound"
    ):  # max(q_d max_d, q_d min_d) is q_d max_d where q_d > 0 and q_d min_d elsewhere: again a dot product
        q = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
    width = N if len(pyramid) == 1 else (beam + 1) * fan_out * q.size(-1)
    step, rows = max(1, SCORES // (q.size(0) * q.size(1) * width)), []
    for start in range(0, q.size(2), step):
        part = slice(start, start + step)
        if positions is None and causal:  # the last row's own block: no later one is a candidate
            last = min(start + step, q.size(2)) - 1
            N = last if method == "tile" else last // block_size
        blocks = descend_tree(
            q[:, :, part], pyramid, own[:, part], N, top_blocks, causal, beam, fan_out
        )
        rows.append(
            F.pad(blocks, (0, top_blocks - blocks.size(-1)), value=-1)
        )  # early queries have fewer candidates
    return torch.cat(rows, dim=2)


def summarise(k: Tensor, block_size: int, pool: str) -> Tensor:
    """What is known of each block before its keys are read: (B, H, S, D) -> (B, H, N, P), P = D (mean) or 2 D (max and min)."""
    whole = k.size(-2) // block_size * block_size
    parts = [
        k[:, :, :whole].unflatten(2, (-1, block_size)),
        k[:, :, None, whole:],
    ]  # the last block may be short
    return torch.cat([pool_keys(part, pool) for part in parts if part.numel()], dim=2)


def pool_keys(keys: Tensor, pool: str) -> Tensor:
    """(..., n, D) -> (..., P)."""
    return (
        keys.mean(dim=-2)
        if pool == "mean"
        else torch.cat([keys.amax(dim=-2), keys.amin(dim=-2)], dim=-1)
    )


def summarise_nodes(nodes: Tensor, fan_out: int, pool: str) -> Tensor:
    """One level up the pyramid: (B, H, M, P) -> (B, H, ceil(M / fan_out), P). A short last family repeats its last child."""
    missing = -nodes.size(2) % fan_out
    family = torch.cat([nodes, nodes[:, :, -1:].expand(-1, -1, missing, -1)], dim=2).unflatten(
        2, (-1, fan_out)
    )
    if pool == "mean":
        return family.mean(dim=3)
    most, least = family.chunk(2, dim=-1)
    return torch.cat([most.amax(dim=3), least.amin(dim=3)], dim=-1)


def window_blocks(own: Tensor, N: int, top_blocks: int, causal: bool) -> Tensor:
    """The blocks beside the own (B or 1, T) -> (B or 1, 1, T, top_blocks): before it; not causal, by turns on both sides."""
    rank = torch.arange(top_blocks, device=own.device)
    offset = -1 - rank if causal else torch.where(rank % 2 == 0, -1 - rank // 2, 1 + rank // 2)
    blocks = own[:, None, :, None] + offset
    return blocks.masked_fill((blocks < 0) | (blocks >= N), -1)


def descend_tree(
    q: Tensor,
    pyramid: list[Tensor],
    own: Tensor,
    N: int,
    top_blocks: int,
    causal: bool,
    beam: int,
    fan_out: int,
) -> Tensor:
    """The best blocks for each query: from the pyramid's top down, open the best nodes. A pyramid of one level is "flat".

    q (B, H, R, P), pyramid: summaries (B, H, M, P), blocks first; own (B or 1, R); candidates are the blocks below N
    -> (B, H, R, top_blocks or fewer). The node that holds the own block is never scored (its summary may hold keys of the
    future) and always opened; a node before it lies wholly in the past, and so do its children.
    """
    level, own = len(pyramid) - 1, own[:, None, :, None]  # (B or 1, 1, R, 1)
    table = pyramid[level][:, :, : max(1, -(-N // fan_out**level))]
    nodes, holder = torch.arange(table.size(2), device=q.device), own // fan_out**level
    scores = (q @ table.mT).masked_fill_(
        nodes >= holder if causal else nodes == holder, float("-inf")
    )  # (B, H, R, M)
    while True:
        best, place = scores.topk(min(beam if level else top_blocks, scores.size(-1)), dim=-1)
        nodes = nodes.expand_as(scores).gather(-1, place)  # (B, H, R, beam)
        none = best == float("-inf")
        if level == 0:
            return nodes.masked_fill_(none, -1)
        nodes = torch.cat(
            [nodes.masked_fill_(none, pyramid[level].size(2)), holder.expand(*nodes.shape[:3], 1)],
            dim=-1,
        )
        nodes = (nodes[..., None] * fan_out + torch.arange(fan_out, device=q.device)).flatten(
            -2
        )  # their children
        level -= 1
        table, holder = pyramid[level], own // fan_out**level
        hidden = nodes >= holder if causal else (nodes == holder) | (nodes >= table.size(2))
        head = torch.arange(table.size(0) * table.size(1), device=q.device).view(
            *table.shape[:2], 1, 1
        ) * table.size(2)
        index = nodes.clamp(max=table.size(2) - 1) + head  # (B, H, R, C)
        keys = (
            table.flatten(0, 2).index_select(0, index.view(-1)).view(-1, nodes.size(-1), q.size(-1))
        )  # (B*H*R, C, P)
        scores = (
            torch.bmm(q.reshape(-1, 1, q.size(-1)), keys.mT)
            .view(nodes.shape)
            .masked_fill_(hidden, float("-inf"))
        )


# ---- V1: read blocks -------------------------------------------------------------------------------------------------------


def expand_to_queries(blocks: Tensor, T: int, block_size: int) -> Tensor:
    """(B, H, R, K) -> (B, H, T, K): a tile's choice, repeated for each of its queries."""
    if blocks.size(2) == T:
        return blocks
    if blocks.size(2) != -(-T // block_size):
        raise ValueError(
            f"{blocks.size(2)} rows of blocks for {T} queries: one row for each, or one for each tile of {block_size}"
        )
    return blocks.repeat_interleave(block_size, dim=2)[:, :, :T]


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
    """What a causal choice (B, H, R, K) over T tokens costs, as shares of dense attention's pairs T (T + 1) / 2.

    `keys_read` (H,): the pairs of query and key that are read. `flops` (): their arithmetic, 4 D a pair (q . k, weight . v),
    and that of choosing, 2 D a summary scored (4 D for a bound), by the same measure.
    """
    chosen = (expand_to_queries(blocks, T, block_size) >= 0).sum(
        dim=-1
    ) * block_size  # (B, H, T) keys beside the own block
    own = torch.arange(T, device=blocks.device) % block_size + 1
    keys_read = (chosen + own).double().mean(dim=(0, 2)) * 2 / (T + 1)
    N = -(-T // block_size)
    scored = {"flat": T * (N - 1) / 2, "tile": N * (N - 1) / 2, "window": 0, "tree": 0}[method]
    while method == "tree" and beam * fan_out < N:
        scored, N = scored + T * (beam + 1) * fan_out, -(-N // fan_out)
    if method == "tree":
        scored += T * N / 2
    choosing = scored * 2 * D * (2 if pool == "bound" else 1) / (4 * D * T * (T + 1) / 2)
    return {"keys_read": keys_read, "flops": keys_read.mean() + choosing}


def block_mask(
    q: Tensor,
    k: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool,
    positions: Tensor | None = None,
) -> Tensor:
    """Which keys each query reads, given its blocks: bool (B, H, T, S)."""
    (B, H, T, _), S = q.shape, k.size(-2)
    blocks, N = expand_to_queries(blocks, T, block_size), -(-S // block_size)
    own = query_positions(q, k, positions)[:, None, :, None] // block_size  # (B or 1, 1, T, 1)
    chosen = torch.zeros(
        B, H, T, N + 1, dtype=torch.bool, device=q.device
    )  # column N swallows the -1s
    chosen.scatter_(-1, blocks.masked_fill(blocks < 0, N), True)
    chosen = chosen[..., :N] | (torch.arange(N, device=q.device) == own)  # (B, H, T, N)
    return chosen.repeat_interleave(block_size, dim=-1)[..., :S] & visible_mask(
        q, k, causal, positions
    )


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block_size: int,
    causal: bool = True,
    positions: Tensor | None = None,
) -> Tensor:
    """What `block_attention` must equal: all scores, and a mask. Time and memory T x S."""
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
    """Each query reads its own block and those in its row of `blocks`, or of its tile's row.

    q (B, H, T, D), k and v (B, H, S, D), blocks (B, H, R, K), -1 for none, each at most once in a row -> (B, H, T, D).
    One result, by the quickest of four routes: gather each query's keys (decoding); on a GPU, FlexAttention; the kernels of
    nanods/attention_kernel.py; a mask over PyTorch's own, where a sequence is so short that visiting every pair costs less
    than sorting the pairs that are read (LOG.md). That mask is added to the scores, so a nan in a hidden key would pass it.
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


def choose_route(
    q: Tensor, k: Tensor, blocks: Tensor, block_size: int, positions: Tensor | None
) -> Literal["gather", "flex", "tile", "query", "mask"]:
    """Return the name of the fastest implementation of `block_attention` for these tensors.

    All routes give the same result. A test replaces this function to run one of them, such as the
    GPU's "flex" on a CPU. "mask" serves sequences so short that visiting every pair of query and
    key costs less than sorting the pairs that are read (measured: LOG.md).
    """
    T, S = q.size(2), k.size(2)
    if T * (blocks.size(-1) + 1) * block_size <= S:  # decoding: few queries, many keys
        return "gather"
    if positions is not None:
        return "mask"
    if q.is_cuda and block_size % 64 == 0:
        return "flex"
    if blocks.size(2) != T:
        return "tile"
    if T * block_size >= 1 << 14:
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
    """`block_attention` by touching no key but those read: work and memory T x (K + 1) x block_size."""
    B, H, T, _ = q.shape
    own = query_positions(q, k, positions)[:, None, :, None] // block_size  # (B or 1, 1, T, 1)
    read = torch.cat([own.expand(B, H, T, 1), blocks], dim=-1)  # (B, H, T, K + 1)
    key = read[..., None] * block_size + torch.arange(
        block_size, device=q.device
    )  # (B, H, T, K + 1, block_size)
    allowed = (read[..., None] >= 0) & (key < k.size(-2))
    if causal:
        allowed &= key <= query_positions(q, k, positions)[:, None, :, None, None]

    row = torch.arange(B, device=q.device)[:, None, None, None]
    head = torch.arange(H, device=q.device)[:, None, None]

    def gather(x: Tensor) -> Tensor:
        if (
            missing := -x.size(2) % block_size
        ):  # a cache holds whole blocks, and nothing is copied but what is read
            x = F.pad(x, (0, 0, 0, missing))
        return x.unflatten(2, (-1, block_size))[row, head, read.clamp(min=0)].flatten(
            3, 4
        )  # (B, H, T, (K + 1) * block_size, D)

    # Each query has keys of its own: to the reference, a batch of single queries (B, H, T, 1, D).
    out = masked_attention(q[..., None, :], gather(k), gather(v), allowed.view(B, H, T, 1, -1))
    return out.squeeze(-2)
