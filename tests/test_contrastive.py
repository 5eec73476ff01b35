"""The contrastive loss: two routes to one value, many processes and pieces of a batch as one, and what finds nothing."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from nanods import contrastive
from nanods.contrastive import (
    Temperature,
    all_pairs_loss,
    cached_gradients,
    chance_loss,
    contrastive_loss,
    contrastive_loss_reference,
    gather_with_gradient,
    local_rows,
    median_rank,
    ranks,
    recall_at_k,
)


def random_pairs(B, M, seed=0, dtype=torch.float64):
    """Two embeddings of length 1, and ids of which some occur twice."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        normalize(torch.randn(B, M, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
        for _ in "ab"
    )
    return (
        a.requires_grad_(),
        b.requires_grad_(),
        torch.randint(0, max(1, B // 2), (B,), generator=generator),
    )


# ---- the loss ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.floats(0.1, 100), st.booleans(), st.integers(0, 99))
def test_the_loss_equals_the_two_loops(B, M, scale, twins, seed):
    a, b, ids = random_pairs(B, M, seed)
    scale, ids = (
        torch.tensor(scale, dtype=torch.float64, requires_grad=True),
        ids if twins else None,
    )
    ours, believed = (
        loss(a, b, scale, ids) for loss in (contrastive_loss, contrastive_loss_reference)
    )
    assert (
        ours.dtype == torch.float64
        and ours.shape == ()
        and (ours - believed).abs() <= 1e-12 * max(1, believed)
    )
    for mine, other in zip(
        *(torch.autograd.grad(loss, (a, b, scale)) for loss in (ours, believed)), strict=True
    ):
        assert (mine - other).abs().max() <= 1e-12 * max(1, other.abs().max())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.data())
def test_neither_the_order_of_a_and_b_nor_that_of_the_batch_matters(B, twins, data):
    a, b, ids = random_pairs(B, 5)
    order = torch.tensor(data.draw(st.permutations(range(B))))
    believed = contrastive_loss(a, b, 7.0, ids if twins else None)
    assert (contrastive_loss(b, a, 7.0, ids if twins else None) - believed).abs() < 1e-12
    assert (
        contrastive_loss(a[order], b[order], 7.0, ids[order] if twins else None) - believed
    ).abs() < 1e-12


def test_the_loss_of_two_pairs_by_hand():
    a, b = torch.eye(2), torch.tensor([[1.0, 0], [0.6, 0.8]])  # similarities: 1 and 0.6, 0 and 0.8
    losses = [
        math.log1p(math.exp(2 * (other - own)))
        for own, other in ((1, 0.6), (0.8, 0), (1, 0), (0.8, 0.6))
    ]
    assert contrastive_loss(a, b, 2.0).item() == pytest.approx(sum(losses) / 4)


@pytest.mark.parametrize("B", [1, 2, 64])
def test_equal_similarities_give_chance_and_random_directions_little_more(B):
    same = normalize(torch.ones(B, 16), dim=-1)
    assert contrastive_loss(same, same, 10.0).item() == pytest.approx(chance_loss(B), abs=1e-6)
    a, b, _ = random_pairs(B, 128)
    assert (
        contrastive_loss(a, b, 10.0).item()
        == pytest.approx(chance_loss(B) + 10**2 / (2 * 128), abs=0.2)
        or B < 64
    )


def test_the_best_that_can_be_reached_is_above_zero():
    B, scale = 64, 10.0
    corners = normalize(
        torch.eye(B, dtype=torch.float64) - 1 / B, dim=-1
    )  # as far apart as B points on a sphere can be
    best = math.log(1 + (B - 1) * math.exp(-scale * B / (B - 1)))
    assert (
        contrastive_loss(corners, corners, scale).item() == pytest.approx(best)
        and round(best, 4) == 0.0024
    )
    for seed in range(5):
        a, b, _ = random_pairs(B, B, seed)
        assert contrastive_loss(a, a, scale) > best and contrastive_loss(a, b, scale) > best


def test_twins_are_no_negatives_and_oneself_stays():
    a, b, _ = random_pairs(4, 3)
    ids = torch.tensor([5, 8, 5, 7])
    logits = (10 * a @ b.T).detach()
    logits[0, 2] = logits[2, 0] = -torch.inf
    rows, columns = ((x.logsumexp(1) - x.diagonal()).mean() for x in (logits, logits.T))
    assert (contrastive_loss(a, b, 10.0, ids) - (rows + columns) / 2).abs() < 1e-12
    assert contrastive_loss(a, b, 10.0, ids) < contrastive_loss(a, b, 10.0)
    slopes = torch.autograd.grad(contrastive_loss(a, b, 10.0, torch.full((4,), 3)), (a, b))
    assert all(
        (slope == 0).all() for slope in slopes
    )  # without a negative there is nothing to learn, and no NaN


def test_gradcheck():
    a, b, ids = random_pairs(4, 3)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, t: contrastive_loss(a, b, t, ids), (a, b, scale))


def test_the_loss_is_in_fp32_at_least_under_autocast_too():
    a, b, _ = random_pairs(16, 32, dtype=torch.float32)
    exact = contrastive_loss(a, b, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(a, b, 50.0), exact)
    short = a.detach().bfloat16().requires_grad_(), b.detach().bfloat16()
    loss = contrastive_loss(*short, 50.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(*(x.float() for x in short), 50.0))
    assert torch.autograd.grad(loss, short[0])[0].dtype == torch.bfloat16
    assert contrastive_loss(a.double(), b, Temperature()()).dtype == torch.float64


def test_the_mean_over_some_rows_and_the_others_is_the_whole():
    a, b, ids = random_pairs(6, 4)
    parts = [contrastive_loss(a, b, 9.0, ids, rows=slice(i, i + 2)) for i in (0, 2, 4)]
    assert (sum(parts) / 3 - contrastive_loss(a, b, 9.0, ids)).abs() < 1e-12


# ---- temperature -------------------------------------------------------------------------------------------------------------


def test_the_temperature_starts_where_it_is_told_and_learns():
    assert Temperature()().item() == pytest.approx(10) and Temperature(
        0.02
    )().item() == pytest.approx(50)
    a, _, _ = random_pairs(8, 16, dtype=torch.float32)
    temperature = Temperature()
    contrastive_loss(a, a, temperature()).backward()
    assert temperature.log_scale.grad < 0  # pairs that are found already gain by a sharper question


def test_the_scale_is_clamped_and_comes_back():
    temperature = Temperature(0.01)
    a, b, _ = random_pairs(8, 16, dtype=torch.float32)
    for value in (5.0, 50.0):
        temperature.log_scale.data.fill_(value)
        scale = temperature()
        assert scale.item() == pytest.approx(
            100, rel=1e-6
        ) and temperature.log_scale.item() == pytest.approx(math.log(100))
        (slope,) = torch.autograd.grad(contrastive_loss(a, b, scale), temperature.log_scale)
        assert slope > 0  # unrelated pairs want a softer question
        temperature.log_scale.data -= 0.01 * slope
        assert temperature() < 99.9
    twice = temperature() + temperature()  # as over several micro-batches
    twice.backward()
    assert temperature.log_scale.grad.item() == pytest.approx(twice.item())


# ---- pairs of modalities -----------------------------------------------------------------------------------------------------


