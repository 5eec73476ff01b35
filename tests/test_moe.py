"""The functions of moe.py: router, capacity limit, losses, upcycling, and the settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.gpt import GPT, GPTConfig, MoEConfig
from nanods.moe import (
    MLP,
    MoE,
    entropy_loss,
    load_balancing_loss,
    route,
    router_z_loss,
    select_experts,
    upcycle,
    within_capacity,
)

priorities = st.sampled_from(["token", "slot"])


# ---- the router ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_route_selects_the_most_probable_experts_and_the_bias_changes_only_the_selection(
    N, E, top_k, normalise, with_bias, seed
):
    K, generator = min(top_k, E), torch.Generator().manual_seed(seed)
    x, gate = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (N, E))
    bias = torch.randn(E, generator=generator, dtype=torch.float64) if with_bias else None
    weights, experts, probs = route(x, gate, K, bias, normalise)
    for n in range(N):
        p = [math.exp(logit) for logit in (gate @ x[n]).tolist()]
        p = [e / sum(p) for e in p]
        score = p if bias is None else [a + b for a, b in zip(p, bias.tolist(), strict=True)]
        ranking = sorted(range(E), key=lambda e: -score[e])
        assert experts[n].tolist() == ranking[:K]
        total = sum(p[e] for e in ranking[:K]) if normalise else 1
        assert probs[n].tolist() == pytest.approx(p)
        assert weights[n].tolist() == pytest.approx([p[e] / total for e in ranking[:K]])
    if normalise:
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
    else:
        assert torch.equal(weights, probs.gather(-1, experts))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(2, 8), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_sigmoid_scores_select_and_weigh_each_expert_by_itself(N, E, top_k, normalise, seed):
    K, generator = min(top_k, E), torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, E, generator=generator, dtype=torch.float64)
    bias = torch.randn(E, generator=generator, dtype=torch.float64)
    weights, experts, probs = select_experts(logits, K, bias, normalise, "sigmoid")
    for n in range(N):
        score = [1 / (1 + math.exp(-logit)) for logit in logits[n].tolist()]
        biased = [a + b for a, b in zip(score, bias.tolist(), strict=True)]
        ranking = sorted(range(E), key=lambda e: -biased[e])
        assert experts[n].tolist() == ranking[:K]
        total = sum(score[e] for e in ranking[:K]) if normalise else 1
        assert weights[n].tolist() == pytest.approx([score[e] / total for e in ranking[:K]])
        assert probs[n].tolist() == pytest.approx([value / sum(score) for value in score])


def test_one_experts_sigmoid_score_ignores_the_other_logits():
    logits, raised = torch.zeros(1, 4), torch.tensor([[0.0, 0, 0, 9]])
    for scores, equal in (("sigmoid", True), ("softmax", False)):
        bias = torch.tensor([1.0, 0, 0, -1])
        before, after = (
            select_experts(x, 1, bias, normalise=False, scores=scores)[0] for x in (logits, raised)
        )
        assert torch.equal(before, after) == equal


def test_probabilities_and_weights_are_finite_where_scores_are_0():
    logits = torch.full((2, 4), -200.0) + torch.tensor([0.0, 1, 2, 3])
    assert (logits.sigmoid() == 0).all()
    weights, _, probs = select_experts(logits, 2, scores="sigmoid")
    assert (probs - logits.softmax(-1)).abs().max() < 1e-6
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    # The bias selects two experts whose scores are 0.
    logits, bias = torch.tensor([[0.0, -200, -201, -202]]), torch.tensor([-2.0, 0, 0, -1])
    for scores in ("softmax", "sigmoid"):
        weights, experts, _ = select_experts(logits, 2, bias, scores=scores)
        by_expert = dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True))
        assert by_expert == pytest.approx({1: math.e / (1 + math.e), 2: 1 / (1 + math.e)})


def test_routing_is_computed_in_fp32_at_least():
    x, gate = torch.randn(300, 16), torch.randn(8, 16)
    exact = route(x.double(), gate.double(), 2)
    assert exact[2].dtype == torch.float64 and (exact[2] - route(x, gate, 2)[2]).abs().max() > 1e-10
    x, gate = x.bfloat16(), gate.bfloat16()
    from_bf16, from_fp32 = route(x, gate, 2), route(x.float(), gate.float(), 2)
    for result, reference in zip(from_bf16, from_fp32, strict=True):
        assert torch.equal(result, reference)


@pytest.mark.parametrize("top_k", [0, -1, 5])
def test_top_k_outside_1_to_n_expert_is_refused(top_k):
    with pytest.raises(ValueError, match=f"{top_k} must lie between 1"):
        route(torch.randn(3, 2), torch.randn(4, 2), top_k)
    with pytest.raises(ValueError, match=f"top_k = {top_k} must lie between 1"):
        MoE(2, 8, MoEConfig(4, top_k))


# ---- capacity ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 6),
    priorities,
)
def test_capacity_keeps_what_a_queue_per_expert_keeps(data, N, K, E, capacity, priority):
    """The number E stands for a dropped assignment: it is not kept and takes no capacity."""
    token = st.lists(st.integers(0, E), min_size=K, max_size=K)
    experts = torch.tensor(data.draw(st.lists(token, min_size=N, max_size=N)))
    assignments = [(n, k) for n in range(N) for k in range(K)]
    if priority == "slot":
        assignments.sort(key=lambda assignment: assignment[::-1])
    used, expected = [0] * E, torch.zeros(N, K, dtype=torch.bool)
    for n, k in assignments:
        e = experts[n, k]
        if e < E and used[e] < capacity:
            used[e] += 1
            expected[n, k] = True
    kept = within_capacity(experts, E, capacity, priority)
    assert torch.equal(kept, expected)
    for e in range(E):
        assert (experts[kept] == e).sum() == min(capacity, (experts == e).sum())


# ---- losses that keep the load even --------------------------------------------------------------


# How much the probabilities favour one expert: 30 is a collapse.
@pytest.mark.parametrize("skew", [0, 1, 30])
def test_balance_loss_equals_the_double_sum(skew):
    torch.manual_seed(0)
    gate = torch.randn(5, 6, dtype=torch.float64)
    _, experts, probs = route(torch.randn(40, 6, dtype=torch.float64) + skew * gate[3], gate, 2)
    expected = 0
    for e in range(5):
        fraction = sum((experts[n, k] == e).item() for n in range(40) for k in range(2)) / 80
        expected += 5 * fraction * sum(probs[n, e].item() for n in range(40)) / 40
    assert load_balancing_loss(probs, experts).item() == pytest.approx(expected, rel=1e-12)


def test_balance_loss_is_1_if_even_and_e_if_collapsed_and_can_fall_below_1():
    uniform, experts = torch.full((12, 4), 0.25), torch.arange(12)[:, None] % 4
    assert load_balancing_loss(uniform, experts) == 1
    assert load_balancing_loss(torch.eye(4)[[2] * 12], torch.full((12, 1), 2)) == 4
    # Three tokens barely prefer expert 0, one is certain of expert 1.
    logits = torch.tensor([[0.51, 0.49]] * 3 + [[0.01, 0.99]]).log()
    _, experts, probs = select_experts(logits, 1)
    assert experts.flatten().tolist() == [0, 0, 0, 1]
    expected = 2 * (0.75 * 0.385 + 0.25 * 0.615)
    assert load_balancing_loss(probs, experts).item() == pytest.approx(expected)


def test_balance_loss_lowers_the_probabilities_of_loaded_experts():
    probs = torch.rand(10, 3, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[0, 1]] * 8 + [[0, 2]] * 2)
    (gradient,) = torch.autograd.grad(load_balancing_loss(probs, experts), probs)
    expected = 3 * torch.tensor([10, 8, 2]).double() / 20 / 10
    assert (gradient - expected).abs().max() < 1e-15


def test_z_loss_is_its_formula():
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    expected = sum(math.log(sum(math.exp(l) for l in row)) ** 2 for row in logits.tolist()) / 20
    assert router_z_loss(logits).item() == pytest.approx(expected, rel=1e-12)
    assert router_z_loss(torch.full((3, 4), 1e4)).isfinite()
    assert torch.autograd.gradcheck(router_z_loss, logits)


def test_entropy_loss_is_0_for_certain_tokens_that_use_min_experts():
    def loss_of(probs, min_experts=2.0):
        token_entropy = torch.special.entr(probs).sum(dim=-1).mean()
        return entropy_loss(token_entropy, probs.mean(dim=0), min_experts)

    def loss(probs, min_experts=2.0):
        return loss_of(torch.tensor(probs, dtype=torch.float64), min_experts).item()

    # Each token is certain, both experts are used.
    assert loss([[1.0, 0, 0], [0, 1, 0]]) == pytest.approx(0, abs=1e-12)
    # One token is uncertain.
    assert loss([[1.0, 0, 0], [0, 0.5, 0.5]]) == pytest.approx(math.log(2) / 2)
    # All tokens use one expert, where two are requested.
    assert loss([[1.0, 0, 0], [1, 0, 0]]) == pytest.approx(math.log(2))
    assert loss([[1.0, 0, 0], [1, 0, 0]], min_experts=1) == 0
    # Two experts are used, but no token is certain.
    assert loss([[0.5, 0.5, 0]] * 2) == pytest.approx(math.log(2))

    def loss_of_logits(logits):
        return loss_of(logits.softmax(dim=-1), 3.0)

    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_of_logits, logits)


# ---- upcycling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_an_upcycled_mlp_keeps_its_output_whatever_the_gate(top_k, dtype, tolerance):
    torch.manual_seed(0)
    mlp = MLP(12, 20).to(dtype)
    layer = MoE(12, 20, MoEConfig(5, top_k, normalise=False)).to(dtype)
    layer.normalise = True  # MoEConfig refuses it with top_k = 1, since the gate gets no gradient
    x = torch.randn(3, 11, 12, dtype=dtype)
    weights = {f"0.mlp.{name}": weight for name, weight in mlp.state_dict().items()}
    upcycled = upcycle(weights | {"mlp": x}, 5)
    layer.up.data, layer.out.data = upcycled.pop("0.mlp.up"), upcycled.pop("0.mlp.out")
    assert upcycled.keys() == {"mlp"}
    assert layer.up.shape == (5, 20, 12) and layer.out.shape == (5, 12, 20)
    for scale in (0, 1, 50):
        layer.gate.weight.data = scale * torch.randn(5, 12, dtype=dtype)
        assert (layer(x)[0] - mlp(x)[0]).abs().max() <= tolerance


def test_an_upcycled_gpt_keeps_its_output():
    dense = GPTConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=50)
    torch.manual_seed(0)
    before = GPT(dense).double()
    after = GPT(GPTConfig(**{**vars(dense), "moe": MoEConfig(4, 2)})).double()
    for p in before.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = before.state_dict()
    upcycled = upcycle(weights, 4)
    missing, unexpected = after.load_state_dict(upcycled, strict=False)
    assert not unexpected
    assert {name.split(".", 2)[2] for name in missing} == {"mlp.gate.weight", "mlp.bias"}
    for name, weight in weights.items():
        assert ".mlp." in name or upcycled[name] is weight
    tokens = torch.randint(0, 50, (2, 8))
    assert (after(tokens)[0] - before(tokens)[0]).abs().max() < 1e-11


def test_upcycling_noise_has_the_requested_size():
    weight = 3 * torch.randn(64, 32)
    weights = {f"blocks.0.mlp.{name}.weight": weight.clone() for name in ("up", "out")}
    upcycled = upcycle(weights, 6, noise=0.1, seed=7)
    for stack in upcycled.values():
        rms = (stack - weight).square().mean(dim=(1, 2)).sqrt()
        assert (rms / weight.square().mean().sqrt() - 0.1).abs().max() < 0.01
        for a in range(6):
            for b in range(a):
                assert (stack[a] - stack[b]).std() > 0.1 * weight.std()
    up, out = upcycled.values()
    assert not torch.equal(up, out), "each matrix must have its own noise"
    for seed, equal in ((7, True), (8, False)):
        again = upcycle(weights, 6, noise=0.1, seed=seed)
        assert all(torch.equal(upcycled[name], again[name]) == equal for name in upcycled)
    assert all(torch.equal(weight, original) for original in weights.values()), "input changed"
    assert all((stack == weight).all() for stack in upcycle(weights, 6).values())


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_expert": 0}, "n_expert = 0 must be at least 1"),
        (
            {"n_expert": 4, "top_k": 5},
            "top_k = 5 must lie between 1 and n_expert = 4: choose fewer, or more experts",
        ),
        ({"n_expert": 4, "top_k": 0}, "top_k = 0 must lie between 1 and n_expert = 4"),
        ({"n_expert": 4, "top_k": 1}, "add --moe.no-normalise"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0 must be above 0, say 1.25"),
        ({"capacity_factor": -1.0}, "None: no limit"),
        ({"capacity_factor": math.nan}, "must be above 0"),
        (
            {"balance_coefficient": -0.1},
            r"balance_coefficient, .* = \(-0.1, .*each must be at least 0",
        ),
        ({"z_coefficient": -1.0}, r"z_coefficient.*-1.0.*0: off"),
        ({"bias_rate": math.nan}, "bias_rate.*nan.*must be at least 0"),
    ],
)
def test_impossible_settings_are_refused_with_a_suggestion(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**options)


def test_settings_at_their_limits_are_accepted():
    MoEConfig(n_expert=1, top_k=2)  # a plain MLP: K has no effect
    MoEConfig(
        n_expert=4,
        top_k=4,
        capacity_factor=0.1,
        balance_coefficient=0,
        z_coefficient=0,
        bias_rate=0,
    )
    MoEConfig(n_expert=4, top_k=1, normalise=False)
    for capacity_factor in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"capacity_factor = {capacity_factor} must be above"):
            MoE(4, 8, MoEConfig(2, 1, normalise=False, capacity_factor=capacity_factor))
    with pytest.raises(ValueError, match="top_k = 2 must lie between 1 and n_expert = 1"):
        MoE(4, 8, MoEConfig(n_expert=1, top_k=2))
