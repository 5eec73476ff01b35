"""Files that are written whole or not at all."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_and_rename(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that readers never see half of it.

    `write` fills a temporary file in the same folder, which is then synced to disk and renamed to
    `path`. Each writer has a temporary file with a unique name: of several writers the last rename
    wins, and their contents never mix.

    Raises OSError with a file's name if the folder cannot be written; a file that is there already
    is untouched then.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        if temporary.is_file():
            temporary.unlink()
