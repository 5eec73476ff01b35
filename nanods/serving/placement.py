"""Place the parts of a model on several devices, each in a format of its own.

    place(model, parse_rules(["*=cuda:bf16", "blocks.*.mlp=cpu:int8"]))

A rule gives the modules whose names match a pattern a device and a format, fp64, fp32, bf16 or
int8. Later rules win, and a module without one goes where the module that contains it goes. So
these two put the experts on the CPU, as INT8, and all else on the GPU.

Where a module's place is not its caller's, hooks move what goes in to the module, and what comes
out back to the caller. Between neighbours in a list of blocks that share a place, nothing is moved.
The model's code stays as it is; keys and values lie where their attention layer is.

Is it worth it? Generating a token takes about as long as reading its weights from memory, since
each is used once (nanods/planner/ has the times of training), and a GPU reads its memory many times
faster than a CPU. So weights that fit belong on the GPU. Of a model with many experts a token reads
few, so they are the first to move; `compare` says when that is needed.

    python -m nanods.serving.placement v2-base --gpu rtx4090-24gb
    python -m nanods.serving v2-base --device cuda --place "blocks.*.mlp=cpu:int8"

Left out on purpose: computing on both devices at the same time, moving weights to the GPU when they
are needed, and several rows, which share what is read.

Pinned by tests/serving/test_placement.py, on pseudo-devices: no test needs a GPU.

Shapes: B rows, T tokens, C width of the trunk, E experts, K experts per token.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nanods.build import build_meta_model
from nanods.config import PRESETS
from nanods.errors import UserError, run
from nanods.flags import parse_args
from nanods.gpt import GPT
from nanods.moe import MoE
from nanods.planner.hardware import find_gpu, main_memory, usable_memory
from nanods.quantize import Int8Linear, quantize

FORMATS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # the activations between its layers
}
EXPERTS_ON_CPU = ("*=cuda:bf16", "blocks.*.mlp=cpu:int8")
# Assumptions about the way between CPU and GPU, which PCIe 4.0 x16 and one kernel launch meet.
CROSSING_BYTES_PER_SECOND, CROSSING_SECONDS = 25e9, 20e-6


@dataclass(frozen=True)
class Place:
    device: str
    format: str

    @property
    def bytes_per_weight(self) -> int:
        return 1 if self.format == "int8" else FORMATS[self.format].itemsize


def parse_rules(rules: Iterable[str]) -> dict[str, Place]:
    """Return the place of each pattern, from words such as "blocks.*.mlp=cpu:int8"."""
    places = {}
    for rule in rules:
        pattern, _, place = rule.partition("=")
        device, _, format = place.rpartition(":")
        if not pattern or not device or format not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"--place {rule}: write PATTERN=DEVICE:FORMAT; formats are {known}")
        if format == "int8" and device != "cpu":
            raise UserError(f"--place {rule}: INT8 layers run on the CPU; write cpu:int8")
        places.pop(pattern, None)  # the later rule comes later in the order, too
        places[pattern] = Place(device, format)
    return places


def resolve(model: nn.Module, rules: dict[str, Place]) -> dict[str, Place]:
    """Return the place of every module, by name. Raises UserError for a pattern that matches no
    module, and unless there is one for the whole model, such as *."""
    patterns, latest = list(rules), {}
    for name, _ in model.named_modules():  # a module comes after the one that contains it
        matching = [i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)]
        parent = name.rpartition(".")[0]
        latest[name] = max([*matching, latest[parent] if name else -1])
    if latest[""] < 0:
        raise UserError("--place: the first rule is for the whole model, such as *=cuda:bf16")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in latest):
            some = ", ".join(name for name in latest if name.count(".") in (0, 1) and name)
            raise UserError(f"--place {pattern}: no module has such a name; there are {some}")
    return {name: rules[patterns[i]] for name, i in latest.items()}


# ---- moving --------------------------------------------------------------------------------------


def move(x: Tensor, place: Place) -> Tensor:
    """Return a tensor at a place. Integers keep their dtype, and tensors on meta stay there."""
    dtype = FORMATS[place.format] if x.is_floating_point() else x.dtype
    return x.to("meta" if x.is_meta else place.device, dtype)


class Crossings:
    """Moves activations, and counts what has gone from one device to another."""

    def __init__(self) -> None:
        self.count = self.bytes = 0
        # What several modules read, such as RoPE's tables, is moved once: it is kept as long as
        # the tensor that it is a copy of.
        self.copies = WeakTensorKeyDictionary()

    def move(self, x: Tensor, place: Place, crosses: bool) -> Tensor:
        moved = move(x, place)
        if crosses:
            self.count += 1
            self.bytes += min(x.nbytes, moved.nbytes)
        return moved

    def copy(self, x: object, place: Place, crosses: bool) -> object:
        """Move all tensors of tuples and dicts, each once."""
        if isinstance(x, tuple):
            return tuple(self.copy(value, place, crosses) for value in x)
        if isinstance(x, dict):
            return {key: self.copy(value, place, crosses) for key, value in x.items()}
        if not isinstance(x, Tensor):
            return x
        copies = self.copies.setdefault(x, {})
        if place not in copies:
            copies[place] = self.move(x, place, crosses)
        return copies[place]


def place(model: nn.Module, rules: dict[str, Place]) -> Crossings:
    """Move the parts of a model to their places, in place. Returns the counter of crossings, which
    each forward pass adds to.

    Raises UserError for a pattern that matches nothing, and for a whole model of INT8, which
    nanods/training/quantize.py writes.
    """
    places = resolve(model, rules)
    if places[""].format == "int8":
        raise UserError("--place: to store all in INT8, quantise the run (make quantize-v2)")
    for name in [n for n in places if places[n].format == "int8"]:
        parent = name.rpartition(".")[0]
        if places[parent].format != "int8" and not next(model.parameters()).is_meta:
            part = model.get_submodule(name)
            is_linear = isinstance(part, nn.Linear)
            model.set_submodule(name, Int8Linear.from_float(part) if is_linear else quantize(part))
    places, crossings = resolve(model, rules), Crossings()
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = move(tensor.data, places[name])
        caller = caller_of(model, name)
        if caller is not None and places[name] != places[caller]:
            before, after = (neighbour(name, step) for step in (-1, 1))
            comes_from_here = places.get(before) == places[name]
            stays_here = places.get(after) == places[name]
            add_hooks(module, places[name], places[caller], comes_from_here, stays_here, crossings)
    if isinstance(model, GPT):
        place_caches(model, places)
    return crossings


def caller_of(model: nn.Module, name: str) -> str | None:
    """Return the name of the module whose code calls this one: lists only contain it."""
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            return name
    return None


def neighbour(name: str, step: int) -> str | None:
    """Return the name of the module before (-1) or after (1) one in a list of blocks."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{int(last) + step}" if last.isdigit() else None


