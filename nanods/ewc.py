"""Elastic Weight Consolidation: learn a new task without forgetting the old one.

After a task, the weights that matter to it are held near their values by a penalty that is added to
the loss of the next task (Kirkpatrick et al. 2017, arXiv:1612.00796):

    loss = loss of the new task + strength / 2 * sum over i of F_i (w_i - a_i)^2

a_i is the weight after the old task, and F_i says how fast the model's predictions change with it:
the diagonal of the Fisher information,

    F_i = mean over sequences x of  sum over positions t of
          the expectation over y ~ p(y | x_1 .. x_t) of (d log p(y | x_1 .. x_t) / d w_i)^2

The file reads from top to bottom, one idea at a time:

    fisher_reference       the definition: every position and every label, one at a time
    fisher_diagonal        with one label sampled for each position: one gradient per sequence
    Consolidation          the weights and the Fisher information of one task, and the penalty
    consolidate            two tasks in one: their penalties add up to one of the same form

Labels at different positions are drawn independently, and the expected gradient of log p at each
position is 0. So the expected square of the sum over positions is the sum of the expected squares:
one gradient per sequence estimates the whole sum without bias.

Two mistakes are common. One is to square the gradient of a batch's mean loss: it shrinks as the
batch grows, and so does the penalty (tests/test_ewc.py shows it). The other is to use the labels of
the data ("data"): this empirical Fisher information is near 0 where the model is right and large
where it is wrong, however much its predictions depend on a weight (Kunstner et al. 2019,
arXiv:1905.12558).

Left out on purpose: off-diagonal terms (Kronecker factors), and forgetting of old Fisher
information (online EWC).

Pinned by tests/test_ewc.py.

Shapes: S sequences of T + 1 tokens, B sequences in a batch, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Labels = Literal["sampled", "all", "data"]


def fisher_reference(model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
    """Compute the definition above, one position and one label at a time: the specification.

    sequences (S, T + 1) int64; the last token of each is a label only. `model(tokens)` returns
    (logits, stats). It takes S T V backward passes.
    """
    parameters = trainable(model)
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for sequence in sequences:
        log_probs = model(sequence[None, :-1])[0][0].log_softmax(dim=-1)  # (T, V)
        for row in log_probs:
            for log_prob in row:
                gradients = torch.autograd.grad(log_prob, parameters.values(), retain_graph=True)
                for total, gradient in zip(fisher.values(), gradients, strict=True):
                    total += log_prob.detach().exp() * gradient.square() / len(sequences)
    return fisher


def fisher_diagonal(
    model: nn.Module,
    sequences: Tensor,
    labels: Labels = "sampled",
    batch_size: int = 8,
    seed: int = 0,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information, by the names of the parameters.

    `labels`: "sampled" from the model's own predictions; "all": the exact expectation over the
    vocabulary, for tiny vocabularies; "data": the next tokens of the sequences, the empirical
    Fisher information. The labels of a sequence depend on (seed, its number) alone, so `batch_size`
    changes nothing but time, memory and rounding. The model is used in eval mode.

    sequences (S, T + 1) int64. `mask` (S, T) bool: the positions that count (default: all), such as
    those that predict a token of an answer. Raises ValueError if there is no sequence, for other
    labels, and for a mask with "all".
    """
    if labels not in ("sampled", "all", "data"):
        raise ValueError(f"labels {labels!r}: choose sampled, all or data")
    if labels == "all" and mask is not None:
        raise ValueError(
            "the expectation over all labels is taken at all positions: leave out mask"
        )
    if len(sequences) == 0 or sequences.size(1) < 2:
        raise ValueError("the Fisher information needs at least one sequence of two tokens")
    was_training = model.training
    model.eval()
    if labels == "all":
        fisher = fisher_reference(model, sequences)
    else:
        fisher = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]

            def log_prob(logits: Tensor, rows: slice, batch=batch, start=start) -> Tensor:
                log_probs = logits.log_softmax(dim=-1)  # (rows, T, V)
                next_tokens = batch[rows, 1:]
                if labels == "sampled":
                    next_tokens = sample(log_probs, seed, start + (rows.start or 0))
                chosen = log_probs.gather(-1, next_tokens[..., None])[..., 0]  # (rows, T)
                if mask is not None:
                    chosen = chosen * mask[start : start + batch_size][rows]
                return chosen.sum()

            for name, squares in squared_gradients(model, batch[:, :-1], log_prob):
                fisher[name] += squares / len(sequences)
    model.train(was_training)
    return fisher


