"""Checkpoints: loading gives what was saved, broken ones are skipped, and a failed write loses
nothing."""

import json
import shutil

import pytest
import torch

from nanods.errors import UserError
from nanods.training import checkpoint
from nanods.training.muon import Muon


def save(out, step, value=0.0):
    model = {"w": torch.full((3,), value)}
    checkpoint.save(
        out, step, model, {"AdamW/w/step": torch.tensor(1.0)}, {"step": step, "note": "é"}
    )
    return out / f"step_{step:06d}"


def test_saving_and_loading_gives_the_same_tensors(tmp_path):
    save(tmp_path, 7, 2.5)
    loaded = checkpoint.load(tmp_path)
    assert loaded.model["w"].tolist() == [2.5] * 3
    assert loaded.optimizer["AdamW/w/step"] == 1
    assert loaded.state == {"step": 7, "note": "é"}


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (0, 5, 200000, 1000000):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step_200000",
        "step_1000000",
    ]
    assert checkpoint.load(tmp_path).state["step"] == 1000000


@pytest.mark.parametrize("can_link", [True, False])
def test_the_best_checkpoint_outlives_the_last_two_and_is_replaced_whole(
    tmp_path, monkeypatch, can_link
):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    if not can_link:
        monkeypatch.setattr(checkpoint.Path, "hardlink_to", refuse)
    assert not checkpoint.link_best(tmp_path, 1) and checkpoint.best_state(tmp_path) is None
    for step in (1, 2, 3, 4):
        save(tmp_path, step, float(step))
        if step in (1, 2):
            assert checkpoint.link_best(tmp_path, step)
    best = tmp_path / "best"
    assert [path.name for path in best.iterdir()] == ["step_000002"]
    assert checkpoint.load(best).model["w"][0] == 2 and checkpoint.best_state(tmp_path)["step"] == 2

    monkeypatch.setattr(checkpoint, "fsync", refuse)  # a full disk
    with pytest.raises(OSError, match="supported"):
        checkpoint.link_best(tmp_path, 4)
    assert [path.name for path in best.iterdir()] == ["step_000002"]
    assert checkpoint.load(best).model["w"][0] == 2 and checkpoint.load(tmp_path).model["w"][0] == 4


@pytest.mark.parametrize("file", [*checkpoint.FILES, "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["truncate", "edit", "delete"])
def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, file, harm):
    save(tmp_path, 1, 1.0)
    path = save(tmp_path, 2, 2.0) / file
    data = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(
            data[:-5] if harm == "truncate" else data[:2] + bytes([data[2] ^ 1]) + data[3:]
        )
    assert checkpoint.load(tmp_path).model["w"][0] == 1.0
    assert "step_000002 is broken" in capsys.readouterr().err


def test_no_checkpoint_or_no_whole_one_raises_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load(tmp_path)
    (save(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="whole"):
        checkpoint.load(tmp_path)


def test_a_failed_write_leaves_earlier_checkpoints_and_no_temporary_files(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoint.load(tmp_path).state["step"] == 1


def test_a_checkpoint_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    save(tmp_path, 3, 1.0)
    real = checkpoint.Path.rename

    def rename(path, target):
        if path.name.startswith(".writing"):
            raise OSError(5, "Input/output error")
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Path, "rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            save(tmp_path, 3, 2.0)
    assert checkpoint.load(tmp_path).model["w"][0] == 1.0
    save(tmp_path, 3, 2.0)
    assert checkpoint.load(tmp_path).model["w"][0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_files_left_by_a_killed_writer_are_removed(tmp_path):
    done = save(tmp_path, 1)
    shutil.copytree(done, tmp_path / ".writing-step_000002")
    assert len(checkpoint.list_checkpoints(tmp_path)) == 1
    save(tmp_path, 2, 5.0)
    assert checkpoint.load(tmp_path).model["w"][0] == 5.0
    assert not (tmp_path / ".writing-step_000002").exists()


def test_a_model_of_another_shape_is_refused(tmp_path):
    save(tmp_path, 1)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UserError, match="does not fit"):
        checkpoint.restore_model(model, checkpoint.load(tmp_path).model, tmp_path)


def test_checksums_have_the_format_of_sha256sum(tmp_path):
    path = save(tmp_path, 3)
    sums = (path / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in sums] == list(checkpoint.FILES)
    assert json.loads((path / "state.json").read_text())["step"] == 3


@pytest.mark.parametrize(("kind", "device"), [(torch.optim.AdamW, "meta"), (Muon, "cpu")])
def test_a_restored_optimizer_counts_its_steps_where_it_did(kind, device):
    """Fused AdamW keeps its step counter on the parameter's device, Muon on the CPU. The meta
    device stands for a GPU."""
    model = torch.nn.Linear(3, 3, bias=False, device="meta")
    optimizer = kind(model.parameters(), lr=0.1)
    saved = {"step": torch.tensor(1.0), "moment": torch.ones(3, 3)}
    tensors = {f"{kind.__name__}/weight/{field}": value for field, value in saved.items()}
    checkpoint.restore_optimizers(model, [optimizer], tensors)
    state = optimizer.state[model.weight]
    assert {name: x.device.type for name, x in state.items()} == {"step": device, "moment": "meta"}
