"""The fast implementations equal the masked reference, forward and backward.

For every selection method and every length.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods import attention_kernel
from nanods.attention import block_attention, block_attention_reference
from nanods.attention_kernel import (
    FLEX_BLOCK,
    flex_block_attention,
    query_attention,
    tile_attention,
)
from nanods.attention_selection import select_blocks
from tests.test_attention import close, random_qkv

shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 4, 8])
)
ROUTES = {
    "flat": query_attention,
    "tree": query_attention,
    "window": query_attention,
    "tile": tile_attention,
}


def with_gradients(attend, qkv, blocks, block_size, causal):
    """Return the output of `attend` and the gradients of q, k and v for a weighted sum of it."""
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = attend(q, k, v, blocks, block_size, causal)
    weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]


@pytest.mark.parametrize("chunk", [1, 1 << 18])  # one tile per chunk, and all in one
@pytest.mark.parametrize("method", ROUTES)
@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_equals_the_reference_forward_and_backward(
    method, chunk, shape, block_size, top_blocks, causal
):
    qkv = random_qkv(shape)
    blocks = select_blocks(*qkv[:2], block_size, top_blocks, method, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernel, "CHUNK_SCORES", chunk)
        patch.setattr(attention_kernel.QueryAttention, "MAX_QUERIES", 3 if chunk == 1 else 1024)
        fast = with_gradients(ROUTES[method], qkv, blocks, block_size, causal)
    reference = with_gradients(block_attention_reference, qkv, blocks, block_size, causal)
    for a, b in zip(fast, reference, strict=True):
        close(a, b, 1e-11)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 8), st.booleans(), st.randoms(use_true_random=False))
def test_any_selection_gives_the_result_of_the_reference(shape, block_size, causal, random):
    """Rows may be in any order and contain -1s, the current block and blocks of the future.

    The current block must still count once, and the blocks of the future not at all.
    """
    B, H, T, _ = shape
    N, qkv = -(-T // block_size), random_qkv(shape)
    for rows, attend in ((T, query_attention), (N, tile_attention)):
        entries = [random.sample([*range(N), *[-1] * 3], 3) for _ in range(B * H * rows)]
        blocks = torch.tensor(entries).view(B, H, rows, 3)
        fast = with_gradients(attend, qkv, blocks, block_size, causal)
        reference = with_gradients(block_attention_reference, qkv, blocks, block_size, causal)
        for a, b in zip(fast, reference, strict=True):
            close(a, b, 1e-11)


@pytest.mark.parametrize("method", ["flat", "tile"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_match_finite_differences(method, causal):
    qkv = [x.requires_grad_() for x in random_qkv((1, 2, 7, 2))]
    blocks = select_blocks(*qkv[:2], 2, 2, method, causal=causal)
    assert torch.autograd.gradcheck(lambda q, k, v: ROUTES[method](q, k, v, blocks, 2, causal), qkv)


@pytest.mark.parametrize("method", ["flat", "tile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_close_to_fp64(method, dtype):
    qkv = random_qkv((2, 2, 150, 16), dtype=dtype)
    blocks = select_blocks(*qkv[:2], 16, 2, method)
    fast = with_gradients(ROUTES[method], qkv, blocks, 16, True)
    exact = with_gradients(block_attention_reference, [x.double() for x in qkv], blocks, 16, True)
    tolerance = {torch.bfloat16: 0.06, torch.float16: 0.01, torch.float32: 1e-4}[dtype]
    for a, b in zip(fast, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() < tolerance


@pytest.mark.parametrize("attend", [query_attention, tile_attention])
def test_large_scores_do_not_overflow(attend):
    q, k, v = (300 * x for x in random_qkv((1, 1, 40, 8), dtype=torch.float32))
    blocks = select_blocks(q, k, 8, 2, "flat" if attend is query_attention else "tile")
    out = attend(q, k, v / 300, blocks, 8)
    assert (out - block_attention_reference(q, k, v / 300, blocks, 8)).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["flat", "tile"])
def test_block_attention_uses_these_functions_for_long_sequences(method, monkeypatch):
    calls = []

    def record_calls(name):
        function = getattr(attention_kernel, name)

        def recorded(*args):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr("nanods.attention." + name, recorded)

    record_calls("query_attention")
    record_calls("tile_attention")
    q, k, v = random_qkv((1, 1, 256, 8))
    block_attention(q, k, v, select_blocks(q, k, 64, 2, method), 64)
    assert calls == [ROUTES[method].__name__]


# ---- FlexAttention -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [5, 32, 45])
@pytest.mark.parametrize("method", ROUTES)
def test_flex_equals_the_reference(method, T, causal):
    q, k, v = random_qkv((2, 3, T, 4))
    blocks = select_blocks(q, k, 8, 2, method, causal=causal)
    close(
        flex_block_attention(q, k, v, blocks, 8, causal),
        block_attention_reference(q, k, v, blocks, 8, causal),
    )


def test_the_block_mask_lists_the_selected_blocks_and_no_others(monkeypatch):
    """FlexAttention skips whole blocks, so its lists decide its speed.

    Only the current block needs a mask (a partial block); the selected ones are full.
    """
    masks = []

    def record_mask(q, k, v, block_mask):
        masks.append(block_mask)
        return q

    monkeypatch.setattr(attention_kernel, "flex_attention", record_mask)
    q, k, v = random_qkv((1, 1, 40, 4))
    blocks = select_blocks(q, k, 8, 2, "tile")
    flex_block_attention(q, k, v, blocks, 8)
    (mask,) = masks
    for tile in range(5):
        partial = mask.kv_indices[0, 0, tile, : mask.kv_num_blocks[0, 0, tile]].tolist()
        full = mask.full_kv_indices[0, 0, tile, : mask.full_kv_num_blocks[0, 0, tile]].tolist()
        assert partial == [tile]
        assert sorted(full) == sorted(n for n in blocks[0, 0, tile].tolist() if n >= 0)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("method", ["flat", "tile"])
def test_flex_on_a_gpu_equals_the_reference_forward_and_backward(method, dtype, tolerance):
    """The tolerance is relative to the largest number of the output and of each gradient."""
    qkv = [x.to(dtype).cuda() for x in random_qkv((2, 2, 900, 64), dtype=torch.float32)]
    blocks = select_blocks(*qkv[:2], FLEX_BLOCK, 2, method)
    fast = with_gradients(flex_block_attention, qkv, blocks, FLEX_BLOCK, True)
    exact = [x.double() for x in qkv]
    exact = with_gradients(block_attention_reference, exact, blocks, FLEX_BLOCK, True)
    for a, b in zip(fast, exact, strict=True):
        assert (a.double() - b).abs().max() < tolerance * b.abs().max()
