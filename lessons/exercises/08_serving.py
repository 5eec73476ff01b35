"""Exercises of lesson 08: serve and watch, in six steps.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-08                          # or: python lessons/exercises/check_08.py [FILE]

Steps 1 and 2 decide which requests generate in which step, and how much of their prompts is read.
Step 3 draws tokens that do not depend on the other requests. Step 4 forms the batches of an
embedder. Steps 5 and 6 are an alarm: a cumulative sum, and the threshold that it may not exceed.

Shapes: n requests, prompts or inputs, B rows of V logits, S streams of N scores, R scores of the
reference.
Solutions are in 08_solutions.py. What nanods uses is in nanods/serving/engine.py, embedder.py and
drift.py.
"""

import torch
from torch import Tensor


def finish_steps(arrivals: Tensor, lengths: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Return the step in which each request ends, with static and with continuous batching.

    Steps have the numbers 0, 1, 2, ... In a step each request that has a slot generates one token.
    Request i has arrived before step arrivals[i] and needs lengths[i] tokens. It ends in the step
    that generates its last token. Whichever way, requests get their slots in their order.
        static      where no request has a slot, the waiting requests get one, as many as there
                    are slots. A batch need not be full. The next begins in the step after the last
                    request of this batch has ended.
        continuous  a slot is free in the step after its request has ended, and a waiting request
                    gets it at once.
    arrivals: (n,) int64, not descending. lengths: (n,) int64, at least 1. slots: at least 1.
    Returns static and continuous, (n,) int64 each.
    Hint: continuous needs one number for each slot: the step from which on it is free.
    Target: with lengths 3, 1, 1, arrivals 0 and 2 slots, the third ends in step 3, and in step 1.
    """
    raise NotImplementedError


def read_in_step(left: Tensor, chunk: int, overhead: int) -> Tensor:
    """Return how many tokens of each waiting prompt one step reads.

    The step has a budget of `chunk` tokens. Prompts are read in their order, one after another:
    each gets what it still needs, or what is left of the budget if that is less. A pass through the
    model has a fixed cost. So reading a prompt takes at least `overhead` from the budget, even if
    it has fewer tokens (or if fewer are left of the budget). A prompt that needs nothing takes
    nothing. Where the budget is 0 or below, nothing more is read.
    left: (n,) int64, tokens that each prompt still needs, at least 0. chunk, overhead: at least 1.
    Returns (n,) int64.
    Hint: a loop over the prompts, with a budget that falls.
    Target: left 5, 30, 100 with chunk 64 and overhead 16 gives 5, 30, 18: 64 - 16 - 30 = 18.
    """
    raise NotImplementedError


def draw_tokens(logits: Tensor, streams: list[torch.Generator]) -> Tensor:
    """Return one token for each row, each drawn by the random stream of its row.

        u = torch.rand((), generator=stream, dtype=torch.float64)

    Draw one such u from each row's stream, and no more. The token is the first v for which
    u < p_0 + ... + p_v, where p = softmax(logits) in fp64. If rounding leaves no such v, it is the
    last token.
    logits: (B, V). streams: B generators; each ends one draw later than it was.
    Returns (B,) int64.
    Hint: softmax, cumsum; how many of these sums are at most u?
    Target: a row's token is the same if other rows are added, removed or moved.
    """
    raise NotImplementedError


def form_batches(modality: Tensor, tokens: Tensor, max_tokens: int) -> Tensor:
    """Return the number of the batch in which each input is embedded.

    All inputs wait, in the order in which they came. Batches are computed one after another, with
    the numbers 0, 1, 2, ... Each is formed so:
        - It begins with the oldest input that waits.
        - The other inputs of the same modality and the same length bucket are tried, oldest first.
          The buckets are 1, 2, 3-4, 5-8, 9-16, ... tokens.
        - Every input of a batch is padded to the longest of the batch. An input is added if the
          batch then has at most max_tokens tokens, padding included. The first that does not fit
          closes the batch.
        - The first input of a batch is always in it, even if it has more than max_tokens.
    modality: (n,) int64, such as 0 for text and 1 for images. tokens: (n,) int64, at least 1.
    Returns (n,) int64.
    Hint: (tokens - 1).bit_length() of a Python int is the bucket.
    Target: texts of 2, 3, 4 and 3 tokens with max_tokens 8 are in the batches 0, 1, 1, 2.
    """
    raise NotImplementedError


def cumulative_sums(z: Tensor, allowance: float) -> Tensor:
    """Return the CUSUM after each score: sum = max(0, sum + z - allowance), beginning with 0.

    z: (S, N), S streams of N standardised scores. The sum runs along a stream.
    Returns (S, N).
    Hint: a loop over N. Without one: the cumsum of z - allowance, minus its lowest value so far,
    or minus 0 if that is above 0.
    Target: z = 1, 2, -9, 1 with allowance 0.5 gives 0.5, 2, 0, 0.5.
    """
    raise NotImplementedError


def bootstrap_threshold(z: Tensor, starts: Tensor, block: int, allowance: float) -> Tensor:
    """Return the highest sum in traffic that is made of blocks of the reference.

    Block k of stream s has the scores z[starts[s, k]] to z[starts[s, k] + block - 1]; z continues
    with its beginning after its end. The blocks of a stream are joined, K of them, in order. Take
    the sums of step 5 of each stream, and also those of minus its scores, since scores that fall
    are a change, too. The threshold is the highest of all these sums.
    z: (R,). starts: (S, K) int64, from 0 to R - 1. block: 1 to R.
    Returns a scalar ().
    Hint: positions (S, K, block), then flatten the last two dimensions. You may call step 5.
    Target: z = 3, -3, with block 2, starts 1, 0 and allowance 0: the stream is -3, 3, 3, -3, and
    the threshold 6.
    """
    raise NotImplementedError
