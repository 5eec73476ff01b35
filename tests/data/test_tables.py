"""metadata.csv, metadata.jsonl and folders of classes: what is read, split, left out and refused.

The images and sounds are empty files: none is opened.
"""

import json

import pytest

from nanods.data.captions import keep_modalities, read_captions
from nanods.errors import UserError
from tests.data.test_captions import write

IMAGES = {f"{name}.jpg": "" for name in "abc"}
ROWS = [("a.jpg", "a cat, asleep"), ("b.jpg", "A dog"), ("c.jpg", "naïve")]


def read(folder):
    """Return the modalities, the rows (path in the folder, caption) and the notes."""
    captions = read_captions(folder)
    rows = [
        (*(path.relative_to(folder).as_posix() for path in item.files), caption)
        for item, caption in captions.train + captions.held_out
    ]
    return captions.modalities, sorted(rows), captions.notes


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


TABLES = {
    "metadata.csv": 'image,text\na.jpg,"a cat, asleep"\nb.jpg,A dog\nc.jpg,naïve\n',
    "quotes left out": "image,text\na.jpg,a cat, asleep\nb.jpg,A dog\nc.jpg,naïve\n",
    "another order": 'Caption, ID, IMAGE\n"a cat, asleep",1,a.jpg\nA dog,2,b.jpg\nnaïve,3,c.jpg',
    "byte order mark": "\ufefffile_name;text\r\na.jpg;a cat, asleep\r\nb.jpg;A dog\r\nc.jpg;naïve",
    "tabs": "file_name\ttranscription\na.jpg\ta cat, asleep\nb.jpg\tA dog\n\nc.jpg\tnaïve\n",
    "bars": "path|sentence\na.jpg|a cat, asleep\nb.jpg|A dog\nc.jpg|naïve\n",
    "metadata.jsonl": jsonl(*({"file_name": name, "text": text} for name, text in ROWS)),
}


class TestTables:
    @pytest.mark.parametrize(("name", "text"), TABLES.items(), ids=TABLES)
    def test_images(self, tmp_path, name, text):
        name = name if name.startswith("metadata") else "metadata.csv"
        write(tmp_path, {name: text, **IMAGES})
        modalities, rows, _ = read(tmp_path)
        assert modalities == ("text", "image") and rows == ROWS

    def test_sounds_and_integer_labels_as_hugging_face_has_them(self, tmp_path):
        rows = [{"file_name": f"data/{i}.wav", "label": i % 2} for i in range(4)]
        write(tmp_path, {"metadata.jsonl": jsonl(*rows), **{f"data/{i}.WAV": "" for i in range(4)}})
        modalities, rows, _ = read(tmp_path)
        assert modalities == ("text", "audio")
        assert rows == [(f"data/{i}.WAV", str(i % 2)) for i in range(4)]

    def test_folders_of_splits_as_hugging_face_has_them(self, tmp_path):
        for split, files in (("train", "abc"), ("validation", "d"), ("test", "e")):
            table = "file_name,text\n" + "".join(f"{i}.png,{i}\n" for i in files)
            write(tmp_path / split, {"metadata.csv": table, **{f"{i}.png": "" for i in files}})
        captions = read_captions(tmp_path)
        assert [caption for _, caption in captions.train] == ["a", "b", "c"]
        assert [caption for _, caption in captions.held_out] == ["d"]

    def test_the_column_of_splits(self, tmp_path):
        files = "abcdefg"
        splits = ["train", "Validation", "test", " DEV ", "training", "val", ""]
        table = "image,label,split\n" + "".join(
            f"{name}.jpg,{name},{split}\n" for name, split in zip(files, splits, strict=True)
        )
        write(tmp_path, {"metadata.csv": table, **{f"{name}.jpg": "" for name in files}})
        captions = read_captions(tmp_path)
        assert [caption for _, caption in captions.train] == ["a", "e", "g"]
        assert [caption for _, caption in captions.held_out] == ["b", "d", "f"]
        assert captions.notes[:3] == [
            "held out: 3 images of metadata.csv (val)",
            "left out: 1 image of metadata.csv (test)",
            "cells without a split, read as train: 1 of 7 rows (line 8)",
        ]

    def test_the_text_is_the_caption_and_the_label_where_there_is_none(self, tmp_path):
        table = "image,label,text\na.jpg,cat,a grey cat\nb.jpg,dog,\n"
        write(tmp_path, {"metadata.csv": table, **IMAGES})
        assert read(tmp_path)[1] == [("a.jpg", "a grey cat"), ("b.jpg", "dog")]

    def test_files_of_one_name_in_two_folders_differ(self, tmp_path):
        table = "image,text\nx/1.jpg,one\ny\\1.jpg,two\n./3.jpg,three\n4.jpg,four\n"
        write(tmp_path, {"metadata.csv": table})
        write(tmp_path, dict.fromkeys(("x/1.jpg", "y/1.jpg", "3.jpg", "images/4.jpg"), ""))
        captions = read_captions(tmp_path)
        names = {item.name for item, _ in captions.train + captions.held_out}
        assert names == {"x/1.jpg", "y/1.jpg", "3.jpg", "images/4.jpg"}

    def test_rows_that_cannot_be_used_are_counted(self, tmp_path):
        table = (
            "image,text,source\n"
            "a.jpg,one,x\n"
            "a.jpg,one,y\n"  # line 3: twice
            "a.jpg,another,x\n"
            ",no file,x\n"
            "b.jpg,,x\n"
            "none.jpg,no such file,x\n"
            "c.jpg\n"
            " , ,x\n"
        )
        write(tmp_path, {"metadata.csv": table, **IMAGES})
        _, rows, notes = read(tmp_path)
        assert rows == [("a.jpg", "another"), ("a.jpg", "one")]
        assert notes[1:7] == [
            "rows that occur twice: 1 of 8 rows (line 3)",
            "rows with text alone: 2 of 8 rows (line 5, line 7)",
            "rows with image alone: 2 of 8 rows (line 6, line 8)",
            "files that do not exist: 1 of 8 rows (none.jpg)",
            "rows without file and caption: 1 of 8 rows (line 9)",
            "not read: the columns source of metadata.csv",
        ]

    def test_labels_with_one_example_are_counted(self, tmp_path):
        table = "image,label\na.jpg,cat\nb.jpg,Cat \nc.jpg,dog\n"
        write(tmp_path, {"metadata.csv": table, **IMAGES})
        (note,) = [note for note in read(tmp_path)[2] if note.startswith("labels")]
        assert note.endswith("cannot be both learnt and tested: 1 of 2 (dog); add examples")


