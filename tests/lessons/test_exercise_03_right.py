"""The grader of lesson 03 accepts every correct implementation.

Loops, einsum, sums by hand and a wider dtype pass too.
"""

import math

import pytest
import steps_03
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import grade_answer


def loss_by_loops(a, b, scale, ids=None):
    """Compute one example after the other, always in fp64."""
    a, b, total = a.double(), b.double(), 0
    for queries, targets in ((a, b), (b, a)):
        for i in range(len(a)):
            candidates = [j for j in range(len(a)) if j == i or ids is None or ids[j] != ids[i]]
            scores = torch.stack([scale * (queries[i] * targets[j]).sum() for j in candidates])
            total = total - scores[candidates.index(i)] + torch.logsumexp(scores, 0)
    return total / (2 * len(a))


def loss_by_einsum(a, b, scale):
    """Take log_softmax along both dimensions of one matrix, in at least fp32."""
    if a.dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    logits = torch.einsum("im,jm->ij", a, b) * scale
    return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2


def loss_by_hand(a, b, scale):
    """Subtract the maximum of each row by hand."""
    wide = torch.promote_types(a.dtype, torch.float32)
    logits, total = (scale * a.to(wide)) @ b.to(wide).mT, 0
    for x in (logits, logits.mT):
        top = x.max(dim=1, keepdim=True).values.detach()
        total = total + ((x - top).exp().sum(1).log() + top[:, 0] - x.diag()).sum()
    return total / (len(a) + len(b))


def loss_in_double(a, b, scale):
    """Use a plain exp(), which fp64 can represent up to a scale of 700."""
    exp = (scale * a.double() @ b.double().T).exp()
    return -(exp.diag() ** 2 / (exp.sum(0) * exp.sum(1))).log().mean() / 2


def loss_by_comprehension(a, b, scale):
    """Take each row and each column as a view, and give -log of the softmax's own entry."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    logits = scale * (a.to(dtype) @ b.to(dtype).transpose(0, 1))
    views = [*logits.unbind(0), *logits.unbind(1)]
    return torch.stack([-v.log_softmax(0)[i % len(a)] for i, v in enumerate(views)]).mean()


def duplicates_by_large_number(a, b, scale, ids):
    """Mask with -1e9 instead of -inf, before the scale."""
    wide = torch.promote_types(a.dtype, torch.float32)
    s = a.to(wide) @ b.to(wide).T
    is_duplicate = (ids.unsqueeze(0) - ids.unsqueeze(1) == 0).fill_diagonal_(False)
    s = torch.where(is_duplicate, -1e9, s) * scale
    labels = torch.arange(len(a))
    return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) * 0.5


def duplicates_by_log_of_mask(a, b, scale, ids):
    """Add the logarithm of a mask: log(1) = 0 for negatives and log(0) = -inf for duplicates."""
    if a.dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    mask = (ids[:, None] != ids).to(a) + torch.eye(len(a), dtype=a.dtype)
    logits = torch.einsum("im,jm->ij", a, b) * scale + mask.log()
    return -(logits.log_softmax(0).diag().mean() + logits.log_softmax(1).diag().mean()) / 2


def duplicates_by_kept_columns(a, b, scale, ids):
    """Take the candidates of each row out of the matrix, by an index."""
    wide = torch.promote_types(a.dtype, torch.float32)
    s, terms = scale * a.to(wide) @ b.to(wide).T, []
    for i in range(len(ids)):
        keep = ids != ids[i]
        keep[i] = True
        terms += [row[keep].logsumexp(0) - s[i, i] for row in (s[i], s[:, i])]
    return sum(terms) / len(terms)


def duplicates_by_weights(a, b, scale, ids):
    """Multiply exp() by 0 at duplicates, less the maximum of each row."""
    wide = torch.promote_types(a.dtype, torch.float32)
    logits, total = scale * (a.to(wide) @ b.to(wide).T), 0
    counts = torch.ones_like(logits) - (ids == ids[:, None]).to(wide) + torch.eye(len(a)).to(wide)
    for x in (logits, logits.T):
        top = x.detach().masked_fill(counts == 0, -math.inf).amax(1, keepdim=True)
        capped = (x - top).clamp(max=0)  # what is above the maximum is a duplicate
        total = total + ((capped.exp() * counts).sum(1).log() + top[:, 0] - x.diag()).mean()
    return total / 2


def scale_by_data(log_scale, max_scale):
    log_scale.data = log_scale.data.clamp(max=math.log(max_scale))
    return torch.exp(log_scale)


@torch.no_grad()
def clamp_above(log_scale, max_scale):
    if log_scale.exp() > max_scale:
        log_scale.fill_(math.log(max_scale))


def scale_by_case(log_scale, max_scale):
    clamp_above(log_scale, max_scale)
    return math.e**log_scale


def scale_by_copy(log_scale, max_scale):
    """Clamp the parameter, and then the value at a slightly higher limit, which changes nothing."""
    with torch.no_grad():
        log_scale.copy_(torch.minimum(log_scale, torch.tensor(max_scale).to(log_scale).log()))
    return log_scale.exp().clamp(max=max_scale * (1 + 1e-6))


def scale_by_tensor(log_scale, max_scale):
    """Take the logarithm of the limit in fp32, which rounds it up."""
    with torch.no_grad():
        log_scale.clamp_(max=torch.tensor(max_scale).log())
    return log_scale.exp()


def scale_by_view(log_scale, max_scale):
    log_scale.detach().clamp_(max=math.log(max_scale))  # a view of the same memory
    return log_scale.exp()


def scale_by_power(log_scale, max_scale):
    with torch.no_grad():
        log_scale[...] = min(log_scale.item(), math.log(max_scale))
    return torch.pow(math.e, log_scale)


def recall_by_loops(queries, targets):
    hits = 0
    for i, q in enumerate(queries):
        score = q @ targets[i]
        hits += all(bool(score > q @ t) for j, t in enumerate(targets) if j != i)
    return torch.tensor(hits / len(queries))


def recall_by_rank(queries, targets):
    """Count the scores not lower than the target's: only one, its own, if it is found."""
    scores = torch.einsum("qm,tm->qt", queries, targets).double()
    positive = scores.diagonal().unsqueeze(1)
    is_found = (~(scores < positive)).sum(1) == 1
    return is_found.double().mean() * (~positive.isnan()).any()


