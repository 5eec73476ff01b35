"""Grade the exercises of lesson 01: python lessons/exercises/check_01.py [FILE]

Mistakes are found by experiments on the functions (see probe.py), never by reading their source.
"""

import sys
from pathlib import Path

import torch
from grade import (
    TOLERANCE,
    Answer,
    Crash,
    Mistake,
    Step,
    expect_dtype,
    expect_integers,
    expect_shape,
    first_index,
    main,
)
from probe import BLOCK, B, D, H, N, T, examine, expect_separate, qkv, span, through_identity
from torch import Tensor

from nanods.attention import block_mask, masked_attention, select_blocks, summarise, visible_mask

# ---- steps 1, 2 and 5: read ----------------------------------------------------------------------------------------------


def check_dense(answer: Answer) -> None:
    q, k, v = qkv()
    examine(
        answer, visible_mask(q, k, True, None).expand(B, H, T, T), [q, k, v], lambda W, right: None
    )
    q, k, v = qkv(T=1)
    out = answer(q, k, v, when="for T = 1")
    expect_shape(out, v.shape, ", for T = 1")
    if not (out - v).abs().max() < TOLERANCE:
        raise Mistake("with one token (T = 1) the output is not v")


def check_topk(answer: Answer) -> None:
    top_k, (q, k, v) = 3, qkv()
    try:
        answer(q, k, v, top_k)
    except Crash as crash:
        try:
            answer(*qkv(T=6), 6)
        except Mistake:
            raise crash from None
        raise Mistake(
            f"runs only where T = top_k: the article's gather takes top_k numbers of v for each query, where it needs "
            f"top_k rows of D; otherwise it {crash}"
        ) from None

    past = visible_mask(q, k, True, None)
    dots, none = q @ k.mT, torch.zeros(B, H, T, T, dtype=torch.bool)
    wanted = none.scatter(-1, dots.masked_fill(~past, -torch.inf).topk(top_k).indices, True) & past
    masked_late = none.scatter(-1, dots.topk(top_k).indices, True) & past

    def explain(W: Tensor, right: Tensor) -> None:
        reads, sums = W > 0, W.sum(-1)
        if reads.equal(wanted):
            if (short := sums < 1 - TOLERANCE).any():
                b, h, t = first_index(short)
                raise Mistake(
                    f"weights sum to {sums[b, h, t]:.2f} at query {t}: choose first, then softmax over the chosen"
                )
            return
        if reads.equal(masked_late):
            t = first_index(reads != wanted)[2]
            raise Mistake(
                f"keys of the future take some of the top_k places of query {t}: mask the scores before topk"
            )
        if W.triu(1).any() or not reads[:, :, 1, 1].any() or not reads.any(-1).all():
            return  # a wrong causal mask or NaN, which `examine` knows how to explain
        number, should = reads.sum(-1), wanted.sum(-1)
        if (number != should).any():
            b, h, t = first_index(number != should)
            raise Mistake(
                f"query {t} reads {number[b, h, t]} keys where it should read {should[b, h, t]} (top_k = {top_k})"
            )
        b, h, t = first_index((reads != wanted).any(-1))
        got, best = (x[b, h, t].nonzero().flatten().tolist() for x in (reads, wanted))
        raise Mistake(f"query {t} reads the keys {got}, but its highest scores are at {best}")

    examine(lambda q, k, v: answer(q, k, v, top_k), wanted, [q, k, v], explain)
    for length, n in ((T, T), (T, 32), (1, 3)):
        q, k, v = qkv(T=length)
        try:
            out = answer(q, k, v, n)
        except Crash as crash:
            raise Mistake(
                f"top_k larger than T fails (T = {length}, top_k = {n}; take the smaller): it {crash}"
            ) from None
        expect_shape(out, v.shape, f", for T = {length} and top_k = {n}")
        if (
            not (out - masked_attention(q, k, v, visible_mask(q, k, True, None))).abs().max()
            < TOLERANCE
        ):
            raise Mistake(
                f"with top_k = {n} and T = {length} every key is chosen, yet the result is not that of step 1"
            )


