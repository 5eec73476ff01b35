import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from nanods import plots_experts
from nanods.plots import ORANGE

RESULTS = Path(__file__).parents[1] / "results" / "experts.json"


def with_biases(rates, steps=400):
    """Return the results, with one run of the bias at each rate in place of those they have."""
    bench = json.loads(RESULTS.read_text())
    run, summary = bench["runs"]["bias"][0], bench["summary"]["bias"]
    for part in ("runs", "summary"):
        bench[part] = {k: v for k, v in bench[part].items() if not k.startswith("bias")}
    for rate in rates:
        command = f"train.py v2-tiny --moe.bias-rate {rate} --steps {steps}"
        bench["runs"][f"bias {rate}"] = [run | {"command": command, "step": steps}]
        bench["summary"][f"bias {rate}"] = summary
    return bench


def test_the_table_of_cures_says_if_the_bias_was_not_tuned():
    head, rows = plots_experts.balance_table(with_biases([0.001]))
    assert all(len(row) == len(head) for row in rows)
    assert [row[0] for row in rows] == [
        "none",
        "load-balancing loss",
        "capacity 1.25",
        "bias 0.001 (**not tuned yet**)",
    ]
    _, rows = plots_experts.balance_table(with_biases([0.001, 0.01]))
    assert [row[0] for row in rows[3:]] == ["bias 0.001", "bias 0.01"]


def test_runs_of_another_length_are_not_in_the_table_of_cures():
    _, rows = plots_experts.balance_table(with_biases([0.001], steps=1500))
    assert len(rows) == 3


@pytest.mark.parametrize("n_flips", [0, 1, 2])
def test_the_diagram_of_capacity_frames_what_the_future_changes(n_flips):
    experts, kept = np.zeros((4, 2), dtype=int), np.ones((4, 2), dtype=bool)
    other = kept.copy()
    other[:n_flips, 1] = False
    other[3] = False  # belongs to the future itself
    row = [("a", experts, kept), ("b", experts, other)]
    figure = plots_experts.capacity_diagram([row], changed=3, title="")
    for axes in figure.axes:
        edges = [to_hex(patch.get_edgecolor()) for patch in axes.patches]
        assert edges.count(ORANGE) == n_flips


def test_each_assignment_is_drawn_in_the_colour_of_its_expert():
    experts = np.array([[2, 0], [0, 3], [1, 0]])
    figure = plots_experts.dispatch_diagram(experts, n_expert=4)
    colours = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    for e, count in enumerate(np.bincount(experts.flatten())):
        in_both_rows = 2 * count  # in token order, and sorted
        assert colours.count(plots_experts.EXPERT_COLOURS[e]) == in_both_rows
