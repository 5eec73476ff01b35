"""CaptionDataset: images or sounds with captions, from a folder.

    load_caption_dataset(folder, image_size=64, frames=32).batch(step=0, size=128)

nanods/data/caption_forms.py says which folders are read. An item is an image, a sound or both, and
may have several captions. The numbers of its files are the ids of its examples. An example that
lacks one of the data set's modalities has zeros for it, and `Examples.present` says so.

A batch depends on (seed, step, size) alone, not on earlier calls. An epoch holds each training
caption once. It goes through all items in a random order, with one caption of each, then again in
the same order with another caption, until every caption was used. The last batch of an epoch is
filled up with the epoch's first captions. So if all items have equally many captions, no batch
holds an item twice. Threads decode the next step's batch in the background.

A file that cannot be decoded is skipped, in training and in the gallery, and the next one in the
order takes its place. `notes` tries some files before training and counts these. Later ones are
warned of on stderr, the first few by name. So batches and galleries depend on the files alone, not
on when a file was found to be corrupt.

Left out on purpose: augmentation (images are cropped to their middle, sounds to their start),
formats other than JPEG, PNG and WAV, and finding copies of one image under two names.

Shapes: B examples, S samples, T frames. Images are [channel, y, x], y downwards.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Pillow is installed, since matplotlib depends on it.
from PIL import Image, ImageOps, UnidentifiedImageError

from nanods.data.caption_forms import Item
from nanods.data.captions import CaptionFolder, hold_out_folder, keep_modalities, read_captions
from nanods.data.examples import Examples
from nanods.data.file_types import wrong_type
from nanods.data.random_bits import random_bits
from nanods.data.sound import (
    MELS,
    crop_or_pad,
    name_of,
    normalized_log_mel,
    opened,
    read_wav,
    samples_of,
    wav_seconds,
)
from nanods.errors import UserError

# ---- decoding one file ---------------------------------------------------------------------------


def read_image(file: str | Path | BinaryIO, size: int, max_pixels: int | None = None) -> np.ndarray:
    """Return the middle square of a JPEG or PNG as (3, size, size) float32 in 0 .. 1.

    It reads images of any mode and size. Transparent pixels are blended with black.

    Raises UserError if the file is missing, truncated, of another kind, or has more pixels than
    `max_pixels` or Pillow's limit (a decompression bomb).
    """
    name = name_of(file, "the image")
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            image = decode_image(image, size, max_pixels)
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: too many pixels ({error}); make it smaller") from error
    except Exception as error:  # Pillow's decoders raise almost anything for a damaged file
        if isinstance(error, OSError) and error.strerror:
            raise UserError(
                f"{name}: cannot be read ({error.strerror}); give a JPEG or PNG image"
            ) from error
        head = read_head(file)
        kind = wrong_type(name, head, (".jpg", ".jpeg", ".png"))
        if kind and not kind.startswith(("a JPEG", "a PNG")):
            raise UserError(
                f"{name}: {kind}; only JPEG and PNG images are read: fetch it again, or convert it"
            ) from error
        reason = error if head else "the file is empty"
        if head and isinstance(error, UnidentifiedImageError):
            reason = "of an unknown kind"
        raise UserError(
            f"{name}: not a complete JPEG or PNG image ({reason}); fetch it again, or convert it"
        ) from error
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)) / np.float32(255)


def read_head(file: str | Path | BinaryIO) -> bytes:
    """Return the first 32 bytes of a file; b"" if it cannot be read."""
    try:
        with opened(file) as source:
            source.seek(0)
            return source.read(32)
    except OSError:
        return b""


def decode_image(image: Image.Image, size: int, max_pixels: int | None) -> Image.Image:
    """Return the middle square of an opened image, upright, in RGB, resized to `size`."""
    # Pillow only warns above its limit; it raises above twice the limit.
    limit = max_pixels or Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise Image.DecompressionBombError(
            f"{image.width:,} x {image.height:,}, and at most {limit:,} are read"
        )
    # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still large enough.
    image.draft(None, (size, size))
    image.load()
    with suppress(Exception):  # the EXIF data may be damaged although the pixels are good
        image = ImageOps.exif_transpose(image)  # upright
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    right, bottom = (width + side) / 2, (height + side) / 2
    square = (left, top, right, bottom)
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=square)


def read_sound(file: str | Path | BinaryIO, frames: int) -> np.ndarray:
    """Return a WAV file as (S,) float32 in -1 .. 1, 8,000 Hz.

    It is cropped, or padded with silence, to the S samples that `frames` frames need. Of a long
    file no more is read.

    Raises UserError if the file is missing, damaged or of another kind.
    """
    length = samples_of(frames)
    return crop_or_pad(read_wav(file, length), length)


# ---- the data set --------------------------------------------------------------------------------

ORDER, GALLERY, CHECK = range(3)  # what a random number is used for: a part of its key
CHECKED = 256  # training files that `notes` tries to decode
WARNINGS = 5  # corrupt files that are named; later ones are counted


class CaptionDataset:
    """An `ExampleDataset` of captions, images and sounds, or two of them, read from files."""

    def __init__(self, name: str, captions: CaptionFolder, image_size: int, frames: int):
        """Store the captions of a folder. `load_caption_dataset` calls this."""
        train, held_out = captions.train, captions.held_out
        self.name, self.modalities = name, captions.modalities
        self.image_size, self.frames = image_size, frames
        lines = [hash_line(item, caption) for item, caption in train]
        lines.append("\n")
        lines += [hash_line(item, caption) for item, caption in held_out]
        self.sha256 = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

        self.items = list(dict.fromkeys(item for item, _ in train + held_out))
        self.sounds = list(dict.fromkeys(item.audio for item in self.items if item.audio))
        number = {item: i for i, item in enumerate(self.items)}
        self.train = [(number[item], caption) for item, caption in train]
        self.held_out: dict[int, list[str]] = {}  # item -> its captions
        for item, caption in held_out:
            self.held_out.setdefault(number[item], []).append(caption)

        # The numbers of each item's files, one column for each kind. A missing file has a number of
        # its own, so that it makes no duplicates.
        columns = []
        for kind in ("image", "audio"):
            if kind in self.modalities:
                files = [getattr(item, kind) or i for i, item in enumerate(self.items)]
                numbers = {file: n for n, file in enumerate(dict.fromkeys(files))}
                columns.append([numbers[file] for file in files])
        self._ids = np.array(columns, np.int64).T  # (items, kinds)
        self.has_gaps = not all(self._has(*row) == self.modalities for row in train + held_out)

        # For each training caption: its item, the number of captions of that item, and which of
        # them it is, from 0 up.
        self._item_ids = np.array([i for i, _ in self.train], np.int64)
        n_captions = np.bincount(self._item_ids)
        self._n_captions = n_captions[self._item_ids]
        self._caption_index = np.empty_like(self._item_ids)
        self._caption_index[self._item_ids.argsort(kind="stable")] = np.concatenate(
            [np.arange(n) for n in n_captions] or [[]]
        )

        self._epoch = None  # (seed, epoch) of the cached order
        self._epoch_order = self._item_ids  # the cached order of the training captions
        self._notes = captions.notes
        samples = samples_of(frames)
        shapes = {
            "image": {"images": (3, image_size, image_size)},
            "audio": {"waves": (samples,), "mels": (MELS, frames)},
        }
        self._shapes = {  # field of Examples -> the shape of one example
            field: shape
            for name in self.modalities
            for field, shape in shapes.get(name, {}).items()
        }
        self._tried: set[int] = set()  # items that were decoded, or could not be
        self._errors: dict[int, str] = {}  # item -> why its file cannot be decoded
        self._warnings = 0  # corrupt files that were warned of
        self._threads = min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._prefetched: dict[tuple, Iterator] = {}  # (step, size, seed) -> decoded arrays

    @property
    def skipped(self) -> int:
        """The number of files found so far that cannot be decoded."""
        return len(self._errors)

    def notes(self) -> list[str]:
        """Return what to know before training, a line for each: which examples are held out, what
        is left out, and how many files cannot be decoded, of those in galleries and batches so far
        and of CHECKED training files."""
        training = np.unique(self._item_ids)
        keys = random_bits(len(training), 0, CHECK)[0]
        sample = training[keys.argsort(kind="stable")[:CHECKED]].tolist()
        for item_id, arrays in zip(sample, self._decode_all(sample), strict=True):
            self._tried.add(item_id)
            if isinstance(arrays, str):
                self._errors.setdefault(item_id, arrays)
        held_out = len(self._tried & self.held_out.keys())
        noun = "files" if self._ids.shape[1] == 1 else "examples"
        checked = (
            f"{held_out:,} of {len(self.held_out):,} held-out and {len(self._tried) - held_out:,} "
            f"of {len(training):,} training {noun}"
        )
        notes = [*self._notes]
        if self.has_gaps:
            counts = self.pair_counts()
            pairs = [f"{a} and {b} {counts[a, b]:,}" for a, b in combinations(self.modalities, 2)]
            notes.append(f"of {len(self.train):,} training examples have {', '.join(pairs)}")
        if not self._errors:
            return [*notes, f"decoded: {checked}, without an error"]
        return [
            *notes,
            f"decoded: {checked}; {self.skipped:,} of them cannot be and are skipped, the first: "
            f"{next(iter(self._errors.values()))}",
        ]

    def text(self) -> str:
        """Return the training captions, one on each line, for a tokenizer to learn from."""
        return "\n".join(caption for _, caption in self.train if caption)

    def pair_counts(self) -> Counter[tuple[str, str]]:
        """Return how many training examples have both modalities of each pair."""
        combined = Counter(self._has(self.items[i], caption) for i, caption in self.train)
        counts = Counter()
        for has, count in combined.items():
            counts.update(dict.fromkeys(combinations(has, 2), count))
        return counts

    def sound_seconds(self, most: int = 2000) -> np.ndarray:
        """Return the lengths of the sounds in seconds, by their headers, without damaged ones.

        Of more than `most` sounds it returns those of `most`, spread evenly.
        """
        every = -(-len(self.sounds) // most)
        seconds = []
        for path in self.sounds[::every]:
            with suppress(UserError):  # a batch that needs the file reports it
                seconds.append(wav_seconds(path))
        return np.array(seconds)

    def batch(self, step: int, size: int, seed: int = 0, rows: slice = slice(None)) -> Examples:
        """Return the `size` training examples of a step, or only these rows of them.

        All examples of the step are decoded, so that all processes skip the same files.

        Raises UserError if there are fewer than `size`, or fewer that can be decoded.
        """
        if not 1 <= size <= len(self.train):
            raise UserError(
                f"--data {self.name}: a batch of {size:,} cannot be taken from "
                f"{len(self.train):,} training captions; choose another --batch-size, or add some"
            )
        order = self._order(step, size, seed)
        decoded = self._prefetched.pop((step, size, seed), None) or self._prefetch(order[:size])
        replacements = self._decode_all(self._item_ids[order[size:]].tolist())
        rows_in_order = (self.train[i] for i in order)
        examples = self._collect(rows_in_order, chain(decoded, replacements), size, least=size)
        next_order = self._order(step + 1, size, seed)
        self._prefetched = {(step + 1, size, seed): self._prefetch(next_order[:size])}
        return examples.take(rows)

    def _order(self, step: int, size: int, seed: int) -> np.ndarray:
        """Return all training captions in the order of the step's epoch, from the step's first on.

        The order is circular: after its end it starts again.
        """
        epoch, step_in_epoch = divmod(step, -(-len(self.train) // size))
        if self._epoch != (seed, epoch):
            item_keys = random_bits(len(self.items), seed, ORDER, epoch)[0]
            key = (item_keys >> 1).astype(np.int64)[self._item_ids]
            # In each pass over the items, the key of an item also decides its first caption.
            item_pass = (self._caption_index + key) % self._n_captions
            self._epoch = (seed, epoch)
            self._epoch_order = np.lexsort((key, item_pass))  # by pass, then by key
        return np.roll(self._epoch_order, -step_in_epoch * size)

    def gallery(self, size: int, seed: int = 0) -> Examples:
        """Return `size` held-out examples of different items, the same at every call.

        Each comes with one of its captions. They are fewer where too few can be decoded. Raises
        UserError if fewer than `size` are held out, or fewer than 2 of them can be decoded.
        """
        if not self.held_out:
            raise UserError(
                f"--data {self.name}: no example is held out, of {len(self.train):,}; add some"
            )
        if not 1 <= size <= len(self.held_out):
            raise UserError(
                f"--data {self.name}: a gallery of {size:,} cannot be taken from "
                f"{len(self.held_out):,} held-out examples; choose another size, or add some"
            )
        keys = random_bits(len(self.held_out), seed, GALLERY)[0]
        items = list(self.held_out.items())
        rows = []
        for i in keys.argsort(kind="stable"):
            item_id, captions = items[i]
            rows.append((item_id, captions[keys[i] % len(captions)]))
        decoded = self._decode_all([item_id for item_id, _ in rows])
        return self._collect(rows, decoded, size, least=min(size, 2))

    def _prefetch(self, order: np.ndarray) -> Iterator:
        """Start to decode these training captions' items in the threads. Return the results."""
        return self._pool.map(self._decode, self._item_ids[order].tolist())

    def _decode(self, item_id: int) -> dict[str, np.ndarray] | str:
        """Return the arrays of an item by the field of Examples, or why it cannot be decoded."""
        try:
            if item_id in self._errors:
                return self._errors[item_id]
            item, fields = self.items[item_id], {}
            if item.image:
                fields["images"] = read_image(item.image, self.image_size)
            if item.audio:
                fields["waves"] = read_sound(item.audio, self.frames)
                fields["mels"] = normalized_log_mel(fields["waves"])
            return fields
        except UserError as error:
            return str(error)

    def _decode_all(self, item_ids: list[int]) -> Iterator[dict[str, np.ndarray] | str]:
        """Yield `_decode` of each item, in order. The threads decode a few at a time."""
        for start in range(0, len(item_ids), self._threads):
            yield from self._pool.map(self._decode, item_ids[start : start + self._threads])

    def _collect(
        self, rows: Iterable[tuple[int, str]], decoded: Iterable, size: int, least: int
    ) -> Examples:
        """Return the first `size` of the rows (item, caption) that can be decoded.

        `decoded` has what `_decode` returns for each row. Raises UserError if fewer than `least`
        can be decoded.
        """
        collected = []
        for (item_id, caption), arrays in zip(rows, decoded, strict=False):
            self._tried.add(item_id)
            if not isinstance(arrays, str):
                collected.append((item_id, caption, arrays))
            elif item_id not in self._errors:
                self._errors[item_id] = arrays
                self._warn(arrays)
            if len(collected) == size:
                break
        if len(collected) < least:
            raise UserError(
                f"--data {self.name}: {least:,} examples are needed at a time, and only "
                f"{len(collected):,} can be decoded ({self.skipped:,} corrupt files, the first: "
                f"{next(iter(self._errors.values()))}); fetch or convert them, or choose a smaller "
                "--batch-size"
            )
        ids, captions, arrays = zip(*collected, strict=True)
        fields = {}
        for name, shape in self._shapes.items():
            empty = np.zeros(shape, np.float32)
            fields[name] = np.stack([each.get(name, empty) for each in arrays])
        present = None
        if self.has_gaps:
            has = [self._has(self.items[i], text) for i, text in zip(ids, captions, strict=True)]
            present = {name: np.array([name in each for each in has]) for name in self.modalities}
        file_ids = self._ids[list(ids)]
        if file_ids.shape[1] == 1:
            file_ids = file_ids[:, 0]
        return Examples(file_ids, list(captions), **fields, present=present)

    def _has(self, item: Item, caption: str) -> tuple[str, ...]:
        """Return the modalities that an example of an item and a caption has."""
        has = {"text": caption, "image": item.image, "audio": item.audio}
        return tuple(name for name, value in has.items() if value)

    def _warn(self, error: str) -> None:
        """Print a warning of a corrupt file, unless there were enough."""
        self._warnings += 1
        if self._warnings <= WARNINGS:
            print(f"warning: skipped {error}", file=sys.stderr)
        if self._warnings == WARNINGS:
            print("warning: further corrupt files are counted, not named", file=sys.stderr)


def hash_line(item: Item, caption: str) -> str:
    """Return what stands for an example in the data set's hash."""
    return "\t".join([*(path.name for path in item.files), f"{caption}\n"])


def load_caption_dataset(
    folder: Path,
    image_size: int,
    frames: int,
    val_folder: Path | None = None,
    modalities: Sequence[str] = ("text", "image", "audio"),
) -> CaptionDataset:
    """Return the data set of a folder, whose captions are read and whose files exist.

    With `val_folder`, all of this other folder is held out, and nothing of `folder`. What is not
    among `modalities` is not read.

    A batch decodes the files, to images of `image_size` x `image_size` pixels or to sounds of
    `frames` spectrogram frames.

    Raises UserError for a folder without captions, for a mistake in the captions, and for missing
    files.
    """
    captions = read_captions(Path(folder))
    if val_folder is not None:
        captions = hold_out_folder(captions, Path(val_folder))
    captions = keep_modalities(captions, modalities)
    return CaptionDataset(str(folder), captions, image_size, frames)
