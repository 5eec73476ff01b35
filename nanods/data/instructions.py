"""Instructions: prompts with the answers to learn, from Python's own sources or from your file.

`instructions` is made from what every Python has, without a network. Its tasks:

    doctest     a session in a docstring, up to a statement  ->  what the statement prints
    docstring   the signature of a function                  ->  its docstring
    source      signature and docstring                      ->  the source
    dialogue    "What does f do?"                            ->  the docstring's first line
                "How do I call it?"                          ->  the signature
    plain       no prompt; all of the text pydocs-train is learnt, as in pretraining

Whole modules are held out, the same as in `pydocs-train` (nanods/data/pydocs.py): a model that was
trained on pydocs-train has read no docstring of theirs. An example whose answer all the same occurs
in what is trained on, as copied functions do, is left out of the held-out ones. No code runs.

A file of your own has one JSON object on each line, of one of three forms:

    {"prompt": "...", "answer": "..."}                    "task" may name its task
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"text": "..."}                                       task plain: all of it is learnt

As tokens, each message begins with a mark of its role, and each answer ends with END:

    USER 2 + 2? ASSISTANT 4 END

The marks are the bytes 0xFC to 0xFF, which UTF-8 never uses: no text can hold one, whatever it
says, and a vocabulary of bytes needs no new token. Loss is taken on answers and END alone.

Left out on purpose: several examples in one row (packing). Each is a row of its own, so no
attention mask is needed for one never to see another.

Shapes: T tokens of context.
"""

import ast
import copy
import doctest
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanods.data.decoding import decode_text
from nanods.data.pydocs import (
    cached,
    documented_nodes,
    is_held_out,
    module_name,
    pydocs_split,
    read_topics,
    sources,
)
from nanods.data.text import sha256
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer, lines
from nanods.errors import UserError

NAME = "instructions"
PLAIN = "plain"
ROLES = {"system": b"\xfc", "user": b"\xfd", "assistant": b"\xfe"}
"""The mark before each message, by its role."""
END = b"\xff"  # after each answer
LONGEST = 240  # characters of prompt and answer together: they fit into v1-tiny's 256 tokens
SHORT = 16  # characters: a shorter answer ("True") may occur anywhere


@dataclass(frozen=True)
class Example:
    task: str
    messages: tuple[tuple[str, str], ...]
    """(role, text) of each; the last one is the assistant's. Of plain text: ("text", text)."""

    @property
    def answer(self) -> str:
        return self.messages[-1][1]


@dataclass(frozen=True)
class Instructions:
    """A data set of examples."""

    name: str
    sha256: str
    train: list[Example]
    val: list[Example]
    validation: str
    """Where the validation examples come from, in words."""


def is_instructions(name: str) -> bool:
    """Return whether `--data` names instructions: the built-in ones, or a .jsonl file whose first
    line has a prompt or messages."""
    if name == NAME:
        return True
    path = Path(name)
    try:
        if path.suffix.lower() != ".jsonl" or not path.is_file():
            return False
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
    except (OSError, ValueError):  # unreadable, or a name that no file can have
        return False
    return any(key in first for key in (b'"messages"', b'"prompt"', b'"answer"'))


def load_instructions(
    name: str, val_data: str | None = None, val_fraction: float = 0.1
) -> Instructions:
    """Load the built-in instructions, or those of a .jsonl file.

    `val_data`: another such file for validation. Else `val_fraction` of a file's examples, chosen
    by a hash of their prompts, so that equal prompts stay together.

    Raises UserError for a line that cannot be used, and if a split is empty.
    """
    if name == NAME:
        data = built_in()
    else:
        text, examples = read_file("--data", name)
        train, val = split_by_prompt(examples, 0 if val_data else val_fraction)
        where = f"{100 * val_fraction:g}% of the examples, chosen by a hash of their prompts"
        data = Instructions(name, sha256(text), train, val, where)
    if val_data:
        text, val = read_file("--val-data", val_data)
        both = sha256(data.sha256 + sha256(text))
        data = Instructions(name, both, data.train, val, val_data)
    if not data.train or not data.val:
        raise UserError(
            f"--data {name}: {len(data.train)} examples to train on and {len(data.val)} for "
            "validation; give more examples, or those for validation as --val-data FILE"
        )
    return data


