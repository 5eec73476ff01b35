"""Captions: a folder -> which image or sound each caption is of, `read_captions(folder)`. No image or sound is opened here.

The folder holds one of these, told apart by their files' names and looked for in this order:

    COCO      annotations/captions_*.json    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
              images of captions_X.json in X/ (train2017/, val2017/), images/ or the folder itself; X with "val": held out
    Flickr    *.token or *.token.txt         lines of IMAGE.jpg#0<TAB>CAPTION, as Flickr8k and Flickr30k come
              or captions.txt                CSV with the header image,caption, as Kaggle has it
              images in Images/, Flicker8k_Dataset/ (their spelling), flickr30k-images/ or the folder itself
    LJSpeech  metadata.csv                   lines of ID|TEXT|NORMALISED TEXT; the sound is wavs/ID.wav
    sounds    NAME.wav                       each with its transcript beside it, NAME.txt

Without a val file, or with nothing else, 1 image or sound in 20 is held out, with all of its captions: those whose file's name
has such a hash, so that no other file, and no order, changes the side it is on.

Left out on purpose: folders within these, archives, and the lists by which others split Flickr8k and Flickr30k.
"""

import csv
import hashlib
import io
import json
import os
from pathlib import Path

from nanods.data.sources import decode_text
from nanods.errors import UserError

Rows = list[tuple[Path, str]]  # a file and one caption of it
FLICKR = ("Images", "Flicker8k_Dataset", "flickr30k-images", "")  # where its images are


