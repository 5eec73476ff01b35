"""train.py with experts: what it logs, the warm start, the alarm, and the mistakes it refuses."""

import json
import math

import pytest
import torch

from nanods.training import checkpoint


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_losses_are_logged_separately_and_validation_is_pure_cross_entropy(train_tiny, workspace):
    flags = (
        "--moe.balance-coefficient",
        0.5,
        "--moe.z-coefficient",
        0.25,
        "--steps",
        3,
        "--eval-every",
        3,
    )
    code, _, err = train_tiny("v2-tiny", *flags, "--dtype", "fp64")
    assert code == 0, err
    for row in rows_of(workspace / "runs/v2-tiny"):
        total = row["ce_loss"] + 0.5 * row["balance_loss"] + 0.25 * row["z_loss"]
        assert row["train_loss"] == pytest.approx(total, rel=1e-9)
        load = torch.tensor(row["load"], dtype=torch.float64)  # (L, E)
        assert (
            load.sum(dim=1).tolist() == [4 * 32 * 2] * 2
        )  # B x T x K assignments in each of two layers
        share = load / load.sum(dim=1, keepdim=True)
        assert row["load_max_over_mean"] == pytest.approx((4 * share.amax(dim=1)).mean().item())
        entropy = torch.special.entr(share).sum(dim=1).mean() / math.log(4)
        assert row["load_entropy"] == pytest.approx(entropy.item()) and row["dropped"] == 0
        assert row["optimizer_seconds"] > 0
    last = rows_of(workspace / "runs/v2-tiny")[-1]
    assert last["val_loss"] == pytest.approx(
        last["val_bpb"] * math.log(2), rel=0.01
    )  # bytes: no term beside cross-entropy
    assert {len(layer) for layer in last["val_load"]} == {4} and last["val_load_max_over_mean"] >= 1


def test_capacity_drops_in_training_and_never_in_validation(train_tiny, workspace):
    """With lr near 0 two runs have the same weights: their validation agrees although one dropped
    half of its assignments."""
    for name, flags in (("limited", ("--moe.capacity-factor", 0.5)), ("free", ())):
        code, _, err = train_tiny(
            "v2-tiny", *flags, "--steps", 2, "--lr", 1e-12, "--expert-lr", 1e-12, "--out-dir", name
        )
        assert code == 0, err
    limited, free = (rows_of(workspace / name)[-1] for name in ("limited", "free"))
    assert limited["dropped"] >= 0.5 > 0 == free["dropped"]
    assert limited["val_loss"] == pytest.approx(free["val_loss"], abs=1e-6)


def test_the_bias_moves_once_per_step_by_the_learning_rates_share(train_tiny, workspace):
    """Whatever the micro-batches. Over 5 steps the share is 1, 0.8, 0.6, 0.4, 0.2; the sum is 3."""
    for name, size in (("whole", 4), ("parts", 1)):
        flags = (
            "--moe.bias-rate",
            0.01,
            "--moe.balance-coefficient",
            0,
            "--moe.z-coefficient",
            0,
            "--micro-batch",
            size,
        )
        code, _, err = train_tiny(
            "v2-tiny", *flags, "--steps", 5, "--dtype", "fp64", "--out-dir", name
        )
        assert code == 0, err
    whole, parts = (checkpoint.load(workspace / name).model for name in ("whole", "parts"))
    assert max((whole[k] - parts[k]).abs().max() for k in whole) < 1e-9
    for name in ("blocks.0.mlp.bias", "blocks.1.mlp.bias"):
        moves = whole[name] / (0.2 * 0.01)
        assert torch.allclose(moves, moves.round()) and 0 < moves.abs().max() <= 15.001


def test_upcycling_starts_where_the_dense_run_ended(train_tiny, workspace):
    assert train_tiny("v1-tiny", "--steps", 20, "--dtype", "fp32")[0] == 0
    ended = rows_of(workspace / "runs/v1-tiny")[-1]["val_loss"]
    for noise in (0, 0.5):
        flags = (
            "--init-from",
            "runs/v1-tiny",
            "--init-noise",
            noise,
            "--dtype",
            "fp32",
            "--out-dir",
            f"noise-{noise}",
        )
        code, out, err = train_tiny("v2-tiny", "--steps", 2, *flags)
        assert code == 0, err
        assert "each MLP copied to 4 experts" in out and "before the first step" in out
        first = rows_of(workspace / f"noise-{noise}")[0]
        assert first["step"] == 0
        assert (abs(first["val_loss"] - ended) <= 1e-6) == (noise == 0)


