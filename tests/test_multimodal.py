"""Three modalities, one trunk: what an embedding depends on, what is shared, what it costs, and what a fourth one takes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanods import multimodal
from nanods.attention import AttentionConfig
from nanods.gpt import GPTConfig, rope_cos_sin, rotate
from nanods.moe import MoEConfig
from nanods.multimodal import Modality, Multimodal, MultimodalConfig, grid_rope

TRUNK = GPTConfig(
    n_layer=2,
    n_head=2,
    n_embd=16,
    context_length=12,
    vocab_size=20,
    attention=AttentionConfig("dense"),
)
ENDS = MultimodalConfig(
    ("text", "image", "audio"), width=6, image_size=8, patch_size=4, frames=6, patch_frames=2
)
EXPERTS = replace(TRUNK, moe=MoEConfig(n_expert=4))


def model_of(trunk=TRUNK, **changes):
    """In fp64, with output projections that are not zero: at the start a trunk would hand its tokens through."""
    torch.manual_seed(0)
    model = Multimodal(trunk, replace(ENDS, **changes)).double()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs_of(B=5, seed=1):
    random = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 20, (B, 9), generator=random)
    for row, length in zip(text, (9, 1, 4, 7, 9), strict=False):
        row[length:] = -1
    image, audio = (
        torch.rand(B, *shape, generator=random, dtype=torch.float64)
        for shape in ((3, 8, 8), (32, 6))
    )
    return {"text": text, "image": image, "audio": audio}


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trunk", [TRUNK, EXPERTS])
@pytest.mark.parametrize("shared", [True, False])
def test_embeddings_have_length_one_and_hang_on_their_own_item_alone(trunk, shared):
    model, inputs = model_of(trunk, shared=shared), inputs_of()
    embeddings, stats = model(inputs)
    assert list(embeddings) == list(stats) == ["text", "image", "audio"]
    other = inputs_of(seed=2)
    for name, e in embeddings.items():
        assert e.shape == (5, 6) and len(stats[name]) == 2
        near(e.norm(dim=1), torch.ones(5, dtype=torch.float64))
        assert (e[0] - e[1:]).norm(dim=1).min() > 1e-3  # and they differ
        mixed = torch.cat([inputs[name][2:3], other[name][3:4, : inputs[name].size(1)]])
        near(model.embed(name, mixed)[0][0], e[2])


def test_padding_changes_nothing_and_goes_to_no_expert():
    model, text = model_of(EXPERTS), inputs_of()["text"]
    e, stats = model.embed("text", text)
    longer = torch.cat([text, torch.full((5, 3), -1)], dim=1)
    again, told = model.embed("text", longer)
    near(again, e)
    near(model.embed("text", text[2:3, :4])[0], e[2:3])  # as if it had been read alone
    tokens = (text >= 0).sum()
    for a, b in zip(stats, told, strict=True):
        assert a["load"].sum() == b["load"].sum() == 2 * tokens
        near(a["balance_loss"], b["balance_loss"])
        near(a["token_entropy"], b["token_entropy"])


@pytest.mark.parametrize(
    ("name", "dimension"), [("text", 1), ("image", 3), ("image", 2), ("audio", 2)]
)
def test_order_matters_where_there_is_one(name, dimension):
    """Turned round, the same tokens stand elsewhere: the words, the rows and columns of patches, the frames."""
    model, x = model_of(), inputs_of()[name][[0, 4]]  # two texts of full length
    assert (model.embed(name, x)[0] - model.embed(name, x.flip(dimension))[0]).norm(
        dim=1
    ).min() > 1e-3


def test_a_place_is_known_by_its_distances_too():
    """Without the learnt places RoPE still tells two orders apart; without both there is none."""
    model, text = model_of(), inputs_of()["text"][:1]
    nn.init.zeros_(model.modalities["text"].position_embedding)
    turned = model.embed("text", text.flip(1))[0] - model.embed("text", text)[0]
    assert turned.norm() > 1e-3
    model.modalities["text"].sin.zero_()
    model.modalities["text"].cos.fill_(1)
    near(model.embed("text", text.flip(1))[0], model.embed("text", text)[0])


def test_every_token_reads_every_other():
    model, x = model_of(), inputs_of()["image"]
    tokens, rope, _ = model.modalities["image"].prepare(x)
    block, rope = model.trunks["shared"][0], tuple(table.double() for table in rope)
    before = block(tokens, None, rope)[0]
    for i in (0, 3):
        changed = tokens.clone()
        changed[:, i] += 1
        assert (block(changed, None, rope)[0] - before).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("side", [4, 2, 1])
def test_a_token_of_an_image_reads_its_patch_and_half_a_patch_around(side):
    image = model_of(patch_size=side).modalities["image"]
    x = inputs_of()["image"][:1].requires_grad_()
    for token in (0, 8 // side + 1 if side < 8 else 0, (8 // side) ** 2 - 1):
        (slope,) = torch.autograd.grad(image.tokens(x)[0][0, token].sum(), x)
        read = torch.zeros(
            8 + 2 * side, 8 + 2 * side, dtype=torch.bool
        )  # with a margin of one patch
        row, column = divmod(token, 8 // side)
        top, left = (place * side + side - side // 2 for place in (row, column))
        read[top : top + 2 * side, left : left + 2 * side] = True
        assert torch.equal(slope[0].abs().amax(dim=0) > 0, read[side:-side, side:-side])


def test_a_token_of_a_sound_is_its_own_frames():
    audio, y = model_of().modalities["audio"], inputs_of()["audio"]
    normalized_log_mel = y.clone()
    normalized_log_mel[:, :, 2:4] += 1  # the second two of three times two
    change = audio.tokens(normalized_log_mel)[0] - audio.tokens(y)[0]
    assert change[:, 1].abs().min() > 0 and not change[:, [0, 2]].any()


def test_rope_on_a_grid_sees_distances_along_each_axis():
    cos, sin = grid_rope((9,), 8)
    for ours, known in zip(
        (cos, sin),
        rope_cos_sin(torch.arange(9)[None], 8, torch.float32, multimodal.GRID_BASE),
        strict=True,
    ):
        assert torch.equal(ours, known)  # one axis: RoPE itself
    rope = grid_rope((4, 5), 8)
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    scores = rotate(q.expand(1, 1, 20, 8), rope)[0, 0] @ rotate(k.expand(1, 1, 20, 8), rope)[0, 0].T
    scores = scores.view(4, 5, 4, 5)  # (row, column) of the query, then of the key
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[1, 3, 3, 4])
    torch.testing.assert_close(scores[3, 2, 1, 4], scores[2, 0, 0, 2])
    assert (scores[0, 0, 2, 1] - scores[0, 0, 1, 2]).abs() > 1e-2


def test_shared_is_one_trunk_and_separate_is_three():
    shared, separate = model_of(), model_of(shared=False)
    trunk = sum(p.numel() for p in shared.trunks.parameters())
    assert (
        sum(p.numel() for p in separate.parameters()) - sum(p.numel() for p in shared.parameters())
        == 2 * trunk
    )
    separate.embed("image", inputs_of()["image"])[0].sum().backward()
    touched = {name.split(".")[1] for name, p in separate.named_parameters() if p.grad is not None}
    assert touched == {"image"}
    same = model_of(shared=False)
    same.modalities.load_state_dict(shared.modalities.state_dict())
    for blocks in same.trunks.values():
        blocks.load_state_dict(shared.trunks["shared"].state_dict())
    for name, e in same(inputs_of())[0].items():
        near(e, model_of()(inputs_of())[0][name])  # three equal trunks are one


def test_fp64_stays_and_autocast_gives_fp32():
    model, inputs = model_of(), inputs_of()
    assert {e.dtype for e in model(inputs)[0].values()} == {torch.float64}
    wide = model(inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.float()(
            {name: x if name == "text" else x.float() for name, x in inputs.items()}
        )[0]
    for name, e in rounded.items():
        assert (
            e.dtype == torch.float32 and 1e-5 < (e - wide[name]).norm() / wide[name].norm() < 0.05
        )


# ---- what it costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_the_flops_are_those_that_are_counted(shared):
    model = model_of(shared=shared).train()
    inputs = inputs_of(3) | {"text": torch.ones(3, 12, dtype=torch.long)}  # the longest texts
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    pairs = (
        12**2 + 4**2 + 3**2
    )  # of tokens that read each other: PyTorch's fused kernel is not counted on a CPU
    counted = counter.get_total_flops() / 3 + 2 * 4 * 16 * pairs  # of an item, forward; two layers
    assert 3 * counted == pytest.approx(
        model.flops_per_example(), rel=1e-9
    )  # backward: twice forward
    assert model.tokens_per_example() == {"text": 12, "image": 4, "audio": 3}


def test_idle_experts_are_counted_in_all_and_not_as_active():
    for shared, trunks in ((True, 1), (False, 3)):
        total, active = model_of(EXPERTS, shared=shared).count_parameters()
        assert (
            total - active == trunks * 2 * 2 * 2 * 4 * 16**2
        )  # layers, idle experts, matrices, hidden ratio x width^2
        assert total == sum(p.numel() for p in model_of(EXPERTS, shared=shared).parameters())


# ---- more modalities, and those that cannot be -------------------------------------------------------------------------------


class Touch(Modality):
    """Eight pressures, each a token."""

    def __init__(self, trunk, config):
        super().__init__(trunk, config.width, 8)
        self.patch = nn.Linear(1, trunk.n_embd, bias=False)

    def tokens(self, x):
        return self.patch(x[..., None]), None


def test_a_fourth_modality_is_a_class_and_a_line(monkeypatch):
    monkeypatch.setitem(multimodal.MODALITIES, "touch", Touch)
    model = model_of(modalities=("text", "touch"))
    embeddings, _ = model(
        {"text": inputs_of()["text"], "touch": torch.rand(5, 8, dtype=torch.float64)}
    )
    assert embeddings["touch"].shape == (5, 6) and model.config.pair_weights() == {
        ("text", "touch"): 1.0
    }
    assert model.flops_per_example() > 0 and len(model.trunks) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ("text", "smell")}, "no smell; there are text, image, audio"),
        ({"modalities": ("text", "text")}, "at least two, each once"),
        ({"modalities": ("text",)}, "at least two"),
        ({"pairs": ("text-smell",)}, "no text-smell; there are audio-image"),
        ({"patch_size": 3}, "patch_size = 3 does not divide image_size = 8"),
        ({"patch_frames": 0}, "patch_frames = 0 does not divide"),
        ({"width": 0}, "width = 0"),
        ({"temperature": 0.001}, "temperature = 0.001 at least 0.01"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient = -1.0"),
        ({"min_experts": float("nan")}, "min_experts = nan"),
    ],
)
def test_ends_that_cannot_be_are_refused_with_the_mend(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(ENDS, **changes)


def test_trunks_that_cannot_be_are_refused_with_the_mend():
    with pytest.raises(ValueError, match=r"attention.kind = block: .* take dense"):
        model_of(replace(TRUNK, attention=AttentionConfig("block")))
    with pytest.raises(ValueError, match="heads of width 2: images need a multiple of 4"):
        model_of(replace(TRUNK, n_head=8))
    with pytest.raises(ValueError, match="13 tokens, where there is room for 12"):
        model_of().embed("text", torch.ones(1, 13, dtype=torch.long))


def test_pairs_are_all_or_those_named():
    assert list(ENDS.pair_weights()) == [("text", "image"), ("text", "audio"), ("image", "audio")]
    assert replace(ENDS, pairs=("audio-text",)).pair_weights() == {("audio", "text"): 1.0}