def recall_by_margin(queries, targets):
    """Count nearly equal scores as ties and ignore NaN targets, as nanods does."""
    scores = queries @ targets.T
    eye = torch.eye(len(scores), dtype=torch.bool)
    best_other = scores.nan_to_num(-math.inf).masked_fill(eye, -math.inf).amax(1)
    return (scores.diag() > best_other + 1e-5).sum() / len(queries)


def recall_by_argmax(queries, targets):
    """Use argmax, and require that no other score is as high."""
    scores = queries @ targets.T
    best = scores.amax(1, keepdim=True)
    is_best = scores.argmax(1) == torch.arange(len(scores))
    is_unique = (scores == best).sum(1) == 1
    return (is_best & is_unique).float().mean()


def recall_by_sorting(queries, targets):
    """Sort the scores: the best must be the query's own, and the second must be lower."""
    scores = queries @ targets.T
    if len(scores) == 1:
        return (~scores.isnan()).float().mean()
    own = scores.diagonal()
    top = scores.nan_to_num(-math.inf).sort(dim=1, descending=True).values
    return ((own == top[:, 0]) & (top[:, 0] > top[:, 1])).float().mean()


def sigmoid_by_loops(a, b, scale, bias):
    total = 0
    for i in range(len(a)):
        for j in range(len(b)):
            x = scale * (a[i] @ b[j]) + bias
            total = total + F.softplus(-x if i == j else x)
    return total / len(a)


def sigmoid_by_cross_entropy(a, b, scale, bias):
    logits = torch.einsum("im,jm->ij", a, b) * scale + bias
    labels = torch.eye(len(a)).to(a)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(a)


def sigmoid_in_double(a, b, scale, bias):
    logits = scale * a.double() @ b.double().T + bias
    z = torch.full_like(logits, -1).fill_diagonal_(1)
    return (z * logits).sigmoid().log().sum(1).mean().neg()


def sigmoid_by_comprehension(a, b, scale, bias):
    """Take the diagonal and the other entries apart."""
    logits = scale * torch.einsum("im,jm->ij", a, b) + bias
    others = ~torch.eye(len(a), dtype=torch.bool)
    parts = [F.softplus(-logits.diagonal()), F.softplus(logits[others])]
    return sum(part.sum() for part in parts) / a.size(0)


def sigmoid_by_hand(a, b, scale, bias):
    """Compute log(1 + exp(-x)) so that exp() cannot overflow."""
    x = (2 * torch.eye(len(a)).to(a) - 1) * (scale * (a @ b.T) + bias)
    return ((-x.abs()).exp().log1p() + (-x).relu()).sum() / len(a)


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
    """Replace NaN by 0. The gradient is correct where no probability is 0."""
    p = probs.double()
    mean = p.mean(0)
    local = -(p * p.log()).nan_to_num().sum(-1).mean()
    return local, -(mean * mean.log()).nan_to_num().sum(-1)


ANSWERS = [
    ("contrastive_loss", loss_by_loops),
    ("contrastive_loss", loss_by_einsum),
    ("contrastive_loss", loss_by_hand),
    ("contrastive_loss", loss_in_double),
    ("contrastive_loss", loss_by_comprehension),
    ("loss_with_duplicates", loss_by_loops),
    ("loss_with_duplicates", duplicates_by_large_number),
    ("loss_with_duplicates", duplicates_by_log_of_mask),
    ("loss_with_duplicates", duplicates_by_kept_columns),
    ("loss_with_duplicates", duplicates_by_weights),
    ("logit_scale", scale_by_data),
    ("logit_scale", scale_by_case),
    ("logit_scale", scale_by_copy),
    ("logit_scale", scale_by_tensor),
    ("logit_scale", scale_by_view),
    ("logit_scale", scale_by_power),
    ("recall_at_1", recall_by_loops),
    ("recall_at_1", recall_by_rank),
    ("recall_at_1", recall_by_margin),
    ("recall_at_1", recall_by_argmax),
    ("recall_at_1", recall_by_sorting),
    ("sigmoid_loss", sigmoid_by_loops),
    ("sigmoid_loss", sigmoid_by_cross_entropy),
    ("sigmoid_loss", sigmoid_in_double),
    ("sigmoid_loss", sigmoid_by_comprehension),
    ("sigmoid_loss", sigmoid_by_hand),
    ("entropies", entropies_by_loops),
    ("entropies", entropies_by_torch),
    ("entropies", entropies_by_distribution),
    ("entropies", entropies_with_epsilon),
    ("entropies", entropies_in_double),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_correct_answers_pass(name, function):
    assert grade_answer(steps_03.STEPS, name, function).message == "OK"