def test_a_run_starts_from_another_of_the_same_architecture(train_tiny, workspace):
    for preset in ("v1-tiny", "v2-tiny"):
        assert train_tiny(preset, "--steps", 5, "--dtype", "fp32")[0] == 0
        ended = rows_of(workspace / "runs" / preset)[-1]["val_loss"]
        flags = (
            "--steps",
            2,
            "--dtype",
            "fp32",
            "--init-from",
            f"runs/{preset}",
            "--out-dir",
            f"more-{preset}",
        )
        code, out, err = train_tiny(preset, *flags)
        assert code == 0 and "copied" not in out and "notice" not in out, err
        assert abs(rows_of(workspace / f"more-{preset}")[0]["val_loss"] - ended) <= 1e-6
    changed = ("--moe.scores", "sigmoid", "--moe.bias-rate", 0.01, "--attention.top-blocks", 1)
    start = ("--steps", 1, "--init-from", "runs/v2-tiny", "--out-dir", "changed")
    code, out, err = train_tiny("v2-tiny", *start, *changed)
    assert code == 0, err
    for words in (
        "notice     that run had attention.top-blocks 2 (now 1)",
        "moe.scores softmax (now sigmoid)",
        "moe.bias-rate 0.0 (now 0.01): the same weights give other outputs now",
    ):
        assert words in out


def test_a_router_that_starves_experts_raises_an_alarm(train_tiny, workspace, monkeypatch):
    from nanods import moe

    select_experts = moe.select_experts

    def to_two(logits, *rest):
        return select_experts(logits + torch.tensor([9.0, 9.0, 0, 0]), *rest)

    monkeypatch.setattr(moe, "select_experts", to_two)
    code, _, err = train_tiny("v2-tiny", "--steps", 30)
    assert code == 0 and err.count("expert 3 starves") == 2, (
        err
    )  # reported once for each of two layers
    rows = rows_of(workspace / "runs/v2-tiny")
    assert all(("alarm" in row) == (row["step"] >= 20) for row in rows)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--moe.top-k", 5), "top_k = 5 must lie between 1 and n_expert = 4"),
        (("--moe.n-expert", 0), "n_expert = 0 must be at least 1"),
        (("--moe.top-k", 1), "--moe.no-normalise"),
        (("--moe.capacity-factor", 0), "capacity_factor = 0.0 must be above 0"),
        (("--moe.capacity-factor", "nan"), "must be above 0"),
        (("--moe.z-coefficient", -1), "must be at least 0"),
        (("--moe.bias-rate", "nan"), "must be at least 0"),
        (("--expert-every", 0), "must be at least 1"),
        (("--expert-lr", -1), "must be above 0"),
        (("--init-from", "nowhere"), "no checkpoint in nowhere"),
        (("--init-from", "dense", "--n-embd", 32), "--n-embd 16 (asked for: 32)"),
        (("--init-from", "dense", "--hidden-ratio", 2), "--hidden-ratio 4 (asked for: 2)"),
        (("--init-from", "dense", "--moe.no-normalise"), "drop --moe.no-normalise"),
        (("--init-from", "experts"), "--moe.n-expert 3"),
    ],
)
def test_impossible_settings_are_refused_with_a_fix(train_tiny, workspace, flags, words):
    if "dense" in flags:
        assert train_tiny("v1-tiny", "--steps", 1, "--out-dir", "dense")[0] == 0
    if "experts" in flags:
        assert (
            train_tiny("v2-tiny", "--steps", 1, "--moe.n-expert", 3, "--out-dir", "experts")[0] == 0
        )
    code, _, err = train_tiny("v2-tiny", "--steps", 2, *flags)
    assert code == 2 and words in " ".join(err.split()) and "Traceback" not in err, err
    assert not (workspace / "runs").exists()
