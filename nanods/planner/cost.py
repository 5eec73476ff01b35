"""The cost of a mesh of GPUs: the bytes that each GPU holds and sends in a step, and the time.

    dp    each GPU holds the whole model and computes a part of the batch; gradients are added up
    fsdp  as dp, but weights, gradients and optimizer state are sharded; weights are gathered for
          each block
    ep    as dp, but each GPU holds n_expert / ep experts; tokens are sent to them and back
    tp    all GPUs compute the same sequences, each with a part of the heads and of the MLPs;
          activations are added up

In dp,ep and fsdp,ep each group of ep neighbouring GPUs shares the experts, and the groups are
replicas. The meshes are defined in nanods/distributed/mesh.py.

To move a tensor of S bytes in a group of n, each GPU sends 2 (n - 1) / n S in an all-reduce (a
ring) and (n - 1) / n S in an all-gather, reduce-scatter or all-to-all. A ring over several machines
uses all their network cards at once, an all-to-all only that of its own GPU. Gradients and weights
travel while the GPU computes, as far as its computation lasts. Tokens (ep) and activations (tp) are
waited for.

Left out: latencies, the embeddings that V3's loss gathers, and Muon's products and gathering, which
the GPUs would divide (1% of v2-full's arithmetic).
"""

import math
from dataclasses import replace

from nanods.config import Config
from nanods.distributed.mesh import Mesh
from nanods.planner.hardware import GPUS_PER_NODE, Device
from nanods.planner.memory import (
    LIBRARY_BYTES,
    MEMORY_KINDS,
    ModelCost,
    StepConfig,
    activation_bytes,
    logit_bytes,
    optimizer_bytes,
    orthogonalisation_bytes,
    sequence_lengths,
)

