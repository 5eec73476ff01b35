import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.recipes.page import PAGE, copy_tree, read_recipes


class Copy:
    """A copy of the tree with one recipe applied, in which commands run."""

    def __init__(self, folder, number):
        self.path = copy_tree(folder)
        self.recipe = read_recipes(PAGE.read_text(encoding="utf-8"))[number]
        self.recipe.apply(self.path)
        lines = [f"{n} times {n} makes {n * n}.\n" for n in range(150)]
        (self.path / "text.txt").write_text("".join(lines), encoding="utf-8")

    def run(self, command, *more, expect=0):
        """Run a command of the page with more flags. Returns what it printed, errors included."""
        python, *words = shlex.split(command)
        assert python == "python", command
        environment = os.environ | {
            "PYTHONPATH": str(self.path),  # otherwise an installed nanods would be imported
            "OMP_NUM_THREADS": "1",
            "NANODS_DATA": str(self.path / "data"),
        }
        result = subprocess.run(
            [sys.executable, *words, *map(str, more)],
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == expect, f"{command}\n{result.stdout}"
        return result.stdout

    def rows(self, run):
        """Return the metrics of a run's steps."""
        text = (self.path / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def apply(tmp_path):
    """apply(n) -> a Copy with recipe n applied."""
    return lambda number: Copy(tmp_path, number)
