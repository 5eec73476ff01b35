"""The grader of lesson 03 finds in each wrong loss the mistake that is in it: steps 1, 2 and 5."""

import math
from pathlib import Path

import check_03
import grade
import pytest
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import WrongAnswers

right = grade.load_file(Path(check_03.__file__).with_name("03_solutions.py"))
WRONG = WrongAnswers()
wrong, wrongs = WRONG.register, WRONG.register_all
INF = math.inf

# ---- step 1 ----------------------------------------------------------------------------------------------------------------


def numbers(x):
    return torch.arange(len(x))


def nll(logits):
    return F.cross_entropy(logits, numbers(logits))


def two(a, b, scale, left=nll, other=None):
    """The loss with one of its directions, or both, replaced."""
    logits = scale * right.similarities(a, b)
    return (left(logits) + (other or left)(logits.T)) / 2


def each(x):
    return F.cross_entropy(x, numbers(x), reduction="none")


def own_exp(x):
    return -(x.exp().diag() / x.exp().sum(-1)).log().mean()


def with_epsilon(x):
    return -(x.softmax(-1).diag() + 1e-6).log().mean()


def all_but_own(x):
    return (x.exp().sum(-1) - x.exp().diag()).log().mean() - x.diag().mean()


def zeros(x):
    return F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long))


def matched(x):
    """The most similar one is taken for the partner: what the loss should find out is given to it."""
    return F.cross_entropy(x, x.argmax(-1))


