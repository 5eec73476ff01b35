"""V3's model: text, image and audio in one space, by one trunk.

What V3 adds to V2: a token may be something else than text. A modality is a small class, which says how its input is cut into
tokens, where they stand, and, by an adapter of its own, how what the trunk makes of them enters the common space:

    Text    (B, T)         ids of bytes or BPE, -1 at the end     a token each                  places on a line
    Image   (B, 3, Y, X)   in 0 .. 1                              a token for each patch        places on a plane
    Audio   (B, S, F)      log-mel: bands, frames                 a token for a few frames      places in time

    tokens -> trunk: V2's blocks, in which each token reads all the others -> mean -> adapter -> length 1

Between these ends everything is shared, the experts too. `shared=False` gives each modality a trunk of its own, as CLIP
(Radford et al. 2021, arXiv:2103.00020) has two towers; that is the article's "specialised model" (its claim V3.2). A fourth
modality is one more class and one more line in `MODALITIES` (lessons/03_multimodal.ipynb adds point clouds).

Left out on purpose: the loss (nanods/contrastive.py); sparse attention, since items are short (80 tokens at tiny size, 576 at
base); a class token or attention instead of the mean.

Pinned by tests/test_multimodal.py: neither padding nor the rest of the batch changes an embedding, and each place can be told
from every other.

Shapes: B items, T tokens of one item, C width of the trunk, M width of the common space, D width of a head, E experts.
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
from nanods.gpt import Block, GPTConfig, rms_norm, rope_cos_sin

GRID_BASE = 100.0  # RoPE's base for places: the slowest of 8 pairs turns once in about 350 of them


@dataclass(frozen=True)
class MultimodalConfig:
    modalities: tuple[str, ...] = ()
    """What is brought into one space, of text, image and audio; none: a language model (V0 to V2)."""
    pairs: tuple[str, ...] = ()
    """Which of them are pair_weights in training, such as text-image text-audio; none named: all pairs."""
    shared: bool = True
    """One trunk for all modalities; if not, each has its own."""
    width: int = 128
    """Width of the common space (M)."""
    temperature: float = 0.1
    """The contrastive loss' temperature at the start: it is learnt, and never below 0.01."""
    image_size: int = 32
    """Height and width of an image, in pixels."""
    patch_size: int = 4
    """Height and width of an image's patch, which is a token; must divide image-size."""
    frames: int = 32
    """Frames of a sound, 32 ms each."""
    patch_frames: int = 2
    """Frames in a token; must divide frames."""
    hard_batches: bool = True
    """Whether scenes that are alike stand in one batch: a mirror image, another shape. Otherwise a batch is drawn at random."""
    entropy_coefficient: float = 0.0
    """Weight of the experts' entropy losses for each modality (LIMoE), beside the balance of all tokens together. 0: off."""
    min_experts: float = 4.0
    """How many experts a modality must use before the entropy loss lets it be."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.modalities if name not in MODALITIES]:
            raise ValueError(
                f"multimodal.modalities: no {', '.join(unknown)}; there are {', '.join(MODALITIES)}"
            )
        if len(set(self.modalities)) != len(self.modalities) or len(self.modalities) == 1:
            raise ValueError(
                f"multimodal.modalities {' '.join(self.modalities)}: at least two, each once"
            )
        known = {f"{a}-{b}" for a in self.modalities for b in self.modalities if a != b}
        if unknown := [pair for pair in self.pairs if pair not in known]:
            raise ValueError(
                f"multimodal.pairs: no {', '.join(unknown)}; there are {', '.join(sorted(known)) or 'none'}"
            )
        for whole, part in (("image_size", "patch_size"), ("frames", "patch_frames")):
            a, b = getattr(self, whole), getattr(self, part)
            if a < 1 or b < 1 or a % b:
                raise ValueError(
                    f"multimodal.{part} = {b} does not divide {whole} = {a}: choose a divisor"
                )
        if (
            self.width < 1
            or not self.temperature >= 0.01
            or not self.entropy_coefficient >= 0
            or not self.min_experts >= 1
        ):
            raise ValueError(
                f"multimodal.width = {self.width} and min_experts = {self.min_experts} must be at least 1, "
                f"temperature = {self.temperature} at least 0.01, entropy_coefficient = {self.entropy_coefficient} at least 0"
            )

    def pair_weights(self) -> dict[tuple[str, str], float]:
        """The pairs of modalities that the loss compares, with their weights: all alike."""
        pairs = [tuple(pair.split("-")) for pair in self.pairs] or combinations(self.modalities, 2)
        return dict.fromkeys(pairs, 1.0)


# ---- what is common to modalities --------------------------------------------------------------------------------------------


def grid_rope(sides: Sequence[int], D: int) -> tuple[Tensor, Tensor]:
    """RoPE for tokens on a grid, listed row by row: each axis turns its share of the D/2 pairs (Heo et al. 2024,
    arXiv:2403.13298, its axial form; with one axis RoPE itself). -> cosines and sines, each (1, 1, T, D/2)."""
    places = torch.cartesian_prod(*(torch.arange(side) for side in sides)).view(
        -1, len(sides)
    )  # (T, axes)
    turned = [
        rope_cos_sin(place[None], D // len(sides), torch.float32, GRID_BASE)
        for place in places.unbind(dim=1)
    ]
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*turned, strict=True))
    return cos, sin


class Modality(nn.Module):
    """Places for tokens, and the adapter. What inherits from it makes tokens of its input: `tokens`."""

    input_field: str  # the field of a data set's items that holds its input
    optimizers: ClassVar = {"position_embedding": "adamw"}
    padded: ClassVar = False  # whether `tokens` returns a mask of padding

    def __init__(self, trunk: GPTConfig, width: int, *sides: int) -> None:
        """`sides` of the grid on which the tokens stand, the width of a head being a multiple of twice their number."""
        super().__init__()
        C = trunk.n_embd
        self.position_embedding = nn.Parameter(
            torch.randn(*sides, C).flatten(0, -2) * C**-0.5
        )  # (T, C)
        cos, sin = grid_rope(sides, C // trunk.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.adapter = nn.Sequential(
            nn.Linear(C, C, bias=False), nn.GELU(), nn.Linear(C, width, bias=False)
        )

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input -> tokens (B, T, C), and which of them are there, (B, T), or None for all."""
        raise NotImplementedError

    def prepare(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Input -> what the trunk reads: tokens with their places (B, T, C), their rope_cos_sin, and which are there."""
        tokens, valid = self.tokens(x)
        T, room = tokens.size(1), len(self.position_embedding)
        if room < T:
            raise ValueError(f"{T} tokens, where there is room for {room}")
        return (
            rms_norm(tokens + self.position_embedding[:T]),
            (self.cos[:, :, :T], self.sin[:, :, :T]),
            valid,
        )

    def project(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """What the trunk made, (B, T, C) -> embeddings (B, M) of length 1, in at least fp32."""
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


# ---- the modalities ----------------------------------------------------------------------------------------------------------


class Text(Modality):
    input_field = "captions"
    padded = True

    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        super().__init__(trunk, config.width, trunk.context_length)
        self.embedding = nn.Embedding(trunk.vocab_size, trunk.n_embd)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, T), -1 where a text has ended; each has at least one."""
        return self.embedding(x.clamp(min=0)), x >= 0


class Image(Modality):
    """A patch is read with what surrounds it, half a patch on every side: an outline that is cut shows how it goes on (the idea
    of early convolutions, Xiao et al. 2021, arXiv:2106.14881). Recall after 200 steps is 0.89, without it 0.78 (LOG.md)."""

    input_field = "images"

    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        self.side = config.patch_size
        rows = config.image_size // self.side
        super().__init__(trunk, config.width, rows, rows)
        self.patch = nn.Linear(3 * (2 * self.side) ** 2, trunk.n_embd, bias=False)

    def tokens(self, x: Tensor) -> tuple[Tensor, None]:
        """Images (B, 3, Y, X) in 0 .. 1."""
        half, rest = self.side // 2, self.side - self.side // 2
        x = F.pad(
            x.to(self.position_embedding.dtype) - 0.5, (half, rest, half, rest)
        )  # grey around it
        return self.patch(
            F.unfold(x, 2 * self.side, stride=self.side).mT
        ), None  # (B, 3 (2 side)^2, T) -> (B, T, C)


class Audio(Modality):
    input_field = "mels"

    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        self.frames = config.patch_frames
        super().__init__(trunk, config.width, config.frames // self.frames)
        self.patch = nn.Linear(N_MELS * self.frames, trunk.n_embd, bias=False)

    def tokens(self, x: Tensor) -> tuple[Tensor, None]:
        """Log-mels (B, S, F), of mean 0 and standard deviation 1 or so."""
        parts = (
            x.to(self.position_embedding.dtype)
            .unflatten(2, (-1, self.frames))
            .transpose(1, 2)
            .flatten(2)
        )  # (B, T, S frames)
        return self.patch(parts), None


N_MELS = 32  # of the mel scale, as nanods/data/sound.py makes them
MODALITIES = {"text": Text, "image": Image, "audio": Audio}


@cache
def tokens_per_example(trunk: GPTConfig, config: MultimodalConfig) -> dict[str, int]:
    """The tokens of an item by modality, of a text the most it may have; without a model of any size."""
    with torch.device("meta"):
        return {
            name: len(MODALITIES[name](trunk, config).position_embedding)
            for name in config.modalities
        }


# ---- the model ---------------------------------------------------------------------------------------------------------------


class Multimodal(nn.Module):
    def __init__(self, trunk: GPTConfig, config: MultimodalConfig) -> None:
        """A trunk of `trunk`'s blocks, and the ends that `config` names. ValueError if they cannot be joined."""
        super().__init__()
        if trunk.attention.kind != "dense":
            raise ValueError(
                f"attention.kind = {trunk.attention.kind}: V3 reads whole items, which are short; take dense"
            )
        if trunk.n_embd // trunk.n_head % 4:
            raise ValueError(
                f"heads of width {trunk.n_embd // trunk.n_head}: images need a multiple of 4, half for each axis"
            )
        self.trunk, self.config = trunk, config
        self.modalities = nn.ModuleDict(
            {name: MODALITIES[name](trunk, config) for name in config.modalities}
        )
        trunks = ("shared",) if config.shared else config.modalities
        blocks = {
            name: [Block(trunk, causal=False) for _ in range(trunk.n_layer)] for name in trunks
        }
        self.trunks = nn.ModuleDict({name: nn.ModuleList(some) for name, some in blocks.items()})
        self.temperature = Temperature(config.temperature)
        self.initialise()

    def initialise(self) -> None:
        """As GPT's: matrices at 1/sqrt(width of the input), what writes to the residual stream at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "mlp.out")):
                nn.init.zeros_(parameter)
            elif name.startswith("trunks"):
                nn.init.normal_(parameter, std=self.trunk.n_embd**-0.5)
            elif parameter.ndim == 2 and name.endswith("weight"):
                nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)

    def embed(
        self, name: str, x: Tensor, inspect: bool = False
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The input of one modality -> embeddings (B, M) of length 1, and the stats of each layer (more with `inspect`)."""
        modality, stats = self.modalities[name], []
        tokens, rope, valid = modality.prepare(x)
        rope = tuple(table.to(tokens.dtype) for table in rope)
        for block in self.trunks["shared" if self.config.shared else name]:
            tokens, told = block(tokens, None, rope, inspect=inspect, valid=valid)
            stats.append(told)
        return modality.project(rms_norm(tokens), valid), stats

    def forward(
        self, inputs: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Tensor]]]]:
        """Inputs by modality, equally many -> embeddings (B, M) by modality, and the stats of each one's layers."""
        made = {name: self.embed(name, x) for name, x in inputs.items()}
        return {name: e for name, (e, _) in made.items()}, {
            name: stats for name, (_, stats) in made.items()
        }

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """As GPT's, from the load (L, E) of the shared trunk, or of each trunk after the other."""
        if self.trunk.moe.bias_rate:
            for block, row in zip(
                (block for blocks in self.trunks.values() for block in blocks), load, strict=True
            ):
                block.mlp.update_bias(row)

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
