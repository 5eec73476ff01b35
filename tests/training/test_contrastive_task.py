"""V3's task: micro-batches give the loss of the whole batch, experts are balanced over all
modalities, the gallery is held out."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from nanods.config import PRESETS
from nanods.contrastive import all_pairs_loss
from nanods.data.caption_dataset import CaptionDataset
from nanods.data.caption_forms import item_of
from nanods.data.captions import CaptionFolder
from nanods.data.scenes import SceneData, split
from nanods.data.sound import write_wav
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.moe import MoEConfig, load_balancing_loss
from nanods.multimodal import Multimodal
from nanods.training import contrastive_task
from nanods.training.contrastive_data import encode_captions
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.shared_experts import combine_loads, moe_losses
from nanods.training.task import accumulate_gradients

TINY = PRESETS["v3-tiny"]
SMALL = replace(
    TINY,
    batch_size=8,
    model=replace(TINY.model, n_layer=2, n_head=2, n_embd=16),
    multimodal=replace(TINY.multimodal, width=8),
)
EXPERTS = replace(SMALL, model=replace(SMALL.model, moe=MoEConfig(n_expert=4)))


def task_of(config=SMALL, data=None):
    return ContrastiveTask(config, torch.device("cpu"), data)


def model_of(config=SMALL):
    torch.manual_seed(0)
    model = Multimodal(config.model, config.multimodal).double()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def gradients(config, micro_batch, batch=None):
    task, model = task_of(config), model_of(config)
    metrics = accumulate_gradients(task, model, batch or task.batch(0), micro_batch)
    loss = metrics.pop("train_loss").item()
    return loss, metrics, {name: p.grad for name, p in model.named_parameters()}


def near(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < tolerance, name


def test_a_batch_depends_on_seed_and_step_alone():
    inputs, ids, present = task_of().batch(3)
    assert present is None
    again, _, _ = task_of().batch(3)
    assert all(torch.equal(inputs[name], again[name]) for name in ("text", "image", "audio"))
    assert inputs["text"].shape[0] == inputs["image"].shape[0] == 8 and ids.shape == (8, 2)
    assert all(len(set(column.tolist())) == 8 for column in ids.T)
    for other in (task_of().batch(4), task_of(replace(SMALL, seed=1)).batch(3)):
        assert set(other[1][:, 0].tolist()) != set(ids[:, 0].tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_data": "x"}, "--val-data x: scenes has held-out examples of its own; leave it out"),
        ({"val_fraction": 0.2}, "--val-fraction 0.2: it is for texts; --val-data FOLDER"),
        ({"data": ".", "val_fraction": 0.2}, "--val-fraction 0.2: it is for texts"),
    ],
)
def test_flags_of_texts_are_not_ignored(changes, message):
    with pytest.raises(UserError, match=message):
        task_of(replace(SMALL, **changes))


def test_the_gallery_is_held_out():
    assert set(task_of().gallery.ids.tolist()) <= set(split()[1].tolist())
    assert len(set(task_of().gallery.ids.tolist())) == 512


class Repeated(SceneData):
    """Scenes with files that occur twice, and with captions that several scenes share."""

    def batch(self, *args):
        examples = super().batch(*args)
        files = examples.ids[[0, 1, 2, 3, 4, 5, 0, 1]]
        captions = ["one", "Two ", "three", " ONE", "five", "six", "seven", "tWo"]
        return replace(examples, ids=files, captions=captions)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_duplicates_by_file_or_caption_are_no_negatives_with_micro_batches_too(size):
    task, model = task_of(data=Repeated()), model_of()
    inputs, _, _ = task.batch(0)
    embeddings, _ = model(inputs)
    duplicates = {(0, 3), (0, 6), (1, 7)}  # "one", a file, a file and "two"
    total = 0
    for a, b in combinations(embeddings, 2):
        scores = model.temperature() * embeddings[a] @ embeddings[b].T
        for i in range(8):
            kept = [j for j in range(8) if not {(i, j), (j, i)} & duplicates]
            total = total + scores[i, kept].logsumexp(0) + scores[kept, i].logsumexp(0)
            total = total - 2 * scores[i, i]
    (total / (3 * 2 * 8)).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model = model_of()
    metrics = accumulate_gradients(task, model, task.batch(0), size)
    assert metrics["ce_loss"].item() == pytest.approx(total.item() / 48, rel=1e-12)
    near({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_have_the_gradients_of_the_whole_batch(size):
    whole, parts, slopes = gradients(SMALL, 8)
    loss, metrics, cached = gradients(SMALL, size)
    assert abs(loss - whole) < 1e-12 and loss == pytest.approx(metrics["ce_loss"].item())
    near(cached, slopes)
    near(metrics, parts)
    embeddings, _ = model_of()(task_of().batch(0)[0])
    expected, by_pair = all_pairs_loss(
        embeddings, model_of().temperature(), SMALL.multimodal.pair_weights()
    )
    assert whole == pytest.approx(expected.item(), rel=1e-12)
    assert parts["loss_text_image"] == pytest.approx(by_pair["text-image"].item())
    assert parts["temperature"].item() == pytest.approx(0.1)


@pytest.mark.parametrize("shared", [True, False])
def test_the_experts_losses_reach_the_gates_with_micro_batches_too(shared):
    """The loss is the contrastive loss of the batch plus the mean of the micro-batches' losses."""
    config = replace(
        EXPERTS, multimodal=replace(EXPERTS.multimodal, shared=shared, entropy_coefficient=0.5)
    )
    task, model = task_of(config), model_of(config)
    inputs, ids, _ = task.batch(0)
    embeddings, _ = model(inputs)
    total = all_pairs_loss(embeddings, model.temperature(), task.pair_weights, ids)[0]
    for piece in (slice(0, 4), slice(4, 8)):
        _, stats = model({name: x[piece] for name, x in inputs.items()})
        total = total + moe_losses(stats, config)[0] / 2
    total.backward()
    loss, parts, cached = gradients(config, 4)
    assert loss == pytest.approx(total.item(), rel=1e-12)
    near(cached, {name: p.grad for name, p in model.named_parameters()})
    assert all(cached[name].abs().max() > 1e-6 for name in cached if name.endswith("gate.weight"))
    weighed = 0.1 * parts["balance_loss"] + 0.001 * parts["z_loss"] + 0.5 * parts["entropy_loss"]
    assert loss == pytest.approx((parts["ce_loss"] + weighed).item(), rel=1e-12)
    tokens = {"text": int((inputs["text"] >= 0).sum()), "image": 8 * 64, "audio": 8 * 16}
    for name, count in tokens.items():
        assert (
            parts[f"load_{name}"].sum(dim=1).tolist() == [2 * count] * 2
        )  # K = 2, in each of two layers
    assert parts["load"].shape == ((2, 4) if shared else (6, 4))
    assert parts["load"].sum() == 2 * 2 * sum(tokens.values())


