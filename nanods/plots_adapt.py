"""Draw figures about learning without forgetting from arrays."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from nanods.plots import BLUE, COLOURS, GREY, ORANGE, draw_box

Point = tuple[float, float]  # gained on the new task, forgotten of the old one


def frontier(
    ways: dict[str, dict[str, Point]], stopped: Sequence[Point], new_task: str, title: str
) -> Figure:
    """Draw what is forgotten against what is gained, in bits per byte: lower right is better.

    ways: the points of each way by their labels, such as lambda. `stopped`: plain fine-tuning at
    its evaluations, as if it had stopped there.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*stopped, strict=True), "--", color=GREY, label="plain, over its steps")
    offsets = cycle(((5, -11), (5, 5)))  # of the labels: two ways' points may lie close together
    for (way, points), colour in zip(ways.items(), COLOURS[:2] + COLOURS[3:], strict=False):
        offset = next(offsets)
        axes.plot(*zip(*points.values(), strict=True), "o-", color=colour, label=way)
        for label, point in points.items():
            axes.annotate(
                label, point, offset, textcoords="offset points", fontsize=8, color=colour
            )
    axes.set(
        xlabel=f"gained on {new_task} (bits per byte)",
        ylabel="forgotten of plain text (bits per byte)",
        title=title,
    )
    gains = [gained for points in ways.values() for gained, _ in points.values()]
    margin = 0.15 * (max(gains) - min(gains)) + 0.01
    axes.set_xlim(min(gains) - margin, max(gains) + margin)
    axes.margins(y=0.1)
    axes.legend(frameon=False)
    return figure


def fisher_by_layer(panels: dict[str, dict[str, float]], title: str) -> Figure:
    """Draw the mean Fisher information of a GPT's matrices, on a logarithmic axis, layer by layer.

    panels: the mean of each parameter by its name, by the panel's title.
    """
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, fisher) in zip(grid, panels.items(), strict=True):
        lines: dict[str, dict[int, float]] = {}
        for name, value in fisher.items():
            if name.startswith("blocks."):
                _, layer, kind = name.removesuffix(".weight").split(".", 2)
                lines.setdefault(kind, {})[int(layer)] = value
        for (kind, by_layer), colour in zip(lines.items(), COLOURS, strict=False):
            axes.plot(list(by_layer), list(by_layer.values()), "o-", color=colour, label=kind)
        last = max(layer for by_layer in lines.values() for layer in by_layer)
        for name, x, marker in (("embedding", -1, "s"), ("head", last + 1, "D")):
            axes.plot([x], [fisher[f"{name}.weight"]], marker, color=BLUE, label=name)
        axes.set(xlabel="layer", title=panel, yscale="log", xticks=range(last + 1))
    grid[0].set_ylabel("mean of F over a matrix's weights")
    figure.suptitle(title)
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False
    )
    return figure


# ---- lesson 07 -----------------------------------------------------------------------------------


def two_valleys(fisher: Sequence[float], strength: float) -> Figure:
    """Draw the losses of two tasks over two weights, and where EWC and L2 end between their minima.

    The old task's loss is half of the sum of F w^2, with its minimum at 0; the new task's is half
    of |w - (1, 1)|^2. Each penalty of `strength` is added to the latter: EWC's with F, L2's with
    the mean of F for both weights.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    F = np.array(fisher)
    x, y = np.meshgrid(np.linspace(-0.5, 1.5, 201), np.linspace(-0.5, 1.5, 201))
    axes.contour(x, y, F[0] * x**2 + F[1] * y**2, levels=8, colors=BLUE, linewidths=0.7)
    axes.contour(x, y, (x - 1) ** 2 + (y - 1) ** 2, levels=5, colors=GREY, linewidths=0.7)
    for name, held, colour in (("EWC", F, ORANGE), ("L2", np.full(2, F.mean()), COLOURS[3])):
        strengths = np.concatenate([[0], np.geomspace(1e-3, 1e3, 200)])[:, None]
        path = 1 / (1 + strengths * held)  # the minimum of new loss + penalty
        axes.plot(*path.T, color=colour, linewidth=1)
        w = 1 / (1 + strength * held)
        old, new = (F * w**2).sum() / 2, ((w - 1) ** 2).sum() / 2
        axes.plot(*w, "o", color=colour, label=f"{name}: old loss {old:.2f}, new {new:.2f}")
    axes.plot([0], [0], "s", color=BLUE, label="after the old task: 0, new 1")
    axes.plot([1], [1], "D", color=GREY, label=f"plain: old loss {F.sum() / 2:.2f}, new 0")
    title = "EWC moves the weight that the old task hardly uses"
    axes.set(xlabel=f"weight with F = {F[0]:g}", ylabel=f"weight with F = {F[1]:g}", title=title)
    axes.grid(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def masked_tokens(words: Sequence[str], is_learnt: Sequence[bool]) -> Figure:
    """Draw the tokens of a dialogue in a row of boxes; those that are learnt are orange."""
    figure = Figure(figsize=(10, 0.9))
    axes = figure.subplots()
    x = 0.0
    for word, learnt in zip(words, is_learnt, strict=True):
        width = 0.35 + 0.14 * len(word)
        draw_box(axes, x + width / 2, 0, word, learnt, width - 0.1, 0.5, fontsize=8)
        x += width
    axes.set(xlim=(-0.1, x), ylim=(-0.4, 0.4))
    axes.axis("off")
    return figure
