"""Draw figures about a Mixture of Experts from arrays: the figures of lesson 02.

Shapes: N tokens, K experts per token, E experts, S steps, L layers.
"""

from collections.abc import Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanods import plots
from nanods.plots import BLUE, COLOURS, GREY, ORANGE, draw_box

EXPERT_COLOURS = ("#9ec5e8", "#f4bf8f", "#a8d5b0", "#cdb7e3", "#f0a6b4", "#a5dcdc", "#d9c6a3")
EXPERT_COLOURS += ("#c9ced4",)


# ---- dispatch and capacity -----------------------------------------------------------------------


def draw_cell(
    axes: Axes, x: float, y: float, text: str, expert: int | None, height: float = 0.6
) -> None:
    """Draw one cell of a row, centred at (x, y), in the colour of an expert, or white."""
    colour = "white" if expert is None else EXPERT_COLOURS[expert]
    cell = Rectangle(
        (x - 0.4, y - height / 2), 0.8, height, facecolor=colour, edgecolor="#7d8590", linewidth=1
    )
    axes.add_patch(cell)
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def dispatch_diagram(experts: np.ndarray, n_expert: int) -> Figure:
    """Draw how the assignments (N, K) are sorted by expert, multiplied, and added to tokens."""
    N, K = experts.shape
    flat = experts.reshape(-1)
    order = flat.argsort(kind="stable")
    columns = np.arange(N * K) * 0.85 + np.arange(N * K) // K * 0.15
    # After sorting there is a gap before each expert.
    sorted_columns = np.arange(N * K) * 0.85 + flat[order] * 0.3
    sorted_columns += (columns.mean() - sorted_columns.mean()).round(2)
    y_top, y_sorted, y_mlp, y_out = 4.2, 2.7, 1.6, 0.0
    figure = Figure(figsize=(10, 4.7))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    for i, x in enumerate(columns):
        draw_cell(axes, x, y_top, f"token {i // K}" if i % K == 0 else "", flat[i])
        axes.texts[-1].set_fontsize(8)
        axes.text(x, y_top + 0.42, f"expert {flat[i]}", ha="center", va="bottom", fontsize=8)
    for token in range(N):
        middle = columns[token * K : token * K + K].mean()
        draw_cell(axes, middle, y_out, f"y[{token}]", None)
    for i, x in zip(order, sorted_columns, strict=True):
        token, colour = i // K, EXPERT_COLOURS[flat[i]]
        line = {"color": colour, "linewidth": 1.6, "zorder": 0}
        axes.plot([columns[i], x], [y_top - 0.3, y_sorted + 0.3], **line)
        draw_cell(axes, x, y_sorted, f"x[{token}]", flat[i])
        middle = columns[token * K : token * K + K].mean()
        axes.plot([x, middle], [y_mlp - 0.36, y_out + 0.3], **line)
    for e in range(n_expert):
        mine = sorted_columns[flat[order] == e]
        if not len(mine):
            continue
        text = f"MLP {e}: ({len(mine)}, C)"
        width = 0.85 * len(mine) - 0.05
        draw_box(axes, mine.mean(), y_mlp, text if len(mine) > 1 else f"MLP {e}", True, width, 0.5)
    for y, text in (
        (y_top, "experts (N, K)\nin token order"),
        (y_sorted, "rows (N K, C)\nsorted by expert"),
        (y_mlp, "one product\nfor each slice"),
        (y_out, "y[token] +=\nweight * row"),
    ):
        axes.text(-0.8, y, text, ha="right", va="center", fontsize=9.5)
    axes.set(xlim=(-2.9, columns[-1] + 0.9), ylim=(-0.5, 5.0))
    axes.axis("off")
    return figure


