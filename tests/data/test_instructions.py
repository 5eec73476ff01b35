"""Instructions: what is made of Python's sources, files of one's own, and rows of tokens."""

import ast
import json
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from nanods.data import instructions, pydocs
from nanods.data.instructions import (
    END,
    PLAIN,
    ROLES,
    SHORT,
    Encoder,
    Example,
    doctests_of,
    examples_of,
    is_instructions,
    load_instructions,
    mark_ids,
    prompt_tokens,
)
from nanods.data.text import read_splits
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer
from nanods.errors import UserError

STDLIB = Path(sysconfig.get_path("stdlib"))
BYTES = ByteTokenizer()
PART = ("queue", "secrets", "fractions", "statistics", "glob", "timeit", "bz2", "heapq", "pathlib")
SYSTEM, USER, ASSISTANT = (mark[0] for mark in ROLES.values())
SOURCE = b'''
def double(x: int, *, sign=1) -> int:
    """Return twice x.

    >>> y = 3
    >>> double(
    ...     y)
    6
    >>> double(1)
    2
    """
    # a comment
    return 2 * x * sign
'''


@pytest.fixture(scope="module", params=["a part", pytest.param("all", marks=pytest.mark.slow)])
def data(request, tmp_path_factory):
    """Return the built-in instructions, made anew from the library or a part of it, pydocs-train,
    and the files they were made from."""
    files = pydocs.modules(STDLIB)
    if request.param == "a part":
        files = [path for path in files if path.stem in PART]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANODS_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setattr(pydocs, "modules", lambda stdlib: files)
        made = load_instructions("instructions")
        assert load_instructions("instructions") == made  # from the cache
        train, val = pydocs.pydocs_split()
        splits = read_splits("pydocs-train", 0.1)
    assert (splits.train, splits.val) == (train, val)
    assert splits.validation == "the docstrings of held-out modules"
    return made, train, val, files


def of_task(examples, task):
    return [example for example in examples if example.task == task]


# ---- the split -----------------------------------------------------------------------------------


def squeeze(text):
    return re.sub(r"\s+", " ", text)


def test_no_held_out_docstring_is_in_pydocs_train(data):
    _, train, val, files = data
    paragraphs = set(train.split("\n\n"))
    held = 0
    for path in files:
        if pydocs.is_held_out(pydocs.module_name(path, STDLIB)):
            for docstring in pydocs.docstrings_of(path.read_bytes()):
                held += 1
                assert docstring in val
                assert "\n\n" in docstring or len(docstring) < 80 or docstring not in paragraphs
    assert held > 100
    assert len(files) < 100 or 0.05 < len(val) / len(train) < 0.25


def test_no_held_out_answer_is_in_what_is_trained_on(data):
    made, train, *_ = data
    pretraining = squeeze(train)
    learnt = {text for e in made.train for role, text in e.messages if role == "assistant"}
    for example in made.val:
        for (_, prompt), (role, answer) in zip(
            example.messages, example.messages[1:], strict=False
        ):
            if role != "assistant":
                continue
            if len(answer) >= SHORT:
                assert squeeze(answer) not in pretraining and answer not in learnt
            else:  # "True" is everywhere, but not after this line
                assert squeeze(f"{prompt.splitlines()[-1]}\n{answer}") not in pretraining


def test_each_task_has_examples_on_both_sides(data):
    made, *_ = data
    for task, least in {"doctest": 3, "docstring": 30, "source": 20, "dialogue": 30}.items():
        assert len(of_task(made.val, task)) >= least < len(of_task(made.train, task))
    assert len(of_task(made.train, PLAIN)) == len(of_task(made.val, PLAIN)) == 1
    assert len(made.sha256) == 64


def test_an_implementation_is_held_out_with_its_module():
    for names in (("decimal", "_pydecimal", "_decimal"), ("json", "json.decoder", "_json")):
        assert len({pydocs.is_held_out(name) for name in names}) == 1
    assert pydocs.module_name(STDLIB / "json/__init__.py", STDLIB) == "json"
    assert pydocs.module_name(STDLIB / "json/decoder.py", STDLIB) == "json.decoder"


# ---- what is made of a module --------------------------------------------------------------------


def test_the_tasks_of_a_function():
    docstring = ast.get_docstring(ast.parse(SOURCE).body[0])
    head = "# numbers\ndef double(x: int, *, sign=1) -> int:"
    source = "def double(x: int, *, sign=1) -> int:\n    return 2 * x * sign"
    assert list(examples_of(SOURCE, "numbers")) == [
        Example("doctest", (("user", ">>> y = 3\n>>> double(\n...     y)"), ("assistant", "6"))),
        Example(
            "doctest",
            (("user", ">>> y = 3\n>>> double(\n...     y)\n6\n>>> double(1)"), ("assistant", "2")),
        ),
        Example("docstring", (("user", head), ("assistant", docstring))),
        Example("source", (("user", f'{head}\n"""{docstring}"""'), ("assistant", source))),
        Example(
            "dialogue",
            (
                ("user", "What does numbers.double do?"),
                ("assistant", "Return twice x."),
                ("user", "How do I call it?"),
                ("assistant", "double(x: int, *, sign=1)"),
            ),
        ),
    ]


