"""The fast path of sparse attention: time that falls with the keys read, memory linear in T, a backward of its own.

`block_attention` of nanods/attention.py, in plain PyTorch, without ever making a (T, T) matrix. A choice made once for a
tile of queries and one made by each query want opposite loops:

    tile_attention    each tile of queries gathers the blocks that it reads: dense little matrix products, all alike
    query_attention   each block of keys gathers the queries that read it: (query, block) pairs sorted by block

Both compute a softmax whose parts come one after another (Milakov & Gimelshein 2018, arXiv:1805.02867): with m the largest
score so far, l the sum of exp(score - m) and a the sum of exp(score - m) v, a new part changes (m, l, a) to

    m' = max(m, its scores),    l' = exp(m - m') l + sum exp(its scores - m'),    a' likewise;    output = a / l at the end

and both keep of the forward pass only its output and lse = m + log l, one number a query. The backward computes the weights
again, P = exp(S - lse), as FlashAttention does (Dao et al. 2022, arXiv:2205.14135, appendix B.2): with dO the gradient of
the output and delta = sum(dO * O) over each row,

    dV = P^T dO        dS = P * (dO V^T - delta)        dQ = dS K / sqrt(D)        dK = dS^T Q / sqrt(D)

Each chunk writes its intermediate results where the chunk before wrote its own (`Scratch`), in a megabyte or two that stay in
the cache: nothing else but the output and the gradients is ever as long as the sequence.

Pinned by tests/test_attention_kernel.py: equal to the masked reference, forward and backward.

Shapes: B batch, H heads, T tokens, D width of a head, S = block_size, N = ceil(T / S) blocks, G = B*H*N blocks in all.
"""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

CHUNK = 1 << 18  # scores in memory at once: a megabyte in fp32, so that a chunk stays near the core
LOWEST = torch.finfo(torch.float32).min  # as the first maximum: -inf - -inf would be nan


class Scratch:
    """Named buffers that grow to the largest shape asked for."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.buffers = like, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size)
        return self.buffers[name][:size].view(shape)


def into_tiles(x: Tensor, block_size: int) -> Tensor:
    """Cut each head's sequence into blocks, the last filled up with zeros, in at least fp32: (B, H, T, D) -> (G, S, D)."""
    x = x if x.dtype == torch.float64 else x.float()
    if missing := -x.size(2) % block_size:  # F.pad would copy even to add nothing
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, block_size, x.size(3))


def readable(blocks: Tensor, own: Tensor, causal: bool) -> Tensor:
    """Blocks to read beside the own: -1 instead of those that are the own or, if causal, not wholly in the past."""
    return blocks.masked_fill(blocks >= own if causal else blocks == own, -1)


class Masks:
    """What a tile's queries may not see: the future in their own block, and the filling of a short last block."""

    def __init__(self, T: int, block_size: int, causal: bool, device: torch.device) -> None:
        ones = torch.ones(block_size, block_size, dtype=torch.bool, device=device)
        self.future = (
            ones.triu(1) if causal else None
        )  # hides the filling too: it comes after every real query
        self.filling = (
            torch.arange(block_size, device=device) >= T % block_size
            if T % block_size and not causal
            else None
        )
        self.last, self.N, self.T = T // block_size, -(-T // block_size), T

    def keys(self, block: int, block_size: int) -> int:
        """How many of a block's keys are real."""
        return min(block_size, self.T - block % self.N * block_size)

    def apply_(self, scores: Tensor, read: Tensor) -> None:
        """Set hidden scores (n, S, W*S) to -inf, in place, for the blocks `read` (n, W), each tile's own first."""
        n, S, _ = scores.shape
        if self.future is not None:
            scores[:, :, :S].masked_fill_(self.future, float("-inf"))
        if self.filling is not None:
            filling = (read % self.N == self.last)[..., None] & self.filling  # (n, W, S)
            scores.view(n, S, -1, S).masked_fill_(filling[:, None], float("-inf"))


# ---- one choice for a tile of queries ------------------------------------------------------------------------------------


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, causal: bool = True
) -> Tensor:
    """Each tile of `block_size` queries reads its own block and those in its row: q, k, v (B, H, T, D), blocks (B, H, N, K)."""
    (B, H, T, D), N = q.shape, blocks.size(2)
    own = torch.arange(N, device=q.device)[:, None]  # (N, 1)
    read = (
        readable(blocks, own, causal).sort(dim=-1, descending=True).values
    )  # those that are -1 come last
    head = torch.arange(B * H, device=q.device).view(B, H, 1, 1) * N
    read = torch.cat(
        [own.expand(B, H, N, 1) + head, torch.where(read < 0, -1, read + head)], dim=-1
    )
    tiles = (into_tiles(x, block_size) for x in (q, k, v))
    out = TileAttention.apply(
        *tiles, read.view(B * H * N, -1), Masks(T, block_size, causal, q.device)
    )  # (G, S, D)
    return out.view(B, H, N * block_size, D)[:, :, :T].to(q.dtype)


