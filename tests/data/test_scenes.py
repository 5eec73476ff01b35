"""scenes: meanings and their split, chance without state, and decoders that read all facts back from all three ways."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanods.config import PRESETS
from nanods.data import scenes as module
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
from tests.data.decoders import outlines, read_caption, read_image, read_sound

ALL = np.arange(SCENE_COUNT)
SOME = (random_bits(600, 12345)[0] % SCENE_COUNT).astype(np.int64)  # of both parts
OTHER_SIDE = [4, 5, 6, 3, 0, 1, 2]  # the order of the facts, told from the other object's side


def arrays(scenes):
    return [
        value if isinstance(value, np.ndarray) else np.array(value)
        for value in dataclasses.astuple(scenes)
    ]


def fingerprint(scenes):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays(scenes))).hexdigest()


class TestMeanings:
    def test_facts_and_back_over_the_whole_space(self):
        facts = facts_of(ALL)
        assert SCENE_COUNT == 18_240 == len(np.unique(facts, axis=0))
        assert (facts.min(axis=0) == 0).all() and facts.max(axis=0).tolist() == [
            5,
            7,
            1,
            1,
            5,
            7,
            1,
        ]
        assert (facts[:, :3] != facts[:, 4:]).any(axis=1).all()
        np.testing.assert_array_equal(scene_ids_of(facts), ALL)

    def test_both_ways_to_put_a_scene_are_one_meaning(self):
        turned = facts_of(ALL)[:, OTHER_SIDE] + np.array([0, 0, 0, 2, 0, 0, 0])
        np.testing.assert_array_equal(scene_ids_of(turned), ALL)

    def test_the_same_relation_the_other_way_round_is_another_meaning(self):
        assert (scene_ids_of(facts_of(ALL)[:, OTHER_SIDE]) != ALL).all()

    @pytest.mark.parametrize("wrong", [-1, SCENE_COUNT])
    def test_numbers_that_are_no_meaning(self, wrong):
        for way in (
            facts_of,
            lambda m: render_images(m, 0),
            lambda m: render_captions(m, 0),
            lambda m: render_waves(m, 0),
        ):
            with pytest.raises(ValueError, match="from 0"):
                way(np.array([0, wrong]))

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ([0, 0, 0, 0, 0, 0, 0], "must differ"),
            ([6, 0, 0, 0, 0, 0, 0], "indices below"),
            ([0, 0, 0, 4, 0, 0, 1], "indices below"),
            ([0, -1, 0, 0, 0, 0, 1], "indices below"),
        ],
    )
    def test_facts_that_are_no_scene(self, facts, message):
        with pytest.raises(ValueError, match=message):
            scene_ids_of(np.array([facts]))


class TestSplit:
    def test_every_meaning_is_in_exactly_one_part(self):
        train, held_out = split()
        assert (len(train), len(held_out)) == (16_416, 1_824)
        np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), ALL)

    def test_the_split_is_what_it_was(self):
        """Or the figures of earlier runs are of another gallery."""
        assert split()[1][:6].tolist() == [17680, 10872, 9553, 10390, 14125, 591]

    def test_each_fact_is_held_out_as_often_as_it_is_trained(self):
        train, held_out = (facts_of(part) for part in split())
        for i, count in enumerate((6, 8, 2, 2, 6, 8, 2)):
            shares = [
                np.bincount(part[:, i], minlength=count) / len(part) for part in (train, held_out)
            ]
            assert abs(shares[0] - shares[1]).max() < 0.03

    def test_no_batch_draws_what_is_held_out(self):
        _, held_out = split()
        for seed in (0, 1, 99):
            drawn = np.concatenate([training_scene_ids(step, 128, seed) for step in range(300)])
            assert not np.isin(drawn, held_out).any()

    def test_a_batch_repeats_nothing_and_an_epoch_shows_all(self):
        steps = [training_scene_ids(step, 128, seed=3) for step in range(2 * 128)]
        assert all(len(np.unique(step)) == 128 for step in steps)
        first, second = np.concatenate(steps[:128]), np.concatenate(steps[128:])
        assert (
            len(np.unique(first)) == len(np.unique(second)) == 128 * 128
        )  # of 16,416: the rest fills no batch
        assert (first != second).any()
        np.testing.assert_array_equal(np.sort(training_scene_ids(7, 16_416)), np.sort(split()[0]))

    def test_kin_differ_in_shapes_and_order_alone(self):
        family, pair = family_and_pair(ALL)
        facts = facts_of(ALL)
        looks = np.sort(
            facts[:, [1, 5]] * 2 + facts[:, [2, 6]], axis=1
        )  # colour and size of each object, in any order
        told = np.column_stack([looks, facts[:, 3]])
        assert (
            len(np.unique(family))
            == len(np.unique(told, axis=0))
            == len(np.unique(np.column_stack([family[:, None], told]), axis=0))
        )
        mirrored = scene_ids_of(facts[:, [4, 5, 6, 3, 0, 1, 2]])  # the objects change places
        np.testing.assert_array_equal(family_and_pair(mirrored)[1], pair)
        assert (np.bincount(pair)[pair] == 2).all()  # a scene and its mirror image, no third

    @pytest.mark.parametrize(("hard", "least", "most"), [(True, 0.95, 1.0), (False, 0.0, 0.05)])
    def test_a_hard_batch_holds_mirror_images(self, hard, least, most):
        """Of the scenes whose mirror image is a training meaning too; a few groups are cut by a batch's end."""
        train, together = split()[0], []
        for step in range(20):
            meanings = training_scene_ids(step, 128, 0, hard)
            mirrored = scene_ids_of(facts_of(meanings)[:, [4, 5, 6, 3, 0, 1, 2]])
            together.append(np.isin(mirrored, meanings)[np.isin(mirrored, train)].mean())
        assert least <= np.mean(together) <= most

    def test_the_gallery(self):
        shown = gallery()
        assert len(np.unique(shown.ids)) == len(shown.ids) == 512
        assert np.isin(shown.ids, split()[1]).all()
        assert fingerprint(shown) == fingerprint(gallery())
        np.testing.assert_array_equal(gallery(5).waves, shown.waves[:5])
        assert len(shown.images) == len(np.unique(shown.images.reshape(512, -1), axis=0))

    @pytest.mark.parametrize("size", [0, -1, 1_825])
    def test_galleries_of_impossible_sizes(self, size):
        with pytest.raises(ValueError, match="1,824 scenes are held out"):
            gallery(size)

    @pytest.mark.parametrize("size", [0, -1, 16_417])
    def test_batches_of_impossible_sizes(self, size):
        with pytest.raises(ValueError, match="1 to 16,416 scenes"):
            batch(0, size)


