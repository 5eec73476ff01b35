"""The Makefile, with a stub for Python: no environment is built."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")

# It writes down its arguments, makes a virtual environment of itself, and grades with $GRADE.
STUB = """#!/bin/sh
echo "$@" >> log
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-I -c"*) test ! -e moved ;;
  *check_01.py*) echo "Open exercises: dense_attention"; exit "$GRADE" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A clone with an environment, in a folder with blanks in its name."""
    clone = tmp_path / "a clone (copy)"
    clone.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    (clone / "python").write_text(STUB)
    (clone / "python").chmod(0o755)
    assert make(clone, "setup").returncode == 0
    (clone / "log").unlink()
    return clone


def make(clone, *arguments, grade="0"):
    return subprocess.run(
        ["make", "PYTHON=./python", *arguments],
        cwd=clone,
        env={"PATH": "/usr/bin:/bin", "GRADE": grade},
        capture_output=True,
        text=True,
    )


def test_an_environment_is_set_up_once(clone):
    assert make(clone, "train-v0").returncode == 0
    log = (clone / "log").read_text()
    assert "venv" not in log and log.endswith("train.py v0-tiny\n")


def test_help_is_printed_to_its_end(clone):
    made = make(clone, "help")
    assert made.returncode == 0 and not made.stderr
    assert "make train-v0" in made.stdout and "make clean" in made.stdout


def test_a_moved_clone_builds_its_environment_anew_and_says_so(clone):
    (clone / "moved").touch()  # the environment's Python finds nanods elsewhere
    made = make(clone, "train-v0")
    assert made.returncode == 0, made.stderr
    assert "was this one moved?" in made.stdout
    log = (clone / "log").read_text()
    assert "-m venv .venv" in log and "install" in log and log.endswith("train.py v0-tiny\n")
    (clone / "moved").unlink()
    (clone / "log").unlink()
    assert make(clone, "train-v0").returncode == 0
    assert "venv" not in (clone / "log").read_text()


def test_an_environment_whose_python_is_gone_is_built_anew(clone):
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to("/no/such/python3.11")
    assert make(clone, "train-v0").returncode == 0
    assert "-m venv .venv" in (clone / "log").read_text()


def test_open_exercises_are_no_error_of_make(clone):
    made = make(clone, "check-01", grade="3")
    assert made.returncode == 0 and made.stdout == "Open exercises: dense_attention\n"
    assert "Error" not in made.stderr
    for code in ("1", "2"):  # a traceback of Python, a file that cannot be read
        assert make(clone, "check-01", grade=code).returncode == 2


def test_arguments_reach_jupyter(clone):
    assert "lab --no-browser lessons" in make(clone, "-n", "notebook", "ARGS=--no-browser").stdout


def test_data_may_have_blanks_and_apostrophes(clone):
    made = make(clone, "train-v3", "DATA=Jo's photos", "ARGS=--steps 9")
    assert made.returncode == 0, made.stderr
    assert "train.py v3-tiny --data Jo's photos --steps 9\n" in (clone / "log").read_text()
    assert "--data 'my text.txt'" in make(clone, "-n", "train-v1", "DATA=my text.txt").stdout
    assert "--data" not in make(clone, "-n", "train-v1").stdout


def test_the_emoji_have_a_preset_and_bring_their_packages(clone):
    for name in ("train", "sample"):
        made = make(clone, f"{name}-v3", "DATA=emoji")
        assert made.returncode == 0, made.stderr
    log = (clone / "log").read_text()
    assert log.count("install -q -c constraints.txt -e .[emoji]\ntrain.py v3-emoji") == 1
    assert log.count("emoji]") == 1 and log.endswith("sample.py v3-emoji\n")
    assert "v3-tiny --data 'emoji copy'" in make(clone, "-n", "train-v3", "DATA=emoji copy").stdout
    assert "v1-tiny --data 'emoji'" in make(clone, "-n", "train-v1", "DATA=emoji").stdout


def test_serving_brings_its_packages(clone):
    for _ in range(2):
        assert make(clone, "serve-v2", "ARGS=--port 9000").returncode == 0
    log = (clone / "log").read_text()
    assert log.count("install -q -c constraints.txt -e .[serve]") == 1
    assert log.endswith("-m nanods.serving v2-tiny --port 9000\n")


def test_a_teacher_is_trained_where_there_is_none(clone):
    student = "train.py v1-tiny --teacher runs/v2-tiny --out-dir runs/v1-tiny-distilled --seed 1\n"
    made = make(clone, "distill-v1", "ARGS=--seed 1")
    assert made.returncode == 0, made.stderr
    assert (clone / "log").read_text().endswith(f"train.py v2-tiny\n{student}")
    (clone / "runs/v3-tiny-teacher").mkdir(parents=True)
    (clone / "runs/v3-tiny-teacher/loss.png").touch()
    (clone / "log").unlink()
    assert make(clone, "distill-v3").returncode == 0
    (line,) = [line for line in (clone / "log").read_text().splitlines() if "train.py" in line]
    assert "--n-layer 2 --n-embd 64 --teacher runs/v3-tiny-teacher" in line
    assert line.endswith("--out-dir runs/v3-tiny-distilled")
