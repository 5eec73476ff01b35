"""Exercises of lesson 05: plan a cluster, in six steps.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-05                          # or: python lessons/exercises/check_05.py [FILE]

Steps 1 and 2 count the bytes that a training step keeps on each GPU, and step 3 those that each GPU
sends. Step 4 turns work and bytes into seconds. Step 5 finds the smallest cluster that fits. Step 6
computes how much of a step 512 devices are busy if all wait for the slowest one (V2.4 of
lessons/ARTICLE.md).

Memory is in bytes and time in seconds, for each GPU. An fp32 number has 4 bytes, a bf16 number 2.
Return floating-point tensors, fp32 or fp64, unless a step says integers.
Shapes: B blocks, K collectives, M models, R groups, L layers, E experts.
Solutions are in 05_solutions.py. What nanods uses is in nanods/planner/.
"""

import torch  # noqa: F401
from torch import Tensor


def state_memory(outside: int, experts: int, adamw: int, n: int, ep: int, is_fsdp: bool) -> Tensor:
    """Return the bytes of the weights, gradients and optimizer state that each GPU keeps.

    The model has `outside` parameters outside the experts and `experts` in them. Weights and
    gradients are fp32. AdamW updates `adamw` of the parameters outside the experts and keeps two
    fp32 moments of each. Muon updates all others and keeps one fp32 momentum of each.
    There are n GPUs in groups of `ep`. The GPUs of a group share the experts, and the groups are
    replicas of each other (ep = 1: no expert parallelism). With is_fsdp all that is replicated is
    sharded instead, so that each GPU keeps 1/n of everything.
    Returns (3,): weights, gradients, optimizer.
    Hint: first count the parameters that one GPU keeps, outside the experts and in them.
    Target: 100 outside, 10 of them AdamW's, 800 in experts, n = 8, ep = 4: 1200, 1200, 1240 bytes.
    """
    raise NotImplementedError


def activation_memory(
    saved: Tensor, backward: Tensor, width: int, ends: float, tokens: int, checkpointing: bool
) -> Tensor:
    """Return the bytes of activations at the fullest moment of a step.

    saved, backward: (B,), bytes per token of each block: what its forward pass saves until its own
    backward pass, and the gradients that exist only while this backward pass runs.
    width: numbers per token of a block's input, which is fp32. `ends`: bytes per token of what lies
    outside the blocks, kept for the whole step. tokens: of a micro-batch.
    Without checkpointing all that is saved is kept. With it, each block keeps its input alone, and
    its backward pass computes again what it would have saved, one block at a time, beside all the
    inputs. In both cases count what is kept as kept through all of backward: an upper bound.
    Returns a scalar ().
    Hint: a sum over blocks, and a maximum over blocks.
    Target: saved 100, 300 and backward 50, 20, width 5, ends 10, one token: 460, and with
    checkpointing 370.
    """
    raise NotImplementedError


def sent_bytes(
    outside: int, experts: int, n: int, ep: int, micro_batches: int, is_fsdp: bool
) -> Tensor:
    """Return the bytes of weights and gradients that each GPU sends in a step, by collective.

    Parameters and GPUs as in step 1. n GPUs exchange the parameters outside the experts. The n / ep
    GPUs that hold the same experts / ep parameters of experts exchange those.
    In a group of m GPUs, each sends 2 (m - 1) / m of a tensor's bytes in an all-reduce, and
    (m - 1) / m in an all-gather or a reduce-scatter.
    Without fsdp: one all-reduce of the fp32 gradients a step. With it, for each micro-batch: an
    all-gather of the bf16 weights forward and another backward, and a reduce-scatter of the fp32
    gradients. Those tensors have their whole size, as without fsdp, when they are exchanged.
    Returns (3,): all-reduce, all-gather, reduce-scatter.
    Hint: (m - 1) / m for m = n and for m = n / ep.
    Target: 100 outside, 800 in experts, n = 8, ep = 4: 1500, 0, 0. With fsdp and 2 micro-batches:
    0, 1500, 1500.
    """
    raise NotImplementedError


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
    """Return the seconds of a step and of its parts.

    A GPU computes `tokens` tokens with `flops_per_token` each (forward and backward), at
    `utilization` of its peak FLOP/s. Backward takes twice as long as forward. With checkpointing
    the forward pass is computed twice.
    It sends sent[k] bytes at speed[k] bytes per second in collective k, one collective after the
    other. Where waits[k] is true, the computation waits for it. The others run beside it, and the
    step ends when both have ended.
    sent, speed: (K,). waits: (K,) booleans.
    Returns (4,): computing, waiting, hidden (the collectives that run beside it), the whole step.
    Hint: hidden communication takes no time of its own until there is more of it than of the rest.
    Target: 1 s of computing, collectives of 0.5 s (waits) and 2 s: 1, 0.5, 2, 2.
    """
    raise NotImplementedError


def smallest_cluster(sharded: Tensor, fixed: Tensor, capacity: float, limit: int) -> Tensor:
    """Return the smallest number of GPUs on which each model trains with fsdp.

    sharded: (M,), bytes that are divided among all GPUs. fixed: (M,), bytes that every GPU needs,
    however many there are. A GPU may use `capacity` bytes, and no more. The number of GPUs is 1, 2,
    4, 8, ..., at most `limit`.
    Returns (M,) integers, 0 where no such number is enough.
    Hint: for which models do 2^i GPUs fit?
    Target: sharded 100, fixed 10, capacity 35: 4 GPUs. With fixed 35 no number is enough.
    """
    raise NotImplementedError


def utilization(load: Tensor, devices: int) -> Tensor:
    """Return the share of a step in which the devices compute, if uneven experts make them wait.

    load: (R, L, E), integers: the number of rows of each expert, in each layer, in each of R
    groups. A group has `devices` devices. Each device owns E / devices consecutive experts, and its
    time is proportional to its number of rows. In each layer the devices of a group wait for the
    busiest of them. At the end of the step all groups wait for the slowest group.
    Returns a floating-point scalar (): the time all devices compute / the time all devices are
    occupied.
    Hint: how long does group r take for layer l? For the step? And all groups together?
    Target: 1 where all loads are equal. 1 / devices where one expert gets every row.
    """
    raise NotImplementedError
