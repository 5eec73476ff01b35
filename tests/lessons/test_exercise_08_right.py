"""The grader of lesson 08 accepts every correct implementation."""

import heapq

import numpy as np
import pytest
import steps_08
import torch
import torch.nn.functional as F

from nanods.gpt import GPT, GPTConfig
from nanods.serving import drift
from nanods.serving.embedder import Item, Queues
from nanods.serving.engine import READ_OVERHEAD, Engine, Request
from tests.lessons.wrong_answers import equal_pairs, grade_answer


def token_by_token(arrivals, lengths, slots):
    """Give each slot one token after another."""
    both = []
    for is_static in (True, False):
        left, running, ends, step = lengths.clone(), [], torch.full_like(lengths, -1), 0
        waiting = list(range(len(lengths)))
        while (ends < 0).any():
            if not (is_static and running):
                while waiting and arrivals[waiting[0]] <= step and len(running) < slots:
                    running.append(waiting.pop(0))
            for i in list(running):
                left[i] -= 1
                if left[i] == 0:
                    ends[i] = step
                    running.remove(i)
            step += 1
        both.append(ends)
    return both


def by_heap(arrivals, lengths, slots):
    free, continuous = [0] * slots, torch.empty(len(lengths), dtype=torch.int32)
    for i in range(len(lengths)):
        start = max(heapq.heappop(free), arrivals[i].item())
        continuous[i] = start + lengths[i].item() - 1
        heapq.heappush(free, continuous[i].item() + 1)
    return token_by_token(arrivals, lengths, slots)[0], continuous


def by_recursion(arrivals, lengths, slots):
    def static(first, step):
        if first == len(lengths):
            return []
        step = max(step, int(arrivals[first]))
        here = int((arrivals[first : first + slots] <= step).sum())
        batch = lengths[first : first + here]
        return [step + batch - 1, *static(first + here, step + int(batch.max()))]

    return torch.cat(static(0, 0)), by_heap(arrivals, lengths, slots)[1].long()


def by_counting_the_ends(arrivals, lengths, slots):
    """A request begins when fewer than `slots` of those before it end at or after that step."""
    continuous = torch.zeros_like(lengths)
    for i in range(len(lengths)):
        start = arrivals[i].clone()
        while (continuous[:i] >= start).sum() >= slots:
            start += 1
        continuous[i] = start + lengths[i] - 1
    return token_by_token(arrivals, lengths, slots)[0], continuous


def by_tensor_of_slots(arrivals, lengths, slots):
    """The slots are one tensor, and so are both answers."""
    free, both = torch.zeros(slots, dtype=torch.float64), torch.empty(2, len(lengths)).double()
    both[0] = by_recursion(arrivals, lengths, slots)[0]
    for i, (arrival, length) in enumerate(zip(arrivals, lengths, strict=True)):
        slot = free.argmin()
        free[slot] = torch.maximum(free[slot], arrival.double()) + length
        both[1, i] = free[slot] - 1
    return both.long().unbind(0)


def read_by_sums(left, chunk, overhead):
    price = torch.where(left > 0, left.clamp(min=overhead), 0)
    return (chunk - (price.cumsum(0) - price)).clamp(min=0).minimum(left)


def read_by_while(left, chunk, overhead):
    read, waiting = torch.zeros_like(left), [i for i, n in enumerate(left) if n > 0]
    while waiting and chunk > 0:
        i = waiting.pop(0)
        read[i] = min(left[i].item(), chunk)
        chunk = chunk - max(read[i].item(), overhead)
    return read


def read_by_recursion(left, chunk, overhead):
    if not len(left):
        return left
    first = left[:1].clamp(max=max(chunk, 0))
    cost = max(int(first), overhead) if first else 0
    return torch.cat([first, read_by_recursion(left[1:], chunk - cost, overhead)])


def read_in_int32(left, chunk, overhead):
    return read_by_sums(left.int(), chunk, overhead)


