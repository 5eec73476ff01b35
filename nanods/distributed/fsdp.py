"""Fully sharded data parallelism (FSDP): each process keeps a shard of all weights.

Rajbhandari et al. 2019, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277. Each of P processes
holds 1/P of every matrix, embedding table and stack of experts: consecutive rows of its first
dimension, with the gradients and the optimizer state of those rows. torch's `fully_shard` gathers
the rest when a block needs it:

    before a block, forward and backward    all-gather: the block's whole weights, freed after it
    after a block's backward                reduce-scatter: each process gets its rows of the mean
                                            gradient

once for each micro-batch. Under bf16 autocast a block's weights are rounded before they are
gathered instead of after it, which halves the traffic; gradients are summed in fp32. The modules
outside the blocks are gathered in their own dtype, and stay whole from forward to backward.

Not sharded: scalars (V3's temperature) and the routers' gates, which compute in fp32.
data_parallel.average_gradients averages their gradients. With ep beside fsdp, each rank holds E/P
experts, and the ranks that hold the same ones shard them matrix by matrix: the second dimension of
(E/P, R, C).

AdamW updates each element by itself, so it works on shards as on whole tensors. Muon needs whole
matrices: each matrix is sent to one process, orthogonalised there, and sent back in shards
(`orthogonalise_shards`); its momentum stays sharded. Where every expert of a stack (E, R, C) is
whole on one process, because the stack is sharded along E, nothing is sent.

Pinned by tests/distributed/test_meshes.py and test_fsdp.py. Shapes: N matrices (R, C), E experts.
"""

import logging

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nanods.errors import UserError
from nanods.gpt import Block
from nanods.moe import MoE
from nanods.training.muon import orthogonalise, products_dtype
from nanods.training.parameter_groups import fp32_parameters

# On a CPU, DTensor would warn that `orthogonalise_shards` uses an all-gather, not an all-to-all.
logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)


def shard_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    expert_replicas: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Keep this process's shards of a whole model, in place.

    Call it before the optimizers are created. `mesh`: all processes. `expert_replicas`: where
    experts are split already (ep), the processes that hold the same experts as this one. `dtype`:
    the dtype in which the blocks' weights are gathered, that of autocast (None: their own). Raises
    UserError if the rows of an expert do not divide over its replicas.
    """
    not_sharded = {model.get_parameter(name) for name in fp32_parameters(model)}
    not_sharded |= {p for p in model.parameters() if p.ndim == 0}
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    split_layers = []
    if expert_replicas is not None:
        split_layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in split_layers:
        for stack in (layer.up, layer.out):
            if stack.size(1) % expert_replicas.size():
                raise UserError(
                    f"--mesh fsdp={expert_replicas.size()}: does not divide the {stack.size(1)} "
                    "rows of an expert; choose a divisor"
                )
    block_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )

    def shard(module: nn.Module, over: DeviceMesh, policy: MixedPrecisionPolicy, dim: int) -> None:
        fully_shard(
            module,
            mesh=over,
            mp_policy=policy,
            ignored_params=not_sharded,
            shard_placement_fn=lambda p: Shard(dim),
        )
        # Sum, then divide: gloo has no mean, and the gradients of experts too are divided by the
        # number of all processes (expert_parallel.py).
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(mesh.size())

    for layer in split_layers:
        # Rows of each matrix, not whole experts: there may be fewer experts than replicas.
        shard(layer, expert_replicas, block_policy, dim=1)
    for block in blocks:
        shard(block, mesh, block_policy, dim=0)
    shard(model, mesh, MixedPrecisionPolicy(), dim=0)


def orthogonalise_shards(stack: DTensor) -> DTensor:
    """Compute muon.orthogonalise of sharded matrices: (..., R, C) -> the same, sharded alike.

    A stack (N, E, R, C) that is sharded along E is computed where it is, without communication.
    Other matrices are each sent whole to one process, and back in their shards, both in the dtype
    in which they are orthogonalised (by all-to-all; on a CPU PyTorch uses an all-gather).
    """
    is_whole = stack.placements[0].dim < stack.ndim - 2  # a shard holds whole matrices
    matrices = stack if is_whole else stack.flatten(0, -3)
    whole = matrices.to(products_dtype(stack)).redistribute(
        placements=stack.placements if is_whole else [Shard(0)]
    )
    local = orthogonalise(whole.to_local()).contiguous()
    result = DTensor.from_local(
        local,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return result.redistribute(placements=matrices.placements).view(stack.shape).to(stack.dtype)
