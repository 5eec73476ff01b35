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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nanods import plots
from nanods.data.download import write_atomic
from nanods.errors import UserError
from nanods.training.muon import fast_bf16

# ---- runs of train.py ----------------------------------------------------------------------------


def run_training(
    out: Path, flags: Sequence[str], fresh: bool = False, launch: Sequence[str] = ()
) -> tuple[str, list[dict]]:
    """Run `train.py FLAGS` on one thread -> the command, and the rows of its metrics.jsonl.

    The flags must make `out` the run directory; the run prints into OUT.log. A finished run is not
    repeated unless `fresh`. `launch` are Python's arguments before train.py, such as
    ["-m", "torch.distributed.run"]. Raises UserError if the run was stopped before its last step.
    """
    command = [sys.executable, *launch, "train.py", *flags]
    last_picture = out / "loss.png"  # drawn after the last step
    if fresh or not last_picture.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with Path(f"{out}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        if not last_picture.exists():  # train.py exits with 0 when a signal stops it
            raise UserError(
                f"{out} was stopped before its last step; "
                "start the bench again: finished runs are kept"
            )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return " ".join(command[1:]), [json.loads(line) for line in lines]


def flags_from_dict(flags: dict[str, object]) -> list[str]:
    """Return command-line flags: {"lr": 0.02} -> ["--lr", "0.02"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


# ---- results -------------------------------------------------------------------------------------


def write_json(path: Path, table: dict) -> None:
    """Write a table to a JSON file, atomically."""
    text = json.dumps(table, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def update_expected(path: Path, entries: dict[str, dict]) -> None:
    """Set entries of expected.json, which train.py compares runs with; other entries stay."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | entries)


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
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "dtype": dtype,
    }


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
