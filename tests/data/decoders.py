"""Decoders for scenes: they read the facts from an image, a caption or a sound, without learning.

They use what a viewer or listener knows (palette, pitches, words, outlines), never what was drawn.
Facts are rows of seven indices in the order of nanods.data.scenes.FACTS.
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

# ---- captions: a separate grammar ----------------------------------------------------------------


def name_by_word(**words_by_name):
    """Return word -> name, from name="word, word, ..."."""
    return {word: name for name, text in words_by_name.items() for word in text.split(", ")}


SHAPE_BY_WORD = name_by_word(
    circle="circle, disc",
    square="square, box",
    triangle="triangle, wedge",
    cross="cross, plus",
    ring="ring, hoop",
    diamond="diamond, rhombus",
)
SIZE_BY_WORD = name_by_word(small="small, little, tiny", large="large, big, huge")
RELATION_BY_WORD = {
    "left": "left of",
    "its left": "left of",
    "right": "right of",
    "its right": "right of",
    "above": "above",
    "over": "above",
    "higher": "above",
    "below": "below",
    "under": "below",
    "lower": "below",
}
OBJECT = re.compile(
    rf"(?:a|the|one) ({'|'.join(SIZE_BY_WORD)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPE_BY_WORD)})\b"
)
RELATION = re.compile(rf"\b(?:its )?({'|'.join(RELATION_BY_WORD)})\b")


def decode_caption(text):
    """Return the facts that a caption states."""
    first, second = (
        (SHAPES.index(SHAPE_BY_WORD[shape]), COLOURS.index(colour), SIZES.index(SIZE_BY_WORD[size]))
        for size, colour, shape in OBJECT.findall(text)
    )
    (word,) = RELATION.findall(OBJECT.sub("", text))
    relation = RELATIONS.index(RELATION_BY_WORD[word])
    relation_comes_first = re.match(RELATION, re.sub("^(to|on) the ", "", text))
    if " has " in text or relation_comes_first:  # the relation is the second object's
        first, second = second, first
    return (*first, relation, *second)


# ---- images: two objects separated by an empty stripe, each compared with all outlines -----------

CROP = 17  # pixels; the widest object has 13
TEMPLATE_PARAMETERS = list(
    product(range(len(SHAPES)), range(len(SIZES)), range(3), range(5), range(5))
)


def outlines():
    """Return all outlines, (n_outlines, CROP * CROP).

    Each shape has three radii of each size, and centres half a pixel apart.
    """
    shape, size, radius, down, across = np.array(TEMPLATE_PARAMETERS).T
    r = (RADII[size, 0] + (RADII[size, 1] - RADII[size, 0]) * radius / 2).astype(np.float32)
    cover = coverage(shape, CROP / 2 + (across - 2) / 2, CROP / 2 + (down - 2) / 2, r)
    return cover[:, :CROP, :CROP].reshape(len(TEMPLATE_PARAMETERS), -1)


def decode_image(image, templates):
    """Return the facts that an image (3, 32, 32) shows."""
    background = np.median(image.reshape(3, -1), axis=1)[:, None, None]
    mask = abs(image - background).max(axis=0) > 0.22
    neighbours = sum(np.roll(mask, shift, axis) for shift in (-1, 1) for axis in (0, 1))
    mask &= neighbours >= 2  # no single pixels
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    is_horizontal = np.diff(columns).max() > np.diff(rows).max()
    if is_horizontal:
        cut = columns[np.diff(columns).argmax()] + 1.5
        parts = [mask & (np.arange(32) < cut), mask & (np.arange(32) > cut)]
    else:
        cut = rows[np.diff(rows).argmax()] + 1.5
        parts = [mask & (np.arange(32) < cut)[:, None], mask & (np.arange(32) > cut)[:, None]]
    first, second = (
        decode_object(image - background, part, background, templates) for part in parts
    )
    return (*first, 0 if is_horizontal else 1, *second)


def decode_object(image, mask, background, templates):
    """Return the shape, colour and size with the smallest squared error.

    `image` (3, 32, 32) has the background subtracted.
    """
    y, x = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, left = (round((at[0] + at[-1] + 1) / 2 - CROP / 2) for at in (y, x))
    near = np.zeros_like(mask)
    near[max(0, y[0] - 1) : y[-1] + 2, max(0, x[0] - 1) : x[-1] + 2] = True
    padded = np.pad(image * near, ((0, 0), (CROP, CROP), (CROP, CROP)))
    crop = padded[:, top + CROP :, left + CROP :][:, :CROP, :CROP]
    paint = PALETTE - background[:, 0, 0]  # (colour, 3)
    error = (templates**2).sum(axis=1)[:, None] * (paint**2).sum(axis=1) - 2 * templates @ (
        paint @ crop.reshape(3, -1)
    ).T
    template, colour = np.unravel_index(error.argmin(), error.shape)
    return TEMPLATE_PARAMETERS[template][0], int(colour), TEMPLATE_PARAMETERS[template][1]


# ---- sounds: three events separated by silence; length, spectral peak and overtones of each ------

PIECE = 80  # samples, 10 ms


def decode_sound(wave):
    """Return the facts that a sound (S,) plays."""
    pieces = wave[: len(wave) // PIECE * PIECE].reshape(-1, PIECE)
    is_loud = np.sqrt((pieces**2).mean(axis=1)) > 0.07
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_loud, [False]]).astype(int)))
    (first, glide, second) = [wave[a * PIECE : b * PIECE] for a, b in edges.reshape(-1, 2)]
    third = len(glide) // 3
    octaves = np.log2(peak_frequency(glide[-third:]) / peak_frequency(glide[:third]))
    relation = 0 if abs(octaves) < 0.3 else 1 if octaves < 0 else 3
    return (*decode_tone(first), relation, *decode_tone(second))


def spectrum(piece):
    return abs(np.fft.rfft(piece * np.hanning(len(piece)), RATE))  # one bin for each Hz


def peak_frequency(piece):
    """Return the frequency of the spectrum's peak, in Hz, from 200 up."""
    return spectrum(piece)[200:].argmax() + 200


def decode_tone(piece):
    """Return the shape, colour and size of the object that a tone stands for."""
    strength = spectrum(piece)
    strengths = [
        [strength[int(k * hertz * 0.97) : int(k * hertz * 1.03) + 1].max() for k in (1, 2, 3, 4)]
        for hertz in PITCHES
    ]
    # The rising edge of the lowest strong overtone.
    low = np.flatnonzero(strength > 0.4 * strength.max())[0]
    hertz = low + strength[low : low + 40].argmax()
    colour = abs(np.log2(PITCHES / hertz)).argmin()
    overtones = np.array(strengths[colour]) / strengths[colour][0]
    shape = ((OVERTONES - overtones) ** 2).sum(axis=1).argmin()
    return int(shape), int(colour), int(len(piece) > 0.23 * RATE)
