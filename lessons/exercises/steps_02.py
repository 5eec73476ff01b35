"""The steps of lesson 02, each with its tests. check_02.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_02.py FILE

The checks find mistakes by experiments on the functions (steps 2 and 3: see probe_experts.py). They
never read the source.
"""

import sys
from collections.abc import Callable

import torch
from grade import (
    TOLERANCE,
    Answer,
    Mistake,
    Step,
    different_digits,
    expect_dtype,
    expect_gradients,
    expect_integers,
    expect_shape,
    first_index,
    main,
)
from probe_experts import (
    C,
    E,
    F,
    K,
    N,
    expect_minimal_work,
    expect_mixture,
    expect_special_cases,
    random_inputs,
    with_expected_shape,
)
from torch import Tensor

from nanods import moe
from nanods.moe_kernel import count_assignments

# ---- step 1: the router --------------------------------------------------------------------------

Route = Callable[..., tuple[Tensor, Tensor]]


def router_inputs(N: int = N) -> tuple[Tensor, Tensor]:
    """Return x (N, C) and a gate (E, C)."""
    x = random_inputs(N)[0]
    generator = torch.Generator().manual_seed(0)
    return x, torch.randn(E, C, generator=generator, dtype=x.dtype) / C**0.5


def check_route(answer: Answer) -> None:
    """Check step 1."""

    def route(x: Tensor, gate: Tensor, top_k: int, when: str = "") -> tuple[Tensor, Tensor]:
        """Return the answer's weights and experts, after a check of their shapes."""
        outputs = answer(x, gate, top_k, when=when)
        for output, name in zip(outputs, ("weights", "experts"), strict=True):
            if when:
                hint = f", {when}"
            elif output.shape == (N, E) and top_k < E:
                hint = ": gather those of the selected experts"
            else:
                hint = ""
            expect_shape(output, (len(x), top_k), f" (the {name}){hint}")
        return outputs

    x, gate = router_inputs()
    weights, experts = route(x, gate, K)
    if experts.dtype.is_floating_point and not weights.dtype.is_floating_point:
        raise Mistake("returns experts, weights: the two are swapped")
    expect_integers(experts, "expert indices")
    if (outside := (experts < 0) | (experts >= E)).any():
        raise Mistake(f"there is no expert {experts[outside][0]}: the indices are 0 to {E - 1}")
    expect_dtype(weights, x)
    x2 = x.clone()
    x2[0] = -x2[0]
    changed = ((route(x2, gate, K)[0] - weights).abs() > TOLERANCE).any(-1)
    changed[0] = False
    if changed.any():
        raise Mistake(
            f"the weights of token {first_index(changed)[0]} change with token 0: "
            "is the softmax over the tokens? Use dim=-1"
        )

    logits = x @ gate.T
    expected_weights, expected_experts, probs = moe.route(x, gate, K)
    expect_best_experts(experts, expected_experts)
    expect_router_weights(
        weights,
        expected_weights,
        logits.gather(-1, expected_experts),
        probs.gather(-1, expected_experts),
        expected_experts,
    )
    cases = {  # description: (number of tokens, top_k)
        "top_k = 1": (N, 1),
        f"top_k = E = {E}": (N, E),
        "one token": (1, K),
    }
    for when, (length, top_k) in cases.items():
        x, gate = router_inputs(length)
        weights, experts = route(x, gate, top_k, when=f"for {when}")
        expected_weights, expected_experts, _ = moe.route(x, gate, top_k)
        same_weights = (weights - expected_weights).abs().max() < TOLERANCE
        if not (experts.equal(expected_experts) and same_weights):
            raise Mistake(f"right in general, but wrong for {when}")
    x, gate = router_inputs()
    expect_gradients(
        lambda x, gate: route(x, gate, K)[0],
        lambda x, gate: moe.route(x, gate, K)[0],
        {"x": x, "gate": gate},
    )
    expect_router_precision(route)


