"""Exercises of lesson 01: sparse attention, in five steps and a bonus.

Write each function in plain PyTorch. Then grade the file, as often as you like:

    make check-01                          # or: python lessons/exercises/check_01.py [FILE]

The article that this course follows lets each query attend to its 32 best keys only. In steps 1
and 2 you write a correct version of its idea. That version still computes every score, so in steps
3 to 5 you select *blocks* of keys instead.

Shapes: B batch, H heads, T tokens, D width of a head, N = ceil(T / block_size) blocks. Token t is
in block t // block_size. T may be 1, and smaller than block_size.

Graded in each step: every head of every sequence is independent of the others; no argument is
changed in place; floats keep the dtype of the arguments. In steps 1, 2 and 5 gradients also flow to
q, k and v, and large scores do not overflow.

The solutions are in 01_solutions.py; nanods itself uses those in nanods/attention*.py.
"""

import torch  # noqa: F401
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention: softmax(q . k / sqrt(D)) over all keys up to the query's position.

    q, k, v (B, H, T, D) -> (B, H, T, D). Do not use F.scaled_dot_product_attention: you are
    building it.
    Hint: softmax turns a score of -inf into the weight 0, and the other weights still sum to 1.
    Target: if v is all ones, the output is all ones; tokens after t never change output t.
    """
    raise NotImplementedError


def topk_attention(q: Tensor, k: Tensor, v: Tensor, top_k: int) -> Tensor:
    """Attend to the top_k keys with the highest scores among the keys up to the query's position.

    q, k, v (B, H, T, D), top_k may exceed T -> (B, H, T, D). A query with fewer than top_k keys
    attends to all of them.
    Hint: you need no gather. `scatter` the indices of the best keys into a mask, then use step 1.
    Target: top_k >= T gives step 1's result; query t has exactly min(top_k, t + 1) nonzero weights.
    """
    raise NotImplementedError


def pool_blocks(k: Tensor, block_size: int) -> Tensor:
    """Return the mean of the keys of each block.

    k (B, H, T, D) -> (B, H, N, D). The last block may be shorter, because T need not be a multiple
    of block_size.
    Hint: the mean of a shorter block divides by fewer keys. A loop over the blocks is fine.
    Target: if all keys are ones, all means are ones, that of the last block too.
    """
    raise NotImplementedError


def select_blocks(q: Tensor, k: Tensor, block_size: int, top_blocks: int) -> Tensor:
    """Select for each query the top_blocks past blocks whose mean key has the largest dot product.

    q, k (B, H, T, D) -> block indices, integers (B, H, T, top_blocks), best first. Fill up with -1
    where a query has fewer than top_blocks past blocks. top_blocks may exceed N.
    The candidates are the blocks before the query's current block: they hold no key of its future.
    The current block itself is never selected, because step 5 always attends to it.
    Hint: mask the scores (B, H, T, N) before `topk`. An index that `topk` returns with the score
    -inf is not a valid block.
    Target: all indices of queries in block 0 are -1; changing token s never changes the selection
    of a query before s.
    """
    raise NotImplementedError


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Attend to the selected blocks and, causally, to the current block, with one softmax over all.

    q, k, v (B, H, T, D), blocks (B, H, T, K) as step 4 returns them: -1 is no block, K may be 0
    -> (B, H, T, D).
    Hint: make it correct before you make it fast. A mask (B, H, T, T) over all scores is fine here.
    Key s is in block s // block_size.
    Target: with all past blocks selected you get step 1's result; with none selected you get
    attention within each block.
    """
    raise NotImplementedError


def select_for_tile(q: Tensor, k: Tensor, block_size: int, top_blocks: int) -> Tensor:
    """Select blocks once per tile of queries (a tile is one block of queries): far faster on a GPU.

    q, k (B, H, T, D) -> (B, H, N, top_blocks), otherwise as in step 4. Use the tile's *first* query
    for the selection.
    Hint: step 4 selects for each query already.
    Target: row n equals row n * block_size of step 4.
    """
    raise NotImplementedError
