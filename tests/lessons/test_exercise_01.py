"""The grader of lesson 01 names the mistake in each wrong answer."""

from pathlib import Path

import grade
import pytest
import steps_01
import torch
import torch.nn.functional as F
from torch import inf

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_01.__file__).with_name("01_solutions.py"))


def scores(q, k):
    return q @ k.mT / q.size(-1) ** 0.5


def causal_mask(q):
    return torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril()


def attend(scores, mask, v):
    return scores.masked_fill(~mask, -inf).softmax(-1) @ v


def block_masks(q, blocks, block_size):
    """Return masks of the selected blocks and of the current block, and the block of each key."""
    block_of = torch.arange(q.size(2)) // block_size
    return (blocks[..., None] == block_of).any(-2), block_of[:, None] == block_of, block_of


WRONG = WrongAnswers()
wrong_answer, wrong_answers = WRONG.register, WRONG.register_all


# ---- step 1 --------------------------------------------------------------------------------------

wrong_answers(
    "dense_attention",
    no_mask=(
        "attends to position 1 in its future: the causal mask is missing",
        lambda q, k, v: scores(q, k).softmax(-1) @ v,
    ),
    mask_after_softmax=(
        r"weights sum to 0\.\d+ at position",
        lambda q, k, v: (scores(q, k).softmax(-1) * causal_mask(q)) @ v,
    ),
    mask_by_zero=(
        "constant weight",
        lambda q, k, v: (scores(q, k) * causal_mask(q)).softmax(-1) @ v,
    ),
    mask_strict=(
        "the mask is strict",
        lambda q, k, v: attend(scores(q, k), causal_mask(q).tril(-1), v),
    ),
    mask_transposed=(
        "the mask is transposed",
        lambda q, k, v: attend(scores(q, k), causal_mask(q).T, v),
    ),
    minus_infinity_after_softmax=(
        "NaN for position 0",
        lambda q, k, v: scores(q, k).softmax(-1).masked_fill(~causal_mask(q), -inf) @ v,
    ),
    no_scale=(
        "scores are not divided by sqrt",
        lambda q, k, v: attend(q @ k.mT, causal_mask(q), v),
    ),
    scale_by_width=(
        r"divided by D, not",
        lambda q, k, v: attend(q @ k.mT / q.size(-1), causal_mask(q), v),
    ),
    scale_by_length=(
        r"divided by sqrt\(T\)",
        lambda q, k, v: attend(q @ k.mT / q.size(2) ** 0.5, causal_mask(q), v),
    ),
    scale_multiplied=(
        r"multiplied by sqrt\(D\)",
        lambda q, k, v: attend(q @ k.mT * q.size(-1) ** 0.5, causal_mask(q), v),
    ),
    softmax_over_queries=(
        "softmax runs over the queries",
        lambda q, k, v: scores(q, k).masked_fill(~causal_mask(q), -inf).softmax(-2) @ v,
    ),
    softmax_over_heads=(
        "softmax runs over the heads",
        lambda q, k, v: (scores(q, k).softmax(1) * causal_mask(q)) @ v,
    ),
    weights_returned=(
        "not yet multiplied by v",
        lambda q, k, v: scores(q, k).masked_fill(~causal_mask(q), -inf).softmax(-1),
    ),
    nothing_returned=("returns nothing, not a tensor", lambda q, k, v: None),
    transposed=(
        r"wrong shape: \(2, 3, 8, 14\)",
        lambda q, k, v: solutions.dense_attention(q, k, v).mT,
    ),
    batch_mixed=(
        "head 0 of sequence 1 changes",
        lambda q, k, v: solutions.dense_attention(q, k.roll(1, 0), v),
    ),
    detached=(
        "no gradient flows at all",
        lambda q, k, v: solutions.dense_attention(q, k, v).detach(),
    ),
    keys_detached=(
        "no gradient reaches k",
        lambda q, k, v: solutions.dense_attention(q, k.detach(), v),
    ),
    always_double=(
        "turns float32 into float64",
        lambda q, k, v: solutions.dense_attention(q.double(), k.double(), v.double()),
    ),
    always_float=(
        "turns float64 into float32",
        lambda q, k, v: solutions.dense_attention(q.float(), k.float(), v.float()),
    ),
    in_place=(
        "argument number 1 in place",
        lambda q, k, v: solutions.dense_attention(q.mul_(1.5), k, v),
    ),
    takes_too_few=("raises TypeError", lambda q, k: q),
    values_squared=(
        "the output is not weights @ v",
        lambda q, k, v: solutions.dense_attention(q, k, v * v.abs()),
    ),
    scores_squared=(
        r"gives position \d+ the weight",
        lambda q, k, v: attend(scores(q, k) ** 2, causal_mask(q), v),
    ),
    fails_for_one_token=(
        "for T = 1",
        lambda q, k, v: solutions.dense_attention(q, k, v) if q.size(2) > 1 else 1 / 0,
    ),
    exp_without_maximum=(
        "overflows on large scores",
        lambda q, k, v: (e := scores(q, k).exp() * causal_mask(q)) / e.sum(-1, keepdim=True) @ v,
    ),
)