A_ALONE, B_ALONE = (
    "^only a looks for its b: each b must look for its a too[^;]*$",
    "^only b looks for its a[^;]*$",
)
wrongs(
    "contrastive_loss",
    one_direction=(A_ALONE, lambda a, b, t: nll(t * a @ b.T)),
    not_transposed=(A_ALONE, lambda a, b, t: (nll(t * a @ b.T) + nll(t * a @ b.T)) / 2),
    other_direction=(B_ALONE, lambda a, b, t: nll(t * b @ a.T)),
    softmax_over_rows_twice=(B_ALONE, lambda a, b, t: -(t * a @ b.T).log_softmax(0).diag().mean()),
    not_transposed_nor_halved=(
        "only a looks.*; the two directions are added, not av",
        lambda a, b, t: 2 * nll(t * a @ b.T),
    ),
    halved=("only a looks.*; half of it", lambda a, b, t: nll(t * a @ b.T) / 2),
    added=(
        "^the two directions are added, not averaged$",
        lambda *a: 2 * right.contrastive_loss(*a),
    ),
    no_scale=("^the scale is ignored$", lambda a, b, t: right.contrastive_loss(a, b, 1)),
    divided=("^divides by the scale", lambda a, b, t: right.contrastive_loss(a, b, 1 / t)),
    no_scale_one_direction=("^the scale is ignored; only a looks", lambda a, b, t: nll(a @ b.T)),
    normalised=(
        "makes the lengths 1 again",
        lambda a, b, t: right.contrastive_loss(F.normalize(a), F.normalize(b), t),
    ),
    normalised_b=(
        "makes the lengths 1 again",
        lambda a, b, t: right.contrastive_loss(a, F.normalize(b), t),
    ),
    transposes_averaged=(
        "averaged before the softmax",
        lambda a, b, t: nll(t * (a @ b.T + b @ a.T) / 2),
    ),
    target_zero=(
        "where its partner stands .the diagonal., and not number 0",
        lambda *a: two(*a, zeros),
    ),
    target_turned=(
        "they are turned round",
        lambda *a: two(*a, lambda x: F.cross_entropy(x, numbers(x).flip(0))),
    ),
    target_next=(
        r"\(the diagonal\): the loss is \d",
        lambda *a: two(*a, lambda x: F.cross_entropy(x, numbers(x).roll(1))),
    ),
    target_from_one=(
        "raises IndexError.*out of bounds",
        lambda *a: two(*a, lambda x: F.cross_entropy(x, numbers(x) + 1)),
    ),
    target_best=(r"gives \d\.\d+ where it should give", lambda *a: two(*a, matched)),
    over_b_squared=("divided by B.2", lambda *a: right.contrastive_loss(*a) / len(a[0])),
    mean_of_masked=(
        "divided by B.2",
        lambda *a: two(*a, lambda x: -(x.log_softmax(-1) * torch.eye(len(x)).to(x)).mean()),
    ),
    summed=("^summed over the pairs", lambda *a: len(a[0]) * right.contrastive_loss(*a)),
    summed_twice=(
        "^the two directions are added, and over",
        lambda *a: 2 * len(a[0]) * right.contrastive_loss(*a),
    ),
    negative=("the sign is turned: it falls", lambda *a: -right.contrastive_loss(*a)),
    bits=("the logarithm has the base 2", lambda *a: right.contrastive_loss(*a) / math.log(2)),
    distances=("are distances", lambda a, b, t: right.contrastive_loss(a, b, -t)),
    a_alone=("compares a with a", lambda a, b, t: right.contrastive_loss(a, a, t)),
    b_alone=("compares b with b", lambda a, b, t: right.contrastive_loss(b, b, t)),
    two_softmaxes=("softmax is taken twice", lambda *a: two(*a, lambda x: nll(x.softmax(-1)))),
    no_logarithm=(
        "there is no logarithm",
        lambda *a: two(*a, lambda x: F.nll_loss(x.softmax(-1), numbers(x))),
    ),
    own_missing=("the own partner is missing", lambda *a: two(*a, all_but_own)),
    whole_matrix=(
        "one softmax over the whole matrix",
        lambda *a: two(*a, lambda x: x.flatten().logsumexp(0) - x.diag().mean()),
    ),
    own_exp=("overflows at a scale of 100 in fp32: it is (nan|inf)", lambda *a: two(*a, own_exp)),
    log_of_softmax=(
        "underflows in fp32",
        lambda *a: two(*a, lambda x: -x.softmax(-1).log().diag().mean()),
    ),
    epsilon=(r"\de-\d\d off: is something added", lambda *a: two(*a, with_epsilon)),
    in_its_dtype=(
        "in bf16, similarities near 1",
        lambda a, b, t: (nll(t * a @ b.T) + nll(t * b @ a.T)) / 2,
    ),
    widened_too_late=(
        "in bf16, similarities near 1",
        lambda a, b, t: two(a @ b.T, torch.eye(len(b), dtype=a.dtype), t),
    ),
    eight_pairs=(
        "raises .*for one pair",
        lambda *a: two(*a, lambda x: F.cross_entropy(x, torch.arange(8))),
    ),
    one_pair_left_out=(
        "wrong for two pairs",
        lambda *a: right.contrastive_loss(*a) * (len(a[0]) != 2),
    ),
    scale_detached=(
        "no gradient reaches scale",
        lambda a, b, t: right.contrastive_loss(a, b, torch.as_tensor(t).detach()),
    ),
    a_detached=("no gradient reaches a", lambda a, b, t: right.contrastive_loss(a.detach(), b, t)),
    half_detached=(
        "gradient of b is not",
        lambda a, b, t: (nll(t * a @ b.T) + nll((t * a @ b.detach().T).T)) / 2,
    ),
    detached=("no gradient flows at all", lambda *a: right.contrastive_loss(*a).detach()),
    always_float=("turns float64 into float32", lambda *a: right.contrastive_loss(*a).float()),
    not_averaged=("one for each item, of which you want", lambda *a: two(*a, each)),
    a_matrix=("one for each a and b", lambda a, b, t: t * a @ b.T),
    a_number=("returns a float, not a tensor", lambda *a: right.contrastive_loss(*a).item()),
    in_place=(
        "argument number 1 in place",
        lambda a, b, t: right.contrastive_loss(F.normalize(a.mul_(2)), b, t),
    ),
)

# ---- step 2 ------------------------------------------------------------------------------------------------------------------


def twins(ids):
    return (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)


def masked(a, b, scale, ids, value=-INF, mask=twins):
    return two(a, b, scale, lambda x: nll(x.masked_fill(mask(ids), value)))


def alike(ids):
    return ids[:, None] == ids


def soft(a, b, scale, ids, divide=True):
    share = alike(ids).to(a)
    share = share / share.sum(-1, keepdim=True) if divide else share
    return two(a, b, scale, lambda x: F.cross_entropy(x, share))


def any_of_them(a, b, scale, ids):
    return two(a, b, scale, lambda x: -(x.softmax(-1) * alike(ids)).sum(-1).log().mean())


def one_way(a, b, scale, ids, turned=False):
    if turned:
        a, b = b, a
    return two(a, b, scale, lambda x: nll(x.masked_fill(twins(ids), -INF)), nll)


def without(a, b, scale, ids, rivals_too):
    alone = ~twins(ids).any(-1)
    if rivals_too:
        return right.contrastive_loss(a[alone], b[alone], scale)
    return two(a, b, scale, lambda x: each(x)[alone].mean())


def first_of_each(a, b, scale, ids):
    kept = ~twins(ids).tril().any(-1)
    return right.contrastive_loss(a[kept], b[kept], scale)


def next_to_each_other(ids):
    beside = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i in range(len(ids) - 1):
        beside[i, i + 1] = beside[i + 1, i] = ids[i] == ids[i + 1]
    return beside


