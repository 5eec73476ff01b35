"""Solutions to 02_mixture_of_experts.py: the shortest code that is right. The fast code is in nanods/moe.py."""

import torch
import torch.nn.functional as F
from torch import Tensor


def route(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    best, experts = (x.to(wide) @ gate.to(wide).T).softmax(-1).topk(top_k)  # (N, K)
    return (best / best.sum(-1, keepdim=True)).to(x.dtype), experts


def mlp(x: Tensor, up: Tensor, out: Tensor) -> Tensor:
    return (x @ up.T).relu() ** 2 @ out.T


def mix(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, slot = (experts == e).nonzero(as_tuple=True)
        y = y.index_add(0, token, mlp(x[token], up[e], out[e]) * weights[token, slot, None])
    return y


def experts_sorted(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    order = experts.flatten().argsort()  # (N K,)
    token = order // experts.size(1)
    slices = x[token].split(experts.flatten().bincount(minlength=len(up)).tolist())
    made = torch.cat([mlp(mine, up[e], out[e]) for e, mine in enumerate(slices)])  # (N K, C)
    return torch.zeros_like(x).index_add(0, token, made * weights.flatten()[order, None])


def load_balancing_loss(probs: Tensor, experts: Tensor) -> Tensor:
    E = probs.size(-1)
    share = experts.flatten().bincount(minlength=E) / experts.numel()  # (E,)
    return E * (share * probs.mean(0)).sum()


def within_capacity(experts: Tensor, n_expert: int, capacity: int) -> Tensor:
    mine = F.one_hot(
        experts.flatten(), n_expert
    )  # (N K, E): the assignments in the order of the tokens
    place = ((mine.cumsum(0) - 1) * mine).sum(-1)  # (N K,)
    return (place < capacity).view(experts.shape)


def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    return bias + rate * (load.float().mean() - load).sign()


def upcycle(up: Tensor, out: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
    return up.repeat(n_expert, 1, 1), out.repeat(
        n_expert, 1, 1
    )  # weights that sum to 1 need no factor
