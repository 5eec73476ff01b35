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

    def loss(self, model: nn.Module, windows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """windows (B, T + 1) -> what is minimised (), in nats, and its parts.

        `ce_loss` is the mean cross-entropy of each next token. With experts also `balance_loss` and `z_loss`, means over the
        layers and not yet weighed, `dropped`, and each layer's `load` (L, E).
        """
        logits, layers = model(windows[:, :-1])
        loss = cross_entropy(logits, windows[:, 1:])
        parts = {"ce_loss": loss.detach()}
        load = stacked_load(layers)
        if load is not None:
            moe, mean = self.config.model.moe, {}
            for name in ("balance_loss", "z_loss", "dropped"):
                mean[name] = torch.stack([stats[name] for stats in layers]).mean()
            loss = loss + moe.balance_coefficient * mean["balance_loss"] + moe.z_coefficient * mean["z_loss"]
            parts |= {name: value.detach() for name, value in mean.items()} | {"load": load}
        return loss, parts

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict:
        """Pure cross-entropy over the whole validation text, in windows of T that do not overlap (the last may be short).

        val_loss in nats per token; val_bpb in bits per byte of the text, which compares across tokenisers. With experts also
        the load of the whole text, `val_load` (L, E), and its figures. Nothing is dropped: the model is in eval mode.
        """
        tokens = torch.from_numpy(self.data.val.astype(np.int64))
        inputs, targets = tokens[:-1].split(self.T), tokens[1:].split(self.T)
        whole = len(inputs) - (len(inputs[-1]) < self.T)
        batches = list(range(0, whole, 32))
        pairs = [(torch.stack(inputs[i : i + 32][: whole - i]), torch.stack(targets[i : i + 32][: whole - i])) for i in batches]
        if whole < len(inputs):
            pairs.append((inputs[-1][None], targets[-1][None]))
        total, load, was_training = 0.0, 0, model.training
        model.eval()
        for x, y in pairs:
            logits, layers = model(x.to(self.device))
            total += cross_entropy(logits, y.to(self.device)).item() * y.numel()
            if (more := stacked_load(layers)) is not None:
                load = load + more
        model.train(was_training)
        predicted = len(tokens) - 1
        val_loss = total / predicted
        row = {"val_loss": val_loss, "val_bpb": val_loss / math.log(2) * len(tokens) / self.data.val_bytes}
        if torch.is_tensor(load):
            row |= {f"val_{name}": value for name, value in load_figures(load).items()}
        return row


def stacked_load(layers: list[dict[str, Tensor]]) -> Tensor | None:
    """Assignments of each layer and expert: (L, E), integers; None for a model without experts."""
    loads = [stats["load"] for stats in layers if "load" in stats]
    return torch.stack(loads) if loads else None


def load_figures(load: Tensor) -> dict:
    """load (L, E) -> how uneven it is: the largest over the mean, 1 where even and E where one takes all, and the entropy as
    a share of ln E, 1 where even; both means over the layers. And the load itself, as lists."""
    share = load.double() / load.sum(dim=-1, keepdim=True)
    return {
        "load_max_over_mean": (share.amax(dim=-1) * load.size(-1)).mean().item(),
        "load_entropy": (torch.special.entr(share).sum(dim=-1) / math.log(load.size(-1))).mean().item(),
        "load": load.tolist(),
    }


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, in at least fp32: logits (B, T, V), targets (B, T) -> ()."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
