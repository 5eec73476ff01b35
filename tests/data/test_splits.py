"""Splits by name."""

import pytest

from nanods.data.splits import split_of


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train train.txt TRAIN.TXT train2017 train-clean-100 captions_train.csv Training",
        ),
        ("val", "val valid.txt validation-00000-of-00001.parquet dev-clean captions_val2017 Dev"),
        ("test", "test test.txt x_test_2.jsonl test-other"),
        (None, "a.txt contest.txt evaluation.txt developer latest trainer values trainval 1.txt"),
    ],
)
def test_names(split, names):
    for name in names.split():
        assert split_of(name) == split, name
