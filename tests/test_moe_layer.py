"""The MoE layer: limit cases, gradients, stats, which tokens affect which outputs, and in a GPT."""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nanods.gpt import GPT, GPTConfig
from nanods.moe import (
    MLP,
    MoE,
    MoEConfig,
    experts_loop,
    load_balancing_loss,
    route,
    router_logits,
    router_z_loss,
    select_experts,
)
from tests.test_gpt import DENSE, model_of, tokens_of

LOSSES = ("balance_loss", "z_loss")
WITH_GRADIENT = (*LOSSES, "token_entropy", "importance")  # of the stats
PRIORITIES = ("token", "slot")


def random_layer(E=5, K=2, C=8, F=12, normalise=True, **options):
    torch.manual_seed(0)
    layer = MoE(C, F, MoEConfig(E, K, normalise=False, **options)).double()
    layer.normalise = normalise  # set here because MoEConfig refuses it with K = 1
    torch.nn.init.normal_(layer.gate.weight, std=0.5)
    return layer


def random_input(B=3, T=16, C=8, seed=1):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance


def assert_same_stats(stats, expected):
    assert stats.keys() == expected.keys()
    for name, value in stats.items():
        assert_close(value, expected[name], 1e-14)


# ---- limit cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_one_expert_is_an_mlp(normalise):
    mlp, layer, x = MLP(8, 12).double(), random_layer(1, 1, normalise=normalise), random_input()
    mlp.up.weight.data, mlp.out.weight.data = layer.up.data[0].clone(), layer.out.data[0].clone()
    results = []
    for module in (mlp, layer):
        x = x.detach().requires_grad_()
        y, _ = module(x)
        (y * torch.cos(torch.arange(y.numel())).view_as(y)).sum().backward()
        results.append((y, x.grad))
    for mlp_result, layer_result in zip(*results, strict=True):
        assert_close(mlp_result, layer_result)
    assert_close(layer.up.grad[0], mlp.up.weight.grad)
    assert_close(layer.out.grad[0], mlp.out.weight.grad)


@pytest.mark.parametrize("normalise", [True, False])  # all E probabilities sum to 1 anyway
def test_with_all_experts_selected_the_output_is_their_weighted_sum(normalise):
    layer, x = random_layer(4, 4, normalise=normalise), random_input()
    y, stats = layer(x)
    probs = (x @ layer.gate.weight.T).softmax(-1)
    expected = torch.zeros_like(y)
    for e in range(4):
        expected += probs[..., e, None] * ((x @ layer.up[e].T).relu() ** 2 @ layer.out[e].T)
    assert_close(y, expected)
    assert stats["load"].tolist() == [48] * 4


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "normalise"), [(1, False), (2, True), (2, False), (3, True)])
def test_gradients_through_the_router_are_right(K, normalise):
    layer = random_layer(3, K, 4, 5, normalise=normalise)
    rows = random_input(1, 40, 4)[0]
    probs = router_logits(rows, layer.gate.weight).softmax(dim=-1)
    ranked = probs.sort(dim=-1, descending=True).values
    # All three are selected if K is 3: there is no next one.
    margin = ranked[:, K - 1] - ranked[:, K] if K < 3 else torch.ones(len(rows))
    rows = rows[margin > 0.05][None, :6].requires_grad_()  # gradcheck must change no selection
    assert rows.size(1) == 6

    def output_and_losses(x, gate, up, out):
        y, stats = functional_call(layer, {"gate.weight": gate, "up": up, "out": out}, (x,))
        return y, stats["balance_loss"], stats["z_loss"]

    inputs = (rows, layer.gate.weight, layer.up, layer.out)
    assert torch.autograd.gradcheck(output_and_losses, inputs)


def test_each_loss_gives_the_router_a_gradient():
    def largest_gradients(name, **options):
        layer, x = random_layer(**options), random_input()
        y, stats = layer(x)
        loss = y.flatten(0, 1).log_softmax(-1)[:, 0].mean() if name == "output" else stats[name]
        parameters = (layer.gate.weight, layer.up, layer.out)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [0 if gradient is None else gradient.abs().max().item() for gradient in gradients]

    for name in LOSSES:
        gate, up, out = largest_gradients(name)
        assert gate > 1e-4 and up == out == 0
    for options in ({"K": 2}, {"K": 1, "normalise": False}, {"K": 5}):
        assert min(largest_gradients("output", **options)) > 1e-4
    gate, up, out = largest_gradients("output", K=1, normalise=True)  # why MoEConfig refuses it
    assert gate < 1e-15 < 1e-4 < min(up, out)


