"""Draw figures about quantised and distilled models from arrays. Nothing here knows models.

Shapes: n numbers of a histogram.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from nanods.plots import BLUE, COLOURS, GREY, ORANGE

Line = tuple[Sequence[float], Sequence[float]]  # x and y
FORMAT_COLOURS = {"fp32": GREY, "bf16": ORANGE, "INT8": BLUE}


def speed_against_width(
    panels: dict[str, dict[str, Line]], labels: dict[str, str], title: str
) -> Figure:
    """Draw how many times as fast as fp32 each format is, against the width: a panel each batch.

    panels: lines (widths, times as fast) by format, by the panel's title. `labels` by format.
    """
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    axes_list = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, lines) in zip(axes_list, panels.items(), strict=True):
        for name, (widths, ratios) in lines.items():
            colour = FORMAT_COLOURS.get(name)
            axes.plot(widths, ratios, "o-", color=colour, label=labels.get(name, name))
        axes.axhline(1, color=GREY, linestyle="--", linewidth=1, label="fp32")
        axes.set(xlabel="width C of a layer C \u2192 4 C", title=panel, xscale="log")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
    figure.suptitle(title)
    axes_list[0].set_ylabel("times as fast as fp32")
    axes_list[0].set_ylim(bottom=0)
    figure.legend(
        *axes_list[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(lines) + 1,
        frameon=False,
    )
    return figure


def error_against_bits(
    lines: dict[str, Line], ylabel: str, title: str, bound: float | None = None
) -> Figure:
    """Draw what rounding costs, on a logarithmic axis, against the bits of the weights.

    Values of 0 or less are drawn at the bottom of the axis. `bound`: a height to mark.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    smallest = min((y for _, ys in lines.values() for y in ys if y > 0), default=1e-3) / 2
    every_bits = set()
    for (name, (bits, losses)), colour in zip(lines.items(), COLOURS, strict=False):
        shown = [max(smallest, loss) for loss in losses]
        axes.plot(bits, shown, "o-", color=colour, label=name)
        every_bits |= set(bits)
    if bound is not None:
        axes.axhline(bound, color=GREY, linestyle="--", linewidth=1, label=f"{bound:g}")
    axes.set(xlabel="bits of the weights", ylabel=ylabel, yscale="log", title=title)
    axes.set_xticks(sorted(every_bits))
    axes.invert_xaxis()
    axes.legend(frameon=False)
    return figure


def size_against_quality(
    points: dict[str, dict[str, tuple[float, float]]], ylabel: str, title: str
) -> Figure:
    """Draw (MiB, quality) of each format of each model, a model's formats joined by a line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    markers = {}
    colours = [colour for colour in COLOURS if colour != GREY]  # grey: the legend of the markers
    for (model, formats), colour in zip(points.items(), colours, strict=False):
        sizes, qualities = zip(*formats.values(), strict=True)
        axes.plot(sizes, qualities, "-", color=colour, linewidth=1, label=model)
        for (name, (size, quality)), marker in zip(formats.items(), "osD^v", strict=False):
            axes.plot([size], [quality], marker, color=colour, markersize=6)
            markers[name] = marker
    for name, marker in markers.items():
        axes.plot([], [], marker, color=GREY, label=name)
    axes.set(xlabel="size of the weights (MiB)", ylabel=ylabel, xscale="log", title=title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    return figure


def rounding_histograms(
    values: dict[str, np.ndarray], rounded: dict[str, dict[str, np.ndarray]]
) -> Figure:
    """Draw the distribution of numbers, and of the integers that they become: a row for each kind.

    values (n,) by kind, such as "weights"; integers (n,) by the panel's title, by kind.
    """
    rows, columns = len(values), 1 + max(len(panels) for panels in rounded.values())
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, (kind, before) in zip(grid, values.items(), strict=True):
        share = np.full(len(before), 1 / len(before))
        row[0].hist(before, bins=101, color=GREY, weights=share)
        row[0].set(title=f"{kind}, in floats", ylabel="share of all, each bar")
        for axes, (title, integers) in zip(row[1:], rounded[kind].items(), strict=False):
            levels, counts = np.unique(integers, return_counts=True)
            axes.bar(levels, counts / len(integers), width=1, color=BLUE)
            zeros = (integers == 0).mean()
            axes.set_title(f"{title}\n{len(levels)} integers, {zeros:.0%} of all are 0")
        for axes in row:
            axes.set_yscale("log")
            axes.title.set_fontsize(9)
        for axes in row[1 + len(rounded[kind]) :]:
            axes.set_visible(False)
    return figure


# ---- lesson 06 -----------------------------------------------------------------------------------


def number_lines(
    grids: dict[str, np.ndarray],
    title: str,
    numbers: np.ndarray | None = None,
    limit: float | None = None,
) -> Figure:
    """Draw the numbers that each format has, as ticks on a line, between -limit and limit.

    `numbers` (n,) are drawn as dots on each line, joined to the tick that is nearest.
    """
    figure = Figure(figsize=(9, 0.8 * len(grids) + 1.2), layout="constrained")
    axes = figure.subplots()
    limit = limit or max(float(np.abs(grid).max()) for grid in grids.values())
    for y, (_name, grid) in enumerate(grids.items()):
        shown = grid[np.abs(grid) <= limit]
        axes.plot([-limit, limit], [y, y], color=GREY, linewidth=0.7)
        axes.plot(shown, np.full(len(shown), y), "|", color=BLUE, markersize=14)
        if numbers is not None:
            nearest = grid[np.abs(grid[None] - numbers[:, None]).argmin(axis=1)]
            for number, tick in zip(numbers, nearest, strict=True):
                axes.plot([number, tick], [y - 0.35, y], "-", color=ORANGE, linewidth=0.8)
            axes.plot(numbers, np.full(len(numbers), y - 0.35), "o", color=ORANGE, markersize=4)
    axes.set(yticks=range(len(grids)), yticklabels=list(grids), ylim=(len(grids) - 0.5, -0.7))
    axes.set(xlabel="value", title=title)
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure
