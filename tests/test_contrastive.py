"""The contrastive loss equals its reference, also over several processes and micro-batches.

Retrieval metrics equal a count by hand. Collapsed and NaN embeddings retrieve nothing.
"""

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
    are_duplicates,
    cached_gradients,
    chance_loss,
    contrastive_loss,
    contrastive_loss_reference,
    embedding_gradients,
    gather_with_gradient,
    local_rows,
    median_rank,
    nearest_class,
    ranks,
    recall_at_k,
    surrogate_loss,
)


def random_pairs(B, M, seed=0, dtype=torch.float64):
    """Return two unit-length embeddings (B, M) that require gradients, and ids with duplicates."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        normalize(torch.randn(B, M, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
        for _ in range(2)
    )
    ids = torch.randint(0, max(1, B // 2), (B,), generator=generator)
    return a.requires_grad_(), b.requires_grad_(), ids


# ---- the loss ------------------------------------------------------------------------------------


def file_and_caption_ids(B, seed=0):
    """Return ids (B, 2) of files and captions, drawn apart: being duplicates is not transitive."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(1, B // 2), (B, 2), generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 6), st.floats(0.1, 100), st.integers(0, 2), st.integers(0, 99)
)
def test_the_loss_and_its_gradients_equal_the_reference(B, M, scale, n_ids, seed):
    a, b, ids = random_pairs(B, M, seed)
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ids = (None, ids, file_and_caption_ids(B, seed))[n_ids]
    loss = contrastive_loss(a, b, scale, ids)
    expected = contrastive_loss_reference(a, b, scale, ids)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert (loss - expected).abs() <= 1e-12 * max(1, expected)
    gradients = torch.autograd.grad(loss, (a, b, scale))
    expected_gradients = torch.autograd.grad(expected, (a, b, scale))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        tolerance = 1e-12 * max(1, expected_gradient.abs().max())
        assert (gradient - expected_gradient).abs().max() <= tolerance


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.data())
def test_the_loss_is_symmetric_and_ignores_the_order_of_the_batch(B, with_ids, data):
    a, b, ids = random_pairs(B, 5)
    order = torch.tensor(data.draw(st.permutations(range(B))))
    expected = contrastive_loss(a, b, 7.0, ids if with_ids else None)
    swapped = contrastive_loss(b, a, 7.0, ids if with_ids else None)
    assert (swapped - expected).abs() < 1e-12
    permuted = contrastive_loss(a[order], b[order], 7.0, ids[order] if with_ids else None)
    assert (permuted - expected).abs() < 1e-12


def test_the_loss_of_two_pairs_by_hand():
    a, b = torch.eye(2), torch.tensor([[1.0, 0], [0.6, 0.8]])  # similarities: 1 and 0.6, 0 and 0.8
    losses = [
        math.log1p(math.exp(2 * (negative - positive)))
        for positive, negative in ((1, 0.6), (0.8, 0), (1, 0), (0.8, 0.6))
    ]
    assert contrastive_loss(a, b, 2.0).item() == pytest.approx(sum(losses) / 4)


@pytest.mark.parametrize("B", [1, 2, 64])
def test_equal_similarities_give_the_chance_loss_and_random_directions_a_little_more(B):
    same = normalize(torch.ones(B, 16), dim=-1)
    assert contrastive_loss(same, same, 10.0).item() == pytest.approx(chance_loss(B), abs=1e-6)
    a, b, _ = random_pairs(B, 128)
    expected = chance_loss(B) + 10**2 / (2 * 128)
    assert contrastive_loss(a, b, 10.0).item() == pytest.approx(expected, abs=0.2) or B < 64


def test_the_minimum_of_the_loss_is_above_zero():
    B, scale = 64, 10.0
    # The corners of a simplex: B points on a sphere, as far from each other as possible.
    simplex = normalize(torch.eye(B, dtype=torch.float64) - 1 / B, dim=-1)
    minimum = math.log(1 + (B - 1) * math.exp(-scale * B / (B - 1)))
    assert contrastive_loss(simplex, simplex, scale).item() == pytest.approx(minimum)
    assert round(minimum, 4) == 0.0024
    for seed in range(5):
        a, b, _ = random_pairs(B, B, seed)
        assert contrastive_loss(a, a, scale) > minimum
        assert contrastive_loss(a, b, scale) > minimum


