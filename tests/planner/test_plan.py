"""The planner: what must hold whatever the numbers, what is told to mistakes, and how little it takes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.build import build_meta_model
from nanods.config import PRESETS
from nanods.errors import UserError
from nanods.planner import search
from nanods.planner.cli import in_words, read_load
from nanods.planner.cost import MESHES, Mesh, memory_per_gpu, possible, seconds, sent
from nanods.planner.hardware import GPUS, named
from nanods.planner.memory import KINDS, Setting, counts
from nanods.planner.search import (
    cache_bytes,
    choose_mesh,
    make_job,
    option,
    overload,
    plan,
    served,
    suggest,
)

ROOT = Path(__file__).parents[2]
LOAD, _ = read_load(None)
A100 = GPUS["a100-80gb"]
FULL = PRESETS["v2-full"]
COUNTS = {
    name: counts(build_meta_model(PRESETS[name])) for name in ("v1-base", "v2-full", "v3-small")
}


def job(preset="v2-full", gpus=512, gpu="a100-80gb", **rest):
    return make_job(
        PRESETS[preset], GPUS[gpu], gpus, load=LOAD if preset[:2] > "v1" else None, **rest
    )


# ---- what must hold ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from([*COUNTS]), st.integers(0, 9), st.integers(1, 16), st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_gpus_hold_less_each_and_larger_micro_batches_more(
    preset, doublings, micro, checkpointing
):
    config, c, s = PRESETS[preset], COUNTS[preset], Setting("cuda", 2, micro, checkpointing)
    few, many = (
        sum(memory_per_gpu(config, c, Mesh("fsdp", n), s).values())
        for n in (1 << doublings, 2 << doublings)
    )
    assert many <= few
    for kind in ("dp", "fsdp"):
        one, more = (
            sum(memory_per_gpu(config, c, Mesh(kind, 8), replace(s, micro_batch=m)).values())
            for m in (micro, micro + 1)
        )
        assert one <= more


@pytest.mark.parametrize(
    "mesh", [Mesh("dp", 16), Mesh("fsdp", 16), Mesh("ep", 16, 16), Mesh("dp x ep", 16, 4)]
)
def test_weights_of_all_gpus_are_the_model_as_often_as_it_is_held(mesh):
    made = memory_per_gpu(FULL, COUNTS["v2-full"], mesh, Setting("cuda", 2))
    assert tuple(made) == KINDS and all(value >= 0 for value in made.values())
    c = COUNTS["v2-full"]
    copies, expert_copies = {"dp": (16, 16), "fsdp": (1, 1), "ep": (16, 1), "dp x ep": (16, 4)}[
        mesh.kind
    ]
    held = copies * (c.total - c.experts) + expert_copies * c.experts
    assert mesh.gpus * made["weights"] == pytest.approx(4 * held)
    assert made["gradients"] == made["weights"] <= made["optimizer"]


def test_what_is_sent_is_what_the_textbook_says():
    c, s, n = COUNTS["v2-full"], Setting("cuda", 2, 1), 16
    dp = sent(FULL, c, Mesh("dp", n), s)
    assert sum(dp.values()) == pytest.approx(2 * 15 / 16 * 4 * c.total)
    fsdp, pieces = sent(FULL, c, Mesh("fsdp", n), s), 1024 // n
    assert sum(size for (how, _), size in fsdp.items() if how == "all-gather") == pytest.approx(
        2 * pieces * 15 / 16 * 2 * c.total
    )
    assert sum(size for (how, _), size in fsdp.items() if how == "reduce-scatter") == pytest.approx(
        pieces * 15 / 16 * 4 * c.total
    )
    ep = sent(FULL, c, Mesh("ep", n, n), s)
    tokens = pieces * 4096
    assert ep["all-to-all", "group"] == pytest.approx(
        4 * 34 * 2 * tokens * 4608 * 2 * 15 / 16
    )  # L, K, tokens, C, bytes
    assert ep["all-reduce", "twins"] == 0  # nobody else has its experts
    for config, sums in (
        (FULL, 2),
        (PRESETS["v1-full"], 4),
    ):  # after attention, and after an MLP of parts, both ways
        tp = sent(config, c, Mesh("tp", 12), s)
        assert tp == {
            ("all-reduce", "everyone"): pytest.approx(
                sums * 2 * 11 / 12 * 34 * 1024 * 4096 * 4608 * 2
            )
        }


def test_what_stays_in_a_machine_goes_by_nvlink():
    inside, across = (seconds(1e9, "all-to-all", "group", Mesh("ep", n, n), A100) for n in (8, 16))
    assert inside == pytest.approx(1 / (0.7 * 300)) and across == pytest.approx(
        8 / 15 / (0.7 * 25) + 7 / 15 / (0.7 * 300)
    )
    ring = seconds(1e9, "all-reduce", "everyone", Mesh("dp", 512), A100)
    assert ring == pytest.approx(1 / (0.7 * 200))  # eight cards at once, slower than NVLink
    assert seconds(1e9, "all-reduce", "twins", Mesh("dp x ep", 512, 8), A100) == pytest.approx(
        1 / (0.7 * 25)
    )


def test_imbalance_is_mean_over_max_of_the_devices():
    load = [[1, 1, 1, 5], [2, 2, 2, 2]]
    assert overload(load, 4) == pytest.approx((2.5 + 1) / 2)
    assert overload(load, 2) == pytest.approx((1.5 + 1) / 2)
    assert overload(load, 3) == overload(load, 4)  # cannot be dealt out: the worst case
    even, uneven = (
        option(replace(job(), load=rows), Mesh("ep", 16, 16), 1, True)
        for rows in ([[1] * 16], [[1] * 15 + [17]])
    )
    assert (
        uneven.took["computing"] > even.took["computing"]
        and uneven.memory["activations"] > even.memory["activations"]
    )


def test_each_mesh_is_there_or_it_is_said_why():
    for gpus in (1, 2, 8, 12, 512):
        for preset in ("v1-full", "v2-full"):
            found, why = possible(PRESETS[preset], gpus)
            assert {mesh.kind for mesh in found} | set(why) == set(MESHES)
            assert not {mesh.kind for mesh in found} & set(why)


def test_the_quickest_that_fits_is_chosen_and_its_hours_add_up():
    p = plan(job(tokens=100e9))
    assert p.chosen.fits and p.chosen.took["step"] == min(
        o.took["step"] for o in p.options.values() if o.fits
    )
    flops = p.hours * 3600 * 512 * 312e12  # that the GPUs could have done
    assert 0.25 < 100e9 * p.job.flops_per_token / flops <= 0.4
    assert plan(job("v1-small", 8)).chosen.mesh.kind == "dp"
    assert plan(job(tokens=200e9)).hours == pytest.approx(2 * p.hours)


@pytest.mark.parametrize(
    "changed",
    [
        {"gpus": 8},
        {"gpus": 512, "mesh": "dp"},
        {"preset": "v1-full", "gpus": 8, "mesh": "dp", "checkpointing": "off"},
        {"preset": "v1-small", "gpus": 1, "checkpointing": "off", "gpu": "v100-32gb", "micro": 32},
        {"gpus": 1, "gpu": "rtx4090-24gb"},
    ],
    ids=str,
)
def test_a_mend_mends(changed):
    """What it says, applied to the job, fits."""
    changed = dict(changed)
    micro = changed.pop("micro", None)
    asked = job(**changed)
    asked = replace(asked, config=replace(asked.config, micro_batch=micro, batch_size=1024))
    p = plan(asked)
    assert p.chosen is None and p.hours is None and p.suggestion == suggest(asked)
    words = p.suggestion.split(",")[0].split(" then ")[0]
    mended = asked
    if "without" in words:
        mended = replace(
            mended,
            mesh="auto",
            checkpointing="auto",
            config=replace(mended.config, micro_batch=None),
        )
    flags = words.replace("'", "").split(" without")[0].split(" instead of")[0].split("--")[1:]
    for name, value in (flag.strip().split(" ", 1) for flag in flags if " " in flag.strip()):
        if name == "gpus":
            mended = replace(mended, gpus=int(value))
        elif name == "gpu":
            mended = replace(mended, device=named(value))
        elif name == "micro-batch":
            mended = replace(mended, config=replace(mended.config, micro_batch=int(value)))
        elif name in ("mesh", "checkpointing"):
            mended = replace(mended, **{name: value.rstrip(")")})
    assert mended != asked and plan(mended).chosen, p.suggestion


def test_serving_counts_weights_and_caches():
    import torch

    from nanods.gpt import GPT

    config = PRESETS["v1-small"]
    with torch.device("meta"):
        cache = GPT(config.model).to(torch.bfloat16).new_cache(1)
    tensors = [*cache.keys, *cache.values, *cache.summaries, *cache.tile_selections]
    assert cache_bytes(config) == sum(t.numel() * t.element_size() for t in tensors)
    assert served(FULL, COUNTS["v2-full"], A100, 1) == 0 < served(FULL, COUNTS["v2-full"], A100, 8)


# ---- from the outside --------------------------------------------------------------------------------------------------------


def test_a_plan_is_told_in_words_and_nothing_is_trained(program, workspace):
    code, out, err = program(
        "train", "v2-full", "--plan", "--gpus", 512, "--gpu", "a100-80gb", "--tokens", "100e9"
    )
    assert code == 0, err
    for word in (
        "95.76B parameters",
        "14.67B",
        "512 x a100-80gb",
        "data sheet",
        "fsdp x ep",
        "GPU-hours",
        "--mfu",
        "chosen",
    ):
        assert word in out
    assert "mean load / max load" in out and "results/experts.json" in out
    code, out, err = program("train", "v1-tiny", "--plan", "--n-layer", 2)
    assert code == 0 and "this machine" in out and "one device" in out, err
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--gpu", "a100"), "a100-80gb, h100-80gb"),
        (("--gpus", 0, "--gpu", "a100-80gb"), "--gpus 0: at least one"),
        (("--gpus", -8, "--gpu", "a100-80gb"), "--gpus -8: at least one"),
        (("--tokens", -1, "--gpu", "a100-80gb"), "--tokens -1: must be above 0"),
        (("--mfu", 40, "--gpu", "a100-80gb"), "--mfu 40: a share"),
        (("--load", "nowhere", "--gpu", "a100-80gb"), "no metrics.jsonl"),
        (("--load", "dense", "--gpu", "a100-80gb"), "has no experts"),
        (("--mesh", "tp", "--gpus", 5, "--gpu", "a100-80gb"), "do not divide"),
        (("--gpu", "a100-80gb", "--n-head", 7), "n_head"),
    ],
)
def test_mistakes_are_told_with_their_mend(program, workspace, flags, told):
    (workspace / "dense").mkdir()
    (workspace / "dense/metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n')
    code, _, err = program("train", "v2-tiny", "--plan", *flags)
    assert code == 2 and told in err


def test_the_load_is_a_run_s_own(workspace):
    rows = [{"step": 5, "val_load": [[3, 1]]}, {"step": 6, "load": [[1, 1]]}]
    (workspace / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "lo'
    )
    load, source = read_load(workspace)
    assert load == [[3, 1]] and "step 5" in source
    assert len(LOAD) == 4 and len(LOAD[0]) == 16
    (workspace / "metrics.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert read_load(workspace / "metrics.jsonl")[0] == [[1, 1]]


def test_a_mesh_that_cannot_be_is_refused_and_idle_gpus_are_counted():
    with pytest.raises(UserError, match="no experts"):
        plan(job("v1-full", mesh="ep"))
    assert "1,024 GPUs have no sequence" in in_words(plan(job(gpus=2048)))


WEIGH = """
import sys, time
from nanods.bench.runs import peak_memory
from nanods.planner import cli as plan
sys.argv = ["plan", "v2-full", "--gpus", "512", "--gpu", "a100-80gb"]
plan.main()
print(time.process_time(), peak_memory(), file=sys.stderr)
"""


def test_a_hundred_billion_parameters_are_planned_in_seconds_and_little_memory():
    """Imports included; of the processor's time, since others may be at work beside it."""
    made = subprocess.run(
        [sys.executable, "-c", WEIGH], cwd=ROOT, capture_output=True, text=True, check=True
    )
    took, held = map(float, made.stderr.split())
    assert took <= 15 and held <= 1e9


def test_without_a_mesh_processes_are_copies_where_a_step_fits_and_else_share_the_weights(
    monkeypatch,
):
    monkeypatch.setattr(search, "device_here", lambda: ("cpu", 4e9))
    assert choose_mesh(PRESETS["v2-tiny"], 1) == (None, "as asked")
    assert choose_mesh(replace(PRESETS["v2-tiny"], mesh="ep=2"), 2) == ("ep=2", "as asked")
    mesh, why = choose_mesh(PRESETS["v2-tiny"], 2)
    assert mesh == "dp=2" and re.fullmatch(
        r"a copy's step needs 0\.\d+ GB at least, a process has 3\.2", why
    )
    mesh, why = choose_mesh(PRESETS["v2-small"], 8)
    assert mesh == "fsdp=8" and re.fullmatch(
        r"a copy's step needs \d\d\.?\d* GB, a process has 3\.2; shared out \d.*", why
    )
