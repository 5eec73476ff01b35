"""The trunk: cached decoding equals the full forward, no output depends on later tokens or other
rows, and the counts are right."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanods.config import PRESETS
from nanods.gpt import (
    GPT,
    Attention,
    AttentionConfig,
    GPTConfig,
    apply_rope,
    rms_norm,
    rope_cos_sin,
    sample_token,
)
from nanods.moe import MoEConfig
from nanods.moe_kernel import squared_relu

DENSE = GPTConfig(n_layer=2, n_head=2, n_embd=16, context_length=24, vocab_size=50)
CONFIGS = {
    "dense": DENSE,
    "topk": replace(DENSE, attention=AttentionConfig("topk", top_k=5)),
    **{
        f"{method}-{pool}": replace(
            DENSE, attention=AttentionConfig("block", 5, 4, 2, method, pool)
        )
        for method in ("flat", "tile", "tree", "window")
        for pool in ("mean", "bound")
    },
    "convolution": replace(DENSE, conv_width=4),
    "experts": replace(DENSE, moe=MoEConfig(n_expert=4, top_k=2)),
    "sparse experts": replace(
        DENSE,
        attention=AttentionConfig("block", block_size=4, top_blocks=2),
        moe=MoEConfig(n_expert=5, top_k=1, normalise=False),
    ),
}


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = GPT(config).double()
    for p in model.parameters():  # weights that start at zero would hide mistakes
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return model_of(CONFIGS[request.param])


def tokens_of(B, T, seed=1):
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_later_tokens_change_nothing(model):
    tokens = tokens_of(2, 24)
    before, _ = model(tokens)
    for p in range(1, 24):
        changed = tokens.clone()
        changed[:, p:] = tokens_of(2, 24 - p, seed=100 + p)
        after, _ = model(changed)
        assert (before[:, :p] - after[:, :p]).abs().max() <= 1e-12
        assert (before[:, p:] - after[:, p:]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_of_a_batch_do_not_influence_each_other(model):
    tokens = tokens_of(3, 24)
    changed = tokens.clone()
    changed[1:] = tokens_of(2, 24, seed=9)
    assert (model(tokens)[0][0] - model(changed)[0][0]).abs().max() <= 1e-12
    assert (model(tokens)[0][:1] - model(tokens[:1])[0]).abs().max() <= 1e-12


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_at_every_length(model):
    tokens = tokens_of(2, 24)
    full, _ = model(tokens)
    for prefix in range(1, 25):
        cache = model.new_cache(2)
        logits, _ = model(tokens[:, :prefix], cache)
        assert (logits - full[:, :prefix]).abs().max() <= 1e-10
        for t in range(prefix, 24):
            logits, _ = model(tokens[:, t : t + 1], cache)
            assert (logits[:, 0] - full[:, t]).abs().max() <= 1e-10


@torch.no_grad()
def test_a_prompt_read_in_chunks_equals_the_full_forward(model):
    tokens = tokens_of(2, 24)
    full, _ = model(tokens)
    for first, second in ((5, 3), (8, 7), (4, 13)):
        cache = model.new_cache(2)
        pieces = [
            model(part, cache)[0]
            for part in tokens.split([first, second, 24 - first - second], dim=1)
        ]
        assert (torch.cat(pieces, dim=1) - full).abs().max() <= 1e-10


@torch.no_grad()
def test_prompts_of_different_lengths_decode_as_each_does_alone(model):
    tokens, lengths = tokens_of(3, 24), torch.tensor([3, 11, 7])
    full, _ = model(tokens)
    cache = model.new_cache(3)
    padded = tokens[:, :11].masked_fill(torch.arange(11) >= lengths[:, None], 0)
    model(padded, cache, lengths)
    for step in range(10):
        at = lengths + step
        logits, _ = model(tokens.gather(1, at[:, None]), cache)
        assert (logits[:, 0] - full[torch.arange(3), at]).abs().max() <= 1e-10


def generate(model, prompts, n, **options):
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.tensor([p + [0] * (int(lengths.max()) - len(p)) for p in prompts])
    return torch.stack(list(model.generate(padded, n, lengths, **options)), dim=1).tolist()


def test_generation_is_the_same_alone_and_in_a_batch_past_the_context(model):
    prompts = [tokens_of(1, n, seed=n)[0].tolist() for n in (3, 20, 9)]
    together = generate(model, prompts, 40, seed=5)
    assert (
        generate(model, prompts[:1], 40, seed=5)[0] == together[0]
    )  # row b has the stream (seed, b)
    assert generate(model, prompts, 40, seed=6) != together
    greedy = generate(model, prompts, 40, temperature=0)
    for prompt, row in zip(prompts, greedy, strict=True):
        assert generate(model, [prompt], 40, temperature=0)[0] == row


def test_greedy_generation_equals_recomputing_the_whole_context(model):
    text = tokens_of(1, 5)[0].tolist()
    made = generate(model, [text], 40, temperature=0)[0]
    context = list(text)
    for token in made:
        if len(context) > 24:  # as documented: the last half is kept
            context = context[-12:]
        logits, _ = model(torch.tensor([context]))
        assert logits[0, -1].argmax() == token
        context.append(token)


def test_stop_tokens_end_a_row_and_then_the_generation(model):
    prompts = [[1, 2, 3], [4, 5, 6]]
    free = generate(model, prompts, 12, temperature=0)
    stop = free[0][4]
    made = generate(model, prompts, 12, temperature=0, stop=[stop])
    for stopped, row in zip(made, free, strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert stopped[:end] == row[:end][: len(stopped)]
        assert set(stopped[end:]) <= {-1}


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.05, 0.3, 0.15]]))

    def drawn(**options):
        stream = [torch.Generator().manual_seed(0)]
        return {
            int(
                sample_token(
                    logits, options.get("t", 1.0), options.get("k"), options.get("p"), stream
                )
            )
            for _ in range(300)
        }

    assert drawn() == {0, 1, 2, 3}
    assert drawn(k=2) == {0, 2}
    assert drawn(p=0.6) == {0, 2}
    assert drawn(p=0.01) == {0}
    assert drawn(t=0) == {0}
    assert drawn(k=3, p=0.9) == {0, 2, 3} or drawn(k=3, p=0.9) == {0, 2}


def test_rope_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(at_q, at_k):
        turned = [
            apply_rope(x, rope_cos_sin(torch.tensor([[at]]), 8, x.dtype, 1000.0))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum()

    assert max(abs(score(5 + s, 2 + s) - score(5, 2)) for s in (1, 100)) < 1e-12
    assert abs(score(6, 2) - score(5, 2)) > 1e-6


def test_a_new_model_is_uniform_and_its_blocks_are_the_identity():
    logits, _ = GPT(DENSE)(tokens_of(1, 8))
    assert logits.abs().max() == 0


@pytest.mark.parametrize("name", ["norm", "longer norm", "squared ReLU"])
def test_handwritten_gradients_equal_autograds(name):
    function, naive = {
        "norm": (rms_norm, lambda x: x / x.square().mean(-1, keepdim=True).sqrt()),
        "longer norm": (
            lambda x: rms_norm(x, 3.0),
            lambda x: 3 * x / x.square().mean(-1, keepdim=True).sqrt(),
        ),
        "squared ReLU": (squared_relu, lambda x: x.relu().square()),
    }[name]
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    y, plain = function(x), naive(x)
    assert y.dtype == torch.float64 and (y - plain).abs().max() < 1e-14
    assert torch.autograd.gradcheck(function, x)
    g = torch.randn_like(x)
    (ours,), (theirs,) = (
        torch.autograd.grad(y, x, g, create_graph=True),
        torch.autograd.grad(plain, x, g),
    )
    assert (ours - theirs).abs().max() < 1e-14
    assert not ours.requires_grad  # a second derivative is refused


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_vector_of_zeros_is_normalised_to_zeros(dtype):
    x = torch.zeros(2, 16, dtype=dtype)
    x[1] = 1e-3  # small, but not zero
    x.requires_grad_()
    y = rms_norm(x)
    y.sum().backward()
    assert y.dtype == dtype and (y[0] == 0).all() and (y[1] - 1).abs().max() < 0.01
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_under_bf16_autocast_a_cpu_attends_in_fp32(kind, monkeypatch):
    model, tokens, seen = GPT(CONFIGS[kind]), tokens_of(2, 24), []
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    plain, _ = model(tokens)
    real = Attention.attend
    monkeypatch.setattr(
        Attention, "attend", lambda self, *args: (seen.append(args[:3]), real(self, *args))[1]
    )
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = model(tokens)
    assert rounded.dtype == torch.bfloat16 and {x.dtype for qkv in seen for x in qkv} == {
        torch.float32
    }
    if kind == "dense":  # rounding may select another block
        assert (rounded - plain).abs().max() < 0.1 * plain.abs().max()


def test_flops_agree_with_counting_them():
    config = replace(DENSE, n_embd=64, context_length=32)
    model = GPT(config)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # it does not count the fused kernel on a CPU
        logits, _ = model(tokens_of(1, 32))
        logits.sum().backward()
    pairs = (
        config.attention.pairs(32) / 32
    )  # read by each query, on average; the unfused kernel computes all 32
    expected = 32 * (model.flops_per_token() + 12 * config.n_layer * config.n_embd * (32 - pairs))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_pairs_agree_with_the_mask():
    from nanods.attention import block_mask
    from nanods.attention_selection import select_blocks

    q, k = torch.randn(2, 1, 1, 30, 4)
    config = AttentionConfig("block", block_size=4, top_blocks=2)
    mask = block_mask(q, k, select_blocks(q, k, 4, 2), 4, causal=True)
    assert config.pairs(30) == mask.sum()
    assert AttentionConfig().pairs(30) == 30 * 31 // 2
    assert AttentionConfig("topk", top_k=7).pairs(30) == sum(min(7, t + 1) for t in range(30))


@pytest.mark.parametrize("method", ["flat", "tile", "tree", "window"])
@torch.no_grad()
def test_stats_report_what_was_read(method):
    from nanods.attention import block_mask

    model = model_of(
        replace(
            DENSE, attention=AttentionConfig("block", block_size=4, top_blocks=2, method=method)
        )
    )
    _, stats = model(tokens_of(2, 22), inspect=True)
    for layer in stats:
        mask = block_mask(layer["q"], layer["k"], layer["blocks"], 4, causal=True)
        assert torch.allclose(
            layer["keys_read"], mask.double().mean(dim=(0, 2, 3)) * 22 * 22 / (22 * 23 / 2)
        )
        assert layer["flops"] >= layer["keys_read"].mean()
    assert "blocks" not in model(tokens_of(2, 22))[1][0]


def test_v1_tiny_reads_a_small_share_of_its_past():
    model = PRESETS["v1-tiny"].model
    T = model.context_length
    assert (model.attention.block_size, model.attention.top_blocks) == (16, 2)
    assert model.attention.pairs(T) <= 0.4 * T * (T + 1) / 2


def test_a_sequence_that_is_too_long_is_refused(model):
    with pytest.raises(ValueError, match="context_length"):
        model(tokens_of(1, 25))


def test_beam_and_fan_out_of_the_tree_reach_the_selection():
    """16 blocks under the default beam need no pyramid, so a tree is flat; a beam of one over pairs
    is not."""
    torch.manual_seed(0)
    flat = AttentionConfig("block", block_size=2, top_blocks=3)
    tokens, chosen = torch.randint(0, 61, (2, 32)), {}
    for name, attention in {
        "flat": flat,
        "tree": replace(flat, method="tree"),
        "narrow": replace(flat, method="tree", beam=1, fan_out=2),
    }.items():
        torch.manual_seed(1)
        model = GPT(
            GPTConfig(
                n_layer=1,
                n_head=2,
                n_embd=16,
                context_length=32,
                vocab_size=61,
                attention=attention,
            )
        )
        chosen[name] = model(tokens, inspect=True)[1][0]["blocks"]
    assert torch.equal(chosen["tree"], chosen["flat"])
    assert not torch.equal(chosen["narrow"], chosen["flat"])
