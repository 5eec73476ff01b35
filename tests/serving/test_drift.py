"""The traffic alarm: its sums, its threshold, false alarms and planted changes."""

import tracemalloc

import numpy as np
import pytest

from nanods.bench.serve_alarms import (
    CHANGES,
    DAY,
    DEVIATION,
    KINDS,
    MEAN,
    STREAMS,
    beginnings,
    change,
    delay,
    ours,
    simulate,
    simulate_other,
    textbook,
)
from nanods.serving.drift import (
    ALLOWANCES,
    LIMIT,
    Cusum,
    Reference,
    calibrate,
    cumulative_sums,
    join_blocks,
    standardise,
)

PLAIN = Reference(mean=2.0, deviation=0.5, allowance=0.5, threshold=5.0)


def test_sums_of_many_streams_equal_those_of_one_request_at_a_time():
    z = np.random.default_rng(0).normal(0.1, 1, (4, 500))
    actual = cumulative_sums(z, 0.25)
    for stream, sums in zip(z, actual, strict=True):
        total = 0.0
        for value, expected in zip(stream, sums, strict=True):
            total = max(0.0, total + value - 0.25)
            assert total == pytest.approx(expected, abs=1e-9)
    assert (actual >= 0).all() and (actual == 0).any()


def test_an_alarm_needs_several_scores_and_ends_soon_after_the_change():
    cusum = Cusum(PLAIN)
    assert [cusum.update(3.0) for _ in range(4)] == [False, False, False, True]
    assert cusum.level == 1
    for _ in range(1000):
        assert cusum.update(3.0)
    assert [cusum.update(2.0) for _ in range(7)] == [True] * 5 + [False] * 2


def test_scores_that_are_too_low_raise_it_too():
    cusum = Cusum(PLAIN)
    assert [cusum.update(1.0) for _ in range(4)][-1]


@pytest.mark.parametrize("score", [1e9, float("inf"), float("nan")])
def test_two_extreme_scores_alone_raise_no_alarm(score):
    reference = calibrate(np.random.default_rng(0).normal(2, 0.5, 1000), run_length=10_000)
    cusum = Cusum(reference)
    assert not cusum.update(score) and not cusum.update(score)
    assert cusum.update(score), "a third one does"


def test_blocks_are_pieces_of_the_reference_in_their_order():
    streams = join_blocks(np.arange(300), 7, 5, np.random.default_rng(0))
    assert streams.shape == (5, 10_000)
    steps = np.diff(streams[:, : 7 * 1428].reshape(5, -1, 7), axis=-1)
    assert set(np.unique(steps)) <= {1, -299}
    counts = np.bincount(streams.flatten(), minlength=300)
    assert counts.min() > 0.6 * counts.mean(), "every score is about equally likely"


def test_of_long_blocks_only_what_the_streams_need_is_drawn():
    scores, streams = np.arange(10**6), []
    tracemalloc.start()
    for block in (10_000, 500_000):
        streams.append(join_blocks(scores, block, 4, np.random.default_rng(0)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(*streams) and peak < 5 * streams[0].nbytes


def test_the_threshold_rises_with_what_neighbours_have_in_common():
    thresholds = [calibrate(simulate(kind, DAY, seed=0)).threshold for kind in KINDS[:2]]
    assert thresholds[0] < thresholds[1] / 2
    shuffled = np.random.default_rng(0).permutation(simulate("bursty", DAY, seed=0))
    assert calibrate(shuffled).threshold < thresholds[1] / 2


def test_a_rarer_false_alarm_costs_a_higher_threshold():
    scores = simulate("bursty", 2000, seed=0)
    references = [calibrate(scores, run_length) for run_length in (10_000, 200_000)]
    assert {reference.allowance for reference in references} <= set(ALLOWANCES)
    assert references[0].threshold < references[1].threshold
    assert references[1] == calibrate(scores), "the same reference gives the same threshold"


def test_equal_scores_are_a_reference_and_any_other_score_is_then_extreme():
    reference = calibrate(np.full(200, 2.0), run_length=10_000)
    z = standardise(np.array([2.0, 2.1]), reference.mean, reference.deviation)
    assert z.tolist() == [0, LIMIT]


@pytest.mark.parametrize("scores", [np.zeros(99), np.array([1.0] * 200 + [np.nan])])
def test_too_few_scores_and_nan_are_no_reference(scores):
    with pytest.raises(ValueError, match="at least 100 finite scores"):
        calibrate(scores)


def test_a_reference_that_compares_nothing_is_refused():
    for fields in ((np.nan, 1, 0.5, 5), (0, 0, 0.5, 5), (0, 1, 0.5, 0), (0, np.inf, 0.5, 5)):
        with pytest.raises(ValueError, match="above 0"):
            Reference(*fields)


# ---- what it is for: 20 streams of 10,000 requests, beside a day of reference --------------------


def test_the_simulated_traffic_is_what_its_name_says():
    def autocorrelation(scores, lag):
        z = (scores - scores.mean()) / scores.std()
        return (z[:-lag] * z[lag:]).mean()

    iid, bursty, daily = (simulate(kind, DAY, seed=1) for kind in KINDS)
    assert abs(autocorrelation(iid, 1)) < 0.05
    assert autocorrelation(bursty, 1) > 0.3 and abs(autocorrelation(bursty, 100)) < 0.1
    assert autocorrelation(daily, 100) > 0.1
    for scores in (iid, bursty, daily):
        assert scores.mean() == pytest.approx(MEAN, abs=0.05)
        assert scores.std() == pytest.approx(DEVIATION, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_false_alarms_are_rare_and_planted_changes_are_noticed(kind):
    alarms = ours(simulate(kind, DAY, seed=0))
    streams = [simulate(kind, DAY, 1000 + i) for i in range(STREAMS)]
    false = sum(len(alarms(stream)) for stream in streams)
    assert false <= STREAMS * DAY / 10_000
    starts = np.random.default_rng(0).integers(0, DAY - 1000, STREAMS)
    for name, limit in {"full switch": 16, "20% mixture": 300}.items():
        delays = []
        for i, (stream, start) in enumerate(zip(streams, starts, strict=True)):
            begin = max(0, start - 500)
            changed = change(stream, simulate_other, start, CHANGES[name], seed=i)
            changed = changed[begin : start + 1000]
            delays.append(delay(alarms, changed, start - begin))
        assert np.median(delays) <= limit, name


def test_a_textbooks_threshold_raises_false_alarms_on_every_stream():
    for kind in KINDS:
        alarms = textbook(simulate(kind, DAY, seed=0))
        assert all(alarms(simulate(kind, DAY, 1000 + i)) for i in range(2))


def test_beginnings_counts_an_alarm_that_ends_and_begins_again():
    calm, high = [2.0] * 30, [3.0] * 10
    assert beginnings(PLAIN, np.array(calm + high + calm + high + calm)) == [33, 73]
    assert beginnings(PLAIN, np.array(calm)) == []
