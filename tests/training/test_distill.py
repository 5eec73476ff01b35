"""Distillation: each loss against its definition in loops, and both tasks with a teacher, whose
gradients are those of the whole batch."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from nanods.build import build_model
from nanods.config import PRESETS
from nanods.moe import MoEConfig
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.distill import (
    Teacher,
    add_projection,
    cosine_loss,
    embedding_loss,
    logit_loss,
    mix,
    projection_of,
    relation_loss,
)
from nanods.training.task import accumulate_gradients
from tests.training.test_contrastive_task import SMALL, Gaps
from tests.training.test_language_task import task_of as language_task_of

B, M, D = 6, 4, 5


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return normalize(rand(*shape, seed=seed), dim=-1)


# ---- the losses ----------------------------------------------------------------------------------


def probabilities(scores, temperature):
    """Return the softmax of a list of numbers, in plain Python."""
    exponentials = [math.exp(score / temperature) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0, 20.0])
def test_the_logit_loss_is_its_definition(T):
    student, teacher = rand(2, 3, 7), rand(2, 3, 7, seed=1)
    total = 0
    for b in range(2):
        for t in range(3):
            p, q = (probabilities(x[b, t].tolist(), T) for x in (teacher, student))
            total += T * T * kl(p, q)
    assert logit_loss(student, teacher, T).item() == pytest.approx(total / 6, rel=1e-12)
    assert logit_loss(teacher, teacher, T).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_the_gradient_of_the_logit_loss_is_the_temperature_times_the_difference_of_probabilities(T):
    student, teacher = rand(2, 3, 7).requires_grad_(), rand(2, 3, 7, seed=1)
    logit_loss(student, teacher, T).backward()
    expected = T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)) / 6
    assert (student.grad - expected).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda x: logit_loss(x, teacher, T), student)


def test_at_a_high_temperature_the_logit_loss_compares_centred_logits():
    """Hinton et al. 2015, equation 4: half the mean squared difference, summed over the classes."""
    student, teacher = (
        x - x.mean(-1, keepdim=True) for x in (rand(2, 3, 7), rand(2, 3, 7, seed=1))
    )
    expected = (student - teacher).square().mean(-1).mean() / 2
    assert logit_loss(student, teacher, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_one_token_of_the_teacher_bears_on_its_own_position_alone():
    student, teacher = rand(2, 3, 7).requires_grad_(), rand(2, 3, 7, seed=1)
    (before,) = torch.autograd.grad(logit_loss(student, teacher, 2.0), student)
    teacher[1, 2] += rand(7, seed=2)
    (after,) = torch.autograd.grad(logit_loss(student, teacher, 2.0), student)
    moved = (after - before).abs().amax(-1) > 0
    assert moved.tolist() == [[False] * 3, [False, False, True]]


def test_bf16_logits_are_compared_in_fp32():
    student, teacher = rand(2, 3, 7).bfloat16(), rand(2, 3, 7, seed=1).bfloat16()
    loss = logit_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    expected = logit_loss(student.double(), teacher.double(), 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_cosine_loss_is_its_definition_with_and_without_a_projection():
    student, teacher, projection = unit(B, M), unit(B, D, seed=1), rand(D, M, seed=2)
    total = 0
    for i in range(B):
        mapped = projection @ student[i]
        total += 1 - (mapped @ teacher[i] / (mapped.norm() * teacher[i].norm())).item()
    loss = cosine_loss(student, teacher, projection)
    assert loss.item() == pytest.approx(total / B, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda e, w: cosine_loss(e, teacher, w),
        (student.requires_grad_(), projection.requires_grad_()),
    )
    assert cosine_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert cosine_loss(teacher, -3 * teacher).item() == pytest.approx(2)


def relation_in_loops(student, teacher, T, examples):
    total = 0
    for i, j in ((0, 1), (1, 0)):
        for x in examples:
            p, q = (
                probabilities([float(e[i][x] @ e[j][y]) for y in examples], T)
                for e in (teacher, student)
            )
            total += kl(p, q)
    return total / (2 * len(examples))


PRESENT = torch.tensor([True, True, False, True, False, True])


@pytest.mark.parametrize("present", [None, PRESENT])
def test_the_relation_loss_is_its_definition(present):
    student, teacher = (unit(B, M), unit(B, M, seed=1)), (unit(B, D, seed=2), unit(B, D, seed=3))
    examples = range(B) if present is None else present.nonzero().flatten().tolist()
    expected = relation_in_loops(student, teacher, 0.1, examples)
    loss = relation_loss(student, teacher, 0.1, present=present)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda a, b: relation_loss((a, b), teacher, 0.1, present=present),
        tuple(e.requires_grad_() for e in student),
    )


@pytest.mark.parametrize("present", [None, PRESENT])
def test_the_mean_over_parts_of_the_rows_is_the_loss_of_the_whole_batch(present):
    """As several processes compute it, each for its own rows."""
    student, teacher = (unit(B, M), unit(B, M, seed=1)), (unit(B, D, seed=2), unit(B, D, seed=3))
    projection = rand(D, M, seed=4)

    def losses(rows):
        relation = relation_loss(student, teacher, 0.1, rows, present)
        return relation, cosine_loss(student[0], teacher[0], projection, rows, present)

    parts = [losses(slice(start, start + 2)) for start in (0, 2, 4)]
    for part, whole in zip(zip(*parts, strict=True), losses(slice(None)), strict=True):
        assert sum(part).item() / 3 == pytest.approx(whole.item(), rel=1e-12)


def test_the_relation_is_blind_to_coordinates_and_sees_every_example():
    student, teacher = (unit(B, M), unit(B, M, seed=1)), (unit(B, D, seed=2), unit(B, D, seed=3))
    before = relation_loss(student, teacher, 0.1).item()
    turn, _ = torch.linalg.qr(rand(D, D, seed=4))
    turned = tuple(e @ turn for e in teacher)
    assert relation_loss(student, turned, 0.1).item() == pytest.approx(before, rel=1e-12)
    assert relation_loss(teacher, turned, 0.1).item() == pytest.approx(0, abs=1e-12)
    for i in range(B):
        other = teacher[1].clone()
        other[i] = unit(D, seed=5 + i)
        assert abs(relation_loss(student, (teacher[0], other), 0.1).item() - before) > 1e-6


def test_a_pair_or_a_modality_that_no_two_examples_have_gives_zero():
    student, teacher = (unit(B, M), unit(B, M, seed=1)), (unit(B, D, seed=2), unit(B, D, seed=3))
    leaf = student[0].clone().requires_grad_()
    for present in (torch.zeros(B, dtype=torch.bool), torch.arange(B) == 2):
        loss = relation_loss((leaf, student[1]), teacher, 0.1, present=present)
        assert loss.item() == 0
    loss = loss + cosine_loss(leaf, teacher[0], rand(D, M), present=torch.zeros(B, dtype=bool))
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()


def test_the_weights_of_the_losses():
    own, distance = torch.tensor(3.0), torch.tensor(7.0)
    assert mix(own, distance, 0.25).item() == pytest.approx(0.75 * 3 + 0.25 * 7)
    assert mix(own, distance, 0.0).item() == 3 and mix(own, distance, 1.0).item() == 7
    student = {name: unit(B, M, seed=i) for i, name in enumerate("abc")}
    teacher = {name: unit(B, M, seed=9 + i) for i, name in enumerate("abc")}
    pairs = {("a", "b"): 1.0, ("a", "c"): 3.0}
    config = replace(SMALL, distill_cosine=0.5, distill_temperature=0.2)
    loss, metrics = embedding_loss(student, teacher, pairs, config)
    first, second = (
        relation_loss(*((e[a], e[b]) for e in (student, teacher)), 0.2).item() for a, b in pairs
    )
    cosines = [cosine_loss(student[name], teacher[name]).item() for name in "abc"]
    assert metrics["relation_loss"].item() == pytest.approx((first + 3 * second) / 4)
    assert metrics["cosine_loss"].item() == pytest.approx(sum(cosines) / 3)
    assert loss.item() == pytest.approx((first + 3 * second) / 4 + 0.5 * sum(cosines) / 3)


# ---- both tasks with a teacher -------------------------------------------------------------------


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = build_model(config).double()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model


def teacher_of(config, seed=1):
    model = random_model(config, seed).eval().requires_grad_(False)
    return Teacher(model, config, Path("teacher"), {}, "")


def gradients(task, model, micro_batch):
    metrics = accumulate_gradients(task, model, task.batch(0), micro_batch)
    return metrics, {name: p.grad.clone() for name, p in model.named_parameters()}


def near(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-10, name


EXPERTS = MoEConfig(n_expert=4, capacity_factor=0.5)  # in training it would drop tokens


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("data", [None, Gaps()])
def test_contrastive_micro_batches_have_the_gradients_of_the_whole_batch(width, data):
    task = ContrastiveTask(replace(SMALL, distill_weight=0.75), torch.device("cpu"), data)
    other = replace(
        SMALL,
        model=replace(SMALL.model, n_embd=32, moe=EXPERTS),
        multimodal=replace(SMALL.multimodal, width=width),
    )
    task.teacher = teacher_of(other)
    model = random_model(SMALL)
    if width != 8:
        add_projection(model, 8, width, seed=0)

    # The definition, of the whole batch in one pass.
    inputs, _, present = task.batch(0)
    embeddings, _ = model(inputs)
    taught = task.teacher.model(inputs)[0]
    pairs, projection = task.pair_weights, projection_of(model)
    distance, _ = embedding_loss(
        embeddings, taught, pairs, task.config, projection, present=present
    )
    own, _ = task.batch_loss(embeddings, model.temperature(), task.batch(0).ids, present)
    (0.25 * own + 0.75 * distance).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert ("projection.weight" in expected) == (width != 8)
    assert all(gradient.any() for gradient in expected.values())

    for size in (8, 3, 1):
        model.zero_grad()
        metrics, found = gradients(task, model, size)
        near(found, expected)
        assert metrics["train_loss"].item() == pytest.approx(
            0.25 * own.item() + 0.75 * distance.item(), rel=1e-10
        )
        assert metrics["ce_loss"].item() == pytest.approx(own.item(), rel=1e-10)
    assert task.teacher.model.training is False
    assert all(p.grad is None for p in task.teacher.model.parameters())


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_a_language_model_with_a_teacher_has_the_gradients_of_the_definition(preset):
    task = language_task_of(distill_weight=0.3, distill_temperature=3.0)
    student = PRESETS[preset].model
    small = replace(student, n_layer=2, n_head=2, n_embd=16, context_length=8)
    small = replace(small, attention=replace(small.attention, block_size=4))
    # Without the experts' losses, which are means over a micro-batch.
    moe = replace(small.moe, balance_coefficient=0.0, z_coefficient=0.0)
    config = replace(task.config, model=replace(small, moe=moe))
    task.config = config
    larger = replace(small, n_embd=32, context_length=16, moe=EXPERTS)
    task.teacher = teacher_of(replace(config, model=larger))
    model, windows = random_model(config), task.batch(0)

    logits = model(windows[:, :-1])[0]
    taught = task.teacher.model(windows[:, :-1])[0]
    log_q, log_p = ((x / 3).log_softmax(-1) for x in (logits, taught))
    distance = 9 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    own = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None]).mean()
    (0.7 * own + 0.3 * distance).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for size in (3, 1):
        model.zero_grad()
        metrics = accumulate_gradients(task, model, windows, size)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        near(found, expected)
        assert metrics["ce_loss"].item() == pytest.approx(own.item(), rel=1e-10)
        assert metrics["distill_loss"].item() == pytest.approx(distance.item(), rel=1e-10)
        assert metrics["train_loss"].item() == pytest.approx(
            0.7 * own.item() + 0.3 * distance.item(), rel=1e-10
        )


def test_the_student_runs_once_per_micro_batch():
    task = language_task_of()
    task.teacher = teacher_of(task.config)
    model, calls = random_model(task.config), []
    model.register_forward_hook(lambda *_: calls.append("student"))
    task.teacher.model.register_forward_hook(lambda *_: calls.append("teacher"))
    accumulate_gradients(task, model, task.batch(0), 1)
    assert calls == ["student", "teacher"] * 3


def test_a_projection_leaves_the_random_stream_and_the_students_weights_alone():
    model = random_model(SMALL)
    before, state = {k: x.clone() for k, x in model.state_dict().items()}, torch.get_rng_state()
    add_projection(model, 8, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
    assert projection_of(model).shape == (12, 8) and projection_of(model).dtype == torch.float64
    assert projection_of(random_model(SMALL)) is None
