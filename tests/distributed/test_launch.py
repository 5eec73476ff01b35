"""Processes that cannot start, connect or go on: one message with a suggestion, and all exit."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from nanods.data.text import load_text
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.rendezvous import (
    attempt_number,
    connection_failure,
    rendezvous,
    run_distributed,
)
from nanods.errors import UserError
from tests.distributed.processes import free_port
from tests.distributed.test_meshes import FLAGS, SIZE, STEPS, TEXT

ROOT = Path(__file__).parents[2]
LIMIT = 3  # NANODS_TIMEOUT in seconds, where another process never connects
BOUND = 120  # seconds after which a process counts as hanging


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANODS_DATA", str(tmp_path / "data"))
    # On a busy machine processes that do connect may take long.
    monkeypatch.setenv("NANODS_TIMEOUT", str(BOUND))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def short_timeout(folder, monkeypatch):
    monkeypatch.setenv("NANODS_TIMEOUT", str(LIMIT))


@pytest.fixture
def port_in_use():
    """A port on which another program listens without ever answering."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


def start(*python_arguments, flags=(), environment=None):
    """Start `python PYTHON_ARGUMENTS train.py v2-tiny ... FLAGS`."""
    train = [str(ROOT / "train.py"), "v2-tiny", *SIZE, *STEPS, *FLAGS["v2-tiny"]]
    return subprocess.Popen(
        [sys.executable, *python_arguments, *train, "--out-dir", "run", *flags],
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(*launch_flags, flags=()):
    """Start train.py by nanods.distributed.launch."""
    return start("-m", "nanods.distributed.launch", *launch_flags, flags=flags)


def start_rank(rank, port, *flags):
    """Start one of two processes, without a launcher."""
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return start(flags=flags, environment=environment)


def error_message(process):
    """Wait for a process that must exit with code 2; return its error message or None."""
    try:
        _, err = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    assert process.returncode == 2, err
    assert "Traceback" not in err and "frame #" not in err
    messages = re.findall(r"^error: (.*)$", err, re.M)
    assert len(messages) <= 1, err
    return messages[0] if messages else None


# ---- errors of all processes -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "dp=3"], "needs 3 processes, but there are 2: .*PROCS=3"),
        (["--mesh", "dp=2,tp=1"], "the choices are"),
        (
            ["--mesh", "ep=2", "--moe.n-expert", "5"],
            "5 experts do not divide over 2 .*--moe.n-expert 6",
        ),
        (
            ["--mesh", "tp=2", "--n-head", "3", "--n-embd", "24"],
            "3 heads do not divide over 2 .* another --n-head",
        ),
        (
            ["--batch-size", "7", "--micro-batch", "1"],
            "--batch-size 7 does not divide over 2 processes",
        ),
        (["--data", "nowhere.txt"], "nowhere.txt: no such data set or file"),
    ],
)
def test_an_error_of_all_processes_is_reported_once(folder, flags, message):
    process = launch("--standalone", "--nproc-per-node", "2", flags=flags)
    assert re.search(message, error_message(process) or "")


def test_a_mesh_is_checked_early_only_where_the_number_of_machines_is_known(folder, monkeypatch):
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
    from nanods.distributed import launch

    def call(nnodes):
        words = ["--nnodes", nnodes, "--nproc-per-node", "1", "train.py", "v0-tiny", "--mesh"]
        monkeypatch.setattr(sys, "argv", ["launch", *words, "dp=1"])
        monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
        launch.main()

    started = []
    monkeypatch.setattr(launch, "torchrun", started.append)
    with pytest.raises(UserError, match="--mesh dp=1 needs 1 processes, but there are 2"):
        call("2")
    call("1:2")
    call("1")
    assert len(started) == 2


# ---- missing processes and wrong ports ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_if_the_other_process_is_missing_a_process_says_how_long_it_waited(short_timeout, rank):
    port = free_port()
    message = error_message(start_rank(rank, port))
    assert f"the 2 processes did not connect at 127.0.0.1:{port} within {LIMIT} s" in message
    assert "start all of them at the same time" in message and "NANODS_TIMEOUT" in message


@pytest.mark.slow
def test_if_the_other_machine_is_missing_a_launcher_says_how_long_it_waited(short_timeout):
    endpoint = f"127.0.0.1:{free_port()}"
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "x", "--rdzv-backend", "c10d"]
    message = error_message(launch(*flags, "--rdzv-endpoint", endpoint))
    assert f"the machines did not connect at {endpoint} within {LIMIT} s" in message
    assert "NANODS_TIMEOUT" in message


