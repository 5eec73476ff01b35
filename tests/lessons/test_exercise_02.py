"""The grader of lesson 02 names the mistake in each wrong answer, the article's four included."""

from pathlib import Path

import grade
import pytest
import steps_02
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_02.__file__).with_name("02_solutions.py"))
WRONG = WrongAnswers()
wrong_answer, wrong_answers = WRONG.register, WRONG.register_all

# ---- step 1 --------------------------------------------------------------------------------------


def route_in_any_dtype(x, gate, top_k, dim=-1):
    best, experts = (x @ gate.T).softmax(dim).topk(top_k)
    return best / best.sum(-1, keepdim=True), experts


def route_without_softmax(x, gate, top_k):
    best, experts = (x @ gate.T).topk(top_k)
    return best, experts


def weights_of_all_experts(x, gate, top_k):
    weights, experts = solutions.route(x, gate, top_k)
    return torch.zeros(len(x), len(gate), dtype=x.dtype).scatter(1, experts, weights), experts


wrong_answers(
    "route",
    not_divided=(
        r"token \d+ sum to 0\.\d+, not to 1",
        lambda x, gate, k: (x @ gate.T).softmax(-1).topk(k),
    ),
    no_softmax=("there is no softmax", route_without_softmax),
    no_softmax_divided=(
        "there is no softmax",
        lambda *a: ((s := route_without_softmax(*a))[0] / s[0].sum(-1, keepdim=True), s[1]),
    ),
    two_softmaxes=(
        "the softmax is applied twice",
        lambda *a: ((c := (a[0] @ a[1].T).softmax(-1).topk(a[2]))[0].softmax(-1), c[1]),
    ),
    softmax_over_tokens=(
        "is the softmax over the tokens",
        lambda *a: route_in_any_dtype(*a, dim=0),
    ),
    swapped=("the two are swapped", lambda *a: route_in_any_dtype(*a)[::-1]),
    not_gathered=(r"\(the weights\): gather those of the selected experts", weights_of_all_experts),
    worst=("the selection is not the best", lambda x, gate, k: route_in_any_dtype(x, -gate, k)),
    worst_first=(
        "the order is wrong: token 0",
        lambda *a: [part.flip(-1) for part in solutions.route(*a)],
    ),
    float_experts=(
        "expert indices must be integers",
        lambda *a: ((r := solutions.route(*a))[0], r[1].double()),
    ),
    indices_from_one=("there is no expert 5", lambda *a: ((r := solutions.route(*a))[0], r[1] + 1)),
    even_weights=(
        r"token 0 gives expert \d the weight 0.500",
        lambda *a: ((r := solutions.route(*a))[0] * 0 + 1 / a[2], r[1]),
    ),
    always_float=(
        "turns float64 into float32",
        lambda x, gate, k: solutions.route(x.float(), gate.float(), k),
    ),
    always_double=(
        "turns float32 into float64",
        lambda x, gate, k: solutions.route(x.double(), gate.double(), k),
    ),
    scores_in_bf16=("in bf16, rounding decides the selection", route_in_any_dtype),
    converted_too_late=(
        "in bf16, rounding decides the selection",
        lambda x, gate, k: solutions.route(
            logits := x @ gate.T, torch.eye(len(gate), dtype=logits.dtype), k
        ),
    ),
    exp_without_maximum=(
        "overflows on large scores",
        lambda x, gate, k: (
            (b := (x @ gate.T).exp().topk(k))[0] / b[0].sum(-1, keepdim=True),
            b[1],
        ),
    ),
    always_two=("for top_k = 1", lambda x, gate, k: solutions.route(x, gate, 2)),
    gate_detached=(
        "no gradient reaches gate",
        lambda x, gate, k: solutions.route(x, gate.detach(), k),
    ),
    detached=(
        "no gradient flows at all",
        lambda *a: ((r := solutions.route(*a))[0].detach(), r[1]),
    ),
    weights_only=(
        "returns a Tensor, not the 2 tensors weights, experts",
        lambda *a: solutions.route(*a)[0],
    ),
    gate_not_transposed=(
        r"raises RuntimeError at line \d+: mat1 and mat2",
        lambda x, gate, k: solutions.route(x, gate.T, k),
    ),
)

# ---- step 2: the article's four mistakes and others ----------------------------------------------


