"""train.py and sample.py from the outside: what they write, how they resume, and how they refuse
mistakes."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanods.config import PRESETS
from nanods.data.lock import lock
from nanods.errors import UserError
from nanods.run import choose_micro_batch
from nanods.training import checkpoint
from nanods.training.setup import lock_run_directory
from tests.conftest import Killed

TIMINGS = (
    "seconds",
    "cpu_seconds",
    "optimizer_seconds",
    "tokens_per_second",
    "examples_per_second",
)


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def kept_steps(out):
    return [int(path.name.removeprefix("step_")) for path in checkpoint.list_checkpoints(out)]


def weights(out):
    return checkpoint.load(out).path.joinpath("model.safetensors").read_bytes()


@pytest.mark.pictures
@pytest.mark.parametrize("preset", ["v0-tiny", "v1-tiny", "v2-tiny"])
def test_a_run_learns_and_writes_its_files(train_tiny, workspace, preset):
    code, out, err = train_tiny(preset, "--steps", 30, "--save-every", 20)
    assert code == 0, err
    for word in (
        "device     cpu",
        "dtype      ",
        "expected",
        "parameters",
        "MFLOP",
        "GiB",
        "sample",
        "next",
    ):
        assert word in out
    run = workspace / "runs" / preset
    assert (run / "loss.png").stat().st_size > 5000
    assert (run / "sparsity.png").exists() == (preset >= "v1")
    assert (run / "experts.png").exists() == (preset >= "v2")
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[0].keys() >= {"step", "tokens", "train_loss", "lr"} and rows[-1].keys() >= {
        "val_loss",
        "val_bpb",
    }
    assert rows[-1]["tokens"] == 30 * 4 * 32
    assert rows[-1]["val_loss"] < 0.7 * rows[0]["train_loss"]
    assert [path.name for path in checkpoint.list_checkpoints(run)] == [
        "step_000020",
        "step_000030",
    ]
    state = checkpoint.load(run).state
    assert state["micro_batch"] == 4 and state["config"]["model"]["n_embd"] == 16


def test_micro_batches_do_not_change_the_result(train_tiny, workspace):
    for name, size in (("whole", 4), ("parts", 1)):
        code, _, err = train_tiny(
            "v1-tiny", "--steps", 5, "--dtype", "fp64", "--micro-batch", size, "--out-dir", name
        )
        assert code == 0, err
    whole, parts = (checkpoint.load(workspace / name).model for name in ("whole", "parts"))
    assert max((whole[k] - parts[k]).abs().max() for k in whole) < 1e-9


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_each_dtype_trains(train_tiny, workspace, dtype):
    code, _, err = train_tiny("v1-tiny", "--steps", 5, "--dtype", dtype)
    assert code == 0, err
    assert metrics(workspace / "runs/v1-tiny")[-1]["val_loss"] < 5.6


def test_in_fp16_no_optimizer_makes_a_step_whose_gradient_overflowed(
    train_tiny, workspace, monkeypatch
):
    import train

    norms, real = [], train.clip_grad_norm

    def overflow_once(model, limit):
        if len(norms) == 2:
            next(model.parameters()).grad.fill_(float("nan"))  # one parameter of one optimizer
        norms.append(real(model, limit))
        return norms[-1]

    monkeypatch.setattr(train, "clip_grad_norm", overflow_once)
    code, _, err = train_tiny("v1-tiny", "--steps", 5, "--dtype", "fp16")
    assert code == 0, err
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("preset", "flags"),
    [
        ("v1-tiny", ()),
        ("v2-tiny", ("--moe.bias-rate", 0.01, "--moe.capacity-factor", 1)),
        ("v2-tiny", ("--optimizer", "adamw")),
        (
            "v3-tiny",
            ("--moe.bias-rate", 0.01, "--multimodal.entropy-coefficient", 0.1, "--eval-every", 16),
        ),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    train_tiny, workspace, killed_at, preset, flags
):
    """Also with Muon updating the experts in turns, the load, its alarms and the selection bias."""
    assert (
        train_tiny(preset, *flags, "--steps", 32, "--save-every", 14, "--out-dir", "whole")[0] == 0
    )
    with killed_at(29):  # one step after a checkpoint
        train_tiny(preset, *flags, "--steps", 32, "--save-every", 14, "--out-dir", "cut")
    assert metrics(workspace / "cut")[-1]["step"] == 29
    code, out, err = train_tiny(preset, *flags, "--resume", "--out-dir", "cut")
    assert code == 0, err
    assert "after step 28" in out and " for 4 steps of " in out
    assert metrics(workspace / "cut") == metrics(workspace / "whole")
    assert weights(workspace / "cut") == weights(workspace / "whole")
    code, out, _ = train_tiny(preset, *flags, "--resume", "--out-dir", "cut")
    assert code == 0 and "finished" in out


def test_as_many_checkpoints_are_kept_as_asked_for(train_tiny, workspace):
    flags = ("--steps", 8, "--save-every", 2, "--out-dir", "out")
    assert train_tiny("v0-tiny", *flags, "--keep-checkpoints", 3)[0] == 0
    assert kept_steps(workspace / "out") == [4, 6, 8]
    code, _, err = train_tiny("v0-tiny", *flags, "--keep-checkpoints", 0)
    assert code == 2 and "--keep-checkpoints" in err
    assert kept_steps(workspace / "out") == [4, 6, 8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_resumes_bitwise(train_tiny, workspace, monkeypatch, number):
    import train

    real = train.set_learning_rate

    def send_signal(optimizers, step, config):
        if step == 3:
            os.kill(os.getpid(), number)
        return real(optimizers, step, config)

    flags = ("--steps", 8)
    assert train_tiny("v0-tiny", *flags, "--out-dir", "whole")[0] == 0
    monkeypatch.setattr(train, "set_learning_rate", send_signal)
    code, out, _ = train_tiny("v0-tiny", *flags)
    assert code == 0 and "saved after step 4" in out and "--resume" in out
    assert checkpoint.load(workspace / "runs/v0-tiny").state["step"] == 4
    monkeypatch.setattr(train, "set_learning_rate", real)
    assert train_tiny("v0-tiny", *flags, "--resume")[0] == 0
    assert weights(workspace / "runs/v0-tiny") == weights(workspace / "whole")
    assert metrics(workspace / "runs/v0-tiny") == metrics(workspace / "whole")


def test_an_existing_run_is_renamed(train_tiny, workspace):
    assert train_tiny("v0-tiny", "--steps", 2)[0] == 0
    before = weights(workspace / "runs/v0-tiny")
    code, out, _ = train_tiny("v0-tiny", "--steps", 2, "--seed", 1)
    assert code == 0 and "moved" in out
    (aside,) = (workspace / "runs").glob("v0-tiny.2*")
    assert weights(aside) == before != weights(workspace / "runs/v0-tiny")


def test_the_best_checkpoint_is_kept_named_and_remembered(
    train_tiny, program, workspace, monkeypatch
):
    """Evaluated at steps 2, 4, 6 and 8, saved at 3, 6 and 8, and killed after step 6."""
    import train
    from nanods.training.language_task import LanguageTask

    figures = {2: 3.0, 4: 2.0, 6: 2.5, 8: 4.0}
    real_step, steps = train.set_learning_rate, []

    def count(optimizers, step, config):
        steps.append(step + 1)
        if steps == [1, 2, 3, 4, 5, 6, 7]:
            raise Killed
        return real_step(optimizers, step, config)

    def evaluate(self, model):
        return {"val_loss": figures[steps[-1]], "val_bpb": figures[steps[-1]]}

    monkeypatch.setattr(train, "set_learning_rate", count)
    monkeypatch.setattr(LanguageTask, "evaluate", evaluate)
    flags = ("--steps", 8, "--save-every", 3, "--eval-every", 2, "--out-dir", "a run")
    best = workspace / "a run" / "best"
    with pytest.raises(Killed):
        train_tiny("v0-tiny", *flags)
    assert [path.name for path in best.iterdir()] == ["step_000004"]
    code, out, err = train_tiny("v0-tiny", *flags, "--resume")
    assert code == 0, err
    assert "best       step 4: validation loss 2.0000" in out
    assert "sample.py 'a run/best'" in out
    assert [path.name for path in best.iterdir()] == ["step_000004"]
    assert checkpoint.load(best).state["figure"] == 2.0
    assert checkpoint.load(workspace / "a run").state["step"] == 8
    assert program("sample", "a run/best", "--max-new-tokens", 5)[0] == 0


def test_a_second_training_in_the_same_folder_is_refused_before_it_renames_anything(
    train_tiny, program, workspace
):
    assert train_tiny("v0-tiny", "--steps", 2)[0] == 0
    before = sorted(workspace.rglob("*"))
    (workspace / "link").symlink_to(workspace / "runs")
    with lock(workspace / "runs" / ".v0-tiny.lock"):  # as a training does
        for flags in ((), ("--resume",), ("--out-dir", "link/../link/v0-tiny")):
            code, _, err = train_tiny("v0-tiny", "--steps", 3, *flags)
            assert code == 2 and "Traceback" not in err
            assert f"(process {os.getpid()} on " in err and "started 2" in err
            assert "--out-dir" in err
        assert program("sample", "v0-tiny", "--max-new-tokens", 5)[0] == 0
    (workspace / "link").unlink()
    assert sorted(workspace.rglob("*")) == before, "the lock files are deleted in the end"


def test_two_runs_may_make_the_folder_of_runs_at_once(tmp_path, monkeypatch):
    is_dir = Path.is_dir

    def make_it_after_looking(path):
        was_there = is_dir(path)
        if not was_there:
            path.mkdir()
        return was_there

    monkeypatch.setattr(Path, "is_dir", make_it_after_looking)
    with lock_run_directory(tmp_path / "runs" / "v0-tiny"):
        assert (tmp_path / "runs" / ".v0-tiny.lock").exists()


def test_a_loss_that_is_not_finite_stops_the_run(train_tiny, workspace):
    code, _, err = train_tiny("v0-tiny", "--steps", 50, "--lr", "1e38", "--save-every", 1000)
    assert code == 2
    assert "at step" in err and "learning rate" in err and "layer" in err and "Traceback" not in err
    assert all(
        t.isfinite().all() for t in checkpoint.load(workspace / "runs/v0-tiny").model.values()
    )


def test_the_verdict_passes_and_fails(train_tiny, workspace, monkeypatch):
    from nanods import config as ladder
    from nanods.training import report
    from nanods.training.language_task import LanguageTask

    _, out, _ = train_tiny("v0-tiny", "--steps", 3)
    assert "nothing to compare with" in out
    asked = ladder.PRESETS["v0-tiny"]
    row = {"val_loss": 1.0, "val_bpb": 1.5}
    monkeypatch.setattr(report, "EXPECTED", workspace / "expected.json")

    class Task(LanguageTask):
        def __init__(self):
            self.data = type("Data", (), {"sha256": "known"})

    for expected, sha256, word in (
        (1.5, "known", "PASS"),
        (1.4, "known", "FAIL"),
        (1.6, "known", "FAIL"),
    ):
        entry = {"sha256": sha256, "val_bpb": expected, "tolerance": 0.02}
        (workspace / "expected.json").write_text(json.dumps({"v0-tiny/pydocs": entry}))
        assert report.verdict(asked, Task(), row).endswith(word)
    for expected, word in ((1.45, "PASS"), (9.0, "PASS"), (1.3, "FAIL")):
        entry = {"sha256": "another", "val_bpb": expected, "tolerance": 0.02}
        (workspace / "expected.json").write_text(json.dumps({"v0-tiny/pydocs": entry}))
        assert report.verdict(asked, Task(), row).endswith(word)


# ---- sample.py -----------------------------------------------------------------------------------


def test_sampling_streams_text_and_is_reproducible(train_tiny, program, workspace):
    assert train_tiny("v1-tiny", "--steps", 5)[0] == 0
    code, first, err = program(
        "sample", "v1-tiny", "--prompt", "12 times é", "--max-new-tokens", 60, "--top-k", 20
    )
    assert code == 0, err
    assert first.startswith("12 times é")
    assert (
        program(
            "sample",
            "runs/v1-tiny",
            "--prompt",
            "12 times é",
            "--max-new-tokens",
            60,
            "--top-k",
            20,
        )[1]
        == first
    )
    (workspace / "prompt.txt").write_text("12 times é")
    asked = (
        "sample",
        "v1-tiny",
        "--prompt",
        "FILE:prompt.txt",
        "--max-new-tokens",
        60,
        "--top-k",
        20,
    )
    assert program(*asked)[1] == first
    code, out, _ = program(*asked, "--num-samples", 2, "--top-p", 0.9, "--seed", 3)
    assert code == 0 and "sample 1" in out and "sample 2" in out
    for length, said in ((32, False), (33, True)):
        _, out, _ = program("sample", "v1-tiny", "--prompt", "x" * length, "--max-new-tokens", 1)
        assert out.startswith("notice     only the last 32 tokens are read\n") == said


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "no preset": ([], "v1-tiny"),
    "unknown preset": (["v9-tiny"], "v1-tiny"),
    "unknown key": (["v1-tiny", "--step", "3"], "--steps"),
    "a word for a number": (["v1-tiny", "--lr", "abc"], "--lr"),
    "negative steps": (["v1-tiny", "--steps", "-3"], "steps"),
    "zero rate": (["v1-tiny", "--lr", "0"], "--lr"),
    "momentum of one": (["v1-tiny", "--momentum", "1"], "--momentum"),
    "heads that do not divide": (["v1-tiny", "--n-head", "7"], "multiple"),
    "micro-batch that does not divide": (["v1-tiny", "--micro-batch", "3"], "divisor"),
    "parts that do not divide the context": (
        ["v0-tiny", "--short-context", "0.5", "--short-parts", "3"],
        "choose a divisor",
    ),
    "no such device": (["v1-tiny", "--device", "cuda"], "leave the flag out"),
    "unknown data": (["v1-tiny", "--data", "shakespear"], "did you mean shakespeare"),
    "missing file": (["v1-tiny", "--data", "no/such.txt"], "no such data set or file"),
    "empty file": (["v1-tiny", "--data", "empty.txt"], "empty"),
    "binary file": (["v1-tiny", "--data", "binary.txt"], "binary"),
    "not UTF-8": (["v1-tiny", "--data", "latin.txt"], "not UTF-8"),
    "too short": (["v1-tiny", "--data", "short.txt"], "context"),
    "nothing to resume": (["v1-tiny", "--resume"], "no checkpoint"),
    "a file as run directory": (
        ["v1-tiny", "--data", "text.txt", "--out-dir", "text.txt/run"],
        "--out-dir",
    ),
    "no place to write": (
        ["v1-tiny", "--data", "text.txt", "--out-dir", "/proc/nanods"],
        "--out-dir",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_user_mistake_gets_exit_code_2_and_a_fix(program, workspace, mistake):
    if "cuda" in mistake and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (workspace / "empty.txt").write_text("")
    (workspace / "binary.txt").write_bytes(b"\x00\x01" * 500)
    (workspace / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    (workspace / "short.txt").write_text("too short")
    args, fix = MISTAKES[mistake]
    code, out, err = program("train", *args)
    assert code == 2
    assert fix in " ".join((out + err).split())
    assert "Traceback" not in err
    assert not list((workspace / "runs").glob("*/step_*"))


@pytest.mark.parametrize("requested", [None, 4])
def test_a_micro_batch_that_does_not_divide_becomes_smaller_if_the_run_is_resumed(
    requested, capsys
):
    """As --resume refuses another one."""
    config = replace(PRESETS["v0-tiny"], batch_size=12, micro_batch=requested)
    saved = checkpoint.Checkpoint(Path("run"), {"micro_batch": 4})
    two = SimpleNamespace(batch_shards=2)
    assert choose_micro_batch(config, None, None, saved, two) == 2
    message = "micro-batches of 2: the run's 4 does not divide the 6 examples of each process"
    assert message in capsys.readouterr().out
    assert choose_micro_batch(config, None, None, saved, SimpleNamespace(batch_shards=1)) == 4
    with pytest.raises(UserError, match="--micro-batch 4 does not divide the 6 examples"):
        choose_micro_batch(replace(config, micro_batch=4), None, None, None, two)


def test_a_run_in_the_current_folder_is_not_touched(train_tiny, workspace):
    assert train_tiny("v0-tiny", "--steps", 2, "--out-dir", ".")[0] == 0
    before = weights(workspace)
    code, _, err = train_tiny("v0-tiny", "--steps", 3, "--out-dir", ".")
    assert code == 2 and "--out-dir .: a run is there already" in err and "Traceback" not in err
    assert weights(workspace) == before


def test_a_file_that_cannot_be_written_is_named(train_tiny, monkeypatch):
    real = Path.replace

    def replace(temporary, path):
        if path.name == "metrics.jsonl":
            raise OSError(27, "File too large")
        return real(temporary, path)

    monkeypatch.setattr(Path, "replace", replace)
    code, _, err = train_tiny("v0-tiny", "--steps", 2, "--out-dir", "run")
    assert code == 2 and "run/metrics.jsonl: the file system or `ulimit -f` refuses a file" in err
    assert "NANODS_DATA" not in err


def test_a_run_of_another_configuration_is_not_touched(train_tiny, workspace):
    assert train_tiny("v0-tiny", "--steps", 2, "--out-dir", "run")[0] == 0
    before = {path: path.read_bytes() for path in (workspace / "run").rglob("*") if path.is_file()}
    for args in (("v0-tiny", "--steps", 9), ("v1-tiny",)):
        code, _, err = train_tiny(*args, "--resume", "--out-dir", "run")
        assert code == 2 and "another configuration" in err
    assert before == {
        path: path.read_bytes() for path in (workspace / "run").rglob("*") if path.is_file()
    }


def test_resuming_on_a_changed_text_is_refused(train_tiny, workspace):
    assert train_tiny("v0-tiny", "--steps", 2)[0] == 0
    for path in checkpoint.list_checkpoints(workspace / "runs/v0-tiny")[1:]:
        shutil.rmtree(path)  # step 0 is left: not finished
    (workspace / "text.txt").write_text("something else entirely. " * 100)
    code, _, err = train_tiny("v0-tiny", "--resume")
    assert code == 2 and "changed" in err


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (["v1-tiny"], "make train-v1"),
        (["no/such/run"], "no such run"),
        ([], "run"),
        (["data", "--temperature", "-1"], "temperature"),
        (["data", "--top-p", "2"], "top-p"),
        (["data", "--top-k", "0"], "top-k"),
        (["data", "--num-samples", "0"], "num-samples"),
        (["."], "no checkpoint"),
    ],
)
def test_sampling_mistakes(program, args, fix):
    code, out, err = program("sample", *args)
    assert code == 2 and fix.lower() in (out + err).lower() and "Traceback" not in err


def test_an_edited_checkpoint_is_skipped_or_refused(train_tiny, program, workspace):
    assert train_tiny("v0-tiny", "--steps", 4, "--save-every", 2)[0] == 0
    first, last = checkpoint.list_checkpoints(workspace / "runs/v0-tiny")
    data = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(data[:-100])
    code, _, err = program("sample", "v0-tiny", "--max-new-tokens", 5)
    assert code == 0 and "broken" in err
    (first / "state.json").write_text("{}")
    code, _, err = program("sample", "v0-tiny", "--max-new-tokens", 5)
    assert code == 2 and "whole" in err
