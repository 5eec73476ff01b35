"""The grader of lesson 07 diagnoses each wrong answer."""

from pathlib import Path

import grade
import pytest
import steps_07
import torch
import torch.nn.functional as F

from tests.lessons.wrong_answers import WrongAnswers

solutions = grade.load_file(Path(steps_07.__file__).with_name("07_solutions.py"))
USER, ASSISTANT, END = solutions.USER, solutions.ASSISTANT, solutions.END
WRONG = WrongAnswers()
register_all = WRONG.register_all

# ---- step 1: answer_mask -------------------------------------------------------------------------


def changed_mask(change):
    """Return an answer that changes the right mask: change(mask, tokens)."""
    return lambda tokens: change(solutions.answer_mask(tokens), tokens)


def marks(tokens):
    return (tokens == USER) | (tokens == ASSISTANT)


def after_the_first(tokens):
    return ((tokens == ASSISTANT).cumsum(0) > 0) & ~(
        (tokens == ASSISTANT) & ((tokens == ASSISTANT).cumsum(0) == 1)
    )


def by_pairs(tokens):
    """Learns an answer only where it ends with END."""
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    starts, ends = ((tokens == mark).nonzero()[:, 0].tolist() for mark in (ASSISTANT, END))
    for start, end in zip(starts, ends, strict=False):
        mask[start + 1 : end + 1] = True
    return mask


def never_empty(tokens):
    """Learns the END of an answer only if the answer has a text."""
    mask = solutions.answer_mask(tokens)
    return mask & ~((tokens == END) & (tokens.roll(1) == ASSISTANT))


def after_a_prompt(tokens):
    return solutions.answer_mask(tokens) & ((tokens == USER).cumsum(0) > 0)


register_all(
    "answer_mask",
    everything=("learns everything: the prompts", lambda tokens: torch.ones_like(tokens) > 0),
    all_but_marks=("learns everything but the marks", lambda tokens: ~marks(tokens)),
    prompts=("learns the prompts instead", changed_mask(lambda mask, tokens: ~mask)),
    without_end=("leaves out END", changed_mask(lambda mask, tokens: mask & (tokens != END))),
    with_assistant=(
        "learns the mark ASSISTANT too",
        changed_mask(lambda mask, tokens: mask | (tokens == ASSISTANT)),
    ),
    one_earlier=(
        "learns ASSISTANT and not END",
        changed_mask(lambda mask, tokens: torch.cat([mask[1:], mask[:1]])),
    ),
    one_later=("shifted by one to the right", changed_mask(lambda mask, tokens: mask.roll(1))),
    end_alone=("learns END alone", lambda tokens: tokens == END),
    later_prompts=("everything after the first ASSISTANT, the", after_the_first),
    later_text=(
        "everything after the first ASSISTANT but the marks",
        lambda tokens: after_the_first(tokens) & ~marks(tokens),
    ),
    last_answer=(
        "learns the last answer alone",
        changed_mask(lambda mask, t: mask & ((t == ASSISTANT).flip(0).cumsum(0).flip(0) == 0)),
    ),
    first_answer=(
        "learns the first answer alone",
        changed_mask(lambda mask, tokens: mask & ((tokens == ASSISTANT).cumsum(0) < 2)),
    ),
    cut_off=("wrong for an answer that is cut off", by_pairs),
    empty=("wrong for an empty answer", never_empty),
    assistant_begins=("wrong for a dialogue that the assistant begins", after_a_prompt),
    integers=("the mask must be bool", changed_mask(lambda mask, tokens: mask.long())),
    shape=("wrong shape", changed_mask(lambda mask, tokens: mask[1:])),
)

# ---- step 2: answer_loss -------------------------------------------------------------------------


