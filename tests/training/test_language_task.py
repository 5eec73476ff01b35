"""Language modelling: batches by step, and a validation that is pure cross-entropy over every
token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nanods.build import build_model
from nanods.config import PRESETS
from nanods.data.text import TextData
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.training.language_task import LanguageTask, cross_entropy
from nanods.training.task import accumulate_gradients


def task_of(train=200, val=67, T=8, seed=0):
    config = PRESETS["v0-tiny"]
    config = replace(config, model=replace(config.model, context_length=T), batch_size=3, seed=seed)
    random = np.random.default_rng(0)
    train, val = (random.integers(0, 256, n).astype(np.uint16) for n in (train, val))
    return LanguageTask(
        config,
        torch.device("cpu"),
        TextData("x", "hash", train, val, ByteTokenizer(), len(val)),
    )


class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(
            torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        )

    def forward(self, tokens):
        return self.table[tokens], []


def test_a_batch_depends_on_seed_and_step_alone():
    a, b = task_of(), task_of()
    later = [a.batch(step) for step in range(4)]
    assert torch.equal(b.batch(3), later[3])
    assert not torch.equal(later[2], later[3])
    assert not torch.equal(task_of(seed=1).batch(3), later[3])


def test_every_window_of_the_text_can_be_sampled():
    task = task_of(train=12)  # T + 1 = 9: four windows
    text = torch.from_numpy(task.data.train.astype(np.int64))
    seen = {tuple(row.tolist()) for step in range(60) for row in task.batch(step)}
    assert seen == {tuple(text[i : i + 9].tolist()) for i in range(4)}


@pytest.mark.parametrize("val", [9, 10, 16, 17, 67, 8 * 70 + 3])
def test_validation_counts_each_token_once(val):
    task, model = task_of(val=val), Bigram()
    tokens = torch.from_numpy(task.data.val.astype(np.int64))
    expected = nn.functional.cross_entropy(model.table[tokens[:-1]], tokens[1:]).item()
    got = task.evaluate(model)
    assert got["val_loss"] == pytest.approx(expected, rel=1e-12)
    assert got["val_bpb"] == pytest.approx(expected / math.log(2), rel=1e-12)


def test_the_loss_is_taken_in_at_least_fp32():
    assert (
        cross_entropy(
            torch.zeros(1, 2, 4, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.long)
        ).dtype
        == torch.float32
    )
    assert (
        cross_entropy(
            torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.long)
        ).dtype
        == torch.float64
    )


def test_a_text_shorter_than_a_context_is_refused():
    with pytest.raises(UserError, match="context"):
        task_of(val=8)


@pytest.mark.parametrize("preset", ["v0-tiny", "v1-tiny"])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(preset):
    task = task_of(T=32)
    model_config = replace(PRESETS[preset].model, n_layer=2, n_head=2, n_embd=16, context_length=32)
    torch.manual_seed(0)
    model = build_model(replace(PRESETS[preset], model=model_config)).double()
    gradients = {}
    for size in (3, 1):
        model.zero_grad()
        accumulate_gradients(task, model, task.batch(0), size)
        gradients[size] = torch.cat([p.grad.flatten() for p in model.parameters()])
    difference = (gradients[3] - gradients[1]).abs().max() / gradients[3].abs().max()
    assert difference < 3e-15
