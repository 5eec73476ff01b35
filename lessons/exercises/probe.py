"""Experiments on an attention, or a choice of blocks, that someone else wrote. What is wrong is raised as a Mistake, in words.

The main one: an attention is linear in v, so with v = the identity its output *is* its matrix of weights W (T queries x T
keys), which shows who reads whom, and how much. Positions, blocks and heads count from 0.
"""

from collections.abc import Callable

import torch
from grade import TOLERANCE, Mistake, expect_dtype, expect_gradients, expect_shape, first_index
from torch import Tensor

from nanods.attention import masked_attention

B, H, T, D = 2, 3, 14, 8  # all different, so that no two can be confused
BLOCK, N = 4, 4  # N blocks, the last of 2 tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def qkv(T: int = T, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, T, D, generator=generator, dtype=torch.float64) for _ in range(3)]


def through_identity(function: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix (B, H, rows, T) of a linear function of (B, H, T, D), found D of its columns a call."""
    eye = torch.eye(T, -(-T // D) * D, dtype=torch.float64)
    return torch.cat([function(part.expand(B, H, T, D)) for part in eye.split(D, dim=1)], dim=-1)[
        ..., :T
    ]


def span(block: int) -> str:
    return f"{block * BLOCK}-{min(block * BLOCK + BLOCK, T) - 1}"


def expect_separate(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    """Nothing in head 0 of sequence 0 may matter to another head or sequence."""
    others = [x.clone() for x in tensors]
    for x, y in zip(others, qkv(seed=2), strict=False):
        x[0, 0] = y[0, 0]
    changed = (function(*tensors).nan_to_num() - function(*others).nan_to_num()).abs() > TOLERANCE
    changed[0, 0] = False
    if changed.any():
        b, h = first_index(changed)[:2]
        raise Mistake(
            f"head {h} of sequence {b} changes with head 0 of sequence 0: a reshape or a wrong dim mixes them"
        )


def examine(
    attend: Attend, mask: Tensor, tensors: list[Tensor], explain: Callable[[Tensor, Tensor], None]
) -> None:
    """`attend` must be attention over the keys in `mask` (B, H, T, T). `explain(W, right)` knows the mistakes of its step."""
    q, k, v = tensors
    out = attend(q, k, v)
    expect_shape(
        out,
        v.shape,
        ": are these the weights, not yet multiplied by v?" if out.shape == (B, H, T, T) else "",
    )
    expect_dtype(out, v)
    W = through_identity(lambda v: attend(q, k, v))
    right = through_identity(lambda v: masked_attention(q, k, v, mask))
    nan, W = ~W.isfinite().all(-1), W.where(W.isfinite(), 0)
    sums = W.sum(-1)

    if (
        (sums[..., -1] - 1).abs().max() > TOLERANCE
    ):  # the last query sees all keys, so no mask hides which way the softmax runs
        for axis, total in {
            "queries": W.sum(2),
            "heads": W[:, :, -1].sum(1),
            "batch": W[:, :, -1].sum(0),
        }.items():
            if (total - 1).abs().max() < TOLERANCE:
                raise Mistake(
                    f"the softmax runs over the {axis}, not over the keys: softmax(dim=-1)"
                )
    expect_separate(attend, tensors)
    explain(W, right)
    expect_past(attend, W, tensors)
    if nan.any():
        raise Mistake(
            f"returns NaN for position {first_index(nan)[2]}: a softmax of nothing but -inf, or an -inf put in after it"
        )
    if (sums - 1).abs().max() > TOLERANCE:
        b, h, t = first_index((sums - 1).abs() > TOLERANCE)
        raise Mistake(
            f"weights sum to {sums[b, h, t]:.2f} at position {t}: masked after the softmax instead of before"
        )
    if (unread := mask & (W == 0)).any():
        t, s = first_index(unread)[2:]
        raise Mistake(f"position {t} does not read position {s}, though it should")
    expect_scale(W, q @ k.mT, mask)
    if (W - right).abs().max() > TOLERANCE:
        b, h, t, s = first_index((W - right).abs() > TOLERANCE)
        raise Mistake(
            f"position {t} gives position {s} the weight {W[b, h, t, s]:.3f}, not {right[b, h, t, s]:.3f}"
        )
    if (out - right @ v).abs().max() > TOLERANCE:
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
            "overflows on large scores: their exp() is infinite; torch.softmax subtracts the largest first"
        )


def expect_past(attend: Attend, W: Tensor, tensors: list[Tensor]) -> None:
    """Each query reads its own key and none after it."""
    if W[:, :, 1].any() and not W[:, :, 1, 1].any():
        raise Mistake(
            "position 1 does not see its own key: the mask is strict (s < t) and should be s <= t"
        )
    future = W.triu(1)
    if not future.any():
        return
    q, k, v = tensors
    t, s = first_index(future)[2:]
    if not W.tril(-1).any():
        raise Mistake(
            f"position {t} sees position {s}, its future, but not its past: the mask is turned round"
        )
    k2 = k.clone()
    k2[:, :, t + 1 :] += 1
    if (attend(q, k2, v) - attend(q, k, v))[:, :, t].abs().max() < TOLERANCE:
        raise Mistake(
            f"position {t} gives its future a constant weight: a masked score must be -inf, not 0"
        )
    raise Mistake(f"position {t} sees position {s}, its future: the causal mask is missing")


def expect_scale(W: Tensor, dots: Tensor, mask: Tensor) -> None:
    """If the weights are a softmax of c (q . k), whatever the c, then c must be 1/sqrt(D)."""
    n = mask.sum(-1, keepdim=True)

    def centred(x: Tensor) -> Tensor:  # the softmax forgets what is common to a row
        return (x - x.where(mask, 0).sum(-1, keepdim=True) / n).where(mask, 0)

    x, y = centred(dots), centred(W.clamp(min=1e-300).log())
    c = ((x * y).sum() / (x * x).sum()).item()
    if (y - c * x).abs().max() > 1e-6 or abs(c - D**-0.5) < 1e-6:
        return
    known = {1: "not divided by sqrt(D)", D**0.5: "multiplied by sqrt(D)"}
    known |= {
        1 / n: f"divided by {name}, not by sqrt(D)"
        for name, n in (("D", D), ("H", H), ("sqrt(T)", T**0.5))
    }
    what = next(
        (text for value, text in known.items() if abs(c - value) < 1e-6),
        f"{c:.3g} q . k, not q . k / sqrt(D)",
    )
    raise Mistake(
        f"scores are {what}: at D = {D} they are {c * D**0.5:.3g} times what they should be"
    )
