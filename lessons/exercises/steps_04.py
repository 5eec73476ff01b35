"""The steps of lesson 04, each with its tests. check_04.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_04.py FILE

The grader finds mistakes by experiments on the functions, never by reading their source. The
experiments of steps 1 and 2 are in probe_scaling.py.
"""

import sys

import torch
from grade import (
    TOLERANCE,
    Answer,
    Mistake,
    Step,
    different_digits,
    expect_dtype,
    expect_integers,
    expect_shape,
    first_index,
    is_close,
    main,
    random,
)
from probe_scaling import examine_ring, examine_tensor_parallel_mlp
from torch import Tensor

KnownMistakes = dict[str, Tensor]  # what a mistake returns, by message


def raise_known_mistake(result: Tensor, known_mistakes: KnownMistakes, name: str) -> None:
    """Raise the Mistake whose value is `result`, if there is one. `name` precedes its message."""
    for message, value in known_mistakes.items():
        if is_close(result, value):
            raise Mistake(f"{name} {message}")


# ---- step 3: rows sorted for the owners of their experts -----------------------------------------

N, K, E, P = 12, 2, 8, 4  # tokens, choices, experts, processes
OUTPUTS = ("order", "send_counts")


def random_choices(N: int = N, K: int = K, n_expert: int = E, seed: int = 6) -> Tensor:
    """Return experts (N, K) below `n_expert`. No token chooses one twice."""
    return random(N, n_expert, seed=seed).argsort(dim=-1)[:, :K]


def reference_order(experts: Tensor) -> Tensor:
    return experts.flatten().argsort(stable=True)


def reference_send_counts(experts: Tensor, n_expert: int, n: int) -> Tensor:
    return experts.flatten().bincount(minlength=n_expert).view(n, -1).sum(-1)


def check_dispatch(answer: Answer) -> None:
    def dispatch(experts: Tensor, n_expert: int, n: int, when: str = "") -> tuple[Tensor, Tensor]:
        """Call the answer, check the shapes and dtypes of its results and return them."""
        order, send_counts = answer(experts, n_expert, n, when=when)
        expect_dispatch_shapes(order, send_counts, experts, n_expert, n, when)
        expect_integers(order, "order")
        expect_integers(send_counts, "send_counts")
        return order, send_counts

    experts = random_choices()
    order, send_counts = dispatch(experts, E, P)
    expect_order(order, experts)
    expect_send_counts(send_counts, experts)
    cases = {
        "where nothing goes to the last process": (random_choices(n_expert=E - 2), E, P),
        "where all rows go to process 0": (random_choices(n_expert=2), E, P),
        "for one choice per token": (random_choices(K=1), E, P),
        "for one process": (experts, E, 1),
        "for one process per expert": (experts, E, E),
        "for one token": (random_choices(N=1), E, P),
        "without tokens": (random_choices(N=0), E, P),
        # A sort that is not stable may keep the order of a few tokens.
        "for 200 tokens": (random_choices(N=200), E, P),
    }
    for when, (experts, n_expert, n) in cases.items():
        order, send_counts = dispatch(experts, n_expert, n, when=when)
        if not order.equal(reference_order(experts)):
            if experts.flatten()[order].equal(experts.flatten().sort().values):
                raise Mistake(
                    "order: the rows of an expert are not in the order of their tokens "
                    f"{when}: sort with stable=True"
                )
            raise Mistake(f"order: right in general, but wrong {when}")
        if not send_counts.equal(reference_send_counts(experts, n_expert, n)):
            raise Mistake(f"send_counts: right in general, but {send_counts.tolist()[:8]} {when}")


def expect_dispatch_shapes(
    order: Tensor, send_counts: Tensor, experts: Tensor, n_expert: int, n: int, when: str
) -> None:
    hint = ""
    if tuple(order.shape) == tuple(experts.shape):
        hint = ": return one list of all assignments, flatten()"
    expect_shape(order, (experts.numel(),), f" (order){f', {when}' if when else hint}")
    hint = f", {when}" if when else ""
    if send_counts.ndim == 1 and len(send_counts) < n:
        hint += ": one number for each process, 0 for one that receives nothing"
    elif tuple(send_counts.shape) == (n_expert,) and n != n_expert:
        hint += ": sum over the experts of each process"
    expect_shape(send_counts, (n,), f" (send_counts){hint}")


