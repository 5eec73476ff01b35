"""One of two processes killed in mid-run: started again they end as if undisturbed; else the job ends, and --resume continues."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanods.training import checkpoint
from nanods.training.metrics import read_metrics
from tests.distributed.processes import free_port, train_by
from tests.distributed.test_meshes import FLAGS, SIZE, TEXT, apart

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 60, 3
BOUND = (
    180  # seconds after which a process counts as hanging; all take less than 20 on an idle machine
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/environ").exists(), reason="which process is which is read from /proc"
    ),
]
started = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Undisturbed runs of two processes: folder / mesh."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANODS_DATA", str(folder / "data"))
        jobs = [words(mesh, folder / mesh) for mesh in ("dp=2", "ep=2", "fsdp=2")]
        for told in train_by(2, jobs, folder):
            assert {code for code, _ in told} == {0}, told
        yield folder
    for process in started:  # of a test that failed
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def words(mesh, out, *more):
    steps = map(str, ("--steps", STEPS, "--save-every", EVERY, "--eval-every", STEPS))
    return [
        "v2-tiny",
        *SIZE,
        *FLAGS["v2-tiny"],
        *steps,
        "--mesh",
        mesh,
        "--out-dir",
        str(out),
        *more,
    ]


def start(mesh, out, *more, restarts=0, where=("--standalone", "--nproc-per-node", "2"), said=None):
    launch = ["-m", "nanods.distributed.launch", *where, "--max-restarts", str(restarts)]
    said = said or out
    process = subprocess.Popen(
        [sys.executable, *launch, str(ROOT / "train.py"), *words(mesh, out, *more)],
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=said.with_suffix(".out").open("w"),
        stderr=said.with_suffix(".err").open("w"),
        start_new_session=True,
    )
    started.append(process)
    return process


def children(process):
    """The processes that `process` has started, by their rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = (
                int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if folder.name.isdigit()
                else None
            )
            if parent == process.pid:
                environment = dict(
                    word.partition("=")[::2]
                    for word in (folder / "environ").read_text().split("\0")
                )
                found[int(environment["RANK"])] = int(folder.name)
        except (OSError, IndexError, KeyError):  # it has ended in between, or is none of the run's
            pass
    return found


def rows(out):
    return read_metrics(out / "metrics.jsonl")


def in_mid_run(process, out):
    """Waits for steps after a checkpoint."""
    end = time.monotonic() + BOUND
    while len(rows(out)) < EVERY + 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None and len(rows(out)) >= EVERY + 2, [
        file.read_text() for file in out.parent.glob("*.err")
    ]


def ended(process, out):
    """-> exit code, stdout, stderr; all its processes are gone."""
    code = process.wait(BOUND)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return code, out.with_suffix(".out").read_text(), out.with_suffix(".err").read_text()


def same_end(cut, whole):
    assert apart(checkpoint.load(cut).model, checkpoint.load(whole).model) < 1e-10
    assert [row["step"] for row in rows(cut)] == list(range(1, STEPS + 1))
    assert [row["train_loss"] for row in rows(cut)] == pytest.approx(
        [row["train_loss"] for row in rows(whole)], rel=1e-10
    )


@pytest.mark.parametrize(("mesh", "rank"), [("dp=2", 0), ("dp=2", 1), ("ep=2", 1), ("fsdp=2", 0)])
def test_started_again_they_end_as_if_undisturbed(folder, mesh, rank):
    process = start(mesh, cut := folder / f"{mesh}-without-{rank}", restarts=1)
    in_mid_run(process, cut)
    os.kill(children(process)[rank], signal.SIGKILL)
    time.sleep(0.5)  # the other one notices; new ones need seconds before they write
    done = len(rows(cut))
    code, out, err = ended(process, cut)
    assert code == 0, err
    assert "Traceback" not in err
    (resumed,) = re.findall(r"resume .*, after step (\d+)", out)
    assert done - EVERY <= int(resumed) <= done < STEPS
    same_end(cut, folder / mesh)


def test_two_machines_start_again_together(folder):
    """Two starters, as on two machines. The one that sees the other come back does not count that as a restart of its own."""
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "x", "--rdzv-backend", "c10d"]
    where += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    cut, names = folder / "machines", [folder / "machine-0", folder / "machine-1"]
    both = [start("dp=2", cut, restarts=2, where=where, said=name) for name in names]
    in_mid_run(both[0], cut)
    (killed,) = (pid for process in both for rank, pid in children(process).items() if rank == 1)
    os.kill(killed, signal.SIGKILL)
    for process, name in zip(both, names, strict=True):
        code, _, err = ended(process, name)
        assert code == 0, err
    same_end(cut, folder / "dp=2")


def test_a_killed_process_ends_the_job_and_resume_goes_on(folder):
    process = start("dp=2", cut := folder / "cut")
    in_mid_run(process, cut)
    os.kill(children(process)[1], signal.SIGKILL)
    code, _, err = ended(process, cut)
    assert code == 1
    assert (
        "another process was lost" in err
        and "--resume continues" in err
        and "process 1 was killed by SIGKILL" in err
    )
    assert "Traceback" not in err
    assert len(saved := checkpoint.list_checkpoints(cut)) >= 1 and not any(
        map(checkpoint.find_corruption, saved)
    )
    code, _, err = ended(start("dp=2", cut, "--resume"), cut)
    assert code == 0, err
    same_end(cut, folder / "dp=2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_starter_or_to_all_saves_and_ends_cleanly(folder, number):
    """As from a cluster, which ends the starter alone, or from Ctrl-C, which all receive."""
    process = start("dp=2", cut := folder / number.name)
    in_mid_run(process, cut)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    code, out, err = ended(process, cut)
    assert code == 128 + number, err
    assert "Traceback" not in err and "--resume" in out
    done = json.loads((checkpoint.list_checkpoints(cut)[-1] / "state.json").read_text())["step"]
    assert f"saved after step {done}" in out and done == len(rows(cut)) < STEPS
