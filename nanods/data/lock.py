"""Locks that keep two processes from writing the same run, download or cache at once.

The operating system holds a lock for the process that took it (flock; on Windows msvcrt.locking)
and releases it when that process ends, by SIGKILL too: no lock is ever stale. The lock file itself
means nothing; it names the process that holds the lock.

On NFS it depends on the mount. Linux passes flock on to the server, so that all machines see one
lock, unless the folder is mounted with `nolock` or `local_lock=flock`: then each machine has its
own. Where a file system has no locks (some Lustre mounts) a warning says so, and the work goes on.
"""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
SECONDS_OF_SILENCE = 1.0  # that `lock` waits before it says for whom


class LockHeldError(Exception):
    """Another process holds the lock. The message names it."""


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made, and deleted in the end.

    If another process holds it: wait, and say so on stderr, or raise LockHeldError if not `wait`.
    Raises OSError if the file cannot be made.
    """
    start, reported = time.monotonic(), False
    while (file := try_to_lock(path)) is None:
        if not wait:
            raise LockHeldError(holder(path))
        if not reported and time.monotonic() - start > SECONDS_OF_SILENCE:
            reported = True
            print(f"waiting    for {holder(path)}, which holds {path}", file=sys.stderr)
        time.sleep(0.05)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, ")
        file.write(f"started {datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                path.unlink()


def try_to_lock(path: Path) -> TextIO | None:
    """Return the open and locked file, or None if another process holds the lock."""
    file = path.open("a+", encoding="utf-8")
    try:
        # The process that held the lock may have deleted the file between our open and our lock.
        if lock_open_file(file, path) and is_same_file(file, path):
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def lock_open_file(file: TextIO, path: Path) -> bool:
    """Lock an open file and return whether no other process has locked it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # one byte far behind the text, as Windows lets no other process read locked bytes
            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        print(
            f"warning: the file system of {path} has no locks ({error.strerror}): "
            "start no second process that writes there",
            file=sys.stderr,
        )
    return True


def is_same_file(file: TextIO, path: Path) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def holder(path: Path) -> str:
    """Return which process holds the lock, in words."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
