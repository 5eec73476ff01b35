"""The steps of lesson 03, each with its tests. check_03.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_03.py FILE

The grader finds mistakes by experiments on the functions, never by reading their source. The
experiments of steps 1, 2 and 5 are in probe_multimodal.py.
"""

import math
import sys
from collections.abc import Callable

import torch
from grade import (
    TOLERANCE,
    Answer,
    Crash,
    Mistake,
    Step,
    different_digits,
    expect_dtype,
    expect_gradients,
    expect_shape,
    main,
)
from probe_multimodal import (
    B,
    M,
    examine_duplicates,
    examine_loss,
    examine_sigmoid,
    expect_value,
    is_close,
    raise_known_mistake,
    random_pairs,
    scalar_answer,
)
from torch import Tensor, nn

from nanods import contrastive

# ---- steps 1, 2 and 5: losses --------------------------------------------------------------------


def check_loss(answer: Answer) -> None:
    examine_loss(scalar_answer(answer), contrastive.contrastive_loss)


def check_duplicates(answer: Answer) -> None:
    examine_duplicates(scalar_answer(answer), contrastive.contrastive_loss)


def check_sigmoid(answer: Answer) -> None:
    examine_sigmoid(scalar_answer(answer))


# ---- step 3: the temperature ---------------------------------------------------------------------

MAX_SCALE, LIMIT = 50.0, math.log(50.0)

ScaleOf = Callable[..., tuple[nn.Parameter, Tensor]]


def gradient_of(scale: Tensor, parameter: nn.Parameter) -> Tensor | None:
    return torch.autograd.grad(scale, parameter, allow_unused=True)[0]


def check_scale(answer: Answer) -> None:
    def scale_of(
        value: float, dtype: torch.dtype = torch.float64, when: str = ""
    ) -> tuple[nn.Parameter, Tensor]:
        """Call the answer with a new parameter of this value. Return both."""
        parameter = nn.Parameter(torch.tensor(value, dtype=dtype))
        try:
            scale = answer(parameter, MAX_SCALE, when=when)
        except Crash as crash:
            if "leaf Variable" in crash.reason:
                raise Mistake(
                    f"{crash}: change the parameter under torch.no_grad(), because the change "
                    "itself needs no gradient"
                ) from None
            raise
        expect_shape(scale, (), when=when)
        return parameter, scale

    expect_scale_below_limit(scale_of)
    expect_limit(scale_of)
    for when, value in {
        "below the limit in fp32": 1.5,
        "above the limit in fp32": LIMIT + 1,
    }.items():
        parameter, scale = scale_of(value, torch.float32, when=when)
        expect_dtype(scale, parameter)
        if not abs(scale.item() - math.exp(min(value, LIMIT))) < 1e-3:
            raise Mistake(f"right in fp64, but wrong {when}")


def expect_scale_below_limit(scale_of: ScaleOf) -> None:
    parameter, scale = scale_of(1.5)
    expect_dtype(scale, parameter)
    known_mistakes = {
        "returns the logarithm itself: the scale is its exp()": 1.5,
        "returns the temperature: the scale is exp(log_scale), and the temperature is 1 / scale": (
            math.exp(-1.5)
        ),
        f"returns {MAX_SCALE:g}, the limit, for every log_scale": MAX_SCALE,
    }
    for message, value in known_mistakes.items():
        if abs(scale.item() - value) < 1e-6:
            raise Mistake(message)
    if not abs(scale.item() - math.exp(1.5)) < TOLERANCE:
        given, right = different_digits(scale, math.exp(1.5))
        raise Mistake(
            f"gives {given} where log_scale is 1.5, far below the limit: exp(1.5) is {right}"
        )
    if parameter.item() != 1.5:
        raise Mistake(
            f"changes log_scale below the limit too: 1.5 has become {parameter.item():.3g}"
        )
    if not scale.requires_grad:
        raise Mistake(
            "no gradient flows at all: exp() is under no_grad() too, or something is detached"
        )
    grad = gradient_of(scale, parameter)
    if grad is None:
        raise Mistake("no gradient reaches log_scale: the scale is computed from a copy of it")
    if not abs(grad - scale.detach()) < TOLERANCE:
        given, right = different_digits(grad, scale, 3)
        raise Mistake(
            f"the gradient below the limit is {given}, but the gradient of exp() is {right}"
        )
    parameter, scale = scale_of(-2.0)
    if not abs(scale.item() - math.exp(-2)) < TOLERANCE:
        given, right = different_digits(scale, math.exp(-2))
        raise Mistake(
            f"limits small scales too: exp(-2) is {right}, and it gives {given}. "
            "There is only an upper limit"
        )


