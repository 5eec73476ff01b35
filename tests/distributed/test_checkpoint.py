"""Shards merge into the files of one process, byte for byte; an error on one process stops all."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nanods.distributed import checkpoint as sharded_checkpoint
from nanods.distributed.process_groups import ProcessGroups
from nanods.errors import UserError
from nanods.training import checkpoint
from tests.distributed.processes import forkserver

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
FAULTS = ("disk of rank 2", "disk of rank 0", "bug on rank 2")


def tensors():
    """Return weights and optimizer tensors: {name: (tensor, dimension of sharding or None)}."""
    random = torch.Generator().manual_seed(0)
    weights = {
        "rows": (torch.randn(8, 3, generator=random), 0),
        "columns": (torch.randn(3, 8, generator=random), 1),
        "uneven": (torch.randn(5, 3, generator=random), 0),
        "single_row": (torch.randn(1, 2, 3, generator=random), 0),
        "half": (torch.randn(3, 2, generator=random).bfloat16(), 0),
        "number": (torch.tensor(0.5), None),
    }
    optimizer = {}
    for name, (value, dim) in weights.items():
        optimizer[f"Muon/{name}/momentum_buffer"] = (value.double() + 1, dim)
    optimizer["Muon/rows/step"] = (torch.tensor(7), None)
    optimizer["rng/cpu"] = (torch.arange(11, dtype=torch.uint8), None)
    return weights, optimizer


def whole_tensors():
    """Return the weights and the optimizer tensors of `tensors`, without the dimensions."""
    return [{name: value for name, (value, _) in group.items()} for group in tensors()]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Return a folder with two checkpoints of four processes, and what each process raised."""
    out = tmp_path_factory.mktemp("shards")
    forkserver()
    torch.multiprocessing.start_processes(
        run_rank, (str(out),), nprocs=4, start_method="forkserver"
    )
    return out


def run_rank(rank, folder):
    """Save two checkpoints with the other processes; then try a third one with each fault."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=4,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (4,))
    processes = ProcessGroups.__new__(ProcessGroups)
    processes.world_size, processes.is_main_process = 4, rank == 0

    def save(step, run="run", keep=2):
        local = [
            {
                name: value if dim is None else distribute_tensor(value, mesh, [Shard(dim)])
                for name, (value, dim) in group.items()
            }
            for group in tensors()
        ]
        local[1]["rng/cpu"] = local[1]["rng/cpu"] + rank  # each rank's differs: rank 0's is saved
        sharded_checkpoint.save(
            Path(folder) / run, step, nn.Module(), *local, {"step": step}, processes, keep
        )

    save(1)
    sharded_checkpoint.CHUNK_BYTES = 100  # several files of each process, merged in several chunks
    save(2)
    for step in (3, 2):  # the best checkpoint of a run need not be its last
        save(step, "run-best", keep=1)
    raised = {}
    for fault in FAULTS:
        error = ZeroDivisionError() if "bug" in fault else OSError(28, "No space left on device")

        def fail(*args, error=error):
            raise error

        with pytest.MonkeyPatch.context() as patch:
            if fault == "disk of rank 0":
                patch.setattr(checkpoint, "fsync", fail)  # while the last file is written
            elif rank == 2:
                patch.setattr(HuggingFaceStorageWriter, "write_data", fail)
            with pytest.raises(BaseException) as caught:
                save(3)
        raised[fault] = (type(caught.value).__name__, str(caught.value))
        if rank == 0:
            names = sorted(path.name for path in Path(folder, "run").iterdir())
            assert names == ["step_000001", "step_000002"]
    torch.save(raised, f"{folder}/raised-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("step", [1, 2])
def test_the_files_are_those_of_one_process_byte_for_byte(out, step, tmp_path):
    path = out / f"run/step_{step:06d}"
    for file, state in zip(checkpoint.FILES, whole_tensors(), strict=False):
        save_file(state, tmp_path / file)
        assert (path / file).read_bytes() == (tmp_path / file).read_bytes()
    assert checkpoint.find_corruption(path) is None


def test_the_best_checkpoint_is_kept_alone(out):
    (path,) = (out / "run-best").iterdir()
    assert path.name == "step_000002" and checkpoint.find_corruption(path) is None


@pytest.mark.parametrize("rank", range(4))
def test_if_one_process_cannot_write_all_raise(out, rank):
    raised = torch.load(out / f"raised-{rank}.pt")
    kind, message = raised["disk of rank 2"]
    assert kind == "UserError"
    assert message.startswith(
        "process 2, [Errno 28] No space left on device: step 3 cannot be written"
    )
    kind, message = raised["bug on rank 2"]
    assert kind == "CheckpointException" and "ZeroDivisionError" in message  # with its traceback
    kind, message = raised["disk of rank 0"]
    if rank == 0:
        assert kind == "OSError" and "No space left" in message
    else:
        assert kind == "UserError" and "see its error message" in message


@pytest.mark.parametrize("n_bytes", [0, 9, 2000])
def test_a_truncated_shard_gives_no_checkpoint(tmp_path, n_bytes):
    shards, run = tmp_path / "shards", tmp_path / "run"
    weights, optimizer = whole_tensors()
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(
            weights | optimizer,
            storage_writer=HuggingFaceStorageWriter(str(shards), save_distributed=True),
            no_dist=True,
        )
    (shard,) = shards.iterdir()
    assert shard.stat().st_size > 2000
    with shard.open("r+b") as file:
        file.truncate(n_bytes)
    with pytest.raises(SafetensorError):
        sharded_checkpoint.merge(shards, tmp_path)
    with pytest.raises(UserError, match="free some space"):
        checkpoint.write_checkpoint(
            run, 1, {}, lambda folder: sharded_checkpoint.merge(shards, folder)
        )
    assert not list(run.iterdir())
