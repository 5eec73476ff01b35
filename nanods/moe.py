"""Mixture of Experts: many MLPs, of which each token uses the few that a router chooses for it.

What V2 adds to V1: the MLP of a block becomes E experts and a gate. With p = softmax(x W_gate) and K experts chosen,

    y = sum over the chosen e of w_e MLP_e(x),    w_e = p_e / (sum of the chosen p)        Shazeer et al. 2017, arXiv:1701.06538

so parameters grow with E and the work per token with K alone. One idea at a time:

    MLP                 one, as in V0 and V1: the limit of everything below at E = 1
    route               which experts, and with what weights
    experts_loop            run each expert on its tokens: a loop, to be believed            tests/test_moe.py holds
    experts_sorted          the same with tokens sorted by expert, and its own backward      the three together
    experts_grouped         the same as two grouped matrix products, for a GPU
    within_capacity     a limit for each expert, and who goes without                    GShard, arXiv:2006.16668
    load_balancing_loss, router_z_loss, MoE.update_bias      three ways to an even load; entropy_loss, for several modalities
    MoE                 the layer
    upcycle             experts that start as V1's MLP                                   Komatsuzaki 2022, arXiv:2212.05055

Nothing is dropped unless a capacity is asked for, and then in training only: a limit makes a token's output depend on tokens
that stand after it or in other rows (tests/test_moe_layer.py shows both), which generation could not repeat.

Left out on purpose, as exercises: sigmoid scores, jitter, shared and fine-grained experts (DeepSeekMoE, arXiv:2401.06066).

Shapes: B batch, T tokens in a sequence, N = B T tokens, C model width, E experts, K choices per token, F hidden width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIECE = 512  # rows of one expert that are computed at a time on a CPU: what they need stays in its cache


@dataclass(frozen=True)
class MoEConfig:
    n_expert: int = 1
    """Experts in each layer (E); 1 is a plain MLP."""
    top_k: int = 2
    """Experts that each token uses (K); at most n_expert."""
    normalise: bool = True
    """Whether the weights of the chosen experts sum to 1."""
    capacity_factor: float | None = None
    """Most tokens an expert takes in training, in multiples of an even share; the rest are dropped. None: no limit."""
    priority: Literal["token", "slot"] = "token"
    """Who is served first under a capacity: the earlier token, or all tokens' first choices before any second one."""
    balance_coefficient: float = 0.1
    """Weight of the load-balancing loss, a mean over the layers, beside the cross-entropy. 0: off."""
    z_coefficient: float = 0.001
    """Weight of the router z-loss, likewise."""
    bias_rate: float = 0.0
    """How far the selection bias of each expert moves in one optimizer step towards an even load. 0: no bias."""

    def __post_init__(self) -> None:
        E, K, factor, alone = (
            self.n_expert,
            self.top_k,
            self.capacity_factor,
            self.top_k == 1 and self.normalise,
        )
        rates = (self.balance_coefficient, self.z_coefficient, self.bias_rate)
        below = not all(r >= 0 for r in rates)
        faults = {
            f"n_expert = {E} must be at least 1 (1 is a plain MLP)": E < 1,
            f"top_k = {K} must lie between 1 and n_expert = {E}: choose fewer, or more experts": E
            > 1
            and not 1 <= K <= E,
            "top_k = 1 with weights that sum to 1 teaches the router nothing: add --moe.no-normalise": E
            > 1
            and alone,
            f"capacity_factor = {factor} must be above 0, say 1.25 (None: no limit)": factor
            is not None
            and not factor > 0,
            f"balance_coefficient, z_coefficient, bias_rate = {rates}: each must be at least 0 (0: off)": below,
        }
        if found := [fault for fault, there in faults.items() if there]:
            raise ValueError(f"moe.{found[0]}")


# ---- one MLP -----------------------------------------------------------------------------------------------------------------


