"""The grader of lesson 06 diagnoses each wrong answer."""

from pathlib import Path

import grade
import pytest
import steps_06
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_06.__file__).with_name("06_solutions.py"))
WRONG = WrongAnswers()
register_all = WRONG.register_all

# ---- step 1: quantize_rows -----------------------------------------------------------------------


def with_scale(scale_of, rounding=torch.round):
    """Return an answer with another scale (N, 1) of x and L."""

    def quantize_rows(x, bits):
        scale = scale_of(x, 2 ** (bits - 1) - 1).expand(len(x), 1).to(x.dtype)
        return rounding(x / scale).to(torch.int8), scale[:, 0]

    return quantize_rows


def largest(x):
    return x.abs().amax(1, keepdim=True).clamp(min=1e-30)


def rounded_by(rounding):
    """Return an answer with the right scale and another rounding."""
    return with_scale(
        lambda x, L: torch.where(x.abs().amax(1, True) > 0, largest(x) / L, 1.0), rounding
    )


def only_8_bits(x, bits):
    return solutions.quantize_rows(x, 8)


register_all(
    "quantize_rows",
    per_tensor=("one scale for the whole tensor", with_scale(lambda x, L: x.abs().amax() / L)),
    not_magnitude=("not the largest \\*magnitude\\*", with_scale(lambda x, L: x.amax(1, True) / L)),
    one_too_many=("divides by 128: the integers go", with_scale(lambda x, L: largest(x) / (L + 1))),
    both_sides=("divides by 255", with_scale(lambda x, L: largest(x) / (2 * L + 1))),
    undivided=("is the largest magnitude: divide it", with_scale(lambda x, L: largest(x))),
    inverted=("is inverted", with_scale(lambda x, L: L / largest(x))),
    range_of_unsigned=(
        "range from the smallest to the largest",
        with_scale(lambda x, L: (x.amax(1, True) - x.amin(1, True)) / (2 * L)),
    ),
    mean_magnitude=("mean magnitude", with_scale(lambda x, L: x.abs().mean(1, True) / L)),
    per_column=(
        "a scale for each row, not for each column",
        lambda x, bits: (
            (x / x.abs().amax(0) * 127).round().to(torch.int8),
            x.abs().amax(0) / 127,
        ),
    ),
    one_number=(
        "a scale for each row, not one for all",
        lambda x, bits: ((x / x.abs().max() * 127).round().to(torch.int8), x.abs().max() / 127),
    ),
    keeps_the_dimension=(
        "drop the dimension that keepdim keeps",
        lambda x, bits: (
            solutions.quantize_rows(x, bits)[0],
            solutions.quantize_rows(x, bits)[1][:, None],
        ),
    ),
    floats=(
        "q must be int8, and is float64",
        lambda x, bits: (
            solutions.quantize_rows(x, bits)[0].double(),
            solutions.quantize_rows(x, bits)[1],
        ),
    ),
    cut_off=("q is cut off, not rounded", rounded_by(torch.trunc)),
    rounded_down=("q is rounded down", rounded_by(torch.floor)),
    rounded_up=("q is rounded up", rounded_by(lambda x: x.ceil().clamp(max=127))),
    never_negative=("q is clamped at 0", rounded_by(lambda x: x.round().clamp(min=0))),
    zeros=(
        "wrong for a row of zeros",
        with_scale(lambda x, L: x.abs().amax(1, keepdim=True) / L),
    ),
    always_8_bits=("wrong for 4 bits", only_8_bits),
    halves_away_from_zero=(
        "wrong for halves",
        rounded_by(lambda x: torch.where(x > 0, (x + 0.5).floor(), (x - 0.5).ceil())),
    ),
)

# ---- step 2: int8_linear -------------------------------------------------------------------------


def linear_with(product, scale_by=lambda sums, s, t: sums * s[:, None] * t):
    """Return an answer with another product of q and weight, or with other scales."""

    def int8_linear(x, weight, weight_scale):
        q, scale = solutions.quantize_rows(x, 8)
        return scale_by(product(q, weight).to(x.dtype), scale, weight_scale).to(x.dtype)

    return int8_linear


def exact(q, weight):
    return q.int() @ weight.int().T


