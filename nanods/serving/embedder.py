"""Dynamic batching: embed the inputs of many clients together, text, images and sounds at once.

A forward pass over 32 inputs takes far less time than 32 passes over one. But clients send their
inputs one at a time, and inputs that are batched together must have the same shape: a short text
beside a long one is padded, and padding is computed too. The file reads from top to bottom:

    embed_one_by_one     the reference: no batches
    embed_batch          one pass over inputs of one modality, padded to the longest
    Queues               what waits, by modality and length, and which of it comes next
    Embedder             accept requests, compute one batch after another, answer

Four rules make the batches:

    1. There is a queue for each modality and length bucket: 1, 2, 3-4, 5-8, 9-16, ... tokens. So
       padding never takes more than half of a batch.
    2. The queue with the oldest input is next. So every batch holds the input that has waited
       longest, and an input waits for at most as many batches as there were older inputs.
    3. A batch takes inputs from that queue, oldest first, up to a budget of tokens, padding
       included. The budget bounds the memory, and the time until the next batch begins.
    4. No input is held back to fill a batch: whenever one waits, a batch is computed. Meanwhile
       other inputs arrive, so that batches grow with the load by themselves.

Neither padding nor the rest of a batch changes an embedding, apart from rounding: 1e-6 in fp32. (A
router's scores of two experts may differ by less than that; rounding then chooses between them.)

Left out on purpose: several models, priorities, a cache of embeddings.

Pinned by tests/serving/test_embedder.py.

Shapes: B inputs of a batch, T tokens, N inputs of a request, M width of the common space.
"""

import asyncio
import itertools
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanods.errors import UserError
from nanods.multimodal import N_MELS, Multimodal
from nanods.serving.engine import BusyError
from nanods.training.metrics import stack_loads

Input = tuple[str, Tensor]  # a modality, and one example of it without a batch dimension

# ---- computing -----------------------------------------------------------------------------------


