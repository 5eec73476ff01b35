"""V3's model: what embeddings depend on, what is shared, what it costs, how to add a modality."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nanods import multimodal
from nanods.attention import AttentionConfig
from nanods.gpt import GPTConfig, apply_rope, rope_cos_sin
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
MOE_TRUNK = replace(TRUNK, moe=MoEConfig(n_expert=4))
CONFIG = MultimodalConfig(
    ("text", "image", "audio"), width=6, image_size=8, patch_size=4, frames=6, patch_frames=2
)


def make_model(trunk=TRUNK, **changes):
    """Build a model in fp64 whose output projections are not zero.

    With zero output projections, as at initialisation, the trunk would return its input unchanged.
    """
    torch.manual_seed(0)
    model = Multimodal(trunk, replace(CONFIG, **changes)).double()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_inputs(B=5, seed=1):
    """Return random inputs of the three modalities; the texts have different lengths."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 20, (B, 9), generator=generator)
    for row, length in zip(text, (9, 1, 4, 7, 9), strict=False):
        row[length:] = -1
    image = torch.rand(B, 3, 8, 8, generator=generator, dtype=torch.float64)
    audio = torch.rand(B, 32, 6, generator=generator, dtype=torch.float64)
    return {"text": text, "image": image, "audio": audio}


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trunk", [TRUNK, MOE_TRUNK])
@pytest.mark.parametrize("shared", [True, False])
def test_embeddings_have_unit_length_and_depend_on_their_own_example_alone(trunk, shared):
    model, inputs = make_model(trunk, shared=shared), make_inputs()
    embeddings, stats = model(inputs)
    assert list(embeddings) == list(stats) == ["text", "image", "audio"]
    other = make_inputs(seed=2)
    for name, e in embeddings.items():
        assert e.shape == (5, 6) and len(stats[name]) == 2
        assert_close(e.norm(dim=1), torch.ones(5, dtype=torch.float64))
        assert (e[0] - e[1:]).norm(dim=1).min() > 1e-3, "embeddings of different inputs differ"
        mixed = torch.cat([inputs[name][2:3], other[name][3:4, : inputs[name].size(1)]])
        assert_close(model.embed(name, mixed)[0][0], e[2])


def test_padding_changes_nothing_and_reaches_no_expert():
    model, text = make_model(MOE_TRUNK), make_inputs()["text"]
    e, stats = model.embed("text", text)
    padded = torch.cat([text, torch.full((5, 3), -1)], dim=1)
    padded_e, padded_stats = model.embed("text", padded)
    assert_close(padded_e, e)
    assert_close(model.embed("text", text[2:3, :4])[0], e[2:3])  # without padding, on its own
    n_tokens = (text >= 0).sum()
    for a, b in zip(stats, padded_stats, strict=True):
        assert a["load"].sum() == b["load"].sum() == 2 * n_tokens
        assert_close(a["balance_loss"], b["balance_loss"])
        assert_close(a["token_entropy"], b["token_entropy"])


# ---- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dimension"), [("text", 1), ("image", 3), ("image", 2), ("audio", 2)]
)
def test_the_order_of_tokens_matters_along_each_axis(name, dimension):
    """Reverse the text, the columns and rows of an image, and the frames of audio."""
    model, x = make_model(), make_inputs()[name][[0, 4]]  # two texts without padding
    difference = model.embed(name, x)[0] - model.embed(name, x.flip(dimension))[0]
    assert difference.norm(dim=1).min() > 1e-3


def test_rope_alone_makes_the_order_matter():
    """Without position embeddings RoPE distinguishes two orders; without both nothing does."""
    model, text = make_model(), make_inputs()["text"][:1]
    nn.init.zeros_(model.modalities["text"].position_embedding)
    difference = model.embed("text", text.flip(1))[0] - model.embed("text", text)[0]
    assert difference.norm() > 1e-3
    model.modalities["text"].sin.zero_()
    model.modalities["text"].cos.fill_(1)
    assert_close(model.embed("text", text.flip(1))[0], model.embed("text", text)[0])


def test_every_token_attends_to_every_other():
    model, x = make_model(), make_inputs()["image"]
    tokens, rope, _ = model.modalities["image"].prepare(x)
    rope = tuple(table.double() for table in rope)
    block = model.trunks["shared"][0]
    before = block(tokens, None, rope)[0]
    for i in (0, 3):
        changed = tokens.clone()
        changed[:, i] += 1
        after = block(changed, None, rope)[0]
        assert (after - before).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("side", [4, 2, 1])
