"""The gRPC service (nanods/serving/serve.proto): it validates requests and hands them to
the thread of their model.

Handlers run in one asyncio loop and compute nothing: they check a request, hand it to the thread of
its model, and wait. Whenever a handler ends (answered, cancelled by the client, disconnected, or
beyond its deadline), its request leaves the engine.

    client -> handler -> Engine.submit ... Inbox.deliver (engine's thread) -> Inbox -> handler

Every call has a deadline: the client's, or the server's if that is sooner. Each call
reports to the monitor how it ended, and its prompt's bits per byte or its inputs' distances to the
gallery (nanods/serving/monitor.py).
"""

import asyncio
import codecs
import hmac
import math
import secrets
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nanods.contact_sheet import png_url, wav_url
from nanods.data.instructions import ROLES, prompt_tokens
from nanods.data.tokenizer import ByteTokenizer
from nanods.errors import UserError
from nanods.flags import check_ranges
from nanods.serving import embedder
from nanods.serving.engine import BusyError, Request, Task, Token
from nanods.serving.models import ServedModel
from nanods.serving.monitor import Monitor
from nanods.serving.search import Gallery, Hit, read_input

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # where grpc finds the .proto, from which it makes the classes
    sys.path.append(str(ROOT))
messages, services = grpc.protos_and_services("nanods/serving/serve.proto")
SERVICE = "nanods.Nanods"

MAX_NEW_TOKENS = 4096  # of a request
MAX_STOPS, MAX_LOGPROBS, MAX_ITEMS = 16, 20, 256  # of a request; items are inputs to embed
MAX_STOP = 256  # characters of a stop
MAX_CHARACTERS = 64  # of a prompt, for each token that the model reads; more are not tokenized
MAX_ERROR = 500  # characters of an error, which a request's own text can fill; gRPC takes 8 kB
MAX_TOP = 100  # results of a search
LATE = 0.05  # seconds before its deadline at which a call that the client ends counts as late


class Inbox:
    """The tokens of one request, from the engine's thread to the loop of its handler.

    Waking the loop costs more than a token, so it is woken for what can be sent: each token of a
    stream, or the last token of an answer that is sent as a whole. A handler that was slow takes
    all tokens that have come meanwhile.
    """

    def __init__(self, is_stream: bool) -> None:
        self.is_stream, self.tokens = is_stream, []
        self.loop, self.arrived = asyncio.get_running_loop(), asyncio.Event()
        self.first_time: float | None = None  # when the first token came

    def deliver(self, token: Token) -> None:
        self.first_time = self.first_time or time.perf_counter()
        self.tokens.append(token)
        if self.is_stream or token.finish:
            self.loop.call_soon_threadsafe(self.arrived.set)

    async def take(self) -> list[Token]:
        """Wait for tokens and return them."""
        await self.arrived.wait()
        self.arrived.clear()
        tokens, self.tokens = self.tokens, []
        return tokens


@dataclass
class Call:
    """A call under way, as the monitor will count it."""

    model: ServedModel | None
    start: float = field(default_factory=time.perf_counter)
    outcome: str = "failed"  # of nanods.serving.monitor.OUTCOMES; unless it ends otherwise
    first_seconds: float | None = None  # until the first token was drawn


