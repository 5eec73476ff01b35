"""The speedrun: an entry is the preset with its flags, only tinyshakespeare counts, nanoGPT's lines
are read, and lessons/SPEEDRUN.md has the rows that results/speedrun.json gives."""

import json
import sys

import pytest

from nanods.bench import speedrun
from nanods.bench.results_rows import ROOT
from nanods.config import flatten
from nanods.errors import UserError

FIGURES = {"val_loss": 1.4690, "cpu_seconds": 100.0, "step": 1200, "tokens": 2_457_600}


@pytest.mark.parametrize("name", speedrun.ENTRIES)
def test_an_entry_is_the_preset_with_its_flags(name):
    config = speedrun.entry_job(name, 2).config
    flags = flatten(config)
    assert (config.preset, config.data, config.seed) == ("v0-tiny", "shakespeare", 2)
    assert {flag: flags[flag] for flag in speedrun.ENTRIES[name]} == speedrun.ENTRIES[name]
    assert config.eval_every == config.steps, "an evaluation in between does not belong to an entry"


def run_with(monkeypatch, tmp_path, losses, *words):
    """Run the command with trained seeds of these losses; return results/speedrun.json."""

    def train_all(bench, jobs, *_, **__):
        return {job.name: FIGURES | {"val_loss": x} for job, x in zip(jobs, losses, strict=True)}

    machine = {"cpu": "a CPU", "dtype": "fp32"}
    monkeypatch.setattr(speedrun, "train_all", train_all)
    monkeypatch.setattr(speedrun, "machine_of", lambda *_: machine)
    monkeypatch.setattr(sys, "argv", ["speedrun", "--results", str(tmp_path), *words])
    speedrun.main()
    return json.loads((tmp_path / "speedrun.json").read_text())


@pytest.fixture
def tinyshakespeare(monkeypatch):
    class Data:
        sha256 = speedrun.SHAKESPEARE_SHA256

    monkeypatch.setattr(speedrun, "load_text", lambda _: Data)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ((1.4690, speedrun.TARGET, 1.4600), "PASS: 3 of 3"),
        ((1.4690, 1.4698, 1.4600), "MISS: 2 of 3"),
    ],
)
def test_every_seed_must_reach_the_target(
    monkeypatch, tmp_path, capsys, tinyshakespeare, losses, verdict
):
    table = run_with(monkeypatch, tmp_path, losses, "--entry", "first v0-tiny")
    assert verdict in capsys.readouterr().out
    assert [row["val_loss"] for row in table["entries"]["first v0-tiny"]["runs"]] == list(losses)


def test_fewer_seeds_are_no_record(monkeypatch, tmp_path, capsys, tinyshakespeare):
    run_with(monkeypatch, tmp_path, (1.46,), "--seeds", "1")
    assert "a record needs three seeds" in capsys.readouterr().out


def test_another_text_and_an_unknown_entry_are_refused(monkeypatch, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("to be or not to be\n" * 400)
    with pytest.raises(UserError, match="not tinyshakespeare"):
        run_with(monkeypatch, tmp_path, (), "--data", str(other))
    with pytest.raises(UserError, match="choose one of first v0-tiny"):
        run_with(monkeypatch, tmp_path, (), "--entry", "faster")


def clone_that_prints(folder, *lines, code=0):
    (folder / "config").mkdir()
    (folder / "config" / "train_shakespeare_char.py").touch()
    prints = "\n".join(f"print({line!r})" for line in lines)
    (folder / "train.py").write_text(f"import sys\n{prints}\nsys.exit({code})\n")
    return folder


def test_nanogpts_time_is_its_median_step_times_its_steps(tmp_path):
    clone = clone_that_prints(
        tmp_path,
        "step 0: train loss 4.1860, val loss 4.1823",
        "iter 0: loss 4.1887, time 900.00ms, mfu -100.00%",
        "iter 1: loss 4.1000, time 70.00ms, mfu -100.00%",
        "iter 2: loss 4.0000, time 72.00ms, mfu 0.10%",
        "step 2000: train loss 1.7600, val loss 1.8821",
    )
    timed = speedrun.time_nanogpt(clone)
    assert timed == {"val_loss": 1.8821, "step": 2000, "cpu_seconds": pytest.approx(144.0)}


def test_a_clone_that_does_not_train_is_named(tmp_path):
    with pytest.raises(UserError, match="no nanoGPT there"):
        speedrun.time_nanogpt(tmp_path)
    clone = clone_that_prints(tmp_path, "No module named 'tiktoken'", code=1)
    with pytest.raises(UserError, match=r"ended with 1 \(No module named 'tiktoken'\)"):
        speedrun.time_nanogpt(clone)


def test_the_page_has_the_rows_of_the_results():
    page = (ROOT / "lessons" / "SPEEDRUN.md").read_text()
    entries = json.loads((ROOT / "results" / "speedrun.json").read_text())["entries"]
    assert entries
    for name, entry in entries.items():
        assert entry["flags"] == speedrun.ENTRIES[name]
        assert speedrun.table_row(name, entry) in page
