"""The layer: its limits, what it tells, who can change whose output, and the same inside a GPT."""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nanods.gpt import GPT, GPTConfig, MoEConfig
from nanods.moe import (
    MLP,
    MoE,
    experts_loop,
    load_balancing_loss,
    route,
    router_logits,
    router_z_loss,
    select_experts,
)
from tests.test_gpt import DENSE, model_of, tokens_of

LOSSES = ("balance_loss", "z_loss")
TEACH = (*LOSSES, "token_entropy", "importance")  # what of the stats carries a gradient
PRIORITIES = ("token", "slot")


def layer_of(E=5, K=2, C=8, F=12, **options):
    torch.manual_seed(0)
    layer = MoE(C, E, K, F, **options).double()
    torch.nn.init.normal_(layer.gate.weight, std=0.5)
    return layer


def input_of(B=3, T=16, C=8, seed=1):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance


def same_stats(told, expected):
    assert told.keys() == expected.keys()
    for name, value in told.items():
        close(value, expected[name], 1e-14)


# ---- limits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_one_expert_is_an_mlp(normalise):
    mlp, layer, x = MLP(8, 12).double(), layer_of(1, 1, normalise=normalise), input_of()
    mlp.up.weight.data, mlp.out.weight.data = layer.up.data[0].clone(), layer.out.data[0].clone()
    results = []
    for module in (mlp, layer):
        x = x.detach().requires_grad_()
        y, _ = module(x)
        (y * torch.cos(torch.arange(y.numel())).view_as(y)).sum().backward()
        results.append((y, x.grad))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)
    close(layer.up.grad[0], mlp.up.weight.grad)
    close(layer.out.grad[0], mlp.out.weight.grad)


@pytest.mark.parametrize("normalise", [True, False])  # all probabilities sum to 1 anyway
def test_all_experts_chosen_is_their_weighted_sum(normalise):
    layer, x = layer_of(4, 4, normalise=normalise), input_of()
    y, stats = layer(x)
    probs = (x @ layer.gate.weight.T).softmax(-1)
    close(
        y,
        sum(
            probs[..., e, None] * ((x @ layer.up[e].T).relu() ** 2 @ layer.out[e].T)
            for e in range(4)
        ),
    )
    assert stats["load"].tolist() == [48] * 4
    assert stats["load_entropy"].item() == pytest.approx(math.log(4))
    assert stats["router_margin"] == 1  # no expert was passed over


# ---- gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "normalise"), [(1, False), (2, True), (2, False), (3, True)])
def test_the_gradients_are_right_through_the_router(K, normalise):
    layer = layer_of(3, K, 4, 5, normalise=normalise)
    rows = input_of(1, 40, 4)[0]
    margin = select_experts(router_logits(rows, layer.gate.weight), K)[3]
    rows = rows[margin > 0.05][None, :6].requires_grad_()  # a small step must change no choice

    def everything(x, gate, up, out):
        y, stats = functional_call(layer, {"gate.weight": gate, "up": up, "out": out}, (x,))
        return y, stats["balance_loss"], stats["z_loss"]

    assert rows.size(1) == 6 and torch.autograd.gradcheck(
        everything, (rows, layer.gate.weight, layer.up, layer.out)
    )


def test_each_loss_alone_teaches_the_router():
    def gradients(name, **options):
        layer, x = layer_of(**options), input_of()
        y, stats = layer(x)
        loss = y.flatten(0, 1).log_softmax(-1)[:, 0].mean() if name == "output" else stats[name]
        grads = torch.autograd.grad(
            loss, (layer.gate.weight, layer.up, layer.out), allow_unused=True
        )
        return [0 if grad is None else grad.abs().max().item() for grad in grads]

    for name in LOSSES:
        gate, up, out = gradients(name)
        assert gate > 1e-4 and up == out == 0
    for options in ({"K": 2}, {"K": 1, "normalise": False}, {"K": 5}):
        assert min(gradients("output", **options)) > 1e-4
    gate, up, out = gradients("output", K=1, normalise=True)  # why MoEConfig refuses it
    assert gate < 1e-15 < 1e-4 < min(up, out)