def test_the_balancing_loss_counts_the_tokens_of_all_modalities_together():
    torch.manual_seed(0)
    counts = {"text": 50, "image": 20, "audio": 7}
    probs = {name: torch.randn(n, 4, dtype=torch.float64).softmax(-1) for name, n in counts.items()}
    stats = {}
    for name, p in probs.items():
        load = torch.bincount(p.topk(2).indices.flatten(), minlength=4)
        zero = torch.zeros((), dtype=torch.float64)
        metrics = {
            "load": load,
            "importance": p.mean(0),
            "token_entropy": zero,
            "z_loss": zero + len(p),
            "dropped": zero,
        }
        stats[name] = [metrics]
    together = torch.cat(list(probs.values()))
    _, parts = moe_losses(stats, EXPERTS)
    assert parts["balance_loss"].item() == pytest.approx(
        load_balancing_loss(together, together.topk(2).indices).item()
    )
    assert parts["z_loss"].item() == pytest.approx(
        (50 * 50 + 20 * 20 + 7 * 7) / 77
    )  # the mean over all tokens
    apart = replace(EXPERTS, multimodal=replace(EXPERTS.multimodal, shared=False))
    alone = [load_balancing_loss(p, p.topk(2).indices).item() for p in probs.values()]
    assert moe_losses(stats, apart)[1]["balance_loss"].item() == pytest.approx(np.mean(alone))
    loads = [layers[0]["load"][None] for layers in stats.values()]
    assert torch.equal(combine_loads(loads, EXPERTS), sum(loads)) and torch.equal(
        combine_loads(loads, apart), torch.cat(loads)
    )


