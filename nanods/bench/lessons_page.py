"""Write lessons/README.md, the table of lessons in README.md and its pictures: `make docs`.

All of it comes from the notebooks: the title, what a learner can do afterwards, the minutes, the
difficulty of the exercises, and the first picture, which is copied to docs/lessons/. Pinned by
tests/bench/test_lessons_page.py.
"""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

from nanods.bench.results_rows import ROOT
from nanods.data.download import write_atomic

BEGIN, END = "<!-- lessons: begin (make docs) -->", "<!-- lessons: end -->"
LESSONS, PICTURES = ROOT / "lessons", ROOT / "docs" / "lessons"
INTRODUCTION = """\
# The lessons

Each lesson is a notebook that runs from top to bottom in under two minutes on a CPU. You predict
before you see, and write each function before you read ours. `make notebook` opens the lessons;
`make check-00` grades your answers to lesson 00 and names the mistake; `make progress` shows what
passes and what is next. Difficulty is that of the exercises, from 1 to 5.
"""
AFTER = """\

What a popular article claims about all this, claim by claim, with a measurement for each:
[ARTICLE.md](ARTICLE.md). How little time a GPT needs to reach a given loss, and how to take part:
[SPEEDRUN.md](SPEEDRUN.md).
"""


@dataclass
class Lesson:
    """What the opening of a lesson says, and its first picture."""

    file: str  # such as 01_sparse_attention.ipynb
    title: str
    goals: list[str]
    minutes_to_read: int
    minutes_to_do: int
    difficulties: list[int]  # of its exercises
    picture: bytes  # PNG

    @property
    def number(self) -> str:
        return self.file[:2]

    @property
    def difficulty(self) -> str:
        low, high = min(self.difficulties), max(self.difficulties)
        return str(low) if low == high else f"{low} to {high}"


def read_lesson(path: Path) -> Lesson:
    """Read a notebook. Raises AttributeError or IndexError if it is not in the form of a lesson."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    opening, prose = texts[0], "\n".join(texts)
    goals = re.search(r"After this lesson you can\n\n(.*?)\n\n", opening, re.DOTALL).group(1)
    minutes = re.search(
        r"Reading takes (?:about )?(\d+) minutes[^.]*exercises (?:about )?(\d+)",
        " ".join(opening.split()),
    )
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return Lesson(
        path.name,
        re.match(r"# Lesson \d\d: (.*)", opening).group(1),
        [" ".join(goal.split()) for goal in re.split(r"^- ", goals, flags=re.MULTILINE)[1:]],
        *map(int, minutes.groups()),
        [int(number) for number in re.findall(r"difficulty\s+(\d)\s+of\s+5", prose)],
        base64.b64decode(pictures[0]),
    )


def read_lessons() -> list[Lesson]:
    return [read_lesson(path) for path in sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))]


def table(lessons: list[Lesson], page: Path, all_goals: bool) -> str:
    """Return the lessons as a Markdown table, with links from `page`."""
    pictures = Path(*[".."] * len(page.parent.relative_to(ROOT).parts), "docs", "lessons")
    notebooks = LESSONS.relative_to(page.parent)
    lines = [
        "| lesson | after it you can | minutes: to read + to do | difficulty | |",
        "|---|---|---|---|---|",
    ]
    for lesson in lessons:
        goals = lesson.goals if all_goals else lesson.goals[:1]
        cells = [
            f"[{lesson.number} {lesson.title}]({(notebooks / lesson.file).as_posix()})",
            "<br>".join(goal.rstrip(";.") for goal in goals),
            f"{lesson.minutes_to_read} + {lesson.minutes_to_do}",
            lesson.difficulty,
            f'<img src="{(pictures / lesson.number).as_posix()}.png" width="220" alt="">',
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def lessons_page(lessons: list[Lesson]) -> str:
    """Return lessons/README.md."""
    page = LESSONS / "README.md"
    return f"{INTRODUCTION}\n{table(lessons, page, all_goals=True)}\n{AFTER}"


def readme_with_lessons(readme: str, lessons: list[Lesson]) -> str:
    """Return the README with its table of lessons made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(lessons, ROOT / 'README.md', all_goals=False)}\n{END}{after}"


def main() -> None:
    lessons, readme = read_lessons(), ROOT / "README.md"
    pages = {
        LESSONS / "README.md": lessons_page(lessons).encode(),
        readme: readme_with_lessons(readme.read_text(encoding="utf-8"), lessons).encode(),
        **{PICTURES / f"{lesson.number}.png": lesson.picture for lesson in lessons},
    }
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path, content in pages.items():
        write_atomic(path, lambda file, content=content: file.write(content))
        print(f"wrote      {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