class Service(services.NanodsServicer):
    def __init__(self, models: dict[str, ServedModel], timeout: float, monitor: Monitor) -> None:
        """`timeout`: the seconds that a call takes at most."""
        self.models, self.timeout, self.monitor = models, timeout, monitor
        self.is_stopping = False
        # Two threads: to decode a large image takes 300 MB.
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")

    # ---- the calls -------------------------------------------------------------------------------

    async def Models(self, request, context):  # noqa: N802
        return messages.ModelsReply(models=map(model_card, self.models.values()))

    async def Generate(self, request, context):  # noqa: N802
        async with self.answering(text_operation(request), request, context) as call:
            (reply,) = [reply async for reply in self.replies(call, request, is_stream=False)]
            return reply

    async def GenerateStream(self, request, context):  # noqa: N802
        async with self.answering(text_operation(request), request, context) as call:
            async for reply in self.replies(call, request, is_stream=True):
                yield reply

    async def Embed(self, request, context):  # noqa: N802
        async with self.answering("embedding", request, context) as call:
            model = call.model
            require(model, "embed")
            if not 1 <= len(request.inputs) <= MAX_ITEMS:
                raise UserError(f"{len(request.inputs)} inputs: send 1 to {MAX_ITEMS}")
            inputs = [await self.read(item, model) for item in request.inputs]
            rows = await model.worker.embed(inputs)
            self.report_inputs(model, inputs, rows)
            return messages.EmbedReply(
                embeddings=[messages.Embedding(values=row) for row in rows.tolist()],
                tokens=sum(embedder.count_tokens(model.worker.model, *item) for item in inputs),
            )

    async def Search(self, request, context):  # noqa: N802
        async with self.answering("search", request, context) as call:
            model = call.model
            require(model, "search")
            if request.top > MAX_TOP:
                raise UserError(f"top {request.top}: ask for at most {MAX_TOP}")
            inputs = [await self.read(request.query, model)]
            rows = await model.worker.embed(inputs)
            self.report_inputs(model, inputs, rows)
            hits = model.gallery.search(rows[0], request.modality, request.top or 5)
            return await asyncio.to_thread(search_reply, model.gallery, hits)

    async def read(self, item, model: ServedModel) -> embedder.Input:
        """Read an input in a thread. A call that ends meanwhile has no further one read."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.decoders, read_item, item, model)

    def report_inputs(self, model: ServedModel, inputs: list[embedder.Input], rows) -> None:
        """Tell the monitor how far the embeddings (N, M) of inputs are from the gallery's."""
        names = [name for name, _ in inputs]
        for name in model.gallery.embeddings if model.gallery else ():
            is_of_name = torch.tensor([each == name for each in names])
            for distance in model.gallery.distances(rows[is_of_name], name):
                self.monitor.traffic(model.name, name, distance)

    # ---- errors and deadlines --------------------------------------------------------------------

    @asynccontextmanager
    async def answering(self, operation: str, request, context) -> AsyncIterator[Call]:
        """Find the model of a request, limit the time, turn errors into its status, and count
        the call."""
        status, call = grpc.StatusCode, Call(self.models.get(request.model))

        async def refuse(code: grpc.StatusCode, text: str) -> None:
            call.outcome = "refused"
            await context.abort(code, text[:MAX_ERROR])

        remaining = context.time_remaining()
        limit = self.timeout if remaining is None else min(remaining, self.timeout)
        try:
            if self.is_stopping:
                await refuse(status.UNAVAILABLE, "the server is stopping")
            if call.model is None:
                known = ", ".join(self.models)
                await refuse(
                    status.NOT_FOUND, f"no model {request.model!r}; the models are {known}"
                )
            async with asyncio.timeout(limit):
                yield call
            call.outcome = "ok"
        except WrongOperationError as error:
            await refuse(status.FAILED_PRECONDITION, str(error))
        except UserError as error:
            await refuse(status.INVALID_ARGUMENT, str(error))
        except BusyError as error:
            await refuse(status.RESOURCE_EXHAUSTED, f"{error}: try again later")
        except (asyncio.CancelledError, GeneratorExit):
            # A client whose deadline has passed ends the call, too: it was not answered in time.
            if time.perf_counter() - call.start < limit - LATE:
                call.outcome = "cancelled"
            raise
        except TimeoutError:
            await context.abort(status.DEADLINE_EXCEEDED, f"not answered within {limit:.3g} s")
        except ComputeError:
            await context.abort(
                status.INTERNAL, "the computation failed; the server's log says why"
            )
        finally:
            seconds = time.perf_counter() - call.start
            self.monitor.request(operation, call.outcome, seconds, call.first_seconds)

    # ---- generation ------------------------------------------------------------------------------

    async def replies(self, call: Call, request, is_stream: bool) -> AsyncIterator:
        """Yield a request's answer: as it is generated, or as a whole."""
        model = call.model
        wanted = engine_request(model, request)
        inbox = Inbox(is_stream)
        # A character may take several tokens: the decoder returns it when it is whole.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        task = model.worker.submit(wanted, inbox.deliver)
        finish = None
        try:
            while not finish:
                tokens = await inbox.take()
                if not tokens:
                    continue
                finish = tokens[-1].finish
                if finish == "error":
                    raise ComputeError
                if call.first_seconds is None:
                    call.first_seconds = inbox.first_time - call.start
                    self.report_prompt(model, task)
                texts = [decoder.decode(t.text, final=bool(t.finish)) for t in tokens]
                scored = []
                if wanted.logprobs is not None:
                    answer = [t for t in tokens if t.id not in wanted.stop_tokens]
                    scored = [scored_token(t, model.finished.tokenizer) for t in answer]
                yield messages.GenerateReply(
                    text="".join(texts),
                    tokens=scored,
                    traces=[trace_message(t, text) for t, text in zip(tokens, texts, strict=True)]
                    if wanted.trace
                    else [],
                    finish=finish or "",
                    prompt_tokens=len(wanted.prompt),
                    new_tokens=len(tokens),
                )
        finally:
            model.worker.cancel(task)

    def report_prompt(self, model: ServedModel, task: Task) -> None:
        """Tell the monitor the bits per byte of a prompt, which has been read."""
        # Its first token has no probability: nothing stands before it.
        count = len(model.finished.tokenizer.decode_bytes(task.request.prompt[1:]))
        if count:
            self.monitor.traffic(model.name, "prompt", task.prompt_nats / math.log(2) / count)


