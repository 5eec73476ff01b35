"""Start the gRPC server and the REST routes in one process, and stop them without losing answers.

After SIGTERM or Ctrl-C the server drains: it answers what it has accepted, refuses what is new,
and waits for them up to `grace` seconds: first for HTTP, then for gRPC.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanods.errors import UserError
from nanods.serving.grpc_server import Service, address, start_grpc
from nanods.serving.model_metrics import start_canaries, watch_models
from nanods.serving.models import ServedModel
from nanods.serving.monitor import Monitor
from nanods.serving.rest import make_app

CLIENT_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free; likewise grpc_port."""
    grpc_port: int = 50051
    token: str | None = None
    max_body: int = 16 << 20
    """Bytes of a request."""
    timeout: float = 300.0
    """Seconds of a call, at most."""
    grace: float = 30.0
    """Seconds to wait when it stops, at most: for HTTP, then for gRPC, then for each model."""
    canary_minutes: float = 10.0
    """From one canary to the next; 0: none."""


class Connection(H11Protocol):
    """Close a connection whose client is slow: one that has not sent its whole request after
    CLIENT_SECONDS, or does not read its answer for as long. Such clients would fill the server."""

    patience: asyncio.TimerHandle | None = None

    def wait(self, is_needed: bool) -> None:
        """Start to wait for the client, if it does not yet; or stop."""
        if not is_needed and self.patience:
            self.patience.cancel()
            self.patience = None
        elif is_needed and not self.patience:
            self.patience = self.loop.call_later(CLIENT_SECONDS, self.transport.abort)

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.wait(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_reading = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        self.wait(is_reading or self.flow.write_paused)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.wait(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.wait(False)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.wait(False)


class HTTPServer(uvicorn.Server):
    """Signals are handled by `serve`, for both servers."""

    def capture_signals(self):
        return contextlib.nullcontext()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the port. Raises UserError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # so that a server that was stopped can be started again at once
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            fix = "give a name or an address of this machine, or leave --host out"
        elif error.errno == errno.EACCES:
            fix = "choose a port of 1024 or more (0: any that is free)"
        else:
            fix = "stop the program that has it, or choose another port (0: any that is free)"
        raise UserError(f"--host {host} --port {port}: {error.strerror}; {fix}") from None
    return listener


async def serve(
    models: dict[str, ServedModel],
    settings: Settings,
    monitor: Monitor,
    stop: asyncio.Event,
    on_ready: Callable[[int, int], None],
) -> None:
    """Serve until `stop` is set, then drain. `on_ready(port, grpc_port)` is called once both
    servers answer. Raises UserError if a port is taken, or a reference of traffic is damaged."""
    listener = bind(settings.host, settings.port)
    watch_models(monitor, models)
    service = Service(models, settings.timeout, monitor)
    grpc_server, healthy, grpc_port = await start_grpc(
        service, settings.host, settings.grpc_port, settings.token, settings.max_body
    )
    for model in models.values():
        model.thread.start()
    if settings.canary_minutes:  # now that no port can be refused any more
        start_canaries(monitor, models, settings.canary_minutes)
    options = [
        ("grpc.max_send_message_length", settings.max_body),
        ("grpc.max_receive_message_length", -1),  # the images of a search exceed gRPC's 4 MiB
        ("grpc.enable_http_proxy", 0),  # this machine is reached without a proxy
    ]
    target = address(settings.host, grpc_port)
    async with grpc.aio.insecure_channel(target, options) as channel:
        app = make_app(channel, settings.token, settings.max_body, settings.timeout, monitor)
        http = HTTPServer(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=settings.grace,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        while not http.started and not serving.done():
            await asyncio.sleep(0.01)
        on_ready(listener.getsockname()[1], grpc_port)
        await stop.wait()
        service.is_stopping = True
        await healthy.enter_graceful_shutdown()
        http.should_exit = True
        await serving
    await grpc_server.stop(settings.grace)
    for model in models.values():
        model.worker.close()
    for model in models.values():
        await asyncio.to_thread(model.thread.join, settings.grace)
    await asyncio.to_thread(monitor.close)


async def serve_until_signalled(
    models: dict[str, ServedModel],
    settings: Settings,
    monitor: Monitor,
    on_ready: Callable[[int, int], None],
) -> None:
    """Serve until the process gets SIGTERM or SIGINT."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def drain(*_) -> None:
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, drain) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        await serve(models, settings, monitor, stop, on_ready)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
