"""The steps of lesson 05, each with its tests. check_05.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_05.py FILE

The grader finds mistakes by experiments on the functions, never by reading their source. The
references are those of nanods/planner: tests/lessons/test_exercise_05_right.py compares them.
"""

import sys
from collections.abc import Sequence

import torch
from grade import (
    Answer,
    KnownMistakes,
    Mistake,
    Step,
    different_digits,
    expect_integers,
    expect_shape,
    main,
)
from probe_counts import agrees, judge, judge_cases, tensor
from torch import Tensor

# ---- step 1: weights, gradients, optimizer state -------------------------------------------------

STATE = ("weights", "gradients", "optimizer")
MODEL = (1_000_000, 12_800_000, 90_000)  # parameters outside experts, in them, of AdamW


def state_of(outside: float, experts: float, adamw: float) -> Tensor:
    """Return the bytes of what one GPU keeps, from the numbers of its parameters."""
    parameters = outside + experts
    return tensor([4 * parameters, 4 * parameters, 4 * (parameters - adamw) + 8 * adamw])


def reference_state(
    outside: int, experts: int, adamw: int, n: int, ep: int, is_fsdp: bool
) -> Tensor:
    if is_fsdp:
        return state_of(outside / n, experts / n, adamw / n)
    return state_of(outside, experts / ep, adamw)


def known_states(
    outside: int, experts: int, adamw: int, n: int, ep: int, is_fsdp: bool
) -> KnownMistakes:
    right = reference_state(outside, experts, adamw, n, ep, is_fsdp)
    parameters = right[0] / 4
    share = n if is_fsdp else 1
    owned = adamw / share

    def optimizer(size: float) -> Tensor:
        return tensor([float(right[0]), float(right[1]), float(size)])

    known = {
        "optimizer: has two numbers for each parameter: Muon keeps one, its momentum": (
            lambda: optimizer(8 * parameters)
        ),
        "optimizer: has one number for each parameter: AdamW keeps two moments": (
            lambda: optimizer(4 * parameters)
        ),
        "optimizer: AdamW has 12 bytes for each of its parameters: two moments are 8": (
            lambda: optimizer(4 * parameters + 8 * owned)
        ),
        "optimizer: lacks the experts, which Muon updates": (
            lambda: optimizer(right[2] - 4 * (experts / (n if is_fsdp else ep)))
        ),
        "optimizer: counts AdamW's parameters alone: Muon has a momentum": (
            lambda: optimizer(8 * owned)
        ),
        "the numbers of parameters: an fp32 number has 4 bytes": lambda: right / 4,
        "2 bytes for a number: weights, gradients and state are fp32": lambda: right / 2,
        "gradients and weights have 2 bytes: they are fp32": (
            lambda: right * tensor([0.5, 0.5, 1])
        ),
        "the bytes of all GPUs: return those of one": lambda: right * n,
        "begins with the optimizer: the order is weights, gradients, optimizer": (
            lambda: right.flip(0)
        ),
    }
    if is_fsdp:
        return known | {
            "with fsdp: nothing is sharded: each GPU keeps 1/n": (
                lambda: state_of(outside, experts / ep, adamw)
            ),
            "with fsdp: the experts are divided by n ep: n GPUs keep each of them once": (
                lambda: state_of(outside / n, experts / n / ep, adamw / n)
            ),
            "with fsdp: the experts are divided by ep alone: their replicas shard them too": (
                lambda: state_of(outside / n, experts / ep, adamw / n)
            ),
            "with fsdp: all is divided by the number of groups, n / ep: it is sharded over n": (
                lambda: state_of(outside * ep / n, experts * ep / n, adamw * ep / n)
            ),
            "with fsdp: only the optimizer's state is sharded: so are weights and gradients": (
                lambda: torch.cat([4 * tensor([outside + experts / ep] * 2), right[2:]])
            ),
            "with fsdp: AdamW's moments are not sharded": (
                lambda: state_of(outside / n, experts / n, adamw)
            ),
        }
    return known | {
        "without fsdp: each GPU keeps all experts: its group shares them, ep": (
            lambda: state_of(outside, experts, adamw)
        ),
        "without fsdp: the experts are divided by n: groups are replicas, so divide by ep": (
            lambda: state_of(outside, experts / n, adamw)
        ),
        "without fsdp: the experts are divided by the number of groups: the GPUs *of* a group "
        "share them, ep": lambda: state_of(outside, experts * ep / n, adamw),
        "without fsdp: all is divided by ep: only experts are": (
            lambda: state_of(outside / ep, experts / ep, adamw / ep)
        ),
        "without fsdp: all is divided by n: replicas keep everything but the experts of others": (
            lambda: state_of(outside / n, experts / n, adamw / n)
        ),
    }


