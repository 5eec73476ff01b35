"""What the benches share: runs of train.py in processes of their own, rivals that take turns, tables that are written whole."""

import gc
import json
import os
import platform
import resource
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


def run_training(
    out: Path, words: Sequence[str], fresh: bool = False, launch: Sequence[str] = ()
) -> tuple[str, list[dict]]:
    """`train.py WORDS`, which write to `out`, on one thread -> the command and the rows of its metrics.

    A finished run is taken as it is, unless `fresh`. What the run prints is in OUT.log. `launch`: what starts train.py, where
    that is not Python alone.
    """
    command = [sys.executable, *launch, "train.py", *words]
    if fresh or not (out / "loss.png").exists():  # drawn after the last step
        out.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{out}.log").open("w") as log:
            subprocess.run(
                command,
                check=True,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        if not (out / "loss.png").exists():  # train.py ends in peace when it is told to stop
            raise UserError(
                f"{out} was stopped before its last step; start the bench again: what is finished is kept"
            )
    return " ".join(command[1:]), [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def flags_from_dict(flags: dict[str, object]) -> list[str]:
    """{"lr": 0.02} -> ["--lr", "0.02"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def write_json(path: Path, table: dict) -> None:
    text = json.dumps(table, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def update_expected(path: Path, entries: dict[str, dict]) -> None:
    """Write into expected.json what train.py shall compare these runs with; the other entries stay."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | entries)


def median_seconds(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Seconds of each call, the rivals taking turns; one turn before the clock starts."""
    seconds = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory() -> int:
    """Bytes that this process held at most. Linux counts in ru_maxrss what the process that started it held, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_memory_increase(call: Callable[[], object]) -> int:
    """Bytes by which a call raises the peak of this process's memory: wants a fresh process, whose peak is what it holds."""
    gc.collect()
    before = peak_memory()
    call()
    return peak_memory() - before


def add_exponents(table: dict[str, dict[str, float]], beyond: int = 0) -> dict:
    """{name: {T: value}} -> the same and the exponent of each, over lengths of at least `beyond`."""
    slopes = {}
    for name, row in table.items():
        xs = [int(T) for T in row if int(T) >= beyond]
        if len(xs) > 1:
            slopes[name] = plots.fitted_exponent(xs, [row[str(T)] for T in xs])
    return {"by_tokens": table, "exponents": slopes}


def describe_machine(dtype: str = "auto") -> dict[str, object]:
    """What figures of speed depend on; "auto" is train.py's choice of precision."""
    if dtype == "auto":
        dtype = "bf16" if fast_bf16(torch.device("cpu")) else "fp32"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {
        **versions,
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "dtype": dtype,
    }
