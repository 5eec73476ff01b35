"""The grader of lesson 03 diagnoses each wrong loss: steps 1, 2 and 5."""

import math
from pathlib import Path

import grade
import pytest
import steps_03
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_03.__file__).with_name("03_solutions.py"))
WRONG = WrongAnswers()
register_all = WRONG.register_all
INF = math.inf

# ---- step 1: contrastive_loss --------------------------------------------------------------------


def labels(x):
    return torch.arange(len(x))


def cross_entropy_of_rows(logits):
    return F.cross_entropy(logits, labels(logits))


def symmetric(a, b, scale, a_to_b=cross_entropy_of_rows, b_to_a=None):
    """Return the loss with one of its directions, or both, replaced."""
    logits = scale * solutions.similarities(a, b)
    return (a_to_b(logits) + (b_to_a or a_to_b)(logits.T)) / 2


def loss_of_squared_distances(a, b, scale):
    logits = -scale * (a[:, None] - b).square().sum(-1) / 2  # for length 1: dot products - 1
    return (cross_entropy_of_rows(logits) + cross_entropy_of_rows(logits.T)) / 2


def loss_of_each_row(x):
    return F.cross_entropy(x, labels(x), reduction="none")


def with_plain_exp(x):
    return -(x.exp().diag() / x.exp().sum(-1)).log().mean()


def with_epsilon(x):
    return -(x.softmax(-1).diag() + 1e-6).log().mean()


def without_positive(x):
    return (x.exp().sum(-1) - x.exp().diag()).log().mean() - x.diag().mean()


def labels_zero(x):
    return F.cross_entropy(x, torch.zeros(len(x), dtype=torch.long))


def labels_by_argmax(x):
    """Take the most similar b as the positive, which makes the loss trivial."""
    return F.cross_entropy(x, x.argmax(-1))


