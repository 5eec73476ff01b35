"""Shards: tokens equal those of the plain text; kills, damage, and the order of reading."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.command_line import from_command_line
from nanods.data import shards, sources
from nanods.data.download import data_dir
from nanods.data.shards import Tokens, permute, window_starts
from nanods.data.text import load_text, split
from nanods.data.tokenizer import BPETokenizer
from nanods.errors import UserError
from nanods.training import checkpoint
from nanods.training.language_task import LanguageTask

LINES = [f"Line {i}: the quick brown fox číslo {i * i} jumps.\n" for i in range(300)]
DOCUMENTS = [f"Document {i}\nhas {i % 7} žlutých lines" + "\n" * (i % 2) for i in range(100)]
pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def corpus(folder):
    """A folder of two kinds of files. Return its name, training text and validation text."""
    (folder / "corpus" / "more").mkdir(parents=True)
    (folder / "corpus" / "a.txt").write_text("".join(LINES).rstrip("\n"))
    rows = [json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS]
    (folder / "corpus" / "more" / "b.jsonl").write_text("".join(rows) + '\n{"text": null}\n')
    (folder / "corpus" / "empty.txt").touch()
    (folder / "corpus" / "notes.md").write_text("not a text of this corpus")
    # a.txt lacks the last newline (-1 byte); b.jsonl has 16 bytes after the rows.
    splits = split_file(LINES, LINES, -1), split_file(DOCUMENTS, rows, 16)
    train, val = zip(*splits, strict=True)
    return "corpus", "".join(train), "".join(val)


def split_file(texts, stored, extra_bytes):
    """Return the texts that begin in the first 90% of a file's bytes, and the others.

    `stored` are the texts as they are in the file, which has `extra_bytes` more. All texts end in a
    newline.
    """
    lengths = [len(row.encode()) for row in stored]
    size = sum(lengths) + extra_bytes
    begins = np.cumsum([0, *lengths])[:-1]
    cut = size - size // 10
    train, val = "", ""
    for text, begin in zip(texts, begins, strict=True):
        text = text if text.endswith("\n") else text + "\n"
        if begin < cut:
            train += text
        else:
            val += text
    return train, val


def shards_folder():
    """Return the only folder of shards in the data folder."""
    (folder,) = (data_dir() / "shards").iterdir()
    return folder


# ---- what the shards hold ------------------------------------------------------------------------


def test_byte_tokens_are_the_bytes_of_the_documents(corpus):
    name, train, val = corpus
    data = load_text(name)
    assert (data.tokenizer.decode(data.train[:]), data.tokenizer.decode(data.val)) == (train, val)
    assert data.name == name and data.val_bytes == len(val.encode()) == len(data.val) > len(val)
    assert data.train.dtype == data.val.dtype == np.uint16 and isinstance(data.val, np.memmap)
    assert len(data.train.parts) == 7 and len(data.train) == len(train.encode())
    data.require(99)
    with pytest.raises(UserError, match="one context needs 5,001"):
        data.require(5000)


def test_a_bpe_encodes_shards_as_it_encodes_the_whole_text(corpus):
    name, train, val = corpus
    data = load_text(name, 300)
    bpe = BPETokenizer.train(train, 300)
    assert data.tokenizer.to_json() == bpe.to_json()
    np.testing.assert_array_equal(data.train[:], bpe.encode(train))
    np.testing.assert_array_equal(data.val, bpe.encode(val))
    assert data.sha256 != load_text(name).sha256


def test_a_bpe_learns_from_a_sample_of_every_shard(corpus, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLE", 3000)
    jobs = sources.plan(corpus[0], 0.1).shards
    sample = shards.sample_text(jobs)
    assert 3000 <= len(sample) < 5000
    assert sample.startswith("Line 0:") and sample.count("Document") >= 5
    tokenizer = load_text(corpus[0], 270).tokenizer
    assert tokenizer.to_json() == BPETokenizer.train(sample, 270).to_json()


def test_the_validation_split_of_a_large_corpus_is_small(corpus, monkeypatch):
    monkeypatch.setattr(sources, "HELD_OUT", 300)
    data = load_text(corpus[0])
    assert 100 < data.val_bytes < 600
    assert len(data.train) + len(data.val) == len((corpus[1] + corpus[2]).encode())


def test_several_processes_make_the_same_shards_as_one(corpus, monkeypatch):
    monkeypatch.setattr(sources, "SLICE", 8000)
    one_process = load_text(corpus[0]).sha256
    monkeypatch.setattr(shards, "available_cores", lambda: 2)
    monkeypatch.setenv("NANODS_DATA", "elsewhere")
    assert load_text(corpus[0]).sha256 == one_process


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5), st.data())
def test_tokens_read_as_one_array(parts, data):
    joined = np.concatenate([np.array(part, np.uint16) for part in parts])
    tokens = Tokens([np.array(part, np.uint16) for part in parts])
    assert len(tokens) == len(joined)
    start, stop = (data.draw(st.integers(-25, 25) | st.none()) for _ in range(2))
    np.testing.assert_array_equal(tokens[start:stop], joined[start:stop])
    assert tokens[start:stop].dtype == np.uint16
    with pytest.raises(IndexError, match="forwards"):
        tokens[::2]


# ---- killed, damaged, changed --------------------------------------------------------------------


def record_shards(monkeypatch):
    """Return a list to which the name of each shard is added when it is made."""
    names, make_shard = [], shards.make_shard

    def recording_make_shard(path, *rest):
        names.append(path.name)
        return make_shard(path, *rest)

    monkeypatch.setattr(shards, "make_shard", recording_make_shard)
    return names


def test_finished_shards_are_kept(corpus, monkeypatch):
    before, names = load_text(corpus[0]), record_shards(monkeypatch)
    assert load_text(corpus[0]).sha256 == before.sha256 and not names
    (shards_folder() / "train-00000.bin").unlink()
    (shards_folder() / "validation.bin").write_bytes(b"")
    assert load_text(corpus[0]).sha256 == before.sha256
    assert names == ["train-00000.bin", "validation.bin"]


def test_a_killed_run_keeps_its_finished_shards_and_leaves_no_process(folder, monkeypatch):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("".join(LINES))
    monkeypatch.setattr(sources, "SLICE", 100)
    script = (
        "from nanods.data import shards, sources\n"
        "from nanods.data.text import load_text\n"
        "if __name__ == '__main__':\n"
        "    sources.SLICE = 100\n"
        "    shards.available_cores = lambda: 2\n"
        "    load_text('corpus')\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(shards.__file__).parents[2])}
    (folder / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, "script.py"], env=env, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        index_files = list(Path().glob("data/shards/*/shards.json"))
        if index_files:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline:  # the process group is empty once the workers have ended
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers still run after their parent was killed")
    index = json.loads(index_files[0].read_text())
    assert 0 < len(index["shards"]) < index["planned"]
    (shards_folder() / "train-00003.bin.1234.tmp").write_bytes(b"half")
    names = record_shards(monkeypatch)
    data = load_text("corpus")
    assert len(names) == index["planned"] - len(index["shards"])
    assert not set(names) & set(index["shards"])
    assert data.tokenizer.decode([*data.train[:], *data.val]) == "".join(LINES)
    assert not list(shards_folder().glob("*.tmp"))
    new_index = json.loads(index_files[0].read_text())
    assert list(new_index["shards"]) == sorted(sources.plan("corpus", 0.1).shards)


def test_a_killed_process_raises_a_user_error(monkeypatch):
    monkeypatch.setattr(shards, "available_cores", lambda: 2)
    monkeypatch.setattr(shards, "make_shard", os._exit)
    with pytest.raises(UserError, match=r"killed.*memory.*finished shards are kept"):
        shards.make_in_processes(dict.fromkeys("abc", (1,)), lambda shard, entry: None)


def change_a_byte(path):
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def plan_two_more_shards(path):
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"planned": index["planned"] + 2}))


DAMAGES = [
    ("train-00001.bin", lambda path: path.unlink(), r"train-00001\.bin is missing"),
    (
        "train-00001.bin",
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        r"train-00001\.bin has .* and should have",
    ),
    ("validation.bin", change_a_byte, r"validation\.bin is corrupt .its sha256 differs"),
    ("tokenizer.json", change_a_byte, r"tokenizer\.json is corrupt"),
    ("shards.json", lambda path: path.write_text("{"), r"shards\.json is missing or damaged"),
    (
        "shards.json",
        lambda path: path.write_text(path.read_text().replace("tokens", "tokenz")),
        r"shards\.json is missing or damaged",
    ),
    ("shards.json", plan_two_more_shards, r"2 of \d+ shards are not made yet"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_damage_is_reported_without_the_source_and_repaired_with_it(
    corpus, capsys, file, damage, message
):
    before = load_text(corpus[0])
    before = before.sha256, np.array(before.train[:])
    # Without the source, as on another machine.
    assert load_text(str(shards_folder())).sha256 == before[0]
    damage(shards_folder() / file)
    fix = "Copy these shards here again, or give what they were made from"
    with pytest.raises(UserError, match=rf"--data .*{message}.*{fix}"):
        load_text(str(shards_folder()))
    after = load_text(corpus[0])
    assert after.sha256 == before[0]
    np.testing.assert_array_equal(after.train[:], before[1])
    assert ("making it again from corpus" in capsys.readouterr().err) == (file != "shards.json")
    assert load_text(str(shards_folder())).sha256 == before[0]


def test_shards_of_another_vocabulary(corpus):
    load_text(corpus[0])
    message = r"--vocab-size 300: .* have a vocabulary of 256; take --vocab-size 256"
    with pytest.raises(UserError, match=message):
        load_text(str(shards_folder()), 300)


def test_a_changed_source_does_not_use_the_old_shards(corpus):
    before = load_text(corpus[0])
    with Path("corpus/a.txt").open("a") as file:
        file.write("More.\n")
    after = load_text(corpus[0])
    assert after.sha256 != before.sha256 and after.tokenizer.decode(after.val).count("More.") == 1


# ---- the order of reading ------------------------------------------------------------------------


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permute_is_a_bijection(count, seed):
    keys = np.random.default_rng(seed).integers(0, 2**64, size=shards.ROUNDS, dtype=np.uint64)
    assert sorted(permute(np.arange(count), count, keys).tolist()) == list(range(count))


@given(
    total=st.integers(2, 400),
    T=st.integers(1, 40),
    batch=st.integers(1, 17),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_an_epoch_reads_each_window_once_for_any_batch_size(total, T, batch, seed):
    T = min(T, total - 1)
    count = max(1, (total - 1) // T - 1)
    steps = -(-2 * count // batch)
    starts = np.concatenate([window_starts(step, batch, total, T, seed) for step in range(steps)])
    for epoch in (starts[:count], starts[count : 2 * count]):
        ordered = np.sort(epoch)
        assert (np.diff(ordered) == T).all() and ordered[0] >= 0 and ordered[-1] + T + 1 <= total
        assert ordered[0] < T and total - (ordered[-1] + T + 1) <= 2 * T
    np.testing.assert_array_equal(starts[:count], window_starts(0, count, total, T, seed))


def test_epochs_and_seeds_have_different_orders_and_offsets():
    total, T = 32 * 1001, 32
    first, second, other = (
        window_starts(step, 999, total, T, seed) for step, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert len({window_starts(epoch, 999, total, T, 0)[0] % T for epoch in range(30)}) > 15
    for a, b in ((first, second), (first, other), (first, np.sort(first))):
        assert np.mean(a // T == b // T) < 0.02
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    # Consecutive windows are not near each other in the corpus.
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.15


def test_a_trillion_tokens_need_little_memory_and_time():
    starts = window_starts(10**6, 512, 10**12 + 3, 1024, seed=5)
    assert starts.dtype == np.int64 and len(set(starts.tolist())) == 512 and starts.min() >= 0
    assert abs(starts.mean() / 10**12 - 0.5) < 0.06 and starts.max() + 1025 <= 10**12 + 3


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_parts_of_the_processes_are_disjoint_and_form_the_batch(world):
    for step in range(4):
        batch = window_starts(step, 24, 10_007, 16, 3)
        parts = [batch[rank::world].tolist() for rank in range(world)]
        union = set().union(*parts)
        assert sum(map(len, parts)) == len(union) == 24
        assert union == set(batch.tolist())


def test_the_task_reads_shards_in_this_order_and_other_texts_as_sampling_says(corpus):
    Path("text.txt").write_text("".join(LINES))
    for name, sampling in (
        (corpus[0], "epochs"),
        (corpus[0], "random"),
        ("text.txt", "epochs"),
        ("text.txt", "random"),
    ):
        flags = ["--data", name, "--batch-size", "6", "--context-length", "40"]
        config = from_command_line("", ["v0-tiny", *flags, "--sampling", sampling])
        task = LanguageTask(config, torch.device("cpu"))
        total = len(task.data.train)
        text = split("".join(LINES))[0] if name == "text.txt" else corpus[1]
        if (name, sampling) == ("text.txt", "random"):
            starts = np.random.default_rng([0, 7]).integers(0, total - 40, size=6)
        else:
            starts = window_starts(7, 6, total, 40, 0)
        rows = [list(text.encode()[start : start + 41]) for start in starts]
        np.testing.assert_array_equal(task.window_starts(7), starts)
        assert task.batch(7).tolist() == rows
        is_ignored = (name, sampling) == (corpus[0], "random")
        assert ("--sampling random has no effect" in task.describe_data()) == is_ignored


def test_training_on_a_folder_resumes_bitwise(workspace, program, corpus, killed_at):
    flags = "--n-layer 1 --n-head 1 --n-embd 8 --context-length 32 --batch-size 4 --device cpu"
    flags = [*flags.split(), "--data", corpus[0]]
    flags += ["--steps", 8, "--save-every", 3, "--eval-every", 4]
    assert program("train", "v0-tiny", *flags, "--out-dir", "uninterrupted")[0] == 0
    with killed_at(5):
        program("train", "v0-tiny", *flags, "--out-dir", "resumed")
    code, out, err = program("train", "v0-tiny", "--resume", "--out-dir", "resumed")
    assert code == 0 and "after step 3" in out, err
    saved = [checkpoint.load(Path(name)).path for name in ("uninterrupted", "resumed")]
    uninterrupted, resumed = ((path / "model.safetensors").read_bytes() for path in saved)
    assert resumed == uninterrupted
    Path("corpus/a.txt").write_text("Another text.\n" * 400)
    saved[1].rename(saved[1].with_name("away"))
    code, _, err = program("train", "v0-tiny", "--resume", "--out-dir", "resumed")
    assert code == 2 and "has changed since" in err
