"""Watch a server: metrics for Prometheus, and three kinds of alarms.

    traffic   the requests differ from those of a normal day      traffic_prompt, traffic_image, ...
              (nanods/serving/drift.py)
    quality   the model answers worse than when the server        quality
              started: a canary, measured repeatedly
    service   too many answers are late, or are errors            latency, errors

They are separate because different people act on them: the users may have changed while the model
is fine, and the reverse. No alarm compares two windows by a test of significance:
with enough requests, such a test finds any two windows different.

An alarm that begins or ends is written to alarms.jsonl and sent to a webhook, as JSON. Prometheus
reads /metrics and has alarms of its own (alerts.yml beside this file, dashboard.json for Grafana).
Labels have few values that are known in advance: each new value is a new series, so a label that a
client could choose, such as a user's name, would fill Prometheus's memory.

nanods/serving/model_metrics.py adds what the models count themselves: tokens, what waits, the load
of their experts. nanods/serving/canary.py has the canaries.

Pinned by tests/serving/test_monitor.py.
"""

import json
import math
import queue
import sys
import threading
import time
import urllib.request
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nanods.errors import UserError
from nanods.files import write_and_rename
from nanods.serving.drift import Cusum, Reference, calibrate

OPERATIONS = ("completion", "chat", "embedding", "search")
OUTCOMES = ("ok", "refused", "cancelled", "failed")
TRAFFIC = ("prompt", "text", "image", "audio")
ALARMS = (*(f"traffic_{kind}" for kind in TRAFFIC), "quality", "latency", "errors")

REFERENCE_SECONDS = 24 * 3600.0  # the shortest duration of a reference
REFERENCE_SCORES = 1000  # the fewest scores of a reference
WINDOW, FEWEST = 200, 20  # answers that the service's alarms look back on, at most and at least
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
WEBHOOK_TIMEOUT = 5.0  # seconds


