"""A run on disk, quantised: read by sample.py, never trained from, nothing lost."""

import sys
from dataclasses import replace

import pytest
import torch

from nanods.build import build_model
from nanods.config import PRESETS, to_dict
from nanods.data.lock import lock
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError, run
from nanods.training import checkpoint
from nanods.training.finished_run import load_run
from nanods.training.quantize import main, quantize_run
from nanods.training.warm_start import warm_start

FORMATS = ("int8", "fp8")


def tiny(preset, **changes):
    config = PRESETS[preset]
    model = replace(config.model, n_layer=1, n_head=2, n_embd=32, context_length=32)
    return replace(config, model=model, **changes)


def save_random_run(run_dir, config):
    torch.manual_seed(0)
    model = build_model(config)
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
    state = {"step": 7, "config": to_dict(config), "tokenizer": ByteTokenizer().to_json()}
    checkpoint.save(run_dir, 7, model.state_dict(), {}, state)
    return model.eval()


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODS_DATA", str(tmp_path / "data"))
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    return str(path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", ["v1-tiny", "v2-tiny"])
def test_a_quantised_run_is_read_as_any_other(tmp_path, text, capsys, preset, format):
    run_dir, out = tmp_path / "run", tmp_path / "small"
    model = save_random_run(run_dir, tiny(preset, data=text))
    quantize_run(load_run(str(run_dir), "cpu"), format, out)
    printed = capsys.readouterr().out
    assert "times smaller" in printed and printed.count("bits per byte") == 2
    assert ("kernel" in printed) == (format == "int8")
    loaded = checkpoint.load_model(checkpoint.load(out))
    tokens = torch.randint(256, (2, 32))
    with torch.no_grad():
        expected, actual = model(tokens)[0], loaded(tokens)[0]
        assert torch.equal(actual, checkpoint.load_model(checkpoint.load(out))(tokens)[0])
    assert (expected - actual).abs().mean() < 0.2 * expected.std()
    before, after = ((d / "step_000007/model.safetensors").stat().st_size for d in (run_dir, out))
    assert after < 0.6 * before


@pytest.mark.parametrize("name", ["run", "run/best"])
def test_a_run_of_v3_keeps_its_gallery(shapes, program, workspace, name):
    finished, task = shapes
    task.save_examples(finished.folder)
    checkpoint.link_best(finished.folder, 7)
    quantize_run(load_run(name, "cpu"), "int8", workspace / "small", evaluate=False)
    (workspace / "shapes").rename(workspace / "moved")
    code, out, err = program("sample", "small", "--query", "circle")
    assert code == 0 and "image, the best of" in out, err


def test_training_does_not_go_on_from_it(tmp_path, text):
    run_dir, out = tmp_path / "run", tmp_path / "small"
    config = tiny("v1-tiny", data=text)
    save_random_run(run_dir, config)
    quantize_run(load_run(str(run_dir), "cpu"), "int8", out, evaluate=False)
    with pytest.raises(UserError, match=r"is quantised \(int8\) and cannot be trained"):
        warm_start(replace(config, init_from=str(out)), build_model(config), "")
    with pytest.raises(UserError, match="is quantised"):
        checkpoint.require_floats(checkpoint.load(out))
    with pytest.raises(UserError, match="quantised already"):
        quantize_run(load_run(str(out), "cpu"), "fp8", tmp_path / "smaller", evaluate=False)
    checkpoint.require_floats(checkpoint.load(run_dir))


def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, text):
    run_dir, out = tmp_path / "run", tmp_path / "small"
    model = save_random_run(run_dir, tiny("v0-tiny", data=text))
    model.head.weight.data[3, 4] = float("nan")
    state = checkpoint.load(run_dir).state
    checkpoint.save(run_dir, 7, model.state_dict(), {}, state)
    with pytest.raises(UserError, match="not all finite"):
        quantize_run(load_run(str(run_dir), "cpu"), "fp8", out, evaluate=False)
    assert not out.exists()


def test_data_that_are_gone_are_said_and_the_run_is_quantised(tmp_path, text, capsys):
    run_dir = tmp_path / "run"
    save_random_run(run_dir, tiny("v0-tiny", data=str(tmp_path / "gone.txt")))
    quantize_run(load_run(str(run_dir), "cpu"), "fp8", tmp_path / "small")
    assert "not evaluated" in capsys.readouterr().err
    assert checkpoint.list_checkpoints(tmp_path / "small")


def test_the_command_line(tmp_path, text, monkeypatch, capsys):
    def exit_code(*words):
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, words)])
        try:
            run(main)
        except SystemExit as end:
            return end.code
        return 0

    run_dir = tmp_path / "run"
    save_random_run(run_dir, tiny("v0-tiny", data=text))
    assert exit_code(run_dir, "--to", "fp8", "--no-evaluate") == 0
    assert checkpoint.list_checkpoints(tmp_path / "run-fp8")
    assert exit_code(run_dir, "--to", "fp8", "--no-evaluate") == 2
    assert "a run is there already" in capsys.readouterr().err
    with lock(tmp_path / ".other.lock"):
        assert exit_code(run_dir, "--out", tmp_path / "other", "--no-evaluate") == 2
    assert "or choose another --out\n" in capsys.readouterr().err
    monkeypatch.chdir(run_dir)
    assert exit_code(".", "--no-evaluate") == 0
    assert checkpoint.list_checkpoints(tmp_path / "run-int8")
    assert exit_code(tmp_path / "no-such-run") == 2
    assert exit_code(run_dir, "--to", "int5") == 2
