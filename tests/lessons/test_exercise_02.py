"""The grader of lesson 02 finds in each wrong answer the mistake that is in it, those of the article's snippet among them."""

from pathlib import Path

import check_02
import grade
import pytest
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import WrongAnswers

right = grade.load_file(Path(check_02.__file__).with_name("02_solutions.py"))
WRONG = WrongAnswers()
wrong, wrongs = WRONG.register, WRONG.register_all

# ---- step 1 ----------------------------------------------------------------------------------------------------------------


def chosen(x, gate, top_k, dim=-1):
    best, experts = (x @ gate.T).softmax(dim).topk(top_k)
    return best / best.sum(-1, keepdim=True), experts


def scores(x, gate, top_k):
    best, experts = (x @ gate.T).topk(top_k)
    return best, experts


def spread(x, gate, top_k):
    weights, experts = right.route(x, gate, top_k)
    return torch.zeros(len(x), len(gate), dtype=x.dtype).scatter(1, experts, weights), experts


wrongs(
    "route",
    not_divided=(
        r"token \d+ sum to 0\.\d+, not to 1",
        lambda x, gate, k: (x @ gate.T).softmax(-1).topk(k),
    ),
    no_softmax=("there is no softmax", scores),
    no_softmax_divided=(
        "there is no softmax",
        lambda *a: ((s := scores(*a))[0] / s[0].sum(-1, keepdim=True), s[1]),
    ),
    two_softmaxes=(
        "the softmax is taken twice",
        lambda *a: ((c := (a[0] @ a[1].T).softmax(-1).topk(a[2]))[0].softmax(-1), c[1]),
    ),
    softmax_over_tokens=("is the softmax over the tokens", lambda *a: chosen(*a, dim=0)),
    swapped=("the two are swapped", lambda *a: chosen(*a)[::-1]),
    not_gathered=(r"\(the weights\): gather those of the chosen", spread),
    worst=("the choice is not the best", lambda x, gate, k: chosen(x, -gate, k)),
    worst_first=(
        "the order is wrong: token 0",
        lambda *a: [part.flip(-1) for part in right.route(*a)],
    ),
    float_experts=(
        "numbers of experts must be integers",
        lambda *a: ((r := right.route(*a))[0], r[1].double()),
    ),
    numbers_from_one=("there is no expert 5", lambda *a: ((r := right.route(*a))[0], r[1] + 1)),
    even_weights=(
        r"token 0 gives expert \d the weight 0.500",
        lambda *a: ((r := right.route(*a))[0] * 0 + 1 / a[2], r[1]),
    ),
    always_float=(
        "turns float64 into float32",
        lambda x, gate, k: right.route(x.float(), gate.float(), k),
    ),
    always_double=(
        "turns float32 into float64",
        lambda x, gate, k: right.route(x.double(), gate.double(), k),
    ),
    only_in_its_dtype=("in bf16, rounding chooses", chosen),
    widened_too_late=(
        "in bf16, rounding chooses",
        lambda x, gate, k: right.route(
            logits := x @ gate.T, torch.eye(len(gate), dtype=logits.dtype), k
        ),
    ),
    own_exp=(
        "overflows on large scores",
        lambda x, gate, k: (
            (b := (x @ gate.T).exp().topk(k))[0] / b[0].sum(-1, keepdim=True),
            b[1],
        ),
    ),
    always_two=("for top_k = 1", lambda x, gate, k: right.route(x, gate, 2)),
    gate_detached=("no gradient reaches gate", lambda x, gate, k: right.route(x, gate.detach(), k)),
    detached=("no gradient flows at all", lambda *a: ((r := right.route(*a))[0].detach(), r[1])),
    weights_alone=(
        "returns a Tensor, not the 2 tensors weights, experts",
        lambda *a: right.route(*a)[0],
    ),
    gate_not_turned=(
        r"raises RuntimeError at line \d+: mat1 and mat2",
        lambda x, gate, k: right.route(x, gate.T, k),
    ),
)

# ---- step 2: the article's four mistakes, and others -------------------------------------------------------------------------


def add(y, e, token, made, w):
    return y.index_add(0, token, made * w)


def each(x, weights, experts, up, out, take=add, run=range, mlp=right.mlp):
    """The loop over experts; `take(y, e, token, made, w)` says what becomes of the rows that expert e made."""
    y = torch.zeros_like(x)
    for e in run(len(up)):
        token, slot = (experts == e).nonzero(as_tuple=True)
        y = take(y, e, token, mlp(x[token], up[e], out[e]), weights[token, slot, None])
    return y


