"""Draw V3's figures from arrays. Nothing here knows models, scenes or metrics files.

Shapes: n examples of a gallery, M width of an embedding or mel bands, F frames, L layers,
E experts. An item to draw is a text, an image (3, Y, X) in 0 .. 1, audio as its log-mel
spectrogram (M, F), or a video (F, 3, Y, X) in 0 .. 1.
"""

from collections.abc import Collection, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nanods.plots import BLUE, GREY, ORANGE
from nanods.plots_text import safe_text

Item = str | np.ndarray
# An item, its caption and its score. The item is None for a text, which is its own caption.
Result = tuple[Item | None, str, float]

INK, GREY_TEXT, PAPER = "#30343b", "#6b7177", "#f1f2f4"
# The first three differ in lightness too, so that they are distinct in every kind of colour vision.
MODALITY_COLOURS = (BLUE, ORANGE, INK, "#4b9e6a", "#8b5fbf", "#c2455e")
MARKERS = "osD^vP"


# ---- the embedding space -------------------------------------------------------------------------


def similarities(
    matrices: dict[str, np.ndarray],
    scale: float | None = None,
    matching: dict[str, np.ndarray] | None = None,
    names: dict[str, Sequence[str]] | None = None,
) -> Figure:
    """Draw the cosines (n, n) of each pair of modalities; matching pairs are on the diagonal.

    `matrices` by name: "text-image" has a text in each row. `scale`: the loss's 1 / temperature,
    to print what a difference in cosine means to the loss. `matching` (n, n) by name: which pairs
    match, where not the diagonal alone. `names` (n,) by name: of the examples, where they are short
    enough to be read beside the rows and columns.
    """
    side = 4.1 + (0.9 if names else 0)
    figure = Figure(figsize=(side * len(matrices) + 0.8, side + 0.5), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (name, cosines) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        rows, columns = name.split("-")
        match = matching[name] if matching else np.eye(len(cosines), dtype=bool)
        others = f"{cosines[~match].mean():.2f}" if not match.all() else "none"
        axes.set_title(
            f"{rows} to {columns}\nmean cosine: matching pairs {cosines[match].mean():.2f}, "
            f"others {others}",
            fontsize=10,
        )
        axes.set(ylabel=f"{rows} (one per row)", xlabel=f"{columns} (one per column)")
        if names:
            name_rows_and_columns(axes, names[name])
        else:
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(False)
    figure.colorbar(image, ax=panels, pad=0.01, shrink=0.85, label="cosine")
    if scale is not None:
        odds = np.exp(0.1 * scale)
        odds_text = f"{odds:.3g}" if odds < 100 else f"{odds:,.0f}"
        figure.supxlabel(
            f"the loss multiplies cosines by {scale:.1f} (temperature {1 / scale:.3f}): a cosine "
            f"higher by 0.1 means {odds_text} times the probability",
            fontsize=9,
        )
    return figure


def name_rows_and_columns(axes: Axes, names: Sequence[str]) -> None:
    """Write the names of n classes or examples beside a matrix (n, n)."""
    shown = [safe_text(name, max_columns=24) for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), shown, fontsize=7)


