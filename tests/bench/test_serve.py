"""The bench of serving: every way serves every request, and the times belong to the tokens."""

import http.client
import math
import os
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanods.bench import serve_embedder, serve_engine, serve_scores
from nanods.build import build_model
from nanods.config import PRESETS
from nanods.serving.embedder import embed_one_by_one
from nanods.serving.engine import Engine
from tests.test_gpt import DENSE, model_of


@pytest.mark.parametrize(("clients", "static"), [(1, False), (3, False), (3, True)])
def test_every_request_is_served(clients, static):
    engine = Engine(model_of(DENSE), bytes, slots=3)
    requests = serve_engine.draw_requests(7, np.arange(2000) % 50)
    most, submit = [], engine.submit

    def watch(request, deliver):
        task = submit(request, deliver)
        most.append(len(engine.waiting) + len(engine.reading) + len(engine.batch))
        return task

    engine.submit = watch
    row = serve_engine.serve(engine, requests, clients, static)
    assert engine.totals.finished == 7 and max(most) == clients
    assert engine.totals.new_tokens == sum(request.max_new_tokens for request in requests)
    assert 0 < row["gap_ms"]["p50"] <= row["gap_ms"]["p99"]
    if static:  # a group begins when the one before has ended
        assert most == [1, 2, 3, 1, 2, 3, 1]


def test_prompts_and_answers_have_the_lengths_that_are_stated():
    requests = serve_engine.draw_requests(50, np.arange(2000) % 50)
    assert {len(r.prompt) for r in requests} <= set(
        range(serve_engine.PROMPT[0], serve_engine.PROMPT[1] + 1)
    )
    assert {r.max_new_tokens for r in requests} <= set(range(16, 97))
    assert requests == serve_engine.draw_requests(50, np.arange(2000) % 50)


def test_all_ways_embed_the_same():
    torch.manual_seed(0)
    model = build_model(PRESETS["v3-tiny"]).eval()
    inputs = serve_embedder.draw_inputs(model, ("text", "image", "audio"), 33)
    lengths = [len(x) for name, x in inputs if name == "text"]
    assert lengths[9] == max(lengths) == model.tokens_per_example()["text"]
    reference = embed_one_by_one(model, inputs)
    ways = serve_embedder.in_one_queue, serve_embedder.in_one_pass, serve_embedder.in_queues
    for embed in ways:
        assert (embed(model, inputs) - reference).abs().max() < 1e-5


def test_medians_are_taken_number_by_number():
    tables = [{"a": {"b": x}, "c": 10 * x} for x in (3, 1, 2)]
    assert serve_engine.medians(tables) == {"a": {"b": 2}, "c": 20}


# ---- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    for name in ("grpc_tools", "grpc_health", "grpc_reflection", "fastapi", "uvicorn", "httpx"):
        pytest.importorskip(name, reason="the extra serve is not installed")
    from nanods.bench import serve_http
    from nanods.serving.models import language_model
    from tests.serving.test_server import Running, finished_run

    running = Running([language_model("v1-tiny", finished_run("v1-tiny"), 4, max_waiting=50)])
    yield serve_http.Server(os.getpgrp(), running.port, running.grpc)
    running.close()


def few_requests():
    return serve_engine.draw_requests(5, np.arange(2000) % 64 + 32)


def short(request):
    """Return the request with a prompt that the small model's context holds."""
    return serve_engine.Request(request.prompt[:20], max_new_tokens=9, seed=request.seed)


def test_a_stream_has_a_time_for_each_part_and_the_text_of_the_whole_answer(server):
    from nanods.bench import serve_http

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for ask in (serve_http.stream, serve_http.whole):
        answer = ask("v1-tiny", connection, short(few_requests()[0]))
        assert answer.tokens == 9 and all(a < b for a, b in pairwise(answer.times))
        if ask is serve_http.whole:
            assert len(answer.times) == 2  # sent, answered
        else:
            assert 3 <= len(answer.times) <= 10
    with pytest.raises(RuntimeError, match="404"):
        serve_http.whole("another", connection, few_requests()[0])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU seconds are Linux's")
