"""Experiments on a mixture of experts that a learner wrote.

Each experiment raises `Mistake` with a sentence that says what is wrong. In the main experiment
token s is the s-th unit vector, and expert e maps it to unit vector e N + s. The output then shows
which experts' outputs, for which tokens and with what weights, were added to it. Tokens, experts
and slots count from 0.
"""

from collections.abc import Callable

import torch
from grade import (
    TOLERANCE,
    Answer,
    Crash,
    Mistake,
    different_digits,
    expect_dtype,
    expect_gradients,
    expect_shape,
    first_index,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanods.moe import experts_loop

# All sizes differ, so that two of them cannot be confused. N K = 32, so every fraction of the
# assignments is exact in fp32.
N, E, K, F = 16, 5, 2, 20
C = N * E  # one channel for each pair of an expert and a token, for the main experiment

RunExperts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def random_inputs(
    N: int = N, K: int = K, seed: int = 1, unused: tuple[int, ...] = ()
) -> list[Tensor]:
    """Return x, weights, experts, up, out in fp64. No token selects the `unused` experts."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scores = random(N, E)
    scores[:, list(unused)] = -torch.inf
    best, experts = scores.topk(K)
    weights = best.softmax(-1)
    x = random(N, C)
    up = random(E, F, C) / C**0.5
    out = random(E, C, F) / F**0.5
    return [x, weights, experts, up, out]


def with_expected_shape(answer: Answer) -> RunExperts:
    """Return `answer` as a function that raises Mistake unless its output has the shape of x."""

    def run_experts(x: Tensor, weights: Tensor, *rest: Tensor, when: str = "") -> Tensor:
        y = answer(x, weights, *rest, when=when)
        N, K = weights.shape
        hints = {
            (N, K, C): ": sum over the slots of each token",
            (N * K, C): ": add the assignments to their tokens",
        }
        expect_shape(y, x.shape, hints.get(tuple(y.shape), ""), when)
        return y

    return run_experts


def expect_mixture(run_experts: RunExperts) -> None:
    """Raise Mistake unless `run_experts` computes what nanods' experts_loop does."""
    x, weights, experts, up, out = random_inputs()
    try:
        y = run_experts(x, weights, experts, up, out)
    except Crash as crash:
        if crash.reason.startswith("NameError"):
            raise Mistake(
                f"uses a name that is not defined, as the article's snippet does: {crash.reason}"
            ) from None
        raise
    expect_dtype(y, x)
    if not y.isfinite().all():
        raise Mistake(
            f"returns NaN or infinity for token {first_index(~y.isfinite())[0]}: "
            "did you use empty() instead of zeros()?"
        )
    expect_activation(run_experts)
    M = contributions(run_experts, weights, experts)
    expect_selected(M, experts)
    expect_separate_tokens(M)
    expect_weights(M, weights, experts)
    if not (y - experts_loop(x, weights, experts, up, out)).abs().max() < TOLERANCE:
        raise Mistake(
            "right if all up[e] are equal, wrong if they differ: "
            "do you use up[e] together with out[e]?"
        )
    expect_gradients(
        lambda x, weights, up, out: run_experts(x, weights, experts, up, out),
        lambda x, weights, up, out: experts_loop(x, weights, experts, up, out),
        {"x": x, "weights": weights, "up": up, "out": out},
    )
    single = [part.float() if part.is_floating_point() else part for part in random_inputs()]
    expect_dtype(run_experts(*single), x.float())


def expect_activation(run_experts: RunExperts) -> None:
    """Raise Mistake unless the activation is a squared ReLU.

    With one token, one expert and one channel the output is y = activation(x).
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    expert_0 = torch.zeros(1, 1, dtype=torch.long)
    when = "for one token and one expert"
    ys = [run_experts(x * one, one, expert_0, one[None], one[None], when=when) for x in (1, 2, -2)]
    known_mistakes = {
        (2, 0): "the ReLU is not squared",
        (4, 4): "it is squared, but there is no ReLU",
        (2, -2): "there is no activation between up and out",
    }
    at_1, at_2, at_minus_2 = (round(y.item(), 9) for y in ys)
    # If the output at 1 is not 1, the weights are wrong; then the output at 2 is 4 times as large.
    if abs(at_2 - 4 * at_1) > 1e-6 or at_minus_2 != 0:
        why = known_mistakes.get((at_2, at_minus_2), "is it relu(.) ** 2?")
        raise Mistake(
            f"the activation of 2 and -2 is {at_2:.3g} and {at_minus_2:.3g}, "
            f"but squared ReLU gives 4 and 0: {why}"
        )


def contributions(run_experts: RunExperts, weights: Tensor, experts: Tensor) -> Tensor:
    """Return (E, N, N): the weight of expert e's output for token s in the output of token t."""
    x, up = (torch.eye(rows, C, dtype=torch.float64) for rows in (N, F))
    out = torch.zeros(E, C, F, dtype=torch.float64)
    for e in range(E):
        out[e, e * N : (e + 1) * N, :N] = torch.eye(N)
    y = run_experts(x, weights, experts, up.repeat(E, 1, 1), out)
    return y.view(N, E, N).transpose(0, 1)


def expect_selected(M: Tensor, experts: Tensor) -> None:
    """Raise Mistake unless each token runs through the experts it selected and no others."""
    ran = (M != 0).any(1)  # (E, N): expert e's output for token s is part of any output
    selected = (experts == torch.arange(E)[:, None, None]).any(-1)  # (E, N)
    if not ran.any():
        raise Mistake("the output does not depend on any expert: it is all zeros, or a constant")
    if ran[:K].any() and not ran[K:].any():
        s = first_index((experts >= K).all(-1))[0]
        raise Mistake(
            f"only the experts 0 to {K - 1} ever run: the slot (0 to {K - 1}) was used as the "
            f"expert's index (0 to {E - 1}), as in the article's snippet; "
            f"token {s} selected the experts {experts[s].tolist()}"
        )
    if ran.all():
        raise Mistake(
            "every expert runs for every token, "
            f"but token 0 selected only the experts {experts[0].tolist()}"
        )
    if (ran & ~selected).any():
        e, s = first_index(ran & ~selected)
        raise Mistake(
            f"expert {e} runs for token {s}, which selected the experts {experts[s].tolist()}"
        )
    lost = selected & ~ran
    if not lost.any():
        return
    e, s = first_index(lost)
    if (ran.sum(0) == 1).all():
        kept = ran.long().argmax(0)  # (N,): the only expert whose output is left
        if kept.equal(experts[:, 0]):
            raise Mistake(
                "only the first choice of each token counts: the experts in the other slots never "
                "run"
            )
        raise Mistake(
            f"token {s} keeps the output of expert {kept[s]} only, although it selected the "
            f"experts {experts[s].tolist()}: the other outputs are overwritten instead of added "
            "(use index_add; y[index] += rows keeps only one row if a token is in index twice)"
        )
    if not ran[e].any():
        raise Mistake(
            f"expert {e} never runs, although token {s} selected it: loop over all {E} experts"
        )
    raise Mistake(f"expert {e} does not run for token {s}, which selected it")


def expect_separate_tokens(M: Tensor) -> None:
    """Raise Mistake unless an expert's output for a token is added to that token only."""
    stray = (M != 0) & ~torch.eye(N, dtype=torch.bool)
    if not stray.any():
        return
    e, t, s = first_index(stray)
    rows = (M != 0).any(2)  # (E, N): the outputs that expert e adds to
    in_first_rows = rows.equal(torch.arange(N) < rows.sum(1, keepdim=True))
    in_one_output = (M != 0).sum(1).max() == 1  # each expert's output for a token is added once
    if in_one_output and not in_first_rows:
        raise Mistake(
            f"the rows are still sorted by expert: the output of token {t} is that of expert {e} "
            f"for token {s}. Sorted row i belongs to token order[i] // K: add it there"
        )
    if in_one_output:
        how = "each expert's rows are added to the first outputs instead of those of its tokens"
    else:
        how = "is it a sum over its rows?"
    raise Mistake(
        "different tokens are added together, as in the article's snippet: "
        f"the output of token {t} contains that of expert {e} for token {s} ({how})"
    )


def expect_weights(M: Tensor, weights: Tensor, experts: Tensor) -> None:
    """Raise Mistake unless each expert's output is multiplied by its weight."""
    token = torch.arange(N)[:, None]
    actual = M[experts, token, token]  # (N, K)
    if (actual - 1).abs().max() < TOLERANCE:
        raise Mistake(
            "the gate's weights are ignored, as in the article's snippet: "
            "each expert's output has the weight 1"
        )
    if (actual - 1 / K).abs().max() < TOLERANCE:
        raise Mistake("the gate's weights are ignored: a plain mean over a token's experts")
    if (actual - weights**2).abs().max() < TOLERANCE:
        raise Mistake(
            "the weights appear squared: multiply the output of an expert by its weight, "
            "not the input"
        )
    wrong = (actual - weights).abs() > TOLERANCE
    if not wrong.any():
        return
    t, k = first_index(wrong)
    factor, right = different_digits(actual[t, k], weights[t, k], 3)
    what = f"the output of expert {experts[t, k]} for token {t} is multiplied by {factor}"
    if (match := (weights - actual[t, k]).abs() < TOLERANCE).any():
        s, j = first_index(match)
        raise Mistake(
            f"{what}, the weight of token {s} in slot {j}, "
            f"instead of its own weight {right} in slot {k}"
        )
    raise Mistake(f"{what}, not by its weight {right}")


def expect_special_cases(run_experts: RunExperts) -> None:
    """Raise Mistake unless the limit cases are right too."""
    cases = {
        "K = 1": random_inputs(K=1),
        "every expert selected by every token (K = E)": random_inputs(K=E),
        "unused experts 1 and 3": random_inputs(unused=(1, 3)),
        "an unused last expert": random_inputs(unused=(E - 1,)),
        "one token": random_inputs(N=1),
    }
    for when, inputs in cases.items():
        y = run_experts(*inputs, when=f"for {when}")
        if not (y - experts_loop(*inputs)).abs().max() < TOLERANCE:
            hint = ": an expert without tokens has an empty slice" if "unused" in when else ""
            raise Mistake(f"right in general, but wrong for {when}{hint}")


def expect_minimal_work(run_experts: RunExperts) -> None:
    """Raise Mistake if there are more FLOPs than the products of N K rows with their experts."""
    with FlopCounterMode(display=False) as counter:
        run_experts(*random_inputs())
    flops = N * K * 4 * C * F  # two products with C F multiplications and additions a row
    ratio = counter.get_total_flops() / flops
    if ratio > 1.01:
        raise Mistake(
            f"right, but {ratio:.3g} times the work: give each expert only the rows of its slice"
        )
