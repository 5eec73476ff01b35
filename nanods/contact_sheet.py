"""A page of examples to look at and to listen to: one HTML file, which needs nothing beside it.

    save_contact_sheet(path, "What the names find", [Row([Cell("red heart", wave=wave)], ...)])

A cell shows a caption, an image and a sound that plays. Images are PNG and sounds WAV, both within
the file.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nanods.data.sound import write_wav
from nanods.files import write_and_rename

CAPTION_LENGTH = 120  # characters that a cell shows; the whole caption appears under the pointer

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; color: #30343b; margin: 24px; max-width: 1200px; }
h1 { font-size: 20px; } h2 { font-size: 15px; margin: 20px 0 6px; }
.row { display: flex; flex-wrap: wrap; gap: 10px; }
.cell { width: 150px; padding: 8px; background: #f1f2f4; border-radius: 6px; }
.cell.right { outline: 2px solid #0072b2; }
.cell img { width: 96px; image-rendering: pixelated; display: block; margin: 0 auto 6px; }
.cell audio { width: 150px; height: 30px; }
.cell p { margin: 0; overflow-wrap: anywhere; } .note { color: #6b7177; font-size: 13px; }
"""


@dataclass(frozen=True)
class Cell:
    """One example. An image is (3, Y, X) in 0 .. 1, a wave (S,) in -1 .. 1 at 8,000 Hz."""

    caption: str = ""
    image: np.ndarray | None = None
    wave: np.ndarray | None = None
    note: str = ""
    is_right: bool = False  # framed: the example that was looked for


@dataclass(frozen=True)
class Row:
    """A heading and the cells below it."""

    heading: str
    cells: Sequence[Cell]


def save_contact_sheet(path: Path, title: str, rows: Sequence[Row], text: str = "") -> None:
    """Write the page to a temporary name, then rename it."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(text)}</p>"]
    for row in rows:
        cells = "".join(cell_html(cell) for cell in row.cells)
        parts.append(f'<h2>{html.escape(row.heading)}</h2>\n<div class="row">{cells}</div>')
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_and_rename(path, lambda file: file.write(page.encode(errors="replace")))


def cell_html(cell: Cell) -> str:
    """Return a cell as HTML, its caption escaped and shortened."""
    parts = []
    if cell.image is not None:
        parts.append(f'<img alt="" src="{png_url(cell.image)}">')
    if cell.wave is not None:
        parts.append(f'<audio controls preload="none" src="{wav_url(cell.wave)}"></audio>')
    if cell.caption:
        shown = cell.caption[:CAPTION_LENGTH]
        shown += "…" if shown != cell.caption else ""
        parts.append(f'<p title="{html.escape(cell.caption)}">{html.escape(shown)}</p>')
    if cell.note:
        parts.append(f'<p class="note">{html.escape(cell.note)}</p>')
    return f'<div class="cell{" right" if cell.is_right else ""}">{"".join(parts)}</div>'


def png_url(image: np.ndarray) -> str:
    """Return an image (3, Y, X) in 0 .. 1 as a data URL."""
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def wav_url(wave: np.ndarray) -> str:
    """Return a sound (S,) in -1 .. 1 as a data URL."""
    file = io.BytesIO()
    write_wav(file, wave)
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
