"""The optimizers of a run: who updates what, at which rate, and how their state is restored."""

from dataclasses import replace

import pytest
import torch

from nanods.build import build_model
from nanods.command_line import from_command_line
from nanods.config import PRESETS
from nanods.training import checkpoint
from nanods.training.optimizers import get_lr_multiplier, make_optimizers, set_learning_rate

SIZE = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--context-length", "32"]


def config_of(*flags):
    return from_command_line("", ["v2-tiny", *SIZE, "--moe.n-expert", "4", *flags])


def test_adamw_updates_everything_and_decays_matrices_only():
    config = config_of("--optimizer", "adamw", "--lr", "0.002", "--weight-decay", "0.1")
    model = build_model(config)
    (optimizer,) = make_optimizers(config, model)
    assert type(optimizer) is torch.optim.AdamW
    names = {p: name for name, p in model.named_parameters()}
    decay = {}
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 0.002
        decay |= {names[p]: group["weight_decay"] for p in group["params"]}
    assert decay.keys() == set(names.values())
    plain = ("embedding.weight", "head.weight", "gate.weight", "conv.gain")
    assert all(decay[name] == (0.0 if name.endswith(plain) else 0.1) for name in decay)


@pytest.mark.parametrize(
    ("flags", "lr"), [((), 0.003), (("--lr", "0.02"), 0.02), (("--lr=0.01",), 0.01)]
)
def test_adamw_has_a_rate_of_its_own_unless_one_is_given(flags, lr, capsys):
    assert config_of("--optimizer", "adamw", *flags).lr == lr
    assert ("AdamW's default" in capsys.readouterr().out) == (not flags)
    assert config_of().lr == PRESETS["v2-tiny"].lr


def test_the_learning_rate_rises_and_falls():
    config = replace(PRESETS["v0-tiny"], steps=100, warmup=0.1, decay=0.5)
    shares = [get_lr_multiplier(step, config) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[50] == 1
    assert shares[75] == pytest.approx(0.5) and shares[99] == pytest.approx(0.02)
    model = build_model(config_of())
    optimizers = make_optimizers(config_of(), model)
    assert set_learning_rate(optimizers, 75, config) == pytest.approx(0.5 * config.lr)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.5 * group["initial_lr"])


def test_two_optimizers_of_one_class_get_their_own_state_back():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        return model, [torch.optim.AdamW(layer.parameters(), lr=0.1) for layer in model]

    def step(model, optimizers):
        model(torch.ones(2, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    model, optimizers = make()
    step(model, optimizers)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors = checkpoint.optimizer_tensors(model, optimizers)
    tensors = {name: x.clone() for name, x in tensors.items()}
    again, its_optimizers = make()
    again.load_state_dict(weights)
    checkpoint.restore_optimizers(again, its_optimizers, tensors)
    for each in ((model, optimizers), (again, its_optimizers)):
        step(*each)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
