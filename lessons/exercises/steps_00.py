"""The steps of lesson 00, each with its tests. check_00.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_00.py FILE

The grader finds mistakes by experiments on the functions, never by reading their source. The
references are those of nanods: tests/lessons/test_exercise_00_right.py compares them.
"""

import sys
from collections.abc import Callable

import torch
from grade import (
    Answer,
    KnownMistakes,
    Mistake,
    Step,
    different_digits,
    expect_dtype,
    expect_gradients,
    expect_shape,
    first_index,
    main,
    random,
)
from probe_counts import judge, judge_cases, tensor
from torch import Tensor

TOLERANCE = 1e-4  # an epsilon in a denominator is right, and so is fp32


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether a and b have the same shape and are close. False if one contains NaN."""
    limit = TOLERANCE * (1 + b.abs())
    return a.shape == b.shape and bool(((a.double() - b).abs() < limit).all())


def judge_elements(result: Tensor, expected: Tensor, known: KnownMistakes, name: str) -> None:
    """Raise Mistake unless the result is `expected`: the mistake if it is known, or else the first
    element that differs."""
    if is_close(result, expected):
        return
    for message, make in known.items():
        if is_close(result, make()):
            raise Mistake(message)
    if not result.isfinite().all():
        raise Mistake(f"{name}{first_index(~result.isfinite())} is NaN or infinite")
    where = first_index((result - expected).abs() >= TOLERANCE)
    given, right = different_digits(result[tuple(where)], expected[tuple(where)])
    raise Mistake(f"{name}{where} is {given}, but {right} is correct")


def judge_special(
    answer: Answer, cases: dict[str, tuple], reference: Callable[..., Tensor]
) -> None:
    """Raise Mistake unless the answer is right in each of these cases, by their names, in the dtype
    of its first argument."""
    for when, case in cases.items():
        expected, result = reference(*case), answer(*case, when=when)
        expect_shape(result, tuple(expected.shape), when=when)
        expect_dtype(result, case[0])
        if not is_close(result, expected):
            raise Mistake(f"right in general, but wrong {when}")


# ---- step 1: RMSNorm -----------------------------------------------------------------------------


def reference_norm(x: Tensor, gain: float) -> Tensor:
    return gain * x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def some_vectors() -> tuple[Tensor, float]:
    """Return vectors (B, T, C) of different lengths, whose mean is not zero, and a gain."""
    return 2 * (random(3, 4, 6) + 0.5) * random(3, 4, 1, seed=2).exp().clamp(min=1), 1.7


def known_norms(x: Tensor, gain: float) -> KnownMistakes:
    square, C = x.square(), x.size(-1)
    centred = x - x.mean(-1, keepdim=True)
    return {
        "subtracts the mean: that is LayerNorm, RMSNorm only divides": (
            lambda: reference_norm(centred, gain)
        ),
        "gives each vector the length `gain`: the mean of its squares counts, not their sum": (
            lambda: gain * x / square.sum(-1, keepdim=True).sqrt()
        ),
        "divides by the mean of the squares: take its root": (
            lambda: gain * x / square.mean(-1, keepdim=True)
        ),
        "divides by the standard deviation, which leaves out the mean": (
            lambda: gain * x / x.std(-1, keepdim=True, correction=0)
        ),
        "divides by torch.std: it leaves out the mean, and divides by C - 1": (
            lambda: gain * x / x.std(-1, keepdim=True)
        ),
        "divides the sum of the squares by C - 1: a mean divides by C": (
            lambda: reference_norm(x, gain) * ((C - 1) / C) ** 0.5
        ),
        "one root mean square for the whole tensor: each vector has its own": (
            lambda: gain * x / square.mean().sqrt()
        ),
        "the mean runs over the tokens: it is over the last dimension, C": (
            lambda: gain * x / square.mean(1, keepdim=True).sqrt()
        ),
        "the mean runs over the batch: it is over the last dimension, C": (
            lambda: gain * x / square.mean(0, keepdim=True).sqrt()
        ),
        "one root mean square for all tokens of a sequence: each vector has its own": (
            lambda: gain * x / square.mean((1, 2), keepdim=True).sqrt()
        ),
        "`gain` is not used": lambda: reference_norm(x, 1.0),
        "divides by `gain`: multiply by it": lambda: reference_norm(x, 1 / gain),
        "multiplies by `gain` twice": lambda: reference_norm(x, gain**2),
        "multiplies by the root mean square: divide by it": (
            lambda: gain * x * square.mean(-1, keepdim=True).sqrt()
        ),
        "divides by the mean magnitude: square first, then the mean, then the root": (
            lambda: gain * x / x.abs().mean(-1, keepdim=True)
        ),
        "divides by the largest magnitude": lambda: gain * x / x.abs().amax(-1, keepdim=True),
        "returns magnitudes: the direction of a vector stays": (
            lambda: reference_norm(x, gain).abs()
        ),
    }


def check_norm(answer: Answer) -> None:
    x, gain = some_vectors()
    result = answer(x, gain)
    is_factor = tuple(result.shape) == (3, 4, 1)
    hint = ": is this the factor, not yet multiplied by x?" if is_factor else ""
    expect_shape(result, tuple(x.shape), hint)
    expect_dtype(result, x)
    judge_elements(result, reference_norm(x, gain), known_norms(x, gain), "y")
    zeros = answer(torch.zeros(2, 3, dtype=torch.float64), 1.0, when="for zeros")
    if zeros.isnan().any():
        raise Mistake("0 / 0: a vector of zeros becomes NaN")
    cases = {
        "for a vector of zeros": (torch.zeros(2, 3, dtype=torch.float64), 2.0),
        "for one vector (C,)": (x[0, 0], 1.0),
        "for (B, H, T, D)": (random(2, 3, 4, 5), 1.0),
        "for fp32": (x.float(), 1.0),
    }
    judge_special(answer, cases, reference_norm)
    expect_gradients(
        lambda x: answer(x, gain), lambda x: reference_norm(x, gain), {"x": x}, TOLERANCE
    )


# ---- step 2: RoPE --------------------------------------------------------------------------------


def angles_of(positions: Tensor, D: int, base: float) -> Tensor:
    return positions[:, None] * base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate the pairs of x (..., T, D) by angles (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def reference_rope(x: Tensor, positions: Tensor, base: float) -> Tensor:
    return rotate(x, angles_of(positions, x.size(-1), base))


def some_queries() -> tuple[Tensor, Tensor, float]:
    """Return x (B, H, T, D), positions that are not 0 to T - 1, and a base."""
    return random(2, 3, 5, 8), torch.tensor([2, 3, 5, 6, 11]), 50.0


def known_ropes(x: Tensor, positions: Tensor, base: float) -> KnownMistakes:
    T, D = x.shape[-2:]
    angle = angles_of(positions, D, base)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    i = torch.arange(D // 2, dtype=torch.float64)

    def with_frequency(frequency: Tensor) -> Tensor:
        return rotate(x, positions[:, None] * frequency)

    def interleaved() -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2)

    return {
        "pairs neighbouring channels, 2i and 2i + 1: pair i is the channels i and i + D/2": (
            interleaved
        ),
        "rotates the other way: b sin t is subtracted from a cos t": lambda: rotate(x, -angle),
        "the exponent is -i/D: it is -2i/D": lambda: with_frequency(base ** (-i / D)),
        "the exponent is -4i/D: it is -2i/D, for i below D/2": (
            lambda: with_frequency(base ** (-4 * i / D))
        ),
        "the frequencies grow with i: the exponent is negative": (
            lambda: with_frequency(base ** (2 * i / D))
        ),
        "the frequencies are in reverse order: pair 0 turns fastest": (
            lambda: rotate(x, angle.flip(-1))
        ),
        "all pairs turn by the same angle: pair i by p * base^(-2i/D)": (
            lambda: with_frequency(torch.ones_like(i))
        ),
        "uses base 10,000, not `base`": lambda: with_frequency(10_000 ** (-2 * i / D)),
        "uses 0 to T - 1, not `positions`": (
            lambda: rotate(x, angles_of(torch.arange(T), D, base))
        ),
        "counts positions from 1 more than they are": (
            lambda: rotate(x, angles_of(positions + 1, D, base))
        ),
        "rotates twice": lambda: rotate(x, 2 * angle),
        "returns x: nothing is rotated": lambda: x,
        "multiplies by the cosine alone: a rotation mixes a and b": (
            lambda: torch.cat([a * cos, b * cos], dim=-1)
        ),
        "both sines have the same sign: one is subtracted": (
            lambda: torch.cat([a * cos + b * sin, a * sin + b * cos], dim=-1)
        ),
        "the second half uses the first half that is already rotated": (
            lambda: torch.cat([a * cos - b * sin, (a * cos - b * sin) * sin + b * cos], dim=-1)
        ),
        "the halves of the result are swapped": (
            lambda: torch.cat([a * sin + b * cos, a * cos - b * sin], dim=-1)
        ),
        "the halves of x are swapped, but not those of the result": (
            lambda: torch.cat([b * cos - a * sin, b * sin + a * cos], dim=-1)
        ),
        "neighbouring channels of the result are the two of a pair: concatenate the halves": (
            lambda: torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        ),
    }


def check_rope(answer: Answer) -> None:
    case = some_queries()
    result = answer(*case)
    expect_shape(result, tuple(case[0].shape))
    expect_dtype(result, case[0])
    judge_elements(result, reference_rope(*case), known_ropes(*case), "y")
    x, positions, base = case
    cases = {
        "for one token": (x[:, :, :1], positions[:1], base),
        "for one pair, D = 2": (x[..., :2], positions, base),
        "for position 0": (x[:, :, :1], torch.tensor([0]), base),
        "for T = H": (x[:, :, :3], positions[:3], base),
        "for T = D / 2": (x[:, :, :4], positions[:4], base),
        "for position 501": (x[:, :, :1], torch.tensor([501]), base),
        "for fp32": (x.float(), positions, base),
        "for positions in no order": (x, torch.tensor([7, 0, 3, 3, 1]), 1000.0),
    }
    judge_special(answer, cases, reference_rope)


# ---- step 3: attention with QK-norm --------------------------------------------------------------


def causal_softmax(scores: Tensor) -> Tensor:
    is_future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(is_future, -torch.inf).softmax(-1)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, gain: float) -> Tensor:
    return attention_by(q, k, v, reference_norm(q, gain), reference_norm(k, 1.0))


def attention_by(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, scale: float | None = None
) -> Tensor:
    """Return attention with these normalised queries and keys."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    return causal_softmax(scale * q_norm @ k_norm.mT) @ v


