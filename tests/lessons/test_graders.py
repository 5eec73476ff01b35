"""Whatever an answer returns, and whenever, is a mistake of the learner: no grader stumbles over shapes, types or NaN."""

import math
from pathlib import Path

import check_02
import check_03
import check_04
import grade
import pytest
import torch

from tests.lessons.wrong_answers import spoil_output

CHECKS = {"02": check_02, "03": check_03, "04": check_04}
RIGHT = {
    number: grade.load_file(Path(check.__file__).with_name(f"{number}_solutions.py"))
    for number, check in CHECKS.items()
}
PLACES = [
    pytest.param(number, step, place, id=f"{number}-{step.name}-{place}")
    for number, check in CHECKS.items()
    for step in check.STEPS
    for place in (range(len(step.returns)) if step.returns else [None])
]


def late(number, step, place, when, spoil):
    """The verdict on an answer that is right, but spoilt from its `when`-th call on; and how often it was called."""
    calls = []

    def answer(*arguments):
        calls.append(None)
        out = getattr(RIGHT[number], step.name)(*arguments)
        return spoil_output(place, spoil, out) if len(calls) >= when else out

    return grade.grade_step(step, answer, Path(__file__)), len(calls)


@pytest.mark.parametrize(("number", "step", "place"), PLACES)
@pytest.mark.parametrize(
    "spoil",
    [
        torch.Tensor.tolist,
        lambda x: x[None],
        lambda x: x[..., None],
        lambda x: x.flatten()[:0],
        lambda x: x.flatten()[:1].expand(7),
    ],
)
def test_another_shape_is_called_one(number, step, place, spoil):
    result, _ = late(number, step, place, 1, spoil)
    assert result.verdict == "wrong"
    assert "shape" in result.message or "not a tensor" in result.message


@pytest.mark.parametrize(("number", "step", "place"), PLACES)
@pytest.mark.parametrize("when", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("spoil", [lambda x: x[None], torch.Tensor.tolist, lambda x: x * math.nan])
def test_and_so_is_one_that_comes_late(number, step, place, when, spoil):
    result, calls = late(number, step, place, when, spoil)
    assert result.verdict == "wrong" or calls < when


@pytest.mark.parametrize(("number", "step", "place"), PLACES)
@pytest.mark.parametrize("when", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize(
    "spoil", [torch.Tensor.detach, torch.Tensor.long, torch.Tensor.bfloat16, torch.Tensor.bool]
)
def test_what_may_still_be_right_is_survived(number, step, place, when, spoil):
    late(number, step, place, when, spoil)
