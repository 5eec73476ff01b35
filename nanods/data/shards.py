"""Corpora that do not fit into memory: token shards on disk, made in parallel, resumable, verified; and the order of reading.

A shard is a file of token ids and nothing else, little-endian uint16 (uint32 from 65,537 tokens of vocabulary), as nanoGPT's
train.bin. A folder of shards holds `train-00000.bin`, ..., `validation.bin`, `tokenizer.json` and `shards.json`, the index: the
sha256 of the tokenizer and, of each shard that is finished, its tokens, bytes of text and sha256. It lies in `data/shards/`,
named by the source (see `fingerprint`), and can be moved to another machine and given there as --data itself.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanods.data.download import data_dir, fcntl, file_sha256, unwritable, write_atomic
from nanods.data.random_bits import mix
from nanods.data.sources import INDEX, documents, fingerprint, plan
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_json
from nanods.errors import UserError

Tokenizer = ByteTokenizer | BPETokenizer
SAMPLE = (
    1 << 25
)  # characters of the training part that a BPE learns from, about, evenly from all shards
BATCH = 1 << 20  # characters that are encoded at once


class Tokens:
    """Several arrays of token ids read as one: `len(x)`, and `x[a:b]`, 1-D, across their boundaries."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts, self.dtype = list(parts), parts[0].dtype
        self.ends = np.cumsum([len(part) for part in parts])  # (parts,)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """Only slices of step 1. A view into one part where it holds them all, else a copy."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise IndexError("tokens are read forwards, one by one: x[a:b]")
        number = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < stop:
            begin = int(self.ends[number]) - len(self.parts[number])
            pieces.append(self.parts[number][start - begin : stop - begin])
            start, number = int(self.ends[number]), number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])


@dataclass(frozen=True)
class Shards:
    """What a folder of shards holds; the fields are those of TextData."""

    sha256: str  # of the shards' hashes and the tokenizer's
    train: Tokens
    val: np.ndarray  # memory-mapped, one shard
    tokenizer: Tokenizer
    val_bytes: int


def load_shards(
    name: str, vocab_size: int, tokenizer_for: Callable[[str, int], Tokenizer]
) -> Shards:
    """The shards of a source, verified; what is missing or damaged is made first.

    `name`: as `is_source` takes it. `tokenizer_for(text, vocab_size)` gives the tokenizer (text: a sample of the training part,
    empty for bytes). Raises UserError for what is wrong with the source, and for damaged shards that are given without one.
    """
    if (Path(name) / INDEX).is_file():
        folder = Path(name)
        if wrong := damage(folder, index := read_index(folder)):
            source = f" ({index['source']})" if index else ""
            raise UserError(
                f"--data {name}: {'; '.join(list(wrong.values())[:3])}. Copy these shards here again, or give what they were "
                f"made from{source} as --data, to make them again"
            )
        if index["vocab_size"] != vocab_size:
            raise UserError(
                f"--vocab-size {vocab_size}: the shards in {name} have a vocabulary of {index['vocab_size']}; "
                f"take --vocab-size {index['vocab_size']}, or give what they were made from as --data"
            )
    else:
        kind = "bytes" if vocab_size == 256 else f"bpe{vocab_size}"
        folder = (
            data_dir() / "shards" / f"{Path(name).resolve().name}-{fingerprint(name)[:12]}-{kind}"
        )
        if damage(folder, read_index(folder)):
            with locked(
                folder
            ):  # a second process waits here, and then finds the first one's shards
                make(name, folder, vocab_size, tokenizer_for)
    return opened(folder)


def opened(folder: Path) -> Shards:
    index = read_index(folder)
    *train, val = [
        memory_map(folder / name, entry["tokens"], index["dtype"])
        for name, entry in index["shards"].items()
    ]
    hashes = [index["tokenizer"], *(entry["sha256"] for entry in index["shards"].values())]
    return Shards(
        sha256=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        train=Tokens(train),
        val=val,
        tokenizer=tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8")),
        val_bytes=index["shards"]["validation.bin"]["bytes"],
    )


def memory_map(path: Path, tokens: int, dtype: str) -> np.ndarray:
    return (
        np.memmap(path, dtype, mode="r", shape=(tokens,)) if tokens else np.empty(0, dtype)
    )  # nothing cannot be mapped


