"""Models whose weights are shared out, by the batch or by the heads.

FSDP (Rajbhandari et al. 2019, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277). Each of P processes keeps 1/P of every
matrix, table and stack of experts: of its first dimension, in order. Of what it keeps it has the gradient, the optimizer's
state and, after a step, the new weights; the rest it borrows (torch's `fully_shard`):

    before a block, forward and backward    all_gather: the block's weights, whole; given back after it
    after a block's backward                reduce_scatter: of the gradients' sum over all, divided by P, the own part

once for each micro-batch. Under bf16 autocast a block's weights are rounded before the journey instead of after it, which
halves it; gradients are added up in fp32. The ends of the model, outside its blocks, travel as they are and stay whole from
forward to backward. What is left whole: single numbers (V3's temperature) and routers' gates, which choose in fp32: their
gradients ProcessGroups.average adds up. Experts of which each process owns some are sharded among their twins, the processes that own
the same ones, matrix by matrix: of (E/P, R, C) the second dimension.

AdamW works on shards as on anything: it treats each number by itself. Muon needs whole matrices: each goes to one process,
is made orthogonal there, and comes back in shards (`orthogonalise_shards`); its momentum stays where it is. Where all have all
experts (E, R, C), they are sharded along E, in whole matrices, so nothing travels.

Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053). P processes read the same tokens, each with its own H/P heads and
F/P hidden numbers of an MLP: rows of the matrices that come first (query, key, value; up), columns of those that come last
(out), so that each layer makes a part of every token's sum:

    forward     all_reduce: what attention adds to the tokens, and what the MLP adds
    backward    all_reduce: the gradients of what they read

twice a block and way, whatever the batch; it pays within one machine. All the rest, embedding, head, norms and experts, every
process has and computes, with the same numbers: nothing there is to be added up.

A checkpoint is the plain one of one process, of which each writes and reads its own part (sharded_checkpoint.py). At the
start the first process makes the whole model in main memory, weights alone, and `broadcast_parameters` gives the others their parts.

Pinned by tests/distributed/test_meshes.py. Shapes: N matrices (R, C), E experts, H heads, F hidden width.
"""

import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from nanods.distributed.expert_parallel import local_expert_stacks, local_experts
from nanods.errors import UserError
from nanods.gpt import GPT, Block
from nanods.moe import MLP, MoE
from nanods.training.muon import orthogonalise, products_dtype

logging.getLogger("torch.distributed.tensor").setLevel(
    logging.ERROR
)  # on a CPU it tells everyone what stands below


