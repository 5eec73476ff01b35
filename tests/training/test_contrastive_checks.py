"""What a contrastive run says before its first step: batches without negatives, labels, cuts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from nanods.config import PRESETS
from nanods.data.caption_dataset import CaptionDataset
from nanods.data.caption_forms import item_of
from nanods.data.captions import CaptionFolder
from nanods.data.examples import Examples, duplicate_ids
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.training.contrastive_checks import (
    check_negatives,
    cut_captions,
    cut_sounds,
    describe_chance,
    expected_candidates,
    find_labels,
    share_without_negatives,
)

CONFIG = replace(PRESETS["v3-tiny"], data="mine", batch_size=4, steps=10)


def gallery_of(*captions):
    return Examples(np.arange(len(captions)), list(captions))


TWO = gallery_of("a", "b")


def test_ids_are_those_of_the_file_and_of_the_caption():
    ids = duplicate_ids(gallery_of("Seven", " seven\t", "se ven", "se  VEN ", "STRASSE", "straße"))
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4, 5] and ids.dtype == np.int64
    assert ids[0, 1] == ids[1, 1] != ids[2, 1] == ids[3, 1] and ids[4, 1] == ids[5, 1]
    # A hash, which every process computes alike.
    assert duplicate_ids(gallery_of("seven"))[0, 1] == ids[0, 1]
    assert duplicate_ids(gallery_of("\udce9")).shape == (1, 2), "also what UTF-8 cannot encode"


def test_repeated_captions_are_labels_if_they_are_few():
    train = [word for word in ("Cat", "dog", "bird") for _ in range(5)]
    assert find_labels([*train, "cat "], ["fish"]) == {
        "bird": "bird",
        "cat": "Cat",
        "dog": "dog",
        "fish": "fish",
    }
    assert find_labels([f"caption {i}" for i in range(50)], []) == {}, "each occurs once"
    assert find_labels([f"caption {i % 201}" for i in range(1000)], []) == {}, "too many"
    assert len(find_labels([f"caption {i % 200}" for i in range(1000)], [])) == 200


@pytest.mark.parametrize(
    ("batch_size", "captions", "message"),
    [
        (1, ["a", "b"] * 9, "--batch-size 1: .* at least 2"),
        (4, ["only one"] * 9, "all 9 training examples have the caption 'only one'"),
        (4, ["x" * 5000] * 9, "'x{60}'"),
    ],
)
def test_no_batch_can_have_negatives(batch_size, captions, message):
    with pytest.raises(UserError, match=message):
        check_negatives(replace(CONFIG, batch_size=batch_size), Counter(captions), TWO)


def test_some_batches_will_have_no_negatives():
    pairs = replace(CONFIG, batch_size=2)
    (warning,) = check_negatives(pairs, Counter("a" * 10 + "b" * 10), TWO)
    assert warning.startswith("about 0.47 of the batches will hold one caption 2 times")
    assert check_negatives(CONFIG, Counter("abcdefghij" * 20), TWO) == []
    assert check_negatives(CONFIG, Counter("a" * 3 + "bcd"), TWO) == [], "there are not 4 a"


def test_the_share_of_batches_without_negatives_equals_a_count():
    labels = np.repeat([0, 1, 2], (6, 3, 2))
    random = np.random.default_rng(0)
    drawn = np.stack([random.permutation(labels)[:3] for _ in range(4000)])
    counted = (drawn == drawn[:, :1]).all(axis=1).mean()
    share = share_without_negatives(Counter(labels.tolist()), 3)
    assert share == pytest.approx(21 / 165) and share == pytest.approx(counted, abs=0.02)


@pytest.mark.parametrize("captions", [["a"], ["a", "A "]])
def test_held_out_examples_without_a_wrong_answer(captions):
    (warning,) = check_negatives(CONFIG, Counter("abcd"), gallery_of(*captions))
    assert "there is no wrong answer: val_loss will be 0 and every recall 1" in warning


def test_chance_counts_the_candidates_that_are_not_duplicates():
    assert expected_candidates(Counter("abcdefgh"), 8) == 8
    counts = Counter("abcdefghij" * 300)
    assert expected_candidates(counts, 128) == pytest.approx(1 + 127 * 0.9, abs=0.1)
    assert describe_chance(128, 128) == (
        "128 examples, where an untrained model's loss is ln 128 = 4.85"
    )
    text = describe_chance(115.3, 128)
    assert "about 114 that are not its duplicates" in text and "about ln 115 = 4.74" in text
    text = describe_chance(1.3, 128, has_gaps=True)
    assert "about 0 that have both modalities and are not its duplicates" in text
    assert "about ln 1 = 0.00" in text


@pytest.mark.parametrize("counts", [[20] * 10, [100, 50, *[10] * 5]])
def test_the_batches_of_an_epoch_mix_the_labels(counts, tmp_path):
    """Files named by their label, as in a folder per word: no batch is made of duplicates."""
    rows = [
        (item_of(tmp_path / f"{word}_{i}.wav"), f"word {word}")
        for word, count in enumerate(counts)
        for i in range(count)
    ]
    data = CaptionDataset(
        "mine", CaptionFolder(("text", "audio"), rows, rows[:1], notes=[]), 32, 32
    )
    expected = expected_candidates(Counter(caption for _, caption in rows), 20)
    candidates = []
    for step in range(30):
        taken = [data.train[i] for i in data._order(step, 20, 0)[:20]]
        ids, captions = zip(*taken, strict=True)
        ids = duplicate_ids(Examples(np.array(ids), list(captions)))
        candidates.append(21 - (ids[:, None] == ids).any(axis=-1).sum(axis=1).mean())
    assert np.mean(candidates) == pytest.approx(expected, abs=1)
    assert min(candidates) > expected - 5


# ---- what is cut ---------------------------------------------------------------------------------


def test_captions_that_are_cut_are_counted_in_tokens():
    captions = ["short", "é" * 5, "exactly 10", "eleven byte", "x" * 40]
    text = cut_captions(captions, ByteTokenizer(), 10)
    assert text == (
        "2 of 5 captions after 10 tokens: --context-length 40 reads the longest to its end"
    )
    assert cut_captions(captions[:3], ByteTokenizer(), 10) is None


def test_sounds_that_are_cut_are_counted_by_their_length():
    config = CONFIG.multimodal
    heard = 8448 / 8000
    assert cut_sounds(np.array([heard, 0.2]), 2, config) is None
    text = cut_sounds(np.array([0.5, 3.0, heard + 0.001, 1.0]), 4, config)
    assert text == (
        "2 of 4 sounds after 1.06 s (median 1.03 s, longest 3 s): "
        "--multimodal.frames 94 hears the longest to its end"
    )
    enough = replace(config, frames=94)
    assert cut_sounds(np.array([0.5, 3.0]), 2, enough) is None
    assert cut_sounds(np.array([0.5, 3.0]), 2, replace(config, frames=92)) is not None
    assert "1 of 1 sounds looked at (of 9,000)" in cut_sounds(np.array([3.0]), 9000, config)
    assert cut_sounds(np.array([]), 3, config) is None, "all are damaged"
