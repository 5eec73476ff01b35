"""Each arm of bench-ablations leaves out what its name says, and nothing stays changed."""

import math

import pytest
import torch

from nanods import gpt, moe
from nanods.bench.ablations import (
    ADDED,
    FUNCTIONS,
    GPT_STEP,
    SETTINGS,
    WHOLE,
    train_arm,
    without_norm_of,
)

STEPS = 5  # the learning rate falls in the last two


def losses(arm, step=GPT_STEP):
    return train_arm(arm, step, STEPS, seed=0, dtype=torch.float64)[1]


@pytest.fixture(scope="module")
def whole():
    return losses(WHOLE)


@pytest.mark.parametrize("arm", [*FUNCTIONS, *SETTINGS, *ADDED])
def test_each_arm_trains_another_model_on_the_same_batches(whole, arm):
    functions = gpt.apply_rope, gpt.rms_norm, moe.squared_relu
    of_arm = losses(arm, (SETTINGS | ADDED).get(arm, GPT_STEP))
    assert (gpt.apply_rope, gpt.rms_norm, moe.squared_relu) == functions
    # A head of zeros gives all bytes the same probability.
    starts_at_zero = arm != "outputs that start at zero"
    assert (of_arm[0] == pytest.approx(math.log(256))) == starts_at_zero
    assert of_arm[-1] != pytest.approx(whole[-1], rel=1e-9)


def test_norms_are_left_out_of_the_tensors_that_their_name_says():
    stream, heads = torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5)
    assert without_norm_of(3)(stream) is stream and without_norm_of(4)(heads) is heads
    assert torch.equal(without_norm_of(3)(heads, 2.0), gpt.rms_norm(heads, 2.0))
    assert torch.equal(without_norm_of(4)(stream), gpt.rms_norm(stream))
