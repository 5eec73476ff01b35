"""Draw contrastive learning from arrays: the figures of lesson 03.

Shapes: B pairs of a batch, T tokens, C channels, M width of an embedding, n examples, P points.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanods.plots import BLUE, GREY, ORANGE
from nanods.plots_multimodal import draw_item
from nanods.plots_text import balanced_lines

# ---- similarity matrices -------------------------------------------------------------------------


def matrices(
    panels: dict[str, np.ndarray], title: str, left_out: dict[str, np.ndarray] | None = None
) -> Figure:
    """Draw small matrices (B, B) with their numbers; the matching pairs have a frame.

    `left_out` (B, B) bool by panel: entries that a loss does not count, crossed out.
    """
    figure = Figure(figsize=(3 * len(panels) + 0.8, 3.7), layout="constrained")
    axes_row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, matrix) in zip(axes_row, panels.items(), strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
            if left_out and name in left_out and left_out[name][i, j]:
                axes.plot([j - 0.45, j + 0.45], [i - 0.45, i + 0.45], color="black", linewidth=2)
        for i in range(len(matrix)):
            frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 2.5}
            axes.add_patch(Rectangle((i - 0.47, i - 0.47), 0.94, 0.94, **frame))
        axes.set_title(name, fontsize=10)
        ticks = range(len(matrix))
        axes.set(xticks=ticks, yticks=ticks, xlabel="image", ylabel="text")
        axes.grid(False)
    figure.colorbar(image, ax=axes_row, pad=0.01, label="cosine or probability")
    figure.get_layout_engine().set(h_pad=0.1)
    figure.suptitle(title)
    return figure


def gradient_shares(
    scales: np.ndarray, shares: dict[str, np.ndarray], limit: float, title: str
) -> Figure:
    """Draw what share of the negatives' gradient each kind of negative has, against the scale."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(scales, *shares.values(), labels=list(shares), colors=(ORANGE, "#c5d7ea"))
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(limit * 0.95, 0.05, "limit", ha="right")
    axes.set(
        xscale="log",
        xlim=(scales[0], scales[-1]),
        ylim=(0, 1),
        xlabel="scale = 1 / temperature",
        ylabel="share of the negatives' gradient",
    )
    axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


# ---- examples ------------------------------------------------------------------------------------


def examples(
    images: Sequence[np.ndarray], mels: Sequence[np.ndarray], captions: Sequence[str], title: str
) -> Figure:
    """Draw n examples in columns: caption, image (3, Y, X) and spectrogram (bands, frames)."""
    figure = Figure(figsize=(2.1 * len(captions), 4.9), layout="constrained")
    for i, column in enumerate(figure.subplots(2, len(captions), squeeze=False).T):
        draw_item(column[0], images[i])
        draw_item(column[1], mels[i])
        column[0].set_title(balanced_lines(captions[i], 20), fontsize=10)
        column[1].set_xlabel("time")
        if i == 0:
            column[1].set_ylabel("pitch (log-mel)")
    figure.suptitle(title)
    return figure


def patch_and_window(image: np.ndarray, patch_size: int, row: int, column: int) -> Figure:
    """Draw the grid of patches of an image (3, Y, X), one patch, and what its token sees."""
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_item(axes, image)
    lines = np.arange(0, image.shape[-1], patch_size) - 0.5
    axes.set_xticks(lines, [])
    axes.set_yticks(lines, [])
    axes.grid(True, color="white", alpha=0.3)
    for margin, style in ((0, "-"), (patch_size // 2, "--")):
        corner = [patch_size * i - margin - 0.5 for i in (column, row)]
        side = patch_size + 2 * margin
        outline = {"fill": False, "edgecolor": "white", "linestyle": style, "linewidth": 2}
        axes.add_patch(Rectangle(corner, side, side, **outline))
    axes.set_title("A patch, and what its token sees (dashed)", fontsize=10)
    return figure


def point_clouds(images: np.ndarray, points: np.ndarray) -> Figure:
    """Draw n images (n, 3, Y, X) beside points of them, (n, P, 5): x, y and a colour."""
    figure = Figure(figsize=(4 * len(images), 2.6), layout="constrained")
    for i, (left, right) in enumerate(figure.subplots(1, 2 * len(images)).reshape(-1, 2)):
        draw_item(left, images[i])
        right.scatter(*points[i, :, :2].T, c=points[i, :, 2:], s=14)
        right.set(title=f"{points.shape[1]} points of it", facecolor="#30343b", aspect="equal")
        right.set(xlim=(-1, 1), ylim=(1, -1), xticks=[], yticks=[])
        right.grid(False)
    return figure


# ---- results -------------------------------------------------------------------------------------


def experts_used(used: dict[str, dict[str, float]], n_expert: int, title: str) -> Figure:
    """Draw how many experts the tokens of each modality use: by run and modality, e to the entropy
    of the load."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(used)
    for i, (run, counts) in enumerate(used.items()):
        x = np.arange(len(counts)) + (i - (len(used) - 1) / 2) * width
        bars = axes.bar(x, counts.values(), 0.95 * width, color=(GREY, BLUE)[i], label=run)
        axes.bar_label(bars, fmt="{:.1f}", padding=2, fontsize=9)
    axes.axhline(n_expert, color="black", linestyle="--", linewidth=1, label=f"all {n_expert}")
    axes.set_xticks(range(len(counts)), list(counts))
    axes.set(ylabel="experts used", ylim=(0, 1.08 * n_expert))
    axes.grid(False, axis="x")
    axes.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(used) + 1, frameon=False)
    return figure
