"""Figures about sparse attention show what the functions of nanods/attention*.py do."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from nanods import plots_attention
from nanods.plots import BLUE, ORANGE
from tests.test_plots import overlaps, pictures, words


def count(picture, colour):
    return int(np.isclose(picture, to_rgb(colour)).all(axis=-1).sum())


def test_the_ladder_counts_scores_and_shows_what_is_read():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, 4)
    figure = plots_attention.ladder(q, k, top_k=2, block_size=2, top_blocks=1)
    dense, best, by_query, by_tile = pictures(figure)
    assert count(dense, BLUE) == 36 and count(best, BLUE) == 15
    # A block of one's own costs 1 or 2 scores, the selected block 2; summaries: 1 to 3 a query.
    assert count(by_query, BLUE) == count(by_tile, BLUE) == 4 * 3 + 6 * 2
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split()[-2] for title in titles] == ["36", "36", str(24 + 12), str(24 + 6)]
    assert not overlaps(figure)


def test_changes_before_the_token_are_leaks():
    rows = {"a": [False, True, True, True], "b": [False, False, True, False]}
    figure = plots_attention.changes(rows, 2, "a title")
    (picture,) = pictures(figure)
    assert count(picture[0], ORANGE) == 1 and count(picture[0], BLUE) == 2
    assert count(picture[1], ORANGE) == 0 and count(picture[1], BLUE) == 1
    assert "a title" in words(figure) and not overlaps(figure)


def test_a_tree_search_shows_the_best_the_scored_and_the_current_nodes():
    figure = plots_attention.tree_search([4, 2], [[0, 1, 2], [0]], [[1], [0]], 3, 2, "a title")
    colours = [to_rgb(box.get_facecolor()) for box in figure.axes[0].patches]
    pale, blue, orange = map(to_rgb, (plots_attention.PALE_ORANGE, BLUE, ORANGE))
    assert colours == [pale, blue, pale, orange, blue, orange]
    assert not overlaps(figure)


def test_the_crossover_is_where_the_ratio_reaches_one():
    assert plots_attention.crossover({"512": 0.5, "2048": 2.0}) == pytest.approx(1024)
    ratios = {"tile": {"512": 0.5, "2048": 2.0}, "flat": {"512": 0.25, "2048": 1.0}}
    figure = plots_attention.times_faster(ratios, {"tile": "per tile", "flat": "per query"})
    assert "from about 1,000 and 2,000 tokens on" in words(figure)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["per query"].get_ydata()) == [0.25, 1.0]
    assert not overlaps(figure)


def test_memory_is_in_kib_per_token():
    bytes_per_token = {"dense": {"4096": 2048.0, "8192": 2048.0}, "other": {"4096": 1.0}}
    figure = plots_attention.memory(bytes_per_token, {"dense": "fused"})
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["fused"] and list(lines["fused"].get_ydata()) == [2, 2]


def test_maps_have_no_overlapping_words():
    blocks = np.array([[-1], [0], [0], [1]])
    report = {"blocks": blocks, "tokens": 8, "block_size": 2, "layer": 1, "head": 0}
    report["weight_read"] = np.full((2, 2), 0.5)
    assert not overlaps(plots_attention.selections({"a": blocks, "b": blocks}, 8, 2))
    figure = plots_attention.heads(report, "a title")
    assert "layer 1, head 0" in words(figure) and not overlaps(figure)
