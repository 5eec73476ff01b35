"""Several processes, one run: `make train-v2 PROCS=2 ARGS="--mesh dp=2"` (how they start, meet and end: launch.py, meeting.py).

Each process holds other items of the batch (with tp, the same); together they take the step that one process would take with
the same micro-batches one after another. What is split, and what travels for it:

    dp    nothing: each holds the whole model              gradients, added up once a step
    ep    the experts: process r owns E / ep of them       rows of tokens, to their experts and back; other gradients
          (nanods/distributed/expert_parallel.py)
    fsdp  everything: each keeps 1 / fsdp of all weights,  weights, before each block; gradients, after it
          gradients, optimizer state (sharded.py)
    tp    the heads, and an MLP's hidden numbers: each     sums of tokens, twice a block and way
          has H / tp of them, and all the tokens

alone, or ep beside dp or fsdp, as dp=2,ep=2: then the processes of one ep group own all the experts between them, and each
group is a copy; fsdp=2,ep=2 shards all the rest among the four, and each expert among the two that own it.

The loss is the mean over all processes, so a gradient is the sum of theirs over their number. Of an expert that one process
owns, its gradient already is the sum over its ep group, since the group's tokens came to it; it is added up over the copies
alone, and divided by the number of *all* processes. Muon's orthogonalisation, which every process would repeat, is dealt out.

Gradients are added up after the last micro-batch, in buckets, by all_reduce: what DistributedDataParallel does while backward
still runs. Left out: that overlap (it would need a second rule for gradient caching and for experts); tp beside another.
Tested on gloo, CPU against CPU; never run on several GPUs.

Pinned by tests/distributed/test_meshes.py: in fp64 two and four processes make the steps of one, to 1e-10.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nanods.distributed.expert_parallel import expert_parameters, split_experts
from nanods.distributed.fsdp import (
    broadcast_parameters,
    orthogonalise_shards,
    shard_fsdp,
    split_heads,
)
from nanods.distributed.mesh import Mesh
from nanods.distributed.rendezvous import rendezvous
from nanods.errors import UserError
from nanods.training.muon import orthogonalise, products_dtype

BUCKET = 1 << 22  # numbers added up at a time: large enough to pay, small beside the model


class ProcessGroups:
    """The processes of a run, this one among them. Of one process, every method does nothing."""

    def __init__(self, mesh: str | None = None, experts: int = 1, why: str = "as asked") -> None:
        """Joins the other processes of the run. UserError for a mesh that does not fit them or the number of experts."""
        self.mesh_reason = why
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.mesh = Mesh.parse(mesh, self.world_size, experts)
        self.ep, self.tp = self.mesh.ep, self.mesh.tp
        self.batch_shards = self.mesh.batch_shards
        self.rank, self.device_mesh, self.restarted = int(os.environ.get("RANK", 0)), None, False
        if self.world_size > 1:
            if (kind := "cuda" if torch.cuda.is_available() else "cpu") == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            self.restarted = rendezvous("nccl" if kind == "cuda" else "gloo")
            self.device_mesh = init_device_mesh(
                kind, self.mesh.sizes, mesh_dim_names=self.mesh.axes
            )
        self.fsdp = self.world_size > 1 and self.mesh.is_fsdp
        self.is_sharded = self.mesh.is_sharded
        self.is_main_process, self.communication_seconds = self.rank == 0, 0.0
        if not self.is_main_process:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  one voice is enough; mistakes go to stderr

    def __str__(self) -> str:
        if self.world_size == 1:
            return "1 process"
        return f"{self.world_size} processes, {self.mesh} ({self.mesh_reason}), over {dist.get_backend()}"

    @property
    def mesh_sizes(self) -> dict[str, int]:
        return dict(zip(self.mesh.axes, self.mesh.sizes, strict=True))

    def group(self, name: str) -> dist.ProcessGroup | None:
        """This process's group along an axis of the mesh; None where it has none."""
        return (
            self.device_mesh[name].get_group()
            if self.device_mesh is not None and name in self.mesh.axes
            else None
        )

    def local_batch(self, batch_size: int) -> slice:
        """Which items of the batch are this process's. UserError where they do not divide."""
        if batch_size % self.batch_shards:
            raise UserError(
                f"--batch-size {batch_size} does not divide among {self.batch_shards} processes: choose a multiple"
            )
        own, number = batch_size // self.batch_shards, self.rank // self.tp
        return slice(number * own, (number + 1) * own)

    def shard_model(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """What this process is to hold of a model, on its device; before its optimizers are made.

        Where no process is to hold all of it, the first's is the model, in main memory, and of the others' only shapes count:
        they may be on the meta device. Weights that travel (fsdp) do so in `dtype`, that of autocast; None: as they are.
        """
        if not self.is_sharded:
            return model.to(device)
        named = (*model.named_parameters(), *model.named_buffers()) if self.is_main_process else ()
        whole, model = {name: x.detach() for name, x in named}, model.to("meta")
        if self.ep > 1:
            split_experts(model, self.group("ep"))
        if self.fsdp:
            twins = self.device_mesh["fsdp"] if self.ep > 1 else None
            shard_fsdp(model, init_device_mesh(self.device, (self.world_size,)), twins, dtype)
        if self.tp > 1:
            split_heads(model, self.device_mesh["tp"])
        broadcast_parameters(model.to_empty(device=device), whole)
        return model

    # ---- what the processes tell each other ----------------------------------------------------------------------------------

    def all_reduce_sum(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """The sum over all processes, or those of a group; in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=group)
        return x

    def average_metrics(
        self, loss: float, parts: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss of the whole batch and its parts, from those of each process: means, but loads are sums."""
        if self.batch_shards == 1:
            return loss, parts
        names = [name for name in parts if not name.startswith("load")]
        numbers = torch.stack(
            [torch.tensor(loss, dtype=torch.float64), *(parts[n].double().cpu() for n in names)]
        )
        loss, *means = (self.all_reduce_sum(numbers.to(self.device)) / self.world_size).unbind()
        loads = {
            name: self.all_reduce_sum(load.clone())
            for name, load in parts.items()
            if name.startswith("load")
        }
        return loss.item(), {
            name: loads[name] if name in loads else means[names.index(name)] for name in parts
        }

    def any_process(self, flag: bool) -> bool:
        """Whether it holds in any process: each must ask."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)) > 0)

    def min_over_processes(self, number: int) -> int:
        """The smallest that any process names."""
        if self.world_size == 1:
            return number
        told = torch.tensor(number, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return int(told)

    def on_main_process(self, work: Callable[[], int | None]) -> int:
        """Let the first process do `work` while the others wait -> the number that it gave, 0 for none, to all of them.

        Where it fails, all end: with what it raised, and the others with a UserError.
        """
        told, fault = torch.zeros(2, dtype=torch.long, device=self.device), None
        if self.is_main_process:
            try:
                told[0] = work() or 0
            except BaseException as error:  # a bug too must not leave the others waiting
                told[1], fault = 1, error
        if self.world_size > 1:
            dist.broadcast(told, 0)
        if told[1]:
            raise fault or UserError("the first process had to end: what it says is to be mended")
        return int(told[0])

    def destroy(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()

    @property
    def device(self) -> str:
        return "cuda" if self.world_size > 1 and dist.get_backend() == "nccl" else "cpu"

    # ---- gradients -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        """The gradients of the whole batch from those of each process. `spent`: seconds that it took, waiting included.

        Those of shards are the whole batch's already: they were added up while backward ran, which `spent` does not count.
        """
        if self.batch_shards == 1:
            return
        start = time.perf_counter()
        own = set(expert_parameters(model))
        whole = [p for p in model.parameters() if not isinstance(p, DTensor)]
        shared, split = ([p for p in whole if (p in own) == kind] for kind in (False, True))
        for parameters, group in ((shared, None), (split, self.group("dp"))):
            for bucket in buckets(parameters):
                grads = [p.grad for p in bucket]
                alone = (
                    len(grads) == 1 and grads[0].is_contiguous()
                )  # a large one: not copied there and back
                flat = grads[0] if alone else torch.cat([grad.flatten() for grad in grads])
                if (
                    parameters is shared or group is not None
                ):  # where there are no copies, an expert's is whole already
                    self.all_reduce_sum(flat, group)
                flat /= self.world_size
                if not alone:
                    for grad, part in zip(
                        grads, flat.split([grad.numel() for grad in grads]), strict=True
                    ):
                        grad.copy_(part.view_as(grad))
        self.communication_seconds = time.perf_counter() - start


def orthogonalise_distributed(stack: Tensor) -> Tensor:
    """muon.orthogonalise of matrices (..., R, C) that all processes hold: each does every so-many-th, and all get all, in the
    dtype in which it was computed. Of shards, see sharded.py.
    """
    if isinstance(stack, DTensor):
        return orthogonalise_shards(stack)
    rank, size, shape = dist.get_rank(), dist.get_world_size(), stack.shape
    stack = stack.flatten(0, -3)
    mine = torch.zeros(
        -(-len(stack) // size), *stack.shape[1:], dtype=products_dtype(stack), device=stack.device
    )
    some = stack[rank::size]
    if len(some):
        mine[: len(some)] = orthogonalise(some)
    parts = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).flatten(0, 1)[: len(stack)].view(shape).to(stack.dtype)


def buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in groups of about BUCKET numbers, in order. A gradient that is not there counts as zeros."""
    made, room = [], 0
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if room < p.numel():
            made.append([])
            room = max(BUCKET, p.numel())
        made[-1].append(p)
        room -= p.numel()
    return made
