"""Time and memory of the MoE layer, against one MLP, one-hot dispatch and other packages.

    python -m nanods.bench.moe               about 15 minutes; `make bench-v2`
    python -m nanods.bench.moe --only time   one part: time, skew, memory, growth, router or peers

Writes results/moe.json and results/moe.png.

Setting: one thread, fp32, width 256, 16 experts of hidden width 1,024, 2 experts per token. All
times are forward and backward, with the gradients of the input and of every weight. The layer is in
training mode, so its router and its two losses are included. The layers that are compared run
alternately in one process, and each figure is the median over the turns. Memory is how far a fresh
process's peak rises above the input and the weights, so it includes the gradients.

Baselines:

    dense               one MLP of hidden width 2,048: as many products per token as 2 experts
    dense_in_chunks     the same on 512 tokens at a time, whose activations fit in the cache
    loop                experts_loop
    one_hot             dispatch by masks of tokens x experts x capacity, see experts_one_hot
    one_hot_in_groups   the same on 1,024 tokens at a time, each group with its own masks
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanods import plots
from nanods.bench.runs import (
    add_exponents,
    describe_machine,
    median_seconds,
    peak_memory_increase,
    read_json,
    write_json,
)
from nanods.errors import run
from nanods.flags import parse_args
from nanods.moe import (
    MLP,
    MoE,
    MoEConfig,
    experts_loop,
    load_balancing_loss,
    route,
    router_logits,
    router_z_loss,
    select_experts,
)
from nanods.moe_kernel import sort_by_expert, squared_relu

C, HIDDEN, E, K, N = 256, 1024, 16, 2, 8192
CHUNK, GROUP = 512, 1024  # tokens
CAPACITY_FACTOR = 1.25
GATED_HIDDEN = 684  # a gated expert (3 matrices) of this width costs what one of 1,024 (2) costs
PEER_TIMEOUT = 60  # seconds per turn

AIMS = {
    "time.over_dense": ("<=", 1.05),
    "time.over_dense_in_chunks": ("<=", 1.15),
    "time.times_faster_than_one_hot": (">=", 10),
    "skew.half of the tokens.over_dense": ("<=", 1.15),
    "memory.over_one_hot": ("<=", 0.35),
    "growth.exponents.moe": ("<=", 1.07),
    "peers.min_times_faster": (">", 1),
}


@dataclass(frozen=True)
class Args:
    only: Literal["all", "time", "skew", "memory", "growth", "router", "peers"] = "all"
    """Run one part; the results of the others stay as they are."""
    results: Path = Path("results")
    """Folder for the table and the plot."""


# ---- the layers that are compared ----------------------------------------------------------------


def experts_one_hot(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    up: Tensor,
    out: Tensor,
    capacity_factor: float = CAPACITY_FACTOR,
    group: int | None = None,
) -> Tensor:
    """Compute experts_loop by products with one-hot masks, as GShard did (arXiv:2006.16668).

    Arguments as for experts_loop. Each expert has P = capacity_factor N K / E
    slots, filled by all first choices before any second choice. A mask of shape (N, E, P) says
    which token is in which slot, and products with it move the tokens there and back. The mask is
    almost all zeros, and its size grows with N^2: an example of what to avoid. `group`: dispatch
    this many tokens at a time, each group with its own masks.
    """
    if group:
        groups = zip(x.split(group), weights.split(group), experts.split(group), strict=True)
        outputs = [
            experts_one_hot(x_part, weights_part, experts_part, up, out, capacity_factor)
            for x_part, weights_part, experts_part in groups
        ]
        return torch.cat(outputs)
    (N, K), E = experts.shape, len(up)
    P = math.ceil(capacity_factor * N * K / E)
    is_expert = F.one_hot(experts.T, E)  # (K, N, E)
    count = is_expert.view(K * N, E).cumsum(dim=0).view(K, N, E)  # this assignment included
    slot = ((count - 1) * is_expert).sum(dim=-1)  # (K, N)
    is_slot = F.one_hot(slot.clamp(max=P), P + 1)[..., :P]  # (K, N, P); all 0 beyond the capacity
    is_slot = is_slot.to(x.dtype)
    combine = torch.einsum("kne,knp->nep", weights.T[..., None] * is_expert, is_slot)  # (N, E, P)
    dispatch = (combine != 0).to(x.dtype)
    expert_inputs = torch.einsum("nc,nep->epc", x, dispatch)  # (E, P, C)
    expert_outputs = squared_relu(expert_inputs @ up.mT) @ out.mT  # (E, P, F) -> (E, P, C)
    return torch.einsum("epc,nep->nc", expert_outputs, combine)


class MoEWithLosses(nn.Module):
    """nanods.moe.MoE with both of its losses, weighted as in the presets."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.moe = MoE(C, hidden, MoEConfig(E, K))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, stats = self.moe(x)
        return y, 0.01 * stats["balance_loss"] + 0.001 * stats["z_loss"]


