"""Evaluating a finished run, and looking at data before a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanods.build import build_model
from nanods.config import PRESETS, to_dict
from nanods.data.examples import Examples
from nanods.data.text import load_text
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer
from nanods.evaluate import language_task
from nanods.training import checkpoint
from nanods.training.contrastive_checks import describe_captions, describe_standard_error
from nanods.training.finished_run import FinishedRun
from nanods.training.language_task import LanguageTask
from tests.test_train_gaps import write_table


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_of_v3_is_evaluated_on_its_own_data_and_on_others(shapes, program, workspace):
    finished, task = shapes
    before = files_of(workspace / "run")
    code, out, err = program("evaluate", "run", "--json", "-", "--device", "cpu")
    assert code == 0, err
    table = json.loads(out)
    expected = task.evaluate(finished.model)
    assert table["metrics"] == pytest.approx(expected)
    assert (table["data"], table["examples"], table["step"]) == ("shapes", 20, 7)
    assert "zero-shot accuracy among 10 labels: image" in err

    # The same held-out images as a folder of their own, and another that has them all.
    code, out, err = program("evaluate", "run", "--data", "shapes/val", "--json", "val.json")
    assert code == 0 and "shapes/val: 20 examples of 10 labels" in out, err
    other = json.loads((workspace / "val.json").read_text())["metrics"]
    for name in ("zero_shot_accuracy_image", "recall1_text_image", "recall1_image_text"):
        assert other[name] == pytest.approx(expected[name]), name
    (workspace / "shapes").rename(workspace / "moved")
    code, out, _ = program("evaluate", "run", "--data", "moved", "--examples", "30")
    assert code == 0 and "moved: 30 of 60 examples of 10 labels" in out
    assert "a recall of 0.5 has a standard error of 0.091, one of 0.9 of 0.055" in out
    assert files_of(workspace / "run") == before, "the run is not touched"


def test_a_table_with_gaps_is_described_drawn_and_evaluated(shapes, program, workspace):
    write_table(workspace / "table")
    code, out, err = program("check", "table")
    assert code == 0, err
    assert "held-out examples of 4 labels in " in out and " images and " in out
    page = (workspace / "contact_sheet.html").read_text()
    assert 24 < page.count("<img") < 40 and 24 < page.count("<audio") < 40, "24 + 16, some lack it"
    # The run knows texts and images: sounds are left out, and so are items with one of the two.
    code, out, err = program("evaluate", "run", "--data", "table", "--json", "-")
    assert code == 0 and "zero-shot accuracy among 4 labels: image" in err, err
    metrics = json.loads(out)["metrics"]
    assert metrics.keys() >= {"recall1_text_image", "recall1_image_text"}
    assert not [name for name in metrics if "audio" in name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere"), "--data nowhere: there is no such folder"),
        (("--json", "nowhere/out.json"), "name a file in a folder that exists"),
        (("--json", "run"), "--json run: name a file"),
        (("--examples", "1"), "--examples 1: must be at least 2"),
        (("--data", "run"), "no captions are in it"),
    ],
)
def test_mistakes_are_refused_with_a_fix(shapes, program, flags, message):
    code, _, err = program("evaluate", "run", *flags)
    assert code == 2 and message in err and "Traceback" not in err, err


def test_a_language_model_is_evaluated_on_all_of_another_text(program, workspace):
    model = replace(PRESETS["v0-tiny"].model, n_layer=1, n_head=2, n_embd=16, context_length=32)
    config = replace(PRESETS["v0-tiny"], model=model, data="text.txt", dtype="fp32")
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    data = load_text("text.txt")
    state = {"step": 3, "config": to_dict(config), "tokenizer": ByteTokenizer().to_json()}
    checkpoint.save(workspace / "gpt", 3, model.state_dict(), {}, state)
    task = LanguageTask(config, torch.device("cpu"), data)
    code, out, err = program("evaluate", "gpt", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["metrics"] == pytest.approx(task.evaluate(model.eval()))
    # A file that holds the validation text alone.
    (workspace / "other.txt").write_bytes(bytes(data.val.tolist()))
    code, out, err = program("evaluate", "gpt", "--data", "other.txt", "--json", "-")
    table = json.loads(out)
    assert table["metrics"] == pytest.approx(task.evaluate(model))
    assert table["tokens"] == len(data.val) and "all of other.txt" in err
    code, _, err = program("evaluate", "gpt", "--data", "othre.txt")
    assert code == 2 and "did you mean other.txt?" in err


def test_a_text_is_read_in_the_tokens_of_the_run(workspace):
    config = replace(PRESETS["v0-tiny"], data="text.txt")
    config = replace(config, model=replace(config.model, context_length=32))
    text = (workspace / "text.txt").read_text()
    tokenizer = BPETokenizer.train(text, 300)
    finished = FinishedRun(workspace, {}, config, tokenizer, None)
    for other in (None, "text.txt"):  # its last tenth, and all of it
        data = language_task(finished, torch.device("cpu"), other).data
        decoded = tokenizer.decode(data.val.tolist())
        assert decoded == (text if other else text[int(0.9 * len(text)) :])
        assert data.val_bytes == len(decoded) > len(data.val)


# ---- before the first step -----------------------------------------------------------------------


def test_the_data_are_described_and_drawn_without_training(shapes, program, workspace):
    (workspace / "shapes/train/ring/0000.png").write_bytes(b"no image")
    code, out, err = program("check", "shapes")
    assert code == 0, err
    for words in (
        "data       shapes: 40 training + 20 held-out examples of 10 labels in 60 images, sha256",
        "1 of them cannot be and are skipped, the first: shapes/train/ring/0000.png",
        "captions   10 of 40 training captions are distinct; the commonest, ",
        "cut        nothing",
        "evaluated  20 held-out examples: a recall of 0.5 has a standard error of 0.112",
        "notice     train.py needs a smaller --batch-size than v3-tiny's, 128",
        "s for each evaluation",
    ):
        assert words in out, (words, out)
    page = (workspace / "contact_sheet.html").read_text()
    assert page.count("<img") == 24 + 20 and "shapes, as v3-tiny reads it" in page
    for flags, message in (
        (("nowhere",), "there is no such folder"),
        (("shapes", "--preset", "v1-tiny"), "--preset v1-tiny: choose one of v3-tiny"),
        (("shapes", "--out", "shapes"), "--out shapes: name a file"),
    ):
        code, _, err = program("check", *flags)
        assert code == 2 and message in err and "Traceback" not in err, err


def test_captions_and_standard_errors_in_words():
    assert describe_captions(["a", "b"]) == "2 of 2 training captions are distinct"
    text = describe_captions(["A cat", "a  cat", "dog"])
    assert text == "2 of 3 training captions are distinct; the commonest, 'a cat', is that of 2"
    assert describe_captions([""]) is None
    gallery = Examples(np.arange(100), ["x"] * 100)
    text = describe_standard_error(gallery, ("text", "image"))
    assert text.endswith("error of 0.050, one of 0.9 of 0.030") and "of which" not in text
    has_image = np.arange(100) < 25  # the error is that of these
    text = describe_standard_error(
        replace(gallery, present={"image": has_image}), ("text", "image")
    )
    assert "100 held-out examples, of which at least 25 have both of a pair: " in text
    assert text.endswith("error of 0.100, one of 0.9 of 0.060")
