"""What a running server tells its monitor: calls, traffic, the models' counters, and canaries."""
# ruff: noqa: E402

import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for name in ("grpc_tools", "grpc_health", "grpc_reflection", "fastapi", "uvicorn", "httpx"):
    pytest.importorskip(name, reason="the extra serve is not installed")

import grpc
import httpx

from nanods.data.examples import Examples
from nanods.serving.canary import canary
from nanods.serving.grpc_server import messages, services
from nanods.serving.models import embedding_model, language_model
from nanods.serving.monitor import Monitor
from nanods.training.saved_gallery import SavedGallery
from tests.serving.test_monitor import events, webhook  # noqa: F401
from tests.serving.test_server import Running, finished_run, is_idle, png, slow, wait_until


def text_model(preset="v2-tiny", name="text", **options):
    return language_model(name, finished_run(preset), **{"slots": 4, "max_waiting": 50} | options)


def space_model(monkeypatch, images, n_expert=1):
    examples = Examples(np.arange(len(images)), [f"number {i}" for i in range(len(images))], images)
    held_out = SavedGallery(examples, frozenset())
    monkeypatch.setattr("nanods.serving.models.held_out_examples", lambda *args: held_out)
    run = finished_run("v3-tiny", data="photos", n_expert=n_expert)
    modalities = replace(run.config.multimodal, modalities=("text", "image"))
    run = replace(run, config=replace(run.config, multimodal=modalities))
    return embedding_model("space", run, max_waiting=50)


@pytest.fixture
def scores(monkeypatch):
    """Keep what is reported as traffic: pairs (kind, score)."""
    kept = []
    monkeypatch.setattr(Monitor, "traffic", lambda self, model, *pair: kept.append(pair))
    return kept


def scrape(running):
    """Return the samples of /metrics: value by name{labels}."""
    answer = httpx.get(f"{running.url}/metrics", timeout=20)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {sample: float(value) for sample, value in (line.rsplit(" ", 1) for line in lines)}


def calls(found):
    """Return how many calls were counted, by "operation outcome"."""
    pattern = r'nanods_requests_total{operation="(\w+)",outcome="(\w+)"}'
    matches = [(re.fullmatch(pattern, sample), value) for sample, value in found.items()]
    return {" ".join(match.groups()): value for match, value in matches if match}


def running_and_waiting(found):
    return found['nanods_running{model="text"}'], found['nanods_waiting{model="text"}']


def test_calls_prompts_and_the_work_of_models_are_counted(scores):
    running = Running([text_model()])
    network, prompt, url = running.models["text"].finished.model, "def f(x):", f"{running.url}/v1"
    try:
        body = {"model": "text", "prompt": prompt, "max_tokens": 5}
        assert httpx.post(f"{url}/completions", json=body, timeout=20).status_code == 200
        stream = httpx.post(f"{url}/completions", json=body | {"stream": True}, timeout=20)
        assert stream.status_code == 200
        for words in ({"prompt": "a" * 65}, {"model": "v9"}, {"temperature": 1e-9}):
            assert httpx.post(f"{url}/completions", json=body | words, timeout=20).is_client_error
        chat = {"model": "text", "messages": [{"role": "user", "content": "a"}]}
        assert httpx.post(f"{url}/chat/completions", json=chat, timeout=20).status_code == 400
        network.forward, real = None, network.forward
        assert httpx.post(f"{url}/completions", json=body, timeout=20).status_code == 500
        network.forward = real
        found = scrape(running)
    finally:
        running.close()
    assert calls(found) == {
        "completion ok": 2,
        "completion refused": 3,
        "completion failed": 1,
        "chat refused": 1,
    }
    assert found["nanods_first_token_seconds_count"] == 2
    whole = found['nanods_request_seconds_sum{operation="completion"}']
    assert 0 < found["nanods_first_token_seconds_sum"] < whole
    totals = running.models["text"].worker.totals
    name = "nanods_model_tokens_total"
    assert found[f'{name}{{kind="new",model="text"}}'] == totals.new_tokens == 10
    assert found[f'{name}{{kind="read",model="text"}}'] == totals.read_tokens
    load = [  # (L, E)
        [
            found[f'nanods_expert_tokens_total{{expert="{e}",layer="{i}",model="text"}}']
            for e in range(16)
        ]
        for i in range(2)
    ]
    assert load == totals.load.tolist() and totals.load.sum() > 0
    assert running_and_waiting(found) == (0, 0)
    ids = torch.tensor([list(prompt.encode())])
    nats = F.cross_entropy(network(ids[:, :-1])[0][0], ids[0, 1:]).item()
    assert scores == [("prompt", pytest.approx(nats / math.log(2)))] * 2


