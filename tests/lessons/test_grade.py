"""Grading as a learner meets it: the stubs, the solutions, files half done, files that are broken."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "lessons" / "exercises"
STUBS, SOLUTIONS = FOLDER / "01_sparse_attention.py", FOLDER / "01_solutions.py"
sys.path.insert(0, str(FOLDER))  # as for a script that is run from there

import check_01  # noqa: E402
import grade  # noqa: E402

NAMES = [step.name for step in check_01.STEPS]
ONE = "dense_attention"


@pytest.fixture
def attempt(tmp_path, capsys):
    """Grade a text, or a path: (exit status, lines printed)."""

    def call(text_or_path):
        path = text_or_path
        if isinstance(path, str):
            path = tmp_path / "mine.py"
            path.write_text(text_or_path)
        status = grade.main(check_01.STEPS, STUBS, [str(path)])
        return status, capsys.readouterr().out.splitlines()

    return call


def replaced(source, name, body):
    """The source with another body for one of its functions."""
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    function.body = ast.parse(body).body
    return ast.unparse(tree)


def test_the_solutions_pass(attempt):
    status, lines = attempt(SOLUTIONS)
    assert status == 0
    assert [line.split()[1:3] for line in lines] == [[name, "OK"] for name in NAMES]


def test_the_stubs_fail_each_step_by_its_first_line(attempt):
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", STUBS], cwd=FOLDER, capture_output=True).returncode == 1:
        pytest.skip("you have begun to fill them in")
    status, lines = attempt(STUBS)
    stubs = grade.load(STUBS)
    assert status == 1
    for line, name in zip(lines, NAMES, strict=True):
        assert "not done yet: " + getattr(stubs, name).__doc__.splitlines()[0] in line


def test_stubs_and_solutions_have_the_same_signatures():
    def signatures(path):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        return {f.name: (ast.unparse(f.args), ast.unparse(f.returns)) for f in functions if f.name in NAMES}

    assert list(signatures(STUBS)) == NAMES
    assert signatures(STUBS) == signatures(SOLUTIONS)


def test_the_bonus_may_stay_undone_but_not_be_wrong(attempt):
    source = SOLUTIONS.read_text()
    assert attempt(replaced(source, NAMES[-1], "raise NotImplementedError"))[0] == 0
    assert attempt(replaced(source, NAMES[-1], "return q"))[0] == 1


@pytest.mark.parametrize("name", NAMES[:-1])
def test_each_other_step_is_needed(attempt, name):
    status, lines = attempt(replaced(SOLUTIONS.read_text(), name, "raise NotImplementedError"))
    assert status == 1
    assert "not done yet" in lines[NAMES.index(name)]


def test_a_wrong_step_does_not_stop_the_others(attempt):
    status, lines = attempt(replaced(SOLUTIONS.read_text(), ONE, "return q"))
    assert status == 1
    assert [line.endswith("OK") or line.endswith("OK (bonus)") for line in lines] == [False] + [True] * 5


def test_a_step_that_waits_for_another_says_for_which(attempt):
    _, lines = attempt(replaced(SOLUTIONS.read_text(), "pool_blocks", "raise NotImplementedError"))
    assert "not done yet: it calls pool_blocks" in lines[NAMES.index("select_blocks")]


def test_an_exception_is_named_with_its_line(attempt):
    source = replaced(SOLUTIONS.read_text(), ONE, "return q @ k")
    number = next(i for i, line in enumerate(source.splitlines(), 1) if line.strip() == "return q @ k")
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
        ("import torch\n\nq = k\n", "stops while it is loaded: NameError at line 3: name 'k' is not defined"),
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


def test_the_command_grades_the_stubs_by_default():
    done = subprocess.run([sys.executable, FOLDER / "check_01.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stdout.splitlines()] == NAMES
    assert not done.stderr
