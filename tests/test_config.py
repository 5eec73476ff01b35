"""The ladder: each version is the one before with one field replaced, and configurations survive
JSON."""

import json
from dataclasses import replace

import pytest

from nanods.config import (
    PRESETS,
    V0,
    V1,
    flatten,
    from_command_line,
    from_dict,
    resolve_resume,
    to_dict,
)
from nanods.errors import UserError


@pytest.mark.parametrize("scale", V0)
def test_v1_is_v0_with_one_field_replaced(scale):
    v0, v1 = V0[scale], V1[scale]
    assert (
        replace(v1, preset=v0.preset, model=replace(v1.model, attention=v0.model.attention)) == v0
    )
    assert v1.model.attention != v0.model.attention


def test_small_is_gpt2s_size():
    from torch import device

    from nanods.gpt import GPT

    with device("meta"):
        total, _ = GPT(PRESETS["v0-small"].model).count_parameters()
    # GPT-2 ties its embedding to its head and has biases and learnt positions; ours unties them:
    # one 38.6M table more
    assert total - 50304 * 768 == pytest.approx(124e6, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_a_round_trip_through_json(name):
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


def test_an_edited_configuration_is_refused():
    with pytest.raises(UserError, match="saved configuration"):
        from_dict(to_dict(PRESETS["v0-tiny"]) | {"wings": 2})


def test_resuming_takes_the_saved_values_and_refuses_conflicts():
    preset = PRESETS["v1-tiny"]
    saved = replace(preset, steps=77, lr=0.5)
    assert resolve_resume(replace(preset, resume=True), saved).steps == 77
    assert resolve_resume(replace(preset, resume=True, steps=77), saved).lr == 0.5
    with pytest.raises(UserError, match=r"--steps 78 \(the run has 77\)"):
        resolve_resume(replace(preset, resume=True, steps=78), saved)
    with pytest.raises(UserError, match="--preset v0-tiny"):
        resolve_resume(PRESETS["v0-tiny"], saved)


def test_a_finetuned_run_is_resumed_where_it_was_begun():
    words = ["v1-tiny", "--stage", "finetune"]
    begun = from_command_line("", [*words, "--init-from", "runs/v1-tiny"])
    resumed = from_command_line("", [*words, "--resume"])
    assert begun.run_dir == resumed.run_dir != PRESETS["v1-tiny"].run_dir
    elsewhere = from_command_line("", [*words, "--resume", "--out-dir", "here"])
    assert str(elsewhere.run_dir) == "here"


def test_flag_names_are_unique():
    saved = to_dict(PRESETS["v2-tiny"])
    model = saved["model"]
    parts = [saved, model, model["attention"], model["moe"], saved["multimodal"]]
    assert (
        len(flatten(PRESETS["v2-tiny"])) == sum(map(len, parts)) - 4
    )  # without the names of the nested configurations


# ---- flags without effect ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        ("v0-tiny --moe.scores sigmoid --expert-lr 0.1", "moe.scores expert-lr"),
        ("v0-tiny --moe.no-normalise", "moe.normalise"),
        ("v0-tiny --attention.block-size 8", "attention.block-size"),
        ("v0-tiny --attention.kind block --attention.block-size 8", ""),
        ("v0-tiny --moe.n-expert 4 --moe.scores sigmoid --moe.priority slot", "moe.priority"),
        ("v2-tiny --moe.capacity-factor 1 --moe.priority slot --expert-lr 0.1", ""),
        ("v2-tiny --optimizer adamw --momentum 0.8 --expert-every 2", "momentum expert-every"),
        ("v0-tiny --rope-base 5 --multimodal.width 9", "multimodal.width"),
        ("v3-tiny --rope-base 5 --multimodal.width 9", "rope-base"),
        ("v0-tiny --val-data t.txt --val-fraction 0.5", "val-fraction"),
        ("v2-tiny --distill-weight 0.1 --init-noise 0.1", "distill-weight init-noise"),
        ("v0-tiny --ewc-lambda 2 --ewc-fisher data", "ewc-lambda ewc-fisher"),
        ("v0-tiny --ewc runs/a --ewc-lambda 2 --init-noise 0.1", "init-noise"),
        ("v2-tiny --ewc runs/a --ewc-lambda 2 --init-noise 0.1", ""),
        ("v2-tiny --expert-optimizer adamw --expert-every 2", "expert-every"),
        ("v3-tiny --eval-tokens 900 --multimodal.no-hard-batches", "eval-tokens"),
        ("v3-tiny --mix sums=1", "mix"),
        ("v0-tiny --data fineweb-edu --val-fraction 0.5", "val-fraction"),
        ("v3-emoji --multimodal.no-hard-batches", "multimodal.hard-batches"),
        ("v0-tiny --short-parts 4", "short-parts"),
        ("v0-tiny --short-parts 4 --short-context 0.5", ""),
        ("v0-tiny --data instructions --short-context 0.5", "short-context"),
        ("v3-tiny --short-context 0.5", "short-context"),
        ("v0-tiny --sampling epochs", ""),
        ("v0-tiny --data instructions --sampling epochs", "sampling"),
        ("v3-tiny --sampling epochs", "sampling"),
        ("v0-tiny --quantize-from 5", "quantize-from"),
        ("v0-tiny --quantize int2 --quantize-from 5", ""),
        ("v0-tiny --quantize int2 --quantize-from 9 --steps 9", "quantize quantize-from"),
    ],
)
def test_flags_without_effect_are_named(capsys, words, unused):
    from_command_line("", words.split())
    lines = capsys.readouterr().out.splitlines()
    named = {line.split("--")[1].split(" ")[0] for line in lines if "has no effect" in line}
    assert named == set(unused.split())
