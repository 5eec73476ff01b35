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


def route_by_scatter(x, gate, top_k):
    """Set the scores of all experts that are not selected to minus infinity."""
    logits = torch.einsum("nc,ec->ne", x, gate).to(torch.promote_types(x.dtype, torch.float32))
    if x.dtype == torch.bfloat16:
        logits = torch.einsum("nc,ec->ne", x.float(), gate.float())
    experts = logits.topk(top_k).indices
    masked = torch.full_like(logits, -torch.inf).scatter(1, experts, logits.gather(1, experts))
    return masked.softmax(-1).gather(1, experts), experts


def route_by_repeated_argmax(x, gate, top_k):
    """Take the best expert top_k times, and remove it each time."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    probs = torch.softmax(x.to(dtype) @ gate.to(dtype).mT, dim=1)
    left, chosen = probs.detach().clone(), []
    for _ in range(top_k):
        chosen.append(left.argmax(dim=1, keepdim=True))
        left = left.scatter(1, chosen[-1], -1.0)
    experts = torch.cat(chosen, dim=1)
    weights = torch.take_along_dim(probs, experts, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), experts


def route_token_by_token(x, gate, top_k):
    rows = [solutions.route(token[None], gate, top_k) for token in x]
    return torch.cat([w for w, _ in rows]), torch.cat([e for _, e in rows])


def route_by_logsumexp(x, gate, top_k):
    """Divide probabilities in the logarithm, and return views of the sorted scores."""
    best, experts = (x.double() @ gate.double().T).topk(min(top_k + 1, len(gate)))
    best, experts = best[:, :top_k], experts[:, :top_k]
    weights = (best - best.logsumexp(-1, keepdim=True)).exp()
    return weights.to(torch.promote_types(x.dtype, torch.float32)), experts


def mixture_by_slot(x, weights, experts, up, out):
    """Run the experts for one slot at a time, and write each row where it belongs."""
    y = torch.zeros_like(x)
    for k in range(experts.size(1)):
        part = torch.zeros_like(x)
        for e in experts[:, k].unique().tolist():
            mask = experts[:, k] == e
            part[mask] = solutions.mlp(x[mask], up[e], out[e])
        y = y + part * weights[:, k : k + 1]
    return y


def mixture_by_products_with_one_hot(x, weights, experts, up, out):
    """Gather and scatter by products with one-hot matrices, as GShard does."""
    one_hot = torch.nn.functional.one_hot(experts, len(up)).to(x)  # (N, K, E)
    y = 0
    for e in range(len(up)):
        rows = one_hot[:, :, e].sum(1).nonzero()[:, 0]
        pick = torch.eye(len(x), dtype=x.dtype)[rows]  # (rows of e, N)
        w = (weights * one_hot[:, :, e]).sum(1)[rows]
        y = y + pick.T @ (w[:, None] * solutions.mlp(pick @ x, up[e], out[e]))
    return y


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


def sorted_by_lists(x, weights, experts, up, out):
    """Collect the assignments of each expert in Python lists."""
    K = experts.size(1)
    mine = [[] for _ in range(len(up))]
    for a, e in enumerate(experts.flatten().tolist()):
        mine[e].append(a)
    y = torch.zeros_like(x)
    for e, assignments in enumerate(mine):
        a = torch.tensor(assignments, dtype=torch.long)
        rows = solutions.mlp(x[a // K], up[e], out[e]) * weights.reshape(-1)[a, None]
        y = torch.index_add(y, 0, a // K, rows)
    return y


def sorted_with_scatter_add(x, weights, experts, up, out):
    """Sort values and indices together, and slice by the cumulated counts."""
    K = weights.shape[1]
    values, order = experts.reshape(-1).sort()
    ends = torch.searchsorted(values, torch.arange(len(up)), right=True).tolist()
    token, y, start = order.div(K, rounding_mode="floor"), torch.zeros_like(x), 0
    for e, end in enumerate(ends):
        t = token[start:end]
        rows = weights.flatten()[order[start:end]][:, None] * solutions.mlp(x[t], up[e], out[e])
        y = y.scatter_add(0, t[:, None].expand_as(rows), rows)
        start = end
    return y


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


def loss_by_einsum(probs, experts):
    one_hot = torch.nn.functional.one_hot(experts, probs.size(1)).to(probs)
    N, K = experts.shape
    return probs.size(1) * torch.einsum("nke,me->", one_hot / (N * K), probs / N)


def loss_by_scatter(probs, experts):
    counts = torch.zeros(probs.size(-1), dtype=probs.dtype)
    counts = counts.scatter_add(0, experts.reshape(-1), torch.ones(experts.numel()).to(probs))
    fraction = counts / counts.sum()
    return torch.dot(fraction, probs.sum(dim=0)) * probs.size(-1) / len(probs)


def loss_by_gather(probs, experts):
    """Take the mean over assignments of the mean probability of their experts."""
    return probs.size(1) * probs.mean(dim=0)[experts].mean()


def loss_by_comprehension(probs, experts):
    shares = [(experts == e).double().mean().to(probs.dtype) for e in range(probs.shape[1])]
    return sum(f * p for f, p in zip(shares, probs.mean(0).unbind(), strict=True)) * len(shares)


def capacity_by_pairs(experts, n_expert, capacity):
    """Compare each assignment with each earlier one."""
    flat = experts.reshape(-1)
    earlier = (flat[:, None] == flat).tril(diagonal=-1).sum(dim=1)
    return (earlier < capacity).reshape(experts.shape)


def capacity_by_sort(experts, n_expert, capacity):
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=n_expert)
    position = torch.arange(flat.numel()) - (counts.cumsum(0) - counts)[flat[order]]
    kept = torch.empty(flat.numel(), dtype=torch.bool)
    kept[order] = position < capacity
    return kept.view(-1, experts.size(1))


def capacity_by_expert(experts, n_expert, capacity):
    kept = torch.zeros_like(experts, dtype=torch.bool)
    for e in range(n_expert):
        token, slot = (experts == e).nonzero(as_tuple=True)  # in token order
        kept[token[:capacity], slot[:capacity]] = True
    return kept


def capacity_by_comprehension(experts, n_expert, capacity):
    flat, K = experts.flatten().tolist(), experts.size(1)
    kept = [flat[:a].count(e) < capacity for a, e in enumerate(flat)]
    return torch.tensor(kept).unflatten(0, (-1, K))


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


def bias_by_where(bias, load, rate):
    distance = load * len(load) - load.sum()
    step = torch.where(distance < 0, rate, torch.where(distance > 0, -rate, 0.0))
    return torch.add(bias, step.to(bias.dtype))


def bias_by_comparison(bias, load, rate):
    mean = load.double().mean()
    return bias + rate * ((load < mean).to(bias) - (load > mean).to(bias))


def bias_by_comprehension(bias, load, rate):
    signs = [(x > 0) - (x < 0) for x in (load.sum() - len(load) * load).tolist()]
    return bias + rate * torch.tensor(signs, dtype=bias.dtype)


def upcycle_by_repeat_interleave(up, out, n_expert):
    return tuple(w[None].repeat_interleave(n_expert, dim=0) for w in (up, out))


def upcycle_by_loop(up, out, n_expert):
    many_up, many_out = up.new_empty(n_expert, *up.shape), out.new_empty(n_expert, *out.shape)
    for e in range(n_expert):
        many_up[e], many_out[e] = up, out
    return many_up, many_out


def upcycle_by_einsum(up, out, n_expert):
    ones = torch.ones(n_expert, dtype=up.dtype)
    return torch.einsum("e,fc->efc", ones, up), torch.einsum("e,cf->ecf", ones, out)


def upcycle_as_parameters(up, out, n_expert):
    copies = torch.stack([up] * n_expert), out.repeat(n_expert, 1, 1)
    return [nn.Parameter(copy) for copy in copies]


def upcycle_by_stack(up, out, n_expert):
    return torch.stack([up] * n_expert), out.expand(n_expert, *out.shape).clone()


ANSWERS = [
    ("route", route_by_sort),
    ("route", route_by_scatter),
    ("route", route_by_repeated_argmax),
    ("route", route_token_by_token),
    ("route", route_by_logsumexp),
    ("experts_loop", mixture_by_token),
    ("experts_loop", mixture_by_mask),
    ("experts_loop", sort_and_unsort),
    ("experts_loop", mixture_by_slot),
    ("experts_loop", mixture_by_products_with_one_hot),
    ("experts_sorted", mixture_by_token),
    ("experts_sorted", sorted_by_lists),
    ("experts_sorted", sorted_with_scatter_add),
    ("experts_sorted", sort_and_unsort),
    ("experts_sorted", matrices_per_assignment),
    ("load_balancing_loss", loss_by_expert),
    ("load_balancing_loss", loss_by_einsum),
    ("load_balancing_loss", loss_by_scatter),
    ("load_balancing_loss", loss_by_gather),
    ("load_balancing_loss", loss_by_comprehension),
    ("within_capacity", capacity_by_loop),
    ("within_capacity", capacity_by_pairs),
    ("within_capacity", capacity_by_sort),
    ("within_capacity", capacity_by_expert),
    ("within_capacity", capacity_by_comprehension),
    ("update_bias", bias_by_cases),
    ("update_bias", bias_in_integers),
    ("update_bias", bias_by_where),
    ("update_bias", bias_by_comparison),
    ("update_bias", bias_by_comprehension),
    ("upcycle", upcycle_by_stack),
    ("upcycle", upcycle_as_parameters),
    ("upcycle", upcycle_by_repeat_interleave),
    ("upcycle", upcycle_by_loop),
    ("upcycle", upcycle_by_einsum),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_correct_answers_by_other_methods_pass(name, function):
    assert grade_answer(steps_02.STEPS, name, function).message == "OK"
