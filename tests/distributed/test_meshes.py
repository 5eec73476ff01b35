"""Several processes make the steps of one: every version on every mesh, resumed on another, and mistakes that end them all."""

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
from tests.distributed.processes import train_by

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
STEPS = ["--steps", "5", "--eval-every", "5"]
EXPERTS = ["--moe.n-expert", "4", "--moe.bias-rate", "0.01"]
FLAGS = {
    "v0-tiny": ["--data", "text.txt", "--clip", "0.05"],  # a norm that clips at every step
    "v1-tiny": ["--data", "text.txt", "--attention.block-size", "8"],
    "v2-tiny": ["--data", "text.txt", "--attention.block-size", "8", "--clip", "0.05", *EXPERTS],
    "v3-tiny": [*EXPERTS, "--multimodal.entropy-coefficient", "0.1"],
}
TEXT = "".join(f"{n} times {n} makes {n * n}.\n" for n in range(150))
MESHES = {
    2: [(preset, "dp=2") for preset in FLAGS]
    + [("v2-tiny", "ep=2"), ("v3-tiny", "ep=2")]
    + [(preset, "fsdp=2") for preset in FLAGS]
    + [(preset, "tp=2") for preset in ("v0-tiny", "v1-tiny", "v2-tiny")],
    4: [
        ("v0-tiny", "dp=4"),
        ("v0-tiny", "fsdp=4"),
        ("v2-tiny", "ep=4"),
        ("v2-tiny", "dp=2,ep=2"),
        ("v2-tiny", "fsdp=2,ep=2"),
        ("v3-tiny", "dp=2,ep=2"),
        ("v3-tiny", "fsdp=2,ep=2"),
    ],
}


CUT = {
    "cut": "ep=2",
    "cut-shards": "fsdp=2",
    "cut-heads": "tp=2",
}  # on 2 processes; "cut-alone" on one
REFUSED = ("bad", "broken", "full")  # runs that must end with exit code 2


def words(preset, out, *more):
    return [preset, *SIZE, *STEPS, *FLAGS[preset], "--out-dir", out, *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by one process, two and four; each number of processes is started once for all its runs.

    -> their folder, and by run what each process said to stderr."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANODS_DATA", str(folder / "data"))
        jobs = {1: [words(preset, f"{preset}-1") for preset in FLAGS]}
        for processes, of in MESHES.items():
            jobs[processes] = [
                words(preset, f"{preset}-{mesh}", "--mesh", mesh) for preset, mesh in of
            ]
        for processes, out, more in ((1, "narrow", []), (2, "narrow-shards", ["--mesh", "fsdp=2"])):
            jobs[processes].append(words("v2-tiny", out, *more, "--dtype", "bf16"))
        for processes, mesh in ((2, "tp=2"), (4, "fsdp=2,ep=2")):
            job = next(job for job in jobs[processes] if job[0] == "v2-tiny" and job[-1] == mesh)
            job.append("--activation-checkpointing")
        for processes, out, more in (
            (1, "warm", []),
            (4, "warm-shards", ["--mesh", "fsdp=2,ep=2"]),
        ):
            jobs[processes].append(words("v2-tiny", out, *more, "--init-from", "v1-tiny-1"))
        jobs[4].append(words("v2-tiny", "cut", "--mesh", "fsdp=2,ep=2", "--save-every", "3"))
        jobs[1].append(words("v2-tiny", "begun", "--save-every", "3"))
        jobs[4].append(words("v2-tiny", "begun", "--mesh", "fsdp=2,ep=2", "--resume"))
        said = {}
        for processes in (1, 4, 2):
            if processes == 4:  # what one has begun
                shutil.rmtree(folder / "begun/step_000005")
            if processes == 2:  # what four have begun
                shutil.rmtree(folder / "cut/step_000005")
                for name in ("cut-alone", "cut-shards", "cut-heads", "broken", "full"):
                    shutil.copytree(folder / "cut", folder / name)
                with (folder / "broken/step_000003/model.safetensors").open("r+b") as file:
                    file.truncate(9000)
                jobs[2] += [
                    words("v2-tiny", name, "--mesh", mesh, "--resume") for name, mesh in CUT.items()
                ]
                jobs[2].append(words("v2-tiny", "broken", "--mesh", "fsdp=2", "--resume"))
                jobs[2].append(
                    ["full:1", *words("v2-tiny", "full", "--mesh", "fsdp=2", "--resume")]
                )
                jobs[2].append(
                    words(
                        "v0-tiny",
                        "bad",
                        "--mesh",
                        "dp=2",
                        "--batch-size",
                        "7",
                        "--micro-batch",
                        "1",
                    )
                )
            for job, *ways in zip(
                jobs[processes], *train_by(processes, jobs[processes], folder), strict=True
            ):
                out = job[job.index("--out-dir") + 1]
                assert {code for code, _ in ways} == ({2} if out in REFUSED else {0}), ways
                said[out] = [err for _, err in ways]
        ((code, err),) = train_by(1, [words("v2-tiny", "cut-alone", "--resume")], folder)[0]
        assert code == 0, err
    return folder, said


