"""Quantisation: store and multiply weights as small integers, or store them in 8-bit floats.

A number x becomes an integer q on a grid and a scale s shared by several numbers:

    q = round(x / s), limited to -L .. L,    s = max |x| / L,    L = 2^(bits - 1) - 1

so that x is about s q, with an error of at most s / 2. A linear layer then multiplies integers and
scales the sums: y[n, f] = s[n] t[f] sum over c of q[n, c] r[f, c], where q and s are those of the
activations, r and t those of the weights. The file reads from top to bottom, one idea at a time:

    grid_scale             one scale per tensor, or one per row or output channel
    round_to_grid          the equation above, and a gradient to train through it
                           (straight-through estimator: Bengio et al. 2013, arXiv:1308.3432)
    fake_quantize          round, and stay in floats
    FakeQuantLinear        a linear layer that trains with rounded weights and activations
    integer_product        the product of INT8 matrices, exact on every processor
    Int8Linear             a linear layer on integers; an expert becomes two of them
    Fp8Linear              weights stored as 8-bit floats (e4m3: Micikevicius et al. 2022,
                           arXiv:2209.05433)
    quantize               convert a model

Activations have one scale per row (token). With one scale per tensor, as in the usual tools, a
token's output depends on the largest activation anywhere in the batch: on other requests, and on
tokens that come after it. With one per row it depends on its own row alone, exactly.

Norms, embeddings, the routers' gates and the temperature keep their precision. They are few
numbers, but for the embedding of a small model with a large vocabulary (a quarter of v0-small), and
a router that rounds selects other experts.

Left out on purpose: zero points (activations after a norm are centred), calibrated static scales,
INT4 kernels, and outlier channels (LLM.int8(), arXiv:2208.07339; SmoothQuant, arXiv:2211.10438).

Pinned by tests/test_quantize.py.

Shapes: N rows, C inputs, F outputs, E experts, K experts per token.
"""

import copy
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- rounding ------------------------------------------------------------------------------------


def grid_limit(bits: int) -> int:
    """Return the largest integer of the grid: 127 with 8 bits, 7 with 4, 1 with 2.

    Raises ValueError for fewer than 2 bits or more than 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits: the grid has 2 to 8")
    return 2 ** (bits - 1) - 1


def grid_scale(x: Tensor, bits: int, axis: int | None = -1) -> Tensor:
    """Return the scale at which the largest |x| falls on the grid's limit.

    Numbers along `axis` share one scale, and its size becomes 1: -1 gives one scale per row of
    activations (N, C), or per output channel of weights (F, C). None: one scale for all. A row of
    zeros has scale 1.
    """
    magnitude = x.detach().abs()
    largest = magnitude.amax() if axis is None else magnitude.amax(dim=axis, keepdim=True)
    scale = largest / grid_limit(bits)  # 0 for a row of zeros, or if it underflows
    return torch.where(scale > 0, scale, 1.0)


class RoundThrough(torch.autograd.Function):
    """Round to integers, and pass the gradient through unchanged.

    The derivative of rounding is 0 almost everywhere and teaches nothing; the straight-through
    estimator takes 1 instead. (x + (x.round() - x).detach() has the same gradient, but its values
    are not quite integers.)
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g


