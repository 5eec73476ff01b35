"""Muon: momentum whose update is made orthogonal, for weight matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

With G the momentum of a matrix's gradient and G = U S V^T, the update is U V^T: all directions are learnt equally fast. Five
Newton-Schulz steps X <- a X + (b X X^T + c (X X^T)^2) X come near it with matrix products alone. The learning rate is then
the spectral norm of the update, times sqrt(R / C) for a tall matrix (R, C), so it keeps its meaning from width to width.

`torch.optim.Muon` is the same algorithm, one matrix at a time and always in bf16. Here matrices of one shape go through it
stacked, which makes the products large enough to pay, and a CPU without bf16 units, which would have to emulate them,
orthogonalises in the weights' own dtype (LOG.md has the figures). fp64 stays fp64 everywhere, so that runs can be pair_weights
exactly. tests/training/test_muon.py holds the two together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # a, b, c of the post: chosen for slope at zero; singular values end near 1
TABLES = (
    "embedding.weight",
    "position_embedding",
    "head.weight",
    "gate.weight",
)  # a row each for what is a thing of its own: AdamW's
STACKED = 32  # matrices in one stack at most: the copies must not take the memory of a model of many layers


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: a GPU that says so, or a CPU with such instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(
        torch.cpu, "get_capabilities"
    ):  # older PyTorch cannot tell
        return False
    has = torch.cpu.get_capabilities()
    return any(
        has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )  # two of x86, one of ARM


def products_dtype(G: Tensor) -> torch.dtype:
    """That in which `orthogonalise` computes, and no finer is what it returns."""
    return torch.bfloat16 if G.dtype != torch.float64 and fast_bf16(G.device) else G.dtype


def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with orthonormal rows (or columns), roughly: singular values of about 0.7 to 1.2.

    (..., R, C) -> (..., R, C), each of the matrices, one or more, by itself.
    """
    a, b, c = COEFFICIENTS
    X = G.to(products_dtype(G)).flatten(0, -3)  # (N, R, C)
    if tall := X.size(-2) > X.size(-1):
        X = X.mT  # X X^T is then the smaller of the two products
    X = X / (
        X.norm(dim=(-2, -1), keepdim=True) + 1e-7
    )  # singular values at most 1, where the iteration converges
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype).view(G.shape)


class Muon(torch.optim.Optimizer):
    """For matrices (R, C) and stacks of them (E, R, C); embeddings, the output head and vectors belong to AdamW.

    `weight_decay` is AdamW's: each step shrinks the weights by lr * weight_decay of their size (Loshchilov & Hutter 2019,
    arXiv:1711.05101).

    With `every` = n the parameters of a group take turns: each is updated at every n-th step, with n times the rate, from the
    momentum that has gathered all gradients. It is for experts, whose orthogonalisation would take longer than the rest of a
    step; and since each sees few of a step's tokens, it loses little (LOG.md).
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        every: int = 1,
        orthogonalise: Callable[[Tensor], Tensor] = orthogonalise,
    ) -> None:
        """`orthogonalise`: (..., R, C) -> (..., R, C), where several processes deal that work out among themselves."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "every": every}
        super().__init__(params, defaults | {"orthogonalise": orthogonalise})
        if any(p.ndim not in (2, 3) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "Muon updates matrices, or stacks of them: give other parameters to AdamW"
            )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [
                p
                for i, p in enumerate(group["params"])
                if p.grad is not None and self.due(p, i, group)
            ]
            lr = group["lr"] * group["every"]
            kind = {
                p: (p.shape, getattr(p, "placements", None)) for p in params
            }  # of a shard also where the others are
            for shape, where in dict.fromkeys(kind.values()):  # each once, in a fixed order
                alike = [p for p in params if kind[p] == (shape, where)]
                rate = lr * max(1, shape[-2] / shape[-1]) ** 0.5
                at_once = max(1, STACKED // shape[:-2].numel())
                for some in (alike[i : i + at_once] for i in range(0, len(alike), at_once)):
                    directions = torch.stack(
                        [
                            p.grad.lerp(self.state[p]["momentum_buffer"], group["momentum"])
                            for p in some
                        ]  # Nesterov
                    )
                    updates = group["orthogonalise"](directions)
                    for p, update in zip(some, updates, strict=True):
                        p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-rate)

    def due(self, p: Tensor, number: int, group: dict) -> bool:
        """Take the gradient into the momentum, and say whether it is the parameter's turn to be updated."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        if "step" not in state:  # at the start, and in checkpoints older than V2
            state["step"] = torch.zeros((), dtype=torch.long)
        state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        state["step"] += 1
        return (int(state["step"]) + number) % group["every"] == 0
