"""Search by what a client sends: what is read of it, and which examples are found."""

import io
import struct
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nanods.build import build_model
from nanods.config import PRESETS
from nanods.data.examples import Examples
from nanods.data.sound import write_wav
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.serving.embedder import embed_one_by_one
from nanods.serving.models import embedding_model
from nanods.serving.search import Gallery, nearest_distance, read_input
from nanods.training.finished_run import FinishedRun

TINY = PRESETS["v3-tiny"]
CONFIG = replace(TINY, model=replace(TINY.model, n_layer=1, n_embd=16), data="photos")
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(CONFIG).eval()


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(0)
    return Examples(
        ids=np.arange(6),
        captions=["a cat", "a dog", "A  cat", "a boat", "", "a tree"],
        images=random.random((6, 3, 32, 32), np.float32),
        mels=random.random((6, 32, 32), np.float32),
        present={
            "text": np.array([1, 1, 1, 1, 0, 1], bool),
            "image": np.array([0, 1, 1, 1, 1, 1], bool),
        },
    )


def test_an_example_is_nearest_to_itself_and_found_under_its_own_number(model, examples):
    gallery = Gallery(model, examples, CONFIG, TOKENIZER)
    queries = {
        "text": read_input("text", "a boat", CONFIG, TOKENIZER),
        "image": torch.from_numpy(examples.images[3]),
        "audio": torch.from_numpy(examples.mels[3]),
    }
    for name, x in queries.items():
        query = embed_one_by_one(model, [(name, x)])[0]
        hits = gallery.search(query, name, top=3)
        assert hits[0].index == 3 and hits[0].score == pytest.approx(1, abs=1e-5)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_what_an_example_lacks_and_equal_captions_are_not_found(model, examples):
    gallery = Gallery(model, examples, CONFIG, TOKENIZER)
    query = torch.ones(CONFIG.multimodal.width)
    found = {name: {hit.index for hit in gallery.search(query, name, 99)} for name in gallery.rows}
    assert found == {"text": {0, 1, 3, 5}, "image": {1, 2, 3, 4, 5}, "audio": set(range(6))}
    with pytest.raises(UserError, match="there is no video to search, but text and image and aud"):
        gallery.search(query, "video", 1)


def test_a_modality_that_no_example_has_is_left_out(model, examples):
    silent = replace(examples, present=examples.present | {"audio": np.zeros(6, bool)})
    gallery = Gallery(model, silent, CONFIG, TOKENIZER)
    assert list(gallery.embeddings) == list(gallery.rows) == ["text", "image"]
    with pytest.raises(UserError, match="there is no audio to search, but text and image"):
        gallery.search(torch.ones(CONFIG.multimodal.width), "audio", 1)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_bytes_become_what_the_model_reads():
    text = read_input("text", " a\ncat ", CONFIG, TOKENIZER)
    assert bytes(text.tolist()) == b"a cat"
    assert len(read_input("text", "x" * 99, CONFIG, TOKENIZER)) == 80
    pixels = np.full((40, 50, 3), (10, 20, 30), np.uint8)
    image = read_input("image", png(pixels), CONFIG, TOKENIZER)
    assert image.shape == (3, 32, 32)
    np.testing.assert_allclose(image.mean(dim=(1, 2)) * 255, (10, 20, 30), atol=0.01)
    file = io.BytesIO()
    write_wav(file, np.zeros(99_999, np.float32))
    sound = read_input("audio", file.getvalue(), CONFIG, TOKENIZER)
    assert sound.shape == (32, 32) and sound.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text", " \n", "no word in the text"),
        ("image", b"", "the image: not a complete JPEG or PNG image \\(the file is empty\\)"),
        ("image", b"GIF89a", "the image: a GIF image; only JPEG and PNG"),
        ("image", b"nothing", "the image: not a complete JPEG or PNG image \\(of an unknown kind"),
        ("image", png(np.zeros((9, 9, 3), np.uint8))[:-30], "the image: not a complete"),
        ("audio", b"ID3", "the sound: an MP3 sound"),
        ("audio", b"RIFF", "the sound: not a WAV file"),
        ("video", b"", "no video can be read"),
    ],
)
def test_other_bytes_are_refused_in_words(name, data, message):
    with pytest.raises(UserError, match=message):
        read_input(name, data, CONFIG, TOKENIZER)


