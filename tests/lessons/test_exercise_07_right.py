"""The grader of lesson 07 accepts every correct implementation."""

import pytest
import steps_07
import torch
import torch.nn.functional as F
from torch import nn

from nanods import ewc
from nanods.data.instructions import Encoder, Example
from nanods.data.tokenizer import ByteTokenizer
from tests.lessons.wrong_answers import equal_pairs, grade_answer

USER, ASSISTANT, END = steps_07.USER, steps_07.ASSISTANT, steps_07.END


def mask_by_cumsum(tokens):
    answers = (tokens == ASSISTANT).cumsum(0) - (tokens == END).cumsum(0)
    return F.pad(answers, (1, 0))[:-1] > 0


def mask_by_slices(tokens):
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    for start in (tokens == ASSISTANT).nonzero()[:, 0].tolist():
        ends = (tokens[start:] == END).nonzero()[:, 0]
        mask[start + 1 : start + int(ends[0]) + 1 if len(ends) else None] = True
    return mask


def loss_by_index(logits, targets, mask, answer_tokens):
    return F.cross_entropy(logits[mask], targets[mask], reduction="sum") / answer_tokens


def loss_by_ignored(logits, targets, mask, answer_tokens):
    targets = targets.masked_fill(~mask, -100)
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return nats.sum() / answer_tokens


def fisher_by_autograd(weight, x):
    total = torch.zeros_like(weight)
    leaf = weight.clone().requires_grad_()
    for row in x:
        log_p = (leaf @ row).log_softmax(-1)
        for each in log_p:
            (gradient,) = torch.autograd.grad(each, leaf, retain_graph=True)
            total += each.detach().exp() * gradient.square() / len(x)
    return total


def linear_model(weight):
    """Return a model of ewc.py: each example is a sequence of one token, whose input is one row."""

    class Model(nn.Module):
        def __init__(self, x):
            super().__init__()
            self.x, self.linear = x, nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
            self.linear.weight.data.copy_(weight)

        def forward(self, tokens):
            return self.linear(self.x[tokens]), []

    return Model


def fisher_as_nanods(weight, x):
    model = linear_model(weight)(x)
    sequences = torch.stack([torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64)], dim=1)
    return ewc.fisher_diagonal(model, sequences, "all")["linear.weight"]


def labels_as_nanods(weight, x, labels):
    model = linear_model(weight)(x)
    sequences = torch.stack([torch.arange(len(x)), labels], dim=1)
    return ewc.fisher_diagonal(model, sequences, "data", batch_size=4)["linear.weight"]


def labels_by_loops(weight, x, labels):
    total = torch.zeros_like(weight)
    for row, label in zip(x, labels, strict=True):
        leaf = weight.clone().requires_grad_()
        loss = F.cross_entropy((leaf @ row)[None], label[None])
        total += torch.autograd.grad(loss, leaf)[0].square()
    return total / len(x)


def penalty_as_nanods(weight, old, fisher, strength):
    """Compute what Consolidation.penalty does, for a weight that is no Parameter."""
    return strength / 2 * (fisher.detach() * (weight - old.detach()).square()).sum()


def penalty_by_dot(weight, old, fisher, strength):
    distance = (weight - old.detach()).flatten()
    return strength * torch.dot(fisher.detach().flatten(), distance**2) / 2


def consolidate_as_nanods(F_1, a, F_2, b):
    both = ewc.consolidate(
        ewc.Consolidation({"w": a}, {"w": F_1}), ewc.Consolidation({"w": b}, {"w": F_2})
    )
    return both.fisher["w"], both.weights["w"]


def consolidate_by_steps(F_1, a, F_2, b):
    share = torch.nan_to_num(F_1 / (F_1 + F_2))
    return F_1 + F_2, b + share * (a - b)


ANSWERS = [
    ("answer_mask", mask_by_cumsum),
    ("answer_mask", mask_by_slices),
    ("answer_loss", loss_by_index),
    ("answer_loss", loss_by_ignored),
    ("fisher_diagonal", fisher_by_autograd),
    ("fisher_diagonal", fisher_as_nanods),
    ("fisher_from_labels", labels_as_nanods),
    ("fisher_from_labels", labels_by_loops),
    ("ewc_penalty", penalty_as_nanods),
    ("ewc_penalty", penalty_by_dot),
    ("consolidate", consolidate_as_nanods),
    ("consolidate", consolidate_by_steps),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_correct_answers_pass(name, function):
    assert grade_answer(steps_07.STEPS, name, function).message == "OK"


def test_no_two_mistakes_give_the_same_result():
    """Otherwise the grader never reports one of them."""
    tokens = steps_07.dialogue("UhiAyouEUandAmeEUagainAyesE")
    assert not equal_pairs(steps_07.known_masks(tokens))
    assert not equal_pairs(steps_07.known_losses(*steps_07.batch_of_answers()))
    weight, x = steps_07.classifier()
    assert not equal_pairs(steps_07.known_fishers(weight, x))
    assert not equal_pairs(steps_07.known_from_labels(weight, x, steps_07.some_labels()))
    F_1, F_2 = (steps_07.random(4, 3, seed=seed).square() + 0.05 for seed in (1, 2))
    a, b = steps_07.random(4, 3, seed=3), steps_07.random(4, 3, seed=4)
    assert not equal_pairs(steps_07.known_penalties(a, b, F_1, 7.0))
    assert not equal_pairs(steps_07.known_totals(F_1, F_2))
    assert not equal_pairs(steps_07.known_centres(F_1, a, F_2, b))


def test_the_mask_of_step_1_is_that_of_the_data():
    messages = (("user", "hi"), ("assistant", "you"), ("user", "and"), ("assistant", "me"))
    (row,) = Encoder(ByteTokenizer(), 64).rows(Example("dialogue", messages))
    tokens = torch.from_numpy(row.tokens.astype("int64"))
    assert steps_07.reference_mask(tokens).tolist() == row.is_target.tolist()
