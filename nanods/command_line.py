"""The command line of train.py: a preset, with flags for its fields; and what --resume may change.

A flag that was typed counts even if it has the preset's default: AdamW's learning rate, the
defaults of --stage finetune and the checks of --resume depend on it.
"""

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import tyro

from nanods.config import PRESETS, Config, flatten
from nanods.errors import UserError

ADAMW_LR = 0.003  # the peak rate of --optimizer adamw, where --lr is not given
OTHER_DEFAULTS = ("data", "steps", "lr", "expert-lr", "out-dir")
"""Flags for which --optimizer adamw or --stage finetune have other defaults than the preset."""
PATHS = ("data", "val_data", "init_from", "teacher", "ewc", "out_dir")
"""Fields that may hold a path."""


def from_command_line(description: str, args: list[str] | None = None) -> Config:
    """Return the preset that the command line names, with its overrides. Ends with exit code 2 if
    it cannot be understood."""
    presets = {name: (describe(config), config) for name, config in PRESETS.items()}
    try:
        config = tyro.extras.overridable_config_cli(presets, description=description, args=args)
    except ValueError as error:
        raise UserError(str(error)) from None
    typed = typed_flags(sys.argv[1:] if args is None else args)
    config = replace(config, **{name: expand_home(getattr(config, name)) for name in PATHS})
    if config.resume:
        if config.stage == "finetune" and "out-dir" not in typed:
            config = replace(config, out_dir=finetuned_dir(config.preset))
        return config
    if config.optimizer == "adamw" and "lr" not in typed:
        print(f"lr         {ADAMW_LR} (AdamW's default here; the preset's {config.lr} is Muon's)")
        config = replace(config, lr=ADAMW_LR)
    if config.ewc and not config.init_from:
        config = replace(config, init_from=config.ewc)
    if config.stage == "finetune":
        config = finetune(config, typed)
    for name, reason in without_effect(config).items():
        if name in typed:
            print(f"notice     --{name} has no effect: {reason}")
    return config


def expand_home(path: str | Path | None) -> str | Path | None:
    """Replace the ~ that some shells leave in `make train-v1 DATA=~/a.txt` or `--data=~/a.txt`."""
    starts_at_home = path is not None and str(path).startswith("~/")
    return type(path)(Path(path).expanduser()) if starts_at_home else path


def without_effect(config: Config) -> dict[str, str]:
    """Return the flags that change nothing beside the others of a configuration, and why."""
    moe, attention = config.model.moe, config.model.attention
    is_v3 = bool(config.multimodal.modalities)
    of_windows = ("short-", "sampling")
    of_muon = ("momentum", "equal-neurons", "expert-")
    rules = (  # a condition, the reason to print if it holds, how its flags begin
        (
            moe.n_expert == 1,
            "the model has no experts (--moe.n-expert 1)",
            ("moe.", "expert-", "init-noise"),
        ),
        (moe.capacity_factor is None, "there is no --moe.capacity-factor", ("moe.priority",)),
        (attention.kind == "dense", "attention is dense (--attention.kind)", ("attention.",)),
        (is_v3, "V3's grids have a base of their own", ("rope-base",)),
        (is_v3, "V3 is evaluated on all held-out examples, 512 at most", ("eval-tokens",)),
        (is_v3, "V3 learns no instructions", ("mix",)),
        (config.data == "fineweb-edu", "about 1 MB of it is held out", ("val-fraction",)),
        (config.data != "scenes", "only scenes have hard batches", ("multimodal.hard-batches",)),
        (not is_v3, "the model reads text alone", ("multimodal.",)),
        (bool(config.val_data), "--val-data is the validation data", ("val-fraction",)),
        (config.teacher is None, "there is no --teacher", ("distill-",)),
        (config.ewc is None, "there is no --ewc", ("ewc-",)),
        (config.quantize == "off", "there is no --quantize", ("quantize-from",)),
        (
            config.quantize_from >= config.steps,
            "the run ends before --quantize-from",
            ("quantize",),
        ),
        (config.init_from is None, "there is no --init-from", ("init-noise",)),
        (config.short_context == 0, "there is no --short-context", ("short-parts",)),
        (is_v3, "V3 reads no windows of a text", of_windows),
        (config.data == "instructions", "examples are read whole", of_windows),
        (config.optimizer == "adamw", "AdamW updates all weights", of_muon),
        (config.expert_optimizer == "adamw", "AdamW updates experts each step", ("expert-every",)),
    )
    switches = ("moe.n-expert", "attention.kind", "multimodal.modalities")
    reasons = {}
    for holds, reason, beginnings in rules:
        for name in flatten(config) if holds else ():
            if name.startswith(beginnings) and name not in switches:
                reasons.setdefault(name, reason)
    return reasons


