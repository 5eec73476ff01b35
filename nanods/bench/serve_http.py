"""The server as its clients see it, for nanods/bench/serve.py: HTTP, beside gRPC and LitServe.

The servers are processes of their own, each with one thread that computes, and serve models of
random weights. The clients are threads of this process. Milliseconds are wall time, since a client
waits for the network and two processes too; other programs on the machine lengthen them. Tokens per
second are given by wall time, and per CPU second of the server's processes, which other programs
hardly change. The CPU seconds are those of all its threads and workers; they need Linux's /proc.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from nanods.bench.compress_speed import draw_zero_weights
from nanods.bench.serve_engine import CLIENTS, TURNS, draw_requests, medians, percentiles
from nanods.build import build_model
from nanods.config import PRESETS, to_dict
from nanods.data.text import load_text
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.serving.engine import Request
from nanods.training import checkpoint

LOADS = {"one at a time": (1, 8), f"{CLIENTS} clients": (CLIENTS, 96)}
"""Clients, and requests in total."""
START_SECONDS = 120.0


# ---- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    group: int
    """Its process group: the server and its workers."""
    port: int
    grpc: str = ""
    """Its gRPC address."""

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that its processes have used so far."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended meanwhile
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.group:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(*command: str, **pipes) -> Iterator[subprocess.Popen]:
    """Run a Python program with one thread per operation, in a process group that ends with it.

    Raises UserError where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        raise UserError("http, rest and litserve read CPU seconds from /proc: run them on Linux")
    changed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    changed["NANODS_TOKEN"] = ""  # the clients below send none
    process = subprocess.Popen(
        [sys.executable, *command], env=os.environ | changed, process_group=0, **pipes
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            with suppress(ProcessLookupError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def saved_model(preset: str) -> Iterator[Path]:
    """Write a run of a preset with random weights, as if it had been trained; delete it after."""
    config = PRESETS[preset]
    torch.manual_seed(0)
    model = draw_zero_weights(build_model(config))
    state = {"step": 0, "config": to_dict(config), "tokenizer": ByteTokenizer().to_json()}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / preset
        checkpoint.save(run, 0, model.state_dict(), {}, state)
        yield run


@contextmanager
def nanods_server(run: Path) -> Iterator[Server]:
    """Serve a run by the documented command."""
    flags = ("--port", "0", "--grpc-port", "0", "--canary-minutes", "0")
    command = ("-m", "nanods.serving", str(run), *flags)
    with started(*command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.match(r"serving .*:(\d+)  \(gRPC: (.*)\)", line):
                yield Server(process.pid, int(found[1]), found[2])
                return
        raise UserError(f"the server of {run} has not started; its message is above")


@contextmanager
def litserve_server(run: Path) -> Iterator[Server]:
    """Serve a run by LitServe."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ("-m", "nanods.bench.serve_litserve", str(run), str(port))
    with started(*command, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            is_ready = False
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/health")
                is_ready = connection.getresponse().status == 200
            if is_ready:
                yield Server(process.pid, port)
                return
            time.sleep(0.2)
        raise UserError("LitServe has not started; its message is above")


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Pause a server's processes while another is measured: LitServe's worker always polls."""
    os.killpg(server.group, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.group, signal.SIGCONT)


# ---- clients -------------------------------------------------------------------------------------


@dataclass
class Answer:
    tokens: int
    times: list[float]
    """When the request was sent, and when each part of the answer came; wall time."""


def body(model: str, request: Request, stream: bool) -> str:
    """Return a request as JSON, as OpenAI's clients send it."""
    prompt = bytes(request.prompt).decode(errors="ignore")
    fields = {"model": model, "prompt": prompt, "max_tokens": request.max_new_tokens}
    fields |= {"seed": request.seed, "stream": stream}
    return json.dumps(fields | ({"stream_options": {"include_usage": True}} if stream else {}))


def post(connection: http.client.HTTPConnection, path: str, sent: str) -> http.client.HTTPResponse:
    """Send JSON and return the response. Raises RuntimeError unless its status is 200."""
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", path, sent, headers)
        response = connection.getresponse()
    except ConnectionError:  # a server closes connections that have not been used for seconds
        connection.close()
        connection.request("POST", path, sent, headers)
        response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {response.read()[:500]}")
    return response


def stream(model: str, connection: http.client.HTTPConnection, request: Request) -> Answer:
    """Ask for a completion as server-sent events."""
    answer = Answer(0, [time.perf_counter()])
    for line in post(connection, "/v1/completions", body(model, request, stream=True)):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if event["choices"]:
                answer.times.append(time.perf_counter())
            else:
                answer.tokens = event["usage"]["completion_tokens"]
    return answer


def whole(model: str, connection: http.client.HTTPConnection, request: Request) -> Answer:
    """Ask for a completion as a whole."""
    start = time.perf_counter()
    response = post(connection, "/v1/completions", body(model, request, stream=False))
    tokens = json.loads(response.read())["usage"]["completion_tokens"]
    return Answer(tokens, [start, time.perf_counter()])


def serve(
    server: Server,
    requests: Sequence[Request],
    clients: int,
    ask: Callable[[http.client.HTTPConnection, Request], Answer],
) -> dict:
    """Let clients send requests, each its next one when it is answered; return their times."""
    waiting = iter(requests)  # the threads take from it in turns

    def client(_: int) -> list[Answer]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        return [ask(connection, request) for request in waiting]

    cpu, start = server.cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for each in pool.map(client, range(clients)) for answer in each]
    seconds, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
    tokens = sum(answer.tokens for answer in answers)
    if tokens != sum(request.max_new_tokens for request in requests):
        raise RuntimeError(f"{tokens} tokens came, which is not what was asked for")
    row = {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "answer_ms": percentiles([1e3 * (a.times[-1] - a.times[0]) for a in answers]),
    }
    if gaps := [1e3 * (b - a) for answer in answers for a, b in pairwise(answer.times[1:])]:
        row["first_ms"] = percentiles([1e3 * (a.times[1] - a.times[0]) for a in answers])
        row["gap_ms"] = percentiles(gaps)
    return row


def ratios(row: dict, other: dict) -> dict[str, float]:
    """Return how many times as many tokens a row has as another one."""
    units = ("tokens_per_second", "tokens_per_cpu_second")
    return {unit: row[unit] / other[unit] for unit in units}


def print_row(title: str, row: dict) -> None:
    words = [
        f"{row['tokens_per_second']:.0f} tokens/s, {row['tokens_per_cpu_second']:.0f} per CPU s"
    ]
    names = {"first_ms": "first token", "gap_ms": "between tokens", "answer_ms": "whole answer"}
    for key, name in names.items():
        if key in row:
            words.append(f"{name} p50 {row[key]['p50']:.1f} ms, p99 {row[key]['p99']:.1f}")
    print(f"{title}: {'; '.join(words)}", flush=True)


# ---- parts ---------------------------------------------------------------------------------------


def part_http() -> dict:
    """Compare 32 clients with one at a time, by REST, whose answers come as server-sent events."""
    table, requests = {}, draw_requests(96, load_text("pydocs").val)
    for preset in ("v1-tiny", "v2-tiny"):
        turns = {load: [] for load in LOADS}
        with saved_model(preset) as run, nanods_server(run) as server:
            ask = partial(stream, preset)
            serve(server, requests[:1], 1, ask)  # warms up
            for _ in range(TURNS):
                for load, (clients, count) in LOADS.items():
                    turns[load].append(serve(server, requests[:count], clients, ask))
        row = {load: medians(results) for load, results in turns.items()}
        for load in LOADS:
            print_row(f"{preset}, {load}", row[load])
        faster = ratios(row[f"{CLIENTS} clients"], row["one at a time"])
        table[preset] = row | {"times_faster": faster}
        print(f"{preset}: {CLIENTS} clients over one: {faster}", flush=True)
    return table


def part_litserve() -> dict:
    """Compare with LitServe, which batches by its own settings: 32 clients, answers as a whole."""
    try:
        import litserve
    except ImportError:
        print("LitServe is not installed, left out: make setup EXTRAS=peers")
        return {"litserve": None}
    table, requests = {"litserve": litserve.__version__}, draw_requests(96, load_text("pydocs").val)
    for preset in ("v1-tiny", "v2-tiny"):
        ask = partial(whole, preset)
        turns = {"nanods": [], "LitServe": []}
        with saved_model(preset) as run, nanods_server(run) as ours, litserve_server(run) as theirs:
            for server in (ours, theirs):
                serve(server, requests[:1], 1, ask)  # warms up
            for _ in range(TURNS):
                with paused(theirs):
                    turns["nanods"].append(serve(ours, requests, CLIENTS, ask))
                with paused(ours):
                    turns["LitServe"].append(serve(theirs, requests, CLIENTS, ask))
        row = {name: medians(results) for name, results in turns.items()}
        for name in turns:
            print_row(f"{preset}, {name}", row[name])
        table[preset] = row | {"times_faster": ratios(row["nanods"], row["LitServe"])}
    return table


def part_rest() -> dict:
    """Compare a short request by REST and by gRPC: v1-tiny reads 16 tokens and generates one."""
    text, table = load_text("pydocs").val, {}
    request = Request(tuple(text[:16].tolist()), max_new_tokens=1)
    with saved_model("v1-tiny") as run, nanods_server(run) as server:
        calls = {"gRPC": grpc_caller(server, request), "REST": rest_caller(server, request)}
        for name, load in {"1 client": (1, 200, 1), "16 clients": (16, 5, 10)}.items():
            table[name] = compare_calls(calls, *load)
    return table


Caller = Callable[[], Callable[[], object]]
"""Returns, for one client, the call that sends the request and waits for the answer."""


def grpc_caller(server: Server, request: Request) -> Caller:
    import grpc

    from nanods.serving.grpc_server import messages, services

    asked = messages.GenerateRequest(
        model="v1-tiny",
        prompt=bytes(request.prompt).decode(),
        max_tokens=request.max_new_tokens,
        seed=request.seed,
    )

    def client() -> Callable[[], object]:
        stub = services.NanodsStub(grpc.insecure_channel(server.grpc))
        return lambda: stub.Generate(asked, timeout=60)

    return client


def rest_caller(server: Server, request: Request) -> Caller:
    def client() -> Callable[[], object]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        return partial(whole, "v1-tiny", connection, request)

    return client


def compare_calls(callers: dict[str, Caller], clients: int, turns: int, each: int) -> dict:
    """Let clients call `each` times by one way, then by the other, and so on.

    Returns the percentiles of a call's milliseconds by each way, and by how much p50 differs.
    """
    calls = {name: [make() for _ in range(clients)] for name, make in callers.items()}
    milliseconds = {name: [] for name in calls}

    def client(call: Callable[[], object]) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(each):
            call()
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(times)]

    with ThreadPoolExecutor(clients) as pool:
        for turn in range(turns + 1):  # the first one connects and warms up
            for name in calls:
                times = [ms for each_client in pool.map(client, calls[name]) for ms in each_client]
                milliseconds[name] += times if turn else []
    row = {name: percentiles(times) for name, times in milliseconds.items()}
    row["p50_difference"] = row["REST"]["p50"] - row["gRPC"]["p50"]
    words = ", ".join(f"{name} p50 {row[name]['p50']:.1f} ms" for name in calls)
    print(f"clients: {clients}; {words}, difference {row['p50_difference']:.1f} ms", flush=True)
    return row
