"""CaptionDataset: captions and the images or sounds they describe, from a folder: `load_caption_dataset(folder, 64, 32).batch(0, 128)`.

A thing is an image or a sound; it may have several captions. nanods/data/captions.py says which folders are read.

A batch is fixed by (seed, step, size), whatever was drawn before. An epoch puts the things in an order and goes round it, each
time with another of a thing's captions, until every caption was there once; what its last batch lacks are its first again. So
where things have equally many captions, no batch holds a thing twice. A file that cannot be decoded is skipped, and named
once on stderr: the next of the order takes its place. Threads decode the next step's batch while this one is learnt from.

Left out on purpose: augmentation (of every image its middle, of every sound its start), formats but JPEG, PNG and WAV, the same
image under two names.

Shapes: B items, S samples, T frames. Images are [channel, y, x], y downwards.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps  # Pillow, which matplotlib brings along

from nanods.data.captions import Rows, read_captions
from nanods.data.examples import Examples
from nanods.data.random_bits import random_bits
from nanods.data.scenes import normalized_log_mel
from nanods.data.sound import HOP, WINDOW, fit, read_wav
from nanods.errors import UserError

# ---- one file ----------------------------------------------------------------------------------------------------------------


def read_image(path: str | Path, side: int) -> np.ndarray:
    """A JPEG or PNG of any mode and size -> (3, side, side) float32 in 0 .. 1: its middle square, alpha over black.

    UserError, with a mend, for what is missing, cut off, no such image, or a bomb (more pixels than Pillow finds safe).
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if (
                Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS
            ):  # Pillow warns; twice it raises
                raise Image.DecompressionBombError(f"{image.width:,} x {image.height:,} pixels")
            image.draft(
                None, (side, side)
            )  # a JPEG: decoded at 1/2, 1/4 or 1/8, where that is large enough
            image.load()
            with suppress(
                Exception
            ):  # what is said about an image may be damaged where the image is whole
                image = ImageOps.exif_transpose(image)  # upright, however the camera was held
            if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            (width, height), short = image.size, min(image.size)
            middle = (
                (width - short) / 2,
                (height - short) / 2,
                (width + short) / 2,
                (height + short) / 2,
            )
            image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=middle)
    except Exception as error:  # damage makes Pillow's decoders raise almost anything
        if isinstance(error, OSError) and error.strerror:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); give a JPEG or PNG image"
            ) from error
        raise UserError(
            f"{path}: not a whole JPEG or PNG image ({error}); fetch it again, or convert it"
        ) from error
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)) / np.float32(255)


def read_sound(path: str | Path, frames: int) -> np.ndarray:
    """A WAV file -> (S,) float32 in -1 .. 1, 8,000 Hz, cut or filled up with silence to the S that `frames` need.

    UserError, with a mend, for what is missing, damaged or of another kind.
    """
    return fit(read_wav(path), WINDOW + (frames - 1) * HOP)


# ---- a data set --------------------------------------------------------------------------------------------------------------

ORDER, GALLERY = range(2)  # what a random number is for


