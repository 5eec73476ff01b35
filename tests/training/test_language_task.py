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
from nanods.training import language_task
from nanods.training.language_task import LanguageTask, cross_entropy, eval_batch_size
from nanods.training.task import accumulate_gradients


def task_of(train=200, val=67, T=8, seed=0, **flags):
    config = replace(PRESETS["v0-tiny"], batch_size=3, seed=seed, **flags)
    config = replace(config, model=replace(config.model, context_length=T))
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


def test_short_windows_hold_the_tokens_of_the_long_ones_until_their_share_of_the_steps_is_over():
    long, short = task_of(steps=10), task_of(steps=10, short_context=0.3, short_parts=4)
    for step in range(10):
        whole, batch = long.batch(step), short.batch(step)
        if step >= 3:
            assert torch.equal(whole, batch)
            continue
        assert batch.shape == (12, 3)
        assert torch.equal(batch[:, :-1].reshape(3, 8), whole[:, :-1])
        assert torch.equal(batch[:, 1:].reshape(3, 8), whole[:, 1:])
        assert torch.equal(short.batch(step, slice(1, 2)), batch[4:8])


def test_a_micro_batch_has_as_many_tokens_in_short_windows():
    short, model = task_of(steps=10, short_context=0.5, short_parts=4), Bigram()
    batch = short.batch(0)
    one = short.micro_batches(model, batch, 3)
    several = short.micro_batches(model, batch, 1)
    assert [part.windows.shape for part in one] == [(12, 3)]
    assert [part.windows.shape for part in several] == [(4, 3)] * 3
    whole = cross_entropy(model(batch[:, :-1])[0], batch[:, 1:])
    losses = [short.loss(model, part)[0] for part in several]
    torch.testing.assert_close(sum(losses), whole.double(), check_dtype=False)


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


@pytest.mark.parametrize(("val", "read"), [(800, 48), (8 * 6 + 1, 48), (8 * 6 + 4, 48), (51, 50)])
def test_an_evaluation_reads_at_most_eval_tokens_spread_evenly(val, read):
    task, model = task_of(val=val, eval_tokens=read), Bigram()
    tokens = torch.from_numpy(task.data.val.astype(np.int64))
    count = (val - 1) // 8  # full windows
    if val - 1 <= read:
        windows = [tokens]
    else:
        windows = [tokens[8 * (i * count // 6) :][:9] for i in range(6)]
        assert val < 100 or 8 * (5 * count // 6) > 0.8 * val
    losses = [nn.functional.cross_entropy(model.table[w[:-1]], w[1:]).item() for w in windows]
    assert task.evaluate(model)["val_loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    words = task.describe_data().split("\n")[1]
    if val - 1 <= read:
        assert words.endswith("reads all of it")
    else:
        assert f"reads {read} of its {val} tokens" in words and "--eval-tokens" in words


@pytest.mark.parametrize(("budget", "batch"), [(1, 1), (8 * 256 * 4 * 5, 5), (1 << 40, 32)])
def test_the_logits_of_an_evaluation_stay_within_their_budget(monkeypatch, budget, batch):
    monkeypatch.setattr(language_task, "EVAL_LOGIT_BYTES", budget)
    task, model, sizes = task_of(val=8 * 70 + 3), Bigram(), []
    expected = task_of(val=8 * 70 + 3).evaluate(model)
    model.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    assert task.evaluate(model) == pytest.approx(expected, rel=1e-12)
    assert max(sizes) == batch and sum(sizes) == 71
    sizes.clear()
    assert task.evaluation_seconds(model) > 0 and sizes == [batch, batch]


def test_the_presets_evaluate_as_many_windows_at_a_time_as_their_budget_allows():
    sizes = {name: eval_batch_size(PRESETS[name]) for name in ("v0-tiny", "v0-small", "v1-base")}
    assert sizes == {"v0-tiny": 32, "v0-small": 1, "v1-base": 1}


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
