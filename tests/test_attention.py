"""The ladder of attention: each step equals the step before it in a limit case.

No selection and no output depends on later tokens.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods import attention, attention_selection
from nanods.attention import (
    block_attention,
    block_attention_reference,
    block_mask,
    dense_attention,
    gathered_block_attention,
    masked_attention,
    query_attention,
    tile_attention,
    topk_attention,
    visible_mask,
)
from nanods.attention_selection import METHODS, POOLS, select_blocks, summarise

FAST = (block_attention, gathered_block_attention)  # to compare with the reference
methods, pools = st.sampled_from(METHODS), st.sampled_from(POOLS)
shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 4, 8])
)


def random_qkv(shape, seed=0, dtype=torch.float64):
    """Return normally distributed q, k and v of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def close(a, b, tolerance=1e-12):
    """Check that two tensors have one shape and differ by at most `tolerance`."""
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
    close(masked_attention(q, k, v, visible_mask(q, k, causal, None)), torch.cat(rows, dim=2))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 30), st.booleans())
def test_topk_of_all_keys_equals_dense(shape, excess, causal):
    q, k, v = random_qkv(shape)
    close(topk_attention(q, k, v, shape[2] + excess, causal), dense_attention(q, k, v, causal))


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 12), st.booleans())
def test_topk_equals_sorting_the_scores_of_each_query(shape, top_k, causal):
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
@given(
    shapes, st.integers(1, 12), st.booleans(), st.sampled_from([*FAST, block_attention_reference])
)
def test_all_blocks_selected_equals_dense(shape, block_size, causal, attend):
    q, k, v = random_qkv(shape)
    blocks = select_blocks(q, k, block_size, -(-shape[2] // block_size), causal=causal)
    close(attend(q, k, v, blocks, block_size, causal), dense_attention(q, k, v, causal))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 12), st.integers(1, 4), st.booleans(), st.sampled_from(FAST))
def test_fast_equals_reference_forward_and_backward(shape, block_size, top_blocks, causal, attend):
    results = []
    for function in (attend, block_attention_reference):
        q, k, v = (x.requires_grad_() for x in random_qkv(shape))
        blocks = select_blocks(q, k, block_size, top_blocks, causal=causal)
        out = function(q, k, v, blocks, block_size, causal)
        weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for fast, reference in zip(*results, strict=True):
        close(fast, reference, 1e-11)


@pytest.mark.parametrize("attend", FAST)
def test_gradients_match_finite_differences(attend):
    q, k, v = (x.requires_grad_() for x in random_qkv((1, 2, 7, 2)))
    blocks = select_blocks(q, k, 2, 2)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, blocks, 2), (q, k, v))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 12), st.integers(1, 4), st.booleans(), pools)
def test_flat_selects_the_highest_scoring_candidates(shape, block_size, top_blocks, causal, pool):
    q, k, _ = random_qkv(shape)
    B, H, T, _ = shape
    blocks = select_blocks(q, k, block_size, top_blocks, pool=pool, causal=causal)
    assert blocks.shape == (B, H, T, top_blocks)
    for b in range(B):
        for h in range(H):
            keys = k[b, h].split(block_size)
            for t in range(T):
                current, query = t // block_size, q[b, h, t]
                if pool == "mean":
                    scores = [float(query @ block.mean(0)) for block in keys]
                else:
                    scores = [
                        float(torch.maximum(query * block.amax(0), query * block.amin(0)).sum())
                        for block in keys
                    ]
                candidates = [
                    n for n in range(len(keys)) if (n < current if causal else n != current)
                ]
                best = sorted(candidates, key=lambda n: -scores[n])[:top_blocks]
                assert blocks[b, h, t].tolist() == best + [-1] * (top_blocks - len(best))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_selecting_for_a_few_queries_at_a_time_gives_the_same_blocks(method, causal, monkeypatch):
    q, k, _ = random_qkv((2, 2, 45, 4))
    options = {"causal": causal, "beam": 2, "fan_out": 2}
    at_once = select_blocks(q, k, 4, 5, method, **options)
    for max_scores in (1, 200):  # one query at a time, and several
        monkeypatch.setattr(attention_selection, "MAX_SCORES", max_scores)
        assert torch.equal(select_blocks(q, k, 4, 5, method, **options), at_once)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 12))
def test_no_key_scores_above_the_bound_of_its_block(shape, block_size):
    q, k, _ = random_qkv(shape)
    signed_q = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
    bound = signed_q @ summarise(k, block_size, "bound").mT  # (B, H, T, N)
    scores = q @ k.mT
    for n, block_scores in enumerate(scores.split(block_size, dim=-1)):
        assert (block_scores.amax(-1) <= bound[..., n] + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 12), st.integers(1, 4), st.booleans(), pools, st.integers(2, 4))
