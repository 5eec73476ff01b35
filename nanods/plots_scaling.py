"""Draw figures about training on many devices from arrays. Nothing here knows meshes or planners.

Shapes: n processes, G devices in a group, R groups.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanods.plots import BLUE, COLOURS, GREY, ORANGE, draw_arrow, draw_box, draw_chain, label_below

HELD, ELSEWHERE = "#9ec5e8", "white"  # a process has a part of the weights or tokens, or has not
Rows = dict[str, dict[str, float]]  # stacked bars: the sizes of the parts by name, by bar
STEP_COLOURS = {
    "computing": BLUE,
    "waiting": "#e3c26b",
    "communication": ORANGE,
    "optimizer": "#4b9e6a",
}


# ---- diagrams ------------------------------------------------------------------------------------


def draw_cells(axes: Axes, x: float, y: float, held: np.ndarray) -> None:
    """Draw a grid of cells (rows, columns) with its upper left corner at (x, y), coloured where
    `held` is true."""
    for (row, column), is_held in np.ndenumerate(held):
        corner = (x + 0.5 * column, y - 0.5 * (row + 1))
        colour = HELD if is_held else ELSEWHERE
        cell = Rectangle(corner, 0.5, 0.5, facecolor=colour, edgecolor="#7d8590", linewidth=1)
        axes.add_patch(cell)


def splits_diagram() -> Figure:
    """Draw what each of two processes keeps and reads by dp, fsdp, tp and ep, and what it sends."""
    full = np.ones((4, 4), bool)
    rows, columns = full.copy(), full.copy()
    rows[2:], columns[:, 2:] = False, False
    experts = full.copy()
    experts[1:, 2:] = False  # the first row stands for all other weights
    half = np.array([[True, True, False, False]])
    splits = {  # the weights and the tokens of process 0, where process 1 has the others
        "dp": (full, half, "gradients,\nonce a step"),
        "fsdp": (rows, half, "weights before each layer,\ngradients after it"),
        "tp": (columns, full[:1], "sums of activations,\n2 a block each way"),
        "ep": (experts, half, "each token's rows to its\nexperts, and back"),
    }
    figure = Figure(figsize=(10, 4.1))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    for i, (name, (weights, tokens, sent)) in enumerate(splits.items()):
        left = 5.6 * i
        axes.text(left + 2.25, 4.1, name, ha="center", fontsize=13, fontweight="bold")
        for process in range(2):
            x = left + 2.5 * process
            other_weights = np.flip(weights, axis=0 if name == "fsdp" else 1)
            draw_cells(axes, x, 3.2, other_weights if process else weights)
            draw_cells(axes, x, 0.6, np.flip(tokens) if process else tokens)
            axes.text(x + 1, 3.4, f"process {process}", ha="center", fontsize=9)
        axes.text(left + 2.25, -0.35, f"sends {sent}", ha="center", va="top", fontsize=9)
    for y, text in ((2.2, "weights"), (0.35, "tokens")):
        axes.text(-0.3, y, text, ha="right", va="center", fontsize=10)
    axes.text(-0.3, 2.95, "ep: outside\nthe experts", ha="right", va="center", fontsize=7.5)
    axes.set(xlim=(-2.3, 21.6), ylim=(-1.6, 4.7))
    axes.axis("off")
    return figure


def tensor_parallel_diagram() -> Figure:
    """Draw an MLP that two of n processes share, with the shapes of what they compute."""
    figure = Figure(figsize=(10, 3.1))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    for y, process, part in ((1.6, "process 0", "0"), (0.0, "process n - 1", "n-1")):
        boxes = [
            (0.6, "all tokens x\n(N, C)", False, 1.5),
            (3.0, f"up$_{{{part}}}$\n(H/n, C)", True, 1.3),
            (5.5, "relu()$^2$", False, 1.1),
            (7.9, f"out$_{{{part}}}$\n(C, H/n)", True, 1.3),
        ]
        draw_chain(axes, y, boxes, ["", "(N, H/n)", "(N, H/n)"])
        axes.text(-0.4, y + 0.55, process, ha="left", fontsize=9, fontweight="bold")
        draw_arrow(axes, (8.58, y), (9.95, 0.8 + 0.3 * np.sign(y - 0.8)))
        label_y = y + (0.12 if y > 0.8 else -0.12)
        va = "bottom" if y > 0.8 else "top"
        axes.text(9.2, label_y, "term (N, C)", ha="left", va=va, fontsize=9)
    for x in (0.6, 3.0, 5.5, 7.9):
        axes.text(x, 0.8, "...", ha="center", va="center", fontsize=12, color="#7d8590")
    draw_box(axes, 10.6, 0.8, "sum:\nall-reduce", True, 1.3, 0.8)
    draw_arrow(axes, (11.28, 0.8), (11.85, 0.8))
    draw_box(axes, 12.4, 0.8, "y\n(N, C)", False, 1.05, 0.8)
    axes.set(xlim=(-0.6, 13.1), ylim=(-0.7, 2.6))
    axes.axis("off")
    return figure


def expert_parallel_diagram() -> Figure:
    """Draw a layer of experts that two of n processes share, with the shapes of what is sent."""
    figure = Figure(figsize=(10, 3.1))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    for y, process, owned in ((1.6, "process 0", "first"), (0.0, "process n - 1", "last")):
        boxes = [
            (0.5, "own tokens\n(N, C)", False, 1.4),
            (2.9, "choose experts,\nsort the rows", True, 1.7),
            (6.5, f"the {owned} E/n\nexperts", True, 1.5),
            (10.4, "weighted sum\nof each token", True, 1.7),
            (12.6, "y\n(N, C)", False, 1.0),
        ]
        draw_chain(axes, y, boxes, ["", None, None, ""])
        axes.text(-0.25, y + 0.55, process, ha="left", fontsize=9, fontweight="bold")
        for other in (1.6, 0.0):  # both all-to-alls
            draw_arrow(axes, (3.78, y), (5.72, other))
            draw_arrow(axes, (7.28, y), (9.52, other))
    for x, text in (
        (4.75, "all-to-all\nrows (N K, C)"),
        (6.5, "received (R, C)"),
        (8.4, "all-to-all\noutputs (N K, C)"),
    ):
        y = 2.1 if "all" in text else 0.8
        axes.text(x, y, text, ha="center", va="bottom" if y > 1 else "center", fontsize=9)
    axes.set(xlim=(-0.4, 13.3), ylim=(-0.7, 2.8))
    axes.axis("off")
    return figure


def plan_diagram() -> Figure:
    """Draw what a plan is computed from, and in which order."""
    figure = Figure(figsize=(10, 3.7))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    given = {
        "model\nparameters, FLOP per token,\nbytes saved per token": 2.2,
        "split\nmesh, micro-batch,\ncheckpointing": 1.1,
        "GPU\nmemory, FLOP/s,\nspeed of its links": 0.0,
    }
    results = {
        "bytes kept\nexercises 1, 2": 2.2,
        "bytes sent\nexercise 3": 1.1,
        "seconds of a step\nexercises 4, 6": 0.0,
    }
    for text, y in given.items():
        draw_box(axes, 1.4, y, text, False, 2.8, 0.85, fontsize=9)
    for text, y in results.items():
        draw_box(axes, 5.9, y, text, True, 2.2, 0.7, fontsize=9)
    for start, ends in {2.2: (2.2, 1.1, 0.0), 1.1: (2.2, 1.1), 0.0: (0.0,)}.items():
        for end in ends:
            draw_arrow(axes, (2.83, start), (4.77, end))
    draw_arrow(axes, (5.9, 0.72), (5.9, 0.38))
    draw_box(axes, 9.6, 2.2, "does it fit?\nhow many GPUs? exercise 5", False, 2.4, 0.7, fontsize=9)
    draw_box(axes, 9.6, 0.0, "hours, GPU-hours", False, 2.4, 0.7, fontsize=9)
    draw_arrow(axes, (7.03, 2.2), (8.37, 2.2))
    draw_arrow(axes, (7.03, 0.0), (8.37, 0.0))
    draw_arrow(axes, (9.6, 1.82), (9.6, 0.38))
    axes.text(9.7, 1.1, "the fastest\nthat fits", va="center", fontsize=9)
    axes.set(xlim=(-0.1, 11.0), ylim=(-0.6, 2.8))
    axes.axis("off")
    return figure


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
