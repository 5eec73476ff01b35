"""The grader of lesson 06 accepts every correct implementation."""

import pytest
import steps_06
import torch

from nanods.quantize import FP8, Int8Linear, fake_quantize, quantize_rows, round_to_grid
from nanods.training.distill import logit_loss
from tests.lessons.wrong_answers import equal_pairs, grade_answer


def rows_by_loops(x, bits):
    limit, q = 2 ** (bits - 1) - 1, torch.zeros(x.shape, dtype=torch.int8)
    scale = torch.ones(len(x), dtype=x.dtype)
    for n, row in enumerate(x):
        if row.any():
            scale[n] = max(abs(number) for number in row.tolist()) / limit
        for c, number in enumerate(row):
            q[n, c] = int(torch.round(number / scale[n]))
    return q, scale


def linear_in_int64(x, weight, weight_scale):
    q, scale = quantize_rows(x)
    return torch.outer(scale, weight_scale.to(x.dtype)) * (q.long() @ weight.long().T)


def linear_in_floats(x, weight, weight_scale):
    """Multiply the integers as fp64, which holds the sums exactly."""
    q, scale = quantize_rows(x)
    y = (q.double() @ weight.double().T) * scale.double()[:, None] * weight_scale.double()
    return y.to(x.dtype)


class RoundRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits):
        q, scale = quantize_rows(x, bits)
        return q * scale[:, None]

    @staticmethod
    def backward(ctx, g):
        return g, None


def fp8_by_cast(x):
    return x.clamp(-448, 448).to(FP8).to(x.dtype)


def fp8_by_search(x):
    """Take the nearest of all numbers, of two the one with an even mantissa."""
    grid = steps_06.all_fp8_numbers()
    even = grid.float().to(FP8).view(torch.uint8) % 2 == 0
    flat = x.double().flatten()
    right = torch.searchsorted(grid, flat).clamp(1, len(grid) - 1)
    low, high = grid[right - 1], grid[right]
    nearer_high = (high - flat < flat - low) | ((high - flat == flat - low) & even[right])
    return torch.where(nearer_high, high, low).view(x.shape).to(x.dtype)


def distill_by_sums(student, teacher, temperature):
    p = (teacher.detach() / temperature).softmax(-1)
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    return temperature**2 * (p * (log_p - log_q)).sum() / len(student)


def distill_as_nanods(student, teacher, temperature):
    return logit_loss(student[None], teacher.detach()[None], temperature)


ANSWERS = [
    ("quantize_rows", quantize_rows),
    ("quantize_rows", rows_by_loops),
    ("int8_linear", linear_in_int64),
    ("int8_linear", linear_in_floats),
    ("fake_quantize", fake_quantize),
    ("fake_quantize", lambda x, bits: RoundRows.apply(x, bits)),
    ("round_to_fp8", fp8_by_cast),
    ("round_to_fp8", fp8_by_search),
    ("distillation_loss", distill_by_sums),
    ("distillation_loss", distill_as_nanods),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_correct_answers_pass(name, function):
    assert grade_answer(steps_06.STEPS, name, function).message == "OK"


def test_no_two_mistakes_give_the_same_result():
    """Otherwise the grader never reports one of them."""
    x, (weight, scale) = steps_06.rows_with_different_sizes(), steps_06.integer_weight()
    assert not equal_pairs(steps_06.known_scales(x, 8))
    assert not equal_pairs(steps_06.known_products(x, weight, scale))
    student, teacher = 3 * steps_06.random(5, 9), 3 * steps_06.random(5, 9, seed=2)
    assert not equal_pairs(steps_06.known_distillations(student, teacher))


def test_what_the_exercise_builds_is_what_nanods_computes():
    linear = Int8Linear(torch.randn(6, 12))
    x = torch.randn(4, 12)
    sums = steps_06.reference_integers(x.double(), 8) @ linear.weight.double().T
    scale = steps_06.reference_scale(x.double(), 8)
    torch.testing.assert_close(linear(x).double(), sums * scale[:, None] * linear.scale)
    assert torch.equal(
        round_to_grid(x, steps_06.reference_scale(x, 8)[:, None], 8),
        steps_06.reference_integers(x, 8),
    )
