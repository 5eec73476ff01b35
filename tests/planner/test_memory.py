"""The planner's numbers against real ones: parameters, optimizer state, FLOPs, process memory."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanods import gpt
from nanods.attention import AttentionConfig
from nanods.build import build_meta_model, build_model
from nanods.command_line import from_command_line
from nanods.config import PRESETS
from nanods.distributed.mesh import Mesh
from nanods.moe import MLP, MoE, MoEConfig
from nanods.planner.hardware import GPUS
from nanods.planner.memory import (
    model_cost,
    optimizer_bytes,
    sequence_lengths,
    step_config,
    teacher_bytes,
)
from nanods.planner.search import make_job, run_memory, step_memory
from nanods.training.language_task import EVAL_LOGIT_BYTES, eval_batch_size
from nanods.training.task import accumulate_gradients
from tests.planner.measured_step import autocast, task_and_batch, train_two_steps

ROOT = Path(__file__).parents[2]
SMALL = ["--n-layer", "2", "--n-embd", "24", "--n-head", "2", "--batch-size", "4"]
SMALL += ["--dtype", "fp32"]
MODELS = {
    "v1": ["v1-tiny", *SMALL, "--conv-width", "1"],
    "v1 with a convolution": ["v1-tiny", *SMALL],
    "v2": ["v2-tiny", *SMALL, "--moe.n-expert", "3", "--hidden-ratio", "3"],
    "v2, experts updated by AdamW": [
        *("v2-tiny", *SMALL, "--moe.n-expert", "5"),
        *("--expert-optimizer", "adamw", "--expert-lr", "1e-3"),
    ],
    "v2, all under AdamW": [*("v2-tiny", *SMALL, "--moe.n-expert", "4", "--optimizer", "adamw")],
    "v3": ["v3-tiny", *SMALL, "--n-head", "3"],
    "v3, three trunks of experts": [
        *("v3-tiny", *SMALL, "--n-head", "3", "--moe.n-expert", "4", "--multimodal.no-shared"),
    ],
}


@pytest.mark.parametrize(
    "flags", [*MODELS.values(), ["v1-tiny"], ["v2-tiny"], ["v3-tiny"]], ids=str
)
def test_parameters_equal_those_of_the_built_model(flags):
    config = from_command_line("", flags)
    model, cost = build_model(config), model_cost(build_meta_model(config))
    assert cost.total == sum(p.numel() for p in model.parameters())
    assert (cost.total, cost.active) == model.count_parameters()
    assert cost.experts == sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert cost.total - cost.experts == cost.n_blocks * cost.block + cost.ends


def test_the_forecast_counts_the_memory_of_an_evaluation():
    flags = ["--vocab-size", "50304", "--batch-size", "8", "--micro-batch", "1"]
    config = from_command_line("", ["v0-tiny", *flags, "--dtype", "fp32"])
    cost, mesh = model_cost(build_meta_model(config)), Mesh.of(dp=1)
    step = step_memory(config, mesh, "cpu", 1, cost)
    windows = eval_batch_size(config)
    logits = 4 * windows * 256 * 50304  # and as much again for their log-softmax
    assert 4 <= windows < 8 and 0.7 * EVAL_LOGIT_BYTES < logits <= EVAL_LOGIT_BYTES
    needed = run_memory(config, mesh, "cpu", 1, cost)
    kept = 4 * cost.total + optimizer_bytes(config, cost, cost.total, 0, cost.adamw)
    assert needed > step and needed == pytest.approx(kept + 2 * logits, rel=0.05)
    assert run_memory(config, mesh, "cpu", 8, cost) == step_memory(config, mesh, "cpu", 8, cost)


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)
def test_optimizer_state_has_the_planned_bytes(flags):
    config = from_command_line("", flags)
    _, optimizers = train_two_steps(config)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    state_bytes = sum(
        t.numel() * t.element_size()
        for state in states
        for name, t in state.items()
        if name != "step"
    )
    cost = model_cost(build_meta_model(config))
    outside = cost.total - cost.experts
    assert state_bytes == optimizer_bytes(config, cost, outside, cost.experts, cost.adamw)


def counted_flops_per_token(config):
    """Return the training FLOPs per token that PyTorch counts.

    Its counter sees the products of the experts, inside their own backward, but not a CPU's fused
    attention. That is added: 4 C per pair of query and key forward (q . k, weight . v) and twice
    that backward. V3's texts have full length.
    """
    model = build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)  # output projections start at zero
    task, batch = task_and_batch(config)
    with FlopCounterMode(display=False) as counter:
        accumulate_gradients(task, model, batch, config.batch_size, autocast(config))
    m, lengths, attention = config.model, sequence_lengths(config), 0
    for T in lengths.values():
        pairs = T * T if config.multimodal.modalities else m.attention.pairs(T)
        attention += 12 * m.n_layer * m.n_embd * pairs
    per_example = counter.get_total_flops() / config.batch_size + attention
    return per_example / sum(lengths.values())


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)
def test_flops_are_within_5_percent_of_those_that_pytorch_counts(flags):
    config = from_command_line("", [*flags, "--n-embd", "96"])
    planned = make_job(config, GPUS["v100-32gb"], 1).flops_per_token
    assert planned == pytest.approx(counted_flops_per_token(config), rel=0.05)


class SharedExpertMoE(MoE):
    """Experts, and an MLP that every token passes through (DeepSeekMoE, arXiv:2401.06066)."""

    def __init__(self, n_embd, hidden, config):
        super().__init__(n_embd, hidden, config)
        self.shared = MLP(n_embd, hidden)

    def forward(self, x, valid=None, inspect=False):
        y, stats = super().forward(x, valid, inspect)
        return y + self.shared(x)[0], stats

    def activation_bytes(self, device, itemsize, tp=1, imbalance=1.0):
        shared = self.shared.activation_bytes(device, itemsize)
        return super().activation_bytes(device, itemsize, tp, imbalance) + shared


def test_a_new_layer_is_planned_by_what_it_reports(monkeypatch):
    """Shared experts: neither the planner nor the trunk knows of them."""
    config = from_command_line("", [*MODELS["v2"], "--n-embd", "96"])
    plain = model_cost(build_meta_model(config))
    plain_flops = make_job(config, GPUS["v100-32gb"], 1).flops_per_token
    plain_memory = step_memory(config, Mesh.of(dp=1), "cuda", 4)
    monkeypatch.setattr(gpt, "feed_forward", SharedExpertMoE)
    cost = model_cost(build_meta_model(config))
    m = config.model
    shared = m.n_layer * 2 * m.hidden_ratio * m.n_embd**2
    assert (cost.total, cost.active) == (plain.total + shared, plain.active + shared)
    assert cost.total == sum(p.numel() for p in build_model(config).parameters())
    assert (cost.experts, cost.adamw) == (plain.experts, plain.adamw)
    assert cost.cast == plain.cast + shared and cost.block == plain.block + shared / m.n_layer
    flops = make_job(config, GPUS["v100-32gb"], 1).flops_per_token
    assert flops == pytest.approx(plain_flops + 6 * shared)
    assert flops == pytest.approx(counted_flops_per_token(config), rel=0.05)
    assert step_memory(config, Mesh.of(dp=1), "cuda", 4) > plain_memory + 12 * shared


MEASURED = [
    ["v1-tiny"],
    ["v1-tiny", "--batch-size", "32", "--conv-width", "1"],
    ["v1-tiny", "--batch-size", "32"],
    ["v1-tiny", "--n-embd", "384", "--n-layer", "6"],
    ["v2-tiny"],
    ["v2-tiny", "--batch-size", "32"],
    ["v2-tiny", "--n-embd", "384", "--batch-size", "16", "--dtype", "fp32"],
    ["v3-tiny"],
    ["v3-tiny", "--micro-batch", "32"],
    ["v3-tiny", "--n-embd", "256", "--n-layer", "4", "--dtype", "fp32"],
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", MEASURED, ids=" ".join)
def test_a_process_takes_within_25_percent_of_the_planned_memory(flags):
    flags = flags if "--dtype" in flags else [*flags, "--dtype", "bf16"]
    config = from_command_line("", flags)
    command = [sys.executable, "-m", "tests.planner.measured_step", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout)
    micro_batch = config.micro_batch or config.batch_size
    planned = step_memory(config, Mesh.of(dp=1), "cpu", micro_batch)
    print(f"{' '.join(flags)}: {measured / 2**20:.0f} MiB, planned {planned / measured:.2f} of it")
    assert planned == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("student", "teacher"), [("v1-tiny", "v2-tiny"), ("v3-tiny", "v3-tiny")])
def test_a_teacher_takes_its_weights_and_what_it_makes_of_a_micro_batch(student, teacher):
    config, read = PRESETS[student], PRESETS[teacher]
    weights = 4 * model_cost(build_meta_model(read)).total
    few, many, all_of_them = (
        teacher_bytes(config, read, step_config(config, "cuda", size)) - weights
        for size in (1, 2, 8)
    )
    assert 0 < few < many and all_of_them == pytest.approx(8 * few)
    if student == "v1-tiny":  # a longer context of the teacher is not used
        longer = replace(read, model=replace(read.model, context_length=1024))
        step = step_config(config, "cuda", 2)
        assert teacher_bytes(config, longer, step) == teacher_bytes(config, read, step)


def test_the_full_presets_have_the_sizes_that_config_states():
    presets = [PRESETS[f"{version}-full"] for version in ("v1", "v2", "v3")]
    v1, v2, v3 = (model_cost(build_meta_model(preset)) for preset in presets)
    assert v1.total == pytest.approx(9.1e9, rel=0.02)
    assert (v2.total, v2.active) == (pytest.approx(96e9, rel=0.02), pytest.approx(14.7e9, rel=0.02))
    assert v3.total == pytest.approx(95e9, rel=0.02)
    full = PRESETS["v2-full"]
    article = replace(
        full, model=replace(full.model, n_layer=23, moe=MoEConfig(n_expert=24, top_k=2))
    )
    cost = model_cost(build_meta_model(article))
    assert cost.total == pytest.approx(98e9, rel=0.02)
    assert cost.active == pytest.approx(10e9, rel=0.02)


def test_sparse_attention_has_the_same_weights_and_fewer_flops_on_long_sequences():
    v1 = PRESETS["v1-base"]
    sparse = build_meta_model(v1)
    dense = build_meta_model(replace(v1, model=replace(v1.model, attention=AttentionConfig())))
    assert model_cost(sparse) == model_cost(dense)
    assert sparse.flops_per_token() < dense.flops_per_token()
    assert math.isclose(sparse.flops_per_token(64), dense.flops_per_token(64))  # a single block
