"""What a file is, by its first bytes."""

import io

import pytest
from PIL import Image

from nanods.data.file_types import file_type, wrong_type


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"ID3\4\0\0", "an MP3 sound"),
        (b"\xff\xfb\x90\x64", "an MP3 sound"),
        (b"\xff\xf3\x40\xc0", "an MP3 sound"),
        (b"\xff\xf1\x50\x80", "an AAC sound"),
        (b"OggS\0\2", "an Ogg sound"),
        (b"fLaC\0\0\0\x22", "a FLAC sound"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "a WAV sound"),
        (b"RIFF\x24\0\0\0WEBPVP8 ", "a WebP image"),
        (b"RF64\xff\xff\xff\xffWAVE", "an RF64 sound (WAV above 4 GB)"),
        (b"FORM\0\0\0\x24AIFFCOMM", "an AIFF sound"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF image"),
        (b"\0\0\0\x1cftypisom\0\0\0\0", "an MP4 video"),
        (b"\n <!DOCTYPE HTML><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer instead of the file"),
        (b"", None),
        (b"\xff", None),
        (b"plain words", None),
        (b"\xff\xfeh\0i\0", None),  # UTF-16
    ],
)
def test_first_bytes(head, kind):
    actual = file_type(head)
    assert actual is None if kind is None else actual.startswith(kind)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_files_that_pillow_writes(kind):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, kind)
    assert file_type(file.getvalue()[:32]) == f"a {kind} image"


def test_a_wrong_name_is_said():
    assert wrong_type("a.WAV", b"ID3", (".wav",)) == "an MP3 sound under the name .WAV"
    assert wrong_type("a.mp3", b"ID3", (".wav",)) == "an MP3 sound"
    assert wrong_type("a.wav", b"?", (".wav",)) is None
