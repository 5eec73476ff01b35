"""Processes that cannot start, meet or go on: a message with the mend, exit code 2, and all of them end."""

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

from nanods.data.shards import load_shards
from nanods.data.text import tokenizer_for
from nanods.distributed.rendezvous import attempt_number, connection_failure
from tests.distributed.processes import free_port
from tests.distributed.test_meshes import FLAGS, SIZE, STEPS, TEXT

ROOT = Path(__file__).parents[2]
LIMIT = 3  # seconds that a process is to wait, by NANODS_TIMEOUT, for others who never come
BOUND = 120  # seconds after which it counts as hanging


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANODS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv(
        "NANODS_TIMEOUT", str(BOUND)
    )  # those who come may come late, where other programs run
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def impatient(folder, monkeypatch):
    monkeypatch.setenv("NANODS_TIMEOUT", str(LIMIT))


@pytest.fixture
def taken():
    """A port on which another program listens, and answers nobody."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


def mark_started(*words, **environment):
    run = [str(ROOT / "train.py"), "v2-tiny", *SIZE, *STEPS, *FLAGS["v2-tiny"], "--out-dir", "run"]
    at = words.index("train.py") if "train.py" in words else -1
    before, after = (words[:at], words[at + 1 :]) if at >= 0 else ((), words)
    return subprocess.Popen(
        [sys.executable, *before, *run, *after],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(*flags, words=()):
    return mark_started("-m", "nanods.distributed.launch", *flags, "train.py", *words)


def alone(rank, port, *words):
    """One of two processes, without a starter."""
    return mark_started(
        *words, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def refused(process):
    """What its one message says, or None; it ends with code 2."""
    try:
        _, err = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    assert process.returncode == 2, err
    assert "Traceback" not in err and "frame #" not in err
    messages = re.findall(r"^error: (.*)$", err, re.M)
    assert len(messages) <= 1, err
    return messages[0] if messages else None


# ---- wrong meshes ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
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
def test_a_mistake_of_all_is_said_once(folder, words, message):
    assert re.search(
        message, refused(launch("--standalone", "--nproc-per-node", "2", words=words)) or ""
    )


# ---- the missing, and strangers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_peer_is_missing_says_how_long_it_waited(impatient, rank):
    message = refused(alone(rank, port := free_port()))
    assert f"the 2 processes did not connect at 127.0.0.1:{port} within {LIMIT} s" in message
    assert "start all of them at the same time" in message and "NANODS_TIMEOUT" in message


@pytest.mark.slow
def test_a_machine_whose_peer_is_missing_says_how_long_it_waited(impatient):
    where = f"127.0.0.1:{free_port()}"
    flags = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-id",
        "x",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        where,
    ]
    message = refused(launch(*flags))
    assert (
        f"the machines did not connect at {where} within {LIMIT} s" in message
        and "NANODS_TIMEOUT" in message
    )


@pytest.mark.slow
def test_a_port_in_use_is_named(impatient, taken):
    both = [
        alone(rank, taken) for rank in (0, 1)
    ]  # the first cannot listen there, the second hears nothing
    first, second = map(refused, both)
    assert f"127.0.0.1:{taken} is in use by another program: use a free port" in first
    assert f"did not connect at 127.0.0.1:{taken} within {LIMIT} s" in second
    for flags in (
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{taken}"],
        ["--master-port", str(taken)],
    ):
        assert f"127.0.0.1:{taken} is in use by another program: use a free port" in refused(
            launch(*flags)
        )


@pytest.mark.slow
@pytest.mark.parametrize("ill", [0, 1])
def test_a_process_that_fails_alone_takes_its_peer_along(folder, ill):
    """The first holds the store, by which the second sees that all is said; without it, it says what it knows."""
    port = free_port()
    both = [
        alone(rank, port, *(["--data", "nowhere.txt"] if rank == ill else [])) for rank in (0, 1)
    ]
    messages = [refused(process) for process in both]
    assert "nowhere.txt: no such data set or file" in messages[ill]
    assert messages[1 - ill] is None or (ill == 0 and "another process was lost" in messages[1])


@pytest.mark.slow
def test_a_process_that_is_stuck_is_not_waited_for_without_end(folder, monkeypatch):
    monkeypatch.setenv("NANODS_TIMEOUT", "15")
    port = free_port()
    well, stuck = (alone(rank, port, "--steps", "100000") for rank in (0, 1))
    try:
        end = time.monotonic() + BOUND
        while not (folder / "run/metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        stuck.send_signal(signal.SIGSTOP)
        message = refused(well)
        assert (
            "another process was lost (Timed out" in message
            and "15 s, set by NANODS_TIMEOUT" in message
        )
    finally:
        stuck.kill()
        stuck.communicate()


# ---- shards ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_a_faulty_shard_is_named_once_and_all_end(folder, fault):
    (folder / "corpus").mkdir()
    (folder / "corpus/a.txt").write_text(TEXT)
    load_shards("corpus", 256, tokenizer_for)
    (made,) = (folder / "data/shards").iterdir()
    shard = made / "train-00000.bin"
    if fault == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    message = refused(launch("--standalone", "--nproc-per-node", "2", words=["--data", str(made)]))
    assert shard.name in message and "Copy these shards here again" in message


# ---- the parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 1, 2])
def test_the_living_agree_on_a_number_whatever_the_dead_have_left(late):
    """Each process in turn comes last, over a store with two attempts' keys; the second broke off in the middle."""
    store, told = dist.HashStore(), {}

    def come(rank):
        told[rank] = attempt_number(store, rank, 3)

    def attempt(*ranks):
        threads = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        return threads

    for thread in attempt(0, 1, 2):
        thread.join(10)
    store.set("name of rank 1", "one that died before it was answered")
    numbers = dict(told)
    told.clear()
    for thread in attempt(*[rank for rank in (0, 1, 2) if rank != late], late):
        thread.join(10)
    assert numbers == {0: "1", 1: "1", 2: "1"} and told == {0: "2", 1: "2", 2: "2"}


def test_only_a_broken_connection_counts_as_a_lost_process():
    """What gloo says when sizes differ is a bug of ours, and keeps its traceback."""
    pair = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] "
    for words in (
        "Read error [127.0.0.1]:1: Connection reset by peer",
        "Connection closed by peer [127.0.0.1]:1",
    ):
        assert "by peer" in connection_failure(RuntimeError(pair + words))
    assert "Timed out" in connection_failure(
        RuntimeError(pair + "Timed out waiting 3000ms for recv operation to complete")
    )
    assert (
        connection_failure(RuntimeError(pair + "op.preamble.length <= op.nbytes. 8192 vs 4"))
        is None
    )
    assert (
        connection_failure(RuntimeError("Connection reset by peer")) is None
        and connection_failure(ValueError(pair + "Broken pipe")) is None
    )
