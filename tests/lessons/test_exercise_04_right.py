"""The grader of lesson 04 accepts every correct implementation.

Loops, other rings, masks and sums by hand pass too.
"""

import probe_scaling
import pytest
import steps_04
import torch

from tests.lessons.wrong_answers import equal_pairs, grade_answer


def ring_by_loops(n):
    schedule = torch.zeros(2 * (n - 1), n, dtype=torch.int32)
    for s in range(2 * (n - 1)):
        for r in range(n):
            # Process r ends the adding steps with chunk r, as in MPI's reduce-scatter.
            schedule[s, r] = (r - s - 1) % n
    return schedule


def ring_by_receiving(n):
    """Send the chunk that has just arrived, beginning with another permutation."""
    rows = [torch.arange(n).flip(0)]
    while len(rows) < 2 * (n - 1):
        rows.append(rows[-1].roll(1))
    return torch.stack(rows)[: 2 * (n - 1)]


def ring_by_lists(n):
    """Process r ends the adding steps with chunk r + 2."""
    steps = [[(r + 1 - s) % n for r in range(n)] for s in range(2 * (n - 1))]
    return torch.tensor(steps, dtype=torch.int16).reshape(-1, n)


def ring_as_a_view(n):
    """Read a table of all rotations backwards."""
    rotations = torch.arange(n).expand(2, n).flatten().unfold(0, n, 1)[:n]  # (n, n)
    return torch.stack([rotations[-s % n] for s in range(max(1, 2 * (n - 1)))])[: 2 * (n - 1)]


def ring_in_two_halves(n):
    """Reduce-scatter and all-gather, each with its own rule."""
    r, s = torch.arange(n), torch.arange(n - 1)[:, None]
    return torch.cat([torch.remainder(r - s, n), torch.remainder(r + 1 - s, n)])


def mlp_by_slices(x, up, out, n):
    h = len(up) // n
    outputs = torch.empty(n, len(x), x.size(1), dtype=x.dtype)
    for r in range(n):
        units = slice(r * h, (r + 1) * h)
        outputs[r] = (x @ up[units].mT).clamp(min=0) ** 2 @ out[:, units].mT
    return outputs


def mlp_by_einsum(x, up, out, n):
    """Multiply n pairs of matrices at once."""
    hidden = torch.einsum("tc,nhc->nth", x, up.unflatten(0, (n, -1))).relu() ** 2
    return torch.einsum("nth,cnh->ntc", hidden, out.unflatten(1, (n, -1)))


def mlp_by_one_product(x, up, out, n):
    """Compute all hidden units at once, which is the same amount of work."""
    hidden = (x @ up.T).relu().square().unflatten(1, (n, -1))
    return torch.bmm(hidden.transpose(0, 1), out.unflatten(1, (n, -1)).permute(1, 2, 0))


def mlp_by_masks(x, up, out, n):
    """Select hidden units by their process."""
    process = torch.arange(len(up)) * n // len(up)
    parts = [(up[process == r], out[:, process == r]) for r in range(n)]
    return torch.stack([torch.relu(x.matmul(u.t())).pow(2).matmul(o.t()) for u, o in parts])


def mlp_by_where(x, up, out, n):
    """Reshape both matrices and broadcast."""
    hidden = x @ up.view(n, -1, up.size(1)).mT  # (n, N, H/n)
    hidden = torch.where(hidden > 0, hidden * hidden, 0)
    return hidden @ out.T.reshape(n, -1, out.size(0))