def add_hooks(
    module: nn.Module,
    here: Place,
    there: Place,
    comes_from_here: bool,
    stays_here: bool,
    crossings: Crossings,
) -> None:
    """Move a module's inputs here before each call, and its output to its caller's place, there.

    The first input may already be here, and the output may stay, for a neighbour. A layer's stats
    stay where they are: nothing but reports reads them.
    """
    crosses = here.device != there.device

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        first = crossings.move(args[0], here, crosses and not comes_from_here)
        others = crossings.copy(args[1:], here, crosses)
        return (first, *others), crossings.copy(kwargs, here, crosses)

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if stays_here:
            return None
        if isinstance(output, Tensor):
            return crossings.move(output, there, crosses)
        return crossings.move(output[0], there, crosses), *output[1:]

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def place_caches(model: GPT, places: dict[str, Place]) -> None:
    """Make `model.new_cache` allocate each layer's keys and values where its attention is, and its
    convolution's newest inputs where the convolution is."""
    new_cache = model.new_cache

    def placed_cache(B: int):
        cache = new_cache(B)
        for tensors in (cache.keys, cache.values, cache.summaries, cache.tile_selections):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = move(tensor, places[f"blocks.{layer}.attention"])
        for layer, block in enumerate(model.blocks):
            if block.conv is not None:
                place = places[f"blocks.{layer}.conv"]
                cache.recent[layer] = move(cache.recent[layer], place)
        return cache

    model.new_cache = placed_cache


# ---- whether it pays -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of a placement: what it stores on each device, and what one generated token takes."""

    stored: dict[str, float]
    """Bytes of weights, by device."""
    read: dict[str, float]
    """Bytes of weights that a token reads, by device."""
    crossings: int
    crossing_bytes: int

    def seconds(self, bandwidth: dict[str, float]) -> float:
        """Return the time of a token at `bandwidth` bytes per second from each device's memory."""
        reading = sum(size / bandwidth[device] for device, size in self.read.items())
        crossing = self.crossing_bytes / CROSSING_BYTES_PER_SECOND
        return reading + crossing + self.crossings * CROSSING_SECONDS


