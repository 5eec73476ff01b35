"""Continuous batching: a request gets what `GPT.generate` gives it alone, whatever its neighbours
do, and nothing of a request is left when it is gone."""

import gc
import random
import threading
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from nanods.moe import MoEConfig
from nanods.serving.engine import (
    READ_OVERHEAD,
    BusyError,
    Engine,
    Request,
    Task,
    possible_stop,
)
from tests.test_gpt import CONFIGS, DENSE, model_of

ALL = CONFIGS | {
    "experts with a capacity": replace(
        DENSE, moe=MoEConfig(n_expert=4, top_k=2, capacity_factor=0.5)
    )
}
MAIN = (
    "dense",
    "convolution",
    "flat-mean",
    "tile-bound",
    "experts",
    "sparse experts",
    "experts with a capacity",
)
CONTEXT = DENSE.context_length
decode = bytes  # token i is byte i


def engine_of(name="dense", slots=32, **options):
    return Engine(model_of(ALL[name]), decode, slots=slots, chunk=7, **options)


def random_request(draw, **fixed):
    """Return a request of random length and settings, often longer than a context."""
    options = {
        "prompt": tuple(draw.randrange(50) for _ in range(draw.choice([1, 2, 9, 24, 30]))),
        "max_new_tokens": draw.choice([1, 3, 10, 40]),
        "temperature": draw.choice([0, 0.7, 1.0]),
        "top_k": draw.choice([None, 5]),
        "top_p": draw.choice([None, 0.8]),
        "seed": draw.randrange(100),
    }
    return Request(**options | fixed)


def alone(model, request):
    """Return the tokens of the naive reference: one request at a time, by `GPT.generate`."""
    tokens = model.generate(
        torch.tensor([request.prompt]),
        request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        stop=request.stop_tokens,
        seed=request.seed,
    )
    return [int(token) for token in tokens]


def finish(engine):
    while engine.has_work():
        engine.step()


def ids(tokens):
    return [token.id for token in tokens]


@pytest.mark.parametrize("name", ALL)
def test_the_tokens_are_those_of_generating_one_request_at_a_time(name):
    draw, engine = random.Random(1), engine_of(name, slots=5)
    requests = [random_request(draw) for _ in range(8)]
    made = [[] for _ in requests]
    for request, tokens in zip(requests, made, strict=True):
        engine.submit(request, tokens.append)
        for _ in range(draw.randrange(4)):
            engine.step()
    finish(engine)
    for request, tokens in zip(requests, made, strict=True):
        assert ids(tokens) == alone(engine.model, request)
        assert [t.finish for t in tokens] == [None] * (len(tokens) - 1) + ["length"]


def among_others(engine, request, seed, n_others):
    """Return a request's tokens, while random others join, leave and are cancelled."""
    draw, tokens, others = random.Random(seed), [], []
    for _ in range(draw.randrange(5) if n_others else 0):
        engine.submit(random_request(draw), lambda token: None)
        engine.step()
    engine.submit(request, tokens.append)
    while not (tokens and tokens[-1].finish):
        while len(engine.batch) + len(engine.reading) + len(engine.waiting) <= n_others:
            others.append(engine.submit(random_request(draw), lambda token: None))
        if others and draw.random() < 0.3:
            engine.cancel(others.pop(draw.randrange(len(others))))
        engine.step()
    return tokens


@pytest.mark.parametrize("name", MAIN)
def test_nothing_depends_on_31_neighbours_that_join_and_leave_at_random(name):
    request = random_request(
        random.Random(0), prompt=(1, 2, 3), max_new_tokens=32, temperature=1.0, logprobs=3
    )
    by_itself, together = (
        among_others(engine_of(name), request, seed=1, n_others=n) for n in (0, 31)
    )
    assert ids(together) == ids(by_itself) == alone(model_of(ALL[name]).eval(), request)
    for token, expected in zip(together, by_itself, strict=True):
        assert abs(token.logprob - expected.logprob) <= 1e-10
        assert [i for i, _ in token.top] == [i for i, _ in expected.top]