def add(y, e, token, output, w):
    return y.index_add(0, token, output * w)


def loop(x, weights, experts, up, out, combine=add, indices=range, mlp=solutions.mlp):
    """Run the solution with changes.

    combine(y, e, token, output, w) adds the rows that expert e computed to y. indices(E) are the
    experts that run.
    """
    y = torch.zeros_like(x)
    for e in indices(len(up)):
        token, slot = (experts == e).nonzero(as_tuple=True)
        y = combine(y, e, token, mlp(x[token], up[e], out[e]), weights[token, slot, None])
    return y


def first_rows(y, e, token, output, w):
    y = y.clone()
    y[: len(output)] += output * w
    return y


SLOT_AS_EXPERT = "the slot .* was used as the expert's index"
TOGETHER = "different tokens are added together, as in the article.*is it a sum over"
TOGETHER_IN_FIRST_ROWS = (
    "different tokens are added together, as in the article.*are added to the first outputs"
)
IGNORED = "the gate's weights are ignored, as in the article's"


@wrong_answer("experts_loop", SLOT_AS_EXPERT)
def article_masks_by_slot(x, weights, experts, up, out):
    y = torch.zeros_like(x)
    for k in range(experts.size(1)):
        token, slot = (experts == k).nonzero(as_tuple=True)
        y = add(y, k, token, solutions.mlp(x[token], up[k], out[k]), weights[token, slot, None])
    return y


@wrong_answer("experts_loop", SLOT_AS_EXPERT)
def article_runs_expert_k_for_slot_k(x, weights, experts, up, out):
    return sum(
        solutions.mlp(x, up[k], out[k]) * weights[:, k, None] for k in range(experts.size(1))
    )


@wrong_answer("experts_loop", SLOT_AS_EXPERT)
def article_with_the_name_defined(x, weights, experts, up, out):
    y = torch.zeros_like(x)
    for k in range(experts.size(1)):
        mask = (experts == k).any(-1)
        y += solutions.mlp(x[mask], up[k], out[k]).sum(0)
    return y


