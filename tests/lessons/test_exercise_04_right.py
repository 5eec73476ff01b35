"""The grader of lesson 04 asks for results, not for one way to them: loops, other rings, masks and sums by hand pass."""

from itertools import combinations

import check_04
import probe_sharing
import pytest
import torch

from tests.lessons.wrong_answers import grade_answer


def ring_by_loops(n):
    table = torch.zeros(2 * (n - 1), n, dtype=torch.int32)
    for s in range(2 * (n - 1)):
        for r in range(n):
            table[s, r] = (
                r - s - 1
            ) % n  # process r ends the adding with chunk r, as MPI's reduce-scatter does
    return table


def ring_by_receiving(n):
    """Each sends what has just come: the row before, one to the right. It may begin with any permutation."""
    rows = [torch.arange(n).flip(0)]
    while len(rows) < 2 * (n - 1):
        rows.append(rows[-1].roll(1))
    return torch.stack(rows)[: 2 * (n - 1)]


def parts_by_slices(x, up, out, n):
    h = len(up) // n
    made = torch.empty(n, len(x), x.size(1), dtype=x.dtype)
    for r in range(n):
        own = slice(r * h, (r + 1) * h)
        made[r] = (x @ up[own].mT).clamp(min=0) ** 2 @ out[:, own].mT
    return made


def parts_by_einsum(x, up, out, n):
    """One product of n matrices with n others."""
    hidden = torch.einsum("tc,nhc->nth", x, up.unflatten(0, (n, -1))).relu() ** 2
    return torch.einsum("nth,cnh->ntc", hidden, out.unflatten(1, (n, -1)))


def parts_of_one_product(x, up, out, n):
    """All hidden numbers at once, which is as much work."""
    hidden = (x @ up.T).relu().square().unflatten(1, (n, -1))
    return torch.bmm(hidden.transpose(0, 1), out.unflatten(1, (n, -1)).permute(1, 2, 0))


def pack_by_loops(experts, n_expert, n):
    order, sent, here = [], [0] * n, n_expert // n
    for e in range(n_expert):
        for a, chosen in enumerate(experts.flatten().tolist()):
            if chosen == e:
                order.append(a)
                sent[e // here] += 1
    return torch.tensor(order, dtype=torch.long), torch.tensor(sent)


def pack_by_keys(experts, n_expert, n):
    """A plain sort of numbers that are all different."""
    flat = experts.reshape(-1)
    owner = flat // (n_expert // n)
    return (flat * max(1, len(flat)) + torch.arange(len(flat))).argsort(), (
        owner[:, None] == torch.arange(n)
    ).sum(0).int()


def add_up_by_loops(shared, experts, group):
    W = len(shared)
    first, second = torch.zeros_like(shared), torch.zeros_like(experts)
    for w in range(W):
        for other in range(W):
            first[w] += shared[other] / W
            if other % group == w % group:
                second[w] += experts[other] / W
    return first, second


def add_up_by_masks(shared, experts, group):
    place = torch.arange(len(shared)) % group
    twin = (place[:, None] == place).to(experts)
    return torch.ones_like(twin) @ shared / len(shared), twin @ experts / len(twin)


def used_by_loops(load, devices):
    times = []
    for group in load.tolist():
        layers = [
            [sum(row[i : i + len(row) // devices]) for i in range(0, len(row), len(row) // devices)]
            for row in group
        ]
        times.append(sum(map(max, layers)))
    return torch.tensor(load.sum().item() / (len(load) * devices * max(times)))


def used_by_means(load, devices):
    """The mean over the largest, of times that are means themselves."""
    rows = load.double().reshape(*load.shape[:2], devices, -1).mean(-1)
    return rows.mean() / (rows.max(-1).values.mean(-1)).max()


ANSWERS = [
    ("ring", ring_by_loops),
    ("ring", ring_by_receiving),
    ("in_parts", parts_by_slices),
    ("in_parts", parts_by_einsum),
    ("in_parts", parts_of_one_product),
    ("pack", pack_by_loops),
    ("pack", pack_by_keys),
    ("add_up", add_up_by_loops),
    ("add_up", add_up_by_masks),
    ("used", used_by_loops),
    ("used", used_by_means),
]


@pytest.mark.parametrize(("name", "function"), ANSWERS)
def test_other_right_answers_pass(name, function):
    assert grade_answer(check_04.STEPS, name, function).message == "OK"


def all_different(known, tolerance=1e-6):
    return [
        pair
        for pair in combinations(known, 2)
        if (known[pair[0]] - known[pair[1]]).abs().max() < tolerance
    ]


def test_no_two_mistakes_look_alike():
    """Of which one would never be told; but for two that are the same at n = 4."""
    given = probe_sharing.matrices()
    made = {why: make() for why, make in probe_sharing.known_parts(*given, 4).items()}
    same = all_different(made | {"right": probe_sharing.right_parts(*given, 4)})
    assert [sorted(why.split(":")[0][:20] for why in pair) for pair in same] == [
        ["every process comput", "the sum over the pro"]
    ]
    x = check_04.random(check_04.W, 5)
    total = x.sum(0).expand_as(x)
    shared = {why: make() for why, make in check_04.known_sums(x, total).items()}
    assert not all_different(shared | {"right": total / check_04.W})
    experts = {
        why: make()
        for why, make in check_04.known_experts(x, check_04.by_twins(x, check_04.G)).items()
    }
    assert not all_different(experts | {"right": check_04.by_twins(x, check_04.G) / check_04.W})
    load = check_04.loads()
    assert not all_different(
        check_04.known_shares(load.double(), 4) | {"right": check_04.right_share(load, 4)}, 2e-6
    )
