"""What only a GPU can show: the same run there as on the CPU. Skipped where there is none."""

import pytest
import torch

from tests.test_train import metrics

pytestmark = pytest.mark.cuda


def losses(train_tiny, workspace, device, *options):
    code, _, err = train_tiny("v1-tiny", "--steps", 5, "--device", device, "--out-dir", device, *options)
    assert code == 0, err
    rows = metrics(workspace / device)
    return torch.tensor([*(row["train_loss"] for row in rows), rows[-1]["val_loss"]], dtype=torch.float64)


def test_in_fp64_a_run_on_the_gpu_is_the_run_on_the_cpu(train_tiny, workspace):
    options = ("--dtype", "fp64", "--compile", "off")
    gpu, cpu = (losses(train_tiny, workspace, device, *options) for device in ("cuda", "cpu"))
    assert (gpu - cpu).abs().max() < 1e-6
    assert gpu[-1] < gpu[0] - 0.1


def test_bf16_and_compile_stay_near_it(train_tiny, workspace):
    gpu = losses(train_tiny, workspace, "cuda", "--dtype", "bf16", "--compile", "on")
    cpu = losses(train_tiny, workspace, "cpu", "--dtype", "fp32")
    assert (gpu - cpu).abs().max() < 0.05