# ---- step 2 --------------------------------------------------------------------------------------


def top_mask(x, top_k):
    top_k = min(top_k, x.size(-1))
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(top_k).indices, True)


@wrong_answer("topk_attention", "the article's gather")
def article_gather(q, k, v, top_k):
    best, index = (q @ k.mT).topk(top_k, dim=-1)
    return best.softmax(-1) @ v.gather(-1, index)


@wrong_answer("topk_attention", "the article's gather")
def article_gather_with_mask_and_scale(q, k, v, top_k):
    best, index = scores(q, k).masked_fill(~causal_mask(q), -inf).topk(top_k, dim=-1)
    return best.softmax(-1) @ v.gather(-2, index)


@wrong_answer("topk_attention", "top_k larger than T fails")
def no_limit(q, k, v, top_k):
    x = scores(q, k).masked_fill(~causal_mask(q), -inf)
    mask = torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.topk(top_k).indices, True)
    return attend(x, mask, v)


@wrong_answer("topk_attention", r"weights sum to 0\.\d+ at query \d+: select the keys first")
def softmax_first(q, k, v, top_k):
    weights = scores(q, k).masked_fill(~causal_mask(q), -inf).softmax(-1)
    return (weights * top_mask(weights, top_k)) @ v


@wrong_answer("topk_attention", r"query \d+ attends to the keys \[.*highest scores are at")
def smallest(q, k, v, top_k):
    mask = causal_mask(q)
    return attend(scores(q, k), top_mask((-scores(q, k)).masked_fill(~mask, -inf), top_k) & mask, v)


def cosines(q, k):
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT


wrong_answers(
    "topk_attention",
    selected_by_cosine=(
        r"query \d+ attends to the keys \[.*highest scores are at",
        lambda q, k, v, top_k: attend(
            scores(q, k),
            top_mask(cosines(q, k).masked_fill(~causal_mask(q), -inf), top_k) & causal_mask(q),
            v,
        ),
    ),
    selected_by_magnitude=(
        r"query \d+ attends to the keys \[.*highest scores are at",
        lambda q, k, v, top_k: attend(
            scores(q, k),
            top_mask(scores(q, k).abs().masked_fill(~causal_mask(q), -1), top_k) & causal_mask(q),
            v,
        ),
    ),
    no_mask=(
        "in its future: the causal mask is missing",
        lambda q, k, v, top_k: attend(scores(q, k), top_mask(scores(q, k), top_k), v),
    ),
    mask_after_topk=(
        "future keys are among the top_k of query",
        lambda q, k, v, top_k: attend(
            scores(q, k), top_mask(scores(q, k), top_k) & causal_mask(q), v
        ),
    ),
    no_selection=(
        "query 3 attends to 4 keys instead of 3",
        lambda q, k, v, top_k: solutions.dense_attention(q, k, v),
    ),
    no_scale=(
        "not divided by sqrt",
        lambda q, k, v, top_k: solutions.topk_attention(q * q.size(-1) ** 0.5, k, v, top_k),
    ),
    mask_strict=(
        "the mask is strict",
        lambda q, k, v, top_k: attend(
            x := scores(q, k).masked_fill(~causal_mask(q).tril(-1), -inf), top_mask(x, top_k), v
        ),
    ),
    never_all_keys=(
        "but the result is not that of step 1",
        lambda q, k, v, top_k: solutions.topk_attention(q, k, v, min(top_k, q.size(2) - 1)),
    ),
)

# ---- step 3 --------------------------------------------------------------------------------------


def padded(k, block_size):
    return F.pad(k, (0, 0, 0, -k.size(2) % block_size)).unflatten(2, (-1, block_size))


def blockwise(reduce):
    return lambda k, block_size: torch.stack(
        [reduce(part) for part in k.split(block_size, dim=2)], dim=2
    )


