"""Which file may import which, and no path that exists on one machine only."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "nanods").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"])
CONCEPTS = ("attention", "conv", "moe", "contrastive", "quantize", "ewc")


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
    for name in CONCEPTS:
        for path in ROOT.glob(f"nanods/{name}*.py"):  # with its helper files
            roots = {n.split(".")[0] for n in imports(path) if not n.startswith(f"nanods.{name}")}
            assert roots - set(sys.stdlib_module_names) <= {"torch"}, f"{path} cannot be used alone"


def test_there_are_no_import_cycles():
    modules = {module(path): path for path in FILES}
    graph = {name: imports(path) & modules.keys() - {name} for name, path in modules.items()}
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


LAYERS = (  # from the top; a file imports from its own layer and those below
    ("train", "sample"),
    ("nanods.bench", "nanods.evaluate", "nanods.data.check", "nanods.notebook"),
    ("nanods.serving",),
    ("nanods.run",),
    ("nanods.planner", "nanods.distributed"),
    ("nanods.training",),
    ("nanods.build", "nanods.command_line", "nanods.data", "nanods.contact_sheet"),
    ("nanods.config",),
    ("nanods.multimodal",),
    (
        "nanods.gpt",
        "nanods.diagrams",
        "nanods.plots",
        "nanods.plots_adapt",
        "nanods.plots_attention",
        "nanods.plots_compress",
        "nanods.plots_contrastive",
        "nanods.plots_experts",
        "nanods.plots_gpt",
        "nanods.plots_multimodal",
        "nanods.plots_scaling",
        "nanods.plots_serving",
    ),
    ("nanods.plots_text",),
    ("nanods.cache", *(f"nanods.{name}" for name in CONCEPTS)),
    ("nanods.attention_kernel", "nanods.attention_selection", "nanods.moe_kernel", "nanods.flags"),
    ("nanods.errors", "nanods.files"),
)


def layer(name):
    for rank, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return rank
    assert name == "nanods", f"{name}: give it a layer"
    return len(LAYERS)


def test_imports_go_down_only():
    modules = {module(path): path for path in FILES}
    for name, path in modules.items():
        for imported in imports(path) & modules.keys():
            assert layer(imported) >= layer(name), f"{name} imports {imported}"


def test_only_its_bench_imports_serving():
    for path in FILES:
        name = module(path)
        if not name.startswith(("nanods.serving", "nanods.bench.serve")):
            assert not any(n.startswith("nanods.serving") for n in imports(path)), name


def test_no_file_refers_to_a_path_outside_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        path = ROOT / name
        if path.exists() and path.suffix != ".png":
            text = path.read_text()
            assert not any(
                "/".join(words) in text for words in (("..", "shared"), ("", "work", ""))
            ), name


def test_no_module_is_imported_that_a_newer_python_has_removed():
    removed = {"distutils", "imp", "asyncore", "asynchat", "smtpd"}  # 3.12
    removed |= {"aifc", "audioop", "cgi", "chunk", "crypt", "imghdr", "pipes", "sndhdr"}  # 3.13
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & removed, path
