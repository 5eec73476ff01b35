"""The attention bench: its fits, the functions that it compares and the keys that it generates."""

import pytest
import torch

from nanods.bench.attention import BASELINES, keys_in_topics, random_inputs
from nanods.bench.runs import add_exponents
from nanods.plots import fitted_exponent


def test_the_fitted_exponent_of_a_square_is_two():
    assert fitted_exponent([10, 20, 40], [100.0, 400.0, 1600.0]) == pytest.approx(2)
    table = add_exponents({"a": {"1": 9.0, "10": 10.0, "100": 1000.0}}, beyond=10)
    assert table["exponents"]["a"] == pytest.approx(2)


def test_the_baselines_agree_where_sparse_attention_selects_every_block():
    qkv, _ = random_inputs(9 * 64, heads=1)  # 9 blocks: 8 selected and the current one are all
    dense = BASELINES["dense"](*qkv)
    for name, attend in BASELINES.items():
        assert (attend(*qkv) - dense).abs().max() < 1e-5, name


def test_queries_look_for_topics_that_have_already_occurred():
    torch.manual_seed(0)
    q, k = keys_in_topics(1000, 100, noise=0.0)
    # (query, key): whether both have the same topic
    same_topic = (q @ k.mT).isclose(q.square().sum(-1, keepdim=True), rtol=1e-4)
    first = same_topic.int().argmax(dim=-1)
    assert same_topic.any(dim=-1).all() and (first <= torch.arange(1000)).all()
