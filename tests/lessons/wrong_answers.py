"""A list of wrong answers to the steps of one exercise, each with the message that belongs to its mistake alone."""

import re
from pathlib import Path

import grade
import pytest


def grade_answer(steps, name, function):
    """What the grader says of an answer to the step of that name, written in the file where it stands."""
    return grade.grade_step(
        next(step for step in steps if step.name == name),
        function,
        Path(function.__code__.co_filename),
    )


class WrongAnswers:
    def __init__(self):
        self.cases = []

    def add(self, step, message, function, name):
        self.cases.append(pytest.param(step, message, function, id=f"{step}-{name}"))

    def register(self, step, message):
        """A decorator: this function is a wrong answer to the step, and `message` a pattern for what it is told."""

        def add(function):
            self.add(step, message, function, function.__name__)
            return function

        return add

    def register_all(self, step, **answers):
        """The same for lambdas: name = (pattern, function)."""
        for name, (message, function) in answers.items():
            self.add(step, message, function, name)

    def assert_diagnosis(self, steps, step, message, function):
        result = grade_answer(steps, step, function)
        assert result.verdict == "wrong"
        assert re.search(message, result.message), result.message
        others = {p.values[1] for p in self.cases if p.values[0] == step} - {message}
        assert not [other for other in others if re.search(other, result.message)]


def spoil_output(place, spoil, out):
    """Several tensors with one of them spoilt, or the only one."""
    return (
        spoil(out)
        if place is None
        else [spoil(part) if i == place else part for i, part in enumerate(out)]
    )
