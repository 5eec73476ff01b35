"""Tests that need a GPU: a run on the GPU equals the same run on the CPU. Skipped without one."""

import pytest
import torch

from nanods.moe import experts_loop
from nanods.moe_kernel import experts_grouped, run_experts
from nanods.quantize import integer_product
from tests.test_train import metrics

pytestmark = [pytest.mark.cuda, pytest.mark.pictures]


def losses(preset, train_tiny, workspace, device, *options):
    """Train for 5 steps; return the training loss of each step and the final validation loss."""
    code, _, err = train_tiny(
        preset, "--steps", 5, "--device", device, "--out-dir", device, *options
    )
    assert code == 0, err
    assert (workspace / device / "loss.png").exists()
    rows = metrics(workspace / device)
    return torch.tensor(
        [*(row["train_loss"] for row in rows), rows[-1]["val_loss"]], dtype=torch.float64
    )


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_in_fp64_a_run_on_the_gpu_equals_the_run_on_the_cpu(train_tiny, workspace, preset):
    options = ("--dtype", "fp64", "--compile", "off")
    gpu = losses(preset, train_tiny, workspace, "cuda", *options)
    cpu = losses(preset, train_tiny, workspace, "cpu", *options)
    assert (gpu - cpu).abs().max() < 1e-6
    assert gpu[-1] < gpu[0] - 0.1


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_a_compiled_bf16_run_on_the_gpu_is_close_to_fp32_on_the_cpu(train_tiny, workspace, preset):
    gpu = losses(preset, train_tiny, workspace, "cuda", "--dtype", "bf16", "--compile", "on")
    cpu = losses(preset, train_tiny, workspace, "cpu", "--dtype", "fp32")
    assert (gpu - cpu).abs().max() < 0.05


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_a_run_resumed_on_the_gpu_goes_on_as_if_it_had_not_stopped(
    train_tiny, workspace, killed_at, preset
):
    """Not bitwise: a GPU may add in any order."""
    flags = ("--device", "cuda", "--dtype", "fp64", "--compile", "off", "--steps", 6)
    flags += ("--save-every", 3)
    assert train_tiny(preset, *flags, "--out-dir", "whole")[0] == 0
    with killed_at(4):
        train_tiny(preset, *flags, "--out-dir", "cut")
    code, _, err = train_tiny(preset, *flags, "--resume", "--out-dir", "cut")
    assert code == 0, err
    whole, cut = (metrics(workspace / name)[-1]["val_loss"] for name in ("whole", "cut"))
    assert abs(whole - cut) < 1e-6


def test_experts_of_any_width_run_on_the_gpu():
    """grouped_mm wants rows of a multiple of 16 bytes; other widths take another route."""
    x, weights = torch.randn(9, 10, device="cuda"), torch.ones(9, 1, device="cuda")
    experts = torch.arange(9, device="cuda")[:, None] % 3
    up, out = torch.randn(3, 20, 10, device="cuda"), torch.randn(3, 10, 20, device="cuda")
    expected = experts_loop(x, weights, experts, up, out)
    with torch.autocast("cuda", torch.bfloat16):
        y = run_experts(x, weights, experts, up, out)
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(("rows", "width", "columns"), [(5, 20, 7), (40, 64, 48), (1, 192, 768)])
def test_products_of_integers_on_the_gpu_are_exact(rows, width, columns):
    a = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    b = torch.randint(-127, 128, (columns, width), dtype=torch.int8)
    product = integer_product(a.cuda(), b.cuda(), "int8")
    assert torch.equal(product.cpu(), integer_product(a, b, "fp32"))


def test_experts_grouped_equals_experts_loop_forward_and_backward(workspace):
    """In bf16, widths multiples of 8, with an expert without tokens and a dropped assignment."""
    torch.manual_seed(0)
    x = torch.randn(300, 64, device="cuda")
    up = torch.randn(5, 128, 64, device="cuda")
    out = torch.randn(5, 64, 128, device="cuda")
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(300)]).cuda()  # expert 4: no token
    experts[7, 1] = 5  # dropped
    inputs = [x, torch.rand(300, 2, device="cuda"), up / 8, out / 11]
    results = []
    for compute, dtype in ((experts_loop, torch.float32), (experts_grouped, torch.bfloat16)):
        leaves = [value.clone().requires_grad_() for value in inputs]
        with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            y = compute(leaves[0], leaves[1], experts, leaves[2], leaves[3])
        y.sum().backward()
        results.append([y, *(value.grad for value in leaves)])
    for loop, grouped in zip(*results, strict=True):
        assert (loop - grouped).abs().max() < 0.03 * loop.abs().max()
