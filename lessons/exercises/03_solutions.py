"""Solutions to 03_multimodal.py, as short as correct code can be.

What nanods uses is in nanods/contrastive.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products of all pairs, (B, B), in at least fp32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype).T


def contrastive_loss(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    logits = scale * similarities(a, b)  # (B, B)
    labels = torch.arange(len(a))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def loss_with_duplicates(a: Tensor, b: Tensor, scale: Tensor | float, ids: Tensor) -> Tensor:
    labels = torch.arange(len(a))
    is_duplicate = (ids[:, None] == ids) & (labels[:, None] != labels)  # (B, B)
    logits = (scale * similarities(a, b)).masked_fill(is_duplicate, -math.inf)  # exp(-inf) = 0
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def logit_scale(log_scale: Tensor, max_scale: float) -> Tensor:
    # Clamp the parameter: a clamp of the value alone has no gradient above the limit.
    with torch.no_grad():
        log_scale.clamp_(max=math.log(max_scale))
    return log_scale.exp()


def recall_at_1(queries: Tensor, targets: Tensor) -> Tensor:
    scores = queries @ targets.T  # (Q, Q)
    is_higher = scores.diag()[:, None] > scores  # False on the diagonal, for ties and for NaN
    return (is_higher.sum(1) == len(scores) - 1).float().mean()


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    logits = scale * similarities(a, b) + bias
    z = 2 * torch.eye(len(a)) - 1
    return -F.logsigmoid(z * logits).sum() / len(a)


def entropy(p: Tensor) -> Tensor:
    # The smallest positive number inside the logarithm keeps value and gradient finite at p = 0.
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)


def entropies(probs: Tensor) -> tuple[Tensor, Tensor]:
    return entropy(probs).mean(), entropy(probs.mean(0))
