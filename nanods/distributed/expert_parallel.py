"""Expert parallelism: the experts of a layer on several processes, and tokens that travel to them (GShard, arXiv:2006.16668).

Each of P processes has tokens of its own and E/P of the experts: process r those from r E/P to (r + 1) E/P - 1. A row of a
token goes to the processes that own its experts, is computed there, comes back, and is weighted and added up at home:

    home   rows in the order of their experts, so those of one owner stand together
      ->   all_to_all: how many rows for each expert, then the rows, of as many lengths as there are pairs of processes
    owner  its experts, each on everyone's rows of it: by process, then by token
      ->   all_to_all back: each row to where it came from
    home   y = sum over the chosen e of w_e made_e, in the order of the experts

An expert so meets the rows, in the order, that it would meet in one process that had the tokens of all: on a CPU the result is
that process's bit for bit, however uneven the load. Rows travel in the dtype in which they are multiplied.

What each process must do with the gradients, the rule of one process's. Let W processes (P, or several groups of P, each with
a copy of the experts) have losses L_1 .. L_W, each the mean over its own micro-batches, equally many. They count equally:

    L = (L_1 + .. + L_W) / W

backward() on each process differentiates all L_s of its group at once, since what one says of a row travels to its owner:

    a parameter that all have       L_s reads process s's copy alone, so that .grad there is that of L_s:
                                    sum over all W, divided by W                                        (the mean, as ever)
    one of `expert_parameters`      .grad is already the sum over the P of the group:
                                    sum over its W/P copies in other groups, divided by W, not by their number

The norm for clipping counts each expert once (`fsdp.clip_grad_norm`). Balance and z-loss, and a capacity, have the micro-batch of one
process as their unit, as they have one micro-batch of many in one process; the load is a sum over all.

All processes of a group must run every layer equally often, forward and backward, in evaluation and generation too: one that
does not leaves the others waiting. Without tokens it may be (x (0, C)).

Left out on purpose, as exercises: travelling once where two experts of a token have one owner; hiding the journey behind other
work; a limit on what arrives, N K P rows at worst.

Pinned by tests/distributed/test_expert_parallel.py: 2, 4 and 2 x 2 processes give one's outputs, gradients and training.

Shapes: N tokens of this process, C width, K choices, F hidden width, M rows that travel.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanods.moe import MoE
from nanods.moe_kernel import compute_dtype, run_experts, sort_by_expert

Group = dist.ProcessGroup

# ---- tokens on their way -----------------------------------------------------------------------------------------------------


class AllToAll(torch.autograd.Function):
    """Rows to their processes: the first sent[0] to process 0, and so on. Their gradients go the same way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(g, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """(sum of sent, C) -> (sum of received, C), in the order of the processes that they come from."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def experts_parallel(
    x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor, group: Group
) -> Tensor:
    """As moe.experts_sorted, over the processes of `group`: up (E/P, F, C) and out (E/P, C, F) are the experts that this one owns.

    x (N, C), weights (N, K), experts (N, K) below E, or E where an assignment is dropped -> (N, C). N may differ, and be 0.
    """
    P, here, K = dist.get_world_size(group), len(up), weights.size(1)
    order, counts = sort_by_expert(experts, P * here)
    theirs = torch.empty_like(
        counts
    )  # what each process has for each expert of mine, process by process
    dist.all_to_all_single(theirs, counts, group=group)
    sent, received = torch.stack([counts, theirs]).view(2, P, here).sum(dim=-1).tolist()
    order = order[: sum(sent)]  # the dropped ones stay at home
    token = order // K  # (M,)
    rows = x.index_select(0, token).to(
        compute_dtype(x)
    )  # cast last, so that gradients are added up in x's own dtype
    rows = AllToAll.apply(rows, sent, received, group)
    mine = (
        torch.arange(here, device=x.device)
        .repeat(P)
        .repeat_interleave(theirs, output_size=len(rows))
    )
    made = run_experts(rows, rows.new_ones(len(rows), 1), mine[:, None], up, out)
    made = AllToAll.apply(made, received, sent, group).to(x.dtype)
    w = weights.flatten().index_select(0, order).to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, made * w[:, None])


# ---- a model whose experts are split -----------------------------------------------------------------------------------------


def split_experts(model: nn.Module, group: Group) -> None:
    """Each MoE of the model keeps the experts of this process: up (E/P, F, C), out (E/P, C, F); its tokens travel in `group`.

    To be called once, on a whole model, the same on all processes, before its optimizers are made. ValueError where P does not
    divide E; a model of plain MLPs has one expert.
    """
    P = dist.get_world_size(group)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for E in [len(layer.up) for layer in layers] or [1]:
        if E % P:
            raise ValueError(
                f"{P} processes cannot own {E} {'experts' if E > 1 else 'expert, a plain MLP,'} in equal parts: "
                f"choose --moe.n-expert as a multiple of {P}, or an ep that divides it"
            )
    for layer in layers:
        layer.up, layer.out = (
            nn.Parameter(local_experts(stack.detach(), group)) for stack in (layer.up, layer.out)
        )
        layer.group, layer.run_experts = group, partial(experts_parallel, group=group)


def local_experts(stack: Tensor, group: Group) -> Tensor:
    """This process's part of a stack of all experts: (E, ...) -> (E/P, ...), a copy."""
    return stack.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def local_expert_stacks(model: nn.Module) -> dict[str, tuple[nn.Parameter, Group]]:
    """The stacks that are split, each with its group, by their names in the model."""
    names = {p: name for name, p in model.named_parameters()}
    layers = [
        layer for layer in model.modules() if isinstance(layer, MoE) and hasattr(layer, "group")
    ]
    return {
        names[stack]: (stack, layer.group) for layer in layers for stack in (layer.up, layer.out)
    }


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that are split, whose gradients have a rule of their own (see above); none before `split_experts`."""
    return [stack for stack, _ in local_expert_stacks(model).values()]
