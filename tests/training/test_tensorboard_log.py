"""The event files of --tensorboard hold what metrics.jsonl holds, once each."""

import io
import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nanods import config as ladder
from nanods.command_line import resolve_resume
from nanods.training.metrics_log import MetricsLog
from nanods.training.tensorboard_log import add_pictures, draw_load

pytest.importorskip("tensorboard")


def read_values(run_dir):
    """Return every (name, step, value) of the event files in a folder."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    values = []
    for path in sorted(run_dir.glob("*tfevents*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            values += [(value.tag, event.step, value) for value in event.summary.value]
    return values


def scalars(run_dir):
    """Return the numbers of the event files, (name, step) -> number, each of which occurs once."""
    found = [value for value in read_values(run_dir) if value[2].HasField("simple_value")]
    assert set(Counter((name, step) for name, step, _ in found).values()) <= {1}
    return {(name, step): value.simple_value for name, step, value in found}


def images(run_dir):
    found = [value for value in read_values(run_dir) if value[2].HasField("image")]
    for _, _, value in found:
        with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
            assert image.format == "PNG"
            assert image.size == (value.image.width, value.image.height)
    return sorted((name, step) for name, step, _ in found)


def numbers_of(run_dir):
    """Return the numbers of metrics.jsonl, (name, step) -> number."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        (name, row["step"]): pytest.approx(value, rel=1e-6)
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
    }


@pytest.mark.pictures
def test_a_run_writes_its_numbers_its_load_and_its_pictures(train_tiny, workspace):
    code, out, err = train_tiny("v2-tiny", "--steps", 6, "--eval-every", 3, "--tensorboard")
    assert code == 0, err
    run = workspace / "runs/v2-tiny"
    assert "board      " in out and "-m tensorboard.main --logdir runs/v2-tiny" in out
    assert scalars(run) == numbers_of(run)
    assert scalars(run).keys() >= {("ce_loss", 1), ("val_loss", 3), ("load_entropy", 6)}
    pictures = [(path.stem, 6) for path in run.glob("*.png")]
    assert {name for name, _ in pictures} == {"loss", "sparsity", "experts"}
    assert images(run) == sorted([("val_load", 3), ("val_load", 6), *pictures])


class SilentTask:
    unit, device = "tokens", None

    def describe_validation(self, row):
        return "validation"


@pytest.fixture
def log_rows(tmp_path, monkeypatch):
    """Log rows as a run that has `before` behind it: log_rows(before, rows)."""
    monkeypatch.setattr("nanods.training.metrics_log.peak_memory", lambda device: 0)
    config = replace(ladder.PRESETS["v0-tiny"], out_dir=tmp_path, tensorboard=True)

    def call(before, rows, **changes):
        log = MetricsLog(replace(config, **changes), SilentTask(), list(before))
        for row in rows:
            log.log(row)
        log.close()

    return call


ROWS = [
    {"step": s, "ce_loss": 2 / s, "tokens_per_second": 9, "seconds": 10.0 * s} for s in range(1, 7)
]


def test_a_resumed_run_has_no_step_twice_and_none_that_was_lost(log_rows, tmp_path):
    log_rows([], ROWS[:5])
    other = tmp_path / "events.out.tfevents.1.another.program"
    other.write_bytes(b"")
    log_rows(ROWS[:3], [row | {"ce_loss": 7.0} for row in ROWS[3:]])  # its checkpoint was at step 3
    assert scalars(tmp_path) == numbers_of(tmp_path)
    assert [scalars(tmp_path)["ce_loss", step] for step in (3, 4)] == pytest.approx([2 / 3, 7.0])
    assert other.exists()


def test_a_run_that_resumes_with_the_flag_has_its_first_steps_too(log_rows, tmp_path):
    log_rows([], ROWS[:3], tensorboard=False)
    assert not read_values(tmp_path)
    log_rows(ROWS[:3], ROWS[3:])
    assert scalars(tmp_path) == numbers_of(tmp_path)


def test_a_running_tensorboard_forgets_the_old_files(log_rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows([], ROWS[:5])
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    log_rows(ROWS[:3], ROWS[3:])
    board.Reload()
    assert [event.step for event in board.Scalars("ce_loss")] == [1, 2, 3, 4, 5, 6]
    times = [event.wall_time for event in board.Scalars("ce_loss")]
    assert np.diff(times) == pytest.approx([10] * 5, abs=0.1)


def test_a_page_of_sounds_is_no_picture(tmp_path):
    (tmp_path / "sheet.html").write_text("<html>")
    Image.new("RGB", (3, 2)).save(tmp_path / "loss.png")
    add_pictures(tmp_path, 7, [tmp_path / "loss.png", tmp_path / "sheet.html"])
    assert images(tmp_path) == [("loss", 7)]


def test_only_the_main_process_writes(tmp_path):
    config = replace(ladder.PRESETS["v0-tiny"], out_dir=tmp_path, tensorboard=True)
    log = MetricsLog(config, SilentTask(), [], is_main_process=False)
    log.log(ROWS[0])
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_said_before_any_data_is_read(program, workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    code, out, err = program("train", "v0-tiny", "--tensorboard", "--data", "text.txt")
    assert code == 2 and "make setup EXTRAS=tensorboard" in err and "Traceback" not in err
    assert "device" not in out and not list(workspace.glob("runs/*/*"))


def test_a_resumed_run_keeps_the_flag():
    preset = ladder.PRESETS["v0-tiny"]
    for requested in (False, True):
        resumed = replace(preset, resume=True, tensorboard=requested)
        saved = replace(preset, tensorboard=not requested)
        assert resolve_resume(resumed, saved).tensorboard


def test_the_image_of_a_load_is_white_where_the_share_is_even():
    load = np.array([[10, 10, 10, 10], [40, 0, 0, 0], [0, 0, 0, 0]])
    png, size = draw_load(load)
    assert size == (4 * 16, 3 * 16)
    pixels = np.asarray(Image.open(io.BytesIO(png)))[8::16, 8::16].astype(int)  # (L, E, 3)
    assert (pixels[0] > 240).all()
    assert pixels[1, 0, 0] > pixels[1, 0, 2] + 50, "red"
    assert (pixels[1:, 1:, 2] > pixels[1:, 1:, 0] + 50).all(), "blue"