ONLY_A_TO_B = "^only a is matched to b: compute the other direction too[^;]*$"
ONLY_B_TO_A = "^only b is matched to a[^;]*$"
register_all(
    "contrastive_loss",
    one_direction=(ONLY_A_TO_B, lambda a, b, t: cross_entropy_of_rows(t * a @ b.T)),
    not_transposed=(
        ONLY_A_TO_B,
        lambda a, b, t: (
            (cross_entropy_of_rows(t * a @ b.T) + cross_entropy_of_rows(t * a @ b.T)) / 2
        ),
    ),
    other_direction=(ONLY_B_TO_A, lambda a, b, t: cross_entropy_of_rows(t * b @ a.T)),
    softmax_over_rows_twice=(
        ONLY_B_TO_A,
        lambda a, b, t: -(t * a @ b.T).log_softmax(0).diag().mean(),
    ),
    not_transposed_nor_halved=(
        "only a is matched.*; the two directions are added: av",
        lambda a, b, t: 2 * cross_entropy_of_rows(t * a @ b.T),
    ),
    halved=(
        "only a is matched.*; half the loss",
        lambda a, b, t: cross_entropy_of_rows(t * a @ b.T) / 2,
    ),
    added=(
        "^the two directions are added: average them$",
        lambda *a: 2 * solutions.contrastive_loss(*a),
    ),
    no_scale=("^the scale is ignored$", lambda a, b, t: solutions.contrastive_loss(a, b, 1)),
    divided=("^divides by the scale", lambda a, b, t: solutions.contrastive_loss(a, b, 1 / t)),
    no_scale_one_direction=(
        "^the scale is ignored; only a is matched",
        lambda a, b, t: cross_entropy_of_rows(a @ b.T),
    ),
    normalised=(
        "right for embeddings of length 1 only",
        lambda a, b, t: solutions.contrastive_loss(F.normalize(a), F.normalize(b), t),
    ),
    normalised_b=(
        "right for embeddings of length 1 only",
        lambda a, b, t: solutions.contrastive_loss(a, F.normalize(b), t),
    ),
    squared_distances=("right for embeddings of length 1 only", loss_of_squared_distances),
    transposes_averaged=(
        "averaged before the softmax",
        lambda a, b, t: cross_entropy_of_rows(t * (a @ b.T + b @ a.T) / 2),
    ),
    label_zero=(
        "because its positive is on the diagonal, not 0",
        lambda *a: symmetric(*a, labels_zero),
    ),
    label_reversed=(
        "on the diagonal: the labels are in reverse order",
        lambda *a: symmetric(*a, lambda x: F.cross_entropy(x, labels(x).flip(0))),
    ),
    label_next=(
        r"is on the diagonal: the loss is \d",
        lambda *a: symmetric(*a, lambda x: F.cross_entropy(x, labels(x).roll(1))),
    ),
    label_from_one=(
        "raises IndexError.*out of bounds",
        lambda *a: symmetric(*a, lambda x: F.cross_entropy(x, labels(x) + 1)),
    ),
    label_by_argmax=(
        r"gives \d\.\d+, but \d\.\d+ is correct",
        lambda *a: symmetric(*a, labels_by_argmax),
    ),
    over_b_squared=("divided by B.2", lambda *a: solutions.contrastive_loss(*a) / len(a[0])),
    mean_of_masked=(
        "divided by B.2",
        lambda *a: symmetric(*a, lambda x: -(x.log_softmax(-1) * torch.eye(len(x)).to(x)).mean()),
    ),
    summed=("^summed over the pairs", lambda *a: len(a[0]) * solutions.contrastive_loss(*a)),
    summed_twice=(
        "^the two directions are added and the pairs",
        lambda *a: 2 * len(a[0]) * solutions.contrastive_loss(*a),
    ),
    negative=("the sign is wrong: the loss decreases", lambda *a: -solutions.contrastive_loss(*a)),
    bits=("the logarithm has base 2", lambda *a: solutions.contrastive_loss(*a) / math.log(2)),
    distances=(
        "have the wrong sign, as distances",
        lambda a, b, t: solutions.contrastive_loss(a, b, -t),
    ),
    only_a=("compares a with a", lambda a, b, t: solutions.contrastive_loss(a, a, t)),
    only_b=("compares b with b", lambda a, b, t: solutions.contrastive_loss(b, b, t)),
    two_softmaxes=(
        "softmax is applied twice",
        lambda *a: symmetric(*a, lambda x: cross_entropy_of_rows(x.softmax(-1))),
    ),
    no_logarithm=(
        "there is no logarithm",
        lambda *a: symmetric(*a, lambda x: F.nll_loss(x.softmax(-1), labels(x))),
    ),
    positive_missing=("the positive is missing", lambda *a: symmetric(*a, without_positive)),
    whole_matrix=(
        "one softmax over the whole matrix",
        lambda *a: symmetric(*a, lambda x: x.flatten().logsumexp(0) - x.diag().mean()),
    ),
    plain_exp=(
        "overflows at a scale of 100 in fp32: it is (nan|inf)",
        lambda *a: symmetric(*a, with_plain_exp),
    ),
    log_of_softmax=(
        "underflows in fp32",
        lambda *a: symmetric(*a, lambda x: -x.softmax(-1).log().diag().mean()),
    ),
    epsilon=(r"\de-\d\d off: do you add a small number", lambda *a: symmetric(*a, with_epsilon)),
    in_bf16=(
        "in bf16, similarities near 1",
        lambda a, b, t: (
            (cross_entropy_of_rows(t * a @ b.T) + cross_entropy_of_rows(t * b @ a.T)) / 2
        ),
    ),
    converted_too_late=(
        "in bf16, similarities near 1",
        lambda a, b, t: symmetric(a @ b.T, torch.eye(len(b), dtype=a.dtype), t),
    ),
    fixed_batch_size=(
        "raises .*for one pair",
        lambda *a: symmetric(*a, lambda x: F.cross_entropy(x, torch.arange(8))),
    ),
    wrong_for_two_pairs=(
        "wrong for two pairs",
        lambda *a: solutions.contrastive_loss(*a) * (len(a[0]) != 2),
    ),
    scale_detached=(
        "no gradient reaches scale",
        lambda a, b, t: solutions.contrastive_loss(a, b, torch.as_tensor(t).detach()),
    ),
    a_detached=(
        "no gradient reaches a",
        lambda a, b, t: solutions.contrastive_loss(a.detach(), b, t),
    ),
    half_detached=(
        "gradient of b is not",
        lambda a, b, t: (
            (cross_entropy_of_rows(t * a @ b.T) + cross_entropy_of_rows((t * a @ b.detach().T).T))
            / 2
        ),
    ),
    detached=("no gradient flows at all", lambda *a: solutions.contrastive_loss(*a).detach()),
    returns_float32=(
        "turns float64 into float32",
        lambda *a: solutions.contrastive_loss(*a).float(),
    ),
    not_averaged=("one number for each example; take", lambda *a: symmetric(*a, loss_of_each_row)),
    returns_a_matrix=("one number for each a and b", lambda a, b, t: t * a @ b.T),
    returns_a_float=(
        "returns a float, not a tensor",
        lambda *a: solutions.contrastive_loss(*a).item(),
    ),
    in_place=(
        "argument number 1 in place",
        lambda a, b, t: solutions.contrastive_loss(F.normalize(a.mul_(2)), b, t),
    ),
)

