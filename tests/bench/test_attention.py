"""The bench's own arithmetic: what it fits, what it compares, and the keys that it makes."""

import pytest
import torch

from nanods.bench.attention import BASELINES, inputs, keys_in_topics
from nanods.bench.runs import add_exponents
from nanods.plots import fitted_exponent


def test_the_exponent_of_a_square_is_two():
    assert fitted_exponent([10, 20, 40], [100.0, 400.0, 1600.0]) == pytest.approx(2)
    table = add_exponents({"a": {"1": 9.0, "10": 10.0, "100": 1000.0}}, beyond=10)
    assert table["exponents"]["a"] == pytest.approx(2)


def test_the_rivals_do_the_same_work_where_the_sparse_ones_read_everything():
    qkv, _ = inputs(9 * 64, heads=1)  # 9 blocks: 8 chosen and the own are all
    dense = BASELINES["dense"](*qkv)
    for name, attend in BASELINES.items():
        assert (attend(*qkv) - dense).abs().max() < 1e-5, name


def test_topics_are_asked_for_after_they_were_heard():
    torch.manual_seed(0)
    q, k = keys_in_topics(1000, 100, noise=0.0)
    normalized_log_mel = (q @ k.mT).isclose(
        q.square().sum(-1, keepdim=True), rtol=1e-4
    )  # (query, key): of the same topic
    first = normalized_log_mel.int().argmax(dim=-1)
    assert normalized_log_mel.any(dim=-1).all() and (first <= torch.arange(1000)).all()
