"""Muon: orthogonal updates, the same as PyTorch's up to its bf16."""

import pytest
import torch

from nanods.training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (40, 10)])
def test_the_update_is_nearly_orthogonal(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(orthogonalise(G))
    assert singular.min() > 0.3 and singular.max() < 1.3
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalise(G).flatten(), (U @ V).flatten(), dim=0) > 0.9


@pytest.mark.parametrize("shape", [(16, 16), (12, 48), (48, 12)])
def test_it_agrees_with_torchs_own_within_bf16(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a, b = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
