"""--ewc: what holds a run's weights near those of another run (nanods/ewc.py).

It is computed before the first step from the last checkpoint and the data of the other run, and
kept in this run's directory, so that a resumed run needs neither:

    RUN/consolidation.safetensors    "weights/NAME" and "fisher/NAME" of each parameter

If the other run was trained with --ewc itself, the weights that it held stay held: the penalties of
all tasks add up.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nanods.build import build_model
from nanods.config import Config, from_dict
from nanods.data.tokenizer import tokenizer_from_json
from nanods.errors import UserError
from nanods.ewc import Consolidation, consolidate, fisher_diagonal, trainable
from nanods.files import write_and_rename
from nanods.training import checkpoint
from nanods.training.instruction_task import IGNORED, Batch
from nanods.training.language_task import cross_entropy
from nanods.training.task import Task, make_task
from nanods.training.warm_start import check_sizes

FILE = "consolidation.safetensors"
BATCH = 8  # sequences whose gradients are computed at a time


def check(config: Config, mesh: object | None) -> tuple[checkpoint.Checkpoint, Config] | None:
    """Raise UserError where --ewc cannot be used: V3, a sharded model (its mesh), or a run of other
    sizes. Returns what `read_run` does; None for a run that is resumed, which needs it no more."""
    if config.multimodal.modalities:
        raise UserError(f"--ewc {config.ewc}: for V0 to V2, not for {config.preset}")
    if mesh is not None:
        raise UserError(
            f"--ewc {config.ewc}, --mesh {mesh}: each process must hold whole weights; use dp, or "
            "one process"
        )
    return None if config.resume else read_run(config)


def read_run(config: Config) -> tuple[checkpoint.Checkpoint, Config]:
    """Return the last checkpoint of the run that --ewc names, and its configuration. Raises
    UserError if there is none, or if its weights are not those of such a model."""
    path = Path(config.ewc)
    try:
        saved = checkpoint.load(path)
        checkpoint.require_floats(saved)
    except UserError as error:
        raise UserError(f"--ewc {path}: {error}") from None
    source = from_dict(saved.state["config"])
    if source.multimodal.modalities:
        raise UserError(f"--ewc {path}: a run of V3; name one of V0 to V2")
    check_sizes(config, source, f"--ewc {path}")
    has, wants = source.model.moe.n_expert, config.model.moe.n_expert
    if has != wants:
        raise UserError(
            f"--ewc {path}: that run has {has} experts, asked for: {wants}; its weights fit only a "
            "model with as many"
        )
    return saved, source


def make(
    config: Config,
    task: Task,
    saved: checkpoint.Checkpoint,
    source: Config,
    device: torch.device,
    dtype: torch.dtype,
) -> Consolidation:
    """Return what --ewc holds, from the other run's checkpoint and configuration, and print it."""
    if saved.state["tokenizer"] != task.tokenizer.to_json():
        raise UserError(f"--ewc {config.ewc}: that run has another tokenizer")
    with torch.random.fork_rng(devices=[]):  # the run's own random stream stays as it is
        model = build_model(source)
    checkpoint.restore_model(model, saved.model, saved.path)
    model = model.to(device, dtype)
    weights = {name: p.detach().clone() for name, p in trainable(model).items()}
    if config.ewc_fisher == "none":
        fisher, how = {name: torch.ones_like(w) for name, w in weights.items()}, "1 for each weight"
    else:
        sequences, mask = read_sequences(config, source, saved, device)
        if config.ewc_fisher == "batch":
            fisher = batch_gradient_squares(model, sequences, mask, source.batch_size)
        else:
            fisher = fisher_diagonal(
                model, sequences, config.ewc_fisher, BATCH, config.seed, mask=mask
            )
        how = f"{config.ewc_fisher}, of {len(sequences):,} sequences of {source.data}"
    trace = sum(F.sum().item() for F in fisher.values())
    held, also = Consolidation(weights, fisher), ""
    if path := checkpoint.find_file(Path(config.ewc), FILE):
        held = consolidate(load(path.parent, device, dtype), held)
        also = "; and what that run held"
    print(f"ewc        {saved.path}: Fisher information {how}, trace {trace:.6g}{also}")
    return held


def read_sequences(
    config: Config, source: Config, saved: checkpoint.Checkpoint, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return sequences (S, T + 1) of the other run's training data, and at which of their T
    positions that run predicts (None: at all). Raises UserError if the data cannot be read."""
    source = replace(
        source, batch_size=config.ewc_sequences, micro_batch=None, seed=config.seed, resume=True
    )
    try:
        task = make_task(source, device, tokenizer_from_json(saved.state["tokenizer"]))
    except UserError as error:
        raise UserError(f"--ewc {config.ewc}: its data cannot be read: {error}") from None
    if task.data.sha256 != saved.state["data_sha256"]:
        print(f"notice     {source.data} has changed since {config.ewc} was trained on it")
    batch = task.batch(0)
    if not isinstance(batch, Batch):
        return batch, None
    last = batch.targets[:, -1:].clamp(min=0)
    return torch.cat([batch.tokens, last], dim=1), batch.targets != IGNORED


def batch_gradient_squares(
    model: nn.Module, sequences: Tensor, mask: Tensor | None, batch_size: int
) -> dict[str, Tensor]:
    """Return the mean of the squared gradients of batches: the common mistake.

    Within a batch the sequences' gradients cancel, so the result shrinks as the batch grows.
    """
    model.eval()
    parameters = trainable(model)
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    batches = sequences.split(batch_size)
    for number, batch in enumerate(batches):
        targets = batch[:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~mask.split(batch_size)[number], IGNORED)
        logits = model(batch[:, :-1])[0]
        predicted = (targets != IGNORED).sum()
        loss = cross_entropy(logits, targets) * predicted / len(batch)  # the mean over sequences
        gradients = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                fisher[name] += gradient.square() / len(batches)
    return fisher


# ---- on disk -------------------------------------------------------------------------------------


def save(held: Consolidation, run_dir: Path) -> None:
    tensors = {}
    for part in ("weights", "fisher"):
        for name, x in getattr(held, part).items():
            tensors[f"{part}/{name}"] = x.detach().cpu().contiguous()
    write_and_rename(run_dir / FILE, lambda file: file.write(to_bytes(tensors)))


def load(run_dir: Path, device: torch.device, dtype: torch.dtype) -> Consolidation:
    """Return what `save` wrote. Raises UserError if it is missing or damaged."""
    try:
        tensors = load_file(run_dir / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{run_dir / FILE} cannot be read ({error}): it holds what --ewc needs; start a new run"
        ) from None
    parts = {"weights": {}, "fisher": {}}
    for key, x in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = x.to(device, dtype)
    return Consolidation(**parts)
