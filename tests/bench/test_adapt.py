"""The arms of the adaptation bench, the choice of lambda, and what its table says of known runs."""

import json
import sys

import pytest
import torch

from nanods import ewc
from nanods.bench import adapt as bench
from nanods.command_line import from_command_line
from nanods.data.instructions import NAME, Example, Instructions
from nanods.training import consolidation
from nanods.training.instruction_task import InstructionTask

BEFORE = {"doctest": 3.0, "docstring": 2.5, "source": 2.0, "dialogue": 2.0, "plain": 1.9}
RANDOM = "from random weights"


def flags_of(job):
    return dict(zip(job.words[1::2], job.words[2::2], strict=True))


def fake_result(job, out, rows):
    """Return the result of a run in which the weights are held: the larger lambda, the less it
    forgets; from an arm's third on it learns 0.4, where all others learn 0.5."""
    flags = flags_of(job)
    strength, is_large = 0.0, False
    if "--ewc" in flags:
        arm = next(arm for arm, fisher in bench.EWC.items() if fisher == flags["--ewc-fisher"])
        strength = float(flags["--ewc-lambda"]) / bench.LAMBDAS[arm][1]
        is_large = float(flags["--ewc-lambda"]) >= bench.LAMBDAS[arm][2]
    learnt, lost = 0.4 if is_large else 0.5, 0.06 / (1 + strength)
    curve = [
        {task: x - share * learnt for task, x in BEFORE.items()} | {"plain": 1.9 + share * lost}
        for share in (0, 0.5, 1)
    ]
    return {
        "before": curve[0] if "--init-from" in flags else None,
        "after": curve[-1],
        "curve": {"step": [0, 50, 100], "val_bpb": curve},
        "fisher": {f"blocks.{i}.mlp.up.weight": 0.1 + i for i in range(2)}
        | {"embedding.weight": 0.2, "head.weight": 0.3},
        "exact": dict.fromkeys(bench.TASKS, 0.25),
    }


def test_the_table_compares_each_arm_with_plain_fine_tuning(tmp_path, monkeypatch, capsys):
    trained = {}

    def train_all(name, jobs, summarise, results, runs, workers):
        for job in jobs:
            assert trained.setdefault(job.name, job.words) == job.words
            flags = flags_of(job)
            for flag in flags.keys() & {"--init-from", "--ewc"}:
                assert flags[flag] == str(job.needs.folder_in(runs, name))
            assert job.needs is None or job.needs.name in trained
        return {job.name: fake_result(job, None, None) for job in jobs}

    lengths = {"mixture": 128.0} | dict.fromkeys(bench.TASKS, 64.0)
    monkeypatch.setattr(bench, "train_all", train_all)
    monkeypatch.setattr(bench, "machine_of", lambda *_: {})
    monkeypatch.setattr(bench, "InstructionTask", lambda *_: None)
    monkeypatch.setattr(bench, "row_lengths", lambda _: lengths)
    monkeypatch.setattr(sys, "argv", ["adapt", "--seeds", "2", "--results", str(tmp_path)])
    bench.main()
    table = json.loads((tmp_path / "adapt.json").read_text())
    assert table["lambda"] == {arm: strengths[1] for arm, strengths in bench.LAMBDAS.items()}
    ewc = table["arms"]["EWC"]
    assert ewc["gain"] == pytest.approx([0.5, 0.5])
    assert ewc["gain_minus_plain"] == pytest.approx([0, 0])
    assert ewc["forgotten"] == pytest.approx([0.03, 0.03])
    assert ewc["forgotten_over_plain"] == pytest.approx([0.5, 0.5])
    assert ewc["forgotten_over_plain_at_equal_gain"] == pytest.approx([0.5, 0.5])
    assert table["arms"]["replay 1%"]["forgotten_over_plain"] == pytest.approx([1, 1])
    doctest = table["mixture"]["doctest"]
    assert doctest["mixture_improves_by"] == pytest.approx([0.5 / 3, 0.5 / 3])
    assert doctest["exact"]["base"] == [0.25, 0.25]
    assert table["directly"][RANDOM]["source"] == pytest.approx([1.5, 1.5])
    assert table["in_a_row"]["EWC"]["after docstring"]["plain"] == pytest.approx([1.93, 1.93])
    assert table["in_a_row"]["plain"]["base"] == {
        task: [BEFORE[task]] * 2 for task in ("plain", "source", "docstring")
    }
    for name in ("frontier", "forgetting", "fisher"):
        assert (tmp_path / f"adapt_{name}.png").stat().st_size > 3000
    printed = capsys.readouterr().out
    assert f"planned    {len(trained)} runs" in printed and "EWC, AdamW" in printed

    def config_of(name):
        return from_command_line("", list(trained[name]))

    assert config_of("replay 10%, seed 1").mix == "source=0.9,plain=0.1"
    assert config_of("EWC, AdamW, seed 1").optimizer == "adamw"
    assert config_of("L2 0.04, seed 1").ewc_fisher == "none"
    # As many tokens as the base's rows of 256 and its own.
    assert config_of(f"mixture {RANDOM}, seed 0").steps == bench.BASE_STEPS * 2 + bench.STEPS
    assert config_of(f"source {RANDOM}, seed 0").steps == bench.BASE_STEPS * 4 + bench.STEPS
    assert "EWC 1, seed 0" in trained and "EWC 1, seed 1" not in trained
    # Which arms are evaluated on the way.
    assert config_of("EWC 0.3, seed 1").eval_every == config_of("plain, seed 1").eval_every == 20
    assert config_of("replay 1%, seed 1").eval_every > bench.STEPS