def from_zero_on(ids):
    return twins(ids) & (ids >= 0)


def by_one_hot(ids):
    kind = F.one_hot(ids)
    return (kind @ kind.T).bool() & twins(ids)


AS_PARTNERS = "twins are made partners"
wrongs(
    "with_twins",
    no_ids=("does not change with `ids`", lambda a, b, t, ids: right.contrastive_loss(a, b, t)),
    beside=("does not change with `ids`", lambda *a: masked(*a, mask=next_to_each_other)),
    own_too=("the own partner is hidden too", lambda *a: masked(*a, mask=alike)),
    own_too_by_a_number=(
        "the own partner is hidden too",
        lambda *a: masked(*a, value=-1e9, mask=alike),
    ),
    own_missing=(
        "the own partner is missing",
        lambda a, b, t, ids: two(
            a, b, t, lambda x: (x.masked_fill(alike(ids), -INF).logsumexp(-1) - x.diag()).mean()
        ),
    ),
    zero=(
        r"^the logits of twins are set to 0, and exp\(0\) = 1 stays",
        lambda *a: masked(*a, value=0),
    ),
    multiplied=(
        r"^the logits of twins are set to 0, and exp\(0\) = 1 stays",
        lambda a, b, t, ids: two(a, b, t, lambda x: nll(x * ~twins(ids))),
    ),
    least_similarity=("set to -1, and exp", lambda a, b, t, ids: masked(a, b, t, ids, value=-t)),
    infinity_multiplied=(
        "is NaN: 0 . -inf is NaN",
        lambda a, b, t, ids: two(a, b, t, lambda x: nll(x + twins(ids) * -INF)),
    ),
    soft=(AS_PARTNERS, soft),
    soft_not_divided=(AS_PARTNERS, lambda *a: soft(*a, divide=False)),
    any_of_them=(AS_PARTNERS, any_of_them),
    rows_alone=("in one direction alone: b -> a still", one_way),
    columns_alone=("in one direction alone: a -> b still", lambda *a: one_way(*a, turned=True)),
    turned=(
        "it is the others that are left out",
        lambda *a: masked(*a, mask=lambda ids: ids[:, None] != ids),
    ),
    left_out=("leaves out the items that have twins", lambda *a: without(*a, rivals_too=True)),
    rows_left_out=(
        "leaves out the items that have twins",
        lambda *a: without(*a, rivals_too=False),
    ),
    first_of_each=("keeps the first item of each id alone", first_of_each),
    one_direction=(
        "^only a looks for its b[^;]*$",
        lambda a, b, t, ids: nll((t * a @ b.T).masked_fill(twins(ids), -INF)),
    ),
    added=("^the two directions are added", lambda *a: 2 * right.with_twins(*a)),
    no_scale=("^the scale is ignored", lambda a, b, t, ids: right.with_twins(a, b, 1, ids)),
    zero_and_one_direction=(
        "^only a looks for its b.*; the logits of twins are set to 0",
        lambda a, b, t, ids: nll((t * a @ b.T).masked_fill(twins(ids), 0)),
    ),
    negative_ids=("wrong for ids that are negative", lambda *a: masked(*a, mask=from_zero_on)),
    one_hot=("raises .*for ids that are negative", lambda *a: masked(*a, mask=by_one_hot)),
    normalised=(
        "makes the lengths 1 again",
        lambda a, b, *c: right.with_twins(F.normalize(a), F.normalize(b), *c),
    ),
    own_exp=(
        "overflows at a scale of 100",
        lambda a, b, t, ids: two(
            a, b, t, lambda x: -(x.exp().diag() / (x.exp() * ~twins(ids)).sum(-1)).log().mean()
        ),
    ),
    ids_changed=(
        "argument number 4 in place",
        lambda a, b, t, ids: right.with_twins(a, b, t, ids.add_(1)),
    ),
)

# ---- step 5 ------------------------------------------------------------------------------------------------------------------


def signs(x):
    return 2 * torch.eye(len(x)).to(x) - 1


def judged(
    a,
    b,
    scale,
    bias,
    of=lambda x: F.logsigmoid(signs(x) * x),
    logits=lambda s, scale, bias: scale * s + bias,
):
    """The loss with a part of it replaced."""
    return -of(logits(a @ b.T, scale, bias)).sum() / len(a)


def halves(x):
    """log p for partners, log(1 - p) for the others."""
    own = torch.eye(len(x), dtype=torch.bool)
    return torch.where(own, x.sigmoid().log(), (1 - x.sigmoid()).log())


