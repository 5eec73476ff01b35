"""How the processes of one run connect, and how they exit.

Any launcher works that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process:
launch.py, torchrun, a cluster's.

When a process dies, the processes that communicate with it get a network error and exit. torchrun
--max-restarts 3 starts all of them again, up to three times, but keeps its key-value store, in
which the dead processes have left their addresses. A new process that reads one would call a dead
process or wait for ever (pytorch issue 135712). The number of restarts (TORCHELASTIC_RESTART_COUNT)
cannot tell old keys from new ones, as each machine counts for itself. So all keys of an attempt
begin with its number, which rank 0 chooses and gives to the live processes.

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
from nanods.flags import from_environment

CONNECTION_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|[Tt]imed out|timeout|ncclRemoteError"
)

# After `rendezvous`: the key-value store of the "run", and the part of it for this "attempt".
stores: dict[str, dist.Store] = {}


def timeout_seconds() -> float:
    """Return how long a process waits for the others before it exits with an error."""
    return from_environment("NANODS_TIMEOUT", 600.0)


def rendezvous(backend: str) -> bool:
    """Connect to the other processes; return whether they were started again after a failure.

    They were if an earlier attempt has called `mark_started`. Raises UserError if a process does
    not connect in time, or the port is in use.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), from_environment("MASTER_PORT", 0)
    timeout = timedelta(seconds=timeout_seconds())
    try:
        if port and os.environ.get("RANK") != "0":
            wait_for_port(address, port)
        store, rank, world_size = connect_to_store(timeout)
        store.set_timeout(timeout)
        stores.clear()
        stores["run"] = store
        restarted = store.check(["started"])
        stores["attempt"] = dist.PrefixStore(attempt_number(store, rank, world_size), store)
        dist.init_process_group(
            backend, timeout=timeout, store=stores["attempt"], rank=rank, world_size=world_size
        )
        return restarted
    except (RuntimeError, ValueError, OSError) as error:  # a missing process, a port in use
        refuse_port_in_use(error, f"{address}:{port}", "MASTER_PORT, or --rdzv-endpoint")
        raise UserError(
            f"the {os.environ.get('WORLD_SIZE')} processes did not connect at {address}:{port} "
            f"within {timeout_seconds():g} s ({first_line(error)}): start all of them at the same "
            "time, on every machine with the same endpoint, a free port of the first machine. "
            "NANODS_TIMEOUT=900 makes them wait 900 s"
        ) from None


def connect_to_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the run's key-value store, this process's rank and the number of processes.

    Raises TimeoutError after the timeout. PyTorch itself would wait without limit if a program that
    is not a store listens on the port.
    """

    def connect() -> tuple[dist.Store, int, int]:
        return next(dist.rendezvous("env://", timeout=timeout))

    return ThreadPoolExecutor(1).submit(connect).result(timeout.total_seconds() + 2)


def refuse_port_in_use(error: Exception, endpoint: str, flags: str) -> None:
    """Raise UserError if `error` says that a port is in use."""
    if "EADDRINUSE" in str(error):
        raise UserError(
            f"{endpoint} is in use by another program: use a free port, the same for all "
            f"processes ({flags})"
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def wait_for_port(address: str, port: int) -> None:
    """Wait until a program listens on a port. Raises OSError after `timeout_seconds`.

    PyTorch would wait too, but print a stack of C++ when it gives up.
    """
    end = time.monotonic() + timeout_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=timeout_seconds()).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def attempt_number(store: dist.Store, rank: int, world_size: int) -> str:
    """Return a number that no earlier attempt had, the same on all live processes.

    Rank 0 counts the attempts and answers every other rank. Each of them asks under a new random
    name, so that none reads the answer to a dead process.
    """
    if rank == 0:
        number = str(store.add("attempts", 1))
        answer_all_ranks(store, number, world_size)
        return number
    name = uuid.uuid4().hex
    store.set(f"name of rank {rank}", name)
    number = store.get(f"answer to {name}").decode()  # waits until the key is set
    store.add(f"answers received in attempt {number}", 1)
    return number


def answer_all_ranks(store: dist.Store, number: str, world_size: int) -> None:
    """Give the number of the attempt to each other rank, until all have received it.

    Raises RuntimeError after `timeout_seconds`.
    """
    end = time.monotonic() + timeout_seconds()
    while True:
        received = store.add(f"answers received in attempt {number}", 0)
        if received >= world_size - 1:
            return
        for rank in range(1, world_size):
            if store.check([f"name of rank {rank}"]):
                name = store.get(f"name of rank {rank}").decode()
                store.set(f"answer to {name}", number)
        if time.monotonic() > end:
            raise RuntimeError(f"{received} of {world_size - 1} other processes connected")
        time.sleep(0.02)


def mark_started() -> None:
    """Note that this run has a checkpoint: processes that torchrun starts again resume from it."""
    if stores and dist.get_rank() == 0:
        stores["run"].set("started", "")


# ---- how they exit -----------------------------------------------------------------------------


def run_distributed(main: Callable[[], None], how_to_choose: str) -> None:
    """Run the `main` of a program of one or several processes, and exit. `how_to_choose` is that of
    errors.run.

    One process calls errors.run. Of several, one reports an error for all, and each exits at once,
    by os._exit: process groups have threads, which PyTorch's caches keep alive and which sometimes
    abort Python's own exit ("terminate called without an active exception"); and to close a group
    can mean to wait for dead processes.
    """
    if os.environ.get("WORLD_SIZE") in (None, "", "1"):
        run(main, how_to_choose)
        return
    code = 0
    try:
        run(lambda: report_once(main), how_to_choose)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_once(main: Callable[[], None]) -> None:
    """Run `main`; on a UserError, exit without a message if another process has reported one."""
    try:
        main()
    except Exception as error:
        is_first = is_first_to_report()
        failure = connection_failure(error)
        if failure:
            error = UserError(
                f"another process was lost ({failure}; the timeout is {timeout_seconds():g} s, "
                "set by NANODS_TIMEOUT), so this process exits too. The saved checkpoints are "
                "intact: the same command with --resume continues from the last one"
            )
        if isinstance(error, UserError) and not is_first:
            # torchrun kills all processes when one exits: let the one that reports exit first.
            time.sleep(1)
            sys.exit(2)
        raise error from None


def is_first_to_report() -> bool:
    """Return whether no other process has reported an error in this attempt."""
    try:
        return "attempt" not in stores or stores["attempt"].add("errors", 1) == 1
    except RuntimeError:  # the store was in rank 0's process, which has exited
        return True


def connection_failure(error: Exception) -> str | None:
    """Return the words of `error` that say how another process was lost; None for a bug."""
    is_network_error = isinstance(error, RuntimeError) and (
        "gloo" in str(error) or isinstance(error, dist.DistError)
    )
    match = CONNECTION_LOST.search(str(error)) if is_network_error else None
    return match.group() if match else None
