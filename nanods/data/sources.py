"""Documents of a corpus larger than memory, cut into parts that processes read separately.

A source is a folder of .txt, .jsonl (field "text") and .parquet files (column "text"; pyarrow comes
with the extra `datasets`), subfolders included, in the order of their paths; or FineWeb-Edu
(Penedo et al. 2024, arXiv:2406.17557), streamed by `datasets`.

Every document ends in a newline, added where it is missing: sample.py's default prompt is a
newline, and nanods/data/text.py joins the rows of a data set in the same way. No token crosses the
end of a line, so documents and parts can be encoded separately and give the tokens of the whole
text. Left out on purpose: a special token between documents, compressed files, deduplication.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanods.data.tokenizer import lines
from nanods.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
# Files that datasets' save_to_disk writes into a folder; nanods/data/text.py reads such a folder.
DATASETS_MARKERS = ("dataset_dict.json", "state.json")
INDEX = "shards.json"  # the file that nanods/data/shards.py writes into a folder of shards
FINEWEB = "fineweb-edu"
FINEWEB_ADDRESS = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
SLICE = 1 << 26  # bytes of source for one shard, about
HELD_OUT = 1 << 20  # bytes of source for validation, about; at most a tenth of each file


@dataclass(frozen=True)
class Part:
    """A part of a file, [start, stop).

    Of a .parquet file: these rows. Of another file: the lines that begin at these bytes.
    """

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class StreamPart:
    """A part of file `index` of FineWeb-Edu's `total` files.

    With `validation`: its first documents, `held_out` bytes or a little more. Without: all
    documents after these.
    """

    index: int
    total: int
    held_out: int
    validation: bool


def is_sharded_source(name: str) -> bool:
    """Return whether a corpus is read in shards.

    These are FineWeb-Edu, a folder of text files and a folder of shards."""
    if name == FINEWEB:
        return True
    try:
        folder = Path(name)
        if not name or not folder.is_dir():
            return False
        if any((folder / marker).is_file() for marker in DATASETS_MARKERS):
            return False
        return (folder / INDEX).is_file() or any(text_files(folder))
    except (OSError, ValueError):  # a name that no file can have
        return False


def text_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a source folder, subfolders included, in no particular order."""
    return (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def fingerprint(name: str) -> str:
    """Return a hash that changes when the output of `plan` may change.

    For a folder it depends on the names, sizes and modification times of the files, as in `make`.
    """
    if name == FINEWEB:
        inputs = [*FINEWEB_ADDRESS, HELD_OUT]
    else:
        inputs = []
        for path in sorted(text_files(Path(name))):
            stat = path.stat()
            inputs.append([path.relative_to(name).as_posix(), stat.st_size, stat.st_mtime_ns])
        inputs += [SLICE, HELD_OUT]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def plan(name: str) -> dict[str, tuple[Part | StreamPart, ...]]:
    """Return the shards of a source in order: file name -> the parts that the shard holds.

    The last shard is the validation split. It holds the end of each file of a folder, or the start
    of each streamed file.

    Raises UserError for a .parquet file that cannot be read or a data set that cannot be fetched.
    """
    if name == FINEWEB:
        total = stream().num_shards
        held_out = [StreamPart(i, total, HELD_OUT // total, True) for i in range(total)]
        train = [[StreamPart(i, total, HELD_OUT // total, False)] for i in range(total)]
    else:
        train, held_out = plan_folder(Path(name))
    shards = {f"train-{i:05d}.bin": tuple(parts) for i, parts in enumerate(train)}
    shards["validation.bin"] = tuple(held_out)
    return shards


def plan_folder(folder: Path) -> tuple[list[list[Part]], list[Part]]:
    """Return the parts of each training shard, and the parts of the validation shard.

    The parts of a training shard have SLICE to 2 * SLICE bytes together.
    """
    files = [(path, path.stat().st_size) for path in sorted(text_files(folder))]
    total = max(1, sum(size for _, size in files))
    train, held_out = [], []
    bytes_left = 0  # of the current shard
    for path, size in files:
        length = row_count(path) if path.suffix == ".parquet" else size
        cut = length - min(length // 10, length * HELD_OUT // total)
        pieces = max(1, -(-size // SLICE))
        for i in range(pieces):
            if bytes_left <= 0:
                train.append([])
                bytes_left = SLICE
            train[-1].append(Part(str(path), cut * i // pieces, cut * (i + 1) // pieces))
            bytes_left -= -(-size // pieces)
        held_out.append(Part(str(path), cut, length))
    return train, held_out


# ---- reading parts -------------------------------------------------------------------------------


def documents(parts: Iterable[Part | StreamPart]) -> Iterator[str]:
    """Yield the documents of some parts, each with a newline at its end. A .txt yields its lines.

    Raises UserError for data that cannot be read, with the file and the position.
    """
    for part in parts:
        for text in read_part(part):
            yield text if text.endswith("\n") else text + "\n"


def read_part(part: Part | StreamPart) -> Iterator[str]:
    """Yield the documents of one part as they are stored."""
    if isinstance(part, StreamPart):
        return read_stream(part)
    readers = {".txt": read_text_lines, ".jsonl": read_jsonl, ".parquet": read_parquet}
    return readers[Path(part.path).suffix](part)


def read_lines_of_part(part: Part) -> tuple[int, bytes]:
    """Return the byte at which the first line of a part begins, and the part's lines as bytes.

    The lines are those that begin in the part, to their ends, so each line of a file is in exactly
    one part.
    """
    try:
        with Path(part.path).open("rb") as file:
            if part.start:
                file.seek(part.start - 1)
                file.readline()  # skip the rest of a line that began in the part before
            begin = file.tell()
            data = file.read(max(0, part.stop - begin))
            if data and not data.endswith(b"\n"):
                data += file.readline()
            return begin, data
    except OSError as error:
        raise UserError(
            f"--data {part.path}: cannot be read ({error.strerror}); check its permissions and its "
            "disk"
        ) from error


def read_text_lines(part: Part) -> Iterator[str]:
    """Yield the lines of a part of a .txt file."""
    begin, data = read_lines_of_part(part)
    yield from lines(decode_text(part.path, data, begin) if data else "")


def read_jsonl(part: Part) -> Iterator[str]:
    """Yield the field "text" of each line of a part of a .jsonl file, without nulls."""
    position, data = read_lines_of_part(part)
    for line in data.split(b"\n"):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                if text is not None and not isinstance(text, str):
                    raise TypeError(f"a {type(text).__name__}")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"--data {part.path}: the line at byte {position:,} is no JSON object with a "
                    f'string "text" ({type(error).__name__}: {error}); fix or delete this line'
                ) from None
            if text is not None:
                # JSON can hold lone surrogates ("\\ud800"), which UTF-8 cannot encode: they become
                # "?".
                yield text.encode(errors="replace").decode()
        position += len(line) + 1


def read_parquet(part: Part) -> Iterator[str]:
    """Yield the rows of column "text" of a part of a .parquet file, without nulls."""
    file = open_parquet(Path(part.path))
    next_group = 0  # the first row of the next row group
    for group in range(file.num_row_groups):
        row = next_group
        next_group += file.metadata.row_group(group).num_rows
        if row >= part.stop or next_group <= part.start:
            continue
        try:
            for batch in file.iter_batches(1000, row_groups=[group], columns=["text"]):
                first, row = row, row + batch.num_rows
                begin, end = max(first, part.start), min(row, part.stop)
                rows = batch.slice(max(0, part.start - first), max(0, end - begin))
                yield from (text for text in rows.column(0).to_pylist() if text is not None)
        except (OSError, ValueError) as error:  # the classes from which pyarrow's errors inherit
            raise damaged_parquet(part.path, error) from error


def row_count(path: Path) -> int:
    """Return the number of rows of a .parquet file.

    Raises UserError if the file has no column "text" of strings."""
    file = open_parquet(path)
    if "text" not in file.schema_arrow.names:
        raise UserError(
            f"--data {path}: no column called text, only {', '.join(file.schema_arrow.names)}; "
            "rename one"
        )
    column_type = str(file.schema_arrow.field("text").type)
    if column_type not in ("string", "large_string", "string_view"):
        raise UserError(f"--data {path}: column text holds {column_type}, not strings; convert it")
    return file.metadata.num_rows


def open_parquet(path: Path):
    """Return a pyarrow ParquetFile. Raises UserError if it is damaged or pyarrow is missing."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise missing_library(str(path), "pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise damaged_parquet(path, error) from error


def damaged_parquet(path: Path | str, error: Exception) -> UserError:
    """Return the UserError for a .parquet file that cannot be read."""
    return UserError(
        f"--data {path}: not a readable Parquet file ({error}); fetch it again, or remove it"
    )


def stream():
    """Return FineWeb-Edu as an IterableDataset of `num_shards` files."""
    try:
        import datasets
    except ImportError:
        raise missing_library(FINEWEB, "datasets") from None
    try:
        return datasets.load_dataset(*FINEWEB_ADDRESS, split="train", streaming=True)
    except Exception as error:  # the library and its network raise anything
        raise stream_error(error) from error


def read_stream(part: StreamPart) -> Iterator[str]:
    """Yield the documents of a part of FineWeb-Edu."""
    rows = stream().shard(num_shards=part.total, index=part.index)
    size = 0  # bytes of text so far
    try:
        for row in rows:
            is_held_out = size < part.held_out
            size += len(row["text"].encode())
            if is_held_out == part.validation:
                yield row["text"]
            elif part.validation:
                return
    except Exception as error:
        raise stream_error(error) from error


def stream_error(error: Exception) -> UserError:
    """Return the UserError for FineWeb-Edu that cannot be streamed."""
    return UserError(
        f"--data {FINEWEB}: the library datasets could not read it ({type(error).__name__}: "
        f"{error}); check the network and run the same command again (finished shards are kept), "
        "or give a folder of its .parquet files as --data"
    )


def missing_library(name: str, library: str) -> UserError:
    """Return the UserError for a source that needs a library which is not installed."""
    return UserError(
        f"--data {name} needs the library {library}: `make setup EXTRAS=datasets`, or "
        "pip install 'nanods[datasets]'"
    )


def decode_text(name: str, data: bytes, offset: int = 0) -> str:
    """Return the text of UTF-8 bytes that begin at byte `offset` of the file `name`.

    Raises UserError for an empty file, a zero byte, and bytes that are not UTF-8.
    """
    if not data:
        raise UserError(f"--data {name}: the file is empty; give a text to learn from")
    if (position := data.find(0)) >= 0:
        raise UserError(
            f"--data {name}: a binary file (a zero byte at {offset + position:,}); give a UTF-8 "
            "text file"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {name}: not UTF-8 (byte 0x{data[error.start]:02x} at "
            f"{offset + error.start:,}); convert it, for example from Latin-1: "
            "iconv -f latin1 -t utf-8 OLD > NEW"
        ) from None
