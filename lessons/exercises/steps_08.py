"""The steps of lesson 08, each with its tests. check_08.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_08.py FILE

The grader finds mistakes by experiments on the functions, never by reading their source.
"""

import sys
from collections.abc import Callable, Iterable

import torch
from grade import (
    Answer,
    KnownMistakes,
    Mistake,
    Step,
    expect_dtype,
    expect_integers,
    expect_shape,
    first_index,
    is_close,
    main,
    raise_different_element,
    raise_known_mistake,
    random,
)
from torch import Tensor


def integers(result: Tensor, shape: tuple[int, ...], what: str, when: str) -> Tensor:
    """Check the shape and dtype of an answer's result, and return it as int64."""
    expect_shape(result, shape, when=when)
    expect_integers(result, what)
    return result.long()


def raise_different_integer(result: Tensor, expected: Tensor, name: str) -> None:
    """Raise a Mistake with the first integer that differs."""
    (i,) = first_index(result != expected)
    raise Mistake(f"{name}[{i}] is {int(result[i])}, but {int(expected[i])} is correct")


# ---- step 1: static and continuous batching ------------------------------------------------------


def requests() -> tuple[Tensor, Tensor, int]:
    """Return arrivals (n,), lengths (n,) and slots, where each known mistake shows."""
    arrivals = torch.tensor([0, 0, 1, 1, 2, 4, 4, 5, 40, 40, 43])
    lengths = torch.tensor([7, 2, 5, 3, 9, 2, 6, 1, 4, 8, 2])
    return arrivals, lengths, 3


def static_ends(
    arrivals: Tensor,
    lengths: Tensor,
    slots: int,
    gap: int = 0,
    wait_until_full: bool = False,
    take_the_future: bool = False,
    shortest_first: bool = False,
) -> Tensor:
    """Return the end of each request, (n,), with static batches; the options are mistakes."""
    ends, step, open_requests = torch.zeros_like(lengths), 0, list(range(len(lengths)))
    while open_requests:
        step = max(step, int(arrivals[open_requests[0]]))
        if wait_until_full:
            step = max(step, int(arrivals[open_requests[:slots][-1]]))
        batch = [i for i in open_requests if take_the_future or arrivals[i] <= step]
        if shortest_first:
            batch.sort(key=lambda i: int(lengths[i]))
        batch = batch[:slots]
        for i in batch:
            ends[i] = step + lengths[i] - 1
            open_requests.remove(i)
        step += int(max(lengths[i] for i in batch)) + gap
    return ends


def continuous_ends(
    arrivals: Tensor,
    lengths: Tensor,
    slots: int,
    gap: int = 0,
    in_turn: bool = False,
    shortest_first: bool = False,
) -> Tensor:
    """Return the end of each request, (n,), with continuous batching; the options are mistakes.

    gap: steps between the end of a request and the next one in its slot.
    """
    ends, free = torch.zeros_like(lengths), [0] * slots
    open_requests = list(range(len(lengths)))
    while open_requests:
        slot = len(lengths) - len(open_requests)
        slot = slot % slots if in_turn else free.index(min(free))
        i = open_requests[0]
        if shortest_first:
            now = max(free[slot], int(arrivals[i]))
            i = min((j for j in open_requests if arrivals[j] <= now), key=lambda j: int(lengths[j]))
        ends[i] = max(free[slot], int(arrivals[i])) + lengths[i] - 1
        free[slot] = int(ends[i]) + 1 + gap
        open_requests.remove(i)
    return ends


def common_ends(ends: Tensor, arrivals: Tensor, lengths: Tensor) -> KnownMistakes:
    """Return the mistakes that both ways share; `ends` are right."""
    return {
        "is one too high: a request that gets its slot in step t ends in step t + length - 1": (
            lambda: ends + 1
        ),
        "is the step in which a request gets its slot: add length - 1": lambda: ends - lengths + 1,
        "counts from the arrival: return the number of the step": lambda: ends - arrivals,
        "ignores the slots: at most that many requests generate in a step": (
            lambda: arrivals + lengths - 1
        ),
    }