wrong_answers(
    "pool_blocks",
    padding_counted=("shorter block counts the padding", lambda k, n: padded(k, n).mean(3)),
    only_full_blocks=(
        "fails if T is not a multiple",
        lambda k, n: k.unflatten(2, (-1, n)).mean(3),
    ),
    last_dropped=(
        "last, shorter block is missing",
        lambda k, n: solutions.pool_blocks(k, n)[:, :, : k.size(2) // n],
    ),
    interleaved=(
        r"computed from the keys \[0, 4, 8, 12\].*reshape should be",
        lambda k, n: F.pad(k, (0, 0, 0, -k.size(2) % n)).unflatten(2, (n, -1)).mean(2),
    ),
    last_overlaps=(
        r"block 3 is computed from the keys \[10, 11, 12, 13\], not 12-13$",
        lambda k, n: torch.cat(
            [solutions.pool_blocks(k, n)[:, :, :-1], k[:, :, -n:].mean(2, keepdim=True)], dim=2
        ),
    ),
    maximum=("is the maximum of each channel", blockwise(lambda part: part.amax(2))),
    summed=("block 0 are summed", blockwise(lambda part: part.sum(2))),
    transposed=(r"wrong shape: \(2, 3, 8, 4\)", lambda k, n: solutions.pool_blocks(k, n).mT),
    mean_over_heads=(
        "head 1 of sequence 0 changes",
        blockwise(lambda part: part.mean((1, 2))[:, None].expand(-1, 3, -1)),
    ),
    divided_by_one_more=(
        r"gives key 0 the weight 0\.200, not 0\.250 = 1/4",
        blockwise(lambda part: part.sum(2) / (part.size(2) + 1)),
    ),
)

# ---- step 4, and the bonus -----------------------------------------------------------------------


def select(q, k, block_size, top_blocks, allowed, fill=-1, sign=1, stride=1):
    """Run the solution with changes.

    allowed(block, t): the candidates of query t. fill: the index for "no block". sign = -1 selects
    the worst blocks. Only every `stride`-th query selects.
    """
    q, t = q[:, :, ::stride], torch.arange(0, q.size(2), stride)[:, None]
    x = sign * q @ solutions.pool_blocks(k, block_size).mT
    x = x.masked_fill(~allowed(torch.arange(x.size(-1)), t), -inf)
    best, blocks = x.topk(min(top_blocks, x.size(-1)), dim=-1)
    blocks = blocks if fill is None else blocks.masked_fill(best == -inf, fill)
    return F.pad(blocks, (0, top_blocks - blocks.size(-1)), value=-1)


def is_past(n, t):
    return n < t // 4


def select_by(score):
    """Return a selection by another score: score(q, k of the full blocks (B, H, N, size, D))."""

    def select_blocks(q, k, block_size, top_blocks):
        keys = F.pad(k, (0, 0, 0, -k.size(2) % block_size)).unflatten(2, (-1, block_size))
        x, t = score(q, keys), torch.arange(q.size(2))[:, None]
        x = x.masked_fill(~is_past(torch.arange(x.size(-1)), t), -inf)
        best, blocks = x.topk(min(top_blocks, x.size(-1)), dim=-1)
        blocks = blocks.masked_fill(best == -inf, -1)
        return F.pad(blocks, (0, top_blocks - blocks.size(-1)), value=-1)

    return select_blocks


NOT_THE_BEST = "the order is wrong|the selection is not the best"


@wrong_answer("select_blocks", NOT_THE_BEST)
def sorted_by_index(*arguments):
    blocks = select(*arguments, is_past)
    blocks = blocks.where(blocks >= 0, 9).sort(-1).values
    return blocks.where(blocks < 9, -1)


wrong_answers(
    "select_blocks",
    by_cosine=(NOT_THE_BEST, select_by(lambda q, keys: cosines(q, keys.mean(3)))),
    by_distance=(NOT_THE_BEST, select_by(lambda q, keys: -torch.cdist(q, keys.mean(3)))),
    by_largest_key=(NOT_THE_BEST, select_by(lambda q, keys: q @ keys.amax(3).mT)),
    by_best_key=(
        NOT_THE_BEST,
        select_by(lambda q, keys: torch.einsum("bhtd,bhnsd->bhtns", q, keys).amax(-1)),
    ),
    by_first_key=(NOT_THE_BEST, select_by(lambda q, keys: q @ keys[:, :, :, 0].mT)),
    current_block=(
        "partly in the future was selected: query 0 ",
        lambda *a: select(*a, lambda n, t: n <= t // 4),
    ),
    started_blocks=(
        "partly in the future was selected: query 1 ",
        lambda *a: select(*a, lambda n, t: n * 4 < t),
    ),
    current_block_when_finished=(
        "current block is listed for query 3",
        lambda *a: select(*a, lambda n, t: n * 4 + 3 <= t),
    ),
    no_mask=("entirely in the future was selected", lambda *a: select(*a, lambda n, t: n < 99 + t)),
    no_fill=(
        "no -1 where a query has fewer past blocks",
        lambda *a: select(*a, is_past, fill=None),
    ),
    filled_with_zero=(
        "no -1 where a query has fewer past blocks",
        lambda *a: select(*a, is_past, fill=0),
    ),
    one_too_few=("query 4 leaves out block 0", lambda *a: select(*a, lambda n, t: n < t // 4 - 1)),
    worst=(NOT_THE_BEST, lambda *a: select(*a, is_past, sign=-1)),
    fill_first=("-1 comes before a block", lambda *a: select(*a, is_past).flip(-1)),
    floats=("must be integers, and these are float32", lambda *a: select(*a, is_past).float()),
    no_padding=("wrong shape.*fill up with -1", lambda *a: select(*a, is_past)[..., :4]),
    no_limit=(
        "fails for top_blocks larger than the number of blocks: it raises RuntimeError",
        lambda q, k, n, top: (
            select(q, k, n, top, is_past)
            if top <= (N := -(-q.size(2) // n))
            else torch.zeros(N).topk(top).indices
        ),
    ),
    positions_not_indices=(
        "there is no block 4",
        lambda *a: (x := select(*a, is_past)).where(x < 0, x * 4),
    ),
    mean_query=(
        "selection for query 8 changes with query 9: the future leaks",
        lambda q, k, n, top: select(
            solutions.pool_blocks(q, n).repeat_interleave(n, 2)[:, :, : q.size(2)],
            k,
            n,
            top,
            is_past,
        ),
    ),
    shared_by_heads=(
        "head 1 of sequence 0 changes",
        lambda q, k, n, top: select(q.mean(1, keepdim=True).expand_as(q), k, n, top, is_past),
    ),
)
wrong_answers(
    "select_for_tile",
    mean_query=(
        "selection for query 8 changes with query 9: the future leaks",
        lambda q, k, n, top: solutions.best_blocks(
            x := solutions.pool_blocks(q, n), torch.arange(x.size(2)), k, n, top
        ),
    ),
    last_query=(
        "selection for query 8 changes with query 11: the future leaks",
        lambda q, k, n, top: solutions.best_blocks(
            torch.cat([q[:, :, n - 1 :: n], q[:, :, -1:]], 2)[:, :, : (N := -(-q.size(2) // n))],
            torch.arange(N),
            k,
            n,
            top,
        ),
    ),
    each_query=("a row for each of the 14 queries", lambda *a: solutions.select_blocks(*a)),
    current_block=(
        "partly in the future was selected: query 0 ",
        lambda *a: select(*a, lambda n, t: n <= t // 4, stride=4),
    ),
    no_mask=(
        "entirely in the future was selected",
        lambda *a: select(*a, lambda n, t: n < 99 + t, stride=4),
    ),
    no_fill=(
        "no -1 where a query has fewer past blocks",
        lambda *a: select(*a, is_past, fill=None, stride=4),
    ),
    one_too_few=(
        "query 4 leaves out block 0",
        lambda *a: select(*a, lambda n, t: n < t // 4 - 1, stride=4),
    ),
    worst=(NOT_THE_BEST, lambda *a: select(*a, is_past, sign=-1, stride=4)),
    by_first_key=(
        NOT_THE_BEST,
        lambda *a: select_by(lambda q, keys: q @ keys[:, :, :, 0].mT)(*a)[:, :, ::4],
    ),
    fill_first=("-1 comes before a block", lambda *a: select(*a, is_past, stride=4).flip(-1)),
    floats=(
        "must be integers, and these are float32",
        lambda *a: select(*a, is_past, stride=4).float(),
    ),
    shared_by_heads=(
        "head 1 of sequence 0 changes",
        lambda q, k, n, top: select(
            q.mean(1, keepdim=True).expand_as(q), k, n, top, is_past, stride=4
        ),
    ),
    second_query=(
        "selection for query 8 changes with query 9: the future leaks",
        lambda q, k, n, top: select(q.roll(-1, 2), k, n, top, is_past, stride=4),
    ),
    no_padding=(
        "wrong shape.*fill up with -1",
        lambda *a: select(*a, is_past, stride=4)[..., :4],
    ),
    full_tiles_only=(
        r"wrong shape: \(2, 3, 3",
        lambda q, k, n, top: solutions.select_for_tile(q, k, n, top)[:, :, : q.size(2) // n],
    ),
)

# ---- step 5 --------------------------------------------------------------------------------------


@wrong_answer("block_attention", "does not attend to its current block")
def selected_only(q, k, v, blocks, block_size):
    return attend(scores(q, k), block_masks(q, blocks, block_size)[0] & causal_mask(q), v)


@wrong_answer("block_attention", "in its future, in the current block")
def current_block_unmasked(q, k, v, blocks, block_size):
    listed, current, _ = block_masks(q, blocks, block_size)
    return attend(scores(q, k), listed | current, v)


@wrong_answer("block_attention", r"-1 was used as a block index: query \d+ attends to block 0")
def fill_as_first_block(q, k, v, blocks, block_size):
    return solutions.block_attention(q, k, v, blocks.clamp(min=0), block_size)


@wrong_answer("block_attention", r"-1 was used as a block index: query \d+ attends to block 3")
def fill_as_last_block(q, k, v, blocks, block_size):
    last = (q.size(2) - 1) // block_size
    listed, current, _ = block_masks(q, blocks.where(blocks >= 0, last), block_size)
    return attend(scores(q, k), listed | (current & causal_mask(q)), v)


def with_repeats(q, k, v, blocks, block_size):
    """Add the weights of a block as often as `blocks` lists it; the current block adds once."""
    block_of = block_masks(q, blocks, block_size)[2]
    times = (blocks[..., None] == block_of).sum(-2) + (block_of[:, None] == block_of).long()
    weights = scores(q, k).exp() * times * causal_mask(q)
    return weights / weights.sum(-1, keepdim=True) @ v


@wrong_answer("block_attention", "are counted 2 times at query 4")
def fill_as_current_block(q, k, v, blocks, block_size):
    current_block = torch.arange(q.size(2))[:, None] // block_size
    return with_repeats(q, k, v, blocks.where(blocks >= 0, current_block), block_size)


@wrong_answer("block_attention", "are counted 3 times")
def selected_counted_three_times(q, k, v, blocks, block_size):
    return with_repeats(q, k, v, torch.cat([blocks] * 3, dim=-1), block_size)


@wrong_answer("block_attention", "each block has its own softmax")
def averaged(q, k, v, blocks, block_size):
    listed, current, block_of = block_masks(q, blocks, block_size)
    total = 0
    for n in range(int(block_of[-1]) + 1):
        mask = (listed | current) & causal_mask(q) & (block_of == n)
        total = total + scores(q, k).masked_fill(~mask, -inf).softmax(-1).nan_to_num()
    return total / total.sum(-1, keepdim=True) @ v


@wrong_answer("block_attention", r"weights sum to 0\.\d+ at position")
def mask_after_softmax(q, k, v, blocks, block_size):
    listed, current, _ = block_masks(q, blocks, block_size)
    return (scores(q, k).softmax(-1) * (listed | current) * causal_mask(q)) @ v


wrong_answers(
    "block_attention",
    no_mask=("causal mask is missing", lambda q, k, v, blocks, n: scores(q, k).softmax(-1) @ v),
    selection_ignored=(
        "which was not selected",
        lambda q, k, v, blocks, n: solutions.dense_attention(q, k, v),
    ),
    current_only=(
        "which was selected for it",
        lambda q, k, v, blocks, n: solutions.block_attention(q, k, v, blocks[..., :0], n),
    ),
    first_selected_only=(
        "which was selected for it",
        lambda q, k, v, blocks, n: solutions.block_attention(q, k, v, blocks[..., :1], n),
    ),
    no_scale=(
        "not divided by sqrt",
        lambda q, k, v, blocks, n: solutions.block_attention(
            q * q.size(-1) ** 0.5, k, v, blocks, n
        ),
    ),
    needs_a_selection=(
        r"raises IndexError.*for an empty `blocks`",
        lambda q, k, v, blocks, n: (
            solutions.block_attention(q, k, v, blocks, n) + 0 * blocks[..., 0, None]
        ),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_wrong_answer_gets_the_message_for_its_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_01.STEPS, step, message, function)
