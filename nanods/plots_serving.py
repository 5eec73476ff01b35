"""Draw figures about serving from arrays.

Shapes: n requests, N scores of a stream.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from nanods.plots import BLUE, COLOURS, GREY, ORANGE, label_below

PADDING = "#f0b78a"
Stay = tuple[str, int, int, int]  # a request's name, its slot, and its first and last step there


def slots_over_time(panels: dict[str, Sequence[Stay]], slots: int, xlabel: str) -> Figure:
    """Draw which request has which slot in which step; one panel below another, by title.

    A free slot stays white.
    """
    size = (7, len(panels) * (0.26 * slots + 0.6) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    last = max(end for stays in panels.values() for *_, end in stays)
    for axes, (title, stays) in zip(grid, panels.items(), strict=True):
        for number, (name, slot, first, end) in enumerate(stays):
            colour = (BLUE, "#7fa8d6")[number % 2]
            width = end + 1 - first
            axes.barh(slot, width, left=first, height=0.8, color=colour, edgecolor="white")
            if width >= 0.02 * last * max(1, len(name) - 1):
                middle = first + width / 2
                axes.text(middle, slot, name, ha="center", va="center", fontsize=8, color="white")
        axes.set(ylabel="slot", title=title, yticks=range(slots), ylim=(slots - 0.5, -0.5))
        axes.tick_params(axis="y", labelsize=7 if slots > 4 else 9)
        axes.grid(False)
    grid[-1].set(xlabel=xlabel, xlim=(0, last + 1))
    return figure


def step_costs(panels: dict[str, Sequence[float]], ylabel: str, xlabel: str) -> Figure:
    """Draw a bar for each step, one panel for each title, on the same axes."""
    figure = Figure(figsize=(7, 1.7 * len(panels) + 0.4), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, costs), colour in zip(grid, panels.items(), COLOURS, strict=False):
        axes.bar(range(len(costs)), costs, width=0.9, color=colour)
        axes.set(title=title, ylabel=ylabel)
    grid[-1].set_xlabel(xlabel)
    return figure


def context_lengths(lines: dict[str, tuple[Sequence[int], Sequence[int]]], limit: int) -> Figure:
    """Draw how many tokens of context each request holds, step by step, and the limit."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, (steps, lengths)), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(steps, lengths, "o-", markersize=2.5, linewidth=1, color=colour, label=name)
    axes.axhline(limit, color=GREY, linestyle="--", linewidth=1)
    axes.annotate("the context is full", (0, limit), (2, 3), textcoords="offset points", fontsize=8)
    axes.set(xlabel="step of the engine", ylabel="tokens of context", ylim=(0, 1.15 * limit))
    axes.set_title("Each row forgets when its own context is full, and no other row waits")
    figure.legend(loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


def alarm_levels(
    panels: dict[str, tuple[np.ndarray, float]], change: int, before: str, after: str
) -> Figure:
    """Draw the cumulative sums (N,) of one stream by several settings, each beside its threshold.

    panels: sums and threshold by title. `change`: the request from which on the traffic is another;
    `before` and `after` say what it is.
    """
    figure = Figure(figsize=(7, 2.2 * len(panels) + 0.3), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, (sums, threshold)) in zip(grid, panels.items(), strict=True):
        axes.plot(sums, linewidth=0.7, color=BLUE)
        axes.axhline(threshold, color=ORANGE, linestyle="--", linewidth=1.2)
        axes.axvline(change, color=GREY, linestyle=":", linewidth=1.5)
        axes.set(title=title, ylabel="sum (deviations)", ylim=(0, 1.3 * threshold))
        for x, text, side in ((0, "threshold", "left"), (change, before, "right")):
            axes.annotate(
                text,
                (x, 1.03 * threshold),
                (4 if side == "left" else -4, 1),
                textcoords="offset points",
                ha=side,
                fontsize=8,
                color=ORANGE if text == "threshold" else "black",
            )
        axes.annotate(
            after, (change, 1.03 * threshold), (4, 1), textcoords="offset points", fontsize=8
        )
    grid[-1].set_xlabel("request")
    return figure


def grouped_bars(groups: dict[str, dict[str, float]], ours: str, xlabel: str, title: str) -> Figure:
    """Draw a group of bars with their values, one bar for each way, from top to bottom. The way
    `ours` is blue."""
    ways = list(next(iter(groups.values())))
    figure = Figure(figsize=(7, 0.24 * len(groups) * (len(ways) + 1) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(ways)
    others = iter((GREY, ORANGE, COLOURS[3], COLOURS[4]))
    for i, way in enumerate(ways):
        colour = BLUE if way == ours else next(others)
        places = np.arange(len(groups)) + (i - (len(ways) - 1) / 2) * height
        drawn = axes.barh(places, [row[way] for row in groups.values()], height, color=colour)
        drawn.set_label(way)
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set(yticks=range(len(groups)), yticklabels=list(groups), xlabel=xlabel, title=title)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.grid(False)
    figure.legend(loc="outside lower center", ncols=len(ways), frameon=False)
    return figure


def padded_batches(batches: dict[str, Sequence[Sequence[int]]], height: int) -> Figure:
    """Draw batches of texts, one panel for each title: a line for each text, its tokens blue and
    its padding orange; batches are separated by a gap.

    batches: for each panel the lengths of the texts of each batch.
    """
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    grid = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, (title, parts) in zip(grid, batches.items(), strict=True):
        y = 0.0
        for part in parts:
            rows = y + np.arange(len(part))
            axes.barh(rows, max(part), height=0.9, color=PADDING)
            axes.barh(rows, part, height=0.9, color=BLUE)
            y += len(part) + 1.5
        axes.set(xlabel="tokens", title=title)
        axes.grid(False)
    grid[0].set(ylabel="texts, batch by batch", yticks=[], ylim=(height, -1))
    label_below(figure, {"tokens": BLUE, "padding, computed too": PADDING})
    return figure


def placements(table: dict[str, dict[str, float]], memory: dict[str, float], title: str) -> Figure:
    """Draw the gigabytes that each placement stores on each device, orange if they are more than
    the device can hold, which is dashed.

    table: bytes by device, by the placement's name. memory: bytes that a device holds.
    """
    figure = Figure(figsize=(7, 0.45 * len(table) + 1.3), layout="constrained")
    grid = figure.subplots(1, len(memory), sharey=True, squeeze=False)[0]
    for axes, (device, limit), colour in zip(grid, memory.items(), (BLUE, COLOURS[3]), strict=True):
        sizes = [row.get(device, 0) / 1e9 for row in table.values()]
        over = [size > limit / 1e9 for size in sizes]
        drawn = axes.barh(range(len(table)), sizes, color=[ORANGE if x else colour for x in over])
        axes.bar_label(drawn, fmt="{:,.1f}", padding=3, fontsize=9)
        if limit < 1.4e9 * max(sizes):
            axes.axvline(limit / 1e9, color=GREY, linestyle="--", linewidth=1.2)
        axes.set(xlabel=f"GB on {device}, which holds {limit / 1e9:,.0f}")
        axes.set(yticks=range(len(table)), yticklabels=list(table), ylim=(len(table) - 0.5, -0.5))
        axes.margins(x=0.2)
        axes.locator_params(axis="x", nbins=4, prune="upper")
        axes.grid(False)
    figure.suptitle(title, fontsize=11)
    return figure
