"""The pictures of one run by many devices, from arrays; knows nothing of meshes, planners or files of metrics.

Shapes: n processes, G devices in a group, R groups.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanods.plots import BLUE, COLOURS, GREY, ORANGE

Rows = dict[str, dict[str, float]]  # bars by name, each made of parts by name
SPLIT = {"computing": BLUE, "waiting": "#e3c26b", "communication": ORANGE, "optimizer": "#4b9e6a"}


# ---- bars made of parts ------------------------------------------------------------------------------------------------------


def stacked(
    axes: Axes, rows: Rows, colours: dict[str, str], max_shown: float, written: dict[str, str]
) -> None:
    """A horizontal bar for each row, part after part, cut off at `max_shown` with an arrow; what is `written` stands at its end."""
    for y, (name, parts) in enumerate(rows.items()):
        left = 0.0
        for part, size in parts.items():
            if size > 0 and left < max_shown:
                axes.barh(
                    y, min(size, max_shown - left), left=left, height=0.62, color=colours[part]
                )
            left += size
        cut = left > max_shown * (1 + 1e-9)
        label = ("\u2192 " if cut else "") + written[name]
        box = {
            "facecolor": "white",
            "edgecolor": "none",
            "pad": 1.5,
        }  # over the line that may pass behind it
        axes.text(
            min(left, max_shown) + 0.012 * max_shown, y, label, va="center", fontsize=9, bbox=box
        )
    names = [part for part in colours if any(parts.get(part, 0) > 0 for parts in rows.values())]
    handles = [Rectangle((0, 0), 1, 1, color=colours[part]) for part in names]
    axes.figure.legend(
        handles, names, frameon=False, ncols=len(names), loc="outside upper center", fontsize=9
    )
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)


def memory_bars(rows: Rows, capacity: float, max_shown: float | None = None) -> Figure:
    """GB on each device by mesh and kind, and what a device has capacity for; longer bars than `max_shown` are cut off."""
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    colours = dict(zip(kinds, COLOURS, strict=False))
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    max_shown = max_shown or max([capacity, *totals.values()])
    stacked(
        axes, rows, colours, max_shown, {name: f"{total:,.4g} GB" for name, total in totals.items()}
    )
    axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
    axes.set(
        xlabel=f"GB on each device; dashed: capacity, {capacity:,.3g}",
        xlim=(0, 1.16 * max_shown),
    )
    return figure


def step_bars(rows: Rows, hidden: dict[str, float] | None = None, unit: str = "s") -> Figure:
    """Where a step's seconds go, by mesh: computing, waiting, communication; `hidden`: sent meanwhile, a thin line below."""
    figure = Figure(figsize=(10, 0.55 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    totals, hidden = {name: sum(parts.values()) for name, parts in rows.items()}, hidden or {}
    written = {
        name: f"{total:.3g} {unit}, {parts['computing'] / total:.0%} computing"
        for (name, parts), total in zip(rows.items(), totals.values(), strict=True)
    }
    max_shown = max(totals.values())
    stacked(axes, rows, SPLIT, max_shown, written)
    for y, name in enumerate(rows):
        if hidden.get(name, 0) > 0:
            axes.plot(
                [0, hidden[name]], [y + 0.39] * 2, color=ORANGE, linewidth=2, solid_capstyle="butt"
            )
    note = (
        f"; thin line: sent behind the computing, up to {max(hidden.values()):.3g} {unit}"
        if any(hidden.values())
        else ""
    )
    axes.set(xlabel=f"a step, {unit}{note}", xlim=(0, 1.3 * max_shown))
    return figure


# ---- against the number of GPUs ----------------------------------------------------------------------------------------------


def gpu_scaling(
    lines: dict[str, list[tuple[int, float, float, bool]]], capacity: float, workload: str
) -> Figure:
    """Named lines of (GPUs, hours, GB on each, whether it fits), hollow where it does not; `workload` takes so many hours."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for (name, points), colour in zip(
        lines.items(), (c for c in COLOURS if c != GREY), strict=False
    ):
        n, hours, gb, fits = (np.array(column) for column in zip(*points, strict=True))
        for axes, y in zip(panels, (hours, n * hours, gb), strict=True):
            axes.plot(n, y, "-", color=colour, linewidth=1, alpha=0.6)
            axes.plot(n[fits], y[fits], "o", color=colour, markersize=5)
            axes.plot(n[~fits], y[~fits], "o", markerfacecolor="white", color=colour, markersize=5)
        panels[0].plot([], [], "o-", color=colour, markersize=5, label=name)
    panels[0].plot(
        [],
        [],
        "o",
        markerfacecolor="white",
        color="black",
        markersize=5,
        label="hollow: does not fit",
    )
    panels[2].axhline(capacity, color="black", linestyle="--", linewidth=1)
    panels[2].annotate(
        f"capacity: {capacity:.3g} GB",
        (1, capacity),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=9,
    )
    every = sorted({n for points in lines.values() for n, *_ in points})
    for axes, title in zip(
        panels,
        (f"hours for {workload}", "GPU-hours: level is perfect", "GB on each GPU"),
        strict=True,
    ):
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=title)
        axes.set_xticks(every, [f"{n:,}" for n in every], rotation=45, fontsize=8)
        axes.set_xticks([], minor=True)
    panels[1].set(yscale="linear", ylim=(0, None))
    figure.legend(frameon=False, ncols=len(lines) + 1, loc="outside lower center")
    return figure


# ---- a ring, step by step ----------------------------------------------------------------------------------------------------


def ring_steps(held: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    """How many processes' numbers are in each chunk (n, n), process by chunk, after each step; framed: what just arrived."""
    n = len(held[0])
    columns = min(len(held), 4)
    down = -(-len(held) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.75 * down), layout="constrained")
    panels = list(figure.subplots(down, columns, squeeze=False).flat)
    for i, (axes, title) in enumerate(zip(panels, titles, strict=False)):
        axes.imshow(held[i], cmap="Blues", vmin=0, vmax=1.4 * n)
        for (row, column), count in np.ndenumerate(held[i]):
            dark = count > 0.8 * n
            axes.text(
                column,
                row,
                f"{count:.0f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
            if i and held[i - 1][row, column] != count:
                axes.add_patch(
                    Rectangle(
                        (column - 0.46, row - 0.46),
                        0.92,
                        0.92,
                        fill=False,
                        color=ORANGE,
                        linewidth=2,
                    )
                )
        axes.set_title(title, fontsize=10)
        axes.set(
            xticks=range(n),
            yticks=range(n),
            xlabel="chunk",
            ylabel="process" if i % columns == 0 else "",
        )
        axes.grid(False)
    for axes in panels[len(held) :]:
        axes.set_visible(False)
    return figure


# ---- who waits for whom ------------------------------------------------------------------------------------------------------


def busy_heatmap(shares: dict[str, np.ndarray]) -> Figure:
    """For each device of R groups of G, (R, G), its busy time as a share of the step's: the darkest are waited for."""
    figure = Figure(figsize=(5.4 * len(shares) + 0.8, 5.2), layout="constrained")
    panels = figure.subplots(1, len(shares), squeeze=False)[0]
    for axes, (name, share) in zip(panels, shares.items(), strict=True):
        image = axes.imshow(
            share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"{name}: busy {share.mean():.0%} of the step", fontsize=11)
        axes.set(xlabel="device of its group (its experts)", ylabel="group")
        axes.set_xticks(range(0, share.shape[1], max(1, share.shape[1] // 8)))
        axes.grid(False)
    figure.colorbar(image, ax=panels, pad=0.01, label="busy, of the step")
    return figure
