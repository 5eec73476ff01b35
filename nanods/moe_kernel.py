"""Run tokens through their experts quickly: the dispatch of nanods/moe.py, with its own backward.

`experts_loop` of nanods/moe.py is the reference. The functions here compute the same result:

    experts_sorted     sorts the assignments by expert, then multiplies one chunk of rows at a time
    experts_grouped    computes all experts with two grouped matrix products, for a GPU
    run_experts        calls the faster of the two

An assignment is one (token, expert) pair: N tokens with K experts each make N K assignments.
Assignment i of `experts.flatten()` belongs to token i // K. An assignment whose expert is number E
is dropped: no expert computes it.

For the rows x of one expert's tokens, with router weights w and the expert's matrices U = up[e] and
V = out[e], the forward pass computes

    r = relu(x U^T)        y = (r * r) V^T        output[token] += w y

With g the gradient of the output at these tokens, the backward pass computes

    s = r * (g V)          dw = sum(s * r)  (one number a row, equal to sum(y * g))
    dV = (w g)^T (r * r)   dU = (2 w s)^T x       dx[token] += (2 w s) U

Of the intermediate results only r is kept for the backward pass, (N K, F) numbers in all.

Pinned by tests/test_moe_kernel.py: equal to experts_loop, forward and backward.

Shapes: N tokens, C model width, E experts, K experts per token, F hidden width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 512  # rows of one expert that are multiplied at a time: they fit in a CPU's cache


# ---- the activation function ---------------------------------------------------------------------


class SquaredReLU(torch.autograd.Function):
    """Compute max(0, x)^2 and its gradient 2 max(0, x) g.

    Written out because autograd's version takes more passes over memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return (g * r).mul_(2)


def squared_relu(x: Tensor) -> Tensor:
    """Return max(0, x)^2, element by element (So et al. 2021, arXiv:2109.08668)."""
    return SquaredReLU.apply(x)


# ---- sorting assignments -------------------------------------------------------------------------


def sort_by_expert(experts: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
    """Sort the assignments by expert and count them.

    experts (N, K), with n_expert for a dropped assignment -> order (N K,), counts (n_expert,).
    `order` holds indices into `experts.flatten()`. The sort is stable: the tokens of one expert
    stay in their order. Dropped assignments come last and are not counted.
    """
    flat = experts.flatten()
    return flat.argsort(stable=True), count_assignments(flat, n_expert)


def count_assignments(experts: Tensor, n_expert: int) -> Tensor:
    """Count the assignments of each expert: integers 0 .. n_expert in any shape -> counts
    (n_expert,).

    The number n_expert stands for a dropped assignment and is not counted. `bincount` would do the
    same, but it makes the CPU wait for the GPU.
    """
    bins = torch.zeros(n_expert + 1, dtype=torch.long, device=experts.device)
    return bins.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())[:n_expert]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: autocast's where autocast is on, the dtype of x
    elsewhere."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


# ---- one expert after another: for a CPU ---------------------------------------------------------


def expert_chunks(counts: list[int]) -> Iterator[tuple[int, slice, bool]]:
    """Cut the sorted assignments into chunks of at most CHUNK_SIZE rows, each of one expert.

    counts[e] is the number of assignments of expert e. Yields (e, the chunk's rows, whether it is
    the first chunk of e). An expert without assignments has no chunk.
    """
    start = 0
    for e, count in enumerate(counts):
        stop = start + count
        for first in range(start, stop, CHUNK_SIZE):
            yield e, slice(first, min(first + CHUNK_SIZE, stop)), first == start
        start = stop


