"""What a second process brings: results/scale.json.

    python -m nanods.bench.scale       a few minutes on 2 cores; `make bench-scale`

v2-tiny, STEPS steps of the same batch, one thread a process, on gloo: one process, two that are copies (dp), two that share
the experts (ep). Medians of a step's tokens a second, and of the seconds that the optimizers took, and adding up the gradients
(waiting for the other process included; the journeys of ep's tokens are part of forward and backward).
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from nanods.bench.runs import machine, write_json

STEPS = 60
MESHES = {"one process": None, "dp=2": "dp=2", "ep=2": "ep=2"}


@dataclass(frozen=True)
class Args:
    results: Path = Path("results")
    """Where the table goes."""
    runs: Path = Path("runs/scale")
    """Where the runs go; they are always made anew."""


def run(args: Args, name: str, mesh: str | None) -> dict:
    """Train for a while -> medians over the steps but for the first few."""
    out = args.runs / name.replace(" ", "-")
    words = ["train.py", "v2-tiny", "--steps", str(STEPS), "--eval-every", "1000", "--micro-batch", "4", "--out-dir", str(out)]
    if mesh:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words, "--mesh", mesh]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][5:]
    told = {"tokens_per_second": median(row["tokens_per_second"] for row in rows)}
    for part in ("optimizer_seconds", "communication_seconds"):
        told[part] = median(row.get(part, 0.0) for row in rows)
    told["step_seconds"] = rows[0]["tokens"] / rows[0]["step"] / told["tokens_per_second"]
    print(f"{name}: {told}", flush=True)
    return {"command": " ".join(words)} | told


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    told = {name: run(args, name, mesh) for name, mesh in MESHES.items()}
    one = told["one process"]["tokens_per_second"]
    times = {name: one_of["tokens_per_second"] / one for name, one_of in told.items()}
    write_json(args.results / "scale.json", {"machine": machine(), "steps": STEPS, "times": times, "runs": told})


if __name__ == "__main__":
    main()
