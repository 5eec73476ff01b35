"""The grader of lesson 04 finds in each wrong answer the mistake that is in it."""

from pathlib import Path

import check_04
import grade
import pytest
import torch

from tests.lessons.wrong_answers import WrongAnswers

right = grade.load_file(Path(check_04.__file__).with_name("04_solutions.py"))
WRONG = WrongAnswers()
wrongs = WRONG.register_all

# ---- step 1 ------------------------------------------------------------------------------------------------------------------


def steps(n, chunk, count=None):
    """chunk(r, s) for all of a timetable."""
    s = torch.arange(2 * (n - 1) if count is None else count)[:, None]
    return chunk(torch.arange(n), s) % n + 0 * s + torch.zeros(n, dtype=torch.long)


def twice(n, chunk):
    """The same for adding and for copying."""
    return torch.cat([steps(n, chunk, n - 1)] * 2)


wrongs(
    "ring",
    half=("after adding, what is done has to be copied on", lambda n: right.ring(n)[: n - 1]),
    too_long=(
        "n parts are together after n - 1 steps",
        lambda n: steps(n, lambda r, s: r - s, 2 * n),
    ),
    to_itself_too=("not to itself too", lambda n: steps(n, lambda r, s: r - s, n)),
    transposed=("a row for each step, a column for each process", lambda n: right.ring(n).T),
    from_one=("they are 0 to 3: take the number modulo n", lambda n: right.ring(n) + 1),
    not_modulo=(
        "they are 0 to 3: take the number modulo n",
        lambda n: torch.arange(n) - torch.arange(2 * n - 2)[:, None],
    ),
    floats=("numbers of chunks must be integers", lambda n: right.ring(n).float()),
    same_chunk=(
        "in step 0 all send chunk 0: then nobody collects",
        lambda n: steps(n, lambda r, s: s),
    ),
    pairs=("in step 0 several processes send chunk 0", lambda n: steps(n, lambda r, s: r // 2 - s)),
    forward=(
        "process 0 sends chunk 1, and chunk 3 has just come to it",
        lambda n: steps(n, lambda r, s: r + s),
    ),
    rests=(
        "process 0 sends chunk 0, and chunk 3 has just come to it",
        lambda n: steps(n, lambda r, s: r),
    ),
    starts_again=(
        "in step 3, a step of copying, process 0 sends chunk 0, in which 1 of 4",
        lambda n: twice(n, lambda r, s: r - s),
    ),
    one_behind=(
        "in step 3, a step of copying, process 0 sends chunk 2, in which 3 of 4",
        lambda n: torch.cat([right.ring(n)[: n - 1], right.ring(n)[n - 2 : -1]]),
    ),
    own_again=(
        "in step 4 process 0 sends chunk 1 to process 1, which has the whole",
        lambda n: torch.cat([right.ring(n)[:n], right.ring(n)[n - 1 : n].repeat(max(0, n - 2), 1)])[
            : 2 * n - 2
        ],
    ),
    four_alone=("raises RuntimeError.*for n = 2", lambda n: right.ring(n).view(6, 4)),
    powers_of_two=(
        "has just come to it.*for n = 8",
        lambda n: steps(n, (lambda r, s: r - s) if n < 5 else (lambda r, s: r + 2 * s)),
    ),
    a_list=("returns a list, not a tensor", lambda n: right.ring(n).tolist()),
)

# ---- step 2 ------------------------------------------------------------------------------------------------------------------


def mlp(x, up, out):
    return (x @ up.T).relu().square() @ out.T


def pairs(x, ups, outs, act=lambda h: h.relu().square()):
    return torch.stack([act(x @ u.T) @ o.T for u, o in zip(ups, outs, strict=True)])


def cut(up, out, n, act=None):
    return up.chunk(n), out.chunk(n, 1)


def masked(x, up, out, n):
    """Everything, of which all but an own part is set to 0."""
    h, owner = (x @ up.T).relu().square(), torch.arange(len(up)) // (len(up) // n)
    return torch.stack([(h * (owner == r)) @ out.T for r in range(n)])


def without_last(x, up, out, n):
    y = right.in_parts(x, up, out, n)
    return torch.cat([y[:-1], 0 * y[-1:]])


def shifted(x, up, out, n):
    """The right sum of other terms."""
    y = right.in_parts(x, up, out, n)
    return torch.cat([y[:1] + 1, y[1:2] - 1, y[2:]]) if n > 1 else y


def along_width(x, up, out, n):
    return torch.stack(
        [mlp(x[:, c], up[:, c], out) for c in torch.arange(x.size(1)).tensor_split(n)]
    )


wrongs(
    "in_parts",
    each_whole=("their sum is n times y", lambda x, u, o, n: mlp(x, u, o).expand(n, -1, -1)),
    each_share=(
        "divides it by n: nothing is shared out",
        lambda x, u, o, n: mlp(x, u, o).expand(n, -1, -1) / n,
    ),
    first_alone=(
        "process 0 computes everything",
        lambda x, u, o, n: torch.cat([(y := mlp(x, u, o))[None], 0 * y.expand(n - 1, -1, -1)]),
    ),
    along_width=(r"split along C.*relu\(a\) \+ relu\(b\)", along_width),
    every_nth=(
        "takes every n-th hidden number: process r",
        lambda x, u, o, n: pairs(x, [u[r::n] for r in range(n)], [o[:, r::n] for r in range(n)]),
    ),
    mixed=(
        "in blocks and columns of `out` at every",
        lambda x, u, o, n: pairs(x, u.chunk(n), [o[:, r::n] for r in range(n)]),
    ),
    wrong_partner=(
        "goes with the wrong columns",
        lambda x, u, o, n: pairs(x, u.chunk(n), o.chunk(n, 1)[::-1]),
    ),
    turned=(
        "the parts are in the wrong order",
        lambda x, u, o, n: right.in_parts(x, u, o, n).flip(0),
    ),
    not_squared=("the ReLU is not squared", lambda x, u, o, n: pairs(x, *cut(u, o, n), torch.relu)),
    no_relu=(
        "squared, but there is no ReLU",
        lambda x, u, o, n: pairs(x, *cut(u, o, n), torch.square),
    ),
    linear=("no ReLU, and no square", lambda x, u, o, n: pairs(x, *cut(u, o, n), lambda h: h)),
    mean=("each part is divided by n", lambda *a: right.in_parts(*a) / a[3]),
    summed_for_all=(
        "their sum is n times y",
        lambda *a: right.in_parts(*a).sum(0).expand(a[3], -1, -1),
    ),
    summed=("that is their sum; return the n terms", lambda *a: right.in_parts(*a).sum(0)),
    concatenated=("stack, where you concatenate", lambda *a: right.in_parts(*a).flatten(0, 1)),
    side_by_side=(
        "stack, where you concatenate",
        lambda *a: right.in_parts(*a).transpose(0, 1).flatten(1),
    ),
    last=("the processes come first", lambda *a: right.in_parts(*a).transpose(0, 1)),
    hidden=(
        "have still to be multiplied by the columns",
        lambda x, u, o, n: torch.stack([(x @ p.T).relu().square() for p in u.chunk(n)]),
    ),
    rows_of_out=(
        r"raises RuntimeError.*Hidden numbers are the rows of `up` \(H, C\), and the columns",
        lambda x, u, o, n: torch.stack(
            [mlp(x, p, q) for p, q in zip(u.chunk(n), o.chunk(n), strict=False)]
        ),
    ),
    columns_of_up=(
        r"raises RuntimeError.*Hidden numbers are the rows of `up` \(H, C\), and the columns",
        lambda x, u, o, n: torch.stack([mlp(x, p, o) for p in u.chunk(n, 1)]),
    ),
    other_terms=("the sum is y, but its terms are not", shifted),
    masked=("right, but 2.5 times the work of one process", masked),
    without_last=("differs from y by up to", without_last),
    four_alone=("wrong for n = 1", lambda x, u, o, n: right.in_parts(x, u, o, n) * (n > 1)),
    for_h=("wrong for n = H", lambda x, u, o, n: right.in_parts(x, u, o, n) * (n < 12)),
    one_token=("wrong for one token", lambda x, u, o, n: right.in_parts(x, u, o, n) * (len(x) > 1)),
    detached=("no gradient reaches up", lambda x, u, o, n: right.in_parts(x, u.detach(), o, n)),
    always_float=("turns float64 into float32", lambda *a: right.in_parts(*a).float()),
    a_list=("returns a list, not a tensor", lambda *a: list(right.in_parts(*a))),
    in_place=("argument number 2 in place", lambda x, u, o, n: right.in_parts(x, u.mul_(2), o, n)),
)

# ---- step 3 ------------------------------------------------------------------------------------------------------------------


def packed(experts, E, n, order=None, sent=None):
    """The right answer with one of its parts replaced, or both."""
    first, second = right.pack(experts, E, n)
    flat = experts.flatten()
    return first if order is None else order(flat, experts), second if sent is None else sent(
        flat, E // n
    )


def order(make):
    return lambda experts, E, n: packed(experts, E, n, order=lambda flat, e: make(flat, e, E, n))


def sent(make):
    return lambda experts, E, n: packed(
        experts, E, n, sent=lambda flat, here: make(flat, here, experts, n)
    )


def unstable(flat, *_):
    """Experts in order, and the tokens of each backwards."""
    return (flat * len(flat) + torch.arange(len(flat)).flip(0)).argsort()


def unstable_if_many(flat, *_):
    return unstable(flat) if len(flat) > 100 else flat.argsort(stable=True)


def lost_one(flat, *_):
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
wrongs(
    "pack",
    tokens=(TOKENS, order(lambda flat, e, E, n: flat.argsort(stable=True) // e.size(1))),
    values=("order holds the experts, sorted", order(lambda flat, *_: flat.sort().values)),
    inverse=(
        "says where each assignment goes",
        order(lambda flat, *_: flat.argsort(stable=True).argsort()),
    ),
    unsorted=(
        "is the order of the tokens, as they are",
        order(lambda flat, *_: torch.arange(len(flat))),
    ),
    descending=(
        "begins with the last expert",
        order(lambda flat, *_: flat.argsort(descending=True, stable=True)),
    ),
    by_slot=("takes assignment k N", order(by_slot)),
    by_owner=(
        "sorts by owner alone",
        order(lambda flat, e, E, n: (flat // (E // n)).argsort(stable=True)),
    ),
    in_turn=(
        "order deals experts out in turn",
        order(lambda flat, e, E, n: (flat % n * E + flat).argsort(stable=True)),
    ),
    choice_first=("by choice, and then by token", order(choice_first)),
    unstable=("in the order of their tokens: sort stable=True$", order(unstable)),
    unstable_if_many=(
        "in the order of their tokens for 200 tokens: sort stable",
        order(unstable_if_many),
    ),
    lost_one=(r"stands in it once, and number \d+ does not", order(lost_one)),
    swapped=("order: at place 0 stands assignment", order(swapped_ends)),
    not_flat=("one list of all assignments", order(lambda flat, e, *_: e.argsort(0))),
    float_order=(
        "order must be integers",
        order(lambda flat, *_: flat.argsort(stable=True).double()),
    ),
    sort_by_expert=(
        "sum over the experts of each process",
        sent(lambda flat, here, *_: flat.bincount(minlength=8)),
    ),
    dealt=(
        "sent counts experts e % n",
        sent(lambda flat, here, e, n: (flat % n).bincount(minlength=n)),
    ),
    once=(
        "counts tokens, each once for a process",
        sent(
            lambda flat, here, e, n: torch.stack([(e // here == r).any(-1).sum() for r in range(n)])
        ),
    ),
    first_choice=(
        "counts first choices alone",
        sent(lambda flat, here, e, n: (e[:, 0] // here).bincount(minlength=n)),
    ),
    ends=(
        "not where they end",
        sent(lambda flat, here, e, n: (flat // here).bincount(minlength=n).cumsum(0)),
    ),
    begins=(
        "not where they begin",
        sent(lambda f, h, e, n: (c := (f // h).bincount(minlength=n)).cumsum(0) - c),
    ),
    experts_in_use=(
        "counts how many of its experts get rows",
        sent(lambda f, here, e, n: (f.bincount(minlength=n * here).view(n, -1) > 0).sum(-1)),
    ),
    backwards=(
        "sent is turned round",
        sent(lambda f, here, e, n: (f // here).bincount(minlength=n).flip(0)),
    ),
    half=(r"sent is \[\d", sent(lambda f, here, e, n: (f // here).bincount(minlength=n) // 2)),
    no_minlength=(
        "an entry for each process, 0 where nothing",
        sent(lambda f, here, e, n: (f // here).bincount()),
    ),
    float_sent=(
        "sent must be integers",
        sent(lambda f, here, e, n: (f // here).bincount(minlength=n).double()),
    ),
    one_choice=(
        r"sent: right in general, but \[.*for one choice",
        sent(lambda f, here, e, n: (f // here).bincount(minlength=n) * (e.size(1) > 1)),
    ),
    fixed_experts=(
        "raises RuntimeError.*for one process",
        lambda e, E, n: (right.pack(e, E, 4)[0], right.pack(e, E, 4)[1].view(n)),
    ),
    one_alone=("returns a Tensor, not the 2 tensors order, sent", lambda *a: right.pack(*a)[0]),
    a_list=(
        "returns a list as its sent, not a tensor",
        sent(lambda f, here, e, n: (f // here).bincount(minlength=n).tolist()),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_mistake_gets_the_message_meant_for_it(step, message, function):
    WRONG.assert_diagnosis(check_04.STEPS, step, message, function)