def some_qkv() -> tuple[Tensor, Tensor, Tensor, float]:
    """Return q, k, v (B, H, T, D) with vectors of different lengths and means, and a gain."""
    q, k, v = (random(2, 3, 5, 8, seed=seed) for seed in (1, 2, 3))
    return 2 * (q + 0.3) * random(2, 3, 5, 1, seed=4).exp().clamp(min=1), 1.5 * k - 0.4, v, 1.6


def known_attentions(q: Tensor, k: Tensor, v: Tensor, gain: float) -> KnownMistakes:
    q_norm, k_norm, D = reference_norm(q, gain), reference_norm(k, 1.0), q.size(-1)
    T = q.size(-2)
    scores = q_norm @ k_norm.mT / D**0.5
    past = torch.ones(T, T, dtype=torch.bool).tril()
    by = (q, k, v)

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    def masked(scores: Tensor, mask: Tensor, value: float = -torch.inf) -> Tensor:
        return scores.masked_fill(~mask, value)

    return {
        "queries and keys are not normalised": lambda: attention_by(*by, q, k),
        "queries are multiplied by `gain`, but neither they nor keys are normalised": (
            lambda: attention_by(*by, gain * q, k)
        ),
        "only the queries are normalised: keys too": lambda: attention_by(*by, q_norm, k),
        "only the keys are normalised: queries too": lambda: attention_by(*by, q, k_norm),
        "only the keys are normalised, and queries multiplied by `gain`": (
            lambda: attention_by(*by, gain * q, k_norm)
        ),
        "`gain` is not used: it is the root mean square of the queries": (
            lambda: attention_by(*by, q_norm / gain, k_norm)
        ),
        "both queries and keys have the root mean square `gain`: keys have 1": (
            lambda: attention_by(*by, q_norm, gain * k_norm)
        ),
        "divides by `gain`: multiply by it": lambda: attention_by(*by, q_norm / gain**2, k_norm),
        "queries and keys have the *length* `gain` and 1: their root mean square is": (
            lambda: attention_by(*by, q_norm / D**0.5, k_norm / D**0.5)
        ),
        "the score is the cosine times `gain`: it is sqrt(D) times as large": (
            lambda: attention_by(*by, q_norm, k_norm, 1 / D)
        ),
        "scores are not divided by sqrt(D)": lambda: attention_by(*by, q_norm, k_norm, 1.0),
        "the norm runs over the tokens: it is over D": (
            lambda: attention_by(
                *by,
                gain * q / q.square().mean(-2, keepdim=True).sqrt(),
                k / k.square().mean(-2, keepdim=True).sqrt(),
            )
        ),
        "the norm runs over all of a sequence: each vector has its own": (
            lambda: attention_by(
                *by,
                gain * q / q.square().mean((-2, -1), keepdim=True).sqrt(),
                k / k.square().mean((-2, -1), keepdim=True).sqrt(),
            )
        ),
        "the norm subtracts the mean: that is LayerNorm": (
            lambda: attention_by(
                *by, reference_norm(centred(q), gain), reference_norm(centred(k), 1.0)
            )
        ),
        "values are normalised too: only queries and keys are": (
            lambda: attention_by(q, k, reference_norm(v, 1.0), q_norm, k_norm)
        ),
        "queries read their future: the causal mask is missing": lambda: scores.softmax(-1) @ v,
        "queries do not read their own token, and the first reads all": (
            lambda: masked(scores, past.tril(-1), -1e9).softmax(-1) @ v
        ),
        "the mask is transposed: queries read their future": (
            lambda: masked(scores, past.mT).softmax(-1) @ v
        ),
        "future scores are 0: they still get a weight. Use -inf": (
            lambda: masked(scores, past, 0.0).softmax(-1) @ v
        ),
        "the mask is applied after the softmax: weights no longer sum to 1": (
            lambda: masked(scores.softmax(-1), past, 0.0) @ v
        ),
        "the softmax runs over the queries: it is over the keys, dim=-1": (
            lambda: masked(scores, past).softmax(-2) @ v
        ),
        "there is no softmax": lambda: masked(scores, past, 0.0) @ v,
        "keys take the place of queries: a score is q . k, a row for each query": (
            lambda: causal_softmax(scores.mT) @ v
        ),
    }