def expect_best_experts(experts: Tensor, expected: Tensor) -> None:
    """Raise Mistake unless the selected experts (N, K) are the expected ones, best first."""
    if experts.equal(expected):
        return
    t = first_index(experts != expected)[0]
    row, best = experts[t].tolist(), expected[t].tolist()
    if experts.sort().values.equal(expected.sort().values):
        raise Mistake(
            f"the order is wrong: token {t} lists the experts {row}, best first is {best}"
        )
    raise Mistake(
        f"the selection is not the best: token {t} selects the experts {row}, "
        f"its highest scores are at {best}"
    )


def expect_router_weights(
    weights: Tensor, expected: Tensor, logits: Tensor, probs: Tensor, experts: Tensor
) -> None:
    """Raise Mistake unless the weights are right.

    All arguments are (N, K): `logits` and `probs` are those of the selected `experts`.
    """
    if (weights - expected).abs().max() < TOLERANCE:
        return
    for without_softmax in (logits, logits / logits.sum(-1, keepdim=True)):
        if (weights - without_softmax).abs().max() < TOLERANCE:
            raise Mistake(
                "there is no softmax: the weights are computed from the scores x @ gate.T, "
                f"such as {logits[0, 0]:.3f}"
            )
    if (weights - probs.softmax(-1)).abs().max() < TOLERANCE:
        raise Mistake(
            "the softmax is applied twice, to the probabilities too: "
            "divide them by their sum instead"
        )
    sums = weights.sum(-1)
    if ((sums - 1).abs() > TOLERANCE).any():
        t = (sums - 1).abs().argmax()
        raise Mistake(
            f"the weights of token {t} sum to {sums[t]:.2f}, not to 1: "
            "divide them by their sum over the selected experts"
        )
    t, k = first_index(~((weights - expected).abs() < TOLERANCE))
    weight, right = different_digits(weights[t, k], expected[t, k], 3)
    raise Mistake(f"token {t} gives expert {experts[t, k]} the weight {weight}, not {right}")


def expect_router_precision(route: Route) -> None:
    """Raise Mistake unless the router is right in fp32, on large scores and in bf16."""
    x, gate = (tensor.float() for tensor in router_inputs())
    expect_dtype(route(x, gate, K)[0], x)
    if not route(1000 * x, gate, K)[0].isfinite().all():
        raise Mistake(
            "overflows on large scores, because exp() of them is infinite; "
            "torch.softmax subtracts the largest score first"
        )
    x, gate = router_inputs(200)
    # Experts 0 and 1 get scores that are closer to each other than bf16 can resolve.
    gate[1] = gate[0]
    gate[1, 0] = gate[0, 0] + 0.0025
    x, gate = x.bfloat16(), (4 * gate).bfloat16()
    weights, experts = route(x, gate, K, when="for bf16")
    expected_weights, expected_experts, _ = moe.route(x.double(), gate.double(), K)
    if (differs := (experts != expected_experts).any(-1)).any():
        t = first_index(differs)[0]
        raise Mistake(
            f"in bf16, rounding decides the selection: token {t} gets the experts "
            f"{experts[t].tolist()}, exact scores give {expected_experts[t].tolist()}; "
            "convert x and gate to fp32 and compute the scores in fp32"
        )
    if not (weights - expected_weights).abs().max() < 0.01:
        raise Mistake("right in fp64, but the weights are wrong for bf16")


# ---- steps 2 and 3: run the experts --------------------------------------------------------------


def check_experts_loop(answer: Answer) -> None:
    """Check step 2."""
    expect_mixture(with_expected_shape(answer))
    expect_special_cases(with_expected_shape(answer))


def check_experts_sorted(answer: Answer) -> None:
    """Check step 3."""
    check_experts_loop(answer)
    expect_minimal_work(with_expected_shape(answer))


