"""How the processes of one run meet, and how they end.

Any starter will do that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each: launch.py, torchrun, a cluster's.

When a process dies, those that wait for it get an error from the network, and end. torchrun --max-restarts 3 starts them all
again, up to three times, but keeps its store of keys, where the dead have left their addresses: whoever reads one calls at
nobody, or waits for ever (pytorch issue 135712; numbering the keys by TORCHELASTIC_RESTART_COUNT would not do, as each machine
counts its own). So the keys of an attempt begin with its number, which the first process gives to the living.

Pinned by tests/test_kill_several.py and tests/distributed/test_launch.py.
"""

import os
import re
import signal
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from nanods.errors import UserError, run

SECONDS = float(
    os.environ.get("NANODS_TIMEOUT") or 600
)  # how long a process waits for the others before it ends with an error
PATIENCE = timedelta(seconds=SECONDS)
LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|[Tt]imed out|timeout|ncclRemoteError"
)

kept: list[dist.Store] = []  # where they met; the part of it that is this attempt's


def rendezvous(backend: str) -> bool:
    """Meet the other processes -> whether they had begun before (`begin`) and one died. UserError where one does not come."""
    address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
    try:
        if port and os.environ.get("RANK") != "0":
            wait_for_port(address, port)
        calling = ThreadPoolExecutor(1).submit(
            lambda: next(dist.rendezvous("env://", timeout=PATIENCE))
        )
        store, rank, size = calling.result(
            SECONDS + 2
        )  # PyTorch waits without end for a stranger behind the port
        store.set_timeout(PATIENCE)
        kept[:] = [store]
        begun = store.check(["begun"])
        kept.append(dist.PrefixStore(attempt_number(store, rank, size), store))
        dist.init_process_group(
            backend, timeout=PATIENCE, store=kept[1], rank=rank, world_size=size
        )
        return begun
    except (
        RuntimeError,
        ValueError,
        OSError,
    ) as error:  # what torch.distributed raises for a missing peer, a port in use
        refuse_port_in_use(error, f"{address}:{port}", "MASTER_PORT, or --rdzv-endpoint,")
        raise UserError(
            f"the {os.environ.get('WORLD_SIZE')} processes did not meet at {address}:{port} within {SECONDS:g} s "
            f"({in_short(error)}): start all of them together, each machine with the same endpoint, a free port of the first. "
            "NANODS_TIMEOUT=900 lets them wait 900 s"
        ) from None


def refuse_port_in_use(error: Exception, where: str, choice: str) -> None:
    if "EADDRINUSE" in str(error):
        raise UserError(
            f"{where} is in use by another program: choose a free port by {choice} the same for all"
        ) from None


def in_short(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def wait_for_port(address: str, port: int) -> None:
    """Until someone listens there. OSError after SECONDS. (PyTorch's own wait prints its stack.)"""
    end = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection((address, port), timeout=SECONDS).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def attempt_number(store: dist.Store, rank: int, size: int) -> str:
    """A number that no attempt before had, the same for all who live: the first process answers each that has called.

    A caller's name is new each time, so nobody takes an answer to the dead for his own.
    """
    if rank:
        name = uuid.uuid4().hex
        store.set(f"caller {rank}", name)
        number = store.get(f"answer {name}").decode()  # waits
        store.add(f"normalized_log_mel {number}", 1)
        return number
    number, end = str(store.add("attempts", 1)), time.monotonic() + SECONDS
    while (normalized_log_mel := store.add(f"normalized_log_mel {number}", 0)) < size - 1:
        for other in range(1, size):
            if store.check([f"caller {other}"]):
                store.set(f"answer {store.get(f'caller {other}').decode()}", number)
        if time.monotonic() > end:
            raise RuntimeError(f"{normalized_log_mel} of {size - 1} others came")
        time.sleep(0.02)
    return number


def mark_started() -> None:
    """From here on there is a checkpoint of this run: those who are started again go on from it."""
    if kept and dist.get_rank() == 0:
        kept[0].set("begun", "")


# ---- the end -----------------------------------------------------------------------------------------------------------------


def run_distributed(main: Callable[[], None]) -> None:
    """errors.run for a program of several processes: once they have met one speaks for all, and each ends at once.

    At once: groups of processes have threads, which PyTorch's caches keep alive and which at times abort a Python that ends by
    itself ("terminate called without an active exception"); and to close a group can mean to wait for the dead.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return run(main)
    code = 0
    try:
        run(lambda: report_once(main))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_once(main: Callable[[], None]) -> None:
    try:
        main()
    except Exception as error:
        first = first_to_report()
        if how := lost(error):
            error = UserError(
                f"another process was lost ({how}; the longest wait is {SECONDS:g} s, NANODS_TIMEOUT), so this one ends too. "
                "What was saved is whole: the same line with --resume goes on from the last checkpoint"
            )
        if isinstance(error, UserError) and not first:
            time.sleep(
                1
            )  # torchrun ends all with the first that ends, and that should not be the one who speaks
            sys.exit(2)
        raise error from None


def first_to_report() -> bool:
    """Whether no other process has said yet what went wrong."""
    try:
        return len(kept) < 2 or kept[1].add("mistakes", 1) == 1
    except RuntimeError:  # the store was the first process's, and went with it
        return True


def lost(error: Exception) -> str | None:
    """How another process was lost, if that is what the error says; else it is a bug and keeps its traceback."""
    if isinstance(error, RuntimeError) and (
        "gloo" in str(error) or isinstance(error, dist.DistError)
    ):
        return found.group() if (found := LOST.search(str(error))) else None
    return None
