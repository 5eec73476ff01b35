"""A job of a bench: a training, and what its result comes from. stored_runs.py trains and stores.

The *identity* of a result is made of the settings, the hash of the data, and a probe, which is the
losses of the first few steps in fp64. If changed code computes the same losses, the result stays
valid. A change of what is computed changes the probe.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from nanods import config as ladder
from nanods.build import build_model
from nanods.command_line import RUNTIME_ONLY_FIELDS, from_command_line
from nanods.config import Config
from nanods.quantize import fake_quantize_model
from nanods.training.distill import Teacher
from nanods.training.optimizers import make_optimizers, set_learning_rate
from nanods.training.task import Task, accumulate_gradients, make_task
from nanods.training.teacher import attach_projection

PROBE_STEPS = 4
PROBE_BATCH = 4  # examples of a probe's step, if the run's batch is not smaller
PROBE_CONTEXT = 1024  # tokens of an example, if the run's context is not shorter
TOLERANCE = 1e-7  # relative: how far two machines may round apart in fp64


@dataclass(frozen=True)
class Job:
    """A run of train.py, in a process of its own on one thread."""

    name: str
    words: tuple[str, ...]
    """Its command line, without --out-dir."""
    folder: str = ""
    """Its directory below that of all runs, where two benches train the same. Default: BENCH/NAME,
    with hyphens for blanks."""
    needs: "Job | None" = None
    """The job whose weights this one starts from (--init-from, --ewc) or learns from (--teacher).
    It is trained before; also if it is stored, but its run directory is gone."""

    @cached_property
    def config(self) -> Config:
        """Return the configuration. What its flags imply is said by the run."""
        with contextlib.redirect_stdout(io.StringIO()):
            return from_command_line("", list(self.words))

    def folder_in(self, runs: Path, bench: str) -> Path:
        """Return the run directory."""
        return runs / (self.folder or f"{bench}/{self.name.replace(',', '').replace(' ', '-')}")

    def settings(self) -> dict:
        """Return the preset, the flags and the hash of the data.

        Flags that name a folder are left out: the hash stands for the data, and the identity of the
        job it `needs` for that run. So are those of --ewc where it is not used.
        """
        hidden = {"data", *RUNTIME_ONLY_FIELDS}
        if self.needs:
            hidden |= {"init-from", "teacher", "ewc"}
        config = self.config
        if not config.ewc:
            hidden |= {"ewc-lambda", "ewc-fisher", "ewc-sequences"}  # without effect
        flags = {name: x for name, x in ladder.flatten(config).items() if name not in hidden}
        data = quiet_task(config).data.sha256
        return as_json({"preset": config.preset, "flags": flags, "data": data})

    def probe(self) -> list[float]:
        return probe(self.config, self.needs.config if self.needs else None)


@dataclass(frozen=True, eq=False)
class FunctionJob:
    """A training by functions of the bench, in this process."""

    name: str
    flags: dict
    """All settings that the result depends on."""
    train: Callable[[], dict]
    """Trains and returns the result."""
    probe: Callable[[], list[float]]
    """Returns the losses of the first few steps in fp64."""
    needs: None = None

    def settings(self) -> dict:
        return as_json({"preset": None, "flags": self.flags, "data": None})


def ladder_job(preset: str, seed: int, data: str = "pydocs", name: str = "") -> Job:
    """Return the run of an unchanged preset, in the folder that `make results` uses too."""
    words = (preset, "--data", data, "--seed", str(seed))
    run = f"{preset}-{data}-{seed}"
    return Job(name or run, words, f"ladder/{run}")


# ---- settings and probe --------------------------------------------------------------------------


def as_json(table: dict) -> dict:
    """Return a table as it is read back from a JSON file."""
    return json.loads(json.dumps(table, default=str))


def quiet_task(config: Config) -> Task:
    """Return the task of a run. What its data say is said by the run."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make_task(config, torch.device("cpu"))


def probe(config: Config, needed: Config | None = None) -> list[float]:
    """Return the losses of the first PROBE_STEPS steps in fp64, with small batches of short texts.

    A warm start is left out, and an untrained model stands in for the teacher, of the configuration
    `needed`: the weights of both have a result and a probe of their own. If the run ever rounds its
    weights (--quantize), the second half of the steps does. Not seen is the penalty of --ewc.
    """
    batch_size = min(PROBE_BATCH, config.batch_size)
    context = min(PROBE_CONTEXT, config.model.context_length)
    config = replace(config, model=replace(config.model, context_length=context))
    config = replace(config, batch_size=batch_size, micro_batch=None, init_from=None, dtype="fp64")
    task = quiet_task(config)
    torch.manual_seed(config.seed)
    model = build_model(config).double()
    if config.teacher and needed:
        untrained = build_model(needed).double().eval().requires_grad_(False)
        task.teacher = Teacher(untrained, needed, Path(config.teacher), {}, "")
        attach_projection(model, task)
    optimizers = make_optimizers(config, model)
    losses = []
    bits = config.weight_bits(config.steps - 1)
    for step in range(PROBE_STEPS):
        if bits and step == PROBE_STEPS // 2:
            fake_quantize_model(model, bits)
        set_learning_rate(optimizers, step, config)
        metrics = accumulate_gradients(task, model, to_double(task.batch(step)), batch_size)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(metrics["train_loss"].item())
    return losses


def to_double(batch):
    """Return a batch whose floating-point tensors are fp64: images and sounds come as fp32."""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if not hasattr(batch, "inputs"):  # tokens alone
        return batch
    inputs = {name: to_double(x) for name, x in batch.inputs.items()}
    return batch._replace(inputs=inputs)


def code_version() -> str:
    """Return a hash of nanods' source and PyTorch's version: equal ones compute equal losses."""
    root = Path(ladder.__file__).parents[1]
    sources = [root / "train.py", *sorted((root / "nanods").rglob("*.py"))]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sources:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


# ---- comparison ----------------------------------------------------------------------------------


def difference_of_settings(stored: dict, current: dict) -> str | None:
    """Return how the settings of a stored result differ from the current ones; None if they do not.

    A flag that did not exist then is taken to have had today's value of the preset; if it had
    another one, the probe finds the difference.
    """
    if stored["preset"] != current["preset"]:
        return f"other settings ({current['preset']})"
    defaults = {}
    if current["preset"]:
        defaults = as_json(ladder.flatten(ladder.PRESETS[current["preset"]]))
    changed = [
        name
        for name, value in sorted(current["flags"].items())
        if stored["flags"].get(name, defaults.get(name)) != value
    ]
    if changed:
        return f"other settings ({', '.join(changed)})"
    return None if stored["data"] == current["data"] else "the data have changed"


def difference_of_losses(stored: list[float], current: list[float]) -> str | None:
    """Return in which step two probes differ, in words; None if they are equal up to rounding."""
    if len(stored) != len(current):
        return f"its probe has {len(stored)} steps instead of {len(current)}"
    for step, (then, now) in enumerate(zip(stored, current, strict=True), 1):
        if not abs(then - now) <= TOLERANCE * abs(now):
            return f"the loss of step {step} was {then:.8f} in fp64 and is {now:.8f}"
    return None