def per_tensor_linear(x, weight, weight_scale):
    scale = x.abs().amax() / 127
    return (x / scale).round() @ weight.to(x.dtype).T * scale * weight_scale


def reads_the_neighbours_a_little(x, weight, weight_scale):
    """Add what is below the tolerance in the first check, and not where a row is huge."""
    return solutions.int8_linear(x, weight, weight_scale) + 1e-12 * x.abs().sum()


register_all(
    "int8_linear",
    floats=("multiplies floats", lambda x, w, t: x @ (w.to(x.dtype) * t[:, None].to(x.dtype)).T),
    per_tensor=("one scale for all rows", per_tensor_linear),
    in_int8=("sums in int8", linear_with(lambda q, w: exact(q, w).to(torch.int8))),
    in_int16=("sums in int16", linear_with(lambda q, w: exact(q, w).to(torch.int16))),
    no_scales=("returns the sums of integers", linear_with(exact, lambda sums, s, t: sums)),
    no_weight_scale=(
        "lacks the scales of the weights",
        linear_with(exact, lambda sums, s, t: sums * s[:, None]),
    ),
    no_row_scale=("lacks the scales of the rows", linear_with(exact, lambda sums, s, t: sums * t)),
    divided=(
        "divides by the scales",
        linear_with(exact, lambda sums, s, t: sums / s.clamp(min=1e-30)[:, None] / t),
    ),
    transposed=("wrong shape", lambda x, w, t: solutions.int8_linear(x, w, t).T),
    neighbours=("a row changes when other rows change", reads_the_neighbours_a_little),
    saturated=(
        "wrong for 2,000 inputs",
        linear_with(lambda q, w: exact(q, w).clamp(-(2**22), 2**22)),
    ),
)

# ---- step 3: fake_quantize -----------------------------------------------------------------------


def rounded(x, bits):
    q, scale = solutions.quantize_rows(x.detach(), bits)
    return q * scale[:, None]


def without_estimator(x, bits):
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


def through_the_scale(x, bits):
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    scaled = x / scale
    return (scaled + (scaled.round() - scaled).detach()) * scale.detach()


register_all(
    "fake_quantize",
    integers=(
        "returns the integers",
        lambda x, bits: solutions.quantize_rows(x, bits)[0].to(x.dtype),
    ),
    nothing=("does not round", lambda x, bits: x.clone()),
    per_tensor=(
        "one scale for all rows",
        lambda x, bits: (x / x.abs().max() * 7).round() * x.abs().max() / 7,
    ),
    always_8_bits=("rounds to 8 bits whatever", lambda x, bits: solutions.fake_quantize(x, 8)),
    always_4_bits=("wrong for 8 bits", lambda x, bits: solutions.fake_quantize(x, 4)),
    detached=("no gradient flows at all", rounded),
    double=("the gradient is 2", lambda x, bits: 2 * x + (rounded(x, bits) - 2 * x).detach()),
    no_estimator=("rounding has gradient 0", without_estimator),
    scale_not_detached=("flows through the scale too", through_the_scale),
    half=("is not 1 everywhere", lambda x, bits: x / 2 + (rounded(x, bits) - x / 2).detach()),
)

# ---- step 4: round_to_fp8 ------------------------------------------------------------------------


def mantissa(bits, rounding=torch.round):
    def round_to_fp8(x):
        step = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 1).clamp(min=-6) - bits)
        return (rounding(x / step) * step).clamp(-448, 448)

    return round_to_fp8


def no_subnormals(x):
    step = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 4)
    return ((x / step).round() * step).clamp(-448, 448)


def by_log2(x):
    """NaN for 0: log2 is minus infinity there."""
    step = 2.0 ** (x.abs().log2().floor().clamp(min=-(2.0**40)) - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def halves_up(x):
    return mantissa(3, lambda y: (y + 0.5).floor())(x)


register_all(
    "round_to_fp8",
    nothing=("does nothing", lambda x: x.clone()),
    mantissa_of_2=("multiples of 2\\^\\(e - 2\\)", mantissa(2)),
    mantissa_of_4=("multiples of 2\\^\\(e - 4\\)", mantissa(4)),
    cut_off=("cuts off", mantissa(3, torch.trunc)),
    rounded_down=("rounds down", mantissa(3, torch.floor)),
    powers_of_two=("rounds to powers of two", mantissa(0)),
    integers=("rounds to integers", lambda x: x.round()),
    without_sign=("loses the sign", lambda x: solutions.round_to_fp8(x).abs()),
    not_limited=(
        "wrong beyond 448",
        lambda x: (
            (x / (s := torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 4))).round() * s
        ),
    ),
    zero=("wrong for 0", by_log2),
    small_numbers=("wrong below 2\\^-6", no_subnormals),
    halves=("wrong half way", halves_up),
    float8=("returns float8_e4m3fn", lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn)),
)

