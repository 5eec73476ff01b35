"""Corpora larger than memory: token shards on disk, made in parallel, resumable and verified.

A shard is a file of token ids and nothing else, little-endian uint16 (uint32 if the vocabulary has
more than 65,536 tokens), like nanoGPT's train.bin. A folder of shards holds `train-00000.bin`, ...,
`validation.bin`, `tokenizer.json` and `shards.json`, the index: the sha256 of the tokenizer and,
for each finished shard, its number of tokens, its bytes of text and its sha256. The folder is in
`data/shards/`, named after the source and its `fingerprint`. It can be moved to another machine and
given there as --data.

`window_starts` gives the order in which training reads the tokens.
"""

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

from nanods.data.documents import documents
from nanods.data.download import data_dir, file_sha256, lock_data, write_atomic
from nanods.data.random_bits import mix_bits
from nanods.data.sources import INDEX, fingerprint, plan
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_json
from nanods.errors import UserError

Tokenizer = ByteTokenizer | BPETokenizer
SAMPLE = 1 << 25  # characters that a BPE learns from, about, spread evenly over the training shards
BATCH = 1 << 20  # characters encoded at once


class Tokens:
    """Several arrays of token ids that read as one: `len(x)` and `x[a:b]`, 1-D."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts, self.dtype = list(parts), parts[0].dtype
        self.ends = np.cumsum([len(part) for part in parts])  # (n_parts,)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """Return the tokens of a slice: a view if they are in one part, else a copy.

        Raises IndexError if the step of the slice is not 1.
        """
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
    """The contents of a folder of shards. The fields are those of TextData."""

    sha256: str  # of the hashes of the tokenizer and the shards
    train: Tokens
    val: np.ndarray  # memory-mapped, one shard
    tokenizer: Tokenizer
    val_bytes: int
    validation: str
    notices: tuple[str, ...]


# ---- opening and verifying -----------------------------------------------------------------------


def load_shards(
    name: str, vocab_size: int, tokenizer_for: Callable[[str, int], Tokenizer], fraction: float
) -> Shards:
    """Return the verified shards of a source. Missing or damaged shards are made first.

    `name`: a source or a folder of shards (see `is_sharded_source`).
    `tokenizer_for(text, vocab_size)` returns the tokenizer; text is a sample of the training split,
    or empty for bytes.
    `fraction` is held out for validation (see `plan`); a folder of shards has been split before.

    Raises UserError for a source that cannot be read, and for a damaged folder of shards, which
    cannot be repaired without its source.
    """
    if (Path(name) / INDEX).is_file():
        folder = Path(name)
        check_shards_folder(name, folder, vocab_size)
    else:
        kind = "bytes" if vocab_size == 256 else f"bpe{vocab_size}"
        folder_name = f"{Path(name).resolve().name}-{fingerprint(name, fraction)[:12]}-{kind}"
        folder = data_dir() / "shards" / folder_name
        if find_damage(folder, read_index(folder)):
            # A second process waits for the lock, and then finds the shards of the first one.
            with lock_data(folder / INDEX):
                make_shards(name, folder, vocab_size, tokenizer_for, fraction)
    return open_shards(folder)


def check_shards_folder(name: str, folder: Path, vocab_size: int) -> None:
    """Check a folder of shards that the user gave. Raises UserError if it cannot be used."""
    index = read_index(folder)
    damage = find_damage(folder, index)
    if damage:
        source = f" ({index['source']})" if index else ""
        raise UserError(
            f"--data {name}: {'; '.join(list(damage.values())[:3])}. Copy these shards here again, "
            f"or give what they were made from{source} as --data, to make them again"
        )
    if index["vocab_size"] != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the shards in {name} have a vocabulary of "
            f"{index['vocab_size']}; take --vocab-size {index['vocab_size']}, or give what they "
            "were made from as --data"
        )


def open_shards(folder: Path) -> Shards:
    """Return the shards of a complete folder, memory-mapped."""
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
        validation=index.get("validation", "the shard validation.bin"),
        notices=tuple(index.get("notices", ())),
    )


def memory_map(path: Path, tokens: int, dtype: str) -> np.ndarray:
    """Return a file of token ids, memory-mapped."""
    if tokens == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r", shape=(tokens,))


def read_index(folder: Path) -> dict | None:
    """Return the index of a folder of shards; None if it is missing or damaged."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        is_valid = {"source", "tokenizer", "vocab_size"} <= index.keys()
        is_valid = is_valid and index["dtype"] in ("<u2", "<u4")
        for entry in index["shards"].values():
            is_valid = is_valid and {"tokens", "bytes", "sha256"} <= entry.keys()
        is_valid = is_valid and index["planned"] >= len(index["shards"])
        return index if is_valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_damage(folder: Path, index: dict | None) -> dict[str, str]:
    """Return the problem of each file that is missing or differs from the index; {} if none."""
    if index is None:
        return {INDEX: f"{INDEX} is missing or damaged"}
    problems = {}
    problem = check_file(folder / "tokenizer.json", None, index["tokenizer"])
    if problem is not None:
        problems["tokenizer.json"] = problem
    token_bytes = np.dtype(index["dtype"]).itemsize
    with ThreadPoolExecutor(min(8, available_cores())) as pool:  # hashlib releases the GIL
        futures = {
            name: pool.submit(
                check_file, folder / name, entry["tokens"] * token_bytes, entry["sha256"]
            )
            for name, entry in index["shards"].items()
        }
        for name, future in tqdm(
            futures.items(), desc="verifying shards", unit="shard", leave=False, disable=None
        ):
            problem = future.result()
            if problem is not None:
                problems[name] = problem
    n_missing = index["planned"] - len(index["shards"])
    if not problems and n_missing:
        problems[INDEX] = f"{n_missing} of {index['planned']} shards are not made yet (interrupted)"
    return problems