@pytest.mark.parametrize("name", MAIN)
def test_what_other_requests_left_in_the_cache_is_never_read(name):
    made = []
    for fill in (0, 1e3):
        engine, tokens = engine_of(name, slots=2), []
        for cache in (engine.cache, engine.reader):
            for tensor in (*cache.keys, *cache.values, *cache.summaries, *cache.recent):
                tensor.copy_(fill * torch.randn_like(tensor))
            for tensor in cache.tile_selections:
                tensor.fill_(1 if fill else -1)
        for prompt in ((4, 5), tuple(range(19))):
            engine.submit(Request(prompt, 30, logprobs=0), tokens.append)
        finish(engine)
        made.append([(token.id, token.logprob) for token in tokens])
    assert made[0] == made[1]


def test_a_full_row_forgets_alone():
    engine = engine_of("tile-mean", slots=3)
    tasks = [
        engine.submit(Request(prompt, 40), lambda token: None)
        for prompt in ((1,), tuple(range(20)), (2, 3))
    ]
    lengths = []
    while len(lengths) < 12:
        engine.step()
        lengths.append([task.length for task in tasks])
    first, second, third = zip(*lengths, strict=True)
    assert min(b - a for a, b in pairwise(second)) < 0  # it forgot
    for grows in (first, third):  # the others did not, and drew a token in every step
        grown = [b - a for a, b in pairwise(grows)]
        assert min(grown) >= 0 and set(grown[5:]) == {1}
    finish(engine)


def test_the_batch_waits_for_one_chunk_and_not_for_a_whole_prompt():
    engine, tokens = engine_of(slots=8), []
    engine.submit(Request((1,), 20), tokens.append)
    engine.step()
    for _ in range(3):
        engine.submit(Request(tuple(range(24)), 2), lambda token: None)
    for step in range(2, 14):  # 3 prompts of 23 tokens, each in 4 chunks of at most 7
        before = engine.totals.read_tokens
        engine.step()
        assert engine.totals.read_tokens - before <= 7 and len(tokens) == step
    assert engine.totals.read_tokens >= 60


