"""What --ewc holds: the common mistake beside the Fisher information, and answers alone."""

import torch

from nanods.ewc import fisher_diagonal
from nanods.training.consolidation import batch_gradient_squares
from nanods.training.instruction_task import IGNORED
from tests.test_ewc import model_of, relative_difference, sequences


def trace(fisher):
    return sum(F.sum().item() for F in fisher.values())


def test_batches_of_one_give_the_empirical_fisher_information_and_larger_ones_less():
    model, data = model_of("V1"), sequences(32)
    one = batch_gradient_squares(model, data, None, 1)
    assert relative_difference(one, fisher_diagonal(model, data, labels="data")) < 1e-12
    traces = [trace(batch_gradient_squares(model, data, None, size)) for size in (1, 4, 32)]
    assert traces[1] < 0.6 * traces[0] and traces[2] < 0.3 * traces[0], traces


def test_with_a_mask_positions_count_that_predict_an_answer():
    """As if the loss had been taken there alone."""
    model, data = model_of("V1"), sequences(6)
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, keep in zip(data, mask, strict=True):
        model.zero_grad()
        logits = model(row[None, :-1])[0][0]
        targets = row[1:].masked_fill(~keep, IGNORED)
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad**2 / len(data)
    for got in (
        fisher_diagonal(model, data, labels="data", batch_size=4, mask=mask),
        batch_gradient_squares(model, data, mask, 1),
    ):
        assert relative_difference(expected, got) < 1e-12
    whole = fisher_diagonal(model, data, mask=torch.ones_like(mask))
    assert relative_difference(whole, fisher_diagonal(model, data)) < 1e-12