def expect_limit(scale_of: ScaleOf) -> None:
    parameter, scale = scale_of(LIMIT + 1)
    case = f"exp(log_scale) is {math.exp(LIMIT + 1):.0f}, `max_scale` is {MAX_SCALE:g}"
    if abs(scale.item() - math.exp(LIMIT + 1)) < TOLERANCE:
        if parameter.item() < LIMIT + 0.5:
            raise Mistake(
                f"clamps log_scale after it was used: {case}, and the first scale is still "
                f"{scale:.0f}"
            )
        if scale_of(MAX_SCALE + 1)[1] < 2 * math.exp(MAX_SCALE):
            raise Mistake(
                f"compares the logarithm with `max_scale`: {case}, "
                f"so log_scale may be at most log({MAX_SCALE:g}) = {LIMIT:.2f}"
            )
        raise Mistake(f"there is no limit: {case}, and it returns {scale:.0f}")
    if not abs(scale.item() - MAX_SCALE) < 1e-4:  # log(MAX_SCALE) may be rounded to fp32
        raise Mistake(f"{case}, and it returns {different_digits(scale, MAX_SCALE)[0]}")
    expect_gradient_at_limit(parameter, scale)
    with torch.no_grad():
        parameter.sub_(0.01)  # a step of the optimizer
    if not scale_of(parameter.item())[1] < 0.995 * MAX_SCALE:
        raise Mistake(
            "does not decrease again: after a step down from the limit the scale is still "
            "`max_scale`"
        )


def expect_gradient_at_limit(parameter: nn.Parameter, scale: Tensor) -> None:
    """Raise Mistake unless the clamped parameter can decrease. It was LIMIT + 1 before the call."""
    grad = gradient_of(scale, parameter) if scale.requires_grad else None
    if grad is None:
        raise Mistake(
            "above the limit no gradient reaches log_scale: you return the limit itself, or create "
            "a new parameter"
        )
    if grad == 0 and parameter.item() < LIMIT + 0.5:
        raise Mistake(
            "clamps the parameter and then the value too, whose gradient at the limit is 0: clamp "
            "only the parameter"
        )
    if grad == 0:
        raise Mistake(
            "only the value is clamped: above the limit its gradient is 0, and a scale that one "
            "optimizer step carried over the limit stays there for good. Clamp the parameter "
            "before you use it"
        )
    if parameter.item() > LIMIT + 0.5:
        raise Mistake(
            f"there is a gradient, but the parameter stays at {parameter.item():.2f}, and the "
            f"limit is {LIMIT:.2f}: steps down change nothing until it is back at the limit. Clamp "
            "the parameter before you use it"
        )
    if not abs(grad - MAX_SCALE) < 1e-4:
        given, _ = different_digits(grad, MAX_SCALE, 3)
        raise Mistake(
            f"at the limit the gradient is {given}, but the gradient of exp() is {MAX_SCALE:g}"
        )


# ---- step 4: recall ------------------------------------------------------------------------------


def recall(queries: Tensor, targets: Tensor) -> float:
    return contrastive.recall_at_k(queries, targets, 1)


