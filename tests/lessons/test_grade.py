"""Grade as a learner does: the stubs, the solutions, incomplete files and broken files."""

import ast
import builtins
import io
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import grade
import pytest
import sandbox
import steps_00
import steps_01
import steps_02
import steps_03
import steps_04
import steps_05
import steps_06
import steps_07
import steps_08
import torch
from torch import nn

FOLDER = Path(grade.__file__).parent
STEP_1 = "dense_attention"  # the first step of lesson 01


class Lesson(NamedTuple):
    grader: ModuleType
    stubs: Path
    solutions: Path
    names: list[str]
    required: list[str]  # the names of the steps that are not a bonus


def make_lesson(grader, title):
    return Lesson(
        grader=grader,
        stubs=FOLDER / f"{title}.py",
        solutions=FOLDER / f"{title[:2]}_solutions.py",
        names=[step.name for step in grader.STEPS],
        required=[step.name for step in grader.STEPS if not step.optional],
    )


LESSON_01 = make_lesson(steps_01, "01_sparse_attention")
LESSONS = [
    make_lesson(steps_00, "00_gpt"),
    LESSON_01,
    make_lesson(steps_02, "02_mixture_of_experts"),
    make_lesson(steps_03, "03_multimodal"),
    make_lesson(steps_04, "04_scaling"),
    make_lesson(steps_05, "05_planning"),
    make_lesson(steps_06, "06_compression"),
    make_lesson(steps_07, "07_adapt"),
    make_lesson(steps_08, "08_serving"),
]
NAMES, SOLUTIONS = LESSON_01.names, LESSON_01.solutions
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stubs.stem)


@pytest.fixture
def run_grader(tmp_path, capsys):
    """Return a function that grades a text or a file in this process: (exit status, lines)."""

    def run(text_or_path, lesson=LESSON_01):
        path = text_or_path
        if isinstance(path, str):
            path = tmp_path / "my_answers.py"
            path.write_text(text_or_path)
        status = grade.main(lesson.grader.STEPS, [str(path)])
        return status, capsys.readouterr().out.splitlines()

    return run


def functions_of(tree):
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def replace_body(source, name, body):
    """Return the source with another body for the function of that name."""
    tree = ast.parse(source)
    function = next(function for function in functions_of(tree) if function.name == name)
    function.body = ast.parse(body).body
    return ast.unparse(tree)


@each_lesson
def test_the_solutions_pass(run_grader, lesson):
    status, lines = run_grader(lesson.solutions, lesson)
    assert status == 0
    assert [line.split()[1:3] for line in lines[:-1]] == [[name, "OK"] for name in lesson.names]
    assert lines[-1] == "All exercises pass."


@each_lesson
def test_the_stubs_fail_and_print_the_first_line_of_each_docstring(run_grader, lesson):
    diff = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", lesson.stubs], cwd=FOLDER, capture_output=True
    )
    if diff.returncode == 1:
        pytest.skip("the stubs have been edited")
    status, lines = run_grader(lesson.stubs, lesson)
    stubs = grade.load_file(lesson.stubs)
    assert status == sandbox.OPEN
    assert lines[-1] == f"Open exercises: {', '.join(lesson.required)}"
    for line, name in zip(lines[:-1], lesson.names, strict=True):
        assert "not done yet: " + getattr(stubs, name).__doc__.splitlines()[0] in line


@each_lesson
def test_stubs_and_solutions_have_the_same_signatures(lesson):
    def signatures(path):
        return {
            f.name: (ast.unparse(f.args), ast.unparse(f.returns))
            for f in functions_of(ast.parse(path.read_text()))
            if f.name in lesson.names
        }

    assert list(signatures(lesson.stubs)) == lesson.names
    assert signatures(lesson.stubs) == signatures(lesson.solutions)


@each_lesson
def test_a_bonus_may_be_undone_but_not_wrong(run_grader, lesson):
    source = lesson.solutions.read_text()
    for name in set(lesson.names) - set(lesson.required):
        undone = replace_body(source, name, "raise NotImplementedError")
        status, lines = run_grader(undone, lesson)
        assert status == 0
        assert lines[-1] == f"All exercises pass. Not done: the bonus {name}."
        assert run_grader(replace_body(source, name, "return 1"), lesson)[0] == sandbox.OPEN


@pytest.mark.parametrize(
    ("lesson", "name"), [(lesson, name) for lesson in LESSONS for name in lesson.required]
)
def test_each_required_step_must_be_done(run_grader, lesson, name):
    undone = replace_body(lesson.solutions.read_text(), name, "raise NotImplementedError")
    status, lines = run_grader(undone, lesson)
    assert status == sandbox.OPEN
    assert "not done yet" in lines[lesson.names.index(name)]
    assert name in lines[-1]


