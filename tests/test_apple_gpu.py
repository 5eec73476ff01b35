"""Train and sample V0 to V3 on an imitation of Apple's GPU, which has no fp64."""

import numpy as np
import pytest
import torch

from nanods.gpt import GPT
from nanods.training import checkpoint
from tests.apple_gpu import imitate_apple_gpu


@pytest.fixture
def apple_gpu(monkeypatch):
    from nanods.training import contrastive_data, contrastive_task

    imitate_apple_gpu(monkeypatch)
    monkeypatch.setattr(contrastive_task, "MAX_GALLERY", 16)
    monkeypatch.setattr(contrastive_data, "MAX_GALLERY", 16)
    generate = GPT.generate  # three tokens show as much as 300
    monkeypatch.setattr(
        GPT, "generate", lambda self, prompt, n, **kwargs: generate(self, prompt, 3, **kwargs)
    )


V2 = ("--moe.n-expert", 4, "--moe.capacity-factor", 1, "--moe.bias-rate", 0.01)
TEXT = ("--data", "text.txt", "--context-length", 32)
FLAGS = {
    "v0-tiny": TEXT,
    "v1-tiny": (*TEXT, "--attention.block-size", 8),
    "v2-tiny": (*TEXT, "--attention.block-size", 8, *V2),
    "v3-tiny": ("--data", "scenes", "--multimodal.modalities", "text", "image", *V2),
}
PICTURES = {"v0-tiny": "loss", "v1-tiny": "sparsity", "v2-tiny": "experts", "v3-tiny": "space"}


@pytest.mark.pictures
@pytest.mark.parametrize("preset", FLAGS)
def test_train_and_sample(apple_gpu, program, workspace, preset):
    sizes = ("--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--batch-size", 4, "--steps", 2)
    sizes += ("--micro-batch", 2)
    code, out, err = program("train", preset, *sizes, *FLAGS[preset])
    assert code == 0, err
    assert "device     mps (the first of" in out
    run = workspace / "runs" / preset
    assert (run / f"{PICTURES[preset]}.png").exists()
    assert all(x.isfinite().all() for x in checkpoint.load(run).model.values())
    how = ("--top-p", 0.9) if preset < "v3" else ()
    code, out, err = program("sample", preset, "--device", "mps", *how)
    assert code == 0 and out, err


def test_fp64_is_refused(apple_gpu, program, workspace):
    code, _, err = program("train", "v0-tiny", *TEXT, "--dtype", "fp64")
    assert code == 2 and "--dtype fp64" in err and "mps" in err


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: x.new_zeros(2, dtype=torch.float64),
        lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
        lambda x: torch.tensor(0.5, dtype=torch.float64, device="mps"),
        lambda x: torch.from_numpy(np.zeros(2)).to(x.device),
        lambda x: torch.zeros(2, dtype=torch.float64).to("mps"),
        lambda x: x.mean(dtype=torch.float64),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x + torch.ones(2),
    ],
)
def test_the_imitation_refuses_what_apples_gpus_refuse(apple_gpu, mistake):
    x = torch.tensor([1.0, 2.0], device="mps")
    with pytest.raises((TypeError, RuntimeError), match=r"float64|numpy|same device"):
        mistake(x)
    assert (x * 0.5 + torch.tensor(1.0)).cpu().double().numpy().tolist() == [1.5, 2.0]
