"""The bench of serving: every way serves every request, and the times belong to the tokens."""

import numpy as np
import pytest
import torch

from nanods.bench import serve
from nanods.build import build_model
from nanods.config import PRESETS
from nanods.serving.embedder import embed_one_by_one
from nanods.serving.engine import Engine
from tests.test_gpt import DENSE, model_of


@pytest.mark.parametrize(("clients", "static"), [(1, False), (3, False), (3, True)])
def test_every_request_is_served(clients, static):
    engine = Engine(model_of(DENSE), bytes, slots=3)
    requests = serve.draw_requests(7, np.arange(2000) % 50)
    most, submit = [], engine.submit

    def watch(request, deliver):
        task = submit(request, deliver)
        most.append(len(engine.waiting) + len(engine.reading) + len(engine.batch))
        return task

    engine.submit = watch
    row = serve.serve(engine, requests, clients, static)
    assert engine.totals.finished == 7 and max(most) == clients
    assert engine.totals.new_tokens == sum(request.max_new_tokens for request in requests)
    assert 0 < row["gap_ms"]["p50"] <= row["gap_ms"]["p99"]
    if static:  # a group begins when the one before has ended
        assert most == [1, 2, 3, 1, 2, 3, 1]


def test_prompts_and_answers_have_the_lengths_that_are_stated():
    requests = serve.draw_requests(50, np.arange(2000) % 50)
    assert {len(r.prompt) for r in requests} <= set(range(serve.PROMPT[0], serve.PROMPT[1] + 1))
    assert {r.max_new_tokens for r in requests} <= set(range(16, 97))
    assert requests == serve.draw_requests(50, np.arange(2000) % 50)


def test_all_ways_embed_the_same():
    torch.manual_seed(0)
    model = build_model(PRESETS["v3-tiny"]).eval()
    inputs = serve.draw_inputs(model, ("text", "image", "audio"), 33)
    lengths = [len(x) for name, x in inputs if name == "text"]
    assert lengths[9] == max(lengths) == model.tokens_per_example()["text"]
    reference = embed_one_by_one(model, inputs)
    for embed in (serve.in_one_queue, serve.in_queues):
        assert (embed(model, inputs) - reference).abs().max() < 1e-5


def test_medians_are_taken_number_by_number():
    tables = [{"a": {"b": x}, "c": 10 * x} for x in (3, 1, 2)]
    assert serve.medians(tables) == {"a": {"b": 2}, "c": 20}
