"""Expert parallelism: each process holds some of the experts, and tokens are sent to them.

GShard, arXiv:2006.16668. Each of P processes has its own tokens and E/P of the experts: rank r
holds the experts from r E/P to (r + 1) E/P - 1. One row for each of a token's K choices is sent to
the rank that holds the expert, computed there, and sent back:

    1. Sort the rows by expert: rows for one rank are then next to each other.
    2. all-to-all: how many rows there are for each expert; then the rows.
    3. Each rank runs its experts on the rows of all processes, ordered by process, then by token.
    4. all-to-all: the results, back to the processes that sent the rows.
    5. y = sum over the chosen e of w_e MLP_e(x), in the order of the experts.

So an expert processes the same rows in the same order as in one process that has all tokens. On a
CPU the output is bit for bit that of one process, however uneven the load. Rows are sent in the
dtype in which they are multiplied.

Gradients. Let W processes (one group of P, or several groups that are replicas) have losses L_1 ..
L_W, each the mean over its own micro-batches, of which all have equally many. The loss of the step
is their mean

    L = (L_1 + .. + L_W) / W

backward() differentiates all losses of a group at once, since the gradient of a row returns to the
rank of its expert. So

    parameters on all processes     .grad on process s is the gradient of L_s alone:
                                    sum over all W processes, divide by W
    `expert_parameters`             .grad already is the sum over the P processes of the group:
                                    sum over the W/P replicas of the expert, divide by W (not W/P)

Clipping counts each expert once (sharding.clip_grad_norm). The balance loss, the z-loss and a
capacity are computed for each micro-batch of each process, as one process computes them for each of
its micro-batches. The load is summed over all processes.

All processes of a group must run every layer equally often, forward and backward, also in
evaluation and generation: if one does not, the others wait for it. A process without tokens passes
x of shape (0, C).

Left out on purpose, as exercises: to send a token once if two of its experts are on one rank; to
overlap communication with computation; a limit on the rows that one rank receives, N K P at worst.

Pinned by tests/distributed/test_expert_parallel.py: 2, 4 and 2 x 2 processes give the outputs,
gradients and training of one.

Shapes: N tokens of this process, C width, E experts, K choices, F hidden width, P processes, M rows
sent, R rows received.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanods.moe import MoE
from nanods.moe_kernel import compute_dtype, run_experts, sort_by_expert

Group = dist.ProcessGroup

# ---- tokens to their experts and back ----------------------------------------------------------


class AllToAll(torch.autograd.Function):
    """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ..., and gradients
    back.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(g, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Send (sum of sent, C) rows and return (sum of received, C), ordered by the sending rank."""
    output = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output


def experts_parallel(
    x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor, group: Group
) -> Tensor:
    """Compute experts_sorted over the processes of `group`, each with its own tokens and experts.

    x (N, C), weights (N, K), experts (N, K) below E, or E where an assignment is dropped -> (N, C).
    up (E/P, F, C) and out (E/P, C, F) are the experts of this process. N can differ between
    processes, and be 0.
    """
    P, n_local, K = dist.get_world_size(group), len(up), weights.size(1)
    order, counts = sort_by_expert(experts, P * n_local)  # counts (E,)
    received_counts = torch.empty_like(counts)  # rows of each rank for each local expert (P E/P,)
    dist.all_to_all_single(received_counts, counts, group=group)
    both_counts = torch.stack([counts, received_counts]).view(2, P, n_local)
    sent, received = both_counts.sum(dim=-1).tolist()  # rows per rank
    order = order[: sum(sent)]  # the dropped assignments are last and not sent
    token = order // K  # (M,)
    # Cast after the selection: backward then sums the gradients of a token's rows in x's dtype.
    rows = x.index_select(0, token).to(compute_dtype(x))
    rows = AllToAll.apply(rows, sent, received, group)  # (M, C) -> (R, C)
    expert_of_count = torch.arange(n_local, device=x.device).repeat(P)
    local_expert = expert_of_count.repeat_interleave(received_counts, output_size=len(rows))
    results = run_experts(rows, rows.new_ones(len(rows), 1), local_expert[:, None], up, out)
    results = AllToAll.apply(results, received, sent, group).to(x.dtype)  # (R, C) -> (M, C)
    w = weights.flatten().index_select(0, order).to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, results * w[:, None])


# ---- a model whose experts are split over processes --------------------------------------------


def split_experts(model: nn.Module, group: Group) -> None:
    """Keep this rank's experts in each MoE layer, up (E/P, F, C), out (E/P, C, F); use `group`.

    Call it once, on a whole model that is the same on all processes, before its optimizers are
    created. Raises ValueError if P does not divide E; a model of plain MLPs has one expert.
    """
    P = dist.get_world_size(group)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for E in [len(layer.up) for layer in layers] or [1]:
        if E % P:
            experts = f"{E} experts do" if E > 1 else "1 expert, a plain MLP, does"
            raise ValueError(
                f"{experts} not divide over {P} processes: choose --moe.n-expert as a multiple of "
                f"{P}, or an ep that divides it"
            )
    for layer in layers:
        layer.up = nn.Parameter(local_experts(layer.up.detach(), group))
        layer.out = nn.Parameter(local_experts(layer.out.detach(), group))
        layer.expert_group = group
        layer.run_experts = partial(experts_parallel, group=group)


def local_experts(stack: Tensor, group: Group) -> Tensor:
    """Return a copy of this rank's part of a stack of all experts: (E, ...) -> (E/P, ...)."""
    return stack.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def local_expert_stacks(model: nn.Module) -> dict[str, tuple[nn.Parameter, Group]]:
    """Return {name: (stack, group)} of the split stacks of experts; {} before `split_experts`."""
    names = {p: name for name, p in model.named_parameters()}
    stacks = {}
    for layer in model.modules():
        if isinstance(layer, MoE) and hasattr(layer, "expert_group"):
            for stack in (layer.up, layer.out):
                stacks[names[stack]] = (stack, layer.expert_group)
    return stacks


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the split stacks of experts, whose gradients are averaged differently (see above)."""
    return [stack for stack, _ in local_expert_stacks(model).values()]
