"""Where validation text comes from: by name, --val-data, or whole documents that are held out."""

import json
from pathlib import Path

import pytest

from nanods.data import sources
from nanods.data.text import load_text
from nanods.errors import UserError

pytestmark = pytest.mark.usefixtures("folder")
REVIEWS = [f"Review {i}: I liked it {i} times, and my cat {i * i} times." for i in range(60)]


def write(files):
    for name, content in files.items():
        path = Path("corpus") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def texts(data):
    return data.tokenizer.decode(data.train[:]), data.tokenizer.decode(data.val)


def check_documents(data, documents):
    """Check that each document is whole in exactly one split; return how many are held out."""
    train, val = (text.splitlines() for text in texts(data))
    assert sorted([*train, *val]) == sorted(documents) and train and val
    return len(val)


@pytest.mark.parametrize(("number", "held"), [(2, 1), (3, 1), (5, 1), (9, 3), (12, 3), (60, 6)])
def test_of_one_line_files_some_are_held_out_whole(number, held):
    write({f"pos/{i}.txt": text for i, text in enumerate(REVIEWS[:number])})
    data = load_text("corpus")
    assert check_documents(data, REVIEWS[:number]) in (held, held + 1)
    assert f"of {number} files, chosen by a hash of their names" in data.validation


@pytest.mark.parametrize("number", [2, 3, 12])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_of_few_long_documents_some_are_held_out_whole(number, suffix):
    documents = [f"{i} " + "very long " * 300 for i in range(number)]
    rows = {
        ".txt": documents,
        ".jsonl": [json.dumps({"text": text}) for text in documents],
        ".csv": ["text,label", *(f'"{text}",1' for text in documents)],
    }
    write({"a" + suffix: "\n".join(rows[suffix]) + "\n"})
    data = load_text("corpus")
    assert check_documents(data, documents) == max(1, min(3, number // 3))
    assert ("the end of" in data.validation) == (number == 2)


def test_many_short_files_of_several_lines_are_held_out_whole():
    files = {f"{i}.txt": f"{text}\nIt ends here.\n" for i, text in enumerate(REVIEWS)}
    write(files)
    val = texts(load_text("corpus"))[1]
    assert 3 <= sum(content in val for content in files.values()) == val.count("\n") / 2 <= 9


def test_a_long_file_is_held_out_in_stretches_all_over_it(monkeypatch):
    monkeypatch.setattr(sources, "STRETCH", 200)
    articles = [f"Line {i} of the articles.\n" for i in range(700)]
    code = [f"x{i} = {i}\n" for i in range(100)]
    write({"a.txt": "".join(articles + code)})
    data = load_text("corpus")
    val = texts(data)[1]
    assert data.validation == "9 stretches, evenly spread, of a.txt"
    assert (
        val.count("Line") > 40 and 0.08 < data.val_bytes / (data.val_bytes + len(data.train)) < 0.12
    )


def test_a_huge_file_beside_small_ones_does_not_take_them_all():
    write({"huge.txt": "A line of the long text.\n" * 4000})
    write({f"{i}.txt": text for i, text in enumerate(REVIEWS[:10])})
    train, val = texts(load_text("corpus"))
    assert "Review" in train and val.count("A line") in range(380, 401)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ({"a.txt": "ACGT" * 3000}, r"--val-data FILE, or --data corpus/a\.txt"),
        ({"a.jsonl": '{"text": "one document"}'}, "--val-data FILE$"),
    ],
)
def test_a_single_document_is_refused_with_advice_that_helps(files, advice):
    write(files)
    with pytest.raises(UserError, match=f"a single document.*{advice}"):
        load_text("corpus")
    Path("val.txt").write_text("Another text.\n")
    assert texts(load_text("corpus", val_data="val.txt"))[1] == "Another text.\n"


def test_a_text_file_of_one_line_is_split():
    Path("dna.txt").write_text("ACGT" * 3000)
    assert texts(load_text("dna.txt")) == ("ACGT" * 2700, "ACGT" * 300)