def text_operation(request) -> str:
    """Return how the monitor calls what is asked of a language model."""
    return "chat" if request.messages else "completion"


class WrongOperationError(UserError):
    """This run cannot do what is asked of it."""


class ComputeError(Exception):
    """The engine failed while it worked on the request."""


def require(model: ServedModel, operation: str) -> None:
    """Raise WrongOperationError unless the model has the operation."""
    if operation not in model.operations:
        has = " and ".join(model.operations)
        raise WrongOperationError(f"{model.name} does not {operation}: it can {has}")


def engine_request(model: ServedModel, request) -> Request:
    """Return what the engine is asked. Raises UserError for what it cannot do."""
    finished = model.finished
    context = finished.config.model.context_length
    characters = len(request.prompt) + sum(len(message.text) for message in request.messages)
    if characters > MAX_CHARACTERS * context:
        raise UserError(f"{characters} characters; the model reads at most {context} tokens")
    if request.messages:
        require(model, "chat")
        for message in request.messages:
            if message.role not in ROLES:
                known = ", ".join(ROLES)
                raise UserError(f"no role {message.role!r}: the roles are {known}")
        if request.prompt:
            raise UserError("a prompt and messages: send one of them")
        said = [(message.role, message.text) for message in request.messages]
        prompt = prompt_tokens(said, finished.tokenizer)
    else:
        require(model, "generate")
        prompt = finished.tokenizer.encode(request.prompt).tolist()
    if not prompt:
        raise UserError("the prompt is empty: the model continues a text, so send some of it")
    if len(prompt) > context:
        raise UserError(f"the prompt has {len(prompt)} tokens; the model reads at most {context}")
    temperature = request.temperature if request.HasField("temperature") else 1.0
    max_tokens, logprobs = request.max_tokens or 16, None
    if max_tokens > MAX_NEW_TOKENS:
        raise UserError(f"max_tokens {max_tokens}: must be at most {MAX_NEW_TOKENS}")
    given = {"temperature": temperature, "top-k": request.top_k or 1, "top-p": request.top_p or 1.0}
    try:
        check_ranges(given)
    except ValueError as error:
        raise UserError(str(error).removeprefix("--").replace("-", "_", 1)) from None
    if 0 < temperature < 1e-6:
        raise UserError(f"temperature {temperature}: must be 0, or 1e-6 or more")
    lengths = list(map(len, request.stop))
    if len(lengths) > MAX_STOPS or not all(1 <= length <= MAX_STOP for length in lengths):
        raise UserError(f"stop: send at most {MAX_STOPS} texts, each of 1 to {MAX_STOP} characters")
    if request.HasField("logprobs"):
        logprobs = request.logprobs
        if logprobs > MAX_LOGPROBS:
            raise UserError(f"logprobs {logprobs}: must be at most {MAX_LOGPROBS}")
    return Request(
        tuple(prompt),
        max_tokens,
        temperature,
        request.top_k or None,
        request.top_p or None,
        request.seed if request.HasField("seed") else secrets.randbits(32),
        stop_tokens=model.end_tokens if request.messages else frozenset(),
        stop=tuple(stop.encode() for stop in request.stop),
        logprobs=logprobs,
        trace=request.trace,
    )


