"""The steps of lesson 06, each with its tests. check_06.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_06.py FILE

The grader finds mistakes by experiments on the functions, never by reading their source.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from grade import (
    TOLERANCE,
    Answer,
    KnownMistakes,
    Mistake,
    Step,
    different_digits,
    expect_dtype,
    expect_gradients,
    expect_shape,
    first_index,
    is_close,
    main,
    raise_different_element,
    raise_known_mistake,
    random,
)
from torch import Tensor

N, C = 5, 12


# ---- step 1: rows of integers --------------------------------------------------------------------


def limit_of(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def reference_scale(x: Tensor, bits: int) -> Tensor:
    largest = x.abs().amax(dim=1)
    return torch.where(largest > 0, largest / limit_of(bits), 1.0)


def reference_integers(x: Tensor, bits: int) -> Tensor:
    return (x / reference_scale(x, bits)[:, None]).round()


def rows_with_different_sizes(seed: int = 1) -> Tensor:
    """Return x (N, C) whose rows have different sizes, and largest numbers of both signs."""
    x = random(N, C, seed=seed) * torch.tensor([1.0, 30.0, 0.01, 5.0, 2.0])[:, None]
    x[0, 3], x[1, 5] = -4.0, 120.0
    return x


def known_scales(x: Tensor, bits: int) -> KnownMistakes:
    L, largest = limit_of(bits), x.abs().amax(dim=1)
    per_tensor = (x.abs().amax() / L).expand(N)
    return {
        "is one scale for the whole tensor: a row then depends on its neighbours. Take the largest "
        "number of each row, dim=1": lambda: per_tensor,
        "takes the largest number, not the largest *magnitude*: abs() first": (
            lambda: x.amax(dim=1) / L
        ),
        f"divides by {L + 1}: the integers go from -{L} to {L}": lambda: largest / (L + 1),
        f"divides by {2 * L + 1}: the grid has so many steps on both sides together": (
            lambda: largest / (2 * L + 1)
        ),
        "is the largest magnitude: divide it by L": lambda: largest,
        "is inverted: q = x / s, so s is a step of the grid": lambda: L / largest,
        "uses the range from the smallest to the largest number, as for unsigned integers": (
            lambda: (x.amax(dim=1) - x.amin(dim=1)) / (2 * L)
        ),
        "is the mean magnitude: the largest numbers would not fit": (
            lambda: x.abs().mean(dim=1) / L
        ),
    }


def check_quantize_rows(answer: Answer) -> None:
    def quantize(x: Tensor, bits: int, when: str = "") -> tuple[Tensor, Tensor]:
        """Call the answer, check the shapes and dtypes of its results and return them."""
        q, scale = answer(x, bits, when=when)
        hint = f", {when}" if when else ""
        expect_shape(q, tuple(x.shape), f" (q){hint}")
        keepdim = tuple(scale.shape) == (len(x), 1) and not when
        columns = tuple(scale.shape) == tuple(x.shape[1:]) and not when
        if keepdim:
            hint = ": the scale of each row, (N,); drop the dimension that keepdim keeps"
        elif columns:
            hint = ": a scale for each row, not for each column"
        elif scale.ndim == 0:
            hint = ": a scale for each row, not one for all"
        expect_shape(scale, (len(x),), f" (scale){hint}")
        if q.dtype != torch.int8:
            raise Mistake(f"q must be int8, and is {str(q.dtype)[6:]}")
        expect_dtype(scale, x)
        return q.double(), scale.double()

    x = rows_with_different_sizes()
    q, scale = quantize(x, 8)
    expected = reference_scale(x, 8)
    if not is_close(scale, expected):
        raise_known_mistake(scale, known_scales(x, 8), "scale")
        raise_different_element(scale, expected, "scale")
    scaled = x / expected[:, None]
    if not is_close(q, reference_integers(x, 8)):
        raise_known_mistake(
            q,
            {
                "is cut off, not rounded: round() before the cast to int8": scaled.trunc,
                "is rounded down: round()": scaled.floor,
                "is rounded up: round()": lambda: scaled.ceil().clamp(max=127),
                "is clamped at 0: negative numbers become negative integers": (
                    lambda: scaled.round().clamp(min=0)
                ),
            },
            "q",
        )
        raise_different_element(q, reference_integers(x, 8), "q")
    with_zeros = x.clone()
    with_zeros[2] = 0
    halves = torch.tensor([[3.5, -2.5, 0.5, 127.0]], dtype=torch.float64)
    cases = {
        "for a row of zeros": (with_zeros, 8),
        "for 4 bits": (x, 4),
        "for 2 bits": (x, 2),
        "for one row": (x[:1], 8),
        "for one column": (x[:, :1], 8),
        "for halves, which torch.round rounds to even": (halves, 8),
        "in fp32": (x.float(), 8),
    }
    for when, (rows, bits) in cases.items():
        q, scale = quantize(rows, bits, when=when)
        tolerance = 1e-5 if rows.dtype == torch.float32 else TOLERANCE
        if not is_close(scale, reference_scale(rows.double(), bits), tolerance):
            raise Mistake(f"scale: right in general, but wrong {when}")
        if not is_close(q, reference_integers(rows.double(), bits)):
            raise Mistake(f"q: right in general, but wrong {when}")


# ---- step 2: a product of integers ---------------------------------------------------------------

OUTPUTS_F = 7


def integer_weight(F_out: int = OUTPUTS_F, C_in: int = C) -> tuple[Tensor, Tensor]:
    """Return a weight (F, C) int8 and its scales (F,)."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-127, 128, (F_out, C_in), generator=generator).to(torch.int8)
    scale = torch.rand(F_out, generator=generator, dtype=torch.float64) + 0.1
    return weight, scale