def test_a_wrong_step_does_not_stop_the_others(run_grader):
    status, lines = run_grader(replace_body(SOLUTIONS.read_text(), STEP_1, "return q"))
    assert status == sandbox.OPEN
    passed = [line.endswith("OK") or line.endswith("OK (bonus)") for line in lines[:-1]]
    assert passed == [False] + [True] * 5


def test_a_step_that_calls_a_stub_names_it(run_grader):
    undone = replace_body(SOLUTIONS.read_text(), "pool_blocks", "raise NotImplementedError")
    _, lines = run_grader(undone)
    assert "not done yet: it calls pool_blocks" in lines[NAMES.index("select_blocks")]


def test_an_exception_is_reported_with_its_line(run_grader):
    source = replace_body(SOLUTIONS.read_text(), STEP_1, "return q @ k")
    stripped_lines = [line.strip() for line in source.splitlines()]
    number = stripped_lines.index("return q @ k") + 1
    assert f"raises RuntimeError at line {number}: " in run_grader(source)[1][0]


def test_a_not_implemented_error_of_torch_is_not_a_stub(run_grader):
    body = "raise NotImplementedError('not for Half')"
    source = replace_body(SOLUTIONS.read_text(), STEP_1, body)
    assert "raises NotImplementedError at line" in run_grader(source)[1][0]


def test_a_missing_function_is_reported(run_grader):
    source = SOLUTIONS.read_text()
    status, lines = run_grader(source.replace("def dense_attention", "def dense"))
    assert status == sandbox.OPEN
    assert "dense_attention  is not in the file" in lines[0]
    assert run_grader(source.replace("def select_for_tile", "def bonus"))[0] == 0


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
def test_a_file_that_cannot_be_loaded_gives_status_2_and_one_line(run_grader, text, message):
    status, lines = run_grader(text)
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]


@each_lesson
def test_each_command_grades_the_file_of_its_lesson(lesson, monkeypatch, capsys):
    graded = []

    def grade_file(script, file):
        graded.extend([script, file])
        return [{"name": "a", "optional": False, "verdict": "not done", "message": "?"}], [], ""

    monkeypatch.setattr(sandbox, "grade", grade_file)
    monkeypatch.setattr(sys, "argv", ["check"])
    command = FOLDER / f"check_{lesson.stubs.name[:2]}.py"
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(command), run_name="__main__")
    assert ended.value.code == sandbox.OPEN
    assert graded == [Path(lesson.grader.__file__), lesson.stubs]
    assert capsys.readouterr().out == "1 a  ?\nOpen exercises: a\n"


MISBEHAVING = """
import os

def dense_attention(q, k, v):
    print("printed \N{GREEK SMALL LETTER ALPHA}")
    os._exit(0)

def topk_attention(q, k, v, top_k):
    while True:
        try:
            print("flood " * 1000)
        except BaseException:
            continue

def pool_blocks(k, block_size):
    raise NotImplementedError
"""


def test_an_answer_that_ends_hangs_or_floods_the_grader_is_reported(tmp_path, monkeypatch, capsys):
    path = tmp_path / "my answers.py"
    path.write_text(MISBEHAVING, encoding="utf-8")
    monkeypatch.setattr(sandbox.grade, "__defaults__", (0.5,))
    assert sandbox.main(LESSON_01.stubs.name, [str(path)]) == sandbox.OPEN
    printed, *_, cut, first, second, third, _, _, _, left = capsys.readouterr().out.splitlines()
    assert printed == "printed \N{GREEK SMALL LETTER ALPHA}"
    assert re.search(r"your file printed [\d,]+ bytes more, which are not shown", cut)
    assert "ends the process (exit status 0): return a result instead" in first
    assert re.search(
        r"does not finish within 0.5 seconds at line (9|1\d): is there an endless loop", second
    )
    assert "not done yet" in third
    assert left.startswith("Open exercises: dense_attention, topk_attention, pool_blocks")


class Ended(Exception):  # noqa: N818
    pass


def records_of(source, tmp_path, step=None):
    """Return the records of the worker that grades a file, run in this process."""

    def end(status):
        raise Ended

    (tmp_path / "answers.py").write_text(source)
    worker = grade.Worker(
        tmp_path / "answers.py", tmp_path / "records", [step or ONE_STEP], time_limit=10
    )
    worker.exit = end
    with pytest.raises(Ended):
        worker.run(0)
    worker.file.close()
    return sandbox.read_records(tmp_path / "records")


