"""From stored runs to tables: every bench that trains, with figures that are made up."""

import importlib
import json

import pytest

FIGURES = {  # of a run; each bench reads some of them
    "command": "train.py",
    "step": 4,
    "steps": 4,
    "seconds": 2.0,
    "cpu_seconds": 2.0,
    "val_loss": 1.5,
    "val_bpb": 2.5,
    "val_recall1": 0.5,
    "recall1_text_image": 0.5,
    "parameters": 10,
    "facts": {"shape": {"image": 0.5}},
    "curve": {"steps": [1, 2], "recall1": [0.1, 0.2]},
    "examples_per_second": 100,
    "scenes_per_second": 200,
    "accuracy": 0.5,
    "linear": {"accuracy": 0.5},
    "pixels": {"accuracy": 0.5, "fit_cpu_seconds": 1.0},
    "examples": {"train": 40, "held_out": 20},
    "sample.py --labels": 0.5,
    "load_history": [[[1.0]]],
    "domains": {"the byte": [0.5]},
    "bits_by_window": {"512": 2.0, "4096": 1.9},
    "step_cpu_seconds_val_loss": [[1, 1.0, 3.0], [2, 2.0, 2.5]],
}
MACHINE = {"cpu": "a CPU", "dtype": "fp32"}
BENCHES = {  # name -> (runs with one seed, some of the keys of its table)
    "ladder": (4, {"machine", "v2-tiny/pydocs"}),
    "experts": (13, {"machine", "data", "gaps", "summary", "domains", "runs"}),
    "multimodal": (7, {"machine", "pipeline", "shared against separate", "summary", "runs"}),
    "long_text": (3, {"machine", "data", "seeds", "differences", "by_window", "runs"}),
    "labels": (1, {"machine", "data", "summary", "logistic regression on pixels", "runs"}),
    "time_to_loss": (2, {"machine", "runs"}),
}


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_makes_its_table_from_stored_runs(tmp_path, monkeypatch, name):
    bench = importlib.import_module(f"nanods.bench.{name}")
    jobs = []

    def train_all(bench, some_jobs, summarise, results, runs, workers=2, machines="any"):
        jobs.extend(some_jobs)
        results = {}
        for job in some_jobs:  # V1 is faster, so it makes more steps in the same time
            results[job.name] = FIGURES | {"cpu_seconds": 1.0 if job.words[0] == "v1-tiny" else 3.0}
        return results

    class Text:
        sha256, val = "hash", None

    monkeypatch.setattr(bench, "train_all", train_all)
    monkeypatch.setattr(bench, "machine_of", lambda name, jobs, results: MACHINE)
    if hasattr(bench, "load_text"):
        monkeypatch.setattr(bench, "load_text", lambda name: Text)
    flags = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    if name == "labels":
        monkeypatch.setattr(bench, "new_classifier", lambda: None)
        flags += ["--per-class", "4"]
    if name != "time_to_loss":
        flags += ["--seeds", "1"]
    monkeypatch.setattr("sys.argv", [name, *flags])
    bench.main()

    count, keys = BENCHES[name]
    table = json.loads((tmp_path / f"{name}.json").read_text())
    assert keys <= table.keys() and table["machine"] == MACHINE
    if name == "experts":
        assert "cpu_seconds" in table["summary"]["loss"]
        assert "cpu_seconds" not in table["summary"]["v1, equal time"]
    assert len(jobs) == len({job.name for job in jobs}) == count
    folders = {job.folder_in(tmp_path / "runs", name) for job in jobs}
    assert len(folders) == count, "each run has a folder of its own"
    for job in jobs:
        assert job.config.preset in job.words  # the command line is accepted
        assert job.needs is None or str(job.needs.folder_in(tmp_path / "runs", name)) in job.words


@pytest.mark.parametrize(
    ("name", "flag"), [("multimodal", "only"), ("arithmetic", "variants"), ("long_text", "methods")]
)
def test_an_unknown_choice_is_refused_before_anything_is_trained(monkeypatch, capsys, name, flag):
    bench = importlib.import_module(f"nanods.bench.{name}")
    monkeypatch.setattr("sys.argv", [name, f"--{flag}", "foo"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert f"--{flag}" in capsys.readouterr().err


def test_the_variants_of_the_v3_bench_can_be_chosen_and_leave_the_table(
    tmp_path, monkeypatch, capsys
):
    from nanods.bench import multimodal

    def train_all(bench, jobs, *_, workers):
        assert [job.name for job in jobs] == ["emergent-0", "emergent-1"] and workers == 1
        return {job.name: dict(FIGURES) for job in jobs}

    monkeypatch.setattr(multimodal, "train_all", train_all)
    monkeypatch.setattr(multimodal, "machine_of", lambda *_: MACHINE)
    words = ["--only", "emergent", "--seeds", "2", "--jobs", "1", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["multimodal", *words])
    multimodal.main()
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "left out: as it is, separate, experts, balanced, longer, random; so multim" in said
