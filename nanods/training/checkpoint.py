"""Checkpoints that survive: safetensors and JSON, written whole or not at all.

    OUT/step_000060/model.safetensors        the weights, by their plain names
    OUT/step_000060/optimizer.safetensors    the optimizers' tensors and the random state
    OUT/step_000060/state.json               configuration, tokenizer, step, position in the data, seconds so far
    OUT/step_000060/SHA256SUMS               of the three; `sha256sum -c SHA256SUMS` checks it by hand

A checkpoint is written under a temporary name, synced, and renamed: whoever is killed in between leaves the ones before
untouched. Loading takes the newest that is whole, with a warning for each that is not. Nothing is ever unpickled. Runs whose
weights are shared out write and read the same files, each process its own part (sharded_checkpoint.py).
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

from nanods.config import Config, flatten, from_dict
from nanods.data.download import file_sha256
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.moe import upcycle
from nanods.multimodal import Multimodal

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
KEEP = 2


@dataclass
class Checkpoint:
    path: Path
    state: dict

    @property
    def model(self) -> dict[str, Tensor]:
        """The weights, read from the disk whenever they are asked for."""
        return load_file(self.path / FILES[0])

    @property
    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / FILES[1])


def save(
    out: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict
) -> None:
    """Write OUT/step_NNNNNN and delete all but the last two. Raises OSError (disk full, not writable) with nothing lost."""

    def fill(folder: Path) -> None:
        for file, tensors in zip(FILES, (model, optimizer), strict=False):
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                folder / file,
            )

    write(out, step, state, fill)


def write(out: Path, step: int, state: dict, fill: Callable[[Path], None]) -> None:
    """`save`, where `fill` puts the files of tensors into a folder."""
    final = out / f"step_{step:06d}"
    temporary = out / f".writing-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a writer that was killed
    temporary.mkdir(parents=True)
    try:
        try:
            fill(temporary)
        except SafetensorError as error:  # it wraps the operating system's refusals
            raise UserError(
                f"{final} cannot be written ({error}): free some space, or choose another --out-dir"
            ) from None
        (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        sums = "".join(f"{file_sha256(temporary / name)}  {name}\n" for name in FILES)
        (temporary / "SHA256SUMS").write_text(sums, encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if (
            final.exists()
        ):  # a checkpoint of this step that turned out broken, or is being made again
            shutil.rmtree(final)
        temporary.rename(final)
        sync(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in found(out)[:-KEEP]:
        shutil.rmtree(old)


def found(out: Path) -> list[Path]:
    """The checkpoints in a run directory, oldest first."""
    paths = [path for path in out.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(
        paths, key=lambda path: int(path.name[5:])
    )  # by name, step 1000000 would come before 200000


def load(out: Path, once: Callable[[Callable[[], int]], int] = lambda find: find()) -> Checkpoint:
    """The newest whole checkpoint of a run directory. Raises UserError where there is none.

    `once`: ProcessGroups.once, where one of several processes is to look through the files and tell the others.
    """
    path = out / f"step_{once(lambda: newest(out)):06d}"
    return Checkpoint(path, json.loads((path / "state.json").read_text(encoding="utf-8")))


def newest(out: Path) -> int:
    """The step of the newest whole checkpoint."""
    if not (paths := found(out)):
        raise UserError(
            f"no checkpoint in {out}: train one first (`python train.py PRESET`), or name its run directory"
        )
    for path in reversed(paths):
        if fault := broken(path):
            print(f"warning: {path} is broken ({fault}); trying the one before", file=sys.stderr)
            continue
        return int(path.name[5:])
    raise UserError(f"no checkpoint in {out} is whole: move the folder away and train again")


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sums = dict(
            line.split("  ")[::-1]
            for line in (path / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        )
        for name in FILES:
            if sums.get(name) != file_sha256(path / name):
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_metrics(file: Path) -> list[dict]:
    """The rows that a run has written so far; a last line cut off by a kill is left out."""
    rows = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- what goes in ----------------------------------------------------------------------------------------------------------


def optimizer_tensors(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The optimizers' state by the parameter's name: {"Muon/blocks.0.mlp.up.weight/momentum_buffer": ...}, and the RNG."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"{type(optimizer).__name__}/{names[p]}/{key}"] = value
    return tensors


def restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], saved: Checkpoint) -> None:
    """Go on from a checkpoint. Raises UserError as `restore_model` does."""
    restore_model(model, saved.model, saved.path)
    restore_optimizers(model, optimizers, saved.optimizer)


def restore_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    by_name = {type(optimizer).__name__: optimizer for optimizer in optimizers}
    for key, value in tensors.items():
        owner, name, *field = key.split("/")
        if owner == "rng":
            if name == "cpu":
                torch.set_rng_state(value)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(value)
        else:
            p = parameters[name]
            by_name[owner].state[p][field[0]] = value if field[0] == "step" else value.to(p.device)


def restore_model(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load the weights of the checkpoint at `path`. Raises UserError where names or shapes are those of another model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own configuration: {error}") from None


def build(config: Config) -> GPT | Multimodal:
    """The model that a configuration asks for, untrained. Raises UserError where it cannot be."""
    try:
        return (
            Multimodal(config.model, config.multimodal)
            if config.multimodal.modalities
            else GPT(config.model)
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def load_model(checkpoint: Checkpoint) -> GPT | Multimodal:
    """The model that a checkpoint holds, in eval mode, on the CPU. Raises UserError as `restore_model` does."""
    model = build(from_dict(checkpoint.state["config"])).eval()
    restore_model(model, checkpoint.model, checkpoint.path)
    return model


# ---- a start from another run's weights ------------------------------------------------------------------------------------

TRUNK = ("n-layer", "n-head", "n-embd", "hidden-ratio", "vocab-size", "rope-base", "query-gain")
ENDS = (
    "modalities",
    "shared",
    "width",
    "image-size",
    "patch-size",
    "frames",
    "patch-frames",
)  # of V3
SAME = (*TRUNK, *(f"multimodal.{name}" for name in ENDS))


def warm_start(config: Config, model: nn.Module, tokenizer: str) -> str:
    """Load the last weights of the run `config.init_from`; a dense run's MLPs become experts where the model has them.

    Gates that the run does not have keep their own start. -> what was done. Raises UserError where sizes, tokenizer or
    experts do not fit.
    """
    path = Path(config.init_from)
    found = load(path)
    source = from_dict(found.state["config"])
    was, want = flatten(source), flatten(config)
    different = [
        f"--{name} {was[name]} (asked for: {want[name]})"
        for name in SAME
        if was[name] != want[name]
    ]
    if different:
        raise UserError(
            f"--init-from {path}: that run has {', '.join(different)}. Its weights fit a model of the same sizes alone: "
            "ask for those, or train a run of yours first"
        )
    if found.state["tokenizer"] != tokenizer:
        raise UserError(
            f"--init-from {path}: that run has another tokenizer; start from one that was trained on --data {config.data}"
        )
    had, has = source.model.moe.n_expert, config.model.moe.n_expert
    weights, done = found.model, f"from {found.path}"
    if had == 1 < has:
        if not config.model.moe.normalise:
            raise UserError(
                "--init-from: copies of one MLP give it back only if their weights sum to 1; drop --moe.no-normalise"
            )
        weights = upcycle(weights, has, config.init_noise, config.seed)
        own = model.state_dict()
        weights |= {
            name: own[name] for name in own.keys() - weights.keys()
        }  # the gates and their biases
        done += f", each MLP copied to {has} experts (noise {config.init_noise:g})"
    elif had != has:
        raise UserError(
            f"--init-from {path}: that run has {had} experts, asked for: {has}; take a dense run, or --moe.n-expert {had}"
        )
    restore_model(model, weights, found.path)
    return done
