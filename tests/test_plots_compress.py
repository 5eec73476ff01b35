"""Figures about compressed models show the values that they are called with."""

import numpy as np
import pytest

from nanods import plots_compress as pc
from tests.test_plots import overlaps, words


def test_speed_has_a_panel_for_each_batch_and_a_line_for_each_format():
    panels = {
        "1 row": {"bf16": ([128, 256], [0.5, 0.6]), "INT8": ([128, 256], [1.0, 3.0])},
        "16 rows": {"bf16": ([128, 256], [0.1, 0.2]), "INT8": ([128, 256], [2.0, 4.0])},
    }
    figure = pc.speed_against_width(panels, {"INT8": "INT8 (a kernel)"}, "a title")
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert list(lines["INT8 (a kernel)"].get_ydata()) == [2.0, 4.0]
    assert list(lines["fp32"].get_ydata()) == [1, 1]
    assert "a title" in words(figure)
    assert "times as fast as fp32" in words(figure) and not overlaps(figure)


def test_error_falls_to_the_bottom_where_nothing_is_lost():
    figure = pc.error_against_bits({"a": ([8, 4], [-0.001, 0.5])}, "loss", "title", bound=0.1)
    axes = figure.axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.25, 0.5]
    assert axes.get_xlim()[0] > axes.get_xlim()[1], "fewer bits to the right"
    assert "0.1" in words(figure)


def test_size_and_quality_are_points_with_the_names_of_their_formats():
    points = {"v0": {"fp32": (8.0, 1.9), "int8": (2.0, 1.91)}}
    figure = pc.size_against_quality(points, "loss", "title")
    lines = figure.axes[0].lines
    marks = [line for line in lines if line.get_marker() != "None" and len(line.get_xdata())]
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks]
    assert drawn == [(8.0, 1.9), (2.0, 1.91)]
    assert "fp32" in words(figure) and "int8" in words(figure)


def test_histograms_say_how_many_integers_are_left_and_how_many_are_0():
    values = {"weights": np.linspace(-1, 1, 100), "activations": np.linspace(-2, 2, 100)}
    three = np.array([-1, 0, 0, 1])
    panels = {"weights": {"2 bits": three, "3 bits": three}, "activations": {"8 bits": three}}
    figure = pc.rounding_histograms(values, panels)
    assert "2 bits\n3 integers, 50% of all are 0" in figure.axes[1].get_title()
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == pytest.approx([0.25, 0.5, 0.25])
    assert not figure.axes[-1].get_visible(), "a row with fewer panels ends earlier"


def test_number_lines_join_each_number_to_its_nearest_tick():
    grids = {"coarse": np.array([-1.0, 0.0, 1.0]), "fine": np.linspace(-2, 2, 9)}
    figure = pc.number_lines(grids, "a title", np.array([0.8, -0.2]), limit=1.5)
    lines = figure.axes[0].lines
    joins = [line.get_xdata() for line in lines if line.get_color() == pc.ORANGE]
    assert [list(join) for join in joins[:2]] == [[0.8, 1.0], [-0.2, 0.0]]
    ticks = [line.get_xdata() for line in lines if line.get_marker() == "|"]
    assert list(ticks[1]) == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]
    assert "coarse" in words(figure)
