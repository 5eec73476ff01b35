"""Counter-based random numbers: each number is a hash of its key.

A number depends on no state and no earlier draw: the same key gives the same numbers in every
process, in any order. The hash is splitmix64 (Steele, Lea and Flood 2014).

Shapes: B keys.
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 divided by the golden ratio, odd


def mix_bits(x: np.ndarray) -> np.ndarray:
    """Mix uint64 numbers in place (splitmix64). Return them.

    Each bit of the result depends on each bit of the input."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> shift
        x *= factor
    x ^= x >> 31
    return x


def random_bits(count: int, *key: int | np.ndarray) -> np.ndarray:
    """Return `count` random uint64 numbers for each key, shape (B, count).

    The parts of a key are integers >= 0, or arrays (B,) of them. A numpy Generator would need one
    state for each key, and may give other numbers in another version of numpy.

    Raises ValueError for a negative part.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        if np.any(np.asarray(part) < 0):
            raise ValueError(
                f"seeds, steps and variants must be integers from 0 up, not {np.min(part)}"
            )
        state = mix_bits((state ^ np.asarray(part, np.uint64)) + GOLDEN)
    return mix_bits(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def uniform(count: int, *key: int | np.ndarray) -> np.ndarray:
    """Return (B, count) float32 numbers, uniform in [0, 1). Keys as in `random_bits`."""
    return (random_bits(count, *key) >> 40).astype(np.float32) * np.float32(2**-24)


def noise(count: int, *key: int | np.ndarray) -> np.ndarray:
    """Return (B, count) float32 numbers, uniform in -1 .. 1 in 256 steps, one random byte each.

    `count` must be a multiple of 8. Keys as in `random_bits`.
    """
    random = random_bits(count // 8, *key).astype("<u8", copy=False).view(np.uint8)
    return random.astype(np.float32) * np.float32(2 / 255) - 1


def interpolate(low, high, fraction: np.ndarray) -> np.ndarray:
    """Return the number that lies at `fraction` (0 .. 1) of the way from `low` to `high`."""
    return low + (high - low) * fraction
