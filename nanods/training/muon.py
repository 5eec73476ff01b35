"""Muon: momentum whose update is made orthogonal, for weight matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

With G the momentum of a matrix's gradient and G = U S V^T, the update is U V^T: all directions are learnt equally fast. Five
Newton-Schulz steps X <- a X + (b X X^T + c (X X^T)^2) X come near it with matrix products alone. The learning rate is then
the spectral norm of the update, times sqrt(R / C) for a tall matrix (R, C), so it keeps its meaning from width to width.

`torch.optim.Muon` is the same algorithm, always in bf16. A CPU without bf16 units emulates that (LOG.md has the figures); here
a CPU orthogonalises in the weights' own dtype, which also lets fp64 runs be compared exactly. tests/training/test_muon.py
holds the two together.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of the post: chosen for slope at zero; singular values end near 1


def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with orthonormal rows (or columns), roughly: singular values of about 0.7 to 1.2. (R, C) -> (R, C)."""
    a, b, c = COEFFICIENTS
    X = G.bfloat16() if G.is_cuda else G
    if tall := X.size(0) > X.size(1):
        X = X.T  # X X^T is then the smaller of the two products
    X = X / (X.norm() + 1e-7)  # singular values at most 1, where the iteration converges
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.T if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions; embeddings, the output head and vectors belong to AdamW."""

    def __init__(self, params, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon updates matrices only: give other parameters to AdamW")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalise(p.grad.lerp(buffer, momentum))  # Nesterov: look one step ahead
                p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)
