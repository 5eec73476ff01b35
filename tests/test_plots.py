"""V3's figures show the values, positions and words that they are called with."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from nanods import plots, plots_text
from nanods import plots_multimodal as mm

ROOT = Path(__file__).parents[1]
MODALITIES = ("text", "image", "audio")
RANDOM = np.random.default_rng(0)


def words(figure):
    """Return all text in a figure, with lines joined, as it is drawn."""
    joined = " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")
    return joined.replace(r"\$", "$")


def pictures(figure):
    """Return the arrays of all images in a figure."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def framed(figure):
    """Return the titles of all axes with a frame."""
    return [axes.get_title() for axes in figure.axes if axes.spines["left"].get_visible()]


def overlaps(figure):
    """Return the pairs of texts that overlap."""
    figure.draw_without_rendering()
    texts = [
        text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()
    ]
    # Text.get_window_extent leaves out the line of an annotation.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    return [
        (a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)
    ]


# ---- the embedding space -------------------------------------------------------------------------


def test_similarities_share_one_scale_and_report_the_diagonal_and_the_rest():
    matrices = {
        "text-image": np.full((4, 4), -0.25) + np.eye(4),
        "text-audio": RANDOM.uniform(-1, 1, (4, 4)),
    }
    figure = mm.similarities(matrices, scale=20.0)
    panels = [axes for axes in figure.axes if axes.images]
    for axes, cosines in zip(panels, matrices.values(), strict=True):
        assert (axes.images[0].get_array() == cosines).all()
        assert axes.images[0].get_clim() == (-1, 1)
    assert "matching pairs 0.75, others -0.25" in panels[0].get_title()
    assert "text" in panels[1].get_ylabel() and "audio" in panels[1].get_xlabel()
    assert "20.0 (temperature 0.050)" in words(figure)
    assert "temperature" not in words(mm.similarities(matrices))


def test_recall_lines_are_the_data_and_labels_give_the_last_value():
    names = [f"{a}->{b}" for a in MODALITIES for b in MODALITIES if a != b]
    recalls = {name: RANDOM.uniform(0, 1, 5) for name in names}
    figure = mm.recall_over_time(range(5), recalls, 1 / 8, k=5)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for name, values in recalls.items():
        line, reverse = lines[name], lines["->".join(reversed(name.split("->")))]
        assert (line.get_ydata() == values).all()
        assert f"{values[-1]:.3f}  {name.replace('->', ' → ')}" in words(figure)
        assert line.get_color() == reverse.get_color()
        assert line.get_linestyle() != reverse.get_linestyle()
    assert len({lines[name].get_color() for name in names}) == 3
    assert "0.125  chance" in words(figure) and "recall at 5" in words(figure)


@pytest.mark.parametrize("last", [0.0, 0.5, 1.0])
def test_labels_of_lines_that_end_together_do_not_overlap(last):
    names = [f"{a}->{b}" for a in MODALITIES for b in MODALITIES if a != b]
    assert not overlaps(mm.recall_over_time([0, 9], {name: [0, last] for name in names}, 1 / 512))


