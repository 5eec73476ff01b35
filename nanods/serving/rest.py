"""The REST routes on top of the gRPC service: those that clients of OpenAI's API speak already.

    GET  /v1/models, /v1/models/{name}     POST /v1/completions        POST /v1/embeddings
    GET  /healthz, /openapi.json           POST /v1/chat/completions   POST /v1/search
    GET  /metrics  for Prometheus          GET  /  a page to try them (page.html)

A route turns JSON into a message of nanods/serving/serve.proto, calls the gRPC server, and turns
its reply into JSON. It decides nothing: limits, deadlines and errors are the service's. What HTTP
adds is here: the size of bodies, the token, server-sent events, and clients that disconnect.
FastAPI does not tell a handler that its client has left, so every route watches for it and cancels
its call, which ends the computing.

Fields that OpenAI's API has and this server does not are refused, unless they ask for nothing: a
client learns that `presence_penalty` does nothing here.
"""

import asyncio
import base64
import binascii
import json
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

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
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from nanods.serving.grpc_server import MAX_ITEMS, has_token, messages, services
from nanods.serving.monitor import Monitor

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
KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}

# ---- requests ------------------------------------------------------------------------------------


def utf8(text: str) -> str:
    """Return the text. Raises UnicodeEncodeError, which is a ValueError, for half a character:
    JSON can spell one (\\ud800), and no message can hold it."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(utf8)]
Unused = Annotated[float | None, Field(ge=0, le=0)]  # a field that may ask for nothing only


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Text


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Strict):
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**24)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    stop: Text | list[Text] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = 1
    trace: bool | None = False
    """nanods' own: how each token was computed. A choice then has "trace", a list."""
    presence_penalty: Unused = None
    frequency_penalty: Unused = None

    def message(self):
        """Return what both kinds of generation share, as a message."""
        request = messages.GenerateRequest(
            model=self.model,
            max_tokens=self.max_tokens or 0,
            top_k=self.top_k or 0,
            top_p=self.top_p or 0,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
            trace=bool(self.trace),
        )
        if self.temperature is not None:
            request.temperature = self.temperature
        if self.seed is not None:
            request.seed = self.seed
        return request


class CompletionRequest(Sampling):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS)]
    logprobs: int | None = Field(None, ge=0, le=2**31)
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    suffix: None = None

    def requests(self) -> list:
        """Return a message for each prompt."""
        made = []
        for prompt in [self.prompt] if isinstance(self.prompt, str) else self.prompt:
            request = self.message()
            request.prompt = prompt
            if self.logprobs is not None:
                request.logprobs = self.logprobs
            made.append(request)
        return made


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=2**31)

    def request(self):
        request = self.message()
        request.max_tokens = self.max_completion_tokens or self.max_tokens or 0
        if self.logprobs:
            request.logprobs = self.top_logprobs or 0
        for message in self.messages:
            content, role = message.content, message.role.replace("developer", "system")
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            request.messages.add(role=role, text=text)
        return request


class EmbeddingsRequest(Strict):
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS)]
    """Texts; images and sounds as data URLs (data:image/png;base64,...)."""
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: None = None
    user: str | None = None


class SearchRequest(Strict):
    query: Text
    """A text, or an image or a sound as a data URL."""
    modality: Literal["text", "image", "audio"]
    top: int = Field(5, ge=1, le=2**31)


def read_item(text: str):
    """Return an input to embed: a text, or the file that a data URL holds."""
    kind, comma, data = text.partition(";base64,")
    name = kind.removeprefix("data:").partition("/")[0]
    if not comma or not kind.startswith("data:") or name not in ("image", "audio"):
        return messages.Input(text=text)
    try:
        return messages.Input(**{name: base64.b64decode(data, validate=True)})
    except binascii.Error as error:
        raise HTTPException(400, f"a data URL is not base64: {error}") from None


# ---- replies -------------------------------------------------------------------------------------


def error_body(status: int, message: str) -> dict:
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(status: int, message: str) -> JSONResponse:
    headers = {"Retry-After": RETRY_AFTER} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message), status, headers)


def shown(token) -> str:
    """Return the text of a token; of a part of a character, its bytes."""
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)


def completion_logprobs(reply, start: int) -> dict | None:
    """Return a reply's tokens as /v1/completions shows them; `start`: characters before them."""
    if not reply.tokens:
        return None
    texts = [shown(token) for token in reply.tokens]
    offsets = [start]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in reply.tokens],
        "top_logprobs": [{shown(t): t.logprob for t in token.top} for token in reply.tokens],
        "text_offset": offsets,
    }


def chat_logprobs(reply) -> dict | None:
    """Return a reply's tokens as /v1/chat/completions shows them."""

    def scored(token) -> dict:
        return {"token": shown(token), "logprob": token.logprob, "bytes": list(token.token)}

    content = [scored(t) | {"top_logprobs": list(map(scored, t.top))} for t in reply.tokens]
    return {"content": content} if content else None


def completion_choice(reply, index: int = 0, start: int = 0) -> dict:
    return {
        "index": index,
        "text": reply.text,
        "logprobs": completion_logprobs(reply, start),
        "finish_reason": reply.finish or None,
        **traces(reply),
    }


def chat_choice(reply, part: str = "message") -> dict:
    return {
        "index": 0,
        part: {"role": "assistant", "content": reply.text},
        "logprobs": chat_logprobs(reply),
        "finish_reason": reply.finish or None,
        **traces(reply),
    }


