"""Mistakes of the user, kept apart from bugs of nanods.

A `UserError` is a mistake that the user can fix: `run` prints its message alone and ends the
program with exit code 2. Every other exception is a bug of nanods and keeps its traceback.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can fix. The message says what is wrong and how to fix it."""


# Errors of the operating system that the user can fix: errno -> what is wrong, and how to fix it.
OS_ERROR_FIXES = {
    errno.ENOSPC: "the disk is full: free some space, or choose another disk",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another disk",
    errno.EFBIG: (
        "the file system or `ulimit -f` refuses a file of this size: choose another disk"
    ),
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.EIO: "the disk cannot be read or written here: check it, or choose another disk",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a file exists where a folder is needed: move it, or choose another folder",
    errno.EEXIST: "a file exists where a folder is needed: move it, or choose another folder",
}


BROKEN_PIPE = 128 + 13  # 13 is SIGPIPE, which Windows lacks


def run(main: Callable[[], None], how_to_choose: str = "") -> None:
    """Run a program's `main`. Turn a mistake of the user into one message and exit code 2, Ctrl-C
    into exit code 130, and a reader of stdout that has closed it (`| head`) into exit code 141.

    `how_to_choose`: how the user makes the program write elsewhere, such as "with --out-dir".

    Characters that the terminal or file behind stdout cannot take (LANG=C, say) are printed as "?".
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        refuse_undecodable(sys.argv[1:])
        main()
        print(end="", flush=True)
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        # Otherwise Python flushes stdout again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if error.errno not in OS_ERROR_FIXES:
            raise
        path = f"{error.filename}: " if error.filename else ""
        fail(f"{path}{OS_ERROR_FIXES[error.errno]} {how_to_choose}".rstrip())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def refuse_undecodable(words: list[str]) -> None:
    """Raise UserError for a word of the command line that is not in the system's encoding."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            shown = word.encode(errors="backslashreplace").decode()
            raise UserError(
                f"the argument {shown} is not {sys.getfilesystemencoding()}: type it in that "
                "encoding, and rename a file whose name is not"
            )


def fail(message: str) -> None:
    """Print an error message to stderr and end the program with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
