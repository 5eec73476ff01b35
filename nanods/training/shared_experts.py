"""The losses and the load of experts that several modalities share (V3 with `--moe.n-expert`).

Shapes: L layers, E experts.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nanods.config import Config
from nanods.moe import entropy_loss


def combine_loads(loads: Iterable[Tensor], config: Config) -> Tensor:
    """Return the loads (L, E) of the modalities as one: their sum where they share a trunk, else
    one trunk's layers after the other's."""
    loads = list(loads)
    if config.multimodal.shared:
        return torch.stack(loads).sum(dim=0)
    return torch.cat(loads)


def moe_losses(
    stats: dict[str, list[dict[str, Tensor]]], config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the experts' losses, and their metrics, from each modality's stats
    of each layer.

    Where modalities share experts, the load-balancing loss counts all their tokens together: an
    expert may then serve one modality alone. Where they do not, it is taken per modality.
    `entropy_loss` is LIMoE's, per modality; all are means over the layers.
    """
    moe, multimodal, E = config.model.moe, config.multimodal, config.model.moe.n_expert
    groups = [list(stats)] if multimodal.shared else [[name] for name in stats]
    values = {name: [] for name in ("balance_loss", "z_loss", "entropy_loss", "dropped")}
    for group in groups:
        # One layer at a time, as each modality of the group went through it.
        for layers in zip(*(stats[name] for name in group), strict=True):
            load = torch.stack([layer["load"] for layer in layers])  # (modalities, E), integers
            dtype = layers[0]["z_loss"].dtype
            token_share = load.sum(dim=1, keepdim=True).to(dtype) / load.sum()  # (modalities, 1)
            by_modality = list(zip(token_share, layers, strict=True))
            importance = sum(share * layer["importance"] for share, layer in by_modality)
            load_share = load.sum(dim=0).to(dtype) / load.sum()  # (E,)
            values["balance_loss"].append(E * (load_share * importance).sum())
            for name in ("z_loss", "dropped"):
                values[name].append(sum(share[0] * layer[name] for share, layer in by_modality))
            for layer in layers:
                values["entropy_loss"].append(
                    entropy_loss(
                        layer["token_entropy"], layer["importance"], multimodal.min_experts
                    )
                )
    means = {name: torch.stack(layers).mean() for name, layers in values.items()}
    total = (
        moe.balance_coefficient * means["balance_loss"]
        + moe.z_coefficient * means["z_loss"]
        + multimodal.entropy_coefficient * means["entropy_loss"]
    )
    loads = {
        name: torch.stack([layer["load"] for layer in layers]) for name, layers in stats.items()
    }
    metrics = {name: value.detach() for name, value in means.items()}
    metrics |= {f"load_{name}": load for name, load in loads.items()}
    return total, metrics | {"load": combine_loads(loads.values(), config)}
