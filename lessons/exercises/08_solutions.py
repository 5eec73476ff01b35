"""Solutions to 08_serving.py, as short as correct code can be.

What nanods uses is in nanods/serving/engine.py, embedder.py and drift.py.
"""

import torch
from torch import Tensor


def finish_steps(arrivals: Tensor, lengths: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    requests = list(zip(arrivals.tolist(), lengths.tolist(), strict=True))
    static, step = [], 0
    while len(static) < len(requests):
        rest = requests[len(static) :]
        step = max(step, rest[0][0])
        batch = [length for arrival, length in rest[:slots] if arrival <= step]
        static += [step + length - 1 for length in batch]
        step += max(batch)
    continuous, free = [], [0] * slots  # the step from which on each slot is free
    for arrival, length in requests:
        slot = free.index(min(free))
        free[slot] = max(free[slot], arrival) + length
        continuous.append(free[slot] - 1)
    return torch.tensor(static), torch.tensor(continuous)


def read_in_step(left: Tensor, chunk: int, overhead: int) -> Tensor:
    read = []
    for needed in left.tolist():
        read.append(max(0, min(needed, chunk)))
        chunk -= max(read[-1], overhead) if read[-1] else 0
    return torch.tensor(read)


def draw_tokens(logits: Tensor, streams: list[torch.Generator]) -> Tensor:
    sums = logits.double().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    u = torch.stack([torch.rand((1,), generator=s, dtype=torch.float64) for s in streams])  # (B, 1)
    return (sums <= u).sum(dim=-1).clamp(max=logits.size(-1) - 1)


def form_batches(modality: Tensor, tokens: Tensor, max_tokens: int) -> Tensor:
    inputs = list(zip(modality.tolist(), tokens.tolist(), strict=True))
    queues = [(name, (length - 1).bit_length()) for name, length in inputs]
    number, batches = 0, [-1] * len(inputs)
    while -1 in batches:
        first = batches.index(-1)
        count = longest = 0
        for i in range(first, len(inputs)):
            if batches[i] < 0 and queues[i] == queues[first]:
                longest = max(longest, inputs[i][1])
                if count and (count + 1) * longest > max_tokens:
                    break
                count, batches[i] = count + 1, number
        number += 1
    return torch.tensor(batches)


def cumulative_sums(z: Tensor, allowance: float) -> Tensor:
    free = (z - allowance).cumsum(dim=-1)
    return free - free.cummin(dim=-1).values.clamp(max=0)


def bootstrap_threshold(z: Tensor, starts: Tensor, block: int, allowance: float) -> Tensor:
    positions = (starts[..., None] + torch.arange(block)) % len(z)  # (S, K, block)
    streams = z[positions].flatten(1)
    return cumulative_sums(torch.cat([streams, -streams]), allowance).max()