# ---- step 2: loss_with_duplicates ----------------------------------------------------------------


def is_duplicate(ids):
    return (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)


def masked(a, b, scale, ids, value=-INF, mask=is_duplicate):
    return symmetric(a, b, scale, lambda x: cross_entropy_of_rows(x.masked_fill(mask(ids), value)))


def is_same(ids):
    return ids[:, None] == ids


def soft_labels(a, b, scale, ids, divide=True, dtype=torch.float64):
    share = is_same(ids).to(dtype)
    share = share / share.sum(-1, keepdim=True) if divide else share
    return symmetric(a, b, scale, lambda x: F.cross_entropy(x, share))


def any_positive(a, b, scale, ids):
    return symmetric(a, b, scale, lambda x: -(x.softmax(-1) * is_same(ids)).sum(-1).log().mean())


def one_direction(a, b, scale, ids, swapped=False):
    if swapped:
        a, b = b, a
    return symmetric(
        a,
        b,
        scale,
        lambda x: cross_entropy_of_rows(x.masked_fill(is_duplicate(ids), -INF)),
        cross_entropy_of_rows,
    )


def dropped(a, b, scale, ids, columns_too):
    unique = ~is_duplicate(ids).any(-1)
    if columns_too:
        return solutions.contrastive_loss(a[unique], b[unique], scale)
    return symmetric(a, b, scale, lambda x: loss_of_each_row(x)[unique].mean())


def first_of_each(a, b, scale, ids):
    is_first = ~is_duplicate(ids).tril().any(-1)
    return solutions.contrastive_loss(a[is_first], b[is_first], scale)


def is_adjacent_duplicate(ids):
    adjacent = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i in range(len(ids) - 1):
        adjacent[i, i + 1] = adjacent[i + 1, i] = ids[i] == ids[i + 1]
    return adjacent


def not_negative(ids):
    return is_duplicate(ids) & (ids >= 0)


def by_one_hot(ids):
    kind = F.one_hot(ids)
    return (kind @ kind.T).bool() & is_duplicate(ids)


