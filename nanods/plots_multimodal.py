"""The pictures of V3, from arrays; knows nothing of models, scenes or files of metrics.

Shapes: n items of a gallery, M width of an embedding or mel bands, F frames, L layers, E experts. An item is a text, an image
(3, Y, X) in 0 .. 1, or a sound as its log-mel spectrogram (M, F).
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nanods.plots import BLUE, GREY, ORANGE

Item = str | np.ndarray
Result = tuple[
    Item | None, str, float
]  # what was found, its caption, its score; of a text the caption is all there is

INK, GREY_TEXT, PAPER = "#30343b", "#6b7177", "#f1f2f4"
THREE = (BLUE, ORANGE, INK)  # apart in lightness too: for every kind of colour vision
MARKERS = "osD^"


# ---- one space ---------------------------------------------------------------------------------------------------------------


def similarities(matrices: dict[str, np.ndarray], scale: float | None = None) -> Figure:
    """Cosines (n, n) of each pair of modalities, "text-image" having a text in each row; the true pairs are the diagonal.

    `scale`: the loss's 1 / temperature, to say how much a difference in cosine means to it.
    """
    figure = Figure(figsize=(4.1 * len(matrices) + 0.8, 4.6), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (name, cosines) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        rows, columns = name.split("-")
        own = np.eye(len(cosines), dtype=bool)
        title = f"{rows} to {columns}\nmean of true pairs {cosines[own].mean():.2f}, of the rest {cosines[~own].mean():.2f}"
        axes.set_title(title, fontsize=10)
        axes.set(ylabel=f"{rows}, one a row", xlabel=f"{columns}, one a column")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(False)
    figure.colorbar(image, ax=panels, pad=0.01, shrink=0.85, label="cosine")
    if scale is not None:
        times = np.exp(0.1 * scale)
        odds = f"a cosine higher by 0.1 is given {f'{times:.3g}' if times < 100 else f'{times:,.0f}'} times the probability"
        figure.supxlabel(
            f"the loss multiplies the cosines by {scale:.1f} (temperature {1 / scale:.3f}): {odds}",
            fontsize=9,
        )
    return figure


def spread_labels(heights: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Where to write labels that belong at these heights: in the same order, between low and high, `gap` apart at least."""
    heights = np.asarray(heights, float)
    order, steps = heights.argsort(kind="stable"), gap * np.arange(len(heights))
    wanted = heights[order] - steps  # labels that do not overlap rise here
    pushed = (
        np.maximum.accumulate(wanted) + np.minimum.accumulate(wanted[::-1])[::-1]
    )  # upwards, and downwards
    places = np.empty_like(heights)
    places[order] = np.clip(pushed / 2, low, high - steps[-1]) + steps
    return places


def recall_over_time(
    steps: Sequence[float], recalls: dict[str, Sequence[float]], chance: float, k: int = 1
) -> Figure:
    """Recall at k of each direction, "text->image", at these steps: a colour for each pair, dashed the second way round."""
    figure = Figure(figsize=(8.5, 4.5))
    axes = figure.subplots()
    lines, pairs = [], []
    for name, values in recalls.items():
        pair = sorted(name.split("->"))
        style = "--" if pair in pairs else "-"
        pairs += [pair] if pair not in pairs else []
        colour = THREE[pairs.index(pair) % len(THREE)]
        axes.plot(steps, values, style, marker="o", markersize=2.5, color=colour, label=name)
        lines.append((name.replace("->", " \u2192 "), values[-1], colour, style))
    axes.axhline(chance, color=GREY, linestyle=":", linewidth=1.5)
    lines.append(("chance", chance, GREY_TEXT, ":"))
    places = spread_labels([value for _, value, _, _ in lines], 0.058, 0, 1)
    for (name, value, colour, style), place in zip(lines, places, strict=True):
        axes.annotate(
            f"{value:.3f}  {name}",
            xy=(1, value),
            xytext=(1.09, place),
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
        ylabel=f"recall at {k}: share of queries that find their own",
        ylim=(-0.01, 1.01),
    )
    axes.set_xlim(steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1)
    return figure


