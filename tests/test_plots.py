"""Pictures show what they were given: values, places, words."""

import numpy as np
import pytest
from matplotlib.text import Text

from nanods import plots_multimodal as mm

KINDS = ("text", "image", "audio")
RANDOM = np.random.default_rng(0)


def words(figure):
    """All that is written in a figure, lines joined."""
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


def pictures(figure):
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def framed(figure):
    return [axes.get_title() for axes in figure.axes if axes.spines["left"].get_visible()]


def overlaps(figure):
    """CaptionDataset of texts that lie on each other."""
    figure.draw_without_rendering()
    texts = [
        text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()
    ]
    boxes = [
        (text.get_text(), Text.get_window_extent(text)) for text in texts
    ]  # of an annotation without its line
    return [
        (a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)
    ]


# ---- one space ---------------------------------------------------------------------------------------------------------------


def test_similarities_show_each_matrix_on_one_scale_and_tell_the_diagonal_from_the_rest():
    matrices = {
        "text-image": np.full((4, 4), -0.25) + np.eye(4),
        "text-audio": RANDOM.uniform(-1, 1, (4, 4)),
    }
    figure = mm.similarities(matrices, scale=20.0)
    panels = [axes for axes in figure.axes if axes.images]
    for axes, cosines in zip(panels, matrices.values(), strict=True):
        assert (axes.images[0].get_array() == cosines).all() and axes.images[0].get_clim() == (
            -1,
            1,
        )
    assert "true pairs 0.75, of the rest -0.25" in panels[0].get_title()
    assert "text" in panels[1].get_ylabel() and "audio" in panels[1].get_xlabel()
    assert "20.0 (temperature 0.050)" in words(figure) and "temperature" not in words(
        mm.similarities(matrices)
    )


def test_recall_lines_are_the_data_and_labels_give_the_last_value():
    names = [f"{a}->{b}" for a in KINDS for b in KINDS if a != b]
    recalls = {name: RANDOM.uniform(0, 1, 5) for name in names}
    figure = mm.recall_over_time(range(5), recalls, 1 / 8, k=5)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for name, values in recalls.items():
        assert (lines[name].get_ydata() == values).all()
        assert f"{values[-1]:.3f}  {name.replace('->', ' → ')}" in words(figure)
        back = lines["->".join(reversed(name.split("->")))]
        assert (
            lines[name].get_color() == back.get_color()
            and lines[name].get_linestyle() != back.get_linestyle()
        )
    assert len({lines[name].get_color() for name in names}) == 3
    assert "0.125  chance" in words(figure) and "recall at 5" in words(figure)


@pytest.mark.parametrize("last", [0.0, 0.5, 1.0])
def test_labels_of_lines_that_end_together_do_not_overlap(last):
    names = [f"{a}->{b}" for a in KINDS for b in KINDS if a != b]
    assert not overlaps(mm.recall_over_time([0, 9], {name: [0, last] for name in names}, 1 / 512))