# ---- step 4: the load-balancing loss -------------------------------------------------------------


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two scalars agree within TOLERANCE. False if one of them is NaN."""
    return bool((a - b).abs() < TOLERANCE)


def check_load_balancing_loss(answer: Answer) -> None:
    """Check step 4."""
    experts = random_inputs()[2]
    probs, other_probs = (random_inputs(seed=seed)[0][:, :E].softmax(-1) for seed in (2, 3))

    def loss_of(probs: Tensor, experts: Tensor, when: str = "") -> Tensor:
        """Return the answer's loss, after a check of its shape."""
        loss = answer(probs, experts, when=when)
        if when:
            hint = f", {when}"
        elif loss.shape == (E,):
            hint = ": sum over the experts"
        else:
            hint = ""
        expect_shape(loss, (), hint)
        return loss

    loss = loss_of(probs, experts)
    expect_dtype(loss, probs)
    if close(loss, loss_of(other_probs, experts)):
        raise Mistake(
            "does not change with `probs`: the counts alone have no gradient, "
            "so the router would learn nothing"
        )
    if close(loss, loss_of(probs, (experts + 1) % E)):
        raise Mistake(
            "does not change with `experts`: count the selected experts, "
            "not those with the highest probabilities"
        )
    same_first_choices = torch.cat([experts[:, :1], (experts[:, :1] + 1) % E], dim=-1)
    if close(loss, loss_of(probs, same_first_choices)):
        raise Mistake("counts only the first choices (slot 0): count all N K assignments")
    explain_loss(loss, probs, experts)
    expect_gradients(
        lambda probs: loss_of(probs, experts),
        lambda probs: moe.load_balancing_loss(probs, experts),
        {"probs": probs},
    )
    certain = torch.eye(1, E, dtype=torch.float64).expand(N, E)
    cases = {
        "K = 1": (probs, experts[:, :1]),
        "an unused expert": (probs, random_inputs(unused=(1,))[2]),
        "an unused last expert": (probs, random_inputs(unused=(E - 1,))[2]),
        "one token": (probs[:1], experts[:1]),
        "all tokens with expert 0": (certain, torch.zeros(N, 1, dtype=torch.long)),
    }
    for when, inputs in cases.items():
        loss, expected = loss_of(*inputs, when=f"for {when}"), moe.load_balancing_loss(*inputs)
        if not close(loss, expected):
            given, right = different_digits(loss, expected)
            raise Mistake(f"right in general, but wrong for {when}: it gives {given}, not {right}")
    expect_dtype(loss_of(probs.float(), experts), probs.float())


def explain_loss(loss: Tensor, probs: Tensor, experts: Tensor) -> None:
    """Raise the mistake that leads to this loss, unless it is right."""
    expected = moe.load_balancing_loss(probs, experts)
    known_factors = {
        1 / E: f"the factor E = {E} is missing",
        K: f"the counts are divided by N = {N}, but there are N K = {N * K} assignments",
        K / E: "the counts are divided by N, not by N K, and the factor E is missing",
        N * K: "the counts are not divided by their number, N K",
        N * K / E: "the counts are not divided by their number, N K, and the factor E is missing",
        N: "the probabilities are summed over the tokens, not averaged",
        E: "the factor E appears twice",
        -1: "the sign is wrong: the loss falls as the load becomes uneven",
    }
    for factor, why in known_factors.items():
        if close(loss, factor * expected):
            raise Mistake(
                f"{factor:.3g} times what it should be, so {factor:.3g} for an even load: {why}"
            )
    fraction = torch.nn.functional.one_hot(experts, E).to(probs).mean(1)  # (N, E)
    if close(loss, E * (fraction * probs).mean(0).sum()):
        raise Mistake(
            "multiplies for each token, then averages: "
            "average the fractions and the probabilities over the tokens first"
        )
    if not close(loss, expected):
        given, right = different_digits(loss, expected)
        raise Mistake(f"gives {given} instead of {right}")


# ---- step 5: capacity ----------------------------------------------------------------------------


def check_capacity(answer: Answer) -> None:
    """Check step 5."""
    experts, capacity = random_inputs()[2], 3
    kept = answer(experts, E, capacity)
    expect_shape(kept, (N, K), ": one value for each assignment, in the shape of `experts`")
    if kept.dtype != torch.bool:
        raise Mistake(
            f"must be bool, and is {str(kept.dtype)[6:]}: "
            "is it the position, not yet compared with the capacity?"
        )
    expected = moe.within_capacity(experts, E, capacity)
    if not kept.equal(expected):
        explain_capacity(experts, kept, expected, capacity)
    cases = {
        "capacity = 0": (experts, 0),
        "capacity = 1": (experts, 1),
        "a capacity above N": (experts, N + 1),
        "K = 1": (experts[:, :1], capacity),
        "one token": (experts[:1], capacity),
        "unused experts": (random_inputs(unused=(1, E - 1))[2], capacity),
    }
    for when, (experts, capacity) in cases.items():
        kept = answer(experts, E, capacity, when=f"for {when}")
        expect_shape(kept, experts.shape, f", for {when}")
        if not kept.equal(moe.within_capacity(experts, E, capacity)):
            raise Mistake(f"right in general, but wrong for {when}")