wrongs(
    "sigmoid_loss",
    over_b_squared=("^the mean over all B.2 pairs", lambda *a: right.sigmoid_loss(*a) / len(a[0])),
    bce_mean=(
        "^the mean over all B.2 pairs",
        lambda a, b, t, c: F.binary_cross_entropy_with_logits(
            t * a @ b.T + c, torch.eye(len(a)).to(a)
        ),
    ),
    summed=("the sum is not divided by B", lambda *a: right.sigmoid_loss(*a) * len(a[0])),
    halved=("halved: there is one sum", lambda *a: right.sigmoid_loss(*a) / 2),
    negative=("^the sign is turned: log sigmoid", lambda *a: -right.sigmoid_loss(*a)),
    bits=("has the base 2", lambda *a: right.sigmoid_loss(*a) / math.log(2)),
    z_turned=("z is turned", lambda *a: judged(*a, of=lambda x: F.logsigmoid(-signs(x) * x))),
    z_one=("z is 1 everywhere", lambda *a: judged(*a, of=F.logsigmoid)),
    z_zero=(
        "z is 0 for pairs",
        lambda *a: judged(*a, of=lambda x: F.logsigmoid(torch.eye(len(x)).to(x) * x)),
    ),
    partners_alone=(
        "only the partners count",
        lambda *a: judged(*a, of=lambda x: F.logsigmoid(x).diag()),
    ),
    others_alone=(
        "only the pairs that do not",
        lambda *a: judged(*a, of=lambda x: F.logsigmoid(-x) * (1 - torch.eye(len(x)).to(x))),
    ),
    bias_subtracted=("the bias is subtracted", lambda a, b, t, c: right.sigmoid_loss(a, b, t, -c)),
    no_bias=("the bias is ignored", lambda a, b, t, c: right.sigmoid_loss(a, b, t, 0)),
    bias_scaled=(
        "the scale multiplies the bias too",
        lambda *a: judged(*a, logits=lambda s, t, c: t * (s + c)),
    ),
    bias_outside=(
        "z does not turn the bias",
        lambda *a: judged(*a, of=F.logsigmoid, logits=lambda s, t, c: signs(s) * t * s + c),
    ),
    no_scale=("the scale is ignored", lambda a, b, t, c: right.sigmoid_loss(a, b, 1, c)),
    divided=("divides by the scale", lambda a, b, t, c: right.sigmoid_loss(a, b, 1 / t, c)),
    no_logarithm=(
        "there is no logarithm",
        lambda *a: judged(*a, of=lambda x: (signs(x) * x).sigmoid()),
    ),
    no_sigmoid=("there is no sigmoid", lambda *a: judged(*a, of=lambda x: signs(x) * x)),
    softmax=(
        "softmax in place of sigmoid",
        lambda *a: judged(*a, of=lambda x: x.log_softmax(-1).diag()),
    ),
    balanced=(
        r"gives \d\.\d+ where it should give",
        lambda *a: judged(
            *a, of=lambda x: F.logsigmoid(signs(x) * x) * (torch.eye(len(x)).to(x) + 1 / len(x))
        ),
    ),
    unstable=(
        "is inf in fp32.*logsigmoid takes both",
        lambda *a: judged(*a, of=lambda x: (signs(x) * x).sigmoid().log()),
    ),
    unstable_halves=("is inf in fp32.*logsigmoid takes both", lambda *a: judged(*a, of=halves)),
    own_exp=(
        "is inf in fp32.*logsigmoid takes both",
        lambda *a: judged(*a, of=lambda x: -(1 + (-signs(x) * x).exp()).log()),
    ),
    epsilon=(
        "off: is something added",
        lambda *a: judged(*a, of=lambda x: ((signs(x) * x).sigmoid() + 1e-8).log()),
    ),
    normalised=(
        "makes the lengths 1 again",
        lambda a, b, *c: right.sigmoid_loss(F.normalize(a), F.normalize(b), *c),
    ),
    bias_detached=(
        "no gradient reaches bias",
        lambda a, b, t, c: right.sigmoid_loss(a, b, t, torch.as_tensor(c).detach()),
    ),
    eight_pairs=(
        "wrong for one pair",
        lambda *a: judged(*a, of=lambda x: F.logsigmoid((2 * torch.eye(8) - 1) * x[:, :8])),
    ),
    always_float=("turns float64 into float32", lambda *a: right.sigmoid_loss(*a).float()),
    each_pair=("one for each a and b", lambda a, b, t, c: t * a @ b.T + c),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_mistake_gets_the_message_meant_for_it(step, message, function):
    WRONG.assert_diagnosis(check_03.STEPS, step, message, function)
