"""Exercises of lesson 03: multimodal contrastive learning, in five steps and a bonus.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-03                          # or: python lessons/exercises/check_03.py [FILE]

The article that this course follows brings text, images and audio into one space by a symmetric contrastive loss at a
temperature of 0.1 (lessons/ARTICLE.md, V3). Step 1 is that loss, step 2 what it lacks where a batch holds the same thing twice,
step 3 its temperature, learnt. Step 4 measures what came of it, without credit for a space that has collapsed. Step 5 is a loss
with no softmax at all; the bonus keeps the experts of V2 apart where several modalities share them.

Shapes: B pairs in the batch, M width of an embedding, Q queries and as many targets, N tokens of one modality, E experts.
Solutions are in 03_solutions.py; what nanods uses, in nanods/contrastive.py.
"""

import torch  # noqa: F401
from torch import Tensor


def contrastive_loss(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """CLIP's loss: each a_i must find its own b_i among all b, and each b_i its own a_i; the mean of the two directions.

        L(a -> b) = - mean over i of log( exp(scale a_i . b_i) / sum over j of exp(scale a_i . b_j) )
        L         = (L(a -> b) + L(b -> a)) / 2

    a, b (B, M), scale = 1 / temperature: a number or a tensor () -> a scalar (). Whoever calls it has given a and b the length
    1: do not do so again. They may be bf16: compute in fp32 then, or similarities near 1 are all the same.
    Hint: each direction is a cross-entropy over the rows of a matrix (B, B). Which number is the right one in row i?
    Target: ln B where all similarities are equal; finite in fp32 at a scale of 100, even where partners are opposites.
    """
    raise NotImplementedError


def with_twins(a: Tensor, b: Tensor, scale: Tensor | float, ids: Tensor) -> Tensor:
    """The same where the batch holds something twice: items with the same id are no negatives of each other.

    ids (B,): any integers, the rest as in step 1 -> a scalar (). Twin j of item i is left out of the sum over j, in both
    directions. It is no partner either: item i still looks for its own, number i, alone.
    Hint: what has to stand in the matrix so that exp() of it adds nothing to the sum?
    Target: with all ids different it is step 1's result; with all ids the same it is 0.
    """
    raise NotImplementedError


def logit_scale(log_scale: Tensor, most: float) -> Tensor:
    """The scale of steps 1 and 2, learnt: exp(log_scale), at most `most`, and able to come down again.

    log_scale (): a torch.nn.Parameter that an optimizer moves, perhaps far over the limit -> the scale (), which has a
    gradient. Each step of the training calls this function before the loss, so the limit is kept here and nowhere else: here
    you may, and should, change an argument in place.
    Hint: what is the gradient of clamp() above the limit, and what does the optimizer do with that?
    Target: wherever log_scale was carried, one small step of the optimizer downwards gives a scale below `most`.
    """
    raise NotImplementedError


def recall_at_1(queries: Tensor, targets: Tensor) -> Tensor:
    """The share of queries that find their own target: its score is higher than that of every other target.

    queries, targets (Q, M), query i's own target is target i; scores are dot products -> a scalar (), a tensor from 0 to 1.
    A tie is not found, and neither is what is NaN. (nanods also counts as ties what only rounding parts.)
    Hint: which index does argmax give for a row of equal numbers? Is NaN > 1? Is NaN <= 1?
    Target: 1 for queries = targets = eye(Q), 0 where all embeddings are the same, 0 where all are NaN.
    """
    raise NotImplementedError


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """SigLIP's loss: for each of the B^2 pairs alone a yes or no. Do they belong together?    (arXiv:2303.15343)

        L = - (1 / B) sum over i, j of log sigmoid( z_ij (scale a_i . b_j + bias) ),    z_ij = 1 if i = j, else -1

    a, b (B, M) of length 1, scale and bias: numbers or tensors () -> a scalar ().
    Hint: sigmoid(-200) is 0 in fp32, and log(0) is not -200.
    Target: B ln 2 where scale and bias are 0; with a bias of -10 far less, since most pairs do not belong together.
    """
    raise NotImplementedError


def entropies(probs: Tensor) -> tuple[Tensor, Tensor]:
    """LIMoE's two, for a router that several modalities share: how unsure it is of a token, and how many experts it uses.

        local = mean over n of H(p_n),    global = H(mean over n of p_n),    H(p) = - sum over e of p_e ln p_e

    probs (N, E): its probabilities for the tokens of *one* modality -> local (), global (). LIMoE (arXiv:2206.02770) presses
    local down, so that each token is sure of its expert, and global up, so that the tokens do not all choose the same.
    Hint: p ln p goes to 0 with p; 0 * log(0) does not.
    Target: 0 <= local <= global <= ln E; with each token sure of one expert, and experts chosen equally often, 0 and ln E.
    """
    raise NotImplementedError
