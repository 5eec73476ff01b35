"""Which file may import which, and no path that exists on one machine only."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "nanods").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"])
CONCEPTS = ("attention", "moe", "contrastive")


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_concept_files_import_torch_alone():
    import sys

    for name in CONCEPTS:
        path = ROOT / "nanods" / f"{name}.py"
        if path.exists():
            roots = {n.split(".")[0] for n in imports(path) if not n.startswith(f"nanods.{name}_")}
            assert roots - set(sys.stdlib_module_names) <= {"torch"}, (
                f"{name}.py can no longer be carried off alone"
            )


def test_no_circle_of_imports():
    modules = {module(path): path for path in FILES}
    graph = {name: imports(path) & modules.keys() - {name} for name, path in modules.items()}
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def test_the_package_never_imports_its_front_doors_or_the_wings_the_hall():
    for path in (ROOT / "nanods").rglob("*.py"):
        assert not imports(path) & {"train", "sample"}, path
    for name in (*CONCEPTS, "gpt", "plots", "plots_multimodal", "plots_scaling"):
        path = ROOT / "nanods" / f"{name}.py"
        wings = (
            [
                n
                for n in imports(path)
                if n.startswith(
                    (
                        "nanods.training",
                        "nanods.distributed",
                        "nanods.planner",
                        "nanods.data",
                        "nanods.bench",
                    )
                )
            ]
            if path.exists()
            else []
        )
        assert not wings, f"{name}.py imports {wings}"


def test_nothing_refers_to_a_place_outside():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        path = ROOT / name
        if path.exists() and path.suffix != ".png":
            text = path.read_text()
            assert not any(
                "/".join(words) in text for words in (("..", "shared"), ("", "work", ""))
            ), name
