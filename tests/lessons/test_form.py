"""Each lesson has the form that lessons/README.md promises."""

import ast
import json
import re
from pathlib import Path

import pytest

LESSONS = Path(__file__).parents[2] / "lessons"
NOTEBOOKS = sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))
CLAIM = re.compile(r"\b(?:V[123]|D)\.\d+\b")  # of the article
RANDOM = {"draw_tokens", "bootstrap_threshold"}  # two right answers draw different numbers

each_lesson = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def without_answers(text):
    return re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)


@each_lesson
def test_a_lesson_is_short(path):
    prose = " ".join(without_answers(text) for text in cells(path, "markdown"))
    assert sum(any(map(str.isalnum, word)) for word in prose.split()) <= 1950
    assert len(cells(path, "code")) <= 25


@each_lesson
def test_the_article_is_cited_in_the_verdicts_only(path):
    assert not [text for text in cells(path, "markdown") if CLAIM.search(text)]
    for code in cells(path, "code"):
        assert not CLAIM.search(re.sub(r"show_verdicts\(.*?\)", "", code, flags=re.DOTALL)), code


@each_lesson
def test_each_function_is_asked_for_before_the_learners_answer_runs_beside_ours(path):
    (exercises,) = (
        file
        for file in (LESSONS / "exercises").glob(f"{path.stem[:2]}_*.py")
        if not file.stem.endswith("_solutions")
    )
    functions = [
        node.name
        for node in ast.parse(exercises.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    lesson = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in lesson]
    asked = {}
    for number, text in enumerate(texts):
        for part in re.split(r"(?=\*\*Exercise \d+)", text)[1:]:
            name = re.match(r"\*\*Exercise \d+: `(\w+)\(", part).group(1)
            asked[name] = number
            about = " ".join(part.split())
            assert re.search(r"difficulty \d of 5, \d+ minutes", about), name
            assert "<summary>Hint" in part, name
            assert "<summary>Solution" in part, name
    assert list(asked) == functions
    for name in set(functions) - RANDOM:
        compared = re.compile(rf'compare\(\s*"{path.stem[:2]}",\s*"{name}"')
        (number,) = (n for n, text in enumerate(texts) if compared.search(text))
        assert number > asked[name], name


@each_lesson
def test_a_lesson_ends_with_a_card_five_questions_and_what_to_read(path):
    end = "\n".join(cells(path, "markdown")[-3:])
    for part in ("## Summary card", "## What the article says", "**Read next.**"):
        assert part in end
    _, questions = end.split("**Test yourself")
    assert len(re.findall(r"<summary>\d\. ", questions)) == 5
