"""pydocs: the same text in every process, no module imported, a cache that detects damage."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from nanods.data import pydocs
from nanods.errors import UserError

STDLIB = Path(sysconfig.get_path("stdlib"))
SCRIPT = """
import hashlib, sys
from nanods.data.pydocs import pydocs_text
text = pydocs_text()
print(hashlib.sha256(text.encode()).hexdigest())
print('turtle' in sys.modules, 'smtplib' in sys.modules)
"""


@pytest.fixture(scope="module")
def corpus():
    return pydocs.collect(STDLIB)


def test_size_and_content(corpus):
    assert 1_500_000 < len(corpus) < 4_000_000
    assert "\0" not in corpus
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    assert corpus.startswith(topics[min(topics)].strip())
    assert corpus.index(topics[max(topics)].strip()) < corpus.index(
        "Internationalization and localization support."
    )


def test_another_process_collects_the_same_text_and_imports_no_module(corpus, tmp_path):
    env = os.environ | {"NANODS_DATA": str(tmp_path), "PYTHONHASHSEED": "7"}
    env["PYTHONPATH"] = str(Path(pydocs.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [hashlib.sha256(corpus.encode()).hexdigest(), "False", "False"]


def test_modules_are_sorted_and_exclude_tests_and_generated_files(tmp_path):
    included = ["a.py", "b/c.py", "b/d/e.py", "b.py", "testing.py"]
    excluded = [
        "test/t.py",
        "b/tests/t.py",
        "site-packages/p.py",
        "idlelib/i.py",
        "_sysconfigdata__linux.py",
        "x.txt",
    ]
    for name in included + excluded:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in pydocs.modules(tmp_path)] == sorted(
        included
    )
    assert not any("test" in path.relative_to(STDLIB).parts for path in pydocs.modules(STDLIB))


def test_docstrings_are_dedented_and_in_order_of_line_and_no_code_runs():
    source = """
"Module."
class A:
    '''A.

    More.
    '''
    def f(self):
        "f"
async def g(): "g"
def h(): pass
raise SystemExit
"""
    assert pydocs.docstrings_of(source.encode()) == ["Module.", "A.\n\nMore.", "f", "g"]


def test_identical_docstrings_appear_once(tmp_path):
    (tmp_path / "a.py").write_text('"""The same docstring twice."""')
    (tmp_path / "b.py").write_text('"""The same docstring twice."""')
    assert pydocs.collect(tmp_path).count("The same docstring twice.") == 1


def test_a_good_cache_is_used_and_a_damaged_one_is_written_again(monkeypatch, tmp_path):
    monkeypatch.setenv("NANODS_DATA", str(tmp_path))
    calls = []
    monkeypatch.setattr(
        pydocs, "collect", lambda stdlib: calls.append(stdlib) or "Some documentation: ü\n"
    )
    assert pydocs.pydocs_text() == pydocs.pydocs_text() == "Some documentation: ü\n"
    assert calls == [STDLIB]
    (cache,) = (tmp_path / "cache").iterdir()
    for damaged in (cache.read_bytes()[:-3], cache.read_bytes().replace(b"Some", b"Same"), b""):
        cache.write_bytes(damaged)
        assert pydocs.pydocs_text() == "Some documentation: ü\n"
    assert len(calls) == 4


def test_an_interpreter_without_documentation_or_sources_is_explained(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no sources in .*Use a full Python"):
        pydocs.collect(tmp_path)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"pydoc_data.topics is missing.*--data shakespeare"):
        pydocs.collect(STDLIB)
