"""The grader of lesson 04 diagnoses each wrong answer to steps 1 to 3.

Step 4 is in test_exercise_04_gradients.py.
"""

from pathlib import Path

import grade
import pytest
import steps_04
import torch

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_04.__file__).with_name("04_solutions.py"))
WRONG = WrongAnswers()
register_all = WRONG.register_all

# ---- step 1: ring_schedule -----------------------------------------------------------------------


def schedule(n, chunk, count=None):
    """Return the schedule in which process r sends chunk(r, s) in step s."""
    s = torch.arange(2 * (n - 1) if count is None else count)[:, None]
    return chunk(torch.arange(n), s) % n + 0 * s + torch.zeros(n, dtype=torch.long)


def repeated_schedule(n, chunk):
    """Return the same schedule for adding and for copying."""
    return torch.cat([schedule(n, chunk, n - 1)] * 2)


register_all(
    "ring_schedule",
    half=("after adding, the sums must be copied", lambda n: solutions.ring_schedule(n)[: n - 1]),
    too_long=(
        "n parts are together after n - 1 steps",
        lambda n: schedule(n, lambda r, s: r - s, 2 * n),
    ),
    to_itself_too=("not to itself too", lambda n: schedule(n, lambda r, s: r - s, n)),
    transposed=(
        "one row for each step, one column for each process",
        lambda n: solutions.ring_schedule(n).T,
    ),
    from_one=(
        "chunks are numbered 0 to 3: take the number modulo n",
        lambda n: solutions.ring_schedule(n) + 1,
    ),
    not_modulo=(
        "chunks are numbered 0 to 3: take the number modulo n",
        lambda n: torch.arange(n) - torch.arange(2 * n - 2)[:, None],
    ),
    floats=("numbers of chunks must be integers", lambda n: solutions.ring_schedule(n).float()),
    same_chunk=(
        "in step 0 all processes send chunk 0, so the other chunks are never collected",
        lambda n: schedule(n, lambda r, s: s),
    ),
    same_chunk_in_pairs=(
        "in step 0 several processes send chunk 0",
        lambda n: schedule(n, lambda r, s: r // 2 - s),
    ),
    opposite_order=(
        "process 0 sends chunk 1, but it has just received chunk 3",
        lambda n: schedule(n, lambda r, s: r + s),
    ),
    never_moves=(
        "process 0 sends chunk 0, but it has just received chunk 3",
        lambda n: schedule(n, lambda r, s: r),
    ),
    starts_over=(
        "in step 3, a copying step, process 0 sends chunk 0, which contains 1 of 4",
        lambda n: repeated_schedule(n, lambda r, s: r - s),
    ),
    one_behind=(
        "in step 3, a copying step, process 0 sends chunk 2, which contains 3 of 4",
        lambda n: torch.cat(
            [solutions.ring_schedule(n)[: n - 1], solutions.ring_schedule(n)[n - 2 : -1]]
        ),
    ),
    repeats_a_chunk=(
        "in step 4 process 0 sends chunk 1 to process 1, which has the complete",
        lambda n: torch.cat(
            [
                solutions.ring_schedule(n)[:n],
                solutions.ring_schedule(n)[n - 1 : n].repeat(max(0, n - 2), 1),
            ]
        )[: 2 * n - 2],
    ),
    only_four=("raises RuntimeError.*for n = 2", lambda n: solutions.ring_schedule(n).view(6, 4)),
    powers_of_two=(
        "it has just received.*for n = 8",
        lambda n: schedule(n, (lambda r, s: r - s) if n < 5 else (lambda r, s: r + 2 * s)),
    ),
    returns_a_list=("returns a list, not a tensor", lambda n: solutions.ring_schedule(n).tolist()),
)

# ---- step 2: tensor_parallel_mlp -----------------------------------------------------------------


def mlp(x, up, out):
    return (x @ up.T).relu().square() @ out.T


def squared_relu(h):
    return h.relu().square()


def partial_outputs(x, ups, outs, act=squared_relu):
    return torch.stack([act(x @ u.T) @ o.T for u, o in zip(ups, outs, strict=True)])


def split_matrices(up, out, n):
    return up.chunk(n), out.chunk(n, 1)


def masked_hidden_units(x, up, out, n):
    """Compute all hidden units, and set those of other processes to 0."""
    h, owner = (x @ up.T).relu().square(), torch.arange(len(up)) // (len(up) // n)
    return torch.stack([(h * (owner == r)) @ out.T for r in range(n)])


def without_last(x, up, out, n):
    y = solutions.tensor_parallel_mlp(x, up, out, n)
    return torch.cat([y[:-1], 0 * y[-1:]])


def shifted(x, up, out, n):
    """Return other terms with the correct sum."""
    y = solutions.tensor_parallel_mlp(x, up, out, n)
    return torch.cat([y[:1] + 1, y[1:2] - 1, y[2:]]) if n > 1 else y


def along_width(x, up, out, n):
    return torch.stack(
        [mlp(x[:, c], up[:, c], out) for c in torch.arange(x.size(1)).tensor_split(n)]
    )


register_all(
    "tensor_parallel_mlp",
    each_computes_all=("their sum is n times y", lambda x, u, o, n: mlp(x, u, o).expand(n, -1, -1)),
    each_divides_by_n=(
        "divides it by n: the work is not divided",
        lambda x, u, o, n: mlp(x, u, o).expand(n, -1, -1) / n,
    ),
    only_process_0=(
        "process 0 computes everything",
        lambda x, u, o, n: torch.cat([(y := mlp(x, u, o))[None], 0 * y.expand(n - 1, -1, -1)]),
    ),
    along_width=(r"split along C.*relu\(a\) \+ relu\(b\)", along_width),
    every_nth=(
        "takes every n-th hidden unit: process r",
        lambda x, u, o, n: partial_outputs(
            x, [u[r::n] for r in range(n)], [o[:, r::n] for r in range(n)]
        ),
    ),
    mixed=(
        "consecutive rows of `up` but every n-th column",
        lambda x, u, o, n: partial_outputs(x, u.chunk(n), [o[:, r::n] for r in range(n)]),
    ),
    wrong_columns=(
        "multiplies by the wrong columns",
        lambda x, u, o, n: partial_outputs(x, u.chunk(n), o.chunk(n, 1)[::-1]),
    ),
    reshaped_out=(
        "reshapes `out` \\(C, H\\) to \\(n, C, H / n\\)",
        lambda x, u, o, n: partial_outputs(x, u.chunk(n), o.reshape(n, len(o), -1)),
    ),
    reshaped_transpose=(
        "reshapes `out` \\(C, H\\) to \\(n, H / n, C\\)",
        lambda x, u, o, n: partial_outputs(x, u.chunk(n), o.reshape(n, -1, len(o)).mT),
    ),
    reversed=(
        "the parts are in reverse order",
        lambda x, u, o, n: solutions.tensor_parallel_mlp(x, u, o, n).flip(0),
    ),
    not_squared=(
        "the ReLU is not squared",
        lambda x, u, o, n: partial_outputs(x, *split_matrices(u, o, n), torch.relu),
    ),
    no_relu=(
        "squared, but there is no ReLU",
        lambda x, u, o, n: partial_outputs(x, *split_matrices(u, o, n), torch.square),
    ),
    linear=(
        "no ReLU and no square",
        lambda x, u, o, n: partial_outputs(x, *split_matrices(u, o, n), lambda h: h),
    ),
    mean=("each part is divided by n", lambda *a: solutions.tensor_parallel_mlp(*a) / a[3]),
    summed_for_all=(
        "their sum is n times y",
        lambda *a: solutions.tensor_parallel_mlp(*a).sum(0).expand(a[3], -1, -1),
    ),
    summed=(
        "that is their sum; return its n terms",
        lambda *a: solutions.tensor_parallel_mlp(*a).sum(0),
    ),
    concatenated=("use stack, not cat", lambda *a: solutions.tensor_parallel_mlp(*a).flatten(0, 1)),
    side_by_side=(
        "use stack, not cat",
        lambda *a: solutions.tensor_parallel_mlp(*a).transpose(0, 1).flatten(1),
    ),
    processes_not_first=(
        "the processes must be the first dimension",
        lambda *a: solutions.tensor_parallel_mlp(*a).transpose(0, 1),
    ),
    hidden=(
        "multiply the hidden units by the columns",
        lambda x, u, o, n: torch.stack([(x @ p.T).relu().square() for p in u.chunk(n)]),
    ),
    rows_of_out=(
        r"raises RuntimeError.*Hidden units are the rows of `up` \(H, C\) and the columns",
        lambda x, u, o, n: torch.stack(
            [mlp(x, p, q) for p, q in zip(u.chunk(n), o.chunk(n), strict=False)]
        ),
    ),
    columns_of_up=(
        r"raises RuntimeError.*Hidden units are the rows of `up` \(H, C\) and the columns",
        lambda x, u, o, n: torch.stack([mlp(x, p, o) for p in u.chunk(n, 1)]),
    ),
    other_terms=("the sum is y, but its terms are not", shifted),
    masked=("right, but it does 2.5 times the work of one process", masked_hidden_units),
    without_last=("differs from y by up to", without_last),
    wrong_for_n_1=(
        "wrong for n = 1",
        lambda x, u, o, n: solutions.tensor_parallel_mlp(x, u, o, n) * (n > 1),
    ),
    wrong_for_n_h=(
        "wrong for n = H",
        lambda x, u, o, n: solutions.tensor_parallel_mlp(x, u, o, n) * (n < 12),
    ),
    wrong_for_one_token=(
        "wrong for one token",
        lambda x, u, o, n: solutions.tensor_parallel_mlp(x, u, o, n) * (len(x) > 1),
    ),
    detached=(
        "no gradient reaches up",
        lambda x, u, o, n: solutions.tensor_parallel_mlp(x, u.detach(), o, n),
    ),
    returns_float32=(
        "turns float64 into float32",
        lambda *a: solutions.tensor_parallel_mlp(*a).float(),
    ),
    returns_a_list=(
        "returns a list, not a tensor",
        lambda *a: list(solutions.tensor_parallel_mlp(*a)),
    ),
    in_place=(
        "argument number 2 in place",
        lambda x, u, o, n: solutions.tensor_parallel_mlp(x, u.mul_(2), o, n),
    ),
)

# ---- step 3: dispatch_order ----------------------------------------------------------------------


def replace_order(make):
    """Return the correct answer with another order, make(flat experts, experts, E, n)."""

    def answer(experts, E, n):
        _, send_counts = solutions.dispatch_order(experts, E, n)
        return make(experts.flatten(), experts, E, n), send_counts

    return answer


def replace_counts(make):
    """Return the correct answer with other counts, make(flat experts, E / n, experts, n)."""

    def answer(experts, E, n):
        order, _ = solutions.dispatch_order(experts, E, n)
        return order, make(experts.flatten(), E // n, experts, n)

    return answer


def unstable(flat, *_):
    """Sort by expert, and the tokens of each expert in reverse order."""
    return (flat * len(flat) + torch.arange(len(flat)).flip(0)).argsort()


def unstable_if_many(flat, *_):
    return unstable(flat) if len(flat) > 100 else flat.argsort(stable=True)


def missing_assignment(flat, *_):
    order = flat.argsort(stable=True)
    return torch.cat([order[:1], order[:-1]])


def swapped_ends(flat, *_):
    order = flat.argsort(stable=True)
    return torch.cat([order[-1:], order[1:-1], order[:1]]) if len(order) > 1 else order


def by_slot(flat, experts, *_):
    N, _ = experts.shape
    return experts.T.flatten().argsort(stable=True) if N else flat.argsort()


def choice_first(flat, experts, *_):
    N, K = experts.shape
    token, slot = torch.arange(N * K) // max(K, 1), torch.arange(N * K) % max(K, 1)
    return (flat * K * N + slot * N + token).argsort()


TOKENS = "order holds the numbers of tokens"
register_all(
    "dispatch_order",
    tokens=(TOKENS, replace_order(lambda flat, e, E, n: flat.argsort(stable=True) // e.size(1))),
    values=("order holds the sorted experts", replace_order(lambda flat, *_: flat.sort().values)),
    inverse=(
        "order holds the position of each assignment",
        replace_order(lambda flat, *_: flat.argsort(stable=True).argsort()),
    ),
    unsorted=(
        "is the order of the tokens: sort by expert",
        replace_order(lambda flat, *_: torch.arange(len(flat))),
    ),
    descending=(
        "begins with the last expert",
        replace_order(lambda flat, *_: flat.argsort(descending=True, stable=True)),
    ),
    by_slot=("takes assignment k N", replace_order(by_slot)),
    by_owner=(
        "sorts only by owner",
        replace_order(lambda flat, e, E, n: (flat // (E // n)).argsort(stable=True)),
    ),
    round_robin=(
        "order distributes the experts round-robin",
        replace_order(lambda flat, e, E, n: (flat % n * E + flat).argsort(stable=True)),
    ),
    choice_first=("by choice, then by token", replace_order(choice_first)),
    unstable=("in the order of their tokens: sort with stable=True$", replace_order(unstable)),
    unstable_if_many=(
        "in the order of their tokens for 200 tokens: sort with stable",
        replace_order(unstable_if_many),
    ),
    missing_assignment=(
        r"assignments once, and number \d+ is missing",
        replace_order(missing_assignment),
    ),
    ends_swapped=("order: at position 0 is assignment", replace_order(swapped_ends)),
    not_flat=(
        "return one list of all assignments",
        replace_order(lambda flat, e, *_: e.argsort(0)),
    ),
    float_order=(
        "order must be integers",
        replace_order(lambda flat, *_: flat.argsort(stable=True).double()),
    ),
    counts_by_expert=(
        "sum over the experts of each process",
        replace_counts(lambda flat, per_owner, *_: flat.bincount(minlength=8)),
    ),
    counts_round_robin=(
        "send_counts counts experts e % n",
        replace_counts(lambda flat, per_owner, e, n: (flat % n).bincount(minlength=n)),
    ),
    tokens_once=(
        "counts a token once per process",
        replace_counts(
            lambda flat, per_owner, e, n: torch.stack(
                [(e // per_owner == r).any(-1).sum() for r in range(n)]
            )
        ),
    ),
    first_choice=(
        "counts only first choices",
        replace_counts(lambda flat, per_owner, e, n: (e[:, 0] // per_owner).bincount(minlength=n)),
    ),
    ends=(
        "not where they end",
        replace_counts(
            lambda flat, per_owner, e, n: (flat // per_owner).bincount(minlength=n).cumsum(0)
        ),
    ),
    begins=(
        "not where they begin",
        replace_counts(lambda f, h, e, n: (c := (f // h).bincount(minlength=n)).cumsum(0) - c),
    ),
    experts_in_use=(
        "counts the experts that get rows",
        replace_counts(
            lambda f, per_owner, e, n: (f.bincount(minlength=n * per_owner).view(n, -1) > 0).sum(-1)
        ),
    ),
    counts_reversed=(
        "send_counts is in reverse order",
        replace_counts(lambda f, per_owner, e, n: (f // per_owner).bincount(minlength=n).flip(0)),
    ),
    half_the_counts=(
        r"send_counts is \[\d",
        replace_counts(lambda f, per_owner, e, n: (f // per_owner).bincount(minlength=n) // 2),
    ),
    no_minlength=(
        "one number for each process, 0 for one that receives nothing",
        replace_counts(lambda f, per_owner, e, n: (f // per_owner).bincount()),
    ),
    float_sent=(
        "send_counts must be integers",
        replace_counts(lambda f, per_owner, e, n: (f // per_owner).bincount(minlength=n).double()),
    ),
    wrong_for_one_choice=(
        r"send_counts: right in general, but \[.*for one choice",
        replace_counts(
            lambda f, per_owner, e, n: (f // per_owner).bincount(minlength=n) * (e.size(1) > 1)
        ),
    ),
    fixed_number_of_processes=(
        "raises RuntimeError.*for one process",
        lambda e, E, n: (
            solutions.dispatch_order(e, E, 4)[0],
            solutions.dispatch_order(e, E, 4)[1].view(n),
        ),
    ),
    returns_one_tensor=(
        "returns a Tensor, not the 2 tensors order, send_counts",
        lambda *a: solutions.dispatch_order(*a)[0],
    ),
    returns_a_list=(
        "returns a list as its send_counts, not a tensor",
        replace_counts(lambda f, per_owner, e, n: (f // per_owner).bincount(minlength=n).tolist()),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_04.STEPS, step, message, function)
