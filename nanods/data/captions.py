"""Captions of a folder: `read_captions(folder)` returns each image or sound with its captions.

No image or sound is opened here. The folder has one of these forms, recognised by the names of its
files and looked for in this order:

    COCO      annotations/captions_*.json
              {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
              The images of captions_X.json are in X/ (train2017/, val2017/), images/ or the folder
              itself. A file with "val" in X is held out.
    Flickr    *.token or *.token.txt: lines of IMAGE.jpg#0<TAB>CAPTION (Flickr8k and Flickr30k)
              or captions.txt: CSV with the header image,caption (Kaggle)
              The images are in Images/, Flicker8k_Dataset/ (their spelling), flickr30k-images/ or
              the folder itself.
    LJSpeech  metadata.csv: lines of ID|TEXT|NORMALISED TEXT; the sound is wavs/ID.wav
    sounds    NAME.wav, each with its transcript in NAME.txt

If a folder has no val file, or nothing but val files, about 1 image or sound in 20 is held out,
with all of its captions. The hash of the file's name decides: other files and their order do not
matter.

Left out on purpose: subfolders, archives, and the published splits of Flickr8k and Flickr30k.
"""

import csv
import hashlib
import io
import json
import os
from pathlib import Path

from nanods.data.sources import decode_text
from nanods.errors import UserError

Rows = list[tuple[Path, str]]  # a file and one of its captions
FLICKR_FOLDERS = ("Images", "Flicker8k_Dataset", "flickr30k-images", "")  # where the images are


def read_captions(folder: Path) -> tuple[str, Rows, Rows]:
    """Return the modality ("image" or "audio") of a folder, its training and its held-out rows.

    No file is in both. Raises UserError for a folder without captions, for a mistake in the
    captions, and for missing files.
    """
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: there is no such folder; give one of images or sounds and their "
            "captions"
        )
    readers = (
        ("image", read_coco),
        ("image", read_flickr_tokens),
        ("image", read_flickr_csv),
        ("audio", read_ljspeech),
        ("audio", read_wav_folder),
    )
    for modality, read in readers:
        rows = read(folder)
        if rows is not None:
            return modality, *split_rows(*rows)
    raise UserError(
        f"--data {folder}: no captions are in it; expected annotations/captions_*.json (COCO), "
        "*.token, *.token.txt or captions.txt (Flickr), metadata.csv (LJSpeech), or NAME.wav "
        "with NAME.txt"
    )


def split_rows(train: Rows, held_out: Rows) -> tuple[Rows, Rows]:
    """Return the training and the held-out rows, so that no file is in both.

    If nothing is held out yet, about 1 file in 20 of the training rows is.
    """
    if not held_out:
        held_out = [row for row in train if is_held_out(row[0])]
    held_out_paths = {path for path, _ in held_out}
    return [row for row in train if row[0] not in held_out_paths], held_out


def is_held_out(path: Path) -> bool:
    """Return True for about 1 file in 20 (13 / 256), chosen by the hash of its name."""
    return hashlib.sha256(os.fsencode(path.name)).digest()[0] < 13


# ---- one reader for each form: training and held-out rows, or None for another form --------------


def read_coco(folder: Path) -> tuple[Rows, Rows] | None:
    """Read captions_*.json. If all files are val files, none of them is held out."""
    files = sorted([*folder.glob("annotations/captions_*.json"), *folder.glob("captions_*.json")])
    if not files:
        return None
    val_files = [file for file in files if "val" in file.stem]
    train, held_out = [], []
    for file in files:
        rows = read_coco_file(file)
        folders = (file.stem.removeprefix("captions_"), "images", "")
        located = locate_files(file, rows, folder, folders)
        if file in val_files and val_files != files:
            held_out += located
        else:
            train += located
    return train, held_out


def read_coco_file(file: Path) -> list[tuple[str, str]]:
    """Return rows (file name, caption) of one captions_*.json."""
    try:
        data = json.loads(read_text(file))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        rows = [(names[row["image_id"]], row["caption"]) for row in data["annotations"]]
        for name, caption in rows:
            if not isinstance(name, str) or not isinstance(caption, str):
                raise TypeError("a caption or a file's name is not text")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"--data {file}: not COCO's captions ({type(error).__name__}: {error}); fetch it "
            'again: expected {"images": [{"id", "file_name"}, ...], '
            '"annotations": [{"image_id", "caption"}, ...]}'
        ) from error
    return rows


def read_flickr_tokens(folder: Path) -> tuple[Rows, Rows] | None:
    """Read *.token and *.token.txt. None is held out."""
    files = sorted([*folder.glob("*.token"), *folder.glob("*.token.txt")])
    # Flickr8k's .lemma. file repeats its captions as lemmas.
    files = [file for file in files if ".lemma." not in file.name]
    if not files:
        return None
    located = []
    for file in files:
        rows = []
        for name, caption, *_ in split_lines(file, "\t", "IMAGE.jpg#0<TAB>CAPTION"):
            rows.append((name.rpartition("#")[0] or name, caption))
        located += locate_files(file, rows, folder, FLICKR_FOLDERS)
    return located, []


