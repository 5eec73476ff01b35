"""Arithmetic: what the text promises, and that the score counts whole answers."""

import json
import re

import pytest
import torch

from nanods.attention import AttentionConfig
from nanods.bench import arithmetic
from nanods.bench.arithmetic import (
    DIGITS,
    Problem,
    answers,
    exam,
    is_held_out,
    practice,
    score,
    text_of,
)
from nanods.gpt import GPT, GPTConfig

KINDS = pytest.mark.parametrize("kind", list(DIGITS))
ORDERS = pytest.mark.parametrize("units_first", [True, False], ids=["units first", "units last"])


class Calculator:
    """A stand-in for a model: reads the prompts, and writes the answers as they should be, or changed."""

    def __init__(self, units_first, change=lambda digits: digits):
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


def wrong_at(place):
    def change(digits):
        at = place % len(digits)
        return digits[:at] + str((int(digits[at]) + 1) % 10) + digits[at + 1 :]

    return change


@ORDERS
def test_every_line_is_right(units_first):
    lines = text_of(practice(3000), units_first).splitlines()
    assert len(lines) == 3000
    for line in lines:
        a, kind, b, answer = re.fullmatch(r"(\d+)([+*])(\d+)=(\d+)", line).groups()
        assert len(a) == len(b) == DIGITS[kind]
        value = int(answer[::-1] if units_first else answer)
        assert value == (int(a) + int(b) if kind == "+" else int(a) * int(b))


def test_no_pair_of_the_exam_is_in_the_text_in_either_order():
    text = text_of(practice(30_000), True)
    told = {tuple(sorted(pair)) for pair in re.findall(r"^(\d+)\*(\d+)=", text, re.M)}
    assert len(told) > 3000, "nearly every product that is not held out should occur"
    assert not told & {tuple(sorted((str(p.a), str(p.b)))) for p in exam("*", 500)}
    told = {tuple(sorted(pair)) for pair in re.findall(r"^(\d+)\+(\d+)=", text, re.M)}
    assert not told & {tuple(sorted((str(p.a), str(p.b)))) for p in exam("+", 500)}


@KINDS
def test_a_pair_is_held_out_in_both_orders_or_in_none(kind):
    random = torch.Generator().manual_seed(0)
    low, high = 10 ** (DIGITS[kind] - 1), 10 ** DIGITS[kind]
    pairs = torch.randint(low, high, (4000, 2), generator=random).tolist()
    held = [is_held_out(Problem(a, kind, b)) for a, b in pairs]
    assert held == [is_held_out(Problem(b, kind, a)) for a, b in pairs]
    assert 0.1 < sum(held) / len(held) < 0.15  # one in 8


@KINDS
def test_the_exam_asks_nothing_twice(kind):
    problems = exam(kind, 500)
    assert len(set(problems)) == 500 and {problem.kind for problem in problems} == {kind}


def test_both_kinds_are_practised_equally():
    kinds = [problem.kind for problem in practice(4000)]
    assert 0.45 < kinds.count("*") / 4000 < 0.55


def test_the_same_seed_gives_the_same_problems():
    assert practice(200) == practice(200) == practice(300)[:200] != practice(200, seed=1)
    assert exam("*", 200) == exam("*", 200) != exam("*", 200, seed=1)


@KINDS
@ORDERS
def test_the_score_is_1_for_right_answers_and_0_for_one_wrong_digit(kind, units_first):
    problems = exam(kind, 50)
    assert score(Calculator(units_first), problems, units_first) == 1.0
    for place in (0, 1, -1):
        assert score(Calculator(units_first, wrong_at(place)), problems, units_first) == 0.0
    assert score(Calculator(units_first, lambda digits: digits + "0"), problems, units_first) == 0.0
    assert score(Calculator(units_first, lambda digits: digits[:-1]), problems, units_first) == 0.0


def test_a_model_that_never_ends_its_line_is_cut_off_and_wrong():
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=16, context_length=64, attention=AttentionConfig("dense")
    )
    model = GPT(
        config
    ).eval()  # before the first step all logits are 0, and the likeliest token is the zero byte
    assert answers(model, ["12*34=", "56*78="]) == ["\0" * arithmetic.LONGEST] * 2
    assert score(model, exam("*", 20), True) == 0.0


def test_a_finished_table_says_what_v2_gains():
    def run(variant, seed, plus, times):
        scores = {"+": plus, "*": times, "both": (plus + times) / 2}
        return {"variant": variant, "seed": seed, "score": scores, "cpu_seconds": 60.0}

    runs = [
        run("v1", 0, 0.4, 0.0),
        run("v1", 1, 0.6, 0.0),
        run("v1-2f", 0, 0.8, 0.4),
        run("v2", 0, 0.75, 0.5),
    ]
    summary = arithmetic.summarise(runs)
    assert summary["variants"]["v1"]["+"] == {"mean": 0.5, "least": 0.4, "most": 0.6}
    assert summary["variants"]["v1"]["seeds"] == 2
    against = summary["verdict"]
    assert against["v2 against v1"]["+"]["ratio"] == pytest.approx(1.5)
    assert against["v2 against v1"]["*"]["ratio"] is None, "nothing can be said relative to none"
    assert against["v2 against v1-2f"]["both"]["points"] == pytest.approx(2.5)


def test_the_table_and_the_picture_are_written(tmp_path, monkeypatch, capsys):
    def train(args, data, variant, seed):
        assert data.read_text().count("\n") == 300
        score = {"+": 0.5, "*": 0.25 + 0.1 * seed, "both": 0.375 + 0.05 * seed}
        return {"variant": variant, "seed": seed, "score": score, "cpu_seconds": 60.0}

    monkeypatch.setattr(arithmetic, "train", train)
    monkeypatch.setenv("NANODS_DATA", str(tmp_path))
    words = [
        "--lines",
        "300",
        "--seeds",
        "2",
        "--results",
        str(tmp_path),
        "--runs",
        str(tmp_path / "runs"),
    ]
    monkeypatch.setattr("sys.argv", ["arithmetic", *words])
    arithmetic.main()
    table = json.loads((tmp_path / "arithmetic.json").read_text())
    assert len(table["runs"]) == 6 and set(table["verdict"]) == {
        "v2 against v1",
        "v2 against v1-2f",
    }
    assert table["verdict"]["v2 against v1"]["*"] == {"points": 0.0, "ratio": 1.0}
    assert (tmp_path / "arithmetic.png").stat().st_size > 10_000
    assert "v2 against v1-2f: both +0.0 points" in capsys.readouterr().out
