"""The monitor: metrics with bounded labels, three kinds of alarms, and where they are sent."""

import http.server
import json
import math
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from nanods import serving
from nanods.attention import AttentionConfig
from nanods.errors import UserError
from nanods.gpt import GPT, GPTConfig
from nanods.moe import MoEConfig
from nanods.serving import monitor as module
from nanods.serving.canary import bits_per_token, canary_texts, partner_distance
from nanods.serving.model_metrics import ModelMetrics
from nanods.serving.monitor import ALARMS, Monitor

FOLDER = Path(serving.__path__[0])


@pytest.fixture
def short_reference(monkeypatch):
    """Let a reference be complete after 200 scores and 100 seconds."""
    monkeypatch.setattr(module, "REFERENCE_SCORES", 200)
    monkeypatch.setattr(module, "REFERENCE_SECONDS", 100.0)


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


def events(folder):
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def value(monitor, name, **labels):
    return monitor.registry.get_sample_value(name, labels)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- metrics -------------------------------------------------------------------------------------


def test_requests_are_counted_by_operation_and_outcome():
    monitor = Monitor()
    monitor.request("completion", "ok", 2.0, first_seconds=0.2)
    monitor.request("completion", "ok", 1.0)
    monitor.request("search", "refused", 0.0)
    assert value(monitor, "nanods_requests_total", operation="completion", outcome="ok") == 2
    assert value(monitor, "nanods_requests_total", operation="search", outcome="refused") == 1
    assert value(monitor, "nanods_request_seconds_sum", operation="completion") == 3.0
    assert value(monitor, "nanods_first_token_seconds_count") == 1
    text = monitor.metrics().decode()
    assert 'nanods_request_seconds_bucket{le="2.5",operation="completion"} 2.0' in text


def test_no_client_can_add_series():
    monitor = Monitor()
    monitor.watch_traffic("text")
    for operation in monitor_values(module.OPERATIONS):
        for outcome in monitor_values(module.OUTCOMES):
            monitor.request(operation, outcome, 1.0)
    for kind in monitor_values(module.TRAFFIC):
        monitor.traffic("text", kind, 1.0)
    before = len(monitor.metrics().splitlines())
    for i in range(50):
        monitor.request(f"user {i}", f"outcome {i}", 1.0)
        monitor.traffic("text", f"kind {i}", 1.0)
        monitor.traffic(f"model {i}", "prompt", 1.0)
    assert len(monitor.metrics().splitlines()) == before


def monitor_values(known):
    return (*known, "unheard of")


# ---- traffic -------------------------------------------------------------------------------------


def test_the_first_day_becomes_the_reference_and_a_change_raises_the_alarm(
    tmp_path, short_reference
):
    clock, random = Clock(), np.random.default_rng(0)
    monitor = Monitor(tmp_path, clock=clock)
    monitor.watch_traffic("a")

    def report(mean, count):
        for _ in range(count):
            clock.now += 1
            monitor.traffic("a", "prompt", random.normal(mean, 0.5))

    report(2.0, 150)
    assert monitor.traffic_of["a", "prompt"].recorded, "150 scores are too few"
    monitor.traffic("a", "prompt", math.nan)
    report(2.0, 50)
    monitor.close()
    assert (tmp_path / "reference_a_prompt.json").is_file(), (
        "a server that stops keeps its reference"
    )
    assert not (tmp_path / "alarms.jsonl").exists()
    report(2.0, 200)
    assert value(monitor, "nanods_drift_level", model="a", traffic="prompt") < 1
    report(5.0, 16)
    assert value(monitor, "nanods_alarm", alarm="traffic_prompt") == 1
    report(2.0, 200)
    assert value(monitor, "nanods_alarm", alarm="traffic_prompt") == 0
    states = [(event["alarm"], event["state"]) for event in events(tmp_path)]
    assert states == [("traffic_prompt", "firing"), ("traffic_prompt", "resolved")]

    again = Monitor(tmp_path, clock=clock)  # the server restarts
    again.watch_traffic("a")
    assert (
        again.traffic_of["a", "prompt"].cusum.reference
        == monitor.traffic_of["a", "prompt"].cusum.reference
    )
    assert again.traffic_of["a", "text"].cusum is None, "each kind has its own"


def test_a_reference_needs_a_whole_day_however_many_scores_there_are(short_reference):
    clock = Clock()
    monitor = Monitor(clock=clock)
    monitor.watch_traffic("a")
    for _ in range(1000):
        clock.now += 0.05
        monitor.traffic("a", "image", 0.3)
    assert len(monitor.traffic_of["a", "image"].recorded) == 1000
    clock.now += 60
    monitor.traffic("a", "image", 0.3)
    wait_until(lambda: monitor.traffic_of["a", "image"].cusum)


