"""V1's idea: attention in which each query reads only the keys that matter to it.

The ladder, each step the one before with one idea changed:

    dense_attention            every query reads every key of its past
    topk_attention             ... only its `top_k` highest-scoring keys, but still scores all of them
    select_blocks              ... scores one summary per block of keys, so most keys are never scored at all
      + block_attention        ... and reads the keys of the chosen blocks and of its own block

Choosing (`select_blocks`) and reading (`block_attention`) are separate, so that one naive reference,
`block_attention_reference`, checks the reading whatever the choice was.

Equations. Dense, with D the width of a head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1):

    attention(q, K, V) = softmax(q K^T / sqrt(D)) V

Blocks (MoBA: Lu et al. 2025, arXiv:2502.13189, eq. 2-6), with pooled_j the mean of the keys of block j:

    chosen(q)       = the top_blocks largest of q . pooled_j, over blocks j that lie wholly before q's own block
    attention(q)    = softmax over the keys of chosen(q) and of q's own block, up to q itself

Causal by construction: a block with even one key in q's future is never scored, so no summary can leak it. The own block
is always read, under the ordinary causal mask, and never scored or listed.

Left out on purpose: sharing one choice among queries, hierarchies over blocks, and kernels whose *time* falls with the
number of keys read. Over a whole sequence `block_attention` shows what sparsity is; it does not yet win a race.

Pinned by tests/test_attention.py: top_k >= T equals dense; all blocks chosen equals dense; gathered equals masked,
forward and backward; what comes after a token changes neither its choice nor its output.

Shapes: B batch, H heads, D width of a head, T queries, S keys (S = T unless a cache holds more), K = `top_blocks`.
`positions` (B or 1, T) says where each query stands among the keys, for decoding with a cache: a query at position p reads
the keys 0..p. By default query t stands at t.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(q: Tensor, k: Tensor, causal: bool, positions: Tensor | None) -> Tensor:
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
        raise ValueError(f"{q.size(-2)} queries among {k.size(-2)} keys: pass `positions` to say where they stand")
    return torch.arange(q.size(-2), device=q.device)[None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The reference for all that follows: equation 1, over the keys where `mask` (broadcast to (B, H, T, S)) is true."""
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5  # (B, H, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))  # before the softmax: a masked key gets weight 0, the rest sum to 1
    return scores.softmax(dim=-1) @ v  # (B, H, T, D)


# ---- V0: every key ----------------------------------------------------------------------------------------------------


def dense_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, positions: Tensor | None = None) -> Tensor:
    """Every query reads every key (of its past, if causal): `masked_attention`, by PyTorch's fused kernel.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Time T x S, memory T (the kernel never stores the scores).
    """
    if positions is None and q.size(-2) == k.size(-2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(q, k, causal, positions))


# ---- the article's idea, done right: the highest-scoring keys -----------------------------------------------------------


