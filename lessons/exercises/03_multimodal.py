"""Exercises of lesson 03: multimodal contrastive learning, in five steps and a bonus.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-03                          # or: python lessons/exercises/check_03.py [FILE]

The article that this course follows maps text, images and audio into one space with a symmetric
contrastive loss at a temperature of 0.1 (lessons/ARTICLE.md, V3). Step 1 is that loss. Step 2
corrects it for batches that contain the same example twice. Step 3 learns its temperature. Step 4
measures retrieval, and gives no credit to a space that has collapsed. Step 5 is a loss without a
softmax. The bonus computes the entropies that keep V2's experts in use by every modality.

Shapes: B pairs in the batch, M width of an embedding, Q queries and as many targets, N tokens of
one modality, E experts.
Solutions are in 03_solutions.py. What nanods uses is in nanods/contrastive.py.
"""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor


def contrastive_loss(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Return CLIP's loss: each a_i must find its b_i among all b, and each b_i its a_i.

        L(a -> b) = - mean over i of log( exp(scale a_i . b_i) / sum over j of exp(scale a_i . b_j))
        L         = (L(a -> b) + L(b -> a)) / 2

    a, b: (B, M). scale: 1 / temperature, a number or a tensor (). Returns a scalar ().
    The caller has already normalised a and b to length 1: do not do it again. They may be bf16.
    Compute in fp32 then, because bf16 cannot tell similarities near 1 apart.
    Hint: each direction is a cross-entropy over the rows of a matrix (B, B). Which class is the
    right one in row i?
    Target: ln B where all similarities are equal. Finite in fp32 at a scale of 100, even where a_i
    and b_i point in opposite directions.
    """
    raise NotImplementedError


def loss_with_duplicates(a: Tensor, b: Tensor, scale: Tensor | float, ids: Tensor) -> Tensor:
    """Return the same loss for a batch with duplicates: equal ids are no negatives of each other.

    ids: (B,), any integers. The other arguments are those of step 1. Returns a scalar ().
    If j is a duplicate of i (equal ids, j != i), leave j out of the sum over j, in both directions.
    A duplicate is not a positive either: the positive of example i is number i alone.
    Hint: which value in the matrix makes exp() add nothing to the sum?
    Target: the result of step 1 if all ids are different, and 0 if all ids are the same.
    """
    raise NotImplementedError


def logit_scale(log_scale: Tensor, max_scale: float) -> Tensor:
    """Return the learnt scale, exp(log_scale), limited to `max_scale` but able to decrease again.

    log_scale: (), a torch.nn.Parameter. The optimizer updates it and may carry it far over the
    limit. Returns the scale (), with a gradient. Each training step calls this function before the
    loss, and nothing else keeps the limit. Here you may, and should, change an argument in place.
    Hint: what is the gradient of clamp() above the limit, and what does the optimizer do with it?
    Target: however large log_scale was, one small optimizer step downwards gives a scale below
    `max_scale`.
    """
    raise NotImplementedError


def recall_at_1(queries: Tensor, targets: Tensor) -> Tensor:
    """Return the share of queries whose own target scores higher than every other target.

    queries, targets: (Q, M). Target i belongs to query i. Scores are dot products.
    Returns a scalar tensor () between 0 and 1.
    A tie does not count as found, and neither does NaN. (nanods also counts scores as tied if only
    rounding separates them.)
    Hint: which index does argmax return for a row of equal numbers? Is NaN > 1? Is NaN <= 1?
    Target: 1 for queries = targets = eye(Q), 0 where all embeddings are equal, 0 where all are NaN.
    """
    raise NotImplementedError


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Return SigLIP's loss: a binary decision for each of the B^2 pairs by itself.

        L = - (1 / B) sum over i, j of log sigmoid( z_ij (scale a_i . b_j + bias) )
        z_ij = 1 if i = j, else -1                                        (arXiv:2303.15343)

    a, b: (B, M), of length 1. scale and bias: numbers or tensors (). Returns a scalar ().
    Hint: sigmoid(-200) is 0 in fp32, and log(0) is not -200.
    Target: B ln 2 where scale and bias are 0. Much less with a bias of -10, because most pairs do
    not match.
    """
    raise NotImplementedError


def entropies(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return LIMoE's two entropies of a router, for the tokens of one modality.

        local  = mean over n of H(p_n)
        global = H(mean over n of p_n),      H(p) = - sum over e of p_e ln p_e

    probs: (N, E), the router's probabilities for the tokens of *one* modality.
    Returns local () and global (). LIMoE (arXiv:2206.02770) minimises local, so that the router is
    confident about each token, and maximises global, so that the tokens use several experts.
    Hint: p ln p goes to 0 as p goes to 0, but 0 * log(0) is NaN.
    Target: 0 <= local <= global <= ln E. If each token has probability 1 for one expert, and the
    experts are chosen equally often, local is 0 and global is ln E.
    """
    raise NotImplementedError
