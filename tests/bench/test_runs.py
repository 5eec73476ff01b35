"""Shared code of the benches: stopped and finished runs, peak memory, expected.json."""

import json
import subprocess
import sys

import pytest
import torch

from nanods.bench import runs

MEASURE = """
import torch
from nanods.bench.runs import peak_memory_increase

print(peak_memory_increase(lambda: torch.ones(1 << 25)))
"""


class Ended:
    """A process of train.py that has ended."""

    def __init__(self, returncode):
        self.returncode = returncode


def test_a_stopped_run_is_refused(tmp_path):
    out = tmp_path / "run"  # as train.py leaves it on SIGTERM: metrics, exit code 0
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(runs.UserError, match="stopped before its last step"):
        runs.read_training(out, Ended(0))


def test_a_failed_run_is_refused_with_its_last_line(tmp_path):
    (tmp_path / "run.log").write_text("device\nerror: no such data\n\n")
    with pytest.raises(runs.UserError, match=r"exit code 2 .* error: no such data$"):
        runs.read_training(tmp_path / "run", Ended(2))


def test_a_run_has_one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    (tmp_path / "train.py").write_text(code)
    assert runs.start_training(tmp_path / "runs/a", ["v0-tiny"]).wait() == 0
    assert (tmp_path / "runs/a.log").read_text() == "1 1\n"


def test_peak_memory_does_not_include_the_parent_process():
    # 512 MiB, far above the peak of a child process that holds little more than torch
    held = torch.ones(1 << 27)
    command = [sys.executable, "-c", MEASURE]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    increase = int(result.stdout)
    assert 0.95 < increase / (4 << 25) < 1.2 and len(held)


def test_flags_from_a_dict_name_what_is_on_and_what_is_off():
    words = runs.flags_from_dict({"lr": 0.02, "equal-neurons": True, "hidden": False})
    assert words == ["--lr", "0.02", "--equal-neurons", "--no-hidden"]
    words = runs.flags_from_dict({"a.b-c": False, "pairs": ("x", "y"), "n": 1})
    assert words == ["--a.no-b-c", "--pairs", "x", "y", "--n", "1"]


def test_updating_expected_results_keeps_those_of_other_benches(tmp_path):
    path = tmp_path / "expected.json"
    v0 = {"v0-tiny/pydocs": {"val_bpb": 2.0}}
    runs.update_expected(path, v0 | {"v3-tiny/scenes": {"val_recall1": 0.9}})
    runs.update_expected(path, {"v3-tiny/scenes": {"val_recall1": 0.99}})
    assert json.loads(path.read_text()) == v0 | {"v3-tiny/scenes": {"val_recall1": 0.99}}