def read_by_numpy(left, chunk, overhead):
    read = []
    for n in left.numpy():
        read += [np.clip(n, 0, max(chunk, 0))]
        chunk -= bool(n) * max(read[-1], overhead)
    return torch.from_numpy(np.array(read))


def read_by_accumulated_views(left, chunk, overhead):
    table = torch.stack([left, left.clamp(min=overhead) * left.sign()])
    budgets = chunk - F.pad(table[1].cumsum(0), (1, 0))[:-1]
    return torch.stack([budgets.clamp(min=0), table[0]]).amin(dim=0)


def tokens_by_searchsorted(logits, streams):
    sums = logits.to(torch.float64).softmax(1).cumsum(1)
    u = [torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams]
    return torch.searchsorted(sums, torch.stack(u), right=True)[:, 0].clamp(max=sums.size(1) - 1)


def tokens_by_loops(logits, streams):
    tokens = []
    for row, stream in zip(logits, streams, strict=True):
        u, total = torch.rand((), generator=stream, dtype=torch.float64).item(), 0.0
        token, p = -1, row.double().softmax(0).tolist()
        while token < len(p) - 1 and u >= total:
            token += 1
            total += p[token]
        tokens.append(token)
    return torch.tensor(tokens)


def tokens_by_argmax(logits, streams):
    sums = F.softmax(logits, dim=1, dtype=torch.float64).cumsum(1)
    u = torch.cat([torch.rand(1, 1, generator=s, dtype=torch.float64) for s in streams])
    is_above = u < sums
    is_above[:, -1] = True
    return is_above.int().argmax(1)


def tokens_one_by_one(logits, streams):
    rows = [tokens_by_argmax(row[None], [s]) for row, s in zip(logits, streams, strict=True)]
    return torch.stack(rows)[:, 0]


def tokens_in_int32(logits, streams):
    return tokens_by_searchsorted(logits.flip(0).flip(0), streams).int()


def tokens_by_empty_and_fill(logits, streams):
    u = torch.empty(len(streams), 1, dtype=torch.float64)
    for i, stream in enumerate(streams):
        u[i].uniform_(generator=stream)
    sums = logits.double().log_softmax(-1).exp().cumsum(-1)
    return (sums.le(u).long().sum(-1)).clamp(max=logits.shape[-1] - 1)


def batches_as_nanods(modality, tokens, max_tokens):
    queues = Queues(max_tokens)
    for i, (name, count) in enumerate(zip(modality.tolist(), tokens.tolist(), strict=True)):
        queues.add(Item(i, str(name), tokens, count, None, 0))
    result, number = torch.empty_like(tokens), 0
    while batch := queues.next_batch():
        result[[item.number for item in batch]] = number
        number += 1
    return result


def batches_by_masks(modality, tokens, max_tokens):
    buckets = torch.ceil(torch.log2(tokens.double())).int()
    result = torch.full_like(tokens, -1)
    while (result < 0).any():
        first = int((result < 0).int().argmax())
        same = (result < 0) & (modality == modality[first]) & (buckets == buckets[first])
        rows = same.nonzero()[:, 0]
        padded = tokens[rows].cummax(0)[0] * torch.arange(1, len(rows) + 1)
        fits = int((padded <= max_tokens).int().cumprod(0).sum())
        result[rows[: max(1, fits)]] = result.max() + 1
    return result


def batches_by_lists(modality, tokens, max_tokens):
    rows = list(enumerate(zip(modality.tolist(), tokens.tolist(), strict=True)))
    result, number = {}, 0
    while rows:
        (i, (m, t)), *others = rows
        members, longest = [i], t
        for j, (other, length) in others:
            if other != m or len(f"{t - 1:b}" * (t > 1)) != len(f"{length - 1:b}" * (length > 1)):
                continue
            longest = max(longest, length)
            if longest * (len(members) + 1) > max_tokens:
                break
            members.append(j)
        result |= dict.fromkeys(members, number)
        rows = [row for row in rows if row[0] not in members]
        number += 1
    return torch.tensor([result[i] for i in range(len(tokens))])


