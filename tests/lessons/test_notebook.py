from pathlib import Path

import pytest
import torch

from nanods import notebook
from nanods.notebook import compare, show_verdicts, start, verdict

ANSWERS = """
import torch

def double(x):
    return x + x

def slow(x):
    for _ in range(300):
        y = x * 2
    return y

def in_place(x):
    return x.mul_(2)

def wrong(x):
    y = x * 2
    y[1, 0] += 0.5
    return y

def transposed(x):
    return (x * 2).mT

def no_result(x):
    pass

def both(x):
    return x * 2, x

def stub(x):
    raise NotImplementedError

def broken(x):
    return x.no_such_method()

def ends(x):
    raise SystemExit(3)
"""


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "01_answers.py"
    path.write_text(ANSWERS)
    return path


def judge(answers, name):
    return verdict(answers, name, (torch.tensor([[1.0, 2], [3, 4]]),), lambda x: x * 2)


def test_a_right_answer_agrees_and_its_time_is_shown(answers):
    for name in ("double", "in_place"):
        assert judge(answers, name).startswith("agrees; takes "), name
    assert float(judge(answers, "slow").split()[2]) > 20


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong", "differs: [1, 0] is 6.5, not 6"),
        ("both", "differs: 2 results, not 1"),
        ("stub", "not written yet: stub in "),
        ("broken", "raises AttributeError: 'Tensor' object has no attribute 'no_such_method'"),
        ("ends", "raises SystemExit: 3"),
        ("no_result", "differs: returns nothing"),
        ("missing", "raises AttributeError: "),
    ],
)
def test_other_answers_are_told_apart(answers, name, message):
    assert judge(answers, name).startswith(message)


def test_shapes_are_compared_before_values(answers):
    x = torch.ones(2, 3)
    assert verdict(answers, "transposed", (x,), lambda x: x * 2) == (
        "differs: its shape is (3, 2), not (2, 3)"
    )


def test_a_file_that_cannot_be_read_is_no_error_of_the_notebook(answers):
    answers.write_text("def double(x:\n")
    assert judge(answers, "double").startswith("raises SyntaxError")


def test_the_learners_file_is_found_by_the_number_of_the_lesson(monkeypatch, tmp_path, capsys):
    (tmp_path / "01_sparse.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "01_solutions.py").write_text("")
    monkeypatch.setattr(notebook, "EXERCISES", tmp_path)
    compare("01", "f", torch.ones(2), reference=lambda x: x)
    assert capsys.readouterr().out.startswith("yours      agrees; takes ")


def test_a_notebook_may_start_twice_and_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        for _ in range(2):
            start()
            assert Path("lessons").is_dir()
            assert torch.rand(1).item() == pytest.approx(0.4962566)
    finally:
        torch.set_num_threads(threads)


def test_the_verdicts_are_rows_of_the_article_page(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", lambda markdown: shown.append(markdown.data))
    show_verdicts("V2.6", "V2.1")
    head, _, *rows = shown[0].splitlines()
    assert head == "| id | the article claims | what is known |"
    assert [row.split(" | ")[0] for row in rows] == ["| V2.6", "| V2.1"]
    page = notebook.ARTICLE.read_text(encoding="utf-8").splitlines()
    assert all(row in page for row in rows)
    with pytest.raises(KeyError):
        show_verdicts("V2.99")


def test_a_view_compares_what_different_answers_share(answers):
    arguments = (torch.tensor([[1.0, 2], [3, 4]]),)
    assert verdict(answers, "wrong", arguments, lambda x: x * 2).startswith("differs")
    same = verdict(answers, "wrong", arguments, lambda x: x * 2, view=lambda y: y[0])
    assert same.startswith("agrees")