def shard_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    twins: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Leave this process its part of a whole model, the same on all of the mesh; before its optimizers are made.

    `twins`: of experts that are split among some processes already, those that own the same ones. The blocks' weights travel in
    `dtype`, that of autocast, where it is given. UserError where twins cannot share an expert out.
    """
    whole = {
        p for name, p in model.named_parameters() if p.ndim == 0 or name.endswith("gate.weight")
    }
    narrow = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    parts = [
        (layer, twins, narrow)
        for layer in model.modules()
        if twins is not None and isinstance(layer, MoE)
    ]
    for stack in (stack for layer, *_ in parts for stack in (layer.up, layer.out)):
        if stack.size(1) % twins.size():
            raise UserError(
                f"--mesh fsdp={twins.size()}: does not divide the {stack.size(1)} rows of an expert; take a divisor"
            )
    parts += [(block, mesh, narrow) for block in model.modules() if isinstance(block, Block)]
    for module, among, policy in (*parts, (model, mesh, MixedPrecisionPolicy())):
        where = (
            (lambda p: Shard(1)) if isinstance(module, MoE) else None
        )  # each matrix: there may be fewer experts than twins
        fully_shard(
            module, mesh=among, mp_policy=policy, ignored_params=whole, shard_placement_fn=where
        )
        module.set_force_sum_reduction_for_comms(
            True
        )  # then a division, since gloo cannot take means
        module.set_gradient_divide_factor(mesh.size())


def split_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """The same for tensor parallelism, of V0 to V2. UserError for V3, and where the heads do not divide."""
    if not isinstance(model, GPT):
        raise UserError(
            "--mesh tp: V3 compares items among the processes, which must then be others; take dp, fsdp or ep"
        )
    if (H := model.config.n_head) % (P := mesh.size()):
        raise UserError(
            f"--mesh tp={P}: {H} heads do not divide among {P} processes; choose a divisor, or another --n-head"
        )
    for block in model.blocks:
        plan = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan |= {"attention": reads(7), "attention.out": RowwiseParallel()}
        if isinstance(block.mlp, MLP):
            plan |= {"mlp": reads(3), "mlp.up": ColwiseParallel(), "mlp.out": RowwiseParallel()}
        parallelize_module(block, mesh, plan, src_data_rank=None)
        block.attention.n_head = H // P


def reads(arguments: int) -> PrepareModuleInput:
    """Of a layer whose first argument is what it reads: the gradients of that are added up once, not for each matrix."""
    layouts = (Replicate(), *[None] * (arguments - 1))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


@torch.no_grad()
def broadcast_parameters(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Give each process its parts of what the first has, one tensor after another: `whole` is {} on the others."""
    stacks, first = local_expert_stacks(model), dist.get_rank() == 0
    for name, mine in [*model.named_parameters(), *model.named_buffers()]:
        _, group = stacks.get(name, (None, None))
        shape = (len(mine) * dist.get_world_size(group), *mine.shape[1:]) if group else mine.shape
        value = (
            whole[name].to(to_local(mine).device).contiguous()
            if first
            else to_local(mine).new_empty(shape)
        )
        dist.broadcast(value, 0)
        value = local_experts(value, group) if group else value
        if isinstance(mine, DTensor):
            value = distribute_tensor(value, mine.device_mesh, mine.placements, src_data_rank=None)
        mine.copy_(value)


def to_local(x: Tensor) -> Tensor:
    """What this process has of it."""
    return x.to_local() if isinstance(x, DTensor) else x


def orthogonalise_shards(stack: DTensor) -> DTensor:
    """muon.orthogonalise of matrices (..., R, C) whose shards lie on several processes; of experts (N, E, R, C) that are
    sharded along E in place.

    Each of the others travels whole to one process, and back in the shards in which it was (all_to_all; on a CPU PyTorch takes
    an all_gather for it); both ways in the dtype in which it is orthogonalised.
    """
    in_place = stack.placements[0].dim < stack.ndim - 2
    matrices = stack if in_place else stack.flatten(0, -3)
    there = matrices.to(products_dtype(stack)).redistribute(
        placements=stack.placements if in_place else [Shard(0)]
    )
    sizes = {"shape": there.shape, "stride": there.stride()}
    made = DTensor.from_local(
        orthogonalise(there.to_local()).contiguous(),
        there.device_mesh,
        there.placements,
        run_check=False,
        **sizes,
    )
    return made.redistribute(placements=matrices.placements).view(stack.shape).to(stack.dtype)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, most: float) -> Tensor:
    """nn.utils.clip_grad_norm_ of the whole model, once the gradients follow their rules -> the norm (), the same for all.

    Its square is that of the parameters which all have, counted once, and that of those which are shared out, experts or
    shards, summed over their processes. Every process must call it. Where none are it does just what clip_grad_norm_ does.
    """
    groups = {p: p.device_mesh.get_group() for p in model.parameters() if isinstance(p, DTensor)}
    groups |= {
        p: dist.group.WORLD if p in groups else group
        for p, group in local_expert_stacks(model).values()
    }  # all, or its owners
    if not groups:
        return nn.utils.clip_grad_norm_(model.parameters(), most)
    grads, square = {}, 0
    for p in model.parameters():
        if p.grad is not None:
            grads.setdefault(groups.get(p), []).append(to_local(p.grad))
    for group, some in grads.items():
        mine = nn.utils.get_total_norm(some).double().square()
        if group is not None:
            dist.all_reduce(mine, group=group)
        square = square + mine
    norm = square.sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1)
    for grad in (grad for some in grads.values() for grad in some):
        grad.mul_(factor)
    return norm
