"""The gallery kept in a run directory is the one that the run evaluated."""

import numpy as np
import pytest

from nanods.data.examples import Examples
from nanods.data.sound import normalized_log_mel
from nanods.errors import UserError
from nanods.training.saved_gallery import FILE, load_gallery, save_gallery, words_of


def test_a_gallery_comes_back_as_the_model_read_it(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 3, 8, 8), np.uint8).astype(np.float32) / np.float32(255)
    waves = random.uniform(-1.5, 1.5, (3, 1024)).astype(np.float32)
    captions = ["a $ caption", "\u4e03", 'with "quotes"\\']
    present = {"text": np.ones(3, bool), "image": np.array([True, False, True])}
    gallery = Examples(
        np.array([4, 2, 9]), captions, images, waves, normalized_log_mel(waves), present
    )
    assert load_gallery(tmp_path) is None
    save_gallery(tmp_path, gallery, "A caption\nwith quotes, \u4e03\u516b")
    examples, words = load_gallery(tmp_path)
    assert words == {"a", "caption", "with", "quotes", "\u4e03", "\u516b"}
    assert examples.captions == captions and examples.ids.tolist() == [4, 2, 9]
    np.testing.assert_array_equal(examples.images, images)
    assert examples.present["image"].tolist() == [True, False, True]
    assert examples.present.keys() == {"text", "image"}
    np.testing.assert_array_equal(examples.mels, gallery.mels)
    np.testing.assert_allclose(examples.waves, np.clip(waves, -1, 1), atol=2**-15)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"damaged .* delete it"):
        load_gallery(tmp_path)


def test_a_gallery_that_cannot_be_written_is_named(tmp_path):
    """And not taken for a file of the data folder, which is elsewhere."""
    (tmp_path / "run").write_text("no folder")
    gallery = Examples(np.array([0]), ["a"])
    with pytest.raises(OSError, match="File exists") as caught:
        save_gallery(tmp_path / "run", gallery, "")
    assert caught.value.filename == str(tmp_path / "run")


def test_words_have_no_case_and_a_script_without_blanks_has_characters():
    text = "The CAFÉ, don't; 42 \u4e00\u53ea\u732b \ud55c\uad6d \u304b\u306a"
    words = ["the", "café", "don", "t", "42", "\u4e00", "\u53ea", "\u732b", "\ud55c\uad6d"]
    assert words_of(text) == [*words, "\u304b", "\u306a"]
