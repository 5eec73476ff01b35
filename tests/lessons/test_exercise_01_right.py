"""The grader of lesson 01 asks for results, not for one way to them: loops and gathers pass where the solutions mask."""

from pathlib import Path

import check_01
import grade
import pytest
import torch
import torch.nn.functional as F

right = grade.load_file(Path(check_01.__file__).with_name("01_solutions.py"))


def dense_by_loop(q, k, v):
    out = torch.zeros_like(v)
    for t in range(q.size(2)):
        weights = (
            torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, : t + 1])
            .div(q.size(-1) ** 0.5)
            .softmax(-1)
        )
        out[:, :, t] = torch.einsum("bhs,bhsd->bhd", weights, v[:, :, : t + 1])
    return out


def topk_by_gather(q, k, v, top_k):
    best, index = (
        right.causal_scores(q, k).clamp(min=-1e9).topk(min(top_k, k.size(2)), dim=-1)
    )  # (B, H, T, K)
    rows = (
        v[:, :, None]
        .expand(-1, -1, q.size(2), -1, -1)
        .gather(3, index[..., None].expand(*index.shape, v.size(-1)))
    )
    return (best.softmax(-1)[..., None] * rows).sum(3)


def pool_by_count(k, block_size):
    def total(x):
        return F.pad(x, (0, 0, 0, -k.size(2) % block_size)).unflatten(2, (-1, block_size)).sum(3)

    return total(k) / total(torch.ones_like(k))


def choose_by_sorting(q, k, block_size, top_blocks):
    means, out = (
        pool_by_count(k, block_size),
        torch.full((*q.shape[:3], top_blocks), -1, dtype=torch.int32),
    )
    for b, h, t in torch.ones(q.shape[:3]).nonzero().tolist():
        order = sorted(range(t // block_size), key=lambda n: -float(means[b, h, n] @ q[b, h, t]))[
            :top_blocks
        ]
        out[b, h, t, : len(order)] = torch.tensor(order)
    return out


def read_by_loop(q, k, v, blocks, block_size):
    out = torch.zeros_like(v)
    for b, h, t in torch.ones(q.shape[:3]).nonzero().tolist():
        read = {*blocks[b, h, t].tolist(), t // block_size}
        keys = [s for s in range(t + 1) if s // block_size in read]
        out[b, h, t] = (k[b, h, keys] @ q[b, h, t] / q.size(-1) ** 0.5).softmax(0) @ v[b, h, keys]
    return out


def first_rows(q, k, block_size, top_blocks):
    return choose_by_sorting(q, k, block_size, top_blocks)[:, :, ::block_size]


ANSWERS = [
    dense_by_loop,
    topk_by_gather,
    pool_by_count,
    choose_by_sorting,
    read_by_loop,
    first_rows,
]


def judge(step, function):
    return grade.grade_step(step, function, Path(__file__))


@pytest.mark.parametrize(("step", "function"), list(zip(check_01.STEPS, ANSWERS, strict=True)))
def test_other_right_answers_pass(step, function):
    assert judge(step, function).message == "OK"


SPOILT = [torch.squeeze, torch.Tensor.tolist, torch.flatten, torch.sum, lambda x: x[0]]


@pytest.mark.parametrize("step", check_01.STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("spoil", SPOILT)
def test_other_shapes_are_mistakes_of_the_learner_not_errors_of_the_grader(step, spoil):
    result = judge(step, lambda *arguments: spoil(getattr(right, step.name)(*arguments)))
    assert result.verdict == "wrong"
    assert "shape" in result.message or "not a tensor" in result.message
