"""The grader of lesson 03 diagnoses each wrong answer to steps 3, 4 and the bonus.

The losses, steps 1, 2 and 5, are in test_exercise_03_losses.py.
"""

import math
from pathlib import Path

import grade
import pytest
import steps_03
import torch
import torch.nn.functional as F
from torch import nn

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_03.__file__).with_name("03_solutions.py"))
WRONG = WrongAnswers()
register, register_all = WRONG.register, WRONG.register_all

# ---- step 3: logit_scale -------------------------------------------------------------------------


def clamp_parameter(log_scale, max_scale):
    """Clamp the parameter in place, as a correct answer does, and return it."""
    with torch.no_grad():
        log_scale.clamp_(max=math.log(max_scale))
    return log_scale


@register("logit_scale", "clamps log_scale after it was used")
def clamped_after_use(log_scale, max_scale):
    scale = log_scale.exp()
    clamp_parameter(log_scale, max_scale)
    return scale


@register("logit_scale", "no gradient flows at all")
def without_gradient(log_scale, max_scale):
    with torch.no_grad():
        return clamp_parameter(log_scale, max_scale).exp()


@register("logit_scale", "compares the logarithm with `max_scale`")
def clamped_to_max_scale(log_scale, max_scale):
    with torch.no_grad():
        log_scale.clamp_(max=max_scale)
    return log_scale.exp()


@register("logit_scale", "limits small scales too")
def clamped_below_too(log_scale, max_scale):
    with torch.no_grad():
        log_scale.clamp_(0, math.log(max_scale))
    return log_scale.exp()


@register("logit_scale", r"leaf Variable.*change the parameter under torch.no_grad\(\)")
def without_no_grad(log_scale, max_scale):
    return log_scale.clamp_(max=math.log(max_scale)).exp()


def straight_through(log_scale, max_scale):
    value = log_scale.exp()
    return value + (value.clamp(max=max_scale) - value).detach()


def stays_at_the_limit(log_scale, max_scale):
    """Keep the limit, and never come down from it."""
    with torch.no_grad():
        if log_scale > math.log(max_scale) - 0.1:
            log_scale.fill_(math.log(max_scale))
    return log_scale.exp()


VALUE = "only the value is clamped: above the limit its gradient is 0"
register_all(
    "logit_scale",
    value=(VALUE, lambda x, limit: x.exp().clamp(max=limit)),
    logarithm=(VALUE, lambda x, limit: x.clamp(max=math.log(limit)).exp()),
    minimum=(VALUE, lambda x, limit: torch.minimum(x.exp(), torch.tensor(limit).to(x))),
    where=(VALUE, lambda x, limit: torch.where(x.exp() > limit, limit, x.exp())),
    copy=(
        "no gradient reaches log_scale: the scale is computed from a copy",
        lambda x, limit: clamp_parameter(nn.Parameter(x.detach()), limit).exp(),
    ),
    constant=(
        "above the limit no gradient reaches log_scale",
        lambda x, limit: x.exp() if x.exp() < limit else torch.tensor(limit).to(x),
    ),
    value_and_parameter=(
        "clamps the parameter and then the value too",
        lambda x, limit: clamp_parameter(x, limit).exp().clamp(max=0.99999999 * limit),
    ),
    straight_through=(
        "there is a gradient, but the parameter stays at 4.91",
        straight_through,
    ),
    no_limit=("there is no limit", lambda x, limit: x.exp()),
    no_exp=("returns the logarithm itself", clamp_parameter),
    temperature=("returns the temperature", lambda x, limit: (-clamp_parameter(x, limit)).exp()),
    always_the_limit=("returns 50, the limit", lambda x, limit: x.exp() * 0 + limit),
    base_two=(
        "gives 2.8284 where log_scale is 1.5",
        lambda x, limit: clamp_parameter(x, limit).exp2(),
    ),
    half_the_limit=(
        r"`max_scale` is 50, and it returns 25.0000$",
        lambda x, limit: clamp_parameter(x, limit / 2).exp(),
    ),
    changes_the_parameter=(
        "changes log_scale below the limit too",
        lambda x, limit: (x.exp() + 0 * x, x.data.fill_(math.log(limit)))[0],
    ),
    twice_the_gradient=(
        "the gradient below the limit is 8.963",
        lambda x, limit: 2 * (y := clamp_parameter(x, limit).exp()) - y.detach(),
    ),
    stays_at_the_limit=("does not decrease again", stays_at_the_limit),
    returns_float32=(
        "turns float64 into float32",
        lambda x, limit: clamp_parameter(x, limit).float().exp(),
    ),
    returns_a_float=("returns a float, not a tensor", lambda x, limit: min(x.exp().item(), limit)),
    returns_a_vector=("wrong shape", lambda x, limit: clamp_parameter(x, limit).exp()[None]),
    math_of_a_tensor=(
        "raises TypeError",
        lambda x, limit: torch.clamp(x, max=torch.log(limit)).exp(),
    ),
)

