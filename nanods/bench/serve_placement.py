"""How long a model takes whose experts are INT8 beside an fp32 trunk: a part of
nanods/bench/serve.py.

The placement is that of nanods/serving/placement.py, with both parts on the CPU. So it shows what
the format of the experts costs or gains, and not what moving activations to a GPU costs.
"""

import copy

import torch

from nanods.bench.compress_speed import (
    compare,
    decoding_step,
    describe_processor,
    draw_zero_weights,
    read,
)
from nanods.config import V2_MOE
from nanods.gpt import GPT, GPTConfig
from nanods.serving.placement import parse_rules, place

SIZE = {"n_layer": 4, "n_head": 8, "n_embd": 512, "context_length": 512, "vocab_size": 256}
RULES = ("*=cpu:fp32", "blocks.*.mlp=cpu:int8")


def part_placement() -> dict:
    """Compare reading a prompt of 128 tokens, and decoding steps of 1 and of 32 rows."""
    model = draw_zero_weights(GPT(GPTConfig(**SIZE, moe=V2_MOE["tiny"])))
    placed = copy.deepcopy(model)
    place(placed, parse_rules(RULES))
    models = {"fp32": model, "INT8 experts": placed}
    tokens = torch.randint(SIZE["vocab_size"], (32, 128))
    table = {"kernel": describe_processor()["kernel"]}
    table["bytes"] = {
        name: sum(t.nbytes for t in (*each.parameters(), *each.buffers()))
        for name, each in models.items()
    }
    calls = {name: lambda each=each: read(each, tokens[:1]) for name, each in models.items()}
    table["reading 128 tokens"] = compare("reading 128 tokens", calls)
    for rows in (1, 32):
        title = f"a decoding step of {rows} row{'s' if rows > 1 else ''}"
        calls = {name: decoding_step(each, tokens[:rows]) for name, each in models.items()}
        table[title] = compare(title, calls)
    return table
