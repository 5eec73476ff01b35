"""The fast routes equal experts_loop, forward and backward, in every dtype that they run in."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanods import moe_kernel
from nanods.moe import MoE, MoEConfig, experts_loop
from nanods.moe_kernel import experts_grouped, experts_sorted


def random_case(N, C, E, K, F, dropped=0.0, seed=0, dtype=torch.float64):
    """Return x, weights, experts, up and out. A fraction `dropped` of the assignments is dropped.

    The K experts of a token differ.
    """
    generator = torch.Generator().manual_seed(seed)
    x, weights, up, out = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, C), (N, K), (E, F, C), (E, C, F))
    )
    experts = torch.rand(N, E, generator=generator).argsort(dim=-1)[:, :K]
    is_dropped = torch.rand(N, K, generator=generator) < dropped
    return x, weights, experts.masked_fill(is_dropped, E), up, out


def output_and_gradients(run, case):
    """Return the output of `run` and the gradients of x, weights, up and out."""
    y = run(*case)
    gradient = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    inputs = [tensor for tensor in case if tensor.requires_grad]
    return [y, *torch.autograd.grad((y * gradient).sum(), inputs)]


def assert_equals_loop(run, case, tolerance=1e-12):
    results = output_and_gradients(run, case)
    references = output_and_gradients(experts_loop, case)
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape and result.dtype == reference.dtype
        difference = (result - reference).abs().max()
        assert difference <= tolerance * max(1, reference.abs().max())


# ---- equal to the loop ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 6), st.integers(1, 9)),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 3, 512]),
    st.integers(0, 99),
)
def test_sorted_equals_the_loop(shape, top_k, dropped, chunk_size, seed):
    N, C, E, F = shape
    case = random_case(N, C, E, min(top_k, E), F, dropped, seed)
    with patch.object(moe_kernel, "CHUNK_SIZE", chunk_size):
        assert_equals_loop(experts_sorted, case)


@pytest.mark.parametrize(
    "experts", [[[2]] * 20, [[0, 3]] * 20, [[4, 4]] * 20, [[4, 1], [1, 4]] * 10]
)
def test_sorted_equals_the_loop_if_experts_have_all_or_no_tokens(experts, monkeypatch):
    x, weights, _, up, out = random_case(20, 5, 4, len(experts[0]), 3)
    for chunk_size in (512, 20, 7, 19):  # with 19 one row remains for the second chunk
        monkeypatch.setattr(moe_kernel, "CHUNK_SIZE", chunk_size)
        assert_equals_loop(experts_sorted, (x, weights, torch.tensor(experts), up, out))


def test_sorted_is_bitwise_the_loop_in_fp32():
    shapes = ((1, 8, 4, 2, 16), (60, 16, 4, 2, 64), (333, 24, 7, 3, 50), (400, 16, 1, 1, 32))
    for N, C, E, K, F in shapes:
        for dropped in (0, 0.3):
            case = random_case(N, C, E, K, F, dropped, dtype=torch.float32)
            assert torch.equal(experts_sorted(*case), experts_loop(*case))
            assert_equals_loop(experts_sorted, case, 1e-5)


@pytest.mark.parametrize("dropped", [0, 0.4, 1.0])
@pytest.mark.parametrize(("N", "E", "K"), [(1, 4, 2), (50, 4, 2), (9, 12, 1), (30, 3, 3)])
def test_grouped_equals_the_loop(N, E, K, dropped):
    # With 9 tokens and 12 experts some experts have no token.
    case = random_case(N, 16, E, K, 32, dropped, dtype=torch.float32)
    assert_equals_loop(experts_grouped, case, 1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_hand_written_gradients_are_right(top_k, monkeypatch):
    monkeypatch.setattr(moe_kernel, "CHUNK_SIZE", 2)
    x, weights, experts, up, out = random_case(7, 3, 4, top_k, 5, dropped=0.2)

    def run(x, weights, up, out):
        return experts_sorted(x, weights, experts, up, out)

    assert torch.autograd.gradcheck(run, (x, weights, up, out))
    (gradient,) = torch.autograd.grad(run(x, weights, up, out).sum(), x, create_graph=True)
    assert not gradient.requires_grad, "a second derivative must be refused, not wrong"


# ---- under autocast ------------------------------------------------------------------------------


class RecordProducts(TorchDispatchMode):
    """Record the dtype of each matrix product."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", [experts_sorted, experts_grouped])
def test_experts_multiply_in_bf16_under_autocast(run):
    case = random_case(100, 16, 4, 2, 32, dropped=0.1, dtype=torch.float32)
    exact = output_and_gradients(experts_loop, case)
    with torch.autocast("cpu", torch.bfloat16), RecordProducts() as products:
        rounded = output_and_gradients(run, case)
    # A grouped product is one call of its own, not an mm.
    assert set(products.dtypes) == {torch.bfloat16} or run is experts_grouped
    for result, reference in zip(rounded, exact, strict=True):
        assert result.dtype == torch.float32
        assert 1e-4 < (result - reference).norm() / reference.norm() < 0.02


def test_the_router_stays_in_fp32_under_autocast():
    torch.manual_seed(0)
    layer, x = MoE(16, 32, MoEConfig(8, 2)), torch.randn(4, 100, 16)
    exact, exact_stats = layer(x, inspect=True)
    with torch.autocast("cpu", torch.bfloat16), RecordProducts() as products:
        rounded, stats = layer(x, inspect=True)
    assert products.dtypes[0] == torch.float32 and set(products.dtypes[1:]) == {torch.bfloat16}
    for name in ("experts", "importance", "balance_loss", "z_loss"):
        assert torch.equal(exact_stats[name], stats[name])
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < 0.02
