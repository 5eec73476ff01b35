"""Exercises of lesson 04: one step by many devices, in five steps.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-04                          # or: python lessons/exercises/check_04.py [FILE]

No processes are started here: what several would do or hold stands along the first dimension of a tensor. Step 1 is the ring by
which they add up; step 2 what each of them does in tensor parallelism, which the article (lessons/ARTICLE.md, V3.4) takes for
independent tasks. Step 3 packs rows of tokens for the owners of their experts, step 4 makes one gradient of many, and step 5
says how much of a step 512 devices use while they wait for the busiest (V2.4).

Shapes: n or W processes, N tokens, C width, H hidden width, E experts, K choices a token, L layers, R groups of G devices.
Everything counts from 0. Solutions are in 04_solutions.py; what nanods does, in nanods/distributed/process_groups.py and its neighbours.
"""

import torch  # noqa: F401
from torch import Tensor


def ring(n: int) -> Tensor:
    """The timetable of an all-reduce: which chunk each of n processes sends to its right neighbour, step by step.

    Each process has a vector in n chunks, and all shall end with the sum of all n vectors. There are 2 (n - 1) steps. In each,
    process r sends one chunk to process (r + 1) % n, all at the same time. In the first n - 1 steps the receiver *adds* what
    arrives to its own chunk of that number; in the other n - 1 it *replaces* its own by it.
    -> (2 (n - 1), n), integers: number s, r is that of the chunk which process r sends in step s.
    Hint: a chunk collects n parts in n - 1 steps only if it never rests. What has just arrived?
    Target: after n - 1 steps each process has one chunk with all n parts in it; after 2 (n - 1) all have all chunks.
    """
    raise NotImplementedError


def in_parts(x: Tensor, up: Tensor, out: Tensor, n: int) -> Tensor:
    """Tensor parallelism: what each of n processes makes of all tokens with its part of an MLP.

        y = relu(x up^T)^2 out^T,    x (N, C), up (H, C), out (C, H)

    H is a multiple of n. Process r has H / n of the hidden numbers, those from r H / n on, and of the matrices what belongs to
    them. -> (n, N, C): what each contributes, before anyone has talked to anyone. (The all-reduce then adds them up.)
    Hint: which dimension of `up`, and which of `out`, counts hidden numbers?
    Target: the sum over the n processes is y; together they compute no more than one process would.
    """
    raise NotImplementedError


def pack(experts: Tensor, n_expert: int, n: int) -> tuple[Tensor, Tensor]:
    """Expert parallelism: in which order a process sends its rows to the owners of their experts, and how many to each.

    experts (N, K): which experts each of its tokens chose, 0 <= e < n_expert. n divides n_expert, and process r owns those from
    r n_expert / n to (r + 1) n_expert / n - 1. Assignment t K + k is the k-th choice of token t.
    -> order (N K,): the assignments in the order in which their rows are sent, by expert, and those of an expert by token;
       sent (n,): how many rows go to each process. Both integers.
    Hint: a sort has to be told that it shall be stable. Does your count have an entry for a process to which nothing goes?
    Target: x[order // K].split(sent.tolist()) are the boxes for processes 0 to n - 1, each in the order of its experts.
    """
    raise NotImplementedError


def add_up(shared: Tensor, experts: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The gradients of the whole batch from what backward() left on each of W processes, with experts shared out.

    shared (W, S): process w's gradient of the weights that all have. experts (W, X): its gradient of the experts that it owns.
    Processes 0 to group - 1 own all the experts between them, so do the next `group`, and so on: processes w and w + group
    have copies of the same. Each process's loss is the mean over its own tokens, all have equally many, and the loss of the
    whole batch is the mean of the W losses.
    -> (W, S) and (W, X): what every process gives to its optimizer.
    Hint: whose tokens did an expert see? So whose losses are in its gradient already, and of how many is the loss a mean?
    Target: with group = 1 both are the plain mean over all; with group = W experts are not added up at all, and yet divided.
    """
    raise NotImplementedError


def used(load: Tensor, devices: int) -> Tensor:
    """Which share of a step's time the devices compute, where uneven experts make them wait.

    load (R, L, E), integers: how many rows each expert gets, in each layer, in each of R groups. A group has `devices` devices,
    which own E / devices experts each, in order, and a device takes as long as it has rows. In each layer the devices of a
    group wait for the busiest of them; at the end of the step the groups wait for the slowest group.
    -> (), floating-point: the time that all devices compute, over the time that they are there.
    Hint: how long does group r take for layer l? For the step? And all of them?
    Target: 1 where all loads are equal; 1 / devices where one expert gets everything.
    """
    raise NotImplementedError
