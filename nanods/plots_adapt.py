"""Draw figures about learning without forgetting from arrays. Nothing here knows models."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from nanods.plots import BLUE, COLOURS, GREY

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
    for (way, points), colour in zip(ways.items(), COLOURS[:2] + COLOURS[3:], strict=False):
        axes.plot(*zip(*points.values(), strict=True), "o-", color=colour, label=way)
        for label, point in points.items():
            axes.annotate(
                label, point, (5, -11), textcoords="offset points", fontsize=8, color=colour
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
