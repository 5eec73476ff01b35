"""Retrieval: embed examples without gradients, and measure how well each finds its partner.

Training's evaluation, sample.py, search and zero-shot classification embed with the same function.

Shapes: Q examples, M width of the space, N ids of an example, L layers, E experts.
"""

from itertools import permutations

import torch
from torch import Tensor, nn

from nanods.contrastive import median_rank, recall_at_k

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
        queries, targets, pair_ids = embeddings[a], embeddings[b], ids
        if present is not None:
            both = present[a] & present[b]
            if both.sum() < 2:
                continue
            queries, targets, pair_ids = queries[both], targets[both], ids[both]
        metrics[f"recall1_{a}_{b}"] = recall_at_k(queries, targets, 1, pair_ids)
        metrics[f"recall5_{a}_{b}"] = recall_at_k(queries, targets, 5, pair_ids)
        metrics[f"median_rank_{a}_{b}"] = median_rank(queries, targets, pair_ids)
    return metrics


@torch.no_grad()
def logit_scale(model: nn.Module) -> float:
    """Return the model's scale, 1 / temperature, as a number."""
    return model.temperature().item()