def test_duplicates_are_not_negatives_and_the_match_itself_still_counts():
    a, b, _ = random_pairs(4, 3)
    ids = torch.tensor([5, 8, 5, 7])
    logits = (10 * a @ b.T).detach()
    logits[0, 2] = logits[2, 0] = -torch.inf
    rows, columns = ((x.logsumexp(1) - x.diagonal()).mean() for x in (logits, logits.T))
    assert (contrastive_loss(a, b, 10.0, ids) - (rows + columns) / 2).abs() < 1e-12
    assert contrastive_loss(a, b, 10.0, ids) < contrastive_loss(a, b, 10.0)


def test_examples_that_share_a_file_or_a_caption_are_not_negatives():
    """Examples 0 and 1 share a file, 1 and 2 a caption; 0 and 2 share nothing."""
    a, b, _ = random_pairs(4, 3)
    ids = torch.tensor([[0, 7], [0, 8], [1, 8], [2, 9]])
    candidates = ((0, 2, 3), (1, 3), (0, 2, 3), (0, 1, 2, 3))
    scores = (10 * a @ b.T).detach()
    expected = 0
    for direction in (scores, scores.T):
        for i, row in enumerate(candidates):
            expected += direction[i, list(row)].exp().sum().log() - direction[i, i]
    assert (contrastive_loss(a, b, 10.0, ids) - expected / 8).abs() < 1e-12
    assert are_duplicates(ids).long().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 1],
    ]
    assert torch.equal(are_duplicates(ids, slice(1, 3)), are_duplicates(ids)[1:3])
    # A file's id and a caption's id are of different kinds: equal numbers mean nothing.
    assert not are_duplicates(torch.tensor([[0, 1], [1, 0]]))[0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2), st.booleans(), st.data())
def test_examples_that_lack_a_modality_have_no_part_in_the_loss(B, n_ids, is_weighted, data):
    """It equals the loops over the examples that are present, for each part of the rows too."""
    a, b, ids = random_pairs(B, 4, data.draw(st.integers(0, 99)))
    ids = (None, ids, file_and_caption_ids(B))[n_ids]
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    weight = 0.5 if is_weighted else 1.0
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    kept = present.nonzero()[:, 0].tolist()
    total = 0 * (a.sum() + b.sum() + scale)
    for i in kept if len(kept) > 1 else []:
        for left, right in ((a, b), (b, a)):
            terms = (scale * left[i] @ right[i]).exp()
            for j in kept:
                if j != i and (ids is None or (ids[i] != ids[j]).all()):
                    terms = terms + weight * (scale * left[i] @ right[j]).exp()
            total = total + (terms.log() - scale * left[i] @ right[i]) / (2 * len(kept))
    expected = torch.autograd.grad(total, (a, b, scale))
    for parts in (1, B):
        rows = torch.arange(B).chunk(parts)
        losses = [
            contrastive_loss(a, b, scale, ids, slice(int(p[0]), int(p[-1]) + 1), weight, present)
            for p in rows
        ]
        mean = sum(losses) / parts
        assert (mean - total).abs() < 1e-12
        for gradient, right in zip(torch.autograd.grad(mean, (a, b, scale)), expected, strict=True):
            assert (gradient - right).abs().max() < 1e-12
    assert not expected[0][~present].any()


def test_a_pair_that_no_two_examples_have_adds_nothing():
    embeddings = {name: random_pairs(4, 3, seed)[0] for seed, name in enumerate("abc")}
    present = {name: torch.ones(4, dtype=torch.bool) for name in "ab"}
    present["c"] = torch.tensor([True, False, False, False])
    pairs = {("a", "b"): 1.0, ("b", "c"): 3.0}
    loss, by_pair = all_pairs_loss(embeddings, 5.0, pairs, present=present)
    assert by_pair["b-c"] == 0 and loss == by_pair["a-b"] / 4
    assert by_pair["a-b"] == pytest.approx(
        contrastive_loss(embeddings["a"], embeddings["b"], 5.0).item(), abs=1e-12
    )


