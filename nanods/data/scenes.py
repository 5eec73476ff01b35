"""Scenes: an endless data set that needs no network, in which image, caption and sound say the same thing.

A scene is two objects and how one lies to the other. What it *means*, whichever way it is put, is one number:

    "a small red circle left of a big blue square"   =   "a big blue square to the right of a tiny red disc"

    fact        image                    caption                  sound
    shape       outline                  "circle", "disc"         timbre: which overtones are there
    colour      colour                   "red"                    pitch, three semitones apart from C4 up
    size        radius                   "small", "tiny"          small: short and soft; large: long and loud
    relation    place                    "left of", "above"       order, and what sounds between the two: a level tone, then the
                                                                  next lies right of it; a falling one, below; a rising, above

Everything else is chance: place, wording, radius, tint, loudness, tempo, noise. And chance is a function: an item is fixed by
(seed, meaning, variant), a training batch by (seed, step, size), with no state, whatever was drawn before, in any process; to
the last bit on one kind of processor, since sines and Fourier transforms may round otherwise on another.

A tenth of all meanings is held out: no training batch draws them, under any seed. `gallery` shows 512 of them. And a batch is
hard: who sees only strangers in it never needs to tell left from right (lessons/03_multimodal.ipynb has the figures).

    python -m timeit -p -s 'from nanods.data.scenes import batch' 'batch(0, 128)'      23 ms of one core: 5,500 items a second

Left out on purpose: three objects, overlap, negation, words that mean two things. Every caption is true, no sound is missing.

Shapes: B items, S samples, M mel bands, T frames. Images are [channel, y, x], y downwards, pixels as units of length.
"""

import hashlib
from functools import cache, lru_cache

import numpy as np

from nanods.data.examples import Examples
from nanods.data.random_bits import between, noise, random_bits, uniform
from nanods.data.sound import HOP, RATE, WINDOW, log_mel

# ---- meanings ----------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "pink", "white")
SIZES = ("small", "large")
RELATIONS = (
    "left of",
    "above",
    "right of",
    "below",
)  # the last two are the first two, told from the other side

OBJECTS = len(SHAPES) * len(COLOURS) * len(SIZES)  # 96
SCENE_COUNT = (
    2 * OBJECTS * (OBJECTS - 1)
)  # 18,240: two relations, ordered pairs of objects that differ
FACTS = ("shape", "colour", "size", "relation", "other shape", "other colour", "other size")


def facts_of(meanings: np.ndarray) -> np.ndarray:
    """(B,) in 0 .. SCENE_COUNT - 1 -> (B, 7) indices in the order of FACTS; the relation is "left of" or "above".

    ValueError for a number that is no meaning.
    """
    meanings = np.asarray(meanings, np.int64)
    if not ((meanings >= 0) & (meanings < SCENE_COUNT)).all():
        raise ValueError(f"meanings are numbers from 0 to {SCENE_COUNT - 1:,}")
    rest, b = np.divmod(meanings, OBJECTS - 1)
    relation, a = np.divmod(rest, OBJECTS)
    b = b + (b >= a)  # the other object is any but the first
    return np.stack([*object_facts(a), relation, *object_facts(b)], axis=-1)


def object_facts(thing: np.ndarray) -> tuple[np.ndarray, ...]:
    """0 .. OBJECTS - 1 -> shape, colour, size."""
    return np.unravel_index(thing, (len(SHAPES), len(COLOURS), len(SIZES)))


