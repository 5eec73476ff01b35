"""Solutions to 00_gpt.py, as short as correct code can be.

What nanods uses is in nanods/gpt.py, nanods/training/muon.py and nanods/planner/.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: float) -> Tensor:
    rms = x.square().mean(-1, keepdim=True).sqrt()
    return gain * x / rms.clamp(min=1e-9)


def apply_rope(x: Tensor, positions: Tensor, base: float) -> Tensor:
    D = x.size(-1)
    frequency = base ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)  # (D/2,)
    angle = positions[:, None] * frequency  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, gain: float) -> Tensor:
    T, D = q.shape[-2:]
    scores = rms_norm(q, gain) @ rms_norm(k, 1.0).mT / D**0.5  # (B, H, T, T)
    is_future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return scores.masked_fill(is_future, -torch.inf).softmax(-1) @ v


def orthogonalise(G: Tensor, steps: int) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def flops_per_token(V: int, C: int, n_layer: int, hidden_ratio: int, T: int) -> Tensor:
    weights = V * C + n_layer * (4 + 2 * hidden_ratio) * C**2
    numbers = n_layer * 2 * C * (T + 1) / 2  # of the pairs of query and key
    return torch.tensor(6 * (weights + numbers), dtype=torch.float64)


def training_memory(V: int, C: int, n_layer: int, hidden_ratio: int) -> Tensor:
    ends, layers = 2 * V * C, n_layer * (4 + 2 * hidden_ratio) * C**2
    weights = 4 * (ends + layers)
    return torch.tensor([weights, weights, 8 * ends + 4 * layers], dtype=torch.float64)