def test_a_long_session_loses_its_first_statements():
    session = "".join(f">>> {i:03d} + 0\n{i}\n" for i in range(60))
    last = list(doctests_of(session))[-1]
    prompt = last.messages[0][1]
    assert prompt.startswith(">>> ") and prompt.endswith("\n58\n>>> 059 + 0")
    assert instructions.LONGEST - 20 < len(prompt) + len(last.answer) <= instructions.LONGEST
    assert list(doctests_of(">>>no blank\n1")) == []  # malformed


# ---- a file of one's own -------------------------------------------------------------------------


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_three_forms_of_a_line(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    first = {"prompt": "a", "answer": "b", "task": "letters"}
    name = write(tmp_path / "x.jsonl", first, {"messages": messages}, "", {"text": "some text"})
    val = write(tmp_path / "val.jsonl", {"prompt": "c", "answer": "d", "task": "letters"})
    assert is_instructions(name) and is_instructions("instructions")
    data = load_instructions(name, val)
    assert data.train == [
        Example("letters", (("user", "a"), ("assistant", "b"))),
        Example("instructions", (("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"))),
        Example(PLAIN, (("text", "some text"),)),
    ]
    assert [example.answer for example in data.val] == ["d"] and data.validation == val


def test_lone_surrogates_become_question_marks(tmp_path):
    row = {"prompt": "a\ud800b", "answer": "\udfff"}
    data = load_instructions(write(tmp_path / "x.jsonl", row), write(tmp_path / "v.jsonl", row))
    assert data.train[0].messages == (("user", "a?b"), ("assistant", "?"))


def test_other_files_are_no_instructions(tmp_path):
    assert not is_instructions(write(tmp_path / "a.jsonl", {"text": "a"}))
    assert not is_instructions(write(tmp_path / "a.txt", {"prompt": "a", "answer": "b"}))
    assert not is_instructions("pydocs") and not is_instructions(str(tmp_path))
    assert not is_instructions(str(tmp_path / "none.jsonl")) and not is_instructions("\0.jsonl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "line 3: .*fix or delete"),
        ("[" * 100_000, "line 3: maximum recursion depth .*fix or delete"),
        ("[1]", 'line 3: not an object with "prompt" and "answer"'),
        ({"question": "a"}, "line 3: not an object"),
        ({"prompt": "a", "answer": " "}, "line 3: the answer is empty"),
        ({"prompt": "a"}, "line 3: the answer is null, and must be a string"),
        ({"answer": "a"}, "line 3: the prompt is null"),
        ({"prompt": "a", "answer": 4}, "line 3: the answer is 4"),
        ({"prompt": "a", "answer": "b", "task": "a b"}, "line 3: \"task\" is 'a b'"),
        ({"messages": "a"}, 'line 3: "messages" is not a list'),
        ({"messages": []}, "line 3: the last message is not the assistant's"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "line 3: the role 'bot' is not known"),
        ({"messages": [{"role": "text", "content": "a"}]}, "line 3: the role 'text' is not known"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 3: the last message is not"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "line 3: the answer is empty"),
        ({"text": ""}, "line 3: the text is empty"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, row, reason):
    good = {"prompt": "a", "answer": "b"}
    name = write(tmp_path / "x.jsonl", good, "", row, good)
    with pytest.raises(UserError, match=f"--data .*x.jsonl: {reason}"):
        load_instructions(name)
    with pytest.raises(UserError, match=r"--val-data .*x.jsonl: line 3"):
        load_instructions(write(tmp_path / "y.jsonl", good), name)


def test_a_file_for_validation_that_is_no_text_is_named_by_its_flag(tmp_path):
    name = write(tmp_path / "x.jsonl", {"prompt": "a", "answer": "b"})
    (tmp_path / "val.jsonl").write_bytes(b"{\0}")
    with pytest.raises(UserError, match=r"^--val-data .*val.jsonl: a binary file"):
        load_instructions(name, str(tmp_path / "val.jsonl"))


def test_equal_prompts_are_held_out_together(tmp_path):
    rows = [{"prompt": f"{i // 2}", "answer": f"{i}", "task": f"t{i % 4 // 2}"} for i in range(80)]
    data = load_instructions(write(tmp_path / "x.jsonl", *rows), val_fraction=0.1)
    assert len(data.train) == 72 and len(data.val) == 8  # 2 of the 20 prompts of each task
    prompts = [{example.messages[0][1] for example in split} for split in (data.train, data.val)]
    assert not prompts[0] & prompts[1]
    assert {example.task for example in data.val} == {"t0", "t1"}
    assert data == load_instructions(str(tmp_path / "x.jsonl"), val_fraction=0.1)
    with pytest.raises(UserError, match="1 examples to train on and 0 for validation"):
        load_instructions(write(tmp_path / "one.jsonl", rows[0]))


# ---- as tokens -----------------------------------------------------------------------------------


def test_the_answers_and_their_ends_are_targets():
    messages = (("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "é"))
    (row,) = Encoder(BYTES, 64).rows(Example("x", messages))
    first = [USER, *b"ab", ASSISTANT, *b"cd", END[0]]
    assert row.tokens.tolist() == [*first, USER, *b"e", ASSISTANT, *"é".encode(), END[0]]
    assert row.tokens[row.is_target].tolist() == [*b"cd", END[0], *"é".encode(), END[0]]
    assert row.answer_bytes == 4
    assert prompt_tokens(messages[:3], BYTES) == row.tokens.tolist()[:10]


def test_no_text_can_hold_a_mark():
    text = "".join(map(chr, [*range(0x800), 0xD800, 0xFFFF, 0x10FFFF]))
    assert not {*ROLES.values(), END} & {bytes([b]) for b in BYTES.encode(text).tolist()}


def test_a_bpe_has_the_marks_too():
    bpe = BPETokenizer.train("some words and some words\n" * 50, 264)
    assert len(mark_ids(bpe)) == 4
    (row,) = Encoder(bpe, 64).rows(Example("x", (("user", "some"), ("assistant", "some words"))))
    assert row.answer_bytes == 10 > row.is_target.sum() - 1
    assert bpe.decode_bytes(row.tokens) == b"\xfdsome\xfesome words\xff"


def test_plain_text_is_cut_into_rows_that_learn_each_token_once():
    encoder = Encoder(BYTES, 8)
    text = "".join(chr(33 + i) for i in range(30))
    rows = encoder.rows(Example(PLAIN, (("text", text),)))
    assert [len(row.tokens) for row in rows] == [9, 9, 9, 6]
    learnt = b"".join(BYTES.decode_bytes(row.tokens[row.is_target]) for row in rows)
    assert learnt.decode() == text[1:] and sum(row.answer_bytes for row in rows) == 29


@pytest.mark.parametrize(
    ("prompt", "answer", "kept", "cuts"),
    [
        ("p" * 3, "a" * 10, (3, 10, True), (0, 0)),
        ("p" * 4, "a" * 10, (3, 10, True), (1, 0)),  # 2 marks + 3 + 10 + END = 16 + 1 - 1
        ("p" * 40, "a" * 5, (9, 5, True), (1, 0)),
        ("p" * 40, "a" * 40, (2, 13, False), (1, 1)),  # a quarter is prompt: mark, 2, mark
        ("p" * 2, "a" * 40, (2, 13, False), (0, 1)),
    ],
)
def test_a_long_example_loses_the_left_of_its_prompt(prompt, answer, kept, cuts):
    encoder = Encoder(BYTES, 16 if len(answer) != 10 else 15)
    (row,) = encoder.rows(Example("x", (("user", prompt), ("assistant", answer))))
    p, a, has_end = kept
    expected = [USER, *b"p" * p, ASSISTANT, *b"a" * a, *(END if has_end else b"")]
    assert row.tokens.tolist() == expected
    assert row.tokens[row.is_target].tolist() == expected[2 + p :]
    assert (encoder.cuts.prompts, encoder.cuts.answers) == cuts


@pytest.mark.parametrize("T", range(4, 40))
def test_a_long_conversation_begins_with_the_mark_of_what_is_left(T):
    messages = (("user", "abcdef"), ("assistant", "ghijkl"), ("user", "mn"), ("assistant", "opqr"))
    whole = Encoder(BYTES, 64).rows(Example("x", messages))[0]
    (row,) = Encoder(BYTES, T).rows(Example("x", messages))
    assert len(row.tokens) == min(T + 1, len(whole.tokens))
    assert row.tokens[0] in (USER, ASSISTANT) and not row.is_target[0]
    start = next(
        i
        for i in range(len(whole.tokens))
        if np.array_equal(whole.tokens[i + 1 : i + len(row.tokens)], row.tokens[1:])
    )
    marks = [t for t in whole.tokens[: start + 1] if t in (USER, ASSISTANT)]
    assert row.tokens[0] == marks[-1]
    assert np.array_equal(row.is_target[1:], whole.is_target[start + 1 :][: len(row.tokens) - 1])
