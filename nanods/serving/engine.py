"""Continuous batching: many requests generate together, and each joins and leaves at any token.

A decoding step reads every weight once, for 32 rows as for one, so it costs far less than 32 steps
(`make bench-serve`). A server should therefore decode its requests together. A fixed batch would
wait for its longest text, and a new request for the whole batch. Here the batch changes between two
steps (Orca: Yu et al. 2022, OSDI; vLLM: Kwon et al. 2023, arXiv:2309.06180). One step of the
engine is:

    drop      the cancelled requests leave
    read      the oldest request that is not in the batch reads the next `chunk` tokens of its
              prompt, alone. The batch waits for a chunk, never for a whole prompt
    decode    each row of the batch draws one token; the finished rows leave

    waiting --slot free--> reading --all but the last token read--> batch --finished--> gone
                              ^------------------context full----------|

The rows of the batch are the first rows of one cache, without gaps: a request that joins is copied
behind the last row, and the last row is copied over one that leaves. Where a row's context is
full, that row alone forgets: it keeps the last half of its tokens and reads them again.

What a request gets does not depend on its neighbours. Attention reads its own row of the cache,
the experts of a model in eval mode have no capacity that rows would share, and each request draws
from its own random stream. So the tokens are those of `GPT.generate` with the same seed, which
tests/serving/test_engine.py uses as the naive reference: one request at a time. The last bits of
the logits do depend on the number of rows, as in any matrix product; in fp64 that changes no token.

Left out on purpose: pages of keys (each slot holds a whole context), shared prefixes, priorities,
preemption, speculative decoding.
"""

import itertools
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nanods.cache import Cache
from nanods.gpt import GPT, sample_token

# Tokens that a chunk counts as at least: every pass has a fixed cost, that of about 70 more tokens
# in v1-tiny, and of 140 in v2-tiny, where it reads all experts (results/serve.json, `reading_ms`).
READ_OVERHEAD = 128


class BusyError(Exception):
    """As many requests wait as may wait: the client should come back later."""


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    """At least one token. A prompt longer than the context loses its beginning."""
    max_new_tokens: int = 16
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    """The last three as in nanods.gpt.sample_token."""
    seed: int = 0
    """Same seed, same tokens, whatever else is generated meanwhile, apart from rounding: the number
    of rows changes the last bits of the logits, which in fp32 can change a token."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the answer. They are not part of its text."""
    stop: tuple[bytes, ...] = ()
    """Texts that end the answer. They are not part of it."""
    logprobs: int | None = None
    """Report the log-probability of each token, and of this many likeliest ones."""
    trace: bool = False
    """Report which experts computed each token, and which blocks it read."""

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1 or b"" in self.stop:
            raise ValueError("a request needs a prompt, at least one new token, and no empty stop")


@dataclass(frozen=True)
class Trace:
    """How the model computed a token from those before it. It read the last of them with these
    `experts`, the one with most weight first, and looked back on these `blocks` of the context."""

    position: int
    """Of the token, counted from the prompt's first."""
    start: int
    """The position where block 0 begins: 0 until the context is full."""
    experts: list[list[int]] = field(default_factory=list)
    """By layer; empty without experts."""
    blocks: list[list[int]] = field(default_factory=list)
    """By layer, those that any of its heads read; empty with dense attention."""


@dataclass(frozen=True)
class Token:
    """A generated token, as a request's `deliver` gets it."""

    id: int
    """-1: none; the request failed."""
    text: bytes
    """What is now known to be part of the answer. Bytes that may begin a stop are held back."""
    finish: str | None = None
    """Of the last token: "stop", "length" (max_new_tokens) or "error"."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, which are the model's: in nats, before
    temperature, top_k and top_p."""
    trace: Trace | None = None


@dataclass(eq=False)
class Task:
    """A request under way."""

    request: Request
    deliver: Callable[[Token], None]
    tokens: list[int]
    """The context: those that are read (`length` of them), and those to read."""
    stream: torch.Generator
    length: int = 0
    generated: int = 0
    held_back: bytes = b""
    is_cancelled: bool = False
    prompt_nats: float = 0.0
    """Minus the log-probability of the prompt, without its first token, in nats."""


@dataclass
class Totals:
    """What the engine has done since it was made."""

    steps: int = 0
    read_tokens: int = 0
    new_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    load: Tensor | None = None
    """(L, E): assignments of each expert of each layer, in reading and decoding; None without
    experts."""


