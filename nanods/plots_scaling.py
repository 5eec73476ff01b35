"""Draw figures about training on many devices from arrays. Nothing here knows meshes or planners.

Shapes: n processes, G devices in a group, R groups.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanods.plots import BLUE, COLOURS, GREY, ORANGE, label_below

Rows = dict[str, dict[str, float]]  # stacked bars: the sizes of the parts by name, by bar
STEP_COLOURS = {
    "computing": BLUE,
    "waiting": "#e3c26b",
    "communication": ORANGE,
    "optimizer": "#4b9e6a",
}


def activation_curves(saved: Sequence[float], backward: Sequence[float], width: int) -> Figure:
    """Draw the activations of a token through forward and backward, without checkpointing and with.

    saved, backward: bytes per token of each block that it saves, and of the gradients while its
    backward pass runs. A block's input has 4 width bytes.
    """
    B = len(saved)
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, checkpointing in zip(panels, (False, True), strict=True):
        kept = [4 * width if checkpointing else each for each in saved]
        forward = np.cumsum(kept)
        during = []  # while each block's backward pass runs, the last block first
        for b in reversed(range(B)):
            again = saved[b] if checkpointing else 0
            during.append(sum(kept[: b + 1]) + again + backward[b])
        heights = np.array([*forward, *during]) / 1e3
        colours = [BLUE] * B + [ORANGE] * B
        axes.bar(range(2 * B), heights, width=0.9, color=colours)
        axes.axhline(heights.max(), color="black", linestyle="--", linewidth=1)
        title = "with checkpointing" if checkpointing else "all is saved"
        axes.set_title(f"{title}: at most {heights.max():,.0f} kB per token", fontsize=11)
        middle = B // 2
        ticks = {0: 0, middle: middle, 2 * B - 1 - middle: middle, 2 * B - 1: 0}
        axes.set(xticks=list(ticks), xticklabels=list(ticks.values()))
        axes.set(xlabel="block (blue: forward, orange: backward)")
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("kB per token")
    return figure


def step_timelines(cases: dict[str, tuple[float, float, float]]) -> Figure:
    """Draw when a GPU computes, waits and sends: (computing, waiting, hidden) seconds by title."""
    figure = Figure(figsize=(9, 0.95 * len(cases) + 1.1), layout="constrained")
    axes = figure.subplots()
    for i, (computing, waiting, hidden) in enumerate(cases.values()):
        whole = max(computing + waiting, hidden)
        axes.barh(i - 0.2, computing, height=0.36, color=STEP_COLOURS["computing"])
        axes.barh(i - 0.2, waiting, left=computing, height=0.36, color=STEP_COLOURS["waiting"])
        axes.barh(i + 0.2, hidden, height=0.36, color=STEP_COLOURS["communication"])
        axes.plot([whole, whole], [i - 0.45, i + 0.45], color="black", linewidth=1.5)
        axes.text(whole, i, f"  step: {whole:.3g} s", va="center", fontsize=9)
    labels = {
        "computing": STEP_COLOURS["computing"],
        "waiting for what is sent": STEP_COLOURS["waiting"],
        "sent beside (hidden)": STEP_COLOURS["communication"],
    }
    label_below(figure, labels)
    longest = max(max(c + w, h) for c, w, h in cases.values())
    axes.set(yticks=range(len(cases)), yticklabels=list(cases), ylim=(len(cases) - 0.5, -0.5))
    axes.set(xlabel="seconds", xlim=(0, 1.2 * longest))
    axes.grid(axis="y", visible=False)
    axes.set_title("Hidden communication takes no time until there is more of it than of the rest")
    return figure


# ---- stacked bars --------------------------------------------------------------------------------


def stacked_bars(
    axes: Axes, rows: Rows, colours: dict[str, str], max_shown: float, labels: dict[str, str]
) -> None:
    """Draw a horizontal stacked bar for each row, with its label at the end.

    Bars longer than `max_shown` are cut off there and marked with an arrow.
    """
    for y, (name, parts) in enumerate(rows.items()):
        left = 0.0
        for part, size in parts.items():
            if size > 0 and left < max_shown:
                length = min(size, max_shown - left)
                axes.barh(y, length, left=left, height=0.62, color=colours[part])
            left += size
        is_cut = left > max_shown * (1 + 1e-9)
        label = ("\u2192 " if is_cut else "") + labels[name]
        x = min(left, max_shown) + 0.012 * max_shown
        # The white box covers vertical lines behind the label.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(x, y, label, va="center", fontsize=9, bbox=box)
    shown = [part for part in colours if any(parts.get(part, 0) > 0 for parts in rows.values())]
    handles = [Rectangle((0, 0), 1, 1, color=colours[part]) for part in shown]
    axes.figure.legend(
        handles, shown, frameon=False, ncols=len(shown), loc="outside upper center", fontsize=9
    )
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)


def memory_bars(
    rows: Rows, capacity: float, max_shown: float | None = None, title: str = ""
) -> Figure:
    """Draw the memory of each device in GB: the sizes of its parts (weights, ...) by mesh.

    A dashed line marks the device's capacity in GB. Bars longer than `max_shown` are cut off.
    """
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for parts in rows.values() for kind in parts))
    colours = dict(zip(kinds, COLOURS, strict=False))
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    labels = {name: f"{total:,.4g} GB" for name, total in totals.items()}
    max_shown = max_shown or max([capacity, *totals.values()])
    stacked_bars(axes, rows, colours, max_shown, labels)
    axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
    axes.set(
        xlabel=f"GB per device (dashed line: its capacity, {capacity:,.3g} GB)",
        xlim=(0, 1.16 * max_shown),
        title=title,
    )
    return figure


def step_bars(
    rows: Rows, hidden: dict[str, float] | None = None, unit: str = "s", title: str = ""
) -> Figure:
    """Draw how the time of a step splits into computing, waiting, communication and optimizer.

    rows: times in `unit` by part, by mesh. `hidden`: communication that overlaps with computing,
    by mesh, drawn as a thin line below the bar.
    """
    figure = Figure(figsize=(10, 0.55 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    hidden = hidden or {}
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    labels = {}
    for name, total in totals.items():
        labels[name] = f"{total:.3g} {unit}, {rows[name]['computing'] / total:.0%} computing"
    max_shown = max(totals.values())
    stacked_bars(axes, rows, STEP_COLOURS, max_shown, labels)
    for y, name in enumerate(rows):
        if hidden.get(name, 0) > 0:
            line = {"color": ORANGE, "linewidth": 2, "solid_capstyle": "butt"}
            axes.plot([0, hidden[name]], [y + 0.39] * 2, **line)
    xlabel = f"time of a step, {unit}"
    if any(hidden.values()):
        longest = max(hidden.values())
        xlabel += f" (thin line: communication during computing, up to {longest:.3g} {unit})"
    axes.set(xlabel=xlabel, xlim=(0, 1.3 * max_shown), title=title)
    return figure


# ---- scaling with the number of GPUs -------------------------------------------------------------


def gpu_scaling(
    lines: dict[str, list[tuple[int, float, float, bool]]],
    capacity: float,
    workload: str,
    suptitle: str = "",
) -> Figure:
    """Draw hours, GPU-hours and memory per GPU against the number of GPUs.

    lines: points (GPUs, hours, GB per GPU, whether it fits) by name; points that do not fit are
    hollow. `capacity` is a GPU's memory in GB; `workload` names what takes that many hours.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    hours_axes, gpu_hours_axes, memory_axes = panels
    colours = [colour for colour in COLOURS if colour != GREY]
    for (name, points), colour in zip(lines.items(), colours, strict=False):
        n, hours, gb, fits = (np.array(column) for column in zip(*points, strict=True))
        for axes, y in zip(panels, (hours, n * hours, gb), strict=True):
            axes.plot(n, y, "-", color=colour, linewidth=1, alpha=0.6)
            axes.plot(n[fits], y[fits], "o", color=colour, markersize=5)
            axes.plot(n[~fits], y[~fits], "o", markerfacecolor="white", color=colour, markersize=5)
        hours_axes.plot([], [], "o-", color=colour, markersize=5, label=name)
    hollow = {"markerfacecolor": "white", "color": "black", "markersize": 5}
    hours_axes.plot([], [], "o", label="hollow: does not fit", **hollow)
    memory_axes.axhline(capacity, color="black", linestyle="--", linewidth=1)
    memory_axes.annotate(
        f"capacity: {capacity:.3g} GB",
        (1, capacity),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=9,
    )
    counts = sorted({n for points in lines.values() for n, *_ in points})
    titles = (f"hours for {workload}", "GPU-hours (level: perfect scaling)", "GB per GPU")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=title)
        axes.set_xticks(counts, [f"{n:,}" for n in counts], rotation=45, fontsize=8)
        axes.set_xticks([], minor=True)
    gpu_hours_axes.set(yscale="linear", ylim=(0, None))
    figure.legend(frameon=False, ncols=len(lines) + 1, loc="outside lower center")
    figure.suptitle(suptitle, fontsize=12)
    return figure


