"""Splits by name: which of train, val and test a file or folder says it is."""

import re

SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "val",
    "validation": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" if a word of a file's or folder's name says so, else None.

    A word is a run of letters: captions_val2017.json and dev-clean/ are "val", evaluation.txt and
    contest.txt say nothing.
    """
    for word in re.findall(r"[^\W\d_]+", name.lower()):
        if word in SPLITS:
            return SPLITS[word]
    return None
