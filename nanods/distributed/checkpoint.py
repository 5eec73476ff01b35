"""Checkpoints of a sharded model: all processes write their shards; the files are those of one.

    save     every process    its shards                              OUT/.shards/shard-*
             main process     the plain files, merged from the        OUT/step_000060/
                              shards, which it then deletes             (training/checkpoint.py)
    restore  every process    its own rows of the plain files

So one process, or any other mesh, can resume the run, and sample.py can read it. No process ever
has the whole model in memory. The price: everything is written twice, and all processes must see
one file system.

torch.distributed.checkpoint (DCP) writes the shards and reads everything, with its safetensors
storage (its default one pickles): it knows which process has which part of which tensor, and raises
on all processes if one fails. We merge the shards ourselves because DCP's own
`consolidate_safetensors_files` (torch 2.13) writes zeros for scalars, such as an optimizer's step,
and refuses integers, such as the random state (github.com/pytorch/pytorch/issues/192485).

Pinned by tests/distributed/test_checkpoint.py and test_meshes.py. Shapes: E experts, P processes of
an ep group.
"""

import json
import shutil
import warnings
from itertools import groupby
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

from nanods.config import Config
from nanods.distributed.expert_parallel import local_expert_stacks
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.sharding import to_local
from nanods.errors import UserError
from nanods.training import checkpoint

CHUNK_BYTES = 1 << 28  # a process copies at most this much at a time, or one larger tensor


def save(
    out: Path,
    step: int,
    model: nn.Module,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict,
    processes: ProcessGroups,
    keep: int = Config.keep_checkpoints,
) -> None:
    """Write the files of training.checkpoint.save from the parts of all processes.

    Every process must call it. What all processes hold, the random state too, is written as the
    main process has it. If a process cannot write, all raise UserError, and no earlier checkpoint
    is lost.
    """
    shards = out / ".shards"
    local = {}
    for name, value in as_dtensors(model, weights | optimizer).items():
        if isinstance(value, DTensor) or processes.is_main_process:
            local[name] = value
    file_of, n_bytes = {}, 0
    for name, value in local.items():  # DCP builds each file in memory before it writes it
        n_bytes += to_local(value).nbytes
        file_of[name] = 1 + n_bytes // CHUNK_BYTES

    def delete_shards() -> None:
        shutil.rmtree(shards, ignore_errors=True)

    def write_plain_checkpoint() -> None:
        checkpoint.write_checkpoint(out, step, state, lambda folder: merge(shards, folder), keep)

    processes.on_main_process(delete_shards)  # of a killed run, perhaps with more processes
    try:
        dcp.save(
            local,
            storage_writer=HuggingFaceStorageWriter(str(shards), file_of, save_distributed=True),
        )
        processes.on_main_process(write_plain_checkpoint)
    except CheckpointException as error:
        advice = f"step {step} cannot be written: free some space, or choose another --out-dir"
        raise user_error(error, advice) from None
    finally:
        if processes.is_main_process:
            delete_shards()


def restore(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], saved: checkpoint.Checkpoint
) -> None:
    """Load this process's part of a checkpoint. Every process must call it.

    Raises UserError if a file cannot be read, or if the checkpoint is of another model.
    """
    weights = read_local(model, saved.path, optimizer=False)
    checkpoint.restore_model(model, weights, saved.path)
    tensors = read_local(model, saved.path, optimizer=True)
    checkpoint.restore_optimizers(model, optimizers, tensors)


def read_local(model: nn.Module, path: Path, optimizer: bool) -> dict[str, Tensor]:
    """Read the weights, or the optimizers' tensors, of a checkpoint, as this process holds them.

    Of tensors that are split it reads this process's part, and all others whole.
    """
    parameters = as_dtensors(model, dict(model.named_parameters()))
    reader = HuggingFaceStorageReader(str(path))
    state = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if is_optimizer_name(name) != optimizer:
            continue
        p, dtype = find_parameter(parameters, name), stored.properties.dtype
        if isinstance(p, DTensor) and p.shape == stored.size:
            state[name] = torch.empty_like(p, dtype=dtype, requires_grad=False)
        else:
            state[name] = torch.empty(stored.size, dtype=dtype)
    try:
        dcp.load(state, storage_reader=reader)
    except CheckpointException as error:
        advice = f"{path} cannot be read: all processes must see it, on one file system"
        raise user_error(error, advice) from None
    stacks = local_expert_stacks(model)
    for name, value in state.items():
        stack, _ = find_parameter(stacks, name) or (None, None)
        if stack is not None:
            state[name] = as_local_stack(value, stack)
    return state


