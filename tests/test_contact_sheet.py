import base64
import io
import re

import numpy as np
from PIL import Image

from nanods.contact_sheet import Cell, Row, save_contact_sheet
from nanods.data.sound import read_wav


def test_the_page_holds_its_images_and_sounds_and_escapes_captions(tmp_path):
    image = np.zeros((3, 4, 6), np.float32)
    image[0] = 1
    wave = np.sin(np.arange(800) / 5).astype(np.float32)
    cell = Cell('<script>alert("x")</script>', image, wave, note="0.87", is_right=True)
    path = tmp_path / "sheet.html"
    save_contact_sheet(path, "A & B", [Row("what <it> finds", [cell])])
    page = path.read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "A &amp; B" in page
    png, wav = (
        base64.b64decode(re.search(f'data:{kind};base64,([^"]+)', page).group(1))
        for kind in ("image/png", "audio/wav")
    )
    assert Image.open(io.BytesIO(png)).size == (6, 4)
    assert Image.open(io.BytesIO(png)).getpixel((0, 0)) == (255, 0, 0)
    np.testing.assert_allclose(read_wav(io.BytesIO(wav)), wave, atol=1e-4)
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is fetched from elsewhere"
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.html"]


def test_a_long_caption_is_shortened_and_kept_whole_as_its_title(tmp_path):
    path = tmp_path / "sheet.html"
    save_contact_sheet(path, "long", [Row("one", [Cell("word " * 100)])])
    page = path.read_text(encoding="utf-8")
    assert "word " * 100 in page and "…</p>" in page
