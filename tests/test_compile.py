"""The GPU route of each version traces in one graph: torch.compile finds nothing that breaks it.

No GPU is needed. The tests choose the route that a GPU would take, run torch.compile with
fullgraph=True, which raises an error at a graph break, and run the traced graph with PyTorch's
eager CPU kernels (backend "aot_eager"), forward only and in bf16.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from nanods.attention import AttentionConfig
from nanods.config import PRESETS
from nanods.gpt import GPT, GPTConfig

SIZE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": 256}
BLOCKS = AttentionConfig("block", block_size=64, top_blocks=2, method="tile")


def random_model(config: GPTConfig) -> GPT:
    """Return a model with random weights everywhere, since an untrained one returns zeros."""
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def trace_and_compare(model: torch.nn.Module, *inputs, **keywords) -> str:
    """Compile `model` into one graph, check that its output is the eager one, return its code."""
    graphs = []

    def record_graph(graph: torch.fx.GraphModule, example_inputs: list):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=record_graph)
    with torch.autocast("cpu", torch.bfloat16):
        output, *_ = compiled(*inputs, **keywords)
        eager, *_ = model(*inputs, **keywords)
    assert len(graphs) == 1
    assert output.dtype == eager.dtype == torch.bfloat16
    assert eager.abs().max() > 0
    assert (output - eager).abs().max() <= 0.02 * eager.abs().max()
    return graphs[0].code


@pytest.fixture
def flex_route(monkeypatch):
    """Let block attention take the GPU's route, FlexAttention, on the CPU."""
    monkeypatch.setattr("nanods.attention.choose_route", lambda *_: "flex")


def test_v0_traces_in_one_graph():
    model = random_model(replace(PRESETS["v0-tiny"].model, **SIZE))
    trace_and_compare(model, torch.randint(0, 256, (2, 250)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_v1_traces_in_one_graph_by_the_gpu_route(flex_route):
    model = random_model(replace(PRESETS["v1-tiny"].model, **SIZE, attention=BLOCKS))
    code = trace_and_compare(model, torch.randint(0, 256, (2, 250)))
    assert code.count("flex_attention(") == SIZE["n_layer"]
