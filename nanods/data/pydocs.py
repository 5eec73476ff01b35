"""pydocs, the corpus that needs no network: Python's own documentation, read from the interpreter that runs.

First the language reference as `help()` knows it (`pydoc_data.topics`), then every docstring of the standard library,
read from the sources with `ast`: nothing is imported, so nothing runs and the order is the same in every process.
About two million characters; the exact text, and with it the hash, belongs to one version of Python.
"""

import ast
import hashlib
import importlib
import platform
import sys
import sysconfig
import warnings
from pathlib import Path

from tqdm import tqdm

from nanods.data.download import data_dir, write_atomic
from nanods.errors import UserError

# Tests, other people's packages, copies of other programs, and what the build generates for one platform.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages",
    "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def pydocs_text() -> str:
    """The corpus, from the cache if it is there whole (a few seconds of reading the first time).

    Raises UserError if this interpreter comes without its documentation or sources.
    """
    stdlib = Path(
        sysconfig.get_path("stdlib")
    )  # in a virtual environment too, the base interpreter's
    interpreter = hashlib.sha256(f"{sys.version} {stdlib}".encode()).hexdigest()[:8]
    cache = data_dir() / "cache" / f"pydocs-{platform.python_version()}-{interpreter}.txt"
    if (text := read_sealed(cache)) is None:
        text = collect(stdlib)
        write_atomic(cache, lambda file: file.write(seal(text)))
    return text


def seal(text: str) -> bytes:
    """The text in UTF-8 after a first line with its sha256, so that a damaged copy is known."""
    data = text.encode()
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def read_sealed(path: Path) -> str | None:
    if not path.is_file():
        return None
    digest, _, data = path.read_bytes().partition(b"\n")
    return data.decode() if hashlib.sha256(data).hexdigest().encode() == digest else None


def collect(stdlib: Path) -> str:
    """Topics in order of name, then docstrings in order of module and line; each text once, blank lines between."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise without_docs("its module pydoc_data.topics is missing") from None
    texts = [topics[name].strip() for name in sorted(topics)]
    docstrings: list[str] = []
    for path in tqdm(
        modules(stdlib),
        desc="reading Python's documentation",
        unit="file",
        leave=False,
        disable=None,
    ):
        docstrings += docstrings_of(path.read_bytes())
    if not docstrings:
        raise without_docs(f"no sources in {stdlib}")
    return "\n\n".join(dict.fromkeys(texts + docstrings)) + "\n"


def without_docs(what: str) -> UserError:
    return UserError(
        f"this Python ({sys.executable}) comes without its documentation, which is the data set pydocs: {what}. "
        "Use a full Python (from python.org, uv or conda, or your distribution's complete package), "
        "or other data: --data shakespeare, --data path/to/text.txt"
    )


def modules(stdlib: Path) -> list[Path]:
    """The sources of the standard library, sorted by their path in it."""

    def wanted(path: Path) -> bool:
        parts = path.relative_to(stdlib).parts
        return SKIPPED_FOLDERS.isdisjoint(parts) and not any(
            part.startswith(SKIPPED_PREFIXES) for part in parts
        )

    return sorted(
        filter(wanted, stdlib.rglob("*.py")), key=lambda path: path.relative_to(stdlib).as_posix()
    )


def docstrings_of(source: bytes) -> list[str]:
    """The docstrings of a module, its classes and functions, indentation removed, in order of line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of escapes in older sources
        tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(
        key=lambda node: getattr(node, "lineno", 0)
    )  # ast.walk goes level by level; a Module has no line
    found = (ast.get_docstring(node) for node in nodes)
    return [text.strip() for text in found if text and text.strip()]
