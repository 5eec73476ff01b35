"""The memory of a training step, computed before anything is allocated.

Each layer reports its own parameters and the bytes it keeps for backward (nanods/gpt.py, moe.py,
multimodal.py). This file adds them up for the fullest moment of a step: forward, backward and
update in train.py's mixed precision, with fp32 weights, matrix products in bf16 under autocast and
a residual stream that stays in fp32.

    weights      4 bytes per parameter
    gradients    4 bytes per parameter
    optimizer    Muon 4 bytes per parameter (its momentum), AdamW 8 (two moments)
    copies       the weights cast by autocast, kept for backward
    activations  what each layer keeps for backward
    logits       three fp32 tensors: log-softmax and two gradients
    buffers      weights gathered by FSDP, tokens sent by all-to-all
    muon         what an update needs beyond the memory that activations and the like have freed:
                 copies of up to STACKED matrices

What a layer keeps was read off the autograd graph, tensor by tensor, with
`torch.autograd.graph.saved_tensors_hooks`. tests/planner/test_memory.py compares the sum with the
memory of a CPU process. On a GPU the numbers are those of the eager graph, and were not measured: a
compiled graph recomputes part of it.

Shapes: C width, T tokens of a sequence, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from nanods.build import build_meta_model
from nanods.config import Config
from nanods.gpt import GPT, Block
from nanods.multimodal import Multimodal, tokens_per_example
from nanods.training.language_task import eval_batch_size
from nanods.training.muon import STACKED, fast_bf16
from nanods.training.optimizers import STATE_BYTES
from nanods.training.parameter_groups import fp32_parameters, optimizer_of
from nanods.training.retrieval import EMBED_CHUNK

MMAP_THRESHOLD = 32 << 20  # glibc maps a larger tensor separately; smaller ones share a heap
# The size of that heap over what is in use: measured 1.25 to 1.6, by runs with and without
# MALLOC_MMAP_THRESHOLD_ set.
HEAP_OVERHEAD = 1.45
LIBRARY_BYTES = 16 << 20  # on a CPU, oneDNN's kernels and the like, written at the first step
MEMORY_KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "copies",
    "activations",
    "logits",
    "buffers",
    "muon",
)


# ---- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCost:
    """Numbers of parameters, added up over the layers of a model."""

    total: int
    active: int
    """Used by one token."""
    experts: int
    """In the experts."""
    active_experts: int
    """In the experts that one token uses."""
    adamw: int
    """Outside the experts, updated by AdamW even if Muon updates the matrices."""
    cast: int
    """Outside the experts, in matrices that autocast casts."""
    router: int
    """In routers, which compute in fp32."""
    block: int
    """Outside the experts, in the largest block."""
    ends: int
    """Outside the blocks."""
    n_blocks: int
    """Number of blocks, over all trunks."""
    tensor_parallel: int
    """Split by tensor parallelism."""
    tensor_parallel_layers: int
    """Number of layers that tensor parallelism splits."""
    largest_matrix: int
    """In the largest matrix that Muon updates; of the experts, in one expert's."""
    largest_stack: int
    """In the largest stack of matrices that Muon orthogonalises at once."""
    model: GPT | Multimodal = field(repr=False, compare=False)
    """The model itself, which reports its activations. On the meta device it takes no memory."""


def model_cost(model: GPT | Multimodal) -> ModelCost:
    """Add up the parameters that the layers of a model report.

    The result keeps a reference to the model. Pass one of build_meta_model, which takes no memory.
    """
    parameters, optimizers = dict(model.named_parameters()), optimizer_of(model)
    experts = {p for name, p in parameters.items() if optimizers[name] == "experts"}
    adamw = [p for name, p in parameters.items() if optimizers[name] == "adamw"]
    muon = [p for name, p in parameters.items() if optimizers[name] != "adamw"]
    router = {parameters[name] for name in fp32_parameters(model)}
    linear = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    blocks = [layer for layer in model.modules() if isinstance(layer, Block)]
    block_sizes = [count(p for p in block.parameters() if p not in experts) for block in blocks]
    idle = sum(total - active for total, active in (block.count_parameters() for block in blocks))
    split = [size for block in blocks for size in block.tensor_parallel_parameters()]
    total, active = model.count_parameters()
    return ModelCost(
        total,
        active,
        experts=count(experts),
        active_experts=count(experts) - idle,
        adamw=count(adamw),
        cast=count(linear - router),
        router=count(router),
        block=max(block_sizes),
        ends=total - count(experts) - max(block_sizes) * len(blocks),
        n_blocks=len(blocks),
        tensor_parallel=sum(split),
        tensor_parallel_layers=sum(size > 0 for size in split),
        largest_matrix=max(p.shape[-2:].numel() for p in muon),
        largest_stack=largest_stack(muon),
        model=model,
    )


