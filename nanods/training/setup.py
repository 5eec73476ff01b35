"""What train.py decides before the first step: device, precision, run directory; and how it hears
of a stop or a divergence."""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from nanods.config import Config
from nanods.data.lock import LockHeldError, lock
from nanods.errors import UserError
from nanods.training import checkpoint
from nanods.training.commands import retry_command
from nanods.training.muon import fast_bf16

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def choose_device(config: Config, world_size: int = 1) -> torch.device:
    """Return the device of `--device`, and print it with the reason. Raises UserError if the
    machine does not have it. Several processes cannot share an Apple GPU (mps)."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and world_size == 1,
        "cpu": True,
    }
    if config.device == "auto":
        name = next(name for name, is_present in present.items() if is_present)
        reason = f"the first of {', '.join(present)} that this machine has"
    elif present[config.device]:
        name, reason = config.device, "as requested"
    else:
        raise UserError(
            f"--device {config.device}: PyTorch finds none on this machine"
            f"{' for several processes' if world_size > 1 else ''}; leave the flag out, or "
            "--device cpu"
        )
    threads = f", {torch.get_num_threads()} threads" if name == "cpu" else ""
    print(f"device     {name} ({reason}){threads}")
    return torch.device(name)


@dataclass(frozen=True)
class Precision:
    """In which dtypes a run computes."""

    dtype: torch.dtype
    """Of matrix products."""
    weights: torch.dtype
    """Of weights, gradients and optimizer state: fp64 under --dtype fp64, else fp32."""
    autocast: AbstractContextManager
    """The context of forward passes: casts matrix products to bf16 or fp16."""
    scaler: torch.amp.GradScaler
    """Scales an fp16 loss before backward, as small gradients would become zero; otherwise it does
    nothing."""


def choose_precision(config: Config, device: torch.device) -> Precision:
    """Return the precision of `--dtype`, and print it with the reason."""
    if config.dtype != "auto":
        name, reason = config.dtype, "as requested"
    elif fast_bf16(device):
        name, reason = "bf16", f"this {device.type.upper()} multiplies it faster than fp32"
    else:
        name, reason = "fp32", f"this {device.type.upper()} is not known to gain from bf16"
    if name == "fp64" and device.type == "mps":
        raise UserError("--dtype fp64: Apple's GPUs (mps) have no fp64; add --device cpu")
    print(f"dtype      {name} ({reason})")
    dtype = DTYPES[name]
    autocast = contextlib.nullcontext()
    if dtype in (torch.bfloat16, torch.float16):
        autocast = torch.autocast(device.type, dtype)
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Precision(dtype, weights, autocast, scaler)


def compile_model(config: Config, model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model, compiled if `--compile` asks for it; then print that the first batches take
    longer."""
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return model
    print("compile    the first batches take some minutes longer (--compile off: slower steps)")
    warnings.filterwarnings("ignore", module="torch._inductor")  # warnings meant for its developers
    return torch.compile(model)


@contextlib.contextmanager
def lock_run_directory(
    run_dir: Path, flag: str = "--out-dir", wait: bool = False
) -> Iterator[None]:
    """Keep other processes from training in the same run directory, which `flag` chooses.

    If one does, raises UserError, naming it, or waits until it ends. Reading (sample.py) needs no
    lock. The lock file is beside the directory, which may be renamed: RUNS/.NAME.lock. On NFS see
    nanods/data/lock.py.
    """
    path = run_dir.absolute()
    with contextlib.ExitStack() as stack:
        try:
            is_new = not path.parent.is_dir()
            path.parent.mkdir(parents=True, exist_ok=True)  # another run may make it just now
            if is_new:
                stack.callback(remove_if_empty, path.parent)  # where the run is refused
            can_be_renamed = os.access(path.parent, os.W_OK)
            lock_file = path.parent.resolve() / f".{path.name}.lock"
            stack.enter_context(lock(lock_file if can_be_renamed else path / ".lock", wait))
        except LockHeldError as holder:
            raise UserError(
                f"{flag} {run_dir}: another training writes there ({holder}); wait until it "
                f"ends, stop it, or choose another {flag}"
            ) from None
        except OSError as error:
            raise unwritable(run_dir, flag, error) from None
        yield


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def unwritable(run_dir: Path, flag: str, error: OSError) -> UserError:
    return UserError(
        f"{flag} {run_dir}: cannot be made ({error.strerror}); choose a folder that you may "
        "write to"
    )


def prepare_run_directory(run_dir: Path) -> None:
    """Make an empty run directory. A run that is in the way is renamed, not overwritten."""
    try:
        has_run = checkpoint.list_checkpoints(run_dir) or (run_dir / "metrics.jsonl").exists()
        if run_dir.is_dir() and has_run:
            if not run_dir.name.strip("."):  # "." and "..": after the renaming, another folder
                raise UserError(
                    f"--out-dir {run_dir}: a run is there already, and cannot be renamed from "
                    "inside: train from another folder, or choose another --out-dir"
                )
            aside = run_dir.with_name(f"{run_dir.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
            run_dir.rename(aside)
            print(
                f"moved      the run that was in {run_dir} to {aside} "
                "(--resume would have continued it)"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(run_dir, "--out-dir", error) from None


class StopSignal:
    """Remembers SIGINT or SIGTERM, so that the loop can finish its step, save and stop."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.name = signal.Signals(number).name

    @property
    def received(self) -> bool:
        return self.name is not None


def explain_divergence(config: Config, model: nn.Module, step: int, loss: float, lr: float) -> str:
    """Return the message for a loss or gradient that is not finite: where it began, and how to
    continue before it."""
    first = "none"
    for name, p in model.named_parameters():
        if not p.isfinite().all() or (p.grad is not None and not p.grad.isfinite().all()):
            first = name
            break
    return (
        f"the loss became {loss} at step {step + 1}, learning rate {lr:.2e}; first layer with "
        f"values that are not finite: {first}. The last checkpoint is untouched: try a smaller "
        f"rate, {retry_command(config, lr=config.lr / 2)}"
    )