def topk_attention(q: Tensor, k: Tensor, v: Tensor, top_k: int, causal: bool = True, positions: Tensor | None = None) -> Tensor:
    """Each query reads exactly its `top_k` highest-scoring keys, or all it may see where those are fewer.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). Right, but not fast: to know the highest scores it computes them
    all, so time *and* memory are T x S, as in the article's snippet (its claim V1.1 is O(n log n)).
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}: each query must read at least one key")
    mask = visible(q, k, causal, positions)
    with torch.no_grad():  # the choice is discrete: no gradient passes through it, only through the scores of the chosen
        scores = (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf"))  # (B, H, T, S)
        best = scores.topk(min(top_k, k.size(-2)), dim=-1).indices  # (B, H, T, top_k)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return masked_attention(q, k, v, mask & chosen)  # a query with fewer than top_k visible keys "chose" hidden ones


# ---- V1: the best blocks -------------------------------------------------------------------------------------------------


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
) -> Tensor:
    """Choose for each query the blocks of keys that it will read beside its own.

    q (B, H, T, D), k (B, H, S, D) -> block numbers (B, H, T, top_blocks), best first, -1 where there is none left.
    `method="flat"` scores every candidate: T x S / block_size products instead of dense attention's T x S. `pool="mean"`
    summarises a block by the mean of its keys. Candidates are the blocks wholly before the query's own block if causal,
    otherwise all but the own. No gradient: which blocks are best is learnt through the keys and queries that are read.
    """
    if method != "flat" or pool != "mean":
        raise ValueError(f"method={method!r}, pool={pool!r}: the choices are method='flat', pool='mean'")
    if block_size < 1 or top_blocks < 0:
        raise ValueError(f"block_size = {block_size} must be at least 1, top_blocks = {top_blocks} at least 0")
    pooled = pool_blocks(k, block_size)  # (B, H, N, D)
    N = pooled.size(-2)
    own = query_positions(q, k, positions)[:, None, :, None] // block_size  # (B or 1, 1, T, 1)
    block = torch.arange(N, device=q.device)
    candidate = block < own if causal else block != own  # (B or 1, 1, T, N)
    scores = (q @ pooled.transpose(-2, -1)).masked_fill(~candidate, float("-inf"))  # (B, H, T, N)
    best, blocks = scores.topk(min(top_blocks, N), dim=-1)
    blocks = blocks.masked_fill(best == float("-inf"), -1)
    return F.pad(blocks, (0, top_blocks - blocks.size(-1)), value=-1)


def pool_blocks(k: Tensor, block_size: int) -> Tensor:
    """The mean key of each block: (B, H, S, D) -> (B, H, N, D), N = ceil(S / block_size); the last may be short."""
    S = k.size(-2)
    sums = into_blocks(k, block_size).sum(dim=-2)  # padding adds zeros
    counts = torch.full((sums.size(-2), 1), block_size, dtype=k.dtype, device=k.device)
    counts[-1] = S - block_size * (len(counts) - 1)
    return sums / counts


def into_blocks(x: Tensor, block_size: int) -> Tensor:
    """Cut into blocks, the last filled up with zeros: (B, H, S, D) -> (B, H, N, block_size, D)."""
    B, H, S, D = x.shape
    return F.pad(x, (0, 0, 0, -S % block_size)).view(B, H, -1, block_size, D)


def block_mask(q: Tensor, k: Tensor, blocks: Tensor, block_size: int, causal: bool, positions: Tensor | None = None) -> Tensor:
    """Which keys each query reads, given its blocks: bool (B, H, T, S)."""
    B, H, T, _ = q.shape
    if blocks.shape[:3] != (B, H, T):
        raise ValueError(f"blocks of shape {tuple(blocks.shape)} for queries {tuple(q.shape)}: one row per query, please")
    S = k.size(-2)
    N = -(-S // block_size)
    own = query_positions(q, k, positions)[:, None, :, None] // block_size  # (B or 1, 1, T, 1)
    chosen = torch.zeros(B, H, T, N + 1, dtype=torch.bool, device=q.device)  # column N swallows the -1s
    chosen.scatter_(-1, blocks.masked_fill(blocks < 0, N), True)
    chosen = chosen[..., :N] | (torch.arange(N, device=q.device) == own)  # (B, H, T, N)
    return chosen.repeat_interleave(block_size, dim=-1)[..., :S] & visible(q, k, causal, positions)


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
    """Each query reads its own block and those in its row of `blocks`.

    q (B, H, T, D), k and v (B, H, S, D), blocks (B, H, T, K) with -1 for none -> (B, H, T, D). Two routes to one result:
    gather the keys that are read, or mask PyTorch's kernel. Gathering copies T x (K + 1) x block_size keys, so it pays
    where those are no more than the S keys there are: when decoding with a cache. Over a whole sequence it would copy each
    key many times, and the masked kernel, which visits every pair, is quicker.
    """
    if q.size(-2) * (blocks.size(-1) + 1) * block_size <= k.size(-2):
        return gathered_block_attention(q, k, v, blocks, block_size, causal, positions)
    mask = block_mask(q, k, blocks, block_size, causal, positions)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


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
    (B, H, T, D), K = q.shape, blocks.size(-1)
    own = query_positions(q, k, positions)[:, None, :, None] // block_size  # (B or 1, 1, T, 1)
    read = torch.cat([own.expand(B, H, T, 1), blocks], dim=-1)  # (B, H, T, K + 1)
    key = read[..., None] * block_size + torch.arange(block_size, device=q.device)  # (B, H, T, K + 1, block_size)
    allowed = (read[..., None] >= 0) & (key < k.size(-2))
    if causal:
        allowed &= key <= query_positions(q, k, positions)[:, None, :, None, None]

    def gather(x: Tensor) -> Tensor:
        x = into_blocks(x, block_size).flatten(-2)  # (B, H, N, block_size * D)
        index = read.clamp(min=0).view(B, H, -1, 1).expand(-1, -1, -1, block_size * D)
        return x.gather(2, index).view(B, H, T, (K + 1) * block_size, D)

    # Each query has keys of its own: to the reference, a batch of single queries (B, H, T, 1, D).
    out = masked_attention(q[..., None, :], gather(k), gather(v), allowed.view(B, H, T, 1, -1))
    return out.squeeze(-2)
