"""Diagrams of layers and algorithms, in one style: boxes, arrows, and shapes beside the arrows.

Steps are orange, what they read and give is grey. A diagram takes no arguments: pictures of data
are in plots*.py. architecture() is docs/architecture.png (`make docs`), all others open a section
of a lesson.

The repr of a Diagram is the text in it. So `make lessons` compares the text of every diagram with
the committed one, and tests/test_diagrams.py that of docs/architecture.png.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanods.plots import draw_arrow, draw_box, draw_chain

GREY, BROWN = "#7d8590", "#9a5b00"  # lines; words about a whole row or column
HELD, ELSEWHERE = "#9ec5e8", "white"  # a process has a part of the weights or tokens, or has not


class Diagram(Figure):
    """A figure of one drawing without axes, which prints as its words."""

    def __init__(self, width: float, height: float) -> None:
        """`width` and `height` in inches."""
        super().__init__(figsize=(width, height))
        self.drawing = self.add_axes((0.01, 0.01, 0.98, 0.98))
        self.drawing.axis("off")

    def savefig(self, file: Path | BinaryIO, **options: object) -> None:
        """Write a PNG whose metadata has the words as its Description."""
        super().savefig(file, metadata={"Description": repr(self)}, **options)

    def __repr__(self) -> str:
        words = (" ".join(text.get_text().split()) for text in self.drawing.texts)
        return f"Diagram: {' | '.join(word for word in words if word)}"


# ---- all versions --------------------------------------------------------------------------------


def draw_version(axes: Axes, x: float, title: str, boxes: list[tuple[str, bool]]) -> None:
    """Draw one version as a stack of boxes, bottom to top: (text, whether the version adds it)."""
    for row, (text, is_new) in enumerate(boxes):
        draw_box(axes, x, row * 1.25, text, is_new, width=2.6, height=0.8)
        if row:
            draw_arrow(axes, (x, row * 1.25 - 0.83), (x, row * 1.25 - 0.42))
    axes.text(x, 5.95, title, ha="center", va="bottom", fontsize=11, fontweight="bold")


def architecture() -> Diagram:
    """Draw V0 to V3 side by side; what a version adds to the one before is orange."""
    versions = {
        "V0: dense GPT": [
            ("tokens (B, T)", False),
            ("embedding (B, T, C)", False),
            ("dense attention", False),
            ("MLP", False),
            ("next token: logits (B, T, V)\ncross-entropy", False),
        ],
        "V1: sparse attention": [
            ("tokens (B, T)", False),
            ("embedding (B, T, C)", False),
            ("select blocks of keys,\nattend to these only", True),
            ("MLP", False),
            ("next token: logits (B, T, V)\ncross-entropy", False),
        ],
        "V2: Mixture of Experts": [
            ("tokens (B, T)", False),
            ("embedding (B, T, C)", False),
            ("select blocks of keys,\nattend to these only", False),
            ("router: 2 of 16 experts\nper token", True),
            ("next token: logits (B, T, V)\n+ balancing losses", True),
        ],
        "V3: text, image, audio": [
            ("caption, image, sound", True),
            ("tokens per modality\n(B, T, C)", True),
            ("dense attention,\nin both directions", True),
            ("MLP, or V2's experts", False),
            ("one embedding each (B, M)\ncontrastive loss", True),
        ],
    }
    figure = Diagram(12, 5.4)
    axes = figure.drawing
    for column, (title, boxes) in enumerate(versions.items()):
        draw_version(axes, 3.4 * column, title, boxes)
    repeated = "n_layer blocks: each reads the residual stream and adds to it"
    axes.annotate("", (-1.55, 1.95), (-1.55, 4.3), arrowprops={"arrowstyle": "-", "color": GREY})
    axes.text(-1.75, 3.1, repeated, rotation=90, ha="center", va="center", fontsize=8)
    axes.text(5.1, -0.95, "orange: what this version changes", ha="center", fontsize=9, color=BROWN)
    axes.set(xlim=(-2.1, 11.8), ylim=(-1.2, 6.5))
    return figure


# ---- the trunk -----------------------------------------------------------------------------------


def trunk() -> Diagram:
    """Draw the model: the residual stream, and the two layers of a block that add to it."""
    figure = Diagram(10, 3.3)
    axes = figure.drawing
    ends = (
        (0.7, "tokens\n(B, T)", False, 1.1),
        (2.5, "embedding,\nRMSNorm", False, 1.4),
    )
    draw_chain(axes, 0, ends, [""], fontsize=9.5)
    for x, text in {4.6: "attention:\nreads other tokens", 7.2: "MLP:\neach token alone"}.items():
        draw_box(axes, x, 1.35, f"RMSNorm\n{text}", True, 1.75, 1.1, fontsize=9.5)
        axes.plot([x - 1.1, x - 1.1], [0, 1.35], color=GREY, linewidth=1.2)
        draw_arrow(axes, (x - 1.1, 1.35), (x - 0.9, 1.35))
        axes.plot([x + 0.9, x + 1.1], [1.35, 1.35], color=GREY, linewidth=1.2)
        draw_arrow(axes, (x + 1.1, 1.35), (x + 1.1, 0.2))
        axes.text(x + 1.1, 0, "+", ha="center", va="center", fontsize=14, zorder=3)
        axes.plot([x + 1.1], [0], "o", markersize=17, color="white", markeredgecolor=GREY)
    for start, end in ((3.25, 5.52), (5.88, 8.12), (8.48, 9.0)):
        draw_arrow(axes, (start, 0), (end, 0))
    draw_box(axes, 9.75, 0, "RMSNorm,\nhead", False, 1.4, 0.8, fontsize=9.5)
    draw_arrow(axes, (10.5, 0), (10.9, 0))
    draw_box(axes, 11.6, 0, "logits\n(B, T, V)", False, 1.3, 0.8, fontsize=9.5)
    axes.text(5.9, -0.35, "residual stream x (B, T, C)", ha="center", va="top", fontsize=9.5)
    axes.plot([3.35, 3.35, 8.55, 8.55], [2.1, 2.2, 2.2, 2.1], color=GREY, linewidth=1)
    axes.text(5.95, 2.28, "a block; n_layer of them in a row", ha="center", fontsize=9.5)
    axes.set(xlim=(0, 12.4), ylim=(-0.85, 2.6))
    return figure


def attention() -> Diagram:
    """Draw an attention layer with its shapes: RoPE, QK-norm, the causal softmax."""
    figure = Diagram(10, 3.6)
    axes = figure.drawing
    rows = {
        2.2: ("query", "RoPE, RMSNorm\nto query_gain"),
        1.1: ("key", "RoPE, RMSNorm\nto 1"),
    }
    draw_box(axes, 0.7, 1.1, "x\n(B, T, C)", False, 1.1, 0.8)
    for y, (name, text) in rows.items():
        chain = ((3.0, f"{name}\n(C, C)", False, 1.0), (5.8, text, True, 1.7))
        draw_chain(axes, y, chain, ["(B, H, T, D)"], fontsize=9)
        draw_arrow(axes, (1.28, 1.1), (2.47, y))
    draw_box(axes, 3.0, 0, "value\n(C, C)", False, 1.0, 0.8)
    draw_arrow(axes, (1.28, 1.1), (2.47, 0))
    draw_box(axes, 8.4, 1.65, "q . k / $\\sqrt{D}$,\ncausal softmax", True, 1.7, 0.8)
    draw_arrow(axes, (6.68, 2.2), (7.52, 1.75))
    draw_arrow(axes, (6.68, 1.1), (7.52, 1.55))
    draw_box(axes, 8.4, 0, "weights $\\times$ v", False, 1.7, 0.8)
    draw_arrow(axes, (3.53, 0), (7.52, 0))
    axes.text(5.5, 0.08, "(B, H, T, D)", ha="center", va="bottom", fontsize=9)
    draw_arrow(axes, (8.4, 1.22), (8.4, 0.43))
    axes.text(8.5, 0.82, "weights\n(B, H, T, T)", va="center", fontsize=9)
    draw_box(axes, 11.0, 0, "out\n(C, C)", False, 1.0, 0.8)
    draw_arrow(axes, (9.28, 0), (10.47, 0))
    axes.text(9.87, 0.08, "(B, T, C)", ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(0, 11.8), ylim=(-0.55, 2.75))
    return figure


# ---- sparse attention ----------------------------------------------------------------------------


def block_attention() -> Diagram:
    """Draw the steps of block attention with their shapes: select (top), then attend (bottom)."""
    figure = Diagram(7.6, 3.6)
    axes = figure.drawing
    boxes = {
        "k": (0.4, 2, "k", False),
        "summarise": (2.3, 2, "summarise\neach block", True),
        "score": (4.6, 2, "score summaries,\nhide current, future", True),
        "top": (7.3, 2, "keep the\nbest K", True),
        "q": (4.6, 3.2, "q (B, H, T, D)", False),
        "gather": (7.3, 0.5, "read K blocks\nand the current", True),
        "softmax": (4.6, 0.5, "one causal softmax\nover their keys", True),
        "out": (1.9, 0.5, "output\n(B, H, T, D)", False),
        "kv": (7.3, -0.75, "k, v (B, H, S, D)", False),
    }
    widths = {"k": 0.5, "summarise": 1.35, "top": 1.2, "out": 1.4}
    for name, (x, y, text, is_step) in boxes.items():
        draw_box(axes, x, y, text, is_step, widths.get(name, 2), 0.75, fontsize=9)
    arrows = (
        ((0.67, 2), (1.6, 2), "(B, H, S, D)"),
        ((3, 2), (3.58, 2), "(B, H,\nN, D)"),
        ((5.62, 2), (6.68, 2), "(B, H, T, N)"),
        ((6.28, 0.5), (5.62, 0.5), ""),
        ((3.58, 0.5), (2.62, 0.5), ""),
    )
    for start, end, label in arrows:
        draw_arrow(axes, start, end, label, rise=0.42, fontsize=8)
    draw_arrow(axes, (4.6, 2.82), (4.6, 2.4))
    draw_arrow(axes, (7.3, 1.6), (7.3, 0.9))
    draw_arrow(axes, (7.3, -0.37), (7.3, 0.1))
    axes.text(7.2, 1.25, "blocks (B, H, T, K)", ha="right", va="center", fontsize=8)
    axes.text(0.4, 3.15, "select: no gradient", fontsize=9, color=BROWN, va="center")
    axes.text(0.4, -0.75, "attend: with gradient", fontsize=9, color=BROWN, va="center")
    axes.set(xlim=(0, 8.4), ylim=(-1.25, 3.7))
    return figure


# ---- experts -------------------------------------------------------------------------------------


def expert_layer() -> Diagram:
    """Draw a Mixture of Experts layer: the router, the dispatch and the weighted sum."""
    figure = Diagram(10, 3.6)
    axes = figure.drawing
    top, bottom = 1.3, -0.7
    router = (
        (3.0, "gate (E, C)\nsoftmax(x gate$^T$)", True, 1.9),
        (6.2, "select the K best,\ndivide them by\ntheir sum", True, 1.9),
    )
    dispatch = (
        (0.6, "x\n(N, C)", False, 0.9),
        (3.0, "gather the rows,\nsorted by expert", True, 1.9),
        (6.2, "E MLPs, each on\nits own rows", True, 1.9),
        (9.0, "weighted sum\nfor each token", True, 1.7),
        (10.9, "y\n(N, C)", False, 0.9),
    )
    draw_chain(axes, top, router, ["probabilities\n(N, E)"], 0.9, 9.5)
    draw_chain(axes, bottom, dispatch, ["", "(N K, C)", "(N K, C)", ""], 0.9, 9.5)
    axes.plot([0.6, 0.6], [bottom + 0.48, top], color=GREY, linewidth=1)
    draw_arrow(axes, (0.6, top), (2.02, top))
    draw_arrow(axes, (5.5, top - 0.48), (3.6, bottom + 0.48))
    axes.text(4.2, 0.33, "experts (N, K)", ha="right", fontsize=9)
    draw_arrow(axes, (6.9, top - 0.48), (8.6, bottom + 0.48))
    axes.text(7.95, 0.33, "weights (N, K)", ha="left", fontsize=9)
    axes.set(xlim=(0, 11.5), ylim=(-1.35, 1.95))
    return figure


# ---- contrastive learning ------------------------------------------------------------------------


def contrastive_model() -> Diagram:
    """Draw V3: three kinds of input, one trunk, one embedding each, and the loss."""
    figure = Diagram(10, 3.9)
    axes = figure.drawing
    rows = {  # y: the input, how it becomes tokens
        2.4: ("caption", "BPE tokens"),
        1.2: ("image\n(B, 3, 32, 32)", "patches of 8 x 8,\nhalf overlapping"),
        0.0: ("sound (log-mel)\n(B, 32, 32)", "groups of frames"),
    }
    draw_box(
        axes, 5.55, 1.2, "one trunk:\nblocks of V0 or V2,\nno causal mask", True, 1.75, 3.3, 10
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
            draw_arrow(axes, (start, y), (end, y), shape, fontsize=8.5)
    loss = "for each pair of\nmodalities:\n\ncosines (B, B)\n x scale\n\ntwo cross-\nentropies"
    draw_box(axes, 10.35, 1.2, loss, True, 1.4, 3.3, 10)
    axes.text(5.55, -0.78, "shared by all modalities", ha="center", fontsize=9.5)
    axes.text(2.75, -0.78, "own for each modality", ha="center", fontsize=9.5)
    axes.text(8.0, -0.78, "own for each modality", ha="center", fontsize=9.5)
    axes.set(xlim=(0, 11.15), ylim=(-1.0, 3.0))
    return figure


def gradient_caching() -> Diagram:
    """Draw gradient caching: embed without a graph, differentiate the loss, embed again."""
    figure = Diagram(10, 3.3)
    axes = figure.drawing
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
        draw_arrow(axes, (3.37, y), (4.03, y), "(b, M)", fontsize=8.5)
        text = "encoder again, with a graph;\nbackward of\nsum(embedding * gradient)"
        draw_box(axes, 10.05, y, text, False, 3.1, 0.75, 9.5)
        draw_arrow(axes, (7.62, y), (8.48, y), "gradient\n(b, M)", fontsize=8.5)
    for x, text in ((1.85, "1. embed"), (6.0, "2. differentiate"), (10.05, "3. embed again")):
        axes.text(x, 2.85, text, ha="center", fontsize=11, fontweight="bold")
    axes.set(xlim=(0.1, 11.75), ylim=(-0.55, 3.15))
    return figure


# ---- many processes ------------------------------------------------------------------------------


def draw_cells(axes: Axes, x: float, y: float, held: np.ndarray) -> None:
    """Draw a grid of cells (rows, columns) with its upper left corner at (x, y), coloured where
    `held` is true."""
    for (row, column), is_held in np.ndenumerate(held):
        corner = (x + 0.5 * column, y - 0.5 * (row + 1))
        colour = HELD if is_held else ELSEWHERE
        cell = Rectangle(corner, 0.5, 0.5, facecolor=colour, edgecolor=GREY, linewidth=1)
        axes.add_patch(cell)


def splits() -> Diagram:
    """Draw what each of two processes keeps and reads by dp, fsdp, tp and ep, and what it sends."""
    full = np.ones((4, 4), bool)
    rows, columns = full.copy(), full.copy()
    rows[2:], columns[:, 2:] = False, False
    experts = full.copy()
    experts[1:, 2:] = False  # the first row stands for all other weights
    half = np.array([[True, True, False, False]])
    splits = {  # the weights and the tokens of process 0, where process 1 has the others
        "dp": (full, half, "gradients,\nonce a step"),
        "fsdp": (rows, half, "weights before each layer,\ngradients after it"),
        "tp": (columns, full[:1], "sums of activations,\n2 a block each way"),
        "ep": (experts, half, "each token's rows to its\nexperts, and back"),
    }
    figure = Diagram(10, 4.1)
    axes = figure.drawing
    for i, (name, (weights, tokens, sent)) in enumerate(splits.items()):
        left = 5.6 * i
        axes.text(left + 2.25, 4.1, name, ha="center", fontsize=13, fontweight="bold")
        for process in range(2):
            x = left + 2.5 * process
            other_weights = np.flip(weights, axis=0 if name == "fsdp" else 1)
            draw_cells(axes, x, 3.2, other_weights if process else weights)
            draw_cells(axes, x, 0.6, np.flip(tokens) if process else tokens)
            axes.text(x + 1, 3.4, f"process {process}", ha="center", fontsize=9)
        axes.text(left + 2.25, -0.35, f"sends {sent}", ha="center", va="top", fontsize=9)
    for y, text in ((2.2, "weights"), (0.35, "tokens")):
        axes.text(-0.3, y, text, ha="right", va="center", fontsize=10)
    axes.text(-0.3, 2.95, "ep: outside\nthe experts", ha="right", va="center", fontsize=7.5)
    axes.set(xlim=(-2.3, 21.6), ylim=(-1.6, 4.7))
    return figure


def tensor_parallel() -> Diagram:
    """Draw an MLP that two of n processes share, with the shapes of what they compute."""
    figure = Diagram(10, 3.1)
    axes = figure.drawing
    for y, process, part in ((1.6, "process 0", "0"), (0.0, "process n - 1", "n-1")):
        boxes = [
            (0.6, "all tokens x\n(N, C)", False, 1.5),
            (3.0, f"up$_{{{part}}}$\n(H/n, C)", True, 1.3),
            (5.5, "relu()$^2$", False, 1.1),
            (7.9, f"out$_{{{part}}}$\n(C, H/n)", True, 1.3),
        ]
        draw_chain(axes, y, boxes, ["", "(N, H/n)", "(N, H/n)"])
        axes.text(-0.4, y + 0.55, process, ha="left", fontsize=9, fontweight="bold")
        draw_arrow(axes, (8.58, y), (9.95, 0.8 + 0.3 * np.sign(y - 0.8)))
        label_y = y + (0.12 if y > 0.8 else -0.12)
        va = "bottom" if y > 0.8 else "top"
        axes.text(9.2, label_y, "term (N, C)", ha="left", va=va, fontsize=9)
    for x in (0.6, 3.0, 5.5, 7.9):
        axes.text(x, 0.8, "...", ha="center", va="center", fontsize=12, color=GREY)
    draw_box(axes, 10.6, 0.8, "sum:\nall-reduce", True, 1.3, 0.8)
    draw_arrow(axes, (11.28, 0.8), (11.85, 0.8))
    draw_box(axes, 12.4, 0.8, "y\n(N, C)", False, 1.05, 0.8)
    axes.set(xlim=(-0.6, 13.1), ylim=(-0.7, 2.6))
    return figure


def expert_parallel() -> Diagram:
    """Draw a layer of experts that two of n processes share, with the shapes of what is sent."""
    figure = Diagram(10, 3.1)
    axes = figure.drawing
    for y, process, owned in ((1.6, "process 0", "first"), (0.0, "process n - 1", "last")):
        boxes = [
            (0.5, "own tokens\n(N, C)", False, 1.4),
            (2.9, "choose experts,\nsort the rows", True, 1.7),
            (6.5, f"the {owned} E/n\nexperts", True, 1.5),
            (10.4, "weighted sum\nof each token", True, 1.7),
            (12.6, "y\n(N, C)", False, 1.0),
        ]
        draw_chain(axes, y, boxes, ["", None, None, ""])
        axes.text(-0.25, y + 0.55, process, ha="left", fontsize=9, fontweight="bold")
        for other in (1.6, 0.0):  # both all-to-alls
            draw_arrow(axes, (3.78, y), (5.72, other))
            draw_arrow(axes, (7.28, y), (9.52, other))
    for x, text in (
        (4.75, "all-to-all\nrows (N K, C)"),
        (6.5, "received (R, C)"),
        (8.4, "all-to-all\noutputs (N K, C)"),
    ):
        y = 2.1 if "all" in text else 0.8
        axes.text(x, y, text, ha="center", va="bottom" if y > 1 else "center", fontsize=9)
    axes.set(xlim=(-0.4, 13.3), ylim=(-0.7, 2.8))
    return figure


def plan() -> Diagram:
    """Draw what a plan is computed from, and in which order."""
    figure = Diagram(10, 3.7)
    axes = figure.drawing
    given = {
        "model\nparameters, FLOP per token,\nbytes saved per token": 2.2,
        "split\nmesh, micro-batch,\ncheckpointing": 1.1,
        "GPU\nmemory, FLOP/s,\nspeed of its links": 0.0,
    }
    results = {
        "bytes kept\nexercises 1, 2": 2.2,
        "bytes sent\nexercise 3": 1.1,
        "seconds of a step\nexercises 4, 6": 0.0,
    }
    for text, y in given.items():
        draw_box(axes, 1.4, y, text, False, 2.8, 0.85, fontsize=9)
    for text, y in results.items():
        draw_box(axes, 5.9, y, text, True, 2.2, 0.7, fontsize=9)
    for start, ends in {2.2: (2.2, 1.1, 0.0), 1.1: (2.2, 1.1), 0.0: (0.0,)}.items():
        for end in ends:
            draw_arrow(axes, (2.83, start), (4.77, end))
    draw_arrow(axes, (5.9, 0.72), (5.9, 0.38))
    draw_box(axes, 9.6, 2.2, "does it fit?\nhow many GPUs? exercise 5", False, 2.4, 0.7, fontsize=9)
    draw_box(axes, 9.6, 0.0, "hours, GPU-hours", False, 2.4, 0.7, fontsize=9)
    draw_arrow(axes, (7.03, 2.2), (8.37, 2.2))
    draw_arrow(axes, (7.03, 0.0), (8.37, 0.0))
    draw_arrow(axes, (9.6, 1.82), (9.6, 0.38))
    axes.text(9.7, 1.1, "the fastest\nthat fits", va="center", fontsize=9)
    axes.set(xlim=(-0.1, 11.0), ylim=(-0.6, 2.8))
    return figure


# ---- integers ------------------------------------------------------------------------------------


def int8_layer() -> Diagram:
    """Draw an INT8 linear layer: what is rounded and multiplied, and the shapes."""
    figure = Diagram(10, 2.9)
    axes = figure.drawing
    boxes = {
        "x": (0.6, 1, "x\n(N, C) fp32", False),
        "rows": (2.6, 1, "round each row\nq = round(x / s)", True),
        "product": (5.2, 1, "product of integers\nq r$^T$, sums in int32", True),
        "scale": (7.8, 1, "multiply by\ns[n] t[f]", True),
        "y": (9.6, 1, "y\n(N, F) fp32", False),
        "weight": (5.2, -0.4, "r (F, C) int8, t (F,)\nrounded once, before", False),
    }
    for x, y, text, is_step in boxes.values():
        draw_box(axes, x, y, text, is_step, box_width(text), height=0.7, fontsize=8.5)
    for start, end, label in (
        ("x", "rows", ""),
        ("rows", "product", "q (N, C)\nint8"),
        ("product", "scale", "(N, F)\nint32"),
        ("scale", "y", ""),
    ):
        (a, y, *_), (b, *_) = boxes[start], boxes[end]
        left, right = a + box_width(boxes[start][2]) / 2, b - box_width(boxes[end][2]) / 2
        draw_arrow(axes, (left, y), (right, y), label, rise=0.12, fontsize=8)
    draw_arrow(axes, (5.2, -0.05), (5.2, 0.62))
    axes.plot([2.6, 2.6, 7.8], [1.38, 1.85, 1.85], color=GREY, linewidth=1)
    draw_arrow(axes, (7.8, 1.85), (7.8, 1.38))
    axes.text(5.2, 1.88, "s (N,): one scale per row", ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(-0.3, 10.5), ylim=(-0.9, 2.2))
    return figure


def box_width(text: str) -> float:
    return 0.35 + 0.085 * max(map(len, text.replace("$^T$", "").split("\n")))


# ---- serving -------------------------------------------------------------------------------------


def engine() -> Diagram:
    """Draw the way of a request through the engine, with the shapes of what each part computes."""
    figure = Diagram(9, 3.1)
    axes = figure.drawing
    boxes = (
        (0.9, "waiting\nrequests", False, 1.5),
        (3.5, "read the prompt\nalone, in chunks", True, 2.1),
        (6.6, "decode, together\none token per row", True, 2.3),
        (9.2, "answered", False, 1.3),
    )
    draw_chain(axes, 1.2, boxes, ("a slot\nis free", "prompt\nread", "last\ntoken"))
    axes.plot([6.6, 6.6, 3.5], [1.63, 2.15, 2.15], color=GREY, linewidth=1)
    draw_arrow(axes, (3.5, 2.15), (3.5, 1.63))
    text = "this row's context is full: keep the last half, read it again"
    axes.text(5.05, 2.2, text, ha="center", va="bottom", fontsize=8)
    for x, text in (
        (3.5, "tokens (1, chunk)\nreader's cache: keys and values\n(1, H, context, D) per layer"),
        (6.6, "tokens (rows, 1) -> logits (rows, 1, V)\ncache: keys and values\n"
              "(slots, H, context, D) per layer"),
    ):  # fmt: skip
        axes.text(x, 0.7, text, ha="center", va="top", fontsize=8.5, color="#444444")
    axes.set(xlim=(0, 10), ylim=(-0.1, 2.5))
    return figure
