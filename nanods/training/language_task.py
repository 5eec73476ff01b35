"""Language modelling: predict each next token of a text (V0 to V2). The task protocol is in
nanods/training/task.py.

The batch of a step is a function of (seed, step) alone. So the step number is the position in the
data, and a resumed run reads what an uninterrupted one would have read.

Shapes: B windows of a batch, T tokens of context, V vocabulary, L layers, E experts.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nanods.config import Config
from nanods.data.shards import Tokens, window_starts
from nanods.data.text import TextData, load_text
from nanods.gpt import GPT, MoEConfig
from nanods.training.commands import first_words, flag, sample_command
from nanods.training.distill import Teacher, logit_loss, mix
from nanods.training.metrics import load_metrics, stack_loads
from nanods.training.pictures import draw_language_run

EVAL_BATCH = 32  # windows that are evaluated at a time, at most
EVAL_LOGIT_BYTES = 256 << 20  # of the fp32 logits of such a batch, or those of one window


@dataclass(frozen=True)
class MicroBatch:
    windows: Tensor  # (b, T + 1)
    count: int
    """Micro-batches in the batch that this one is a part of."""


class LanguageTask:
    unit = "tokens"
    headline_metric = "val_bpb"
    higher_is_better = False
    teacher: Teacher | None = None  # what run.py sets for --teacher

    def __init__(self, config: Config, device: torch.device, data: TextData | None = None) -> None:
        """`data` replaces the data set that the configuration names. Raises UserError if the text
        is too short."""
        self.config, self.device, self.T = config, device, config.model.context_length
        self.data = data or load_text(
            config.data, config.model.vocab_size, config.val_data, config.val_fraction
        )
        self.data.require(self.T)
        self.tokenizer = self.data.tokenizer
        self.units_per_step = config.batch_size * self.T

    # ---- batches and loss ------------------------------------------------------------------------

    def batch(self, step: int, rows: slice = slice(None)) -> Tensor:
        """Return windows of the training text, (batch_size, T + 1), or the `rows` of them.

        Each of the first steps cuts them into p shorter ones, (p batch_size, T / p + 1), where the
        configuration says so: the same tokens, each predicted from those of its own part.
        """
        starts = self.window_starts(step)[rows]
        text = [self.data.train[start : start + self.T + 1] for start in starts]
        windows = torch.from_numpy(np.stack(text).astype(np.int64)).to(self.device)
        return cut(windows, self.parts(step))

    def parts(self, step: int) -> int:
        """Return into how many parts a step cuts its windows."""
        is_short = step < self.config.short_context * self.config.steps
        return self.config.short_parts if is_short else 1

    def window_starts(self, step: int) -> np.ndarray:
        """Return where the windows of a batch begin, (batch_size,).

        Each window is read once an epoch; with --sampling random, a text in memory is read at
        random positions.
        """
        config, total = self.config, len(self.data.train)
        if config.sampling == "epochs" or isinstance(self.data.train, Tokens):
            return window_starts(step, config.batch_size, total, self.T, config.seed)
        random = np.random.default_rng([config.seed, step])
        return random.integers(0, total - self.T, size=config.batch_size)

    def micro_batches(self, model: nn.Module, batch: Tensor, size: int) -> list[MicroBatch]:
        """Split windows into micro-batches of `size` windows of T + 1 tokens, or of as many tokens
        in shorter ones."""
        context = self.config.model.context_length
        parts = batch.split(size * (context // (batch.size(1) - 1)))
        return [MicroBatch(part, len(parts)) for part in parts]

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's share of the batch's mean loss, in nats, and its metrics.

        `ce_loss` is the mean cross-entropy of each next token. With experts there are also
        `balance_loss` and `z_loss`, means over the layers before their weights, the share of
        `dropped` assignments, and the `load` (L, E). The experts' losses are means over one
        micro-batch, so their value depends on its size. With a teacher, `distill_loss` is the
        distance of the predictions to its own.
        """
        windows = micro_batch.windows
        logits, layers = model(windows[:, :-1])
        loss = cross_entropy(logits, windows[:, 1:])
        metrics = {"ce_loss": loss.detach()}
        if self.teacher is not None:
            teacher_logits = self.teacher.logits(windows[:, :-1])
            distance = logit_loss(logits, teacher_logits, self.config.distill_temperature)
            loss = mix(loss, distance, self.config.distill_weight)
            metrics["distill_loss"] = distance.detach()
        loss, of_experts = add_expert_losses(loss, layers, self.config.model.moe)
        return loss / micro_batch.count, {"train_loss": loss.detach()} | metrics | of_experts

    # ---- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict:
        """Return the cross-entropy over the validation text, in windows of T that do not overlap
        (the last may be shorter). The model runs in eval mode, so no expert drops a token.

        Of a text of more than --eval-tokens, evenly spread windows are read. `val_loss` is in nats
        per token; `val_bpb` in bits per byte of the text, which compares across tokenizers. With
        experts also `val_load` (L, E) over all tokens read, and its metrics.
        """
        was_training = model.training
        model.eval()
        total_loss, total_tokens, load = 0.0, 0, 0
        batches = self.validation_batches()
        is_worker = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        hidden = True if is_worker else None  # None: shown where stderr is a terminal
        for windows in tqdm(batches, desc="evaluating", delay=2, leave=False, disable=hidden):
            inputs, targets = self.validation_windows(windows)
            logits, layers = model(inputs)
            total_loss += cross_entropy(logits, targets).item() * targets.numel()
            total_tokens += targets.numel()
            batch_load = stack_loads(layers)
            if batch_load is not None:
                load = load + batch_load
        model.train(was_training)
        val_loss = total_loss / total_tokens
        bits_per_token = val_loss / math.log(2)
        val_bpb = bits_per_token * len(self.data.val) / self.data.val_bytes
        metrics = {"val_loss": val_loss, "val_bpb": val_bpb}
        if torch.is_tensor(load):
            metrics |= {f"val_{name}": value for name, value in load_metrics(load).items()}
        return metrics

    def validation_batches(self) -> list[np.ndarray]:
        """Return the numbers of the windows that an evaluation reads, in batches of equally long
        windows. Window i begins at token i T of the validation text."""
        count, rest = divmod(len(self.data.val) - 1, self.T)
        windows = np.arange(count)
        if len(self.data.val) - 1 > self.config.eval_tokens:
            wanted = min(count, max(1, self.config.eval_tokens // self.T))
            windows, rest = np.arange(wanted) * count // wanted, 0
        size = eval_batch_size(self.config)
        batches = [windows[start : start + size] for start in range(0, len(windows), size)]
        return [*batches, np.array([count])] if rest else batches

    def validation_windows(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of some windows of the validation text, each (B, T)."""
        T = self.T
        text = np.stack([self.data.val[i * T : i * T + T + 1] for i in windows])
        tokens = torch.from_numpy(text.astype(np.int64)).to(self.device)
        return tokens[:, :-1], tokens[:, 1:]

    def evaluation_seconds(self, model: nn.Module) -> float:
        """Return the time of an evaluation, from the second of two passes over its first batch."""
        batches = self.validation_batches()

        def forward() -> Tensor:
            inputs, targets = self.validation_windows(batches[0])
            return cross_entropy(model(inputs)[0], targets)

        return forward_seconds(model, forward) * sum(map(len, batches)) / len(batches[0])

    # ---- words and pictures ----------------------------------------------------------------------

    def save_examples(self, run_dir: Path) -> None:
        """Write nothing: generating text needs no data."""

    def describe_data(self) -> str:
        data, notices = self.data, list(self.data.notices)
        if self.config.sampling == "random" and isinstance(data.train, Tokens):
            notices.append("token shards are read in epochs: --sampling random has no effect")
        return (
            f"{data.name}: {len(data.train):,} training + {len(data.val):,} validation tokens, "
            f"sha256 {data.sha256[:12]}\nvalidation {data.validation}; {self.describe_evaluation()}"
            + "".join(f"\nnotice     {notice}" for notice in notices)
        )

    def describe_evaluation(self) -> str:
        read = sum(map(len, self.validation_batches())) * self.T
        if read >= len(self.data.val) - 1:
            return "each evaluation reads all of it"
        return (
            f"each evaluation reads {read:,} of its {len(self.data.val):,} tokens, in evenly "
            "spread windows (--eval-tokens)"
        )

    def describe_step(self) -> str:
        return f"{self.config.batch_size} x {self.T} tokens"

    def describe_flops(self, model: GPT) -> str:
        return f"{model.flops_per_token() / 1e6:.1f} MFLOP per token"

    def describe_validation(self, metrics: dict) -> str:
        loss, bits = metrics["val_loss"], metrics["val_bpb"]
        return f"validation loss {loss:.4f}, {bits:.4f} bits per byte"

    def draw(self, model: GPT, rows: list[dict]) -> list[Path]:
        """Draw the loss, what V1's heads read, and what V2's experts did."""
        return draw_language_run(self.config, model, self.data, rows)

    def show_examples(self, model: GPT) -> str:
        """Return a text that the model wrote, and the command that writes another."""
        prompt = torch.tensor([self.tokenizer.encode("\n").tolist()], device=self.device)
        generated = model.generate(prompt, 300, temperature=0.8, seed=self.config.seed)
        text = self.tokenizer.decode([int(token[0]) for token in generated])
        validation_text = self.tokenizer.decode(self.data.val[:400].tolist())
        words = first_words(validation_text)
        command = sample_command(self.config.run_dir, *(flag("prompt", words) if words else []))
        return f"sample     {text}\n\nnext       {command}"


def cut(windows: Tensor, parts: int) -> Tensor:
    """Cut each window into parts that overlap by one token, which is the target of one and the
    input of the next: (B, T + 1) -> (parts B, T / parts + 1)."""
    T = (windows.size(1) - 1) // parts
    return windows.unfold(1, T + 1, T).flatten(0, 1)


def eval_batch_size(config: Config) -> int:
    """Return the number of windows that are evaluated at a time: their logits take at most
    EVAL_LOGIT_BYTES, if one window's do."""
    window_bytes = 4 * config.model.context_length * config.model.vocab_size
    return min(EVAL_BATCH, max(1, EVAL_LOGIT_BYTES // window_bytes))


def add_expert_losses(
    loss: Tensor, layers: list[dict[str, Tensor]], moe: MoEConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss with the experts' weighted losses, and their metrics; without experts the
    loss as it is."""
    load = stack_loads(layers)
    if load is None:
        return loss, {}
    means = {
        name: torch.stack([stats[name] for stats in layers]).mean()
        for name in ("balance_loss", "z_loss", "dropped")
    }
    loss = loss + moe.balance_coefficient * means["balance_loss"]
    loss = loss + moe.z_coefficient * means["z_loss"]
    return loss, {name: value.detach() for name, value in means.items()} | {"load": load}


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the mean over all positions, in fp32 or fp64: logits (B, T, V), targets (B, T).

    `reduction` is that of F.cross_entropy: "none" returns the value of each position, (B T,).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def forward_seconds(model: nn.Module, forward: Callable[[], Tensor]) -> float:
    """Return the time of a forward pass in eval mode, the second of two; `forward` returns a
    scalar."""
    was_training = model.training
    model.eval()
    for _ in range(2):
        start = time.perf_counter()
        forward().item()  # waits for the GPU
        elapsed = time.perf_counter() - start
    model.train(was_training)
    return elapsed