def check_recall(answer: Answer) -> None:
    recall_of = scalar_answer(answer)
    queries, targets = random_pairs(seed=9)  # 5 of 8 queries find their target, 6 the other way
    Q, expected = B, recall(queries, targets)
    result = recall_of(queries, targets)
    if not result.is_floating_point():
        raise Mistake(f"must be a share, a floating-point number, but is {str(result.dtype)[6:]}")
    eye = torch.eye(Q, dtype=torch.float64)
    if result == 0 and recall_of(-eye, eye) == 1:
        raise Mistake("takes the lowest score as the best")
    if result == 0 and recall_of(eye, eye) == 0:
        raise Mistake(
            "never finds anything, not even for queries = targets = eye(Q): do you compare each "
            "target with itself?"
        )
    known_mistakes = [
        (
            "targets search for queries: row i of queries @ targets.T belongs to query i, so use "
            "the other dim",
            recall(targets, queries),
        ),
        ("the share of queries that did *not* find their target", 1 - expected),
        ("counts the queries that find their target: divide by Q", expected * Q),
        ("in per cent: the share is between 0 and 1", expected * 100),
        (
            "divided by Q^2: there are Q queries, and each finds its target or does not",
            expected / Q,
        ),
        ("divided by M, the width: there are Q queries", expected * Q / M),
        (
            "divided by Q - 1: there are Q queries, each with Q - 1 other targets",
            expected * Q / (Q - 1),
        ),
        (
            "the share of other targets that score lower: a query finds its target only if *all* "
            "of them score lower",
            share_of_lower_scores(queries, targets),
        ),
    ]
    for message, value in known_mistakes:
        if abs(result.item() - value) < 1e-6:
            raise Mistake(message)
    if not abs(result.item() - expected) < 1e-6:
        given, right = different_digits(result, expected)
        raise Mistake(
            f"gives {given} where {expected * Q:.0f} of {Q} queries find their target: {right}"
        )
    expect_dot_products(recall_of, queries, targets)
    expect_no_credit(recall_of, eye)
    for when, (count, width) in {
        "one query": (1, M),
        "two queries": (2, M),
        "Q < M": (4, M),
        "Q = 40": (40, M),
    }.items():
        case = random_pairs(count, width)
        if not abs(recall_of(*case, when=f"for {when}").item() - recall(*case)) < 1e-6:
            raise Mistake(f"right in general, but wrong for {when}")
    result = recall_of(queries.float(), targets.float(), when="for fp32")
    if not abs(result.item() - expected) < 1e-6:
        raise Mistake("right in fp64, but wrong in fp32")


def share_of_lower_scores(queries: Tensor, targets: Tensor) -> float:
    scores = queries @ targets.T
    is_lower = scores.diag()[:, None] > scores
    return (is_lower.sum() / (len(scores) * (len(scores) - 1))).item()


def expect_dot_products(recall_of: Callable[..., Tensor], queries: Tensor, targets: Tensor) -> None:
    """Raise Mistake unless longer targets get higher scores.

    At length 1, cosines and distances rank as dot products do, so these targets have other lengths.
    """
    lengths = 2.0 ** torch.arange(len(targets), dtype=targets.dtype)[:, None]
    longer = targets * lengths
    result, expected = recall_of(queries, longer), recall(queries, longer)
    if abs(result.item() - expected) < 1e-6:
        return
    given, right = different_digits(result, expected)
    normalised = torch.nn.functional.normalize(longer)
    if abs(result.item() - recall(queries, normalised)) < 1e-6:
        raise Mistake(
            "normalises the embeddings: scores are dot products, in which a longer target gets a "
            f"higher score. It gives {given} where targets have different lengths, not {right}"
        )
    distances = torch.cdist(queries, longer)
    if abs(result.item() - (distances.argmin(1) == torch.arange(B)).double().mean()) < 1e-6:
        raise Mistake(
            "compares distances: scores are dot products, in which a longer target gets a higher "
            f"score. It gives {given} where targets have different lengths, not {right}"
        )
    raise Mistake(f"gives {given} where targets have different lengths, not {right}")


