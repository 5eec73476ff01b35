"""The ladder of attention: each step equals the one before at its limit, and nothing looks ahead."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.attention import (
    block_attention,
    block_attention_reference,
    block_mask,
    dense_attention,
    gathered_block_attention,
    masked_attention,
    select_blocks,
    summarise,
    topk_attention,
    visible,
)

FAST = (block_attention, gathered_block_attention)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 4, 8]))


def random_qkv(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance


@settings(max_examples=40, deadline=None)
@given(shapes, st.booleans())
def test_dense_equals_a_loop_over_queries(shape, causal):
    q, k, v = random_qkv(shape)
    T, D = shape[2:]
    rows = []
    for t in range(T):
        end = t + 1 if causal else T
        weights = (q[:, :, t : t + 1] @ k[:, :, :end].mT / D**0.5).softmax(-1)
        rows.append(weights @ v[:, :, :end])
    close(dense_attention(q, k, v, causal), torch.cat(rows, dim=2))
    close(masked_attention(q, k, v, visible(q, k, causal, None)), torch.cat(rows, dim=2))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 30), st.booleans())
def test_topk_of_all_keys_equals_dense(shape, more, causal):
    q, k, v = random_qkv(shape)
    close(topk_attention(q, k, v, shape[2] + more, causal), dense_attention(q, k, v, causal))


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 12), st.booleans())
def test_topk_equals_sorting_each_query_by_hand(shape, top_k, causal):
    q, k, v = random_qkv(shape)
    (B, H, T, D), out = shape, torch.zeros(shape, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                end = t + 1 if causal else T
                scores = k[b, h, :end] @ q[b, h, t] / D**0.5
                best = sorted(range(end), key=lambda s: -scores[s].item())[:top_k]
                out[b, h, t] = scores[best].softmax(0) @ v[b, h, best]
    close(topk_attention(q, k, v, top_k, causal), out)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 12), st.booleans(), st.sampled_from([*FAST, block_attention_reference]))
def test_all_blocks_chosen_equals_dense(shape, block_size, causal, attend):
    q, k, v = random_qkv(shape)
    blocks = select_blocks(q, k, block_size, -(-shape[2] // block_size), causal=causal)
    close(attend(q, k, v, blocks, block_size, causal), dense_attention(q, k, v, causal))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 12), st.integers(1, 4), st.booleans(), st.sampled_from(FAST))
def test_fast_equals_reference_forward_and_backward(shape, block_size, top_blocks, causal, attend):
    results = []
    for function in (attend, block_attention_reference):
        q, k, v = (x.requires_grad_() for x in random_qkv(shape))
        out = function(q, k, v, select_blocks(q, k, block_size, top_blocks, causal=causal), block_size, causal)
        weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for fast, reference in zip(*results, strict=True):
        close(fast, reference, 1e-11)


@pytest.mark.parametrize("attend", FAST)
def test_gradients_are_right(attend):
    q, k, v = (x.requires_grad_() for x in random_qkv((1, 2, 7, 2)))
    blocks = select_blocks(q, k, 2, 2)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, blocks, 2), (q, k, v))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_selection_is_the_best_of_the_candidates(shape, block_size, top_blocks, causal):
    q, k, _ = random_qkv(shape)
    (B, H, T, _), blocks = shape, select_blocks(q, k, block_size, top_blocks, causal=causal)
    assert blocks.shape == (B, H, T, top_blocks)
    pooled = torch.stack([k[:, :, s : s + block_size].mean(2) for s in range(0, T, block_size)], dim=2)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                own = t // block_size
                candidates = [n for n in range(pooled.size(2)) if (n < own if causal else n != own)]
                best = sorted(candidates, key=lambda n: -(pooled[b, h, n] @ q[b, h, t]).item())[:top_blocks]
                assert blocks[b, h, t].tolist() == best + [-1] * (top_blocks - len(best))


def leaks(select):
    """Does what comes at or after token p change the choice or the output before p, for any p?"""
    T, block_size = 26, 4
    q, k, v = random_qkv((1, 2, T, 4))
    for p in range(1, T):
        q2, k2, v2 = q.clone(), k.clone(), v.clone()
        for x, seed in ((q2, 1), (k2, 2), (v2, 3)):
            x[:, :, p:] = 5 * random_qkv((1, 2, T - p, 4), seed=seed * 100 + p)[0]
        before, after = select(q, k, block_size, 2), select(q2, k2, block_size, 2)
        if not torch.equal(before[:, :, :p], after[:, :, :p]):
            return True
        for attend in (*FAST, block_attention_reference):
            close(attend(q, k, v, before, block_size)[:, :, :p], attend(q2, k2, v2, after, block_size)[:, :, :p])
    return False


def test_the_future_changes_nothing():
    assert not leaks(select_blocks)


def test_a_leaky_selection_is_caught():
    def own_block_scored(q, k, block_size, top_blocks):  # the mean of the own block holds keys of the future
        scores = q @ summarise(k, block_size, "mean").mT
        own = torch.arange(q.size(2))[:, None] // block_size
        scores = scores.masked_fill(torch.arange(scores.size(-1)) > own, float("-inf"))
        best, blocks = scores.topk(top_blocks, dim=-1)
        return blocks.masked_fill(best == float("-inf"), -1)

    assert leaks(own_block_scored)


def test_the_own_block_is_always_read():
    q, k, _ = random_qkv((1, 1, 13, 4))
    nothing = torch.full((1, 1, 13, 2), -1)
    mask = block_mask(q, k, nothing, 4, causal=True)[0, 0]
    for t in range(13):
        assert mask[t].nonzero().flatten().tolist() == list(range(t // 4 * 4, t + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_stays_near(dtype):
    q, k, v = random_qkv((2, 2, 50, 16), dtype=dtype)
    blocks = select_blocks(q, k, 8, 2)
    exact = block_attention_reference(q.double(), k.double(), v.double(), blocks, 8)
    assert (block_attention(q, k, v, blocks, 8).double() - exact).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_decoding_reads_what_the_whole_sequence_reads():
    q, k, v = random_qkv((2, 2, 23, 4))
    whole = select_blocks(q, k, 4, 2)
    out = block_attention_reference(q, k, v, whole, 4)
    at = torch.tensor([[9], [21]])  # each row of the batch stands somewhere else
    last = torch.stack([q[0, :, 9:10], q[1, :, 21:22]])
    blocks = select_blocks(last, k, 4, 2, positions=at)
    for row, p in enumerate((9, 21)):
        assert torch.equal(blocks[row, :, 0], whole[row, :, p])
        for attend in (*FAST, block_attention_reference):
            close(attend(last, k, v, blocks, 4, positions=at)[row, :, 0], out[row, :, p])


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: topk_attention(q, k, v, 0),
        lambda q, k, v: select_blocks(q, k, 0, 1),
        lambda q, k, v: select_blocks(q, k, 4, 1, method="oracle"),
        lambda q, k, v: select_blocks(q[:, :, :3], k, 4, 1),
        lambda q, k, v: block_attention_reference(q, k, v, torch.zeros(1, 1, 2, 1, dtype=torch.long), 4),
    ],
)
def test_wrong_arguments_say_so(call):
    with pytest.raises(ValueError, match=r"at least|choices|positions|one row for each"):
        call(*random_qkv((1, 1, 9, 4)))
