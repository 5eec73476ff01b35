"""The contrastive loss: matching embeddings move together, all others in the batch move apart.

This is what V3 adds to the trunk. For B pairs of unit-length embeddings a_i, b_i with similarities
s_ij = a_i . b_j and a scale t:

    L(a -> b) = - mean over i of log( exp(t s_ii) / sum over j of exp(t s_ij) )
    L         = (L(a -> b) + L(b -> a)) / 2

The first line is InfoNCE (van den Oord et al. 2018, arXiv:1807.03748), the second CLIP's symmetric
loss (Radford et al. 2021, arXiv:2103.00020). Each direction is a cross-entropy over the batch:
which b belongs to a_i? No labels are needed, and a larger batch makes the task harder. A larger
scale t makes it harder too; 1 / t is the temperature. The file adds one idea at a time:

    contrastive_loss_reference   the equations as two loops
    contrastive_loss             the same with two matrix products, in at least fp32
    Temperature                  the learnt scale
    all_pairs_loss               more than two modalities: a weighted mean over pairs of modalities
    gather_with_gradient         one batch spread over several processes
    cached_gradients             a batch whose activations do not fit into memory at once
                                 (GradCache: Gao et al. 2021, arXiv:2101.06983)
    ranks, recall_at_k, median_rank      retrieval metrics
    nearest_class                zero-shot classification

A batch may contain duplicates, such as one image with two captions, or two images with the caption
"cat". Pass `ids` to exclude them from the negatives, and to accept each as an answer in retrieval;
without `ids` the loss pushes duplicates apart. An example may have several ids, such as one of its
image and one of its caption: two examples are duplicates if they share either. This relation is
not transitive (image 1 "cat", image 1 "pet" and image 2 "pet" are two pairs of duplicates, and the
first and the last are none), so duplicates are pairs in a mask and not groups.

Left out on purpose, as an exercise: SigLIP's sigmoid loss (Zhai et al. 2023, arXiv:2303.15343). It
classifies each pair on its own and needs no sum over the batch, so neither a gather nor a cache.

An example may lack a modality. `present` says which examples have what a loss compares: the others
are no queries, no candidates, and have no part in the mean.

Pinned by tests/test_contrastive.py: the loss equals the reference, with and without ids and
missing modalities; two processes give the loss and gradients of one, and so do micro-batches with
gradient caching; collapsed and NaN embeddings retrieve nothing.

Shapes: B pairs in the batch, M width of an embedding, R rows of a similarity matrix, Q queries
and as many targets, N ids of an example.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# One modality, or several by name. The first dimension is the batch.
Batch = Tensor | dict[str, Tensor]


# ---- the loss ------------------------------------------------------------------------------------


def chance_loss(B: int) -> float:
    """Return ln B in nats: the loss of B pairs when all similarities are equal.

    An untrained model assigns probability 1/B to each of the B candidates, so training starts near
    this value and must fall below it.
    """
    return math.log(B)


def are_duplicates(ids: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
    """Return which examples share an id with which: ids (B,) or (B, N) -> (R, B), R of `rows`.

    With several ids an example, (B, N), those in one column are compared with each other. Every
    example is a duplicate of itself.
    """
    columns = ids[:, None] if ids.dim() == 1 else ids  # (B, N)
    return (columns[rows, None] == columns).any(dim=-1)


def contrastive_loss_reference(
    a: Tensor, b: Tensor, scale: Tensor | float, ids: Tensor | None = None
) -> Tensor:
    """Compute the equations above with two loops: a, b (B, M), ids (B,) or (B, N) -> ().

    This is the specification of `contrastive_loss`.
    """

    def is_negative(i: int, j: int) -> bool:
        return i != j and (ids is None or bool((ids[i] != ids[j]).all()))

    B, total = len(a), 0
    for left, right in ((a, b), (b, a)):
        for i in range(B):
            # Candidate i itself always counts; duplicates of i do not.
            candidates = [j for j in range(B) if j == i or is_negative(i, j)]
            scores = torch.stack([scale * (left[i] @ right[j]) for j in candidates])
            total = total + scores.logsumexp(dim=0) - scale * (left[i] @ right[i])
    return total / (2 * B)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    ids: Tensor | None = None,
    rows: slice = slice(None),
    negative_weight: float = 1.0,
    present: Tensor | None = None,
) -> Tensor:
    """Compute the symmetric contrastive loss of unit-length embeddings a, b (B, M) -> (), in nats.

    `scale` is 1 / temperature: a number, or a tensor () that may require a gradient. Examples that
    share an id, ids (B,) or (B, N), are not negatives of each other (see `are_duplicates`). `rows`
    restricts the mean to these examples, each compared with the whole batch (see `local_rows`).
    `negative_weight` counts each negative that many times: (n - 1) / (B - 1) estimates the loss of
    a batch of n from B examples. The loss is computed in at least fp32, also under autocast: bf16
    resolves similarities near 1 only to 1/256, and the scale multiplies that error. `present` (B,)
    bool leaves the other examples out (see `loss_of_present`).

    Unrelated embeddings give about `chance_loss(B)`; random directions add scale^2 / (2 M). The
    loss never reaches 0: its minimum over unit-length vectors is

        ln(1 + (B - 1) exp(-scale B / (B - 1)))

    which is 0.0024 for B = 64 at a scale of 10. The scale is learnt because a larger one lowers
    this minimum. Raises ValueError if the shapes of a and b differ.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"embeddings of shape {tuple(a.shape)} and {tuple(b.shape)}: the shapes must be equal, "
            "with matching embeddings in the same row"
        )
    if present is not None:
        return loss_of_present(a, b, scale, ids, rows, negative_weight, present)
    a, b = promote_dtype(a, b)
    columns = torch.arange(len(a), device=a.device)  # (B,)
    targets = columns[rows]  # (R,): the column of each row's match
    total = 0
    with torch.autocast(a.device.type, enabled=False):
        # With all rows, the logits of b -> a are those of a -> b, transposed.
        for left, right in ((a, b), (b, a)):
            logits = scale * (left[rows] @ right.T)  # (R, B)
            others = targets[:, None] != columns  # (R, B): all but the match
            if ids is not None:
                duplicates = are_duplicates(ids, rows) & others  # (R, B)
                logits = logits.masked_fill(duplicates, float("-inf"))  # exp(-inf) = 0
            if negative_weight != 1:
                logits = torch.where(others, logits + math.log(negative_weight), logits)
            total = total + F.cross_entropy(logits, targets)
    return total / 2


