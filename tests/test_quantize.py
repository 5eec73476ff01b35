"""Quantisation: exact integers, no leaks between rows, and small losses."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanods import quantize as q
from nanods.config import PRESETS
from nanods.gpt import GPT, AttentionConfig, GPTConfig, MoEConfig
from nanods.moe import MoE
from nanods.multimodal import Multimodal

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32, "vocab_size": 64}
DENSE = GPTConfig(**SIZES)
MODELS = {
    "V0": DENSE,
    "V1": GPTConfig(**SIZES, attention=AttentionConfig("block", block_size=8, top_blocks=2)),
    "V2": GPTConfig(**SIZES, moe=MoEConfig(n_expert=4, top_k=2)),
}


def trained_like(config):
    """Return a model whose output matrices are not zero, as after training."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    for p in model.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.2)
    return model


# ---- rounding ------------------------------------------------------------------------------------


def test_a_worked_example():
    x = torch.tensor([[0.5, -1.0, 0.26], [0.0, 0.0, 0.0]])
    scale = q.grid_scale(x, bits=3)  # limit 3
    torch.testing.assert_close(scale, torch.tensor([[1 / 3], [1.0]]))
    # 0.5 / (1/3) = 1.5, and halves round to even.
    assert q.round_to_grid(x, scale, 3).tolist() == [[2, -3, 1], [0, 0, 0]]
    assert q.grid_scale(x, 3, axis=None).item() == pytest.approx(1 / 3)
    subnormal = torch.tensor([[1e-44, 0.0]])  # its scale would underflow to 0
    assert q.fake_quantize(subnormal, 8).tolist() == [[0, 0]]
    assert q.quantize_fp8(subnormal)[0].float().tolist() == [[0, 0]]


@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.floats(1e-30, 1e30))
@settings(max_examples=50, deadline=None)
def test_the_error_is_at_most_half_a_step(bits, seed, size):
    x = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= size
    scale = q.grid_scale(x, bits)
    integers = q.round_to_grid(x, scale, bits)
    assert integers.abs().max() <= q.grid_limit(bits)
    assert (integers == integers.round()).all()
    assert ((x - integers * scale).abs() <= scale / 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8"):
        q.grid_limit(bits)


def test_the_gradient_passes_straight_through():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 5, dtype=torch.float64)
    (q.fake_quantize(x, 4) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights, rtol=1e-12, atol=0)  # the definition: dy/dx = 1

    # A layer's gradient is the float layer's, taken at the rounded weights and activations.
    linear = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    fake = q.FakeQuantLinear.from_float(linear, weight_bits=3)
    fake(x).square().sum().backward()
    rounded_x = q.fake_quantize(x, 8).detach().requires_grad_()
    rounded_w = q.fake_quantize(linear.weight, 3).detach().requires_grad_()
    (rounded_x @ rounded_w.T).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, rounded_w.grad, rtol=1e-12, atol=0)


def test_a_fake_layer_holds_the_float_layers_own_parameters():
    linear = nn.Linear(8, 4)
    fake = q.FakeQuantLinear.from_float(linear, 4)
    assert fake.weight is linear.weight and fake.bias is linear.bias
    assert dict(fake.named_parameters()).keys() == dict(linear.named_parameters()).keys()


# ---- integer products ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["int8", "fp32", "fbgemm"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 16), (5, 1000, 24), (33, 4096, 8)])
def test_a_product_is_that_of_long_integers(kernel, rows, inputs, outputs):
    if kernel == "fbgemm" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("PyTorch has no FBGEMM here")
    limit = q.grid_limit(7)  # the 8 bits of some processors saturate
    a = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    b = torch.randint(-limit, limit + 1, (outputs, inputs), dtype=torch.int8)
    a[0], b[0], b[1] = 127, limit, -limit  # sums as large as they can be
    product = q.integer_product(a, b, kernel)
    assert product.dtype == (torch.float32 if kernel == "fbgemm" else torch.int32)
    assert torch.equal(product.long(), a.long() @ b.long().T)


def test_a_kernel_that_saturates_gets_7_bits_and_one_that_is_wrong_none(monkeypatch):
    def saturating(a, b):  # what CPUs without VNNI do: pairs are added in 16 bits
        pairs = a.int()[:, :, None] * b.int()[None]  # (N, C, F)
        pairs = pairs[:, 0::2] + pairs[:, 1::2]
        return pairs.clamp(-(2**15), 2**15 - 1).sum(dim=1, dtype=torch.int32)

    monkeypatch.setattr(q, "KERNELS", ("int8",))
    monkeypatch.setattr(q, "fastest_seconds", lambda call: 1.0)
    monkeypatch.setattr(torch, "_int_mm", saturating)
    kernel = q.choose_kernel.__wrapped__("cpu")
    assert kernel.name == "int8" and kernel.weight_bits == 7 and "saturates" in kernel.reason

    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.size(1)).int())
    kernel = q.choose_kernel.__wrapped__("cpu")
    assert kernel.name == "fp32" and "not exact" in kernel.reason

    def missing(a, b):
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch, "_int_mm", missing)
    kernel = q.choose_kernel.__wrapped__("cpu")
    assert kernel.name == "fp32" and "no int8 product" in kernel.reason