def test_each_model_has_its_own_reference_and_either_raises_the_alarm(tmp_path, short_reference):
    clock, random = Clock(), np.random.default_rng(0)
    monitor = Monitor(tmp_path, clock=clock)
    usual = {"code": 2.0, "prose": 6.0}

    def report(scores, count):
        for _ in range(count):
            for model, mean in scores.items():
                clock.now += 1
                monitor.traffic(model, "prompt", random.normal(mean, 0.5))

    for model in usual:
        monitor.watch_traffic(model)
    report(usual, 200)
    monitor.close()  # waits for the references
    report(usual, 100)
    assert not monitor.firing["traffic_prompt"]
    report(usual | {"code": 6.0}, 30)  # which is usual for the other one
    assert monitor.firing["traffic_prompt"] and events(tmp_path)[0]["model"] == "code"
    report(usual, 1)
    assert monitor.firing["traffic_prompt"], "the other model's request does not end it"
    report(usual, 200)
    assert not monitor.firing["traffic_prompt"]


@pytest.mark.parametrize("text", ["{", "[]", '{"mean": 1}', '{"mean": "x"}', ""])
def test_a_damaged_reference_is_named(tmp_path, text):
    (tmp_path / "reference_a_text.json").write_text(text)
    with pytest.raises(UserError, match=r"reference_a_text\.json: damaged .* delete it"):
        Monitor(tmp_path).watch_traffic("a")


# ---- quality -------------------------------------------------------------------------------------


def make_gpt():
    torch.manual_seed(0)
    config = GPTConfig(2, 2, 16, 4, 32, 20, attention=AttentionConfig("dense"))
    model = GPT(replace(config, moe=MoEConfig(n_expert=4))).double()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=1.0)
    return model.eval()


def test_the_canary_notices_each_expert_that_is_lost():
    model = make_gpt()
    texts = canary_texts(model, B=16)
    assert texts.shape == (16, 32) and texts.unique().numel() > 10
    first = bits_per_token(model, texts)
    assert 0 < first < math.log2(20) + 0.1
    for block in model.blocks:
        for expert in range(4):
            monitor = Monitor()
            monitor.check_canary("v2", first)
            monitor.check_canary("v2", bits_per_token(model, texts))
            assert not monitor.firing["quality"], "the same model has the same canary"
            kept = block.mlp.out[expert].detach().clone()
            block.mlp.out.data[expert] = 0
            monitor.check_canary("v2", bits_per_token(model, texts))
            block.mlp.out.data[expert] = kept
            assert monitor.firing["quality"] and value(monitor, "nanods_alarm", alarm="quality")
            monitor.check_canary("v2", first)
            assert not monitor.firing["quality"]


def test_the_alarm_fires_while_any_model_is_worse_than_its_own_first_canary(tmp_path):
    monitor = Monitor(tmp_path)
    for model, canary, is_firing in (
        ("a", 1.0, False),
        ("b", 3.0, False),  # models differ
        ("a", 1.1, True),
        ("b", 3.1, True),
        ("a", 1.0, True),
        ("b", 2.9, False),
        ("c", math.nan, True),  # its first measurement has failed
        ("c", 5.0, False),
    ):
        monitor.check_canary(model, canary)
        assert monitor.firing["quality"] == is_firing
        if canary == canary:
            assert value(monitor, "nanods_canary", model=model) == canary
    assert [event["model"] for event in events(tmp_path)] == ["a", "b", "c", "c"]


def test_partners_that_drift_apart_are_a_worse_canary():
    near = {"text": torch.eye(4), "image": torch.eye(4), "audio": torch.eye(4)}
    assert partner_distance(near) == 0
    assert partner_distance(near | {"audio": torch.eye(4).flip(0)}) == 0.5


def test_the_canary_is_asked_on_schedule_and_an_error_counts_as_the_worst_value(capsys):
    monitor, asked = Monitor(), []

    def measure():
        asked.append(len(asked))
        if len(asked) == 4:
            monitor.close()
            raise RuntimeError("interrupted")
        if len(asked) == 3:
            raise RuntimeError("out of memory")
        return 2.0

    monitor.run_canary("v2", measure, seconds=0.01)
    assert asked == [0, 1, 2, 3] and monitor.firing["quality"]
    error = capsys.readouterr().err
    assert "the canary of v2 failed (out of memory)" in error and "interrupted" not in error


def test_closing_interrupts_a_canary_and_waits_for_it():
    assert canary_texts(make_gpt(), is_closed=lambda: True).shape == (8, 1)
    monitor, measures, measured = Monitor(), threading.Event(), []

    def measure():
        measures.set()
        time.sleep(0.2)
        measured.append(5.0)
        return 5.0

    monitor.watch_quality("v2", measure, seconds=600)
    assert measures.wait(20)
    monitor.close(timeout=0.01)
    assert measured and not monitor.first_canary