def test_short_prompts_share_a_step():
    engine, began = Engine(model_of(DENSE), decode, chunk=4 * READ_OVERHEAD), []
    for i in range(6):
        engine.submit(Request((i, 1, 2), 3), lambda token, i=i: began.append(i))
    engine.step()
    assert sorted(began) == [0, 1, 2, 3]  # each reading counts as READ_OVERHEAD
    engine.step()
    assert sorted(set(began)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("moment", ["waiting", "reading", "batch"])
def test_a_cancelled_request_is_gone_after_one_step(moment):
    engine, kept, dropped = engine_of(slots=2), [], []
    engine.submit(Request((1, 2), 30), kept.append)
    prompt = tuple(range(24)) if moment == "reading" else (3,)
    if moment == "waiting":
        engine.submit(Request((9,), 30), lambda token: None)
    engine.step()
    task = engine.submit(Request(prompt, 30), dropped.append)
    engine.step()
    assert task in getattr(engine, moment)
    seen = len(dropped)
    engine.cancel(task)
    engine.cancel(task)  # twice does no harm
    engine.step()
    assert len(dropped) == seen and engine.totals.cancelled == 1
    assert task not in (*engine.waiting, *engine.reading, *engine.batch)
    finish(engine)
    engine.cancel(task)
    assert ids(kept) == alone(engine.model, Request((1, 2), 30))
    assert engine.totals.cancelled == 1


def test_ten_thousand_joins_leaves_and_cancels_leak_nothing():
    config = replace(DENSE, n_layer=1, n_head=1, n_embd=4, context_length=10)
    chunk = 8 * READ_OVERHEAD  # many join in one step
    engine = Engine(model_of(config), decode, slots=12, chunk=chunk, max_waiting=40)
    draw = random.Random(3)
    memory = [t.data_ptr() for t in (*engine.cache.keys, *engine.cache.values)]
    events, joined, ended, refused, living = 0, 0, [], 0, weakref.WeakSet()
    tasks = {}

    def join():
        nonlocal joined, refused
        number = joined

        def deliver(token):
            assert number in tasks, "a token after the end"
            if token.finish:
                ended.append(number)
                del tasks[number]

        request = random_request(draw, max_new_tokens=draw.randrange(1, 7), temperature=0)
        try:
            task = engine.submit(request, deliver)
        except BusyError:
            refused += 1
        else:
            joined, tasks[number] = joined + 1, task
            living.add(task)

    def cancel():
        number = draw.choice(list(tasks))
        engine.cancel(tasks.pop(number))

    while events < 10_000:
        for _ in range(draw.randrange(34)):
            events += 1
            cancel() if tasks and draw.random() < 0.2 else join()
        finished = len(ended)
        engine.step()
        events += len(ended) - finished
        assert len(engine.batch) + len(engine.reading) <= 12 and len(engine.waiting) <= 40
        assert sum(task.length > 0 for task in engine.reading) <= 1
    finish(engine)
    totals = engine.totals
    assert refused > 100 and totals.finished > 1000 and totals.cancelled > 1000
    assert totals.finished == len(ended) and totals.finished + totals.cancelled == joined
    assert not tasks and not engine.has_work() and not totals.failed
    gc.collect()
    assert not living and not [x for x in gc.get_objects() if type(x) is Task]
    assert memory == [t.data_ptr() for t in (*engine.cache.keys, *engine.cache.values)]


def test_stops_end_the_text_before_them():
    model = model_of(DENSE)
    free = alone(model, Request((1,), 20))
    for end, stop in ((7, free[7:9]), (0, free[:1]), (12, free[12:16])):
        end = bytes(free).index(bytes(stop))  # it may occur earlier
        engine, tokens = Engine(model, decode), []
        engine.submit(Request((1,), 20, stop=(b"never", bytes(stop))), tokens.append)
        finish(engine)
        assert tokens[-1].finish == "stop" and ids(tokens) == free[: end + len(stop)]
        assert b"".join(token.text for token in tokens) == bytes(free[:end])
    engine, tokens = Engine(model, decode), []
    engine.submit(Request((1,), 20, stop_tokens=frozenset(free[9:10])), tokens.append)
    finish(engine)
    end = free.index(free[9])
    assert tokens[-1].finish == "stop" and ids(tokens) == free[: end + 1]
    assert b"".join(token.text for token in tokens) == bytes(free[:end])


def test_text_that_may_begin_a_stop_is_held_back_until_it_is_certain():
    engine, tokens = Engine(model_of(DENSE), decode), []
    free = alone(engine.model, Request((1,), 20))
    nearly = bytes([*free[5:8], 77])  # its first three tokens occur, its fourth never does
    engine.submit(Request((1,), 20, stop=(nearly,)), tokens.append)
    finish(engine)
    assert b"".join(token.text for token in tokens) == bytes(free)
    assert any(not token.text for token in tokens[5:8])
    assert possible_stop(b"ab", (b"abc",)) == 2 and possible_stop(b"xa", (b"abc", b"b")) == 1
    assert (
        possible_stop(b"", (b"a",)) == possible_stop(b"a", ()) == possible_stop(b"b", (b"ab",)) == 0
    )


def test_logprobs_are_the_models_and_the_prompt_is_scored():
    engine, tokens = engine_of("experts"), []
    prompt = tuple(range(20))
    task = engine.submit(Request(prompt, 3, temperature=0, top_k=1, logprobs=2), tokens.append)
    finish(engine)
    text = torch.tensor([[*prompt, *ids(tokens)]])
    logits = engine.model(text)[0][0].detach()
    expected = F.cross_entropy(logits[:19], text[0, 1:20], reduction="sum")
    assert abs(task.prompt_nats - float(expected)) < 1e-9
    for token, row in zip(tokens, logits[19:].log_softmax(-1), strict=False):
        best = row.topk(2)
        assert abs(token.logprob - float(row[token.id])) < 1e-10
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist())
    assert engine.totals.load.shape == (2, 4) and engine.totals.load.sum() == 2 * 2 * 22


