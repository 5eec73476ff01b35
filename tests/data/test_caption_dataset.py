"""CaptionDataset: images of every mode and damage, batches that cover an epoch and hang on nothing but their step, skipped files."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from nanods.data import caption_dataset as module
from nanods.data.caption_dataset import load_caption_dataset, read_image, read_sound
from nanods.data.examples import Examples
from nanods.data.sound import HOP, WINDOW, normalized_log_mel, write_wav
from nanods.errors import UserError

SIDE, FRAMES = 8, 4
SAMPLES = WINDOW + (FRAMES - 1) * HOP


def numbered(end, held_out, count):
    """The first `count` names like 7.png that their hash holds out, or does not."""
    names = (f"{i}.{end}" for i in range(1000))
    return [name for name in names if (hashlib.sha256(name.encode()).digest()[0] < 13) == held_out][
        :count
    ]


TRAIN, HELD = numbered("png", False, 12), numbered("png", True, 6)
SPOKEN = numbered("wav", False, 12) + numbered("wav", True, 6)


def colour(name):
    """A colour of its own for each image."""
    i = int(name.split(".")[0])
    return (i % 20 * 12, i // 20 * 12, 7)


@pytest.fixture
def photos(tmp_path):
    """Twelve images to train on with three captions each, six held out with two; every one in the colour of its number."""
    rows = [(name, f"{name} in words {k}") for k in range(3) for name in TRAIN]
    rows += [(name, f"{name} in words {k}") for name in HELD for k in range(2)]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.token").write_text(
        "".join(f"{name}#0\t{text}\n" for name, text in rows)
    )
    for name in TRAIN + HELD:
        Image.new("RGB", (9, 12), colour(name)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def voices(tmp_path):
    (tmp_path / "voices").mkdir()
    for i, name in enumerate(SPOKEN):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, 500 + 100 * i)
        write_wav(tmp_path / "voices" / name, noise)
        (tmp_path / "voices" / name.replace("wav", "txt")).write_text(f"noise {i}")
    return tmp_path / "voices"


def load(folder):
    return load_caption_dataset(folder, SIDE, FRAMES)


def equal(a, b):
    assert a.captions == b.captions
    for field in ("ids", "images", "waves", "mels"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def agree(items):
    """Every image has the colour of the number that its caption names."""
    names = [text.split()[0] for text in items.captions]
    expected = np.array([colour(name) for name in names], np.float32)[:, :, None, None] / 255
    np.testing.assert_allclose(items.images, expected * np.ones((1, 1, SIDE, SIDE)), atol=1e-6)
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
        got = read_image(self.save(Image.new(mode, (5, 7), value), tmp_path), 4)
        assert got.shape == (3, 4, 4) and got.dtype == np.float32 and got.flags.c_contiguous
        np.testing.assert_allclose(
            got * 255, np.array(expected)[:, None, None] * np.ones((3, 4, 4)), atol=1.01
        )

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
        np.testing.assert_allclose(clear[:, 4, 7], 0)  # not 200: alpha lies over black

    @pytest.mark.parametrize(
        ("mode", "value"), [("L", 90), ("RGB", (90, 90, 90)), ("CMYK", (165, 165, 165, 0))]
    )
    def test_jpeg(self, tmp_path, mode, value):
        got = read_image(self.save(Image.new(mode, (200, 90), value), tmp_path, "x.jpg"), SIDE)
        np.testing.assert_allclose(got * 255, 90, atol=2)

    @pytest.mark.parametrize(("width", "height"), [(8, 8), (12, 8), (8, 14), (13, 8)])
    def test_the_middle_is_cut_out_exactly(self, tmp_path, width, height):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        got = read_image(self.save(Image.fromarray(pixels), tmp_path), 8) * 255
        x, y = (width - 8) // 2, (height - 8) // 2
        expected = pixels[y : y + 8, x : x + 8].astype(float)
        if width == 13:  # the middle lies between two pixels: Keys' cubic, half-way
            parts = zip(
                (-1, 9, 9, -1), (pixels[:, i : i + 8] / 16 for i in range(1, 5)), strict=True
            )
            expected = np.clip(sum(weight * part for weight, part in parts), 0, 255)
        np.testing.assert_allclose(got, expected.transpose(2, 0, 1), atol=0.51)

    @pytest.mark.parametrize("size", [(24, 48), (48, 24), (24, 24), (4, 8), (1, 1)])
    def test_the_shorter_side_is_resized_then_the_middle_cut_out(self, tmp_path, size):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        got = read_image(self.save(Image.fromarray(pixels), tmp_path), 8) * 255
        short = min(size)
        whole = Image.fromarray(pixels).resize(
            (size[0] * 8 // short, size[1] * 8 // short), Image.Resampling.BICUBIC
        )
        x, y = (whole.width - 8) // 2, (whole.height - 8) // 2
        np.testing.assert_allclose(
            got, np.asarray(whole)[y : y + 8, x : x + 8].transpose(2, 0, 1), atol=1.01
        )

    def test_a_large_jpeg_shows_the_same(self, tmp_path):
        """A ramp from left to right, decoded at an eighth, is the ramp still, of three fifths of the width."""
        ramp = np.tile(np.linspace(0, 250, 1000), (600, 1))
        path = self.save(Image.fromarray(ramp.astype(np.uint8)), tmp_path, "x.jpg", quality=95)
        columns = 200 + 600 / 16 * (np.arange(16) + 0.5)
        np.testing.assert_allclose(read_image(path, 16)[0, 8] * 255, columns / 4, atol=2)

    def test_a_jpeg_is_not_decoded_coarser_than_it_is_wanted(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 1), np.uint8).repeat(3, axis=2)
        path = self.save(Image.fromarray(pixels), tmp_path, "x.jpg", quality=100)
        np.testing.assert_allclose(read_image(path, 40) * 255, pixels.transpose(2, 0, 1), atol=4)

    def test_upright_as_the_camera_was_held(self, tmp_path):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[0] = 255  # the upper row, which orientation 6 puts on the right
        exif = Image.Exif()
        exif[0x0112] = 6
        got = read_image(self.save(Image.fromarray(pixels), tmp_path, exif=exif), 8)
        assert (got[:, :, 7] == 1).all() and not got[:, :, :7].any()

    def test_a_broken_note_on_a_whole_image(self, tmp_path):
        tags = struct.pack(
            "<3HI2H2H2I", 2, 0x0112, 3, 1, 6, 0, 0xA005, 7, 4, 1
        )  # turned, and a place that is no number
        exif = b"Exif\0\0II*\0\x08\0\0\0" + tags + bytes(8)
        path = self.save(Image.new("RGB", (8, 8), "white"), tmp_path, "x.jpg", exif=exif)
        with Image.open(path) as image, pytest.raises(struct.error):
            ImageOps.exif_transpose(image)
        assert (read_image(str(path), 8) > 0.98).all()

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
    def test_cut_off(self, tmp_path, kind, part):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
            file, kind
        )
        data = file.getvalue()
        (tmp_path / "x").write_bytes(data[: int(part * len(data))])
        with pytest.raises(
            UserError,
            match=f"^{tmp_path}/x: not a complete JPEG or PNG image .*; fetch it again, or convert it",
        ):
            read_image(tmp_path / "x", SIDE)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("most", [99, 40])  # Pillow warns of the first, and refuses the second
    def test_bomb(self, tmp_path, monkeypatch, most):
        path = self.save(Image.new("L", (10, 10)), tmp_path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        read_image(path, SIDE)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(UserError, match=r"not a complete JPEG or PNG image .*pixels"):
            read_image(path, SIDE)

    def test_other_mistakes(self, tmp_path):
        with pytest.raises(
            UserError, match=r"none.jpg: cannot be read .No such file.*; give a JPEG or PNG"
        ):
            read_image(tmp_path / "none.jpg", SIDE)
        with pytest.raises(UserError, match=r"cannot be read .Is a directory"):
            read_image(tmp_path, SIDE)
        with pytest.raises(UserError, match="not a complete JPEG or PNG"):
            read_image(self.save(Image.new("L", (8, 8)), tmp_path, "x.gif"), SIDE)


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
    def test_images_and_captions_belong_together(self, photos):
        pairs = load(photos)
        assert pairs.modalities == ("text", "image") and pairs.name == str(photos)
        assert len(pairs.train) == 36 and len(pairs.held_out) == 6 and pairs.skipped == 0
        items = pairs.batch(0, 5, 0)
        assert isinstance(items, Examples) and items.waves is None and items.mels is None
        assert items.images.shape == (5, 3, SIDE, SIDE) and items.images.dtype == np.float32
        assert items.ids.shape == (5,) and items.ids.dtype == np.int64
        assert set(agree(items)) <= set(TRAIN)

    def test_sounds(self, voices):
        pairs = load(voices)
        assert (
            pairs.modalities == ("text", "audio")
            and len(pairs.train) == 12
            and len(pairs.held_out) == 6
        )
        items = pairs.batch(0, 5, 0)
        assert (
            items.images is None
            and items.waves.shape == (5, SAMPLES)
            and items.waves.dtype == np.float32
        )
        np.testing.assert_array_equal(items.mels, normalized_log_mel(items.waves))
        assert items.mels.shape == (5, 32, FRAMES) and items.mels.dtype == np.float32
        for text, wave in zip(items.captions, items.waves, strict=True):
            i = int(text.split()[1])
            noise = np.random.default_rng(i).uniform(-0.5, 0.5, 500 + 100 * i)
            np.testing.assert_allclose(wave[:500], noise[:500], atol=1e-4)

    @pytest.mark.parametrize("size", [1, 4, 5, 7, 12])
    def test_an_epoch_has_every_caption_and_a_batch_nothing_twice(self, photos, size):
        pairs = load(photos)
        steps = -(-36 // size)
        for epoch in range(2):
            batches = [pairs.batch(epoch * steps + i, size, 3) for i in range(steps)]
            count = Counter(text for items in batches for text in items.captions)
            assert (
                len(count) == 36
                and sum(count.values()) == steps * size
                and max(count.values()) <= 2
            )
            assert all(len(set(items.ids.tolist())) == size for items in batches)
        names = {
            name: thing
            for items in batches
            for name, thing in zip(agree(items), items.ids.tolist(), strict=True)
        }
        assert (
            len(names) == len(set(names.values())) == 12
        )  # a number for each image, whatever its caption

    def test_more_than_there_are_things_has_twins(self, photos):
        items = load(photos).batch(0, 36, 0)
        assert (
            len(set(items.captions)) == 36
            and sorted(Counter(items.ids.tolist()).values()) == [3] * 12
        )
        assert (
            len(
                {
                    (name, thing)
                    for name, thing in zip(agree(items), items.ids.tolist(), strict=True)
                }
            )
            == 12
        )

    def test_unequal_captions(self, photos):
        with (photos / "x.token").open("a") as file:
            file.write("".join(f"{TRAIN[0]}#9\t{TRAIN[0]} once more {k}\n" for k in range(5)))
        texts = [text for step in range(11) for text in load(photos).batch(step, 4, 0).captions]
        assert len(set(texts)) == 41

    def test_epochs_and_seeds_differ(self, photos):
        pairs = load(photos)
        orders = [
            tuple(pairs.batch(step, 12, seed).captions) for step, seed in ((0, 0), (0, 1), (3, 1))
        ]
        assert len(set(orders)) == 3
        assert len({tuple(text.split()[0] for text in order) for order in orders}) == 3
        assert len({text.split()[-1] for text in orders[0]}) > 1  # not all with their first caption

    @pytest.mark.parametrize("folder", ["photos", "voices"])
    def test_fixed_by_seed_step_and_size(self, request, folder):
        """In order, so that all but the first were decoded ahead; and out of order, each by a data set of its own."""
        folder = request.getfixturevalue(folder)
        pairs = load(folder)
        ahead = [pairs.batch(step, 5, 1) for step in range(9)]
        for step in (8, 0, 5, 4):
            equal(load(folder).batch(step, 5, 1), ahead[step])
            equal(pairs.batch(step, 5, 1), ahead[step])
        assert load(folder).batch(0, 4, 1).captions == ahead[0].captions[:4]

    def test_the_next_batch_is_decoded_ahead(self, photos, monkeypatch):
        seen = []
        monkeypatch.setattr(
            module, "read_image", lambda path, side: seen.append(path) or read_image(path, side)
        )
        pairs = load(photos)
        pairs.batch(0, 6, 0)
        end = time.monotonic() + 5
        while len(seen) < 12 and time.monotonic() < end:
            time.sleep(0.001)
        assert len(seen) == 12
        monkeypatch.setattr(module, "read_image", None)  # nothing is left to be decoded here
        pairs._prefetch = lambda order: iter(())
        assert len(pairs.batch(1, 6, 0).captions) == 6

    def test_mistakes(self, photos):
        pairs = load(photos)
        for size in (37, 0):
            with pytest.raises(
                UserError,
                match=f"a batch of {size} cannot be taken from 36 training captions; choose another",
            ):
                pairs.batch(0, size, 0)

    def test_the_fingerprint(self, photos):
        first = load(photos).sha256
        assert first == load(photos).sha256 and len(first) == 64
        text = (photos / "x.token").read_text()
        for changed in (
            text.replace("in words 2", "in word 2", 1),
            "".join(text.splitlines(keepends=True)[::-1]),
        ):
            (photos / "x.token").write_text(changed)
            assert load(photos).sha256 != first

    def test_a_program_ends_though_a_batch_is_under_way(self, photos):
        """A training loop that fails or is done leaves a batch being decoded."""
        program = f"from nanods.data.caption_dataset import load_caption_dataset; load_caption_dataset({str(photos)!r}, 8, 4).batch(0, 12, 0); raise SystemExit(7)"
        environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
        assert (
            subprocess.run([sys.executable, "-c", program], env=environment, timeout=60).returncode
            == 7
        )


class TestGallery:
    def test_held_out_things_all_different(self, photos):
        items = load(photos).gallery(6)
        assert sorted(agree(items)) == sorted(HELD) and len(set(items.ids.tolist())) == 6
        assert not {text.split()[0] for text in load(photos).batch(0, 36, 0).captions} & set(HELD)
        assert not set(items.ids.tolist()) & set(load(photos).batch(0, 36, 0).ids.tolist())

    def test_the_same_at_every_call(self, photos):
        pairs = load(photos)
        first = pairs.gallery(5)
        pairs.batch(0, 4, 0)
        equal(pairs.gallery(5), first)
        equal(load(photos).gallery(5), first)
        assert pairs.gallery(3).captions == first.captions[:3]
        others = [pairs.gallery(6, seed).captions for seed in range(4)]
        assert (
            len({tuple(texts) for texts in others}) == 4
            and len({text for texts in others for text in texts}) > 6
        )

    def test_sounds(self, voices):
        assert load(voices).gallery(4).mels.shape == (4, 32, FRAMES)

    @pytest.mark.parametrize("size", [7, 0])
    def test_mistakes(self, photos, size):
        with pytest.raises(
            UserError,
            match=f"a gallery of {size} cannot be taken from 6 held-out examples; choose another",
        ):
            load(photos).gallery(size)


class TestCorruptFiles:
    def test_the_next_takes_its_place(self, photos, capsys):
        whole = load(photos)
        clean = [whole.batch(step, 6, 0).captions for step in range(6)]
        bad = clean[0][2].split()[0]
        (photos / bad).write_bytes((photos / bad).read_bytes()[:50])
        pairs = load(photos)
        got = [pairs.batch(step, 6, 0) for step in range(6)]
        circle = [text for texts in clean for text in texts]
        for step, items in enumerate(got):
            following = [text for text in circle[6 * step :] + circle if text.split()[0] != bad]
            assert items.captions == following[:6]
            agree(items)
        assert pairs.skipped == 1
        assert (
            capsys.readouterr().err.count(
                f"warning: skipped {photos / bad}: not a complete JPEG or PNG image"
            )
            == 1
        )
        equal(load(photos).batch(4, 6, 0), got[4])  # whatever was met before
        assert {text for items in got for text in items.captions} == {
            text for text in circle if text.split()[0] != bad
        }

    def test_counted_once_it_is_met(self, photos, capsys):
        for name in HELD[:2]:
            (photos / name).write_bytes(b"")
        pairs = load(photos)
        pairs.batch(0, 12, 0)
        assert pairs.skipped == 0
        assert not set(agree(pairs.gallery(4))) & set(HELD[:2])
        pairs.gallery(4)
        assert pairs.skipped <= 2
        with pytest.raises(
            UserError,
            match=r"5 examples are needed at a time, and only 4 .*2 corrupt files, the first: .*png: not",
        ):
            pairs.gallery(5)
        assert pairs.skipped == 2 and len(capsys.readouterr().err.splitlines()) == 2

    def test_a_sound(self, voices, capsys):
        bad = SPOKEN[3]
        (voices / bad).write_bytes(b"RIFF")
        pairs = load(voices)
        items = pairs.batch(0, 11, 0)
        assert (
            pairs.skipped == 1
            and "noise 3" not in items.captions
            and len(set(items.captions)) == 11
        )
        assert f"warning: skipped {voices / bad}: not a WAV" in capsys.readouterr().err

    def test_a_file_that_went_away(self, photos, capsys):
        pairs = load(photos)
        (photos / TRAIN[0]).unlink()
        pairs.batch(0, 11, 0)
        assert pairs.skipped == 1 and "cannot be read" in capsys.readouterr().err

    def test_all(self, photos, monkeypatch):
        for name in TRAIN:
            (photos / name).write_bytes(b"<html>")
        pairs = load(photos)
        with pytest.raises(
            UserError,
            match=r"1 examples are needed at a time, and only 0 can be decoded .12 corrupt files",
        ):
            pairs.batch(0, 1, 0)
        monkeypatch.setattr(module, "read_image", None)
        with pytest.raises(UserError, match="12 corrupt files"):  # and none is opened again
            pairs.batch(1, 1, 0)

    def test_what_is_no_fault_of_a_file_is_not_hidden(self, photos, monkeypatch):
        def fail(path, side):
            raise MemoryError

        monkeypatch.setattr(module, "read_image", fail)
        with pytest.raises(MemoryError):
            load(photos).batch(0, 4, 0)
