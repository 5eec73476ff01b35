"""The optimizers of a run, and the learning rate over time.

By default Muon updates the weight matrices, and AdamW everything else: embeddings, the output head,
routers' gates and single numbers (nanods/training/parameter_groups.py). With `--optimizer adamw`,
AdamW updates everything. Another optimizer is one more branch in `make_optimizers` and one more row
of `STATE_BYTES` (docs/MODIFYING.md); checkpoints need no change, since they store whatever state an
optimizer keeps.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanods.config import Config
from nanods.training.muon import Muon, orthogonalise
from nanods.training.parameter_groups import optimizer_of

STATE_BYTES = {"muon": 4, "adamw": 8}
"""Bytes of an optimizer's state per parameter, which the planner adds up: Muon keeps one fp32
tensor of the parameter's shape, AdamW two."""


def make_optimizers(
    config: Config,
    model: nn.Module,
    orthogonalise_matrices: Callable[[Tensor], Tensor] = orthogonalise,
    orthogonalise_experts: Callable[[Tensor], Tensor] = orthogonalise,
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model's parameters.

    Each of their parameter groups has "initial_lr", its peak learning rate. Several processes pass
    functions that split the orthogonalising among them (nanods/distributed/).
    """
    kind = optimizer_of(model)
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if kind[name] == "muon"]
    experts = [p for name, p in parameters.items() if kind[name] == "experts"]  # stacks (E, R, C)
    others = [p for name, p in parameters.items() if kind[name] == "adamw"]
    if config.optimizer == "adamw":
        decayed = {"lr": config.lr, "weight_decay": config.weight_decay}
        groups = adamw_groups(matrices, decayed) + adamw_groups(experts, decayed)
        groups += adamw_groups(others, {"lr": config.lr})
        return with_peaks([make_adamw(groups, betas=(0.9, 0.95))])

    groups = adamw_groups(others, {"lr": config.lr / 2})
    muon_groups = [{"params": matrices, "orthogonalise": orthogonalise_matrices}]
    if experts and config.expert_optimizer == "muon":
        muon_groups.append(
            {
                "params": experts,
                "lr": config.expert_lr,
                "every": config.expert_every,
                "orthogonalise": orthogonalise_experts,
            }
        )
    elif experts:
        decay = config.weight_decay
        groups.append({"params": experts, "lr": config.expert_lr, "weight_decay": decay})
    muon = Muon(
        muon_groups,
        config.lr,
        config.momentum,
        config.weight_decay,
        equal_neurons=config.equal_neurons,
    )
    return with_peaks([muon, make_adamw(groups, betas=(0.8, 0.99))])


def adamw_groups(parameters: list[nn.Parameter], settings: dict) -> list[dict]:
    """Return the parameter groups of AdamW: FSDP's shards and whole tensors apart, since its fused
    kernel cannot mix them."""
    shards = [p for p in parameters if isinstance(p, DTensor)]
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    return [{"params": group, **settings} for group in (shards, whole) if group]


def make_adamw(groups: list[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return AdamW with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101) in the
    groups that ask for it."""
    return torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True)


def with_peaks(optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Note each group's peak learning rate as "initial_lr", as PyTorch's schedulers do."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


# ---- the learning rate over time -----------------------------------------------------------------


def get_lr_multiplier(step: int, config: Config) -> float:
    """Return the share of the peak learning rate at a step: a linear rise over the first steps,
    then constant, then a linear fall to zero over the last ones."""
    rise = (step + 1) / max(1, config.warmup * config.steps)
    fall = (config.steps - step) / max(1, config.decay * config.steps)
    return min(1.0, rise, fall)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, config: Config) -> float:
    """Set the learning rates of a step. Returns that of the matrices."""
    multiplier = get_lr_multiplier(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
    return config.lr * multiplier