def check_attention(answer: Answer) -> None:
    case = some_qkv()
    q, k, v, gain = case
    result = answer(*case)
    is_weights = tuple(result.shape) == (2, 3, 5, 5)
    hint = ": are these the weights, not yet multiplied by v?" if is_weights else ""
    expect_shape(result, tuple(v.shape), hint)
    expect_dtype(result, v)
    if result.isnan().any():
        where = first_index(result.isnan())
        raise Mistake(f"NaN at {where}: a softmax over nothing but -inf, or 0 * inf")
    judge_elements(result, reference_attention(*case), known_attentions(*case), "output")
    cases = {
        "for one token": (q[:, :, :1], k[:, :, :1], v[:, :, :1], gain),
        "for one head": (q[:, :1], k[:, :1], v[:, :1], gain),
        "for a longer sequence than D": (*(random(1, 2, 20, 4, seed=s) for s in (1, 2, 3)), 2.0),
        "for queries and keys 1,000 times as large": (1000 * q, 1000 * k, v, gain),
        "for fp32": (q.float(), k.float(), v.float(), gain),
    }
    judge_special(answer, cases, reference_attention)
    expect_gradients(
        lambda q, k, v: answer(q, k, v, gain),
        lambda q, k, v: reference_attention(q, k, v, gain),
        {"q": q, "k": k, "v": v},
        TOLERANCE,
    )


