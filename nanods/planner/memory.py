"""Where the bytes of a training step go: counted from the configuration, before anything is allocated.

By kind, at the fullest moment of a step (forward, backward and update, in train.py's mixed precision: fp32 weights, products in
bf16 under autocast, whose residual stream stays fp32):

    weights        4 bytes a parameter                              copies      the weights' casts, kept for backward
    gradients      4 bytes                                          activations what each layer keeps for its backward
    optimizer      4 (Muon: momentum), 8 (AdamW: two moments)       logits      thrice in fp32: log-softmax and two gradients
    buffers        gathered weights (fsdp), tokens on their way (all-to-all)
    muon           what updating needs, copies of up to STACKED matrices, beyond what activations and the like have left free

What a layer keeps was read off the autograd graph, tensor by tensor (`torch.autograd.graph.saved_tensors_hooks`), and
tests/planner/test_memory.py holds it to what the process really takes. On a GPU it is the eager graph's; compiled, some is
computed again instead. Not measured on a GPU.

Shapes: C width, F hidden width, H heads, T tokens of a sequence, V vocabulary, E experts, K of them a token.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from nanods.config import Config
from nanods.gpt import GPT
from nanods.multimodal import tokens_per_example
from nanods.training.muon import STACKED, fast_bf16
from nanods.training.parameter_groups import optimizer_of

LARGE = (
    32 << 20
)  # glibc takes a tensor beyond this from the system and gives it back; smaller ones share a heap
HEAP = 1.45  # what that heap grows to, over what is in use: 1.25 to 1.6, measured with and without it (MALLOC_MMAP_THRESHOLD_)
LIBRARIES = 16 << 20  # kernels that oneDNN writes, and the like, at the first step on a CPU
KINDS = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "buffers", "muon")


@dataclass(frozen=True)
class Counts:
    """Numbers of a model's parameters."""

    total: int
    active: int
    """Used by a token."""
    experts: int
    adamw: int
    """Of those outside the experts, the ones that AdamW updates; all others are Muon's."""
    linear: int
    """Of those outside the experts, in matrices that autocast casts."""
    block: int
    """In the largest block, outside the experts."""
    ends: int
    """Outside the blocks."""
    layers: int
    """Blocks, of all trunks."""
    matrix: int
    """In the largest matrix; of experts, of one expert's."""
    stack: int
    """In the matrices that Muon orthogonalises at a time, at most."""