def test_an_image_token_sees_its_patch_and_half_a_patch_around(side):
    image = make_model(patch_size=side).modalities["image"]
    x = make_inputs()["image"][:1].requires_grad_()
    n = 8 // side  # patches along each axis
    for token in (0, n + 1 if side < 8 else 0, n**2 - 1):
        (gradient,) = torch.autograd.grad(image.tokens(x)[0][0, token].sum(), x)
        visible = torch.zeros(8 + 2 * side, 8 + 2 * side, dtype=torch.bool)  # margin of one patch
        row, column = divmod(token, n)
        top, left = (index * side + side - side // 2 for index in (row, column))
        visible[top : top + 2 * side, left : left + 2 * side] = True
        visible = visible[side:-side, side:-side]
        assert torch.equal(gradient[0].abs().amax(dim=0) > 0, visible)


def test_an_audio_token_sees_its_own_frames_alone():
    audio, mels = make_model().modalities["audio"], make_inputs()["audio"]
    changed = mels.clone()
    changed[:, :, 2:4] += 1  # the frames of the second of three tokens
    change = audio.tokens(changed)[0] - audio.tokens(mels)[0]
    assert change[:, 1].abs().min() > 0 and not change[:, [0, 2]].any()


def test_grid_rope_on_one_axis_is_rope():
    expected = rope_cos_sin(torch.arange(9)[None], 8, torch.float32, multimodal.GRID_BASE)
    for table, expected_table in zip(grid_rope((9,), 8), expected, strict=True):
        assert torch.equal(table, expected_table)


def test_grid_rope_scores_depend_on_the_offset_along_each_axis():
    rope = grid_rope((4, 5), 8)
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    queries = apply_rope(q.expand(1, 1, 20, 8), rope)[0, 0]
    keys = apply_rope(k.expand(1, 1, 20, 8), rope)[0, 0]
    scores = (queries @ keys.T).view(4, 5, 4, 5)  # row and column of the query, then of the key
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[1, 3, 3, 4])
    torch.testing.assert_close(scores[3, 2, 1, 4], scores[2, 0, 0, 2])
    assert (scores[0, 0, 2, 1] - scores[0, 0, 1, 2]).abs() > 1e-2


# ---- the trunk -----------------------------------------------------------------------------------


def test_shared_is_one_trunk_and_separate_is_three():
    shared, separate = make_model(), make_model(shared=False)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, separate)]
    trunk_size = sum(p.numel() for p in shared.trunks.parameters())
    assert sizes[1] - sizes[0] == 2 * trunk_size
    separate.embed("image", make_inputs()["image"])[0].sum().backward()
    with_gradient = {
        name.split(".")[1] for name, p in separate.named_parameters() if p.grad is not None
    }
    assert with_gradient == {"image"}


def test_separate_trunks_with_equal_weights_equal_a_shared_one():
    shared, separate = make_model(), make_model(shared=False)
    separate.modalities.load_state_dict(shared.modalities.state_dict())
    for blocks in separate.trunks.values():
        blocks.load_state_dict(shared.trunks["shared"].state_dict())
    expected = shared(make_inputs())[0]
    for name, e in separate(make_inputs())[0].items():
        assert_close(e, expected[name])