def expect_no_credit(recall_of: Callable[..., Tensor], eye: Tensor) -> None:
    """Raise Mistake if ties or NaN count as found. `eye` (Q, Q) makes all scores exact."""
    Q = len(eye)
    constant = eye[:1].expand(Q, -1)
    result = recall_of(constant, constant, when="where all embeddings are the same").item()
    if result == 1:
        raise Mistake(
            "gives recall 1 to embeddings that have collapsed to one point: a tie must not count, "
            "so use >, not >="
        )
    if result != 0:
        raise Mistake(
            f"embeddings that have collapsed to one point get {result:.3g}: argmax returns one of "
            "several equal scores, and that is one query's own target. A target is found only if "
            "its score is higher than all others"
        )
    duplicate = eye.clone()
    duplicate[1] = duplicate[0]
    result = recall_of(eye, duplicate, when="where two targets are the same").item()
    if not abs(result - (Q - 2) / Q) < 1e-6:
        raise Mistake(
            f"two targets are the same, so {Q - 2} of {Q} queries find theirs, but it gives "
            f"{result:.3g}: do you count a tie as half a match?"
        )
    for when, (queries, targets, expected) in nan_cases(eye).items():
        result = recall_of(queries, targets, when=when).item()
        if result > expected + 1e-6:
            raise Mistake(
                f"NaN counts as found: it gives {result:.3g} {when}, not {expected:.3g} (every "
                "comparison with NaN is false)"
            )
        if not abs(result - expected) < 1e-6:
            given, right = different_digits(result, expected)
            raise Mistake(f"gives {given} {when}, not {right}")


