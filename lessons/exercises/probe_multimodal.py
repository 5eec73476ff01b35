"""Experiments on a learner's contrastive losses. Each problem found raises a Mistake that names it.

A loss is one number and does not show how it was computed. So this file also computes the loss with
each known mistake, alone and combined with others. If one of these numbers equals the learner's,
the learner made that mistake.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from grade import (
    TOLERANCE,
    Answer,
    Mistake,
    different_digits,
    expect_dtype,
    expect_gradients,
    expect_shape,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

B, M, SCALE = 8, 6, 3.75  # SCALE is exact in fp32, in which a learner may hold it
IDS = torch.tensor([3, 0, 7, 3, 5, 0, 3, 1])  # one id three times, one twice, never adjacent

NOT_DOT_PRODUCTS = (
    "right for embeddings of length 1 only: do you normalise them again (the caller has done so),"
    " or compare distances? Use dot products, in which a longer embedding counts for more"
)

Loss = Callable[..., Tensor]
Axis = list[tuple[str, object]]  # (mistake, value); the correct value comes first, with mistake ""


def random_pairs(B: int = B, M: int = M, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return a, b (B, M) of length 1, in which a_i and b_i are similar."""
    generator = torch.Generator().manual_seed(seed)
    a, noise = torch.randn(2, B, M, generator=generator, dtype=torch.float64)
    return normalize(a), normalize(a + noise)


def lengths_of(x: Tensor) -> Tensor:
    """Return a different length (B, 1) for each row, between 1 and 2."""
    return 1 + torch.arange(1, len(x) + 1)[:, None] / len(x)


def scalar_answer(answer: Answer) -> Loss:
    """Return `answer` as a function that raises Mistake unless it returns a scalar."""

    def loss(a: Tensor, *rest: Tensor | float, when: str = "") -> Tensor:
        out = answer(a, *rest, when=when)
        n = len(a)
        hints = {
            (n,): ": one number for each example; take their mean",
            (n, n): ": one number for each a and b; return one number for all",
        }
        hint = f", {when}" if when else hints.get(tuple(out.shape), "")
        expect_shape(out, (), hint)
        return out

    return loss