AS_POSITIVES = "duplicates are used as positives"
register_all(
    "loss_with_duplicates",
    no_ids=("does not depend on `ids`", lambda a, b, t, ids: solutions.contrastive_loss(a, b, t)),
    adjacent_only=("does not depend on `ids`", lambda *a: masked(*a, mask=is_adjacent_duplicate)),
    positive_too=("the positive is masked too", lambda *a: masked(*a, mask=is_same)),
    positive_too_by_a_number=(
        "the positive is masked too",
        lambda *a: masked(*a, value=-1e9, mask=is_same),
    ),
    positive_missing=(
        "the positive is missing",
        lambda a, b, t, ids: symmetric(
            a, b, t, lambda x: (x.masked_fill(is_same(ids), -INF).logsumexp(-1) - x.diag()).mean()
        ),
    ),
    zero=(
        r"^the logits of duplicates are set to 0, so exp\(0\) = 1 stays",
        lambda *a: masked(*a, value=0),
    ),
    multiplied=(
        r"^the logits of duplicates are set to 0, so exp\(0\) = 1 stays",
        lambda a, b, t, ids: symmetric(
            a, b, t, lambda x: cross_entropy_of_rows(x * ~is_duplicate(ids))
        ),
    ),
    min_similarity=("set to -1, so exp", lambda a, b, t, ids: masked(a, b, t, ids, value=-t)),
    infinity_multiplied=(
        "is NaN: 0 . -inf is NaN",
        lambda a, b, t, ids: symmetric(
            a, b, t, lambda x: cross_entropy_of_rows(x + is_duplicate(ids) * -INF)
        ),
    ),
    soft_labels=(AS_POSITIVES, soft_labels),
    soft_labels_in_fp32=(AS_POSITIVES, lambda *a: soft_labels(*a, dtype=torch.float32)),
    soft_labels_not_divided=(AS_POSITIVES, lambda *a: soft_labels(*a, divide=False)),
    any_positive=(AS_POSITIVES, any_positive),
    rows_only=("in one direction only: b -> a still", one_direction),
    columns_only=(
        "in one direction only: a -> b still",
        lambda *a: one_direction(*a, swapped=True),
    ),
    inverted=(
        "the mask is inverted",
        lambda *a: masked(*a, mask=lambda ids: ids[:, None] != ids),
    ),
    dropped=("drops the examples that have duplicates", lambda *a: dropped(*a, columns_too=True)),
    rows_dropped=(
        "drops the examples that have duplicates",
        lambda *a: dropped(*a, columns_too=False),
    ),
    first_of_each=("keeps only the first example of each id", first_of_each),
    one_direction=(
        "^only a is matched to b[^;]*$",
        lambda a, b, t, ids: cross_entropy_of_rows(
            (t * a @ b.T).masked_fill(is_duplicate(ids), -INF)
        ),
    ),
    added=(
        "^the two directions are added: average them$",
        lambda *a: 2 * solutions.loss_with_duplicates(*a),
    ),
    no_scale=(
        "^the scale is ignored",
        lambda a, b, t, ids: solutions.loss_with_duplicates(a, b, 1, ids),
    ),
    zero_and_one_direction=(
        "^only a is matched to b.*; the logits of duplicates are set to 0",
        lambda a, b, t, ids: cross_entropy_of_rows((t * a @ b.T).masked_fill(is_duplicate(ids), 0)),
    ),
    negative_ids=("wrong for negative or large ids", lambda *a: masked(*a, mask=not_negative)),
    one_hot=("raises .*for negative or large ids", lambda *a: masked(*a, mask=by_one_hot)),
    normalised=(
        "right for embeddings of length 1 only",
        lambda a, b, *c: solutions.loss_with_duplicates(F.normalize(a), F.normalize(b), *c),
    ),
    plain_exp=(
        "overflows at a scale of 100",
        lambda a, b, t, ids: symmetric(
            a,
            b,
            t,
            lambda x: -(x.exp().diag() / (x.exp() * ~is_duplicate(ids)).sum(-1)).log().mean(),
        ),
    ),
    ids_changed=(
        "argument number 4 in place",
        lambda a, b, t, ids: solutions.loss_with_duplicates(a, b, t, ids.add_(1)),
    ),
)

# ---- step 5: sigmoid_loss ------------------------------------------------------------------------


def signs(x):
    return 2 * torch.eye(len(x)).to(x) - 1


def replaced(
    a,
    b,
    scale,
    bias,
    terms=lambda x: F.logsigmoid(signs(x) * x),
    logits=lambda s, scale, bias: scale * s + bias,
):
    """Return the loss with its terms or its logits replaced."""
    return -terms(logits(a @ b.T, scale, bias)).sum() / len(a)


def log_of_each_case(x):
    """Return log p for positives and log(1 - p) for negatives."""
    is_positive = torch.eye(len(x), dtype=torch.bool)
    return torch.where(is_positive, x.sigmoid().log(), (1 - x.sigmoid()).log())


