"""Retrieval: embed examples without gradients, and measure how well each finds its partner.

Training's evaluation, sample.py, search and zero-shot classification embed with the same function.

Shapes: Q examples, M width of the space, N ids of an example, L layers, E experts.
"""

from itertools import permutations

import numpy as np
import torch
from torch import Tensor, nn

from nanods.contrastive import contrastive_loss, median_rank, recall_at_k

EMBED_CHUNK = 64  # examples embedded at a time where no gradient is needed


@torch.no_grad()
def embed(
    model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return embeddings (Q, M) and, with experts, their load (L, E), by modality; a chunk at a
    time, in the model's own mode."""
    chunks, load = {name: [] for name in inputs}, {}
    examples = len(next(iter(inputs.values())))
    for start in range(0, examples, EMBED_CHUNK):
        chunk = {name: x[start : start + EMBED_CHUNK] for name, x in inputs.items()}
        embeddings, stats = model(chunk)
        for name, e in embeddings.items():
            chunks[name].append(e)
            if "load" in stats[name][0]:
                counts = torch.stack([layer["load"] for layer in stats[name]])
                load[name] = load.get(name, 0) + counts
    return {name: torch.cat(parts) for name, parts in chunks.items()}, load


def retrieval_metrics(
    embeddings: dict[str, Tensor], ids: Tensor, present: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """Return recall at 1 and at 5 and the median rank in each direction, from embeddings (Q, M) by
    modality and ids (Q, N), among the examples with both modalities, present (Q,) by modality.

    A direction for which there are fewer than two is left out.
    """
    metrics = {}
    for a, b in permutations(embeddings, 2):
        queries, targets, pair_ids = with_both(a, b, embeddings, ids, present)
        if present is not None and len(pair_ids) < 2:
            continue
        metrics[f"recall1_{a}_{b}"] = recall_at_k(queries, targets, 1, pair_ids)
        metrics[f"recall5_{a}_{b}"] = recall_at_k(queries, targets, 5, pair_ids)
        metrics[f"median_rank_{a}_{b}"] = median_rank(queries, targets, pair_ids)
    return metrics


def with_both(
    a: str,
    b: str,
    embeddings: dict[str, Tensor],
    ids: Tensor,
    present: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the embeddings in a and in b, and the ids, of the examples that have both."""
    both = slice(None) if present is None else present[a] & present[b]
    return embeddings[a][both], embeddings[b][both], ids[both]


def validation_loss(
    embeddings: dict[str, Tensor],
    ids: Tensor,
    scale: float,
    weights: dict[tuple[str, str], float],
    sizes: dict[tuple[str, str], int],
    present: dict[str, Tensor] | None = None,
) -> float:
    """Return the contrastive loss of held-out examples, the weighted mean over pairs of modalities:
    for each pair the mean over batches of the examples that have both.

    sizes: how many such examples a batch of the training has, by pair. A batch here has as many, so
    both losses have the same chance level; a last batch that is not full is left out. If fewer
    examples are held out, each negative gets a weight above 1 to make up for it. A pair that fewer
    than two examples have is left out.
    """
    losses = {}
    for pair in weights:
        a, b, pair_ids = with_both(*pair, embeddings, ids, present)
        if present is not None and len(pair_ids) < 2:
            continue
        size = min(len(pair_ids), sizes[pair])
        negative_weight = (sizes[pair] - 1) / max(1, size - 1)
        of_batches = []
        for start in range(0, len(pair_ids) - size + 1, size):
            rows = slice(start, start + size)
            loss = contrastive_loss(
                a[rows], b[rows], scale, pair_ids[rows], negative_weight=negative_weight
            )
            of_batches.append(loss.item())
        losses[pair] = np.mean(of_batches)
    return float(np.average(list(losses.values()), weights=[weights[pair] for pair in losses]))


@torch.no_grad()
def logit_scale(model: nn.Module) -> float:
    """Return the model's scale, 1 / temperature, as a number."""
    return model.temperature().item()
