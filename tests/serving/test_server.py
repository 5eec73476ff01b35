"""The server as its clients see it, on loopback, with tiny models of random weights: gRPC, REST,
the unchanged `openai` client, limits, errors, clients that leave, and how it starts and stops."""
# ruff: noqa: E402

import asyncio
import base64
import errno
import io
import json
import math
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for name in ("grpc_tools", "grpc_health", "grpc_reflection", "fastapi", "uvicorn", "httpx"):
    pytest.importorskip(name, reason="the extra serve is not installed")

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from nanods.build import build_model
from nanods.config import PRESETS
from nanods.contact_sheet import png_url
from nanods.data.examples import Examples
from nanods.data.instructions import END, prompt_tokens
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.serving.embedder import embed_one_by_one
from nanods.serving.engine import Request
from nanods.serving.grpc_server import messages, services
from nanods.serving.models import embedding_model, language_model
from nanods.serving.monitor import Monitor
from nanods.serving.search import read_input
from nanods.serving.server import Settings, bind, serve
from nanods.training.finished_run import FinishedRun
from nanods.training.saved_gallery import SavedGallery
from tests.serving.test_engine import alone
from tests.serving.test_search import png_of_zeros


def finished_run(preset, answers=False, data="pydocs", n_expert=None):
    """Return a run of a tiny model with random weights, as if it had been trained."""
    torch.manual_seed(0)
    config = PRESETS[preset]
    small = replace(config.model, n_layer=2, n_head=2, n_embd=16, context_length=64)
    if n_expert:
        small = replace(small, moe=replace(small.moe, n_expert=n_expert))
    config = replace(config, model=small, data=data)
    if preset == "v3-tiny":
        model, tokenizer = build_model(config), ByteTokenizer()
    else:
        model, tokenizer = GPT(small).double(), ByteTokenizer()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return FinishedRun(
        Path("no-such-folder"), {"answers": answers}, config, tokenizer, model.eval()
    )


class Running:
    """A server in a thread."""

    def __init__(self, models, monitor=None, **settings):
        self.models = {model.name: model for model in models}
        self.monitor = monitor or Monitor()
        usual = {"grace": 5.0, "timeout": 20.0, "canary_minutes": 0}
        settings = Settings(port=0, grpc_port=0, **usual | settings)
        self.loop, self.stop = asyncio.new_event_loop(), asyncio.Event()
        ready = threading.Event()

        def on_ready(port, grpc_port):
            self.port, self.grpc = port, f"127.0.0.1:{grpc_port}"
            self.url = f"http://127.0.0.1:{port}"
            ready.set()

        self.thread = threading.Thread(
            target=self.loop.run_until_complete,
            args=(serve(self.models, settings, self.monitor, self.stop, on_ready),),
        )
        self.thread.start()
        assert ready.wait(20)

    def close(self):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(20)
        assert not self.thread.is_alive()
        for model in self.models.values():
            assert not model.thread.is_alive()


@pytest.fixture(scope="module")
def server():
    running = Running(
        [
            language_model("base", finished_run("v2-tiny"), slots=4, max_waiting=50),
            language_model("tuned", finished_run("v1-tiny", answers=True), slots=4, max_waiting=50),
        ]
    )
    yield running
    running.close()


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture
def openai(server):
    return pytest.importorskip("openai").OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20
    )


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield services.NanodsStub(channel)


def expected(server, prompt, n, name="base", **options):
    """Return the text that `GPT.generate` makes."""
    model = server.models[name].finished.model
    return bytes(alone(model, Request(tuple(prompt.encode()), n, **options))).decode(
        errors="replace"
    )


def post(client, route, **body):
    return client.post(f"/v1/{route}", json={"model": "base"} | body)


# ---- what it answers -----------------------------------------------------------------------------


