"""Ground truth for scenes: the facts read back from an image, a caption or a sound by simple means, without learning.

They know what a viewer or listener would know (palette, pitches, words, outlines), never what was drawn.
Facts are rows of seven indices as in nanods.data.scenes.FACTS.
"""

import re
from itertools import product

import numpy as np

from nanods.data.scenes import (
    COLOURS,
    OVERTONES,
    PALETTE,
    PITCHES,
    RADII,
    RELATIONS,
    SHAPES,
    SIZES,
    coverage,
)
from nanods.data.sound import RATE

# ---- captions: a grammar of its own


def words(**lists):
    return {word: name for name, text in lists.items() for word in text.split(", ")}


SHAPE_WORDS = words(
    circle="circle, disc", square="square, box", triangle="triangle, wedge", cross="cross, plus", ring="ring, hoop",
    diamond="diamond, rhombus",
)  # fmt: skip
SIZE_WORDS = words(small="small, little, tiny", large="large, big, huge")
RELATION_WORDS = {
    "left": "left of", "its left": "left of", "right": "right of", "its right": "right of", "above": "above", "over": "above",
    "higher": "above", "below": "below", "under": "below", "lower": "below",
}  # fmt: skip
THING = re.compile(
    rf"(?:a|the|one) ({'|'.join(SIZE_WORDS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPE_WORDS)})\b"
)
RELATION = re.compile(rf"\b(?:its )?({'|'.join(RELATION_WORDS)})\b")


def read_caption(text):
    first, second = (
        (SHAPES.index(SHAPE_WORDS[shape]), COLOURS.index(colour), SIZES.index(SIZE_WORDS[size]))
        for size, colour, shape in THING.findall(text)
    )
    (word,) = RELATION.findall(THING.sub("", text))
    relation = RELATIONS.index(RELATION_WORDS[word])
    if " has " in text or re.match(
        RELATION, re.sub("^(to|on) the ", "", text)
    ):  # the second thing is where it says
        first, second = second, first
    return (*first, relation, *second)


# ---- images: two spots parted by an empty stripe, each pair_weights with all outlines

CROP = 17  # pixels; the widest object has 13
KINDS = list(product(range(len(SHAPES)), range(len(SIZES)), range(3), range(5), range(5)))


def outlines():
    """(outline, CROP CROP): every shape, three radii of each size, centres half a pixel apart."""
    shape, size, radius, down, across = np.array(KINDS).T
    r = (RADII[size, 0] + (RADII[size, 1] - RADII[size, 0]) * radius / 2).astype(np.float32)
    cover = coverage(shape, CROP / 2 + (across - 2) / 2, CROP / 2 + (down - 2) / 2, r)
    return cover[:, :CROP, :CROP].reshape(len(KINDS), -1)


def read_image(image, templates):
    ground = np.median(image.reshape(3, -1), axis=1)[:, None, None]
    spots = abs(image - ground).max(axis=0) > 0.22
    spots &= (
        sum(np.roll(spots, shift, axis) for shift in (-1, 1) for axis in (0, 1)) >= 2
    )  # no lone pixels
    columns, rows = (np.flatnonzero(spots.any(axis=axis)) for axis in (0, 1))
    beside = np.diff(columns).max() > np.diff(rows).max()
    if beside:
        cut = columns[np.diff(columns).argmax()] + 1.5
        parts = [spots & (np.arange(32) < cut), spots & (np.arange(32) > cut)]
    else:
        cut = rows[np.diff(rows).argmax()] + 1.5
        parts = [spots & (np.arange(32) < cut)[:, None], spots & (np.arange(32) > cut)[:, None]]
    first, second = (read_spot(image - ground, part, ground, templates) for part in parts)
    return (*first, 0 if beside else 1, *second)


def read_spot(image, spot, ground, templates):
    """The shape, colour and size that leave the least square error. `image` (3, 32, 32) is less the ground."""
    y, x = (np.flatnonzero(spot.any(axis=axis)) for axis in (1, 0))
    top, left = (round((at[0] + at[-1] + 1) / 2 - CROP / 2) for at in (y, x))
    near = np.zeros_like(spot)
    near[max(0, y[0] - 1) : y[-1] + 2, max(0, x[0] - 1) : x[-1] + 2] = True
    crop = np.pad(image * near, ((0, 0), (CROP, CROP), (CROP, CROP)))[
        :, top + CROP :, left + CROP :
    ][:, :CROP, :CROP]
    paint = PALETTE - ground[:, 0, 0]  # (colour, 3)
    error = (templates**2).sum(axis=1)[:, None] * (paint**2).sum(axis=1) - 2 * templates @ (
        paint @ crop.reshape(3, -1)
    ).T
    kind, colour = np.unravel_index(error.argmin(), error.shape)
    return KINDS[kind][0], int(colour), KINDS[kind][1]


# ---- sounds: three events parted by silence; the length, the spectrum's peak and the overtones of each

PIECE = 80  # samples, 10 ms


def read_sound(wave):
    loud = np.sqrt((wave[: len(wave) // PIECE * PIECE].reshape(-1, PIECE) ** 2).mean(axis=1)) > 0.07
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
    (first, glide, second) = [wave[a * PIECE : b * PIECE] for a, b in edges.reshape(-1, 2)]
    third = len(glide) // 3
    change = np.log2(peak(glide[-third:]) / peak(glide[:third]))  # octaves
    relation = 0 if abs(change) < 0.3 else 1 if change < 0 else 3
    return (*read_tone(first), relation, *read_tone(second))


def spectrum(piece):
    return abs(np.fft.rfft(piece * np.hanning(len(piece)), RATE))  # a bin for each Hz


def peak(piece):
    return spectrum(piece)[200:].argmax() + 200


def read_tone(piece):
    strength = spectrum(piece)
    best = [
        [strength[int(k * hertz * 0.97) : int(k * hertz * 1.03) + 1].max() for k in (1, 2, 3, 4)]
        for hertz in PITCHES
    ]
    low = np.flatnonzero(strength > 0.4 * strength.max())[
        0
    ]  # the rising flank of the lowest strong partial
    hertz = low + strength[low : low + 40].argmax()
    colour = abs(np.log2(PITCHES / hertz)).argmin()
    normalized_log_mel = np.array(best[colour]) / best[colour][0]
    shape = ((OVERTONES - normalized_log_mel) ** 2).sum(axis=1).argmin()
    return int(shape), int(colour), int(len(piece) > 0.23 * RATE)