def check_block_attention(answer: Answer) -> None:
    q, k, v = qkv()
    blocks = select_blocks(q, k, BLOCK, 2)
    blocks[0, :, 10] = torch.tensor(
        [1, -1]
    )  # fewer than there are: shows whether -1 is taken for block 0, or for the last
    blocks[1, :, 11] = torch.tensor([-1, -1])
    own, each = torch.arange(T) // BLOCK, torch.arange(N)
    here = own[:, None] == each  # (T, N)
    listed = (blocks[..., None] == each).any(-2)  # (B, H, T, N)
    full = (blocks >= 0).all(-1, keepdim=True)  # (B, H, T, 1)
    mask = block_mask(q, k, blocks, BLOCK, True)

    def explain(W: Tensor, right: Tensor) -> None:
        mass = W @ here.to(
            W
        )  # (B, H, T, N): how much of its attention each query gives to each block
        if not mass[:, :, here].any():
            raise Mistake(
                f"query 9 does not read its own block (keys {span(2)}, up to 9): it is always read, never listed"
            )
        if (stray := (mass > 0) & ~listed & ~here).any():
            b, h, t, n = first_index(stray)
            what = f"(keys {span(n)}); its row of `blocks` is {blocks[b, h, t].tolist()}"
            if not (stray & full).any():
                raise Mistake(f"-1 was read as a block: query {t} reads block {n} {what}")
            if not W.triu(1).any():
                raise Mistake(f"query {t} reads block {n}, which was not chosen {what}")
            return
        if W.triu(1).any():
            t, s = first_index(W.triu(1))[2:]
            raise Mistake(
                f"position {t} sees position {s} of its own block, its future: the causal mask holds there too"
            )
        if (unread := listed & (mass == 0)).any():
            t, n = first_index(unread)[2:]
            raise Mistake(
                f"query {t} does not read block {n} (keys {span(n)}), which was chosen for it"
            )
        uneven = (mass - (mass * here).sum(-1, keepdim=True)).abs()
        if uneven[(listed | here) & full].max() < TOLERANCE:
            raise Mistake(
                "each block has a softmax of its own, and they are averaged: one softmax, over all keys read"
            )
        times = (W / right).where(
            mask, torch.inf
        )  # how often each key was counted, up to a factor of its row
        times = (times / times.amin(-1, keepdim=True)).where(mask, 1)
        if times.max() > 1.5 and (times - times.round()).abs().max() < 1e-6:
            b, h, t, s = first_index(times > 1.5)
            raise Mistake(
                f"the keys of block {own[s]} are counted {times[b, h, t, s]:.0f} times at query {t}"
            )

    examine(lambda q, k, v: answer(q, k, v, blocks, BLOCK), mask, [q, k, v], explain)
    cases = {
        "T = 1": (1, 1),
        "T smaller than block_size": (3, 2),
        "T a multiple of block_size": (12, 2),
        "an empty `blocks` (K = 0)": (T, 0),
        "every past block chosen": (T, N),
    }
    for when, (length, K) in cases.items():
        q, k, v = qkv(T=length)
        chosen = select_blocks(q, k, BLOCK, K)
        out = answer(q, k, v, chosen, BLOCK, when=f"for {when}")
        expect_shape(out, v.shape, f", for {when}")
        if (
            not (out - masked_attention(q, k, v, block_mask(q, k, chosen, BLOCK, True))).abs().max()
            < TOLERANCE
        ):
            raise Mistake(f"right in general, but wrong for {when}")


# ---- steps 3 and 4, and the bonus: summarise and choose ---------------------------------------------------------------------


def check_pool(answer: Answer) -> None:
    _, k, _ = qkv()
    try:
        out = answer(k, BLOCK)
    except Crash as crash:
        answer(k[:, :, :12], BLOCK)  # if this fails too, what it says is nearer to the cause
        raise Mistake(
            f"fails where T is no multiple of block_size (T = {T}, block_size = {BLOCK}): it {crash}"
        ) from None
    if out.shape == (B, H, N - 1, D):
        raise Mistake(
            f"the last, short block is left out: {T} keys in blocks of {BLOCK} make {N} blocks, not {N - 1}"
        )
    expect_shape(out, (B, H, N, D))
    expect_dtype(out, k)
    expect_separate(lambda k: answer(k, BLOCK), [k])
    if (out[:, :, 0] - k[:, :, :BLOCK].amax(2)).abs().max() < TOLERANCE:
        raise Mistake("the summary is the largest value of each channel, not the mean")
    M = through_identity(lambda k: answer(k, BLOCK))[
        0, 0
    ]  # (N, T): the weight of each key in each mean
    member = torch.arange(T) // BLOCK == torch.arange(N)[:, None]  # (N, T)
    for n in range(N):
        size, keys = member[n].sum().item(), M[n].nonzero().flatten().tolist()
        if not (M[n] != 0).equal(member[n]):
            strided = len(keys) > 1 and keys[-1] - keys[0] >= len(keys)
            hint = ": the reshape should be to (N, block_size)" if strided else ""
            raise Mistake(f"the mean of block {n} is made of the keys {keys}, not {span(n)}{hint}")
        if (M[n, keys] - 1).abs().max() < TOLERANCE:
            raise Mistake(f"the keys of block {n} are summed: divide by their number")
        if size < BLOCK and (M[n, keys] - 1 / BLOCK).abs().max() < TOLERANCE:
            raise Mistake(
                f"the last, short block's mean counts the padding: it has {size} keys, and is divided by {BLOCK}"
            )
        if (M[n, keys] - 1 / size).abs().max() > TOLERANCE:
            raise Mistake(
                f"the mean of block {n} gives key {keys[0]} the weight {M[n, keys[0]]:.3f}, not 1/{size}"
            )
    if not (out - summarise(k, BLOCK, "mean")).abs().max() < TOLERANCE:
        raise Mistake("the means are right for ones and zeros, but not for other numbers")
    when = "for T smaller than block_size"
    expect_shape(answer(k[:, :, :3], BLOCK, when=when), (B, H, 1, D), f", {when}")


