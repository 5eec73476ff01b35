"""The warning for validation text that is unlike the training text."""

import random
from pathlib import Path

import pytest

from nanods.data.statistics import describe_difference
from nanods.data.text import TextData
from nanods.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]
PROSE = "".join((ROOT / name).read_text() for name in ("README.md", "LOG.md", "lessons/ARTICLE.md"))
GERMAN = (
    "Der Mensch ist frei geboren, und überall liegt er in Ketten. Einer hält sich für den Herrn "
    "der anderen und bleibt doch mehr Sklave als sie. Wie ist dieser Wandel zustande gekommen? Ich "
    "weiß es nicht. Was kann ihm Rechtmäßigkeit verleihen? Diese Frage glaube ich zu lösen. "
)


def difference(train, val):
    tokenizer = ByteTokenizer()
    train, val = tokenizer.encode(train), tokenizer.encode(val)
    return describe_difference(TextData("x", "", train, val, tokenizer, len(val)))


@pytest.mark.parametrize("seed", range(5))
def test_random_parts_of_one_text_are_alike(seed):
    words = PROSE.split(" ")
    random.Random(seed).shuffle(words)
    cut = len(words) * 9 // 10
    assert difference(" ".join(words[:cut]), " ".join(words[cut:])) is None


@pytest.mark.parametrize("other", [GERMAN * 4, "".join("ACGT"[i * i % 7 % 4] for i in range(999))])
def test_another_language_is_warned_of(other):
    assert "unlike the training text: a bigram model" in difference(PROSE, other)


def test_a_text_too_short_to_tell_is_not_warned_of():
    assert difference("English text.\n" * 20, GERMAN) is None
    assert difference(PROSE, GERMAN[:200]) is None and difference(PROSE, "") is None
