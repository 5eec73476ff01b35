"""Runs of train.py by several processes over gloo. Each process does all runs one after another.

The processes are forked from a server that has imported train.py: to import it takes longer than
most of the runs. For the same reason a run draws no pictures and prints no report, unless its job
asks for them.
"""

import contextlib
import io
import itertools
import os
import resource
import socket
import sys
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import torch.distributed as dist

import train
from nanods.errors import run

MAX_BYTES = 4096  # of a file, for the process whose disk counts as full
# A job may begin with one of these:
DISK_FULL = "disk-full:1"  # process 1 cannot write files of more than MAX_BYTES
REPORT = "report"  # draw the pictures and print the report


PORTS = itertools.count(20_000 + 97 * os.getpid() % 12_000)  # workers of pytest-xdist: far apart


def free_port() -> int:
    """Return a port that no program uses, and that this function has not returned before.

    It lies below the ports that systems give to outgoing connections (Linux: from 32768), which
    gloo opens by the dozen: one of them could take the port before its user does.
    """
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", next(PORTS)))
            return s.getsockname()[1]


def forkserver() -> ForkServerContext:
    """Return the context that forks processes, and decide what its server imports.

    Every test file that starts processes calls this: the first one starts the server for all.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", __name__])
    return context


def train_on_processes(
    world_size: int, jobs: list[list[str]], folder: Path
) -> list[list[tuple[int, str]]]:
    """Run train.py in `folder` with the arguments of each job, by `world_size` processes.

    Return, for each process and each job, the exit code and the stderr.
    """
    ports = [str(free_port()) for _ in jobs]
    environment = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    receivers, processes = [], []
    for rank in map(str, range(world_size)):
        receiver, sender = forkserver().Pipe(duplex=False)
        of_rank = {**environment, "RANK": rank, "LOCAL_RANK": rank}
        arguments = (jobs, ports, folder, of_rank, sender)
        processes.append(forkserver().Process(target=run_jobs, args=arguments))
        processes[-1].start()
        sender.close()
        receivers.append(receiver)
    try:
        return [receiver.recv() for receiver in receivers]
    finally:
        for process in processes:  # if one has died, the others may wait for it in gloo
            process.kill()


def run_jobs(
    jobs: list[list[str]],
    ports: list[str],
    folder: Path,
    environment: dict[str, str],
    sender: Connection,
) -> None:
    """Run all jobs in this process, and send exit codes and stderr."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    results, report = [], train.print_report
    for job, port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        train.print_report = report if job[0] == REPORT else lambda *_: None
        results.append(run_job(job))
    sender.send(results)


def run_job(job: list[str]) -> tuple[int, str]:
    """Run train.py once; return its exit code (1 after a bug) and the end of its stderr."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    is_full = job[0] == DISK_FULL and os.environ["RANK"] == "1"
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_BYTES if is_full else limit, limit))
    sys.argv = ["train.py", *(job[1:] if job[0] in (DISK_FULL, REPORT) else job)]
    stdout, code = sys.stdout, 0
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            run(train.main)
        except SystemExit as error:
            code = error.code
            dist.destroy_process_group()
        except Exception:
            traceback.print_exc()
            code = 1
    sys.stdout = stdout  # train.py silences it on all ranks but 0
    return code, stderr.getvalue()[-2000:]