# ---- ring all-reduce -----------------------------------------------------------------------------


def ring_steps(states: Sequence[np.ndarray], titles: Sequence[str], title: str = "") -> Figure:
    """Draw the state of a ring all-reduce after each step, one panel each.

    states: (n, n), process by chunk: the number of processes whose values the chunk contains.
    Chunks that changed in the step have a frame.
    """
    n = len(states[0])
    columns = min(len(states), 4)
    rows = -(-len(states) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.75 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for i, (axes, state, name) in enumerate(zip(panels, states, titles, strict=False)):
        axes.imshow(state, cmap="Blues", vmin=0, vmax=1.4 * n)
        for (process, chunk), count in np.ndenumerate(state):
            colour = "white" if count > 0.8 * n else "black"
            axes.text(chunk, process, f"{count:.0f}", ha="center", va="center", color=colour)
            if i > 0 and states[i - 1][process, chunk] != count:
                corner = (chunk - 0.46, process - 0.46)
                frame = Rectangle(corner, 0.92, 0.92, fill=False, color=ORANGE, linewidth=2)
                axes.add_patch(frame)
        axes.set_title(name, fontsize=10)
        ylabel = "process" if i % columns == 0 else ""
        axes.set(xticks=range(n), yticks=range(n), xlabel="chunk", ylabel=ylabel)
        axes.grid(False)
    for axes in panels[len(states) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


# ---- load imbalance ------------------------------------------------------------------------------


def busy_heatmap(shares: dict[str, np.ndarray]) -> Figure:
    """Draw the busy time of each device as a fraction of a layer's: (R groups, G devices) by title.

    The other devices of a group wait for the darkest one.
    """
    figure = Figure(figsize=(5.4 * len(shares) + 0.8, 5.2), layout="constrained")
    panels = figure.subplots(1, len(shares), squeeze=False)[0]
    for axes, (name, share) in zip(panels, shares.items(), strict=True):
        image = axes.imshow(
            share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"{name}: busy {share.mean():.0%} of the time", fontsize=11)
        axes.set(xlabel="device of its group (its experts)", ylabel="group")
        axes.set_xticks(range(0, share.shape[1], max(1, share.shape[1] // 8)))
        axes.grid(False)
    figure.colorbar(
        image, ax=panels, pad=0.01, label="fraction of the layer's time that it is busy"
    )
    return figure
