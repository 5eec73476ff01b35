"""Experiments on a learner's ring all-reduce and tensor parallelism. Each problem raises a Mistake.

The ring's schedule is simulated with chunks that record which processes' numbers they contain.
Processes, chunks and steps count from 0.
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

# ---- step 1: the ring ----------------------------------------------------------------------------


def examine_ring(answer: Answer) -> None:
    """Raise Mistake unless `answer(n)` is a correct schedule for several n."""
    for n in (4, 2, 3, 8, 1):
        schedule = answer(n, when=f"for n = {n}")
        expect_schedule(schedule, n)
        try:
            simulate(schedule.tolist(), n)
        except Mistake as mistake:
            when = "" if n == 4 else f", for n = {n}"
            raise Mistake(f"{mistake}{when}") from None


def expect_schedule(schedule: Tensor, n: int) -> None:
    """Raise Mistake unless the schedule has the right shape and numbers of chunks."""
    steps = 2 * (n - 1)
    hints = {
        (n - 1, n): ": after adding, the sums must be copied, in n - 1 more steps",
        (n, n): ": a process sends its chunk to n - 1 others, not to itself too",
        (2 * n, n): ": n parts are together after n - 1 steps, not n",
        (n, steps): ": one row for each step, one column for each process",
    }
    hint = "" if schedule.shape == (steps, n) else hints.get(tuple(schedule.shape), "")
    expect_shape(schedule, (steps, n), f" for n = {n}{hint}")
    expect_integers(schedule, "numbers of chunks")
    is_invalid = (schedule < 0) | (schedule >= n)
    if is_invalid.any():
        s, r = first_index(is_invalid)
        raise Mistake(
            f"in step {s} process {r} sends chunk {schedule[s, r]}, but chunks are numbered 0 to "
            f"{n - 1}: take the number modulo n"
        )


def simulate(schedule: list[list[int]], n: int) -> None:
    """Send the chunks as the schedule says. Raise Mistake at the first step that is wrong.

    A chunk is represented by the set of the processes whose numbers it contains.
    """
    chunks = [[{r} for _ in range(n)] for r in range(n)]  # chunks[process][number]
    for s, row in enumerate(schedule):
        is_adding = s < n - 1
        if s == 0 and len(set(row)) < n:
            raise_duplicate_chunk(row)
        for r, c in enumerate(row):
            received = schedule[s - 1][r - 1] if s else c
            if is_adding and c != received:
                raise Mistake(
                    f"in step {s} process {r} sends chunk {c}, but it has just received chunk "
                    f"{received}: a chunk collects n parts in n - 1 steps only if each process "
                    "sends it on at once"
                )
            if not is_adding and len(chunks[r][c]) < n:
                raise Mistake(
                    f"in step {s}, a copying step, process {r} sends chunk {c}, which contains "
                    f"{len(chunks[r][c])} of {n} parts: begin with the chunk that the last adding "
                    "step has completed there"
                )
        in_transit = [(c, set(chunks[r][c])) for r, c in enumerate(row)]
        for r, (c, parts) in enumerate(in_transit):
            receiver = (r + 1) % n
            if not is_adding and len(chunks[receiver][c]) == n:
                raise Mistake(
                    f"in step {s} process {r} sends chunk {c} to process {receiver}, which has the "
                    "complete chunk already: send on the chunk that has just arrived"
                )
            chunks[receiver][c] = chunks[receiver][c] | parts if is_adding else parts


def raise_duplicate_chunk(row: list[int]) -> None:
    """Raise the Mistake that fits a first step in which processes send the same chunk."""
    chunk = next(c for c in row if row.count(c) > 1)
    if len(set(row)) == 1:
        raise Mistake(
            f"in step 0 all processes send chunk {chunk}, so the other chunks are never collected: "
            "each process must start with a different one"
        )
    raise Mistake(
        f"in step 0 several processes send chunk {chunk}: each must start with a different one"
    )


# ---- step 2: tensor parallelism ------------------------------------------------------------------


def mlp(x: Tensor, up: Tensor, out: Tensor) -> Tensor:
    return (x @ up.T).relu().square() @ out.T


def reference_partial_outputs(x: Tensor, up: Tensor, out: Tensor, n: int) -> Tensor:
    parts = zip(up.chunk(n), out.chunk(n, dim=1), strict=True)
    return torch.stack([mlp(x, rows, columns) for rows, columns in parts])


def random_matrices(seed: int = 1) -> list[Tensor]:
    """Return x (N, C), up (H, C) and out (C, H)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((N, C), (H, C), (C, H))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def squared_relu(h: Tensor) -> Tensor:
    return h.relu().square()


