"""Experiments on a loss over the pairs of a batch. What is wrong is raised as a Mistake, in words.

A loss is one number, and tells nothing of how it was made. So the known mistakes are made here too, alone and several at once:
the one that leads to the learner's number is the learner's.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from grade import TOLERANCE, Answer, Mistake, expect_dtype, expect_gradients, expect_shape
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

B, M, SCALE = 8, 6, 3.75  # exact in fp32, in which a learner may well hold the scale
IDS = torch.tensor([3, 0, 7, 3, 5, 0, 3, 1])  # one three times, one twice, neither in a row

Loss = Callable[..., Tensor]


def pairs(B: int = B, M: int = M, seed: int = 1) -> tuple[Tensor, Tensor]:
    """a, b of length 1, those of one pair rather near."""
    a, noise = torch.randn(
        2, B, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return normalize(a), normalize(a + noise)


def scalar(answer: Answer) -> Loss:
    """`answer`, which must return one number each time."""

    def loss(a: Tensor, *rest: Tensor | float, when: str = "") -> Tensor:
        out, n = answer(a, *rest, when=when), len(a)
        apart = {
            (n,): ": one for each item, of which you want the mean",
            (n, n): ": one for each a and b, not one for all",
        }
        expect_shape(out, (), f", {when}" if when else apart.get(tuple(out.shape), ""))
        return out

    return loss


def near(x: Tensor, y: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((x - y).abs() < tolerance)  # never where one is NaN


# ---- known mistakes ----------------------------------------------------------------------------------------------------------


def explain(
    got: Tensor,
    make: Callable[..., Tensor],
    *axes: list[tuple[str, object]],
    tolerance: float = TOLERANCE,
) -> None:
    """Raise the fewest mistakes that lead to `got`.

    make(one value of each axis) is a loss. An axis lists (mistake, value), first the right value, whose mistake is "".
    """
    for choice in sorted(product(*axes), key=lambda choice: sum(bool(why) for why, _ in choice)):
        if near(got, make(*(value for _, value in choice)), tolerance):
            if whys := [why for why, _ in choice if why]:
                raise Mistake("; ".join(whys))
            return


def expect_value(got: Tensor, right: Tensor, tolerance: float = TOLERANCE) -> None:
    if near(got, right, tolerance):
        return
    if (off := (got - right).abs()) < 1e-3:
        raise Mistake(
            f"{off:.1g} off: is something added inside a logarithm? It keeps infinity out, and changes the rest"
        )
    raise Mistake(f"gives {got:.4f} where it should give {right:.4f}")


def nll(logits: Tensor) -> Tensor:
    """One direction: the rows look for their columns."""
    return cross_entropy(logits, torch.arange(len(logits)))


def both(direction: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda logits: (direction(logits) + direction(logits.T)) / 2


def others(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """The sum over all but the own partner (and what is `out`), as its logarithm."""
    out = torch.eye(len(logits), dtype=torch.bool) if out is None else out
    return (logits.masked_fill(out, -math.inf).logsumexp(-1) - logits.diag()).mean()


NOT_TURNED = (
    "must look for its {} too (the transposed matrix, or the softmax over the other dimension)"
)
SIMILARITIES = [
    ("", lambda a, b: a @ b.T),
    ("compares a with a: b is never used", lambda a, b: a @ a.T),
    ("compares b with b: a is never used", lambda a, b: b @ b.T),
    ("the similarities are distances: their sign is turned", lambda a, b: -(a @ b.T)),
]
SCALES = [
    ("", SCALE),
    ("the scale is ignored", 1.0),
    ("divides by the scale: it is 1 / temperature already, so it multiplies", 1 / SCALE),
]
PARTNER = "the target of each row is its own number, where its partner stands (the diagonal)"
DIRECTIONS = [
    ("", both(nll)),
    ("only a looks for its b: each b " + NOT_TURNED.format("a"), nll),
    ("only b looks for its a: each a " + NOT_TURNED.format("b"), lambda x: nll(x.T)),
    (
        "the matrix and its transpose are averaged before the softmax: average the two losses",
        lambda x: nll((x + x.T) / 2),
    ),
    ("the softmax is taken twice: cross_entropy takes its own", both(lambda x: nll(x.softmax(-1)))),
    (
        "there is no logarithm: nll_loss wants log_softmax",
        both(lambda x: -x.softmax(-1).diag().mean()),
    ),
    ("the own partner is missing from the sum over j", both(others)),
    (
        PARTNER + ", and not number 0",
        both(lambda x: cross_entropy(x, torch.zeros(len(x), dtype=torch.long))),
    ),
    (
        PARTNER + ": they are turned round",
        both(lambda x: cross_entropy(x, torch.arange(len(x)).flip(0))),
    ),
    (
        "one softmax over the whole matrix: each row has its own",
        lambda x: (x.flatten().logsumexp(0) - x.diag()).mean(),
    ),
]
FACTORS = [
    ("", 1),
    ("the two directions are added, not averaged", 2),
    ("half of it: the mean over the directions is taken twice", 1 / 2),
    ("divided by B^2: a direction is the mean over B rows", 1 / B),
    ("summed over the pairs, not averaged", B),
    ("the two directions are added, and over the pairs it is a sum, not a mean", 2 * B),
    ("the sign is turned: it falls as partners move apart", -1),
    ("the logarithm has the base 2, not e", 1 / math.log(2)),
]


# ---- step 1 ------------------------------------------------------------------------------------------------------------------


def examine_loss(loss: Loss, right: Loss) -> None:
    a, b = pairs()
    got = loss(a, b, SCALE)
    expect_dtype(got, a)
    explain(
        got,
        lambda like, scale, direction, factor: factor * direction(scale * like(a, b)),
        SIMILARITIES,
        SCALES,
        DIRECTIONS,
        FACTORS,
    )
    own = torch.eye(B, dtype=torch.float64)
    if (found := loss(own, own, 20.0)) > 1:
        raise Mistake(
            f"{PARTNER}: the loss is {found:.2f} where a_i = b_i and nothing else is alike, and should be 0"
        )
    expect_value(got, right(a, b, SCALE))
    expect_rest(loss, right)


def expect_rest(loss: Loss, right: Loss) -> None:
    """What steps 1 and 2 have in common, once the number is right."""
    a, b = pairs()
    longer = 1 + torch.arange(1, B + 1)[:, None] / B
    for left, other in ((a * longer, b), (a, b * longer)):
        if not near(loss(left, other, SCALE), right(left, other, SCALE)):
            raise Mistake(
                "makes the lengths 1 again: that is done, and what comes longer counts for more"
            )
    for when, (B1, M1) in {
        "one pair": (1, M),
        "two pairs": (2, M),
        "M = 1": (B, 1),
        "B = 12": (12, M),
    }.items():
        given = pairs(B1, M1)
        if not near(loss(*given, SCALE, when=f"for {when}"), right(*given, SCALE)):
            raise Mistake(f"right in general, but wrong for {when}")
    scale = torch.tensor(SCALE, dtype=torch.float64)
    expect_gradients(loss, right, {"a": a, "b": b, "scale": scale})
    expect_precision(loss, right)


def expect_precision(loss: Loss, right: Loss) -> None:
    a, b = (x.float() for x in pairs())
    if not near(loss(a, b, SCALE, when="for fp32"), right(a, b, SCALE), 1e-4):
        raise Mistake("right in fp64, but wrong in fp32")
    if not (got := loss(a, a, 100.0, when="for a scale of 100")).isfinite():
        raise Mistake(
            f"overflows at a scale of 100 in fp32: it is {got:.0f}, since exp(100) is infinite; take the largest of the row "
            "away first, as logsumexp and cross_entropy do"
        )
    if not (got := loss(a, -a, 100.0, when="for opposites")).isfinite():
        raise Mistake(
            f"underflows in fp32 where partners are opposites: it is {got:.0f}, since a probability rounds to 0 before its "
            "logarithm is taken; log_softmax takes both at once"
        )
    for other in (a, -a):
        if not near(loss(a, other, 100.0), right(a, other, 100.0), 1e-2):
            raise Mistake("right in general, but wrong for a scale of 100 in fp32")
    close = (
        torch.eye(64) / 20
    )  # partners have the similarity 1.0025, strangers 1: in bf16 both are 1
    close[:, 0] = 1
    close = close.bfloat16()
    got, exact = (
        loss(close, close, 100.0, when="for bf16"),
        right(close.double(), close.double(), 100.0),
    )
    if not near(got, exact, 0.03):
        raise Mistake(
            f"in bf16, similarities near 1 are rounded to 1: the loss is {got:.3f}, exactly it is {exact:.3f}; compute them in "
            "fp32, from a and b in fp32"
        )


# ---- step 2 ------------------------------------------------------------------------------------------------------------------

TWIN = (IDS[:, None] == IDS) & ~torch.eye(B, dtype=torch.bool)
SAME = IDS[:, None] == IDS
FIRST = ~TWIN.tril().any(-1)  # the first item of each id


def hide(logits: Tensor, value: float = -math.inf) -> Tensor:
    return logits.masked_fill(TWIN, value)


AS_PARTNERS = "twins are made partners as well: each item has one partner, its own, and twins are left out of the sum"
ALONE = "leaves out the items that have twins: they still look for their own partners, only the twins are no rivals"
ONE_WAY = "twins are left out in one direction alone: {} still counts them"
MASKS = [  # one direction each
    ("", lambda x: nll(hide(x))),
    ("does not change with `ids`: twins are still negatives", nll),
    (
        "the logits of twins are set to 0, and exp(0) = 1 stays in the sum: -inf",
        lambda x: nll(hide(x, 0)),
    ),
    (
        "the similarity of twins is set to -1, and exp(-scale) stays in the sum: -inf",
        lambda x: nll(hide(x, -SCALE)),
    ),
    (AS_PARTNERS, lambda x: -((x.log_softmax(-1) * SAME).sum(-1) / SAME.sum(-1)).mean()),
    (AS_PARTNERS, lambda x: -(x.log_softmax(-1) * SAME).sum(-1).mean()),
    (AS_PARTNERS, lambda x: -(x.log_softmax(-1) * SAME).sum() / SAME.sum()),
    (
        AS_PARTNERS,
        lambda x: (x.logsumexp(-1) - x.masked_fill(~SAME, -math.inf).logsumexp(-1)).mean(),
    ),
    (
        "it is the others that are left out, and the twins that stay",
        lambda x: nll(x.masked_fill(~SAME, -math.inf)),
    ),
    (
        "the own partner is missing from the sum over j: it is no twin of itself",
        lambda x: others(x, SAME),
    ),
    (ALONE, lambda x: (x.logsumexp(-1) - x.diag())[~TWIN.any(-1)].mean()),
    (ALONE, lambda x: nll(x[~TWIN.any(-1)][:, ~TWIN.any(-1)])),
    (
        "keeps the first item of each id alone: the others look for their own partners, too",
        lambda x: nll(x[FIRST][:, FIRST]),
    ),
]
WAYS = [  # from one direction to the loss
    ("", both),
    (ONE_WAY.format("b -> a"), lambda mask: lambda x: (mask(x) + nll(x.T)) / 2),
    (ONE_WAY.format("a -> b"), lambda mask: lambda x: (nll(x) + mask(x.T)) / 2),
    ("only a looks for its b: each b " + NOT_TURNED.format("a"), lambda mask: mask),
    ("only b looks for its a: each a " + NOT_TURNED.format("b"), lambda mask: lambda x: mask(x.T)),
]


def examine_twins(loss: Loss, right: Loss) -> None:
    a, b = pairs()
    got = loss(a, b, SCALE, IDS)
    expect_dtype(got, a)
    if got.isnan():
        raise Mistake(
            "is NaN: 0 * -inf is NaN (masked_fill writes -inf where you want it), and so is a row of -inf alone"
        )
    if got > 100:
        raise Mistake(
            "the own partner is hidden too: item i has the id of item i, and must still find it"
        )
    explain(
        got,
        lambda like, scale, way, mask, factor: factor * way(mask)(scale * like(a, b)),
        SIMILARITIES,
        SCALES,
        WAYS,
        MASKS,
        FACTORS,
    )
    expect_value(got, right(a, b, SCALE, IDS))
    cases = {
        "all ids different": torch.arange(B),
        "all ids the same": torch.full((B,), 5),
        "ids that are negative or large": torch.tensor(
            [-1, 10**12, -1, 2, -7, 10**12, 10**12 + 1, 0]
        ),
        "twins side by side": torch.arange(B) // 2,
    }
    for when, ids in cases.items():
        out = loss(a, b, SCALE, ids, when=f"for {when}")
        if not near(out, wanted := right(a, b, SCALE, ids)):
            raise Mistake(
                f"right in general, but wrong for {when}: it gives {out:.4f}, not {wanted:.4f}"
            )

    def ids_of(a: Tensor) -> Tensor:
        return (
            IDS
            if len(a) == B
            else torch.arange(len(a)) // 2
            if len(a) < B * B
            else torch.arange(len(a))
        )

    expect_rest(
        lambda a, b, scale, when="": loss(a, b, scale, ids_of(a), when=when),
        lambda a, b, scale: right(a, b, scale, ids_of(a)),
    )


# ---- step 5: a loss without softmax ------------------------------------------------------------------------------------------

BIAS = -2.25


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    z = 2 * torch.eye(len(a), dtype=a.dtype) - 1
    return -logsigmoid(z * (scale * (a @ b.T) + bias)).sum() / len(a)


def examine_sigmoid(loss: Loss) -> None:
    a, b = pairs()
    got = loss(a, b, SCALE, BIAS)
    expect_dtype(got, a)
    own = torch.eye(B, dtype=torch.float64)
    z = 2 * own - 1
    biases = [
        ("", lambda x, scale: x * scale + BIAS),
        ("the bias is ignored", lambda x, scale: x * scale),
        ("the bias is subtracted: it is added", lambda x, scale: x * scale - BIAS),
        ("the scale multiplies the bias too", lambda x, scale: (x + BIAS) * scale),
        (
            "z does not turn the bias: it multiplies scale a.b and the bias",
            lambda x, scale: x * scale + BIAS * z,
        ),
    ]
    sums = [
        ("", lambda x: logsigmoid(z * x).sum()),
        (
            "z is turned: it is 1 for partners and -1 for all others",
            lambda x: logsigmoid(-z * x).sum(),
        ),
        (
            "z is 1 everywhere: pairs that do not belong together need -1",
            lambda x: logsigmoid(x).sum(),
        ),
        (
            "z is 0 for pairs that do not belong together, and must be -1",
            lambda x: logsigmoid(own * x).sum(),
        ),
        (
            "only the partners count: all B^2 do, or everything may collapse",
            lambda x: logsigmoid(x).trace(),
        ),
        (
            "only the pairs that do not belong together count: all B^2 pairs do",
            lambda x: (logsigmoid(-x) * (1 - own)).sum(),
        ),
        ("there is no logarithm: the sum is over log sigmoid", lambda x: (z * x).sigmoid().sum()),
        ("there is no sigmoid: the sum is over log sigmoid", lambda x: (z * x).sum()),
        (
            "softmax in place of sigmoid: here each pair is judged alone",
            lambda x: x.log_softmax(-1).trace(),
        ),
    ]
    factors = [
        ("", 1),
        ("the mean over all B^2 pairs: the sum is divided by B alone", 1 / B),
        ("the sum is not divided by B", B),
        ("halved: there is one sum here, not two directions", 1 / 2),
        ("the sign is turned: log sigmoid is negative, the loss is not", -1),
        ("the logarithm has the base 2, not e", 1 / math.log(2)),
    ]
    explain(
        got,
        lambda like, scale, bias, total, factor: -factor * total(bias(like(a, b), scale)) / B,
        SIMILARITIES,
        SCALES,
        biases,
        sums,
        factors,
    )
    expect_value(got, sigmoid_loss(a, b, SCALE, BIAS))
    given = {
        "a": a,
        "b": b,
        "scale": torch.tensor(SCALE).double(),
        "bias": torch.tensor(BIAS).double(),
    }
    longer = (2 * a, b, SCALE, BIAS)
    if not near(loss(*longer), sigmoid_loss(*longer)):
        raise Mistake(
            "makes the lengths 1 again: that is done, and what comes longer counts for more"
        )
    for when, (count, width) in {
        "one pair": (1, M),
        "two pairs": (2, M),
        "M = 1": (B, 1),
        "B = 12": (12, M),
    }.items():
        case = (*pairs(count, width), SCALE, BIAS)
        if not near(loss(*case, when=f"for {when}"), sigmoid_loss(*case)):
            raise Mistake(f"right in general, but wrong for {when}")
    expect_gradients(loss, sigmoid_loss, given)
    a, b = a.float(), b.float()
    for other, when in (
        (b, "in fp32"),
        (a, "in fp32 at a scale of 100"),
        (-a, "in fp32 where partners are opposites"),
    ):
        case = (a, other, SCALE if other is b else 100.0, BIAS)
        if not (got := loss(*case, when=when)).isfinite():
            raise Mistake(
                f"is {got:.0f} {when}: sigmoid rounds to 0 (or exp to infinity) before the logarithm is taken; logsigmoid "
                "takes both at once"
            )
        if not near(got, exact := sigmoid_loss(*case), 1e-4 * (1 + exact.item())):
            raise Mistake(f"right in fp64, but {got:.4f} {when}, not {exact:.4f}")
