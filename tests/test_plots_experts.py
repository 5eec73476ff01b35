import numpy as np
import pytest
from matplotlib.colors import to_hex

from nanods import plots_experts
from nanods.plots import ORANGE


@pytest.mark.parametrize("n_flips", [0, 1, 2])
def test_the_diagram_of_capacity_frames_what_the_future_changes(n_flips):
    experts, kept = np.zeros((4, 2), dtype=int), np.ones((4, 2), dtype=bool)
    other = kept.copy()
    other[:n_flips, 1] = False
    other[3] = False  # belongs to the future itself
    row = [("a", experts, kept), ("b", experts, other)]
    figure = plots_experts.capacity_diagram([row], changed=3, title="")
    for axes in figure.axes:
        edges = [to_hex(patch.get_edgecolor()) for patch in axes.patches]
        assert edges.count(ORANGE) == n_flips


def test_each_assignment_is_drawn_in_the_colour_of_its_expert():
    experts = np.array([[2, 0], [0, 3], [1, 0]])
    figure = plots_experts.dispatch_diagram(experts, n_expert=4)
    colours = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    for e, count in enumerate(np.bincount(experts.flatten())):
        in_both_rows = 2 * count  # in token order, and sorted
        assert colours.count(plots_experts.EXPERT_COLOURS[e]) == in_both_rows
