"""Shards: the tokens of the plain text, whole after a kill, faults named, and an order that shows each window once."""

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

from nanods import config as ladder
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
    """A folder of two kinds of files -> (its name, its training documents, its validation documents)."""
    (folder / "corpus" / "more").mkdir(parents=True)
    (folder / "corpus" / "a.txt").write_text("".join(LINES).rstrip("\n"))
    rows = [json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS]
    (folder / "corpus" / "more" / "b.jsonl").write_text("".join(rows) + '\n{"text": null}\n')
    (folder / "corpus" / "empty.txt").touch()
    (folder / "corpus" / "notes.md").write_text("not a text of this corpus")
    train, val = zip(held_out(LINES, LINES, -1), held_out(DOCUMENTS, rows, 16), strict=True)
    return "corpus", "".join(train), "".join(val)


def held_out(texts, written, after):
    """The texts that begin in the first nine tenths of a file of those bytes, and the others; all end in a newline."""
    size = sum(len(row.encode()) for row in written) + after
    begins = np.cumsum([0, *(len(row.encode()) for row in written)])[:-1]
    ended = [text if text.endswith("\n") else text + "\n" for text in texts]
    cut = size - size // 10
    return tuple(
        "".join(t for t, b in zip(ended, begins, strict=True) if (b < cut) == train)
        for train in (True, False)
    )


def made():
    (found,) = (data_dir() / "shards").iterdir()
    return found


# ---- what the shards hold ----------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_documents(corpus):
    name, train, val = corpus
    data = load_text(name)
    assert (data.tokenizer.decode(data.train[:]), data.tokenizer.decode(data.val)) == (train, val)
    assert data.name == name and data.val_bytes == len(val.encode()) == len(data.val) > len(val)
    assert data.train.dtype == data.val.dtype == np.uint16 and isinstance(data.val, np.memmap)
    assert len(data.train.parts) == 8 and len(data.train) == len(train.encode())
    data.require(99)
    with pytest.raises(UserError, match="one context needs 5,001"):
        data.require(5000)


def test_a_bpe_of_the_training_part_encodes_as_the_whole_text(corpus):
    pytest.importorskip("tokenizers")
    name, train, val = corpus
    data = load_text(name, 300)
    bpe = BPETokenizer.train(train, 300)
    assert data.tokenizer.to_json() == bpe.to_json()
    np.testing.assert_array_equal(data.train[:], bpe.encode(train))
    np.testing.assert_array_equal(data.val, bpe.encode(val))
    assert data.sha256 != load_text(name).sha256


def test_a_bpe_learns_from_a_sample_that_every_shard_gives(corpus, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(shards, "SAMPLE", 3000)
    jobs = sources.plan(corpus[0])
    sample = shards.sample_text(jobs)
    assert (
        3000 <= len(sample) < 5000
        and sample.startswith("Line 0:")
        and sample.count("Document") >= 5
    )
    assert (
        load_text(corpus[0], 270).tokenizer.to_json() == BPETokenizer.train(sample, 270).to_json()
    )


def test_a_large_corpus_holds_out_little(corpus, monkeypatch):
    monkeypatch.setattr(sources, "HELD_OUT", 300)
    data = load_text(corpus[0])
    assert 100 < data.val_bytes < 600
    assert len(data.train) + len(data.val) == len((corpus[1] + corpus[2]).encode())


def test_processes_make_what_one_makes(corpus, monkeypatch):
    monkeypatch.setattr(sources, "SLICE", 8000)
    alone = load_text(corpus[0]).sha256
    monkeypatch.setattr(shards, "available_cores", lambda: 2)
    monkeypatch.setenv("NANODS_DATA", "elsewhere")
    assert load_text(corpus[0]).sha256 == alone


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5), st.data())
def test_tokens_read_as_one_array(parts, data):
    whole = np.concatenate([np.array(part, np.uint16) for part in parts])
    tokens = Tokens([np.array(part, np.uint16) for part in parts])
    assert len(tokens) == len(whole)
    start, stop = (data.draw(st.integers(-25, 25) | st.none()) for _ in range(2))
    np.testing.assert_array_equal(tokens[start:stop], whole[start:stop])
    assert tokens[start:stop].dtype == np.uint16
    with pytest.raises(IndexError, match="forwards"):
        tokens[::2]


# ---- killed, damaged, changed ------------------------------------------------------------------------------------------------


def count_assignments(monkeypatch):
    """The names of the shards that are made from now on."""
    names, real = [], shards.make_shard
    monkeypatch.setattr(
        shards, "make_shard", lambda path, *rest: names.append(path.name) or real(path, *rest)
    )
    return names


