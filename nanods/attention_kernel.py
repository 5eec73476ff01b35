"""Fast block attention in plain PyTorch: time falls with the keys read, memory is linear in T.

This file implements `block_attention` of nanods/attention.py without ever storing a (T, T) matrix,
with its own backward pass. The loop that is fast depends on the selection:

    tile_attention    one selection per tile of queries: each tile gathers the blocks it attends to,
                      which gives equal small dense matrix products
    query_attention   one selection per query: each block of keys gathers the queries that attend to
                      it, from (query, block) pairs sorted by block

Both compute the softmax online (Milakov & Gimelshein 2018, arXiv:1805.02867). With m the largest
score so far, l the sum of exp(score - m) and a the sum of exp(score - m) v, new scores s with
values v update (m, l, a) to

    m' = max(m, max s)
    l' = exp(m - m') l + sum exp(s - m')
    a' = exp(m - m') a + sum exp(s - m') v

and the output is a / l after the last block. Of the forward pass both keep only the output and
lse = m + log l, one number per query. The backward pass recomputes the weights, P = exp(S - lse),
as FlashAttention does (Dao et al. 2022, arXiv:2205.14135, appendix B.2). With dO the gradient of
the output and delta = sum(dO * O) over each row,

    dV = P^T dO      dS = P * (dO V^T - delta)      dQ = dS K / sqrt(D)      dK = dS^T Q / sqrt(D)

Each chunk of work overwrites the intermediate results of the chunk before it (`Scratch`). They take
a megabyte or two and stay in the CPU's cache. Only the output and the gradients are as long as the
sequence.

Tested by tests/test_attention_kernel.py: equal to the masked reference, forward and backward.

Shapes: B batch, H heads, T tokens, D width of a head, S = block_size, N = ceil(T / S) blocks per
head, G = B*H*N blocks in total. The current block of a query is the block that contains it.
"""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

CHUNK_SCORES = 1 << 18  # scores in memory at once: 1 MiB in fp32, so that a chunk fits the cache
LOWEST = torch.finfo(torch.float32).min  # lower bound of a row's maximum: -inf - -inf would be nan


