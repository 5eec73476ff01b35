"""pydocs, a corpus that needs no network: the documentation of the running Python.

It holds first the language reference of `help()` (`pydoc_data.topics`), then every docstring of the
standard library. The docstrings are parsed from the sources with `ast`: no module is imported, so
no code runs and the order is the same in every process. The corpus has about two million
characters. Its exact text, and so its hash, depends on the version of Python.
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

# Tests, third-party packages, whole programs, and files that the build generates for one platform.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages",
    "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def pydocs_text() -> str:
    """Return the corpus, from the cache if a good copy is there.

    Collecting it takes a few seconds the first time.

    Raises UserError if this interpreter comes without its documentation or sources.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))  # of the base interpreter, in a venv too
    interpreter = hashlib.sha256(f"{sys.version} {stdlib}".encode()).hexdigest()[:8]
    cache = data_dir() / "cache" / f"pydocs-{platform.python_version()}-{interpreter}.txt"
    text = read_with_checksum(cache)
    if text is None:
        text = collect(stdlib)
        write_atomic(cache, lambda file: file.write(add_checksum(text)))
    return text


def add_checksum(text: str) -> bytes:
    """Return the text in UTF-8 after a first line with its sha256, which reveals damage."""
    data = text.encode()
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def read_with_checksum(path: Path) -> str | None:
    """Return the text that `add_checksum` wrote; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    checksum, _, data = path.read_bytes().partition(b"\n")
    return data.decode() if hashlib.sha256(data).hexdigest().encode() == checksum else None


def collect(stdlib: Path) -> str:
    """Return the topics sorted by name, then the docstrings sorted by module and line.

    Each text appears once; blank lines separate them. Raises UserError if topics or docstrings are
    missing.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise missing_documentation("its module pydoc_data.topics is missing") from None
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
        raise missing_documentation(f"no sources in {stdlib}")
    return "\n\n".join(dict.fromkeys(texts + docstrings)) + "\n"


def missing_documentation(reason: str) -> UserError:
    """Return the UserError for an interpreter without its documentation or sources."""
    return UserError(
        f"this Python ({sys.executable}) comes without its documentation, which is the data set "
        f"pydocs: {reason}. Use a full Python (from python.org, uv or conda, or your "
        "distribution's complete package), or other data: --data shakespeare, "
        "--data path/to/text.txt"
    )


def modules(stdlib: Path) -> list[Path]:
    """Return the source files of the standard library, sorted by their path in it."""

    def is_wanted(path: Path) -> bool:
        parts = path.relative_to(stdlib).parts
        if not SKIPPED_FOLDERS.isdisjoint(parts):
            return False
        return not any(part.startswith(SKIPPED_PREFIXES) for part in parts)

    paths = filter(is_wanted, stdlib.rglob("*.py"))
    return sorted(paths, key=lambda path: path.relative_to(stdlib).as_posix())


def docstrings_of(source: bytes) -> list[str]:
    """Return the docstrings of a module, its classes and functions, dedented, in order of line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of escapes in older sources
        tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    # ast.walk goes level by level, so sort by line. A Module has no line number: it comes first.
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = (ast.get_docstring(node) for node in nodes)
    return [text.strip() for text in docstrings if text and text.strip()]
