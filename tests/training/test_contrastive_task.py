"""V3's task: micro-batches give the loss of the whole batch, experts are balanced over all
modalities, the gallery is held out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from nanods.config import PRESETS
from nanods.contrastive import all_pairs_loss
from nanods.data.scenes import SceneData, split
from nanods.errors import UserError
from nanods.moe import MoEConfig, load_balancing_loss
from nanods.multimodal import Multimodal
from nanods.training.contrastive_task import (
    ContrastiveTask,
    combine_loads,
    encode_captions,
    moe_losses,
)
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
    inputs, ids = task_of().batch(3)
    again, _ = task_of().batch(3)
    assert all(torch.equal(inputs[name], again[name]) for name in ("text", "image", "audio"))
    assert inputs["text"].shape[0] == inputs["image"].shape[0] == len(set(ids.tolist())) == 8
    for other in (task_of().batch(4), task_of(replace(SMALL, seed=1)).batch(3)):
        assert set(other[1].tolist()) != set(ids.tolist())


def test_the_gallery_is_held_out():
    assert set(task_of().gallery.ids.tolist()) <= set(split()[1].tolist())
    assert len(set(task_of().gallery.ids.tolist())) == 512


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
    inputs, ids = task.batch(0)
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


def test_captions_are_encoded_as_padded_rows():
    tokens = encode_captions(["ab", "", "abcdef"], task_of().tokenizer, 4)
    assert tokens.tolist() == [[97, 98, -1, -1], [-1] * 4, [97, 98, 99, 100]]


def test_data_without_a_modality_is_refused_with_a_fix():
    class Mute(SceneData):
        modalities = ("text", "image")

    with pytest.raises(
        UserError, match=r"has no audio: choose other data, or --multimodal.modalities text image"
    ):
        task_of(data=Mute())
    task = task_of(
        replace(SMALL, multimodal=replace(SMALL.multimodal, modalities=("text", "image"))), Mute()
    )
    assert list(task.batch(0)[0]) == ["text", "image"]
