"""The REST routes, compatible with OpenAI's API, on top of the gRPC service:

    GET  /v1/models, /v1/models/{name}     POST /v1/completions        POST /v1/embeddings
    GET  /healthz, /openapi.json           POST /v1/chat/completions   POST /v1/search
    GET  /metrics  for Prometheus          GET  /  a page to try them (page.html)

A route turns JSON (nanods/serving/rest_json.py) into a message of nanods/serving/serve.proto, calls
the gRPC server, and turns its reply into JSON. It decides nothing: limits, deadlines and errors are
the service's. What HTTP adds is here: the size of bodies, the token, server-sent events, and
clients that disconnect. FastAPI does not tell a handler that its client has disconnected, so every
route watches for it and cancels its call, which ends the computing.
"""

import asyncio
import base64
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from nanods.serving.grpc_server import has_token, messages, services
from nanods.serving.monitor import Monitor
from nanods.serving.rest_json import (
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    Offsets,
    SearchRequest,
    chat_choice,
    completion_choice,
    envelope,
    error_body,
    event,
    model_json,
    read_item,
    usage,
)
from nanods.serving.rest_schema import (
    Chat,
    Completion,
    Embeddings,
    Error,
    Health,
    Hits,
    Model,
    Models,
)

CODES = grpc.StatusCode
HTTP_STATUS = {
    CODES.INVALID_ARGUMENT: 400,
    CODES.FAILED_PRECONDITION: 400,
    CODES.UNAUTHENTICATED: 401,
    CODES.NOT_FOUND: 404,
    CODES.RESOURCE_EXHAUSTED: 429,
    CODES.CANCELLED: 499,
    CODES.UNAVAILABLE: 503,
    CODES.DEADLINE_EXCEEDED: 504,
}
RETRY_AFTER = "1"  # seconds
PAGE = Path(__file__).with_name("page.html")
CSP = (  # of the page: it loads nothing from elsewhere
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; media-src data:; frame-ancestors 'none'"
)

# ---- clients that leave --------------------------------------------------------------------------


class ClientGoneError(Exception):
    """The client disconnected before its answer was sent."""


async def unless_disconnected(request: Request, call: Awaitable[Any]) -> Any:
    """Await a call. Cancel it and raise ClientGoneError if the client disconnects meanwhile."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone, answer = asyncio.ensure_future(disconnected()), asyncio.ensure_future(call)
    try:
        await asyncio.wait((gone, answer), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientGoneError
    finally:
        gone.cancel()
        answer.cancel()


async def all_replies(calls: list) -> list:
    """Await several calls. If one fails, or this is cancelled, cancel the others."""
    try:
        return await asyncio.gather(*calls)
    finally:
        for call in calls:
            call.cancel()


async def stream(
    request: Request,
    call,
    around: dict,
    choice: Callable[[Any], dict],
    include_usage: bool,
) -> StreamingResponse:
    """Return the replies of a call as server-sent events.

    The first reply is awaited before the response begins, so that a refusal has its status code.
    """
    first = await unless_disconnected(request, call.read())

    async def events() -> AsyncIterator[bytes]:
        reply, new_tokens = first, 0
        try:
            while reply is not grpc.aio.EOF:
                yield event(around | {"choices": [choice(reply)]})
                prompt_tokens, new_tokens = reply.prompt_tokens, new_tokens + reply.new_tokens
                reply = await call.read()
            if include_usage:
                yield event(around | {"choices": [], "usage": usage(prompt_tokens, new_tokens)})
            yield b"data: [DONE]\n\n"
        except grpc.aio.AioRpcError as error:
            yield event(error_body(HTTP_STATUS.get(error.code(), 500), error.details()))
        finally:  # also where the client has left
            call.cancel()

    return StreamingResponse(events(), media_type="text/event-stream")


def error_response(status: int, message: str) -> JSONResponse:
    headers = {"Retry-After": RETRY_AFTER} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message), status, headers)


class TokenGate:
    """Refuse requests without the server's token, except those about its health, and the page,
    which asks for it."""

    def __init__(self, app, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/", "/healthz"):
            sent = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            if not has_token(sent, self.token):
                refusal = error_response(401, "send the server's token: Authorization: Bearer ...")
                return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)


# ---- the routes ----------------------------------------------------------------------------------

ERRORS = {
    400: "A request that this model cannot serve",
    401: "A missing or wrong token",
    404: "No such model",
    413: "A body that is too large",
    429: "Too many requests wait; see Retry-After",
    500: "The computation failed",
    503: "The server stops; see Retry-After",
    504: "Not answered in time",
}
STREAM = (
    "The answer. As a stream: data: and JSON, for each part; then data: [DONE]. A part with an "
    "error is the last one."
)


def replies(kind: type[BaseModel] | None, *errors: int, is_stream: bool = False) -> dict:
    """Return what the OpenAPI document says of a route's answers; `kind`: the JSON it answers."""
    said: dict[int, dict] = {code: {"description": ERRORS[code], "model": Error} for code in errors}
    if 413 in said:  # FastAPI answers with a text where Content-Length says so
        said[413]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if kind:
        said[200] = {"model": kind}
    if is_stream:
        said[200] |= {"description": STREAM, "content": {"text/event-stream": {}}}
    return said


def describe(app: FastAPI, token: str | None) -> None:
    """Correct what FastAPI says of itself in the OpenAPI document: what is wrong in a request is
    answered by 400, not 422, and the token is asked for."""
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    if token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/healthz"]["get"]["security"] = []


