"""Figures about serving show the values that they are called with, and no text covers another."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from nanods import plots_serving
from tests.test_plots import overlaps, words


def bars_of(axes):
    """Return (left, width, vertical middle) of each horizontal bar."""
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in bars]


def test_slots_show_who_is_where_from_the_first_to_the_last_step():
    panels = {"static": [("0", 0, 0, 9), ("1", 1, 0, 2)], "continuous": [("7", 1, 4, 39)]}
    figure = plots_serving.slots_over_time(panels, 3, "step")
    static, continuous = figure.axes
    assert bars_of(static) == [pytest.approx((0, 10, 0)), pytest.approx((0, 3, 1))]
    assert bars_of(continuous) == [pytest.approx((4, 36, 1))]
    assert static.get_title() == "static" and continuous.get_xlabel() == "step"
    assert static.get_xlim() == continuous.get_xlim() == (0, 40)
    assert not overlaps(figure)


def test_steps_have_the_same_axis_for_both_ways():
    figure = plots_serving.step_costs({"whole": [1, 9], "chunks": [2, 3]}, "ms", "step")
    assert [bar.get_height() for axes in figure.axes for bar in axes.patches] == [1, 9, 2, 3]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert not overlaps(figure)


def test_each_request_has_a_line_and_the_limit_is_marked():
    figure = plots_serving.context_lengths({"a": ([1, 2], [5, 6]), "b": ([2], [64])}, 64)
    a, b, limit = figure.axes[0].lines
    assert list(a.get_ydata()) == [5, 6] and list(b.get_xdata()) == [2]
    assert set(limit.get_ydata()) == {64}
    assert not overlaps(figure)


def test_alarms_show_sums_threshold_and_change():
    panels = {"one": (np.array([0.0, 1, 2]), 5.0), "two": (np.array([0.0, 40, 50]), 50.0)}
    figure = plots_serving.alarm_levels(panels, 2, "normal", "another")
    for axes, (title, (sums, threshold)) in zip(figure.axes, panels.items(), strict=True):
        line, horizontal, vertical = axes.lines
        assert (line.get_ydata() == sums).all() and set(horizontal.get_ydata()) == {threshold}
        assert set(vertical.get_xdata()) == {2} and axes.get_title() == title
        assert axes.get_ylim()[1] > threshold


def test_ours_is_the_blue_bar_of_each_group():
    groups = {"text": {"singles": 10, "queues": 40}, "image": {"singles": 20, "queues": 30}}
    figure = plots_serving.grouped_bars(groups, "queues", "inputs per second", "a title")
    axes = figure.axes[0]
    widths = {c.get_label(): [bar.get_width() for bar in c] for c in axes.containers}
    assert widths == {"singles": [10, 20], "queues": [40, 30]}
    colours = {c.get_label(): c[0].get_facecolor() for c in axes.containers}
    assert colours["queues"] != colours["singles"]
    assert "40" in words(figure) and not overlaps(figure)


def test_padding_is_drawn_up_to_the_longest_of_each_batch():
    figure = plots_serving.padded_batches({"in order": [[2, 8], [3]]}, height=6)
    bars = [bar for bar in bars_of(figure.axes[0]) if bar[2] > -50]
    assert [width for _, width, _ in bars] == [8, 8, 2, 8, 3, 3]
    assert not overlaps(figure)


def test_a_placement_that_does_not_fit_has_another_colour():
    table = {"all on cuda": {"cuda": 30e9}, "apart": {"cuda": 1e9, "cpu": 13e9}}
    figure = plots_serving.placements(table, {"cuda": 22e9, "cpu": 256e9}, "a title")
    cuda, cpu = figure.axes
    assert [bar[1] for bar in bars_of(cuda)] == [30, 1]
    assert [bar[1] for bar in bars_of(cpu)] == [0, 13]
    too_large, fits = (patch.get_facecolor() for patch in cuda.patches)
    assert too_large != fits
    assert set(cuda.lines[0].get_xdata()) == {22} and not cpu.lines
    assert not overlaps(figure)
