"""No grader crashes on a wrong shape, a wrong type or NaN: each is a mistake of the learner."""

import math
from pathlib import Path

import grade
import pytest
import steps_00
import steps_02
import steps_03
import steps_04
import steps_05
import steps_06
import steps_07
import steps_08
import torch

from tests.lessons.wrong_answers import spoil_output

CHECKS = {"00": steps_00, "02": steps_02, "03": steps_03, "04": steps_04, "05": steps_05}
CHECKS |= {"06": steps_06, "07": steps_07, "08": steps_08}
SOLUTIONS = {
    number: grade.load_file(Path(check.__file__).with_name(f"{number}_solutions.py"))
    for number, check in CHECKS.items()
}


def outputs_of_all_steps():
    """Return a test case (lesson, step, index) for each tensor that a step returns."""
    cases = []
    for number, check in CHECKS.items():
        for step in check.STEPS:
            for index in range(len(step.returns)) if step.returns else [None]:
                cases.append(pytest.param(number, step, index, id=f"{number}-{step.name}-{index}"))
    return cases


each_output = pytest.mark.parametrize(("number", "step", "index"), outputs_of_all_steps())


def grade_spoilt(number, step, index, first_call, spoil):
    """Grade the solution, with its output spoilt from call number `first_call` on.

    Returns the result and the number of calls.
    """
    calls = 0

    def answer(*arguments):
        nonlocal calls
        calls += 1
        output = getattr(SOLUTIONS[number], step.name)(*arguments)
        return spoil_output(index, spoil, output) if calls >= first_call else output

    result = grade.grade_step(step, answer, Path(__file__))
    return result, calls


@each_output
@pytest.mark.parametrize(
    "spoil",
    [
        torch.Tensor.tolist,
        lambda x: x[None],
        lambda x: x[..., None],
        lambda x: x.flatten()[:0],
        lambda x: x.flatten()[:1].expand(9),
    ],
)
def test_a_wrong_shape_or_type_is_reported(number, step, index, spoil):
    result, _ = grade_spoilt(number, step, index, 1, spoil)
    assert result.verdict == "wrong"
    assert "shape" in result.message or "not a tensor" in result.message


@each_output
@pytest.mark.parametrize("first_call", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("spoil", [lambda x: x[None], torch.Tensor.tolist, lambda x: x * math.nan])
def test_an_output_that_is_wrong_from_a_later_call_on_is_reported(
    number, step, index, first_call, spoil
):
    result, calls = grade_spoilt(number, step, index, first_call, spoil)
    assert result.verdict == "wrong" or calls < first_call


@each_output
@pytest.mark.parametrize("first_call", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize(
    "spoil", [torch.Tensor.detach, torch.Tensor.long, torch.Tensor.bfloat16, torch.Tensor.bool]
)
def test_the_grader_does_not_crash_on_a_converted_output(number, step, index, first_call, spoil):
    grade_spoilt(number, step, index, first_call, spoil)
