"""Mixture of Experts against one MLP, against one-hot dispatch and against other packages: results/moe.json and .png.

    python -m nanods.bench.moe                         about 15 minutes; `make bench-v2`
    python -m nanods.bench.moe --only time             one part: time, skew, memory, growth, router or peers

One thread, fp32, width 256, 16 experts of hidden width 1,024, each token uses 2. All times are forward and backward, with the
gradients of the input and of every weight; the layer is in training mode, so the router and its two losses are part of them.
Rivals take turns in one process, and each figure is the median of its turns. Memory is the rise of a fresh process's peak
above its input and weights; so the gradients are in it.

The rivals. dense: one MLP of hidden width 2,048, so that a token costs as many products as with 2 experts of 1,024; dense in
chunks: the same on 512 tokens at a time, which stay in the cache. loop: experts_loop. one_hot: masks of tokens x experts x places,
multiplied with (below); in groups: the same on 1,024 tokens at a time, as when each row of a batch gets masks of its own.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from nanods import plots
from nanods.bench.runs import (
    add_exponents,
    describe_machine,
    median_seconds,
    peak_memory_increase,
    write_json,
)
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
CHUNK, FACTOR, GROUP = 512, 1.25, 1024
GATED = (
    684  # hidden width of an expert with three matrices that costs what one with two costs at 1,024
)
LIMIT = 60  # seconds that a peer may take for a turn

AIMS = {
    "time.over_dense": ("<=", 1.05),
    "time.over_dense_in_chunks": ("<=", 1.15),
    "time.times_faster_than_one_hot": (">=", 10),
    "skew.half of the tokens.over_dense": ("<=", 1.15),
    "memory.over_one_hot": ("<=", 0.35),
    "growth.exponents.moe": ("<=", 1.07),
    "peers.least_times_faster": (">", 1),
}


@dataclass(frozen=True)
class Args:
    only: Literal["all", "time", "skew", "memory", "growth", "router", "peers"] = "all"
    """One part; the others stay as they are in the results."""
    results: Path = Path("results")
    """Where the table and the picture go."""


# ---- the rivals --------------------------------------------------------------------------------------------------------------


def experts_one_hot(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    up: Tensor,
    out: Tensor,
    factor: float = FACTOR,
    group: int | None = None,
) -> Tensor:
    """Dispatch as GShard wrote it down for TPUs (arXiv:2006.16668), and what not to do here. Arguments as for experts_loop.

    Each expert has P = factor N K / E places, given to all first choices before any second one. A mask says which token
    stands at which place; tokens go there and back by products with it. It is almost all zeros, and quadratic in N.
    """
    if group:
        parts = zip(x.split(group), weights.split(group), experts.split(group), strict=True)
        return torch.cat([experts_one_hot(*part, up, out, factor) for part in parts])
    (N, K), E = experts.shape, len(up)
    P = math.ceil(factor * N * K / E)
    to = F.one_hot(experts.T, E)  # (K, N, E)
    place = ((to.view(K * N, E).cumsum(dim=0).view(K, N, E) - 1) * to).sum(
        dim=-1
    )  # (K, N): how many came to it before
    at = F.one_hot(place.clamp(max=P), P + 1)[..., :P].to(
        x.dtype
    )  # (K, N, P), no 1 where the expert is full
    combine = torch.einsum("kne,knp->nep", weights.T[..., None] * to, at)  # (N, E, P)
    dispatch = (combine != 0).to(x.dtype)
    there = torch.einsum("nc,nep->epc", x, dispatch)  # (E, P, C)
    made = squared_relu(there @ up.mT) @ out.mT  # (E, P, F) -> (E, P, C)
    return torch.einsum("epc,nep->nc", made, combine)


class Ours(nn.Module):
    """nanods.moe.MoE with both of its losses, weighted as in the presets."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.moe = MoE(C, hidden, MoEConfig(E, K))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, stats = self.moe(x)
        return y, 0.01 * stats["balance_loss"] + 0.001 * stats["z_loss"]


class Routed(MoE):
    """The same router and experts, but another way through them, and no losses."""

    def __init__(
        self, mix: Callable[..., Tensor], hidden: int = HIDDEN, **settings: object
    ) -> None:
        super().__init__(C, hidden, MoEConfig(E, K))
        self.run_experts, self.settings = mix, settings

    def forward(self, x: Tensor) -> tuple[Tensor]:
        weights, experts, _ = route(x[0], self.gate.weight, K)
        return (self.run_experts(x[0], weights, experts, self.up, self.out, **self.settings)[None],)