# ---- step 4: Muon's update -----------------------------------------------------------------------

COEFFICIENTS = 3.4445, -4.7750, 2.0315


def reference_orthogonal(G: Tensor, steps: int) -> Tensor:
    return newton_schulz(unit(G), steps)


def unit(G: Tensor) -> Tensor:
    return G / G.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)


def newton_schulz(
    X: Tensor, steps: int, coefficients: tuple[float, float, float] = COEFFICIENTS
) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def some_matrices() -> tuple[Tensor, int]:
    """Return a stack (N, R, C) of matrices of different sizes, and a number of steps."""
    return random(2, 3, 4) * torch.tensor([1.0, 6.0])[:, None, None], 3


def known_orthogonals(G: Tensor, steps: int) -> KnownMistakes:
    a, b, c = COEFFICIENTS
    X, norm = unit(G), G.norm(dim=(-2, -1), keepdim=True)

    def repeat(update: Callable[[Tensor], Tensor]) -> Tensor:
        result = X
        for _ in range(steps):
            result = update(result)
        return result

    def fixed_products() -> Tensor:
        A = X @ X.mT
        return repeat(lambda Y: a * Y + (b * A + c * A @ A) @ Y)

    def of_entries(Y: Tensor) -> Tensor:
        A = Y @ Y.mT
        return a * Y + (b * A + c * A * A) @ Y

    def exact() -> Tensor:
        U, _, V = torch.linalg.svd(G, full_matrices=False)
        return U @ V

    return {
        "divides by one norm for the whole stack: each matrix has its own": (
            lambda: newton_schulz(G / G.norm(), steps)
        ),
        "divides by the largest singular value: by the root of the sum of squares": (
            lambda: newton_schulz(G / torch.linalg.matrix_norm(G, 2, keepdim=True), steps)
        ),
        "divides by the root *mean* square: by the root of the sum of squares": (
            lambda: newton_schulz(G / G.square().mean((-2, -1), keepdim=True).sqrt(), steps)
        ),
        "divides by the sum of squares: take its root": lambda: newton_schulz(X / norm, steps),
        "normalises each row: the matrix has one norm": (
            lambda: newton_schulz(G / G.norm(dim=-1, keepdim=True), steps)
        ),
        "does not divide by the norm at the start": lambda: newton_schulz(G, steps),
        "returns G divided by its norm: no step was done": lambda: X,
        "returns the exact U V^T of a singular value decomposition: do the `steps`": exact,
        "always does 5 steps: do `steps`": lambda: newton_schulz(X, 5),
        "does one step more": lambda: newton_schulz(X, steps + 1),
        "does one step less": lambda: newton_schulz(X, steps - 1),
        "does a single step": lambda: newton_schulz(X, 1),
        "b and c are swapped": lambda: newton_schulz(X, steps, (a, c, b)),
        "b is positive: it is -4.7750": lambda: newton_schulz(X, steps, (a, -b, c)),
        "lacks the term c (X X^T)^2 X": lambda: newton_schulz(X, steps, (a, b, 0.0)),
        "lacks the term a X": lambda: newton_schulz(X, steps, (0.0, b, c)),
        "uses the cubic iteration, 1.5 X - 0.5 X X^T X: take a, b, c": (
            lambda: newton_schulz(X, steps, (1.5, -0.5, 0.0))
        ),
        "computes X X^T once, before the steps: it changes with X": fixed_products,
        "squares the entries of X X^T: (X X^T)^2 is a matrix product": (lambda: repeat(of_entries)),
        "takes powers of the entries: X X^T is a matrix product": (
            lambda: repeat(lambda Y: a * Y + b * Y**3 + c * Y**5)
        ),
        "multiplies by the norm again at the end": lambda: newton_schulz(X, steps) * norm,
        "adds the steps to X: X *becomes* the sum": (
            lambda: repeat(lambda Y: Y + newton_schulz(Y, 1))
        ),
    }