def known_static(arrivals: Tensor, lengths: Tensor, slots: int) -> KnownMistakes:
    case = arrivals, lengths, slots
    ends = static_ends(*case)
    starts = ends - lengths + 1
    batch_ends = torch.stack([ends[starts == start].max() for start in starts])
    return common_ends(ends, arrivals, lengths) | {
        "serves one request at a time": lambda: static_ends(arrivals, lengths, 1),
        "waits until a batch is full: it begins with those that wait": (
            lambda: static_ends(*case, wait_until_full=True)
        ),
        "puts requests into a batch that had not arrived when it began": (
            lambda: static_ends(*case, take_the_future=True)
        ),
        "is the end of the whole batch: a request ends with its own last token": (
            lambda: batch_ends
        ),
        "is that of continuous batching: a batch lets no one in until its last request has ended": (
            lambda: continuous_ends(*case)
        ),
        "ignores the arrivals": lambda: static_ends(torch.zeros_like(arrivals), lengths, slots),
        "leaves a step empty between two batches": lambda: static_ends(*case, gap=1),
        "begins a batch in the last step of the one before": lambda: static_ends(*case, gap=-1),
        "takes the shortest requests first: they get their slots in their order": (
            lambda: static_ends(*case, shortest_first=True)
        ),
    }


def known_continuous(arrivals: Tensor, lengths: Tensor, slots: int) -> KnownMistakes:
    case = arrivals, lengths, slots
    return common_ends(continuous_ends(*case), arrivals, lengths) | {
        "serves one request at a time": lambda: continuous_ends(arrivals, lengths, 1),
        "is that of static batching: a free slot is given away at once": (
            lambda: static_ends(*case)
        ),
        "ignores the arrivals": lambda: continuous_ends(torch.zeros_like(arrivals), lengths, slots),
        "leaves a slot empty for a step: the next request gets it in the step after the end": (
            lambda: continuous_ends(*case, gap=1)
        ),
        "gives a slot away in the step in which its request still generates its last token": (
            lambda: continuous_ends(*case, gap=-1)
        ),
        "deals the slots out in turn: a request gets the slot that is free first": (
            lambda: continuous_ends(*case, in_turn=True)
        ),
        "takes the shortest requests first: they get their slots in their order": (
            lambda: continuous_ends(*case, shortest_first=True)
        ),
    }


def check_finish_steps(answer: Answer) -> None:
    def ends(arrivals: Tensor, lengths: Tensor, slots: int, when: str = "") -> Iterable[Tensor]:
        """Call the answer, check the shapes and dtypes of its results and return them."""
        results = answer(arrivals, lengths, slots, when=when)
        for result in results:
            expect_shape(result, tuple(arrivals.shape), when=when)
            expect_integers(result, "numbers of steps")
        return results

    case = requests()
    static, continuous = ends(*case)
    expected = static_ends(*case), continuous_ends(*case)
    if torch.equal(static, expected[1]) and torch.equal(continuous, expected[0]):
        raise Mistake("returns continuous and static: static comes first")
    for result, right, name, known in (
        (static, expected[0], "static", known_static),
        (continuous, expected[1], "continuous", known_continuous),
    ):
        if not torch.equal(result.long(), right):
            raise_known_mistake(result, known(*case), name)
            raise_different_integer(result, right, name)
    arrivals, lengths, _ = case
    zeros = torch.zeros_like(arrivals)
    cases = {
        "for one request": (arrivals[:1], lengths[:1], 3),
        "for one slot": (arrivals, lengths, 1),
        "for more slots than requests": (arrivals, lengths, 20),
        "where all arrive before step 0": (zeros, lengths, 3),
        "where every request needs one token": (arrivals, torch.ones_like(lengths), 3),
        "where the first request arrives late": (arrivals + 10, lengths, 3),
    }
    for when, case in cases.items():
        for result, right in zip(
            ends(*case, when=when), (static_ends(*case), continuous_ends(*case)), strict=True
        ):
            if not torch.equal(result.long(), right):
                raise Mistake(f"right in general, but wrong {when}")


# ---- step 2: chunked prefill ---------------------------------------------------------------------


def prompts() -> tuple[Tensor, int, int]:
    """Return left (n,), chunk and overhead, where each known mistake shows."""
    return torch.tensor([5, 0, 0, 20, 30, 3, 200, 20, 7, 4]), 96, 16


