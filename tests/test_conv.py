"""The causal convolution: it equals a padded depthwise conv1d, starts as the identity, and gives
the same in pieces as at once, whatever the cache held before."""

import pytest
import torch
import torch.nn.functional as F

from nanods.build import build_model
from nanods.command_line import from_command_line
from nanods.conv import CausalConv


def conv_of(width, C=6):
    conv = CausalConv(C, width).double()
    torch.nn.init.normal_(conv.gain)
    return conv


def inputs(B, T, seed, C=6):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed)).double()


def test_it_starts_as_the_identity():
    x = inputs(2, 5, seed=1)
    assert torch.equal(CausalConv(6, 4).double()(x), x)


@pytest.mark.parametrize("preset", ["v0-tiny", "v3-tiny"])
def test_a_new_models_gains_are_zero(preset):
    model = build_model(from_command_line("", [preset, "--conv-width", "4"]))
    gains = [p for name, p in model.named_parameters() if name.endswith("conv.gain")]
    assert len(gains) > 2 and not any(gain.any() for gain in gains)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_it_equals_a_depthwise_conv1d(width, T):
    conv, x = conv_of(width), inputs(3, T, seed=2)
    kernel = torch.cat([conv.gain.flip(0), torch.ones(1, 6)])  # the token itself last
    expected = F.conv1d(F.pad(x.mT, (width - 1, 0)), kernel.T[:, None], groups=6).mT
    assert (conv(x) - expected).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("sizes", [(1, 1, 7), (2, 6, 1), (9,), (4, 5)], ids=str)
def test_pieces_give_what_the_whole_gives_in_rows_that_held_another_text(width, sizes):
    conv, x = conv_of(width), inputs(2, 9, seed=3)
    recent = inputs(2, width - 1, seed=4)  # of the text before, which must not be read
    pieces, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size).expand(2, -1)
        pieces.append(conv(x[:, start : start + size], recent, positions))
        start += size
    assert (torch.cat(pieces, dim=1) - conv(x)).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("length", [300, 299])
def test_long_texts_in_bf16_are_counted_exactly(length):
    conv, x = conv_of(4).bfloat16(), inputs(1, 300, seed=6).bfloat16()
    recent = torch.zeros(1, 3, 6).bfloat16()
    valid = torch.arange(300)[None] < length if length < 300 else None
    conv(x, recent, torch.arange(300)[None], valid)
    assert torch.equal(recent, x[:, length - 3 : length])


@torch.no_grad()
def test_padding_is_not_remembered():
    conv, x = conv_of(4), inputs(2, 8, seed=5)
    recent, lengths = torch.zeros(2, 3, 6).double(), torch.tensor([5, 2])
    conv(x[:, :5], recent, torch.arange(5).expand(2, -1), torch.arange(5) < lengths[:, None])
    following = x[torch.arange(2), lengths][:, None]
    y = conv(following, recent, lengths[:, None])
    assert (y[:, 0] - conv(x)[torch.arange(2), lengths]).abs().max() < 1e-12
