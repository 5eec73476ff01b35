"""The user's mistakes, told apart from ours.

A `UserError` is a mistake that the person at the keyboard can mend: it ends the program with exit code 2 and its message
alone. Every other exception is a bug of nanods and keeps its traceback.
"""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, and how to mend it, in words for the person at the keyboard."""


# The operating system's refusals that a person can mend.
MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or choose another disk with --out-dir",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another disk with --out-dir",
    errno.EFBIG: "the file system or `ulimit -f` refuses a file of this size: choose another disk with --out-dir",
    errno.EACCES: "permission denied: choose a folder that you may write to with --out-dir",
    errno.EPERM: "permission denied: choose a folder that you may write to with --out-dir",
    errno.EROFS: "the file system is read-only: choose another place with --out-dir",
    errno.ENOTDIR: "a file stands where a folder should be: move it, or choose another place with --out-dir",
    errno.EEXIST: "a file stands where a folder should be: move it, or choose another place with --out-dir",
}


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`; a mistake of the user becomes one message and exit code 2."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in MENDS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{MENDS[error.errno]}")


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