class CaptionDataset:
    """A caption data set, as `load_caption_dataset` makes it."""

    def __init__(
        self, name: str, modality: str, train: Rows, held_out: Rows, image_size: int, frames: int
    ):
        self.name, self.modalities, self.image_size, self.frames = (
            name,
            ("text", modality),
            image_size,
            frames,
        )
        lines = [*(f"{path.name}\t{caption}\n" for path, caption in train), "\n"]
        lines += [f"{path.name}\t{caption}\n" for path, caption in held_out]
        self.sha256 = hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

        self.paths = list(
            dict.fromkeys(path for path, _ in train + held_out)
        )  # of the things, by number
        number = {path: i for i, path in enumerate(self.paths)}
        self.train = [
            (number[path], caption) for path, caption in train
        ]  # a thing and one of its captions
        self.held_out: dict[int, list[str]] = {}  # a thing and its captions
        for path, caption in held_out:
            self.held_out.setdefault(number[path], []).append(caption)

        self._thing = np.array(
            [thing for thing, _ in self.train], np.int64
        )  # of each training caption
        count = np.bincount(self._thing)
        self._count = count[self._thing]  # of captions that its thing has
        self._which = np.empty_like(self._thing)  # of those it is, from 0 up
        self._which[self._thing.argsort(kind="stable")] = np.concatenate(
            [np.arange(n) for n in count] or [[]]
        )

        self._epoch, self._shuffled = (
            None,
            self._thing,
        )  # (seed, epoch) and its order, kept from batch to batch
        self._faults: dict[int, str] = {}  # a thing and why it cannot be decoded
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._ahead: dict[
            tuple, Iterator
        ] = {}  # (step, size, seed) and what the threads make of it

    @property
    def skipped(self) -> int:
        """How many corrupt files the batches and galleries met so far."""
        return len(self._faults)

    def text(self) -> str:
        """The training captions, for a tokenizer to learn from."""
        return "\n".join(caption for _, caption in self.train)

    def batch(self, step: int, size: int, seed: int = 0, rows: slice = slice(None)) -> Examples:
        """The training items of a step, or these rows of them: decoded all, so that processes agree on what is skipped.

        UserError if there are fewer than `size`, or fewer that can be decoded.
        """
        if not 1 <= size <= len(self.train):
            raise UserError(
                f"--data {self.name}: {len(self.train):,} training captions do not make a batch of {size:,}; "
                "choose another --batch-size, or add some"
            )
        order = self._order(step, size, seed)
        ahead = self._ahead.pop((step, size, seed), None) or self._start(order[:size])
        items = self._collect((self.train[row] for row in order), ahead, size)
        self._ahead = {
            (step + 1, size, seed): self._start(self._order(step + 1, size, seed)[:size])
        }
        return Examples(
            **{name: value if value is None else value[rows] for name, value in vars(items).items()}
        )

    def _order(self, step: int, size: int, seed: int) -> np.ndarray:
        """All training captions in the order of this step's epoch, which is a circle, from the step's first on."""
        epoch, place = divmod(step, -(-len(self.train) // size))
        if self._epoch != (seed, epoch):
            chance = (random_bits(len(self.paths), seed, ORDER, epoch)[0] >> 1).astype(np.int64)[
                self._thing
            ]
            rounds = (self._which + chance) % self._count
            self._epoch, self._shuffled = (
                (seed, epoch),
                np.lexsort((chance, rounds)),
            )  # by round, then by chance
        return np.roll(self._shuffled, -place * size)

    def gallery(self, size: int, seed: int = 0) -> Examples:
        """Held-out things, all different, each with one of its captions; the same at every call.

        UserError if there are fewer than `size`, or fewer that can be decoded.
        """
        if not 1 <= size <= len(self.held_out):
            raise UserError(
                f"--data {self.name}: {len(self.held_out):,} things are held out, which do not make a gallery of {size:,}; "
                "ask for another size, or add some"
            )
        chance, things = (
            random_bits(len(self.held_out), seed, GALLERY)[0],
            list(self.held_out.items()),
        )
        rows = [
            (things[i][0], things[i][1][chance[i] % len(things[i][1])])
            for i in chance.argsort(kind="stable")
        ]
        return self._collect(
            rows, self._pool.map(self._decode, [thing for thing, _ in rows[:size]]), size
        )

    def _start(self, order: np.ndarray) -> Iterator:
        """Let the threads decode these training items."""
        return self._pool.map(self._decode, self._thing[order].tolist())

    def _decode(self, thing: int) -> tuple[np.ndarray, ...] | str:
        """A thing's arrays, or why there are none."""
        try:
            if thing in self._faults:
                return self._faults[thing]
            if self.modalities[1] == "image":
                return (read_image(self.paths[thing], self.image_size),)
            wave = read_sound(self.paths[thing], self.frames)
            return wave, normalized_log_mel(wave)
        except UserError as error:
            return str(error)

    def _collect(self, rows: Iterable[tuple[int, str]], ahead: Iterator, size: int) -> Examples:
        """The first `size` of rows (thing, caption) that can be decoded, of which `ahead` decodes the first already."""
        found = []
        for thing, caption in rows:
            arrays = next(ahead, None) or self._decode(thing)
            if not isinstance(arrays, str):
                found.append((thing, caption, arrays))
            elif thing not in self._faults:
                self._faults[thing] = arrays
                print(f"warning: skipped {arrays}", file=sys.stderr)
            if len(found) == size:
                break
        else:
            raise UserError(
                f"--data {self.name}: {size:,} items are asked for at a time, and only {len(found):,} can be decoded "
                f"({self.skipped:,} corrupt files, the first: {next(iter(self._faults.values()))})"
            )
        ids, captions, arrays = zip(*found, strict=True)
        arrays = [np.stack(each) for each in zip(*arrays, strict=True)]
        kinds = ("images",) if self.modalities[1] == "image" else ("waves", "mels")
        return Examples(
            np.array(ids, np.int64), list(captions), **dict(zip(kinds, arrays, strict=True))
        )


def load_caption_dataset(folder: Path, image_size: int, frames: int) -> CaptionDataset:
    """Read a folder's captions and find its files; a batch decodes them, to images of `image_size` or sounds of `frames`.

    UserError, with a mend, for a folder that is no data set, for a mistake in its captions, and for files that are missing.
    """
    return CaptionDataset(str(folder), *read_captions(Path(folder)), image_size, frames)
