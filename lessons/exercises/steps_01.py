"""The steps of lesson 01, each with its tests. check_01.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_01.py FILE

The checks find mistakes by experiments on the functions (see probe.py). They never read the source.
"""

import sys

import torch
from grade import (
    TOLERANCE,
    Answer,
    Crash,
    Mistake,
    Step,
    different_digits,
    expect_dtype,
    expect_integers,
    expect_shape,
    first_index,
    main,
)
from probe import (
    BLOCK,
    B,
    D,
    H,
    N,
    T,
    expect_attention,
    expect_independent_heads,
    key_range,
    linear_map_matrix,
    random_qkv,
)
from torch import Tensor

from nanods.attention import block_mask, masked_attention, visible_mask
from nanods.attention_selection import select_blocks, summarise

# ---- steps 1, 2 and 5: attention -----------------------------------------------------------------


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree within TOLERANCE. False if one of them has a NaN."""
    return bool((a - b).abs().max() < TOLERANCE)


def check_dense(answer: Answer) -> None:
    """Check step 1."""
    q, k, v = random_qkv()
    mask = visible_mask(q, k, True, None).expand(B, H, T, T)
    expect_attention(answer, mask, [q, k, v], lambda W, expected: None)
    q, k, v = random_qkv(T=1)
    output = answer(q, k, v, when="for T = 1")
    expect_shape(output, v.shape, ", for T = 1")
    if not close(output, v):
        raise Mistake("with one token (T = 1) the output is not v")


def check_topk(answer: Answer) -> None:
    """Check step 2."""
    top_k = 3
    q, k, v = random_qkv()
    try:
        answer(q, k, v, top_k)
    except Crash as crash:
        try:
            answer(*random_qkv(T=6), 6)
        except Mistake:
            raise crash from None
        raise Mistake(
            "works only for T = top_k: the article's gather takes top_k numbers of v for each "
            f"query, but attention needs top_k rows of width D; otherwise it {crash}"
        ) from None

    past = visible_mask(q, k, True, None)
    dots = q @ k.mT
    nothing = torch.zeros(B, H, T, T, dtype=torch.bool)
    best_in_past = dots.masked_fill(~past, -torch.inf).topk(top_k).indices
    expected_mask = nothing.scatter(-1, best_in_past, True) & past
    late_mask = nothing.scatter(-1, dots.topk(top_k).indices, True) & past

    def explain(W: Tensor, _expected: Tensor) -> None:
        reads, sums = W > 0, W.sum(-1)
        if reads.equal(expected_mask):
            if (short := sums < 1 - TOLERANCE).any():
                b, h, t = first_index(short)
                raise Mistake(
                    f"weights sum to {sums[b, h, t]:.2f} at query {t}: "
                    "select the keys first, then take the softmax over them"
                )
            return
        if reads.equal(late_mask):
            t = first_index(reads != expected_mask)[2]
            raise Mistake(
                f"future keys are among the top_k of query {t}: mask the scores before topk"
            )
        if W.triu(1).any() or not reads[:, :, 1, 1].any() or not reads.any(-1).all():
            return  # a wrong causal mask or NaN: expect_attention explains these
        count, expected_count = reads.sum(-1), expected_mask.sum(-1)
        if (count != expected_count).any():
            b, h, t = first_index(count != expected_count)
            raise Mistake(
                f"query {t} attends to {count[b, h, t]} keys instead of "
                f"{expected_count[b, h, t]} (top_k = {top_k})"
            )
        b, h, t = first_index((reads != expected_mask).any(-1))
        keys = reads[b, h, t].nonzero().flatten().tolist()
        best = expected_mask[b, h, t].nonzero().flatten().tolist()
        raise Mistake(f"query {t} attends to the keys {keys}, but its highest scores are at {best}")

    expect_attention(lambda q, k, v: answer(q, k, v, top_k), expected_mask, [q, k, v], explain)
    for length, n in ((T, T), (T, 32), (1, 3)):
        q, k, v = random_qkv(T=length)
        try:
            output = answer(q, k, v, n)
        except Crash as crash:
            raise Mistake(
                f"top_k larger than T fails (T = {length}, top_k = {n}; use the smaller one): "
                f"it {crash}"
            ) from None
        expect_shape(output, v.shape, f", for T = {length} and top_k = {n}")
        if not close(output, masked_attention(q, k, v, visible_mask(q, k, True, None))):
            raise Mistake(
                f"with top_k = {n} and T = {length} every key is selected, "
                "but the result is not that of step 1"
            )


def check_block_attention(answer: Answer) -> None:
    """Check step 5."""
    q, k, v = random_qkv()
    blocks = select_blocks(q, k, BLOCK, 2)
    # Select fewer blocks than exist, so that a -1 used as block 0 or as the last block shows.
    blocks[0, :, 10] = torch.tensor([1, -1])
    blocks[1, :, 11] = torch.tensor([-1, -1])
    current_block = torch.arange(T) // BLOCK
    current = current_block[:, None] == torch.arange(N)  # (T, N)
    listed = (blocks[..., None] == torch.arange(N)).any(-2)  # (B, H, T, N)
    without_fill = (blocks >= 0).all(-1, keepdim=True)  # (B, H, T, 1): rows without a -1
    mask = block_mask(q, k, blocks, BLOCK, True)

    def explain(W: Tensor, expected: Tensor) -> None:
        mass = W @ current.to(W)  # (B, H, T, N): the weight that each query gives to each block
        if not mass[:, :, current].any():
            raise Mistake(
                f"query 9 does not attend to its current block (keys {key_range(2)}, up to 9): "
                "every query attends to it, although `blocks` never lists it"
            )
        if (stray := (mass > 0) & ~listed & ~current).any():
            b, h, t, n = first_index(stray)
            where = f"(keys {key_range(n)}); its row of `blocks` is {blocks[b, h, t].tolist()}"
            if not (stray & without_fill).any():
                raise Mistake(
                    f"-1 was used as a block index: query {t} attends to block {n} {where}"
                )
            if not W.triu(1).any():
                raise Mistake(f"query {t} attends to block {n}, which was not selected {where}")
            return
        if W.triu(1).any():
            t, s = first_index(W.triu(1))[2:]
            raise Mistake(
                f"position {t} attends to position {s} in its future, in the current block: "
                "the causal mask applies there too"
            )
        if (unread := listed & (mass == 0)).any():
            t, n = first_index(unread)[2:]
            raise Mistake(
                f"query {t} does not attend to block {n} (keys {key_range(n)}), "
                "which was selected for it"
            )
        unevenness = (mass - (mass * current).sum(-1, keepdim=True)).abs()
        if unevenness[(listed | current) & without_fill].max() < TOLERANCE:
            raise Mistake(
                "each block has its own softmax, and the results are averaged: "
                "use one softmax over all keys"
            )
        # How often each key was counted, up to a factor that is the same for all keys of a query.
        times = (W / expected).where(mask, torch.inf)
        times = (times / times.amin(-1, keepdim=True)).where(mask, 1)
        if times.max() > 1.5 and (times - times.round()).abs().max() < 1e-6:
            b, h, t, s = first_index(times > 1.5)
            raise Mistake(
                f"the keys of block {current_block[s]} are counted {times[b, h, t, s]:.0f} times "
                f"at query {t}"
            )

    expect_attention(lambda q, k, v: answer(q, k, v, blocks, BLOCK), mask, [q, k, v], explain)
    cases = {  # description: (length, top_blocks)
        "T = 1": (1, 1),
        "T smaller than block_size": (3, 2),
        "T a multiple of block_size": (12, 2),
        "an empty `blocks` (K = 0)": (T, 0),
        "every past block selected": (T, N),
    }
    for when, (length, top_blocks) in cases.items():
        q, k, v = random_qkv(T=length)
        blocks = select_blocks(q, k, BLOCK, top_blocks)
        output = answer(q, k, v, blocks, BLOCK, when=f"for {when}")
        expect_shape(output, v.shape, f", for {when}")
        if not close(output, masked_attention(q, k, v, block_mask(q, k, blocks, BLOCK, True))):
            raise Mistake(f"right in general, but wrong for {when}")


# ---- steps 3 and 4, and the bonus: summarise blocks and select them ------------------------------


def check_pool(answer: Answer) -> None:
    """Check step 3."""
    _, k, _ = random_qkv()
    try:
        output = answer(k, BLOCK)
    except Crash as crash:
        # If a multiple of block_size fails too, that message is nearer to the cause.
        answer(k[:, :, :12], BLOCK)
        raise Mistake(
            f"fails if T is not a multiple of block_size (T = {T}, block_size = {BLOCK}): "
            f"it {crash}"
        ) from None
    if output.shape == (B, H, N - 1, D):
        raise Mistake(
            f"the last, shorter block is missing: {T} keys in blocks of {BLOCK} make {N} blocks, "
            f"not {N - 1}"
        )
    expect_shape(output, (B, H, N, D))
    expect_dtype(output, k)
    expect_independent_heads(lambda k: answer(k, BLOCK), [k])
    if (output[:, :, 0] - k[:, :, :BLOCK].amax(2)).abs().max() < TOLERANCE:
        raise Mistake("the result is the maximum of each channel, not the mean")
    expect_means(linear_map_matrix(lambda k: answer(k, BLOCK))[0, 0])
    if not close(output, summarise(k, BLOCK, "mean")):
        raise Mistake("the means are right for ones and zeros, but not for other numbers")
    when = "for T smaller than block_size"
    expect_shape(answer(k[:, :, :3], BLOCK, when=when), (B, H, 1, D), f", {when}")


def expect_means(M: Tensor) -> None:
    """Raise Mistake unless M (N, T), the weight of each key in each block's mean, is right."""
    in_block = torch.arange(T) // BLOCK == torch.arange(N)[:, None]  # (N, T)
    for n in range(N):
        size = in_block[n].sum().item()
        keys = M[n].nonzero().flatten().tolist()
        if not (M[n] != 0).equal(in_block[n]):
            strided = len(keys) > 1 and keys[-1] - keys[0] >= len(keys)
            hint = ": the reshape should be to (N, block_size)" if strided else ""
            raise Mistake(
                f"the mean of block {n} is computed from the keys {keys}, not {key_range(n)}{hint}"
            )
        if (M[n, keys] - 1).abs().max() < TOLERANCE:
            raise Mistake(f"the keys of block {n} are summed: divide by their number")
        if size < BLOCK and (M[n, keys] - 1 / BLOCK).abs().max() < TOLERANCE:
            raise Mistake(
                f"the mean of the last, shorter block counts the padding: it has {size} keys, "
                f"but the sum is divided by {BLOCK}"
            )
        if (wrong := (M[n] - in_block[n] / size).abs() > TOLERANCE).any():
            key = first_index(wrong)[0]
            weight, right = different_digits(M[n, key], 1 / size, 3)
            raise Mistake(
                f"the mean of block {n} gives key {key} the weight {weight}, not {right} = 1/{size}"
            )


