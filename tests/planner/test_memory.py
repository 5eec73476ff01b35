"""The planner's counts against the things themselves: parameters, optimizer state, bytes of a process, FLOPs."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanods.attention import AttentionConfig
from nanods.build import build_meta_model, build_model
from nanods.config import PRESETS, from_command_line
from nanods.moe import MoEConfig
from nanods.planner.cost import Mesh, memory_per_gpu
from nanods.planner.hardware import GPUS
from nanods.planner.memory import counts, optimizer_bytes, sequences, setting
from nanods.planner.search import make_job
from nanods.training.task import accumulate_gradients
from tests.planner.measured_step import autocast_of, made_up, steps

ROOT = Path(__file__).parents[2]
SMALL = [
    "--n-layer",
    "2",
    "--n-embd",
    "24",
    "--n-head",
    "2",
    "--batch-size",
    "4",
    "--dtype",
    "fp32",
]
ODD = {
    "v1": ["v1-tiny", *SMALL],
    "v2": ["v2-tiny", *SMALL, "--moe.n-expert", "3", "--hidden-ratio", "3"],
    "v2, experts under AdamW": [
        "v2-tiny",
        *SMALL,
        "--moe.n-expert",
        "5",
        "--expert-optimizer",
        "adamw",
        "--expert-lr",
        "1e-3",
    ],
    "v3": ["v3-tiny", *SMALL, "--n-head", "3"],
    "v3, three trunks of experts": [
        "v3-tiny",
        *SMALL,
        "--n-head",
        "3",
        "--moe.n-expert",
        "4",
        "--multimodal.no-shared",
    ],
}


@pytest.mark.parametrize("words", [*ODD.values(), ["v1-tiny"], ["v2-tiny"], ["v3-tiny"]], ids=str)
def test_parameters_are_those_of_the_model_itself(words):
    config = from_command_line("", words)
    model, counted = build_model(config), counts(build_meta_model(config))
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert (counted.total, counted.active) == model.count_parameters()
    assert counted.experts == sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert counted.total - counted.experts == counted.layers * counted.block + counted.ends


@pytest.mark.parametrize("words", ODD.values(), ids=ODD)
def test_the_optimizers_keep_what_is_counted(words):
    config = from_command_line("", words)
    _, optimizers = steps(config)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    kept = sum(
        t.numel() * t.element_size()
        for state in states
        for name, t in state.items()
        if name != "step"
    )
    counted = counts(build_meta_model(config))
    assert kept == optimizer_bytes(
        config, counted, counted.total - counted.experts, counted.experts, counted.adamw
    )


@pytest.mark.parametrize("words", ODD.values(), ids=ODD)
def test_flops_are_those_that_pytorch_counts(words):
    """Within 5%. Its counter sees the experts' products, inside their own backward, but not the fused attention of a CPU: that
    is added, 4 C a pair of query and key forward (q . k, weight . v) and twice that backward. V3's texts are full."""
    config = from_command_line("", [*words, "--n-embd", "96"])
    model = build_model(config)
    with torch.no_grad():
        for p in (
            model.parameters()
        ):  # zeros would be multiplied all the same; the counter does not look
            p.normal_(std=0.02)
    task, batch = made_up(config)
    with FlopCounterMode(display=False) as counter:
        accumulate_gradients(task, model, batch, config.batch_size, autocast_of(config))
    m, attention = config.model, 0
    for T in sequences(config).values():
        attention += (
            12
            * m.n_layer
            * m.n_embd
            * (T * T if config.multimodal.modalities else m.attention.pairs(T))
        )
    tokens = config.batch_size * sum(sequences(config).values())
    counted = counter.get_total_flops() / tokens + attention / sum(sequences(config).values())
    assert make_job(config, GPUS["v100-32gb"], 1).flops_per_token == pytest.approx(
        counted, rel=0.05
    )


WEIGHED = [
    ["v1-tiny"],
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
@pytest.mark.parametrize("words", WEIGHED, ids=" ".join)
def test_a_process_takes_what_is_planned(words):
    words = words if "--dtype" in words else [*words, "--dtype", "bf16"]
    config = from_command_line("", words)
    command = [sys.executable, "-m", "tests.planner.measured_step", *words]
    took = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    how = setting(config, "cpu", config.micro_batch or config.batch_size)
    planned = sum(
        memory_per_gpu(config, counts(build_meta_model(config)), Mesh("dp", 1), how).values()
    )
    print(f"{' '.join(words)}: {took / 2**20:.0f} MiB, planned {planned / took:.2f} of it")
    assert planned == pytest.approx(took, rel=0.25)


def test_the_full_presets_are_as_large_as_they_say():
    v1, v2, v3 = (counts(build_meta_model(PRESETS[f"{name}-full"])) for name in ("v1", "v2", "v3"))
    assert v1.total == pytest.approx(9.1e9, rel=0.02)
    assert (v2.total, v2.active) == (pytest.approx(96e9, rel=0.02), pytest.approx(14.7e9, rel=0.02))
    assert v3.total == pytest.approx(95e9, rel=0.02)
    full = PRESETS["v2-full"]
    article = replace(
        full, model=replace(full.model, n_layer=23, moe=MoEConfig(n_expert=24, top_k=2))
    )
    counted = counts(build_meta_model(article))
    assert (counted.total, counted.active) == (
        pytest.approx(98e9, rel=0.02),
        pytest.approx(10e9, rel=0.02),
    )


def test_sparse_attention_changes_no_weight_and_long_texts_cost_less():
    dense = replace(PRESETS["v1-base"].model, attention=AttentionConfig())
    sparse, whole = (
        build_meta_model(replace(PRESETS["v1-base"], model=m))
        for m in (PRESETS["v1-base"].model, dense)
    )
    assert counts(sparse) == counts(whole)
    assert sparse.flops_per_token() < whole.flops_per_token()
    assert math.isclose(sparse.flops_per_token(64), whole.flops_per_token(64))  # a single block
