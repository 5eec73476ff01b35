"""Pictures from arrays; knows nothing of models or files of metrics."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
BLUE, ORANGE, GREY = "#2f6db3", "#d9772b", "#9aa0a6"
COLOURS = (BLUE, ORANGE, GREY, "#4b9e6a", "#8b5fbf")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")


def loss_curve(steps: Sequence[float], train: Sequence[float], val_steps: Sequence[float], val: Sequence[float]) -> Figure:
    """Training loss of each step (faint), its running mean, and validation loss; nats per token."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(steps, train, color=GREY, linewidth=0.5, label="training, each step")
    width = min(25, max(1, len(train) // 10))
    if len(train) >= width:
        axes.plot(
            steps[width - 1 :],
            np.convolve(train, np.ones(width) / width, "valid"),
            color=BLUE,
            label=f"mean of {width}",
        )
    axes.plot(val_steps, val, "o-", color=ORANGE, label=f"validation, last {val[-1]:.3f}" if len(val) else "validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def curves(
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    marks: dict[str, float] | None = None,
    xscale: str = "linear",
    yscale: str = "linear",
) -> Figure:
    """Named lines (x, y), and named horizontal marks to reach."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for (name, (x, y)), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(x, y, "o-", markersize=3, color=colour, label=name)
    for name, height in (marks or {}).items():
        axes.axhline(height, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(name, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=GREY)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
    axes.legend(frameon=False)
    return figure


def draw_block_map(axes: Axes, blocks: np.ndarray, T: int, block_size: int) -> None:
    rows = np.repeat(blocks, block_size, axis=0)[:T] if len(blocks) < T else blocks  # a tile's row, for each of its queries
    N = -(-T // block_size)
    picture = np.ones((T, N, 3))
    for colour, queries, columns in (
        (BLUE, np.repeat(np.arange(T), rows.shape[1]), rows.reshape(-1)),
        (ORANGE, np.arange(T), np.arange(T) // block_size),
    ):
        keep = columns >= 0
        picture[queries[keep], columns[keep]] = matplotlib.colors.to_rgb(colour)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, N * block_size, T, 0))
    axes.set(xlabel="keys, in blocks", ylabel="query", title="blue: chosen blocks; orange: own block")
    axes.grid(False)


def block_maps(choices: dict[str, np.ndarray], T: int, block_size: int) -> Figure:
    """Which block of keys each of T queries reads: named choices (T or tiles, K), -1 for none; the own block in orange."""
    figure = Figure(figsize=(5 * len(choices), 5), layout="constrained")
    for axes, (name, blocks) in zip(figure.subplots(1, len(choices), squeeze=False)[0], choices.items(), strict=True):
        draw_block_map(axes, blocks, T, block_size)
        axes.set_title(name)
    return figure


def draw_heads(axes: Axes, values: np.ndarray, title: str) -> None:
    """A share for each layer and head, (L, H), in colour and in percent."""
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (layer, head), value in np.ndenumerate(values):
        axes.text(head, layer, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black", fontsize=8)
    axes.set(xlabel="head", ylabel="layer", title=title, xticks=range(values.shape[1]), yticks=range(values.shape[0]))
    axes.grid(False)


def sparsity(report: dict) -> Figure:
    """What a model's selections do (nanods/training/inspection.py): the block map of one head, and shares by layer and head."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_block_map(axes[0, 0], report["blocks"], report["tokens"], report["block_size"])
    axes[0, 0].set_title(f"layer {report['layer']}, head {report['head']}: " + axes[0, 0].get_title())
    draw_heads(axes[0, 1], report["keys_read"], "keys read, of all in the past")
    draw_heads(axes[1, 0], report["weight_read"], "dense attention's weight on the keys read")
    draw_heads(axes[1, 1], report["best_found"], "recall: blocks of most weight that were chosen")
    return figure


def fitted_exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y against log x, by least squares: 1 is linear, 2 quadratic."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def cost_against_tokens(table: dict) -> Figure:
    """Time and memory against T on log axes, with fitted exponents, from results/attention.json."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    colours = {"dense": GREY, "flat": ORANGE, "shared": BLUE}
    for name, row in table["time"]["by_tokens"].items():
        label = f"{name}: T^{table['time']['exponents'][name]:.2f} from 4,096 on"
        time.loglog([int(T) for T in row], list(row.values()), "o-", color=colours[name], label=label)
    time.set(xlabel="tokens T", ylabel="seconds", title="forward and backward, selection included")
    for name, row in table["memory"]["bytes_per_token"].items():
        xs, ys = [int(T) for T in row], [value * int(T) / 2**20 for T, value in row.items()]
        style = "o--" if "one head" in name else "o-"
        memory.loglog(
            xs, ys, style, color=colours.get(name.split(",")[0], "black"), label=f"{name}: T^{fitted_exponent(xs, ys):.2f}"
        )
    memory.set(xlabel="tokens T", ylabel="MiB above the inputs", title="peak memory, forward and backward")
    for axes in (time, memory):
        axes.legend(frameon=False)
    return figure


def dots(rows: dict[str, Sequence[float]], bars: dict[str, float], xlabel: str) -> Figure:
    """A row for each name: a dot for each value, their mean written beside them, and a tick at the bar to reach."""
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1))
    axes = figure.subplots()
    for y, (name, values) in enumerate(rows.items()):
        axes.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.6)
        if name in bars:
            axes.plot([bars[name]], [y], "|", color=ORANGE, markersize=22, markeredgewidth=2)
        if len(values):
            axes.annotate(f"{np.mean(values):.3f}", (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set(xlabel=xlabel, yticks=range(len(rows)), yticklabels=list(rows), title="dots: seeds; tick: bar; right: mean")
    axes.invert_yaxis()
    return figure
