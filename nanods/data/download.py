"""The data folder, atomic writes, and resumable, verified downloads.

It needs only the standard library's urllib. Left out on purpose: parallel connections, archives,
authentication. The tests run it against a server on loopback that stalls, cuts off, corrupts and
ignores Range.
"""

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from nanods.data.lock import lock
from nanods.errors import OS_ERROR_FIXES, UserError
from nanods.files import write_and_rename


def data_dir() -> Path:
    """Return the folder of corpora and caches: $NANODS_DATA, or `data` in the current folder."""
    return Path(os.environ.get("NANODS_DATA") or "data")


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of the data folder, by `write_and_rename`.

    Raises UserError if the folder cannot be written.
    """
    try:
        write_and_rename(path, write)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> UserError:
    """Return the UserError for a path in the data folder that cannot be written."""
    return UserError(
        f"{path} cannot be written ({error.strerror}): free some space there, or choose another "
        "data folder with the environment variable NANODS_DATA=FOLDER"
    )


@contextlib.contextmanager
def lock_data(path: Path) -> Iterator[None]:
    """Keep other processes from making the same file or folder of the data folder: they wait.

    Raises UserError if the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(path.with_name(f".{path.name}.lock")))
        except OSError as error:
            raise write_error(path, error) from error
        yield


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(urls: Sequence[str], path: Path, sha256: str, timeout: float = 30.0) -> Path:
    """Download the file with hash `sha256` from the first mirror that has it. Return `path`.

    `urls`: the mirrors, in the order in which they are tried.
    A correct file that exists already needs no network. An interrupted download leaves `path`.part,
    which the next one continues by HTTP Range, from any mirror. `timeout`: seconds without a byte
    after which a server counts as stalled.

    Raises UserError if another file exists at `path`, if every mirror fails, or if the folder
    cannot be written.
    """
    if path.exists():
        return verify_file(path, sha256)
    part = path.with_name(path.name + ".part")
    # A second process waits here, and then finds the finished file of the first one.
    with lock_data(path):
        if path.exists():
            return verify_file(path, sha256)
        try:
            with part.open("ab") as file:
                failures = download_from_mirrors(urls, file, part, sha256, timeout)
                os.fsync(file.fileno())
            if not failures:
                part.replace(path)
        except OSError as error:
            raise write_error(part, error) from error
    if failures:
        listed = "\n".join(f"  {failure}" for failure in failures)
        raise UserError(
            f"{path.name} could not be downloaded:\n{listed}\n"
            "Check the network and run the same command again (it continues where this one "
            f"stopped), or put the file at {path} yourself (sha256 {sha256})."
        )
    return path


def verify_file(path: Path, sha256: str) -> Path:
    """Return `path` if it is a file with this hash. Raises UserError if not."""
    actual = file_sha256(path) if path.is_file() else "none: it is not a file"
    if actual == sha256:
        return path
    raise UserError(
        f"{path} is not the expected file (its sha256 is {actual}, expected {sha256}): "
        "move it away and run again to download the right one, or put the right one in its place"
    )


def download_from_mirrors(
    urls: Sequence[str], file: BinaryIO, part: Path, sha256: str, timeout: float
) -> list[str]:
    """Fill `file`, which is open for appending at `part`, until its hash is right.

    Return [] on success, else the reason why each mirror failed.
    """
    failures = []
    for url in urls:
        failure = download_from_mirror(url, file, part, sha256, timeout)
        if failure is None:
            return []
        failures.append(f"{url}: {failure}")
    return failures


def download_from_mirror(
    url: str, file: BinaryIO, part: Path, sha256: str, timeout: float
) -> str | None:
    """Fill `file` from one mirror. Return None on success, else the reason why it failed."""
    while file_sha256(part) != sha256:
        size_before = part.stat().st_size
        try:
            fetch(url, file, part.stem, timeout)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in OS_ERROR_FIXES:
                raise  # the disk failed, not the server
            if part.stat().st_size <= size_before:
                return str(error) or type(error).__name__
            continue  # the connection was cut off, but it made progress: try again
        if file_sha256(part) != sha256:
            file.truncate(0)
            if size_before == 0:
                return "sent other bytes than expected (the sha256 differs)"
            # Otherwise the old .part file may be wrong, not the server: try once more from the
            # start.
    return None


def fetch(url: str, file: BinaryIO, name: str, timeout: float) -> None:
    """Append to `file` the rest of `url`, with a progress bar called `name`.

    Raises OSError or HTTPException if the connection fails or ends early.
    """
    start = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "nanods"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # Range Not Satisfiable: the server has no bytes after these
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
            # read1 returns what has arrived so far; read would lose it when the server stalls.
            while chunk := response.read1(1 << 16):
                file.write(chunk)
                file.flush()
                bar.update(len(chunk))
    if total is not None and (size := file.seek(0, os.SEEK_END)) < total:
        raise ConnectionError(f"cut off after {size:,} of {total:,} bytes")
