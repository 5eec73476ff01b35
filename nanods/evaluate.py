"""Evaluate a finished run: python -m nanods.evaluate runs/v3-tiny --data my_folder --json out.json

The metrics are those that training logs: validation loss and bits per byte of V0 to V2, recalls and
zero-shot accuracy of V3. Nothing is written into the run. What is read of the data:

    no --data, or the run's own        what the run has held out
    the name of a data set             what a run on it would hold out
    a file or a folder                 all of it, as --val-data: of texts the validation split if
                                       there is one; of V3's folders all but what is called test
"""

import contextlib
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanods.config import Config
from nanods.data.caption_dataset import CaptionDataset
from nanods.data.captions import read_captions
from nanods.data.instructions import NAME as INSTRUCTIONS
from nanods.data.instructions import is_instructions
from nanods.data.sources import validation_text
from nanods.data.text import (
    NAMES,
    TextData,
    encode_cached,
    load_text,
    sha256,
    unknown_corpus,
)
from nanods.errors import UserError, run
from nanods.files import write_and_rename
from nanods.flags import parse_args
from nanods.training.contrastive_checks import describe_standard_error
from nanods.training.contrastive_data import GENERATED_DATA, load_dataset, missing_modalities
from nanods.training.contrastive_task import MAX_GALLERY, ContrastiveTask
from nanods.training.finished_run import FinishedRun, load_run
from nanods.training.instruction_task import InstructionTask
from nanods.training.language_task import LanguageTask
from nanods.training.setup import choose_device, choose_precision


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """A run directory, or a preset (then runs/PRESET)."""
    data: str | None = None
    """What to evaluate on: a data set, a file or a folder, as train.py takes them. Default: the
    run's own data."""
    examples: int = MAX_GALLERY
    """V3: evaluate on this many examples at most, among which each is to be found."""
    json: Path | None = None
    """Also write the metrics to this file; - prints them to stdout, and all else to stderr."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: the first of cuda, mps and cpu that this machine has."""


def main() -> None:
    args = parse_args(Args, __doc__)
    to_stdout = args.json == Path("-")
    if args.json and not to_stdout and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json {args.json}: name a file in a folder that exists")
    with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
        table = evaluate(args)
    text = json.dumps(table, indent=1, allow_nan=False) + "\n"
    if to_stdout:
        print(text, end="")
    elif args.json:
        write_and_rename(args.json, lambda file: file.write(text.encode()))
        print(f"wrote      {args.json}")


def evaluate(args: Args) -> dict:
    """Evaluate the run, print what is found, and return it as a table for JSON."""
    finished = load_run(args.run, "cpu")
    saved = finished.config
    print(f"run        {finished.folder}, step {finished.state['step']:,}, trained on {saved.data}")
    config = replace(saved, device=args.device)
    device = choose_device(config)
    precision = choose_precision(config, device)
    is_quantized = "format" in finished.state  # its layers choose the precision themselves
    autocast = contextlib.nullcontext() if is_quantized else precision.autocast
    other = None if args.data is None or is_same(args.data, saved.data) else args.data
    if args.data and other is None:
        print("notice     the run was trained on these data: only what it held out is evaluated")
    if saved.multimodal.modalities:
        task = contrastive_task(finished, device, other, args.examples)
        read, number = describe_examples(task), len(task.gallery.ids)
    elif is_instructions(other or saved.data):
        changed = replace(saved, **instruction_data(saved, other))
        task = InstructionTask(changed, device, tokenizer=finished.tokenizer)
        read, number = task.describe_data(), sum(map(len, task.data.val_rows.values()))
    else:
        task = language_task(finished, device, other)
        read, number = describe_text(task), len(task.data.val)
    print(f"data       {read}")
    if other is None and task.data.sha256 != finished.state.get("data_sha256"):
        print(f"notice     {saved.data} has changed since the run was trained on it")
    with autocast:
        metrics = task.evaluate(finished.model.to(device))
    print(f"result     {task.describe_validation(metrics)}")
    return {
        "run": str(finished.folder),
        "preset": saved.preset,
        "step": finished.state["step"],
        "trained_on": saved.data,
        "data": task.data.name,
        "data_sha256": task.data.sha256,
        task.unit: number,
        "metrics": {name: finite(value) for name, value in metrics.items()},
    }


def is_same(data: str, other: str) -> bool:
    """Return whether two values of --data are the same name or path."""
    return data == other or (Path(data).exists() and Path(data).resolve() == Path(other).resolve())