class SquaredReLU(torch.autograd.Function):
    """y = max(0, x)^2, and its gradient 2 max(0, x) g. Written out, since autograd's own takes more passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return (g * ctx.saved_tensors[0]).mul_(2)


class MLP(nn.Module):
    """Two layers with a squared ReLU between them (So et al. 2021, arXiv:2109.08668), applied to each token alone."""

    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(n_embd, hidden, bias=False)
        self.out = nn.Linear(hidden, n_embd, bias=False)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, inspect: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, C) -> x (B, T, C), stats. `valid` and `inspect` are MoE's: an MLP does not look beyond a token."""
        return self.out(SquaredReLU.apply(self.up(x))), {}  # (B, T, C) -> (B, T, F) -> (B, T, C)


# ---- the router --------------------------------------------------------------------------------------------------------------


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """x (N, C), gate (E, C) -> (N, E), in at least fp32: a choice that rounding made would be no choice."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return x.to(wide) @ gate.to(wide).T


def choose(
    logits: Tensor, top_k: int, bias: Tensor | None = None, normalise: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, E) -> weights (N, K), experts (N, K), probabilities (N, E), and the margin (N,) of the last one chosen.

    `bias` (E,) is added to the probabilities for the choice alone; the weights never see it.
    """
    probs = logits.softmax(dim=-1)
    scores = probs.detach() if bias is None else probs.detach() + bias
    best, experts = scores.topk(
        min(top_k + 1, scores.size(-1)), dim=-1
    )  # one more, to see how near it was
    margin = (
        best[:, top_k - 1] - best[:, top_k]
        if best.size(-1) > top_k
        else torch.ones_like(best[:, 0])
    )
    experts = experts[:, :top_k]
    weights = probs.gather(-1, experts)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts, probs, margin


