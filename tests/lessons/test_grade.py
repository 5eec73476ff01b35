"""Grading as a learner meets it: the stubs, the solutions, files half done, files that are broken."""

import ast
import math
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import check_01
import check_02
import check_03
import check_04
import grade
import pytest
import torch
from torch import nn

FOLDER = Path(grade.__file__).parent
ONE = "dense_attention"


class Lesson(NamedTuple):
    grader: ModuleType
    stubs: Path
    solutions: Path
    names: list[str]
    needed: list[str]


def lesson(grader, title):
    number, names = title[:2], [step.name for step in grader.STEPS]
    needed = [step.name for step in grader.STEPS if not step.optional]
    return Lesson(grader, FOLDER / f"{title}.py", FOLDER / f"{number}_solutions.py", names, needed)


FIRST = lesson(check_01, "01_sparse_attention")
LESSONS = [
    FIRST,
    lesson(check_02, "02_mixture_of_experts"),
    lesson(check_03, "03_multimodal"),
    lesson(check_04, "04_scaling"),
]
NAMES, SOLUTIONS = FIRST.names, FIRST.solutions
each = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stubs.stem)


@pytest.fixture
def attempt(tmp_path, capsys):
    """Grade a text, or a path: (exit status, lines printed)."""

    def call(text_or_path, lesson=FIRST):
        path = text_or_path
        if isinstance(path, str):
            path = tmp_path / "mine.py"
            path.write_text(text_or_path)
        status = grade.main(lesson.grader.STEPS, lesson.stubs, [str(path)])
        return status, capsys.readouterr().out.splitlines()

    return call


def replaced(source, name, body):
    """The source with another body for one of its functions."""
    tree = ast.parse(source)
    function = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
    )
    function.body = ast.parse(body).body
    return ast.unparse(tree)


@each
def test_the_solutions_pass(attempt, lesson):
    status, lines = attempt(lesson.solutions, lesson)
    assert status == 0
    assert [line.split()[1:3] for line in lines] == [[name, "OK"] for name in lesson.names]


@each
def test_the_stubs_fail_each_step_by_its_first_line(attempt, lesson):
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", lesson.stubs], cwd=FOLDER, capture_output=True
    )
    if changed.returncode == 1:
        pytest.skip("you have begun to fill them in")
    status, lines = attempt(lesson.stubs, lesson)
    stubs = grade.load_file(lesson.stubs)
    assert status == 1
    for line, name in zip(lines, lesson.names, strict=True):
        assert "not done yet: " + getattr(stubs, name).__doc__.splitlines()[0] in line


@each
def test_stubs_and_solutions_have_the_same_signatures(lesson):
    def signatures(path):
        functions = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
        ]
        return {
            f.name: (ast.unparse(f.args), ast.unparse(f.returns))
            for f in functions
            if f.name in lesson.names
        }

    assert list(signatures(lesson.stubs)) == lesson.names
    assert signatures(lesson.stubs) == signatures(lesson.solutions)


@each
def test_a_bonus_may_stay_undone_but_not_be_wrong(attempt, lesson):
    source = lesson.solutions.read_text()
    for name in set(lesson.names) - set(lesson.needed):
        assert attempt(replaced(source, name, "raise NotImplementedError"), lesson)[0] == 0
        assert attempt(replaced(source, name, "return 1"), lesson)[0] == 1


@pytest.mark.parametrize(
    ("lesson", "name"), [(lesson, name) for lesson in LESSONS for name in lesson.needed]
)
def test_each_other_step_is_needed(attempt, lesson, name):
    status, lines = attempt(
        replaced(lesson.solutions.read_text(), name, "raise NotImplementedError"), lesson
    )
    assert status == 1
    assert "not done yet" in lines[lesson.names.index(name)]


def test_a_wrong_step_does_not_stop_the_others(attempt):
    status, lines = attempt(replaced(SOLUTIONS.read_text(), ONE, "return q"))
    assert status == 1
    assert [line.endswith("OK") or line.endswith("OK (bonus)") for line in lines] == [False] + [
        True
    ] * 5


def test_a_step_that_waits_for_another_says_for_which(attempt):
    _, lines = attempt(replaced(SOLUTIONS.read_text(), "pool_blocks", "raise NotImplementedError"))
    assert "not done yet: it calls pool_blocks" in lines[NAMES.index("select_blocks")]