def test_apart_moves_only_what_is_too_close():
    assert mm.spread_labels([0.9, 0.1, 0.5], 0.05, 0, 1) == pytest.approx([0.9, 0.1, 0.5])
    assert mm.spread_labels([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert mm.spread_labels([1, 1, 0.99], 0.1, 0, 1) == pytest.approx([0.9, 1, 0.8])


def test_flattening_keeps_the_distances_of_a_plane_between_modalities_too():
    plane = np.linalg.qr(RANDOM.normal(size=(6, 2)))[0].T  # two directions of length 1
    embeddings = {
        name: (RANDOM.normal(size=(7, 2)) + i) @ plane + 3 for i, name in enumerate(KINDS)
    }
    flat, share = mm.flatten_to_2d(embeddings)
    before, after = (np.concatenate(list(x.values())) for x in (embeddings, flat))
    assert after.shape == (21, 2) and share == pytest.approx(1)
    distances = [np.linalg.norm(x[:, None] - x, axis=-1) for x in (before, after)]
    assert distances[1] == pytest.approx(distances[0])


def test_flattening_tells_how_much_it_hides():
    corners = np.concatenate([np.eye(4), -np.eye(4)])  # as much in each of 4 directions
    assert mm.flatten_to_2d({"text": corners[:3], "image": corners[3:]})[1] == pytest.approx(0.5)
    assert mm.flatten_to_2d({"text": np.ones((3, 4))})[1] == 0  # collapsed


def test_the_map_joins_the_points_of_a_scene_in_its_colour():
    points = {name: RANDOM.normal(size=(3, 2)) for name in KINDS}
    colours = np.array([(1.0, 0, 0), (0, 0, 1), (1, 0, 0)])
    figure = mm.space_map(points, colours, ["red", "blue", "red"], "a map")
    joined, *marks = figure.axes[0].collections
    for mark, places in zip(marks, points.values(), strict=True):
        assert (mark.get_offsets() == places).all() and (
            mark.get_facecolors()[:, :3] == colours
        ).all()
    for i, corners in enumerate(joined.get_segments()):
        assert (corners == [points[name][i] for name in (*KINDS, "text")]).all()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name for name in legend if name.strip()] == [*KINDS, "blue", "red"]


def test_bars_are_shares_of_each_modality():
    loads = {"text": np.array([[30, 10], [0, 40]]), "image": np.array([[1, 1], [3, 1]])}
    figure = mm.load_by_modality(loads)
    assert len(figure.axes) == 2
    heights = [
        [[bar.get_height() for bar in bars] for bars in axes.containers] for axes in figure.axes
    ]
    assert heights == [[[0.75, 0.25], [0.5, 0.5]], [[0, 1], [0.75, 0.25]]]
    assert "even share, 50%" in words(figure) and "image" in words(figure)


# ---- what was found ----------------------------------------------------------------------------------------------------------

CAPTION = r"there is one little yellow triangle right of the large orange rhombus $\frac$"  # no mathematics: an error in TeX


def results(kind, count=7):
    items = {
        "text": [None] * count,
        "image": RANDOM.uniform(0, 1, (count, 3, 4, 4)),
        "audio": RANDOM.normal(size=(count, 4, 6)),
    }
    return [(item, f"{i} {CAPTION}", 0.9 - 0.1 * i) for i, item in enumerate(items[kind])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_contact_sheet_shows_query_captions_scores_and_the_true_one(kind):
    found = results(kind)
    figure = mm.neighbours([("a query", "", found, 2)], "found")
    assert len(figure.axes) == 8 and framed(figure) == ["3.  0.70  the true one"]
    assert all(
        f"{i} {CAPTION}" in words(figure) and f"{i + 1}.  {0.9 - 0.1 * i:.2f}" in words(figure)
        for i in range(7)
    )
    assert "a query" in words(figure) and not overlaps(figure)
    for axes, (item, _, _) in zip(figure.axes[1:], found, strict=True):
        shown = [np.asarray(image.get_array()) for image in axes.images]
        assert (
            not shown
            if item is None
            else (shown[0] == (item if kind == "audio" else item.transpose(1, 2, 0))).all()
        )


def test_a_sound_has_low_bands_at_the_bottom_and_one_brightness_for_all():
    figure = mm.neighbours([(np.zeros((4, 6)), "", [(np.ones((4, 6)), "loud", 1.0)], None)])
    for axes in figure.axes:
        assert axes.images[0].origin == "lower" and axes.images[0].get_clim() == (0, 1)
    assert "time to the right" in words(figure) and "time" not in words(
        mm.neighbours([("a", "", results("image"), None)])
    )


def test_neighbours_are_a_row_for_each_query():
    queries = [
        ("a text", "", results("image", 3), 1),
        (np.full((3, 4, 4), 0.5), "its caption", results("text", 3), None),
    ]
    figure = mm.neighbours(queries)
    rows = [round(axes.get_position().y0, 6) for axes in figure.axes]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) == 2 and rows.count(rows[0]) == 4
    assert framed(figure) == ["2.  0.80  the true one"] and "its caption" in words(figure)
    assert (pictures(figure)[-1] == 0.5).all() and not overlaps(figure)


def test_lines_are_balanced_and_lose_no_word():
    assert (
        mm.balanced_lines("a little green hoop is on the left of a large green box", 25).count("\n")
        == 2
    )
    assert (
        min(
            map(
                len,
                mm.balanced_lines(
                    "a little green hoop is on the left of a large green box", 25
                ).split("\n"),
            )
        )
        > 14
    )
    assert (
        mm.balanced_lines("", 25) == ""
        and mm.balanced_lines("one line of just this much", 26) == "one line of just this much"
    )
