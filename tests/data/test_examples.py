"""Examples and ExampleDataset: both data sets have all members of the protocol, and one form."""

import dataclasses
import inspect

import numpy as np
import pytest
from PIL import Image

from nanods.data.caption_dataset import load_caption_dataset
from nanods.data.examples import ExampleDataset, Examples
from nanods.data.scenes import SceneData, Scenes


@pytest.fixture(params=["scenes", "captions"])
def dataset(request, tmp_path):
    if request.param == "scenes":
        return SceneData()
    rows = [(f"{i}.png", f"image {i}") for i in range(200)]
    for name, _ in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "x.token").write_text("".join(f"{name}#0\t{text}\n" for name, text in rows))
    return load_caption_dataset(tmp_path, 8, 4)


def test_a_dataset_has_every_member_of_the_protocol(dataset):
    for name in ExampleDataset.__annotations__:
        assert hasattr(dataset, name), f"{type(dataset).__name__} has no attribute {name}"
    for name in ("text", "batch", "gallery"):
        expected = inspect.signature(getattr(ExampleDataset, name)).parameters
        actual = inspect.signature(getattr(type(dataset), name)).parameters
        assert [*actual][: len(expected)] == [*expected]
    assert isinstance(dataset.text(), str) and len(dataset.sha256) == 64
    assert dataset.modalities[0] == "text" and len(dataset.modalities) > 1


def test_batches_and_galleries_are_examples(dataset):
    for examples in (dataset.batch(0, 4, 1), dataset.gallery(4)):
        assert isinstance(examples, Examples)
        assert examples.ids.shape == (4,) and examples.ids.dtype == np.int64
        assert len(set(examples.ids.tolist())) == len(examples.captions) == 4
        assert len(examples.images) == 4
        for field in (examples.waves, examples.mels):
            assert (field is not None) == ("audio" in dataset.modalities)
    every_second = dataset.batch(0, 4, 1, slice(1, None, 2))
    np.testing.assert_array_equal(every_second.ids, dataset.batch(0, 4, 1).ids[1::2])


def test_scenes_have_no_fields_beyond_examples():
    assert dataclasses.fields(Scenes) == dataclasses.fields(Examples)
