"""torchrun, with all its flags: `python -m nanods.distributed.launch --standalone --nproc-per-node 2 train.py v2-tiny`.

It ends as every program of nanods does: a mistake of the user is one message and exit code 2, where torchrun adds a traceback
of its own and ends with 1. A mesh that does not fit is refused before any process starts. SIGINT and SIGTERM are passed on to
the processes, which save and stop (torchrun gives them 30 seconds, --shutdown-timeout); the code is then 128 and the signal's.

Pinned by tests/test_kill_several.py and tests/distributed/test_launch.py.
"""

import os

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "FATAL"
)  # or a port in use would print stacks of C++; read when torch is imported

import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import determine_local_world_size, parse_args, parse_min_max_nnodes
from torch.distributed.run import run as torchrun

from nanods import config as ladder
from nanods.distributed.mesh import Mesh
from nanods.distributed.rendezvous import SECONDS, in_short, refuse_port_in_use
from nanods.errors import UserError, run


def main() -> None:
    if os.environ["TORCH_CPP_LOG_LEVEL"] == "FATAL":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # what NCCL has to say in the processes is wanted
    arguments = parse_args(sys.argv[1:])
    here = determine_local_world_size(arguments.nproc_per_node)
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here))
    )  # torchrun would give each but one
    sys.argv = [arguments.training_script, *arguments.training_script_args]
    if Path(sys.argv[0]).name == "train.py" and "--plan" not in sys.argv:
        config = ladder.from_command_line("Train one preset of nanods, by several processes.")
        Mesh.parse(
            config.mesh, parse_min_max_nnodes(arguments.nnodes)[1] * here, config.model.moe.n_expert
        )
    limits = f"timeout={SECONDS:.0f},join_timeout={SECONDS:.0f},read_timeout={min(60, SECONDS):.0f}"
    arguments.rdzv_conf = ",".join(
        filter(None, [limits, arguments.rdzv_conf])
    )  # what is written later counts
    where = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    try:
        if arguments.rdzv_endpoint and not arguments.standalone:
            refuse_foreign_port(where)
        torchrun(arguments)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        sys.exit(code_of({rank: failure.exitcode for rank, failure in error.failures.items()}))
    except (RendezvousError, dist.DistError) as error:
        refuse_port_in_use(error, where, "--rdzv-endpoint or --master-port,")
        raise UserError(
            f"the machines did not meet at {where} within {SECONDS:g} s ({in_short(error)}): start the same line on each of "
            f"--nnodes {arguments.nnodes} machines, with --rdzv-endpoint a free port of the first. NANODS_TIMEOUT=900 lets "
            "them wait 900 s"
        ) from None


def code_of(codes: dict[int, int]) -> int:
    """The exit code of all, from those of the processes that failed; torchrun itself ends the others by SIGTERM."""
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            why = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
            print(
                f"error: process {rank} was ended by {signal.Signals(-code).name}{why}",
                file=sys.stderr,
            )
    return 2 if set(codes.values()) <= {2, -signal.SIGTERM} else 1


def refuse_foreign_port(where: str) -> None:
    """UserError if a program other than torchrun has the port already: PyTorch would wait for its answer without end."""
    address, _, port = where.rpartition(":")
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return  # nobody yet: this machine or another is about to listen there
    seconds = min(10, SECONDS)
    patience = timedelta(seconds=seconds)
    try:
        ThreadPoolExecutor(1).submit(
            dist.TCPStore, address, int(port), is_master=False, timeout=patience
        ).result(seconds)
    except (RuntimeError, TimeoutError):
        print(
            f"error: {where} is in use by another program: choose a free port for --rdzv-endpoint",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(2)  # Python would wait for the thread that asks


if __name__ == "__main__":
    run(main)
