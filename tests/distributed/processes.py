"""Runs of train.py by several processes that meet over gloo, a number of them one after another."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_by(processes: int, jobs: list[list[str]], folder: Path) -> list[list[tuple[int, str]]]:
    """Each job's words to train.py, in `folder` -> by process, the exit code and what it said to stderr, job by job.

    Words that begin with "full:1" are without it train.py's; process 1 may then write no file of more than 4,096 bytes.
    """
    ports = [str(free_port()) for _ in jobs]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(processes),
    }
    words = [
        sys.executable,
        "-m",
        "tests.distributed.processes",
        json.dumps(jobs),
        json.dumps(ports),
    ]
    started = [
        subprocess.Popen(
            words,
            cwd=folder,
            env={**environment, "RANK": r, "LOCAL_RANK": r},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in map(str, range(processes))
    ]
    told = [process.communicate(timeout=1800)[0] for process in started]
    return [json.loads(out.splitlines()[-1]) for out in told]


def main() -> None:
    import contextlib
    import io
    import resource

    import torch
    import torch.distributed as dist

    import train
    from nanods.errors import run

    torch.set_num_threads(1)
    told, said = [], sys.stdout
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for words, port in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2]), strict=True):
        os.environ["MASTER_PORT"] = port
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        full = words[0] == f"full:{os.environ['RANK']}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if full else most, most))
        argv, sys.argv = sys.argv, ["train.py", *words[words[0].startswith("full:") :]]
        code = 0
        with (
            contextlib.redirect_stderr(io.StringIO()) as err,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            try:
                run(train.main)
            except SystemExit as error:
                code = error.code
                dist.destroy_process_group()
        told.append((code, err.getvalue()[-2000:]))
        sys.argv = argv
    print(json.dumps(told), file=said, flush=True)
    os._exit(
        0
    )  # as meeting.together does: DTensor keeps groups, whose threads may abort a Python that ends by itself


if __name__ == "__main__":
    main()