def known_orders(experts: Tensor) -> KnownMistakes:
    flat, per_process = experts.flatten(), E // P
    expected = reference_order(experts)
    token, slot = torch.arange(N * K) // K, torch.arange(N * K) % K
    return {
        "holds the numbers of tokens: assignment t K + k is choice k of token t, so that "
        "x[order // K] finds its row": expected // K,
        "holds the sorted experts: return which assignment stands at each position, argsort()": (
            flat[expected]
        ),
        "holds the position of each assignment: return the inverse, the assignment at each "
        "position": expected.argsort(),
        "is the order of the tokens: sort by expert": torch.arange(N * K),
        "begins with the last expert": flat.argsort(stable=True, descending=True),
        "takes assignment k N + t for choice k of token t, which is t K + k: flatten (N, K), not "
        "its transpose": experts.T.flatten().argsort(stable=True),
        "sorts only by owner: sort the rows of each owner by expert": (
            (flat // per_process).argsort(stable=True)
        ),
        "distributes the experts round-robin, e % n: process r owns n_expert / n consecutive "
        "experts": (flat % P * E + flat).argsort(stable=True),
        "sorts the rows of an expert by choice, then by token: sort them only by token": (
            (flat * K * N + slot * N + token).argsort()
        ),
    }


def expect_order(order: Tensor, experts: Tensor) -> None:
    flat, expected = experts.flatten(), reference_order(experts)
    if order.equal(expected):
        return
    raise_known_mistake(order, known_orders(experts), "order")
    if not order.sort().values.equal(torch.arange(N * K)):
        missing = sorted(set(range(N * K)) - set(order.tolist()))
        raise Mistake(
            f"order: it must contain each of the {N * K} assignments once, and number {missing[0]} "
            "is missing"
        )
    if flat[order].equal(flat[expected]):
        raise Mistake(
            "order: the rows of an expert are not in the order of their tokens: sort with "
            "stable=True"
        )
    i = first_index(order != expected)[0]
    raise Mistake(
        f"order: at position {i} is assignment {order[i]} (expert {flat[order[i]]}), "
        f"not {expected[i]} (expert {flat[expected[i]]})"
    )


def known_send_counts(experts: Tensor) -> KnownMistakes:
    flat, expected = experts.flatten(), reference_send_counts(experts, E, P)
    owners = experts // (E // P)  # (N, K)
    return {
        "counts experts e % n: process r owns n_expert / n consecutive experts, e // (n_expert / "
        "n)": (flat % P).bincount(minlength=P),
        "counts a token once per process: two choices owned by one process are two rows": (
            torch.stack([(owners == r).any(-1).sum() for r in range(P)])
        ),
        "counts only first choices: each token has K rows": owners[:, 0].bincount(minlength=P),
        "is a cumulative sum: return how many rows each process gets, not where they end": (
            expected.cumsum(0)
        ),
        "is a cumulative sum: return how many rows each process gets, not where they begin": (
            expected.cumsum(0) - expected
        ),
        "counts the experts that get rows: count the rows": (
            (flat.bincount(minlength=E).view(P, -1) > 0).sum(-1)
        ),
        "is in reverse order: the first number belongs to process 0": expected.flip(0),
    }


def expect_send_counts(send_counts: Tensor, experts: Tensor) -> None:
    expected = reference_send_counts(experts, E, P)
    if send_counts.equal(expected):
        return
    raise_known_mistake(send_counts, known_send_counts(experts), "send_counts")
    raise Mistake(f"send_counts is {send_counts.tolist()}, but {expected.tolist()} is correct")


# ---- step 4: gradients of the whole batch --------------------------------------------------------

W, G = 6, 2  # processes, processes of a group
S, X = 5, 7  # shared weights, weights of the experts of one process


def reference_gradients(shared: Tensor, experts: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return shared.mean(0).expand_as(shared), sum_over_replicas(experts, group_size) / len(shared)


def sum_over_replicas(x: Tensor, group_size: int) -> Tensor:
    """Sum over the processes with the same position in their groups. Return (W, X)."""
    W = len(x)
    return x.view(W // group_size, group_size, -1).sum(0).repeat(W // group_size, 1)


def sum_over_group(x: Tensor, group_size: int) -> Tensor:
    """Sum over the processes of each group. Return (W, X)."""
    W = len(x)
    return x.view(W // group_size, group_size, -1).sum(1).repeat_interleave(group_size, 0)


def check_gradients(answer: Answer) -> None:
    def gradients(
        shared: Tensor, experts: Tensor, group_size: int, when: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Call the answer, check the shapes and dtypes of its results and return them."""
        results = answer(shared, experts, group_size, when=when)
        for result, x, name in zip(results, (shared, experts), ("shared", "experts"), strict=True):
            hint = f", {when}" if when else ""
            one_row_for_many = (tuple(x.shape[1:]), (1, x.shape[1]), (group_size, x.shape[1]))
            if not when and tuple(result.shape) in one_row_for_many and len(x) > group_size:
                hint = ": return a row for each process, even if rows are equal"
            expect_shape(result, tuple(x.shape), f" ({name}){hint}")
            expect_dtype(result, x)
        return results

    shared, experts = random(W, S), random(W, X, seed=2)
    results = gradients(shared, experts, G)
    expected = reference_gradients(shared, experts, G)
    if not is_close(results[0], expected[0]):
        raise_known_mistake(results[0], known_shared_gradients(shared), "shared")
        raise_different_element(results[0], expected[0], "shared", f", the mean over all {W},")
    if not is_close(results[1], expected[1]):
        raise_known_mistake(results[1], known_expert_gradients(experts), "experts")
        raise_different_element(results[1], expected[1], "experts")
    cases = {
        "for groups of one, which replicate everything": (shared, experts, 1),
        "for one group, which does not replicate experts": (shared, experts, W),
        "for two groups of three": (shared, experts, 3),
        "for one process": (shared[:1], experts[:1], 1),
    }
    for when, case in cases.items():
        results, expected = gradients(*case, when=when), reference_gradients(*case)
        for result, value, name in zip(results, expected, ("shared", "experts"), strict=True):
            if not is_close(result, value):
                raise Mistake(f"{name}: right for {W} processes in groups of {G}, but wrong {when}")
    case = shared.float(), experts.float(), G
    results, expected = gradients(*case, when="in fp32"), reference_gradients(*case)
    for result, value in zip(results, expected, strict=True):
        if not (result - value).abs().max() < 1e-5:
            raise Mistake("right in fp64, but wrong in fp32")


def raise_different_element(result: Tensor, expected: Tensor, name: str, what: str = "") -> None:
    """Raise a Mistake with the first element that differs."""
    w, i = first_index(~((result - expected).abs() < TOLERANCE))
    given, right = different_digits(result[w, i], expected[w, i])
    raise Mistake(f"{name}[{w}, {i}], of process {w}, is {given}, but {right}{what} is correct")


def known_shared_gradients(x: Tensor) -> KnownMistakes:
    """Return wrong gradients of the shared weights, by message."""
    total = x.sum(0).expand_as(x)
    return {
        "is unchanged: each process would take a different step, and the replicas would diverge": x,
        "is the sum: the loss of the batch is the *mean* of W losses": total,
        "is averaged within each group only: all processes have these weights": (
            sum_over_group(x, G) / G
        ),
        "is summed within each group only, and divided by W: all processes have these weights": (
            sum_over_group(x, G) / W
        ),
        "is averaged over the replicas of the experts only: all processes have these weights": (
            sum_over_replicas(x, G) / (W // G)
        ),
        "is summed as the experts are: all processes have these weights, not only every "
        "group_size-th": sum_over_replicas(x, G) / W,
        "is divided by the size of a group: the loss is a mean over all W": total / G,
        "is divided by the number of groups: the loss is a mean over all W": total / (W // G),
        "is divided by W but not summed": x / W,
    }


def known_expert_gradients(x: Tensor) -> KnownMistakes:
    """Return wrong gradients of the experts, by message."""
    replicas, total = sum_over_replicas(x, G), x.sum(0).expand_as(x)
    return {
        "are divided by the number of replicas, the classic mistake: an owner's gradient is that "
        "of the sum of its group's losses, and the loss is the mean of all W. They become "
        "`group_size` times too large": replicas / (W // G),
        "are divided by the size of a group: the loss is a mean over all W": replicas / G,
        "are summed over their replicas, and not divided: the loss is the mean of W losses": (
            replicas
        ),
        "are averaged over all, as shared weights are: but the processes of a group own "
        "*different* experts": total / W,
        "are summed over all: but the processes of a group own *different* experts": total,
        "are summed within each group, whose processes own *different* experts: sum over w, "
        "w + group_size, w + 2 group_size, ...": sum_over_group(x, G) / W,
        "are averaged within each group, whose processes own *different* experts: sum over w, "
        "w + group_size, ...": sum_over_group(x, G) / G,
        "are unchanged: replicas in other groups processed other tokens, so sum over them and "
        "divide by W": x,
        "are divided by W, but not summed over the replicas in other groups, which processed other "
        "tokens": x / W,
        "are divided by the size of a group, and not summed over their replicas": x / G,
        "are summed over the wrong replicas: w and w + group_size own the same experts, not "
        "neighbours in blocks of W / group_size": sum_over_group(x, W // G) / W,
        "are summed over neighbours in blocks of W / group_size: w and w + group_size own the same "
        "experts": x.view(G, W // G, -1).sum(1).repeat(W // G, 1) / W,
        "are in the wrong rows: rows w and w + group_size are equal, so repeat the sums of a whole "
        "group, not each sum": replicas[:G].repeat_interleave(W // G, 0) / W,
    }


STEPS = [
    Step("ring_schedule", examine_ring),
    Step("tensor_parallel_mlp", examine_tensor_parallel_mlp),
    Step("dispatch_order", check_dispatch, returns=OUTPUTS),
    Step("average_gradients", check_gradients, returns=("shared", "experts")),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
