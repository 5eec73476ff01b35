"""Mixture of Experts: a block has E MLPs instead of one, and a router selects K for each token.

V2 adds this to V1. With the probabilities p = softmax(x W_gate) and the K most probable experts
selected, the output of a token is

    y = sum over selected e of w_e MLP_e(x),    w_e = p_e / (sum of p over the selected experts)

(Shazeer et al. 2017, arXiv:1701.06538). Parameters grow with E, but the work per token grows with K
only. The file reads from top to bottom, one idea at a time:

    MLP                    one MLP, as in V0 and V1; with E = 1 every step below equals it
    route                  select K experts for each token and compute their weights, by
                           router_logits and select_experts
    experts_loop           run each expert on its tokens, in a loop: the simple reference
    run_experts            the same result, faster (nanods/moe_kernel.py)
    within_capacity        limit the assignments of each expert   (GShard, arXiv:2006.16668)
    load_balancing_loss    keep the load even; so do router_z_loss and, per modality, entropy_loss
    MoE                    the layer; its update_bias evens the load without a loss
    upcycle                start each expert as a copy of a trained MLP   (arXiv:2212.05055)

No assignment is dropped unless capacity_factor is set, and then in training only: with a capacity
limit a token's output can depend on later tokens and on other rows of the batch, which generation
cannot reproduce (tests/test_moe_layer.py shows both).

Left out on purpose, as exercises: router noise, shared and fine-grained experts (DeepSeekMoE,
arXiv:2401.06066).

Pinned by tests/test_moe.py (the functions), tests/test_moe_layer.py (the layer, alone and in a GPT)
and tests/test_moe_kernel.py (the fast routes equal experts_loop).

Shapes: B batch, T tokens in a sequence, N = B T tokens, C model width, E experts, K experts per
token, F hidden width.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from nanods.moe_kernel import count_assignments, run_experts, sort_by_expert, squared_relu


@dataclass(frozen=True)
class MoEConfig:
    n_expert: int = 1
    """Number of experts in each layer (E); 1 is a plain MLP."""
    top_k: int = 2
    """Number of experts that each token uses (K); at most n_expert."""
    normalise: bool = True
    """Whether the weights of a token's experts are divided by their sum, so that they sum to 1."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores, of which the largest are selected and are the weights.
    softmax: the experts compete. sigmoid: each expert by itself (DeepSeek-V3)."""
    capacity_factor: float | None = None
    """Most assignments per expert in training, in multiples of an even share; the rest are dropped.
    None: no limit."""
    priority: Literal["token", "slot"] = "token"
    """Which assignments a full expert keeps. token: those of the earliest tokens. slot: first
    choices of all tokens, then second choices."""
    balance_coefficient: float = 0.1
    """Weight of the load-balancing loss, averaged over the layers, in the training loss. 0: off."""
    z_coefficient: float = 0.001
    """Weight of the router z-loss, averaged over the layers, in the training loss. 0: off."""
    bias_rate: float = 0.0
    """How far each optimizer step moves an expert's selection bias towards an even load. It falls
    with the learning rate; this is its peak. 0: no bias."""

    def __post_init__(self) -> None:
        E, K = self.n_expert, self.top_k
        if E < 1:
            raise ValueError(f"moe.n_expert = {E} must be at least 1 (1 is a plain MLP)")
        if E > 1 and not 1 <= K <= E:
            raise ValueError(
                f"moe.top_k = {K} must lie between 1 and n_expert = {E}: "
                "choose fewer, or more experts"
            )
        if E > 1 and K == 1 and self.normalise:
            raise ValueError(
                "moe.top_k = 1 with weights that sum to 1 teaches the router nothing: "
                "add --moe.no-normalise"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(
                f"moe.capacity_factor = {self.capacity_factor} must be above 0, say 1.25 "
                "(None: no limit)"
            )
        rates = (self.balance_coefficient, self.z_coefficient, self.bias_rate)
        if not all(rate >= 0 for rate in rates):
            raise ValueError(
                f"moe.balance_coefficient, z_coefficient, bias_rate = {rates}: "
                "each must be at least 0 (0: off)"
            )


# ---- one MLP -------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Apply two linear layers with a squared ReLU between them to each token."""

    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(n_embd, hidden, bias=False)
        self.out = nn.Linear(hidden, n_embd, bias=False)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, inspect: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output (B, T, C) for x (B, T, C), and no stats.

        `valid` and `inspect` are there because MoE.forward has them. An MLP ignores both.
        """
        return self.out(squared_relu(self.up(x))), {}  # (B, T, C) -> (B, T, F) -> (B, T, C)

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one token."""
        total = sum(p.numel() for p in self.parameters())
        return total, total

    def flops_per_token(self) -> int:
        """Return the operations to train on one token: 2 per weight forward and 4 backward."""
        return 6 * self.count_parameters()[1]

    def activation_bytes(
        self, device: str, itemsize: int, tp: int = 1, imbalance: float = 1.0
    ) -> list[float]:
        """Return the bytes per token kept for backward, tensor by tensor.

        `device` is "cpu" or "cuda", `itemsize` the bytes of a number in matrix products, `tp` the
        number of tensor-parallel devices. `imbalance` is for MoE.
        """
        F, C = self.up.weight.shape
        cast = itemsize if itemsize < 4 else 0
        hidden = itemsize * F / tp
        return [4 * C, cast * C, hidden, hidden]  # normalised x, its cast, relu and its square

    def backward_bytes(self, itemsize: int, tp: int = 1, imbalance: float = 1.0) -> list[float]:
        """Return the bytes per token of the gradients that the layer holds during its backward."""
        F, C = self.up.weight.shape
        return [4 * C, itemsize * F / tp, itemsize * F / tp]

    def tensor_parallel_parameters(self) -> int:
        """Return the number of parameters that tensor parallelism splits: all of them."""
        return self.count_parameters()[0]


