"""Stored runs: kept through a refactoring, repeated when something else is computed, never lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanods.bench import jobs, stored_runs
from nanods.bench.jobs import FunctionJob, Job, difference_of_losses, difference_of_settings, probe
from nanods.bench.stored_runs import machine_of, train_all
from nanods.errors import UserError
from nanods.training import checkpoint
from tests.conftest import TINY as TINY_FLAGS

TINY = ("v0-tiny", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--context-length", "16")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODS_DATA", str(tmp_path / "data"))
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    return path


def leave_run(out, step=2, steps=2):
    """Write what a run leaves that has done `step` of `steps` steps."""

    def write_tensors(folder):
        for name in checkpoint.FILES[:2]:
            (folder / name).touch()

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = [{"step": i + 1, "val_bpb": 1.5} for i in range(step)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = {"step": step, "config": {"steps": steps}}
    checkpoint.write_checkpoint(out, step, state, write_tensors, keep=2)


class Finished:
    """A process of train.py that has ended."""

    returncode = 0

    def poll(self):
        return 0


class Endless:
    """A process of train.py that runs until it is told to save and stop."""

    def __init__(self):
        self.calls = []

    def poll(self):
        return None

    def terminate(self):
        self.calls.append("terminate")

    def wait(self):
        self.calls.append("wait")


@pytest.fixture
def trainings(monkeypatch):
    """Replace train.py: note the calls, and leave what a finished run leaves."""
    calls = []

    def start_training(out, flags):
        calls.append((out.name, "--resume" in flags))
        leave_run(out)
        return Finished()

    task = SimpleNamespace(data=SimpleNamespace(sha256="hash"))
    monkeypatch.setattr(stored_runs, "start_training", start_training)
    monkeypatch.setattr(jobs, "quiet_task", lambda config: task)
    monkeypatch.setattr(jobs, "probe", lambda config, needed: [5.0, 4.5])
    return calls


def last_bpb(job, out, rows):
    return {"val_bpb": rows[-1]["val_bpb"]}


def train(tmp_path, some_jobs, summarise=last_bpb, **options):
    where = tmp_path / "results", tmp_path / "runs"
    return train_all("demo", some_jobs, summarise, *where, **{"workers": 1} | options)


JOBS = [Job("a", ("v0-tiny",)), Job("b", ("v0-tiny", "--lr", "0.01"))]
STORE = "results/runs/demo.json"


def edit_store(tmp_path, change, name="a"):
    path = tmp_path / STORE
    stored = json.loads(path.read_text())
    change(stored[name])
    path.write_text(json.dumps(stored))


# ---- what is kept, and what is trained -----------------------------------------------------------


def test_a_stored_result_is_kept(tmp_path, trainings, capsys):
    first = train(tmp_path, JOBS)
    assert [name for name, *_ in trainings] == ["a", "b"] and first["a"]["val_bpb"] == 1.5
    command = f"train.py v0-tiny --lr 0.01 --device cpu --out-dir {tmp_path}/runs/demo/b"
    assert first["b"]["command"] == command
    assert train(tmp_path, JOBS) == first
    assert len(trainings) == 2 and "2 kept, 0 to train" in capsys.readouterr().out


def test_each_result_is_stored_at_once(tmp_path, trainings, capsys):
    def killed_at_b(job, out, rows):
        if job.name == "b":
            raise KeyboardInterrupt
        return last_bpb(job, out, rows)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, JOBS, killed_at_b)
    printed = capsys.readouterr().out
    assert "begun      demo, a: run 1 of 2" in printed
    assert "a: 1 of 2 stored, about 0 min left" in printed
    assert "interrupted demo: 1 of 2 runs are left. Continue with: " in printed
    train(tmp_path, JOBS)  # b had finished, and is read instead of trained again
    assert [name for name, *_ in trainings] == ["a", "b"]


def test_an_interrupted_bench_does_not_count_stale_results_as_done(tmp_path, trainings, capsys):
    def killed(job, out, rows):
        raise KeyboardInterrupt

    train(tmp_path, JOBS)
    changed = [JOBS[0], Job("b", ("v0-tiny", "--lr", "0.02"))]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, changed, killed)
    assert "interrupted demo: 1 of 2 runs are left" in capsys.readouterr().out


def test_an_unfinished_run_is_resumed(tmp_path, trainings):
    train(tmp_path, JOBS[:1])
    leave_run(tmp_path / "runs/demo/a", step=3, steps=5)
    (tmp_path / STORE).unlink()
    train(tmp_path, JOBS[:1])
    assert trainings[-1] == ("a", True)


def test_a_run_directory_of_other_settings_is_started_anew(tmp_path, trainings):
    train(tmp_path, JOBS[:1])
    (tmp_path / STORE).unlink()
    train(tmp_path, [Job("a", ("v0-tiny", "--lr", "0.03"))])
    assert trainings == [("a", False), ("a", False)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flags": {"lr": 0.3}}, "other settings (lr)"),
        ({"preset": "v1-tiny"}, "other settings (v0-tiny)"),
        ({"data": "another hash"}, "the data have changed"),
        ({"probe": [5.0, 4.51]}, "the loss of step 2 was 4.51000000 in fp64 and is 4.50000000"),
        ({"probe": [5.0, float("nan")]}, "the loss of step 2"),
        ({"probe": [5.0]}, "its probe has 1 steps instead of 2"),
    ],
)
def test_a_stale_result_is_named_and_repeated(tmp_path, trainings, capsys, change, reason):
    train(tmp_path, JOBS[:1])
    edit_store(tmp_path, lambda a: a.update(code="older", identity=a["identity"] | change))
    train(tmp_path, JOBS[:1])
    assert f"stale      demo, a: {reason}" in capsys.readouterr().out
    stored = json.loads((tmp_path / STORE).read_text())
    assert stored["a"]["identity"]["probe"] == [5.0, 4.5]


def test_a_change_of_the_preset_is_seen_in_what_the_probe_does_not_compute(tmp_path, trainings):
    train(tmp_path, JOBS[:1])
    store = stored_runs.Store(tmp_path / STORE)
    entry = store.entries["a"]
    assert store.why_stale(entry, JOBS[0]) is None
    entry["identity"]["flags"]["steps"] += 1
    assert store.why_stale(entry, JOBS[0]) == "other settings (steps)"


def test_a_new_flag_with_its_default_leaves_a_result_valid(tmp_path, trainings):
    train(tmp_path, JOBS[:1])
    edit_store(tmp_path, lambda a: a["identity"]["flags"].pop("clip"))
    train(tmp_path, JOBS[:1])
    assert len(trainings) == 1


def test_a_store_of_changed_flags_alone_is_still_read(tmp_path, trainings):
    train(tmp_path, JOBS)

    def as_written_at_first(b):
        del b["code"]
        b["identity"]["flags"] = {"lr": 0.01}

    edit_store(tmp_path, as_written_at_first, "b")
    train(tmp_path, JOBS)
    assert len(trainings) == 2


def test_the_probe_is_computed_only_where_the_code_has_changed(tmp_path, trainings, monkeypatch):
    train(tmp_path, JOBS)
    edit_store(tmp_path, lambda a: a.update(code="older"))
    probed = []
    monkeypatch.setattr(Job, "probe", lambda job: probed.append(job.name) or [5.0, 4.5])
    train(tmp_path, JOBS)
    assert probed == ["a"]
    train(tmp_path, JOBS)
    assert probed == ["a"] and len(trainings) == 2


def test_times_of_another_machine_are_stale_where_they_stand_for_this_one(
    tmp_path, trainings, capsys
):
    train(tmp_path, JOBS)
    edit_store(tmp_path, lambda a: a["machine"].update(cpu="another"))
    train(tmp_path, JOBS)
    assert "2 kept (1 of another machine)" in capsys.readouterr().out and len(trainings) == 2
    machine = machine_of("demo", JOBS, tmp_path / "results")
    assert machine["cpu"].startswith("another, ") and machine["threads"] == 1
    leave_run(tmp_path / "runs/demo/a", step=3, steps=5)
    train(tmp_path, JOBS, machines="this")
    assert "a: it was measured on another machine" in capsys.readouterr().out
    assert [name for name, *_ in trainings] == ["a", "b", "a"]


def test_times_that_are_compared_come_from_one_machine(tmp_path, trainings, capsys):
    def move(entry):
        entry["machine"].update(cpu="another")

    a, _ = JOBS
    train(tmp_path, [a])
    edit_store(tmp_path, move, a.name)
    train(tmp_path, [a], machines="one")
    assert [name for name, *_ in trainings] == ["a"], "one machine, if not this one"
    leave_run(tmp_path / "runs/demo/a", step=3, steps=5)
    train(tmp_path, JOBS, machines="one")
    assert "a: it was measured on another machine" in capsys.readouterr().out
    assert [name for name, *_ in trainings] == ["a", "a", "b"], "b is trained on this one"
    edit_store(tmp_path, move, a.name)
    leave_run(tmp_path / "runs/demo/a", step=3, steps=5)
    train(tmp_path, JOBS, machines="one")
    assert [name for name, *_ in trainings] == ["a", "a", "b", "a"], "two machines"


def test_rounding_does_not_make_a_result_stale():
    assert difference_of_losses([5.0, 4.5], [5.0, 4.5 * (1 + 1e-9)]) is None


# ---- runs that start from others -----------------------------------------------------------------


def base_and_child(tmp_path, *flags):
    base = Job("base", ("v0-tiny", *flags), folder="other/base")
    start = base.folder_in(tmp_path / "runs", "demo")
    return base, Job("child", ("v0-tiny", "--init-from", str(start)), needs=base)


def test_a_run_starts_after_the_one_it_needs(tmp_path, trainings):
    base, child = base_and_child(tmp_path)
    train(tmp_path, [child, base], workers=2)
    assert [name for name, _ in trainings] == ["base", "child"]
    stored = json.loads((tmp_path / STORE).read_text())
    assert str(tmp_path) not in json.dumps(stored["child"]["identity"])


def test_a_run_is_stale_if_the_one_it_needs_has_changed(tmp_path, trainings, capsys):
    train(tmp_path, base_and_child(tmp_path))
    base, child = base_and_child(tmp_path, "--steps", "7")
    train(tmp_path, [base, child])
    assert "child: base, from which it starts, is trained again" in capsys.readouterr().out
    assert [name for name, _ in trainings] == ["base", "child"] * 2
    changed_base, changed_child = base_and_child(tmp_path, "--steps", "8")
    train(tmp_path, [changed_base])  # and killed before the child
    train(tmp_path, [changed_base, changed_child])
    assert "base, from which it starts: other settings (steps)" in capsys.readouterr().out


def test_weights_that_are_gone_are_trained_again_if_a_run_needs_them(tmp_path, trainings, capsys):
    base, child = base_and_child(tmp_path)
    train(tmp_path, [base])
    shutil.rmtree(tmp_path / "runs/other/base")
    train(tmp_path, [base])
    assert [name for name, _ in trainings] == ["base"]
    edit_store(tmp_path, lambda entry: entry["machine"].update(cpu="another"), "base")
    train(tmp_path, [child])
    assert [name for name, _ in trainings] == ["base", "base", "child"]
    printed = capsys.readouterr().out
    assert "which other runs need: trained again" in printed
    assert "0 kept, 2 to train (1 for weights alone)" in printed
    machine = machine_of("demo", [base], tmp_path / "results")
    assert machine["cpu"] == "another", "the result is still the first one"


def test_so_are_those_that_the_needed_one_needs(tmp_path, trainings):
    base, child = base_and_child(tmp_path)
    start = child.folder_in(tmp_path / "runs", "demo")
    grandchild = Job("grandchild", ("v0-tiny", "--init-from", str(start)), needs=child)
    train(tmp_path, [base, child])
    shutil.rmtree(tmp_path / "runs")
    train(tmp_path, [base, child, grandchild])
    assert [name for name, _ in trainings[2:]] == ["base", "child", "grandchild"]


# ---- functions -----------------------------------------------------------------------------------


def test_a_function_is_stored_like_a_run(tmp_path, capsys):
    trained = []

    def job(lr, loss=5.0):
        return FunctionJob("x", {"lr": lr}, lambda: trained.append(lr) or {"y": lr}, lambda: [loss])

    assert train(tmp_path, [job(1)], None)["x"]["y"] == 1
    train(tmp_path, [job(1)], None)
    assert trained == [1]
    train(tmp_path, [job(2)], None)
    assert trained == [1, 2] and "x: other settings (lr)" in capsys.readouterr().out
    edit_store(tmp_path, lambda x: x.update(code="older"), "x")
    train(tmp_path, [job(2, 5.1)], None)
    assert trained == [1, 2, 2] and "the loss of step 1" in capsys.readouterr().out


# ---- interruptions -------------------------------------------------------------------------------


def test_runs_save_and_stop_when_the_bench_is_interrupted(tmp_path, trainings, monkeypatch):
    process, start = Endless(), stored_runs.start_training

    def start_one_that_is_endless(out, flags):
        if out.name == "a":
            return process
        os.kill(os.getpid(), signal.SIGTERM)
        return start(out, flags)

    monkeypatch.setattr(stored_runs, "start_training", start_one_that_is_endless)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, JOBS, workers=2)
    assert process.calls == ["terminate", "wait"] and signal.getsignal(signal.SIGTERM) == before


def test_a_failed_run_is_reported_and_the_other_one_stops(tmp_path, trainings, monkeypatch):
    failed, process = Finished(), Endless()
    failed.returncode = 2

    def start_training(out, flags):
        Path(f"{out}.log").write_text("step 1\nerror: the loss became nan\n")
        return failed if out.name == "a" else process

    monkeypatch.setattr(stored_runs, "start_training", start_training)
    with pytest.raises(UserError, match=r"exit code 2 .*demo/a\.log: error: the loss became nan"):
        train(tmp_path, JOBS, workers=2)
    assert process.calls == ["terminate", "wait"]


@pytest.mark.parametrize("content", ['{"a": {"identity": {"pre', "[]", '{"a": {}}', "<<<<<<< x"])
def test_a_damaged_store_is_refused_with_a_fix(tmp_path, trainings, content):
    path = tmp_path / STORE
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=r"demo\.json is damaged .*git checkout .* delete it"):
        train(tmp_path, JOBS)
    assert path.read_text() == content and not trainings


def test_a_second_start_of_a_bench_is_refused(tmp_path, trainings):
    def start_again(job, out, rows):
        train(tmp_path, JOBS)

    with pytest.raises(UserError, match="this bench runs already"):
        train(tmp_path, JOBS, start_again)


BENCH = """
import sys
from pathlib import Path
from nanods.bench.jobs import Job
from nanods.bench.stored_runs import train_all
from nanods.errors import run