def flatten_to_2d(embeddings: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """(n, M) of each modality -> (n, 2) of each, and the share of the variance that two dimensions show.

    The two directions in which all of them together vary most (PCA): one map for all, so a gap between modalities stays one.
    """
    everything = np.concatenate(list(embeddings.values())).astype(float)
    middle = everything.mean(axis=0)
    _, spread, directions = np.linalg.svd(everything - middle, full_matrices=False)
    variance = spread**2
    share = variance[:2].sum() / max(variance.sum(), np.finfo(float).tiny)
    return {
        name: (points - middle) @ directions[:2].T for name, points in embeddings.items()
    }, float(share)


def space_map(
    points: dict[str, np.ndarray], colours: np.ndarray, names: Sequence[str], title: str = ""
) -> Figure:
    """n scenes, each a point for each modality, points (n, 2), joined by grey lines.

    Coloured by a fact of the scene: colours (n, 3) in 0 .. 1, and what each is called, names (n,).
    """
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    axes = figure.subplots()
    corners = np.stack(list(points.values()), axis=1)  # (n, modalities, 2)
    axes.add_collection(
        LineCollection(
            np.concatenate([corners, corners[:, :1]], axis=1), colors=GREY, linewidths=0.7
        )
    )
    look = {"edgecolors": INK, "linewidths": 0.6}
    for marker, (name, places) in zip(MARKERS[: len(points)], points.items(), strict=True):
        axes.scatter(*places.T, s=34, marker=marker, c=colours, label=name, zorder=2, **look)
    axes.set(xticks=[], yticks=[], title=title, facecolor=PAPER)
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)
    plain = {"linestyle": "", "markeredgecolor": INK, "markersize": 7}
    kinds = [
        Line2D([], [], marker=marker, color=GREY, label=name, **plain)
        for marker, name in zip(MARKERS, points, strict=False)
    ]
    facts = sorted({name: colour for name, colour in zip(names, colours, strict=True)}.items())
    blobs = [
        Line2D([], [], marker="o", color=colour, label=name, **plain) for name, colour in facts
    ]
    figure.legend(
        handles=[*kinds, Line2D([], [], linestyle="", label=" "), *blobs],
        loc="outside right center",
        frameon=False,
    )
    return figure


def load_by_modality(loads: dict[str, np.ndarray]) -> Figure:
    """Where each modality's tokens go: loads (L, E) of each, as shares of its own; one panel for each layer."""
    L, E = next(iter(loads.values())).shape
    figure = Figure(figsize=(max(6, 0.55 * E + 1), 1.6 * L + 0.8), layout="constrained")
    panels = figure.subplots(L, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    width = 0.8 / len(loads)
    for layer, axes in enumerate(panels):
        for i, (name, load) in enumerate(loads.items()):
            share = load[layer] / max(load[layer].sum(), np.finfo(float).tiny)
            axes.bar(
                np.arange(E) + (i - (len(loads) - 1) / 2) * width,
                share,
                width,
                color=THREE[i % len(THREE)],
                label=name,
            )
        axes.axhline(
            1 / E, color="black", linestyle="--", linewidth=0.8, label=f"even share, {100 / E:.3g}%"
        )
        axes.set(ylabel=f"layer {layer}", xlim=(-0.6, E - 0.4), xticks=range(E))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        axes.tick_params(axis="x", length=0)
        axes.grid(False, axis="x")
        axes.set_axisbelow(True)
    panels[0].set_title(
        "share of a modality's tokens that each expert gets", loc="left", fontsize=11
    )
    panels[-1].set_xlabel("expert")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(loads) + 1,
        frameon=False,
    )
    return figure


# ---- what was found ----------------------------------------------------------------------------------------------------------