def read_flickr_csv(folder: Path) -> tuple[Rows, Rows] | None:
    """Read captions.txt. None is held out."""
    file = folder / "captions.txt"
    if not file.is_file():
        return None
    reader = csv.reader(io.StringIO(read_text(file)), strict=True)
    try:
        if next(reader, None) != ["image", "caption"]:
            raise csv.Error("expected the header image,caption")
        # A caption with commas but without quotes was split: join it again.
        rows = [(name, ",".join(texts)) for name, *texts in filter(None, reader)]
    except csv.Error as error:
        raise UserError(
            f"--data {file}, line {reader.line_num:,}: not CSV of image,caption ({error}); fix it"
        ) from error
    return locate_files(file, rows, folder, FLICKR_FOLDERS), []


def read_ljspeech(folder: Path) -> tuple[Rows, Rows] | None:
    """Read metadata.csv: the normalised text of each sound, or its text if that is blank."""
    file = folder / "metadata.csv"
    if not file.is_file():
        return None
    rows = []
    for name, *texts in split_lines(file, "|", "ID|TEXT|NORMALISED TEXT"):
        rows.append((f"{name}.wav", texts[-1] if texts[-1].strip() else texts[0]))
    return locate_files(file, rows, folder, ("wavs", "")), []


def read_wav_folder(folder: Path) -> tuple[Rows, Rows] | None:
    """Read NAME.wav with NAME.txt. None is held out."""
    sounds = sorted(folder.glob("*.wav"))
    if not sounds:
        return None
    missing = [sound.name for sound in sounds if not sound.with_suffix(".txt").is_file()]
    if missing:
        raise UserError(
            f"--data {folder}: sounds without a transcript beside them: {len(missing):,} of "
            f"{len(sounds):,} ({first_names(missing)}); write what is said in {missing[0]} to "
            f"{Path(missing[0]).with_suffix('.txt')}, or move it away"
        )
    rows = [(sound.name, read_text(sound.with_suffix(".txt"))) for sound in sounds]
    return locate_files(folder, rows, folder, ("",)), []


# ---- helpers -------------------------------------------------------------------------------------


def locate_files(
    source: Path, rows: list[tuple[str, str]], folder: Path, subfolders: tuple[str, ...]
) -> Rows:
    """Return rows (path, caption) for rows (file name, caption) that were read from `source`.

    A path is in the first of `subfolders` that has the file; a caption is on one line. Raises
    UserError if there are no rows, for empty captions, and for missing files.
    """
    if not rows:
        raise UserError(f"--data {source}: no captions are in it; fetch it again")
    rows = [(name, normalise_caption(text)) for name, text in rows]
    if empty := [name for name, caption in rows if not caption]:
        raise UserError(
            f"--data {source}: captions without a word: {len(empty):,} ({first_names(empty)}); "
            "write or delete them"
        )
    folders = [folder / name for name in subfolders if (folder / name).is_dir()]
    paths = {}
    for existing in reversed(folders):  # the first folder comes last, so its files win
        for path in existing.iterdir():
            paths[path.name] = path
    names = list(dict.fromkeys(name for name, _ in rows))
    if missing := [name for name in names if name not in paths]:
        raise UserError(
            f"--data {source}: files that it names and that do not exist: {len(missing):,} of "
            f"{len(names):,} ({first_names(missing)}); looked in "
            f"{' and '.join(map(str, folders))}: put them there, or delete the lines that name them"
        )
    return [(paths[name], caption) for name, caption in rows]


def first_names(names: list[str]) -> str:
    """Return the first three names as text, for an error message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def normalise_caption(text: str) -> str:
    """Return a caption on one line, with single spaces, that UTF-8 can encode.

    Lone surrogates, which JSON can hold, become "?". Zero bytes, which pad captions, become spaces.
    """
    return " ".join(text.encode("utf-8", "replace").decode().replace("\0", " ").split())


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file. Raises UserError if it is empty, binary or not UTF-8."""
    try:
        return decode_text(str(file), file.read_bytes()).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(
            f"--data {file}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def split_lines(file: Path, separator: str, form: str) -> list[list[str]]:
    """Return the lines that are not blank, each split at every `separator`.

    Raises UserError for a line without a separator; `form` describes a right line.
    """
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split(separator)
        if len(fields) < 2:
            raise UserError(
                f"--data {file}, line {number:,}: not {form}: {fields[0][:60]!r}; fix or delete it"
            )
        rows.append(fields)
    return rows
