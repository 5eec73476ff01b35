"""Locks: one process at a time, released when that process ends in any way."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanods.data import lock as lock_module
from nanods.data.lock import LockHeldError, lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from nanods.data.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the lock tmp_path / "lock"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_of_another_process_is_refused_by_name_and_released_by_its_death(
    tmp_path, other_process, monkeypatch, capsys
):
    path = tmp_path / "lock"
    holder = f"process {other_process.pid} on .*, started 2"
    with pytest.raises(LockHeldError, match=holder), lock(path, wait=False):
        pass
    monkeypatch.setattr(lock_module, "SECONDS_OF_SILENCE", 0)
    threading.Timer(0.3, other_process.kill).start()  # SIGKILL
    with lock(path):
        assert "waiting" in capsys.readouterr().err
    assert not path.exists()


def test_a_lock_is_held_once_and_leaves_no_file(tmp_path):
    path, inside = tmp_path / "lock", []

    def work():
        for _ in range(20):
            with lock(path):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not inside and not list(tmp_path.iterdir())


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    with lock(tmp_path / "lock", wait=False):
        assert "has no locks" in capsys.readouterr().err


def test_windows_locks_a_byte_behind_the_text(tmp_path, monkeypatch):
    locked = set()

    class msvcrt:  # noqa: N801
        LK_NBLCK = 2

        @staticmethod
        def locking(descriptor, mode, n_bytes):
            assert os.lseek(descriptor, 0, os.SEEK_CUR) == 1 << 30 and n_bytes == 1
            if os.fstat(descriptor).st_ino in locked:
                raise PermissionError(errno.EACCES, "Permission denied")
            locked.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(lock_module, "fcntl", None)
    monkeypatch.setattr(lock_module, "msvcrt", msvcrt, raising=False)
    path = tmp_path / "lock"
    with lock(path):
        assert path.stat().st_size < 200
        this = f"process {os.getpid()} on"
        with pytest.raises(LockHeldError, match=this), lock(path, wait=False):
            pass
