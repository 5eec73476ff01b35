"""An imitation of PyTorch's device "mps", Apple's GPU, on a CPU, which refuses what that refuses:

    fp64 and complex128 numbers, however they are made
    an operation on tensors of two devices (single numbers, indices and copies apart)
    `.numpy()`: `.cpu()` must come first

Which operations PyTorch has for "mps", and how precisely it computes them, is not imitated.
"""

import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

MPS, CPU = torch.device("mps"), torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "full", "empty", "arange", "rand", "randn", "randint")
MAY_MIX = {f"aten::{name}" for name in ("copy_", "index", "index_put", "index_put_")}
MAY_MIX |= {"aten::masked_fill"}  # inside of PyTorch's quantile


def imitate_apple_gpu(monkeypatch) -> None:
    """Make `.to("mps")` and `device="mps"` work, and `--device auto` choose it."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, with_mps(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "to", with_mps(Tensor.to))
    # Module.to makes new parameters then, instead of a new `.data` in those of another class.
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)


def with_mps(func):
    """Return a function that makes or moves a tensor, which now also knows "mps"."""

    @functools.wraps(func)
    def call(*args, **kwargs):
        if not any(is_mps(x) for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        args = [CPU if is_mps(x) else x for x in args]
        result = func(*args, **{name: CPU if is_mps(x) else x for name, x in kwargs.items()})
        return result if isinstance(result, AppleTensor) else AppleTensor(result.detach())

    return call


def is_mps(x) -> bool:
    return isinstance(x, str | torch.device) and str(x).startswith("mps")


class AppleTensor(Tensor):
    """A tensor "on the GPU", which holds a CPU tensor. PyTorch's C++ takes it for a CPU tensor too,
    since it knows no "mps" on other machines."""

    @staticmethod
    def __new__(cls, held: Tensor):
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {held.dtype}: MPS has no float64")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return Tensor._make_wrapper_subclass(
            cls, held.shape, **layout, dtype=held.dtype, requires_grad=held.requires_grad
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:
        return MPS

    def cpu(self) -> Tensor:
        return self.held

    def tolist(self) -> list:
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert mps:0 device type tensor to numpy: use .cpu() first")

    __array__ = numpy
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute on the CPU tensors that are held, and wrap the results."""
        wrappers, on_cpu = {}, []

        def unwrap(x):
            if isinstance(x, AppleTensor):
                wrappers[id(x.held)] = x
                return x.held
            if isinstance(x, Tensor) and x.ndim:
                on_cpu.append(x)
            return x

        def wrap(x):
            if not isinstance(x, Tensor):
                return x
            return wrappers[id(x)] if id(x) in wrappers else AppleTensor(x)  # itself: in place

        name = func._schema.name
        args, kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs or {})
        if on_cpu and name not in MAY_MIX:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        result = func(*args, **kwargs)
        if name == "aten::copy_" and id(args[0]) not in wrappers:  # into a CPU tensor
            return result
        return tree_map(wrap, result)
