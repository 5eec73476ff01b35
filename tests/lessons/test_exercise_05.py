"""The grader of lesson 05 diagnoses each wrong answer to steps 1 to 5.

Step 6 is in test_exercise_05_utilization.py.
"""

from pathlib import Path

import grade
import pytest
import steps_05
import torch

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_05.__file__).with_name("05_solutions.py"))
WRONG = WrongAnswers()
register_all = WRONG.register_all


def of_parts(right, part, factor=1.0, add=0.0):
    """Return the right answer with one of its numbers changed."""
    changed = right.clone()
    changed[part] = changed[part] * factor + add
    return changed


# ---- step 1: state_memory ------------------------------------------------------------------------


def state(count):
    """Return an answer with the bytes of count(...) = parameters outside, in experts, AdamW's."""

    def state_memory(*case):
        outside, experts, adamw = count(*case)
        weights = 4.0 * (outside + experts)
        return torch.tensor([weights, weights, weights + 4 * adamw], dtype=torch.float64)

    return state_memory


def with_optimizer(size):
    """Return an answer whose optimizer has size(parameters, AdamW's parameters, experts) bytes."""

    def state_memory(outside, experts, adamw, n, ep, is_fsdp):
        right = solutions.state_memory(outside, experts, adamw, n, ep, is_fsdp)
        shards = n if is_fsdp else 1
        owned = experts / (n if is_fsdp else ep)
        return of_parts(right, 2, 0, size(right[0] / 4, adamw / shards, owned))

    return state_memory


