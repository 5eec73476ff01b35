"""What a file is, by its first bytes: for messages about files under a wrong name."""

from pathlib import Path

# What the first bytes are, in words. The first match wins.
PREFIXES = (
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"ID3", "an MP3 sound"),
    (b"\xff\xf1", "an AAC sound"),
    (b"\xff\xf9", "an AAC sound"),
    (b"OggS", "an Ogg sound"),
    (b"fLaC", "a FLAC sound"),
    (b"RF64", "an RF64 sound (WAV above 4 GB)"),
    (b"%PDF", "a PDF document"),
    (b"PK\3\4", "a zip archive (.docx, .odt and .epub are zip archives too)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh91AY&SY", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"PAR1", "a Parquet file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file (run: git lfs pull)"),
)
# Containers: bytes 8 to 12 say what a RIFF or FORM file holds, and the brand of a file whose bytes
# 4 to 8 are ftyp.
RIFF = {b"WAVE": "a WAV sound", b"WEBP": "a WebP image", b"AVI ": "an AVI video"}
FORM = {b"AIFF": "an AIFF sound", b"AIFC": "an AIFF sound"}
FTYP = {b"avif": "an AVIF image", b"M4A ": "an M4A sound"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "a HEIC image"
)


def file_type(head: bytes) -> str | None:
    """Return what a file with these first bytes is, such as "a GIF image"; None if unknown.

    32 bytes are enough.
    """
    if head[:4] == b"RIFF" and head[8:12] in RIFF:
        return RIFF[head[8:12]]
    if head[:4] == b"FORM" and head[8:12] in FORM:
        return FORM[head[8:12]]
    if head[4:8] == b"ftyp":
        return FTYP.get(head[8:12], "an MP4 video")
    for prefix, kind in PREFIXES:
        if head.startswith(prefix):
            return kind
    # A frame of MPEG audio: 11 bits of 1, then a layer of II or III.
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 in (2, 4):
        return "an MP3 sound"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return None


def wrong_type(name: str, head: bytes, suffixes: tuple[str, ...]) -> str | None:
    """Return, for a file that should have been of another kind, what it is: None if unknown.

    `suffixes` are those of the expected kind: "an MP3 sound under the name .wav".
    """
    kind = file_type(head)
    suffix = Path(name).suffix
    if kind and suffix.lower() in suffixes:
        return f"{kind} under the name {suffix}"
    return kind