def spread_labels(heights: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move labels apart: return heights of the same order, at least `gap` apart, in low .. high."""
    heights = np.asarray(heights, float)
    order, steps = heights.argsort(kind="stable"), gap * np.arange(len(heights))
    slack = heights[order] - steps  # labels overlap where this decreases
    pushed_up = np.maximum.accumulate(slack)
    pushed_down = np.minimum.accumulate(slack[::-1])[::-1]
    spread = np.empty_like(heights)
    spread[order] = np.clip((pushed_up + pushed_down) / 2, low, high - steps[-1]) + steps
    return spread


def recall_over_time(
    steps: Sequence[float],
    recalls: dict[str, Sequence[float]],
    chance: float,
    k: int = 1,
    title: str = "",
) -> Figure:
    """Draw recall at k of each direction, such as "text->image", against the step.

    Each pair of modalities has a colour; its second direction is dashed.
    """
    figure = Figure(figsize=(8.5, 4.5))
    axes = figure.subplots()
    labels, pairs = [], []
    for name, values in recalls.items():
        pair = sorted(name.split("->"))
        if pair in pairs:
            style = "--"
        else:
            style = "-"
            pairs.append(pair)
        colour = MODALITY_COLOURS[pairs.index(pair) % len(MODALITY_COLOURS)]
        axes.plot(steps, values, style, marker="o", markersize=2.5, color=colour, label=name)
        labels.append((name.replace("->", " \u2192 "), values[-1], colour, style))
    axes.axhline(chance, color=GREY, linestyle=":", linewidth=1.5)
    labels.append(("chance", chance, GREY_TEXT, ":"))
    heights = spread_labels([value for _, value, _, _ in labels], 0.058, 0, 1)
    for (name, value, colour, style), height in zip(labels, heights, strict=True):
        axes.annotate(
            f"{value:.3f}  {name}",
            xy=(1, value),
            xytext=(1.09, height),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linestyle": style,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    axes.set(
        xlabel="optimizer step",
        ylabel=f"recall at {k}: fraction of queries whose match is found",
        ylim=(-0.01, 1.01),
        title=title,
    )
    axes.set_xlim(steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1)
    return figure


def flatten_to_2d(embeddings: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Project embeddings to two dimensions with PCA over all modalities together.

    (n, M) by modality -> (n, 2) by modality, and the fraction of the variance that is kept. One
    projection for all keeps a gap between modalities visible.
    """
    stacked = np.concatenate(list(embeddings.values())).astype(float)
    mean = stacked.mean(axis=0)
    _, singular_values, directions = np.linalg.svd(stacked - mean, full_matrices=False)
    variance = singular_values**2
    kept = variance[:2].sum() / max(variance.sum(), np.finfo(float).tiny)
    flat = {name: (points - mean) @ directions[:2].T for name, points in embeddings.items()}
    return flat, float(kept)


def space_map(
    points: dict[str, np.ndarray], colours: np.ndarray, names: Sequence[str], title: str = ""
) -> Figure:
    """Draw n scenes as points (n, 2) by modality; grey lines join the points of one scene.

    The points are coloured by a fact of the scene: colours (n, 3) in 0 .. 1 with names (n,).
    """
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    axes = figure.subplots()
    corners = np.stack(list(points.values()), axis=1)  # (n, modalities, 2)
    closed = np.concatenate([corners, corners[:, :1]], axis=1)
    axes.add_collection(LineCollection(closed, colors=GREY, linewidths=0.7))
    edge = {"edgecolors": INK, "linewidths": 0.6}
    markers = dict(zip(points, MARKERS[: len(points)], strict=True))
    for name, positions in points.items():
        axes.scatter(*positions.T, s=34, c=colours, marker=markers[name], zorder=2, **edge)
    axes.set(xticks=[], yticks=[], title=title, facecolor=PAPER)
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)
    dot = {"linestyle": "", "markeredgecolor": INK, "markersize": 7}
    handles = [
        Line2D([], [], marker=markers[name], color=GREY, label=name, **dot) for name in points
    ]
    handles.append(Line2D([], [], linestyle="", label=" "))
    for name, colour in sorted(dict(zip(names, colours, strict=True)).items()):
        handles.append(Line2D([], [], marker="o", color=colour, label=name, **dot))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def load_by_modality(loads: dict[str, np.ndarray]) -> Figure:
    """Draw the fraction of each modality's tokens that each expert gets: loads (L, E) by modality.

    One panel for each layer.
    """
    L, E = next(iter(loads.values())).shape
    figure = Figure(figsize=(max(6, 0.55 * E + 1), 1.6 * L + 0.8), layout="constrained")
    panels = figure.subplots(L, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    width = 0.8 / len(loads)
    for layer, axes in enumerate(panels):
        for i, (name, load) in enumerate(loads.items()):
            fraction = load[layer] / max(load[layer].sum(), np.finfo(float).tiny)
            offset = (i - (len(loads) - 1) / 2) * width
            colour = MODALITY_COLOURS[i % len(MODALITY_COLOURS)]
            axes.bar(np.arange(E) + offset, fraction, width, color=colour, label=name)
        axes.axhline(
            1 / E, color="black", linestyle="--", linewidth=0.8, label=f"even share, {100 / E:.3g}%"
        )
        axes.set(ylabel=f"layer {layer}", xlim=(-0.6, E - 0.4), xticks=range(E))
        axes.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:.3g}%")
        axes.tick_params(axis="x", length=0)
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
    panels[0].set_title(
        "share of each modality's tokens that each expert receives", loc="left", fontsize=11
    )
    panels[-1].set_xlabel("expert")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(loads) + 1,
        frameon=False,
    )
    return figure


