"""Metrics of a step: numbers, and the experts' load, counts of shape (L, E).

Micro-batches add theirs up here, processes take the mean (ProcessGroups.average_metrics), and the
row of a step goes to nanods/training/metrics_log.py.

Shapes: L layers, E experts.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor


def accumulate_metrics(
    metrics: dict[str, Tensor], micro_metrics: dict[str, Tensor], micro_batches: int
) -> None:
    """Add the metrics of one of `micro_batches` to the batch's, in place: counts (names that begin
    with "load") as sums, all others as means."""
    for name, value in micro_metrics.items():
        is_count = name.startswith("load")
        metrics[name] = metrics.get(name, 0) + (value if is_count else value / micro_batches)


def stack_loads(layers: list[dict[str, Tensor]]) -> Tensor | None:
    """Return the assignments of each layer and expert, (L, E) integers; None for a model without
    experts."""
    loads = [stats["load"] for stats in layers if "load" in stats]
    return torch.stack(loads) if loads else None


def load_metrics(load: Tensor) -> dict:
    """Return how unevenly the experts are loaded: load (L, E) -> metrics, means over the layers.

    load_max_over_mean   the busiest expert's load over the mean: 1 if even, E if one takes all
    load_entropy         the entropy of the load as a share of ln E: 1 if even
    load                 the load itself, as lists
    """
    counts = load.cpu().double()
    share = counts / counts.sum(dim=-1, keepdim=True)
    E = load.size(-1)
    return {
        "load_max_over_mean": (share.amax(dim=-1) * E).mean().item(),
        "load_entropy": (torch.special.entr(share).sum(dim=-1) / math.log(E)).mean().item(),
        "load": load.tolist(),
    }


def read_metrics(path: Path) -> list[dict]:
    """Return the rows of a metrics.jsonl. A last line that a kill cut off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