def nats(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def loss_of(reduce):
    """Return an answer that reduces the nats (B, T): reduce(nats, mask, answer_tokens)."""
    return lambda logits, targets, mask, total: reduce(nats(logits, targets), mask, total)


def row_means(nats, mask):
    return (nats * mask).sum(1) / mask.sum(1)


def at_least_one(logits, targets, mask, total):
    """Divides 0 by 0 where nothing is learnt."""
    each = nats(logits, targets)
    return each[mask].mean() * mask.sum() / total


def by_softmax(logits, targets, mask, total):
    p = logits.softmax(-1).gather(-1, targets[..., None])[..., 0]
    return -(p.log() * mask).sum() / total


register_all(
    "answer_loss",
    mean_of_micro_batch=(
        "mean over this micro-batch's answer tokens",
        loss_of(lambda nats, mask, total: nats[mask].mean()),
    ),
    mean_of_rows=(
        "mean over the rows' means",
        loss_of(lambda nats, mask, total: row_means(nats, mask).mean()),
    ),
    sum_of_rows=(
        "sum over the rows' means",
        loss_of(lambda nats, mask, total: row_means(nats, mask).sum()),
    ),
    no_mask=("ignores the mask: prompts", loss_of(lambda nats, mask, total: nats.mean())),
    no_mask_total=(
        "ignores the mask, and divides",
        loss_of(lambda nats, mask, total: nats.sum() / total),
    ),
    all_positions=(
        "divides by all positions",
        loss_of(lambda nats, mask, total: (nats * mask).mean()),
    ),
    sum=("is the sum: divide", loss_of(lambda nats, mask, total: nats[mask].sum())),
    inverted=(
        "learns where the mask is False",
        loss_of(lambda nats, mask, total: nats[~mask].sum() / total),
    ),
    bits=(
        "is in bits",
        loss_of(lambda nats, mask, total: nats[mask].sum() / total / 0.6931471805599453),
    ),
    sign=("has the wrong sign", loss_of(lambda nats, mask, total: -nats[mask].sum() / total)),
    logits=(
        "takes the logits for log-probabilities",
        lambda logits, t, m, total: -logits.gather(-1, t[..., None])[..., 0][m].sum() / total,
    ),
    over_positions=(
        "softmax over the positions",
        lambda logits, t, m, total: (
            -logits.log_softmax(1).gather(-1, t[..., None])[..., 0][m].sum() / total
        ),
    ),
    each_position=("one number for each position", loss_of(lambda n, mask, total: n * mask)),
    each_row=("one number for each row", loss_of(lambda n, mask, total: (n * mask).sum(1))),
    nothing_learnt=("wrong for a micro-batch without an answer token", at_least_one),
    underflow=("wrong for logits so far apart", by_softmax),
    detached=(
        "no gradient flows at all",
        lambda x, *rest: solutions.answer_loss(x.detach(), *rest),
    ),
)

# ---- step 3: fisher_diagonal ---------------------------------------------------------------------


def fisher_with(combine):
    """Return an answer that combines p (N, V labels, 1, 1) and gradients (N, V labels, V, C)."""

    def fisher_diagonal(weight, x):
        p = (x @ weight.T).softmax(-1)
        error = torch.eye(len(weight), dtype=x.dtype) - p[:, None]
        return combine(p[..., None, None], error[..., None] * x[:, None, None])

    return fisher_diagonal


def by_hessian_of_one_row(weight, x):
    p = (x @ weight.T).softmax(-1)
    return (p * (1 - p)).T @ x.square() / max(len(x), 2)


register_all(
    "fisher_diagonal",
    zero=("is 0 everywhere", fisher_with(lambda p, g: (p * g).sum(1).mean(0).square())),
    of_the_mean=(
        "squares the mean over the examples",
        fisher_with(lambda p, g: (p * g.mean(0).square()).sum(1).mean(0)),
    ),
    alike=("weights all labels alike", fisher_with(lambda p, g: g.square().mean(1).mean(0))),
    unweighted=(
        "without their probabilities",
        fisher_with(lambda p, g: g.square().sum(1).mean(0)),
    ),
    likeliest=(
        "takes the likeliest label alone",
        lambda w, x: solutions.fisher_from_labels(w, x, (x @ w.T).argmax(-1)),
    ),
    sum=("is the sum over the examples", fisher_with(lambda p, g: (p * g**2).sum(1).sum(0))),
    mean_of_labels=(
        "divides by the number of labels",
        fisher_with(lambda p, g: (p * g**2).mean(1).mean(0)),
    ),
    of_p=(
        "differentiates p, not log p",
        fisher_with(lambda p, g: (p * (p * g) ** 2).sum(1).mean(0)),
    ),
    p_squared=("squares p", fisher_with(lambda p, g: ((p * g) ** 2).sum(1).mean(0))),
    magnitudes=("takes magnitudes", fisher_with(lambda p, g: (p * g.abs()).sum(1).mean(0))),
    root=("is the square root", fisher_with(lambda p, g: (p * g**2).sum(1).mean(0).sqrt())),
    x_not_squared=(
        "does not square x",
        lambda w, x: ((p := (x @ w.T).softmax(-1)) * (1 - p)).T @ x / len(x),
    ),
    each_example=("one F for each example", fisher_with(lambda p, g: (p * g**2).sum(1))),
    transposed=("it has the shape of weight", lambda w, x: solutions.fisher_diagonal(w, x).T),
    one_example=("wrong for one example", by_hessian_of_one_row),
)

# ---- step 4: fisher_from_labels ------------------------------------------------------------------


def labels_with(combine):
    """Return an answer that combines the gradients (N, V, C) of the examples."""

    def fisher_from_labels(weight, x, labels):
        error = F.one_hot(labels, len(weight)) - (x @ weight.T).softmax(-1)
        return combine(error[..., None] * x[:, None])

    return fisher_from_labels


def by_autograd_of_the_mean(weight, x, labels):
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(x @ leaf.T, labels), leaf)[0].square()


