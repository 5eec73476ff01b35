"""Draw contrastive learning from arrays: the diagrams and figures of lesson 03.

Shapes: B pairs of a batch, T tokens, C channels, M width of an embedding, n examples, P points.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanods.plots import BLUE, GREY, ORANGE, draw_arrow, draw_box
from nanods.plots_multimodal import draw_item
from nanods.plots_text import balanced_lines

# ---- diagrams ------------------------------------------------------------------------------------


def model_diagram() -> Figure:
    """Draw V3: three kinds of input, one trunk, one embedding each, and the loss."""
    figure = Figure(figsize=(10, 3.9))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    rows = {  # y: the input, how it becomes tokens
        2.4: ("caption", "bytes"),
        1.2: ("image\n(B, 3, 32, 32)", "patches of 8 x 8,\nhalf overlapping"),
        0.0: ("sound (log-mel)\n(B, 32, 32)", "groups of frames"),
    }
    draw_box(
        axes, 5.55, 1.2, "one trunk:\nblocks of V1 or V2,\nno causal mask", True, 1.75, 3.3, 10
    )
    for y, (kind, cut) in rows.items():
        draw_box(axes, 0.75, y, kind, False, 1.4, 0.8, 9.5)
        draw_box(axes, 2.75, y, cut, False, 1.5, 0.8, 9.5)
        draw_box(axes, 8.0, y, "mean over T,\nadapter, length 1", False, 1.55, 0.8, 9.5)
        for start, end, shape in (
            (1.5, 1.95, ""),
            (3.55, 4.62, "(B, T, C)"),
            (6.48, 7.17, "(B, T, C)"),
            (8.83, 9.62, "(B, M)"),
        ):
            draw_arrow(axes, (start, y), (end, y))
            axes.text((start + end) / 2, y + 0.07, shape, ha="center", va="bottom", fontsize=8.5)
    loss = "for each pair of\nmodalities:\n\ncosines (B, B)\n x scale\n\ntwo cross-\nentropies"
    draw_box(axes, 10.35, 1.2, loss, True, 1.4, 3.3, 10)
    axes.text(5.55, -0.78, "shared by all modalities", ha="center", fontsize=9.5)
    axes.text(2.75, -0.78, "own for each modality", ha="center", fontsize=9.5)
    axes.text(8.0, -0.78, "own for each modality", ha="center", fontsize=9.5)
    axes.set(xlim=(0, 11.15), ylim=(-1.0, 3.0))
    axes.axis("off")
    return figure


def caching_diagram() -> Figure:
    """Draw gradient caching: embed without a graph, differentiate the loss, embed again."""
    figure = Figure(figsize=(10, 3.3))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    draw_box(axes, 4.75, 1.1, "embeddings\nof the batch\n(B, M)", True, 1.4, 2.9, 10)
    draw_box(
        axes,
        6.85,
        1.1,
        "loss of the\nwhole batch,\nbackward to the\nembeddings",
        True,
        1.5,
        2.9,
        10,
    )
    draw_arrow(axes, (5.47, 1.1), (6.07, 1.1))
    for i, y in enumerate((2.2, 1.1, 0.0)):
        draw_box(axes, 0.9, y, f"micro-batch {i}\n(b, ...)", False, 1.3, 0.75, 9.5)
        draw_box(axes, 2.75, y, "encoder,\nno graph", False, 1.2, 0.75, 9.5)
        draw_arrow(axes, (1.57, y), (2.13, y))
        draw_arrow(axes, (3.37, y), (4.03, y))
        axes.text(3.7, y + 0.07, "(b, M)", ha="center", va="bottom", fontsize=8.5)
        text = "encoder again, with a graph;\nbackward of\nsum(embedding * gradient)"
        draw_box(axes, 10.05, y, text, False, 3.1, 0.75, 9.5)
        draw_arrow(axes, (7.62, y), (8.48, y))
        axes.text(8.05, y + 0.07, "gradient\n(b, M)", ha="center", va="bottom", fontsize=8.5)
    for x, text in ((1.85, "1. embed"), (6.0, "2. differentiate"), (10.05, "3. embed again")):
        axes.text(x, 2.85, text, ha="center", fontsize=11, fontweight="bold")
    axes.set(xlim=(0.1, 11.75), ylim=(-0.55, 3.15))
    axes.axis("off")
    return figure


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
