"""Draw figures from arrays. Nothing here knows models or metrics files.

Shapes: T queries or tokens, N tokens of a batch, L layers, H heads, E experts, K choices, S steps.
"""

import re
import sys
import warnings
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib
import matplotlib.font_manager
import matplotlib.patches
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanods.files import write_and_rename
from nanods.plots_text import columns, safe_text

# Fonts with Chinese, Japanese and Korean characters, which matplotlib's own fonts do not have.
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Noto Sans SC"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),  # Linux
    *("PingFang SC", "Hiragino Sans GB", "Heiti TC", "Arial Unicode MS"),  # macOS
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "MS Gothic", "Malgun Gothic"),  # Windows
)
INSTALLED_FONTS = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
FALLBACK_FONTS = [name for name in CJK_FONTS if name in INSTALLED_FONTS]
matplotlib.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.family": ["sans-serif", *FALLBACK_FONTS],
    }
)
BLUE, ORANGE, GREY = "#2f6db3", "#d9772b", "#9aa0a6"
COLOURS = (BLUE, ORANGE, GREY, "#4b9e6a", "#8b5fbf", "#c2455e", "#3aa6a6", "#8a6d3b")


DPI = 120
MAX_PIXELS = 8000  # of a picture's width and height, about

reported_characters: set[str] = set()  # those that a notice has already said no font has


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file, at a lower resolution if it would exceed MAX_PIXELS.

    Print one notice if no font has some of its characters, where matplotlib would print a warning
    for each.
    """
    dpi = min(DPI, MAX_PIXELS / max(figure.get_size_inches()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_and_rename(
            path, lambda file: figure.savefig(file, dpi=dpi, bbox_inches="tight", format="png")
        )
    missing = set()
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) .* missing from", str(warning.message), re.DOTALL)
        if glyph:
            missing.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if missing and not reported_characters:
        print(
            f"notice: no font here has {''.join(sorted(missing)[:10])}; pictures show boxes in "
            "their place. For Chinese, Japanese and Korean install Noto Sans CJK, then delete "
            f"{matplotlib.get_cachedir()}, where matplotlib keeps its list of fonts",
            file=sys.stderr,
        )
    reported_characters.update(missing)


# ---- curves and dots -----------------------------------------------------------------------------


def loss_curve(
    steps: Sequence[float],
    train: Sequence[float],
    val_steps: Sequence[float],
    val: Sequence[float],
    unit: str = "token",
) -> Figure:
    """Draw the training loss of each step, its running mean and the validation loss.

    Losses are in nats per `unit`.
    """
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(steps, train, color=GREY, linewidth=0.5, label="training, each step")
    width = min(25, max(1, len(train) // 10))
    if len(train) >= width:
        running_mean = np.convolve(train, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], running_mean, color=BLUE, label=f"mean of {width} steps")
    label = f"validation, last {val[-1]:.3f}" if len(val) else "validation"
    axes.plot(val_steps, val, "o-", color=ORANGE, label=label)
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
    """Draw lines (x, y) by name, and horizontal reference lines (`marks`) by name."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for (name, (x, y)), colour in zip(lines.items(), cycle(COLOURS), strict=False):
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


def dot_plot(
    rows: dict[str, Sequence[float]],
    targets: dict[str, float],
    xlabel: str,
    title: str = "",
    target_name: str = "target",
) -> Figure:
    """Draw a row for each name: a dot for each value, their mean, and a tick at the target, such as
    chance."""
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1))
    axes = figure.subplots()
    for y, (name, values) in enumerate(rows.items()):
        axes.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.6)
        if name in targets:
            axes.plot([targets[name]], [y], "|", color=ORANGE, markersize=22, markeredgewidth=2)
        if len(values):
            axes.annotate(
                f"{np.mean(values):.3f}",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
            )
    note = "one dot per seed; at the right their mean" + (
        f"; orange: {target_name}" if targets else ""
    )
    xlabel = f"{xlabel}\n({note})"
    axes.set(xlabel=xlabel, yticks=range(len(rows)), yticklabels=list(rows), title=title)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def bars(panels: dict[str, dict[str, float]], xlabel: str) -> Figure:
    """Draw a panel for each title, with a bar and its value for each name."""
    n_rows = max(len(values) for values in panels.values())
    size = (7, len(panels) * (0.35 * n_rows + 0.7) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
    ):
        drawn = axes.barh(range(len(values)), list(values.values()), color=BLUE, alpha=0.7)
        axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=9)
        axes.set(yticks=range(len(values)), yticklabels=list(values), title=title)
        axes.margins(x=0.1)
        axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    return figure