def weighted(weight, x, labels):
    p = (x @ weight.T).softmax(-1).gather(-1, labels[:, None])
    return labels_with(lambda g: (p[..., None] * g**2).mean(0))(weight, x, labels)


def unbiased_by_n_less_one(g):
    return g.square().sum(0) / max(1, len(g) - 1)


register_all(
    "fisher_from_labels",
    of_the_mean_loss=("the examples' gradients cancel within a batch", by_autograd_of_the_mean),
    of_the_sum=("squares the sum of the gradients: square", labels_with(lambda g: g.sum(0) ** 2)),
    of_the_sum_divided=(
        "squares the sum of the gradients, and divides",
        labels_with(lambda g: g.sum(0) ** 2 / len(g)),
    ),
    sum=("is the sum over the examples", labels_with(lambda g: (g**2).sum(0))),
    gradient=("is the mean gradient", labels_with(lambda g: g.mean(0))),
    loss_gradient=("is the mean loss gradient", labels_with(lambda g: -g.mean(0))),
    magnitudes=("takes magnitudes", labels_with(lambda g: g.abs().mean(0))),
    root=("is the square root", labels_with(lambda g: (g**2).mean(0).sqrt())),
    weighted=("weights the examples by p", weighted),
    no_labels=("ignores the labels", lambda w, x, labels: solutions.fisher_diagonal(w, x)),
    no_probabilities=(
        "lacks the probabilities",
        lambda w, x, labels: F.one_hot(labels, len(w)).to(x.dtype).T @ x**2 / len(x),
    ),
    each_example=("one square for each example", labels_with(lambda g: g**2)),
    less_one=("F\\[0, 0\\] is", labels_with(unbiased_by_n_less_one)),
)

# ---- step 5: ewc_penalty -------------------------------------------------------------------------


def penalty_of(combine):
    """Return an answer that combines w - a, F and the strength."""
    return lambda w, a, fisher, s: combine(w - a.detach(), fisher.detach(), s)