def is_close(x: Tensor, y: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Return whether x and y differ by less than `tolerance`. False if one is NaN."""
    return bool((x - y).abs() < tolerance)


# ---- known mistakes ------------------------------------------------------------------------------


def raise_known_mistake(
    result: Tensor,
    compute: Callable[..., Tensor],
    *axes: Axis,
    tolerance: float = 1e-7,
) -> None:
    """Raise the smallest combination of mistakes that leads to `result`, if there is one.

    `compute` takes one value of each axis and returns a loss. The default tolerance allows for one
    fp32 number in the learner's computation, such as a label of 1/3.
    """
    combinations = sorted(
        product(*axes), key=lambda combination: sum(mistake != "" for mistake, _ in combination)
    )
    for combination in combinations:
        values = [value for _, value in combination]
        if is_close(result, compute(*values), tolerance):
            mistakes = [mistake for mistake, _ in combination if mistake]
            if mistakes:
                raise Mistake("; ".join(mistakes))
            return


def expect_value(result: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise Mistake unless `result` is close to `expected`."""
    if is_close(result, expected, tolerance):
        return
    error = (result - expected).abs()
    if error < 1e-3:
        raise Mistake(
            f"is {error:.1g} off: do you add a small number inside a logarithm? It prevents "
            "infinity, but it changes every other result"
        )
    given, right = different_digits(result, expected)
    raise Mistake(f"gives {given}, but {right} is correct")


def cross_entropy_of_rows(logits: Tensor) -> Tensor:
    """Return the loss of one direction: row i must find column i."""
    return cross_entropy(logits, torch.arange(len(logits)))


def symmetric(direction: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the mean of one direction's loss over the rows and over the columns."""
    return lambda logits: (direction(logits) + direction(logits.T)) / 2


def without_positive(logits: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Return the loss of one direction without the positive, or without `excluded`, in the sum."""
    if excluded is None:
        excluded = torch.eye(len(logits), dtype=torch.bool)
    return (logits.masked_fill(excluded, -math.inf).logsumexp(-1) - logits.diag()).mean()


ONE_DIRECTION = (
    "only {} is matched to {}: compute the other direction too, with the transposed matrix or the "
    "softmax over the other dimension"
)
A_TO_B, B_TO_A = ONE_DIRECTION.format("a", "b"), ONE_DIRECTION.format("b", "a")
SIMILARITIES = [
    ("", lambda a, b: a @ b.T),
    ("compares a with a: b is never used", lambda a, b: a @ a.T),
    ("compares b with b: a is never used", lambda a, b: b @ b.T),
    ("the similarities have the wrong sign, as distances have", lambda a, b: -(a @ b.T)),
]
SCALES = [
    ("", SCALE),
    ("the scale is ignored", 1.0),
    ("divides by the scale: it is 1 / temperature already, so multiply by it", 1 / SCALE),
]
LABEL = "the label of row i is i, because its positive is on the diagonal"
DIRECTIONS = [
    ("", symmetric(cross_entropy_of_rows)),
    (A_TO_B, cross_entropy_of_rows),
    (B_TO_A, lambda x: cross_entropy_of_rows(x.T)),
    (
        "the matrix and its transpose are averaged before the softmax: average the two losses",
        lambda x: cross_entropy_of_rows((x + x.T) / 2),
    ),
    (
        "the softmax is applied twice: cross_entropy includes one",
        symmetric(lambda x: cross_entropy_of_rows(x.softmax(-1))),
    ),
    (
        "there is no logarithm: nll_loss expects log_softmax",
        symmetric(lambda x: -x.softmax(-1).diag().mean()),
    ),
    ("the positive is missing from the sum over j", symmetric(without_positive)),
    (
        LABEL + ", not 0",
        symmetric(lambda x: cross_entropy(x, torch.zeros(len(x), dtype=torch.long))),
    ),
    (
        LABEL + ": the labels are in reverse order",
        symmetric(lambda x: cross_entropy(x, torch.arange(len(x)).flip(0))),
    ),
    (
        "one softmax over the whole matrix: each row needs a softmax of its own",
        lambda x: (x.flatten().logsumexp(0) - x.diag()).mean(),
    ),
]
FACTORS = [
    ("", 1),
    ("the two directions are added: average them", 2),
    ("half the loss: the mean over the directions is taken twice", 1 / 2),
    ("divided by B^2: each direction is the mean over B rows", 1 / B),
    ("summed over the pairs: take their mean", B),
    ("the two directions are added and the pairs are summed: take both means", 2 * B),
    ("the sign is wrong: the loss decreases as positives move apart", -1),
    ("the logarithm has base 2: use base e", 1 / math.log(2)),
]


# ---- step 1: the contrastive loss ----------------------------------------------------------------


def examine_loss(loss: Loss, reference: Loss) -> None:
    """Raise Mistake if `loss` differs from `reference`."""
    a, b = random_pairs()
    result = loss(a, b, SCALE)
    expect_dtype(result, a)

    def compute(similarity, scale, direction, factor) -> Tensor:
        return factor * direction(scale * similarity(a, b))

    raise_known_mistake(result, compute, SIMILARITIES, SCALES, DIRECTIONS, FACTORS)
    eye = torch.eye(B, dtype=torch.float64)
    perfect = loss(eye, eye, 20.0)
    if perfect > 1:
        raise Mistake(
            f"{LABEL}: the loss is {perfect:.2f} where a_i = b_i and all other pairs are "
            "orthogonal, but it should be 0"
        )
    expect_value(result, reference(a, b, SCALE))
    expect_robust(loss, reference)


def expect_robust(loss: Loss, reference: Loss) -> None:
    """Raise Mistake if `loss` fails on other lengths, shapes, gradients or precisions.

    Steps 1 and 2 share these tests. They assume that the loss of the first batch is correct.
    """
    a, b = random_pairs()
    for x, y in ((a * lengths_of(a), b), (a, b * lengths_of(b))):
        if not is_close(loss(x, y, SCALE), reference(x, y, SCALE)):
            raise Mistake(NOT_DOT_PRODUCTS)
    for when, (B1, M1) in {
        "one pair": (1, M),
        "two pairs": (2, M),
        "M = 1": (B, 1),
        "B = 12": (12, M),
    }.items():
        pairs = random_pairs(B1, M1)
        if not is_close(loss(*pairs, SCALE, when=f"for {when}"), reference(*pairs, SCALE)):
            raise Mistake(f"right in general, but wrong for {when}")
    scale = torch.tensor(SCALE, dtype=torch.float64)
    expect_gradients(loss, reference, {"a": a, "b": b, "scale": scale})
    expect_precise(loss, reference)


def expect_precise(loss: Loss, reference: Loss) -> None:
    """Raise Mistake if `loss` overflows, underflows or rounds too much in fp32 and bf16."""
    a, b = (x.float() for x in random_pairs())
    if not is_close(loss(a, b, SCALE, when="for fp32"), reference(a, b, SCALE), 1e-4):
        raise Mistake("right in fp64, but wrong in fp32")
    result = loss(a, a, 100.0, when="for a scale of 100")
    if not result.isfinite():
        raise Mistake(
            f"overflows at a scale of 100 in fp32: it is {result:.0f}, because exp(100) is "
            "infinite. Subtract the maximum of the row first, as logsumexp and cross_entropy do"
        )
    result = loss(a, -a, 100.0, when="for opposite embeddings")
    if not result.isfinite():
        raise Mistake(
            f"underflows in fp32 where positives are opposite: it is {result:.0f}, because a "
            "probability rounds to 0 before its logarithm is taken. log_softmax does both in one"
        )
    for other in (a, -a):
        if not is_close(loss(a, other, 100.0), reference(a, other, 100.0), 1e-2):
            raise Mistake("right in general, but wrong for a scale of 100 in fp32")
    # Positives have the similarity 1.0025, negatives 1: both are 1 in bf16.
    close = torch.eye(64) / 20
    close[:, 0] = 1
    close = close.bfloat16()
    result = loss(close, close, 100.0, when="for bf16")
    exact = reference(close.double(), close.double(), 100.0)
    if not is_close(result, exact, 0.03):
        raise Mistake(
            f"in bf16, similarities near 1 are rounded to 1: the loss is {result:.3f}, and the "
            f"exact loss is {exact:.3f}. Convert a and b to fp32 before you multiply them"
        )


# ---- step 2: duplicates --------------------------------------------------------------------------

IS_SAME = IDS[:, None] == IDS  # (B, B)
IS_DUPLICATE = IS_SAME & ~torch.eye(B, dtype=torch.bool)
HAS_DUPLICATE = IS_DUPLICATE.any(-1)  # (B,)
IS_FIRST = ~IS_DUPLICATE.tril().any(-1)  # the first example of each id


def mask_duplicates(logits: Tensor, value: float = -math.inf) -> Tensor:
    return logits.masked_fill(IS_DUPLICATE, value)


AS_POSITIVES = (
    "duplicates are used as positives: each example has one positive, itself, and its duplicates "
    "are only left out of the sum"
)
DROPPED = (
    "drops the examples that have duplicates: they still have a positive to find, and only their "
    "duplicates are left out as negatives"
)
HALF_MASKED = "duplicates are left out in one direction only: {} still counts them"
MASKS = [  # one direction each
    ("", lambda x: cross_entropy_of_rows(mask_duplicates(x))),
    ("does not depend on `ids`: duplicates are still negatives", cross_entropy_of_rows),
    (
        "the logits of duplicates are set to 0, so exp(0) = 1 stays in the sum: use -inf",
        lambda x: cross_entropy_of_rows(mask_duplicates(x, 0)),
    ),
    (
        "the similarity of duplicates is set to -1, so exp(-scale) stays in the sum: use -inf",
        lambda x: cross_entropy_of_rows(mask_duplicates(x, -SCALE)),
    ),
    (
        AS_POSITIVES,
        lambda x: -((x.log_softmax(-1) * IS_SAME).sum(-1) / IS_SAME.sum(-1)).mean(),
    ),
    (AS_POSITIVES, lambda x: -(x.log_softmax(-1) * IS_SAME).sum(-1).mean()),
    (AS_POSITIVES, lambda x: -(x.log_softmax(-1) * IS_SAME).sum() / IS_SAME.sum()),
    (
        AS_POSITIVES,
        lambda x: (x.logsumexp(-1) - x.masked_fill(~IS_SAME, -math.inf).logsumexp(-1)).mean(),
    ),
    (
        "the mask is inverted: it keeps the duplicates and leaves out all other examples",
        lambda x: cross_entropy_of_rows(x.masked_fill(~IS_SAME, -math.inf)),
    ),
    (
        "the positive is missing from the sum over j: an example is no duplicate of itself",
        lambda x: without_positive(x, IS_SAME),
    ),
    (DROPPED, lambda x: (x.logsumexp(-1) - x.diag())[~HAS_DUPLICATE].mean()),
    (DROPPED, lambda x: cross_entropy_of_rows(x[~HAS_DUPLICATE][:, ~HAS_DUPLICATE])),
    (
        "keeps only the first example of each id: the others have a positive to find too",
        lambda x: cross_entropy_of_rows(x[IS_FIRST][:, IS_FIRST]),
    ),
]
MASKED_DIRECTIONS = [  # from one direction to the loss
    ("", symmetric),
    (
        HALF_MASKED.format("b -> a"),
        lambda mask: lambda x: (mask(x) + cross_entropy_of_rows(x.T)) / 2,
    ),
    (
        HALF_MASKED.format("a -> b"),
        lambda mask: lambda x: (cross_entropy_of_rows(x) + mask(x.T)) / 2,
    ),
    (A_TO_B, lambda mask: mask),
    (B_TO_A, lambda mask: lambda x: mask(x.T)),
]


def examine_duplicates(loss: Loss, reference: Loss) -> None:
    """Raise Mistake if `loss`, which takes ids (B,) as well, differs from `reference`."""
    a, b = random_pairs()
    result = loss(a, b, SCALE, IDS)
    expect_dtype(result, a)
    if result.isnan():
        raise Mistake(
            "is NaN: 0 * -inf is NaN, and so is the softmax of a row of -inf. masked_fill writes "
            "-inf only where the mask is True"
        )
    if result > 100:
        raise Mistake(
            "the positive is masked too: ids[i] == ids[i], but example i must still find itself"
        )

    def compute(similarity, scale, directions, mask, factor) -> Tensor:
        return factor * directions(mask)(scale * similarity(a, b))

    raise_known_mistake(result, compute, SIMILARITIES, SCALES, MASKED_DIRECTIONS, MASKS, FACTORS)
    expect_value(result, reference(a, b, SCALE, IDS))
    cases = {
        "all ids different": torch.arange(B),
        "all ids the same": torch.full((B,), 5),
        "negative or large ids": torch.tensor([-1, 10**12, -1, 2, -7, 10**12, 10**12 + 1, 0]),
        "adjacent duplicates": torch.arange(B) // 2,
    }
    for when, ids in cases.items():
        result = loss(a, b, SCALE, ids, when=f"for {when}")
        expected = reference(a, b, SCALE, ids)
        if not is_close(result, expected):
            given, right = different_digits(result, expected)
            raise Mistake(
                f"right in general, but wrong for {when}: it gives {given}, and {right} is correct"
            )

    def ids_of(a: Tensor) -> Tensor:
        if len(a) == B:
            return IDS
        if len(a) < B * B:
            return torch.arange(len(a)) // 2
        return torch.arange(len(a))

    def loss_with_ids(a: Tensor, b: Tensor, scale: Tensor | float, when: str = "") -> Tensor:
        return loss(a, b, scale, ids_of(a), when=when)

    def reference_with_ids(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
        return reference(a, b, scale, ids_of(a))

    expect_robust(loss_with_ids, reference_with_ids)


# ---- step 5: the sigmoid loss --------------------------------------------------------------------

BIAS = -2.25


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Return the correct loss of step 5, in the dtype of a and b."""
    z = 2 * torch.eye(len(a), dtype=a.dtype) - 1
    return -logsigmoid(z * (scale * (a @ b.T) + bias)).sum() / len(a)


def sigmoid_mistakes() -> list[Axis]:
    """Return the known mistakes in the logits, the sum and the factor of step 5."""
    eye = torch.eye(B, dtype=torch.float64)
    z = 2 * eye - 1
    logits = [
        ("", lambda x, scale: x * scale + BIAS),
        ("the bias is ignored", lambda x, scale: x * scale),
        ("the bias is subtracted: add it", lambda x, scale: x * scale - BIAS),
        ("the scale multiplies the bias too", lambda x, scale: (x + BIAS) * scale),
        (
            "z does not multiply the bias: it multiplies the whole sum, scale a . b + bias",
            lambda x, scale: x * scale + BIAS * z,
        ),
    ]
    sums = [
        ("", lambda x: logsigmoid(z * x).sum()),
        (
            "z has the wrong sign: it is 1 for positives and -1 for negatives",
            lambda x: logsigmoid(-z * x).sum(),
        ),
        ("z is 1 everywhere: it must be -1 for negatives", lambda x: logsigmoid(x).sum()),
        ("z is 0 for negatives: it must be -1", lambda x: logsigmoid(eye * x).sum()),
        (
            "only the positives count: sum over all B^2 pairs, or all embeddings may collapse",
            lambda x: logsigmoid(x).trace(),
        ),
        (
            "only the negatives count: sum over all B^2 pairs",
            lambda x: (logsigmoid(-x) * (1 - eye)).sum(),
        ),
        ("there is no logarithm: the sum is over log sigmoid", lambda x: (z * x).sigmoid().sum()),
        ("there is no sigmoid: the sum is over log sigmoid", lambda x: (z * x).sum()),
        (
            "uses a softmax instead of a sigmoid: each pair is classified by itself",
            lambda x: x.log_softmax(-1).trace(),
        ),
    ]
    factors = [
        ("", 1),
        ("the mean over all B^2 pairs: divide the sum by B only", 1 / B),
        ("the sum is not divided by B", B),
        ("half the loss: there is one sum here, not two directions", 1 / 2),
        ("the sign is wrong: log sigmoid is negative, and the loss is positive", -1),
        ("the logarithm has base 2: use base e", 1 / math.log(2)),
    ]
    return [logits, sums, factors]


def examine_sigmoid(loss: Loss) -> None:
    """Raise Mistake if `loss` differs from `sigmoid_loss`."""
    a, b = random_pairs()
    result = loss(a, b, SCALE, BIAS)
    expect_dtype(result, a)

    def compute(similarity, scale, logits, total, factor) -> Tensor:
        return -factor * total(logits(similarity(a, b), scale)) / B

    raise_known_mistake(result, compute, SIMILARITIES, SCALES, *sigmoid_mistakes())
    expect_value(result, sigmoid_loss(a, b, SCALE, BIAS))
    for longer in ((a * lengths_of(a), b), (a, b * lengths_of(b))):
        if not is_close(loss(*longer, SCALE, BIAS), sigmoid_loss(*longer, SCALE, BIAS)):
            raise Mistake(NOT_DOT_PRODUCTS)
    for when, (B1, M1) in {
        "one pair": (1, M),
        "two pairs": (2, M),
        "M = 1": (B, 1),
        "B = 12": (12, M),
    }.items():
        case = (*random_pairs(B1, M1), SCALE, BIAS)
        if not is_close(loss(*case, when=f"for {when}"), sigmoid_loss(*case)):
            raise Mistake(f"right in general, but wrong for {when}")
    scale, bias = torch.tensor(SCALE).double(), torch.tensor(BIAS).double()
    expect_gradients(loss, sigmoid_loss, {"a": a, "b": b, "scale": scale, "bias": bias})
    a, b = a.float(), b.float()
    cases = {
        "in fp32": (a, b, SCALE, BIAS),
        "in fp32 at a scale of 100": (a, a, 100.0, BIAS),
        "in fp32 where positives are opposite": (a, -a, 100.0, BIAS),
    }
    for when, case in cases.items():
        result, expected = loss(*case, when=when), sigmoid_loss(*case)
        if not result.isfinite():
            raise Mistake(
                f"is {result:.0f} {when}: sigmoid rounds to 0 (or exp to infinity) before the "
                "logarithm is taken. logsigmoid does both in one"
            )
        if not is_close(result, expected, 1e-4 * (1 + expected.item())):
            given, right = different_digits(result, expected)
            raise Mistake(f"right in fp64, but {given} {when}, not {right}")
