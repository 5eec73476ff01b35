"""Figures about many devices show the values they are called with: parts, totals, what fits."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from nanods import plots_scaling as ps
from nanods.plots import ORANGE
from tests.test_plots import overlaps, pictures, words

MEMORY = {
    "dp": {"weights": 30.0, "gradients": 20.0, "muon": 0.0},
    "fsdp": {"weights": 3.0, "gradients": 2.0, "muon": 5.0},
}


def bar_lengths(axes):
    """Return the lengths of each bar's parts, from left to right, by the bar's position."""
    lengths = {}
    for bar in sorted(axes.patches, key=lambda bar: bar.get_x()):
        position = round(bar.get_y() + bar.get_height() / 2)
        lengths.setdefault(position, []).append(bar.get_width())
    return lengths


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---- stacked bars --------------------------------------------------------------------------------


def test_memory_bars_are_as_long_as_their_parts_and_show_the_total():
    figure = ps.memory_bars(MEMORY, capacity=40)
    assert bar_lengths(figure.axes[0]) == {0: [30, 20], 1: [3, 2, 5]}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["dp", "fsdp"]
    assert "50 GB" in words(figure) and "10 GB" in words(figure)
    assert "capacity, 40" in words(figure)
    assert legend(figure) == ["weights", "gradients", "muon"]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [40]
    assert not overlaps(figure)


def test_a_bar_beyond_max_shown_is_cut_and_marked():
    figure = ps.memory_bars(MEMORY, capacity=20, max_shown=35)
    assert bar_lengths(figure.axes[0])[0] == [30, 5]
    assert "\u2192 50 GB" in words(figure) and "\u2192 10 GB" not in words(figure)
    assert figure.axes[0].get_xlim()[1] > 35


def test_a_part_of_size_zero_is_not_in_the_legend():
    rows = {name: parts | {"muon": 0.0} for name, parts in MEMORY.items()}
    assert legend(ps.memory_bars(rows, capacity=40)) == ["weights", "gradients"]


def test_step_bars_split_a_step_and_show_hidden_communication():
    rows = {
        "one": {"computing": 3.0, "optimizer": 1.0},
        "two": {"computing": 2.0, "waiting": 0.5, "communication": 1.5},
    }
    figure = ps.step_bars(rows, {"one": 0.0, "two": 1.25})
    assert bar_lengths(figure.axes[0]) == {0: [3, 1], 1: [2, 0.5, 1.5]}
    assert "4 s, 75% computing" in words(figure) and "4 s, 50% computing" in words(figure)
    assert legend(figure) == ["computing", "waiting", "communication", "optimizer"]
    (hidden,) = figure.axes[0].lines
    assert list(hidden.get_xdata()) == [0, 1.25] and to_hex(hidden.get_color()) == ORANGE
    assert "up to 1.25 s" in words(figure)
    assert "thin line" not in words(ps.step_bars(rows))
    assert not overlaps(figure)


# ---- scaling with the number of GPUs -------------------------------------------------------------


def test_gpu_scaling_lines_are_the_data_and_points_that_do_not_fit_are_hollow():
    lines = {
        "dp": [(8, 100.0, 90.0, False), (16, 50.0, 90.0, False)],
        "fsdp": [(8, 110.0, 80.0, False), (16, 60.0, 40.0, True)],
    }
    figure = ps.gpu_scaling(lines, capacity=72, workload="1B tokens")
    hours_axes, gpu_hours_axes, memory_axes = figure.axes
    hours = [
        list(line.get_ydata())
        for line in hours_axes.lines
        if line.get_linestyle() == "-" and line.get_marker() == "None"
    ]
    assert hours == [[100, 50], [110, 60]]
    gpu_hours = [
        list(line.get_ydata()) for line in gpu_hours_axes.lines if line.get_marker() == "None"
    ]
    assert gpu_hours == [[800, 800], [880, 960]] and gpu_hours_axes.get_ylim()[0] == 0
    dots = [line for line in memory_axes.lines if line.get_marker() == "o"]
    solid = [list(line.get_ydata()) for line in dots if line.get_markerfacecolor() != "white"]
    hollow = [list(line.get_ydata()) for line in dots if line.get_markerfacecolor() == "white"]
    assert solid == [[], [40]] and hollow == [[90, 90], [80]]
    dashed = [line for line in memory_axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [72]
    assert legend(figure) == ["dp", "fsdp", "hollow: does not fit"]
    assert "hours for 1B tokens" in words(figure)


# ---- ring all-reduce -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_ring_steps_show_each_state_and_frame_what_changed(steps):
    states = [np.ones((3, 3))]
    for step in range(1, steps):
        states.append(states[-1].copy())
        states[-1][step % 3, 1] += 1
    figure = ps.ring_steps(states, [f"step {i}" for i in range(steps)])
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == steps and (np.array(pictures(figure)) == states).all()
    for i, axes in enumerate(shown):
        frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        cells = [(round(frame.get_y() + 0.46), round(frame.get_x() + 0.46)) for frame in frames]
        assert axes.get_title() == f"step {i}"
        assert cells == ([(i % 3, 1)] if i > 0 else [])
        counts = [f"{count:.0f}" for count in states[i].flat]
        assert [text.get_text() for text in axes.texts] == counts


# ---- load imbalance ------------------------------------------------------------------------------


def test_busy_heatmap_shows_each_device_and_the_mean():
    shares = {"even": np.full((4, 8), 0.9), "uneven": np.tile(np.linspace(0.1, 1, 8), (4, 1))}
    figure = ps.busy_heatmap(shares)
    panels = [axes for axes in figure.axes if axes.images]
    for axes, (name, share) in zip(panels, shares.items(), strict=True):
        assert (axes.images[0].get_array() == share).all()
        assert axes.images[0].get_clim() == (0, 1)
        assert axes.get_title() == f"{name}: busy {share.mean():.0%} of the time"
    assert not overlaps(figure)


def test_activation_curves_rise_in_forward_and_fall_in_backward():
    figure = ps.activation_curves([100.0, 300.0], [50.0, 20.0], width=5)
    heights = [[bar.get_height() * 1e3 for bar in axes.patches] for axes in figure.axes]
    assert heights[0] == pytest.approx([100, 400, 420, 150])
    assert heights[1] == pytest.approx([20, 40, 360, 170])
    assert not overlaps(figure)


def test_step_timelines_end_with_the_longer_of_both():
    figure = ps.step_timelines(
        {"dp": (4.0, 0.0, 2.0), "ep": (3.0, 2.0, 1.0), "few": (1.0, 0.0, 9.0)}
    )
    assert "step: 4 s" in words(figure) and "step: 5 s" in words(figure)
    assert "step: 9 s" in words(figure)
    assert not overlaps(figure)