def gather_rows(x: Tensor, token: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows x[token] in `dtype`: x (N, C), token (n,) -> (n, C), or more rows in bf16.

    In bf16 rows of zeros fill n up to a multiple of 32. A CPU's bf16 library compiles a kernel for
    each new shape (0.3 ms, twice the time of the product at tiny size), and the counts differ at
    every step.
    """
    rows = x[token].to(dtype)
    if dtype == torch.bfloat16:
        return nn.functional.pad(rows, (0, 0, 0, -len(token) % 32))
    return rows


class SortedExperts(torch.autograd.Function):
    """Compute experts_sorted and its gradients by the equations at the top of this file.

    `order` and `counts` come from sort_by_expert. Each chunk is cast to `dtype` on its own.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        out: Tensor,
        order: Tensor,
        counts: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        K = weights.size(1)
        token = order // K  # (N K,)
        w = weights.flatten()[order]  # (N K,)
        output = torch.zeros_like(x)
        hidden = []  # r of each chunk
        for e, rows, _ in expert_chunks(counts):
            n = rows.stop - rows.start
            r = (gather_rows(x, token[rows], dtype) @ up[e].to(dtype).T).relu_()
            y = ((r * r) @ out[e].to(dtype).T)[:n]
            output.index_add_(0, token[rows], y.to(x.dtype) * w[rows, None].to(x.dtype))
            hidden.append(r)
        ctx.save_for_backward(x, w, up, out, order, token, *hidden)
        ctx.counts, ctx.dtype, ctx.K = counts, dtype, K
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, up, out, order, token, *hidden = ctx.saved_tensors
        dtype = ctx.dtype
        grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
        grad_up, grad_out = torch.empty_like(up), torch.empty_like(out)
        for e, count in enumerate(ctx.counts):
            if count == 0:
                grad_up[e], grad_out[e] = 0, 0
        for (e, rows, is_first), r in zip(expert_chunks(ctx.counts), hidden, strict=True):
            n = rows.stop - rows.start
            x_rows = gather_rows(x, token[rows], dtype)
            g_rows = gather_rows(g, token[rows], dtype)
            w_rows = torch.zeros(len(r), 1, dtype=dtype, device=x.device)  # 0 for rows of padding
            w_rows[:n, 0] = w[rows]
            s = (g_rows @ out[e].to(dtype)).mul_(r)
            grad_w[order[rows]] = torch.linalg.vecdot(s, r)[:n].to(w.dtype)
            s.mul_(2 * w_rows)
            out_part = g_rows.mul_(w_rows).T @ (r * r)
            up_part = s.T @ x_rows
            if is_first:
                grad_out[e].copy_(out_part)
                grad_up[e].copy_(up_part)
            else:
                grad_out[e].add_(out_part)
                grad_up[e].add_(up_part)
            grad_x.index_add_(0, token[rows], (s @ up[e].to(dtype))[:n].to(x.dtype))
        return grad_x, grad_w.view(-1, ctx.K), grad_up, grad_out, None, None, None


def experts_sorted(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Compute experts_loop with the assignments sorted by expert. The default on a CPU.

    x (N, C), weights (N, K), experts (N, K) with E for a dropped assignment, up (E, F, C), out (E,
    C, F) -> (N, C).
    """
    order, counts = sort_by_expert(experts, len(up))
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return SortedExperts.apply(x, weights, up, out, order, counts.tolist(), dtype)


# ---- all experts at once: for a GPU --------------------------------------------------------------


def experts_grouped(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Compute experts_loop with PyTorch's grouped matrix product: one kernel for all experts.

    Shapes as for experts_sorted. Not for fp64. No count is copied from the GPU to the CPU: dropped
    assignments are computed too, by the last expert and with weight 0, so that no shape depends on
    the data.
    """
    E, K = len(up), weights.size(1)
    dtype = compute_dtype(x)
    is_dropped = experts == E
    order, counts = sort_by_expert(experts.masked_fill(is_dropped, E - 1), E)
    token = order // K  # (N K,)
    ends = counts.cumsum(0).to(torch.int32)  # where each expert's rows end in the sorted order
    w = weights.masked_fill(is_dropped, 0).flatten()[order].to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(dtype)[token]  # (N K, C)
        hidden = nn.functional.grouped_mm(rows, up.to(dtype).mT, offs=ends)  # (N K, F)
        y = nn.functional.grouped_mm(squared_relu(hidden), out.to(dtype).mT, offs=ends)  # (N K, C)
        return torch.zeros_like(x).index_add(0, token, y.to(x.dtype) * w[:, None])


def run_experts(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Call the faster route: experts_grouped in bf16 on a GPU, if rows are a multiple of 16 bytes;
    experts_sorted elsewhere."""
    is_aligned = x.size(1) % 8 == 0 and up.size(1) % 8 == 0
    if x.device.type == "cuda" and compute_dtype(x) == torch.bfloat16 and is_aligned:
        return experts_grouped(x, weights, experts, up, out)
    return experts_sorted(x, weights, experts, up, out)
