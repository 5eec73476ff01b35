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


@pytest.mark.parametrize("fresh", [True, False])
def test_a_stopped_run_is_refused(tmp_path, monkeypatch, fresh):
    out = tmp_path / "run"

    def stopped_run(command, **_):  # as train.py on SIGTERM: metrics, no picture, exit code 0
        out.mkdir(exist_ok=True)
        (out / "metrics.jsonl").write_text('{"step": 1}\n')

    monkeypatch.setattr(runs.subprocess, "run", stopped_run)
    with pytest.raises(runs.UserError, match="stopped before its last step"):
        runs.run_training(out, ["v0-tiny"], fresh)


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    (tmp_path / "loss.png").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: pytest.fail("it was repeated"))
    assert runs.run_training(tmp_path, ["v0-tiny"])[1] == [{"step": 1}, {"step": 2}]


def test_peak_memory_does_not_include_the_parent_process():
    # 512 MiB, far above the peak of a child process that holds little more than torch
    held = torch.ones(1 << 27)
    command = [sys.executable, "-c", MEASURE]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    increase = int(result.stdout)
    assert 0.95 < increase / (4 << 25) < 1.2 and len(held)


def test_updating_expected_results_keeps_those_of_other_benches(tmp_path):
    path = tmp_path / "expected.json"
    v0 = {"v0-tiny/pydocs": {"val_bpb": 2.0}}
    runs.update_expected(path, v0 | {"v3-tiny/scenes": {"val_recall1": 0.9}})
    runs.update_expected(path, {"v3-tiny/scenes": {"val_recall1": 0.99}})
    assert json.loads(path.read_text()) == v0 | {"v3-tiny/scenes": {"val_recall1": 0.99}}