def test_an_exception_is_named_with_its_line(attempt):
    source = replaced(SOLUTIONS.read_text(), ONE, "return q @ k")
    number = next(
        i for i, line in enumerate(source.splitlines(), 1) if line.strip() == "return q @ k"
    )
    assert f"raises RuntimeError at line {number}: " in attempt(source)[1][0]


def test_an_operation_that_torch_lacks_is_not_a_stub(attempt):
    source = replaced(SOLUTIONS.read_text(), ONE, "raise NotImplementedError('not for Half')")
    assert "raises NotImplementedError at line" in attempt(source)[1][0]


def test_a_missing_function_is_missed(attempt):
    status, lines = attempt(SOLUTIONS.read_text().replace("def dense_attention", "def dense"))
    assert status == 1
    assert "dense_attention  is not in the file" in lines[0]
    assert attempt(SOLUTIONS.read_text().replace("def select_for_tile", "def bonus"))[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\ndef f(:\n", "line 2: Python cannot read it"),
        (
            "import torch\n\nq = k\n",
            "stops while it is loaded: NameError at line 3: name 'k' is not defined",
        ),
        ("raise SystemExit(0)", "stops while it is loaded: SystemExit"),
        (Path("no_such_file.py"), "there is no such Python file"),
        (Path(__file__).parent, "there is no such Python file"),
        (Path("notes.txt"), "there is no such Python file"),
    ],
)
def test_a_broken_file_gives_status_2_and_one_line(attempt, text, message):
    status, lines = attempt(text)
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]


@each
def test_the_command_grades_the_stubs_by_default(lesson):
    done = subprocess.run([sys.executable, lesson.grader.__file__], capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stdout.splitlines()] == lesson.names
    assert not done.stderr


PAIR = grade.Step("pair", lambda answer: answer(), returns=("weights", "experts"))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([torch.ones(1)] * 2, "OK"),
        (torch.ones(2), "returns a Tensor, not the 2 tensors weights, experts"),
        ((torch.ones(2),), "returns a tuple of 1, not the 2 tensors weights, experts"),
        ((torch.ones(2), None), "returns nothing as its experts, not a tensor"),
        (None, "returns nothing, not the 2 tensors weights, experts"),
    ],
)
def test_a_step_may_return_several_tensors(out, message):
    assert grade.grade_step(PAIR, lambda: out, Path(__file__)).message == message


def judged(function, *arguments):
    return grade.grade_step(
        grade.Step("one", lambda answer: answer(*arguments)), function, Path(__file__)
    ).message


def endless():
    while True:
        try:
            sum(range(1000))
        except Exception:
            continue


def test_a_call_without_end_is_a_mistake(monkeypatch):
    monkeypatch.setattr(grade, "TIME_LIMIT", 0.05)
    number = endless.__code__.co_firstlineno
    assert re.search(
        rf"is not done after 0.05 seconds at line ({number}|{number + 1}|{number + 3}): an endless",
        judged(endless),
    )
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_where_there_is_no_signal_it_grades_without_one():
    with ThreadPoolExecutor() as pool:
        assert pool.submit(judged, lambda: torch.ones(1)).result() == "OK"


def test_an_answer_that_leaves_the_program_does_not_end_the_grader():
    assert "raises SystemExit at line" in judged(lambda: sys.exit(3))


def test_nan_in_an_argument_is_no_change():
    x = torch.tensor([1, math.nan])
    assert judged(lambda x: x + 1, x) == "OK"
    assert "in place" in judged(lambda x: x.fill_(math.nan), x)
    assert "in place" in judged(lambda x: x.unsqueeze_(0), x)


def test_a_parameter_may_be_changed():
    parameter = nn.Parameter(torch.ones(()))
    assert judged(lambda x: x.data.add_(1), parameter) == "OK"
    assert parameter == 2


def test_a_gradient_of_nan_is_not_right():
    x = {"x": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(grade.Mistake, match="gradient of x is NaN"):
        grade.expect_gradients(lambda x: x.square().sum().sqrt() * 0, lambda x: x.sum() * 0, x)
