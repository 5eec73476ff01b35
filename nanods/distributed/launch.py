"""Start train.py by several processes: torchrun, with all its flags.

    python -m nanods.distributed.launch --standalone --nproc-per-node 2 train.py v2-tiny

It differs from torchrun in how it exits: a UserError is one message and exit code 2, where torchrun
adds a traceback and exits with 1. It refuses a mesh that does not fit before any process starts. It
passes SIGINT and SIGTERM on to the processes, which save and stop (torchrun gives them 30 seconds,
--shutdown-timeout), and then exits with 128 plus the signal's number.

Pinned by tests/test_kill_several.py and tests/distributed/test_launch.py.
"""

import os

# Else a port in use prints stacks of C++. PyTorch reads the variable when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import signal
import socket
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import determine_local_world_size, parse_args, parse_min_max_nnodes
from torch.distributed.run import run as torchrun

from nanods.command_line import from_command_line
from nanods.distributed.mesh import Mesh
from nanods.distributed.rendezvous import first_line, refuse_port_in_use, timeout_seconds
from nanods.errors import UserError, run
from nanods.flags import check_ranges


def main() -> None:
    if os.environ["TORCH_CPP_LOG_LEVEL"] == "FATAL":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the processes inherit it, and NCCL's errors matter
    arguments = parse_args(sys.argv[1:])
    local_processes, nodes = numbers_of_processes(arguments)
    threads = max(1, (os.cpu_count() or 1) // local_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torchrun would give each process one
    sys.argv = [arguments.training_script, *arguments.training_script_args]
    if Path(sys.argv[0]).name == "train.py" and "--plan" not in sys.argv:
        config = from_command_line("Train one preset of nanods, by several processes.")
        world_size = nodes * local_processes if nodes else None
        Mesh.parse(config.mesh, world_size, config.model.moe.n_expert)
    arguments.rdzv_conf = with_timeouts(arguments.rdzv_conf)
    endpoint = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    try:
        if arguments.rdzv_endpoint and not arguments.standalone:
            exit_if_port_in_use(endpoint)
        torchrun(arguments)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        sys.exit(exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}))
    except (RendezvousError, dist.DistError) as error:
        refuse_port_in_use(error, endpoint, "--rdzv-endpoint or --master-port")
        raise UserError(
            f"the machines did not connect at {endpoint} within {timeout_seconds():g} s "
            f"({first_line(error)}): run the same command on each of --nnodes {arguments.nnodes} "
            "machines, with --rdzv-endpoint a free port of the first machine. "
            "NANODS_TIMEOUT=900 makes them wait 900 s"
        ) from None


def numbers_of_processes(arguments: Namespace) -> tuple[int, int | None]:
    """Return the processes on this machine and the number of machines, None where it is left open
    (--nnodes 1:2). Raises UserError for a number out of range."""
    try:
        local_processes = determine_local_world_size(arguments.nproc_per_node)
        fewest, most = parse_min_max_nnodes(arguments.nnodes)
        flags = {"nproc-per-node": local_processes, "nnodes": (fewest, most)}
        for name in ("node_rank", "max_restarts", "master_port", "monitor_interval"):
            flags[name.replace("_", "-")] = getattr(arguments, name)
        check_ranges(flags)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    return local_processes, most if fewest == most else None


def with_timeouts(rdzv_conf: str) -> str:
    """Return torchrun's --rdzv-conf with our timeouts before it: the last of two values counts."""
    seconds = timeout_seconds()
    settings = (
        f"timeout={seconds:.0f},join_timeout={seconds:.0f},read_timeout={min(60, seconds):.0f}"
    )
    return f"{settings},{rdzv_conf}" if rdzv_conf else settings


def exit_code(codes: dict[int, int]) -> int:
    """Return the exit code of the run from those of the ranks that failed; report fatal signals.

    torchrun stops the other processes by SIGTERM, which is not reported.
    """
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            hint = ", possibly because memory ran out" if code == -signal.SIGKILL else ""
            name = signal.Signals(-code).name
            print(f"error: process {rank} was killed by {name}{hint}", file=sys.stderr)
    return 2 if set(codes.values()) <= {2, -signal.SIGTERM} else 1


def exit_if_port_in_use(endpoint: str) -> None:
    """Exit with code 2 if a program other than torchrun listens at `endpoint`.

    PyTorch would wait for its answer without limit.
    """
    address, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return  # the port is free: this machine or another one will listen there
    seconds = min(10, timeout_seconds())
    timeout = timedelta(seconds=seconds)
    connection = ThreadPoolExecutor(1).submit(
        dist.TCPStore, address, int(port), is_master=False, timeout=timeout
    )
    try:
        connection.result(seconds)
    except (RuntimeError, TimeoutError):
        print(
            f"error: {endpoint} is in use by another program: use a free port for --rdzv-endpoint",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(2)  # sys.exit would wait for the thread, which still connects


if __name__ == "__main__":
    run(main)