def test_clients_send_every_request_once(server):
    from nanods.bench import serve_http

    requests = [short(request) for request in few_requests()]
    row = serve_http.serve(server, requests, 3, partial(serve_http.stream, "v1-tiny"))
    assert row["answer_ms"]["p50"] >= row["first_ms"]["p50"] > 0 and row["gap_ms"]["p99"] > 0
    assert row["tokens_per_second"] > 0 and row["tokens_per_cpu_second"] > 0
    start, cpu = server.cpu_seconds(), time.process_time()
    while time.process_time() < cpu + 0.1:
        pass
    assert server.cpu_seconds() - start > 0.05


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU seconds are Linux's")
def test_a_measured_server_asks_for_no_token(server, monkeypatch):
    from nanods.bench import serve_http

    monkeypatch.setenv("NANODS_TOKEN", "secret")
    program = "import os; print(os.environ['NANODS_TOKEN'], os.environ['OMP_NUM_THREADS'])"
    with serve_http.started("-c", program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read() == " 1\n"


def test_what_fails_beside_a_litserve_server_is_not_suppressed(server, monkeypatch):
    from nanods.bench import serve_http

    @contextmanager
    def started(*command, **pipes):
        yield SimpleNamespace(pid=1, poll=lambda: None)

    ready = SimpleNamespace(
        request=lambda *_: None, getresponse=lambda: SimpleNamespace(status=200)
    )
    monkeypatch.setattr(serve_http, "started", started)
    monkeypatch.setattr(http.client, "HTTPConnection", lambda *_: ready)
    lost = pytest.raises(ConnectionResetError, match="the server is lost")
    with lost, serve_http.litserve_server(Path("run")):
        raise ConnectionResetError("the server is lost")


def test_rest_and_grpc_are_called_equally_often(server, monkeypatch):
    from nanods.bench import serve_http

    counts = {"gRPC": 0, "REST": 0}

    def counting(name, caller):
        def client():
            call = caller()

            def count():
                counts[name] += 1
                call()

            return count

        return client

    request = short(few_requests()[0])
    callers = {"gRPC": serve_http.grpc_caller, "REST": serve_http.rest_caller}
    callers = {name: counting(name, make(server, request)) for name, make in callers.items()}
    row = serve_http.compare_calls(callers, clients=2, turns=2, each=3)
    assert counts == {"gRPC": 18, "REST": 18}  # with the turn that is not counted
    assert row["p50_difference"] == row["REST"]["p50"] - row["gRPC"]["p50"]


def test_litserve_answers_each_request_with_its_own_number_of_tokens():
    pytest.importorskip("litserve", reason="the extra peers is not installed")
    from nanods.bench.serve_litserve import Completions
    from nanods.data.tokenizer import ByteTokenizer

    api = Completions(max_batch_size=4)
    api.model, api.tokenizer = model_of(DENSE), ByteTokenizer()
    low = [{"prompt": "\x01" * n, "max_tokens": n, "seed": 0} for n in (3, 7, 5)]
    made = api.predict(low)
    assert list(map(len, made)) == [3, 7, 5]
    assert api.predict(low[:1])[0] == made[0], "the rest of a batch changes no tokens"
    assert api.encode_response([65, 66])["usage"] == {"completion_tokens": 2}


# ---- recorded scores -----------------------------------------------------------------------------


def test_recorded_scores_are_those_that_the_server_reports():
    random = np.random.default_rng(0)
    text = bytes(random.choice(list(b"ab cd\n"), 500).tolist())
    prompts = serve_scores.draw_prompts(text, 7, random)
    assert all(16 <= len(prompt) <= 128 and prompt in text for prompt in prompts)
    engine = Engine(build_model(PRESETS["v1-tiny"]), bytes, slots=1)
    expected = []
    for prompt in prompts:
        task = engine.submit(serve_engine.Request(tuple(prompt), 1), lambda token: None)
        while engine.has_work():
            engine.step()
        expected.append(task.prompt_nats / math.log(2) / (len(prompt) - 1))
    actual = serve_scores.bits_per_byte(engine.model, prompts, size=3)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_resampled_traffic_is_what_its_name_says():
    random = np.random.default_rng(0)
    documents = [2 + 0.3 * random.standard_normal() + 0.3 * random.random(25) for _ in range(50)]

    def stream(kind):
        return serve_scores.resample(documents, kind, serve_scores.DAY, seed=1)

    def autocorrelation(scores, lag):
        z = (scores - scores.mean()) / scores.std()
        return (z[:-lag] * z[lag:]).mean()

    known = np.concatenate(documents)
    for kind in ("iid", "bursty", "daily"):
        assert np.isin(stream(kind), known).all()
    assert abs(autocorrelation(stream("iid"), 1)) < 0.05
    assert autocorrelation(stream("bursty"), 1) > 0.4
    assert abs(autocorrelation(stream("bursty"), 100)) < 0.1 < autocorrelation(stream("daily"), 100)
    noon = stream("daily").reshape(4, -1).mean(axis=1)
    assert noon.argmax() in (0, 1) and noon.argmin() in (2, 3)
    assert stream("daily").tolist() == stream("daily").tolist()
