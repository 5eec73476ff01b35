"""Activation checkpointing: the same gradients, and fewer bytes kept for backward."""

import pytest
import torch

from nanods.build import build_model
from nanods.command_line import from_command_line
from nanods.gpt import Block
from nanods.training.activation_checkpointing import checkpoint_blocks
from nanods.training.task import accumulate_gradients
from tests.planner.measured_step import autocast, task_and_batch

SMALL = ["--n-layer", "3", "--n-embd", "24", "--n-head", "2", "--batch-size", "4"]
MODELS = {
    "v0": ["v0-tiny", *SMALL],
    "v1": ["v1-tiny", *SMALL],
    "v2": ["v2-tiny", *SMALL, "--moe.n-expert", "4"],
    "v2, tokens dropped": ["v2-tiny", *SMALL, "--moe.n-expert", "4", "--moe.capacity-factor", "1"],
    "v3 in pieces, experts": [
        "v3-tiny",
        *SMALL,
        "--moe.n-expert",
        "4",
        "--multimodal.entropy-coefficient",
        "0.1",
    ],
}


def gradients(config, micro_batch, recompute):
    """Gradients by name, the loss, bytes that autograd keeps outside the blocks, and how often
    a block is computed."""
    torch.manual_seed(0)
    model, kept, calls = build_model(config), [], []
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    block = next(module for module in model.modules() if isinstance(module, Block))
    block.attention.register_forward_pre_hook(lambda *_: calls.append(1))
    if recompute:
        checkpoint_blocks(model)
    task, batch = task_and_batch(config)
    pack = lambda t: kept.append(t.numel() * t.element_size()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        metrics = accumulate_gradients(task, model, batch, micro_batch, autocast(config))
    return (
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        metrics["train_loss"].item(),
        sum(kept),
        len(calls),
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("words", MODELS.values(), ids=MODELS)
def test_gradients_are_equal_and_blocks_keep_only_their_input(words, dtype):
    config = from_command_line("", [*words, "--dtype", dtype])
    ours, loss, kept, calls = gradients(config, 2, recompute=True)
    expected_grads, right, all_kept, once = gradients(config, 2, recompute=False)
    assert loss == right and ours.keys() == expected_grads.keys()
    for name, gradient in expected_grads.items():
        assert torch.equal(ours[name], gradient), name
    assert kept < all_kept / 2  # the logits of V0 to V2 are much of what is left
    in_pieces = bool(
        config.multimodal.modalities
    )  # two passes, one of them without a graph, where nothing is kept
    assert calls == once + once // (2 if in_pieces else 1)


def test_parameter_names_and_cached_generation_stay_as_they_are():
    config = from_command_line("", MODELS["v1"])
    torch.manual_seed(0)
    plain, ours = build_model(config), build_model(config)
    checkpoint_blocks(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    prompt = torch.tensor([[1, 2, 3]])
    assert [t.tolist() for t in ours.generate(prompt, 5, seed=0)] == [
        t.tolist() for t in plain.generate(prompt, 5, seed=0)
    ]