def test_the_openai_client_completes(openai, server):
    text = expected(server, "def ", 30, seed=7, temperature=0.9, top_p=0.8)
    settings = {"model": "base", "prompt": "def ", "max_tokens": 30, "seed": 7}
    settings |= {"temperature": 0.9, "top_p": 0.8}
    whole = openai.completions.create(**settings)
    assert whole.choices[0].text == text and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 30)
    parts = list(
        openai.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == text
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "length"
    assert parts[-1].usage.completion_tokens == 30 and len(parts) > 3


def test_the_openai_client_chats(openai, server):
    said = [("system", "Answer."), ("user", "What is it?")]
    tuned = server.models["tuned"].finished
    prompt = prompt_tokens(said, tuned.tokenizer)
    end = frozenset(END)
    tokens = alone(tuned.model, Request(tuple(prompt), 40, seed=3, stop_tokens=end))
    text = bytes(t for t in tokens if t not in end).decode(errors="replace")
    settings = {"model": "tuned", "max_completion_tokens": 40, "seed": 3}
    settings["messages"] = [
        {"role": "developer", "content": "Answer."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
    ]
    whole = openai.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == text
    scores = whole.choices[0].logprobs.content
    assert bytes(byte for token in scores for byte in token.bytes).decode(errors="replace") == text
    assert all(len(token.top_logprobs) == 2 and token.logprob < 0 for token in scores)
    parts = list(openai.chat.completions.create(**settings, stream=True))
    assert "".join(part.choices[0].delta.content for part in parts) == text


def test_an_answer_ends_where_the_model_ends_it(server, openai):
    tuned = server.models["tuned"]
    said = prompt_tokens([("user", "a")], tuned.finished.tokenizer)
    free = alone(tuned.finished.model, Request(tuple(said), 20, seed=1))
    length = next(i for i in range(2, 20) if free[i] not in free[:i])
    ends, tuned.end_tokens = tuned.end_tokens, frozenset([free[length]])  # as if it had learnt to
    try:
        answer = openai.chat.completions.create(
            model="tuned",
            messages=[{"role": "user", "content": "a"}],
            seed=1,
            max_tokens=20,
            logprobs=True,
        )
    finally:
        tuned.end_tokens = ends
    (choice,) = answer.choices
    assert choice.message.content == bytes(free[:length]).decode(errors="replace")
    assert choice.finish_reason == "stop" and len(choice.logprobs.content) == length


def test_the_openai_client_lists_models(openai):
    assert [model.id for model in openai.models.list()] == ["base", "tuned"]
    card = openai.models.retrieve("tuned").model_dump()
    assert card["operations"] == ["generate", "chat"] and card["context_length"] == 64
    assert card["active_parameters"] <= card["parameters"]


def test_a_run_was_created_when_its_newest_file_was(tmp_path):
    run = replace(finished_run("v0-tiny"), folder=tmp_path)
    model = language_model("base", run, slots=1, max_waiting=2)
    assert model.created == 0
    (tmp_path / "state.json").touch()
    os.utime(tmp_path / "state.json", (5, 5))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert model.created == 5


def test_several_prompts_stops_and_logprobs(client, server):
    prompts = ["a", "bc", "d"]
    texts = [expected(server, prompt, 12, temperature=0) for prompt in prompts]
    made = post(client, "completions", prompt=prompts, max_tokens=12, temperature=0, logprobs=2)
    choices = made.json()["choices"]
    assert [choice["text"] for choice in choices] == texts
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    scores = choices[1]["logprobs"]
    assert len(scores["tokens"]) == len(scores["token_logprobs"]) == 12
    assert all(len(top) == 2 for top in scores["top_logprobs"])
    assert scores["token_logprobs"] == pytest.approx(
        [max(top.values()) for top in scores["top_logprobs"]]
    )
    free = bytes(
        alone(server.models["base"].finished.model, Request((97,), 60, temperature=0, top_k=1))
    )
    letter = next(chr(b) for b in free if b < 128)
    made = post(client, "completions", prompt="a", max_tokens=60, temperature=0, stop=letter)
    choice = made.json()["choices"][0]
    assert choice["text"] == free.decode(errors="replace").split(letter)[0]
    assert choice["finish_reason"] == "stop"


def test_offsets_count_characters_also_where_a_token_is_a_part_of_one(openai):
    settings = {"model": "base", "prompt": "a", "max_tokens": 60, "seed": 1, "logprobs": 0}
    (whole,) = openai.completions.create(**settings).choices
    tokens, offsets = whole.logprobs.tokens, whole.logprobs.text_offset
    ascii = [i for i, token in enumerate(tokens) if len(token) == 1]
    assert 10 < len(ascii) < 50, "the others are parts of characters"
    assert all(whole.text[offsets[i]] == tokens[i] for i in ascii)
    parts = openai.completions.create(**settings, stream=True)
    assert [i for part in parts for i in part.choices[0].logprobs.text_offset] == offsets


@pytest.mark.parametrize(
    ("name", "route"), [("base", "completions"), ("tuned", "chat/completions")]
)
def test_a_trace_says_how_each_token_was_computed(client, server, name, route):
    body = {"model": name, "prompt": "def f", "max_tokens": 30, "seed": 4, "temperature": 0}
    if route.startswith("chat"):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    events = []
    with client.stream("POST", f"/v1/{route}", json=body | {"stream": True, "trace": True}) as made:
        for line in made.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: "))["choices"][0])
    traces = [trace for event in events for trace in event["trace"]]
    text = "".join(e.get("text") or e.get("delta", {}).get("content") or "" for e in events)
    assert "".join(trace["text"] for trace in traces) == text
    whole = post(client, route, **body).json()["choices"][0]
    assert "trace" not in whole and text == (whole.get("text") or whole["message"]["content"])
    positions = [trace["position"] for trace in traces]
    assert positions == list(range(positions[0], positions[0] + len(traces)))
    card = client.get(f"/v1/models/{name}").json()
    config = server.models[name].finished.config.model
    assert (card["n_layer"], card["is_bytes"]) == (config.n_layer, True)
    assert card["n_expert"] == (16 if name == "base" else 0)
    for trace in traces:
        assert len(trace["blocks"]) == config.n_layer
        assert all(
            (trace["position"] - 1) // card["block_size"] in layer for layer in trace["blocks"]
        )
        assert all(0 <= e < card["n_expert"] for layer in trace["experts"] for e in layer)
        assert len(trace["experts"]) == (config.n_layer if card["n_expert"] else 0)


def test_without_a_seed_answers_differ(client):
    made = {
        post(client, "completions", prompt="a", max_tokens=20).json()["choices"][0]["text"]
        for _ in range(3)
    }
    assert len(made) == 3


def test_thirty_two_clients_get_what_each_gets_alone(client, server):
    def ask(seed):
        answer = post(client, "completions", prompt=f"{seed}", max_tokens=5 + seed % 5, seed=seed)
        return answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(32) as pool:
        made = list(pool.map(ask, range(32)))
    assert made == [expected(server, f"{s}", 5 + s % 5, seed=s) for s in range(32)]


def test_grpc_answers_health_and_reflection(stub, server):
    request = messages.GenerateRequest(model="base", prompt="a", max_tokens=9, temperature=0)
    text = expected(server, "a", 9, temperature=0)
    whole = stub.Generate(request, timeout=20)
    assert (whole.text, whole.finish, whole.new_tokens) == (text, "length", 9)
    parts = list(stub.GenerateStream(request, timeout=20))
    assert "".join(part.text for part in parts) == text and parts[-1].finish == "length"
    assert sum(part.new_tokens for part in parts) == 9
    with grpc.insecure_channel(server.grpc) as channel:
        healthy = health_pb2_grpc.HealthStub(channel)
        for name in ("", "nanods.Nanods"):
            reply = healthy.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == reply.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "nanods.Nanods" in database.get_services()
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}


# ---- what it refuses -----------------------------------------------------------------------------

LONG = "a" * 65
JSON = {"content-type": "application/json"}
REFUSED = {
    "no model": ("completions", {"model": "v9", "prompt": "a"}, 404, "the models are base, tuned"),
    "no prompt": ("completions", {}, 400, "prompt"),
    "an empty prompt": ("completions", {"prompt": ""}, 400, "at least 1 character"),
    "a long prompt": (
        "completions",
        {"prompt": LONG},
        400,
        "65 tokens; the model reads at most 64",
    ),
    "a huge prompt": ("completions", {"prompt": "a" * 10**6}, 400, "1000000 characters; the model"),
    "many tokens": ("completions", {"prompt": "a", "max_tokens": 10**6}, 400, "equal to 4096"),
    "a number as text": ("completions", {"prompt": "a", "max_tokens": "2"}, 400, "max_tokens"),
    "a yes as a number": ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
    "many fields": ("completions", {str(i): 1 for i in range(200)}, 400, "fields: send those that"),
    "no number": ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    "a huge number": ("completions", {"prompt": "a", "seed": 10**30}, 400, "seed"),
    "a tiny temperature": ("completions", {"prompt": "a", "temperature": 1e-300}, 400, "1e-6"),
    "an unknown field": ("completions", {"prompt": "a", "echo": True}, 400, "echo"),
    "a penalty": ("completions", {"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty"),
    "an empty stop": ("completions", {"prompt": "a", "stop": ""}, 400, "stop"),
    "a long stop": ("completions", {"prompt": "a", "stop": "a" * 10**6}, 400, "at most 256"),
    "many logprobs": ("completions", {"prompt": "a", "logprobs": 99}, 400, "equal to 20"),
    "a long name": ("completions", {"model": "\u00e9" * 10**6, "prompt": "a"}, 404, "no model"),
    "two streams": ("completions", {"prompt": ["a", "b"], "stream": True}, 400, "one prompt"),
    "a chat with a base run": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "a"}]},
        400,
        "base does not chat: it can generate",
    ),
    "no messages": ("chat/completions", {"messages": []}, 400, "messages"),
    "an embedding": ("embeddings", {"input": "a"}, 400, "base does not embed"),
    "a search": ("search", {"query": "a", "modality": "text"}, 400, "base does not search"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_and_says_why(client, name):
    route, body, status, words = REFUSED[name]
    for extra in ({}, {"stream": True} if "completions" in route else {}):
        answer = post(client, route, **body | extra)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert words in error["message"] and error["type"] == "invalid_request_error"


def test_bodies_that_are_not_json_are_refused(client):
    for body in (b"", b"{", b"[]", b'{"prompt": "\\ud800", "model": "base"}', b"\xff", b"[" * 9999):
        answer = client.post("/v1/completions", content=body, headers=JSON)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body
    bad = {"prompt": "a", "model": "base", "temperature": math.nan}
    answer = client.post("/v1/completions", content=json.dumps(bad), headers=JSON)
    assert answer.status_code == 400
    as_text = client.post(  # a page of another site may send this, so it must not be obeyed
        "/v1/completions", content=json.dumps(bad), headers={"content-type": "text/plain"}
    )
    assert as_text.status_code == 400 and "send JSON" in as_text.json()["error"]["message"]
    wrong = post(client, "completions", prompt=5).json()["error"]["message"]
    assert wrong == "prompt: Input should be a valid string"
    assert client.get("/v1/no-such-route").json()["error"]["code"] == 404
    assert client.get("/v1/completions").json()["error"]["code"] == 405


def test_other_sites_may_not_read_answers(client):
    answer = client.get("/v1/models", headers={"origin": "http://elsewhere.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert client.options("/v1/completions").status_code == 405


def test_grpc_refuses_the_same(stub):
    codes = grpc.StatusCode
    for fields, code in (
        ({"model": "base"}, codes.INVALID_ARGUMENT),
        ({"model": "v9", "prompt": "a"}, codes.NOT_FOUND),
        ({"model": "base", "prompt": "a", "top_p": math.nan}, codes.INVALID_ARGUMENT),
        ({"model": "base", "prompt": "a", "temperature": -1}, codes.INVALID_ARGUMENT),
        ({"model": "base", "prompt": "a", "logprobs": 2**31}, codes.INVALID_ARGUMENT),
        ({"model": "base", "prompt": "a", "max_tokens": 5000}, codes.INVALID_ARGUMENT),
        ({"model": "base", "prompt": "a", "stop": ["a" * 300]}, codes.INVALID_ARGUMENT),
        ({"model": "base", "prompt": "a", "stop": [""]}, codes.INVALID_ARGUMENT),
        ({"model": "a" * 100_000, "prompt": "a"}, codes.NOT_FOUND),
        ({"model": "tuned", "messages": [{"role": "king", "text": "a"}]}, codes.INVALID_ARGUMENT),
        ({"model": "base", "messages": [{"role": "user"}]}, codes.FAILED_PRECONDITION),
    ):
        for call in (stub.Generate, lambda request, **o: list(stub.GenerateStream(request, **o))):
            with pytest.raises(grpc.RpcError) as error:
                call(messages.GenerateRequest(**fields), timeout=20)
            assert error.value.code() == code, (fields, error.value)


def test_malformed_protobuf_is_refused(server, stub):
    with grpc.insecure_channel(server.grpc) as channel:
        for data in (b"\xff" * 9, b"\x0a\xff", os.urandom(200)):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary("/nanods.Nanods/Generate")(data, timeout=20)
    assert stub.Models(messages.ModelsRequest(), timeout=20).models  # it still answers


FIELDS = ("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "n")
FIELDS += (
    "stop",
    "stream",
    "logprobs",
    "top_logprobs",
    "input",
    "query",
    "modality",
    "top",
    "user",
)
VALUES = (None, True, 0, -1, 1, 3, 2**31, 2**64, 10**400, 0.5, 1e308, "", "a", "base", "tuned")
VALUES += ("text", "\0", "\u00e9" * 40, "data:image/png;base64,", "data:audio/wav;base64,UklGRg==")
VALUES += ([], ["a", "b"], [1], {}, {"role": "user"}, [{"role": "user", "content": "a"}], [[[]]])


def test_random_requests_are_answered_or_refused_and_never_crash(client):
    """300 bodies of random fields, half of them near to what is right. Seed 0."""
    draw, seen = random.Random(0), set()
    right = {"model": "base", "prompt": "a", "max_tokens": 2, "input": "a", "query": "a"}
    right |= {"messages": [{"role": "user", "content": "a"}], "modality": "text"}
    for _ in range(300):
        route = draw.choice(["completions", "chat/completions", "embeddings", "search"])
        needs = {"completions": ["prompt", "max_tokens"], "chat/completions": ["messages"]}
        needs |= {"embeddings": ["input"], "search": ["query", "modality"]}
        body = {name: right[name] for name in ["model", *needs[route]]}
        for name in draw.sample(FIELDS, draw.randrange(4)):
            body[name] = draw.choice(VALUES)
        answer = client.post(f"/v1/{route}", content=json.dumps(body), headers=JSON)
        assert answer.status_code < 500, (route, body, answer.text)
        assert "Traceback" not in answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]
        seen.add(answer.status_code)
    assert seen >= {200, 400, 404}


# ---- load, deadlines, clients that leave ---------------------------------------------------------


def slow(model, seconds=0.02):
    """Let each pass of a model take some time."""
    real = model.finished.model.forward

    def forward(*args, **options):
        time.sleep(seconds)
        return real(*args, **options)

    model.finished.model.forward = forward


@pytest.fixture
def slow_server():
    """A server of one slow model with one slot, in front of which two requests may wait."""
    model = language_model("base", finished_run("v0-tiny"), slots=1, max_waiting=2)
    slow(model)
    running = Running([model], max_body=2000, timeout=10.0)
    running.engine = model.worker
    yield running
    running.close()


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def is_idle(engine):
    return not engine.has_work()


@pytest.mark.parametrize("moment", ["generating", "waiting"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_costs_no_more_computing(slow_server, stream, moment):
    """Over a bare socket, which is closed while the answer is awaited or under way."""
    engine = slow_server.engine
    other = None
    if moment == "waiting":
        other = grpc.insecure_channel(slow_server.grpc)
        hold = services.NanodsStub(other).GenerateStream(
            messages.GenerateRequest(model="base", prompt="a", max_tokens=4000)
        )
        wait_until(lambda: engine.batch)
    body = json.dumps({"model": "base", "prompt": "a", "max_tokens": 4000, "stream": stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", slow_server.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        wait_until(lambda: engine.waiting if other else engine.batch)
        if stream and not other:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert engine.totals.cancelled == 0
    wait_until(lambda: engine.totals.cancelled == 1, seconds=2.0)
    metrics = httpx.get(f"{slow_server.url}/metrics").text
    assert 'nanods_requests_total{operation="completion",outcome="cancelled"} 1.0' in metrics
    if other:
        assert engine.batch  # the neighbour goes on
        hold.cancel()
        other.close()
        wait_until(lambda: engine.totals.cancelled == 2, seconds=2.0)
    wait_until(lambda: is_idle(engine))
    steps = engine.totals.steps
    time.sleep(0.1)
    assert engine.totals.steps == steps


def test_several_prompts_end_together_where_one_is_refused(slow_server):
    body = {"model": "base", "prompt": ["a", "b", LONG], "max_tokens": 4000}
    answer = httpx.post(f"{slow_server.url}/v1/completions", json=body, timeout=20)
    assert answer.status_code == 400 and "65 tokens" in answer.json()["error"]["message"]
    wait_until(lambda: is_idle(slow_server.engine), seconds=2.0)


def test_too_many_requests_are_told_when_to_come_back(slow_server):
    url, engine, go = slow_server.url, slow_server.engine, threading.Event()
    model = slow_server.models["base"].finished.model
    forward = model.forward
    model.forward = lambda *args, **options: (go.wait(20), forward(*args, **options))[1]
    body = {"model": "base", "prompt": "a", "max_tokens": 3}

    def ask(**options):
        return httpx.post(f"{url}/v1/completions", json=body | options, timeout=20)

    with ThreadPoolExecutor(3) as pool:
        accepted = []
        for waiting in range(3):
            accepted.append(pool.submit(ask))
            wait_until(lambda n=waiting: engine.batch and len(engine.waiting) == n)
        for refused in (ask(), ask(stream=True)):
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert "2 requests wait already" in refused.json()["error"]["message"]
        go.set()
        assert [future.result().status_code for future in accepted] == [200] * 3


def test_a_deadline_ends_the_work(slow_server):
    with grpc.insecure_channel(slow_server.grpc) as channel:
        stub = services.NanodsStub(channel)
        request = messages.GenerateRequest(model="base", prompt="a", max_tokens=4000)
        for call in (stub.Generate, lambda *a, **o: list(stub.GenerateStream(*a, **o))):
            with pytest.raises(grpc.RpcError) as error:
                call(request, timeout=0.3)
            assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: is_idle(slow_server.engine), seconds=2.0)
    assert slow_server.engine.totals.cancelled == 2


def test_the_servers_own_deadline_holds_where_a_client_sets_none():
    model = language_model("base", finished_run("v0-tiny"), slots=1, max_waiting=2)
    slow(model)
    running = Running([model], timeout=0.3)
    try:
        body = {"model": "base", "prompt": "a", "max_tokens": 4000}
        late = httpx.post(f"{running.url}/v1/completions", json=body, timeout=20)
        assert late.status_code == 504
        with grpc.insecure_channel(running.grpc) as channel:
            with pytest.raises(grpc.RpcError) as error:
                services.NanodsStub(channel).Generate(messages.GenerateRequest(**body))
            assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json=body | {"stream": True}, timeout=20
        ) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert '"code": 504' in events[-1] and '"text"' in events[0]
        wait_until(lambda: is_idle(model.worker))
    finally:
        running.close()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(slow_server):
    body = json.dumps({"model": "base", "prompt": "a" * 3000}).encode()
    url = f"{slow_server.url}/v1/completions"
    assert httpx.post(url, content=body, headers=JSON).status_code == 413
    unknown_length = httpx.post(url, content=iter([body]), headers=JSON)
    assert unknown_length.status_code == 413


def test_a_failed_computation_is_an_error_without_its_traceback(slow_server, capsys):
    model = slow_server.models["base"].finished.model
    forward = model.forward

    def fail(*args, **options):
        raise RuntimeError("a secret of the server")

    model.forward = fail
    body = {"model": "base", "prompt": "a"}
    answer = httpx.post(f"{slow_server.url}/v1/completions", json=body)
    assert answer.status_code == 500 and "secret" not in answer.text
    model.forward = forward
    assert httpx.post(f"{slow_server.url}/v1/completions", json=body).status_code == 200


# ---- tokens, starting, stopping ------------------------------------------------------------------


def test_a_token_is_asked_for_on_both_sides():
    running = Running(
        [language_model("base", finished_run("v0-tiny"), slots=1, max_waiting=2)], token="s3cret"
    )
    try:
        body = {"model": "base", "prompt": "a", "max_tokens": 2}
        for header, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Bearer s3cret"}, 200),
        ):
            answer = httpx.post(f"{running.url}/v1/completions", json=body, headers=header)
            assert answer.status_code == status
            assert httpx.get(f"{running.url}/v1/models", headers=header).status_code == status
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        with grpc.insecure_channel(running.grpc) as channel:
            stub, request = services.NanodsStub(channel), messages.GenerateRequest(**body)
            for call in (stub.Generate, lambda r, **o: list(stub.GenerateStream(r, **o))):
                with pytest.raises(grpc.RpcError) as error:
                    call(request)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
                assert call(request, metadata=(("authorization", "Bearer s3cret"),))
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            with pytest.raises(grpc.RpcError):
                list(ProtoReflectionDescriptorDatabase(channel).get_services())
    finally:
        running.close()


def test_a_proxy_is_not_asked_for_the_servers_own_calls(monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = Running([language_model("base", finished_run("v0-tiny"), slots=1, max_waiting=2)])
    try:
        assert httpx.get(f"{running.url}/v1/models", trust_env=False).status_code == 200
    finally:
        running.close()


def test_stopping_answers_what_was_accepted_and_refuses_what_is_new():
    model = language_model("base", finished_run("v0-tiny"), slots=2, max_waiting=50)
    slow(model, 0.01)
    running = Running([model], grace=10.0)
    body = {"model": "base", "prompt": "a", "max_tokens": 20, "seed": 1}
    with ThreadPoolExecutor(8) as pool, grpc.insecure_channel(running.grpc) as channel:
        stub = services.NanodsStub(channel)
        stub.Models(messages.ModelsRequest())
        under_way = [
            pool.submit(httpx.post, f"{running.url}/v1/completions", json=body, timeout=20)
            for _ in range(8)
        ]
        wait_until(lambda: len(model.worker.waiting) + len(model.worker.batch) >= 8)
        running.loop.call_soon_threadsafe(running.stop.set)
        time.sleep(0.05)
        with pytest.raises(grpc.RpcError) as error:
            stub.Generate(messages.GenerateRequest(**body))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        with pytest.raises(httpx.TransportError):  # it answers 503 until its port is closed
            while True:
                assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 503
        answers = [future.result() for future in under_way]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    running.close()
    listener = bind("127.0.0.1", running.port)  # the port is free at once
    listener.listen()
    with pytest.raises(UserError, match="stop the program that has it"):
        bind("127.0.0.1", running.port)
    listener.close()


def test_a_host_or_a_port_that_cannot_be_had_is_named_with_its_own_fix(monkeypatch):
    for host in ("no-such-host.invalid", "192.0.2.1"):  # an address of documents alone
        with pytest.raises(UserError, match=rf"--host {host} .*an address of this machine, or"):
            bind(host, 0)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match=r"--port 80: Permission denied; choose a port of 1024"):
        bind("127.0.0.1", 80)


def test_a_taken_grpc_port_is_named_before_a_canary_computes():
    models = {"base": language_model("base", finished_run("v0-tiny"), slots=1, max_waiting=2)}
    monitor = Monitor()
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = Settings(port=0, grpc_port=other.getsockname()[1])
        with pytest.raises(UserError, match=r"--grpc-port \d+: it is taken"):
            asyncio.run(serve(models, settings, monitor, asyncio.Event(), print))
    assert not monitor.canaries and not monitor.threads


def png(pixels):
    """Return a PNG as a data URL: pixels (3, height, width) in 0 .. 1."""
    file = io.BytesIO()
    Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_embeddings_and_search(monkeypatch):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (4, 3, 32, 32)).astype(np.float32) / 255
    mels = draw.random((4, 32, 32), np.float32)
    examples = Examples(np.arange(4), ["a cat", "a dog", "a boat", "a tree"], images, mels=mels)
    held_out = SavedGallery(examples, frozenset())
    monkeypatch.setattr("nanods.serving.models.held_out_examples", lambda *args: held_out)
    run = finished_run("v3-tiny", data="photos")
    running = Running([embedding_model("space", run, max_waiting=50)])
    bomb = base64.b64encode(png_of_zeros(50_000, 50_000, rows=1)).decode()
    bomb = f"data:image/png;base64,{bomb}"
    try:
        openai = pytest.importorskip("openai").OpenAI(base_url=f"{running.url}/v1", api_key="none")
        inputs = ["a cat", "a longer text about a dog", png(images[2])]
        made = openai.embeddings.create(model="space", input=inputs)  # as base64
        plain = openai.embeddings.create(model="space", input=inputs, encoding_format="float")
        read = [read_input("text", text, run.config, run.tokenizer) for text in inputs[:2]]
        read = [("text", read[0]), ("text", read[1]), ("image", torch.from_numpy(images[2]))]
        for a, b, row in zip(made.data, plain.data, embed_one_by_one(run.model, read), strict=True):
            assert a.embedding == pytest.approx(row.tolist(), abs=1e-5)
            assert a.embedding == pytest.approx(b.embedding, abs=1e-7)
        with httpx.Client(base_url=running.url, timeout=20) as client:
            for query in ("a boat", png(images[2])):
                body = {"model": "space", "query": query, "top": 3}
                modality = "text" if query == "a boat" else "image"
                answer = client.post("/v1/search", json=body | {"modality": modality})
                assert answer.status_code == 200, answer.text
                hits = answer.json()["data"]
                assert (hits[0]["index"], hits[0]["caption"]) == (2, "a boat")
                assert len(hits) == 3 and hits[0]["score"] == pytest.approx(1, abs=1e-4)
                assert hits[0]["image"] == png_url(images[2]) and hits[0]["audio"] is None
            for route, body in (
                ("embeddings", {"input": "data:image/png;base64,AAAA"}),
                ("embeddings", {"input": "data:image/png;base64,%%"}),
                ("embeddings", {"input": "data:image/png;base64,\u00e9"}),
                ("embeddings", {"input": ["a"] * 300}),
                ("embeddings", {"input": bomb}),
                ("embeddings", {"input": [png(images[0])] * 3 + [bomb]}),
                ("embeddings", {"input": " "}),
                ("search", {"query": "a", "modality": "text", "top": 1000}),
                ("completions", {"prompt": "a"}),
            ):
                refused = client.post(f"/v1/{route}", json={"model": "space"} | body)
                assert refused.status_code == 400, (route, body, refused.text)
            monkeypatch.setattr("nanods.serving.grpc_server.png_url", lambda image: "a" * 3_000_000)
            body = {"model": "space", "query": "a boat", "modality": "text", "top": 2}
            answer = client.post("/v1/search", json=body)
            assert answer.status_code == 200 and len(answer.content) > 6_000_000, answer.text[:99]
    finally:
        running.close()