def check_selection(answer: Answer, method: str, positions: Tensor) -> None:
    """Check step 4, which returns a row for each query, or the bonus, with one for each tile.

    positions (R,): the position of the query that each row is selected for.
    """
    q, k, _ = random_qkv()
    R = positions.numel()
    blocks = answer(q, k, BLOCK, N)
    if blocks.shape == (B, H, T, N) and R != T:
        raise Mistake(
            f"returns a row for each of the {T} queries, but should return one for each of the "
            f"{R} tiles"
        )
    expect_shape(blocks, (B, H, R, N))
    expect_integers(blocks, "block indices")
    if (outside := (blocks < -1) | (blocks >= N)).any():
        raise Mistake(
            f"there is no block {blocks[outside][0]}: block indices are 0 to {N - 1}, "
            "and -1 for no block"
        )
    expect_independent_heads(lambda q, k: answer(q, k, BLOCK, N), [q, k])
    expect_candidates(blocks, positions)
    expect_no_leak(answer, positions)
    for top_blocks in (1, 2, N):
        blocks = answer(q, k, BLOCK, top_blocks).long()
        expected = select_blocks(q, k, BLOCK, top_blocks, method)
        expect_shape(blocks, expected.shape, f", for top_blocks = {top_blocks}")
        if not blocks.equal(expected):
            b, h, r, _ = first_index(blocks != expected)
            t, row, best = positions[r], blocks[b, h, r].tolist(), expected[b, h, r].tolist()
            if sorted(row) == sorted(best):
                raise Mistake(f"the order is wrong: query {t} lists {row}, best first is {best}")
            raise Mistake(
                f"the selection is not the best: query {t} selects {row}, "
                f"the largest q . mean are at {best}"
            )
    cases = {  # description: (length, top_blocks)
        "top_blocks larger than the number of blocks": (T, N + 2),
        "T smaller than block_size": (3, 2),
    }
    for when, (length, top_blocks) in cases.items():
        q, k, _ = random_qkv(T=length)
        try:
            blocks = answer(q, k, BLOCK, top_blocks).long()
        except Crash as crash:
            raise Mistake(f"fails for {when}: it {crash}") from None
        expected = select_blocks(q, k, BLOCK, top_blocks, method)
        expect_shape(blocks, expected.shape, f", for {when}: fill up with -1")
        if not blocks.equal(expected):
            raise Mistake(f"right in general, but wrong for {when}")


