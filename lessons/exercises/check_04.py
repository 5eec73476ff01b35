"""Grade the exercises of lesson 04: python lessons/exercises/check_04.py [FILE]

Mistakes are found by experiments on the functions (see probe_sharing.py for steps 1 and 2), never by reading their source.
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
    expect_integers,
    expect_shape,
    first_index,
    main,
)
from probe_sharing import examine_parts, examine_ring
from torch import Tensor

Known = dict[str, Callable[[], Tensor]]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() < TOLERANCE).all())  # never where one is NaN


def explain(got: Tensor, known: Known, name: str = "") -> None:
    for why, make in known.items():
        if same(got, make()):
            raise Mistake(f"{name} {why}".lstrip())


# ---- step 3: rows for their owners -------------------------------------------------------------------------------------------

N, K, E, P = 12, 2, 8, 4  # tokens, choices, experts, processes


def chosen(N: int = N, K: int = K, below: int = E, seed: int = 6) -> Tensor:
    """(N, K), of experts under `below`; no token chooses one twice."""
    return random(N, below, seed=seed).argsort(dim=-1)[:, :K]


def right_order(experts: Tensor) -> Tensor:
    return experts.flatten().argsort(stable=True)


def right_sent(experts: Tensor, n_expert: int, n: int) -> Tensor:
    return experts.flatten().bincount(minlength=n_expert).view(n, -1).sum(-1)


def check_pack(answer: Answer) -> None:
    def asked(experts: Tensor, n_expert: int, n: int, when: str = "") -> tuple[Tensor, Tensor]:
        order, sent = answer(experts, n_expert, n, when=when)
        told, count = f", {when}" if when else "", experts.numel()
        flat = (
            ": one list of all assignments, flatten()"
            if tuple(order.shape) == tuple(experts.shape)
            else ""
        )
        expect_shape(order, (count,), f" (order){told or flat}")
        few = (
            ": an entry for each process, 0 where nothing goes there"
            if sent.ndim == 1 and len(sent) < n
            else ""
        )
        each = (
            ": sum over the experts of each process"
            if tuple(sent.shape) == (n_expert,) and n != n_expert
            else ""
        )
        expect_shape(sent, (n,), f" (sent){told}{few or each}")
        expect_integers(order, "order")
        expect_integers(sent, "sent")
        return order, sent

    experts = chosen()
    order, sent = asked(experts, E, P)
    expect_order(order, experts)
    expect_sent(sent, experts)
    cases = {
        "where nothing goes to the last process": (chosen(below=E - 2), E, P),
        "where all goes to process 0": (chosen(below=2), E, P),
        "for one choice a token": (chosen(K=1), E, P),
        "for one process": (experts, E, 1),
        "for a process for each expert": (experts, E, E),
        "for one token": (chosen(N=1), E, P),
        "without tokens": (chosen(N=0), E, P),
        "for 200 tokens": (
            chosen(N=200),
            E,
            P,
        ),  # a sort that is not stable may keep the order of a few
    }
    for when, (experts, n_expert, n) in cases.items():
        order, sent = asked(experts, n_expert, n, when=when)
        if not order.equal(right_order(experts)):
            if experts.flatten()[order].equal(experts.flatten().sort().values):
                raise Mistake(
                    f"order: the rows of an expert are not in the order of their tokens {when}: sort stable=True"
                )
            raise Mistake(f"order: right in general, but wrong {when}")
        if not sent.equal(right_sent(experts, n_expert, n)):
            raise Mistake(f"sent: right in general, but {sent.tolist()[:8]} {when}")


def expect_order(order: Tensor, experts: Tensor) -> None:
    flat, here = experts.flatten(), E // P
    right = right_order(experts)
    if order.equal(right):
        return
    by_slot = experts.T.flatten().argsort(stable=True)
    token, slot = torch.arange(N * K) // K, torch.arange(N * K) % K
    explain(
        order,
        {
            "holds the numbers of tokens: an assignment's is t K + k, so that x[order // K] finds its row": lambda: (
                right // K
            ),
            "holds the experts, sorted: what is asked for is which assignment stands where, argsort()": lambda: (
                flat[right]
            ),
            "says where each assignment goes: its inverse says which assignment stands where": lambda: (
                right.argsort()
            ),
            "is the order of the tokens, as they are: sort by expert": lambda: torch.arange(N * K),
            "begins with the last expert": lambda: flat.argsort(stable=True, descending=True),
            "takes assignment k N + t for the k-th choice of token t, which is t K + k: flatten (N, K), not its transpose": (
                lambda: by_slot
            ),
            "sorts by owner alone: within a box, rows stand by expert": lambda: (
                flat // here
            ).argsort(stable=True),
            "deals experts out in turn, e % n: process r owns n_expert / n that follow each other": lambda: (
                (flat % P * E + flat).argsort(stable=True)
            ),
            "has the rows of an expert by choice, and then by token: by token alone": lambda: (
                flat * K * N + slot * N + token
            ).argsort(),
        },
        "order",
    )
    if not order.sort().values.equal(torch.arange(N * K)):
        missing = sorted(set(range(N * K)) - set(order.tolist()))
        raise Mistake(
            f"order: each of the {N * K} assignments stands in it once, and number {missing[0]} does not"
        )
    if flat[order].equal(flat[right]):
        raise Mistake(
            "order: the rows of an expert are not in the order of their tokens: sort stable=True"
        )
    i = first_index(order != right)[0]
    what = (
        f"assignment {order[i]} (expert {flat[order[i]]}), not {right[i]} (expert {flat[right[i]]})"
    )
    raise Mistake(f"order: at place {i} stands {what}")


def expect_sent(sent: Tensor, experts: Tensor) -> None:
    flat, right = experts.flatten(), right_sent(experts, E, P)
    if sent.equal(right):
        return
    owners = experts // (E // P)
    explain(
        sent,
        {
            "counts experts e % n: process r owns n_expert / n that follow each other, e // (n_expert / n)": lambda: (
                (flat % P).bincount(minlength=P)
            ),
            "counts tokens, each once for a process: two of its experts there are two rows": lambda: (
                torch.stack([(owners == r).any(-1).sum() for r in range(P)])
            ),
            "counts first choices alone: each token has K rows": lambda: owners[:, 0].bincount(
                minlength=P
            ),
            "is a running sum: how many rows each gets, not where they end": lambda: right.cumsum(
                0
            ),
            "is a running sum: how many rows each gets, not where they begin": lambda: (
                right.cumsum(0) - right
            ),
            "counts how many of its experts get rows: how many rows they get": lambda: (
                flat.bincount(minlength=E).view(P, -1) > 0
            ).sum(-1),
            "is turned round: the first is process 0's": lambda: right.flip(0),
        },
        "sent",
    )
    raise Mistake(f"sent is {sent.tolist()}, and should be {right.tolist()}")


# ---- step 4: one gradient of many --------------------------------------------------------------------------------------------

W, G, S, X = (
    6,
    2,
    5,
    7,
)  # processes, of a group, numbers that all have, numbers of the experts of one


def right_sums(shared: Tensor, experts: Tensor, group: int) -> tuple[Tensor, Tensor]:
    W = len(shared)
    return shared.mean(0).expand_as(shared), by_twins(experts, group) / W


def by_twins(x: Tensor, group: int) -> Tensor:
    """Summed over those with the same place in their groups: for each process."""
    W = len(x)
    return x.view(W // group, group, -1).sum(0).repeat(W // group, 1)


def by_group(x: Tensor, group: int) -> Tensor:
    W = len(x)
    return x.view(W // group, group, -1).sum(1).repeat_interleave(group, 0)


def check_add_up(answer: Answer) -> None:
    def asked(shared: Tensor, experts: Tensor, group: int, when: str = "") -> tuple[Tensor, Tensor]:
        made = answer(shared, experts, group, when=when)
        for got, given, name in zip(made, (shared, experts), ("shared", "experts"), strict=True):
            one = ": each process needs its own row, the same as others have or not"
            row = (
                tuple(got.shape)
                in (tuple(given.shape[1:]), (1, given.shape[1]), (group, given.shape[1]))
                and len(given) > group
            )
            expect_shape(
                got,
                tuple(given.shape),
                f" ({name})" + (f", {when}" if when else one if row else ""),
            )
            expect_dtype(got, given)
        return made

    shared, experts = random(W, S), random(W, X, seed=2)
    got = asked(shared, experts, G)
    right = right_sums(shared, experts, G)
    if not same(got[0], right[0]):
        total = shared.sum(0).expand_as(shared)
        explain(got[0], known_sums(shared, total), "shared")
        raise Mistake(
            f"shared gives {got[0][0, 0]:.4f} where the mean over all {W} is {right[0][0, 0]:.4f}"
        )
    if not same(got[1], right[1]):
        twins = by_twins(experts, G)
        explain(got[1], known_experts(experts, twins), "experts")
        raise Mistake(
            f"experts gives {got[1][0, 0]:.4f}, and should give {right[1][0, 0]:.4f} for process 0"
        )
    cases = {
        "for groups of one, which are copies of everything": (shared, experts, 1),
        "for one group, without copies of experts": (shared, experts, W),
        "for two groups of three": (shared, experts, 3),
        "for one process": (shared[:1], experts[:1], 1),
    }
    for when, given in cases.items():
        got = asked(*given, when=when)
        for made, wanted, name in zip(got, right_sums(*given), ("shared", "experts"), strict=True):
            if not same(made, wanted):
                raise Mistake(f"{name}: right for {W} processes in groups of {G}, but wrong {when}")
    single = shared.float(), experts.float()
    for made, wanted in zip(asked(*single, G, when="in fp32"), right_sums(*single, G), strict=True):
        if not (made - wanted).abs().max() < 1e-5:
            raise Mistake("right in fp64, but wrong in fp32")


def known_sums(x: Tensor, total: Tensor) -> Known:
    return {
        "is as it was: each process would take another step, and the copies would part": lambda: x,
        "is the sum: the loss of the batch is the *mean* of W losses": lambda: total,
        "is added up in each group alone: all processes have these weights": lambda: (
            by_group(x, G) / G
        ),
        "is added up in each group alone, and divided by W: all processes have these weights": lambda: (
            by_group(x, G) / W
        ),
        "is added up over the copies of the experts alone: all processes have these weights": lambda: (
            by_twins(x, G) / (W // G)
        ),
        "is added up as the experts are: all processes have these weights, not only every group-th": lambda: (
            by_twins(x, G) / W
        ),
        "is divided by the size of a group: the loss is a mean over all W": lambda: total / G,
        "is divided by the number of groups: the loss is a mean over all W": lambda: (
            total / (W // G)
        ),
        "is divided by W, and not added up": lambda: x / W,
    }


def known_experts(x: Tensor, twins: Tensor) -> Known:
    over_all = x.sum(0).expand_as(x)
    return {
        "are divided by the number of copies, the classic mistake: what an owner has is of the sum of its group's losses, and "
        "the loss is the mean of all W. They come out `group` times too large": lambda: (
            twins / (W // G)
        ),
        "are divided by the size of a group: the loss is a mean over all W": lambda: twins / G,
        "are added up over their copies, and not divided: the loss is the mean of W losses": lambda: (
            twins
        ),
        "are averaged over all, as what is shared: but the processes of a group own *different* experts": lambda: (
            over_all / W
        ),
        "are added up over all: but the processes of a group own *different* experts": lambda: (
            over_all
        ),
        "are added up in each group, whose processes own *different* experts: add up w, w + group, w + 2 group, ...": lambda: (
            by_group(x, G) / W
        ),
        "are averaged in each group, whose processes own *different* experts: add up w, w + group, ...": lambda: (
            by_group(x, G) / G
        ),
        "are as they were: copies in other groups saw other tokens, so add them up; and divide by W": lambda: (
            x
        ),
        "are divided by W, but not added up over the copies in other groups, which saw other tokens": lambda: (
            x / W
        ),
        "are divided by the size of a group, and not added up over their copies": lambda: x / G,
        "are taken from the wrong copies: w and w + group own the same, not neighbours in blocks of W / group": lambda: (
            by_group(x, W // G) / W
        ),
    }


# ---- step 5: what 512 devices use --------------------------------------------------------------------------------------------

ROUGH = 1e-6  # a division of integers is made in fp32


def loads(R: int = 3, L: int = 4, E: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(1, 60, (R, L, E), generator=torch.Generator().manual_seed(seed))


def right_share(load: Tensor, devices: int) -> Tensor:
    return share(load.double().unflatten(2, (devices, -1)).sum(-1))


def share(rows: Tensor, step: Tensor | None = None) -> Tensor:
    """rows (R, L, G) of each device -> what of the step is used, where that takes as long as the slowest group."""
    step = rows.amax(2).sum(1).max() if step is None else step
    return rows.sum() / (rows.size(0) * rows.size(2) * step)


def check_used(answer: Answer) -> None:
    def asked(load: Tensor, devices: int, when: str = "") -> Tensor:
        out = answer(load, devices, when=when)
        R, L, _ = load.shape
        each = {
            (R,): ": one for each group, of all together",
            (L,): ": one for each layer",
            (R, L): ": one for each group and layer",
        }
        expect_shape(out, (), f", {when}" if when else each.get(tuple(out.shape), ""))
        if not out.is_floating_point():
            raise Mistake(f"must be a share, a floating-point number, and is {str(out.dtype)[6:]}")
        return out

    load, G = loads(), 4
    got, right = asked(load, G).double(), right_share(load, G)
    if not (got - right).abs() < ROUGH:
        for why, hypothesis in known_shares(load.double(), G).items():
            if (got - hypothesis).abs() < ROUGH:
                raise Mistake(why)
        raise Mistake(f"gives {got:.4f} where the devices use {right:.4f} of the step")
    one = torch.zeros(3, 4, 8, dtype=torch.long)
    one[..., 5] = 40
    cases = {
        "where all loads are equal": (torch.full((3, 4, 8), 7), 4),
        "where one expert gets everything": (one, 4),
        "for a device for each expert": (load, 8),
        "for one device a group": (load, 1),
        "for one group": (load[:1], G),
        "for one layer": (load[:, :1], G),
        "for 32 groups of 16": (loads(32, 3, 16), 16),
    }
    for when, given in cases.items():
        got, right = asked(*given, when=when).double(), right_share(*given)
        if not (got - right).abs() < ROUGH:
            raise Mistake(
                f"right in general, but gives {got:.4f} {when}, and should give {right:.4f}"
            )


def known_shares(load: Tensor, G: int) -> dict[str, Tensor]:
    R, L, _ = load.shape
    rows = load.unflatten(2, (G, -1)).sum(-1)  # (R, L, G)
    in_turn = load.unflatten(2, (-1, G)).sum(2)
    groups = rows.amax(2).sum(1)  # seconds of each, if it waited for no other
    right = share(rows)
    by_layer = rows.mean(2) / rows.amax(2)
    return {
        "is turned round: the time of the step over that of computing": 1 / right,
        "the share that is *not* used": 1 - right,
        "experts are taken for devices: add up the rows of the experts that a device owns": share(
            load
        ),
        "counts the busiest expert, not the busiest device: add up the rows of the experts that a device owns": share(
            rows, load.amax(2).sum(1).max()
        ),
        "experts are dealt out in turn: a device owns E / devices experts that follow each other": share(
            in_turn
        ),
        "the groups do not wait for each other: the step takes as long as the slowest of them": share(
            rows, groups.mean()
        ),
        "a mean of the groups' shares: they wait for each other, and the step takes as long as the slowest": (
            rows.sum((1, 2)) / (G * groups)
        ).mean(),
        "the share of the slowest group alone: the other groups compute less in the same time": (
            rows.sum((1, 2)) / (G * groups)
        )[groups.argmax()],
        "a mean of the layers' shares, group by group: add up their *times* first, and let the groups wait": by_layer.mean(),
        "the worst layer stands for all: add up the layers of a group": share(
            rows, L * rows.amax()
        ),
        "the groups meet at each layer: they wait for each other at the end of the step alone": share(
            rows, rows.amax((0, 2)).sum()
        ),
        "devices wait at the end of the step alone: those of a group wait for the busiest in *each* layer": share(
            rows, rows.sum(1).max()
        ),
        "devices are compared over all groups at once, and over the whole step": share(
            rows, rows.sum((0, 1)).max() / R
        ),
        "the time of the slowest group counts once: each of its devices is there all the time": right
        * G,
        "all groups have devices: divide by the number of all": right * R,
        "divided by the number of all devices, and those of a group computed together: the fewest rows count": share(
            rows, rows.amin(2).sum(1).max()
        ),
    }


STEPS = [
    Step("ring", examine_ring),
    Step("in_parts", examine_parts),
    Step("pack", check_pack, returns=("order", "sent")),
    Step("add_up", check_add_up, returns=("shared", "experts")),
    Step("used", check_used),
]

if __name__ == "__main__":
    sys.exit(main(STEPS, Path(__file__).with_name("04_scaling.py")))