def explain_capacity(experts: Tensor, kept: Tensor, expected: Tensor, capacity: int) -> None:
    """Raise the mistake that leads to `kept` (N, K) instead of `expected`."""

    def correct(
        experts: Tensor = experts, capacity: int = capacity, priority: str = "token"
    ) -> Tensor:
        return moe.within_capacity(experts, E, capacity, priority)

    t, k = first_index(kept != expected)
    here = f"token {t} in slot {k}, for expert {experts[t, k]},"
    kept_counts = count_assignments(experts.masked_fill(~kept, E), E)
    counts = count_assignments(experts, E)
    limit = f"the capacity is {capacity}"
    known_mistakes = [
        (~expected, "True and False are swapped: True means that the assignment is kept"),
        (
            correct(priority="slot"),
            f"all first choices come before any second choice: the position of {here} must depend "
            "on its token, not on its slot",
        ),
        (
            torch.cat([correct(column) for column in experts.split(1, dim=-1)], dim=-1),
            f"each slot is counted separately: expert {kept_counts.argmax()} keeps "
            f"{kept_counts.max()} in total, {limit}",
        ),
        (
            correct(capacity=capacity + 1),
            f"one too many: an expert keeps {capacity + 1}, {limit} (positions count from 0)",
        ),
        (
            correct(capacity=capacity - 1),
            f"one too few: an expert keeps {capacity - 1}, {limit} (positions count from 0)",
        ),
        (
            correct(experts.flip(0)).flip(0),
            f"the later tokens are kept: {here} comes before them",
        ),
        (
            (torch.arange(N * K) < capacity).view(N, K),
            "all experts share one capacity: each expert has its own",
        ),
        (
            expected.all(-1, keepdim=True).expand(N, K),
            f"if one assignment of a token is dropped, its others are dropped too: {here} fits",
        ),
    ]
    for hypothesis, why in known_mistakes:
        if kept.equal(hypothesis):
            raise Mistake(why)
    if (over := kept_counts > capacity).any():
        e = first_index(over)[0]
        raise Mistake(f"expert {e} keeps {kept_counts[e]} assignments, {limit}")
    if (under := kept_counts < counts.clamp(max=capacity)).any():
        e = first_index(under)[0]
        raise Mistake(
            f"expert {e} keeps {kept_counts[e]} of the {counts[e]} assignments to it, {limit}"
        )
    if kept[t, k]:
        raise Mistake(f"{here} is kept, but should not be")
    raise Mistake(f"{here} is not kept, but should be")


# ---- the first bonus: a selection bias -----------------------------------------------------------


