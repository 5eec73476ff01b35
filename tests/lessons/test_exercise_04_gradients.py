"""The grader of lesson 04 diagnoses each wrong answer to steps 4 and 5."""

from pathlib import Path

import grade
import pytest
import steps_04
import torch

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_04.__file__).with_name("04_solutions.py"))
WRONG = WrongAnswers()
register_all = WRONG.register_all

# ---- step 4: average_gradients -------------------------------------------------------------------


def sum_over_replicas(x, group):
    return x.view(len(x) // group, group, -1).sum(0).repeat(len(x) // group, 1)


def sum_over_group(x, group):
    return x.view(len(x) // group, group, -1).sum(1).repeat_interleave(group, 0)


def sum_over_all(x):
    return x.sum(0).expand_as(x)


def last_element(x):
    """Return zeros with a 1 in the last element."""
    zeros = torch.zeros_like(x)
    zeros[-1, -1] = 1
    return zeros


def replace_shared(make):
    """Return the correct answer with make(gradients, group size, W) for the shared weights."""
    return lambda s, e, group: (make(s, group, len(s)), solutions.average_gradients(s, e, group)[1])


def replace_experts(make):
    """Return the correct answer with make(gradients, group size, W) for the experts."""
    return lambda s, e, group: (solutions.average_gradients(s, e, group)[0], make(e, group, len(e)))


register_all(
    "average_gradients",
    unchanged=("shared is unchanged", replace_shared(lambda x, g, W: x.clone())),
    summed=("shared is the sum: the loss", replace_shared(lambda x, g, W: sum_over_all(x))),
    group_mean=(
        "shared is averaged within each group only: all",
        replace_shared(lambda x, g, W: sum_over_group(x, g) / g),
    ),
    group_sum=(
        "shared is summed within each group only, and divided by W",
        replace_shared(lambda x, g, W: sum_over_group(x, g) / W),
    ),
    mean_over_replicas=(
        "shared is averaged over the replicas of the experts only",
        replace_shared(lambda x, g, W: sum_over_replicas(x, g) / (W // g)),
    ),
    as_experts=(
        "shared is summed as the experts are",
        replace_shared(lambda x, g, W: sum_over_replicas(x, g) / W),
    ),
    by_group_size=(
        "shared is divided by the size of a group",
        replace_shared(lambda x, g, W: sum_over_all(x) / g),
    ),
    by_groups=(
        "shared is divided by the number of groups",
        replace_shared(lambda x, g, W: sum_over_all(x) / (W // g)),
    ),
    not_summed=("shared is divided by W but not summed", replace_shared(lambda x, g, W: x / W)),
    only_process_0=(
        r"shared\[0, 0\], of process 0, is -?\d\.\d+, but -?\d\.\d+, the mean over all 6",
        replace_shared(lambda x, g, W: x[:1].expand_as(x) / W),
    ),
    divided_by_replicas=(
        "experts are divided by the number of replicas, the classic",
        replace_experts(lambda x, g, W: sum_over_replicas(x, g) / (W // g)),
    ),
    experts_by_group=(
        "experts are divided by the size of a group: the",
        replace_experts(lambda x, g, W: sum_over_replicas(x, g) / g),
    ),
    experts_summed=(
        "over their replicas, and not divided",
        replace_experts(lambda x, g, W: sum_over_replicas(x, g)),
    ),
    experts_as_shared=(
        "experts are averaged over all, as shared",
        replace_experts(lambda x, g, W: sum_over_all(x) / W),
    ),
    experts_all=(
        "experts are summed over all: but",
        replace_experts(lambda x, g, W: sum_over_all(x)),
    ),
    experts_group_sum=(
        "are summed within each group, whose",
        replace_experts(lambda x, g, W: sum_over_group(x, g) / W),
    ),
    experts_group_mean=(
        "are averaged within each group, whose",
        replace_experts(lambda x, g, W: sum_over_group(x, g) / g),
    ),
    experts_unchanged=("experts are unchanged", replace_experts(lambda x, g, W: x.clone())),
    experts_not_summed=(
        "divided by W, but not summed over the replicas",
        replace_experts(lambda x, g, W: x / W),
    ),
    experts_not_summed_by_group=(
        "size of a group, and not summed",
        replace_experts(lambda x, g, W: x / g),
    ),
    experts_wrong_replicas=(
        "summed over the wrong replicas",
        replace_experts(lambda x, g, W: sum_over_group(x, W // g) / W),
    ),
    experts_only_process_0=(
        r"experts\[0, 0\], of process 0, is -?\d\.\d+, but -?\d\.\d+ is correct",
        replace_experts(lambda x, g, W: x[:1].expand_as(x) / W),
    ),
    experts_last_wrong=(
        r"experts\[5, 6\], of process 5, is (-?\d\.\d+), but (?!\1 is)-?\d\.\d+ is correct",
        replace_experts(
            lambda x, g, W: sum_over_replicas(x, g) / W + 1e-6 * last_element(x)  # 4 digits agree
        ),
    ),
    one_row=("return a row for each process", replace_shared(lambda x, g, W: x.mean(0))),
    rows_of_one_group=(
        "return a row for each process",
        replace_experts(lambda x, g, W: x.view(-1, g, x.size(1)).sum(0) / W),
    ),
    only_groups_of_two=(
        "experts: right for 6 processes in groups of 2, but wrong for groups of one",
        replace_experts(lambda x, g, W: sum_over_replicas(x, 2) / W),
    ),
    wrong_for_one_process=(
        "shared: right for.*but wrong for one process",
        replace_shared(lambda x, g, W: x.mean(0).expand_as(x) * (W > 1)),
    ),
    returns_float32=(
        "turns float64 into float32",
        lambda *a: [part.float() for part in solutions.average_gradients(*a)],
    ),
    returns_float64=(
        "turns float32 into float64",
        lambda s, e, g: solutions.average_gradients(s.double(), e.double(), g),
    ),
    in_place=(
        "argument number 2 in place",
        lambda s, e, g: solutions.average_gradients(s, e.div_(len(e)), g),
    ),
    returns_one_tensor=(
        "returns a Tensor, not the 2 tensors shared, experts",
        lambda *a: solutions.average_gradients(*a)[0],
    ),
    outputs_swapped=(
        r"wrong shape: \(6, 7\), not \(6, 5\)",
        lambda *a: solutions.average_gradients(*a)[::-1],
    ),
)

# ---- step 5: utilization -------------------------------------------------------------------------


def rows_of(load, devices):
    return load.unflatten(2, (devices, -1)).sum(-1).double()  # (R, L, G)


def utilization(rows, step):
    return rows.sum() / (rows.size(0) * rows.size(2) * step)


def replace_step(step_time):
    """Return an answer in which a step takes step_time(rows of the devices (R, L, G))."""

    def answer(load, devices):
        rows = rows_of(load, devices)
        return utilization(rows, step_time(rows))

    return answer


def shares_and_times(load, devices):
    """Return each group's share (R,) and its time (R,)."""
    rows = rows_of(load, devices)
    time = rows.amax(2).sum(1)
    return rows.sum((1, 2)) / (devices * time), time


def round_robin(load, devices):
    rows = load.unflatten(2, (-1, devices)).sum(2).double()
    return utilization(rows, rows.amax(2).sum(1).max())


def mean_over_layers(load, devices):
    rows = rows_of(load, devices)
    return (rows.mean(2) / rows.amax(2)).mean()


def only_slowest_group(load, devices):
    shares, time = shares_and_times(load, devices)
    return shares[time.argmax()]


def busiest_expert(load, devices):
    return utilization(rows_of(load, devices), load.amax(2).sum(1).max())


register_all(
    "utilization",
    inverted=("is inverted", lambda *a: 1 / solutions.utilization(*a)),
    idle=("the share of time that is .not. used", lambda *a: 1 - solutions.utilization(*a)),
    experts=(
        "experts are used as devices",
        lambda load, devices: solutions.utilization(load, load.size(2)),
    ),
    busiest_expert=("uses the busiest expert", busiest_expert),
    round_robin=("experts are distributed round-robin", round_robin),
    mean_group=(
        "the groups do not wait for each other",
        replace_step(lambda rows: rows.amax(2).sum(1).mean()),
    ),
    mean_of_shares=("a mean of the groups' shares", lambda *a: shares_and_times(*a)[0].mean()),
    only_slowest_group=("the share of the slowest group only", only_slowest_group),
    mean_over_layers=("a mean of the shares of layers", mean_over_layers),
    slowest_layer=(
        "every layer takes as long as the slowest one",
        replace_step(lambda rows: rows.size(1) * rows.amax()),
    ),
    groups_wait_in_each_layer=(
        "the groups wait for each other in each layer",
        replace_step(lambda rows: rows.amax((0, 2)).sum()),
    ),
    wait_at_the_end=(
        "devices wait only at the end of the step",
        replace_step(lambda rows: rows.sum(1).max()),
    ),
    one_device=(
        "the time of the slowest group is counted once",
        lambda load, d: solutions.utilization(load, d) * d,
    ),
    one_group=(
        "the devices of one group are counted",
        lambda load, d: solutions.utilization(load, d) * len(load),
    ),
    least_busy=("the fewest rows count", replace_step(lambda rows: rows.amin(2).sum(1).max())),
    sum_over_groups=(
        "devices are compared over all groups at once",
        replace_step(lambda rows: rows.sum((0, 1)).max() / len(rows)),
    ),
    half=(
        r"gives 0\.\d+, but the devices compute in 0\.\d+",
        lambda *a: solutions.utilization(*a) / 2,
    ),
    returns_an_integer=(
        "a floating-point number",
        lambda *a: solutions.utilization(*a).round().long(),
    ),
    returns_each_group=("one number for each group; return", lambda *a: shares_and_times(*a)[0]),
    wrong_for_many_groups=(
        "right in general, but gives .* for 32 groups",
        lambda load, d: solutions.utilization(load, d) * (len(load) < 9),
    ),
    returns_a_float=("returns a float, not a tensor", lambda *a: solutions.utilization(*a).item()),
    in_place=(
        "argument number 1 in place",
        lambda load, d: solutions.utilization(load.sub_(load.min()), d),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_04.STEPS, step, message, function)
