"""Files that arrive whole or not at all: the data folder, atomic writes, and resumable, verified downloads.

Needs only the standard library's urllib. Leaves out on purpose: parallel connections, archives, authentication.
The tests run it against a server on loopback that stalls, cuts off, corrupts and ignores Range.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from nanods.errors import MENDS, UserError

try:
    import fcntl
except (
    ImportError
):  # Windows: no lock; two downloads at once can spoil the .part, which the hash then shows
    fcntl = None


def data_dir() -> Path:
    """The folder of corpora and caches: the environment variable NANODS_DATA, or `data` in the current directory."""
    return Path(os.environ.get("NANODS_DATA") or "data")


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it to `path`: readers never see half a file.

    Each writer has a temporary name of its own, so of several at once the last rename wins and none is mixed.
    Raises UserError where the folder cannot be written.
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
        raise unwritable(path, error) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written ({error.strerror}): free some space there, or choose another data folder with "
        "the environment variable NANODS_DATA=FOLDER"
    )


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(urls: Sequence[str], path: Path, sha256: str, timeout: float = 30.0) -> Path:
    """Fetch a file from the first of `urls` (mirrors of each other) that gives the bytes of hash `sha256`, to `path`.

    A right file already at `path` is taken without network. What an interrupted download left in `path`.part is
    continued by HTTP Range, from any mirror. `timeout`: seconds without a byte before a server counts as stalled.
    Raises UserError if another file is in the place, if every mirror fails, or if the folder cannot be written.
    """
    if path.exists():
        return verified(path, sha256)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            if fcntl:
                fcntl.flock(
                    file, fcntl.LOCK_EX
                )  # a second process waits here, and then finds the first one's file
            if path.exists():
                return verified(path, sha256)
            reasons = try_mirrors(urls, file, part, sha256, timeout)
            os.fsync(file.fileno())
            if not reasons and fcntl:
                part.replace(
                    path
                )  # before the lock goes, so that nobody appends to a finished file
        if not reasons and not fcntl:
            part.replace(path)  # Windows renames only closed files
    except OSError as error:
        raise unwritable(part, error) from error
    if reasons:
        tried = "\n".join(f"  {reason}" for reason in reasons)
        raise UserError(
            f"{path.name} could not be downloaded:\n{tried}\n"
            f"Check the network and run the same command again (it continues where this one stopped), "
            f"or put the file at {path} yourself (sha256 {sha256})."
        )
    return path


def verified(path: Path, sha256: str) -> Path:
    found = file_sha256(path) if path.is_file() else "none: it is not a file"
    if found == sha256:
        return path
    raise UserError(
        f"{path} is not the expected file (its sha256 is {found}, expected {sha256}): "
        "move it away and run again to download the right one, or put the right one in its place"
    )


def try_mirrors(
    urls: Sequence[str], file: BinaryIO, part: Path, sha256: str, timeout: float
) -> list[str]:
    """Fill `file` (open for appending at `part`) until its hash is right: [] then, else each mirror's failure."""
    reasons = []
    for url in urls:
        reason = try_mirror(url, file, part, sha256, timeout)
        if reason is None:
            return []
        reasons.append(f"{url}: {reason}")
    return reasons


def try_mirror(url: str, file: BinaryIO, part: Path, sha256: str, timeout: float) -> str | None:
    while file_sha256(part) != sha256:
        before = part.stat().st_size
        try:
            fetch(url, file, part.stem, timeout)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in MENDS:
                raise  # the disk's fault, not the server's
            if part.stat().st_size <= before:
                return str(error) or type(error).__name__
            continue  # cut off, but further on than the last time
        if file_sha256(part) != sha256:
            file.truncate(0)
            if before == 0:
                return "sent other bytes than expected (the sha256 differs)"
            # else what lay in the .part may be to blame: once more from the start
    return None


def fetch(url: str, file: BinaryIO, name: str, timeout: float) -> None:
    """Append to `file` what it lacks of `url`. OSError or HTTPException if the connection fails or ends early."""
    start = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "nanods"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # Range Not Satisfiable: nothing lies beyond what is here
            return
        raise
    with response:
        if response.status != 206:  # 206 Partial Content; any other success is the whole file
            file.truncate(0)
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with tqdm(
            total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=None
        ) as bar:
            while chunk := response.read1(
                1 << 16
            ):  # read1 hands on what has arrived, read would lose it in a stall
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
    if total is not None and (got := file.seek(0, os.SEEK_END)) < total:
        raise ConnectionError(f"cut off after {got:,} of {total:,} bytes")