def weights_read(module: nn.Module, name: str, weight: Tensor) -> float:
    """Return how many numbers of a module's weight one token reads."""
    if isinstance(module, nn.Embedding):
        return weight.size(1)
    if isinstance(module, MoE) and name in ("up", "out"):
        return weight.numel() * module.top_k / len(weight)
    return weight.numel()


def cost(model: GPT, rules: dict[str, Place]) -> Cost:
    """Return the cost of a placement by running the model, which must be on meta, on one token.

    The model is placed by this and cannot be placed again.
    """
    places = resolve(model, rules)
    stored, read = dict.fromkeys(devices(rules), 0.0), dict.fromkeys(devices(rules), 0.0)
    for path, module in model.named_modules():
        at = places[path]
        for name, weight in module.named_parameters(recurse=False):
            stored[at.device] += weight.numel() * at.bytes_per_weight
            read[at.device] += weights_read(module, name, weight) * at.bytes_per_weight
        if isinstance(module, MoE):  # it counts tokens, and tensors on meta have no values
            module.forward = lambda x, *rest: (torch.empty_like(x), {})
    crossings = place(model, rules)
    model(torch.zeros(1, 1, dtype=torch.long, device="meta"))
    return Cost(stored, read, crossings.count, crossings.bytes)


def devices(rules: dict[str, Place]) -> Iterator[str]:
    return (place.device for place in rules.values())


def compare(
    make_model: Callable[[], GPT],
    rules: dict[str, Place],
    memory: dict[str, float],
    bandwidth: dict[str, float],
) -> dict[str, tuple[Cost, float, bool]]:
    """Return the cost, seconds per token and whether it fits: of the rules, and of everything on
    each device, in the format of the rule for the whole model.

    `make_model` returns a new model on meta; `memory` in bytes and `bandwidth` in bytes per second,
    by device.
    """
    whole = resolve(make_model(), rules)[""]
    options = {f"all on {device}": {"*": Place(device, whole.format)} for device in memory}
    table = {}
    for name, option in {"the rules": rules, **options}.items():
        of_option = cost(make_model(), option)
        fits = all(size <= memory[device] for device, size in of_option.stored.items())
        table[name] = of_option, of_option.seconds(bandwidth), fits
    return table


def measure_bandwidth(size: int = 2**28) -> float:
    """Return the bytes per second that this CPU reads from its memory, with PyTorch's threads."""
    x, best = torch.ones(size // 4), float("inf")
    for _ in range(3):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return size / best


@dataclass(frozen=True)
class Args:
    preset: Annotated[str, tyro.conf.Positional]
    """A preset of V0 to V2."""
    gpu: str = "rtx4090-24gb"
    """The GPU beside this machine's CPU."""
    place: tuple[str, ...] = EXPERTS_ON_CPU
    """Rules PATTERN=DEVICE:FORMAT; devices are cpu and cuda."""


def main() -> None:
    """Print what each placement stores, moves and takes, and which to choose."""
    args = parse_args(Args, __doc__)
    config, gpu, rules = PRESETS.get(args.preset), find_gpu(args.gpu), parse_rules(args.place)
    if config is None or config.multimodal.modalities:
        raise UserError(f"{args.preset}: give a preset of V0 to V2, such as v2-base")
    if unknown := set(devices(rules)) - {"cpu", "cuda"}:
        raise UserError(f"--place: devices are cpu and cuda, not {', '.join(sorted(unknown))}")
    memory = {"cuda": gpu.usable_memory, "cpu": usable_memory("cpu", main_memory())}
    bandwidth = {"cuda": gpu.bandwidth, "cpu": measure_bandwidth()}
    print(f"gpu        {gpu.name}, {gpu.bandwidth / 1e9:,.0f} GB/s")
    print(f"cpu        {bandwidth['cpu'] / 1e9:,.1f} GB/s, measured")
    table = compare(lambda: build_meta_model(config), rules, memory, bandwidth)
    for name, (of_option, seconds, fits) in table.items():
        stored = ", ".join(f"{size / 1e9:,.1f} GB on {d}" for d, size in of_option.stored.items())
        print(
            f"{name:<12} {stored}{'' if fits else ' (does not fit)'}; a token takes "
            f"{1e3 * seconds:,.2f} ms, and {of_option.crossing_bytes / 1e3:,.1f} kB cross in "
            f"{of_option.crossings} pieces"
        )
    fitting = {name: seconds for name, (_, seconds, fits) in table.items() if fits}
    print(f"choose     {min(fitting, key=fitting.get) if fitting else 'a larger GPU: none fits'}")


if __name__ == "__main__":
    run(main)
