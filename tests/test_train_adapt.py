"""Fine-tuning and --ewc from the outside: what is said, what resumes, and what is refused."""

import io
import json
import shutil
import sys

import pytest
import torch

from nanods.training import checkpoint, consolidation
from tests.conftest import TINY
from tests.test_train import metrics, weights

V1 = ["v1-tiny", *TINY, "--attention.block-size", "8"]
TASKS = "tasks.jsonl"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder for the base run, which the first test trains."""
    return tmp_path_factory.mktemp("trained") / "base"


@pytest.fixture
def base(program, workspace, trained):
    """Put a base run, `base`, and a file of instructions into the workspace."""
    rows = [{"prompt": f"{n} + 1", "answer": f"{n + 1}", "task": "sums"} for n in range(30)]
    rows += [{"prompt": f"say {n} " * 9, "answer": "yes " * n, "task": "long"} for n in range(1, 9)]
    rows.append({"text": (workspace / "text.txt").read_text()})
    (workspace / TASKS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not trained.exists():
        flags = ["--data", "text.txt", "--steps", 6, "--out-dir", trained]
        code, _, err = program("train", *V1, *flags)
        assert code == 0, err
    shutil.copytree(trained, "base")
    return workspace


def finetune(*more):
    return ["train", *V1, "--stage", "finetune", "--init-from", "base", "--data", TASKS, *more]


def test_a_run_is_fine_tuned_evaluated_and_asked(program, base, monkeypatch):
    code, out, err = program(*finetune("--steps", 5, "--mix", "sums=3,plain=1"))
    assert code == 0, err
    for words in (
        "stage      finetune: --lr 0.005 --expert-lr 0.005 --out-dir runs/v1-tiny-finetuned\n",
        "start      from base/step_000006",
        "before the first step",
        f"{TASKS}: rows of each task for training + validation",
        "sums 27 + 3 (0.75), long 7 + 1 (0), plain",
        "cut        of 39 examples 8 prompts at the left and 2 answers at the end",
        "4 examples of up to 32 tokens",
        "bits per byte of the answers (sums",
        "answer  ",
        "--chat",
    ):
        assert words in out, words
    run = base / "runs/v1-tiny-finetuned"
    rows = metrics(run)
    assert rows[0]["step"] == 0 and rows[-1]["examples"] == 20
    for name in ("val_loss", "val_bpb", "val_bpb_sums", "val_bpb_long", "val_loss_sums"):
        assert name in rows[0] and name in rows[-1]
    assert rows[-1]["val_loss_sums"] < rows[0]["val_loss_sums"]

    code, out, err = program("evaluate", run, "--json", "-")
    assert code == 0 and json.loads(out)["metrics"]["val_bpb"] == pytest.approx(
        rows[-1]["val_bpb"], rel=1e-2
    )
    code, out, err = program("evaluate", "base", "--data", TASKS, "--json", "-")
    assert code == 0 and json.loads(out)["metrics"].keys() >= {"val_bpb_sums", "val_bpb_long"}
    code, _, err = program("evaluate", run, "--data", "text.txt")
    assert code == 0, err

    likeliest = ("--temperature", 0, "--max-new-tokens", 9)
    code, out, err = program("sample", run, "--chat", "--prompt", "3 + 1", *likeliest)
    assert code == 0 and "\ufffd\ufffd\ufffd" not in out, err
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 1\nand " + "more " * 9 + "\n\n9 + 1\n"))
    code, out, err = program("sample", run, "--chat", "--max-new-tokens", 5)
    assert code == 0 and out.count("only the last 32 tokens") == 1, err
    code, _, err = program("sample", "base", "--chat")
    assert code == 2 and "has not learnt to answer" in err and "finetune-v1" in err
    code, _, err = program("sample", run, "--chat", "--num-samples", 2)
    assert code == 2 and "--num-samples" in err


def test_an_answer_ends_where_the_model_ends_it(program, base):
    """A model that has learnt one answer by heart says it, and nothing after it."""
    for name in ("one.jsonl", "val.jsonl"):
        (base / name).write_text('{"prompt": "a", "answer": "bcd"}\n')
    flags = ["--data", "one.jsonl", "--val-data", "val.jsonl", "--steps", 80, "--lr", 0.03]
    code, _, err = program("train", *V1, *flags, "--out-dir", "one")
    assert code == 0, err
    assert metrics(base / "one")[-1]["val_loss"] < 0.3
    code, out, _ = program("sample", "one", "--chat", "--prompt", "a", "--temperature", 0)
    assert code == 0 and out == "bcd\n"


def test_a_fine_tuned_run_keeps_its_tokenizer(program, base):
    """Where the base run is gone, or was trained anew on another text."""
    first = ["train", *V1, "--vocab-size", 300, "--steps", 2, "--out-dir", "bpe"]
    assert program(*first, "--data", "text.txt")[0] == 0
    flags = ["--vocab-size", 300, "--init-from", "bpe", "--steps", 4, "--save-every", 2]
    assert program(*finetune(*flags, "--out-dir", "whole"))[0] == 0
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/step_000004")
    shutil.rmtree("cut/best")
    shutil.rmtree("bpe")
    code, _, err = program("train", *V1, "--data", TASKS, "--resume", "--out-dir", "cut")
    assert code == 0, err
    (base / "other.txt").write_text((base / "text.txt").read_text()[::-1])
    assert program(*first, "--data", "other.txt")[0] == 0
    val_bpb = metrics(base / "whole")[-1]["val_bpb"]
    assert weights(base / "cut") == weights(base / "whole")
    assert metrics(base / "cut")[-1]["val_bpb"] == val_bpb
    code, out, err = program("evaluate", "whole", "--json", "-")
    assert code == 0 and json.loads(out)["metrics"]["val_bpb"] == pytest.approx(val_bpb, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_with_ewc_resumes_bitwise(program, base, killed_at, optimizer):
    """It needs neither the other run nor its data any more."""
    flags = [*V1, "--data", TASKS, "--ewc", "base", "--ewc-sequences", 12, "--ewc-lambda", 30]
    flags += ["--optimizer", optimizer, "--steps", 6, "--save-every", 2]
    code, out, err = program("train", *flags, "--out-dir", "whole")
    assert code == 0, err
    assert "ewc        base/step_000006: Fisher information sampled, of 12 sequences of text" in out
    assert "start      from base/step_000006" in out
    with killed_at(5):
        program("train", *flags, "--out-dir", "cut")
    (base / "base").rename(base / "elsewhere")
    (base / "text.txt").unlink()
    code, out, err = program("train", *V1, "--data", TASKS, "--resume", "--out-dir", "cut")
    assert code == 0 and "after step 4" in out, err
    assert metrics(base / "cut") == metrics(base / "whole")
    assert weights(base / "cut") == weights(base / "whole")
    rows = metrics(base / "whole")
    assert rows[1]["ewc_penalty"] == 0 < rows[-1]["ewc_penalty"]  # rows[0] is before step 1
    for row in rows[1:]:
        assert row["train_loss"] == pytest.approx(row["ce_loss"] + row["ewc_penalty"], rel=1e-5)
    (base / "cut" / consolidation.FILE).write_bytes(b"damaged")
    (base / "cut/step_000006").rename(base / "gone")
    code, _, err = program("train", *V1, "--data", TASKS, "--resume", "--out-dir", "cut")
    assert code == 2 and "start a new run" in err


def test_the_penalty_enters_once_a_step_whatever_the_micro_batch(program, base):
    """And it holds: the larger lambda, the nearer to the old weights."""
    flags = [*V1, "--data", TASKS, "--ewc", "base", "--ewc-sequences", 4, "--dtype", "fp64"]
    flags += ["--steps", 5]
    for name, more in {
        "whole": ["--micro-batch", 4],
        "parts": ["--micro-batch", 1],
        "loose": ["--ewc-lambda", 0],
        "l2": ["--ewc-fisher", "none", "--ewc-lambda", 1],
    }.items():
        code, _, err = program("train", *flags, *more, "--out-dir", name)
        assert code == 0, err
    old = checkpoint.load(base / "base").model
    whole, parts, loose, l2 = (
        checkpoint.load(base / name).model for name in ("whole", "parts", "loose", "l2")
    )
    assert max((whole[k] - parts[k]).abs().max() for k in whole) < 1e-9
    held = consolidation.load(base / "whole", torch.device("cpu"), torch.float64)
    again = consolidation.load(base / "parts", torch.device("cpu"), torch.float64)
    assert all(torch.equal(held.fisher[k], again.fisher[k]) for k in held.fisher)
    assert all(torch.equal(held.weights[k], old[k].double()) for k in old)

    def distance(model, F):
        return sum((F[k] * (model[k] - old[k]).square()).sum() for k in old)

    assert distance(whole, held.fisher) < distance(loose, held.fisher)
    ones = {k: torch.ones_like(w) for k, w in old.items()}
    assert distance(l2, ones) < distance(loose, ones)


def test_tasks_add_up_over_three_runs(program, base):
    """The third run holds what the second one held, and the second one's own task: its answers."""
    flags = [*V1, "--ewc-sequences", 8, "--steps", 3, "--dtype", "fp64"]
    runs = [(TASKS, "base", "second"), ("text.txt", "second", "third")]
    runs.append(("text.txt", "second/best", "from-best"))
    for data, old, out in runs:
        code, printed, err = program(
            "train", *flags, "--data", data, "--ewc", old, "--out-dir", out
        )
        assert code == 0, err
        assert ("and what that run held" in printed) == (old != "base")
    code, *_ = program(
        "train", *flags, "--data", "text.txt", "--ewc", "second", "--ewc-fisher", "data",
        "--out-dir", "data",
    )  # fmt: skip
    assert code == 0
    first, both = (
        consolidation.load(base / name, torch.device("cpu"), torch.float64)
        for name in ("second", "third")
    )
    grown = [(both.fisher[k] - first.fisher[k]).min() for k in first.fisher]
    assert min(grown) > -1e-15
    assert sum(F.sum() for F in both.fisher.values()) > sum(F.sum() for F in first.fisher.values())


def test_what_cannot_be_adapted_is_refused(program, base):
    (base / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    data = ["--data", TASKS, "--steps", 2, "--out-dir", "new"]
    for words, reason in (
        ([*data, "--stage", "finetune"], "--stage finetune goes on from a trained run"),
        ([*data, "--ewc", "none"], "--ewc none: no checkpoint in none"),
        ([*data, "--ewc", "base", "--n-embd", 32], "--ewc base: that run has --n-embd 16"),
        (
            [*data, "--ewc", "base", "--n-layer", 1, "--init-from", "one-layer"],
            "--ewc base: that run has --n-layer 2",
        ),
        ([*data, "--ewc-lambda", -1], "--ewc-lambda -1: must be at least 0"),
        ([*data, "--mix", "sum=1"], "--mix sum=1: tasks.jsonl has no examples of sum"),
        (["--data", "text.txt", "--mix", "sums=1"], "--mix sums=1: --data text.txt"),
        (["--data", "bad.jsonl"], "--data bad.jsonl: line 2: the answer is null"),
    ):
        code, _, err = program("train", *V1, *words)
        assert code == 2 and reason in err, (words, err)
        assert not (base / "new").exists()
