"""The arithmetic bench: its text, its held-out problems, and that whole answers are counted."""

import json
import re
from pathlib import Path

import pytest
import torch

from nanods.attention import AttentionConfig
from nanods.bench import arithmetic
from nanods.bench.arithmetic import (
    DIGITS,
    Problem,
    accuracy,
    generate_answers,
    held_out_problems,
    is_held_out,
    to_text,
    training_problems,
)
from nanods.errors import UserError
from nanods.gpt import GPT, GPTConfig
from nanods.training import checkpoint

KINDS = pytest.mark.parametrize("kind", list(DIGITS))
ORDERS = pytest.mark.parametrize("units_first", [True, False], ids=["units first", "units last"])


def unchanged(digits):
    return digits


class Calculator:
    """Stands in for a model: reads the prompts and writes right answers, or answers changed."""

    def __init__(self, units_first, change=unchanged):
        self.units_first, self.change = units_first, change

    def generate(self, tokens, max_new_tokens, temperature, stop):
        assert temperature == 0 and list(stop) == [ord("\n")]
        rows = []
        for row in tokens.tolist():
            a, kind, b = re.fullmatch(r"\n(\d+)([+*])(\d+)=", bytes(row).decode()).groups()
            value = str(int(a) + int(b) if kind == "+" else int(a) * int(b))
            text = self.change(value[::-1] if self.units_first else value) + "\n"
            rows.append((list(text.encode()) + [-1] * max_new_tokens)[:max_new_tokens])
        yield from torch.tensor(rows).T


def wrong_digit_at(position):
    def change(digits):
        i = position % len(digits)
        return digits[:i] + str((int(digits[i]) + 1) % 10) + digits[i + 1 :]

    return change


# ---- the text ------------------------------------------------------------------------------------


@ORDERS
def test_every_line_is_right(units_first):
    lines = to_text(training_problems(3000), units_first).splitlines()
    assert len(lines) == 3000
    for line in lines:
        a, kind, b, answer = re.fullmatch(r"(\d+)([+*])(\d+)=(\d+)", line).groups()
        assert len(a) == len(b) == DIGITS[kind]
        value = int(answer[::-1] if units_first else answer)
        assert value == (int(a) + int(b) if kind == "+" else int(a) * int(b))


def test_no_held_out_pair_is_in_the_text_in_either_order():
    text = to_text(training_problems(30_000), True)
    products = {tuple(sorted(pair)) for pair in re.findall(r"^(\d+)\*(\d+)=", text, re.M)}
    assert len(products) > 3000, "nearly every product that is not held out should occur"
    held_out = {tuple(sorted((str(p.a), str(p.b)))) for p in held_out_problems("*", 500)}
    assert not products & held_out
    sums = {tuple(sorted(pair)) for pair in re.findall(r"^(\d+)\+(\d+)=", text, re.M)}
    held_out = {tuple(sorted((str(p.a), str(p.b)))) for p in held_out_problems("+", 500)}
    assert not sums & held_out


@KINDS
def test_a_pair_is_held_out_in_both_orders_or_in_none(kind):
    generator = torch.Generator().manual_seed(0)
    low, high = 10 ** (DIGITS[kind] - 1), 10 ** DIGITS[kind]
    pairs = torch.randint(low, high, (4000, 2), generator=generator).tolist()
    held_out = [is_held_out(Problem(a, kind, b)) for a, b in pairs]
    assert held_out == [is_held_out(Problem(b, kind, a)) for a, b in pairs]
    assert 0.1 < sum(held_out) / len(held_out) < 0.15  # one in 8


@KINDS
def test_held_out_problems_are_all_different(kind):
    problems = held_out_problems(kind, 500)
    assert len(set(problems)) == 500 and {problem.kind for problem in problems} == {kind}


def test_both_kinds_occur_equally_often_in_training():
    kinds = [problem.kind for problem in training_problems(4000)]
    assert 0.45 < kinds.count("*") / 4000 < 0.55


def test_the_same_seed_gives_the_same_problems():
    first = training_problems(200)
    assert first == training_problems(200) == training_problems(300)[:200]
    assert first != training_problems(200, seed=1)
    first = held_out_problems("*", 200)
    assert first == held_out_problems("*", 200) != held_out_problems("*", 200, seed=1)


def test_more_held_out_problems_than_there_are_are_refused_before_training(monkeypatch):
    products = (Problem(a, "*", b) for a in range(10, 100) for b in range(10, 100))
    assert sum(map(is_held_out, products)) == arithmetic.MAX_HELD_OUT
    monkeypatch.setattr(arithmetic, "write_training_text", None)  # what comes next
    monkeypatch.setattr("sys.argv", ["arithmetic", "--held-out", "1028"])
    with pytest.raises(UserError, match="--held-out 1028: only 1,027 products are held out"):
        arithmetic.main()


# ---- accuracy ------------------------------------------------------------------------------------


@KINDS
@ORDERS
def test_accuracy_is_1_for_right_answers_and_0_for_one_wrong_digit(kind, units_first):
    problems = held_out_problems(kind, 50)

    def accuracy_with(change):
        return accuracy(Calculator(units_first, change), problems, units_first)

    assert accuracy_with(unchanged) == 1.0
    for position in (0, 1, -1):
        assert accuracy_with(wrong_digit_at(position)) == 0.0
    assert accuracy_with(lambda digits: digits + "0") == 0.0
    assert accuracy_with(lambda digits: digits[:-1]) == 0.0


