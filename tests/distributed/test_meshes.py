"""Several processes make the steps of one, for every version on every mesh, also when resumed.

An error on one process stops all of them.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from nanods.bench.runs import flags_from_dict
from nanods.distributed.data_parallel import BUCKET_SIZE, gradient_buckets
from nanods.distributed.mesh import Mesh
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.tensor_parallel import split_heads
from nanods.errors import UserError
from nanods.gpt import GPT, GPTConfig
from nanods.training import checkpoint
from tests.distributed.processes import DISK_FULL, REPORT, train_on_processes

SIZE = {
    "device": "cpu",
    "dtype": "fp64",
    "n-layer": 2,
    "n-head": 2,
    "n-embd": 16,
    "context-length": 32,
    "batch-size": 8,
}
SIZE = flags_from_dict(SIZE | {"micro-batch": 2})
STEPS = ["--steps", "3", "--eval-every", "3"]
EXPERTS = ["--moe.n-expert", "4", "--moe.bias-rate", "0.01"]
FLAGS = {
    "v0-tiny": [
        *("--data", "text.txt", "--clip", "0.05"),  # gradients are clipped at every step
        *("--short-context", "0.5", "--conv-width", "3", "--equal-neurons"),
    ],
    "v1-tiny": ["--data", "text.txt", "--attention.block-size", "8"],
    "v2-tiny": [
        *("--data", "text.txt", "--attention.block-size", "8", "--clip", "0.05"),
        *("--equal-neurons", *EXPERTS),
    ],
    "v3-tiny": [
        *EXPERTS,
        *("--conv-width", "2", "--equal-neurons"),
        *("--multimodal.entropy-coefficient", "0.1"),
        *("--multimodal.patch-size", "16", "--multimodal.patch-frames", "16"),
    ],
}
TEXT = "".join(f"{n} times {n} makes {n * n}.\n" for n in range(150))
# V1 on dp, fsdp and tp, and V3 on dp, are among the students below (TAUGHT_MESHES).
MESHES = {
    2: [
        *(("v0-tiny", mesh) for mesh in ("dp=2", "fsdp=2", "tp=2")),
        *(("v2-tiny", mesh) for mesh in ("dp=2", "fsdp=2", "tp=2", "ep=2")),
    ],
    4: [
        ("v2-tiny", "ep=4"),
        ("v2-tiny", "dp=2,ep=2"),
        ("v2-tiny", "fsdp=2,ep=2"),
        ("v3-tiny", "fsdp=2,ep=2"),
    ],
}
CHECKPOINTED = ("v2-tiny-tp=2", "v2-tiny-fsdp=2,ep=2")  # runs with activation checkpointing
SAVING = ("v2-tiny-1", "v2-tiny-fsdp=2,ep=2")  # runs that keep their checkpoint of step 2
REPORTING = ("v0-tiny-dp=2", "v2-tiny-ep=2")  # runs that draw pictures
# Copies of v2-tiny-fsdp=2,ep=2 that resume after step 2 on this mesh; "cut-alone" by one process.
CUT = {"cut": "ep=2", "cut-shards": "fsdp=2", "cut-heads": "tp=2"}
REFUSED = ("bad", "broken", "full", "taught-bad")  # runs that must end with exit code 2
# Students: the preset, and the flags. V3's projects its embeddings to the teacher's wider space.
TAUGHT = {
    "taught-v1": ("v1-tiny", "--teacher", "v2-tiny-1", "--distill-weight", "0.7"),
    "taught-v3": ("v3-tiny", "--teacher", "v3-tiny-1", "--multimodal.width", "8"),
}
TAUGHT_MESHES = [
    ("taught-v1", "dp=2"),
    ("taught-v1", "fsdp=2"),
    ("taught-v1", "tp=2"),
    ("taught-v3", "dp=2"),
]


def arguments(preset, out, *more):
    words = [preset, *SIZE, *STEPS, *FLAGS[preset], "--out-dir", out, *more]
    if out in SAVING:
        words += ["--save-every", "2"]
    return [REPORT, *words] if out in REPORTING else words


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of all runs by one, four and two processes, and {run: stderr by process}.

    Processes start slowly, so each number of processes starts once, for all its runs.
    """
    folder = tmp_path_factory.mktemp("meshes")
    (folder / "text.txt").write_text(TEXT)
    stderr = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANODS_DATA", str(folder / "data"))
        stderr |= train_all(1, jobs_of_one(), folder)
        copy_without_last_step(folder / "v2-tiny-1", folder / "begun")
        stderr |= train_all(4, jobs_of_four(), folder)
        for name in (*CUT, "cut-alone", "broken", "full"):
            copy_without_last_step(folder / "v2-tiny-fsdp=2,ep=2", folder / name)
        with (folder / "broken/step_000002/model.safetensors").open("r+b") as file:
            file.truncate(9000)
        stderr |= train_all(2, jobs_of_two(), folder)
        train_all(1, [arguments("v2-tiny", "cut-alone", "--resume")], folder)
    return folder, stderr