# ---- what it tells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 0.3, 1.0, 1.1, 9.0])
def test_the_stats_tell_what_happened(K, training, capacity_factor):
    layer, x = layer_of(5, K, capacity_factor=capacity_factor).train(training), input_of()
    y, stats = layer(x, inspect=True)
    rows, N = x.flatten(0, 1), 48
    weights, experts, probs = route(rows, layer.gate.weight, K)
    load = [(experts == e).sum().item() for e in range(5)]
    assert stats["load"].tolist() == load and sum(load) == N * K
    close(stats["importance"], probs.mean(dim=0))
    assert stats["load_entropy"].item() == pytest.approx(
        -sum(n / N / K * math.log(n / N / K) for n in load if n)
    )
    ranked = probs.sort(dim=-1, descending=True).values
    close(stats["router_margin"], (ranked[:, K - 1] - ranked[:, K]).mean())
    close(stats["balance_loss"], load_balancing_loss(probs, experts))
    close(stats["z_loss"], router_z_loss(rows @ layer.gate.weight.T))
    close(stats["token_entropy"], -(probs * probs.log()).sum(dim=-1).mean())
    limited = training and capacity_factor is not None
    capacity = math.ceil(capacity_factor * N * K / 5) if limited else N
    assert stats["dropped"].item() == pytest.approx(
        sum(max(0, n - capacity) for n in load) / (N * K), abs=1e-7
    )
    assert not limited or capacity_factor > 1 or stats["dropped"] > 0
    chosen = stats["experts"].flatten(0, 1)
    assert chosen.shape == (N, K) and ((chosen == experts) | (chosen == 5)).all()
    assert [(chosen == e).sum().item() for e in range(5)] == [min(n, capacity) for n in load]
    close(y.flatten(0, 1), experts_loop(rows, weights, chosen, layer.up, layer.out))
    assert "experts" not in layer(x)[1]
    assert not any(value.requires_grad for name, value in stats.items() if name not in TEACH)


@pytest.mark.parametrize(
    ("capacity_factor", "priority"), [(None, "token"), (0.8, "token"), (0.8, "slot")]
)
def test_padding_is_nobodys_and_nothing_to_the_rest(capacity_factor, priority):
    layer, x = layer_of(capacity_factor=capacity_factor, priority=priority), input_of()
    valid = torch.arange(16) < torch.tensor([[16], [3], [9]])
    alone, told_alone = layer(x[valid][None], inspect=True)
    for padding in (
        x,
        x.masked_fill(~valid[..., None], 100.0),
        torch.where(valid[..., None], x, x[0, 0]),
    ):
        padding = padding.detach().requires_grad_()
        y, told = layer(padding, valid, inspect=True)
        assert (y[~valid] == 0).all() and (told["experts"][~valid] == 5).all()
        close(y[valid], alone[0])
        assert torch.equal(told.pop("experts")[valid], told_alone["experts"][0])
        same_stats(told, {name: told_alone[name] for name in told})
        (slope,) = torch.autograd.grad(
            y.square().sum() + told["balance_loss"] + told["z_loss"], padding
        )
        assert (slope[~valid] == 0).all() and slope[valid].abs().max() > 0
    everyone = torch.ones(3, 16, dtype=torch.bool)
    assert torch.equal(layer(x, everyone)[0], layer(x)[0])
    same_stats(layer(x, everyone)[1], layer(x)[1])


# ---- who can change whose output ---------------------------------------------------------------------------------------------