def test_the_weight_of_the_negatives_estimates_the_loss_of_a_larger_batch():
    """Each negative counts as if it occurred that many times; the chance level is that of the
    larger batch."""
    a, b, ids = random_pairs(5, 4)
    scores = (10 * a @ b.T).detach()
    expected = 0
    for direction in (scores, scores.T):
        for i in range(5):
            negatives = [direction[i, j] for j in range(5) if ids[j] != ids[i]]
            total = direction[i, i].exp() + 3 * sum(score.exp() for score in negatives)
            expected += total.log() - direction[i, i]
    assert (contrastive_loss(a, b, 10.0, ids, negative_weight=3) - expected / 10).abs() < 1e-12
    same = normalize(torch.ones(8, 16, dtype=torch.float64), dim=-1)
    loss = contrastive_loss(same, same, 10.0, negative_weight=127 / 7)
    assert loss.item() == pytest.approx(chance_loss(128), abs=1e-12)


def test_without_negatives_the_gradient_is_zero_and_not_nan():
    a, b, _ = random_pairs(4, 3)
    loss = contrastive_loss(a, b, 10.0, torch.full((4,), 3))
    gradients = torch.autograd.grad(loss, (a, b))
    assert all((gradient == 0).all() for gradient in gradients)


def test_gradcheck():
    a, b, ids = random_pairs(4, 3)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, t: contrastive_loss(a, b, t, ids), (a, b, scale))


def test_the_loss_is_computed_in_at_least_fp32_under_autocast_too():
    a, b, _ = random_pairs(16, 32, dtype=torch.float32)
    exact = contrastive_loss(a, b, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(a, b, 50.0), exact)
    a_bf16, b_bf16 = a.detach().bfloat16().requires_grad_(), b.detach().bfloat16()
    loss = contrastive_loss(a_bf16, b_bf16, 50.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(a_bf16.float(), b_bf16.float(), 50.0))
    assert torch.autograd.grad(loss, a_bf16)[0].dtype == torch.bfloat16
    assert contrastive_loss(a.double(), b, Temperature()()).dtype == torch.float64


def test_the_mean_over_parts_of_the_rows_is_the_loss():
    a, b, _ = random_pairs(6, 4)
    ids = file_and_caption_ids(6)
    parts = [contrastive_loss(a, b, 9.0, ids, rows=slice(i, i + 2)) for i in (0, 2, 4)]
    assert (sum(parts) / 3 - contrastive_loss(a, b, 9.0, ids)).abs() < 1e-12


# ---- temperature ---------------------------------------------------------------------------------


def test_the_temperature_starts_at_its_initial_value_and_learns():
    assert Temperature()().item() == pytest.approx(10)
    assert Temperature(0.02)().item() == pytest.approx(50)
    a, _, _ = random_pairs(8, 16, dtype=torch.float32)
    temperature = Temperature()
    contrastive_loss(a, a, temperature()).backward()
    # Pairs that already match have a lower loss at a larger scale.
    assert temperature.log_scale.grad < 0


def test_the_scale_is_clamped_and_can_leave_the_limit_again():
    temperature = Temperature(0.01)
    a, b, _ = random_pairs(8, 16, dtype=torch.float32)
    for value in (5.0, 50.0):
        temperature.log_scale.data.fill_(value)
        scale = temperature()
        assert scale.item() == pytest.approx(100, rel=1e-6)
        assert temperature.log_scale.item() == pytest.approx(math.log(100))
        (gradient,) = torch.autograd.grad(contrastive_loss(a, b, scale), temperature.log_scale)
        assert gradient > 0, "unrelated pairs have a lower loss at a smaller scale"
        temperature.log_scale.data -= 0.01 * gradient
        assert temperature() < 99.9
    total = temperature() + temperature()  # used twice before backward, as by two micro-batches
    total.backward()
    assert temperature.log_scale.grad.item() == pytest.approx(total.item())


# ---- pairs of modalities -------------------------------------------------------------------------


