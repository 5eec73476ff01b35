"""The grader of lesson 05 diagnoses each wrong answer to step 6."""

from pathlib import Path

import grade
import pytest
import steps_05

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_05.__file__).with_name("05_solutions.py"))
WRONG = WrongAnswers()
register_all = WRONG.register_all


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
    WRONG.assert_diagnosis(steps_05.STEPS, step, message, function)