def test_spread_labels_moves_only_labels_that_are_too_close():
    assert mm.spread_labels([0.9, 0.1, 0.5], 0.05, 0, 1) == pytest.approx([0.9, 0.1, 0.5])
    assert mm.spread_labels([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert mm.spread_labels([1, 1, 0.99], 0.1, 0, 1) == pytest.approx([0.9, 1, 0.8])


def test_more_lines_than_colours_begin_with_the_first_colour_again():
    names = [str(i) for i in range(len(plots.COLOURS) + 1)]
    (axes,) = plots.curves({name: ([0, 1], [0, 1]) for name in names}, "x", "y").axes
    assert [line.get_label() for line in axes.lines] == names
    assert axes.lines[-1].get_color() == plots.COLOURS[0]


def test_flattening_a_plane_keeps_all_distances_between_modalities_too():
    plane = np.linalg.qr(RANDOM.normal(size=(6, 2)))[0].T  # two directions of unit length
    embeddings = {
        name: (RANDOM.normal(size=(7, 2)) + i) @ plane + 3 for i, name in enumerate(MODALITIES)
    }
    flat, kept = mm.flatten_to_2d(embeddings)
    before, after = (np.concatenate(list(x.values())) for x in (embeddings, flat))
    assert after.shape == (21, 2) and kept == pytest.approx(1)
    distances = [np.linalg.norm(x[:, None] - x, axis=-1) for x in (before, after)]
    assert distances[1] == pytest.approx(distances[0])


def test_flattening_reports_the_fraction_of_the_variance_that_it_keeps():
    corners = np.concatenate([np.eye(4), -np.eye(4)])  # equal variance in each of 4 directions
    _, kept = mm.flatten_to_2d({"text": corners[:3], "image": corners[3:]})
    assert kept == pytest.approx(0.5)
    assert mm.flatten_to_2d({"text": np.ones((3, 4))})[1] == 0  # collapsed


def test_space_map_joins_the_points_of_a_scene_and_gives_them_its_colour():
    points = {name: RANDOM.normal(size=(3, 2)) for name in MODALITIES}
    colours = np.array([(1.0, 0, 0), (0, 0, 1), (1, 0, 0)])
    figure = mm.space_map(points, colours, ["red", "blue", "red"], "a map")
    lines, *markers = figure.axes[0].collections
    for marker, positions in zip(markers, points.values(), strict=True):
        assert (marker.get_offsets() == positions).all()
        assert (marker.get_facecolors()[:, :3] == colours).all()
    for i, corners in enumerate(lines.get_segments()):
        assert (corners == [points[name][i] for name in (*MODALITIES, "text")]).all()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name for name in legend if name.strip()] == [*MODALITIES, "blue", "red"]


def test_load_bars_are_fractions_of_each_modalitys_tokens():
    loads = {"text": np.array([[30, 10], [0, 40]]), "image": np.array([[1, 1], [3, 1]])}
    figure = mm.load_by_modality(loads)
    assert len(figure.axes) == 2
    heights = [
        [[bar.get_height() for bar in bars] for bars in axes.containers] for axes in figure.axes
    ]
    assert heights == [[[0.75, 0.25], [0.5, 0.5]], [[0, 1], [0.75, 0.25]]]
    assert "even share, 50%" in words(figure) and "image" in words(figure)


# ---- retrieval -----------------------------------------------------------------------------------

# "$\frac$" is an error in TeX: captions must not be parsed as mathematics.
CAPTION = r"there is one little yellow triangle right of the large orange rhombus $\frac$"


def make_results(modality, count=7):
    items = {
        "text": [None] * count,
        "image": RANDOM.uniform(0, 1, (count, 3, 4, 4)),
        "audio": RANDOM.normal(size=(count, 4, 6)),
    }
    return [(item, f"{i} {CAPTION}", 0.9 - 0.1 * i) for i, item in enumerate(items[modality])]


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_contact_sheet_shows_query_captions_scores_and_the_true_match(modality):
    results = make_results(modality)
    figure = mm.neighbours([("a query", "", results, [2])], "results")
    assert len(figure.axes) == 8 and framed(figure) == ["3.  0.70  true match"]
    for i in range(7):
        assert f"{i} {CAPTION}" in words(figure)
        assert f"{i + 1}.  {0.9 - 0.1 * i:.2f}" in words(figure)
    assert "a query" in words(figure) and not overlaps(figure)
    for axes, (item, _, _) in zip(figure.axes[1:], results, strict=True):
        shown = [np.asarray(image.get_array()) for image in axes.images]
        if modality == "text":
            assert not shown
        else:
            expected = item if modality == "audio" else item.transpose(1, 2, 0)
            assert (shown[0] == expected).all()


def test_audio_has_low_frequencies_at_the_bottom_and_one_colour_scale():
    figure = mm.neighbours([(np.zeros((4, 6)), "", [(np.ones((4, 6)), "loud", 1.0)], ())])
    for axes in figure.axes:
        assert axes.images[0].origin == "lower" and axes.images[0].get_clim() == (0, 1)
    assert "time to the right" in words(figure)
    without_audio = mm.neighbours([("a", "", make_results("image"), ())])
    assert "time" not in words(without_audio)


def test_a_video_is_four_of_its_frames():
    video = np.arange(8)[:, None, None, None] / 8 * np.ones((8, 3, 2, 5))
    figure = mm.neighbours([("a", "", [(video, "brighter and brighter", 1.0)], ())])
    (picture,) = pictures(figure)
    assert picture.shape == (4, 10, 3)
    quarters = (picture[:2, :5], picture[:2, 5:], picture[2:, :5], picture[2:, 5:])
    assert [np.unique(quarter).tolist() for quarter in quarters] == [[0], [2 / 8], [5 / 8], [7 / 8]]


def test_neighbours_draws_a_row_for_each_query():
    queries = [
        ("a text", "", make_results("image", 3), [1, 2]),
        (np.full((3, 4, 4), 0.5), "its caption", make_results("text", 3), []),
    ]
    figure = mm.neighbours(queries)
    rows = [round(axes.get_position().y0, 6) for axes in figure.axes]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) == 2 and rows.count(rows[0]) == 4
    assert framed(figure) == ["2.  0.80  true match", "3.  0.70  true match"]
    assert "its caption" in words(figure)
    assert (pictures(figure)[-1] == 0.5).all() and not overlaps(figure)


