"""Solutions to 02_mixture_of_experts.py: the shortest correct code (fast: nanods/moe_kernel.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def route(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    best, experts = (x.to(dtype) @ gate.to(dtype).T).softmax(-1).topk(top_k)  # (N, K)
    return (best / best.sum(-1, keepdim=True)).to(x.dtype), experts


def mlp(x: Tensor, up: Tensor, out: Tensor) -> Tensor:
    return (x @ up.T).relu() ** 2 @ out.T


def experts_loop(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, slot = (experts == e).nonzero(as_tuple=True)
        y = y.index_add(0, token, mlp(x[token], up[e], out[e]) * weights[token, slot, None])
    return y


def experts_sorted(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    order = experts.flatten().argsort()  # (N K,)
    token = order // experts.size(1)
    counts = experts.flatten().bincount(minlength=len(up))
    slices = x[token].split(counts.tolist())
    outputs = torch.cat([mlp(rows, up[e], out[e]) for e, rows in enumerate(slices)])  # (N K, C)
    return torch.zeros_like(x).index_add(0, token, outputs * weights.flatten()[order, None])


def load_balancing_loss(probs: Tensor, experts: Tensor) -> Tensor:
    E = probs.size(-1)
    fraction = experts.flatten().bincount(minlength=E) / experts.numel()  # (E,)
    return E * (fraction * probs.mean(0)).sum()


def within_capacity(experts: Tensor, n_expert: int, capacity: int) -> Tensor:
    # (N K, E): 1 where an assignment is to the expert; the assignments are in token order.
    one_hot = F.one_hot(experts.flatten(), n_expert)
    position = ((one_hot.cumsum(0) - 1) * one_hot).sum(-1)  # (N K,)
    return (position < capacity).view(experts.shape)


def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    return bias + rate * (load.float().mean() - load).sign()


def upcycle(up: Tensor, out: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
    # A token's weights sum to 1, so the copies need no factor.
    return up.repeat(n_expert, 1, 1), out.repeat(n_expert, 1, 1)