def batches_in_int32(modality, tokens, max_tokens):
    return batches_as_nanods(modality.int(), tokens.int(), max_tokens)


def batches_of_a_view(modality, tokens, max_tokens):
    both = torch.stack([batches_by_lists(modality, tokens, max_tokens)] * 2, dim=1)
    return both[:, 1]


def sums_by_loops(z, allowance):
    sums = torch.zeros_like(z)
    for s in range(len(z)):
        total = 0.0
        for n in range(z.shape[1]):
            total = max(0.0, total + z[s, n].item() - allowance)
            sums[s, n] = total
    return sums


def sums_as_nanods(z, allowance):
    return torch.from_numpy(drift.cumulative_sums(z.numpy(), allowance))


def sums_by_alarm(z, allowance):
    """Use the class that the server uses, with a threshold that is never reached."""
    rows = []
    for row in z.tolist():
        cusum = drift.Cusum(drift.Reference(0.0, 1.0, allowance, 1e9))
        sums = []
        for score in row:
            cusum.update(score)
            sums.append(cusum.up)
        rows.append(sums)
    return torch.tensor(rows, dtype=z.dtype)


def sums_by_padding(z, allowance):
    free = F.pad((z - allowance).cumsum(1), (1, 0))
    return (free - free.cummin(1).values)[:, 1:]


def sums_of_all_beginnings(z, allowance):
    """The highest sum of scores in a row that end here, or 0."""
    columns = []
    for n in range(z.size(1)):
        tails = (z[:, : n + 1] - allowance).flip(1).cumsum(1)
        columns.append(tails.amax(1).clamp(min=0))
    return torch.stack(columns, 1)


def sums_by_columns(z, allowance):
    columns = list((z - allowance).unbind(1))
    for n in range(len(columns)):
        columns[n] = torch.relu(columns[n] + (columns[n - 1] if n else 0))
    return torch.stack(columns).T


def threshold_by_loops(z, starts, block, allowance):
    best = 0.0
    for row in starts.tolist():
        for sign in (1, -1):
            total = 0.0
            for start in row:
                for k in range(block):
                    total = max(0.0, total + sign * z[(start + k) % len(z)].item() - allowance)
                    best = max(best, total)
    return torch.tensor(best, dtype=z.dtype)


def threshold_by_padding(z, starts, block, allowance):
    windows = torch.cat([z, z[: block - 1]]).unfold(0, block, 1)  # (R, block)
    streams = windows[starts].reshape(len(starts), -1)
    return max(sums_by_padding(sign * streams, allowance).max() for sign in (1, -1))


def threshold_by_roll(z, starts, block, allowance):
    highest = torch.zeros((), dtype=z.dtype)
    for row in starts:
        stream = torch.cat([torch.roll(z, -int(start))[:block] for start in row])
        both = torch.stack([stream, -stream])
        highest = torch.maximum(highest, sums_by_columns(both, allowance).max())
    return highest


def threshold_by_gather(z, starts, block, allowance):
    positions = (starts.repeat_interleave(block, dim=1)) + torch.arange(block).repeat(
        starts.size(1)
    )
    streams = z.expand(len(starts), -1).gather(1, positions.remainder(len(z)))
    return sums_by_padding(torch.cat([streams, streams.neg()]), allowance).amax()


def threshold_by_numpy(z, starts, block, allowance):
    places = (starts.numpy()[..., None] + np.arange(block)) % len(z)
    streams = z.numpy()[places].reshape(len(starts), -1)
    up, down = (drift.cumulative_sums(sign * streams, allowance) for sign in (1, -1))
    return torch.tensor(max(up.max(), down.max()), dtype=z.dtype)


