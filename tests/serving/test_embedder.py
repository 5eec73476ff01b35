"""Dynamic batching: what a batch holds, what it cannot change, and what requests leave behind."""

import asyncio
import gc
import random
import threading
import weakref
from concurrent.futures import CancelledError, Future

import pytest
import torch

from nanods.errors import UserError
from nanods.serving import embedder as module
from nanods.serving.embedder import (
    Embedder,
    Item,
    Queues,
    Request,
    embed_batch,
    embed_one_by_one,
)
from nanods.serving.engine import BusyError
from tests.test_multimodal import CONFIG, MOE_TRUNK, TRUNK, make_model


def random_input(generator):
    """Return a text of any length, an image or a sound, for the models of test_multimodal.py."""
    kind = generator.choice(["text", "text", "image", "audio"])
    stream = torch.Generator().manual_seed(generator.randrange(2**32))
    if kind == "text":
        length = generator.randint(1, TRUNK.context_length)
        return kind, torch.randint(0, TRUNK.vocab_size, (length,), generator=stream)
    shape = (3, CONFIG.image_size, CONFIG.image_size) if kind == "image" else (32, CONFIG.frames)
    return kind, torch.rand(shape, generator=stream, dtype=torch.float64)


def random_inputs(n, seed=0):
    generator = random.Random(seed)
    return [random_input(generator) for _ in range(n)]


@pytest.fixture
def running():
    """Return an embedder of a small model in fp64 whose thread runs."""
    embedder = Embedder(make_model(), max_tokens=40)
    thread = threading.Thread(target=embedder.run)
    thread.start()
    yield embedder
    embedder.close()
    thread.join()


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trunk", "dtype", "tolerance"),
    [
        (TRUNK, torch.float64, 1e-12),
        (MOE_TRUNK, torch.float64, 1e-12),
        (TRUNK, torch.float32, 1e-6),
    ],
)
def test_an_embedding_is_the_same_alone_and_among_others(trunk, dtype, tolerance):
    model, inputs = make_model(trunk).to(dtype), random_inputs(60)
    expected = embed_one_by_one(model, inputs)
    embedder = Embedder(model, max_tokens=64)
    answers = [embedder.submit(inputs[i : i + 7]) for i in range(0, 60, 7)]
    embedder.close()
    embedder.run()
    actual = torch.cat([answer.result(0) for answer in answers])
    assert embedder.totals.inputs == 60 and embedder.totals.batches < 30
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_padding_changes_no_embedding():
    model = make_model(MOE_TRUNK)
    texts = [x for x in random_inputs(30) if x[0] == "text"]
    assert len({len(x) for _, x in texts}) > 5, "the batch is padded"
    together, _ = embed_batch(model, texts)
    torch.testing.assert_close(together, embed_one_by_one(model, texts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_the_load_counts_each_input_and_no_padding(shared):
    model, inputs = make_model(MOE_TRUNK, shared=shared), random_inputs(20)
    expected = {}
    for name, x in inputs:
        load = torch.stack([layer["load"] for layer in model.embed(name, x[None])[1]])  # (L, E)
        key = "shared" if shared else name
        expected[key] = load + expected.get(key, 0)
    embedder = Embedder(model, max_tokens=64)
    embedder.submit(inputs)
    embedder.close()
    embedder.run()
    assert embedder.totals.padding > 0 and embedder.totals.load.keys() == expected.keys()
    for trunk, load in embedder.totals.load.items():
        assert torch.equal(load, expected[trunk]), trunk
    dense = Embedder(make_model())
    dense.submit(inputs)
    dense.close()
    dense.run()
    assert dense.totals.load == {}


def test_the_reference_gives_each_input_of_a_request_its_own_row():
    inputs = random_inputs(5)
    embeddings = embed_one_by_one(make_model(), inputs)
    assert embeddings.shape == (5, 6) and torch.pdist(embeddings).min() > 1e-3


def make_item(number, name, tokens):
    return Item(number, name, torch.empty(0), tokens, Request(Future()), 0)


def test_batches_hold_the_oldest_item_like_lengths_and_no_more_tokens_than_allowed():
    generator, queues, waiting, number = random.Random(0), Queues(max_tokens=100), {}, 0
    for _ in range(4000):
        event = generator.random()
        if event < 0.7:
            name, tokens = generator.choice(["text", "image"]), generator.randint(1, 130)
            waiting[number] = make_item(number, name, tokens)
            queues.add(waiting[number])
            number += 1
        elif event < 0.8 and waiting:
            queues.remove(waiting.pop(generator.choice(list(waiting))))
        else:
            batch = queues.next_batch()
            assert bool(batch) == bool(waiting)
            if batch:
                assert batch[0].number == min(waiting), "the oldest item is never left behind"
                assert [item.number for item in batch] == sorted(item.number for item in batch)
                assert len({item.name for item in batch}) == 1
                lengths = [item.tokens for item in batch]
                padded = len(batch) * max(lengths)
                assert len(batch) == 1 or padded <= 100
                assert padded < 2 * sum(lengths), "padding takes less than half"
            for item in batch:
                assert waiting.pop(item.number) is item
        assert len(queues) == len(waiting)
    for item in waiting.values():
        queues.remove(item)
        queues.remove(item)
    assert not queues.queues, "an empty queue is dropped"


def test_a_batch_takes_all_that_fits_its_budget():
    queues = Queues(max_tokens=32)
    for number in range(10):
        queues.add(make_item(number, "text", 8 if number == 2 else 7))
    queues.add(make_item(10, "image", 64))
    sizes = []
    while batch := queues.next_batch():
        sizes.append([item.number for item in batch])
    assert sizes == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10]]


