"""Load the teacher of a run (--teacher), and refuse one that does not fit the student.

What is compared must be the same for both models: the tokens and their numbers, or the pixels and
the frames. Depth, width, attention and experts may differ. What the losses are:
nanods/training/distill.py.
"""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from nanods.config import Config, flatten, from_dict
from nanods.errors import UserError
from nanods.training import checkpoint
from nanods.training.distill import Teacher, add_projection
from nanods.training.finished_run import find_run
from nanods.training.task import Task

INPUT_SIZES = {"image": ("multimodal.image-size",), "audio": ("multimodal.frames",)}
"""Flags that must be equal for two models to read the same images or sounds."""


def load_teacher(config: Config) -> Teacher:
    """Return the teacher that a configuration names, on the CPU, in eval mode.

    Raises UserError if there is none, if it is broken, or if it cannot read what the student reads.
    """
    name, saved, teacher_config = config.teacher, *find_teacher(config)
    out = config.run_dir.resolve()
    if saved.path.parent.resolve() in (out, out / checkpoint.BEST):
        raise UserError(
            f"--teacher {name}: this run would be written where its teacher is; choose another "
            "--out-dir"
        )
    if checkpoint.is_quantized(saved):
        raise UserError(
            f"--teacher {name} is quantised ({saved.state['format']}): name the run that it was "
            "made from"
        )
    check_sizes(config, teacher_config)
    model = checkpoint.load_model(saved).requires_grad_(False)
    for parameter_name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(
                f"--teacher {name}: its {parameter_name} has values that are not finite; choose "
                "another run, or an earlier checkpoint of it"
            )
    sha256 = checkpoint.read_sums(saved.path)[checkpoint.FILES[0]]  # which loading has verified
    return Teacher(model, teacher_config, saved.path, saved.state, sha256)


def find_teacher(config: Config) -> tuple[checkpoint.Checkpoint, Config]:
    """Return the teacher's last checkpoint and its configuration. Raises UserError if there is
    none."""
    try:
        saved = checkpoint.load(find_run(config.teacher))
        return saved, from_dict(saved.state["config"])
    except UserError as error:
        raise UserError(f"--teacher {config.teacher}: {error}") from None


def check_sizes(config: Config, read: Config) -> None:
    """Raise UserError if the teacher, of configuration `read`, is a model of another kind, or reads
    inputs of other sizes."""
    name, wanted = config.teacher, config.multimodal.modalities
    if bool(wanted) != bool(read.multimodal.modalities):
        kinds = ("a language model (V0 to V2)", "a contrastive model (V3)")
        raise UserError(
            f"--teacher {name} is {kinds[not wanted]}, and {config.preset} is "
            f"{kinds[bool(wanted)]}: choose a teacher of the same kind"
        )
    has, asked = flatten(read), flatten(config)
    must_match = [size for modality in wanted for size in INPUT_SIZES.get(modality, ())]
    if not wanted or "text" in wanted:
        must_match.append("vocab-size")
        if has["context-length"] < asked["context-length"]:
            raise UserError(
                f"--teacher {name} reads {has['context-length']} tokens at most, and this run "
                f"{asked['context-length']}: --context-length {has['context-length']}, or a "
                "teacher with a longer context"
            )
    different = [
        f"--{size} {has[size]} (asked for: {asked[size]})"
        for size in must_match
        if has[size] != asked[size]
    ]
    if different:
        raise UserError(
            f"--teacher {name} has {', '.join(different)}: it cannot read what this run reads; "
            "ask for the same, or choose another teacher"
        )


def attach_teacher(task: Task, teacher: Teacher, device: torch.device, dtype: torch.dtype) -> None:
    """Let a task compare its model with the teacher, and print which one it is.

    Raises UserError if the teacher lacks a modality of the data or has another tokenizer.
    """
    config, name = task.config, task.config.teacher
    modalities = config.multimodal.modalities
    missing = [each for each in modalities if each not in teacher.config.multimodal.modalities]
    if missing:
        left = " ".join(each for each in modalities if each not in missing)
        raise UserError(
            f"--teacher {name} has no {' and no '.join(missing)}: choose another teacher, or "
            f"--multimodal.modalities {left}"
        )
    reads_text = not modalities or "text" in modalities
    if reads_text and teacher.state["tokenizer"] != task.tokenizer.to_json():
        raise UserError(
            f"--teacher {name} has another tokenizer, so its tokens are not those of this run: "
            f"choose a teacher that was trained on --data {config.data}"
        )
    total, active = teacher.model.count_parameters()
    step, steps = teacher.state["step"], teacher.config.steps
    print(
        f"teacher    {teacher.path}: {teacher.config.preset}, {total / 1e6:.2f}M parameters "
        f"({active / 1e6:.2f}M active), after {step} of {steps} steps, sha256 "
        f"{teacher.sha256[:12]}; weight {config.distill_weight:g} in the loss"
    )
    if warning := describe_leak(task, teacher):
        print(f"warning    {warning}")
    if config.distill_weight == 0:
        print("           it is not used, since its weight is 0")
        return
    task.teacher = dataclasses.replace(teacher, model=teacher.model.to(device, dtype))


def describe_leak(task: Task, teacher: Teacher) -> str | None:
    """Return what is to be said if the teacher may have been trained on the validation data of this
    run; None if it was not."""
    own, other = task.config, teacher.config
    if teacher.state["data_sha256"] == task.data.sha256 and own.val_data == other.val_data:
        # A text is held out at its end: of a larger share the smaller one is a part.
        if own.val_fraction <= other.val_fraction:
            return None
        seen = f"held out {other.val_fraction:g} of the data, this run {own.val_fraction:g}"
        return f"the teacher was trained on a part of this run's validation data: it {seen}"
    if own.val_data and Path(own.val_data).resolve() == Path(other.data).resolve():
        return f"the teacher was trained on this run's validation data, --val-data {own.val_data}"
    return (
        f"the teacher was trained on other data ({other.data}) or another split of it: if that "
        "holds this run's validation data, the validation figures of this run are too good"
    )


def require_same_teacher(saved: checkpoint.Checkpoint, task: Task) -> None:
    """Raise UserError if a run would be resumed with another teacher than it began with."""
    began = saved.state.get("teacher_sha256")
    given = task.teacher.sha256 if task.teacher else None
    if began != given:
        raise UserError(
            f"--teacher {task.config.teacher} is not the one that this run began with (sha256 "
            f"{str(given)[:12]}, at the start {str(began)[:12]}): name that one, or start a new run"
        )


def attach_projection(model: nn.Module, task: Task) -> None:
    """Give the model a map to the teacher's space where one is needed: where widths differ and the
    cosines count."""
    if task.teacher is None or not task.config.distill_cosine:
        return
    M, D = (config.multimodal.width for config in (task.config, task.teacher.config))
    if task.config.multimodal.modalities and M != D:
        add_projection(model, M, D, task.config.seed)
