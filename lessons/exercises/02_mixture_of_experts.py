"""Exercises of lesson 02: Mixture of Experts, in five steps and two bonuses.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-02                          # or: python lessons/exercises/check_02.py [FILE]

The article that this course follows sends each token to 2 of 16 experts. Its snippet (lessons/ARTICLE.md, V2.6) goes wrong in
four places: it masks by the number of the slot instead of that of the expert, adds different tokens together, ignores the
gate's weights, and reads a name that is not defined. Steps 1 and 2 do its idea right, step 3 does it fast. Steps 4 and 5 are
two of its means against an uneven load; the second, a capacity, its snippet does not have at all.

Shapes: N tokens (of all sequences together), C model width, E experts, F hidden width of one, K = top_k choices per token.
A token's K places for its choices are its slots, 0 to K - 1; experts are numbered 0 to E - 1. Do not confuse the two.
Solutions are in 02_solutions.py; what nanods uses, in nanods/moe.py.
"""

import torch  # noqa: F401
from torch import Tensor


def route(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router: softmax(x @ gate.T) over the experts, of which each token keeps the top_k best, weighed so as to sum to 1.

    x (N, C), gate (E, C) -> weights (N, K), experts (N, K): integers, best first. x may be bf16: compute in fp32 then, or it
    is rounding that chooses.
    Hint: `torch.promote_types(x.dtype, torch.float32)` turns bf16 into fp32, and leaves fp64 as it is.
    Target: each row of weights sums to 1. With top_k = 1 every weight is 1 (what can the gate then learn from the loss?).
    """
    raise NotImplementedError


def mix(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Each token's output: the sum of what its experts make of it, each times its weight.

    x (N, C), weights, experts (N, K): as step 1 returns them, up (E, F, C), out (E, C, F) -> (N, C).
    Expert e is an MLP: it makes relu(x @ up[e].T) ** 2 @ out[e].T of x.
    Hint: a loop over the experts. `(experts == e).nonzero(as_tuple=True)` gives the tokens that chose e, and in which slot;
    `index_add` adds rows to rows of your choice.
    Target: the output of a token never changes with another token; with all weights twice as large it is twice as large.
    """
    raise NotImplementedError


def experts_sorted(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """The same without a search for each expert: sort the N K assignments by expert, and each expert's are one slice.

    Shapes as in step 2. An expert may have no tokens at all.
    Hint: assignment a is experts.flatten()[a], and belongs to token a // K. `argsort` brings experts together, `bincount` with
    `minlength` says how long each slice is. What comes out stands in the order of the experts: find the way back.
    Target: step 2's result, with the products of N K tokens and no more, however large E is.
    """
    raise NotImplementedError


def load_balancing_loss(probs: Tensor, experts: Tensor) -> Tensor:
    """Switch Transformer's loss: E * sum over experts of (its share of all assignments) * (its mean probability).

    probs (N, E): the softmax of step 1, experts (N, K): what was chosen, perhaps not the best of probs -> a scalar ().
    Hint: there are N K assignments. Their shares are counts, so they have no gradient: it comes through probs alone.
    Target: 1 where shares and probabilities are even; E where one expert has it all (K = 1).
    """
    raise NotImplementedError


def within_capacity(experts: Tensor, n_expert: int, capacity: int) -> Tensor:
    """Who is served where each expert has `capacity` places: places go to the earlier token, whatever its slot.

    experts (N, K) -> bool (N, K): True where the assignment has a place, False where it is dropped.
    Hint: a place is the number of earlier assignments to the same expert. `one_hot` and `cumsum` count them.
    Target: each expert serves min(capacity, how many chose it); a later token never takes an earlier one's place.
    """
    raise NotImplementedError


def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """DeepSeek-V3's way to an even load: a bias on the choice alone, moved by `rate` after each step.

    bias (E,), load (E,): integers, how many assignments each expert had -> the new bias (E,). An expert that had fewer than
    the mean becomes likelier to be chosen, one that had more less likely.
    Hint: however far from the mean the load is, the step is as long.
    Target: an expert with exactly the mean load keeps its bias.
    """
    raise NotImplementedError


def upcycle(up: Tensor, out: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
    """The article's third means: experts that start as copies of the MLP of a model trained without them.

    up (F, C), out (C, F) -> up (E, F, C), out (E, C, F). Training one expert must not change another.
    Hint: `expand` copies nothing. Is a factor needed? Ask what the weights of step 1 sum to.
    Target: whatever the router chooses, step 2's result is what the MLP made.
    """
    raise NotImplementedError