ONE_STEP = grade.Step("answer", lambda answer: answer())


@pytest.fixture
def restored(monkeypatch):
    """Restore after the test what an answer may have replaced."""
    for owner, name in (
        (torch, "allclose"),
        (torch.nn.functional, "softmax"),
        (builtins, "abs"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    before = dict(vars(torch.Tensor))
    yield
    for name in vars(torch.Tensor).keys() - before.keys():
        delattr(torch.Tensor, name)


@pytest.mark.parametrize("when", ["called", "loaded"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("torch.allclose = lambda *a, **k: True", "replaces torch.allclose"),
        ("torch.Tensor.abs = lambda x: 0 * x", "replaces torch.Tensor.abs"),
        ("torch.nn.functional.softmax = None", "replaces torch.nn.functional.softmax"),
        ("builtins.abs = lambda x: 0", "replaces abs, which the grader uses too"),
        ("sys.stdout = io.StringIO()", "closes or replaces sys.stdout"),
        ("sys.stdout.close()", "closes or replaces sys.stdout"),
    ],
)
def test_an_answer_that_silences_the_grader_is_reported(
    tmp_path, monkeypatch, restored, when, change, message
):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    source = "import builtins, io, sys\nimport torch\n"
    if when == "loaded":
        assert message in records_of(source + change, tmp_path)[-1]["unusable"]
    else:
        source += f"def answer():\n    {change}\n    return torch.ones(1)\n"
        last = records_of(source, tmp_path)[-1]
        assert last["verdict"] == "wrong"
        assert message in last["message"]


def test_the_worker_writes_a_record_before_and_after_each_step(tmp_path):
    loading, begun, graded = records_of("import torch\nanswer = lambda: torch.ones(1)", tmp_path)
    assert loading["step"] == sandbox.LOADING
    assert begun == {"step": 0, "count": 1, "name": "answer", "optional": False}
    assert graded == begun | {"verdict": "ok", "message": "OK"}


TWO_TENSORS = grade.Step("pair", lambda answer: answer(), returns=("weights", "experts"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([torch.ones(1)] * 2, "OK"),
        (torch.ones(2), "returns a Tensor, not the 2 tensors weights, experts"),
        ((torch.ones(2),), "returns a tuple of 1, not the 2 tensors weights, experts"),
        ((torch.ones(2), None), "returns nothing as its experts, not a tensor"),
        (None, "returns nothing, not the 2 tensors weights, experts"),
    ],
)
def test_a_step_may_return_several_tensors(output, message):
    assert grade.grade_step(TWO_TENSORS, lambda: output, Path(__file__)).message == message


def message_for(function, *arguments):
    """Return the grader's message for a function that is called once, with these arguments."""
    step = grade.Step("one", lambda answer: answer(*arguments))
    return grade.grade_step(step, function, Path(__file__)).message


def test_an_answer_that_exits_does_not_end_the_grader():
    assert "raises SystemExit at line" in message_for(lambda: sys.exit(3))


def test_nan_in_an_argument_does_not_count_as_a_change():
    x = torch.tensor([1, math.nan])
    assert message_for(lambda x: x + 1, x) == "OK"
    assert "in place" in message_for(lambda x: x.fill_(math.nan), x)
    assert "in place" in message_for(lambda x: x.unsqueeze_(0), x)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x.to_sparse(), "sparse"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: x + 1j, "complex"),
    ],
)
def test_a_tensor_that_the_grader_cannot_compare_is_a_mistake(make, kind):
    assert f"that is {kind}" in message_for(lambda: make(torch.ones(2)))


@pytest.mark.parametrize(
    ("given", "right", "texts"),
    [
        (0.25, 0.5, ("0.2500", "0.5000")),
        (-0.23901, -0.23899, ("-0.23901", "-0.23899")),
        (1e-12, 2e-12, ("0.000000000001", "0.000000000002")),
        (1e-30, 2e-30, ("1e-30", "2e-30")),
        (torch.tensor(0.25), math.nan, ("0.2500", "nan")),
    ],
)
def test_two_different_numbers_are_never_printed_alike(given, right, texts):
    assert grade.different_digits(given, right) == texts


def test_an_answer_may_change_a_parameter():
    parameter = nn.Parameter(torch.ones(()))
    assert message_for(lambda x: x.data.add_(1), parameter) == "OK"
    assert parameter == 2


def test_a_nan_gradient_is_wrong():
    x = {"x": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(grade.Mistake, match="gradient of x is NaN"):
        grade.expect_gradients(lambda x: x.square().sum().sqrt() * 0, lambda x: x.sum() * 0, x)