register_all(
    "state_memory",
    two_moments=("optimizer: has two numbers for each", with_optimizer(lambda p, a, e: 8 * p)),
    one_moment=("optimizer: has one number for each", with_optimizer(lambda p, a, e: 4 * p)),
    twelve=("AdamW has 12 bytes", with_optimizer(lambda p, a, e: 4 * (p - a) + 12 * a)),
    no_experts=("lacks the experts", with_optimizer(lambda p, a, e: 4 * (p - e) + 4 * a)),
    adamw_alone=("counts AdamW's parameters alone", with_optimizer(lambda p, a, e: 8 * a)),
    numbers=("the numbers of parameters", lambda *a: solutions.state_memory(*a) / 4),
    bf16=("2 bytes for a number", lambda *a: solutions.state_memory(*a) / 2),
    half=(
        "gradients and weights have 2 bytes",
        lambda *a: solutions.state_memory(*a) * torch.tensor([0.5, 0.5, 1]),
    ),
    all_gpus=("the bytes of all GPUs", lambda *a: solutions.state_memory(*a) * a[3]),
    reversed=("begins with the optimizer", lambda *a: solutions.state_memory(*a).flip(0)),
    never_fsdp=(
        "with fsdp: nothing is sharded",
        lambda *a: solutions.state_memory(*a[:5], False),
    ),
    divided_twice=(
        "are divided by n ep",
        state(lambda o, e, a, n, ep, f: (o / n, e / n / ep, a / n) if f else (o, e / ep, a)),
    ),
    by_ep_alone=(
        "are divided by ep alone",
        state(lambda o, e, a, n, ep, f: (o / n, e / ep, a / n) if f else (o, e / ep, a)),
    ),
    by_groups=(
        "with fsdp: all is divided by the number of groups",
        state(
            lambda o, e, a, n, ep, f: (
                (o / (n // ep), e / (n // ep), a / (n // ep)) if f else (o, e / ep, a)
            )
        ),
    ),
    adamw_whole=(
        "AdamW's moments are not sharded",
        state(lambda o, e, a, n, ep, f: (o / n, e / n, a) if f else (o, e / ep, a)),
    ),
    only_the_optimizer=(
        "only the optimizer's state is sharded",
        lambda o, e, a, n, ep, f: torch.cat(
            [
                solutions.state_memory(o, e, a, n, ep, False)[:2],
                solutions.state_memory(o, e, a, n, ep, f)[2:],
            ]
        ),
    ),
    all_experts=(
        "each GPU keeps all experts",
        state(lambda o, e, a, n, ep, f: (o / n, e / n, a / n) if f else (o, e, a)),
    ),
    experts_by_n=(
        "the experts are divided by n: groups",
        state(lambda o, e, a, n, ep, f: (o / n, e / n, a / n) if f else (o, e / n, a)),
    ),
    experts_by_groups=(
        "the experts are divided by the number of groups",
        state(lambda o, e, a, n, ep, f: (o / n, e / n, a / n) if f else (o, e * ep / n, a)),
    ),
    all_by_ep=(
        "all is divided by ep: only",
        state(
            lambda o, e, a, n, ep, f: [x / n for x in (o, e, a)] if f else [o / ep, e / ep, a / ep]
        ),
    ),
    all_by_n=(
        "all is divided by n: replicas",
        state(lambda o, e, a, n, ep, f: (o / n, e / n, a / n)),
    ),
    other=(
        r"gradients is [\d.]+, but [\d.]+ is correct",
        lambda *a: of_parts(solutions.state_memory(*a), 1, 0.7),
    ),
    integers=("returns int64", lambda *a: solutions.state_memory(*a).round().long()),
    sum_of_three=("wrong shape", lambda *a: solutions.state_memory(*a).sum()),
    without_experts=(
        "right in general, but wrong for a model without experts",
        lambda *a: solutions.state_memory(*a) * (a[1] > 0),
    ),
)

# ---- step 2: activation_memory -------------------------------------------------------------------


def activations(per_token, checkpointing):
    """Return an answer that is tokens * (ends + per_token(saved, backward, width)) with
    checkpointing, or without, and right otherwise."""

    def activation_memory(saved, backward, width, ends, tokens, is_on):
        if is_on != checkpointing:
            return solutions.activation_memory(saved, backward, width, ends, tokens, is_on)
        return tokens * (ends + per_token(saved, backward, width))

    return activation_memory


register_all(
    "activation_memory",
    one_token=("for one token: multiply", lambda *a: solutions.activation_memory(*a[:4], 1, a[5])),
    no_ends=(
        "lacks the bytes outside",
        lambda *a: solutions.activation_memory(*a[:3], 0.0, *a[4:]),
    ),
    ends_of_each=(
        "once for each block",
        lambda *a: solutions.activation_memory(*a[:3], len(a[0]) * a[3], *a[4:]),
    ),
    ends_once=(
        "not for each token",
        lambda *a: solutions.activation_memory(*a[:3], 0.0, *a[4:]) + a[3],
    ),
    never=("equals that without", lambda *a: solutions.activation_memory(*a[:5], False)),
    always=("equals that with it", lambda *a: solutions.activation_memory(*a[:5], True)),
    not_recomputed=(
        "lacks the recomputed tensors",
        activations(lambda s, b, C: 4 * C * len(s) + b.max(), True),
    ),
    no_gradients_beside=(
        "with checkpointing: lacks the gradients",
        activations(lambda s, b, C: 4 * C * len(s) + s.max(), True),
    ),
    no_inputs=("lacks the blocks' inputs", activations(lambda s, b, C: (s + b).max(), True)),
    one_input=("counts one input", activations(lambda s, b, C: 4 * C + (s + b).max(), True)),
    one_byte=(
        "has 1 byte for each number",
        activations(lambda s, b, C: C * len(s) + (s + b).max(), True),
    ),
    two_bytes=(
        "has 2 bytes for each number",
        activations(lambda s, b, C: 2 * C * len(s) + (s + b).max(), True),
    ),
    two_maxima=(
        "of different blocks",
        activations(lambda s, b, C: 4 * C * len(s) + s.max() + b.max(), True),
    ),
    all_recomputed=(
        "recomputes all blocks at once",
        activations(lambda s, b, C: 4 * C * len(s) + s.sum() + b.max(), True),
    ),
    all_gradients=(
        "adds the gradients of all blocks",
        activations(lambda s, b, C: s.sum() + b.sum(), False),
    ),
    no_gradients=(
        "without checkpointing: lacks the gradients",
        activations(lambda s, b, C: s.sum(), False),
    ),
    largest_block=(
        "keeps the largest block alone",
        activations(lambda s, b, C: s.max() + b.max(), False),
    ),
    largest_sum=("takes the largest .saved", activations(lambda s, b, C: (s + b).max(), False)),
    inputs_too=(
        "adds the blocks' inputs",
        activations(lambda s, b, C: 4 * C * len(s) + s.sum() + b.max(), False),
    ),
    last_gradients=(
        "takes the gradients of the last block",
        activations(lambda s, b, C: s.sum() + b[-1], False),
    ),
    freed=(
        "frees what backward has used",
        activations(lambda s, b, C: (s.cumsum(0) + b).max(), False),
    ),
    other=(
        r"without checkpointing it is [\d.]+, but [\d.]+ is correct",
        lambda *a: 0.7 * solutions.activation_memory(*a),
    ),
    for_each_block=("wrong shape", lambda s, b, C, ends, tokens, c: tokens * (ends + s + b)),
    first_block=(
        "right in general, but wrong where the blocks are in another order",
        activations(lambda s, b, C: s.sum() + b[0], False),
    ),
    one_token_only=(
        "right in general, but wrong for one token",
        lambda *a: solutions.activation_memory(*a) * (a[4] > 1),
    ),
)

# ---- step 3: sent_bytes --------------------------------------------------------------------------


def sent(parameters):
    """Return an answer from parameters(outside, experts, n, ep), those that a GPU sends."""

    def sent_bytes(outside, experts, n, ep, micro_batches, is_fsdp):
        size = 4.0 * parameters(outside, experts, n, ep)
        if is_fsdp:
            return torch.tensor([0, micro_batches * size, micro_batches * size]).double()
        return torch.tensor([2 * size, 0, 0]).double()

    return sent_bytes


def if_fsdp(change):
    """Return the right answer, changed by change(right, micro_batches) with fsdp."""

    def sent_bytes(*case):
        right = solutions.sent_bytes(*case)
        return change(right, case[4]) if case[5] else right

    return sent_bytes


def without_fsdp(factor):
    def sent_bytes(*case):
        return solutions.sent_bytes(*case) * (1 if case[5] else factor(case[4]))

    return sent_bytes


def ring(m):
    return (m - 1) / m


register_all(
    "sent_bytes",
    whole=("the tensors' whole bytes", sent(lambda o, e, n, ep: o + e / ep)),
    experts_by_all=("are sent to all n", sent(lambda o, e, n, ep: ring(n) * (o + e / ep))),
    all_experts=("sends all experts", sent(lambda o, e, n, ep: ring(n) * o + ring(n // ep) * e)),
    experts_by_n=(
        "what is sent has its whole size",
        sent(lambda o, e, n, ep: ring(n) * o + ring(n // ep) * e / n),
    ),
    no_experts=("the experts are left out", sent(lambda o, e, n, ep: ring(n) * o)),
    ring_of_ep=("has ep GPUs", sent(lambda o, e, n, ep: ring(n) * o + ring(ep) * e / ep)),
    ring_of_groups=(
        "all are replicated on n / ep",
        sent(lambda o, e, n, ep: ring(n // ep) * (o + e / ep)),
    ),
    numbers=("count bytes", lambda *a: solutions.sent_bytes(*a) / 4),
    all_gpus=("that all GPUs send", lambda *a: solutions.sent_bytes(*a) * a[2]),
    never=("with fsdp: the same as without", lambda *a: solutions.sent_bytes(*a[:5], False)),
    always=("without fsdp: the same as with it", lambda *a: solutions.sent_bytes(*a[:5], True)),
    one_micro_batch=(
        "ignores the micro-batches",
        lambda *a: solutions.sent_bytes(*a[:4], 1, a[5]),
    ),
    gathered_once=("are gathered once", if_fsdp(lambda right, m: of_parts(right, 1, 0.5))),
    fp32=("gathered in fp32", if_fsdp(lambda right, m: of_parts(right, 1, 2))),
    bf16=("sent in bf16", if_fsdp(lambda right, m: of_parts(right, 2, 0.5))),
    scattered_once=("are sent once a step", if_fsdp(lambda right, m: of_parts(right, 2, 1 / m))),
    reduced_too=(
        "adds an all-reduce",
        lambda *a: solutions.sent_bytes(*a) + a[5] * solutions.sent_bytes(*a[:5], False),
    ),
    half=("not .m - 1. / m", without_fsdp(lambda m: 0.5)),
    for_each_micro_batch=("an all-reduce for each micro-batch", without_fsdp(lambda m: m)),
    other=(
        r"all-gather is [\d.]+, but [\d.]+ is correct",
        if_fsdp(lambda right, m: of_parts(right, 1, 0.7)),
    ),
    one_number=("wrong shape", lambda *a: solutions.sent_bytes(*a).sum()),
    one_gpu=(
        "right in general, but wrong for one GPU",
        lambda *a: solutions.sent_bytes(*a) + (a[2] == 1),
    ),
)

# ---- step 4: step_seconds ------------------------------------------------------------------------


def of_work(computing=None, parts=None, step=None):
    """Return an answer with other computing(computing, case), parts(case) or step(c, w, h)."""

    def step_seconds(*case):
        right = solutions.step_seconds(*case)
        c, w, h = right[:3]
        if computing:
            c = torch.as_tensor(computing(c, case)).double()
        if parts:
            w, h = (torch.as_tensor(part).double() for part in parts(*case[5:]))
        whole = step(c, w, h) if step else torch.maximum(c + w, h)
        return torch.stack([c, w, h, whole])

    return step_seconds


def total(sizes, speeds):
    return sizes.sum() / speeds.mean() if len(sizes) else torch.tensor(0.0)


def longest(times):
    return times.max() if len(times) else torch.tensor(0.0)


register_all(
    "step_seconds",
    at_peak=("ignores the utilization", of_work(lambda c, a: c * a[3])),
    multiplied=("multiplies by the utilization", of_work(lambda c, a: c * a[3] ** 2)),
    one_token=("computing: is for one token", of_work(lambda c, a: c / a[0])),
    exchanged=(
        "waiting and hidden are exchanged",
        lambda *a: solutions.step_seconds(*a[:7], ~a[7]),
    ),
    one_speed=(
        "divides all bytes by one speed",
        of_work(parts=lambda s, v, w: (total(s[w], v[w]), total(s[~w], v[~w]))),
    ),
    longest=(
        "takes the longest collective",
        of_work(parts=lambda s, v, w: (longest((s / v)[w]), longest((s / v)[~w]))),
    ),
    product=(
        "multiplies bytes by speed",
        of_work(parts=lambda s, v, w: ((s * v)[w].sum(), (s * v)[~w].sum())),
    ),
    all_added=("adds what is hidden", of_work(step=lambda c, w, h: c + w + h)),
    does_not_wait=("does not wait", of_work(step=lambda c, w, h: torch.maximum(c, h))),
    all_hidden=("hides what is waited for", of_work(step=lambda c, w, h: torch.maximum(c, w + h))),
    hidden_first=(
        "run beside computing alone",
        of_work(step=lambda c, w, h: torch.maximum(c, h) + w),
    ),
    longest_of_three=(
        "is the longest of the three",
        of_work(step=lambda c, w, h: torch.stack([c, w, h]).max()),
    ),
    never_hidden_long=("ignores what is hidden", of_work(step=lambda c, w, h: c + w)),
    no_checkpointing=(
        "ignores checkpointing",
        lambda *a: solutions.step_seconds(*a[:4], False, *a[5:]),
    ),
    doubled=("checkpointing doubles it", of_work(lambda c, a: c * (1.5 if a[4] else 1))),
    one_half=("adds a half", of_work(lambda c, a: c * (1.125 if a[4] else 1))),
    other=(
        r"waiting is [\d.]+, but [\d.]+ is correct",
        lambda *a: of_parts(solutions.step_seconds(*a), 1, 0.7),
    ),
    three=("wrong shape", lambda *a: solutions.step_seconds(*a)[:3]),
    no_collectives=(
        "right in general, but wrong without collectives",
        lambda *a: solutions.step_seconds(*a) + (len(a[5]) == 0),
    ),
)

# ---- step 5: smallest_cluster --------------------------------------------------------------------


def cluster(fits, numbers=None):
    """Return an answer with the first number n for which fits(sharded, fixed, capacity, n)."""

    def smallest_cluster(sharded, fixed, capacity, limit):
        result = torch.zeros(len(sharded), dtype=torch.long)
        for n in numbers(limit) if numbers else powers(limit):
            result = torch.where((result == 0) & fits(sharded, fixed, capacity, n), n, result)
        return result

    return smallest_cluster


def powers(limit):
    return [1 << i for i in range(limit.bit_length())]


def right_fit(sharded, fixed, capacity, n):
    return sharded / n + fixed <= capacity


def changed(change):
    """Return the right answer after change(right, limit)."""
    return lambda *a: change(solutions.smallest_cluster(*a), a[3])


def rounded_down(sharded, fixed, capacity, limit):
    right = solutions.smallest_cluster(sharded, fixed, capacity, limit)
    exponent = (sharded / (capacity - fixed)).clamp(min=1).log2().floor()
    return torch.where(right > 0, 2**exponent, 0).long()


register_all(
    "smallest_cluster",
    no_fixed=("sharded bytes alone", cluster(lambda s, f, c, n: s / n <= c)),
    fixed_sharded=("shards .fixed. too", cluster(lambda s, f, c, n: (s + f) / n <= c)),
    nothing_sharded=("shards nothing", cluster(lambda s, f, c, n: s + f <= c)),
    strict=("refuses what fits exactly", cluster(lambda s, f, c, n: s / n + f < c)),
    all_numbers=(
        "tries other numbers than",
        cluster(right_fit, lambda limit: range(1, limit + 1)),
    ),
    from_two=("begins with 2 GPUs", cluster(right_fit, lambda limit: powers(limit)[1:] or [2])),
    below_limit=("stops before", cluster(right_fit, lambda limit: powers(limit - 1))),
    beyond_limit=("exceeds .limit", cluster(right_fit, lambda limit: powers(1 << 24))),
    limit_instead=("returns .limit. where", changed(lambda r, n: torch.where(r == 0, n, r))),
    minus_one=("returns -1 where", changed(lambda r, n: torch.where(r == 0, -1, r))),
    exponent=("is the exponent", changed(lambda r, n: r.clamp(min=1).log2().long())),
    rounded_down=("rounds down", rounded_down),
    largest=("is the largest number", changed(lambda r, n: torch.where(r > 0, n, 0))),
    other=(
        r"model 0, with 30 bytes sharded and 5 fixed, is given 7 GPUs, but 1 is correct",
        changed(lambda r, n: torch.full_like(r, 7)),
    ),
    floats=("must be integers", changed(lambda r, n: r.double())),
    one_for_all=("wrong shape", changed(lambda r, n: r.max())),
    odd_limit=(
        "right in general, but wrong where the limit is no power of two",
        cluster(right_fit, lambda limit: [*powers(limit), limit]),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_05.STEPS, step, message, function)
