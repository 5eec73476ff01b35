"""Exercises of lesson 04: distributed training, in four steps.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-04                          # or: python lessons/exercises/check_04.py [FILE]

No processes are started here. The first dimension of a tensor counts the processes instead. Step 1
is the schedule of a ring all-reduce. Step 2 is one process's part of tensor parallelism, which the
article (lessons/ARTICLE.md, V3.4) describes as independent tasks. Step 3 sorts rows of tokens for
the processes that own their experts. Step 4 combines the gradients of all processes.

Shapes: n or W processes, N tokens, C width, H hidden width, E experts, K choices per token.
Everything counts from 0.
Solutions are in 04_solutions.py. What nanods uses is in nanods/distributed/.
"""

import torch  # noqa: F401
from torch import Tensor


def ring_schedule(n: int) -> Tensor:
    """Return which chunk each of n processes sends in each step of a ring all-reduce.

    Each process has a vector in n chunks. At the end all processes have the sum of all n vectors.
    There are 2 (n - 1) steps. In each step process r sends one chunk to process (r + 1) % n, and
    all processes send at the same time. In the first n - 1 steps the receiver *adds* the incoming
    chunk to its local chunk of the same number. In the last n - 1 steps it *replaces* its local
    chunk by the incoming one.
    Returns integers (2 (n - 1), n): entry s, r is the number of the chunk that process r sends in
    step s. n is at least 1; one process sends nothing, (0, 1).
    Hint: a chunk collects n parts in n - 1 steps only if it moves in every step. Which chunk has
    just arrived?
    Target: after n - 1 steps each process has one chunk that holds all n parts. After 2 (n - 1)
    steps all processes have all chunks.
    """
    raise NotImplementedError


def tensor_parallel_mlp(x: Tensor, up: Tensor, out: Tensor, n: int) -> Tensor:
    """Return what each of n processes computes with its part of an MLP, for all tokens.

        y = relu(x up^T)^2 out^T,    x (N, C), up (H, C), out (C, H)

    H is a multiple of n. Process r holds H / n hidden units, starting at unit r H / n, and the
    parts of both matrices that belong to them.
    Returns (n, N, C): the partial output of each process before any communication. (The all-reduce
    then sums them.)
    Hint: which dimension of `up`, and which of `out`, counts hidden units?
    Target: the sum over the n processes is y. Together they do no more work than one process would.
    """
    raise NotImplementedError


def dispatch_order(experts: Tensor, n_expert: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the order in which rows are sent to the owners of their experts, and how many to each.

    This is the packing step of expert parallelism.
    experts: (N, K), the experts that each local token chose, 0 <= e < n_expert. n divides n_expert.
    Process r owns experts r n_expert / n to (r + 1) n_expert / n - 1. Assignment t K + k is the
    k-th choice of token t.
    Returns order (N K,): the assignments in the order in which their rows are sent, sorted by
    expert, and by token within an expert. Returns send_counts (n,): how many rows go to each
    process. Both are integers.
    Hint: a sort keeps the order of equal keys only if it is stable. Does your count have an entry
    for a process that receives nothing?
    Target: x[order // K].split(send_counts.tolist()) is one tensor for each of processes 0 to
    n - 1, each sorted by expert.
    """
    raise NotImplementedError


def average_gradients(shared: Tensor, experts: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of the whole batch, from the gradients on each of W processes.

    shared: (W, S), each process's gradient of the weights that every process has.
    experts: (W, X), each process's gradient of the experts that it owns.
    Processes 0 to group_size - 1 own all the experts together, and so does each next group of
    `group_size` processes. So processes w and w + group_size hold replicas of the same experts.
    Each process's loss is the mean over its own tokens, and all have the same number of tokens. The
    loss of the whole batch is the mean of the W losses.
    Returns (W, S) and (W, X): what each process passes to its optimizer.
    Hint: whose tokens did an expert process? So whose losses does its gradient include already, and
    how many losses does the mean divide by?
    Target: with group_size = 1 both are the plain mean over all processes. With group_size = W
    expert gradients are not summed at all, but still divided.
    """
    raise NotImplementedError
