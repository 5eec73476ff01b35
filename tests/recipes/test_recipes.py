"""Each recipe of docs/MODIFYING.md, applied to a copy of the tree and run there with a tiny model.

The commands are those of the page, with more flags that make the model and the run small.
"""

import csv
import json
import math
import re
import shutil
from itertools import product

import pytest

pytestmark = pytest.mark.slow

TINY = [
    *("--n-layer", 2, "--n-head", 2, "--n-embd", 16, "--context-length", 32, "--batch-size", 4),
    *("--steps", 4, "--eval-every", 2, "--save-every", 2, "--device", "cpu"),
]
TEXT = ["--data", "text.txt"]
SPARSE = ["--attention.block-size", 4]
TINY_V1 = [*TINY, *TEXT, *SPARSE]
TINY_V2 = [*TINY_V1, "--moe.n-expert", 4]


def assert_resumes_bitwise(copy, command, run):
    """Delete the last checkpoint of a run of 4 steps, resume from step 2, and compare."""
    last = copy.path / "runs" / run / "step_000004"
    first_time = [
        (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")
    ]
    shutil.rmtree(last)
    assert "after step 2" in copy.run(f"{command} --resume")
    again = [(last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]
    assert again == first_time


SHOW_BLOCKS = """
import torch
from pathlib import Path
from nanods.training import checkpoint
model = checkpoint.load_model(checkpoint.load(Path("runs/dilated")))
_, stats = model(torch.zeros(1, 64, dtype=torch.long), inspect=True)
print([layer["blocks"][0, :, -1].tolist() for layer in stats])
"""


def test_1_a_selection_method(apply):
    copy = apply(1)
    train, sample, test = copy.recipe.commands
    copy.run(train, *TINY_V1, "--context-length", 64)
    assert math.isfinite(copy.rows("dilated")[-1]["val_loss"])
    # The last of 64 tokens is in block 15: it attends to blocks 1, 2, 4 and 8 before that.
    blocks = copy.run("python -c", SHOW_BLOCKS)
    assert json.loads(blocks) == [[[14, 13, 11, 7]] * 2] * 2
    copy.run(sample, "--max-new-tokens", 80)
    assert re.search(r"later_tokens\w*\[.*dilated.* PASSED", copy.run(test, "-vv"))


def test_2_shared_experts(apply):
    copy = apply(2)
    test, train, plan = copy.recipe.commands
    assert "1 passed" in copy.run(test)
    copy.run(train, *TINY_V2)
    assert math.isfinite(copy.rows("shared")[-1]["val_loss"])
    assert_resumes_bitwise(copy, "python train.py v2-tiny --out-dir runs/shared", "shared")
    assert "GB" in copy.run(plan, *TINY_V2)
    copy.run("python -m tests.recipes.planned v2-tiny", *TINY_V2, "--moe.n-shared", 2)


def test_3_a_fourth_modality(apply):
    copy = apply(3)
    train, sample = copy.recipe.commands
    refused = copy.run(train, "--n-embd", 128, "--device", "cpu", expect=2)
    assert "heads of width 32" in refused and "multiple of 6" in refused
    assert not (copy.path / "runs").exists()
    copy.run(train, "--steps", 20, "--device", "cpu")
    run, last = copy.path / "runs/video", copy.rows("video")[-1]
    assert last["val_recall1"] > 4 / 32  # four times chance, among 32 held-out videos
    for name in ("loss", "recall", "similarities", "neighbours"):
        assert (run / f"{name}.png").stat().st_size > 5000
    found = copy.run(sample)
    assert "video, the best of 32:" in found and "text, the best" not in found
    assert (run / "found.png").stat().st_size > 5000


def test_4_another_optimizer(apply):
    copy = apply(4)
    train, plan = copy.recipe.commands
    copy.run(train, *TINY_V2)
    assert math.isfinite(copy.rows("lion")[-1]["val_loss"])
    assert_resumes_bitwise(copy, "python train.py v2-tiny --out-dir runs/lion", "lion")
    assert "GB" in copy.run(plan, *TINY_V2)
    copy.run("python -m tests.recipes.planned v2-tiny", *TINY_V2, "--optimizer", "lion")


def test_5_own_text_with_a_bpe(apply):
    copy = apply(5)
    sources = sorted((copy.path / "nanods").rglob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    (copy.path / "my_text.txt").write_text(text, encoding="utf-8")
    train, sample = copy.recipe.commands
    copy.run(train, *TINY, *SPARSE, "--eval-every", 4)
    run = copy.path / "runs/mine"
    state = json.loads((run / "step_000004/state.json").read_text(encoding="utf-8"))
    assert len(json.loads(state["tokenizer"])["model"]["vocab"]) == 8192
    assert state["config"]["model"]["vocab_size"] == 8192
    assert 0 < copy.rows("mine")[-1]["val_bpb"] < 8 and (run / "loss.png").exists()
    assert copy.run(sample, "--max-new-tokens", 5).startswith("The ")


def test_6_a_tracker(apply):
    copy = apply(6)
    (train,) = copy.recipe.commands
    copy.run(train, *TINY_V2)
    with (copy.path / "runs/tracked/metrics.csv").open(encoding="utf-8") as file:
        tracked = [(int(step), name, float(value)) for step, name, value in csv.reader(file)]
    numbers = []
    for row in copy.rows("tracked"):
        numbers += [(row["step"], k, v) for k, v in row.items() if isinstance(v, int | float)]
    assert tracked == numbers
    names = ("ce_loss", "lr", "val_loss", "dropped")
    assert {(step, name) for step, name, _ in tracked} >= set(product((2, 4), names))
