"""The grader of lesson 01: it passes the solutions, and finds in each wrong answer the mistake that is in it."""

from pathlib import Path

import check_01
import grade
import pytest
import torch
import torch.nn.functional as F
from torch import inf

from tests.lessons.wrong_answers import WrongAnswers

right = grade.load_file(Path(check_01.__file__).with_name("01_solutions.py"))


def scores(q, k):
    return q @ k.mT / q.size(-1) ** 0.5


def past(q):
    return torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril()


def attend(scores, mask, v):
    return scores.masked_fill(~mask, -inf).softmax(-1) @ v


def read(q, blocks, block_size):
    """Which keys `blocks` and the own block let each query read, and which block each key stands in."""
    block_of = torch.arange(q.size(2)) // block_size
    return (blocks[..., None] == block_of).any(-2), block_of[:, None] == block_of, block_of


WRONG = WrongAnswers()
wrong, wrongs = WRONG.register, WRONG.register_all


# ---- step 1 ----------------------------------------------------------------------------------------------------------------

wrongs(
    "dense_attention",
    no_mask=(
        "sees position 1, its future: the causal mask is missing",
        lambda q, k, v: scores(q, k).softmax(-1) @ v,
    ),
    mask_after_softmax=(
        r"weights sum to 0\.\d+ at position",
        lambda q, k, v: (scores(q, k).softmax(-1) * past(q)) @ v,
    ),
    mask_by_zero=("constant weight", lambda q, k, v: (scores(q, k) * past(q)).softmax(-1) @ v),
    mask_strict=("the mask is strict", lambda q, k, v: attend(scores(q, k), past(q).tril(-1), v)),
    mask_turned=("turned round", lambda q, k, v: attend(scores(q, k), past(q).T, v)),
    infinity_after_softmax=(
        "NaN for position 0",
        lambda q, k, v: scores(q, k).softmax(-1).masked_fill(~past(q), -inf) @ v,
    ),
    no_scale=("scores are not divided by sqrt", lambda q, k, v: attend(q @ k.mT, past(q), v)),
    scale_by_width=(
        r"divided by D, not",
        lambda q, k, v: attend(q @ k.mT / q.size(-1), past(q), v),
    ),
    scale_by_length=(
        r"divided by sqrt\(T\)",
        lambda q, k, v: attend(q @ k.mT / q.size(2) ** 0.5, past(q), v),
    ),
    scale_upwards=(
        r"multiplied by sqrt\(D\)",
        lambda q, k, v: attend(q @ k.mT * q.size(-1) ** 0.5, past(q), v),
    ),
    softmax_over_queries=(
        "softmax runs over the queries",
        lambda q, k, v: scores(q, k).masked_fill(~past(q), -inf).softmax(-2) @ v,
    ),
    softmax_over_heads=(
        "softmax runs over the heads",
        lambda q, k, v: (scores(q, k).softmax(1) * past(q)) @ v,
    ),
    weights_returned=(
        "not yet multiplied by v",
        lambda q, k, v: scores(q, k).masked_fill(~past(q), -inf).softmax(-1),
    ),
    nothing_returned=("returns nothing, not a tensor", lambda q, k, v: None),
    transposed=(r"wrong shape: \(2, 3, 8, 14\)", lambda q, k, v: right.dense_attention(q, k, v).mT),
    heads_mixed=(
        "head 0 of sequence 1 changes",
        lambda q, k, v: right.dense_attention(q, k.roll(1, 0), v),
    ),
    detached=("no gradient flows at all", lambda q, k, v: right.dense_attention(q, k, v).detach()),
    keys_detached=(
        "no gradient reaches k",
        lambda q, k, v: right.dense_attention(q, k.detach(), v),
    ),
    always_double=(
        "turns float32 into float64",
        lambda q, k, v: right.dense_attention(q.double(), k.double(), v.double()),
    ),
    always_float=(
        "turns float64 into float32",
        lambda q, k, v: right.dense_attention(q.float(), k.float(), v.float()),
    ),
    in_place=(
        "argument number 1 in place",
        lambda q, k, v: right.dense_attention(q.mul_(1.5), k, v),
    ),
    takes_too_few=("raises TypeError", lambda q, k: q),
    values_squared=(
        "the output is not weights @ v",
        lambda q, k, v: right.dense_attention(q, k, v * v.abs()),
    ),
    scores_squared=(
        r"gives position \d+ the weight",
        lambda q, k, v: attend(scores(q, k) ** 2, past(q), v),
    ),
    fails_alone=(
        "for T = 1",
        lambda q, k, v: right.dense_attention(q, k, v) if q.size(2) > 1 else 1 / 0,
    ),
    own_exp=(
        "overflows on large scores",
        lambda q, k, v: (e := scores(q, k).exp() * past(q)) / e.sum(-1, keepdim=True) @ v,
    ),
)