def capacity_diagram(
    panels: Sequence[Sequence[tuple[str, np.ndarray, np.ndarray]]], changed: int, title: str
) -> Figure:
    """Draw which assignments are kept, in rows of panels: (title, experts (N, K), kept (N, K)).

    A dropped assignment is white and crossed out. The tokens from `changed` on have a frame, and
    so has an earlier assignment that is kept in one panel of its row and dropped in another.
    """
    rows, columns = len(panels), len(panels[0])
    figure = Figure(figsize=(5 * columns, 2.2 * rows + 0.4), layout="constrained")
    for axes_row, row in zip(figure.subplots(rows, columns, squeeze=False), panels, strict=True):
        all_kept = np.array([kept for _, _, kept in row])  # (panels, N, K)
        flips = all_kept.any(axis=0) & ~all_kept.all(axis=0)
        flips[changed:] = False
        for axes, (name, experts, kept) in zip(axes_row, row, strict=True):
            draw_assignments(axes, experts, kept, flips, changed)
            axes.set_title(name, fontsize=10)
    figure.get_layout_engine().set(hspace=0.1)
    figure.suptitle(title)
    return figure


def draw_assignments(
    axes: Axes, experts: np.ndarray, kept: np.ndarray, flips: np.ndarray, changed: int
) -> None:
    """Draw one panel of capacity_diagram: experts, kept and flips (N, K)."""
    N, K = experts.shape
    for (n, k), expert in np.ndenumerate(experts):
        y = -0.75 * k
        draw_cell(axes, n, y, f"{expert}", expert if kept[n, k] else None)
        if not kept[n, k]:
            axes.plot([n - 0.4, n + 0.4], [y - 0.3, y + 0.3], color=GREY)
        if flips[n, k]:
            axes.add_patch(frame(n - 0.44, y - 0.34, 0.88, 0.68, ORANGE, 3))
    bottom = -0.75 * (K - 1) - 0.42
    axes.add_patch(frame(changed - 0.48, bottom, N - changed - 0.04, 0.42 - bottom, "black", 2))
    axes.set(xlim=(-0.6, N - 0.4), ylim=(bottom - 0.1, 0.55))
    axes.set_yticks([0, -0.75], ["1st choice", "2nd choice"])
    axes.set_xticks(range(N), [f"token {n}" for n in range(N)])
    axes.tick_params(length=0)
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def frame(
    x: float, y: float, width: float, height: float, colour: str, linewidth: float
) -> Rectangle:
    return Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=linewidth)


# ---- balance -------------------------------------------------------------------------------------

BALANCED_BY = {
    "none": "nothing",
    "capacity": "a capacity",
    "loss": "the load-balancing loss",
    "bias": "a bias, softmax scores",
    "bias, sigmoid": "a bias, sigmoid scores",
}


