"""The processes of one run, such as those of `make train-v2 PROCS=2 ARGS="--mesh dp=2"`.

Each process reads other examples of the batch (with tp, the same ones). Together they take the step
that one process would take with the same micro-batches one after another. What each axis of the
mesh splits, and what it communicates:

    axis   file                 splits                      communicates
    dp     data_parallel.py     only the batch              gradients, once a step
                                                            (all-reduce)
    ep     expert_parallel.py   experts                     tokens, to their experts and back
                                                            (all-to-all)
    fsdp   fsdp.py              weights, gradients and      weights before each block (all-gather),
                                optimizer state             gradients after it (reduce-scatter)
    tp     tensor_parallel.py   attention heads and         activations, twice a block in each
                                hidden units of MLPs        direction (all-reduce)

mesh.py says how axes combine, rendezvous.py how the processes connect and exit, launch.py how they
start, checkpoint.py how they save and restore a sharded model.

The loss of a step is the mean over all processes, so its gradient is the sum of their gradients
divided by their number.

Left out on purpose: tp beside another axis. Tested over gloo, on CPUs; never run on several GPUs.
Pinned by tests/distributed/test_meshes.py: in fp64 two and four processes make the steps of one, to
1e-10.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanods.distributed.data_parallel import average_gradients
from nanods.distributed.expert_parallel import split_experts
from nanods.distributed.fsdp import shard_fsdp
from nanods.distributed.mesh import Mesh
from nanods.distributed.rendezvous import rendezvous
from nanods.distributed.sharding import broadcast_parameters
from nanods.distributed.tensor_parallel import split_heads
from nanods.errors import UserError
from nanods.flags import from_environment


class ProcessGroups:
    """This process's rank, the mesh of all processes, and what they do together.

    In a run of one process there is nothing to communicate, and every method returns its input or
    does its work alone.
    """

    def __init__(
        self, mesh: str | None = None, n_expert: int = 1, mesh_reason: str = "as requested"
    ) -> None:
        """Connect to the other processes of the run.

        `mesh_reason` says why this mesh was chosen, for the log. Raises UserError if the mesh does
        not fit the number of processes or of experts, or if a process does not connect.
        """
        self.world_size = from_environment("WORLD_SIZE", 1)
        self.rank = from_environment("RANK", 0)
        self.is_main_process = self.rank == 0
        self.mesh = Mesh.parse(mesh, self.world_size, n_expert)
        self.mesh_reason = mesh_reason
        self.batch_shards = self.mesh.batch_shards
        self.is_sharded = self.mesh.is_sharded
        self.device_mesh: DeviceMesh | None = None
        self.restarted = False  # whether torchrun started the processes again after a failure
        self.communication_seconds = 0.0  # of the last `average_gradients`
        if self.world_size > 1:
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            if kind == "cuda":
                torch.cuda.set_device(from_environment("LOCAL_RANK", 0))
            self.restarted = rendezvous("nccl" if kind == "cuda" else "gloo")
            self.device_mesh = init_device_mesh(
                kind, self.mesh.sizes, mesh_dim_names=self.mesh.axes
            )
        if not self.is_main_process:
            # Only the main process prints to stdout, so that each line appears once. Errors of all
            # processes go to stderr. The file stays open until the process exits.
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115

    def __str__(self) -> str:
        if self.world_size == 1:
            return "1 process"
        mesh, backend = f"{self.mesh} ({self.mesh_reason})", dist.get_backend()
        return f"{self.world_size} processes, {mesh}, over {backend}"

    @property
    def device(self) -> str:
        """Return the type of device whose tensors the backend communicates."""
        return "cuda" if self.world_size > 1 and dist.get_backend() == "nccl" else "cpu"

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Return this process's group along an axis, or None if the mesh does not have the axis."""
        if self.device_mesh is None or axis not in self.mesh.axes:
            return None
        return self.device_mesh[axis].get_group()

    def destroy(self) -> None:
        """Disconnect from the other processes."""
        if self.world_size > 1:
            dist.destroy_process_group()

    # ---- the batch, the model and its gradients ------------------------------------------------

    def local_batch(self, batch_size: int) -> slice:
        """Return which examples of the batch this process reads.

        Raises UserError if the batch does not divide over the processes.
        """
        if batch_size % self.batch_shards:
            raise UserError(
                f"--batch-size {batch_size} does not divide over {self.batch_shards} processes: "
                f"choose a multiple of {self.batch_shards}"
            )
        size = batch_size // self.batch_shards
        start = self.rank // self.mesh.tp * size
        return slice(start, start + size)

    def shard_model(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """Return this process's part of a model, on its device.

        Call it before the optimizers are created. If the mesh shards the model, the weights are
        those of rank 0, in main memory; of the other ranks' models only the shapes are read, so
        they can be on the meta device. FSDP gathers weights in `dtype`, the dtype of autocast
        (None: the weights' own).
        """
        if not self.is_sharded:
            return model.to(device)
        full_state = {}
        if self.is_main_process:
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                full_state[name] = value.detach()
        model = model.to("meta")
        if self.mesh.ep > 1:
            split_experts(model, self.group("ep"))
        if self.mesh.is_fsdp:
            all_processes = init_device_mesh(self.device, (self.world_size,))
            expert_replicas = self.device_mesh["fsdp"] if self.mesh.ep > 1 else None
            shard_fsdp(model, all_processes, expert_replicas, dtype)
        if self.mesh.tp > 1:
            split_heads(model, self.device_mesh["tp"])
        model = model.to_empty(device=device)
        broadcast_parameters(model, full_state)
        return model

    def average_gradients(self, model: nn.Module) -> None:
        """Average the gradients over all processes, in place, and set `communication_seconds`.

        The seconds include waiting for other processes, but not the work of FSDP, which averages
        the gradients of its shards while backward runs.
        """
        if self.batch_shards > 1:
            start = time.perf_counter()
            average_gradients(model, self.world_size, self.group("dp"))
            self.communication_seconds = time.perf_counter() - start

    # ---- agreement -----------------------------------------------------------------------------

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum x over all processes, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def average_metrics(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the metrics of the whole batch from those of each process.

        Metrics are scalars and are averaged in fp64, except those whose name starts with "load":
        they count tokens, have any shape, and are summed.
        """
        if self.batch_shards == 1:
            return metrics
        names = [name for name in metrics if not name.startswith("load")]
        values = torch.stack([metrics[name].cpu().double() for name in names])
        means = self.all_reduce_sum(values.to(self.device)) / self.world_size
        averages = dict(zip(names, means.unbind(), strict=True))
        result = {}
        for name, value in metrics.items():
            result[name] = (
                averages[name] if name in averages else self.all_reduce_sum(value.clone())
            )
        return result

    def any_process(self, flag: bool) -> bool:
        """Return whether `flag` is true in at least one process. Every process must call it."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)) > 0)

    def min_over_processes(self, number: int) -> int:
        """Return the smallest `number` of all processes. Every process must call it."""
        if self.world_size == 1:
            return number
        smallest = torch.tensor(number, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def on_main_process(self, work: Callable[[], int | None]) -> int:
        """Run `work` on the main process while the others wait; return its result on all of them.

        A result of None becomes 0. If `work` raises, every process raises: the main process the
        same exception, the others a UserError.
        """
        result_and_failed = torch.zeros(2, dtype=torch.long, device=self.device)
        exception = None
        if self.is_main_process:
            try:
                result_and_failed[0] = work() or 0
            except BaseException as error:  # bugs too: the other processes must not wait for ever
                result_and_failed[1], exception = 1, error
        if self.world_size > 1:
            dist.broadcast(result_and_failed, 0)
        result, failed = result_and_failed.tolist()
        if failed:
            raise exception or UserError("the main process failed: see its error message")
        return result
