"""Labels in prompts: sample.py --labels answers what the run's zero-shot accuracy counts."""

import numpy as np
import pytest

from nanods.bench.labels import CLASSES
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.training.zero_shot import (
    MOST_LABELS,
    describe_cut_prompts,
    fill_template,
    label_probabilities,
    read_labels,
)


def test_the_answers_are_those_that_the_zero_shot_accuracy_counts(shapes, program, workspace):
    finished, task = shapes
    embeddings, _ = task.embed(finished.model, task.inputs(task.gallery))
    labels = list(task.labels.values())
    assert labels == CLASSES and len(task.gallery.ids) == 20
    answers = []
    for embedding in embeddings["image"]:
        probabilities = label_probabilities(
            finished.model, embedding, labels, finished.config, finished.tokenizer
        )
        assert probabilities.shape == (10,) and probabilities.sum().item() == pytest.approx(1)
        answers.append(labels[int(probabilities.argmax())])
    accuracy = np.mean([a == b for a, b in zip(answers, task.gallery.captions, strict=True)])
    assert accuracy == task.evaluate(finished.model)["zero_shot_accuracy_image"]

    # The command line reads the files themselves, and gives the same answers.
    items = {task.data.items[i].image: n for n, i in enumerate(task.gallery.ids)}
    for path in list(items)[:3]:
        code, out, err = program("sample", "run", "--image", path, "--labels", ",".join(CLASSES))
        assert code == 0, err
        assert "labels     10, each read as '{}'" in out and "temperature of 0.1000" in out
        first = next(line for line in out.splitlines() if line.startswith("   1. "))
        assert first.split(maxsplit=2)[2] == answers[items[path]]
        assert "the other 5 together" in out


def test_any_modality_is_classified_with_the_template_shown(shapes, program, workspace):
    (workspace / "labels.txt").write_bytes("\ufeffa star\r\n\r\nring\nRING \nzebra\n".encode())
    flags = ("--labels-file", "labels.txt", "--prompt-template", "a very noisy drawing of {}")
    code, out, err = program("sample", "run", "--query", "star", *flags, "--top", 9)
    assert code == 0, err
    assert "notice     left out 1 of 5 labels, which repeat others" in out
    assert "never read: a, very, noisy, drawing, of" in out
    assert "cut        3 of 3 prompts after 24 tokens; 2 then equal to another: shorten them" in out
    assert "labels     3, each read as 'a very noisy drawing of {}'" in out
    shown = [line for line in out.splitlines() if line[:5].strip().endswith(".")]
    assert {line.split(maxsplit=2)[2] for line in shown} == {"a star", "ring", "zebra"}
    assert sum(float(line.split()[1]) for line in shown) == pytest.approx(1, abs=1e-3)
    assert not (workspace / "run/found.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--labels", ""), "--labels : no labels; give two or more, and put commas between them"),
        (("--labels", "cat,Cat , ,"), "--labels cat,Cat , ,: 1 label; give two or more"),
        (("--labels-file", "empty"), "--labels-file empty: the file is empty"),
        (("--labels-file", "blank"), "--labels-file blank: no labels; give two or more"),
        (("--labels-file", "one"), "1 label; give two or more, and write one on each line"),
        (("--labels-file", "nowhere"), "--labels-file nowhere: cannot be read"),
        (("--labels-file", "latin"), "--labels-file latin: not UTF-8"),
        (("--labels", "a,b", "--labels-file", "one"), "--labels and --labels-file: give one"),
        (("--labels", "a,b", "--gallery", "."), "--gallery: labels are what the query is compared"),
        (("--labels", "a,b", "--prompt-template", "a photo"), "write {} once"),
        (("--labels", "a,b", "--prompt-template", "{} or {}"), "write {} once"),
        (("--prompt-template", "a {}"), "--prompt-template is for labels: give --labels"),
        (("--labels", "a,b", "--audio", "x.wav"), "--audio: give this model one query, by --query"),
    ],
)
def test_mistakes_are_refused_with_a_fix(shapes, program, workspace, flags, message):
    (workspace / "empty").write_text("")
    (workspace / "blank").write_text("\n \n")
    (workspace / "one").write_text("one\n")
    (workspace / "latin").write_bytes("caf\xe9\nth\xe9\n".encode("latin-1"))
    query = () if "--audio" in flags else ("--query", "star")
    code, _, err = program("sample", "run", *query, *flags)
    assert code == 2 and message in err and "Traceback" not in err, err


def test_labels_need_something_to_classify(shapes, program):
    code, _, err = program("sample", "run", "--labels", "a,b")
    assert code == 2 and "--labels: say what to classify, by --query or --image" in err


def test_too_many_labels_are_refused(tmp_path):
    (tmp_path / "many").write_text("\n".join(map(str, range(MOST_LABELS + 1))))
    with pytest.raises(UserError, match="10,001 labels, and at most 10,000 are compared"):
        read_labels(None, tmp_path / "many")
    (tmp_path / "many").write_text("\n".join(map(str, range(MOST_LABELS))))
    assert len(read_labels(None, tmp_path / "many")[0]) == MOST_LABELS


def test_labels_may_hold_braces_and_end_up_equal_when_they_are_cut():
    assert fill_template("a {}.", ["{x}", "b  {}"]) == ["a {x}.", "a b {}."]
    prompts = ["a long one", "a long two", "short"]
    text = describe_cut_prompts(prompts, ByteTokenizer(), 7)
    assert text == "2 of 3 prompts after 7 tokens; 1 then equal to another: shorten them"
    assert describe_cut_prompts(prompts, ByteTokenizer(), 10) is None
