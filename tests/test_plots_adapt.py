"""Figures about learning without forgetting show the values that they are called with."""

import pytest

from nanods import plots_adapt
from tests.test_plots import overlaps, words


def test_the_frontier_has_a_labelled_point_for_each_run():
    ways = {"replay": {"0": (0.9, 0.4), "10%": (0.88, 0.1)}, "EWC": {"1": (0.5, 0.05)}}
    figure = plots_adapt.frontier(ways, [(0, 0), (0.9, 0.4)], "source", "a title")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["replay"].get_xdata()) == [0.9, 0.88]
    assert list(lines["EWC"].get_ydata()) == [0.05]
    assert list(lines["plain, over its steps"].get_ydata()) == [0, 0.4]
    shown = words(figure)
    assert all(text in shown for text in ("10%", "1", "a title")) and not overlaps(figure)


def test_fisher_information_has_a_panel_for_each_way_and_a_line_for_each_matrix():
    fisher = {
        f"blocks.{layer}.{kind}.weight": layer + x
        for layer in (0, 1)
        for kind, x in (("attention.query", 1.0), ("mlp.up", 2.0))
    }
    fisher |= {"embedding.weight": 5.0, "head.weight": 6.0}
    figure = plots_adapt.fisher_by_layer({"sampled": fisher, "data": fisher}, "a title")
    assert [axes.get_title() for axes in figure.axes] == ["sampled", "data"]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert list(lines["mlp.up"].get_ydata()) == [2.0, 3.0]
    assert list(lines["head"].get_xdata()) == pytest.approx([2])
    assert list(lines["embedding"].get_ydata()) == [5.0]
    assert not overlaps(figure)


def test_ewc_is_better_than_l2_on_both_tasks_of_the_two_valleys():
    figure = plots_adapt.two_valleys((4.0, 0.2), 1.0)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert "EWC: old loss 0.15, new 0.33" in labels and "L2: old loss 0.22, new 0.46" in labels
    assert not overlaps(figure)


def test_learnt_tokens_are_boxes_of_another_colour():
    figure = plots_adapt.masked_tokens(["USER", "?", "ASSISTANT", "4"], [False, False, False, True])
    colours = [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert "ASSISTANT" in words(figure)
