"""Notice that traffic changes: a cumulative sum (CUSUM) against a fixed reference.

Each request has a score, such as its prompt's bits per byte. A model that reads a language which it
has not learnt needs more bits, so the scores rise. Scores of one request say little: they vary, and
now and then one is extreme. Sums of many say more (Page 1954, "Continuous inspection schemes"):

    z_t = (score_t - mean) / deviation           of the reference, a day or more of normal traffic
    up_t = max(0, up_(t-1) + z_t - allowance)     rises while scores are too high
    down_t = max(0, down_(t-1) - z_t - allowance) rises while they are too low
    alarm: either exceeds the threshold

Textbooks choose allowance 0.5 and threshold 4 or 5 for independent, normal scores. Traffic is not
like that. A client sends several prompts that resemble each other, and night differs from day: then
sums rise far without any change. So the threshold comes from the reference itself, by a block
bootstrap (Kunsch 1989): blocks of it, drawn at random and joined, are traffic of the same kind, as
much of it as we like. The threshold is the highest sum in `run_length` requests of it.

    cumulative_sums    the equations above, for many streams at once
    join_blocks        the bootstrap
    calibrate          the threshold, and the allowance with the shortest expected delay
    Cusum              the same sums, one request at a time

Left out on purpose: a reference that follows the traffic (it would follow a slow drift, too), and
weekdays: a reference of a day does not know that Sundays differ.

Pinned by tests/serving/test_drift.py. nanods/bench/serve_alarms.py compares other detectors.

Shapes: R scores of the reference, S streams of N scores, M width of embeddings.
"""

import math
from dataclasses import dataclass

import numpy as np

LIMIT = 8.0  # z is cut here, so that two requests alone never raise an alarm: see `calibrate`
ALLOWANCES = (0.5, 0.75, 1.0)
STREAM = 10_000  # simulated requests in a row; `run_length` takes run_length / STREAM streams


def cumulative_sums(z: np.ndarray, allowance: float) -> np.ndarray:
    """Return the sums after each score, max(0, sum + z - allowance): (..., N) -> (..., N).

    The sum restarts at 0 where the sum without a floor has its minimum, so it is the difference
    between that sum and its smallest value so far.
    """
    free = np.cumsum(z - z.dtype.type(allowance), axis=-1)
    return free - np.minimum(np.minimum.accumulate(free, axis=-1), 0)


def join_blocks(
    scores: np.ndarray, block: int, streams: int, random: np.random.Generator
) -> np.ndarray:
    """Return streams (S, STREAM) of blocks of `block` scores in a row, each from a random place.

    scores (R,); its end is followed by its start, so that every score is equally likely.
    """
    block = min(block, STREAM)
    starts = random.integers(0, len(scores), (streams, -(-STREAM // block), 1))
    places = (starts + np.arange(block)) % len(scores)  # (S, blocks, block)
    return scores[places].reshape(streams, -1)[:, :STREAM]


def standardise(scores: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    """Return the z of scores, within LIMIT. A score that is not a number counts as too high."""
    return np.nan_to_num((scores - mean) / deviation, nan=LIMIT).clip(-LIMIT, LIMIT)


@dataclass(frozen=True)
class Reference:
    """Normal traffic, as far as the alarm needs to know it."""

    mean: float
    deviation: float
    allowance: float
    threshold: float

    def __post_init__(self) -> None:
        """Raise ValueError for numbers with which nothing can be compared."""
        finite = all(map(math.isfinite, (self.mean, self.allowance)))
        if not finite or not 0 < self.deviation < math.inf or not 0 < self.threshold < math.inf:
            raise ValueError(f"{self} needs a finite mean, and deviation and threshold above 0")


def calibrate(
    scores: np.ndarray, run_length: int = 200_000, shift: float = 1.25, seed: int = 0
) -> Reference:
    """Return the reference with scores (R,), in the order of their requests.

    `run_length`: requests without a change among which one false alarm is acceptable. `shift`: the
    change of the mean, in deviations, that is to be noticed soonest. 1.25 is that of one request in
    five, if these score 6.25 deviations higher.

    The right length of a block depends on how long neighbouring scores resemble each other. Blocks
    that are too short lose that, and blocks that are too long repeat the reference. So several
    lengths are tried, and the highest threshold is taken; it is at least 2 LIMIT. This takes
    about half a second.

    Raises ValueError for fewer than 100 scores, and for scores that are not finite.
    """
    scores = np.asarray(scores, np.float64)
    R = len(scores)
    if R < 100 or not np.isfinite(scores).all():
        raise ValueError(f"a reference has at least 100 finite scores, and here are {R}")
    mean = float(scores.mean())
    deviation = max(float(scores.std()), 1e-6 * max(1, abs(mean)))  # all scores may be equal
    z = standardise(scores, mean, deviation).astype(np.float32)
    random = np.random.default_rng(seed)
    highest = dict.fromkeys(ALLOWANCES, 2 * LIMIT)
    for block in sorted({min(R // 2, length) for length in (10, 100, 1000, R)}):
        streams = join_blocks(z, block, -(-run_length // STREAM), random)
        for allowance in ALLOWANCES:
            up, down = cumulative_sums(streams, allowance), cumulative_sums(-streams, allowance)
            highest[allowance] = max(highest[allowance], float(up.max()), float(down.max()))
    # After a change by `shift`, the sum rises by shift - allowance with each request.
    allowance = max(ALLOWANCES, key=lambda a: (shift - a) / highest[a])
    return Reference(mean, deviation, allowance, highest[allowance])


class Cusum:
    """Compare scores with a reference, one at a time."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.up = self.down = 0.0
        self.is_firing = False

    @property
    def level(self) -> float:
        """The higher sum as a share of the threshold: 0 to 1, where it fires."""
        return max(self.up, self.down) / self.reference.threshold

    def update(self, score: float) -> bool:
        """Add a score and return whether the alarm fires.

        The sums stop at the threshold, so that they fall soon when the traffic is as before. The
        alarm ends at half of the threshold: it does not flicker.
        """
        reference = self.reference
        z = (score - reference.mean) / reference.deviation
        z = LIMIT if math.isnan(z) else max(-LIMIT, min(LIMIT, z))  # as `standardise` does
        self.up = min(max(0.0, self.up + z - reference.allowance), reference.threshold)
        self.down = min(max(0.0, self.down - z - reference.allowance), reference.threshold)
        self.is_firing = self.level >= (0.5 if self.is_firing else 1.0)
        return self.is_firing
