"""`make lessons` fails on a lesson whose committed outputs are not what it prints now."""

import json
from pathlib import Path

import nbformat
import pytest

from tests.lessons import execute

CELLS = [
    (path.stem, cell)
    for path in sorted(execute.LESSONS.glob("*.ipynb"))
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


@pytest.mark.parametrize(
    ("committed", "now"),
    [
        ("loss 5.545178413391113", "loss 5.545177459716797"),  # another order of summation
        ("difference 6.6e-07", "difference 0e+00"),
        ("| 1,234 | 0.5 |", "|  1,234 | 0.5 |"),
        ("largest: -0.0269", "largest: -0.0269"),
    ],
)
def test_rounding_and_blanks_may_differ(committed, now):
    assert execute.same_line(committed, now)


@pytest.mark.parametrize(
    ("committed", "now"),
    [
        ("dp=2 is 1.29 times as fast", "dp=2 is 1.33 times as fast"),
        ("0.9922 (0.9928)", "0.9923 (0.9928)"),
        ("by 2e-05", "by 2e-02"),
        ("18,676 parameters", "18,677 parameters"),
        ("a gap of -0.07", "a gap of 0.07"),
        ("it does not change", "it CHANGES"),
        ("seeds: 1, 2", "seeds: 1, 2, 3"),
        ("two words", "two"),
    ],
)
def test_other_numbers_and_words_may_not(committed, now):
    assert not execute.same_line(committed, now)


def code_cell(*printed, tags=()):
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in printed]
    cell = nbformat.v4.new_code_cell("print(...)", outputs=outputs)
    cell.metadata["tags"] = list(tags)
    return cell


def test_a_stale_cell_is_reported_with_both_lines():
    stale = execute.difference(code_cell("a\nloss 1.29\n"), code_cell("a\n", "loss 1.33\n"))
    assert stale == "    committed: loss 1.29\n    now:       loss 1.33"
    assert execute.difference(code_cell("a\n"), code_cell("a\nb\n"))
    assert execute.difference(code_cell("a\nb\n"), code_cell("a\n", "b\n")) is None


def test_a_tag_says_what_may_vary():
    before = code_cell("60 steps in 6 s", tags=["varies-numbers"])
    assert execute.difference(before, code_cell("60 steps in 83 s")) is None
    assert execute.difference(before, code_cell("60 steps in vain"))
    before = code_cell("one text", tags=["varies-text"])
    assert execute.difference(before, code_cell("another")) is None


def test_pictures_and_warnings_are_not_compared():
    before, after = code_cell("a\n"), code_cell("a\n")
    warning = nbformat.v4.new_output("stream", name="stderr", text="slow\n")
    after.outputs.append(warning)
    for cell, png in ((before, "AAAA"), (after, "BBBB")):
        data = {"image/png": png, "text/plain": "<Figure size 700x400 with 1 Axes>"}
        cell.outputs.append(nbformat.v4.new_output("display_data", data=data))
    assert execute.difference(before, after) is None


def test_the_command_fails_on_a_stale_notebook_and_writes_a_fresh_one(monkeypatch, capsys):
    ran = []

    def run(path, inplace):
        ran.append((path.name, inplace))
        return [] if inplace else ["  cell a: stale"]

    monkeypatch.setattr(execute, "run", run)
    assert execute.main(["a.ipynb"]) == 1
    assert "make lessons ARGS=--inplace" in capsys.readouterr().out
    assert execute.main(["--inplace", "a.ipynb"]) == 0
    assert execute.main([]) == 1
    assert ran[:2] == [("a.ipynb", False), ("a.ipynb", True)]
    assert len(ran) == 2 + len(list(execute.LESSONS.glob("*.ipynb")))


def test_few_cells_vary_and_each_says_why():
    varying = [(name, cell) for name, cell in CELLS if cell["metadata"].get("tags")]
    for name, cell in varying:
        assert set(cell["metadata"]["tags"]) <= set(execute.TAGS), name
        assert cell["metadata"]["reason"], f"{name}, cell {cell['id']}"
    assert len(varying) < len(CELLS) / 7


def test_make_lessons_runs_this_module():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "$(PY) -m tests.lessons.execute $(ARGS)" in makefile