def first_rows(y, e, token, made, w):
    y = y.clone()
    y[: len(made)] += made * w
    return y


BY_SLOT = "number of the slot .* was taken for that of the expert"
TOGETHER = "different tokens are added together, as in the article.*a sum over"
TOGETHER_AT_TOP = (
    "different tokens are added together, as in the article.*went to the first outputs"
)
IGNORED = "the gate's weights are ignored, as in the article's"


@wrong("mix", BY_SLOT)
def article_masks_by_slot(x, weights, experts, up, out):
    y = torch.zeros_like(x)
    for k in range(experts.size(1)):
        token, slot = (experts == k).nonzero(as_tuple=True)
        y = add(y, k, token, right.mlp(x[token], up[k], out[k]), weights[token, slot, None])
    return y


@wrong("mix", BY_SLOT)
def article_runs_expert_k_for_slot_k(x, weights, experts, up, out):
    return sum(right.mlp(x, up[k], out[k]) * weights[:, k, None] for k in range(experts.size(1)))


@wrong("mix", BY_SLOT)
def article_whole_but_for_the_name(x, weights, experts, up, out):
    y = torch.zeros_like(x)
    for k in range(experts.size(1)):
        mask = (experts == k).any(-1)
        y += right.mlp(x[mask], up[k], out[k]).sum(0)
    return y


wrongs(
    "mix",
    article_name=(
        "reads a name that is not defined.*: NameError at line",
        lambda *a: expert_outputs,  # noqa: F821
    ),
    article_sums_tokens=(
        TOGETHER,
        lambda *a: each(
            *a,
            take=lambda y, e, token, made, w: y.index_add(
                0, token, (made * w).sum(0).expand_as(made)
            ),
        ),
    ),
    article_sums_to_all=(
        TOGETHER,
        lambda *a: each(*a, take=lambda y, e, token, made, w: y + (made * w).sum(0)),
    ),
    article_adds_to_first_rows=(TOGETHER_AT_TOP, lambda *a: each(*a, take=first_rows)),
    article_ignores_weights=(
        IGNORED,
        lambda *a: each(*a, take=lambda y, e, token, made, w: y.index_add(0, token, made)),
    ),
    mean=(
        "a plain mean over",
        lambda x, w, e, up, out: right.mix(x, torch.full_like(w, 1 / w.size(1)), e, up, out),
    ),
    weight_before=(
        "weights appear squared",
        lambda x, weights, experts, up, out: sum(
            right.mix(x * w, torch.ones_like(w), e, up, out)
            for w, e in zip(weights.split(1, -1), experts.split(1, -1), strict=True)
        ),
    ),
    weight_of_slot_0=(
        r"the weight of token (\d+) in slot 0, instead of its own, in slot 1",
        lambda x, w, e, up, out: right.mix(x, w[:, :1].expand_as(w), e, up, out),
    ),
    weight_of_other=(
        r"the weight of token 15 in slot 0, instead of its own, in slot 0",
        lambda x, w, e, up, out: right.mix(x, w.roll(1, 0), e, up, out),
    ),
    weight_doubled=(
        r"is multiplied by \d\.\d+, not by its weight",
        lambda x, w, e, up, out: right.mix(x, 2 * w, e, up, out),
    ),
    all_experts=(
        "every expert counts for every token",
        lambda x, w, e, up, out: sum(map(right.mlp, [x] * len(up), up, out)),
    ),
    another_expert=(
        r"expert \d runs for token \d+, which chose",
        lambda x, w, e, up, out: right.mix(x, w, 4 - e, up, out),
    ),
    first_choice=(
        "only the first choices count",
        lambda x, w, e, up, out: right.mix(x, w[:, :1], e[:, :1], up, out),
    ),
    overwritten=(
        "are overwritten, not added",
        lambda *a: each(*a, take=lambda y, e, token, made, w: y.index_copy(0, token, made * w)),
    ),
    one_expert_short=("expert 4 never runs", lambda *a: each(*a, run=lambda n: range(n - 1))),
    from_one=("expert 0 never runs", lambda *a: each(*a, run=lambda n: range(1, n))),
    last_token_lost=(
        "expert 1 does not run for token 15",
        lambda x, w, e, up, out: torch.cat(
            [
                right.mix(x[:-1], w[:-1], e[:-1], up, out),
                right.mix(x[-1:], w[-1:, :1], e[-1:, :1], up, out),
            ]
        ),
    ),
    zeros=("does not depend on any expert", lambda x, *_: torch.zeros_like(x)),
    not_squared=(
        "the ReLU is not squared",
        lambda *a: each(*a, mlp=lambda x, up, out: (x @ up.T).relu() @ out.T),
    ),
    no_relu=(
        "but there is no ReLU",
        lambda *a: each(*a, mlp=lambda x, up, out: (x @ up.T) ** 2 @ out.T),
    ),
    no_activation=(
        "there is no activation",
        lambda *a: each(*a, mlp=lambda x, up, out: x @ up.T @ out.T),
    ),
    gelu=(
        r"1.95 and -0.0455.*is it relu\(.\) \*\* 2",
        lambda *a: each(*a, mlp=lambda x, up, out: F.gelu(x @ up.T) @ out.T),
    ),
    one_up=(
        "is it up.e. that goes with out.e.",
        lambda x, w, e, up, out: right.mix(x, w, e, up[:1].expand_as(up), out),
    ),
    not_summed=(
        "sum over the slots",
        lambda x, w, e, up, out: x[:, None].expand(-1, w.size(1), -1),
    ),
    not_added=(
        "add the assignments to",
        lambda x, w, e, up, out: x.repeat_interleave(w.size(1), 0),
    ),
    infinite=("returns NaN or infinity", lambda *a: right.mix(*a) / 0),
    weights_detached=("no gradient reaches weights", lambda x, w, *a: right.mix(x, w.detach(), *a)),
    half_detached=(
        "gradient of x is not",
        lambda x, w, e, up, out: (
            right.mix(x, w / 2, e, up, out) + right.mix(x.detach(), w / 2, e, up, out)
        ),
    ),
    always_float=("turns float64 into float32", lambda *a: right.mix(*a).float()),
    in_place=("changes its argument number 1 in place", lambda x, *a: x.copy_(right.mix(x, *a))),
    squeezed=("for one token and one expert", lambda *a: right.mix(*a).squeeze()),
    two_slots=(
        "for K = 1",
        lambda x, w, e, *a: right.mix(x, w, e, *a) + 0 * (w[:, 1:2] if len(x) > 1 else 0),
    ),
)

