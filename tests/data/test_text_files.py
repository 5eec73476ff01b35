"""Files as they occur: byte order marks, suffixes in capitals, tables, other files beside them."""

import json

import pytest

from nanods.data.text import load_text
from nanods.errors import UserError

pytestmark = pytest.mark.usefixtures("folder")
LINES = [f"Řádek {i} 🙂\r\n" for i in range(40)]


def whole_text(data):
    return data.tokenizer.decode([*data.train[:], *data.val])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_text(folder, encoding):
    (folder / "corpus").mkdir()
    text = "".join(LINES)
    rows = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    table = "id;text\n" + "".join(f'{i};"{line}"\n' for i, line in enumerate(LINES))
    for name, content in (("a.TXT", text), ("b.jsonl", rows), ("c.csv", table), ("d.txt", text)):
        (folder / "corpus" / name).write_bytes(content.encode(encoding))
    assert whole_text(load_text("corpus/d.txt")) == text
    for name in ("b.jsonl", "c.csv"):
        data = load_text(f"corpus/{name}")
        assert whole_text(data) == text and 0 < len(data.val) < len(data.train)
    lines = whole_text(load_text("corpus")).split("\n")
    assert sorted(lines) == sorted((4 * text).split("\n"))


def test_files_that_are_left_out_are_counted(folder):
    (folder / "corpus" / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.Txt", "c.md", "d.md", "e.py", "LICENSE", ".git/f.txt"):
        (folder / "corpus" / name).write_text("A line.\n" * 30)
    (folder / "corpus" / "labels.csv").write_text("id,label\n1,x\n")
    data = load_text("corpus")
    assert data.notices[0].startswith("files in corpus that are left out: 2 .md, ")
    assert all(word in data.notices[0] for word in ("1 .py", "1 .csv", "1 without a suffix"))
    assert whole_text(data) == "A line.\n" * 60
    for name in ("a.txt", "b.Txt"):
        (folder / "corpus" / name).unlink()
    with pytest.raises(UserError, match=r"no text in it to read.*left out: 2 \.md, "):
        load_text("corpus")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n1,x\n", "no column called text, only id, body"),
        ("a.jsonl", "", "every file is empty"),
        ("a.csv", "text\n", "every file is empty"),
        ("a.jsonl", '{"text": "a"}\n' * 9 + "{", r"a\.jsonl: the line at byte 126 is no JSON"),
    ],
)
def test_single_files_that_cannot_be_read(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_text(name)


def test_another_format_is_learnt_from_and_named(folder):
    (folder / "data.json").write_text(json.dumps([{"text": line} for line in LINES]))
    assert "data.json looks like JSON" in load_text("data.json").notices[0]
