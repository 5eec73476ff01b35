"""The recipes of docs/MODIFYING.md fit the tree: quick checks, which train nothing."""

import subprocess
import sys

import pytest

from tests.recipes.page import PAGE, Edit, changed_files, copy_tree, read_recipes

RECIPES = read_recipes(PAGE.read_text(encoding="utf-8"))


def test_there_are_six_recipes_and_each_has_commands():
    assert sorted(RECIPES) == [1, 2, 3, 4, 5, 6]
    assert all(recipe.commands for recipe in RECIPES.values())


@pytest.mark.parametrize("number", RECIPES)
def test_a_recipe_changes_the_files_that_it_names_and_passes_ruff(number, tmp_path):
    recipe = RECIPES[number]
    tree = copy_tree(tmp_path)
    assert changed_files(tree) == set()
    recipe.apply(tree)
    assert changed_files(tree) == recipe.touches
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, *sorted(recipe.touches)]
        if recipe.touches:
            result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout


def test_an_edit_needs_text_that_occurs_exactly_once(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\na = 1\nb = 2\n")
    for anchor in ("a = 1\n", "c = 3\n"):
        with pytest.raises(ValueError, match="not once"):
            Edit("file.py", "replace", anchor, "").apply(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        Edit("file.py", "create", "", "").apply(tmp_path)
    Edit("file.py", "after", "b = 2\n", "c = 3\n").apply(tmp_path)
    Edit("file.py", "before", "b = 2\n", "d = 4\n").apply(tmp_path)
    assert (tmp_path / "file.py").read_text() == "a = 1\na = 1\nd = 4\nb = 2\nc = 3\n"


def test_an_incomplete_edit_is_an_error():
    with pytest.raises(ValueError, match="expected with: or add:"):
        read_recipes("## 1. One\nIn `a.py`, replace:\n```\na\n```\nRun:\n```\npython\n```\n")
    with pytest.raises(ValueError, match="no block of code before"):
        read_recipes("## 1. One\nIn `a.py`, replace:\nwith:\n```\na\n```\n")
    with pytest.raises(ValueError, match="does not end"):
        read_recipes("## 1. One\nRun:\n```\npython\n")