def test_all_pairs_loss_is_the_weighted_mean_and_returns_each_pairs_loss():
    embeddings = {
        name: random_pairs(6, 4, seed)[0] for seed, name in enumerate(("text", "image", "audio"))
    }
    ids, scale = torch.tensor([0, 1, 2, 0, 3, 4]), torch.tensor(8.0, requires_grad=True)
    pairs = {("text", "image"): 2.0, ("audio", "text"): 0.5, ("image", "audio"): 0.0}
    total, losses = all_pairs_loss(embeddings, scale, pairs, ids)
    expected = {(x, y): contrastive_loss(embeddings[x], embeddings[y], 8.0, ids) for x, y in pairs}
    assert losses == {"-".join(pair): loss for pair, loss in expected.items()}
    assert not any(loss.requires_grad for loss in losses.values())
    mean = (2 * expected["text", "image"] + 0.5 * expected["audio", "text"]) / 2.5
    assert (total - mean).abs() < 1e-12
    assert torch.autograd.grad(total, scale)[0] != 0
    rows = slice(0, 3)
    half = all_pairs_loss(embeddings, scale, pairs, ids, rows)[1]["text-image"]
    expected_half = contrastive_loss(embeddings["text"], embeddings["image"], 8.0, ids, rows)
    assert torch.equal(half, expected_half)


# ---- gradient caching ----------------------------------------------------------------------------

PAIRS = {("text", "image"): 1.0, ("text", "audio"): 0.5}
# Of files and captions: 0 and 9 share a file, 1 and 3 a caption, 3 and 6 a file, 4 and 8 both.
IDS = torch.tensor([[3, 0], [1, 1], [4, 2], [2, 1], [5, 4], [9, 5], [2, 6], [6, 7], [5, 4], [3, 9]])


# Two processes of five examples have different numbers of each pair.
PRESENT = {
    "text": torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1]) > 0,
    "image": torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 0, 0]) > 0,
    "audio": torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 1]) > 0,
}


def pairs_loss(embeddings, scale, present=None):
    return all_pairs_loss(embeddings, scale, PAIRS, IDS, present=present)[0]