def check_orthogonalise(answer: Answer) -> None:
    G, steps = some_matrices()
    result = answer(G, steps, when="for a stack (N, R, C)")
    expect_shape(result, tuple(G.shape))
    expect_dtype(result, G)
    judge_elements(result, reference_orthogonal(G, steps), known_orthogonals(G, steps), "X")
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    if not answer(zeros, 2, when="for zeros").isfinite().all():
        raise Mistake("0 / 0: a matrix of zeros becomes NaN")
    cases = {
        "for a matrix of zeros": (zeros, 2),
        "for one matrix (R, C)": (G[0], 5),
        "for a tall matrix": (random(6, 2), 5),
        "for a tall matrix in a stack": (random(3, 5, 2), 5),
        "for a square matrix": (random(4, 4), 5),
        "for one row": (random(1, 5), 5),
        "for no steps": (G, 0),
        "for fp32": (G.float(), 5),
    }
    judge_special(answer, cases, reference_orthogonal)


# ---- step 5: FLOPs -------------------------------------------------------------------------------

SHAPE = (300, 32, 4, 5)  # V, C, n_layer, hidden_ratio


def reference_flops(V: int, C: int, n_layer: int, hidden_ratio: int, T: int) -> Tensor:
    return tensor(6 * V * C + n_layer * layer_flops(C, hidden_ratio, (T + 1) / 2))


