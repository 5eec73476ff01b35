"""Experiments on a timetable for a ring, and on an MLP in parts, that someone else wrote. What is wrong is raised as a Mistake.

The timetable is carried out, with chunks that remember whose numbers are in them. Processes, chunks and steps count from 0.
"""

from collections.abc import Callable

import torch
from grade import (
    TOLERANCE,
    Answer,
    Crash,
    Mistake,
    expect_dtype,
    expect_gradients,
    expect_integers,
    expect_shape,
    first_index,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

N, C, H = 6, 5, 12  # all different; H / n is 4, 3 and 2 for n = 3, 4, 6

# ---- the ring ----------------------------------------------------------------------------------------------------------------


def examine_ring(answer: Answer) -> None:
    for n in (4, 2, 3, 8, 1):
        table = answer(n, when=f"for n = {n}")
        expect_table(table, n)
        when = "" if n == 4 else f", for n = {n}"
        try:
            carry_out(table.tolist(), n)
        except Mistake as mistake:
            raise Mistake(f"{mistake}{when}") from None


def expect_table(table: Tensor, n: int) -> None:
    steps = 2 * (n - 1)
    hints = {
        (n - 1, n): ": after adding, what is done has to be copied on, in n - 1 more steps",
        (n, n): ": a process sends to n - 1 others what it starts, not to itself too",
        (2 * n, n): ": n parts are together after n - 1 steps, not n",
        (n, steps): ": a row for each step, a column for each process",
    }
    expect_shape(
        table,
        (steps, n),
        f" for n = {n}" + ("" if table.shape == (steps, n) else hints.get(tuple(table.shape), "")),
    )
    expect_integers(table, "numbers of chunks")
    if (wrong := (table < 0) | (table >= n)).any():
        s, r = first_index(wrong)
        raise Mistake(
            f"in step {s} process {r} sends chunk {table[s, r]}, and they are 0 to {n - 1}: take the number modulo n"
        )


def carry_out(table: list[list[int]], n: int) -> None:
    """Send the chunks as the timetable says: each a set of the processes whose numbers are in it."""
    held = [[{r} for _ in range(n)] for r in range(n)]  # by process and chunk
    for s, row in enumerate(table):
        adding = s < n - 1
        if s == 0 and len(set(row)) < n:
            expect_all_different(row)
        for r, c in enumerate(row):
            before = table[s - 1][r - 1] if s else c
            if adding and c != before:
                raise Mistake(
                    f"in step {s} process {r} sends chunk {c}, and chunk {before} has just come to it: a chunk collects n "
                    "parts in n - 1 steps only if it is sent on at once"
                )
            if not adding and len(held[r][c]) < n:
                raise Mistake(
                    f"in step {s}, a step of copying, process {r} sends chunk {c}, in which {len(held[r][c])} of {n} parts "
                    "are: begin with the chunk that the last step of adding has completed there"
                )
        moving = [(c, set(held[r][c])) for r, c in enumerate(row)]
        for r, (c, parts) in enumerate(moving):
            mine = held[(r + 1) % n]
            if not adding and len(mine[c]) == n:
                raise Mistake(
                    f"in step {s} process {r} sends chunk {c} to process {(r + 1) % n}, which has the whole of it already: "
                    "send on what has just come"
                )
            mine[c] = mine[c] | parts if adding else parts


def expect_all_different(row: list[int]) -> None:
    chunk = next(c for c in row if row.count(c) > 1)
    if len(set(row)) == 1:
        raise Mistake(
            f"in step 0 all send chunk {chunk}: then nobody collects the others. Each process has to start another"
        )
    raise Mistake(f"in step 0 several processes send chunk {chunk}: each has to start another")


# ---- an MLP in parts ---------------------------------------------------------------------------------------------------------


def mlp(x: Tensor, up: Tensor, out: Tensor) -> Tensor:
    return (x @ up.T).relu().square() @ out.T


def right_parts(x: Tensor, up: Tensor, out: Tensor, n: int) -> Tensor:
    return torch.stack(
        [mlp(x, u, o) for u, o in zip(up.chunk(n), out.chunk(n, dim=1), strict=True)]
    )


def matrices(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((N, C), (H, C), (C, H))
    ]


def known_parts(x: Tensor, up: Tensor, out: Tensor, n: int) -> dict[str, Callable[[], Tensor]]:
    """What leads where, for the MLP's usual mistakes; each with the shape (n, N, C)."""

    def pairs(
        u: Tensor | tuple,
        o: Tensor | tuple,
        act: Callable[[Tensor], Tensor] = lambda h: h.relu().square(),
    ) -> Tensor:
        return torch.stack([act(x @ a.T) @ b.T for a, b in zip(u, o, strict=True)])

    ups, outs = up.chunk(n), out.chunk(n, dim=1)
    whole = mlp(x, up, out).expand(n, N, C)
    wide = [x[:, c] @ up[:, c].T for c in torch.arange(C).tensor_split(n)]
    return {
        "every process computes the whole MLP, so that their sum is n times y: each has H / n of the hidden numbers": lambda: (
            whole
        ),
        "every process computes the whole MLP and divides it by n: nothing is shared out": lambda: (
            whole / n
        ),
        "process 0 computes everything, and the others nothing": lambda: torch.cat(
            [whole[:1], 0 * whole[1:]]
        ),
        "the sum over the processes is given to each of them: what is asked for is what each has before": lambda: (
            right_parts(x, up, out, n).sum(0).expand(n, N, C)
        ),
        "split along C, the width: each then has a part of a sum *inside* the ReLU, and relu(a) + relu(b) is not relu(a + b)": (
            lambda: torch.stack([h.relu().square() @ out.T for h in wide])
        ),
        "takes every n-th hidden number: process r has those from r H / n on, in a row": lambda: (
            pairs([up[r::n] for r in range(n)], [out[:, r::n] for r in range(n)])
        ),
        "takes rows of `up` in blocks and columns of `out` at every n-th: a hidden number needs its own column": lambda: (
            pairs(ups, [out[:, r::n] for r in range(n)])
        ),
        "goes with the wrong columns: part r of `up` needs part r of `out`": lambda: pairs(
            ups, outs[::-1]
        ),
        "the parts are in the wrong order: the first is process 0's": lambda: pairs(
            ups[::-1], outs[::-1]
        ),
        "the ReLU is not squared": lambda: pairs(ups, outs, torch.relu),
        "it is squared, but there is no ReLU": lambda: pairs(ups, outs, torch.square),
        "there is no ReLU, and no square": lambda: pairs(ups, outs, lambda h: h),
        "each part is divided by n: y is their sum, not their mean": lambda: pairs(ups, outs) / n,
    }


def examine_parts(answer: Answer) -> None:
    def asked(x: Tensor, up: Tensor, out: Tensor, n: int, when: str = "") -> Tensor:
        try:
            made = answer(x, up, out, n, when=when)
        except Crash as crash:
            if (
                "shapes cannot be multiplied" in crash.reason
                or "must match the size" in crash.reason
            ):
                raise Mistake(
                    f"{crash}. Hidden numbers are the rows of `up` (H, C), and the columns of `out` (C, H)"
                ) from None
            raise
        width = len(up) // n
        hints = {
            (N, C): ": that is their sum; return the n terms of it, stacked",
            (n * N, C): ": stack, where you concatenate",
            (N, n * C): ": stack, where you concatenate",
            (N, n, C): ": the processes come first",
            (
                n,
                N,
                width,
            ): ": the hidden numbers have still to be multiplied by the columns of `out`",
        }
        expect_shape(
            made, (n, len(x), C), f", {when}" if when else hints.get(tuple(made.shape), "")
        )
        expect_dtype(made, x)
        return made

    given, n = matrices(), 4
    got, right = asked(*given, n), right_parts(*given, n)
    if not (got - right).abs().max() < TOLERANCE:
        for why, make in known_parts(*given, n).items():
            if (got - make()).abs().max() < TOLERANCE:
                raise Mistake(why)
        off = (got.sum(0) - right.sum(0)).abs().max()
        if off < TOLERANCE:
            raise Mistake(
                "the sum is y, but its terms are not what each process makes of its own hidden numbers"
            )
        raise Mistake(f"the sum over the processes differs from y by up to {off:.3g}")
    with FlopCounterMode(display=False) as counter:
        asked(*given, n)
    times = counter.get_total_flops() / (4 * N * C * H)
    if times > 1.01:
        raise Mistake(
            f"right, but {times:.3g} times the work of one process: multiply by the rows and columns of its part alone"
        )
    for when, parts in {"n = 1": 1, "n = 2": 2, "n = H": H}.items():
        got = asked(*given, parts, when=f"for {when}")
        if not (got - right_parts(*given, parts)).abs().max() < TOLERANCE:
            raise Mistake(f"right for n = 4, but wrong for {when}")
    one = [given[0][:1], *given[1:]]
    if not (asked(*one, n, when="for one token") - right[:, :1]).abs().max() < TOLERANCE:
        raise Mistake("right in general, but wrong for one token")
    names = dict(zip(("x", "up", "out"), given, strict=True))
    expect_gradients(lambda *given: asked(*given, n), lambda *given: right_parts(*given, n), names)
    single = [a.float() for a in given]
    if not (asked(*single, n, when="in fp32") - right_parts(*single, n)).abs().max() < 1e-3:
        raise Mistake("right in fp64, but wrong in fp32")