def test_similarities_name_the_examples_where_they_have_names():
    names = ["cat", "cat", "a rather long name of a class"]
    figure = mm.similarities({"text-image": np.eye(3)}, names={"text-image": names})
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["cat", "cat"] and labels[2].endswith("\u2026")
    figure.draw_without_rendering()
    assert not overlaps(figure)
    assert "cat" not in words(mm.similarities({"text-image": np.eye(3)}))


def test_a_confusion_matrix_shows_shares_and_names_classes_where_they_fit():
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 40]])  # nothing of class 1 is held out
    figure = mm.confusion({"image": counts, "audio": counts.T}, ["cat", "dog", "bird"])
    shares = figure.axes[0].images[0].get_array()
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0, 1]]
    for text in ("image: 97.7% right, chance 33.3%", "audio: 97.7% right", "cat", "dog", "bird"):
        assert text in words(figure)
    figure.draw_without_rendering()
    assert not overlaps(figure)
    many = mm.confusion({"image": np.eye(200, dtype=int)}, [f"class {i}" for i in range(200)])
    assert "class 7" not in words(many) and max(many.get_size_inches()) < 15
    few = np.zeros((100, 100), int)
    few[7, [7, 8]] = few[9, 7] = 2  # 9 is taken for 7, and half of 7 for 8
    figure = mm.confusion({"image": few}, [f"class {i}" for i in range(100)])
    shares = figure.axes[0].images[0].get_array()
    assert shares.tolist() == [[0.5, 0.5, 0], [0, 0, 0], [1, 0, 0]]
    assert "class 8" in words(figure) and "class 10" not in words(figure)
    assert "33.3% right, chance 1.0%" in words(figure) and "(3 of 100 occur)" in words(figure)
    fitting = mm.confusion({"image": np.eye(60, dtype=int)}, [f"the class {i}" for i in range(60)])
    fitting.draw_without_rendering()
    labels = fitting.axes[0].get_yticklabels()
    heights = sorted(label.get_window_extent().y0 for label in labels)
    tall = max(label.get_window_extent().height for label in labels)
    assert len(labels) == 60 and min(np.diff(heights)) >= 0.8 * tall, "names overlap"


def test_balanced_lines_have_similar_length_and_lose_no_word():
    text = "a little green hoop is on the left of a large green box"
    lines = plots_text.balanced_lines(text, 25).split("\n")
    assert len(lines) == 3 and " ".join(lines) == text
    assert min(map(len, lines)) > 14
    assert plots_text.balanced_lines("", 25) == ""
    assert (
        plots_text.balanced_lines("one line of just this much", 26) == "one line of just this much"
    )


# ---- text of the user ----------------------------------------------------------------------------

# What tokens, captions and file names of users hold.
USER_TEXTS = {
    "mathematics": r"$$ $ \$ $x$ $\frac $\frac{1$",
    "control characters": "a\x00b\tc\nd\r\x1b[31m\x85\u2028",
    "cannot be encoded": "caf\udce9",
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469",
    "Chinese": "\u4e2d\u6587\uff0c" * 20,
    "combining": "e" + "\u0301" * 5000,
    "120 kB of words": "transcript " * 11_000,
    "120 kB without a blank": "x" * 120_000,
}


