"""Serve trained runs over HTTP and gRPC.

    python -m nanods.serving v2-tiny                     http://127.0.0.1:8000/v1/completions
    python -m nanods.serving runs/my-run v3-tiny --port 9000

The routes are those of OpenAI's API: nanods/serving/rest.py lists them. Only programs on this
machine can connect, unless --host says otherwise. With the environment variable NANODS_TOKEN set,
every request must bring that token: Authorization: Bearer ...
"""

import asyncio
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanods.errors import UserError, run
from nanods.flags import parse_args


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories, or presets (then runs/PRESET). Each model has the name of its folder."""
    port: int = 8000
    """HTTP port; 0 chooses a free one."""
    grpc_port: int = 50051
    """gRPC port; 0 chooses a free one."""
    host: str = "127.0.0.1"
    """The address to listen on. One that other machines reach needs NANODS_TOKEN."""
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    """Where to compute."""
    place: tuple[str, ...] = ()
    """Rules that put parts of the models elsewhere than on --device, or store them in another
    format: "blocks.*.mlp=cpu:int8" (nanods/serving/placement.py)."""
    slots: int = 32
    """Requests that generate at the same time, for each model."""
    max_waiting: int = 256
    """Requests (V3: inputs) that wait, for each model; one more is refused with 429."""
    max_body: int = 16
    """MiB of a request, at most."""
    timeout: float = 300.0
    """Seconds after which a request is cancelled (504)."""
    grace: float = 30.0
    """Seconds to answer what is under way, after SIGTERM or Ctrl-C."""
    monitor: Path | None = None
    """Folder for alarms.jsonl and the references of normal traffic; without it a restarted server
    records new references."""
    webhook: str | None = None
    """The URL to which alarms are posted, as JSON."""
    canary_minutes: float = 10.0
    """From one measurement of each model's quality to the next; 0: none."""
    slow_seconds: float = 5.0
    """An answer is late if its first part takes longer. The alarm fires if more than 5% of the last
    200 are late."""


def main() -> None:
    args = parse_args(Args, __doc__)
    token = os.environ.get("NANODS_TOKEN") or None
    if token and not (token.isascii() and token.isprintable() and token == token.strip()):
        raise UserError(
            "NANODS_TOKEN: no HTTP header can hold this token; choose one of printable ASCII "
            "characters, without blanks at its ends"
        )
    if not args.runs:
        raise UserError("name a run to serve: python -m nanods.serving v2-tiny")
    if not token and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} is open to other machines: set NANODS_TOKEN to a secret that "
            "clients must send, or leave --host out"
        )
    try:
        from nanods.serving.grpc_server import address
        from nanods.serving.models import load_models
        from nanods.serving.monitor import Monitor
        from nanods.serving.server import Settings, serve_until_signalled
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nanods"):
            raise
        raise UserError(
            f"serving needs the package {error.name}: make setup EXTRAS=serve, or "
            "pip install 'nanods[serve]'"
        ) from None
    if args.monitor is None:
        print("notice     no --monitor FOLDER: alarms and normal traffic are not kept on disk")
    else:
        make_folder(args.monitor)
    monitor = Monitor(args.monitor, args.webhook, args.slow_seconds)
    models = load_models(args.runs, args.device, args.place, args.slots, args.max_waiting)
    settings = Settings(
        args.host,
        args.port,
        args.grpc_port,
        token,
        args.max_body << 20,
        args.timeout,
        args.grace,
        args.canary_minutes,
    )

    def on_ready(port: int, grpc_port: int) -> None:
        for model in models.values():
            print(f"model      {model.name}: {', '.join(model.operations)}")
        http, grpc = address(args.host, port), address(args.host, grpc_port)
        print(f"serving    http://{http}  (gRPC: {grpc})", flush=True)

    asyncio.run(serve_until_signalled(models, settings, monitor, on_ready))
    print("stopped", flush=True)


def make_folder(folder: Path) -> None:
    """Make the monitor's folder. Raises UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        raise UserError(f"--monitor {folder}: it cannot be written; name another folder")


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run(main)