def route(
    x: Tensor, gate: Tensor, top_k: int, bias: Tensor | None = None, normalise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Which experts each token uses: x (N, C), gate (E, C) -> weights (N, K), experts (N, K), probabilities (N, E).

    Computed in at least fp32 (fp64 stays fp64). The weights sum to 1 unless `normalise` is off. ValueError if K > E.
    """
    if not 1 <= top_k <= gate.size(0):
        raise ValueError(
            f"top_k = {top_k} must lie between 1 and the number of experts, {gate.size(0)}"
        )
    return choose(router_logits(x, gate), top_k, bias, normalise)[:3]


# ---- tokens through their experts: three routes to one result ----------------------------------------------------------------
# x (N, C), weights (N, K), experts (N, K) with E where an assignment is dropped, up (E, F, C), out (E, C, F) -> (N, C)


def experts_loop(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """The reference: each expert in turn takes its tokens, and adds what it makes of them to theirs."""
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, slot = (experts == e).nonzero(as_tuple=True)
        made = SquaredReLU.apply(x[token] @ up[e].T) @ out[e].T  # (tokens of e, C)
        y = y.index_add(0, token, made * weights[token, slot, None].to(x.dtype))
    return y


def sort_by_expert(experts: Tensor, n_expert: int) -> tuple[Tensor, Tensor]:
    """(N, K) -> the assignments in the order of their experts (N K,), numbered as in experts.flatten(), and how many each has.

    Stable: an expert's tokens keep their order. Dropped assignments (number E) come last and are not counted: (E,).
    """
    flat = experts.flatten()
    return flat.argsort(stable=True), count_assignments(flat, n_expert)


def count_assignments(experts: Tensor, n_expert: int) -> Tensor:
    """How often each expert occurs: integers below E, or E for none -> (E,). No bincount: that waits for a GPU."""
    bins = torch.zeros(n_expert + 1, dtype=torch.long, device=experts.device)
    return bins.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())[:n_expert]


def pieces(counts: list[int]) -> Iterator[tuple[int, slice, bool]]:
    """The rows of each expert among the sorted ones, at most PIECE at a time, and whether they are its first."""
    start = 0
    for e, count in enumerate(counts):
        for first in range(start, start + count, PIECE):
            yield e, slice(first, min(first + PIECE, start + count)), first == start
        start += count


def take(x: Tensor, token: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of some tokens, in `dtype`; in bf16 with rows of zeros up to a multiple of 32: a CPU's library writes a new
    kernel for each shape it meets (0.3 ms, twice the product's time at tiny size), and counts differ at every step."""
    mine = x[token].to(dtype)
    return nn.functional.pad(mine, (0, 0, 0, -len(token) % 32)) if dtype == torch.bfloat16 else mine


class SortedExperts(torch.autograd.Function):
    """experts_sorted's arithmetic. Keeps the hidden activations, (N K, F) in all, and casts to `dtype` piece by piece."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        out: Tensor,
        order: Tensor,
        counts: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        token, w = order // weights.size(1), weights.flatten()[order]  # (N K,)
        y, hidden = torch.zeros_like(x), []
        for e, rows, _ in pieces(counts):
            r = (take(x, token[rows], dtype) @ up[e].to(dtype).T).relu_()
            made = ((r * r) @ out[e].to(dtype).T)[: rows.stop - rows.start]
            y.index_add_(0, token[rows], made.to(x.dtype) * w[rows, None].to(x.dtype))
            hidden.append(r)
        ctx.save_for_backward(x, w, up, out, order, token, *hidden)
        ctx.counts, ctx.dtype, ctx.K = counts, dtype, weights.size(1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, up, out, order, token, *hidden = ctx.saved_tensors
        dtype, grad_x, grad_w = ctx.dtype, torch.zeros_like(x), torch.zeros_like(w)
        grad_up, grad_out = torch.empty_like(up), torch.empty_like(out)
        for e in (e for e, count in enumerate(ctx.counts) if count == 0):
            grad_up[e], grad_out[e] = 0, 0
        for (e, rows, first), r in zip(pieces(ctx.counts), hidden, strict=True):
            mine, asked, n = (
                take(x, token[rows], dtype),
                take(g, token[rows], dtype),
                rows.stop - rows.start,
            )
            wide = torch.zeros(len(r), 1, dtype=dtype, device=x.device)
            wide[:n, 0] = w[rows]
            inner = (asked @ out[e].to(dtype)).mul_(r)  # r x the gradient of r^2, before the weight
            grad_w[order[rows]] = torch.linalg.vecdot(inner, r)[:n].to(
                w.dtype
            )  # = made . asked, without making it again
            inner.mul_(2 * wide)
            for grad, part in (
                (grad_out[e], asked.mul_(wide).T @ (r * r)),
                (grad_up[e], inner.T @ mine),
            ):
                grad.copy_(part) if first else grad.add_(part)
            grad_x.index_add_(0, token[rows], (inner @ up[e].to(dtype))[:n].to(x.dtype))
        return grad_x, grad_w.view(-1, ctx.K), grad_up, grad_out, None, None, None


def experts_sorted(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """As experts_loop, but tokens are sorted by expert once, and forward and backward are written out. The default."""
    order, counts = sort_by_expert(experts, len(up))
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return SortedExperts.apply(x, weights, up, out, order, counts.tolist(), dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would multiply in, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def experts_grouped(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """As experts_loop, by PyTorch's grouped matrix product: one kernel for all experts, and no count leaves the GPU.

    Not for fp64. Dropped assignments are computed too, with weight 0, so that every shape is known beforehand.
    """
    K, dtype = weights.size(1), compute_dtype(x)
    dropped = experts == len(up)
    order, counts = sort_by_expert(experts.masked_fill(dropped, len(up) - 1), len(up))
    ends = counts.cumsum(0).to(torch.int32)
    w = weights.masked_fill(dropped, 0).flatten()[order].to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        mine = x.to(dtype)[order // K]  # (N K, C)
        hidden = SquaredReLU.apply(
            nn.functional.grouped_mm(mine, up.to(dtype).mT, offs=ends)
        )  # (N K, F)
        made = nn.functional.grouped_mm(hidden, out.to(dtype).mT, offs=ends).to(x.dtype)  # (N K, C)
        return torch.zeros_like(x).index_add(0, order // K, made * w[:, None])


def run_experts(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """experts_grouped where it is the faster one, in bf16 on a GPU; experts_sorted elsewhere."""
    grouped = x.device.type == "cuda" and compute_dtype(x) == torch.bfloat16
    return (experts_grouped if grouped else experts_sorted)(x, weights, experts, up, out)


# ---- capacity ----------------------------------------------------------------------------------------------------------------


def within_capacity(
    experts: Tensor, n_expert: int, capacity: int, priority: str = "token"
) -> Tensor:
    """Which assignments an expert of `capacity` places can take: experts (N, K) -> (N, K), True where served.

    "token": places go to the earlier token. "slot": all first choices come before any second choice, as in GShard; a
    token's second choice then waits for the first choices of tokens that come *after* it.
    """
    queue = experts if priority == "token" else experts.T  # read row by row
    order, counts = sort_by_expert(
        queue, n_expert + 1
    )  # those without an expert queue at a desk of their own
    start = counts.cumsum(0) - counts  # where each expert's queue begins
    flat = queue.flatten()
    place = torch.empty_like(flat)
    place[order] = torch.arange(flat.numel(), device=flat.device) - start[flat[order]]
    served = ((place < capacity) & (flat < n_expert)).view(queue.shape)
    return served if priority == "token" else served.T


# ---- an even load ------------------------------------------------------------------------------------------------------------


def load_balancing_loss(probs: Tensor, experts: Tensor) -> Tensor:
    """E * sum over experts of (its share of the N K assignments) * (its mean probability): (N, E), (N, K) -> ().

    Switch Transformer's (Fedus et al. 2021, arXiv:2101.03961). 1.0 where both are even; E where all of it goes to one expert
    with K = 1. It can fall below 1: where the choices and the probabilities lean to different experts. The gradient comes
    through the probabilities alone. The micro-batch is its unit: over several, it is the mean of their losses."""
    E = probs.size(-1)
    share = count_assignments(experts, E).to(probs.dtype) / max(1, experts.numel())  # (E,)
    return E * (share * probs.mean(dim=0)).sum()  # not @, which autocast would round


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean of (log sum exp of a token's logits)^2: keeps them small, (N, E) -> (). Zoph et al. 2022, arXiv:2202.08906."""
    return logits.logsumexp(dim=-1).square().mean()


def entropy_loss(token_entropy: Tensor, importance: Tensor, least: float) -> Tensor:
    """For one modality of several, in nats: each token sure of its experts, all together using `least` of them or more. From
    the mean entropy of a token's probabilities () and their mean (E,). LIMoE: Mustafa et al. 2022, arXiv:2206.02770."""
    return token_entropy + (math.log(least) - torch.special.entr(importance).sum()).clamp(min=0)


# ---- the layer ---------------------------------------------------------------------------------------------------------------


class MoE(nn.Module):
    """E experts, each an MLP of `hidden` width, and a gate that gives each token K of them.

    Expert e is `up[e]` (F, C) and `out[e]` (C, F). ValueError for settings that cannot be.
    """

    optimizers: ClassVar = {"gate.weight": "adamw", "up": "experts", "out": "experts"}

    def __init__(
        self,
        n_embd: int,
        n_expert: int,
        top_k: int,
        hidden: int,
        capacity_factor: float | None = None,
        priority: str = "token",
        normalise: bool = True,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_expert or (capacity_factor is not None and not capacity_factor > 0):
            raise ValueError(
                f"top_k = {top_k} of {n_expert} experts, capacity_factor = {capacity_factor}: cannot be"
            )
        self.top_k, self.capacity_factor, self.priority = top_k, capacity_factor, priority
        self.normalise, self.bias_rate, self.run_experts = (
            normalise,
            bias_rate,
            run_experts,
        )  # expert_parallel.py mixes otherwise
        self.gate = nn.Linear(n_embd, n_expert, bias=False)
        self.up = nn.Parameter(torch.randn(n_expert, hidden, n_embd) * n_embd**-0.5)
        self.out = nn.Parameter(torch.randn(n_expert, n_embd, hidden) * hidden**-0.5)
        self.register_buffer("bias", torch.zeros(n_expert))

    def forward(
        self, x: Tensor, valid: Tensor | None = None, inspect: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, C) -> y (B, T, C), stats. What is not `valid` (B, T), padding, goes to no expert and is not counted.

        stats, of this call's tokens:
            load (E,)         assignments each expert was chosen for, before any are dropped; sums to N K
            importance (E,)   mean probability, with its gradient
            load_entropy ()   of the load's shares, in nats: ln E where even
            dropped ()        share of the assignments that found no place
            router_margin ()  mean distance of the last expert chosen from the first one that was not
            balance_loss, z_loss, token_entropy ()  with their gradients; token_entropy is the mean entropy of a token's probabilities
        and with `inspect` experts (B, T, K).
        """
        E, (B, T, C) = len(self.gate.weight), x.shape
        rows = x.reshape(-1, C)  # (N, C)
        logits = router_logits(rows, self.gate.weight)
        weights, experts, probs, margin = choose(
            logits, self.top_k, self.bias if self.bias_rate else None, self.normalise
        )
        chosen = experts
        if valid is not None:
            real = valid.reshape(-1)
            experts = experts.masked_fill(~real[:, None], E)
            logits, probs, chosen, margin = logits[real], probs[real], chosen[real], margin[real]
        load = count_assignments(experts, E)
        if self.training and self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * chosen.numel() / E)
            experts = experts.masked_fill(~within_capacity(experts, E, capacity, self.priority), E)
        y = self.run_experts(rows, weights, experts, self.up, self.out)
        total = load.sum().clamp(min=1)
        stats = {
            "load": load,
            "importance": probs.mean(dim=0),
            "load_entropy": torch.special.entr(load / total).sum(),
            "dropped": 1 - (experts < E).sum() / total,
            "router_margin": margin.mean(),
            "balance_loss": load_balancing_loss(probs, chosen),
            "z_loss": router_z_loss(logits),
            "token_entropy": torch.special.entr(probs).sum(dim=-1).mean(),
        }
        return y.view(B, T, C), stats | ({"experts": experts.view(B, T, -1)} if inspect else {})

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """After an optimizer step: raise the bias of experts under the mean load, lower the others' (DeepSeek-V3,
        arXiv:2412.19437). `load` (E,) is that of the whole step: summed over its micro-batches and processes."""
        load = load.to(self.bias)
        self.bias += self.bias_rate * (load.mean() - load).sign()


def upcycle(
    weights: dict[str, Tensor], n_expert: int, noise: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """A dense model's weights by name -> those of the model in which each MLP has become `n_expert` copies of itself.

    A new gate chooses among equals, and weights that sum to 1 give back the MLP: the loss does not change. Then the experts
    part, since each sees other tokens; `noise`, in multiples of a matrix's root mean square, parts them from the start. The
    gates are not among what is returned."""
    random = torch.Generator().manual_seed(seed)
    many = {}
    for name, weight in weights.items():
        if name.endswith((".mlp.up.weight", ".mlp.out.weight")):
            stack = weight.expand(n_expert, *weight.shape)
            spread = torch.randn(stack.shape, generator=random, dtype=weight.dtype) if noise else 0
            name, weight = (
                name.removesuffix(".weight"),
                stack + noise * weight.square().mean().sqrt() * spread,
            )
        many[name] = weight
    return many