# ---- from Python's own sources -------------------------------------------------------------------


def built_in() -> Instructions:
    """Return the built-in instructions. Making them takes some seconds the first time."""
    train_text, val_text = pydocs_split()
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    saved = cached(f"{NAME}-{made_by}", "jsonl", collect)
    examples = {"train": [], "val": []}
    for line in lines(saved):
        row = json.loads(line)
        messages = tuple((m["role"], m["content"]) for m in row["messages"])
        examples[row["split"]].append(Example(row["task"], messages))
    examples["train"].append(Example(PLAIN, (("text", train_text),)))
    examples["val"].append(Example(PLAIN, (("text", val_text),)))
    digest = sha256(saved + train_text + val_text)
    return Instructions(NAME, digest, **examples, validation="held-out modules of Python's library")


def collect(stdlib: Path) -> str:
    """Return the examples of the library's modules as JSON lines, each with its "split"."""
    train, val = [], []
    for text in read_topics():
        train += doctests_of(text)
    for path in sources(stdlib):
        name = module_name(path, stdlib)
        examples = examples_of(path.read_bytes(), name)
        (val if is_held_out(name) else train).extend(examples)
    train, val = unique(train), unique(val)
    known, text = answers(train), one_line(pydocs_split()[0])
    val = [each for each in val if not answers([each]) & known and not occurs(each, text)]
    rows = []
    for split, examples in (("train", train), ("val", val)):
        for example in examples:
            messages = [{"role": role, "content": said} for role, said in example.messages]
            rows.append({"split": split, "task": example.task, "messages": messages})
    return "".join(json.dumps(row) + "\n" for row in rows)


def examples_of(source: bytes, module: str) -> Iterator[Example]:
    """Yield the examples of one module, in order of line."""
    for node, docstring in documented_nodes(source):
        yield from doctests_of(docstring)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and len(docstring) <= LONGEST:
            for example in function_examples(node, docstring, module):
                if sum(len(text) for _, text in example.messages) <= LONGEST:
                    yield example


