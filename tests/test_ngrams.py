"""N-gram embeddings: equal n-grams have equal rows, whatever stands around them.

That cached decoding agrees, and that later tokens change nothing, test_gpt.py tests of the whole
model."""

import pytest
import torch

from nanods.ngrams import NgramEmbedding, hash_ngram, last_tokens

TOKENS = torch.tensor([[5, 6, 7, 5, 6], [1, 5, 6, 7, 2]])


def test_the_last_tokens_are_newest_first_and_nothing_stands_before_the_beginning():
    last = last_tokens(TOKENS, torch.arange(5)[None], 3)
    assert last[0].tolist() == [[5, -1, -1], [6, 5, -1], [7, 6, 5], [5, 7, 6], [6, 5, 7]]
    rows_differ = last_tokens(TOKENS, torch.tensor([[4], [0]]), 2)
    assert rows_differ.tolist() == [[[6, 5]], [[1, -1]]]


def test_an_embedding_depends_on_its_n_gram_alone():
    torch.manual_seed(0)
    embedding = NgramEmbedding(3, 10_000, 8)
    x = embedding(TOKENS, torch.arange(5)[None])
    torch.testing.assert_close(x[0, 2], x[1, 3])  # 5 6 7
    assert not torch.allclose(x[0, 1], x[1, 2])  # 5 6 at the beginning, and after 1
    pair, triple = embedding.tables
    expected = pair.weight[hash_ngram(torch.tensor([7, 6]), 10_000)]
    expected = expected + triple.weight[hash_ngram(torch.tensor([7, 6, 5]), 10_000)]
    torch.testing.assert_close(x[0, 2], expected)


def test_rows_are_shared_evenly():
    pairs = torch.cartesian_prod(torch.arange(-1, 256), torch.arange(-1, 256))
    rows = hash_ngram(pairs, 1024)
    assert rows.min() == 0 and rows.max() == 1023
    load = torch.bincount(rows)  # 64.5 pairs a row
    assert load.min() > 25 and load.max() < 130


@pytest.mark.parametrize("V", [256, 50_304, 2**24])
def test_no_vocabulary_overflows(V):
    ngram = torch.full((1, 6), V - 1)
    expected = 0
    for _ in range(6):
        expected = (expected * 1_000_003 + V) % (2**31 - 1)
    assert hash_ngram(ngram, 2**24).item() == expected % 2**24


def test_parameters_are_counted():
    embedding = NgramEmbedding(4, 100, 8)
    assert embedding.count_parameters() == (sum(p.numel() for p in embedding.parameters()), 3 * 8)
