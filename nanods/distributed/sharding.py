"""What every kind of sharding needs: local tensors, the weights of rank 0, and the gradient norm.

A tensor of a sharded model is one of three kinds:

    whole on every process            a plain parameter
    a shard of FSDP or of tp          a DTensor
    a stack of this rank's experts    a parameter of expert_parallel.local_expert_stacks
                                      (with fsdp beside ep also a DTensor)

At the start rank 0 builds the whole model in main memory, weights alone, and broadcasts one tensor
after another; each rank keeps its part, so no other process ever holds the model.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nanods.distributed.expert_parallel import local_expert_stacks, local_experts


def to_local(x: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, and any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def broadcast_parameters(model: nn.Module, full_state: dict[str, Tensor]) -> None:
    """Copy the weights and buffers of rank 0 into the local parts of every process.

    `full_state`: on rank 0 all tensors of the whole model by name; on the other ranks it is not
    read.
    """
    stacks = local_expert_stacks(model)
    for name, local in [*model.named_parameters(), *model.named_buffers()]:
        group = stacks[name][1] if name in stacks else None
        shape = local.shape
        if group is not None:  # all experts, not only those of this rank
            shape = (len(local) * dist.get_world_size(group), *local.shape[1:])
        if dist.get_rank() == 0:
            value = full_state[name].to(to_local(local).device).contiguous()
        else:
            value = to_local(local).new_empty(shape)
        dist.broadcast(value, 0)
        if group is not None:
            value = local_experts(value, group)
        if isinstance(local, DTensor):
            value = distribute_tensor(
                value, local.device_mesh, local.placements, src_data_rank=None
            )
        local.copy_(value)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm`; return the norm () they had.

    This is nn.utils.clip_grad_norm_ for a sharded model. The square of the norm is that of the
    parameters that all processes hold, counted once, plus those of shards and experts, summed over
    the processes that hold them. Every process must call it, after the gradients are averaged, and
    gets the same norm. A model that is not sharded goes to clip_grad_norm_.
    """
    groups = parameter_groups(model)
    if not groups:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    grads: dict[dist.ProcessGroup | None, list[Tensor]] = {}
    for p in model.parameters():
        if p.grad is not None:
            grads.setdefault(groups.get(p), []).append(to_local(p.grad))
    square = 0
    for group, local_grads in grads.items():
        local_square = nn.utils.get_total_norm(local_grads).double().square()
        if group is not None:
            dist.all_reduce(local_square, group=group)
        square = square + local_square
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for local_grads in grads.values():
        for grad in local_grads:
            grad.mul_(factor)
    return norm


def parameter_groups(model: nn.Module) -> dict[nn.Parameter, dist.ProcessGroup]:
    """Return the group of processes over which each split parameter is split."""
    groups = {}
    for p in model.parameters():
        if isinstance(p, DTensor):
            groups[p] = p.device_mesh.get_group()
    for p, group in local_expert_stacks(model).values():
        # With fsdp beside ep an expert is sharded over its replicas, so all processes have a part.
        groups[p] = dist.group.WORLD if p in groups else group
    return groups