def check_file(path: Path, size: int | None, sha256: str) -> str | None:
    """Return the problem of a file that should have this size in bytes (None: any) and this hash.

    Return None if there is no problem.
    """
    try:
        actual_size = path.stat().st_size
        if size is not None and actual_size != size:
            return f"{path.name} has {actual_size:,} bytes and should have {size:,}"
        if file_sha256(path) != sha256:
            return f"{path.name} is corrupt (its sha256 differs)"
        return None
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


# ---- making shards -------------------------------------------------------------------------------


def make_shards(
    name: str,
    folder: Path,
    vocab_size: int,
    tokenizer_for: Callable[[str, int], Tokenizer],
    fraction: float,
) -> None:
    """Make the shards of a source that are missing or damaged.

    Each shard is entered in the index as soon as it is finished, so a killed run loses only the
    shards that it was making. Raises UserError for a source that cannot be read.
    """
    # The temporary files of a killed run. The lock ensures that no process is writing one.
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    old_index = read_index(folder)
    damage = find_damage(folder, old_index)
    if old_index and not damage:
        return
    for file, problem in damage.items():
        if file != INDEX:
            print(f"warning: {folder}: {problem}; making it again from {name}", file=sys.stderr)
    planned = plan(name, fraction)
    jobs = planned.shards
    if planned.validation:
        print(f"validation {planned.validation}")
    for notice in planned.notices:
        print(f"notice     {notice}")
    if old_index and "tokenizer.json" not in damage:
        saved = (folder / "tokenizer.json").read_text(encoding="utf-8")
    else:
        text = sample_text(jobs) if vocab_size > 256 else ""
        saved = tokenizer_for(text, vocab_size).to_json()
        write_atomic(folder / "tokenizer.json", lambda file: file.write(saved.encode()))
    index = {
        "source": name,
        "tokenizer": hashlib.sha256(saved.encode()).hexdigest(),
        "vocab_size": vocab_size,
        "dtype": "<u2" if vocab_size <= 65536 else "<u4",
        "planned": len(jobs),
        "validation": planned.validation,
        "notices": list(planned.notices),
    }
    done = {}
    if old_index and all(
        old_index.get(key) == value for key, value in index.items() if key != "source"
    ):
        for shard, entry in old_index["shards"].items():
            if shard not in damage:
                done[shard] = entry
    calls = {
        shard: (folder / shard, parts, saved, index["dtype"])
        for shard, parts in jobs.items()
        if shard not in done
    }
    with tqdm(total=len(jobs), initial=len(done), desc="shards", unit="shard", disable=None) as bar:

        def on_finished(shard: str, entry: dict) -> None:
            done[shard] = entry
            index["shards"] = {shard: done[shard] for shard in jobs if shard in done}
            data = json.dumps(index, indent=1).encode()
            write_atomic(folder / INDEX, lambda file: file.write(data))
            bar.update()
            bar.set_postfix_str(f"{sum(entry['tokens'] for entry in done.values()):,} tokens")

        make_in_processes(calls, on_finished)