def as_local_stack(value: Tensor, stack: nn.Parameter) -> Tensor:
    """Undo `as_dtensor`: return this rank's experts (E/P, ...) of (E, ...), sharded like
    `stack`.
    """
    local = to_local(value)
    if isinstance(stack, DTensor) and local.shape == to_local(stack).shape:
        return DTensor.from_local(local, stack.device_mesh, stack.placements, run_check=False)
    return local


def as_dtensors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with each stack of this rank's experts (E/P, ...) as a DTensor (E, ...).

    `state`: tensors by name, such as model.state_dict() or checkpoint.optimizer_tensors(). A tensor
    without the name or the shape of such a stack is returned as it is; the other shards of FSDP and
    those of tensor parallelism are DTensors already.
    """
    stacks, result = local_expert_stacks(model), {}
    for name, value in state.items():
        stack, group = find_parameter(stacks, name) or (None, None)
        if stack is not None and value.shape == stack.shape:
            value = as_dtensor(value, stack, group)
        result[name] = value
    return result


def as_dtensor(value: Tensor, stack: nn.Parameter, group: dist.ProcessGroup) -> DTensor:
    """Return the DTensor (E, ...) of which this process has `value`, shaped like `stack`."""
    device = value.device.type
    if isinstance(stack, DTensor):  # each expert is also sharded by FSDP, between its replicas
        groups = [stack.device_mesh.get_group(), group]
        ranks = torch.arange(dist.get_world_size()).view(-1, dist.get_world_size(group))
        mesh = DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("fsdp", "ep"))
        placements = [*stack.placements, Shard(0)]
    else:
        mesh = DeviceMesh.from_group(group, device)
        placements = [Shard(0)]
    return DTensor.from_local(to_local(value.detach()), mesh, placements, run_check=False)


def find_parameter(by_parameter: dict, key: str):
    """Return the entry for the parameter that a key names, or None.

    Keys are names of weights ("blocks.0.mlp.up") and of optimizers' tensors
    ("Muon/blocks.0.mlp.up/momentum_buffer").
    """
    for name in key.split("/"):
        if name in by_parameter:
            return by_parameter[name]
    return None


def is_optimizer_name(name: str) -> bool:
    """Return whether a name is of an optimizer's tensor or of random state, not of a weight."""
    return "/" in name


def user_error(error: CheckpointException, advice: str) -> BaseException:
    """Return what to raise for a failure of one process, which DCP reports on all of them.

    A refusal of the file system becomes a UserError with `advice`; a bug stays as it is, with its
    traceback.
    """
    rank, (exception, _) = next(iter(error.failures.items()))
    if isinstance(exception, (OSError, SafetensorError)):
        return UserError(f"process {rank}, {exception}: {advice}")
    return error


# ---- shards to plain files ---------------------------------------------------------------------


def merge(shards: Path, folder: Path) -> None:
    """Write the plain files of the tensors in `shards`.

    Raises SafetensorError, OSError or CheckpointException if a file cannot be read or written.
    """
    reader = HuggingFaceStorageReader(str(shards))
    metadata = reader.read_metadata()
    reader.read_metadata = lambda: metadata  # each load below would read all headers again
    weights, optimizer = {}, {}
    for name, stored in metadata.state_dict_metadata.items():
        tensors = optimizer if is_optimizer_name(name) else weights
        tensors[name] = stored
    model_file, optimizer_file, _ = checkpoint.FILES
    write_plain(reader, weights, folder / model_file)
    write_plain(reader, optimizer, folder / optimizer_file)


def write_plain(
    reader: HuggingFaceStorageReader, tensors: dict[str, TensorStorageMetadata], file: Path
) -> None:
    """Write the bytes that safetensors' save_file would write, CHUNK_BYTES or a tensor at a
    time.
    """
    # Safetensors orders tensors by dtype, the widest first: let it order a header of empty tensors.
    empty = {name: torch.empty(0, dtype=t.properties.dtype) for name, t in tensors.items()}
    header = json.loads(serialize(empty)[8:])
    end = 0
    for name, entry in header.items():
        size, dtype = tensors[name].size, tensors[name].properties.dtype
        start, end = end, end + size.numel() * dtype.itemsize
        entry |= {"shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunk_number(name: str) -> int:
        return header[name]["data_offsets"][0] // CHUNK_BYTES

    with file.open("wb") as plain:
        plain.write(len(text).to_bytes(8, "little") + text)
        for _, names in groupby(header, key=chunk_number):
            chunk = {}
            for name in names:
                chunk[name] = torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype)
            with warnings.catch_warnings(action="ignore"):  # that one process loads alone
                dcp.load(chunk, storage_reader=reader, no_dist=True)
            for value in chunk.values():
                plain.write(value.reshape(-1).view(torch.uint8).numpy())
