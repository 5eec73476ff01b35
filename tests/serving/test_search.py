"""Search by what a client sends: what is read of it, and which examples are found."""

import io
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
from nanods.serving.search import Gallery, nearest_distance, read_input

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