@pytest.fixture(scope="module")
def folder(runs):
    return runs[0]


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def apart(a, b):
    """The largest difference of two dicts of tensors, each relative to its tensor's largest number."""
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    return max(
        (
            (a[n].double() - b[n].double()).abs().max() / b[n].double().abs().max().clamp(min=1e-3)
        ).item()
        for n in a
    )


@pytest.mark.parametrize(("preset", "mesh"), [pair for of in MESHES.values() for pair in of])
def test_several_processes_make_the_steps_of_one(folder, preset, mesh):
    """Weights, optimizers' state, losses, loads and validation, after five steps of clipped, accumulated gradients."""
    same(folder / f"{preset}-{mesh}", folder / f"{preset}-1")


def same(many, one):
    ours, theirs, (many, one) = rows_of(many), rows_of(one), map(checkpoint.load, (many, one))
    assert apart(many.model, one.model) < 1e-10
    random = {name for name in one.optimizer if name.startswith("rng/")}
    assert (
        apart(*({n: t for n, t in run.optimizer.items() if n not in random} for run in (many, one)))
        < 1e-9
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - {"communication_seconds"} == b.keys()
        for name in b:
            if "second" not in name:
                assert (
                    a[name] == pytest.approx(b[name], rel=1e-9)
                    if isinstance(a[name], float)
                    else a[name] == b[name]
                ), name


def test_experts_that_start_as_the_mlps_of_a_dense_run_reach_those_who_own_them(folder):
    same(folder / "warm-shards", folder / "warm")
    assert rows_of(folder / "warm")[0]["val_loss"] == pytest.approx(
        rows_of(folder / "v1-tiny-1")[-1]["val_loss"], rel=1e-12
    )


def test_weights_that_travel_in_bf16_bring_the_losses_of_one_process(folder):
    one, two = rows_of(folder / "narrow"), rows_of(folder / "narrow-shards")
    assert [row["train_loss"] for row in two] == pytest.approx(
        [row["train_loss"] for row in one], rel=1e-3
    )


@pytest.mark.parametrize("name", [*CUT, "cut-alone", "begun"])
def test_a_run_of_four_goes_on_with_two_or_one_and_one_of_one_with_four(folder, name):
    """Saved by fsdp=2,ep=2, or resumed by it: weights, optimizers' state, data position of a run that nobody stopped."""
    assert [path.name for path in checkpoint.list_checkpoints(folder / name)] == [
        "step_000003",
        "step_000005",
    ]
    same(folder / name, folder / "v2-tiny-1")
    assert (
        checkpoint.load_model(checkpoint.load(folder / name)).config.moe.n_expert == 4
    )  # whole, as sample.py reads it


def test_a_checkpoint_that_is_cut_off_is_refused_by_all_processes(runs):
    assert (
        "step_000003 is broken (model.safetensors is not what was written)" in runs[1]["broken"][0]
    )
    assert (
        "no checkpoint in broken is whole: move the folder away and train again"
        in runs[1]["broken"][0]
    )


def test_where_one_process_cannot_write_all_end_and_nothing_is_lost(runs):
    folder, said = runs
    for err in said["full"]:
        assert (
            "process 1, [Errno 27] File too large: step 5 cannot be written: free some space, or choose another"
            in err
        )
    (left,) = checkpoint.list_checkpoints(folder / "full")
    assert left.name == "step_000003" and checkpoint.find_corruption(left) is None
    assert not list((folder / "full").glob(".*"))  # neither shards nor half a checkpoint


def test_only_the_first_process_writes(folder):
    assert not list(folder.glob("v0-tiny-dp=2.*"))  # nobody moved another's run aside
    assert (folder / "v0-tiny-dp=2/loss.png").exists() and (
        folder / "v2-tiny-ep=2/experts.png"
    ).exists()


# ---- the mesh ----------------------------------------------------------------------------------------------------------------


def test_meshes_are_read_and_refused_with_the_mend():
    assert Mesh.parse(None, 3) == Mesh.of(dp=3)
    assert Mesh.parse("dp=2,ep=2", 4) == Mesh.of(dp=2, ep=2) == Mesh(("dp", "ep"), (2, 2))
    for mesh, processes, message in (
        ("dp=2", 1, "needs 2 processes, but there is 1: .*PROCS=2"),
        ("dp=2,ep=2", 2, "needs 4 processes, but there are 2"),
        ("ep=2,dp=2", 4, "the choices are dp=N, ep=N, dp=N,ep=N, fsdp=N"),
        ("pp=2", 2, "the choices are.*fsdp=N, fsdp=N,ep=N, tp=N"),
        ("dp=0", 0, "each N at least 1"),
        ("dp", 2, "write it as dp=2"),
        ("dp=two", 2, "write it as dp=2"),
    ):
        with pytest.raises(UserError, match=message):
            Mesh.parse(mesh, processes)


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
def test_a_mesh_says_what_it_splits_and_is_spelled_as_it_is_read(
    text, kind, world_size, batch_shards, is_fsdp, is_sharded
):
    mesh = Mesh.parse(text)
    assert str(mesh) == text and mesh.kind == kind
    assert mesh.world_size == world_size == mesh.dp * mesh.fsdp * mesh.ep * mesh.tp
    assert mesh.batch_shards == batch_shards
    assert (mesh.is_fsdp, mesh.is_sharded) == (is_fsdp, is_sharded)


def test_experts_must_divide_among_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UserError, match=r"6 experts do not divide over 4 processes; .*--moe.n-expert 8"
    ):
        ProcessGroups("ep=4", 6)
    with pytest.raises(UserError, match="1 expert does not divide over 4"):
        ProcessGroups("ep=4", 1)