class Scratch:
    """Named buffers that are reused and grow to the largest shape requested."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.buffers = like, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor of `shape` in the memory of buffer `name`."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)


def split_into_blocks(x: Tensor, block_size: int) -> Tensor:
    """Split each head's sequence into blocks of at least fp32 precision: (B, H, T, D) -> (G, S, D).

    A short last block is padded with zeros.
    """
    x = x if x.dtype == torch.float64 else x.float()
    missing = -x.size(2) % block_size
    if missing:  # F.pad copies x even if it adds nothing
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, block_size, x.size(3))


def exclude_current_and_future(blocks: Tensor, current: Tensor, causal: bool) -> Tensor:
    """Return `blocks` with -1 instead of the current block and, if causal, of every later block."""
    return blocks.masked_fill(blocks >= current if causal else blocks == current, -1)


class Masks:
    """Hide the future keys of the current block and the padding of a short last block."""

    def __init__(self, T: int, block_size: int, causal: bool, device: torch.device) -> None:
        self.future = self.padding = None
        if causal:  # hides the padding too, because it comes after every real query
            ones = torch.ones(block_size, block_size, dtype=torch.bool, device=device)
            self.future = ones.triu(1)  # (S, S)
        elif T % block_size:
            self.padding = torch.arange(block_size, device=device) >= T % block_size  # (S,)
        self.last, self.N, self.T = T // block_size, -(-T // block_size), T

    def num_keys(self, block: int, block_size: int) -> int:
        """Return the number of keys in a block that are not padding."""
        return min(block_size, self.T - block % self.N * block_size)

    def apply_(self, scores: Tensor, blocks: Tensor) -> None:
        """Set hidden scores to -inf, in place.

        scores (n, S, W*S): n tiles with W blocks each; blocks (n, W): those blocks, current first.
        """
        n, S, _ = scores.shape
        if self.future is not None:
            scores[:, :, :S].masked_fill_(self.future, float("-inf"))
        if self.padding is not None:
            padding = (blocks % self.N == self.last)[..., None] & self.padding  # (n, W, S)
            scores.view(n, S, -1, S).masked_fill_(padding[:, None], float("-inf"))


# ---- one selection per tile of queries -----------------------------------------------------------


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, causal: bool = True
) -> Tensor:
    """Attend to the current block and the selected blocks of each tile of `block_size` queries.

    q, k, v (B, H, T, D), blocks (B, H, N, K) -> (B, H, T, D).
    """
    (B, H, T, D), N = q.shape, blocks.size(2)
    current = torch.arange(N, device=q.device)[:, None]  # (N, 1)
    selected = exclude_current_and_future(blocks, current, causal)
    selected = selected.sort(dim=-1, descending=True).values  # -1s last
    head = torch.arange(B * H, device=q.device).view(B, H, 1, 1) * N  # index of its first block
    selected = torch.where(selected < 0, -1, selected + head)
    selected = torch.cat([current.expand(B, H, N, 1) + head, selected], dim=-1)  # (B, H, N, K + 1)
    q_blocks, k_blocks, v_blocks = (split_into_blocks(x, block_size) for x in (q, k, v))
    masks = Masks(T, block_size, causal, q.device)
    out = TileAttention.apply(
        q_blocks, k_blocks, v_blocks, selected.view(B * H * N, -1), masks
    )  # (G, S, D)
    return out.view(B, H, N * block_size, D)[:, :, :T].to(q.dtype)


class TileAttention(torch.autograd.Function):
    """Compute attention tile by tile: q, k, v (G, S, D), selected (G, W) -> (G, S, D).

    `selected` holds the blocks that each tile attends to: the current block first, -1s last.
    """

    @staticmethod
    def chunks(selected: Tensor, block_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield chunks of tiles that attend to about equally many blocks.

        Each chunk: the tiles (n,), their blocks (n, W), and a mask of the empty entries, or None if
        no entry is empty. Empty entries hold the tile's current block. Its values get weight zero,
        and zero times nan is nan, so they must not come from another row of the batch.
        """
        counts, order = (selected >= 0).sum(dim=1).sort(descending=True)
        counts = counts.tolist()
        step = max(1, CHUNK_SCORES // (selected.size(1) * block_size**2))
        for first, tiles in zip(range(0, len(counts), step), order.split(step), strict=True):
            blocks = selected[tiles, : counts[first]]
            if counts[first + len(tiles) - 1] == counts[first]:
                yield tiles, blocks, None
            else:
                yield tiles, torch.where(blocks < 0, tiles[:, None], blocks), blocks < 0

    @staticmethod
    def chunk_scores(
        q: Tensor,
        k: Tensor,
        tiles: Tensor,
        blocks: Tensor,
        empty: Tensor | None,
        masks: Masks,
        scratch: Scratch,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a chunk's queries (n, S, D), keys (n, W*S, D) and masked scores (n, S, W*S)."""
        (n, W), (_, S, D) = blocks.shape, q.shape
        queries = torch.index_select(q, 0, tiles, out=scratch("queries", n, S, D)).mul_(D**-0.5)
        keys = torch.index_select(k, 0, blocks.view(-1), out=scratch("keys", n * W, S, D))
        keys = keys.view(n, W * S, D)
        scores = torch.bmm(queries, keys.mT, out=scratch("scores", n, S, W * S))
        masks.apply_(scores, blocks)
        if empty is not None:
            scores.view(n, S, W, S).masked_fill_(empty[:, None, :, None], float("-inf"))
        return queries, keys, scores

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, masks: Masks) -> Tensor:
        out, lse, scratch = torch.empty_like(q), q.new_empty(*q.shape[:2], 1), Scratch(q)
        for tiles, blocks, empty in TileAttention.chunks(selected, q.size(1)):
            queries, keys, scores = TileAttention.chunk_scores(
                q, k, tiles, blocks, empty, masks, scratch
            )
            row_max = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(row_max).exp_()
            total = weights.sum(dim=-1, keepdim=True)  # (n, S, 1)
            # The values overwrite the keys and the output overwrites the queries: both are used up.
            values = torch.index_select(v, 0, blocks.view(-1), out=keys.view(-1, *v.shape[1:]))
            chunk_out = torch.bmm(weights, values.view(keys.shape), out=queries).div_(total)
            out.index_copy_(0, tiles, chunk_out)
            lse.index_copy_(0, tiles, total.log_().add_(row_max))
        ctx.save_for_backward(q, k, v, selected, out, lse)
        ctx.masks = masks
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, selected, out, lse = ctx.saved_tensors
        # Before the gradients are allocated, so that the temporary product does not raise the peak.
        delta = (gradient * out).sum(dim=-1, keepdim=True)  # (G, S, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scratch = Scratch(q)
        for tiles, blocks, empty in TileAttention.chunks(selected, q.size(1)):
            queries, keys, scores = TileAttention.chunk_scores(
                q, k, tiles, blocks, empty, ctx.masks, scratch
            )
            weights, index = scores.sub_(lse[tiles]).exp_(), blocks.view(-1)
            values = torch.index_select(
                v, 0, index, out=scratch("values", len(index), *v.shape[1:])
            ).view(keys.shape)
            dout = torch.index_select(gradient, 0, tiles, out=scratch("dout", *queries.shape))
            dscores = torch.bmm(dout, values.mT, out=scratch("dscores", *scores.shape))
            dscores.sub_(delta[tiles]).mul_(weights)
            # From here on the values are used up: their buffer takes their gradients and the keys'.
            dvalues = torch.bmm(weights.mT, dout, out=values)
            dv.index_add_(0, index, dvalues.view(-1, *v.shape[1:]))
            dkeys = torch.bmm(dscores.mT, queries, out=values)
            dk.index_add_(0, index, dkeys.view(-1, *k.shape[1:]))
            dqueries = torch.bmm(dscores, keys, out=dout).mul_(q.size(-1) ** -0.5)
            dq.index_copy_(0, tiles, dqueries)
        return dq, dk, dv, None, None


# ---- one selection per query ---------------------------------------------------------------------


def query_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, causal: bool = True
) -> Tensor:
    """Attend to the current block and the selected blocks of each query.

    q, k, v (B, H, T, D), blocks (B, H, T, K) -> (B, H, T, D).
    """
    (B, H, T, D), K = q.shape, blocks.size(-1)
    N = -(-T // block_size)
    current = torch.arange(T, device=q.device)[:, None] // block_size  # (T, 1)
    selected = exclude_current_and_future(blocks, current, causal)
    # The queries that pad the last block select nothing.
    selected = F.pad(selected, (0, 0, 0, N * block_size - T), value=-1)
    head = torch.arange(B * H, device=q.device).view(B, H, 1, 1) * N  # index of its first block
    selected = torch.where(selected < 0, -1, selected + head)
    # Sort the (query, block) pairs by block: pair i belongs to query i // K.
    block, pair = selected.view(-1).sort(stable=True)
    # The pairs of block j are starts[j] : starts[j + 1].
    starts = torch.searchsorted(block, torch.arange(B * H * N + 1, device=q.device))
    q_blocks, k_blocks, v_blocks = (split_into_blocks(x, block_size) for x in (q, k, v))
    masks = Masks(T, block_size, causal, q.device)
    out = QueryAttention.apply(q_blocks, k_blocks, v_blocks, pair // K, starts, masks)  # (G, S, D)
    return out.view(B, H, N * block_size, D)[:, :, :T].to(q.dtype)


class QueryAttention(torch.autograd.Function):
    """Compute attention block by block of keys: q, k, v (G, S, D) -> (G, S, D).

    `queries` lists, block by block, the queries that selected the block. `starts` (G + 1,) says
    where the list of each block starts. Every query also attends to its current block.
    """

    MAX_QUERIES = 1024  # per step: so that the queries, scores and outputs stay in the CPU's cache

    @staticmethod
    def segments(queries: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each block with the queries (n,) that selected it, at most MAX_QUERIES at once."""
        bounds, step = starts.tolist(), QueryAttention.MAX_QUERIES
        for block in range(len(bounds) - 1):
            end = bounds[block + 1]
            for first in range(bounds[block], end, step):
                yield block, queries[first : min(first + step, end)]

    @staticmethod
    def current_block_scores(
        q: Tensor, k: Tensor, masks: Masks, scratch: Scratch
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield n tiles at a time, with the masked scores (n, S, S) against their own keys."""
        G, S, D = q.shape
        step = max(1, CHUNK_SCORES // S**2)
        for first in range(0, G, step):
            tiles = slice(first, min(first + step, G))
            out = scratch("current", tiles.stop - first, S, S)
            scores = torch.bmm(q[tiles], k[tiles].mT, out=out).mul_(D**-0.5)
            masks.apply_(scores, torch.arange(first, tiles.stop, device=q.device)[:, None])
            yield tiles, scores

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, starts: Tensor, masks: Masks
    ) -> Tensor:
        (G, S, D), scratch = q.shape, Scratch(q)
        # The running state of the online softmax, one row per query: a, m and l of the header.
        out, row_max, total = torch.empty_like(q), q.new_empty(G, S, 1), q.new_empty(G, S, 1)
        for tiles, scores in QueryAttention.current_block_scores(q, k, masks, scratch):
            torch.amax(scores, dim=-1, keepdim=True, out=row_max[tiles]).clamp_(min=LOWEST)
            weights = scores.sub_(row_max[tiles]).exp_()
            torch.sum(weights, dim=-1, keepdim=True, out=total[tiles])
            torch.bmm(weights, v[tiles], out=out[tiles])
        q_rows, out_rows = q.view(-1, D), out.view(-1, D)
        max_rows, total_rows = row_max.view(-1), total.view(-1)
        for block, index in QueryAttention.segments(queries, starts):
            n, end = len(index), masks.num_keys(block, S)
            q_n = torch.index_select(q_rows, 0, index, out=scratch("queries", n, D)).mul_(D**-0.5)
            scores = torch.mm(q_n, k[block, :end].T, out=scratch("scores", n, end))
            old_max = max_rows[index]
            new_max = torch.maximum(old_max, scores.amax(dim=-1))  # (n,)
            weights = scores.sub_(new_max[:, None]).exp_()
            rescale = old_max.sub_(new_max).exp_()
            max_rows.index_copy_(0, index, new_max)
            new_total = total_rows[index].mul_(rescale).add_(weights.sum(dim=-1))
            total_rows.index_copy_(0, index, new_total)
            out_n = torch.index_select(out_rows, 0, index, out=q_n)  # the queries are used up
            out_n.mul_(rescale[:, None]).addmm_(weights, v[block, :end])
            out_rows.index_copy_(0, index, out_n)
        out.div_(total)
        ctx.save_for_backward(q, k, v, queries, starts, out, total.log_().add_(row_max))
        ctx.masks = masks
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, queries, starts, out, lse = ctx.saved_tensors
        (_, S, D), scratch = q.shape, Scratch(q)
        gradient = gradient.contiguous()
        delta = (gradient * out).sum(dim=-1, keepdim=True)  # (G, S, 1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for tiles, scores in QueryAttention.current_block_scores(q, k, ctx.masks, scratch):
            weights = scores.sub_(lse[tiles]).exp_()
            torch.bmm(weights.mT, gradient[tiles], out=dv[tiles])
            dscores = torch.bmm(gradient[tiles], v[tiles].mT, out=scratch("dscores", *scores.shape))
            dscores.sub_(delta[tiles]).mul_(weights)
            torch.bmm(dscores.mT, q[tiles], out=dk[tiles]).mul_(D**-0.5)
            torch.bmm(dscores, k[tiles], out=dq[tiles])
        q_rows, gradient_rows, dq_rows = q.view(-1, D), gradient.view(-1, D), dq.view(-1, D)
        lse_rows, delta_rows = lse.view(-1, 1), delta.view(-1, 1)
        for block, index in QueryAttention.segments(queries, starts):
            n, end = len(index), ctx.masks.num_keys(block, S)
            keys, values = k[block, :end], v[block, :end]
            q_n = torch.index_select(q_rows, 0, index, out=scratch("queries", n, D)).mul_(D**-0.5)
            dout = torch.index_select(gradient_rows, 0, index, out=scratch("dout", n, D))
            scores = torch.mm(q_n, keys.T, out=scratch("scores", n, end))
            weights = scores.sub_(lse_rows[index]).exp_()
            dscores = torch.mm(dout, values.T, out=scratch("dscores", n, end))
            dscores.sub_(delta_rows[index]).mul_(weights)
            dv[block, :end].addmm_(weights.T, dout)
            dk[block, :end].addmm_(dscores.T, q_n)
            dq_rows.index_add_(0, index, torch.mm(dscores, keys, out=dout))
        return dq.mul_(D**-0.5), dk, dv, None, None, None


# ---- on a GPU: FlexAttention ---------------------------------------------------------------------


FLEX_BLOCK = 128
"""A GPU's `block_size` must be a multiple of this, as FlexAttention's default tiles divide it. On
an H200, in bf16, the backward kernel refused masks of smaller blocks, whatever tiles one asks for
(PyTorch 2.11)."""


def flex_block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, causal: bool = True
) -> Tensor:
    """Compute block attention by PyTorch's FlexAttention, whose kernel skips unselected blocks.

    q, k, v (B, H, T, D), blocks (B, H, N, K), one row per tile, -> (B, H, T, D). One row per query,
    (B, H, T, K), works too, but then each tile visits the union of its queries' selections, which
    is nearly every block: on a GPU, select per tile. On a GPU `block_size` must be a multiple of
    FLEX_BLOCK. On a CPU FlexAttention runs forward only and computes every pair: for testing.
    """
    (B, H, T, _), N = q.shape, -(-q.size(2) // block_size)
    R = blocks.size(2)
    per_tile = R == N
    current = torch.arange(R, device=q.device)[:, None] // (1 if per_tile else block_size)  # (R, 1)
    index = exclude_current_and_future(blocks, current, causal)
    # Column N receives the -1s and is cut off afterwards.
    selected = torch.zeros(B, H, R, N + 1, dtype=torch.bool, device=q.device)
    selected = selected.scatter_(-1, index.masked_fill(index < 0, N), True)[..., :N]
    selected = selected | (torch.arange(N, device=q.device) == current)  # (B, H, R, N)
    queries_per_row = block_size if per_tile else 1

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether `query` attends to `key`."""
        attends = selected[b, h, query // queries_per_row, key // block_size]
        return attends & (key <= query) if causal else attends

    tiles = selected  # (B, H, N, N): whether a tile of queries visits a block of keys
    if not per_tile:
        padded = F.pad(selected, (0, 0, 0, N * block_size - T))
        tiles = padded.unflatten(2, (N, block_size)).any(dim=3)
    # FlexAttention wants two lists of blocks: "full" ones, of which every pair is computed, and
    # "partial" ones, whose pairs are decided by mask_mod.
    block = torch.arange(N, device=q.device)
    full = tiles & (block != block[:, None]) & per_tile
    partial = tiles & ~full
    block_mask = BlockMask.from_kv_blocks(
        partial.sum(dim=-1, dtype=torch.int32),
        true_indices_first(partial),
        full.sum(dim=-1, dtype=torch.int32),
        true_indices_first(full),
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(T, T),
    )
    if not q.is_cuda:
        return flex_attention(q, k, v, block_mask=block_mask)
    # Inside torch.compile of the whole model, the outer call compiles the kernel too.
    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return attend(q, k, v, block_mask=block_mask)


def true_indices_first(x: Tensor) -> Tensor:
    """Return the indices of the last dimension, those of true elements first: int32, like x."""
    return x.int().argsort(dim=-1, descending=True, stable=True).int()


@functools.cache
def compiled_flex_attention():
    """Return FlexAttention compiled to its fused kernel, once per process."""
    return torch.compile(flex_attention)
