"""What is learnt: a task gives the training loop its batches, its loss and its evaluation.

`LanguageModelling` predicts each next token of a text. Batch `step` is a function of (seed, step) alone, so the position in
the data is the step number, and a resumed run reads what the undisturbed one would have read.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanods.config import Config
from nanods.data.text import TextData


class LanguageModelling:
    def __init__(self, config: Config, data: TextData, device: torch.device) -> None:
        data.require(config.model.context_length)
        self.config, self.data, self.device = config, data, device
        self.T = config.model.context_length

    def batch(self, step: int) -> Tensor:
        """Windows of T + 1 tokens at random places in the training text: (batch_size, T + 1)."""
        random = np.random.default_rng([self.config.seed, step])
        starts = random.integers(0, len(self.data.train) - self.T, size=self.config.batch_size)
        windows = np.stack([self.data.train[start : start + self.T + 1] for start in starts])
        return torch.from_numpy(windows.astype(np.int64)).to(self.device)

    def loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        """Mean cross-entropy of each next token, in nats: windows (B, T + 1) -> ()."""
        logits, _ = model(windows[:, :-1])
        return cross_entropy(logits, windows[:, 1:])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Pure cross-entropy over the whole validation text, in windows of T that do not overlap (the last may be short).

        val_loss in nats per token; val_bpb in bits per byte of the text, which compares across tokenisers.
        """
        tokens = torch.from_numpy(self.data.val.astype(np.int64))
        inputs, targets = tokens[:-1].split(self.T), tokens[1:].split(self.T)
        whole = len(inputs) - (len(inputs[-1]) < self.T)
        batches = list(range(0, whole, 32))
        pairs = [(torch.stack(inputs[i : i + 32][: whole - i]), torch.stack(targets[i : i + 32][: whole - i])) for i in batches]
        if whole < len(inputs):
            pairs.append((inputs[-1][None], targets[-1][None]))
        total = 0.0
        for x, y in pairs:
            logits, _ = model(x.to(self.device))
            total += cross_entropy(logits, y.to(self.device)).item() * y.numel()
        predicted = len(tokens) - 1
        val_loss = total / predicted
        return {"val_loss": val_loss, "val_bpb": val_loss / math.log(2) * len(tokens) / self.data.val_bytes}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, in at least fp32: logits (B, T, V), targets (B, T) -> ()."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