def known_mistakes(x: Tensor, up: Tensor, out: Tensor, n: int) -> dict[str, Tensor]:
    """Return the outputs (n, N, C) of the usual mistakes, by message."""

    def partial_outputs(
        up_parts: list[Tensor] | tuple[Tensor, ...],
        out_parts: list[Tensor] | tuple[Tensor, ...],
        activation: Callable[[Tensor], Tensor] = squared_relu,
    ) -> Tensor:
        parts = zip(up_parts, out_parts, strict=True)
        return torch.stack([activation(x @ rows.T) @ columns.T for rows, columns in parts])

    ups, outs = up.chunk(n), out.chunk(n, dim=1)
    strided_ups = [up[r::n] for r in range(n)]
    strided_outs = [out[:, r::n] for r in range(n)]
    full = mlp(x, up, out).expand(n, N, C)
    parts_of_hidden = [x[:, c] @ up[:, c].T for c in torch.arange(C).tensor_split(n)]
    return {
        "every process computes the whole MLP, so their sum is n times y: each holds H / n hidden "
        "units": full,
        "every process computes the whole MLP and divides it by n: the work is not divided": (
            full / n
        ),
        "process 0 computes everything, and the others nothing": torch.cat(
            [full[:1], 0 * full[1:]]
        ),
        "each process gets the sum over the processes: return what each has before the sum": (
            reference_partial_outputs(x, up, out, n).sum(0).expand(n, N, C)
        ),
        "split along C, the width: each process then has a part of a sum *inside* the ReLU, and "
        "relu(a) + relu(b) is not relu(a + b)": torch.stack(
            [squared_relu(h) @ out.T for h in parts_of_hidden]
        ),
        "takes every n-th hidden unit: process r holds consecutive units, from r H / n on": (
            partial_outputs(strided_ups, strided_outs)
        ),
        "takes consecutive rows of `up` but every n-th column of `out`: a hidden unit needs the "
        "row and the column of the same number": partial_outputs(ups, strided_outs),
        "multiplies by the wrong columns: part r of `up` needs part r of `out`": (
            partial_outputs(ups, outs[::-1])
        ),
        "reshapes `out` (C, H) to (n, C, H / n), which mixes its rows: cut it along its columns": (
            partial_outputs(ups, list(out.reshape(n, C, -1)))
        ),
        "reshapes `out` (C, H) to (n, H / n, C), which is not its transpose: cut it along its "
        "columns": partial_outputs(ups, list(out.reshape(n, -1, C).mT)),
        "the parts are in reverse order: the first belongs to process 0": (
            partial_outputs(ups[::-1], outs[::-1])
        ),
        "the ReLU is not squared": partial_outputs(ups, outs, torch.relu),
        "the hidden units are squared, but there is no ReLU": (
            partial_outputs(ups, outs, torch.square)
        ),
        "there is no ReLU and no square": partial_outputs(ups, outs, lambda h: h),
        "each part is divided by n: y is their sum, not their mean": (
            partial_outputs(ups, outs) / n
        ),
    }


def examine_tensor_parallel_mlp(answer: Answer) -> None:
    """Raise Mistake unless `answer(x, up, out, n)` returns the n partial outputs."""

    def partial_outputs(x: Tensor, up: Tensor, out: Tensor, n: int, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        try:
            result = answer(x, up, out, n, when=when)
        except Crash as crash:
            if any(
                text in crash.reason
                for text in ("shapes cannot be multiplied", "must match the size")
            ):
                raise Mistake(
                    f"{crash}. Hidden units are the rows of `up` (H, C) and the columns of `out` "
                    "(C, H)"
                ) from None
            raise
        hints = {
            (N, C): ": that is their sum; return its n terms, stacked",
            (n * N, C): ": use stack, not cat",
            (N, n * C): ": use stack, not cat",
            (N, n, C): ": the processes must be the first dimension",
            (n, N, len(up) // n): ": multiply the hidden units by the columns of `out`",
        }
        hint = f", {when}" if when else hints.get(tuple(result.shape), "")
        expect_shape(result, (n, len(x), C), hint)
        expect_dtype(result, x)
        return result

    x, up, out = random_matrices()
    n = 4
    result = partial_outputs(x, up, out, n)
    expected = reference_partial_outputs(x, up, out, n)
    expect_partial_outputs(result, expected, known_mistakes(x, up, out, n))
    with FlopCounterMode(display=False) as counter:
        partial_outputs(x, up, out, n)
    ratio = counter.get_total_flops() / (4 * N * C * H)
    if ratio > 1.01:
        raise Mistake(
            f"right, but it does {ratio:.3g} times the work of one process: multiply only by the "
            "rows and columns of each part"
        )
    for when, parts in {"n = 1": 1, "n = 2": 2, "n = H": H}.items():
        result = partial_outputs(x, up, out, parts, when=f"for {when}")
        error = (result - reference_partial_outputs(x, up, out, parts)).abs().max()
        if not error < TOLERANCE:
            raise Mistake(f"right for n = 4, but wrong for {when}")
    result = partial_outputs(x[:1], up, out, n, when="for one token")
    if not (result - expected[:, :1]).abs().max() < TOLERANCE:
        raise Mistake("right in general, but wrong for one token")
    expect_gradients(
        lambda x, up, out: partial_outputs(x, up, out, n),
        lambda x, up, out: reference_partial_outputs(x, up, out, n),
        {"x": x, "up": up, "out": out},
    )
    inputs = x.float(), up.float(), out.float()
    result = partial_outputs(*inputs, n, when="in fp32")
    if not (result - reference_partial_outputs(*inputs, n)).abs().max() < 1e-3:
        raise Mistake("right in fp64, but wrong in fp32")


def expect_partial_outputs(
    result: Tensor, expected: Tensor, known_mistakes: dict[str, Tensor]
) -> None:
    if (result - expected).abs().max() < TOLERANCE:
        return
    for message, output in known_mistakes.items():
        if (result - output).abs().max() < TOLERANCE:
            raise Mistake(message)
    error = (result.sum(0) - expected.sum(0)).abs().max()
    if error < TOLERANCE:
        raise Mistake(
            "the sum is y, but its terms are not what each process computes from its hidden units"
        )
    raise Mistake(f"the sum over the processes differs from y by up to {error:.3g}")