class TileAttention(torch.autograd.Function):
    """q, k, v (G, S, D) and for each tile the blocks that it reads, its own first, read (G, W) with -1s last -> (G, S, D)."""

    @staticmethod
    def chunks(read: Tensor, block_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Some tiles (n,) that read about equally many blocks, those blocks (n, W), and a mask of those that are none, or None.

        In the place of none stands the own block: its numbers are multiplied by zero, so they must not be another row's nan.
        """
        counts, order = (read >= 0).sum(dim=1).sort(descending=True)
        counts, step = counts.tolist(), max(1, CHUNK // (read.size(1) * block_size**2))
        for first, tiles in zip(range(0, len(counts), step), order.split(step), strict=True):
            blocks = read[tiles, : counts[first]]
            if counts[first + len(tiles) - 1] == counts[first]:
                yield tiles, blocks, None
            else:
                yield tiles, torch.where(blocks < 0, tiles[:, None], blocks), blocks < 0

    @staticmethod
    def scores(
        q: Tensor,
        k: Tensor,
        tiles: Tensor,
        read: Tensor,
        none: Tensor | None,
        masks: Masks,
        scratch: Scratch,
    ):
        """The queries and keys of a chunk and their masked scores (n, S, W*S)."""
        (n, W), (_, S, D) = read.shape, q.shape
        queries = torch.index_select(q, 0, tiles, out=scratch("queries", n, S, D)).mul_(D**-0.5)
        keys = torch.index_select(k, 0, read.view(-1), out=scratch("keys", n * W, S, D)).view(
            n, W * S, D
        )
        scores = torch.bmm(queries, keys.mT, out=scratch("scores", n, S, W * S))
        masks.apply_(scores, read)
        if none is not None:
            scores.view(n, S, W, S).masked_fill_(none[:, None, :, None], float("-inf"))
        return queries, keys, scores

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, read: Tensor, masks: Masks) -> Tensor:
        out, lse, scratch = torch.empty_like(q), q.new_empty(*q.shape[:2], 1), Scratch(q)
        for tiles, blocks, none in TileAttention.chunks(read, q.size(1)):
            queries, keys, scores = TileAttention.scores(q, k, tiles, blocks, none, masks, scratch)
            largest = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(dim=-1, keepdim=True)  # (n, S, 1)
            values = torch.index_select(
                v, 0, blocks.view(-1), out=keys.view(-1, *v.shape[1:])
            ).view(keys.shape)
            out.index_copy_(0, tiles, torch.bmm(weights, values, out=queries).div_(total))
            lse.index_copy_(0, tiles, total.log_().add_(largest))
        ctx.save_for_backward(q, k, v, read, out, lse)
        ctx.masks = masks
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, read, out, lse = ctx.saved_tensors
        delta = (gradient * out).sum(
            dim=-1, keepdim=True
        )  # (G, S, 1); before the next line, for a lower peak of memory
        dq, dk, dv, scratch = (
            torch.empty_like(q),
            torch.zeros_like(k),
            torch.zeros_like(v),
            Scratch(q),
        )
        for tiles, blocks, none in TileAttention.chunks(read, q.size(1)):
            queries, keys, scores = TileAttention.scores(
                q, k, tiles, blocks, none, ctx.masks, scratch
            )
            weights, index = scores.sub_(lse[tiles]).exp_(), blocks.view(-1)
            values = torch.index_select(
                v, 0, index, out=scratch("values", len(index), *v.shape[1:])
            ).view(keys.shape)
            dout = torch.index_select(gradient, 0, tiles, out=scratch("dout", *queries.shape))
            dscores = (
                torch.bmm(dout, values.mT, out=scratch("dscores", *scores.shape))
                .sub_(delta[tiles])
                .mul_(weights)
            )
            dvalues = torch.bmm(weights.mT, dout, out=values)
            dv.index_add_(0, index, dvalues.view(-1, *v.shape[1:]))
            dkeys = torch.bmm(dscores.mT, queries, out=values)
            dk.index_add_(0, index, dkeys.view(-1, *k.shape[1:]))
            dq.index_copy_(0, tiles, torch.bmm(dscores, keys, out=dout).mul_(q.size(-1) ** -0.5))
        return dq, dk, dv, None, None


# ---- a choice by each query ------------------------------------------------------------------------------------------------


def query_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, causal: bool = True
) -> Tensor:
    """Each query reads its own block and those in its row: q, k, v (B, H, T, D), blocks (B, H, T, K)."""
    (B, H, T, D), K = q.shape, blocks.size(-1)
    N = -(-T // block_size)
    own = torch.arange(T, device=q.device)[:, None] // block_size  # (T, 1)
    read = F.pad(
        readable(blocks, own, causal), (0, 0, 0, N * block_size - T), value=-1
    )  # queries that fill up read none
    head = torch.arange(B * H, device=q.device).view(B, H, 1, 1) * N
    block, pair = (
        torch.where(read < 0, -1, read + head).view(-1).sort(stable=True)
    )  # of each (query, block) pair, by block
    starts = torch.searchsorted(
        block, torch.arange(B * H * N + 1, device=q.device)
    )  # block j has starts[j] : starts[j + 1]
    tiles = (into_tiles(x, block_size) for x in (q, k, v))
    out = QueryAttention.apply(
        *tiles, pair // K, starts, Masks(T, block_size, causal, q.device)
    )  # (G, S, D)
    return out.view(B, H, N * block_size, D)[:, :, :T].to(q.dtype)


class QueryAttention(torch.autograd.Function):
    """q, k, v (G, S, D); the queries sorted by a block that they read, beside their own, with each block's start (G + 1,)."""

    ROWS = 1024  # of a block's queries at once: so that they, their scores and their outputs stay in the cache

    @staticmethod
    def segments(queries: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each block and the queries (n,) that read it, at most ROWS at once."""
        bounds = starts.tolist()
        for block in range(len(bounds) - 1):
            for first in range(bounds[block], bounds[block + 1], QueryAttention.ROWS):
                yield block, queries[first : min(first + QueryAttention.ROWS, bounds[block + 1])]

    @staticmethod
    def own_scores(
        q: Tensor, k: Tensor, masks: Masks, scratch: Scratch
    ) -> Iterator[tuple[slice, Tensor]]:
        """The masked scores (n, S, S) of the tiles with their own blocks, some tiles at a time."""
        G, S, _ = q.shape
        step = max(1, CHUNK // S**2)
        for first in range(0, G, step):
            tiles = slice(first, min(first + step, G))
            scores = torch.bmm(
                q[tiles], k[tiles].mT, out=scratch("own", tiles.stop - first, S, S)
            ).mul_(q.size(-1) ** -0.5)
            masks.apply_(scores, torch.arange(first, tiles.stop, device=q.device)[:, None])
            yield tiles, scores

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, starts: Tensor, masks: Masks
    ) -> Tensor:
        (G, S, D), scratch = q.shape, Scratch(q)
        out, largest, total = torch.empty_like(q), q.new_empty(G, S, 1), q.new_empty(G, S, 1)
        for tiles, scores in QueryAttention.own_scores(q, k, masks, scratch):
            torch.amax(scores, dim=-1, keepdim=True, out=largest[tiles]).clamp_(min=LOWEST)
            weights = scores.sub_(largest[tiles]).exp_()
            torch.sum(weights, dim=-1, keepdim=True, out=total[tiles])
            torch.bmm(weights, v[tiles], out=out[tiles])
        rows, sums, tops, totals = q.view(-1, D), out.view(-1, D), largest.view(-1), total.view(-1)
        for block, index in QueryAttention.segments(queries, starts):
            n, end = len(index), masks.keys(block, S)
            queries_ = torch.index_select(rows, 0, index, out=scratch("queries", n, D)).mul_(
                D**-0.5
            )
            scores = torch.mm(queries_, k[block, :end].T, out=scratch("scores", n, end))
            before = tops[index]
            after = torch.maximum(before, scores.amax(dim=-1))  # (n,)
            weights = scores.sub_(after[:, None]).exp_()
            shrink = before.sub_(after).exp_()
            tops.index_copy_(0, index, after)
            totals.index_copy_(0, index, totals[index].mul_(shrink).add_(weights.sum(dim=-1)))
            sum_ = (
                torch.index_select(sums, 0, index, out=queries_)
                .mul_(shrink[:, None])
                .addmm_(weights, v[block, :end])
            )
            sums.index_copy_(0, index, sum_)
        out.div_(total)
        ctx.save_for_backward(q, k, v, queries, starts, out, total.log_().add_(largest))
        ctx.masks = masks
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, queries, starts, out, lse = ctx.saved_tensors
        (_, S, D), scratch = q.shape, Scratch(q)
        gradient = gradient.contiguous()
        delta = (gradient * out).sum(dim=-1, keepdim=True)  # (G, S, 1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for tiles, scores in QueryAttention.own_scores(q, k, ctx.masks, scratch):
            weights = scores.sub_(lse[tiles]).exp_()
            torch.bmm(weights.mT, gradient[tiles], out=dv[tiles])
            dscores = torch.bmm(gradient[tiles], v[tiles].mT, out=scratch("dscores", *scores.shape))
            dscores.sub_(delta[tiles]).mul_(weights)
            torch.bmm(dscores.mT, q[tiles], out=dk[tiles]).mul_(D**-0.5)
            torch.bmm(dscores, k[tiles], out=dq[tiles])
        rows, gradients, dqs = q.view(-1, D), gradient.view(-1, D), dq.view(-1, D)
        lses, deltas = lse.view(-1, 1), delta.view(-1, 1)
        for block, index in QueryAttention.segments(queries, starts):
            n, end = len(index), ctx.masks.keys(block, S)
            queries_ = torch.index_select(rows, 0, index, out=scratch("queries", n, D)).mul_(
                D**-0.5
            )
            dout = torch.index_select(gradients, 0, index, out=scratch("dout", n, D))
            weights = (
                torch.mm(queries_, k[block, :end].T, out=scratch("scores", n, end))
                .sub_(lses[index])
                .exp_()
            )
            dscores = (
                torch.mm(dout, v[block, :end].T, out=scratch("dscores", n, end))
                .sub_(deltas[index])
                .mul_(weights)
            )
            dv[block, :end].addmm_(weights.T, dout)
            dk[block, :end].addmm_(dscores.T, queries_)
            dqs.index_add_(0, index, torch.mm(dscores, k[block, :end], out=dout))
        return dq.mul_(D**-0.5), dk, dv, None, None, None


# ---- on a GPU: written from FlexAttention's documentation, not yet run on one ----------------------------------------------


# Its kernel's own tiles must divide the blocks of the mask, and by default they are of 128: these suit any multiple of 64.
KERNEL_TILES = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "BLOCK_M1": 32,
    "BLOCK_N1": 64,
    "BLOCK_M2": 64,
    "BLOCK_N2": 32,
}


def flex_block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int, causal: bool = True
) -> Tensor:
    """The same choice as a BlockMask of PyTorch's FlexAttention, which compiles it to a kernel that skips what is not read.

    blocks (B, H, N, K), or (B, H, T, K): then a tile visits the union of its queries' choices, which is nearly everything, so
    choose once a tile on a GPU. There `block_size` must be a multiple of 64. Without CUDA it runs uncompiled, forward only and
    over every pair: for testing.
    """
    (B, H, T, _), N = q.shape, -(-q.size(2) // block_size)
    R = blocks.size(2)
    own = torch.arange(R, device=q.device)[:, None] // (1 if R == N else block_size)  # (R, 1)
    read = readable(blocks, own, causal)
    chosen = torch.zeros(
        B, H, R, N + 1, dtype=torch.bool, device=q.device
    )  # column N swallows the -1s
    chosen = chosen.scatter_(-1, read.masked_fill(read < 0, N), True)[..., :N] | (
        torch.arange(N, device=q.device) == own
    )
    rows = block_size if R == N else 1  # queries to a row of the choice

    def reads(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = chosen[b, h, query // rows, key // block_size]
        return seen & (key <= query) if causal else seen

    tiles = (
        chosen
        if R == N
        else F.pad(chosen, (0, 0, 0, N * block_size - T)).unflatten(2, (N, block_size)).any(dim=3)
    )
    whole = (
        tiles
        & (torch.arange(N, device=q.device) != torch.arange(N, device=q.device)[:, None])
        & (R == N)
    )
    some = tiles & ~whole  # blocks of which some pairs are read, and those of which all are
    numbers = (
        f(kind)
        for kind in (some, whole)
        for f in (lambda x: x.sum(dim=-1, dtype=torch.int32), first_the_true)
    )
    mask = BlockMask.from_kv_blocks(
        *numbers, BLOCK_SIZE=block_size, mask_mod=reads, seq_lengths=(T, T)
    )
    if not q.is_cuda:
        return flex_attention(q, k, v, block_mask=mask)
    # While the whole model is compiled, the outer torch.compile compiles the kernel too.
    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return attend(q, k, v, block_mask=mask, kernel_options=KERNEL_TILES)


def first_the_true(x: Tensor) -> Tensor:
    """The places of the last dimension, those that are true first."""
    return x.int().argsort(dim=-1, descending=True, stable=True).int()


@functools.cache
def compiled_flex_attention():
    return torch.compile(flex_attention)