def check_state(answer: Answer) -> None:
    for is_fsdp in (False, True):
        case = (*MODEL, 32, 8, is_fsdp)
        judge(answer, case, reference_state(*case), STATE, known_states(*case))
    cases = {
        "for one GPU": (*MODEL, 1, 1, False),
        "for dp alone, ep = 1": (*MODEL, 16, 1, False),
        "for fsdp alone, ep = 1": (*MODEL, 16, 1, True),
        "for ep alone, n = ep": (*MODEL, 16, 16, False),
        "for a model without experts": (1_000_000, 0, 90_000, 8, 1, True),
        "where AdamW updates all outside the experts": (1_000_000, 0, 1_000_000, 8, 1, False),
        "for 100B parameters": (4 * 10**9, 96 * 10**9, 10**8, 512, 16, False),
    }
    judge_cases(answer, cases, reference_state)


# ---- step 2: activations -------------------------------------------------------------------------


def blocks() -> tuple:
    """Return what blocks save and need, where each known mistake shows."""
    return tensor([900, 1450, 1300, 700, 300]), tensor([640, 160, 340, 500, 120]), 24, 210.0, 512


def reference_activations(
    saved: Tensor, backward: Tensor, width: int, ends: float, tokens: int, checkpointing: bool
) -> Tensor:
    if checkpointing:
        return tokens * (ends + 4 * width * len(saved) + (saved + backward).max())
    return tokens * (ends + saved.sum() + backward.max())


def known_activations(
    saved: Tensor, backward: Tensor, width: int, ends: float, tokens: int, checkpointing: bool
) -> KnownMistakes:
    B, inputs = len(saved), 4 * width * len(saved)
    right = reference_activations(saved, backward, width, ends, tokens, checkpointing)
    case = saved, backward, width, ends, tokens
    known = {
        "for one token: multiply by the tokens": lambda: right / tokens,
        "lacks the bytes outside the blocks, `ends`": lambda: right - tokens * ends,
        "counts `ends` once for each block": lambda: right + tokens * ends * (B - 1),
        "counts `ends` once, not for each token": lambda: right - (tokens - 1) * ends,
    }
    if checkpointing:
        recomputed = (saved + backward).max()
        return known | {
            "with checkpointing: equals that without: a block keeps only its input": (
                lambda: reference_activations(*case, False)
            ),
            "with checkpointing: lacks the recomputed tensors: backward needs them, one block at a "
            "time": lambda: tokens * (ends + inputs + backward.max()),
            "with checkpointing: lacks the gradients of the block in its backward pass": (
                lambda: tokens * (ends + inputs + saved.max())
            ),
            "with checkpointing: lacks the blocks' inputs": (lambda: tokens * (ends + recomputed)),
            "with checkpointing: counts one input: every block keeps its own": (
                lambda: tokens * (ends + 4 * width + recomputed)
            ),
            "with checkpointing: an input has 1 byte for each number: it is fp32": (
                lambda: tokens * (ends + width * B + recomputed)
            ),
            "with checkpointing: an input has 2 bytes for each number: it is fp32": (
                lambda: tokens * (ends + 2 * width * B + recomputed)
            ),
            "with checkpointing: adds the largest `saved` and the largest `backward`, of different "
            "blocks: take the maximum of their sum": (
                lambda: tokens * (ends + inputs + saved.max() + backward.max())
            ),
            "with checkpointing: recomputes all blocks at once: it is one at a time": (
                lambda: tokens * (ends + inputs + saved.sum() + backward.max())
            ),
        }
    return known | {
        "without checkpointing: adds the gradients of all blocks: they exist one block at a time": (
            lambda: tokens * (ends + saved.sum() + backward.sum())
        ),
        "without checkpointing: lacks the gradients of the block in its backward pass": (
            lambda: tokens * (ends + saved.sum())
        ),
        "without checkpointing: keeps the largest block alone: all blocks save": (
            lambda: tokens * (ends + saved.max() + backward.max())
        ),
        "without checkpointing: takes the largest `saved + backward`: all blocks save": (
            lambda: tokens * (ends + (saved + backward).max())
        ),
        "without checkpointing: adds the blocks' inputs: they are among what is saved": (
            lambda: tokens * (ends + inputs + saved.sum() + backward.max())
        ),
        "without checkpointing: frees what backward has used: count it as kept, an upper bound": (
            lambda: tokens * (ends + (saved.cumsum(0) + backward).max())
        ),
        "without checkpointing: equals that with it": lambda: reference_activations(*case, True),
        "without checkpointing: takes the gradients of the last block: the fullest moment counts": (
            lambda: tokens * (ends + saved.sum() + backward[-1])
        ),
    }


