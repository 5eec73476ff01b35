"""The grader of lesson 01 accepts every correct answer, whatever method it uses."""

from pathlib import Path

import grade
import pytest
import steps_01
import torch
import torch.nn.functional as F

solutions = grade.load_file(Path(steps_01.__file__).with_name("01_solutions.py"))


def dense_by_loop(q, k, v):
    output = torch.zeros_like(v)
    for t in range(q.size(2)):
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, : t + 1]) / q.size(-1) ** 0.5
        output[:, :, t] = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, : t + 1])
    return output


def topk_by_gather(q, k, v, top_k):
    scores = solutions.causal_scores(q, k).clamp(min=-1e9)
    best, index = scores.topk(min(top_k, k.size(2)), dim=-1)  # (B, H, T, K)
    v_of_query = v[:, :, None].expand(-1, -1, q.size(2), -1, -1)  # (B, H, T, T, D)
    rows = v_of_query.gather(3, index[..., None].expand(*index.shape, v.size(-1)))
    return (best.softmax(-1)[..., None] * rows).sum(3)


def pool_by_count(k, block_size):
    def total(x):
        return F.pad(x, (0, 0, 0, -k.size(2) % block_size)).unflatten(2, (-1, block_size)).sum(3)

    return total(k) / total(torch.ones_like(k))


def select_by_sorting(q, k, block_size, top_blocks):
    means = pool_by_count(k, block_size)
    output = torch.full((*q.shape[:3], top_blocks), -1, dtype=torch.int32)
    for b, h, t in torch.ones(q.shape[:3]).nonzero().tolist():
        past_blocks = range(t // block_size)
        order = sorted(past_blocks, key=lambda n: -float(means[b, h, n] @ q[b, h, t]))[:top_blocks]
        output[b, h, t, : len(order)] = torch.tensor(order)
    return output


def block_attention_by_loop(q, k, v, blocks, block_size):
    output = torch.zeros_like(v)
    for b, h, t in torch.ones(q.shape[:3]).nonzero().tolist():
        attended = {*blocks[b, h, t].tolist(), t // block_size}
        keys = [s for s in range(t + 1) if s // block_size in attended]
        weights = (k[b, h, keys] @ q[b, h, t] / q.size(-1) ** 0.5).softmax(0)
        output[b, h, t] = weights @ v[b, h, keys]
    return output


def first_rows(q, k, block_size, top_blocks):
    return select_by_sorting(q, k, block_size, top_blocks)[:, :, ::block_size]


def dense_by_einsum(q, k, v):
    scores = torch.einsum("bhtd,bhsd->bhst", q / q.size(-1) ** 0.5, k).transpose(2, 3)  # a view
    scores = scores + torch.full(scores.shape[2:], -torch.inf, dtype=q.dtype).triu(1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdim=True), v)


def select_by_sums(q, k, block_size, top_blocks):
    # Past blocks are full, so sums rank as means do. The result is int32.
    full = k[:, :, : k.size(2) // block_size * block_size].unflatten(2, (-1, block_size)).sum(3)
    scores = F.pad(q @ full.mT, (0, top_blocks + 1), value=-torch.inf)
    current = torch.arange(q.size(2))[:, None] // block_size
    scores = scores.masked_fill(torch.arange(scores.size(-1)) >= current, -torch.inf)
    best, blocks = scores.sort(dim=-1, descending=True)
    return torch.where(best > -torch.inf, blocks, -1)[..., :top_blocks].int()


ANSWERS = [
    dense_by_loop,
    topk_by_gather,
    pool_by_count,
    select_by_sorting,
    block_attention_by_loop,
    first_rows,
]


def grade_answer(step, function):
    return grade.grade_step(step, function, Path(__file__))


@pytest.mark.parametrize(("step", "function"), list(zip(steps_01.STEPS, ANSWERS, strict=True)))
def test_correct_answers_by_other_methods_pass(step, function):
    assert grade_answer(step, function).message == "OK"


@pytest.mark.parametrize(
    ("name", "function"),
    [("dense_attention", dense_by_einsum), ("select_blocks", select_by_sums)],
)
def test_views_einsum_and_other_integers_pass(name, function):
    step = next(step for step in steps_01.STEPS if step.name == name)
    assert grade_answer(step, function).message == "OK"


SPOIL = [torch.squeeze, torch.Tensor.tolist, torch.flatten, torch.sum, lambda x: x[0]]


@pytest.mark.parametrize("step", steps_01.STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("spoil", SPOIL)
def test_a_wrong_shape_is_reported_as_a_mistake_and_does_not_crash_the_grader(step, spoil):
    result = grade_answer(step, lambda *arguments: spoil(getattr(solutions, step.name)(*arguments)))
    assert result.verdict == "wrong"
    assert "shape" in result.message or "not a tensor" in result.message
