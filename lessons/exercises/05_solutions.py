"""Solutions to 05_planning.py, as short as correct code can be.

What nanods uses is in nanods/planner/.
"""

import torch
from torch import Tensor


def state_memory(outside: int, experts: int, adamw: int, n: int, ep: int, is_fsdp: bool) -> Tensor:
    shards = n if is_fsdp else 1
    outside, experts, adamw = outside / shards, experts / max(shards, ep), adamw / shards
    parameters = outside + experts
    sizes = [4 * parameters, 4 * parameters, 4 * parameters + 4 * adamw]
    return torch.tensor(sizes, dtype=torch.float64)


def activation_memory(
    saved: Tensor, backward: Tensor, width: int, ends: float, tokens: int, checkpointing: bool
) -> Tensor:
    if checkpointing:
        # While a block's backward pass runs, its tensors exist again beside all inputs.
        per_token = 4 * width * len(saved) + (saved + backward).max()
    else:
        per_token = saved.sum() + backward.max()
    return tokens * (ends + per_token)


def sent_bytes(
    outside: int, experts: int, n: int, ep: int, micro_batches: int, is_fsdp: bool
) -> Tensor:
    replicas = n // ep
    parameters = (n - 1) / n * outside + (replicas - 1) / replicas * experts / ep
    if is_fsdp:
        gathered, scattered = 2 * 2 * parameters, 4 * parameters  # per micro-batch
        sizes = [0, micro_batches * gathered, micro_batches * scattered]
    else:
        sizes = [2 * 4 * parameters, 0, 0]
    return torch.tensor(sizes, dtype=torch.float64)


def step_seconds(
    tokens: int,
    flops_per_token: float,
    peak: float,
    utilization: float,
    checkpointing: bool,
    sent: Tensor,
    speed: Tensor,
    waits: Tensor,
) -> Tensor:
    repeats = 4 / 3 if checkpointing else 1  # forward is a third of the work
    computing = sent.new_tensor(tokens * flops_per_token * repeats / (peak * utilization))
    times = sent / speed
    waiting, hidden = times[waits].sum(), times[~waits].sum()
    return torch.stack([computing, waiting, hidden, torch.max(computing + waiting, hidden)])


def smallest_cluster(sharded: Tensor, fixed: Tensor, capacity: float, limit: int) -> Tensor:
    gpus = torch.zeros(len(sharded), dtype=torch.long)
    n = 1
    while n <= limit:
        fits = sharded / n + fixed <= capacity
        gpus[fits & (gpus == 0)] = n
        n *= 2
    return gpus


def utilization(load: Tensor, devices: int) -> Tensor:
    R, L, _ = load.shape
    rows = load.view(R, L, devices, -1).sum(-1)  # (R, L, devices)
    # A layer takes as long as its busiest device, and the step as long as the slowest group.
    step = rows.amax(2).sum(1).max()
    return rows.sum() / (R * devices * step)