def test_a_slow_kernel_is_not_used(monkeypatch):
    monkeypatch.setattr(q, "KERNELS", ("int8",))
    seconds = iter([5.0, 1.0])
    monkeypatch.setattr(q, "fastest_seconds", lambda call: next(seconds))
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).int())
    kernel = q.choose_kernel.__wrapped__("cpu")
    assert kernel.name == "fp32" and "5 times as long" in kernel.reason


def test_fbgemm_is_taken_where_the_first_kernel_is_slow(monkeypatch):
    def product(a, b, kernel, b_sums=None, packed=None):
        return (a.long() @ b.long().T).int()

    monkeypatch.setattr(q, "integer_product", product)
    monkeypatch.setattr(q, "pack", lambda b: None)
    seconds = iter([50.0, 1.0, 0.5, 1.0])
    monkeypatch.setattr(q, "fastest_seconds", lambda call: next(seconds))
    kernel = q.choose_kernel.__wrapped__("cpu")
    assert kernel == (
        "fbgemm",
        8,
        "int8 takes 50 times as long as fp32 on this processor; fbgemm multiplies INT8 exactly",
    )


@pytest.mark.parametrize("kernel", ["fp32", "fbgemm"])
def test_a_layer_that_has_multiplied_takes_new_weights(monkeypatch, kernel):
    if kernel == "fbgemm" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("PyTorch has no FBGEMM here")
    monkeypatch.setattr(q, "choose_kernel", lambda device: q.Kernel(kernel, 7, "a test"))
    x = torch.randn(3, 32)
    first, second = (q.Int8Linear.from_float(nn.Linear(32, 16)) for _ in range(2))
    expected = second(x)
    assert not torch.equal(first(x), expected)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), expected)
    assert torch.equal(copy.deepcopy(first)(x), expected)


def test_weights_of_8_bits_are_not_given_to_a_kernel_of_7(monkeypatch):
    monkeypatch.setattr(q, "choose_kernel", lambda device: q.Kernel("int8", 7, "a test"))
    assert q.usable_kernel(torch.tensor([[63, -63]], dtype=torch.int8)) == "int8"
    assert q.usable_kernel(torch.tensor([[64, 0]], dtype=torch.int8)) == "fp32"


# ---- layers --------------------------------------------------------------------------------------


def test_int8_linear_is_the_fake_layer_bit_for_bit():
    linear = nn.Linear(48, 20)
    x = torch.randn(3, 7, 48)
    real = q.Int8Linear.from_float(linear)
    fake = q.FakeQuantLinear.from_float(linear, q.choose_kernel("cpu").weight_bits)
    rows, _ = q.quantize_rows(x.reshape(-1, 48))
    integers = q.round_to_grid(linear.weight, q.grid_scale(linear.weight, 8), 8)
    if q.choose_kernel("cpu").weight_bits == 8:  # the integer product, bit for bit
        product = q.integer_product(rows, real.weight, "fp32", real.sums)
        assert torch.equal(product.double(), rows.double() @ integers.double().T)
    assert torch.equal(real(x), fake(x))
    assert (real(x) - linear(x)).abs().mean() < 0.02 * linear(x).abs().mean()


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_no_row_changes_another(rows):
    linear = q.Int8Linear.from_float(nn.Linear(64, 32))
    x = torch.randn(40, 64)
    alone = linear(x[:rows])
    x[rows:] *= 1e6  # other requests, with outliers
    assert torch.equal(linear(x)[:rows], alone)


def test_one_scale_for_all_rows_lets_rows_change_each_other():
    """Why activations have one scale per row: this is what one scale per tensor does."""
    x = torch.randn(8, 16)
    alone = q.fake_quantize(x, 8, axis=None)[:4]
    x[4:] *= 100
    assert not torch.equal(q.fake_quantize(x, 8, axis=None)[:4], alone)
    torch.testing.assert_close(q.fake_quantize(x, 8)[:4], q.fake_quantize(x[:4], 8), rtol=0, atol=0)


def test_no_token_changes_another_through_int8_experts():
    layer = MoE(16, 64, MoEConfig(n_expert=4, top_k=2)).eval()
    converted = q.quantize(layer)
    rows, weights = torch.randn(30, 16), torch.rand(30, 2)
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(30)])  # 4: dropped
    output = converted.run_experts(rows, weights, experts, converted.up, converted.out)
    reference = torch.zeros_like(output)
    for n in range(30):
        for slot, e in enumerate(experts[n].tolist()):
            if e < 4:
                hidden = converted.up[e](rows[n : n + 1]).relu().square()
                reference[n] += weights[n, slot] * converted.out[e](hidden)[0]
    torch.testing.assert_close(output, reference, rtol=1e-6, atol=1e-6)
    changed = rows.clone()
    changed[10:] *= 1000
    after = converted.run_experts(changed, weights, experts, converted.up, converted.out)
    assert torch.equal(after[:10], output[:10])


