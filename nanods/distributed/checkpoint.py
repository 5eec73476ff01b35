"""Checkpoints of a model that is shared out: each process writes and reads its own part, and the files are the plain ones.

    save     each process   its shards                                            OUT/.shards/shard-0000N-...safetensors
             the first      the plain files, from the shards, some tensors        OUT/step_000060/
                            at a time; then the shards are deleted                  (checkpoint.py)
    restore  each process   of the plain files, the rows that are its own

So one process or any other mesh goes on with them, and sample.py reads them; but no process has all of the model in memory for
it. The price: everything is written twice, and all processes must see one disk.

Shards are written, and all is read, by torch.distributed.checkpoint with its safetensors storage (its default one pickles): it
finds out which part of which tensor is whose, and ends all processes where one fails. The plain files are put together here,
since its own `consolidate_safetensors_files` (torch 2.13) writes zeros for single numbers, such as an optimizer's steps, and
refuses integers, such as the random state (github.com/pytorch/pytorch/issues/192485).

Pinned by tests/distributed/test_checkpoint.py and test_parallel.py. Shapes: E experts, P processes that own them.
"""

import json
import shutil
import warnings
from itertools import accumulate, groupby
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nanods.distributed.expert_parallel import local_expert_stacks
from nanods.distributed.fsdp import to_local
from nanods.distributed.process_groups import ProcessGroups
from nanods.errors import UserError
from nanods.training import checkpoint

AT_ONCE = 1 << 28  # bytes that a process copies at a time, but for a tensor that is larger


def save(
    out: Path,
    step: int,
    model: nn.Module,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict,
    processes: ProcessGroups,
) -> None:
    """checkpoint.save of what the processes have between them: each must call it, with its own parts.

    What all have, random state too, is the first's. UserError in all where any of them cannot write, with nothing lost.
    """
    shards = out / ".shards"
    own = as_shards(model, weights | optimizer)
    own = {
        name: value
        for name, value in own.items()
        if isinstance(value, DTensor) or processes.is_main_process
    }
    sizes = accumulate(to_local(value).nbytes for value in own.values())
    files = {
        name: 1 + size // AT_ONCE for name, size in zip(own, sizes, strict=True)
    }  # each is made in memory, then written
    processes.on_main_process(
        lambda: shutil.rmtree(shards, ignore_errors=True)
    )  # of a run that was killed, of more processes perhaps
    try:
        dcp.save(
            own, storage_writer=HuggingFaceStorageWriter(str(shards), files, save_distributed=True)
        )
        processes.on_main_process(
            lambda: checkpoint.write(out, step, state, lambda folder: merge(shards, folder))
        )
    except CheckpointException as error:
        raise in_words(
            error, f"step {step} cannot be written: free some space, or choose another --out-dir"
        ) from None
    finally:
        if processes.is_main_process:
            shutil.rmtree(shards, ignore_errors=True)


def restore(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], saved: checkpoint.Checkpoint
) -> None:
    """checkpoint.restore of what this process has of the model; each must call it. UserError where a file cannot be read."""
    checkpoint.restore_model(model, read(model, saved.path, optimizer=False), saved.path)
    checkpoint.restore_optimizers(model, optimizers, read(model, saved.path, optimizer=True))


def read(model: nn.Module, path: Path, optimizer: bool) -> dict[str, Tensor]:
    """The optimizers' tensors in a checkpoint, or the weights: of what is shared out this process's part, of all else all."""
    shards, stacks, state = (
        as_shards(model, dict(model.named_parameters())),
        local_expert_stacks(model),
        {},
    )
    reader = HuggingFaceStorageReader(str(path))
    for name, kind in reader.read_metadata().state_dict_metadata.items():
        if of_optimizer(name) == optimizer:
            p, dtype = found(shards, name), kind.properties.dtype
            part = isinstance(p, DTensor) and p.shape == kind.size
            state[name] = (
                torch.empty_like(p, dtype=dtype, requires_grad=False)
                if part
                else torch.empty(kind.size, dtype=dtype)
            )
    try:
        dcp.load(state, storage_reader=reader)
    except CheckpointException as error:
        raise in_words(
            error, f"{path} cannot be read: all processes must see it, on one disk"
        ) from None
    mine = {}
    for name, value in state.items():
        stack, _ = found(stacks, name) or (None, None)
        if stack is not None:
            value = to_local(
                value
            )  # of the processes between them, to which it was a DTensor only here
            if isinstance(stack, DTensor) and value.shape == to_local(stack).shape:
                value = DTensor.from_local(
                    value, stack.device_mesh, stack.placements, run_check=False
                )
        mine[name] = value
    return mine


