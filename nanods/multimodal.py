"""V3's model: text, images and audio in one embedding space, through one transformer.

What V3 adds to V2: a token may stand for something other than text. A modality is a small class. It
cuts its input into tokens, gives them positions on a grid, and has an adapter of its own that maps
the trunk's output into the common space:

    class   input                               a token is            positions
    Text    (B, T) ids, -1 as padding           a byte or BPE token   on a line
    Image   (B, 3, Y, X) in 0 .. 1              a patch               on a plane
    Audio   (B, S, F) log-mel bands, frames     a few frames          in time

    tokens -> trunk: V2's blocks without a causal mask -> mean over tokens -> adapter -> unit length

The trunk between tokens and adapters is shared by all modalities, its experts included.
`shared=False` gives each modality a trunk of its own, as CLIP (Radford et al. 2021,
arXiv:2103.00020) has two towers; this is the article's "specialised model" (its claim V3.2).

To add a modality, write a class that inherits from `Modality` and enter it in `MODALITIES`
(lessons/03_multimodal.ipynb adds point clouds). The model needs no other change.

Left out on purpose: the loss (nanods/contrastive.py); sparse attention, since examples are short
(80 tokens at tiny size, 576 at base); a class token or attention pooling instead of the mean.

Pinned by tests/test_multimodal.py: neither padding nor the rest of the batch changes an embedding,
and the model distinguishes all positions.

Shapes: B examples, T tokens of one example, C width of the trunk, M width of the common space,
D width of a head, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanods.contrastive import Temperature
from nanods.gpt import STARTS_AT_ZERO, Block, GPTConfig, rms_norm, rope_cos_sin

GRID_BASE = 100.0  # RoPE's base on grids: the slowest of 8 pairs turns once in about 350 positions
N_MELS = 32  # mel bands, as in nanods/data/sound.py


@dataclass(frozen=True)
class MultimodalConfig:
    modalities: tuple[str, ...] = ()
    """Modalities to embed in one space: text, image, audio. Empty: a language model (V0 to V2)."""
    pairs: tuple[str, ...] = ()
    """Pairs that the loss compares, such as text-image text-audio. Empty: all pairs."""
    shared: bool = True
    """Share one trunk among all modalities; otherwise each has its own."""
    width: int = 128
    """Width of the common space (M)."""
    temperature: float = 0.1
    """Initial temperature of the contrastive loss. It is learnt, and never falls below 0.01."""
    image_size: int = 32
    """Height and width of an image, in pixels."""
    patch_size: int = 4
    """Height and width of a patch, which becomes one token; must divide image-size."""
    frames: int = 32
    """Frames of a spectrogram, one every 32 ms."""
    patch_frames: int = 2
    """Frames in a token; must divide frames."""
    hard_batches: bool = True
    """Put similar scenes (a mirror image, another shape) into one batch; otherwise draw batches at
    random."""
    entropy_coefficient: float = 0.0
    """Weight of the experts' entropy losses for each modality (LIMoE), beside the balance loss over
    all tokens. 0: off."""
    min_experts: float = 4.0
    """Number of experts that a modality must use before the entropy loss stops pushing it to use
    more."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.modalities if name not in MODALITIES]:
            raise ValueError(
                f"multimodal.modalities: no {', '.join(unknown)}; there are {', '.join(MODALITIES)}"
            )
        if len(set(self.modalities)) != len(self.modalities) or len(self.modalities) == 1:
            raise ValueError(
                f"multimodal.modalities {' '.join(self.modalities)}: at least two, each once"
            )
        known_pairs = sorted(f"{a}-{b}" for a in self.modalities for b in self.modalities if a != b)
        if unknown := [pair for pair in self.pairs if pair not in known_pairs]:
            raise ValueError(
                f"multimodal.pairs: no {', '.join(unknown)}; "
                f"there are {', '.join(known_pairs) or 'none'}"
            )
        self._check_divisor("image_size", "patch_size")
        self._check_divisor("frames", "patch_frames")
        if self.width < 1 or not self.min_experts >= 1:
            raise ValueError(
                f"multimodal.width = {self.width} and min_experts = {self.min_experts}: "
                "both must be at least 1"
            )
        if not self.temperature >= 0.01:
            raise ValueError(f"multimodal.temperature = {self.temperature} must be at least 0.01")
        if not self.entropy_coefficient >= 0:
            raise ValueError(
                f"multimodal.entropy_coefficient = {self.entropy_coefficient} must be at least 0"
            )

    def _check_divisor(self, size_name: str, part_name: str) -> None:
        """Raise ValueError unless the field `part_name` divides the field `size_name`."""
        size, part = getattr(self, size_name), getattr(self, part_name)
        if size < 1 or part < 1 or size % part:
            raise ValueError(
                f"multimodal.{part_name} = {part} does not divide {size_name} = {size}: "
                "choose a divisor"
            )

    def pair_weights(self) -> dict[tuple[str, str], float]:
        """Return the pairs of modalities that the loss compares, each with weight 1."""
        if self.pairs:
            return {tuple(pair.split("-")): 1.0 for pair in self.pairs}
        return dict.fromkeys(combinations(self.modalities, 2), 1.0)


