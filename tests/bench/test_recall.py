"""The recall bench: the generator keeps the rules that its results depend on."""

import json
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from nanods.bench import recall
from nanods.bench.recall import (
    FAR,
    HELD_OUT,
    KINDS,
    NEAR,
    draw_batch,
    reaches_pair,
    task_at_step,
)

TASKS = pytest.mark.parametrize("task", [NEAR, FAR], ids=["near", "far"])


@TASKS
def test_every_key_appears_once_in_a_pair_and_once_as_a_question(task):
    tokens, pair_positions, question_positions = draw_batch(0, 0, 50, task)
    pairs, pairs_end, questions_start, T = task
    assert tokens.shape == (50, T)
    assert pair_positions.min() >= 0 and pair_positions.max() + 1 < pairs_end <= T // 2
    assert question_positions.min() >= questions_start and question_positions.max() + 1 < T
    keys, values = tokens.gather(1, pair_positions), tokens.gather(1, pair_positions + 1)
    assert torch.equal(tokens.gather(1, question_positions), keys), "a question without its pair"
    answers = tokens.gather(1, question_positions + 1)
    assert torch.equal(answers, values), "an answer does not follow its question"
    assert all(row.unique().numel() == pairs for row in keys)
    assert keys.max() < KINDS <= values.min() and values.max() < 2 * KINDS


@TASKS
def test_all_other_tokens_are_filler(task):
    tokens, pair_positions, question_positions = draw_batch(0, 1, 50, task)
    for positions in (
        pair_positions,
        pair_positions + 1,
        question_positions,
        question_positions + 1,
    ):
        tokens.scatter_(1, positions, 2 * KINDS)
    assert tokens.min() >= 2 * KINDS and tokens.max() < 3 * KINDS


def test_the_curriculum_grows_from_near_to_far():
    args = recall.Args(near_steps=3, grow_steps=10, far_steps=3)
    tasks = [task_at_step(step, args) for step in range(16)]
    assert tasks[:4] == [NEAR] * 4 and tasks[13:] == [FAR] * 3
    for before, after in pairwise(tasks):
        assert all(a <= b for a, b in zip(before, after, strict=True))
    for step, task in enumerate(tasks):
        assert draw_batch(0, step, 2, task).tokens.shape == (2, task.T)


def test_block_attention_covers_the_shortest_sequences():
    assert recall.SPARSE.block_size * (recall.SPARSE.top_blocks + 1) >= NEAR.T


def test_no_pair_crosses_the_boundary_of_a_block():
    _, pair_positions, question_positions = draw_batch(0, 2, 50)
    assert not (torch.cat([pair_positions, question_positions]) % 2).any()


def test_a_window_cannot_reach_the_pairs_even_through_both_layers():
    size, blocks = recall.SPARSE.block_size, recall.SPARSE.top_blocks
    assert FAR.questions_start // size - 2 * blocks > (FAR.pairs_end - 1) // size


def test_a_batch_depends_on_seed_and_step_alone():
    batches = [draw_batch(1, step, 4) for step in range(3)]
    repeated = draw_batch(1, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(repeated, batches[2], strict=True))
    for other in (draw_batch(1, 1, 4), draw_batch(2, 2, 4), draw_batch(HELD_OUT, 2, 4)):
        assert not torch.equal(other.tokens, batches[2].tokens)


def test_all_keys_values_and_positions_occur():
    tokens, pair_positions, question_positions = draw_batch(0, 3, 200)
    assert tokens.unique().numel() == 3 * KINDS
    assert question_positions.unique().numel() == (FAR.T - FAR.questions_start) // 2
    assert pair_positions.unique().numel() == FAR.pairs_end // 2


def test_reaches_pair_says_whether_a_head_selects_the_block_of_the_pair():
    batch = draw_batch(0, 4, 2)
    B, H, T = 2, 2, FAR.T
    blocks = torch.full((B, H, T, 1), FAR.pairs_end // 16)  # a block without pairs
    blocks[:, 1] = 0  # the second head selects block 0 everywhere
    reached = reaches_pair(blocks, batch, 16)
    assert not reached[:, 0].any()
    assert torch.equal(reached[:, 1], batch.pair_positions < 16)
    assert torch.equal(reaches_pair(blocks[:, :, ::16], batch, 16), reached), (
        "the selection of a tile must count for each of its queries"
    )


def test_finished_runs_are_kept_unless_other_settings_or_fresh(tmp_path, monkeypatch, capsys):
    calls = []

    def train(variant, seed, args):
        calls.append((variant, seed))
        return {"accuracy": 0.5, "accuracy_near": 0.5, "cpu_seconds": 1.0}

    monkeypatch.setattr(recall, "train", train)
    monkeypatch.setattr(recall, "probe", lambda variant, seed, args: [5.0])

    def count_training_runs(*args):
        monkeypatch.setattr("sys.argv", ["recall", "--results", str(tmp_path), *args])
        calls.clear()
        recall.main()
        return len(calls)

    N = len(recall.VARIANTS)
    assert count_training_runs("--seeds", "1") == N
    assert count_training_runs("--seeds", "2") == N
    assert count_training_runs("--seeds", "2") == 0
    table = json.loads((tmp_path / "recall.json").read_text())
    assert table["runs"]["window/1"] == {"accuracy": 0.5, "accuracy_near": 0.5, "cpu_seconds": 1.0}
    assert list(table) == ["settings", "summary", "why", "runs"]
    assert count_training_runs("--seeds", "1", "--fresh") == N
    assert count_training_runs("--seeds", "1", "--lr", "1") == N
    assert "stale      recall, window/0: other settings (lr)" in capsys.readouterr().out


def test_the_probe_has_the_losses_of_training_in_fp64():
    args = recall.Args(near_steps=2, grow_steps=2, far_steps=2, batch_size=2)
    for variant in ("dense", "tree"):
        losses = recall.probe(variant, 0, args)
        assert losses == recall.probe(variant, 0, args)
        model = recall.new_model(variant, 0)
        steps = recall.training_steps(model, 0, args, nullcontext())
        assert [loss for loss, _ in steps][: len(losses)] == pytest.approx(losses, rel=1e-3)
