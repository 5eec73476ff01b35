import pytest

from nanods.data import shards, sources


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty current folder. Small corpora make several shards, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANODS_DATA", raising=False)
    monkeypatch.setattr(shards, "available_cores", lambda: 1)
    monkeypatch.setattr(sources, "SLICE", 1500)
    return tmp_path
