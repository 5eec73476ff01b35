"""A short causal convolution: each token also reads the few tokens before it.

An MLP reads one token. Earlier tokens reach it only through attention, which must first learn to
find the previous one. A depthwise convolution hands the last few over directly:

    y_t = x_t + gain_1 * x_(t-1) + gain_2 * x_(t-2) + ...

with one gain per channel and distance: (`width` - 1) C parameters, and as many products a token,
next to the 8 C^2 weights of an MLP. It resembles the token shift of RWKV's channel mixing (Peng
et al. 2023, arXiv:2305.13048). It is a Canon layer before the MLP (Allen-Zhu 2025,
arXiv:2512.17351); here the token itself keeps weight 1. What it gains is in LOG.md and
lessons/SPEEDRUN.md.

Pinned by tests/test_conv.py, and by tests/test_gpt.py for cached decoding. Left out on purpose: a
convolution before attention, which gained less, and one of keys and values, which gained 0.004,
less than the noise of one seed (LOG.md).

Shapes: B batch, T tokens, C channels, K = `width` - 1 earlier tokens.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn


class CausalConv(nn.Module):
    """Add to each vector the `width` - 1 before it, each channel times a gain that starts at 0."""

    optimizers: ClassVar = {"gain": "adamw"}

    def __init__(self, C: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width - 1, C))  # of the nearest token first

    def forward(
        self,
        x: Tensor,
        recent: Tensor | None = None,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Convolve x (B, T, C) -> (B, T, C).

        With a cache, `recent` (B, K, C) holds the inputs before x, newest last, and is overwritten
        by the newest ones; `positions` (B, T) are those of x. `valid` (B, T) marks the tokens that
        are not padding, which stands at the end of a row.
        """
        (B, T, C), K = x.shape, len(self.gain)
        before = x.new_zeros(B, K, C)
        if recent is not None:
            # The row may still hold inputs of an earlier text: before position 0 there are zeros.
            exists = positions[:, :1] + torch.arange(-K, 0, device=x.device) >= 0  # (B, K)
            before = torch.where(exists[..., None], recent.to(x.dtype), 0)
        x_all = torch.cat([before, x], dim=1)  # (B, K + T, C)
        if recent is not None:
            lengths = torch.full((B,), T, device=x.device) if valid is None else valid.sum(dim=1)
            newest = lengths[:, None] + torch.arange(K, device=x.device)  # (B, K)
            recent.copy_(x_all.gather(1, newest[..., None].expand(-1, -1, C)))
        y = x
        for distance, gain in enumerate(self.gain, 1):
            y = torch.addcmul(y, gain, x_all[:, K - distance : K - distance + T])
        return y

    # ---- cost ------------------------------------------------------------------------------------

    def activation_bytes(self) -> list[float]:
        """Return the bytes per token kept for backward, tensor by tensor: the input, and the input
        joined to what stands before it. The MLP's own count includes the output."""
        C = self.gain.size(1)
        return [4 * C, 4 * C]
