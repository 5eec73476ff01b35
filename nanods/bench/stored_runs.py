"""Training runs of a bench, each stored as soon as it is finished: results/runs/BENCH.json.

    results = train_all("ladder", jobs, summarise)

A bench that is killed or interrupted goes on where it was: finished runs are read from the store,
and an unfinished one is resumed from its last checkpoint. The store is small and committed, so that
a fresh clone need not repeat hours of training. To repeat them, delete the store and the runs.

Each result is stored with its identity (jobs.py). If that has changed, the result is stale, which
is said, and the run is repeated. The probe, its slow part, is computed only where the code is not
the code that the result was stored with. What `summarise` computes is not part of the identity:
after a change of it, delete the store, and the figures are computed anew from the runs.
"""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Literal

import torch

from nanods.bench.jobs import (
    FunctionJob,
    Job,
    code_version,
    difference_of_losses,
    difference_of_settings,
)
from nanods.bench.runs import (
    damaged,
    describe_machine,
    is_finished,
    read_json,
    read_training,
    start_training,
    training_command,
    write_json,
)
from nanods.data.lock import LockHeldError, lock
from nanods.errors import UserError
from nanods.training.checkpoint import list_checkpoints
from nanods.training.commands import python
from nanods.training.metrics import read_metrics
from nanods.training.setup import lock_run_directory

SECONDS_BETWEEN_REPORTS = 60

Summarise = Callable[[Job, Path, list[dict]], dict]
"""Maps a job, its run directory and the rows of its metrics to the result to store."""

Machines = Literal["any", "one", "this"]
"""Which stored results train_all keeps, if some were measured on other machines.

"any": all. "this": those of this machine, because the times are to say how fast it is. "one": all,
if afterwards all results come from one machine; if not, only those of this machine, because the
times are compared with each other.
"""


@dataclass(frozen=True)
class TrainingArgs:
    """The flags of a bench that trains."""

    jobs: int = 2
    """Runs at a time, one thread each."""
    results: Path = Path("results")
    """Where to write the table and the pictures."""
    runs: Path = Path("runs")
    """Directory of the runs; an unfinished one is resumed."""


# ---- the store -----------------------------------------------------------------------------------


