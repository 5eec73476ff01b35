"""Scenes: scene ids and their split, random numbers, and decoders for every modality."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanods.config import PRESETS
from nanods.data import scenes as scenes_module
from nanods.data.random_bits import GOLDEN, mix_bits, noise, random_bits, uniform
from nanods.data.scenes import (
    COLOURS,
    OVERTONES,
    PITCHES,
    RELATIONS,
    SCENE_COUNT,
    SENTENCES,
    SHAPES,
    SIZES,
    SWAPPED,
    WORDS,
    WORDS_TO_IT,
    batch,
    caption,
    facts_of,
    family_and_pair,
    gallery,
    render,
    render_captions,
    render_images,
    render_waves,
    scene_ids_of,
    split,
    training_scene_ids,
    vocabulary,
)
from nanods.data.sound import RATE
from tests.data.decoders import decode_caption, decode_image, decode_sound, outlines

ALL_SCENES = np.arange(SCENE_COUNT)
SAMPLE = (random_bits(600, 12345)[0] % SCENE_COUNT).astype(np.int64)  # training and held-out scenes


def arrays(scenes):
    """Return the fields of scenes as arrays, without the mask of missing modalities: none is."""
    assert scenes.present is None
    values = [getattr(scenes, name) for name in ("ids", "captions", "images", "waves", "mels")]
    return [value if isinstance(value, np.ndarray) else np.array(value) for value in values]


def fingerprint(scenes):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays(scenes))).hexdigest()


def mirror_images(scene_ids):
    """Return the ids of the scenes in which the two objects have changed places."""
    return scene_ids_of(facts_of(scene_ids)[:, SWAPPED])


class TestSceneIds:
    def test_facts_of_and_scene_ids_of_are_inverse_on_all_scenes(self):
        facts = facts_of(ALL_SCENES)
        assert SCENE_COUNT == 18_240 == len(np.unique(facts, axis=0))
        assert (facts.min(axis=0) == 0).all()
        assert facts.max(axis=0).tolist() == [5, 7, 1, 1, 5, 7, 1]
        assert (facts[:, :3] != facts[:, 4:]).any(axis=1).all()
        np.testing.assert_array_equal(scene_ids_of(facts), ALL_SCENES)

    def test_both_descriptions_of_a_scene_have_the_same_id(self):
        reversed_facts = facts_of(ALL_SCENES)[:, SWAPPED] + np.array([0, 0, 0, 2, 0, 0, 0])
        np.testing.assert_array_equal(scene_ids_of(reversed_facts), ALL_SCENES)

    def test_a_mirror_image_is_another_scene(self):
        assert (mirror_images(ALL_SCENES) != ALL_SCENES).all()

    @pytest.mark.parametrize("wrong", [-1, SCENE_COUNT])
    def test_invalid_scene_ids_are_refused(self, wrong):
        for function in (
            facts_of,
            lambda ids: render_images(ids, 0),
            lambda ids: render_captions(ids, 0),
            lambda ids: render_waves(ids, 0),
        ):
            with pytest.raises(ValueError, match="from 0"):
                function(np.array([0, wrong]))

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ([0, 0, 0, 0, 0, 0, 0], "must differ"),
            ([6, 0, 0, 0, 0, 0, 0], "indices below"),
            ([0, 0, 0, 4, 0, 0, 1], "indices below"),
            ([0, -1, 0, 0, 0, 0, 1], "indices below"),
        ],
    )
    def test_invalid_facts_are_refused(self, facts, message):
        with pytest.raises(ValueError, match=message):
            scene_ids_of(np.array([facts]))


class TestSplit:
    def test_every_scene_is_in_exactly_one_split(self):
        train, held_out = split()
        assert (len(train), len(held_out)) == (16_416, 1_824)
        np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), ALL_SCENES)

    def test_the_split_does_not_change(self):
        """Results of earlier runs hold for this gallery only."""
        assert split()[1][:6].tolist() == [17680, 10872, 9553, 10390, 14125, 591]

    def test_each_fact_is_equally_frequent_in_both_splits(self):
        train, held_out = (facts_of(part) for part in split())
        for i, count in enumerate((6, 8, 2, 2, 6, 8, 2)):
            train_share = np.bincount(train[:, i], minlength=count) / len(train)
            held_out_share = np.bincount(held_out[:, i], minlength=count) / len(held_out)
            assert abs(train_share - held_out_share).max() < 0.03

    def test_no_training_batch_has_a_held_out_scene(self):
        _, held_out = split()
        for seed in (0, 1, 99):
            drawn = np.concatenate([training_scene_ids(step, 128, seed) for step in range(300)])
            assert not np.isin(drawn, held_out).any()

    def test_a_batch_has_no_duplicates_and_an_epoch_has_all_scenes(self):
        steps = [training_scene_ids(step, 128, seed=3) for step in range(2 * 128)]
        assert all(len(np.unique(step)) == 128 for step in steps)
        first, second = np.concatenate(steps[:128]), np.concatenate(steps[128:])
        # The remaining 32 of 16,416 do not fill a batch.
        assert len(np.unique(first)) == len(np.unique(second)) == 128 * 128
        assert (first != second).any()
        np.testing.assert_array_equal(np.sort(training_scene_ids(7, 16_416)), np.sort(split()[0]))

    def test_scenes_of_a_family_differ_only_in_shapes_and_order(self):
        family, pair = family_and_pair(ALL_SCENES)
        facts = facts_of(ALL_SCENES)
        # Colour and size of each object, in any order.
        looks = np.sort(facts[:, [1, 5]] * 2 + facts[:, [2, 6]], axis=1)
        shared_facts = np.column_stack([looks, facts[:, 3]])
        n_families = len(np.unique(family))
        assert n_families == len(np.unique(shared_facts, axis=0))
        both = np.column_stack([family[:, None], shared_facts])
        assert n_families == len(np.unique(both, axis=0))
        np.testing.assert_array_equal(family_and_pair(mirror_images(ALL_SCENES))[1], pair)
        assert (np.bincount(pair)[pair] == 2).all()  # a scene and its mirror image, no third scene

    @pytest.mark.parametrize(("hard", "low", "high"), [(True, 0.95, 1.0), (False, 0.0, 0.05)])
    def test_a_hard_batch_has_mirror_images(self, hard, low, high):
        """Of the scenes whose mirror image is a training scene too.

        The end of a batch cuts a few groups."""
        train, shares = split()[0], []
        for step in range(20):
            scene_ids = training_scene_ids(step, 128, 0, hard)
            mirrored = mirror_images(scene_ids)
            shares.append(np.isin(mirrored, scene_ids)[np.isin(mirrored, train)].mean())
        assert low <= np.mean(shares) <= high

    def test_the_gallery(self):
        examples = gallery()
        assert len(np.unique(examples.ids)) == len(examples.ids) == 512
        assert np.isin(examples.ids, split()[1]).all()
        assert fingerprint(examples) == fingerprint(gallery())
        np.testing.assert_array_equal(gallery(5).waves, examples.waves[:5])
        unique_images = np.unique(examples.images.reshape(512, -1), axis=0)
        assert len(examples.images) == len(unique_images)

    @pytest.mark.parametrize("size", [0, -1, 1_825])
    def test_impossible_gallery_sizes_are_refused(self, size):
        with pytest.raises(ValueError, match="1,824 scenes are held out"):
            gallery(size)

    @pytest.mark.parametrize("size", [0, -1, 16_417])
    def test_impossible_batch_sizes_are_refused(self, size):
        with pytest.raises(ValueError, match="1 to 16,416 scenes"):
            batch(0, size)


class TestRandomNumbers:
    def test_the_same_in_any_process_and_any_order(self):
        script = (
            "from nanods.data.scenes import batch, gallery\n"
            "from tests.data.test_scenes import fingerprint\n"
            "gallery(3)\n"
            "print([fingerprint(batch(step, 5, 2)) for step in (4, 0, 10**6)],"
            " fingerprint(gallery(4)))"
        )
        expected = [fingerprint(batch(step, 5, 2)) for step in (10**6, 0, 4)][::-1]
        for hashseed in ("1", "77"):
            env = os.environ | {
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "PYTHONHASHSEED": hashseed,
            }
            process = subprocess.run(
                [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
            )
            assert process.stdout == f"{expected} {fingerprint(gallery(4))}\n"

    def test_an_example_does_not_depend_on_its_batch(self):
        at_once = render(SAMPLE[:50], np.arange(50), seed=1)
        for rows in (np.arange(50)[::-1], np.array([17]), np.arange(3, 20)):
            part = render(SAMPLE[rows], rows, seed=1)
            for a, b in zip(arrays(part), arrays(at_once), strict=True):
                np.testing.assert_array_equal(a, b[rows])

    def test_seeds_steps_and_variants_differ(self):
        fingerprints = {fingerprint(batch(step, 4, seed)) for step in range(5) for seed in range(5)}
        assert len(fingerprints) == 25
        variants = render(np.full(200, 77), np.arange(200))
        for array in (variants.images, variants.waves, variants.mels):
            assert len(np.unique(array.reshape(200, -1), axis=0)) == 200
        assert len(set(variants.captions)) > 150
        assert not np.array_equal(render(SAMPLE[:9], 0, 1).images, render(SAMPLE[:9], 0, 2).images)

    def test_mix_bits_is_splitmix64(self):
        """splitmix64's published sequence from seed 0."""
        assert hex(int(mix_bits(np.array([GOLDEN], np.uint64))[0])) == "0xe220a8397b1dcdaf"

    def test_bits_and_uniform_numbers_are_even(self):
        bits = random_bits(1000, 5, np.arange(20))
        ones = np.unpackbits(bits.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 0.005 and len(np.unique(bits)) == bits.size
        fractions = uniform(1000, 5, np.arange(20))
        assert fractions.min() >= 0 and fractions.max() < 1 and abs(fractions.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(fractions)[~np.eye(20, dtype=bool)]).max() < 0.15
        hiss = noise(8000, 5, np.arange(3))
        assert hiss.min() == -1 and hiss.max() == 1 and abs(hiss.mean()) < 0.02

    @pytest.mark.parametrize(
        "call",
        [lambda: batch(-1, 4), lambda: batch(0, 4, -1), lambda: render_images(SAMPLE, -SAMPLE - 1)],
    )
    def test_negative_numbers_are_refused(self, call):
        with pytest.raises(ValueError, match="from 0 up"):
            call()


class TestEveryModalityShowsEveryFact:
    """The decoders know palette, pitches, words and outlines; the generator's noise is on."""

    def accuracy(self, decode, data):
        decoded = scene_ids_of(np.array([decode(example) for example in data]))
        return (decoded == SAMPLE).mean()

    def test_captions(self):
        facts = [decode_caption(text) for text in render_captions(ALL_SCENES, 2, seed=4)]
        np.testing.assert_array_equal(scene_ids_of(np.array(facts)), ALL_SCENES)

    def test_images(self):
        templates = outlines()
        images = render_images(SAMPLE, 8, seed=4)
        assert self.accuracy(lambda image: decode_image(image, templates), images) >= 0.99

    def test_sounds(self):
        assert self.accuracy(decode_sound, render_waves(SAMPLE, 8, seed=4)) >= 0.99

    def test_objects_above_each_other_sound_in_both_orders(self):
        above = scene_ids_of(np.array([[0, 0, 0, 1, 1, 1, 1]]))
        waves = render_waves(above.repeat(20), np.arange(20))
        relations = {RELATIONS[decode_sound(wave)[3]] for wave in waves}
        assert relations == {"above", "below"}

    def test_all_words_and_sentences_occur(self):
        text = "\n".join(render_captions(SAMPLE, 1))
        phrases = list(COLOURS)
        for table in (WORDS, WORDS_TO_IT):
            for synonyms in table.values():
                phrases += synonyms
        for phrase in phrases:
            assert phrase in text
        for sentence in (
            r"there is",
            r"^(on|to) the left of .* is",
            r" has .* to its right",
            r"^(a|the|one) .* is below ",
        ):
            assert re.search(sentence, text, re.MULTILINE), sentence


class TestShapesAndRanges:
    def test_a_batch(self):
        scenes = batch(2, 33, seed=1)
        types = [
            (array.shape[1:], array.dtype) for array in arrays(scenes) if array.dtype.kind != "U"
        ]
        f = np.dtype(np.float32)
        expected = [((), np.dtype(np.int64)), ((3, 32, 32), f), ((8448,), f), ((32, 32), f)]
        assert types == expected and all(len(array) == 33 for array in arrays(scenes))
        np.testing.assert_array_equal(scenes.ids, training_scene_ids(2, 33, 1))
        assert scenes.images.min() >= 0 and scenes.images.max() <= 1
        assert abs(scenes.waves).max() <= 1 and np.isfinite(scenes.mels).all()

    def test_normalized_log_mel_has_mean_near_0_and_std_near_1(self):
        mels = batch(0, 128).mels
        assert abs(mels.mean()) < 0.2 and 0.8 < mels.std() < 1.2

    def test_objects_are_inside_the_image_and_apart(self, monkeypatch):
        """Without noise: a margin of a pixel, and a stripe of background between the objects.

        The threshold ignores faint pixels at the corners of shapes.
        """
        monkeypatch.setattr(
            scenes_module, "noise", lambda count, *key: np.zeros((len(SAMPLE), count), np.float32)
        )
        images = render_images(SAMPLE, 3)
        masks = abs(images - images[:, :, :1, :1]).max(axis=1) > 0.15  # (B, 32, 32)
        assert not masks[:, [0, 31]].any()
        for mask, is_horizontal in zip(masks, facts_of(SAMPLE)[:, 3] == 0, strict=True):
            filled = np.flatnonzero(mask.any(axis=0 if is_horizontal else 1))
            assert (np.diff(filled) > 1).sum() == 1

    def test_sounds_end_before_the_wave_does(self, monkeypatch):
        monkeypatch.setattr(
            scenes_module, "noise", lambda count, *key: np.zeros((len(SAMPLE), count), np.float32)
        )
        waves = render_waves(SAMPLE, 3)
        assert abs(waves[:, :80]).max() == 0
        assert abs(waves[:, -8:]).max() == 0
        assert 0.2 < abs(waves).max() < 0.98

    def test_tones_have_the_pitch_overtones_and_length_of_the_table(self):
        """Measured by a Fourier sum at the frequencies of the overtones, without random changes."""
        for shape in range(len(SHAPES)):
            hertz = np.full((1, 2), PITCHES[3], np.float32)
            seconds, loudness = np.array([0.3], np.float32), np.array([0.4], np.float32)
            (wave,) = scenes_module.render_tones(hertz, seconds, loudness, OVERTONES[[shape]])
            middle, time = wave[200:2200], np.arange(200, 2200) / RATE  # 110 periods of 440 Hz
            for k, strength in enumerate(OVERTONES[shape], start=1):
                measured = 2 * abs((middle * np.exp(-2j * np.pi * 440 * k * time)).mean())
                expected = 0.4 * strength / np.linalg.norm(OVERTONES[shape])
                assert measured == pytest.approx(expected, abs=1e-4)
            assert not wave[2400:].any() and wave[2300:2390].any()


class TestCaptionLength:
    def caption_lengths(self):
        for facts in ([2, 2, 0, relation, 2, 2, 1] for relation in range(2)):
            for random in random_bits(11, 9, np.arange(3000)).tolist():
                yield len(caption(facts, random))

    def test_every_caption_fits_into_the_context(self):
        """The longest captions: the longest words in every sentence, and a random sample."""
        context_length = PRESETS["v3-tiny"].model.context_length
        objects = [
            f"one {size} yellow {max(WORDS[shape], key=len)}"
            for shape in SHAPES
            for size in WORDS["small"]
        ]
        longest = max(objects, key=len)
        for relation in RELATIONS:
            for sentence in SENTENCES:
                to, to_it = (max(table[relation], key=len) for table in (WORDS, WORDS_TO_IT))
                text = sentence.format(a=longest, b=longest, to=to, to_it=to_it)
                assert len(text) <= 78 <= context_length
        assert max(self.caption_lengths()) <= 78 <= context_length

    def test_the_vocabulary_is_the_words_of_all_captions(self):
        captions = render_captions(ALL_SCENES, 0)
        assert {word for text in captions for word in text.split()} == vocabulary()


def test_names_are_different_words():
    words = list(COLOURS)
    for name in (*SHAPES, *SIZES):
        words += WORDS[name]
    assert len(set(words)) == len(words)
