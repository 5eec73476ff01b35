"""Quantise a trained run: `python -m nanods.training.quantize runs/v2-tiny --to int8`.

Writes a run directory whose last checkpoint is INT8 or FP8 (nanods/quantize.py), beside the run or
in --out. sample.py reads it as any other; training cannot go on from it. Both models are evaluated,
so that the loss is seen.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import nn

from nanods.errors import UserError, run
from nanods.files import write_and_rename
from nanods.flags import parse_args
from nanods.quantize import choose_kernel, quantize, quantized_share
from nanods.training import checkpoint, saved_gallery
from nanods.training.commands import sample_command
from nanods.training.finished_run import FinishedRun, load_run
from nanods.training.setup import lock_run_directory
from nanods.training.task import make_task


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """A run directory, or a preset (then runs/PRESET)."""
    to: Literal["int8", "fp8"] = "int8"
    """int8: smaller, and faster on processors with INT8 instructions. fp8: smaller."""
    out: Path | None = None
    """Where to write. Default: RUN-int8 or RUN-fp8."""
    evaluate: bool = True
    """Evaluate both models on the run's own validation data."""


def main() -> None:
    args = parse_args(Args, __doc__)
    finished = load_run(args.run, "cpu")
    folder = finished.folder
    if not folder.name.strip("."):  # "." and "..": not the run's name
        folder = folder.resolve()
    out = args.out or folder.with_name(f"{folder.name}-{args.to}")
    with lock_run_directory(out, "--out"):
        if checkpoint.list_checkpoints(out):
            raise UserError(f"--out {out}: a run is there already; choose another folder")
        quantize_run(finished, args.to, out, args.evaluate)


def quantize_run(finished: FinishedRun, format: str, out: Path, evaluate: bool = True) -> None:
    """Write the last checkpoint of a run, quantised, to `out`, and print what changes.

    Raises UserError for a run that is quantised already or whose weights are not finite.
    """
    config, model, state = finished.config, finished.model, finished.state
    bits = config.weight_bits(state["step"] - 1)
    if bits and (bits, format) != (8, "int8"):
        raise UserError(
            f"{finished.folder} was trained for weights of {bits} bits, which {format} would "
            "change; sample.py rounds them as training did"
        )
    try:
        converted = quantize(model, format)
    except ValueError as error:
        raise UserError(f"{finished.folder}: {error}") from None
    if format == "int8":
        kernel = choose_kernel("cpu")
        print(f"kernel     {kernel.name}, weights of {kernel.weight_bits} bits: {kernel.reason}")
    before, after = size_of(model), size_of(converted)
    print(
        f"size       {after / 2**20:.2f} MiB instead of {before / 2**20:.2f} ({before / after:.2f} "
        f"times smaller); {quantized_share(converted):.1%} of the numbers in {format}"
    )
    if evaluate:
        print_evaluations(finished, {"before": model, format: converted})

    def write_tensors(folder: Path) -> None:
        weights = {name: x.contiguous() for name, x in converted.state_dict().items()}
        save_file(weights, folder / checkpoint.FILES[0])
        save_file({}, folder / checkpoint.FILES[1])  # no optimizer: training cannot go on

    if gallery := checkpoint.find_file(finished.folder, saved_gallery.FILE):
        data = gallery.read_bytes()
        write_and_rename(out / saved_gallery.FILE, lambda file: file.write(data))
    checkpoint.write_checkpoint(out, state["step"], state | {"format": format}, write_tensors)
    print(f"wrote      {out}. Sample it: {sample_command(out)}")


def size_of(model: nn.Module) -> int:
    """Return the bytes of a model's weights in a file."""
    return sum(x.numel() * x.element_size() for x in model.state_dict().values())


@torch.no_grad()
def print_evaluations(finished: FinishedRun, models: dict[str, nn.Module]) -> None:
    """Print the validation figures of each model, or why there are none."""
    try:
        task = make_task(finished.config, torch.device("cpu"), finished.tokenizer)
    except UserError as error:
        print(f"warning: not evaluated: {error}", file=sys.stderr)
        return
    for name, model in models.items():
        print(f"{name:<10} {task.describe_validation(task.evaluate(model))}")


if __name__ == "__main__":
    run(main, "with --out")
