"""Pictures from arrays; knows nothing of models or files of metrics."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
)
BLUE, ORANGE, GREY = "#2f6db3", "#d9772b", "#9aa0a6"
COLOURS = (BLUE, ORANGE, GREY, "#4b9e6a", "#8b5fbf", "#c2455e", "#3aa6a6", "#8a6d3b")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")


def loss_curve(
    steps: Sequence[float],
    train: Sequence[float],
    val_steps: Sequence[float],
    val: Sequence[float],
    unit: str = "token",
) -> Figure:
    """Training loss of each step (faint), its running mean, and validation loss; nats per `unit`."""
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
    axes.plot(
        val_steps,
        val,
        "o-",
        color=ORANGE,
        label=f"validation, last {val[-1]:.3f}" if len(val) else "validation",
    )
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats per {unit})")
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
    for (name, (x, y)), colour in zip(lines.items(), COLOURS[: len(lines)], strict=True):
        axes.plot(x, y, "o-", markersize=3, color=colour, label=name)
    for name, height in (marks or {}).items():
        axes.axhline(height, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            name,
            (1, height),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color=GREY,
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale)
    axes.legend(frameon=False)
    return figure


def draw_block_map(axes: Axes, blocks: np.ndarray, T: int, block_size: int) -> None:
    rows = (
        np.repeat(blocks, block_size, axis=0)[:T] if len(blocks) < T else blocks
    )  # a tile's row, for each of its queries
    N = -(-T // block_size)
    picture = np.ones((T, N, 3))
    for colour, queries, columns in (
        (BLUE, np.repeat(np.arange(T), rows.shape[1]), rows.reshape(-1)),
        (ORANGE, np.arange(T), np.arange(T) // block_size),
    ):
        keep = columns >= 0
        picture[queries[keep], columns[keep]] = matplotlib.colors.to_rgb(colour)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, N * block_size, T, 0))
    axes.set(
        xlabel="keys, in blocks", ylabel="query", title="blue: chosen blocks; orange: own block"
    )
    axes.grid(False)


def block_maps(choices: dict[str, np.ndarray], T: int, block_size: int) -> Figure:
    """Which block of keys each of T queries reads: named choices (T or tiles, K), -1 for none; the own block in orange."""
    figure = Figure(figsize=(5 * len(choices), 5), layout="constrained")
    for axes, (name, blocks) in zip(
        figure.subplots(1, len(choices), squeeze=False)[0], choices.items(), strict=True
    ):
        draw_block_map(axes, blocks, T, block_size)
        axes.set_title(name)
    return figure


def draw_heads(axes: Axes, values: np.ndarray, title: str) -> None:
    """A share for each layer and head, (L, H), in colour and in percent."""
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (layer, head), value in np.ndenumerate(values):
        axes.text(
            head,
            layer,
            f"{value:.0%}",
            ha="center",
            va="center",
            color="white" if value > 0.6 else "black",
            fontsize=8,
        )
    axes.set(
        xlabel="head",
        ylabel="layer",
        title=title,
        xticks=range(values.shape[1]),
        yticks=range(values.shape[0]),
    )
    axes.grid(False)


def sparsity(report: dict) -> Figure:
    """What a model's selections do (nanods/training/inspection.py): the block map of one head, and shares by layer and head."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_block_map(axes[0, 0], report["blocks"], report["tokens"], report["block_size"])
    axes[0, 0].set_title(
        f"layer {report['layer']}, head {report['head']}: " + axes[0, 0].get_title()
    )
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
    colours = {"dense": GREY, "flat": ORANGE, "tile": BLUE}
    for name, row in table["time"]["by_tokens"].items():
        label = f"{name}: T^{table['time']['exponents'][name]:.2f} from 4,096 on"
        time.loglog(
            [int(T) for T in row], list(row.values()), "o-", color=colours[name], label=label
        )
    time.set(xlabel="tokens T", ylabel="seconds", title="forward and backward, selection included")
    for name, row in table["memory"]["bytes_per_token"].items():
        xs, ys = [int(T) for T in row], [value * int(T) / 2**20 for T, value in row.items()]
        style = "o--" if "one head" in name else "o-"
        memory.loglog(
            xs,
            ys,
            style,
            color=colours.get(name.split(",")[0], "black"),
            label=f"{name}: T^{fitted_exponent(xs, ys):.2f}",
        )
    memory.set(
        xlabel="tokens T", ylabel="MiB above the inputs", title="peak memory, forward and backward"
    )
    for axes in (time, memory):
        axes.legend(frameon=False)
    return figure


