"""The ladder: each version is the one before with one field replaced, and configurations survive
JSON."""

import json
from dataclasses import replace

import pytest

from nanods.config import PRESETS, V0, V1, flatten, from_dict, to_dict
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


def test_flag_names_are_unique():
    saved = to_dict(PRESETS["v2-tiny"])
    model = saved["model"]
    parts = [saved, model, model["attention"], model["moe"], saved["multimodal"]]
    assert (
        len(flatten(PRESETS["v2-tiny"])) == sum(map(len, parts)) - 4
    )  # without the names of the nested configurations