def layer_flops(C: int, hidden_ratio: int, keys: float) -> float:
    return 6 * (4 + 2 * hidden_ratio) * C**2 + 6 * 2 * C * keys


def known_flops(V: int, C: int, n_layer: int, hidden_ratio: int, T: int) -> KnownMistakes:
    right, keys = reference_flops(V, C, n_layer, hidden_ratio, T), (T + 1) / 2
    square, pairs = n_layer * C**2, 12 * C * n_layer * keys  # of all layers
    return {
        "counts the forward pass only: backward takes twice as many": lambda: right / 3,
        "counts the backward pass only, or takes it to cost no more than forward": lambda: (
            right * 2 / 3
        ),
        "one operation for each weight forward: a multiplication and an addition are two": (
            lambda: right / 2
        ),
        "counts the embedding: it is looked up, not multiplied": lambda: right + 6 * V * C,
        "lacks the head": lambda: right - 6 * V * C,
        "lacks the pairs of queries and keys": lambda: right - pairs,
        "every query reads T keys: causal attention reads (T + 1) / 2 on average": (
            lambda: right - pairs + pairs * T / keys
        ),
        "every query reads T / 2 keys: query t reads t + 1, which is (T + 1) / 2 on average": (
            lambda: right - pairs + pairs * (T / 2) / keys
        ),
        "query t reads t keys: it reads its own too": (
            lambda: right - pairs + pairs * ((T - 1) / 2) / keys
        ),
        "the pairs are counted forward only: backward takes twice as many": (
            lambda: right - pairs * 2 / 3
        ),
        "a pair has C numbers: q . k and weight * v are 2 C": lambda: right - pairs / 2,
        "the pairs of one layer: each layer has them": (
            lambda: right - pairs * (n_layer - 1) / n_layer
        ),
        "attention has 3 matrices: query, key, value and output are 4": lambda: right - 6 * square,
        "the MLP has one matrix: it has two": lambda: right - 6 * hidden_ratio * square,
        "the hidden width is 4 C: it is hidden_ratio * C": (
            lambda: right + 6 * 2 * (4 - hidden_ratio) * square
        ),
        "the hidden width is C: it is hidden_ratio * C": (
            lambda: right + 6 * 2 * (1 - hidden_ratio) * square
        ),
        "lacks the MLP": lambda: right - 12 * hidden_ratio * square,
        "lacks the matrices of attention": lambda: right - 24 * square,
        "one layer: there are n_layer": (
            lambda: tensor(6 * V * C + layer_flops(C, hidden_ratio, keys))
        ),
        "counts the head in each layer": lambda: right + 6 * V * C * (n_layer - 1),
        "the operations of a whole sequence: return those of one token": lambda: right * T,
    }