class TestChance:
    def test_the_same_in_any_process_and_any_order(self):
        script = (
            "from nanods.data.scenes import batch, gallery; from tests.data.test_scenes import fingerprint; "
            "gallery(3); print([fingerprint(batch(step, 5, 2)) for step in (4, 0, 10**6)], fingerprint(gallery(4)))"
        )
        here = [fingerprint(batch(step, 5, 2)) for step in (10**6, 0, 4)][::-1]
        for hashseed in ("1", "77"):
            env = os.environ | {
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "PYTHONHASHSEED": hashseed,
            }
            done = subprocess.run(
                [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
            )
            assert done.stdout == f"{here} {fingerprint(gallery(4))}\n"

    def test_an_item_does_not_depend_on_its_batch(self):
        whole = render(SOME[:50], np.arange(50), seed=1)
        for piece in (np.arange(50)[::-1], np.array([17]), np.arange(3, 20)):
            part = render(SOME[piece], piece, seed=1)
            for a, b in zip(arrays(part), arrays(whole), strict=True):
                np.testing.assert_array_equal(a, b[piece])

    def test_seeds_steps_variants_and_ways_differ(self):
        seen = {fingerprint(batch(step, 4, seed)) for step in range(5) for seed in range(5)}
        assert len(seen) == 25
        same = render(np.full(200, 77), np.arange(200))
        for array in (same.images, same.waves, same.mels):
            assert len(np.unique(array.reshape(200, -1), axis=0)) == 200
        assert len(set(same.captions)) > 150
        assert not np.array_equal(render(SOME[:9], 0, 1).images, render(SOME[:9], 0, 2).images)

    def test_a_known_number(self):
        """splitmix64's published sequence from seed 0."""
        assert hex(int(mix_bits(np.array([GOLDEN], np.uint64))[0])) == "0xe220a8397b1dcdaf"

    def test_bits_are_even(self):
        bits = random_bits(1000, 5, np.arange(20))
        ones = np.unpackbits(bits.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 0.005 and len(np.unique(bits)) == bits.size
        chance = uniform(1000, 5, np.arange(20))
        assert chance.min() >= 0 and chance.max() < 1 and abs(chance.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(chance)[~np.eye(20, dtype=bool)]).max() < 0.15
        hiss = noise(8000, 5, np.arange(3))
        assert hiss.min() == -1 and hiss.max() == 1 and abs(hiss.mean()) < 0.02

    @pytest.mark.parametrize(
        "call",
        [lambda: batch(-1, 4), lambda: batch(0, 4, -1), lambda: render_images(SOME, -SOME - 1)],
    )
    def test_numbers_below_zero(self, call):
        with pytest.raises(ValueError, match="from 0 up"):
            call()


class TestEveryWayCarriesEveryFact:
    """The decoders know palette, pitches, words and outlines; the generator's noise is on."""

    def right(self, read, data):
        return (scene_ids_of(np.array([read(item) for item in data])) == SOME).mean()

    def test_captions(self):
        read = [read_caption(text) for text in render_captions(ALL, 2, seed=4)]
        np.testing.assert_array_equal(scene_ids_of(np.array(read)), ALL)

    def test_images(self):
        templates = outlines()
        assert (
            self.right(lambda image: read_image(image, templates), render_images(SOME, 8, seed=4))
            >= 0.99
        )

    def test_sounds(self):
        assert self.right(read_sound, render_waves(SOME, 8, seed=4)) >= 0.99

    def test_both_orders_are_heard_of_what_lies_above(self):
        above = scene_ids_of(np.array([[0, 0, 0, 1, 1, 1, 1]]))
        relations = {
            RELATIONS[read_sound(wave)[3]] for wave in render_waves(above.repeat(20), np.arange(20))
        }
        assert relations == {"above", "below"}

    def test_all_words_and_sentences_occur(self):
        text = "\n".join(render_captions(SOME, 1))
        for word in (
            *COLOURS,
            *(w for both in (WORDS, WORDS_TO_IT) for forms in both.values() for w in forms),
        ):
            assert word in text
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

    def test_what_a_model_hears_is_centred(self):
        mels = batch(0, 128).mels
        assert abs(mels.mean()) < 0.2 and 0.8 < mels.std() < 1.2

    def test_objects_stay_within_the_image_and_apart(self, monkeypatch):
        """Drawn without noise: a margin of a pixel, and a stripe of ground between the two (but for the skirts of corners)."""
        monkeypatch.setattr(
            module, "noise", lambda count, *key: np.zeros((len(SOME), count), np.float32)
        )
        images = render_images(SOME, 3)
        spots = abs(images - images[:, :, :1, :1]).max(axis=1) > 0.15  # (B, 32, 32)
        assert not spots[:, [0, 31]].any()
        for spot, beside in zip(spots, facts_of(SOME)[:, 3] == 0, strict=True):
            filled = np.flatnonzero(spot.any(axis=0 if beside else 1))
            assert (np.diff(filled) > 1).sum() == 1

    def test_sounds_end_before_the_wave_does(self, monkeypatch):
        monkeypatch.setattr(
            module, "noise", lambda count, *key: np.zeros((len(SOME), count), np.float32)
        )
        waves = render_waves(SOME, 3)
        assert (
            abs(waves[:, :80]).max() == 0
            and abs(waves[:, -8:]).max() == 0
            and 0.2 < abs(waves).max() < 0.98
        )

    def test_tones_are_what_the_table_says(self):
        """Pitch, overtones and length of a tone without chance, by a Fourier sum at the frequencies alone."""
        for shape in range(len(SHAPES)):
            hertz = np.full((1, 2), PITCHES[3], np.float32)
            seconds, loudness = np.array([0.3], np.float32), np.array([0.4], np.float32)
            (wave,) = module.render_tones(hertz, seconds, loudness, OVERTONES[[shape]])
            middle, time = wave[200:2200], np.arange(200, 2200) / RATE  # 110 periods of 440 Hz
            for k, strength in enumerate(OVERTONES[shape], start=1):
                found = 2 * abs((middle * np.exp(-2j * np.pi * 440 * k * time)).mean())
                assert found == pytest.approx(
                    0.4 * strength / np.linalg.norm(OVERTONES[shape]), abs=1e-4
                )
            assert not wave[2400:].any() and wave[2300:2390].any()


class TestBytes:
    def longest(self):
        for facts in ([2, 2, 0, r, 2, 2, 1] for r in range(2)):
            for rng in random_bits(11, 9, np.arange(3000)).tolist():
                yield len(caption(facts, rng))

    def test_every_caption_fits(self):
        """The longest of all: the longest words in every sentence."""
        things = [
            f"one {size} yellow {max(WORDS[shape], key=len)}"
            for shape in SHAPES
            for size in WORDS["small"]
        ]
        longest = max(things, key=len)
        for relation in RELATIONS:
            for sentence in SENTENCES:
                to, it = (max(table[relation], key=len) for table in (WORDS, WORDS_TO_IT))
                assert (
                    len(sentence.format(a=longest, b=longest, to=to, to_it=it))
                    <= 78
                    <= PRESETS["v3-tiny"].model.context_length
                )
        assert max(self.longest()) <= 78 <= PRESETS["v3-tiny"].model.context_length

    def test_the_vocabulary_is_what_captions_say(self):
        assert {word for text in render_captions(ALL, 0) for word in text.split()} == vocabulary()


def test_names_are_different_words():
    forms = [w for name in (*SHAPES, *SIZES) for w in WORDS[name]] + list(COLOURS)
    assert len(set(forms)) == len(forms)