# ---- step 2 ----------------------------------------------------------------------------------------------------------------


def chosen(x, top_k):
    top_k = min(top_k, x.size(-1))
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(top_k).indices, True)


@wrong("topk_attention", "the article's gather")
def article(q, k, v, top_k):
    best, index = (q @ k.mT).topk(top_k, dim=-1)
    return best.softmax(-1) @ v.gather(-1, index)


@wrong("topk_attention", "the article's gather")
def article_with_mask_and_scale(q, k, v, top_k):
    best, index = scores(q, k).masked_fill(~past(q), -inf).topk(top_k, dim=-1)
    return best.softmax(-1) @ v.gather(-2, index)


@wrong("topk_attention", "top_k larger than T fails")
def no_limit(q, k, v, top_k):
    x = scores(q, k).masked_fill(~past(q), -inf)
    return attend(
        x, torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(top_k).indices, True), v
    )


@wrong("topk_attention", r"weights sum to 0\.\d+ at query \d+: choose first")
def softmax_first(q, k, v, top_k):
    weights = scores(q, k).masked_fill(~past(q), -inf).softmax(-1)
    return (weights * chosen(weights, top_k)) @ v


@wrong("topk_attention", r"query \d+ reads the keys \[.*highest scores are at")
def smallest(q, k, v, top_k):
    mask = past(q)
    return attend(scores(q, k), chosen((-scores(q, k)).masked_fill(~mask, -inf), top_k) & mask, v)


wrongs(
    "topk_attention",
    no_mask=(
        "its future: the causal mask is missing",
        lambda q, k, v, top_k: attend(scores(q, k), chosen(scores(q, k), top_k), v),
    ),
    mask_after_choice=(
        "keys of the future take some of the top_k places",
        lambda q, k, v, top_k: attend(scores(q, k), chosen(scores(q, k), top_k) & past(q), v),
    ),
    no_choice=(
        "query 3 reads 4 keys where it should read 3",
        lambda q, k, v, top_k: right.dense_attention(q, k, v),
    ),
    no_scale=(
        "not divided by sqrt",
        lambda q, k, v, top_k: right.topk_attention(q * q.size(-1) ** 0.5, k, v, top_k),
    ),
    mask_strict=(
        "the mask is strict",
        lambda q, k, v, top_k: attend(
            x := scores(q, k).masked_fill(~past(q).tril(-1), -inf), chosen(x, top_k), v
        ),
    ),
    gives_up_at_all=(
        "yet the result is not that of step 1",
        lambda q, k, v, top_k: right.topk_attention(q, k, v, min(top_k, q.size(2) - 1)),
    ),
)

# ---- step 3 ----------------------------------------------------------------------------------------------------------------


def padded(k, block_size):
    return F.pad(k, (0, 0, 0, -k.size(2) % block_size)).unflatten(2, (-1, block_size))


def blockwise(reduce):
    return lambda k, block_size: torch.stack(
        [reduce(part) for part in k.split(block_size, dim=2)], dim=2
    )