wrong_answers(
    "experts_loop",
    article_undefined_name=(
        "uses a name that is not defined.*: NameError at line",
        lambda *a: expert_outputs,  # noqa: F821
    ),
    article_sums_tokens=(
        TOGETHER,
        lambda *a: loop(
            *a,
            combine=lambda y, e, token, output, w: y.index_add(
                0, token, (output * w).sum(0).expand_as(output)
            ),
        ),
    ),
    article_sums_to_all=(
        TOGETHER,
        lambda *a: loop(*a, combine=lambda y, e, token, output, w: y + (output * w).sum(0)),
    ),
    article_adds_to_first_rows=(TOGETHER_IN_FIRST_ROWS, lambda *a: loop(*a, combine=first_rows)),
    article_ignores_weights=(
        IGNORED,
        lambda *a: loop(*a, combine=lambda y, e, token, output, w: y.index_add(0, token, output)),
    ),
    mean=(
        "a plain mean over",
        lambda x, w, e, up, out: solutions.experts_loop(
            x, torch.full_like(w, 1 / w.size(1)), e, up, out
        ),
    ),
    weight_on_input=(
        "weights appear squared",
        lambda x, weights, experts, up, out: sum(
            solutions.experts_loop(x * w, torch.ones_like(w), e, up, out)
            for w, e in zip(weights.split(1, -1), experts.split(1, -1), strict=True)
        ),
    ),
    weight_of_slot_0=(
        r"the weight of token (\d+) in slot 0, instead of its own weight 0\.\d+ in slot 1",
        lambda x, w, e, up, out: solutions.experts_loop(x, w[:, :1].expand_as(w), e, up, out),
    ),
    weight_of_other=(
        r"the weight of token 15 in slot 0, instead of its own weight 0\.\d+ in slot 0",
        lambda x, w, e, up, out: solutions.experts_loop(x, w.roll(1, 0), e, up, out),
    ),
    weight_doubled=(
        r"is multiplied by \d\.\d+, not by its weight",
        lambda x, w, e, up, out: solutions.experts_loop(x, 2 * w, e, up, out),
    ),
    all_experts=(
        "every expert runs for every token",
        lambda x, w, e, up, out: sum(map(solutions.mlp, [x] * len(up), up, out)),
    ),
    another_expert=(
        r"expert \d runs for token \d+, which selected",
        lambda x, w, e, up, out: solutions.experts_loop(x, w, 4 - e, up, out),
    ),
    first_choice=(
        "only the first choice of each token counts",
        lambda x, w, e, up, out: solutions.experts_loop(x, w[:, :1], e[:, :1], up, out),
    ),
    overwritten=(
        "are overwritten instead of added",
        lambda *a: loop(
            *a, combine=lambda y, e, token, output, w: y.index_copy(0, token, output * w)
        ),
    ),
    one_expert_short=("expert 4 never runs", lambda *a: loop(*a, indices=lambda n: range(n - 1))),
    from_one=("expert 0 never runs", lambda *a: loop(*a, indices=lambda n: range(1, n))),
    last_token_lost=(
        "expert 1 does not run for token 15",
        lambda x, w, e, up, out: torch.cat(
            [
                solutions.experts_loop(x[:-1], w[:-1], e[:-1], up, out),
                solutions.experts_loop(x[-1:], w[-1:, :1], e[-1:, :1], up, out),
            ]
        ),
    ),
    zeros=("does not depend on any expert", lambda x, *_: torch.zeros_like(x)),
    not_squared=(
        "the ReLU is not squared",
        lambda *a: loop(*a, mlp=lambda x, up, out: (x @ up.T).relu() @ out.T),
    ),
    no_relu=(
        "but there is no ReLU",
        lambda *a: loop(*a, mlp=lambda x, up, out: (x @ up.T) ** 2 @ out.T),
    ),
    no_activation=(
        "there is no activation",
        lambda *a: loop(*a, mlp=lambda x, up, out: x @ up.T @ out.T),
    ),
    gelu=(
        r"1.95 and -0.0455.*is it relu\(.\) \*\* 2",
        lambda *a: loop(*a, mlp=lambda x, up, out: F.gelu(x @ up.T) @ out.T),
    ),
    one_up=(
        "do you use up.e. together with out.e.",
        lambda x, w, e, up, out: solutions.experts_loop(x, w, e, up[:1].expand_as(up), out),
    ),
    not_summed=(
        "sum over the slots",
        lambda x, w, e, up, out: x[:, None].expand(-1, w.size(1), -1),
    ),
    not_added=(
        "add the assignments to",
        lambda x, w, e, up, out: x.repeat_interleave(w.size(1), 0),
    ),
    infinite=("returns NaN or infinity", lambda *a: solutions.experts_loop(*a) / 0),
    weights_detached=(
        "no gradient reaches weights",
        lambda x, w, *a: solutions.experts_loop(x, w.detach(), *a),
    ),
    half_detached=(
        "gradient of x is not",
        lambda x, w, e, up, out: (
            solutions.experts_loop(x, w / 2, e, up, out)
            + solutions.experts_loop(x.detach(), w / 2, e, up, out)
        ),
    ),
    always_float=("turns float64 into float32", lambda *a: solutions.experts_loop(*a).float()),
    in_place=(
        "changes its argument number 1 in place",
        lambda x, *a: x.copy_(solutions.experts_loop(x, *a)),
    ),
    squeezed=("for one token and one expert", lambda *a: solutions.experts_loop(*a).squeeze()),
    needs_two_slots=(
        "for K = 1",
        lambda x, w, e, *a: (
            solutions.experts_loop(x, w, e, *a) + 0 * (w[:, 1:2] if len(x) > 1 else 0)
        ),
    ),
)

# ---- step 3 --------------------------------------------------------------------------------------


def by_slices(x, weights, experts, up, out, finish, token=None, counts=None, w=None):
    """Run the solution of step 3 with changes.

    finish(outputs, order, y, K) brings the weighted rows back to the order of the tokens. token,
    counts and w replace how the token of each row, the lengths of the slices and the weights are
    computed.
    """
    K, flat = experts.size(1), experts.flatten()
    order = flat.argsort(stable=True)
    token = order // K if token is None else token(order, K)
    counts = flat.bincount(minlength=len(up)) if counts is None else counts(flat)
    outputs = [
        solutions.mlp(rows, up[e], out[e]) for e, rows in enumerate(x[token].split(counts.tolist()))
    ]
    w = weights.flatten()[order] if w is None else w(weights)
    return finish(torch.cat(outputs) * w[:, None], order, torch.zeros_like(x), K)