# ---- the router ----------------------------------------------------------------------------------


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """Return the router's logit of each expert for each token: x (N, C), gate (E, C) -> (N, E).

    Computed in fp32, or fp64 if x is fp64: in bf16 rounding would decide between experts with
    similar scores.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ gate.to(dtype).T


def select_experts(
    logits: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    normalise: bool = True,
    scores: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the top_k experts of each token from the router's logits (N, E).

    Returns weights (N, K), experts (N, K) and probabilities (N, E). `bias` (E,) is added to the
    scores for the selection only; the weights do not contain it.

    `scores`: "softmax" of the logits, which are the probabilities too, or "sigmoid". Then the
    probabilities are the scores divided by their sum (DeepSeek-V3, arXiv:2412.19437, 2.1.2).
    """
    if scores == "sigmoid":
        logits = logsigmoid(logits)  # softmax(logsigmoid(x)) is sigmoid(x) divided by the sum
    probs = logits.softmax(dim=-1)
    score = logits.exp() if scores == "sigmoid" else probs
    ranked = score.detach() if bias is None else score.detach() + bias
    experts = ranked.topk(top_k, dim=-1).indices
    # A division by the sum would be 0 / 0 where a bias selects improbable experts alone.
    weights = logits.gather(-1, experts).softmax(dim=-1) if normalise else score.gather(-1, experts)
    return weights, experts, probs