def test_fp64_stays_fp64_and_autocast_gives_fp32():
    model, inputs = make_model(), make_inputs()
    exact = model(inputs)[0]
    assert {e.dtype for e in exact.values()} == {torch.float64}
    single = {name: x if name == "text" else x.float() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.float()(single)[0]
    for name, e in rounded.items():
        assert e.dtype == torch.float32
        assert 1e-5 < (e - exact[name]).norm() / exact[name].norm() < 0.05


# ---- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_flops_per_example_equals_pytorchs_count(shared):
    model = make_model(shared=shared).train()
    inputs = make_inputs(3) | {"text": torch.ones(3, 12, dtype=torch.long)}  # the longest texts
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    # PyTorch does not count the fused attention kernel on a CPU: add it, for two layers.
    token_pairs = 12**2 + 4**2 + 3**2
    forward_flops = counter.get_total_flops() / 3 + 2 * 4 * 16 * token_pairs
    # The backward pass costs twice the forward pass.
    assert 3 * forward_flops == pytest.approx(model.flops_per_example(), rel=1e-9)
    assert model.tokens_per_example() == {"text": 12, "image": 4, "audio": 3}


def test_idle_experts_count_in_total_but_not_as_active_parameters():
    for shared, trunks in ((True, 1), (False, 3)):
        model = make_model(MOE_TRUNK, shared=shared)
        total, active = model.count_parameters()
        # layers x idle experts x matrices x hidden ratio x width^2
        assert total - active == trunks * 2 * 2 * 2 * 4 * 16**2
        assert total == sum(p.numel() for p in model.parameters())


# ---- more modalities -----------------------------------------------------------------------------


class Touch(Modality):
    """Eight pressures, one token each."""

    input_field = "pressures"

    def __init__(self, trunk, config):
        super().__init__(trunk, config.width, 8)
        self.patch = nn.Linear(1, trunk.n_embd, bias=False)

    def tokens(self, x):
        return self.patch(x[..., None]), None


class Video(Modality):
    """Eight frames of 4 x 4 pixels: tokens of 2 x 2 x 2 pixels on a grid with three axes."""

    input_field = "videos"

    def __init__(self, trunk, config):
        super().__init__(trunk, config.width, 4, 2, 2)
        self.out = nn.Linear(3 * 2**3, trunk.n_embd, bias=False)  # a name that the trunk uses, too

    def tokens(self, x):
        """x (B, F, 3, Y, X) -> (B, T, C)."""
        B = len(x)
        x = x.view(B, 4, 2, 3, 2, 2, 2, 2).permute(0, 1, 4, 6, 2, 3, 5, 7)
        return self.out(x.reshape(B, 16, 24)), None


def test_a_fourth_modality_is_a_class_and_an_entry(monkeypatch):
    monkeypatch.setitem(multimodal.MODALITIES, "touch", Touch)
    model = make_model(modalities=("text", "touch"))
    pressures = torch.rand(5, 8, dtype=torch.float64)
    embeddings, _ = model({"text": make_inputs()["text"], "touch": pressures})
    assert embeddings["touch"].shape == (5, 6)
    assert model.config.pair_weights() == {("text", "touch"): 1.0}
    assert model.flops_per_example() > 0 and len(model.trunks) == 1


def test_a_modality_on_three_axes(monkeypatch):
    monkeypatch.setitem(multimodal.MODALITIES, "video", Video)
    trunk = replace(TRUNK, n_embd=192, n_head=4)  # heads of width 48
    torch.manual_seed(0)
    model = Multimodal(trunk, replace(CONFIG, modalities=("text", "image", "audio", "video")))
    assert model.modalities["video"].cos.shape == (1, 1, 16, 24)
    assert model.tokens_per_example()["video"] == 16
    weight = model.modalities["video"].out.weight
    assert weight.std().item() == pytest.approx(24**-0.5, rel=0.1), "initialised, not set to zero"
    videos = torch.rand(5, 8, 3, 4, 4)
    inputs = {name: x if name == "text" else x.float() for name, x in make_inputs().items()}
    embeddings, _ = model(inputs | {"video": videos})
    assert embeddings["video"].shape == (5, 6)
    for dimension in (1, 3, 4):  # time, height, width
        difference = model.embed("video", videos.flip(dimension))[0] - embeddings["video"]
        assert difference.norm(dim=1).min() > 1e-3


# ---- configurations that are refused -------------------------------------------------------------


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
        ({"temperature": 0.001}, "temperature = 0.001 must be at least 0.01"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient = -1.0"),
        ({"min_experts": float("nan")}, "min_experts = nan"),
    ],
)
def test_impossible_configurations_are_refused_with_a_suggestion(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_impossible_trunks_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"attention.kind = block: .* take dense"):
        make_model(replace(TRUNK, attention=AttentionConfig("block")))
    with pytest.raises(ValueError, match="13 tokens: this model has positions for 12"):
        make_model().embed("text", torch.ones(1, 13, dtype=torch.long))


def test_each_modality_refuses_head_widths_that_its_axes_cannot_divide(monkeypatch):
    monkeypatch.setitem(multimodal.MODALITIES, "video", Video)
    narrow = replace(TRUNK, n_head=8)  # heads of width 2
    message = (
        "heads of width 2: tokens on a grid of 2 x 2 need a multiple of 4, .* n-head or n-embd"
    )
    with pytest.raises(ValueError, match=message):
        make_model(narrow)
    assert len(make_model(narrow, modalities=("text", "audio")).modalities) == 2
    make_model(modalities=("text", "image"))  # heads of width 8
    message = "heads of width 8: tokens on a grid of 4 x 2 x 2 need a multiple of 6"
    with pytest.raises(ValueError, match=message):
        make_model(modalities=("text", "image", "video"))


def test_pairs_are_all_by_default_or_those_named():
    pairs = [("text", "image"), ("text", "audio"), ("image", "audio")]
    assert list(CONFIG.pair_weights()) == pairs
    assert replace(CONFIG, pairs=("audio-text",)).pair_weights() == {("audio", "text"): 1.0}
