"""The grader of lesson 03 asks for results, not for one way to them: loops, einsum, sums by hand, and a wider dtype pass."""

import math

import check_03
import pytest
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import grade_answer


def loss_by_loops(a, b, scale, ids=None):
    """Item by item, in fp64 whatever comes in."""
    a, b, total = a.double(), b.double(), 0
    for left, other in ((a, b), (b, a)):
        for i in range(len(a)):
            rivals = [j for j in range(len(a)) if j == i or ids is None or ids[j] != ids[i]]
            scores = torch.stack([scale * (left[i] * other[j]).sum() for j in rivals])
            total = total - scores[rivals.index(i)] + torch.logsumexp(scores, 0)
    return total / (2 * len(a))


def loss_by_einsum(a, b, scale):
    """log_softmax along both dimensions of one matrix, in no less than fp32."""
    if a.dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    logits = torch.einsum("im,jm->ij", a, b) * scale
    return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2


def loss_by_hand(a, b, scale):
    """The largest of each row taken away by hand."""
    wide = torch.promote_types(a.dtype, torch.float32)
    logits, total = (scale * a.to(wide)) @ b.to(wide).mT, 0
    for x in (logits, logits.mT):
        top = x.max(dim=1, keepdim=True).values.detach()
        total = total + ((x - top).exp().sum(1).log() + top[:, 0] - x.diag()).sum()
    return total / (len(a) + len(b))


def loss_in_double(a, b, scale):
    """A plain exp(): in fp64 it holds up to a scale of 700."""
    e = (scale * a.double() @ b.double().T).exp()
    return -(e.diag() ** 2 / (e.sum(0) * e.sum(1))).log().mean() / 2


def twins_by_large_number(a, b, scale, ids):
    """-1e9 is as good as -inf, before the scale or after it."""
    wide = torch.promote_types(a.dtype, torch.float32)
    s = a.to(wide) @ b.to(wide).T
    twin = (ids.unsqueeze(0) - ids.unsqueeze(1) == 0).fill_diagonal_(False)
    s = torch.where(twin, -1e9, s) * scale
    return (
        F.cross_entropy(s, torch.arange(len(a))) + F.cross_entropy(s.T, torch.arange(len(a)))
    ) * 0.5


def twins_by_log_of_mask(a, b, scale, ids):
    """0 for those that stay and -inf for twins, added: log(1) and log(0)."""
    if a.dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    stays = (ids[:, None] != ids).to(a) + torch.eye(len(a), dtype=a.dtype)
    logits = torch.einsum("im,jm->ij", a, b) * scale + stays.log()
    return -(logits.log_softmax(0).diag().mean() + logits.log_softmax(1).diag().mean()) / 2


def scale_by_data(log_scale, most):
    log_scale.data = log_scale.data.clamp(max=math.log(most))
    return torch.exp(log_scale)


@torch.no_grad()
def limit(log_scale, most):
    if log_scale.exp() > most:
        log_scale.fill_(math.log(most))


def scale_by_case(log_scale, most):
    limit(log_scale, most)
    return math.e**log_scale


def scale_by_copy(log_scale, most):
    """On the way a no-op: a value that is clamped twice has a gradient once the parameter has come down."""
    with torch.no_grad():
        log_scale.copy_(torch.minimum(log_scale, torch.tensor(most).to(log_scale).log()))
    return log_scale.exp().clamp(max=most * (1 + 1e-6))


def recall_by_loops(queries, targets):
    hits = 0
    for i, q in enumerate(queries):
        own = q @ targets[i]
        hits += all(bool(own > q @ t) for j, t in enumerate(targets) if j != i)
    return torch.tensor(hits / len(queries))


def recall_by_rank(queries, targets):
    """Those not lower than the own one are counted: itself alone, where it is found."""
    scores = torch.einsum("qm,tm->qt", queries, targets).double()
    own = scores.diagonal().unsqueeze(1)
    return ((~(scores < own)).sum(1) == 1).double().mean() * (~own.isnan()).any()