# ---- step 3 ------------------------------------------------------------------------------------------------------------------


def by_slices(x, weights, experts, up, out, finish, token=None, counts=None, w=None):
    """The solution with some of it replaced."""
    K, flat = experts.size(1), experts.flatten()
    order = flat.argsort(stable=True)
    token = order // K if token is None else token(order, K)
    counts = flat.bincount(minlength=len(up)) if counts is None else counts(flat)
    made = [
        right.mlp(mine, up[e], out[e]) for e, mine in enumerate(x[token].split(counts.tolist()))
    ]
    w = weights.flatten()[order] if w is None else w(weights)
    return finish(torch.cat(made) * w[:, None], order, torch.zeros_like(x), K)


def put(made, order, y, K):
    return y.index_add(0, order // K, made)


def put_once(made, order, y, K):
    y[order // K] += made
    return y


def every_expert_all_tokens(x, weights, experts, up, out):
    y = torch.stack([right.mlp(x, up[e], out[e]) for e in range(len(up))], 1)  # (N, E, C)
    return (y[torch.arange(len(x))[:, None], experts] * weights[..., None]).sum(1)


SORTED = "rows are still in the order of the experts"
wrongs(
    "experts_sorted",
    not_put_back=(
        SORTED,
        lambda *a: by_slices(
            *a, finish=lambda made, order, y, K: made.unflatten(0, (-1, K)).sum(1)
        ),
    ),
    put_back_by_order=(
        SORTED,
        lambda *a: by_slices(
            *a, finish=lambda made, order, y, K: made[order].unflatten(0, (-1, K)).sum(1)
        ),
    ),
    added_once=("are overwritten, not added", lambda *a: by_slices(*a, finish=put_once)),
    weights_not_sorted=(
        "what expert . makes of token .* is multiplied by .*, the weight of token",
        lambda *a: by_slices(*a, finish=put, w=torch.flatten),
    ),
    no_weights=(
        IGNORED,
        lambda *a: by_slices(*a, finish=put, w=lambda w: torch.ones_like(w.flatten())),
    ),
    token_by_remainder=(
        r"expert \d runs for token \d+, which chose",
        lambda *a: by_slices(*a, finish=put, token=lambda order, K: order % (len(order) // K)),
    ),
    token_is_order=(
        "dimension 0 with size 16$",
        lambda *a: by_slices(*a, finish=put, token=lambda order, K: order),
    ),
    empty_forgotten=(
        "wrong for experts 1 and 3 chosen by nobody",
        lambda *a: by_slices(
            *a, finish=put, counts=lambda flat: flat.unique(return_counts=True)[1]
        ),
    ),
    no_minlength=(
        "raises IndexError.*for the last expert chosen by nobody",
        lambda *a: by_slices(
            *a, finish=lambda *b: put(*b) + 0 * a[2].flatten().bincount()[len(a[3]) - 1]
        ),
    ),
    dense=("2.5 times the work", every_expert_all_tokens),
)

# ---- step 4 ------------------------------------------------------------------------------------------------------------------


def shares(probs, experts):
    return F.one_hot(experts, probs.size(-1)).to(probs).mean((0, 1))


wrongs(
    "load_balancing_loss",
    no_factor=("the factor E = 5 is missing", lambda p, e: (shares(p, e) * p.mean(0)).sum()),
    mean_over_experts=(
        "the factor E = 5 is missing",
        lambda p, e: p.size(-1) * (shares(p, e) * p.mean(0)).mean(),
    ),
    by_tokens=(
        "^2 times .*divided by N = 16,",
        lambda p, e: e.size(1) * right.load_balancing_loss(p, e),
    ),
    by_tokens_no_factor=(
        "by N, not by N K, and the factor",
        lambda p, e: e.size(1) * (shares(p, e) * p.mean(0)).sum(),
    ),
    counts=(
        "not divided by their number, N K$",
        lambda p, e: e.numel() * right.load_balancing_loss(p, e),
    ),
    counts_no_factor=(
        "by their number, N K, and the factor",
        lambda p, e: e.numel() * (shares(p, e) * p.mean(0)).sum(),
    ),
    summed=("probabilities are summed", lambda p, e: len(p) * right.load_balancing_loss(p, e)),
    factor_twice=(
        "E is multiplied in twice",
        lambda p, e: p.size(-1) * right.load_balancing_loss(p, e),
    ),
    negative=("the sign is turned", lambda p, e: -right.load_balancing_loss(p, e)),
    argmax=(
        "does not change with `experts`",
        lambda p, e: right.load_balancing_loss(p, p.argmax(-1, keepdim=True)),
    ),
    probs_squared=(
        "does not change with `experts`",
        lambda p, e: p.size(-1) * p.mean(0).square().sum(),
    ),
    counts_squared=(
        "does not change with `probs`",
        lambda p, e: p.size(-1) * shares(p, e).square().sum(),
    ),
    first_choice=(
        "counts the first choices alone",
        lambda p, e: right.load_balancing_loss(p, e[:, :1]),
    ),
    token_by_token=(
        "multiplies token by token",
        lambda p, e: p.size(-1) * (F.one_hot(e, p.size(-1)).to(p).mean(1) * p).mean(0).sum(),
    ),
    detached=("no gradient flows at all", lambda p, e: right.load_balancing_loss(p.detach(), e)),
    not_summed=("sum over the experts", lambda p, e: p.size(-1) * shares(p, e) * p.mean(0)),
    shifted=("where it should give", lambda p, e: right.load_balancing_loss(p, e) - 1),
    no_minlength=(
        "for the last expert chosen by nobody",
        lambda p, e: p.size(-1) * (e.flatten().bincount() / e.numel() * p.mean(0)).sum(),
    ),
    two_slots=(
        "for K = 1",
        lambda p, e: (
            p.size(-1) * (F.one_hot(e, p.size(-1)).sum((0, 1)) / (2 * len(p)) * p.mean(0)).sum()
        ),
    ),
    a_number=("returns a float, not a tensor", lambda p, e: right.load_balancing_loss(p, e).item()),
)

# ---- step 5 ------------------------------------------------------------------------------------------------------------------


def serve(experts, n_expert, capacity, start=0, dim=0):
    mine = F.one_hot(experts.flatten(), n_expert)
    return (((mine.cumsum(dim) - 1) * mine).sum(-1) + start < capacity).view(experts.shape)


wrongs(
    "within_capacity",
    slot_first=("all first choices come before any second", lambda e, n, c: serve(e.T, n, c).T),
    each_slot=(
        r"each slot is counted alone: expert \d serves \d in all, the capacity is 3",
        lambda e, n, c: torch.cat([serve(column, n, c) for column in e.split(1, -1)], -1),
    ),
    one_too_many=("one too many: an expert serves 4", lambda *a: serve(*a, start=-1)),
    one_too_few=("one too few: an expert serves 2", lambda *a: serve(*a, start=1)),
    swapped=("True and False are swapped", lambda *a: ~serve(*a)),
    last_first=("the later tokens are served", lambda e, n, c: serve(e.flip(0), n, c).flip(0)),
    all_experts=(
        "all experts share the places",
        lambda e, n, c: torch.arange(e.numel()).view(e.shape) < c,
    ),
    whole_token=(
        "is dropped by its others too",
        lambda e, n, c: serve(e, n, c).all(-1, keepdim=True).expand_as(e),
    ),
    everyone=(
        r"expert 0 serves 6 tokens, the capacity is 3",
        lambda e, n, c: torch.ones_like(e, dtype=torch.bool),
    ),
    nobody=(
        r"expert 0 serves 0 of the 6 tokens that chose it",
        lambda e, n, c: torch.zeros_like(e, dtype=torch.bool),
    ),
    middle=(
        "token 1 in slot 0, for expert 2, is not served, and should be",
        lambda e, n, c: serve(e.roll(8, 0), n, c).roll(-8, 0),
    ),
    places=(
        "must be bool, and is int64",
        lambda e, n, c: F.one_hot(e.flatten(), n).cumsum(0).sum(-1).view(e.shape),
    ),
    flat=("in the shape of `experts`", lambda *a: serve(*a).flatten()),
    at_least_one=("wrong for capacity = 0", lambda e, n, c: serve(e, n, max(c, 1))),
    two_slots=(r"for K = 1", lambda e, n, c: serve(e, n, c) & (e[:, 1:2] >= 0)),
)

# ---- bonuses -----------------------------------------------------------------------------------------------------------------

wrongs(
    "update_bias",
    turned=(
        "the sign is turned",
        lambda b, load, rate: b - rate * (load.float().mean() - load).sign(),
    ),
    step_alone=(
        "returns the step alone",
        lambda b, load, rate: rate * (load.float().mean() - load).sign(),
    ),
    no_sign=("the step is longer", lambda b, load, rate: b + rate * (load.double().mean() - load)),
    relative=(
        "the step is longer",
        lambda b, load, rate: b + rate * (1 - load / load.double().mean()),
    ),
    never_still=(
        "expert 2 had 5, the mean is 5",
        lambda b, load, rate: b + rate * (1 - 2 * (load >= load.double().mean()).int()),
    ),
    against_all=(
        "expert 0 had 9, .* moves by -0.125; here by 0.125",
        lambda b, load, rate: b + rate * (load.sum() - load).sign(),
    ),
    in_place=(
        "argument number 1 in place",
        lambda b, load, rate: b.add_(rate * (load.float().mean() - load).sign()),
    ),
    integers=(
        r"raises RuntimeError.*mean\(\)",
        lambda b, load, rate: b + rate * (load.mean() - load).sign(),
    ),
    a_mean=("wrong shape", lambda b, load, rate: right.update_bias(b, load, rate).mean()),
    always_double=(
        "turns float32 into float64",
        lambda b, load, rate: right.update_bias(b.double(), load, rate),
    ),
)
wrongs(
    "upcycle",
    shared=(
        "the experts share one memory",
        lambda up, out, n: (up.expand(n, -1, -1), out.expand(n, -1, -1)),
    ),
    divided=(
        "each expert's out is 0.2 times the MLP's",
        lambda up, out, n: (up.repeat(n, 1, 1), out.repeat(n, 1, 1) / n),
    ),
    multiplied=(
        "each expert's up is 5 times the MLP's",
        lambda up, out, n: (up.repeat(n, 1, 1) * n, out.repeat(n, 1, 1)),
    ),
    swapped=("the two are swapped", lambda up, out, n: right.upcycle(up, out, n)[::-1]),
    first_alone=(
        r"up\[1\] is not the MLP's",
        lambda up, out, n: [F.pad(w[None], (0, 0, 0, 0, 0, n - 1)) for w in (up, out)],
    ),
    random=(
        r"up\[0\] is not the MLP's",
        lambda up, out, n: (torch.randn(n, *up.shape).double(), right.upcycle(up, out, n)[1]),
    ),
    cut=(
        r"wrong shape: \(5, 4, 80\).*\(up\)",
        lambda up, out, n: (torch.stack(up.chunk(n)), torch.stack(out.chunk(n, 1))),
    ),
    up_alone=("returns a Tensor", lambda up, out, n: up.repeat(n, 1, 1)),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_mistake_gets_the_message_meant_for_it(step, message, function):
    WRONG.assert_diagnosis(check_02.STEPS, step, message, function)
