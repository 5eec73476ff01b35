"""What a trained model does, layer by layer: which keys V1 reads, which experts V2 chooses, and an
alarm for its routers.

Shapes: T tokens, L layers, H heads, D width of a head, N blocks, K chosen blocks or experts, E
experts.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanods.attention import block_mask, visible_mask, widest_float
from nanods.gpt import GPT

MAX_TOKENS = 2048  # queries inspected: dense attention's weights, for comparison, take T x T memory


def layer_stats(model: GPT, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Return the stats of each layer on one sequence, tokens (T,), in eval mode. The model's mode
    is restored."""
    was_training = model.training
    _, layers = model.eval()(tokens[None], inspect=True)
    model.train(was_training)
    return layers


@torch.no_grad()
def sparsity_report(model: GPT, tokens: Tensor) -> dict:
    """Measure what each head of a block-sparse model reads of one sequence, tokens (T,). Arrays (L,
    H), from 0 to 1:

    keys_read     the share of past query-key pairs that are read
    weight_read   the share of dense attention's weight that lies on the keys that are read
    best_found    the share selected of the `top_blocks` past blocks with most dense weight

    and for the head that reads least of its weight its `layer`, `head` and selection `blocks` (T or
    tiles, K).
    """
    block_size = model.config.attention.block_size
    top_blocks = model.config.attention.top_blocks
    tokens = tokens[:MAX_TOKENS]
    layers = layer_stats(model, tokens)
    shares = {"keys_read": [], "weight_read": [], "best_found": []}
    for stats in layers:
        q, k, blocks = (
            stats["q"].float(),
            stats["k"].float(),
            stats["blocks"],
        )  # (1, H, T, D), (1, H, R, K)
        read = block_mask(q, k, blocks, block_size, causal=True)  # (1, H, T, T)
        past = visible_mask(q, k, True, None)
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(~past, float("-inf"))
        weights = scores.softmax(dim=-1)
        shares["keys_read"].append(stats["keys_read"])
        shares["weight_read"].append((weights * read).sum(dim=-1).mean(dim=(0, 2)))
        shares["best_found"].append(best_blocks_found(weights, read, block_size, top_blocks))
    report = {name: torch.stack(rows).cpu().double().numpy() for name, rows in shares.items()}
    weight_read = report["weight_read"]
    layer, head = np.unravel_index(weight_read.argmin(), weight_read.shape)
    return report | {
        "tokens": len(tokens),
        "block_size": block_size,
        "layer": int(layer),
        "head": int(head),
        "blocks": layers[layer]["blocks"][0, head].cpu().numpy(),
    }


def best_blocks_found(weights: Tensor, read: Tensor, block_size: int, top_blocks: int) -> Tensor:
    """Return the share of each query's heaviest past blocks that are read: weights, read (1, H, T,
    T) -> (H,).

    Only queries with more past blocks than they may read count. Without such a query the share is
    1, since nothing was missed.
    """
    T = weights.size(-1)
    pad = (0, -T % block_size)
    by_block = F.pad(weights, pad).unflatten(-1, (-1, block_size)).sum(dim=-1)  # (1, H, T, N)
    selected = F.pad(read, pad).unflatten(-1, (-1, block_size)).any(dim=-1)
    current_block = torch.arange(T, device=weights.device) // block_size  # (T,)
    block = torch.arange(by_block.size(-1), device=weights.device)
    by_block = by_block.masked_fill(block >= current_block[:, None], -1.0)  # past blocks only
    must_choose = current_block > top_blocks
    if not must_choose.any():
        return weights.new_ones(weights.size(1))
    best = by_block[:, :, must_choose].topk(top_blocks, dim=-1).indices  # (1, H, queries, K)
    found = selected[:, :, must_choose].gather(-1, best)  # (1, H, queries, K)
    return found.to(widest_float(found.device)).mean(dim=(0, 2, 3))


@torch.no_grad()
def chosen_experts(model: GPT, tokens: Tensor) -> np.ndarray:
    """Return the experts that each token of a sequence chose, the likeliest first: tokens (T,) ->
    (L, T, K)."""
    layers = layer_stats(model, tokens)
    return torch.stack([stats["experts"][0] for stats in layers]).cpu().numpy()


class LoadMonitor:
    """Raise an alarm where a router collapses onto few experts, or an expert gets hardly any
    tokens.

    Both are judged on a running mean of the load over about 20 steps, from the 20th step on. An
    expert below a tenth of an even share hardly learns. An entropy below half of ln E means that
    fewer than sqrt(E) experts do the work.
    """

    def __init__(self, rows: list[dict] = ()) -> None:
        """`rows`: the metrics of the steps before, where a run resumes."""
        self.mean, self.steps, self.known = None, 0, set()
        for row in rows:
            if "load" in row:
                self.update(torch.tensor(row["load"]))

    def update(self, load: Tensor) -> dict[str, str]:
        """Add the load (L, E) of one step. Returns {"alarm": what is wrong now}, with "new_alarm"
        where it was not wrong before; {} where nothing is."""
        counts = load.cpu().double()
        share = counts / counts.sum(dim=-1, keepdim=True)
        self.mean = share if self.mean is None else self.mean.lerp(share, 0.05)
        self.steps += 1
        if self.steps < 20:
            return {}
        faults = self.find_faults()
        new = [text for key, text in faults.items() if key not in self.known]
        self.known |= faults.keys()
        alarms = {}
        if faults:
            alarms["alarm"] = "; ".join(faults.values())
        if new:
            alarms["new_alarm"] = "; ".join(new)
        return alarms

    def find_faults(self) -> dict[tuple, str]:
        """Return what is wrong, in words, by (layer, expert) or (layer, "all")."""
        E, faults = self.mean.size(-1), {}
        for layer, share in enumerate(self.mean):
            if torch.special.entr(share).sum() < 0.5 * math.log(E):
                faults[layer, "all"] = (
                    f"layer {layer}: the router collapses "
                    f"({share.max():.0%} of the load on one expert of {E})"
                )
            for e in (share < 0.1 / E).nonzero().flatten().tolist():
                faults[layer, e] = (
                    f"layer {layer}: expert {e} starves ({share[e] * E:.0%} of an even share)"
                )
        return faults
