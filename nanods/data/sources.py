"""Where the documents of a corpus too large for memory are, cut into parts that processes read apart.

A folder of .txt, .jsonl (field "text") and .parquet files (column "text"; pyarrow comes with the extra `datasets`), those in
its subfolders too, in the order of their paths; or FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557), streamed by `datasets`.

Every document ends in a newline, added where it has none: the prompt that sample.py starts from, and how nanods/data/text.py
joins the rows of a data set. As no token crosses a line's end, documents and parts can be encoded apart, with the tokens of the
whole text. Left out on purpose: a token of its own between documents, compressed files, finding duplicates.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanods.data.tokenizer import lines
from nanods.errors import UserError

KINDS = (".txt", ".jsonl", ".parquet")
SAVED = (
    "dataset_dict.json",
    "state.json",
)  # what datasets' save_to_disk leaves in a folder; nanods/data/text.py reads that
INDEX = "shards.json"  # what nanods/data/shards.py leaves in a folder
FINEWEB = "fineweb-edu"
FINEWEB_ADDRESS = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
SLICE = 1 << 26  # bytes of source for one shard, about
HELD_OUT = 1 << 20  # bytes of source for validation, about; a tenth of it where that is less


@dataclass(frozen=True)
class Part:
    """What begins in [start, stop) of a file: rows of a .parquet; of others lines, counted by the byte they begin at."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class StreamPart:
    """Of file `index` of FineWeb-Edu's `total` the first documents, `held_out` bytes or little more, or all after these."""

    index: int
    total: int
    held_out: int
    validation: bool


def is_source(name: str) -> bool:
    """Whether a name or path is to be read in shards: FineWeb-Edu, a folder of text files, or one of shards."""
    if name == FINEWEB:
        return True
    try:
        folder = Path(name)
        if not name or not folder.is_dir() or any((folder / mark).is_file() for mark in SAVED):
            return False
        return (folder / INDEX).is_file() or any(text_files(folder))
    except (OSError, ValueError):  # no name that a file could have
        return False


def text_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in KINDS and path.is_file())