def cost_of_experts(table: dict) -> Figure:
    """Time and memory of a Mixture of Experts and its rivals against tokens on log axes, from results/moe.json."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    styles = {
        "dense": (GREY, "o-"),
        "moe": (BLUE, "o-"),
        "one_hot": (ORANGE, "o-"),
        "one_hot_in_groups": (ORANGE, "o--"),
    }
    for name, (colour, style) in styles.items():
        seconds, peak = (
            row[name] for row in (table["growth"]["by_tokens"], table["memory"]["bytes_by_tokens"])
        )
        label = name.replace("_", " ")
        xs = [int(N) for N in seconds]
        fitted = f"{label}: N^{table['growth']['exponents'][name]:.2f}"
        time.loglog(xs, list(seconds.values()), style, color=colour, label=fitted)
        memory.loglog(
            [int(N) for N in peak],
            [value / 2**20 for value in peak.values()],
            style,
            color=colour,
            label=label,
        )
    time.set(xlabel="tokens N", ylabel="seconds", title="forward and backward, routing included")
    memory.set(
        xlabel="tokens N",
        ylabel="MiB above input and weights",
        title="peak memory, forward and backward",
    )
    for axes in (time, memory):
        axes.legend(frameon=False)
    return figure


def dot_plot(rows: dict[str, Sequence[float]], bars: dict[str, float], xlabel: str) -> Figure:
    """A row for each name: a dot for each value, their mean written beside them, and a tick at the bar to reach."""
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1))
    axes = figure.subplots()
    for y, (name, values) in enumerate(rows.items()):
        axes.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.6)
        if name in bars:
            axes.plot([bars[name]], [y], "|", color=ORANGE, markersize=22, markeredgewidth=2)
        if len(values):
            axes.annotate(
                f"{np.mean(values):.3f}",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
            )
    axes.set(
        xlabel=xlabel,
        yticks=range(len(rows)),
        yticklabels=list(rows),
        title="dots: seeds; tick: bar; right: mean",
    )
    axes.invert_yaxis()
    return figure


def draw_load_over_time(axes: Axes, steps: Sequence[int], load: np.ndarray) -> None:
    """Each expert's load in multiples of an even share, load (S, L, E) at S steps: a row for each expert, layer under layer."""
    S, L, E = load.shape
    columns = [
        part.mean(axis=0) for part in np.array_split(load, min(S, 150))
    ]  # a few steps in one column: less noise
    picture = np.stack(columns, axis=-1).reshape(L * E, -1)  # (L E, columns)
    image = axes.imshow(
        picture,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, L * E, 0),
    )
    for layer in range(1, L):
        axes.axhline(layer * E, color="black", linewidth=1)
    axes.set(xlabel="optimizer step", yticks=[(layer + 0.5) * E for layer in range(L)])
    axes.set_yticklabels([f"layer {layer}" for layer in range(L)])
    axes.set_title("load of each expert: white is an even share, blue idle, red twice or more")
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def draw_load(axes: Axes, load: np.ndarray) -> None:
    """The load of a whole text, (L, E), in multiples of an even share: each layer's experts from the idlest to the busiest."""
    share = np.sort(load / load.mean(axis=1, keepdims=True), axis=1)
    for layer, row in enumerate(share):
        axes.plot(
            range(1, len(row) + 1),
            row,
            "o-",
            markersize=3,
            label=f"layer {layer}: {row[-1]:.2f}x at most",
        )
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set(
        xlabel="experts, from the idlest to the busiest",
        ylabel="load, 1 is an even share",
        title="load on validation",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def draw_text_by_expert(
    axes: Axes, text: Sequence[str], experts: np.ndarray, title: str, width: int = 64
) -> None:
    """A text (T tokens) in cells coloured by the expert that each token chose first, experts (T,)."""
    shades = matplotlib.colormaps["tab20"].colors
    for i, (piece, expert) in enumerate(zip(text, experts, strict=True)):
        y, x = divmod(i, width)
        axes.add_patch(
            matplotlib.patches.Rectangle(
                (x, y), 1, 1, color=shades[expert % len(shades)], alpha=0.75, linewidth=0
            )
        )
        shown = {"\n": "\u21b5", " ": "", "$": r"\$"}.get(piece, piece)
        axes.text(
            x + 0.5, y + 0.55, shown, ha="center", va="center", fontsize=7, family="monospace"
        )
    axes.set(xlim=(0, width), ylim=(-(-len(text) // width), 0), xticks=[], yticks=[], title=title)
    axes.grid(False)


def experts(
    steps: Sequence[int],
    load: np.ndarray,
    entropy: Sequence[float],
    dropped: Sequence[float],
    val_load: np.ndarray,
    text: Sequence[str],
    chosen: np.ndarray,
) -> Figure:
    """What a run's experts did: load (S, L, E) over S steps, its entropy and drops, val_load (L, E), first choices (L, T)."""
    figure = Figure(figsize=(14, 11), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 2.2, 1.6))
    share = load / load.mean(axis=-1, keepdims=True)
    draw_load_over_time(figure.add_subplot(grid[0, :]), steps, share)
    draw_load(figure.add_subplot(grid[1, 0]), val_load)
    axes = figure.add_subplot(grid[1, 1])
    axes.plot(steps, entropy, color=BLUE, label="entropy of the load, of ln E (1: even)")
    axes.plot(steps, dropped, color=ORANGE, label="assignments dropped")
    axes.set(xlabel="optimizer step", ylabel="share", ylim=(-0.02, 1.05), title="training")
    axes.legend(frameon=False)
    for column, layer in enumerate((0, len(chosen) - 1)):
        draw_text_by_expert(
            figure.add_subplot(grid[2, column]),
            text,
            chosen[layer],
            f"first choice of each token, layer {layer}",
        )
    return figure
