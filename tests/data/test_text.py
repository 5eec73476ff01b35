"""load_text: splits, cached token files, also damaged ones, data sets on disk, and each mistake."""

import builtins
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanods.data import text as text_module
from nanods.data.download import data_dir
from nanods.data.text import NAMES, load_text, split
from nanods.data.tokenizer import BPETokenizer
from nanods.errors import UserError

SAMPLE = "".join(f"Line {i}: the quick brown fox číslo {i * i} jumps.\n" for i in range(400))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANODS_DATA", raising=False)
    return tmp_path


@pytest.fixture
def corpus(folder):
    path = folder / "sample.txt"
    path.write_bytes(SAMPLE.encode())
    return str(path)


def cached(pattern="*"):
    return sorted(Path("data/cache").glob(pattern))


@given(st.text())
def test_split_is_contiguous_and_at_90_percent_of_the_characters(text):
    train, val = split(text)
    assert train + val == text and len(train) == int(len(text) * 0.9)


def test_a_local_file_as_bytes(corpus):
    data = load_text(corpus)
    train, val = split(SAMPLE)
    assert data.name == corpus and data.sha256 == hashlib.sha256(SAMPLE.encode()).hexdigest()
    assert isinstance(data.train, np.memmap)
    assert data.train.dtype == np.uint16 and data.train.ndim == 1
    assert bytes(data.train.astype(np.uint8)) == train.encode()
    assert bytes(data.val.astype(np.uint8)) == val.encode()
    assert data.val_bytes == len(data.val) == len(val.encode()) > len(val)
    assert data.tokenizer.vocab_size == 256


def test_line_ends_are_kept(folder):
    (folder / "dos.txt").write_bytes(b"one\r\ntwo\rthree\n" * 10)
    data = load_text("dos.txt")
    assert data.tokenizer.decode([*data.train, *data.val]) == "one\r\ntwo\rthree\n" * 10


def test_bpe_learns_from_the_training_split_only(folder):
    varied = "".join(chr(97 + i * i % 23) + " "[: i % 5 == 0] for i in range(9000))
    # "zy" is the most frequent pair of the text, but the training split has none.
    (folder / "a.txt").write_text(varied + " zy" * (len(varied) // 28))
    data = load_text("a.txt", vocab_size=260)
    train, val = split((folder / "a.txt").read_text())
    assert isinstance(data.tokenizer, BPETokenizer) and data.tokenizer.vocab_size == 260
    assert data.tokenizer.decode(data.train) == train and data.tokenizer.decode(data.val) == val
    assert data.tokenizer.to_json() == BPETokenizer.train(train, 260).to_json()
    assert data.val_bytes == len(val.encode())
    assert load_text("a.txt", vocab_size=260).tokenizer.to_json() == data.tokenizer.to_json()


def test_a_vocabulary_too_large_for_the_text_is_refused_unless_it_is_a_bound(folder):
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=r"4096: this text gives a BPE vocabulary of 25[78] at"):
            text_module.tokenizer_for("ab ab ab", 4096)
        assert 256 < text_module.tokenizer_for("ab ab ab", 4096, at_most=True).vocab_size < 260


def test_a_large_vocabulary_takes_four_bytes_a_token(folder):
    class Wide(text_module.ByteTokenizer):
        vocab_size = 65537

    assert text_module.encode_cached("text", Wide()).dtype == np.uint32


def test_encoding_in_pieces_equals_encoding_at_once(folder):
    bpe = BPETokenizer.train(SAMPLE, 300)
    long = "ab\n\ncd" * 25_000 + "end without a line's end"
    np.testing.assert_array_equal(text_module.encode_cached(long, bpe), bpe.encode(long))


def test_cut_words_are_said_before_the_tokenizer_learns(folder, capsys):
    (folder / "dna.txt").write_text("".join("ACGT"[n * n % 7 % 4] for n in range(3000)))
    load_text("dna.txt", 260)
    expected = (
        "learning up to 260 tokens from 2,700 characters; words longer than 256 characters are cut"
    )
    assert f"{expected} (10 cuts)" in capsys.readouterr().out


def test_the_cache_is_used(corpus, monkeypatch):
    load_text(corpus)
    monkeypatch.setattr(text_module, "encode_corpus", lambda *args: pytest.fail("encoded again"))
    load_text(corpus)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-10],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: b"garbage" * 100,
        lambda data: data[:20],
    ],
)
def test_damaged_token_files_are_written_again(corpus, damage):
    before = load_text(corpus)
    expected, files = np.array(before.train), cached("*.npy")
    sizes = [path.stat().st_size for path in files]
    assert len(files) == 2
    for path in files:
        path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(load_text(corpus).train, expected)
    assert [path.stat().st_size for path in files] == sizes
    assert cached() == files  # no temporary files are left