class RoutedExperts(MoE):
    """The router and experts of MoE without losses; `run_experts` computes the experts."""

    def __init__(
        self, run_experts: Callable[..., Tensor], hidden: int = HIDDEN, **options: object
    ) -> None:
        super().__init__(C, hidden, MoEConfig(E, K))
        self.run_experts, self.options = run_experts, options

    def forward(self, x: Tensor) -> tuple[Tensor]:
        rows = x[0]
        weights, experts, _ = route(rows, self.gate.weight, K)
        y = self.run_experts(rows, weights, experts, self.up, self.out, **self.options)
        return (y[None],)


class Dense(nn.Module):
    """One MLP with as many products per token as K experts, on `chunk` tokens at a time."""

    def __init__(self, hidden: int = HIDDEN, chunk: int | None = None) -> None:
        super().__init__()
        self.mlp, self.chunk = MLP(C, K * hidden), chunk

    def forward(self, x: Tensor) -> tuple[Tensor]:
        chunks = x.split(self.chunk or x.size(1), dim=1)
        return (torch.cat([self.mlp(part)[0] for part in chunks], dim=1),)


BASELINES = {
    "moe": MoEWithLosses,
    "dense": Dense,
    "dense_in_chunks": partial(Dense, chunk=CHUNK),
    "loop": partial(RoutedExperts, experts_loop),
    "one_hot": partial(RoutedExperts, experts_one_hot),
    "one_hot_in_groups": partial(RoutedExperts, experts_one_hot, group=GROUP),
}
GROWTH_LAYERS = ("dense", "moe", "one_hot", "one_hot_in_groups")