def summarise(job, out, rows):
    return {"steps": [row["step"] for row in rows], "val_loss": rows[-1]["val_loss"]}

def main():
    words = ("v0-tiny", "--data", "text.txt", "--save-every", "2", *sys.argv[1:])
    jobs = [Job(f"seed {i}", (*words, "--seed", str(i))) for i in range(3)]
    train_all("demo", jobs, summarise)

run(main)
"""


@pytest.mark.slow
def test_a_bench_killed_and_interrupted_goes_on_where_it_was(workspace):
    """SIGKILL to the bench alone, whose two runs go on; then SIGINT to all, as from Ctrl-C."""
    (workspace / "bench.py").write_text(BENCH)
    (workspace / "train.py").symlink_to(ROOT / "train.py")

    def start(steps):
        return subprocess.Popen(
            [sys.executable, "bench.py", *TINY_FLAGS, "--steps", str(steps)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(*files):
        deadline = time.monotonic() + 300
        while not all(file.exists() and file.read_text().count("\n") >= 5 for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    steps = 100
    metrics = [workspace / f"runs/demo/seed-{i}/metrics.jsonl" for i in range(3)]
    bench = start(steps)
    wait_for(*metrics[:2])
    bench.kill()
    bench.wait()

    bench = start(steps)  # waits for the two runs, reads them, and begins the third
    wait_for(metrics[2])
    os.killpg(bench.pid, signal.SIGINT)
    printed, _ = bench.communicate(timeout=300)
    assert bench.returncode == 130 and "Traceback" not in printed
    assert printed.count("Continue with: ") == 1 and "1 of 3 runs are left" in printed
    stored = json.loads((workspace / STORE).read_text())
    assert stored.keys() == {"seed 0", "seed 1"}

    bench = start(steps)
    printed, _ = bench.communicate(timeout=300)
    assert bench.returncode == 0, printed
    assert "2 kept, 1 to train" in printed and "resumed    runs/demo/seed-2" in printed
    results = json.loads((workspace / STORE).read_text())
    assert all(e["result"]["steps"] == list(range(1, steps + 1)) for e in results.values())
    assert "1 threads" in (workspace / "runs/demo/seed-2.log").read_text()


# ---- the probe -----------------------------------------------------------------------------------


def test_the_probe_sees_a_change_of_the_arithmetic_and_of_nothing_else(text, monkeypatch):
    job = Job("a", (*TINY, "--data", str(text)))
    before = job.settings() | {"probe": job.probe()}
    assert before["flags"]["n-layer"] == 1 and len(before["probe"]) == jobs.PROBE_STEPS
    copy = text.with_name("copy.txt")
    copy.write_text(text.read_text())
    moved = Job("a", (*TINY, "--data", str(copy), "--out-dir", "elsewhere", "--save-every", "7"))
    assert difference_of_settings(before, moved.settings()) is None
    assert difference_of_losses(before["probe"], moved.probe()) is None

    from nanods import gpt

    rms_norm = gpt.rms_norm
    monkeypatch.setattr(gpt, "rms_norm", lambda x, gain=1.0: 1.0001 * rms_norm(x, gain))
    assert "the loss of step" in difference_of_losses(before["probe"], job.probe())


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_every_version_has_a_probe(text, preset):
    words = (preset, *TINY[1:], "--data", str(text))
    losses = probe(Job("a", words).config)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("preset", ["v0-tiny", "v3-tiny"])
def test_the_probe_sees_the_loss_of_a_teacher(text, preset):
    words = (preset, *TINY[1:-2], *(() if preset == "v3-tiny" else ("--data", str(text))))
    teacher = Job("teacher", (*words, "--seed", "1"))
    if preset == "v3-tiny":
        teacher = Job("teacher", (*words, "--multimodal.width", "24"))
    with_teacher = ("--teacher", "runs/nowhere", "--distill-weight")
    half, all = (Job("a", (*words, *with_teacher, w), needs=teacher) for w in ("0.5", "1"))
    assert "teacher" not in half.settings()["flags"]
    assert difference_of_losses(half.probe(), all.probe())


def test_settings_of_ewc_count_only_where_it_is_used(text):
    words = (*TINY, "--data", str(text), "--ewc-lambda", "5")
    assert not any(name.startswith("ewc-") for name in Job("a", words).settings()["flags"])
    held = Job("b", (*words, "--ewc", "runs/nowhere"), needs=Job("a", words))
    assert held.settings()["flags"]["ewc-lambda"] == 5


def test_the_probe_sees_rounded_weights(text):
    words = (*TINY, "--data", str(text))
    exact, rounded = Job("a", words), Job("b", (*words, "--quantize", "int2"))
    assert "the loss of step 3" in difference_of_losses(exact.probe(), rounded.probe())


def test_v3_has_a_probe():
    words = ("v3-tiny", "--n-layer", "1", "--n-embd", "16", "--n-head", "2")
    losses = probe(Job("a", words).config)
    assert len(set(losses)) == len(losses)


def test_stores_of_the_repository_can_be_read():
    for path in (ROOT / "results/runs").glob("*.json"):
        for entry in stored_runs.Store(path).entries.values():
            assert {"command", "identity", "machine", "result"} <= entry.keys()
