"""The commands that a run prints: quoted for the shell, with the flags of the run."""

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from nanods import config as ladder
from nanods.command_line import OTHER_DEFAULTS, RUNTIME_ONLY_FIELDS
from nanods.config import Config
from nanods.flags import from_environment

MAX_WORDS = 60  # columns of a prompt or query in a printed command


def sample_command(run_dir: Path, *flags: str) -> str:
    """Return the command that samples a run."""
    return shlex.join([python(), "sample.py", str(run_dir), *flags])


def tensorboard_command(run_dir: Path) -> str:
    """Return the command that shows a run in TensorBoard."""
    return shlex.join([python(), "-m", "tensorboard.main", "--logdir", str(run_dir)])


def resume_command(config: Config) -> str:
    """Return the command that continues a run: with the flags that its checkpoints do not hold."""
    flags = changed_flags(config, set(RUNTIME_ONLY_FIELDS))
    return shlex.join([*train_program(), config.preset, "--resume", *flags])


def retry_command(config: Config, **changes) -> str:
    """Return the command that starts a run again with some fields changed."""
    flags = changed_flags(replace(config, **changes), set(ladder.flatten(config)))
    return shlex.join([*train_program(), config.preset, *flags])


def train_program() -> list[str]:
    """Return the words that start train.py, by as many processes as this run has."""
    processes = from_environment("WORLD_SIZE", 1)
    if processes == 1:
        return [python(), "train.py"]
    local = from_environment("LOCAL_WORLD_SIZE", processes)
    machines = ["--standalone"]
    if processes > local:
        machines = ["--nnodes", str(processes // local), "--rdzv-endpoint", "FIRST_NODE:29500"]
    launcher = [python(), "-m", "nanods.distributed.launch", *machines]
    return [*launcher, "--nproc-per-node", str(local), "train.py"]


def changed_flags(config: Config, names: set[str]) -> list[str]:
    """Return the flags, of those named, by which a configuration differs from its preset.

    With --stage finetune or --optimizer adamw, the flags for which they have defaults of their own
    are written even where the value is the preset's.
    """
    values, defaults = ladder.flatten(config), ladder.flatten(ladder.PRESETS[config.preset])
    if config.stage == "finetune" or config.optimizer == "adamw":
        defaults |= dict.fromkeys(OTHER_DEFAULTS)
    words = []
    for name, value in values.items():
        if name not in names or name == "resume" or value == defaults[name]:
            continue
        if isinstance(value, bool):
            prefix, _, field = name.rpartition(".")
            field = field if value else f"no-{field}"
            words.append(f"--{prefix}.{field}" if prefix else f"--{field}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


def first_words(text: str) -> str:
    """Return the beginning of a text, at a line's start, as an example of its language; "" if it
    has nothing that prints."""
    for line in text.splitlines():
        line = line.strip()
        if line.isprintable() and "\ufffd" not in line and any(map(str.isalnum, line)):
            return shorten(" ".join(line.split()[:3]), 24)
    return ""


def shorten(text: str, length: int = MAX_WORDS) -> str:
    """Return a text cut at `length` characters, where possible at the end of a word."""
    if len(text) <= length:
        return text
    return text[: length + 1].rpartition(" ")[0] or text[:length]


def flag(name: str, value: str) -> list[str]:
    """Return the words of a flag whose value may begin with a dash."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def python() -> str:
    """Return how to call this Python: `python` where the shell finds this one, else its path."""
    executable = Path(sys.executable)
    if shutil.which("python") == str(executable):
        return "python"
    if executable.is_relative_to(Path.cwd()):
        executable = executable.relative_to(Path.cwd())
    return str(executable)