def reference_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    scale = reference_scale(x, 8)
    sums = reference_integers(x, 8) @ weight.double().T
    return sums * scale[:, None] * weight_scale


def known_products(x: Tensor, weight: Tensor, weight_scale: Tensor) -> KnownMistakes:
    scale, rows, floats = reference_scale(x, 8), reference_integers(x, 8), weight.double()
    sums = rows @ floats.T
    one_scale = x.abs().amax() / 127

    def wrapped(dtype: torch.dtype) -> Tensor:
        return sums.long().to(dtype).double() * scale[:, None] * weight_scale

    return {
        "multiplies floats: round the rows of x to 8 bits first": (
            lambda: x @ (floats * weight_scale[:, None]).T
        ),
        "rounds x with one scale for all rows: a row then depends on its neighbours": (
            lambda: (x / one_scale).round() @ floats.T * one_scale * weight_scale
        ),
        "sums in int8, which wraps around beyond 127: convert to int32 first": (
            lambda: wrapped(torch.int8)
        ),
        "sums in int16, which wraps around beyond 32,767: convert to int32 first": (
            lambda: wrapped(torch.int16)
        ),
        "returns the sums of integers: multiply them by both scales": lambda: sums,
        "lacks the scales of the weights": lambda: sums * scale[:, None],
        "lacks the scales of the rows": lambda: sums * weight_scale,
        "divides by the scales: x = s q, so multiply": lambda: sums / scale[:, None] / weight_scale,
    }


def check_int8_linear(answer: Answer) -> None:
    def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        y = answer(x, weight, weight_scale, when=when)
        expect_shape(y, (len(x), len(weight)), when=when)
        expect_dtype(y, x)
        return y.double()

    x, (weight, weight_scale) = rows_with_different_sizes(), integer_weight()
    y, expected = linear(x, weight, weight_scale), reference_linear(x, weight, weight_scale)
    if not is_close(y, expected):
        raise_known_mistake(y, known_products(x, weight, weight_scale))
        raise_different_element(y, expected, "y")
    changed = x.clone()
    changed[2:] *= 1000
    if not torch.equal(linear(changed, weight, weight_scale)[:2], y[:2]):
        raise Mistake("a row changes when other rows change: does the scale look at them?")
    largest = torch.ones(3, 2000, dtype=torch.float64)
    full = torch.full((4, 2000), 127, dtype=torch.int8)
    square, square_scale = integer_weight(N, C)
    cases = {
        "for 2,000 inputs, whose sums need int32": (largest, full, weight_scale[:4]),
        "for one row": (x[:1], weight, weight_scale),
        "for one output": (x, weight[:1], weight_scale[:1]),
        "for as many rows as outputs": (x, square, square_scale),
        "for a row of zeros": (x * torch.tensor([1.0, 1, 0, 1, 1])[:, None], weight, weight_scale),
    }
    for when, case in cases.items():
        y, expected = linear(*case, when=when), reference_linear(*case)
        if not is_close(y / expected.abs().max(), expected / expected.abs().max()):
            raise Mistake(f"right in general, but wrong {when}")
    case = x.float(), weight, weight_scale.float()
    y, expected = linear(*case, when="in fp32"), reference_linear(x, weight, weight_scale)
    if not is_close(y / expected.abs().max(), expected / expected.abs().max(), 1e-3):
        raise Mistake("right in fp64, but wrong in fp32")


