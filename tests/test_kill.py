"""Killed at any moment, resumed, and still bit for bit the undisturbed run; a full disk loses nothing that was saved."""

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanods.training import checkpoint
from tests.conftest import TINY
from tests.test_train import metrics, weights

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def start(workspace, *args, **options):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "v1-tiny",
        *TINY,
        "--attention.block-size",
        "8",
        "--data",
        "text.txt",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, args)],
        cwd=workspace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_killed_again_and_again_it_ends_as_if_undisturbed(workspace):
    options = ("--steps", 400, "--save-every", 3)
    undisturbed = start(workspace, *options, "--out-dir", "whole")
    assert undisturbed.wait(300) == 0, undisturbed.stderr.read()
    chance, kills = random.Random(0), 0
    while True:
        resume = ["--resume"] if checkpoint.list_checkpoints(workspace / "cut") else []
        process = start(workspace, *options, *resume, "--out-dir", "cut")
        while process.poll() is None and not (workspace / "cut" / "metrics.jsonl").exists():
            time.sleep(0.01)  # the first seconds are imports
        before = (workspace / "cut" / "metrics.jsonl").stat().st_mtime_ns
        while (
            process.poll() is None
            and (workspace / "cut" / "metrics.jsonl").stat().st_mtime_ns == before
        ):
            time.sleep(0.01)
        try:
            process.wait(chance.uniform(0.05, 1.5) if kills < 8 else 300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        break
    assert kills >= 2
    assert metrics(workspace / "cut") == metrics(workspace / "whole")
    assert weights(workspace / "cut") == weights(workspace / "whole")


def test_killed_in_the_middle_of_writing_a_checkpoint(workspace):
    """The writer is killed just before the rename: the checkpoint before is the one that counts."""
    code = (
        "import os, signal, sys, train\n"
        "from nanods.errors import run\n"
        "from nanods.training import checkpoint\n"
        "real = checkpoint.fsync\n"
        "checkpoint.fsync = lambda p: os.kill(os.getpid(), signal.SIGKILL) if '_000006' in str(p) else real(p)\n"
        "run(train.main)\n"
    )
    options = [*TINY, "--data", "text.txt", "--steps", "9", "--save-every", "3", "--out-dir", "cut"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", code, "v1-tiny", *options, "--attention.block-size", "8"]
    assert (
        subprocess.run(arguments, cwd=workspace, env=environment, capture_output=True).returncode
        == -9
    )
    assert [path.name for path in checkpoint.list_checkpoints(workspace / "cut")] == [
        "step_000000",
        "step_000003",
    ]
    resumed = start(workspace, "--steps", 9, "--save-every", 3, "--out-dir", "cut", "--resume")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    whole = start(workspace, "--steps", 9, "--save-every", 3, "--out-dir", "whole")
    assert whole.wait(120) == 0
    assert weights(workspace / "cut") == weights(workspace / "whole")
    assert metrics(workspace / "cut") == metrics(workspace / "whole")


def test_a_limit_on_the_size_of_files_is_said_and_nothing_saved_is_lost(workspace):
    """The nearest thing to a full disk that needs no rights: the checkpoint that would cross the limit fails."""
    first = start(workspace, "--steps", 3, "--save-every", 3, "--out-dir", "run", "--seed", 1)
    assert first.wait(120) == 0
    before = weights(workspace / "run")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    process = start(
        workspace, "--steps", 9, "--save-every", 3, "--out-dir", "full", preexec_fn=limited
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err and (
        "refuses a file of this size" in err or "free some space" in err
    )
    assert (
        not checkpoint.list_checkpoints(workspace / "full") and weights(workspace / "run") == before
    )


@pytest.fixture
def small_disk(workspace):
    """A file system of 8 MB of its own."""
    disk = workspace / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room_again(workspace, small_disk):
    options = ("--steps", 9, "--save-every", 3)
    whole = start(workspace, *options, "--out-dir", "whole")
    assert whole.wait(120) == 0, whole.stderr.read()
    one = sum(path.stat().st_size for path in checkpoint.load(workspace / "whole").path.iterdir())
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler = small_disk / "filler"
    filler.write_bytes(
        bytes(free - 2 * one)
    )  # room for the first two checkpoints, not for a third beside them
    full = start(workspace, *options, "--out-dir", small_disk / "run")
    _, err = full.communicate(timeout=120)
    assert full.returncode == 2, err
    assert "Traceback" not in err and "space" in err
    assert [path.name for path in checkpoint.list_checkpoints(small_disk / "run")] == [
        "step_000000",
        "step_000003",
    ]
    assert not list((small_disk / "run").glob(".writing-*"))
    filler.unlink()
    resumed = start(workspace, *options, "--out-dir", small_disk / "run", "--resume")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    assert weights(small_disk / "run") == weights(workspace / "whole")
    assert metrics(small_disk / "run") == metrics(workspace / "whole")