def as_shards(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each stack of experts in `state`, of which this process owns some (E/P, ...), as the DTensor (E, ...) that it is part of.

    `state`: tensors by name, such as model.state_dict() or checkpoint.optimizer_tensors(); what has neither the name nor the
    shape of such a stack is as it was, FSDP's and tensor parallelism's shards among it: they are DTensors already.
    """
    stacks, shards = local_expert_stacks(model), {}
    for name, value in state.items():
        stack, group = found(stacks, name) or (None, None)
        if stack is not None and value.shape == stack.shape:
            if isinstance(stack, DTensor):  # each of these experts is shared out among its twins
                ranks, groups = (
                    torch.arange(dist.get_world_size()),
                    [stack.device_mesh.get_group(), group],
                )
                ranks = ranks.view(-1, dist.get_world_size(group))
                mesh = DeviceMesh.from_group(
                    groups, value.device.type, ranks, mesh_dim_names=("twins", "owners")
                )
            else:
                mesh = DeviceMesh.from_group(group, value.device.type)
            placements = [*getattr(stack, "placements", ()), Shard(0)]
            value = DTensor.from_local(to_local(value.detach()), mesh, placements, run_check=False)
        shards[name] = value
    return shards


def found(by_name: dict, key: str):
    """What belongs to the parameter of which a name such as "blocks.0.mlp.up" or "Muon/blocks.0.mlp.up/momentum_buffer" tells;
    None where there is none."""
    return next((by_name[name] for name in key.split("/") if name in by_name), None)


def of_optimizer(name: str) -> bool:
    """Whether it is the name of an optimizer's tensor, or random state, and not of a weight."""
    return "/" in name


def in_words(error: CheckpointException, what: str) -> BaseException:
    """What to raise for the failure of some process, of which all are told: bugs as they are, with their traceback."""
    rank, (fault, _) = next(iter(error.failures.items()))
    return (
        UserError(f"process {rank}, {fault}: {what}")
        if isinstance(fault, (OSError, SafetensorError))
        else error
    )


# ---- shards to plain files ---------------------------------------------------------------------------------------------------


def merge(shards: Path, folder: Path) -> None:
    """The plain files of the tensors whose parts lie in `shards`. SafetensorError, OSError, CheckpointException if it fails."""
    reader = HuggingFaceStorageReader(str(shards))
    metadata = reader.read_metadata()
    reader.read_metadata = lambda: metadata  # not again for each of the loads below
    kinds = metadata.state_dict_metadata
    for file, optimizer in zip(checkpoint.FILES, (False, True), strict=False):
        write_plain(
            reader,
            {name: kind for name, kind in kinds.items() if of_optimizer(name) == optimizer},
            folder / file,
        )


def write_plain(
    reader: HuggingFaceStorageReader, kinds: dict[str, TensorStorageMetadata], file: Path
) -> None:
    """What safetensors' save_file would write, byte for byte; but never with more than AT_ONCE bytes and a tensor in memory."""
    blank = serialize(
        {name: torch.empty(0, dtype=kind.properties.dtype) for name, kind in kinds.items()}
    )
    header, end = (
        json.loads(blank[8:]),
        0,
    )  # in its order (the widest numbers first, for alignment), with its names of dtypes
    for name, entry in header.items():
        start, end = end, end + kinds[name].size.numel() * kinds[name].properties.dtype.itemsize
        entry |= {"shape": list(kinds[name].size), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as plain:
        plain.write(len(text).to_bytes(8, "little") + text)
        for _, names in groupby(
            header, key=lambda name: header[name]["data_offsets"][0] // AT_ONCE
        ):
            whole = {
                name: torch.empty(kinds[name].size, dtype=kinds[name].properties.dtype)
                for name in names
            }
            with warnings.catch_warnings(action="ignore"):  # that it is done by one process alone
                dcp.load(whole, storage_reader=reader, no_dist=True)
            for value in whole.values():
                plain.write(value.reshape(-1).view(torch.uint8).numpy())