def test_no_input_waits_for_more_batches_than_there_were_older_inputs():
    """A flood of short texts does not hold up a sound, nor a flood of sounds a text."""
    embedder = Embedder(make_model(), max_tokens=12)
    flood = [("text", torch.tensor([1, 2, 3]))] * 40
    embedder.submit(flood)
    answer = embedder.submit([next(x for x in random_inputs(20) if x[0] == "audio")])
    while not answer.done():
        embedder.run_batch()
        embedder.submit(flood[:4])
    assert embedder.totals.batches == 11, "ten batches of four older texts, and its own"


def test_an_idle_embedder_computes_at_once(running):
    assert running.submit(random_inputs(1)).result(5).shape == (1, 6)
    assert running.totals.batches == 1


# ---- requests ------------------------------------------------------------------------------------


def test_a_request_may_mix_modalities_and_exceed_the_budget(running):
    inputs = random_inputs(25, seed=1)
    assert {name for name, _ in inputs} == {"text", "image", "audio"}
    torch.testing.assert_close(
        running.submit(inputs).result(5),
        embed_one_by_one(running.model, inputs),
        rtol=0,
        atol=1e-12,
    )


BAD = {
    "this model embeds no video": ("video", torch.rand(3)),
    "give 1 to 12 token ids": ("text", torch.zeros(13, dtype=torch.int64)),
    "of shape \\(0,\\)": ("text", torch.zeros(0, dtype=torch.int64)),
    "of shape \\(1, 3\\)": ("text", torch.zeros(1, 3, dtype=torch.int64)),
    "from 0 to 19": ("text", torch.tensor([3, 20])),
    "integers": ("text", torch.tensor([3.0])),
    "this model reads \\(3, 8, 8\\)": ("image", torch.rand(3, 4, 8)),
    "this model reads \\(32, 6\\)": ("audio", torch.rand(32, 5)),
    "not finite": ("image", torch.full((3, 8, 8), torch.nan)),
}


@pytest.mark.parametrize("message", BAD)
def test_an_input_that_cannot_be_embedded_is_refused_before_it_waits(message):
    embedder = Embedder(make_model())
    with pytest.raises(UserError, match=message):
        embedder.submit([*random_inputs(2), BAD[message]])
    with pytest.raises(UserError, match="token ids must be integers from 0"):
        embedder.submit([("text", torch.tensor([-1]))])
    assert embedder.count_waiting() == 0


def test_the_limit_counts_inputs_and_closing_refuses_new_ones():
    embedder = Embedder(make_model(), max_waiting=10)
    embedder.submit(random_inputs(8))
    with pytest.raises(BusyError, match="8 inputs wait already"):
        embedder.submit(random_inputs(3))
    last = embedder.submit(random_inputs(2))
    for count in (0, 11):
        with pytest.raises(UserError, match=f"{count} inputs: a request has 1 to 10"):
            embedder.submit(random_inputs(count))
    embedder.close()
    with pytest.raises(BusyError, match="the server is stopping"):
        embedder.submit(random_inputs(1))
    embedder.run()
    assert last.result(0).shape == (2, 6), "what was accepted is answered"


