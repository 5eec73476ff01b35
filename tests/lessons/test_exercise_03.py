"""The grader of lesson 03 finds in each wrong answer the mistake that is in it (its losses: test_exercise_03_losses.py)."""

import math
from pathlib import Path

import check_03
import grade
import pytest
import torch
from torch import nn

from tests.lessons.wrong_answers import WrongAnswers

right = grade.load_file(Path(check_03.__file__).with_name("03_solutions.py"))
WRONG = WrongAnswers()
wrong, wrongs = WRONG.register, WRONG.register_all

# ---- step 3 ------------------------------------------------------------------------------------------------------------------


def kept(log_scale, most):
    """What a right answer does to the parameter."""
    with torch.no_grad():
        log_scale.clamp_(max=math.log(most))
    return log_scale


@wrong("logit_scale", "limits log_scale after it was used")
def clamped_late(log_scale, most):
    scale = log_scale.exp()
    kept(log_scale, most)
    return scale


@wrong("logit_scale", "no gradient flows at all")
def without_gradient(log_scale, most):
    with torch.no_grad():
        return kept(log_scale, most).exp()


@wrong("logit_scale", "compares the logarithm with `most`")
def clamped_to_most(log_scale, most):
    with torch.no_grad():
        log_scale.clamp_(max=most)
    return log_scale.exp()


@wrong("logit_scale", "keeps the scale from being small")
def clamped_below_too(log_scale, most):
    with torch.no_grad():
        log_scale.clamp_(0, math.log(most))
    return log_scale.exp()


@wrong("logit_scale", r"leaf Variable.*make it under torch.no_grad\(\)")
def without_no_grad(log_scale, most):
    return log_scale.clamp_(max=math.log(most)).exp()


def straight_through(log_scale, most):
    value = log_scale.exp()
    return value + (value.clamp(max=most) - value).detach()


def once_more(log_scale, most):
    """Keeps the limit, and stays on it."""
    with torch.no_grad():
        if log_scale > math.log(most) - 0.1:
            log_scale.fill_(math.log(most))
    return log_scale.exp()


VALUE = "only the value is clamped: above the limit its gradient is 0"
wrongs(
    "logit_scale",
    value=(VALUE, lambda x, most: x.exp().clamp(max=most)),
    logarithm=(VALUE, lambda x, most: x.clamp(max=math.log(most)).exp()),
    minimum=(VALUE, lambda x, most: torch.minimum(x.exp(), torch.tensor(most).to(x))),
    where=(VALUE, lambda x, most: torch.where(x.exp() > most, most, x.exp())),
    copy=(
        "no gradient reaches log_scale: the scale is made from a copy",
        lambda x, most: kept(nn.Parameter(x.detach()), most).exp(),
    ),
    constant=(
        "above the limit no gradient reaches log_scale",
        lambda x, most: x.exp() if x.exp() < most else torch.tensor(most).to(x),
    ),
    both=(
        "clamps the parameter, and then the value too",
        lambda x, most: kept(x, most).exp().clamp(max=0.99999999 * most),
    ),
    straight_through=(
        "a gradient comes through, but the parameter stays at 4.91",
        straight_through,
    ),
    no_limit=("there is no limit", lambda x, most: x.exp()),
    no_exp=("returns the logarithm itself", kept),
    temperature=("returns the temperature", lambda x, most: (-kept(x, most)).exp()),
    always_most=("returns 50, the limit", lambda x, most: x.exp() * 0 + most),
    base_two=("gives 2.8284 where log_scale is 1.5", lambda x, most: kept(x, most).exp2()),
    half_the_limit=(r"`most` is 50, and it returns 25$", lambda x, most: kept(x, most / 2).exp()),
    set_anyway=(
        "changes log_scale below the limit too",
        lambda x, most: (x.exp() + 0 * x, x.data.fill_(math.log(most)))[0],
    ),
    twice_the_gradient=(
        "the gradient below the limit is 8.963",
        lambda x, most: 2 * (y := kept(x, most).exp()) - y.detach(),
    ),
    stays=("does not come down again", once_more),
    always_float=("turns float64 into float32", lambda x, most: kept(x, most).float().exp()),
    a_number=("returns a float, not a tensor", lambda x, most: min(x.exp().item(), most)),
    a_vector=("wrong shape", lambda x, most: kept(x, most).exp()[None]),
    math_of_a_tensor=(
        "raises TypeError",
        lambda x, most: torch.clamp(x, max=torch.log(most)).exp(),
    ),
)

