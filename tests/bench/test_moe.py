"""The bench of experts: its naive rival computes what it should, drops what a capacity drops, and one expert is favoured."""

import math

import pytest
import torch

from nanods.bench.moe import (
    AIMS,
    BASELINES,
    E,
    K,
    Ours,
    built,
    experts_one_hot,
    forward_backward,
    inputs,
    judged,
    lean,
)
from nanods.moe import experts_loop, route, within_capacity


def drawn(N, n_expert=5, width=8, hidden=12):
    x = torch.randn(N, width, dtype=torch.float64, requires_grad=True)
    up = torch.randn(n_expert, hidden, width, dtype=torch.float64, requires_grad=True)
    out = torch.randn(n_expert, width, hidden, dtype=torch.float64, requires_grad=True)
    weights, experts, _ = route(x.detach(), torch.randn(n_expert, width, dtype=torch.float64), K)
    return x, weights.requires_grad_(), experts, up, out


@pytest.mark.parametrize("group", [None, 12], ids=["at once", "in groups"])
def test_one_hot_masks_do_what_the_loop_does_where_there_is_room(group):
    torch.manual_seed(0)
    x, weights, experts, up, out = drawn(48)
    one_hot = experts_one_hot(
        x, weights, experts, up, out, factor=5 / K, group=group
    )  # room for all tokens at each expert
    loop = experts_loop(x, weights, experts, up, out)
    assert one_hot.dtype == loop.dtype and (one_hot - loop).abs().max() < 1e-10
    back = torch.randn_like(loop)
    for theirs, ours in zip(
        *(torch.autograd.grad(y, [x, weights, up, out], back) for y in (one_hot, loop)), strict=True
    ):
        assert (theirs - ours).abs().max() < 1e-9


def test_one_hot_masks_drop_what_a_capacity_drops_with_first_choices_first():
    torch.manual_seed(1)
    x, weights, experts, up, out = drawn(48)
    served = within_capacity(experts, 5, math.ceil(0.7 * 48 * K / 5), "slot")
    assert 0 < served.sum() < served.numel()
    loop = experts_loop(x, weights, experts.masked_fill(~served, 5), up, out)
    assert (experts_one_hot(x, weights, experts, up, out, factor=0.7) - loop).abs().max() < 1e-10


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_one_expert_is_chosen_by_the_share_of_the_tokens_that_is_asked_for(share):
    torch.manual_seed(2)
    layer, (x, _) = built(lambda: Ours(8)), inputs(512)
    load = lean(layer.moe, x, share)
    experts = layer.moe(x, inspect=True)[1]["experts"]  # (1, N, K)
    assert load[0] == share * 512 == (experts == 0).any(dim=-1).sum()
    assert max(load[1:]) < 256 and sum(load) == K * 512 and len(load) == E


@pytest.mark.parametrize("name", BASELINES)
def test_every_rival_makes_an_output_and_all_gradients(name):
    torch.manual_seed(3)
    layer, (x, gradient) = built(lambda: BASELINES[name](8)), inputs(64)
    assert layer.training and layer(x)[0].shape == x.shape
    forward_backward(layer, x, gradient)  # would raise for a weight without a gradient


def test_dense_costs_as_many_products_as_two_experts():
    dense, moe = built(BASELINES["dense"]), built(Ours).moe
    assert sum(p.numel() for p in dense.parameters()) == K * (
        moe.up[0].numel() + moe.out[0].numel()
    )


def test_aims_are_judged_by_what_is_there():
    table = {
        "time": {"over_dense": 1.0, "times_faster_than_one_hot": 9.0},
        "growth": {"exponents": {"moe": 1.08}},
    }
    found = judged(table)
    assert {name: row["met"] for name, row in found.items()} == {
        "time.over_dense": True,
        "time.times_faster_than_one_hot": False,
        "growth.exponents.moe": False,
    }
    assert found.keys() < AIMS.keys() and judged({}) == {}
