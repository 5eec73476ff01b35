"""The key-value cache: decoding a token costs one step instead of a pass over the whole context.

Tested by tests/test_gpt.py: decoding with the cache equals the full forward pass at every length,
also with rows of different lengths and with one selection per tile. Rows that come and go
(`first_rows`, `copy_row`) are for nanods/serving/engine.py. Left out on purpose: paging, shared
prefixes, quantised keys.

Shapes: B rows, H heads, T new tokens, D width of a head, N blocks, K = `top_blocks`.
"""

from copy import copy

import torch
from torch import Tensor

from nanods.attention import AttentionConfig
from nanods.attention_selection import pool_keys, summarise


class Cache:
    """Store the keys and values of past tokens: per layer two tensors (B, H, context_length, D).

    Rows may differ in length: `lengths` (B,) counts the real tokens of each row. Entries beyond a
    row's length are never read, because a query at position p sees only the keys 0..p, and new
    tokens overwrite them. For block attention the cache also stores a summary of each block, so
    that a step reads only the summaries and the selected blocks, and for the method "tile" the
    selection of each tile. For the convolutions it stores their newest inputs, `recent`: per layer
    one tensor (B, width - 1, C), which the convolution updates (nanods/conv.py).
    """

    def __init__(
        self,
        attention: AttentionConfig,
        n_layer: int,
        shape: tuple[int, int, int, int],
        recent: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate keys and values of `shape` (B, H, context_length, D) for each layer, and the
        inputs of its convolution, `recent` (width - 1, C)."""
        B, H, T, D = shape
        self.attention = attention
        self.size = attention.block_size if attention.kind == "block" else 1
        N = -(-T // self.size)  # full blocks, so that splitting the keys into blocks copies nothing

        def per_layer(*shape: int, fill: float = 0, dtype: torch.dtype = dtype) -> list[Tensor]:
            """Return one tensor (B, *shape) per layer, filled with `fill`."""
            return [
                torch.full((B, *shape), fill, device=device, dtype=dtype) for _ in range(n_layer)
            ]

        self.keys = per_layer(H, N * self.size, D)
        self.values = per_layer(H, N * self.size, D)
        self.recent = per_layer(*recent)
        self.summaries, self.tile_selections = [], []
        if self.attention.kind == "block":
            top_blocks = self.attention.top_blocks
            self.summaries = per_layer(H, N, D if self.attention.pool == "mean" else 2 * D)
            self.tile_selections = per_layer(H, N, top_blocks, fill=-1, dtype=torch.long)
        self.lengths = torch.zeros(B, dtype=torch.long, device=device)
        # max(lengths) as a Python number, so that slicing does not wait for the GPU.
        self.max_length = 0

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) at `positions` (B, T) and return all keys and values so far.

        The result holds full blocks, so it is at least max_length + T long: (B, H, N*size, D).
        """
        row = torch.arange(k.size(0), device=k.device)[:, None]
        self.keys[layer][row, :, positions] = k.transpose(1, 2).to(self.keys[layer].dtype)
        self.values[layer][row, :, positions] = v.transpose(1, 2).to(self.values[layer].dtype)
        N = -(-(self.max_length + k.size(2)) // self.size)
        keys = self.keys[layer][:, :, : N * self.size]
        values = self.values[layer][:, :, : N * self.size]
        if self.attention.kind == "block":
            if k.size(2) == 1:  # one block per row has changed
                current = positions // self.size  # (B, 1)
                blocks = keys.unflatten(2, (N, self.size))[row, :, current]  # (B, 1, H, size, D)
                self.summaries[layer][row, :, current] = pool_keys(blocks, self.attention.pool)
            else:
                self.summaries[layer][:, :, :N] = summarise(keys, self.size, self.attention.pool)
        return keys, values

    def tile_selection(self, layer: int, blocks: Tensor, positions: Tensor) -> Tensor:
        """Return the selection of each query's tile: (B, H, T, K).

        blocks (B, H, T, K): what each query would select; positions (B, T). A tile uses the
        selection of its first query. Where that query is one of these, its selection is stored; for
        the other tiles it was stored when they began.
        """
        row, at = (positions % self.size == 0).nonzero(as_tuple=True)  # first queries of tiles
        self.tile_selections[layer][row, :, positions[row, at] // self.size] = blocks[row, :, at]
        rows = torch.arange(blocks.size(0), device=blocks.device)[:, None]
        selections = self.tile_selections[layer][rows, :, positions // self.size]  # (B, T, H, K)
        return selections.transpose(1, 2)  # (B, H, T, K)

    # ---- rows that come and go -------------------------------------------------------------------

    def first_rows(self, lengths: list[int]) -> "Cache":
        """Return the first rows, which hold `lengths` tokens, as a cache with the same memory.

        A forward pass with the result computes these rows alone. The caller counts the tokens of
        each row: a forward pass changes the `lengths` of the result, not of this cache.
        """
        rows = copy(self)
        for name in ("keys", "values", "recent", "summaries", "tile_selections"):
            setattr(rows, name, [tensor[: len(lengths)] for tensor in getattr(self, name)])
        rows.lengths = torch.tensor(lengths, device=self.lengths.device)
        rows.max_length = max(lengths)
        return rows

    def copy_row(self, row: int, source: "Cache", source_row: int, length: int) -> None:
        """Overwrite a row by a row of `length` tokens, of another cache or of this one.

        What the row holds beyond `length` stays, and is never read.
        """
        for ours, theirs in zip(self.recent, source.recent, strict=True):
            ours[row] = theirs[source_row]
        blocks = -(-length // self.size)
        sizes = {"keys": length, "values": length, "summaries": blocks, "tile_selections": blocks}
        for name, n in sizes.items():
            for ours, theirs in zip(getattr(self, name), getattr(source, name), strict=True):
                ours[row, :, :n] = theirs[source_row, :, :n]