def test_running_waiting_cancelled_and_late_calls():
    model = text_model("v0-tiny", slots=1)
    slow(model)
    running = Running([model])
    request = messages.GenerateRequest(model="text", prompt="a", max_tokens=4000)
    try:
        with grpc.insecure_channel(running.grpc) as channel:
            stub = services.NanodsStub(channel)
            under_way = [stub.GenerateStream(request), stub.Generate.future(request)]
            wait_until(lambda: model.worker.batch and model.worker.waiting)
            assert running_and_waiting(scrape(running)) == (1, 1)
            for call in under_way:
                call.cancel()
            wait_until(lambda: is_idle(model.worker))
            for call in (stub.Generate, lambda *a, **o: list(stub.GenerateStream(*a, **o))):
                with pytest.raises(grpc.RpcError) as error:
                    call(request, timeout=0.3)
                assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: sum(calls(scrape(running)).values()) == 4)
        assert calls(scrape(running)) == {"completion cancelled": 2, "completion failed": 2}
    finally:
        running.close()


def test_inputs_are_compared_with_the_gallery(monkeypatch, scores):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32)).astype(np.float32) / 255
    model = space_model(monkeypatch, images)
    running = Running([model])
    try:
        body = {"model": "space", "input": ["number 1", png(images[2]), "another"]}
        made = httpx.post(f"{running.url}/v1/embeddings", json=body, timeout=20)
        assert made.status_code == 200
        body = {"model": "space", "query": png(1 - images[0]), "modality": "text"}
        assert httpx.post(f"{running.url}/v1/search", json=body, timeout=20).status_code == 200
        found = scrape(running)
    finally:
        running.close()
    assert [kind for kind, _ in scores] == ["text", "text", "image", "image"]
    near, far, image, other = (score for _, score in scores)
    assert near == pytest.approx(0, abs=1e-4) and image == pytest.approx(0, abs=1e-4)
    rows = torch.tensor(made.json()["data"][2]["embedding"])
    best = (model.gallery.embeddings["text"] @ rows).max().item()
    assert far == pytest.approx(1 - best, abs=1e-5) and far > 1e-3 and other > 1e-3
    assert found['nanods_inputs_total{model="space"}'] == 4
    read = found['nanods_model_tokens_total{kind="read",model="space"}']
    assert read == model.worker.totals.tokens > 0
    assert calls(found) == {"embedding ok": 1, "search ok": 1}


def test_the_load_of_a_spaces_experts_is_counted(monkeypatch, scores):
    images = np.random.default_rng(0).random((4, 3, 32, 32), np.float32)
    running = Running([space_model(monkeypatch, images, n_expert=4)])
    try:
        body = {"model": "space", "input": ["number 1", "another"]}
        assert httpx.post(f"{running.url}/v1/embeddings", json=body, timeout=20).status_code == 200
        found = scrape(running)
    finally:
        running.close()
    load = [  # (L, E)
        [
            found[f'nanods_expert_tokens_total{{expert="{e}",layer="{layer}",model="space"}}']
            for e in range(4)
        ]
        for layer in range(2)
    ]
    totals = running.models["space"].worker.totals
    assert load == totals.load["shared"].tolist()
    assert sum(load[0]) == sum(load[1]) == 2 * totals.tokens > 0, "two experts a token"


