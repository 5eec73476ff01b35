"""Runs with a teacher (--teacher), from the outside: what they write, how they resume, and how they
refuse a teacher that does not fit."""

import json
import shutil

import pytest
import torch

from nanods.build import build_model
from nanods.command_line import from_command_line
from nanods.config import to_dict
from nanods.training import checkpoint
from nanods.training.task import make_task
from tests.conftest import TINY
from tests.test_train import metrics, weights

FEW = {"v1-tiny": (), "v2-tiny": ("--moe.n-expert", 4), "v3-tiny": ()}
OTHER_WIDTH = ("--multimodal.width", 24, "--moe.n-expert", 4)


def save_teacher(folder, preset, *flags, **state):
    """Write a run of random weights, as wide again as the students of `train_tiny`."""
    data = "scenes" if preset == "v3-tiny" else "text.txt"
    words = [preset, *TINY, "--n-embd", 32, "--data", data, *FEW[preset], *flags]
    config = from_command_line("", [*map(str, words)])
    torch.manual_seed(7)
    model = build_model(config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    task = make_task(config, torch.device("cpu"))
    state = {
        "step": 9,
        "config": to_dict(config),
        "tokenizer": task.tokenizer.to_json(),
        "data_sha256": task.data.sha256,
    } | state
    checkpoint.save(folder, 9, model.state_dict(), {}, state)


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("preset", "teacher", "flags"),
    [("v1-tiny", "v2-tiny", ()), ("v3-tiny", "v3-tiny", OTHER_WIDTH)],
)
def test_a_teacher_of_weight_0_changes_no_bit(train_tiny, workspace, preset, teacher, flags):
    save_teacher(workspace / "teacher", teacher, *flags)
    steps = (preset, "--moe.n-expert", 1, "--steps", 3, "--eval-every", 3)
    assert train_tiny(*steps, "--out-dir", "alone")[0] == 0
    taught = ("--teacher", "teacher", "--distill-weight", 0, "--out-dir", "taught")
    code, out, err = train_tiny(*steps, *taught)
    assert code == 0, err
    assert "teacher    teacher/step_000009" in out
    assert weights(workspace / "taught") == weights(workspace / "alone")
    assert metrics(workspace / "taught") == metrics(workspace / "alone")


@pytest.mark.parametrize(
    ("preset", "teacher", "flags"),
    [("v1-tiny", "v2-tiny", ()), ("v3-tiny", "v3-tiny", OTHER_WIDTH)],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    train_tiny, program, workspace, killed_at, preset, teacher, flags
):
    """With gradient accumulation, for V3 with gradient caching and a projection. The teacher may
    have been moved. The saved student is a model as any other."""
    save_teacher(workspace / "teacher", teacher, *flags)
    before = read_files(workspace / "teacher")
    steps = (preset, "--moe.n-expert", 1, "--steps", 5, "--save-every", 2, "--micro-batch", 2)
    code, out, err = train_tiny(*steps, "--teacher", "teacher", "--out-dir", "whole")
    assert code == 0, err
    assert "of it the teacher, which reads each batch too" in out
    with killed_at(3):
        train_tiny(*steps, "--teacher", "teacher", "--out-dir", "cut")

    # Another teacher, and none, are refused, and nothing is lost.
    saved = read_files(workspace / "cut")
    resume = (preset, "--moe.n-expert", 1, "--resume", "--out-dir", "cut")
    save_teacher(workspace / "other", teacher, *flags, "--hidden-ratio", 2)
    code, _, err = train_tiny(*resume, "--teacher", "other")
    assert code == 2 and "not the one that this run began with" in err
    (workspace / "teacher").rename(workspace / "moved")
    code, _, err = train_tiny(*resume)
    assert code == 2 and "--teacher teacher: teacher: no such run" in err
    assert read_files(workspace / "cut") == saved

    code, out, err = train_tiny(*resume, "--teacher", "moved")
    assert code == 0 and "after step 2" in out, err
    assert weights(workspace / "cut") == weights(workspace / "whole")
    assert metrics(workspace / "cut") == metrics(workspace / "whole")
    whole, cut = (checkpoint.load(workspace / name).optimizer for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name in cut if not torch.equal(whole[name], cut[name])] == []
    assert ("weight/projection.weight" in cut) == (preset == "v3-tiny")
    files = read_files(workspace / "moved").values()
    assert list(files) == list(before.values())  # nothing is written into it

    # The student needs no teacher any more, and its validation is free of it.
    shutil.rmtree(workspace / "moved")
    saved = checkpoint.load(workspace / "whole")
    model = checkpoint.load_model(saved)
    assert saved.model.keys() == model.state_dict().keys()
    config = from_command_line("", [preset, *TINY, "--data", "text.txt"])
    row = metrics(workspace / "whole")[-1]
    if preset == "v1-tiny":
        figures = make_task(config, torch.device("cpu")).evaluate(model)
        assert figures["val_loss"] == pytest.approx(row["val_loss"], rel=1e-2)  # bf16 at most
        code, text, err = program("sample", "whole", "--prompt", "7", "--max-new-tokens", 3)
        assert code == 0 and text.startswith("7"), err
    names = {"v1-tiny": {"distill_loss"}, "v3-tiny": {"relation_loss", "cosine_loss"}}[preset]
    assert names <= row.keys()