def function_examples(
    node: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str, module: str
) -> Iterator[Example]:
    """Yield the examples of a documented function, however long they are."""
    head = f"# {module}\n{signature(node)}"
    yield prompt_and_answer("docstring", head, docstring)
    if len(node.body) > 1:
        bare = copy.copy(node)
        bare.body, bare.decorator_list = node.body[1:], []
        source = ast.unparse(bare)
        yield prompt_and_answer("source", f'{head}\n"""{docstring}"""', source)
    call = f"{node.name}({ast.unparse(node.args)})"
    first_line = docstring.split("\n")[0]
    messages = (
        ("user", f"What does {module}.{node.name} do?"),
        ("assistant", first_line),
        ("user", "How do I call it?"),
        ("assistant", call),
    )
    yield Example("dialogue", messages)


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the line that begins a function: "def f(a, b=1):"."""
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {node.name}({ast.unparse(node.args)}){returns}:"


def prompt_and_answer(task: str, prompt: str, answer: str) -> Example:
    return Example(task, (("user", prompt), ("assistant", answer)))


def doctests_of(docstring: str) -> Iterator[Example]:
    """Yield the doctests of a docstring: as much of the session before each as fits, whole
    statements, and what is printed."""
    try:
        statements = doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # the session is malformed, as some in examples of errors are
        return
    session: list[str] = []
    for statement in statements:
        first, *rest = statement.source.rstrip("\n").split("\n")
        said = "\n".join([f">>> {first}", *(f"... {line}" for line in rest)])
        printed = statement.want.rstrip("\n")
        session.append(said)
        if printed:
            prompt = end_of_session(session, LONGEST - len(printed))
            if prompt:
                yield prompt_and_answer("doctest", prompt, printed)
            session.append(printed)


def end_of_session(session: list[str], room: int) -> str:
    """Return the last statements and outputs that fit into `room` characters, from a statement
    on."""
    kept = ""
    for start in reversed(range(len(session))):
        text = "\n".join(session[start:])
        if len(text) > room:
            break
        if session[start].startswith(">>> "):
            kept = text
    return kept


def unique(examples: Iterable[Example]) -> list[Example]:
    """Return the examples in order, each once."""
    return list(dict.fromkeys(examples))


def answers(examples: Iterable[Example]) -> set[str]:
    """Return the answers of SHORT characters or more, all of a dialogue."""
    return {
        text
        for example in examples
        for role, text in example.messages
        if role == "assistant" and len(text) >= SHORT
    }


def one_line(text: str) -> str:
    """Return a text with single blanks for its line ends and indents."""
    return " ".join(text.split())


def occurs(example: Example, text: str) -> bool:
    """Return whether an answer occurs in a text of one line; of a short answer, whether it occurs
    there after the last line of its prompt."""
    for (_, prompt), (role, answer) in zip(example.messages, example.messages[1:], strict=False):
        before = prompt.split("\n")[-1] if len(answer) < SHORT else ""
        if role == "assistant" and one_line(f"{before} {answer}") in text:
            return True
    return False


# ---- from a file ---------------------------------------------------------------------------------


def read_file(flag: str, name: str) -> tuple[str, list[Example]]:
    """Return the text of a .jsonl file and its examples. Raises UserError, naming the line, for one
    that cannot be used."""
    try:
        text = decode_text(name, Path(name).read_bytes())
    except OSError as error:
        raise UserError(f"{flag} {name}: cannot be read ({error.strerror})") from None
    except UserError as error:
        raise UserError(str(error).replace("--data", flag, 1)) from error
    examples = []
    for number, line in enumerate(lines(text), start=1):
        if line.strip():
            try:
                examples.append(read_example(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{flag} {name}: line {number:,}: {error}; fix or delete this line"
                ) from None
    return text, examples


def read_example(row: object) -> Example:
    """Return the example of one line of a file. Raises ValueError that says what is wrong."""
    if not isinstance(row, dict) or not row.keys() & {"messages", "prompt", "answer", "text"}:
        raise ValueError('not an object with "prompt" and "answer", with "messages", or "text"')
    task = row.get("task", NAME)
    if not isinstance(task, str) or not task.replace("-", "_").isidentifier():
        raise ValueError(f'"task" is {task!r}, and must be a word')
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError('"messages" is not a list of objects')
        messages = [(message.get("role"), message.get("content")) for message in messages]
        for role, _ in messages:
            if role not in ROLES:
                known = ", ".join(ROLES)
                raise ValueError(f"the role {role!r} is not known; the roles are {known}")
    elif "text" in row and "prompt" not in row:
        task, messages = PLAIN, [("text", row["text"])]
    else:
        messages = [("user", row.get("prompt")), ("assistant", row.get("answer"))]
    check_messages(messages)
    # JSON can hold lone surrogates ("\\ud800"), which UTF-8 cannot encode: they become "?".
    messages = ((role, said.encode(errors="replace").decode()) for role, said in messages)
    return Example(task, tuple(messages))


def check_messages(messages: list[tuple[object, object]]) -> None:
    """Raise ValueError unless these are messages from which something can be learnt."""
    for role, said in messages:
        what = {"assistant": "answer", "user": "prompt"}.get(role, role)
        if not isinstance(said, str):
            raise ValueError(f"the {what} is {json.dumps(said)}, and must be a string")
        if role in ("assistant", "text") and not said.strip():
            raise ValueError(f"the {what} is empty")
    if not messages or messages[-1][0] not in ("assistant", "text"):
        raise ValueError("the last message is not the assistant's: there is no answer to learn")


def split_by_prompt(
    examples: list[Example], fraction: float
) -> tuple[list[Example], list[Example]]:
    """Return the examples for training and, of each task, about `fraction` for validation: those
    whose prompts have the smallest hashes, one at least where a task has two prompts."""
    prompts: dict[str, dict[bytes, list[Example]]] = {}
    for example in examples:
        prompt = example.messages[:-1] or example.messages
        key = hashlib.sha256(repr(prompt).encode(errors="replace")).digest()
        prompts.setdefault(example.task, {}).setdefault(key, []).append(example)
    held = set()
    for of_task in prompts.values():
        count = min(max(1, round(fraction * len(of_task))), len(of_task) - 1) if fraction else 0
        held |= {example for key in sorted(of_task)[:count] for example in of_task[key]}
    return [e for e in examples if e not in held], [e for e in examples if e in held]


# ---- as tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An example as the model reads it."""

    tokens: np.ndarray  # (n,), at most T + 1
    is_target: np.ndarray  # (n,) bool: the tokens to learn; never the first
    answer_bytes: int
    """Bytes of text among the targets: END is none."""


