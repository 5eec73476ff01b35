"""The grader of lesson 00 accepts every correct implementation, and its references are those of
nanods."""

from dataclasses import replace

import pytest
import steps_00
import torch
import torch.nn.functional as F

from nanods.build import build_meta_model
from nanods.config import PRESETS
from nanods.distributed.mesh import Mesh
from nanods.gpt import GPT, Attention, GPTConfig, apply_rope, rms_norm, rope_cos_sin
from nanods.planner.cost import memory_per_gpu
from nanods.planner.memory import model_cost, step_config
from nanods.training.muon import orthogonalise
from tests.lessons.wrong_answers import equal_pairs, grade_answer

# ---- other right answers -------------------------------------------------------------------------


def norm_by_torch(x, gain):
    return gain * F.rms_norm(x, x.shape[-1:])


def norm_by_length(x, gain):
    return F.normalize(x, dim=-1) * (gain * x.shape[-1] ** 0.5)


def norm_with_epsilon(x, gain):
    return x * (torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-5) * gain)


def norm_by_einsum(x, gain):
    square = torch.einsum("...c,...c->...", x, x) / x.size(-1)
    return torch.einsum("...c,...->...c", x, gain / (square + 1e-8).sqrt())


def norm_by_rows(x, gain):
    rows = []
    for row in x.reshape(-1, x.size(-1)):
        size = sum(number * number for number in row) / len(row)
        rows.append(row * gain / torch.sqrt(size + 1e-9))
    return torch.stack(rows).view_as(x)


def norm_as_view(x, gain):
    y = gain * x.mT / x.mT.square().mean(-2, keepdim=True).add(1e-10).sqrt() if x.ndim > 1 else None
    return norm_by_torch(x, gain) if y is None else y.mT  # not contiguous