def add_to_tokens(outputs, order, y, K):
    return y.index_add(0, order // K, outputs)


def add_without_index_add(outputs, order, y, K):
    y[order // K] += outputs
    return y


def all_experts_for_all_tokens(x, weights, experts, up, out):
    y = torch.stack([solutions.mlp(x, up[e], out[e]) for e in range(len(up))], 1)  # (N, E, C)
    return (y[torch.arange(len(x))[:, None], experts] * weights[..., None]).sum(1)


STILL_SORTED = "rows are still sorted by expert"
wrong_answers(
    "experts_sorted",
    not_restored=(
        STILL_SORTED,
        lambda *a: by_slices(
            *a, finish=lambda outputs, order, y, K: outputs.unflatten(0, (-1, K)).sum(1)
        ),
    ),
    restored_by_order=(
        STILL_SORTED,
        lambda *a: by_slices(
            *a, finish=lambda outputs, order, y, K: outputs[order].unflatten(0, (-1, K)).sum(1)
        ),
    ),
    index_assignment=(
        "are overwritten instead of added",
        lambda *a: by_slices(*a, finish=add_without_index_add),
    ),
    weights_not_sorted=(
        "the output of expert . for token .* is multiplied by .*, the weight of token",
        lambda *a: by_slices(*a, finish=add_to_tokens, w=torch.flatten),
    ),
    no_weights=(
        IGNORED,
        lambda *a: by_slices(*a, finish=add_to_tokens, w=lambda w: torch.ones_like(w.flatten())),
    ),
    token_by_remainder=(
        r"expert \d runs for token \d+, which selected",
        lambda *a: by_slices(
            *a, finish=add_to_tokens, token=lambda order, K: order % (len(order) // K)
        ),
    ),
    token_is_order=(
        "dimension 0 with size 16$",
        lambda *a: by_slices(*a, finish=add_to_tokens, token=lambda order, K: order),
    ),
    empty_slices_forgotten=(
        "wrong for unused experts 1 and 3: an expert without tokens has an empty slice",
        lambda *a: by_slices(
            *a, finish=add_to_tokens, counts=lambda flat: flat.unique(return_counts=True)[1]
        ),
    ),
    no_minlength=(
        "raises IndexError.*for an unused last expert",
        lambda *a: by_slices(
            *a, finish=lambda *b: add_to_tokens(*b) + 0 * a[2].flatten().bincount()[len(a[3]) - 1]
        ),
    ),
    dense=("2.5 times the work", all_experts_for_all_tokens),
)

# ---- step 4 --------------------------------------------------------------------------------------


def fractions(probs, experts):
    return F.one_hot(experts, probs.size(-1)).to(probs).mean((0, 1))


wrong_answers(
    "load_balancing_loss",
    no_factor=("the factor E = 5 is missing", lambda p, e: (fractions(p, e) * p.mean(0)).sum()),
    mean_over_experts=(
        "the factor E = 5 is missing",
        lambda p, e: p.size(-1) * (fractions(p, e) * p.mean(0)).mean(),
    ),
    by_tokens=(
        "^2 times .*divided by N = 16,",
        lambda p, e: e.size(1) * solutions.load_balancing_loss(p, e),
    ),
    by_tokens_no_factor=(
        "by N, not by N K, and the factor",
        lambda p, e: e.size(1) * (fractions(p, e) * p.mean(0)).sum(),
    ),
    counts=(
        "not divided by their number, N K$",
        lambda p, e: e.numel() * solutions.load_balancing_loss(p, e),
    ),
    counts_no_factor=(
        "by their number, N K, and the factor",
        lambda p, e: e.numel() * (fractions(p, e) * p.mean(0)).sum(),
    ),
    summed=("probabilities are summed", lambda p, e: len(p) * solutions.load_balancing_loss(p, e)),
    factor_twice=(
        "the factor E appears twice",
        lambda p, e: p.size(-1) * solutions.load_balancing_loss(p, e),
    ),
    negative=("the sign is wrong", lambda p, e: -solutions.load_balancing_loss(p, e)),
    argmax=(
        "does not change with `experts`",
        lambda p, e: solutions.load_balancing_loss(p, p.argmax(-1, keepdim=True)),
    ),
    probs_squared=(
        "does not change with `experts`",
        lambda p, e: p.size(-1) * p.mean(0).square().sum(),
    ),
    counts_squared=(
        "does not change with `probs`",
        lambda p, e: p.size(-1) * fractions(p, e).square().sum(),
    ),
    first_choice=(
        "counts only the first choices",
        lambda p, e: solutions.load_balancing_loss(p, e[:, :1]),
    ),
    token_by_token=(
        "multiplies for each token, then averages",
        lambda p, e: p.size(-1) * (F.one_hot(e, p.size(-1)).to(p).mean(1) * p).mean(0).sum(),
    ),
    detached=(
        "no gradient flows at all",
        lambda p, e: solutions.load_balancing_loss(p.detach(), e),
    ),
    not_summed=("sum over the experts", lambda p, e: p.size(-1) * fractions(p, e) * p.mean(0)),
    shifted=(r"gives -?\d\.\d{4} instead of", lambda p, e: solutions.load_balancing_loss(p, e) - 1),
    no_minlength=(
        "for an unused last expert",
        lambda p, e: p.size(-1) * (e.flatten().bincount() / e.numel() * p.mean(0)).sum(),
    ),
    needs_two_slots=(
        "for K = 1",
        lambda p, e: (
            p.size(-1) * (F.one_hot(e, p.size(-1)).sum((0, 1)) / (2 * len(p)) * p.mean(0)).sum()
        ),
    ),
    a_number=(
        "returns a float, not a tensor",
        lambda p, e: solutions.load_balancing_loss(p, e).item(),
    ),
)

# ---- step 5 --------------------------------------------------------------------------------------


def keep(experts, n_expert, capacity, start=0, dim=0):
    one_hot = F.one_hot(experts.flatten(), n_expert)
    return (((one_hot.cumsum(dim) - 1) * one_hot).sum(-1) + start < capacity).view(experts.shape)


wrong_answers(
    "within_capacity",
    slot_first=("all first choices come before any second", lambda e, n, c: keep(e.T, n, c).T),
    each_slot=(
        r"each slot is counted separately: expert \d keeps \d in total, the capacity is 3",
        lambda e, n, c: torch.cat([keep(column, n, c) for column in e.split(1, -1)], -1),
    ),
    one_too_many=("one too many: an expert keeps 4", lambda *a: keep(*a, start=-1)),
    one_too_few=("one too few: an expert keeps 2", lambda *a: keep(*a, start=1)),
    swapped=("True and False are swapped", lambda *a: ~keep(*a)),
    last_first=("the later tokens are kept", lambda e, n, c: keep(e.flip(0), n, c).flip(0)),
    all_experts=(
        "all experts share one capacity",
        lambda e, n, c: torch.arange(e.numel()).view(e.shape) < c,
    ),
    whole_token=(
        "its others are dropped too",
        lambda e, n, c: keep(e, n, c).all(-1, keepdim=True).expand_as(e),
    ),
    keep_all=(
        r"expert 0 keeps 6 assignments, the capacity is 3",
        lambda e, n, c: torch.ones_like(e, dtype=torch.bool),
    ),
    keep_none=(
        r"expert 0 keeps 0 of the 6 assignments to it",
        lambda e, n, c: torch.zeros_like(e, dtype=torch.bool),
    ),
    middle=(
        "token 1 in slot 0, for expert 2, is not kept, but should be",
        lambda e, n, c: keep(e.roll(8, 0), n, c).roll(-8, 0),
    ),
    positions=(
        "must be bool, and is int64",
        lambda e, n, c: F.one_hot(e.flatten(), n).cumsum(0).sum(-1).view(e.shape),
    ),
    flat=("in the shape of `experts`", lambda *a: keep(*a).flatten()),
    at_least_one=("wrong for capacity = 0", lambda e, n, c: keep(e, n, max(c, 1))),
    needs_two_slots=(r"for K = 1", lambda e, n, c: keep(e, n, c) & (e[:, 1:2] >= 0)),
)

# ---- bonuses -------------------------------------------------------------------------------------

wrong_answers(
    "update_bias",
    wrong_sign=(
        "the sign is wrong",
        lambda b, load, rate: b - rate * (load.float().mean() - load).sign(),
    ),
    step_only=(
        "returns only the step",
        lambda b, load, rate: rate * (load.float().mean() - load).sign(),
    ),
    no_sign=("the step is longer", lambda b, load, rate: b + rate * (load.double().mean() - load)),
    relative=(
        "the step is longer",
        lambda b, load, rate: b + rate * (1 - load / load.double().mean()),
    ),
    changes_at_the_mean=(
        "expert 0 has the load 6 and the mean is 6.*here it changes by -0.125",
        lambda b, load, rate: b + rate * (1 - 2 * (load >= load.double().mean()).int()),
    ),
    compared_with_the_sum=(
        "expert 0 has the load 6 .* change by 0.000; here it changes by 0.125",
        lambda b, load, rate: b + rate * (load.sum() - load).sign(),
    ),
    median=(
        "compares the loads with their median, which is 4: the mean is 6",
        lambda b, load, rate: b + rate * (load.median() - load).sign(),
    ),
    middle_of_range=(
        "compares the loads with the middle of their range, which is 10",
        lambda b, load, rate: b + rate * ((load.max() + load.min()) / 2 - load).sign(),
    ),
    mean_of_used=(
        "compares the loads with the mean of the loads that are not 0, which is 7:",
        lambda b, load, rate: b + rate * (load[load > 0].double().mean() - load).sign(),
    ),
    below_the_largest=(
        "compares the loads with the largest load",
        lambda b, load, rate: b + rate * (load.max() - load).sign(),
    ),
    whole_mean=(
        "expert 0 has the load 3 and the mean is 3.42857.* by 0.125; here it changes by 0.000",
        lambda b, load, rate: b + rate * (load.sum() // len(load) - load).sign(),
    ),
    slightly_too_long=(
        "change by 0.1250; here it changes by 0.1251|change by -0.1250; here .* by -0.1251",
        lambda b, load, rate: b + 1.001 * rate * (load.double().mean() - load).sign(),
    ),
    in_place=(
        "argument number 1 in place",
        lambda b, load, rate: b.add_(rate * (load.float().mean() - load).sign()),
    ),
    integers=(
        r"raises RuntimeError.*mean\(\)",
        lambda b, load, rate: b + rate * (load.mean() - load).sign(),
    ),
    a_mean=("wrong shape", lambda b, load, rate: solutions.update_bias(b, load, rate).mean()),
    always_double=(
        "turns float32 into float64",
        lambda b, load, rate: solutions.update_bias(b.double(), load, rate),
    ),
)
wrong_answers(
    "upcycle",
    shared=(
        "the experts share their memory",
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
    swapped=("the two are swapped", lambda up, out, n: solutions.upcycle(up, out, n)[::-1]),
    first_only=(
        r"up\[1\] is not the MLP's",
        lambda up, out, n: [F.pad(w[None], (0, 0, 0, 0, 0, n - 1)) for w in (up, out)],
    ),
    random=(
        r"up\[0\] is not the MLP's",
        lambda up, out, n: (torch.randn(n, *up.shape).double(), solutions.upcycle(up, out, n)[1]),
    ),
    cut=(
        r"wrong shape: \(5, 4, 80\).*\(up\)",
        lambda up, out, n: (torch.stack(up.chunk(n)), torch.stack(out.chunk(n, 1))),
    ),
    up_only=("returns a Tensor", lambda up, out, n: up.repeat(n, 1, 1)),
    halves=(
        "each expert's up is 0.5 times the MLP's",
        lambda up, out, n: (up.repeat(n, 1, 1) / 2, out.repeat(n, 1, 1)),
    ),
    noise=(
        r"out\[0\] is not the MLP's",
        lambda up, out, n: (
            up.repeat(n, 1, 1),
            out.repeat(n, 1, 1) + 0.01 * torch.randn(n, *out.shape).double(),
        ),
    ),
    transposed=(
        r"wrong shape: .*\(out\)",
        lambda up, out, n: (up.repeat(n, 1, 1), out.T.repeat(n, 1, 1)),
    ),
    experts_last=(
        r"wrong shape: \(20, 80, 5\)",
        lambda up, out, n: (torch.stack([up] * n, -1), torch.stack([out] * n, -1)),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_each_wrong_answer_gets_the_message_for_its_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_02.STEPS, step, message, function)
