"""A contrastive loss: what belongs together comes near in one space, and all else in the batch moves away.

What V3 adds to the trunk. For B pairs of embeddings a_i, b_i of length 1, with similarities s_ij = a_i . b_j and a scale t,

    L(a -> b) = - mean over i of log( exp(t s_ii) / sum over j of exp(t s_ij) )     InfoNCE: van den Oord 2018, arXiv:1807.03748
    L         = (L(a -> b) + L(b -> a)) / 2                                         CLIP: Radford et al. 2021, arXiv:2103.00020

a cross-entropy over the batch: which b is a_i's? Nothing is labelled, and a larger batch asks a harder question. With t it
hardens too: 1 / t is the temperature. One idea at a time:

    contrastive_loss_reference   the equations: two loops, to be believed
    contrastive_loss             the same as two matrices, in at least fp32
    Temperature                  the scale, learnt
    all_pairs_loss               more than two modalities: each pair that is asked for, with its weight
    gather_with_gradient         one batch over several processes
    cached_gradients             one batch in pieces, where its activations do not fit     GradCache: Gao 2021, arXiv:2101.06983
    ranks, recall_at_k, median_rank      how well one modality finds another

A batch may hold the same thing twice (one image under two captions). Without `ids` the loss pushes such twins apart.

Left out on purpose, as an exercise: SigLIP's sigmoid loss, a yes or no for each pair alone (Zhai et al. 2023,
arXiv:2303.15343), which needs no sum over the batch, and so neither a gather nor a cache.

Pinned by tests/test_contrastive.py: the loss equals the reference, whatever the ids; two processes give the loss and gradients
of one, and so do pieces of a batch; embeddings that have collapsed, or are NaN, find nothing.

Shapes: B pairs in the batch, M width of an embedding, R rows of a matrix of similarities, Q queries and as many targets.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Batch = (
    Tensor | dict[str, Tensor]
)  # one modality, or several by name; the first dimension is the batch's


# ---- the loss ----------------------------------------------------------------------------------------------------------------


def chance_loss(B: int) -> float:
    """ln B, in nats: the loss of B pairs where all similarities are equal. What a run starts near, and must fall below."""
    return math.log(B)


def contrastive_loss_reference(
    a: Tensor, b: Tensor, scale: Tensor | float, ids: Tensor | None = None
) -> Tensor:
    """The equations above: what `contrastive_loss` must equal. a, b (B, M), ids (B,) -> ()."""
    B, total = len(a), 0
    for left, right in ((a, b), (b, a)):
        for i in range(B):
            rivals = [
                j for j in range(B) if j == i or ids is None or ids[j] != ids[i]
            ]  # i itself is always among them
            scores = torch.stack([scale * (left[i] @ right[j]) for j in rivals])
            total = total + scores.logsumexp(dim=0) - scale * (left[i] @ right[i])
    return total / (2 * B)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    ids: Tensor | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """How surely each a finds its b among all, and each b its a: a, b (B, M) of length 1 -> (), in nats.

    `scale` is 1 / temperature: a number, or a tensor () that may need a gradient. Items with the same id, ids (B,), are no
    negatives of each other. `rows`: count these items alone, against all (see `local_rows`). In at least fp32, also under
    autocast: in bf16 similarities near 1 are 1/256 apart, times the scale.

    Unrelated embeddings give about `chance_loss(B)` (random directions scale^2 / (2 M) more). It is 0 only in the limit: the
    best that vectors of length 1 reach is ln(1 + (B - 1) exp(-scale B / (B - 1))), 0.0024 for B = 64 at a scale of 10. That
    is why the scale is learnt. ValueError if the shapes of a and b differ.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"embeddings of shape {tuple(a.shape)} and {tuple(b.shape)}: each needs its partner in its own row"
        )
    a, b = widen(a, b)
    everyone = torch.arange(len(a), device=a.device)  # (B,)
    own = everyone[rows]  # (R,): the column of each row's partner
    total = 0
    with torch.autocast(a.device.type, enabled=False):
        for left, right in (
            (a, b),
            (b, a),
        ):  # of all rows, the second matrix is the first one transposed
            logits = scale * (left[rows] @ right.T)  # (R, B)
            if ids is not None:
                twin = (ids[rows, None] == ids) & (own[:, None] != everyone)  # (R, B)
                logits = logits.masked_fill(twin, float("-inf"))  # exp(-inf) = 0: out of the sum
            total = total + F.cross_entropy(logits, own)
    return total / 2


