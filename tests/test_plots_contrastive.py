import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from nanods import plots, plots_contrastive, plots_multimodal
from nanods.plots import ORANGE


def test_each_matching_pair_is_framed_and_what_a_loss_leaves_out_is_crossed_out():
    left_out = np.zeros((3, 3), dtype=bool)
    left_out[0, 2] = left_out[2, 0] = True
    panels = {"all": np.eye(3), "some": np.eye(3)}
    figure = plots_contrastive.matrices(panels, "", {"some": left_out})
    for axes, crosses in zip(figure.axes, (0, 2), strict=False):
        frames = [p for p in axes.patches if to_hex(p.get_edgecolor()) == ORANGE]
        middles = [(p.get_x() + p.get_width() / 2, p.get_y() + p.get_height() / 2) for p in frames]
        assert np.allclose(middles, [(0, 0), (1, 1), (2, 2)])
        assert len(axes.lines) == crosses
    crossed = {tuple(np.mean(line.get_xydata(), axis=0)) for line in figure.axes[1].lines}
    assert crossed == {(2, 0), (0, 2)}


def test_a_token_sees_half_a_patch_more_on_every_side():
    figure = plots_contrastive.patch_and_window(np.zeros((3, 32, 32)), 4, row=2, column=3)
    patch, window = (p for p in figure.axes[0].patches if isinstance(p, Rectangle))
    assert (patch.get_xy(), patch.get_width()) == ((11.5, 7.5), 4)
    assert (window.get_xy(), window.get_width()) == ((9.5, 5.5), 8)


def test_one_example_and_several_have_the_unit_on_the_first_spectrogram():
    for n in (1, 3):
        images, mels = np.zeros((n, 3, 8, 8)), np.zeros((n, 4, 6))
        figure = plots_contrastive.examples(images, mels, ["a caption"] * n, "")
        labels = [axes.get_ylabel() for axes in figure.axes]
        assert labels == [*[""] * n, "pitch (log-mel)", *[""] * (n - 1)]


def test_points_have_their_own_colours_and_y_points_down():
    points = np.array([[[-1, -1, 1, 0, 0], [1, 1, 0, 0, 1]]])  # red at the top left, blue
    figure = plots_contrastive.point_clouds(np.zeros((1, 3, 8, 8)), points)
    axes = figure.axes[1]
    (drawn,) = axes.collections
    assert np.array_equal(drawn.get_offsets(), points[0, :, :2])
    assert np.array_equal(drawn.get_facecolors()[:, :3], points[0, :, 2:])
    assert axes.get_ylim() == (1, -1)


def test_bars_of_experts_stand_below_the_line_of_all_experts():
    used = {"a": {"text": 3.0, "audio": 2.0}, "b": {"text": 1.0, "audio": 4.0}}
    (axes,) = plots_contrastive.experts_used(used, 4, "").axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == [3, 2, 1, 4]
    assert axes.lines[0].get_ydata()[0] == 4 < axes.get_ylim()[1]


def test_the_shares_of_the_gradient_fill_the_picture():
    scales = np.array([1.0, 10.0, 100.0])
    shares = {"hard": np.array([0.1, 0.5, 1.0]), "easy": np.array([0.9, 0.5, 0.0])}
    (axes,) = plots_contrastive.gradient_shares(scales, shares, 100, "").axes
    top = max(layer.get_datalim(axes.transData).y1 for layer in axes.collections)
    assert top == pytest.approx(1) == axes.get_ylim()[1]


def test_a_tick_of_a_dot_plot_is_called_what_it_is():
    (axes,) = plots.dot_plot({"a": [1.0]}, {"a": 0.5}, "x", target_name="chance").axes
    assert "orange: chance" in axes.get_xlabel() and "target" not in axes.get_xlabel()


def test_a_title_of_recall_over_time_is_shown():
    (axes,) = plots_multimodal.recall_over_time([1, 2], {"a->b": [0, 1]}, 0.1, title="grows").axes
    assert axes.get_title() == "grows"