@dataclass
class Engine:
    model: GPT
    decode_bytes: Callable[[list[int]], bytes]
    """The tokenizer's."""
    slots: int = 32
    """Requests that generate at the same time; each has a whole context of keys and values."""
    chunk: int = 128
    """Tokens of prompts read in one step, at most."""
    max_waiting: int = 256
    """Requests that wait for a slot; one more is refused."""
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        self.model.eval()
        self.context = self.model.config.context_length
        self.device = self.model.embedding.weight.device
        self.waiting: deque[Task] = deque()  # no slot yet
        self.reading: deque[Task] = deque()  # the first is being read, into row 0 of `reader`
        self.batch: list[Task] = []  # task i decodes in row i of `cache`
        self.reader, self.cache = self.model.new_cache(1), self.model.new_cache(self.slots)
        self.changed = threading.Condition()  # guards `waiting` and `is_closing`
        self.is_closing = False

    # ---- what a server calls, from any thread ----------------------------------------------------

    def submit(self, request: Request, deliver: Callable[[Token], None]) -> Task:
        """Accept a request. `deliver` gets its tokens, from the thread that steps the engine.

        Raises BusyError if `max_waiting` requests wait already, or if the engine is closing.
        """
        stream = torch.Generator().manual_seed(request.seed * 1_000_003)  # row 0 of generate
        task = Task(request, deliver, list(request.prompt[-self.context :]), stream)
        with self.changed:
            if self.is_closing or len(self.waiting) >= self.max_waiting:
                raise BusyError(
                    "the server is stopping"
                    if self.is_closing
                    else f"{self.max_waiting} requests wait already"
                )
            self.waiting.append(task)
            self.changed.notify()
        return task

    def cancel(self, task: Task) -> None:
        """Stop working on a request: no token is delivered after the step that is being computed.

        A request that has finished is left alone.
        """
        with self.changed:
            task.is_cancelled = True
            if task in self.waiting:
                self.waiting.remove(task)
                self.totals.cancelled += 1

    def close(self) -> None:
        """Refuse new requests, and let `run` return when those accepted have finished."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()

    def run(self) -> None:
        """Step while there is work, wait where there is none; return after `close`."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_closing or self.has_work())
            if not self.has_work():
                return
            try:
                self.step()
            except Exception:  # out of memory, say: the requests fail, and the server goes on
                traceback.print_exc(file=sys.stderr)
                self.fail()

    def has_work(self) -> bool:
        return bool(self.batch or self.reading or self.waiting)

    def count_running(self) -> int:
        """Return how many requests have a slot."""
        return len(self.reading) + len(self.batch)

    def count_waiting(self) -> int:
        """Return how many requests wait for a slot."""
        return len(self.waiting)

    # ---- one step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Read a chunk, then draw one token for each row of the batch."""
        self.drop_cancelled()
        self.read()
        if self.batch:
            self.decode()
        self.totals.steps += 1

    def drop_cancelled(self) -> None:
        before = len(self.reading) + len(self.batch)
        self.reading = deque(task for task in self.reading if not task.is_cancelled)
        for row in reversed(range(len(self.batch))):
            if self.batch[row].is_cancelled:
                self.leave(row)
        with self.changed:  # `cancel` counts too
            self.totals.cancelled += before - len(self.reading) - len(self.batch)

    def read(self) -> None:
        """Read up to `chunk` tokens of prompts, the oldest prompt first.

        The last token of a prompt is left to `decode`, which draws the token after it. Rows that
        read their context again come before new requests, which can wait: they have shown no token.
        """
        budget = self.chunk
        while budget > 0:
            if not self.reading and not self.admit():
                return
            task = self.reading[0]
            chunk = task.tokens[task.length : -1][:budget]
            if chunk:
                self.read_chunk(task, chunk)
                budget -= max(len(chunk), READ_OVERHEAD)
            if task.length == len(task.tokens) - 1:
                self.join(self.reading.popleft())

    def admit(self) -> bool:
        """Give the oldest waiting request a slot. Return whether one waits and a slot is free."""
        with self.changed:
            if not self.waiting or len(self.batch) == self.slots:
                return False
            self.reading.append(self.waiting.popleft())
            return True

    def read_chunk(self, task: Task, chunk: list[int]) -> None:
        """Add the next tokens of a prompt to the reader's cache."""
        rows = self.reader.first_rows([task.length])
        logits = self.forward(torch.tensor([chunk], device=self.device), rows)[0][0]  # (T, V)
        if not task.generated:
            following = task.tokens[task.length + 1 : task.length + 1 + len(chunk)]
            targets = torch.tensor(following, device=self.device)
            nats = F.cross_entropy(logits, targets, reduction="sum")
            task.prompt_nats += float(nats)
        task.length += len(chunk)
        self.totals.read_tokens += len(chunk)

    def join(self, task: Task) -> None:
        """Add a task whose prompt is read to the batch, as its last row."""
        self.cache.copy_row(len(self.batch), self.reader, 0, task.length)
        self.batch.append(task)

    def leave(self, row: int) -> None:
        """Remove a row from the batch. The last row takes its place."""
        last = self.batch.pop()
        if row < len(self.batch):
            self.cache.copy_row(row, self.cache, len(self.batch), last.length)
            self.batch[row] = last

    def decode(self) -> None:
        """Draw the next token of each row."""
        tokens = torch.tensor([[task.tokens[-1]] for task in self.batch], device=self.device)
        rows = self.cache.first_rows([task.length for task in self.batch])
        is_traced = any(task.request.trace for task in self.batch)
        logits, stats = self.forward(tokens, rows, is_traced)
        logits = logits[:, -1]  # (B, V)
        drawn = self.draw(logits)
        self.totals.new_tokens += len(drawn)
        # From the last row to the first: a row that leaves is replaced by one that is done.
        for row in reversed(range(len(drawn))):
            task, token = self.batch[row], drawn[row]
            task.length += 1
            task.generated += 1
            task.tokens.append(token)
            trace = self.trace(stats, row, task) if task.request.trace else None
            if self.hand_over(task, token, logits[row], trace):
                self.totals.finished += 1
                self.leave(row)
            elif task.length == self.context:
                self.leave(row)
                task.tokens, task.length = task.tokens[-max(1, self.context // 2) :], 0
                self.reading.append(task)

    def forward(
        self, tokens: Tensor, rows: Cache, inspect: bool = False
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Run the model on the next tokens (B, T) of a cache's rows -> logits (B, T, V), stats."""
        logits, stats = self.model(tokens, rows, inspect=inspect)
        if "load" in stats[0]:
            load = torch.stack([layer["load"].to(self.device) for layer in stats])  # (L, E)
            self.totals.load = load if self.totals.load is None else self.totals.load + load
        return logits, stats

    def trace(self, stats: list[dict[str, Tensor]], row: int, task: Task) -> Trace:
        """Return how a row's new token was computed; `task` has counted it already."""
        position = len(task.request.prompt) + task.generated - 1
        trace = Trace(position, position + 1 - len(task.tokens))
        for layer in stats:
            if "experts" in layer:
                trace.experts.append(layer["experts"][row, -1].tolist())
            if "blocks" in layer:
                own = (task.length - 1) // self.model.config.attention.block_size
                read = layer["blocks"][row, :, -1].flatten().tolist()
                trace.blocks.append(sorted({own, *(block for block in read if 0 <= block < own)}))
        return trace

    def draw(self, logits: Tensor) -> list[int]:
        """Draw one token per row of the batch: (B, V). Rows with equal settings are drawn at once.

        A row's random number comes from its own stream, so the grouping changes no token.
        """

        def settings(row: int) -> tuple:
            request = self.batch[row].request
            return request.temperature, request.top_k or 0, request.top_p or 0

        drawn = [0] * len(self.batch)
        for _, group in itertools.groupby(sorted(range(len(drawn)), key=settings), settings):
            rows = list(group)
            request = self.batch[rows[0]].request
            streams = [self.batch[row].stream for row in rows]
            new = sample_token(
                logits[rows], request.temperature, request.top_k, request.top_p, streams
            )
            for row, token in zip(rows, new.tolist(), strict=True):
                drawn[row] = token
        return drawn

    def hand_over(self, task: Task, token: int, logits: Tensor, trace: Trace | None = None) -> bool:
        """Deliver a token, with the text that it makes certain. Return whether it was the last."""
        request, finish = task.request, None
        if token in request.stop_tokens:
            text, finish = task.held_back, "stop"
        else:
            text = task.held_back + self.decode_bytes([token])
            starts = [text.find(stop) for stop in request.stop if stop in text]
            if starts:
                text, finish = text[: min(starts)], "stop"
            elif task.generated == request.max_new_tokens:
                finish = "length"
        end = len(text) if finish else len(text) - possible_stop(text, request.stop)
        text, task.held_back = text[:end], text[end:]
        logprob, top = None, ()
        if request.logprobs is not None:
            logprobs = logits.double().log_softmax(dim=-1)
            best = logprobs.topk(min(request.logprobs, len(logprobs)))
            logprob = float(logprobs[token])
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        if not task.is_cancelled:
            task.deliver(Token(token, text, finish, logprob, top, trace))
        return finish is not None

    def fail(self) -> None:
        """End every request that has a slot: a step failed, and the caches are not whole."""
        tasks = [*self.batch, *self.reading]
        self.batch, self.reading = [], deque()
        self.totals.failed += len(tasks)
        for task in tasks:
            if not task.is_cancelled:
                task.deliver(Token(-1, b"", "error"))


def possible_stop(text: bytes, stops: tuple[bytes, ...]) -> int:
    """Return the length of the longest end of `text` that begins one of `stops`."""
    longest = max(map(len, stops), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(text[-n:] == stop[:n] for stop in stops)), 0)
