"""Muon: orthogonal updates, equal to PyTorch's up to bf16 rounding."""

import pytest
import torch

from nanods.training import muon
from nanods.training.muon import (
    Muon,
    equalise_neurons,
    fast_bf16,
    iterate_matrix,
    iterate_product,
    orthogonalise,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (40, 10)])
def test_updates_are_nearly_orthogonal(shape, dtype):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G[1] *= 1e3  # the matrices of a stack differ in scale
    update = orthogonalise(G.to(dtype))
    assert update.dtype == dtype
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.3 and singular.max() < 1.3
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(update.double().flatten(1), (U @ V).flatten(1)).min()
        > 0.9
    )


def test_a_stack_gives_what_each_matrix_gives_alone():
    G = torch.randn(5, 12, 30, dtype=torch.float64)
    alone = torch.stack([orthogonalise(matrix) for matrix in G])
    assert (orthogonalise(G) - alone).abs().max() < 1e-12
    nested = G[:4].view(2, 2, 12, 30)
    assert torch.equal(orthogonalise(nested).view(4, 12, 30), orthogonalise(G[:4]))
    assert (orthogonalise(torch.zeros(2, 4, 4)) == 0).all()  # no gradient, no update


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("decay", [0, 1, 4])  # singular values 1 / k^decay
def test_iterating_the_product_equals_iterating_the_matrix(steps, decay):
    generator = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(
        torch.randn(3, 16, 40, generator=generator, dtype=torch.float64), full_matrices=False
    )
    X = U * torch.arange(1, 17) ** -float(decay) @ V
    X = X / X.norm(dim=(-2, -1), keepdim=True)
    exact = iterate_matrix(X, steps)
    assert (iterate_product(X, steps) - exact).abs().max() < 1e-11
    assert (iterate_product(X.float(), steps) - exact).norm() < 1e-3 * exact.norm()


def test_bf16_never_iterates_the_product(monkeypatch):
    G = torch.randn(2, 4, 12, dtype=torch.bfloat16)
    monkeypatch.setattr(muon, "iterate_product", None)
    assert orthogonalise(G).shape == G.shape
    with pytest.raises(TypeError):
        orthogonalise(G.double())  # it is wide, so it would


def test_fp64_is_not_rounded_and_bf16_is_used_where_it_is_fast(monkeypatch):
    G = torch.randn(2, 8, 8, dtype=torch.float64)
    exact = orthogonalise(G)
    assert (orthogonalise(G.float()).double() - exact).abs().max() < 0.05
    assert ((exact - exact.bfloat16()).abs() > 0).any()
    for has, there in (
        ({}, False),
        ({"avx512_bf16": False}, False),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert fast_bf16(torch.device("cpu")) == there
        assert (orthogonalise(G.float()) == orthogonalise(G.float()).bfloat16()).all() == there
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not fast_bf16(torch.device("cpu"))


@pytest.mark.parametrize("stacked", [32, 2])
def test_muon_agrees_with_pytorchs_within_bf16(monkeypatch, stacked):
    monkeypatch.setattr("nanods.training.muon.STACKED", stacked)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(16, 16), (12, 48), (16, 16), (48, 12), (16, 16)]]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in "ab")
    a, b = (
        Muon(ours, 0.1, 0.9, weight_decay=0.3),
        torch.optim.Muon(theirs, 0.1, momentum=0.9, weight_decay=0.3),
    )
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved = (q - before).norm()
        assert moved > 0.1
        assert (p - q).norm() < 0.02 * moved


@pytest.mark.parametrize(("shape", "side"), [((40, 10), -1), ((10, 40), -2), ((8, 8), -1)])
def test_equal_neurons_have_one_length_and_the_matrix_its_norm(shape, side):
    updates = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    updates[1] *= 1e-3
    equal = equalise_neurons(updates)
    lengths = equal.norm(dim=side)
    assert (lengths / lengths.mean(dim=-1, keepdim=True) - 1).abs().max() < 1e-6
    torch.testing.assert_close(equal.norm(dim=(1, 2)), updates.norm(dim=(1, 2)), rtol=1e-6, atol=0)
    directions = torch.nn.functional.normalize(updates, dim=side)
    assert (torch.nn.functional.normalize(equal, dim=side) - directions).abs().max() < 1e-6


def test_neurons_without_a_gradient_get_no_update():
    updates = torch.randn(2, 12, 4)
    updates[0] = 0
    updates[1, 5] = 0
    equal = equalise_neurons(updates)
    assert equal.isfinite().all() and not equal[0].any() and not equal[1, 5].any()


def test_muon_equalises_each_matrix_where_it_is_asked_to():
    torch.manual_seed(0)
    start = [torch.randn(6, 20).double(), torch.randn(3, 20, 6).double()]
    plain, equal = ([torch.nn.Parameter(p.clone()) for p in start] for _ in "ab")
    for params, flags in ((plain, {}), (equal, {"equal_neurons": True})):
        for p, before in zip(params, start, strict=True):
            p.grad = before.sin()
        Muon(params, 0.1, 0.9, **flags).step()
    for before, a, b in zip(start, plain, equal, strict=True):
        assert (b - before - equalise_neurons(a - before)).abs().max() < 1e-12
        assert (b - a).abs().max() > 1e-3


@pytest.mark.parametrize("equal_neurons", [False, True])
@pytest.mark.parametrize("stacked", [32, 3])
def test_a_stacked_parameter_is_updated_as_its_matrices_would_be(
    monkeypatch, stacked, equal_neurons
):
    monkeypatch.setattr("nanods.training.muon.STACKED", stacked)
    torch.manual_seed(0)
    start = [torch.randn(4, R, C, dtype=torch.float64) for R, C in [(12, 30), (30, 12), (12, 30)]]
    stacks = [torch.nn.Parameter(p.clone()) for p in start]
    alone = [[torch.nn.Parameter(matrix.clone()) for matrix in p] for p in start]
    a, b = (
        Muon(params, 0.1, 0.9, weight_decay=0.3, equal_neurons=equal_neurons)
        for params in (stacks, [p for matrices in alone for p in matrices])
    )
    for _ in range(3):
        for stack, matrices in zip(stacks, alone, strict=True):
            stack.grad = torch.randn_like(stack) * torch.tensor([1, 1e-3, 1e3, 0]).view(4, 1, 1)
            for p, grad in zip(matrices, stack.grad, strict=True):
                p.grad = grad.clone()
        a.step(), b.step()
    for stack, matrices, before in zip(stacks, alone, start, strict=True):
        assert (stack - torch.stack(matrices)).abs().max() < 1e-12
        assert (stack - before).flatten(1).norm(dim=1).min() > 0.1


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="matrices, or stacks"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