def loads_and_kinds(runs: dict[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """Draw for each run, by name, its load over time and what kind of tokens each expert gets.

    load (S, E) in assignments; kinds (G, E): assignments of each of G kinds of tokens.
    """
    figure = Figure(figsize=(9.5, 2.6 * len(runs) + 0.5), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False, width_ratios=(1.6, 1))
    for (left, right), (name, (load, kinds)) in zip(grid, runs.items(), strict=True):
        E = load.shape[1]
        relative = load / load.mean(axis=1, keepdims=True)
        plots.draw_load_over_time(left, range(len(load)), relative[:, None])
        left.set_yticks(np.arange(E) + 0.5, range(E))
        left.set(ylabel="expert", title=f"{name}: load")
        share = kinds / kinds.sum(axis=1, keepdims=True)
        image = right.imshow(share.T, cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
        right.set(xlabel="kind of token", title="who gets which kind?")
        right.set(xticks=range(len(kinds)), yticks=range(E))
        right.grid(False)
        figure.colorbar(image, ax=right, pad=0.02, label="share of the kind")
    figure.suptitle(title)
    return figure


def balance_table(balance: dict) -> tuple[list[str], list[list[object]]]:
    """Return the head and the rows of a table of results/balance.json: each cure at its best."""
    rows = []
    for cure, best in balance["best"].items():
        runs = best["runs"]
        numbers = [name for name, value in runs[0].items() if isinstance(value, int | float)]
        means = {name: mean(run[name] for run in runs) for name in numbers}
        cells = [f"{means['val_load_max_over_mean']:.2f}", f"{means['val_load_min_over_mean']:.2f}"]
        cells += [f"{means['dropped']:.0%}", f"{means['spikes']:.1f}", f"{means['val_bpb']:.3f}"]
        tried = len(balance["tried"][cure])
        rows.append([BALANCED_BY[cure], f"{best['strength']:g}", tried, len(runs), *cells])
    head = ["balanced by", "strength", "strengths tried", "seeds", "busiest / mean"]
    return [*head, "idlest / mean", "dropped", "spikes of the loss", "bits per byte"], rows


def balance_against_loss(balance: dict, title: str = "") -> Figure:
    """For cures tried at several strengths, draw each run of results/balance.json: its busiest
    expert's load above the mean and its bits per byte.

    The runs of one seed are joined by a line; those of the best strength with other seeds are
    hollow.
    """

    def point(run: dict) -> tuple[float, float]:
        return run["val_load_max_over_mean"] - 1, run["val_bpb"]

    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    several = {cure: tried for cure, tried in balance["tried"].items() if len(tried) > 1}
    for (cure, tried), colour in zip(several.items(), (BLUE, ORANGE, COLOURS[3]), strict=True):
        x, y = zip(*map(point, tried.values()), strict=True)
        axes.plot(x, y, "o-", color=colour, linewidth=1, label=BALANCED_BY[cure])
        for strength, run in tried.items():
            label = f"{float(strength):g}"
            where = {"xytext": (5, 5), "textcoords": "offset points"}
            axes.annotate(label, point(run), fontsize=9, color=colour, **where)
        for run in balance["best"][cure]["runs"][1:]:
            axes.plot(*point(run), "o", markerfacecolor="none", color=colour)
    axes.set(xlabel="busiest expert: load above the mean", xscale="log", title=title)
    axes.set(ylabel="bits per byte on validation")
    axes.margins(x=0.1, y=0.12)
    ticks = (0.1, 0.2, 0.5, 1, 2)
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False)
    return figure


def load_histories(runs: dict[str, np.ndarray], last_step: int, title: str) -> Figure:
    """Draw the load (S, L, E) of each run, by name, in multiples of an even share, over time."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (name, load) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        plots.draw_load_over_time(axes, np.linspace(0, last_step, len(load)), load)
        axes.set_title(name)
        axes.set_ylabel("16 experts in each layer" if load.shape[2] == 16 else "experts")
    figure.suptitle(title)
    return figure


# ---- what experts do -----------------------------------------------------------------------------


def text_by_expert(
    text: Sequence[str], experts: np.ndarray, names: Sequence[str], title: str
) -> Figure:
    """Draw a text coloured by each token's first expert (T,), with the name of each expert."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes, legend = figure.subplots(2, 1, height_ratios=(4, 1))
    plots.draw_text_by_expert(axes, text, 2 * experts, title)  # tab20 has pairs of similar colours
    for label in axes.texts:
        label.set_fontsize(10)
    columns = -(-len(names) // 2)
    palette = plots.matplotlib.colormaps["tab20"].colors
    for e, name in enumerate(names):
        x, y = e % columns, e // columns
        legend.add_patch(Rectangle((x, -y), 0.08, 0.6, color=palette[2 * e], alpha=0.75))
        legend.text(x + 0.11, 0.3 - y, f"{e}: {name}", va="center", fontsize=9, family="monospace")
    legend.set(xlim=(0, columns), ylim=(-1.1, 1))
    legend.axis("off")
    return figure


def explained_selection(fractions: dict[str, Sequence[float]], title: str) -> Figure:
    """Draw which fraction of the selection each feature explains, layer by layer (L,)."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(fractions.items(), (BLUE, ORANGE, COLOURS[3]), strict=False):
        axes.plot(range(len(values)), values, "o-", color=colour)
        axes.text(len(values) - 0.9, values[-1], name, va="center", color=colour)
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.text(0, 1.015, "everything", va="bottom", fontsize=8, color=GREY)
    axes.set(
        xlabel="layer",
        ylabel="explained, minus chance",
        title=title,
        xticks=range(len(values)),
        xlim=(-0.15, len(values) - 0.2),
        ylim=(-0.03, 1.1),
    )
    axes.yaxis.set_major_formatter(plots.matplotlib.ticker.PercentFormatter(1))
    return figure
