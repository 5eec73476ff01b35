"""Pictures from arrays; knows nothing of models or files of metrics."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
BLUE, ORANGE, GREY = "#2f6db3", "#d9772b", "#9aa0a6"


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
    lines: dict[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str, marks: dict[str, float]
) -> Figure:
    """Named lines (x, y), and named horizontal marks to reach."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for (name, (x, y)), colour in zip(lines.items(), (BLUE, ORANGE, GREY), strict=False):
        axes.plot(x, y, "o-", markersize=3, color=colour, label=name)
    for name, height in marks.items():
        axes.axhline(height, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(name, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=GREY)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    return figure


def block_map(blocks: np.ndarray, block_size: int) -> Figure:
    """Which block of keys each query reads: blocks (T, K), -1 for none; the own block in orange."""
    T = len(blocks)
    N = -(-T // block_size)
    picture = np.ones((T, N, 3))
    for colour, rows, columns in (
        (BLUE, np.repeat(np.arange(T), blocks.shape[1]), blocks.reshape(-1)),
        (ORANGE, np.arange(T), np.arange(T) // block_size),
    ):
        keep = columns >= 0
        picture[rows[keep], columns[keep]] = matplotlib.colors.to_rgb(colour)
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, N * block_size, T, 0))
    axes.set(xlabel="keys, in blocks", ylabel="query", title="blue: chosen blocks; orange: own block")
    axes.grid(False)
    return figure
