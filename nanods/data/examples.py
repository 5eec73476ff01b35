"""Data sets for contrastive learning: `ExampleDataset`, the protocol, and `Examples`, a batch.

V3 trains on any object with the members of `ExampleDataset`; it need not inherit from it. There are
`SceneData` (scenes.py, generated), `EmojiData` (emoji.py) and `CaptionDataset` (caption_dataset.py,
files).

To add a modality's data:
1. Add a field to `Examples` for the modality's input: `videos: np.ndarray | None = None`.
2. Fill this field in the data set's `batch` and `gallery`, and add the modality's name to its
   `modalities`.
The attribute `input_field` of the modality's class in nanods/multimodal.py names its field.

Shapes: B examples, S samples of a waveform, M mel bands, T frames of a spectrogram.
"""

import hashlib
from collections.abc import Sized
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Examples:
    """A batch of B examples: one field for each modality's input.

    A field is None if the data set has no data for that modality. Row i of every field belongs to
    example i. Where an example lacks a modality, `present` is False there and the row holds zeros,
    or "".
    """

    ids: np.ndarray  # (B,) int64: of the file; equal ids are one file. (B, N) of several files
    captions: list[str]  # text: B captions
    images: np.ndarray | None = None  # image: (B, 3, height, width) float32 in 0 .. 1
    waves: np.ndarray | None = None  # (B, S) float32 in -1 .. 1, 8,000 Hz: to listen to
    mels: np.ndarray | None = None  # audio: (B, M, T) float32, `normalized_log_mel` of the waves
    present: dict[str, np.ndarray] | None = None  # by modality: (B,) bool. None: all are

    def has(self, *modalities: str) -> np.ndarray:
        """Return which examples have all of these modalities, (B,) bool."""
        has = np.ones(len(self.captions), bool)
        for name in modalities:
            if self.present and name in self.present:
                has &= self.present[name]
        return has

    def take(self, rows: slice) -> "Examples":
        """Return some of the examples."""
        fields = {}
        for name, value in vars(self).items():
            if isinstance(value, dict):
                fields[name] = {modality: x[rows] for modality, x in value.items()}
            else:
                fields[name] = None if value is None else value[rows]
        return Examples(**fields)


class ExampleDataset(Protocol):
    """A data set of examples in two or more modalities, for contrastive learning."""

    name: str  # as given to --data
    sha256: str  # of the data, in hexadecimal; a resumed run compares it
    modalities: tuple[str, ...]  # keys of nanods.multimodal.MODALITIES, such as ("text", "image")
    train: Sized  # training examples; their number bounds the batch size
    held_out: Sized  # held-out examples; their number bounds the gallery size

    def text(self) -> str:
        """Return the training captions as one text, each on a line of its own. Examples without
        one have no line."""
        ...

    def batch(self, step: int, size: int, seed: int = 0, rows: slice = slice(None)) -> Examples:
        """Return the `size` training examples of a step, or only these rows of them.

        The examples depend on (seed, step, size) alone, not on earlier calls: so a resumed run sees
        the same batches, and each process can load its own rows of one global batch.
        """
        ...

    def gallery(self, size: int) -> Examples:
        """Return `size` held-out examples with different ids, the same at every call.

        They are fewer where the files of some cannot be decoded.
        """
        ...

    # Optional: `notes(self) -> list[str]`, lines that are printed before training, such as what
    # was left out; `more_galleries(self) -> dict[str, Examples]`, other held-out examples by name,
    # whose recalls are logged as NAME_recall1_A_B; and `has_gaps`, true where examples lack
    # modalities: all batches and galleries then have `Examples.present`, and
    # `pair_counts(self) -> Counter[tuple[str, str]]` returns how many training examples have both
    # modalities of a pair.


# ---- duplicates ----------------------------------------------------------------------------------


def caption_key(caption: str) -> str:
    """Return what captions that say the same have in common: no case, single spaces."""
    return " ".join(caption.casefold().split())


def duplicate_ids(examples: Examples) -> np.ndarray:
    """Return two ids of each example, (B, 2) int64: its file's, and its caption's. Of examples with
    N files there are N + 1.

    Examples that share either are duplicates: neither is a negative of the other, and each is a
    right answer to a query for the other. A caption's id is a hash, so it is the same in every
    process and batch. An example without a caption has its first file's id in its place.
    """
    hashes = []
    for ids, caption in zip(examples.ids, examples.captions, strict=True):
        if not caption:
            hashes.append(ids.flat[0])
            continue
        digest = hashlib.sha256(caption_key(caption).encode("utf-8", "surrogatepass")).digest()
        hashes.append(int.from_bytes(digest[:8], "little", signed=True))
    return np.column_stack([examples.ids, np.array(hashes, np.int64)])
