"""What the benches share: runs of train.py in processes of their own, and tables that are written whole."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nanods.data.download import place


def trained(out: Path, words: Sequence[str], fresh: bool = False) -> tuple[str, list[dict]]:
    """`train.py WORDS`, which write to `out`, on one thread -> the command and the rows of its metrics.

    A finished run is taken as it is, unless `fresh`. What the run prints is in OUT.log.
    """
    command = [sys.executable, "train.py", *words]
    if fresh or not (out / "loss.png").exists():  # drawn after the last step
        out.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{out}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return " ".join(command[1:]), [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def as_words(flags: dict[str, object]) -> list[str]:
    """{"lr": 0.02} -> ["--lr", "0.02"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def write_json(path: Path, table: dict) -> None:
    text = json.dumps(table, indent=1) + "\n"
    place(path, lambda file: file.write(text.encode()))
