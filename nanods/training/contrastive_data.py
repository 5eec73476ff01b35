"""V3's data: the data set of a configuration, held-out examples, what a model reads of them.

Shapes: B examples, T tokens of a caption.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanods.config import PRESETS, Config
from nanods.data.caption_dataset import load_caption_dataset
from nanods.data.emoji import EmojiData
from nanods.data.examples import ExampleDataset
from nanods.data.scenes import FRAMES, IMAGE_SIZE, SceneData
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_json
from nanods.errors import UserError
from nanods.multimodal import MODALITIES, MultimodalConfig
from nanods.training.checkpoint import find_file, load
from nanods.training.finished_run import find_run
from nanods.training.saved_gallery import FILE, SavedGallery, load_gallery, words_of


def load_dataset(config: Config) -> ExampleDataset:
    """Return the data set that the configuration names. Raises UserError if it cannot be read.

    A generated data set of another kind is one more entry in GENERATED_DATA (docs/MODIFYING.md).
    """
    multimodal = config.multimodal
    if config.val_fraction != Config.val_fraction:
        raise UserError(
            f"--val-fraction {config.val_fraction}: it is for texts; --val-data FOLDER chooses the "
            "held-out examples of V3"
        )
    if config.data in GENERATED_DATA:
        if config.val_data:
            raise UserError(
                f"--val-data {config.val_data}: {config.data} has held-out examples of its own; "
                "leave it out"
            )
        return GENERATED_DATA[config.data](multimodal)
    val_folder = Path(config.val_data) if config.val_data else None
    return load_caption_dataset(
        Path(config.data),
        multimodal.image_size,
        multimodal.frames,
        val_folder,
        multimodal.modalities,
    )


def fit_modalities(config: Config, modalities: Sequence[str]) -> Config:
    """Return the configuration for data with these modalities: without the preset's others.

    Raises UserError if a modality is missing that a flag names, or if fewer than two are left.
    """
    wanted = config.multimodal.modalities
    missing = missing_modalities(wanted, modalities)
    if not missing:
        return config
    left = tuple(name for name in wanted if name in modalities)
    asked_for = wanted != preset_modalities(config) or config.multimodal.pairs
    if asked_for or len(left) < 2:
        raise UserError(
            f"--data {config.data} has no {' and no '.join(missing)}: choose other data, or "
            f"--multimodal.modalities {' '.join(modalities)}"
        )
    return replace(config, multimodal=replace(config.multimodal, modalities=left))


def missing_modalities(wanted: Sequence[str], present: Sequence[str]) -> list[str]:
    return [name for name in wanted if name not in present]


def preset_modalities(config: Config) -> tuple[str, ...]:
    return PRESETS[config.preset].multimodal.modalities


def scenes(config: MultimodalConfig) -> ExampleDataset:
    """Return the scenes. Raises UserError for another size of images or sounds than theirs."""
    for name, flag, asked_for, own in (
        ("image", "image-size", config.image_size, IMAGE_SIZE),
        ("audio", "frames", config.frames, FRAMES),
    ):
        if name in config.modalities and asked_for != own:
            raise UserError(
                f"--data scenes: --multimodal.{flag} is {asked_for} in this model, and scenes have "
                f"{own}; take {own}, or other data"
            )
    return SceneData(config.hard_batches)


def emoji(config: MultimodalConfig) -> ExampleDataset:
    return EmojiData(config.image_size, config.frames)


GENERATED_DATA: dict[str, Callable[[MultimodalConfig], ExampleDataset]] = {
    "scenes": scenes,
    "emoji": emoji,
}
"""Data sets that need no files: from --data to a function that makes them."""


MAX_GALLERY = 512  # held-out examples among which each is to be found


def held_out_examples(config: Config, run_dir: Path) -> SavedGallery:
    """Return the run's held-out examples and the words of its training captions: from the run's
    directory, or generated again. Raises UserError if they are nowhere."""
    if path := find_file(run_dir, FILE):
        return load_gallery(path.parent)
    try:
        data = load_dataset(config)
    except UserError as error:
        raise UserError(f"{error}. {run_dir} does not hold its held-out examples") from None
    examples = data.gallery(min(MAX_GALLERY, len(data.held_out)))
    return SavedGallery(examples, frozenset(words_of(data.text())))


# ---- what the model reads ------------------------------------------------------------------------


def model_inputs(examples, config: Config, tokenizer) -> dict[str, Tensor]:
    """Return what a model reads of examples, by modality, on the CPU.

    Where an example lacks a modality, its row holds the input of another example of the batch that
    has it, if there is one. No loss reads its embedding, shapes stay equal over all processes, and
    experts see real data.
    """
    inputs = {}
    for name in config.multimodal.modalities:
        x = getattr(examples, MODALITIES[name].input_field)
        has = examples.has(name) if examples.present else None
        if has is not None and not has.all():
            others = np.resize(np.flatnonzero(has) if has.any() else 0, len(has))
            source = np.where(has, np.arange(len(has)), others)
            x = [x[i] or " " for i in source] if isinstance(x, list) else x[source]
        if isinstance(x, list):
            inputs[name] = encode_captions(x, tokenizer, config.model.context_length)
        else:
            inputs[name] = torch.from_numpy(x)
    return inputs


def saved_tokenizer(run: str | None) -> ByteTokenizer | BPETokenizer | None:
    """Return the tokenizer of `run`, the start (--init-from) or teacher of a new run, whose weights
    fit no other tokens. None without `run`, or if it cannot be read: loading the weights later says
    why."""
    try:
        return tokenizer_from_json(load(find_run(run)).state["tokenizer"]) if run else None
    except UserError:
        return None


def present_on(examples, device: torch.device) -> dict[str, Tensor] | None:
    """Return which examples have which modality, (B,) bool by modality; None if all have all."""
    if examples.present is None:
        return None
    return {name: torch.from_numpy(x).to(device) for name, x in examples.present.items()}


def encode_captions(captions: list[str], tokenizer, max_tokens: int) -> Tensor:
    """Return captions as token ids (B, T), int64, padded with -1. T is the length of the longest;
    all are cut at `max_tokens`."""
    encoded = [tokenizer.encode(caption)[:max_tokens] for caption in captions]
    tokens = np.full((len(encoded), max(map(len, encoded))), -1, np.int64)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)
