"""Grade an answer in a process of its own, which may end, hang or print without bound.

`python check_01.py FILE` runs `main`, which starts `python steps_01.py FILE ...` to grade the file.
The worker writes a record to a file before and after each step. If it ends or hangs during a step,
that step is wrong, and a new worker grades the steps after it. This module imports nothing but the
standard library, so that it starts at once and the answer cannot change what it uses.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# Seconds of a CPU for loading the file, and for each step: both take milliseconds, or a few
# seconds with the first import of a part of torch. A step that waits is stopped after CLOCK_FACTOR
# times as many seconds on the clock.
TIME_LIMIT = 10.0
CLOCK_FACTOR = 6
GRACE = 3.0  # the worker reports the line of an endless loop itself, if it still can
START_LIMIT = 300.0  # seconds in which a worker must import torch
MAX_PRINTED = 10_000  # characters of the answer's own output that are shown
OPEN = 3  # exit status where steps are open or wrong; Python's own is 1 after a traceback
LOADING = -1  # the number of the "step" in which the file is loaded


def read_records(path: Path) -> list[dict]:
    """Return the complete records that the worker has written."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class Worker:
    """One process that grades the steps from number `first` on."""

    def __init__(self, script: Path, file: Path, records: Path, first: int, time_limit: float):
        self.path, self.time_limit = records, time_limit
        self.output, self.hidden = [], 0  # what the answer printed, and how many bytes are left out
        records.touch()
        arguments = map(str, (script, file, records, first, time_limit))
        self.process = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
        self.reader = threading.Thread(target=self.read_output, daemon=True)
        self.reader.start()

    def read_output(self) -> None:
        """Keep the first MAX_PRINTED bytes of the answer's output, and read the rest away."""
        room = MAX_PRINTED
        while chunk := self.process.stdout.read1(65536):
            self.output.append(chunk[:room])
            self.hidden += max(0, len(chunk) - room)
            room = max(0, room - len(chunk))

    def wait(self) -> str:
        """Wait until the worker ends. Return why the last step that began did not end, or ""."""
        started, since = -2, time.monotonic()  # the last step that began, and when
        while self.process.poll() is None:
            begun = [record["step"] for record in read_records(self.path)]
            if begun and begun[-1] != started:
                started, since = begun[-1], time.monotonic()
            limit = CLOCK_FACTOR * self.time_limit + GRACE if begun else START_LIMIT
            if time.monotonic() - since > limit:
                self.stop()
                return endless_loop(self.time_limit)
            time.sleep(0.02)
        self.reader.join(timeout=1)  # a process that the answer started may keep the pipe open
        return describe_exit(self.process.returncode)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join(timeout=1)

    def printed(self) -> str:
        """Return what the answer printed, cut to MAX_PRINTED bytes."""
        text = b"".join(self.output).decode("utf-8", "replace").replace("\r\n", "\n")
        if self.hidden:
            text += f"\n... (your file printed {self.hidden:,} bytes more, which are not shown)"
        return text.rstrip("\n")


def endless_loop(seconds: float, line: str = "") -> str:
    return f"does not finish within {seconds:g} seconds{line}: is there an endless loop?"


def describe_exit(code: int) -> str:
    """Return what a worker's exit status says about the answer that ended it."""
    if code < 0:
        return f"crashes the process ({signal.Signals(-code).name})"
    return f"ends the process (exit status {code}): return a result instead"


def grade(
    script: Path, file: Path, time_limit: float = TIME_LIMIT
) -> tuple[list[dict], list[str], str]:
    """Grade a file with as many workers as it needs.

    Returns a record per step, what the answer printed, and why the file could not be loaded, or "".
    """
    results, printed, first = {}, [], 0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            worker = Worker(script, file, Path(folder) / f"{first}.jsonl", first, time_limit)
            try:
                reason = worker.wait()
            finally:  # also on Ctrl-C
                if worker.process.poll() is None:
                    worker.stop()
            printed.append(worker.printed())
            records = read_records(worker.path)
            for record in records:
                if "verdict" in record:
                    results.setdefault(record["step"], record)
            if not records:
                return [], printed, f"the grader itself failed: it {reason}"
            last = records[-1]
            if last["step"] == LOADING:
                return [], printed, last.get("unusable") or f"{file} {reason} while it is loaded"
            if last["step"] not in results:
                results[last["step"]] = {**last, "verdict": "wrong", "message": reason}
            first = last["step"] + 1
            if first == last["count"]:
                return [results[step] for step in range(first)], printed, ""


def main(stubs: str, arguments: list[str] | None = None) -> int:
    """Grade the file named on the command line, print one line a step, return the exit status.

    `stubs` is the name of the exercise file. Status 0: all steps pass; 3: some do not; 2: the file
    cannot be loaded.
    """
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Grade an exercise, step by step.")
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=folder / stubs,
        help=f"your answers (default: {stubs})",
    )
    file = parser.parse_args(arguments).file.resolve()
    results, printed, unusable = grade(folder / f"steps_{stubs[:2]}.py", file)
    for text in filter(None, printed):
        print_safely(text)
    if unusable:
        print_safely(unusable)
        return 2
    for line in report(results):
        print_safely(line)
    return OPEN if open_steps(results) else 0


def open_steps(results: list[dict]) -> list[str]:
    """Return the names of the steps that keep the exercise from passing."""
    return [
        result["name"]
        for result in results
        if result["verdict"] == "wrong" or (result["verdict"] != "ok" and not result["optional"])
    ]


def report(results: list[dict]) -> list[str]:
    """Return a line for each step, and one that says what is left to do."""
    width = max(len(result["name"]) for result in results)
    lines = []
    for number, result in enumerate(results, 1):
        bonus = " (bonus)" if result["optional"] else ""
        lines.append(f"{number} {result['name']:<{width}}  {result['message']}{bonus}")
    left = open_steps(results)
    if left:
        lines.append(f"Open exercises: {', '.join(left)}")
    elif bonuses := [result["name"] for result in results if result["verdict"] != "ok"]:
        lines.append(f"All exercises pass. Not done: the bonus {', '.join(bonuses)}.")
    else:
        lines.append("All exercises pass.")
    return lines


def print_safely(text: str) -> None:
    """Print text, with a substitute for what the terminal's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
