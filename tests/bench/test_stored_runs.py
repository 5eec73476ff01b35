"""Stored runs: kept through a refactoring, repeated when something else is computed, never lost."""

import json
from pathlib import Path

import pytest

from nanods.bench import stored_runs
from nanods.bench.stored_runs import Job, difference, identify, probe, train_all

TINY = ("v0-tiny", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--context-length", "16")


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODS_DATA", str(tmp_path / "data"))
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 60)
    return path


@pytest.fixture
def trainings(monkeypatch):
    """Replace train.py: note the calls, and leave what a finished run leaves."""
    calls = []

    def run_training(out, flags, fresh=False, launch=()):
        calls.append((out.name, "--resume" in flags, fresh))
        out.mkdir(parents=True, exist_ok=True)
        (out / "loss.png").touch()
        return "train.py " + " ".join(flags), [{"step": 1}, {"step": 2, "val_bpb": 1.5}]

    monkeypatch.setattr(stored_runs, "run_training", run_training)
    monkeypatch.setattr(stored_runs, "probe", lambda config: ("hash", [5.0, 4.5]))
    return calls


def last_bpb(job, out, rows):
    return {"val_bpb": rows[-1]["val_bpb"]}


def train(tmp_path, jobs, summarise=last_bpb):
    return train_all("demo", jobs, summarise, tmp_path / "results", tmp_path / "runs", workers=1)


JOBS = [Job("a", ("v0-tiny",)), Job("b", ("v0-tiny", "--lr", "0.01"))]


def test_a_stored_result_is_kept(tmp_path, trainings, capsys):
    first = train(tmp_path, JOBS)
    assert [name for name, *_ in trainings] == ["a", "b"] and first["a"] == {"val_bpb": 1.5}
    assert train(tmp_path, JOBS) == first
    assert len(trainings) == 2 and "2 kept, 0 to train" in capsys.readouterr().out


def test_each_result_is_stored_at_once(tmp_path, trainings, capsys):
    def killed_at_b(job, out, rows):
        if job.name == "b":
            raise KeyboardInterrupt
        return last_bpb(job, out, rows)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, JOBS, killed_at_b)
    assert "a: 1 of 2, about" in capsys.readouterr().out
    train(tmp_path, JOBS)
    assert [name for name, *_ in trainings] == ["a", "b", "b"]


def test_an_unfinished_run_is_resumed(tmp_path, trainings):
    train(tmp_path, JOBS[:1])
    out = tmp_path / "runs/demo/a"
    (out / "loss.png").unlink()
    (out / "step_000100").mkdir()
    (tmp_path / "results/runs/demo.json").unlink()
    train(tmp_path, JOBS[:1])
    assert trainings[-1] == ("a", True, True)


def test_a_run_directory_of_other_settings_is_started_anew(tmp_path, trainings):
    train(tmp_path, JOBS[:1])
    (tmp_path / "results/runs/demo.json").unlink()
    train(tmp_path, [Job("a", ("v0-tiny", "--lr", "0.03"))])
    assert trainings[-1] == ("a", False, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flags": {"lr": 0.3}}, "other settings (lr)"),
        ({"data": "another hash"}, "the data have changed"),
        ({"probe": [5.0, 4.51]}, "the loss of step 2 was 4.51000000 in fp64 and is 4.50000000"),
        ({"probe": [5.0, float("nan")]}, "the loss of step 2"),
    ],
)
def test_a_stale_result_is_named_and_repeated(tmp_path, trainings, capsys, change, reason):
    train(tmp_path, JOBS[:1])
    path = tmp_path / "results/runs/demo.json"
    stored = json.loads(path.read_text())
    stored["a"]["identity"] |= change
    path.write_text(json.dumps(stored))
    train(tmp_path, JOBS[:1])
    assert len(trainings) == 2 and f"stale      demo, a: {reason}" in capsys.readouterr().out


def test_rounding_does_not_make_a_result_stale():
    identity = {"preset": "v0-tiny", "flags": {}, "data": "x", "probe": [5.0, 4.5]}
    assert difference(identity, identity | {"probe": [5.0, 4.5 * (1 + 1e-9)]}) is None


def test_the_probe_sees_a_change_of_the_arithmetic_and_of_nothing_else(text, monkeypatch):
    job = Job("a", (*TINY, "--data", str(text)))
    before = identify(job)
    assert before["flags"]["n-layer"] == 1 and len(before["probe"]) == stored_runs.PROBE_STEPS
    assert difference(before, identify(job)) is None
    moved = Job("a", (*job.words, "--out-dir", "elsewhere", "--save-every", "7"))
    assert difference(before, identify(moved)) is None

    from nanods import gpt

    rms_norm = gpt.rms_norm
    monkeypatch.setattr(gpt, "rms_norm", lambda x, gain=1.0: 1.0001 * rms_norm(x, gain))
    assert "the loss of step" in difference(before, identify(job))


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_every_version_has_a_probe(text, preset):
    words = (preset, *TINY[1:], "--data", str(text))
    config = stored_runs.ladder.from_command_line("", list(words))
    _, losses = probe(config)
    assert losses[-1] < losses[0]


def test_v3_has_a_probe():
    words = ["v3-tiny", "--n-layer", "1", "--n-embd", "16", "--n-head", "2"]
    _, losses = probe(stored_runs.ladder.from_command_line("", words))
    assert len(set(losses)) == len(losses)


def test_stores_of_the_repository_can_be_read():
    for path in (Path(__file__).parents[2] / "results/runs").glob("*.json"):
        for entry in json.loads(path.read_text()).values():
            assert entry.keys() == {"command", "identity", "machine", "result"}