def test_an_error_reaches_the_request_at_fault_alone(monkeypatch, capsys):
    embedder = Embedder(make_model(), max_tokens=1000)
    good, bad = torch.tensor([1, 2, 3]), torch.tensor([7, 7, 7])
    embed = embedder.model.embed

    def fail_on_sevens(name, x):
        if (x == 7).all(dim=-1).any():
            raise RuntimeError("out of memory")
        return embed(name, x)

    monkeypatch.setattr(embedder.model, "embed", fail_on_sevens)
    answers = [embedder.submit([("text", x)]) for x in (good, bad, good)]
    both = embedder.submit([("text", bad), ("text", bad), ("image", torch.rand(3, 8, 8))])
    embedder.close()
    embedder.run()
    assert torch.equal(answers[0].result(0), answers[2].result(0))
    for answer in (answers[1], both):
        with pytest.raises(RuntimeError, match="out of memory"):
            answer.result(0)
    assert "out of memory" in capsys.readouterr().err, "the server's log shows where"
    assert embedder.totals.inputs == 5, "the image of a failed request is not computed"


def test_cancelling_removes_what_waits():
    embedder, text = Embedder(make_model(), max_tokens=12), [("text", torch.tensor([1, 2, 3]))]
    first, second = embedder.submit(text * 10), embedder.submit(text * 5)
    embedder.run_batch()
    assert embedder.count_waiting() == 11
    assert first.cancel() and embedder.count_waiting() == 5
    embedder.close()
    embedder.run()
    assert embedder.totals.inputs == 4 + 5 and second.result(0).shape == (5, 6)
    with pytest.raises(CancelledError):
        first.result(0)


def test_a_request_cancelled_while_it_is_computed_harms_nobody(monkeypatch):
    embedder, answers = Embedder(make_model()), []

    def cancel_meanwhile(model, inputs):
        answers[0].cancel()
        return embed_batch(model, inputs)

    monkeypatch.setattr(module, "embed_batch", cancel_meanwhile)
    text = [("text", torch.tensor([1, 2]))]
    answers += [embedder.submit(text), embedder.submit(text)]
    embedder.close()
    embedder.run()
    assert answers[0].cancelled() and answers[1].result(0).shape == (1, 6)


# ---- many clients --------------------------------------------------------------------------------


def test_thousands_of_random_events_leave_nothing_behind(monkeypatch):
    zeros = lambda model, inputs: (torch.zeros(len(inputs), 6), None)  # noqa: E731
    monkeypatch.setattr(module, "embed_batch", zeros)
    embedder, generator = Embedder(make_model(), 64, max_waiting=60), random.Random(0)
    pool, alive, refused, outcomes = random_inputs(50), [], 0, {"answered": 0, "cancelled": 0}
    references = weakref.WeakSet()
    for _ in range(10_000):
        event = generator.random()
        if event < 0.55:
            try:
                alive.append(embedder.submit(generator.choices(pool, k=generator.randint(1, 5))))
                references.add(alive[-1])
            except BusyError:
                refused += 1
        elif event < 0.75 and alive:
            alive[generator.randrange(len(alive))].cancel()
        elif embedder.count_waiting():
            embedder.run_batch()
        for answer in [answer for answer in alive if answer.done()]:
            outcomes["cancelled" if answer.cancelled() else "answered"] += 1
            alive.remove(answer)
    embedder.close()
    embedder.run()
    assert all(answer.done() for answer in alive)
    assert refused and min(outcomes.values()) > 1000
    assert not embedder.queues.queues
    del answer
    alive.clear()
    gc.collect()
    assert not references, "no request is kept"
    assert not any(type(x) in (Item, Request) for x in gc.get_objects())


def test_many_asyncio_clients_get_their_own_embeddings_or_leave(running):
    """Each client sends, waits, and gives up after a random time; none gets another's answer."""

    async def client(seed):
        generator = random.Random(seed)
        inputs = random_inputs(generator.randint(1, 4), seed)
        try:
            embeddings = await asyncio.wait_for(running.embed(inputs), generator.choice([0.01, 9]))
        except TimeoutError:
            return 0
        expected = embed_one_by_one(running.model, inputs)
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-12)
        return 1

    async def clients():
        return sum(await asyncio.gather(*map(client, range(100))))

    assert 40 < asyncio.run(clients()) <= 100
    running.submit(random_inputs(1)).result(5)
    assert running.count_waiting() == 0