# ---- step 4: recall_at_1 -------------------------------------------------------------------------


def is_found(queries, targets):
    scores = queries @ targets.T
    return (scores.diag()[:, None] > scores).sum(-1) == len(scores) - 1


def argmax(queries, targets, dim=1):
    return ((queries @ targets.T).argmax(dim) == torch.arange(len(queries))).double().mean()


def not_exceeded(queries, targets):
    """Treat ties correctly, but count NaN as found: every comparison with NaN is false."""
    scores = queries @ targets.T
    return ((scores >= scores.diag()[:, None]).sum(-1) <= 1).double().mean()


def tie_as_half(queries, targets):
    scores = queries @ targets.T
    best = scores == scores.amax(-1, keepdim=True)
    return (best.diag() / best.sum(-1)).mean() * (best.sum() < best.numel())


def no_target_higher(queries, targets):
    scores = queries @ targets.T
    return ((scores > scores.diag()[:, None]).sum(-1) == 0).double().mean()


def zero_if_any_query_is_nan(queries, targets):
    return is_found(queries, targets).double().mean() * (not queries.isnan().any())


def recall_by_score(scores):
    is_higher = scores.diag()[:, None] > scores
    return (is_higher.sum(1) == len(scores) - 1).double().mean()


register_all(
    "recall_at_1",
    argmax=(r"collapsed to one point get 0.125: argmax returns", argmax),
    not_strict=("gives recall 1 to .*: a tie must not count", no_target_higher),
    as_high_as_the_best=(
        "gives recall 1 to .*: a tie must not count",
        lambda q, t: ((s := q @ t.T).diag() >= s.amax(-1)).double().mean(),
    ),
    tie_as_half=("do you count a tie as half a match", tie_as_half),
    nan_found=("NaN counts as found: it gives 1 where all is NaN", not_exceeded),
    cosine=(
        "normalises the embeddings: scores are dot products",
        lambda q, t: solutions.recall_at_1(F.normalize(q), F.normalize(t)),
    ),
    distance=(
        "compares distances: scores are dot products",
        lambda q, t: recall_by_score(-torch.cdist(q, t)),
    ),
    averaged_directions=(
        r"gives \d\.\d+ where 5 of 8 queries",
        lambda q, t: (solutions.recall_at_1(q, t) + solutions.recall_at_1(t, q)) / 2,
    ),
    nan_spreads=("gives 0.0000 where query 1 is NaN, not 0.8750", zero_if_any_query_is_nan),
    other_direction=("targets search for queries", lambda q, t: solutions.recall_at_1(t, q)),
    argmax_other_direction=("targets search for queries", lambda q, t: argmax(q, t, 0)),
    lowest=("takes the lowest score", lambda q, t: solutions.recall_at_1(-q, t)),
    compared_with_itself=(
        "never finds anything",
        lambda q, t: ((s := q @ t.T).diag()[:, None] > s).all(-1).double().mean(),
    ),
    missed=("queries that did .not. find", lambda q, t: 1 - solutions.recall_at_1(q, t)),
    counted=("counts the queries that find", lambda q, t: is_found(q, t).double().sum()),
    per_cent=("in per cent", lambda q, t: 100 * solutions.recall_at_1(q, t)),
    of_the_matrix=("divided by Q.2", lambda q, t: is_found(q, t).sum() / len(q) ** 2),
    by_width=("divided by M", lambda q, t: is_found(q, t).sum() / q.size(1)),
    by_others=("divided by Q - 1", lambda q, t: is_found(q, t).sum() / max(1, len(q) - 1)),
    share_of_lower_scores=(
        "the share of other targets that score lower",
        lambda q, t: ((s := q @ t.T).diag()[:, None] > s).sum() / (len(q) * (len(q) - 1)),
    ),
    integers=("must be a share, a floating", lambda q, t: is_found(q, t).sum() // len(q)),
    no_mean=(r"returns booleans, of shape \(\d+,\)", is_found),
    among_top_three=(
        r"gives \d\.\d+ where 5 of 8 queries",
        lambda q, t: ((s := q @ t.T).diag() >= s.topk(3).values[:, 2]).double().mean(),
    ),
    returns_a_float=(
        "returns a float, not a tensor",
        lambda q, t: solutions.recall_at_1(q, t).item(),
    ),
    two_best=(
        "raises .*for one query",
        lambda q, t: (
            (is_found(q, t) & ((s := q @ t.T).topk(2).values[:, 0] == s.diag())).double().mean()
        ),
    ),
)

# ---- the bonus: entropies ------------------------------------------------------------------------


def entropy(p, dim=-1, log=torch.log):
    """Return the entropy without NaN, unless `log` returns NaN."""
    return -(p * log(p.clamp(min=1e-300 if p.dtype == torch.float64 else 1e-37))).sum(dim)


def entropy_with_nan(p):
    return -(p * p.log()).sum(-1)


def both(p, local=lambda p: entropy(p).mean(), global_=lambda p: entropy(p.mean(0))):
    """Return the correct answer with one of its functions, or both, replaced."""
    return local(p), global_(p)


register_all(
    "entropies",
    swapped=("returns global, local: swap the two", lambda p: both(p)[::-1]),
    bits=(
        "local uses the logarithm to base 2",
        lambda p: (entropy(p, log=torch.log2).mean(), entropy(p.mean(0), log=torch.log2)),
    ),
    global_bits=(
        "global uses the logarithm to base 2",
        lambda p: both(p, global_=lambda p: entropy(p.mean(0), log=torch.log2)),
    ),
    summed=("local is summed over the tokens", lambda p: both(p, lambda p: entropy(p).sum())),
    negative=("local has the wrong sign", lambda p: [-part for part in both(p)]),
    loss_of_global=(
        "global has the wrong sign",
        lambda p: both(p, global_=lambda p: -entropy(p.mean(0))),
    ),
    mean_of_all=(
        "local averages over the experts: an",
        lambda p: both(p, lambda p: -torch.xlogy(p, p).mean()),
    ),
    mean_of_global=(
        "global averages over the experts: an",
        lambda p: both(p, global_=lambda p: -torch.xlogy(p.mean(0), p.mean(0)).mean()),
    ),
    wrong_axis=(
        "local sums over the tokens and averages",
        lambda p: both(p, lambda p: entropy(p, 0).mean()),
    ),
    divided_by_log_e=(
        "local is divided by ln E",
        lambda p: [part / math.log(p.size(-1)) for part in both(p)],
    ),
    both_of_the_mean=(
        "local is the entropy of the mean",
        lambda p: both(p, lambda p: entropy(p.mean(0))),
    ),
    both_means=(
        "global is the mean of the entropies",
        lambda p: both(p, global_=lambda p: entropy(p).mean()),
    ),
    global_of_the_sum=(
        "global sums the probabilities",
        lambda p: both(p, global_=lambda p: entropy(p.sum(0))),
    ),
    global_over_experts=(
        "global averages over the experts, and not",
        lambda p: both(p, global_=lambda p: entropy(p.mean(-1))),
    ),
    softmax=("local applies a softmax again", lambda p: both(p.softmax(-1))),
    softmax_of_sum=(
        "global applies a softmax to the sum",
        lambda p: both(p, global_=lambda p: entropy(p.sum(0).softmax(-1))),
    ),
    softmax_of_mean=(
        "global applies a softmax again",
        lambda p: both(p, global_=lambda p: entropy(p.mean(0).softmax(-1))),
    ),
    nan_in_local=(
        "local is nan where each token has probability 1 for one",
        lambda p: both(p, lambda p: entropy_with_nan(p).mean()),
    ),
    nan_in_global=(
        "global is nan where all tokens have probability 1 for the same",
        lambda p: both(p, global_=lambda p: entropy_with_nan(p.mean(0))),
    ),
    large_epsilon=(
        "local is .* off: do you add a small number",
        lambda p: both(p, lambda p: -(p * (p + 1e-5).log()).sum(-1).mean()),
    ),
    median=(
        r"local gives \d\.\d+, but \d\.\d+ is correct",
        lambda p: both(p, lambda p: entropy(p).median()),
    ),
    detached=("no gradient reaches probs|no gradient flows", lambda p: both(p.detach())),
    half_detached=(
        "gradient of probs is not",
        lambda p: both(p, lambda p: -(p.detach() * p.clamp(min=1e-30).log()).sum(-1).mean()),
    ),
    not_averaged=(r"\(local\): take the mean over the tokens", lambda p: both(p, entropy)),
    not_summed=(
        r"\(global\): sum over the experts",
        lambda p: both(p, global_=lambda p: p.mean(0)),
    ),
    returns_one_tensor=(
        "returns a Tensor, not the 2 tensors local, global",
        lambda p: entropy(p).mean(),
    ),
    returns_float32=("turns float64 into float32", lambda p: [part.float() for part in both(p)]),
    in_place=("argument number 1 in place", lambda p: both(p.clamp_(min=1e-3))),
    needs_five_experts=(
        "raises IndexError.*where there is one expert",
        lambda p: both(p, lambda p: entropy(p + 0 * p[:, 4:5]).mean() + 0 * p[0, 4]),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_03.STEPS, step, message, function)
