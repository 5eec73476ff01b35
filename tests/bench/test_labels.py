"""Ten classes of drawn shapes: the images, and the bench from end to end (slow)."""

import json
import sys

import numpy as np
import pytest

from nanods.bench import labels
from nanods.errors import UserError


def test_shapes_differ_by_class_and_are_drawn_once(tmp_path):
    images = {}
    for name in labels.CLASSES:
        clean = np.asarray(labels.draw_shape(name, np.random.default_rng(0)), float)
        assert clean.shape == (64, 64, 3)
        images[name] = clean
    assert len(images) == 10
    for a in labels.CLASSES:  # the same colours, place and noise: the outline alone differs
        assert all(np.abs(images[a] - images[b]).max() > 50 for b in labels.CLASSES if a != b)
    labels.write_shapes(tmp_path, 4)
    first = (tmp_path / "train/ring/0000.png").stat().st_mtime_ns
    labels.write_shapes(tmp_path, 6)
    assert len(list(tmp_path.rglob("*.png"))) == 10 * (6 + 3)
    assert (tmp_path / "train/ring/0000.png").stat().st_mtime_ns == first


def test_an_image_whose_writing_was_interrupted_is_written_again(tmp_path, monkeypatch):
    def interrupted(self, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(labels.Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            labels.write_shapes(tmp_path, 4)
    labels.write_shapes(tmp_path, 4)
    assert len(list(tmp_path.rglob("*.png"))) == 10 * (4 + 2)
    for path in tmp_path.rglob("*.png"):
        labels.Image.open(path).load()


def test_the_command_line_of_a_run_is_accepted(tmp_path):
    config = labels.seed_job(labels.Args(runs=tmp_path), 1).config
    assert (config.seed, config.multimodal.image_size, config.dtype) == (1, 64, "fp32")


def test_a_missing_package_is_named_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setattr(sys, "argv", ["labels", "--runs", str(tmp_path / "runs")])
    with pytest.raises(UserError, match="make setup EXTRAS=peers"):
        labels.main()
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_answers_of_sample_are_the_zero_shot_accuracy_of_the_run(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    flags = {"seeds": 1, "steps": 40, "per-class": 20, "runs": tmp_path, "results": tmp_path}
    monkeypatch.setattr(sys, "argv", ["labels", *labels.flags_from_dict(flags)])
    labels.main()
    table = json.loads((tmp_path / "labels.json").read_text())
    (run,) = table["runs"]
    assert run["sample.py --labels"] == run["accuracy"] > 0.3
    assert run["cpu_seconds"] > 0
    assert table["logistic regression on pixels"]["fit_cpu_seconds"] > 0
    assert (tmp_path / "labels.png").stat().st_size > 3000