# ---- zero-shot classification --------------------------------------------------------------------

MAX_NAMED = 60  # classes whose names fit beside a confusion matrix


def confusion(counts: dict[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Draw confusion matrices (C, C) by modality: the class of an example in each row, the class
    that it is taken for in each column.

    A colour is the share of the row, so that rare classes show too. Of more than MAX_NAMED classes,
    those are left out that no example has and none is taken for. If there are still more, they are
    shown by their numbers.
    """
    C, shown = len(names), np.arange(len(names))
    if C > MAX_NAMED:
        total = sum(counts.values())
        shown = np.flatnonzero(total.sum(axis=0) + total.sum(axis=1))
    named = len(shown) <= MAX_NAMED
    side = 3 + (0.17 * len(shown) if named else 5)
    figure = Figure(figsize=(side * len(counts) + 1, side), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, (modality, matrix) in zip(panels, counts.items(), strict=True):
        matrix = matrix[shown][:, shown]
        total = matrix.sum(axis=1, keepdims=True)
        image = axes.imshow(
            matrix / np.maximum(total, 1), vmin=0, vmax=1, cmap="Blues", interpolation="nearest"
        )
        accuracy = np.trace(matrix) / max(1, matrix.sum())
        axes.set_title(f"{modality}: {accuracy:.1%} right, chance {1 / C:.1%}", fontsize=10)
        axes.set(ylabel="caption", xlabel="nearest caption")
        if len(shown) < C:
            axes.set_ylabel(f"caption ({len(shown)} of {C} occur)")
        axes.grid(False)
        if named:
            name_rows_and_columns(axes, [names[i] for i in shown])
        else:
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(10, integer=True))
    figure.colorbar(image, ax=panels, pad=0.01, shrink=0.85, label="share of the row")
    return figure


# ---- retrieval -----------------------------------------------------------------------------------

# The item to draw, the caption below it, the heading above it, whether it is the true match.
Cell = tuple[Item, str, str, bool]
CELL, GAP, LINE = 1.5, 0.22, 0.145  # inches: a cell, the space between cells, a line of a caption
LINE_LENGTH = 25  # columns of a caption on a line


def frame_grid(video: np.ndarray) -> np.ndarray:
    """Arrange four evenly spaced frames of a video in a square: (F, 3, Y, X) -> (3, 2 Y, 2 X)."""
    first, second, third, fourth = video[np.linspace(0, len(video) - 1, 4).round().astype(int)]
    top = np.concatenate([first, second], axis=2)
    bottom = np.concatenate([third, fourth], axis=2)
    return np.concatenate([top, bottom], axis=1)


def is_audio(item: Item) -> bool:
    """Return whether an item is a spectrogram (M, F)."""
    return not isinstance(item, str) and item.ndim == 2


def draw_item(axes: Axes, item: Item, limits: tuple[float, float] = (None, None)) -> None:
    """Draw a text, an image, a video as four of its frames, or audio as its spectrogram.

    Spectrograms have time to the right and low frequencies at the bottom; `limits` are the values
    of the darkest and the brightest colour.
    """
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    if isinstance(item, str):
        axes.set_facecolor(PAPER)
        axes.text(
            0.5,
            0.5,
            safe_text(item, line_columns=20),
            ha="center",
            va="center",
            fontsize=9,
            transform=axes.transAxes,
        )
    elif is_audio(item):
        low, high = limits
        axes.imshow(
            item,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=low,
            vmax=high,
        )
    else:
        image = frame_grid(item) if item.ndim == 4 else item
        axes.imshow(np.clip(image, 0, 1).transpose(1, 2, 0), interpolation="nearest")


def draw_cell(axes: Axes, cell: Cell, limits: tuple[float, float]) -> None:
    """Draw an item with its heading and caption; the true match has an orange frame."""
    item, caption, heading, is_match = cell
    draw_item(axes, item, limits)
    axes.spines[:].set(visible=is_match, color=ORANGE, linewidth=3)
    axes.set_title(heading, fontsize=9, color="#b0540c" if is_match else INK, pad=5)
    axes.set_xlabel(safe_text(caption, line_columns=LINE_LENGTH), fontsize=8, color=INK, labelpad=5)


def contact_sheet(rows: list[list[Cell]], title: str) -> Figure:
    """Draw cells in rows; the first column, the queries, is set apart.

    A row is as high as its longest caption needs.
    """
    row_heights = []
    for row in rows:
        captions = [safe_text(cell[1], line_columns=LINE_LENGTH) for cell in row]
        lines = max(caption.count("\n") + bool(caption) for caption in captions)
        row_heights.append(CELL + LINE * lines + 2 * GAP)
    spectrograms = [cell[0] for row in rows for cell in row if is_audio(cell[0])]
    limits, footer = (None, None), 0.0
    if spectrograms:
        limits = min(map(np.min, spectrograms)), max(map(np.max, spectrograms))
        footer = GAP
    header = 1.5 * GAP if title else 0.0
    width = max(map(len, rows)) * (CELL + GAP) + GAP
    height = header + sum(row_heights) + footer
    figure = Figure(figsize=(width, height))
    for y, row in enumerate(rows):
        bottom = height - header - sum(row_heights[:y]) - GAP - CELL
        for x, cell in enumerate(row):
            left = x * (CELL + GAP) + (GAP if x else 0)
            box = (left / width, bottom / height, CELL / width, CELL / height)
            draw_cell(figure.add_axes(box), cell, limits)
    figure.text(0, 1, safe_text(title), fontsize=11, va="top")
    if spectrograms:
        note = "audio: time to the right, low frequencies at the bottom, one colour scale for all"
        figure.text(0, 0, note, fontsize=8, color=GREY_TEXT)
    return figure


def result_cells(results: Sequence[Result], true_ranks: Collection[int]) -> list[Cell]:
    """Return a cell for each result, headed by its rank from 1 and its score."""
    cells = []
    for rank, (item, caption, score) in enumerate(results):
        is_match = rank in true_ranks
        heading = f"{rank + 1}.  {score:.2f}" + ("  true match" if is_match else "")
        if item is None:  # a text: draw its caption as the item
            cells.append((caption, "", heading, is_match))
        else:
            cells.append((item, caption, heading, is_match))
    return cells


def neighbours(
    rows: Sequence[tuple[Item, str, Sequence[Result], Collection[int]]], title: str = ""
) -> Figure:
    """Draw a contact sheet of several queries and their nearest neighbours.

    rows: (query, its caption, its results from best to worst, the ranks of the true matches from
    0). Each becomes a row of the sheet.
    """
    sheet = [
        [(query, caption, "query", False), *result_cells(results, true_ranks)]
        for query, caption, results, true_ranks in rows
    ]
    return contact_sheet(sheet, title)
