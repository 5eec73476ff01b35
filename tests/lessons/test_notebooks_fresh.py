"""The committed outputs of the notebooks are fresh: the code that they show is today's code.

The tests do not execute the notebooks. They render `Code(inspect.getsource(...))` of each cell from
the library and compare the text with the committed output. If a test fails, execute the notebooks
again: make lessons ARGS=--inplace
"""

import ast
import json
from pathlib import Path
from types import ModuleType

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "lessons").glob("*.ipynb"))
SHOW_CODE = {"00_gpt", "01_sparse_attention", "02_mixture_of_experts", "03_multimodal"}
SHOW_CODE |= {"04_scaling", "05_planning", "06_compression", "07_adapt", "08_serving"}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def parse(cell):
    """Return the syntax tree of a cell, without the lines that are IPython magics."""
    lines = [line for line in cell["source"] if not line.startswith(("%", "!"))]
    return ast.parse("".join(lines))


def run_imports(path):
    """Return the names that the notebook imports."""
    names = {}
    for cell in code_cells(path):
        for node in parse(cell).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), names)
    return names


def calls_of(tree, name):
    """Return the calls of the function `name`, or of an attribute of that name, in source order."""
    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
            calls.append(node)
    return sorted(calls, key=lambda node: (node.lineno, node.col_offset))


def render_sources(cell, names):
    """Return the text of each `Code(...)` in a cell, from the current code of the library."""
    tree, names = parse(cell), dict(names)
    for node in tree.body:
        if isinstance(node, ast.Assign) and calls_of(node, "getsource") and calls_of(tree, "Code"):
            exec(ast.unparse(node), names)  # source = inspect.getsource(...) + ...
    return [eval(ast.unparse(call.args[0]), names) for call in calls_of(tree, "Code")]


def shown_sources(cell):
    """Return the committed text of each `Code(...)` in a cell: outputs with a LaTeX form."""
    outputs = [output["data"] for output in cell["outputs"] if "data" in output]
    return ["".join(data["text/plain"]) for data in outputs if "text/latex" in data]


@each_notebook
def test_the_code_shown_is_the_current_code(path):
    names = run_imports(path)
    count = 0
    for cell in code_cells(path):
        rendered, shown = render_sources(cell, names), shown_sources(cell)
        assert len(shown) == len(rendered), "".join(cell["source"])
        for current, committed in zip(rendered, shown, strict=True):
            assert committed.rstrip("\n") == current.rstrip("\n")
        count += len(shown)
    assert (count > 0) == (path.stem in SHOW_CODE)


@each_notebook
def test_every_code_cell_was_executed_in_order_and_without_errors(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors, "".join(cell["source"])
        assert "execution" not in cell["metadata"], "a time: each execution would change it"


@each_notebook
def test_every_name_that_a_cell_takes_from_a_module_exists(path):
    names = run_imports(path)
    modules = {name: value for name, value in names.items() if isinstance(value, ModuleType)}
    for cell in code_cells(path):
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                assert module is None or hasattr(module, node.attr), ast.unparse(node)
