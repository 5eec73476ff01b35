"""Muon: momentum whose update is made orthogonal, for weight matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

With G the momentum of a matrix's gradient and G = U S V^T, the update is U V^T: all directions are learnt equally fast. Five
Newton-Schulz steps X <- a X + (b X X^T + c (X X^T)^2) X come near it with matrix products alone. The learning rate is then
the spectral norm of the update, times sqrt(R / C) for a tall matrix (R, C), so it keeps its meaning from width to width.

`torch.optim.Muon` is the same algorithm, one matrix at a time and always in bf16. Here matrices of one shape go through it
stacked, which makes the products large enough to pay, and a CPU without bf16 units, which would have to emulate them,
orthogonalises in the weights' own dtype (LOG.md has the figures). fp64 stays fp64 everywhere, so that runs can be compared
exactly. tests/training/test_muon.py holds the two together.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of the post: chosen for slope at zero; singular values end near 1
STACKED = 32  # matrices in one stack at most: the copies must not take the memory of a model of many layers


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: a GPU that says so, or a CPU with such instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch cannot tell
        return False
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # two of x86, one of ARM


def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with orthonormal rows (or columns), roughly: singular values of about 0.7 to 1.2.

    (N, R, C) -> (N, R, C), each of the N matrices by itself.
    """
    a, b, c = COEFFICIENTS
    X = G.bfloat16() if G.dtype != torch.float64 and fast_bf16(G.device) else G
    if tall := X.size(-2) > X.size(-1):
        X = X.mT  # X X^T is then the smaller of the two products
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values at most 1, where the iteration converges
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices (R, C) and stacks of them (E, R, C); embeddings, the output head and vectors belong to AdamW.

    `weight_decay` is AdamW's: each step shrinks the weights by lr * weight_decay of their size (Loshchilov & Hutter 2019,
    arXiv:1711.05101).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim not in (2, 3) for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon updates matrices, or stacks of them: give other parameters to AdamW")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in params):  # each shape once, in a fixed order
                alike = [p for p in params if p.shape == shape]
                rate = group["lr"] * max(1, shape[-2] / shape[-1]) ** 0.5
                at_once = max(1, STACKED // shape[:-2].numel())
                for some in (alike[i : i + at_once] for i in range(0, len(alike), at_once)):
                    directions = torch.stack([self.direction(p, group["momentum"]) for p in some])
                    updates = orthogonalise(directions.flatten(0, -3)).view_as(directions)
                    for p, update in zip(some, updates, strict=True):
                        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def direction(self, p: Tensor, momentum: float) -> Tensor:
        """Take the gradient into the momentum, and look one step ahead (Nesterov)."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)