def test_without_an_equal_gain_the_smallest_lambda_is_taken():
    def result(learnt):
        return {"before": BEFORE, "after": {task: x - learnt for task, x in BEFORE.items()}}

    tuned = {
        f"tune {arm} {s:g}": result(0.3)
        for arm, strengths in bench.LAMBDAS.items()
        for s in strengths
    }
    chosen = bench.choose_lambdas(tuned | {"tune plain": result(0.5)})
    assert chosen == {arm: strengths[0] for arm, strengths in bench.LAMBDAS.items()}


def test_forgetting_at_an_equal_gain_is_read_off_the_curve_of_plain_fine_tuning():
    bpb = [{"source": s, "plain": p} for s, p in ((2.0, 1.0), (1.6, 1.1), (1.4, 1.3))]
    run = {"curve": {"step": [0, 1, 2], "val_bpb": bpb}}
    assert bench.forgotten_at_gain(run, 0.2) == pytest.approx(0.05)
    assert bench.forgotten_at_gain(run, 0.5) == pytest.approx(0.2)
    assert bench.forgotten_at_gain(run, 0.9) == pytest.approx(0.3), "at its end"


def test_an_answer_is_exact_where_each_token_is_the_likeliest(monkeypatch):
    """A model that always says "a" answers "aaa" to the letter, and "ab" not. END counts not."""
    said = [("doctest", "aaa"), ("doctest", "ab"), ("source", "a"), ("docstring", "b")]
    said += [("dialogue", "a")]
    examples = [Example(task, (("user", "?"), ("assistant", answer))) for task, answer in said]
    data = Instructions(NAME, "0" * 64, examples, examples, "")

    class Model:
        def __call__(self, tokens):
            logits = torch.zeros(*tokens.shape, 256)
            logits[..., ord("a")] = 1
            return logits, []

    monkeypatch.setattr(bench, "load_run", lambda *_: type("Run", (), {"model": Model()}))
    monkeypatch.setattr(bench, "InstructionTask", lambda c, d: InstructionTask(c, d, data))
    exact = bench.exact_answers("run")
    assert exact == {"doctest": 0.5, "source": 1, "docstring": 0, "dialogue": 1}


def test_a_finished_run_is_stored_with_its_curve(tmp_path):
    words = ("v1-tiny", "--stage", "finetune", "--init-from", "base")
    job = bench.Job("plain, seed 0", words)
    bpb = {f"val_bpb_{task}": x for task, x in BEFORE.items()}
    rows = [{"step": 0, **bpb}, {"step": 1}, {"step": 2, "cpu_seconds": 5.0, **bpb}]
    result = bench.figures(job, tmp_path, rows)
    assert result["before"] == result["after"] == BEFORE
    assert result["curve"] == {"step": [0, 2], "val_bpb": [BEFORE, BEFORE]}
    assert "exact" not in result and "fisher" not in result


def test_a_run_that_holds_weights_is_stored_with_their_fisher_information(tmp_path):
    held = ewc.Consolidation({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 3.0])})
    consolidation.save(held, tmp_path)
    words = ("v1-tiny", "--stage", "finetune", "--ewc", "base")
    rows = [{"step": 2, "cpu_seconds": 5.0} | {f"val_bpb_{task}": x for task, x in BEFORE.items()}]
    result = bench.figures(bench.Job("EWC 1, seed 0", words), tmp_path, rows)
    assert result["fisher"] == {"w": 2.0}
