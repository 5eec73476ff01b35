"""Text to token ids and back: bytes, and byte-level BPE.

`ByteTokenizer`: the ids are the UTF-8 bytes, so nothing can be out of vocabulary. `BPETokenizer` adds one thing: pairs
of neighbours that are frequent in a corpus become tokens of their own (Sennrich et al. 2016, arXiv:1508.07909). It
starts from all 256 bytes, as GPT-2 did, so still nothing is out of vocabulary. The library `tokenizers` trains and
merges; Karpathy's minbpe shows how that works. Left out on purpose: special tokens, normalisation.

Both have `vocab_size`, `encode`, `decode`, `decode_bytes` and `to_json`; a checkpoint keeps the JSON.
"""

import json
from collections.abc import Iterable

import numpy as np

from nanods.errors import UserError


class ByteTokenizer:
    """One token per byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 of shape (bytes,). What no UTF-8 can say (lone surrogates) becomes "?"."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(
            np.int64
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind the tokens. They may end inside a character: stream them through
        `codecs.getincrementaldecoder("utf-8")(errors="replace")`."""
        return bytes(int(i) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "bytes"})


class BPETokenizer:
    """Byte-level BPE, from the JSON of the library `tokenizers` (extra `bpe`); `train` makes a new one.

    No token crosses a line's end: so a text can be encoded line by line, in parallel, with the same result.
    """

    def __init__(self, saved: str):
        """`saved`: what `to_json` gave. Raises UserError if it is not that."""
        try:
            self._tokenizer = import_tokenizers().Tokenizer.from_str(saved)
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"the saved tokenizer is damaged ({error}): take another checkpoint"
            ) from error
        byte_of = byte_of_symbol()
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        self._bytes = [bytes(byte_of[symbol] for symbol in token) for token, _ in vocabulary]
        self.vocab_size = len(self._bytes)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BPETokenizer":
        """Learn `vocab_size` tokens (256 bytes and the rest by merging) from `text`: the train part, never validation.

        The same text gives the same tokenizer. Raises UserError if the text has not so many pairs to merge.
        """
        tokenizers = import_tokenizers()
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        # GPT-2's pattern: merges stay within a word with its leading space, a number, or a run of punctuation.
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=True
        )
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        tokenizer.train_from_iterator(lines(text), trainer)
        trained = cls(tokenizer.to_str())
        if trained.vocab_size != vocab_size:
            raise UserError(
                f"--vocab-size {vocab_size}: this text gives a BPE vocabulary of {trained.vocab_size} at most; "
                f"take a larger text, or --vocab-size {trained.vocab_size} or less"
            )
        return trained

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int64 of shape (tokens,). What no UTF-8 can say (lone surrogates) becomes "?"."""
        clean = text.encode("utf-8", errors="replace").decode()
        encoded = self._tokenizer.encode_batch_fast(lines(clean))
        return np.array([i for line in encoded for i in line.ids], dtype=np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """As `ByteTokenizer.decode_bytes`."""
        return b"".join(self._bytes[int(i)] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return self._tokenizer.to_str()


def tokenizer_from_json(text: str) -> ByteTokenizer | BPETokenizer:
    """The tokenizer that `to_json` saved. Raises UserError if the text is damaged."""
    try:
        saved = json.loads(text)
        is_bytes = saved.get("type") == "bytes"
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"the saved tokenizer is damaged ({error}): take another checkpoint"
        ) from error
    return ByteTokenizer() if is_bytes else BPETokenizer(text)


def lines(text: str) -> list[str]:
    """The lines of a text with their ends; joined they are the text. (str.splitlines would also cut at U+2028.)"""
    *whole, rest = text.split("\n")
    return [line + "\n" for line in whole] + ([rest] if rest else [])


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte of Latin-1 is written as itself, the others in order as U+0100, U+0101, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def import_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "a BPE vocabulary needs the library tokenizers: `make setup EXTRAS=bpe`, or pip install 'nanods[bpe]'; "
            "--vocab-size 256 (bytes) needs nothing"
        ) from None
    return tokenizers
