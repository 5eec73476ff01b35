"""Captions: each form of folder, the split, and each mistake.

The images are empty files: none is opened.
"""

import json
from pathlib import Path

import pytest

from nanods.data.captions import hold_out_folder, read_captions
from nanods.errors import UserError


def write(folder, files):
    """Write {name: text or bytes} as files in `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def coco(rows):
    """Return the JSON of rows (image, caption). The order of its ids is not that of the images."""
    image_names = sorted({name for name, _ in rows})
    image_id = {name: 1000 - i for i, name in enumerate(image_names)}
    return json.dumps(
        {
            "info": {},
            "images": [{"id": image_id[name], "file_name": name} for name in image_names],
            "annotations": [
                {"id": i, "image_id": image_id[name], "caption": text}
                for i, (name, text) in enumerate(rows)
            ],
        }
    )


def names(rows):
    return [(path.name, caption) for path, caption in rows]


ROWS = [
    ("b.jpg", "A dog ."),
    ("a.jpg", "a cat, asleep"),
    ("b.jpg", "dog again"),
    ("c.png", "naïve café"),
]
FILES = {"a.jpg": "", "b.jpg": "", "c.png": ""}
TOKENS = "".join(f"{name}#{i}\t{caption}\n" for i, (name, caption) in enumerate(ROWS))
CSV = 'image,caption\nb.jpg,A dog .\na.jpg,"a cat, asleep"\nb.jpg,dog again\nc.png,naïve café\n'


def in_folder(folder, files=FILES):
    return {f"{folder}/{name}": data for name, data in files.items()}


def read_all_rows(folder):
    """Return the modality beside text, and the rows (path, caption), training and held out."""
    read = read_captions(folder)
    assert read.modalities[0] == "text" and len(read.modalities) == 2
    rows = read.train + read.held_out
    assert all(len(item.files) == 1 for item, _ in rows)
    return read.modalities[1], [(item.files[0], caption) for item, caption in rows]


class TestForms:
    @pytest.mark.parametrize("subfolder", ["Images", "Flicker8k_Dataset", "flickr30k-images", "."])
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("Flickr8k.token.txt", TOKENS),
            ("results_20130124.token", TOKENS.replace("\n", "\r\n\r\n")),
            ("captions.txt", CSV.replace("\n", "\n\n")),
            # A caption with a comma but without quotes.
            ("captions.txt", "\ufeff" + CSV.replace("\n", "\r\n").replace('"', "")),
        ],
    )
    def test_flickr(self, tmp_path, subfolder, name, text):
        write(tmp_path, {name: text, **in_folder(subfolder)})
        if name != "captions.txt":
            write(tmp_path, {"Flickr8k.lemma.token.txt": "b.jpg#0\tdog .\n"})
        modality, rows = read_all_rows(tmp_path)
        assert modality == "image" and names(rows) == ROWS
        assert {path.parent for path, _ in rows} == {tmp_path / subfolder}

    def test_a_csv_is_read_if_only_a_lemma_file_is_beside_it(self, tmp_path):
        write(
            tmp_path, {"captions.txt": CSV, "Flickr8k.lemma.token.txt": "b.jpg#0\tdog .\n", **FILES}
        )
        assert names(read_all_rows(tmp_path)[1]) == ROWS

    @pytest.mark.parametrize("annotations", ["annotations", "."])
    @pytest.mark.parametrize(
        ("train", "val"), [("train2017", "val2017"), ("images", "images"), (".", ".")]
    )
    def test_coco(self, tmp_path, annotations, train, val):
        write(tmp_path, {f"{annotations}/captions_train2017.json": coco(ROWS), **in_folder(train)})
        write(
            tmp_path,
            {
                f"{annotations}/captions_val2017.json": coco([("d.jpg", " two\nlines ")]),
                f"{val}/d.jpg": "",
            },
        )
        read = read_captions(tmp_path)
        rows, held_out = read.train, read.held_out
        assert read.modalities == ("text", "image")
        assert names(rows) == ROWS
        assert names(held_out) == [("d.jpg", "two lines")]
        assert rows[0][0].image == tmp_path / train / "b.jpg"
        assert held_out[0][0].image == tmp_path / val / "d.jpg"

    def test_the_folder_named_like_the_file_is_searched_first(self, tmp_path):
        write(
            tmp_path,
            {
                "annotations/captions_mine.json": coco(ROWS),
                **FILES,
                "mine/b.jpg": "",
                "images/a.jpg": "",
            },
        )
        rows = read_all_rows(tmp_path)[1]
        paths = {path for path, _ in rows}
        assert paths == {tmp_path / "mine/b.jpg", tmp_path / "images/a.jpg", tmp_path / "c.png"}
        assert names(rows) == ROWS  # in the order of the captions, not of the folders

    def test_images_of_the_val_file_are_not_in_the_training_rows(self, tmp_path):
        write(
            tmp_path,
            {
                "captions_train.json": coco(ROWS),
                "captions_val.json": coco([("b.jpg", "other")]),
                **FILES,
            },
        )
        read = read_captions(tmp_path)
        train, held_out = read.train, read.held_out
        assert names(train) == [ROWS[1], ROWS[3]] and names(held_out) == [("b.jpg", "other")]

    def test_a_val_file_without_a_train_file_is_split(self, tmp_path):
        rows = [(f"{i}.jpg", "x") for i in range(200)]
        write(
            tmp_path,
            {"captions_val2017.json": coco(rows), **dict.fromkeys((name for name, _ in rows), "")},
        )
        read = read_captions(tmp_path)
        train, held_out = read.train, read.held_out
        assert len(train) > 150 and len(held_out) > 1

    def test_lone_surrogates_and_zero_bytes_are_replaced(self, tmp_path):
        write(tmp_path, {"captions_a.json": coco([("a.jpg", "x\ud800\0y")]), **FILES})
        assert names(read_all_rows(tmp_path)[1]) == [("a.jpg", "x? y")]

    @pytest.mark.parametrize("subfolder", ["wavs", "."])
    def test_ljspeech(self, tmp_path, subfolder):
        text = 'LJ-1|In 1950, "he"|In nineteen fifty, "he"\r\nLJ-2|plain\nLJ-3|the first|\n'
        write(
            tmp_path,
            {
                "metadata.csv": text,
                **in_folder(subfolder, dict.fromkeys(["LJ-1.wav", "LJ-2.wav", "LJ-3.wav"], "")),
            },
        )
        modality, rows = read_all_rows(tmp_path)
        assert modality == "audio" and {path.parent for path, _ in rows} == {tmp_path / subfolder}
        assert sorted(names(rows)) == [
            ("LJ-1.wav", 'In nineteen fifty, "he"'),
            ("LJ-2.wav", "plain"),
            ("LJ-3.wav", "the first"),
        ]

    def test_sounds_with_transcripts(self, tmp_path):
        write(
            tmp_path,
            {
                "b.wav": "",
                "b.txt": "\ufeffup\n and down\n",
                "a.1.wav": "",
                "a.1.txt": "noise",
                "notes.txt": "no",
            },
        )
        modality, rows = read_all_rows(tmp_path)
        assert modality == "audio" and names(rows) == [
            ("a.1.wav", "noise"),
            ("b.wav", "up and down"),
        ]


class TestNames:
    """Upper and lower case, headers of tables, and folders that occur in practice."""

    @pytest.mark.parametrize(
        "header", ["image,caption", "filename,caption", "file_name,text", " Image , Caption "]
    )
    @pytest.mark.parametrize("name", ["captions.txt", "captions.csv", "Captions.TXT"])
    @pytest.mark.parametrize("subfolder", ["images", "Images", "flickr30k_images"])
    def test_tables(self, tmp_path, header, name, subfolder):
        text = CSV.replace("image,caption", header)
        write(tmp_path, {name: text, **in_folder(subfolder)})
        modality, rows = read_all_rows(tmp_path)
        assert modality == "image" and names(rows) == ROWS
        assert {path.parent.name for path, _ in rows} == {subfolder}

    def test_other_columns_and_another_order(self, tmp_path):
        text = 'id,caption,filename,width\n1,"one, two",a.jpg,9\n2,say ""hi"",b.jpg,9\n'
        write(tmp_path, {"captions.csv": text, **FILES})
        assert names(read_all_rows(tmp_path)[1]) == [
            ("a.jpg", "one, two"),
            ("b.jpg", 'say ""hi""'),
        ]

    def test_a_table_of_sounds(self, tmp_path):
        write(tmp_path, {"captions.csv": "file_name,text\na.wav,one\n", "wavs/A.WAV": ""})
        assert read_all_rows(tmp_path) == ("audio", [(tmp_path / "wavs/A.WAV", "one")])

    def test_a_table_of_images_and_sounds(self, tmp_path):
        write(tmp_path, {"captions.txt": "file,text\na.jpg,x\na.wav,y\n", "a.jpg": "", "a.wav": ""})
        read = read_captions(tmp_path)
        assert read.modalities == ("text", "image", "audio")
        assert [(item.image is None, item.audio is None) for item, _ in read.train] == [
            (False, True),
            (True, False),
        ]
        assert read.notes[0] == "held out: 0 of 2 examples, by the hash of the file's name"

    def test_upper_case(self, tmp_path):
        write(tmp_path, {"A.WAV": "", "A.TXT": "one", "b.Wav": "", "b.txt": "two"})
        modality, rows = read_all_rows(tmp_path)
        assert modality == "audio" and names(rows) == [("A.WAV", "one"), ("b.Wav", "two")]

    def test_the_exact_name_wins_over_one_in_another_case(self, tmp_path):
        write(tmp_path, {"captions.csv": "file,text\na.jpg,x\nB.jpg,y\n"})
        write(tmp_path, {"A.jpg": "", "a.jpg": "", "b.JPG": ""})
        assert [path.name for path, _ in read_all_rows(tmp_path)[1]] == ["a.jpg", "b.JPG"]

    def test_names_with_a_subfolder(self, tmp_path):
        write(tmp_path, {"captions_a.json": coco([("x/1.jpg", "one"), ("y/1.jpg", "two")])})
        write(tmp_path, {"x/1.jpg": "", "images/y/1.jpg": ""})
        paths = [path for path, _ in read_all_rows(tmp_path)[1]]
        assert paths == [tmp_path / "x/1.jpg", tmp_path / "images/y/1.jpg"]

    def test_quotes_and_tabs_in_captions(self, tmp_path):
        text = 'a.jpg#0\tsaid "no\tyes"\nb.jpg#0\t"\'x\'"\tz\n'
        write(tmp_path / "tokens", {"x.token": text, **FILES})
        write(tmp_path / "coco", {"captions_a.json": coco([("a.jpg", 'a "b"\tc')]), **FILES})
        write(tmp_path / "csv", {"captions.txt": 'file,text\na.jpg,"a ""b""\tc, d"\n', **FILES})
        write(tmp_path / "sound", {"a.wav": "", "a.txt": 'a "b"\t\tc\n'})
        write(tmp_path / "speech", {"metadata.csv": 'a|"b"\tc', "a.wav": ""})
        expected = {
            "tokens": ['said "no yes"', "\"'x'\" z"],
            "coco": ['a "b" c'],
            "csv": ['a "b" c, d'],
            "sound": ['a "b" c'],
            "speech": ['"b" c'],
        }
        for name, captions in expected.items():
            assert [text for _, text in read_all_rows(tmp_path / name)[1]] == captions


class TestSplitsByName:
    """Each form has the files 1 to 3 for training, 4 as val and 5 as test."""

    SPLITS = (("train", "123"), ("val", "4"), ("test", "5"))

    def check(self, folder, suffix, notes):
        read = read_captions(folder)
        assert [path.name for path, _ in read.train] == [f"{i}{suffix}" for i in "123"]
        assert [path.name for path, _ in read.held_out] == [f"4{suffix}"]
        noun = "sound" if suffix == ".wav" else "image"
        assert read.notes == [
            f"held out: 1 {noun} of {notes['val']}",
            f"left out: 1 {noun} of {notes['test']}",
        ]
        assert read.modalities == ("text", "audio" if suffix == ".wav" else "image")

    @pytest.mark.parametrize("val", ["valid", "validation", "val", "dev", "VAL", "dev-clean"])
    def test_folders_of_sounds(self, tmp_path, val):
        for split, files in self.SPLITS:
            subfolder = tmp_path / {"val": val}.get(split, split)
            for i in files:
                write(subfolder, {f"{i}.wav": "", f"{i}.txt": i})
        self.check(tmp_path, ".wav", {"val": f"{val}/", "test": "test/"})

    def test_folders_with_a_table_each(self, tmp_path):
        for split, files in self.SPLITS:
            table = "image,caption\n" + "".join(f"{i}.jpg,{i}\n" for i in files)
            write(tmp_path / split, {"captions.txt": table})
            write(tmp_path / split, {f"images/{i}.jpg": "" for i in files})
        self.check(tmp_path, ".jpg", {"val": "val/", "test": "test/"})

    @pytest.mark.parametrize("subfolder", [".", "images", "split", "images/split"])
    def test_a_table_for_each(self, tmp_path, subfolder):
        for split, files in self.SPLITS:
            table = "image,caption\n" + "".join(f"{i}.jpg,{i}\n" for i in files)
            folder = subfolder.replace("split", split)
            write(tmp_path, {f"captions_{split}.csv": table})
            write(tmp_path, {f"{folder}/{i}.jpg": "" for i in files})
        self.check(tmp_path, ".jpg", {"val": "captions_val.csv", "test": "captions_test.csv"})

    @pytest.mark.parametrize("parent", ["", "images/"])
    def test_one_table_and_a_folder_of_images_for_each(self, tmp_path, parent):
        table = "image,caption\n" + "".join(f"{i}.jpg,{i}\n" for i in range(1, 6))
        write(tmp_path, {"captions.txt": table})
        for split, files in self.SPLITS:
            write(tmp_path, {f"{parent}{split}/{i}.jpg": "" for i in files})
        self.check(tmp_path, ".jpg", {"val": f"{parent}val/", "test": f"{parent}test/"})

    def test_coco(self, tmp_path):
        for split, files in self.SPLITS:
            write(tmp_path, {f"{split}2017/{i}.jpg": "" for i in files})
            text = coco([(f"{i}.jpg", i) for i in files])
            write(tmp_path, {f"annotations/captions_{split}2017.json": text})
        notes = {"val": "captions_val2017.json", "test": "captions_test2017.json"}
        self.check(tmp_path, ".jpg", notes)

    def test_ljspeech(self, tmp_path):
        for split, files in self.SPLITS:
            write(tmp_path, {f"metadata_{split}.csv": "".join(f"{i}|{i}\n" for i in files)})
            write(tmp_path, {f"wavs/{i}.wav": "" for i in files})
        self.check(tmp_path, ".wav", {"val": "metadata_val.csv", "test": "metadata_test.csv"})

    def test_tokens(self, tmp_path):
        for split, files in self.SPLITS:
            write(tmp_path, {f"{split}.token": "".join(f"{i}.jpg#0\t{i}\n" for i in files)})
            write(tmp_path, {f"{i}.jpg": "" for i in files})
        self.check(tmp_path, ".jpg", {"val": "val.token", "test": "test.token"})

    def test_without_val_a_part_of_train_is_held_out_and_test_is_not_used(self, tmp_path):
        for i in range(100):
            folder = tmp_path / ("test" if i % 2 else "train")
            write(folder, {f"{i}.wav": "", f"{i}.txt": "x"})
        read = read_captions(tmp_path)
        assert {item.audio.parent.name for item, _ in read.train + read.held_out} == {"train"}
        assert len(read.held_out) == 4 and len(read.train) == 46
        assert read.notes == [
            "held out: 4 of 50 sounds, by the hash of the file's name",
            "left out: 50 sounds of test/",
        ]

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_nothing_but_one_split_is_the_training_data(self, tmp_path, split):
        for i in range(40):
            write(tmp_path / split, {f"{i}.wav": "", f"{i}.txt": "x"})
        for folder in (tmp_path, tmp_path / split):
            read = read_captions(folder)
            assert len(read.train) == 36 and len(read.held_out) == 4
            assert read.notes == ["held out: 4 of 40 sounds, by the hash of the file's name"]

    def test_images_of_val_and_test_are_left_out_of_training(self, tmp_path):
        write(tmp_path, {"captions_train.json": coco(ROWS), **FILES})
        write(
            tmp_path, {"captions_val.json": coco(ROWS[:1]), "captions_test.json": coco(ROWS[1:2])}
        )
        read = read_captions(tmp_path)
        assert names(read.train) == [ROWS[3]] and names(read.held_out) == [ROWS[0]]
        assert read.notes[-1] == "left out of training: 2 that are in val or test too"


class TestValData:
    def test_another_folder_is_held_out_and_all_of_the_first_is_for_training(self, tmp_path):
        for name, count in (("mine", 40), ("theirs", 8)):
            for i in range(count):
                write(tmp_path / name, {f"{i}.wav": "", f"{i}.txt": "x"})
        read = hold_out_folder(read_captions(tmp_path / "mine"), tmp_path / "theirs")
        assert {item.audio.parent.name for item, _ in read.train} == {"mine"}
        assert {item.audio.parent.name for item, _ in read.held_out} == {"theirs"}
        assert len(read.train) == 40 and len(read.held_out) == 8
        assert read.notes == [f"held out: 8 sounds of {tmp_path / 'theirs'}"]

    def test_no_file_is_in_both(self, tmp_path):
        for i in range(8):
            write(tmp_path / ("val" if i < 4 else "."), {f"{i}.wav": "", f"{i}.txt": "x"})
        captions = read_captions(tmp_path / "val")
        assert not hold_out_folder(captions, tmp_path / "val").train

    def test_mistakes(self, tmp_path):
        write(tmp_path / "images", {"captions.txt": CSV, **FILES})
        write(tmp_path / "sounds", {"a.wav": "", "a.txt": "x"})
        captions = read_captions(tmp_path / "images")
        with pytest.raises(UserError, match=r"^--val-data .*nowhere: there is no such folder"):
            hold_out_folder(captions, tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"^--val-data .*it holds text and audio, and --data "):
            hold_out_folder(captions, tmp_path / "sounds")


class TestOthers:
    """Files and folders that are not read are counted and named."""

    def notes(self, folder):
        return [note for note in read_captions(folder).notes if note.startswith("not read")]

    def test_sounds(self, tmp_path):
        write(tmp_path, {"a.wav": "", "a.txt": "x", ".DS_Store": "", "._a.wav": ""})
        assert self.notes(tmp_path) == []
        write(tmp_path, {"b.mp3": "", "c.MP3": "", "c.txt": "", "old/d.wav": "", "train/e.wav": ""})
        assert self.notes(tmp_path) == [
            f"not read: 3 files (2 .mp3, 1 .txt), the first: {tmp_path / 'b.mp3'}",
            "not read: the folders old, train",
        ]

    def test_images(self, tmp_path):
        write(tmp_path, {"captions.txt": CSV, **in_folder("images"), "images/z.gif": "", "a": ""})
        assert self.notes(tmp_path) == [
            f"not read: 2 files (1 without a suffix, 1 .gif), the first: {tmp_path / 'a'}"
        ]

    def test_coco(self, tmp_path):
        write(tmp_path, {"annotations/captions_val2017.json": coco(ROWS), **in_folder("val2017")})
        write(tmp_path, {"annotations/instances_val2017.json": "{}"})
        assert self.notes(tmp_path) == []


class TestSplit:
    # Each of 400 images has two captions.
    ROWS = tuple((f"{i % 400}.jpg", f"{i}") for i in range(800))

    def splits(self, folder, rows):
        """Return the file names of the training and held-out rows, and the number of rows."""
        write(folder, {"x.token": "".join(f"{name}#0\t{text}\n" for name, text in rows)})
        write(folder, dict.fromkeys((name for name, _ in rows), ""))
        read = read_captions(folder)
        train, held_out = read.train, read.held_out
        file_names = [{path.name for path, _ in part} for part in (train, held_out)]
        return file_names, len(train) + len(held_out)

    def test_a_twentieth_is_held_out_with_all_captions(self, tmp_path):
        (train, held_out), total = self.splits(tmp_path, self.ROWS)
        assert not train & held_out and len(train | held_out) == 400 and total == 800
        # This split must not change: earlier runs are compared on it.
        assert len(held_out) == 12 and min(held_out) == "115.jpg"

    def test_a_few_are_held_out_of_a_small_folder(self, tmp_path):
        """At least four, or a quarter: the hash alone may choose none."""
        for count, expected in ((3, 0), (4, 1), (8, 2), (16, 4), (30, 4)):
            rows = [(f"x{i}.jpg", "x") for i in range(count)]
            (train, held_out), _ = self.splits(tmp_path / str(count), rows)
            assert len(held_out) == expected and len(train) == count - expected

    def test_neither_order_nor_other_files_change_the_split_of_a_file(self, tmp_path):
        (_, all_held_out), _ = self.splits(tmp_path / "all", self.ROWS)
        (train, held_out), _ = self.splits(tmp_path / "part", self.ROWS[700:300:-3])
        assert held_out and held_out == all_held_out & (train | held_out)


def annotations_json(**changes):
    """COCO's JSON of ROWS with some of its keys replaced."""
    return json.dumps({**json.loads(coco(ROWS)), **changes})


