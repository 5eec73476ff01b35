"""Corpora as token ids: `load_text("pydocs")` memory-maps tokens for training and validation.

A corpus is split (the first 90% of the characters train, the last 10% validate, unless it has a
validation split or --val-data gives one), encoded, and
cached in `data/cache/TEXT_HASH-TOKENIZER_HASH.npy`. The hashes in the name mean that a cached file
can be missing or damaged, but never out of date. Its header holds the number of tokens: a truncated
file is detected and written again. nanods/data/shards.py loads a corpus that does not fit into
memory.
"""

import difflib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanods.data.decoding import decode_text, describe_format
from nanods.data.documents import FINEWEB
from nanods.data.download import data_dir, download, lock_data, write_atomic
from nanods.data.pydocs import pydocs_split, pydocs_text
from nanods.data.shards import Tokens, load_shards
from nanods.data.sources import (
    DATASETS_MARKERS,
    SUFFIXES,
    is_sharded_source,
    left_out,
    validation_text,
)
from nanods.data.splits import split_of
from nanods.data.statistics import describe_difference
from nanods.data.tokenizer import (
    LONGEST_WORD,
    BPETokenizer,
    ByteTokenizer,
    lines,
    pieces,
    tokenizer_from_json,
)
from nanods.errors import UserError

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
)
WIKITEXTS = {"wikitext-2": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}
NAMES = ("pydocs", "pydocs-train", "shakespeare", *WIKITEXTS, FINEWEB)


@dataclass(frozen=True)
class TextData:
    """A corpus as token ids.

    `train` and `val` are 1-D, read-only, of dtype uint16, or uint32 if the vocabulary has more than
    65,536 tokens. `train` is a `Tokens` object if the corpus comes in shards.
    """

    name: str  # one of NAMES, or a path
    sha256: str  # of the whole text in UTF-8; for shards, of their hashes
    train: np.memmap | Tokens
    val: np.memmap
    tokenizer: ByteTokenizer | BPETokenizer
    val_bytes: int  # of the validation text: bits per byte = nats per token * tokens / ln 2 / bytes
    validation: str = ""  # where the validation text comes from
    notices: tuple[str, ...] = ()  # what is left out or looks wrong

    def require(self, context_length: int) -> None:
        """Check that each split holds at least one context and the token after it.

        Raises UserError if not.
        """
        for split_name, tokens, fix in (
            ("training", self.train, ""),
            ("validation", self.val, "--val-data FILE, a larger --val-fraction, "),
        ):
            if len(tokens) < context_length + 1:
                raise UserError(
                    f"--data {self.name}: its {split_name} part has {len(tokens):,} tokens, and "
                    f"one context needs {context_length + 1:,} (--context-length {context_length} "
                    f"and the next token): take a longer text, {fix}or a shorter --context-length"
                )


def load_text(
    name_or_path: str,
    vocab_size: int = 256,
    val_data: str | None = None,
    val_fraction: float = 0.1,
) -> TextData:
    """Load a corpus as token ids.

    `name_or_path`: one of NAMES, a UTF-8 text file, a folder written by `datasets.save_to_disk`, a
    source that comes in shards (nanods/data/sources.py), or a folder of shards.
    `vocab_size`: 256 for bytes; a larger one for a BPE trained on the training split.
    `val_data`: a file or folder of texts for validation. All of the corpus is then for training.
    `val_fraction`: what is held out for validation, if the corpus has no validation split.

    Raises UserError for any mistake in the arguments, a failed download or a missing extra.
    """
    if val_data is not None:
        if Path(val_data).resolve() == Path(name_or_path).resolve():
            raise UserError(f"--val-data {val_data}: the same as --data; leave it out, or give one")
        try:
            val_text, val_source = validation_text(val_data)
        except UserError as error:
            raise UserError(str(error).replace("--data", "--val-data", 1)) from error
    fraction = 0.0 if val_data is not None else val_fraction
    if is_sharded_source(name_or_path):
        shards = load_shards(name_or_path, vocab_size, tokenizer_for, fraction)
        data = TextData(name=name_or_path, **vars(shards))
    else:
        splits = read_splits(name_or_path, fraction)
        if not splits.train or not (splits.val or val_data is not None):
            raise UserError(
                f"--data {name_or_path}: the text is too short to split into training and "
                "validation; take a longer one, or give the validation text as --val-data FILE"
            )
        tokenizer = tokenizer_for(splits.train, vocab_size)
        data = TextData(
            name=name_or_path,
            sha256=sha256(splits.train + splits.val),
            train=encode_cached(splits.train, tokenizer),
            val=encode_cached(splits.val, tokenizer) if splits.val else np.empty(0, np.uint16),
            tokenizer=tokenizer,
            val_bytes=len(splits.val.encode()),
            validation=splits.validation,
            notices=splits.notices,
        )
    if val_data is not None:
        data = replace(
            data,
            sha256=sha256(data.sha256 + sha256(val_text)),
            val=encode_cached(val_text, data.tokenizer),
            val_bytes=len(val_text.encode()),
            validation=val_source,
        )
    difference = describe_difference(data)
    return replace(data, notices=(*data.notices, difference)) if difference else data


