"""False alarms and delays of the traffic alarm, beside other detectors: results/serve_alarms.json.

    python -m nanods.bench.serve_alarms      20 seconds; `make bench-serve` runs it too

Streams of scores are simulated, with a mean and a deviation in bits per byte:

    iid       each request on its own
    bursty    a client sends about five prompts in a row; half of the variance is the client's
    daily     the same, and the mean rises and falls by 0.6 deviations in a day of 10,000 requests

Each alarm is given one day as its reference, then STREAMS streams of another day. The changes begin
at a random request: all prompts change, or one in five. They then score 6.6 deviations higher, an
assumption. It is compared with CUSUM at textbook settings and, with the extra peers, river's ADWIN
and PageHinkley at their defaults, which were not tuned. The settings of nanods' alarm were chosen
on other streams, those of tests/serving/test_drift.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from nanods.bench.runs import describe_machine, write_json
from nanods.errors import run
from nanods.flags import parse_args
from nanods.serving.drift import Cusum, Reference, calibrate

DAY = 10_000  # requests
STREAMS = 20
SEED = 100_000  # and those after it: no test has these streams
MEAN, DEVIATION = 1.95, 0.52  # bits per byte
OTHER_LANGUAGE = 6.6  # deviations: assumed
KINDS = ("iid", "bursty", "daily")
CHANGES = {"full switch": 1.0, "20% mixture": 0.2}


@dataclass(frozen=True)
class Args:
    results: Path = Path("results")
    """Directory of the table."""


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


def change(scores: np.ndarray, start: int, share: float, seed: int) -> np.ndarray:
    """Return the scores with a share of those from `start` on replaced by another language's."""
    random = np.random.default_rng(seed)
    other = MEAN + DEVIATION * (OTHER_LANGUAGE + 0.65 * random.standard_normal(len(scores)))
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


def measure(kind: str, detector: Detector, seed: int = SEED) -> dict:
    """Return the false alarms, streams with one, and median delays of each change."""
    alarms = detector(simulate(kind, DAY, seed))
    streams = [simulate(kind, DAY, seed + 1 + i) for i in range(STREAMS)]
    false = [len(alarms(stream)) for stream in streams]
    row = {
        "false alarms per 10,000 requests": sum(false) * 10_000 / (STREAMS * DAY),
        "streams with a false alarm": sum(count > 0 for count in false),
    }
    starts = np.random.default_rng(seed).integers(0, DAY - 1000, STREAMS)
    for name, share in CHANGES.items():
        delays = []
        for i, (stream, start) in enumerate(zip(streams, starts, strict=True)):
            changed = change(stream, start, share, seed + i)[: start + 1000]
            delays.append(delay(alarms, changed, start))
        row[f"requests until noticed, {name}"] = float(median(delays))
    return row


def main() -> None:
    """Measure each detector on each kind of traffic, then write the table."""
    args = parse_args(Args, __doc__)
    table = {}
    for name, detector in detectors().items():
        table[name] = {kind: measure(kind, detector) for kind in KINDS}
        for kind, row in table[name].items():
            print(f"{name:<20} {kind:<8} {row}", flush=True)
    table = {"machine": describe_machine(), "detectors": table}
    write_json(args.results / "serve_alarms.json", table)


if __name__ == "__main__":
    run(main)
