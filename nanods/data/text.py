"""Corpora to token files: `load_text("pydocs")` gives memory-mapped tokens for training and validation.

Text -> split (first 90% of the characters train, last 10% validation) -> tokens -> `data/cache/HASH-TOKENIZER.npy`.
A token file is named by the hashes of the text and of the tokenizer in it, so it can be missing or damaged, but never
stale; its header holds the number of tokens, so a truncated one is seen and made again. What does not fit into memory goes
another way, through nanods/data/shards.py.
"""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanods.data.download import data_dir, download, write_atomic
from nanods.data.pydocs import pydocs_text
from nanods.data.shards import Tokens, load_shards
from nanods.data.sources import FINEWEB, SAVED, decode_text, is_source
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer, lines, tokenizer_from_json
from nanods.errors import UserError

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_URLS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
)
WIKITEXTS = {"wikitext-2": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}
NAMES = ("pydocs", "shakespeare", *WIKITEXTS, FINEWEB)


@dataclass(frozen=True)
class TextData:
    """A corpus as token ids."""

    name: str  # a name of NAMES, or the path that was given
    sha256: str  # of the whole text in UTF-8; of shards, of their hashes
    train: (
        np.memmap | Tokens
    )  # token ids, 1-D, uint16 (uint32 from 65,537 tokens of vocabulary), read-only; Tokens for shards
    val: np.memmap
    tokenizer: ByteTokenizer | BPETokenizer
    val_bytes: int  # length of the validation text in UTF-8: bits per byte = nats per token * tokens / ln 2 / bytes

    def require(self, context_length: int) -> None:
        """Raises UserError unless each split has room for one context and its next token."""
        for split, tokens in (("training", self.train), ("validation", self.val)):
            if len(tokens) < context_length + 1:
                raise UserError(
                    f"--data {self.name}: its {split} part has {len(tokens):,} tokens, and one context needs "
                    f"{context_length + 1:,} (--context-length {context_length} and the next token): "
                    "take a longer text or a shorter --context-length"
                )


def load_text(name_or_path: str, vocab_size: int = 256) -> TextData:
    """Load a corpus by name (see NAMES), from a UTF-8 text file, from a folder of `datasets.save_to_disk`, or in shards
    (`is_source`) from a folder of .txt, .jsonl and .parquet files.

    `vocab_size` 256 means bytes, more means a BPE trained on the training part. Raises UserError for every mistake in
    `name_or_path` or `vocab_size`, for a failed download and for a missing extra.
    """
    if is_source(name_or_path):
        return TextData(
            name=name_or_path, **vars(load_shards(name_or_path, vocab_size, tokenizer_for))
        )
    train, val = read_splits(name_or_path)
    if not train or not val:
        raise UserError(
            f"--data {name_or_path}: the text is too short to split into training and validation"
        )
    tokenizer = tokenizer_for(train, vocab_size)
    return TextData(
        name=name_or_path,
        sha256=sha256(train + val),
        train=token_file(train, tokenizer),
        val=token_file(val, tokenizer),
        tokenizer=tokenizer,
        val_bytes=len(val.encode()),
    )


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- corpora -> (train text, validation text)