class Towers(nn.Module):
    """An encoder for each modality, and the temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
                for name in ("text", "image", "audio")
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


def ten_examples():
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(10, 3, generator=generator, dtype=torch.float64)
        for name in ("text", "image", "audio")
    }


def reference_loss_and_gradients(present=None):
    """Return the loss of the whole batch on one process, and its gradients by parameter."""
    model = Towers()
    loss = pairs_loss(*model(ten_examples()), present)
    loss.backward()
    return loss.detach(), model.gradients()


def assert_gradients_equal(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() < 1e-12, name
        assert gradient.abs().max() > 1e-4, f"the gradient of {name} tests nothing"


@pytest.mark.parametrize("size", [1, 3, 5, 10, 64])
def test_micro_batches_give_the_gradients_of_the_whole_batch(size):
    model, calls = Towers(), []

    def encode(batch):
        calls.append((len(batch["text"]), torch.is_grad_enabled()))
        return model.encode(batch)

    expected_loss, expected = reference_loss_and_gradients()
    loss = cached_gradients(encode, ten_examples(), pairs_loss, size, model.temperature())
    assert (loss - expected_loss).abs() < 1e-12 and not loss.requires_grad
    assert_gradients_equal(model.gradients(), expected)
    # First all micro-batches without a graph, then with one; never more than `size` examples.
    lengths = [len(batch) for batch in IDS.split(size)]
    assert calls == [(n, graph) for graph in (False, True) for n in lengths]
    # Gradients add up, as with backward().
    cached_gradients(encode, ten_examples(), pairs_loss, size, model.temperature())
    doubled = {name: 2 * gradient for name, gradient in expected.items()}
    assert_gradients_equal(model.gradients(), doubled)


def test_micro_batches_work_with_frozen_and_with_unused_towers():
    model = Towers()
    model.towers["image"].requires_grad_(False)

    def loss(embeddings, scale):
        return contrastive_loss(embeddings["text"], embeddings["image"], scale, IDS)

    loss(model.encode(ten_examples()), model.temperature()).backward()
    expected = model.gradients()
    model.zero_grad()
    cached_gradients(model.encode, ten_examples(), loss, 4, model.temperature())
    assert_gradients_equal(model.gradients(), expected)
    text_parameters = {name for name, _ in model.named_parameters() if ".text." in name}
    assert expected.keys() == {"temperature.log_scale"} | text_parameters

    # The same with inputs and embeddings that are one tensor instead of a dictionary.
    image = model.encode(ten_examples())["image"]
    model.zero_grad()
    cached_gradients(
        lambda batch: normalize(model.towers["text"](batch), dim=-1),
        ten_examples()["text"],
        lambda embedding, scale: loss({"text": embedding, "image": image}, scale),
        4,
        model.temperature(),
    )
    assert_gradients_equal(model.gradients(), expected)


def test_an_encoders_extra_loss_is_averaged_over_the_micro_batches():
    def encode(model, batch):
        return model.encode(batch), model.towers["text"](batch["text"]).square().mean()

    batches = [{name: x[i : i + 5] for name, x in ten_examples().items()} for i in (0, 5)]
    model = Towers()
    extra_loss = sum(encode(model, batch)[1] for batch in batches) / 2
    expected_loss = pairs_loss(*model(ten_examples())) + extra_loss
    expected_loss.backward()
    expected = model.gradients()
    model.zero_grad()
    loss = cached_gradients(
        lambda batch: encode(model, batch), ten_examples(), pairs_loss, 5, model.temperature()
    )
    assert (loss - expected_loss).abs() < 1e-12 and not loss.requires_grad
    assert_gradients_equal(model.gradients(), expected)


def test_embedding_gradients_and_the_surrogate_loss_give_the_gradients_of_the_loss():
    expected_loss, expected = reference_loss_and_gradients()
    model = Towers()
    embeddings, scale = model(ten_examples())
    loss, gradients, scale_gradient = embedding_gradients(pairs_loss, embeddings, scale)
    assert torch.equal(loss, expected_loss) and not loss.requires_grad
    assert gradients.keys() == embeddings.keys() and not model.gradients()
    (surrogate_loss(embeddings, gradients) + scale * scale_gradient).backward()
    assert_gradients_equal(model.gradients(), expected)


def test_embedding_gradients_leaves_out_embeddings_that_the_loss_does_not_use():
    embeddings, scale = Towers()(ten_examples())
    _, gradients, scale_gradient = embedding_gradients(
        lambda embeddings, _: embeddings["text"].sum(), embeddings, scale
    )
    assert gradients.keys() == {"text"} and (gradients["text"] == 1).all()
    assert scale_gradient == 0


def test_micro_batches_under_autocast_keep_the_weights_gradients():
    """The pass with a graph must not reuse autocast's bf16 weights from the pass without one."""
    model = Towers().float()
    inputs = {name: x.float() for name, x in ten_examples().items()}
    with torch.autocast("cpu", torch.bfloat16):
        cached_gradients(model.encode, inputs, pairs_loss, 3, model.temperature())
    for name, expected in reference_loss_and_gradients()[1].items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert (gradient - expected).norm() < 0.2 * expected.norm() + 0.01, name


# ---- several processes ---------------------------------------------------------------------------


