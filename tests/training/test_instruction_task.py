"""Instructions as a task: which tokens are learnt, how they are averaged, and what mixes."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanods.build import build_model
from nanods.config import PRESETS
from nanods.data.instructions import PLAIN, Example, Instructions
from nanods.errors import UserError
from nanods.training.instruction_task import IGNORED, InstructionTask
from nanods.training.optimizers import make_optimizers
from nanods.training.task import accumulate_gradients

CPU = torch.device("cpu")


def example(prompt, answer, task="sums"):
    return Example(task, (("user", prompt), ("assistant", answer)))


SUMS = [example(f"{n} + {n * n}", "=" * (n % 7) + f"{n + n * n}") for n in range(40)]
NAMES = [example(f"name {n}", "abcdefgh"[n:] * 3, "names") for n in range(6)]
TEXT = Example(PLAIN, (("text", "Some plain text of a few words. " * 9),))
DATA = Instructions("x", "hash", [*SUMS[:30], *NAMES[:4], TEXT], [*SUMS[30:], *NAMES[4:]], "some")


def task_of(preset="v1-tiny", T=32, data=DATA, **flags):
    config = PRESETS[preset]
    model = replace(config.model, context_length=T, n_layer=2, n_head=2, n_embd=16)
    model = replace(model, attention=replace(model.attention, block_size=4, top_blocks=1))
    if preset >= "v2":
        moe = replace(model.moe, n_expert=4, balance_coefficient=0.0, z_coefficient=0.0)
        model = replace(model, moe=moe)
    config = replace(config, model=model, **({"batch_size": 8} | flags))
    return InstructionTask(config, CPU, data)


def model_of(task):
    torch.manual_seed(0)
    model = build_model(task.config).double()
    for p in model.parameters():
        if p.abs().max() == 0:  # output matrices start at 0, where nothing depends on the input
            torch.nn.init.normal_(p, std=0.3)
    return model


def gradients(task, model, batch, size):
    model.zero_grad()
    metrics = accumulate_gradients(task, model, batch, size)
    return metrics, {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_the_loss_is_the_mean_over_the_answer_tokens_of_the_batch(preset):
    """Against one row at a time, written out: every answer token of the batch counts the same."""
    task = task_of(preset)
    model, total, tokens = model_of(task), 0, 0
    for row in task.choose_rows(3):
        ids = torch.from_numpy(row.tokens.astype("int64"))
        logits = model(ids[None, :-1])[0][0]
        for t in range(len(ids) - 1):
            if row.is_target[t + 1]:
                total = total - logits[t].log_softmax(-1)[ids[t + 1]]
                tokens += 1
    expected = total / tokens
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for size in (8, 2, 1):
        metrics, got = gradients(task, model, task.batch(3), size)
        assert metrics["ce_loss"].item() == pytest.approx(expected.item(), rel=1e-12)
        assert largest_difference(got, wanted) < 1e-12


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_one_process_makes_the_gradient_of_two(preset):
    task = task_of(preset)
    model, batch = model_of(task), task.batch(5)
    metrics, one = gradients(task, model, batch, 2)  # one process x 4 micro-batches
    halves = [task.batch(5, slice(start, start + 4)) for start in (0, 4)]
    targets = [int((half.targets != IGNORED).sum()) for half in halves]
    assert targets[0] != targets[1]  # a mean of means would differ
    of_two = [gradients(task, model, half, 2) for half in halves]  # two processes x 2
    mean = {name: (of_two[0][1][name] + of_two[1][1][name]) / 2 for name in one}
    assert largest_difference(one, mean) < 1e-12
    losses = [each["train_loss"].item() for each, _ in of_two]
    assert sum(losses) / 2 == pytest.approx(metrics["train_loss"].item(), rel=1e-12)
    naive = [loss * sum(targets) / 2 / count for loss, count in zip(losses, targets, strict=True)]
    assert abs(sum(naive) / 2 - metrics["train_loss"].item()) > 1e-3


@pytest.mark.parametrize("preset", ["v0-tiny", "v1-tiny", "v2-tiny"])
def test_an_example_never_sees_another(preset):
    task = task_of(preset)
    model = model_of(task).eval()
    rows = task.choose_rows(1)[:4]
    before, _ = task.nats(model, task.collate(rows, 1.0))
    others = sorted(task.choose_rows(2), key=lambda row: len(row.tokens))[-3:]  # longer, too
    after, _ = task.nats(model, task.collate([rows[0], *others], 1.0))
    alone, _ = task.nats(model, task.collate(rows[:1], 1.0))
    n = len(rows[0].tokens) - 1
    assert (before[0, :n] - after[0, :n]).abs().max() < 1e-12
    assert (before[0, :n] - alone[0, :n]).abs().max() < 1e-12
    assert before[0, n:].abs().sum() == after[0, n:].abs().sum() == 0  # padding


def test_prompts_are_read_and_not_learnt():
    task = task_of()
    batch = task.batch(0)
    for row, targets in zip(task.choose_rows(0), batch.targets, strict=True):
        learnt = [t for t in targets.tolist() if t != IGNORED]
        assert learnt == row.tokens[row.is_target].tolist()
    model = model_of(task)
    batch = task.collate([row for row in task.choose_rows(0) if row.tokens[0] == 0xFD], 1.0)
    nats, _ = task.nats(model, batch)
    changed = batch.tokens.clone()
    changed[:, 1] ^= 1  # the first letter of each prompt
    other, _ = task.nats(model, batch._replace(tokens=changed))
    assert (nats - other).abs().max() > 1e-6


def test_tasks_are_drawn_by_weight_and_by_seed_and_step_alone():
    task = task_of(mix="sums=3,names=1", batch_size=16)
    assert task.weights == {"sums": 0.75, "names": 0.25}
    sums = {row.tokens.tobytes() for row in task.data.train_rows["sums"]}
    drawn = Counter(
        row.tokens.tobytes() in sums for step in range(100) for row in task.choose_rows(step)
    )
    assert drawn[True] / 1600 == pytest.approx(0.75, abs=0.04)
    again = task_of(mix="sums=3,names=1", batch_size=16)
    assert torch.equal(again.batch(7).tokens, task.batch(7).tokens)
    other = task_of(mix="sums=3,names=1", batch_size=16, seed=1)
    assert other.batch(7).tokens.tolist() != task.batch(7).tokens.tolist()
    assert task_of().weights == pytest.approx({"sums": 1 / 3, "names": 1 / 3, PLAIN: 1 / 3})


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        ("sums", "give weights as TASK=NUMBER"),
        ("sums=", "give weights"),
        ("sums=-1", "give weights"),
        ("sums=nan", "give weights"),
        ("sums=0", "give weights"),
        ("sum=1", "has no examples of sum; its tasks are sums, names, plain"),
        ("plain=1", r"no task that is trained on \(plain\) has an example for validation"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(mix, reason):
    with pytest.raises(UserError, match=reason):
        task_of(mix=mix)


def test_an_evaluation_gives_the_bits_per_byte_of_the_answers():
    task = task_of(mix="sums=3,names=1")
    model = model_of(task).eval()
    metrics = task.evaluate(model)
    for name, examples in (("sums", DATA.val[:10]), ("names", DATA.val[10:])):
        nats = end_nats = 0.0
        for each in examples:
            prompt, answer = each.messages[0][1], each.messages[1][1]
            ids = torch.tensor([0xFD, *prompt.encode(), 0xFE, *answer.encode(), 0xFF])
            losses = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
            nats += losses[len(prompt) + 1 : -1].sum().item()
            end_nats += losses[-1].item()
        size = sum(len(each.answer) for each in examples)
        assert metrics[f"val_bpb_{name}"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)
        mean = (nats + end_nats) / (size + len(examples))
        assert metrics[f"val_loss_{name}"] == pytest.approx(mean, rel=1e-12)
    both = 0.75 * metrics["val_bpb_sums"] + 0.25 * metrics["val_bpb_names"]
    assert metrics["val_bpb"] == pytest.approx(both, rel=1e-12)
    assert f"{both:.4f} bits per byte" in task.describe_validation(metrics)
    assert task.evaluation_seconds(model) > 0
    few = task_of(eval_tokens=60)
    assert sum(len(rows) for rows in few.validation_batches("sums")) < 10


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_one_batch_can_be_learnt_by_heart(preset):
    task = task_of(preset, mix="sums=1", batch_size=4)
    config = replace(task.config, lr=0.03, expert_lr=0.03, expert_every=1, weight_decay=0.0)
    sees_all = replace(config.model.attention, block_size=32)
    config = replace(config, model=replace(config.model, n_embd=32, attention=sees_all))
    torch.manual_seed(0)
    model = build_model(config)
    optimizers, batch = make_optimizers(config, model), task.batch(0)
    for _ in range(50):
        loss = accumulate_gradients(task, model, batch, 4)["ce_loss"].item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.02


def test_what_is_cut_and_mixed_is_said_before_the_first_step():
    words = task_of(T=12).describe_data()
    assert "sums 30 + 10 (0.333), names 4 + 2 (0.333), plain 24 + 0 (0.333)" in words
    cuts = words.split("\n")[-1]
    assert cuts.startswith("cut        of 47 examples") and "--context-length 12" in cuts
    assert "cut " not in task_of(T=64).describe_data()


@pytest.mark.parametrize(
    ("eval_tokens", "said"),
    [(10_000, "reads all of it"), (33, "reads 2 of 12 rows, spread evenly (--eval-tokens)")],
)
def test_how_much_an_evaluation_reads_is_said(eval_tokens, said):
    words = task_of(eval_tokens=eval_tokens).describe_data().split("\n")
    assert f"validation some; each evaluation {said}" in words
