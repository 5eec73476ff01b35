"""Execute the lessons, and compare what they print with their committed outputs: `make lessons`.

    python -m tests.lessons.execute [--inplace] [NOTEBOOK ...]

Exit status 1 if a cell fails or prints something else than what is committed; then execute the
lessons again with --inplace, look at them, and commit. Compared is text: what cells print, tables,
and the source code that they show. Pictures and stderr are not compared.

Numbers below ROUNDING are equal, because they are rounding errors. Others may differ by the
relative TOLERANCE, so figures from results/ must be the same. Where a cell trains, measures time or
shows text of this Python version, its output depends on the machine. Such a cell has one of two
tags, and `reason` in its metadata says why:

    varies-numbers   the words must be equal, the numbers need not be
    varies-text      nothing is compared
"""

import argparse
import re
import sys
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

LESSONS = Path(__file__).parents[2] / "lessons"
ROUNDING, TOLERANCE = 1e-5, 1e-5
TIMEOUT = 900  # seconds for one cell: a busy machine is slow
TAGS = ("varies-numbers", "varies-text")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def text_of(cell: dict) -> str:
    """Return all text that a cell has put out, in order, in one string."""
    parts = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            parts.append(output["text"])
        elif "data" in output:
            data = output["data"]
            parts.append(data.get("text/markdown") or data.get("text/plain", ""))
            parts[-1] += "\n"
    return "".join(parts)


def is_close(a: str, b: str) -> bool:
    """Return whether two numbers are equal but for rounding."""
    x, y = (float(number.replace(",", "")) for number in (a, b))
    return max(x, y) < ROUNDING or abs(x - y) <= TOLERANCE * max(x, y)


def same_line(a: str, b: str, any_numbers: bool = False) -> bool:
    """Return whether two lines have the same words and numbers. Widths of blanks may differ."""
    words = [re.sub(r"\s+", " ", NUMBER.sub("0", line)).strip() for line in (a, b)]
    if words[0] != words[1]:
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return any_numbers or all(is_close(x, y) for x, y in pairs)


def difference(committed: dict, executed: dict) -> str | None:
    """Return the first difference between the outputs of a cell, or None."""
    tags = committed["metadata"].get("tags", [])
    if "varies-text" in tags:
        return None
    lines = (text_of(cell).splitlines() for cell in (committed, executed))
    for before, after in zip_longest(*lines):
        if None in (before, after) or not same_line(before, after, "varies-numbers" in tags):
            return f"    committed: {before}\n    now:       {after}"
    return None


def differences(committed: dict, executed: dict) -> list[str]:
    """Return the differences between a committed notebook and an executed one, by cell."""
    found = []
    for before, after in zip(committed["cells"], executed["cells"], strict=True):
        if before["cell_type"] == "code" and (text := difference(before, after)):
            found.append(f"  cell {before['id']}:\n{text}")
    return found


def run(path: Path, inplace: bool) -> list[str]:
    """Execute a notebook. Return what is wrong with it."""
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    # The times of the cells would change the file at each execution.
    client = NotebookClient(
        executed,
        timeout=TIMEOUT,
        record_timing=False,
        resources={"metadata": {"path": LESSONS}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return [f"  a cell fails:\n{error}"]
    if inplace:
        nbformat.write(executed, path)
        return []
    return differences(committed, executed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute the lessons and compare their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of lessons/")
    parser.add_argument("--inplace", action="store_true", help="write the outputs, do not compare")
    args = parser.parse_args(arguments)
    is_stale = False
    for path in args.notebooks or sorted(LESSONS.glob("*.ipynb")):
        print(f"{path.name} ...", flush=True)
        wrong = run(path, args.inplace)
        is_stale |= bool(wrong)
        print("\n".join(wrong or [f"{path.name}: {'written' if args.inplace else 'as committed'}"]))
    if is_stale:
        print("If what they print now is right: make lessons ARGS=--inplace, and commit.")
    return int(is_stale)


if __name__ == "__main__":
    sys.exit(main())
