"""What a finished run prints: its pictures, where the time went, a verdict against the published
figure, and a sample."""

import json
from pathlib import Path

from torch import nn

from nanods import config as ladder
from nanods.command_line import RUNTIME_ONLY_FIELDS
from nanods.config import Config
from nanods.training import checkpoint
from nanods.training.commands import sample_command
from nanods.training.task import Task
from nanods.training.tensorboard_log import add_pictures

EXPECTED = Path(__file__).parents[2] / "results" / "expected.json"
MAY_DIFFER = {*RUNTIME_ONLY_FIELDS, "seed", "data", "eval-every", "micro-batch", "dtype"}
"""Flags that a run may change and still be compared with the published figure."""


def print_report(config: Config, task: Task, model: nn.Module, rows: list[dict]) -> None:
    """Draw the pictures of a finished run and print its report. `rows` are the metrics of its
    steps."""
    pictures = task.draw(model, rows)
    for path in pictures:
        print(f"picture    {path}")
    if config.tensorboard:
        add_pictures(config.run_dir, rows[-1]["step"], pictures)
    seconds = rows[-1]["seconds"]
    in_optimizers = sum(row.get("optimizer_seconds", 0) for row in rows) / seconds
    print(f"time       {seconds:.0f} s of training, {in_optimizers:.0%} of it in the optimizers")
    print(verdict(config, task, rows[-1]))
    if best := describe_best(config, task, rows):
        print(best)
    print(task.show_examples(model))


def verdict(config: Config, task: Task, last: dict) -> str:
    """Compare the last evaluation with results/expected.json for this preset, data and
    configuration."""
    result = task.describe_validation(last)
    published = json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.exists() else {}
    expected = published.get(f"{config.preset}/{config.data}")
    changed = changed_flags(config)
    if changed:
        return f"got        {result}; nothing to compare with ({', '.join(changed)} changed)"
    if expected is None:
        why = f"no figure of {config.preset} on {config.data}"
        return f"got        {result}; nothing to compare with ({why})"

    tolerance, notice = expected["tolerance"], ""
    if expected["sha256"] != task.data.sha256:  # the documentation of another Python, say
        better = "higher" if task.higher_is_better else "lower"
        tolerance *= 5
        notice = f" (another version of the data: {better} is no fault)"
    target = expected[task.headline_metric]
    worse_by = last[task.headline_metric] - target
    if task.higher_is_better:
        worse_by = -worse_by
    passed = worse_by <= tolerance and (notice or worse_by >= -tolerance)
    word = "PASS" if passed else "FAIL"
    return f"expected   {target:.4f} +- {tolerance:.3f}{notice}, got {result}: {word}"


def describe_best(config: Config, task: Task, rows: list[dict]) -> str | None:
    """Say which step was the best and how to sample it; None if it was the last one."""
    state = checkpoint.best_state(config.run_dir)
    evaluated = {row["step"]: row for row in rows if task.headline_metric in row}
    if state is None or state["step"] == rows[-1]["step"] or state["step"] not in evaluated:
        return None
    step = state["step"]
    losses = [row["ce_loss"] for row in rows if row["step"]]
    before, last = losses[:step][-25:], losses[-25:]
    still_learning = not before or sum(last) / len(last) < sum(before) / len(before)
    why = "overfitting since then" if step and still_learning else "worse since then"
    command = sample_command(config.run_dir / checkpoint.BEST)
    result = task.describe_validation(evaluated[step])
    return f"best       step {step}: {result}; {why}. Sample it: {command}"


def changed_flags(config: Config) -> list[str]:
    """Return the flags that differ from the preset's and bear on the result."""
    values, defaults = ladder.flatten(config), ladder.flatten(ladder.PRESETS[config.preset])
    changed = [name for name in values if values[name] != defaults[name]]
    return [f"--{name}" for name in changed if name not in MAY_DIFFER]