def read_index(folder: Path) -> dict | None:
    """The index of a folder of shards; None where there is none or it is damaged."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        whole = {"source", "tokenizer", "vocab_size"} <= index.keys() and index["dtype"] in (
            "<u2",
            "<u4",
        )
        whole = whole and all(
            {"tokens", "bytes", "sha256"} <= entry.keys() for entry in index["shards"].values()
        )
        return index if whole and index["planned"] >= len(index["shards"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def damage(folder: Path, index: dict | None) -> dict[str, str]:
    """Each file that is missing or not what the index says -> what is wrong with it, in words; {} where all is well."""
    if index is None:
        return {INDEX: f"{INDEX} is missing or damaged"}
    wrong = {}
    if (why := fault(folder / "tokenizer.json", None, index["tokenizer"])) is not None:
        wrong["tokenizer.json"] = why
    size = np.dtype(index["dtype"]).itemsize
    with ThreadPoolExecutor(min(8, cores())) as pool:  # hashlib lets go of the interpreter
        calls = {
            name: pool.submit(fault, folder / name, entry["tokens"] * size, entry["sha256"])
            for name, entry in index["shards"].items()
        }
        for name, call in tqdm(
            calls.items(), desc="verifying shards", unit="shard", leave=False, disable=None
        ):
            if (why := call.result()) is not None:
                wrong[name] = why
    if not wrong and (lacking := index["planned"] - len(index["shards"])):
        wrong[INDEX] = f"{lacking} of {index['planned']} shards are not made yet (interrupted)"
    return wrong


def fault(path: Path, size: int | None, sha256: str) -> str | None:
    """What is wrong with a file of `size` bytes (None: any) and this hash; None for nothing."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return f"{path.name} has {found:,} bytes and should have {size:,}"
        return (
            None if file_sha256(path) == sha256 else f"{path.name} is corrupt (its sha256 differs)"
        )
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


# ---- source -> shards


def make(
    name: str, folder: Path, vocab_size: int, tokenizer_for: Callable[[str, int], Tokenizer]
) -> None:
    """Make the shards that are not there whole. Each is in the index as soon as it is finished, so a kill costs only those
    that were being made. Raises UserError for what is wrong with the source."""
    for left in folder.glob("*.tmp"):  # by a killed run; the lock says that none is being written
        left.unlink()
    old = read_index(folder)
    wrong = damage(folder, old)
    if old and not wrong:
        return
    for why in (why for file, why in wrong.items() if file != INDEX):
        print(f"warning: {folder}: {why}; making it again from {name}", file=sys.stderr)
    jobs = plan(name)
    if old and "tokenizer.json" not in wrong:
        saved = (folder / "tokenizer.json").read_text(encoding="utf-8")
    else:
        saved = tokenizer_for(sample(jobs) if vocab_size > 256 else "", vocab_size).to_json()
        write_atomic(folder / "tokenizer.json", lambda file: file.write(saved.encode()))
    index = {
        "source": name,
        "tokenizer": hashlib.sha256(saved.encode()).hexdigest(),
        "vocab_size": vocab_size,
        "dtype": "<u2" if vocab_size <= 65536 else "<u4",
        "planned": len(jobs),
    }
    same = old and all(old.get(key) == value for key, value in index.items() if key != "source")
    done = (
        {shard: entry for shard, entry in old["shards"].items() if shard not in wrong}
        if same
        else {}
    )
    todo = [shard for shard in jobs if shard not in done]
    with tqdm(total=len(jobs), initial=len(done), desc="shards", unit="shard", disable=None) as bar:

        def finished(shard: str, entry: dict) -> None:
            done[shard] = entry
            index["shards"] = {shard: done[shard] for shard in jobs if shard in done}
            write_atomic(
                folder / INDEX, lambda file: file.write(json.dumps(index, indent=1).encode())
            )
            bar.update()
            bar.set_postfix_str(f"{sum(entry['tokens'] for entry in done.values()):,} tokens")

        in_processes(
            {shard: (folder / shard, jobs[shard], saved, index["dtype"]) for shard in todo},
            finished,
        )