def finite(value):
    """Return a metric for JSON, which has no NaN and no infinity: None in their place."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- V0 to V2 ------------------------------------------------------------------------------------


def language_task(finished: FinishedRun, device: torch.device, other: str | None) -> LanguageTask:
    """Return the task of a language model on its own data or on others, in the run's tokens."""
    config, tokenizer = finished.config, finished.tokenizer
    if other is None:
        data = load_text(config.data, config.model.vocab_size, config.val_data, config.val_fraction)
    elif other in NAMES:
        data = load_text(other, 256, None, config.val_fraction)  # 256: bytes
    else:
        if not Path(other).exists():
            raise unknown_corpus(other)
        try:
            text, source = validation_text(other)
        except UserError as error:
            raise UserError(str(error).replace("--val-data", "--data", 1)) from error
        tokens = encode_cached(text, tokenizer)
        data = TextData(
            other, sha256(text), tokens, tokens, tokenizer, len(text.encode()), f"all of {source}"
        )
    if data.tokenizer.to_json() != tokenizer.to_json():
        text = data.tokenizer.decode(data.val.tolist())
        val = encode_cached(text, tokenizer)
        data = replace(data, train=val, val=val, tokenizer=tokenizer)
    return LanguageTask(config, device, data)


def instruction_data(saved: Config, other: str | None) -> dict:
    """Return the fields that name the instructions to evaluate on: the run's own, the built-in
    ones, or a file, all of which is then for validation."""
    if other is None:
        return {}
    file = None if other == INSTRUCTIONS else other
    return {"data": other, "val_data": file, "mix": None}


def describe_text(task: LanguageTask) -> str:
    data = task.data
    return (
        f"{data.name}: {len(data.val):,} tokens, {data.validation}, sha256 {data.sha256[:12]}; "
        f"{task.describe_evaluation()}"
    )


# ---- V3 ------------------------------------------------------------------------------------------


def contrastive_task(
    finished: FinishedRun, device: torch.device, other: str | None, examples: int
) -> ContrastiveTask:
    """Return the task of V3 on its own data or on others, in the modalities that they share."""
    config = finished.config
    if other is None:
        data = load_dataset(config)
    elif other in GENERATED_DATA:
        data = load_dataset(replace(config, data=other, val_data=None))
    else:
        captions = read_captions(Path(other))
        rows = [*captions.train, *captions.held_out]
        # The first note says what training would hold out.
        captions = replace(captions, train=rows, held_out=rows, notes=captions.notes[1:])
        multimodal = config.multimodal
        data = CaptionDataset(other, captions, multimodal.image_size, multimodal.frames)
    config = share_modalities(replace(config, data=other or config.data), data.modalities)
    # Of fewer examples than the run's batches have, `evaluate` weights the negatives.
    small = replace(config, micro_batch=None, batch_size=min(config.batch_size, len(data.train)))
    task = ContrastiveTask(small, device, data, finished.tokenizer, examples)
    task.config = config
    return task


def share_modalities(config: Config, modalities: tuple[str, ...]) -> Config:
    """Return the configuration with the modalities, and pairs of them, that the data have too."""
    multimodal = config.multimodal
    missing = missing_modalities(multimodal.modalities, modalities)
    left = tuple(name for name in multimodal.modalities if name not in missing)
    pairs = tuple(p for p in multimodal.pairs if not set(p.split("-")) & set(missing))
    if len(left) < 2:
        raise UserError(
            f"--data {config.data}: it has {' and '.join(modalities)}, and the run knows "
            f"{' and '.join(multimodal.modalities)}; give data with two modalities of the run"
        )
    if missing:
        print(f"notice     {config.data} has no {' and no '.join(missing)}: evaluated without")
    return replace(config, multimodal=replace(multimodal, modalities=left, pairs=pairs))


def describe_examples(task: ContrastiveTask) -> str:
    """Return what is evaluated: examples and labels, what is cut or cannot be read, and the
    standard error."""
    data, number = task.data, len(task.gallery.ids)
    of_all = "" if number == len(data.held_out) else f" of {len(data.held_out):,}"
    labels = f" of {len(task.labels)} labels" if task.labels else ""
    lines = [f"{data.name}: {number:,}{of_all} examples{labels}, sha256 {data.sha256[:12]}"]
    if of_all:
        lines[0] += " (--examples takes more)"
    lines += [f"cut        {cut}" for cut in task.cuts]
    if skipped := getattr(data, "skipped", 0):
        lines.append(f"left out   {skipped:,} files that cannot be read")
    error = describe_standard_error(task.gallery, task.config.multimodal.modalities)
    lines.append(f"evaluated  {error}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
