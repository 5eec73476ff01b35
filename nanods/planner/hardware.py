"""GPUs that the planner knows, from their makers' data sheets, and the machine that it runs on.

FLOP/s are those of dense bf16 matrix products with fp32 accumulation (fp16 for the V100, which has
no bf16). The data sheets of H100 and H200 state twice as much, "with sparsity". NVLink's speed
counts both directions together, as the data sheets do. The RTX 4090 has PCIe 4.0 x16 instead. The
network is that of the maker's own machine of 8 such GPUs, one direction, divided among them. The
figures were written down without the sheets at hand, and checked against secondary pages, except
the networks of DGX H100 and H200.
"""

import os
import time
from dataclasses import dataclass

import torch

from nanods.errors import UserError
from nanods.flags import from_environment
from nanods.training.muon import fast_bf16

GPUS_PER_NODE = 8  # GPUs in one machine, connected by NVLink


@dataclass(frozen=True)
class Device:
    name: str
    memory: float
    """Bytes; a data sheet's GB are 10^9."""
    flops: float
    """Floating-point operations per second, at most."""
    bandwidth: float
    """Bytes per second from its memory."""
    link: float
    """Bytes per second to the other GPUs of its machine, both directions together. 0: no others."""
    network: float
    """Bytes per second to other machines, one direction, divided among the GPUs of a machine."""
    source: str
    kind: str = "cuda"

    @property
    def usable_memory(self) -> float:
        """Bytes that a step may take."""
        return usable_memory(self.kind, self.memory)


def usable_memory(kind: str, memory: float) -> float:
    """Return the bytes that a step may take of the memory of a "cuda" or "cpu" device.

    CUDA and its allocator need the rest of a GPU. On a CPU 80% is the limit that train.py keeps to.
    """
    return (0.9 if kind == "cuda" else 0.8) * memory


def data_sheet(
    name: str,
    memory: float,
    tflops: float,
    bandwidth: float,
    link: float,
    network: float,
    source: str,
) -> Device:
    """Return a device from figures in GB (memory), TFLOP/s and GB/s (the rest)."""
    return Device(
        name, memory * 1e9, tflops * 1e12, bandwidth * 1e9, link * 1e9, network * 1e9, source
    )


V100 = "NVIDIA V100 Tensor Core GPU data sheet (SXM2); network: DGX-1 data sheet, 4 x 100 Gb/s"
A100 = "NVIDIA A100 Tensor Core GPU data sheet (SXM4); network: DGX A100 data sheet, 8 x 200 Gb/s"
H100 = (
    "NVIDIA H100 Tensor Core GPU data sheet (SXM5), half its figure with sparsity; "
    "network: DGX H100 data sheet, 8 x 400 Gb/s"
)
H200 = (
    "NVIDIA H200 Tensor Core GPU data sheet (SXM), half its figure with sparsity; "
    "network: DGX H200 data sheet, 8 x 400 Gb/s"
)
ADA = (
    "NVIDIA Ada GPU architecture white paper, appendix A (GeForce RTX 4090); "
    "network: an assumption, 100 Gb/s for 8 of them"
)

GPUS = {
    gpu.name: gpu
    for gpu in (
        data_sheet("v100-32gb", 32, 125, 900, 300, 6.25, V100),
        data_sheet("a100-40gb", 40, 312, 1555, 600, 25, A100),
        data_sheet("a100-80gb", 80, 312, 2039, 600, 25, A100),
        data_sheet("h100-80gb", 80, 989.5, 3350, 900, 50, H100),
        data_sheet("h200-141gb", 141, 989.5, 4800, 900, 50, H200),
        data_sheet("rtx4090-24gb", 24, 165.2, 1008, 64, 1.5625, ADA),
    )
}


def find_gpu(name: str) -> Device:
    """Return the GPU of that name. Raises UserError with the list of known names."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: not in the table; there are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def main_memory() -> float:
    """Return the bytes of main memory that one process of a run may plan with.

    This is half of the machine's memory, since other programs run too, divided among the processes
    that torchrun started on this machine.
    """
    if hasattr(os, "sysconf"):
        half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    else:
        half = 4 * 2**30  # Windows does not say without further packages: assume 8 GiB
    return half / from_environment("LOCAL_WORLD_SIZE", 1)


def local_device() -> tuple[str, float]:
    """Return the kind of device that trains here, "cuda" or "cpu", and its memory in bytes."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(0).total_memory
    return "cpu", main_memory()


def this_machine() -> tuple[Device, int]:
    """Return the device of this machine and how many there are: CUDA's GPUs, or one CPU.

    Its speed is measured with a few large matrix products, which takes a second or less. A GPU that
    is not in the table is assumed to have the links of an RTX 4090.
    """
    kind, memory = local_device()
    link, network, bandwidth, source = 0.0, 0.0, 0.0, "measured here"
    if kind == "cuda":
        name, number = torch.cuda.get_device_name(0), torch.cuda.device_count()
        for gpu in GPUS.values():  # a GPU of the table: "a100" in "nvidiaa100-sxm4-80gb"
            if gpu.name.split("-")[0] in name.lower().replace(" ", ""):
                link, network, bandwidth = gpu.link, gpu.network, gpu.bandwidth
                break
        else:
            gpu = GPUS["rtx4090-24gb"]
            link, network = gpu.link, gpu.network
            source += f"; its links to other GPUs are assumed to be those of {gpu.name}"
    else:
        name, number = f"this CPU (threads: {torch.get_num_threads()})", 1
    flops = measure_flops(torch.device(kind))
    return Device(name, memory, flops, bandwidth, link, network, source, kind), number


def measure_flops(device: torch.device) -> float:
    """Return the FLOP/s of a matrix product in the dtype that train.py would choose."""
    n, best = (8192 if device.type == "cuda" else 1024), float("inf")
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    a = torch.ones(n, n, device=device, dtype=dtype)
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