# ---- what all modalities share -------------------------------------------------------------------


def grid_rope(sides: Sequence[int], D: int) -> tuple[Tensor, Tensor]:
    """Compute RoPE's cosines and sines for tokens on a grid, listed row by row.

    `sides` are the lengths of the grid's axes. Each axis rotates its share of the D/2 pairs of
    channels (axial RoPE: Heo et al. 2024, arXiv:2403.13298); on one axis this is RoPE itself.
    Returns cosines and sines, each (1, 1, T, D/2), where T is the product of `sides`. Raises
    ValueError unless D is a multiple of 2 * number of axes, so that each axis gets whole pairs.
    """
    axes = len(sides)
    if D % (2 * axes):
        grid = " x ".join(map(str, sides))
        raise ValueError(
            f"heads of width {D}: tokens on a grid of {grid} need a multiple of {2 * axes}, "
            "two channels for each axis; choose another n-head or n-embd"
        )
    positions = torch.cartesian_prod(*(torch.arange(side) for side in sides))
    positions = positions.view(-1, axes)  # (T, axes)
    cosines, sines = [], []
    for position in positions.unbind(dim=1):
        cos, sin = rope_cos_sin(position[None], D // axes, torch.float32, GRID_BASE)
        cosines.append(cos)
        sines.append(sin)
    return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)


