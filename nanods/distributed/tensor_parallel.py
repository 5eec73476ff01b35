"""Tensor parallelism: all processes read the same tokens, each with some of the heads.

Shoeybi et al. 2019, arXiv:1909.08053. Each of P processes has H/P attention heads and F/P hidden
units of each MLP: rows of the first matrices (query, key, value; up) and columns of the last ones
(out). So each process computes one of P terms of what a layer adds to a token:

    forward     all-reduce: the sum of the terms, after attention and after the MLP
    backward    all-reduce: the sum of the gradients of the layer's input

That is twice a block in each direction, whatever the batch size: it pays within one machine.
Everything else (embedding, head, norms, experts) is whole on every process and computed from the
same numbers, so it needs no communication.

Generation is split alike: each process caches the keys and values of its own heads, and as all of
them compute the same logits, all draw the same token from the same random stream. So a token needs
the all-reduces of the forward pass and no other message.

Left out on purpose: training V3, whose loss compares examples between processes; sequence
parallelism. Pinned by tests/distributed/test_meshes.py (training) and
tests/distributed/test_tensor_parallel.py (generation, embedding). Shapes: C width of the trunk,
H heads, F hidden width.
"""

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from nanods.errors import UserError
from nanods.gpt import GPT, Block
from nanods.moe import MLP


def split_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's heads and hidden units of a whole model, in place.

    Call it before the optimizers are created. Raises UserError for a V3 that is not in eval mode,
    for layers that round their weights, and if the heads do not divide over the mesh.
    """
    if not isinstance(model, GPT) and model.training:
        raise UserError(
            "--mesh tp: the loss of V3 compares the examples of different processes, and with tp "
            "all read the same ones; use dp, fsdp or ep"
        )
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    H, P = blocks[0].attention.n_head, mesh.size()
    if H % P:
        raise UserError(
            f"--mesh tp={P}: {H} heads do not divide over {P} processes; choose a tp that divides "
            "them, or another --n-head"
        )
    if type(blocks[0].attention.out) is not nn.Linear:
        raise UserError(
            "--mesh tp: this run rounds its weights (INT8, FP8 or --quantize), and a rounded layer "
            "is not split; use one process"
        )
    for block in blocks:
        plan = {
            "attention": reduce_input_gradient(n_arguments=7),
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.out": RowwiseParallel(),
        }
        if isinstance(block.mlp, MLP):
            plan |= {
                "mlp": reduce_input_gradient(n_arguments=3),
                "mlp.up": ColwiseParallel(),
                "mlp.out": RowwiseParallel(),
            }
        parallelize_module(block, mesh, plan, src_data_rank=None)
        block.attention.n_head = H // P


def all_reduced_numbers(blocks: Iterable[Block]) -> list[int]:
    """Return the size of each all-reduce of a token's forward pass: C after each attention and each
    MLP, none after experts."""
    sizes = []
    for block in blocks:
        sizes += [block.attention.query.in_features] * (1 + isinstance(block.mlp, MLP))
    return sizes


def reduce_input_gradient(n_arguments: int) -> PrepareModuleInput:
    """Return a plan that all-reduces the gradient of a layer's first argument, of `n_arguments`.

    The argument becomes a replicated DTensor. So its gradient is summed over the processes once for
    the whole layer, not once for each of the matrices that read it.
    """
    layouts = (Replicate(), *[None] * (n_arguments - 1))
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
