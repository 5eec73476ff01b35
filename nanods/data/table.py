"""Tables of files with their captions: metadata.csv and metadata.jsonl, parsed and not yet located.

    image,audio,text,split                  {"file_name": "cat.jpg", "text": "a cat"}
    cat.jpg,cat.wav,a cat,train             {"file_name": "dog.jpg", "text": "a dog"}

A table names its columns, in any order and case: `image`, `audio`, or `file_name` where the suffix
says which; `text` or `label`; `split`. COLUMNS has the other names by which they are known. An
empty cell is a gap. The cells of a CSV file are separated by commas, semicolons, tabs or bars,
whichever its header has.
"""

import csv
import io
import json
from typing import NamedTuple

from nanods.errors import UserError

COLUMNS = {
    "image": ("image", "image_name", "image_path", "image_file_name"),
    "audio": ("audio", "sound", "wav", "audio_path", "audio_file_name"),
    "file": ("file_name", "filename", "file", "path"),
    "text": ("text", "caption", "transcription", "transcript", "sentence"),
    "label": ("label", "class"),
    "split": ("split", "subset"),
}
KNOWN = {name: column for column, names in COLUMNS.items() for name in names}
DELIMITERS = ",;\t|"


class Row(NamedTuple):
    line: int
    cells: dict[str, str]
    """By column, a key of COLUMNS; without empty cells."""


class Table(NamedTuple):
    columns: set[str]  # keys of COLUMNS
    rows: list[Row]
    others: list[str]
    """The names of the columns that are not read."""


def find_delimiter(text: str) -> str | None:
    """Return what separates the cells of a CSV file; None if its first line is no header, without a
    column that we know."""
    header = text.lstrip("\n\r").partition("\n")[0]
    known = {mark: sum(clean(name) in KNOWN for name in header.split(mark)) for mark in DELIMITERS}
    best = max(known, key=known.get)
    return best if known[best] else None


def parse_csv(source: str, text: str, delimiter: str) -> Table:
    """Return the table in the text of a CSV file; `source` names it in errors.

    Where the last column is the text, commas in it need no quotes.
    """
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    names, columns, rows = None, [], []
    try:
        for fields in reader:
            if not any(map(str.strip, fields)):
                continue
            if names is None:
                names = fields
                columns = check_columns(source, names)
                continue
            if len(fields) > len(names) and columns[-1] == "text":
                fields[len(names) - 1 :] = [delimiter.join(fields[len(names) - 1 :])]
            if any(map(str.strip, fields[len(names) :])):
                raise csv.Error(
                    f"{len(fields)} cells, and the header has {len(names)}; put quotes around a "
                    f"cell with {delimiter!r} in it"
                )
            cells = zip(columns, fields, strict=False)
            rows.append(Row(reader.line_num, {c: x.strip() for c, x in cells if c and x.strip()}))
    except csv.Error as error:
        raise UserError(
            f"--data {source}, line {reader.line_num:,}: not CSV ({error}); fix it"
        ) from error
    if names is None:
        raise UserError(f"--data {source}: all cells are empty. Write a header such as image,text")
    others = [name.strip() for name, column in zip(names, columns, strict=True) if not column]
    return Table(set(filter(None, columns)), rows, others)


def parse_jsonl(source: str, text: str) -> Table:
    """Return the table in the text of a file with a JSON object on each line; `source` names it in
    errors."""
    names: dict[str, None] = {}  # an ordered set
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'--data {source}, line {number:,}: not JSON such as {{"file_name": "cat.jpg", '
                f'"text": "a cat"}} ({error}); fix it'
            ) from error
        names |= dict.fromkeys(values)
        cells = {}
        for name, value in values.items():
            column = KNOWN.get(clean(name))
            if column is None or value is None:
                continue
            if not isinstance(value, str | int | float):
                raise UserError(
                    f'--data {source}, line {number:,}: "{name}" is {json.dumps(value)[:60]}; '
                    "write a text or a number"
                )
            if str(value).strip():
                cells[column] = str(value).strip()
        rows.append(Row(number, cells))
    columns = check_columns(source, list(names))
    others = [name for name, column in zip(names, columns, strict=True) if not column]
    return Table(set(filter(None, columns)), rows, others)


def clean(name: str) -> str:
    """Return the name of a column as COLUMNS has it."""
    return name.strip().strip('"').lower()


def check_columns(source: str, names: list[str]) -> list[str | None]:
    """Return the column that each name stands for, None for another one.

    Raises UserError if a column occurs twice, or if two modalities are not among them.
    """
    columns = [KNOWN.get(clean(name)) for name in names]
    for column in filter(None, columns):
        if columns.count(column) > 1:
            twice = [name for name, c in zip(names, columns, strict=True) if c == column]
            raise UserError(
                f"--data {source}: the columns {' and '.join(twice)} mean the same ({column}); "
                "rename or delete one of them"
            )
    has_text = "text" in columns or "label" in columns
    missing = None
    if not {"image", "audio", "file"} & {*columns}:
        missing = "of files: image, audio or file_name"
    elif not has_text and ("image" not in columns or "audio" not in columns):
        missing = "of captions: text, caption or label"
    if missing:
        found = ", ".join(name.strip() for name in names)[:200]
        raise UserError(
            f"--data {source}: it has no column {missing}. Found: {found}. Write a header such as "
            "image,text"
        )
    return columns