class Modality(nn.Module):
    """Base class of a modality: position embeddings, and the adapter into the common space.

    A subclass sets `input_field`, calls `super().__init__` with the sides of its grid, and
    implements `tokens`. It is constructed as `Class(trunk, config)`; settings of its own, such as
    image_size, are fields of MultimodalConfig.
    """

    input_field: str  # the field of nanods.data.examples.Examples that holds its input
    optimizers: ClassVar = {"position_embedding": "adamw"}
    padded: ClassVar = False  # whether `tokens` returns a mask of padding

    def __init__(self, trunk: GPTConfig, width: int, *sides: int) -> None:
        """Create embeddings for the positions of a grid with these `sides`.

        Raises ValueError unless the width of a head is a multiple of 2 * number of sides.
        """
        super().__init__()
        C = trunk.n_embd
        position_embedding = torch.randn(*sides, C).flatten(0, -2) * C**-0.5
        self.position_embedding = nn.Parameter(position_embedding)  # (T, C)
        cos, sin = grid_rope(sides, C // trunk.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.adapter = nn.Sequential(
            nn.Linear(C, C, bias=False), nn.GELU(), nn.Linear(C, width, bias=False)
        )

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cut the input into tokens: x (B, ...) -> tokens (B, T, C), valid (B, T).

        `valid` is False at padding, None if there is none. A class that returns a mask sets
        `padded = True`.
        """
        raise NotImplementedError

    def prepare(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Prepare the trunk's input: x (B, ...) -> tokens (B, T, C), their RoPE tables, valid.

        Raises ValueError for more tokens than there are positions.
        """
        tokens, valid = self.tokens(x)
        T, max_tokens = tokens.size(1), len(self.position_embedding)
        if max_tokens < T:
            raise ValueError(f"{T} tokens: this model has positions for {max_tokens}")
        tokens = rms_norm(tokens + self.position_embedding[:T])
        return tokens, (self.cos[:, :, :T], self.sin[:, :, :T]), valid

    def project(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Pool and project the trunk's output: x (B, T, C) -> unit-length embeddings (B, M).

        The result is in at least fp32.
        """
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        count = x.size(1) if valid is None else valid.sum(dim=1, keepdim=True)
        e = self.adapter(rms_norm(x.sum(dim=1) / count))
        return F.normalize(e if e.dtype == torch.float64 else e.float(), dim=-1)

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one example."""
        total = sum(p.numel() for p in self.parameters())
        return total, total

    def flops_per_example(self) -> int:
        """Return the operations to train on one example, outside the trunk.

        The adapter runs once per example. Every other linear layer of the modality runs once per
        token. Tables (embeddings) are read and not multiplied.
        """
        T = len(self.position_embedding)
        linears = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        adapter = sum(p.numel() for p in self.adapter.parameters())
        per_token = sum(layer.weight.numel() for layer in linears) - adapter
        return 6 * (T * per_token + adapter)


# ---- the modalities ------------------------------------------------------------------------------


class Text(Modality):
    """Text as token ids of a BPE, or of bytes."""

    input_field = "captions"
    padded = True

    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        super().__init__(trunk, config.width, trunk.context_length)
        self.embedding = nn.Embedding(trunk.vocab_size, trunk.n_embd)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embed ids x (B, T), padded with -1; each text has at least one token."""
        return self.embedding(x.clamp(min=0)), x >= 0


class Image(Modality):
    """Images as overlapping patches, one token for each patch_size x patch_size square.

    Patches overlap by half: each token sees half a patch of context on every side, so edges cut by
    the grid stay visible (the idea of early convolutions, Xiao et al. 2021, arXiv:2106.14881).
    Recall after 200 steps is 0.89 with the overlap, 0.78 without (LOG.md).
    """

    input_field = "images"

    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        self.patch_size = config.patch_size
        side = config.image_size // self.patch_size
        super().__init__(trunk, config.width, side, side)
        self.patch = nn.Linear(3 * (2 * self.patch_size) ** 2, trunk.n_embd, bias=False)

    def tokens(self, x: Tensor) -> tuple[Tensor, None]:
        """Cut images x (B, 3, Y, X) in 0 .. 1 into patches and embed them."""
        before = self.patch_size // 2
        after = self.patch_size - before
        x = x.to(self.position_embedding.dtype) - 0.5
        x = F.pad(x, (before, after, before, after))  # 0 is grey
        patches = F.unfold(x, 2 * self.patch_size, stride=self.patch_size)
        return self.patch(patches.mT), None  # (B, T, 3 (2 patch_size)^2) -> (B, T, C)


class Audio(Modality):
    """Audio as a log-mel spectrogram, one token for patch_frames frames."""

    input_field = "mels"

    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        self.patch_frames = config.patch_frames
        super().__init__(trunk, config.width, config.frames // self.patch_frames)
        self.patch = nn.Linear(N_MELS * self.patch_frames, trunk.n_embd, bias=False)

    def tokens(self, x: Tensor) -> tuple[Tensor, None]:
        """Embed spectrograms x (B, S, F) of about mean 0 and standard deviation 1."""
        x = x.to(self.position_embedding.dtype)
        patches = x.unflatten(2, (-1, self.patch_frames))  # (B, S, T, patch_frames)
        patches = patches.transpose(1, 2).flatten(2)  # (B, T, S patch_frames)
        return self.patch(patches), None


MODALITIES = {"text": Text, "image": Image, "audio": Audio}


@cache
def tokens_per_example(trunk: GPTConfig, config: MultimodalConfig) -> dict[str, int]:
    """Return the number of tokens of an example by modality, for text the maximum.

    Builds the modalities on the meta device, so it takes no memory at any size.
    """
    with torch.device("meta"):
        modalities = {name: MODALITIES[name](trunk, config) for name in config.modalities}
    return {name: len(modality.position_embedding) for name, modality in modalities.items()}


# ---- the model -----------------------------------------------------------------------------------


class Multimodal(nn.Module):
    """Embed several modalities in one space: tokens -> trunk -> mean -> adapter."""

    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        """Build the modalities that `config` names around a trunk of `trunk`'s blocks.

        Raises ValueError if the trunk's attention is sparse, or if the width of its heads does not
        suit a modality.
        """
        super().__init__()
        if trunk.attention.kind != "dense":
            raise ValueError(
                f"attention.kind = {trunk.attention.kind}: "
                "V3 attends to whole examples, which are short; take dense"
            )
        self.trunk, self.config = trunk, config
        self.modalities = nn.ModuleDict(
            {name: MODALITIES[name](trunk, config) for name in config.modalities}
        )
        self.trunks = nn.ModuleDict()
        for name in ("shared",) if config.shared else config.modalities:
            blocks = [Block(trunk, causal=False) for _ in range(trunk.n_layer)]
            self.trunks[name] = nn.ModuleList(blocks)
        self.temperature = Temperature(config.temperature)
        self.initialise()

    def initialise(self) -> None:
        """Initialise matrices as GPT does: normal with standard deviation 1/sqrt(input width).

        In the trunk, what STARTS_AT_ZERO names starts at zero.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("trunks"):
                if name.endswith(STARTS_AT_ZERO):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=self.trunk.n_embd**-0.5)
            elif parameter.ndim == 2 and name.endswith("weight"):
                nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)

    def embed(
        self, name: str, x: Tensor, inspect: bool = False
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Embed the input x (B, ...) of modality `name` -> unit-length embeddings (B, M).

        Also returns the stats of each layer, more of them with `inspect`.
        """
        modality = self.modalities[name]
        tokens, rope, valid = modality.prepare(x)
        rope = tuple(table.to(tokens.dtype) for table in rope)
        stats = []
        for block in self.trunks["shared" if self.config.shared else name]:
            tokens, layer_stats = block(tokens, None, rope, inspect=inspect, valid=valid)
            stats.append(layer_stats)
        return modality.project(rms_norm(tokens), valid), stats

    def forward(
        self, inputs: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Tensor]]]]:
        """Embed B examples: inputs by modality -> embeddings (B, M) by modality.

        Also returns the stats of each layer by modality.
        """
        embeddings, stats = {}, {}
        for name, x in inputs.items():
            embeddings[name], stats[name] = self.embed(name, x)
        return embeddings, stats

    @torch.no_grad()
    def update_bias(self, load: Tensor, lr_multiplier: float = 1.0) -> None:
        """Update the routers' biases as GPT does.

        load: (L, E) of the shared trunk; of separate trunks one after the other, (trunks * L, E).
        """
        if self.trunk.moe.bias_rate:
            blocks = [block for trunk in self.trunks.values() for block in trunk]
            for block, layer_load in zip(blocks, load, strict=True):
                block.mlp.update_bias(layer_load, lr_multiplier)

    # ---- cost ------------------------------------------------------------------------------------

    def tokens_per_example(self) -> dict[str, int]:
        """Return the tokens of one example by modality; of a text, the most it may have."""
        return tokens_per_example(self.trunk, self.config)

    def trunk_blocks(self, name: str) -> Iterable[Block]:
        """Return the blocks that read the modality `name`."""
        return self.trunks["shared" if self.config.shared else name]

    def masked_inputs(self) -> tuple[str, ...]:
        """Return the modalities whose padding attention masks."""
        return tuple(name for name, modality in self.modalities.items() if modality.padded)

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one example in all its modalities.

        Left out of the second are the experts that a token does not use.
        """
        total = active = sum(p.numel() for p in self.temperature.parameters())
        blocks = [block for trunk in self.trunks.values() for block in trunk]
        for layer in (*self.modalities.values(), *blocks):
            layer_total, layer_active = layer.count_parameters()
            total, active = total + layer_total, active + layer_active
        return total, active

    def flops_per_example(self) -> float:
        """Return the operations to train on one example in all its modalities."""
        flops = 0
        for name, T in self.tokens_per_example().items():
            trunk = sum(block.flops_per_token(T) for block in self.trunk_blocks(name))
            flops += T * trunk + self.modalities[name].flops_per_example()
        return flops