class Known(torch.nn.Module):
    """Embeds each example at a random point, the `collapsed` modality at one point."""

    def __init__(self, collapsed=None):
        super().__init__()
        self.collapsed = collapsed

    def temperature(self):
        return torch.tensor(10.0)

    def forward(self, inputs):
        self.seen = [*getattr(self, "seen", []), len(inputs["image"])]
        made = {}
        for name, x in inputs.items():
            keys = (
                self.keys[len(self.seen) - 1]
                if name != self.collapsed
                else torch.zeros(len(x), dtype=torch.long)
            )
            made[name] = normalize(
                torch.randn(600, 16, generator=torch.Generator().manual_seed(0))[keys], dim=-1
            )
        return made, {name: [{}] for name in inputs}


def test_evaluation_measures_recall_and_gives_no_credit_for_a_collapse():
    task = task_of()
    model = Known()
    model.keys = torch.arange(512).split(64)
    row = task.evaluate(model)
    assert set(model.seen) == {64} and len(model.seen) == 8 and model.training
    assert (
        row["val_recall1"] == 1
        and row["median_rank_image_audio"] == 1
        and row["val_loss"] < np.log(8)
    )
    assert {name for name in row if name.startswith("recall1_")} == {
        f"recall1_{a}_{b}"
        for a in ("text", "image", "audio")
        for b in ("text", "image", "audio")
        if a != b
    }
    flat = Known("audio")
    flat.keys = model.keys
    row = task.evaluate(flat)
    assert (
        row["recall1_text_audio"] == row["recall5_image_audio"] == 0
        and row["median_rank_text_audio"] == 512
    )
    assert (
        row["recall1_audio_text"] == 1 / 512 and row["recall1_text_image"] == 1
    )  # all 512 queries are the same


class Named(SceneData):
    """Scenes whose captions are one of four labels: 0, 1 and 2 are in the gallery, 3 is not."""

    def text(self):
        return "\n".join("abcd"[i % 4] for i in range(100))

    def gallery(self, size):
        captions = ["  A", "b", "c", "a", "B", "c", "a", "b"]
        return replace(super().gallery(8), captions=captions)


class ByLabel(torch.nn.Module):
    """Embeds an example at its label; images 6 and 7 at the label 3 and at NaN."""

    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def temperature(self):
        return torch.tensor(10.0)

    def forward(self, inputs):
        points = torch.eye(4)
        made = {name: points[self.labels] for name in inputs}
        if "image" in inputs:
            made["image"] = torch.cat([points[self.labels[:6]], points[3:], points[:1] * torch.nan])
        elif len(inputs["text"]) == 4:  # the labels themselves
            made["text"] = points
        return made, {name: [{}] for name in inputs}


def test_labels_as_captions_are_classified_and_any_example_of_a_label_is_a_right_answer():
    config = replace(SMALL, batch_size=4)
    task = task_of(config, Named())
    assert list(task.labels.values()) == ["a", "b", "c", "d"]
    assert "16,416 training + 1,824 held-out examples of 4 labels" in task.describe_data()
    row = task.evaluate(ByLabel())
    assert row["recall1_text_audio"] == row["recall1_audio_text"] == 1
    assert row["zero_shot_accuracy_audio"] == 1 and row["zero_shot_accuracy_image"] == 6 / 8
    assert "zero_shot_accuracy_text" not in row
    line = task.describe_validation(row)
    assert "; zero-shot accuracy among 4 labels: image 0.750, audio 1.000" in line
    assert not task_of().labels, "scenes have captions of their own"


def test_the_validation_loss_has_the_chance_level_of_the_training_loss():
    """Here the gallery has 8 examples and a batch 16."""

    class Few(SceneData):
        def gallery(self, size):
            return super().gallery(8)

    class Constant(Known):
        def forward(self, inputs):
            e = {name: torch.ones(len(x), 16) / 4 for name, x in inputs.items()}
            return e, {name: [{}] for name in inputs}

    task = task_of(replace(SMALL, batch_size=16), Few())
    assert task.evaluate(Constant())["val_loss"] == pytest.approx(np.log(16), abs=1e-5)
    embeddings = {name: torch.randn(8, 16) for name in ("text", "image", "audio")}
    exact = task_of(replace(SMALL, batch_size=8), Few())
    expected = all_pairs_loss(embeddings, 3.0, exact.pair_weights, exact.gallery_ids)[0].item()
    assert exact.gallery_loss(embeddings, exact.gallery_ids, 3.0) == pytest.approx(expected)