def fingerprint(name: str) -> str:
    """Changes with what `plan` would give: by the names, sizes and times of change of a folder's files, as make does."""
    if name == FINEWEB:
        what = [*FINEWEB_ADDRESS, HELD_OUT]
    else:
        stats = [
            (path.relative_to(name).as_posix(), path.stat())
            for path in sorted(text_files(Path(name)))
        ]
        what = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats] + [SLICE, HELD_OUT]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def plan(name: str) -> dict[str, tuple[Part | StreamPart, ...]]:
    """Shards in order -> what each holds; the last is the validation: the end of each file, or the start of each streamed one.

    Raises UserError for a .parquet that cannot be read and for a data set that cannot be fetched.
    """
    if name == FINEWEB:
        total = stream().num_shards
        held_out = [StreamPart(i, total, HELD_OUT // total, True) for i in range(total)]
        train = [[StreamPart(i, total, HELD_OUT // total, False)] for i in range(total)]
    else:
        train, held_out = plan_folder(Path(name))
    return {f"train-{i:05d}.bin": tuple(parts) for i, parts in enumerate(train)} | {
        "validation.bin": tuple(held_out)
    }


def plan_folder(folder: Path) -> tuple[list[list[Part]], list[Part]]:
    """-> of each training shard its parts, of SLICE to twice SLICE bytes together; the parts of the validation."""
    files = [(path, path.stat().st_size) for path in sorted(text_files(folder))]
    total = max(1, sum(size for _, size in files))
    train, held_out, room = [], [], 0
    for path, size in files:
        length = row_count(path) if path.suffix == ".parquet" else size
        cut = length - min(length // 10, length * HELD_OUT // total)
        pieces = max(1, -(-size // SLICE))
        for i in range(pieces):
            if room <= 0:
                train.append([])
                room = SLICE
            train[-1].append(Part(str(path), cut * i // pieces, cut * (i + 1) // pieces))
            room -= -(-size // pieces)
        held_out.append(Part(str(path), cut, length))
    return train, held_out


# ---- parts -> documents


def documents(parts: Iterable[Part | StreamPart]) -> Iterator[str]:
    """The documents of some parts, those of a .txt line by line, each with a newline at its end.

    Raises UserError naming the file and the place of what cannot be read.
    """
    for part in parts:
        for text in read(part):
            yield text if text.endswith("\n") else text + "\n"


def read(part: Part | StreamPart) -> Iterator[str]:
    if isinstance(part, StreamPart):
        return streamed(part)
    return {".txt": text_lines, ".jsonl": json_texts, ".parquet": column}[Path(part.path).suffix](
        part
    )


def begun_in(part: Part) -> tuple[int, bytes]:
    """The lines that begin in a part, whole, and where the first does: each line of a file is in one part."""
    try:
        with Path(part.path).open("rb") as file:
            if part.start:
                file.seek(part.start - 1)
                file.readline()  # to the end of the line that began before
            at = file.tell()
            data = file.read(max(0, part.stop - at))
            return at, data if not data or data.endswith(b"\n") else data + file.readline()
    except OSError as error:
        raise UserError(
            f"--data {part.path}: cannot be read ({error.strerror}); see to its permissions or its disk"
        ) from error


def text_lines(part: Part) -> Iterator[str]:
    at, data = begun_in(part)
    yield from lines(decode_text(part.path, data, at) if data else "")


def json_texts(part: Part) -> Iterator[str]:
    at, data = begun_in(part)
    for line in data.split(b"\n"):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                if text is not None and not isinstance(text, str):
                    raise TypeError(f"a {type(text).__name__}")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'--data {part.path}: the line at byte {at:,} is no JSON object with a string "text" '
                    f"({type(error).__name__}: {error}); mend or delete this line"
                ) from None
            if text is not None:
                yield text.encode(
                    errors="replace"
                ).decode()  # "\\ud800" is JSON, and not to be said in UTF-8
        at += len(line) + 1


def column(part: Part) -> Iterator[str]:
    """The rows of column "text"; nulls are left out."""
    file, begin = open_parquet(Path(part.path)), 0
    for group in range(file.num_row_groups):
        at = begin
        begin += file.metadata.row_group(group).num_rows
        if at >= part.stop or begin <= part.start:
            continue
        try:
            for batch in file.iter_batches(1000, row_groups=[group], columns=["text"]):
                first, at = at, at + batch.num_rows
                few = batch.slice(
                    max(0, part.start - first), max(0, min(at, part.stop) - max(first, part.start))
                )
                yield from (text for text in few.column(0).to_pylist() if text is not None)
        except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
            raise damaged_parquet(part.path, error) from error


def row_count(path: Path) -> int:
    file = open_parquet(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(
            f"--data {path}: no column called text, only {', '.join(file.schema_arrow.names)}; rename one"
        )
    if (kind := str(file.schema_arrow.field("text").type)) not in (
        "string",
        "large_string",
        "string_view",
    ):
        raise UserError(f"--data {path}: column text holds {kind}, not strings; convert it")
    return file.metadata.num_rows


def open_parquet(path: Path):
    try:
        from pyarrow import parquet
    except ImportError:
        raise missing(str(path), "pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise damaged_parquet(path, error) from error


def damaged_parquet(path: Path | str, error: Exception) -> UserError:
    return UserError(
        f"--data {path}: no Parquet that can be read ({error}); fetch this file again, or take it away"
    )


def stream():
    """FineWeb-Edu as an IterableDataset of `num_shards` files."""
    try:
        import datasets
    except ImportError:
        raise missing(FINEWEB, "datasets") from None
    try:
        return datasets.load_dataset(*FINEWEB_ADDRESS, split="train", streaming=True)
    except Exception as error:  # whatever the library and its network raise
        raise unreachable(error) from error


def streamed(part: StreamPart) -> Iterator[str]:
    rows, size = stream().shard(num_shards=part.total, index=part.index), 0
    try:
        for row in rows:
            held_out = size < part.held_out
            size += len(row["text"].encode())
            if held_out == part.validation:
                yield row["text"]
            elif part.validation:
                return
    except Exception as error:
        raise unreachable(error) from error


def unreachable(error: Exception) -> UserError:
    return UserError(
        f"--data {FINEWEB}: the library datasets could not read it ({type(error).__name__}: {error}); check the network and "
        "run the same command again (finished shards are kept), or give a folder of its .parquet files as --data"
    )


def missing(name: str, library: str) -> UserError:
    return UserError(
        f"--data {name} needs the library {library}: `make setup EXTRAS=datasets`, or pip install 'nanods[datasets]'"
    )


def decode_text(name: str, data: bytes, at: int = 0) -> str:
    """The text that UTF-8 bytes say, those from byte `at` of a file. Raises UserError for none, a zero byte and no UTF-8."""
    if not data:
        raise UserError(f"--data {name}: the file is empty; give a text to learn from")
    if (position := data.find(0)) >= 0:
        raise UserError(
            f"--data {name}: a binary file (a zero byte at {at + position:,}); give a UTF-8 text file"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {name}: not UTF-8 (byte 0x{data[error.start]:02x} at {at + error.start:,}); convert it, for example "
            "from Latin-1: iconv -f latin1 -t utf-8 OLD > NEW"
        ) from None
