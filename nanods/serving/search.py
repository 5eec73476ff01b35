"""Search by text, image or sound: from the bytes that a client sends to the examples found.

The embeddings of a gallery's examples are computed once. A search multiplies them all with the
query's, and sorts the products.

Left out on purpose: an approximate index, which a gallery of millions needs.

Pinned by tests/serving/test_search.py.

Shapes: Q examples of a gallery, M width of the common space.
"""

import io
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanods.config import Config
from nanods.data.caption_dataset import read_image, read_sound
from nanods.data.examples import Examples, caption_key
from nanods.data.scenes import check_scene_words
from nanods.data.sound import normalized_log_mel
from nanods.errors import UserError
from nanods.multimodal import Multimodal
from nanods.training.contrastive_data import encode_captions, model_inputs
from nanods.training.retrieval import embed

MAX_PIXELS = 1 << 24  # of an image, which a file of some kilobytes can exceed


def read_input(name: str, data: str | bytes, config: Config, tokenizer) -> Tensor:
    """Return what the model reads, without a batch dimension: of a text, or of the bytes of a JPEG,
    PNG or WAV file.

    It is cut as in training: a text at `context_length` tokens, an image to its middle square, a
    sound to its first seconds. Raises UserError for anything else, and for an image of more than
    `MAX_PIXELS`.
    """
    if name == "text":
        text = " ".join(data.split())
        if config.data == "scenes":
            text = check_scene_words(text)
        if not text:
            raise UserError("there is no word in the text: describe what to find")
        return encode_captions([text], tokenizer, config.model.context_length)[0]
    if name == "image":
        size = config.multimodal.image_size
        return torch.from_numpy(read_image(io.BytesIO(data), size, MAX_PIXELS))
    if name == "audio":
        wave = read_sound(io.BytesIO(data), config.multimodal.frames)
        return torch.from_numpy(normalized_log_mel(wave))
    raise UserError(f"no {name} can be read: send text, image or audio")


def nearest_distance(embeddings: Tensor, known: Tensor) -> Tensor:
    """Return V3's score: the cosine distance from each embedding to the nearest of known ones.

    embeddings (N, M), known (K, M), such as a gallery's, all of unit length -> (N,).
    """
    return 1 - torch.amax(embeddings @ known.T, dim=-1)


class Hit(NamedTuple):
    index: int
    """Of the example among the gallery's."""
    score: float
    """Cosine similarity, -1 to 1."""


class Gallery:
    """Examples and their embeddings, among which to search."""

    def __init__(self, model: Multimodal, examples: Examples, config: Config, tokenizer) -> None:
        """Embed the examples. Of captions that say the same, only the first is kept.

        The examples may be those of `held_out_examples` (nanods/training/contrastive_data.py).
        """
        self.examples = examples
        # By modality that an example has:
        self.rows: dict[str, np.ndarray] = {}  # which ones have it
        self.embeddings: dict[str, Tensor] = {}  # theirs, (Q, M), on the CPU
        device = next(model.parameters()).device
        for name, inputs in model_inputs(examples, config, tokenizer).items():
            rows = np.flatnonzero(examples.has(name))
            if not len(rows):
                continue
            if name == "text":
                keys = [caption_key(examples.captions[row]) for row in rows]
                rows = rows[np.sort(np.unique(keys, return_index=True)[1])]
            self.rows[name] = rows
            self.embeddings[name] = embed(model, {name: inputs[rows].to(device)})[0][name].cpu()

    def search(self, query: Tensor, name: str, top: int) -> list[Hit]:
        """Return the `top` examples whose embedding of modality `name` is nearest to the query's,
        (M,), best first. Raises UserError for a modality that the gallery lacks."""
        if name not in self.embeddings:
            raise UserError(f"there is no {name} to search, but {' and '.join(self.embeddings)}")
        scores = self.embeddings[name] @ query  # (Q,)
        best = scores.argsort(descending=True, stable=True)[:top].tolist()
        return [Hit(int(self.rows[name][i]), scores[i].item()) for i in best]

    def distances(self, embeddings: Tensor, name: str) -> list[float]:
        """Return how far embeddings (N, M) of modality `name` are from the nearest example's."""
        return nearest_distance(embeddings, self.embeddings[name]).tolist()
