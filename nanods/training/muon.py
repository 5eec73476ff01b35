"""Muon: momentum with an orthogonalised update, for weight matrices.

Let G be the momentum of a matrix's gradient and G = U S V^T its singular value decomposition. Muon
updates by U V^T, so that all directions are learnt equally fast (Jordan et al. 2024,
kellerjordan.github.io/posts/muon). Five Newton-Schulz steps X <- a X + (b X X^T + c (X X^T)^2) X
approximate U V^T by matrix products alone. The learning rate is then the spectral norm of the
update, times sqrt(R / C) for a tall matrix (R, C), so one rate suits all widths.

`torch.optim.Muon` is the same algorithm, one matrix at a time and always in bf16. Here matrices of
one shape are stacked, which makes the products large enough to be efficient. A CPU that
does not gain from bf16 orthogonalises in the weights' own dtype, wide matrices by fewer operations
(LOG.md has the figures). fp64 stays fp64 everywhere, so that runs can be compared
exactly.

Pinned by tests/training/test_muon.py: it agrees with torch.optim.Muon. Shapes: N matrices (R, C), E
experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the post, chosen for a steep slope at zero; singular values end near 1."""
STACKED = 32
"""Matrices in one stack at most, to limit the memory of the copies in models of many layers."""


def fast_bf16(device: torch.device) -> bool:
    """Return whether the device is taken to multiply matrices faster in bf16 than in fp32: a GPU
    that has it in hardware; a CPU with AMX, ARM's bf16, or that of AVX-512 if it is not Intel's.

    The bf16 instructions of AVX-512 are half as fast as fp32 on an Intel Emerald Rapids and faster
    on an AMD Zen 5 (LOG.md). With Intel's matrix units (AMX) it should pay; not measured.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch
        return False
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16") or has.get("bf16"):  # x86, ARM
        return True
    return bool(has.get("avx512_bf16")) and "Intel" not in has.get("cpu_name", "")


def products_dtype(G: Tensor) -> torch.dtype:
    """Return the dtype in which `orthogonalise` computes; its result is as precise as that."""
    return torch.bfloat16 if G.dtype != torch.float64 and fast_bf16(G.device) else G.dtype


def orthogonalise(G: Tensor, steps: int = 5) -> Tensor:
    """Return, roughly, the nearest matrices with orthonormal rows (or columns): singular values of
    about 0.7 to 1.2.

    (..., R, C) -> (..., R, C); each matrix is treated by itself.
    """
    X = G.to(products_dtype(G)).reshape(-1, *G.shape[-2:])  # (N, R, C)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT  # X X^T is then the smaller of the two products
    # Singular values of at most 1, where the iteration converges.
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_wide = X.size(-1) >= 2 * X.size(-2)
    if is_wide and X.dtype != torch.bfloat16:
        X = iterate_product(X, steps)  # the same in fewer operations
    else:
        X = iterate_matrix(X, steps)
    return (X.mT if tall else X).to(G.dtype).view(G.shape)


def iterate_matrix(X: Tensor, steps: int) -> Tensor:
    """Apply the Newton-Schulz step to matrices, `steps` times: (N, R, C) -> (N, R, C)."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def iterate_product(X: Tensor, steps: int) -> Tensor:
    """Do what iterate_matrix does in fewer operations for wide matrices: half of them if C = 4 R.

    A step is X <- P X with P = a I + b A + c A^2 and A = X X^T. So A becomes P A P: the steps need
    this small matrix alone, and the product Q of all P is applied to X at the end. Not for bf16: A
    squares the singular values, and each step multiplies the rounding of small ones by a^2.
    """
    a, b, c = COEFFICIENTS

    def factor(A: Tensor) -> Tensor:
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        return P

    A = X @ X.mT  # (N, R, R)
    P = Q = factor(A)
    for _ in range(steps - 1):
        A = P @ A @ P
        P = factor(A)
        Q = P @ Q
    return Q @ X


def equalise_neurons(updates: Tensor) -> Tensor:
    """Scale each neuron's update to one common length, without changing the norm of the matrix:
    (..., R, C) -> (..., R, C).

    A neuron is a row of a tall or square matrix, and a column of a wide one. In the MLP's second
    matrix, which is wide, each column belongs to one hidden unit. In V3's patch embedding each
    belongs to one input. An orthogonal update has equal singular values, but its neurons' vectors
    differ in length. Even a very short vector is scaled to the common length; only zero stays zero.
    NorMuon (Li et al. 2025, arXiv:2510.05491) divides rows by the root of a running mean of their
    squares. Dividing by this step's lengths did as well in our runs (LOG.md), and needs no
    optimizer state.
    """
    R, C = updates.shape[-2:]
    squares = updates.square().sum(dim=-1 if R >= C else -2, keepdim=True)
    mean_square = squares.mean(dim=(-2, -1), keepdim=True)
    return updates * (mean_square / (squares + 1e-14)).sqrt()


class Muon(torch.optim.Optimizer):
    """Update matrices (R, C) and stacks of them (E, R, C). Embeddings, the output head and vectors
    belong to AdamW.

    `weight_decay` is AdamW's: each step multiplies the weights by 1 - lr * weight_decay (Loshchilov
    & Hutter 2019, arXiv:1711.05101).

    With `every` = n, each parameter of a group is updated at every n-th step only, with n times the
    rate, from a momentum that has gathered all gradients. Different parameters take different
    steps, so the work per step stays even. It is for experts: to orthogonalise them all would take
    longer than the rest of a step, and it costs little quality (LOG.md).

    `equal_neurons`: pass each update through equalise_neurons.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        every: int = 1,
        orthogonalise: Callable[[Tensor], Tensor] = orthogonalise,
        equal_neurons: bool = False,
    ) -> None:
        """`orthogonalise`: (..., R, C) -> (..., R, C). Several processes pass one that splits the
        work among them."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "every": every}
        defaults |= {"orthogonalise": orthogonalise, "equal_neurons": equal_neurons}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if any(p.ndim not in (2, 3) for p in group["params"]):
                raise ValueError(
                    "Muon updates matrices, or stacks of them: give other parameters to AdamW"
                )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            due = []
            for index, p in enumerate(group["params"]):
                if p.grad is not None and self.update_momentum(p, index, group):
                    due.append(p)
            lr = group["lr"] * group["every"]
            for stack in stacks_of_one_shape(due):
                # Nesterov momentum: look ahead by the current gradient.
                directions = torch.stack(
                    [
                        p.grad.lerp(self.state[p]["momentum_buffer"], group["momentum"])
                        for p in stack
                    ]
                )
                updates = group["orthogonalise"](directions)
                if group["equal_neurons"]:
                    updates = equalise_neurons(updates)
                R, C = stack[0].shape[-2:]
                rate = lr * max(1, R / C) ** 0.5
                for p, update in zip(stack, updates, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-rate)

    def update_momentum(self, p: Tensor, index: int, group: dict) -> bool:
        """Add the gradient to the momentum, and return whether the parameter is to be updated at
        this step."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
            state["step"] = torch.zeros((), dtype=torch.long)
        state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        state["step"] += 1
        return (int(state["step"]) + index) % group["every"] == 0


def stacks_of_one_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """Group parameters of equal shape, and of equal sharding, into stacks of up to STACKED
    matrices, in a fixed order."""
    by_kind: dict[tuple, list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((p.shape, getattr(p, "placements", None)), []).append(p)
    stacks = []
    for (shape, _), alike in by_kind.items():
        at_once = max(1, STACKED // shape[:-2].numel())
        stacks += [alike[i : i + at_once] for i in range(0, len(alike), at_once)]
    return stacks