class TestThreeModalities:
    def test_gaps(self, tmp_path):
        table = "audio,text,image\na.wav,one,a.jpg\n,two,b.jpg\nb.wav,three,\na.wav,,c.jpg\nb.wav,,"
        write(tmp_path, {"metadata.csv": table, **IMAGES, "a.wav": "", "wavs/b.wav": ""})
        modalities, rows, notes = read(tmp_path)
        assert modalities == ("text", "image", "audio")
        assert rows == [
            ("a.jpg", "a.wav", "one"),
            ("b.jpg", "two"),
            ("c.jpg", "a.wav", ""),
            ("wavs/b.wav", "three"),
        ]
        assert notes[1] == "rows with audio alone: 1 of 5 rows (line 6)"

    def test_without_texts(self, tmp_path):
        write(tmp_path, {"metadata.csv": "image,audio\na.jpg,a.wav\n", "a.jpg": "", "a.wav": ""})
        assert read(tmp_path)[:2] == (("image", "audio"), [("a.jpg", "a.wav", "")])

    def test_classes_of_images_and_sounds(self, tmp_path):
        write(tmp_path, dict.fromkeys(("cat/1.jpg", "cat/1.wav", "dog/1.wav"), ""))
        modalities, rows, _ = read(tmp_path)
        assert modalities == ("text", "image", "audio")
        assert rows == [("cat/1.jpg", "cat"), ("cat/1.wav", "cat"), ("dog/1.wav", "dog")]

    @staticmethod
    def write_pairs(folder, images, sounds):
        """Write 800 rows with the given numbers of different images and sounds."""
        rows = [f"{i % images}.jpg,{i % sounds}.wav,text {i}\n" for i in range(800)]
        write(folder, {"metadata.csv": "image,audio,text\n" + "".join(rows)})
        write(folder, {f"{i}.jpg": "" for i in range(images)})
        write(folder, {f"{i}.wav": "" for i in range(sounds)})

    def test_rows_that_share_a_file_are_held_out_together(self, tmp_path):
        self.write_pairs(tmp_path, 200, 400)  # of each image two sounds, of each sound two texts
        captions = read_captions(tmp_path)
        train = {path for item, _ in captions.train for path in item.files}
        held_out = {path for item, _ in captions.held_out for path in item.files}
        assert 10 < len(captions.held_out) < 80 and not train & held_out
        assert captions.notes[0].endswith("by the hash of the file's name")

    def test_rows_of_a_few_drawings_are_held_out_apart(self, tmp_path):
        self.write_pairs(tmp_path, 10, 800)
        captions = read_captions(tmp_path)
        assert 10 < len(captions.held_out) < 80
        assert len({item.image for item, _ in captions.train}) == 10
        assert captions.notes[0].endswith("are in training examples too: too many share them")

    def test_some_of_the_modalities(self, tmp_path):
        table = "audio,text,image\na.wav,one,a.jpg\n,two,b.jpg\nb.wav,three,\na.wav,,c.jpg\n"
        write(tmp_path, {"metadata.csv": table, **IMAGES, "a.wav": "", "b.wav": ""})
        captions = read_captions(tmp_path)
        kept = keep_modalities(captions, ("image", "text", "video"))
        assert kept.modalities == ("text", "image")
        assert [(item.files, caption) for item, caption in kept.train] == [
            ([tmp_path / "a.jpg"], "one"),
            ([tmp_path / "b.jpg"], "two"),
        ]
        assert kept.notes[-1] == "left out: 2 rows without text and image"
        assert keep_modalities(captions, ("text",)) is captions
        assert keep_modalities(captions, ("audio", "image", "text")) is captions


