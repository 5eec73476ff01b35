"""The metrics of a run as TensorBoard event files (--tensorboard): `tensorboard --logdir runs`.

The files lie in the run directory, beside metrics.jsonl, and hold what it holds: each number under
its name there, and the load of the experts as an image at each evaluation. A finished run adds its
pictures.
"""

import io
import time
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from nanods.errors import UserError

SUFFIX = ".nanods"  # of the files' names: those of other programs are left alone
CELL = 16  # pixels of a layer's expert in the image of a load


def require_tensorboard() -> None:
    """Raise UserError if the library is not installed."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs the library tensorboard ({error}): `make setup "
            "EXTRAS=tensorboard`, or pip install 'nanods[tensorboard]', or leave the flag out"
        ) from None


class TensorBoardLog:
    """Writes event files; a thread of the library writes them to the disk."""

    def __init__(self, run_dir: Path, rows: list[dict]) -> None:
        """`rows`: those of the steps before, where a run resumes. They are written again and
        replace the old files, in which a killed run may have steps that came after its last
        checkpoint."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        for path in run_dir.glob(f"events.out.tfevents.*{SUFFIX}"):
            path.write_bytes(b"")  # not deleted: a TensorBoard that reads it would read no other
        self.start = time.time() - (rows[-1].get("seconds", 0) if rows else 0)
        self.writer = open_writer(run_dir)
        # This makes a TensorBoard that has read the old files forget their steps.
        self.writer.add_event(make_event(0, session_log=SessionLog(status=SessionLog.START)))
        for row in rows:
            self.log(row)

    def log(self, row: dict) -> None:
        """Write the metrics of one step as one event, in a fraction of a millisecond."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                values.append(Summary.Value(tag=name, simple_value=value))
            elif name.startswith("val_load") and isinstance(value, list):
                values.append(image_value(name, *draw_load(np.array(value)), LOAD_DESCRIPTION))
        seconds = row.get("seconds", 0)  # its time: of training alone, as if never interrupted
        self.writer.add_event(
            make_event(row["step"], self.start + seconds, summary=Summary(value=values))
        )

    def close(self) -> None:
        self.writer.close()


def add_pictures(run_dir: Path, step: int, pictures: Iterable[Path]) -> None:
    """Write the PNG files among a run's pictures into an event file of their own, as images of a
    step."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    writer = open_writer(run_dir)
    for path in pictures:
        if path.suffix != ".png":  # a page of sounds
            continue
        with Image.open(path) as image:
            size = image.size
        value = image_value(path.stem, path.read_bytes(), size)
        writer.add_event(make_event(step, summary=Summary(value=[value])))
    writer.close()


def open_writer(run_dir: Path):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(run_dir), flush_secs=10, filename_suffix=SUFFIX)


def make_event(step: int, wall_time: float | None = None, **content):
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(step=step, wall_time=wall_time or time.time(), **content)


def image_value(name: str, png: bytes, size: tuple[int, int], description: str = ""):
    """Return a PNG file of `size`, (width, height), as a value of a summary."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    width, height = size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    metadata = SummaryMetadata(display_name=name, summary_description=description)
    return Summary.Value(tag=name, image=image, metadata=metadata)


LOAD_DESCRIPTION = (
    "one row per layer, one column per expert; white: an even share, blue: idle, red: twice or more"
)


def draw_load(load: np.ndarray) -> tuple[bytes, tuple[int, int]]:
    """Draw a load (L, E) as a PNG of L x E cells, in the colours of experts.png. Returns the file
    and its size in pixels."""
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    colours = matplotlib.colormaps["RdBu_r"](relative / 2, bytes=True)[..., :3]  # (L, E, 3)
    image = Image.fromarray(colours.repeat(CELL, axis=0).repeat(CELL, axis=1))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue(), image.size