class Store:
    """The results of a bench by the names of their jobs, and what each came from.

    An entry has the `command`, the `identity` (settings, probe, and the identity of the job it
    `needs`), the `code` version with which the identity was last found to hold, the `machine` and
    the `result`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, code_version()
        self.entries = read_json(path)
        for name, entry in self.entries.items():
            if not isinstance(entry, dict) or not {"identity", "result"} <= entry.keys():
                raise damaged(path, f"{name} has no result")
        self._settings: dict[str, dict] = {}
        self._probes: dict[str, list[float]] = {}

    def settings(self, job: Job | FunctionJob) -> dict:
        if job.name not in self._settings:
            self._settings[job.name] = job.settings()
        return self._settings[job.name]

    def probe(self, job: Job | FunctionJob) -> list[float]:
        if job.name not in self._probes:
            self._probes[job.name] = job.probe()
        return self._probes[job.name]

    def identity(self, job: Job | FunctionJob) -> dict:
        """Return what the result of a job comes from, if it is trained now."""
        identity = {**self.settings(job), "probe": self.probe(job)}
        if job.needs:
            identity["needs"] = self.entries[job.needs.name]["identity"]
        return identity

    def why_stale(self, entry: dict, job: Job | FunctionJob) -> str | None:
        """Return why an entry, or what is in a run directory, is not the result of a job, in words;
        None if it is."""
        stored = entry["identity"]
        reason = difference_of_settings(stored, self.settings(job))
        if reason is None and entry.get("code") != self.code:
            reason = difference_of_losses(stored["probe"], self.probe(job))
        if reason is None and job.needs:
            reason = self.why_needs_changed(stored, job.needs)
        return reason

    def why_needs_changed(self, stored: dict, needs: Job) -> str | None:
        """Return how the weights that a stored result started from differ from those of now."""
        then, now = stored.get("needs"), self.entries.get(needs.name, {}).get("identity")
        if not (then and now):
            return f"{needs.name}, from which it starts, is trained again"
        reason = difference_of_settings(then, now)
        reason = reason or difference_of_losses(then["probe"], now["probe"])
        return f"{needs.name}, from which it starts: {reason}" if reason else None

    def put(self, job: Job | FunctionJob, command: str, result: dict) -> None:
        """Store the result of a job on disk."""
        self.entries[job.name] = {
            "command": command,
            "identity": self.identity(job),
            "code": self.code,
            "machine": describe_machine(),
            "result": result,
        }
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.entries)


def machine_of(bench: str, jobs: Sequence[Job | FunctionJob], results: Path) -> dict:
    """Return the machine on which stored results were measured, as describe_machine does.

    A value in which several machines differ has the values of all.
    """
    entries = read_json(results / "runs" / f"{bench}.json")
    machines = [entries[job.name]["machine"] for job in jobs]
    joined = {}
    for name in machines[0]:
        values = list(dict.fromkeys(machine.get(name) for machine in machines))
        joined[name] = values[0] if len(values) == 1 else ", ".join(map(str, values))
    return joined


# ---- training what is missing --------------------------------------------------------------------


def train_all(
    bench: str,
    jobs: Sequence[Job | FunctionJob],
    summarise: Summarise | None = None,
    results: Path = Path("results"),
    runs: Path = Path("runs"),
    workers: int = 2,
    machines: Machines = "any",
) -> dict[str, dict]:
    """Return the result of each job by its name, in their order, with the "command" of the run.

    Trains those not yet stored: `workers` runs of train.py at a time. A FunctionJob trains in this
    process, and needs no `summarise`. Prints which results are kept, which are stale and why, how
    far the runs are and about how long the rest will take.

    After Ctrl-C, SIGTERM or an error the unfinished runs save and stop, and the same command
    continues. If this process is killed, the runs it had started go on; the next start waits for
    them.
    """
    torch.set_num_threads(1)  # beside the runs, which have one each
    with lock_store(results / "runs" / f".{bench}.lock"), catch_signals():
        store = Store(results / "runs" / f"{bench}.json")
        trainings = None
        try:
            missing, for_weights = find_missing(bench, jobs, store, runs, machines)
            for job in missing:
                if isinstance(job, Job):  # one of a bench that was killed goes on without it
                    with lock_run_directory(job.folder_in(runs, bench), wait=True):
                        pass
            trainings = Trainings(bench, missing, for_weights, summarise, store, runs)
            trainings.run(workers)
        except KeyboardInterrupt:
            left = f"{len(trainings.not_stored) if trainings else 'some'} of {len(jobs)} runs"
            command = this_command(python())
            print(f"interrupted {bench}: {left} are left. Continue with: {command}", flush=True)
            raise
    stored = {job.name: store.entries[job.name] for job in jobs}
    return {name: {"command": e["command"]} | e["result"] for name, e in stored.items()}


@contextlib.contextmanager
def lock_store(path: Path) -> Iterator[None]:
    """Keep a second process from the same bench."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path, wait=False))
        except LockHeldError as holder:
            raise UserError(
                f"this bench runs already ({holder}): wait until it ends, or stop it"
            ) from None
        yield


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM too, and on a SIGINT that the shell has set to ignored."""

    def interrupt(number: int, frame) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def this_command(interpreter: str) -> str:
    """Return the command line of this program."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    return shlex.join([interpreter, *program, *sys.argv[1:]])


