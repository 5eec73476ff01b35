"""Ways to share a step out over GPUs: what each GPU holds, what it sends and how long that takes.

    dp           each GPU holds everything and computes a part of the batch           gradients are added up
    fsdp         the same, but weights, gradients and moments are shared out          weights are gathered, block by block
    ep           as dp, but each GPU holds E / n experts                              tokens travel to their experts and back
    tp           all GPUs compute the same sequences, each a part of the heads        activations are added up
    dp x ep, fsdp x ep    groups of G GPUs (neighbours) share the experts out; n / G such groups

Bytes that one GPU sends, of a tensor of S bytes in a group of n: all-reduce 2 (n - 1) / n S (a ring), all-gather and
reduce-scatter (n - 1) / n S, all-to-all (n - 1) / n S. A ring over machines uses all their network cards at once, an all-to-all
its GPU's own. What gradients and weights need is hidden behind the computation as far as it goes; tokens and activations on
their way (ep, tp) are waited for.

Left out: latencies, embeddings gathered by V3's loss, and Muon's own products and gathering, which a trainer of this size would
share out over the GPUs (1% of v2-full's arithmetic).

Shapes: n GPUs, G of them a group of experts, E experts, K a token, L layers, C width.
"""

import math
from dataclasses import dataclass, replace

from nanods.config import Config
from nanods.planner.hardware import NODE, Device
from nanods.planner.memory import (
    KINDS,
    LIBRARIES,
    Counts,
    Setting,
    activations,
    logits,
    optimizer_bytes,
    scratch,
    sequences,
)

REACHED = 0.7  # of a link's speed: an assumption
MESHES = ("dp", "fsdp", "ep", "tp", "dp x ep", "fsdp x ep")
SENT = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


@dataclass(frozen=True)
class Mesh:
    kind: str
    gpus: int
    group: int = 1
    """GPUs that share the experts out (G)."""

    def __str__(self) -> str:
        return (
            f"{self.kind} ({self.gpus // self.group} x {self.group})"
            if "x" in self.kind
            else self.kind
        )

    @property
    def ranks(self) -> int:
        """Parts into which the batch is cut."""
        return 1 if self.kind == "tp" else self.gpus

    @property
    def sharded(self) -> bool:
        return self.kind.startswith("fsdp")


def possible(config: Config, gpus: int) -> tuple[list[Mesh], dict[str, str]]:
    """All meshes of so many GPUs, and of each kind that there is none of, why."""
    m, E = config.model, config.model.moe.n_expert
    groups = [G for G in range(2, gpus + 1) if E % G == 0 and gpus % G == 0] if E > 1 else []
    found, why = [Mesh("dp", gpus)], {}
    found += [Mesh("fsdp", gpus)] if gpus > 1 else []
    found += [Mesh("ep", gpus, gpus)] if gpus in groups else []
    multimodal = bool(config.multimodal.modalities)
    found += [Mesh("tp", gpus)] if gpus > 1 and m.n_head % gpus == 0 and not multimodal else []
    found += [Mesh(kind, gpus, G) for kind in ("dp x ep", "fsdp x ep") for G in groups if gpus > G]
    for kind in MESHES:
        if all(mesh.kind != kind for mesh in found):
            if gpus == 1:
                why[kind] = "one GPU has nobody to share with"
            elif kind == "tp":
                why[kind] = (
                    f"{gpus} GPUs do not divide {m.n_head} heads"
                    if not multimodal
                    else "V3 is not split so"
                )
            else:
                why[kind] = (
                    "there are no experts"
                    if E == 1
                    else f"{gpus} GPUs and {E} experts have no such groups"
                )
    return found, why


# ---- memory ------------------------------------------------------------------------------------------------------------------