def test_all_pairs_are_a_weighted_mean_with_its_parts():
    embeddings = {
        name: random_pairs(6, 4, seed)[0] for seed, name in enumerate(("text", "image", "audio"))
    }
    ids, scale = torch.tensor([0, 1, 2, 0, 3, 4]), torch.tensor(8.0, requires_grad=True)
    pairs = {("text", "image"): 2.0, ("audio", "text"): 0.5, ("image", "audio"): 0.0}
    total, parts = all_pairs_loss(embeddings, scale, pairs, ids)
    expected = {(x, y): contrastive_loss(embeddings[x], embeddings[y], 8.0, ids) for x, y in pairs}
    assert parts == {"-".join(pair): loss for pair, loss in expected.items()}
    assert not any(part.requires_grad for part in parts.values())
    assert (
        total - (2 * expected["text", "image"] + 0.5 * expected["audio", "text"]) / 2.5
    ).abs() < 1e-12
    assert torch.autograd.grad(total, scale)[0] != 0
    half = all_pairs_loss(embeddings, scale, pairs, ids, rows=slice(0, 3))[1]["text-image"]
    assert torch.equal(
        half, contrastive_loss(embeddings["text"], embeddings["image"], 8.0, ids, slice(0, 3))
    )


# ---- one batch in pieces -----------------------------------------------------------------------------------------------------

PAIRS = {("text", "image"): 1.0, ("text", "audio"): 0.5}
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


class Towers(nn.Module):
    """An encoder for each modality, and the temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict(
            {
                m: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
                for m in ("text", "image", "audio")
            }
        )
        self.temperature = Temperature()
        self.double()

    def encode(self, inputs):
        return {name: normalize(self.towers[name](x), dim=-1) for name, x in inputs.items()}

    def forward(self, inputs):
        return self.encode(inputs), self.temperature()

    def gradients(self):
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def ten():
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(10, 3, generator=generator, dtype=torch.float64)
        for name in ("text", "image", "audio")
    }


def of_one_process():
    model = Towers()
    loss, _ = all_pairs_loss(*model(ten()), PAIRS, IDS)
    loss.backward()
    return loss.detach(), model.gradients()


def near(ours, believed):
    assert ours.keys() == believed.keys()
    for name, slope in believed.items():
        assert (ours[name] - slope).abs().max() < 1e-12 and slope.abs().max() > 1e-4, name


@pytest.mark.parametrize("size", [1, 3, 5, 10, 64])
def test_pieces_give_the_gradients_of_the_whole_batch(size):
    model, seen = Towers(), []

    def encode(piece):
        seen.append((len(piece["text"]), torch.is_grad_enabled()))
        return model.encode(piece)

    loss, believed = of_one_process()
    cached = cached_gradients(
        encode,
        ten(),
        lambda e, scale: all_pairs_loss(e, scale, PAIRS, IDS)[0],
        size,
        model.temperature(),
    )
    assert (cached - loss).abs() < 1e-12 and not cached.requires_grad
    near(model.gradients(), believed)
    lengths = [len(piece) for piece in IDS.split(size)]
    assert seen == [
        (n, graph) for graph in (False, True) for n in lengths
    ]  # never more than `size` items with a graph
    cached_gradients(
        encode,
        ten(),
        lambda e, scale: all_pairs_loss(e, scale, PAIRS, IDS)[0],
        size,
        model.temperature(),
    )
    near(
        model.gradients(), {name: 2 * slope for name, slope in believed.items()}
    )  # it adds, as backward() does


def test_pieces_of_a_tensor_and_towers_that_are_frozen_or_not_asked_for():
    model = Towers()
    model.towers["image"].requires_grad_(False)

    def loss(e, scale):
        return contrastive_loss(e["text"], e["image"], scale, IDS)

    loss(model.encode(ten()), model.temperature()).backward()
    believed = model.gradients()
    model.zero_grad()
    cached_gradients(model.encode, ten(), loss, 4, model.temperature())
    near(model.gradients(), believed)
    assert believed.keys() == {
        "temperature.log_scale",
        *(n for n, _ in model.named_parameters() if ".text." in n),
    }

    image, tower, x = model.encode(ten())["image"], model.towers["text"], ten()["text"]
    model.zero_grad()
    cached_gradients(
        lambda piece: normalize(tower(piece), dim=-1),
        x,
        lambda e, scale: loss({"text": e, "image": image}, scale),
        4,
        model.temperature(),
    )
    near(model.gradients(), believed)


def test_pieces_under_autocast_keep_the_weights_gradients():
    """Autocast keeps its bf16 copies of the weights, those of the pass without a graph too: they must not be used again."""
    model = Towers().float()
    inputs = {name: x.float() for name, x in ten().items()}
    with torch.autocast("cpu", torch.bfloat16):
        cached_gradients(
            model.encode,
            inputs,
            lambda e, scale: all_pairs_loss(e, scale, PAIRS, IDS)[0],
            3,
            model.temperature(),
        )
    for name, slope in of_one_process()[1].items():
        ours = model.get_parameter(name).grad
        assert ours is not None and (ours - slope).norm() < 0.2 * slope.norm() + 0.01, name


# ---- several processes -------------------------------------------------------------------------------------------------------


def one_of(rank, folder, processes):
    """What each process does: its own five of the ten, three ways. Process 0 writes down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
    n, found = 10 // processes, {}
    inputs = {name: x[rank * n : (rank + 1) * n] for name, x in ten().items()}
    ids = gather_with_gradient(IDS[local_rows(n)])

    def loss(embeddings, scale, rows):
        everything = {name: gather_with_gradient(e) for name, e in embeddings.items()}
        return all_pairs_loss(everything, scale, PAIRS, ids, rows)[0]

    def note(way, value, model):
        """Means over the processes, taken by hand: DistributedDataParallel never lets go of its group, whose threads then
        outlive Python's end at times and abort it (pytorch/pytorch#179291)."""
        value = value.detach().clone()
        for x in (value, *(p.grad for p in model.parameters())):
            dist.all_reduce(x)
            x /= processes
        found[way] = value, model.gradients()

    for way, rows in {"own rows": local_rows(n), "all rows": slice(None)}.items():
        model = Towers()
        value = loss(model.encode(inputs), model.temperature(), rows)
        value.backward()
        note(way, value, model)
    model = Towers()
    value = cached_gradients(
        model.encode, inputs, lambda e, scale: loss(e, scale, local_rows(n)), 2, model.temperature()
    )
    note("pieces", value, model)
    x, other = (torch.zeros(length, requires_grad=True) for length in (n, 10))
    (1 * other + gather_with_gradient(x)).backward(torch.ones(10))
    assert (x.grad == processes).all() and (
        other.grad == 1
    ).all()  # the sum is not taken in what others still read
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path):
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(x) is x and local_rows(3) == slice(
        0, 3
    )  # alone, there is nothing to gather
    torch.multiprocessing.spawn(one_of, (str(tmp_path), 2), nprocs=2)
    loss, believed = of_one_process()
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == {"own rows", "all rows", "pieces"}
    for value, gradients in found.values():
        assert (value - loss).abs() < 1e-12
        near(gradients, believed)