# ---- stats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 0.3, 1.0, 1.1, 9.0])
def test_stats_equal_their_definitions(K, training, capacity_factor):
    layer, x = random_layer(5, K, capacity_factor=capacity_factor).train(training), random_input()
    y, stats = layer(x, inspect=True)
    rows, N = x.flatten(0, 1), 48
    weights, experts, probs = route(rows, layer.gate.weight, K)
    load = [(experts == e).sum().item() for e in range(5)]
    assert stats["load"].tolist() == load and sum(load) == N * K
    assert_close(stats["importance"], probs.mean(dim=0))
    assert_close(stats["balance_loss"], load_balancing_loss(probs, experts))
    assert_close(stats["z_loss"], router_z_loss(rows @ layer.gate.weight.T))
    assert_close(stats["token_entropy"], -(probs * probs.log()).sum(dim=-1).mean())
    has_capacity = training and capacity_factor is not None
    capacity = math.ceil(capacity_factor * N * K / 5) if has_capacity else N
    dropped = sum(max(0, n - capacity) for n in load) / (N * K)
    assert stats["dropped"].item() == pytest.approx(dropped, abs=1e-7)
    assert not has_capacity or capacity_factor > 1 or stats["dropped"] > 0
    kept = stats["experts"].flatten(0, 1)
    assert kept.shape == (N, K) and ((kept == experts) | (kept == 5)).all()
    assert [(kept == e).sum().item() for e in range(5)] == [min(n, capacity) for n in load]
    assert_close(y.flatten(0, 1), experts_loop(rows, weights, kept, layer.up, layer.out))
    assert "experts" not in layer(x)[1]
    for name, value in stats.items():
        assert name in WITH_GRADIENT or not value.requires_grad


@pytest.mark.parametrize(
    ("capacity_factor", "priority"), [(None, "token"), (0.8, "token"), (0.8, "slot")]
)
def test_padding_uses_no_expert_and_affects_nothing(capacity_factor, priority):
    layer, x = random_layer(capacity_factor=capacity_factor, priority=priority), random_input()
    valid = torch.arange(16) < torch.tensor([[16], [3], [9]])
    expected, expected_stats = layer(x[valid][None], inspect=True)
    for padded in (
        x,
        x.masked_fill(~valid[..., None], 100.0),
        torch.where(valid[..., None], x, x[0, 0]),
    ):
        padded = padded.detach().requires_grad_()
        y, stats = layer(padded, valid, inspect=True)
        assert (y[~valid] == 0).all() and (stats["experts"][~valid] == 5).all()
        assert_close(y[valid], expected[0])
        assert torch.equal(stats.pop("experts")[valid], expected_stats["experts"][0])
        assert_same_stats(stats, {name: expected_stats[name] for name in stats})
        loss = y.square().sum() + stats["balance_loss"] + stats["z_loss"]
        (gradient,) = torch.autograd.grad(loss, padded)
        assert (gradient[~valid] == 0).all() and gradient[valid].abs().max() > 0
    all_valid = torch.ones(3, 16, dtype=torch.bool)
    assert torch.equal(layer(x, all_valid)[0], layer(x)[0])
    assert_same_stats(layer(x, all_valid)[1], layer(x)[1])


def stats_by_indexing(layer, x, valid):
    """Return the stats that depend on padding, from the tensors of the valid tokens alone."""
    rows = x.flatten(0, 1)
    logits = router_logits(rows, layer.gate.weight)
    _, experts, probs = select_experts(logits, layer.top_k, normalise=layer.normalise)
    valid = valid.flatten()
    logits, experts, probs = logits[valid], experts[valid], probs[valid]
    return {
        "importance": probs.mean(dim=0),
        "balance_loss": load_balancing_loss(probs, experts),
        "z_loss": router_z_loss(logits),
        "token_entropy": torch.special.entr(probs).sum(dim=-1).mean(),
    }


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[16, 16, 16], [16, 3, 9], [1, 1, 1], [0, 0, 5]])
def test_stats_with_padding_equal_those_of_the_indexed_valid_tokens(K, lengths):
    layer, x = random_layer(K=K), random_input().requires_grad_()
    valid = torch.arange(16) < torch.tensor(lengths)[:, None]
    _, stats = layer(x, valid)

    def gradients(value):
        weighted_sum = (value * torch.arange(1.0, value.numel() + 1).view_as(value)).sum()
        return torch.autograd.grad(weighted_sum, (x, layer.gate.weight), retain_graph=True)

    for name, expected in stats_by_indexing(layer, x, valid).items():
        assert_close(stats[name], expected)
        assert stats[name].requires_grad == expected.requires_grad
        if expected.requires_grad:
            for gradient, reference in zip(
                gradients(stats[name]), gradients(expected), strict=True
            ):
                assert_close(gradient, reference)
    assert stats["load"].sum() == sum(lengths) * K