def test_captions_are_encoded_as_padded_rows():
    tokens = encode_captions(["ab", "", "abcdef"], ByteTokenizer(), 4)
    assert tokens.tolist() == [[97, 98, -1, -1], [-1] * 4, [97, 98, 99, 100]]


def test_few_captions_give_a_smaller_vocabulary_and_that_is_said():
    class Short(SceneData):
        def text(self):
            return "\n".join(["a red cat", "a red dog"] * 8208)

    task = task_of(data=Short())
    size = task.tokenizer.vocab_size
    assert 256 < size < task.config.model.vocab_size == 384
    assert f"a vocabulary of {size} tokens, not 384" in task.describe_data()
    assert "vocabulary" not in task_of().describe_data()


def test_without_captions_no_vocabulary_is_learnt():
    class Silent(SceneData):
        def text(self):
            return ""

    task = task_of(data=Silent())
    assert isinstance(task.tokenizer, ByteTokenizer)
    assert "vocabulary" not in task.describe_data()
    with pytest.raises(UserError, match="--vocab-size 100: at least 256"):
        task_of(replace(SMALL, model=replace(SMALL.model, vocab_size=100)), Silent())


class Mute(SceneData):
    modalities = ("text", "image")


def test_the_model_has_the_modalities_of_the_data_and_that_is_said():
    task = task_of(data=Mute())
    assert task.config.multimodal.modalities == ("text", "image")
    assert list(task.batch(0)[0]) == ["text", "image"]
    assert "without audio, which the preset has" in task.describe_data()
    assert "without audio" not in task_of().describe_data()


def test_data_without_a_modality_that_was_asked_for_is_refused_with_a_fix():
    for changes in ({"modalities": ("image", "audio")}, {"pairs": ("text-audio",)}):
        config = replace(SMALL, multimodal=replace(SMALL.multimodal, **changes))
        with pytest.raises(UserError, match=r"no audio: .* --multimodal.modalities text image$"):
            task_of(config, Mute())


def test_captions_of_one_file_are_refused(tmp_path):
    names = [tmp_path / f"{i}.wav" for i in range(3)]
    for name in names:
        write_wav(name, np.ones(100))
    train = [(item_of(names[0]), f"caption {i}") for i in range(8)]
    held_out = [(item_of(name), "a sound") for name in names[1:]]
    folder = CaptionFolder(("text", "audio"), train, held_out, notes=[])
    sounds = replace(SMALL, multimodal=replace(SMALL.multimodal, modalities=("text", "audio")))
    with pytest.raises(UserError, match="all 8 training captions are of one file"):
        task_of(sounds, CaptionDataset("mine", folder, 32, 32))


# ---- examples that lack a modality ---------------------------------------------------------------

LACKING = {
    "text": [True, True, False, True, True, True, True, True],
    "image": [True, False, True, True, True, True, False, False],
    "audio": [True, True, True, False, False, True, True, True],
}


class Gaps(SceneData):
    """Scenes of which some lack a modality, in each eighth alike."""

    has_gaps = True

    def lacking(self, examples):
        size = len(examples.captions)
        present = {name: np.resize(has, size) for name, has in LACKING.items()}
        captions = zip(examples.captions, present["text"], strict=True)
        texts = [text if has else "" for text, has in captions]
        images = examples.images * present["image"][:, None, None, None]
        return replace(examples, captions=texts, images=images, present=present)

    def batch(self, *args):
        return self.lacking(super().batch(*args))

    def gallery(self, size):
        return self.lacking(super().gallery(16))

    def pair_counts(self):
        return Counter({("text", "image"): 9, ("text", "audio"): 9, ("image", "audio"): 9})


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_of_a_pair_counts_the_examples_that_have_both(size):
    task, model = task_of(data=Gaps()), model_of()
    inputs, _, present = task.batch(0)
    assert {name: has.tolist() for name, has in present.items()} == LACKING
    embeddings, _ = model(inputs)
    total = 0
    for a, b in combinations(embeddings, 2):
        both = [i for i in range(8) if LACKING[a][i] and LACKING[b][i]]
        assert 2 < len(both) < 7
        scores = (model.temperature() * embeddings[a] @ embeddings[b].T)[both][:, both]
        logits = scores.logsumexp(0) + scores.logsumexp(1) - 2 * scores.diag()
        total = total + logits.mean() / (2 * 3)
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    metrics = accumulate_gradients(task, model, task.batch(0), size)
    assert metrics["ce_loss"].item() == pytest.approx(total.item(), abs=1e-12)
    near({name: p.grad for name, p in model.named_parameters()}, expected)