def loss_of_present(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    ids: Tensor | None,
    rows: slice,
    negative_weight: float,
    present: Tensor,
) -> Tensor:
    """Compute the contrastive loss of the examples that are present, (B,) bool: the mean over them.

    The arguments are those of `contrastive_loss`. The mean over equal parts of the rows, such as
    those of several processes, is the mean over all present examples. It is 0, with a gradient of
    0, if `rows` has no present example, or there are fewer than two.
    """
    present_rows, factor = rows_of_present(present, rows)
    if factor == 0:
        return 0 * (a.sum() + b.sum() + scale)
    loss = contrastive_loss(
        a[present],
        b[present],
        scale,
        None if ids is None else ids[present],
        present_rows,
        negative_weight,
    )
    return loss * factor


def rows_of_present(present: Tensor, rows: slice) -> tuple[slice, float]:
    """Return which of the present examples, (B,) bool, are in `rows`, and the factor of their mean.

    Of R `rows` with r present examples among P, the mean over the r is multiplied by r / P * B / R:
    then the mean over equal parts of the rows is the mean over the P. The factor is 0 if r = 0, or
    if P < 2 and there is nothing to compare.
    """
    start, stop, _ = rows.indices(len(present))
    before, r, P = (int(present[part].sum()) for part in (slice(start), rows, slice(None)))
    if P < 2 or r == 0:
        return slice(0), 0.0
    return slice(before, before + r), r / P * len(present) / (stop - start)


def promote_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both tensors to fp64 if either is fp64, else to fp32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


class Temperature(nn.Module):
    """Learn the scale 1 / temperature through its logarithm, with an upper limit, as CLIP does.

    The forward pass clamps the *parameter*. Clamping only the value would give gradient 0 above the
    limit, so a scale that one step carried over the limit would stay there. CLIP clamps after each
    optimizer step, which is equivalent, but every training loop would have to remember it.
    """

    def __init__(self, init: float = 0.1, max_scale: float = 100.0) -> None:
        """Start at temperature `init`. Raises ValueError unless 1 / init is at most `max_scale`."""
        super().__init__()
        if not init * max_scale >= 1:
            raise ValueError(
                f"temperature {init} must be at least {1 / max_scale}: "
                f"the scale, 1 / temperature, is limited to {max_scale}"
            )
        self.max_log_scale = math.log(max_scale)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(init)))

    def forward(self) -> Tensor:
        """Return the scale (), in the parameter's dtype."""
        with torch.no_grad():
            self.log_scale.clamp_(max=self.max_log_scale)
        return self.log_scale.exp()


