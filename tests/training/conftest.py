from dataclasses import replace

import pytest
import torch

from nanods.bench.labels import write_shapes
from nanods.build import build_model
from nanods.config import PRESETS, to_dict
from nanods.data.tokenizer import ByteTokenizer
from nanods.training import checkpoint
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.finished_run import load_run


@pytest.fixture
def shapes(workspace):
    """A run of random weights on ten folders of drawn shapes at 64 pixels; and its task."""
    write_shapes(workspace / "shapes", per_class=4)
    preset = PRESETS["v3-tiny"]
    multimodal = replace(preset.multimodal, modalities=("text", "image"), image_size=64)
    config = replace(
        preset,
        model=replace(
            preset.model, n_layer=1, n_head=2, n_embd=16, context_length=24, vocab_size=256
        ),
        multimodal=replace(multimodal, patch_size=16),
        data="shapes",
        batch_size=8,
        dtype="fp32",
    )
    torch.manual_seed(0)
    model = build_model(config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    state = {"step": 7, "config": to_dict(config), "tokenizer": ByteTokenizer().to_json()}
    checkpoint.save(workspace / "run", 7, model.state_dict(), {}, state)
    return load_run("run", "cpu"), ContrastiveTask(config, torch.device("cpu"))
