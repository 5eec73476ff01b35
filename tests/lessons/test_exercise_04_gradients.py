"""The grader of lesson 04 diagnoses each wrong answer to step 4."""

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
    experts_neighbours_in_blocks=(
        "summed over neighbours in blocks",
        replace_experts(lambda x, g, W: x.view(g, W // g, -1).sum(1).repeat(W // g, 1) / W),
    ),
    experts_sums_repeated_one_by_one=(
        "are in the wrong rows",
        replace_experts(
            lambda x, g, W: x.view(W // g, g, -1).sum(0).repeat_interleave(W // g, 0) / W
        ),
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


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_04.STEPS, step, message, function)