@torch.no_grad()
def embed_one_by_one(model: Multimodal, inputs: Sequence[Input]) -> Tensor:
    """Embed N inputs, each alone: the reference. Returns (N, M), on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.embed(name, x[None].to(device))[0].cpu() for name, x in inputs])


@torch.no_grad()
def embed_batch(model: Multimodal, inputs: Sequence[Input]) -> tuple[Tensor, Tensor | None]:
    """Embed B inputs of one modality together, padded to the longest.

    Returns the embeddings (B, M) and the load of each layer's experts (L, E), None without experts,
    both on the CPU. Padding is -1, which `Text` masks; inputs of the other modalities have one
    shape.
    """
    device = next(model.parameters()).device
    batch = pad_sequence([x for _, x in inputs], batch_first=True, padding_value=-1)  # (B, T, ...)
    embeddings, stats = model.embed(inputs[0][0], batch.to(device))
    load = stack_loads(stats)
    return embeddings.cpu(), None if load is None else load.cpu()


def count_tokens(model: Multimodal, name: str, x: Tensor) -> int:
    """Return the number of tokens of one input that the model can embed."""
    return len(x) if name == "text" else model.tokens_per_example()[name]


def fixed_shape(model: Multimodal, name: str) -> tuple[int, ...] | None:
    """Return the shape of every input of a modality; None if it may vary."""
    config = model.config
    size = config.image_size
    return {"image": (3, size, size), "audio": (N_MELS, config.frames)}.get(name)


def check_input(model: Multimodal, name: str, x: Tensor) -> None:
    """Raise UserError unless the model can embed one input.

    A request is checked before it waits, so that its mistake cannot reach another one's batch.
    """
    if name not in model.modalities:
        raise UserError(f"this model embeds no {name}, but {' and '.join(model.modalities)}")
    max_tokens = model.tokens_per_example()[name]
    if name == "text":
        if x.ndim != 1 or not 1 <= len(x) <= max_tokens:
            raise UserError(f"a text of shape {tuple(x.shape)}: give 1 to {max_tokens} token ids")
        if x.dtype != torch.int64 or x.min() < 0 or x.max() >= model.trunk.vocab_size:
            raise UserError(f"token ids must be integers from 0 to {model.trunk.vocab_size - 1}")
        return
    shape = fixed_shape(model, name)
    if shape and tuple(x.shape) != shape:
        raise UserError(f"{name} of shape {tuple(x.shape)}: this model reads {shape}")
    if not x.isfinite().all():
        raise UserError(f"{name}: some of its numbers are not finite")


# ---- what waits ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """What one client wants embedded, and its answer."""

    answer: Future
    items: list["Item"] = field(default_factory=list)
    embeddings: dict[int, Tensor] = field(default_factory=dict)  # so far, by position


@dataclass(eq=False)
class Item:
    """One input of a request."""

    number: int  # in the order of arrival
    name: str
    x: Tensor
    tokens: int
    request: Request
    position: int  # among the request's inputs


class Queues:
    """The items that wait: for each modality and length bucket a queue, in order of arrival."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: the most tokens of a batch, padding included; a single input may exceed
        it."""
        self.max_tokens = max_tokens
        # An OrderedDict finds and removes its first item, and any other, in constant time.
        self.queues: dict[tuple[str, int], OrderedDict[int, Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def key(self, item: Item) -> tuple[str, int]:
        """Return the modality and the bucket: 0 for 1 token, b for 2^(b-1) + 1 to 2^b tokens."""
        return item.name, (item.tokens - 1).bit_length()

    def add(self, item: Item) -> None:
        self.queues.setdefault(self.key(item), OrderedDict())[item.number] = item

    def remove(self, item: Item) -> None:
        """Remove an item, if it still waits."""
        queue = self.queues.get(self.key(item), {})
        queue.pop(item.number, None)
        if not queue:
            self.queues.pop(self.key(item), None)

    def next_batch(self) -> list[Item]:
        """Remove and return the items to embed together next; none if nothing waits."""
        if not self.queues:
            return []
        queue = min(self.queues.values(), key=lambda queue: next(iter(queue)))
        batch, longest = [], 0
        for item in queue.values():
            longest = max(longest, item.tokens)
            if batch and (len(batch) + 1) * longest > self.max_tokens:
                break
            batch.append(item)
        for item in batch:
            self.remove(item)
        return batch


# ---- requests ------------------------------------------------------------------------------------


@dataclass
class Totals:
    """What the embedder has done since it was made."""

    batches: int = 0
    inputs: int = 0
    tokens: int = 0
    padding: int = 0
    """Tokens that were computed beside `tokens`, to make lengths equal."""
    load: dict[str, Tensor] = field(default_factory=dict)
    """(L, E): assignments of each expert of each layer, by trunk: "shared", or a modality with a
    trunk of its own. Empty without experts."""


class Embedder:
    """Embed what clients submit, in batches, in one thread: `Thread(target=embedder.run)`.

        embedder.submit([("text", ids), ("image", pixels)]).result()      # (2, M)
        await embedder.embed([("text", ids)])                             # the same, in asyncio

    A request may mix modalities; it is answered when all its inputs are embedded. `cancel()` on its
    future, or on the task that awaits it, removes what still waits of it. A batch that is being
    computed is not interrupted: `max_tokens` bounds how long that takes.
    """

    def __init__(self, model: Multimodal, max_tokens: int = 512, max_waiting: int = 4096) -> None:
        """`max_tokens` of a batch; `max_waiting` inputs, beyond which requests are refused.

        The limit counts inputs and not requests: a request may hold a thousand of them.
        """
        self.model, self.max_waiting = model.eval(), max_waiting
        self.queues, self.numbers = Queues(max_tokens), itertools.count()
        self.changed = threading.Condition()  # guards `queues`, `numbers` and `is_closing`
        self.is_closing = False
        self.running = 0  # inputs of the batch that is being computed
        self.totals = Totals()
        model.tokens_per_example()  # imports much at the first call: now, while no client waits

    # ---- what a server calls, from any thread ----------------------------------------------------

    def submit(self, inputs: Sequence[Input]) -> Future:
        """Return the future embeddings (N, M) of N inputs, on the CPU.

        Raises UserError for inputs that the model cannot embed, BusyError if too many wait.
        """
        if not 1 <= len(inputs) <= self.max_waiting:
            raise UserError(f"{len(inputs)} inputs: a request has 1 to {self.max_waiting}")
        for name, x in inputs:
            check_input(self.model, name, x)
        tokens = [count_tokens(self.model, name, x) for name, x in inputs]
        request = Request(Future())
        with self.changed:
            if self.is_closing:
                raise BusyError("the server is stopping")
            if len(self.queues) + len(inputs) > self.max_waiting:
                raise BusyError(f"{len(self.queues)} inputs wait already")
            for position, ((name, x), count) in enumerate(zip(inputs, tokens, strict=True)):
                item = Item(next(self.numbers), name, x, count, request, position)
                request.items.append(item)
                self.queues.add(item)
            self.changed.notify()
        # It is called when the request is answered or cancelled; now, if it has been already.
        request.answer.add_done_callback(lambda _: self.forget(request.items))
        return request.answer

    async def embed(self, inputs: Sequence[Input]) -> Tensor:
        """Do what `submit` does from asyncio, whose loop runs on meanwhile."""
        return await asyncio.wrap_future(self.submit(inputs))

    def count_running(self) -> int:
        """Return how many inputs the batch has that is being computed."""
        return self.running

    def count_waiting(self) -> int:
        """Return how many inputs wait."""
        with self.changed:
            return len(self.queues)

    def close(self) -> None:
        """Refuse new requests, and let `run` return when those accepted are answered."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()

    # ---- what computes ---------------------------------------------------------------------------

    def run(self) -> None:
        """Embed what waits, wait where nothing does; return after `close`."""
        while self.run_batch():
            pass

    def run_batch(self) -> bool:
        """Wait until something waits, and embed a batch of it. Return False at the end."""
        self.running = 0
        with self.changed:
            self.changed.wait_for(lambda: self.is_closing or len(self.queues))
            batch = self.queues.next_batch()
            self.running = len(batch)
        if not batch:
            return False
        load = None
        try:
            results, load = embed_batch(self.model, [(item.name, item.x) for item in batch])
        except Exception:  # it must end neither the thread nor the requests that are not at fault
            results = [self.embed_alone(item) for item in batch]
        self.count(batch, load)
        for item, result in zip(batch, results, strict=True):
            self.answer(item, result)
        return True

    def embed_alone(self, item: Item) -> Tensor | Exception:
        """Embed an item of a batch that has failed. Return its error if it fails again."""
        try:
            return embed_one_by_one(self.model, [(item.name, item.x)])[0]
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return error

    def count(self, batch: list[Item], load: Tensor | None) -> None:
        """Add a batch and its experts' load (L, E) to the totals."""
        tokens = [item.tokens for item in batch]
        self.totals.batches += 1
        self.totals.inputs += len(batch)
        self.totals.tokens += sum(tokens)
        self.totals.padding += len(batch) * max(tokens) - sum(tokens)
        if load is not None:
            trunk = "shared" if self.model.config.shared else batch[0].name
            self.totals.load[trunk] = load + self.totals.load.get(trunk, 0)

    def answer(self, item: Item, result: Tensor | Exception) -> None:
        """Give an item's result to its request, which is answered with its last item."""
        request = item.request
        with suppress(InvalidStateError):  # it was cancelled meanwhile, or another item has failed
            if isinstance(result, Exception):
                request.answer.set_exception(result)
                return
            request.embeddings[item.position] = result
            if len(request.embeddings) == len(request.items):
                ordered = [request.embeddings[position] for position in range(len(request.items))]
                request.answer.set_result(torch.stack(ordered))

    def forget(self, items: list[Item]) -> None:
        """Remove the items of a request that was answered, has failed, or was cancelled."""
        with self.changed:
            for item in items:
                self.queues.remove(item)
        items.clear()
