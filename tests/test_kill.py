"""A run killed at any moment resumes, and ends bit for bit as if undisturbed."""

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
BLOCKS = ["--attention.block-size", "8"]


def start(workspace, *flags, **options):
    """Start `train.py v1-tiny ... FLAGS` in the workspace."""
    train = [sys.executable, str(ROOT / "train.py"), "v1-tiny", *TINY, *BLOCKS]
    return subprocess.Popen(
        [*train, "--data", "text.txt", *map(str, flags)],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_run_killed_again_and_again_ends_as_if_undisturbed(workspace):
    flags = ("--steps", 400, "--save-every", 3)
    undisturbed = start(workspace, *flags, "--out-dir", "whole")
    assert undisturbed.wait(300) == 0, undisturbed.stderr.read()
    chance, kills = random.Random(0), 0
    while True:
        resume = ["--resume"] if checkpoint.list_checkpoints(workspace / "cut") else []
        process = start(workspace, *flags, *resume, "--out-dir", "cut")
        wait_for_training(process, workspace / "cut" / "metrics.jsonl")
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


def wait_for_training(process, file):
    """Wait until a process, after seconds of imports, writes to its metrics file, or exits."""
    while process.poll() is None and not file.exists():
        time.sleep(0.01)
    before = file.stat().st_mtime_ns
    while process.poll() is None and file.stat().st_mtime_ns == before:
        time.sleep(0.01)


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_from_the_one_before(workspace):
    """It is killed just before it renames the folder of step 6."""
    code = (
        "import os, signal, train\n"
        "from nanods.errors import run\n"
        "from nanods.training import checkpoint\n"
        "fsync = checkpoint.fsync\n"
        "def fsync_or_kill(path):\n"
        "    if '_000006' in str(path):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    fsync(path)\n"
        "checkpoint.fsync = fsync_or_kill\n"
        "run(train.main)\n"
    )
    steps = ["--steps", "9", "--save-every", "3"]
    flags = [*TINY, "--data", "text.txt", *steps, "--out-dir", "cut", *BLOCKS]
    killed = subprocess.run(
        [sys.executable, "-c", code, "v1-tiny", *flags],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert killed.returncode == -9
    names = [path.name for path in checkpoint.list_checkpoints(workspace / "cut")]
    assert names == ["step_000000", "step_000003"]
    resumed = start(workspace, *steps, "--out-dir", "cut", "--resume")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    whole = start(workspace, *steps, "--out-dir", "whole")
    assert whole.wait(120) == 0
    assert weights(workspace / "cut") == weights(workspace / "whole")
    assert metrics(workspace / "cut") == metrics(workspace / "whole")


def test_a_limit_on_file_sizes_is_reported_and_no_saved_checkpoint_is_lost(workspace):
    """The checkpoint over the limit cannot be written: as on a full disk, but without root."""
    first = start(workspace, "--steps", 3, "--save-every", 3, "--out-dir", "run", "--seed", 1)
    assert first.wait(120) == 0
    before = weights(workspace / "run")

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    flags = ("--steps", 9, "--save-every", 3, "--out-dir", "full")
    process = start(workspace, *flags, preexec_fn=limit_file_size)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert "refuses a file of this size" in err or "free some space" in err
    assert not checkpoint.list_checkpoints(workspace / "full")
    assert weights(workspace / "run") == before


@pytest.fixture
def small_disk(workspace):
    """A separate file system of 8 MB."""
    disk = workspace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_reported_and_the_run_resumes_once_there_is_space(workspace, small_disk):
    flags, out = ("--steps", 9, "--save-every", 3), small_disk / "run"
    whole = start(workspace, *flags, "--out-dir", "whole")
    assert whole.wait(120) == 0, whole.stderr.read()
    saved = checkpoint.load(workspace / "whole").path
    size = sum(path.stat().st_size for path in saved.iterdir())
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free - 2 * size))  # space for two checkpoints, not for a third
    full = start(workspace, *flags, "--out-dir", out)
    _, err = full.communicate(timeout=120)
    assert full.returncode == 2, err
    assert "Traceback" not in err and "space" in err
    assert [path.name for path in checkpoint.list_checkpoints(out)] == [
        "step_000000",
        "step_000003",
    ]
    assert not list(out.glob(".writing-*"))
    filler.unlink()
    resumed = start(workspace, *flags, "--out-dir", out, "--resume")
    assert resumed.wait(120) == 0, resumed.stderr.read()
    assert weights(out) == weights(workspace / "whole")
    assert metrics(out) == metrics(workspace / "whole")
