"""Experiments on a mixture of experts that someone else wrote. What is wrong is raised as a Mistake, in words.

The main one: token s is the s-th unit vector, and expert e turns that into unit vector e N + s. The output then *is* the list
of what it is made of: which expert's result of which token, and with what weight. All numbers count from 0.
"""

from collections.abc import Callable

import torch
from grade import (
    TOLERANCE,
    Answer,
    Crash,
    Mistake,
    expect_dtype,
    expect_gradients,
    expect_shape,
    first_index,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanods.moe import experts_loop

N, E, K, F = (
    16,
    5,
    2,
    20,
)  # all different, so that no two can be confused; with N K = 32 every share of it is exact in fp32
C = N * E  # room for the main experiment

Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def tokens(N: int = N, K: int = K, seed: int = 1, unused: tuple[int, ...] = ()) -> list[Tensor]:
    """x, weights, experts, up, out; nobody chooses the `unused` experts."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scores = random(N, E)
    scores[:, list(unused)] = -torch.inf
    best, experts = scores.topk(K)
    return [
        random(N, C),
        best.softmax(-1),
        experts,
        random(E, F, C) / C**0.5,
        random(E, C, F) / F**0.5,
    ]


def shaped(answer: Answer) -> Mix:
    """`answer`, which must return the shape of x each time."""

    def mix(x: Tensor, weights: Tensor, *rest: Tensor, when: str = "") -> Tensor:
        y, (N, K) = answer(x, weights, *rest, when=when), weights.shape
        apart = {
            (N, K, C): ": sum over the slots of each token",
            (N * K, C): ": add the assignments to their tokens",
        }
        expect_shape(y, x.shape, f", {when}" if when else apart.get(tuple(y.shape), ""))
        return y

    return mix


def examine(mix: Mix) -> None:
    """`mix` must mix as nanods does."""
    x, weights, experts, up, out = tokens()
    try:
        y = mix(x, weights, experts, up, out)
    except Crash as crash:
        if crash.reason.startswith("NameError"):
            raise Mistake(
                f"reads a name that is not defined, as the article's snippet does: {crash.reason}"
            ) from None
        raise
    expect_dtype(y, x)
    if not y.isfinite().all():
        raise Mistake(
            f"returns NaN or infinity for token {first_index(~y.isfinite())[0]}: empty() instead of zeros()?"
        )
    expect_activation(mix)
    M = parts(mix, weights, experts)
    expect_chosen(M, experts)
    expect_own_row(M)
    expect_weights(M, weights, experts)
    if not (y - experts_loop(x, weights, experts, up, out)).abs().max() < TOLERANCE:
        raise Mistake(
            "right where all up[e] are equal, wrong where they differ: is it up[e] that goes with out[e]?"
        )
    expect_gradients(
        lambda x, weights, up, out: mix(x, weights, experts, up, out),
        lambda x, weights, up, out: experts_loop(x, weights, experts, up, out),
        {"x": x, "weights": weights, "up": up, "out": out},
    )
    expect_dtype(
        mix(*(part.float() if part.is_floating_point() else part for part in tokens())), x.float()
    )


def expect_activation(mix: Mix) -> None:
    """One token, one expert, one channel: y = activation(x)."""
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    ys = [
        mix(x * one, one, none, one[None], one[None], when="for one token and one expert")
        for x in (1, 2, -2)
    ]
    known = {
        (2, 0): "the ReLU is not squared",
        (4, 4): "it is squared, but there is no ReLU",
        (2, -2): "there is no activation between up and out",
    }
    unit, a, b = (round(y.item(), 9) for y in ys)
    if abs(a - 4 * unit) > 1e-6 or b != 0:  # a wrong `unit` is that of the weights
        why = known.get((a, b), "is it relu(.) ** 2?")
        raise Mistake(
            f"the activation turns 2 and -2 into {a:.3g} and {b:.3g}, where squared ReLU makes 4 and 0: {why}"
        )


def parts(mix: Mix, weights: Tensor, experts: Tensor) -> Tensor:
    """(E, N, N): how much of expert e's result of token s is in the output of token t."""
    x, up = (torch.eye(rows, C, dtype=torch.float64) for rows in (N, F))
    out = torch.zeros(E, C, F, dtype=torch.float64)
    for e in range(E):
        out[e, e * N : (e + 1) * N, :N] = torch.eye(N)
    y = mix(x, weights, experts, up.repeat(E, 1, 1), out)
    return y.view(N, E, N).transpose(0, 1)


def expect_chosen(M: Tensor, experts: Tensor) -> None:
    """Each token goes to its experts, and to no other."""
    ran = (M != 0).any(1)  # (E, N): what expert e makes of token s is in some output
    chose = (experts == torch.arange(E)[:, None, None]).any(-1)  # (E, N)
    if not ran.any():
        raise Mistake("the output does not depend on any expert: it is all zeros, or a constant")
    if ran[:K].any() and not ran[K:].any():
        s = first_index((experts >= K).all(-1))[0]
        raise Mistake(
            f"only the experts 0 to {K - 1} ever run: the number of the slot (0 to {K - 1}) was taken for that of the expert "
            f"(0 to {E - 1}), as in the article's snippet; token {s} chose the experts {experts[s].tolist()}"
        )
    if ran.all():
        raise Mistake(
            f"every expert counts for every token: token 0 chose the experts {experts[0].tolist()} alone"
        )
    if (ran & ~chose).any():
        e, s = first_index(ran & ~chose)
        raise Mistake(
            f"expert {e} runs for token {s}, which chose the experts {experts[s].tolist()}"
        )
    if not (lost := chose & ~ran).any():
        return
    if (ran.sum(0) == 1).all():
        stays = ran.long().argmax(0)  # (N,)
        if stays.equal(experts[:, 0]):
            raise Mistake(
                "only the first choices count: the experts in the other slots are never run"
            )
        e, s = first_index(lost)
        raise Mistake(
            f"of what its experts {experts[s].tolist()} make of token {s} only that of {stays[s]} is left: the others are "
            "overwritten, not added to (y[index] += rows keeps one row too, where a token is twice in index: index_add)"
        )
    e, s = first_index(lost)
    if not ran[e].any():
        raise Mistake(
            f"expert {e} never runs, though token {s} chose it: the loop should go over all {E}"
        )
    raise Mistake(f"expert {e} does not run for token {s}, which chose it")


def expect_own_row(M: Tensor) -> None:
    """What is made of a token goes to its own output."""
    stray = (M != 0) & ~torch.eye(N, dtype=torch.bool)
    if not stray.any():
        return
    e, t, s = first_index(stray)
    rows = (M != 0).any(2)  # (E, N): the outputs that expert e adds to
    at_top = rows.equal(torch.arange(N) < rows.sum(1, keepdim=True))
    once = (M != 0).sum(1).max() == 1  # each result is in one output only
    if once and not at_top:
        raise Mistake(
            f"the rows are still in the order of the experts: the output of token {t} is what expert {e} made of token {s}. "
            "Sorted row i belongs to token order[i] // K: add it there"
        )
    how = (
        "each expert's rows went to the first outputs, not to those of its tokens"
        if once
        else "a sum over its rows?"
    )
    raise Mistake(
        f"different tokens are added together, as in the article's snippet: in the output of token {t} is what expert {e} made "
        f"of token {s} ({how})"
    )


def expect_weights(M: Tensor, weights: Tensor, experts: Tensor) -> None:
    """Each result is multiplied by its weight."""
    token = torch.arange(N)[:, None]
    got = M[experts, token, token]  # (N, K)
    if (got - 1).abs().max() < TOLERANCE:
        raise Mistake(
            "the gate's weights are ignored, as in the article's snippet: each expert's result counts once, in full"
        )
    if (got - 1 / K).abs().max() < TOLERANCE:
        raise Mistake("the gate's weights are ignored: a plain mean over a token's experts")
    if (got - weights**2).abs().max() < TOLERANCE:
        raise Mistake(
            "the weights appear squared: they multiply what goes into an expert, and should multiply what comes out"
        )
    if not (wrong := (got - weights).abs() > TOLERANCE).any():
        return
    t, k = first_index(wrong)
    what = f"what expert {experts[t, k]} makes of token {t} is multiplied by {got[t, k]:.3f}"
    if (same := (weights - got[t, k]).abs() < TOLERANCE).any():
        s, j = first_index(same)
        raise Mistake(
            f"{what}, the weight of token {s} in slot {j}, instead of its own, in slot {k}: {weights[t, k]:.3f}"
        )
    raise Mistake(f"{what}, not by its weight {weights[t, k]:.3f}")


def expect_cases(mix: Mix) -> None:
    cases = {
        "K = 1": tokens(K=1),
        "every expert chosen by every token (K = E)": tokens(K=E),
        "experts 1 and 3 chosen by nobody": tokens(unused=(1, 3)),
        "the last expert chosen by nobody": tokens(unused=(E - 1,)),
        "one token": tokens(N=1),
    }
    for when, given in cases.items():
        if not (mix(*given, when=f"for {when}") - experts_loop(*given)).abs().max() < TOLERANCE:
            raise Mistake(f"right in general, but wrong for {when}")


def expect_little_work(mix: Mix) -> None:
    """The products of N K tokens with their experts, no more."""
    with FlopCounterMode(display=False) as counter:
        mix(*tokens())
    times = counter.get_total_flops() / (
        N * K * 4 * C * F
    )  # two products of C F multiplications and additions
    if times > 1.01:
        raise Mistake(
            f"right, but {times:.3g} times the work: give each expert the rows of its own slice alone"
        )
