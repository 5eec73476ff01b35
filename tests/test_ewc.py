"""The Fisher information by its definition, whatever the batch size; and the penalty."""

import pytest
import torch
from torch import nn

from nanods.ewc import Consolidation, consolidate, fisher_diagonal, fisher_reference
from nanods.gpt import GPT, AttentionConfig, GPTConfig, MoEConfig

V = 5
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "hidden_ratio": 2, "context_length": 8}
MODELS = {
    "V0": GPTConfig(**SIZES, vocab_size=V),
    "V1": GPTConfig(
        **SIZES, vocab_size=V, attention=AttentionConfig("block", block_size=2, top_blocks=1)
    ),
    "V2": GPTConfig(**SIZES, vocab_size=V, moe=MoEConfig(n_expert=3, top_k=2)),
}


def model_of(version):
    torch.manual_seed(0)
    model = GPT(MODELS[version]).double().eval()
    for p in model.parameters():
        if p.abs().max() == 0:  # output matrices start at 0, where little has a gradient
            nn.init.normal_(p, std=0.5)
    return model


def sequences(count, length=5, seed=1):
    return torch.randint(V, (count, length), generator=torch.Generator().manual_seed(seed))


def relative_difference(a, b):
    total = sum(x.sum() for x in a.values())
    return (sum((a[name] - b[name]).abs().sum() for name in a) / total).item()


@pytest.mark.parametrize("version", MODELS)
def test_all_labels_give_the_definition(version):
    """Sum p (d log p)^2 over positions and labels, each with a backward pass of its own."""
    model, data = model_of(version), sequences(2, 4)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sequence in data:
        for t in range(3):
            for label in range(V):
                model.zero_grad()
                log_p = model(sequence[None, :-1])[0][0, t].log_softmax(dim=-1)[label]
                log_p.backward()
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        expected[name] += log_p.exp().item() * p.grad**2 / 2
    fisher = fisher_diagonal(model, data, labels="all")
    assert fisher.keys() == expected.keys()
    assert relative_difference(expected, fisher) < 1e-12


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_the_batch_size_changes_rounding_only(version, labels):
    model, data = model_of(version), sequences(7)
    one = fisher_diagonal(model, data, labels, batch_size=1)
    for batch_size in (2, 7, 100):
        assert relative_difference(one, fisher_diagonal(model, data, labels, batch_size)) < 1e-12


def test_one_backward_pass_equals_one_for_each_sequence():
    """The fast route of linear layers and embeddings, against plain gradients."""
    model, data = model_of("V0"), sequences(3)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sequence in data:
        log_probs = model(sequence[None, :-1])[0][0].log_softmax(dim=-1)
        loss = log_probs[torch.arange(len(log_probs)), sequence[1:]].sum()
        gradients = torch.autograd.grad(loss, model.parameters())
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += gradient.square() / len(data)
    assert relative_difference(expected, fisher_diagonal(model, data, "data")) < 1e-12


def test_sampled_labels_estimate_the_expectation():
    model, data = model_of("V0"), sequences(2)
    exact = fisher_reference(model, data)
    draws = [fisher_diagonal(model, data, seed=seed) for seed in range(300)]
    mean = {name: sum(draw[name] for draw in draws) / len(draws) for name in exact}
    traces = [sum(x.sum() for x in fisher.values()).item() for fisher in (exact, mean)]
    assert traces[1] == pytest.approx(traces[0], rel=0.06)
    assert relative_difference(exact, mean) < 0.2
    assert relative_difference(draws[0], draws[1]) > 0.01, "another seed draws other labels"


def test_the_square_of_a_batch_mean_shrinks_with_the_batch():
    """The common mistake: the same sequences, and a penalty that depends on how they are cut."""
    model, data = model_of("V0"), sequences(16)

    def wrong_trace(batch_size):
        total = 0
        for batch in data.split(batch_size):
            logits = model(batch[:, :-1])[0]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, model.parameters())
            total += sum(g.square().sum().item() for g in gradients) * len(batch) / len(data)
        return total

    assert wrong_trace(1) > 1.5 * wrong_trace(4) > 1.5 * wrong_trace(16)


def test_the_model_is_left_as_it_was():
    model = model_of("V0").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    fisher_diagonal(model, sequences(2))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def consolidation(model, seed):
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    draw = {n: torch.rand(p.shape, generator=generator).double() for n, p in parameters.items()}
    fisher = {n: x.square() * (x > 0.3) for n, x in draw.items()}
    return Consolidation({n: p.detach() + draw[n] for n, p in parameters.items()}, fisher)


def test_the_penalty_is_the_formula_and_pulls_towards_the_old_weights():
    model = model_of("V0")
    old = consolidation(model, 1)
    penalty = old.penalty(model, strength=3.0)
    expected = torch.zeros((), dtype=torch.float64)
    flat = {n: (p, old.fisher[n], old.weights[n]) for n, p in model.named_parameters()}
    for p, fisher, weight in flat.values():
        for w, f, a in zip(p.flatten(), fisher.flatten(), weight.flatten(), strict=True):
            expected = expected + 1.5 * f * (w - a) ** 2
    torch.testing.assert_close(penalty, expected.detach(), check_dtype=False, rtol=1e-12, atol=0)
    penalty.backward()
    for p, fisher, weight in flat.values():
        torch.testing.assert_close(p.grad, 3 * fisher * (p - weight), rtol=1e-12, atol=1e-15)


def test_two_tasks_become_one_of_the_same_form():
    model = model_of("V0")
    first, second = consolidation(model, 1), consolidation(model, 2)
    both = consolidate(first, second)
    differences = []
    for seed in range(3):
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p)
        apart = first.penalty(model, 2.0) + second.penalty(model, 2.0)
        differences.append((both.penalty(model, 2.0) - apart).item())
    assert differences[0] < 0
    assert differences[1:] == pytest.approx(differences[:1] * 2, rel=1e-9), "a constant"


def test_another_models_consolidation_is_refused():
    torch.manual_seed(0)
    other = GPT(GPTConfig(**SIZES | {"n_embd": 16}, vocab_size=V))
    with pytest.raises(ValueError, match=r"embedding.weight \(5, 16\) is not a parameter"):
        consolidation(model_of("V0"), 1).penalty(other, 1.0)


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (sequences(2), "guessed", "choose sampled, all or data"),
        (sequences(0), "data", "at least one sequence"),
        (sequences(2, 1), "data", "two tokens"),
    ],
)
def test_bad_arguments_are_refused(data, labels, message):
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(model_of("V0"), data, labels)