def reading(
    left: Tensor,
    chunk: int,
    overhead: int,
    price: Callable[[int, int], int] = lambda read, overhead: max(read, overhead) if read else 0,
    order: Iterable[int] | None = None,
    part: Callable[[int, int], int] = lambda needed, budget: max(0, min(needed, budget)),
) -> Tensor:
    """Return how many tokens a step reads, (n,). The last three arguments make mistakes: what a
    prompt takes from the budget, the order, and what is read of a prompt."""
    result, budget = torch.zeros_like(left), chunk
    for i in order if order is not None else range(len(left)):
        result[i] = part(int(left[i]), budget)
        budget -= price(int(result[i]), overhead)
    return result


def known_reading(left: Tensor, chunk: int, overhead: int) -> KnownMistakes:
    case = left, chunk, overhead
    n = len(left)
    right = reading(*case)
    return {
        "gives each prompt the whole budget: it is for all of them together": (
            lambda: left.clamp(max=chunk)
        ),
        "shares the budget evenly: the first prompt gets what it needs, then the next": (
            lambda: left.clamp(max=chunk // n)
        ),
        "reads all prompts whole": lambda: left,
        "reads the first prompt alone: what is left of the budget is for the next": (
            lambda: torch.where(torch.arange(n) == 0, right, 0)
        ),
        "ignores the overhead: a short prompt takes `overhead` from the budget": (
            lambda: reading(*case, price=lambda read, _: read)
        ),
        "takes the tokens and the overhead from the budget: take the larger of them": (
            lambda: reading(*case, price=lambda read, overhead: read + overhead if read else 0)
        ),
        "takes the smaller of tokens and overhead from the budget: take the larger": (
            lambda: reading(*case, price=lambda read, overhead: min(read, overhead))
        ),
        "reads `overhead` tokens of a short prompt: it has no more than it needs": (
            lambda: reading(
                *case,
                part=lambda needed, budget: (
                    max(0, min(max(needed, overhead), budget)) if needed else 0
                ),
            )
        ),
        "lets a prompt that needs nothing take `overhead` from the budget": (
            lambda: reading(*case, price=max)
        ),
        "reads a prompt whole or not at all: read as much of it as the budget allows": (
            lambda: reading(*case, part=lambda needed, budget: needed if needed <= budget else 0)
        ),
        "stops where less than `overhead` is left of the budget: stop at 0": (
            lambda: reading(
                *case, part=lambda needed, b: 0 if b < overhead else max(0, min(needed, b))
            )
        ),
        "takes the shortest prompts first: they are read in their order": (
            lambda: reading(*case, order=left.argsort(stable=True).tolist())
        ),
        "takes the last prompt first": lambda: reading(*case, order=reversed(range(n))),
        "is what is left afterwards: return what is read": lambda: left - right,
        "becomes negative where the budget is used up: read nothing there": (
            lambda: reading(*case, part=min)
        ),
    }


def check_read_in_step(answer: Answer) -> None:
    def read(left: Tensor, chunk: int, overhead: int, when: str = "") -> Tensor:
        result = answer(left, chunk, overhead, when=when)
        return integers(result, tuple(left.shape), "numbers of tokens", when)

    case = prompts()
    result, expected = read(*case), reading(*case)
    if not torch.equal(result, expected):
        raise_known_mistake(result, known_reading(*case))
        raise_different_integer(result, expected, "the result ")
    left, chunk, overhead = case
    cases = {
        "for one prompt": (left[:1], chunk, overhead),
        "for a prompt that is longer than the chunk": (torch.tensor([500, 7]), chunk, overhead),
        "where the prompts use the chunk up exactly": (torch.tensor([40, 24, 9]), chunk, overhead),
        "where no prompt needs anything": (torch.zeros_like(left), chunk, overhead),
        "where the overhead is larger than the chunk": (left, 8, 16),
        "where the overhead is 1": (left, chunk, 1),
        "for 40 prompts": (torch.arange(40) % 7, 100, 4),
    }
    for when, case in cases.items():
        if not torch.equal(read(*case, when=when), reading(*case)):
            raise Mistake(f"right in general, but wrong {when}")


# ---- step 3: a random stream per row -------------------------------------------------------------

B, V = 6, 9
Draw = tuple[Tensor, list[int]]  # logits (B, V) and the seed of each row's stream


def some_logits() -> Draw:
    return 1.5 * random(B, V), list(range(B))


def make_streams(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniform(stream: torch.Generator) -> Tensor:
    return torch.rand((), generator=stream, dtype=torch.float64)


def tokens_of(p: Tensor, u: Tensor) -> Tensor:
    """Return the first token of each row whose sum of probabilities (B, V) exceeds u (B,)."""
    return (p.cumsum(dim=-1) <= u[:, None]).sum(dim=-1).clamp(max=p.size(-1) - 1)


def reference_tokens(logits: Tensor, streams: list[torch.Generator]) -> Tensor:
    return tokens_of(logits.double().softmax(dim=-1), torch.stack([uniform(s) for s in streams]))


def known_tokens(logits: Tensor, seeds: list[int]) -> KnownMistakes:
    p = logits.double().softmax(dim=-1)
    u = torch.stack([uniform(stream) for stream in make_streams(seeds)])
    first = make_streams(seeds)[0]
    from_first = torch.rand(len(p), generator=make_streams(seeds)[0], dtype=torch.float64)
    ordered, order = p.sort(dim=-1, descending=True)
    second = make_streams(seeds)
    for stream in second:
        uniform(stream)
    in_fp32 = torch.stack([torch.rand((), generator=s) for s in make_streams(seeds)])
    return {
        "takes all numbers from the first row's stream: then a token depends on how many rows "
        "stand before it": lambda: tokens_of(p, from_first),
        "takes one number for all rows": lambda: tokens_of(p, uniform(first).expand(len(p))),
        "gives each row the stream of another row: the order is reversed": (
            lambda: tokens_of(p, u.flip(0))
        ),
        "is the likeliest token of each row: draw one": lambda: p.argmax(dim=-1),
        "is one too high: the first v for which u is below the sum": (
            lambda: (tokens_of(p, u) + 1).clamp(max=V - 1)
        ),
        "is one too low: the first v for which u is below the sum": (
            lambda: (tokens_of(p, u) - 1).clamp(min=0)
        ),
        "takes 1 - u, or counts the tokens from the last": lambda: tokens_of(p, 1 - u),
        "takes the softmax over the rows: then a token depends on the other rows": (
            lambda: tokens_of(logits.double().softmax(dim=0), u)
        ),
        "adds up the probabilities in descending order: add them in the order of the tokens": (
            lambda: order.gather(1, tokens_of(ordered, u)[:, None])[:, 0]
        ),
        "takes the second number of each stream: draw one alone": (
            lambda: tokens_of(p, torch.stack([uniform(stream) for stream in second]))
        ),
        "draws u in fp32: draw it with dtype=torch.float64": lambda: tokens_of(p, in_fp32.double()),
        "ignores the logits: the tokens are all equally likely": (
            lambda: tokens_of(torch.full_like(p, 1 / V), u)
        ),
        "takes the logits for probabilities: softmax first": lambda: tokens_of(logits.double(), u),
    }


def check_draw_tokens(answer: Answer) -> None:
    def tokens(logits: Tensor, seeds: list[int], when: str = "") -> Tensor:
        """Call the answer, check its result and how far it has moved the streams, return it."""
        streams, moved = make_streams(seeds), make_streams(seeds)
        result = answer(logits, streams, when=when)
        result = integers(result, (len(logits),), "tokens", when)
        expected = reference_tokens(logits, moved)
        if when and not torch.equal(result, expected):
            raise Mistake(f"right in general, but wrong {when}")
        if torch.equal(result, expected):
            for row, (stream, right) in enumerate(zip(streams, moved, strict=True)):
                check_stream(stream, seeds[row], right)
        return result

    logits, seeds = some_logits()
    before = torch.get_rng_state()
    result, expected = tokens(logits, seeds), reference_tokens(logits, make_streams(seeds))
    if not torch.equal(result, expected):
        if not torch.equal(torch.get_rng_state(), before):
            raise Mistake("draws from PyTorch's own random numbers: pass generator=stream to rand")
        raise_known_mistake(result, known_tokens(logits, seeds))
        raise_different_integer(result, expected, "the tokens ")
    order = [3, 0, 5]
    cases = {
        "for one row": (logits[2:3], seeds[2:3]),
        "where some rows have left and others have moved": (
            logits[order],
            [seeds[i] for i in order],
        ),
        "for one token to choose from": (logits[:, :1], seeds),
        "for logits so far apart that a softmax is 0": (400 * logits, seeds),
        "for 50 rows": (random(50, 300, seed=7), list(range(50))),
        "for logits of bfloat16, whose softmax must be in fp64": (
            random(50, 300, seed=7).bfloat16(),
            list(range(50)),
        ),
    }
    for when, case in cases.items():
        tokens(*case, when=when)
    streams, right = make_streams(seeds), make_streams(seeds)
    for count in range(3):
        result = answer(logits, streams, when="for the same streams again").long()
        if not is_close(result, reference_tokens(logits, right)):
            raise Mistake(
                f"right at first, but wrong for the same streams again (call {count + 1}): they "
                "must go on where they were"
            )


def check_stream(stream: torch.Generator, seed: int, right: torch.Generator) -> None:
    """Raise Mistake unless the stream is where `right` is, one draw after its start."""
    if torch.equal(stream.get_state(), right.get_state()):
        return
    if torch.equal(stream.get_state(), make_streams([seed])[0].get_state()):
        raise Mistake("leaves a stream where it was: its next token will be drawn by the same u")
    raise Mistake("takes more from a stream than one number: its next token will be another one")


# ---- step 4: the batches of an embedder ----------------------------------------------------------


def inputs() -> tuple[Tensor, Tensor, int]:
    """Return modality (n,), tokens (n,) and max_tokens, where each known mistake shows."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 3, 3, 4, 4, 5, 6, 7, 9, 20])
    tokens = lengths[torch.randint(len(lengths), (60,), generator=generator)]
    return (torch.rand(60, generator=generator) < 0.3).long(), tokens, 12


def batches_of(
    modality: Tensor,
    tokens: Tensor,
    max_tokens: int,
    key: Callable[[int, int], tuple] = lambda name, length: (name, (length - 1).bit_length()),
    size: Callable[[list[int]], int] = lambda lengths: len(lengths) * max(lengths),
    next_one: Callable[[list[int], list[tuple]], int] = lambda waiting, keys: waiting[0],
    closes: bool = True,
    in_a_row: bool = False,
) -> Tensor:
    """Return the batch of each input, (n,). The later arguments make mistakes: which inputs belong
    together, the tokens of a batch, the input that begins a batch, whether one that does not fit
    closes the batch, and whether one of another queue does."""
    lengths = tokens.tolist()
    keys = [key(*row) for row in zip(modality.tolist(), lengths, strict=True)]
    result, waiting, number = torch.zeros_like(tokens), list(range(len(lengths))), 0
    while waiting:
        first = next_one(waiting, keys)
        batch = [first]
        for i in [i for i in waiting if i != first]:
            if keys[i] != keys[first]:
                if in_a_row:
                    break
                continue
            if size([lengths[j] for j in (*batch, i)]) <= max_tokens:
                batch.append(i)
            elif closes:
                break
        for i in batch:
            result[i] = number
            waiting.remove(i)
        number += 1
    return result


def largest_queue(waiting: list[int], keys: list[tuple]) -> int:
    in_queues = [keys[i] for i in waiting]
    return max(waiting, key=lambda i: in_queues.count(keys[i]))


def renumbered(batches: Tensor, keys: list[tuple], within: bool) -> Tensor:
    """Return the numbers of the batches if each queue has numbers of its own (`within`), or if all
    batches of a queue come before those of the next."""
    queues = list(dict.fromkeys(keys))
    result, start = torch.zeros_like(batches), 0
    for queue in queues:
        rows = torch.tensor([key == queue for key in keys])
        numbers = batches[rows].unique(return_inverse=True)[1]
        result[rows] = numbers + (0 if within else start)
        start += int(numbers.max()) + 1
    return result


def known_batches(modality: Tensor, tokens: Tensor, max_tokens: int) -> KnownMistakes:
    case = modality, tokens, max_tokens
    right = batches_of(*case)
    keys = [(m, (t - 1).bit_length()) for m, t in zip(*(x.tolist() for x in case[:2]), strict=True)]
    return {
        "ignores the modality: an image cannot be in a batch of texts": (
            lambda: batches_of(*case, key=lambda name, length: ((length - 1).bit_length(),))
        ),
        "ignores the length buckets: a short text is then padded to a long one": (
            lambda: batches_of(*case, key=lambda name, length: (name,))
        ),
        "has the buckets 1, 2-3, 4-7, 8-15, ...: they are 1, 2, 3-4, 5-8, ...": (
            lambda: batches_of(*case, key=lambda name, length: (name, length.bit_length()))
        ),
        "has a bucket for each length: 3 and 4 tokens are in one": (
            lambda: batches_of(*case, key=lambda name, length: (name, length))
        ),
        "counts the tokens without the padding": lambda: batches_of(*case, size=sum),
        "pads to the end of the bucket: pad to the longest input of the batch": (
            lambda: batches_of(
                *case, size=lambda batch: len(batch) * 2 ** (max(batch) - 1).bit_length()
            )
        ),
        "pads to the first input of the batch: pad to the longest": (
            lambda: batches_of(*case, size=lambda batch: len(batch) * batch[0])
        ),
        "pads to the input that is added: pad to the longest of the batch": (
            lambda: batches_of(*case, size=lambda batch: len(batch) * batch[-1])
        ),
        "closes a batch of exactly max_tokens too early: that many fit": (
            lambda: batches_of(*case, size=lambda batch: len(batch) * max(batch) + 1)
        ),
        "closes a batch one input too late": (
            lambda: batches_of(*case, size=lambda batch: (len(batch) - 1) * max(batch))
        ),
        "goes on after an input that does not fit: it closes the batch": (
            lambda: batches_of(*case, closes=False)
        ),
        "closes a batch at an input of another queue: pass over it": (
            lambda: batches_of(*case, in_a_row=True)
        ),
        "counts inputs: max_tokens limits the tokens": lambda: batches_of(*case, size=len),
        "puts a whole queue into one batch, whatever max_tokens is": (
            lambda: batches_of(*case, size=lambda batch: 0)
        ),
        "gives each input a batch of its own": lambda: torch.arange(len(tokens)),
        "numbers the batches of each queue from 0": lambda: renumbered(right, keys, within=True),
        "computes all batches of one queue before the next: the oldest input is next": (
            lambda: renumbered(right, keys, within=False)
        ),
        "takes the longest queue first: the oldest input is next": (
            lambda: batches_of(*case, next_one=largest_queue)
        ),
    }


def check_form_batches(answer: Answer) -> None:
    def batches(modality: Tensor, tokens: Tensor, max_tokens: int, when: str = "") -> Tensor:
        result = answer(modality, tokens, max_tokens, when=when)
        return integers(result, tuple(tokens.shape), "numbers of batches", when)

    case = inputs()
    result, expected = batches(*case), batches_of(*case)
    if not torch.equal(result, expected):
        if torch.equal(result, expected + 1):
            raise Mistake("numbers the batches from 1: the first has the number 0")
        raise_known_mistake(result, known_batches(*case))
        raise_different_integer(result, expected, "the batch ")
    modality, tokens, max_tokens = case
    cases = {
        "for one input": (modality[:1], tokens[:1], max_tokens),
        "where every input alone has more than max_tokens": (modality, tokens + 40, max_tokens),
        "where all fit into one batch": (modality * 0, torch.full_like(tokens, 5), 1000),
        "for inputs of one token": (modality, torch.ones_like(tokens), 4),
        "for five modalities": (torch.arange(len(tokens)) % 5, tokens, max_tokens),
        "for max_tokens 1": (modality, tokens, 1),
    }
    for when, case in cases.items():
        if not torch.equal(batches(*case, when=when), batches_of(*case)):
            raise Mistake(f"right in general, but wrong {when}")


# ---- step 5: the cumulative sum ------------------------------------------------------------------

S, N = 3, 12


def reference_sums(z: Tensor, allowance: float) -> Tensor:
    sums, total = [], torch.zeros_like(z[:, 0])
    for score in z.unbind(dim=1):
        total = (total + score - allowance).clamp(min=0)
        sums.append(total)
    return torch.stack(sums, dim=1)


def known_sums(z: Tensor, allowance: float) -> KnownMistakes:
    def run(update: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        """Return the function that computes sums by another update(sum, score)."""

        def sums() -> Tensor:
            total, found = torch.zeros_like(z[:, 0]), []
            for score in z.unbind(dim=1):
                total = update(total, score)
                found.append(total)
            return torch.stack(found, dim=1)

        return sums

    free = (z - allowance).cumsum(dim=1)
    right = reference_sums(z, allowance)
    return {
        "has no floor: it falls below 0": lambda: free,
        "sets what is below 0 to 0 only at the end: the sum itself must not fall below 0": (
            lambda: free.clamp(min=0)
        ),
        "lacks the allowance": run(lambda total, score: (total + score).clamp(min=0)),
        "adds the allowance: subtract it": (
            run(lambda total, score: (total + score + allowance).clamp(min=0))
        ),
        "subtracts the allowance after the floor": (
            run(lambda total, score: (total + score).clamp(min=0) - allowance)
        ),
        "leaves out the scores below the allowance: they lower the sum": (
            run(lambda total, score: total + (score - allowance).clamp(min=0))
        ),
        "rises while the scores fall: it is the sum of -z": (
            run(lambda total, score: (total - score - allowance).clamp(min=0))
        ),
        "takes magnitudes of the scores": (
            run(lambda total, score: (total + score.abs() - allowance).clamp(min=0))
        ),
        "takes the magnitude of the sum: below 0 it is 0": (
            run(lambda total, score: (total + score - allowance).abs())
        ),
        "is the sum before each score: it is the sum after it": (
            lambda: torch.cat([torch.zeros_like(right[:, :1]), right[:, :-1]], dim=1)
        ),
        "begins with 0 after the first score: the sum is 0 before it": (
            lambda: free - free.cummin(dim=1).values
        ),
        "goes on from one stream to the next: each begins with 0": (
            lambda: reference_sums(z.reshape(1, -1), allowance).reshape(z.shape)
        ),
        "runs over the streams: it runs along each of them": (
            lambda: reference_sums(z.T, allowance).T
        ),
        "is the highest sum so far": lambda: right.cummax(dim=1).values,
        "has a ceiling of 0 instead of a floor": (
            run(lambda total, score: (total + score - allowance).clamp(max=0))
        ),
    }


def check_cumulative_sums(answer: Answer) -> None:
    def sums(z: Tensor, allowance: float, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(z, allowance, when=when)
        expect_shape(result, tuple(z.shape), when=when)
        expect_dtype(result, z)
        return result

    z, allowance = random(S, N, seed=0), 0.4
    result, expected = sums(z, allowance), reference_sums(z, allowance)
    if not is_close(result, expected):
        raise_known_mistake(result, known_sums(z, allowance))
        raise_different_element(result, expected, "the sum ")
    cases = {
        "for one stream": (z[:1], allowance),
        "for one score": (z[:, :1], allowance),
        "where every sum is above 0": (z.abs() + 1, allowance),
        "where every sum is 0": (-z.abs(), allowance),
        "for allowance 0": (z, 0.0),
        "for 300 scores": (random(2, 300, seed=5), allowance),
    }
    for when, case in cases.items():
        if not is_close(sums(*case, when=when), reference_sums(*case)):
            raise Mistake(f"right in general, but wrong {when}")
    if not is_close(sums(z.float(), allowance, "in fp32").double(), expected, 1e-4):
        raise Mistake("right in fp64, but wrong in fp32")


# ---- step 6: the block bootstrap -----------------------------------------------------------------


def blocks() -> tuple[Tensor, Tensor, int, float]:
    """Return z (R,), starts (S, K), block and allowance. The highest sum is that of a stream's
    falling scores, and its stream has a block that goes on with the beginning of z."""
    z = random(31, seed=0)
    starts = torch.randint(len(z), (4, 5), generator=torch.Generator().manual_seed(0))
    return z, starts, 6, 0.3


def streams_of(z: Tensor, starts: Tensor, block: int) -> Tensor:
    """Return the joined blocks, (S, K * block)."""
    positions = (starts[..., None] + torch.arange(block)) % len(z)
    return z[positions].flatten(1)


def highest(streams: Tensor, allowance: float) -> Tensor:
    return reference_sums(torch.cat([streams, -streams]), allowance).max()


def reference_threshold(z: Tensor, starts: Tensor, block: int, allowance: float) -> Tensor:
    return highest(streams_of(z, starts, block), allowance)


def known_thresholds(z: Tensor, starts: Tensor, block: int, allowance: float) -> KnownMistakes:
    streams = streams_of(z, starts, block)
    both = torch.cat([streams, -streams])
    sums = reference_sums(both, allowance)
    of_streams = sums.amax(dim=1)
    offsets = starts[..., None] + torch.arange(block)
    alternating = z[offsets % len(z)].transpose(1, 2).flatten(1)
    single = z[(starts.flatten()[:, None] + torch.arange(block)) % len(z)]
    return {
        "takes the sums of rising scores alone: those of falling ones may be higher": (
            lambda: reference_sums(streams, allowance).max()
        ),
        "is the mean over the streams of their highest sums: take the highest of all": (
            lambda: of_streams.mean()
        ),
        "is the lowest of the streams' highest sums: take the highest": lambda: of_streams.min(),
        "is the highest sum at the end of a stream: take the highest on the way": (
            lambda: sums[:, -1].max()
        ),
        "is the mean of all sums: take the highest": lambda: sums.mean(),
        "is the highest score: take the highest sum": lambda: both.max(),
        "begins each block with a sum of 0: the blocks of a stream are joined": (
            lambda: highest(single, allowance)
        ),
        "joins all streams to one: each begins with 0": (
            lambda: highest(streams.reshape(1, -1), allowance)
        ),
        "repeats the last score at the end of the reference: it continues with its beginning": (
            lambda: highest(z[offsets.clamp(max=len(z) - 1)].flatten(1), allowance)
        ),
        "joins the first scores of all blocks, then the second ones: keep each block together": (
            lambda: highest(alternating, allowance)
        ),
        "takes one score for each block: take `block` of them in a row": (
            lambda: highest(z[starts], allowance)
        ),
        "is the threshold of the reference itself: take the blocks from `starts`": (
            lambda: highest(z[None], allowance)
        ),
        "lets a block end at its start: it goes forward from there": (
            lambda: highest(z[(offsets - block + 1) % len(z)].flatten(1), allowance)
        ),
        "lacks the allowance": lambda: highest(streams, 0.0),
        "takes magnitudes of the scores: take the sums of z and those of -z": (
            lambda: highest(streams.abs(), allowance)
        ),
    }


def check_bootstrap_threshold(answer: Answer) -> None:
    def threshold(*arguments, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(*arguments, when=when)
        S = len(arguments[1])
        is_unreduced = not when and result.ndim == 1 and len(result) in (S, 2 * S)
        hint = ": one number for each stream; return the highest" if is_unreduced else ""
        expect_shape(result, (), hint, when)
        expect_dtype(result, arguments[0])
        return result

    case = blocks()
    result, expected = threshold(*case), reference_threshold(*case)
    if not is_close(result, expected):
        raise_known_mistake(result, known_thresholds(*case))
        raise_different_element(result, expected, "the threshold")
    z, starts, block, allowance = case
    cases = {
        "for one stream": (z, starts[:1], block, allowance),
        "for one block in a stream": (z, starts[:, :1], block, allowance),
        "for blocks of one score": (z, starts, 1, allowance),
        "for blocks as long as the reference": (z, starts, len(z), allowance),
        "where rising scores have the highest sum": (-z, starts, block, allowance),
        "where every sum is 0": (z, starts, block, 100.0),
        "for allowance 0": (z, starts, block, 0.0),
    }
    for when, case in cases.items():
        if not is_close(threshold(*case, when=when), reference_threshold(*case)):
            raise Mistake(f"right in general, but wrong {when}")
    in_fp32 = threshold(z.float(), starts, block, allowance, when="in fp32")
    if not is_close(in_fp32.double(), expected, 1e-4):
        raise Mistake("right in fp64, but wrong in fp32")


STEPS = [
    Step("finish_steps", check_finish_steps, returns=("static", "continuous")),
    Step("read_in_step", check_read_in_step),
    Step("draw_tokens", check_draw_tokens),
    Step("form_batches", check_form_batches),
    Step("cumulative_sums", check_cumulative_sums),
    Step("bootstrap_threshold", check_bootstrap_threshold),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
