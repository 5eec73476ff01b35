"""The grader of lesson 04 finds in each wrong answer the mistake that is in it: steps 4 and 5."""

from pathlib import Path

import check_04
import grade
import pytest

from tests.lessons.wrong_answers import WrongAnswers

right = grade.load_file(Path(check_04.__file__).with_name("04_solutions.py"))
WRONG = WrongAnswers()
wrongs = WRONG.register_all

# ---- step 4 ------------------------------------------------------------------------------------------------------------------


def twins(x, group):
    return x.view(len(x) // group, group, -1).sum(0).repeat(len(x) // group, 1)


def neighbours(x, group):
    return x.view(len(x) // group, group, -1).sum(1).repeat_interleave(group, 0)


def everyone(x, group=None):
    return x.sum(0).expand_as(x)


def shared(make):
    """The right answer, with its first part made from (gradients, group, W)."""
    return lambda s, e, group: (make(s, group, len(s)), right.add_up(s, e, group)[1])


def experts(make):
    return lambda s, e, group: (right.add_up(s, e, group)[0], make(e, group, len(e)))


wrongs(
    "add_up",
    untouched=("shared is as it was", shared(lambda x, g, W: x.clone())),
    summed=("shared is the sum: the loss", shared(lambda x, g, W: everyone(x))),
    group_mean=(
        "shared is added up in each group alone: all",
        shared(lambda x, g, W: neighbours(x, g) / g),
    ),
    group_sum=(
        "in each group alone, and divided by W",
        shared(lambda x, g, W: neighbours(x, g) / W),
    ),
    copies=(
        "shared is added up over the copies of the experts alone",
        shared(lambda x, g, W: twins(x, g) / (W // g)),
    ),
    as_experts=("shared is added up as the experts are", shared(lambda x, g, W: twins(x, g) / W)),
    by_group_size=(
        "shared is divided by the size of a group",
        shared(lambda x, g, W: everyone(x) / g),
    ),
    by_groups=(
        "shared is divided by the number of groups",
        shared(lambda x, g, W: everyone(x) / (W // g)),
    ),
    not_added=("shared is divided by W, and not added up", shared(lambda x, g, W: x / W)),
    first=(
        r"shared gives -?\d\.\d+ where the mean over all 6",
        shared(lambda x, g, W: x[:1].expand_as(x) / W),
    ),
    classic=(
        "experts are divided by the number of copies, the classic",
        experts(lambda x, g, W: twins(x, g) / (W // g)),
    ),
    e_by_group=(
        "experts are divided by the size of a group: the",
        experts(lambda x, g, W: twins(x, g) / g),
    ),
    e_summed=("over their copies, and not divided", experts(lambda x, g, W: twins(x, g))),
    e_as_shared=(
        "experts are averaged over all, as what is shared",
        experts(lambda x, g, W: everyone(x) / W),
    ),
    e_all=("experts are added up over all: but", experts(lambda x, g, W: everyone(x))),
    e_groups=("are added up in each group, whose", experts(lambda x, g, W: neighbours(x, g) / W)),
    e_group_mean=(
        "are averaged in each group, whose",
        experts(lambda x, g, W: neighbours(x, g) / g),
    ),
    e_untouched=("experts are as they were", experts(lambda x, g, W: x.clone())),
    e_not_added=("divided by W, but not added up over the copies", experts(lambda x, g, W: x / W)),
    e_not_added_by_group=("size of a group, and not added up", experts(lambda x, g, W: x / g)),
    e_wrong_copies=(
        "taken from the wrong copies",
        experts(lambda x, g, W: neighbours(x, W // g) / W),
    ),
    e_first=(
        r"experts gives -?\d\.\d+, and should give",
        experts(lambda x, g, W: x[:1].expand_as(x) / W),
    ),
    one_row=("each process needs its own row", shared(lambda x, g, W: x.mean(0))),
    one_group=(
        "each process needs its own row",
        experts(lambda x, g, W: x.view(-1, g, x.size(1)).sum(0) / W),
    ),
    pairs=(
        "experts: right for 6 processes in groups of 2, but wrong for groups of one",
        experts(lambda x, g, W: twins(x, 2) / W),
    ),
    alone=(
        "shared: right for.*but wrong for one process",
        shared(lambda x, g, W: x.mean(0).expand_as(x) * (W > 1)),
    ),
    always_float=(
        "turns float64 into float32",
        lambda *a: [part.float() for part in right.add_up(*a)],
    ),
    always_double=(
        "turns float32 into float64",
        lambda s, e, g: right.add_up(s.double(), e.double(), g),
    ),
    in_place=("argument number 2 in place", lambda s, e, g: right.add_up(s, e.div_(len(e)), g)),
    one_part=(
        "returns a Tensor, not the 2 tensors shared, experts",
        lambda *a: right.add_up(*a)[0],
    ),
    swapped=(r"wrong shape: \(6, 7\), not \(6, 5\)", lambda *a: right.add_up(*a)[::-1]),
)

# ---- step 5 ------------------------------------------------------------------------------------------------------------------


def rows_of(load, devices):
    return load.unflatten(2, (devices, -1)).sum(-1).double()  # (R, L, G)


def share(rows, step):
    return rows.sum() / (rows.size(0) * rows.size(2) * step)


def of(step):
    """An answer with another length of the step, made from the devices' rows (R, L, G)."""
    return lambda load, devices: share(rows := rows_of(load, devices), step(rows))


def groups(load, devices):
    """Each group's own share (R,), and its time."""
    rows = rows_of(load, devices)
    time = rows.amax(2).sum(1)
    return rows.sum((1, 2)) / (devices * time), time


def in_turn(load, devices):
    rows = load.unflatten(2, (-1, devices)).sum(2).double()
    return share(rows, rows.amax(2).sum(1).max())


def by_layer(load, devices):
    rows = rows_of(load, devices)
    return (rows.mean(2) / rows.amax(2)).mean()


def slowest_alone(load, devices):
    shares, time = groups(load, devices)
    return shares[time.argmax()]


def busiest_expert(load, devices):
    return share(rows_of(load, devices), load.amax(2).sum(1).max())


wrongs(
    "used",
    turned=("is turned round", lambda *a: 1 / right.used(*a)),
    idle=("the share that is .not. used", lambda *a: 1 - right.used(*a)),
    experts=("experts are taken for devices", lambda load, devices: right.used(load, load.size(2))),
    busiest_expert=("counts the busiest expert", busiest_expert),
    in_turn=("experts are dealt out in turn", in_turn),
    mean_group=(
        "the groups do not wait for each other",
        of(lambda rows: rows.amax(2).sum(1).mean()),
    ),
    own_shares=("a mean of the groups' shares", lambda *a: groups(*a)[0].mean()),
    slowest_alone=("the share of the slowest group alone", slowest_alone),
    layers=("a mean of the layers' shares", by_layer),
    worst_layer=("the worst layer stands for all", of(lambda rows: rows.size(1) * rows.amax())),
    at_each_layer=("the groups meet at each layer", of(lambda rows: rows.amax((0, 2)).sum())),
    at_the_end=("devices wait at the end of the step alone", of(lambda rows: rows.sum(1).max())),
    one_device=(
        "the time of the slowest group counts once",
        lambda load, d: right.used(load, d) * d,
    ),
    one_group=("all groups have devices", lambda load, d: right.used(load, d) * len(load)),
    fewest=("the fewest rows count", of(lambda rows: rows.amin(2).sum(1).max())),
    columns=(
        "devices are pair_weights over all groups at once",
        of(lambda rows: rows.sum((0, 1)).max() / len(rows)),
    ),
    half=(r"gives 0\.\d+ where the devices use 0\.\d+", lambda *a: right.used(*a) / 2),
    integer=("a floating-point number", lambda *a: right.used(*a).round().long()),
    each_group=("one for each group, of all together", lambda *a: groups(*a)[0]),
    three_groups=(
        "right in general, but gives .* for 32 groups",
        lambda load, d: right.used(load, d) * (len(load) < 9),
    ),
    a_number=("returns a float, not a tensor", lambda *a: right.used(*a).item()),
    in_place=("argument number 1 in place", lambda load, d: right.used(load.sub_(load.min()), d)),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_mistake_gets_the_message_meant_for_it(step, message, function):
    WRONG.assert_diagnosis(check_04.STEPS, step, message, function)
