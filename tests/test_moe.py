"""The parts of a mixture: three routes to one sum, who is chosen and served, what evens the load, experts from an MLP."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanods import moe
from nanods.gpt import GPT, GPTConfig, MoEConfig
from nanods.moe import (
    MLP,
    MoE,
    choose,
    entropy_loss,
    experts_grouped,
    experts_loop,
    experts_sorted,
    load_balancing_loss,
    route,
    router_logits,
    router_z_loss,
    upcycle,
    within_capacity,
)

priorities = st.sampled_from(["token", "slot"])


def random_case(N, C, E, K, F, dropped=0.0, seed=0, dtype=torch.float64):
    """What the mixes take. Each token's experts differ; a share `dropped` of the assignments is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    x, weights, up, out = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, C), (N, K), (E, F, C), (E, C, F))
    )
    experts = torch.rand(N, E, generator=generator).argsort(dim=-1)[:, :K]
    return (
        x,
        weights,
        experts.masked_fill(torch.rand(N, K, generator=generator) < dropped, E),
        up,
        out,
    )


def outcome(mix, case):
    """The output, and the gradients of x, weights, up and out."""
    y = mix(*case)
    slope = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y, *torch.autograd.grad((y * slope).sum(), [t for t in case if t.requires_grad])]


def same(mix, case, tolerance=1e-12):
    for ours, believed in zip(outcome(mix, case), outcome(experts_loop, case), strict=True):
        assert ours.shape == believed.shape and ours.dtype == believed.dtype
        assert (ours - believed).abs().max() <= tolerance * max(1, believed.abs().max())


# ---- three routes to one result ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 6), st.integers(1, 9)),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 3, 512]),
    st.integers(0, 99),
)
def test_sorted_equals_the_loop(shape, top_k, dropped, piece, seed):
    N, C, E, F = shape
    case = random_case(N, C, E, min(top_k, E), F, dropped, seed)
    with patch.object(moe, "PIECE", piece):
        same(experts_sorted, case)


@pytest.mark.parametrize(
    "experts", [[[2]] * 20, [[0, 3]] * 20, [[4, 4]] * 20, [[4, 1], [1, 4]] * 10]
)
def test_sorted_equals_the_loop_where_experts_have_all_or_no_tokens(experts, monkeypatch):
    x, weights, _, up, out = random_case(20, 5, 4, len(experts[0]), 3)
    for piece in (512, 20, 7, 19):  # the last: one row is left over
        monkeypatch.setattr(moe, "PIECE", piece)
        same(experts_sorted, (x, weights, torch.tensor(experts), up, out))


def test_in_fp32_sorted_is_the_loop_bit_for_bit():
    for N, C, E, K, F in (
        (1, 8, 4, 2, 16),
        (60, 16, 4, 2, 64),
        (333, 24, 7, 3, 50),
        (400, 16, 1, 1, 32),
    ):
        for dropped in (0, 0.3):
            case = random_case(N, C, E, K, F, dropped, dtype=torch.float32)
            assert torch.equal(experts_sorted(*case), experts_loop(*case))
            same(experts_sorted, case, 1e-5)


