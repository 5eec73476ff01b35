"""Associative recall: what the generator promises, without which its figures would mean something else."""

from itertools import pairwise

import pytest
import torch

from nanods.bench import recall
from nanods.bench.recall import FAR, HELD_OUT, KINDS, NEAR, draw, lesson, reached

TASKS = pytest.mark.parametrize("task", [NEAR, FAR], ids=["near", "far"])


@TASKS
def test_every_pair_is_told_once_and_asked_for_once_where_it_should_be(task):
    tokens, told, asked = draw(0, 0, 50, task)
    pairs, end, first, T = task
    assert tokens.shape == (50, T)
    assert told.min() >= 0 and told.max() + 1 < end <= T // 2
    assert asked.min() >= first and asked.max() + 1 < T
    keys, values = tokens.gather(1, told), tokens.gather(1, told + 1)
    assert torch.equal(tokens.gather(1, asked), keys), "a key is asked for that was not given"
    assert torch.equal(tokens.gather(1, asked + 1), values), "an answer is not where it should be"
    assert all(row.unique().numel() == pairs for row in keys)
    assert keys.max() < KINDS <= values.min() and values.max() < 2 * KINDS


@TASKS
def test_all_else_is_filler(task):
    tokens, told, asked = draw(0, 1, 50, task)
    for at in (told, told + 1, asked, asked + 1):
        tokens.scatter_(1, at, 2 * KINDS)
    assert tokens.min() >= 2 * KINDS and tokens.max() < 3 * KINDS


def test_the_lessons_grow_from_near_to_far():
    args = recall.Args(near_steps=3, grow_steps=10, far_steps=3)
    tasks = [lesson(step, args) for step in range(16)]
    assert tasks[:4] == [NEAR] * 4 and tasks[13:] == [FAR] * 3
    assert all(
        a <= b for before, after in pairwise(tasks) for a, b in zip(before, after, strict=True)
    )
    assert all(
        draw(0, step, 2, task).tokens.shape == (2, task.T) for step, task in enumerate(tasks)
    )


def test_the_shortest_sequences_are_read_whole():
    assert recall.SPARSE.block_size * (recall.SPARSE.top_blocks + 1) >= NEAR.T


def test_no_pair_is_cut_by_the_edge_of_a_block():
    _, told, asked = draw(0, 2, 50)
    assert not (torch.cat([told, asked]) % 2).any()


def test_a_window_cannot_reach_the_pairs_even_through_both_layers():
    size, blocks = recall.SPARSE.block_size, recall.SPARSE.top_blocks
    assert FAR.asked // size - 2 * blocks > (FAR.told - 1) // size


def test_a_batch_depends_on_seed_and_step_alone():
    again = [draw(1, step, 4) for step in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(draw(1, 2, 4), again[2], strict=True))
    for other in (draw(1, 1, 4), draw(2, 2, 4), draw(HELD_OUT, 2, 4)):
        assert not torch.equal(other.tokens, again[2].tokens)


def test_keys_values_and_places_are_all_used():
    tokens, told, asked = draw(0, 3, 200)
    assert tokens.unique().numel() == 3 * KINDS
    assert (
        asked.unique().numel() == (FAR.T - FAR.asked) // 2
        and told.unique().numel() == FAR.told // 2
    )


def test_reached_says_whether_a_head_reads_the_pairs_block():
    batch = draw(0, 4, 2)
    B, H, T = 2, 2, FAR.T
    blocks = torch.full((B, H, T, 1), FAR.told // 16)  # a block without pairs
    blocks[:, 1] = 0  # the second head reads block 0, everywhere
    found = reached(blocks, batch, 16)
    assert not found[:, 0].any()
    assert torch.equal(found[:, 1], batch.told < 16)
    assert torch.equal(reached(blocks[:, :, ::16], batch, 16), found), (
        "a tile's choice is that of each of its queries"
    )


def test_a_finished_run_is_kept_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    ran = []

    def train(variant, seed, args):
        ran.append((variant, seed))
        return {"accuracy": 0.5, "accuracy_near": 0.5, "cpu_seconds": 1.0}

    monkeypatch.setattr(recall, "train", train)

    def bench(*args):
        monkeypatch.setattr("sys.argv", ["recall", "--results", str(tmp_path), *args])
        ran.clear()
        recall.main()
        return len(ran)

    N = len(recall.VARIANTS)
    assert bench("--seeds", "1") == N
    assert bench("--seeds", "2") == N
    assert bench("--seeds", "2") == 0
    assert bench("--seeds", "1", "--fresh") == N
    with pytest.raises(recall.UserError, match="other settings"):
        bench("--lr", "1")