def scene_ids_of(facts: np.ndarray) -> np.ndarray:
    """(B, 7), any of the four relations -> (B,): both ways to put a scene give one number.

    ValueError for an index out of range, and where the two objects are alike: no relation could be decided.
    """
    facts = np.asarray(facts, np.int64)
    counts = (
        len(SHAPES),
        len(COLOURS),
        len(SIZES),
        len(RELATIONS),
        len(SHAPES),
        len(COLOURS),
        len(SIZES),
    )
    if not ((facts >= 0) & (facts < counts)).all():
        raise ValueError(f"facts are indices below {counts}")
    turned = facts[:, 3] >= 2
    facts = np.where(turned[:, None], facts[:, [4, 5, 6, 3, 0, 1, 2]], facts)
    a = np.ravel_multi_index(tuple(facts[:, :3].T), counts[:3])
    b = np.ravel_multi_index(tuple(facts[:, 4:].T), counts[:3])
    if (a == b).any():
        raise ValueError("the two objects of a scene must differ in shape, colour or size")
    return ((facts[:, 3] % 2) * OBJECTS + a) * (OBJECTS - 1) + b - (b > a)


# ---- chance as a function (nanods/data/random_bits.py) ----------------------------------------------------------------------------

GROUPS = 16  # into which a hard epoch deals each family of meanings
SPLIT, ORDER, IMAGE, CAPTION, SOUND = range(
    5
)  # what a random number is for: the first part of its key


# ---- images ------------------------------------------------------------------------------------------------------------------

SIDE = 32  # pixels
RADII = np.array([[3.2, 4.0], [5.5, 6.5]], np.float32)  # least and most, of small and of large
# Okabe and Ito's palette (2008), told apart by all kinds of colour vision; white takes the place of black, on a dark ground.
PALETTE = np.array([
    (213, 94, 0), (230, 159, 0), (240, 228, 66), (0, 158, 115), (86, 180, 233), (0, 114, 178), (204, 121, 167), (255, 255, 255),
], np.float32) / np.float32(255)  # fmt: skip

# How far a point at (x, y) lies outside of a shape of radius r about (0, 0); negative inside.
OUTSIDE = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,
    "triangle": lambda x, y, r: np.maximum(
        0.866 * abs(x) - 0.5 * y - 0.47 * r, y - 0.7 * r
    ),  # one corner upwards
    "cross": lambda x, y, r: np.maximum(
        np.minimum(abs(x), abs(y)) - 0.33 * r, np.maximum(abs(x), abs(y)) - r
    ),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r,
    "diamond": lambda x, y, r: (abs(x) + abs(y)) * 0.707 - 0.7 * r,
}