def route(
    x: Tensor, gate: Tensor, top_k: int, bias: Tensor | None = None, normalise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the experts of each token: x (N, C), gate (E, C) -> weights, experts, probabilities.

    weights (N, K) sum to 1 over a token's experts unless `normalise` is False; experts (N, K) are
    sorted by score, best first; probabilities (N, E). Computed in fp32, or fp64 if x is fp64.
    `bias` as for select_experts. Raises ValueError if top_k exceeds E.
    """
    if not 1 <= top_k <= gate.size(0):
        raise ValueError(
            f"top_k = {top_k} must lie between 1 and the number of experts, {gate.size(0)}"
        )
    return select_experts(router_logits(x, gate), top_k, bias, normalise)


# ---- run the experts: the reference --------------------------------------------------------------


def experts_loop(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Run each expert on its tokens and add the weighted outputs, one expert after another.

    x (N, C), weights (N, K), experts (N, K) with E for a dropped assignment, up (E, F, C), out (E,
    C, F) -> (N, C). This is the reference: experts_sorted and experts_grouped of
    nanods/moe_kernel.py take the same arguments and return the same.
    """
    y = torch.zeros_like(x)
    for e in range(len(up)):
        token, slot = (experts == e).nonzero(as_tuple=True)
        expert_output = squared_relu(x[token] @ up[e].T) @ out[e].T  # (tokens of e, C)
        y = y.index_add(0, token, expert_output * weights[token, slot, None].to(x.dtype))
    return y


# ---- capacity ------------------------------------------------------------------------------------


def within_capacity(
    experts: Tensor, n_expert: int, capacity: int | Tensor, priority: str = "token"
) -> Tensor:
    """Return which assignments fit if each expert accepts `capacity` of them: (N, K) -> bool (N,
    K).

    experts (N, K), with n_expert for an assignment that is already dropped; it gets False and takes
    no capacity. `priority` says which assignments an expert keeps. "token": those of the earliest
    tokens. "slot": first choices of all tokens before any second choice, as in GShard; then a
    token's second choice depends on the first choices of later tokens.
    """
    queue = experts if priority == "token" else experts.T  # in order of priority, row by row
    flat = queue.flatten()
    # Dropped assignments are sorted like those of one more expert.
    order, counts = sort_by_expert(queue, n_expert + 1)
    start = counts.cumsum(0) - counts  # where each expert's assignments begin in the sorted order
    position = torch.empty_like(flat)  # the number of earlier assignments to the same expert
    position[order] = torch.arange(flat.numel(), device=flat.device) - start[flat[order]]
    kept = ((position < capacity) & (flat < n_expert)).view(queue.shape)
    return kept if priority == "token" else kept.T


# ---- losses that keep the load even --------------------------------------------------------------


def token_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over the tokens that are valid, or over all if `valid` is None.

    x (N,) or (N, E), valid (N,) -> () or (E,). Zeros replace padding in the sum. The mean of
    x[valid] is the same, but its shape depends on the data: it breaks torch.compile's graph and
    makes the CPU wait for the GPU.
    """
    if valid is None:
        return x.mean(dim=0)
    is_padding = ~valid if x.ndim == 1 else ~valid[:, None]
    return x.masked_fill(is_padding, 0).sum(dim=0) / valid.sum()


def load_balancing_loss(probs: Tensor, experts: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the Switch Transformer's load-balancing loss: 1.0 if the load is even.

        loss = E * sum over e of f_e P_e

    f_e is expert e's fraction of the N K assignments and P_e its mean probability: probs (N, E),
    experts (N, K) -> (). Where `valid` (N,) is False, at padding, experts must be E: N then counts
    the other tokens. The loss is 1.0 if f or P is uniform, and E if K = 1 and every token uses
    one expert with probability 1. It falls below 1 if the experts with many assignments have low
    probabilities on average. Only P carries a gradient. f and P are those of one micro-batch; the
    loss of several is the mean of theirs. Fedus et al. 2021, arXiv:2101.03961.
    """
    E = probs.size(-1)
    if valid is None:
        n_assignments = max(1, experts.numel())
    else:
        n_assignments = (valid.sum() * experts.size(1)).clamp(min=1)
    fraction = count_assignments(experts, E).to(probs.dtype) / n_assignments  # (E,)
    return E * (fraction * token_mean(probs, valid)).sum()  # not @, which autocast would round


def router_z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean of logsumexp(a token's logits)^2, which keeps logits small: (N, E) -> ().

    (log E)^2 if all logits are 0. Tokens that are not `valid` (N,) are left out. Zoph et al. 2022,
    arXiv:2202.08906.
    """
    return token_mean(logits.logsumexp(dim=-1).square(), valid)


def entropy_loss(token_entropy: Tensor, importance: Tensor, min_experts: float) -> Tensor:
    """Return LIMoE's entropy loss for one modality, in nats: at least 0.

        loss = token_entropy + max(0, log(min_experts) - entropy(importance))

    token_entropy () is the mean entropy of a token's router probabilities, importance (E,) the mean
    of the probabilities. The first term makes each token's selection certain. The second makes the
    modality use at least min_experts experts, and is 0 once it does. Mustafa et al. 2022,
    arXiv:2206.02770.
    """
    entropy = torch.special.entr(importance).sum()
    return token_entropy + (math.log(min_experts) - entropy).clamp(min=0)


# ---- the layer -----------------------------------------------------------------------------------


class MoE(nn.Module):
    """Run each token through K of E experts, each an MLP of `hidden` width.

    Expert e has the matrices `up[e]` (F, C) and `out[e]` (C, F). Raises ValueError if K exceeds E.
    """

    optimizers: ClassVar = {"gate.weight": "adamw", "up": "experts", "out": "experts"}
    fp32_parameters: ClassVar = ("gate.weight",)  # autocast does not cast them: see router_logits

    def __init__(self, n_embd: int, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        n_expert = config.n_expert
        if not 1 <= config.top_k <= n_expert:  # MoEConfig allows any top_k for one expert
            raise ValueError(f"top_k = {config.top_k} must lie between 1 and n_expert = {n_expert}")
        self.top_k = config.top_k
        self.normalise = config.normalise
        self.scores = config.scores
        self.capacity_factor = config.capacity_factor
        self.priority = config.priority
        self.bias_rate = config.bias_rate
        self.run_experts = run_experts  # nanods/distributed/expert_parallel.py replaces it
        self.gate = nn.Linear(n_embd, n_expert, bias=False)
        self.up = nn.Parameter(torch.randn(n_expert, hidden, n_embd) * n_embd**-0.5)
        self.out = nn.Parameter(torch.randn(n_expert, n_embd, hidden) * hidden**-0.5)
        self.register_buffer("bias", torch.zeros(n_expert))

    def forward(
        self, x: Tensor, valid: Tensor | None = None, inspect: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output (B, T, C) for x (B, T, C), and stats.

        `valid` (B, T) is False at padding. Padding uses no expert, its output is 0, and the stats
        leave it out. With N valid tokens the stats are

            load (E,)         assignments of each expert, before any are dropped; the sum is N K
            importance (E,)   mean probability, with gradient
            dropped ()        fraction of the assignments that exceeded the capacity
            balance_loss ()   load_balancing_loss, with gradient
            z_loss ()         router_z_loss, with gradient
            token_entropy ()  mean entropy of a token's probabilities, in nats, with gradient

        and, if `inspect` is True, experts (B, T, K), with E for padding and dropped assignments.
        """
        E, (B, T, C) = len(self.gate.weight), x.shape
        rows = x.reshape(-1, C)  # (N, C)
        logits = router_logits(rows, self.gate.weight)
        bias = self.bias if self.bias_rate else None
        weights, selected, probs = select_experts(
            logits, self.top_k, bias, self.normalise, self.scores
        )
        if valid is not None:
            valid = valid.reshape(-1)  # (N,)
            selected = selected.masked_fill(~valid[:, None], E)
        load = count_assignments(selected, E)
        experts = selected
        if self.capacity_factor is not None and self.training:
            kept = within_capacity(selected, E, self.capacity(selected, valid), self.priority)
            experts = selected.masked_fill(~kept, E)
        y = self.run_experts(rows, weights, experts, self.up, self.out)  # (N, C)
        total = load.sum().clamp(min=1)
        stats = {
            "load": load,
            "importance": token_mean(probs, valid),
            "dropped": 1 - (experts < E).sum() / total,
            "balance_loss": load_balancing_loss(probs, selected, valid),
            "z_loss": router_z_loss(logits, valid),
            "token_entropy": token_mean(torch.special.entr(probs).sum(dim=-1), valid),
        }
        if inspect:
            stats["experts"] = experts.view(B, T, -1)
        return y.view(B, T, C), stats

    def capacity(self, experts: Tensor, valid: Tensor | None) -> int | Tensor:
        """Return how many assignments each expert accepts: experts (N, K), valid (N,) or None.

        With padding this is a tensor (), which the CPU need not wait for. In fp64, so that it is
        what Python computes; Apple's GPUs have fp32 only.
        """
        E = len(self.gate.weight)
        if valid is None:
            return math.ceil(self.capacity_factor * experts.numel() / E)
        dtype = torch.float32 if experts.device.type == "mps" else torch.float64
        n_assignments = (valid.sum() * experts.size(1)).to(dtype)
        return (self.capacity_factor * n_assignments / E).ceil()

    @torch.no_grad()
    def update_bias(self, load: Tensor, lr_multiplier: float = 1.0) -> None:
        """Raise the selection bias of underused experts by bias_rate, lower that of overused ones.

        An expert is underused if its load is below the mean. Call this once after each optimizer
        step, with the load (E,) summed over the step's micro-batches and processes, and the
        learning rate as a share of its peak: the length of the move falls with it, so that the
        selection settles. DeepSeek-V3, arXiv:2412.19437.
        """
        load = load.to(self.bias)
        self.bias += self.bias_rate * lr_multiplier * (load.mean() - load).sign()

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, in all and used by one token: without E - K experts."""
        total = sum(p.numel() for p in self.parameters())
        expert = self.up[0].numel() + self.out[0].numel()
        return total, total - (len(self.up) - self.top_k) * expert

    def flops_per_token(self) -> int:
        """Return the operations to train on one token: 2 per weight forward and 4 backward."""
        return 6 * self.count_parameters()[1]

    def activation_bytes(
        self, device: str, itemsize: int, tp: int = 1, imbalance: float = 1.0
    ) -> list[float]:
        """Return the bytes per token kept for backward, tensor by tensor: as MLP.activation_bytes.

        `imbalance` is the load of this device's experts over the mean of all devices. Tensor
        parallelism does not split experts.
        """
        E, F, C = self.up.shape
        K = self.top_k * imbalance
        scores = 16 * E if self.scores == "sigmoid" else 8 * E  # with what its gradient needs
        router = [4 * C, scores, 32 * self.top_k]  # normalised x, scores, choices and weights
        if device == "cuda":  # experts_grouped
            return [*router, itemsize * K * C, itemsize * K * F, itemsize * K * F, 4 * K * C]
        return [*router, itemsize * K * F]  # experts_sorted

    def backward_bytes(self, itemsize: int, tp: int = 1, imbalance: float = 1.0) -> list[float]:
        """Return the bytes per token of the gradients that the layer holds during its backward."""
        _, F, C = self.up.shape
        K = self.top_k * imbalance
        return [4 * C, itemsize * K * F, itemsize * K * F]

    def tensor_parallel_parameters(self) -> int:
        """Return the number of parameters that tensor parallelism splits: none."""
        return 0


def feed_forward(n_embd: int, hidden: int, config: MoEConfig) -> MLP | MoE:
    """Return the layer after attention in a block: one MLP, or several experts and a router."""
    if config.n_expert == 1:
        return MLP(n_embd, hidden)
    return MoE(n_embd, hidden, config)


def upcycle(
    weights: dict[str, Tensor], n_expert: int, noise: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """Turn a dense model's weights into those of a model whose MLPs are n_expert copies of theirs.

    `weights` and the result are by name. Because a token's weights sum to 1, the copies together
    compute what the MLP did, whatever the gate selects: the loss does not change. The experts then
    diverge because each sees other tokens. `noise`, in multiples of each matrix's root mean square,
    makes them differ from the start. The result has no weights for the gates.
    """
    generator = torch.Generator().manual_seed(seed)
    upcycled = {}
    for name, weight in weights.items():
        if name.endswith((".mlp.up.weight", ".mlp.out.weight")):
            copies = weight.expand(n_expert, *weight.shape)
            rms = weight.square().mean().sqrt()
            draws = (
                torch.randn(copies.shape, generator=generator, dtype=weight.dtype) if noise else 0
            )
            upcycled[name.removesuffix(".weight")] = copies + noise * rms * draws
        else:
            upcycled[name] = weight
    return upcycled
