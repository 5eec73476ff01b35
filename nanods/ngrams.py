"""N-gram embeddings: what the last few tokens are together, looked up before the first layer.

The embedding of a token says nothing of its neighbours; the first layers spend their attention on
finding them. A table with a row for each pair of tokens, another for each triple, and so on, gives
that away for a few lookups: no matrix product, so almost no FLOPs. There are too many n-grams for
a row each, so they share `rows` rows by a hash, as in fastText (Bojanowski et al. 2017,
arXiv:1607.04606). The rows of the table are added to the token's embedding.

What it gains is in LOG.md, and for tinyshakespeare in lessons/SPEEDRUN.md. It is off by default.

Pinned by tests/test_ngrams.py: later tokens and other rows never change an embedding, and one token
at a time with the cache gives the same as the whole sequence.

Shapes: B batch, T tokens, C width, V vocabulary, n the length of an n-gram.
"""

import torch
from torch import Tensor, nn

PRIME = 2**31 - 1  # the products below stay within 63 bits
FACTOR = 1_000_003


def last_tokens(tokens: Tensor, positions: Tensor, n: int) -> Tensor:
    """Return the token at each position and the n - 1 before it, newest first: tokens (B, S),
    positions (B or 1, T) -> (B, T, n). -1 stands before the beginning."""
    back = torch.arange(n, device=tokens.device)
    index = (positions[..., None] - back).expand(tokens.size(0), -1, -1)  # (B, T, n)
    found = tokens.gather(1, index.clamp(min=0).flatten(1)).view_as(index)
    return found.masked_fill(index < 0, -1)


def hash_ngram(ngram: Tensor, rows: int) -> Tensor:
    """Return a row for each n-gram: (..., n) -> (...), from 0 to rows - 1. Equal n-grams have
    equal rows; others share one with probability of about 1 / rows."""
    hashed = torch.zeros_like(ngram[..., 0])
    for token in ngram.unbind(-1):
        hashed = (hashed * FACTOR + token + 1) % PRIME
    return hashed % rows


class NgramEmbedding(nn.Module):
    """The sum of the embeddings of the pair, the triple, ... up to the `longest` n-gram that ends
    at each token."""

    def __init__(self, longest: int, rows: int, C: int) -> None:
        super().__init__()
        self.longest = longest
        self.tables = nn.ModuleList(nn.Embedding(rows, C) for _ in range(2, longest + 1))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed the n-grams that end at `positions` (B or 1, T) of tokens (B, S) -> (B, T, C)."""
        last = last_tokens(tokens, positions, self.longest)
        x = 0
        for n, table in enumerate(self.tables, 2):
            x = x + table(hash_ngram(last[..., :n], table.num_embeddings))
        return x

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one token: a row of each table."""
        total = sum(table.weight.numel() for table in self.tables)
        return total, sum(table.embedding_dim for table in self.tables)
