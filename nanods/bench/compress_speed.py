"""How long quantised layers and models take, and whether a row's answer depends on other rows.

Two parts of nanods/bench/compress.py, which says how to run them. One thread. The compared calls
alternate in one process, and each figure is the median of its calls, in CPU seconds.
"""

import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanods.bench.runs import cpu_info, cpu_name, describe_machine
from nanods.build import build_model
from nanods.config import PRESETS
from nanods.gpt import GPT, GPTConfig, MoEConfig
from nanods.moe import MoE
from nanods.multimodal import Multimodal
from nanods.quantize import Int8Linear, choose_kernel, fake_quantize, quantize

WIDTHS, ROWS = (128, 256, 512, 1024, 2048), (1, 16, 256)  # a layer C -> 4 C on M rows
WIDTH, HEADS, LAYERS = 1024, 16, 4
MEASURED_SECONDS = 3.0  # that the calls of one comparison take together, about
MAX_TURNS, MIN_TURNS = 51, 3

Calls = dict[str, Callable[[], object]]


def describe_processor() -> dict[str, object]:
    """Return what INT8's speed depends on: the processor, its instructions, the chosen kernel."""
    flags = set(cpu_info().get("flags", "").split())
    kernel = choose_kernel("cpu")
    return {
        **describe_machine("fp32"),
        "processor": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "int8_instructions": sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8"}),
        "kernel": kernel.name,
        "weight_bits": kernel.weight_bits,
        "why": kernel.reason,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def describe_kernel() -> str:
    """Return the processor and the kernel in one line."""
    processor = describe_processor()
    names = ", ".join(processor["int8_instructions"]) or "none"
    return (
        f"processor  {processor['processor']}, {processor['instructions']}, INT8 instructions: "
        f"{names}\nkernel     {processor['kernel']}, weights of {processor['weight_bits']} bits: "
        f"{processor['why']}"
    )


# ---- speed ---------------------------------------------------------------------------------------


def measure(calls: Calls) -> dict[str, float]:
    """Return the median CPU seconds of each call, over as many turns as MEASURED_SECONDS allow.

    The calls alternate, after one round that is not counted. Time in which other processes had the
    core is not counted either.
    """
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and sum(map(sum, seconds.values())) > MEASURED_SECONDS:
            break
        for name, call in calls.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def times_faster(seconds: dict[str, float]) -> dict[str, float]:
    """Return how many times as fast as fp32 each call is."""
    return {name: seconds["fp32"] / value for name, value in seconds.items() if name != "fp32"}


def compare(title: str, calls: Calls) -> dict[str, dict[str, float]]:
    """Measure calls, print them, and return their seconds and how many times as fast they are."""
    seconds = measure(calls)
    faster = times_faster(seconds)
    parts = [f"fp32 {1e3 * seconds['fp32']:.2f} ms"]
    parts += [f"{name} {ratio:.2f} times as fast" for name, ratio in faster.items()]
    print(f"{title}: {', '.join(parts)}", flush=True)
    return {"seconds": seconds, "times_faster": faster}


def draw_zero_weights(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, its zero matrices drawn at random, as if it were trained."""
    for p in model.parameters():
        if p.ndim > 1 and not p.detach().any():
            nn.init.normal_(p, std=p.size(-1) ** -0.5)
        p.requires_grad_(False)
    return model.eval()


def linear_calls(C: int, rows: int) -> Calls:
    """Return a layer C -> 4 C on rows (rows, C), by format."""
    linear = nn.Linear(C, 4 * C, bias=False).requires_grad_(False)
    x = torch.randn(rows, C)
    in_bf16, x_bf16 = copy.deepcopy(linear).bfloat16(), x.bfloat16()
    in_int8 = Int8Linear.from_float(linear)
    return {
        "fp32": lambda: linear(x),
        "bf16": lambda: in_bf16(x_bf16),
        "INT8": lambda: in_int8(x),
    }


def with_integer_product(C: int, rows: int) -> Calls:
    """Return the layer on PyTorch's INT8 product (torch._int_mm), chosen or not."""
    linear = nn.Linear(C, 4 * C, bias=False).requires_grad_(False)
    layer, x = Int8Linear.from_float(linear), torch.randn(rows, C)
    layer.kernel = "int8"
    return {"PyTorch's INT8 product": lambda: layer(x)}


def with_one_scale(C: int, rows: int) -> Calls:
    """Return PyTorch's older dynamic quantisation: one activation scale for the whole tensor."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao
            from torch.ao.quantization import quantize_dynamic

            linear = nn.Sequential(nn.Linear(C, 4 * C, bias=False))
            layer = quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)
    except (ImportError, RuntimeError) as error:
        print(f"PyTorch's dynamic quantisation left out: {error}")
        return {}
    x = torch.randn(rows, C)
    return {"one scale per tensor": lambda: layer(x)}


def with_torchao(C: int, rows: int, compiled: bool) -> Calls:
    """Return torchao's dynamic INT8 (one activation scale per row), eager or compiled."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return {}
    layer = nn.Sequential(nn.Linear(C, 4 * C, bias=False)).requires_grad_(False)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    call = torch.compile(layer) if compiled else layer
    x = torch.randn(rows, C)
    return {f"torchao, {'compiled' if compiled else 'eager'}": lambda: call(x)}


def part_linear() -> dict:
    """Compare formats of one layer, by width and number of rows."""
    table = {}
    for C in WIDTHS:
        table[str(C)] = {}
        for rows in ROWS:
            title = f"{C} -> {4 * C}, {rows} rows"
            table[str(C)][str(rows)] = compare(title, linear_calls(C, rows))
    return table


def part_peers(peer_rows: tuple[int, ...] = ROWS) -> dict:
    """Compare the layer of width 1024 with other INT8 products."""
    try:
        import torchao

        version = torchao.__version__
    except ImportError:
        version = None
        print("torchao is not installed, left out: make setup EXTRAS=peers")
    table = {"torchao": version, "by_rows": {}}
    for rows in peer_rows:
        calls = linear_calls(WIDTH, rows) | with_integer_product(WIDTH, rows)
        calls |= with_one_scale(WIDTH, rows)
        for compiled in (False, True):
            calls |= with_torchao(WIDTH, rows, compiled)
        table["by_rows"][str(rows)] = compare(f"{WIDTH} -> {4 * WIDTH}, {rows} rows", calls)
    return table


def formats_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model in fp32, bf16 and INT8."""
    return {
        "fp32": model,
        "bf16": copy.deepcopy(model).bfloat16(),
        "INT8": quantize(model, "int8"),
    }


def prefill_and_step(title: str, model: GPT, T: int) -> dict:
    """Compare the formats of a language model: reading T tokens, then one decoding step."""
    tokens = torch.randint(model.config.vocab_size, (1, T))
    reading, stepping = {}, {}
    for name, each in formats_of(model).items():
        reading[name] = partial(read, each, tokens)
        stepping[name] = decoding_step(each, tokens)
    return {
        "prefill": compare(f"{title}, reading {T} tokens", reading),
        "step": compare(f"{title}, one decoding step", stepping),
    }


def read(model: GPT, tokens: Tensor) -> None:
    model(tokens, model.new_cache(len(tokens)))


def decoding_step(model: GPT, tokens: Tensor) -> Callable[[], object]:
    """Return a call that predicts the token after `tokens`, whose keys and values are cached."""
    cache = model.new_cache(len(tokens))
    model(tokens[:, :-1], cache)
    lengths, max_length = cache.lengths, cache.max_length

    def step() -> None:
        cache.lengths, cache.max_length = lengths, max_length  # overwrite the last position
        model(tokens[:, -1:], cache)

    return step


def part_models() -> dict:
    """Compare whole models: width 1024, and the tiny presets."""
    size = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "context_length": 512}
    model = draw_zero_weights(GPT(GPTConfig(**size, vocab_size=256)))
    table = {"width 1024": prefill_and_step(f"width {WIDTH}, {LAYERS} layers", model, 256)}
    for preset in ("v0-tiny", "v1-tiny", "v2-tiny"):
        model = draw_zero_weights(build_model(PRESETS[preset]))
        table[preset] = prefill_and_step(preset, model, 256)
    return table


def part_experts(tokens: int = 2048) -> dict:
    """Compare a layer of 16 experts of width 1024, two for each token."""
    layer = draw_zero_weights(MoE(WIDTH, 4 * WIDTH, MoEConfig(n_expert=16, top_k=2)))
    x = torch.randn(1, tokens, WIDTH)
    in_int8 = quantize(layer)
    calls = {"fp32": lambda: layer(x), "INT8": lambda: in_int8(x)}
    return compare(f"16 experts of width {WIDTH}, {tokens} tokens", calls)


def multimodal(width: int, layers: int, heads: int) -> Multimodal:
    """Return an untrained V3 of texts and images."""
    preset = PRESETS["v3-tiny"]
    trunk = replace(preset.model, n_embd=width, n_layer=layers, n_head=heads)
    modalities = replace(preset.multimodal, modalities=("text", "image"))
    return draw_zero_weights(Multimodal(trunk, modalities))


def part_pair() -> dict:
    """Compare embedding an image and a text of V3, one pair at a time."""
    preset = PRESETS["v3-tiny"]
    tiny = preset.model
    models = {
        f"width {WIDTH}": multimodal(WIDTH, LAYERS, HEADS),
        "v3-tiny": multimodal(tiny.n_embd, tiny.n_layer, tiny.n_head),
    }
    size = preset.multimodal.image_size
    inputs = {
        "text": torch.randint(1, tiny.vocab_size, (1, tiny.context_length)),
        "image": torch.rand(1, 3, size, size),
    }
    table = {}
    for name, model in models.items():
        formats = formats_of(model)
        del formats["bf16"]  # V3 makes its positions and patches in fp32
        calls = {format: partial(each, inputs) for format, each in formats.items()}
        table[name] = compare(f"V3, {name}, an image and a text", calls)
    return table


@torch.no_grad()
def part_speed() -> dict:
    """Measure the speed of layers and models: what INT8 gains on this processor."""
    print(describe_kernel(), flush=True)
    return {
        "processor": describe_processor(),
        "linear": part_linear(),
        "peers": part_peers(),
        "models": part_models(),
        "experts": part_experts(),
        "pair": part_pair(),
    }


# ---- leak ----------------------------------------------------------------------------------------


class PerTensorLinear(nn.Linear):
    """INT8 as in the usual tools, for comparison: one activation scale for the whole tensor.

    In floats. A row's output depends on the largest number in any row.
    """

    @classmethod
    def from_float(cls, linear: nn.Linear) -> "PerTensorLinear":
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = fake_quantize(x, 8, axis=None) @ fake_quantize(self.weight, 8).T
        return y if self.bias is None else y + self.bias


def per_tensor(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose linear layers quantise each activation tensor by one scale."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PerTensorLinear.from_float(child))
    return model


class Leak(NamedTuple):
    """The mean change of a model's logits for 4 texts, in nats."""

    from_quantising: float  # against fp32
    from_the_future: float  # when the second half of each text is another one
    from_other_rows: float  # when the other three texts are others
    from_being_alone: float  # when the other three texts are not there


def measure_leak(model: nn.Module, reference: nn.Module, tokens: Tensor, others: Tensor) -> Leak:
    """Return how the logits of texts `tokens` (B, T) change where nothing should change them."""
    half = tokens.size(1) // 2
    logits = model(tokens)[0]

    def change(other: Tensor, rows: slice, positions: slice) -> float:
        return (other[rows, positions] - logits[rows, positions]).abs().mean().item()

    other_future = torch.cat([tokens[:, :half], others[:, half:]], dim=1)
    other_rows = torch.cat([tokens[:1], others[1:]])
    first, everything = slice(0, 1), slice(None)
    return Leak(
        change(reference(tokens)[0], everything, everything),
        change(model(other_future)[0], everything, slice(0, half)),
        change(model(other_rows)[0], first, everything),
        change(model(tokens[:1])[0], first, everything),
    )


def leak_of_layers() -> dict[str, float]:
    """Return the largest change of a row's output when all other rows change."""
    linear = nn.Linear(WIDTH, 4 * WIDTH, bias=False).requires_grad_(False)
    x = torch.randn(40, WIDTH)
    changed = torch.cat([x[:20], 1000 * torch.randn(20, WIDTH)])
    table = {}
    for name, layer in {
        "Int8Linear": Int8Linear.from_float(linear),
        "one scale per tensor": PerTensorLinear.from_float(linear),
    }.items():
        table[name] = (layer(changed) - layer(x))[:20].abs().max().item()
    experts = quantize(draw_zero_weights(MoE(256, 1024, MoEConfig(n_expert=16, top_k=2))))
    before, _ = experts(x[None, :, :256])
    after, _ = experts(changed[None, :, :256])
    table["INT8 experts"] = (after - before)[0, :20].abs().max().item()
    return table


@torch.no_grad()
def part_leak() -> dict:
    """Measure the change of outputs whose own row does not change: layers, then models."""
    table = {"layers": leak_of_layers(), "models": {}}
    print("largest change of a row's output:", table["layers"], flush=True)
    generator = torch.Generator().manual_seed(0)
    tokens, others = torch.randint(256, (2, 4, 128), generator=generator)
    for preset in ("v0-tiny", "v1-tiny", "v2-tiny"):
        model = draw_zero_weights(build_model(PRESETS[preset]))
        formats = {"fp32": model, "INT8": quantize(model)}
        if preset != "v2-tiny":  # its experts are not linear layers
            formats["one scale per tensor"] = per_tensor(model)
        table["models"][preset] = {}
        for name, each in formats.items():
            leak = measure_leak(each, model, tokens, others)._asdict()
            table["models"][preset][name] = leak
            print(f"{preset}, {name}:", {key: f"{x:.2g}" for key, x in leak.items()}, flush=True)
    return table