def test_heads_must_divide_among_the_processes_and_v3_has_no_tensor_parallelism():
    three = SimpleNamespace(size=lambda: 3)
    with pytest.raises(UserError, match=r"tp=3: 4 heads do not divide over 3"):
        split_heads(GPT(GPTConfig(n_layer=1, n_head=4, n_embd=16)), three)
    with pytest.raises(
        UserError, match="the loss of V3 compares the examples of different processes"
    ):
        split_heads(torch.nn.Linear(2, 2), three)


def test_one_process_is_a_team_that_does_nothing():
    processes, model = ProcessGroups(), torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.grad.clone()
    metrics = {"train_loss": torch.tensor(1.5), "load": before}
    processes.average_gradients(model)
    assert (
        torch.equal(model.weight.grad, before)
        and processes.is_main_process
        and processes.local_batch(8) == slice(0, 8)
        and processes.min_over_processes(3) == 3
    )
    assert (
        processes.average_metrics(metrics) == metrics
        and processes.any_process(True)
        and not processes.any_process(False)
    )


def test_buckets_hold_every_parameter_once_and_missing_gradients_are_zeros():
    sizes = [BUCKET_SIZE - 5, 3, 7, 2 * BUCKET_SIZE, 1]
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    assert [[p.numel() for p in some] for some in gradient_buckets(parameters)] == [
        [BUCKET_SIZE - 5, 3],
        [7],
        [2 * BUCKET_SIZE],
        [1],
    ]
    assert all(p.grad is not None for p in parameters)
