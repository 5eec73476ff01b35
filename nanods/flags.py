"""The range of every numeric flag, of every program, checked before work begins.

A number out of range would end in an overflow after hours, or in a loss that never moves. A new
numeric flag needs one more entry in `RANGES`, and a number that is read from the environment one in
`ENVIRONMENT_RANGES`.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TypeVar

import tyro

from nanods.errors import UserError

Args = TypeVar("Args")

COUNT = (1, 10**9)  # steps, tokens to generate
SIZE = (1, 2**24)  # dimensions of tensors: the products of two fit in 64 bits
RATE = (1e-12, 1e38)  # fp32 holds both ends
WEIGHT = (0, 1e6)  # of a term of the loss
ANY = (-float("inf"), float("inf"))  # of a flag that is not in RANGES yet; a test names it

RANGES: dict[str, tuple[float, float]] = {
    # train.py
    "steps": COUNT,
    "batch-size": SIZE,
    "micro-batch": SIZE,
    "eval-every": COUNT,
    "save-every": COUNT,
    "keep-checkpoints": COUNT,
    "lr": RATE,
    "warmup": (0, 1),
    "decay": (0, 1),
    "short-context": (0, 1),
    "short-parts": (1, 1024),
    "momentum": (0, 0.99999),
    "weight-decay": (0, 1000),
    "clip": (1e-12, 1e12),
    "expert-lr": RATE,
    "expert-every": (1, 10**6),
    "init-noise": (0, 1000),
    "ewc-lambda": (0, 1e12),
    "ewc-sequences": (1, 10**6),
    "quantize-from": (0, 10**9),
    "distill-weight": (0, 1),
    "distill-temperature": (0.01, 1e4),
    "distill-cosine": WEIGHT,
    "val-fraction": (0.0001, 0.9),
    "eval-tokens": (1, 10**12),
    "seed": (0, 2**32 - 1),  # random streams take seed x 1,000,003 + row in 64 bits
    "n-layer": (1, 10_000),
    "n-head": (1, 2**16),
    "n-embd": (2, 2**20),
    "hidden-ratio": (1, 1024),
    "context-length": SIZE,
    "conv-width": (1, 64),
    "vocab-size": SIZE,
    "rope-base": (1, 1e12),
    "query-gain": (1e-6, 10_000),
    "attention.top-k": SIZE,
    "attention.block-size": SIZE,
    "attention.top-blocks": SIZE,
    "attention.beam": SIZE,
    "attention.fan-out": (2, 2**24),
    "moe.n-expert": (1, 2**16),
    "moe.top-k": (1, 2**16),
    "moe.capacity-factor": (1e-6, 1e6),
    "moe.balance-coefficient": WEIGHT,
    "moe.z-coefficient": WEIGHT,
    "moe.bias-rate": WEIGHT,
    "multimodal.width": (1, 2**20),
    "multimodal.temperature": (0.01, 1e6),
    "multimodal.image-size": (1, 2**16),
    "multimodal.patch-size": (1, 2**16),
    "multimodal.frames": SIZE,
    "multimodal.patch-frames": SIZE,
    "multimodal.entropy-coefficient": WEIGHT,
    "multimodal.min-experts": (1, 2**16),
    # sample.py
    "num-samples": (1, 10**6),
    "max-new-tokens": COUNT,
    "temperature": (0, 1e6),
    "top-k": SIZE,
    "top-p": (1e-9, 1),
    "top": (1, 10**6),
    # nanods/evaluate.py
    "examples": (2, 10**6),
    # --plan
    "gpus": (1, 2**16),
    "tokens": (1, 1e20),
    "mfu": (1e-6, 1),
    # nanods/distributed/launch.py
    "nproc-per-node": (1, 1024),
    "nnodes": (1, 2**16),
    "node-rank": (0, 2**16),
    "max-restarts": (0, 10_000),
    "master-port": (1, 65_535),
    "monitor-interval": (0, 3600),
    # nanods/serving
    "port": (0, 65_535),
    "grpc-port": (0, 65_535),
    "slots": (1, 4096),
    "max-waiting": (1, 10**6),
    "max-body": (1, 1024),
    "timeout": (0.001, 86_400),
    "grace": (0, 86_400),
    "canary-minutes": (0, 10_080),
    "slow-seconds": (0.001, 86_400),
    # nanods/bench
    "seeds": (1, 1000),
    "jobs": (1, 1024),
    "near-steps": COUNT,
    "grow-steps": COUNT,
    "far-steps": COUNT,
    "embedding-lr": RATE,
    "held-out": SIZE,
    "lines": COUNT,
    "per-class": (4, 100_000),
}
"""The smallest and the largest value of each flag."""

ENVIRONMENT_RANGES = {
    "NANODS_TIMEOUT": (1, 10**6),  # seconds
    # Launchers set these (nanods/distributed/rendezvous.py).
    "WORLD_SIZE": (1, 2**16),
    "LOCAL_WORLD_SIZE": (1, 2**16),
    "RANK": (0, 2**16),
    "LOCAL_RANK": (0, 2**16),
    "MASTER_PORT": (0, 65_535),
}


def check_ranges(flags: Mapping[str, object]) -> None:
    """Raise ValueError, naming the flag, if a number among the values is out of its range.

    `flags`: value by the name of the flag. Values that are no numbers are ignored; of a tuple every
    element is checked.
    """
    for name, value in flags.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            low, high = RANGES.get(name, ANY)
            given = f"{number:g}" if isinstance(number, float) else number
            if number != number:  # nan
                raise ValueError(f"--{name} {given}: must be a number")
            if number < low:
                least = f"above 0, {low:g} or more" if 0 < low < 1 else f"at least {low:g}"
                raise ValueError(f"--{name} {given}: must be {least}")
            if number > high:
                most = f"{high:,}" if isinstance(high, int) else f"{high:g}"
                raise ValueError(f"--{name} {given}: must be at most {most}")


def parse_args(args_class: type[Args], description: str) -> Args:
    """Return the command line as the dataclass `args_class`. Raises UserError for a number out of
    range."""
    args = tyro.cli(args_class, description=description)
    refuse_out_of_range(args)
    return args


def refuse_out_of_range(args: object) -> None:
    """Raise UserError for a field of the dataclass `args` that is out of range."""
    try:
        check_ranges({name.replace("_", "-"): value for name, value in asdict(args).items()})
    except ValueError as error:
        raise UserError(str(error)) from None


def from_environment(name: str, default: float) -> float:
    """Return the number in an environment variable, of the type of the default. Raises UserError
    for a text that is none, and for a number out of range."""
    text = os.environ.get(name) or default
    low, high = ENVIRONMENT_RANGES[name]
    try:
        number = type(default)(text)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        kind = "whole number" if isinstance(default, int) else "number"
        raise UserError(f"{name}={text}: must be a {kind} from {low} to {high:,}; or unset it")
    return number