def run_process(rank, folder, world_size):
    """Compute loss and gradients of this process's examples in three ways; rank 0 saves the means.

    The means over the processes are taken by hand: DistributedDataParallel keeps its group until
    Python exits, and its threads then sometimes abort the process (pytorch/pytorch#179291).
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    n, results = 10 // world_size, {}
    inputs = {name: x[rank * n : (rank + 1) * n] for name, x in ten_examples().items()}
    ids = gather_with_gradient(IDS[local_rows(n)])

    def gathered_loss(embeddings, scale, rows, present=None):
        gathered = {name: gather_with_gradient(e) for name, e in embeddings.items()}
        return all_pairs_loss(gathered, scale, PAIRS, ids, rows, present=present)[0]

    def store_means(name, loss, model):
        loss = loss.detach().clone()
        for x in (loss, *(p.grad for p in model.parameters())):
            dist.all_reduce(x)
            x /= world_size
        results[name] = loss, model.gradients()

    for name, rows in {"local rows": local_rows(n), "all rows": slice(None)}.items():
        model = Towers()
        loss = gathered_loss(model.encode(inputs), model.temperature(), rows)
        loss.backward()
        store_means(name, loss, model)

    local = {name: has[local_rows(n)].long() for name, has in PRESENT.items()}
    present = {name: gather_with_gradient(has) > 0 for name, has in local.items()}
    for name, gaps in {"micro-batches": None, "gaps": present}.items():
        model = Towers()
        loss = cached_gradients(
            model.encode,
            inputs,
            lambda embeddings, scale, gaps=gaps: gathered_loss(
                embeddings, scale, local_rows(n), gaps
            ),
            2,
            model.temperature(),
        )
        store_means(name, loss, model)

    # The sum over the processes must not happen in a gradient that other nodes still read.
    x, other = (torch.zeros(length, requires_grad=True) for length in (n, 10))
    (1 * other + gather_with_gradient(x)).backward(torch.ones(10))
    assert (x.grad == world_size).all() and (other.grad == 1).all()
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path):
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(x) is x, "one process has nothing to gather"
    assert local_rows(3) == slice(0, 3)
    torch.multiprocessing.spawn(run_process, (str(tmp_path), 2), nprocs=2)
    whole, with_gaps = reference_loss_and_gradients(), reference_loss_and_gradients(PRESENT)
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == {"local rows", "all rows", "micro-batches", "gaps"}
    assert (whole[0] - with_gaps[0]).abs() > 1e-3
    for name, (loss, gradients) in results.items():
        expected_loss, expected = with_gaps if name == "gaps" else whole
        assert (loss - expected_loss).abs() < 1e-12
        assert_gradients_equal(gradients, expected)


# ---- retrieval -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 3), st.integers(0, 2), st.integers(1, 40), st.integers(0, 99)
)
def test_ranks_equal_a_count_by_hand(Q, M, n_ids, max_scores, seed):
    """Small integers give many ties and no rounding. The size of a chunk must not matter."""
    generator = torch.Generator().manual_seed(seed)
    queries, targets = (torch.randint(-2, 3, (Q, M), generator=generator).float() for _ in range(2))
    by_n_ids = (
        torch.arange(Q)[:, None],
        torch.randint(0, Q, (Q, 1), generator=generator),
        file_and_caption_ids(Q, seed),
    )
    ids = by_n_ids[n_ids]
    expected = []
    for i in range(Q):
        right = [j for j in range(Q) if (ids[j] == ids[i]).any()]
        best = max((queries[i] @ targets[j]).item() for j in right)
        wrong = [j for j in range(Q) if j not in right]
        expected.append(sum((queries[i] @ targets[j]).item() >= best for j in wrong))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "MAX_SCORES", max_scores)
        counted = ranks(queries, targets, (None, ids[:, 0], ids)[n_ids])
    assert counted.tolist() == expected


def test_recall_and_median_rank_of_known_ranks():
    targets = torch.eye(4)
    queries = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]])
    assert ranks(queries, targets).tolist() == [0, 1, 2, 0]
    assert [recall_at_k(queries, targets, k) for k in (1, 2, 3, 4, 9)] == [0.5, 0.75, 1, 1, 1]
    assert median_rank(queries, targets) == 1.5 and median_rank(targets, targets) == 1
    ids = torch.tensor([0, 0, 1, 2])
    assert recall_at_k(queries, targets, 1, ids) == 0.75
    assert median_rank(queries, targets, ids) == 1


def test_a_duplicate_of_the_partner_is_a_right_answer():
    """Six sounds of the words 0, 1 and 2, each sound embedded at its word: every answer is right,
    although nothing tells the two sounds of one word apart."""
    words = torch.tensor([0, 1, 2, 0, 1, 2])
    embeddings = torch.eye(3)[words]
    ids = torch.stack([torch.arange(6), words], dim=1)
    assert ranks(embeddings, embeddings, ids).tolist() == [0] * 6
    assert recall_at_k(embeddings, embeddings, 1, ids) == 1
    assert median_rank(embeddings, embeddings, ids) == 1
    assert recall_at_k(embeddings, embeddings, 1) == 0, "without ids, ties count as errors"
    # Query 0 finds the other sound of its word first, and its partner last: right all the same.
    targets = torch.tensor([[0.1, 0, 0], [0.5, 1, 0], [0.5, 0, 1], [0.9, 0, 0], [0, 1, 0]])
    targets = torch.cat([targets, torch.eye(3)[2:]])
    assert ranks(embeddings, targets, ids)[0] == 0 and ranks(embeddings, targets)[0] == 3
    # A wrong target with exactly the best right score counts as an error.
    tied = torch.tensor([[0.1, 0, 0], [0.9, 1, 0], [0.5, 0, 1], [0.9, 0, 0], [0, 1, 0]])
    tied = torch.cat([tied, torch.eye(3)[2:]])
    assert ranks(embeddings, tied, ids)[0] == 1


def test_the_nearest_class_of_each_query():
    classes = torch.eye(3)
    queries = torch.tensor([[0.1, 0.9, 0], [0, 0.2, 0.3], [math.nan, 0, 0]])
    assert nearest_class(queries, classes).tolist() == [1, 2, -1]
    assert nearest_class(queries.bfloat16(), classes).tolist() == [1, 2, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("Q", "M"), [(2, 3), (37, 64), (301, 512)])
def test_collapsed_embeddings_retrieve_nothing(Q, M, dtype):
    for seed in range(3):
        a, b, _ = random_pairs(2, M, seed, dtype=dtype)
        queries, targets = a[:1].repeat(Q, 1), b[:1].repeat(Q, 1)
        assert (ranks(queries, targets) == Q - 1).all()
        assert [recall_at_k(queries, targets, k) for k in (1, Q - 1, Q)] == [0, 0, 1]
        assert median_rank(queries, targets) == Q


def test_nan_retrieves_nothing():
    a, b, _ = random_pairs(6, 4)
    nan = torch.full_like(a, math.nan)
    for queries, targets in ((nan, b), (a, nan), (nan, nan)):
        assert [recall_at_k(queries, targets, k) for k in (1, 5, 6, 99)] == [0] * 4
        assert median_rank(queries, targets) == 7
    one_nan = b.detach().index_fill(0, torch.tensor(2), math.nan)
    # The NaN target ranks before the true target of every query, and is never retrieved itself.
    assert ranks(b, one_nan).tolist() == [1, 1, 6, 1, 1, 1]
    assert recall_at_k(nan[:1], nan[:1], 1) == 0, "not even as the only target"


def test_similar_targets_beyond_rounding_error_are_distinguished():
    angle = torch.arange(100, dtype=torch.float64) * 0.01
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    for length in (1, 1e-6):  # the tolerance scales with the length of the embeddings
        assert (ranks(length * circle.float(), length * circle.float()) == 0).all()


def test_a_large_gallery_is_ranked_in_chunks(monkeypatch):
    monkeypatch.setattr(contrastive, "MAX_SCORES", 5000 * 7)
    rows, matmul = [], torch.Tensor.__matmul__

    def counting_matmul(x, y):
        rows.append(len(x))
        return matmul(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counting_matmul)
    a, _, _ = random_pairs(5000, 8, dtype=torch.float32)
    assert recall_at_k(a, a, 1) == 1
    assert max(rows) == 7 and sum(rows) == 5000


# ---- arguments that are refused ------------------------------------------------------------------

A, B, SCALE = torch.ones(4, 3), torch.ones(5, 3), torch.tensor(10.0)


@pytest.mark.parametrize(
    ("call", "message"),
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
        (lambda: Temperature(0.0), r"must be at least 0\.01"),
        (lambda: Temperature(-0.1), r"must be at least 0\.01"),
        (lambda: Temperature(0.009), r"must be at least 0\.01"),
        (lambda: Temperature(math.nan), r"must be at least 0\.01"),
    ],
)
def test_invalid_arguments_are_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()