def make_app(
    channel: grpc.aio.Channel, token: str | None, max_body: int, timeout: float, monitor: Monitor
) -> FastAPI:
    """Return the application (ASGI) that answers by calls over the channel.

    `timeout`: the deadline of each call, in seconds. `max_body` in bytes.
    """
    # The pages /docs and /redoc would load scripts from other servers.
    app = FastAPI(title="nanods", docs_url=None, redoc_url=None, max_body_size=max_body)
    stub, health = services.NanodsStub(channel), health_pb2_grpc.HealthStub(channel)
    options = {"timeout": timeout}
    refused = (401,) if token else ()
    if token:
        options["metadata"] = (("authorization", f"Bearer {token}"),)
    asked = (*refused, *(code for code in ERRORS if code != 401))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": CSP}
        )

    @app.get("/healthz", responses=replies(Health, 503))
    async def healthz() -> dict:
        reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise HTTPException(503, "the server is stopping")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=replies(None, *refused))
    def metrics() -> Response:  # not async: FastAPI calls it in a thread of its own
        return Response(monitor.metrics(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def cards() -> list[dict]:
        return [
            model_json(card)
            for card in (await stub.Models(messages.ModelsRequest(), **options)).models
        ]

    @app.get("/v1/models", responses=replies(Models, *refused))
    async def models() -> dict:
        return {"object": "list", "data": await cards()}

    @app.get("/v1/models/{name}", responses=replies(Model, *refused, 404))
    async def model(name: str) -> dict:
        for card in await cards():
            if card["id"] == name:
                return card
        raise HTTPException(404, f"no model {name!r}")

    @app.post("/v1/completions", responses=replies(Completion, *asked, is_stream=True))
    async def completions(body: CompletionRequest, request: Request):
        around, requests = envelope("text_completion", body.model), body.requests()
        if body.stream:
            if len(requests) > 1:
                raise HTTPException(400, "stream: send one prompt")
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            call, offsets = stub.GenerateStream(requests[0], **options), Offsets()
            return await stream(
                request, call, around, lambda r: completion_choice(r, offsets=offsets), with_usage
            )
        calls = [stub.Generate(one, **options) for one in requests]
        replies = await unless_disconnected(request, all_replies(calls))
        return around | {
            "choices": [completion_choice(reply, i) for i, reply in enumerate(replies)],
            "usage": usage(
                sum(reply.prompt_tokens for reply in replies),
                sum(reply.new_tokens for reply in replies),
            ),
        }

    @app.post("/v1/chat/completions", responses=replies(Chat, *asked, is_stream=True))
    async def chat(body: ChatRequest, request: Request):
        if body.stream:
            around = envelope("chat.completion.chunk", body.model)
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            call = stub.GenerateStream(body.request(), **options)
            return await stream(
                request, call, around, lambda r: chat_choice(r, "delta"), with_usage
            )
        reply = await unless_disconnected(request, stub.Generate(body.request(), **options))
        return envelope("chat.completion", body.model) | {
            "choices": [chat_choice(reply)],
            "usage": usage(reply.prompt_tokens, reply.new_tokens),
        }

    @app.post("/v1/embeddings", responses=replies(Embeddings, *asked))
    async def embeddings(body: EmbeddingsRequest, request: Request) -> dict:
        texts = [body.input] if isinstance(body.input, str) else body.input
        wanted = messages.EmbedRequest(model=body.model, inputs=map(read_item, texts))
        reply = await unless_disconnected(request, stub.Embed(wanted, **options))
        rows = [list(embedding.values) for embedding in reply.embeddings]
        if body.encoding_format == "base64":  # of little-endian fp32
            rows = [base64.b64encode(array("f", row).tobytes()).decode() for row in rows]
        return {
            "object": "list",
            "model": body.model,
            "data": [
                {"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)
            ],
            "usage": {"prompt_tokens": reply.tokens, "total_tokens": reply.tokens},
        }

    @app.post("/v1/search", responses=replies(Hits, *asked))
    async def search(body: SearchRequest, request: Request) -> dict:
        query = read_item(body.query)
        wanted = messages.SearchRequest(
            model=body.model, query=query, modality=body.modality, top=body.top
        )
        reply = await unless_disconnected(request, stub.Search(wanted, **options))
        return {
            "object": "list",
            "model": body.model,
            "data": [
                {
                    "index": hit.index,
                    "score": hit.score,
                    "caption": hit.caption,
                    "image": hit.image or None,
                    "audio": hit.audio or None,
                }
                for hit in reply.hits
            ],
        }

    # ---- errors ----------------------------------------------------------------------------------

    @app.exception_handler(grpc.aio.AioRpcError)
    async def of_the_service(request: Request, error: grpc.aio.AioRpcError) -> Response:
        return error_response(HTTP_STATUS.get(error.code(), 500), error.details())

    @app.exception_handler(StarletteHTTPException)
    async def of_http(request: Request, error: StarletteHTTPException) -> Response:
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def of_a_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # without its input, which may be anything
        if first["type"] == "model_attributes_type":
            return error_response(400, "send JSON: an object, with Content-Type: application/json")
        # Of a value that may have several types, the last part is the name of one of them.
        field = ".".join(str(part) for part in first["loc"][1:] if "[" not in str(part))
        text = f"{field}: {first['msg']}" if field else first["msg"]
        return error_response(400, text.encode(errors="replace").decode())

    @app.exception_handler(ClientGoneError)
    async def of_a_client_that_left(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    describe(app, token)
    if token:
        app.add_middleware(TokenGate, token=token)
    return app
