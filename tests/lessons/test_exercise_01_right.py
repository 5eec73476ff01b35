"""The grader of lesson 01 accepts every correct answer, whatever method it uses."""

from pathlib import Path

import grade
import pytest
import steps_01
import torch
import torch.nn.functional as F

solutions = grade.load_file(Path(steps_01.__file__).with_name("01_solutions.py"))


def dense_by_loop(q, k, v):
    output = torch.zeros_like(v)
    for t in range(q.size(2)):
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, : t + 1]) / q.size(-1) ** 0.5
        output[:, :, t] = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, : t + 1])
    return output


def topk_by_gather(q, k, v, top_k):
    scores = solutions.causal_scores(q, k).clamp(min=-1e9)
    best, index = scores.topk(min(top_k, k.size(2)), dim=-1)  # (B, H, T, K)
    v_of_query = v[:, :, None].expand(-1, -1, q.size(2), -1, -1)  # (B, H, T, T, D)
    rows = v_of_query.gather(3, index[..., None].expand(*index.shape, v.size(-1)))
    return (best.softmax(-1)[..., None] * rows).sum(3)


def pool_by_count(k, block_size):
    def total(x):
        return F.pad(x, (0, 0, 0, -k.size(2) % block_size)).unflatten(2, (-1, block_size)).sum(3)

    return total(k) / total(torch.ones_like(k))