def sha256(text: str) -> str:
    """Return the sha256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


# ---- reading a corpus ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """A corpus in memory. The fields are those of TextData, as texts."""

    train: str
    val: str
    validation: str
    notices: tuple[str, ...] = ()


def read_splits(name: str, fraction: float) -> Splits:
    """Return the training text and the validation text of a corpus: its own validation split, or
    `fraction` of it; with a fraction of 0 no validation text."""
    if name == "pydocs":
        return hold_out_end(pydocs_text(), fraction)
    if name == "pydocs-train":
        train, val = pydocs_split()
        return Splits(train, val if fraction else "", "the docstrings of held-out modules")
    if name == "shakespeare":
        path = download(SHAKESPEARE_URLS, data_dir() / "tinyshakespeare.txt", SHAKESPEARE_SHA256)
        return hold_out_end(path.read_bytes().decode(), fraction)
    if name in WIKITEXTS:
        return read_dataset(name, fraction)
    try:
        if Path(name).is_dir():
            return read_dataset(name, fraction)
        data = Path(name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise unknown_corpus(name) from None
    except OSError as error:
        raise UserError(
            f"--data {name}: cannot be read ({error.strerror}); give a UTF-8 text file"
        ) from error
    text = decode_text(name, data)
    looks = describe_format(text)
    notices = (f"{name} {looks}",) if looks else ()
    return replace(hold_out_end(text, fraction), notices=notices)


def hold_out_end(text: str, fraction: float) -> Splits:
    """Return the splits of a text that has no validation split of its own."""
    return Splits(*split(text, fraction), f"the last {100 * fraction:g}% of the text")


def split(text: str, fraction: float = 0.1) -> tuple[str, str]:
    """Split at the characters: by default the first 90% and the last 10%, as nanoGPT does."""
    cut = int(len(text) * (1 - fraction))
    return text[:cut], text[cut:]


def unknown_corpus(name: str) -> UserError:
    """Return the UserError for a name that is no data set or file. It suggests a close name."""
    folder = Path(name).parent
    siblings = [str(folder / path.name) for path in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(name, [*NAMES, *sorted(siblings)], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return UserError(
        f"--data {name}: no such data set or file; {hint}Data sets: {', '.join(NAMES)}; or give "
        "the path of a UTF-8 text file or of a folder"
    )


def read_dataset(name: str, fraction: float) -> Splits:
    """Return the splits of WikiText or of a folder written by `datasets.save_to_disk`.

    WikiText: Merity et al. 2016, arXiv:1609.07843. If the data set has a validation split, by any
    of its usual names, its own splits are used; if not, its training split is split as any text.
    Each row of column "text" ends in a
    newline.

    Raises UserError if the data set cannot be loaded or lacks the split or the column.
    """
    is_saved_dataset = any((Path(name) / marker).is_file() for marker in DATASETS_MARKERS)
    if name not in WIKITEXTS and not is_saved_dataset:
        others = left_out(Path(name))
        raise UserError(
            f"--data {name}: a directory, but not one written by datasets' save_to_disk, and no "
            f"text in it to read; give a UTF-8 text file or a folder of {', '.join(SUFFIXES)} files"
            f"{'; ' + others if others else ''}"
        )
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {name} needs the library datasets: `make setup EXTRAS=datasets`, or "
            "pip install 'nanods[datasets]'"
        ) from None
    try:
        if name in WIKITEXTS:
            dataset = datasets.load_dataset("Salesforce/wikitext", WIKITEXTS[name])
        else:
            dataset = datasets.load_from_disk(name)
    except Exception as error:  # the library, its network and its file formats raise anything
        raise UserError(
            f"--data {name}: the library datasets could not load it ({type(error).__name__}: "
            f"{error}); check the network or the folder, or fetch it elsewhere, save it with "
            "save_to_disk and give that folder as --data"
        ) from error
    splits = dataset if isinstance(dataset, dict) else {"train": dataset}
    if "train" not in splits:
        raise UserError(
            f"--data {name}: no split called train, only {', '.join(splits)}; rename one"
        )
    train = join_rows(name, splits["train"])
    own = next((split for split in splits if split_of(split) == "val"), None)
    if own and fraction:
        result = Splits(train, join_rows(name, splits[own]), f"its split {own}")
    else:
        result = hold_out_end(train, fraction)
    unused = [each for each in splits if each not in ("train", own if fraction else None)]
    notices = (f"{name}: left out its split {' and '.join(unused)}",) if unused else ()
    return replace(result, notices=notices)


def join_rows(name: str, rows) -> str:
    """Return the rows of column "text" as one text. A row without a newline at its end gets one."""
    if "text" not in rows.column_names:
        raise UserError(
            f"--data {name}: no column called text, only {', '.join(rows.column_names)}; rename one"
        )
    return "".join(row if row.endswith("\n") else row + "\n" for row in rows["text"])


# ---- tokens on disk ------------------------------------------------------------------------------


def tokenizer_for(
    train: str, vocab_size: int, at_most: bool = False
) -> ByteTokenizer | BPETokenizer:
    """Return a byte tokenizer for a vocabulary of 256, else a BPE trained on `train`.

    With `at_most`, a text with too few pairs to merge gives fewer tokens, and an empty one bytes;
    without it, both raise UserError. So does a `vocab_size` below 256.
    """
    if vocab_size < 256:
        raise UserError(
            f"--vocab-size {vocab_size}: at least 256, one token for each byte (256 means bytes "
            "alone)"
        )
    if vocab_size == 256 or (at_most and not train):
        return ByteTokenizer()
    tokenizer = load_or_train_bpe(train, vocab_size)
    if tokenizer.vocab_size < vocab_size and not at_most:
        raise UserError(
            f"--vocab-size {vocab_size}: this text gives a BPE vocabulary of "
            f"{tokenizer.vocab_size} at most; take a larger text, or "
            f"--vocab-size {tokenizer.vocab_size} or less"
        )
    return tokenizer


def load_or_train_bpe(train: str, vocab_size: int) -> BPETokenizer:
    """Return the BPE of this training text, from the cache or newly trained."""
    path = data_dir() / "cache" / f"{sha256(train)[:16]}-bpe{vocab_size}.json"
    cached = read_bpe(path, vocab_size)
    if cached is None:
        with lock_data(path):
            cached = read_bpe(path, vocab_size)  # another process may have trained it meanwhile
            if cached is None:
                cached = train_bpe(train, vocab_size)
                write_atomic(path, lambda file: file.write(cached.to_json().encode()))
    return cached


def train_bpe(train: str, vocab_size: int) -> BPETokenizer:
    """Return a new BPE. Say how many words are cut."""
    cuts = len(pieces(train)) - len(lines(train))
    note = f"; words longer than {LONGEST_WORD} characters are cut ({cuts:,} cuts)" if cuts else ""
    print(f"tokenizer  learning up to {vocab_size:,} tokens from {len(train):,} characters{note}")
    return BPETokenizer.train(train, vocab_size)


def read_bpe(path: Path, vocab_size: int) -> BPETokenizer | None:
    """Return the BPE of a cached file; None if it is missing or damaged."""
    try:
        cached = tokenizer_from_json(path.read_text(encoding="utf-8"))
    except (OSError, UserError, ValueError):
        return None
    is_right = isinstance(cached, BPETokenizer) and cached.vocab_size <= vocab_size
    return cached if is_right else None


def encode_cached(text: str, tokenizer: ByteTokenizer | BPETokenizer) -> np.memmap:
    """Return the tokens of a text, memory-mapped from the cache.

    The text is encoded first if the cached file is missing or damaged.
    """
    path = data_dir() / "cache" / f"{sha256(text)[:16]}-{sha256(tokenizer.to_json())[:8]}.npy"
    tokens = open_tokens(path)
    if tokens is None:
        with lock_data(path):
            tokens = open_tokens(path)  # another process may have written it meanwhile
            if tokens is None:
                dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
                encoded = encode_corpus(text, tokenizer, dtype)
                write_atomic(path, lambda file: np.save(file, encoded))
                tokens = open_tokens(path)
    return tokens


def open_tokens(path: Path) -> np.memmap | None:
    """Return the memory-mapped tokens of a cached file; None if it is missing or damaged."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # missing, damaged or truncated, empty
        return None
    return tokens if path.stat().st_size == tokens.offset + tokens.nbytes else None


def encode_corpus(text: str, tokenizer: ByteTokenizer | BPETokenizer, dtype: type) -> np.ndarray:
    """Return the tokens of a text, encoded 20,000 lines at a time.

    Encoding the whole text at once would need 8 bytes for each token (int64).
    """
    texts, step = pieces(text), 20_000
    tokens = []
    for start in tqdm(range(0, len(texts), step), desc="encoding", leave=False, disable=None):
        joined = "".join(texts[start : start + step])
        tokens.append(tokenizer.encode(joined).astype(dtype))
    return np.concatenate(tokens)
