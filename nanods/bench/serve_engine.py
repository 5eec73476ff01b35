"""How fast the engine generates for many clients, by how it batches: a part of
nanods/bench/serve.py. Also the requests and the statistics that other parts share.

The engine is stepped in this process, so nothing is measured but the engine: seconds are CPU
seconds of its thread.
"""

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import numpy as np
import torch

from nanods.bench.compress_speed import draw_zero_weights
from nanods.build import build_model
from nanods.config import PRESETS
from nanods.data.text import load_text
from nanods.gpt import GPT
from nanods.serving.engine import Engine, Request, Token

TURNS = 3
CLIENTS = 32
PROMPT, ANSWER = (16, 128), (16, 96)  # tokens, drawn evenly between these
WAYS = {
    "one at a time": (1, 12, False),
    "static batches": (CLIENTS, 96, True),
    "continuous batching": (CLIENTS, 96, False),
}
"""Clients, requests in total, static. A client sends its next request when its last one is
answered; if static, when the whole batch has finished."""


def draw_requests(count: int, text: np.ndarray) -> list[Request]:
    """Return requests with prompts from a text."""
    draw = np.random.default_rng(0)
    requests = []
    for seed in range(count):
        length, answer = (int(draw.integers(low, high + 1)) for low, high in (PROMPT, ANSWER))
        start = int(draw.integers(len(text) - length))
        prompt = tuple(text[start : start + length].tolist())
        requests.append(Request(prompt, max_new_tokens=answer, seed=seed))
    return requests


def serve(engine: Engine, requests: Sequence[Request], clients: int, static: bool) -> dict:
    """Serve requests, of which `clients` are under way, and return the time that it took.

    `static`: the next ones come when all that are under way are finished.
    """
    waiting, under_way, now = deque(enumerate(requests)), set(), time.thread_time
    sent, received = {}, {number: [] for number in range(len(requests))}
    start = now()
    while waiting or under_way:
        while waiting and len(under_way) < clients and not (static and engine.has_work()):
            batch = [waiting.popleft() for _ in range(min(clients - len(under_way), len(waiting)))]
            for number, request in batch:

                def deliver(token: Token, number: int = number) -> None:
                    received[number].append(now())
                    if token.finish:
                        under_way.discard(number)

                under_way.add(number)
                sent[number] = now()
                engine.submit(request, deliver)
        engine.step()
    seconds = now() - start
    first = [1e3 * (times[0] - sent[number]) for number, times in received.items()]
    gaps = [1e3 * (b - a) for times in received.values() for a, b in pairwise(times)]
    return {
        "tokens_per_second": sum(map(len, received.values())) / seconds,
        "first_token_ms": percentiles(first),
        "gap_ms": percentiles(gaps),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 99)}


def reading_ms(engine: Engine, text: np.ndarray, tokens: int) -> float:
    """Return the milliseconds in which the engine reads a prompt of `tokens` tokens, alone."""
    times = []
    for _ in range(9):
        # The last token of a prompt is read when the next one is drawn.
        engine.submit(Request(tuple(text[: tokens + 1].tolist()), 1), lambda token: None)
        engine.drop_cancelled()
        start = time.thread_time()
        engine.read()
        times.append(1e3 * (time.thread_time() - start))
        while engine.has_work():
            engine.step()
    return median(times)


def part_engine() -> dict:
    """Compare three ways to generate for many clients."""
    table, text = {}, load_text("pydocs").val
    requests = draw_requests(96, text)
    for preset in ("v1-tiny", "v2-tiny"):
        torch.manual_seed(0)
        model: GPT = draw_zero_weights(build_model(PRESETS[preset]))
        engine = Engine(model, bytes, slots=CLIENTS)
        turns = {way: [] for way in WAYS}
        for _ in range(TURNS):
            for way, (clients, count, static) in WAYS.items():
                turns[way].append(serve(engine, requests[:count], clients, static))
        row = {way: medians(results) for way, results in turns.items()}
        row["reading_ms"] = {n: reading_ms(engine, text, n) for n in (16, 64, engine.chunk)}
        speeds = {way: row[way]["tokens_per_second"] for way in WAYS}
        fastest = speeds["continuous batching"]
        row["times_faster"] = {way: fastest / x for way, x in speeds.items() if x != fastest}
        table[preset] = row
        for way in WAYS:
            first, gap = row[way]["first_token_ms"], row[way]["gap_ms"]
            print(
                f"{preset}, {way}: {speeds[way]:.0f} tokens/s, first token p50 {first['p50']:.0f} "
                f"ms, p99 {first['p99']:.0f}; between tokens p50 {gap['p50']:.1f} ms, "
                f"p99 {gap['p99']:.1f}",
                flush=True,
            )
    return table


def medians(tables: list[dict]) -> dict:
    """Return the medians of tables of equal form, number by number."""
    first = tables[0]
    if not isinstance(first, dict):
        return median(tables)
    return {name: medians([table[name] for table in tables]) for name in first}
