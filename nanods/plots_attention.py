"""Draw figures about sparse attention (lesson 01).

Shapes: T queries and keys of one head, D its width, N blocks, K selected blocks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from nanods.attention import block_mask, topk_attention
from nanods.attention_selection import select_blocks
from nanods.plots import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    draw_block_map,
    draw_heads,
    label_below,
)

PALE_GREY, PALE_ORANGE = "#d5d9de", "#f6cfa6"


def reads(q: Tensor, k: Tensor, top_k: int) -> np.ndarray:
    """Return which keys top-k attention reads, (T, T): where v is the identity, the output of
    attention is its weights."""
    identity = q.new_ones(q.size(2)).diag()[None, None]
    return (topk_attention(q, k, identity, top_k)[0, 0] > 0).numpy()


def ladder(q: Tensor, k: Tensor, top_k: int, block_size: int, top_blocks: int) -> Figure:
    """Draw what four kinds of attention score and read, for q, k (1, 1, T, D) of few tokens."""
    T, past = q.size(2), np.tri(q.size(2), dtype=bool)
    block = np.arange(T) // block_size
    past_blocks = block[None] < block[:, None]  # (T, T)
    first = (np.arange(T) % block_size == 0)[:, None]
    panels = {
        "dense": (past, past, past.sum()),
        f"the {top_k} best keys": (past, reads(q, k, top_k), past.sum()),
    }
    for method, title in (("flat", "best blocks, by query"), ("tile", "best blocks, by tile")):
        blocks = select_blocks(q, k, block_size, top_blocks, method)
        read = block_mask(q, k, blocks, block_size, causal=True)[0, 0].numpy()
        scored = past_blocks & (first | (method == "flat"))
        panels[title] = (scored, read, read.sum() + scored.sum() // block_size)
    figure = Figure(figsize=(7, 6.6), layout="constrained")
    for axes, (title, (scored, read, products)) in zip(
        figure.subplots(2, 2).flat, panels.items(), strict=True
    ):
        picture = np.ones((T, T, 3))
        picture[scored] = to_rgb(PALE_ORANGE if "block" in title else PALE_GREY)
        picture[read] = to_rgb(BLUE)
        axes.imshow(picture, extent=(0, T, T, 0))
        step = block_size if "block" in title else 1
        axes.set(xticks=range(0, T + 1, step), yticks=range(0, T + 1, step))
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.set(xlabel="key", ylabel="query", title=f"{title}: {products} scores")
    label_below(
        figure,
        {"read": BLUE, "scored, not read": PALE_GREY, "its block's summary scored": PALE_ORANGE},
    )
    return figure


def changes(rows: Mapping[str, Sequence[bool]], token: int, title: str) -> Figure:
    """Draw, for each name, which positions' outputs change when one token changes.

    Changed outputs before the token are orange: the future has leaked into them.
    """
    figure = Figure(figsize=(7, 0.4 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    T = len(next(iter(rows.values())))
    picture = np.empty((len(rows), T, 3))
    picture[:] = to_rgb(PALE_GREY)
    for row, changed in zip(picture, rows.values(), strict=True):
        at = np.flatnonzero(changed)
        row[at[at < token]] = to_rgb(ORANGE)
        row[at[at >= token]] = to_rgb(BLUE)
    axes.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, T, len(rows), 0))
    axes.set(yticks=np.arange(len(rows)) + 0.5, yticklabels=list(rows), title=title)
    axes.set_xlabel(f"position of the output (token {token} changes)")
    for y in range(1, len(rows)):
        axes.axhline(y, color="white", linewidth=3)
    axes.grid(False)
    label_below(figure, {"equal": PALE_GREY, "changes": BLUE, "changes: a leak": ORANGE})
    return figure


def selections(panels: dict[str, np.ndarray], T: int, block_size: int, columns: int = 2) -> Figure:
    """Draw the block maps of several selections (T or tiles, K), two in a row, by title."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7, 3.3 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, blocks) in zip(grid.flat, panels.items(), strict=True):
        draw_block_map(axes, blocks, T, block_size)
        axes.set_title(title, fontsize=10)
    label_below(figure, {"selected blocks": BLUE, "current block": ORANGE})
    return figure