@pytest.mark.parametrize("name", ["flat-mean", "tile-bound", "sparse experts", "experts"])
def test_a_trace_is_what_a_whole_forward_pass_used(name):
    engine, tokens = engine_of(name), []
    prompt = (1, 2, 3, 4, 5, 6, 7)
    engine.submit(Request((9, 8), 12), lambda token: None)
    engine.submit(Request(prompt, 12, trace=True), tokens.append)
    finish(engine)
    text = torch.tensor([[*prompt, *ids(tokens)]])
    attention = engine.model.config.attention
    for layer, stats in enumerate(engine.model(text, inspect=True)[1]):
        for t, token in enumerate(tokens, len(prompt) - 1):  # the token that predicted it
            assert (token.trace.position, token.trace.start) == (t + 1, 0)
            assert bool(token.trace.experts) == ("experts" in stats)
            assert bool(token.trace.blocks) == ("blocks" in stats)
            if "experts" in stats:
                assert token.trace.experts[layer] == stats["experts"][0, t].tolist()
            if "blocks" in stats:
                own = t // attention.block_size
                row = own if attention.method == "tile" else t
                read = {b for b in stats["blocks"][0, :, row].flatten().tolist() if 0 <= b < own}
                assert token.trace.blocks[layer] == sorted(read | {own})


def test_a_trace_counts_the_tokens_that_are_forgotten():
    engine, tokens = engine_of("flat-mean"), []
    engine.submit(Request((1, 2, 3), CONTEXT + 5, trace=True), tokens.append)
    finish(engine)
    assert [token.trace.position for token in tokens] == list(range(3, CONTEXT + 8))
    # A full context of 24 tokens and the one after it: 12 of these 25 are read again.
    starts = {token.trace.position: token.trace.start for token in tokens}
    kept = CONTEXT + 1 - CONTEXT // 2
    assert all(start == (kept if p > CONTEXT else 0) for p, start in starts.items())


def test_a_request_that_cannot_be_served_is_refused():
    for bad in ({"prompt": ()}, {"max_new_tokens": 0}, {"stop": (b"",)}):
        with pytest.raises(ValueError, match="needs a prompt"):
            Request(**{"prompt": (1,)} | bad)
    engine = engine_of(slots=1, max_waiting=2)
    for _ in range(2):
        engine.submit(Request((1,)), print)
    with pytest.raises(BusyError, match="2 requests wait"):
        engine.submit(Request((1,)), print)
    engine.close()
    with pytest.raises(BusyError, match="stopping"):
        engine.submit(Request((1,)), print)


def test_a_thread_runs_the_engine_and_finishes_what_was_accepted():
    engine, done = engine_of(slots=2), threading.Barrier(2)
    thread = threading.Thread(target=engine.run)
    thread.start()
    made = [[] for _ in range(6)]
    requests = [Request((i,), 5, seed=i) for i in range(6)]
    engine.submit(Request((1,), 1), lambda token: done.wait(10))  # it steps by itself
    done.wait(10)
    for request, tokens in zip(requests, made, strict=True):
        engine.submit(request, tokens.append)
    engine.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [ids(tokens) for tokens in made] == [alone(engine.model, r) for r in requests]


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(monkeypatch, capsys):
    engine, broken, later = engine_of(), [], []
    real, calls = engine.model.forward, []

    def forward(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return real(*args, **options)

    monkeypatch.setattr(engine.model, "forward", forward)
    engine.submit(Request((1,), 10), broken.append)
    thread = threading.Thread(target=engine.run)
    thread.start()
    while not (broken and broken[-1].finish):
        pass
    engine.submit(Request((1,), 10), later.append)
    engine.close()
    thread.join(20)
    assert broken[-1].finish == "error" and engine.totals.failed == 1
    assert ids(later) == alone(model_of(DENSE), Request((1,), 10))
    assert "out of memory" in capsys.readouterr().err
