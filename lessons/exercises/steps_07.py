"""The steps of lesson 07, each with its tests. check_07.py runs them in a process of its own.

To stop in your code with breakpoint(): python lessons/exercises/steps_07.py FILE

The grader finds mistakes by experiments on the functions, never by reading their source.
"""

import sys

import torch
import torch.nn.functional as F
from grade import (
    Answer,
    KnownMistakes,
    Mistake,
    Step,
    expect_dtype,
    expect_gradients,
    expect_shape,
    first_index,
    is_close,
    main,
    raise_different_element,
    raise_known_mistake,
    random,
)
from torch import Tensor

USER, ASSISTANT, END = 253, 254, 255
N, V, C = 6, 4, 3


# ---- step 1: the mask ----------------------------------------------------------------------------


def dialogue(text: str) -> Tensor:
    """Return the tokens of "UabAcdE": U, A and E are the marks, other letters themselves."""
    marks = {"U": USER, "A": ASSISTANT, "E": END}
    return torch.tensor([marks.get(letter, ord(letter)) for letter in text])


def reference_mask(tokens: Tensor) -> Tensor:
    before_or_at = (tokens == ASSISTANT).cumsum(0) - (tokens == END).cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), before_or_at[:-1]]) > 0


def known_masks(tokens: Tensor) -> KnownMistakes:
    right = reference_mask(tokens)
    is_mark = (tokens == USER) | (tokens == ASSISTANT)
    assistants = (tokens == ASSISTANT).nonzero()[:, 0]
    position = torch.arange(len(tokens))
    return {
        "learns everything: the prompts are read, not learnt": lambda: torch.ones_like(right),
        "learns everything but the marks: the prompts are not learnt": lambda: ~is_mark,
        "learns the prompts instead of the answers": lambda: ~right,
        "leaves out END: without it the model never learns to stop": (
            lambda: right & (tokens != END)
        ),
        "learns the mark ASSISTANT too, which is given": lambda: right | (tokens == ASSISTANT),
        "learns ASSISTANT and not END: the answer begins one token later and ends one later": (
            lambda: torch.cat([right[1:], right[:1]])
        ),
        "learns END alone": lambda: tokens == END,
        "learns everything after the first ASSISTANT, the later prompts too": (
            lambda: position > assistants[0]
        ),
        "learns everything after the first ASSISTANT but the marks, the later prompts too": (
            lambda: (position > assistants[0]) & ~is_mark
        ),
        "learns the last answer alone": lambda: right & (position > assistants[-1]),
        "learns the first answer alone": lambda: right & (position < assistants[1]),
        "is shifted by one to the right: mark the learnt tokens, not those after them": (
            lambda: torch.cat([right[-1:], right[:-1]])
        ),
    }


