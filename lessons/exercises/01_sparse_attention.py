"""Exercises of lesson 01: sparse attention, in five steps and a bonus.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-01                          # or: python lessons/exercises/check_01.py [FILE]

The article that this course follows lets each query read only its 32 best keys. Its snippet (lessons/ARTICLE.md, V1.6) goes
wrong in four places: scores are not scaled, there is no causal mask, 32 keys of fewer than 32 fail, and the values are gathered
number by number instead of row by row. Steps 1 and 2 do its idea right. It still computes every score, so steps 3 to 5 choose
among *blocks* of keys instead.

Shapes: B batch, H heads, T tokens, D width of a head, N = ceil(T / block_size) blocks. Token t stands in block t // block_size.
Solutions are in 01_solutions.py; what nanods uses, in nanods/attention.py.
"""

import torch  # noqa: F401
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: each query reads all keys up to its own, weighed by softmax(q . k / sqrt(D)).

    q, k, v (B, H, T, D) -> (B, H, T, D). Without F.scaled_dot_product_attention: that is what you are building.
    Hint: a score of -inf has the weight 0 after the softmax, and the others still sum to 1.
    Target: with v all ones the output is all ones; what stands after position t never changes output t.
    """
    raise NotImplementedError


def topk_attention(q: Tensor, k: Tensor, v: Tensor, top_k: int) -> Tensor:
    """The article's idea done right: each query reads only its top_k best keys, of those up to its own.

    q, k, v (B, H, T, D), top_k may exceed T -> (B, H, T, D). A query with fewer than top_k keys reads them all.
    Hint: no gather is needed. `scatter` the chosen numbers into a mask, and step 1 does the rest.
    Target: top_k >= T gives step 1's result; query t has exactly min(top_k, t + 1) weights that are not 0.
    """
    raise NotImplementedError


def pool_blocks(k: Tensor, block_size: int) -> Tensor:
    """One summary for each block of keys: their mean.

    k (B, H, T, D) -> (B, H, N, D). The last block may be short: T need not be a multiple of block_size.
    Hint: a mean over fewer keys divides by fewer; a loop over the blocks is fine.
    Target: keys that are all ones have means that are all ones, the last one too.
    """
    raise NotImplementedError


def select_blocks(q: Tensor, k: Tensor, block_size: int, top_blocks: int) -> Tensor:
    """Each query chooses the top_blocks blocks before its own whose means have the largest dot product with it.

    q, k (B, H, T, D) -> block numbers, integers (B, H, T, top_blocks), best first, -1 where no block is left to choose.
    Candidates lie wholly before the query's own block: never a key of its future, and never its own block (step 5 reads
    that anyway). top_blocks may exceed N.
    Hint: mask the scores (B, H, T, N) before `topk`; what `topk` still takes at -inf is no block.
    Target: queries of block 0 get nothing but -1; changing token s never changes the choice of a query before s.
    """
    raise NotImplementedError


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Each query reads the keys of its chosen blocks and, up to itself, those of its own: one softmax over them all.

    q, k, v (B, H, T, D), blocks (B, H, T, K): as step 4 returns them, -1 is no block, K may be 0 -> (B, H, T, D).
    Hint: first right, then fast: a mask (B, H, T, T) over all scores will do here. Key s stands in block s // block_size.
    Target: with every past block chosen it gives step 1's result; with none, attention inside each block.
    """
    raise NotImplementedError


def select_for_tile(q: Tensor, k: Tensor, block_size: int, top_blocks: int) -> Tensor:
    """One choice for all queries of a tile (= one block of queries), which a GPU reads far faster.

    q, k (B, H, T, D) -> (B, H, N, top_blocks), otherwise as in step 4. The choice is that of the tile's *first* query.
    Hint: why not the mean of the tile's queries? Ask what its first query would learn from that.
    Target: row n equals row n * block_size of step 4.
    """
    raise NotImplementedError
