"""Is the validation text of the training text's kind? A bigram model of bytes tells.

The last tenth of a file may be another language, code, or an index. The validation loss then says
little about the training text, and nothing in it shows that. So a bigram model, learned on part of
the training text, codes another part of it and the validation text; a warning gives both lengths
where they are far apart.
"""

import numpy as np

SAMPLE_TOKENS = 1 << 19  # read of each text, in SLICES spread evenly over it
SLICES = 64
LEAST_BYTES = (5000, 500)  # of training and validation text: less is too little to tell
FAR = 1.25
"""Ratio of the two lengths above which a warning is given. The last tenth of pydocs, of Shakespeare
and of Python's library has 0.98 to 1.02, that of a licence 1.14; German or French after English
1.33 to 1.47, English or code after Shakespeare 1.5 and 2.3."""


def describe_difference(data) -> str | None:
    """Return a warning if the validation text of a TextData differs much from its training text."""
    train, val = sample(data, data.train), sample(data, data.val)
    learned, other = train[::2], train[1::2]
    sizes = sum(map(len, train)), sum(map(len, val))
    if sizes[0] < LEAST_BYTES[0] or sizes[1] < LEAST_BYTES[1]:
        return None
    model = bigram_model(b"".join(learned))
    own, across = bits_per_byte(model, other), bits_per_byte(model, val)
    if across <= FAR * own:
        return None
    return (
        f"the validation text is unlike the training text: a bigram model of the training text "
        f"takes {own:.2f} bits per byte for more of it, {across:.2f} for the validation text. "
        "Validation losses say little, unless you mean it so: --val-data FILE gives another text"
    )


def sample(data, tokens) -> list[bytes]:
    """Return bytes from SLICES places of a text, spread evenly over it."""
    size = min(SAMPLE_TOKENS, len(tokens)) // SLICES
    if size < 2:
        return []
    starts = [i * len(tokens) // SLICES for i in range(SLICES)]
    return [data.tokenizer.decode_bytes(tokens[start : start + size]) for start in starts]


def bigram_model(text: bytes) -> np.ndarray:
    """Return the bits that a byte takes after another, (256, 256) for [previous, next].

    The counts are smoothed by those of the next byte alone, and these by one count for each byte.
    """
    values = np.frombuffer(text, np.uint8).astype(np.int64)
    pairs = np.bincount(values[:-1] * 256 + values[1:], minlength=65536).reshape(256, 256)
    singles = (np.bincount(values, minlength=256) + 1) / (len(values) + 256)
    weight = 10.0  # of the single counts, in pairs
    p = (pairs + weight * singles) / (pairs.sum(axis=1, keepdims=True) + weight)
    return -np.log2(p)


def bits_per_byte(model: np.ndarray, slices: list[bytes]) -> float:
    """Return the mean bits of each byte after the one before it, over all slices."""
    values = [np.frombuffer(text, np.uint8) for text in slices]
    bits = [model[each[:-1], each[1:]] for each in values]
    return float(np.concatenate(bits).mean())
