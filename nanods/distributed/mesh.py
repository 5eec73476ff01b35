"""The mesh of a run: the axes along which its processes (GPUs) split the work, and their sizes.

Training and planning share one spelling, that of the flag --mesh: `dp=2,ep=2`.

    axis    splits                                       each process holds
    dp      the batch                                    the whole model
    fsdp    the batch, weights, gradients and            1 / fsdp of the model
            optimizer state
    ep      the batch, experts                           n_expert / ep experts, the rest whole
    tp      attention heads and hidden units of MLPs     n_head / tp heads, the rest whole

A mesh has one axis, or ep beside dp or fsdp. In dp=2,ep=2 each group of two processes holds all
experts, and the two groups are replicas. In fsdp=2,ep=2 the four processes shard the weights
outside the experts, and each expert is sharded between the two processes that hold it.

Nothing here starts or needs torch.distributed. Pinned by tests/distributed/test_meshes.py.
"""

import math
from dataclasses import dataclass
from typing import Self

from nanods.errors import UserError

KINDS = ("dp", "ep", "dp,ep", "fsdp", "fsdp,ep", "tp")  # the meshes that nanods can build
MAX_PROCESSES = 1 << 16


@dataclass(frozen=True)
class Mesh:
    """A mesh of processes: the names of its axes, outermost first, and their sizes."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, **sizes: int) -> Self:
        """Return the mesh with these axes: `Mesh.of(dp=2, ep=2)`."""
        return cls(tuple(sizes), tuple(sizes.values()))

    @classmethod
    def parse(
        cls, text: str | None, world_size: int | None = None, n_expert: int | None = None
    ) -> Self:
        """Return the mesh that `text` spells, such as "dp=2,ep=2".

        A `text` of None is dp over all `world_size` processes. A `world_size` or `n_expert` of None
        is not checked. Raises UserError if the text is not such a spelling, if the mesh is not for
        `world_size` processes, or if `n_expert` experts do not divide over its ep axis.
        """
        if text is None:
            return cls.of(dp=world_size or 1)
        sizes = {}
        try:
            for part in text.split(","):
                axis, size = part.split("=")
                if axis in sizes:
                    raise UserError(f"--mesh {text}: {axis} is there twice; give each axis once")
                sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"--mesh {text}: write it as dp=2 or dp=2,ep=2") from None
        mesh = cls.of(**sizes)
        if mesh.kind not in KINDS or min(mesh.sizes) < 1 or mesh.world_size > MAX_PROCESSES:
            choices = ", ".join(kind.replace(",", "=N,") + "=N" for kind in KINDS)
            raise UserError(
                f"--mesh {text}: the choices are {choices}, with each N at least 1, for up to "
                f"{MAX_PROCESSES:,} processes"
            )
        if world_size is not None and mesh.world_size != world_size:
            present = "there is 1" if world_size == 1 else f"there are {world_size}"
            raise UserError(
                f"--mesh {text} needs {mesh.world_size} processes, but {present}: start them with "
                f"make ... PROCS={mesh.world_size}, or python -m nanods.distributed.launch "
                f"--nproc-per-node {mesh.world_size} train.py ..."
            )
        if n_expert and mesh.ep > 1 and (n_expert == 1 or n_expert % mesh.ep):
            multiple = max(2, math.ceil(n_expert / mesh.ep)) * mesh.ep
            experts = "1 expert does" if n_expert == 1 else f"{n_expert} experts do"
            raise UserError(
                f"--mesh {text}: {experts} not divide over {mesh.ep} processes; "
                f"choose an ep that divides them, or --moe.n-expert {multiple}"
            )
        return mesh

    def __str__(self) -> str:
        """Return the spelling that --mesh reads."""
        return ",".join(f"{axis}={size}" for axis, size in zip(self.axes, self.sizes, strict=True))

    @property
    def kind(self) -> str:
        """Return the axes without their sizes, one of KINDS: "dp,ep"."""
        return ",".join(self.axes)

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return math.prod(self.sizes)

    @property
    def dp(self) -> int:
        return self.size("dp")

    @property
    def fsdp(self) -> int:
        """Return the size of the fsdp axis. It is 1 in fsdp=1,ep=4, which FSDP shards:
        `is_fsdp`.
        """
        return self.size("fsdp")

    @property
    def ep(self) -> int:
        return self.size("ep")

    @property
    def tp(self) -> int:
        return self.size("tp")

    def size(self, axis: str) -> int:
        """Return the size of an axis, 1 if the mesh does not have it."""
        return self.sizes[self.axes.index(axis)] if axis in self.axes else 1

    @property
    def batch_shards(self) -> int:
        """Return the number of parts of the batch: the processes of a tp group read the same
        one.
        """
        return self.world_size // self.tp

    @property
    def is_fsdp(self) -> bool:
        """Return whether FSDP shards the weights."""
        return "fsdp" in self.axes

    @property
    def is_sharded(self) -> bool:
        """Return whether no process holds the whole model."""
        return self.world_size > 1 and (self.is_fsdp or self.ep > 1 or self.tp > 1)