def check_bias(answer: Answer) -> None:
    """Check the first bonus."""
    bias = random_inputs()[0][0, :7]
    # The mean is 6, and so is one load. The median is 4, the mean of the loads that are not 0 is 7,
    # the middle of the range 10: a load lies between each two of them, or is equal to one.
    load = torch.tensor([6, 0, 4, 7, 3, 2, 20])
    rate = 0.125  # a power of 2, so that it is exact in fp32 too
    new_bias = answer(bias, load, rate)
    expect_shape(new_bias, (7,))
    step = new_bias - bias
    distance = load.double().mean() - load
    expected = rate * distance.sign()
    if (step + expected).abs().max() < TOLERANCE:
        raise Mistake(
            "the sign is wrong: it lowers the bias of experts below the mean load, "
            "and raises that of experts above it"
        )
    if (step - (expected - bias)).abs().max() < TOLERANCE:
        raise Mistake("returns only the step: add it to the bias")
    c = (step * distance).sum() / distance.square().sum()
    if (step - c * distance).abs().max() < 1e-6 and c > TOLERANCE:
        raise Mistake("the step is longer for a load further from the mean: only the sign matters")
    for what, middle in known_middles(load).items():
        if (step - rate * (middle - load).sign()).abs().max() < TOLERANCE:
            raise Mistake(f"compares the loads with {what}, which is {middle:g}: the mean is 6")
    expect_bias_step(step, expected, load)
    # A mean that is no integer, with loads directly below and above it.
    load = torch.tensor([3, 1, 4, 2, 7, 2, 5])
    distance = load.double().mean() - load
    expect_bias_step(answer(bias, load, rate) - bias, rate * distance.sign(), load)
    single = answer(bias.float(), load, rate)
    expect_shape(single, (7,))
    expect_dtype(single, bias.float())
    if not (single - bias.float() - rate * distance.sign()).abs().max() < 1e-6:
        raise Mistake("in fp32 the bias changes by another amount than in fp64")


def known_middles(load: Tensor) -> dict[str, float]:
    """Return what a learner may take for the mean of the loads."""
    load = load.double()
    return {
        "their median": load.median().item(),
        "the middle of their range": (load.min() + load.max()).item() / 2,
        "the mean of the loads that are not 0": load[load > 0].mean().item(),
        "the largest load": load.max().item(),
        "the smallest load": load.min().item(),
        "1, as if loads were shares times E": 1.0,
    }


def expect_bias_step(step: Tensor, expected: Tensor, load: Tensor) -> None:
    if (wrong := ~((step - expected).abs() < TOLERANCE)).any():
        e = first_index(wrong)[0]
        given, right = different_digits(step[e], expected[e], 3)
        raise Mistake(
            f"expert {e} has the load {load[e]} and the mean is {load.double().mean():g}, so its "
            f"bias should change by {right}; here it changes by {given}"
        )


# ---- the second bonus: start from one MLP --------------------------------------------------------


def check_upcycle(answer: Answer) -> None:
    """Check the second bonus."""
    up, out = (experts[0] for experts in random_inputs()[3:])
    many_up, many_out = answer(up, out, E)
    if many_up.shape == (E, C, F) and many_out.shape == (E, F, C):
        raise Mistake("returns out, up: the two are swapped")
    for name, copies, one in (("up", many_up, up), ("out", many_out, out)):
        expect_shape(copies, (E, *one.shape), f" ({name})")
        expect_dtype(copies, one)
        c = (copies * one).sum() / (E * one.square().sum())
        if (copies - c * one).abs().max() < TOLERANCE < abs(c - 1):
            raise Mistake(
                f"each expert's {name} is {c:.3g} times the MLP's: "
                "a token's weights sum to 1, so no factor is needed"
            )
        if (wrong := ~((copies - one).abs().amax((1, 2)) < TOLERANCE)).any():
            raise Mistake(
                f"{name}[{first_index(wrong)[0]}] is not the MLP's {name}: "
                "each expert starts as a copy of it"
            )
        with torch.no_grad():  # they may be Parameters
            copies[0, 0, 0] += 1
        if copies[1, 0, 0] == copies[0, 0, 0]:
            raise Mistake(
                f"the experts share their memory: changing {name}[0] changes {name}[1] too "
                "(repeat copies, expand does not)"
            )
    many_up, many_out = answer(up, out, 1, when="for n_expert = 1")
    expect_shape(many_up, (1, F, C), ", for n_expert = 1")
    expect_shape(many_out, (1, C, F), ", for n_expert = 1")
    if not (many_up[0].equal(up) and many_out[0].equal(out)):
        raise Mistake("the only expert, for n_expert = 1, is not the MLP")


STEPS = [
    Step("route", check_route, returns=("weights", "experts")),
    Step("experts_loop", check_experts_loop),
    Step("experts_sorted", check_experts_sorted),
    Step("load_balancing_loss", check_load_balancing_loss),
    Step("within_capacity", check_capacity, mask=True),
    Step("update_bias", check_bias, optional=True),
    Step("upcycle", check_upcycle, optional=True, returns=("up", "out")),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
