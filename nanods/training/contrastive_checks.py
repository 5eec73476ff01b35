"""What to know about the captions of a contrastive run before its first step: which are labels,
whether a batch has negatives, and what is cut.

Shapes: B examples of a batch, N training examples, C labels.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from nanods.config import Config
from nanods.contrastive import chance_loss
from nanods.data.caption_forms import Item
from nanods.data.examples import Examples, caption_key, duplicate_ids
from nanods.data.sound import HOP, RATE, WINDOW, samples_of
from nanods.errors import UserError
from nanods.multimodal import MultimodalConfig
from nanods.training.commands import shorten

MAX_LABELS = 200  # distinct captions that are taken for labels: enough for a confusion matrix


def find_labels(train: list[str], held_out: list[str]) -> dict[str, str]:
    """Return the distinct captions, by `caption_key`, if they are labels; otherwise {}.

    They are if there are at most MAX_LABELS, and each is the caption of two training examples or
    more on average.
    """
    labels: dict[str, str] = {}
    for caption in (*train, *held_out):
        labels.setdefault(caption_key(caption), caption)
        if len(labels) > MAX_LABELS:
            return {}
    return dict(sorted(labels.items())) if 2 * len(labels) <= len(train) else {}


# ---- items, captions and held-out examples -------------------------------------------------------


def count_items(items: list[Item]) -> str:
    """Return of how many files the examples are made, in words."""
    images = {item.image for item in items if item.image}
    sounds = {item.audio for item in items if item.audio}
    counts = {"image": len(images), "sound": len(sounds)}
    each = [f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in counts.items() if n]
    return f" in {' and '.join(each)}"


def describe_captions(captions: list[str]) -> str | None:
    """Return how many training captions are distinct, in words; None if there are none."""
    counts = Counter(caption_key(caption) for caption in captions if caption)
    if not counts:
        return None
    (commonest, most), *_ = counts.most_common(1)
    text = f"{len(counts):,} of {sum(counts.values()):,} training captions are distinct"
    if most == 1:
        return text
    return f"{text}; the commonest, {shorten(commonest)!r}, is that of {most:,}"


def describe_standard_error(gallery: Examples, modalities: Sequence[str]) -> str:
    """Return how sure a recall over the held-out examples is, in words: of the pair of modalities
    that the fewest examples have, among those that at least two have.

    The standard error of a share p of n examples is sqrt(p (1 - p) / n).
    """
    number = len(gallery.captions)
    counts = [int(gallery.has(*pair).sum()) for pair in combinations(modalities, 2)]
    fewest = min((count for count in counts if count > 1), default=0)
    gaps = f", of which at least {fewest:,} have both of a pair" if fewest < number else ""
    text = f"{number:,} held-out examples{gaps}"
    if not fewest:
        return text
    half, most = (np.sqrt(p * (1 - p) / fewest) for p in (0.5, 0.9))
    return f"{text}: a recall of 0.5 has a standard error of {half:.3f}, one of 0.9 of {most:.3f}"


# ---- negatives -----------------------------------------------------------------------------------


def check_negatives(config: Config, counts: Counter[str], gallery: Examples) -> list[str]:
    """Return warnings about batches whose examples are all duplicates: their loss is 0, whatever
    the model, so they teach nothing.

    `counts`: the training examples of each distinct caption. Raises UserError if no batch can have
    a negative.
    """
    B, N = config.batch_size, sum(counts.values())
    if B < 2:
        raise UserError(
            f"--batch-size {B}: the loss compares each example with the others of its batch, and "
            "here is none; take as many as fit, at least 2"
        )
    if len(counts) == 1:
        raise UserError(
            f"--data {config.data}: all {N:,} training examples have the caption "
            f"{next(iter(counts))[:60]!r}, so there is nothing to tell apart; add examples with "
            "other captions"
        )
    warnings = []
    share = share_without_negatives(counts, B)
    if share * config.steps >= 0.5:
        warnings.append(
            f"about {share:.2g} of the batches will hold one caption {B} times: without negatives "
            "they teach nothing; choose a larger --batch-size"
        )
    ids = duplicate_ids(gallery)
    if (ids[:, None] == ids).any(axis=-1).all():
        examples = "example" if len(ids) == 1 else "examples of one caption"
        warnings.append(
            f"with {len(ids):,} held-out {examples} there is no wrong answer: val_loss will be 0 "
            "and every recall 1, whatever the model; add data"
        )
    return warnings


def share_without_negatives(counts: Counter[str], B: int) -> float:
    """Return the probability that B examples, drawn without replacement, have one caption."""
    N, drawn = sum(counts.values()), np.arange(B)
    each = [np.prod((count - drawn) / (N - drawn)) for count in counts.values() if count >= B]
    return float(sum(each))


def expected_candidates(counts: Counter[str], B: int) -> float:
    """Return among how many candidates of a batch, the duplicates left out, an example has to find
    its match, on average."""
    N = sum(counts.values())
    duplicates = sum(count * (count - 1) for count in counts.values()) / (N * (N - 1))
    return 1 + (B - 1) * (1 - duplicates)


def mean_candidates(
    others: float, shares: dict[tuple[str, str], float], weights: dict[tuple[str, str], float]
) -> float:
    """Return how many candidates give the chance loss of all pairs of modalities: the weighted mean
    of ln(1 + others * share), where `share` of the examples have both of a pair."""
    chances = [math.log1p(others * share) for share in shares.values()]
    return math.exp(np.average(chances, weights=list(weights.values())))


def check_pairs(others: float, shares: dict[tuple[str, str], float]) -> list[str]:
    """Return warnings about pairs of modalities that so few examples have that a batch of `others`
    beside each holds fewer than one more."""
    return [
        f"{' and '.join(pair)}: an example that has both meets {others * share:.2g} others in a "
        "batch, so it learns little; choose a larger --batch-size"
        for pair, share in shares.items()
        if share < 1 and others * share < 1
    ]


def describe_chance(candidates: float, B: int, has_gaps: bool = False) -> str:
    """Return the loss of an untrained model, in words."""
    rounded = round(candidates)
    if rounded == B:
        return f"{B} examples, where an untrained model's loss is ln {B} = {chance_loss(B):.2f}"
    which = "have both modalities and are" if has_gaps else "are"
    return (
        f"{B} examples, each compared with about {rounded - 1} that {which} not its duplicates: an "
        f"untrained model's loss is about ln {rounded} = {chance_loss(rounded):.2f}"
    )


# ---- what is cut ---------------------------------------------------------------------------------


def cut_captions(captions: list[str], tokenizer, max_tokens: int) -> str | None:
    """Return how many captions are longer than the model reads, in words; None if none is."""
    # A token is at least one byte, so most captions need no encoding.
    long = [text for text in captions if len(text.encode("utf-8", "replace")) > max_tokens]
    lengths = [len(tokenizer.encode(text)) for text in long]
    cut = [length for length in lengths if length > max_tokens]
    if not cut:
        return None
    return (
        f"{len(cut):,} of {len(captions):,} captions after {max_tokens} tokens: "
        f"--context-length {max(cut)} reads the longest to its end"
    )


def cut_sounds(seconds: np.ndarray, total: int, config: MultimodalConfig) -> str | None:
    """Return how many of the sounds are longer than the model hears, in words; None if none is.

    `seconds`: the lengths of some or all of the `total` sounds.
    """
    samples, limit = np.round(seconds * RATE), samples_of(config.frames)
    cut = samples > limit
    if not cut.any():
        return None
    frames = int(np.ceil((samples.max() - WINDOW) / HOP)) + 1
    frames += -frames % config.patch_frames
    looked_at = "" if len(seconds) == total else f" looked at (of {total:,})"
    return (
        f"{cut.sum():,} of {len(seconds):,} sounds{looked_at} after {limit / RATE:.3g} s "
        f"(median {np.median(seconds):.3g} s, longest {seconds.max():.3g} s): --multimodal.frames "
        f"{frames} hears the longest to its end"
    )
