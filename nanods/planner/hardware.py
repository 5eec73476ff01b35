"""What a plan counts with: memory, speed and links of GPUs, each from its maker's data sheet; and this machine's own.

FLOP/s are those of dense matrix products in bf16 (fp16 for the V100, which has none) with sums in fp32. The data sheets of H100
and H200 state twice as much, "with sparsity". NVLink counts both directions together, as they do; the RTX 4090 has PCIe 4.0 x16
instead. The network is that of the maker's own machine of 8 such GPUs, one direction, shared out among them. The figures were
written down without the sheets at hand, and checked against secondary pages, all but the networks of DGX H100 and H200.
"""

import os
import time
from dataclasses import dataclass

import torch

from nanods.errors import UserError
from nanods.training.muon import fast_bf16

NODE = 8  # GPUs in one machine, joined by NVLink


@dataclass(frozen=True)
class Device:
    name: str
    memory: float
    """Bytes; a data sheet's GB are 10^9."""
    flops: float
    """Floating-point operations in a second, at most."""
    bandwidth: float
    """Bytes that its memory gives in a second."""
    link: float
    """Bytes in a second to the others in its machine, both directions together."""
    network: float
    """Bytes in a second to other machines, one direction, each GPU's share."""
    source: str
    kind: str = "cuda"

    @property
    def room(self) -> float:
        """Bytes that a step may take: the rest is CUDA's, and what its allocator cannot use; of a CPU's as train.py leaves."""
        return room(self.kind, self.memory)


def room(kind: str, memory: float) -> float:
    """Of so many bytes on a device of this kind ("cuda" or "cpu"), those that a step may take."""
    return (0.9 if kind == "cuda" else 0.8) * memory


def sheet(
    name: str,
    memory: float,
    tflops: float,
    bandwidth: float,
    link: float,
    network: float,
    source: str,
) -> Device:
    """Memory in GB, the rest in TFLOP/s and GB/s."""
    return Device(
        name, memory * 1e9, tflops * 1e12, bandwidth * 1e9, link * 1e9, network * 1e9, source
    )


V100 = "NVIDIA V100 Tensor Core GPU data sheet (SXM2); network: DGX-1 data sheet, 4 x 100 Gb/s"
A100 = "NVIDIA A100 Tensor Core GPU data sheet (SXM4); network: DGX A100 data sheet, 8 x 200 Gb/s"
H100 = "NVIDIA H100 Tensor Core GPU data sheet (SXM5), half its figure with sparsity; network: DGX H100 data sheet, 8 x 400 Gb/s"
H200 = "NVIDIA H200 Tensor Core GPU data sheet (SXM), half its figure with sparsity; network: DGX H200 data sheet, 8 x 400 Gb/s"
ADA = "NVIDIA Ada GPU architecture white paper, appendix A (GeForce RTX 4090); network: an assumption, 100 Gb/s for 8 of them"

GPUS = {
    gpu.name: gpu
    for gpu in (
        sheet("v100-32gb", 32, 125, 900, 300, 6.25, V100),
        sheet("a100-40gb", 40, 312, 1555, 600, 25, A100),
        sheet("a100-80gb", 80, 312, 2039, 600, 25, A100),
        sheet("h100-80gb", 80, 989.5, 3350, 900, 50, H100),
        sheet("h200-141gb", 141, 989.5, 4800, 900, 50, H200),
        sheet("rtx4090-24gb", 24, 165.2, 1008, 64, 1.5625, ADA),
    )
}


def named(name: str) -> Device:
    """The GPU of that name. Raises UserError with the list of them."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: not in the table; there are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def main_memory() -> float:
    """Bytes of this machine's memory that a process of a run may plan with: half, as other programs run here, shared out
    among those that torchrun started on it."""
    return (
        os.sysconf("SC_PHYS_PAGES")
        * os.sysconf("SC_PAGE_SIZE")
        / 2
        / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


def device_here() -> tuple[str, float]:
    """The kind of the device that trains here, and the bytes that a process may plan with: a GPU's, or of main memory."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_properties(0).total_memory
    return "cpu", main_memory()


def this_machine() -> tuple[Device, int]:
    """What stands here, and how many of it: CUDA's GPUs, or the CPU with half of the memory, as train.py counts it.

    Its speed is measured, by the largest of a few matrix products: a second or less.
    """
    kind, memory = device_here()
    device = torch.device(kind)
    if kind == "cuda":
        name, count, link = torch.cuda.get_device_name(0), torch.cuda.device_count(), 64e9
    else:
        name, count, link = f"this CPU (threads: {torch.get_num_threads()})", 1, 0.0
    like = next(
        (gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name.lower().replace(" ", "")),
        None,
    )
    link, network, bandwidth = (
        (like.link, like.network, like.bandwidth) if like else (link, 0.0, 0.0)
    )
    return Device(
        name, memory, measured_flops(device), bandwidth, link, network, "measured here", device.type
    ), count


def measured_flops(device: torch.device) -> float:
    """Floating-point operations in a second, of a matrix product in the dtype that train.py would choose."""
    n, best = (8192 if device.type == "cuda" else 1024), float("inf")
    a = torch.ones(
        n, n, device=device, dtype=torch.bfloat16 if fast_bf16(device) else torch.float32
    )
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