register_all(
    "ewc_penalty",
    no_half=("lacks the factor 1/2", penalty_of(lambda d, F, s: s * (F * d**2).sum())),
    no_strength=("lacks the strength", penalty_of(lambda d, F, s: (F * d**2).sum() / 2)),
    divided=("divides by the strength", penalty_of(lambda d, F, s: (F * d**2).sum() / 2 / s)),
    mean=("is the mean over the weights", penalty_of(lambda d, F, s: s / 2 * (F * d**2).mean())),
    sign=("has the wrong sign", penalty_of(lambda d, F, s: -s / 2 * (F * d**2).sum())),
    near_zero=("holds the weights near 0", lambda w, a, F, s: s / 2 * (F.detach() * w**2).sum()),
    l2=("ignores the Fisher information", penalty_of(lambda d, F, s: s / 2 * (d**2).sum())),
    magnitudes=("takes magnitudes", penalty_of(lambda d, F, s: s / 2 * (F * d.abs()).sum())),
    no_square=("lacks the square", penalty_of(lambda d, F, s: s / 2 * (F * d).sum())),
    fisher_squared=(
        "squares the Fisher information too",
        penalty_of(lambda d, F, s: s / 2 * ((F * d) ** 2).sum()),
    ),
    square_of_sum=("squares the sum", penalty_of(lambda d, F, s: s / 2 * (F * d).sum() ** 2)),
    by_fisher=(
        "divides by the Fisher information",
        penalty_of(lambda d, F, s: s / 2 * (d**2 / F).sum()),
    ),
    each_weight=("one number for each weight", penalty_of(lambda d, F, s: s / 2 * F * d**2)),
    detached=(
        "no gradient flows at all",
        lambda w, a, F, s: solutions.ewc_penalty(w.detach(), a, F, s),
    ),
    old_learns=(
        "a gradient flows to old",
        lambda w, a, F, s: s / 2 * (F.detach() * (w - a) ** 2).sum(),
    ),
    fisher_learns=(
        "a gradient flows to fisher",
        lambda w, a, F, s: s / 2 * (F * (w - a.detach()) ** 2).sum(),
    ),
)

# ---- step 6: consolidate -------------------------------------------------------------------------


def total_of(combine):
    def consolidate(F_1, a, F_2, b):
        return combine(F_1, F_2), solutions.consolidate(F_1, a, F_2, b)[1]

    return consolidate


def centre_of(combine):
    def consolidate(F_1, a, F_2, b):
        return F_1 + F_2, combine(F_1, a, F_2, b)

    return consolidate


register_all(
    "consolidate",
    mean=("F is the mean of both", total_of(lambda F_1, F_2: (F_1 + F_2) / 2)),
    second=("F is that of the second task alone", total_of(lambda F_1, F_2: F_2.clone())),
    first=("F is that of the first task alone", total_of(lambda F_1, F_2: F_1.clone())),
    larger=("F is the larger", total_of(torch.maximum)),
    product=("F is the product", total_of(torch.mul)),
    last_centre=("a is old_2", centre_of(lambda F_1, a, F_2, b: b.clone())),
    first_centre=("a is old_1", centre_of(lambda F_1, a, F_2, b: a.clone())),
    half_way=("a is half way", centre_of(lambda F_1, a, F_2, b: (a + b) / 2)),
    wrong_way=(
        "a weights the centres the wrong way",
        centre_of(lambda F_1, a, F_2, b: (F_1 * b + F_2 * a) / (F_1 + F_2)),
    ),
    undivided=("a is the weighted sum", centre_of(lambda F_1, a, F_2, b: F_1 * a + F_2 * b)),
    by_the_mean=(
        "a divides by the mean of both F: divide by their sum",
        centre_of(lambda F_1, a, F_2, b: (F_1 * a + F_2 * b) / ((F_1 + F_2) / 2)),
    ),
    one_weight_for_all=(
        "each weight has its own",
        centre_of(lambda F_1, a, F_2, b: (F_1.sum() * a + F_2.sum() * b) / (F_1 + F_2).sum()),
    ),
    roots=(
        "a weights by the square roots",
        centre_of(lambda F_1, a, F_2, b: (F_1**0.5 * a + F_2**0.5 * b) / (F_1**0.5 + F_2**0.5)),
    ),
    zero_by_zero=(
        "wrong where both are 0: there keep",
        centre_of(lambda F_1, a, F_2, b: (F_1 * a + F_2 * b) / (F_1 + F_2)),
    ),
    small=(
        "wrong for small F",
        centre_of(
            lambda F_1, a, F_2, b: torch.where(
                F_1 + F_2 > 1e-6, (F_1 * a + F_2 * b) / (F_1 + F_2 + 1e-30), b
            )
        ),
    ),
)


@pytest.mark.parametrize(("step", "message", "function"), WRONG.cases)
def test_grader_names_each_mistake(step, message, function):
    WRONG.assert_diagnosis(steps_07.STEPS, step, message, function)
