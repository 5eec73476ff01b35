"""The solutions that unfold in the lessons are right: pasted into the exercise file, they pass."""

import functools
import html
import importlib
import json
import re
from pathlib import Path

import grade
import pytest

from tests.lessons.wrong_answers import grade_answer

LESSONS = Path(__file__).parents[2] / "lessons"
EXERCISE = re.compile(r"\*\*Exercise \d+: `(\w+)\(.*?<pre>\n(.*?)</pre>", re.DOTALL)


def folded_solutions(number):
    """Return the body of each function, by name, that a lesson shows in <pre>."""
    (path,) = LESSONS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {name: html.unescape(body) for name, body in EXERCISE.findall(text)}


@functools.cache
def pasted(number, folder):
    """Return a learner's file as a module: the exercise file with all solutions of the lesson."""
    (stub,) = (
        p for p in (LESSONS / "exercises").glob(f"{number}_*.py") if "solutions" not in p.stem
    )
    source = stub.read_text(encoding="utf-8")
    for name, body in folded_solutions(number).items():
        lines = body.rstrip().splitlines()
        indented = "\n".join(4 * " " + line if line else "" for line in lines).lstrip()
        head, function, rest = source.partition(f"def {name}(")
        source = head + function + rest.replace("raise NotImplementedError", indented, 1)
    path = folder / stub.name
    path.write_text(source, encoding="utf-8")
    return grade.load_file(path)


STEPS = {
    path.stem.removeprefix("steps_"): importlib.import_module(path.stem).STEPS
    for path in sorted(LESSONS.glob("exercises/steps_*.py"))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pasted")


@pytest.mark.parametrize(
    ("number", "name"),
    [(number, step.name) for number in STEPS if folded_solutions(number) for step in STEPS[number]],
)
def test_a_folded_solution_passes_when_it_is_pasted(number, name, folder):
    result = grade_answer(STEPS[number], name, getattr(pasted(number, folder), name))
    assert result.verdict == "ok", result.message
