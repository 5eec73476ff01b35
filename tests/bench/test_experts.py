"""The experts' bench: spikes, explained fractions, equal time and the figures of a run."""

from pathlib import Path

import numpy as np
import pytest

from nanods.bench.experts import (
    HISTORY_WINDOW,
    SPIKE_WINDOW,
    count_spikes,
    equal_time_steps,
    explained_fraction,
    gap,
    run_figures,
    variants,
)


def test_a_spike_exceeds_the_steps_before_it():
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 300)
    assert count_spikes(list(2 + noise)) == 0
    noise[[100, 200]] += 1.0
    assert count_spikes(list(2 + noise)) == 2
    noise[SPIKE_WINDOW - 1] += 5.0  # too early: there are not enough steps before it
    assert count_spikes(list(2 + noise)) <= 2


def test_explained_fraction_is_1_for_a_determining_feature_and_0_for_an_independent_one():
    generator = np.random.default_rng(0)
    feature = generator.integers(0, 8, 20_000)
    assert explained_fraction(feature * 2 % 16, feature) == pytest.approx(1, abs=0.01)
    independent = generator.integers(0, 16, 20_000)
    assert explained_fraction(independent, feature) == pytest.approx(0, abs=0.003)
    half = np.where(generator.random(20_000) < 0.5, feature, generator.integers(0, 8, 20_000))
    assert 0.1 < explained_fraction(half, feature) < 0.9


def test_equal_time_is_counted_in_steps_of_the_faster_run():
    slow, fast = [{"cpu_seconds": 300.0, "step": 100}], [{"cpu_seconds": 100.0, "step": 100}]
    assert equal_time_steps(fast, slow) == 300


def test_a_gap_is_computed_seed_by_seed():
    runs = {"a": [{"val_bpb": 2.0}, {"val_bpb": 3.0}], "b": [{"val_bpb": 1.5}, {"val_bpb": 2.0}]}
    assert gap(runs, "a", "b") == {"mean": 0.75, "each": [0.5, 1.0]}


def test_figures_of_a_run_with_experts_and_a_warm_start():
    def row(step):
        load = {"load": [[30, 10]], "load_max_over_mean": 1.5, "dropped": 0.25}
        return {"step": step, "ce_loss": 2.0, "train_loss": 2.1, "optimizer_seconds": 0.5, **load}

    last = {"val_loss": 2.0, "val_bpb": 3.0, "seconds": 100.0, "cpu_seconds": 90.0}
    last |= {"val_load": [[3, 1]], "val_load_max_over_mean": 1.5, "val_load_entropy": 0.8}
    rows = [{"step": 0, "val_loss": 2.5}, *(row(step) for step in range(1, 101))]
    rows[-1] |= last
    figures = run_figures(rows)
    assert figures["val_loss_at_step_0"] == 2.5
    assert figures["optimizer_share_of_time"] == pytest.approx(0.5)
    assert figures["val_load_min_over_mean"] == 0.5
    assert figures["dropped"] == pytest.approx(0.25) and figures["spikes"] == 0
    assert figures["load_history"] == [[[1.5, 0.5]]] * (100 // HISTORY_WINDOW)


def test_each_variant_is_a_preset_with_flags_that_exist():
    from nanods.config import PRESETS, flatten

    for name, (preset, flags) in variants(Path()).items():
        assert flags.keys() <= flatten(PRESETS[preset]).keys(), name
