"""Two processes with --ewc and answers of different lengths: the steps of one, and bitwise when
they resume."""

import json
import shutil

import pytest

from nanods.training import checkpoint, consolidation
from tests.distributed.processes import train_on_processes
from tests.distributed.test_meshes import SIZE, TEXT

V1 = ["v1-tiny", *SIZE, "--attention.block-size", "8", "--steps", "4", "--save-every", "2"]
EWC = [*V1, "--data", "tasks.jsonl", "--ewc", "base", "--ewc-sequences", "6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ewc")
    (folder / "text.txt").write_text(TEXT)
    rows = [{"prompt": f"{n}", "answer": "a" * (1 + n % 9)} for n in range(40)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANODS_DATA", str(folder / "data"))
        jobs = [[*V1, "--data", "text.txt", "--out-dir", "base"], [*EWC, "--out-dir", "one"]]
        for code, stderr in train_on_processes(1, jobs, folder)[0]:
            assert code == 0, stderr
        shutil.copytree(folder / "one", folder / "cut")
        shutil.rmtree(folder / "cut/step_000004")
        jobs = [
            [*EWC, "--out-dir", "two"],
            [*V1, "--data", "tasks.jsonl", "--resume", "--out-dir", "cut"],
            [*EWC, "--mesh", "fsdp=2", "--out-dir", "sharded"],
        ]
        results = train_on_processes(2, jobs, folder)
        assert [code for code, _ in results[0]] == [0, 0, 2], results
        shutil.copytree(folder / "two", folder / "again")
        shutil.rmtree(folder / "again/step_000004")
        jobs = [[*V1, "--data", "tasks.jsonl", "--resume", "--out-dir", "again"]]
        for of_process in train_on_processes(2, jobs, folder):
            assert of_process[0][0] == 0, of_process
    return folder, results


def weights(folder, name):
    return checkpoint.load(folder / name).model


def test_two_processes_make_the_steps_of_one(runs):
    """Also from a checkpoint of one process."""
    folder, _ = runs
    one = weights(folder, "one")
    for name in ("two", "cut"):
        other = weights(folder, name)
        assert max((one[k] - other[k]).abs().max() for k in one) < 1e-10
    files = [(folder / name / consolidation.FILE).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_a_resumed_run_of_two_processes_is_bitwise_the_same(runs):
    folder, _ = runs
    files = [
        (folder / name / "step_000004/model.safetensors").read_bytes() for name in ("two", "again")
    ]
    assert files[0] == files[1]


def test_a_sharded_model_is_refused(runs):
    folder, results = runs
    assert "--ewc base, --mesh fsdp=2: each process must hold whole weights" in results[0][2][1]
    assert not (folder / "sharded").exists()