def test_a_pair_that_few_examples_have_is_warned_of():
    class Rare(Gaps):
        def pair_counts(self):
            total = len(self.train) // 100
            return Counter(dict.fromkeys(combinations(LACKING, 2), total))

    task = task_of(data=Rare())
    assert task.candidates == pytest.approx(1 + 7 / 100, abs=0.01)
    assert "about 0 that have both modalities" in task.describe_step()
    assert "image and audio: an example that has both meets 0.07 others" in task.warnings[-1]
    assert len(task.warnings) == 3 and not task_of().warnings

    class OneRare(Rare):
        def pair_counts(self):
            return super().pair_counts() | {("text", "image"): len(self.train)}

    (first, second) = task_of(data=OneRare()).warnings
    assert first.startswith("text and audio") and second.startswith("image and audio")


def test_the_validation_loss_of_a_pair_is_of_the_examples_that_have_both():
    class Halves(Gaps):
        """The second half of the gallery lacks every image: nothing to score against."""

        def gallery(self, size):
            examples = SceneData.gallery(self, 16)
            has = np.arange(16) < 8
            every = np.ones(16, bool)
            return replace(examples, present={"text": every, "image": has, "audio": every})

    modalities = replace(SMALL.multimodal, modalities=("text", "image"))
    task, model = task_of(replace(SMALL, multimodal=modalities), Halves()), model_of()
    task.pair_shares = {("text", "image"): 1.0}
    embeddings, _ = task.embed(model, task.inputs(task.gallery))
    first = {name: e[:8] for name, e in embeddings.items()}
    expected, _ = all_pairs_loss(first, 10.0, task.pair_weights, task.gallery_ids[:8])
    assert task.gallery_loss(embeddings, task.gallery_ids, 10.0) == pytest.approx(expected.item())


def test_with_gaps_too_the_validation_loss_has_the_chance_level_of_the_training_loss():
    class Shares(Gaps):
        def pair_counts(self):
            shares = {
                (a, b): np.mean(np.logical_and(LACKING[a], LACKING[b]))
                for a, b in combinations(LACKING, 2)
            }
            return Counter({pair: int(share * len(self.train)) for pair, share in shares.items()})

    task = task_of(data=Shares())
    _, ids, present = task.batch(0)
    same = {name: torch.ones(8, 16) / 4 for name in LACKING}
    training, _ = task.batch_loss(same, torch.tensor(10.0), ids, present)
    same = {name: torch.ones(16, 16) / 4 for name in LACKING}
    validation = task.gallery_loss(same, task.gallery_ids, 10.0)
    assert validation == pytest.approx(training.item(), abs=1e-5)
    assert np.log(task.candidates) == pytest.approx(validation, abs=0.15)


def test_what_stands_in_a_gap_changes_no_loss():
    class Noise(Gaps):
        def lacking(self, examples):
            examples = super().lacking(examples)
            lost = ~examples.present["image"][:, None, None, None]
            return replace(examples, images=examples.images + lost * np.float32(0.3))

    losses = []
    for data in (Gaps(), Noise()):
        task = task_of(data=data)
        losses.append(accumulate_gradients(task, model_of(), task.batch(0), 3)["ce_loss"].item())
    assert losses[0] == losses[1]


