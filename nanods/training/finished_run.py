"""A finished run, as sample.py and nanods/evaluate.py read it. They write nothing into it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nanods.config import PRESETS, Config, from_dict
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_json
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.multimodal import Multimodal
from nanods.training import checkpoint


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    state: dict
    """What state.json of its last whole checkpoint holds."""
    config: Config
    tokenizer: ByteTokenizer | BPETokenizer
    model: GPT | Multimodal
    """In eval mode."""


def find_run(name: str) -> Path:
    """Return the folder of a run, or of a preset's (runs/PRESET). Raises UserError if there is
    none."""
    folder = Path("runs") / name if name in PRESETS else Path(name)
    if not folder.is_dir():
        version, _, scale = name.partition("-")
        target = f"train-{version}" if name in PRESETS else "train-v1"
        size = f" SCALE={scale}" if name in PRESETS and scale != "tiny" else ""
        raise UserError(
            f"{folder}: no such run. Train it first: make {target}{size}. "
            f"Presets: {', '.join(PRESETS)}"
        )
    return folder


def load_run(name: str, device: str) -> FinishedRun:
    """Return the run in a directory, or of a preset. Raises UserError if there is none, or if this
    machine does not have the device."""
    present = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(device)
    if present and not present.is_available():
        raise UserError(
            f"--device {device}: PyTorch finds none on this machine; leave the flag out"
        )
    folder = find_run(name)
    saved = checkpoint.load(folder)
    config = from_dict(saved.state["config"])
    tokenizer = tokenizer_from_json(saved.state["tokenizer"])
    model = checkpoint.load_model(saved).to(device)
    return FinishedRun(folder, saved.state, config, tokenizer, model)
