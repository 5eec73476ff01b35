"""What the benches share: a run that was stopped is not taken for a finished one; a peak of memory is a process's own."""

import json
import subprocess
import sys

import pytest
import torch

from nanods.bench import runs

MEASURE = "import torch; from nanods.bench.runs import peak_memory_increase; print(peak_memory_increase(lambda: torch.ones(1 << 25)))"


@pytest.mark.parametrize("fresh", [True, False])
def test_a_stopped_run_is_refused(tmp_path, monkeypatch, fresh):
    out = tmp_path / "run"

    def stopped(command, **_):  # as train.py on SIGTERM: metrics, no picture, exit code 0
        out.mkdir(exist_ok=True)
        (out / "metrics.jsonl").write_text('{"step": 1}\n')

    monkeypatch.setattr(runs.subprocess, "run", stopped)
    with pytest.raises(runs.UserError, match="stopped before its last step"):
        runs.run_training(out, ["v0-tiny"], fresh)


def test_a_finished_run_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "loss.png").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: pytest.fail("it was run again"))
    assert runs.run_training(tmp_path, ["v0-tiny"])[1] == [{"step": 1}, {"step": 2}]


def test_a_peak_is_not_that_of_the_process_that_started_it():
    held = torch.ones(
        1 << 27
    )  # 512 MiB, far above the peak of a child that has little more than torch
    rise = int(
        subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        ).stdout
    )
    assert 0.95 < rise / (4 << 25) < 1.2 and len(held)


def test_what_one_bench_expects_does_not_forget_anothers(tmp_path):
    path = tmp_path / "expected.json"
    runs.update_expected(
        path, {"v0-tiny/pydocs": {"val_bpb": 2.0}, "v3-tiny/scenes": {"val_recall1": 0.9}}
    )
    runs.update_expected(path, {"v3-tiny/scenes": {"val_recall1": 0.99}})
    assert json.loads(path.read_text()) == {
        "v0-tiny/pydocs": {"val_bpb": 2.0},
        "v3-tiny/scenes": {"val_recall1": 0.99},
    }
