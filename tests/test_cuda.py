"""What only a GPU can show: the same run there as on the CPU. Skipped where there is none."""

import pytest
import torch

from nanods.moe import experts_loop
from nanods.moe_kernel import experts_grouped
from tests.test_train import metrics

pytestmark = pytest.mark.cuda


def losses(preset, train_tiny, workspace, device, *options):
    code, _, err = train_tiny(
        preset, "--steps", 5, "--device", device, "--out-dir", device, *options
    )
    assert code == 0, err
    rows = metrics(workspace / device)
    return torch.tensor(
        [*(row["train_loss"] for row in rows), rows[-1]["val_loss"]], dtype=torch.float64
    )


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_in_fp64_a_run_on_the_gpu_is_the_run_on_the_cpu(train_tiny, workspace, preset):
    options = ("--dtype", "fp64", "--compile", "off")
    gpu, cpu = (
        losses(preset, train_tiny, workspace, device, *options) for device in ("cuda", "cpu")
    )
    assert (gpu - cpu).abs().max() < 1e-6
    assert gpu[-1] < gpu[0] - 0.1


@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_bf16_and_compile_stay_near_it(train_tiny, workspace, preset):
    gpu = losses(preset, train_tiny, workspace, "cuda", "--dtype", "bf16", "--compile", "on")
    cpu = losses(preset, train_tiny, workspace, "cpu", "--dtype", "fp32")
    assert (gpu - cpu).abs().max() < 0.05


def test_the_grouped_product_is_the_loop(workspace):
    """bf16, a multiple of 8 in each width, an expert without tokens and a dropped assignment; forward and backward."""
    torch.manual_seed(0)
    x, up, out = (
        torch.randn(*shape, device="cuda") for shape in ((300, 64), (5, 128, 64), (5, 64, 128))
    )
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(300)]).cuda()  # expert 4 gets none
    experts[7, 1] = 5
    inputs = [x, torch.rand(300, 2, device="cuda"), up / 8, out / 11]
    results = []
    for mix, dtype in ((experts_loop, torch.float32), (experts_grouped, torch.bfloat16)):
        given = [value.clone().requires_grad_() for value in inputs]
        with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            y = mix(given[0], given[1], experts, given[2], given[3])
        y.sum().backward()
        results.append([y, *(value.grad for value in given)])
    for slow, fast in zip(*results, strict=True):
        assert (slow - fast).abs().max() < 0.03 * slow.abs().max()