def finetune(config: Config, typed: Collection[str]) -> Config:
    """Return a configuration with the defaults of --stage finetune for the flags that are not
    typed, and print them. Raises UserError if there is no run to start from."""
    if config.init_from is None:
        raise UserError(
            "--stage finetune goes on from a trained run: name it with --init-from RUN, such as "
            f"runs/{config.preset}"
        )
    defaults = {
        "data": "instructions",
        "steps": max(1, config.steps // 4),
        "lr": config.lr / 4,
        "expert_lr": config.expert_lr / 4,
        "out_dir": finetuned_dir(config.preset),
    }
    if config.multimodal.modalities:
        del defaults["data"]  # V3 reads no instructions
    new = {name: v for name, v in defaults.items() if name.replace("_", "-") not in typed}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in new.items()]
    print(f"stage      finetune: {' '.join(words) or 'nothing but what you have set'}")
    return replace(config, **new)


def finetuned_dir(preset: str) -> Path:
    """Return where --stage finetune puts its run, unless --out-dir says so."""
    return Path("runs") / f"{preset}-finetuned"


def typed_flags(words: list[str]) -> set[str]:
    """Return the names of the flags on a command line, as `flatten` spells them: the values alone
    do not tell a flag that was typed with its default from one that was left out."""
    names = {word[2:].split("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    positive = set()  # --moe.no-normalise sets moe.normalise
    for name in names:
        *parts, last = name.split(".")
        positive.add(".".join([*parts, last.removeprefix("no-")]))
    return names | positive


def describe(config: Config) -> str:
    """Return a preset in words, for --help."""
    modalities, model, moe = config.multimodal.modalities, config.model, config.model.moe
    words = f"{' and '.join(modalities)}: " if modalities else ""
    words += f"{model.attention.kind} attention, "
    if moe.n_expert > 1:
        words += f"{moe.top_k} of {moe.n_expert} experts per token, "
    return words + (
        f"{model.n_layer} layers of width {model.n_embd}, context {model.context_length}"
    )


# ---- resuming ------------------------------------------------------------------------------------


RUNTIME_ONLY_FIELDS = (
    "resume",
    "out-dir",
    "device",
    "save-every",
    "keep-checkpoints",
    "compile",
    "mesh",
    "activation-checkpointing",
    "tensorboard",
)
"""Flags that do not change what is learnt."""


def resolve_resume(requested: Config, saved: Config, typed: Collection[str] = ()) -> Config:
    """Return the saved configuration with the runtime-only fields that are asked for (device, how
    often to save, where).

    `typed` names the flags of the command line: one that is typed with the preset's default counts
    like any other. Raises UserError naming each flag that asks for something else than the saved
    run has.
    """
    default, wanted, has = flatten(PRESETS[requested.preset]), flatten(requested), flatten(saved)
    given = {name for name in wanted if name in typed or wanted[name] != default[name]}
    may_change = set(RUNTIME_ONLY_FIELDS)
    if saved.teacher and requested.teacher:
        may_change.add("teacher")  # it may have been moved; its hash says whether it is the same
    conflicts = []
    for name, value in wanted.items():
        is_asked = name == "preset" or (name in given and name not in may_change)
        if is_asked and value != has[name]:
            conflicts.append(f"--{name} {value} (the run has {has[name]})")
    if conflicts:
        raise UserError(
            f"{requested.run_dir} holds a run of another configuration: {', '.join(conflicts)}. "
            "Leave these flags out to continue it, or choose another --out-dir to start a new run"
        )
    changed = {name for name in may_change if name in given} | {
        "resume",
        "out-dir",
        "mesh",
    }
    fields = (name.replace("-", "_") for name in changed)
    return replace(saved, **{name: getattr(requested, name) for name in fields})
