"""Scenes: a generated, endless data set, whose images, captions and sounds show the same scenes.

It needs no network. A scene is two objects and the relation between them. Its *scene id* is one
number for what it shows. These captions describe the same scene:

    "a small red circle left of a big blue square"
    "a big blue square to the right of a tiny red disc"

    fact      image     caption              sound
    shape     outline   "circle", "disc"     timbre: which overtones are present
    colour    colour    "red"                pitch: three semitones apart, from C4 up
    size      radius    "small", "tiny"      small: short and soft; large: long and loud
    relation  position  "left of", "above"   order of the two tones, and the glide between them:
                                             level if the second object is to the right,
                                             falling if it is below, rising if it is above

Everything else is random: position, wording, radius, tint, loudness, tempo, noise. The random
numbers are counter-based (nanods/data/random_bits.py): an example depends on (seed, scene id,
variant) alone, and a training batch on (seed, step, size) alone, in any process and order. Bitwise
equality holds on one kind of processor, since sines and Fourier transforms may round differently on
another.

A tenth of all scenes is held out: no training batch has them, under any seed. `gallery` shows 512
of them. Batches are hard by default: they put scenes together that differ only in shapes or in
order. If all negatives were unrelated scenes, a model would never need to tell left from right
(lessons/03_multimodal.ipynb has the figures).

    python -m timeit -p -s 'from nanods.data.scenes import batch' 'batch(0, 128)'
    23 ms of one core: 5,500 examples a second

Left out on purpose: three objects, overlap, negation, words with two meanings. Every caption is
true, and no example lacks a modality.

Shapes: B examples, S samples, M mel bands, T frames. Images are [channel, y, x], y downwards; the
unit of length is a pixel.
"""

import difflib
import hashlib
from functools import cache, lru_cache

import numpy as np

from nanods.data.examples import Examples
from nanods.data.random_bits import interpolate, noise, random_bits, uniform
from nanods.data.sound import RATE, normalized_log_mel, samples_of
from nanods.errors import UserError

# ---- scene ids and facts -------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "pink", "white")
SIZES = ("small", "large")
# The last two are the first two, seen from the other object.
RELATIONS = ("left of", "above", "right of", "below")

OBJECT_COUNT = len(SHAPES) * len(COLOURS) * len(SIZES)  # 96
# 18,240 scenes: two relations, ordered pairs of different objects.
SCENE_COUNT = 2 * OBJECT_COUNT * (OBJECT_COUNT - 1)
FACTS = ("shape", "colour", "size", "relation", "other shape", "other colour", "other size")
SWAPPED = [4, 5, 6, 3, 0, 1, 2]  # columns of the facts after the two objects change places


def facts_of(scene_ids: np.ndarray) -> np.ndarray:
    """Return the facts of scenes: (B,) ids -> (B, 7) indices in the order of FACTS.

    The relation is always "left of" or "above". Raises ValueError for a number that is no scene id.
    """
    scene_ids = np.asarray(scene_ids, np.int64)
    if not ((scene_ids >= 0) & (scene_ids < SCENE_COUNT)).all():
        raise ValueError(f"scene ids are numbers from 0 to {SCENE_COUNT - 1:,}")
    rest, b = np.divmod(scene_ids, OBJECT_COUNT - 1)
    relation, a = np.divmod(rest, OBJECT_COUNT)
    b = b + (b >= a)  # b counts the objects other than a
    return np.stack([*object_facts(a), relation, *object_facts(b)], axis=-1)


