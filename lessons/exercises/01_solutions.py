"""Solutions to 01_sparse_attention.py: the shortest correct code (fast: nanods/attention*.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor

INF = float("inf")


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return scaled scores (B, H, T, T), with -inf for keys in the query's future."""
    scores = q @ k.mT / q.size(-1) ** 0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -INF)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_scores(q, k).softmax(-1) @ v


def topk_attention(q: Tensor, k: Tensor, v: Tensor, top_k: int) -> Tensor:
    scores = causal_scores(q, k)
    best = scores.topk(min(top_k, k.size(2)), dim=-1).indices  # (B, H, T, top_k)
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    # topk may select future keys where too few keys are visible; their scores stay at -inf.
    return scores.masked_fill(~selected, -INF).softmax(-1) @ v


def pool_blocks(k: Tensor, block_size: int) -> Tensor:
    return torch.stack([block.mean(dim=2) for block in k.split(block_size, dim=2)], dim=2)


def best_blocks(
    q: Tensor, current_block: Tensor, k: Tensor, block_size: int, top_blocks: int
) -> Tensor:
    """Select for queries q (B, H, R, D) in blocks current_block (R,) -> (B, H, R, top_blocks)."""
    scores = q @ pool_blocks(k, block_size).mT  # (B, H, R, N)
    N = scores.size(-1)
    scores = scores.masked_fill(torch.arange(N) >= current_block[:, None], -INF)
    best, blocks = scores.topk(min(top_blocks, N), dim=-1)
    return F.pad(blocks.masked_fill(best == -INF, -1), (0, top_blocks - blocks.size(-1)), value=-1)


def select_blocks(q: Tensor, k: Tensor, block_size: int, top_blocks: int) -> Tensor:
    return best_blocks(q, torch.arange(q.size(2)) // block_size, k, block_size, top_blocks)


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    block_of = torch.arange(k.size(2)) // block_size  # (T,)
    selected = (blocks[..., None] == block_of).any(dim=-2)  # (B, H, T, T): -1 equals no block
    current = block_of[:, None] == block_of  # (T, T)
    return causal_scores(q, k).masked_fill(~(selected | current), -INF).softmax(-1) @ v


def select_for_tile(q: Tensor, k: Tensor, block_size: int, top_blocks: int) -> Tensor:
    # All queries of a tile may see the past of its first query, and of no other.
    first = q[:, :, ::block_size]  # (B, H, N, D)
    return best_blocks(first, torch.arange(first.size(2)), k, block_size, top_blocks)