MISTAKES = {
    "missing": ("v1-tiny", ("--teacher", "nowhere"), "--teacher nowhere: nowhere: no such run"),
    "empty": ("v1-tiny", ("--teacher", "empty"), "no checkpoint in empty"),
    "corrupt": ("v1-tiny", ("--teacher", "corrupt"), "no checkpoint in corrupt is whole"),
    "not finite": ("v1-tiny", ("--teacher", "nan"), "values that are not finite"),
    "quantised": ("v1-tiny", ("--teacher", "int8"), "is quantised (int8): name the run that it"),
    "its own folder": ("v1-tiny", ("--teacher", "v2", "--out-dir", "v2"), "another --out-dir"),
    "its own best": ("v1-tiny", ("--teacher", "v2/best", "--out-dir", "v2"), "another --out-dir"),
    "short context": (
        "v1-tiny",
        ("--teacher", "v2", "--context-length", 40),
        "reads 32 tokens at most, and this run 40: --context-length 32",
    ),
    "vocabulary": (
        "v1-tiny",
        ("--teacher", "v2", "--vocab-size", 300),
        "--vocab-size 256 (asked for: 300)",
    ),
    "tokenizer": (
        "v1-tiny",
        ("--teacher", "tokens"),
        "choose a teacher that was trained on --data text.txt",
    ),
    "V3 for a text": (
        "v1-tiny",
        ("--teacher", "v3"),
        "is a contrastive model (V3), and v1-tiny is a language model",
    ),
    "a text for V3": ("v3-tiny", ("--teacher", "v2"), "choose a teacher of the same kind"),
    "image size": (
        "v3-tiny",
        ("--teacher", "v3", "--multimodal.image-size", 16),
        "--multimodal.image-size 32 (asked for: 16)",
    ),
    "frames": (
        "v3-tiny",
        ("--teacher", "v3", "--multimodal.frames", 16),
        "--multimodal.frames 32 (asked for: 16)",
    ),
    "modalities": (
        "v3-tiny",
        ("--teacher", "no-audio"),
        "has no audio: choose another teacher, or --multimodal.modalities text image",
    ),
    "weight": ("v1-tiny", ("--teacher", "v2", "--distill-weight", 1.5), "--distill-weight 1.5"),
    "temperature": (
        "v1-tiny",
        ("--teacher", "v2", "--distill-temperature", 0),
        "--distill-temperature 0",
    ),
}