class Monitor:
    """Count what a server does, and raise alarms. Its methods may be called from any thread."""

    def __init__(
        self,
        folder: Path | None = None,
        webhook: str | None = None,
        slow_seconds: float = 5.0,
        max_share: float = 0.05,
        tolerance: float = 0.001,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`folder`: where alarms.jsonl and the references of traffic are kept; None: nowhere, and a
        server that restarts learns its traffic anew.

        `webhook`: the URL to which alarms are posted. `slow_seconds`: an answer whose first part
        takes longer is late. `max_share` of late answers, or of errors, raises an alarm. So does a
        canary that is worse than the first by more than `tolerance`, as a share of the first: with
        the same weights only rounding differs.

        Raises UserError for a webhook that is no http(s) URL.
        """
        if webhook and not webhook.startswith(("http://", "https://")):
            raise UserError(f"--webhook {webhook}: give a URL that begins with http:// or https://")
        self.folder, self.slow_seconds, self.clock = folder, slow_seconds, clock
        self.max_share, self.tolerance = max_share, tolerance
        self.lock = threading.RLock()
        self.firing: dict[str, bool] = dict.fromkeys(ALARMS, False)
        self.late: deque[bool] = deque(maxlen=WINDOW)
        self.failed: deque[bool] = deque(maxlen=WINDOW)
        self.first_canary: dict[str, float] = {}  # by model
        self.is_worse: dict[str, bool] = {}  # by model: is its last canary worse than the first?
        self.closed = threading.Event()
        self.threads: list[threading.Thread] = []
        self.canaries: list[threading.Thread] = []

        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nanods_requests", "Requests", ["operation", "outcome"], registry=registry
        )
        self.seconds = Histogram(
            "nanods_request_seconds",
            "From a request to the end of its answer",
            ["operation"],
            registry=registry,
            buckets=BUCKETS,
        )
        self.first_seconds = Histogram(
            "nanods_first_token_seconds",
            "From a request to the first part of its answer",
            registry=registry,
            buckets=BUCKETS,
        )
        self.level = Gauge(
            "nanods_drift_level",
            "Drift of a model's traffic as a share of what raises the alarm",
            ["model", "traffic"],
            registry=registry,
        )
        self.canary = Gauge(
            "nanods_canary",
            "Value of a model's canary; higher is worse",
            ["model"],
            registry=registry,
        )
        self.alarm = Gauge(
            "nanods_alarm", "1 while an alarm fires, else 0", ["alarm"], registry=registry
        )
        for name in ALARMS:
            self.alarm.labels(name).set(0)

        self.traffic_of: dict[tuple[str, str], Traffic] = {}  # by model and kind
        self.outbox: queue.Queue[dict | None] | None = None  # for the webhook
        if webhook:
            self.outbox = queue.Queue(maxsize=100)
            self.start(self.send_alarms, webhook)

    def start(self, target: Callable[..., None], *args) -> None:
        """Start a thread that `close` ends."""
        self.threads.append(threading.Thread(target=target, args=args, daemon=True))
        self.threads[-1].start()

    # ---- what a server reports -------------------------------------------------------------------

    def request(
        self,
        operation: str,
        outcome: str,
        seconds: float,
        first_seconds: float | None = None,
    ) -> None:
        """Count a request that has ended. `first_seconds`: of a text, until its first token.

        Refused are those that the client should change or repeat later; failed are the server's own
        faults, deadlines included. Refused and cancelled requests raise no alarm.
        """
        operation, outcome = known(operation, OPERATIONS), known(outcome, OUTCOMES)
        self.requests.labels(operation, outcome).inc()
        if outcome not in ("ok", "failed"):
            return
        self.seconds.labels(operation).observe(seconds)
        if first_seconds is not None:
            self.first_seconds.observe(first_seconds)
        wait = seconds if first_seconds is None else first_seconds
        with self.lock:
            self.late.append(wait > self.slow_seconds)
            self.failed.append(outcome == "failed")
            for name, window in (("latency", self.late), ("errors", self.failed)):
                if len(window) >= FEWEST:
                    share = sum(window) / len(window)
                    limit = self.max_share / 2 if self.firing[name] else self.max_share
                    self.set_alarm(name, share > limit, share, self.max_share)

    def watch_traffic(self, model: str) -> None:
        """Read the references of a model's traffic, or begin to record them.

        Each model has its own: a text may be likely to one and a surprise to another.

        Raises UserError for a damaged reference.
        """
        for kind in TRAFFIC:
            self.traffic_of[model, kind] = Traffic(model, kind, self.folder, self.start)

    def traffic(self, model: str, kind: str, score: float) -> None:
        """Report a request's score: of a prompt its bits per byte, of an input of V3 its
        `nearest_distance`. The first day's become the reference. Others than those of
        `watch_traffic` are ignored.

        The alarm fires while the traffic of any model differs.
        """
        if (model, kind) not in self.traffic_of:
            return
        with self.lock:
            level = self.traffic_of[model, kind].update(score, self.clock())
            if level is not None:
                self.level.labels(model, kind).set(level)
                is_firing = any(
                    traffic.cusum is not None and traffic.cusum.is_firing
                    for (_, each), traffic in self.traffic_of.items()
                    if each == kind
                )
                self.set_alarm(f"traffic_{kind}", is_firing, level, 1.0, model=model)

    def check_canary(self, model: str, value: float) -> None:
        """Compare the value of a model's canary, where lower is better, with its first one.

        The alarm fires while any model is worse.
        """
        self.canary.labels(model).set(value)
        with self.lock:
            if math.isfinite(value):
                self.first_canary.setdefault(model, value)
            first = self.first_canary.get(model, math.nan)
            limit = first + self.tolerance * abs(first)
            self.is_worse[model] = not value <= limit  # NaN counts as worse
            self.set_alarm("quality", any(self.is_worse.values()), value, limit, model=model)

    def watch_quality(self, model: str, measure: Callable[[], float], seconds: float) -> None:
        """Start the canary of a model: `run_canary`, in a thread of its own."""
        args = (model, measure, seconds)
        self.canaries.append(threading.Thread(target=self.run_canary, args=args, daemon=True))
        self.canaries[-1].start()

    def run_canary(self, model: str, measure: Callable[[], float], seconds: float) -> None:
        """Measure a model at once and then every so many seconds, until `close`. An error counts as
        the worst value, and what `close` interrupts does not count."""
        while True:
            try:
                value, reason = measure(), None
            except Exception as error:
                value, reason = math.nan, error
            if self.closed.is_set():
                return
            if reason:
                print(f"warning: the canary of {model} failed ({reason})", file=sys.stderr)
            self.check_canary(model, value)
            if self.closed.wait(seconds):
                return

    def metrics(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self.registry)

    def close(self, timeout: float = WEBHOOK_TIMEOUT) -> None:
        """End the threads. Each gets `timeout` seconds to finish: the webhook's the alarms that
        wait, a new reference its file. A canary gets the time that it needs, since a process that
        exits while PyTorch computes in a thread is aborted."""
        self.closed.set()
        if self.outbox is not None:
            with suppress(queue.Full):
                self.outbox.put(None, timeout=timeout)
        for thread in self.threads:
            thread.join(timeout)
        for thread in self.canaries:
            thread.join()

    # ---- alarms ----------------------------------------------------------------------------------

    def set_alarm(
        self, name: str, is_firing: bool, value: float, limit: float, **about: str
    ) -> None:
        """Record whether an alarm fires; write and send an event when it begins or ends.

        `about`: further fields of the event.
        """
        if is_firing == self.firing[name]:
            return
        self.firing[name] = is_firing
        self.alarm.labels(name).set(is_firing)
        event = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock())),
            "alarm": name,
            "state": "firing" if is_firing else "resolved",
            **about,
            "value": value if math.isfinite(value) else None,
            "limit": limit if math.isfinite(limit) else None,
        }
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / "alarms.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event) + "\n")
            except OSError as error:  # a full disk must not stop the server
                print(f"warning: {self.folder}: no alarm can be written ({error})", file=sys.stderr)
        if self.outbox is not None:
            with suppress(queue.Full):  # the webhook is a hundred alarms behind
                self.outbox.put_nowait(event)

    def send_alarms(self, webhook: str) -> None:
        """Post each event to the webhook, one after another. For a thread of its own."""
        while (event := self.outbox.get()) is not None:
            data = json.dumps(event).encode()
            request = urllib.request.Request(
                webhook, data, {"Content-Type": "application/json"}, method="POST"
            )
            try:
                with urllib.request.urlopen(request, timeout=WEBHOOK_TIMEOUT):
                    pass
            except Exception as error:  # whatever it is, the next alarm is tried again
                print(f"warning: the webhook has not taken an alarm ({error})", file=sys.stderr)


def known(value: str, values: tuple[str, ...]) -> str:
    """Return the value of a label, or "other" for one that is not among those known."""
    return value if value in values else "other"


class Traffic:
    """The scores of one model's requests of one kind: first a reference is recorded, then compared
    with."""

    def __init__(
        self, model: str, kind: str, folder: Path | None, start: Callable[..., None]
    ) -> None:
        """Read the reference from `folder`, if it is there. Raises UserError if it is damaged.

        `start` starts a thread, as `Monitor.start` does.
        """
        self.start_thread = start
        self.path = folder / f"reference_{model}_{kind}.json" if folder else None
        self.recorded: array | None = array("d")  # None when there is enough
        self.start = 0.0  # of the recording
        self.cusum: Cusum | None = None
        if self.path and self.path.is_file():
            try:
                fields = json.loads(self.path.read_text(encoding="utf-8"))
                self.cusum = Cusum(Reference(**{name: float(x) for name, x in fields.items()}))
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.path}: damaged ({error}); delete it, and the traffic of the next day "
                    "becomes the reference"
                ) from None

    def update(self, score: float, now: float) -> float | None:
        """Add a score at the time `now`, in seconds. Return the level of drift, None while there is
        no reference."""
        if self.cusum:
            self.cusum.update(score)
            return self.cusum.level
        if self.recorded is None or not math.isfinite(score):
            return None
        self.start = self.start if self.recorded else now
        self.recorded.append(score)
        if len(self.recorded) >= REFERENCE_SCORES and now - self.start >= REFERENCE_SECONDS:
            scores, self.recorded = np.array(self.recorded), None
            self.start_thread(self.finish, scores)
        return None

    def finish(self, scores: np.ndarray) -> None:
        """Turn the recorded scores into the reference, which takes half a second."""
        reference = calibrate(scores)
        if self.path:
            data = json.dumps(asdict(reference)).encode()
            try:
                write_and_rename(self.path, lambda file: file.write(data))
            except OSError as error:
                print(f"warning: {self.path}: cannot be written ({error})", file=sys.stderr)
        self.cusum = Cusum(reference)
