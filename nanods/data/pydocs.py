"""pydocs, a corpus that needs no network: the documentation of the running Python.

It holds first the language reference of `help()` (`pydoc_data.topics`), then every docstring of the
standard library. The docstrings are parsed from the sources with `ast`: no module is imported, so
no code runs and the order is the same in every process. The corpus has about two million
characters. Its exact text, and so its hash, depends on the version of Python.

pydocs-train is pydocs without the docstrings of the modules that `is_held_out` chooses, one in
eight, which are its validation text. Instructions made from those modules
(nanods/data/instructions.py) ask a model that was trained on it for what it has never read.
"""

import ast
import hashlib
import importlib
import json
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
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
    return cached("pydocs", "txt", collect)


def pydocs_split() -> tuple[str, str]:
    """Return pydocs-train, the documentation without that of the held-out modules, and the
    docstrings of these. No docstring is in both. Cached as `pydocs_text` is."""
    train, val = json.loads(cached(f"pydocs-split-{ONE_IN}", "json", collect_split))
    return train, val


def cached(name: str, suffix: str, collect: Callable[[Path], str]) -> str:
    """Return `collect(stdlib)`, from the cache if a good copy for this Python is there."""
    stdlib = Path(sysconfig.get_path("stdlib"))  # of the base interpreter, in a venv too
    interpreter = hashlib.sha256(f"{sys.version} {stdlib}".encode()).hexdigest()[:8]
    file_name = f"{name}-{platform.python_version()}-{interpreter}.{suffix}"
    cache = data_dir() / "cache" / file_name
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
    texts = read_topics()
    docstrings = [text for path in sources(stdlib) for text in docstrings_of(path.read_bytes())]
    if not docstrings:
        raise missing_documentation(f"no sources in {stdlib}")
    return join_texts(texts + docstrings)


def collect_split(stdlib: Path) -> str:
    """Return the two texts of `pydocs_split` as JSON."""
    topics, train, held_out = read_topics(), [], []
    for path in sources(stdlib):
        texts = docstrings_of(path.read_bytes())
        (held_out if is_held_out(module_name(path, stdlib)) else train).extend(texts)
    if not train or not held_out:
        raise missing_documentation(f"too few sources in {stdlib}")
    hidden = set(held_out)
    train = [text for text in topics + train if text not in hidden]
    return json.dumps([join_texts(train), join_texts(held_out)])


def join_texts(texts: list[str]) -> str:
    """Return the texts, each once, with blank lines between them."""
    return "\n\n".join(dict.fromkeys(texts)) + "\n"


def read_topics() -> list[str]:
    """Return the topics of `help()`, sorted by name. Raises UserError if this Python has none."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise missing_documentation("its module pydoc_data.topics is missing") from None
    return [topics[name].strip() for name in sorted(topics)]


def sources(stdlib: Path) -> Iterator[Path]:
    """Yield `modules(stdlib)`, with a progress bar."""
    yield from tqdm(
        modules(stdlib),
        desc="reading Python's documentation",
        unit="file",
        leave=False,
        disable=None,
    )


# ---- the split by module -------------------------------------------------------------------------

ONE_IN = 8
"""One module in so many is held out."""


def module_name(path: Path, stdlib: Path) -> str:
    """Return the dotted name of a source file: "json.decoder", "json"."""
    return ".".join(path.relative_to(stdlib).with_suffix("").parts).removesuffix(".__init__")


def is_held_out(module: str) -> bool:
    """Return whether a module is held out, by the hash of the name of its package.

    A package is held out as a whole, and so are a module and its implementation in Python or C
    (`decimal`, `_pydecimal`, `_decimal`), whose docstrings are alike.
    """
    package = module.split(".")[0]
    package = package.removeprefix("_py" if package.startswith("_py") else "_")
    return hashlib.sha256(package.encode()).digest()[0] % ONE_IN == 0


# ---- reading the sources -------------------------------------------------------------------------


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
    return [text for _, text in documented_nodes(source)]


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented_nodes(source: bytes) -> list[tuple[Documented, str]]:
    """Return the parts of a module that have a docstring, in order of line, and the docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of escapes in older sources
        tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, Documented)]
    # ast.walk goes level by level, so sort by line. A Module has no line number: it comes first.
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = [(node, (ast.get_docstring(node) or "").strip()) for node in nodes]
    return [(node, text) for node, text in docstrings if text]
