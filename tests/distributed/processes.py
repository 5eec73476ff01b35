"""Runs of train.py by several processes over gloo. Each process does all runs one after another."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_BYTES = 4096  # of a file, for the process whose disk counts as full
DISK_FULL = "disk-full:"  # a job that begins with "disk-full:1" limits the files of process 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_on_processes(
    world_size: int, jobs: list[list[str]], folder: Path
) -> list[list[tuple[int, str]]]:
    """Run train.py in `folder` with the arguments of each job, by `world_size` processes.

    Return, for each process and each job, the exit code and the stderr. A job may begin with
    "disk-full:1": process 1 then cannot write files of more than MAX_BYTES.
    """
    ports = [str(free_port()) for _ in jobs]
    module = "tests.distributed.processes"
    command = [sys.executable, "-m", module, json.dumps(jobs), json.dumps(ports)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(world_size),
    }
    processes = []
    for rank in map(str, range(world_size)):
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    outputs = [process.communicate(timeout=1800)[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    """Run all jobs in this process, and print exit codes and stderr as JSON."""
    import torch

    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    stdout, results = sys.stdout, []  # train.py silences sys.stdout on all ranks but 0
    for job, port in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2]), strict=True):
        os.environ["MASTER_PORT"] = port
        results.append(run_job(job))
    print(json.dumps(results), file=stdout, flush=True)
    # As rendezvous.run_distributed: DTensor keeps process groups, whose threads may abort Python's
    # own exit.
    os._exit(0)


def run_job(job: list[str]) -> tuple[int, str]:
    """Run train.py once; return its exit code and the end of its stderr."""
    import contextlib
    import io
    import resource

    import torch.distributed as dist

    import train
    from nanods.errors import run

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    is_full = job[0] == f"{DISK_FULL}{os.environ['RANK']}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_BYTES if is_full else limit, limit))
    arguments = job[1:] if job[0].startswith(DISK_FULL) else job
    argv, sys.argv = sys.argv, ["train.py", *arguments]
    code = 0
    with (
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            run(train.main)
        except SystemExit as error:
            code = error.code
            dist.destroy_process_group()
    sys.argv = argv
    return code, stderr.getvalue()[-2000:]


if __name__ == "__main__":
    main()