def memory_per_gpu(config: Config, c: Counts, mesh: Mesh, s: Setting) -> dict[str, float]:
    """Bytes by kind that a step needs on each GPU (with experts: the one with most tokens), s being that of one rank."""
    s = replace(
        s,
        split=mesh.gpus if mesh.kind == "tp" else 1,
        overload=s.overload if mesh.group > 1 else 1.0,
    )
    (outside, experts), sharded, narrow = held(config, c, mesh), mesh.sharded, s.width < 4
    made = {"weights": 4 * (outside + experts), "gradients": 4 * (outside + experts)}
    made["optimizer"] = optimizer_bytes(
        config, c, outside, experts, c.adamw / (mesh.gpus if sharded else 1)
    )
    casts = c.linear - (c.total - c.experts - outside)  # of what it lacks, under tp, all is cast
    if (
        s.device == "cuda"
    ):  # experts_sorted casts piece by piece; experts_grouped all experts of a layer, not through autocast's cache
        casts += experts / (c.layers if s.checkpointing else 1)
    made["copies"] = 0.0 if sharded else s.width * casts * narrow
    unit = max(c.block + c.experts / c.layers / mesh.group, c.ends)  # what fsdp gathers at a time
    gathered = (
        (2 * s.width + 4) * unit if sharded else 0.0
    )  # this unit and the next, and this one's gradient
    made["buffers"] = (
        gathered + exchanged(config, mesh, s) + (LIBRARIES if s.device == "cpu" else 0)
    )
    made["logits"] = logits(config, s, mesh.ranks)
    dealt = sharded or mesh.kind == "tp"  # the matrices of a stack
    updating = scratch(max(c.stack // mesh.gpus, c.matrix) if dealt else c.stack, s)
    made["activations"] = activations(config, s)
    made["muon"] = max(
        0.0, updating - sum(made[kind] for kind in ("activations", "logits", "copies", "buffers"))
    )
    return {kind: made[kind] for kind in KINDS}


def held(config: Config, c: Counts, mesh: Mesh) -> tuple[float, float]:
    """Parameters that each GPU has, outside the experts and in them."""
    outside, n = c.total - c.experts, mesh.gpus
    if mesh.kind == "tp":
        return outside - shared_by_heads(config, c) * (1 - 1 / n), c.experts
    return outside / (n if mesh.sharded else 1), c.experts / (n if mesh.sharded else mesh.group)


def shared_by_heads(config: Config, c: Counts) -> int:
    """Parameters that tp cuts: attention's and plain MLPs' matrices; not embedding and head, nor experts and their gates."""
    m = config.model
    return c.layers * (c.block - (m.moe.n_expert * m.n_embd if m.moe.n_expert > 1 else 0))


def exchanged(config: Config, mesh: Mesh, s: Setting) -> float:
    """Bytes of the tokens of one layer on their way: sent and received, there and back."""
    if mesh.group == 1:
        return 0.0
    tokens = s.micro_batch * max(sequences(config).values()) * config.model.moe.top_k
    return 2 * (1 + s.overload) * tokens * config.model.n_embd * s.width


# ---- time --------------------------------------------------------------------------------------------------------------------


def sent(config: Config, c: Counts, mesh: Mesh, s: Setting) -> dict[tuple[str, str], float]:
    """Bytes that each GPU sends in a step, by what it does and among whom: everyone, its experts' twins, its group."""
    n, G, twins = mesh.gpus, mesh.group, mesh.gpus // mesh.group
    m, each = config.model, math.ceil(config.batch_size / mesh.ranks)
    pieces = math.ceil(each / s.micro_batch)
    tokens = each * sum(sequences(config).values())
    outside, experts = c.total - c.experts, c.experts / G
    again = 1 if s.checkpointing else 0  # a block's forward pass once more
    ring, twin_ring = (n - 1) / n, (twins - 1) / twins
    if mesh.kind == "tp":
        sums = (2 + again) * (
            1 if m.moe.n_expert > 1 else 2
        )  # each way of a block, after attention and after a plain MLP
        return {
            ("all-reduce", "everyone"): 2 * ring * sums * m.n_layer * tokens * m.n_embd * s.width
        }
    made = {}
    if mesh.sharded:
        for whom, part, size in (("everyone", ring, outside), ("twins", twin_ring, experts)):
            made["all-gather", whom] = 2 * pieces * part * size * s.width
            made["reduce-scatter", whom] = pieces * part * size * 4
    else:
        made = {
            ("all-reduce", "everyone"): 2 * ring * 4 * outside,
            ("all-reduce", "twins"): 2 * twin_ring * 4 * experts,
        }
    if G > 1:
        trips = 4 + 2 * again  # there and back, forward and backward
        made["all-to-all", "group"] = (
            trips * m.n_layer * m.moe.top_k * tokens * m.n_embd * s.width * (G - 1) / G
        )
    return made


def seconds(size: float, how: str, whom: str, mesh: Mesh, device: Device) -> float:
    """How long one GPU takes to send its bytes."""
    n, G = mesh.gpus, mesh.group
    link, card = REACHED * device.link / 2, REACHED * device.network
    if size == 0:
        return 0.0
    if how == "all-to-all":
        outside = max(0, G - NODE) / (G - 1)  # of the others, those in other machines
        return size * (1 - outside) / link + (size * outside / card if outside else 0)
    if n <= NODE:
        return size / link
    beside = NODE if whom == "everyone" else max(1, NODE // G)  # of the ring, in one machine
    return size / min(link, card * beside) if beside > 1 else size / card


def expert_share(config: Config) -> float:
    """Of a block's arithmetic, the part of the experts, attention's pairs left out; 0 without them."""
    m = config.model
    mlp = 2 * m.moe.top_k * m.hidden_ratio * m.n_embd
    return mlp / (mlp + 4 * m.n_embd) if m.moe.n_expert > 1 else 0.0


def step_seconds(
    config: Config,
    c: Counts,
    mesh: Mesh,
    s: Setting,
    device: Device,
    flops_per_token: float,
    mfu: float,
) -> dict[str, float]:
    """How long a step computes, is held up by sending, and sends behind its computation; and the whole of it, "step"."""
    each = math.ceil(
        config.batch_size / mesh.ranks
    )  # the batch may not divide: then some wait for the others
    tokens = each * sum(sequences(config).values())
    again = 1.0 + s.checkpointing / 3
    if config.multimodal.modalities and s.micro_batch < each:
        again += 1 / 3  # gradient caching embeds everything once more
    uneven = 1 + expert_share(config) * (s.overload - 1) * (mesh.group > 1)
    if (
        mesh.kind == "tp"
    ):  # what no one has a part of, all compute: the head, the experts and their gates
        table = (
            config.model.vocab_size * config.model.n_embd
        )  # the embedding, which is read and not multiplied
        by_all = 6 * (c.active - table - shared_by_heads(config, c))
        flops_per_token = by_all + (flops_per_token - by_all) / mesh.gpus
    took = {
        "computing": tokens * flops_per_token * again * uneven / (device.flops * mfu),
        "waiting": 0.0,
        "hidden": 0.0,
    }
    for (how, whom), size in sent(config, c, mesh, s).items():
        waits = how == "all-to-all" or mesh.kind == "tp"
        took["waiting" if waits else "hidden"] += seconds(size, how, whom, mesh, device)
    return took | {"step": max(took["computing"] + took["waiting"], took["hidden"])}
