"""Exercises of lesson 02: Mixture of Experts, in five steps and two bonuses.

Write each function in plain PyTorch. Then grade the file, as often as you like:

    make check-02                          # or: python lessons/exercises/check_02.py [FILE]

The article that this course follows sends each token to 2 of 16 experts. In steps 1 and 2 you write
a correct version of its idea, and in step 3 a fast one. Steps 4 and 5 are two of its three measures
against an uneven load.

Shapes: N tokens (of all sequences together), C model width, E experts, F hidden width of an expert,
K = top_k experts per token. The K selected experts of a token are in its slots 0 to K - 1. Experts
have the indices 0 to E - 1. Do not confuse a slot with an expert's index. An assignment is a pair
of a token and one of its selected experts; there are N K of them.

All functions return floats in the dtype of their arguments (fp32 or fp64), let gradients reach
every float that the result depends on, and do not change their arguments. The solutions are in
02_solutions.py; nanods itself uses the functions in nanods/moe.py and nanods/moe_kernel.py.
"""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor


def route(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select the top_k experts of each token by softmax(x @ gate.T), with weights that sum to 1.

    x (N, C), gate (E, C) -> weights (N, K), experts (N, K): integers, best first. The weights are
    the probabilities of the selected experts, divided by their sum. x may be bf16. Then compute in
    fp32, because rounding to bf16 would decide between experts with similar scores.
    Hint: `torch.promote_types(x.dtype, torch.float32)` turns bf16 into fp32 and leaves fp64 as it
    is.
    Target: each row of weights sums to 1. With top_k = 1 every weight is 1. (What can the gate then
    learn from the loss?)
    """
    raise NotImplementedError


def experts_loop(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Compute for each token the weighted sum of the outputs of its experts.

    x (N, C), weights and experts (N, K) as step 1 returns them, up (E, F, C), out (E, C, F)
    -> (N, C). Expert e is an MLP: its output is relu(x @ up[e].T) ** 2 @ out[e].T.
    Hint: loop over the experts. `(experts == e).nonzero(as_tuple=True)` gives the tokens that
    selected expert e, and the slots they selected it in. `index_add` adds rows at given indices.
    Target: the output of a token never changes with another token. If all weights are doubled, the
    output is doubled.
    """
    raise NotImplementedError


def experts_sorted(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Compute the same by sorting the N K assignments by expert, so that each expert is one slice.

    Shapes as in step 2. An expert may have no tokens at all.
    Hint: assignment a belongs to token a // K, and its expert is experts.flatten()[a]. `argsort`
    sorts the assignments by expert, and `bincount` with `minlength` gives the length of each slice.
    The results are then sorted by expert: bring them back to the order of the tokens.
    Target: step 2's result, with matrix products over N K rows and no more, however large E is.
    """
    raise NotImplementedError


def load_balancing_loss(probs: Tensor, experts: Tensor) -> Tensor:
    """Compute the Switch Transformer's loss: E * sum over e of (fraction of e) * (mean prob of e).

    probs (N, E): the softmax of step 1; experts (N, K): the selected experts, which need not be
    those with the highest probs -> a scalar (). The fraction of expert e is its number of
    assignments divided by the number of all assignments.
    Hint: there are N K assignments. The fractions come from counts, so they have no gradient: it
    flows through probs only.
    Target: 1 if fractions and probabilities are even; E if one expert has everything (K = 1).
    """
    raise NotImplementedError


def within_capacity(experts: Tensor, n_expert: int, capacity: int) -> Tensor:
    """Return which assignments fit if each expert accepts at most `capacity` of them.

    experts (N, K) -> bool (N, K): True if the assignment is kept, False if it is dropped. An expert
    keeps the assignments of the earliest tokens, whatever their slots.
    Hint: the position of an assignment is the number of earlier assignments to the same expert.
    `one_hot` and `cumsum` count them.
    Target: each expert keeps min(capacity, its number of assignments); a later token never takes
    the position of an earlier one.
    """
    raise NotImplementedError


def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Move each expert's selection bias by `rate` towards an even load, as DeepSeek-V3 does.

    bias (E,), load (E,): integers, the number of assignments of each expert -> the new bias (E,).
    The bias is added to the probabilities for the selection only. Raise it for an expert with less
    than the mean load, and lower it for one with more.
    Hint: the step has the same length, however far the load is from the mean.
    Target: an expert with exactly the mean load keeps its bias.
    """
    raise NotImplementedError


def upcycle(up: Tensor, out: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
    """Start each expert as a copy of a trained MLP: the article's third measure.

    up (F, C), out (C, F) -> up (E, F, C), out (E, C, F). Training one expert must not change
    another.
    Hint: `expand` copies nothing. Is a factor needed? Ask what the weights of step 1 sum to.
    Target: whatever the router selects, step 2's result equals the output of the MLP.
    """
    raise NotImplementedError