def sample(jobs: dict) -> str:
    """The first documents of each training shard, SAMPLE characters of all, about."""
    taken, share = [], SAMPLE // max(1, len(jobs) - 1)
    for shard, parts in jobs.items():
        room = share if shard != "validation.bin" else 0
        texts = documents(parts)
        while room > 0 and (text := next(texts, None)) is not None:
            taken.append(text)
            room -= len(text)
    return "".join(taken)


def in_processes(calls: dict[str, tuple], finished: Callable[[str, dict], None]) -> None:
    """make_shard(*arguments) for each of `calls`, a process a core, and `finished(shard, entry)` after each, here."""
    processes = min(cores(), len(calls))
    if processes <= 1:
        for shard, arguments in calls.items():
            finished(shard, make_shard(*arguments))
        return
    # spawn, as a fork would copy the locks of torch's threads without the threads.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), tie_to_parent)
    try:
        futures = {pool.submit(make_shard, *arguments): shard for shard, arguments in calls.items()}
        for future in as_completed(futures):
            finished(futures[future], future.result())
    except BrokenProcessPool:
        raise UserError(
            "a process that made shards was killed, perhaps for want of memory (a process takes up to 1 GB): see to that and "
            "run the same command again; finished shards are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def tie_to_parent() -> None:
    """In each process: die with the parent, however it dies, and at Ctrl-C; and encode in one thread."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_shard(path: Path, parts: tuple, saved: str, dtype: str) -> dict:
    """Write the tokens of some parts, by the tokenizer whose JSON is `saved`, to `path` -> the shard's entry in the index."""
    tokenizer, digest, entry = (
        tokenizer_from_json(saved),
        hashlib.sha256(),
        {"tokens": 0, "bytes": 0},
    )

    def write(file) -> None:
        for text in batches(documents(parts)):
            tokens = tokenizer.encode(text).astype(dtype)
            entry["tokens"] += len(tokens)
            entry["bytes"] += len(text.encode())
            digest.update(tokens)
            file.write(tokens)

    write_atomic(path, write)
    return entry | {"sha256": digest.hexdigest()}


def batches(texts: Iterator[str]) -> Iterator[str]:
    """Texts joined to BATCH characters or more."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield "".join(batch)
            batch, size = [], 0
    if batch:
        yield "".join(batch)


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is missing, against other processes of this machine."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    except OSError as error:
        raise unwritable(folder, error) from error
    with file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- the order of reading


ROUNDS = 6


def window_starts(step: int, batch_size: int, total: int, T: int, seed: int) -> np.ndarray:
    """Where the windows of batch `step` begin in `total` tokens: (batch_size,), int64. Each holds T + 1 of them.

    An epoch is every T-th place of the corpus, from an offset below T of its own, in an order of its own: each window once, no
    two overlapping but in the token that one predicts last and the next reads first. (Up to 2 T - 1 tokens at the corpus's
    ends are left out, others in each epoch.) The position is the step alone. Of P processes, number r reads [r::P] of these:
    what they read together is the batch of one process. `total`: T + 1 at least.
    """
    count = max(1, (total - 1) // T - 1)  # of windows, whatever the offset
    first, last, starts = step * batch_size, (step + 1) * batch_size, []
    for epoch in range(first // count, (last - 1) // count + 1):
        *keys, offset = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS + 1, np.uint64)
        places = np.arange(max(first - epoch * count, 0), min(last - epoch * count, count))
        offset = int(offset) % min(T, total - count * T)
        starts.append(offset + T * permuted(places, count, keys))
    return np.concatenate(starts)


def permuted(places: np.ndarray, count: int, keys: Sequence[np.uint64]) -> np.ndarray:
    """Where a permutation of range(count), drawn by `keys`, takes each of `places`: int64, in no more memory than they take.

    A Feistel network over the pairs (a, b) of numbers below the root of `count`, walked on until it is back in range (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"): each round can be undone, so no two places meet.
    """
    side = np.uint64(math.isqrt(count - 1) + 1)  # side * side >= count
    places = places.astype(np.uint64)
    outside = np.ones(len(places), bool)
    while outside.any():
        a, b = np.divmod(places[outside], side)
        for key in keys:
            a, b = b, (a + mix(b + key) % side) % side
        places[outside] = a * side + b
        outside = places >= count
    return places.astype(np.int64)
