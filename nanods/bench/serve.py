"""What batching gains in serving: results/serve.json.

    python -m nanods.bench.serve                   all parts; `make bench-serve`
    python -m nanods.bench.serve --only engine     one part

    engine       v1-tiny and v2-tiny generate for 32 clients: continuous batching against one
                 request at a time and against static batches; times to the first token and between
                 tokens
    embedder     v3-tiny embeds: batches against single inputs, by modality; mixed inputs in queues
                 by modality and length against one queue that pads to the longest

One thread, random weights (the time does not depend on what a model has learnt), medians of TURNS
turns in which the compared ways alternate. Seconds are CPU seconds of the thread, so other programs
on the machine do not count.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch

from nanods import plots
from nanods.bench.compress_speed import draw_zero_weights
from nanods.bench.runs import describe_machine, measure_parts
from nanods.build import build_model
from nanods.config import PRESETS
from nanods.data.text import load_text
from nanods.errors import run
from nanods.flags import parse_args
from nanods.gpt import GPT
from nanods.multimodal import N_MELS, Multimodal
from nanods.serving.embedder import Embedder, Input, embed_batch, embed_one_by_one
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


@dataclass(frozen=True)
class Args:
    only: Literal["all", "engine", "embedder"] = "all"
    """One part; the results of the other parts stay as they are."""
    results: Path = Path("results")
    """Where to write the table and the picture."""


# ---- generating ----------------------------------------------------------------------------------


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


def chunk_ms(engine: Engine, text: np.ndarray) -> float:
    """Return the milliseconds that reading one chunk of a prompt takes, alone."""
    times = []
    for _ in range(9):
        engine.submit(Request(tuple(text[: engine.chunk + 1].tolist()), 1), lambda token: None)
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
        row["chunk_ms"] = chunk_ms(engine, text)
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


# ---- embedding -----------------------------------------------------------------------------------


def draw_inputs(model: Multimodal, names: Sequence[str], count: int) -> list[Input]:
    """Return random inputs of the modalities, in turns. Of ten texts one has the full length, the
    others 4 to 16 tokens: captions that people write, and now and then a paragraph."""
    draw, config = torch.Generator().manual_seed(0), model.config
    longest = model.tokens_per_example()["text"]
    inputs = []
    for i in range(count):
        name = names[i % len(names)]
        if name == "text":
            n = (
                longest
                if i // len(names) % 10 == 9
                else int(torch.randint(4, 17, (), generator=draw))
            )
            x = torch.randint(model.trunk.vocab_size, (n,), generator=draw)
        elif name == "image":
            x = torch.rand(3, config.image_size, config.image_size, generator=draw)
        else:
            x = torch.randn(N_MELS, config.frames, generator=draw)
        inputs.append((name, x))
    return inputs


def in_one_queue(model: Multimodal, inputs: Sequence[Input], size: int = 32) -> torch.Tensor:
    """Embed inputs in batches of `size` in order of arrival, each padded to its longest text.

    The inputs of a modality go through the model together: that much any server does.
    """
    parts = []
    for start in range(0, len(inputs), size):
        batch = inputs[start : start + size]
        made = [None] * len(batch)
        for name in {name for name, _ in batch}:
            rows = [i for i, (other, _) in enumerate(batch) if other == name]
            for i, embedding in zip(
                rows, embed_batch(model, [batch[i] for i in rows]), strict=True
            ):
                made[i] = embedding
        parts.append(torch.stack(made))
    return torch.cat(parts)


def in_queues(model: Multimodal, inputs: Sequence[Input]) -> torch.Tensor:
    """Embed inputs that all wait already by the server's queues."""
    embedder = Embedder(model)
    answers = [embedder.submit([each]) for each in inputs]
    embedder.close()
    embedder.run()
    return torch.cat([answer.result() for answer in answers])


def part_embedder() -> dict:
    """Compare ways to embed many inputs."""
    torch.manual_seed(0)
    model: Multimodal = draw_zero_weights(build_model(PRESETS["v3-tiny"]))
    table = {}
    all_names = tuple(model.modalities)
    for title, names in {**{name: (name,) for name in all_names}, "mixed": all_names}.items():
        inputs = draw_inputs(model, names, 96 if title == "mixed" else 64)
        ways: dict[str, Callable] = {"singles": embed_one_by_one, "queues": in_queues}
        ways["one padded queue"] = in_one_queue
        seconds, made = {way: [] for way in ways}, {}
        for _ in range(TURNS + 1):  # the first turn warms up
            for way, embed in ways.items():
                start = time.thread_time()
                made[way] = embed(model, inputs)
                seconds[way].append(time.thread_time() - start)
        rates = {way: len(inputs) / median(times[1:]) for way, times in seconds.items()}
        error = (made["queues"] - made["singles"]).abs().max().item()
        table[title] = {
            "items_per_second": rates,
            "times_faster": {w: rates["queues"] / rates[w] for w in ways if w != "queues"},
            "largest_difference_from_singles": error,
        }
        words = ", ".join(f"{way} {rate:.0f}" for way, rate in rates.items())
        print(f"{title}: items/s {words}; largest difference {error:.1e}", flush=True)
    return table


# ---- all parts -----------------------------------------------------------------------------------


def draw(table: dict, args: Args) -> None:
    """Draw what has been measured."""
    if "engine" in table:
        panels = {
            f"{preset}, {CLIENTS} clients, one thread": {
                way: row[way]["tokens_per_second"] for way in WAYS
            }
            for preset, row in table["engine"].items()
        }
        plots.save(plots.bars(panels, "tokens per second"), args.results / "serve.png")


def main() -> None:
    args = parse_args(Args, __doc__)
    torch.set_num_threads(1)
    parts = {"engine": part_engine, "embedder": part_embedder}
    machine = describe_machine("fp32")
    draw(measure_parts(args.results / "serve.json", parts, args.only, lambda: machine), args)


if __name__ == "__main__":
    run(main)