ANSWERS = [
    *(("finish_steps", f) for f in (token_by_token, by_heap, by_recursion)),
    *(("finish_steps", f) for f in (by_counting_the_ends, by_tensor_of_slots)),
    *(("read_in_step", f) for f in (read_by_sums, read_by_while, read_by_recursion)),
    *(("read_in_step", f) for f in (read_in_int32, read_by_numpy, read_by_accumulated_views)),
    *(("draw_tokens", f) for f in (tokens_by_searchsorted, tokens_by_loops, tokens_by_argmax)),
    *(("draw_tokens", f) for f in (tokens_one_by_one, tokens_in_int32, tokens_by_empty_and_fill)),
    *(("form_batches", f) for f in (batches_as_nanods, batches_by_masks, batches_by_lists)),
    *(("form_batches", f) for f in (batches_in_int32, batches_of_a_view)),
    *(("cumulative_sums", f) for f in (sums_by_loops, sums_as_nanods, sums_by_alarm)),
    *(("cumulative_sums", f) for f in (sums_by_padding, sums_of_all_beginnings, sums_by_columns)),
    *(("bootstrap_threshold", f) for f in (threshold_by_loops, threshold_by_padding)),
    *(("bootstrap_threshold", f) for f in (threshold_by_roll, threshold_by_gather)),
    ("bootstrap_threshold", threshold_by_numpy),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_correct_answers_pass(name, function):
    assert grade_answer(steps_08.STEPS, name, function).message == "OK"


def test_no_two_mistakes_give_the_same_result():
    """Otherwise the grader never reports one of them. And none gives the right one."""
    z, allowance = steps_08.random(steps_08.S, steps_08.N, seed=0), 0.4
    logits, seeds = steps_08.some_logits()
    of_requests, of_inputs, of_blocks = steps_08.requests(), steps_08.inputs(), steps_08.blocks()
    of_prompts = steps_08.prompts()
    for known, right in (
        (steps_08.known_static(*of_requests), steps_08.static_ends(*of_requests)),
        (steps_08.known_continuous(*of_requests), steps_08.continuous_ends(*of_requests)),
        (steps_08.known_reading(*of_prompts), steps_08.reading(*of_prompts)),
        (
            steps_08.known_tokens(logits, seeds),
            steps_08.reference_tokens(logits, steps_08.make_streams(seeds)),
        ),
        (steps_08.known_batches(*of_inputs), steps_08.batches_of(*of_inputs)),
        (steps_08.known_sums(z, allowance), steps_08.reference_sums(z, allowance)),
        (steps_08.known_thresholds(*of_blocks), steps_08.reference_threshold(*of_blocks)),
    ):
        assert not equal_pairs(known | {"right": right})


def small_engine(slots, **options):
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, context_length=128, vocab_size=11)
    return Engine(GPT(config), bytes, slots=slots, **options)


def test_the_continuous_ends_of_step_1_are_those_of_the_engine():
    """Prompts of one token need no reading."""
    arrivals, lengths, slots = steps_08.requests()
    engine, ends = small_engine(slots), torch.full_like(lengths, -1)
    for step in range(60):
        for i in (arrivals == step).nonzero()[:, 0].tolist():

            def deliver(token, i=i):
                ends[i] = engine.totals.steps

            engine.submit(Request((1,), max_new_tokens=int(lengths[i])), deliver)
        engine.step()
    assert torch.equal(ends, steps_08.continuous_ends(arrivals, lengths, slots))


def test_the_tokens_of_step_2_are_those_that_the_engine_reads():
    """The engine leaves the last token of each prompt to the next decoding."""
    left, chunk = torch.tensor([5, 20, 30, 3, 90, 20, 7]), 4 * READ_OVERHEAD + 14
    engine = small_engine(slots=8, chunk=chunk)
    tasks = [engine.submit(Request((1,) * (n + 1)), lambda token: None) for n in left.tolist()]
    with torch.no_grad():
        engine.read()
    expected = steps_08.reading(left, chunk, READ_OVERHEAD)
    assert [task.length for task in tasks] == expected.tolist()
    assert expected.tolist() == [5, 20, 30, 3, 14, 0, 0]