class TestClasses:
    FILES = ("dog/1.jpg", "dog/2.PNG", "grey_cat/1.jpg", "grey_cat/x.jpeg")
    ROWS = tuple((name, name.split("/")[0].replace("_", " ")) for name in FILES)

    def test_folders_are_labels(self, tmp_path):
        write(tmp_path, dict.fromkeys(self.FILES, "") | {"dog/1.gif": "", "empty/x.txt": ""})
        modalities, rows, notes = read(tmp_path)
        assert modalities == ("text", "image") and rows == sorted(self.ROWS)
        assert notes == [
            "held out: 1 of 4 images, by the hash of the file's name",
            f"not read: 1 file (1 .gif), the first: {tmp_path / 'dog/1.gif'}",
            "not read: the folders empty",
        ]
        names = {item.name for item, _ in read_captions(tmp_path).train}
        assert names < set(self.FILES), "the class is a part of the name that is hashed"

    def test_sounds(self, tmp_path):
        write(tmp_path, dict.fromkeys(("one/a.wav", "one/b.WAV", "two/a.wav"), ""))
        modalities, rows, notes = read(tmp_path)
        assert modalities == ("text", "audio")
        assert rows == [("one/a.wav", "one"), ("one/b.WAV", "one"), ("two/a.wav", "two")]
        assert "1 of 2 (two); add examples" in notes[1]

    def test_in_folders_of_splits(self, tmp_path):
        for split in ("train", "val", "test"):
            write(tmp_path / split, dict.fromkeys(self.FILES, ""))
        write(tmp_path, {"photos/1.jpg": "", "drawings/1.jpg": ""})
        captions = read_captions(tmp_path)
        for split, rows in (("train", captions.train), ("val", captions.held_out)):
            files = sorted(item.image.relative_to(tmp_path).as_posix() for item, _ in rows)
            assert files == sorted(f"{split}/{name}" for name in self.FILES)
        assert captions.notes == [
            "held out: 4 images of val/",
            "left out: 4 images of test/",
            "not read: the folders drawings, photos",
        ]

    def test_a_split_may_lack_a_class(self, tmp_path):
        files = ("train/cat/1.jpg", "train/dog/1.jpg", "val/dog/2.jpg")
        write(tmp_path, dict.fromkeys(files, ""))
        captions = read_captions(tmp_path)
        assert len(captions.train) == 2
        assert [caption for _, caption in captions.held_out] == ["dog"]

    def test_a_class_may_be_called_train(self, tmp_path):
        write(tmp_path, {f"{name}/{i}.jpg": "" for name in ("train", "car", "bus") for i in "123"})
        _, rows, _ = read(tmp_path)
        assert {label for _, label in rows} == {"train", "car", "bus"} and len(rows) == 9

    @pytest.mark.parametrize(
        "names", [["train", "val"], ["images"], ["images", "wavs"], ["photos"]]
    )
    def test_other_folders_are_not_classes(self, tmp_path, names):
        write(tmp_path, {f"{name}/1.jpg": "" for name in names})
        with pytest.raises(UserError, match=r"no captions are in it.* no files and the folders"):
            read_captions(tmp_path)

    def test_other_forms_come_first(self, tmp_path):
        write(tmp_path, dict.fromkeys(self.FILES, ""))
        write(tmp_path, {"metadata.csv": "image,text\ndog/1.jpg,a brown dog\ndog/2.png,another"})
        assert read(tmp_path)[1] == [("dog/1.jpg", "a brown dog"), ("dog/2.PNG", "another")]


