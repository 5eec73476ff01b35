"""The forms of captioned folders: one reader for each, from a folder to its `Part`s.

No image or sound is opened here. The forms, recognised by the names of their files and looked for
in this order:

    COCO      annotations/captions_*.json
              {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
              The images of captions_X.json are in X/ (train2017/, val2017/), images/ or the folder
              itself.
    Flickr    *.token or *.token.txt: lines of IMAGE.jpg#0<TAB>CAPTION (Flickr8k and Flickr30k)
    table     captions.txt or captions.csv: CSV with a header that names a column of files (image,
              filename or file_name) and one of captions (caption or text); of images or of sounds
              The files of both are in images/, Flicker8k_Dataset/ (their spelling),
              flickr30k-images/, wavs/ or the folder itself.
    metadata  metadata.csv or metadata.jsonl with the columns image, audio, file_name, text, label
              and split (table.py), also Hugging Face's imagefolder and audiofolder; the paths are
              relative to it
    LJSpeech  metadata.csv: lines of ID|TEXT|NORMALISED TEXT; the sound is wavs/ID.wav
    sounds    NAME.wav, each with its transcript in NAME.txt
    classes   CLASS/*.jpg, CLASS/*.png or CLASS/*.wav, at least two folders: the folder's name is
              the caption

Upper and lower case of file names do not matter. A metadata file may name an image, a sound and a
caption in one row, and leave one of them empty; a row with less is left out and counted. In the
other forms a file without a caption is an error.

To add a form, write a reader: a function from a folder to its `Part`s, [] for another form, and add
it to READERS.

Left out on purpose: other subfolders, archives, and the published splits of Flickr8k and Flickr30k.
"""

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from nanods.data.decoding import decode_text
from nanods.data.splits import SPLITS, split_of
from nanods.data.table import Table, find_delimiter, parse_csv, parse_jsonl
from nanods.errors import UserError


class Item(NamedTuple):
    """What an example shows: an image, a sound or both."""

    name: str
    """The hash of the name decides whether the item is held out."""
    image: Path | None = None
    audio: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.image, self.audio) if path]