def count(parameters: Iterable[Tensor]) -> int:
    """Return the number of elements in some parameters."""
    return sum(p.numel() for p in parameters)


def largest_stack(parameters: list[Tensor]) -> int:
    """Return the elements of the largest stack of equal matrices that Muon orthogonalises at once.

    It stacks parameters of one shape, up to STACKED matrices (nanods/training/muon.py).
    """
    number = {}
    for p in parameters:
        number[p.shape] = number.get(p.shape, 0) + 1
    sizes = []
    for shape, n in number.items():
        at_once = max(1, STACKED // shape[:-2].numel())
        sizes.append(min(n, at_once) * shape.numel())
    return max(sizes)


def sequence_lengths(config: Config) -> dict[str, int]:
    """Return the tokens of one example by modality. A language model has one entry, the context."""
    lengths = tokens_per_example(config.model, config.multimodal)
    return lengths or {"tokens": config.model.context_length}


def tokens_per_batch(config: Config) -> int:
    """Return the tokens of one optimizer step, over all modalities."""
    return config.batch_size * sum(sequence_lengths(config).values())


# ---- activations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepConfig:
    """How one device computes its part of a step."""

    device: str = "cpu"
    """Kind of the device, "cpu" or "cuda"."""
    itemsize: int = 4
    """Bytes of a number in matrix products: 2 for bf16 and fp16."""
    micro_batch: int = 1
    checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in backward."""
    tp: int = 1
    """Devices that share the heads and the hidden units of MLPs (tensor parallelism)."""
    imbalance: float = 1.0
    """Tokens of the device with the busiest experts, over the mean of all devices."""


def step_config(config: Config, device: str, micro_batch: int) -> StepConfig:
    """Return how train.py computes a step on a "cpu" or "cuda" device.

    With --dtype auto, GPUs are taken to multiply bf16 or fp16 in hardware.
    """
    narrow = config.dtype in ("bf16", "fp16")
    if config.dtype == "auto":
        narrow = device == "cuda" or fast_bf16(torch.device(device))
    return StepConfig(device, 2 if narrow else 4, micro_batch, config.activation_checkpointing)


def allocated_bytes(tensors: list[float], step: StepConfig, tokens: float) -> float:
    """Return what tensors take from the system, each given in bytes per token.

    On a CPU the smaller tensors share a heap, which is larger than their sum.
    """
    total = 0.0
    for per_token in tensors:
        size = per_token * tokens
        shares_heap = step.device == "cpu" and size < MMAP_THRESHOLD
        total += size * (HEAP_OVERHEAD if shares_heap else 1)
    return total


def activation_bytes(config: Config, cost: ModelCost, step: StepConfig) -> float:
    """Return the bytes of a micro-batch's activations, and of the gradients of the fullest block.

    With checkpointing each block keeps only its input. Backward then computes the rest again, one
    block at a time, so the activations of the fullest block are added once.
    """
    C, cast = config.model.n_embd, step.itemsize if step.itemsize < 4 else 0
    layer = {"itemsize": step.itemsize, "tp": step.tp, "imbalance": step.imbalance}
    kept, fullest = 0.0, 0.0
    for name, T in cost.model.tokens_per_example().items():
        tokens, masked = step.micro_batch * T, name in cost.model.masked_inputs()
        kept += allocated_bytes([4 * C, 4 * C, cast * C], step, tokens)  # embedding, last norm
        for block in cost.model.trunk_blocks(name):
            saved = block.activation_bytes(T, step.device, masked=masked, **layer)
            activations = allocated_bytes(saved, step, tokens)
            gradients = allocated_bytes(block.backward_bytes(**layer), step, tokens)
            if step.checkpointing:
                kept += allocated_bytes([4 * C], step, tokens)  # the block's input
                fullest = max(fullest, gradients + activations)
            else:
                kept += activations
                fullest = max(fullest, gradients)
    return kept + fullest


def logit_bytes(config: Config, step: StepConfig, batch_shards: int = 1) -> float:
    """Return the bytes of the loss: logits and their gradients.

    A language model's logits score each next token. V3's are the similarities of a process's
    examples with the whole batch, for each pair of modalities.
    """
    if not config.multimodal.modalities:
        tokens = step.micro_batch * config.model.context_length
        return allocated_bytes([4 * config.model.vocab_size] * 3, step, tokens)
    local_batch = math.ceil(config.batch_size / batch_shards)
    return 24.0 * local_batch * config.batch_size * len(config.multimodal.pair_weights())


def evaluation_bytes(config: Config, cost: ModelCost, step: StepConfig) -> float:
    """Return the bytes of an evaluation's batch: a forward pass without a graph.

    At its fullest moment it holds the logits and their log-softmax, or what the fullest block makes
    beside the residual stream.
    """
    examples = EMBED_CHUNK if config.multimodal.modalities else eval_batch_size(config)
    return forward_bytes(config, cost, step, examples)


def forward_bytes(config: Config, cost: ModelCost, step: StepConfig, examples: int) -> float:
    """Return the bytes of a forward pass over some examples without a graph, as in
    `evaluation_bytes`."""
    C, V, cast = config.model.n_embd, config.model.vocab_size, step.itemsize % 4
    layer = {"itemsize": step.itemsize, "tp": step.tp, "imbalance": step.imbalance}
    fullest = 0.0
    for name, T in cost.model.tokens_per_example().items():
        tokens, masked = examples * T, name in cost.model.masked_inputs()
        for block in cost.model.trunk_blocks(name):
            made = block.activation_bytes(T, step.device, masked=masked, **layer)
            fullest = max(fullest, allocated_bytes([4 * C, *made], step, tokens))
        if not config.multimodal.modalities:
            logits = [4 * C, 4 * V, 4 * V, cast * V]
            fullest = max(fullest, allocated_bytes(logits, step, tokens))
    return fullest


def teacher_bytes(config: Config, teacher: Config, step: StepConfig) -> float:
    """Return the bytes that a teacher adds to a step (--teacher): its weights, and its forward pass
    over a micro-batch of the student's inputs.

    A language model's distance to it also makes six tensors of the logits' size: the teacher's
    logits, both divided by the temperature, both log-softmaxes, and their product.
    """
    T, V = config.model.context_length, config.model.vocab_size
    step = replace(step, tp=1, imbalance=1.0)  # each device holds all of the teacher
    teacher = replace(teacher, model=replace(teacher.model, context_length=T))
    cost = model_cost(build_meta_model(teacher))
    total = 4 * cost.total + forward_bytes(teacher, cost, step, step.micro_batch)
    if not config.multimodal.modalities:
        total += allocated_bytes([4 * V] * 6, step, step.micro_batch * T)
    return total


# ---- optimizers ----------------------------------------------------------------------------------


def orthogonalisation_bytes(elements: int, step: StepConfig) -> float:
    """Return the bytes that Muon needs to orthogonalise matrices of so many elements in all.

    These are two fp32 stacks, and in the dtype of the products X, the products and the next X.
    """
    return (8 + 6 * step.itemsize) * elements


def optimizer_bytes(
    config: Config, cost: ModelCost, outside: float, experts: float, adamw: float
) -> float:
    """Return the bytes of the optimizers' state on one device.

    The device holds `outside` parameters outside the experts, and `experts` in them. Of those
    outside, `adamw` are AdamW's even if Muon updates the matrices.
    """
    if config.optimizer != "muon":
        return STATE_BYTES[config.optimizer] * (outside + experts)
    muon = STATE_BYTES["muon"] * (outside - adamw)
    return muon + STATE_BYTES["adamw"] * adamw + STATE_BYTES[config.expert_optimizer] * experts