# ---- retrieval ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.booleans(), st.integers(1, 40), st.integers(0, 99))
def test_ranks_are_counted_as_by_hand(Q, M, twins, scores, seed):
    """Small whole numbers: many ties, and no rounding. Whatever the size of a chunk."""
    generator = torch.Generator().manual_seed(seed)
    queries, targets = (torch.randint(-2, 3, (Q, M), generator=generator).float() for _ in "qt")
    ids = torch.randint(0, Q, (Q,), generator=generator)
    expected = []
    for i in range(Q):
        rivals = [j for j in range(Q) if (ids[j] != ids[i] if twins else j != i)]
        expected.append(sum((queries[i] @ (targets[j] - targets[i]) >= 0).item() for j in rivals))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "MAX_SCORES", scores)
        found = ranks(queries, targets, ids if twins else None)
    assert found.tolist() == expected


def test_recall_and_median_of_ranks_that_are_known():
    targets = torch.eye(4)
    queries = torch.tensor(
        [[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]]
    )  # ranks 0, 1, 2, 0
    assert ranks(queries, targets).tolist() == [0, 1, 2, 0]
    assert [recall_at_k(queries, targets, k) for k in (1, 2, 3, 4, 9)] == [0.5, 0.75, 1, 1, 1]
    assert median_rank(queries, targets) == 1.5 and median_rank(targets, targets) == 1
    assert recall_at_k(queries, targets, 1, torch.tensor([0, 0, 1, 2])) == 0.75
    assert median_rank(queries, targets, torch.tensor([0, 0, 1, 2])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("Q", "M"), [(2, 3), (37, 64), (301, 512)])
