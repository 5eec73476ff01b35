"""Chance as a function: random numbers that hang on their key alone, whatever was drawn before, in any process.

Shapes: B keys.
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15


def mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, in place: each bit of the result hangs on each bit given (splitmix64, Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> shift
        x *= factor
    x ^= x >> 31
    return x


def random_bits(count: int, *key: int | np.ndarray) -> np.ndarray:
    """`count` random uint64 for each key, a key being integers from 0 up, or arrays (B,) of them: (B, count).

    A numpy Generator would need one state for each item, and may give other numbers in another version of numpy.
    ValueError for an integer below 0.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        if np.any(np.asarray(part) < 0):
            raise ValueError(
                f"seeds, steps and variants are integers from 0 up, not {np.min(part)}"
            )
        state = mix((state ^ np.asarray(part, np.uint64)) + GOLDEN)
    return mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def uniform(count: int, *key: int | np.ndarray) -> np.ndarray:
    """As random_bits: (B, count) float32 in 0 .. 1, 1 excluded."""
    return (random_bits(count, *key) >> 40).astype(np.float32) * np.float32(2**-24)


def noise(count: int, *key: int | np.ndarray) -> np.ndarray:
    """As random_bits: (B, count) float32, uniform in -1 .. 1, in 256 steps: a byte each. `count` is a multiple of 8."""
    random = random_bits(count // 8, *key).astype("<u8", copy=False).view(np.uint8)
    return random.astype(np.float32) * np.float32(2 / 255) - 1


def between(low, high, chance: np.ndarray) -> np.ndarray:
    """0 .. 1 -> low .. high"""
    return low + (high - low) * chance