def mistakes():
    """Return name -> (files, the error message that they cause)."""
    good = {"captions_train.json": coco(ROWS), **FILES}
    expected = r'expected \{"images"'
    four_missing = "".join(f"{name}.jpg#0\tx\n" for name in "pqrs")
    null_name = annotations_json(
        images=[{"id": 1, "file_name": None}], annotations=[{"image_id": 1, "caption": "x"}]
    )
    return {
        "no captions": (
            {"readme.md": "x", "a.mp3": "", "b.MP3": ""},
            "no captions are in it; expected annotations/captions_.*NAME.txt; "
            r"it holds 3 files .2 .mp3, 1 .md.",
        ),
        "truncated json": (
            {**good, "captions_train.json": coco(ROWS)[:-9]},
            f"captions_train.json: not COCO.*{expected}",
        ),
        "a list": (
            {**good, "captions_train.json": "[]"},
            f"not COCO's captions .TypeError.*{expected}",
        ),
        "deep": (
            {"captions_a.json": "[" * 100_000},
            f"not COCO's captions .RecursionError.*{expected}",
        ),
        "no images": (
            {"captions_a.json": annotations_json(images=[])},
            f"not COCO's captions .KeyError: 999.*{expected}",
        ),
        "no key": (
            {"captions_a.json": annotations_json(annotations=[{"caption": "x"}])},
            "KeyError: 'image_id'",
        ),
        "a number": (
            {"captions_a.json": annotations_json(annotations=[{"image_id": 1000, "caption": 5}])},
            "is not text",
        ),
        "a null": ({"captions_a.json": null_name}, "a file's name is not text"),
        "no rows": (
            {"captions_a.json": annotations_json(annotations=[])},
            "captions_a.json: no captions are in it; fetch it again",
        ),
        "no words": (
            {"x.token": TOKENS + "a.jpg#4\t \nb.jpg#4\t\n", **FILES},
            r"x.token: captions without a word: 2 \(a.jpg, b.jpg\); write or delete them",
        ),
        "no words in csv": (
            {"captions.txt": CSV + "a.jpg\n", **FILES},
            r"captions without a word: 1 \(a.jpg\)",
        ),
        "missing files": (
            {"x.token": TOKENS + four_missing, **in_folder("Images")},
            r"do not exist: 4 of 7 \(p.jpg, q.jpg, r.jpg, ...\); looked in .*Images and [^ ]*: "
            "put them there",
        ),
        "missing sound": (
            {"metadata.csv": "a|b\nc|d", "wavs/a.wav": ""},
            r"do not exist: 1 of 2 \(c.wav\); looked in .*wavs and",
        ),
        "missing, with an impossible name": (
            {"captions_a.json": coco([("\0" * 9000, "x")])},
            "do not exist: 1 of 1",
        ),
        "no tab": (
            {"x.token": "a.jpg#0\tx\n\na.jpg#1 y\n", **FILES},
            "line 3: not IMAGE.jpg#0<TAB>CAPTION: 'a.jpg#1 y'; fix or delete it",
        ),
        "no bar": (
            {"metadata.csv": "a,b\n"},
            "no column of files: image, audio or file_name. Found: a, b. Write a header such as",
        ),
        "no bar in a line": (
            {"metadata.csv": "a|b\nc,d\n"},
            "line 2: not ID.TEXT.NORMALISED TEXT: 'c,d'; fix or delete it",
        ),
        "blank": ({"metadata.csv": "\n\n"}, "metadata.csv: no captions are in it"),
        "empty": ({"captions.txt": ""}, "captions.txt: the file is empty"),
        "header alone": (
            {"captions.txt": "image,caption\n"},
            "captions.txt: no captions are in it",
        ),
        "no header": (
            {"captions.txt": "a.jpg,x\n", **FILES},
            "line 1: not CSV.*expected a header such as image,caption.*; fix it",
        ),
        "too few columns": (
            {"captions.txt": "id,image,caption,length\n1,a.jpg,x,1\n2,b.jpg\n", **FILES},
            "line 3: not CSV.*2 columns, and the header has 4",
        ),
        "one name in two splits": (
            {"captions.txt": "image,caption\na.jpg,x\n", "train/a.jpg": "", "val/a.jpg": ""},
            "a.jpg is in train and in val: write train/a.jpg, or captions_train.csv and",
        ),
        "open quote": (
            {"captions.txt": CSV + 'a.jpg,"x\n' + "b.jpg,y\n" * 3, **FILES},
            "line 9: not CSV .*end of data",
        ),
        "not utf-8": ({"x.token": b"a.jpg#0\tcaf\xe9\n", **FILES}, "x.token: not UTF-8.*iconv"),
        "binary": ({"captions_a.json": b"\x1f\x8b\0\0"}, "captions_a.json: .*a gzip archive"),
        "no transcript": (
            {"a.wav": "", "b.wav": "", "a.txt": "x"},
            r"without a transcript beside them: 1 of 2 \(b.wav\); "
            "write what is said in b.wav to b.txt",
        ),
        "blank transcript": (
            {"a.wav": "", "a.txt": " \n"},
            r"captions without a word: 1 \(a.wav\)",
        ),
        "a folder instead of a file": (
            {"captions_a.json/x": ""},
            "captions_a.json: cannot be read .Is a directory",
        ),
    }


class TestMistakes:
    @pytest.mark.parametrize(("files", "message"), mistakes().values(), ids=mistakes())
    def test_in_a_folder(self, tmp_path, files, message):
        write(tmp_path, files)
        with pytest.raises(UserError, match=f"^--data {tmp_path}.*{message}"):
            read_captions(tmp_path)

    def test_no_folder(self, tmp_path):
        write(tmp_path, {"file": ""})
        for path in (Path("nowhere"), tmp_path / "file"):
            with pytest.raises(UserError, match="there is no such folder; give one"):
                read_captions(path)
