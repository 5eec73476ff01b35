"""Documents of a corpus larger than memory, cut into parts that processes read separately.

A source is a .jsonl file (field "text"), a .csv, .tsv or .parquet file (column "text"; pyarrow
comes with the extra `datasets`), or a folder of these and .txt files, subfolders included, in the
order of their paths; or FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557), streamed by `datasets`.

Validation: files whose names say so (valid.txt, dev/a.txt); else `hold_out` chooses whole files and
whole documents. Files named test are left out.

Every document ends in a newline, added where it is missing: sample.py's default prompt is a
newline, and nanods/data/text.py joins the rows of a data set in the same way. No token crosses the
end of a line, so documents and parts can be encoded separately and give the tokens of the whole
text. Left out on purpose: a special token between documents, compressed files, deduplication.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nanods.data.decoding import byte_order_mark, decode_text, describe_format
from nanods.data.splits import split_of
from nanods.data.tokenizer import lines
from nanods.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
# Files that datasets' save_to_disk writes into a folder; nanods/data/text.py reads such a folder.
DATASETS_MARKERS = ("dataset_dict.json", "state.json")
INDEX = "shards.json"  # the file that nanods/data/shards.py writes into a folder of shards
FINEWEB = "fineweb-edu"
FINEWEB_ADDRESS = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
SLICE = 1 << 26  # bytes of source for one shard, about
HELD_OUT = 1 << 20  # bytes of source for validation, about
STRETCHES = 16  # of one file that are held out, at most
STRETCH = 1 << 14  # bytes of each, at least, where there are several
SHORTEST = 1 << 12  # bytes: of MANY files, those with less to hold out are held out whole or not
MANY = 30
FEW = 3  # files or documents to hold out, at least, if there are three times as many


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


@dataclass(frozen=True)
class Plan:
    """How a source becomes shards."""

    shards: dict[str, tuple[Part | StreamPart, ...]]
    """File name -> the parts that the shard holds. The last one is the validation split."""
    validation: str
    """Where the validation split comes from, in words."""
    notices: tuple[str, ...] = ()
    """What is left out or looks wrong."""


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # its path in the folder
    size: int  # bytes
    length: int  # rows if it is read by rows, else bytes


def is_sharded_source(name: str) -> bool:
    """Return whether a corpus is read in shards.

    These are FineWeb-Edu, a .jsonl, .csv, .tsv or .parquet file, a folder of such files and texts,
    and a folder of shards."""
    if name == FINEWEB:
        return True
    try:
        path = Path(name)
        if path.is_file():
            return path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".txt"
        if not name or not path.is_dir():
            return False
        if any((path / marker).is_file() for marker in DATASETS_MARKERS):
            return False
        return (path / INDEX).is_file() or any(text_files(path))
    except (OSError, ValueError):  # a name that no file can have
        return False


def text_files(source: Path) -> Iterator[Path]:
    """Yield the files of a source, a folder with its subfolders or a file, in no particular order.

    Hidden files are left out, and tables of a folder that have no column "text".
    """
    if source.is_file():
        yield source
        return
    for path in source.rglob("*"):
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or is_hidden(path, source):
            continue
        if path.suffix.lower() not in (".csv", ".tsv") or "text" in csv_columns(path):
            yield path


def is_hidden(path: Path, folder: Path) -> bool:
    """Return whether the name of a file, or of its folder in `folder`, begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def left_out(source: Path) -> str | None:
    """Return which files of a source are not read, in words; None if there are none."""
    if source.is_file():
        return None
    read, kinds = set(text_files(source)), Counter()
    for path in source.rglob("*"):
        if path not in read and path.is_file() and not is_hidden(path, source):
            kinds[path.suffix or "without a suffix"] += 1
    if not kinds:
        return None
    named = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    more = ", ..." if len(kinds) > 5 else ""
    return (
        f"files in {source} that are left out: {named}{more} (only {', '.join(SUFFIXES)} are read, "
        "and tables only with a column text)"
    )


def fingerprint(name: str, fraction: float) -> str:
    """Return a hash that changes when the output of `plan` may change.

    For files it depends on the names, sizes and modification times, as in `make`.
    """
    if name == FINEWEB:
        inputs = [*FINEWEB_ADDRESS, HELD_OUT]
    else:
        inputs = []
        for path in sorted(text_files(Path(name))):
            stat = path.stat()
            inputs.append([path.relative_to(name).as_posix(), stat.st_size, stat.st_mtime_ns])
        inputs += [SLICE, HELD_OUT, STRETCHES, STRETCH, SHORTEST, MANY, FEW]
    return hashlib.sha256(json.dumps([*inputs, fraction]).encode()).hexdigest()