# ---- by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.txt", "wiki.VAL.TXT", "wiki.test.txt"),
        ("train/a.txt", "dev/b.txt", "test/c.txt"),
        ("train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl", "test.jsonl"),
        ("book.txt", "validation.txt", "test.txt"),
    ],
)
def test_splits_by_name(train, val, test, capsys):
    contents = [text + "\n" for text in REVIEWS[:3]]
    if train.endswith(".jsonl"):
        contents = [json.dumps({"text": text}) + "\n" for text in contents]
    write(dict(zip((train, val, test), contents, strict=True)))
    data = load_text("corpus")
    assert texts(data) == (REVIEWS[0] + "\n", REVIEWS[1] + "\n")
    assert data.validation == f"{val}, by name"
    assert f"{test} left out: by name a test split" in data.notices
    assert test in capsys.readouterr().out  # before the shards are made
    assert load_text("corpus").notices == data.notices  # and again from the finished shards


def test_a_test_split_is_left_out_where_there_is_no_validation_split():
    write({"train.txt": "".join(text + "\n" for text in REVIEWS), "test.txt": "a test\n"})
    data = load_text("corpus")
    assert check_documents(data, REVIEWS) > 3 and "end of train.txt" in data.validation


@pytest.mark.parametrize("names", [("test.txt", "contest.txt"), ("valid.txt", "test.txt")])
def test_names_count_only_if_they_leave_a_training_split(names):
    write(dict(zip(names, ("one\n" * 50, "two\n" * 50), strict=True)))
    data = load_text("corpus")
    assert all(word in text for text in texts(data) for word in ("one", "two"))
    assert not data.notices


# ---- --val-data, --val-fraction ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["corpus", "text.txt"])
def test_val_data_is_the_validation_text_and_all_else_trains(name):
    write({"a.txt": "".join(text + "\n" for text in REVIEWS), "valid.txt": "not this\n"})
    Path("text.txt").write_text("".join(text + "\n" for text in REVIEWS))
    Path("other.txt").write_bytes("\ufeffžlutý\r\n".encode())
    data = load_text(name, val_data="other.txt")
    assert texts(data) == (Path("text.txt").read_text(), "žlutý\r\n")
    assert data.validation == "other.txt" and data.val_bytes == len("žlutý\r\n".encode())
    Path("other.txt").write_text("changed")
    hashes = {data.sha256, load_text(name).sha256, load_text(name, val_data="other.txt").sha256}
    assert len(hashes) == 3  # so that --resume notices another validation text


def test_val_data_may_be_a_folder_or_a_table():
    Path("text.txt").write_text("Training.\n" * 9)
    write({"b.txt": "b\n", "a.csv": "id;text\n1;a\n"})
    assert texts(load_text("text.txt", val_data="corpus"))[1] == "a\nb\n"
    write({"dev.jsonl": '{"text": "c"}\n'})
    data = load_text("text.txt", val_data="corpus")
    assert texts(data)[1] == "c\n" and data.validation == "dev.jsonl in corpus"
    assert texts(load_text("text.txt", val_data="corpus/a.csv"))[1] == "a\n"


@pytest.mark.parametrize(
    ("val_data", "message"),
    [
        ("text.txt", "the same as --data"),
        ("nowhere", "neither a file nor"),
        ("empty.txt", "^--val-data empty.txt: the file is empty"),
        ("corpus", "^--val-data corpus/a.jsonl: the line at byte 0"),
    ],
)
def test_val_data_that_cannot_be_used(val_data, message):
    Path("text.txt").write_text("Training.\n" * 9)
    Path("empty.txt").touch()
    write({"a.jsonl": "{"})
    with pytest.raises(UserError, match=message):
        load_text("text.txt", val_data=val_data)


def test_val_fraction():
    Path("text.txt").write_text("x" * 1000)
    data = load_text("text.txt", val_fraction=0.25)
    assert (len(data.train), len(data.val)) == (750, 250) and "last 25%" in data.validation
    write({"a.txt": "".join(text + "\n" for text in REVIEWS)})
    assert check_documents(load_text("corpus", val_fraction=0.5), REVIEWS) in range(29, 32)
