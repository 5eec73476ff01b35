"""What is learnt: a task gives the training loop its data, its batches, their gradients and its evaluation.

`LanguageTask` predicts each next token of a text. (V3's task is nanods/training/contrastive_task.py.) Batch `step` is a function
of (seed, step) alone, so the position in the data is the step number, and a resumed run reads what the undisturbed one would
have read.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanods.config import Config
from nanods.data.shards import Tokens, window_starts
from nanods.data.text import TextData, load_text
from nanods.gpt import GPT
from nanods.training.pictures import draw

Scale = Callable[[Tensor], Tensor]  # of a loss before backward(), for fp16


class LanguageTask:
    unit, figure, better = "tokens", "val_bpb", "lower"  # what is counted; what a run is judged by

    def __init__(
        self,
        config: Config,
        device: torch.device,
        autocast: AbstractContextManager,
        data: TextData | None = None,
    ):
        """`data`: where it is not the one that the configuration names. Raises UserError if that cannot be learnt from."""
        self.config, self.device, self.autocast, self.T = (
            config,
            device,
            autocast,
            config.model.context_length,
        )
        self.data = data or load_text(config.data, config.model.vocab_size)
        self.data.require(self.T)
        self.tokenizer = self.data.tokenizer
        self.units = config.batch_size * self.T  # of a step

    def __str__(self) -> str:
        data = self.data
        return f"{data.name}: {len(data.train):,} + {len(data.val):,} tokens, sha256 {data.sha256[:12]}"

    def batch(self, step: int, rows: slice = slice(None)) -> Tensor:
        """Windows of T + 1 tokens of the training text: (batch_size, T + 1), or these rows of them."""
        text = [self.data.train[start : start + self.T + 1] for start in self.starts(step)[rows]]
        return torch.from_numpy(np.stack(text).astype(np.int64)).to(self.device)

    def starts(self, step: int) -> np.ndarray:
        """Where the windows of a batch begin: (batch_size,). Of shards each window once an epoch, else at random places."""
        config, total = self.config, len(self.data.train)
        if isinstance(self.data.train, Tokens):
            return window_starts(step, config.batch_size, total, self.T, config.seed)
        return np.random.default_rng([config.seed, step]).integers(
            0, total - self.T, size=config.batch_size
        )

    def gradients(
        self, model: nn.Module, windows: Tensor, micro_batch: int, scale: Scale
    ) -> tuple[float, dict[str, Tensor]]:
        """Accumulate the gradient of the mean loss over the batch, micro-batch by micro-batch -> that loss, and its parts.

        The experts' losses have the micro-batch as their unit, so their mean depends on its size; the load is a sum.
        """
        total, parts, batches = 0.0, {}, windows.split(micro_batch)
        for batch in batches:
            with self.autocast:
                loss, told = self.loss(model, batch)
            scale(loss / len(batches)).backward()
            total += loss.item() / len(batches)
            accumulate_metrics(parts, told, len(batches))
        return total, parts

    def loss(self, model: nn.Module, windows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """windows (B, T + 1) -> what is minimised (), in nats, and its parts.

        `ce_loss` is the mean cross-entropy of each next token. With experts also `balance_loss` and `z_loss`, means over the
        layers and not yet weighed, `dropped`, and each layer's `load` (L, E).
        """
        logits, layers = model(windows[:, :-1])
        loss = cross_entropy(logits, windows[:, 1:])
        parts = {"ce_loss": loss.detach()}
        load = stack_loads(layers)
        if load is not None:
            moe, mean = self.config.model.moe, {}
            for name in ("balance_loss", "z_loss", "dropped"):
                mean[name] = torch.stack([stats[name] for stats in layers]).mean()
            loss = (
                loss
                + moe.balance_coefficient * mean["balance_loss"]
                + moe.z_coefficient * mean["z_loss"]
            )
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
        pairs = [
            (
                torch.stack(inputs[i : i + 32][: whole - i]),
                torch.stack(targets[i : i + 32][: whole - i]),
            )
            for i in batches
        ]
        if whole < len(inputs):
            pairs.append((inputs[-1][None], targets[-1][None]))
        total, load, was_training = 0.0, 0, model.training
        model.eval()
        for x, y in pairs:
            with self.autocast:
                logits, layers = model(x.to(self.device))
            total += cross_entropy(logits, y.to(self.device)).item() * y.numel()
            if (more := stack_loads(layers)) is not None:
                load = load + more
        model.train(was_training)
        predicted = len(tokens) - 1
        val_loss = total / predicted
        row = {
            "val_loss": val_loss,
            "val_bpb": val_loss / math.log(2) * len(tokens) / self.data.val_bytes,
        }
        if torch.is_tensor(load):
            row |= {f"val_{name}": value for name, value in load_metrics(load).items()}
        return row

    # ---- in words and pictures -----------------------------------------------------------------------------------------------

    def work(self, model: GPT) -> str:
        return f"{model.flops_per_token() / 1e6:.1f} MFLOP per token"

    def size(self) -> str:
        return f"{self.config.batch_size} x {self.T} tokens"

    def got(self, row: dict) -> str:
        return f"validation loss {row['val_loss']:.4f}, {row['val_bpb']:.4f} bits per byte"

    def draw(self, model: GPT, rows: list[dict]) -> list[Path]:
        return draw(self.config, model, self.data, rows)

    def show(self, model: GPT) -> str:
        """A text of the model's own, and how to get another."""
        prompt = torch.tensor([self.tokenizer.encode("\n").tolist()], device=self.device)
        ids = [
            int(token[0])
            for token in model.generate(prompt, 300, temperature=0.8, seed=self.config.seed)
        ]
        return f"sample     {self.tokenizer.decode(ids)}\n\nnext       python sample.py {self.config.run_dir} --prompt 'Return the'"


def accumulate_metrics(
    parts: dict[str, Tensor], told: dict[str, Tensor], micro_batches: int
) -> None:
    """Add what one of some micro-batches told: loads are summed, all else is a mean over them."""
    for name, value in told.items():
        parts[name] = parts.get(name, 0) + (
            value if name.startswith("load") else value / micro_batches
        )


def stack_loads(layers: list[dict[str, Tensor]]) -> Tensor | None:
    """Assignments of each layer and expert: (L, E), integers; None for a model without experts."""
    loads = [stats["load"] for stats in layers if "load" in stats]
    return torch.stack(loads) if loads else None


def load_metrics(load: Tensor) -> dict:
    """load (L, E) -> how uneven it is: the largest over the mean, 1 where even and E where one takes all, and the entropy as
    a share of ln E, 1 where even; both means over the layers. And the load itself, as lists."""
    share = load.double() / load.sum(dim=-1, keepdim=True)
    return {
        "load_max_over_mean": (share.amax(dim=-1) * load.size(-1)).mean().item(),
        "load_entropy": (torch.special.entr(share).sum(dim=-1) / math.log(load.size(-1)))
        .mean()
        .item(),
        "load": load.tolist(),
    }


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, in at least fp32: logits (B, T, V), targets (B, T) -> ()."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