wrongs(
    "pool_blocks",
    padding_counted=("mean counts the padding", lambda k, n: padded(k, n).mean(3)),
    only_whole_blocks=(
        "fails where T is no multiple",
        lambda k, n: k.unflatten(2, (-1, n)).mean(3),
    ),
    last_dropped=(
        "last, short block is left out",
        lambda k, n: right.pool_blocks(k, n)[:, :, : k.size(2) // n],
    ),
    interleaved=(
        r"made of the keys \[0, 4, 8, 12\].*reshape should be",
        lambda k, n: F.pad(k, (0, 0, 0, -k.size(2) % n)).unflatten(2, (n, -1)).mean(2),
    ),
    last_overlaps=(
        r"block 3 is made of the keys \[10, 11, 12, 13\], not 12-13$",
        lambda k, n: torch.cat(
            [right.pool_blocks(k, n)[:, :, :-1], k[:, :, -n:].mean(2, keepdim=True)], dim=2
        ),
    ),
    largest=("is the largest value", blockwise(lambda part: part.amax(2))),
    summed=("block 0 are summed", blockwise(lambda part: part.sum(2))),
    transposed=(r"wrong shape: \(2, 3, 8, 4\)", lambda k, n: right.pool_blocks(k, n).mT),
    over_heads=(
        "head 1 of sequence 0 changes",
        blockwise(lambda part: part.mean((1, 2))[:, None].expand(-1, 3, -1)),
    ),
    one_more=(
        r"gives key 0 the weight 0\.200, not 1/4",
        blockwise(lambda part: part.sum(2) / (part.size(2) + 1)),
    ),
)

# ---- step 4, and the bonus --------------------------------------------------------------------------------------------------


def choose(q, k, block_size, top_blocks, allowed, fill=-1, sign=1, at=1):
    """The solution with some of it replaced: `allowed(block, t)`, what stands for none, best or worst, every `at`-th query."""
    q, t = q[:, :, ::at], torch.arange(0, q.size(2), at)[:, None]
    x = sign * q @ right.pool_blocks(k, block_size).mT
    x = x.masked_fill(~allowed(torch.arange(x.size(-1)), t), -inf)
    best, blocks = x.topk(min(top_blocks, x.size(-1)), dim=-1)
    blocks = blocks if fill is None else blocks.masked_fill(best == -inf, fill)
    return F.pad(blocks, (0, top_blocks - blocks.size(-1)), value=-1)


def before(n, t):
    return n < t // 4


@wrong("select_blocks", "the order is wrong")
def by_number(*arguments):
    blocks = choose(*arguments, before)
    blocks = blocks.where(blocks >= 0, 9).sort(-1).values
    return blocks.where(blocks < 9, -1)


wrongs(
    "select_blocks",
    own_block=(
        "partly in the future was chosen: query 0 ",
        lambda *a: choose(*a, lambda n, t: n <= t // 4),
    ),
    started_blocks=(
        "partly in the future was chosen: query 1 ",
        lambda *a: choose(*a, lambda n, t: n * 4 < t),
    ),
    own_when_finished=(
        "own block is listed at query 3",
        lambda *a: choose(*a, lambda n, t: n * 4 + 3 <= t),
    ),
    no_mask=("wholly in the future was chosen", lambda *a: choose(*a, lambda n, t: n < 99 + t)),
    no_none=("no -1 where fewer past blocks", lambda *a: choose(*a, before, fill=None)),
    none_is_zero=("no -1 where fewer past blocks", lambda *a: choose(*a, before, fill=0)),
    one_too_few=("query 4 leaves out block 0", lambda *a: choose(*a, lambda n, t: n < t // 4 - 1)),
    worst=("the choice is not the best", lambda *a: choose(*a, before, sign=-1)),
    none_first=("-1 comes before a block", lambda *a: choose(*a, before).flip(-1)),
    floats=("must be integers, and these are float32", lambda *a: choose(*a, before).float()),
    no_padding=("wrong shape.*fill up with -1", lambda *a: choose(*a, before)[..., :4]),
    no_limit=(
        "fails for top_blocks larger than the number of blocks: it raises RuntimeError",
        lambda q, k, n, top: (
            choose(q, k, n, top, before)
            if top <= (N := -(-q.size(2) // n))
            else torch.zeros(N).topk(top).indices
        ),
    ),
    numbers_positions=(
        "there is no block 4",
        lambda *a: (x := choose(*a, before)).where(x < 0, x * 4),
    ),
    mean_query=(
        "made for query 8 changes with query 9: the future leaks",
        lambda q, k, n, top: choose(
            right.pool_blocks(q, n).repeat_interleave(n, 2)[:, :, : q.size(2)], k, n, top, before
        ),
    ),
    heads_share=(
        "head 1 of sequence 0 changes",
        lambda q, k, n, top: choose(q.mean(1, keepdim=True).expand_as(q), k, n, top, before),
    ),
)
wrongs(
    "select_for_tile",
    mean_query=(
        "made for query 8 changes with query 9: the future leaks",
        lambda q, k, n, top: right.best_blocks(
            x := right.pool_blocks(q, n), torch.arange(x.size(2)), k, n, top
        ),
    ),
    last_query=(
        "made for query 8 changes with query 11: the future leaks",
        lambda q, k, n, top: right.best_blocks(
            torch.cat([q[:, :, n - 1 :: n], q[:, :, -1:]], 2)[:, :, : (N := -(-q.size(2) // n))],
            torch.arange(N),
            k,
            n,
            top,
        ),
    ),
    each_query=("a row for each of the 14 queries", lambda *a: right.select_blocks(*a)),
    own_block=(
        "partly in the future was chosen: query 0 ",
        lambda *a: choose(*a, lambda n, t: n <= t // 4, at=4),
    ),
    whole_tiles_only=(
        "wrong shape",
        lambda q, k, n, top: right.select_for_tile(q, k, n, top)[:, :, : q.size(2) // n],
    ),
)

# ---- step 5 ----------------------------------------------------------------------------------------------------------------


@wrong("block_attention", "does not read its own block")
def chosen_only(q, k, v, blocks, block_size):
    return attend(scores(q, k), read(q, blocks, block_size)[0] & past(q), v)


@wrong("block_attention", "of its own block, its future")
def own_block_unmasked(q, k, v, blocks, block_size):
    listed, own, _ = read(q, blocks, block_size)
    return attend(scores(q, k), listed | own, v)


@wrong("block_attention", r"-1 was read as a block: query \d+ reads block 0")
def none_as_first_block(q, k, v, blocks, block_size):
    return right.block_attention(q, k, v, blocks.clamp(min=0), block_size)


@wrong("block_attention", r"-1 was read as a block: query \d+ reads block 3")
def none_as_last_block(q, k, v, blocks, block_size):
    last = (q.size(2) - 1) // block_size
    listed, own, _ = read(q, blocks.where(blocks >= 0, last), block_size)
    return attend(scores(q, k), listed | (own & past(q)), v)


def counting(q, k, v, blocks, block_size):
    """Every (query, block) pair in `blocks` and the own block adds its weights, however often it is there."""
    block_of = read(q, blocks, block_size)[2]
    times = (blocks[..., None] == block_of).sum(-2) + (block_of[:, None] == block_of).long()
    weights = scores(q, k).exp() * times * past(q)
    return weights / weights.sum(-1, keepdim=True) @ v


@wrong("block_attention", "are counted 2 times at query 4")
def none_as_own_block(q, k, v, blocks, block_size):
    own = torch.arange(q.size(2))[:, None] // block_size
    return counting(q, k, v, blocks.where(blocks >= 0, own), block_size)


@wrong("block_attention", "are counted 3 times")
def chosen_counted_thrice(q, k, v, blocks, block_size):
    return counting(q, k, v, torch.cat([blocks] * 3, dim=-1), block_size)


@wrong("block_attention", "softmax of its own")
def averaged(q, k, v, blocks, block_size):
    listed, own, block_of = read(q, blocks, block_size)
    x, parts = scores(q, k), []
    for n in range(int(block_of[-1]) + 1):
        parts.append(
            x.masked_fill(~((listed | own) & past(q) & (block_of == n)), -inf)
            .softmax(-1)
            .nan_to_num()
        )
    total = sum(parts)
    return total / total.sum(-1, keepdim=True) @ v


wrongs(
    "block_attention",
    no_mask=("causal mask is missing", lambda q, k, v, blocks, n: scores(q, k).softmax(-1) @ v),
    choice_ignored=(
        "which was not chosen",
        lambda q, k, v, blocks, n: right.dense_attention(q, k, v),
    ),
    own_only=(
        "which was chosen for it",
        lambda q, k, v, blocks, n: right.block_attention(q, k, v, blocks[..., :0], n),
    ),
    first_choice_only=(
        "which was chosen for it",
        lambda q, k, v, blocks, n: right.block_attention(q, k, v, blocks[..., :1], n),
    ),
    no_scale=(
        "not divided by sqrt",
        lambda q, k, v, blocks, n: right.block_attention(q * q.size(-1) ** 0.5, k, v, blocks, n),
    ),
    mask_after_softmax=(
        r"weights sum to 0\.\d+ at position",
        lambda q, k, v, blocks, n: (
            (scores(q, k).softmax(-1) * (read(q, blocks, n)[0] | read(q, blocks, n)[1]) * past(q))
            @ v
        ),
    ),
    needs_a_choice=(
        r"raises IndexError.*for an empty `blocks`",
        lambda q, k, v, blocks, n: (
            right.block_attention(q, k, v, blocks, n) + 0 * blocks[..., 0, None]
        ),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_mistake_gets_the_message_meant_for_it(step, message, function):
    WRONG.assert_diagnosis(check_01.STEPS, step, message, function)
