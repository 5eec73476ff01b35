"""The planner: what holds whatever the numbers, its report and messages, its own cost."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.build import build_meta_model
from nanods.config import PRESETS
from nanods.distributed.mesh import Mesh
from nanods.errors import UserError
from nanods.planner import hardware, search
from nanods.planner.capacity import cache_bytes, served_sequences
from nanods.planner.cli import format_plan, read_load
from nanods.planner.cost import (
    MESH_KINDS,
    bytes_sent,
    memory_per_gpu,
    possible_meshes,
    transfer_seconds,
)
from nanods.planner.hardware import GPUS, find_gpu
from nanods.planner.memory import MEMORY_KINDS, StepConfig, model_cost
from nanods.planner.search import (
    choose_mesh,
    evaluate,
    largest_micro_batch,
    load_imbalance,
    make_job,
    plan,
    step_memory,
    suggest,
)

ROOT = Path(__file__).parents[2]
LOAD, _ = read_load(None)
A100 = GPUS["a100-80gb"]
FULL = PRESETS["v2-full"]
COSTS = {
    name: model_cost(build_meta_model(PRESETS[name])) for name in ("v1-base", "v2-full", "v3-small")
}


def job_of(preset="v2-full", gpus=512, gpu="a100-80gb", **rest):
    load = LOAD if preset[:2] > "v1" else None
    return make_job(PRESETS[preset], GPUS[gpu], gpus, load=load, **rest)


# ---- properties ----------------------------------------------------------------------------------


@given(st.sampled_from([*COSTS]), st.integers(0, 9), st.integers(1, 16), st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_gpus_hold_less_each_and_larger_micro_batches_need_more(
    preset, doublings, micro_batch, checkpointing
):
    config, cost = PRESETS[preset], COSTS[preset]
    step = StepConfig("cuda", 2, micro_batch, checkpointing)

    def total(mesh, step):
        return sum(memory_per_gpu(config, cost, mesh, step).values())

    few, many = Mesh.of(fsdp=1 << doublings), Mesh.of(fsdp=2 << doublings)
    assert total(many, step) <= total(few, step)
    larger = replace(step, micro_batch=micro_batch + 1)
    for mesh in (Mesh.of(dp=8), Mesh.of(fsdp=8)):
        assert total(mesh, step) <= total(mesh, larger)


@pytest.mark.parametrize(
    ("mesh", "copies", "expert_copies"),
    [
        (Mesh.of(dp=16), 16, 16),
        (Mesh.of(fsdp=16), 1, 1),
        (Mesh.of(ep=16), 16, 1),
        (Mesh.of(dp=4, ep=4), 16, 4),
    ],
    ids=str,
)
def test_the_weights_of_all_gpus_are_as_many_models_as_there_are_copies(
    mesh, copies, expert_copies
):
    cost = COSTS["v2-full"]
    memory = memory_per_gpu(FULL, cost, mesh, StepConfig("cuda", 2))
    assert tuple(memory) == MEMORY_KINDS and all(value >= 0 for value in memory.values())
    parameters = copies * (cost.total - cost.experts) + expert_copies * cost.experts
    assert mesh.world_size * memory["weights"] == pytest.approx(4 * parameters)
    assert memory["gradients"] == memory["weights"] <= memory["optimizer"]


@pytest.mark.parametrize("mesh", [Mesh.of(dp=16), Mesh.of(fsdp=16), Mesh.of(dp=4, ep=4)], ids=str)
def test_adamw_for_everything_keeps_two_moments_and_orthogonalises_nothing(mesh):
    step = StepConfig("cuda", 2)
    muon = memory_per_gpu(FULL, COSTS["v2-full"], mesh, step)
    adamw = memory_per_gpu(replace(FULL, optimizer="adamw"), COSTS["v2-full"], mesh, step)
    assert adamw["optimizer"] == pytest.approx(2 * adamw["weights"])
    assert adamw["optimizer"] > muon["optimizer"] and adamw["muon"] == 0
    changed = {"optimizer", "muon"}
    assert all(adamw[kind] == muon[kind] for kind in MEMORY_KINDS if kind not in changed)


def test_bytes_sent_follow_the_textbook_formulas():
    cost, step, n = COSTS["v2-full"], StepConfig("cuda", 2, 1), 16
    dp = bytes_sent(FULL, cost, Mesh.of(dp=n), step)
    assert sum(dp.values()) == pytest.approx(2 * 15 / 16 * 4 * cost.total)
    fsdp, micro_batches = bytes_sent(FULL, cost, Mesh.of(fsdp=n), step), 1024 // n
    gathered = sum(size for (name, _), size in fsdp.items() if name == "all-gather")
    scattered = sum(size for (name, _), size in fsdp.items() if name == "reduce-scatter")
    assert gathered == pytest.approx(2 * micro_batches * 15 / 16 * 2 * cost.total)
    assert scattered == pytest.approx(micro_batches * 15 / 16 * 4 * cost.total)
    ep = bytes_sent(FULL, cost, Mesh.of(ep=n), step)
    tokens = micro_batches * 4096
    # trips, L, K, tokens, C, bytes, fraction that leaves the GPU
    assert ep["all-to-all", "ep"] == pytest.approx(4 * 34 * 2 * tokens * 4608 * 2 * 15 / 16)
    assert ep["all-reduce", "replicas"] == 0  # no other GPU has the same experts


@pytest.mark.parametrize(("preset", "sums"), [("v2-full", 2), ("v1-full", 4)])
def test_tensor_parallelism_sums_after_attention_and_after_a_plain_mlp_in_both_directions(
    preset, sums
):
    cost, step = model_cost(build_meta_model(PRESETS[preset])), StepConfig("cuda", 2, 1)
    tp = bytes_sent(PRESETS[preset], cost, Mesh.of(tp=12), step)
    expected = sums * 2 * 11 / 12 * 34 * 1024 * 4096 * 4608 * 2
    assert tp == {("all-reduce", "world"): pytest.approx(expected)}


def test_transfers_inside_a_machine_use_nvlink():
    inside = transfer_seconds(1e9, "all-to-all", "ep", Mesh.of(ep=8), A100)
    across = transfer_seconds(1e9, "all-to-all", "ep", Mesh.of(ep=16), A100)
    assert inside == pytest.approx(1 / (0.7 * 300))
    assert across == pytest.approx(8 / 15 / (0.7 * 25) + 7 / 15 / (0.7 * 300))
    ring = transfer_seconds(1e9, "all-reduce", "world", Mesh.of(dp=512), A100)
    assert ring == pytest.approx(1 / (0.7 * 200))  # eight cards at once, slower than NVLink
    replicas = transfer_seconds(1e9, "all-reduce", "replicas", Mesh.of(dp=64, ep=8), A100)
    assert replicas == pytest.approx(1 / (0.7 * 25))


def test_load_imbalance_is_max_over_mean_of_the_devices():
    load = [[1, 1, 1, 5], [2, 2, 2, 2]]
    assert load_imbalance(load, 4) == pytest.approx((2.5 + 1) / 2)
    assert load_imbalance(load, 2) == pytest.approx((1.5 + 1) / 2)
    assert load_imbalance(load, 3) == load_imbalance(load, 4)  # does not divide: the worst case
    even, uneven = (
        evaluate(replace(job_of(), load=rows), Mesh.of(ep=16), 1, True)
        for rows in ([[1] * 16], [[1] * 15 + [17]])
    )
    assert uneven.seconds["computing"] > even.seconds["computing"]
    assert uneven.memory["activations"] > even.memory["activations"]


def test_each_kind_of_mesh_is_possible_or_has_a_reason():
    for gpus in (1, 2, 8, 12, 512):
        for preset in ("v1-full", "v2-full"):
            meshes, reasons = possible_meshes(PRESETS[preset], gpus)
            assert {mesh.kind for mesh in meshes} | set(reasons) == set(MESH_KINDS)
            assert not {mesh.kind for mesh in meshes} & set(reasons)
            assert all(mesh.world_size == gpus for mesh in meshes)
            assert all(Mesh.parse(str(mesh), gpus) == mesh for mesh in meshes)


def test_the_fastest_mesh_that_fits_is_chosen_and_its_hours_add_up():
    p = plan(job_of(tokens=100e9))
    fastest = min(c.seconds["step"] for c in p.candidates.values() if c.fits)
    assert p.chosen.fits and p.chosen.seconds["step"] == fastest
    peak_flops = p.hours * 3600 * 512 * 312e12
    assert 0.25 < 100e9 * p.job.flops_per_token / peak_flops <= 0.4
    assert plan(job_of("v1-small", 8)).chosen.mesh.kind == "dp"
    assert plan(job_of(tokens=200e9)).hours == pytest.approx(2 * p.hours)


# ---- suggestions ---------------------------------------------------------------------------------


def apply_suggestion(job, suggestion):
    """Return the job with the flags of a suggestion typed, such as "--gpus 8 without --mesh"."""
    flags = suggestion.split(", then ")[0]
    flags, _, without = flags.partition("without ")
    flags = flags.split(" instead of ")[0]
    if without:
        config = replace(job.config, micro_batch=None)
        job = replace(job, mesh=None, checkpointing=None, config=config)
    words = shlex.split(flags)
    while words:
        flag = words.pop(0)
        if flag == "--activation-checkpointing":
            job = replace(job, checkpointing=True)
        elif flag == "--gpus":
            job = replace(job, gpus=int(words.pop(0)))
        elif flag == "--gpu":
            job = replace(job, device=find_gpu(words.pop(0)))
        elif flag == "--mesh":
            job = replace(job, mesh=Mesh.parse(words.pop(0)))
        elif flag == "--micro-batch":
            job = replace(job, config=replace(job.config, micro_batch=int(words.pop(0))))
        else:
            raise AssertionError(f"{suggestion}: unknown flag {flag}")
    return job


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": 8},
        {"gpus": 512, "mesh": Mesh.of(dp=512)},
        {"preset": "v1-full", "gpus": 8, "mesh": Mesh.of(dp=8), "checkpointing": False},
        {
            "preset": "v1-small",
            "gpus": 1,
            "checkpointing": False,
            "gpu": "v100-32gb",
            "micro_batch": 32,
        },
        {"gpus": 1, "gpu": "rtx4090-24gb"},
    ],
    ids=str,
)
def test_a_job_that_does_not_fit_fits_after_the_suggested_change(fields):
    fields = dict(fields)
    micro_batch = fields.pop("micro_batch", None)
    job = job_of(**fields)
    job = replace(job, config=replace(job.config, micro_batch=micro_batch, batch_size=1024))
    p = plan(job)
    assert p.chosen is None and p.hours is None and p.suggestion == suggest(job)
    changed = apply_suggestion(job, p.suggestion)
    assert changed != job and plan(changed).chosen, p.suggestion


# ---- serving -------------------------------------------------------------------------------------


def test_serving_counts_weights_and_caches():
    import torch

    from nanods.gpt import GPT

    config = PRESETS["v1-small"]
    with torch.device("meta"):
        cache = GPT(config.model).to(torch.bfloat16).new_cache(1)
    tensors = [*cache.keys, *cache.values, *cache.summaries, *cache.tile_selections]
    assert cache_bytes(config) == sum(t.numel() * t.element_size() for t in tensors)
    cost = COSTS["v2-full"]
    assert served_sequences(FULL, cost, A100, 1) == 0 < served_sequences(FULL, cost, A100, 8)


# ---- the command line ----------------------------------------------------------------------------


def test_a_plan_is_printed_and_nothing_is_trained(program, workspace):
    flags = ("--gpus", 512, "--gpu", "a100-80gb", "--tokens", "100e9")
    code, out, err = program("train", "v2-full", "--plan", *flags)
    assert code == 0, err
    for word in (
        "95.76B parameters",
        "14.67B",
        "512 x a100-80gb",
        "data sheet",
        "GPU-hours",
        "--mfu",
        "chosen",
    ):
        assert word in out
    assert re.search(r"fsdp=\d+,ep=\d+", out)
    assert "mean load / max load" in out and "results/experts.json" in out
    code, out, err = program("train", "v1-tiny", "--plan", "--n-layer", 2)
    assert code == 0 and "this machine" in out and "one device" in out, err
    assert not (workspace / "runs").exists()


def test_a_printed_mesh_is_one_that_the_planner_reads(program):
    """And train.py: both parse it by Mesh.parse."""
    flags = ("--gpu", "a100-80gb")
    code, out, err = program("train", "v2-full", "--plan", "--gpus", 64, *flags)
    mesh = re.search(r"^chosen +(\S+), micro-batch", out, re.MULTILINE)[1]
    assert code == 0 and Mesh.parse(mesh, 64, 16), err
    code, out, err = program("train", "v2-full", "--plan", "--mesh", mesh, *flags)
    assert code == 0 and f"chosen     {mesh}, micro-batch" in out, err
    assert "64 x a100-80gb" in out  # --gpus follows from the mesh


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ((), {"yes", "no"}),
        (("--activation-checkpointing",), {"yes"}),
        (("--no-activation-checkpointing",), {"no"}),
    ],
)
def test_activation_checkpointing_is_chosen_by_the_planner_or_by_its_flags(program, flags, used):
    words = ("train", "v2-base", "--plan", "--gpus", 16, "--gpu", "a100-80gb", *flags)
    code, out, err = program(*words)
    assert code == 0, err
    rows = re.findall(r"^ +\w+=\d+\S* .* (yes|no)  +(?:yes|NO)$", out, re.MULTILINE)
    assert set(rows) == used


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpu", "a100"), "a100-80gb, h100-80gb"),
        (("--gpus", 0, "--gpu", "a100-80gb"), "--gpus 0: must be at least 1"),
        (("--gpus", -8, "--gpu", "a100-80gb"), "--gpus -8: must be at least 1"),
        (("--tokens", -1, "--gpu", "a100-80gb"), "--tokens -1: must be at least 1"),
        (("--mfu", 40, "--gpu", "a100-80gb"), "--mfu 40: must be at most 1"),
        (("--load", "nowhere", "--gpu", "a100-80gb"), "no metrics.jsonl"),
        (("--load", "dense", "--gpu", "a100-80gb"), "has no experts"),
        (("--mesh", "tp=5", "--gpus", 5, "--gpu", "a100-80gb"), "do not divide"),
        (("--mesh", "dp=102,ep=5", "--gpu", "a100-80gb"), "--mesh dp=102,ep=5: the choices are"),
        (("--mesh", "dp=4", "--gpus", 5, "--gpu", "a100-80gb"), "is for 4 GPUs, not for --gpus 5"),
        (("--mesh", "dp x ep", "--gpu", "a100-80gb"), "write it as dp=2 or dp=2,ep=2"),
        (("--activation-checkpointing", "--no-activation-checkpointing"), "choose one"),
        (("--gpu", "a100-80gb", "--n-head", 7), "n_head"),
    ],
)
def test_mistakes_get_a_message_that_says_what_to_do(program, workspace, flags, message):
    (workspace / "dense").mkdir()
    (workspace / "dense/metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n')
    code, _, err = program("train", "v2-tiny", "--plan", *flags)
    assert code == 2 and message in err


def test_the_load_is_read_from_a_run(workspace):
    rows = [{"step": 5, "val_load": [[3, 1]]}, {"step": 6, "load": [[1, 1]]}]
    (workspace / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "lo'
    )
    load, source = read_load(workspace)
    assert load == [[3, 1]] and "step 5" in source
    assert len(LOAD) == 4 and len(LOAD[0]) == 16
    (workspace / "metrics.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert read_load(workspace / "metrics.jsonl")[0] == [[1, 1]]


def test_an_impossible_mesh_is_refused_and_idle_gpus_are_counted():
    with pytest.raises(UserError, match="no experts"):
        plan(job_of("v1-full", mesh=Mesh.of(ep=512)))
    assert "1,024 GPUs have no sequence" in format_plan(plan(job_of(gpus=2048)))


@pytest.mark.parametrize(("preset", "gpus"), [("v1-small", 16), ("v2-full", 1)])
def test_a_gpu_that_is_not_in_the_table_is_assumed_to_have_the_links_of_another(
    monkeypatch, preset, gpus
):
    """Both for so many GPUs, and in the suggestions for a model that does not fit."""
    monkeypatch.setattr(hardware, "local_device", lambda: ("cuda", 24e9))
    monkeypatch.setattr(hardware, "measure_flops", lambda device: 1e14)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "NVIDIA L4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    device, _ = hardware.this_machine()
    report = format_plan(plan(make_job(PRESETS[preset], device, gpus)))
    assert "its links to other GPUs are assumed to be those of rtx4090-24gb" in report


def test_the_package_runs_as_a_program():
    command = [sys.executable, "-m", "nanods.planner", "v1-small", "--gpus", "8", "--gpu"]
    result = subprocess.run([*command, "a100-80gb"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "chosen     dp=8" in result.stdout, result.stderr


MEASURE_PLAN = """
import sys, time
from nanods.bench.runs import peak_memory
from nanods.planner import cli
sys.argv = ["plan", "v2-full", "--gpus", "512", "--gpu", "a100-80gb"]
cli.main()
print(time.process_time(), peak_memory(), file=sys.stderr)
"""


def test_a_hundred_billion_parameters_are_planned_in_seconds_and_little_memory():
    """Imports included, in CPU time, as other programs may run beside it."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_PLAN], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, result.stderr.split())
    assert seconds <= 15 and peak <= 1e9


