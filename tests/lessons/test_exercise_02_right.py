"""The grader of lesson 02 accepts every correct answer, whatever method it uses."""

from pathlib import Path

import grade
import pytest
import steps_02
import torch
from torch import nn

from tests.lessons.wrong_answers import grade_answer

solutions = grade.load_file(Path(steps_02.__file__).with_name("02_solutions.py"))


def route_by_sort(x, gate, top_k):
    """Take the softmax over the selected scores: it equals dividing by their probabilities' sum."""
    logits = x.double() @ gate.double().T
    best, experts = logits.sort(dim=-1, descending=True)
    weights = best[:, :top_k].softmax(-1)
    return [weights.to(torch.promote_types(x.dtype, torch.float32)), experts[:, :top_k].int()]


def mixture_by_token(x, weights, experts, up, out):
    rows = []
    for n in range(len(x)):
        outputs = [
            w * (out[e] @ (up[e] @ x[n]).clamp(min=0).square())
            for w, e in zip(weights[n], experts[n], strict=True)
        ]
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows)


def mixture_by_mask(x, weights, experts, up, out):
    """Run every expert for every token. Most weights are 0: wasteful, but correct for step 2."""
    all_weights = torch.zeros(len(x), len(up), dtype=x.dtype).scatter(1, experts, weights)  # (N, E)
    hidden = torch.einsum("nc,efc->nef", x, up).relu() ** 2
    return torch.einsum("ne,nef,ecf->nc", all_weights, hidden, out)


def sort_and_unsort(x, weights, experts, up, out):
    """Use the inverse permutation, and list each expert's tokens in reverse order."""
    K, flat = experts.size(1), experts.flatten()
    order = flat.flip(0).argsort(stable=True)
    order = len(flat) - 1 - order
    outputs = torch.empty(len(flat), x.size(1), dtype=x.dtype)
    start = 0
    for e in range(len(up)):
        end = start + int((flat == e).sum())
        outputs[start:end] = solutions.mlp(x[order[start:end] // K], up[e], out[e])
        start = end
    return (outputs[order.argsort()].view(len(x), K, -1) * weights[..., None]).sum(1)


def matrices_per_assignment(x, weights, experts, up, out):
    """Copy the expert's matrices for each assignment: the same products, but far more memory."""
    hidden = torch.einsum("nc,nkfc->nkf", x, up[experts]).relu() ** 2
    return torch.einsum("nk,nkf,nkcf->nc", weights, hidden, out[experts])


def loss_by_expert(probs, experts):
    N, E = probs.shape
    loss = 0
    for e in range(E):
        fraction = (experts == e).sum().item() / (N * experts.shape[1])
        loss = loss + E * fraction * probs[:, e].sum() / N
    return loss


def capacity_by_loop(experts, n_expert, capacity):
    free = [capacity] * n_expert
    kept = torch.zeros(experts.shape, dtype=torch.bool)
    for n, row in enumerate(experts.tolist()):
        for k, e in enumerate(row):
            kept[n, k] = free[e] > 0
            free[e] -= 1
    return kept


def bias_by_cases(bias, load, rate):
    mean = load.sum().item() / len(load)
    new_bias = []
    for b, n in zip(bias, load.tolist(), strict=True):
        if n < mean:
            b = b + rate
        elif n > mean:
            b = b - rate
        new_bias.append(b)
    return torch.stack(new_bias)


def bias_in_integers(bias, load, rate):
    return bias + rate * (load.sum() - len(load) * load).sign()


def upcycle_as_parameters(up, out, n_expert):
    copies = torch.stack([up] * n_expert), out.repeat(n_expert, 1, 1)
    return [nn.Parameter(copy) for copy in copies]


def upcycle_by_stack(up, out, n_expert):
    return torch.stack([up] * n_expert), out.expand(n_expert, *out.shape).clone()


ANSWERS = [
    ("route", route_by_sort),
    ("experts_loop", mixture_by_token),
    ("experts_loop", mixture_by_mask),
    ("experts_loop", sort_and_unsort),
    ("experts_sorted", mixture_by_token),
    ("experts_sorted", sort_and_unsort),
    ("experts_sorted", matrices_per_assignment),
    ("load_balancing_loss", loss_by_expert),
    ("within_capacity", capacity_by_loop),
    ("update_bias", bias_by_cases),
    ("update_bias", bias_in_integers),
    ("upcycle", upcycle_by_stack),
    ("upcycle", upcycle_as_parameters),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_correct_answers_by_other_methods_pass(name, function):
    assert grade_answer(steps_02.STEPS, name, function).message == "OK"