def nan_cases(eye: Tensor) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return queries and targets with NaN, and their recall, by description."""
    Q, nan = len(eye), torch.nan
    # Query 0 finds its target here, and no other query does.
    only_first = torch.cat([eye[:1], eye[1:].roll(1, 0)])
    nan_target = only_first.clone()
    nan_target[0] = nan
    nan_first_query = torch.cat([eye[:1] * nan, eye[1:]])
    nan_second_query = torch.cat([eye[:1], eye[1:2] * nan, eye[2:]])
    return {
        "where all is NaN": (eye * nan, eye * nan, 0),
        "where all queries are NaN": (eye * nan, eye, 0),
        "where the only query with its target is NaN": (nan_first_query, only_first, 0),
        "where the only target that was found is NaN": (eye, nan_target, 0),
        "where query 1 is NaN": (nan_second_query, eye, (Q - 1) / Q),
    }


# ---- the bonus: LIMoE's entropies ----------------------------------------------------------------

N, E = 12, 5
LOOSE = 1e-6  # allows a tiny number inside the logarithm, a fair way to avoid NaN
OUTPUTS = ("local", "global")


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def reference_entropies(probs: Tensor) -> tuple[Tensor, Tensor]:
    return entropy(probs).mean(), entropy(probs.mean(0))


def check_entropies(answer: Answer) -> None:
    def entropies_of(probs: Tensor, when: str = "") -> tuple[Tensor, Tensor]:
        """Call the answer and check the shapes of its results."""
        hints = {(N,): ": take the mean over the tokens", (E,): ": sum over the experts"}
        results = answer(probs, when=when)
        for name, result in zip(OUTPUTS, results, strict=True):
            hint = f", {when}" if when else hints.get(tuple(result.shape), "")
            expect_shape(result, (), f" ({name}){hint}")
        return results

    logits = 2 * torch.randn(N, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, 0] += 1
    probs = logits.softmax(-1)
    results = entropies_of(probs)
    for result in results:
        expect_dtype(result, probs)
    expected = reference_entropies(probs)
    if is_close(results[0], expected[1], LOOSE) and is_close(results[1], expected[0], LOOSE):
        raise Mistake("returns global, local: swap the two (local is the mean of the entropies)")
    expect_local(results[0], probs)
    expect_global(results[1], probs)
    expect_entropies_of_special_cases(entropies_of, probs)
    expect_gradients(
        lambda x: torch.stack(list(entropies_of(x.softmax(-1)))),
        lambda x: torch.stack(list(reference_entropies(x.softmax(-1)))),
        {"probs": logits},
    )
    certain = torch.eye(E).repeat(2, 1)
    results = entropies_of(certain, when="in fp32")
    for result, value in zip(results, (0, math.log(E)), strict=True):
        if not is_close(result, torch.tensor(value), 1e-5):
            raise Mistake("right in fp64, but wrong in fp32")


FACTORS = [
    ("", 1),
    ("has the wrong sign: an entropy is never negative", -1),
    ("uses the logarithm to base 2 (bits): use base e (nats)", 1 / math.log(2)),
    ("is divided by ln E", 1 / math.log(E)),
    ("averages over the experts: an entropy is a sum over them", 1 / E),
]
FACTORS_OVER_TOKENS = [
    ("is summed over the tokens: average over them", N),
    ("sums over the tokens and averages over the experts: do the opposite", N / E),
]


def expect_local(result: Tensor, p: Tensor) -> None:
    local, global_ = reference_entropies(p)
    values = [
        ("", local),
        (
            "is the entropy of the mean, as global is: take the mean of the tokens' entropies",
            global_,
        ),
        ("applies a softmax again: probs are probabilities", entropy(p.softmax(-1)).mean()),
    ]
    expect_entropy("local", result, values, FACTORS + FACTORS_OVER_TOKENS)


def expect_global(result: Tensor, p: Tensor) -> None:
    local, global_ = reference_entropies(p)
    values = [
        ("", global_),
        ("is the mean of the entropies, as local is: take the entropy of the mean", local),
        (
            "sums the probabilities over the tokens: take their mean, which sums to 1 as "
            "probabilities must",
            entropy(p.sum(0)),
        ),
        (
            "averages over the experts, and not over the tokens: use mean(0)",
            entropy(p.mean(-1)),
        ),
        ("applies a softmax again: probs are probabilities", entropy(p.mean(0).softmax(-1))),
        (
            "applies a softmax to the sum: the mean over the tokens sums to 1 already",
            entropy(p.sum(0).softmax(-1)),
        ),
    ]
    expect_entropy("global", result, values, FACTORS)


def expect_entropy(name: str, result: Tensor, values: list, factors: list) -> None:
    """Raise Mistake with `name` in front unless `result` is the first of `values`."""
    try:
        raise_known_mistake(
            result, lambda value, factor: value * factor, values, factors, tolerance=LOOSE
        )
        expect_value(result, values[0][1], LOOSE)
    except Mistake as mistake:
        raise Mistake(f"{name} {mistake}") from None


def expect_entropies_of_special_cases(
    entropies_of: Callable[..., tuple[Tensor, Tensor]], p: Tensor
) -> None:
    certain = torch.eye(E, dtype=torch.float64).repeat(2, 1)
    cases = {
        "each token has probability 1 for one expert and 0 for the others": certain,
        "all tokens have probability 1 for the same expert": certain[:1].expand(N, -1),
        "there is one token": p[:1],
        "there is one expert": torch.ones(N, 1, dtype=torch.float64),
        "all experts have the same probability": torch.full((N, E), 1 / E, dtype=torch.float64),
    }
    for when, probs in cases.items():
        results = entropies_of(probs, when=f"where {when}")
        for name, result, expected in zip(
            OUTPUTS, results, reference_entropies(probs), strict=True
        ):
            if not result.isfinite():
                raise Mistake(
                    f"{name} is {result:.0f} where {when}: log(0) is -inf, and 0 * -inf is NaN, "
                    "but p ln p is 0 there"
                )
            if not is_close(result, expected, LOOSE):
                given, right = different_digits(result, expected)
                raise Mistake(f"right in general, but {name} is {given} where {when}, not {right}")


STEPS = [
    Step("contrastive_loss", check_loss),
    Step("loss_with_duplicates", check_duplicates),
    Step("logit_scale", check_scale),
    Step("recall_at_1", check_recall),
    Step("sigmoid_loss", check_sigmoid),
    Step("entropies", check_entropies, optional=True, returns=OUTPUTS),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