def test_finished_shards_are_used_again(corpus, monkeypatch):
    before, names = load_text(corpus[0]), count_assignments(monkeypatch)
    assert load_text(corpus[0]).sha256 == before.sha256 and not names
    (made() / "train-00000.bin").unlink()
    (made() / "validation.bin").write_bytes(b"")
    assert load_text(corpus[0]).sha256 == before.sha256 and names == [
        "train-00000.bin",
        "validation.bin",
    ]


def test_a_killed_run_keeps_its_finished_shards_and_leaves_no_process(folder, monkeypatch):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("".join(LINES))
    monkeypatch.setattr(sources, "SLICE", 100)
    script = (
        "import sys; from nanods.data import shards, sources; from nanods.data.text import load_text\n"
        "if __name__ == '__main__': sources.SLICE = 100; shards.available_cores = lambda: 2; load_text('corpus')\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(shards.__file__).parents[2])}
    (folder / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, "script.py"], env=env, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while (
        not (found := list(Path().glob("data/shards/*/shards.json")))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline:  # the group is empty as soon as the workers are gone too
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers outlive their parent")
    index = json.loads(found[0].read_text())
    assert 0 < len(index["shards"]) < index["planned"]
    (made() / "train-00003.bin.1234.tmp").write_bytes(b"half")
    names = count_assignments(monkeypatch)
    data = load_text("corpus")
    assert len(names) == index["planned"] - len(index["shards"]) and not set(names) & set(
        index["shards"]
    )
    assert data.tokenizer.decode([*data.train[:], *data.val]) == "".join(LINES)
    assert not list(made().glob("*.tmp")) and list(
        json.loads(found[0].read_text())["shards"]
    ) == sorted(sources.plan("corpus"))


def test_a_process_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr(shards, "available_cores", lambda: 2)
    monkeypatch.setattr(shards, "make_shard", os._exit)
    with pytest.raises(UserError, match=r"killed.*memory.*finished shards are kept"):
        shards.make_in_processes({"a": (1,), "b": (1,)}, lambda shard, entry: None)


def other_byte(path):
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def unfinished(path):
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"planned": index["planned"] + 2}))


DAMAGES = [
    ("train-00001.bin", lambda path: path.unlink(), r"train-00001\.bin is missing"),
    (
        "train-00001.bin",
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        r"train-00001\.bin has .* and should have",
    ),
    ("validation.bin", other_byte, r"validation\.bin is corrupt .its sha256 differs"),
    ("tokenizer.json", other_byte, r"tokenizer\.json is corrupt"),
    ("shards.json", lambda path: path.write_text("{"), r"shards\.json is missing or damaged"),
    (
        "shards.json",
        lambda path: path.write_text(path.read_text().replace("tokens", "tokenz")),
        r"shards\.json is missing or damaged",
    ),
    ("shards.json", unfinished, r"2 of \d+ shards are not made yet"),
]


@pytest.mark.parametrize(("file", "harm", "message"), DAMAGES)
def test_damage_is_named_without_the_source_and_mended_with_it(corpus, capsys, file, harm, message):
    before = load_text(corpus[0])
    before = before.sha256, np.array(before.train[:])
    assert load_text(str(made())).sha256 == before[0]  # shards alone, as on another machine
    harm(made() / file)
    with pytest.raises(
        UserError,
        match=rf"--data .*{message}.*Copy these shards here again, or give what they were made from",
    ):
        load_text(str(made()))
    after = load_text(corpus[0])
    assert after.sha256 == before[0]
    np.testing.assert_array_equal(after.train[:], before[1])
    assert ("making it again from corpus" in capsys.readouterr().err) == (file != "shards.json")
    assert load_text(str(made())).sha256 == before[0]


def test_shards_of_another_vocabulary(corpus):
    load_text(corpus[0])
    with pytest.raises(
        UserError, match=r"--vocab-size 300: .* have a vocabulary of 256; take --vocab-size 256"
    ):
        load_text(str(made()), 300)


def test_a_changed_folder_is_never_served_from_old_shards(corpus):
    before = load_text(corpus[0])
    with Path("corpus/a.txt").open("a") as file:
        file.write("More.\n")
    after = load_text(corpus[0])
    assert after.sha256 != before.sha256 and after.tokenizer.decode(after.val).count("More.") == 1


# ---- the order of reading ----------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permuted_is_a_bijection(count, seed):
    keys = np.random.default_rng(seed).integers(0, 2**64, size=shards.ROUNDS, dtype=np.uint64)
    assert sorted(permute(np.arange(count), count, keys).tolist()) == list(range(count))


