"""Collect wrong answers to the steps of an exercise, each with the message for its mistake."""

import re
from itertools import combinations
from pathlib import Path

import grade
import pytest


def grade_answer(steps, name, function):
    """Grade a function as the answer to the step of that name."""
    step = next(step for step in steps if step.name == name)
    return grade.grade_step(step, function, Path(function.__code__.co_filename))


def equal_pairs(values, tolerance=grade.TOLERANCE):
    """Return the pairs of messages whose mistakes give the same value: tensors, or functions that
    return them."""
    made = {message: value() if callable(value) else value for message, value in values.items()}
    return [
        (a, b)
        for a, b in combinations(made, 2)
        if grade.is_close(made[a].double(), made[b].double(), tolerance)
    ]


class WrongAnswers:
    """Test cases (step, message, function): a wrong answer and a pattern for its message."""

    def __init__(self):
        self.cases = []

    def add(self, step, message, function, name):
        self.cases.append(pytest.param(step, message, function, id=f"{step}-{name}"))

    def register(self, step, message):
        """Return a decorator that adds its function as a wrong answer to the step."""

        def add(function):
            self.add(step, message, function, function.__name__)
            return function

        return add

    def register_all(self, step, **answers):
        """Add several wrong answers to one step, as name=(message, function)."""
        for name, (message, function) in answers.items():
            self.add(step, message, function, name)

    def assert_diagnosis(self, steps, step, message, function):
        """Assert that the message matches this pattern and no other pattern of the step."""
        result = grade_answer(steps, step, function)
        assert result.verdict == "wrong"
        assert re.search(message, result.message), result.message
        others = {case.values[1] for case in self.cases if case.values[0] == step} - {message}
        matching = [other for other in others if re.search(other, result.message)]
        assert not matching


def spoil_output(index, spoil, output):
    """Apply `spoil` to the output, or to its tensor number `index` if there are several."""
    if index is None:
        return spoil(output)
    return [spoil(tensor) if i == index else tensor for i, tensor in enumerate(output)]
