"""False alarms and delays of the traffic alarm, beside other detectors: results/serve_alarms.json.

    python -m nanods.bench.serve_alarms                      1 minute; in `make bench-serve`
    python -m nanods.bench.serve_alarms --run runs/v1-tiny   records the scores anew before that

A score is a prompt's bits per byte. There are three kinds of traffic:

    iid       each request on its own
    bursty    a client sends about five prompts in a row, which have something in common
    daily     the same, and the mean rises and falls in a day of 10,000 requests

and two sources of each: scores of real prompts under v1-tiny, in results/serve_scores.json, drawn
as nanods/bench/serve_scores.py says; and simulated ones, with a mean and a deviation.

STREAMS alarms are given a day each as their reference, then another day: how well an alarm works
depends on its reference, too. The changes begin at a random request: all prompts change, or one in
five. Recorded scores change to those of another language, simulated ones to 6.6 deviations more.
The alarm is compared with CUSUM at textbook settings and, with the extra peers, river's ADWIN and
PageHinkley at their defaults, which were not tuned. The settings of nanods' alarm were chosen on
other streams, those of tests/serving/test_drift.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from nanods.bench.runs import describe_machine, read_json, write_json
from nanods.bench.serve_scores import DAY, parse, record, resample
from nanods.errors import UserError, run
from nanods.flags import parse_args
from nanods.serving.drift import Cusum, Reference, calibrate

STREAMS = 20
SEED = 100_000  # and those after it: no test has these streams
MEAN, DEVIATION = 1.95, 0.52  # bits per byte
OTHER_LANGUAGE = 6.6  # deviations: assumed
KINDS = ("iid", "bursty", "daily")
CHANGES = {"full switch": 1.0, "20% mixture": 0.2}


@dataclass(frozen=True)
class Args:
    run: str | None = None
    """A run of V0 to V2 on bytes, such as runs/v1-tiny: record its scores."""
    results: Path = Path("results")
    """Directory of the tables."""


@dataclass(frozen=True)
class Source:
    """Where scores come from."""

    stream: Callable[[str, int, int], np.ndarray]
    """From a kind of traffic, a number of requests and a seed to their scores, (N,)."""
    others: dict[str, Callable[[np.random.Generator, int], np.ndarray]]
    """Draws of N scores of what the traffic changes to."""


def skewed(random: np.random.Generator, N: int) -> np.ndarray:
    """Return N draws of mean 0 and deviation 1, with a longer tail upwards."""
    return (random.gamma(9, 1 / 3, N) - 3).astype(np.float64)


def simulate(kind: str, N: int, seed: int) -> np.ndarray:
    """Return the scores of N requests, (N,)."""
    random = np.random.default_rng(seed)
    z = skewed(random, N)
    if kind != "iid":
        client = np.cumsum(random.random(N) < 0.2)
        z = 0.5**0.5 * (random.standard_normal(N + 1)[client] + z)
    if kind == "daily":
        z = z + 0.6 * np.sin(2 * np.pi * np.arange(N) / DAY)
    return MEAN + DEVIATION * z


def simulate_other(random: np.random.Generator, N: int) -> np.ndarray:
    """Return N scores of another language."""
    return MEAN + DEVIATION * (OTHER_LANGUAGE + 0.65 * random.standard_normal(N))


SIMULATED = Source(simulate, {"6.6 deviations more": simulate_other})


def recorded(scores: dict) -> Source:
    """Return the source that draws from the scores in a table that `record` returned."""
    documents = [parse(document) for document in scores["documents"]]
    others = {name: partial(draw_from, parse(values)) for name, values in scores["others"].items()}
    return Source(partial(resample, documents), others)


def draw_from(values: np.ndarray, random: np.random.Generator, N: int) -> np.ndarray:
    return random.choice(values, N)


def change(
    scores: np.ndarray,
    other: Callable[[np.random.Generator, int], np.ndarray],
    start: int,
    share: float,
    seed: int,
) -> np.ndarray:
    """Return the scores with a share of those from `start` on replaced by others."""
    random = np.random.default_rng(seed)
    other = other(random, len(scores))
    is_other = (random.random(len(scores)) < share) & (np.arange(len(scores)) >= start)
    return np.where(is_other, other, scores)


def beginnings(reference: Reference, scores: np.ndarray) -> list[int]:
    """Return at which of the scores the alarm begins to fire."""
    cusum, fired = Cusum(reference), [False]
    fired += [cusum.update(score) for score in scores.tolist()]
    return np.flatnonzero(np.diff(fired)).tolist()[::2]  # begins, ends, begins, ...


# ---- detectors: from a reference to a function that says when an alarm begins --------------------

Detector = Callable[[np.ndarray], Callable[[np.ndarray], list[int]]]


def ours(reference: np.ndarray) -> Callable[[np.ndarray], list[int]]:
    calibrated = calibrate(reference)
    return lambda scores: beginnings(calibrated, scores)


def textbook(reference: np.ndarray) -> Callable[[np.ndarray], list[int]]:
    plain = Reference(reference.mean(), reference.std(), allowance=0.5, threshold=5)
    return lambda scores: beginnings(plain, scores)


def rivers(name: str) -> Detector:
    """Return a detector of river, by the name of its class. It reads the reference first."""

    def detector(reference: np.ndarray) -> Callable[[np.ndarray], list[int]]:
        from river import drift

        def alarms(scores: np.ndarray) -> list[int]:
            detector, found = getattr(drift, name)(), []
            for i, score in enumerate([*reference, *scores], start=-len(reference)):
                detector.update(score)
                if i >= 0 and detector.drift_detected:
                    found.append(i)
            return found

        return alarms

    return detector


def detectors() -> dict[str, Detector]:
    """Return the detectors by name; those of river if it is installed."""
    found = {"block bootstrap": ours, "textbook CUSUM": textbook}
    try:
        import river  # noqa: F401
    except ImportError:
        print("notice     ADWIN and PageHinkley are left out: they need the extra peers (river)")
        return found
    return found | {"river ADWIN": rivers("ADWIN"), "river PageHinkley": rivers("PageHinkley")}


def delay(alarms: Callable[[np.ndarray], list[int]], scores: np.ndarray, start: int) -> float:
    """Return how many requests after a change at `start` the alarm begins; infinity if never. An
    alarm that began before does not count."""
    return next((i - start + 1.0 for i in alarms(scores) if i >= start), np.inf)


def measure(source: Source, kind: str, detector: Detector, seed: int = SEED) -> dict:
    """Return the false alarms, the number of streams that have any, and each median delay."""
    alarms = [detector(source.stream(kind, DAY, seed + 1000 + i)) for i in range(STREAMS)]
    streams = [source.stream(kind, DAY, seed + 1 + i) for i in range(STREAMS)]
    false = [len(alarm(stream)) for alarm, stream in zip(alarms, streams, strict=True)]
    row = {
        "false alarms per 10,000 requests": sum(false) * 10_000 / (STREAMS * DAY),
        "streams with a false alarm": sum(count > 0 for count in false),
    }
    starts = np.random.default_rng(seed).integers(0, DAY - 1000, STREAMS)
    for other, draw in source.others.items():
        for name, share in CHANGES.items():
            delays = []
            for i, start in enumerate(starts):
                changed = change(streams[i], draw, start, share, seed + i)[: start + 1000]
                delays.append(delay(alarms[i], changed, start))
            row[f"requests until noticed, {other}, {name}"] = float(median(delays))
    return row


def main() -> None:
    """Measure each detector on each kind of traffic, then write the table."""
    args = parse_args(Args, __doc__)
    path = args.results / "serve_scores.json"
    if args.run:
        write_json(path, record(args.run))
    if not path.is_file():
        raise UserError(f"{path} is missing: record scores with --run runs/v1-tiny")
    sources = {"recorded": recorded(read_json(path)), "simulated": SIMULATED}
    table = {"machine": describe_machine(), "detectors": {}}
    for name, detector in detectors().items():
        rows = table["detectors"][name] = {}
        for title, source in sources.items():
            rows[title] = {kind: measure(source, kind, detector) for kind in KINDS}
            for kind, row in rows[title].items():
                print(f"{name:<20} {title:<10} {kind:<8} {list(row.values())}", flush=True)
    write_json(args.results / "serve_alarms.json", table)


if __name__ == "__main__":
    run(main)