def copy_without_last_step(run, copy):
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("step_000003"))


def train_all(world_size, jobs, folder):
    """Run all jobs and check their exit codes; return the stderr of each process, by run."""
    stderr = {}
    results = train_on_processes(world_size, jobs, folder)
    for job, *of_processes in zip(jobs, *results, strict=True):
        out = job[job.index("--out-dir") + 1]
        assert {code for code, _ in of_processes} == {2 if out in REFUSED else 0}, of_processes
        stderr[out] = [text for _, text in of_processes]
    return stderr


def jobs_of_one():
    return [
        *(arguments(preset, f"{preset}-1") for preset in FLAGS),
        arguments("v2-tiny", "narrow", "--dtype", "bf16"),
        arguments("v2-tiny", "warm", "--init-from", "v1-tiny-1"),
        *(student(name, name) for name in TAUGHT),
    ]


def student(name, out, *more):
    preset, *flags = TAUGHT[name]
    return arguments(preset, out, *flags, *more)


def jobs_of_four():
    mesh = ["--mesh", "fsdp=2,ep=2"]
    return [
        *jobs_on_meshes(4),
        arguments("v2-tiny", "warm-shards", *mesh, "--init-from", "v1-tiny-1"),
        arguments("v2-tiny", "begun", *mesh, "--resume"),
    ]


def jobs_of_two():
    mesh, wrong_batch = ["--mesh", "fsdp=2"], ["--batch-size", "7", "--micro-batch", "1"]
    return [
        *jobs_on_meshes(2),
        arguments("v2-tiny", "narrow-shards", *mesh, "--dtype", "bf16"),
        *(arguments("v2-tiny", out, "--mesh", CUT[out], "--resume") for out in CUT),
        arguments("v2-tiny", "broken", *mesh, "--resume"),
        [DISK_FULL, *arguments("v2-tiny", "full", *mesh, "--resume")],
        arguments("v0-tiny", "bad", "--mesh", "dp=2", *wrong_batch),
        *(student(name, f"{name}-{on}", "--mesh", on) for name, on in TAUGHT_MESHES),
        student("taught-v3", "taught-bad", *mesh),
    ]


def jobs_on_meshes(world_size):
    jobs = []
    for preset, mesh in MESHES[world_size]:
        out = f"{preset}-{mesh}"
        more = ["--activation-checkpointing"] if out in CHECKPOINTED else []
        jobs.append(arguments(preset, out, "--mesh", mesh, *more))
    return jobs


@pytest.fixture(scope="module")
def folder(runs):
    return runs[0]