def sample(log_probs: Tensor, seed: int, first: int) -> Tensor:
    """Draw a label for each position: log_probs (B, T, V) of sequences number `first` and on ->
    (B, T)."""
    drawn = []
    for number, row in enumerate(log_probs.detach().cpu(), first):
        # PyTorch's CPU generator uses the lower 32 bits of a seed only: mix both into these.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**32)
        drawn.append(torch.multinomial(row.exp(), 1, generator=generator)[:, 0])
    return torch.stack(drawn).to(log_probs.device)


# ---- one gradient for each sequence --------------------------------------------------------------


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def squared_gradients(
    model: nn.Module, tokens: Tensor, objective: Callable[[Tensor, slice], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the squares of each sequence's gradient, summed over the sequences, by parameter.

    tokens (B, T). `objective(logits, rows)` sums over the sequences `rows`; `logits` are theirs.
    One backward pass serves all B if every parameter belongs to a linear layer or an embedding;
    else (experts) each sequence takes its own.
    """
    layers = simple_layers(model)
    if layers is not None:
        yield from squared_gradients_at_once(model, layers, tokens, objective)
        return
    parameters = trainable(model)
    for row in range(len(tokens)):
        rows = slice(row, row + 1)
        loss = objective(model(tokens[rows])[0], rows)
        # An expert that no token of the sequence uses has no gradient.
        gradients = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                yield name, gradient.square()


def simple_layers(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return the linear layers and embeddings by name, or None if they do not hold all trainable
    parameters."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    held = {id(p) for layer in layers.values() for p in layer.parameters()}
    return layers if all(id(p) in held for p in trainable(model).values()) else None


def squared_gradients_at_once(
    model: nn.Module,
    layers: dict[str, nn.Module],
    tokens: Tensor,
    objective: Callable[[Tensor, slice], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Do what `squared_gradients` does, with one backward pass.

    The gradient of sequence b at a linear layer's weight is the sum over its positions of g x^T,
    where x (B, T, C) is what the layer read and g (B, T, F) the gradient at what it wrote.
    """
    read, written = {}, {}

    def keep(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if name in read:
                raise RuntimeError(f"{name} is used twice in one forward pass")
            read[name], written[name] = inputs[0].detach(), output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        logits, _ = model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    loss = objective(logits, slice(None))
    gradients = torch.autograd.grad(loss, list(written.values()))
    for name, g in zip(written, gradients, strict=True):
        layer, x = layers[name], read[name]
        if isinstance(layer, nn.Embedding):  # x (B, T): which rows of the weight were read
            per_sequence = g.new_zeros(len(g), *layer.weight.shape)  # (B, V, C)
            sequence = torch.arange(len(g), device=g.device)[:, None].expand_as(x)
            per_sequence.index_put_((sequence, x), g, accumulate=True)
        else:
            per_sequence = torch.einsum("btf,btc->bfc", g, x)
            if layer.bias is not None:
                yield f"{name}.bias", g.sum(dim=1).square().sum(dim=0)
        yield f"{name}.weight", per_sequence.square().sum(dim=0)


# ---- the penalty ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consolidation:
    """What the penalty needs: the weights after a task and their Fisher information, by parameter
    name."""

    weights: dict[str, Tensor]
    fisher: dict[str, Tensor]

    def penalty(self, model: nn.Module, strength: float) -> Tensor:
        """Return strength / 2 * sum of F (w - a)^2 over the model's parameters, ().

        Add it once per optimizer step, not once per micro-batch. Raises ValueError unless names and
        shapes are the model's.
        """
        parameters = trainable(model)
        total = torch.zeros((), device=next(iter(parameters.values())).device)
        for name, p in parameters.items():
            if name not in self.fisher or self.fisher[name].shape != p.shape:
                raise ValueError(
                    f"{name} {tuple(p.shape)} is not a parameter of the model that is consolidated"
                )
            total = total + (self.fisher[name] * (p - self.weights[name]).square()).sum()
        return strength / 2 * total


def consolidate(first: Consolidation, second: Consolidation) -> Consolidation:
    """Return one consolidation for two tasks: its penalty is the sum of theirs, less a constant.

    F (w - a)^2 + G (w - b)^2 = (F + G) (w - c)^2 + constant, where c = (F a + G b) / (F + G).
    """
    weights, fisher = {}, {}
    for name, F in first.fisher.items():
        G, a, b = second.fisher[name], first.weights[name], second.weights[name]
        total = F + G
        fisher[name] = total
        weights[name] = torch.where(total > 0, (F * a + G * b) / total.clamp(min=1e-45), b)
    return Consolidation(weights, fisher)