def traces(reply) -> dict:
    """Return how the tokens of a reply were computed, where it was asked."""
    made = [
        {
            "text": trace.text,
            "position": trace.position,
            "start": trace.start,
            "experts": [list(layer.values) for layer in trace.experts],
            "blocks": [list(layer.values) for layer in trace.blocks],
        }
        for trace in reply.traces
    ]
    return {"trace": made} if made else {}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def envelope(kind: str, model: str) -> dict:
    """Return the fields around the choices of an answer."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    name, now = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
    return {"id": name, "object": kind, "created": now, "model": model}


def event(data: dict) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def model_json(card) -> dict:
    return {
        "id": card.name,
        "object": "model",
        "created": int(card.created),
        "owned_by": "nanods",
        "preset": card.preset,
        "parameters": card.parameters,
        "active_parameters": card.active_parameters,
        "context_length": card.context_length,
        "operations": list(card.operations),
        "modalities": list(card.modalities),
        "n_layer": card.n_layer,
        "n_expert": card.n_expert,
        "block_size": card.block_size,
        "is_bytes": card.is_bytes,
    }


# ---- clients that leave --------------------------------------------------------------------------


class ClientGoneError(Exception):
    """The client has disconnected: nobody reads an answer."""


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
    choice: Callable[[Any, int], dict],
    include_usage: bool,
) -> StreamingResponse:
    """Return the replies of a call as server-sent events.

    The first reply is awaited before the response begins, so that a refusal has its status code.
    """
    first = await unless_disconnected(request, call.read())

    async def events() -> AsyncIterator[bytes]:
        reply, characters, new_tokens = first, 0, 0
        try:
            while reply is not grpc.aio.EOF:
                yield event(around | {"choices": [choice(reply, characters)]})
                prompt_tokens, new_tokens = reply.prompt_tokens, new_tokens + reply.new_tokens
                characters += len(reply.text)
                reply = await call.read()
            if include_usage:
                yield event(around | {"choices": [], "usage": usage(prompt_tokens, new_tokens)})
            yield b"data: [DONE]\n\n"
        except grpc.aio.AioRpcError as error:
            yield event(error_body(HTTP_STATUS.get(error.code(), 500), error.details()))
        finally:  # also where the client has left
            call.cancel()

    return StreamingResponse(events(), media_type="text/event-stream")


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
    status: {"description": text}
    for status, text in {
        400: "A request that this model cannot serve",
        401: "A missing or wrong token",
        404: "No such model",
        413: "A body that is too large",
        429: "Too many requests wait; see Retry-After",
        503: "The server stops; see Retry-After",
        504: "Not answered in time",
    }.items()
}
STREAMED = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def make_app(
    channel: grpc.aio.Channel, token: str | None, max_body: int, timeout: float, monitor: Monitor
) -> FastAPI:
    """Return the application (ASGI) that answers by calls over the channel.

    `timeout`: the deadline of each call, in seconds. `max_body` in bytes.
    """
    # The pages /docs and /redoc would load scripts from other servers.
    app = FastAPI(
        title="nanods", docs_url=None, redoc_url=None, responses=ERRORS, max_body_size=max_body
    )
    stub, health = services.NanodsStub(channel), health_pb2_grpc.HealthStub(channel)
    options = {"timeout": timeout}
    if token:
        options["metadata"] = (("authorization", f"Bearer {token}"),)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": CSP}
        )

    @app.get("/healthz")
    async def healthz() -> dict:
        reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise HTTPException(503, "the server is stopping")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:  # not async: FastAPI calls it in a thread of its own
        return Response(monitor.metrics(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def cards() -> list[dict]:
        return [
            model_json(card)
            for card in (await stub.Models(messages.ModelsRequest(), **options)).models
        ]

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": await cards()}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        for card in await cards():
            if card["id"] == name:
                return card
        raise HTTPException(404, f"no model {name!r}")

    @app.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request):
        around, asked = envelope("text_completion", body.model), body.requests()
        if body.stream:
            if len(asked) > 1:
                raise HTTPException(400, "stream: send one prompt")
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            call = stub.GenerateStream(asked[0], **options)
            return await stream(
                request, call, around, lambda r, n: completion_choice(r, start=n), with_usage
            )
        calls = [stub.Generate(one, **options) for one in asked]
        replies = await unless_disconnected(request, all_replies(calls))
        return around | {
            "choices": [completion_choice(reply, i) for i, reply in enumerate(replies)],
            "usage": usage(
                sum(reply.prompt_tokens for reply in replies),
                sum(reply.new_tokens for reply in replies),
            ),
        }

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(body: ChatRequest, request: Request):
        if body.stream:
            around = envelope("chat.completion.chunk", body.model)
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            call = stub.GenerateStream(body.request(), **options)
            return await stream(
                request, call, around, lambda r, _: chat_choice(r, "delta"), with_usage
            )
        reply = await unless_disconnected(request, stub.Generate(body.request(), **options))
        return envelope("chat.completion", body.model) | {
            "choices": [chat_choice(reply)],
            "usage": usage(reply.prompt_tokens, reply.new_tokens),
        }

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> dict:
        texts = [body.input] if isinstance(body.input, str) else body.input
        asked = messages.EmbedRequest(model=body.model, inputs=map(read_item, texts))
        reply = await unless_disconnected(request, stub.Embed(asked, **options))
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

    @app.post("/v1/search")
    async def search(body: SearchRequest, request: Request) -> dict:
        query = read_item(body.query)
        asked = messages.SearchRequest(
            model=body.model, query=query, modality=body.modality, top=body.top
        )
        reply = await unless_disconnected(request, stub.Search(asked, **options))
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
        field = ".".join(map(str, first["loc"][1:]))
        text = f"{field}: {first['msg']}" if field else first["msg"]
        return error_response(400, text.encode(errors="replace").decode())

    @app.exception_handler(ClientGoneError)
    async def of_a_client_that_left(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    if token:
        app.add_middleware(TokenGate, token=token)
    return app
