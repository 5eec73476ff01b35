"""The grader of lesson 02 asks for results, not for one way to them: token by token passes where the solutions sort."""

from pathlib import Path

import check_02
import grade
import pytest
import torch

from tests.lessons.wrong_answers import grade_answer

right = grade.load_file(Path(check_02.__file__).with_name("02_solutions.py"))


def route_by_hand(x, gate, top_k):
    """A softmax over the chosen scores alone is the same as dividing by the sum of the chosen probabilities."""
    wide = x.double() @ gate.double().T
    best, experts = wide.sort(dim=-1, descending=True)
    weights = best[:, :top_k].softmax(-1)
    return [weights.to(torch.promote_types(x.dtype, torch.float32)), experts[:, :top_k].int()]


def mix_by_token(x, weights, experts, up, out):
    rows = []
    for n in range(len(x)):
        made = [
            w * (out[e] @ (up[e] @ x[n]).clamp(min=0).square())
            for w, e in zip(weights[n], experts[n], strict=True)
        ]
        rows.append(torch.stack(made).sum(0))
    return torch.stack(rows)


def mix_by_mask(x, weights, experts, up, out):
    """Every expert for every token, most of it times 0: wasteful, but step 2 asks for no less."""
    full = torch.zeros(len(x), len(up), dtype=x.dtype).scatter(1, experts, weights)
    return torch.einsum("ne,nef,ecf->nc", full, torch.einsum("nc,efc->nef", x, up).relu() ** 2, out)


def sorted_and_unsorted(x, weights, experts, up, out):
    """The way back by the inverse permutation; an expert's tokens in reverse."""
    K, flat = experts.size(1), experts.flatten()
    order = flat.flip(0).argsort(stable=True)
    order = len(flat) - 1 - order
    made, start = torch.empty(len(flat), x.size(1), dtype=x.dtype), 0
    for e in range(len(up)):
        end = start + int((flat == e).sum())
        made[start:end] = right.mlp(x[order[start:end] // K], up[e], out[e])
        start = end
    return (made[order.argsort()].view(len(x), K, -1) * weights[..., None]).sum(1)


def own_matrices(x, weights, experts, up, out):
    """Each assignment takes a copy of its expert: the same products, and far more memory."""
    hidden = torch.einsum("nc,nkfc->nkf", x, up[experts]).relu() ** 2
    return torch.einsum("nk,nkf,nkcf->nc", weights, hidden, out[experts])


def loss_by_expert(probs, experts):
    N, E = probs.shape
    loss = 0
    for e in range(E):
        loss = (
            loss + E * (experts == e).sum().item() / (N * experts.shape[1]) * probs[:, e].sum() / N
        )
    return loss


def served_one_by_one(experts, n_expert, capacity):
    left, served = [capacity] * n_expert, torch.zeros(experts.shape, dtype=torch.bool)
    for n, row in enumerate(experts.tolist()):
        for k, e in enumerate(row):
            served[n, k] = left[e] > 0
            left[e] -= 1
    return served


def bias_by_cases(bias, load, rate):
    mean = load.sum().item() / len(load)
    return torch.stack(
        [
            b + (rate if n < mean else -rate if n > mean else 0)
            for b, n in zip(bias, load.tolist(), strict=True)
        ]
    )


def copies(up, out, n_expert):
    return torch.stack([up] * n_expert), out.expand(n_expert, *out.shape).clone()


ANSWERS = [
    ("route", route_by_hand),
    ("mix", mix_by_token),
    ("mix", mix_by_mask),
    ("mix", sorted_and_unsorted),
    ("experts_sorted", mix_by_token),
    ("experts_sorted", sorted_and_unsorted),
    ("experts_sorted", own_matrices),
    ("load_balancing_loss", loss_by_expert),
    ("within_capacity", served_one_by_one),
    ("update_bias", bias_by_cases),
    ("upcycle", copies),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_right_answers_pass(name, function):
    assert grade_answer(check_02.STEPS, name, function).message == "OK"
