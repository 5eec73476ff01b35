"""What train.py asks of a task: batches, the loss of a micro-batch, and an evaluation.

There are three: `LanguageTask` predicts the next token of a text (V0 to V2), `InstructionTask` the
answers to prompts (V0 to V2), and `ContrastiveTask` learns which caption, image and sound belong
together (V3). train.py's loop is the same for all:

    batch = task.batch(step, rows)                      # this process's part of the batch
    for micro_batch in task.micro_batches(model, batch, size):
        loss, metrics = task.loss(model, micro_batch)   # its share of the batch's loss
        loss.backward()                                 # gradients add up

The shares add up: after the last micro-batch, `.grad` is the gradient of the mean loss of this
process's batch. The mean over the processes, each with equally many examples, is then the gradient
of the whole batch's loss. (InstructionTask takes the mean over the answer tokens of the whole
batch, so the mean of a process alone means nothing.)
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanods.config import Config
from nanods.data.instructions import is_instructions
from nanods.errors import UserError
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.distill import Teacher
from nanods.training.instruction_task import InstructionTask
from nanods.training.language_task import LanguageTask
from nanods.training.metrics import accumulate_metrics


class Task(Protocol):
    """The members that train.py, the report and the planner's forecast use.

    Shapes: B examples of this process's batch, L layers, E experts.
    """

    config: Config
    """The configuration, fitted to the data: V3 has the modalities that the data has."""
    unit: str
    """What is counted along the run: "tokens" or "examples"."""
    units_per_step: int
    """How many of them one optimizer step reads, over all processes."""
    headline_metric: str
    """The metric of `evaluate` by which a run is judged, such as "val_bpb"."""
    higher_is_better: bool
    """Whether a larger headline metric is the better one."""
    device: torch.device
    """Where batches go."""
    data: Any
    """The data set. Its `sha256` is stored in every checkpoint, so that a run never resumes on
    other data."""
    tokenizer: Any
    """The tokenizer, stored in every checkpoint by its `to_json()`."""
    teacher: Teacher | None
    """With --teacher, the model whose answers are part of `loss`; of `evaluate` they never are."""

    def batch(self, step: int, rows: slice = slice(None)) -> Any:
        """Return the examples `rows` of the batch of one step, on the device: a function of (seed,
        step) alone."""

    def micro_batches(self, model: nn.Module, batch: Any, size: int) -> list[Any]:
        """Split a batch of B examples into micro-batches of `size`.

        A task whose loss compares the whole batch prepares here what each micro-batch needs of the
        others.
        """

    def loss(self, model: nn.Module, micro_batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's share of the loss to minimise, a scalar with a graph, and its
        metrics, without one.

        Metrics are scalars, of which train.py takes the mean over micro-batches and processes, or
        integer counts whose name begins with "load", of which it takes the sum: `load` (L, E), the
        tokens of each expert. "train_loss" is always among them: the loss to minimise, in nats.
        """

    def evaluate(self, model: nn.Module) -> dict:
        """Return the validation metrics as numbers and lists. `val_loss` is free of auxiliary
        losses."""

    def evaluation_seconds(self, model: nn.Module) -> float:
        """Return about how long one `evaluate` takes, measured on a part of it."""

    def save_examples(self, run_dir: Path) -> None:
        """Write what sample.py needs of the data to a new run directory."""

    def describe_data(self) -> str:
        """Return what is known of the data set: name, size, hash, and what the user should know.
        Lines after the first begin with a word and have their text at the same column."""

    def describe_step(self) -> str:
        """Return what one optimizer step reads, in words."""

    def describe_flops(self, model: nn.Module) -> str:
        """Return the floating-point operations of training on one token or example, in words."""

    def describe_validation(self, metrics: dict) -> str:
        """Return the main metrics of an evaluation, in words."""

    def draw(self, model: nn.Module, rows: list[dict]) -> list[Path]:
        """Draw the pictures of a finished run from its metrics, one row per step. Returns the files
        written."""

    def show_examples(self, model: nn.Module) -> str:
        """Return a sample of what the model does, and the command that shows more."""


def make_task(config: Config, device: torch.device, tokenizer: Any = None) -> Task:
    """Return the task of a configuration: contrastive learning where it names modalities, else
    answering where the data are instructions, else language modelling.

    `tokenizer`: that of the run, if it is not a new one. The one of a text belongs to its data set.
    """
    if config.multimodal.modalities:
        return ContrastiveTask(config, device, tokenizer=tokenizer)
    if is_instructions(config.data):
        return InstructionTask(config, device, tokenizer=tokenizer)
    if config.mix:
        raise UserError(f"--mix {config.mix}: --data {config.data} are no instructions with tasks")
    return LanguageTask(config, device)


def accumulate_gradients(
    task: Task,
    model: nn.Module,
    batch: Any,
    micro_batch_size: int,
    autocast: AbstractContextManager | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of a batch's loss to `.grad` and return the metrics: one step of train.py's
    loop, up to the optimizer.

    For tests, benchmarks and the forecast. train.py writes the same lines out.
    """
    metrics: dict[str, Tensor] = {}
    autocast = autocast or nullcontext()
    with autocast:
        micro_batches = task.micro_batches(model, batch, micro_batch_size)
    for micro_batch in micro_batches:
        with autocast:
            loss, micro_metrics = task.loss(model, micro_batch)
        loss.backward()
        accumulate_metrics(metrics, micro_metrics, len(micro_batches))
    return metrics
