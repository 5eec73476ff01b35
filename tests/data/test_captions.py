"""Captions: each form of folder, the split, and every mistake with its mend. Files stand in for images: none is opened."""

import json
from pathlib import Path

import pytest

from nanods.data.captions import read_captions
from nanods.errors import UserError


def write(folder, files):
    """{name: text or bytes} -> files in `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def coco(rows, images=None):
    """[(image, caption)] -> COCO's JSON, whose ids are not in the images' order."""
    names = sorted({name for name, _ in rows}) if images is None else images
    number = {name: 1000 - i for i, name in enumerate(names)}
    return json.dumps({
        "info": {}, "images": [{"id": number[name], "file_name": name} for name in names],
        "annotations": [{"id": i, "image_id": number[name], "caption": text} for i, (name, text) in enumerate(rows)],
    })  # fmt: skip


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


def within(folder, files=FILES):
    return {f"{folder}/{name}": data for name, data in files.items()}


def everything(folder):
    """The rows of both sides, and the modality."""
    modality, train, held_out = read_captions(folder)
    return modality, train + held_out


class TestForms:
    @pytest.mark.parametrize("place", ["Images", "Flicker8k_Dataset", "flickr30k-images", "."])
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("Flickr8k.token.txt", TOKENS),
            ("results_20130124.token", TOKENS.replace("\n", "\r\n\r\n")),
            ("captions.txt", CSV.replace("\n", "\n\n")),
            (
                "captions.txt",
                "\ufeff" + CSV.replace("\n", "\r\n").replace('"', ""),
            ),  # a comma that nothing encloses
        ],
    )
    def test_flickr(self, tmp_path, place, name, text):
        write(
            tmp_path, {name: text, "Flickr8k.lemma.token.txt": "b.jpg#0\tdog .\n", **within(place)}
        )
        if name == "captions.txt":
            (tmp_path / "Flickr8k.lemma.token.txt").unlink()
        modality, rows = everything(tmp_path)
        assert modality == "image" and names(rows) == ROWS
        assert {path.parent for path, _ in rows} == {tmp_path / place}

    def test_a_csv_beside_the_lemmas_alone(self, tmp_path):
        write(
            tmp_path, {"captions.txt": CSV, "Flickr8k.lemma.token.txt": "b.jpg#0\tdog .\n", **FILES}
        )
        assert names(everything(tmp_path)[1]) == ROWS

    @pytest.mark.parametrize("annotations", ["annotations", "."])
    @pytest.mark.parametrize(
        ("train", "val"), [("train2017", "val2017"), ("images", "images"), (".", ".")]
    )
    def test_coco(self, tmp_path, annotations, train, val):
        write(tmp_path, {f"{annotations}/captions_train2017.json": coco(ROWS), **within(train)})
        write(
            tmp_path,
            {
                f"{annotations}/captions_val2017.json": coco([("d.jpg", " two\nlines ")]),
                f"{val}/d.jpg": "",
            },
        )
        modality, rows, held_out = read_captions(tmp_path)
        assert (
            modality == "image"
            and names(rows) == ROWS
            and names(held_out) == [("d.jpg", "two lines")]
        )
        assert (
            rows[0][0] == tmp_path / train / "b.jpg" and held_out[0][0] == tmp_path / val / "d.jpg"
        )

    def test_the_folder_of_the_file_is_looked_in_first(self, tmp_path):
        write(
            tmp_path,
            {
                "annotations/captions_mine.json": coco(ROWS),
                **FILES,
                "mine/b.jpg": "",
                "images/a.jpg": "",
            },
        )
        found = {path for path, _ in everything(tmp_path)[1]}
        assert found == {tmp_path / "mine/b.jpg", tmp_path / "images/a.jpg", tmp_path / "c.png"}

    def test_what_the_val_file_shows_is_not_trained_on(self, tmp_path):
        write(
            tmp_path,
            {
                "captions_train.json": coco(ROWS),
                "captions_val.json": coco([("b.jpg", "other")]),
                **FILES,
            },
        )
        _, train, held_out = read_captions(tmp_path)
        assert names(train) == [ROWS[1], ROWS[3]] and names(held_out) == [("b.jpg", "other")]

    def test_a_val_file_alone_is_split_as_any_other(self, tmp_path):
        rows = [(f"{i}.jpg", "x") for i in range(200)]
        write(
            tmp_path,
            {"captions_val2017.json": coco(rows), **dict.fromkeys((name for name, _ in rows), "")},
        )
        _, train, held_out = read_captions(tmp_path)
        assert len(train) > 150 and len(held_out) > 1

    def test_json_that_utf8_and_padding_cannot_bear(self, tmp_path):
        write(tmp_path, {"captions_a.json": coco([("a.jpg", "x\ud800\0y")]), **FILES})
        assert names(everything(tmp_path)[1]) == [("a.jpg", "x? y")]

    @pytest.mark.parametrize("place", ["wavs", "."])
    def test_ljspeech(self, tmp_path, place):
        text = 'LJ-1|In 1950, "he"|In nineteen fifty, "he"\r\nLJ-2|plain\nLJ-3|the first|\n'
        write(
            tmp_path,
            {
                "metadata.csv": text,
                **within(place, dict.fromkeys(["LJ-1.wav", "LJ-2.wav", "LJ-3.wav"], "")),
            },
        )
        modality, rows = everything(tmp_path)
        assert modality == "audio" and {path.parent for path, _ in rows} == {tmp_path / place}
        assert sorted(names(rows)) == [
            ("LJ-1.wav", 'In nineteen fifty, "he"'), ("LJ-2.wav", "plain"), ("LJ-3.wav", "the first"),
        ]  # fmt: skip

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
        modality, rows = everything(tmp_path)
        assert modality == "audio" and names(rows) == [
            ("a.1.wav", "noise"),
            ("b.wav", "up and down"),
        ]


class TestSplit:
    ROWS = [(f"{i % 400}.jpg", f"{i}") for i in range(800)]  # noqa: RUF012  each image has two captions

    def sides(self, folder, rows):
        write(folder, {"x.token": "".join(f"{name}#0\t{text}\n" for name, text in rows)})
        write(folder, dict.fromkeys((name for name, _ in rows), ""))
        _, train, held_out = read_captions(folder)
        return [{path.name for path, _ in side} for side in (train, held_out)], len(train) + len(
            held_out
        )

    def test_a_twentieth_with_all_captions(self, tmp_path):
        (train, held_out), total = self.sides(tmp_path, self.ROWS)
        assert not train & held_out and len(train | held_out) == 400 and total == 800
        assert (
            len(held_out) == 12 and min(held_out) == "115.jpg"
        )  # it stays so: runs are pair_weights by it

    def test_neither_order_nor_company_changes_a_side(self, tmp_path):
        (_, whole), _ = self.sides(tmp_path / "whole", self.ROWS)
        (train, held_out), _ = self.sides(tmp_path / "part", self.ROWS[700:300:-3])
        assert held_out and held_out == whole & (train | held_out)


def mistakes():
    good = {"captions_train.json": coco(ROWS), **FILES}
    wanted = r'expected \{"images"'
    json_of = lambda **parts: json.dumps({**json.loads(coco(ROWS)), **parts})  # noqa: E731
    four = "".join(f"{name}.jpg#0\tx\n" for name in "pqrs")
    return {
        "nothing": ({"readme.md": "x"}, "no captions are in it; expected annotations/captions_.*NAME.txt"),
        "cut off json": ({**good, "captions_train.json": coco(ROWS)[:-9]}, f"captions_train.json: not COCO.*{wanted}"),
        "a list": ({**good, "captions_train.json": "[]"}, f"not COCO's captions .TypeError.*{wanted}"),
        "deep": ({"captions_a.json": "[" * 100_000}, f"not COCO's captions .RecursionError.*{wanted}"),
        "no images": ({"captions_a.json": json_of(images=[])}, f"not COCO's captions .KeyError: 999.*{wanted}"),
        "no key": ({"captions_a.json": json_of(annotations=[{"caption": "x"}])}, "KeyError: 'image_id'"),
        "a number": ({"captions_a.json": json_of(annotations=[{"image_id": 1000, "caption": 5}])}, "is not text"),
        "a null": ({"captions_a.json": json_of(images=[{"id": 1, "file_name": None}], annotations=[
            {"image_id": 1, "caption": "x"}])}, "a file's name is not text"),
        "no rows": ({"captions_a.json": json_of(annotations=[])}, "captions_a.json: no captions are in it; fetch it again"),
        "no words": ({"x.token": TOKENS + "a.jpg#4\t \nb.jpg#4\t\n", **FILES},
                     r"x.token: captions without a word: 2 \(a.jpg, b.jpg\); write or delete them"),
        "no words in csv": ({"captions.txt": CSV + "a.jpg\n", **FILES}, r"captions without a word: 1 \(a.jpg\)"),
        "missing": ({"x.token": TOKENS + four, **within("Images")},
                    r"do not exist: 4 of 7 \(p.jpg, q.jpg, r.jpg, ...\); looked in .*Images and [^ ]*: put them there"),
        "missing sound": ({"metadata.csv": "a|b\nc|d", "wavs/a.wav": ""}, r"do not exist: 1 of 2 \(c.wav\); looked in .*wavs and"),
        "missing, named strangely": ({"captions_a.json": coco([("\0" * 9000, "x")])}, "do not exist: 1 of 1"),
        "no tab": ({"x.token": "a.jpg#0\tx\n\na.jpg#1 y\n", **FILES}, "line 3: not IMAGE.jpg#0<TAB>CAPTION: 'a.jpg#1 y'; fix or delete it"),
        "no bar": ({"metadata.csv": "a,b\n"}, "line 1: not ID.TEXT.NORMALISED TEXT: 'a,b'; fix or delete it"),
        "blank": ({"metadata.csv": "\n\n"}, "metadata.csv: no captions are in it"),
        "empty": ({"captions.txt": ""}, "captions.txt: the file is empty"),
        "header alone": ({"captions.txt": "image,caption\n"}, "captions.txt: no captions are in it"),
        "no header": ({"captions.txt": "a.jpg,x\n", **FILES}, "line 1: not CSV.*expected the header image,caption.; fix it"),
        "open quote": ({"captions.txt": CSV + 'a.jpg,"x\n' + "b.jpg,y\n" * 3, **FILES}, "line 9: not CSV .*end of data"),
        "not utf-8": ({"x.token": b"a.jpg#0\tcaf\xe9\n", **FILES}, "x.token: not UTF-8.*iconv"),
        "binary": ({"captions_a.json": b"\x1f\x8b\0\0"}, "captions_a.json: a binary file"),
        "no transcript": ({"a.wav": "", "b.wav": "", "a.txt": "x"},
                          r"without a transcript beside them: 1 of 2 \(b.wav\); write what is said in b.wav to b.txt"),
        "blank transcript": ({"a.wav": "", "a.txt": " \n"}, r"captions without a word: 1 \(a.wav\)"),
        "a folder for a file": ({"captions_a.json/x": ""}, "captions_a.json: cannot be read .Is a directory"),
    }  # fmt: skip


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