@pytest.mark.parametrize("capacity_factor", [0.1, 0.7, 1.0, 1.1, 1.25, 1 / 3])
def test_the_capacity_with_padding_counts_the_valid_assignments(capacity_factor):
    layer = random_layer(10, 2, capacity_factor=capacity_factor)
    experts = torch.zeros(200, 2, dtype=torch.long)
    for n in range(201):
        capacity = layer.capacity(experts, torch.arange(200) < n)
        assert capacity == math.ceil(capacity_factor * (n * 2) / 10)
        assert capacity == layer.capacity(experts[:n], None)


# ---- which tokens affect which outputs -----------------------------------------------------------


def test_capacity_drops_assignments_in_training_and_never_in_evaluation():
    layer, unlimited, x = random_layer(capacity_factor=0.5), random_layer(), random_input()
    y, stats = layer(x)
    assert stats["dropped"] > 0.2 and (y - unlimited(x)[0]).abs().max() > 0.1
    layer.eval()
    y, stats = layer(x)
    assert stats["dropped"] == 0
    assert torch.equal(y, layer(x)[0]) and torch.equal(y, unlimited(x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_token_does_not_depend_on_other_tokens(training):
    capacity_factor = None if training else 0.5
    layer, x = random_layer(capacity_factor=capacity_factor).train(training), random_input()
    full, full_stats = layer(x, inspect=True)
    prefixes = [(slice(None), slice(p)) for p in range(1, 17)]
    single_rows = [(slice(b, b + 1), slice(None)) for b in range(3)]
    for part in prefixes + single_rows:
        y, stats = layer(x[part], inspect=True)
        assert torch.equal(stats["experts"], full_stats["experts"][part])
        assert_close(y, full[part])


def tokens_with_choices(*choices):
    """Return tokens (T, 3) with a first and a second choice each: logits 2 and 1 for the gate I."""
    logits = torch.zeros(len(choices), 3, dtype=torch.float64)
    for token, (first, second) in zip(logits, choices, strict=True):
        token[first], token[second] = 2, 1
    return logits


@pytest.mark.parametrize("priority", PRIORITIES)
def test_under_slot_priority_later_tokens_change_earlier_outputs(priority):
    """The capacity is ceil(0.75 * 8 / 3) = 2. Three later first choices of expert 1 use it up, and
    the first token's second choice is dropped.
    """
    layer = random_layer(3, 2, 3, capacity_factor=0.75, priority=priority)
    layer.gate.weight.data = torch.eye(3).double()
    below_capacity = layer(tokens_with_choices((0, 1), (0, 2), (2, 0), (2, 0))[None])[0]
    above_capacity = layer(tokens_with_choices((0, 1), (1, 2), (1, 2), (1, 2))[None])[0]
    leak = (below_capacity[0, 0] - above_capacity[0, 0]).abs().max()
    assert leak > 0.1 if priority == "slot" else leak <= 1e-12


def test_under_token_priority_only_earlier_tokens_and_rows_change_an_output():
    layer = random_layer(capacity_factor=0.6)
    x, other = random_input(), random_input(seed=2)
    for p in range(1, 16):
        changed = torch.cat([x[:1, :p], other[:1, p:]], dim=1)
        assert_close(layer(changed)[0][:, :p], layer(x[:1])[0][:, :p])
    y = layer(x)[0]
    first_changed = torch.cat([other[:1], x[1:]])
    last_changed = torch.cat([x[:2], other[2:]])
    assert (layer(first_changed)[0][1:] - y[1:]).abs().max() > 0.1
    assert_close(layer(last_changed)[0][:2], y[:2])


# ---- the bias ------------------------------------------------------------------------------------


def test_the_bias_moves_by_its_rate_towards_an_even_load():
    layer = random_layer(4, bias_rate=0.25)
    layer.update_bias(torch.tensor([12, 2, 6, 4]))  # mean 6
    assert layer.bias.tolist() == [-0.25, 0.25, 0, 0.25]
    layer.update_bias(torch.tensor([0, 0, 0, 3]))  # mean 0.75
    assert layer.bias.tolist() == [0, 0.5, 0.25, 0]
    layer.update_bias(torch.tensor([0, 0, 0, 4]), lr_multiplier=0.5)
    assert layer.bias.tolist() == [0.125, 0.625, 0.375, -0.125]
    before = layer.bias.clone()
    for training in (True, False):
        layer.train(training)(random_input())
        assert torch.equal(layer.bias, before)
    assert "bias" in layer.state_dict() and "bias" not in dict(layer.named_parameters())


def test_the_bias_changes_the_selection_and_not_the_weights():
    layer, x = random_layer(bias_rate=0.1), random_input()
    layer.bias[:] = torch.tensor([0, 0, 0.5, 0, 0])
    y, stats = layer(x, inspect=True)
    rows, experts = x.flatten(0, 1), stats["experts"].flatten(0, 1)
    assert not torch.equal(stats["experts"], random_layer()(x, inspect=True)[1]["experts"])
    probs = (rows @ layer.gate.weight.T).softmax(-1)
    weights = probs.gather(-1, experts)
    weights = weights / weights.sum(-1, keepdim=True)
    assert_close(y.flatten(0, 1), experts_loop(rows, weights, experts, layer.up, layer.out))
    assert_close(stats["importance"], probs.mean(dim=0))
    assert_close(stats["balance_loss"], load_balancing_loss(probs, experts))
    layer.bias_rate = 0
    assert torch.equal(layer(x)[0], random_layer()(x)[0]), "with bias_rate 0 the bias is ignored"


def test_sigmoid_scores_reach_the_weights_and_the_stats():
    layer, x = random_layer(scores="sigmoid"), random_input()
    y, stats = layer(x, inspect=True)
    rows, experts = x.flatten(0, 1), stats["experts"].flatten(0, 1)
    scores = (rows @ layer.gate.weight.T).sigmoid()
    assert torch.equal(experts, scores.topk(layer.top_k).indices)
    weights = scores.gather(-1, experts)
    weights = weights / weights.sum(-1, keepdim=True)
    assert_close(y.flatten(0, 1), experts_loop(rows, weights, experts, layer.up, layer.out))
    probs = scores / scores.sum(-1, keepdim=True)
    assert_close(stats["importance"], probs.mean(dim=0))
    assert_close(stats["balance_loss"], load_balancing_loss(probs, experts))


def test_the_bias_evens_a_skewed_load():
    layer = random_layer(bias_rate=0.005)
    x = random_input(8, 32) + layer.gate.weight[1].detach()
    loads = []
    for _ in range(300):
        loads.append(layer(x)[1]["load"].double())
        layer.update_bias(loads[-1])
    first, last = ((load.max() / load.mean()).item() for load in (loads[0], loads[-1]))
    assert first > 2 and last < 1.2


# ---- in a GPT ------------------------------------------------------------------------------------

WITH_EXPERTS = replace(DENSE, moe=MoEConfig(n_expert=4, top_k=2, bias_rate=0.1))
WITH_CAPACITY = replace(
    WITH_EXPERTS, moe=replace(WITH_EXPERTS.moe, capacity_factor=0.5, priority="slot")
)


@torch.no_grad()
def test_a_gpt_with_capacity_decodes_in_evaluation_as_one_without():
    """tests/test_gpt.py tests a GPT with experts and no capacity as it tests the others."""
    model, tokens = model_of(WITH_CAPACITY).eval(), tokens_of(2, 24)
    full, stats = model(tokens)
    assert torch.equal(full, model_of(WITH_EXPERTS)(tokens)[0])
    assert all(layer["dropped"] == 0 for layer in stats)
    cache = model.new_cache(2)
    cached = [model(part, cache)[0] for part in tokens.split([3, 7, *[1] * 14], dim=1)]
    assert_close(torch.cat(cached, dim=1), full, 1e-10)
    changed = torch.cat([tokens[:, :10], tokens_of(2, 14, seed=9)], dim=1)
    assert_close(model(changed)[0][:, :10], full[:, :10])
    both_rows = torch.stack(list(model.generate(tokens[:, :5], 30, temperature=0)), dim=1)
    first_row = torch.stack(list(model.generate(tokens[:1, :5], 30, temperature=0)), dim=1)
    assert torch.equal(both_rows[:1], first_row)
    model.train()
    assert (model(changed)[0][:, :10] - model(tokens)[0][:, :10]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_of_a_gpt_is_not_counted():
    model, tokens, lengths = model_of(WITH_EXPERTS), tokens_of(3, 12), torch.tensor([12, 4, 7])
    valid = torch.arange(12) < lengths[:, None]
    _, padded = model(tokens, lengths=lengths, inspect=True)
    _, unpadded = model(tokens, inspect=True)
    _, refilled = model(tokens.where(valid, 49), lengths=lengths)
    for stats, full, other_padding in zip(padded, unpadded, refilled, strict=True):
        assert stats["load"].sum() == 23 * 2
        assert torch.equal(stats["experts"], full["experts"].where(valid[..., None], 4))
        assert_same_stats(other_padding, {name: stats[name] for name in other_padding})


@pytest.mark.parametrize(("E", "K"), [(1, 2), (4, 2), (4, 4), (5, 1)])
def test_parameters_are_counted_as_they_are_used(E, K):
    model = GPT(replace(DENSE, moe=MoEConfig(E, K, normalise=K > 1)))
    total = active = 0
    for name, parameter in model.named_parameters():
        used = parameter.numel()
        if name == "embedding.weight":
            used = DENSE.n_embd
        elif name.endswith((".mlp.up", ".mlp.out")):
            used = sum(expert.numel() for expert in parameter[:K])
        total, active = total + parameter.numel(), active + used
    assert model.count_parameters() == (total, active)


def test_flops_equal_the_counted_ones():
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=50, moe=MoEConfig(4, 2)
    )
    tokens = tokens_of(1, 32)
    counts = []
    # Attention takes the same in both models, so the difference is that of the experts.
    for model in (GPT(config), GPT(replace(config, moe=MoEConfig()))):
        with FlopCounterMode(display=False) as counter:
            model(tokens)[0].sum().backward()
        counts.append((counter.get_total_flops(), 32 * model.flops_per_token()))
    (counted, formula), (counted_dense, formula_dense) = counts
    assert counted - counted_dense == pytest.approx(formula - formula_dense, rel=1e-9)


def test_names_shapes_and_initial_values_of_the_experts():
    model = GPT(WITH_EXPERTS)
    for n in range(2):
        names = {name for name in model.state_dict() if name.startswith(f"blocks.{n}.mlp.")}
        assert names == {f"blocks.{n}.mlp.{rest}" for rest in ("up", "out", "gate.weight", "bias")}
        layer = model.blocks[n].mlp
        assert layer.up.shape == (4, 64, 16) and layer.out.shape == (4, 16, 64)
        assert (layer.out == 0).all(), "the block must start as the identity"
        assert layer.up.std().item() == pytest.approx(0.25, rel=0.1)
        assert layer.gate.weight.std() > 0.1
    names = {name for name in GPT(DENSE).state_dict() if ".0.mlp." in name}
    assert names == {f"blocks.0.mlp.{name}.weight" for name in ("up", "out")}


def test_the_settings_reach_the_layers():
    options = {
        "top_k": 3,
        "normalise": False,
        "scores": "sigmoid",
        "capacity_factor": 2.5,
        "priority": "slot",
        "bias_rate": 0.5,
    }
    for block in GPT(replace(DENSE, moe=MoEConfig(4, **options))).blocks:
        assert {name: getattr(block.mlp, name) for name in options} == options


def test_the_bias_of_each_layer_follows_its_load():
    load = torch.tensor([[9, 1, 5, 5], [0, 8, 0, 0]])
    model, without_bias = GPT(WITH_EXPERTS), GPT(replace(WITH_EXPERTS, moe=MoEConfig(4)))
    for gpt in (model, without_bias, GPT(DENSE)):
        gpt.update_bias(load)
    expected = torch.tensor([[-0.1, 0.1, 0, 0], [0.1, -0.1, 0.1, 0.1]])
    for block, unchanged, row in zip(model.blocks, without_bias.blocks, expected, strict=True):
        assert torch.equal(block.mlp.bias, row) and (unchanged.mlp.bias == 0).all()
    model.update_bias(load, lr_multiplier=0.5)
    assert_close(torch.stack([block.mlp.bias for block in model.blocks]), 1.5 * expected)