# ---- for train.py --------------------------------------------------------------------------------


def test_without_mesh_a_run_is_data_parallel_if_a_step_fits_and_else_sharded(monkeypatch):
    monkeypatch.setattr(search, "local_device", lambda: ("cpu", 4e9))
    assert choose_mesh(PRESETS["v2-tiny"], 1) == (None, "as asked")
    assert choose_mesh(replace(PRESETS["v2-tiny"], mesh="ep=2"), 2) == ("ep=2", "as asked")
    mesh, reason = choose_mesh(PRESETS["v2-tiny"], 2)
    assert mesh == "dp=2" and re.fullmatch(
        r"a step needs 0\.\d+ GB at least, a process has 3\.2", reason
    )
    mesh, reason = choose_mesh(PRESETS["v2-small"], 8)
    assert mesh == "fsdp=8" and re.fullmatch(
        r"a step with the whole model needs \d\d\.?\d* GB, a process has 3\.2; "
        r"sharded it needs \d.*",
        reason,
    )


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(monkeypatch):
    import torch

    config, mesh, cpu = PRESETS["v2-tiny"], Mesh.of(dp=2), torch.device("cpu")
    config = replace(config, batch_size=48)
    needed = {n: step_memory(config, mesh, "cpu", n) for n in (1, 6, 8, 24)}
    for micro_batch, free in ((6, needed[6]), (6, needed[8] - 1), (8, needed[8]), (1, 0)):
        monkeypatch.setattr(search, "main_memory", lambda free=free: free / 0.8 + 1e-6)
        assert largest_micro_batch(config, mesh, cpu) == micro_batch
    monkeypatch.setattr(search, "main_memory", lambda: needed[24] / 0.8 + 1e-6)
    assert largest_micro_batch(config, mesh, cpu) == 24  # of the 24 examples of each process