def test_recalls_and_accuracies_are_of_the_examples_that_have_both():
    class Lost(Gaps):
        """Every image that is there is collapsed; all others would be found."""

        def text(self):
            return "\n".join("ab"[i % 2] for i in range(100))

        def lacking(self, examples):
            examples = super().lacking(examples)
            texts = [text and "ab"[i % 2] for i, text in enumerate(examples.captions)]
            return replace(examples, captions=texts)

    class Points(Known):
        def forward(self, inputs):
            B = len(next(iter(inputs.values())))
            points = torch.eye(16)[:B]
            made = dict.fromkeys(inputs, points)
            if "image" in made:
                lost = torch.tensor(LACKING["image"] * 2)
                made["image"] = torch.where(lost[:, None], points[:1], points)
            return made, {name: [{}] for name in inputs}

    task = task_of(data=Gaps())
    row = task.evaluate(Points())
    both = sum(a and b for a, b in zip(LACKING["image"], LACKING["audio"], strict=True)) * 2
    assert row["recall1_text_audio"] == row["recall5_audio_text"] == 1
    assert row["recall1_image_audio"] == pytest.approx(1 / both)  # example 0 alone is at its point
    assert row["median_rank_audio_image"] == both
    assert "among 6 to 10 of 16 held-out examples" in task.describe_validation(row)
    task = task_of(replace(SMALL, batch_size=4), Lost())
    assert list(task.labels) == ["a", "b"]
    classified = task.classify(Points(), task.embed(Points(), task.inputs(task.gallery))[0])
    for name, (truth, nearest) in classified.items():
        has = np.logical_and(LACKING[name], LACKING["text"])
        assert len(truth) == len(nearest) == 2 * has.sum() and truth.min() == 0
    assert task.evaluate(Points())["zero_shot_accuracy_image"] < 1


def test_held_out_examples_without_a_pair_are_refused():
    class Alone(Gaps):
        def gallery(self, size):
            examples = super().gallery(size)
            return replace(examples, present=examples.present | {"text": ~examples.has("image")})

    with pytest.raises(
        UserError, match="no two held-out examples have the same two modalities that the"
    ):
        task_of(
            replace(SMALL, multimodal=replace(SMALL.multimodal, modalities=("text", "image"))),
            Alone(),
        )


def test_pairs_that_no_example_has_are_not_compared():
    class Apart(Gaps):
        def pair_counts(self):
            return Counter(
                {("text", "image"): 8208, ("text", "audio"): 8208, ("image", "audio"): 1}
            )

    task = task_of(data=Apart())
    assert list(task.pair_weights) == [("text", "image"), ("text", "audio")]
    assert "ln 4" in task.describe_step(), "half of 8 examples have both of a pair"
    assert "not compared: image and audio, which too few examples have" in task.describe_data()
    asked = replace(SMALL, multimodal=replace(SMALL.multimodal, pairs=("audio-image",)))
    with pytest.raises(UserError, match="fewer than two training examples have audio and image"):
        task_of(asked, Apart())


# ---- words ---------------------------------------------------------------------------------------


def test_scenes_of_another_size_are_refused():
    for flag, change in (
        ("image-size is 64 in this model", {"image_size": 64}),
        ("frames is 16 in this model", {"frames": 16}),
    ):
        with pytest.raises(UserError, match=f"--multimodal.{flag}, and scenes have 32"):
            task_of(replace(SMALL, multimodal=replace(SMALL.multimodal, **change)))
    silent = replace(SMALL.multimodal, modalities=("text", "image"), frames=16)
    task_of(replace(SMALL, multimodal=silent))  # no sound is read


def test_the_time_of_an_evaluation_counts_all_galleries(monkeypatch):
    class Two(SceneData):
        def more_galleries(self):
            return {"more": self.gallery(512)}

    monkeypatch.setattr(contrastive_task, "forward_seconds", lambda model, forward: 1.0)
    one, two = (task_of(data=data).evaluation_seconds(model_of()) for data in (SceneData(), Two()))
    assert two >= 2 * 512 / contrastive_task.EMBED_CHUNK > one / 2


def test_skipped_files_are_reported_where_no_captions_are_read():
    task = task_of(
        replace(SMALL, multimodal=replace(SMALL.multimodal, modalities=("image", "audio")))
    )
    task.data.skipped = 2
    shown = task.show_examples(model_of())
    assert "2 corrupt files were skipped" in shown and "--image FILE" in shown