# ---- service -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alarm", "bad"),
    [("latency", ("completion", "ok", 9.0)), ("errors", ("completion", "failed", 0.1))],
)
def test_late_answers_and_errors_raise_alarms_of_their_own(tmp_path, alarm, bad):
    monitor = Monitor(tmp_path)
    for _ in range(200):
        monitor.request("completion", "ok", 9.0, first_seconds=0.1)  # a long stream is not late
    for _ in range(100):
        monitor.request("search", "refused", 99.0)
        monitor.request("search", "cancelled", 99.0)
    for _ in range(10):
        monitor.request(*bad)
    assert not any(monitor.firing.values()), "10 of 200 are 5%"
    monitor.request(*bad)
    assert [name for name in ALARMS if monitor.firing[name]] == [alarm]
    for _ in range(189):
        monitor.request("completion", "ok", 0.1)
    assert monitor.firing[alarm]
    for _ in range(6):
        monitor.request("completion", "ok", 0.1)
    assert not monitor.firing[alarm], "it ends at half of the limit"
    assert [event["state"] for event in events(tmp_path)] == ["firing", "resolved"]


def test_a_few_bad_answers_after_the_start_raise_no_alarm():
    monitor = Monitor()
    for _ in range(19):
        monitor.request("chat", "failed", 60.0)
    assert not any(monitor.firing.values())


# ---- where alarms are sent -----------------------------------------------------------------------


class Receiver(http.server.BaseHTTPRequestHandler):
    received: list
    status = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(json.loads(body))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def webhook():
    """Yield the URL of a server on loopback, and the list of what it has received."""
    handler = type("Handler", (Receiver,), {"received": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/alarms", handler
    server.shutdown()
    server.server_close()


def test_an_alarm_goes_to_the_log_and_to_the_webhook(tmp_path, webhook):
    url, handler = webhook
    monitor = Monitor(tmp_path, webhook=url, clock=Clock())
    for value in (1.0, 1.5, math.nan, 1.0):
        monitor.check_canary("v2", value)
    monitor.close()
    assert not any(thread.is_alive() for thread in monitor.threads)
    wait_until(lambda: len(handler.received) == 2)
    assert handler.received == events(tmp_path)
    assert handler.received[0] == {
        "time": "1970-01-12T13:46:40Z",
        "alarm": "quality",
        "state": "firing",
        "model": "v2",
        "value": 1.5,
        "limit": 1.001,
    }


def test_a_webhook_that_fails_is_tried_again_at_the_next_alarm(webhook, capsys):
    url, handler = webhook
    handler.status = 500
    monitor = Monitor(webhook=url)
    for value in (1.0, 2.0, 1.0):
        monitor.check_canary("v2", value)
    wait_until(lambda: len(handler.received) == 2)
    monitor.close()
    err = ""
    while "has not taken an alarm" not in err:
        err += capsys.readouterr().err


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x", "127.0.0.1:8"])
def test_a_webhook_is_an_http_address(url):
    with pytest.raises(UserError, match="begins with http:// or https://"):
        Monitor(webhook=url)


def test_a_log_that_cannot_be_written_does_not_stop_the_server(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monitor = Monitor(tmp_path / "file" / "folder")
    monitor.check_canary("v2", 1.0)
    monitor.check_canary("v2", 2.0)
    assert monitor.firing["quality"]
    assert "no alarm can be written" in capsys.readouterr().err


# ---- the files for Prometheus and Grafana --------------------------------------------------------


def names_in(expression):
    """Return the metrics of an expression of Prometheus, without the suffixes of histograms."""
    words = "".join(c if c.isalnum() or c == "_" else " " for c in expression).split()
    names = {word for word in words if word.startswith("nanods_")}
    return {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in names
    }


def test_rules_and_dashboard_name_metrics_that_exist():
    monitor = Monitor()
    monitor.registry.register(ModelMetrics({}))
    families = {family.name for family in monitor.registry.collect()}
    families |= {f"{name}_total" for name in families}
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    expressions = [rule["expr"] for rule in rules] + [target["expr"] for target in targets]
    used = set().union(*map(names_in, expressions))
    assert used <= families and all(map(names_in, expressions))
    assert {"nanods_alarm", "nanods_requests_total", "nanods_drift_level"} <= used
    page = set(re.findall(r"nanods_\w+", (FOLDER / "page.html").read_text(encoding="utf-8")))
    assert page and page <= families
    for absent in re.findall(r"absent\((nanods_\w+)\)", " ".join(expressions)):
        fresh = Monitor().metrics().decode()
        assert f"\n{absent}{{" in fresh, "a server without requests so far is not down"
    for rule in rules:
        assert rule["alert"] and rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "ticket")
