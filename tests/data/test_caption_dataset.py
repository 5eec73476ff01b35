"""CaptionDataset: decoding of images, batches that depend on their step alone, skipped files."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from nanods.data import caption_dataset as module
from nanods.data.caption_dataset import load_caption_dataset, read_image, read_sound
from nanods.data.examples import Examples, duplicate_ids
from nanods.data.sound import HOP, WINDOW, normalized_log_mel, write_wav
from nanods.errors import UserError

SIZE, FRAMES = 8, 4
SAMPLES = WINDOW + (FRAMES - 1) * HOP


def file_names(suffix, held_out, count):
    """Return the first `count` names such as 7.png whose hash puts them into this split."""
    names = []
    for i in range(1000):
        name = f"{i}.{suffix}"
        is_held_out = hashlib.sha256(name.encode()).digest()[0] < 13
        if is_held_out == held_out:
            names.append(name)
    return names[:count]


TRAIN, HELD_OUT = file_names("png", False, 12), file_names("png", True, 6)
SOUNDS = file_names("wav", False, 12) + file_names("wav", True, 6)


def colour(name):
    """Return the colour of an image, different for each."""
    i = int(name.split(".")[0])
    return (i % 20 * 12, i // 20 * 12, 7)


@pytest.fixture
def photos(tmp_path):
    """12 training images with 3 captions each, 6 held-out ones with 2, each in its own colour."""
    rows = [(name, f"{name} in words {k}") for k in range(3) for name in TRAIN]
    rows += [(name, f"{name} in words {k}") for name in HELD_OUT for k in range(2)]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.token").write_text(
        "".join(f"{name}#0\t{text}\n" for name, text in rows)
    )
    for name in TRAIN + HELD_OUT:
        Image.new("RGB", (9, 12), colour(name)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def voices(tmp_path):
    (tmp_path / "voices").mkdir()
    for i, name in enumerate(SOUNDS):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, 500 + 100 * i)
        write_wav(tmp_path / "voices" / name, noise)
        (tmp_path / "voices" / name.replace("wav", "txt")).write_text(f"noise {i}")
    return tmp_path / "voices"


def write_table(folder):
    folder.mkdir()
    (folder / "captions.csv").write_text("image,caption\na.png,black\n")
    return folder


@pytest.fixture
def gaps(tmp_path):
    """30 rows with image, sound and text, of which every third lacks one; 6 are held out."""
    folder, rows = tmp_path / "gaps", ["image,audio,text,split\n"]
    folder.mkdir()
    for i in range(30):
        Image.new("RGB", (8, 8), colour(f"{i}.png")).save(folder / f"{i}.png")
        write_wav(folder / f"{i}.wav", np.full(700, (i + 1) / 100))
        cells = [f"{i}.png", f"{i}.wav", f"{i}.png is text {i}"]
        if i % 3 == 0:
            cells[i // 3 % 3] = ""
        rows.append(",".join([*cells, "val" if i < 6 else "train"]) + "\n")
    (folder / "metadata.csv").write_text("".join(rows))
    return folder


def load(folder):
    return load_caption_dataset(folder, SIZE, FRAMES)


def assert_equal(a, b):
    assert a.captions == b.captions
    for field in ("ids", "images", "waves", "mels"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def check_colours(examples):
    """Check that each image has the colour of the file that its caption names. Return the names."""
    names = [text.split()[0] for text in examples.captions]
    expected = np.array([colour(name) for name in names], np.float32)[:, :, None, None] / 255
    np.testing.assert_allclose(examples.images, expected * np.ones((1, 1, SIZE, SIZE)), atol=1e-6)
    return names


class TestImage:
    def save(self, image, folder, name="x.png", **options):
        image.save(folder / name, **options)
        return folder / name

    @pytest.mark.parametrize(
        ("mode", "value", "expected"),
        [
            ("RGB", (10, 20, 30), (10, 20, 30)),
            ("L", 100, (100, 100, 100)),
            ("1", 1, (255, 255, 255)),
            ("I;16", 40_000, (156, 156, 156)),
            ("RGBA", (200, 100, 50, 128), (100, 50, 25)),
            ("RGBA", (200, 100, 50, 0), (0, 0, 0)),
            ("LA", (200, 128), (100, 100, 100)),
        ],
    )
    def test_modes(self, tmp_path, mode, value, expected):
        actual = read_image(self.save(Image.new(mode, (5, 7), value), tmp_path), 4)
        assert actual.shape == (3, 4, 4) and actual.dtype == np.float32
        assert actual.flags.c_contiguous
        uniform = np.array(expected)[:, None, None] * np.ones((3, 4, 4))
        np.testing.assert_allclose(actual * 255, uniform, atol=1.01)

    def test_colours_of_16_bits(self, tmp_path):
        """Pillow cannot write such a PNG, so this one is written chunk by chunk."""

        def chunk(kind, data):
            data = kind + data
            return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))

        row = b"\0" + struct.pack(">3H", 40_000, 20_000, 257) * 4
        data = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
        data += chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        actual = read_image(tmp_path / "x.png", 4)
        np.testing.assert_allclose(actual[:, 1, 1] * 255, [156, 78, 1], atol=1.01)

    def test_palette(self, tmp_path):
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 30, 60, 90, 200, 200, 200])
        image.paste(2, (4, 0, 8, 8))
        opaque, clear = (
            read_image(self.save(image, tmp_path, f"{i}.png", **options), 8)
            for i, options in enumerate([{}, {"transparency": 2}])
        )
        np.testing.assert_allclose(opaque[:, 4, 0] * 255, [30, 60, 90])
        np.testing.assert_allclose(opaque[:, 4, 7] * 255, 200)
        np.testing.assert_allclose(
            clear[:, 4, 7], 0
        )  # not 200: transparent pixels are blended with black

    @pytest.mark.parametrize(
        ("mode", "value"), [("L", 90), ("RGB", (90, 90, 90)), ("CMYK", (165, 165, 165, 0))]
    )
    def test_jpeg(self, tmp_path, mode, value):
        actual = read_image(self.save(Image.new(mode, (200, 90), value), tmp_path, "x.jpg"), SIZE)
        np.testing.assert_allclose(actual * 255, 90, atol=2)

    @pytest.mark.parametrize(("width", "height"), [(8, 8), (12, 8), (8, 14), (13, 8)])
    def test_the_middle_is_cropped_exactly(self, tmp_path, width, height):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        actual = read_image(self.save(Image.fromarray(pixels), tmp_path), 8) * 255
        x, y = (width - 8) // 2, (height - 8) // 2
        expected = pixels[y : y + 8, x : x + 8].astype(float)
        if width == 13:  # the middle is between two pixels: Keys' cubic kernel at one half
            parts = zip(
                (-1, 9, 9, -1), (pixels[:, i : i + 8] / 16 for i in range(1, 5)), strict=True
            )
            expected = np.clip(sum(weight * part for weight, part in parts), 0, 255)
        np.testing.assert_allclose(actual, expected.transpose(2, 0, 1), atol=0.51)

    @pytest.mark.parametrize("size", [(24, 48), (48, 24), (24, 24), (4, 8), (1, 1)])
    def test_the_shorter_side_is_resized_and_the_middle_cropped(self, tmp_path, size):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        actual = read_image(self.save(Image.fromarray(pixels), tmp_path), 8) * 255
        short = min(size)
        resized = Image.fromarray(pixels).resize(
            (size[0] * 8 // short, size[1] * 8 // short), Image.Resampling.BICUBIC
        )
        x, y = (resized.width - 8) // 2, (resized.height - 8) // 2
        np.testing.assert_allclose(
            actual, np.asarray(resized)[y : y + 8, x : x + 8].transpose(2, 0, 1), atol=1.01
        )

    def test_a_large_jpeg_decoded_at_a_smaller_size_looks_the_same(self, tmp_path):
        """A ramp from left to right, decoded at an eighth of its size, is still the same ramp.

        The middle square has three fifths of the width.
        """
        ramp = np.tile(np.linspace(0, 250, 1000), (600, 1))
        path = self.save(Image.fromarray(ramp.astype(np.uint8)), tmp_path, "x.jpg", quality=95)
        columns = 200 + 600 / 16 * (np.arange(16) + 0.5)
        np.testing.assert_allclose(read_image(path, 16)[0, 8] * 255, columns / 4, atol=2)

    def test_a_jpeg_is_not_decoded_at_a_smaller_size_than_requested(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 1), np.uint8).repeat(3, axis=2)
        path = self.save(Image.fromarray(pixels), tmp_path, "x.jpg", quality=100)
        np.testing.assert_allclose(read_image(path, 40) * 255, pixels.transpose(2, 0, 1), atol=4)

    def test_the_exif_orientation_is_applied(self, tmp_path):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[0] = 255  # the top row, which orientation 6 moves to the right
        exif = Image.Exif()
        exif[0x0112] = 6
        actual = read_image(self.save(Image.fromarray(pixels), tmp_path, exif=exif), 8)
        assert (actual[:, :, 7] == 1).all() and not actual[:, :, :7].any()

    def test_damaged_exif_data_is_ignored(self, tmp_path):
        # Two tags: an orientation, and a pointer that is not a number.
        tags = struct.pack("<3HI2H2H2I", 2, 0x0112, 3, 1, 6, 0, 0xA005, 7, 4, 1)
        exif = b"Exif\0\0II*\0\x08\0\0\0" + tags + bytes(8)
        path = self.save(Image.new("RGB", (8, 8), "white"), tmp_path, "x.jpg", exif=exif)
        with Image.open(path) as image, pytest.raises(struct.error):
            ImageOps.exif_transpose(image)
        assert (read_image(str(path), 8) > 0.98).all()

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
    def test_truncated(self, tmp_path, kind, part):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
            file, kind
        )
        data = file.getvalue()
        (tmp_path / "x").write_bytes(data[: int(part * len(data))])
        message = (
            f"^{tmp_path}/x: not a complete JPEG or PNG image .*; fetch it again, or convert it"
        )
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / "x", SIZE)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("limit", [99, 40])  # Pillow warns of the first, refuses the second
    def test_decompression_bomb(self, tmp_path, monkeypatch, limit):
        path = self.save(Image.new("L", (10, 10)), tmp_path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        read_image(path, SIZE)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"too many pixels .*; make it smaller"):
            read_image(path, SIZE)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UserError, match=r"too many pixels .10 x 10, and at most 99 are read"):
            read_image(path, SIZE, max_pixels=99)

    def test_other_mistakes(self, tmp_path):
        with pytest.raises(
            UserError, match=r"none.jpg: cannot be read .No such file.*; give a JPEG or PNG"
        ):
            read_image(tmp_path / "none.jpg", SIZE)
        with pytest.raises(UserError, match=r"cannot be read .Is a directory"):
            read_image(tmp_path, SIZE)

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (b"GIF89a" + bytes(30), "a GIF image"),
            (b"RIFF\x24\0\0\0WEBPVP8 ", "a WebP image"),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
            (b"<!DOCTYPE html><html>not found", "an HTML page"),
            (b"ID3\4" + bytes(30), "an MP3 sound"),
        ],
    )
    @pytest.mark.parametrize("name", ["x.jpg", "x.PNG", "x"])
    def test_other_files_under_the_name_of_an_image(self, tmp_path, data, kind, name):
        (tmp_path / name).write_bytes(data)
        under = f" under the name {Path(name).suffix}" if name != "x" else ""
        message = f"^{tmp_path}/{name}: {kind}{under}; only JPEG and PNG images are read: .*convert"
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name, SIZE)

    def test_a_png_under_the_name_of_a_jpeg_is_read(self, tmp_path):
        self.save(Image.new("L", (8, 8), 255), tmp_path, "x.png")
        (tmp_path / "x.png").rename(tmp_path / "x.jpg")
        assert (read_image(tmp_path / "x.jpg", SIZE) == 1).all()


def test_read_sound(tmp_path):
    wave = np.arange(SAMPLES + 100, dtype=np.float32) / 32768
    write_wav(tmp_path / "long.wav", wave)
    write_wav(tmp_path / "short.wav", wave[:100])
    np.testing.assert_array_equal(read_sound(tmp_path / "long.wav", FRAMES), wave[:SAMPLES])
    np.testing.assert_array_equal(
        read_sound(tmp_path / "short.wav", FRAMES), np.r_[wave[:100], np.zeros(SAMPLES - 100)]
    )
    with pytest.raises(UserError, match=r"none.wav"):
        read_sound(tmp_path / "none.wav", FRAMES)


class TestBatches:
    def test_images_match_their_captions(self, photos):
        dataset = load(photos)
        assert dataset.modalities == ("text", "image") and dataset.name == str(photos)
        assert len(dataset.train) == 36 and len(dataset.held_out) == 6 and dataset.skipped == 0
        examples = dataset.batch(0, 5, 0)
        assert isinstance(examples, Examples) and examples.waves is None and examples.mels is None
        assert examples.images.shape == (5, 3, SIZE, SIZE) and examples.images.dtype == np.float32
        assert examples.ids.shape == (5,) and examples.ids.dtype == np.int64
        assert set(check_colours(examples)) <= set(TRAIN)

    def test_sounds(self, voices):
        dataset = load(voices)
        assert dataset.modalities == ("text", "audio")
        assert len(dataset.train) == 12 and len(dataset.held_out) == 6
        examples = dataset.batch(0, 5, 0)
        assert examples.images is None
        assert examples.waves.shape == (5, SAMPLES) and examples.waves.dtype == np.float32
        np.testing.assert_array_equal(examples.mels, normalized_log_mel(examples.waves))
        assert examples.mels.shape == (5, 32, FRAMES) and examples.mels.dtype == np.float32
        for text, wave in zip(examples.captions, examples.waves, strict=True):
            i = int(text.split()[1])
            noise = np.random.default_rng(i).uniform(-0.5, 0.5, 500 + 100 * i)
            np.testing.assert_allclose(wave[:500], noise[:500], atol=1e-4)

    @pytest.mark.parametrize("size", [1, 4, 5, 7, 12])
    def test_an_epoch_has_every_caption_and_a_batch_has_no_file_twice(self, photos, size):
        dataset = load(photos)
        steps = -(-36 // size)
        for epoch in range(2):
            batches = [dataset.batch(epoch * steps + i, size, 3) for i in range(steps)]
            count = Counter(text for examples in batches for text in examples.captions)
            assert len(count) == 36
            assert sum(count.values()) == steps * size and max(count.values()) <= 2
            assert all(len(set(examples.ids.tolist())) == size for examples in batches)
        id_by_name = {}
        for examples in batches:
            id_by_name.update(zip(check_colours(examples), examples.ids.tolist(), strict=True))
        # Each image has one id, whatever its caption.
        assert len(id_by_name) == len(set(id_by_name.values())) == 12

    def test_a_batch_larger_than_the_number_of_files_has_duplicate_ids(self, photos):
        examples = load(photos).batch(0, 36, 0)
        assert len(set(examples.captions)) == 36
        assert sorted(Counter(examples.ids.tolist()).values()) == [3] * 12
        names_and_ids = set(zip(check_colours(examples), examples.ids.tolist(), strict=True))
        assert len(names_and_ids) == 12

    def test_files_with_unequal_numbers_of_captions(self, photos):
        with (photos / "x.token").open("a") as file:
            file.write("".join(f"{TRAIN[0]}#9\t{TRAIN[0]} once more {k}\n" for k in range(5)))
        texts = [text for step in range(11) for text in load(photos).batch(step, 4, 0).captions]
        assert len(set(texts)) == 41

    def test_epochs_and_seeds_differ(self, photos):
        dataset = load(photos)
        orders = [
            tuple(dataset.batch(step, 12, seed).captions) for step, seed in ((0, 0), (0, 1), (3, 1))
        ]
        assert len(set(orders)) == 3
        assert len({tuple(text.split()[0] for text in order) for order in orders}) == 3
        # Not all files come with their first caption.
        assert len({text.split()[-1] for text in orders[0]}) > 1

    @pytest.mark.parametrize("folder", ["photos", "voices"])
    def test_a_batch_depends_on_seed_step_and_size_alone(self, request, folder):
        """Batches in order, all but the first prefetched, equal batches out of order."""
        folder = request.getfixturevalue(folder)
        dataset = load(folder)
        in_order = [dataset.batch(step, 5, 1) for step in range(9)]
        for step in (8, 0, 5, 4):
            assert_equal(load(folder).batch(step, 5, 1), in_order[step])
            assert_equal(dataset.batch(step, 5, 1), in_order[step])
        assert load(folder).batch(0, 4, 1).captions == in_order[0].captions[:4]

    def test_the_next_batch_is_prefetched(self, photos, monkeypatch):
        decoded = []

        def recording_read_image(path, size):
            decoded.append(path)
            return read_image(path, size)

        monkeypatch.setattr(module, "read_image", recording_read_image)
        dataset = load(photos)
        dataset.batch(0, 6, 0)
        deadline = time.monotonic() + 5
        while len(decoded) < 12 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(decoded) == 12
        monkeypatch.setattr(module, "read_image", None)  # the next batch decodes no more files
        dataset._prefetch = lambda order: iter(())
        assert len(dataset.batch(1, 6, 0).captions) == 6

    def test_impossible_batch_sizes_are_refused(self, photos):
        dataset = load(photos)
        for size in (37, 0):
            message = f"a batch of {size} cannot be taken from 36 training captions; choose another"
            with pytest.raises(UserError, match=message):
                dataset.batch(0, size, 0)

    def test_the_hash_changes_with_captions_and_their_order(self, photos):
        first = load(photos).sha256
        assert first == load(photos).sha256 and len(first) == 64
        text = (photos / "x.token").read_text()
        for changed in (
            text.replace("in words 2", "in word 2", 1),
            "".join(text.splitlines(keepends=True)[::-1]),
        ):
            (photos / "x.token").write_text(changed)
            assert load(photos).sha256 != first

    def test_a_program_can_exit_while_a_batch_is_prefetched(self, photos):
        """A training loop that fails or ends leaves a batch in the threads."""
        program = (
            "from nanods.data.caption_dataset import load_caption_dataset\n"
            f"load_caption_dataset({str(photos)!r}, 8, 4).batch(0, 12, 0)\n"
            "raise SystemExit(7)\n"
        )
        env = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
        process = subprocess.run([sys.executable, "-c", program], env=env, timeout=60)
        assert process.returncode == 7


class TestGaps:
    def test_what_is_missing_is_marked_and_zero(self, gaps):
        dataset = load(gaps)
        assert dataset.modalities == ("text", "image", "audio") and dataset.has_gaps
        examples = dataset.batch(0, 24, 0)
        assert examples.ids.shape == (24, 2) and examples.images.shape == (24, 3, SIZE, SIZE)
        assert examples.mels.shape == (24, 32, FRAMES) and examples.waves.shape == (24, SAMPLES)
        for name, field in (("image", "images"), ("audio", "waves"), ("audio", "mels")):
            values = getattr(examples, field)
            np.testing.assert_array_equal(examples.present[name], [x.any() for x in values])
        assert examples.present["text"].tolist() == [bool(text) for text in examples.captions]
        assert [int((~has).sum()) for has in examples.present.values()] == [3, 3, 2]
        for i in np.flatnonzero(examples.has("text", "image", "audio")):
            number = int(examples.captions[i].split()[-1])
            expected = np.array(colour(f"{number}.png"))[:, None, None] / 255
            np.testing.assert_allclose(examples.images[i] - expected, 0, atol=1e-6)
            assert abs(examples.waves[i, 0] - (number + 1) / 100) < 1e-4
        ids = duplicate_ids(examples)
        assert ids.shape == (24, 3)
        assert all(len(set(column.tolist())) == 24 for column in ids.T), "gaps are no duplicates"

    def test_some_rows_of_a_batch_and_the_gallery(self, gaps):
        whole, part = load(gaps).batch(3, 10, 1), load(gaps).batch(3, 10, 1, slice(2, 7))
        assert_equal(part, whole.take(slice(2, 7)))
        for name, has in part.present.items():
            np.testing.assert_array_equal(has, whole.present[name][2:7])
        gallery = load(gaps).gallery(6)
        assert len(gallery.captions) == 6 and not gallery.has("text", "image", "audio").all()

    def test_pairs_are_counted(self, gaps):
        counts = load(gaps).pair_counts()
        assert counts == {("text", "image"): 18, ("text", "audio"): 19, ("image", "audio"): 19}
        assert load(gaps).notes()[2:] == [
            "of 24 training examples have text and image 18, text and audio 19, image and audio 19",
            "decoded: 0 of 6 held-out and 24 of 24 training examples, without an error",
        ]

    def test_examples_that_share_an_image_have_one_of_their_ids_in_common(self, gaps):
        (gaps / "metadata.csv").write_text(
            "image,audio,text\n1.png,1.wav,\n1.png,2.wav,\n2.png,1.wav,x\n3.png,,y\n,3.wav,y\n"
        )
        dataset = load(gaps)
        ids = duplicate_ids(dataset.batch(0, len(dataset.train), 0))
        assert len(ids) == 4, "one of 5 is held out"
        everything = np.concatenate([ids, duplicate_ids(dataset.gallery(1))])
        shared = (everything[:, None] == everything).any(axis=-1).sum() - 5
        assert shared == 2 * 3, "one image, one sound, one caption"

    def test_the_hash_changes_with_what_is_missing(self, gaps):
        first = load(gaps).sha256
        table = gaps / "metadata.csv"
        table.write_text(table.read_text().replace("7.png,7.wav", "7.png,"))
        assert load(gaps).sha256 != first

    def test_two_of_three_modalities(self, gaps):
        dataset = load_caption_dataset(gaps, SIZE, FRAMES, modalities=("text", "image"))
        assert dataset.modalities == ("text", "image") and not dataset.has_gaps
        examples = dataset.batch(0, 5, 0)
        assert examples.waves is None and examples.present is None and examples.ids.shape == (5,)
        check_colours(examples)


class TestGallery:
    def test_held_out_examples_are_all_different(self, photos):
        examples = load(photos).gallery(6)
        assert sorted(check_colours(examples)) == sorted(HELD_OUT)
        assert len(set(examples.ids.tolist())) == 6
        training = load(photos).batch(0, 36, 0)
        assert not {text.split()[0] for text in training.captions} & set(HELD_OUT)
        assert not set(examples.ids.tolist()) & set(training.ids.tolist())

    def test_another_folder_can_be_held_out(self, photos, tmp_path):
        Image.new("RGB", (9, 12)).save(write_table(tmp_path / "val") / "a.png")
        dataset = load_caption_dataset(photos, SIZE, FRAMES, tmp_path / "val")
        assert len(dataset.train) == 36 + 12 and dataset.gallery(1).captions == ["black"]
        assert dataset.sha256 != load(photos).sha256

    def test_the_same_at_every_call(self, photos):
        dataset = load(photos)
        first = dataset.gallery(5)
        dataset.batch(0, 4, 0)
        assert_equal(dataset.gallery(5), first)
        assert_equal(load(photos).gallery(5), first)
        assert dataset.gallery(3).captions == first.captions[:3]
        other_seeds = [dataset.gallery(6, seed).captions for seed in range(4)]
        assert len({tuple(texts) for texts in other_seeds}) == 4
        assert len({text for texts in other_seeds for text in texts}) > 6

    def test_sounds(self, voices):
        assert load(voices).gallery(4).mels.shape == (4, 32, FRAMES)

    @pytest.mark.parametrize("size", [7, 0])
    def test_impossible_gallery_sizes_are_refused(self, photos, size):
        message = f"a gallery of {size} cannot be taken from 6 held-out examples; choose another"
        with pytest.raises(UserError, match=message):
            load(photos).gallery(size)


class TestCorruptFiles:
    def test_the_next_caption_replaces_a_corrupt_file(self, photos, capsys):
        good_dataset = load(photos)
        good = [good_dataset.batch(step, 6, 0).captions for step in range(6)]
        bad = good[0][2].split()[0]
        (photos / bad).write_bytes((photos / bad).read_bytes()[:50])
        dataset = load(photos)
        actual = [dataset.batch(step, 6, 0) for step in range(6)]
        order = [text for texts in good for text in texts]
        for step, examples in enumerate(actual):
            following = [text for text in order[6 * step :] + order if text.split()[0] != bad]
            assert examples.captions == following[:6]
            check_colours(examples)
        assert dataset.skipped == 1
        warning = f"warning: skipped {photos / bad}: not a complete JPEG or PNG image"
        assert capsys.readouterr().err.count(warning) == 1
        # Which corrupt files were found before does not matter.
        assert_equal(load(photos).batch(4, 6, 0), actual[4])
        expected = {text for text in order if text.split()[0] != bad}
        assert {text for examples in actual for text in examples.captions} == expected

    def test_a_corrupt_file_is_counted_once_when_it_is_read(self, photos, capsys):
        for name in HELD_OUT[:2]:
            (photos / name).write_bytes(b"")
        dataset = load(photos)
        dataset.batch(0, 12, 0)
        assert dataset.skipped == 0
        assert not set(check_colours(dataset.gallery(4))) & set(HELD_OUT[:2])
        dataset.gallery(4)
        assert dataset.skipped <= 2
        assert len(dataset.gallery(5).ids) == len(dataset.gallery(6).ids) == 4
        assert dataset.skipped == 2 and len(capsys.readouterr().err.splitlines()) == 2

    def test_a_gallery_has_all_held_out_examples_that_can_be_decoded(self, photos, capsys):
        """The same ones whatever was decoded before, in a resumed run and in sample.py."""
        good = load(photos).gallery(6)
        for name in (HELD_OUT[1], HELD_OUT[4]):
            (photos / name).write_bytes((photos / name).read_bytes()[:50])
        dataset = load(photos)
        dataset.batch(3, 6, 0)
        dataset.notes()
        first = dataset.gallery(6)
        kept = [
            i for i, text in enumerate(good.captions) if text.split()[0] in check_colours(first)
        ]
        assert len(kept) == 4 and first.captions == [good.captions[i] for i in kept]
        np.testing.assert_array_equal(first.ids, good.ids[kept])
        assert_equal(dataset.gallery(6), first)
        assert_equal(load(photos).gallery(6), first)
        assert_equal(load(photos).gallery(4), first)

    @pytest.mark.parametrize("good", [0, 1])
    def test_a_gallery_needs_two_that_can_be_decoded(self, photos, good):
        for name in HELD_OUT[good:]:
            (photos / name).write_bytes(b"RIFF____WEBPVP8 ")
        message = (
            f"2 examples are needed at a time, and only {good} can be decoded .{6 - good} corrupt "
            "files, the first: .*a WebP image under the name .png"
        )
        with pytest.raises(UserError, match=message):
            load(photos).gallery(6)

    def test_nothing_is_held_out(self, tmp_path):
        for i in "123":
            write_wav(tmp_path / f"{i}.wav", np.zeros(600))
            (tmp_path / f"{i}.txt").write_text(i)
        with pytest.raises(UserError, match="no example is held out, of 3; add some"):
            load(tmp_path).gallery(0)

    def test_many_corrupt_files_are_counted_and_a_few_named(self, photos, capsys):
        for name in TRAIN[:8]:
            (photos / name).write_bytes(b"")
        dataset = load(photos)
        dataset.batch(0, 4, 0)
        dataset.batch(3, 12, 0)
        lines = capsys.readouterr().err.splitlines()
        assert dataset.skipped == 8 and len(lines) == 6
        assert lines[5] == "warning: further corrupt files are counted, not named"

    def test_a_bad_file_in_a_large_folder_costs_no_more_than_itself(self, photos, monkeypatch):
        """A replacement is decoded, and not the rest of the epoch."""
        dataset = load(photos)
        bad = dataset.batch(0, 4, 0).captions[0].split()[0]
        (photos / bad).write_bytes(b"")
        decoded = []

        def recording_read_image(path, size):
            decoded.append(path)
            return read_image(path, size)

        monkeypatch.setattr(module, "read_image", recording_read_image)
        dataset = load(photos)
        dataset._threads = 2
        dataset.batch(0, 4, 0)
        assert len(set(decoded)) <= 4 + 2 + 4  # the batch, replacements, and the next batch

    def test_notes(self, photos, capsys):
        dataset = load(photos)
        held_out = "held out: 6 of 18 images, by the hash of the file's name"
        assert dataset.notes() == [
            held_out,
            "decoded: 0 of 6 held-out and 12 of 12 training files, without an error",
        ]
        for name in TRAIN[:2] + HELD_OUT[:1]:
            (photos / name).write_bytes(b"GIF89a")
        dataset = load(photos)
        dataset.gallery(6)
        checked = dataset.notes()[1]
        assert checked.startswith(
            "decoded: 6 of 6 held-out and 12 of 12 training files; 3 of them cannot be and are "
            f"skipped, the first: {photos / HELD_OUT[0]}: a GIF image under the name .png"
        )
        assert dataset.notes()[1] == checked
        # What was noted is not warned of again.
        assert len(capsys.readouterr().err.splitlines()) == 1
        dataset.batch(0, 10, 0)
        assert capsys.readouterr().err == ""

    def test_notes_try_some_files_of_a_large_folder(self, photos, monkeypatch):
        monkeypatch.setattr(module, "CHECKED", 5)
        dataset = load(photos)
        checked = "decoded: 0 of 6 held-out and 5 of 12 training files, without an error"
        assert dataset.notes()[1] == dataset.notes()[1] == checked

    def test_a_corrupt_sound(self, voices, capsys):
        bad = SOUNDS[3]
        (voices / bad).write_bytes(b"RIFF")
        dataset = load(voices)
        examples = dataset.batch(0, 11, 0)
        assert dataset.skipped == 1
        assert "noise 3" not in examples.captions and len(set(examples.captions)) == 11
        assert f"warning: skipped {voices / bad}: not a WAV" in capsys.readouterr().err

    def test_a_deleted_file(self, photos, capsys):
        dataset = load(photos)
        (photos / TRAIN[0]).unlink()
        dataset.batch(0, 11, 0)
        assert dataset.skipped == 1 and "cannot be read" in capsys.readouterr().err

    def test_all_files_are_corrupt(self, photos, monkeypatch):
        for name in TRAIN:
            (photos / name).write_bytes(b"<html>")
        dataset = load(photos)
        message = r"1 examples are needed at a time, and only 0 can be decoded .12 corrupt files"
        with pytest.raises(UserError, match=message):
            dataset.batch(0, 1, 0)
        monkeypatch.setattr(module, "read_image", None)  # no file is opened again
        with pytest.raises(UserError, match="12 corrupt files"):
            dataset.batch(1, 1, 0)

    def test_an_error_that_is_not_the_files_fault_is_raised(self, photos, monkeypatch):
        def fail(path, size):
            raise MemoryError

        monkeypatch.setattr(module, "read_image", fail)
        with pytest.raises(MemoryError):
            load(photos).batch(0, 4, 0)
