"""Data parallelism: replicas of the model read different examples and average their gradients.

Gradients are summed once a step, after the last micro-batch, in buckets, by all-reduce.
DistributedDataParallel does so while backward still runs (Li et al. 2020, arXiv:2006.15704).

Every replica would repeat Muon's orthogonalisation of every matrix. Instead each orthogonalises its
share of the matrices and all gather the results (`orthogonalise_distributed`).

Left out on purpose: that overlap with backward. It would need a second rule for gradient caching
and for experts. Pinned by tests/distributed/test_meshes.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanods.distributed.expert_parallel import expert_parameters
from nanods.distributed.fsdp import orthogonalise_shards
from nanods.training.muon import orthogonalise, products_dtype

BUCKET_SIZE = 1 << 22  # elements of one all-reduce: few enough calls, and small beside the model


@torch.no_grad()
def average_gradients(
    model: nn.Module, world_size: int, expert_replicas: dist.ProcessGroup | None
) -> None:
    """Replace each gradient by that of the whole batch: the mean over all processes.

    The gradient of an expert on one rank of an ep group already is the sum over that group, whose
    tokens the expert has processed. So it is summed over the expert's replicas alone (None: there
    are none), and divided by the number of all processes. The shards of FSDP are left out: FSDP
    averages their gradients while backward runs.
    """
    experts = set(expert_parameters(model))
    parameters = [p for p in model.parameters() if not isinstance(p, DTensor)]
    for bucket in gradient_buckets([p for p in parameters if p not in experts]):
        average_bucket(bucket, world_size, dist.group.WORLD)
    for bucket in gradient_buckets([p for p in parameters if p in experts]):
        average_bucket(bucket, world_size, expert_replicas)


def average_bucket(
    bucket: list[nn.Parameter], world_size: int, group: dist.ProcessGroup | None
) -> None:
    """Sum the gradients of a bucket over a group (None: do not), and divide by `world_size`."""
    grads = [p.grad for p in bucket]
    is_in_place = len(grads) == 1 and grads[0].is_contiguous()  # do not copy a large gradient
    flat = grads[0] if is_in_place else torch.cat([grad.flatten() for grad in grads])
    if group is not None:
        dist.all_reduce(flat, group=group)
    flat /= world_size
    if not is_in_place:
        for grad, average in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(average.view_as(grad))


def gradient_buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters, in order, into buckets of about BUCKET_SIZE elements.

    A gradient that is None becomes zeros, so that all processes reduce the same tensors.
    """
    buckets, free = [], 0
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if free < p.numel():
            buckets.append([])
            free = max(BUCKET_SIZE, p.numel())
        buckets[-1].append(p)
        free -= p.numel()
    return buckets


def orthogonalise_distributed(stack: Tensor) -> Tensor:
    """Compute muon.orthogonalise of (..., R, C) on all processes, each its share of the matrices.

    Of N matrices in a world of W, rank r orthogonalises the matrices r, r + W, r + 2 W, ... Results
    are gathered in the dtype in which they were computed. A stack of FSDP's shards goes to
    fsdp.orthogonalise_shards.
    """
    if isinstance(stack, DTensor):
        return orthogonalise_shards(stack)
    rank, world_size, shape = dist.get_rank(), dist.get_world_size(), stack.shape
    stack = stack.flatten(0, -3)  # (N, R, C)
    n_local = -(-len(stack) // world_size)  # rounded up: all_gather takes tensors of one shape
    local = torch.zeros(n_local, *stack.shape[1:], dtype=products_dtype(stack), device=stack.device)
    local_matrices = stack[rank::world_size]
    if len(local_matrices):
        local[: len(local_matrices)] = orthogonalise(local_matrices)
    gathered = [torch.empty_like(local) for _ in range(world_size)]
    dist.all_gather(gathered, local)
    in_order = torch.stack(gathered, dim=1).flatten(0, 1)[: len(stack)]  # (N, R, C)
    return in_order.view(shape).to(stack.dtype)
