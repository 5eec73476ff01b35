"""Shared code of the benches: run train.py in a process of its own, measure time and memory, write.

Nothing here knows what a bench measures.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from nanods import plots
from nanods.data.download import write_atomic
from nanods.errors import UserError
from nanods.training import checkpoint
from nanods.training.metrics import read_metrics
from nanods.training.muon import fast_bf16

# ---- runs of train.py ----------------------------------------------------------------------------


def start_training(out: Path, flags: Sequence[str], launch: Sequence[str] = ()) -> subprocess.Popen:
    """Start `train.py FLAGS` on one thread, in a process of its own that prints into OUT.log.

    The flags must make `out` the run directory. `launch` are Python's arguments before train.py,
    such as ["-m", "torch.distributed.run"].
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with Path(f"{out}.log").open("a" if "--resume" in flags else "w") as log:
        return subprocess.Popen(
            [sys.executable, *launch, "train.py", *flags],
            stdout=log,
            stderr=log,
            env=os.environ | one_thread,
        )


def read_training(out: Path, process: subprocess.Popen) -> list[dict]:
    """Return the rows of metrics.jsonl of a run whose process has ended.

    Raises UserError if the run failed, or was stopped before its last step.
    """
    if process.returncode:
        lines = Path(f"{out}.log").read_text(errors="replace").strip().splitlines()
        raise UserError(
            f"train.py ended with exit code {process.returncode} in {out}, see {out}.log: "
            f"{lines[-1] if lines else 'it printed nothing'}"
        )
    if not is_finished(out):  # train.py exits with 0 when a signal stops it
        raise UserError(
            f"{out} was stopped before its last step; start the bench again: finished runs are kept"
        )
    return read_metrics(out / "metrics.jsonl")


def is_finished(out: Path) -> bool:
    """Return whether the newest checkpoint of a run is of its last step, and its metrics too."""
    rows = read_metrics(out / "metrics.jsonl")
    if not rows or not checkpoint.list_checkpoints(out):
        return False
    state = checkpoint.load(out).state
    return state["step"] == state["config"]["steps"] == rows[-1]["step"]


def run_training(out: Path, flags: Sequence[str], launch: Sequence[str] = ()) -> list[dict]:
    """Run `train.py FLAGS` as `start_training` does -> the rows of its metrics.jsonl."""
    process = start_training(out, flags, launch)
    process.wait()
    return read_training(out, process)


def training_command(flags: Sequence[str], launch: Sequence[str] = ()) -> str:
    """Return the command of a run, as the tables have it."""
    return " ".join([*launch, "train.py", *flags])


def flags_from_dict(flags: dict[str, object]) -> list[str]:
    """Return command-line flags; a tuple becomes the values of one flag.

    {"lr": 0.02, "a.b": False, "c": (1, 2)} -> ["--lr", "0.02", "--a.no-b", "--c", "1", "2"].
    """
    words = []
    for name, value in flags.items():
        group, dot, field = name.rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--{group}{dot}no-{field}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
    return words


# ---- results -------------------------------------------------------------------------------------


def measure_parts(
    path: Path, parts: dict[str, Callable[[], dict]], only: str, describe: Callable[[], dict]
) -> dict:
    """Measure the parts of a table, "all" or `only` one, and return the table.

    It is written after each part, so a bench that is stopped continues with --only. The other parts
    stay as they are, so `machines` names that of each part, which `describe` returns.
    """
    table = read_json(path)
    for part in parts if only == "all" else (only,):
        print(f"---- {part}", flush=True)
        torch.manual_seed(0)
        table[part] = parts[part]()
        machines = table.pop("machines", {}) | {part: describe()}
        table = {"machines": machines, **table}
        write_json(path, table)
    return table


def is_subset(bench: str, chosen: Collection[str], variants: Collection[str]) -> bool:
    """Return whether variants of a bench were left out, and say that its table, which `make docs`
    needs as a whole, is not changed then."""
    left_out = [name for name in variants if name not in chosen]
    if left_out:
        print(
            f"notice     left out: {', '.join(left_out)}; so {bench}.json is not changed. The "
            f"results of the runs are in runs/{bench}.json beside it"
        )
    return bool(left_out)


def read_json(path: Path) -> dict:
    """Return the table in a JSON file; an empty one if there is no file.

    Raises UserError if the file is damaged.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if not isinstance(table, dict):
        raise damaged(path, "it holds no table")
    return table


def damaged(path: Path, reason: str) -> UserError:
    """Return the error for a file of results that cannot be read."""
    return UserError(
        f"{path} is damaged ({reason}): restore it (git checkout {path}), or delete it to measure "
        "again"
    )


def write_json(path: Path, table: dict) -> None:
    """Write a table to a JSON file, atomically."""
    text = json.dumps(table, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def update_expected(path: Path, entries: dict[str, dict]) -> None:
    """Set entries of expected.json, which train.py compares runs with; other entries stay."""
    write_json(path, read_json(path) | entries)


def expected_entry(sha256: str, metric: str, values: Sequence[float]) -> dict:
    """Return an entry of expected.json: the mean over the seeds, with a tolerance of 0.02 or twice
    the seeds' spread, whichever is larger."""
    tolerance = max(0.02, 2 * (max(values) - min(values)))
    mean = sum(values) / len(values)
    return {"sha256": sha256, metric: round(mean, 4), "tolerance": round(tolerance, 4)}


def mean_and_each(values: list[float]) -> dict:
    """Return a metric's mean over the seeds, and its values."""
    return {"mean": statistics.mean(values), "each": values}


def add_exponents(table: dict[str, dict[str, float]], beyond: int = 0) -> dict:
    """Fit the exponent of each curve {name: {T: value}}, over lengths T of at least `beyond`.

    Returns the table as "by_tokens", and "exponents" by name for curves of two points or more.
    """
    exponents = {}
    for name, row in table.items():
        lengths = [int(T) for T in row if int(T) >= beyond]
        if len(lengths) > 1:
            values = [row[str(T)] for T in lengths]
            exponents[name] = plots.fitted_exponent(lengths, values)
    return {"by_tokens": table, "exponents": exponents}


def describe_machine(dtype: str = "auto") -> dict[str, object]:
    """Return what speed depends on: versions, CPU, threads and dtype.

    "auto" stands for the dtype that train.py would choose.
    """
    if dtype == "auto":
        dtype = "bf16" if fast_bf16(torch.device("cpu")) else "fp32"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": 1,
        "dtype": dtype,
    }


def machine_words(machine: dict) -> str:
    """Return the CPU and dtype of a describe_machine() result, in the words used in tables. Some
    results have the CPU's name as `processor`."""
    return f"{machine.get('processor', machine['cpu'])}, {machine['dtype']}"


def cpu_name() -> str:
    """Return the name of the CPU; on Linux platform.processor() has the architecture alone."""
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def cpu_info() -> dict[str, str]:
    """Return what Linux says of a processor, by field; nothing on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in fields}


# ---- time and memory -----------------------------------------------------------------------------


def median_seconds(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Time several functions in alternation -> the median seconds of each over `turns` rounds.

    A first round is not timed. Alternation exposes all functions to the same changes of load.
    """
    seconds = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes.

    On Linux ru_maxrss includes the peak of the parent process, so read VmHWM instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_memory_increase(call: Callable[[], object]) -> int:
    """Return by how many bytes a call raises the peak memory of this process.

    Call it in a fresh process, where the peak equals the memory in use.
    """
    gc.collect()
    before = peak_memory()
    call()
    return peak_memory() - before