def test_a_model_that_never_ends_its_line_is_cut_off_and_wrong():
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=64, attention=AttentionConfig("dense")
    )
    # Before the first step all logits are 0, and the most probable token is the zero byte.
    model = GPT(config).eval()
    answers = generate_answers(model, ["12*34=", "56*78="])
    assert answers == ["\0" * arithmetic.MAX_ANSWER_LENGTH] * 2
    assert accuracy(model, held_out_problems("*", 20), True) == 0.0


# ---- the table -----------------------------------------------------------------------------------


def test_the_summary_compares_v2_with_both_v1s():
    def run(variant, seed, plus, times):
        scores = {"+": plus, "*": times, "both": (plus + times) / 2}
        learnt = [100, 30.0] if plus > 0.7 else None
        figures = {"score": scores, "learnt": learnt, "cpu_seconds": 60.0}
        return {"variant": variant, "seed": seed} | figures

    runs = [
        run("v1", 0, 0.4, 0.0),
        run("v1", 1, 0.6, 0.0),
        run("v1-2f", 0, 0.8, 0.4),
        run("v2", 0, 0.75, 0.5),
    ]
    summary = arithmetic.summarise(runs)
    assert summary["variants"]["v1"]["+"] == {"mean": 0.5, "min": 0.4, "max": 0.6}
    assert summary["variants"]["v1"]["seeds"] == 2
    assert summary["variants"]["v1"]["learnt"] == [None, None]
    assert summary["variants"]["v2"]["learnt"] == [[100, 30.0]]
    verdict = summary["verdict"]
    assert verdict["v2 against v1"]["+"]["ratio"] == pytest.approx(1.5)
    assert verdict["v2 against v1"]["*"]["ratio"] is None, "v1 has 0: there is no ratio"
    assert verdict["v2 against v1-2f"]["both"]["points"] == pytest.approx(2.5)


def test_the_table_and_the_plot_are_written(tmp_path, monkeypatch, capsys):
    def train_all(bench, jobs, summarise, results, runs, workers):
        stored = {}
        for job in jobs:
            assert Path(job.config.data).read_text().count("\n") == 300
            seed = job.config.seed
            score = {"+": 0.5, "*": 0.25 + 0.1 * seed, "both": 0.375 + 0.05 * seed}
            curve = [[0, 0.0, 0.0], [100, 6.0, 0.5], [200, 12.0, 0.96], [300, 18.0, 0.9]]
            learnt = arithmetic.learnt_at(curve)
            assert learnt == [200, 12.0] and arithmetic.learnt_at(curve[:2]) is None
            figures = {"learnt": learnt, "step_cpu_seconds_sums": curve, "cpu_seconds": 60.0}
            stored[job.name] = {"score": score} | figures
        return stored

    monkeypatch.setattr(arithmetic, "train_all", train_all)
    monkeypatch.setattr(arithmetic, "machine_of", lambda *_: {})
    monkeypatch.setenv("NANODS_DATA", str(tmp_path))
    flags = ["--lines", "300", "--seeds", "2"]
    flags += ["--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["arithmetic", *flags])
    arithmetic.main()
    table = json.loads((tmp_path / "arithmetic.json").read_text())
    assert len(table["runs"]) == 6
    assert set(table["verdict"]) == {"v2 against v1", "v2 against v1-2f"}
    assert table["verdict"]["v2 against v1"]["*"] == {"points": 0.0, "ratio": 1.0}
    assert (tmp_path / "arithmetic.png").stat().st_size > 10_000
    assert (tmp_path / "arithmetic_sums.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "v2 against v1-2f: both +0.0 points" in said
    assert "v2    learnt to add in 2 of 2 runs, after steps (CPU-seconds): 200 (12 s)" in said
    monkeypatch.setattr("sys.argv", ["arithmetic", "--variants", "v1-2f", "v2", *flags])
    arithmetic.main()
    assert json.loads((tmp_path / "arithmetic.json").read_text()) == table
    said = capsys.readouterr().out
    assert (
        "v2 against v1-2f: both +0.0 points" in said
        and "left out: v1; so arithmetic.json is" in said
    )


def test_the_curve_has_the_scheduled_checkpoints_and_survives_their_deletion(tmp_path):
    for step in (0, 100, 137, 200, 250):  # 137: where the run was interrupted
        weights = {"w": torch.full((2,), float(step))}
        checkpoint.save(tmp_path, step, weights, {}, {"step": step, "cpu_seconds": step / 10}, 9)
    seen = []

    def right(saved):
        seen.append(saved.state["step"])
        return saved.state["step"] / 250

    curve = arithmetic.sums_curve(tmp_path, 250, right)
    assert curve == [[0, 0.0, 0.0], [100, 10.0, 0.4], [200, 20.0, 0.8], [250, 25.0, 1.0]]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_000250"]
    assert arithmetic.sums_curve(tmp_path, 250, right) == curve and len(seen) == 4
    # Another run in the same folder has another curve.
    checkpoint.save(tmp_path, 250, {}, {}, {"step": 250, "cpu_seconds": 30.0}, 9)
    assert arithmetic.sums_curve(tmp_path, 250, right) == [[250, 30.0, 1.0]]