def test_embeddings_that_have_collapsed_find_nothing(Q, M, dtype):
    for seed in range(3):
        a, b, _ = random_pairs(2, M, seed, dtype=dtype)
        queries, targets = a[:1].repeat(Q, 1), b[:1].repeat(Q, 1)
        assert (ranks(queries, targets) == Q - 1).all()
        assert [recall_at_k(queries, targets, k) for k in (1, Q - 1, Q)] == [
            0,
            0,
            1,
        ] and median_rank(queries, targets) == Q


def test_nan_finds_nothing():
    a, b, _ = random_pairs(6, 4)
    lost = torch.full_like(a, math.nan)
    for queries, targets in ((lost, b), (a, lost), (lost, lost)):
        assert [recall_at_k(queries, targets, k) for k in (1, 5, 6, 99)] == [0] * 4 and median_rank(
            queries, targets
        ) == 7
    one = b.detach().index_fill(0, torch.tensor(2), math.nan)
    assert ranks(b, one).tolist() == [
        1,
        1,
        6,
        1,
        1,
        1,
    ]  # a target that is NaN beats all, and is never found
    assert recall_at_k(lost[:1], lost[:1], 1) == 0  # not even alone


def test_similar_targets_that_rounding_cannot_confuse_are_told_apart():
    angle = torch.arange(100, dtype=torch.float64) * 0.01
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    for size in (1, 1e-6):  # whatever the length of the embeddings
        assert (ranks(size * circle.float(), size * circle.float()) == 0).all()


def test_a_large_gallery_is_ranked_in_chunks(monkeypatch):
    monkeypatch.setattr(contrastive, "MAX_SCORES", 5000 * 7)
    rows, product = [], torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda x, y: rows.append(len(x)) or product(x, y)
    )
    a, _, _ = random_pairs(5000, 8, dtype=torch.float32)
    assert recall_at_k(a, a, 1) == 1
    assert max(rows) == 7 and sum(rows) == 5000


# ---- what cannot be ----------------------------------------------------------------------------------------------------------

A, B, SCALE = torch.ones(4, 3), torch.ones(5, 3), torch.tensor(10.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: contrastive_loss(A, B, 10.0), r"\(4, 3\) and \(5, 3\)"),
        (
            lambda: all_pairs_loss({"text": A, "image": A}, 10.0, {("text", "audio"): 1.0}),
            r"'audio'.*there are text, image",
        ),
        (lambda: all_pairs_loss({}, 10.0, {}), "weights"),
        (lambda: all_pairs_loss({"a": A, "b": A}, 10.0, {("a", "b"): 0.0}), "one must be above"),
        (
            lambda: all_pairs_loss({"a": A, "b": A}, 10.0, {("a", "b"): 2.0, ("b", "a"): -1.0}),
            "none may be below 0",
        ),
        (lambda: all_pairs_loss({"a": A, "b": A}, 10.0, {("a", "b"): math.nan}), "weights"),
        (
            lambda: cached_gradients(dict, {"a": A, "b": B}, lambda e, _: e["a"].sum(), 5, SCALE),
            r"'a': 4, 'b': 5.*equally many",
        ),
        (lambda: cached_gradients(torch.sin, A, lambda e, _: e.sum(), 0, SCALE), "pieces of 0"),
        (lambda: ranks(A, B), r"\(4, 3\) queries, \(5, 3\) targets"),
        (lambda: recall_at_k(A, A, 0), "recall at 0"),
        *(
            (lambda start=start: Temperature(start), r"must be at least 0\.01")
            for start in (0.0, -0.1, 0.009, math.nan)
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(call, words):
    with pytest.raises(ValueError, match=words):
        call()
