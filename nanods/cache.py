"""What decoding keeps of the tokens read so far, so that each new one costs a step and not the whole context again.

Pinned by tests/test_gpt.py: decoding with it equals the full forward pass at every length, ragged rows and shared tiles
included. Left out on purpose: paging, sharing of prefixes, quantised keys.

Shapes: B rows, H heads, T new tokens, D width of a head, N blocks, K = `top_blocks`.
"""

import torch
from torch import Tensor

from nanods.attention import AttentionConfig, pool_keys, summarise


class Cache:
    """The keys and values of the tokens read so far, for decoding: per layer two tensors (B, H, context_length, D).

    Rows may differ in length: `lengths` (B,) says how many tokens of each row are real. What lies beyond is never seen,
    because a query at position p reads the keys 0..p, and is overwritten when the row gets there. Block attention keeps beside
    them a summary of each block, so that a step touches the summaries and the chosen blocks and nothing else; and if tiles
    share a choice, the choice of each tile.
    """

    def __init__(
        self,
        attention: AttentionConfig,
        n_layer: int,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """For keys and values of `shape` (B, H, context_length, D) in each layer."""
        B, H, T, D = shape
        self.attention = attention
        self.size = attention.block_size if attention.kind == "block" else 1
        N = -(-T // self.size)  # whole blocks, so that cutting the keys into blocks copies nothing

        def per_layer(*shape: int, fill: float = 0, dtype: torch.dtype = dtype) -> list[Tensor]:
            return [
                torch.full((B, H, *shape), fill, device=device, dtype=dtype) for _ in range(n_layer)
            ]

        self.keys, self.values = per_layer(N * self.size, D), per_layer(N * self.size, D)
        if self.attention.kind == "block":
            self.summaries = per_layer(N, D if self.attention.pool == "mean" else 2 * D)
            self.tile_selections = per_layer(N, self.attention.top_blocks, fill=-1, dtype=torch.long)
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)
        self.max_length = 0  # max(lengths) as a number, so that slicing does not wait for the GPU

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) at `positions` (B, T); return all so far, in whole blocks (B, H, >= max_length + T, D)."""
        row = torch.arange(k.size(0), device=k.device)[:, None]
        self.keys[layer][row, :, positions] = k.transpose(1, 2).to(self.keys[layer].dtype)
        self.values[layer][row, :, positions] = v.transpose(1, 2).to(self.values[layer].dtype)
        N = -(-(self.max_length + k.size(2)) // self.size)
        keys, values = (
            self.keys[layer][:, :, : N * self.size],
            self.values[layer][:, :, : N * self.size],
        )
        if self.attention.kind == "block":
            if k.size(2) == 1:  # one block of each row has changed
                own = positions // self.size  # (B, 1)
                blocks = keys.unflatten(2, (N, self.size))[row, :, own]  # (B, 1, H, size, D)
                self.summaries[layer][row, :, own] = pool_keys(blocks, self.attention.pool)
            else:
                self.summaries[layer][:, :, :N] = summarise(keys, self.size, self.attention.pool)
        return keys, values

    def tile_selection(self, layer: int, blocks: Tensor, positions: Tensor) -> Tensor:
        """The choice of each query's tile, which is that of the tile's first query: blocks (B, H, T, K) as each would choose.

        Tiles that begin at one of the `positions` (B, T) are remembered, the others were when they began.
        """
        row, at = (positions % self.size == 0).nonzero(as_tuple=True)
        self.tile_selections[layer][row, :, positions[row, at] // self.size] = blocks[row, :, at]
        every = torch.arange(blocks.size(0), device=blocks.device)[:, None]
        return self.tile_selections[layer][every, :, positions // self.size].transpose(
            1, 2
        )  # (B, T, H, K) -> (B, H, T, K)