class Dense(nn.Module):
    """One MLP with the products that a token has with its K experts; on `chunk` tokens at a time."""

    def __init__(self, hidden: int = HIDDEN, chunk: int | None = None) -> None:
        super().__init__()
        self.mlp, self.chunk = MLP(C, K * hidden), chunk

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (
            torch.cat(
                [self.mlp(part)[0] for part in x.split(self.chunk or x.size(1), dim=1)], dim=1
            ),
        )


BASELINES = {
    "moe": Ours,
    "dense": Dense,
    "dense_in_chunks": lambda hidden=HIDDEN: Dense(hidden, CHUNK),
    "loop": lambda hidden=HIDDEN: Routed(experts_loop, hidden),
    "one_hot": lambda hidden=HIDDEN: Routed(experts_one_hot, hidden),
    "one_hot_in_groups": lambda hidden=HIDDEN: Routed(experts_one_hot, hidden, group=GROUP),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer whose weights are drawn in place: drawing must not raise the peak that part_memory starts from."""
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.normal_(tensor.data, std=tensor.size(-1) ** -0.5)
    return layer.train()


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    """x (1, N, C), which wants a gradient, and the gradient of the output."""
    return torch.randn(1, tokens, C, requires_grad=True), torch.randn(1, tokens, C)


def forward_backward(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Forward and backward: of the output, and of the loss where a layer gives one beside it."""
    made = layer(x)
    torch.autograd.grad(made, [x, *layer.parameters()], [gradient, *[None] * (len(made) - 1)])


def time_alternating(
    layers: dict[str, nn.Module], x: Tensor, gradient: Tensor, turns: int
) -> dict[str, float]:
    """Seconds forward and backward of each."""
    calls = {
        name: lambda layer=layer: forward_backward(layer, x, gradient)
        for name, layer in layers.items()
    }
    seconds = median_seconds(calls, turns)
    print(x.size(1), {name: f"{1e3 * value:.0f} ms" for name, value in seconds.items()}, flush=True)
    return seconds


# ---- the parts ---------------------------------------------------------------------------------------------------------------


def part_time() -> dict:
    """Seconds forward and backward at N tokens. The one-hot masks have fewer turns: they are the slow ones."""
    layers = {name: built(make) for name, make in BASELINES.items()}
    x, gradient = inputs(N)
    slow = {name: layers.pop(name) for name in ("one_hot", "one_hot_in_groups")}
    seconds, slow = time_alternating(layers, x, gradient, 9), time_alternating(slow, x, gradient, 3)
    over = {f"over_{name}": seconds["moe"] / seconds[name] for name in ("dense", "dense_in_chunks")}
    faster = {
        f"times_faster_than_{n}": value / seconds["moe"]
        for n, value in ({"loop": seconds["loop"]} | slow).items()
    }
    return {"tokens": N, "seconds": seconds | slow, **over, **faster}


def lean(moe: MoE, x: Tensor, share: float) -> list[int]:
    """Make a share of the tokens choose expert 0, and no others: by the first number of each. -> the load of each expert."""
    favours = torch.arange(x.size(1)) < share * x.size(1)
    with torch.no_grad():
        x[0, :, 0] = torch.where(favours[torch.randperm(x.size(1))], 3.0, -3.0)
        moe.gate.weight[:, 0] = 0
        moe.gate.weight[0] = 0
        moe.gate.weight[0, 0] = (
            4.0  # a logit of 12, or of -12, where the other experts' spread about 1
        )
        load = moe(x)[1]["load"].tolist()
    assert load[0] == int(share * x.size(1)) and sum(load) == K * x.size(1), load
    return load


def part_skew() -> dict:
    """Seconds where one expert is chosen by half of the tokens, or by all of them, and what a capacity would drop."""
    table = {}
    for name, share in (("half of the tokens", 0.5), ("all tokens", 1.0)):
        layers = {
            rival: built(BASELINES[rival]) for rival in ("moe", "dense", "dense_in_chunks", "loop")
        }
        x, gradient = inputs(N)
        load = lean(layers["moe"].moe, x, share)
        layers["loop"].load_state_dict(layers["moe"].moe.state_dict())
        seconds = time_alternating(layers, x, gradient, 7)
        places = math.ceil(FACTOR * N * K / E)
        table[name] = {"load": load, "seconds": seconds}
        table[name] |= {
            f"over_{rival}": seconds["moe"] / seconds[rival]
            for rival in ("dense", "dense_in_chunks")
        }
        table[name] |= {
            "one_hot_would_drop": sum(max(0, count - places) for count in load) / (N * K)
        }
    return {"tokens": N, **table}


def part_memory() -> dict:
    """Bytes that the peak rises by, forward and backward."""
    table = {name: {} for name in BASELINES}
    for name, row in table.items():
        for tokens in (2048, 4096, N):
            command = [
                sys.executable,
                "-m",
                "nanods.bench.moe",
                "--measure-memory",
                name,
                str(tokens),
            ]
            row[str(tokens)] = int(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout
            )
        print(
            name, {tokens: f"{value / 2**20:.0f} MiB" for tokens, value in row.items()}, flush=True
        )
    over = {
        f"over_{name}": table["moe"][str(N)] / row[str(N)]
        for name, row in table.items()
        if name != "moe"
    }
    return {"tokens": N, "bytes_by_tokens": table, **over}


def measure_memory(name: str, tokens: int) -> None:
    """In a process of its own: print how far one forward and backward pass raises its peak memory, in bytes."""
    forward_backward(built(lambda: BASELINES[name](32)), *inputs(64))  # what is made once
    layer, (x, gradient) = built(BASELINES[name]), inputs(tokens)
    print(peak_memory_increase(lambda: forward_backward(layer, x, gradient)))


def part_growth() -> dict:
    """Seconds against tokens. The exponents are fitted from 8,192 tokens on; one_hot's, which ends there, on all it has."""
    table = {name: {} for name in ("dense", "moe", "one_hot", "one_hot_in_groups")}
    for tokens, turns in (
        (1024, 9),
        (2048, 7),
        (4096, 5),
        (8192, 3),
        (16384, 3),
        (32768, 3),
        (65536, 3),
    ):
        names = [name for name in table if tokens <= N or not name.startswith("one_hot")]
        layers = {name: built(BASELINES[name]) for name in names}
        for name, value in time_alternating(layers, *inputs(tokens), turns).items():
            table[name][str(tokens)] = value
    slow = {name: row for name, row in table.items() if name.startswith("one_hot")}
    exponents = (
        add_exponents(table, beyond=N)["exponents"] | add_exponents(slow, beyond=2048)["exponents"]
    )
    return {"by_tokens": table, "exponents": exponents}


def part_router() -> dict:
    """Milliseconds of what a layer does beside its experts, forward and backward; and of one more expert for the margin."""
    layer, (x, gradient) = built(Ours), inputs(N)
    rows, gate = x[0].detach().requires_grad_(), layer.moe.gate.weight
    probs, back = torch.randn(N, E).softmax(dim=-1), torch.randn(N, K)
    experts = probs.topk(K).indices

    def routing() -> None:
        weights = route(rows, gate, K)[0]
        torch.autograd.grad(weights, [rows, gate], back)

    def with_losses() -> None:
        logits = router_logits(rows, gate)
        weights, chosen, probs, _ = select_experts(logits, K)
        loss = 0.01 * load_balancing_loss(probs, chosen) + 0.001 * router_z_loss(logits)
        torch.autograd.grad([weights, loss], [rows, gate], [back, None])

    calls = {
        "layer": lambda: forward_backward(layer, x, gradient),
        "routing": routing,
        "routing_with_losses": with_losses,
        "sorting": lambda: sort_by_expert(experts, E),
        "top_2": lambda: probs.topk(K, dim=-1),
        "top_3": lambda: probs.topk(K + 1, dim=-1),
    }
    ms = {name: 1e3 * value for name, value in median_seconds(calls, 15).items()}
    print({name: f"{value:.2f} ms" for name, value in ms.items()}, flush=True)
    share = (ms["routing_with_losses"] + ms["sorting"]) / ms["layer"]
    return {
        "tokens": N,
        "ms": ms,
        "share": share,
        "margin_share": (ms["top_3"] - ms["top_2"]) / ms["layer"],
    }


class Peer(nn.Module):
    """Another package's layer as a rival: at least its output, and its loss where it has one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.layer(x)
        return (made,) if isinstance(made, Tensor) else made[:2]


def lucidrains() -> nn.Module:
    from mixture_of_experts import MoE

    return MoE(dim=C, num_experts=E, hidden_dim=HIDDEN)


def st_moe() -> nn.Module:
    from st_moe_pytorch import MoE

    return MoE(dim=C, num_experts=E, gating_top_n=K, expert_hidden_mult=HIDDEN // C)


def mixtral(way: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {
        "hidden_size": C,
        "intermediate_size": GATED,
        "num_local_experts": E,
        "num_experts_per_tok": K,
    }
    block = MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation=way))
    for weight in block.parameters():  # which it leaves as they lie in memory
        nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
    return block


PEERS = {
    "mixture-of-experts": lucidrains,
    "st-moe-pytorch": st_moe,
    "transformers, Mixtral, eager": lambda: mixtral("eager"),
    "transformers, Mixtral, grouped_mm": lambda: mixtral("grouped_mm"),
}


def part_peers() -> dict:
    """Seconds forward and backward of our layer and of other packages' (the extra `peers`), each pair in a process of its own.

    They stand as they come, at our sizes. The two with masks have places for 1.25 N of the 2 N assignments and drop the rest,
    so that they compute less than we do. Gated experts have three matrices: 684 wide, st-moe-pytorch's 682, they cost as many
    products as ours of 1,024 (2/3 of that is 683, which is odd, and the grouped product wants rows of 16 bytes).
    """
    table = {"by_tokens": {}, "times_faster": {}, "left_out": {}}
    for name in PEERS:
        package = name.split(",")[0]
        if not find_spec(package.replace("-", "_")):
            print(f"{package} is not installed, left out: make setup EXTRAS=peers")
            continue
        for tokens in (2048, N):
            command = [
                sys.executable,
                "-m",
                "nanods.bench.moe",
                "--measure-peer",
                name,
                str(tokens),
            ]
            try:
                made = subprocess.run(command, capture_output=True, text=True, timeout=6 * LIMIT)
                reason = (
                    made.stderr.splitlines() or ["ended by the system: out of memory, presumably"]
                )[-1]
            except subprocess.TimeoutExpired:
                made, reason = None, f"more than {LIMIT} s a turn"
            if made and made.returncode == 0:
                seconds = json.loads(made.stdout.splitlines()[-1])
                table["by_tokens"].setdefault(name, {})[str(tokens)] = seconds
                table["times_faster"].setdefault(name, {})[str(tokens)] = (
                    seconds["theirs"] / seconds["ours"]
                )
                print(
                    name,
                    tokens,
                    {whose: f"{1e3 * value:.0f} ms" for whose, value in seconds.items()},
                    flush=True,
                )
            else:
                table["left_out"].setdefault(name, {})[str(tokens)] = reason
                print(f"{name}, {tokens} tokens, left out: {reason}", flush=True)
    ratios = [value for row in table["times_faster"].values() for value in row.values()]
    return table | {"least_times_faster": min(ratios)} if ratios else {}


def measure_peer(name: str, tokens: int) -> None:
    """In a process of its own: print the seconds of ours and theirs, which take turns."""
    torch.manual_seed(0)
    layers = {"theirs": Peer(PEERS[name]()).train(), "ours": built(Ours)}
    print(json.dumps(time_alternating(layers, *inputs(tokens), 5)))


PARTS = {
    "time": part_time,
    "skew": part_skew,
    "memory": part_memory,
    "growth": part_growth,
    "router": part_router,
}
PARTS |= {"peers": part_peers}


# ---- all of them -------------------------------------------------------------------------------------------------------------


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] in (["--measure-memory"], ["--measure-peer"]):
        return (measure_memory if sys.argv[1] == "--measure-memory" else measure_peer)(
            sys.argv[2], int(sys.argv[3])
        )
    args = tyro.cli(Args, description=__doc__)
    path = args.results / "moe.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    shapes = {
        "C": C,
        "F": HIDDEN,
        "E": E,
        "K": K,
        "chunk": CHUNK,
        "group": GROUP,
        "capacity_factor": FACTOR,
    }
    for part in PARTS if args.only == "all" else (args.only,):
        print(f"---- {part}", flush=True)
        torch.manual_seed(0)
        table[part] = PARTS[part]() or table.get(
            part, {}
        )  # what was measured stays where no peer is installed
        table |= {"machine": {**describe_machine("fp32"), "shapes": shapes}, "aims": judged(table)}
        write_json(
            path, {name: table[name] for name in ("machine", "aims", *PARTS) if name in table}
        )
    for name, row in table["aims"].items():
        print(
            f"{name} {row['measured']:.3f}, aim {row['aim']}: {'met' if row['met'] else 'missed'}"
        )
    if {"growth", "memory"} <= table.keys():
        plots.save(plots.cost_of_experts(table), args.results / "moe.png")


def judged(table: dict) -> dict[str, dict]:
    """What was hoped for beside what was measured."""
    found = {}
    for name, (sign, aim) in AIMS.items():
        value = table
        for key in name.split("."):
            value = value.get(key, {})
        if value:
            met = {"<=": value <= aim, ">=": value >= aim, ">": value > aim}[sign]
            found[name] = {"aim": f"{sign} {aim}", "measured": value, "met": met}
    return found


if __name__ == "__main__":
    main()
