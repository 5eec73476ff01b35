"""Exercises of lesson 00: the parts of a GPT, in six steps.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-00                          # or: python lessons/exercises/check_00.py [FILE]

Steps 1 to 3 are what attention is made of: RMSNorm, RoPE and QK-norm. Step 4 is the update of Muon,
the optimizer. Steps 5 and 6 count what a training step costs.

Shapes: B batch, T tokens, C width of the model, H heads, D = C / H width of a head, V vocabulary,
L layers.

Graded in steps 1 to 4: no argument is changed in place, and the result has the dtype of the
argument. In steps 1 and 3 gradients flow to every tensor. A result may differ by 1e-4, so an
epsilon of 1e-5 against division by zero is fine.

Solutions are in 00_solutions.py. What nanods uses is in nanods/gpt.py, nanods/training/muon.py and
nanods/planner/.
"""

import torch  # noqa: F401
from torch import Tensor


def rms_norm(x: Tensor, gain: float) -> Tensor:
    """Scale each vector of x to the root mean square `gain`.

    The root mean square of a vector is the root of the mean of its squares. x (..., C), a vector is
    its last dimension. The direction of a vector does not change, and a vector of zeros stays one.
    Hint: keepdim=True.
    Target: (3, 4) with gain 1 becomes (0.849, 1.131).
    """
    raise NotImplementedError


def apply_rope(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate each pair of channels by an angle that grows with the position (RoPE).

    x (B, H, T, D), positions (T,) integers -> (B, H, T, D). Pair i is the channels i and i + D/2,
    for i from 0 to D/2 - 1. At position p its angle is p * base^(-2i/D). A rotation by the angle t
    takes (a, b) to (a cos t - b sin t, a sin t + b cos t).
    Hint: the angles are a table (T, D/2); x.chunk(2, dim=-1) gives all a and all b.
    Target: (1, 0) at position 1 becomes (0.540, 0.841), whatever the base.
    """
    raise NotImplementedError


def attention(q: Tensor, k: Tensor, v: Tensor, gain: float) -> Tensor:
    """Compute causal attention with normalised queries and keys (QK-norm).

    q, k, v (B, H, T, D) -> (B, H, T, D). Scale each query to the root mean square `gain` and each
    key to 1, over D. A score is q . k / sqrt(D) of these. Query t reads the keys 0 to t: the output
    is the softmax of its scores, times v. Do not use F.scaled_dot_product_attention.
    Hint: softmax turns a score of -inf into the weight 0.
    Target: output 0 is v at token 0; queries and keys 10 times as large change nothing.
    """
    raise NotImplementedError


def orthogonalise(G: Tensor, steps: int) -> Tensor:
    """Bring all singular values of each matrix near 1 (the update of Muon).

    G (R, C), or a stack (N, R, C) of matrices, each treated by itself -> the same shape. Start with
    X = G / (the root of the sum of its squares), then `steps` times (Newton-Schulz)
        X <- a X + b (X X^T) X + c (X X^T)^2 X,    a, b, c = 3.4445, -4.7750, 2.0315.
    A matrix of zeros stays one.
    Hint: X.mT is the transpose of each matrix. The powers are matrix products.
    Target: a matrix with one row becomes a vector of length 0.696 after 5 steps.
    """
    raise NotImplementedError


def flops_per_token(V: int, C: int, n_layer: int, hidden_ratio: int, T: int) -> Tensor:
    """Return the operations to train on one token, forward and backward, of a sequence of T.

    Each layer has four C x C matrices for attention, then an MLP of two matrices with a hidden
    width of hidden_ratio * C. The head is V x C. None has a bias. The embedding is looked up, not
    multiplied.
    A weight takes 2 operations forward (multiply, add) and twice as many backward. So does each of
    the 2 C numbers of a pair of query and key, in each layer: q . k, then weight * v. Query t reads
    t + 1 keys (t from 0): count the mean over the sequence.
    Returns a floating-point scalar (). Norms, RoPE and softmax are left out.
    Target: V, C, n_layer, hidden_ratio, T = 10, 2, 1, 4, 3: 456.
    """
    raise NotImplementedError


def training_memory(V: int, C: int, n_layer: int, hidden_ratio: int) -> Tensor:
    """Return the bytes of weights, gradients and optimizer state, all in fp32.

    The model is that of step 5, with an embedding V x C of its own beside the head. Muon updates
    the matrices of the layers and keeps one number for each weight, its momentum. AdamW updates
    embedding and head and keeps two.
    Returns (3,), floating-point: weights, gradients, optimizer.
    Target: V, C, n_layer, hidden_ratio = 10, 2, 1, 4: 352, 352, 512.
    """
    raise NotImplementedError