def recall_by_margin(queries, targets):
    """As nanods does it: what only rounding parts is a tie; a NaN target is no rival."""
    scores = queries @ targets.T
    own = scores.diag()
    rivals = (
        scores.nan_to_num(-math.inf)
        .masked_fill(torch.eye(len(scores), dtype=torch.bool), -math.inf)
        .amax(1)
    )
    return (own > rivals + 1e-5).sum() / len(queries)


def recall_by_argmax(queries, targets):
    """argmax, and that nothing else is as high."""
    scores = queries @ targets.T
    best = scores.amax(1, keepdim=True)
    found = (scores.argmax(1) == torch.arange(len(scores))) & ((scores == best).sum(1) == 1)
    return found.float().mean()


def sigmoid_by_loops(a, b, scale, bias):
    total = 0
    for i in range(len(a)):
        for j in range(len(b)):
            x = scale * (a[i] @ b[j]) + bias
            total = total + F.softplus(-x if i == j else x)
    return total / len(a)


def sigmoid_by_cross_entropy(a, b, scale, bias):
    logits = torch.einsum("im,jm->ij", a, b) * scale + bias
    return F.binary_cross_entropy_with_logits(
        logits, torch.eye(len(a)).to(a), reduction="sum"
    ) / len(a)


def sigmoid_in_double(a, b, scale, bias):
    logits = scale * a.double() @ b.double().T + bias
    z = torch.full_like(logits, -1).fill_diagonal_(1)
    return (z * logits).sigmoid().log().sum(1).mean().neg()


def entropies_by_loops(probs):
    def entropy(p):
        return sum(-q * q.log() for q in p if q > 0)

    return torch.stack([entropy(p) for p in probs]).mean(), entropy(sum(probs) / len(probs))


def entropies_by_torch(probs):
    return [
        torch.special.entr(probs).sum(1).mean(),
        -torch.xlogy(probs.mean(0), probs.mean(0)).sum(),
    ]


def entropies_by_distribution(probs):
    return tuple(
        torch.distributions.Categorical(p).entropy().mean() for p in (probs, probs.mean(0))
    )


def entropies_with_epsilon(probs):
    mean = probs.sum(0) / probs.size(0)
    return -(probs * (probs + 1e-9).log()).sum() / len(probs), -(mean * (mean + 1e-9).log()).sum()


def entropies_in_double(probs):
    """What is NaN is 0: right in value, and where no probability is 0 in gradient."""
    p = probs.double()
    return -(p * p.log()).nan_to_num().sum(-1).mean(), -(
        p.mean(0) * p.mean(0).log()
    ).nan_to_num().sum(-1)


ANSWERS = [
    ("contrastive_loss", loss_by_loops),
    ("contrastive_loss", loss_by_einsum),
    ("contrastive_loss", loss_by_hand),
    ("contrastive_loss", loss_in_double),
    ("with_twins", loss_by_loops),
    ("with_twins", twins_by_large_number),
    ("with_twins", twins_by_log_of_mask),
    ("logit_scale", scale_by_data),
    ("logit_scale", scale_by_case),
    ("logit_scale", scale_by_copy),
    ("recall_at_1", recall_by_loops),
    ("recall_at_1", recall_by_rank),
    ("recall_at_1", recall_by_margin),
    ("recall_at_1", recall_by_argmax),
    ("sigmoid_loss", sigmoid_by_loops),
    ("sigmoid_loss", sigmoid_by_cross_entropy),
    ("sigmoid_loss", sigmoid_in_double),
    ("entropies", entropies_by_loops),
    ("entropies", entropies_by_torch),
    ("entropies", entropies_by_distribution),
    ("entropies", entropies_with_epsilon),
    ("entropies", entropies_in_double),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_right_answers_pass(name, function):
    assert grade_answer(check_03.STEPS, name, function).message == "OK"
