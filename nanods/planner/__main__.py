"""`python -m nanods.planner --where`, or with a preset and flags: see nanods/planner/cli.py."""

from nanods.errors import run
from nanods.planner.cli import main

if __name__ == "__main__":
    run(main)
