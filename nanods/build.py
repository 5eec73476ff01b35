"""From a configuration to its model."""

import torch

from nanods.config import Config
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.multimodal import Multimodal


def build_model(config: Config) -> GPT | Multimodal:
    """Return the untrained model of a configuration. Raises UserError if its sizes do not fit
    together."""
    try:
        if config.multimodal.modalities:
            return Multimodal(config.model, config.multimodal)
        return GPT(config.model)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_meta_model(config: Config) -> GPT | Multimodal:
    """Return the same model on the meta device: shapes alone, no memory for the weights."""
    with torch.device("meta"):
        return build_model(config)