def check_flops(answer: Answer) -> None:
    case = (*SHAPE, 7)
    judge(answer, case, reference_flops(*case), ("it",), known_flops(*case))
    cases = {
        "for one token, T = 1": (*SHAPE, 1),
        "for one layer": (300, 32, 1, 5, 7),
        "for the vocabulary of GPT-2 and a long context": (50_257, 768, 12, 4, 8192),
    }
    judge_cases(answer, cases, reference_flops)


# ---- step 6: memory ------------------------------------------------------------------------------

STATE = ("weights", "gradients", "optimizer")


def state_of(ends: float, layers: float) -> Tensor:
    """Return the bytes from the parameters of embedding and head, and of the layers."""
    return tensor([4 * (ends + layers), 4 * (ends + layers), 8 * ends + 4 * layers])


def reference_memory(V: int, C: int, n_layer: int, hidden_ratio: int) -> Tensor:
    return state_of(2 * V * C, n_layer * (4 + 2 * hidden_ratio) * C**2)


def known_memories(V: int, C: int, n_layer: int, hidden_ratio: int) -> KnownMistakes:
    right = reference_memory(V, C, n_layer, hidden_ratio)
    ends, square = 2 * V * C, n_layer * C**2
    layers = (4 + 2 * hidden_ratio) * square
    total = ends + layers

    def optimizer(size: float) -> Tensor:
        return tensor([4 * total, 4 * total, size])

    return {
        "optimizer: two numbers for every weight: Muon keeps one": lambda: optimizer(8 * total),
        "optimizer: one number for every weight: AdamW keeps two": lambda: optimizer(4 * total),
        "optimizer: Muon keeps two and AdamW one: it is the other way round": (
            lambda: optimizer(4 * ends + 8 * layers)
        ),
        "optimizer: the head is Muon's: AdamW updates embedding and head": (
            lambda: optimizer(4 * total + 2 * ends)
        ),
        "optimizer: lacks Muon's momentum": lambda: optimizer(8 * ends),
        "optimizer: lacks AdamW's two numbers": lambda: optimizer(4 * layers),
        "optimizer: AdamW keeps three numbers: two moments": (
            lambda: optimizer(12 * ends + 4 * layers)
        ),
        "optimizer: there is nothing in it": lambda: optimizer(0),
        "numbers of parameters: an fp32 number has 4 bytes": lambda: right / 4,
        "2 bytes for a number: all are fp32, which has 4": lambda: right / 2,
        "8 bytes for a number: all are fp32, which has 4": lambda: right * 2,
        "begins with the optimizer: the order is weights, gradients, optimizer": (
            lambda: right.flip(0)
        ),
        "there are no bytes of gradients: one fp32 number for each weight": (
            lambda: right * tensor([1, 0, 1])
        ),
        "embedding and head are counted once: each has V x C weights": (
            lambda: state_of(ends / 2, layers)
        ),
        "lacks embedding and head": lambda: state_of(0, layers),
        "lacks the layers": lambda: state_of(ends, 0),
        "one layer: there are n_layer": lambda: state_of(ends, layers / n_layer),
        "attention has 3 matrices: query, key, value and output are 4": (
            lambda: state_of(ends, layers - square)
        ),
        "the MLP has one matrix: it has two": (
            lambda: state_of(ends, layers - hidden_ratio * square)
        ),
        "the hidden width is 4 C: it is hidden_ratio * C": (
            lambda: state_of(ends, layers + 2 * (4 - hidden_ratio) * square)
        ),
        "counts biases: there are none": (
            lambda: state_of(ends, layers + n_layer * (5 + hidden_ratio) * C)
        ),
    }


def check_memory(answer: Answer) -> None:
    judge(answer, SHAPE, reference_memory(*SHAPE), STATE, known_memories(*SHAPE))
    cases = {
        "for one layer": (300, 32, 1, 5),
        "for GPT-2": (50_257, 768, 12, 4),
        "for a model of 100B parameters": (100_000, 16_384, 31, 4),
    }
    judge_cases(answer, cases, reference_memory)


STEPS = [
    Step("rms_norm", check_norm),
    Step("apply_rope", check_rope),
    Step("attention", check_attention),
    Step("orthogonalise", check_orthogonalise),
    Step("flops_per_token", check_flops),
    Step("training_memory", check_memory),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