# ---- step 3: rounding with a gradient ------------------------------------------------------------


def reference_rounded(x: Tensor, bits: int) -> Tensor:
    return reference_integers(x, bits) * reference_scale(x, bits)[:, None]


def straight_through(x: Tensor, bits: int) -> Tensor:
    return x + (reference_rounded(x.detach(), bits) - x).detach()


def check_fake_quantize(answer: Answer) -> None:
    def rounded(x: Tensor, bits: int, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        y = answer(x, bits, when=when)
        expect_shape(y, tuple(x.shape), when=when)
        expect_dtype(y, x)
        return y

    x = rows_with_different_sizes()
    y, expected = rounded(x, 4), reference_rounded(x, 4)
    if not is_close(y, expected):
        one_scale = x.abs().amax() / 7
        raise_known_mistake(
            y,
            {
                "returns the integers: multiply them by the scale again": (
                    lambda: reference_integers(x, 4)
                ),
                "does not round": lambda: x,
                "has one scale for all rows": lambda: (x / one_scale).round() * one_scale,
                "rounds to 8 bits whatever `bits` is": lambda: reference_rounded(x, 8),
            },
        )
        raise_different_element(y, expected, "y")
    zeros = x * torch.tensor([1.0, 1, 0, 1, 1])[:, None]
    cases = {
        "for 8 bits": (x, 8),
        "for 2 bits": (x, 2),
        "for a row of zeros": (zeros, 4),
        "for one row": (x[:1], 4),
    }
    for when, case in cases.items():
        if not is_close(rounded(*case, when=when), reference_rounded(*case)):
            raise Mistake(f"right in general, but wrong {when}")
    if not is_close(rounded(x.float(), 4, when="in fp32").double(), expected, 1e-3):
        raise Mistake("right in fp64, but wrong in fp32")
    expect_straight_gradient(lambda x: rounded(x, 4), x)
    expect_gradients(lambda x: rounded(x, 4), lambda x: straight_through(x, 4), {"x": x})


def expect_straight_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raise the Mistake that fits a gradient that is not passed through unchanged."""
    leaf = x.clone().requires_grad_()
    output = function(leaf)
    if not output.requires_grad:
        raise Mistake("no gradient flows at all: keep x itself in the sum, outside detach()")
    gradient = torch.autograd.grad(output.sum(), leaf, allow_unused=True)[0]
    if gradient is None:
        raise Mistake("no gradient reaches x: keep x itself in the sum, outside detach()")
    if is_close(gradient, torch.ones_like(x)):
        return
    if is_close(gradient, 2 * torch.ones_like(x)):
        raise Mistake("the gradient is 2: x is in the sum twice outside detach()")
    is_largest = x.abs() == x.abs().amax(dim=1, keepdim=True)
    if is_close(gradient[~is_largest], torch.zeros_like(gradient[~is_largest])):
        raise Mistake(
            "rounding has gradient 0, so only each row's largest number gets one, through the "
            "scale: add the rounding error to x, detached"
        )
    if is_close(gradient[~is_largest], torch.ones_like(gradient[~is_largest])):
        raise Mistake(
            "the gradient flows through the scale too, so each row's largest number gets another "
            "one: the scale counts as a constant, detach it"
        )
    raise Mistake("the gradient with respect to x is not 1 everywhere")


# ---- step 4: 8-bit floats ------------------------------------------------------------------------


def reference_fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def all_fp8_numbers() -> Tensor:
    """Return the 253 finite numbers of e4m3, smallest first, in fp64."""
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return every_byte[every_byte.isfinite()].unique()


def check_round_to_fp8(answer: Answer) -> None:
    def rounded(x: Tensor, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        y = answer(x, when=when)
        expect_shape(y, tuple(x.shape), when=when)
        if y.dtype == torch.float8_e4m3fn:
            raise Mistake("returns float8_e4m3fn: return numbers in the dtype of x")
        expect_dtype(y, x)
        return y

    x = torch.tensor([1.0, 1.1, 1.2, -3.3, 5.7, 17.3, 300.0, -101.0], dtype=torch.float64)
    y, expected = rounded(x), reference_fp8(x)
    if not is_close(y, expected):
        raise_known_mistake(y, known_fp8(x))
        raise_different_element(y, expected, "y")
    grid = all_fp8_numbers()
    between = (grid[1:] + grid[:-1]) / 2
    normal = grid.abs() >= 2**-6
    cases = {
        "beyond 448: what is larger becomes 448, with its sign": torch.tensor(
            [448.0, 449.0, 463.0, 464.0, 465.0, 500.0, 1e6, -460.0, -1e30], dtype=torch.float64
        ),
        "for numbers that e4m3 has, which must stay": grid[normal],
        "for 0": torch.zeros(3, dtype=torch.float64),
        "below 2^-6, where the multiples are those of 2^-9": torch.cat(
            [grid[~normal], 2.0 ** -torch.arange(6.0, 14.0, dtype=torch.float64) * 1.3]
        ),
        "half way between two numbers, where the even one is taken": between,
        "just below a power of two, which rounds up to it": 2.0
        ** torch.arange(-5.0, 9.0, dtype=torch.float64)
        * 0.99,
        "for 5,000 random numbers": 30 * random(50, 100, seed=4),
        "in fp32": (30 * random(50, 100, seed=5)).float(),
    }
    for when, x in cases.items():
        y, expected = rounded(x, when=when), reference_fp8(x)
        if not is_close(y, expected):
            i = tuple(first_index(~((y - expected).abs() < TOLERANCE)))
            raise Mistake(
                f"right in general, but wrong {when}: {x[i].item():.6g} becomes "
                f"{y[i].item():.6g}, and {expected[i].item():.6g} is correct"
            )


def known_fp8(x: Tensor) -> KnownMistakes:
    def with_mantissa(bits: int, rounding: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
        step = 2.0 ** (x.abs().log2().floor() - bits)
        return rounding(x / step) * step

    return {
        "does nothing": lambda: x,
        "rounds to multiples of 2^(e - 2), as the other 8-bit float, e5m2, does: e4m3 has 3 bits "
        "behind the leading 1": lambda: with_mantissa(2),
        "rounds to multiples of 2^(e - 4). With frexp, |x| = m 2^k and m < 1, so e = k - 1": (
            lambda: with_mantissa(4)
        ),
        "cuts off: round to the nearest multiple": lambda: with_mantissa(3, torch.trunc),
        "rounds down: round to the nearest multiple": lambda: with_mantissa(3, torch.floor),
        "rounds to powers of two: keep 3 bits of mantissa": lambda: with_mantissa(0),
        "rounds to integers: the step of the grid grows with the number": x.round,
        "loses the sign": lambda: reference_fp8(x).abs(),
    }


# ---- step 5: learning from a teacher -------------------------------------------------------------

V, T = 9, 2.5


def reference_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p = (teacher.detach() / temperature).log_softmax(dim=-1)
    log_q = (student / temperature).log_softmax(dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def known_distillations(student: Tensor, teacher: Tensor) -> KnownMistakes:
    right = reference_distillation(student, teacher, T)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return reference_distillation(b, a, 1.0)

    log_p, log_q = (teacher / T).log_softmax(dim=-1), (student / T).log_softmax(dim=-1)
    return {
        "lacks the factor T^2: the gradient shrinks as 1 / T^2 without it": lambda: right / T**2,
        "multiplies by T, not by T^2": lambda: right / T,
        "divides by T^2": lambda: right / T**4,
        "is KL(student || teacher): the teacher's probabilities weight the sum": (
            lambda: reference_distillation(teacher, student, T)
        ),
        'divides by N V (reduction "mean"): the mean is over the rows, "batchmean"': (
            lambda: right / V
        ),
        'is the sum over the rows (reduction "sum"): take their mean': lambda: right * N,
        "ignores the temperature": lambda: kl(teacher, student),
        "ignores the temperature inside the softmax": lambda: T**2 * kl(teacher, student),
        "divides only the teacher by the temperature": lambda: T**2 * kl(teacher / T, student),
        "divides only the student by the temperature": lambda: T**2 * kl(teacher, student / T),
        "multiplies the logits by T: divide them": lambda: T**2 * kl(teacher * T, student * T),
        "is the cross-entropy: subtract the teacher's entropy, so that the minimum is 0": (
            lambda: -(T**2) * (log_p.exp() * log_q).sum(dim=-1).mean()
        ),
        "has the wrong sign": lambda: -right,
        "takes the softmax over the rows: dim=-1": (
            lambda: (
                T**2
                * F.kl_div(
                    (student / T).log_softmax(dim=0),
                    (teacher / T).log_softmax(dim=0),
                    reduction="batchmean",
                    log_target=True,
                )
            )
        ),
        "is the squared difference of the logits": lambda: F.mse_loss(student, teacher),
        "takes probabilities where kl_div wants their logarithms": (
            lambda: T**2 * F.kl_div(log_q.exp(), log_p.exp(), reduction="batchmean")
        ),
    }


def check_distillation_loss(answer: Answer) -> None:
    def loss(student: Tensor, teacher: Tensor, temperature: float, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(student, teacher, temperature, when=when)
        hints = {
            (len(student),): ": one number for each row; return their mean",
            tuple(student.shape): ": one number for each logit; sum over V, then take the mean",
        }
        expect_shape(result, (), hints.get(tuple(result.shape), ""), when)
        expect_dtype(result, student)
        return result

    student, teacher = 3 * random(N, V), 3 * random(N, V, seed=2)
    result, expected = loss(student, teacher, T), reference_distillation(student, teacher, T)
    if result.isnan():
        raise Mistake(
            "is NaN: kl_div takes the logarithm of its second argument, unless log_target=True "
            "says that it is one"
        )
    if not is_close(result, expected):
        raise_known_mistake(result, known_distillations(student, teacher))
        given, right = different_digits(result, expected)
        raise Mistake(f"is {given}, but {right} is correct")
    far = 400 * random(N, V, seed=3)
    cases = {
        "for temperature 1": (student, teacher, 1.0),
        "for one row": (student[:1], teacher[:1], T),
        "for logits so far apart that a softmax is 0": (student, far, 1.0),
        "where the student is that certain": (far, teacher, 1.0),
    }
    for when, case in cases.items():
        result, expected = loss(*case, when=when), reference_distillation(*case)
        if not is_close(result / expected, torch.ones_like(expected)):
            raise Mistake(f"right in general, but wrong {when}")
    if not is_close(loss(teacher, teacher, T, when="where both agree"), torch.zeros_like(result)):
        raise Mistake("right in general, but not 0 where both agree")
    in_fp32 = loss(student.float(), teacher.float(), T, when="in fp32").double()
    if not is_close(in_fp32, reference_distillation(student, teacher, T), 1e-3):
        raise Mistake("right in fp64, but wrong in fp32")
    expect_gradients(
        lambda student: loss(student, teacher, T),
        lambda student: reference_distillation(student, teacher, T),
        {"student": student},
    )
    leaf = teacher.clone().requires_grad_()
    result = loss(student.clone().requires_grad_(), leaf, T)
    if torch.autograd.grad(result, leaf, allow_unused=True)[0] is not None:
        raise Mistake(
            "a gradient flows to the teacher, which would learn to be easy to follow: detach it"
        )


STEPS = [
    Step("quantize_rows", check_quantize_rows, returns=("q", "scale")),
    Step("int8_linear", check_int8_linear),
    Step("fake_quantize", check_fake_quantize),
    Step("round_to_fp8", check_round_to_fp8),
    Step("distillation_loss", check_distillation_loss),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
