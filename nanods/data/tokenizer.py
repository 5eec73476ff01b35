"""Tokenizers: text to token ids and back, as bytes or with byte-level BPE.

`ByteTokenizer`: the ids are the UTF-8 bytes, so no text is out of vocabulary. `BPETokenizer` adds
one idea: frequent pairs of adjacent tokens are merged into new tokens (Sennrich et al. 2016,
arXiv:1508.07909). It starts from all 256 bytes, as GPT-2 does, so again no text is out of
vocabulary. The library `tokenizers` trains and merges; Karpathy's minbpe shows how that works.
Left out on purpose: special tokens, normalisation.

The library takes time that grows with the square of a word's length, and a text without blanks
(DNA, some scripts) can be one word of megabytes. So `pieces` cuts such words.

Both have `vocab_size`, `encode`, `decode`, `decode_bytes` and `to_json`; a checkpoint stores the
JSON.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable

import numpy as np
import tokenizers

from nanods.errors import UserError

LONGEST_WORD = 256
"""Characters in a row without a blank, or without a letter or digit, that stay in one piece."""
LONG_WORD = re.compile(
    rf"(?<![^\W_])[^\W_]{{{LONGEST_WORD + 1},}}|(?<![\W_])[\W_]{{{LONGEST_WORD + 1},}}"
)
ENCODE_BATCH = 20_000  # pieces encoded between two moments at which Ctrl-C is heard


class ByteTokenizer:
    """One token for each byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids, int64 (n_bytes,).

        Characters that UTF-8 cannot encode (lone surrogates) become "?".
        """
        data = text.encode("utf-8", errors="replace")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the tokens.

        They may end inside a character. To stream them, decode them with
        `codecs.getincrementaldecoder("utf-8")(errors="replace")`.
        """
        return bytes(int(i) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return JSON from which `tokenizer_from_json` restores this tokenizer."""
        return json.dumps({"type": "bytes"})


class BPETokenizer:
    """Byte-level BPE, restored from the JSON of the library `tokenizers`.

    `BPETokenizer.train` makes a new one. No token crosses the end of a line, so encoding a text
    line by line, in parallel, gives the same tokens as encoding it at once.
    """

    def __init__(self, saved: str):
        """Restore a tokenizer from `saved`, the output of `to_json`.

        Raises UserError if `saved` is damaged.
        """
        byte_of = byte_of_symbol()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(saved)
            vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
            self._bytes = [bytes(byte_of[symbol] for symbol in token) for token, _ in vocabulary]
            if len({token for token in self._bytes if len(token) == 1}) < 256:
                raise ValueError("it lacks some of the 256 bytes")
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"the saved tokenizer is damaged ({error}): take another checkpoint"
            ) from error
        self.vocab_size = len(self._bytes)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BPETokenizer":
        """Return a new tokenizer of `vocab_size` tokens: 256 bytes, then merges learned on `text`.

        `text` is the training split, never the validation split. The same text gives the same
        tokenizer. A text with too few pairs to merge gives fewer tokens.
        """
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        # GPT-2's pattern: a merge stays within one word and the space before it, one number, or
        # one run of punctuation.
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=True
        )
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        run_in_thread(lambda: tokenizer.train_from_iterator(pieces(text), trainer))
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids, int64 (n_tokens,).

        Characters that UTF-8 cannot encode (lone surrogates) become "?".
        """
        clean = text.encode("utf-8", errors="replace").decode()
        ids, texts = [np.empty(0, np.int64)], pieces(clean)
        for start in range(0, len(texts), ENCODE_BATCH):
            encoded = self._tokenizer.encode_batch_fast(texts[start : start + ENCODE_BATCH])
            ids.append(np.array([i for piece in encoded for i in piece.ids], dtype=np.int64))
        return np.concatenate(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the tokens, as `ByteTokenizer.decode_bytes` does."""
        return b"".join(self._bytes[int(i)] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return JSON from which `tokenizer_from_json` restores this tokenizer."""
        return self._tokenizer.to_str()


def tokenizer_from_json(text: str) -> ByteTokenizer | BPETokenizer:
    """Return the tokenizer that `to_json` saved. Raises UserError if the JSON is damaged."""
    try:
        saved = json.loads(text)
        is_bytes = saved.get("type") == "bytes"
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"the saved tokenizer is damaged ({error}): take another checkpoint"
        ) from error
    return ByteTokenizer() if is_bytes else BPETokenizer(text)


def lines(text: str) -> list[str]:
    """Return the lines of a text, each with its "\\n"; joined, they give the text again.

    str.splitlines would also split at other characters, such as U+2028.
    """
    *complete, rest = text.split("\n")
    result = [line + "\n" for line in complete]
    if rest:
        result.append(rest)
    return result


def pieces(text: str) -> list[str]:
    """Return what a BPE encodes separately: lines, cut inside words longer than LONGEST_WORD.

    A word is a run of letters and digits, or a run of all other characters. The cuts depend on the
    word alone, so encoding the pieces of a text separately gives the tokens of the whole text.
    """
    result = []
    for line in lines(text):
        start = 0
        if len(line) > LONGEST_WORD:
            for word in LONG_WORD.finditer(line):
                for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
                    result.append(line[start:cut])
                    start = cut
        result.append(line[start:])
    return result


def run_in_thread(call: Callable[[], object]) -> None:
    """Run a long call of a library in another thread. Python handles Ctrl-C in the main thread
    only, and only between two of its own instructions."""
    errors = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # daemon: it ends with the program
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]


def byte_of_symbol() -> dict[str, int]:
    """Return GPT-2's alphabet, symbol -> byte.

    A printable byte of Latin-1 is written as itself; the others, in order, as U+0100, U+0101, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        alphabet[chr(256 + i)] = byte
    return alphabet
