"""`python -m nanods.serving`: how it starts, what it refuses, and how it stops."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("grpc_tools", "grpc_health", "grpc_reflection", "fastapi", "uvicorn", "httpx"):
    pytest.importorskip(name, reason="the extra serve is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def serving(workspace, monkeypatch, capsys):
    """Run `python -m nanods.serving` in this process: -> (exit code, stderr)."""
    from nanods.errors import run
    from nanods.serving.__main__ import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nanods.serving", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            run(main)
        return exit.value.code, capsys.readouterr().err

    return call


def test_mistakes_at_the_start_say_how_to_correct_them(serving, monkeypatch):
    for words, message in (
        ([], "name a run to serve"),
        (["v2-tiny"], "runs/v2-tiny: no such run. Train it first: make train-v2"),
        (["v2-tiny", "--port", 70000], "--port 70000: must be at most 65,535"),
        (["v2-tiny", "--host", "0.0.0.0"], "open to other machines: set NANODS_TOKEN"),
        (["v2-tiny", "--place", "blocks.*.mlp=cpu:int4"], "write PATTERN=DEVICE:FORMAT; formats"),
        (["v2-tiny", "--canary-minutes", -1], "--canary-minutes -1: must be at least 0"),
        (["v2-tiny", "--slow-seconds", 0], "--slow-seconds 0: must be above 0, 0.001 or more"),
        (["v2-tiny", "--webhook", "ftp://a"], "--webhook ftp://a: give a URL that begins with"),
        (["v2-tiny", "--monitor", __file__], "cannot be written; name another folder"),
    ):
        code, error = serving(*words)
        assert code == 2 and message in error and "Traceback" not in error
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, error = serving("v2-tiny", "--device", "cuda")
    assert code == 2 and "--device cuda: PyTorch finds none on this machine; leave the" in error
    for token in ("gehe\u00edm", "secret\n", " secret"):
        monkeypatch.setenv("NANODS_TOKEN", token)
        code, error = serving("v2-tiny")
        assert code == 2 and "NANODS_TOKEN: no HTTP header can hold" in error and token not in error
    monkeypatch.setenv("NANODS_TOKEN", "secret")
    assert "no such run" in serving("v2-tiny", "--host", "0.0.0.0")[1]


def test_a_missing_extra_is_named():
    program = (
        "import sys; sys.modules['fastapi'] = None; sys.argv[1:] = ['v2-tiny']; "
        "from nanods.errors import run; from nanods.serving.__main__ import main; run(main)"
    )
    made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and "Traceback" not in made.stderr
    assert "needs the package fastapi: make setup EXTRAS=serve" in made.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to send")
def test_it_serves_a_trained_run_until_sigterm(train_tiny, serving):
    import httpx

    code, _, error = train_tiny("v1-tiny", "--steps", 1)
    assert code == 0, error
    handler = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for flag in ("--port", "--grpc-port"):
            free = {"--port": 0, "--grpc-port": 0} | {flag: port}
            code, error = serving("v1-tiny", *(w for pair in free.items() for w in pair))
            assert code == 2 and f"{flag} {port}" in error
            assert signal.getsignal(signal.SIGTERM) == handler  # it is given back
    code, error = serving("v1-tiny", "runs/v1-tiny")
    assert code == 2 and "another run is called v1-tiny too" in error
    server = subprocess.Popen(
        [sys.executable, "-m", "nanods.serving", "v1-tiny", "--port", "0", "--grpc-port", "0"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout.readline().startswith("notice     no --monitor FOLDER: alarms")
        assert server.stdout.readline() == "model      v1-tiny: generate\n"
        url = re.match(r"serving    (http://\S+)", server.stdout.readline())[1]
        body = {"model": "v1-tiny", "prompt": "1 times", "max_tokens": 8, "seed": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=20)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
        assert "nanods_requests_total{" in httpx.get(f"{url}/metrics", timeout=20).text
        server.send_signal(signal.SIGTERM)
        out, error = server.communicate(timeout=20)
    finally:
        server.kill()
    assert (server.returncode, out, error) == (0, "stopped\n", "")