def check_choice(answer: Answer, method: str, at: Tensor) -> None:
    """Step 4 with a row for each query; the bonus with one for each tile. `at` (R,): the position that a row chooses for."""
    q, k, _ = qkv()
    R = at.numel()
    blocks = answer(q, k, BLOCK, N)
    if blocks.shape == (B, H, T, N) and R != T:
        raise Mistake(
            f"returns a row for each of the {T} queries, where one for each of the {R} tiles is asked"
        )
    expect_shape(blocks, (B, H, R, N))
    expect_integers(blocks, "block numbers")
    if (outside := (blocks < -1) | (blocks >= N)).any():
        raise Mistake(
            f"there is no block {blocks[outside][0]}: they go from 0 to {N - 1}, and -1 is none"
        )
    expect_separate(lambda q, k: answer(q, k, BLOCK, N), [q, k])
    expect_candidates(blocks, at)

    before = answer(q, k, BLOCK, 1)
    expect_shape(before, (B, H, R, 1), ", for top_blocks = 1")
    for s in range(1, T):
        q2, k2 = q.clone(), k.clone()
        q2[:, :, s] *= -9
        k2[:, :, s] *= -9
        for what, after in (("query", answer(q2, k, BLOCK, 1)), ("key", answer(q, k2, BLOCK, 1))):
            if (leak := (after != before)[:, :, at < s]).any():
                raise Mistake(
                    f"the choice made for query {at[first_index(leak)[2]]} changes with {what} {s}: the future leaks"
                )
    for top_blocks in (1, 2, N):
        blocks, right = (
            answer(q, k, BLOCK, top_blocks).long(),
            select_blocks(q, k, BLOCK, top_blocks, method),
        )
        expect_shape(blocks, right.shape, f", for top_blocks = {top_blocks}")
        if not blocks.equal(right):
            b, h, r, _ = first_index(blocks != right)
            t, got, best = at[r], blocks[b, h, r].tolist(), right[b, h, r].tolist()
            if sorted(got) == sorted(best):
                raise Mistake(f"the order is wrong: query {t} lists {got}, best first is {best}")
            raise Mistake(
                f"the choice is not the best: query {t} chose {got}, the largest q . mean are at {best}"
            )
    cases = {
        "top_blocks larger than the number of blocks": (T, N + 2),
        "T smaller than block_size": (3, 2),
    }
    for when, (length, top_blocks) in cases.items():
        q, k, _ = qkv(T=length)
        try:
            blocks = answer(q, k, BLOCK, top_blocks).long()
        except Crash as crash:
            raise Mistake(f"fails for {when}: it {crash}") from None
        right = select_blocks(q, k, BLOCK, top_blocks, method)
        expect_shape(blocks, right.shape, f", for {when}: fill up with -1")
        if not blocks.equal(right):
            raise Mistake(f"right in general, but wrong for {when}")


def expect_candidates(blocks: Tensor, at: Tensor) -> None:
    """Where all N blocks are asked for, a row (B, H, R, N) must list its whole past, in whatever order, and then nothing."""
    rows = [
        (t, t // BLOCK, row)
        for head in blocks.flatten(0, 1).tolist()
        for t, row in zip(at.tolist(), head, strict=True)
    ]
    if (blocks >= 0).all() and all(sorted(row[:own]) == list(range(own)) for _, own, row in rows):
        t, own, row = rows[0]
        raise Mistake(
            f"no -1 where fewer past blocks than top_blocks exist: query {t} has {own} of them, yet lists {row}"
        )
    for t, own, row in rows:
        if max(row) > own:
            raise Mistake(
                f"a block wholly in the future was chosen: query {t} chose block {max(row)} (keys {span(max(row))})"
            )
        if own in row and t < own * BLOCK + BLOCK - 1:
            raise Mistake(
                f"a block partly in the future was chosen: query {t} chose block {own} (keys {span(own)}), its own"
            )
        if own in row:
            raise Mistake(
                f"the own block is listed at query {t}, the last of it: step 5 reads it anyway, so never list it"
            )
        if missing := set(range(own)) - set(row):
            raise Mistake(
                f"query {t} leaves out block {min(missing)} (keys {span(min(missing))}), though all of it is past"
            )
        if -1 in row[:own]:
            raise Mistake(
                f"-1 comes before a block at query {t}: {row}; the blocks first, best first, then the -1s"
            )
        if any(n >= 0 for n in row[own:]):
            raise Mistake(f"a block is listed twice at query {t}: {row}; fill up with -1")


STEPS = [
    Step("dense_attention", check_dense),
    Step("topk_attention", check_topk),
    Step("pool_blocks", check_pool),
    Step("select_blocks", lambda answer: check_choice(answer, "flat", torch.arange(T))),
    Step("block_attention", check_block_attention),
    Step(
        "select_for_tile",
        lambda answer: check_choice(answer, "tile", torch.arange(N) * BLOCK),
        optional=True,
    ),
]

if __name__ == "__main__":
    sys.exit(main(STEPS, Path(__file__).with_name("01_sparse_attention.py")))
