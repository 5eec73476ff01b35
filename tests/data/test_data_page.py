"""The examples of docs/DATA.md can be read as they stand there."""

import json
import re
from pathlib import Path

from nanods.data.captions import read_captions
from nanods.data.sources import plan, validation_text

PAGE = (Path(__file__).parents[2] / "docs" / "DATA.md").read_text(encoding="utf-8")


def example(beginning):
    """Return the first example after the paragraph that begins so."""
    after = PAGE[PAGE.index(f"\n{beginning}") :]
    return re.search(r"\n```\n(.*?)\n```", after, re.DOTALL)[1]


def two_columns(text):
    """Return what stands left and what stands right in an example's first three lines."""
    pairs = [re.split(r" {6,}|$", line, maxsplit=1) for line in text.split("\n")[:3]]
    return ["\n".join(filter(None, column)) + "\n" for column in zip(*pairs, strict=True)]


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def captions_of(folder):
    read = read_captions(folder)
    return sorted(caption for _, caption in read.train + read.held_out)


def test_the_tables_of_texts_hold_the_same_texts(tmp_path):
    left, right = two_columns(example("A table of two texts"))
    write(tmp_path / "left.csv", left)
    write(tmp_path / "right.jsonl", right)
    (csv, _), (jsonl, _) = (validation_text(str(tmp_path / n)) for n in ("left.csv", "right.jsonl"))
    assert csv == "Good, and cheap.\nIt broke in a day.\n" == jsonl


def test_the_folder_of_texts_is_split_as_it_says(tmp_path):
    for line in example("A table of two texts").split("\n\n")[1].split("\n"):
        write(tmp_path / line.split()[0], "a line\n" * 99)
    planned = plan(str(tmp_path / "novels"), 0.1)
    assert planned.validation == "valid/persuasion.txt, by name"
    assert [Path(part.path).name for part in planned.shards["train-00000.bin"]] == ["emma.txt"]
    assert "left out: 1 .jpg" in " ".join(planned.notices)


def test_the_sounds_and_transcripts(tmp_path):
    for name in example("**Sounds and transcripts**").split():
        write(tmp_path / name, "left" if name.endswith(".txt") else "")
    assert captions_of(tmp_path / "words") == ["left"] * 3


def test_the_two_forms_of_flickr_hold_the_same_captions(tmp_path):
    table, token = two_columns(example("**Flickr8k, Flickr30k**"))
    write(tmp_path / "table/captions.csv", table)
    write(tmp_path / "token/results.token", token.replace("  ", "\t"))
    for folder in ("table", "token"):
        for name in ("1000268201.jpg", "1001773457.jpg"):
            write(tmp_path / folder / "Images" / name)
    two = ["A child in a pink dress.", "A girl goes into a house."]
    assert captions_of(tmp_path / "table") == two
    assert captions_of(tmp_path / "token") == [*two, "Two dogs meet on a road."]


def test_ljspeech(tmp_path):
    write(tmp_path / "metadata.csv", example("**LJSpeech**"))
    for number in (1, 2, 3):
        write(tmp_path / f"wavs/LJ001-000{number}.wav")
    assert "Printing, in fourteen fifty-five" in captions_of(tmp_path)


def test_coco(tmp_path):
    text = example("**COCO**")
    write(tmp_path / "annotations/captions_val2017.json", text)
    write(tmp_path / "val2017" / json.loads(text)["images"][0]["file_name"])
    assert captions_of(tmp_path) == ["Lunch.", "Some food in boxes."]


def test_the_folders_of_classes(tmp_path):
    for name in example("**Folders of classes**").split("\n"):
        write(tmp_path / name)
    assert captions_of(tmp_path / "animals") == ["cat", "cat", "dog", "dog"]
    assert captions_of(tmp_path / "animals/train") == ["cat", "dog"]  # train/ may be left out


def test_the_table(tmp_path):
    write(tmp_path / "metadata.csv", example("**A table**"))
    for name in ("img/kite.jpg", "wav/kite.wav", "img/dog.jpg"):
        write(tmp_path / name)
    read = read_captions(tmp_path)
    assert read.modalities == ("text", "image", "audio")
    assert [caption for _, caption in read.train] == ["a red kite, over the sea"]
    assert [(item.audio, caption) for item, caption in read.held_out] == [(None, "a dog asleep")]


def test_the_json_lines(tmp_path):
    text = example("**The same as JSON lines**")
    write(tmp_path / "metadata.jsonl", text)
    rows = [json.loads(line) for line in text.split("\n")]
    for row in rows:
        write(tmp_path / row["file_name"])
    assert captions_of(tmp_path) == sorted(row["text"] for row in rows)
