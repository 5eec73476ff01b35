"""The bench of the MoE layer: its one-hot baseline is right, and its skewed router is skewed."""

import math

import pytest
import torch

from nanods.bench.moe import (
    AIMS,
    BASELINES,
    E,
    K,
    MoEWithLosses,
    build_layer,
    check_aims,
    experts_one_hot,
    forward_backward,
    random_inputs,
    share_time,
    skew_router,
)
from nanods.moe import experts_loop, route, within_capacity


def random_case(N, n_expert=5, width=8, hidden=12):
    x = torch.randn(N, width, dtype=torch.float64, requires_grad=True)
    up = torch.randn(n_expert, hidden, width, dtype=torch.float64, requires_grad=True)
    out = torch.randn(n_expert, width, hidden, dtype=torch.float64, requires_grad=True)
    weights, experts, _ = route(x.detach(), torch.randn(n_expert, width, dtype=torch.float64), K)
    return x, weights.requires_grad_(), experts, up, out


@pytest.mark.parametrize("group", [None, 12], ids=["at once", "in groups"])
def test_one_hot_masks_equal_the_loop_if_the_capacity_suffices(group):
    torch.manual_seed(0)
    x, weights, experts, up, out = random_case(48)
    # Each expert has capacity for all tokens.
    one_hot = experts_one_hot(x, weights, experts, up, out, capacity_factor=5 / K, group=group)
    loop = experts_loop(x, weights, experts, up, out)
    assert one_hot.dtype == loop.dtype and (one_hot - loop).abs().max() < 1e-10
    gradient, inputs = torch.randn_like(loop), [x, weights, up, out]
    for result, reference in zip(
        torch.autograd.grad(one_hot, inputs, gradient),
        torch.autograd.grad(loop, inputs, gradient),
        strict=True,
    ):
        assert (result - reference).abs().max() < 1e-9


def test_one_hot_masks_drop_what_within_capacity_drops_by_slot():
    torch.manual_seed(1)
    x, weights, experts, up, out = random_case(48)
    kept = within_capacity(experts, 5, math.ceil(0.7 * 48 * K / 5), "slot")
    assert 0 < kept.sum() < kept.numel()
    loop = experts_loop(x, weights, experts.masked_fill(~kept, 5), up, out)
    one_hot = experts_one_hot(x, weights, experts, up, out, capacity_factor=0.7)
    assert (one_hot - loop).abs().max() < 1e-10


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_skew_router_gives_expert_0_the_requested_fraction_of_tokens(fraction):
    torch.manual_seed(2)
    layer, (x, _) = build_layer(lambda: MoEWithLosses(8)), random_inputs(512)
    load = skew_router(layer.moe, x, fraction)
    experts = layer.moe(x, inspect=True)[1]["experts"]  # (1, N, K)
    assert load[0] == fraction * 512 == (experts == 0).any(dim=-1).sum()
    assert max(load[1:]) < 256 and sum(load) == K * 512 and len(load) == E


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_returns_an_output_and_all_gradients(name):
    torch.manual_seed(3)
    layer, (x, gradient) = build_layer(lambda: BASELINES[name](8)), random_inputs(64)
    assert layer.training and layer(x)[0].shape == x.shape
    forward_backward(layer, x, gradient)  # raises if a weight has no gradient


def test_dense_costs_as_many_products_as_two_experts():
    dense, moe = build_layer(BASELINES["dense"]), build_layer(MoEWithLosses).moe
    expert = moe.up[0].numel() + moe.out[0].numel()
    assert sum(p.numel() for p in dense.parameters()) == K * expert


def test_aims_without_a_measurement_are_left_out():
    table = {
        "time": {"over_dense": 1.0, "times_faster_than_one_hot": 9.0},
        "growth": {"exponents": {"moe": 1.08}},
    }
    checked = check_aims(table)
    assert {name: row["met"] for name, row in checked.items()} == {
        "time.over_dense": True,
        "time.times_faster_than_one_hot": False,
        "growth.exponents.moe": False,
    }
    assert checked.keys() < AIMS.keys() and check_aims({}) == {}


def test_both_tables_show_one_measurement_at_8192_tokens():
    seconds = {"dense": 0.5, "moe": 0.6, "one_hot": 8.0, "one_hot_in_groups": 1.0, "loop": 0.7}
    # 0.9: what a results file from before shows, where each part measured it again.
    rows = {"dense": {"16384": 1.0, "1024": 0.0625, "8192": 0.9}, "one_hot": {"2048": 0.5}}
    growth = share_time({"seconds": seconds}, {"by_tokens": rows})
    assert growth["by_tokens"]["dense"] == {"1024": 0.0625, "8192": 0.5, "16384": 1.0}
    assert list(growth["by_tokens"]["dense"]) == ["1024", "8192", "16384"]
    assert growth["exponents"] == pytest.approx({"dense": 1.0, "one_hot": 2.0})
