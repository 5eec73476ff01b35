"""Show which exercises of the lessons pass, and what is next: python lessons/exercises/progress.py

Each lesson's file is graded anew, as by `make check-01`, which says what is wrong with an answer.
"""

import argparse
import sys
from pathlib import Path

from sandbox import OPEN, grade, print_safely

FOLDER = Path(__file__).parent
MARKS = {"ok": "#", "wrong": "x", "not done": "."}


def lesson_files(folder: Path) -> list[Path]:
    """Return the exercise files, in the order of the lessons."""
    files = sorted(folder.glob("[0-9][0-9]_*.py"))
    return [file for file in files if not file.stem.endswith("_solutions")]


def describe(file: Path, results: list[dict], unusable: str) -> tuple[str, str]:
    """Return a lesson's line, and what is next in it, or "" if all of it passes."""
    lesson, title = file.stem[:2], file.stem[3:].replace("_", " ")
    if unusable:
        return f"{lesson}  {title:<24} cannot be read", f"{lesson}: {unusable}"
    marks = "".join(MARKS[result["verdict"]] for result in results)
    passed = marks.count("#")
    line = f"{lesson}  {title:<24} {marks:<8} {passed} of {len(results)}"
    open_steps = [result for result in results if result["verdict"] != "ok"]
    # A wrong answer first: it has been begun. A bonus last.
    open_steps.sort(key=lambda result: (result["optional"], result["verdict"] != "wrong"))
    if not open_steps:
        return line, ""
    first = open_steps[0]
    bonus = " (bonus)" if first["optional"] else ""
    return line, f"{lesson} {first['name']}{bonus}: {first['message']}"


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each lesson as soon as it is graded. Return 0 if all exercises pass but for
    bonuses, 3 if not, 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(description="Show which exercises pass.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="of your answers")
    folder = parser.parse_args(arguments).folder.resolve()
    files = lesson_files(folder)
    if not files:
        print_safely(f"{folder}: there are no exercises in this folder")
        return 2
    print_safely("# passes    x wrong    . not done")
    next_step, statuses = "", {0}
    for file in files:
        results, _, unusable = grade(FOLDER / f"steps_{file.stem[:2]}.py", file)
        line, advice = describe(file, results, unusable)
        print_safely(line)
        next_step = next_step or advice
        is_open = any(r["verdict"] != "ok" and not r["optional"] for r in results)
        statuses.add(2 if unusable else OPEN if is_open else 0)
    print_safely(f"next: {next_step}" if next_step else "All exercises pass.")
    return 2 if 2 in statuses else max(statuses)


if __name__ == "__main__":
    sys.exit(main())
