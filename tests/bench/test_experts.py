"""The arithmetic of the experts' bench: spikes, what explains a choice, equal time, and what it takes from a run."""

import numpy as np
import pytest

from nanods.bench.experts import (
    EVERY,
    WINDOW,
    equal_steps,
    explained,
    figures,
    gap,
    spikes,
    variants,
)


def test_a_spike_stands_out_of_the_steps_before_it():
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 300)
    assert spikes(list(2 + noise)) == 0
    noise[[100, 200]] += 1.0
    assert spikes(list(2 + noise)) == 2
    noise[WINDOW - 1] += 5.0  # too early to be judged
    assert spikes(list(2 + noise)) <= 2


def test_what_determines_the_choice_explains_all_of_it_and_what_knows_nothing_none():
    random = np.random.default_rng(0)
    by = random.integers(0, 8, 20_000)
    assert explained(by * 2 % 16, by) == pytest.approx(1, abs=0.01)
    assert explained(random.integers(0, 16, 20_000), by) == pytest.approx(0, abs=0.003)
    half = np.where(random.random(20_000) < 0.5, by, random.integers(0, 8, 20_000))
    assert 0.1 < explained(half, by) < 0.9


def test_equal_time_is_counted_in_steps_of_the_faster_one():
    slow, fast = [{"cpu_seconds": 300.0, "step": 100}], [{"cpu_seconds": 100.0, "step": 100}]
    assert equal_steps(fast, slow) == 300


def test_a_gap_goes_seed_by_seed():
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
    told = figures(rows)
    assert told["val_loss_at_step_0"] == 2.5 and told["optimizer_share_of_time"] == pytest.approx(
        0.5
    )
    assert (
        told["val_load_least_over_mean"] == 0.5
        and told["dropped"] == pytest.approx(0.25)
        and told["spikes"] == 0
    )
    assert told["load_history"] == [[[1.5, 0.5]]] * (100 // EVERY)


def test_each_variant_is_a_preset_with_flags_that_it_knows():
    from nanods.config import PRESETS, flatten

    for name, (preset, flags) in variants(1).items():
        assert flags.keys() <= flatten(PRESETS[preset]).keys(), name