def test_metrics_need_the_token():
    running = Running([text_model("v0-tiny")], token="s3cret")
    try:
        url = f"{running.url}/metrics"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"authorization": "Bearer s3cret"}).status_code == 200
    finally:
        running.close()


# ---- canaries ------------------------------------------------------------------------------------


def test_each_expert_whose_loss_harms_is_caught_by_the_next_canary():
    model, monitor = text_model(), Monitor()
    measure = canary(model)
    first = measure()
    assert measure() == first, "the same weights give the same value"
    harmful = 0
    for block in model.finished.model.blocks:
        for expert in range(len(block.mlp.out)):
            kept = block.mlp.out[expert].detach().clone()
            block.mlp.out.data[expert] = 0
            worse = measure()
            block.mlp.out.data[expert] = kept
            monitor = Monitor()
            monitor.check_canary("text", first)
            monitor.check_canary("text", worse)
            assert monitor.firing["quality"] == (worse > 1.001 * first)
            harmful += monitor.firing["quality"]
    assert harmful >= 8


def test_partners_are_the_canary_of_a_space(monkeypatch):
    images = np.random.default_rng(0).random((4, 3, 32, 32), np.float32)
    model = space_model(monkeypatch, images)
    measure = canary(model)
    embeddings = model.gallery.embeddings
    partners = (embeddings["text"] * embeddings["image"]).sum(dim=1)
    assert measure() == measure() == pytest.approx(1 - partners.mean().item(), abs=1e-5)
    model.gallery = None
    assert canary(model) is None


def test_a_lost_expert_reaches_the_webhook_and_changes_no_answer(tmp_path, webhook):  # noqa: F811
    url, handler = webhook
    models = [text_model(), text_model("v1-tiny", "other")]
    plain = {"model": "text", "prompt": "def ", "max_tokens": 40, "seed": 5}
    quiet = Running(models)
    expected = httpx.post(f"{quiet.url}/v1/completions", json=plain, timeout=20).json()
    quiet.close()
    models = [text_model(), text_model("v1-tiny", "other")]
    monitor = Monitor(tmp_path, webhook=url)
    running = Running(models, monitor, canary_minutes=0.1 / 60)
    try:
        wait_until(lambda: len(monitor.first_canary) == 2, 30)
        made = httpx.post(f"{running.url}/v1/completions", json=plain, timeout=20).json()
        assert made["choices"][0]["text"] == expected["choices"][0]["text"]
        assert not handler.received
        experts = models[0].finished.model.blocks[0].mlp.out
        busiest = int(models[0].worker.totals.load[0].argmax())
        kept = experts[busiest].detach().clone()
        experts.data[busiest] = 0
        wait_until(lambda: handler.received, 30)
        found = scrape(running)
        assert found['nanods_alarm{alarm="quality"}'] == 1
        first = monitor.first_canary
        assert found['nanods_canary{model="text"}'] > 1.001 * first["text"]
        assert found['nanods_canary{model="other"}'] == pytest.approx(first["other"], abs=1e-12)
        experts.data[busiest] = kept
        wait_until(lambda: len(handler.received) == 2, 30)
    finally:
        running.close()
    assert not any(thread.is_alive() for thread in monitor.threads)
    assert handler.received == events(tmp_path)
    sent = [(event["alarm"], event["model"], event["state"]) for event in handler.received]
    assert sent == [("quality", "text", "firing"), ("quality", "text", "resolved")]


def test_late_answers_reach_the_webhook(webhook):  # noqa: F811
    url, handler = webhook
    model = text_model("v0-tiny")
    slow(model, 0.005)
    running = Running([model], Monitor(webhook=url, slow_seconds=0.004))
    try:
        body = {"model": "text", "prompt": ["a"] * 25, "max_tokens": 1}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=20)
        assert answer.status_code == 200
        wait_until(lambda: handler.received)
    finally:
        start = time.monotonic()
        running.close()
    assert time.monotonic() - start < 5
    assert [event["alarm"] for event in handler.received] == ["latency"]
