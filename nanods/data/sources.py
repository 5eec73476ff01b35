"""Sources: which parts of a corpus larger than memory go into which shard, and which are held out.

A source is a .jsonl file (field "text"), a .csv, .tsv or .parquet file (column "text"), or a folder
of these and .txt files, subfolders included, in the order of their paths; or FineWeb-Edu, streamed.
nanods/data/documents.py reads the documents of a part.

Validation: the files whose names say so (valid.txt, dev/a.txt); files named test are then left out.
Where no name says so, `hold_out` chooses whole files and whole documents. There is no
deduplication.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanods.data.decoding import decode_text, describe_format
from nanods.data.documents import (
    FINEWEB,
    FINEWEB_ADDRESS,
    Part,
    StreamPart,
    count_lines,
    csv_columns,
    documents,
    is_read_by_rows,
    line_begins,
    row_count,
    stream,
)
from nanods.data.splits import split_of
from nanods.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
# Files that datasets' save_to_disk writes into a folder; nanods/data/text.py reads such a folder.
DATASETS_MARKERS = ("dataset_dict.json", "state.json")
INDEX = "shards.json"  # the file that nanods/data/shards.py writes into a folder of shards
SLICE = 1 << 26  # bytes of source for one shard, about
HELD_OUT = 1 << 20  # bytes of source for validation, about
STRETCHES = 16  # of one file that are held out, at most
STRETCH = 1 << 14  # bytes of each, at least, where there are several
SHORTEST = 1 << 12  # bytes: of MANY files, those with less to hold out are held out whole or not
MANY = 30
FEW = 3  # files or documents to hold out, at least, if there are three times as many


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
        fraction = 0.1 if fraction else 0.0  # all that matters is whether it is 0
    else:
        inputs = []
        for path in sorted(text_files(Path(name))):
            stat = path.stat()
            inputs.append([path.relative_to(name).as_posix(), stat.st_size, stat.st_mtime_ns])
        inputs += [SLICE, HELD_OUT, STRETCHES, STRETCH, SHORTEST, MANY, FEW]
    return hashlib.sha256(json.dumps([*inputs, fraction]).encode()).hexdigest()


def plan(name: str, fraction: float) -> Plan:
    """Return the shards of a source, in order.

    Where no file is named as a validation split, about `fraction` of the text is held out, or about
    HELD_OUT bytes if that is less (`hold_out`); of FineWeb-Edu, HELD_OUT bytes. With 0 everything
    trains.

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


def training_shards(
    files: list[SourceFile], held: dict[SourceFile, list[Part]]
) -> list[list[Part]]:
    """Return the parts of each training shard: what is not held out, in order.

    Each shard but the last has SLICE to 2 * SLICE bytes.
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