def plan(name: str, fraction: float) -> Plan:
    """Return the shards of a source, in order.

    `fraction` of each file is held out for validation, HELD_OUT bytes in total at most, where no
    file is named as a validation split. With 0 everything trains.

    Raises UserError for a file that cannot be read, a data set that cannot be fetched, and a source
    that cannot be split.
    """
    notices = []
    if name == FINEWEB:
        total, held = stream().num_shards, HELD_OUT if fraction else 0
        held_out = [StreamPart(i, total, held // total, True) for i in range(total)]
        train = [[StreamPart(i, total, held // total, False)] for i in range(total)]
        validation = "the first documents of each file of the stream"
    else:
        train, held_out, validation, notices = plan_files(Path(name), fraction)
    shards = {f"train-{i:05d}.bin": tuple(parts) for i, parts in enumerate(train)}
    shards["validation.bin"] = tuple(held_out) if fraction else ()
    return Plan(shards, validation, tuple(notices))


def plan_files(
    source: Path, fraction: float
) -> tuple[list[list[Part]], list[Part], str, list[str]]:
    """Return the parts of each training shard, the parts of the validation shard, where they come
    from, and notices."""
    files = source_files(source)
    notices = [notice for notice in (left_out(source), describe_start(files[0])) if notice]
    train, named, test = split_by_name(files)
    if test:
        notices.append(f"{list_names(test)} left out: by name a test split")
    if named and fraction:
        held_out = [Part(str(file.path), 0, file.length) for file in named]
        validation, held = f"{list_names(named)}, by name", {}
    elif fraction:
        held, validation = hold_out(train, fraction)
        held_out = [part for file in train for part in held[file]]
        if not held_out:
            raise single_document(source, train[0])
    else:
        held_out, validation, held = [], "", {}
        if named:
            notices.append(f"{list_names(named)} left out: by name a validation split")
    return training_shards(train, held), held_out, validation, notices


def source_files(source: Path) -> list[SourceFile]:
    """Return the files of a source that are not empty, in the order of their paths."""
    files = []
    folder = source if source.is_dir() else source.parent
    for path in sorted(text_files(source)):
        size = path.stat().st_size
        length = row_count(path) if size and is_read_by_rows(path) else size
        if length:
            files.append(SourceFile(path, path.relative_to(folder).as_posix(), size, length))
    if not files:
        raise UserError(f"--data {source}: every file is empty; give a text to learn from")
    return files


def single_document(source: Path, file: SourceFile) -> UserError:
    """Return the UserError for a source of which no document can be held out."""
    for _ in documents([Part(str(file.path), 0, file.length)]):
        pass  # a document that cannot be read raises its own UserError
    fix = "give a text for validation with --val-data FILE"
    if file.path.suffix.lower() == ".txt":
        fix += f", or --data {file.path}, of which the end can be held out"
    return UserError(
        f"--data {source}: a single document, which is not split in a folder or table; {fix}"
    )


def describe_start(file: SourceFile) -> str | None:
    """Return a notice if a .txt file looks like another format."""
    if file.path.suffix.lower() != ".txt":
        return None
    with file.path.open("rb") as opened:
        looks = describe_format(opened.read(1 << 16).decode(errors="replace"))
    return f"{file.name} {looks}" if looks else None


def list_names(files: list[SourceFile]) -> str:
    """Return the names of some files, for a message."""
    if len(files) <= 3:
        return ", ".join(file.name for file in files)
    return f"{files[0].name}, {files[1].name} and {len(files) - 2:,} more files"


# ---- the validation split ------------------------------------------------------------------------


def split_by_name(
    files: list[SourceFile],
) -> tuple[list[SourceFile], list[SourceFile], list[SourceFile]]:
    """Return the files for training, for validation and for testing, by their names or by those of
    their folders. Other files are for training.

    Names count only if some files are left for training, and "test" only beside another split.
    """
    train, validation, test, is_named = [], [], [], False
    for file in files:
        words = [split_of(part) for part in Path(file.name).parts]
        split = next((word for word in words if word), None)
        {"val": validation, "test": test}.get(split, train).append(file)
        is_named = is_named or split in ("train", "val")
    return (train, validation, test) if train and is_named else (files, [], [])


def hold_out(files: list[SourceFile], fraction: float) -> tuple[dict[SourceFile, list[Part]], str]:
    """Choose what is held out of each file, and say it in words.

    Of each file, stretches of whole lines or rows are held out, spread evenly over it. But of many
    short files (SHORTEST) some are held out whole, and so are some of the files that are a single
    line or row; a hash of the names chooses these. The result is empty if there is one such file.
    """
    total = sum(file.size for file in files)
    share = min(fraction, HELD_OUT / total)
    held: dict[SourceFile, list[Part]] = {file: [] for file in files}
    for file in files:
        if len(files) < MANY or share * file.size >= SHORTEST:
            held[file] = stretches(file, share)
    whole = [file for file in files if not held[file]]
    cut = [file for file in files if held[file]]
    chosen = choose_files(whole, share * sum(file.size for file in whole), least=0 if cut else FEW)
    for file in chosen:
        is_long = file.size > 4 * HELD_OUT
        parts = stretches(file, HELD_OUT / file.size) if is_long else []
        held[file] = parts or [Part(str(file.path), 0, file.length)]
    words = []
    if chosen:
        words.append(f"{len(chosen):,} of {len(files):,} files, chosen by a hash of their names")
    if cut:
        number = sum(len(held[file]) for file in cut)
        at_end = number == len(cut) and all(held[file][0].stop == file.length for file in cut)
        where = "the end" if at_end else f"{number:,} stretches, evenly spread,"
        words.append(f"{where} of {cut[0].name if len(cut) == 1 else f'{len(cut):,} files'}")
    return held, " and ".join(words)


def choose_files(files: list[SourceFile], wanted: float, least: int) -> list[SourceFile]:
    """Return files of `wanted` bytes in total, about, in the order of a hash of their names.

    At least `least` of them, if these are no more than a third, and at most half. Files much larger
    than `wanted` come last.
    """
    least = min(least, max(1, len(files) // 3), len(files) - 1)

    def order(file: SourceFile) -> tuple:
        is_large = file.size > 2 * wanted
        return is_large, is_large * file.size, hashlib.sha256(file.name.encode()).digest()

    chosen, size = [], 0
    for file in sorted(files, key=order)[: max(least, len(files) // 2)]:
        if len(chosen) >= least and size + file.size / 2 > wanted:
            break
        chosen.append(file)
        size += file.size
    return chosen


def stretches(file: SourceFile, share: float) -> list[Part]:
    """Return the parts of a file to hold out: whole lines or rows, evenly spread over the file.

    If a single stretch is enough, it is the end. A few documents are chosen one by one. No parts if
    the file is a single line or row.
    """
    path, by_rows = str(file.path), is_read_by_rows(file.path)
    number = min(max(1, int(share * file.size) // STRETCH), STRETCHES)
    length = int(share * file.length / number)
    ends = [(i + 1) * file.length // number for i in range(number)]
    parts = [Part(path, end - length, end) for end in ends]
    documents_held = number * length if by_rows else sum(map(count_lines, parts))
    if documents_held >= FEW:
        return parts
    begins = range(file.length) if by_rows else line_begins(file.path)
    count = max(min(FEW, len(begins) // 3), min(1, len(begins) - 1))
    edges = [*begins, file.length]
    rows = [(2 * i + 1) * len(begins) // (2 * count) for i in range(count)]
    return [Part(path, edges[row], edges[row + 1]) for row in rows]


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


def training_shards(
    files: list[SourceFile], held: dict[SourceFile, list[Part]]
) -> list[list[Part]]:
    """Return the parts of each training shard: what is not held out, in order.

    The parts of a shard have SLICE to 2 * SLICE bytes together.
    """
    shards = []
    bytes_left = 0  # of the current shard
    for file in files:
        start, gaps = 0, []
        for part in held.get(file, []):
            gaps.append((start, part.start))
            start = part.stop
        for begin, end in [*gaps, (start, file.length)]:
            if begin == end:
                continue
            size = file.size * (end - begin) // file.length
            pieces = max(1, -(-size // SLICE))
            for i in range(pieces):
                if bytes_left <= 0:
                    shards.append([])
                    bytes_left = SLICE
                cuts = [begin + (end - begin) * j // pieces for j in (i, i + 1)]
                shards[-1].append(Part(str(file.path), *cuts))
                bytes_left -= -(-size // pieces)
    return shards


def validation_text(name: str) -> tuple[str, str]:
    """Return the text of --val-data, a file or folder, and where it comes from in words.

    Raises UserError if it cannot be read.
    """
    source = Path(name)
    try:
        if source.is_file() and not is_sharded_source(name):
            return decode_text(name, source.read_bytes()), name
        if not is_sharded_source(name) or (source / INDEX).is_file() or name == FINEWEB:
            raise UserError(
                f"--val-data {name}: neither a file nor a folder of {', '.join(SUFFIXES)} files"
            )
    except OSError as error:
        raise UserError(f"--val-data {name}: cannot be read ({error.strerror})") from None
    files = source_files(source)
    named = split_by_name(files)[1]
    parts = [Part(str(file.path), 0, file.length) for file in named or files]
    return "".join(documents(parts)), f"{list_names(named)} in {name}" if named else name


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


def encoding_of(path: Path) -> str:
    """Return the encoding that a file's byte order mark stands for, or "utf-8"."""
    with path.open("rb") as file:
        return byte_order_mark(file.read(4))[1]


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
