"""Sources: each line and row is in one part, FineWeb-Edu is streamed once, and each mistake."""

import builtins
import itertools
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.data import sources
from nanods.data.documents import Part, documents
from nanods.data.text import load_text
from nanods.errors import UserError
from tests.data.test_shards import DOCUMENTS, record_shards

pytestmark = pytest.mark.usefixtures("folder")


@given(size=st.integers(1, 400), ends=st.booleans())
@settings(max_examples=40, deadline=None)
def test_parts_of_any_size_have_each_line_once(tmp_path_factory, size, ends):
    path = tmp_path_factory.mktemp("slices") / "a.txt"
    text = "ž\n\nlonger than a slice of few bytes\nb\r\nc" + "\n" * ends
    path.write_bytes(text.encode())
    cuts = [*range(0, len(text.encode()), size), len(text.encode())]
    parts = [Part(str(path), a, b) for a, b in itertools.pairwise(cuts)]
    assert "".join(documents(parts)) == text + "\n" * (not ends)


def test_parquet_rows_are_each_in_one_shard(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "rows").mkdir()
    table = pyarrow.table({"id": range(100), "text": [*DOCUMENTS[:50], None, *DOCUMENTS[51:]]})
    parquet.write_table(table, folder / "rows" / "a.parquet", row_group_size=30)
    data = load_text("rows")
    with_newline = [text if text.endswith("\n") else text + "\n" for text in DOCUMENTS]
    assert len(data.train.parts) > 1
    assert data.tokenizer.decode(data.train[:]) == "".join(with_newline[:50] + with_newline[51:90])
    assert data.tokenizer.decode(data.val) == "".join(with_newline[90:])


def test_lone_surrogates_become_question_marks(folder):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.jsonl").write_text('{"text": "a\\ud800b"}\n' * 40)
    assert load_text("corpus").tokenizer.decode(load_text("corpus").train[:8]) == "a?b\na?b\n"


class Streaming(list):
    """The parts of IterableDataset that documents.py uses: `num_shards` files of rows."""

    num_shards = property(len)

    def shard(self, num_shards, index):
        assert num_shards == len(self)
        for row in self[index]:
            if row is None:
                raise ConnectionError("reset by peer")
            yield {"text": row, "id": "x"}


def test_fineweb_is_streamed_once(monkeypatch):
    files = Streaming([[f"page {f}.{i} " + "x" * 40 for i in range(30)] for f in range(3)])
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return files

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(sources, "HELD_OUT", 300)
    files[2].insert(20, None)
    message = r"ConnectionError: reset by peer.*network.*finished shards are kept"
    with pytest.raises(UserError, match=message):
        load_text("fineweb-edu")
    del files[2][20]
    names = record_shards(monkeypatch)
    data = load_text("fineweb-edu")
    assert names == ["train-00002.bin", "validation.bin"]
    val = "".join(page + "\n" for file in files for page in file[:3])
    train = "".join(page + "\n" for file in files for page in file[3:])
    assert data.tokenizer.decode(data.val) == val
    assert data.tokenizer.decode(data.train[:]) == train
    assert set(map(str, calls)) == {
        "(('HuggingFaceFW/fineweb-edu', 'sample-10BT'), {'split': 'train', 'streaming': True})"
    }
    again = SimpleNamespace(load_dataset=lambda *args, **kwargs: pytest.fail("streamed again"))
    monkeypatch.setitem(sys.modules, "datasets", again)
    assert load_text("fineweb-edu").sha256 == data.sha256
    assert load_text("fineweb-edu", val_fraction=0.2).sha256 == data.sha256


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "a.txt",
            b"abc\n" * 500 + b"sch\xf6n\n" + b"abc\n" * 500,
            r"a\.txt: not UTF-8 .byte 0xf6 at 2,003.*iconv",
        ),
        (
            "a.txt",
            b"abc\n" * 500 + b"\0\n" + b"abc\n" * 500,
            r"a\.txt: a binary file .a zero byte at 2,000",
        ),
        (
            "a.jsonl",
            b'{"text": "abc"}\n' * 200 + b"{\n",
            r"a\.jsonl: the line at byte 3,200 is no JSON object.*fix or delete",
        ),
        ("a.jsonl", b'{"body": "abc"}\n', r'no JSON object with a string "text" .KeyError'),
        ("a.jsonl", b'{"text": 7}\n', r'no JSON object with a string "text" .TypeError: a int'),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line at byte 0 is no JSON object.*RecursionError"),
        ("a.csv", b"x" * 200_000 + b"\n", "no .*text.* to read"),
        ("a.jsonl", b'["text"]\n', r'no JSON object with a string "text"'),
        ("a.parquet", b"PAR1 or not", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_files_that_cannot_be_read(folder, file, content, message):
    if file == "a.parquet":
        pytest.importorskip("pyarrow")
    (folder / "corpus").mkdir()
    (folder / "corpus" / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text("corpus")


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"body": ["x"]}, "no column called text, only body"), ({"text": [1]}, "int64")],
)
def test_parquet_without_a_text_column_of_strings(folder, columns, message):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "corpus").mkdir()
    parquet.write_table(pyarrow.table(columns), folder / "corpus" / "a.parquet")
    with pytest.raises(UserError, match=message):
        load_text("corpus")


@pytest.mark.parametrize("name", ["corpus", "fineweb-edu"])
def test_a_missing_library_error_names_the_extra(folder, monkeypatch, name):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="EXTRAS=datasets"):
        load_text(name)
