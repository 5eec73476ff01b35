"""Figures about the trunk show the values that they are called with."""

import numpy as np
import pytest

from nanods import plots_gpt
from tests.test_plots import overlaps


def heights(axes):
    """Return the y values of each line, by its label."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_vectors_are_drawn_before_and_after_with_the_circle_they_end_on():
    before = np.array([[3.0, 4.0], [0.0, 1.0]])
    after = before * 2**0.5 / np.linalg.norm(before, axis=1, keepdims=True)
    left, right = plots_gpt.normalised_vectors(before, after).axes
    ends = [[line.get_xdata()[-1], line.get_ydata()[-1]] for line in left.lines[1::2]]
    assert ends == before.tolist()
    circle = right.lines[-1]
    radii = np.hypot(circle.get_xdata(), circle.get_ydata())
    assert radii == pytest.approx(2**0.5)
    assert left.get_xlim() == right.get_xlim()


def test_rotations_show_each_pair_and_each_key():
    cosines, scores = np.cos(np.arange(64)).tolist(), np.arange(64).tolist()
    figure = plots_gpt.rotations({"pair 0": cosines}, {"key at 0": scores}, "a title")
    left, right = figure.axes
    assert heights(left) == {"pair 0": cosines} and heights(right) == {"key at 0": scores}
    assert right.get_title() == "a title"


def test_scores_are_drawn_with_their_bound():
    figure = plots_gpt.scores_against_scale([1, 2], {"without": [1, 4], "with": [3, 3]}, 5.0)
    without, with_norm, bound = figure.axes[0].lines
    assert list(without.get_ydata()) == [1, 4] and list(with_norm.get_ydata()) == [3, 3]
    assert set(bound.get_ydata()) == {5.0}
    assert not overlaps(figure)


def test_activations_show_values_and_slopes():
    curves = {name: (np.array([i, 1]), np.array([i, 2])) for i, name in enumerate("abc")}
    values, slopes = plots_gpt.activations([0, 1], curves).axes
    assert heights(values) == {"a": [0, 1], "b": [1, 1], "c": [2, 1]}
    assert heights(slopes) == {"a": [0, 2], "b": [1, 2], "c": [2, 2]}


def test_muon_shows_one_three_and_five_steps_and_the_values_of_a_gradient():
    before, after = np.geomspace(8, 0.01, 64), np.linspace(1.2, 0.7, 64)
    figure = plots_gpt.newton_schulz(lambda s: s / 2, before, after)
    left, right = figure.axes
    ends = [line.get_ydata()[-1] for line in left.lines[:3]]
    assert ends == [1 / 2, 1 / 8, 1 / 32]
    gradient, update = heights(right).values()
    assert gradient == (before / 8).tolist() and update == after.tolist()


def test_the_stream_has_a_point_for_the_embedding_and_each_block():
    figure = plots_gpt.stream([4.0, 3.0, 2.0], [1.0, 2.0, 3.0], chance=8)
    left, right = figure.axes
    assert list(left.lines[0].get_ydata()) == [4, 3, 2] and set(left.lines[1].get_ydata()) == {8}
    assert list(right.lines[0].get_ydata()) == [1, 2, 3] and list(right.get_xticks()) == [0, 1, 2]
    assert not overlaps(figure)
