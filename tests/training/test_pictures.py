"""What the pictures of V3 show of real data: labels, two modalities, equal captions."""

from dataclasses import replace

import numpy as np
import pytest

from nanods.data.examples import Examples
from nanods.training.pictures import draw_neighbours, first_of_each

LABELS = ["cat", "dog", "boat", "tree", "kite", "bell"]


def make_gallery(modalities, captions):
    """Return examples of these captions, and embeddings in which captions are far apart."""
    B = len(captions)
    images = np.zeros((B, 3, 4, 4), np.float32) if "image" in modalities else None
    mels = np.zeros((B, 4, 4), np.float32) if "audio" in modalities else None
    points = np.eye(len(LABELS))[[LABELS.index(caption.lower()) for caption in captions]]
    embeddings = {name: points for name in modalities}
    return embeddings, Examples(np.arange(B), captions, images=images, mels=mels)


@pytest.mark.parametrize(
    ("modalities", "to_text"),
    [
        (("text", "image"), 2),
        (("text", "audio"), 2),
        (("image", "audio"), 0),
        (("text", "image", "audio"), 0),
    ],
)
def test_neighbours_of_labels_have_four_queries_of_different_labels(modalities, to_text):
    captions = ["cat", "cat", "Cat", "dog", "dog", "boat", "tree", "kite", "bell"]
    figure = draw_neighbours(*make_gallery(modalities, captions))
    assert len(figure.axes) == 4 * 6
    queries, texts = [], 0
    for row in np.array(figure.axes).reshape(4, 6):
        inside = [axes.texts[0].get_text() if axes.texts else "" for axes in row]
        queries.append((inside[0] or row[0].get_xlabel()).lower())
        found = [text for text in inside[1:] if text]
        texts += bool(found)
        assert len({text.lower() for text in found}) == len(found), "equal captions stand once"
        assert "true match" in row[1].get_title()
    assert queries == ["cat", "dog", "boat", "tree"] and texts == to_text


def test_neighbours_of_two_captions_have_two_queries():
    figure = draw_neighbours(*make_gallery(("text", "image"), ["cat", "dog", "cat"]))
    assert len(figure.axes) == 2 * (1 + 3)


def test_neighbours_are_examples_that_have_both_modalities():
    """Of images and sounds of the same labels, as in folders of classes: no example has both."""
    embeddings, gallery = make_gallery(("text", "image", "audio"), [*LABELS, *LABELS])
    has_image = np.arange(12) < 6
    present = {"text": np.arange(12) > 0, "image": has_image, "audio": ~has_image}
    figure = draw_neighbours(embeddings, replace(gallery, present=present))
    assert len(figure.axes) == 4 * 6, "two queries for images, two for sounds"
    queries = [axes.texts[0].get_text() for axes in np.array(figure.axes).reshape(4, 6)[:, 0]]
    assert queries == ["dog", "boat", "cat", "tree"]


def test_first_of_each():
    assert first_of_each(np.array(["b", "a", "b", "c", "a"])).tolist() == [0, 1, 3]
