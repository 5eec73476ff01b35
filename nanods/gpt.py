"""The trunk: a decoder-only transformer, from its configuration to the tokens it generates.

A GPT (Radford et al. 2019) with what has become standard since, each with its source:

    RoPE            positions as rotations of queries and keys            arXiv:2104.09864
    RMSNorm         x / rms(x) before each layer, here without weights    arXiv:1910.07467
    QK-norm         normalise queries and keys, to bound the scores       arXiv:2010.04245
    squared ReLU    max(0, x)^2 in the MLP (nanods/moe.py)                arXiv:2109.08668
    convolution     the MLP also reads the tokens just before; optional   nanods/conv.py
    no biases; output projections start at zero, so each block starts as the identity

V0 and V1 differ in one field of `GPTConfig`, `attention`; V1 and V2 in another, `moe`. Every layer
returns `(x, stats)`: its output, and what can be measured of it (V1's attention the blocks it
selected, V2's experts their load). There is no global state.

Left out on purpose: the loss (nanods/training/language_task.py) and the training loop (train.py).

Pinned by tests/test_gpt.py: cached decoding equals the full forward pass at every length; later
tokens and other rows of the batch never change an output.

Shapes: B batch, T tokens, C width (`n_embd`), H heads, D = C / H width of a head, F hidden width,
V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanods.attention import (
    AttentionConfig,
    block_attention,
    dense_attention,
    sparsity_stats,
    topk_attention,
)
from nanods.attention_selection import select_blocks
from nanods.cache import Cache
from nanods.conv import CausalConv
from nanods.moe import MoEConfig, feed_forward


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 4
    """Blocks in the trunk."""
    n_head: int = 4
    """Heads of each attention layer (H); must divide n_embd into heads of even width."""
    n_embd: int = 128
    """Width of the model (C)."""
    hidden_ratio: int = 4
    """Hidden width of the MLP, and of each expert (F), in multiples of n_embd."""
    context_length: int = 256
    """Longest sequence that the model reads, in tokens (T)."""
    vocab_size: int = 256
    """Tokens in the vocabulary (V). 256: bytes. More: a BPE trained on the data."""
    rope_base: float = 1_000.0
    """RoPE's slowest pair of channels turns once in about 2 pi x this many tokens."""
    query_gain: float = 2.0
    """Root mean square of a normalised query; that of a key is 1. Scores reach query_gain x
    sqrt(width of a head)."""
    conv_width: int = 1
    """Tokens that an MLP, or an expert, reads: its own and the conv_width - 1 before it, through a
    causal convolution (nanods/conv.py). 1: its own only."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        sizes = ("n_layer", "n_head", "n_embd", "hidden_ratio", "context_length", "vocab_size")
        for name in (*sizes, "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if not self.rope_base > 1 or not self.query_gain > 0:
            raise ValueError(
                f"rope_base = {self.rope_base} must be above 1, query_gain = {self.query_gain} "
                "above 0"
            )
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} heads of even "
                f"width: choose n_embd as a multiple of {2 * self.n_head}"
            )
        smallest = {"top_k": 1, "block_size": 1, "top_blocks": 1, "beam": 1, "fan_out": 2}
        for name, minimum in smallest.items():
            value = getattr(self.attention, name)
            if value < minimum:
                raise ValueError(f"attention.{name} = {value} must be at least {minimum}")


class RMSNorm(torch.autograd.Function):
    """y = gain * x / rms(x) along the last dimension, with its own backward.

    The gradient at x is the part of g orthogonal to y, scaled as x was. Written out because
    autograd takes more passes over memory: that costs 8-12% of a step on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = gain * x.size(-1) ** 0.5 / norm.clamp_(min=1e-6)  # zeros stay zeros
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.gain = gain
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        projection = (g * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(g, y, projection, value=-1 / ctx.gain**2).mul_(scale), None


def rms_norm(x: Tensor, gain: float = 1.0) -> Tensor:
    """Scale each vector (last dimension) to the root mean square `gain`."""
    return RMSNorm.apply(x, gain)


def rope_cos_sin(
    positions: Tensor, D: int, dtype: torch.dtype, base: float
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of RoPE's angles: pair i turns by position * base^(-2i/D).

    positions (B or 1, T), D the width of a head -> two tensors (B or 1, 1, T, D/2). The angles are
    computed in fp32 or fp64: bf16 cannot resolve positions above 256.
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = -torch.arange(0, D, 2, device=positions.device, dtype=precise) / D
    frequency = base**exponent  # (D/2,)
    angle = positions[:, None, :, None].to(precise) * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of channels of x (B, H, T, D) by its angle.

    The product q . k then depends on the distance between their positions only.
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, dense or sparse by configuration; without `causal` (V3), dense."""

    def __init__(self, config: GPTConfig, causal: bool = True) -> None:
        super().__init__()
        self.config, self.causal = config.attention, causal
        self.n_head, self.query_gain = config.n_head, config.query_gain
        C = config.n_embd
        self.query, self.key, self.value, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        layer: int = 0,
        inspect: bool = False,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend: x (B, T, C), positions (B or 1, T), None if not causal -> x (B, T, C), stats.

        `valid` (B, T) marks the tokens that are not padding. Padding stands at the end of a row, so
        causal attention needs no mask for it; otherwise its keys are masked.

        For block-sparse attention over a whole sequence the stats are `keys_read` (H,), the share
        of dense attention's query-key pairs that are read, and `flops` (), the share of its
        arithmetic, selection included. With `inspect` also q and k (B, H, T, D) and the selection,
        `blocks` (B, H, R, top_blocks).
        """
        B, T, _ = x.shape
        q, k, v = (
            linear(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
            for linear in (self.query, self.key, self.value)
        )
        q, k = rms_norm(apply_rope(q, rope), self.query_gain), rms_norm(apply_rope(k, rope))
        # On a CPU, attention in bf16 takes four times as long in backward as in fp32.
        with torch.autocast("cpu", enabled=False):
            if self.causal:
                y, stats = self.attend(q, k, v.to(q.dtype), positions, cache, layer)
            else:
                y, stats = dense_attention(q, k, v.to(q.dtype), causal=False, valid=valid), {}
        if inspect:
            stats |= {"q": q, "k": k}
        else:
            stats.pop("blocks", None)
        return self.out(y.transpose(1, 2).flatten(2)), stats

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cache: Cache | None, layer: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend causally: q, k, v (B, H, T, D) of new tokens -> (B, H, T, D), stats.

        With a cache the new tokens also read the tokens before them, which it holds.
        """
        c, T, D = self.config, q.size(2), q.size(3)
        # The position of each query among the keys. None: query t stands at key t.
        query_positions, summaries = None, None
        if cache is not None:
            all_k, all_v = cache.append(layer, k, v, positions)
            if cache.max_length:
                k, v, query_positions = all_k, all_v, positions
                if c.kind == "block":
                    summaries = cache.summaries[layer][:, :, : k.size(2) // c.block_size]
        if c.kind == "dense":
            return dense_attention(q, k, v, positions=query_positions), {}
        if c.kind == "topk":
            return topk_attention(q, k, v, c.top_k, positions=query_positions), {}
        is_whole = query_positions is None
        method = "flat" if c.method == "tile" and not is_whole else c.method
        tree = {"beam": c.beam, "fan_out": c.fan_out}
        blocks = select_blocks(
            q,
            k,
            c.block_size,
            c.top_blocks,
            method,
            c.pool,
            True,
            query_positions,
            summaries,
            **tree,
        )
        if c.method == "tile" and cache is not None:
            if is_whole:
                cache.tile_selections[layer][:, :, : blocks.size(2)] = blocks
            else:
                blocks = cache.tile_selection(layer, blocks, positions)
        y = block_attention(q, k, v, blocks, c.block_size, positions=query_positions)
        stats = {}
        if is_whole:
            stats = sparsity_stats(blocks, T, D, c.block_size, c.method, c.pool, **tree)
        return y, stats | {"blocks": blocks}

    # ---- cost ------------------------------------------------------------------------------------

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one token."""
        total = sum(p.numel() for p in self.parameters())
        return total, total

    def flops_per_token(self, T: int) -> float:
        """Return the operations to train on one token of a sequence of T tokens.

        Each weight takes 2 operations forward (multiply, add) and 4 backward. So does each of the
        2 C numbers of a pair of query and key that is read (q . k, then weight . v). The selection
        of blocks is left out: T x T / block_size products, forward only.
        """
        pairs = self.config.pairs(T) if self.causal else T * T
        return 6 * self.count_parameters()[1] + 12 * self.query.out_features * pairs / T

    def activation_bytes(
        self, T: int, device: str, itemsize: int, tp: int = 1, masked: bool = False
    ) -> list[float]:
        """Return the bytes per token kept for backward, tensor by tensor, in sequences of T tokens.

        `device` is "cpu" or "cuda", `itemsize` the bytes of a number in matrix products, `tp` the
        number of tensor-parallel devices. `masked` says whether keys of padding are masked.
        """
        C, cast = self.query.in_features, itemsize if itemsize < 4 else 0
        C_tp, H_tp = C / tp, self.n_head / tp
        kept = [4 * C, *[cast * C] * 3]  # normalised x, its casts for query, key and value
        kept += [4 * C_tp, 4 * C_tp, 12 * H_tp]  # normalised q and k, their norms
        return kept + self.config.activation_bytes(T, C_tp, H_tp, device, itemsize, masked)

    def tensor_parallel_parameters(self) -> int:
        """Return the number of parameters that tensor parallelism splits: all of them."""
        return self.count_parameters()[0]


class Block(nn.Module):
    """Attention, then MLP or experts: each reads the normalised residual stream and adds to it."""

    def __init__(self, config: GPTConfig, causal: bool = True) -> None:
        super().__init__()
        C, F = config.n_embd, config.hidden_ratio * config.n_embd
        self.attention = Attention(config, causal)
        self.conv = CausalConv(C, config.conv_width) if config.conv_width > 1 else None
        self.mlp = feed_forward(C, F, config.moe)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        layer: int = 0,
        inspect: bool = False,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y, attention_stats = self.attention(
            rms_norm(x), positions, rope, cache, layer, inspect, valid
        )
        x = x + y
        y = rms_norm(x)
        if self.conv is not None:
            recent = cache.recent[layer] if cache is not None else None
            y = self.conv(y, recent, positions, valid)
        y, mlp_stats = self.mlp(y, valid, inspect)
        return x + y, attention_stats | mlp_stats

    # ---- cost ------------------------------------------------------------------------------------

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one token."""
        attention, attention_active = self.attention.count_parameters()
        mlp, mlp_active = self.mlp.count_parameters()
        conv = self.conv.gain.numel() if self.conv is not None else 0
        return attention + conv + mlp, attention_active + conv + mlp_active

    def flops_per_token(self, T: int) -> float:
        """Return the operations to train on one token of a sequence of T tokens."""
        return self.attention.flops_per_token(T) + self.mlp.flops_per_token()

    def activation_bytes(
        self,
        T: int,
        device: str,
        itemsize: int,
        tp: int = 1,
        imbalance: float = 1.0,
        masked: bool = False,
    ) -> list[float]:
        """Return the bytes per token kept for backward, tensor by tensor, in sequences of T tokens.

        The arguments are those of Attention.activation_bytes and MoE.activation_bytes.
        """
        kept = self.attention.activation_bytes(T, device, itemsize, tp, masked)
        if self.conv is not None:
            kept += self.conv.activation_bytes()
        return kept + self.mlp.activation_bytes(device, itemsize, tp, imbalance)

    def backward_bytes(self, itemsize: int, tp: int = 1, imbalance: float = 1.0) -> list[float]:
        """Return the bytes per token of the gradients held during backward, where they are most."""
        return self.mlp.backward_bytes(itemsize, tp, imbalance)

    def tensor_parallel_parameters(self) -> list[int]:
        """Return the parameters that tensor parallelism splits, of attention and of the MLP."""
        return [layer.tensor_parallel_parameters() for layer in (self.attention, self.mlp)]


STARTS_AT_ZERO = ("out.weight", "mlp.out", "conv.gain")
"""Endings of the names of a block's parameters that start at zero: the matrices that write to the
residual stream, so that each block starts as the identity, and the convolution's gains, so that it
starts as the identity, too."""


class GPT(nn.Module):
    optimizers: ClassVar = {"head.weight": "adamw"}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Draw matrices with standard deviation 1/sqrt(input width).

        The head starts at zero, and in each block what STARTS_AT_ZERO names.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(STARTS_AT_ZERO) or name == "head.weight":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.n_embd**-0.5)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        lengths: Tensor | None = None,
        inspect: bool = False,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Predict the next token after each: tokens (B, T) -> logits (B, T, V), stats of each
        layer.

        With a cache, the tokens continue those it holds. Rows of different `lengths` (B,) are
        padded on the right; the logits at the padding are meaningless. `inspect` asks for more
        stats. Raises ValueError if a sequence would exceed `context_length`.
        """
        T = tokens.size(1)
        before = cache.max_length if cache is not None else 0
        if before + T > self.config.context_length:
            raise ValueError(
                f"{before} + {T} tokens exceed context_length = {self.config.context_length}"
            )
        positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # (B, T)
        valid = None
        if lengths is not None:
            valid = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T)
        x = rms_norm(self.embedding(tokens))  # (B, T, C)
        rope = rope_cos_sin(
            positions, self.config.n_embd // self.config.n_head, x.dtype, self.config.rope_base
        )
        stats = []
        for layer, block in enumerate(self.blocks):
            x, layer_stats = block(x, positions, rope, cache, layer, inspect, valid)
            stats.append(layer_stats)
        if cache is not None:
            cache.lengths = cache.lengths + (T if lengths is None else lengths)
            cache.max_length += T if lengths is None else int(lengths.max())
        return self.head(rms_norm(x)), stats

    def new_cache(self, B: int) -> Cache:
        """Return an empty cache for B rows of up to `context_length` tokens."""
        c, weight = self.config, self.embedding.weight
        n_head = self.blocks[0].attention.n_head  # fewer than c.n_head with tensor parallelism
        shape = (B, n_head, c.context_length, c.n_embd // c.n_head)
        recent = (c.conv_width - 1, c.n_embd)
        return Cache(c.attention, c.n_layer, shape, recent, weight.device, weight.dtype)

    # ---- cost ------------------------------------------------------------------------------------

    def tokens_per_example(self) -> dict[str, int]:
        """Return the tokens of one example: a sequence of `context_length`."""
        return {"tokens": self.config.context_length}

    def trunk_blocks(self, name: str) -> Iterable[Block]:
        """Return the blocks that read the input `name` of `tokens_per_example`."""
        return self.blocks

    def masked_inputs(self) -> tuple[str, ...]:
        """Return the inputs whose padding attention masks: none, as causal attention ignores it."""
        return ()

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one token.

        A token uses one row of the embedding, and the experts that are chosen for it.
        """
        total = self.embedding.weight.numel() + self.head.weight.numel()
        active = self.config.n_embd + self.head.weight.numel()
        for block in self.blocks:
            block_total, block_active = block.count_parameters()
            total, active = total + block_total, active + block_active
        return total, active

    def flops_per_token(self, T: int | None = None) -> float:
        """Return the operations to train on one token, forward and backward.

        The token is one of a sequence of T, by default of `context_length`. The embedding is read
        and not multiplied, so it takes none.
        """
        T = T or self.config.context_length
        blocks = sum(block.flops_per_token(T) for block in self.blocks)
        return 6 * self.head.weight.numel() + blocks

    def flops_per_example(self) -> float:
        """Return the operations to train on one sequence of `context_length` tokens."""
        return self.config.context_length * self.flops_per_token()

    @torch.no_grad()
    def update_bias(self, load: Tensor, lr_multiplier: float = 1.0) -> None:
        """Update the routers' selection biases from one optimizer step's load (L, E), by less where
        the learning rate is a small share of its peak."""
        if self.config.moe.bias_rate:
            for block, row in zip(self.blocks, load, strict=True):
                block.mlp.update_bias(row, lr_multiplier)

    # ---- generation ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Collection[int] = (),
        seed: int = 0,
    ) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,), as soon as it is drawn.

        tokens (B, T) holds the prompts, padded on the right; `lengths` (B,) are their lengths.
        After a row has drawn a token of `stop` it yields -1; the iterator ends when all rows have,
        or after `max_new_tokens`. Row b draws from its own random stream (seed, b), so its text
        does not depend on the other rows.

        When a row is full (`context_length`), it keeps the last half of its context, and all rows
        are read again as prompts. So the cost per token stays bounded, and each token sees at least
        half a context.
        """
        B, T = tokens.shape
        context, device = self.config.context_length, tokens.device
        sizes = [T] * B if lengths is None else lengths.tolist()
        if min(sizes) < 1 or max(sizes) > T:
            raise ValueError(f"prompt lengths {sizes} must lie between 1 and {T}")
        rows = [row[:n][-context:] for row, n in zip(tokens.tolist(), sizes, strict=True)]
        streams = [torch.Generator().manual_seed(seed * 1_000_003 + b) for b in range(B)]
        done = torch.zeros(B, dtype=torch.bool, device=device)
        stop_tokens = torch.tensor(sorted(stop), dtype=torch.long, device=device)
        cache, new = None, tokens[:, -1]
        for _ in range(max_new_tokens):
            if cache is None or cache.max_length == context:  # at the start, or a row is full
                half = max(1, context // 2)
                rows = [row if len(row) <= context else row[-half:] for row in rows]
                cache = self.new_cache(B)
                lengths = torch.tensor([len(row) for row in rows], device=device)
                longest = max(map(len, rows))
                padded = [row + [0] * (longest - len(row)) for row in rows]
                logits, _ = self(torch.tensor(padded, device=device), cache, lengths)
                logits = logits[torch.arange(B, device=device), lengths - 1]  # (B, V)
            else:
                logits, _ = self(new[:, None], cache)
                logits = logits[:, -1]
            new = sample_token(logits, temperature, top_k, top_p, streams)  # (B,)
            for row, token in zip(rows, new.tolist(), strict=True):
                row.append(token)
            yield new.masked_fill(done, -1)
            done |= torch.isin(new, stop_tokens)
            if done.all():
                return


def sample_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    streams: list[torch.Generator],
) -> Tensor:
    """Draw one token per row from softmax(logits / temperature): (B, V) -> (B,).

    Temperature 0 takes the likeliest token. `top_k` keeps the k likeliest; `top_p` the fewest
    likeliest that together reach probability p (Holtzman et al. 2019, arXiv:1904.09751). Computed
    on the CPU, in fp64: Apple's GPUs have no fp64, and `streams` then draw alike on every device.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits.cpu().double() / temperature).softmax(dim=-1)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_k is not None:
        ordered[:, top_k:] = 0
    if top_p is not None:
        before = ordered.cumsum(dim=-1) - ordered  # the probability of all likelier tokens
        ordered[before >= top_p * ordered.sum(dim=-1, keepdim=True)] = 0
    drawn = []
    for row, stream in zip(ordered, streams, strict=True):
        drawn.append(torch.multinomial(row, 1, generator=stream))
    return order.gather(-1, torch.stack(drawn)).squeeze(-1).to(logits.device)