def sample_text(jobs: dict) -> str:
    """Return the first documents of each training shard, about SAMPLE characters in total."""
    texts = []
    share = SAMPLE // max(1, len(jobs) - 1)
    for shard, parts in jobs.items():
        if shard == "validation.bin":
            continue
        characters_left = share
        shard_texts = documents(parts)
        while characters_left > 0 and (text := next(shard_texts, None)) is not None:
            texts.append(text)
            characters_left -= len(text)
    return "".join(texts)


def make_in_processes(calls: dict[str, tuple], on_finished: Callable[[str, dict], None]) -> None:
    """Call make_shard(*arguments) for each shard of `calls`, in one process for each CPU core.

    This process calls `on_finished(shard, entry)` after each. Raises UserError if a process is
    killed.
    """
    processes = min(available_cores(), len(calls))
    if processes <= 1 or len(calls) <= 2:  # a small corpus: starting processes takes longer
        for shard, arguments in calls.items():
            on_finished(shard, make_shard(*arguments))
        return
    # Spawn, because a fork would copy the locks of torch's threads without the threads.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), set_up_worker)
    try:
        futures = {pool.submit(make_shard, *arguments): shard for shard, arguments in calls.items()}
        for future in as_completed(futures):
            on_finished(futures[future], future.result())
    except BrokenProcessPool:
        raise UserError(
            "a process that made shards was killed, perhaps because memory ran out (a process "
            "takes up to 1 GB): free some memory and run the same command again; finished shards "
            "are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def set_up_worker() -> None:
    """Make this worker process end with its parent, however that ends, and encode in one thread."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def make_shard(path: Path, parts: tuple, saved: str, dtype: str) -> dict:
    """Write the tokens of some parts to `path`. Return the shard's entry in the index.

    `saved` is the tokenizer's JSON.
    """
    tokenizer = tokenizer_from_json(saved)
    checksum = hashlib.sha256()
    entry = {"tokens": 0, "bytes": 0}

    def write(file) -> None:
        for text in join_to_batches(documents(parts)):
            tokens = tokenizer.encode(text).astype(dtype)
            entry["tokens"] += len(tokens)
            entry["bytes"] += len(text.encode())
            checksum.update(tokens)
            file.write(tokens)

    write_atomic(path, write)
    return entry | {"sha256": checksum.hexdigest()}


def join_to_batches(texts: Iterator[str]) -> Iterator[str]:
    """Yield the texts joined to pieces of BATCH characters or more."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield "".join(batch)
            batch, size = [], 0
    if batch:
        yield "".join(batch)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- the order of reading ------------------------------------------------------------------------


ROUNDS = 6  # of the Feistel network


def window_starts(step: int, batch_size: int, total: int, T: int, seed: int) -> np.ndarray:
    """Return the start positions of the windows of batch `step`: (batch_size,) int64.

    A window holds T + 1 of the `total` tokens (at least T + 1). An epoch has a random offset below
    T and reads a window at every T-th position from there, in a random order. So it reads each
    window once; two neighbours overlap in one token, the last target of the first and the first
    input of the second. Up to 2 T - 1 tokens at the two ends of the corpus are left out of an
    epoch. Which ones changes with the offset, but the last (total - 1) % T + 1 always are.

    The position depends on `step` alone, so a resumed run needs no state. Of P processes, number r
    takes [r::P] of these windows: together they read the batch of one process.
    """
    count = max(1, (total - 1) // T - 1)  # windows in an epoch, for any offset
    first, last = step * batch_size, (step + 1) * batch_size
    starts = []
    for epoch in range(first // count, (last - 1) // count + 1):
        *keys, offset = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS + 1, np.uint64)
        indices = np.arange(max(first - epoch * count, 0), min(last - epoch * count, count))
        offset = int(offset) % min(T, total - count * T)
        starts.append(offset + T * permute(indices, count, keys))
    return np.concatenate(starts)


def permute(indices: np.ndarray, count: int, keys: Sequence[np.uint64]) -> np.ndarray:
    """Return where a permutation of range(count), drawn by `keys`, moves each index: int64.

    The permutation is never stored, so `count` may be huge. It is a Feistel network over the pairs
    (a, b) of numbers below sqrt(count), rounded up. A result outside range(count) goes through the
    network again until it is inside (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"). Each round is invertible, so no two indices meet.
    """
    side = np.uint64(math.isqrt(count - 1) + 1)  # side * side >= count
    permuted = indices.astype(np.uint64)
    outside = np.ones(len(permuted), bool)
    while outside.any():
        a, b = np.divmod(permuted[outside], side)
        for key in keys:
            a, b = b, (a + mix_bits(b + key) % side) % side
        permuted[outside] = a * side + b
        outside = permuted >= count
    return permuted.astype(np.int64)