def read_captions(folder: Path) -> tuple[str, Rows, Rows]:
    """A folder -> "image" or "audio", the rows to train on, the rows held out; no file is in both.

    UserError, with a mend, for a folder that is no data set, for a mistake in its captions, and for files that are missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: there is no such folder; give one of images or sounds and their captions"
        )
    readers = {"image": (read_coco, read_tokens, read_csv), "audio": (read_ljspeech, read_sounds)}
    found = (
        (modality, *parts)
        for modality in readers
        for read in readers[modality]
        if (parts := read(folder))
    )
    modality, train, held_out = next(found, (None, [], []))
    if modality is None:
        raise UserError(
            f"--data {folder}: no captions are in it; wanted are annotations/captions_*.json (COCO), *.token, *.token.txt or "
            "captions.txt (Flickr), metadata.csv (LJSpeech), or NAME.wav with NAME.txt"
        )
    if not held_out:
        held_out = [
            row for row in train if hashlib.sha256(os.fsencode(row[0].name)).digest()[0] < 13
        ]  # 13 / 256: 1 in 20
    shown = {path for path, _ in held_out}
    return modality, [row for row in train if row[0] not in shown], held_out


def read_coco(folder: Path) -> tuple[Rows, Rows] | None:
    """captions_*.json -> training and held-out rows; None if there is no such file. A val file alone is no held-out part."""
    files = sorted([*folder.glob("annotations/captions_*.json"), *folder.glob("captions_*.json")])
    val = [file for file in files if "val" in file.stem]
    parts: tuple[Rows, Rows] = ([], [])
    for file in files:
        try:
            data = json.loads(read_text(file))
            names = {image["id"]: image["file_name"] for image in data["images"]}
            rows = [(names[row["image_id"]], row["caption"]) for row in data["annotations"]]
            if not all(isinstance(word, str) for row in rows for word in row):
                raise TypeError("a caption or a file's name is no text")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"--data {file}: not COCO's captions ({type(error).__name__}: {error}); fetch it again: wanted is "
                '{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}'
            ) from error
        places = (file.stem.removeprefix("captions_"), "images", "")
        parts[file in val and val != files].extend(located(file, rows, folder, places))
    return parts if files else None


def read_tokens(folder: Path) -> tuple[Rows, Rows] | None:
    """*.token or *.token.txt -> rows, none of them held out; None if there is no such file."""
    files = sorted([*folder.glob("*.token"), *folder.glob("*.token.txt")])
    found = []
    for file in (
        file for file in files if ".lemma." not in file.name
    ):  # Flickr8k's captions again, without their endings
        rows = fields_of(file, "\t", "IMAGE.jpg#0<TAB>CAPTION")
        found += located(
            file,
            [(name.rpartition("#")[0] or name, texts[0]) for name, *texts in rows],
            folder,
            FLICKR,
        )
    return (found, []) if found else None


def read_csv(folder: Path) -> tuple[Rows, Rows] | None:
    """captions.txt -> rows, none of them held out; None if there is no such file."""
    if not (file := folder / "captions.txt").is_file():
        return None
    reader = csv.reader(io.StringIO(read_text(file)), strict=True)
    try:
        if next(reader, None) != ["image", "caption"]:
            raise csv.Error("the header image,caption is wanted")
        rows = [(name, ",".join(texts)) for name, *texts in filter(None, reader)]
    except csv.Error as error:
        raise UserError(
            f"--data {file}, line {reader.line_num:,}: not CSV of image,caption ({error}); mend it"
        ) from error
    return located(file, rows, folder, FLICKR), []


def read_ljspeech(folder: Path) -> tuple[Rows, Rows] | None:
    """metadata.csv -> rows, none of them held out; None if there is no such file. The normalised text, where there is one."""
    if not (file := folder / "metadata.csv").is_file():
        return None
    rows = fields_of(file, "|", "ID|TEXT|NORMALISED TEXT")
    rows = [(f"{name}.wav", texts[-1] if texts[-1].strip() else texts[0]) for name, *texts in rows]
    return located(file, rows, folder, ("wavs", "")), []


def read_sounds(folder: Path) -> tuple[Rows, Rows] | None:
    """NAME.wav and NAME.txt -> rows, none of them held out; None if there is no WAV file."""
    sounds = sorted(folder.glob("*.wav"))
    bare = [sound.name for sound in sounds if not sound.with_suffix(".txt").is_file()]
    if bare:
        raise UserError(
            f"--data {folder}: sounds without a transcript beside them: {len(bare):,} of {len(sounds):,} ({some(bare)}); "
            f"write what is said in {bare[0]} to {Path(bare[0]).with_suffix('.txt')}, or move it away"
        )
    rows = [(sound.name, read_text(sound.with_suffix(".txt"))) for sound in sounds]
    return (located(folder, rows, folder, ("",)), []) if sounds else None


def located(
    source: Path, rows: list[tuple[str, str]], folder: Path, places: tuple[str, ...]
) -> Rows:
    """Rows (a file's name, caption) of `source` -> rows (its path in the first of `places` that has it, caption in one line).

    UserError for no rows, for captions without a word, and for files that are nowhere.
    """
    if not rows:
        raise UserError(f"--data {source}: no captions are in it; fetch it again")
    rows = [(name, one_line(text)) for name, text in rows]
    if empty := [name for name, caption in rows if not caption]:
        raise UserError(
            f"--data {source}: captions without a word: {len(empty):,} ({some(empty)}); write or delete them"
        )
    folders = [folder / place for place in places if (folder / place).is_dir()]
    paths = {path.name: path for place in reversed(folders) for path in place.iterdir()}
    names = list(dict.fromkeys(name for name, _ in rows))
    if missing := [name for name in names if name not in paths]:
        raise UserError(
            f"--data {source}: files that it names and are not there: {len(missing):,} of {len(names):,} ({some(missing)}); "
            f"looked in {' and '.join(map(str, folders))}: put them there, or delete what names them"
        )
    return [(paths[name], caption) for name, caption in rows]


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def one_line(text: str) -> str:
    """Without what JSON can write and UTF-8 cannot, without zero bytes, which pad captions, and blanks as single spaces."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("\0", " ").split())


def read_text(file: Path) -> str:
    """UserError for what is empty, binary or not UTF-8."""
    try:
        return decode_text(str(file), file.read_bytes()).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(
            f"--data {file}: cannot be read ({error.strerror}); mend its permissions"
        ) from error


def fields_of(file: Path, mark: str, form: str) -> list[list[str]]:
    """The lines that are not blank, each split at every `mark`. UserError for a line without one."""
    lines = [
        (number, line.split(mark))
        for number, line in enumerate(read_text(file).split("\n"), 1)
        if line.strip()
    ]
    for number, fields in lines:
        if len(fields) < 2:
            raise UserError(
                f"--data {file}, line {number:,}: not {form}: {fields[0][:60]!r}; mend or delete it"
            )
    return [fields for _, fields in lines]