def dispatch_by_loops(experts, n_expert, n):
    order, send_counts, per_process = [], [0] * n, n_expert // n
    for e in range(n_expert):
        for assignment, expert in enumerate(experts.flatten().tolist()):
            if expert == e:
                order.append(assignment)
                send_counts[e // per_process] += 1
    return torch.tensor(order, dtype=torch.long), torch.tensor(send_counts)


def dispatch_by_keys(experts, n_expert, n):
    """Sort keys that are all different, for which no stable sort is needed."""
    flat = experts.reshape(-1)
    keys = flat * max(1, len(flat)) + torch.arange(len(flat))
    owner = flat // (n_expert // n)
    send_counts = (owner[:, None] == torch.arange(n)).sum(0).int()
    return keys.argsort(), send_counts


def dispatch_by_sort(experts, n_expert, n):
    sorted_experts, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_experts, torch.arange(1, n + 1) * (n_expert // n))
    return order, ends.diff(prepend=torch.zeros(1, dtype=torch.long))


def dispatch_by_nonzero(experts, n_expert, n):
    flat = experts.ravel()
    order = torch.cat([(flat == e).nonzero()[:, 0] for e in range(n_expert)])
    owner = torch.div(flat, n_expert // n, rounding_mode="floor")
    return order, torch.zeros(n, dtype=torch.int32).index_add(0, owner, owner.int() * 0 + 1)


def dispatch_by_python(experts, n_expert, n):
    flat = experts.flatten().tolist()
    order = sorted(range(len(flat)), key=flat.__getitem__)
    counts = [sum(e * n // n_expert == r for e in flat) for r in range(n)]
    return torch.tensor(order, dtype=torch.long), torch.tensor(counts)


def gradients_by_loops(shared, experts, group):
    W = len(shared)
    mean_shared, mean_experts = torch.zeros_like(shared), torch.zeros_like(experts)
    for w in range(W):
        for other in range(W):
            mean_shared[w] += shared[other] / W
            if other % group == w % group:
                mean_experts[w] += experts[other] / W
    return mean_shared, mean_experts


def gradients_by_masks(shared, experts, group):
    W = len(shared)
    position = torch.arange(W) % group
    is_replica = (position[:, None] == position).to(experts)  # (W, W)
    return torch.ones_like(is_replica) @ shared / W, is_replica @ experts / W


def gradients_by_slices(shared, experts, group):
    sums = [experts[position::group].sum(0) for position in range(group)]
    rows = [sums[w % group] for w in range(len(experts))]
    return shared.mean(0, keepdim=True).repeat(len(shared), 1), torch.stack(rows) / len(experts)


def gradients_by_einsum(shared, experts, group):
    W = len(shared)
    replicas = experts.unflatten(0, (-1, group)) / W  # (W/G, G, X)
    summed = torch.einsum("rgx->gx", replicas)
    return torch.einsum("ws->s", shared).div(W).expand(W, -1), summed.tile(W // group, 1)


def gradients_by_index_add(shared, experts, group):
    W = len(shared)
    position = torch.arange(W) % group
    sums = torch.zeros_like(experts[:group]).index_add(0, position, experts)
    return (shared / W).sum(0).broadcast_to(shared.shape), sums[position] / W


ANSWERS = [
    ("ring_schedule", ring_by_loops),
    ("ring_schedule", ring_by_receiving),
    *(("ring_schedule", f) for f in (ring_by_lists, ring_as_a_view, ring_in_two_halves)),
    *(("tensor_parallel_mlp", f) for f in (mlp_by_masks, mlp_by_where)),
    *(("dispatch_order", f) for f in (dispatch_by_sort, dispatch_by_nonzero, dispatch_by_python)),
    *(("average_gradients", f) for f in (gradients_by_slices, gradients_by_einsum)),
    ("average_gradients", gradients_by_index_add),
    ("tensor_parallel_mlp", mlp_by_slices),
    ("tensor_parallel_mlp", mlp_by_einsum),
    ("tensor_parallel_mlp", mlp_by_one_product),
    ("dispatch_order", dispatch_by_loops),
    ("dispatch_order", dispatch_by_keys),
    ("average_gradients", gradients_by_loops),
    ("average_gradients", gradients_by_masks),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_correct_answers_pass(name, function):
    assert grade_answer(steps_04.STEPS, name, function).message == "OK"


def test_no_two_mistakes_give_the_same_result():
    """Otherwise the grader never reports one of them. Two mistakes of step 2 are equal at n = 4."""
    matrices = probe_scaling.random_matrices()
    outputs = probe_scaling.known_mistakes(*matrices, 4)
    outputs["right"] = probe_scaling.reference_partial_outputs(*matrices, 4)
    starts = [
        sorted(message.split(":")[0][:20] for message in pair)
        for pair in equal_pairs(outputs, 1e-6)
    ]
    assert starts == [["each process gets th", "every process comput"]]

    x = steps_04.random(steps_04.W, 5)
    shared = steps_04.known_shared_gradients(x)
    shared["right"] = x.sum(0).expand_as(x) / steps_04.W
    assert not equal_pairs(shared, 1e-6)

    experts = steps_04.known_expert_gradients(x)
    experts["right"] = steps_04.sum_over_replicas(x, steps_04.G) / steps_04.W
    assert not equal_pairs(experts, 1e-6)
