"""Quantisation-aware training through train.py: what is trained is what is sampled and saved."""

import math

import pytest
import torch

from nanods.errors import UserError
from nanods.quantize import FakeQuantLinear, choose_kernel
from nanods.training import checkpoint
from nanods.training.finished_run import load_run
from nanods.training.quantize import quantize_run
from tests.test_train import metrics, weights


def losses(run):
    return [row["train_loss"] for row in metrics(run)]


def test_rounding_begins_at_its_step_and_changes_nothing_before(train_tiny, workspace):
    flags = ("v1-tiny", "--steps", 6, "--dtype", "fp64")
    for name, more in (("plain", ()), ("rounded", ("--quantize", "int2", "--quantize-from", 4))):
        code, _, err = train_tiny(*flags, *more, "--out-dir", name)
        assert code == 0, err
    plain, rounded = losses(workspace / "plain"), losses(workspace / "rounded")
    assert plain[:4] == rounded[:4] and plain[4] != rounded[4]
    assert all(map(math.isfinite, rounded))


@pytest.mark.parametrize(("preset", "stop"), [("v1-tiny", 3), ("v2-tiny", 5)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    train_tiny, workspace, killed_at, preset, stop
):
    """Stopped before rounding begins, and after."""
    flags = (preset, "--steps", 6, "--save-every", 2, "--quantize", "int4", "--quantize-from", 3)
    assert train_tiny(*flags, "--out-dir", "whole")[0] == 0
    with killed_at(stop):
        train_tiny(*flags, "--out-dir", "parts")
    assert train_tiny(preset, "--resume", "--out-dir", "parts")[0] == 0
    assert weights(workspace / "parts") == weights(workspace / "whole")
    assert metrics(workspace / "parts") == metrics(workspace / "whole")


def test_what_was_trained_is_what_is_loaded(train_tiny, workspace, program):
    """The loaded model rounds as training did, and INT8 from it has the same loss."""
    if choose_kernel("cpu").weight_bits != 8:
        pytest.skip("this processor multiplies weights of 7 bits")
    flags = ("v1-tiny", "--steps", 5, "--quantize", "int8", "--out-dir", "run")
    code, _, err = train_tiny(*flags)
    assert code == 0, err
    saved = checkpoint.load(workspace / "run")
    model = checkpoint.load_model(saved)
    assert isinstance(model.head, FakeQuantLinear) and model.head.weight_bits == 8

    quantize_run(
        load_run(str(workspace / "run"), "cpu"), "int8", workspace / "small", evaluate=False
    )
    real = checkpoint.load_model(checkpoint.load(workspace / "small"))
    tokens = torch.randint(256, (4, 33))
    with torch.no_grad():
        fake_loss, real_loss = (
            torch.nn.functional.cross_entropy(
                m(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()
            )
            for m in (model, real)
        )
    assert abs(fake_loss - real_loss) < 1e-6
    for run in ("run", "small"):
        code, out, err = program("sample", run, "--prompt", "7 times", "--max-new-tokens", 5)
        assert code == 0 and out.startswith("7 times"), err


def test_a_run_of_4_bits_is_not_turned_into_another_format(train_tiny, workspace):
    assert train_tiny("v0-tiny", "--steps", 2, "--quantize", "int4", "--out-dir", "run")[0] == 0
    with pytest.raises(UserError, match="trained for weights of 4 bits"):
        quantize_run(
            load_run(str(workspace / "run"), "cpu"), "int8", workspace / "small", evaluate=False
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--quantize", "int5"), "int5"),
        (("--quantize", "int8", "--quantize-from", -1), "quantize-from"),
        (("--quantize", "int8", "--mesh", "fsdp=2"), "mesh"),
        (("--quantize", "int8", "--dtype", "fp16"), "exceeds what fp16 holds"),
    ],
)
def test_mistakes_are_refused(train_tiny, flags, message):
    code, out, err = train_tiny("v1-tiny", "--steps", 2, *flags)
    assert code == 2 and message in out + err
