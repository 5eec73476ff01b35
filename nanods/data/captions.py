"""Captions of a folder: `read_captions(folder)` returns each image or sound with its captions, and
which of them are held out. caption_forms.py says which forms a folder may have.

Splits are recognised by the words train, valid, validation, val, dev and test (splits.py) in the
column "split" and in the names of caption files (captions_val2017.json, captions_dev.csv,
metadata_val.csv), of the subfolders that hold a form each (train/, val/, test/), and of the folders
in which a form's files lie (images/train/, images/val/). What is in test is not used. Where nothing
is named train, all of val is the training data. Where nothing is held out by name, about 1 image or
sound in 20 is, with all of its captions. The hash of the file's name decides, in metadata files and
classes with its folder: other files and their order do not matter. Rows that share an image or a
sound are held out together, unless that leaves few groups: a drawing of each of ten classes, say.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanods.data.caption_forms import (
    Item,
    Part,
    Rows,
    first_names,
    is_inside,
    list_folder,
    read_classes,
    read_form,
    read_split_classes,
    read_split_folders,
)
from nanods.data.examples import caption_key
from nanods.data.splits import split_of
from nanods.errors import UserError

MIN_HELD_OUT = 4  # files, or a quarter of all if these are fewer
MIN_GROUPS = 100  # groups of rows that share files, from which whole groups are held out


@dataclass(frozen=True)
class CaptionFolder:
    """The captions of a folder. No item is in both `train` and `held_out`."""

    modalities: tuple[str, ...]  # two or three of "text", "image" and "audio"
    train: Rows
    held_out: Rows
    notes: list[str]  # where the held-out rows come from, and what was left out


def read_captions(folder: Path) -> CaptionFolder:
    """Return the captions of a folder.

    Raises UserError for a folder without captions, for a mistake in the captions, and for missing
    files.
    """
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: there is no such folder; give one of images or sounds and their "
            "captions"
        )
    list_folder.cache_clear()  # files may have changed since the last call
    is_inside.cache_clear()
    parts = read_form(folder) or read_split_folders(folder, read_form)
    parts = parts or read_split_classes(folder) or read_classes(folder)
    if not parts:
        files, folders = list_folder(folder)
        inside = f" and the folders {first_names(sorted(p.name for p in folders))}"
        raise UserError(
            f"--data {folder}: no captions are in it; expected annotations/captions_*.json (COCO), "
            "*.token, *.token.txt, captions.txt or captions.csv (Flickr), metadata.csv or "
            "metadata.jsonl with the columns image or audio, and text, metadata.csv (LJSpeech), "
            "folders CLASS/*.jpg or CLASS/*.wav, or NAME.wav with NAME.txt; it holds "
            f"{count_suffixes(files) or 'no files'}{inside if folders else ''}"
        )
    train, held_out, notes = split_rows(parts, folder)
    for part in parts:
        notes += part.notes
    notes += count_rare_labels(parts) + describe_others(parts, folder)
    return CaptionFolder(modalities_of(train + held_out), train, held_out, notes)


def modalities_of(rows: Rows) -> tuple[str, ...]:
    """Return the modalities that rows have."""
    has_text = any(caption for _, caption in rows)
    items = {item for item, _ in rows}
    files = [name for name in ("image", "audio") if any(getattr(item, name) for item in items)]
    return ("text", *files) if has_text else tuple(files)


def keep_modalities(captions: CaptionFolder, wanted: Sequence[str]) -> CaptionFolder:
    """Return the captions with these modalities alone; all of them if fewer than two are left.

    Rows that have less than two of them are left out.
    """
    kept = [name for name in captions.modalities if name in wanted]
    if len(kept) in (0, 1, len(captions.modalities)):
        return captions
    split, left_out = {}, 0
    for name in ("train", "held_out"):
        rows = {}  # an ordered set: rows may now occur twice
        for item, caption in getattr(captions, name):
            image, audio = "image" in kept and item.image, "audio" in kept and item.audio
            part = Item(item.name, image or None, audio or None)
            text = caption if "text" in kept else ""
            if len(part.files) + bool(text) < 2:
                left_out += 1
            else:
                rows[part, text] = None
        split[name] = list(rows)
    notes = list(captions.notes)
    if left_out:
        notes.append(f"left out: {left_out:,} rows without {' and '.join(kept)}")
    return CaptionFolder(tuple(kept), split["train"], split["held_out"], notes)


def hold_out_folder(captions: CaptionFolder, folder: Path) -> CaptionFolder:
    """Return captions all of which are for training, with those of `folder` (--val-data) held out.

    What is called test in either folder is still left out. Raises UserError if the folders have
    different modalities, and as `read_captions`.
    """
    try:
        val = read_captions(folder)
    except UserError as error:
        raise UserError(str(error).replace("--data", "--val-data", 1)) from error
    if val.modalities != captions.modalities:
        raise UserError(
            f"--val-data {folder}: it holds {' and '.join(val.modalities)}, and --data "
            f"{' and '.join(captions.modalities)}; give a folder of the same modalities"
        )
    held_out = val.train + val.held_out
    elsewhere = {resolve(item) for item, _ in held_out}
    train = captions.train + captions.held_out
    train = [row for row in train if resolve(row[0]) not in elsewhere]
    # The first note says what is held out; here it is the folder.
    notes = [f"held out: {count_files(held_out)} of {folder}", *captions.notes[1:], *val.notes[1:]]
    return CaptionFolder(captions.modalities, train, held_out, notes)


def resolve(item: Item) -> tuple[Path, ...]:
    """Return the files of an item, the same whichever path leads to them."""
    return tuple(path.resolve() for path in item.files)


# ---- splits --------------------------------------------------------------------------------------


def split_rows(parts: list[Part], folder: Path) -> tuple[Rows, Rows, list[str]]:
    """Return the training and the held-out rows, so that no item is in both, and notes.

    Rows of the split "test" are in neither. If nothing is held out yet, about 1 item in 20 is.
    """
    rows: dict[str, Rows] = {"train": [], "val": [], "test": []}
    names: dict[str, dict[str, None]] = {"train": {}, "val": {}, "test": {}}  # ordered sets
    for part in parts:
        by_folder = {} if part.split else split_by_folder(part, folder)
        if not by_folder:
            rows[part.split or "train"] += part.rows
            names[part.split or "train"][part.name] = None
            continue
        for item, caption in part.rows:
            split, name = by_folder.get(item, ("train", part.name))
            rows[split].append((item, caption))
            names[split][name] = None
    for split in ("val", "test"):  # nothing but val or test: the user chose it
        if not rows["train"]:
            rows["train"], rows[split] = rows[split], []
    notes, elsewhere = [], {item[1:] for item, _ in rows["val"] + rows["test"]}
    train = rows["train"]
    if elsewhere:
        train = [(item, caption) for item, caption in train if item[1:] not in elsewhere]
    if held_out := rows["val"]:
        notes.append(f"held out: {count_files(held_out)} of {', '.join(names['val'])}")
    else:
        items, remark = choose_held_out({item for item, _ in train})
        notes.append(
            f"held out: {len(items):,} of {count_files(train)}, by the hash of the file's name"
            f"{remark}"
        )
        held_out = [row for row in train if row[0] in items]
        train = [row for row in train if row[0] not in items]
    if rows["test"]:
        notes.append(f"left out: {count_files(rows['test'])} of {', '.join(names['test'])}")
    if both := elsewhere & {item[1:] for item, _ in rows["train"]}:
        notes.append(f"left out of training: {len(both):,} that are in val or test too")
    return train, held_out, notes


def split_by_folder(part: Part, folder: Path) -> dict[Item, tuple[str, str]]:
    """Return item -> (split, folder) for the items that lie in a folder named like a split."""
    by_folder = {}
    for item in dict.fromkeys(item for item, _ in part.rows):
        # The name of `folder` says nothing.
        inside = item.files[0].parent.relative_to(folder).as_posix()
        if split := split_of(inside):
            by_folder[item] = split, f"{inside}/"
    return by_folder


def choose_held_out(items: set[Item]) -> tuple[set[Item], str]:
    """Return about 1 item in 20 (13 / 256), at least a few, chosen by the hash of its name; and a
    remark, "" if there is none.

    Items that share a file are chosen together, unless they form fewer than MIN_GROUPS groups.
    """
    groups, remark = group_by_files(items), ""
    if len(groups) < min(len(items), MIN_GROUPS):
        groups = [[item] for item in items]
        remark = (
            "; some of their images or sounds are in training examples too: too many share them"
        )
    digests = [hashlib.sha256(os.fsencode(min(i.name for i in group))).digest() for group in groups]
    count = max(sum(digest[0] < 13 for digest in digests), min(MIN_HELD_OUT, len(groups) // 4))
    chosen = sorted(range(len(groups)), key=digests.__getitem__)[:count]
    return {item for i in chosen for item in groups[i]}, remark


def group_by_files(items: Iterable[Item]) -> list[list[Item]]:
    """Return groups of items: those that share a file are in one, and those that share one with
    them."""
    parents: dict[Path, Path] = {}  # each group of files is a tree

    def root(path: Path) -> Path:
        while (parent := parents.setdefault(path, path)) != path:
            parents[path] = path = parents[parent]
        return path

    for item in items:
        parents[root(item.files[0])] = root(item.files[-1])
    groups: dict[Path, list[Item]] = {}
    for item in items:
        groups.setdefault(root(item.files[0]), []).append(item)
    return list(groups.values())


def count_files(rows: Rows) -> str:
    """Return the number of items of rows in words: "5,000 images"."""
    items = {item for item, _ in rows}
    has_image, has_audio = any(i.image for i in items), any(i.audio for i in items)
    noun = "example" if has_image and has_audio else "sound" if has_audio else "image"
    return f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"


def count_rare_labels(parts: list[Part]) -> list[str]:
    """Return a note of the labels with one example, if there are any."""
    counts, labels = Counter(), {}
    for part in parts:
        if part.has_labels and part.split != "test":
            for _, label in part.rows:
                counts[caption_key(label)] += 1
                labels.setdefault(caption_key(label), label)
    rare = [labels[key] for key, count in counts.items() if count == 1]
    if not rare:
        return []
    return [
        f"labels with one example, which cannot be both learnt and tested: {len(rare):,} of "
        f"{len(labels):,} ({first_names(rare)}); add examples"
    ]


def describe_others(parts: list[Part], folder: Path) -> list[str]:
    """Return notes of the files and folders that are not read."""
    used = {path for part in parts for item, _ in part.rows for path in item.files}
    used |= {path for part in parts for path in part.used}
    searched = list(dict.fromkeys(path for part in parts for path in [folder, *part.searched]))
    others = [file for path in searched for file in list_folder(path)[0] if file not in used]
    inside = {path for part in parts for path in (*part.searched, *part.used)}
    inside |= {parent for path in inside for parent in path.parents}
    folders = [path.name for path in list_folder(folder)[1] if path not in inside]
    notes = []
    if others:
        notes.append(f"not read: {count_suffixes(others)}, the first: {min(others)}")
    if folders:
        notes.append(f"not read: the folders {first_names(sorted(folders))}")
    return notes


def count_suffixes(files: list[Path]) -> str:
    """Return how many files there are of each kind: "12 files (9 .gif, 3 .txt)"; "" if none."""
    if not files:
        return ""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in files)
    kinds = [f"{count:,} {suffix}" for suffix, count in counts.most_common(5)]
    kinds += ["..."] if len(counts) > 5 else []
    return f"{len(files):,} file{'' if len(files) == 1 else 's'} ({', '.join(kinds)})"
