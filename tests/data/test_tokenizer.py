"""Tokenizers: decode inverts encode, also from JSON and in a stream; no token crosses a line."""

import codecs
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.data.tokenizer import (
    LONGEST_WORD,
    BPETokenizer,
    ByteTokenizer,
    lines,
    pieces,
    run_in_thread,
    tokenizer_from_json,
)
from nanods.errors import UserError

TRAINING = (
    "the cat and the dog, the hat and the log;\n\nüber straße naïve\n" * 20
    + "a quick brown fox jumps\n"
)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return BPETokenizer.train(TRAINING, 300)


@given(text=st.text())
@settings(deadline=None)
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids.tolist()) == text.encode()


@given(text=st.text())
@settings(deadline=None)
def test_json_restores_the_same_tokenizer(tokenizer, text):
    saved = tokenizer.to_json()
    restored = tokenizer_from_json(saved)
    assert type(restored) is type(tokenizer) and restored.vocab_size == tokenizer.vocab_size
    assert restored.to_json() == saved
    np.testing.assert_array_equal(restored.encode(text), tokenizer.encode(text))


@given(text=st.text(alphabet=st.characters(min_codepoint=0x7F, exclude_categories=["Cs"])))
@settings(deadline=None)
def test_streaming_token_by_token_gives_the_text(tokenizer, text):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    streamed = "".join(decoder.decode(tokenizer.decode_bytes([i])) for i in tokenizer.encode(text))
    assert streamed + decoder.decode(b"", final=True) == text


def test_the_first_256_tokens_are_the_bytes(tokenizer):
    singles = [tokenizer.decode_bytes([i]) for i in range(256)]
    assert sorted(singles) == [bytes([b]) for b in range(256)]


def test_lines_end_only_at_newlines():
    assert lines("a\u2028b\r\n\nc") == ["a\u2028b\r\n", "\n", "c"]
    assert lines("") == [] and lines("\n") == ["\n"]


def test_pieces_are_the_lines_where_no_word_is_long():
    text = "a b\r\n\n" + "word, " * 500 + "x" * LONGEST_WORD + "-" * LONGEST_WORD
    assert pieces(text) == lines(text) and pieces("") == []


@given(
    st.lists(
        st.tuples(st.sampled_from("AC- \n中_½9"), st.integers(1, 3 * LONGEST_WORD)), max_size=4
    )
)
@settings(max_examples=30, deadline=None)
def test_no_piece_holds_a_long_word(runs):
    text = "".join(letter * length for letter, length in runs)
    parts = pieces(text)
    assert "".join(parts) == text
    for word in re.findall(r"[^\W_]+|[\W_]+", "\n".join(parts)):
        assert len(word) <= LONGEST_WORD or "\n" in word
    for cut in range(len(parts)):  # cuts depend on the word alone
        assert pieces("".join(parts[:cut])) + pieces("".join(parts[cut:])) == parts


def test_ctrl_c_is_heard_during_a_long_call_of_a_library():
    # A program started in the background of a shell ignores SIGINT, and so do its children.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = threading.Event()
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_thread(lambda: stop.wait(20))
    stop.set()
    signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - start < 10
    with pytest.raises(ValueError, match="of the call"):
        run_in_thread(lambda: int("of the call"))


def test_incomplete_utf8_decodes_with_a_replacement():
    assert ByteTokenizer().decode([0x41, 0xC3]) == "A\ufffd"


def test_lone_surrogates_do_not_raise(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a?b"


def test_ids_outside_the_vocabulary_raise(tokenizer):
    with pytest.raises((ValueError, IndexError)):
        tokenizer.decode([tokenizer.vocab_size])


class TestBPE:
    def test_agrees_with_the_librarys_own_decoder(self):

        bpe = BPETokenizer.train(TRAINING, 300)
        library = tokenizers.Tokenizer.from_str(bpe.to_json())
        library.decoder = tokenizers.decoders.ByteLevel()
        ids = bpe.encode(TRAINING + "日本語 emoji 🙂").tolist()
        assert bpe.decode(ids) == library.decode(ids)

    def test_merges_shorten_the_training_text(self):
        tokens = BPETokenizer.train(TRAINING, 300).encode(TRAINING)
        assert len(tokens) < 0.6 * len(TRAINING.encode())

    def test_encoding_in_pieces_of_complete_lines_gives_the_same_tokens(self):
        bpe = BPETokenizer.train(TRAINING, 300)
        parts = ["the cat", "", "\r", "  the\u2028hat\n", " "]
        pieces = [part + "\n" for part in parts]
        at_once = bpe.encode("".join(pieces))
        assert at_once.tolist() == [i for piece in pieces for i in bpe.encode(piece)]

    def test_training_is_deterministic(self):
        first, second = (BPETokenizer.train(TRAINING, 300) for _ in range(2))
        assert first.to_json() == second.to_json()

    def test_a_text_without_blanks_takes_time_in_proportion_to_its_length(self):
        dna = "".join("ACGT"[n * n * n % 1009 % 4] for n in range(100_000))
        start = time.monotonic()
        bpe = BPETokenizer.train(dna, 800)  # uncut: about 20 s
        assert bpe.decode(bpe.encode(dna)) == dna
        assert time.monotonic() - start < 8

    def test_a_text_with_few_pairs_gives_fewer_tokens(self):
        bpe = BPETokenizer.train("ab ab ab", 4096)
        assert 256 < bpe.vocab_size < 260
        assert bpe.decode(bpe.encode("ab ba")) == "ab ba"


A_ALONE = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
FOREIGN = A_ALONE.replace('"a"', '"\u65e5"')  # no symbol of GPT-2's alphabet


@pytest.mark.parametrize(
    "saved",
    ["", "{", "[]", "7", '{"type": "words"}', '{"model": {"type": "BPE"}}', A_ALONE, FOREIGN],
)
def test_damaged_json_raises_a_user_error(saved):
    with pytest.raises(UserError, match="damaged"):
        tokenizer_from_json(saved)
