"""How work ends: SIGTERM under load, clients that are killed, and slow ones. Most tests are slow,
since they start processes."""
# ruff: noqa: E402

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

for name in ("grpc_tools", "grpc_health", "grpc_reflection", "fastapi", "uvicorn", "httpx"):
    pytest.importorskip(name, reason="the extra serve is not installed")

import grpc
import httpx

from nanods.serving import server as module
from nanods.serving.grpc_server import messages, services
from nanods.serving.models import language_model
from tests.serving.test_server import Running, finished_run, is_idle, slow, wait_until

ROOT = Path(__file__).parents[2]
REQUESTS, SEEDS, CLIENTS = 1000, 20, 40


# ---- SIGTERM -------------------------------------------------------------------------------------


def start(port=0):
    """Start the server of the run v1-tiny in a process of its own -> (process, its URL)."""
    process = subprocess.Popen(
        f"{sys.executable} -m nanods.serving v1-tiny --port {port} --grpc-port 0 --slots 8".split(),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if match := re.match(r"serving    (http://\S+)", line):
            return process, match[1]
    raise AssertionError(process.stderr.read())


def ask(client, seed, is_stream):
    """Send a request -> (what happened, the text)."""
    body = {"model": "v1-tiny", "prompt": "1 times", "max_tokens": 16, "seed": seed}
    if not is_stream:
        answer = client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return f"refused {answer.status_code}", answer.json()["error"]["message"]
        return "answered", answer.json()["choices"][0]["text"]
    text = ""
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return f"refused {answer.status_code}", json.loads(answer.read())["error"]["message"]
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return "answered", text
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return "ended by an error", text
                text += event["choices"][0]["text"]
    return "ended without [DONE]", text


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to send")
def test_sigterm_under_load_answers_nothing_wrongly_and_loses_nothing_silently(train_tiny):
    """1,000 requests of 40 clients, half of them streams. SIGTERM comes when about 300 are
    answered; the others are under way, or still to arrive."""
    code, _, error = train_tiny("v1-tiny", "--steps", 1)
    assert code == 0, error
    process, url = start()
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            alone = [ask(client, seed, False)[1] for seed in range(SEEDS)]
        assert len(set(alone)) > 1
        enough, made = threading.Event(), []

        def send(n):
            with httpx.Client(base_url=url, timeout=60) as client:
                for i in range(n, REQUESTS, CLIENTS):
                    try:
                        kind, text = ask(client, i % SEEDS, is_stream=i % 2 == 1)
                    except httpx.TransportError as error:  # refused, reset or cut off
                        kind, text = f"lost with {type(error).__name__}", ""
                    made.append((i, kind, text))
                    if len(made) >= 300:
                        enough.set()

        with ThreadPoolExecutor(CLIENTS) as pool:
            sent = [pool.submit(send, n) for n in range(CLIENTS)]
            assert enough.wait(120)
            process.send_signal(signal.SIGTERM)
            for future in sent:
                future.result(120)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0 and out.endswith("stopped\n") and "Traceback" not in error
        process, again = start(url.rpartition(":")[2])
        assert again == url
        with httpx.Client(base_url=url, timeout=60) as client:
            assert [ask(client, seed, True)[1] for seed in range(SEEDS)] == alone
    finally:
        process.kill()
    print(Counter(kind for _, kind, _ in made))
    assert sorted(i for i, _, _ in made) == list(range(REQUESTS))
    for i, kind, text in made:
        if kind == "answered":
            assert text == alone[i % SEEDS]
        elif kind.startswith("ended"):
            assert alone[i % SEEDS].startswith(text)
    kinds = {kind for _, kind, _ in made}
    assert "answered" in kinds and kinds - {"answered"}, "SIGTERM came too late"


# ---- clients that leave --------------------------------------------------------------------------

KILLED = """
import httpx, sys
body = {"model": "base", "prompt": "a", "max_tokens": 4000, "stream": sys.argv[2] == "True"}
with httpx.stream("POST", sys.argv[1] + "/v1/completions", json=body, timeout=60) as answer:
    for _ in answer.iter_lines():
        print("reading", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "kill a stream", "cancel", "cancel a stream"])
def test_no_step_begins_50_ms_after_a_client_has_gone(way):
    """The best of five tries, since other programs may delay any one of them."""
    model = language_model("base", finished_run("v0-tiny"), slots=1, max_waiting=2)
    slow(model, 0.005)
    steps, real = [], model.finished.model.forward

    def forward(*args, **options):
        steps.append(time.monotonic())
        return real(*args, **options)

    model.finished.model.forward = forward
    running = Running([model])
    request = messages.GenerateRequest(model="base", prompt="a", max_tokens=4000)
    late = []
    try:
        for _ in range(5):
            if way.startswith("kill"):
                client = subprocess.Popen(
                    [sys.executable, "-c", KILLED, running.url, str("stream" in way)],
                    stdout=subprocess.PIPE,
                )
                leave = client.kill
            else:
                channel = grpc.insecure_channel(running.grpc)
                stub = services.NanodsStub(channel)
                call = stub.GenerateStream if "stream" in way else stub.Generate.future
                leave = call(request).cancel
            wait_until(lambda: model.worker.batch, 60)
            time.sleep(0.1)
            gone = time.monotonic()
            leave()
            wait_until(lambda: is_idle(model.worker))
            late.append(steps[-1] - gone)
            if way.startswith("kill"):
                client.communicate()
            else:
                channel.close()
    finally:
        running.close()
    print(way, [f"{1000 * seconds:.1f} ms" for seconds in late])
    assert min(late) < 0.05 and model.worker.totals.cancelled == 5


# ---- slow clients --------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """A server that waits for its clients for half a second."""
    monkeypatch.setattr(module, "CLIENT_SECONDS", 0.5)
    running = Running([language_model("base", finished_run("v0-tiny"), slots=2, max_waiting=9)])
    yield running
    running.close()


BODY = json.dumps({"model": "base", "prompt": "a", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
HEAD += b"Content-Length: %d\r\n\r\n" % len(BODY)


def test_a_client_that_sends_too_slowly_is_cut_off(impatient):
    """Nothing at all, a head byte by byte, a body byte by byte, and a second request likewise."""
    for at_once, slowly in ((b"", b""), (b"", HEAD), (HEAD, BODY), (HEAD + BODY, HEAD)):
        with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as connection:
            connection.sendall(at_once)
            begun, answer = time.monotonic(), b""
            if at_once.endswith(BODY):
                answer = connection.recv(10_000)
                assert answer.startswith(b"HTTP/1.1 200")
            with pytest.raises(OSError):  # the server has closed the connection
                for byte in slowly or b" " * 100:
                    if slowly:
                        connection.sendall(bytes([byte]))
                    time.sleep(0.05)
                    connection.settimeout(0.001)
                    try:
                        if connection.recv(100) == b"":
                            raise ConnectionResetError
                    except TimeoutError:
                        pass
            assert time.monotonic() - begun < 8
    assert httpx.get(f"{impatient.url}/healthz").status_code == 200


def test_a_client_that_does_not_read_is_cut_off(impatient, monkeypatch):
    """It asks for the page 400 times, and reads none of the answers, 8 MB."""
    closed, real = threading.Event(), module.Connection.connection_lost
    monkeypatch.setattr(
        module.Connection, "connection_lost", lambda *args: (real(*args), closed.set())
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", impatient.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 400)
        assert closed.wait(30)
