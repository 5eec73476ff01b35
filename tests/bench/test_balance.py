"""The balance bench: its flags exist, the best strength is even first, then good, and every run is
drawn."""

import pytest

from nanods import plots_experts
from nanods.bench.balance import CURES, EVEN, FIGURES, best_strength, job_of


def figures_of(imbalance, val_bpb):
    return dict.fromkeys(FIGURES, 0.0) | {"val_load_max_over_mean": imbalance, "val_bpb": val_bpb}


def test_each_cure_changes_the_preset_by_its_flag():
    for cure, (_, flag, strengths) in CURES.items():
        for strength in strengths:
            config = job_of(cure, strength, 1).config
            assert (
                getattr(config.model.moe, flag.removeprefix("moe.").replace("-", "_")) == strength
            )
            assert config.seed == 1
            with_loss = config.model.moe.balance_coefficient > 0
            assert with_loss == (cure == "loss"), "a cure stands alone"
            assert config.model.moe.scores == ("sigmoid" if "sigmoid" in cure else "softmax")


@pytest.mark.parametrize(
    ("imbalances", "expected"),
    [
        ((1.1, 1.3, 5.0), 0.1),  # both are even enough: fewer bits per byte
        ((1.1, EVEN + 0.01, 5.0), 0.01),
        ((2.0, 3.0, 1.5), 1.0),  # none is even enough: the most even
    ],
)
def test_the_best_strength_is_even_and_then_good(imbalances, expected):
    tried = zip((0.01, 0.1, 1.0), imbalances, (2.2, 2.1, 2.0), strict=True)
    by_strength = {strength: figures_of(x, bpb) for strength, x, bpb in tried}
    assert best_strength(by_strength) == expected


def test_the_table_has_a_row_a_cure_and_the_picture_a_dot_a_run():
    tried = {
        cure: {strength: figures_of(1.5, 2.0) for strength in strengths}
        for cure, (_, _, strengths) in CURES.items()
    }
    best = {
        cure: {"strength": max(by_strength), "runs": [figures_of(1.2, x) for x in (2.0, 2.1, 2.3)]}
        for cure, by_strength in tried.items()
    }
    table = {"tried": tried, "best": best, "even": EVEN}
    head, rows = plots_experts.balance_table(table)
    assert len(rows) == len(CURES) and {len(row) for row in rows} == {len(head)}
    loss = rows[list(CURES).index("loss")]
    assert loss[:4] == ["the load-balancing loss", "0.3", 3, 3] and loss[-1] == "2.133"
    (axes,) = plots_experts.balance_against_loss(table).axes
    dots = sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o")
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert {round(x, 9) for line in hollow for x in line.get_xdata()} == {0.2}
    assert {round(x, 9) for x in axes.lines[0].get_xdata()} == {0.5} and axes.get_xscale() == "log"
    several = [len(by_strength) for by_strength in tried.values() if len(by_strength) > 1]
    assert dots == sum(several) + 2 * len(several)