register_all(
    "sigmoid_loss",
    over_b_squared=(
        "^the mean over all B.2 pairs",
        lambda *a: solutions.sigmoid_loss(*a) / len(a[0]),
    ),
    bce_mean=(
        "^the mean over all B.2 pairs",
        lambda a, b, t, c: F.binary_cross_entropy_with_logits(
            t * a @ b.T + c, torch.eye(len(a)).to(a)
        ),
    ),
    summed=("the sum is not divided by B", lambda *a: solutions.sigmoid_loss(*a) * len(a[0])),
    halved=("half the loss: there is one sum", lambda *a: solutions.sigmoid_loss(*a) / 2),
    negative=("^the sign is wrong: log sigmoid", lambda *a: -solutions.sigmoid_loss(*a)),
    bits=("has base 2", lambda *a: solutions.sigmoid_loss(*a) / math.log(2)),
    z_negated=(
        "z has the wrong sign",
        lambda *a: replaced(*a, terms=lambda x: F.logsigmoid(-signs(x) * x)),
    ),
    z_one=("z is 1 everywhere", lambda *a: replaced(*a, terms=F.logsigmoid)),
    z_zero=(
        "z is 0 for negatives",
        lambda *a: replaced(*a, terms=lambda x: F.logsigmoid(torch.eye(len(x)).to(x) * x)),
    ),
    only_positives=(
        "only the positives count",
        lambda *a: replaced(*a, terms=lambda x: F.logsigmoid(x).diag()),
    ),
    only_negatives=(
        "only the negatives count",
        lambda *a: replaced(*a, terms=lambda x: F.logsigmoid(-x) * (1 - torch.eye(len(x)).to(x))),
    ),
    bias_subtracted=(
        "the bias is subtracted",
        lambda a, b, t, c: solutions.sigmoid_loss(a, b, t, -c),
    ),
    no_bias=("the bias is ignored", lambda a, b, t, c: solutions.sigmoid_loss(a, b, t, 0)),
    bias_scaled=(
        "the scale multiplies the bias too",
        lambda *a: replaced(*a, logits=lambda s, t, c: t * (s + c)),
    ),
    bias_outside=(
        "z does not multiply the bias",
        lambda *a: replaced(*a, terms=F.logsigmoid, logits=lambda s, t, c: signs(s) * t * s + c),
    ),
    no_scale=("the scale is ignored", lambda a, b, t, c: solutions.sigmoid_loss(a, b, 1, c)),
    divided=("divides by the scale", lambda a, b, t, c: solutions.sigmoid_loss(a, b, 1 / t, c)),
    no_logarithm=(
        "there is no logarithm",
        lambda *a: replaced(*a, terms=lambda x: (signs(x) * x).sigmoid()),
    ),
    no_sigmoid=("there is no sigmoid", lambda *a: replaced(*a, terms=lambda x: signs(x) * x)),
    softmax=(
        "uses a softmax instead of a sigmoid",
        lambda *a: replaced(*a, terms=lambda x: x.log_softmax(-1).diag()),
    ),
    balanced=(
        r"gives \d\.\d+, but \d\.\d+ is correct",
        lambda *a: replaced(
            *a, terms=lambda x: F.logsigmoid(signs(x) * x) * (torch.eye(len(x)).to(x) + 1 / len(x))
        ),
    ),
    unstable=(
        "is inf in fp32.*logsigmoid does both",
        lambda *a: replaced(*a, terms=lambda x: (signs(x) * x).sigmoid().log()),
    ),
    unstable_cases=(
        "is inf in fp32.*logsigmoid does both",
        lambda *a: replaced(*a, terms=log_of_each_case),
    ),
    plain_exp=(
        "is inf in fp32.*logsigmoid does both",
        lambda *a: replaced(*a, terms=lambda x: -(1 + (-signs(x) * x).exp()).log()),
    ),
    epsilon=(
        "off: do you add a small number",
        lambda *a: replaced(*a, terms=lambda x: ((signs(x) * x).sigmoid() + 1e-8).log()),
    ),
    normalised_b=(
        "right for embeddings of length 1 only",
        lambda a, b, *c: solutions.sigmoid_loss(a, F.normalize(b), *c),
    ),
    normalised=(
        "right for embeddings of length 1 only",
        lambda a, b, *c: solutions.sigmoid_loss(F.normalize(a), F.normalize(b), *c),
    ),
    bias_detached=(
        "no gradient reaches bias",
        lambda a, b, t, c: solutions.sigmoid_loss(a, b, t, torch.as_tensor(c).detach()),
    ),
    fixed_batch_size=(
        "wrong for one pair",
        lambda *a: replaced(*a, terms=lambda x: F.logsigmoid((2 * torch.eye(8) - 1) * x[:, :8])),
    ),
    returns_float32=("turns float64 into float32", lambda *a: solutions.sigmoid_loss(*a).float()),
    returns_each_pair=("one number for each a and b", lambda a, b, t, c: t * a @ b.T + c),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_03.STEPS, step, message, function)