def check_activations(answer: Answer) -> None:
    for checkpointing in (False, True):
        case = (*blocks(), checkpointing)
        expected = reference_activations(*case)
        name = "with checkpointing it" if checkpointing else "without checkpointing it"
        judge(answer, case, expected, (name,), known_activations(*case))
    saved, backward, *rest = blocks()
    cases = {}
    for checkpointing in (False, True):
        how = "with checkpointing" if checkpointing else "without checkpointing"
        cases[f"for one block, {how}"] = (saved[:1], backward[:1], *rest, checkpointing)
        cases[f"for one token, {how}"] = (saved, backward, 24, 210.0, 1, checkpointing)
        last = saved.flip(0), backward.flip(0)
        cases[f"where the blocks are in another order, {how}"] = (*last, *rest, checkpointing)
    judge_cases(answer, cases, reference_activations)


# ---- step 3: bytes sent --------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter")


def reference_sent(
    outside: int, experts: int, n: int, ep: int, micro_batches: int, is_fsdp: bool
) -> Tensor:
    return sent_of(ring(n) * outside + ring(n // ep) * experts / ep, micro_batches, is_fsdp)


def ring(m: int) -> float:
    return (m - 1) / m


def sent_of(parameters: float, micro_batches: int, is_fsdp: bool) -> Tensor:
    """Return the bytes sent, from the parameters that each GPU sends in a reduce-scatter."""
    if is_fsdp:
        return tensor([0, 2 * 2 * micro_batches * parameters, 4 * micro_batches * parameters])
    return tensor([2 * 4 * parameters, 0, 0])


def known_sent(
    outside: int, experts: int, n: int, ep: int, micro_batches: int, is_fsdp: bool
) -> KnownMistakes:
    case = outside, experts, n, ep, micro_batches
    right, replicas = reference_sent(*case, is_fsdp), n // ep

    def counted(parameters: float) -> Tensor:
        return sent_of(parameters, micro_batches, is_fsdp)

    known = {
        "the tensors' whole bytes: a GPU sends (m - 1) / m of them": (
            lambda: counted(outside + experts / ep)
        ),
        "the experts are sent to all n: only n / ep GPUs hold the same ones": (
            lambda: counted(ring(n) * (outside + experts / ep))
        ),
        "each GPU sends all experts: it has experts / ep of them": (
            lambda: counted(ring(n) * outside + ring(replicas) * experts)
        ),
        "the experts are divided by n: what is sent has its whole size, experts / ep": (
            lambda: counted(ring(n) * outside + ring(replicas) * experts / n)
        ),
        "the experts are left out: their replicas exchange them too": (
            lambda: counted(ring(n) * outside)
        ),
        "an expert's group has ep GPUs: its replicas are n / ep": (
            lambda: counted(ring(n) * outside + ring(ep) * experts / ep)
        ),
        "all are replicated on n / ep: parameters outside the experts on n": (
            lambda: counted(ring(replicas) * (outside + experts / ep))
        ),
        "the numbers of parameters: count bytes": lambda: right / 4,
        "the bytes that all GPUs send: return those of one": lambda: right * n,
    }
    if is_fsdp:
        part = torch.diag(tensor([1, 1, 1]))
        return known | {
            "with fsdp: the same as without: weights are gathered, gradients reduce-scattered": (
                lambda: reference_sent(*case, False)
            ),
            "with fsdp: ignores the micro-batches: each gathers again": (
                lambda: reference_sent(*case[:4], 1, True)
            ),
            "with fsdp: weights are gathered once: forward and backward each gather": (
                lambda: right - part[1] * right[1] / 2
            ),
            "with fsdp: the weights are gathered in fp32: bf16 has 2 bytes": (
                lambda: right + part[1] * right[1]
            ),
            "with fsdp: gradients are sent in bf16: they are fp32": (
                lambda: right - part[2] * right[2] / 2
            ),
            "with fsdp: gradients are sent once a step: they are for each micro-batch": (
                lambda: right - part[2] * right[2] * (1 - 1 / micro_batches)
            ),
            "with fsdp: adds an all-reduce: the reduce-scatter has summed the gradients": (
                lambda: right + reference_sent(*case, False)
            ),
        }
    return known | {
        "without fsdp: an all-reduce sends 2 (m - 1) / m, not (m - 1) / m": lambda: right / 2,
        "without fsdp: an all-reduce for each micro-batch: it is once a step": (
            lambda: right * micro_batches
        ),
        "without fsdp: the same as with it: replicas do an all-reduce": (
            lambda: reference_sent(*case, True)
        ),
    }


def check_sent(answer: Answer) -> None:
    for is_fsdp in (False, True):
        case = (MODEL[0], MODEL[1], 32, 8, 3, is_fsdp)
        judge(answer, case, reference_sent(*case), COLLECTIVES, known_sent(*case))
    cases = {
        "for one GPU, which sends nothing": (*MODEL[:2], 1, 1, 3, False),
        "for dp alone, ep = 1": (*MODEL[:2], 16, 1, 3, False),
        "for fsdp alone, ep = 1": (*MODEL[:2], 16, 1, 3, True),
        "where experts have no replicas, n = ep": (*MODEL[:2], 16, 16, 3, False),
        "for a model without experts": (MODEL[0], 0, 8, 1, 3, True),
        "for one micro-batch": (*MODEL[:2], 32, 8, 1, True),
    }
    judge_cases(answer, cases, reference_sent)


# ---- step 4: seconds -----------------------------------------------------------------------------

PARTS = ("computing", "waiting", "hidden", "the step")
WAITS = torch.tensor([False, True, False, True])


def work(hidden: float = 1.0) -> tuple:
    """Return the arguments of step 4 without checkpointing; `hidden` scales what runs beside."""
    sent = tensor([40e9 * hidden, 70e9, 9e9 * hidden, 20e9])
    return 8192, 9e10, 312e12, 0.4, False, sent, tensor([2e11, 1e10, 1.6e10, 2e10]), WAITS


def reference_seconds(
    tokens: int,
    flops_per_token: float,
    peak: float,
    utilization: float,
    checkpointing: bool,
    sent: Tensor,
    speed: Tensor,
    waits: Tensor,
) -> Tensor:
    repeats = 1 + checkpointing / 3
    computing = tokens * flops_per_token * repeats / (peak * utilization)
    times = (sent / speed).double()
    return parts_of(computing, times[waits].sum().item(), times[~waits].sum().item())


def parts_of(computing: float, waiting: float, hidden: float) -> Tensor:
    return tensor([computing, waiting, hidden, max(computing + waiting, hidden)])


def known_seconds(*case) -> KnownMistakes:
    """Return the mistakes of one case. Some of them give the right result in another one."""
    tokens, _, _, utilization, checkpointing, sent, speed, waits = case
    computing, waiting, hidden, _ = reference_seconds(*case).tolist()

    def with_step(seconds: float) -> Tensor:
        return tensor([computing, waiting, hidden, seconds])

    def with_computing(seconds: float) -> Tensor:
        return parts_of(seconds, waiting, hidden)

    known = {
        "computing: ignores the utilization: a GPU reaches a part of its peak": (
            lambda: with_computing(computing * utilization)
        ),
        "computing: multiplies by the utilization: divide by it": (
            lambda: with_computing(computing * utilization**2)
        ),
        "computing: is for one token": lambda: with_computing(computing / tokens),
        "waiting and hidden are exchanged: where waits is true the computation waits": (
            lambda: parts_of(computing, hidden, waiting)
        ),
        "waiting and hidden: divides all bytes by one speed: each collective has its own": (
            lambda: parts_of(
                computing,
                (sent[waits].sum() / speed[waits].mean()).item(),
                (sent[~waits].sum() / speed[~waits].mean()).item(),
            )
        ),
        "waiting and hidden: takes the longest collective: they follow one another": (
            lambda: parts_of(
                computing,
                (sent / speed)[waits].max().item(),
                (sent / speed)[~waits].max().item(),
            )
        ),
        "waiting and hidden: multiplies bytes by speed: divide": (
            lambda: parts_of(
                computing,
                (sent * speed)[waits].sum().item(),
                (sent * speed)[~waits].sum().item(),
            )
        ),
        "the step: adds what is hidden: it runs beside the computation": (
            lambda: with_step(computing + waiting + hidden)
        ),
        "the step: does not wait": lambda: with_step(max(computing, hidden)),
        "the step: hidden collectives run beside computing alone, and then all wait: what runs "
        "beside does so for the whole step": lambda: with_step(max(computing, hidden) + waiting),
        "the step: hides what is waited for too": (
            lambda: with_step(max(computing, waiting + hidden))
        ),
        "the step: is the longest of the three: computing and waiting follow one another": (
            lambda: with_step(max(computing, waiting, hidden))
        ),
        "the step: ignores what is hidden: it may take longer than the rest": (
            lambda: with_step(computing + waiting)
        ),
    }
    if checkpointing:
        plain = computing * 3 / 4
        known |= {
            "computing: ignores checkpointing, which computes the forward pass twice": (
                lambda: with_computing(plain)
            ),
            "computing: checkpointing doubles it: only the forward pass, a third, is repeated": (
                lambda: with_computing(2 * plain)
            ),
            "computing: checkpointing adds a half: forward is a third of the whole": (
                lambda: with_computing(1.5 * plain)
            ),
        }
    return known


def judge_seconds(answer: Answer, case: tuple) -> None:
    expected = reference_seconds(*case)
    known = {
        message: make
        for message, make in known_seconds(*case).items()
        if not agrees(make(), expected)
    }
    judge(answer, case, expected, PARTS, known)


def with_checkpointing(case: tuple) -> tuple:
    return (*case[:4], True, *case[5:])


def check_seconds(answer: Answer) -> None:
    judge_seconds(answer, work())  # waiting is longer than computing, hidden is shortest
    judge_seconds(answer, work(hidden=25.0))  # hidden is longer than both together
    judge_seconds(answer, with_checkpointing(work()))
    tokens, flops, peak, utilization, _, sent, speed, waits = work()
    rest = tokens, flops, peak, utilization, False
    cases = {
        "without collectives": (*rest, sent[:0], speed[:0], waits[:0]),
        "for one collective, which waits": (*rest, sent[1:2], speed[1:2], waits[1:2]),
        "for one collective, which is hidden": (*rest, sent[:1], speed[:1], waits[:1]),
        "where nothing is sent": (*rest, 0 * sent, speed, waits),
    }
    judge_cases(answer, cases, reference_seconds)


# ---- step 5: the smallest cluster ----------------------------------------------------------------


def models() -> tuple:
    """Return sharded and fixed bytes of models, a capacity and a limit."""
    sharded = tensor([30, 100, 100, 640, 2000, 9, 100, 1e6, 74, 70, 3000])
    return sharded, tensor([5, 10, 35, 15, 20, 40, 33, 2, 0, 0, 4]), 35.0, 64


def reference_clusters(sharded: Tensor, fixed: Tensor, capacity: float, limit: int) -> Tensor:
    return clusters(lambda n: sharded / n + fixed <= capacity, len(sharded), limit)


def clusters(fits, M: int, limit: int, numbers: Sequence[int] | None = None) -> Tensor:
    """Return the first number n for which fits(n) (M,) is true, 0 where there is none."""
    result = torch.zeros(M, dtype=torch.long)
    for n in numbers or [1 << i for i in range(limit.bit_length())]:
        result = torch.where((result == 0) & fits(n), n, result)
    return result


def known_clusters(sharded: Tensor, fixed: Tensor, capacity: float, limit: int) -> KnownMistakes:
    right, M = reference_clusters(sharded, fixed, capacity, limit), len(sharded)
    need = (sharded / (capacity - fixed)).clamp(min=0)

    def by(fits, numbers=None, limit=limit):
        return lambda: clusters(fits, M, limit, numbers)

    return {
        "is the number of GPUs for the sharded bytes alone: every GPU needs `fixed` too": by(
            lambda n: sharded / n <= capacity
        ),
        "shards `fixed` too: every GPU needs all of it": by(
            lambda n: (sharded + fixed) / n <= capacity
        ),
        "shards nothing": by(lambda n: sharded + fixed <= capacity),
        "refuses what fits exactly: `capacity` may be used up": by(
            lambda n: sharded / n + fixed < capacity
        ),
        "tries other numbers than 1, 2, 4, 8, ...: the smallest power of two": by(
            lambda n: sharded / n + fixed <= capacity, list(range(1, limit + 1))
        ),
        "begins with 2 GPUs: one may be enough": lambda: torch.where(right == 1, 2, right),
        "stops before `limit`: that number is allowed": by(
            lambda n: sharded / n + fixed <= capacity, limit=limit // 2
        ),
        "exceeds `limit`: return 0 there": by(
            lambda n: sharded / n + fixed <= capacity, limit=1 << 24
        ),
        "returns `limit` where no number is enough: return 0": (
            lambda: torch.where(right == 0, limit, right)
        ),
        "returns -1 where no number is enough: return 0": (
            lambda: torch.where(right == 0, -1, right)
        ),
        "is the exponent: return 2 to its power": (
            lambda: torch.where(right > 0, right.double().log2(), 0).long()
        ),
        "rounds down: fewer GPUs than needed do not fit": (
            lambda: torch.where(
                right > 0, 2 ** need.clamp(min=1).log2().floor().clamp(max=60), 0
            ).long()
        ),
        "is the largest number: return the smallest that fits": (
            lambda: torch.where(right > 0, limit, 0)
        ),
    }


def check_clusters(answer: Answer) -> None:
    def smallest(*case, when: str = "") -> Tensor:
        result = answer(*case, when=when)
        expect_shape(result, tuple(case[0].shape), when=when)
        expect_integers(result, "numbers of GPUs")
        return result.long()

    case = models()
    result, expected = smallest(*case), reference_clusters(*case)
    if not torch.equal(result, expected):
        for message, make in known_clusters(*case).items():
            if torch.equal(result, make()):
                raise Mistake(message)
        m = int((result != expected).nonzero()[0])
        sharded, fixed = case[0][m], case[1][m]
        raise Mistake(
            f"model {m}, with {sharded:g} bytes sharded and {fixed:g} fixed, is given "
            f"{int(result[m])} GPUs, but {int(expected[m])} is correct"
        )
    sharded, fixed, capacity, limit = case
    cases = {
        "for one model": (sharded[:1], fixed[:1], capacity, limit),
        "for limit = 1": (sharded, fixed, capacity, 1),
        "where the limit is no power of two": (sharded, fixed, capacity, 100),
        "for sizes in GB": (sharded * 1e9, fixed * 1e9, capacity * 1e9, limit),
        "where nothing fits": (sharded, fixed + 99, capacity, limit),
    }
    for when, case in cases.items():
        if not torch.equal(smallest(*case, when=when), reference_clusters(*case)):
            raise Mistake(f"right in general, but wrong {when}")


# ---- step 6: how much of a step 512 devices use --------------------------------------------------

TOLERANCE_FP32 = 1e-6  # a division of integers returns fp32


def random_loads(R: int = 3, L: int = 4, E: int = 8, seed: int = 3) -> Tensor:
    return torch.randint(1, 60, (R, L, E), generator=torch.Generator().manual_seed(seed))


def reference_utilization(load: Tensor, devices: int) -> Tensor:
    return utilization_of_rows(load.double().unflatten(2, (devices, -1)).sum(-1))


def utilization_of_rows(rows: Tensor, step: Tensor | None = None) -> Tensor:
    """Return the share of a step in which devices with rows (R, L, G) compute.

    `step` is the duration of the step, by default that of the slowest group.
    """
    if step is None:
        step = rows.amax(2).sum(1).max()
    return rows.sum() / (rows.size(0) * rows.size(2) * step)


def check_utilization(answer: Answer) -> None:
    def utilization(load: Tensor, devices: int, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(load, devices, when=when)
        R, L, _ = load.shape
        hints = {
            (R,): ": one number for each group; return one for all together",
            (L,): ": one number for each layer; return one for all together",
            (R, L): ": one number for each group and layer; return one for all together",
        }
        expect_shape(result, (), hints.get(tuple(result.shape), ""), when)
        if not result.is_floating_point():
            raise Mistake(
                f"must be a share, a floating-point number, but is {str(result.dtype)[6:]}"
            )
        return result

    load, G = random_loads(), 4
    result, expected = utilization(load, G).double(), reference_utilization(load, G)
    if not (result - expected).abs() < TOLERANCE_FP32:
        for message, value in known_utilizations(load.double(), G).items():
            if (result - value).abs() < TOLERANCE_FP32:
                raise Mistake(message)
        given, right = different_digits(result, expected)
        raise Mistake(f"gives {given}, but the devices compute in {right} of the step")
    one_expert = torch.zeros(3, 4, 8, dtype=torch.long)
    one_expert[..., 5] = 40
    cases = {
        "where all loads are equal": (torch.full((3, 4, 8), 7), 4),
        "where one expert gets every row": (one_expert, 4),
        "for one device per expert": (load, 8),
        "for one device per group": (load, 1),
        "for one group": (load[:1], G),
        "for one layer": (load[:, :1], G),
        "for 32 groups of 16": (random_loads(32, 3, 16), 16),
    }
    for when, case in cases.items():
        result, expected = utilization(*case, when=when).double(), reference_utilization(*case)
        if not (result - expected).abs() < TOLERANCE_FP32:
            given, right = different_digits(result, expected)
            raise Mistake(f"right in general, but gives {given} {when}, and {right} is correct")


def known_utilizations(load: Tensor, G: int) -> KnownMistakes:
    """Return wrong utilizations, by message."""
    R, L, _ = load.shape
    rows = load.unflatten(2, (G, -1)).sum(-1)  # (R, L, G)
    round_robin_rows = load.unflatten(2, (-1, G)).sum(2)
    group_times = rows.amax(2).sum(1)  # (R,), if no group waited for another
    group_shares = rows.sum((1, 2)) / (G * group_times)
    expected = utilization_of_rows(rows)
    return {
        "is inverted: the time of the step over the time of computing": 1 / expected,
        "the share of time that is *not* used": 1 - expected,
        "experts are used as devices: sum the rows of the experts that a device owns": (
            utilization_of_rows(load)
        ),
        "uses the busiest expert, not the busiest device: sum the rows of the experts that a "
        "device owns": utilization_of_rows(rows, load.amax(2).sum(1).max()),
        "experts are distributed round-robin: a device owns E / devices consecutive experts": (
            utilization_of_rows(round_robin_rows)
        ),
        "the groups do not wait for each other: the step takes as long as the slowest group": (
            utilization_of_rows(rows, group_times.mean())
        ),
        "a mean of the groups' shares: groups wait for each other, and the step takes as long as "
        "the slowest": group_shares.mean(),
        "the share of the slowest group only: the other groups compute less in the same time": (
            group_shares[group_times.argmax()]
        ),
        "a mean of the shares of layers and groups: sum the *times* of the layers first, then let "
        "the groups wait": (rows.mean(2) / rows.amax(2)).mean(),
        "every layer takes as long as the slowest one: sum the times of a group's layers": (
            utilization_of_rows(rows, L * rows.amax())
        ),
        "the groups wait for each other in each layer: they wait only at the end of the step": (
            utilization_of_rows(rows, rows.amax((0, 2)).sum())
        ),
        "devices wait only at the end of the step: the devices of a group wait for the busiest in "
        "*each* layer": utilization_of_rows(rows, rows.sum(1).max()),
        "devices are compared over all groups at once, and over the whole step": (
            utilization_of_rows(rows, rows.sum((0, 1)).max() / R)
        ),
        "the time of the slowest group is counted once: each of its devices is occupied for that "
        "time": expected * G,
        "the devices of one group are counted: divide by the number of all devices": expected * R,
        "each layer takes as long as its least busy device: the fewest rows count": (
            utilization_of_rows(rows, rows.amin(2).sum(1).max())
        ),
    }


STEPS = [
    Step("state_memory", check_state),
    Step("activation_memory", check_activations),
    Step("sent_bytes", check_sent),
    Step("step_seconds", check_seconds),
    Step("smallest_cluster", check_clusters),
    Step("utilization", check_utilization),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