LINK_EFFICIENCY = 0.7  # fraction of a link's speed that is reached: an assumption
MESH_KINDS = ("dp", "fsdp", "ep", "tp", "dp,ep", "fsdp,ep")  # in the order of the tables
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def possible_meshes(config: Config, gpus: int) -> tuple[list[Mesh], dict[str, str]]:
    """Return all meshes of `gpus` GPUs, and for each kind that has none the reason."""
    n_expert, n_head = config.model.moe.n_expert, config.model.n_head
    multimodal = bool(config.multimodal.modalities)
    groups = []  # sizes of the ep axis
    if n_expert > 1:
        groups = [ep for ep in range(2, gpus + 1) if n_expert % ep == 0 and gpus % ep == 0]
    meshes = [Mesh.of(dp=gpus)]
    if gpus > 1:
        meshes.append(Mesh.of(fsdp=gpus))
    if gpus in groups:
        meshes.append(Mesh.of(ep=gpus))
    if gpus > 1 and n_head % gpus == 0 and not multimodal:
        meshes.append(Mesh.of(tp=gpus))
    for axis in ("dp", "fsdp"):
        meshes += [Mesh.of(**{axis: gpus // ep, "ep": ep}) for ep in groups if ep < gpus]

    reasons = {}
    for kind in MESH_KINDS:
        if any(mesh.kind == kind for mesh in meshes):
            continue
        if gpus == 1:
            reasons[kind] = "one GPU has no other to share with"
        elif kind == "tp" and multimodal:
            reasons[kind] = "tensor parallelism is not built for V3"
        elif kind == "tp":
            reasons[kind] = f"{gpus} GPUs do not divide {n_head} heads"
        elif n_expert == 1:
            reasons[kind] = "there are no experts"
        else:
            reasons[kind] = f"{gpus} GPUs and {n_expert} experts have no such groups"
    return meshes, reasons


# ---- memory --------------------------------------------------------------------------------------


def memory_per_gpu(
    config: Config, cost: ModelCost, mesh: Mesh, step: StepConfig
) -> dict[str, float]:
    """Return the bytes by kind that a step needs on each GPU; with experts, on the busiest one."""
    step = replace(step, tp=mesh.tp, imbalance=step.imbalance if mesh.ep > 1 else 1.0)
    outside, experts = parameters_per_gpu(cost, mesh)
    memory = {"weights": 4 * (outside + experts), "gradients": 4 * (outside + experts)}
    adamw = cost.adamw / (mesh.world_size if mesh.is_fsdp else 1)
    memory["optimizer"] = optimizer_bytes(config, cost, outside, experts, adamw)

    # Under tp all parameters that a GPU lacks are of matrices that would be cast.
    cast = cost.cast - (cost.total - cost.experts - outside)
    if step.device == "cuda":
        # experts_grouped casts all experts of a layer, outside of autocast's cache, and keeps the
        # copies for backward. On a CPU experts_sorted casts piece by piece and keeps none.
        cast += experts / (cost.n_blocks if step.checkpointing else 1)
    has_copies = not mesh.is_fsdp and step.itemsize < 4
    memory["copies"] = step.itemsize * cast if has_copies else 0.0

    memory["buffers"] = all_to_all_bytes(config, mesh, step)
    if mesh.is_fsdp:  # this unit and the next gathered, and the gradient of this one
        unit = max(cost.block + cost.experts / cost.n_blocks / mesh.ep, cost.ends)
        memory["buffers"] += (2 * step.itemsize + 4) * unit
    if step.device == "cpu":
        memory["buffers"] += LIBRARY_BYTES
    memory["logits"] = logit_bytes(config, step, mesh.batch_shards)
    memory["activations"] = activation_bytes(config, cost, step)

    # Muon's update begins after backward, when these four are free.
    freed = sum(memory[kind] for kind in ("activations", "logits", "copies", "buffers"))
    stack = cost.largest_stack
    if mesh.is_fsdp or mesh.tp > 1:  # each GPU orthogonalises some matrices of a stack
        stack = max(stack // mesh.world_size, cost.largest_matrix)
    needed = orthogonalisation_bytes(stack, step) if config.optimizer == "muon" else 0.0
    memory["muon"] = max(0.0, needed - freed)
    return {kind: memory[kind] for kind in MEMORY_KINDS}


def parameters_per_gpu(cost: ModelCost, mesh: Mesh) -> tuple[float, float]:
    """Return the numbers of parameters that each GPU holds, outside the experts and in them."""
    outside, n = cost.total - cost.experts, mesh.world_size
    if mesh.tp > 1:
        return outside - cost.tensor_parallel * (1 - 1 / n), cost.experts
    if mesh.is_fsdp:
        return outside / n, cost.experts / n
    return outside, cost.experts / mesh.ep


def all_to_all_bytes(config: Config, mesh: Mesh, step: StepConfig) -> float:
    """Return the bytes of one layer's tokens in all-to-all: sent and received, there and back."""
    if mesh.ep == 1:
        return 0.0
    tokens = step.micro_batch * max(sequence_lengths(config).values()) * config.model.moe.top_k
    return 2 * (1 + step.imbalance) * tokens * config.model.n_embd * step.itemsize


# ---- time ----------------------------------------------------------------------------------------


def local_tokens(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return the examples and the tokens of a step that each GPU computes.

    If the batch does not divide, some GPUs have one example more than the others, which wait.
    """
    examples = math.ceil(config.batch_size / mesh.batch_shards)
    return examples, examples * sum(sequence_lengths(config).values())


def bytes_sent(
    config: Config, cost: ModelCost, mesh: Mesh, step: StepConfig
) -> dict[tuple[str, str], float]:
    """Return the bytes that each GPU sends in a step, by (collective, group).

    The groups are "world", all GPUs; "replicas", the GPUs that hold the same experts; and "ep", the
    GPUs that share the experts.
    """
    m, n = config.model, mesh.world_size
    replicas = n // mesh.ep
    world_ring, replica_ring = (n - 1) / n, (replicas - 1) / replicas
    examples, tokens = local_tokens(config, mesh)
    outside, experts = cost.total - cost.experts, cost.experts / mesh.ep
    recomputed = 1 if step.checkpointing else 0  # the forward pass of a block, again
    if mesh.tp > 1:  # a sum after each layer that is split, forward and backward
        sums = (2 + recomputed) * cost.tensor_parallel_layers
        return {("all-reduce", "world"): 2 * world_ring * sums * tokens * m.n_embd * step.itemsize}
    sent = {}
    if mesh.is_fsdp:  # weights are gathered forward and backward, in each micro-batch
        micro_batches = math.ceil(examples / step.micro_batch)
        for group, ring, size in (
            ("world", world_ring, outside),
            ("replicas", replica_ring, experts),
        ):
            sent["all-gather", group] = 2 * micro_batches * ring * size * step.itemsize
            sent["reduce-scatter", group] = micro_batches * ring * size * 4
    else:
        sent["all-reduce", "world"] = 2 * world_ring * 4 * outside
        sent["all-reduce", "replicas"] = 2 * replica_ring * 4 * experts
    if mesh.ep > 1:  # there and back, forward and backward
        trips = 4 + 2 * recomputed
        copies = m.n_layer * m.moe.top_k * tokens
        elsewhere = (mesh.ep - 1) / mesh.ep
        sent["all-to-all", "ep"] = trips * copies * m.n_embd * step.itemsize * elsewhere
    return sent


def transfer_seconds(size: float, collective: str, group: str, mesh: Mesh, device: Device) -> float:
    """Return how long a GPU takes to send `size` bytes in a collective over a group of GPUs."""
    link, card = LINK_EFFICIENCY * device.link / 2, LINK_EFFICIENCY * device.network
    if size == 0:
        return 0.0
    if collective == "all-to-all":
        outside = max(0, mesh.ep - GPUS_PER_NODE) / (mesh.ep - 1)  # fraction of the other GPUs
        return size * (1 - outside) / link + (size * outside / card if outside else 0)
    if mesh.world_size <= GPUS_PER_NODE:
        return size / link
    in_node = GPUS_PER_NODE  # members of the ring in one machine, each with a network card
    if group == "replicas":
        in_node = max(1, GPUS_PER_NODE // mesh.ep)
    return size / min(link, card * in_node) if in_node > 1 else size / card


def expert_flops_fraction(cost: ModelCost) -> float:
    """Return the fraction of a block's matrix products that the experts compute, 0 without experts.

    Attention's products of queries and keys and the router are left out.
    """
    if not cost.experts:
        return 0.0
    outside_experts = cost.block * cost.n_blocks - cost.router
    return cost.active_experts / (cost.active_experts + outside_experts)


def step_seconds(
    config: Config,
    cost: ModelCost,
    mesh: Mesh,
    step: StepConfig,
    device: Device,
    flops_per_token: float,
    mfu: float,
) -> dict[str, float]:
    """Return the seconds of a step.

    "computing"; "waiting", the communication that computation waits for; "hidden", the
    communication that runs beside it; and "step", the whole step.
    """
    examples, tokens = local_tokens(config, mesh)
    repeats = 1.0 + step.checkpointing / 3  # a forward pass is a third of the arithmetic
    if config.multimodal.modalities and step.micro_batch < examples:
        repeats += 1 / 3  # gradient caching embeds every example twice
    if mesh.ep > 1:
        repeats *= 1 + expert_flops_fraction(cost) * (step.imbalance - 1)
    if mesh.tp > 1:  # all GPUs compute experts and routers; the head is counted as split
        head = config.model.vocab_size * config.model.n_embd
        replicated = 6 * (cost.active - head - cost.tensor_parallel)
        flops_per_token = replicated + (flops_per_token - replicated) / mesh.tp
    seconds = {
        "computing": tokens * flops_per_token * repeats / (device.flops * mfu),
        "waiting": 0.0,
        "hidden": 0.0,
    }
    for (collective, group), size in bytes_sent(config, cost, mesh, step).items():
        waits = collective == "all-to-all" or mesh.tp > 1
        seconds["waiting" if waits else "hidden"] += transfer_seconds(
            size, collective, group, mesh, device
        )
    seconds["step"] = max(seconds["computing"] + seconds["waiting"], seconds["hidden"])
    return seconds