@dataclass
class Cuts:
    """How many examples were longer than the context."""

    prompts: int = 0
    """Cut at the prompt's left."""
    answers: int = 0
    """Cut at the answer's end as well."""


def mark_ids(tokenizer: ByteTokenizer | BPETokenizer) -> dict[bytes, int]:
    """Return the token of each mark: every vocabulary has one for each byte."""
    marks, ids = {*ROLES.values(), END}, {}
    for i in range(tokenizer.vocab_size):
        if (data := tokenizer.decode_bytes([i])) in marks:
            ids[data] = i
    return ids


def message_tokens(
    role: str, text: str, tokenizer: ByteTokenizer | BPETokenizer, ids: dict[bytes, int]
) -> list[int]:
    """Return a message as tokens: the mark of its role, its text, and END after an answer. `ids`
    are those of `mark_ids`."""
    end = [ids[END]] if role == "assistant" else []
    return [ids[ROLES[role]], *tokenizer.encode(text).tolist(), *end]


def prompt_tokens(
    messages: Iterable[tuple[str, str]], tokenizer: ByteTokenizer | BPETokenizer
) -> list[int]:
    """Return the tokens of a conversation up to where the assistant begins to answer."""
    ids = mark_ids(tokenizer)
    tokens = []
    for role, text in messages:
        tokens += message_tokens(role, text, tokenizer, ids)
    return [*tokens, ids[ROLES["assistant"]]]


class Encoder:
    """Turns examples into rows of at most T + 1 tokens, and counts what it cuts."""

    def __init__(self, tokenizer: ByteTokenizer | BPETokenizer, T: int) -> None:
        self.tokenizer, self.T, self.ids, self.cuts = tokenizer, T, mark_ids(tokenizer), Cuts()
        self.dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32

    def rows(self, example: Example) -> list[Row]:
        """Return the row of an example; of plain text as many as it takes, each beginning with the
        last token of the one before, so that every token but the first is learnt once."""
        if example.task == PLAIN and example.messages[0][0] == "text":
            tokens = self.tokenizer.encode(example.answer)
            starts = range(0, max(1, len(tokens) - 1), self.T)
            pieces = [tokens[start : start + self.T + 1] for start in starts]
            return [self.row(piece, np.arange(len(piece)) > 0) for piece in pieces]
        tokens, is_target = [], []
        for role, text in example.messages:
            message = message_tokens(role, text, self.tokenizer, self.ids)
            begin = len(tokens) + 1  # of the last message's text, at the end
            tokens += message
            is_target += [False] + [role == "assistant"] * (len(message) - 1)
        return [self.row(*self.cut(np.array(tokens), np.array(is_target), begin))]

    def cut(
        self, tokens: np.ndarray, is_target: np.ndarray, answer: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut an example to T + 1 tokens: its prompt at the left, down to a quarter of the context,
        and what is then still too long at the end of the answer, which begins at token `answer`.

        The mark of the message that is cut, or of the first that is left, stays in front.
        """
        room = self.T + 1
        if len(tokens) <= room:
            return tokens, is_target
        answer_length = len(tokens) - answer
        left = min(answer, max(room - answer_length, self.T // 4))  # tokens of the prompt to keep
        self.cuts.prompts += left < answer
        self.cuts.answers += left + answer_length > room
        first = answer - left
        marks = [self.ids[mark] for mark in ROLES.values()]
        mark = next(token for token in tokens[first::-1] if token in marks)
        tokens, is_target = tokens[first:][:room].copy(), is_target[first:][:room].copy()
        tokens[0], is_target[0] = mark, False
        return tokens, is_target

    def row(self, tokens: np.ndarray, is_target: np.ndarray) -> Row:
        text = tokens[is_target & (tokens != self.ids[END])]
        answer_bytes = len(self.tokenizer.decode_bytes(text.tolist()))
        return Row(tokens.astype(self.dtype), is_target, answer_bytes)