def test_a_capacity_drops_in_training_and_never_in_evaluation():
    layer, free, x = layer_of(capacity_factor=0.5), layer_of(), input_of()
    y, stats = layer(x)
    assert stats["dropped"] > 0.2 and (y - free(x)[0]).abs().max() > 0.1
    layer.eval()
    y, stats = layer(x)
    assert stats["dropped"] == 0 and torch.equal(y, layer(x)[0]) and torch.equal(y, free(x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_token_is_routed_and_answered_as_alone(training):
    layer, x = layer_of(capacity_factor=None if training else 0.5).train(training), input_of()
    whole, told = layer(x, inspect=True)
    for part in [(slice(None), slice(p)) for p in range(1, 17)] + [
        (slice(b, b + 1), slice(None)) for b in range(3)
    ]:
        y, stats = layer(x[part], inspect=True)
        assert torch.equal(stats["experts"], told["experts"][part])
        close(y, whole[part])


def ranking(*choices):
    """Tokens that want an expert first and another second: logits 2 and 1, where the gate is the identity."""
    logits = torch.zeros(len(choices), 3, dtype=torch.float64)
    for token, (first, second) in zip(logits, choices, strict=True):
        token[first], token[second] = 2, 1
    return logits


@pytest.mark.parametrize("priority", PRIORITIES)
def test_under_slot_priority_later_tokens_change_earlier_outputs(priority):
    """Three first choices of expert 1 fill its ceil(0.75 * 8 / 3) = 2 places before the first token's second choice."""
    layer = layer_of(3, 2, 3, capacity_factor=0.75, priority=priority)
    layer.gate.weight.data = torch.eye(3).double()
    quiet = layer(ranking((0, 1), (0, 2), (2, 0), (2, 0))[None])[0]
    crowd = layer(ranking((0, 1), (1, 2), (1, 2), (1, 2))[None])[0]
    leak = (quiet[0, 0] - crowd[0, 0]).abs().max()
    assert leak > 0.1 if priority == "slot" else leak <= 1e-12


def test_under_token_priority_the_future_changes_nothing_but_earlier_rows_change_later_ones():
    layer = layer_of(capacity_factor=0.6)
    x, other = input_of(), input_of(seed=2)
    for p in range(1, 16):
        changed = torch.cat([x[:1, :p], other[:1, p:]], dim=1)
        close(layer(changed)[0][:, :p], layer(x[:1])[0][:, :p])
    y = layer(x)[0]
    first, last = torch.cat([other[:1], x[1:]]), torch.cat([x[:2], other[2:]])
    assert (layer(first)[0][1:] - y[1:]).abs().max() > 0.1
    close(layer(last)[0][:2], y[:2])


# ---- the bias ----------------------------------------------------------------------------------------------------------------


def test_the_bias_moves_by_its_rate_towards_an_even_load():
    layer = layer_of(4, bias_rate=0.25)
    layer.update_bias(torch.tensor([12, 2, 6, 4]))  # 6 on average
    assert layer.bias.tolist() == [-0.25, 0.25, 0, 0.25]
    layer.update_bias(torch.tensor([0, 0, 0, 3]))  # 0.75
    assert layer.bias.tolist() == [0, 0.5, 0.25, 0]
    before = layer.bias.clone()
    for training in (True, False):
        layer.train(training)(input_of())
        assert torch.equal(layer.bias, before)
    assert "bias" in layer.state_dict() and "bias" not in dict(layer.named_parameters())


def test_the_bias_moves_the_choice_and_not_the_weights():
    layer, x = layer_of(bias_rate=0.1), input_of()
    layer.bias[:] = torch.tensor([0, 0, 0.5, 0, 0])
    y, stats = layer(x, inspect=True)
    experts = stats["experts"].flatten(0, 1)
    assert not torch.equal(stats["experts"], layer_of()(x, inspect=True)[1]["experts"])
    probs = (x.flatten(0, 1) @ layer.gate.weight.T).softmax(-1)
    weights = probs.gather(-1, experts)
    close(
        y.flatten(0, 1),
        experts_loop(
            x.flatten(0, 1), weights / weights.sum(-1, keepdim=True), experts, layer.up, layer.out
        ),
    )
    close(stats["importance"], probs.mean(dim=0))
    close(stats["balance_loss"], load_balancing_loss(probs, experts))
    layer.bias_rate = 0
    assert torch.equal(layer(x)[0], layer_of()(x)[0])  # off is off


def test_the_bias_evens_a_skewed_load():
    layer = layer_of(bias_rate=0.005)
    x = input_of(8, 32) + layer.gate.weight[1].detach()
    loads = []
    for _ in range(300):
        loads.append(layer(x)[1]["load"].double())
        layer.update_bias(loads[-1])
    first, last = ((load.max() / load.mean()).item() for load in (loads[0], loads[-1]))
    assert first > 2 and last < 1.2


# ---- in a GPT ----------------------------------------------------------------------------------------------------------------

MIXED = replace(DENSE, moe=MoEConfig(n_expert=4, top_k=2, bias_rate=0.1))
CAPPED = replace(MIXED, moe=replace(MIXED.moe, capacity_factor=0.5, priority="slot"))


@torch.no_grad()
def test_a_gpt_decodes_in_evaluation_as_if_it_had_no_capacity():
    """tests/test_gpt.py holds a GPT with experts, without a limit, to all that it holds the others to."""
    model, tokens = model_of(CAPPED).eval(), tokens_of(2, 24)
    full, stats = model(tokens)
    assert torch.equal(full, model_of(MIXED)(tokens)[0]) and all(
        layer["dropped"] == 0 for layer in stats
    )
    cache = model.new_cache(2)
    pieces = [model(part, cache)[0] for part in tokens.split([3, 7, *[1] * 14], dim=1)]
    close(torch.cat(pieces, dim=1), full, 1e-10)
    changed = torch.cat([tokens[:, :10], tokens_of(2, 14, seed=9)], dim=1)
    close(model(changed)[0][:, :10], full[:, :10])
    made = torch.stack(list(model.generate(tokens[:, :5], 30, temperature=0)), dim=1)
    assert torch.equal(
        made[:1], torch.stack(list(model.generate(tokens[:1, :5], 30, temperature=0)), dim=1)
    )
    model.train()
    assert (model(changed)[0][:, :10] - model(tokens)[0][:, :10]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_of_a_gpt_is_not_counted():
    model, tokens, lengths = model_of(MIXED), tokens_of(3, 12), torch.tensor([12, 4, 7])
    valid = torch.arange(12) < lengths[:, None]
    _, told = model(tokens, lengths=lengths, inspect=True)
    _, whole = model(tokens, inspect=True)
    _, refilled = model(tokens.where(valid, 49), lengths=lengths)
    for layer, full, again in zip(told, whole, refilled, strict=True):
        assert layer["load"].sum() == 23 * 2
        assert torch.equal(layer["experts"], full["experts"].where(valid[..., None], 4))
        same_stats(again, {name: layer[name] for name in again})


@pytest.mark.parametrize(("E", "K"), [(1, 2), (4, 2), (4, 4), (5, 1)])
def test_parameters_are_counted_as_they_are_used(E, K):
    model = GPT(replace(DENSE, moe=MoEConfig(E, K, normalise=K > 1)))
    total = active = idle = 0
    for name, parameter in model.named_parameters():
        used = parameter.numel()
        if name == "embedding.weight":
            used = DENSE.n_embd
        elif name.endswith((".mlp.up", ".mlp.out")):
            used = sum(expert.numel() for expert in parameter[:K])
            idle += parameter.numel() - used
        total, active = total + parameter.numel(), active + used
    assert model.count_parameters() == (total, active)
    assert model.idle_parameters() == idle


def test_flops_agree_with_counting_them():
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=16, context_length=32, vocab_size=50, moe=MoEConfig(4, 2)
    )
    tokens = tokens_of(1, 32)
    counts = []
    for model in (
        GPT(config),
        GPT(replace(config, moe=MoEConfig())),
    ):  # what attention takes is the same
        with FlopCounterMode(display=False) as counter:
            model(tokens)[0].sum().backward()
        counts.append((counter.get_total_flops(), 32 * model.flops_per_token()))
    (counted, claimed), (counted_dense, claimed_dense) = counts
    assert counted - counted_dense == pytest.approx(claimed - claimed_dense, rel=1e-9)


def test_the_names_and_the_start_of_its_experts():
    model = GPT(MIXED)
    for n in range(2):
        names = {name for name in model.state_dict() if name.startswith(f"blocks.{n}.mlp.")}
        assert names == {f"blocks.{n}.mlp.{rest}" for rest in ("up", "out", "gate.weight", "bias")}
        layer = model.blocks[n].mlp
        assert layer.up.shape == (4, 64, 16) and layer.out.shape == (4, 16, 64)
        assert (layer.out == 0).all()  # the block starts as the identity
        assert (
            layer.up.std().item() == pytest.approx(0.25, rel=0.1) and layer.gate.weight.std() > 0.1
        )
    assert {n for n in GPT(DENSE).state_dict() if ".0.mlp." in n} == {
        f"blocks.0.mlp.{m}.weight" for m in ("up", "out")
    }


def test_the_settings_reach_the_layers():
    options = {
        "top_k": 3,
        "normalise": False,
        "capacity_factor": 2.5,
        "priority": "slot",
        "bias_rate": 0.5,
    }
    for block in GPT(replace(DENSE, moe=MoEConfig(4, **options))).blocks:
        assert {name: getattr(block.mlp, name) for name in options} == options


def test_each_layers_bias_moves_by_its_own_load():
    load = torch.tensor([[9, 1, 5, 5], [0, 8, 0, 0]])
    model, still = GPT(MIXED), GPT(replace(MIXED, moe=MoEConfig(4)))
    for one in (model, still, GPT(DENSE)):
        one.update_bias(load)
    expected = torch.tensor([[-0.1, 0.1, 0, 0], [0.1, -0.1, 0.1, 0.1]])
    for block, unmoved, row in zip(model.blocks, still.blocks, expected, strict=True):
        assert torch.equal(block.mlp.bias, row) and (unmoved.mlp.bias == 0).all()
