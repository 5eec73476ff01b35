"""The grader of lesson 00 diagnoses each wrong answer."""

from pathlib import Path

import grade
import pytest
import steps_00
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_00.__file__).with_name("00_solutions.py"))
WRONG = WrongAnswers()
register, register_all = WRONG.register, WRONG.register_all


# ---- step 1: rms_norm ----------------------------------------------------------------------------


def divided_by(size):
    """Return an answer that divides by size(x)."""
    return lambda x, gain: gain * x / size(x).clamp(min=1e-9)


def root_mean_square(dim):
    return divided_by(lambda x: x.square().mean(dim, keepdim=True).sqrt())


register_all(
    "rms_norm",
    layer_norm=("that is LayerNorm", lambda x, g: g * F.layer_norm(x, x.shape[-1:], eps=1e-12)),
    unit_length=("gives each vector the length", lambda x, g: g * F.normalize(x, dim=-1)),
    no_root=("mean of the squares: take", divided_by(lambda x: x.square().mean(-1, True))),
    deviation=(
        "the standard deviation, which",
        divided_by(lambda x: x.std(-1, keepdim=True, correction=0)),
    ),
    torch_std=("divides by torch.std", divided_by(lambda x: x.std(-1, keepdim=True))),
    corrected=(
        "sum of the squares by C - 1",
        divided_by(lambda x: (x.square().sum(-1, True) / (x.size(-1) - 1)).sqrt()),
    ),
    whole=("for the whole tensor", divided_by(lambda x: x.square().mean().sqrt())),
    over_tokens=("runs over the tokens", root_mean_square(1)),
    over_batch=("runs over the batch", root_mean_square(0)),
    over_sequence=("for all tokens of a sequence", root_mean_square((1, 2))),
    no_gain=("is not used", lambda x, g: solutions.rms_norm(x, 1.0)),
    by_gain=("divides by `gain`", lambda x, g: solutions.rms_norm(x, 1 / g)),
    gain_twice=("`gain` twice", lambda x, g: solutions.rms_norm(x, g * g)),
    multiplied=(
        "multiplies by the root mean square",
        lambda x, g: g * x * x.square().mean(-1, True).sqrt(),
    ),
    magnitude=("divides by the mean magnitude", divided_by(lambda x: x.abs().mean(-1, True))),
    largest=("divides by the largest", divided_by(lambda x: x.abs().amax(-1, True))),
    positive=("returns magnitudes", lambda x, g: solutions.rms_norm(x, g).abs()),
    factor=("is this the factor", lambda x, g: g / x.square().mean(-1, True).sqrt()),
    no_epsilon=("0 / 0", lambda x, g: g * x / x.square().mean(-1, True).sqrt()),
    in_place=("in place", lambda x, g: x.mul_(g / x.square().mean(-1, True).sqrt())),
    fp32=("turns float64 into float32", lambda x, g: solutions.rms_norm(x.float(), g)),
    large_epsilon=(
        r"y\[0, 0, 0\] is .*, but .* is correct",
        lambda x, g: g * x / (x.square().mean(-1, True) + 0.1).sqrt(),
    ),
    three_dimensions=(
        r"wrong shape: \(1, 6\), not \(6,\), for one vector",
        lambda x, g: solutions.rms_norm(x if x.ndim > 1 else x[None], g),
    ),
    detached=(
        "gradient of x is not: one",
        lambda x, g: g * x / x.detach().square().mean(-1, True).sqrt().clamp(min=1e-9),
    ),
    without_gradient=("no gradient flows", lambda x, g: solutions.rms_norm(x.detach(), g)),
)


# ---- step 2: apply_rope --------------------------------------------------------------------------


