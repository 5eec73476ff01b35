"""Activation checkpointing: keep only each block's input, and compute its activations again in
backward.

Backward needs what forward computed. Without checkpointing that is dozens of numbers per token,
layer and channel; with it only the input x (B, T, C) of each block, and the activations of one
block at a time. The gradients are the same. A step takes about a third more arithmetic, since
forward is a third of it and runs twice. It pays where otherwise only a small micro-batch fits, or
none: `train.py PRESET --plan` says so. Source: Chen et al. 2016, arXiv:1604.06174.

Pinned by tests/training/test_activation_checkpointing.py: the same gradients bit for bit, and how
much less is kept.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from nanods.gpt import Block


def checkpoint_blocks(model: nn.Module) -> None:
    """Make every block of the model recompute its activations in backward. Parameter names stay as
    they are.

    Call it before FSDP shards the model.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