# ---- step 4 ------------------------------------------------------------------------------------------------------------------


def found(queries, targets):
    scores = queries @ targets.T
    return (scores.diag()[:, None] > scores).sum(-1) == len(scores) - 1


def argmax(queries, targets, dim=1):
    return ((queries @ targets.T).argmax(dim) == torch.arange(len(queries))).double().mean()


def not_beaten(queries, targets):
    """Ties are not found: nothing else is as high. But no comparison with NaN is true."""
    scores = queries @ targets.T
    return ((scores >= scores.diag()[:, None]).sum(-1) <= 1).double().mean()


def half_a_find(queries, targets):
    scores = queries @ targets.T
    best = scores == scores.amax(-1, keepdim=True)
    return (best.diag() / best.sum(-1)).mean() * (best.sum() < best.numel())


def no_rival_higher(queries, targets):
    scores = queries @ targets.T
    return ((scores > scores.diag()[:, None]).sum(-1) == 0).double().mean()


def nan_finds_nothing_at_all(queries, targets):
    return found(queries, targets).double().mean() * (not queries.isnan().any())


wrongs(
    "recall_at_1",
    argmax=(r"collapsed to one point get 0.125: argmax takes", argmax),
    at_least=("find everything: a tie must not count", no_rival_higher),
    as_high_as_the_best=(
        "find everything: a tie must not count",
        lambda q, t: ((s := q @ t.T).diag() >= s.amax(-1)).double().mean(),
    ),
    half_a_find=("is a tie half a find", half_a_find),
    nan_found=("NaN counts as found: it gives 1 where all is NaN", not_beaten),
    nan_spreads=("gives 0 where query 1 is NaN, not 0.875", nan_finds_nothing_at_all),
    wrong_way=("targets look for queries", lambda q, t: right.recall_at_1(t, q)),
    argmax_wrong_way=("targets look for queries", lambda q, t: argmax(q, t, 0)),
    lowest=("the lowest score is taken", lambda q, t: right.recall_at_1(-q, t)),
    own_rival=(
        "nothing is ever found",
        lambda q, t: ((s := q @ t.T).diag()[:, None] > s).all(-1).double().mean(),
    ),
    missed=("those .not. found", lambda q, t: 1 - right.recall_at_1(q, t)),
    counted=("counts those that are found", lambda q, t: found(q, t).double().sum()),
    per_cent=("in per cent", lambda q, t: 100 * right.recall_at_1(q, t)),
    of_the_matrix=("divided by Q.2", lambda q, t: found(q, t).sum() / len(q) ** 2),
    by_width=("divided by M", lambda q, t: found(q, t).sum() / q.size(1)),
    by_rivals=("divided by Q - 1", lambda q, t: found(q, t).sum() / max(1, len(q) - 1)),
    beaten=(
        "the share of rivals beaten",
        lambda q, t: ((s := q @ t.T).diag()[:, None] > s).sum() / (len(q) * (len(q) - 1)),
    ),
    integers=("must be a share, a floating", lambda q, t: found(q, t).sum() // len(q)),
    no_mean=(r"returns booleans, of shape \(\d+,\)", found),
    best_five=(
        r"gives \d\.\d+ where 5 of 8 queries",
        lambda q, t: ((s := q @ t.T).diag() >= s.topk(3).values[:, 2]).double().mean(),
    ),
    a_number=("returns a float, not a tensor", lambda q, t: right.recall_at_1(q, t).item()),
    two_best=(
        "raises .*for one query",
        lambda q, t: (
            (found(q, t) & ((s := q @ t.T).topk(2).values[:, 0] == s.diag())).double().mean()
        ),
    ),
)

# ---- the bonus ---------------------------------------------------------------------------------------------------------------


def entropy(p, dim=-1, log=torch.log):
    """NaN-free, but for what a wrong answer puts in."""
    return -(p * log(p.clamp(min=1e-300 if p.dtype == torch.float64 else 1e-37))).sum(dim)


def plain(p):
    return -(p * p.log()).sum(-1)


def in_parts(p, local=lambda p: entropy(p).mean(), overall=lambda p: entropy(p.mean(0))):
    return local(p), overall(p)


wrongs(
    "entropies",
    swapped=("the two are swapped", lambda p: in_parts(p)[::-1]),
    bits=(
        "local takes the logarithm to the base 2",
        lambda p: (entropy(p, log=torch.log2).mean(), entropy(p.mean(0), log=torch.log2)),
    ),
    global_bits=(
        "global takes the logarithm to the base 2",
        lambda p: in_parts(p, overall=lambda p: entropy(p.mean(0), log=torch.log2)),
    ),
    summed=("local is summed over the tokens", lambda p: in_parts(p, lambda p: entropy(p).sum())),
    negative=("local has the wrong sign", lambda p: [-part for part in in_parts(p)]),
    loss_of_global=(
        "global has the wrong sign",
        lambda p: in_parts(p, overall=lambda p: -entropy(p.mean(0))),
    ),
    mean_of_all=(
        "local averages over the experts: an",
        lambda p: in_parts(p, lambda p: -torch.xlogy(p, p).mean()),
    ),
    mean_of_global=(
        "global averages over the experts: an",
        lambda p: in_parts(p, overall=lambda p: -torch.xlogy(p.mean(0), p.mean(0)).mean()),
    ),
    wrong_axis=(
        "local sums over the tokens and averages",
        lambda p: in_parts(p, lambda p: entropy(p, 0).mean()),
    ),
    share_of_most=(
        "local is divided by ln E",
        lambda p: [part / math.log(p.size(-1)) for part in in_parts(p)],
    ),
    both_of_the_mean=(
        "local is the entropy of the mean",
        lambda p: in_parts(p, lambda p: entropy(p.mean(0))),
    ),
    both_means=(
        "global is the mean of the entropies",
        lambda p: in_parts(p, overall=lambda p: entropy(p).mean()),
    ),
    global_of_the_sum=(
        "global sums the probabilities",
        lambda p: in_parts(p, overall=lambda p: entropy(p.sum(0))),
    ),
    global_over_experts=(
        "global averages over the experts, and not",
        lambda p: in_parts(p, overall=lambda p: entropy(p.mean(-1))),
    ),
    softmax=("local takes the softmax again", lambda p: in_parts(p.softmax(-1))),
    softmax_of_sum=(
        "global takes the softmax of the sum",
        lambda p: in_parts(p, overall=lambda p: entropy(p.sum(0).softmax(-1))),
    ),
    softmax_of_mean=(
        "global takes the softmax again",
        lambda p: in_parts(p, overall=lambda p: entropy(p.mean(0).softmax(-1))),
    ),
    nan=(
        "local is nan where each token is sure of one",
        lambda p: in_parts(p, lambda p: plain(p).mean()),
    ),
    nan_in_global=(
        "global is nan where all tokens are sure of the same",
        lambda p: in_parts(p, overall=lambda p: plain(p.mean(0))),
    ),
    large_epsilon=(
        "local .* off: is something added",
        lambda p: in_parts(p, lambda p: -(p * (p + 1e-5).log()).sum(-1).mean()),
    ),
    median=(
        r"local gives \d\.\d+ where it should give",
        lambda p: in_parts(p, lambda p: entropy(p).median()),
    ),
    detached=("no gradient reaches probs|no gradient flows", lambda p: in_parts(p.detach())),
    half_detached=(
        "gradient of probs is not",
        lambda p: in_parts(p, lambda p: -(p.detach() * p.clamp(min=1e-30).log()).sum(-1).mean()),
    ),
    not_averaged=(r"\(local\): take the mean over the tokens", lambda p: in_parts(p, entropy)),
    not_summed=(
        r"\(global\): sum over the experts",
        lambda p: in_parts(p, overall=lambda p: p.mean(0)),
    ),
    one_alone=("returns a Tensor, not the 2 tensors local, global", lambda p: entropy(p).mean()),
    always_float=("turns float64 into float32", lambda p: [part.float() for part in in_parts(p)]),
    in_place=("argument number 1 in place", lambda p: in_parts(p.clamp_(min=1e-3))),
    five_experts=(
        "raises IndexError.*where there is one expert",
        lambda p: in_parts(p, lambda p: entropy(p + 0 * p[:, 4:5]).mean() + 0 * p[0, 4]),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_mistake_gets_the_message_meant_for_it(step, message, function):
    WRONG.assert_diagnosis(check_03.STEPS, step, message, function)