def all_pairs_loss(
    embeddings: dict[str, Tensor],
    scale: Tensor | float,
    pairs: dict[tuple[str, str], float],
    ids: Tensor | None = None,
    rows: slice = slice(None),
    negative_weight: float = 1.0,
    present: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted mean of the contrastive losses of several pairs of modalities.

    embeddings: (B, M) by modality; pairs: a weight for each pair of modalities; the other arguments
    as in `contrastive_loss`; present: (B,) bool by modality, a pair has the examples with both.
    Returns the mean () and each pair's loss by name ("text-image"), detached. One common space can
    emerge as long as the pairs connect all modalities, even if two of them are never compared
    (ImageBind: Girdhar et al. 2023, arXiv:2305.05665). Raises ValueError if a pair names a missing
    modality, if a weight is negative, or if no weight is positive.
    """
    for pair in pairs:
        for name in pair:
            if name not in embeddings:
                available = ", ".join(embeddings) or "none"
                raise ValueError(
                    f"a pair names modality {name!r}, which has no embeddings; "
                    f"there are {available}"
                )
    total_weight = sum(pairs.values())
    if not (total_weight > 0 and all(weight >= 0 for weight in pairs.values())):
        raise ValueError(f"weights {pairs}: none may be below 0, and at least one must be above")
    losses = {}
    for first, second in pairs:
        both = None if present is None else present[first] & present[second]
        losses[first, second] = contrastive_loss(
            embeddings[first], embeddings[second], scale, ids, rows, negative_weight, both
        )
    total = sum(pairs[pair] * loss for pair, loss in losses.items()) / total_weight
    return total, {"-".join(pair): loss.detach() for pair, loss in losses.items()}


# ---- one batch over several processes ------------------------------------------------------------
# Each process encodes its n local examples and compares them with the embeddings of all processes.
# This gives the gradients of a single process:
#
#     gathered = {name: gather_with_gradient(e) for name, e in embeddings.items()}   (ids as well)
#     all_pairs_loss(gathered, scale, pairs, ids, rows=local_rows(n))[0].backward()
#
# followed by the mean of all gradients over the processes, the temperature's included, as
# DistributedDataParallel computes it. Process r's loss L_r is the mean over its own rows, so the
# mean of the L_r is L. Each embedding is a candidate in the losses of all processes: the backward
# pass of the gather sums these gradients, and the mean divides by the number of processes. Without
# `rows` each process computes the loss of all rows. The gradients are the same, at world_size()
# times the arithmetic.


def world_size() -> int:
    """Return the number of processes in the default group, 1 if there is no group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rows(n: int) -> slice:
    """Return the rows of this process's n examples in the gathered batch."""
    start = n * dist.get_rank() if world_size() > 1 else 0
    return slice(start, start + n)


class AllGather(torch.autograd.Function):
    """Concatenate the rows of all processes; backward sums the gradients over the processes."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        # all_reduce works in place, and autograd may pass the same tensor to other nodes: copy it.
        g = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        return g.chunk(world_size())[dist.get_rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Gather x (n, ...) from all processes -> (n * world_size, ...), ordered by rank.

    Returns x itself if there is no process group, or a group of one. Every process must call this
    function and its backward with the same shape; if one does not, the others wait for it.
    """
    return AllGather.apply(x) if world_size() > 1 else x


# ---- gradient caching: one batch in micro-batches ------------------------------------------------
# The loss needs the embeddings of the whole batch at once. These are small; the activations behind
# them are large. Gradient caching keeps the activations of one micro-batch at a time:
#
#     1. embed all micro-batches without a graph
#     2. compute the loss and its gradients with respect to the embeddings    embedding_gradients
#     3. embed each micro-batch again with a graph, and backpropagate
#        sum(embedding * gradient), whose gradient is that of the loss        surrogate_loss
#
# By the chain rule this gives the gradients of the whole batch, for one more forward pass.


def embedding_gradients(
    loss_fn: Callable[[dict[str, Tensor], Tensor], Tensor],
    embeddings: dict[str, Tensor],
    scale: Tensor,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Differentiate a loss with respect to the embeddings and the scale, and no further.

    Computes `loss_fn(embeddings, scale)` -> () on detached copies of `embeddings`, (B, M) by
    modality, and of `scale` (). Returns the loss (), detached; its gradients with respect to the
    embeddings, (B, M) by modality, without those that the loss does not use; and its gradient with
    respect to the scale (), zero if the loss does not use it. Parameters receive no gradient here:
    `surrogate_loss` passes the gradients on to the encoder.
    """
    leaves = {name: e.detach().requires_grad_() for name, e in embeddings.items()}
    scale_leaf = scale.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(leaves, scale_leaf)
    *gradients, scale_gradient = torch.autograd.grad(
        loss, [*leaves.values(), scale_leaf], allow_unused=True
    )
    used = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    if scale_gradient is None:
        scale_gradient = torch.zeros_like(scale_leaf)
    return loss.detach(), used, scale_gradient


def surrogate_loss(embeddings: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    """Return a scalar whose gradient with respect to each embedding is the given gradient.

    embeddings, gradients: (n, M) by modality, for one micro-batch. The value is
    sum(embedding * gradient) with `gradients` constant, so its backward() gives the encoder the
    gradients of the loss of the whole batch. The value itself has no meaning. Modalities without a
    gradient are left out. For the temperature, add `scale * scale_gradient` to the surrogate of one
    micro-batch of the batch.
    """
    return sum((embeddings[name] * gradient).sum() for name, gradient in gradients.items())


def cached_gradients(
    encode: Callable[[Batch], Batch | tuple[Batch, Tensor]],
    inputs: Batch,
    loss: Callable[[Batch, Tensor], Tensor],
    size: int,
    scale: Tensor,
) -> Tensor:
    """Do what `loss(encode(inputs), scale).backward()` does, in micro-batches of `size` examples.

    `encode` maps a micro-batch of `inputs` to embeddings, row by row; both are a tensor, or tensors
    by modality with equally many rows. It is called twice for each micro-batch and must return the
    same embeddings both times: *no dropout* (dropout would need the random state restored on every
    device). It may also return (embeddings, extra loss ()), such as MoE's balance loss; the mean of
    the extra loss over the micro-batches is added. `scale` () is the loss's 1 / temperature, with
    its graph: the output of the module `Temperature`.

    Adds to .grad as backward() does, and returns the loss (), detached. Under
    DistributedDataParallel pass the bare model and average the gradients afterwards: DDP's hooks
    would average after each micro-batch. Raises ValueError if `inputs` differ in length.
    """
    batches = split_batch(inputs, size)
    with torch.no_grad():
        encoded = [unpack_encoded(encode(batch))[0] for batch in batches]
    embeddings = concatenate(encoded)

    def loss_fn(by_name: dict[str, Tensor], scale: Tensor) -> Tensor:
        return loss(by_name if isinstance(embeddings, dict) else by_name[""], scale)

    total, gradients, scale_gradient = embedding_gradients(loss_fn, as_dict(embeddings), scale)
    for i, batch in enumerate(batches):
        rows = slice(i * size, (i + 1) * size)
        local_embeddings, extra_loss = unpack_encoded(encode(batch))
        local_gradients = {name: gradient[rows] for name, gradient in gradients.items()}
        surrogate = surrogate_loss(as_dict(local_embeddings), local_gradients)
        if i == 0:
            surrogate = surrogate + scale * scale_gradient
        if extra_loss is not None:
            surrogate = surrogate + extra_loss * (1 / len(batches))
            total = total + extra_loss.detach() / len(batches)
        if surrogate.requires_grad:  # not if the encoder is frozen
            surrogate.backward()
    return total


def unpack_encoded(encoded: Batch | tuple[Batch, Tensor]) -> tuple[Batch, Tensor | None]:
    """Return the embeddings and the extra loss, None if the encoder returned none."""
    return encoded if isinstance(encoded, tuple) else (encoded, None)


def as_dict(x: Batch) -> dict[str, Tensor]:
    """Return tensors by modality; a single tensor gets the name ""."""
    return x if isinstance(x, dict) else {"": x}


def split_batch(x: Batch, size: int) -> list[Batch]:
    """Split a batch into micro-batches of at most `size` examples, all modalities alike.

    Raises ValueError if the modalities differ in length, or if `size` is below 1.
    """
    lengths = {name: len(tensor) for name, tensor in as_dict(x).items()}
    if len(set(lengths.values())) != 1 or size < 1:
        raise ValueError(
            f"cannot split {lengths} examples into pieces of {size}: a piece holds at least 1 "
            "example, and all modalities must have equally many"
        )
    if isinstance(x, Tensor):
        return list(x.split(size))
    split = [tensor.split(size) for tensor in x.values()]
    return [dict(zip(x, parts, strict=True)) for parts in zip(*split, strict=True)]


def concatenate(batches: list[Batch]) -> Batch:
    """Concatenate micro-batches: the inverse of `split_batch`."""
    if isinstance(batches[0], Tensor):
        return torch.cat(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


# ---- retrieval -----------------------------------------------------------------------------------

MAX_SCORES = 1 << 20  # similarities that `ranks` holds in memory at once


@torch.no_grad()
def ranks(queries: Tensor, targets: Tensor, ids: Tensor | None = None) -> Tensor:
    """Count the wrong targets that score at least as high as the best right one, for each query.

    queries, targets: (Q, M). The right targets of query i are target i and its duplicates, which
    share an id with it, ids (Q,) or (Q, N). Returns (Q,), int64; 0 is best. Ties count against the
    model, and so do differences within rounding error: embeddings that have collapsed to one point
    get the worst rank, Q - 1 without duplicates, where counting only higher scores would call them
    perfect. NaN counts against the model too: a query with a right target whose score is NaN gets
    Q. Raises ValueError if the shapes differ.
    """
    if queries.shape != targets.shape:
        raise ValueError(
            f"{tuple(queries.shape)} queries, {tuple(targets.shape)} targets: the shapes must be "
            "equal, since target i is the true one of query i"
        )
    queries, targets = promote_dtype(queries, targets)
    Q, M = queries.shape
    columns = torch.arange(Q, device=queries.device)
    ids = columns if ids is None else ids
    counts = []
    with torch.autocast(queries.device.type, enabled=False):
        for rows in columns.split(max(1, MAX_SCORES // max(1, Q))):
            scores = queries[rows] @ targets.T  # (R, Q)
            right = are_duplicates(ids, rows)  # (R, Q)
            right_scores = scores.masked_fill(~right, float("-inf"))
            best_score, best = right_scores.max(dim=1, keepdim=True)  # (R, 1); NaN is the maximum
            magnitude = (queries[rows] * targets[best[:, 0]]).abs().sum(dim=-1, keepdim=True)
            rounding = M * torch.finfo(scores.dtype).eps * magnitude  # (R, 1)
            # "Not lower" rather than "higher or equal": NaN is neither, and must count.
            not_lower = ~(scores < best_score - rounding)
            count = (not_lower & ~right).sum(dim=-1)
            counts.append(count.masked_fill(best_score[:, 0].isnan(), Q))
    return torch.cat(counts)


def recall_at_k(queries: Tensor, targets: Tensor, k: int, ids: Tensor | None = None) -> float:
    """Return the fraction of queries with a right target among their k best, 0 to 1.

    Chance is k / Q without duplicates. The arguments are those of `ranks`. Raises ValueError if
    k < 1.
    """
    if k < 1:
        raise ValueError(f"recall at {k}: k must be at least 1")
    hits = ranks(queries, targets, ids) < min(k, len(queries))
    return hits.sum().item() / len(hits)


def median_rank(queries: Tensor, targets: Tensor, ids: Tensor | None = None) -> float:
    """Return the median rank of the best right target, counted from 1 (best).

    Chance is (Q + 1) / 2 without duplicates.
    """
    return (ranks(queries, targets, ids) + 1).float().quantile(0.5).item()


@torch.no_grad()
def nearest_class(queries: Tensor, classes: Tensor) -> Tensor:
    """Return the class with the highest score: queries (Q, M), classes (C, M) -> (Q,), int64.

    If the classes are embeddings of captions such as "cat" and "dog", this is zero-shot
    classification (CLIP, section 3.1). A query with a NaN score gets -1.
    """
    queries, classes = promote_dtype(queries, classes)
    with torch.autocast(queries.device.type, enabled=False):
        scores, best = (queries @ classes.T).max(dim=-1)  # NaN is the maximum
    return best.masked_fill(scores.isnan(), -1)
