"""Look at data for V3 before training: python -m nanods.data.check my_folder

Prints what train.py would say of the data before its first step, and writes a contact sheet: a page
of examples as the model reads them, their images cropped and their sounds cut, which play.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from nanods.build import build_model
from nanods.config import PRESETS
from nanods.contact_sheet import Cell, Row, save_contact_sheet
from nanods.data.examples import Examples
from nanods.errors import UserError, run
from nanods.flags import parse_args
from nanods.training.contrastive_data import load_dataset
from nanods.training.contrastive_task import ContrastiveTask

SHOWN = 24  # examples of the training data, and of those held out


@dataclass(frozen=True)
class Args:
    data: Annotated[str, tyro.conf.Positional]
    """A folder of captioned images or sounds, or the name of a data set: scenes, emoji."""
    preset: str | None = None
    """The preset of V3 whose sizes count. Default: v3-emoji for emoji, else v3-tiny."""
    val_data: str | None = None
    """Another folder that is held out, as train.py takes it."""
    out: Path = Path("contact_sheet.html")
    """Where to write the page."""


def main() -> None:
    args = parse_args(Args, __doc__)
    preset = args.preset or ("v3-emoji" if args.data == "emoji" else "v3-tiny")
    known = [name for name, config in PRESETS.items() if config.multimodal.modalities]
    if preset not in known:
        raise UserError(f"--preset {preset}: choose one of {', '.join(known)}")
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: name a file in a folder that exists")
    config = replace(PRESETS[preset], data=args.data, val_data=args.val_data)
    data = load_dataset(config)
    batch_size = min(config.batch_size, len(data.train))
    task = ContrastiveTask(replace(config, batch_size=batch_size), torch.device("cpu"), data)
    description = task.describe_data()
    print(f"data       {description}")
    if batch_size < config.batch_size:
        print(
            f"notice     train.py needs a smaller --batch-size than {preset}'s, {config.batch_size}"
        )
    seconds = task.evaluation_seconds(build_model(task.config))
    print(f"time       {seconds:.2g} s for each evaluation, on the CPU")
    readable = len(data.train) - getattr(data, "skipped", 0)
    batch = data.batch(0, max(1, min(SHOWN, readable)), config.seed)
    rows = [
        Row("Training examples", cells(batch)),
        Row("Held-out examples", cells(task.gallery)),
    ]
    title = f"{args.data}, as {preset} reads it"
    save_contact_sheet(args.out, title, rows, description.split("\n")[0])
    print(f"wrote      {args.out}")


def cells(examples: Examples) -> list[Cell]:
    """Return the first examples as cells, each with the modalities that it has."""
    has_image, has_sound = examples.has("image"), examples.has("audio")
    result = []
    for i in range(min(SHOWN, len(examples.captions))):
        image = examples.images[i] if examples.images is not None else None
        wave = examples.waves[i] if examples.waves is not None else None
        result.append(
            Cell(
                examples.captions[i],
                image if has_image[i] else None,
                wave if has_sound[i] else None,
            )
        )
    return result


if __name__ == "__main__":
    run(main)
