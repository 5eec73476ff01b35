"""Exercises of lesson 06: quantisation and distillation, in five steps.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-06                          # or: python lessons/exercises/check_06.py [FILE]

Step 1 rounds rows of numbers to integers, each row with its own scale. Step 2 multiplies integers:
an INT8 linear layer. Step 3 rounds with a gradient, for training. Step 4 rounds to 8-bit floats.
Step 5 is the loss by which a small model learns from a large one.

Shapes: N rows (tokens), C inputs, F outputs, V vocabulary.
Solutions are in 06_solutions.py. What nanods uses is in nanods/quantize.py and
nanods/training/distill.py.
"""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the rows of x as integers of `bits` bits, and the scale of each row.

        q[n, c] = round(x[n, c] / s[n]),    s[n] = max over c of |x[n, c]| / L,
        L = 2^(bits - 1) - 1

    x: (N, C). 2 <= bits <= 8.
    Returns q (N, C) int8 from -L to L, and s (N,) in the dtype of x. A row of zeros has scale 1.
    Hint: amax with dim and keepdim. What does a row of zeros divide by?
    Target: |x - s q| is at most s / 2, and no row depends on another one.
    """
    raise NotImplementedError


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return x W^T, where W[f, c] = weight_scale[f] * weight[f, c], by a product of integers.

    x: (N, C), floats, to be rounded to 8 bits by quantize_rows. weight: (F, C) int8.
    weight_scale: (F,), floats.
    Returns (N, F), in the dtype of x.
    Hint: multiply the integers first and scale the sums afterwards: which scale belongs to a row of
    the result, and which to a column? A sum of C products is larger than 127.
    Target: the sums are exact. Row n of the result depends on row n of x alone.
    """
    raise NotImplementedError


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """Return the rows of x rounded to `bits` bits, in floats, with a gradient to train through.

    x: (N, C). The result is s[n] q[n, c] of step 1. Its gradient with respect to x is 1 everywhere
    (the straight-through estimator), since that of rounding is 0 nearly everywhere.
    Returns (N, C), in the dtype of x.
    Hint: y = x + (rounded - x).detach() has the value of `rounded`. Which gradient does it have?
    Target: the values of step 1, and the gradient of the result passes to x unchanged.
    """
    raise NotImplementedError


def round_to_fp8(x: Tensor) -> Tensor:
    """Return each number rounded to the nearest e4m3 float: 4 bits of exponent, 3 of mantissa.

    A number with 2^e <= |x| < 2^(e + 1) is rounded to a multiple of 2^(e - 3), for e >= -6. Below
    2^-6 the multiples are those of e = -6. The largest number is 448 = 1.75 * 2^8: what is larger
    becomes 448, with its sign. Ties round to even, as torch.round does.
    x: any shape, finite. Returns the same shape and dtype: numbers, not torch.float8_e4m3fn.
    Hint: torch.frexp gives the exponent exactly: x = m * 2^k with 0.5 <= |m| < 1. Which e is that?
    Do not cast to float8: the point is to see its grid.
    Target: x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype), for all x.
    """
    raise NotImplementedError


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 * KL(teacher || student), in nats, the mean over the rows.

        p = softmax(teacher / T),    q = softmax(student / T),    KL = sum over V of p log(p / q)

    student, teacher: logits (N, V).
    Returns a scalar (). The gradient flows to the student, and none to the teacher.
    Hint: log_softmax is safe where softmax underflows. F.kl_div takes log q first, and its
    reduction "mean" divides by N V.
    Target: 0 where both agree. The gradient at the logits is T (q - p) / N.
    """
    raise NotImplementedError