def expect_no_leak(answer: Answer, positions: Tensor) -> None:
    """Raise Mistake if changing token s changes the selection of a query before s."""
    q, k, _ = random_qkv()
    before = answer(q, k, BLOCK, 1)
    expect_shape(before, (B, H, positions.numel(), 1), ", for top_blocks = 1")
    for s in range(1, T):
        q2, k2 = q.clone(), k.clone()
        q2[:, :, s] *= -9
        k2[:, :, s] *= -9
        for name, after in (("query", answer(q2, k, BLOCK, 1)), ("key", answer(q, k2, BLOCK, 1))):
            if (leak := (after != before)[:, :, positions < s]).any():
                t = positions[first_index(leak)[2]]
                raise Mistake(
                    f"the selection for query {t} changes with {name} {s}: the future leaks"
                )


def expect_candidates(blocks: Tensor, positions: Tensor) -> None:
    """Raise Mistake unless each row of blocks (B, H, R, N) lists its past blocks, then -1.

    All N blocks were requested, so each row must list its whole past, in any order.
    """
    rows = []  # (position, current block, selected blocks)
    for head in blocks.flatten(0, 1).tolist():
        for t, row in zip(positions.tolist(), head, strict=True):
            rows.append((t, t // BLOCK, row))
    all_past_listed = all(sorted(row[:current]) == list(range(current)) for _, current, row in rows)
    if (blocks >= 0).all() and all_past_listed:
        t, current, row = rows[0]
        raise Mistake(
            f"no -1 where a query has fewer past blocks than top_blocks: query {t} has {current}, "
            f"but lists {row}"
        )
    for t, current, row in rows:
        if max(row) > current:
            raise Mistake(
                f"a block entirely in the future was selected: query {t} selects block {max(row)} "
                f"(keys {key_range(max(row))})"
            )
        if current in row and t < current * BLOCK + BLOCK - 1:
            raise Mistake(
                f"a block partly in the future was selected: query {t} selects block {current} "
                f"(keys {key_range(current)}), its current block"
            )
        if current in row:
            raise Mistake(
                f"the current block is listed for query {t}, the last query in it: "
                "step 5 always attends to it, so never list it"
            )
        if missing := set(range(current)) - set(row):
            raise Mistake(
                f"query {t} leaves out block {min(missing)} (keys {key_range(min(missing))}), "
                "although it lies entirely in the past"
            )
        if -1 in row[:current]:
            raise Mistake(
                f"-1 comes before a block for query {t}: {row}; "
                "list the blocks first, best first, then the -1s"
            )
        if any(n >= 0 for n in row[current:]):
            raise Mistake(f"a block is listed twice for query {t}: {row}; fill up with -1")


STEPS = [
    Step("dense_attention", check_dense),
    Step("topk_attention", check_topk),
    Step("pool_blocks", check_pool),
    Step("select_blocks", lambda answer: check_selection(answer, "flat", torch.arange(T))),
    Step("block_attention", check_block_attention),
    Step(
        "select_for_tile",
        lambda answer: check_selection(answer, "tile", torch.arange(N) * BLOCK),
        optional=True,
    ),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
