"""Placement: a model in pieces computes what it did whole, moves only what must move, and the
planner says when it pays.

A pseudo-device is a label on tensors: operations that mix two labels fail, as those of two GPUs do.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from nanods.attention import AttentionConfig
from nanods.errors import UserError
from nanods.gpt import GPT, GPTConfig
from nanods.moe import MoEConfig
from nanods.quantize import quantize, quantized_share
from nanods.serving import placement
from nanods.serving.engine import Engine, Request
from nanods.serving.models import place_model
from nanods.serving.placement import (
    CROSSING_BYTES_PER_SECOND,
    CROSSING_SECONDS,
    EXPERTS_ON_CPU,
    Cost,
    Place,
    compare,
    cost,
    parse_rules,
    place,
    resolve,
)
from tests.test_multimodal import MOE_TRUNK, make_inputs, make_model

DENSE = GPTConfig(4, 2, 16, 4, 16, 20, attention=AttentionConfig("dense"))
V1 = replace(DENSE, attention=AttentionConfig("block", block_size=4, top_blocks=2))
V2 = replace(V1, moe=MoEConfig(n_expert=4))
CONVOLUTION = replace(V2, conv_width=3)
TOKENS = torch.randint(0, 20, (3, 12), generator=torch.Generator().manual_seed(0))


def make_gpt(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0]


def generated(model):
    return torch.stack(list(model.generate(TOKENS, 5, seed=1)))


class PseudoDevices(TorchDispatchMode):
    """Label tensors with the device that `move` gives them, and fail where labels mix."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.labels = WeakTensorKeyDictionary()
        monkeypatch.setattr(placement, "move", self.move)

    def move(self, x, at):
        moved = x.clone()
        self.labels[moved] = at.device
        return moved

    def label_weights(self, model, rules):
        places = resolve(model, rules)
        for name, module in model.named_modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self.labels[tensor] = places[name].device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        found = {self.labels[x] for x in tensors if x in self.labels}
        assert len(found) < 2, f"{operation} mixes devices"
        output = operation(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if found and isinstance(x, torch.Tensor):
                self.labels[x] = next(iter(found))
        return output


SPLITS = {
    "experts": ["blocks.*.mlp=b:fp64"],
    "attention": ["blocks.*.attention=b:fp64"],
    "two layers": ["blocks.1=b:fp64", "blocks.2=b:fp64"],
    "layers apart": ["blocks.0=b:fp64", "blocks.2=c:fp64", "blocks.3=c:fp64"],
    "ends": ["embedding=b:fp64", "head=c:fp64"],
}


@pytest.mark.parametrize("config", [V2, CONVOLUTION], ids=["V2", "convolution"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_model_in_pieces_computes_what_it_did_whole(split, config, monkeypatch):
    model = make_gpt(config)
    expected, expected_text = logits(model), generated(model)
    rules = parse_rules(["*=a:fp64", *SPLITS[split]])
    devices = PseudoDevices(monkeypatch)
    crossings = place(model, rules)
    devices.label_weights(model, rules)
    with devices:
        actual, text = logits(model), generated(model)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert torch.equal(text, expected_text)
    assert crossings.count > 0


def test_pseudo_devices_notice_what_is_not_moved(monkeypatch):
    model, rules = make_gpt(V2), parse_rules(["*=a:fp64", "blocks.1.mlp=b:fp64"])
    devices = PseudoDevices(monkeypatch)
    devices.label_weights(model, rules)
    with devices, pytest.raises(AssertionError, match="mixes devices"):
        logits(model)


def test_neighbours_hand_over_and_shared_inputs_cross_once(monkeypatch):
    model = make_gpt(DENSE)
    rules = parse_rules(["*=a:fp64", "blocks.1=b:fp64", "blocks.2=b:fp64"])
    PseudoDevices(monkeypatch)
    crossings = place(model, rules)
    logits(model)
    x, rope, positions = 3 * 12 * 16 * 8, 12 * 4 * 8, 12 * 8
    assert crossings.count == 2 + 3, "x in and out, cosines, sines and positions in"
    assert crossings.bytes == 2 * x + 2 * rope + positions
    assert len(crossings.copies) == 0, "copies go with what they are copies of"


def test_formats_that_differ_are_pseudo_devices_too():
    """The experts in fp32 beside a trunk in fp64: as if their layer cast in and out itself."""
    model, reference = make_gpt(V2), make_gpt(V2)

    class Casts(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp.float()

        def forward(self, x, valid=None, inspect=False):
            y, stats = self.mlp(x.float(), valid, inspect)
            return y.double(), stats

    whole = logits(model)
    for block in reference.blocks:
        block.mlp = Casts(block.mlp)
    crossings = place(model, parse_rules(["*=cpu:fp64", "blocks.*.mlp=cpu:fp32"]))
    assert model.blocks[0].mlp.up.dtype == torch.float32
    assert model.blocks[0].attention.query.weight.dtype == torch.float64
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-10)
    assert 0 < (logits(model) - whole).abs().max() < 1e-4
    assert crossings.count == 0, "a change of the format alone crosses nothing"


def test_int8_experts_beside_a_trunk_in_fp32():
    model, reference = make_gpt(V2, torch.float32), make_gpt(V2, torch.float32)
    whole = logits(model)
    for block in reference.blocks:
        block.mlp = quantize(block.mlp)
    place(model, parse_rules(["*=cpu:fp32", "blocks.*.mlp=cpu:int8"]))
    assert 0.6 < quantized_share(model) < 1
    assert model.blocks[0].mlp.up[0].weight.dtype == torch.int8
    assert torch.equal(logits(model), logits(reference))
    error = (logits(model) - whole).norm() / whole.norm()
    assert 0 < error < 0.1


def test_a_single_layer_may_be_int8():
    model = make_gpt(DENSE, torch.float32)
    place(model, parse_rules(["*=cpu:fp32", "head=cpu:int8"]))
    assert model.head.weight.dtype == torch.int8 and logits(model).dtype == torch.float32


@pytest.mark.parametrize("part", ["trunks.shared.1", "trunks.*.mlp", "modalities.*.adapter"])
def test_the_parts_of_v3(part, monkeypatch):
    model, inputs = make_model(MOE_TRUNK), make_inputs()
    with torch.no_grad():
        expected, _ = model(inputs)
    rules = parse_rules(["*=a:fp64", f"{part}=b:fp64"])
    devices = PseudoDevices(monkeypatch)
    place(model, rules)
    devices.label_weights(model, rules)
    with devices, torch.no_grad():
        actual, _ = model(inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-10)


# ---- in a server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [V2, CONVOLUTION], ids=["V2", "convolution"])
@pytest.mark.parametrize("split", ["experts", "attention"])
def test_the_engine_gives_the_tokens_of_a_whole_model(split, config, monkeypatch):
    """Three requests in two slots: rows are copied between caches, and contexts fill."""
    model, whole = make_gpt(config), make_gpt(config)
    rules = parse_rules(["*=a:fp64", *SPLITS[split]])
    devices = PseudoDevices(monkeypatch)
    place(model, rules)
    devices.label_weights(model, rules)
    expected = served(whole)
    with devices:
        assert served(model) == expected


def served(model):
    engine, texts = Engine(model, bytes, slots=2, chunk=4), [[] for _ in TOKENS]
    for seed, (prompt, text) in enumerate(zip(TOKENS.tolist(), texts, strict=True)):
        request = Request(tuple(prompt), max_new_tokens=5, seed=seed)
        engine.submit(request, lambda token, text=text: text.append(token.id))
    while engine.has_work():
        engine.step()
    return texts


def finished_run(model, **state):
    return SimpleNamespace(model=model, state=state, folder="runs/v2-tiny")


def test_what_a_placed_model_moves_is_said():
    model = make_gpt(V2, torch.float32)
    whole = logits(model)
    said = place_model(finished_run(model), "cpu", ["blocks.*.mlp=cpu:int8"])
    assert said == "0 bytes cross between devices, in 0 pieces"
    assert model.blocks[0].mlp.up[0].weight.dtype == torch.int8
    assert 0 < (logits(model) - whole).norm() / whole.norm() < 0.1
    said = place_model(finished_run(make_model(MOE_TRUNK)), "cpu", ["trunks.*.mlp=cpu:bf16"])
    assert said.startswith("0 bytes")


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (make_gpt(V2), "layers.1=cpu:fp32", "no module has such a name; there are embedding"),
        (make_gpt(V2), "head=cuda:99:fp32", "--place head=cuda:99:fp32: the model cannot run so"),
        (make_model(MOE_TRUNK), "modalities.image=cpu:bf16", "the model cannot run so"),
    ],
)
def test_a_server_refuses_rules_that_cannot_be_followed(model, rule, message):
    with pytest.raises(UserError, match=message):
        place_model(finished_run(model), "cpu", [rule])


def test_a_server_does_not_place_a_quantised_run():
    with pytest.raises(UserError, match="is quantised already; serve the run that"):
        place_model(finished_run(make_gpt(V2), format="int8"), "cpu", ["head=cpu:int8"])


# ---- rules ---------------------------------------------------------------------------------------


def test_later_rules_win_and_parts_follow_what_contains_them():
    rules = parse_rules(["*=cuda:0:bf16", "blocks.*.mlp=cpu:int8", "blocks.3=cpu:fp32"])
    places = resolve(make_gpt(V2), rules)
    assert places[""] == places["head"] == places["blocks.0.attention.out"]
    assert places["head"] == Place("cuda:0", "bf16")
    assert places["blocks.0.mlp.gate"] == Place("cpu", "int8")
    assert places["blocks.3.mlp.gate"] == places["blocks.3.attention"] == Place("cpu", "fp32")
    again = parse_rules(["*=cpu:bf16", "head=cpu:fp32", "*=cpu:fp64"])
    assert set(resolve(make_gpt(V2), again).values()) == {Place("cpu", "fp64")}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["*"], "write PATTERN=DEVICE:FORMAT; formats are fp64, fp32, bf16, int8"),
        (["*=cpu"], "write PATTERN=DEVICE:FORMAT"),
        (["*=cpu:fp16"], "write PATTERN=DEVICE:FORMAT"),
        (["*=cuda:int8"], "INT8 layers run on the CPU"),
        (["head=cpu:fp32"], "the first rule is for the whole model"),
        (["*=cpu:fp32", "layers.1=cpu:fp32"], "no module has such a name; there are embedding, bl"),
        (["*=cpu:int8"], "quantise the run"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        place(make_gpt(DENSE), parse_rules(rules))


# ---- whether it pays -----------------------------------------------------------------------------


def make_meta(config=V2):
    with torch.device("meta"):
        return GPT(config)


def test_the_cost_is_counted_on_meta():
    of_rules = cost(make_meta(), parse_rules(EXPERTS_ON_CPU))
    mlp = 4 * (4 * 16 + 4 * 2 * 16 * 64)  # of 4 layers: the gate, and 4 experts of 2 matrices
    active = 4 * (4 * 16 + 2 * 2 * 16 * 64)
    attention, ends = 4 * 4 * 16 * 16, 20 * 16
    assert of_rules.stored == {"cuda": 2 * (attention + 2 * ends), "cpu": mlp}
    assert of_rules.read == {"cuda": 2 * (attention + ends + 16), "cpu": active}
    assert of_rules.crossings == 2 * 4, "into and out of the experts of each layer"
    assert of_rules.crossing_bytes == 2 * 4 * 16 * 2, "in bf16"


def test_the_time_of_a_token_is_that_of_its_bytes():
    seconds = Cost({}, {"cuda": 1e9, "cpu": 2e9}, 10, 5000).seconds({"cuda": 1e12, "cpu": 1e10})
    expected = 1e-3 + 0.2 + 5000 / CROSSING_BYTES_PER_SECOND + 10 * CROSSING_SECONDS
    assert seconds == pytest.approx(expected)


def test_moving_the_experts_pays_only_where_the_model_does_not_fit():
    config = replace(V2, n_embd=64, moe=MoEConfig(n_expert=64))
    total = 2 * sum(p.numel() for p in make_meta(config).parameters())
    bandwidth = {"cuda": 1e9, "cpu": 5e7}  # slow, so that the crossings of a small model count less
    choices = []
    for memory in (2 * total, total / 2, total / 1000):
        memory = {"cuda": memory, "cpu": 10 * total}
        table = compare(lambda: make_meta(config), parse_rules(EXPERTS_ON_CPU), memory, bandwidth)
        fitting = {name: seconds for name, (_, seconds, fits) in table.items() if fits}
        choices.append(min(fitting, key=fitting.get))
    assert choices == ["all on cuda", "the rules", "all on cpu"]


def test_all_on_one_device_has_the_format_of_the_whole_model():
    rules, plenty = parse_rules(["head=cpu:fp32", "*=cuda:bf16"]), {"cuda": 1e12, "cpu": 1e12}
    of_option, _, _ = compare(make_meta, rules, plenty, plenty)["all on cuda"]
    assert of_option.stored == {"cuda": 2 * sum(p.numel() for p in make_meta().parameters())}


def test_the_command_says_what_to_choose(monkeypatch, capsys):
    monkeypatch.setattr(placement, "measure_bandwidth", lambda: 2e10)
    monkeypatch.setattr(placement, "main_memory", lambda: 64e9)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["placement", *words])
        placement.main()
        return capsys.readouterr().out

    assert "choose     all on cuda" in call("v2-tiny")
    out = call("v2-base", "--gpu", "rtx4090-24gb")
    assert "27.0 GB on cuda (does not fit)" in out and "choose     the rules" in out
    for words in (["v3-tiny"], ["v2-tiny", "--place", "*=tpu:bf16"], ["v2-tiny", "--gpu", "x"]):
        with pytest.raises(UserError):
            call(*words)


def test_bandwidth_is_measured():
    assert 1e8 < placement.measure_bandwidth(2**22) < 1e12
