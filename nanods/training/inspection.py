"""What a sparse model's selections do, measured against the dense attention that they stand for, and an eye on experts."""

import math

import numpy as np
import torch
from torch import Tensor

from nanods.attention import block_mask, visible_mask
from nanods.gpt import GPT

LONGEST = 2048  # queries looked at: the dense weights that serve as the measure take memory T x T


def inspected(model: GPT, tokens: Tensor) -> list[dict[str, Tensor]]:
    """What each layer tells of one sequence, tokens (T,), as in evaluation; the model's mode stays what it was."""
    was_training = model.training
    _, layers = model.eval()(tokens[None], inspect=True)
    model.train(was_training)
    return layers


@torch.no_grad()
def sparsity_report(model: GPT, tokens: Tensor) -> dict:
    """What each head of a block-sparse model reads of one sequence, tokens (T,); arrays (L, H) of shares from 0 to 1.

    keys_read     pairs of query and key that are read, of all in the past
    weight_read   dense attention's weight, from the same queries and keys, that lies on the keys read
    best_found    of the `top_blocks` past blocks on which dense attention lays most weight, those that were chosen

    and the choice of the head that reads least of its weight: `blocks` (T or tiles, K) with its `layer` and `head`.
    """
    size, top_blocks = model.config.attention.block_size, model.config.attention.top_blocks
    tokens = tokens[:LONGEST]  # what comes later changes nothing before it
    T = len(tokens)
    layers = inspected(model, tokens)
    shares = {"keys_read": [], "weight_read": [], "best_found": []}
    for stats in layers:
        q, k, blocks = (
            stats["q"].float(),
            stats["k"].float(),
            stats["blocks"],
        )  # (1, H, T, D), (1, H, R, K)
        read = block_mask(q, k, blocks, size, causal=True)  # (1, H, T, T)
        past = visible_mask(q, k, True, None)
        weights = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~past, float("-inf")).softmax(dim=-1)
        shares["keys_read"].append(stats["keys_read"])
        shares["weight_read"].append((weights * read).sum(dim=-1).mean(dim=(0, 2)))
        shares["best_found"].append(found(weights, read, size, top_blocks))
    shares = {name: torch.stack(rows).double().cpu().numpy() for name, rows in shares.items()}
    layer, head = np.unravel_index(shares["weight_read"].argmin(), shares["weight_read"].shape)
    blocks = layers[layer]["blocks"][0, head].cpu().numpy()
    return shares | {
        "tokens": T,
        "block_size": size,
        "layer": int(layer),
        "head": int(head),
        "blocks": blocks,
    }


def found(weights: Tensor, read: Tensor, size: int, top_blocks: int) -> Tensor:
    """Of each query's past blocks of most weight, the share that is read: weights, read (1, H, T, T) -> (H,).

    Over the queries that have more past blocks than they may read; 1 where there is none, since nothing was missed.
    """
    T = weights.size(-1)
    pad = (0, -T % size)
    by_block = (
        torch.nn.functional.pad(weights, pad).unflatten(-1, (-1, size)).sum(dim=-1)
    )  # (1, H, T, N)
    chosen = torch.nn.functional.pad(read, pad).unflatten(-1, (-1, size)).any(dim=-1)
    own = torch.arange(T, device=weights.device) // size
    by_block = by_block.masked_fill(
        torch.arange(by_block.size(-1), device=own.device) >= own[:, None], -1.0
    )
    hard = own > top_blocks
    if not hard.any():
        return weights.new_ones(weights.size(1))
    best = by_block[:, :, hard].topk(top_blocks, dim=-1).indices  # (1, H, hard, K)
    return chosen[:, :, hard].gather(-1, best).double().mean(dim=(0, 2, 3))


@torch.no_grad()
def chosen_experts(model: GPT, tokens: Tensor) -> np.ndarray:
    """The experts that each token of a sequence chose, the likeliest first: tokens (T,) -> (L, T, K)."""
    layers = inspected(model, tokens)
    return torch.stack([stats["experts"][0] for stats in layers]).cpu().numpy()


class LoadMonitor:
    """An alarm for each layer's router: an expert that starves, or a choice that has collapsed onto few experts.

    Judged on a running mean of the load over about 20 steps, from the 20th on: below a tenth of an even share an expert
    hardly learns; an entropy below half of ln E means that fewer than sqrt(E) experts do the work.
    """

    def __init__(self) -> None:
        self.mean, self.steps, self.told = None, 0, set()

    def __call__(self, load: Tensor) -> dict[str, str]:
        """load (L, E) of one step -> {"alarm": what is wrong now}, with "new_alarm" where that was not told before; or {}."""
        share = load.double() / load.sum(dim=-1, keepdim=True)
        self.mean = share if self.mean is None else self.mean.lerp(share, 0.05)
        self.steps += 1
        if self.steps < 20:
            return {}
        E, faults = share.size(-1), {}
        for layer, row in enumerate(self.mean.cpu()):
            if torch.special.entr(row).sum() < 0.5 * math.log(E):
                faults[layer, "all"] = (
                    f"layer {layer}: the router collapses ({row.max():.0%} of the load on one expert of {E})"
                )
            for e in (row < 0.1 / E).nonzero().flatten().tolist():
                faults[layer, e] = (
                    f"layer {layer}: expert {e} starves ({row[e] * E:.0%} of an even share)"
                )
        new = [text for key, text in faults.items() if key not in self.told]
        self.told |= faults.keys()
        told = {"alarm": "; ".join(faults.values())} if faults else {}
        return told | ({"new_alarm": "; ".join(new)} if new else {})