def test_a_beam_as_wide_as_the_tree_equals_flat(
    shape, block_size, top_blocks, causal, pool, fan_out
):
    q, k, _ = random_qkv(shape)
    N = -(-shape[2] // block_size)
    flat = select_blocks(q, k, block_size, top_blocks, "flat", pool, causal)
    for beam in (max(1, N // fan_out), N):  # with the first, the tree still has a level or two
        tree = select_blocks(
            q, k, block_size, top_blocks, "tree", pool, causal, beam=beam, fan_out=fan_out
        )
        assert beam < N / fan_out or torch.equal(tree, flat)


def test_a_narrow_beam_finds_the_blocks_of_a_topic():
    """When neighbouring keys share a topic, the summaries on every level point to it."""
    topics = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double()
    # (1, 1, 256, 16): 8 topics of 8 blocks of 4 keys
    k = topics.repeat_interleave(32, dim=0)[None, None]
    q = topics[2].expand(1, 1, 256, 16)
    tree = select_blocks(q, k, 4, 8, "tree", beam=4, fan_out=2)
    assert sorted(tree[0, 0, 255].tolist()) == list(range(16, 24))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 12), st.integers(1, 4), pools)
def test_a_tile_uses_the_selection_of_its_first_query(shape, block_size, top_blocks, pool):
    q, k, _ = random_qkv(shape)
    flat = select_blocks(q, k, block_size, top_blocks, "flat", pool)
    tile = select_blocks(q, k, block_size, top_blocks, "tile", pool)
    assert torch.equal(tile, flat[:, :, ::block_size])
    # With blocks of one query each, tile equals flat.
    flat = select_blocks(q, k, 1, top_blocks, "flat", pool)
    tile = select_blocks(q, k, 1, top_blocks, "tile", pool)
    assert torch.equal(tile, flat)


def test_window_selects_the_nearest_blocks():
    q, k, _ = random_qkv((1, 1, 22, 4))
    assert select_blocks(q, k, 4, 3, "window")[0, 0, [0, 5, 21]].tolist() == [
        [-1, -1, -1],
        [0, -1, -1],
        [4, 3, 2],
    ]
    assert select_blocks(q, k, 4, 3, "window", causal=False)[0, 0, [0, 8, 21]].tolist() == [
        [-1, 1, -1],
        [1, 3, 0],
        [4, -1, 3],
    ]


def leaks(select, T=26, dtype=torch.float64):
    """Return whether tokens from any position p on change the selection or output before p."""
    q, k, v = random_qkv((1, 2, T, 4), dtype=dtype)
    for p in range(1, T):
        q2, k2, v2 = q.clone(), k.clone(), v.clone()
        for x, seed in ((q2, 1), (k2, 2), (v2, 3)):
            x[:, :, p:] = 5 * random_qkv((1, 2, T - p, 4), seed=seed * 100 + p, dtype=dtype)[0]
        before, after = select(q, k, 4, 2), select(q2, k2, 4, 2)
        rows = p if before.size(2) == T else -(-p // 4)  # tiles that have a query before p
        if not torch.equal(before[:, :, :rows], after[:, :, :rows]):
            return True
        for attend in (block_attention, block_attention_reference):
            out, out2 = attend(q, k, v, before, 4), attend(q2, k2, v2, after, 4)
            close(out[:, :, :p], out2[:, :, :p], 1e-12 if dtype == torch.float64 else 1e-5)
    return False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [3, 16, 26])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("method", METHODS)
def test_later_tokens_change_neither_selection_nor_output(method, pool, T, dtype):
    def select(q, k, block_size, top_blocks):
        return select_blocks(q, k, block_size, top_blocks, method, pool, beam=2, fan_out=2)

    assert not leaks(select, T, dtype)


def select_with_current_block(q, k, block_size, top_blocks):
    """Leak: score the current block too, whose mean contains keys of the future."""
    scores = q @ summarise(k, block_size, "mean").mT
    current = torch.arange(q.size(2))[:, None] // block_size
    scores = scores.masked_fill(torch.arange(scores.size(-1)) > current, float("-inf"))
    best, blocks = scores.topk(top_blocks, dim=-1)
    return blocks.masked_fill(best == float("-inf"), -1)


def select_by_tile_mean(q, k, block_size, top_blocks):
    """Leak: select with the mean of the tile's queries, most of them in the future of the first."""
    scores = summarise(q, block_size, "mean") @ summarise(k, block_size, "mean").mT
    N = scores.size(-1)
    hidden = torch.ones(N, N, dtype=torch.bool).triu()
    best, blocks = scores.masked_fill(hidden, float("-inf")).topk(top_blocks, dim=-1)
    return blocks.masked_fill(best == float("-inf"), -1)


@pytest.mark.parametrize("leaky", [select_with_current_block, select_by_tile_mean])
def test_leaks_detects_a_leaky_selection(leaky):
    assert leaks(leaky)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_key_affects_only_the_queries_that_see_it(method, pool, value):
    """In every route but "mask", which adds its mask to the scores: nan - inf is nan."""
    q, k, v = random_qkv((2, 1, 24, 4))
    k2 = k.clone()
    k2[0, 0, 13] = value
    routes = (query_attention, gathered_block_attention)
    if method == "tile":
        routes = (tile_attention,)
    for attend in routes:
        finite = attend(q, k, v, select_blocks(q, k, 4, 2, method, pool), 4)
        blocks = select_blocks(q, k2, 4, 2, method, pool)
        affected = attend(q, k2, v, blocks, 4)
        reference = block_attention_reference(q, k2, v, blocks, 4)
        close(affected[0, :, :13], finite[0, :, :13])
        close(affected[1], finite[1])
        assert torch.allclose(affected, reference, rtol=0, atol=1e-12, equal_nan=True)


def test_the_current_block_is_always_attended_to():
    q, k, _ = random_qkv((1, 1, 13, 4))
    no_blocks = torch.full((1, 1, 13, 2), -1)
    mask = block_mask(q, k, no_blocks, 4, causal=True)[0, 0]
    for t in range(13):
        assert mask[t].nonzero().flatten().tolist() == list(range(t // 4 * 4, t + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_is_close_to_fp64(dtype):
    q, k, v = random_qkv((2, 2, 50, 16), dtype=dtype)
    blocks = select_blocks(q, k, 8, 2)
    exact = block_attention_reference(q.double(), k.double(), v.double(), blocks, 8)
    error = (block_attention(q, k, v, blocks, 8).double() - exact).abs().max()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("method", ["flat", "tree", "window"])
@pytest.mark.parametrize("pool", POOLS)
def test_decoding_selects_and_computes_what_the_full_sequence_does(method, pool):
    q, k, v = random_qkv((2, 2, 23, 4))
    options = {"method": method, "pool": pool, "beam": 2, "fan_out": 2}
    all_blocks = select_blocks(q, k, 4, 2, **options)
    out = block_attention_reference(q, k, v, all_blocks, 4)
    positions = torch.tensor([[9], [21]])  # a different one for each row of the batch
    last = torch.stack([q[0, :, 9:10], q[1, :, 21:22]])
    blocks = select_blocks(last, k, 4, 2, positions=positions, **options)
    summaries = summarise(k, 4, pool)
    from_summaries = select_blocks(
        last, k, 4, 2, positions=positions, summaries=summaries, **options
    )
    assert torch.equal(blocks, from_summaries)
    for row, p in enumerate((9, 21)):
        assert torch.equal(blocks[row, :, 0], all_blocks[row, :, p])
        for attend in (*FAST, block_attention_reference):
            close(attend(last, k, v, blocks, 4, positions=positions)[row, :, 0], out[row, :, p])


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: topk_attention(q, k, v, 0),
        lambda q, k, v: select_blocks(q, k, 0, 1),
        lambda q, k, v: select_blocks(q, k, 4, 1, method="oracle"),
        lambda q, k, v: select_blocks(q[:, :, :3], k, 4, 1),
        lambda q, k, v: select_blocks(q, k, 4, 1, "tree", beam=0),
        lambda q, k, v: select_blocks(q, k, 4, 1, "tile", positions=torch.arange(9)[None]),
        lambda q, k, v: block_attention(
            q[:, :, :8], k, v, torch.zeros(1, 1, 2, 1, dtype=torch.long), 4
        ),
        lambda q, k, v: block_attention_reference(
            q, k, v, torch.zeros(1, 1, 2, 1, dtype=torch.long), 4
        ),
    ],
)
def test_wrong_arguments_raise_value_errors(call):
    with pytest.raises(ValueError, match=r"at least|must be one of|positions|one row for each"):
        call(*random_qkv((1, 1, 9, 4)))


@pytest.mark.parametrize(
    ("T", "block_size", "dtype", "route"),
    [
        (1024, 128, torch.bfloat16, "flex"),
        (1024, 64, torch.bfloat16, "mask"),
        (384, 128, torch.bfloat16, "mask"),  # 2 blocks and the current one are all
        (1024, 128, torch.float64, "mask"),
    ],
)
def test_a_gpu_takes_flex_attention_where_it_can_and_leaves_out_keys(T, block_size, dtype, route):
    """The tensors are stand-ins, since the test needs no GPU."""
    x = SimpleNamespace(size=lambda _: T, is_cuda=True, dtype=dtype)
    blocks = torch.zeros(1, 1, -(-T // block_size), 2)
    assert attention.choose_route(x, x, blocks, block_size, None) == route


@pytest.mark.parametrize(
    ("T", "block_size", "masks"), [(1024, 128, 0), (1024, 64, 1), (384, 128, 1)]
)
def test_the_memory_of_a_gpu_counts_the_mask_where_its_route_has_one(T, block_size, masks):
    sizes = [T, 768, 12, "cuda", 2, False]
    block, dense = (
        attention.AttentionConfig(kind, block_size=block_size, top_blocks=2).activation_bytes(
            *sizes
        )
        for kind in ("block", "dense")
    )
    assert sum(block) - sum(dense) == masks * 4 * 12 * T