@pytest.mark.parametrize("dropped", [0, 0.4, 1.0])
@pytest.mark.parametrize(("N", "E", "K"), [(1, 4, 2), (50, 4, 2), (9, 12, 1), (30, 3, 3)])
def test_grouped_equals_the_loop(N, E, K, dropped):
    case = random_case(
        N, 16, E, K, 32, dropped, dtype=torch.float32
    )  # 9 tokens leave some of 12 experts without
    same(experts_grouped, case, 1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gradients_by_hand_are_right(top_k, monkeypatch):
    monkeypatch.setattr(moe, "PIECE", 2)
    x, weights, experts, up, out = random_case(7, 3, 4, top_k, 5, dropped=0.2)
    assert torch.autograd.gradcheck(
        lambda x, w, u, o: experts_sorted(x, w, experts, u, o), (x, weights, up, out)
    )
    (ours,) = torch.autograd.grad(
        experts_sorted(x, weights, experts, up, out).sum(), x, create_graph=True
    )
    assert not ours.requires_grad  # a second derivative is refused, not wrong


class Products(TorchDispatchMode):
    """Remembers in which dtype each matrix product is taken."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mix", [experts_sorted, experts_grouped])
def test_under_autocast_the_experts_multiply_in_bf16(mix):
    case = random_case(100, 16, 4, 2, 32, dropped=0.1, dtype=torch.float32)
    exact = outcome(experts_loop, case)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        rounded = outcome(mix, case)
    assert (
        set(products.dtypes) == {torch.bfloat16} or mix is experts_grouped
    )  # which is one call, not an mm
    for ours, believed in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-4 < (ours - believed).norm() / believed.norm() < 0.02


def test_under_autocast_the_router_stays_in_fp32():
    torch.manual_seed(0)
    layer, x = MoE(16, 8, 2, 32), torch.randn(4, 100, 16)
    plain, told = layer(x, inspect=True)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        rounded, also_told = layer(x, inspect=True)
    assert products.dtypes[0] == torch.float32 and set(products.dtypes[1:]) == {torch.bfloat16}
    for name in ("experts", "importance", "router_margin", "balance_loss", "z_loss"):
        assert torch.equal(told[name], also_told[name])
    assert 1e-4 < (plain - rounded).norm() / plain.norm() < 0.02


# ---- the router --------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_likeliest_are_chosen_and_the_bias_moves_the_choice_alone(
    N, E, top_k, normalise, biased, seed
):
    K, generator = min(top_k, E), torch.Generator().manual_seed(seed)
    x, gate = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (N, E))
    bias = torch.randn(E, generator=generator, dtype=torch.float64) if biased else None
    weights, experts, probs = route(x, gate, K, bias, normalise)
    margin = choose(router_logits(x, gate), K, bias, normalise)[3]
    for n in range(N):
        p = [math.exp(logit) for logit in (gate @ x[n]).tolist()]
        p = [e / sum(p) for e in p]
        score = p if bias is None else [a + b for a, b in zip(p, bias.tolist(), strict=True)]
        ranking = sorted(range(E), key=lambda e: -score[e])
        assert experts[n].tolist() == ranking[:K]
        total = sum(p[e] for e in ranking[:K]) if normalise else 1
        assert probs[n].tolist() == pytest.approx(p)
        assert weights[n].tolist() == pytest.approx([p[e] / total for e in ranking[:K]])
        assert margin[n].item() == pytest.approx(
            score[ranking[K - 1]] - score[ranking[K]] if K < E else 1
        )
    if normalise:
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
    else:
        assert torch.equal(weights, probs.gather(-1, experts))


def test_routing_is_computed_in_fp32_at_least():
    x, gate = torch.randn(300, 16), torch.randn(8, 16)
    exact = route(x.double(), gate.double(), 2)
    assert exact[2].dtype == torch.float64 and (exact[2] - route(x, gate, 2)[2]).abs().max() > 1e-10
    rounded = x.bfloat16(), gate.bfloat16()
    for ours, wide in zip(route(*rounded, 2), route(*(t.float() for t in rounded), 2), strict=True):
        assert torch.equal(ours, wide)


@pytest.mark.parametrize("top_k", [0, -1, 5])
def test_a_choice_of_none_or_of_too_many_is_refused(top_k):
    with pytest.raises(ValueError, match=f"{top_k} must lie between 1"):
        route(torch.randn(3, 2), torch.randn(4, 2), top_k)
    with pytest.raises(ValueError, match="top_k"):
        MoE(2, 4, top_k, 8)


# ---- capacity ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 6),
    priorities,
)
def test_capacity_serves_as_a_queue_does(data, N, K, E, capacity, priority):
    """Number E stands for nobody: such an assignment is not served and takes no place."""
    experts = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(0, E), min_size=K, max_size=K), min_size=N, max_size=N)
        )
    )
    taken, expected = [0] * E, torch.zeros(N, K, dtype=torch.bool)
    places = [(n, k) for n in range(N) for k in range(K)]
    for n, k in places if priority == "token" else sorted(places, key=lambda place: place[::-1]):
        e = experts[n, k]
        if e < E and taken[e] < capacity:
            taken[e] += 1
            expected[n, k] = True
    served = within_capacity(experts, E, capacity, priority)
    assert torch.equal(served, expected)
    assert all(
        (experts[served] == e).sum() == min(capacity, (experts == e).sum()) for e in range(E)
    )


# ---- an even load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lean", [0, 1, 30]
)  # how far the probabilities lean to one expert: 30 is a collapse
def test_balance_loss_equals_the_double_sum(lean):
    torch.manual_seed(0)
    gate = torch.randn(5, 6, dtype=torch.float64)
    _, experts, probs = route(torch.randn(40, 6, dtype=torch.float64) + lean * gate[3], gate, 2)
    expected = 0
    for e in range(5):
        share = sum((experts[n, k] == e).item() for n in range(40) for k in range(2)) / 80
        expected += 5 * share * sum(probs[n, e].item() for n in range(40)) / 40
    assert load_balancing_loss(probs, experts).item() == pytest.approx(expected, rel=1e-12)


def test_balance_loss_is_one_where_even_and_e_where_collapsed_and_can_fall_below_one():
    even, experts = torch.full((12, 4), 0.25), torch.arange(12)[:, None] % 4
    assert load_balancing_loss(even, experts) == 1
    assert load_balancing_loss(torch.eye(4)[[2] * 12], torch.full((12, 1), 2)) == 4
    logits = torch.tensor(
        [[0.51, 0.49]] * 3 + [[0.01, 0.99]]
    ).log()  # most choose 0 by a hair, one is sure of 1
    _, experts, probs, _ = choose(logits, 1)
    assert experts.flatten().tolist() == [0, 0, 0, 1]
    assert load_balancing_loss(probs, experts).item() == pytest.approx(
        2 * (0.75 * 0.385 + 0.25 * 0.615)
    )


def test_balance_loss_lowers_the_probabilities_of_loaded_experts():
    probs = torch.rand(10, 3, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[0, 1]] * 8 + [[0, 2]] * 2)
    (slope,) = torch.autograd.grad(load_balancing_loss(probs, experts), probs)
    expected = 3 * torch.tensor([10, 8, 2]).double() / 20 / 10
    assert (slope - expected).abs().max() < 1e-15


def test_z_loss_is_its_formula():
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    expected = sum(math.log(sum(math.exp(l) for l in row)) ** 2 for row in logits.tolist()) / 20
    assert router_z_loss(logits).item() == pytest.approx(expected, rel=1e-12)
    assert router_z_loss(torch.full((3, 4), 1e4)).isfinite()
    assert torch.autograd.gradcheck(router_z_loss, logits)


def test_the_entropy_loss_asks_for_sure_tokens_that_differ():
    def loss(probs, least=2.0):
        probs = torch.tensor(probs, dtype=torch.float64)
        return entropy_loss(
            torch.special.entr(probs).sum(dim=-1).mean(), probs.mean(dim=0), least
        ).item()

    assert loss([[1.0, 0, 0], [0, 1, 0]]) == pytest.approx(
        0, abs=1e-12
    )  # each sure, both experts used
    assert loss([[1.0, 0, 0], [0, 0.5, 0.5]]) == pytest.approx(math.log(2) / 2)  # one unsure
    assert loss([[1.0, 0, 0], [1, 0, 0]]) == pytest.approx(
        math.log(2)
    )  # all on one expert, where two are asked for
    assert loss([[1.0, 0, 0], [1, 0, 0]], least=1) == 0
    assert loss([[0.5, 0.5, 0]] * 2) == pytest.approx(
        math.log(2)
    )  # two experts, but no token is sure
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def of(logits):
        probs = logits.softmax(dim=-1)
        return entropy_loss(torch.special.entr(probs).sum(dim=-1).mean(), probs.mean(dim=0), 3.0)

    assert torch.autograd.gradcheck(of, logits)


# ---- experts from an MLP, and settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_an_upcycled_mlp_gives_what_it_gave_whatever_the_gate(top_k, dtype, tolerance):
    torch.manual_seed(0)
    mlp, layer, x = (
        MLP(12, 20).to(dtype),
        MoE(12, 5, top_k, 20).to(dtype),
        torch.randn(3, 11, 12, dtype=dtype),
    )
    many = upcycle(
        {f"0.mlp.{name}": weight for name, weight in mlp.state_dict().items()} | {"mlp": x}, 5
    )
    layer.up.data, layer.out.data = many.pop("0.mlp.up"), many.pop("0.mlp.out")
    assert (
        many.keys() == {"mlp"} and layer.up.shape == (5, 20, 12) and layer.out.shape == (5, 12, 20)
    )
    for scale in (0, 1, 50):
        layer.gate.weight.data = scale * torch.randn(5, 12, dtype=dtype)
        assert (layer(x)[0] - mlp(x)[0]).abs().max() <= tolerance


def test_a_whole_model_is_upcycled():
    dense = GPTConfig(n_layer=2, n_head=2, n_embd=16, context_length=8, vocab_size=50)
    torch.manual_seed(0)
    before = GPT(dense).double()
    after = GPT(GPTConfig(**{**vars(dense), "moe": MoEConfig(4, 2)})).double()
    for p in before.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = before.state_dict()
    many = upcycle(weights, 4)
    missing, unexpected = after.load_state_dict(many, strict=False)
    assert not unexpected and {name.split(".", 2)[2] for name in missing} == {
        "mlp.gate.weight",
        "mlp.bias",
    }
    assert all(many[name] is weight for name, weight in weights.items() if ".mlp." not in name)
    tokens = torch.randint(0, 50, (2, 8))
    assert (after(tokens)[0] - before(tokens)[0]).abs().max() < 1e-11


def test_noise_parts_the_experts_by_the_size_asked_for():
    weight = 3 * torch.randn(64, 32)
    weights = {f"blocks.0.mlp.{name}.weight": weight.clone() for name in ("up", "out")}
    made = upcycle(weights, 6, noise=0.1, seed=7)
    for stack in made.values():
        away = (stack - weight).square().mean(dim=(1, 2)).sqrt() / weight.square().mean().sqrt()
        assert (away - 0.1).abs().max() < 0.01
        assert all(
            (stack[a] - stack[b]).std() > 0.1 * weight.std() for a in range(6) for b in range(a)
        )
    up, out = made.values()
    assert not torch.equal(up, out)  # each matrix has noise of its own
    for seed, equal in ((7, True), (8, False)):
        again = upcycle(weights, 6, noise=0.1, seed=seed)
        assert all(torch.equal(made[name], again[name]) == equal for name in made)
    assert all(
        torch.equal(weight, kept) for kept in weights.values()
    )  # what was given is as it was
    assert all((stack == weight).all() for stack in upcycle(weights, 6).values())


@pytest.mark.parametrize(
    ("settings", "mend"),
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
def test_settings_that_cannot_be_are_refused_with_the_mend(settings, mend):
    with pytest.raises(ValueError, match=mend):
        MoEConfig(**settings)


def test_settings_at_their_limits_are_taken():
    MoEConfig(n_expert=1, top_k=2)  # a plain MLP: K does not count
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
        with pytest.raises(ValueError, match=r"capacity_factor.*cannot be"):
            MoE(4, 2, 1, 8, capacity_factor)