def draw_box(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    is_highlighted: bool,
    width: float,
    height: float,
    fontsize: float = 9,
) -> None:
    """Draw a box of a diagram, centred at (x, y), orange if it is highlighted, else grey."""
    box = matplotlib.patches.FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.12",
        facecolor="#ffd9a8" if is_highlighted else "#e8ebef",
        edgecolor="#7d8590",
    )
    axes.add_patch(box)
    axes.text(x, y, text, ha="center", va="center", fontsize=fontsize)


def draw_arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    label: str = "",
    rise: float = 0.07,
    fontsize: float = 9,
) -> None:
    """Draw an arrow of a diagram, with a label `rise` above the middle of a level one."""
    style = {"arrowstyle": "-|>", "color": "#7d8590", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)
    middle = (start[0] + end[0]) / 2, start[1] + rise
    axes.text(*middle, label, ha="center", va="bottom", fontsize=fontsize)


def draw_chain(
    axes: Axes,
    y: float,
    boxes: Sequence[tuple[float, str, bool, float]],
    labels: Sequence[str | None],
    height: float = 0.8,
    fontsize: float = 9,
) -> None:
    """Draw boxes (x, text, whether it is highlighted, width) at height y from left to right, with
    arrows that bear these labels. A label None leaves the arrow out."""
    for x, text, is_step, width in boxes:
        draw_box(axes, x, y, text, is_step, width, height, fontsize)
    for (start, end), label in zip(pairwise(boxes), labels, strict=True):
        if label is None:
            continue
        (a, *_, width_a), (b, *_, width_b) = start, end
        left, right = a + width_a / 2 + 0.03, b - width_b / 2 - 0.03
        draw_arrow(axes, (left, y), (right, y), label)


def label_below(figure: Figure, colours: dict[str, str]) -> None:
    """Say below a figure what its colours mean: the colour of each label."""
    patches = [
        matplotlib.patches.Patch(facecolor=colour, edgecolor=GREY) for colour in colours.values()
    ]
    figure.legend(
        patches, list(colours), loc="outside lower center", ncols=len(colours), frameon=False
    )


def fitted_exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Fit the slope of log y against log x by least squares: 1 is linear, 2 is quadratic."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


# ---- sparse attention (V1) -----------------------------------------------------------------------


