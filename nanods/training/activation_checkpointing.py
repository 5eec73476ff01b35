"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): keep what each block reads, compute the rest twice.

Backward needs what forward computed. Kept, that is dozens of numbers a token, layer and width; dropped, all but a block's input
x (B, T, C) is computed again when backward comes to that block. A step then takes a third more arithmetic (forward is one third
of it), the same numbers, and the room of one block's activations instead of all. Worth it where the micro-batch that fits would
otherwise be small, or none: `train.py PRESET --plan` says so.

Pinned by tests/training/test_activation_checkpointing.py: the same gradients bit for bit, and how much less is kept.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from nanods.gpt import Block


def checkpoint_blocks(model: nn.Module) -> None:
    """Make every block of the model forget what it computed until its backward; before FSDP shares it out. Names stay."""
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