def round_to_grid(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return round(x / scale), limited to the grid, in the dtype of x. Halves round to even."""
    limit = grid_limit(bits)
    return RoundThrough.apply(x / scale).clamp(-limit, limit)


# ---- training with rounded numbers ---------------------------------------------------------------


def fake_quantize(x: Tensor, bits: int, axis: int | None = -1) -> Tensor:
    """Return x rounded to the grid, in floats.

    The gradient with respect to x is that of the result: the scale counts as a constant, and
    rounding as the identity.
    """
    scale = grid_scale(x, bits, axis)
    return round_to_grid(x, scale, bits) * scale


def fake_product(x: Tensor, weight: Tensor, weight_bits: int, activation_bits: int) -> Tensor:
    """Return x W^T of rounded rows x (..., C) and rounded weights (F, C) -> (..., F).

    The integers are multiplied before they are scaled. Up to C = 1,040 the fp32 sum is exact: with
    8 bits the result is that of `Int8Linear`, bit for bit.
    """
    x_scale, weight_scale = grid_scale(x, activation_bits), grid_scale(weight, weight_bits)
    rows = round_to_grid(x, x_scale, activation_bits)
    product = F.linear(rows, round_to_grid(weight, weight_scale, weight_bits))
    return product * x_scale * weight_scale[:, 0]


class FakeQuantLinear(nn.Linear):
    """A linear layer whose weights and activations are rounded in each forward pass.

    The parameter `weight` stays a float: many small updates add up to one step of the grid.
    """

    weight_bits, activation_bits = 8, 8

    @classmethod
    def from_float(
        cls, linear: nn.Linear, weight_bits: int, activation_bits: int = 8
    ) -> "FakeQuantLinear":
        """Return a layer with the parameters of `linear` itself, which an optimizer may hold."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.weight_bits, layer.activation_bits = weight_bits, activation_bits
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = fake_product(x, self.weight, self.weight_bits, self.activation_bits)
        return y if self.bias is None else y + self.bias


class FakeQuantExperts:
    """Run experts with rounded weights and activations: takes the place of MoE.run_experts."""

    def __init__(self, weight_bits: int, activation_bits: int = 8) -> None:
        self.bits = (weight_bits, activation_bits)

    def __call__(
        self, x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor
    ) -> Tensor:
        """Return the output (N, C). The arguments are those of `experts_loop` in moe.py."""
        y = torch.zeros_like(x)
        for e in range(len(up)):
            token, slot = (experts == e).nonzero(as_tuple=True)
            hidden = fake_product(x[token], up[e], *self.bits).relu().square()
            output = fake_product(hidden, out[e], *self.bits)
            y = y.index_add(0, token, output * weights[token, slot, None].to(x.dtype))
        return y


# ---- multiplying integers ------------------------------------------------------------------------

FP32_EXACT = 2**24 // 127**2  # products of INT8 numbers that an fp32 sum always holds: 1,040


def integer_product(
    a: Tensor, b: Tensor, kernel: str, b_sums: Tensor | None = None, packed: object = None
) -> Tensor:
    """Return the product of integers: a (N, C), b (F, C) int8 -> (N, F) int32.

    a holds integers of 8 bits, as int8 or as floats. `kernel` is "int8"; or "fbgemm", whose sums
    are returned as fp32, exact up to 2^24; or "fp32" to multiply the integers as floats, in pieces
    whose sums fp32 holds exactly. A caller may compute once what depends on b alone: `b_sums`, (F,)
    int32, the sums of b's rows, and `packed`, pack(b).
    """
    if kernel == "fp32":
        product = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
        for start in range(0, a.size(1), FP32_EXACT):
            piece = slice(start, start + FP32_EXACT)
            product += (a[:, piece].float() @ b[:, piece].float().T).to(torch.int32)
        return product
    if kernel == "fbgemm":
        # It rounds floats itself, with one scale for all of them. They are integers already, so
        # scale 1 and zero point 128 leave them as they are.
        multiply_packed = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return multiply_packed(a.float(), 1.0, 128, pack(b) if packed is None else packed)
    if a.device.type == "cpu":
        # A CPU's instruction (VNNI) multiplies unsigned by signed bytes: add 128 to a, and
        # subtract 128 times the sums from the product.
        if b_sums is None:
            b_sums = b.sum(dim=1, dtype=torch.int32)
        unsigned = ((a.to(torch.int16) if a.dtype == torch.int8 else a) + 128).to(torch.uint8)
        return torch._int_mm(unsigned, b.T) - 128 * b_sums  # b.T is a view: a copy would be slow
    # CUDA wants more than 16 rows, and multiples of 8. Not measured: no GPU has run this yet.
    rows, columns = len(a), len(b)
    a = pad(a.to(torch.int8), max(32 - rows, -rows % 8), -a.size(1) % 8)
    b = pad(b, -columns % 8, -b.size(1) % 8)
    return torch._int_mm(a, b.T)[:rows, :columns]


def pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Append rows and columns of zeros to a matrix; if there are none to append, return it."""
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def pack(b: Tensor) -> object:
    """Return a weight (F, C) int8 in the order in which FBGEMM reads it."""
    with warnings.catch_warnings():
        # PyTorch means to remove its quantised tensors; choose_kernel then finds none.
        warnings.simplefilter("ignore")
        tensor = torch._make_per_tensor_quantized_tensor(b, 1.0, 0)
    return torch.ops.quantized.linear_prepack(tensor, None)


KERNELS = ("int8", "fbgemm")  # the preferred one first; both are PyTorch's


class Kernel(NamedTuple):
    """How to multiply INT8 matrices on a kind of device."""

    name: str  # of KERNELS, or "fp32": see integer_product
    weight_bits: int  # 7 where the sums of 8-bit products saturate, else 8
    reason: str


@cache
def choose_kernel(device_type: str) -> Kernel:
    """Return how to multiply on "cpu" or "cuda", found by one trial with the largest integers.

    Processors with AVX2 or AVX512 but without VNNI add pairs of 8-bit products in 16 bits, which
    saturates; with 7-bit weights it does not. There PyTorch's torch._int_mm is a plain loop, many
    times slower than floats, and FBGEMM's product is fast.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (64, 512), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (512, 512), generator=generator, dtype=torch.int8)
    a[0], b[0], b[1] = 127, 127, -127  # the largest sums, up and down
    a, b = a.to(device_type), b.to(device_type)
    reasons = []
    for name in KERNELS:
        try:
            bits = exact_bits(a, b, name)
            packed = pack(b) if name == "fbgemm" else None
        except (RuntimeError, AttributeError) as error:
            text = str(error).partition("\n")[0]
            reasons.append(f"PyTorch has no {name} product on {device_type}: {text}")
            continue
        if not bits:
            reasons.append(f"this processor's {name} product is not exact")
            continue
        in_int8 = fastest_seconds(partial(integer_product, a, b, name, packed=packed))
        in_fp32 = fastest_seconds(partial(integer_product, a, b, "fp32"))
        if in_int8 > 2 * in_fp32:
            ratio = in_int8 / in_fp32
            reasons.append(f"{name} takes {ratio:.0f} times as long as fp32 on this processor")
            continue
        exact = "multiplies INT8 exactly" if bits == 8 else "saturates with weights of 8 bits"
        return Kernel(name, bits, "; ".join([*reasons, f"{name} {exact}"]))
    return Kernel("fp32", 8, "; ".join(reasons))


def exact_bits(a: Tensor, b: Tensor, kernel: str) -> int | None:
    """Return with how many bits of b, 8 or 7, a kernel's product is exact; None if with neither."""
    for bits in (8, 7):
        weight = b.clamp(-grid_limit(bits), grid_limit(bits))
        product = integer_product(a, weight, kernel).to(torch.int32)
        if torch.equal(product, integer_product(a, weight, "fp32")):
            return bits
    return None


def fastest_seconds(call: Callable[[], object]) -> float:
    """Return the least time of five calls, which other programs on the processor delay least."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def quantize_rows(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return x (..., C) as int8 and the scale of each row, (...,)."""
    scale = grid_scale(x, bits)
    return round_to_grid(x, scale, bits).to(torch.int8), scale[..., 0]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight (..., F, C) as int8, the scale and the sum of each output channel, (..., F).

    Raises ValueError if it is not finite.
    """
    check_finite(weight)
    integers, scale = quantize_rows(weight.detach(), choose_kernel(weight.device.type).weight_bits)
    return integers, scale, integers.sum(dim=-1, dtype=torch.int32)


def check_finite(weight: Tensor) -> None:
    """Raise ValueError if a weight has NaN or infinite values."""
    if not weight.isfinite().all():
        raise ValueError("the weights are not all finite: take a checkpoint from before that")


def usable_kernel(integers: Tensor) -> str:
    """Return the kernel for a weight that another machine may have quantised: "fp32" if it has more
    bits than this processor multiplies."""
    kernel = choose_kernel(integers.device.type)
    return kernel.name if integers.abs().max() <= grid_limit(kernel.weight_bits) else "fp32"


# ---- layers on integers --------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer on integers: the weight is quantised once, each row as it comes."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight` (F, C), in floats. Raises ValueError if it is not finite."""
        super().__init__()
        integers, scale, sums = quantize_weight(weight)
        self.register_buffer("weight", integers)  # (F, C) int8
        self.register_buffer("scale", scale)  # (F,)
        self.register_buffer("sums", sums)  # (F,) int32
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.kernel: str | None = None  # chosen at the first product: weights may be loaded before
        self.packed: object = None

    @classmethod
    def from_float(cls, linear: nn.Linear) -> "Int8Linear":
        return cls(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias: x (..., C) -> (..., F)."""
        if self.kernel is None:
            self.kernel = usable_kernel(self.weight)
            self.packed = pack(self.weight) if self.kernel == "fbgemm" else None
        rows = x.reshape(-1, x.size(-1))
        row_scale = grid_scale(rows, 8)  # (N, 1)
        integers = round_to_grid(rows, row_scale, 8)
        product = integer_product(integers, self.weight, self.kernel, self.sums, self.packed)
        y = product.to(x.dtype).mul_(row_scale).mul_(self.scale.to(x.dtype))
        y = y.view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _load_from_state_dict(self, *arguments) -> None:
        self.kernel = self.packed = None  # the weight changes
        super()._load_from_state_dict(*arguments)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.kernel = self.packed = None  # another device may have another kernel
        return super()._apply(function, recurse)


def run_quantized_experts(
    x: Tensor, weights: Tensor, experts: Tensor, up: nn.ModuleList, out: nn.ModuleList
) -> Tensor:
    """Run experts that are lists of E quantised layers: takes the place of MoE.run_experts.

    x (N, C), weights (N, K), experts (N, K) with E for a dropped assignment -> (N, C). Assignments
    are sorted by expert, as in moe_kernel.py.
    """
    E, K = len(up), experts.size(1)
    order = experts.flatten().argsort(stable=True)  # (N K,)
    counts = torch.bincount(experts.flatten(), minlength=E + 1)[:E].tolist()
    y = torch.zeros_like(x)
    for e, assignments in enumerate(order[: sum(counts)].split(counts)):
        if len(assignments):
            token = assignments // K
            output = out[e](up[e](x[token]).relu().square())
            y.index_add_(0, token, output * weights.flatten()[assignments, None].to(x.dtype))
    return y


# ---- storing 8-bit floats ------------------------------------------------------------------------

FP8 = torch.float8_e4m3fn  # 1 sign, 4 exponent and 3 mantissa bits; the largest number is 448
FP8_MAX = 448.0


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (..., F, C) in e4m3 and the scale of each output channel, (..., F).

    Each channel's largest number becomes 448, so that few fall below the smallest, 2^-9. The error
    is at most 1/16 of a number, or 2^-10 of the scale if that is more. Raises ValueError if the
    weight is not finite: the cast would turn infinity into 448 without a word.
    """
    check_finite(weight)
    scale = weight.detach().abs().amax(dim=-1, keepdim=True) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    # The quotient may round to more than 448, which older releases of PyTorch made NaN.
    floats = (weight.detach() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return floats, scale[..., 0]


class Fp8Linear(nn.Module):
    """A linear layer whose weight is stored in FP8, a quarter of fp32's size.

    FP8 is storage here. The product is computed in the dtype of x: FP8 products are slower than
    fp32's on a CPU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight` (F, C), in floats. Raises ValueError if it is not finite."""
        super().__init__()
        floats, scale = quantize_fp8(weight)
        self.register_buffer("weight", floats)  # (F, C)
        self.register_buffer("scale", scale)  # (F,)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias: x (..., C) -> (..., F)."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# ---- a whole model -------------------------------------------------------------------------------

FORMATS = {"int8": Int8Linear, "fp8": Fp8Linear}


def quantize(model: nn.Module, format: str = "int8") -> nn.Module:
    """Return a copy of a model with quantised linear layers and experts, in eval mode.

    `format`: "int8" (smaller and, with INT8 instructions, faster) or "fp8" (smaller). Experts are
    recognised by their stacks `up` (E, F, C) and `out` (E, C, F) and their `run_experts`, not by
    their class; the router's gate beside them keeps its precision.

    Raises ValueError for an unknown format, a model that is quantised already, and weights that are
    not finite.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: choose {' or '.join(FORMATS)}")
    if any(isinstance(module, tuple(FORMATS.values())) for module in model.modules()):
        raise ValueError("the model is quantised already: take the one that it was made from")
    quantized = FORMATS[format]
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if has_experts(module):
            for name in ("up", "out"):
                stack = getattr(module, name)
                delattr(module, name)
                setattr(module, name, nn.ModuleList(quantized(weight) for weight in stack))
            module.run_experts = run_quantized_experts
        else:
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, quantized(child.weight, child.bias))
    return model.requires_grad_(False)


def fake_quantize_model(model: nn.Module, weight_bits: int, activation_bits: int = 8) -> None:
    """Make a model train with rounded weights and activations, in place.

    The parameters stay the same objects under the same names, so optimizers and checkpoints do not
    notice. `quantize` turns the trained model into integers (at 8 bits).
    """
    for module in list(model.modules()):
        if has_experts(module):
            module.run_experts = FakeQuantExperts(weight_bits, activation_bits)
        else:
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    fake = FakeQuantLinear.from_float(child, weight_bits, activation_bits)
                    setattr(module, name, fake)


def has_experts(module: nn.Module) -> bool:
    """Return whether a module has stacks of experts and the function that runs them."""
    stacks = getattr(module, "up", None), getattr(module, "out", None)
    is_stack = [isinstance(stack, Tensor) and stack.ndim == 3 for stack in stacks]
    return all(is_stack) and hasattr(module, "run_experts")


def quantized_share(model: nn.Module) -> float:
    """Return the share of a model's weights that are stored in 8 bits."""
    total = sum(p.numel() for p in model.parameters())
    in_8_bits = 0
    for module in model.modules():
        if isinstance(module, tuple(FORMATS.values())):
            in_8_bits += module.weight.numel()
    return in_8_bits / (total + in_8_bits)
