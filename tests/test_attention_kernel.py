"""The fast routes equal the masked reference, forward and backward, whatever the choice and the length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods import attention_kernel
from nanods.attention import block_attention, block_attention_reference, select_blocks
from nanods.attention_kernel import flex_block_attention, query_attention, tile_attention
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
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = attend(q, k, v, blocks, block_size, causal)
    weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]


@pytest.mark.parametrize("chunk", [1, 1 << 18])  # tile by tile, and all at once
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
    for one, other in zip(
        fast,
        with_gradients(block_attention_reference, qkv, blocks, block_size, causal),
        strict=True,
    ):
        close(one, other, 1e-11)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 8), st.booleans(), st.randoms(use_true_random=False))
def test_any_choice_will_do(shape, block_size, causal, random):
    """Rows of distinct blocks in any order, -1s among them, the own and future ones too: not read twice, or not at all."""
    B, H, T, _ = shape
    N, qkv = -(-T // block_size), random_qkv(shape)
    for rows, attend in ((T, query_attention), (N, tile_attention)):
        listed = [random.sample([*range(N), *[-1] * 3], 3) for _ in range(B * H * rows)]
        blocks = torch.tensor(listed).view(B, H, rows, 3)
        results = (
            with_gradients(f, qkv, blocks, block_size, causal)
            for f in (attend, block_attention_reference)
        )
        for one, other in zip(*results, strict=True):
            close(one, other, 1e-11)


@pytest.mark.parametrize("method", ["flat", "tile"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_right(method, causal):
    qkv = [x.requires_grad_() for x in random_qkv((1, 2, 7, 2))]
    blocks = select_blocks(*qkv[:2], 2, 2, method, causal=causal)
    assert torch.autograd.gradcheck(lambda q, k, v: ROUTES[method](q, k, v, blocks, 2, causal), qkv)


@pytest.mark.parametrize("method", ["flat", "tile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_near(method, dtype):
    qkv = random_qkv((2, 2, 150, 16), dtype=dtype)
    blocks = select_blocks(*qkv[:2], 16, 2, method)
    fast = with_gradients(ROUTES[method], qkv, blocks, 16, True)
    exact = with_gradients(block_attention_reference, [x.double() for x in qkv], blocks, 16, True)
    for one, other in zip(fast, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < {
            torch.bfloat16: 0.06,
            torch.float16: 0.01,
            torch.float32: 1e-4,
        }[dtype]


@pytest.mark.parametrize("attend", [query_attention, tile_attention])
def test_scores_far_apart_do_not_overflow(attend):
    q, k, v = (300 * x for x in random_qkv((1, 1, 40, 8), dtype=torch.float32))
    blocks = select_blocks(q, k, 8, 2, "flat" if attend is query_attention else "tile")
    out = attend(q, k, v / 300, blocks, 8)
    assert (out - block_attention_reference(q, k, v / 300, blocks, 8)).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["flat", "tile"])
def test_the_model_takes_these_routes_when_they_pay(method, monkeypatch):
    taken = []
    for name in ("query_attention", "tile_attention"):
        real = getattr(attention_kernel, name)
        monkeypatch.setattr(
            "nanods.attention." + name,
            lambda *a, real=real, name=name: (taken.append(name), real(*a))[1],
        )
    q, k, v = random_qkv((1, 1, 256, 8))
    block_attention(q, k, v, select_blocks(q, k, 64, 2, method), 64)
    assert taken == [ROUTES[method].__name__]


# ---- FlexAttention -----------------------------------------------------------------------------------------------------------


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


def test_the_block_mask_holds_no_more_than_the_choice(monkeypatch):
    """FlexAttention skips by blocks: those of the mask must be the chosen ones and the own, the chosen ones without a mask."""
    seen = []
    monkeypatch.setattr(
        attention_kernel, "flex_attention", lambda q, k, v, block_mask: seen.append(block_mask) or q
    )
    q, k, v = random_qkv((1, 1, 40, 4))
    blocks = select_blocks(q, k, 8, 2, "tile")
    flex_block_attention(q, k, v, blocks, 8)
    (mask,) = seen
    for tile in range(5):
        partial = mask.kv_indices[0, 0, tile, : mask.kv_num_blocks[0, 0, tile]].tolist()
        whole = mask.full_kv_indices[0, 0, tile, : mask.full_kv_num_blocks[0, 0, tile]].tolist()
        assert partial == [tile]
        assert sorted(whole) == sorted(n for n in blocks[0, 0, tile].tolist() if n >= 0)


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["flat", "tile"])
def test_flex_on_a_gpu_equals_the_reference_forward_and_backward(method):
    qkv = [x.cuda() for x in random_qkv((2, 2, 300, 64), dtype=torch.float32)]
    blocks = select_blocks(*qkv[:2], 64, 2, method)
    fast = with_gradients(flex_block_attention, qkv, blocks, 64, True)
    exact = with_gradients(block_attention_reference, [x.double() for x in qkv], blocks, 64, True)
    for one, other in zip(fast, exact, strict=True):
        assert (one.double() - other).abs().max() < 1e-2