def turned(angle_of, halves=lambda a, b, cos, sin: (a * cos - b * sin, a * sin + b * cos)):
    """Return an answer with these angles (T, D/2), from positions, i, D and base."""

    def apply_rope(x, positions, base):
        D = x.size(-1)
        i = torch.arange(D // 2, dtype=torch.float64)
        angle = angle_of(positions[:, None].double(), i, D, base)
        a, b = x.chunk(2, dim=-1)
        return torch.cat(halves(a, b, angle.cos().to(x), angle.sin().to(x)), dim=-1)

    return apply_rope


def right_angle(p, i, D, base):
    return p * base ** (-2 * i / D)


@register("apply_rope", "pairs neighbouring channels")
def interleaved(x, positions, base):
    order = torch.cat([torch.arange(0, x.size(-1), 2), torch.arange(1, x.size(-1), 2)])
    turned = solutions.apply_rope(x[..., order], positions, base)
    return turned[..., order.argsort()]


@register("apply_rope", "neighbouring channels of the result")
def interleaved_at_the_end(x, positions, base):
    a, b = solutions.apply_rope(x, positions, base).chunk(2, dim=-1)
    return torch.stack([a, b], dim=-1).flatten(-2)


register_all(
    "apply_rope",
    other_way=("rotates the other way", turned(lambda p, i, D, base: -p * base ** (-2 * i / D))),
    half_exponent=("exponent is -i/D", turned(lambda p, i, D, base: p * base ** (-i / D))),
    double_exponent=("exponent is -4i/D", turned(lambda p, i, D, base: p * base ** (-4 * i / D))),
    growing=("frequencies grow with i", turned(lambda p, i, D, base: p * base ** (2 * i / D))),
    reversed=("in reverse order", turned(lambda *a: right_angle(*a).flip(-1))),
    one_angle=("by the same angle", turned(lambda p, i, D, base: p.expand(-1, D // 2))),
    own_base=("uses base 10,000", turned(lambda p, i, D, base: p * 10_000 ** (-2 * i / D))),
    own_positions=(
        "uses 0 to T - 1",
        lambda x, p, base: solutions.apply_rope(x, torch.arange(x.size(2)), base),
    ),
    from_one=("from 1 more", lambda x, p, base: solutions.apply_rope(x, p + 1, base)),
    twice=("rotates twice", lambda x, p, base: solutions.apply_rope(x, 2 * p, base)),
    nothing=("nothing is rotated", lambda x, p, base: x),
    cosine_alone=(
        "by the cosine alone",
        turned(right_angle, lambda a, b, cos, sin: (a * cos, b * cos)),
    ),
    same_sign=(
        "have the same sign",
        turned(right_angle, lambda a, b, cos, sin: (a * cos + b * sin, a * sin + b * cos)),
    ),
    already_rotated=(
        "that is already rotated",
        turned(
            right_angle,
            lambda a, b, cos, sin: (a * cos - b * sin, (a * cos - b * sin) * sin + b * cos),
        ),
    ),
    swapped=(
        "halves of the result are swapped",
        turned(right_angle, lambda a, b, cos, sin: (a * sin + b * cos, a * cos - b * sin)),
    ),
    swapped_x=(
        "halves of x are swapped",
        turned(right_angle, lambda a, b, cos, sin: (b * cos - a * sin, b * sin + a * cos)),
    ),
    other=(
        r"y\[0, 0, 0, 0\] is .*, but .* is correct",
        lambda x, p, base: 1.5 * solutions.apply_rope(x, p, base),
    ),
    one_half=("wrong shape", lambda x, p, base: solutions.apply_rope(x, p, base)[..., :4]),
    degrees=(
        r"y\[0, 0, 0, 0\] is .*, but .* is correct",
        turned(lambda *a: right_angle(*a).rad2deg()),
    ),
    bf16_positions=(
        "for position 501",
        lambda x, p, base: solutions.apply_rope(x, p.bfloat16().double(), base),
    ),
    sorted=(
        "for positions in no order",
        lambda x, p, base: solutions.apply_rope(x, p.sort().values, base),
    ),
    fp32=("turns float64", lambda x, p, base: solutions.apply_rope(x.float(), p, base)),
    always_fp64=(
        "turns float32 into float64",
        lambda x, p, base: solutions.apply_rope(x.double(), p, base),
    ),
)


# ---- step 3: attention ---------------------------------------------------------------------------


def attending(
    normalise=lambda q, k, gain: (solutions.rms_norm(q, gain), solutions.rms_norm(k, 1.0)),
    scale=lambda D: D**-0.5,
    weights=lambda scores, past: scores.masked_fill(~past, -torch.inf).softmax(-1),
    values=lambda v: v,
):
    """Return an answer with one part replaced."""

    def attention(q, k, v, gain):
        q, k = normalise(q, k, gain)
        scores = scale(q.size(-1)) * q @ k.mT
        past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return weights(scores, past) @ values(v)

    return attention


def norm(x, gain, dim=-1):
    return gain * x / x.square().mean(dim, keepdim=True).sqrt().clamp(min=1e-9)


def centred(x):
    return x - x.mean(-1, keepdim=True)


register_all(
    "attention",
    plain=("are not normalised", attending(lambda q, k, g: (q, k))),
    gain_alone=("but neither they nor keys", attending(lambda q, k, g: (g * q, k))),
    queries=("only the queries", attending(lambda q, k, g: (norm(q, g), k))),
    keys=("only the keys are normalised: ", attending(lambda q, k, g: (q, norm(k, 1)))),
    keys_and_gain=(
        "only the keys are normalised, and",
        attending(lambda q, k, g: (g * q, norm(k, 1))),
    ),
    no_gain=("`gain` is not used", attending(lambda q, k, g: (norm(q, 1), norm(k, 1)))),
    gain_twice=("both queries and keys", attending(lambda q, k, g: (norm(q, g), norm(k, g)))),
    by_gain=("divides by `gain`", attending(lambda q, k, g: (norm(q, 1 / g), norm(k, 1)))),
    lengths=(
        r"have the \*length\*",
        attending(lambda q, k, g: (g * F.normalize(q, dim=-1), F.normalize(k, dim=-1))),
    ),
    cosine=("score is the cosine", attending(scale=lambda D: 1 / D)),
    not_scaled=("not divided by sqrt", attending(scale=lambda D: 1.0)),
    over_tokens=(
        "runs over the tokens",
        attending(lambda q, k, g: (norm(q, g, -2), norm(k, 1, -2))),
    ),
    over_sequence=(
        "runs over all of a sequence",
        attending(lambda q, k, g: (norm(q, g, (-2, -1)), norm(k, 1, (-2, -1)))),
    ),
    layer_norm=(
        "that is LayerNorm",
        attending(lambda q, k, g: (norm(centred(q), g), norm(centred(k), 1))),
    ),
    values_too=("values are normalised", attending(values=lambda v: norm(v, 1))),
    no_mask=("mask is missing", attending(weights=lambda s, past: s.softmax(-1))),
    strict=(
        "do not read their own token",
        attending(weights=lambda s, past: s.masked_fill(~past.tril(-1), -1e9).softmax(-1)),
    ),
    transposed=(
        "mask is transposed",
        attending(weights=lambda s, past: s.masked_fill(~past.mT, -torch.inf).softmax(-1)),
    ),
    zeros=("future scores are 0", attending(weights=lambda s, past: (s * past).softmax(-1))),
    after=("after the softmax", attending(weights=lambda s, past: s.softmax(-1) * past)),
    over_queries=(
        "softmax runs over the queries",
        attending(weights=lambda s, past: s.masked_fill(~past, -torch.inf).softmax(-2)),
    ),
    no_softmax=("there is no softmax", attending(weights=lambda s, past: s * past)),
    keys_first=(
        "keys take the place of queries",
        attending(weights=lambda s, past: s.mT.masked_fill(~past, -torch.inf).softmax(-1)),
    ),
    nan=("NaN at", attending(weights=lambda s, past: s + (~past).double() * torch.nan)),
    strict_infinity=(
        "NaN at",
        attending(weights=lambda s, past: s.masked_fill(~past.tril(-1), -torch.inf).softmax(-1)),
    ),
    weights=(
        "are these the weights",
        lambda q, k, v, g: solutions.attention(q, k, torch.eye(5).double().expand(2, 3, 5, 5), g),
    ),
    other=(r"output\[.*\] is .*, but", attending(scale=lambda D: 0.4 * D**-0.5)),
    fp32=("turns float64", lambda q, k, v, g: solutions.attention(q, k, v, g).float()),
    large=(
        "for queries and keys 1,000 times",
        lambda q, k, v, g: solutions.attention(q.clamp(-500, 500), k, v, g),
    ),
    detached=(
        "no gradient reaches k",
        lambda q, k, v, g: solutions.attention(q, k.detach(), v, g),
    ),
)


# ---- step 4: orthogonalise -----------------------------------------------------------------------


def iterated(start=lambda G: G / G.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-9), update=None):
    """Return an answer with another start or another update of X."""
    update = update or (lambda X: solutions_step(X))

    def orthogonalise(G, steps):
        X = start(G)
        for _ in range(steps):
            X = update(X)
        return X

    return orthogonalise


def solutions_step(X, a=3.4445, b=-4.7750, c=2.0315):
    A = X @ X.mT
    return a * X + b * A @ X + c * A @ A @ X


@register("orthogonalise", "computes X X.T once")
def fixed_products(G, steps):
    X = G / G.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-9)
    A = X @ X.mT
    for _ in range(steps):
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    return X


@register("orthogonalise", "returns the exact")
def exact(G, steps):
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    return U @ V


def entries_squared(X):
    A = X @ X.mT
    return 3.4445 * X - 4.7750 * A @ X + 2.0315 * (A * A) @ X


register_all(
    "orthogonalise",
    one_norm=("one norm for the whole stack", iterated(lambda G: G / G.norm().clamp(min=1e-9))),
    spectral=(
        "by the largest singular value",
        iterated(lambda G: G / torch.linalg.matrix_norm(G, 2, keepdim=True).clamp(min=1e-9)),
    ),
    mean_square=(r"root \*mean\* square", iterated(lambda G: norm(G, 1.0, (-2, -1)))),
    no_root=(
        "divides by the sum of squares",
        iterated(lambda G: G / G.square().sum((-2, -1), keepdim=True).clamp(min=1e-9)),
    ),
    rows=("normalises each row", iterated(lambda G: F.normalize(G, dim=-1))),
    not_divided=("does not divide by the norm", iterated(lambda G: G)),
    no_steps=("no step was done", iterated(update=lambda X: X)),
    five=("always does 5 steps", lambda G, steps: solutions.orthogonalise(G, 5)),
    more=("one step more", lambda G, steps: solutions.orthogonalise(G, steps + 1)),
    less=("one step less", lambda G, steps: solutions.orthogonalise(G, steps - 1)),
    single=("a single step", lambda G, steps: solutions.orthogonalise(G, 1)),
    swapped=(
        "b and c are swapped",
        iterated(update=lambda X: solutions_step(X, b=2.0315, c=-4.775)),
    ),
    positive=("b is positive", iterated(update=lambda X: solutions_step(X, b=4.775))),
    no_c=("lacks the term c", iterated(update=lambda X: solutions_step(X, c=0))),
    no_a=("lacks the term a", iterated(update=lambda X: solutions_step(X, a=0))),
    cubic=("uses the cubic", iterated(update=lambda X: 1.5 * X - 0.5 * X @ X.mT @ X)),
    squares=("squares the entries", iterated(update=entries_squared)),
    powers=(
        "takes powers of the entries",
        iterated(update=lambda X: 3.4445 * X - 4.7750 * X**3 + 2.0315 * X**5),
    ),
    norm_again=(
        "multiplies by the norm again",
        lambda G, steps: solutions.orthogonalise(G, steps) * G.norm(dim=(-2, -1), keepdim=True),
    ),
    added=("adds the steps to X", iterated(update=lambda X: X + solutions_step(X))),
    nan=(
        "0 / 0",
        iterated(lambda G: G / G.norm(dim=(-2, -1), keepdim=True)),
    ),
    other=(r"X\[0, 0, 0\] is .*, but", iterated(update=lambda X: solutions_step(X, a=3.0))),
    transposed=(r"wrong shape: \(2, 4, 3\)", lambda G, steps: solutions.orthogonalise(G, steps).mT),
    only_stacks=(
        r"wrong shape: \(1, 3, 4\), not \(3, 4\), for one matrix",
        lambda G, n: solutions.orthogonalise(G if G.ndim > 2 or not G.any() else G[None], n),
    ),
    not_transposed_back=(
        "for a tall matrix",
        lambda G, n: (
            solutions.orthogonalise(G.mT, n)
            if G.size(-2) > G.size(-1)
            else solutions.orthogonalise(G, n)
        ),
    ),
    bf16=(
        r"turns float64 into bfloat16",
        lambda G, steps: solutions.orthogonalise(G.bfloat16(), steps),
    ),
)


# ---- step 5: flops_per_token ---------------------------------------------------------------------


def flops(count):
    """Return an answer that is count(head, square, pairs, right, L, r, T), where `head` and `pairs`
    are the operations of the head and of all pairs, and `square` those of C x C in all layers."""

    def flops_per_token(V, C, n_layer, hidden_ratio, T):
        right = solutions.flops_per_token(V, C, n_layer, hidden_ratio, T)
        head, square = 6 * V * C, 6 * n_layer * C * C
        pairs = 12 * n_layer * C * (T + 1) / 2
        return right + count(head, square, pairs, right, n_layer, hidden_ratio, T)

    return flops_per_token


def times(factor):
    return flops(lambda head, square, pairs, right, L, r, T: (factor - 1) * right)


register_all(
    "flops_per_token",
    forward=("counts the forward pass only", times(1 / 3)),
    as_many=("counts the backward pass only", times(2 / 3)),
    half=("one operation for each weight", times(1 / 2)),
    embedding=("counts the embedding", flops(lambda h, s, p, right, L, r, T: h)),
    no_head=("lacks the head", flops(lambda h, s, p, right, L, r, T: -h)),
    no_pairs=("lacks the pairs", flops(lambda h, s, p, right, L, r, T: -p)),
    all_keys=(
        "every query reads T keys",
        flops(lambda h, s, p, right, L, r, T: p * (2 * T / (T + 1) - 1)),
    ),
    half_of_keys=(
        "reads T / 2 keys",
        flops(lambda h, s, p, right, L, r, T: p * (T / (T + 1) - 1)),
    ),
    not_its_own=(
        "query t reads t keys",
        flops(lambda h, s, p, right, L, r, T: p * ((T - 1) / (T + 1) - 1)),
    ),
    pairs_forward=(
        "pairs are counted forward only",
        flops(lambda h, s, p, right, L, r, T: -p * 2 / 3),
    ),
    one_product=("a pair has C numbers", flops(lambda h, s, p, right, L, r, T: -p / 2)),
    pairs_once=(
        "the pairs of one layer",
        flops(lambda h, s, p, right, L, r, T: p / L - p),
    ),
    three_matrices=("attention has 3 matrices", flops(lambda h, s, p, right, L, r, T: -s)),
    one_matrix=("MLP has one matrix", flops(lambda h, s, p, right, L, r, T: -r * s)),
    four=("hidden width is 4 C", flops(lambda h, s, p, right, L, r, T: 2 * (4 - r) * s)),
    narrow=("hidden width is C:", flops(lambda h, s, p, right, L, r, T: 2 * (1 - r) * s)),
    no_mlp=("lacks the MLP", flops(lambda h, s, p, right, L, r, T: -2 * r * s)),
    no_attention=(
        "lacks the matrices of attention",
        flops(lambda h, s, p, right, L, r, T: -4 * s),
    ),
    one_layer=(
        "one layer: there are",
        lambda V, C, L, r, T: solutions.flops_per_token(V, C, 1, r, T),
    ),
    head_in_each=("the head in each layer", flops(lambda h, s, p, right, L, r, T: h * (L - 1))),
    sequence=("of a whole sequence", times(7)),
    other=(r"it is [\d.]+, but [\d.]+ is correct", times(0.9)),
    integers=("returns int64", lambda *a: solutions.flops_per_token(*a).long()),
    vector=("wrong shape", lambda *a: solutions.flops_per_token(*a)[None]),
    number=("returns a float, not a tensor", lambda *a: solutions.flops_per_token(*a).item()),
    long_context=(
        "wrong for the vocabulary of GPT-2",
        lambda V, C, L, r, T: solutions.flops_per_token(V, C, L, r, min(T, 4096)),
    ),
)


# ---- step 6: training_memory ---------------------------------------------------------------------


def memory(change):
    """Return an answer from change(ends, layers, square) = ends, layers: the parameters."""

    def training_memory(V, C, n_layer, hidden_ratio):
        square = n_layer * C * C
        ends, layers = change(2 * V * C, (4 + 2 * hidden_ratio) * square, square, hidden_ratio)
        sizes = [4 * (ends + layers), 4 * (ends + layers), 8 * ends + 4 * layers]
        return torch.tensor(sizes, dtype=torch.float64)

    return training_memory


def with_optimizer(size):
    """Return an answer whose optimizer has size(parameters of the ends, of the layers) bytes."""

    def training_memory(V, C, n_layer, hidden_ratio):
        right = solutions.training_memory(V, C, n_layer, hidden_ratio)
        ends = 2 * V * C
        right[2] = size(ends, right[0] / 4 - ends)
        return right

    return training_memory


def scaled(*factors):
    return lambda *a: solutions.training_memory(*a) * torch.tensor(factors)


register_all(
    "training_memory",
    all_adamw=("two numbers for every weight", with_optimizer(lambda e, n: 8 * (e + n))),
    all_muon=("one number for every weight", with_optimizer(lambda e, n: 4 * (e + n))),
    exchanged=("it is the other way round", with_optimizer(lambda e, n: 4 * e + 8 * n)),
    head_by_muon=("the head is Muon's", with_optimizer(lambda e, n: 6 * e + 4 * n)),
    no_momentum=("lacks Muon's momentum", with_optimizer(lambda e, n: 8 * e)),
    no_moments=("lacks AdamW's two", with_optimizer(lambda e, n: 4 * n)),
    three=("AdamW keeps three", with_optimizer(lambda e, n: 12 * e + 4 * n)),
    nothing=("there is nothing in it", with_optimizer(lambda e, n: 0)),
    numbers=("numbers of parameters", scaled(0.25)),
    two_bytes=("2 bytes for a number", scaled(0.5)),
    eight_bytes=("8 bytes for a number", scaled(2.0)),
    reversed=("begins with the optimizer", lambda *a: solutions.training_memory(*a).flip(0)),
    no_gradients=("no bytes of gradients", scaled(1.0, 0.0, 1.0)),
    tied=("are counted once", memory(lambda e, n, s, r: (e / 2, n))),
    no_ends=("lacks embedding and head", memory(lambda e, n, s, r: (0, n))),
    no_layers=("lacks the layers", memory(lambda e, n, s, r: (e, 0))),
    one_layer=("one layer: there", lambda V, C, L, r: solutions.training_memory(V, C, 1, r)),
    three_matrices=("attention has 3 matrices", memory(lambda e, n, s, r: (e, n - s))),
    one_matrix=("MLP has one matrix", memory(lambda e, n, s, r: (e, n - r * s))),
    four=("hidden width is 4 C", memory(lambda e, n, s, r: (e, n + 2 * (4 - r) * s))),
    biases=(
        "counts biases",
        lambda V, C, L, r: memory(lambda e, n, s, r: (e, n + L * (5 + r) * C))(V, C, L, r),
    ),
    other=(r"gradients is [\d.]+, but [\d.]+ is correct", scaled(1.0, 1.1, 1.0)),
    integers=("returns int64", lambda *a: solutions.training_memory(*a).long()),
    total=("wrong shape", lambda *a: solutions.training_memory(*a).sum()),
    in_int32=(
        "right in general, but wrong for a model of 100B",
        lambda *a: solutions.training_memory(*a).clamp(max=2.0**31),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_00.STEPS, step, message, function)