def covered(shape: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """How much of each pixel an object covers: its shape, centre and radius, (B,) each -> (B, SIDE, SIDE) in 0 .. 1."""
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    cover = np.empty((len(shape), SIDE, SIDE), np.float32)
    for s, name in enumerate(SHAPES):
        mine = np.flatnonzero(shape == s)
        across, down, radius = (
            pixels - x[mine, None, None],
            pixels[:, None] - y[mine, None, None],
            r[mine, None, None],
        )
        cover[mine] = 0.5 - OUTSIDE[name](across, down, radius)
    return np.clip(cover, 0, 1, out=cover)


def draw(meanings: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> np.ndarray:
    """meanings (B,), variants (B,) or one for all -> images (B, 3, SIDE, SIDE) float32 in 0 .. 1."""
    facts, key = facts_of(meanings), (seed, IMAGE, meanings, variants)
    chance = uniform(14, *key)
    ra, rb = (between(*RADII[facts[:, size]].T, chance[:, i]) for i, size in enumerate((2, 6)))
    gap = between(2, 4, chance[:, 2])
    # Along the relation the two stand in line, at least 2 pixels apart; across it they are off by 3 at most.
    first = between(1 + ra, SIDE - 1 - ra - gap - 2 * rb, chance[:, 3])
    middle = between(2.5 + np.maximum(ra, rb), SIDE - 2.5 - np.maximum(ra, rb), chance[:, 4])
    a = first, middle + between(-1.5, 1.5, chance[:, 5])  # (along, across)
    b = first + ra + gap + rb, middle + between(-1.5, 1.5, chance[:, 6])
    images = np.empty((len(facts), 3, SIDE, SIDE), np.float32)
    images[:] = between(0.05, 0.2, chance[:, 7, None, None, None])  # the ground, a dark grey
    beside = facts[:, 3] == 0
    for i, (place, r) in enumerate(((a, ra), (b, rb))):
        x, y = np.where(beside, place, place[::-1])
        cover = covered(facts[:, 4 * i], x, y, r)[:, None]  # (B, 1, SIDE, SIDE)
        tint = between(-0.06, 0.06, chance[:, 8 + 3 * i : 11 + 3 * i])
        colour = (PALETTE[facts[:, 4 * i + 1]] + tint)[:, :, None, None]
        images += cover * (colour - images)
    images += 0.1 * noise(3 * SIDE * SIDE, *key, 1).reshape(images.shape)
    return np.clip(images, 0, 1, out=images)


# ---- captions ----------------------------------------------------------------------------------------------------------------

SENTENCES = (  # {a} is {to} {b}
    "{a} {to} {b}",
    "{a} is {to} {b}",
    "there is {a} {to} {b}",
    "{to} {b} is {a}",
    "{b} has {a} {to_it}",
)
ARTICLES = ("a", "the", "one")
WORDS = {
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle", "wedge"), "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"), "diamond": ("diamond", "rhombus"), "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"), "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"), "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}  # fmt: skip
WORDS_TO_IT = {
    "left of": ("to its left", "on its left"), "right of": ("to its right", "on its right"),
    "above": ("above it", "over it"), "below": ("below it", "under it"),
}  # fmt: skip


def describe(meanings: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> list[str]:
    """meanings (B,), variants (B,) or one for all -> captions, in lower case and ASCII."""
    random = random_bits(11, seed, CAPTION, meanings, variants)
    return [
        caption(*scene) for scene in zip(facts_of(meanings).tolist(), random.tolist(), strict=True)
    ]


def caption(facts: list[int], random: list[int]) -> str:
    """One scene's facts (7,) in the words that 11 random numbers choose."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[random.pop() % len(choices)]

    def name(shape: int, colour: int, size: int) -> str:
        return f"{pick(ARTICLES)} {pick(WORDS[SIZES[size]])} {COLOURS[colour]} {pick(WORDS[SHAPES[shape]])}"

    random = list(random)
    a, relation, b = facts[:3], facts[3], facts[4:]
    if random.pop() % 2:
        a, relation, b = b, relation + 2, a
    sentence, to = pick(SENTENCES), RELATIONS[relation]
    return sentence.format(a=name(*a), b=name(*b), to=pick(WORDS[to]), to_it=pick(WORDS_TO_IT[to]))


@cache
def vocabulary() -> frozenset[str]:
    """Every word that a caption may have."""
    choices = [SENTENCES, ARTICLES, COLOURS, *WORDS.values(), *WORDS_TO_IT.values()]
    return frozenset(
        word for some in choices for text in some for word in text.split() if "{" not in word
    )


# ---- sounds ------------------------------------------------------------------------------------------------------------------

FRAMES = 32
SAMPLES = WINDOW + (FRAMES - 1) * HOP  # 8,448: 1.056 s, which log_mel makes 32 frames of
PITCHES = 440 * 2 ** (
    (np.arange(8, dtype=np.float32) * 3 - 9) / 12
)  # Hz, of COLOURS: C4 Eb4 Gb4 A4 C5 Eb5 Gb5 A5
OVERTONES = np.array(  # of SHAPES: how strong 1, 2, 3 and 4 times the pitch are
    [(1, 0, 0, 0), (1, 0, 0.7, 0), (1, 0.7, 0.7, 0.7), (1, 0.7, 0.7, 0), (1, 0.7, 0, 0), (1, 0, 0, 0.7)], np.float32
)  # fmt: skip
SECONDS, LOUDNESS = np.array([0.16, 0.3], np.float32), np.array([0.2, 0.4], np.float32)  # of SIZES
LONGEST = 2640  # samples, 0.33 s: a large object at the slowest tempo
GLIDES = np.array(
    [(1400, 1400), (2000, 1000), (1000, 2000)], np.float32
)  # Hz from, to: right of it, below it, above it


def tone(
    hertz: np.ndarray, seconds: np.ndarray, loudness: np.ndarray, overtones: np.ndarray
) -> np.ndarray:
    """A tone each, from silence to silence: hertz (B, 2) at its start and end, (B,), (B,), (B, 4) -> (B, LONGEST)."""
    time = np.arange(LONGEST, dtype=np.float32) / np.float32(RATE)
    length = seconds[:, None]
    start, slope = hertz[:, :1], (hertz[:, 1:] - hertz[:, :1]) / (2 * length)
    cycles = (start + slope * time) * time  # the integral of the frequency
    angle = (cycles - np.floor(cycles)) * np.float32(2 * np.pi)
    before, this, twice = 0, np.sin(angle), 2 * np.cos(angle)
    total = overtones[:, :1] * this
    for k in range(1, overtones.shape[1]):
        before, this = (
            this,
            twice * this - before,
        )  # sin (k + 1) x = 2 cos x sin k x - sin (k - 1) x
        total += overtones[:, k, None] * this
    envelope = np.clip(
        np.minimum(time, length - time) * 100, 0, 1
    )  # 10 ms of swelling and of fading
    level = loudness / np.sqrt(np.square(overtones).sum(axis=1))
    return total * envelope * level[:, None]


def play(meanings: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> np.ndarray:
    """meanings (B,), variants (B,) or one for all -> waves (B, SAMPLES) float32 in -1 .. 1, 8,000 Hz.

    Object, glide, object. Time runs from left to right; of two above each other, either comes first.
    """
    facts, key = facts_of(meanings), (seed, SOUND, meanings, variants)
    chance = uniform(11, *key)
    turned = (facts[:, 3] == 1) & (chance[:, 0] < 0.5)
    facts = np.where(turned[:, None], facts[:, [4, 5, 6, 3, 0, 1, 2]], facts)
    glide, tempo = facts[:, 3] + turned, between(0.9, 1.1, chance[:, 1])
    gap = between(0.04, 0.07, chance[:, 2])  # seconds
    waves = between(0.01, 0.06, chance[:, 3, None]) * noise(SAMPLES, *key, 1)
    start = between(0.01, 0.1, chance[:, 4])  # seconds
    for i, event in enumerate(("object", "glide", "object")):
        loudness, detune = (
            between(0.85, 1.15, chance[:, 5 + i]),
            between(0.98, 1.02, chance[:, 8 + i, None]),
        )
        if event == "object":
            shape, colour, size = facts[:, 2 * i : 2 * i + 3].T
            hertz, seconds, overtones = (
                PITCHES[colour, None].repeat(2, axis=1),
                SECONDS[size] * tempo,
                OVERTONES[shape],
            )
            loudness = loudness * LOUDNESS[size]
        else:
            hertz, seconds, overtones = GLIDES[glide], 0.14 * tempo, OVERTONES[np.zeros_like(glide)]
            loudness = loudness * 0.2
        sound = tone(hertz * detune, seconds, loudness, overtones)
        for wave, own, at in zip(waves, sound, (start * RATE).astype(int), strict=True):
            wave[at : at + LONGEST] += own
        start = start + seconds + gap
    return np.clip(waves, -1, 1, out=waves)


# ---- all three ---------------------------------------------------------------------------------------------------------------


class Scenes(Examples):
    """B scenes, each as image, caption and sound; `ids` are scene ids, which `facts_of` takes apart."""


def normalized_log_mel(waves: np.ndarray) -> np.ndarray:
    """waves (..., S) -> (..., M, T): log_mel, shifted and scaled to a mean near 0 and a standard deviation near 1."""
    return (log_mel(waves) + 44) / 10


def render(meanings: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> Scenes:
    """The scenes of these meanings (B,); a variant (B,), from 0 up, is another place, wording and noise of the same."""
    meanings = np.asarray(meanings, np.int64)
    captions, waves = describe(meanings, variants, seed), play(meanings, variants, seed)
    return Scenes(
        ids=meanings,
        captions=captions,
        images=draw(meanings, variants, seed),
        waves=waves,
        mels=normalized_log_mel(waves),
    )


@cache
def split() -> tuple[np.ndarray, np.ndarray]:
    """All meanings in two parts: 16,416 for training, 1,824 held out. The same for every seed."""
    shuffled = random_bits(SCENE_COUNT, SPLIT)[0].argsort(kind="stable")
    shuffled.flags.writeable = False
    return shuffled[SCENE_COUNT // 10 :], shuffled[: SCENE_COUNT // 10]


def family_and_pair(meanings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """meanings (B,) -> the number of each one's family (B,), whose members differ in shapes and in who is first alone, and of
    its two objects (B,), whoever is first."""
    facts = facts_of(meanings)
    looks = facts[:, [1, 5]] * len(SIZES) + facts[:, [2, 6]]  # (B, 2)
    things = looks * len(SHAPES) + facts[:, [0, 4]]
    family, pair = (
        np.sort(which, axis=1) @ (OBJECTS, 1) * 2 + facts[:, 3] for which in (looks, things)
    )
    return family, pair


@lru_cache(maxsize=2)
def epoch_order(epoch: int, seed: int, hard: bool) -> np.ndarray:
    """The training meanings in the order of an epoch. Hard: in groups of about four of a family, each with its mirror image."""
    train, _ = split()
    keys = random_bits(len(train), seed, ORDER, epoch)[0]
    if hard:
        family, pair = family_and_pair(train)
        group = (random_bits(1, seed, ORDER, epoch, 1, pair)[:, 0] % GROUPS).astype(np.int64)
        keys = random_bits(1, seed, ORDER, epoch, 2, family, group)[:, 0]
    return train[keys.argsort(kind="stable")]


def training_scene_ids(step: int, size: int, seed: int = 0, hard: bool = True) -> np.ndarray:
    """The meanings (size,) of a training step, all different: each occurs once before any comes again."""
    train, _ = split()
    if not 1 <= size <= len(train):
        raise ValueError(f"a batch has 1 to {len(train):,} scenes, not {size:,}")
    epoch, place = divmod(step, len(train) // size)
    return epoch_order(epoch, seed, hard)[place * size : (place + 1) * size]


def batch(
    step: int, size: int, seed: int = 0, hard: bool = True, rows: slice = slice(None)
) -> Scenes:
    """The training scenes of a step, or these rows of them; never a held-out meaning. ValueError for a size not 1 to 16,416."""
    return render(training_scene_ids(step, size, seed, hard)[rows], step, seed)


def gallery(size: int = 512, seed: int = 0) -> Scenes:
    """Held-out meanings, all different, the same at every call. ValueError for more than there are."""
    _, held_out = split()
    if not 1 <= size <= len(held_out):
        raise ValueError(
            f"{len(held_out):,} meanings are held out: a gallery shows 1 to all of them, not {size:,}"
        )
    return render(held_out[:size], 0, seed)


class SceneData:
    """Scenes as nanods/training/contrastive_task.py wants a data set of items."""

    name, modalities = "scenes", ("text", "image", "audio")

    def __init__(self, hard: bool = True) -> None:
        self.hard, (self.train, self.held_out) = hard, split()
        captions = "\n".join(describe(self.held_out, 0))
        self.sha256 = hashlib.sha256(
            captions.encode()
        ).hexdigest()  # of words alone: pixels may round otherwise elsewhere

    def text(self) -> str:
        """A caption of each training meaning, for a tokenizer to learn from."""
        return "\n".join(describe(self.train, 0))

    def batch(self, step: int, size: int, seed: int = 0, rows: slice = slice(None)) -> Scenes:
        return batch(step, size, seed, self.hard, rows)

    def gallery(self, size: int) -> Scenes:
        return gallery(size)
