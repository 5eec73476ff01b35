"""Exercises of lesson 07: learning something new without forgetting, in six steps.

Write each function in plain PyTorch, then grade the file, as often as you like:

    make check-07                          # or: python lessons/exercises/check_07.py [FILE]

Step 1 says which tokens of a dialogue are learnt. Step 2 is their loss, right for any split into
micro-batches. Step 3 is the Fisher information of a small model from its definition, step 4 its
estimate from one label per example. Step 5 is the penalty of Elastic Weight Consolidation, step 6
puts two tasks into one penalty.

Shapes: n tokens of a dialogue, B rows of T positions, V classes (or vocabulary), C inputs,
N examples.
Solutions are in 07_solutions.py. What nanods uses is in nanods/ewc.py,
nanods/data/instructions.py and nanods/training/instruction_task.py.
"""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor

USER, ASSISTANT, END = 253, 254, 255  # bytes that never occur in UTF-8


def answer_mask(tokens: Tensor) -> Tensor:
    """Return which tokens of a dialogue are learnt: the answers, each with its END.

    A dialogue is a sequence of turns, USER text ASSISTANT answer END, USER text and so on. The
    marks USER and ASSISTANT are never learnt: they are given.
    tokens: (n,) int64. Every answer has an END, except that the last one may be cut off.
    Returns (n,) bool.
    Hint: an answer is open after ASSISTANT, up to END. A loop over the tokens is fine; without
    one, compare how many ASSISTANT and how many END stand before each token (cumsum).
    Target: "USER a b ASSISTANT c d END" has True at c, d and END.
    """
    raise NotImplementedError


def answer_loss(logits: Tensor, targets: Tensor, mask: Tensor, answer_tokens: int) -> Tensor:
    """Return a micro-batch's share of the mean loss over all answer tokens of a batch, in nats.

    The shares of all micro-batches add up to the mean over the whole batch, however the rows are
    split, and so do their gradients.
    logits: (B, T, V). targets: (B, T) int64. mask: (B, T) bool, True where the target is learnt.
    answer_tokens: number of learnt targets in the whole batch, not in this micro-batch.
    Returns a scalar (). It is 0 if the mask is False everywhere.
    Hint: F.cross_entropy(..., reduction="none") gives the nats of each target.
    Target: the sum over two halves of a batch equals the value of the whole batch.
    """
    raise NotImplementedError


def fisher_diagonal(weight: Tensor, x: Tensor) -> Tensor:
    """Return the diagonal of the Fisher information of a linear classifier, from the definition.

        p(y | x) = softmax(W x),
        F[v, c] = mean over x of  sum over y of p(y | x) (d log p(y | x) / d W[v, c])^2

    weight: W (V, C). x: (N, C).
    Returns (V, C). No gradient need flow through it.
    Hint: either ask torch.autograd.grad for each x and each y, or differentiate by hand: the
    gradient of log p(y | x) with respect to W[v, c] is (1 if y = v else 0, minus p(v | x)) x[c].
    Target: no label of the data is needed: the model's own probabilities weight the labels.
    """
    raise NotImplementedError


def fisher_from_labels(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the squared gradients of log p, one label for each example.

        F[v, c] = mean over n of  (d log p(labels[n] | x[n]) / d W[v, c])^2

    With labels drawn from the model this is an unbiased estimate of step 3.
    weight: W (V, C). x: (N, C). labels: (N,) int64.
    Returns (V, C). No gradient need flow through it.
    Hint: the gradient of each example is an outer product, (V, 1) times (1, C). Square it before
    you take the mean.
    Target: twice the same examples give the same F: it does not depend on the batch size.
    """
    raise NotImplementedError


def ewc_penalty(weight: Tensor, old: Tensor, fisher: Tensor, strength: float) -> Tensor:
    """Return strength / 2 * sum of fisher * (weight - old)^2.

    weight, old, fisher: the same shape. `old` are the weights after the task before.
    Returns a scalar (). The gradient flows to weight, and none to old or fisher.
    Hint: detach what is a constant.
    Target: its gradient with respect to weight is strength * fisher * (weight - old).
    """
    raise NotImplementedError


def consolidate(
    fisher_1: Tensor, old_1: Tensor, fisher_2: Tensor, old_2: Tensor
) -> tuple[Tensor, Tensor]:
    """Return one Fisher information F and one centre a whose penalty stands for those of two tasks.

        fisher_1 (w - old_1)^2 + fisher_2 (w - old_2)^2 = F (w - a)^2 + constant,  for every w

    All arguments have the same shape. fisher_1 and fisher_2 are at least 0. Where both are 0 any
    centre is right: return old_2 there.
    Returns F and a, in that shape.
    Hint: compare the coefficients of w^2, then those of w. What is 0 / 0?
    Target: a weight that only the first task needs keeps old_1.
    """
    raise NotImplementedError