Rows = list[tuple[Item, str]]  # an item and one of its captions; "" for an item without one
# Where the files are that a .token file or a table names.
FOLDERS = ("images", "image", "flicker8k_dataset", "flickr8k_dataset", "flickr30k-images")
FOLDERS += ("flickr30k_images", "wavs", "")
FILE_COLUMNS = ("image", "filename", "file_name", "file", "image_name")
CAPTION_COLUMNS = ("caption", "text")
IMAGES = (".jpg", ".jpeg", ".png")
WAV = (".wav", ".wave")
SOUNDS = (*WAV, ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")  # WAV alone can be decoded


@dataclass(frozen=True)
class Part:
    """The captions of one caption file, or of one split in it, or of one folder."""

    name: str  # of the file or folder
    rows: Rows
    split: str | None = None  # "train", "val", "test"; None if the name does not say
    searched: list[Path] = field(default_factory=list)  # folders
    used: set[Path] = field(default_factory=set)  # files and folders with the captions
    has_labels: bool = False  # whether the captions are labels
    notes: list[str] = field(default_factory=list)  # what was left out of it


def modality_of(path: Path) -> str:
    return "audio" if path.suffix.lower() in SOUNDS else "image"


def item_of(path: Path, name: str | None = None) -> Item:
    """Return the item of one file."""
    return Item(name or path.name, **{modality_of(path): path})


# ---- one reader for each form: its parts, [] for another form ------------------------------------


def read_coco(folder: Path) -> list[Part]:
    """Read captions_*.json."""
    files = sorted([*folder.glob("annotations/captions_*.json"), *folder.glob("captions_*.json")])
    parts = []
    for file in files:
        name = file.stem.removeprefix("captions_")
        folders = (name, "images", "")
        parts.append(locate_files(file, read_coco_file(file), folder, folders, split_of(name)))
    return parts


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


def read_flickr_tokens(folder: Path) -> list[Part]:
    """Read *.token and *.token.txt."""
    parts = []
    files = [p for p in list_folder(folder)[0] if p.name.lower().endswith((".token", ".token.txt"))]
    for file in sorted(files):
        if ".lemma." in file.name:  # Flickr8k's, which repeats its captions as lemmas
            continue
        rows = []
        for name, caption in split_lines(file, "\t", "IMAGE.jpg#0<TAB>CAPTION", maxsplit=1):
            rows.append((name.rpartition("#")[0] or name, caption))
        parts.append(locate_files(file, rows, folder, FOLDERS, split_of(file.stem)))
    return parts


def read_tables(folder: Path) -> list[Part]:
    """Read captions.txt or captions.csv, or captions_SPLIT.txt and captions_SPLIT.csv."""
    parts = []
    for file in caption_files(folder, "captions", (".txt", ".csv")):
        parts.append(locate_files(file, read_table(file), folder, FOLDERS, split_of(file.stem)))
    return parts


def read_table(file: Path) -> list[tuple[str, str]]:
    """Return rows (file name, caption) of a CSV file with a header."""
    reader = csv.reader(io.StringIO(read_text(file)), strict=True)
    rows = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        name_column = next((i for i, name in enumerate(header) if name in FILE_COLUMNS), None)
        caption_column = next((i for i, name in enumerate(header) if name in CAPTION_COLUMNS), None)
        if name_column is None or caption_column is None:
            raise csv.Error(
                "expected a header such as image,caption: a column "
                f"{', '.join(FILE_COLUMNS[:-1])} or {FILE_COLUMNS[-1]}, and a column "
                f"{' or '.join(CAPTION_COLUMNS)}"
            )
        for fields in filter(None, reader):
            if caption_column == len(header) - 1:
                # A caption with commas but without quotes was split: join it again.
                fields[caption_column:] = [",".join(fields[caption_column:])]
            if len(fields) <= max(name_column, caption_column):
                raise csv.Error(f"{len(fields)} columns, and the header has {len(header)}")
            rows.append((fields[name_column], fields[caption_column]))
    except csv.Error as error:
        raise UserError(
            f"--data {file}, line {reader.line_num:,}: not CSV of files and captions ({error}); "
            "fix it"
        ) from error
    return rows


def read_ljspeech(folder: Path) -> list[Part]:
    """Read metadata.csv, or metadata_SPLIT.csv: the normalised text of each sound, or its text if
    that is blank."""
    parts = []
    for file in caption_files(folder, "metadata", (".csv",)):
        rows = []
        for name, *texts in split_lines(file, "|", "ID|TEXT|NORMALISED TEXT"):
            rows.append((f"{name}.wav", texts[-1] if texts[-1].strip() else texts[0]))
        parts.append(locate_files(file, rows, folder, ("wavs", ""), split_of(file.stem)))
    return parts


def read_wav_folder(folder: Path) -> list[Part]:
    """Read NAME.wav with NAME.txt."""
    files, _ = list_folder(folder)
    sounds = sorted(path for path in files if path.suffix.lower() in WAV)
    if not sounds:
        return []
    texts = {path.stem: path for path in files if path.suffix.lower() == ".txt"}
    missing = [sound.name for sound in sounds if sound.stem not in texts]
    if missing:
        raise UserError(
            f"--data {folder}: sounds without a transcript beside them: {len(missing):,} of "
            f"{len(sounds):,} ({first_names(missing)}); write what is said in {missing[0]} to "
            f"{Path(missing[0]).with_suffix('.txt')}, or move it away"
        )
    rows = [(sound.name, read_text(texts[sound.stem])) for sound in sounds]
    part = locate_files(folder, rows, folder, ("",))
    return [replace(part, used={texts[sound.stem] for sound in sounds})]


def read_metadata(folder: Path) -> list[Part]:
    """Read metadata.csv or metadata.jsonl, or metadata_SPLIT.csv and metadata_SPLIT.jsonl."""
    parts = []
    for file in caption_files(folder, "metadata", (".csv", ".jsonl")):
        text = read_text(file)
        if not text.strip():
            raise UserError(f"--data {file}: no captions are in it; fetch it again")
        if file.suffix.lower() == ".jsonl":
            table = parse_jsonl(str(file), text)
        elif (delimiter := find_delimiter(text)) or "|" not in text:
            table = parse_csv(str(file), text, delimiter or ",")
        else:  # LJSpeech
            return []
        parts += locate_table(file, table, folder)
    return parts


def read_split_classes(folder: Path) -> list[Part]:
    """Read SPLIT/CLASS/*.jpg, SPLIT/CLASS/*.png and SPLIT/CLASS/*.wav. A split may lack classes."""
    parts = read_split_folders(folder, partial(read_classes, least=1))
    return parts if len({label for part in parts for _, label in part.rows}) > 1 else []


def read_classes(folder: Path, least: int = 2) -> list[Part]:
    """Read CLASS/*.jpg, CLASS/*.png and CLASS/*.wav, if there are at least so many classes."""
    rows, classes = [], []
    for subfolder in sorted(list_folder(folder)[1]):
        files = [p for p in list_folder(subfolder)[0] if p.suffix.lower() in (*IMAGES, *WAV)]
        label = normalise_caption(subfolder.name.replace("_", " "))
        if files and label and subfolder.name.lower() not in FOLDERS:
            classes.append(subfolder)
            rows += [(item_of(p, f"{subfolder.name}/{p.name}"), label) for p in sorted(files)]
    if len(classes) < least or all(split_of(path.name) for path in classes):
        return []
    # A class may be called "train": the names of the folders say nothing of splits.
    return [Part(f"{folder.name}/", rows, "train", searched=classes, has_labels=True)]


READERS: tuple[Callable[[Path], list[Part]], ...] = (
    read_coco,
    read_flickr_tokens,
    read_tables,
    read_metadata,
    read_ljspeech,
    read_wav_folder,
)


def read_form(folder: Path) -> list[Part]:
    """Return the parts of the first form that a folder has; [] if it has none."""
    for read in READERS:
        if parts := read(folder):
            return parts
    return []


def read_split_folders(folder: Path, read: Callable[[Path], list[Part]]) -> list[Part]:
    """Return what `read` finds in the subfolders whose names say that they are a split."""
    parts = []
    for subfolder in split_folders(folder):
        for part in read(subfolder):
            parts.append(replace(part, name=f"{subfolder.name}/", split=split_of(subfolder.name)))
    return parts


# ---- rows of a table -----------------------------------------------------------------------------


def locate_table(file: Path, table: Table, folder: Path) -> list[Part]:
    """Return a part for each split of a table, with the rows that have two modalities or three.

    Raises UserError for a path outside the folder, for an unknown split, and if no row is left.
    """
    subfolders = [path for path in list_folder(folder)[1] if path.name.lower() in FOLDERS]
    finder = FileFinder([folder, *subfolders])
    rows: dict[str | None, dict[tuple[Item, str], None]] = {}  # by split: an ordered set
    noted: dict[str, list[str]] = {}  # what -> where
    for line, cells in table.rows:
        source, where = f"{file}, line {line:,}", f"line {line}"
        names = file_names(cells, source)
        files = {name: find_inside(finder, path, folder, source) for name, path in names.items()}
        for name in [name for name, path in files.items() if path is None]:
            noted.setdefault("files that do not exist", []).append(names[name])
            del files[name]
        split = split_in_cell(cells["split"], source) if "split" in cells else None
        if "split" in table.columns and split is None:
            noted.setdefault("cells without a split, read as train", []).append(where)
            split = "train"
        caption = normalise_caption(cells.get("text") or cells.get("label", ""))
        present = [*files, *(["text"] if caption else [])]
        if not names and not caption:
            noted.setdefault("rows without file and caption", []).append(where)
        elif len(present) < 2:
            alone = present[0] if present else "a missing file"
            noted.setdefault(f"rows with {alone} alone", []).append(where)
        else:
            paths = [path.relative_to(folder).as_posix() for path in files.values()]
            row = Item(",".join(paths), **files), caption
            if row in rows.setdefault(split, {}):
                noted.setdefault("rows that occur twice", []).append(where)
            rows[split][row] = None
    notes = [
        f"{what}: {len(where):,} of {len(table.rows):,} rows ({first_names(where)})"
        for what, where in noted.items()
    ]
    if not any(rows.values()):
        raise UserError(
            f"--data {file}: no row can be used. {'; '.join(notes) or 'It has no rows'}. The paths "
            f"are relative to {folder}: put the files there, or correct the table"
        )
    if table.others:
        notes.append(f"not read: the columns {first_names(table.others)} of {file.name}")
    has_labels = "label" in table.columns and "text" not in table.columns
    searched = [path for path, files in finder.listings.items() if files]
    parts = []
    for split, of_split in rows.items():
        name = f"{file.name} ({split})" if split else file.name
        split = split or split_of(file.stem)
        parts.append(Part(name, list(of_split), split, searched, {file}, has_labels))
    parts[0] = replace(parts[0], notes=notes)
    return parts


def file_names(cells: dict[str, str], source: str) -> dict[str, str]:
    """Return the names of the files in a row by modality."""
    names = {name: cells[name] for name in ("image", "audio") if name in cells}
    if "file" in cells:
        modality = modality_of(Path(cells["file"]))
        if modality in names:
            raise UserError(
                f"--data {source}: two files of one modality, {names[modality]} and "
                f"{cells['file']}; delete one"
            )
        names[modality] = cells["file"]
    return names


def split_in_cell(cell: str, source: str) -> str:
    """Return the split that the cell of a table says. Raises UserError if it is unknown."""
    if cell.lower() not in SPLITS:
        raise UserError(
            f"--data {source}: the split {cell[:40]!r} is unknown; write one of {', '.join(SPLITS)}"
        )
    return SPLITS[cell.lower()]


def find_inside(finder: "FileFinder", name: str, folder: Path, source: str) -> Path | None:
    """Return the file of a name in a table, None if there is none.

    Raises UserError if it is not inside the folder, by its path or by a link: a table made by
    others should not decide which other files of ours are read.
    """
    name = name.replace("\\", "/")  # of a table made on Windows
    outside = name.startswith("/") or name[1:2] == ":" or ".." in name.split("/")
    path = None if outside else finder.find(name)
    if path:
        outside = not is_inside(path.parent, folder)
        outside |= path.is_symlink() and not is_inside(path, folder)
    if outside:
        raise UserError(
            f"--data {source}: {name} is outside the folder; move the file into {folder}, and "
            "write its path from there"
        )
    return path


@cache
def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, its links followed, is in a folder."""
    return path.resolve().is_relative_to(folder.resolve())


# ---- files and folders ---------------------------------------------------------------------------


@cache
def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files and the subfolders of a folder, without hidden ones.

    Hidden ones are .DS_Store, and the ._NAME that macOS puts beside each NAME of an archive.
    """
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith((".", "__MACOSX")):
                    (folders if entry.is_dir() else files).append(folder / entry.name)
    except OSError as error:
        raise UserError(
            f"--data {folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from error
    return files, folders


def split_folders(folder: Path) -> list[Path]:
    """Return the subfolders whose names say that they are a split."""
    return sorted(path for path in list_folder(folder)[1] if split_of(path.name))


def caption_files(folder: Path, stem: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return STEM.SUFFIX and the files STEM_SPLIT.SUFFIX, of the first suffix that there is.

    Where a file is named train, STEM.SUFFIX is not returned: it should hold all splits.
    """
    for suffix in suffixes:
        files = [path for path in list_folder(folder)[0] if path.suffix.lower() == suffix]
        whole = [path for path in files if path.stem.lower() == stem]
        splits = [p for p in files if p.name.lower().startswith(stem) and split_of(p.stem)]
        if any(split_of(path.stem) == "train" for path in splits):
            whole = []
        if whole or splits:
            return sorted(whole[:1] + splits)
    return []


class FileFinder:
    """Finds files by their names in folders, the first folder first. Each is listed once."""

    def __init__(self, folders: list[Path]):
        self.folders = folders
        self.listings: dict[Path, dict[str, Path]] = {}

    def find(self, name: str) -> Path | None:
        """Return the file of a name, which may begin with a subfolder; None if there is none."""
        subfolder, _, name = name.lstrip("/").rpartition("/")
        if ".." in subfolder.split("/"):  # not in the data set
            return None
        for folder in self.folders:
            files = self.files(folder / subfolder if subfolder else folder)
            if path := files.get(name) or files.get(name.lower()):
                return path
        return None

    def files(self, folder: Path) -> dict[str, Path]:
        """Return the files of a folder by name, and by name in lower case."""
        if folder not in self.listings:
            # Path.is_dir raises for a name that is too long.
            files = list_folder(folder)[0] if os.path.isdir(folder) else []  # noqa: PTH112
            listing = {path.name.lower(): path for path in files}
            self.listings[folder] = listing | {path.name: path for path in files}
        return self.listings[folder]


def locate_files(
    source: Path,
    rows: list[tuple[str, str]],
    folder: Path,
    subfolders: tuple[str, ...],
    split: str | None = None,
) -> Part:
    """Return a part with the rows (item, caption) for rows (file name, caption) of `source`.

    A file is in the first of `subfolders` that has the file, or in a folder inside it that is named
    like a split; a caption is on one line. Raises UserError if there are no rows, for empty
    captions, and for missing files.
    """
    if not rows:
        raise UserError(f"--data {source}: no captions are in it; fetch it again")
    rows = [(name, normalise_caption(text)) for name, text in rows]
    if empty := [name for name, caption in rows if not caption]:
        raise UserError(
            f"--data {source}: captions without a word: {len(empty):,} ({first_names(empty)}); "
            "write or delete them"
        )
    existing, folders = list_folder(folder)[1], []
    for name in subfolders:
        folders += [path for path in existing if path.name.lower() == name.lower()]
        folders += [] if name else [folder]
    # Files of a split are looked for in folders of the same split first.
    inside = [path for found in folders for path in split_folders(found) if path not in folders]
    inside.sort(key=lambda path: split_of(path.name) != split)
    finder = FileFinder([*folders, *inside])
    paths = {name: finder.find(name) for name in dict.fromkeys(name for name, _ in rows)}
    if missing := [name for name, path in paths.items() if path is None]:
        raise UserError(
            f"--data {source}: files that it names and that do not exist: {len(missing):,} of "
            f"{len(paths):,} ({first_names(missing)}); looked in "
            f"{' and '.join(map(str, folders))}: put them there, or delete the lines that name them"
        )
    if not split:
        check_one_split(source, paths, inside)
    items = {name: item_of(path) for name, path in paths.items()}
    located = [(items[name], caption) for name, caption in rows]
    searched = [path for path, files in finder.listings.items() if files]
    return Part(source.name, located, split, searched, {source})


def check_one_split(source: Path, paths: dict[str, Path], split_folders: list[Path]) -> None:
    """Raise UserError if the folders of two splits have different files of one name."""
    listings = [
        (folder, {path.name for path in list_folder(folder)[0]}) for folder in split_folders
    ]
    for name, path in paths.items():
        if "/" not in name and path.parent in split_folders:
            found = [folder.name for folder, names in listings if path.name in names]
            if len(found) > 1:
                raise UserError(
                    f"--data {source}: {name} is in {' and in '.join(sorted(found))}: write "
                    f"{found[0]}/{name}, or captions_{found[0]}.csv and captions_{found[1]}.csv"
                )


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
        return decode_text(str(file), file.read_bytes())
    except OSError as error:
        raise UserError(
            f"--data {file}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def split_lines(file: Path, separator: str, form: str, maxsplit: int = -1) -> list[list[str]]:
    """Return the lines that are not blank, each split at every `separator`, or the first ones.

    Raises UserError for a line without a separator; `form` describes a right line.
    """
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split(separator, maxsplit)
        if len(fields) < 2:
            raise UserError(
                f"--data {file}, line {number:,}: not {form}: {fields[0][:60]!r}; fix or delete it"
            )
        rows.append(fields)
    return rows