@pytest.mark.slow
def test_a_port_in_use_is_reported(short_timeout, port_in_use):
    endpoint = f"127.0.0.1:{port_in_use}"
    in_use = f"{endpoint} is in use by another program: use a free port"
    processes = [start_rank(rank, port_in_use) for rank in (0, 1)]
    first, second = map(error_message, processes)
    assert in_use in first  # rank 0 cannot listen there
    assert f"did not connect at {endpoint} within {LIMIT} s" in second  # rank 1 gets no answer
    for flags in (
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint],
        ["--master-port", str(port_in_use)],
    ):
        assert in_use in error_message(launch(*flags))


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_if_one_process_fails_the_other_exits_too(folder, failing):
    """Rank 1 learns from the store of rank 0 that the error is reported, if rank 0 still runs."""
    port = free_port()
    processes = []
    for rank in (0, 1):
        flags = ["--data", "nowhere.txt"] if rank == failing else []
        processes.append(start_rank(rank, port, *flags))
    messages = [error_message(process) for process in processes]
    assert "nowhere.txt: no such data set or file" in messages[failing]
    other = messages[1 - failing]
    assert other is None or (failing == 0 and "another process was lost" in other)


@pytest.mark.slow
def test_a_process_waits_for_a_stopped_one_no_longer_than_the_timeout(folder, monkeypatch):
    monkeypatch.setenv("NANODS_TIMEOUT", "15")
    port = free_port()
    running, stopped = (start_rank(rank, port, "--steps", "100000") for rank in (0, 1))
    try:
        end = time.monotonic() + BOUND
        while not (folder / "run/metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        stopped.send_signal(signal.SIGSTOP)
        message = error_message(running)
        assert "another process was lost (Timed out" in message
        assert "15 s, set by NANODS_TIMEOUT" in message
    finally:
        stopped.kill()
        stopped.communicate()


def test_a_variable_that_is_no_number_is_a_mistake_of_the_user(monkeypatch, capsys):
    """Also in a process of its own, which run_distributed ends."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("WORLD_SIZE", "two")
    run_distributed(ProcessGroups, "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, text in (("NANODS_TIMEOUT", "soon"), ("MASTER_PORT", "abc")):
        with monkeypatch.context() as patched:
            patched.setenv(name, text)
            run_distributed(lambda: rendezvous("gloo"), "")
    assert codes == [2, 2, 2]
    error = capsys.readouterr().err
    for start in ("WORLD_SIZE=two", "NANODS_TIMEOUT=soon", "MASTER_PORT=abc"):
        assert f"error: {start}: must be a" in error
    assert "Traceback" not in error


# ---- data shards -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_a_faulty_data_shard_is_reported_once_and_all_processes_exit(folder, fault):
    (folder / "corpus").mkdir()
    (folder / "corpus/a.txt").write_text(TEXT)
    load_text("corpus")
    (shards,) = (folder / "data/shards").iterdir()
    shard = shards / "train-00000.bin"
    if fault == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    process = launch("--standalone", "--nproc-per-node", "2", flags=["--data", str(shards)])
    message = error_message(process)
    assert shard.name in message and "Copy these shards here again" in message


# ---- functions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1, 2])
def test_live_processes_agree_on_the_attempt_number_whatever_dead_ones_have_left(last):
    """The store has keys of two attempts, the second of which broke off; each rank is last once."""
    store, numbers = dist.HashStore(), {}

    def ask(rank):
        numbers[rank] = attempt_number(store, rank, 3)

    def run_attempt(*ranks):
        threads = [threading.Thread(target=ask, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(10)

    run_attempt(0, 1, 2)
    first_numbers = dict(numbers)
    store.set("name of rank 1", "one that died before it was answered")
    numbers.clear()
    run_attempt(*[rank for rank in (0, 1, 2) if rank != last], last)
    assert first_numbers == {0: "1", 1: "1", 2: "1"}
    assert numbers == {0: "2", 1: "2", 2: "2"}


def test_only_a_broken_connection_counts_as_a_lost_process():
    """gloo's message for tensors of different sizes is a bug of nanods, and keeps its traceback."""
    pair = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] "
    for words in (
        "Read error [127.0.0.1]:1: Connection reset by peer",
        "Connection closed by peer [127.0.0.1]:1",
    ):
        assert "by peer" in connection_failure(RuntimeError(pair + words))
    timeout = RuntimeError(pair + "Timed out waiting 3000ms for recv operation to complete")
    assert "Timed out" in connection_failure(timeout)
    different_sizes = RuntimeError(pair + "op.preamble.length <= op.nbytes. 8192 vs 4")
    assert connection_failure(different_sizes) is None
    assert connection_failure(RuntimeError("Connection reset by peer")) is None
    assert connection_failure(ValueError(pair + "Broken pipe")) is None
