"""The GPU route of each version traces in one graph: torch.compile finds nothing that breaks it.
And a run says that it compiles.

No GPU is needed. The first tests choose the route that a GPU would take, run torch.compile with
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
from nanods.moe import MoE, MoEConfig
from nanods.moe_kernel import experts_grouped
from nanods.multimodal import Multimodal
from nanods.training.setup import compile_model

SIZE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "context_length": 256}
BLOCKS = AttentionConfig("block", block_size=64, top_blocks=2, method="tile")


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Return `model` with random weights everywhere, since an untrained one returns zeros."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_model(config: GPTConfig) -> GPT:
    return randomise(GPT(config))


def with_grouped_experts(model: torch.nn.Module) -> torch.nn.Module:
    """Return `model` with the GPU's route through the experts."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.run_experts = experts_grouped
    return model


@torch.no_grad()
def trace_and_compare(
    model: torch.nn.Module, *inputs, dtype: torch.dtype = torch.bfloat16, **keywords
) -> str:
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
    assert output.dtype == eager.dtype == dtype
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_v2_traces_in_one_graph_by_the_gpu_route(flex_route):
    config = replace(PRESETS["v2-tiny"].model, **SIZE, attention=BLOCKS)
    model = with_grouped_experts(random_model(config))
    code = trace_and_compare(model, torch.randint(0, 256, (2, 250)))
    assert code.count("flex_attention(") == SIZE["n_layer"]
    assert code.count("grouped_mm(") == 2 * SIZE["n_layer"]


@pytest.mark.parametrize("moe", [MoEConfig(4, 2), MoEConfig(4, 2, capacity_factor=0.8)])
def test_experts_with_padding_trace_in_one_graph_by_the_gpu_route(moe):
    config = replace(PRESETS["v0-tiny"].model, **SIZE, moe=moe)
    model = with_grouped_experts(random_model(config))
    lengths = torch.tensor([100, 7, 31])
    code = trace_and_compare(model, torch.randint(0, 256, (3, 100)), lengths=lengths)
    assert code.count("grouped_mm(") == 2 * SIZE["n_layer"]


class JoinedEmbeddings(torch.nn.Module):
    """Return the embeddings of all modalities as one tensor, since trace_and_compare wants one."""

    def __init__(self, model: Multimodal) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        embeddings, stats = self.model(inputs)
        return torch.cat(list(embeddings.values())), stats


def test_v3_with_experts_and_padded_text_traces_in_one_graph_by_the_gpu_route():
    config = PRESETS["v3-tiny"]
    trunk = replace(config.model, n_layer=2, moe=MoEConfig(4, 2))
    model = with_grouped_experts(randomise(Multimodal(trunk, config.multimodal)))
    text = torch.randint(0, 256, (3, trunk.context_length))
    text[1, 9:] = -1  # padding
    text[2, 30:] = -1
    inputs = {
        "text": text,
        "image": torch.rand(3, 3, 32, 32),
        "audio": torch.randn(3, 32, config.multimodal.frames),
    }
    code = trace_and_compare(JoinedEmbeddings(model), inputs, dtype=torch.float32)
    assert code.count("grouped_mm(") == 2 * len(inputs) * trunk.n_layer


@pytest.mark.parametrize(
    ("wanted", "device", "compiles"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_a_run_says_that_its_first_batches_wait_for_the_compiler(
    wanted, device, compiles, monkeypatch, capsys
):
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch, "compile", lambda model: torch.nn.Sequential(model))
    config = replace(PRESETS["v1-small"], compile=wanted)
    compiled = compile_model(config, model, torch.device(device))
    assert (compiled is model) != compiles
    assert ("compile    the first batches" in capsys.readouterr().out) == compiles


@torch.no_grad()
def test_texts_of_any_length_are_compiled_once_for_all(monkeypatch):
    """Fine-tuning pads each batch to its longest row. The first length has its own graph; the
    second graph serves all later ones. A loop over the length would compile each anew."""
    monkeypatch.setattr("nanods.attention.choose_route", lambda *_: "mask")
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = random_model(GPTConfig(**SIZE, attention=replace(BLOCKS, method="flat")))
    compiled = torch.compile(model, backend=count)
    for T in (200, 190, 180, 170, 160):
        compiled(torch.randint(0, 256, (2, T)))
    assert len(graphs) == 2
