"""Canaries: what measures a served model's quality again and again, without any data of users.

A canary computes in a thread of its own, beside the model's thread. It uses the model's weights and
no request, no slot and no cache of the engine, so it changes no answer.

Pinned by tests/serving/test_model_metrics.py and tests/serving/test_monitor.py.

Shapes: B texts, T tokens, Q examples of a gallery, M width of the common space.
"""

import functools
import math
from collections.abc import Callable
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanods.gpt import GPT
from nanods.serving.engine import Engine
from nanods.serving.models import ServedModel
from nanods.training.contrastive_data import model_inputs
from nanods.training.retrieval import embed

CANARY_EXAMPLES = 64  # of a gallery


@torch.no_grad()
def canary_texts(
    model: GPT,
    B: int = 8,
    T: int = 128,
    seed: int = 0,
    is_closed: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Draw the texts that `bits_per_token` is to measure again and again, from the model: (B, T),
    or fewer tokens where `is_closed` becomes true meanwhile.

    A model's own texts are the likeliest to it on average: whatever changes the model makes them
    less likely (the Kullback-Leibler divergence is not negative). And no data is needed.
    """
    T = min(T, model.config.context_length)
    start = torch.zeros(B, 1, dtype=torch.long, device=model.embedding.weight.device)
    drawn = takewhile(lambda _: not is_closed(), model.generate(start, T - 1, seed=seed))
    return torch.stack([start.squeeze(1), *drawn], dim=1)


@torch.no_grad()
def bits_per_token(model: GPT, texts: Tensor) -> float:
    """Return the mean information of the tokens (B, T) after the first, in bits."""
    logits, _ = model(texts[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).item() / math.log(2)


def partner_distance(embeddings: dict[str, Tensor]) -> float:
    """Return the mean cosine distance between the embeddings of one example in two modalities.

    Embeddings (Q, M) by modality, such as those of a gallery's first examples, embedded anew.
    """
    first, *others = embeddings.values()
    return float(np.mean([1 - (first * other).sum(dim=-1).mean().item() for other in others]))


def canary(
    model: ServedModel, is_closed: Callable[[], bool] = lambda: False
) -> Callable[[], float] | None:
    """Return the function that measures a model's quality, where lower is better. Once `is_closed`
    it ends soon, with a value that means nothing.

    V0 to V2: the bits per token of texts that the model has drawn itself, at the first call. V3:
    the distance between the embeddings of one example in two modalities, on average over examples
    of its gallery; None without such examples.
    """
    network = model.finished.model
    if isinstance(model.worker, Engine):
        texts = functools.cache(lambda: canary_texts(network, is_closed=is_closed))
        return lambda: bits_per_token(network, texts())
    if model.gallery is None or len(model.gallery.embeddings) < 2:
        return None
    examples, config = model.gallery.examples, model.finished.config
    rows = np.flatnonzero(examples.has(*model.gallery.embeddings))[:CANARY_EXAMPLES]
    if not len(rows):
        return None
    device = next(network.parameters()).device
    inputs = {
        name: x[rows].to(device)
        for name, x in model_inputs(examples, config, model.finished.tokenizer).items()
        if name in model.gallery.embeddings
    }
    return lambda: partner_distance(embed(network, inputs)[0])