def find_missing(
    bench: str,
    jobs: Sequence[Job | FunctionJob],
    store: Store,
    runs: Path,
    machines: Machines,
) -> tuple[list[Job | FunctionJob], set[str]]:
    """Return the jobs to train, in their order, and the names of those whose stored result stays.

    To train: jobs without a result, jobs with a stale one, and jobs whose weights are gone though
    another job needs them. A job of the last kind keeps its result, unless that is stale.
    """
    this_machine = describe_machine()
    stale = find_stale(jobs, store, this_machine if machines == "this" else None)
    measured_on = [  # what is missing will be measured on this machine
        store.entries[job.name]["machine"]
        if job.name in store.entries and job.name not in stale
        else this_machine
        for job in jobs
    ]
    if machines == "one" and any(machine != measured_on[0] for machine in measured_on):
        stale = find_stale(jobs, store, this_machine)
    for name, reason in stale.items():
        print(f"stale      {bench}, {name}: {reason}; trained again", flush=True)
    missing, n_elsewhere = [], 0
    is_newer = False  # the code, than what a kept result was stored with
    for job in jobs:
        entry = store.entries.get(job.name)
        if entry is None or job.name in stale:
            missing.append(job)
        else:
            n_elsewhere += entry["machine"] != this_machine
            is_newer |= entry.get("code") != store.code
            entry["code"] = store.code
    for_weights = set()
    for job in list(missing):
        needed = job.needs
        while needed and needed not in missing:
            out = needed.folder_in(runs, bench)
            if needed.name in store.entries and has_weights(needed, store, out):
                break
            print(f"missing    {out}, which other runs need: trained again", flush=True)
            missing.insert(0, needed)
            entry = store.entries.get(needed.name)
            if entry and store.why_stale(entry, needed) is None:
                for_weights.add(needed.name)
            needed = needed.needs
    n_kept = len(jobs) - sum(job in missing for job in jobs)
    elsewhere = f" ({n_elsewhere} of another machine)" if n_elsewhere else ""
    weights = f" ({len(for_weights)} for weights alone)" if for_weights else ""
    n_missing = f"{len(missing)} to train{weights}"
    print(f"runs       {bench}: {n_kept} kept{elsewhere}, {n_missing}", flush=True)
    if is_newer:
        store.write()
    return missing, for_weights


def find_stale(
    jobs: Sequence[Job | FunctionJob], store: Store, machine: dict | None
) -> dict[str, str]:
    """Map the name of each job whose stored result is stale to the reason.

    If `machine` is given, a result that was measured on another one is stale, too.
    """
    stale = {}
    for job in jobs:
        entry = store.entries.get(job.name)
        if entry is None:
            continue
        reason = store.why_stale(entry, job)
        if job.needs and job.needs.name in stale:
            reason = reason or f"{job.needs.name}, from which it starts, is trained again"
        if machine and entry["machine"] != machine:
            reason = reason or "it was measured on another machine or version of PyTorch"
        if reason:
            stale[job.name] = reason
    return stale


# ---- the folders of the runs ---------------------------------------------------------------------


def read_run_identity(out: Path) -> dict | None:
    """Return the identity of what is in a run directory and the code version, if they are noted."""
    with contextlib.suppress(UserError):
        noted = read_json(Path(f"{out}.identity.json"))
        return noted if {"identity", "code"} <= noted.keys() else None


def is_current(job: Job, store: Store, out: Path) -> bool:
    """Return whether what is in a run directory was begun by the job as it is now."""
    noted = read_run_identity(out)
    return noted is not None and store.why_stale(noted, job) is None


def has_weights(job: Job, store: Store, out: Path) -> bool:
    """Return whether the trained weights of a job are in its run directory."""
    return is_finished(out) and is_current(job, store, out)