Cell = tuple[
    Item, str, str, bool
]  # what to draw, the caption below, the heading, whether it is the true one
SIDE, GAP, LINE = 1.5, 0.22, 0.145  # inches: a cell, the room between two, a line of its caption
LETTERS = 25  # of a caption, to a line


def balanced_lines(text: str, width: int) -> str:
    """In as few lines as this width allows, of about the same length: no last line of one word."""
    count = len(textwrap.wrap(text, width))
    return next(
        (
            "\n".join(lines)
            for w in range(1, width + 1)
            if len(lines := textwrap.wrap(text, w)) == count
        ),
        text,
    )


def draw_item(axes: Axes, item: Item, limits: tuple[float, float] = (None, None)) -> None:
    """A text in words, an image (3, Y, X) in its colours, a sound (M, F) with time to the right and low bands at the bottom."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    if isinstance(item, str):
        axes.set_facecolor(PAPER)
        words = balanced_lines(textwrap.shorten(item, 150, placeholder=" \u2026"), 20)
        axes.text(
            0.5,
            0.5,
            words,
            ha="center",
            va="center",
            fontsize=9,
            transform=axes.transAxes,
            parse_math=False,
        )
    elif item.ndim == 3:
        axes.imshow(np.clip(item, 0, 1).transpose(1, 2, 0), interpolation="nearest")
    else:
        axes.imshow(
            item,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=limits[0],
            vmax=limits[1],
        )


def draw_cell(axes: Axes, cell: Cell, limits: tuple[float, float]) -> None:
    item, caption, heading, true = cell
    draw_item(axes, item, limits)
    axes.spines[:].set(visible=true, color=ORANGE, linewidth=3)
    axes.set_title(heading, fontsize=9, color="#b0540c" if true else INK, pad=5)
    axes.set_xlabel(
        balanced_lines(caption, LETTERS), fontsize=8, color=INK, labelpad=5, parse_math=False
    )


def contact_sheet(rows: list[list[Cell]], title: str) -> Figure:
    """Cells in rows, the first column (the queries) set apart; a row is as high as its longest caption asks."""
    lines = [max(len(textwrap.wrap(cell[1], LETTERS)) for cell in row) for row in rows]
    heights = [SIDE + LINE * n + 2 * GAP for n in lines]
    sounds = [
        cell[0]
        for row in rows
        for cell in row
        if not isinstance(cell[0], str) and cell[0].ndim == 2
    ]
    limits = (min(map(np.min, sounds)), max(map(np.max, sounds))) if sounds else (None, None)
    head, foot = 1.5 * GAP * bool(title), GAP * bool(sounds)
    width, height = max(map(len, rows)) * (SIDE + GAP) + GAP, head + sum(heights) + foot
    figure = Figure(figsize=(width, height))
    for y, row in enumerate(rows):
        bottom = height - head - sum(heights[:y]) - GAP - SIDE
        for x, cell in enumerate(row):
            left = x * (SIDE + GAP) + (GAP if x else 0)
            draw_cell(
                figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height)),
                cell,
                limits,
            )
    figure.text(0, 1, title, fontsize=11, va="top", parse_math=False)
    if sounds:
        note = "sounds: time to the right, low bands at the bottom, one scale of brightness"
        figure.text(0, 0, note, fontsize=8, color=GREY_TEXT)
    return figure


def cells_of(results: Sequence[Result], true: int | None) -> list[Cell]:
    cells = []
    for rank, (item, caption, score) in enumerate(results):
        heading = f"{rank + 1}.  {score:.2f}" + ("  the true one" if rank == true else "")
        cells.append(
            (caption, "", heading, rank == true)
            if item is None
            else (item, caption, heading, rank == true)
        )
    return cells


def neighbours(
    rows: Sequence[tuple[Item, str, Sequence[Result], int | None]], title: str = ""
) -> Figure:
    """A contact sheet of several queries: in each row a query, its caption, its nearest, and which of them is the true one."""
    return contact_sheet(
        [
            [(query, caption, "query", False), *cells_of(found, true)]
            for query, caption, found, true in rows
        ],
        title,
    )
