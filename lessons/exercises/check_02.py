"""Grade the exercises of lesson 02: python lessons/exercises/check_02.py [FILE]

Mistakes are found by experiments on the functions (see probe_experts.py for steps 2 and 3), never by reading their source.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from grade import (
    TOLERANCE,
    Answer,
    Mistake,
    Step,
    expect_dtype,
    expect_gradients,
    expect_integers,
    expect_shape,
    first_index,
    main,
)
from probe_experts import C, E, F, K, N, examine, expect_cases, expect_little_work, shaped, tokens
from torch import Tensor

from nanods import moe, moe_kernel

# ---- step 1: route ---------------------------------------------------------------------------------------------------------


def scored(N: int = N) -> tuple[Tensor, Tensor]:
    """x and a gate."""
    x = tokens(N)[0]
    return x, torch.randn(E, C, generator=torch.Generator().manual_seed(0), dtype=x.dtype) / C**0.5


def check_route(answer: Answer) -> None:
    def asked(x: Tensor, gate: Tensor, top_k: int, when: str = "") -> tuple[Tensor, Tensor]:
        parts = answer(x, gate, top_k, when=when)
        for part, name in zip(parts, ("weights", "experts"), strict=True):
            whole = part.shape == (N, E) and top_k < E
            how = f", {when}" if when else ": gather those of the chosen" if whole else ""
            expect_shape(part, (len(x), top_k), f" (the {name}){how}")
        return parts

    x, gate = scored()
    weights, experts = asked(x, gate, K)
    if experts.dtype.is_floating_point and not weights.dtype.is_floating_point:
        raise Mistake("returns experts, weights: the two are swapped")
    expect_integers(experts, "the numbers of experts")
    if (outside := (experts < 0) | (experts >= E)).any():
        raise Mistake(f"there is no expert {experts[outside][0]}: they go from 0 to {E - 1}")
    expect_dtype(weights, x)
    x2 = x.clone()
    x2[0] = -x2[0]
    changed = ((asked(x2, gate, K)[0] - weights).abs() > TOLERANCE).any(-1)
    changed[0] = False
    if changed.any():
        raise Mistake(
            f"the weights of token {first_index(changed)[0]} change with token 0: is the softmax over the tokens? dim=-1"
        )

    logits = x @ gate.T
    right, best, probs = moe.route(x, gate, K)
    if not experts.equal(best):
        t = first_index(experts != best)[0]
        got, wanted = experts[t].tolist(), best[t].tolist()
        if experts.sort().values.equal(best.sort().values):
            raise Mistake(
                f"the order is wrong: token {t} lists the experts {got}, best first is {wanted}"
            )
        raise Mistake(
            f"the choice is not the best: token {t} chose the experts {got}, its highest scores are at {wanted}"
        )
    expect_router_weights(weights, right, logits.gather(-1, best), probs.gather(-1, best), best)
    for when, (length, top_k) in {
        "top_k = 1": (N, 1),
        f"top_k = E = {E}": (N, E),
        "one token": (1, K),
    }.items():
        x, gate = scored(length)
        weights, experts = asked(x, gate, top_k, when=f"for {when}")
        right, best, _ = moe.route(x, gate, top_k)
        if not (experts.equal(best) and (weights - right).abs().max() < TOLERANCE):
            raise Mistake(f"right in general, but wrong for {when}")
    x, gate = scored()
    expect_gradients(
        lambda *a: asked(*a, K)[0], lambda *a: moe.route(*a, K)[0], {"x": x, "gate": gate}
    )
    expect_router_precision(asked)


def expect_router_weights(
    weights: Tensor, right: Tensor, logits: Tensor, probs: Tensor, experts: Tensor
) -> None:
    """`logits` and `probs` (N, K): those of the chosen."""
    if (weights - right).abs().max() < TOLERANCE:
        return
    for raw in (logits, logits / logits.sum(-1, keepdim=True)):
        if (weights - raw).abs().max() < TOLERANCE:
            raise Mistake(
                f"there is no softmax: the weights are made of the scores x @ gate.T, such as {logits[0, 0]:.3f}"
            )
    if (weights - probs.softmax(-1)).abs().max() < TOLERANCE:
        raise Mistake(
            "the softmax is taken twice, of the probabilities too: divide these by their sum"
        )
    sums = weights.sum(-1)
    if ((sums - 1).abs() > TOLERANCE).any():
        t = (sums - 1).abs().argmax()
        raise Mistake(
            f"the weights of token {t} sum to {sums[t]:.2f}, not to 1: divide them by the sum of those chosen"
        )
    t, k = first_index(~((weights - right).abs() < TOLERANCE))
    raise Mistake(
        f"token {t} gives expert {experts[t, k]} the weight {weights[t, k]:.3f}, not {right[t, k]:.3f}"
    )


def expect_router_precision(route: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, gate = (part.float() for part in scored())
    expect_dtype(route(x, gate, K)[0], x)
    if not route(1000 * x, gate, K)[0].isfinite().all():
        raise Mistake(
            "overflows on large scores: their exp() is infinite; torch.softmax subtracts the largest first"
        )
    x, gate = scored(200)
    gate[1], gate[1, 0] = (
        gate[0],
        gate[0, 0] + 0.0025,
    )  # scores nearer to one another than bf16 can tell
    x, gate = x.bfloat16(), (4 * gate).bfloat16()
    weights, experts = route(x, gate, K, when="for bf16")
    right, best, _ = moe.route(x.double(), gate.double(), K)
    if (off := (experts != best).any(-1)).any():
        t = first_index(off)[0]
        raise Mistake(
            f"in bf16, rounding chooses: token {t} got the experts {experts[t].tolist()}, exact scores say {best[t].tolist()}; "
            "compute the scores in fp32, from x and gate in fp32"
        )
    if not (weights - right).abs().max() < 0.01:
        raise Mistake("right in fp64, but the weights are wrong for bf16")


# ---- steps 2 and 3: mix ------------------------------------------------------------------------------------------------------


def check_mix(answer: Answer) -> None:
    examine(shaped(answer))
    expect_cases(shaped(answer))


def check_mix_sorted(answer: Answer) -> None:
    check_mix(answer)
    expect_little_work(shaped(answer))


# ---- steps 4 and 5, and the first bonus: an even load ------------------------------------------------------------------------


def check_loss(answer: Answer) -> None:
    experts = tokens()[2]
    probs, other = (tokens(seed=seed)[0][:, :E].softmax(-1) for seed in (2, 3))

    def asked(probs: Tensor, experts: Tensor, when: str = "") -> Tensor:
        loss = answer(probs, experts, when=when)
        expect_shape(
            loss,
            (),
            f", {when}" if when else ": sum over the experts" if loss.shape == (E,) else "",
        )
        return loss

    loss = asked(probs, experts)
    expect_dtype(loss, probs)

    def same(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs() < TOLERANCE)

    if same(loss, asked(other, experts)):
        raise Mistake(
            "does not change with `probs`: the counts alone have no gradient, so nothing would be learned"
        )
    if same(loss, asked(probs, (experts + 1) % E)):
        raise Mistake(
            "does not change with `experts`: count what was chosen, not what the probabilities would choose"
        )
    seconds = torch.cat([experts[:, :1], (experts[:, :1] + 1) % E], dim=-1)
    if same(loss, asked(probs, seconds)):
        raise Mistake("counts the first choices alone (slot 0): all N K assignments count")
    right = moe.load_balancing_loss(probs, experts)
    known = {
        1 / E: f"the factor E = {E} is missing",
        K: f"the counts are divided by N = {N}, and there are N K = {N * K} assignments",
        K / E: "the counts are divided by N, not by N K, and the factor E is missing",
        N * K: "the counts are not divided by their number, N K",
        N * K / E: "the counts are not divided by their number, N K, and the factor E is missing",
        N: "the probabilities are summed over the tokens, not averaged",
        E: "E is multiplied in twice",
        -1: "the sign is turned: it falls as the load gets uneven",
    }
    for times, why in known.items():
        if same(loss, times * right):
            raise Mistake(
                f"{times:.3g} times what it should be, so {times:.3g} for an even load: {why}"
            )
    share = torch.nn.functional.one_hot(experts, E).to(probs).mean(1)  # (N, E)
    if same(loss, E * (share * probs).mean(0).sum()):
        raise Mistake(
            "multiplies token by token and averages then: average shares and probabilities over the tokens first"
        )
    if not same(loss, right):
        raise Mistake(f"gives {loss:.4f} where it should give {right:.4f}")
    expect_gradients(
        lambda p: asked(p, experts), lambda p: moe.load_balancing_loss(p, experts), {"probs": probs}
    )
    cases = {
        "K = 1": (probs, experts[:, :1]),
        "an expert chosen by nobody": (probs, tokens(unused=(1,))[2]),
        "the last expert chosen by nobody": (probs, tokens(unused=(E - 1,))[2]),
        "one token": (probs[:1], experts[:1]),
        "all tokens with expert 0": (
            torch.eye(1, E, dtype=torch.float64).expand(N, E),
            torch.zeros(N, 1, dtype=torch.long),
        ),
    }
    for when, given in cases.items():
        loss, right = asked(*given, when=f"for {when}"), moe.load_balancing_loss(*given)
        if not same(loss, right):
            raise Mistake(
                f"right in general, but wrong for {when}: it gives {loss:.4f}, not {right:.4f}"
            )
    expect_dtype(asked(probs.float(), experts), probs.float())


def check_capacity(answer: Answer) -> None:
    experts, capacity = tokens()[2], 3
    served = answer(experts, E, capacity)
    expect_shape(served, (N, K), ": one for each assignment, in the shape of `experts`")
    if served.dtype != torch.bool:
        raise Mistake(
            f"must be bool, and is {str(served.dtype)[6:]}: is it the place, not yet compared with the capacity?"
        )

    if not served.equal(wanted := moe.within_capacity(experts, E, capacity)):
        explain_capacity(experts, served, wanted, capacity)
    cases = {
        "capacity = 0": (experts, 0),
        "capacity = 1": (experts, 1),
        "a capacity above N": (experts, N + 1),
        "K = 1": (experts[:, :1], capacity),
        "one token": (experts[:1], capacity),
        "experts chosen by nobody": (tokens(unused=(1, E - 1))[2], capacity),
    }
    for when, (experts, capacity) in cases.items():
        served = answer(experts, E, capacity, when=f"for {when}")
        expect_shape(served, experts.shape, f", for {when}")
        if not served.equal(moe.within_capacity(experts, E, capacity)):
            raise Mistake(f"right in general, but wrong for {when}")


def explain_capacity(experts: Tensor, served: Tensor, wanted: Tensor, capacity: int) -> None:
    def right(
        experts: Tensor = experts, capacity: int = capacity, priority: str = "token"
    ) -> Tensor:
        return moe.within_capacity(experts, E, capacity, priority)

    t, k = first_index(served != wanted)
    here = f"token {t} in slot {k}, for expert {experts[t, k]},"
    number, asked = (
        moe_kernel.count_assignments(experts.masked_fill(~x, E), E)
        for x in (served, torch.ones_like(served))
    )
    limit = f"the capacity is {capacity}"
    known = [
        (~wanted, "True and False are swapped: True is for who is served"),
        (
            right(priority="slot"),
            f"all first choices come before any second choice: {here} is judged by its slot, not its token",
        ),
        (
            torch.cat([right(column) for column in experts.split(1, dim=-1)], dim=-1),
            f"each slot is counted alone: expert {number.argmax()} serves {number.max()} in all, {limit}",
        ),
        (
            right(capacity=capacity + 1),
            f"one too many: an expert serves {capacity + 1}, {limit} (places count from 0)",
        ),
        (
            right(capacity=capacity - 1),
            f"one too few: an expert serves {capacity - 1}, {limit} (places count from 0)",
        ),
        (right(experts.flip(0)).flip(0), f"the later tokens are served: {here} came before them"),
        (
            (torch.arange(N * K) < capacity).view(N, K),
            "all experts share the places: each has `capacity` of its own",
        ),
        (
            wanted.all(-1, keepdim=True).expand(N, K),
            f"a token that one expert drops is dropped by its others too: {here} has a place",
        ),
    ]
    for hypothesis, why in known:
        if served.equal(hypothesis):
            raise Mistake(why)
    if (over := number > capacity).any():
        e = first_index(over)[0]
        raise Mistake(f"expert {e} serves {number[e]} tokens, {limit}")
    if (under := number < asked.clamp(max=capacity)).any():
        e = first_index(under)[0]
        raise Mistake(
            f"expert {e} serves {number[e]} of the {asked[e]} tokens that chose it, {limit}"
        )
    raise Mistake(
        f"{here} is {'' if served[t, k] else 'not '}served, and should {'' if wanted[t, k] else 'not '}be"
    )


def check_bias(answer: Answer) -> None:
    bias = tokens()[0][0, :E]
    load, rate = (
        torch.tensor([9, 2, 5, 1, 8]),
        0.125,
    )  # a mean of 5; powers of 2 are exact in fp32 too
    new = answer(bias, load, rate)
    expect_shape(new, (E,))
    step = new - bias
    distance = load.double().mean() - load
    wanted = rate * distance.sign()
    known = {
        "the sign is turned: it takes from the experts that have little, and gives to those that have much": -wanted,
        "returns the step alone: add it to the bias": wanted - bias,
    }
    for why, hypothesis in known.items():
        if (step - hypothesis).abs().max() < TOLERANCE:
            raise Mistake(why)
    c = (step * distance).sum() / distance.square().sum()
    if (step - c * distance).abs().max() < 1e-6 and c > TOLERANCE:
        raise Mistake(
            "the step is longer where the load is further from the mean: only the sign counts"
        )
    if (wrong := ~((step - wanted).abs() < TOLERANCE)).any():
        e = first_index(wrong)[0]
        raise Mistake(
            f"expert {e} had {load[e]}, the mean is 5, so its bias moves by {wanted[e]:.3g}; here by {step[e]:.3g}"
        )
    single = answer(bias.float(), load, rate)
    expect_shape(single, (E,))
    expect_dtype(single, bias.float())
    if not (single - bias.float() - wanted).abs().max() < 1e-6:
        raise Mistake("in fp32 the bias moves by something else than in fp64")


# ---- the second bonus: start from one MLP ------------------------------------------------------------------------------------


def check_upcycle(answer: Answer) -> None:
    up, out = (many[0] for many in tokens()[3:])
    ups, outs = answer(up, out, E)
    if ups.shape == (E, C, F) and outs.shape == (E, F, C):
        raise Mistake("returns out, up: the two are swapped")
    for name, copies, one in (("up", ups, up), ("out", outs, out)):
        expect_shape(copies, (E, *one.shape), f" ({name})")
        expect_dtype(copies, one)
        c = (copies * one).sum() / (E * one.square().sum())
        if (copies - c * one).abs().max() < TOLERANCE < abs(c - 1):
            raise Mistake(
                f"each expert's {name} is {c:.3g} times the MLP's: a token's weights sum to 1, so no factor is needed"
            )
        if (wrong := ~((copies - one).abs().amax((1, 2)) < TOLERANCE)).any():
            raise Mistake(
                f"{name}[{first_index(wrong)[0]}] is not the MLP's {name}: each expert starts as a copy of it"
            )
        copies[0, 0, 0] += 1
        if copies[1, 0, 0] == copies[0, 0, 0]:
            raise Mistake(
                f"the experts share one memory: changing {name}[0] changes {name}[1] too (repeat copies, expand not)"
            )
    ups, outs = answer(up, out, 1, when="for n_expert = 1")
    expect_shape(ups, (1, F, C), ", for n_expert = 1")
    expect_shape(outs, (1, C, F), ", for n_expert = 1")
    if not (ups[0].equal(up) and outs[0].equal(out)):
        raise Mistake("the only expert, for n_expert = 1, is not the MLP")


STEPS = [
    Step("route", check_route, returns=("weights", "experts")),
    Step("mix", check_mix),
    Step("experts_sorted", check_mix_sorted),
    Step("load_balancing_loss", check_loss),
    Step("within_capacity", check_capacity, mask=True),
    Step("update_bias", check_bias, optional=True),
    Step("upcycle", check_upcycle, optional=True, returns=("up", "out")),
]

if __name__ == "__main__":
    sys.exit(main(STEPS, Path(__file__).with_name("02_mixture_of_experts.py")))