def object_facts(object_ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the shape, colour and size of objects, given as numbers in 0 .. OBJECT_COUNT - 1."""
    return np.unravel_index(object_ids, (len(SHAPES), len(COLOURS), len(SIZES)))


def scene_ids_of(facts: np.ndarray) -> np.ndarray:
    """Return the scene ids of facts with any of the four relations: (B, 7) -> (B,).

    Both descriptions of a scene, "a left of b" and "b right of a", give the same id.

    Raises ValueError for an index out of range, and if the two objects are equal.
    """
    facts = np.asarray(facts, np.int64)
    object_counts = (len(SHAPES), len(COLOURS), len(SIZES))
    counts = (*object_counts, len(RELATIONS), *object_counts)
    if not ((facts >= 0) & (facts < counts)).all():
        raise ValueError(f"facts are indices below {counts}")
    is_reversed = facts[:, 3] >= 2
    facts = np.where(is_reversed[:, None], facts[:, SWAPPED], facts)
    a = np.ravel_multi_index(tuple(facts[:, :3].T), object_counts)
    b = np.ravel_multi_index(tuple(facts[:, 4:].T), object_counts)
    if (a == b).any():
        raise ValueError("the two objects of a scene must differ in shape, colour or size")
    return ((facts[:, 3] % 2) * OBJECT_COUNT + a) * (OBJECT_COUNT - 1) + b - (b > a)


# ---- random numbers (nanods/data/random_bits.py) -------------------------------------------------

# What a random number is used for: the part of its key after the seed.
SPLIT, ORDER, IMAGE, CAPTION, SOUND = range(5)
GROUPS = 16  # groups into which a hard epoch divides each family of scenes


# ---- images --------------------------------------------------------------------------------------

IMAGE_SIZE = 32  # pixels
RADII = np.array([[3.2, 4.0], [5.5, 6.5]], np.float32)  # min and max, of small and of large
# The palette of Okabe and Ito (2008), which all kinds of colour vision can tell apart; white
# replaces black, since the background is dark.
PALETTE = np.array([
    (213, 94, 0), (230, 159, 0), (240, 228, 66), (0, 158, 115),
    (86, 180, 233), (0, 114, 178), (204, 121, 167), (255, 255, 255),
], np.float32) / np.float32(255)  # fmt: skip


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the distance of points (x, y) to a shape of radius r at (0, 0), negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * r
    if shape == "triangle":  # one corner at the top
        return np.maximum(0.866 * abs(x) - 0.5 * y - 0.47 * r, y - 0.7 * r)
    if shape == "cross":
        return np.maximum(np.minimum(abs(x), abs(y)) - 0.33 * r, np.maximum(abs(x), abs(y)) - r)
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r
    if shape == "diamond":
        return (abs(x) + abs(y)) * 0.707 - 0.7 * r
    raise ValueError(f"no shape {shape}: use one of {', '.join(SHAPES)}")


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return how much of each pixel an object covers, (B, IMAGE_SIZE, IMAGE_SIZE) in 0 .. 1.

    `shape` (an index of SHAPES), centre `x`, `y` and radius `r` are (B,) each.
    """
    pixels = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    cover = np.empty((len(shape), IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for i, name in enumerate(SHAPES):
        rows = np.flatnonzero(shape == i)
        across = pixels - x[rows, None, None]
        down = pixels[:, None] - y[rows, None, None]
        cover[rows] = 0.5 - signed_distance(name, across, down, r[rows, None, None])
    return np.clip(cover, 0, 1, out=cover)


def render_images(scene_ids: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> np.ndarray:
    """Return an image of each scene, (B, 3, IMAGE_SIZE, IMAGE_SIZE) float32 in 0 .. 1.

    `scene_ids` is (B,), `variants` (B,) or one number for all.
    """
    facts, key = facts_of(scene_ids), (seed, IMAGE, scene_ids, variants)
    random = uniform(14, *key)
    radius_a = interpolate(*RADII[facts[:, 2]].T, random[:, 0])
    radius_b = interpolate(*RADII[facts[:, 6]].T, random[:, 1])
    gap = interpolate(2, 4, random[:, 2])
    # Along the relation's axis the objects are at least 2 pixels apart. Across it their centres
    # differ by at most 3 pixels. Positions are (along, across).
    along = interpolate(1 + radius_a, IMAGE_SIZE - 1 - radius_a - gap - 2 * radius_b, random[:, 3])
    larger = np.maximum(radius_a, radius_b)
    across = interpolate(2.5 + larger, IMAGE_SIZE - 2.5 - larger, random[:, 4])
    position_a = along, across + interpolate(-1.5, 1.5, random[:, 5])
    position_b = along + radius_a + gap + radius_b, across + interpolate(-1.5, 1.5, random[:, 6])
    images = np.empty((len(facts), 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    images[:] = interpolate(0.05, 0.2, random[:, 7, None, None, None])  # a dark grey background
    is_horizontal = facts[:, 3] == 0
    for i, (position, radius) in enumerate(((position_a, radius_a), (position_b, radius_b))):
        x, y = np.where(is_horizontal, position, position[::-1])
        cover = coverage(facts[:, 4 * i], x, y, radius)[:, None]  # (B, 1, IMAGE_SIZE, IMAGE_SIZE)
        tint = interpolate(-0.06, 0.06, random[:, 8 + 3 * i : 11 + 3 * i])
        colour = (PALETTE[facts[:, 4 * i + 1]] + tint)[:, :, None, None]
        images += cover * (colour - images)
    images += 0.1 * noise(3 * IMAGE_SIZE * IMAGE_SIZE, *key, 1).reshape(images.shape)
    return np.clip(images, 0, 1, out=images)


# ---- captions ------------------------------------------------------------------------------------

SENTENCES = (  # {a} and {b} are objects; {to} is "left of", {to_it} is "to its left", and so on
    "{a} {to} {b}",
    "{a} is {to} {b}",
    "there is {a} {to} {b}",
    "{to} {b} is {a}",
    "{b} has {a} {to_it}",
)
ARTICLES = ("a", "the", "one")
WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
WORDS_TO_IT = {
    "left of": ("to its left", "on its left"),
    "right of": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}


def render_captions(scene_ids: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> list[str]:
    """Return a caption of each scene, in lower case and ASCII.

    `scene_ids` is (B,), `variants` (B,) or one number for all.
    """
    random = random_bits(11, seed, CAPTION, scene_ids, variants).tolist()
    facts = facts_of(scene_ids).tolist()
    return [caption(*scene) for scene in zip(facts, random, strict=True)]


def caption(facts: list[int], random: list[int]) -> str:
    """Return a caption of one scene's facts (7,), in words chosen by 11 random numbers."""
    random = list(random)

    def choose(choices: tuple[str, ...]) -> str:
        return choices[random.pop() % len(choices)]

    def name_object(shape: int, colour: int, size: int) -> str:
        article, size_word = choose(ARTICLES), choose(WORDS[SIZES[size]])
        return f"{article} {size_word} {COLOURS[colour]} {choose(WORDS[SHAPES[shape]])}"

    a, relation, b = facts[:3], facts[3], facts[4:]
    if random.pop() % 2:
        a, relation, b = b, relation + 2, a
    sentence = choose(SENTENCES)
    to = RELATIONS[relation]
    # The order of these calls decides which random number each gets.
    return sentence.format(
        a=name_object(*a), b=name_object(*b), to=choose(WORDS[to]), to_it=choose(WORDS_TO_IT[to])
    )


@cache
def vocabulary() -> frozenset[str]:
    """Return every word that a caption may contain."""
    words = set()
    for phrases in (SENTENCES, ARTICLES, COLOURS, *WORDS.values(), *WORDS_TO_IT.values()):
        for phrase in phrases:
            words.update(word for word in phrase.split() if "{" not in word)
    return frozenset(words)


def check_scene_words(text: str) -> str:
    """Return a query in lower case, without punctuation. Raises UserError for a word that no
    scene's caption contains."""
    words = [word.strip(",.;:!?") for word in text.lower().split()]
    known = vocabulary()
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, cutoff=0.7) or sorted(known)
            raise UserError(f"the model has never read {word[:40]!r}; it knows {', '.join(near)}")
    return " ".join(words)


# ---- sounds --------------------------------------------------------------------------------------

FRAMES = 32
SAMPLES = samples_of(FRAMES)  # 8,448: 1.056 s, 32 frames of log_mel
# Hz, of COLOURS: C4 Eb4 Gb4 A4 C5 Eb5 Gb5 A5
PITCHES = 440 * 2 ** ((np.arange(8, dtype=np.float32) * 3 - 9) / 12)
# Of SHAPES: the strengths of 1, 2, 3 and 4 times the pitch.
OVERTONES = np.array([
    (1, 0, 0, 0), (1, 0, 0.7, 0), (1, 0.7, 0.7, 0.7),
    (1, 0.7, 0.7, 0), (1, 0.7, 0, 0), (1, 0, 0, 0.7),
], np.float32)  # fmt: skip
# Of SIZES.
SECONDS, LOUDNESS = np.array([0.16, 0.3], np.float32), np.array([0.2, 0.4], np.float32)
TONE_SAMPLES = 2640  # 0.33 s: the longest tone, a large object at the slowest tempo
# Hz, from and to: the next object is to the right, below, above.
GLIDES = np.array([(1400, 1400), (2000, 1000), (1000, 2000)], np.float32)


def render_tones(
    hertz: np.ndarray, seconds: np.ndarray, loudness: np.ndarray, overtones: np.ndarray
) -> np.ndarray:
    """Return tones that start and end in silence, (B, TONE_SAMPLES).

    `hertz` is (B, 2), the pitch at the start and at the end; `seconds` and `loudness` are (B,);
    `overtones` is (B, 4).
    """
    time = np.arange(TONE_SAMPLES, dtype=np.float32) / np.float32(RATE)
    length = seconds[:, None]
    start, slope = hertz[:, :1], (hertz[:, 1:] - hertz[:, :1]) / (2 * length)
    cycles = (start + slope * time) * time  # the integral of the frequency
    angle = (cycles - np.floor(cycles)) * np.float32(2 * np.pi)
    # sin (k + 1) x = 2 cos x sin k x - sin (k - 1) x gives each overtone from the two before it.
    previous, current, two_cos = 0, np.sin(angle), 2 * np.cos(angle)
    total = overtones[:, :1] * current
    for k in range(1, overtones.shape[1]):
        previous, current = current, two_cos * current - previous
        total += overtones[:, k, None] * current
    envelope = np.clip(np.minimum(time, length - time) * 100, 0, 1)  # fades in and out over 10 ms
    level = loudness / np.sqrt(np.square(overtones).sum(axis=1))
    return total * envelope * level[:, None]


def render_waves(scene_ids: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> np.ndarray:
    """Return a sound of each scene, (B, SAMPLES) float32 in -1 .. 1, 8,000 Hz.

    A sound is the tone of an object, a glide, and the tone of the other object. Time runs from left
    to right; of two objects above each other, either comes first. `scene_ids` is (B,), `variants`
    (B,) or one number for all.
    """
    facts, key = facts_of(scene_ids), (seed, SOUND, scene_ids, variants)
    random = uniform(11, *key)
    lower_first = (facts[:, 3] == 1) & (random[:, 0] < 0.5)
    facts = np.where(lower_first[:, None], facts[:, SWAPPED], facts)
    glide = facts[:, 3] + lower_first  # an index of GLIDES
    tempo = interpolate(0.9, 1.1, random[:, 1])
    gap = interpolate(0.04, 0.07, random[:, 2])  # seconds
    waves = interpolate(0.01, 0.06, random[:, 3, None]) * noise(SAMPLES, *key, 1)
    start = interpolate(0.01, 0.1, random[:, 4])  # seconds
    for i, event in enumerate(("object", "glide", "object")):
        loudness = interpolate(0.85, 1.15, random[:, 5 + i])
        detune = interpolate(0.98, 1.02, random[:, 8 + i, None])
        if event == "object":
            shape, colour, size = facts[:, 2 * i : 2 * i + 3].T
            hertz = PITCHES[colour, None].repeat(2, axis=1)
            seconds = SECONDS[size] * tempo
            overtones = OVERTONES[shape]
            loudness = loudness * LOUDNESS[size]
        else:
            hertz = GLIDES[glide]
            seconds = 0.14 * tempo
            overtones = OVERTONES[np.zeros_like(glide)]
            loudness = loudness * 0.2
        tones = render_tones(hertz * detune, seconds, loudness, overtones)
        start_samples = (start * RATE).astype(int)
        for wave, tone, begin in zip(waves, tones, start_samples, strict=True):
            wave[begin : begin + TONE_SAMPLES] += tone
        start = start + seconds + gap
    return np.clip(waves, -1, 1, out=waves)


# ---- batches and the gallery ---------------------------------------------------------------------


class Scenes(Examples):
    """Examples in all three modalities whose ids are scene ids, so `facts_of(ids)` describes them.

    Images are (B, 3, 32, 32), waves (B, 8448), mels (B, 32, 32).
    """


def render(scene_ids: np.ndarray, variants: np.ndarray | int, seed: int = 0) -> Scenes:
    """Return the scenes (B,), rendered in all three modalities.

    A variant, a number from 0 up, is another position, wording and noise of the same scene.
    `variants` is (B,) or one number for all.
    """
    scene_ids = np.asarray(scene_ids, np.int64)
    waves = render_waves(scene_ids, variants, seed)
    return Scenes(
        ids=scene_ids,
        captions=render_captions(scene_ids, variants, seed),
        images=render_images(scene_ids, variants, seed),
        waves=waves,
        mels=normalized_log_mel(waves),
    )


@cache
def split() -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the 16,416 training and 1,824 held-out scenes, the same for every seed."""
    shuffled = random_bits(SCENE_COUNT, SPLIT)[0].argsort(kind="stable")
    shuffled.flags.writeable = False
    return shuffled[SCENE_COUNT // 10 :], shuffled[: SCENE_COUNT // 10]


def family_and_pair(scene_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each scene's family (B,) and of its pair (B,).

    The scenes of a family differ only in their shapes and in which object comes first: they share
    the relation, the colours and the sizes. A pair is a scene and its mirror image: the same two
    objects in the same relation, exchanged.
    """
    facts = facts_of(scene_ids)
    relation = facts[:, 3]
    looks = facts[:, [1, 5]] * len(SIZES) + facts[:, [2, 6]]  # (B, 2) colour and size
    objects = looks * len(SHAPES) + facts[:, [0, 4]]  # (B, 2)
    family = np.sort(looks, axis=1) @ (OBJECT_COUNT, 1) * 2 + relation
    pair = np.sort(objects, axis=1) @ (OBJECT_COUNT, 1) * 2 + relation
    return family, pair


@lru_cache(maxsize=2)
def epoch_order(epoch: int, seed: int, hard: bool) -> np.ndarray:
    """Return the training scene ids in the order of an epoch.

    If `hard`, scenes of one family stand together in groups of about four, each scene with its
    mirror image.
    """
    train, _ = split()
    keys = random_bits(len(train), seed, ORDER, epoch)[0]
    if hard:
        family, pair = family_and_pair(train)
        group = (random_bits(1, seed, ORDER, epoch, 1, pair)[:, 0] % GROUPS).astype(np.int64)
        keys = random_bits(1, seed, ORDER, epoch, 2, family, group)[:, 0]
    return train[keys.argsort(kind="stable")]


def training_scene_ids(step: int, size: int, seed: int = 0, hard: bool = True) -> np.ndarray:
    """Return the scene ids (size,) of a training step, all different.

    Each scene occurs once in an epoch. Raises ValueError for a size that is not 1 to 16,416.
    """
    train, _ = split()
    if not 1 <= size <= len(train):
        raise ValueError(f"a batch has 1 to {len(train):,} scenes, not {size:,}")
    epoch, step_in_epoch = divmod(step, len(train) // size)
    return epoch_order(epoch, seed, hard)[step_in_epoch * size : (step_in_epoch + 1) * size]


def batch(
    step: int, size: int, seed: int = 0, hard: bool = True, rows: slice = slice(None)
) -> Scenes:
    """Return the training scenes of a step, or only these rows of them; never a held-out scene.

    Raises ValueError for a size that is not 1 to 16,416.
    """
    return render(training_scene_ids(step, size, seed, hard)[rows], step, seed)


def gallery(size: int = 512, seed: int = 0) -> Scenes:
    """Return `size` different held-out scenes, the same at every call.

    Raises ValueError if there are fewer.
    """
    _, held_out = split()
    if not 1 <= size <= len(held_out):
        raise ValueError(
            f"{len(held_out):,} scenes are held out: a gallery shows 1 to all of them, not {size:,}"
        )
    return render(held_out[:size], 0, seed)


@cache
def training_text() -> str:
    """Return a caption of each training scene, each on a line of its own."""
    return "\n".join(render_captions(split()[0], 0))


class SceneData:
    """Scenes as an `ExampleDataset` (nanods/data/examples.py)."""

    name, modalities = "scenes", ("text", "image", "audio")

    def __init__(self, hard: bool = True) -> None:
        self.hard = hard
        self.train, self.held_out = split()
        # Hash the captions alone: pixels may round differently on another processor.
        captions = "\n".join(render_captions(self.held_out, 0))
        self.sha256 = hashlib.sha256(captions.encode()).hexdigest()

    def text(self) -> str:
        """Return a caption of each training scene, each on a line of its own."""
        return training_text()

    def batch(self, step: int, size: int, seed: int = 0, rows: slice = slice(None)) -> Scenes:
        """Return the `size` training scenes of a step, or only these rows of them."""
        return batch(step, size, seed, self.hard, rows)

    def gallery(self, size: int) -> Scenes:
        """Return `size` different held-out scenes, the same at every call."""
        return gallery(size)