def scored_token(token: Token, tokenizer):
    """Return a token with its log-probability and those of the likeliest ones."""
    top = [
        messages.ScoredToken(token=tokenizer.decode_bytes([i]), logprob=logprob)
        for i, logprob in token.top
    ]
    text = tokenizer.decode_bytes([token.id])
    return messages.ScoredToken(token=text, logprob=token.logprob, top=top)


def trace_message(token: Token, text: str):
    """Return how a token was computed, beside its text."""

    def by_layer(rows: list[list[int]]) -> list:
        return [messages.Numbers(values=row) for row in rows]

    trace = token.trace
    return messages.Trace(
        text=text,
        position=trace.position,
        start=trace.start,
        experts=by_layer(trace.experts),
        blocks=by_layer(trace.blocks),
    )


def search_reply(gallery: Gallery, hits: list[Hit]):
    """Return the hits with their images and sounds as data URLs."""
    examples, made = gallery.examples, []
    for i, score in hits:
        hit = messages.Hit(index=i, score=score, caption=examples.captions[i])
        if examples.images is not None and examples.has("image")[i]:
            hit.image = png_url(examples.images[i])
        if examples.waves is not None and examples.has("audio")[i]:
            hit.audio = wav_url(examples.waves[i])
        made.append(hit)
    return messages.SearchReply(hits=made)


def read_item(item, model: ServedModel) -> embedder.Input:
    """Return what the model reads of a text or a file. Raises UserError if it cannot."""
    finished, name = model.finished, item.WhichOneof("of")
    if name not in finished.config.multimodal.modalities:
        known = " and ".join(finished.config.multimodal.modalities)
        raise UserError(f"{name or 'nothing'} to embed: {model.name} reads {known}")
    return name, read_input(name, getattr(item, name), finished.config, finished.tokenizer)


def model_card(model: ServedModel):
    """Return what a client may want to know about a model."""
    config = model.finished.config
    total, active = model.finished.model.count_parameters()
    trunk = config.model
    n_expert = trunk.moe.n_expert if trunk.moe else 0
    is_sparse = "generate" in model.operations and trunk.attention.kind == "block"
    return messages.Model(
        name=model.name,
        preset=config.preset,
        parameters=total,
        active_parameters=active,
        context_length=config.model.context_length,
        operations=model.operations,
        modalities=config.multimodal.modalities or ("text",),
        created=model.created,
        n_layer=trunk.n_layer,
        n_expert=n_expert if n_expert > 1 else 0,
        block_size=trunk.attention.block_size if is_sparse else 0,
        is_bytes=isinstance(model.finished.tokenizer, ByteTokenizer),
    )


# ---- the server ----------------------------------------------------------------------------------


def has_token(authorization: str | None, token: str) -> bool:
    """Return whether the header "Authorization: Bearer ..." holds the token."""
    expected = f"Bearer {token}".encode()
    return hmac.compare_digest((authorization or "").encode(errors="replace"), expected)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuse calls without the token, except those about the server's health."""

    def __init__(self, token: str) -> None:
        self.token = token

    async def intercept_service(self, continuation, call):
        handler = await continuation(call)
        headers = dict(call.invocation_metadata)
        is_health = call.method.startswith("/grpc.health.")
        if handler is None or is_health or has_token(headers.get("authorization"), self.token):
            return handler

        async def refuse(request, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "send the server's bearer token")

        if handler.request_streaming:  # reflection
            return grpc.stream_stream_rpc_method_handler(refuse)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(refuse, handler.request_deserializer)
        return grpc.unary_unary_rpc_method_handler(refuse, handler.request_deserializer)


def address(host: str, port: int) -> str:
    """Return host:port; in the form for IPv6, [host]:port, where that is what it is."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def start_grpc(
    service: Service, host: str, port: int, token: str | None, max_body: int
) -> tuple[grpc.aio.Server, health.aio.HealthServicer, int]:
    """Start the server. Returns it, its health, and its port. Raises UserError if that is taken."""
    server = grpc.aio.server(
        interceptors=[TokenInterceptor(token)] if token else [],
        options=[
            ("grpc.so_reuseport", 0),  # two servers on one port would share the calls
            ("grpc.max_receive_message_length", max_body),
        ],
    )
    services.add_NanodsServicer_to_server(service, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        bound = server.add_insecure_port(address(host, port))
    except RuntimeError:
        raise UserError(f"--grpc-port {port}: it is taken; choose another, or 0 for any") from None
    await server.start()
    for name in ("", SERVICE):
        await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server, healthy, bound