def drawn_figures(text):
    """Return a figure of each kind that draws text of the user."""
    image = np.zeros((3, 4, 4))
    tokens = [text, *text[:5]]
    figure = Figure(figsize=(7, 2))
    plots.draw_text_by_expert(figure.subplots(), tokens, np.arange(len(tokens)), "experts")
    return {
        "tokens": figure,
        "neighbours": mm.neighbours([(text, text, [(image, text, 0.5)], ())], text),
        "confusion": mm.confusion({"audio": np.eye(3, dtype=int)}, [text, "b", text]),
    }


@pytest.mark.parametrize("name", USER_TEXTS)
def test_any_text_of_the_user_can_be_drawn_and_the_picture_stays_small(name, tmp_path, recwarn):
    for kind, figure in drawn_figures(USER_TEXTS[name]).items():
        for text in figure.findobj(Text):
            assert len(text.get_text()) < 1000
            assert text._preprocess_math(text.get_text())[1] is False, "read as mathematics"
        plots.save(figure, tmp_path / f"{kind}.png")
        height, width, _ = matplotlib.image.imread(tmp_path / f"{kind}.png").shape
        assert height < 2500 and width < 2500
    assert not recwarn


def test_a_picture_is_at_most_8000_pixels_high_and_wide(tmp_path):
    plots.save(Figure(figsize=(2, 500)), tmp_path / "high.png")
    height, _, _ = matplotlib.image.imread(tmp_path / "high.png").shape
    assert 7000 < height <= plots.MAX_PIXELS + 50


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    class Cut(Figure):
        def savefig(self, file, **options):
            with file if hasattr(file, "write") else file.open("wb") as opened:
                opened.write(b"half")
            raise OSError(28, "No space left on device")

    path = tmp_path / "loss.png"
    path.write_bytes(b"the old picture")
    with pytest.raises(OSError, match="No space"):
        plots.save(Cut(), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("loss.png", b"the old picture")
    ]


def test_control_characters_are_visible_and_lengths_count_columns():
    assert plots_text.safe_text("a\x00b\tc\n") == "a\\x00b\u21e5c\u21b5"
    assert plots_text.safe_text("$$ $") == r"\$\$ \$"
    chinese = plots_text.safe_text("\u4e2d" * 100, max_columns=20, line_columns=10)
    assert chinese == "\u4e2d" * 5 + "\n" + "\u4e2d" * 4 + " \u2026"
    assert plots_text.safe_text("one two three", max_columns=10) == "one two \u2026"
    assert plots_text.safe_text("fits exactly", max_columns=12) == "fits exactly"
    assert plots_text.columns("e\u0301\u4e2d") == 3


def test_characters_that_no_font_has_are_named_once(tmp_path, capsys, recwarn):
    plots.reported_characters.clear()
    for name in ("one", "two"):
        figure = Figure()
        figure.text(0, 0, "\U000e0041 \U000f0000")
        plots.save(figure, tmp_path / f"{name}.png")
    assert capsys.readouterr().err.count("notice: no font here has") == 1
    assert not recwarn


def test_warnings_about_anything_else_are_kept(tmp_path):
    figure = Figure()
    figure.savefig = lambda *args, **kwargs: warnings.warn("another", stacklevel=1)
    with pytest.warns(UserWarning, match="another"):
        plots.save(figure, tmp_path / "any.png")


def test_pictures_are_drawn_where_home_cannot_be_written_in_a_folder_with_blanks(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    code = (
        "from pathlib import Path; from matplotlib.figure import Figure; from nanods import plots\n"
        "plots.save(Figure(), Path('my picture.png'))"
    )
    hidden = ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": "/dev/null", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (folder / "my picture.png").exists()


def test_bars_name_and_measure_each_value():
    figure = plots.bars({"a": {"x": 1.0, "y": 1234.0}, "b": {"z": 3.0}}, "per second")
    first, second = figure.axes
    assert [bar.get_width() for bar in first.patches] == [1, 1234]
    assert [label.get_text() for label in first.get_yticklabels()] == ["x", "y"]
    assert [text.get_text() for text in first.texts] == ["1", "1,234"]
    assert second.get_title() == "b" and second.get_xlabel() == "per second"
