"""Checkpoints: safetensors and JSON, written whole or not at all.

    RUN/step_000060/model.safetensors        the weights, by their names in the model
    RUN/step_000060/optimizer.safetensors    the optimizers' state, the random state, and weights
                                             that only training needs (TRAINING_ONLY)
    RUN/step_000060/state.json               configuration, tokenizer, step, seconds so far
    RUN/step_000060/SHA256SUMS               of the three; `sha256sum -c SHA256SUMS` checks them
    RUN/best/step_000040/                    the same, of the step with the best evaluation so far

A checkpoint is written under a temporary name, synced to disk, and renamed. A process that is
killed while it writes leaves the earlier checkpoints untouched. Loading takes the newest checkpoint
that is whole, with a warning for each that is not. Nothing is ever unpickled. Runs whose weights
are sharded write and read the same files, each process its own part
(nanods/distributed/checkpoint.py).
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanods.build import build_model
from nanods.config import Config, from_dict
from nanods.data.download import file_sha256
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.multimodal import Multimodal
from nanods.quantize import FORMATS, fake_quantize_model, quantize
from nanods.training.distill import PROJECTION
from nanods.training.muon import Muon

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
BEST = "best"
TRAINING_ONLY = f"{PROJECTION}."
"""How the names of weights begin that only training needs: a student's map to its teacher's space.
They are stored in optimizer.safetensors, so that model.safetensors is a model as any other."""


@dataclass
class Checkpoint:
    path: Path
    state: dict
    """What state.json holds."""

    @property
    def model(self) -> dict[str, Tensor]:
        """The weights by name, read from disk at each access."""
        return load_file(self.path / FILES[0])

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """What `optimizer_tensors` returned, read from disk at each access."""
        return load_file(self.path / FILES[1])


# ---- writing -------------------------------------------------------------------------------------


def save(
    run_dir: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict,
    keep: int = Config.keep_checkpoints,
) -> None:
    """Write RUN/step_NNNNNN and delete all other checkpoints but the last `keep - 1`.

    Raises OSError (disk full, not writable); the earlier checkpoints are untouched then.
    """

    def write_tensors(folder: Path) -> None:
        for file, tensors in zip(FILES, (model, optimizer), strict=False):
            on_cpu = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
            save_file(on_cpu, folder / file)

    write_checkpoint(run_dir, step, state, write_tensors, keep)


def write_checkpoint(
    run_dir: Path,
    step: int,
    state: dict,
    write_tensors: Callable[[Path], None],
    keep: int = Config.keep_checkpoints,
) -> None:
    """Do what `save` does, where `write_tensors(folder)` writes the two files of tensors."""

    def write_files(folder: Path) -> None:
        write_tensors(folder)
        state_json = json.dumps(state, indent=1) + "\n"
        (folder / "state.json").write_text(state_json, encoding="utf-8")
        sums = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in FILES)
        (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")

    write_folder(run_dir, step, write_files, keep)


def link_best(run_dir: Path, step: int) -> bool:
    """Make RUN/step_NNNNNN the best checkpoint as well, by hard links to its files.

    Return False, without doing anything, if there is no whole checkpoint of this step.
    """
    source = run_dir / f"step_{step:06d}"

    def link_files(folder: Path) -> None:
        for path in source.iterdir():
            try:
                (folder / path.name).hardlink_to(path)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, folder / path.name)

    if find_corruption(source):
        return False
    write_folder(run_dir / BEST, step, link_files, keep=1)
    return True


def write_folder(run_dir: Path, step: int, write_files: Callable[[Path], None], keep: int) -> None:
    """Let `write_files(folder)` write a checkpoint's files under a temporary name, and rename it.

    Then delete all other checkpoints but the last `keep - 1`. A checkpoint that this step has
    already is deleted once the new one is in its place.
    """
    final = run_dir / f"step_{step:06d}"
    temporary = run_dir / f".writing-{final.name}"
    replaced = run_dir / f".replaced-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        try:
            write_files(temporary)
        except SafetensorError as error:  # safetensors wraps the operating system's errors
            raise UserError(
                f"{final} cannot be written ({error}): free some space, or choose another disk"
            ) from None
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        if final.exists():  # this step's checkpoint is broken, or is written again
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        fsync(run_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    others = [path for path in list_checkpoints(run_dir) if path != final]
    for old in others[: len(others) + 1 - keep]:
        shutil.rmtree(old)


def fsync(path: Path) -> None:
    """Wait until the content of a file, or a folder's list of names, is on the disk.

    Not on Windows, where folders cannot be opened, nor files synced that are open for reading.
    """
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- finding and loading -------------------------------------------------------------------------


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints in a run directory, oldest first."""
    paths = [path for path in run_dir.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    # By number: by name, step 1000000 would come before 200000.
    return sorted(paths, key=lambda path: int(path.name[5:]))


def load(
    run_dir: Path, on_main_process: Callable[[Callable[[], int]], int] = lambda find: find()
) -> Checkpoint:
    """Return the newest whole checkpoint of a run directory. Raises UserError if there is none.

    `on_main_process`: ProcessGroups.on_main_process, where one of several processes is to check the
    files and tell the others.
    """
    step = on_main_process(lambda: newest_step(run_dir))
    return read(run_dir / f"step_{step:06d}")


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder RUN/step_NNNNNN, which must be whole."""
    return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))


def best_state(run_dir: Path) -> dict | None:
    """Return the state of the checkpoint in RUN/best, or None if there is none."""
    for path in reversed(list_checkpoints(run_dir / BEST)):
        with contextlib.suppress(OSError, ValueError):
            return read(path).state
    return None


def find_file(run_dir: Path, name: str) -> Path | None:
    """Return a file that is in a run's directory; None if there is none. RUN/best is a part of RUN,
    so its files are found there."""
    folders = (run_dir, run_dir.parent) if run_dir.name == BEST else (run_dir,)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest whole checkpoint."""
    paths = list_checkpoints(run_dir)
    if not paths:
        raise UserError(
            f"no checkpoint in {run_dir}: train one first (`python train.py PRESET`), or name its "
            "run directory"
        )
    for path in reversed(paths):
        fault = find_corruption(path)
        if fault is None:
            return int(path.name[5:])
        print(f"warning: {path} is broken ({fault}); trying the one before", file=sys.stderr)
    raise UserError(f"no checkpoint in {run_dir} is whole: move the folder away and train again")


def find_corruption(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None."""
    try:
        sums = read_sums(path)
        for name in FILES:
            if sums.get(name) != file_sha256(path / name):
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_sums(path: Path) -> dict[str, str]:
    """Return the sha256 of each file of a checkpoint, as its SHA256SUMS says."""
    lines = (path / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return dict(line.split("  ")[::-1] for line in lines)


def load_model(checkpoint: Checkpoint) -> GPT | Multimodal:
    """Return the model of a checkpoint, in eval mode, on the CPU. Raises UserError as
    `restore_model` does."""
    config = from_dict(checkpoint.state["config"])
    model = build_model(config).eval()
    if is_quantized(checkpoint):
        model = quantize(model, checkpoint.state["format"])
    restore_model(model, checkpoint.model, checkpoint.path)
    bits = config.weight_bits(checkpoint.state["step"] - 1)  # of the last step done
    if bits and not is_quantized(checkpoint):
        fake_quantize_model(model, bits)
    return model


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint was written by nanods/training/quantize.py."""
    return checkpoint.state.get("format") in FORMATS


def require_floats(checkpoint: Checkpoint) -> None:
    """Raise UserError if a checkpoint is quantised, so that nothing can be trained from it."""
    if is_quantized(checkpoint):
        raise UserError(
            f"{checkpoint.path} is quantised ({checkpoint.state['format']}) and cannot be trained: "
            "name the run that it was made from"
        )


# ---- model and optimizers ------------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name, without those that only training needs."""
    weights = model.state_dict()
    return {name: x for name, x in weights.items() if not name.startswith(TRAINING_ONLY)}


def optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Return the optimizers' state and the random state, by name: the optimizer's class, the
    parameter, the field, as in "Muon/blocks.0.mlp.up.weight/momentum_buffer".

    Also the weights that only training needs, as in "weight/projection.weight".
    """
    names = {p: name for name, p in model.named_parameters()}
    tensors = {"rng/cpu": torch.get_rng_state()}
    for p, name in names.items():
        if name.startswith(TRAINING_ONLY):
            tensors[f"weight/{name}"] = p.detach()
    if torch.cuda.is_initialized():  # a run on the CPU leaves a GPU alone
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for field, value in state.items():
                tensors[f"{type(optimizer).__name__}/{names[p]}/{field}"] = value
    return tensors


def restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], saved: Checkpoint) -> None:
    """Load a checkpoint's weights, optimizer state and random state. Raises UserError as
    `restore_model` does."""
    weights, tensors = saved.model, saved.optimizer
    for name in model.state_dict():
        if name.startswith(TRAINING_ONLY):
            weights[name] = tensors.pop(f"weight/{name}")
    restore_model(model, weights, saved.path)
    restore_optimizers(model, optimizers, tensors)


def restore_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Do the inverse of `optimizer_tensors`. Each parameter's state goes to the optimizer that
    updates the parameter, so that several optimizers of one class may be in use."""
    parameters = dict(model.named_parameters())
    owners = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            owners |= dict.fromkeys(group["params"], optimizer)
    for key, value in tensors.items():
        prefix, name, *field = key.split("/")
        if prefix == "rng":
            if name == "cpu":
                torch.set_rng_state(value)
            elif torch.cuda.is_initialized():
                torch.cuda.set_rng_state(value)
        else:
            p = parameters[name]
            # Muon counts its steps on the CPU, fused AdamW beside the parameter.
            stays = field[0] == "step" and isinstance(owners[p], Muon)
            owners[p].state[p][field[0]] = value if stays else value.to(p.device)


def restore_model(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load the weights of the checkpoint at `path`. Raises UserError where names or shapes are
    those of another model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own configuration: {error}") from None