def rope_by_complex_numbers(x, positions, base):
    D = x.size(-1)
    frequency = 1.0 / base ** (torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones(len(positions), D // 2).double(), positions[:, None] * frequency)
    y = torch.complex(*(half.double() for half in x.chunk(2, dim=-1))) * turn
    return torch.cat([y.real, y.imag], dim=-1).to(x.dtype)


def rope_by_rotating_halves(x, positions, base):
    """Write it as in GPT-NeoX: x cos + rotate_half(x) sin."""
    D = x.size(-1)
    frequency = torch.exp(-torch.log(torch.tensor(base)) * torch.arange(0, D, 2).double() / D)
    angle = torch.outer(positions.double(), frequency).repeat(1, 2)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    half = torch.cat((-b, a), dim=-1)
    return (x * angle.cos() + half * angle.sin()).to(x.dtype)


def rope_by_matrices(x, positions, base):
    D = x.size(-1)
    y = torch.zeros_like(x)
    for t, p in enumerate(positions.tolist()):
        R = torch.zeros(D, D, dtype=x.dtype)
        for i in range(D // 2):
            angle = torch.tensor(p * base ** (-2 * i / D), dtype=torch.float64)
            R[i, i] = R[i + D // 2, i + D // 2] = angle.cos()
            R[i, i + D // 2], R[i + D // 2, i] = -angle.sin(), angle.sin()
        y[:, :, t] = x[:, :, t] @ R.T
    return y


def rope_by_loops(x, positions, base):
    D, columns = x.size(-1), [None] * x.size(-1)
    for i in range(D // 2):
        angle = positions * base ** (-2 * i / D)
        cos, sin = angle.double().cos().to(x), angle.double().sin().to(x)
        a, b = x[..., i], x[..., i + D // 2]
        columns[i], columns[i + D // 2] = a * cos - b * sin, b * cos + a * sin
    return torch.stack(columns, dim=-1)


def rope_by_views(x, positions, base):
    pairs = x.unflatten(-1, (2, -1))  # (B, H, T, 2, D/2)
    frequency = base ** -torch.linspace(0, 1, x.size(-1) // 2 + 1).double()[:-1]
    angle = (positions[:, None, None] * frequency).to(torch.float64)
    turned = pairs * angle.cos() + torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], -2) * (
        angle.sin()
    )
    return turned.flatten(-2).to(x.dtype)


def attention_by_torch(q, k, v, gain):
    q, k = rms_norm(q, gain), rms_norm(k)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_with_gain_on_keys(q, k, v, gain):
    """The product of both sizes alone counts."""
    D = q.size(-1)
    scores = F.normalize(q, dim=-1) @ F.normalize(gain * D * k, dim=-1).mT * (gain * D**0.5)
    mask = torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype).triu(1)
    return torch.softmax(scores + mask, dim=-1) @ v


def attention_by_rows(q, k, v, gain):
    q, k = F.rms_norm(q, q.shape[-1:]) * gain, F.rms_norm(k, k.shape[-1:])
    rows = []
    for t in range(q.size(2)):
        scores = (k[:, :, : t + 1] @ q[:, :, t, :, None]) / q.size(-1) ** 0.5
        rows.append((scores.softmax(2) * v[:, :, : t + 1]).sum(2))
    return torch.stack(rows, dim=2)


def attention_by_einsum(q, k, v, gain):
    T, D = q.shape[-2:]
    norms = [torch.einsum("bhtd,bhtd->bht", x, x)[..., None].div(D).sqrt() for x in (q, k)]
    scores = torch.einsum("bhtd,bhsd->bhts", gain * q / norms[0], k / norms[1]) / D**0.5
    past = torch.arange(T)[:, None] >= torch.arange(T)
    return torch.einsum("bhts,bhsd->bhtd", scores.where(past, -torch.inf).softmax(-1), v)


def attention_by_exponentials(q, k, v, gain):
    """QK-norm bounds the scores, so exp needs no maximum here."""
    D = q.size(-1)
    q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in (q, k))
    weights = (gain * D**-0.5 * q @ k.transpose(-2, -1)).exp().tril()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def orthogonal_transposed(G, steps):
    """The smaller product: transpose a tall matrix first."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


def orthogonal_from_the_right(G, steps):
    """(X X^T) X is X (X^T X)."""
    X = G / G.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-9)
    for _ in range(steps):
        A = X.transpose(-2, -1) @ X
        X = 3.4445 * X + X @ (-4.7750 * A + 2.0315 * A @ A)
    return X


def orthogonal_by_singular_values(G, steps):
    """Each step is the polynomial of each singular value."""
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s[..., None, :]) @ V


def orthogonal_one_by_one(G, steps):
    if G.ndim > 2:
        return torch.stack([orthogonal_one_by_one(matrix, steps) for matrix in G])
    X = F.normalize(G.flatten(), dim=0).view(G.shape)
    for _ in range(steps):
        X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
    return X


def orthogonal_by_einsum(G, steps):
    X = G / torch.linalg.matrix_norm(G, "fro", keepdim=True).add(1e-8)
    for _ in range(steps):
        A = torch.einsum("...rc,...sc->...rs", X, X)
        AX = torch.einsum("...rs,...sc->...rc", A, X)
        X = 3.4445 * X - 4.7750 * AX + 2.0315 * torch.einsum("...rs,...sc->...rc", A, AX)
    return X


def flops_by_loops(V, C, n_layer, hidden_ratio, T):
    total = 0
    for t in range(T):
        for _ in range(n_layer):
            total += 4 * C * (t + 1)  # q . k, and weight * v
            total += 2 * (4 * C * C + 2 * C * hidden_ratio * C)
        total += 2 * V * C
    return torch.tensor(3.0 * total / T)


def flops_in_fp32(V, C, n_layer, hidden_ratio, T):
    return (
        6.0
        * torch.tensor([V * C, (4 + 2 * hidden_ratio) * n_layer * C**2, n_layer * C])
        @ (torch.tensor([1.0, 1.0, T + 1]))
    )


def flops_by_a_model(V, C, n_layer, hidden_ratio, T):
    shape = {"n_layer": n_layer, "n_head": 1, "hidden_ratio": hidden_ratio}
    with torch.device("meta"):
        model = GPT(GPTConfig(n_embd=C, vocab_size=V, context_length=T, **shape))
    return torch.tensor(model.flops_per_token(), dtype=torch.float64)


def flops_forward_and_backward(V, C, n_layer, hidden_ratio, T):
    keys = torch.arange(1, T + 1).double().mean()
    forward = 2 * V * C + n_layer * (8 * C * C + 4 * hidden_ratio * C * C + 4 * C * keys)
    return forward + 2 * forward


def flops_by_parts(V, C, n_layer, hidden_ratio, T):
    parts = {"head": V * C, "attention": 4 * n_layer * C * C, "pairs": n_layer * C * (T + 1)}
    parts["mlp"] = 2 * n_layer * hidden_ratio * C * C
    return torch.tensor(list(parts.values())).sum().double() * 6


def memory_by_optimizer(V, C, n_layer, hidden_ratio):
    adamw, muon = V * C + V * C, n_layer * (4 * C * C + 2 * C * (hidden_ratio * C))
    return torch.tensor([4.0 * adamw + 4.0 * muon] * 2 + [8.0 * adamw + 4.0 * muon])


def memory_by_tensors(V, C, n_layer, hidden_ratio):
    """Make the parameters, without memory."""
    layer = [(C, C)] * 4 + [(hidden_ratio * C, C), (C, hidden_ratio * C)]
    tables = [torch.empty(V, C, device="meta") for _ in range(2)]
    matrices = [torch.empty(shape, device="meta") for shape in layer * n_layer]
    weights = sum(x.nbytes for x in tables + matrices)
    state = 2 * sum(x.nbytes for x in tables) + sum(x.nbytes for x in matrices)
    return torch.tensor([weights, weights, state], dtype=torch.float32)


def memory_by_product(V, C, n_layer, hidden_ratio):
    counts = torch.tensor([2 * V * C, n_layer * C * C * (4 + 2 * hidden_ratio)]).double()
    return torch.tensor([[4, 4], [4, 4], [8, 4]]).double() @ counts


def memory_by_filling(V, C, n_layer, hidden_ratio):
    result = torch.zeros(3, dtype=torch.float64)
    for _ in range(n_layer):
        result += 4 * (4 + 2 * hidden_ratio) * C**2
    return result + torch.tensor([8.0, 8.0, 16.0]) * V * C


def memory_by_a_model(V, C, n_layer, hidden_ratio):
    shape = {"n_layer": n_layer, "n_head": 1, "hidden_ratio": hidden_ratio}
    with torch.device("meta"):
        model = GPT(GPTConfig(n_embd=C, vocab_size=V, **shape))
    size = 4.0 * sum(p.numel() for p in model.parameters())
    return torch.tensor([size, size, size + 4 * model.head.weight.numel() * 2])


ANSWERS = [
    *(("rms_norm", f) for f in (norm_by_torch, norm_by_length, norm_with_epsilon)),
    *(("rms_norm", f) for f in (norm_by_einsum, norm_by_rows, norm_as_view)),
    *(("apply_rope", f) for f in (rope_by_complex_numbers, rope_by_rotating_halves)),
    *(("apply_rope", f) for f in (rope_by_matrices, rope_by_loops, rope_by_views)),
    *(("attention", f) for f in (attention_by_torch, attention_with_gain_on_keys)),
    *(("attention", f) for f in (attention_by_rows, attention_by_einsum)),
    ("attention", attention_by_exponentials),
    *(("orthogonalise", f) for f in (orthogonal_transposed, orthogonal_from_the_right)),
    *(("orthogonalise", f) for f in (orthogonal_by_singular_values, orthogonal_one_by_one)),
    ("orthogonalise", orthogonal_by_einsum),
    *(("flops_per_token", f) for f in (flops_by_loops, flops_in_fp32, flops_by_a_model)),
    *(("flops_per_token", f) for f in (flops_forward_and_backward, flops_by_parts)),
    *(("training_memory", f) for f in (memory_by_optimizer, memory_by_tensors)),
    *(("training_memory", f) for f in (memory_by_product, memory_by_filling, memory_by_a_model)),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_correct_answers_pass(name, function):
    assert grade_answer(steps_00.STEPS, name, function).message == "OK"


def test_the_targets_of_the_stubs_are_right():
    pair = torch.tensor([3.0, 4.0]).double()
    assert steps_00.reference_norm(pair, 1.0).tolist() == pytest.approx([0.849, 1.131], abs=1e-3)
    x = torch.tensor([1.0, 0.0]).double().view(1, 1, 1, 2)
    rotated = steps_00.reference_rope(x, torch.tensor([1]), 77.0)
    assert rotated.flatten().tolist() == pytest.approx([0.540, 0.841], abs=1e-3)
    row = steps_00.reference_orthogonal(torch.ones(1, 7).double(), 5)
    assert row.norm().item() == pytest.approx(0.696, abs=1e-3)
    assert steps_00.reference_flops(10, 2, 1, 4, 3).item() == 456
    assert steps_00.reference_memory(10, 2, 1, 4).tolist() == [352, 352, 512]


def test_no_two_mistakes_give_the_same_result():
    """Otherwise the grader never reports one of them. And none gives the right one."""
    flops = (*steps_00.SHAPE, 7)
    tables = [
        (steps_00.known_norms, steps_00.reference_norm, steps_00.some_vectors()),
        (steps_00.known_ropes, steps_00.reference_rope, steps_00.some_queries()),
        (steps_00.known_attentions, steps_00.reference_attention, steps_00.some_qkv()),
        (steps_00.known_orthogonals, steps_00.reference_orthogonal, steps_00.some_matrices()),
        (steps_00.known_flops, steps_00.reference_flops, flops),
        (steps_00.known_memories, steps_00.reference_memory, steps_00.SHAPE),
    ]
    for known, reference, case in tables:
        values = known(*case) | {"right": lambda f=reference, case=case: f(*case)}
        assert not equal_pairs(values, 2 * steps_00.TOLERANCE)


# ---- the references are nanods' ------------------------------------------------------------------


def test_the_norm_and_the_rotation_are_those_of_the_model():
    x, gain = steps_00.some_vectors()
    assert steps_00.is_close(steps_00.reference_norm(x, gain), rms_norm(x, gain))
    x, positions, base = steps_00.some_queries()
    rotated = apply_rope(x, rope_cos_sin(positions[None], x.size(-1), x.dtype, base))
    assert steps_00.is_close(steps_00.reference_rope(x, positions, base), rotated)


def test_the_attention_is_that_of_the_model():
    """Where all positions are 0, RoPE rotates nothing."""
    config = GPTConfig(n_head=3, n_embd=24, query_gain=1.6)
    layer = Attention(config).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    rope = rope_cos_sin(torch.zeros(1, 5), 8, x.dtype, config.rope_base)
    y, _ = layer(x, torch.arange(5)[None], rope)
    q, k, v = (
        linear(x).view(2, 5, 3, 8).transpose(1, 2)
        for linear in (layer.query, layer.key, layer.value)
    )
    expected = steps_00.reference_attention(q, k, v, config.query_gain)
    assert steps_00.is_close(y, layer.out(expected.transpose(1, 2).flatten(2)))


def test_the_orthogonalised_matrices_are_muons():
    G, steps = steps_00.some_matrices()
    assert steps_00.is_close(steps_00.reference_orthogonal(G, steps), orthogonalise(G, steps))


def test_flops_and_memory_are_the_planners():
    v0 = PRESETS["v0-tiny"]
    config = replace(v0, dtype="fp32", model=replace(v0.model, conv_width=1))
    model, m = build_meta_model(config), config.model
    shape = (m.vocab_size, m.n_embd, m.n_layer, m.hidden_ratio)
    flops = steps_00.reference_flops(*shape, m.context_length)
    assert flops.item() == pytest.approx(model.flops_per_token())
    memory = memory_per_gpu(config, model_cost(model), Mesh.of(dp=1), step_config(config, "cpu", 1))
    state = [memory[kind] for kind in steps_00.STATE]
    assert steps_00.reference_memory(*shape).tolist() == pytest.approx(state)