def widen(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64 if one is, else in fp32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


class Temperature(nn.Module):
    """The scale 1 / temperature, learnt as its logarithm, which is free to be any number; at most `most`, as in CLIP.

    The *parameter* is clamped, each time before it is used. A clamp of the value alone has gradient 0 above the limit: a scale
    that one step carried over it would stay there for good. Clamping after the optimizer's step does the same as this, until
    someone writes a training loop without it.
    """

    def __init__(self, start: float = 0.1, most: float = 100.0) -> None:
        """`start`: the first temperature. ValueError if its scale is not a number up to `most`."""
        super().__init__()
        if not start * most >= 1:
            raise ValueError(
                f"temperature {start} must be at least {1 / most}: the scale, 1 / temperature, is at most {most}"
            )
        self.limit = math.log(most)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(start)))

    def forward(self) -> Tensor:
        """-> the scale (), in the parameter's dtype."""
        with torch.no_grad():
            self.log_scale.clamp_(max=self.limit)
        return self.log_scale.exp()


def all_pairs_loss(
    embeddings: dict[str, Tensor],
    scale: Tensor | float,
    pairs: dict[tuple[str, str], float],
    ids: Tensor | None = None,
    rows: slice = slice(None),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted mean of the pairs' losses, and each of them by name ("text-image"), without gradient.

    embeddings: (B, M) by modality; pairs: the weight of each pair of modalities; the rest as in `contrastive_loss`. One space
    can come of it if the pairs connect all modalities, even where two never meet (ImageBind: Girdhar et al. 2023,
    arXiv:2305.05665). ValueError for a modality that is not there, and for weights that have no mean.
    """
    for name in (name for pair in pairs for name in pair):
        if name not in embeddings:
            raise ValueError(
                f"no embeddings of {name!r}, which a pair asks for: there are {', '.join(embeddings) or 'none'}"
            )
    weights = sum(pairs.values())
    if not (weights > 0 and all(weight >= 0 for weight in pairs.values())):
        raise ValueError(f"weights {pairs}: none may be below 0, and one must be above")
    losses = {
        pair: contrastive_loss(embeddings[pair[0]], embeddings[pair[1]], scale, ids, rows)
        for pair in pairs
    }
    total = sum(pairs[pair] * loss for pair, loss in losses.items()) / weights
    return total, {"-".join(pair): loss.detach() for pair, loss in losses.items()}


# ---- one batch over several processes ----------------------------------------------------------------------------------------
# Each process encodes its own n items, but its negatives are everyone's. The rule that gives one process's gradients:
#
#     everything = {name: gather_with_gradient(e) for name, e in embeddings.items()}     and the ids as well
#     all_pairs_loss(everything, scale, pairs, ids, rows=local_rows(n))[0].backward()
#
# then the mean of the gradients over the processes, the temperature's too, as DistributedDataParallel takes it. Process r's
# loss L_r is the mean over its own rows, so that the mean of the L_r is L. An embedding is a rival in all of them: the gather's
# backward sums over them, and the mean divides by their number. Without `rows` everyone counts all rows, and the gradients are
# the same, for as many times the arithmetic as there are processes.


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rows(n: int) -> slice:
    """Where this process's n items stand among those gathered; all of them where it is alone."""
    first = n * dist.get_rank() if processes() > 1 else 0
    return slice(first, first + n)


class Gather(torch.autograd.Function):
    """Everyone's rows, by process. What each of them says of mine is added up on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(processes())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        g = g.clone(
            memory_format=torch.contiguous_format
        )  # it is summed in place, and may be someone else's too
        dist.all_reduce(g)
        return g.chunk(processes())[dist.get_rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """x (n, ...) -> (n processes, ...), in the order of the processes; x itself where there is no group, or a group of one.

    Every process must call it, and call its backward, with the same shape: one that does not leaves the others waiting.
    """
    return Gather.apply(x) if processes() > 1 else x


# ---- one batch in pieces -----------------------------------------------------------------------------------------------------


def cached_gradients(
    encode: Callable[[Batch], Batch | tuple[Batch, Tensor]],
    inputs: Batch,
    loss: Callable[[Batch], Tensor],
    size: int,
) -> Tensor:
    """What `loss(encode(inputs)).backward()` does, with the activations of `size` items in memory at a time -> the loss ().

    The loss needs all embeddings at once, but those are small; what is large is the graph behind them. So: embed all without a
    graph; differentiate the loss down to the embeddings; then embed each piece again, and hand it the gradients that are its
    own. One more forward of the encoder for a batch of any size. Adds to .grad, as backward() does, also of what `loss` holds,
    such as a temperature.

    `encode` maps a piece of `inputs` to embeddings, row by row; either is a tensor, or tensors by modality, equally many of
    each. It must give the same embeddings twice: *no dropout*. (Replaying the random state would mend that, on every device it
    is drawn on.) With them it may give a loss of its own (), such as MoE's for the balance: its mean over the pieces is added.
    Under DistributedDataParallel pass the bare model, and take the mean of the gradients afterwards: its hooks would do so at
    each piece. ValueError for inputs that are not equally many.
    """
    pieces = split(inputs, size)
    with torch.no_grad():
        made = join([apart(encode(piece))[0] for piece in pieces])
    leaves = {name: e.requires_grad_() for name, e in named(made).items()}
    total = loss(made)
    total.backward()
    for start, piece in zip(range(0, len(pieces) * size, size), pieces, strict=True):
        again, own = apart(encode(piece))
        again, grads = (
            named(again),
            {n: e.grad for n, e in leaves.items() if e.grad is not None},
        )  # of what is used
        mine = [name for name in grads if again[name].requires_grad]  # not of a frozen encoder
        roots, theirs = [again[n] for n in mine], [grads[n][start : start + size] for n in mine]
        if own is not None:
            total = total + own.detach() / len(pieces)
            roots, theirs = [*roots, own], [*theirs, torch.full_like(own, 1 / len(pieces))]
        if roots:
            torch.autograd.backward(roots, theirs)
    return total.detach()


def apart(made: Batch | tuple[Batch, Tensor]) -> tuple[Batch, Tensor | None]:
    """Embeddings, and the loss that came with them or None."""
    return made if isinstance(made, tuple) else (made, None)


def named(x: Batch) -> dict[str, Tensor]:
    return x if isinstance(x, dict) else {"": x}


def split(x: Batch, size: int) -> list[Batch]:
    """Pieces of at most `size` items, all modalities alike. ValueError if they have not equally many."""
    lengths = {name: len(t) for name, t in named(x).items()}
    if len(set(lengths.values())) != 1 or size < 1:
        raise ValueError(
            f"pieces of {size} of {lengths} items: at least 1, and of each modality equally many"
        )
    if isinstance(x, Tensor):
        return list(x.split(size))
    return [
        dict(zip(x, parts, strict=True))
        for parts in zip(*(t.split(size) for t in x.values()), strict=True)
    ]


def join(parts: list[Batch]) -> Batch:
    """The pieces as one again."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- retrieval ---------------------------------------------------------------------------------------------------------------

SCORES = 1 << 20  # similarities in memory at once


@torch.no_grad()
def ranks(queries: Tensor, targets: Tensor, ids: Tensor | None = None) -> Tensor:
    """How many targets score as high as a query's own, or higher: queries, targets (Q, M), query i's own target i -> (Q,).

    0 is best. Ties count against the model, also those that only rounding parts: embeddings that have collapsed to one point
    come last (Q - 1), where counting higher scores alone would call them perfect. NaN counts against it too, and a query
    whose own score is NaN gets Q. Targets with the same id, ids (Q,), are no rivals. ValueError if the shapes differ.
    """
    if queries.shape != targets.shape:
        raise ValueError(
            f"{tuple(queries.shape)} queries, {tuple(targets.shape)} targets: query i looks for target i"
        )
    queries, targets = widen(queries, targets)
    (Q, M), counts = queries.shape, []
    everyone = torch.arange(Q, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        for some in everyone.split(max(1, SCORES // max(1, Q))):
            scores = queries[some] @ targets.T  # (R, Q)
            own = scores.gather(1, some[:, None])  # (R, 1)
            rounding = (
                M
                * torch.finfo(own.dtype).eps
                * (queries[some] * targets[some]).abs().sum(dim=-1, keepdim=True)
            )
            rival = some[:, None] != everyone if ids is None else ids[some, None] != ids  # (R, Q)
            count = (~(scores < own - rounding) & rival).sum(
                dim=-1
            )  # "not lower", since NaN is neither lower nor higher
            counts.append(count.masked_fill(own[:, 0].isnan(), Q))
    return torch.cat(counts)


def recall_at_k(queries: Tensor, targets: Tensor, k: int, ids: Tensor | None = None) -> float:
    """The share of queries whose own target is among their k best: 0 to 1. By chance k / Q. ValueError if k < 1."""
    if k < 1:
        raise ValueError(f"recall at {k}: at least the best one must be looked at")
    found = ranks(queries, targets, ids) < min(k, len(queries))
    return found.sum().item() / len(found)


def median_rank(queries: Tensor, targets: Tensor, ids: Tensor | None = None) -> float:
    """The median place of the own target, where 1 (not 0) is best. By chance (Q + 1) / 2."""
    return (ranks(queries, targets, ids) + 1).float().quantile(0.5).item()
