"""The sparsity report, where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanods.attention import AttentionConfig
from nanods.training.inspection import best_blocks_found, sparsity_report
from tests.test_gpt import DENSE, model_of, tokens_of


@pytest.mark.parametrize("method", ["flat", "tile"])
def test_selecting_all_blocks_misses_nothing(method):
    model = model_of(
        replace(
            DENSE, attention=AttentionConfig("block", block_size=4, top_blocks=6, method=method)
        )
    )
    report = sparsity_report(model, tokens_of(1, 24)[0])
    for name in ("keys_read", "weight_read", "best_found"):
        assert report[name].shape == (2, 2)
        assert np.allclose(report[name], 1)
    assert report["tokens"] == 24 and report["blocks"].shape == (24 if method == "flat" else 6, 6)


def test_selecting_few_blocks_misses_some():
    model = model_of(
        replace(
            DENSE, attention=AttentionConfig("block", block_size=4, top_blocks=1, method="window")
        )
    )
    report = sparsity_report(model, tokens_of(1, 24)[0])
    pairs = sum(t % 4 + 1 + 4 * (t >= 4) for t in range(24))
    assert np.allclose(report["keys_read"], pairs / (24 * 25 / 2))
    assert (report["weight_read"] < 1).all() and (report["best_found"] < 1).all()
    assert report["weight_read"][report["layer"], report["head"]] == report["weight_read"].min()


def test_best_blocks_found_counts_the_heaviest_past_blocks():
    weights, read = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    weights[..., 0:2], weights[..., 2:4], weights[..., 4:6] = (
        0.3,
        0.1,
        0.05,
    )  # blocks of 2: the first is heaviest
    read[:, :, :6, 0] = True  # queries 4 and 5 read it, 6 and 7 another
    read[:, :, 6:, 2] = True
    assert best_blocks_found(weights, read, block_size=2, top_blocks=1).item() == 0.5