def test_a_model_of_scenes_is_asked_in_their_words():
    scenes = replace(CONFIG, data="scenes")
    text = read_input("text", "A red circle left of a blue SQUARE.", scenes, TOKENIZER)
    assert bytes(text.tolist()) == b"a red circle left of a blue square"
    with pytest.raises(UserError, match="has never read 'cat'"):
        read_input("text", "a red cat", scenes, TOKENIZER)


def test_the_nearest_of_the_known_embeddings_counts():
    known = torch.eye(3)
    embeddings = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8], [-1.0, 0, 0]])
    torch.testing.assert_close(nearest_distance(embeddings, known), torch.tensor([0.0, 0.2, 1.0]))


# ---- files of any kind ---------------------------------------------------------------------------


def png_of_zeros(width, height, depth=1, color=0, rows=None):
    """Return a PNG whose pixels are 0, compressed to almost nothing; `rows`: those it has."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    channels = {0: 1, 2: 3, 6: 4}[color]
    row = b"\0" + bytes((width * depth * channels + 7) // 8)
    compress = zlib.compressobj(9)
    pixels = b"".join(compress.compress(row) for _ in range(height if rows is None else rows))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = chunk(b"IDAT", pixels + compress.flush())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8))
GIF = saved(RGB.convert("P"), "GIF", save_all=True, append_images=[RGB.convert("P")] * 3)
IMAGES = {  # name -> (the file, what the refusal says; None where it is read)
    "50,000 x 50,000": (png_of_zeros(50_000, 50_000, rows=1), "too many pixels"),
    "5,000 x 5,000": (png_of_zeros(5000, 5000), "5,000 x 5,000, and at most 16,777,216 are read"),
    "2^31 x 2^31": (png_of_zeros(2**31 - 1, 2**31 - 1, rows=0), "too many pixels"),
    "1,000 x 1,000, 16 bits, transparent": (png_of_zeros(1000, 1000, 16, 6), None),
    "long and thin": (png_of_zeros(2**24, 1), None),
    "no pixels": (png_of_zeros(0, 0), "not a complete JPEG or PNG"),
    "too few rows": (png_of_zeros(100, 100, rows=9), None),
    "too many rows": (png_of_zeros(10, 10, rows=90_000), None),
    "1 x 1": (saved(RGB.crop((0, 0, 1, 1))), None),
    "grey of 16 bits": (saved(Image.fromarray(np.full((9, 9), 60_000, np.uint16))), None),
    "a palette with transparency": (saved(RGB.convert("P"), transparency=3), None),
    "black and white": (saved(RGB.convert("1")), None),
    "a JPEG of CMYK": (saved(RGB.convert("CMYK"), "JPEG"), None),
    "an animated PNG": (saved(RGB, save_all=True, append_images=[RGB] * 3), None),
    "a truncated PNG": (saved(RGB)[:200], "not a complete JPEG or PNG"),
    "a truncated JPEG": (saved(RGB, "JPEG")[:500], "not a complete JPEG or PNG"),
    "an animated GIF": (GIF, "a GIF image; only JPEG and PNG"),
    "WebP": (saved(RGB, "WEBP"), "a WebP image; only JPEG and PNG"),
    "TIFF": (saved(RGB, "TIFF"), "a TIFF image; only JPEG and PNG"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a complete JPEG or PNG"),
    "nothing": (b"", "the file is empty"),
}


def read_or_refuse(modality, data, refusal, seconds):
    """Return what is read of a file; None if it is refused, as it must be. Both are soon done."""
    begun, made = time.process_time(), None
    if refusal:
        with pytest.raises(UserError, match=refusal):
            read_input(modality, data, CONFIG, TOKENIZER)
    else:
        made = read_input(modality, data, CONFIG, TOKENIZER)
        assert made is not None
    assert time.process_time() - begun < seconds
    return made


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_kind_is_read_or_refused_soon(name):
    made = read_or_refuse("image", *IMAGES[name], seconds=2)
    if made is not None:
        assert made.shape == (3, 32, 32) and made.min() >= 0 and made.max() <= 1


def wav(kind, bits, data, channels=1, rate=8000, size=None, frame_bytes=None):
    """Return a WAV file whose header says what the arguments say."""
    frame_bytes = channels * -(-bits // 8) if frame_bytes is None else frame_bytes
    form = struct.pack("<HHIIHH", kind, channels, rate, 0, frame_bytes, bits)
    size = len(data) if size is None else size
    return (
        b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0" + form + b"data" + struct.pack("<I", size) + data
    )


TONE = np.sin(np.arange(16_000) / 5)
PCM16 = (TONE * 20_000).astype("<i2").tobytes()
WAVS = {
    "8 bits": (wav(1, 8, b"\x80" * 9000), None),
    "24 bits": (wav(1, 24, b"\1\2\3" * 9000), None),
    "32 bits": (wav(1, 32, b"\1\2\3\4" * 9000), None),
    "floats": (wav(3, 32, TONE.astype("<f4").tobytes()), None),
    "floats of 64 bits": (wav(3, 64, TONE.astype("<f8").tobytes()), None),
    "floats of 16 bits": (wav(3, 16, TONE.astype("<f2").tobytes()), "16 bits a sample"),
    "not a number": (wav(3, 32, np.full(9000, np.nan, "<f4").tobytes()), "1 is full scale"),
    "one infinite sample": (wav(3, 64, np.r_[0, np.inf].astype("<f8").tobytes()), "full scale"),
    "huge floats": (wav(3, 64, np.full(9000, 1e308).tobytes()), "1 is full scale"),
    "ADPCM": (wav(2, 4, b"\1" * 9000), "its samples are ADPCM"),
    "two channels": (wav(1, 16, PCM16, channels=2), None),
    "six channels at 48,000 Hz": (wav(1, 16, PCM16 * 6, channels=6, rate=48_000), None),
    "65,535 channels": (wav(1, 8, b"\x80" * 65_535 * 9, channels=65_535), None),
    "no channels": (wav(1, 16, PCM16, channels=0), "it has no channels"),
    "1 Hz": (wav(1, 16, PCM16, rate=1), "1,000 to 768,000 are read"),
    "4 GHz": (wav(1, 16, PCM16, rate=4_000_000_000), "1,000 to 768,000 are read"),
    "a prime rate": (wav(1, 16, PCM16 * 60, rate=767_957), None),
    "one sample": (wav(1, 16, b"\1\0", rate=768_000), None),
    "no samples": (wav(1, 16, b""), "there is no sound in it"),
    "a size that is too large": (wav(1, 16, PCM16, size=2**31), "cut off"),
    "a size that is too small": (wav(1, 16, PCM16, size=101), None),
    "an unknown size": (wav(1, 16, PCM16, size=2**32 - 1), None),
    "a wrong frame": (wav(1, 16, PCM16, frame_bytes=7), "7 bytes for 1 samples"),
    "hours of silence": (wav(1, 8, b"\x80" * 10_000_000, rate=1000), None),
    "no sound in many chunks": (b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 10**6, "1,000 chunks"),
    "a chunk that is too long": (b"RIFF\0\0\0\0WAVEjunk\xff\xff\xff\xff", "ends too early"),
    "text": (b"hello", "not a WAV file"),
    "MP3": (b"ID3\3" + bytes(500), "an MP3 sound"),
}


@pytest.mark.parametrize("name", WAVS)
def test_a_sound_of_any_kind_is_read_or_refused_soon(name):
    made = read_or_refuse("audio", *WAVS[name], seconds=1)
    if made is not None:
        assert made.shape == (32, 32) and made.isfinite().all()


def test_a_damaged_gallery_is_named_at_the_start(model, tmp_path, capsys):
    run = FinishedRun(tmp_path, {}, replace(CONFIG, data="no-such-folder"), TOKENIZER, model)
    assert embedding_model("space", run, max_waiting=9).operations == ("embed",)
    assert "space searches nothing: " in capsys.readouterr().out
    (tmp_path / "gallery.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"gallery.safetensors: damaged .*; delete it"):
        embedding_model("space", run, max_waiting=9)