def read_splits(name: str) -> tuple[str, str]:
    if name == "pydocs":
        return split(pydocs_text())
    if name == "shakespeare":
        path = download(SHAKESPEARE_URLS, data_dir() / "tinyshakespeare.txt", SHAKESPEARE_SHA256)
        return split(path.read_bytes().decode())
    if name in WIKITEXTS:
        return read_dataset(name)
    try:
        if Path(name).is_dir():
            return read_dataset(name)
        data = Path(name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise unknown(name) from None
    except OSError as error:
        raise UserError(
            f"--data {name}: cannot be read ({error.strerror}); give a UTF-8 text file"
        ) from error
    return split(decode_text(name, data))


def split(text: str) -> tuple[str, str]:
    """The first 90% and the last 10% of the characters, as nanoGPT splits."""
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def unknown(name: str) -> UserError:
    folder = Path(name).parent
    siblings = [str(folder / path.name) for path in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(name, [*NAMES, *sorted(siblings)], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return UserError(
        f"--data {name}: no such data set or file; {hint}Data sets: {', '.join(NAMES)}; or give the path of a UTF-8 text file "
        "or of a folder"
    )


def read_dataset(name: str) -> tuple[str, str]:
    """The text of WikiText (Merity et al. 2016, arXiv:1609.07843) or of a folder written by `save_to_disk`.

    The set's own train and validation splits, else its rows split as any text; the rows of column "text" become lines.
    """
    if name not in WIKITEXTS and not any((Path(name) / mark).is_file() for mark in SAVED):
        raise UserError(
            f"--data {name}: a directory, but not one written by datasets' save_to_disk, and no .txt, .jsonl or .parquet file "
            "in it; give a UTF-8 text file or a folder of such files"
        )
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {name} needs the library datasets: `make setup EXTRAS=datasets`, or pip install 'nanods[datasets]'"
        ) from None
    try:
        if name in WIKITEXTS:
            found = datasets.load_dataset("Salesforce/wikitext", WIKITEXTS[name])
        else:
            found = datasets.load_from_disk(name)
    except Exception as error:  # whatever the library, its network and its file formats raise
        raise UserError(
            f"--data {name}: the library datasets could not load it ({type(error).__name__}: {error}); check the "
            "network or the folder, or fetch it elsewhere, save it with save_to_disk and give that folder as --data"
        ) from error
    parts = found if isinstance(found, dict) else {"train": found}
    if "train" not in parts:
        raise UserError(
            f"--data {name}: no split called train, only {', '.join(parts)}; rename one"
        )
    if "validation" in parts:
        return joined(name, parts["train"]), joined(name, parts["validation"])
    return split(joined(name, parts["train"]))


def joined(name: str, rows) -> str:
    if "text" not in rows.column_names:
        raise UserError(
            f"--data {name}: no column called text, only {', '.join(rows.column_names)}; rename one"
        )
    return "".join(row if row.endswith("\n") else row + "\n" for row in rows["text"])


# ---- text -> tokens on disk


def tokenizer_for(train: str, vocab_size: int) -> ByteTokenizer | BPETokenizer:
    """Bytes for a vocabulary of 256, a BPE of this training text for a larger one. Raises UserError for a smaller one."""
    if vocab_size < 256:
        raise UserError(
            f"--vocab-size {vocab_size}: at least 256, one token for each byte (256 means bytes alone)"
        )
    return ByteTokenizer() if vocab_size == 256 else trained_bpe(train, vocab_size)


def trained_bpe(train: str, vocab_size: int) -> BPETokenizer:
    """The BPE of this training text, from the cache or newly trained."""
    path = data_dir() / "cache" / f"{sha256(train)[:16]}-bpe{vocab_size}.json"
    if path.is_file():
        try:
            cached = tokenizer_from_json(path.read_text(encoding="utf-8"))
            if isinstance(cached, BPETokenizer) and cached.vocab_size == vocab_size:
                return cached
        except (UserError, ValueError):
            pass  # damaged: train it again; if the library is missing, that says so
    tokenizer = BPETokenizer.train(train, vocab_size)
    write_atomic(path, lambda file: file.write(tokenizer.to_json().encode()))
    return tokenizer


def token_file(text: str, tokenizer: ByteTokenizer | BPETokenizer) -> np.memmap:
    """The tokens of a text, memory-mapped from the cache, encoded first where they are not there whole."""
    path = data_dir() / "cache" / f"{sha256(text)[:16]}-{sha256(tokenizer.to_json())[:8]}.npy"
    if (tokens := open_tokens(path)) is None:
        dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
        encoded = encode_corpus(text, tokenizer, dtype)
        write_atomic(path, lambda file: np.save(file, encoded))
        tokens = open_tokens(path)
    return tokens


def open_tokens(path: Path) -> np.memmap | None:
    try:
        tokens = np.load(path, mmap_mode="r")
    except (
        OSError,
        ValueError,
        EOFError,
    ):  # missing, damaged or shorter than its header says, empty
        return None
    return tokens if path.stat().st_size == tokens.offset + tokens.nbytes else None


def encode_corpus(text: str, tokenizer: ByteTokenizer | BPETokenizer, dtype: type) -> np.ndarray:
    """Encode in pieces of whole lines: int64 ids of the whole text at once would need 8 bytes each."""
    rows, step = lines(text), 20_000
    pieces = [
        tokenizer.encode("".join(rows[start : start + step])).astype(dtype)
        for start in tqdm(range(0, len(rows), step), desc="encoding", leave=False, disable=None)
    ]
    return np.concatenate(pieces)
