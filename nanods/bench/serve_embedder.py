"""How many inputs v3-tiny embeds in a second, by how they are batched: a part of
nanods/bench/serve.py.

Two servers without queues by modality are measured beside ours. Both take the inputs in batches of
32 in order of arrival:

    one padded queue    a pass for each modality of the batch, texts padded to its longest text
    one padded pass     a single pass through the shared trunk, which all modalities have in common:
                        every input is padded to the longest of the batch, images and sounds too
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.nn.utils.rnn import pad_sequence

from nanods.bench.compress_speed import draw_zero_weights
from nanods.build import build_model
from nanods.config import PRESETS
from nanods.gpt import rms_norm
from nanods.multimodal import N_MELS, Multimodal
from nanods.serving.embedder import (
    Embedder,
    Input,
    count_tokens,
    embed_batch,
    embed_one_by_one,
)

TURNS = 7
BATCH = 32  # inputs of a batch of one queue


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


def in_one_queue(model: Multimodal, inputs: Sequence[Input], size: int = BATCH) -> torch.Tensor:
    """Embed inputs in batches of `size` in order of arrival, each padded to its longest text.

    The inputs of a modality go through the model together: that much any server does.
    """
    parts = []
    for start in range(0, len(inputs), size):
        batch = inputs[start : start + size]
        made = [None] * len(batch)
        for name in {name for name, _ in batch}:
            rows = [i for i, (other, _) in enumerate(batch) if other == name]
            embeddings, _ = embed_batch(model, [batch[i] for i in rows])
            for i, embedding in zip(rows, embeddings, strict=True):
                made[i] = embedding
        parts.append(torch.stack(made))
    return torch.cat(parts)


def in_one_pass(model: Multimodal, inputs: Sequence[Input], size: int = BATCH) -> torch.Tensor:
    """Embed inputs in batches of `size` in order of arrival, each batch in one pass through the
    shared trunk. Every input is padded to the longest of its batch, of whatever modality."""
    batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    return torch.cat([embed_mixed(model, batch) for batch in batches])


@torch.no_grad()
def embed_mixed(model: Multimodal, batch: Sequence[Input]) -> torch.Tensor:
    """Embed B inputs of any modality in one pass -> (B, M)."""
    B, C = len(batch), model.trunk.n_embd
    T = max(count_tokens(model, name, x) for name, x in batch)
    tokens, valid = torch.zeros(B, T, C), torch.zeros(B, T, dtype=torch.bool)
    rope = tuple(torch.zeros(B, 1, T, C // model.trunk.n_head // 2) for _ in range(2))
    rows_of = {}
    for name in {name for name, _ in batch}:
        rows = rows_of[name] = [i for i, (other, _) in enumerate(batch) if other == name]
        x = pad_sequence([batch[i][1] for i in rows], batch_first=True, padding_value=-1)
        own, own_rope, own_valid = model.modalities[name].prepare(x)
        t = own.size(1)
        tokens[rows, :t] = own
        valid[rows, :t] = True if own_valid is None else own_valid
        for table, own_table in zip(rope, own_rope, strict=True):
            table[rows, :, :t] = own_table
    for block in model.trunks["shared"]:
        tokens, _ = block(tokens, None, rope, valid=valid)
    embeddings = torch.empty(B, model.config.width)
    for name, rows in rows_of.items():
        embeddings[rows] = model.modalities[name].project(rms_norm(tokens[rows]), valid[rows])
    return embeddings


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
        ways |= {"one padded queue": in_one_queue, "one padded pass": in_one_pass}
        seconds, made = {way: [] for way in ways}, {}
        for _ in range(TURNS + 1):  # the first turn warms up
            for way, embed in ways.items():
                start = time.thread_time()
                made[way] = embed(model, inputs)
                seconds[way].append(time.thread_time() - start)
        rates = {way: len(inputs) / median(times[1:]) for way, times in seconds.items()}
        error = max((made[way] - made["singles"]).abs().max().item() for way in ways)
        table[title] = {
            "items_per_second": rates,
            "times_faster": {w: rates["queues"] / rates[w] for w in ways if w != "queues"},
            "largest_difference_from_singles": error,
        }
        words = ", ".join(f"{way} {rate:.0f}" for way, rate in rates.items())
        print(f"{title}: items/s {words}; largest difference {error:.1e}", flush=True)
    return table
