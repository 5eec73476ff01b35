"""Bytes of a file as text: UTF-8, or what a byte order mark says; and advice for everything else.

A text in another encoding is not converted: no program can know for certain which one it is, and a
wrong guess trains a model on nonsense. The error names the encoding that the bytes look like, and
the command that shows whether it is right.
"""

import codecs
import csv
import re

from nanods.data.file_types import file_type
from nanods.errors import UserError

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

WIDE_PUNCTUATION = re.compile("[\u3000-\u303f\uff00-\uff60]")
SAMPLE = 10_000  # bytes from which an encoding is guessed


def decode_text(name: str, data: bytes, offset: int = 0) -> str:
    """Return the text of bytes that begin at byte `offset` of the file `name`.

    A byte order mark at the start of the file is dropped; without one the bytes must be UTF-8.
    Raises UserError for an empty file, a file of another format, a zero byte, and bytes that cannot
    be decoded.
    """
    mark, encoding = byte_order_mark(data) if offset == 0 else (b"", "utf-8")
    if len(data) == len(mark):
        raise UserError(f"--data {name}: the file is empty; give a text to learn from")
    if encoding != "utf-8":
        try:
            return data[len(mark) :].decode(encoding)
        except UnicodeDecodeError as error:
            raise UserError(
                f"--data {name}: its first bytes say {encoding.upper()}, but byte "
                f"{len(mark) + error.start:,} is not ({error.reason}); save it again as UTF-8"
            ) from None
    kind = file_type(data[:32]) if offset == 0 else None
    if (position := data.find(0)) >= 0:
        refuse_other_format(name, kind)
        raise UserError(
            f"--data {name}: a binary file (a zero byte at {offset + position:,}){utf16_hint(data)}"
            "; give a UTF-8 text file"
        )
    try:
        return data[len(mark) :].decode()
    except UnicodeDecodeError as error:
        refuse_other_format(name, kind)
        position = len(mark) + error.start
        raise UserError(
            f"--data {name}: not UTF-8 (byte 0x{data[position]:02x} at {offset + position:,}); "
            f"{conversion_advice(data, position)}"
        ) from None


def byte_order_mark(data: bytes) -> tuple[bytes, str]:
    """Return the byte order mark at the start of a file and the encoding that it stands for; no
    bytes and "utf-8" if there is none."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return mark, encoding
    return b"", "utf-8"


def refuse_other_format(name: str, kind: str | None) -> None:
    """Raise UserError if `kind`, from the first bytes of a binary file, says what it is."""
    if kind:
        raise UserError(f"--data {name}: not a text, but {kind}: extract its text to a file first")


def utf16_hint(data: bytes) -> str:
    """Return a hint for an error message if every other byte is zero, as in UTF-16 without a byte
    order mark."""
    sample = data[:SAMPLE]
    for first, encoding in ((1, "utf-16le"), (0, "utf-16be")):
        places = sample[first::2]
        if places.count(0) > 0.7 * len(places) and sample.count(0) < 0.6 * len(sample):
            return f", which looks like UTF-16: iconv -f {encoding} -t utf-8 OLD > NEW"
    return ""


def conversion_advice(data: bytes, position: int) -> str:
    """Return what to do with bytes of which the one at `position` is not UTF-8."""
    text = data.decode(errors="replace")
    damaged = text.count("\ufffd")
    if damaged < 0.05 * sum(character > "\x7f" for character in text):
        return (
            f"most of it is UTF-8, with {damaged:,} damaged characters: "
            "iconv -c -f utf-8 -t utf-8 OLD > NEW leaves them out"
        )
    while position and data[position - 1] >= 0x80:
        position -= 1  # to the start of the word, so that pairs of bytes stay together
    encoding = guess_encoding(data[position : position + SAMPLE])
    if encoding is None:
        return (
            "convert it from the encoding that it was written in, which may be latin1, gbk, big5, "
            "shift_jis, euc-kr or another: iconv -f latin1 -t utf-8 OLD > NEW"
        )
    return (
        f"its bytes look like {encoding}, which is a guess: convert it with "
        f"iconv -f {encoding} -t utf-8 OLD > NEW and look whether NEW reads well"
    )


def guess_encoding(data: bytes) -> str | None:
    """Return the encoding that bytes look like, by the name that iconv knows; None if unclear.

    `data` begins at the first byte of a character.
    """
    for encoding, is_common, share in (
        ("shift_jis", lambda c: "\u3041" <= c <= "\u30fc", 0.3),  # kana
        ("euc-jp", lambda c: "\u3041" <= c <= "\u30fc", 0.3),
        ("euc-kr", lambda c: "\uac00" <= c <= "\ud7a3", 0.9),  # Hangul
        ("gbk", is_common_in("gb2312", 0xB0, 0xD7), 0.7),
        ("big5", is_common_in("big5", 0xA4, 0xC6), 0.7),
        ("cp1251", lambda c: "\u0430" <= c <= "\u044f", 0.7),  # lower-case Cyrillic
    ):
        text = data.decode(encoding, errors="replace")
        letters = [c for c in text if c > "\x7f" and not WIDE_PUNCTUATION.match(c)]
        if letters and sum(map(is_common, letters)) >= share * len(letters):
            return encoding
    # Languages in Latin letters: é in café stands among bytes of ASCII.
    return "latin1" if sum(byte >= 0x80 for byte in data) < 0.3 * len(data) else None


def is_common_in(encoding: str, first: int, last: int):
    """Return a function that tells whether a character is among the most frequent of a Chinese
    encoding: its first byte lies in [first, last]."""

    def is_common(character: str) -> bool:
        encoded = character.encode(encoding, errors="ignore")
        return len(encoded) == 2 and first <= encoded[0] <= last

    return is_common


def describe_format(text: str) -> str | None:
    """Return what a text looks like if it is not plain text, with advice; None if it is.

    Such a text can be learnt from, with its tags, quotes and keys.
    """
    start = text[:20_000]
    if re.match(r"\s*(<!doctype html|<html)", start, re.IGNORECASE):
        return "looks like HTML, and is learnt from with its tags"
    if start.startswith("{\\rtf"):
        return "is Rich Text Format, and is learnt from with its commands; save it as plain text"
    if re.match(r"\s*<\?xml", start):
        return "looks like XML, and is learnt from with its tags"
    if re.match(r'\s*[\[{]\s*["\[{]', start):
        return (
            "looks like JSON, and is learnt from as it stands, keys and quotes included; for its "
            'texts alone, write one {"text": "..."} per line to a file named .jsonl'
        )
    try:
        rows = list(csv.reader(start.splitlines()[:10]))
    except csv.Error:
        return None
    widths = {len(row) for row in rows}
    is_table = len(rows) > 2 and len(rows[0]) > 1 and widths == {len(rows[0])}
    if is_table and all(re.fullmatch(r"\w+", name.strip()) for name in rows[0]):
        return (
            "looks like CSV, and is learnt from as it stands, commas included; for the texts "
            'alone, give the file a name that ends in .csv and call their column "text"'
        )
    return None
