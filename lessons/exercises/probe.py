"""Experiments on an attention function, or a block selection, that a learner wrote.

Each experiment raises `Mistake` with a sentence that says what is wrong. The main experiment uses
that attention is linear in v: if v is the identity, the output *is* the matrix of attention weights
W (T queries x T keys). W shows which query attends to which key, and with what weight. Positions,
blocks and heads count from 0.
"""

from collections.abc import Callable

import torch
from grade import (
    TOLERANCE,
    Mistake,
    different_digits,
    expect_dtype,
    expect_gradients,
    expect_shape,
    first_index,
)
from torch import Tensor

from nanods.attention import masked_attention

B, H, T, D = 2, 3, 14, 8  # all sizes differ, so that two of them cannot be confused
BLOCK, N = 4, 4  # block size and number of blocks; the last block has 2 tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_qkv(T: int = T, seed: int = 1) -> list[Tensor]:
    """Return random q, k, v (B, H, T, D) in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, T, D, generator=generator, dtype=torch.float64) for _ in range(3)]


def linear_map_matrix(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the matrix (B, H, rows, T) of a linear function of (B, H, T, D).

    One call of the function gives D columns of the matrix.
    """
    identity = torch.eye(T, -(-T // D) * D, dtype=torch.float64)
    columns = []
    for units in identity.split(D, dim=1):  # (T, D)
        columns.append(function(units.expand(B, H, T, D)))
    return torch.cat(columns, dim=-1)[..., :T]


def key_range(block: int) -> str:
    """Return the positions of a block's keys, as "4-7"."""
    return f"{block * BLOCK}-{min(block * BLOCK + BLOCK, T) - 1}"


def expect_independent_heads(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Raise Mistake if head 0 of sequence 0 changes the output of another head or sequence."""
    modified = [x.clone() for x in tensors]
    for x, y in zip(modified, random_qkv(seed=2), strict=False):
        x[0, 0] = y[0, 0]
    before, after = function(*tensors).nan_to_num(), function(*modified).nan_to_num()
    changed = (before - after).abs() > TOLERANCE
    changed[0, 0] = False
    if changed.any():
        b, h = first_index(changed)[:2]
        raise Mistake(
            f"head {h} of sequence {b} changes when head 0 of sequence 0 does: "
            "a reshape or a wrong dim mixes them"
        )


def expect_attention(
    attend: Attend,
    mask: Tensor,
    tensors: list[Tensor],
    explain: Callable[[Tensor, Tensor], None],
) -> None:
    """Raise Mistake unless `attend` is attention over the keys in `mask` (B, H, T, T).

    `explain(W, expected)` gets the attention weights of the function and the expected ones. It
    raises the mistakes that are special to one step.
    """
    q, k, v = tensors
    output = attend(q, k, v)
    is_weights = output.shape == (B, H, T, T)
    hint = ": are these the weights, not yet multiplied by v?" if is_weights else ""
    expect_shape(output, v.shape, hint)
    expect_dtype(output, v)
    W = linear_map_matrix(lambda v: attend(q, k, v))
    expected = linear_map_matrix(lambda v: masked_attention(q, k, v, mask))
    is_nan = ~W.isfinite().all(-1)
    W = W.where(W.isfinite(), 0)
    sums = W.sum(-1)

    expect_softmax_over_keys(W, sums)
    expect_independent_heads(attend, tensors)
    explain(W, expected)
    expect_causal(attend, W, tensors)
    if is_nan.any():
        raise Mistake(
            f"returns NaN for position {first_index(is_nan)[2]}: "
            "a softmax over nothing but -inf, or a -inf written after the softmax"
        )
    if (sums - 1).abs().max() > TOLERANCE:
        b, h, t = first_index((sums - 1).abs() > TOLERANCE)
        raise Mistake(
            f"weights sum to {sums[b, h, t]:.2f} at position {t}: mask before the softmax"
        )
    if (unread := mask & (W == 0)).any():
        t, s = first_index(unread)[2:]
        raise Mistake(f"position {t} does not attend to position {s}, but it should")
    expect_scale(W, q @ k.mT, mask)
    if (W - expected).abs().max() > TOLERANCE:
        b, h, t, s = first_index((W - expected).abs() > TOLERANCE)
        weight, right = different_digits(W[b, h, t, s], expected[b, h, t, s], 3)
        raise Mistake(f"position {t} gives position {s} the weight {weight}, not {right}")
    if (output - expected @ v).abs().max() > TOLERANCE:
        raise Mistake("the weights are right, but the output is not weights @ v")
    expect_gradients(
        attend,
        lambda q, k, v: masked_attention(q, k, v, mask),
        dict(zip("qkv", tensors, strict=True)),
    )
    single = [x.float() for x in tensors]
    expect_dtype(attend(*single), single[0])
    if not attend(1000 * single[0], *single[1:]).isfinite().all():
        raise Mistake(
            "overflows on large scores, because exp() of them is infinite; "
            "torch.softmax subtracts the largest score first"
        )


def expect_softmax_over_keys(W: Tensor, sums: Tensor) -> None:
    """Raise Mistake if the softmax runs over another axis than the keys.

    Only the last query tells: it sees all keys, so no mask hides the axis of the softmax.
    """
    if (sums[..., -1] - 1).abs().max() <= TOLERANCE:
        return
    sums_over = {
        "queries": W.sum(2),
        "heads": W[:, :, -1].sum(1),
        "batch": W[:, :, -1].sum(0),
    }
    for axis, total in sums_over.items():
        if (total - 1).abs().max() < TOLERANCE:
            raise Mistake(f"the softmax runs over the {axis}, not over the keys: softmax(dim=-1)")


def expect_causal(attend: Attend, W: Tensor, tensors: list[Tensor]) -> None:
    """Raise Mistake unless each query attends to its own key and to no key after it."""
    if W[:, :, 1].any() and not W[:, :, 1, 1].any():
        raise Mistake(
            "position 1 does not attend to its own key: "
            "the mask is strict (s < t) and should be s <= t"
        )
    future = W.triu(1)
    if not future.any():
        return
    q, k, v = tensors
    t, s = first_index(future)[2:]
    if not W.tril(-1).any():
        raise Mistake(
            f"position {t} attends to position {s} in its future, but not to its past: "
            "the mask is transposed"
        )
    k2 = k.clone()
    k2[:, :, t + 1 :] += 1
    if (attend(q, k2, v) - attend(q, k, v))[:, :, t].abs().max() < TOLERANCE:
        raise Mistake(
            f"position {t} gives future positions a constant weight: "
            "a masked score must be -inf, not 0"
        )
    raise Mistake(f"position {t} attends to position {s} in its future: the causal mask is missing")


def expect_scale(W: Tensor, dots: Tensor, mask: Tensor) -> None:
    """Raise Mistake if the weights are a softmax of c (q . k) with another c than 1/sqrt(D)."""
    n = mask.sum(-1, keepdim=True)

    def centred(x: Tensor) -> Tensor:  # a softmax does not change if a constant is added to a row
        return (x - x.where(mask, 0).sum(-1, keepdim=True) / n).where(mask, 0)

    x, y = centred(dots), centred(W.clamp(min=1e-300).log())
    c = ((x * y).sum() / (x * x).sum()).item()
    if (y - c * x).abs().max() > 1e-6 or abs(c - D**-0.5) < 1e-6:
        return
    known_scales = {
        1: "not divided by sqrt(D)",
        D**0.5: "multiplied by sqrt(D)",
        1 / D: "divided by D, not by sqrt(D)",
        1 / H: "divided by H, not by sqrt(D)",
        1 / T**0.5: "divided by sqrt(T), not by sqrt(D)",
    }
    description = f"{c:.3g} q . k, not q . k / sqrt(D)"
    for scale, text in known_scales.items():
        if abs(c - scale) < 1e-6:
            description = text
            break
    raise Mistake(
        f"scores are {description}: at D = {D} they are {c * D**0.5:.3g} times what they should be"
    )