MISTAKES = {
    "no column of files": (
        "picture,caption\na.jpg,x\n",
        "no column of files.* Found: picture, capt",
    ),
    "no column of captions": (
        "Image,size\na.jpg,3\n",
        "no column of captions: text, caption or label. Found: Image, size. Write a header",
    ),
    "two columns of captions": (
        "image,text,caption\na.jpg,x,y\n",
        "the columns text and caption mean the same .text.; rename or delete one",
    ),
    "unknown split": (
        "image,text,split\na.jpg,x,train\nb.jpg,y,holdout\n",
        "line 3: the split 'holdout' is unknown; write one of train, training, valid",
    ),
    "no words": (" \n,,,\n", "all cells are empty. Write a header such as image,text"),
    "header alone": ("image,text\n", "no row can be used. It has no rows"),
    "nothing left": (
        "image,text\nx.jpg,one\n,two\na.jpg,\n",
        "no row can be used. files that do not exist: 1 of 3 rows .x.jpg.; rows with text alone: 2",
    ),
    "too many cells": (
        "text,image\nred, round,a.jpg\n",
        "line 2: not CSV .3 cells, and the header has 2; put quotes around a cell with ','",
    ),
    "open quote": ('image,text\na.jpg,"x\nb.jpg,y\n', "line 3: not CSV .*fix it"),
    "two images": (
        "image,file_name,text\na.jpg,b.jpg,x\n",
        "line 2: two files of one modality, a.jpg and b.jpg; delete one",
    ),
    "above": ("image,text\n../x.jpg,x\n", "line 2: ../x.jpg is outside the folder; move the file"),
    "above, by Windows": ("image,text\n..\\x.jpg,x\n", "x.jpg is outside the folder"),
    "absolute": ("image,text\n/etc/x.jpg,x\n", "/etc/x.jpg is outside the folder"),
    "a drive": ("image,text\nC:\\x.jpg,x\n", "is outside the folder"),
    "a link": ("image,text\nlink.jpg,x\n", "link.jpg is outside the folder"),
    "a linked folder": ("image,text\nlinked/x.jpg,x\n", "linked/x.jpg is outside the folder"),
}
JSON_MISTAKES = {
    "a list": (
        '{"image": "a.jpg", "text": "x"}\n[1]\n',
        "line 2: not JSON such as .*not an object",
    ),
    "not json": ("{image: a.jpg}\n", "line 1: not JSON such as"),
    "a text of another kind": (
        '{"image": "a.jpg", "text": ["x"]}\n',
        '"text" is ."x".; write a text',
    ),
    "no column": ('{"image": "a.jpg"}\n', "no column of captions.* Found: image"),
}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("metadata.csv", *mistake) for mistake in MISTAKES.values()]
    + [("metadata.jsonl", *mistake) for mistake in JSON_MISTAKES.values()],
    ids=[*MISTAKES, *JSON_MISTAKES],
)
def test_mistakes_are_refused_with_a_fix(tmp_path, name, text, message):
    folder = tmp_path / "data"
    write(folder, {name: text, **IMAGES})
    write(tmp_path, {"x.jpg": "", "elsewhere/x.jpg": ""})
    (folder / "link.jpg").symlink_to(tmp_path / "x.jpg")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"^--data {folder}/{name}.*{message}"):
        read_captions(folder)


def test_links_inside_the_folder_are_followed(tmp_path):
    write(tmp_path, {"metadata.csv": "image,text\nlink.jpg,x\n", **IMAGES})
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    assert read(tmp_path)[1] == [("link.jpg", "x")]
