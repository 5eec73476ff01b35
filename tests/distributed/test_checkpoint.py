"""Shards become the plain files, byte for byte, whatever their shapes and dtypes; a failure of one process ends all."""

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

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)
FAULTS = ("one's disk", "the first's disk", "a bug")


def tensors():
    """Weights and optimizers' tensors with, of those that are shared out, the dimension along which they are."""
    random = torch.Generator().manual_seed(0)
    weights = {
        "rows": (torch.randn(8, 3, generator=random), 0),
        "columns": (torch.randn(3, 8, generator=random), 1),
    }
    weights |= {
        "uneven": (torch.randn(5, 3, generator=random), 0),
        "none": (torch.randn(1, 2, 3, generator=random), 0),
    }
    weights |= {
        "half": (torch.randn(3, 2, generator=random).bfloat16(), 0),
        "number": (torch.tensor(0.5), None),
    }
    optimizer = {
        f"Muon/{name}/momentum_buffer": (value.double() + 1, dim)
        for name, (value, dim) in weights.items()
    }
    optimizer |= {
        "Muon/rows/step": (torch.tensor(7), None),
        "rng/cpu": (torch.arange(11, dtype=torch.uint8), None),
    }
    return weights, optimizer


def whole():
    return [{name: value for name, (value, _) in some.items()} for some in tensors()]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two checkpoints of four processes, one of whole tensors; the first's process tells what the faults said."""
    out = tmp_path_factory.mktemp("shards")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(one_of, (str(out),), nprocs=4, start_method="forkserver")
    return out


def one_of(rank, folder):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4, timeout=limit
    )
    mesh, processes, told = init_device_mesh("cpu", (4,)), ProcessGroups.__new__(ProcessGroups), {}
    processes.world_size, processes.is_main_process = 4, rank == 0

    def save(step):
        mine = [
            {
                name: value if dim is None else distribute_tensor(value, mesh, [Shard(dim)])
                for name, (value, dim) in some.items()
            }
            for some in tensors()
        ]
        mine[1]["rng/cpu"] = mine[1]["rng/cpu"] + rank  # each has its own: the first's is saved
        sharded_checkpoint.save(
            Path(folder) / "run", step, nn.Module(), *mine, {"step": step}, processes
        )

    def fail(*args):
        raise ZeroDivisionError if fault == "a bug" else OSError(28, "No space left on device")

    save(1)
    sharded_checkpoint.CHUNK_BYTES = 100  # so that there are several files of each process, and several turns at putting together
    save(2)
    for fault in FAULTS:
        with pytest.MonkeyPatch.context() as patch:
            if fault == "the first's disk":
                patch.setattr(checkpoint, "sync", fail)  # as the last file of all is written
            elif rank == 2:
                patch.setattr(HuggingFaceStorageWriter, "write_data", fail)
            with pytest.raises(BaseException) as raised:
                save(3)
        told[fault] = (type(raised.value).__name__, str(raised.value))
        assert rank or sorted(path.name for path in Path(folder, "run").iterdir()) == [
            "step_000001",
            "step_000002",
        ]
    torch.save(told, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("step", [1, 2])
def test_the_files_are_those_of_one_process_byte_for_byte(out, step, tmp_path):
    path = out / f"run/step_{step:06d}"
    for file, state in zip(checkpoint.FILES, whole(), strict=False):
        save_file(state, tmp_path / file)
        assert (path / file).read_bytes() == (tmp_path / file).read_bytes()
    assert checkpoint.find_corruption(path) is None


def test_where_one_cannot_write_all_are_told(out):
    for rank in range(4):
        told = torch.load(out / f"told-{rank}.pt")
        assert told["one's disk"][0] == "UserError"
        assert told["one's disk"][1].startswith(
            "process 2, [Errno 28] No space left on device: step 3 cannot be written"
        )
        assert (
            told["a bug"][0] == "CheckpointException" and "ZeroDivisionError" in told["a bug"][1]
        )  # with its traceback
        kind, words = (
            ("OSError", "No space left") if rank == 0 else ("UserError", "see its error message")
        )
        assert told["the first's disk"][0] == kind and words in told["the first's disk"][1]


@pytest.mark.parametrize("most", [0, 9, 2000])
def test_a_shard_that_is_cut_off_is_no_checkpoint(tmp_path, most):
    shards, run = tmp_path / "shards", tmp_path / "run"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(
            whole()[0] | whole()[1],
            storage_writer=HuggingFaceStorageWriter(str(shards), save_distributed=True),
            no_dist=True,
        )
    (shard,) = shards.iterdir()
    assert shard.stat().st_size > 2000
    with shard.open("r+b") as file:
        file.truncate(most)
    with pytest.raises(SafetensorError):
        sharded_checkpoint.merge(shards, tmp_path)
    with pytest.raises(UserError, match="free some space"):
        checkpoint.write_checkpoint(
            run, 1, {}, lambda folder: sharded_checkpoint.merge(shards, folder)
        )
    assert not list(run.iterdir())
