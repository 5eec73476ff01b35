"""The models that grow from a bigram table differ in the one idea that each adds."""

import json
from itertools import pairwise

import pytest
import torch

from nanods.bench import from_bigram
from nanods.bench.results_rows import ROOT

SEES_THE_PAST = {"bigram table": False, "embedding, MLP": False}


def models():
    torch.manual_seed(0)
    return {name: step.make() for name, step in from_bigram.STEPS.items()}


@torch.no_grad()
def changes(model, tokens, others):
    """Return which positions have other logits for other tokens."""
    return (model(tokens) - model(others)).abs().amax(-1)[0] > 1e-6


def randomise(model):
    """Replace the zeros that a model starts with: they would hide what it reads."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("name", from_bigram.STEPS)
def test_no_model_reads_the_future_and_all_but_two_read_the_past(name):
    model = models()[name]
    randomise(model)
    tokens = torch.randint(256, (1, 9))
    others = tokens.clone()
    others[0, 4] = (others[0, 4] + 1) % 256
    changed = changes(model, tokens, others)
    assert not changed[:4].any() and changed[4]
    assert changed[5:].all() == SEES_THE_PAST.get(name, True)


@pytest.mark.parametrize("name", from_bigram.STEPS)
def test_from_rope_on_the_order_of_the_past_makes_a_difference(name):
    model = models()[name]
    randomise(model)
    tokens = torch.randint(256, (1, 9))
    swapped = tokens[:, [1, 0, *range(2, 9)]]
    order = list(from_bigram.STEPS)
    has_positions = order.index(name) >= order.index("positions (RoPE)")
    assert changes(model, tokens, swapped)[-1] == has_positions


def test_training_lowers_the_loss_and_repeats_itself():
    step = from_bigram.STEPS["4 heads"]
    first, second = ([loss for _, loss in from_bigram.train(step, 8, seed=3)] for _ in range(2))
    assert first == second and first[-1] < first[0] - 0.2


def test_a_model_writes_the_prompt_and_then_as_many_bytes_as_asked():
    text = from_bigram.write(models()["bigram table"], "ab", length=7)
    assert text.startswith("ab") and len(text) <= 9


def test_the_stored_result_is_of_these_models_and_each_step_but_the_first_lowers_the_loss():
    stored = json.loads((ROOT / "results" / "from_bigram.json").read_text(encoding="utf-8"))
    assert list(stored["models"]) == list(from_bigram.STEPS)
    built = models()
    for name, model in stored["models"].items():
        assert model["parameters"] == sum(p.numel() for p in built[name].parameters())
    losses = [max(model["val_bpb"]) for model in stored["models"].values()]
    assert all(after < before for before, after in pairwise(losses[1:]))