def test_fp8_keeps_each_number_within_a_sixteenth():
    weight = torch.randn(40, 50) * torch.logspace(-6, 6, 40)[:, None]
    weight[3] = 0
    floats, scale = q.quantize_fp8(weight)
    assert floats.dtype == torch.float8_e4m3fn and floats.float().abs().max() == 448
    restored = floats.float() * scale[:, None]
    large = weight.abs() > weight.abs().amax(dim=1, keepdim=True) / 448 * 2**-6
    assert ((restored - weight).abs() <= weight.abs() / 16 + 1e-30)[large].all()
    assert (restored[3] == 0).all()


@pytest.mark.parametrize("layer", [q.Int8Linear, q.Fp8Linear])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(layer, value):
    weight = torch.randn(4, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="not all finite"):
        layer(weight)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("format", q.FORMATS)
def test_a_quantised_model_predicts_almost_the_same(version, format):
    model = trained_like(MODELS[version])
    converted = q.quantize(model, format)
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    expected, actual = (m(tokens)[0].log_softmax(dim=-1) for m in (model, converted))
    divergence = (expected.exp() * (expected - actual)).sum(dim=-1).mean()
    spread = expected.std()
    assert 0 < divergence < (0.02 if format == "int8" else 0.1) * spread
    assert not converted.training and not any(p.requires_grad for p in converted.parameters())
    assert model.head.weight.dtype == torch.float32, "the model itself is unchanged"


@pytest.mark.parametrize("version", MODELS)
def test_a_quantised_model_generates_with_its_cache_what_it_predicts_without(version):
    model = q.quantize(trained_like(MODELS[version]))
    prompt = torch.randint(64, (1, 6), generator=torch.Generator().manual_seed(2))
    generated = [int(t) for t in model.generate(prompt, 12, temperature=0)]
    text = prompt
    for token in generated:
        assert int(model(text)[0][0, -1].argmax()) == token
        text = torch.cat([text, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("version", ["V0", "V2"])
def test_real_and_fake_int8_have_the_same_loss(version):
    """Prepare is not convert in many tools: what was trained is then not what is run."""
    model = trained_like(MODELS[version])
    real, fake = q.quantize(model), copy.deepcopy(model)
    q.fake_quantize_model(fake, q.choose_kernel("cpu").weight_bits)
    tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(3))
    losses = [
        nn.functional.cross_entropy(m(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        for m in (real, fake)
    ]
    assert abs(losses[0] - losses[1]) < 1e-6


@pytest.mark.parametrize("format", q.FORMATS)
def test_saved_and_loaded_it_gives_the_same_bits(format, tmp_path):
    from safetensors.torch import load_file, save_file

    converted = q.quantize(trained_like(MODELS["V2"]), format)
    save_file(converted.state_dict(), tmp_path / "model.safetensors")
    other = q.quantize(GPT(MODELS["V2"]), format)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    tokens = torch.randint(64, (2, 20))
    assert torch.equal(converted(tokens)[0], other(tokens)[0])
    assert torch.equal(copy.deepcopy(converted)(tokens)[0], converted(tokens)[0])


def test_what_stays_in_fp32():
    converted = q.quantize(trained_like(MODELS["V2"]))
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in converted.named_parameters()}
    assert kept == {"embedding", "gate"}


def test_at_least_95_percent_of_v2_tiny_is_quantised():
    config = PRESETS["v2-tiny"].model
    assert q.quantized_share(q.quantize(GPT(config), "fp8")) >= 0.95
    assert q.quantized_share(GPT(DENSE)) == 0


def test_v3_is_quantised_and_keeps_its_temperature():
    config = PRESETS["v3-tiny"]
    torch.manual_seed(0)
    model = Multimodal(config.model, config.multimodal).eval()
    converted = q.quantize(model)
    assert torch.equal(converted.temperature(), model.temperature())
    inputs = {"image": torch.rand(3, 3, 32, 32), "audio": torch.randn(3, 32, 32)}
    expected, actual = model(inputs)[0], converted(inputs)[0]
    for name in inputs:
        assert (expected[name] * actual[name]).sum(dim=-1).min() > 0.995  # cosine


def test_training_moves_the_rounded_model():
    torch.manual_seed(0)
    model = trained_like(MODELS["V2"]).train()
    q.fake_quantize_model(model, weight_bits=4)
    tokens = torch.randint(64, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        logits, _ = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("model", [GPT(DENSE)])
def test_wrong_requests_are_refused(model):
    with pytest.raises(ValueError, match="format 'int5': choose int8 or fp8"):
        q.quantize(model, "int5")
    with pytest.raises(ValueError, match="quantised already"):
        q.quantize(q.quantize(model), "fp8")
