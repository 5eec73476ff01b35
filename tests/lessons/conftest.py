import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[2] / "lessons" / "exercises")
)  # as for a script that is run from there