def select_by_sorting(q, k, block_size, top_blocks):
    means = pool_by_count(k, block_size)
    output = torch.full((*q.shape[:3], top_blocks), -1, dtype=torch.int32)
    for b, h, t in torch.ones(q.shape[:3]).nonzero().tolist():
        past_blocks = range(t // block_size)
        order = sorted(past_blocks, key=lambda n: -float(means[b, h, n] @ q[b, h, t]))[:top_blocks]
        output[b, h, t, : len(order)] = torch.tensor(order)
    return output


def block_attention_by_loop(q, k, v, blocks, block_size):
    output = torch.zeros_like(v)
    for b, h, t in torch.ones(q.shape[:3]).nonzero().tolist():
        attended = {*blocks[b, h, t].tolist(), t // block_size}
        keys = [s for s in range(t + 1) if s // block_size in attended]
        weights = (k[b, h, keys] @ q[b, h, t] / q.size(-1) ** 0.5).softmax(0)
        output[b, h, t] = weights @ v[b, h, keys]
    return output


def first_rows(q, k, block_size, top_blocks):
    return select_by_sorting(q, k, block_size, top_blocks)[:, :, ::block_size]


def dense_by_einsum(q, k, v):
    scores = torch.einsum("bhtd,bhsd->bhst", q / q.size(-1) ** 0.5, k).transpose(2, 3)  # a view
    scores = scores + torch.full(scores.shape[2:], -torch.inf, dtype=q.dtype).triu(1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdim=True), v)


def select_by_sums(q, k, block_size, top_blocks):
    # Past blocks are full, so sums rank as means do. The result is int32.
    full = k[:, :, : k.size(2) // block_size * block_size].unflatten(2, (-1, block_size)).sum(3)
    scores = F.pad(q @ full.mT, (0, top_blocks + 1), value=-torch.inf)
    current = torch.arange(q.size(2))[:, None] // block_size
    scores = scores.masked_fill(torch.arange(scores.size(-1)) >= current, -torch.inf)
    best, blocks = scores.sort(dim=-1, descending=True)
    return torch.where(best > -torch.inf, blocks, -1)[..., :top_blocks].int()


def dense_by_online_softmax(q, k, v):
    m, total, out = torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)[..., None], 0, 0
    for s in range(k.size(2)):  # one key at a time, as FlashAttention does by blocks
        score = (q * k[:, :, s, None]).sum(-1, keepdim=True) / q.size(-1) ** 0.5
        visible = torch.arange(q.size(2))[:, None] >= s
        new = torch.where(visible, torch.maximum(m, score), m)
        weight = torch.where(visible, (score - new).exp(), 0.0)
        rescale = torch.where(m == -torch.inf, 0.0, (m - new).exp())
        total, out, m = total * rescale + weight, out * rescale + weight * v[:, :, s, None], new
    return out / total


def dense_by_heads(q, k, v):
    def one(q, k, v):
        bias = torch.zeros(len(q), len(q), dtype=q.dtype).masked_fill(
            torch.ones(len(q), len(q)).triu(1) > 0, torch.finfo(q.dtype).min
        )
        return torch.addmm(bias, q, k.T, alpha=q.size(-1) ** -0.5).softmax(1) @ v

    flat = zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True)
    return torch.stack([one(*head) for head in flat]).view_as(v)


def dense_by_log_softmax(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # views: (B, T, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.size(-1) ** -0.5
    scores = scores.where(torch.ones(scores.shape[2:]).tril() > 0, -torch.inf)
    return torch.einsum("bhts,bshd->bhtd", scores.log_softmax(-1).exp(), v)


def topk_by_rank(q, k, v, top_k):
    scores = solutions.causal_scores(q, k)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return scores.masked_fill(rank >= top_k, -torch.inf).softmax(-1) @ v


def topk_by_threshold(q, k, v, top_k):
    scores = solutions.causal_scores(q, k)
    kth = scores.sort(-1, descending=True).values[..., min(top_k, k.size(2)) - 1, None]
    return torch.where(scores >= kth, scores, -torch.inf).softmax(-1) @ v


def topk_by_loop(q, k, v, top_k):
    out = []
    for t in range(q.size(2)):
        scores = (k[:, :, : t + 1] @ q[:, :, t, :, None])[..., 0] / q.size(-1) ** 0.5
        best, index = scores.topk(min(top_k, t + 1))
        rows = v.gather(2, index[..., None].expand(*index.shape, v.size(-1)))
        out.append(torch.einsum("bhk,bhkd->bhd", best.softmax(-1), rows))
    return torch.stack(out, dim=2)


def topk_by_one_hot(q, k, v, top_k):
    scores = solutions.causal_scores(q, k)
    best = scores.detach().topk(min(top_k, k.size(2))).indices
    selected = F.one_hot(best, k.size(2)).sum(-2) > 0
    return (scores + torch.where(selected, 0.0, -torch.inf).to(q.dtype)).softmax(-1) @ v


def pool_by_matrix(k, block_size):
    T = k.size(2)
    member = torch.arange(T) // block_size == torch.arange(-(-T // block_size))[:, None]
    member = member.to(k.dtype)
    return torch.einsum("nt,bhtd->bhnd", member / member.sum(1, keepdim=True), k)


def pool_by_cumsum(k, block_size):
    T = k.size(2)
    total = F.pad(k.cumsum(2), (0, 0, 1, 0))
    ends = torch.arange(0, T + block_size, block_size).clamp(max=T).unique()
    return total[:, :, ends].diff(dim=2) / ends.diff().to(k.dtype)[:, None]


def pool_by_index_add(k, block_size):
    block = torch.arange(k.size(2)) // block_size
    sums = k.new_zeros(*k.shape[:2], int(block[-1]) + 1, k.size(3)).index_add(2, block, k)
    return sums / block.bincount().to(k.dtype)[:, None]


def pool_by_avg_pool(k, block_size):
    pooled = F.avg_pool1d(k.flatten(0, 1).mT, min(block_size, k.size(2)), ceil_mode=True)
    return pooled.mT.unflatten(0, k.shape[:2])


def pool_by_comprehension(k, block_size):
    starts = range(0, k.size(2), block_size)
    means = [k[:, :, s : s + block_size].sum(2, keepdim=True) for s in starts]
    sizes = [min(block_size, k.size(2) - s) for s in starts]
    return torch.cat([mean / size for mean, size in zip(means, sizes, strict=True)], dim=2)


def select_by_mean_score(q, k, block_size, top_blocks):
    """The mean of q . k over a block is q . mean."""
    scores = torch.einsum("bhtd,bhsd->bhts", q, k).split(block_size, dim=-1)
    scores = torch.stack([part.mean(-1) for part in scores], dim=-1)
    return choose(scores, block_size, top_blocks)


def choose(scores, block_size, top_blocks):
    rows = torch.full((*scores.shape[:3], top_blocks), -1)
    for t in range(scores.size(2)):
        past = t // block_size
        best = scores[:, :, t, :past].argsort(-1, descending=True)[..., :top_blocks]
        rows[:, :, t, : best.size(-1)] = best
    return rows


def select_by_views(q, k, block_size, top_blocks):
    scores = (pool_by_cumsum(k, block_size) @ q.mT).mT  # a view
    return choose(scores, block_size, top_blocks).to(torch.int16)


def select_by_lowest_float(q, k, block_size, top_blocks):
    scores = q.float() @ pool_by_matrix(k, block_size).mT.float()
    scores = F.pad(scores, (0, top_blocks))  # more columns than any row needs
    hidden = torch.arange(scores.size(-1)) >= torch.arange(q.size(2))[:, None] // block_size
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    best, blocks = scores.topk(top_blocks, dim=-1)
    return torch.where(best > torch.finfo(scores.dtype).min, blocks, -1)


def block_attention_by_scatter(q, k, v, blocks, block_size):
    T, N = q.size(2), -(-q.size(2) // block_size)
    listed = torch.cat(
        [blocks, (torch.arange(T) // block_size).expand(*q.shape[:3])[..., None]], -1
    )
    chosen = torch.zeros(*q.shape[:3], N + 1, dtype=torch.bool).scatter(-1, listed % (N + 1), True)
    mask = chosen[..., :N].repeat_interleave(block_size, -1)[..., :T]
    return solutions.causal_scores(q, k).where(mask, -torch.inf).softmax(-1) @ v


def block_attention_by_gather(q, k, v, blocks, block_size):
    current = (torch.arange(q.size(2)) // block_size).expand(*q.shape[:3])[..., None]
    read = torch.cat([current, blocks], -1)
    key = (read[..., None] * block_size + torch.arange(block_size)).flatten(3)  # (B, H, T, keys)
    at = torch.arange(q.size(2))[:, None]
    hidden = (key < 0) | (key > at)
    index = key.clamp(0, q.size(2) - 1)[..., None].expand(*key.shape, q.size(-1))

    def rows(x):
        return x[:, :, None].expand(-1, -1, q.size(2), -1, -1).gather(3, index)

    scores = torch.einsum("bhtd,bhtnd->bhtn", q, rows(k)) / q.size(-1) ** 0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhtn,bhtnd->bhtd", weights, rows(v))


def block_attention_by_merging(q, k, v, blocks, block_size):
    """Attend to each block on its own, and merge the results by their log-sum-exp."""
    scores, results = solutions.causal_scores(q, k), []
    current = torch.arange(q.size(2)) // block_size
    for n, (part, values) in enumerate(
        zip(scores.split(block_size, -1), v.split(block_size, 2), strict=True)
    ):
        attends = (blocks == n).any(-1) | (current == n)
        lse = part.logsumexp(-1).where(attends, -torch.inf)
        results.append((lse, part.softmax(-1).nan_to_num() @ values))
    share = torch.stack([lse for lse, _ in results], -1).softmax(-1)  # (B, H, T, N)
    return (share[..., None] * torch.stack([out for _, out in results], 3)).sum(3)


def block_attention_by_comprehension(q, k, v, blocks, block_size):
    block_of = torch.arange(q.size(2)) // block_size
    columns = [blocks[..., i, None] == block_of for i in range(blocks.size(-1))]
    mask = sum(columns, block_of[:, None] == block_of) > 0
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return (solutions.causal_scores(q, k) + bias).softmax(-1) @ v


def tile_by_loop(q, k, block_size, top_blocks):
    rows = []
    for n in range(-(-q.size(2) // block_size)):
        first = n * block_size
        scores = (pool_by_count(k[:, :, :first], block_size) @ q[:, :, first, :, None])[..., 0]
        best = scores.argsort(-1, descending=True)[..., :top_blocks]
        rows.append(F.pad(best, (0, top_blocks - best.size(-1)), value=-1))
    return torch.stack(rows, 2)


def tile_by_slicing(q, k, block_size, top_blocks):
    return solutions.select_blocks(q, k, block_size, top_blocks)[:, :, ::block_size].int()


def tile_by_split(q, k, block_size, top_blocks):
    first = torch.cat([part[:, :, :1] for part in q.split(block_size, 2)], 2)
    scores = torch.einsum("bhnd,bhmd->bhnm", first, pool_by_matrix(k, block_size))
    return choose(scores, 1, top_blocks)


def tile_by_views(q, k, block_size, top_blocks):
    first = F.pad(q, (0, 0, 0, -q.size(2) % block_size)).unflatten(2, (-1, block_size))[..., 0, :]
    scores = (pool_by_count(k, block_size) @ first.mT).mT
    return choose(scores, 1, top_blocks)


ANSWERS = {
    "dense_attention": [
        dense_by_loop,
        dense_by_einsum,
        dense_by_online_softmax,
        dense_by_heads,
        dense_by_log_softmax,
    ],
    "topk_attention": [
        topk_by_gather,
        topk_by_rank,
        topk_by_threshold,
        topk_by_loop,
        topk_by_one_hot,
    ],
    "pool_blocks": [
        pool_by_count,
        pool_by_matrix,
        pool_by_cumsum,
        pool_by_index_add,
        pool_by_avg_pool,
        pool_by_comprehension,
    ],
    "select_blocks": [
        select_by_sorting,
        select_by_sums,
        select_by_mean_score,
        select_by_views,
        select_by_lowest_float,
    ],
    "block_attention": [
        block_attention_by_loop,
        block_attention_by_scatter,
        block_attention_by_gather,
        block_attention_by_merging,
        block_attention_by_comprehension,
    ],
    "select_for_tile": [first_rows, tile_by_loop, tile_by_slicing, tile_by_split, tile_by_views],
}
CASES = [(name, answer) for name, answers in ANSWERS.items() for answer in answers]


def grade_answer(step, function):
    return grade.grade_step(step, function, Path(__file__))


@pytest.mark.parametrize(("name", "function"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_correct_answers_by_other_methods_pass(name, function):
    step = next(step for step in steps_01.STEPS if step.name == name)
    assert grade_answer(step, function).message == "OK"


def test_each_step_has_several_methods():
    assert [step.name for step in steps_01.STEPS] == list(ANSWERS)
    assert min(map(len, ANSWERS.values())) >= 5


SPOIL = [torch.squeeze, torch.Tensor.tolist, torch.flatten, torch.sum, lambda x: x[0]]


@pytest.mark.parametrize("step", steps_01.STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("spoil", SPOIL)
def test_a_wrong_shape_is_reported_as_a_mistake_and_does_not_crash_the_grader(step, spoil):
    result = grade_answer(step, lambda *arguments: spoil(getattr(solutions, step.name)(*arguments)))
    assert result.verdict == "wrong"
    assert "shape" in result.message or "not a tensor" in result.message
