"""Read the recipes of docs/MODIFYING.md, and apply them to a copy of the tree.

A recipe is a section "## N. Title". Its edits and commands are the code blocks that follow one of
these lines:

    In `FILE`, replace:   ... with:      exchange text that occurs exactly once
    In `FILE`, before:    ... add:       insert text before it
    In `FILE`, after:     ... add:       insert text after it
    New file `FILE`:                     create a file that does not exist
    Run:                                 commands; one that ends in a backslash goes on

Other code blocks are for the reader alone.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "MODIFYING.md"

EDIT = re.compile(r"In `(?P<file>[^`]+)`, (?P<action>replace|before|after):")
FENCES = ("```", "```python")
NEW_FILE = re.compile(r"New file `(?P<file>[^`]+)`:")


@dataclass(frozen=True)
class Edit:
    file: str
    action: str
    """replace, before, after or create."""
    anchor: str
    """Text of the file; empty for a new file."""
    text: str

    def apply(self, tree: Path) -> None:
        """Edit the file in the tree. Raises ValueError unless the anchor occurs exactly once."""
        path = tree / self.file
        if self.action == "create":
            if path.exists():
                raise ValueError(f"{self.file} exists already")
            path.write_text(self.text, encoding="utf-8")
            return
        content = path.read_text(encoding="utf-8")
        if content.count(self.anchor) != 1:
            raise ValueError(
                f"{self.file}: found {content.count(self.anchor)} times, not once:\n{self.anchor}"
            )
        new_text = {
            "replace": self.text,
            "before": self.text + self.anchor,
            "after": self.anchor + self.text,
        }[self.action]
        path.write_text(content.replace(self.anchor, new_text), encoding="utf-8")


@dataclass
class Recipe:
    title: str
    touches: set[str] = field(default_factory=set)
    """The files that the page says it touches."""
    edits: list[Edit] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def apply(self, tree: Path) -> None:
        for edit in self.edits:
            edit.apply(tree)


def read_recipes(page: str) -> dict[int, Recipe]:
    """Return the recipes of a page by their numbers. Raises ValueError for an incomplete edit."""
    recipes: dict[int, Recipe] = {}
    recipe, pending, anchor = None, None, None  # pending: what the next code block is
    lines = iter(page.splitlines())
    for line in lines:
        if heading := re.match(r"## (\d+)\. (.+)", line):
            recipe = recipes[int(heading[1])] = Recipe(heading[2])
        elif recipe is None:
            continue
        elif anchor is not None and line and line not in ("with:", "add:", *FENCES):
            raise ValueError(f"{recipe.title}: expected with: or add:, not {line!r}")
        elif line.startswith("**Touches** "):
            while line:  # up to the end of the paragraph
                recipe.touches |= set(re.findall(r"`(\S+\.py)`", line))
                line = next(lines, "")
        elif match := EDIT.fullmatch(line) or NEW_FILE.fullmatch(line):
            pending = match
        elif line == "Run:":
            pending = "run"
        elif line in ("with:", "add:"):
            if anchor is None:
                raise ValueError(f"{recipe.title}: no block of code before {line!r}")
        elif line in FENCES:
            block = read_block(lines)
            if pending == "run":
                recipe.commands += block.replace("\\\n", " ").splitlines()
            elif pending is not None and pending.re is NEW_FILE:
                recipe.edits.append(Edit(pending["file"], "create", "", block))
            elif pending is not None and anchor is None:
                anchor = block
                continue
            elif pending is not None:
                recipe.edits.append(Edit(pending["file"], pending["action"], anchor, block))
            pending = anchor = None
    return recipes


def read_block(lines) -> str:
    """Return the lines up to the end of a code block."""
    block = []
    for line in lines:
        if line.startswith("```"):
            return "".join(f"{row}\n" for row in block)
        block.append(line)
    raise ValueError("a block of code does not end")


def copy_tree(to: Path) -> Path:
    """Copy the files that git tracks. Returns the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


def changed_files(tree: Path) -> set[str]:
    """Return the files of a copy that are new, or differ from this tree."""
    changed = set()
    for path in tree.rglob("*"):
        original = ROOT / path.relative_to(tree)
        if path.is_file() and not (
            original.exists() and original.read_bytes() == path.read_bytes()
        ):
            changed.add(str(path.relative_to(tree)))
    return changed
