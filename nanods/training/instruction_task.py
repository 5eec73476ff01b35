"""Instructions: learn the answers to prompts (V0 to V2). The task protocol is in
nanods/training/task.py, the data in nanods/data/instructions.py.

Three things differ from nanods/training/language_task.py:

    which tokens count   answers and their ENDs alone; prompts are read and not learnt
    the mean             over the answer tokens of the whole batch. A mean over the means of
                         micro-batches or processes would weight the tokens of short answers more
    the batch            each row is one example, of a task drawn by weight (--mix)

A process reads its rows of the batch alone, but knows which examples all rows are, so it counts
the answer tokens of the whole batch without asking the others.

Left out on purpose: several examples in one row (packing).

Shapes: B rows of a batch, T tokens of the longest row less one, V vocabulary, L layers, E experts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanods.config import Config
from nanods.data.instructions import (
    END,
    NAME,
    Encoder,
    Example,
    Instructions,
    Row,
    load_instructions,
    prompt_tokens,
)
from nanods.data.text import tokenizer_for
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_json
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.training import checkpoint
from nanods.training.commands import flag, sample_command
from nanods.training.language_task import (
    add_expert_losses,
    cross_entropy,
    eval_batch_size,
    forward_seconds,
)
from nanods.training.metrics import load_metrics, stack_loads
from nanods.training.pictures import draw_language_run

IGNORED = -100  # the target of a token that is not learnt, as in F.cross_entropy


class Batch(NamedTuple):
    """Rows of a batch, padded on the right."""

    tokens: Tensor  # (B, T)
    targets: Tensor  # (B, T): the token after each, or IGNORED
    lengths: Tensor  # (B,): tokens of each row that are no padding
    weight: float
    """The weight of one answer token in this process: the number of processes, since gradients are
    averaged over them, divided by the answer tokens of the whole batch."""


@dataclass(frozen=True)
class MicroBatch:
    rows: Batch
    count: int
    """Micro-batches in the batch that this one is a part of."""


@dataclass(frozen=True)
class Encoded:
    """The data set as rows of tokens. `val` is also what draw_language_run shows: a text."""

    name: str
    sha256: str
    train_rows: dict[str, list[Row]]
    val_rows: dict[str, list[Row]]
    val: np.ndarray
    tokenizer: ByteTokenizer | BPETokenizer


class InstructionTask:
    unit = "examples"
    headline_metric = "val_bpb"
    higher_is_better = False

    def __init__(
        self,
        config: Config,
        device: torch.device,
        data: Instructions | None = None,
        tokenizer: ByteTokenizer | BPETokenizer | None = None,
    ) -> None:
        """`data` replaces the data set that the configuration names, `tokenizer` that of the run
        that it starts from. Raises UserError for a file that cannot be used, and for a --mix that
        does not fit its tasks."""
        if config.teacher:
            raise UserError("--teacher is for texts and V3: leave it out with instructions")
        self.config, self.device, self.T = config, device, config.model.context_length
        self.teacher = None
        loaded = data or load_instructions(config.data, config.val_data, config.val_fraction)
        self.started_on, self.tokenizer = choose_tokenizer(config, loaded, tokenizer)
        encoder = Encoder(self.tokenizer, self.T)
        train_rows, val_rows = (
            rows_by_task(split, encoder) for split in (loaded.train, loaded.val)
        )
        self.cuts, self.validation = encoder.cuts, loaded.validation
        self.examples = len(loaded.train) + len(loaded.val)
        self.weights = mixture(config, train_rows)
        self.headline = [task for task in self.weights if task in val_rows]
        if not self.headline:
            raise UserError(
                f"--data {loaded.name}: no task that is trained on ({', '.join(self.weights)}) has "
                "an example for validation; give them as --val-data FILE, or another --mix"
            )
        self.end = encoder.ids[END]
        shown = np.concatenate([row.tokens for rows in val_rows.values() for row in rows[:99]])
        self.data = Encoded(loaded.name, loaded.sha256, train_rows, val_rows, shown, self.tokenizer)
        self.units_per_step = config.batch_size
        prompts = [text for e in loaded.val for role, text in e.messages if role == "user"]
        self.prompt = prompts[0] if prompts else ""

    # ---- batches and loss ------------------------------------------------------------------------

    def choose_rows(self, step: int) -> list[Row]:
        """Return the rows of a whole batch: for each a task by weight, and an example of it."""
        random = np.random.default_rng([self.config.seed, step])
        names = list(self.weights)
        tasks = random.choice(len(names), self.config.batch_size, p=list(self.weights.values()))
        rows = [self.data.train_rows[names[task]] for task in tasks]
        return [of_task[random.integers(len(of_task))] for of_task in rows]

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the rows of a batch, or the `rows` of them, and the weight of an answer token in
        the whole batch."""
        chosen = self.choose_rows(step)
        local = chosen[rows]
        answer_tokens = sum(int(row.is_target.sum()) for row in chosen)
        weight = len(chosen) / len(local) / max(1, answer_tokens)
        return self.collate(local, weight)

    def collate(self, rows: list[Row], weight: float) -> Batch:
        """Return rows as tensors on the device, padded to the longest."""
        T = max(len(row.tokens) for row in rows) - 1
        inputs = np.zeros((len(rows), T), np.int64)
        targets = np.full((len(rows), T), IGNORED, np.int64)
        for i, row in enumerate(rows):
            n = len(row.tokens) - 1
            inputs[i, :n] = row.tokens[:-1]
            targets[i, :n][row.is_target[1:]] = row.tokens[1:][row.is_target[1:]]
        lengths = torch.tensor([len(row.tokens) - 1 for row in rows])
        tensors = (torch.from_numpy(inputs), torch.from_numpy(targets), lengths)
        return Batch(*(x.to(self.device) for x in tensors), weight)

    def micro_batches(self, model: nn.Module, batch: Batch, size: int) -> list[MicroBatch]:
        """Split a batch into micro-batches of `size` rows."""
        parts = zip(*(x.split(size) for x in batch[:3]), strict=True)
        parts = [Batch(*part, batch.weight) for part in parts]
        return [MicroBatch(part, len(parts)) for part in parts]

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's share of the mean loss over the batch's answer tokens, in nats,
        and its metrics, whose means over micro-batches and processes are those of the batch.

        With experts, the metrics of LanguageTask.loss.
        """
        rows, count = micro_batch.rows, micro_batch.count
        nats, layers = self.nats(model, rows)
        loss = count * rows.weight * nats.sum()
        metrics = {"ce_loss": loss.detach()}
        loss, of_experts = add_expert_losses(loss, layers, self.config.model.moe)
        return loss / count, {"train_loss": loss.detach()} | metrics | of_experts

    def nats(self, model: nn.Module, rows: Batch) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the cross-entropy of each target, 0 where it is IGNORED, (B, T), in fp32 or fp64;
        and the stats of the layers."""
        # Experts must leave padding out; attention never reads it, as it stands at the end.
        lengths = rows.lengths if self.config.model.moe.n_expert > 1 else None
        logits, layers = model(rows.tokens, lengths=lengths)
        nats = cross_entropy(logits, rows.targets, reduction="none")
        return nats.view_as(rows.targets), layers

    # ---- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict:
        """Return the metrics of the held-out answers, in eval mode.

        Of each task `val_loss_TASK`, the mean nats of an answer token, END included, and
        `val_bpb_TASK`, the bits per byte of the answers without END, so that a model that was never
        trained on END can be compared. Tasks that are not trained on are evaluated too. `val_loss`
        and `val_bpb` are means over the tasks that are, with their weights. With experts also
        `val_load` (L, E) and its metrics.
        """
        was_training = model.training
        model.eval()
        metrics, load = {}, 0
        for task in self.data.val_rows:
            nats = text_nats = targets = answer_bytes = 0.0
            for rows in self.validation_batches(task):
                batch = self.collate(rows, 1.0)
                each, layers = self.nats(model, batch)
                is_text = (batch.targets != IGNORED) & (batch.targets != self.end)
                nats += each.double().sum().item()
                text_nats += each.double()[is_text].sum().item()
                targets += int((batch.targets != IGNORED).sum())
                answer_bytes += sum(row.answer_bytes for row in rows)
                batch_load = stack_loads(layers)
                if batch_load is not None:
                    load = load + batch_load
            metrics[f"val_loss_{task}"] = nats / targets
            metrics[f"val_bpb_{task}"] = text_nats / math.log(2) / answer_bytes
        model.train(was_training)
        total = sum(self.weights[task] for task in self.headline)
        for name in ("val_loss", "val_bpb"):
            values = [self.weights[task] * metrics[f"{name}_{task}"] for task in self.headline]
            metrics[name] = sum(values) / total
        if torch.is_tensor(load):
            metrics |= {f"val_{name}": value for name, value in load_metrics(load).items()}
        return metrics

    def validation_batches(self, task: str) -> Iterator[list[Row]]:
        """Yield the held-out rows of a task in batches of similar length: at most --eval-tokens
        over all tasks, spread evenly over the rows."""
        rows = self.data.val_rows[task]
        budget = self.config.eval_tokens // len(self.data.val_rows)
        mean = sum(len(row.tokens) for row in rows) / len(rows)
        count = min(len(rows), max(1, int(budget / mean)))
        chosen = [rows[i * len(rows) // count] for i in range(count)]
        chosen.sort(key=lambda row: len(row.tokens))
        size = eval_batch_size(self.config)
        for start in range(0, count, size):
            yield chosen[start : start + size]

    def evaluation_seconds(self, model: nn.Module) -> float:
        """Return the time of an evaluation, from the second of two passes over one batch."""
        batches = [batch for task in self.data.val_rows for batch in self.validation_batches(task)]
        batch = batches[len(batches) // 2]
        elapsed = forward_seconds(
            model, lambda: self.nats(model, self.collate(batch, 1.0))[0].sum()
        )
        tokens = sum(len(row.tokens) for rows in batches for row in rows)
        return elapsed * tokens / sum(len(row.tokens) for row in batch)

    # ---- words and pictures ----------------------------------------------------------------------

    def save_examples(self, run_dir) -> None:
        """Write nothing: answering needs no data."""

    def describe_data(self) -> str:
        data, lines = self.data, []
        for task in data.train_rows | data.val_rows:
            train, val = (len(rows.get(task, ())) for rows in (data.train_rows, data.val_rows))
            lines.append(f"{task} {train:,} + {val:,} ({self.weights.get(task, 0):.3g})")
        described = (
            f"{data.name}: rows of each task for training + validation (share of the batch): "
            f"{', '.join(lines)}, sha256 {data.sha256[:12]}\n"
            f"validation {self.validation}; {self.describe_evaluation()}"
        )
        if self.cuts.prompts or self.cuts.answers:
            described += (
                f"\ncut        of {self.examples:,} examples {self.cuts.prompts:,} prompts at the "
                f"left and {self.cuts.answers:,} answers at the end, to --context-length {self.T}"
            )
        if data.name == NAME and self.started_on in ("pydocs", None):
            described += f"\nnotice     {self.notice()}"
        return described

    def describe_evaluation(self) -> str:
        rows = self.data.val_rows
        held = sum(map(len, rows.values()))
        read = sum(len(batch) for task in rows for batch in self.validation_batches(task))
        if read == held:
            return "each evaluation reads all of it"
        return f"each evaluation reads {read:,} of {held:,} rows, spread evenly (--eval-tokens)"

    def notice(self) -> str:
        if self.config.init_from:
            return (
                f"{self.config.init_from} was trained on pydocs, which holds the answers that are "
                "held out here; start from a run on --data pydocs-train"
            )
        return "this run starts from random weights: --stage finetune --init-from RUN"

    def describe_step(self) -> str:
        return f"{self.config.batch_size} examples of up to {self.T} tokens"

    def describe_flops(self, model: GPT) -> str:
        return f"{model.flops_per_token() / 1e6:.1f} MFLOP per token"

    def describe_validation(self, metrics: dict) -> str:
        words = f"{metrics['val_bpb']:.4f} bits per byte of the answers"
        if len(self.data.val_rows) > 1:
            each = (f"{task} {metrics[f'val_bpb_{task}']:.3f}" for task in self.data.val_rows)
            words += f" ({', '.join(each)})"
        return words

    def draw(self, model: GPT, rows: list[dict]) -> list:
        """Draw the loss, what V1's heads read, and what V2's experts did."""
        return draw_language_run(self.config, model, self.data, rows)

    def show_examples(self, model: GPT) -> str:
        """Return an answer of the model, and the command that asks another question."""
        tokens = prompt_tokens([("user", self.prompt)], self.tokenizer)
        prompt = torch.tensor([tokens], device=self.device)
        generated = model.generate(prompt, 200, temperature=0, stop=[self.end])
        answer = [int(token[0]) for token in generated]
        text = self.tokenizer.decode([token for token in answer if token != self.end])
        words = flag("prompt", self.prompt) if self.prompt.isprintable() else []
        command = sample_command(self.config.run_dir, "--chat", *words)
        return f"prompt     {self.prompt}\nanswer     {text}\n\nnext       {command}"


# ---- set up --------------------------------------------------------------------------------------


def choose_tokenizer(
    config: Config, data: Instructions, tokenizer: ByteTokenizer | BPETokenizer | None
) -> tuple[str | None, ByteTokenizer | BPETokenizer]:
    """Return the data of the run that this one starts from, if it can be read, and the tokenizer:
    `tokenizer`, or else bytes, that run's BPE, or one that is learnt on the examples."""
    started_on, saved = None, None
    if config.init_from:
        try:
            state = checkpoint.load(Path(config.init_from)).state
        except UserError:
            if config.model.vocab_size > 256 and not config.resume:
                raise
        else:
            started_on, saved = state["config"]["data"], state["tokenizer"]
    if tokenizer:
        return started_on, tokenizer
    if config.model.vocab_size <= 256 or saved is None:
        texts = (text for example in data.train for _, text in example.messages)
        return started_on, tokenizer_for("\n".join(texts), config.model.vocab_size)
    return started_on, tokenizer_from_json(saved)


def rows_by_task(examples: list[Example], encoder: Encoder) -> dict[str, list[Row]]:
    """Return the rows of each task, by its name."""
    rows: dict[str, list[Row]] = {}
    for example in examples:
        for row in encoder.rows(example):
            if row.is_target.any():
                rows.setdefault(example.task, []).append(row)
    return rows


def mixture(config: Config, train: dict[str, list[Row]]) -> dict[str, float]:
    """Return the share of a batch's rows of each task that is trained on: as --mix says, else the
    same for each. Raises UserError for a task without examples."""
    weights = dict.fromkeys(train, 1.0)
    if config.mix:
        weights = {name: weight for name, weight in parse_mix(config.mix).items() if weight}
    for name in weights:
        if name not in train:
            raise UserError(
                f"--mix {config.mix}: {config.data} has no examples of {name}; its tasks are "
                f"{', '.join(train)}"
            )
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def parse_mix(mix: str) -> dict[str, float]:
    """Return the weights of "doctest=3,plain=0.1" by task. Raises UserError if it is not of this
    form, or has no positive weight."""
    weights = {}
    for part in mix.split(","):
        name, _, number = part.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            weights[name.strip()] = math.nan
    numbers = weights.values()
    if not all(0 <= number < math.inf for number in numbers) or not sum(numbers) > 0:
        raise UserError(
            f"--mix {mix}: give weights as TASK=NUMBER between commas, such as doctest=3,plain=0.1"
        )
    return weights