@pytest.mark.parametrize("damaged", ["", "{", '{"type": "bytes"}', '{"version": "1.0"}'])
def test_a_damaged_cached_tokenizer_is_trained_again(corpus, damaged):
    expected = load_text(corpus, 300).tokenizer.to_json()
    (path,) = cached("*.json")
    path.write_text(damaged)
    assert load_text(corpus, 300).tokenizer.to_json() == expected == path.read_text()


def test_a_changed_text_does_not_use_the_old_cache(corpus):
    load_text(corpus)
    Path(corpus).write_text(SAMPLE.upper())
    assert load_text(corpus).tokenizer.decode(load_text(corpus).train) == split(SAMPLE.upper())[0]


def test_processes_that_load_at_the_same_time_agree(corpus):
    script = (
        "import hashlib, sys\n"
        "from nanods.data.text import load_text\n"
        "data = load_text(sys.argv[1], 300)\n"
        "content = data.train.tobytes() + data.val.tobytes() + data.tokenizer.to_json().encode()\n"
        "print(hashlib.sha256(content).hexdigest())\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(text_module.__file__).parents[2])}
    command = [sys.executable, "-c", script, corpus]
    processes = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = {process.communicate(timeout=60)[0].splitlines()[-1] for process in processes}
    data = load_text(corpus, 300)
    content = data.train.tobytes() + data.val.tobytes() + data.tokenizer.to_json().encode()
    assert outputs == {hashlib.sha256(content).hexdigest()}
    assert len(cached()) == 3


def test_pydocs_by_name(monkeypatch):
    monkeypatch.setattr(text_module, "pydocs_text", lambda: SAMPLE)
    data = load_text("pydocs")
    assert data.name == "pydocs" and data.sha256 == hashlib.sha256(SAMPLE.encode()).hexdigest()


def test_shakespeare_is_read_from_the_data_folder(monkeypatch, folder):
    monkeypatch.setattr(
        text_module, "SHAKESPEARE_SHA256", hashlib.sha256(SAMPLE.encode()).hexdigest()
    )
    monkeypatch.setattr(text_module, "SHAKESPEARE_URLS", ())
    monkeypatch.setenv("NANODS_DATA", str(folder / "elsewhere"))
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "tinyshakespeare.txt").write_bytes(SAMPLE.encode())
    data = load_text("shakespeare")
    assert data.sha256 == text_module.SHAKESPEARE_SHA256 and not Path("data").exists()


def test_shakespeare_is_downloaded_from_a_mirror_once(monkeypatch, folder, corpus):
    monkeypatch.setattr(
        text_module, "SHAKESPEARE_SHA256", hashlib.sha256(SAMPLE.encode()).hexdigest()
    )
    mirrors = ((folder / "nothing").as_uri(), Path(corpus).as_uri())
    monkeypatch.setattr(text_module, "SHAKESPEARE_URLS", mirrors)
    first = load_text("shakespeare")
    assert (data_dir() / "tinyshakespeare.txt").read_bytes() == SAMPLE.encode()
    Path(corpus).unlink()
    assert load_text("shakespeare").sha256 == first.sha256 == text_module.SHAKESPEARE_SHA256