def draw_block_map(axes: Axes, blocks: np.ndarray, T: int, block_size: int) -> None:
    """Draw which blocks of keys T queries attend to.

    blocks: (T or tiles, K) selected past blocks, -1 for none. A tile's row holds for each of its
    queries. Selected blocks are blue, the query's current block is orange.
    """
    selected = np.repeat(blocks, block_size, axis=0)[:T] if len(blocks) < T else blocks  # (T, K)
    n_blocks = -(-T // block_size)
    queries = np.arange(T)
    picture = np.ones((T, n_blocks, 3))

    def colour_cells(colour: str, rows: np.ndarray, columns: np.ndarray) -> None:
        keep = columns >= 0
        picture[rows[keep], columns[keep]] = matplotlib.colors.to_rgb(colour)

    colour_cells(BLUE, np.repeat(queries, selected.shape[1]), selected.reshape(-1))
    colour_cells(ORANGE, queries, queries // block_size)
    extent = (0, n_blocks * block_size, T, 0)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
    title = "blue: selected blocks; orange: current block"
    axes.set(xlabel="key", ylabel="query", title=title)
    axes.grid(False)


def draw_heads(axes: Axes, fractions: np.ndarray, title: str) -> None:
    """Draw a fraction for each layer and head, (L, H), as a colour and in percent."""
    axes.imshow(fractions, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (layer, head), fraction in np.ndenumerate(fractions):
        axes.text(
            head,
            layer,
            f"{fraction:.0%}",
            ha="center",
            va="center",
            color="white" if fraction > 0.6 else "black",
            fontsize=8,
        )
    L, H = fractions.shape
    axes.set(xlabel="head", ylabel="layer", title=title, xticks=range(H), yticks=range(L))
    axes.grid(False)


def sparsity(report: dict) -> Figure:
    """Draw the report of nanods/training/inspection.py on a model with block-sparse attention.

    The block map of one head, and three fractions by layer and head.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_block_map(axes[0, 0], report["blocks"], report["tokens"], report["block_size"])
    head = f"layer {report['layer']}, head {report['head']}"
    axes[0, 0].set_title(f"{head}: {axes[0, 0].get_title()}")
    draw_heads(axes[0, 1], report["keys_read"], "keys attended to, of all past keys")
    draw_heads(axes[1, 0], report["weight_read"], "dense attention's weight on these keys")
    draw_heads(
        axes[1, 1], report["best_found"], "recall: selected, of the blocks with the largest weight"
    )
    return figure


def cost_against_tokens(table: dict) -> Figure:
    """Draw attention's time and memory against T on log axes, from results/attention.json."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    colours = {"dense": GREY, "flat": ORANGE, "tile": BLUE}

    for name, seconds in table["time"]["by_tokens"].items():
        lengths = [int(T) for T in seconds]
        label = f"{name}: T^{table['time']['exponents'][name]:.2f} from 4,096 on"
        time_axes.loglog(lengths, list(seconds.values()), "o-", color=colours[name], label=label)
    time_axes.set(
        xlabel="tokens T", ylabel="seconds", title="forward and backward, selection included"
    )

    for name, bytes_per_token in table["memory"]["bytes_per_token"].items():
        lengths = [int(T) for T in bytes_per_token]
        mib = [value * int(T) / 2**20 for T, value in bytes_per_token.items()]
        style = "o--" if "one head" in name else "o-"
        colour = colours.get(name.split(",")[0], "black")
        label = f"{name}: T^{fitted_exponent(lengths, mib):.2f}"
        memory_axes.loglog(lengths, mib, style, color=colour, label=label)
    memory_axes.set(
        xlabel="tokens T", ylabel="MiB above the inputs", title="peak memory, forward and backward"
    )
    for axes in (time_axes, memory_axes):
        axes.legend(frameon=False)
    return figure


# ---- Mixture of Experts (V2) ---------------------------------------------------------------------


def cost_of_experts(table: dict, title: str = "") -> Figure:
    """Draw time and memory of a Mixture of Experts and its baselines against the number of tokens.

    Both axes are logarithmic. `table` is the content of results/moe.json.
    """
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    styles = {
        "dense": ("one MLP of the same arithmetic", GREY, "o-"),
        "moe": ("experts, sorted", BLUE, "o-"),
        "one_hot": ("experts, one-hot masks", ORANGE, "o-"),
        "one_hot_in_groups": ("masks for groups of tokens", ORANGE, "o--"),
    }
    for name, (label, colour, style) in styles.items():
        label = f"{label}: time N^{table['growth']['exponents'][name]:.2f}"
        for axes, by_tokens, unit in (
            (time_axes, table["growth"]["by_tokens"], 1),
            (memory_axes, table["memory"]["bytes_by_tokens"], 2**20),
        ):
            tokens = [int(N) for N in by_tokens[name]]
            values = [value / unit for value in by_tokens[name].values()]
            axes.loglog(tokens, values, style, color=colour, label=label)
            longest = [int(N) for N in by_tokens["dense"]]
            axes.set_xticks(longest, [f"{N:,}" for N in longest], fontsize=8)
            axes.minorticks_off()
    time_axes.set(
        xlabel="tokens N", ylabel="seconds", title="time, forward and backward, with the router"
    )
    memory_axes.set(
        xlabel="tokens N",
        ylabel="MiB above input and weights",
        title="peak memory, forward and backward",
    )
    handles = time_axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def draw_load_over_time(axes: Axes, steps: Sequence[int], load: np.ndarray) -> None:
    """Draw each expert's load at S steps: load (S, L, E), in multiples of an even share.

    Each expert is a row; the layers stand below each other.
    """
    S, L, E = load.shape
    # Average neighbouring steps into at most 150 columns to reduce the noise.
    columns = [part.mean(axis=0) for part in np.array_split(load, min(S, 150))]
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
    axes.set_title("load of each expert: white = even share, blue = idle, red = twice or more")
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, pad=0.01, extend="max", label="load / even share")


def draw_load(axes: Axes, load: np.ndarray) -> None:
    """Draw the load of each layer's experts, (L, E), sorted, in multiples of an even share."""
    relative = np.sort(load / load.mean(axis=1, keepdims=True), axis=1)
    for layer, row in enumerate(relative):
        label = f"layer {layer}: maximum {row[-1]:.2f}x"
        axes.plot(range(1, len(row) + 1), row, "o-", markersize=3, label=label)
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.set(
        xlabel="experts, sorted by load",
        ylabel="load / even share",
        title="load on the validation set",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def draw_text_by_expert(
    axes: Axes, text: Sequence[str], experts: np.ndarray, title: str, width: int = 64
) -> None:
    """Draw the T tokens of a text in cells, coloured by each token's first expert: experts (T,).

    A cell is as wide as its token, in lines of `width` columns.
    """
    palette = matplotlib.colormaps["tab20"].colors
    x, y = 0, 0
    for token, expert in zip(text, experts, strict=True):
        label = safe_text(token, max_columns=24)
        token_columns = max(1, columns(label.replace(r"\$", "$")))
        if x + token_columns > width:
            x, y = 0, y + 1
        colour = palette[expert % len(palette)]
        cell = matplotlib.patches.Rectangle(
            (x, y), token_columns, 1, color=colour, alpha=0.75, linewidth=0
        )
        axes.add_patch(cell)
        axes.text(
            x + token_columns / 2,
            y + 0.55,
            label,
            ha="center",
            va="center",
            fontsize=7,
            family=["monospace", *FALLBACK_FONTS],
        )
        x += token_columns
    axes.set(xlim=(0, width), ylim=(y + 1, 0), xticks=[], yticks=[], title=title)
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
    """Draw how a run used its experts.

    load (S, L, E), entropy (S,) and dropped (S,) are those of S training steps; val_load (L, E) is
    the load on the validation set; chosen (L, T) the first expert of each token of `text`.
    """
    figure = Figure(figsize=(14, 11), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 2.2, 1.6))
    relative_load = load / load.mean(axis=-1, keepdims=True)
    draw_load_over_time(figure.add_subplot(grid[0, :]), steps, relative_load)
    draw_load(figure.add_subplot(grid[1, 0]), val_load)
    axes = figure.add_subplot(grid[1, 1])
    axes.plot(steps, entropy, color=BLUE, label="entropy of the load / ln E (1: even)")
    axes.plot(steps, dropped, color=ORANGE, label="dropped assignments")
    axes.set(xlabel="optimizer step", ylabel="fraction", ylim=(-0.02, 1.05), title="training")
    axes.legend(frameon=False)
    for column, layer in enumerate((0, len(chosen) - 1)):
        draw_text_by_expert(
            figure.add_subplot(grid[2, column]),
            text,
            chosen[layer],
            f"first expert of each token, layer {layer}",
        )
    return figure
