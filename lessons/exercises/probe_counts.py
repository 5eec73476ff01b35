"""Experiments on functions that count: bytes, FLOPs, seconds.

The answers may be fp32, so numbers are compared by their relative difference.
"""

from collections.abc import Sequence

import torch
from grade import Answer, KnownMistakes, Mistake, different_digits, expect_shape
from torch import Tensor

RELATIVE = 1e-5  # answers may be fp32


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def agrees(result: Tensor, expected: Tensor) -> bool:
    return torch.allclose(result.double(), expected.double(), rtol=RELATIVE, atol=1e-12)


def judge(
    answer: Answer, case: tuple, expected: Tensor, names: Sequence[str], known: KnownMistakes
) -> None:
    """Raise Mistake unless answer(*case) is `expected`: the mistake if it is known, or else the
    first number that differs, by its name."""
    result = run(answer, case, expected)
    if agrees(result, expected):
        return
    for message, make in known.items():
        if agrees(result, make()):
            raise Mistake(message)
    for name, given, right in zip(names, result.view(-1), expected.view(-1), strict=True):
        if not agrees(given, right):
            given, right = different_digits(given, right)
            raise Mistake(f"{name} is {given}, but {right} is correct")


def judge_cases(answer: Answer, cases: dict[str, tuple], reference) -> None:
    """Raise Mistake unless the answer is right in each of these cases, by their names."""
    for when, case in cases.items():
        expected = reference(*case)
        if not agrees(run(answer, case, expected, when), expected):
            raise Mistake(f"right in general, but wrong {when}")


def run(answer: Answer, case: tuple, expected: Tensor, when: str = "") -> Tensor:
    """Call the answer, check the shape and dtype of its result and return it."""
    result = answer(*case, when=when)
    expect_shape(result, tuple(expected.shape), when=when)
    if not result.is_floating_point():
        raise Mistake(
            f"returns {result.dtype}: return a floating-point tensor".replace("torch.", "")
        )
    return result
