"""Grade the exercises of lesson 03: python lessons/exercises/check_03.py [FILE]

Mistakes are found by experiments on the functions (see probe_pairs.py for steps 1, 2 and 5), never by reading their source.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from grade import (
    TOLERANCE,
    Answer,
    Crash,
    Mistake,
    Step,
    expect_dtype,
    expect_gradients,
    expect_shape,
    main,
)
from probe_pairs import (
    B,
    M,
    examine_loss,
    examine_sigmoid,
    examine_twins,
    expect_value,
    explain,
    near,
    pairs,
    scalar,
)
from torch import Tensor, nn

from nanods import contrastive

# ---- steps 1, 2 and 5: losses ------------------------------------------------------------------------------------------------


def check_loss(answer: Answer) -> None:
    examine_loss(scalar(answer), contrastive.contrastive_loss)


def check_twins(answer: Answer) -> None:
    examine_twins(scalar(answer), contrastive.contrastive_loss)


def check_sigmoid(answer: Answer) -> None:
    examine_sigmoid(scalar(answer))


# ---- step 3: the temperature -------------------------------------------------------------------------------------------------

MOST, LIMIT = 50.0, math.log(50.0)


def check_scale(answer: Answer) -> None:
    def asked(
        value: float, dtype: torch.dtype = torch.float64, when: str = ""
    ) -> tuple[nn.Parameter, Tensor]:
        parameter = nn.Parameter(torch.tensor(value, dtype=dtype))
        try:
            scale = answer(parameter, MOST, when=when)
        except Crash as crash:
            if "leaf Variable" in crash.reason:
                raise Mistake(
                    f"{crash}: the change itself needs no gradient, so make it under torch.no_grad()"
                ) from None
            raise
        expect_shape(scale, (), f", {when}" if when else "")
        return parameter, scale

    def gradient(parameter: nn.Parameter, scale: Tensor) -> Tensor | None:
        return torch.autograd.grad(scale, parameter, allow_unused=True)[0]

    parameter, scale = asked(1.5)
    expect_dtype(scale, parameter)
    known = {
        "returns the logarithm itself: the scale is its exp()": 1.5,
        "returns the temperature: the scale is exp(log_scale), and the temperature 1 / scale": math.exp(
            -1.5
        ),
        f"returns {MOST:g}, the limit, whatever log_scale is": MOST,
    }
    for why, hypothesis in known.items():
        if abs(scale.item() - hypothesis) < 1e-6:
            raise Mistake(why)
    if not abs(scale.item() - math.exp(1.5)) < TOLERANCE:
        raise Mistake(
            f"gives {scale:.4f} where log_scale is 1.5, far below the limit: exp(1.5) is {math.exp(1.5):.4f}"
        )
    if parameter.item() != 1.5:
        raise Mistake(
            f"changes log_scale below the limit too: 1.5 has become {parameter.item():.3g}"
        )
    if not scale.requires_grad:
        raise Mistake(
            "no gradient flows at all: exp() is under no_grad() too, or something is detached"
        )
    if (grad := gradient(parameter, scale)) is None:
        raise Mistake("no gradient reaches log_scale: the scale is made from a copy of it")
    if not abs(grad - scale.detach()) < TOLERANCE:
        raise Mistake(
            f"the gradient below the limit is {grad:.3f}, and should be that of exp(): {scale:.3f}"
        )
    parameter, scale = asked(-2.0)
    if not abs(scale.item() - math.exp(-2)) < TOLERANCE:
        raise Mistake(
            f"keeps the scale from being small, too: exp(-2) is 0.1353, and it gives {scale:.4f}; the limit is above"
        )
    expect_limit(asked, gradient)
    for when, value in {
        "below the limit in fp32": 1.5,
        "above the limit in fp32": LIMIT + 1,
    }.items():
        parameter, scale = asked(value, torch.float32, when=when)
        expect_dtype(scale, parameter)
        if not abs(scale.item() - math.exp(min(value, LIMIT))) < 1e-3:
            raise Mistake(f"right in fp64, but wrong {when}")


def expect_limit(
    asked: Callable[..., tuple[nn.Parameter, Tensor]], gradient: Callable[..., Tensor | None]
) -> None:
    parameter, scale = asked(LIMIT + 1)
    over = f"exp(log_scale) is {math.exp(LIMIT + 1):.0f}, `most` is {MOST:g}"
    if abs(scale.item() - math.exp(LIMIT + 1)) < TOLERANCE:
        if parameter.item() < LIMIT + 0.5:
            raise Mistake(
                f"limits log_scale after it was used: {over}, and the first scale is still {scale:.0f}"
            )
        if asked(MOST + 1)[1] < 2 * math.exp(MOST):
            raise Mistake(
                f"compares the logarithm with `most`: {over}, so log_scale may be log({MOST:g}) = {LIMIT:.2f}"
            )
        raise Mistake(f"there is no limit: {over}, and it returns {scale:.0f}")
    if not abs(scale.item() - MOST) < 1e-6:
        raise Mistake(f"{over}, and it returns {scale:.4g}")
    grad = gradient(parameter, scale) if scale.requires_grad else None
    if grad is None:
        raise Mistake(
            "above the limit no gradient reaches log_scale: the limit itself is returned, or a new parameter is made"
        )
    if grad == 0 and parameter.item() < LIMIT + 0.5:
        raise Mistake(
            "clamps the parameter, and then the value too, whose gradient at the limit is 0: the first is enough"
        )
    if grad == 0:
        raise Mistake(
            "only the value is clamped: above the limit its gradient is 0, and a scale that one step of the optimizer carried "
            "over it would stay there for good. Clamp the parameter, before it is used"
        )
    if parameter.item() > LIMIT + 0.5:
        raise Mistake(
            f"a gradient comes through, but the parameter stays at {parameter.item():.2f}, where the limit is {LIMIT:.2f}: "
            "steps down change nothing until it is back there. Clamp the parameter, before it is used"
        )
    if not abs(grad - MOST) < 1e-6:
        raise Mistake(
            f"at the limit the gradient is {grad:.3f}, and should be that of exp(): {MOST:g}"
        )
    with torch.no_grad():
        parameter.sub_(0.01)  # a step of the optimizer
    if not asked(parameter.item())[1] < 0.995 * MOST:
        raise Mistake(
            "does not come down again: after a step from the limit downwards the scale is still `most`"
        )


# ---- step 4: recall ----------------------------------------------------------------------------------------------------------


def recall(queries: Tensor, targets: Tensor) -> float:
    return contrastive.recall_at_k(queries, targets, 1)


def check_recall(answer: Answer) -> None:
    asked = scalar(answer)
    queries, targets = pairs(seed=9)  # 5 queries of 8 find their target, and 6 targets their query
    Q, right = B, recall(queries, targets)
    got = asked(queries, targets)
    if not got.is_floating_point():
        raise Mistake(f"must be a share, a floating-point number, and is {str(got.dtype)[6:]}")
    own = torch.eye(Q, dtype=torch.float64)
    if got == 0 and asked(-own, own) == 1:
        raise Mistake("the lowest score is taken for the best")
    if got == 0 and asked(own, own) == 0:
        raise Mistake(
            "nothing is ever found, not even by queries = targets = eye(Q): is each target its own rival?"
        )
    known = [
        (
            "targets look for queries: row i of queries @ targets.T is query i's, so take the other dim",
            recall(targets, queries),
        ),
        ("the share of those *not* found", 1 - right),
        ("counts those that are found: divide by Q", right * Q),
        ("in per cent: the share goes from 0 to 1", right * 100),
        ("divided by Q^2: there are Q queries, and each finds its target or not", right / Q),
        ("divided by M, the width: there are Q queries", right * Q / M),
        ("divided by Q - 1: there are Q queries, each with Q - 1 rivals", right * Q / (Q - 1)),
        (
            "the share of rivals beaten: a query finds its target if it beats them *all*",
            beaten(queries, targets),
        ),
    ]
    for why, hypothesis in known:
        if abs(got.item() - hypothesis) < 1e-6:
            raise Mistake(why)
    if not abs(got.item() - right) < 1e-6:
        raise Mistake(
            f"gives {got:.4f} where {right * Q:.0f} of {Q} queries find their target: {right:.4f}"
        )
    expect_no_credit(asked, own)
    for when, (count, width) in {
        "one query": (1, M),
        "two queries": (2, M),
        "Q < M": (4, M),
        "Q = 40": (40, M),
    }.items():
        given = pairs(count, width)
        if not abs(asked(*given, when=f"for {when}").item() - recall(*given)) < 1e-6:
            raise Mistake(f"right in general, but wrong for {when}")
    if not abs(asked(queries.float(), targets.float(), when="for fp32").item() - right) < 1e-6:
        raise Mistake("right in fp64, but wrong in fp32")


def beaten(queries: Tensor, targets: Tensor) -> float:
    scores = queries @ targets.T
    return ((scores.diag()[:, None] > scores).sum() / (len(scores) * (len(scores) - 1))).item()


def expect_no_credit(asked: Callable[..., Tensor], own: Tensor) -> None:
    """`own` (Q, Q): queries that find their targets, if these are the same. All scores here are exact."""
    Q, nan = len(own), torch.nan
    one = own[:1].expand(Q, -1)
    collapsed = asked(one, one, when="where all embeddings are the same").item()
    if collapsed == 1:
        raise Mistake(
            "embeddings that have collapsed to one point find everything: a tie must not count, so >, not >="
        )
    if collapsed != 0:
        raise Mistake(
            f"embeddings that have collapsed to one point get {collapsed:.3g}: argmax takes one of those that are equal, and "
            "one query owns it. A target is found if its score is higher than all others"
        )
    twins = own.clone()
    twins[1] = twins[0]
    got = asked(own, twins, when="where two targets are the same").item()
    if not abs(got - (Q - 2) / Q) < 1e-6:
        raise Mistake(
            f"two targets are the same, so {Q - 2} of {Q} are found, and it gives {got:.3g}: is a tie half a find?"
        )
    alone = torch.cat([own[:1], own[1:].roll(1, 0)])  # query 0 finds its target, and no other does
    none = alone.clone()
    none[0] = nan
    cases = {
        "where all is NaN": (own * nan, own * nan, 0),
        "where all queries are NaN": (own * nan, own, 0),
        "where the only query with its target is NaN": (
            torch.cat([own[:1] * nan, own[1:]]),
            alone,
            0,
        ),
        "where the only target that was found is NaN": (own, none, 0),
        "where query 1 is NaN": (torch.cat([own[:1], own[1:2] * nan, own[2:]]), own, (Q - 1) / Q),
    }
    for when, (queries, targets, right) in cases.items():
        got = asked(queries, targets, when=when).item()
        if got > right + 1e-6:
            raise Mistake(
                f"NaN counts as found: it gives {got:.3g} {when}, not {right:.3g} (no comparison with NaN is true)"
            )
        if not abs(got - right) < 1e-6:
            raise Mistake(f"gives {got:.3g} {when}, not {right:.3g}")


# ---- the bonus: LIMoE's entropies --------------------------------------------------------------------------------------------

N, E, LOOSE = 12, 5, 1e-6  # a tiny number inside the logarithm is a fair way to keep NaN out


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def check_entropies(answer: Answer) -> None:
    def asked(probs: Tensor, when: str = "") -> tuple[Tensor, Tensor]:
        parts = answer(probs, when=when)
        for part, name in zip(parts, ("local", "global"), strict=True):
            hint = {(N,): ": take the mean over the tokens", (E,): ": sum over the experts"}.get(
                tuple(part.shape), ""
            )
            expect_shape(part, (), f" ({name}), {when}" if when else f" ({name}){hint}")
        return parts

    logits = 2 * torch.randn(N, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, 0] += 1
    p = logits.softmax(-1)
    parts = asked(p)
    for part in parts:
        expect_dtype(part, p)
    sure, unsure = entropy(p).mean(), entropy(p.mean(0))
    if near(parts[0], unsure, LOOSE) and near(parts[1], sure, LOOSE):
        raise Mistake(
            "returns global, local: the two are swapped (local is the mean of the entropies)"
        )
    makers = {
        "local": [
            ("", sure),
            (
                "is the entropy of the mean, as global is: it is the mean of the tokens' entropies",
                unsure,
            ),
            ("takes the softmax again: probs is what it gave", entropy(p.softmax(-1)).mean()),
        ],
        "global": [
            ("", unsure),
            ("is the mean of the entropies, as local is: it is the entropy of the mean", sure),
            (
                "sums the probabilities over the tokens: a mean over them sums to 1, as probabilities must",
                entropy(p.sum(0)),
            ),
            ("averages over the experts, and not over the tokens: mean(0)", entropy(p.mean(-1))),
            ("takes the softmax again: probs is what it gave", entropy(p.mean(0).softmax(-1))),
            (
                "takes the softmax of the sum: the mean over the tokens sums to 1 already",
                entropy(p.sum(0).softmax(-1)),
            ),
        ],
    }
    factors = [
        ("", 1),
        ("has the wrong sign: an entropy is never negative", -1),
        ("takes the logarithm to the base 2 (bits), not to the base e (nats)", 1 / math.log(2)),
        ("is divided by ln E", 1 / math.log(E)),
        ("averages over the experts: an entropy is a sum over them", 1 / E),
    ]
    tokens = [
        ("is summed over the tokens, not averaged", N),
        ("sums over the tokens and averages over the experts: the other way round", N / E),
    ]
    for (name, made), got in zip(makers.items(), parts, strict=True):
        try:
            explain(
                got,
                lambda value, factor: value * factor,
                made,
                factors + tokens * (name == "local"),
                tolerance=LOOSE,
            )
            expect_value(got, made[0][1], LOOSE)
        except Mistake as mistake:
            raise Mistake(f"{name} {mistake}") from None
    certain = torch.eye(E, dtype=torch.float64).repeat(2, 1)
    cases = {
        "each token is sure of one expert (the others have 0)": certain,
        "all tokens are sure of the same expert": certain[:1].expand(N, -1),
        "there is one token": p[:1],
        "there is one expert": torch.ones(N, 1, dtype=torch.float64),
        "all experts are alike": torch.full((N, E), 1 / E, dtype=torch.float64),
    }
    for when, probs in cases.items():
        parts = asked(probs, when=f"where {when}")
        for name, got, wanted in zip(
            ("local", "global"), parts, (entropy(probs).mean(), entropy(probs.mean(0))), strict=True
        ):
            if not got.isfinite():
                raise Mistake(
                    f"{name} is {got:.0f} where {when}: log(0) is -inf, and 0 times that is NaN; p ln p is 0 there"
                )
            if not near(got, wanted, LOOSE):
                raise Mistake(
                    f"right in general, but {name} is {got:.4f} where {when}, not {wanted:.4f}"
                )
    expect_gradients(
        lambda x: torch.stack(list(asked(x.softmax(-1)))),
        lambda x: torch.stack([entropy(x.softmax(-1)).mean(), entropy(x.softmax(-1).mean(0))]),
        {"probs": logits},
    )
    for got, wanted in zip(asked(certain.float(), when="in fp32"), (0, math.log(E)), strict=True):
        if not near(got, torch.tensor(wanted), 1e-5):
            raise Mistake("right in fp64, but wrong in fp32")


STEPS = [
    Step("contrastive_loss", check_loss),
    Step("with_twins", check_twins),
    Step("logit_scale", check_scale),
    Step("recall_at_1", check_recall),
    Step("sigmoid_loss", check_sigmoid),
    Step("entropies", check_entropies, optional=True, returns=("local", "global")),
]

if __name__ == "__main__":
    sys.exit(main(STEPS, Path(__file__).with_name("03_multimodal.py")))