@pytest.fixture
def teachers(workspace):
    save_teacher(workspace / "v2", "v2-tiny")
    save_teacher(workspace / "v3", "v3-tiny")
    save_teacher(workspace / "no-audio", "v3-tiny", "--multimodal.modalities", "text", "image")
    save_teacher(workspace / "tokens", "v2-tiny", tokenizer='{"other": 1}')
    save_teacher(workspace / "int8", "v2-tiny", format="int8")
    for name in ("corrupt", "nan", "v2/best"):
        shutil.copytree(workspace / "v2/step_000009", workspace / name / "step_000009")
    with (workspace / "corrupt/step_000009/model.safetensors").open("r+b") as file:
        file.truncate(999)
    saved = checkpoint.load(workspace / "nan")
    broken = saved.model
    broken["head.weight"][0, 0] = float("nan")
    checkpoint.save(workspace / "nan", 9, broken, {}, saved.state)
    (workspace / "empty").mkdir()
    return workspace


def test_mistakes_are_refused_with_a_fix_and_nothing_is_written(train_tiny, teachers):
    """All in one test: the teachers are written once."""
    before = read_files(teachers)
    for mistake, (preset, flags, message) in MISTAKES.items():
        code, out, err = train_tiny(preset, "--moe.n-expert", 1, "--steps", 2, *flags)
        assert code == 2, (mistake, out)
        assert message in " ".join((out + err).split()), (mistake, err)
        assert "Traceback" not in err
    after = {path: x for path, x in read_files(teachers).items() if "cache" not in path.parts}
    assert after.keys() - before.keys() <= {p for p in after if p.name.endswith(".lock")}
    assert all(after[path] == x for path, x in before.items() if "cache" not in path.parts)


def test_a_teacher_that_may_have_seen_the_validation_data_is_said(train_tiny, workspace):
    (workspace / "val.txt").write_text("8 times 8 makes 64.\n" * 30)
    same = ("--steps", 1, "--eval-every", 1, "--teacher", "teacher")
    for changes, message in (
        ((), None),
        (("--val-fraction", "0.05"), None),  # a part of what the teacher held out
        (("--val-fraction", "0.3"), "trained on a part of this run's validation data"),
        (("--val-data", "val.txt"), "was trained on other data (text.txt) or another split"),
    ):
        save_teacher(workspace / "teacher", "v2-tiny")
        code, out, err = train_tiny("v1-tiny", *same, *changes, "--out-dir", "run")
        assert code == 0, err
        assert ("warning    the teacher" in out) == (message is not None), changes
        assert message is None or message in out
    save_teacher(workspace / "teacher", "v2-tiny", "--data", "val.txt")
    code, out, err = train_tiny("v1-tiny", *same, "--val-data", "val.txt", "--out-dir", "run")
    assert code == 0 and "trained on this run's validation data, --val-data val.txt" in out, err


def test_a_plan_says_what_the_teacher_adds(train_tiny, workspace):
    save_teacher(workspace / "teacher", "v2-tiny")
    code, out, err = train_tiny("v1-tiny", "--plan", "--teacher", "teacher")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("teacher "))
    total, _ = checkpoint.load_model(checkpoint.load(workspace / "teacher")).count_parameters()
    assert "Not counted below" in line and f"{total / 1e3:.4g}k parameters" in line
    code, _, err = train_tiny("v1-tiny", "--plan", "--teacher", "nowhere")
    assert code == 2 and "no such run" in err


def test_the_hash_of_the_teacher_is_stored(train_tiny, workspace):
    save_teacher(workspace / "teacher", "v2-tiny")
    assert train_tiny("v1-tiny", "--steps", 1, "--teacher", "teacher", "--out-dir", "run")[0] == 0
    state = checkpoint.load(workspace / "run").state
    sums = (workspace / "teacher/step_000009/SHA256SUMS").read_text()
    assert f"{state['teacher_sha256']}  model.safetensors" in sums
    assert state["config"]["teacher"] == "teacher"
    assert json.loads((workspace / "run/metrics.jsonl").read_text())["distill_loss"] > 0
