"""The record of a run: every metric passes through `MetricsLog.log`.

An experiment tracker is one more line there, as TensorBoard's is (docs/MODIFYING.md).
"""

import json
import sys

import torch
from tqdm import tqdm

from nanods.config import Config
from nanods.files import write_and_rename
from nanods.training.commands import tensorboard_command
from nanods.training.task import Task
from nanods.training.tensorboard_log import TensorBoardLog

try:
    import resource
except ImportError:  # on Windows
    resource = None


class MetricsLog:
    """The record of a run: `log(row)` takes the metrics of each step.

    A row goes to `rows` (kept in memory for the report), to RUN/metrics.jsonl, to the progress bar
    and, with --tensorboard, to RUN's event files; an evaluation is also printed on a line of its
    own.
    """

    def __init__(
        self, config: Config, task: Task, rows: list[dict], is_main_process: bool = True
    ) -> None:
        """`rows`: those of the steps before, where a run resumes. They replace what metrics.jsonl
        holds, since a killed run may have written steps there that came after its last checkpoint.
        """
        self.config, self.task, self.rows = config, task, rows
        self.is_main_process = is_main_process
        self.file = self.tensorboard = None
        if is_main_process:
            path = config.run_dir / "metrics.jsonl"
            before = "".join(json.dumps(row) + "\n" for row in rows)
            write_and_rename(path, lambda file: file.write(before.encode()))
            self.file = path.open("a", encoding="utf-8")
            if config.tensorboard:
                self.tensorboard = TensorBoardLog(config.run_dir, rows)
                print(f"board      {tensorboard_command(config.run_dir)}")
        self.validation = ""
        self.bar = tqdm(
            total=config.steps,
            initial=rows[-1]["step"] if rows else 0,
            unit="step",
            disable=None if is_main_process else True,  # None: shown where stderr is a terminal
        )

    def log(self, row: dict) -> None:
        """Record the metrics of one step. Every metric of a run passes through here, on each
        process."""
        self.rows.append(row)
        if not self.is_main_process:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.tensorboard:
            self.tensorboard.log(row)
        if alarm := row.get("new_alarm"):
            self.bar.write(f"warning    step {row['step']}: {alarm}", file=sys.stderr)
        if "val_loss" in row:
            self.validation = self.task.describe_validation(row)
            self.bar.write(f"step {row['step']:>6}  {self.validation}", file=sys.stdout)
        self.bar.update()
        self.bar.set_postfix_str(self._progress(row))

    def _progress(self, row: dict) -> str:
        """Return what the progress bar says beside the number of steps."""
        parts = [f"loss {row['ce_loss']:.3f}"]
        if self.validation:
            parts.append(self.validation.split(" (")[0])
        if "load_max_over_mean" in row:
            parts.append(f"load {row['load_max_over_mean']:.1f}x")
        unit = self.task.unit
        parts.append(f"{row[f'{unit}_per_second']:,} {unit}/s")
        if row.get("alarm"):
            parts.append("ALARM")
        if peak := peak_memory(self.task.device):
            parts.append(f"{peak / 2**30:.2f} GiB")
        return ", ".join(parts)

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
        if self.tensorboard:
            self.tensorboard.close()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used so far: of GPU memory on CUDA, else of main
    memory; 0 where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux reports KiB, macOS bytes