class Trainings:
    """The runs that a call of train_all trains."""

    def __init__(
        self,
        bench: str,
        jobs: Sequence[Job | FunctionJob],
        for_weights: set[str],
        summarise: Summarise | None,
        store: Store,
        runs: Path,
    ) -> None:
        self.bench, self.summarise, self.store, self.runs = bench, summarise, store, runs
        self.waiting, self.for_weights = list(jobs), for_weights
        self.not_stored = {job.name for job in jobs} - for_weights
        self.running: dict[Job, Popen] = {}
        self.count, self.done = len(jobs), 0
        self.start = self.last_report = time.monotonic()
        self.begun_at: dict[str, float] = {}  # the fraction of a run that an earlier call did
        self.trained = 0.0  # runs that this call trained, those in part included; but the running

    def run(self, workers: int) -> None:
        """Train all. In the end, whatever it is, no process is left."""
        try:
            while self.waiting or self.running:
                while len(self.running) < workers and (job := self.next_job()):
                    self.waiting.remove(job)
                    self.begin(job)
                time.sleep(0.1)
                for job, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[job]
                        self.finish(job, process)
                if time.monotonic() - self.last_report > SECONDS_BETWEEN_REPORTS:
                    self.report()
        finally:
            stop(list(self.running.values()))

    def folder(self, job: Job) -> Path:
        return job.folder_in(self.runs, self.bench)

    def flags(self, job: Job) -> list[str]:
        """Return the command line of a run, on the CPU: that is the machine it is stored with, and
        train.py would take a GPU if there is one."""
        device = [] if "--device" in job.words else ["--device", "cpu"]
        return [*job.words, *device, "--out-dir", str(self.folder(job))]

    def next_job(self) -> Job | FunctionJob | None:
        """Return a job whose needs are met, if there is one."""
        unfinished = [*self.waiting, *self.running]
        return next((job for job in self.waiting if job.needs not in unfinished), None)

    def begin(self, job: Job | FunctionJob) -> None:
        """Start a job, or continue what an earlier call began."""
        number = self.count - len(self.waiting)
        print(f"begun      {self.bench}, {job.name}: run {number} of {self.count}", flush=True)
        self.begun_at[job.name] = 0.0
        if isinstance(job, FunctionJob):
            self.put(job, this_command("python"), job.train())
            return
        out, flags = self.folder(job), self.flags(job)
        if is_current(job, self.store, out) and list_checkpoints(out):
            self.begun_at[job.name] = fraction_done(job, out)
            if is_finished(out):
                print(f"found      {out}, finished", flush=True)
                self.put(job, training_command(flags), self.read(job, None))
                return
            print(f"resumed    {out}", flush=True)
            flags.append("--resume")
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            noted = {"identity": self.store.identity(job), "code": self.store.code}
            write_json(Path(f"{out}.identity.json"), noted)
        self.running[job] = start_training(out, flags)

    def finish(self, job: Job, process: Popen) -> None:
        """Store the result of a run whose process has ended."""
        self.put(job, training_command(self.flags(job)), self.read(job, process))

    def read(self, job: Job, process: Popen | None) -> dict:
        """Return the result of a finished run."""
        out = self.folder(job)
        rows = read_training(out, process) if process else read_metrics(out / "metrics.jsonl")
        return self.summarise(job, out, rows)

    def put(self, job: Job | FunctionJob, command: str, result: dict) -> None:
        """Store a result, unless the run was repeated only because its weights were missing."""
        if job.name not in self.for_weights:
            self.store.put(job, command, result)
            self.not_stored.remove(job.name)
        self.done += 1
        self.trained += 1 - self.begun_at[job.name]
        verb = "trained" if job.name in self.for_weights else "stored "
        print(f"{verb}    {self.bench}, {job.name}: {self.progress()}", flush=True)

    def report(self) -> None:
        """Print how far the running ones are."""
        self.last_report = time.monotonic()
        fractions = (f"{job.name} {self.fraction(job):.0%}" for job in self.running)
        print(f"running    {self.bench}, {', '.join(fractions)}: {self.progress()}", flush=True)

    def fraction(self, job: Job) -> float:
        return fraction_done(job, self.folder(job))

    def progress(self) -> str:
        """Return how many runs are stored and about how long the others take, at the rate so far.

        Counts a run by the fraction of its steps, as if all runs took equally long.
        """
        trained, left = self.trained, float(len(self.waiting))
        for job in self.running:
            fraction = self.fraction(job)
            trained += max(0.0, fraction - self.begun_at[job.name])
            left += 1 - fraction
        words = f"{self.done} of {self.count} stored"
        if left and trained:
            seconds = (time.monotonic() - self.start) / trained * left
            words += f", about {seconds / 60:.0f} min left"
        return words


def fraction_done(job: Job, out: Path) -> float:
    """Return the fraction of a run's steps that its metrics have."""
    rows = read_metrics(out / "metrics.jsonl")
    return rows[-1]["step"] / job.config.steps if rows else 0.0


def stop(processes: Sequence[Popen]) -> None:
    """Let runs save and stop, so that the next start resumes them. A second Ctrl-C ends them at
    once; they then resume from their last checkpoints."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