def test_require_one_context_in_each_split(folder):
    (folder / "a.txt").write_text("x" * 1000)
    data = load_text("a.txt")
    data.require(99)
    with pytest.raises(
        UserError, match=r"validation part has 100 tokens.*needs 101 .*shorter --context-length"
    ):
        data.require(100)


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("shakespear", "did you mean shakespeare"),
            ("wikitext", "did you mean wikitext-2"),
            ("smaple.txt", r"did you mean sample\.txt"),
            ("qqqqqqqq", r"no such data set or file; Data sets: pydocs, pydocs-train, shakespeare"),
            ("nowhere/text.txt", "no such data set or file"),
            ("sample.txt/inside", "no such data set or file"),
            ("a" * 5000, "cannot be read"),
            ("", "directory"),
            ("empty", r"directory.*no text in it.*give a UTF-8 text file"),
        ],
    )
    def test_names(self, folder, corpus, name, message):
        (folder / "empty").mkdir()
        with pytest.raises(UserError, match=message):
            load_text(name)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "the file is empty"),
            (b"x", "too short"),
            (b"abc\0def" * 10, "binary file .a zero byte at 3"),
            ("schön\n".encode("latin-1") * 10, "not UTF-8 .byte 0xf6 at 3.*iconv"),
        ],
    )
    def test_contents(self, folder, content, message):
        (folder / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=rf"--data bad\.txt: .*{message}"):
            load_text("bad.txt")
        assert (folder / "bad.txt").read_bytes() == content

    @pytest.mark.parametrize("vocab_size", [-1, 0, 255])
    def test_a_vocabulary_below_256(self, corpus, vocab_size):
        with pytest.raises(UserError, match="at least 256"):
            load_text(corpus, vocab_size)

    def test_a_vocabulary_too_large_for_the_text(self, corpus):
        with pytest.raises(UserError, match=r"--vocab-size 50000: .*at most"):
            load_text(corpus, 50000)


class TestDataSets:
    """Data sets built on disk; nothing is downloaded."""

    @pytest.fixture(autouse=True)
    def datasets(self):
        return pytest.importorskip("datasets")

    def rows(self, datasets, name, count=30):
        return datasets.Dataset.from_dict(
            {"text": [f" {name} {i} \n" if i % 3 else "" for i in range(count)]}
        )

    def test_the_validation_split_of_a_data_set_is_used(self, datasets, folder):
        both = datasets.DatasetDict(
            train=self.rows(datasets, "train"), validation=self.rows(datasets, "val", 5)
        )
        both.save_to_disk(folder / "set")
        data = load_text("set")
        assert data.tokenizer.decode(data.val) == "\n val 1 \n val 2 \n\n val 4 \n"
        assert data.tokenizer.decode(data.train).count("train") == 20

    @pytest.mark.parametrize("in_dict", [True, False])
    def test_without_a_validation_split_the_last_tenth_is_validation(
        self, datasets, folder, in_dict
    ):
        rows = self.rows(datasets, "only")
        (datasets.DatasetDict(train=rows) if in_dict else rows).save_to_disk(folder / "set")
        data = load_text("set")
        text = "".join(row or "\n" for row in rows["text"])
        assert (data.tokenizer.decode(data.train), data.tokenizer.decode(data.val)) == split(text)

    def test_wikitext_loads_the_raw_version(self, datasets, monkeypatch):
        calls = []
        rows = self.rows(datasets, "wiki")

        def load_dataset(*args):
            calls.append(args)
            return datasets.DatasetDict(train=rows, validation=rows, test=rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        text = "".join(row or "\n" for row in rows["text"])
        assert load_text("wikitext-2").val_bytes == len(text)
        load_text("wikitext-103")
        assert calls == [("Salesforce/wikitext", f"wikitext-{n}-raw-v1") for n in (2, 103)]

    def test_without_network(self, datasets, monkeypatch):
        def load_dataset(*args):
            raise ConnectionError("no route to host")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(UserError, match=r"no route to host.*save_to_disk"):
            load_text("wikitext-2")

    def test_missing_columns_and_splits(self, datasets, folder):
        datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(folder / "columns")
        with pytest.raises(UserError, match="no column called text, only body"):
            load_text("columns")
        datasets.DatasetDict(dev=self.rows(datasets, "x")).save_to_disk(folder / "splits")
        with pytest.raises(UserError, match="no split called train, only dev"):
            load_text("splits")

    def test_a_damaged_folder(self, folder):
        (folder / "set").mkdir()
        (folder / "set" / "state.json").write_text("{")
        with pytest.raises(UserError, match="could not load it"):
            load_text("set")


def test_a_missing_library_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="EXTRAS=datasets"):
        load_text("wikitext-2")


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES) == 6
