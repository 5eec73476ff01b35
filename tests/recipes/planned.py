"""Compare the planner with a built model: `python -m tests.recipes.planned v2-tiny FLAGS`.

test_recipes.py runs it in a copy of the tree, to check what a recipe added.
"""

import sys

import pytest

from nanods.command_line import from_command_line
from nanods.planner.hardware import GPUS
from nanods.planner.search import make_job
from tests.planner.test_memory import (
    counted_flops_per_token,
    test_optimizer_state_has_the_planned_bytes,
    test_parameters_equal_those_of_the_built_model,
)

if __name__ == "__main__":
    flags = sys.argv[1:]
    test_parameters_equal_those_of_the_built_model(flags)
    test_optimizer_state_has_the_planned_bytes(flags)
    # Dense attention, since the arithmetic of selecting blocks is not part of the plan.
    config = from_command_line("", [*flags, "--attention.kind", "dense"])
    planned = make_job(config, GPUS["v100-32gb"], 1).flops_per_token
    counted = counted_flops_per_token(config)
    print(f"{planned:.0f} FLOPs per token planned, {counted:.0f} counted")
    assert planned == pytest.approx(counted, rel=1e-9)
