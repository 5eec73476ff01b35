"""Read the documents in the parts of a source: .txt, .jsonl, .csv, .tsv and .parquet files, and
FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557), streamed. pyarrow and `datasets` come with the
extra `datasets`. nanods/data/sources.py says which parts are held out, and which shard holds which.

Each document of a file is in exactly one part, so processes can read parts separately.

Every document ends in a newline, added where it is missing: sample.py's default prompt is a
newline, and nanods/data/text.py joins the rows of a data set in the same way. No token crosses the
end of a line, so documents and parts can be encoded separately and give the tokens of the whole
text. Left out on purpose: a special token between documents, and compressed files.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nanods.data.decoding import byte_order_mark, decode_text
from nanods.data.tokenizer import lines
from nanods.errors import UserError

FINEWEB = "fineweb-edu"
FINEWEB_ADDRESS = ("HuggingFaceFW/fineweb-edu", "sample-10BT")


@dataclass(frozen=True)
class Part:
    """A part of a file, [start, stop).

    Of a file that `is_read_by_rows`: these rows, or lines. Of another file: the lines that begin at
    these bytes.
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
    suffix = Path(part.path).suffix.lower()
    if suffix == ".parquet":
        return read_parquet(part)
    if suffix in (".csv", ".tsv"):
        return islice(read_csv(Path(part.path)), part.start, part.stop)
    texts = read_lines(part)
    if suffix == ".jsonl":
        return read_jsonl(part.path, texts)
    return (line for _, line in texts)


def is_read_by_rows(path: Path) -> bool:
    """Return whether the parts of a file are rows or numbered lines.

    No byte of such a file says where a row begins: tables, and texts in UTF-16 or UTF-32.
    """
    return path.suffix.lower() in (".parquet", ".csv", ".tsv") or encoding_of(path) != "utf-8"


def row_count(path: Path) -> int:
    """Return the number of rows of a file that is read by rows.

    Raises UserError if a table has no column "text" of strings."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return sum(1 for _ in read_csv(path))
    if path.suffix.lower() != ".parquet":
        return len(lines(decode_text(str(path), path.read_bytes())))
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


# ---- lines of a text file ------------------------------------------------------------------------


def read_lines(part: Part) -> Iterator[tuple[str, str]]:
    """Yield the lines of a part of a text file, each after its position in words."""
    path = Path(part.path)
    encoding = encoding_of(path)
    if encoding != "utf-8":
        text = decode_text(part.path, path.read_bytes())
        for number, line in islice(enumerate(lines(text), 1), part.start, part.stop):
            yield f"line {number:,}", line
        return
    position, data = read_lines_of_part(part)
    if not data:
        return
    if part.start == 0:
        mark, _ = byte_order_mark(data)
        position, data = len(mark), data[len(mark) :]
    for line in lines(decode_text(part.path, data, position)):
        yield f"the line at byte {position:,}", line
        position += len(line.encode())


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


def encoding_of(path: Path) -> str:
    """Return the encoding that a file's byte order mark stands for, or "utf-8"."""
    with path.open("rb") as file:
        return byte_order_mark(file.read(4))[1]


def count_lines(part: Part) -> int:
    """Return the number of lines that begin in a part."""
    with Path(part.path).open("rb") as file:
        file.seek(max(0, part.start - 1))
        return file.read(part.stop - max(1, part.start)).count(b"\n") + (part.start == 0)


def line_begins(path: Path) -> list[int]:
    """Return the byte at which each line of a file begins."""
    begins = [0]
    with path.open("rb") as file:
        for line in file:
            begins.append(begins[-1] + len(line))
    return begins[:-1]


def read_jsonl(path: str, json_lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the field "text" of each line of a .jsonl file, without nulls."""
    for where, line in json_lines:
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if text is not None and not isinstance(text, str):
                raise TypeError(f"a {type(text).__name__}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"--data {path}: {where} is no JSON object with a string "
                f'"text" ({type(error).__name__}: {error}); fix or delete this line'
            ) from None
        if text is not None:
            # JSON can hold lone surrogates ("\\ud800"), which UTF-8 cannot encode: they become
            # "?".
            yield text.encode(errors="replace").decode()


# ---- rows of a table -----------------------------------------------------------------------------


def csv_columns(path: Path) -> list[str]:
    """Return the column names of a .csv or .tsv file. They may be separated by commas, semicolons
    or tabs."""
    with path.open(encoding=csv_encoding(path), errors="replace", newline="") as file:
        return column_names(file.readline())[0]


def column_names(header: str) -> tuple[list[str], str]:
    """Return the names in the header of a table, and what separates them."""
    csv.field_size_limit(2**31 - 1)  # of characters in a cell; Python's own is 131,072
    separator = max(",;\t", key=header.count)
    row = next(csv.reader([header], delimiter=separator), [])
    return [name.strip() for name in row], separator


def csv_encoding(path: Path) -> str:
    """Return an encoding that drops the byte order mark."""
    encoding = encoding_of(path)
    return "utf-8-sig" if encoding == "utf-8" else encoding[:6]  # utf-16 or utf-32


def read_csv(path: Path) -> Iterator[str]:
    """Yield the column "text" of a .csv or .tsv file, without rows that lack it.

    Raises UserError if there is no such column, and for rows that cannot be read.
    """
    try:
        with path.open(encoding=csv_encoding(path), newline="") as file:
            names, separator = column_names(file.readline())
            if "text" not in names:
                raise UserError(
                    f"--data {path}: no column called text, only {', '.join(names)}; rename one"
                )
            column = names.index("text")
            for row in csv.reader(file, delimiter=separator):
                if len(row) > column:
                    yield row[column]
    except UnicodeDecodeError:
        decode_text(str(path), path.read_bytes())  # raises a UserError that says more
        raise
    except csv.Error as error:
        raise UserError(
            f"--data {path}: not a table that can be read ({error}); write it again, for example "
            "with pandas"
        ) from None


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


# ---- FineWeb-Edu ---------------------------------------------------------------------------------


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
