"""One of two processes is killed: torchrun restarts them, or all exit and --resume continues."""

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
from tests.distributed.processes import free_port, train_on_processes
from tests.distributed.test_meshes import FLAGS, SIZE, TEXT, max_relative_difference

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 60, 3
BOUND = 180  # seconds after which a process counts as hanging; on an idle machine all take below 20
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/environ").exists(), reason="the ranks of processes are read from /proc"
    ),
]
started = []  # all launchers of this module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Undisturbed runs of two processes: folder / mesh."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANODS_DATA", str(folder / "data"))
        jobs = [arguments(mesh, folder / mesh) for mesh in ("dp=2", "ep=2", "fsdp=2")]
        for results in train_on_processes(2, jobs, folder):
            assert {code for code, _ in results} == {0}, results
        yield folder
    for launcher in started:  # those of a failed test may still run
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


def arguments(mesh, out, *more):
    steps = ["--steps", STEPS, "--save-every", SAVE_EVERY, "--eval-every", STEPS]
    flags = [*SIZE, *FLAGS["v2-tiny"], *map(str, steps), "--mesh", mesh, "--out-dir", str(out)]
    return ["v2-tiny", *flags, *more]


def launch(mesh, out, *more, restarts=0, flags=("--standalone", "--nproc-per-node", "2"), log=None):
    """Start train.py by nanods.distributed.launch.

    stdout goes to LOG.out and stderr to LOG.err; `log` is `out` by default.
    """
    log = log or out
    module = ["-m", "nanods.distributed.launch", *flags, "--max-restarts", str(restarts)]
    launcher = subprocess.Popen(
        [sys.executable, *module, str(ROOT / "train.py"), *arguments(mesh, out, *more)],
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=log.with_suffix(".out").open("w"),
        stderr=log.with_suffix(".err").open("w"),
        start_new_session=True,
    )
    started.append(launcher)
    return launcher


def pids_by_rank(launcher):
    """Return {rank: process id} of the processes that a launcher has started."""
    pids = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                lines = (folder / "environ").read_text().split("\0")
                environment = dict(line.partition("=")[::2] for line in lines)
                pids[int(environment["RANK"])] = int(folder.name)
        except (OSError, IndexError, KeyError):  # it has just exited, or is not a rank of the run
            pass
    return pids


def read_rows(out):
    return read_metrics(out / "metrics.jsonl")


def wait_for_steps(launcher, out):
    """Wait until a run has taken steps after a checkpoint."""
    n, end = SAVE_EVERY + 2, time.monotonic() + BOUND
    while len(read_rows(out)) < n and launcher.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    errors = [file.read_text() for file in out.parent.glob("*.err")]
    assert launcher.poll() is None and len(read_rows(out)) >= n, errors


def wait_for_exit(launcher, log):
    """Wait until a launcher and all its processes exit; return exit code, stdout and stderr."""
    code = launcher.wait(BOUND)
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)
    return code, log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text()


def assert_same_run(cut, whole):
    difference = max_relative_difference(checkpoint.load(cut).model, checkpoint.load(whole).model)
    assert difference < 1e-10
    assert [row["step"] for row in read_rows(cut)] == list(range(1, STEPS + 1))
    assert [row["train_loss"] for row in read_rows(cut)] == pytest.approx(
        [row["train_loss"] for row in read_rows(whole)], rel=1e-10
    )


@pytest.mark.parametrize(("mesh", "rank"), [("dp=2", 0), ("dp=2", 1), ("ep=2", 1), ("fsdp=2", 0)])
def test_restarted_processes_end_as_if_undisturbed(folder, mesh, rank):
    cut = folder / f"{mesh}-without-{rank}"
    launcher = launch(mesh, cut, restarts=1)
    wait_for_steps(launcher, cut)
    os.kill(pids_by_rank(launcher)[rank], signal.SIGKILL)
    time.sleep(0.5)  # the other process exits; new ones need seconds before they write
    done = len(read_rows(cut))
    code, out, err = wait_for_exit(launcher, cut)
    assert code == 0, err
    assert "Traceback" not in err
    (resumed,) = re.findall(r"resume .*, after step (\d+)", out)
    assert done - SAVE_EVERY <= int(resumed) <= done < STEPS
    assert_same_run(cut, folder / mesh)


def test_two_machines_restart_together(folder):
    """Two launchers, as on two machines.

    One sees the processes of the other restart, and does not count it as a restart of its own.
    """
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "x", "--rdzv-backend", "c10d"]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    cut, logs = folder / "machines", [folder / "machine-0", folder / "machine-1"]
    launchers = [launch("dp=2", cut, restarts=2, flags=flags, log=log) for log in logs]
    wait_for_steps(launchers[0], cut)
    pids = [pids_by_rank(launcher).get(1) for launcher in launchers]
    (pid,) = [pid for pid in pids if pid is not None]
    os.kill(pid, signal.SIGKILL)
    for launcher, log in zip(launchers, logs, strict=True):
        code, _, err = wait_for_exit(launcher, log)
        assert code == 0, err
    assert_same_run(cut, folder / "dp=2")


def test_if_a_process_is_killed_all_exit_and_resume_continues(folder):
    cut = folder / "cut"
    launcher = launch("dp=2", cut)
    wait_for_steps(launcher, cut)
    os.kill(pids_by_rank(launcher)[1], signal.SIGKILL)
    code, _, err = wait_for_exit(launcher, cut)
    assert code == 1
    assert "another process was lost" in err and "--resume continues" in err
    assert "process 1 was killed by SIGKILL" in err
    assert "Traceback" not in err
    saved = checkpoint.list_checkpoints(cut)
    assert len(saved) >= 1 and not any(checkpoint.find_corruption(path) for path in saved)
    code, _, err = wait_for_exit(launch("dp=2", cut, "--resume"), cut)
    assert code == 0, err
    assert_same_run(cut, folder / "dp=2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_or_to_all_saves_and_exits_cleanly(folder, number):
    """SIGTERM to the launcher alone, as from a cluster; SIGINT to all processes, as from Ctrl-C."""
    cut = folder / number.name
    launcher = launch("dp=2", cut)
    wait_for_steps(launcher, cut)
    if number == signal.SIGINT:
        os.killpg(launcher.pid, number)
    else:
        os.kill(launcher.pid, number)
    code, out, err = wait_for_exit(launcher, cut)
    assert code == 128 + number, err
    assert "Traceback" not in err and "--resume" in out
    state = json.loads((checkpoint.list_checkpoints(cut)[-1] / "state.json").read_text())
    assert f"saved after step {state['step']}" in out
    assert state["step"] == len(read_rows(cut)) < STEPS