# ---- step 5: distillation_loss -------------------------------------------------------------------


def kl(a, b, reduction="batchmean"):
    return F.kl_div(
        b.log_softmax(-1), a.log_softmax(-1).detach(), reduction=reduction, log_target=True
    )


def detached_student(student, teacher, T):
    return solutions.distillation_loss(student.detach(), teacher, T)


def to_the_teacher(student, teacher, T):
    return T**2 * F.kl_div(
        (student / T).log_softmax(-1),
        (teacher / T).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def by_logarithms(student, teacher, T):
    p, q = (teacher.detach() / T).softmax(-1), (student / T).softmax(-1)
    return T**2 * (p * (p / q).log()).sum(-1).mean()


register_all(
    "distillation_loss",
    no_factor=("lacks the factor T\\^2", lambda s, t, T: kl(t / T, s / T)),
    factor_of_T=("multiplies by T, not", lambda s, t, T: T * kl(t / T, s / T)),
    divided=("divides by T\\^2", lambda s, t, T: kl(t / T, s / T) / T**2),
    reversed_kl=("is KL\\(student", lambda s, t, T: T**2 * kl(s / T, t / T)),
    mean_of_all=("divides by N V", lambda s, t, T: T**2 * kl(t / T, s / T, "mean")),
    sum_of_rows=("is the sum over the rows", lambda s, t, T: T**2 * kl(t / T, s / T, "sum")),
    no_temperature=("ignores the temperature:|ignores the temperature$", lambda s, t, T: kl(t, s)),
    factor_alone=("inside the softmax", lambda s, t, T: T**2 * kl(t, s)),
    teacher_alone=("divides only the teacher", lambda s, t, T: T**2 * kl(t / T, s)),
    student_alone=("divides only the student", lambda s, t, T: T**2 * kl(t, s / T)),
    multiplied=("multiplies the logits by T", lambda s, t, T: T**2 * kl(t * T, s * T)),
    cross_entropy=(
        "is the cross-entropy",
        lambda s, t, T: (
            -(T**2) * ((t / T).softmax(-1).detach() * (s / T).log_softmax(-1)).sum(-1).mean()
        ),
    ),
    sign=("has the wrong sign", lambda s, t, T: -solutions.distillation_loss(s, t, T)),
    over_rows=(
        "softmax over the rows",
        lambda s, t, T: (
            T**2
            * F.kl_div(
                (s / T).log_softmax(0), (t / T).log_softmax(0), reduction="batchmean",
                log_target=True,
            )
        ),
    ),
    squares=("squared difference", lambda s, t, T: F.mse_loss(s, t)),
    log_target=(
        "is NaN: kl_div takes the logarithm",
        lambda s, t, T: (
            T**2
            * F.kl_div((s / T).log_softmax(-1), (t / T).log_softmax(-1), reduction="batchmean")
        ),
    ),
    probabilities=(
        "wants their logarithms",
        lambda s, t, T: (
            T**2 * F.kl_div((s / T).softmax(-1), (t / T).softmax(-1), reduction="batchmean")
        ),
    ),
    each_row=(
        "return their mean",
        lambda s, t, T: T**2 * kl(t / T, s / T, "none").sum(-1),
    ),
    each_logit=("sum over V", lambda s, t, T: T**2 * kl(t / T, s / T, "none")),
    underflow=("wrong for logits so far apart|wrong where the student", by_logarithms),
    detached=("no gradient flows at all", detached_student),
    teacher_learns=("a gradient flows to the teacher", to_the_teacher),
)  # fmt: skip


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_06.STEPS, step, message, function)