def build_layer(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a layer in training mode with random weights.

    The weights are drawn in place, because temporary copies would raise the peak that part_memory
    starts from.
    """
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.normal_(tensor.data, std=tensor.size(-1) ** -0.5)
    return layer.train()


def random_inputs(tokens: int) -> tuple[Tensor, Tensor]:
    """Return x (1, N, C), which requires a gradient, and a gradient of the output (1, N, C)."""
    return torch.randn(1, tokens, C, requires_grad=True), torch.randn(1, tokens, C)


def forward_backward(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Run a layer forward, and backward from its output and from the losses it returns."""
    outputs = layer(x)
    gradients = [gradient, *[None] * (len(outputs) - 1)]
    torch.autograd.grad(outputs, [x, *layer.parameters()], gradients)


def time_alternating(
    layers: dict[str, nn.Module], x: Tensor, gradient: Tensor, turns: int
) -> dict[str, float]:
    """Return the median seconds of each layer, forward and backward, and print them."""
    calls = {name: partial(forward_backward, layer, x, gradient) for name, layer in layers.items()}
    seconds = median_seconds(calls, turns)
    print(x.size(1), {name: f"{1e3 * value:.0f} ms" for name, value in seconds.items()}, flush=True)
    return seconds


# ---- the parts -----------------------------------------------------------------------------------


def part_time() -> dict:
    """Measure seconds at N tokens. The slow one-hot layers run fewer turns, among themselves."""
    layers = {name: build_layer(make) for name, make in BASELINES.items()}
    x, gradient = random_inputs(N)
    slow_layers = {name: layers.pop(name) for name in ("one_hot", "one_hot_in_groups")}
    seconds = time_alternating(layers, x, gradient, 9)
    slow_seconds = time_alternating(slow_layers, x, gradient, 3)
    table = {"tokens": N, "seconds": seconds | slow_seconds}
    for name in ("dense", "dense_in_chunks"):
        table[f"over_{name}"] = seconds["moe"] / seconds[name]
    for name, value in ({"loop": seconds["loop"]} | slow_seconds).items():
        table[f"times_faster_than_{name}"] = value / seconds["moe"]
    return table


def skew_router(moe: MoE, x: Tensor, fraction: float) -> list[int]:
    """Make this fraction of the tokens, and no other token, select expert 0. Return the load (E,).

    Changes channel 0 of x (1, N, C) and the gate's weights for it, in place.
    """
    tokens = x.size(1)
    selects_0 = torch.arange(tokens) < fraction * tokens
    with torch.no_grad():
        x[0, :, 0] = torch.where(selects_0[torch.randperm(tokens)], 3.0, -3.0)
        moe.gate.weight[:, 0] = 0
        moe.gate.weight[0] = 0
        moe.gate.weight[0, 0] = 4.0  # logits of 12 or -12; those of other experts vary by about 1
        load = moe(x)[1]["load"].tolist()
    assert load[0] == int(fraction * tokens) and sum(load) == K * tokens, load
    return load


def part_skew() -> dict:
    """Measure seconds with one expert selected by half of the tokens, and by all of them.

    Also computes the fraction of assignments that a capacity would drop.
    """
    table = {"tokens": N}
    capacity = math.ceil(CAPACITY_FACTOR * N * K / E)
    for label, fraction in (("half of the tokens", 0.5), ("all tokens", 1.0)):
        names = ("moe", "dense", "dense_in_chunks", "loop")
        layers = {name: build_layer(BASELINES[name]) for name in names}
        x, gradient = random_inputs(N)
        load = skew_router(layers["moe"].moe, x, fraction)
        layers["loop"].load_state_dict(layers["moe"].moe.state_dict())
        seconds = time_alternating(layers, x, gradient, 7)
        row = {"load": load, "seconds": seconds}
        for name in ("dense", "dense_in_chunks"):
            row[f"over_{name}"] = seconds["moe"] / seconds[name]
        row["one_hot_would_drop"] = sum(max(0, count - capacity) for count in load) / (N * K)
        table[label] = row
    return table


def part_memory() -> dict:
    """Measure the bytes by which forward and backward raise the peak, one process per figure."""
    bytes_by_tokens = {}
    for name in BASELINES:
        row = {}
        for tokens in (2048, 4096, N):
            row[str(tokens)] = int(run_self("--measure-memory", name, tokens, check=True).stdout)
        mebibytes = {tokens: f"{value / 2**20:.0f} MiB" for tokens, value in row.items()}
        print(name, mebibytes, flush=True)
        bytes_by_tokens[name] = row
    table = {"tokens": N, "bytes_by_tokens": bytes_by_tokens}
    for name, row in bytes_by_tokens.items():
        if name != "moe":
            table[f"over_{name}"] = bytes_by_tokens["moe"][str(N)] / row[str(N)]
    return table


def run_self(command: str, name: str, tokens: int, **options) -> subprocess.CompletedProcess:
    """Run one measurement of this file in a process of its own and capture what it prints."""
    words = [sys.executable, "-m", "nanods.bench.moe", command, name, str(tokens)]
    return subprocess.run(words, capture_output=True, text=True, **options)


def measure_memory(name: str, tokens: int) -> None:
    """Print the bytes by which one forward and backward pass raises this process's peak memory."""
    # A small layer first: what PyTorch allocates once does not count.
    forward_backward(build_layer(lambda: BASELINES[name](32)), *random_inputs(64))
    layer, (x, gradient) = build_layer(BASELINES[name]), random_inputs(tokens)
    print(peak_memory_increase(lambda: forward_backward(layer, x, gradient)))


def part_growth() -> dict:
    """Measure seconds against tokens. `share_time` adds the seconds at N tokens and exponents."""
    table = {name: {} for name in GROWTH_LAYERS}
    turns_by_tokens = {1024: 9, 2048: 7, 4096: 5, 16384: 3, 32768: 3, 65536: 3}
    for tokens, turns in turns_by_tokens.items():
        names = [name for name in table if tokens <= N or not name.startswith("one_hot")]
        layers = {name: build_layer(BASELINES[name]) for name in names}
        for name, value in time_alternating(layers, *random_inputs(tokens), turns).items():
            table[name][str(tokens)] = value
    return {"by_tokens": table}


def share_time(time: dict, growth: dict) -> dict:
    """Return part_growth's table with the seconds at N tokens from part_time, and exponents.

    So there is one measurement at N tokens, and both parts show it. Exponents are fitted from N
    tokens on; the one-hot layers end there, so theirs are fitted from 2,048 tokens on.
    """
    table = {}
    for name, row in growth["by_tokens"].items():
        row = row | {str(N): time["seconds"][name]}
        table[name] = {tokens: row[tokens] for tokens in sorted(row, key=int)}
    one_hot_rows = {name: row for name, row in table.items() if name.startswith("one_hot")}
    exponents = add_exponents(table, beyond=N)["exponents"]
    exponents |= add_exponents(one_hot_rows, beyond=2048)["exponents"]
    return {"by_tokens": table, "exponents": exponents}


def part_router() -> dict:
    """Measure milliseconds of the layer's work beside its experts, forward and backward."""
    layer, (x, gradient) = build_layer(MoEWithLosses), random_inputs(N)
    rows, gate = x[0].detach().requires_grad_(), layer.moe.gate.weight
    probs, weights_gradient = torch.randn(N, E).softmax(dim=-1), torch.randn(N, K)
    experts = probs.topk(K).indices

    def routing() -> None:
        weights = route(rows, gate, K)[0]
        torch.autograd.grad(weights, [rows, gate], weights_gradient)

    def routing_with_losses() -> None:
        logits = router_logits(rows, gate)
        weights, selected, probs = select_experts(logits, K)
        loss = 0.01 * load_balancing_loss(probs, selected) + 0.001 * router_z_loss(logits)
        torch.autograd.grad([weights, loss], [rows, gate], [weights_gradient, None])

    calls = {
        "layer": lambda: forward_backward(layer, x, gradient),
        "routing": routing,
        "routing_with_losses": routing_with_losses,
        "sorting": lambda: sort_by_expert(experts, E),
        "top_2": lambda: probs.topk(K, dim=-1),
    }
    ms = {name: 1e3 * value for name, value in median_seconds(calls, 15).items()}
    print({name: f"{value:.2f} ms" for name, value in ms.items()}, flush=True)
    return {
        "tokens": N,
        "ms": ms,
        "share": (ms["routing_with_losses"] + ms["sorting"]) / ms["layer"],
    }


# ---- other packages ------------------------------------------------------------------------------


class Peer(nn.Module):
    """Another package's layer: returns its output, and its loss if it has one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = self.layer(x)
        return (result,) if isinstance(result, Tensor) else result[:2]


def lucidrains() -> nn.Module:
    from mixture_of_experts import MoE

    return MoE(dim=C, num_experts=E, hidden_dim=HIDDEN)


def st_moe() -> nn.Module:
    from st_moe_pytorch import MoE

    return MoE(dim=C, num_experts=E, gating_top_n=K, expert_hidden_mult=HIDDEN // C)


def mixtral(experts_implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=C,
        intermediate_size=GATED_HIDDEN,
        num_local_experts=E,
        num_experts_per_tok=K,
        experts_implementation=experts_implementation,
    )
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():  # the block leaves them uninitialised
        nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
    return block


PEERS = {
    "mixture-of-experts": lucidrains,
    "st-moe-pytorch": st_moe,
    "transformers, Mixtral, eager": partial(mixtral, "eager"),
    "transformers, Mixtral, grouped_mm": partial(mixtral, "grouped_mm"),
}


def part_peers() -> dict:
    """Measure seconds of our layer and of other packages' (the extra `peers`), one process per
    pair.

    The packages run with their default settings, at our sizes. The two that use masks have capacity
    for 1.25 N of the 2 N assignments and drop the rest, so they compute less than we do. Gated
    experts have three matrices: of width 684 (st-moe-pytorch: 682) they cost as many products as
    ours of 1,024. Two thirds of 1,024 is 683, but the grouped product needs rows of a multiple of
    16 bytes.
    """
    table = {"by_tokens": {}, "times_faster": {}, "left_out": {}}
    for name in PEERS:
        package = name.split(",")[0]
        if not find_spec(package.replace("-", "_")):
            print(f"{package} is not installed, left out: make setup EXTRAS=peers")
            continue
        for tokens in (2048, N):
            seconds, reason = run_peer(name, tokens)
            if seconds is None:
                table["left_out"].setdefault(name, {})[str(tokens)] = reason
                print(f"{name}, {tokens} tokens, left out: {reason}", flush=True)
                continue
            ratio = seconds["theirs"] / seconds["ours"]
            table["by_tokens"].setdefault(name, {})[str(tokens)] = seconds
            table["times_faster"].setdefault(name, {})[str(tokens)] = ratio
            milliseconds = {layer: f"{1e3 * value:.0f} ms" for layer, value in seconds.items()}
            print(name, tokens, milliseconds, flush=True)
    ratios = [value for row in table["times_faster"].values() for value in row.values()]
    if not ratios:
        return {}
    return table | {"min_times_faster": min(ratios)}


def run_peer(name: str, tokens: int) -> tuple[dict[str, float] | None, str]:
    """Return the seconds of ours and theirs, or None and the reason why there are none."""
    try:
        result = run_self("--measure-peer", name, tokens, timeout=6 * PEER_TIMEOUT)
    except subprocess.TimeoutExpired:
        return None, f"more than {PEER_TIMEOUT} s a turn"
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1]), ""
    errors = result.stderr.splitlines()
    return None, errors[-1] if errors else "ended by the system: out of memory, presumably"


def measure_peer(name: str, tokens: int) -> None:
    """Print the seconds of another package's layer and of ours, which run alternately."""
    torch.manual_seed(0)
    layers = {"theirs": Peer(PEERS[name]()).train(), "ours": build_layer(MoEWithLosses)}
    print(json.dumps(time_alternating(layers, *random_inputs(tokens), 5)))


# ---- all parts -----------------------------------------------------------------------------------

PARTS = {
    "time": part_time,
    "skew": part_skew,
    "memory": part_memory,
    "growth": part_growth,
    "router": part_router,
    "peers": part_peers,
}
SHAPES = {
    "C": C,
    "F": HIDDEN,
    "E": E,
    "K": K,
    "chunk": CHUNK,
    "group": GROUP,
    "capacity_factor": CAPACITY_FACTOR,
}


def check_aims(table: dict) -> dict[str, dict]:
    """Compare each aim with its measurement, where the table has one."""
    checked = {}
    for name, (sign, aim) in AIMS.items():
        value = table
        for key in name.split("."):
            value = value.get(key, {})
        if value:
            met = {"<=": value <= aim, ">=": value >= aim, ">": value > aim}[sign]
            checked[name] = {"aim": f"{sign} {aim}", "measured": value, "met": met}
    return checked


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--measure-memory"]:
        return measure_memory(sys.argv[2], int(sys.argv[3]))
    if sys.argv[1:2] == ["--measure-peer"]:
        return measure_peer(sys.argv[2], int(sys.argv[3]))
    args = parse_args(Args, __doc__)
    path = args.results / "moe.json"
    table = read_json(path)
    for part in PARTS if args.only == "all" else (args.only,):
        print(f"---- {part}", flush=True)
        torch.manual_seed(0)
        # If no peer is installed, the earlier results stay.
        table[part] = PARTS[part]() or table.get(part, {})
        if {"time", "growth"} <= table.keys():
            table["growth"] = share_time(table["time"], table["growth"])
        table["machine"] = describe_machine("fp32") | {"shapes": SHAPES}
        table["aims"] = check_aims(table)
        names = [name for name in ("machine", "aims", *PARTS) if name in table]
        write_json(path, {name: table[name] for name in names})
    for name, row in table["aims"].items():
        outcome = "met" if row["met"] else "missed"
        print(f"{name} {row['measured']:.3f}, aim {row['aim']}: {outcome}")
    if {"time", "growth", "memory"} <= table.keys():
        plots.save(plots.cost_of_experts(table), args.results / "moe.png")


if __name__ == "__main__":
    run(main)
