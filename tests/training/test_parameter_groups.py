"""Which optimizer updates each parameter."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from nanods.build import build_meta_model
from nanods.command_line import from_command_line
from nanods.training.parameter_groups import optimizer_of

ADAMW_NAMES = ("embedding.weight", "position_embedding", "head.weight", "gate.weight", "conv.gain")
MODELS = (
    ["v0-tiny"],
    ["v0-tiny", "--conv-width", "1"],
    ["v1-tiny"],
    ["v2-tiny"],
    ["v3-tiny"],
    ["v3-tiny", "--moe.n-expert", "4", "--multimodal.no-shared"],
)


@pytest.mark.parametrize("flags", MODELS, ids=" ".join)
def test_every_parameter_of_the_presets_has_the_optimizer_it_is_known_to_need(flags):
    """By names and shapes: Muon has the matrices but not the tables, and stacks are experts."""
    model = build_meta_model(from_command_line("", flags))
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            expected[name] = "experts"
        elif parameter.ndim < 2 or name.endswith(ADAMW_NAMES):
            expected[name] = "adamw"
        else:
            expected[name] = "muon"
    assert list(optimizer_of(model).items()) == list(expected.items())


def test_a_layer_declares_what_differs_from_the_rule():
    class Layer(nn.Module):
        optimizers: ClassVar = {"scores.weight": "adamw"}

        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(2, 3)
            self.table = nn.Embedding(3, 2)
            self.stack = nn.Parameter(torch.zeros(2, 2, 2))

    class Derived(Layer):
        pass

    assert optimizer_of(Derived()) == {
        "stack": "adamw",
        "scores.weight": "adamw",
        "scores.bias": "adamw",
        "table.weight": "adamw",
    }
    assert optimizer_of(nn.Sequential(nn.Linear(2, 3), Layer()))["0.weight"] == "muon"
    assert optimizer_of(nn.Sequential(nn.Linear(2, 3), Layer()))["1.scores.weight"] == "adamw"