def counts(model: nn.Module) -> Counts:
    named = dict(model.named_parameters())
    blocks = (
        model.blocks
        if isinstance(model, GPT)
        else [block for trunk in model.trunks.values() for block in trunk]
    )
    total, active = model.count_parameters()
    outside = {name: p for name, p in named.items() if p.ndim < 3}
    kind = optimizer_of(model)
    adamw = {name: p for name, p in outside.items() if kind[name] == "adamw"}
    uncast = ("embedding.weight", "position_embedding", "gate.weight")
    block = max(sum(p.numel() for p in block.parameters() if p.ndim < 3) for block in blocks)
    muons = {name: p for name, p in named.items() if name not in adamw}
    stacks = {
        p.shape: min(
            sum(q.shape == p.shape for q in muons.values()), max(1, STACKED // p.shape[:-2].numel())
        )
        * p.numel()
        for p in muons.values()
    }
    return Counts(
        total,
        active,
        experts=sum(p.numel() for p in named.values() if p.ndim == 3),
        adamw=sum(p.numel() for p in adamw.values()),
        linear=sum(
            p.numel() for name, p in outside.items() if p.ndim == 2 and not name.endswith(uncast)
        ),
        block=block,
        ends=sum(p.numel() for p in outside.values()) - block * len(blocks),
        layers=len(blocks),
        matrix=max(p[0].numel() if p.ndim == 3 else p.numel() for p in muons.values()),
        stack=max(stacks.values()),
    )


# ---- activations -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where and how a step is computed, and what of it one device holds."""

    device: str = "cpu"
    width: int = 4
    """Bytes of a number in matrix products: 2 for bf16 and fp16."""
    micro_batch: int = 1
    checkpointing: bool = False
    """Keep each block's input alone, and compute the rest again in backward (Chen et al. 2016, arXiv:1604.06174)."""
    split: int = 1
    """Devices that share the heads, and the hidden width of plain MLPs (tensor parallelism)."""
    overload: float = 1.0
    """Tokens of the busiest device's experts, over the mean."""


def setting(config: Config, device: str, micro_batch: int) -> Setting:
    """As train.py would compute it on this kind of device; another machine's GPUs are taken to multiply bf16 or fp16."""
    auto = device == "cuda" or fast_bf16(torch.device(device))
    narrow = config.dtype in ("bf16", "fp16") or (config.dtype == "auto" and auto)
    return Setting(device, 2 if narrow else 4, micro_batch, config.activation_checkpointing)


def sequences(config: Config) -> dict[str, int]:
    """Tokens of an item by modality; of a language model the context."""
    return tokens_per_example(config.model, config.multimodal) or {
        "tokens": config.model.context_length
    }


def attention_activation_bytes(config: Config, T: int, s: Setting, padded: bool) -> list[float]:
    """Bytes a token that an attention layer keeps, tensor by tensor. `padded`: its keys are masked, as V3's text."""
    m, a = config.model, config.model.attention
    C, H, cast = m.n_embd / s.split, m.n_head / s.split, s.width if s.width < 4 else 0
    whole = m.n_embd
    kept = [
        4 * whole,
        *[cast * whole] * 3,
        4 * C,
        4 * C,
        12 * H,
    ]  # normalised x, its casts, normalised q and k, norms
    if (
        s.device == "cuda"
    ):  # the fused kernels' q, k, v and output, in the narrow type, and one fp32 number a query
        return [*kept, *[s.width * C] * 4, 4 * H] if cast else [*kept, 4 * C, 4 * C, 4 * H]
    kept += [
        4 * C,
        4 * C,
        4 * H,
        cast * C,
    ]  # v, output and lse in fp32 (train.py does not trust a CPU's bf16 there)
    if a.kind == "topk":
        return [*kept, 4 * H * T, 4 * H * T, H * T]
    if a.kind == "block" and (a.method == "tile" or T * a.block_size >= 1 << 14):
        pairs = 8 * H * a.top_blocks if a.method != "tile" else 0
        return [*kept, 0 if cast else 4 * C, pairs]
    return [*kept, 4 * H * T if a.kind == "block" else 4 * T if padded else 0]  # the mask, in fp32


def mlp_activation_bytes(config: Config, s: Setting) -> list[float]:
    """Bytes a token that an MLP, or a layer of experts, keeps."""
    m = config.model
    C, F, cast = m.n_embd, m.hidden_ratio * m.n_embd, s.width if s.width < 4 else 0
    if m.moe.n_expert == 1:
        return [
            4 * C,
            cast * C,
            *[s.width * F / s.split] * 2,
        ]  # normalised x, its cast, relu and its square
    K, E = m.moe.top_k * s.overload, m.moe.n_expert
    router = [4 * C, 8 * E, 32 * m.moe.top_k]
    if s.device == "cuda":
        return [
            *router,
            s.width * K * C,
            s.width * K * F,
            s.width * K * F,
            4 * K * C,
        ]  # experts_grouped
    return [*router, s.width * K * F]  # experts_sorted, in pieces: never large


def grown(tensors: list[float], s: Setting, tokens: float) -> float:
    """Bytes of tensors with so many bytes a token each, and on a CPU what its heap loses between the smaller ones."""
    sizes = [per_token * tokens for per_token in tensors]
    return sum(size * (HEAP if s.device == "cpu" and size < LARGE else 1) for size in sizes)


def activations(config: Config, s: Setting) -> float:
    """Bytes that a micro-batch's forward pass keeps for its backward, and what the fullest layer needs beside them."""
    m, total, fullest = config.model, 0.0, 0.0
    for name, T in sequences(config).items():
        tokens = s.micro_batch * T
        layer = grown(
            [
                *attention_activation_bytes(config, T, s, name == "text"),
                *mlp_activation_bytes(config, s),
            ],
            s,
            tokens,
        )
        ends = grown(
            [4 * m.n_embd, 4 * m.n_embd, s.width * m.n_embd if s.width < 4 else 0], s, tokens
        )  # embedding, last norm
        total += ends + m.n_layer * (grown([4 * m.n_embd], s, tokens) if s.checkpointing else layer)
        F = (
            m.hidden_ratio
            * m.n_embd
            * (m.moe.top_k * s.overload if m.moe.n_expert > 1 else 1 / s.split)
        )
        transient = grown(
            [4 * m.n_embd, s.width * F, s.width * F], s, tokens
        )  # a layer's own gradients
        fullest = max(fullest, transient + (layer if s.checkpointing else 0))
    return total + fullest


def logits(config: Config, s: Setting, ranks: int = 1) -> float:
    """Bytes of the scores and their gradients: next tokens', or (V3) similarities of the own items with the whole batch's."""
    if not config.multimodal.modalities:
        return grown(
            [4 * config.model.vocab_size] * 3, s, s.micro_batch * config.model.context_length
        )
    rows = math.ceil(config.batch_size / ranks)
    return 24.0 * rows * config.batch_size * len(config.multimodal.pair_weights())


# ---- the optimizers ----------------------------------------------------------------------------------------------------------


def scratch(stack: int, s: Setting) -> float:
    """Bytes while Muon orthogonalises matrices of so many numbers: two stacks in fp32, then X, its products and the next X."""
    return (8 + 6 * s.width) * stack


def optimizer_bytes(
    config: Config, c: Counts, outside: float, experts: float, adamw: float
) -> float:
    """Bytes of the optimizers' state, where a device holds so many parameters outside and inside the experts, and so many of
    those outside are AdamW's."""
    return 4 * (outside - adamw) + 8 * adamw + (4 if config.expert_optimizer == "muon" else 8) * experts
