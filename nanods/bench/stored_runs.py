"""Training runs of a bench, each stored as soon as it is finished: results/runs/BENCH.json.

    results = train_all("ladder", jobs, summarise)

A bench that is killed or interrupted goes on where it was: finished runs are read from the store,
and an unfinished one is resumed from its last checkpoint. The store is small and committed, so that
a fresh clone need not repeat hours of training.

Each result is stored with its *identity*: the flags that differ from the preset's, the hash of the
data, and a probe, which is the losses of the first few steps in fp64. If changed code computes the
same losses, the probe is unchanged and the result stays valid. A change of what is computed changes
the probe: the stored result is then stale, which is said, and the run is repeated.
"""

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanods import config as ladder
from nanods.bench.runs import describe_machine, run_training, write_json
from nanods.build import build_model
from nanods.config import Config
from nanods.training.optimizers import make_optimizers, set_learning_rate
from nanods.training.task import accumulate_gradients, make_task

PROBE_STEPS = 4
PROBE_BATCH = 4  # examples of a probe's step, or the run's batch if that is smaller
TOLERANCE = 1e-7  # relative: how far two machines may round apart in fp64


@dataclass(frozen=True)
class Job:
    """A run of train.py. `words` are its command line, without --out-dir."""

    name: str
    words: tuple[str, ...]


Summarise = Callable[[Job, Path, list[dict]], dict]
"""Maps a job, its run directory and the rows of its metrics to the result to store."""


# ---- what a result came from ---------------------------------------------------------------------


def identify(job: Job) -> dict:
    """Return the identity of a run, as JSON values: preset, changed flags, data and probe."""
    config = ladder.from_command_line("", list(job.words))
    defaults = ladder.flatten(ladder.PRESETS[config.preset])
    changed = {}
    for name, value in ladder.flatten(config).items():
        if name not in ladder.RUNTIME_ONLY_FIELDS and value != defaults[name]:
            changed[name] = value
    sha256, losses = probe(config)
    identity = {"preset": config.preset, "flags": changed, "data": sha256, "probe": losses}
    return json.loads(json.dumps(identity, default=str))


def probe(config: Config) -> tuple[str, list[float]]:
    """Return the hash of the data, and the losses of the first PROBE_STEPS steps in fp64.

    A warm start is left out: the weights it starts from have a result and a probe of their own.
    """
    batch_size = min(PROBE_BATCH, config.batch_size)
    config = replace(config, batch_size=batch_size, micro_batch=None, init_from=None, dtype="fp64")
    with contextlib.redirect_stdout(io.StringIO()):  # what the data say is said by the run
        task = make_task(config, torch.device("cpu"))
    torch.manual_seed(config.seed)
    model = build_model(config).double()
    optimizers = make_optimizers(config, model)
    losses = []
    for step in range(PROBE_STEPS):
        set_learning_rate(optimizers, step, config)
        metrics = accumulate_gradients(task, model, to_double(task.batch(step)), batch_size)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(metrics["train_loss"].item())
    return task.data.sha256, losses


def to_double(batch):
    """Return a batch whose floating-point tensors are fp64: images and sounds come as fp32."""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    inputs = {name: to_double(x) for name, x in batch.inputs.items()}
    return batch._replace(inputs=inputs)


def difference(stored: dict, current: dict) -> str | None:
    """Return why a stored result is stale, in words; None if it is valid."""
    if stored["preset"] != current["preset"] or stored["flags"] != current["flags"]:
        names = stored["flags"].keys() | current["flags"].keys()
        changed = [n for n in sorted(names) if stored["flags"].get(n) != current["flags"].get(n)]
        return f"other settings ({', '.join(changed) or current['preset']})"
    if stored["data"] != current["data"]:
        return "the data have changed"
    pairs = list(zip(stored["probe"], current["probe"], strict=False))
    for step, (then, now) in enumerate(pairs, 1):
        if not abs(then - now) <= TOLERANCE * abs(now):
            return f"the loss of step {step} was {then:.8f} in fp64 and is {now:.8f}"
    return None


# ---- training what is missing --------------------------------------------------------------------


def train_all(
    bench: str,
    jobs: Sequence[Job],
    summarise: Summarise,
    results: Path = Path("results"),
    runs: Path = Path("runs"),
    workers: int = 2,
) -> dict[str, dict]:
    """Return the result of each job by its name, in their order; train those not yet stored.

    `workers` runs are trained at a time, on one thread each. Prints which results are kept, which
    are stale and why, and after each run how many are left and about how long they will take.
    """
    path = results / "runs" / f"{bench}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    identities, missing = {}, []
    for job in jobs:
        identities[job.name] = identify(job)
        entry = stored.get(job.name)
        reason = difference(entry["identity"], identities[job.name]) if entry else None
        if reason:
            print(f"stale      {bench}, {job.name}: {reason}; trained again", flush=True)
        if entry is None or reason:
            missing.append(job)
    print(f"runs       {bench}: {len(jobs) - len(missing)} kept, {len(missing)} to train")
    lock, start, done = threading.Lock(), time.monotonic(), 0

    def train(job: Job) -> None:
        nonlocal done
        out = runs / bench / job.name.replace(",", "").replace(" ", "-")
        command, rows = run_or_resume(out, job, identities[job.name])
        result = summarise(job, out, rows)
        with lock:
            done += 1
            stored[job.name] = {
                "command": command,
                "identity": identities[job.name],
                "machine": describe_machine(),
                "result": result,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, stored)
            left = (time.monotonic() - start) / done * (len(missing) - done)
            print(
                f"stored     {bench}, {job.name}: {done} of {len(missing)}, about "
                f"{left / 60:.0f} min left",
                flush=True,
            )

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(train, job) for job in missing]:
            future.result()
    return {job.name: stored[job.name]["result"] for job in jobs}


def run_or_resume(out: Path, job: Job, identity: dict) -> tuple[str, list[dict]]:
    """Run train.py for a job, or continue what an earlier call began -> command and metrics.

    What is in `out` counts only if it has the same identity; otherwise it is started anew.
    """
    identity_file = Path(f"{out}.identity.json")
    same = False
    with contextlib.suppress(OSError, ValueError, KeyError):
        same = difference(json.loads(identity_file.read_text(encoding="utf-8")), identity) is None
    flags = [*job.words, "--out-dir", str(out)]
    if same:
        begun = any(out.glob("step_*")) and not (out / "loss.png").exists()
        if begun:
            print(f"resumed    {out}", flush=True)
            return run_training(out, [*flags, "--resume"], fresh=True)
        return run_training(out, flags)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(identity_file, identity)
    return run_training(out, flags, fresh=True)
