"""The table of the emoji bench, from three stored runs."""

import json
import sys
from types import SimpleNamespace

import pytest

from nanods.bench import emoji as bench
from nanods.command_line import from_command_line


def fake_rows(seed):
    row = {"val_recall1": 0.8 + seed / 100, "seconds": 9.0, "cpu_seconds": 8.0}
    for i, (a, b) in enumerate(bench.DIRECTIONS):
        row[f"recall1_{a}_{b}"] = i / 10
        row[f"unseen_recall5_{a}_{b}"] = (i + seed) / 20
    return [{"step": 1}, row]


def test_the_table_holds_the_means_and_train_py_is_told_what_to_expect(tmp_path, monkeypatch):
    def train_all(name, jobs, summarise, results, runs):
        for job in jobs:
            assert from_command_line("", list(job.words)).data == "emoji"
        return {job.name: summarise(job, tmp_path, fake_rows(i)) for i, job in enumerate(jobs)}

    monkeypatch.setattr(bench, "train_all", train_all)
    monkeypatch.setattr(bench, "machine_of", lambda *_: {})
    monkeypatch.setattr(bench, "EmojiData", lambda *sizes: SimpleNamespace(sha256="abc"))
    monkeypatch.setattr(sys, "argv", ["emoji", "--results", str(tmp_path)])
    (tmp_path / "expected.json").write_text('{"v3-tiny/scenes": {}}')
    bench.main()
    table = json.loads((tmp_path / "emoji.json").read_text())
    assert len(table["runs"]) == 3 and len(table["summary"]) == 12
    assert table["summary"]["known_text_audio"] == pytest.approx(0.1)
    assert table["summary"]["unseen_audio_image"] == pytest.approx((5 + 6 + 7) / 60)
    assert table["chance"]["unseen"] == 0.025
    expected = json.loads((tmp_path / "expected.json").read_text())
    assert expected["v3-tiny/scenes"] == {}
    assert expected["v3-emoji/emoji"] == {
        "sha256": "abc",
        "val_recall1": 0.81,
        "tolerance": 0.04,
    }
    assert (tmp_path / "emoji.png").stat().st_size > 3000