def tree_search(
    sizes: Sequence[int],
    scored: Sequence[Sequence[int]],
    best: Sequence[Sequence[int]],
    current: int,
    fan_out: int,
    title: str,
) -> Figure:
    """Draw the search of one query through a tree of summaries.

    sizes, scored, best: of each level, leaves first, the number of nodes, those that the search
    scores and the best of these, which it opens or, at the leaves, selects. `current` is the
    query's current block.
    """
    figure = Figure(figsize=(7, 0.75 * len(sizes) + 1), layout="constrained")
    axes = figure.subplots()
    for level, size in enumerate(sizes):
        width = fan_out**level
        for node in range(size):
            x = node * width
            colour = "white"
            if node in best[level]:
                colour = BLUE
            elif node in scored[level]:
                colour = PALE_ORANGE
            elif node == current // width:
                colour = ORANGE
            span = min(width, sizes[0] - x)
            box = Rectangle((x + 0.06, level), span - 0.12, 0.7, facecolor=colour, edgecolor=GREY)
            axes.add_patch(box)
            if level and (node in best[level] or node == current // width):
                for child in range(node * fan_out, min((node + 1) * fan_out, sizes[level - 1])):
                    child_x = (child + 0.5) * width / fan_out
                    axes.plot([x + span / 2, child_x], [level, level - 0.3], color=GREY, lw=0.8)
    labels = ["blocks", *(f"level {level}" for level in range(1, len(sizes)))]
    axes.set(yticks=np.arange(len(sizes)) + 0.35, yticklabels=labels, title=title)
    axes.set(xlim=(-0.2, sizes[0] + 0.2), ylim=(-0.15, len(sizes) - 0.15))
    axes.set_xlabel(f"blocks of keys, oldest first (the query is in block {current})")
    axes.grid(False)
    label_below(
        figure,
        {
            "scored, best": BLUE,
            "scored": PALE_ORANGE,
            "current: never scored": ORANGE,
            "never touched": "white",
        },
    )
    return figure


# ---- measurements --------------------------------------------------------------------------------


def crossover(ratios: dict[str, float]) -> float:
    """Return the number of tokens from which on a method is faster than dense attention.

    ratios: how many times as fast it is, by number of tokens. Logarithms are interpolated.
    """
    tokens = np.log([int(T) for T in ratios])
    return float(np.exp(np.interp(0, np.log(list(ratios.values())), tokens)))


def draw_lines(axes: Axes, lines: dict[str, dict[str, float]], colours: dict[str, str]) -> None:
    for name, values in lines.items():
        x, y = [int(T) for T in values], list(values.values())
        axes.plot(x, y, "o-", markersize=3, color=colours[name], label=name)


def set_token_axis(axes: Axes, tokens: Sequence[int]) -> None:
    """Make the x axis logarithmic in tokens, with the ticks `tokens`."""
    axes.set(xscale="log", xlabel="tokens")
    axes.set_xticks(tokens, [f"{T:,}" for T in tokens])
    axes.minorticks_off()


def times_faster(ratios: dict[str, dict[str, float]], names: dict[str, str]) -> Figure:
    """Draw how many times as fast as dense attention each method is, by tokens."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    lines = {names[method]: values for method, values in ratios.items()}
    draw_lines(axes, lines, dict(zip(lines, (BLUE, ORANGE), strict=True)))
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.text(16384, 1.04, "as fast as dense", ha="right", va="bottom", color="#5f6368")
    starts = sorted(crossover(values) for values in ratios.values())
    title = "Sparse attention is faster from about " + " and ".join(
        f"{start:,.0f}" for start in np.round(starts, -2)
    )
    title += " tokens on"
    set_token_axis(axes, (512, 1024, 2048, 4096, 8192, 16384))
    axes.set(yscale="log", ylabel="times as fast as dense", title=title)
    axes.set_yticks((1, 2, 4, 8), ("1", "2", "4", "8"))
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
    return figure


def memory(bytes_per_token: dict[str, dict[str, float]], names: dict[str, str]) -> Figure:
    """Draw the peak memory per token of forward and backward, by tokens."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    lines = {
        names[method]: {T: value / 1024 for T, value in values.items()}
        for method, values in bytes_per_token.items()
        if method in names
    }
    colours = dict(zip(lines, (GREY, BLUE, ORANGE, COLOURS[5]), strict=False))
    draw_lines(axes, lines, colours)
    set_token_axis(axes, (4096, 8192, 16384))
    title = "Fused attention is linear already: only stored scores grow with the length"
    axes.set(yscale="log", ylabel="KiB per token above the inputs", title=title)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.set_ylim(top=1000)
    return figure


def heads(report: dict, title: str) -> Figure:
    """Draw what one head selects, and the weight on what is read by layer and head, from a report
    of nanods/training/inspection.py."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_block_map(left, report["blocks"], report["tokens"], report["block_size"])
    left.set_title(f"layer {report['layer']}, head {report['head']}", fontsize=10)
    draw_heads(right, report["weight_read"], "")
    right.set_title("dense attention's weight\non the keys that are read", fontsize=10)
    figure.suptitle(title)
    label_below(figure, {"selected blocks": BLUE, "current block": ORANGE})
    return figure
