"""Draw figures about the trunk from arrays: the figures of lesson 00.

Shapes: B batch, T tokens, C width, H heads, D = C / H, V vocabulary, F hidden width.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanods.plots import BLUE, COLOURS, GREY, ORANGE

STREAM = "#7d8590"


# ---- norms, positions, scores --------------------------------------------------------------------


def two_panels(width: float = 9, height: float = 3.4) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, *figure.subplots(1, 2)


def normalised_vectors(before: np.ndarray, after: np.ndarray) -> Figure:
    """Draw vectors (N, 2) before and after RMSNorm, each in a colour of its own."""
    figure, *panels = two_panels(7.5, 3.6)
    limit = 1.1 * np.abs(before).max()
    titles = ("Vectors of any length ...", "... get one, and keep their direction")
    for axes, vectors, title in zip(panels, (before, after), titles, strict=True):
        for vector, colour in zip(vectors, COLOURS, strict=False):
            axes.plot([0, vector[0]], [0, vector[1]], color=colour)
            axes.plot(*vector, "o", color=colour)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)
        axes.set(xlabel="channel 0", ylabel="channel 1")
    turn = np.linspace(0, 2 * np.pi, 200)
    radius = np.linalg.norm(after[0])
    panels[1].plot(radius * np.cos(turn), radius * np.sin(turn), "--", color=GREY, linewidth=1)
    panels[1].annotate(
        "root mean square 1", (0, -radius), (0, -radius - 0.15), ha="center", va="top", fontsize=8
    )
    return figure


def rotations(
    turns: dict[str, Sequence[float]], scores: dict[str, Sequence[float]], title: str
) -> Figure:
    """Draw the cosine of each pair's angle at each position, and scores by distance.

    turns: by the name of the pair. scores: of distances 0, 1, ..., by the position of the key.
    """
    figure, left, right = two_panels()
    for (name, cosines), colour in zip(turns.items(), COLOURS, strict=False):
        left.plot(cosines, color=colour, label=name)
    left.set(xlabel="position (tokens)", ylabel="cosine of the angle", ylim=(-1.1, 1.7))
    left.set_title("Pairs turn at different speeds")
    left.legend(frameon=False, ncols=2, fontsize=9, loc="upper center")
    widths = np.linspace(6, 1.5, len(scores))
    for (name, values), colour, width in zip(scores.items(), COLOURS, widths, strict=False):
        right.plot(values, color=colour, linewidth=width, label=name)
    right.set(xlabel="position of the query minus that of the key", ylabel="q . k", title=title)
    right.legend(frameon=False, fontsize=9)
    return figure


def scores_against_scale(
    scales: Sequence[float], largest: dict[str, Sequence[float]], bound: float
) -> Figure:
    """Draw the largest score for weights of different size, and the bound of QK-norm."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(largest.items(), (ORANGE, BLUE), strict=True):
        axes.loglog(scales, values, "o-", color=colour, label=name)
    axes.axhline(bound, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"bound: query_gain x sqrt(D) = {bound:.1f}",
        (0.99, bound),
        xycoords=("axes fraction", "data"),
        ha="right",
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=9,
        color="#5f666d",
    )
    axes.set(
        xlabel="query and key weights, in multiples of their start",
        ylabel="largest score",
        title="With QK-norm no score exceeds a bound, however large the weights",
    )
    axes.set_xticks(scales, [f"{scale}" for scale in scales])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
    return figure


def activations(x: Sequence[float], curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw activation functions (values, slopes), by name."""
    figure, *panels = two_panels(8, 3.2)
    titles = ("Squared ReLU grows faster ...", "... and its slope has no jump")
    for axes, which, title in zip(panels, (0, 1), titles, strict=True):
        for (name, pair), colour in zip(curves.items(), (GREY, BLUE, ORANGE), strict=True):
            axes.plot(x, pair[which], color=colour, label=name)
        axes.set(xlabel="input", ylabel=("output", "slope")[which], title=title)
    panels[0].legend(frameon=False)
    return figure


# ---- the optimizer, the stream -------------------------------------------------------------------


def newton_schulz(
    step: Callable[[np.ndarray], np.ndarray], before: np.ndarray, after: np.ndarray
) -> Figure:
    """Draw what steps do to a singular value, and those of a gradient before and after.

    step: a singular value after one step. before, after: sorted singular values.
    """
    figure, left, right = two_panels()
    x = np.linspace(0, 1, 400)
    y = x
    for steps in range(1, 6):
        y = step(y)
        if steps in (1, 3, 5):
            left.plot(x, y, color=COLOURS[steps // 2], label=f"{steps} step{'s' * (steps > 1)}")
    left.axhline(1, color=GREY, linestyle="--", linewidth=1)
    left.set(xlabel="singular value before", ylabel="after", ylim=(0, 1.65))
    left.set_title("Five steps bring singular values near 1")
    left.legend(frameon=False, ncols=3, loc="upper center")
    right.semilogy(before / before[0], color=ORANGE, label="gradient (largest = 1)")
    right.semilogy(after, color=BLUE, label="Muon's update")
    right.set(xlabel="singular value, from the largest", ylabel="size")
    right.set_title("The update moves all directions alike")
    right.legend(frameon=False, loc="lower left")
    return figure


def stream(losses: Sequence[float], sizes: Sequence[float], chance: float) -> Figure:
    """Draw what the head predicts from the residual stream after each block, and its size there.

    losses (bits per byte), sizes (root mean square): after the embedding and after each block.
    """
    figure, left, right = two_panels(8, 3.3)
    blocks = range(len(losses))
    for axes, values in ((left, losses), (right, sizes)):
        axes.plot(blocks, values, "o-", color=BLUE)
        axes.set(xlabel="after block (0: embedding)", xticks=blocks)
    left.axhline(chance, color=GREY, linestyle="--", linewidth=1)
    left.annotate("uniform guess", (0, chance), (0, 3), textcoords="offset points", fontsize=8)
    left.set(ylabel="bits per byte", title="Each block improves the prediction")
    right.set(ylabel="root mean square of x", title="Each block adds to the stream")
    right.set_ylim(bottom=0)
    return figure
