"""Solutions to 06_compression.py, as short as correct code can be.

What nanods uses is in nanods/quantize.py and nanods/training/distill.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    limit = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim=1, keepdim=True) / limit
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).round().to(torch.int8), scale[:, 0]


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    rows, scale = quantize_rows(x, 8)
    sums = rows.int() @ weight.int().T  # (N, F)
    # A row of the result has the scale of its row of x, a column that of its output.
    return sums.to(x.dtype) * scale[:, None] * weight_scale


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    q, scale = quantize_rows(x.detach(), bits)
    return x + (q * scale[:, None] - x).detach()


def round_to_fp8(x: Tensor) -> Tensor:
    e = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), e.clamp(min=-6) - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p = (teacher.detach() / temperature).log_softmax(dim=-1)
    log_q = (student / temperature).log_softmax(dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