def check_answer_mask(answer: Answer) -> None:
    def mask_of(tokens: Tensor, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        mask = answer(tokens, when=when)
        expect_shape(mask, tuple(tokens.shape), when=when)
        if mask.dtype != torch.bool:
            raise Mistake(f"the mask must be bool, and is {str(mask.dtype)[6:]}")
        return mask

    tokens = dialogue("UhiAyouEUandAmeEUagainAyesE")
    mask, expected = mask_of(tokens), reference_mask(tokens)
    if not torch.equal(mask, expected):
        raise_known_mistake(mask, known_masks(tokens))
        i = first_index(mask != expected)[0]
        learnt = "learns" if mask[i] else "does not learn"
        raise Mistake(
            f"{learnt} token {i} of {tokens.tolist()}: the answers are between 254 and 255"
        )
    cases = {
        "for one turn": "UhiAyouE",
        "for an answer that is cut off before its END": "UhiAyouEUandAme",
        "for an empty answer, whose END is learnt": "UhiAEUandAmeE",
        "for a dialogue that the assistant begins": "AhiEUyouAandE",
        "for a prompt without an answer, where nothing is learnt": "Uhi",
        "for a dialogue that ends with a prompt": "UhiAyouEUand",
        "for a dialogue that ends with ASSISTANT": "UhiAyouEUandA",
    }
    for when, text in cases.items():
        if not torch.equal(mask_of(dialogue(text), when), reference_mask(dialogue(text))):
            raise Mistake(f"right in general, but wrong {when}")


# ---- step 2: the loss of a micro-batch -----------------------------------------------------------

T = 5


def batch_of_answers() -> tuple[Tensor, Tensor, Tensor, int]:
    """Return logits (3, T, V), targets and mask (3, T) whose rows have 1, 4 and 2 learnt targets,
    and the answer tokens of the whole batch, of which these rows are a part."""
    targets = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(3, T, dtype=torch.bool)
    mask[0, 2], mask[1, 1:], mask[2, 3:] = True, True, True
    return 2 * random(3, T, V), targets, mask, 11


def reference_nats(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]


def reference_loss(logits: Tensor, targets: Tensor, mask: Tensor, answer_tokens: int) -> Tensor:
    return torch.where(mask, reference_nats(logits, targets), 0.0).sum() / answer_tokens


def known_losses(
    logits: Tensor, targets: Tensor, mask: Tensor, answer_tokens: int
) -> KnownMistakes:
    nats = reference_nats(logits, targets)
    right = reference_loss(logits, targets, mask, answer_tokens)
    of_rows = (nats * mask).sum(1) / mask.sum(1)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    over_positions = -logits.log_softmax(dim=1).gather(-1, targets[..., None])[..., 0]
    return {
        "is the mean over this micro-batch's answer tokens: then the tokens of a micro-batch with "
        "few answers count more. Divide by answer_tokens": lambda: nats[mask].mean(),
        "is the mean over the rows' means: then the tokens of short answers count more. Divide the "
        "sum by answer_tokens": lambda: of_rows.mean(),
        "is the sum over the rows' means: divide the sum of the nats by answer_tokens": (
            lambda: of_rows.sum()
        ),
        "ignores the mask: prompts and padding are learnt too": lambda: nats.mean(),
        "ignores the mask, and divides by answer_tokens": lambda: nats.sum() / answer_tokens,
        "divides by all positions: those that are not learnt count as 0 nats": (
            lambda: (nats * mask).mean()
        ),
        "is the sum: divide it by answer_tokens": lambda: right * answer_tokens,
        "learns where the mask is False": lambda: (nats * ~mask).sum() / answer_tokens,
        "is in bits: nats are natural logarithms": (
            lambda: right / torch.tensor(2.0, dtype=torch.float64).log()
        ),
        "has the wrong sign": lambda: -right,
        "takes the logits for log-probabilities: log_softmax first": (
            lambda: -(chosen * mask).sum() / answer_tokens
        ),
        "takes the softmax over the positions: over the vocabulary, dim=-1": (
            lambda: (over_positions * mask).sum() / answer_tokens
        ),
    }


def check_answer_loss(answer: Answer) -> None:
    def loss(*arguments, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(*arguments, when=when)
        hints = {
            tuple(arguments[1].shape): ": one number for each position; sum those of the mask",
            (len(arguments[1]),): ": one number for each row; sum over all rows",
        }
        expect_shape(result, (), hints.get(tuple(result.shape), ""), when)
        expect_dtype(result, arguments[0])
        return result

    logits, targets, mask, total = batch_of_answers()
    result, expected = (
        loss(logits, targets, mask, total),
        reference_loss(logits, targets, mask, total),
    )
    if not is_close(result, expected):
        raise_known_mistake(result, known_losses(logits, targets, mask, total))
        raise_different_element(result, expected, "the loss")
    none, every = torch.zeros_like(mask), torch.ones_like(mask)
    cases = {
        "for a micro-batch without an answer token, which adds 0": (logits, targets, none, total),
        "where everything is learnt": (logits, targets, every, total),
        "for one row": (logits[:1], targets[:1], mask[:1], total),
        "for one position": (logits[:, 3:4], targets[:, 3:4], mask[:, 3:4], total),
        "for logits so far apart that a softmax is 0": (400 * logits, targets, mask, total),
        "where this micro-batch is the whole batch": (logits, targets, mask, 7),
    }
    for when, case in cases.items():
        if not is_close(loss(*case, when=when), reference_loss(*case), 1e-7):
            raise Mistake(f"right in general, but wrong {when}")
    in_fp32 = loss(logits.float(), targets, mask, total, when="in fp32").double()
    if not is_close(in_fp32, expected, 1e-3):
        raise Mistake("right in fp64, but wrong in fp32")
    expect_gradients(
        lambda logits: loss(logits, targets, mask, total),
        lambda logits: reference_loss(logits, targets, mask, total),
        {"logits": logits},
    )


# ---- step 3: Fisher information ------------------------------------------------------------------


def classifier() -> tuple[Tensor, Tensor]:
    """Return weight (V, C) and x (N, C)."""
    return random(V, C), 1.5 * random(N, C, seed=2)


def gradients_by_label(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return p (N, V), and the gradient of log p of each label at W, (N, V labels, V, C)."""
    p = (x @ weight.T).softmax(dim=-1)
    error = torch.eye(len(weight), dtype=x.dtype) - p[:, None, :]  # (N, V labels, V)
    return p, error[..., None] * x[:, None, None, :]


def reference_fisher(weight: Tensor, x: Tensor) -> Tensor:
    p, g = gradients_by_label(weight, x)
    return (p[..., None, None] * g.square()).sum(dim=1).mean(dim=0)


def known_fishers(weight: Tensor, x: Tensor) -> KnownMistakes:
    p, g = gradients_by_label(weight, x)
    weights = p[..., None, None]
    right = reference_fisher(weight, x)
    likeliest = g[torch.arange(len(x)), p.argmax(dim=-1)]
    return {
        "is 0 everywhere: the expected gradient is 0, so square it before the expectation": (
            lambda: torch.zeros_like(right)
        ),
        "squares the mean over the examples: square each example's gradient first": (
            lambda: (weights * g.mean(dim=0).square()).sum(dim=1).mean(dim=0)
        ),
        "weights all labels alike: a label counts with its probability p(y | x)": (
            lambda: g.square().mean(dim=(0, 1))
        ),
        "sums over the labels without their probabilities p(y | x)": (
            lambda: g.square().sum(dim=1).mean(dim=0)
        ),
        "takes the likeliest label alone: it is the expectation over all labels": (
            lambda: likeliest.square().mean(dim=0)
        ),
        "is the sum over the examples: take their mean": lambda: right * len(x),
        "divides by the number of labels: their probabilities add up to 1 already": (
            lambda: right / len(weight)
        ),
        "differentiates p, not log p": (lambda: (weights**3 * g.square()).sum(dim=1).mean(dim=0)),
        "squares p(y | x) too: p weights the squared gradient": (
            lambda: (weights**2 * g.square()).sum(dim=1).mean(dim=0)
        ),
        "takes magnitudes: square the gradients": (
            lambda: (weights * g.abs()).sum(dim=1).mean(dim=0)
        ),
        "is the square root: leave it squared": lambda: right.sqrt(),
        "does not square x[c]": lambda: (p * (1 - p)).T @ x / len(x),
    }


def check_fisher_diagonal(answer: Answer) -> None:
    def fisher(weight: Tensor, x: Tensor, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(weight, x, when=when)
        hint = f", {when}" if when else ""
        if not when and tuple(result.shape) == (len(x), *weight.shape):
            hint = ": one F for each example; return their mean"
        elif not when and tuple(result.shape) == tuple(weight.T.shape):
            hint = ": it has the shape of weight"
        expect_shape(result, tuple(weight.shape), hint)
        expect_dtype(result, weight)
        return result.detach()

    weight, x = classifier()
    result, expected = fisher(weight, x), reference_fisher(weight, x)
    if not is_close(result, expected):
        raise_known_mistake(result, known_fishers(weight, x), "F")
        raise_different_element(result, expected, "F")
    cases = {
        "for one example": (weight, x[:1]),
        "for as many examples as labels": (weight, x[:V]),
        "for two labels": (weight[:2], x),
        "for one input": (weight[:, :1], x[:, :1]),
        "for weights so large that a probability is 0": (500 * weight, x),
        "for 50 examples": (weight, random(50, C, seed=5)),
    }
    for when, case in cases.items():
        if not is_close(fisher(*case, when=when), reference_fisher(*case)):
            raise Mistake(f"right in general, but wrong {when}")
    if not is_close(fisher(weight.float(), x.float(), "in fp32").double(), expected, 1e-3):
        raise Mistake("right in fp64, but wrong in fp32")


# ---- step 4: one label for each example ----------------------------------------------------------


def some_labels(count: int = N) -> Tensor:
    return torch.randint(V, (count,), generator=torch.Generator().manual_seed(4))


def label_gradients(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of log p of each example's label, (N, V, C)."""
    return gradients_by_label(weight, x)[1][torch.arange(len(x)), labels]


def reference_from_labels(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    return label_gradients(weight, x, labels).square().mean(dim=0)


def known_from_labels(weight: Tensor, x: Tensor, labels: Tensor) -> KnownMistakes:
    g = label_gradients(weight, x, labels)
    right = g.square().mean(dim=0)
    p = (x @ weight.T).softmax(dim=-1)
    chosen = p[torch.arange(len(x)), labels][:, None, None]
    return {
        "squares the gradient of the mean loss: the examples' gradients cancel within a batch, so "
        "F shrinks as the batch grows. Square each example's gradient first": (
            lambda: g.mean(dim=0).square()
        ),
        "squares the sum of the gradients: square each example's gradient first": (
            lambda: g.sum(dim=0).square()
        ),
        "squares the sum of the gradients, and divides by N afterwards: square each example's "
        "gradient first": lambda: g.sum(dim=0).square() / len(x),
        "is the sum over the examples: take their mean": lambda: right * len(x),
        "is the mean gradient: square each example's": lambda: g.mean(dim=0),
        "is the mean loss gradient: square each example's": lambda: -g.mean(dim=0),
        "takes magnitudes: square the gradients": lambda: g.abs().mean(dim=0),
        "is the square root: leave it squared": lambda: right.sqrt(),
        "weights the examples by p(label | x): the labels were drawn with these probabilities": (
            lambda: (chosen * g.square()).mean(dim=0)
        ),
        "ignores the labels: it is the expectation of step 3": (
            lambda: reference_fisher(weight, x)
        ),
        "lacks the probabilities: the gradient at row v is (1 if label = v else 0, minus p_v) x": (
            lambda: F.one_hot(labels, len(weight)).to(x.dtype).T @ x.square() / len(x)
        ),
    }


def check_fisher_from_labels(answer: Answer) -> None:
    def fisher(weight: Tensor, x: Tensor, labels: Tensor, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(weight, x, labels, when=when)
        hint = f", {when}" if when else ""
        if not when and tuple(result.shape) == (len(x), *weight.shape):
            hint = ": one square for each example; return their mean"
        expect_shape(result, tuple(weight.shape), hint)
        expect_dtype(result, weight)
        return result.detach()

    (weight, x), labels = classifier(), some_labels()
    result, expected = fisher(weight, x, labels), reference_from_labels(weight, x, labels)
    if not is_close(result, expected):
        raise_known_mistake(result, known_from_labels(weight, x, labels), "F")
        raise_different_element(result, expected, "F")
    many = random(40, C, seed=6)
    cases = {
        "for one example": (weight, x[:1], labels[:1]),
        "for as many examples as labels": (weight, x[:V], labels[:V]),
        "where all examples have one label": (weight, x, torch.ones_like(labels)),
        "for one input": (weight[:, :1], x[:, :1], labels),
        "for weights so large that a probability is 0": (500 * weight, x, labels),
        "for 40 examples": (weight, many, some_labels(40)),
    }
    for when, case in cases.items():
        if not is_close(fisher(*case, when=when), reference_from_labels(*case)):
            raise Mistake(f"right in general, but wrong {when}")
    twice = fisher(weight, x.repeat(2, 1), labels.repeat(2))
    if not is_close(twice, expected):
        raise Mistake("F changes when every example stands in the batch twice")
    if not is_close(fisher(weight.float(), x.float(), labels, "in fp32").double(), expected, 1e-3):
        raise Mistake("right in fp64, but wrong in fp32")


# ---- step 5: the penalty -------------------------------------------------------------------------


def reference_penalty(weight: Tensor, old: Tensor, fisher: Tensor, strength: float) -> Tensor:
    return strength / 2 * (fisher * (weight - old).square()).sum()


def known_penalties(weight: Tensor, old: Tensor, fisher: Tensor, strength: float) -> KnownMistakes:
    right = reference_penalty(weight, old, fisher, strength)
    distance = weight - old
    return {
        "lacks the factor 1/2: its gradient is then twice as large": lambda: 2 * right,
        "lacks the strength": lambda: right / strength,
        "divides by the strength": lambda: right / strength**2,
        "is the mean over the weights: take the sum": lambda: right / weight.numel(),
        "has the wrong sign": lambda: -right,
        "holds the weights near 0, not near the old ones": (
            lambda: strength / 2 * (fisher * weight.square()).sum()
        ),
        "ignores the Fisher information: that is an L2 penalty": (
            lambda: strength / 2 * distance.square().sum()
        ),
        "takes magnitudes: square the distance": (
            lambda: strength / 2 * (fisher * distance.abs()).sum()
        ),
        "lacks the square": lambda: strength / 2 * (fisher * distance).sum(),
        "squares the Fisher information too": (
            lambda: strength / 2 * (fisher * distance).square().sum()
        ),
        "squares the sum: sum the squares": (
            lambda: strength / 2 * (fisher * distance).sum().square()
        ),
        "divides by the Fisher information: weights that matter more are held harder": (
            lambda: strength / 2 * (distance.square() / fisher).sum()
        ),
    }


def check_ewc_penalty(answer: Answer) -> None:
    def penalty(*arguments, when: str = "") -> Tensor:
        """Call the answer, check the shape and dtype of its result and return it."""
        result = answer(*arguments, when=when)
        is_unsummed = not when and tuple(result.shape) == tuple(arguments[0].shape)
        hint = ": one number for each weight; return their sum" if is_unsummed else ""
        expect_shape(result, (), hint, when)
        expect_dtype(result, arguments[0])
        return result

    weight, old = random(V, C), random(V, C, seed=2)
    fisher, strength = random(V, C, seed=3).square() + 0.1, 7.0
    case = weight, old, fisher, strength
    result, expected = penalty(*case), reference_penalty(*case)
    if not is_close(result, expected):
        raise_known_mistake(result, known_penalties(*case))
        raise_different_element(result, expected, "the penalty")
    cases = {
        "at the old weights": (old, old, fisher, strength),
        "for strength 0": (weight, old, fisher, 0.0),
        "for a vector": (weight[0], old[0], fisher[0], strength),
        "where F is 0": (weight, old, torch.zeros_like(fisher), strength),
    }
    for when, case in cases.items():
        if not is_close(penalty(*case, when=when), reference_penalty(*case)):
            raise Mistake(f"right in general, but wrong {when}")
    in_fp32 = penalty(weight.float(), old.float(), fisher.float(), strength, when="in fp32")
    if not is_close(in_fp32.double(), expected, 1e-3):
        raise Mistake("right in fp64, but wrong in fp32")
    expect_gradients(
        lambda weight: penalty(weight, old, fisher, strength),
        lambda weight: reference_penalty(weight, old, fisher, strength),
        {"weight": weight},
    )
    constants = {"old": old.clone().requires_grad_(), "fisher": fisher.clone().requires_grad_()}
    result = penalty(weight.clone().requires_grad_(), *constants.values(), strength)
    if not is_close(result, expected):
        raise Mistake("right in general, but wrong where old and fisher require a gradient")
    if not result.requires_grad:
        raise Mistake("no gradient flows at all where old and fisher require one")
    gradients = torch.autograd.grad(result, list(constants.values()), allow_unused=True)
    for name, gradient in zip(constants, gradients, strict=True):
        if gradient is not None:
            raise Mistake(f"a gradient flows to {name}, which is a constant: detach it")


# ---- step 6: two tasks ---------------------------------------------------------------------------


def reference_consolidation(
    F_1: Tensor, a: Tensor, F_2: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    total = F_1 + F_2
    centre = (F_1 * a + F_2 * b) / torch.where(total > 0, total, 1.0)
    return total, torch.where(total > 0, centre, b)


def known_totals(F_1: Tensor, F_2: Tensor) -> KnownMistakes:
    return {
        "is the mean of both: they add up": lambda: (F_1 + F_2) / 2,
        "is that of the second task alone: the first is then forgotten": lambda: F_2,
        "is that of the first task alone": lambda: F_1,
        "is the larger of both: they add up": lambda: torch.maximum(F_1, F_2),
        "is the product of both: they add up": lambda: F_1 * F_2,
    }


def known_centres(F_1: Tensor, a: Tensor, F_2: Tensor, b: Tensor) -> KnownMistakes:
    total = F_1 + F_2
    return {
        "is old_2: the penalty of the first task then pulls to the wrong place": lambda: b,
        "is old_1": lambda: a,
        "is half way between both: the Fisher information weights them": lambda: (a + b) / 2,
        "weights the centres the wrong way round": lambda: (F_1 * b + F_2 * a) / total,
        "is the weighted sum: divide it by F": lambda: F_1 * a + F_2 * b,
        "divides by the mean of both F: divide by their sum": lambda: (
            2 * (F_1 * a + F_2 * b) / total
        ),
        "weights by the sums of both F over all weights: each weight has its own": (
            lambda: (F_1.sum() * a + F_2.sum() * b) / total.sum()
        ),
        "weights by the square roots of F": (
            lambda: (F_1.sqrt() * a + F_2.sqrt() * b) / (F_1.sqrt() + F_2.sqrt())
        ),
    }


def check_consolidate(answer: Answer) -> None:
    def both(*arguments: Tensor, when: str = "") -> tuple[Tensor, Tensor]:
        """Call the answer, check the shapes and dtypes of its results and return them."""
        results = answer(*arguments, when=when)
        for result in results:
            expect_shape(result, tuple(arguments[0].shape), when=when)
            expect_dtype(result, arguments[0])
        return results

    F_1, F_2 = (random(V, C, seed=seed).square() + 0.05 for seed in (1, 2))
    a, b = random(V, C, seed=3), random(V, C, seed=4)
    (total, centre), expected = both(F_1, a, F_2, b), reference_consolidation(F_1, a, F_2, b)
    if not is_close(total, expected[0]):
        raise_known_mistake(total, known_totals(F_1, F_2), "F")
        raise_different_element(total, expected[0], "F")
    if not is_close(centre, expected[1]):
        raise_known_mistake(centre, known_centres(F_1, a, F_2, b), "a")
        raise_different_element(centre, expected[1], "a")
    zero = torch.zeros_like(F_1)
    one_zero = F_1.clone()
    one_zero[1, 1] = 0
    cases = {
        "where both are 0: there keep old_2": (zero, a, zero, b),
        "where the first F is 0": (zero, a, F_2, b),
        "where the second F is 0": (F_1, a, zero, b),
        "where both are 0 for one weight alone": (one_zero, a, one_zero, b),
        "for small F": (1e-9 * F_1, a, 1e-9 * F_2, b),
        "for a vector": (F_1[0], a[0], F_2[0], b[0]),
    }
    for when, case in cases.items():
        for result, right in zip(
            both(*case, when=when), reference_consolidation(*case), strict=True
        ):
            if not is_close(result, right):
                raise Mistake(f"right in general, but wrong {when}")
    in_fp32 = both(F_1.float(), a.float(), F_2.float(), b.float(), when="in fp32")
    if not all(is_close(x.double(), y, 1e-3) for x, y in zip(in_fp32, expected, strict=True)):
        raise Mistake("right in fp64, but wrong in fp32")


STEPS = [
    Step("answer_mask", check_answer_mask, mask=True),
    Step("answer_loss", check_answer_loss),
    Step("fisher_diagonal", check_fisher_diagonal),
    Step("fisher_from_labels", check_fisher_from_labels),
    Step("ewc_penalty", check_ewc_penalty),
    Step("consolidate", check_consolidate, returns=("F", "a")),
]

if __name__ == "__main__":
    sys.exit(main(STEPS))