@given(
    total=st.integers(2, 400),
    T=st.integers(1, 40),
    batch=st.integers(1, 17),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_an_epoch_shows_each_window_once_whatever_the_batch(total, T, batch, seed):
    T = min(T, total - 1)
    count = max(1, (total - 1) // T - 1)
    steps = -(-2 * count // batch)
    starts = np.concatenate([window_starts(step, batch, total, T, seed) for step in range(steps)])
    for epoch in (starts[:count], starts[count : 2 * count]):
        ordered = np.sort(epoch)
        assert (np.diff(ordered) == T).all() and ordered[0] >= 0 and ordered[-1] + T + 1 <= total
        assert ordered[0] < T and total - (ordered[-1] + T + 1) <= 2 * T
    np.testing.assert_array_equal(starts[:count], window_starts(0, count, total, T, seed))


def test_epochs_and_seeds_have_orders_and_offsets_of_their_own():
    total, T = 32 * 1001, 32
    first, second, other = (
        window_starts(step, 999, total, T, seed) for step, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert len({window_starts(epoch, 999, total, T, 0)[0] % T for epoch in range(30)}) > 15
    for a, b in ((first, second), (first, other), (first, np.sort(first))):
        assert np.mean(a // T == b // T) < 0.02
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    assert (
        abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.15
    )  # nor do neighbours in time lie near each other


def test_a_trillion_tokens_need_no_memory_and_no_time():
    starts = window_starts(10**6, 512, 10**12 + 3, 1024, seed=5)
    assert starts.dtype == np.int64 and len(set(starts.tolist())) == 512 and starts.min() >= 0
    assert abs(starts.mean() / 10**12 - 0.5) < 0.06 and starts.max() + 1025 <= 10**12 + 3


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_processes_parts_are_disjoint_and_together_the_batch(world):
    for step in range(4):
        batch = window_starts(step, 24, 10_007, 16, 3)
        parts = [batch[rank::world].tolist() for rank in range(world)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 24 and set().union(
            *parts
        ) == set(batch.tolist())


def test_the_task_reads_shards_in_this_order_and_else_at_random_places(corpus):
    Path("text.txt").write_text("".join(LINES))
    for name in (corpus[0], "text.txt"):
        config = ladder.from_command_line(
            "", ["v0-tiny", "--data", name, "--batch-size", "6", "--context-length", "40"]
        )
        task = LanguageTask(config, torch.device("cpu"))
        total = len(task.data.train)
        if name == "text.txt":
            starts = np.random.default_rng([0, 7]).integers(0, total - 40, size=6)
            text = split("".join(LINES))[0]
        else:
            starts, text = window_starts(7, 6, total, 40, 0), corpus[1]
        rows = [list(text.encode()[start : start + 41]) for start in starts]
        np.testing.assert_array_equal(task.window_starts(7), starts)
        assert task.batch(7).tolist() == rows


def test_training_on_a_folder_resumes_bit_for_bit(workspace, program, corpus, monkeypatch):
    import train

    sizes = [
        "--n-layer",
        1,
        "--n-head",
        1,
        "--n-embd",
        8,
        "--context-length",
        32,
        "--batch-size",
        4,
        "--device",
        "cpu",
    ]
    flags = [*sizes, "--data", corpus[0], "--steps", 8, "--save-every", 3, "--eval-every", 4]
    assert program("train", "v0-tiny", *flags, "--out-dir", "whole")[0] == 0
    real = train.set_learning_rate

    def interrupted(optimizers, step, config):
        if step == 5:
            raise KeyboardInterrupt
        return real(optimizers, step, config)

    monkeypatch.setattr(train, "set_learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program("train", "v0-tiny", *flags, "--out-dir", "cut")
    monkeypatch.setattr(train, "set_learning_rate", real)
    code, out, err = program("train", "v0-tiny", "--resume", "--out-dir", "cut")
    assert code == 0 and "after step 3" in out, err
    whole, cut = (checkpoint.load(Path(name)) for name in ("whole", "cut"))
    assert (
        whole.path.joinpath("model.safetensors").read_bytes()
        == cut.path.joinpath("model.safetensors").read_bytes()
    )
    Path("corpus/a.txt").write_text("Another text.\n" * 400)
    cut.path.rename(cut.path.with_name("away"))
    code, _, err = program("train", "v0-tiny", "--resume", "--out-dir", "cut")
    assert code == 2 and "has changed since" in err