def read_rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def max_relative_difference(a, b):
    """Return the largest difference of two dicts of tensors, relative to each tensor's maximum."""
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    differences = []
    for name in a:
        x, y = a[name].double(), b[name].double()
        differences.append(((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).item())
    return max(differences)


ALL_MESHES = [(preset, mesh) for cases in MESHES.values() for preset, mesh in cases]


@pytest.mark.parametrize(("preset", "mesh"), ALL_MESHES)
def test_several_processes_make_the_steps_of_one(folder, preset, mesh):
    """Compare weights, optimizer state, losses, loads and validation after three clipped steps."""
    assert_same_run(folder / f"{preset}-{mesh}", folder / f"{preset}-1")


def assert_same_run(several, one):
    """Compare a run by several processes with one by a single process."""
    a, b = checkpoint.load(several), checkpoint.load(one)
    assert max_relative_difference(a.model, b.model) < 1e-10
    random = {name for name in b.optimizer if name.startswith("rng/")}
    a_state, b_state = (
        {name: value for name, value in run.optimizer.items() if name not in random}
        for run in (a, b)
    )
    assert max_relative_difference(a_state, b_state) < 1e-9
    for row, expected in zip(read_rows(several), read_rows(one), strict=True):
        assert row.keys() - {"communication_seconds"} == expected.keys()
        for name, value in expected.items():
            if "second" in name:
                continue
            if isinstance(row[name], float):
                assert row[name] == pytest.approx(value, rel=1e-9), name
            else:
                assert row[name] == value, name


def test_experts_that_start_as_the_mlps_of_a_dense_run_reach_the_ranks_that_hold_them(folder):
    assert_same_run(folder / "warm-shards", folder / "warm")
    assert read_rows(folder / "warm")[0]["val_loss"] == pytest.approx(
        read_rows(folder / "v1-tiny-1")[-1]["val_loss"], rel=1e-12
    )


@pytest.mark.parametrize(("name", "mesh"), TAUGHT_MESHES)
def test_several_processes_learn_from_a_teacher_as_one_does(folder, name, mesh):
    assert_same_run(folder / f"{name}-{mesh}", folder / name)
    tensors = checkpoint.load(folder / name).optimizer
    assert ("weight/projection.weight" in tensors) == (name == "taught-v3")


def test_a_projection_is_not_sharded_and_that_is_said(runs):
    for err in runs[1]["taught-bad"]:
        assert "--mesh fsdp=2: the teacher's embeddings have another width" in err
        assert "use dp, or --distill-cosine 0" in err


def test_weights_gathered_in_bf16_give_the_losses_of_one_process(folder):
    one, two = read_rows(folder / "narrow"), read_rows(folder / "narrow-shards")
    assert [row["train_loss"] for row in two] == pytest.approx(
        [row["train_loss"] for row in one], rel=1e-3
    )


@pytest.mark.parametrize("name", [*CUT, "cut-alone", "begun"])
def test_a_run_resumes_on_another_mesh(folder, name):
    """From four processes to two or one, and from one to four: as a run that never stopped."""
    paths = checkpoint.list_checkpoints(folder / name)
    assert [path.name for path in paths] == ["step_000002", "step_000003"]
    best = checkpoint.load(folder / name / "best")  # step 3 is the only one that is evaluated
    assert best.state["step"] == 3
    # Step 3 may have been the best already when it was done the first time, on another mesh.
    figure = read_rows(folder / name)[-1]["val_bpb"]
    assert best.state["figure"] == pytest.approx(figure, rel=1e-12)
    assert_same_run(folder / name, folder / "v2-tiny-1")
    model = checkpoint.load_model(checkpoint.load(folder / name))
    assert model.config.moe.n_expert == 4  # the whole model, as sample.py reads it


def test_all_processes_refuse_a_truncated_checkpoint(runs):
    err = runs[1]["broken"][0]
    assert "step_000002 is broken (model.safetensors is not what was written)" in err
    assert "no checkpoint in broken is whole: move the folder away and train again" in err


def test_if_one_process_cannot_write_all_exit_and_nothing_is_lost(runs):
    folder, stderr = runs
    message = "process 1, [Errno 27] File too large: step 3 cannot be written: free some space, or"
    for err in stderr["full"]:
        assert f"{message} choose another" in err
    (path,) = checkpoint.list_checkpoints(folder / "full")
    assert path.name == "step_000002" and checkpoint.find_corruption(path) is None
    assert not list((folder / "full").glob(".*"))  # no shards, and no partial checkpoint


def test_only_the_main_process_writes(folder):
    assert not list(folder.glob("v0-tiny-dp=2.*"))  # no process moved the run directory of another
    assert (folder / "v0-tiny-dp=2/loss.png").exists()
    assert (folder / "v2-tiny-ep=2/experts.png").exists()


# ---- meshes ------------------------------------------------------------------------------------


def test_a_mesh_is_parsed_or_refused_with_a_suggestion():
    assert Mesh.parse(None, 3) == Mesh.of(dp=3)
    assert Mesh.parse("dp=2,ep=2", 4) == Mesh.of(dp=2, ep=2) == Mesh(("dp", "ep"), (2, 2))
    for text, world_size, message in (
        ("dp=2", 1, "needs 2 processes, but there is 1: .*PROCS=2"),
        ("dp=2,ep=2", 2, "needs 4 processes, but there are 2"),
        ("ep=2,dp=2", 4, "the choices are dp=N, ep=N, dp=N,ep=N, fsdp=N"),
        ("pp=2", 2, "the choices are.*fsdp=N, fsdp=N,ep=N, tp=N"),
        ("dp=0", 0, "each N at least 1"),
        ("dp=2,dp=4", 4, "dp is there twice; give each axis once"),
        ("dp", 2, "write it as dp=2"),
        ("dp=two", 2, "write it as dp=2"),
    ):
        with pytest.raises(UserError, match=message):
            Mesh.parse(text, world_size)


@pytest.mark.parametrize(
    ("text", "kind", "world_size", "batch_shards", "is_fsdp", "is_sharded"),
    [
        ("dp=1", "dp", 1, 1, False, False),
        ("dp=4", "dp", 4, 4, False, False),
        ("ep=4", "ep", 4, 4, False, True),
        ("dp=2,ep=4", "dp,ep", 8, 8, False, True),
        ("dp=2,ep=1", "dp,ep", 2, 2, False, False),
        ("fsdp=1", "fsdp", 1, 1, True, False),
        ("fsdp=8", "fsdp", 8, 8, True, True),
        ("fsdp=1,ep=2", "fsdp,ep", 2, 2, True, True),
        ("tp=2", "tp", 2, 1, False, True),
    ],
)
def test_a_mesh_knows_what_it_splits_and_str_gives_back_its_spelling(
    text, kind, world_size, batch_shards, is_fsdp, is_sharded
):
    mesh = Mesh.parse(text)
    assert str(mesh) == text and mesh.kind == kind
    assert mesh.world_size == world_size == mesh.dp * mesh.fsdp * mesh.ep * mesh.tp
    assert mesh.batch_shards == batch_shards
    assert (mesh.is_fsdp, mesh.is_sharded) == (is_fsdp, is_sharded)


def test_experts_must_divide_over_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = r"6 experts do not divide over 4 processes; .*--moe.n-expert 8"
    with pytest.raises(UserError, match=message):
        ProcessGroups("ep=4", 6)
    with pytest.raises(UserError, match="1 expert does not divide over 4"):
        ProcessGroups("ep=4", 1)


def test_heads_must_divide_over_the_processes_and_v3_has_no_tensor_parallelism():
    mesh = SimpleNamespace(size=lambda: 3)
    with pytest.raises(UserError, match=r"tp=3: 4 heads do not divide over 3"):
        split_heads(GPT(GPTConfig(n_layer=1, n_head=4, n_embd=16)), mesh)
    with pytest.raises(UserError, match="V3 compares the examples of different processes"):
        split_heads(torch.nn.Linear(2, 2), mesh)


def test_one_process_communicates_with_nobody():
    processes, model = ProcessGroups(), torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    grad = model.weight.grad.clone()
    processes.average_gradients(model)
    assert torch.equal(model.weight.grad, grad)
    assert processes.is_main_process
    assert processes.local_batch(8) == slice(0, 8)
    assert processes.min_over_processes(3) == 3
    metrics = {"train_loss": torch.tensor(1.5), "load": grad}
    assert processes.average_metrics(metrics) == metrics
    assert processes.any_process(True) and not processes.any_process(False)


def test_buckets_have_every_parameter_once_and_missing_gradients_become_zeros():
    sizes = [BUCKET_SIZE - 5, 3, 7, 2 * BUCKET_SIZE, 1]
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    buckets = [[p.numel() for p in bucket] for bucket in gradient_buckets(parameters)]
    assert buckets == [[BUCKET_SIZE - 5, 3], [7], [2 * BUCKET_SIZE], [1]]
    assert all(p.grad is not None for p in parameters)
