"""The JSON of the REST routes: what clients may send, and what they get, as in OpenAI's API.

A body becomes a message of nanods/serving/serve.proto, and a reply becomes JSON. Fields of
OpenAI's API that this server does not have are refused, unless their value has no effect, such as
`presence_penalty` 0. Unknown fields inside a message, and `user`, are ignored.
"""

import base64
import codecs
import json
import time
import uuid
from typing import Annotated, Literal

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanods.serving.grpc_server import (
    MAX_ITEMS,
    MAX_LOGPROBS,
    MAX_NEW_TOKENS,
    MAX_STOP,
    MAX_STOPS,
    MAX_TOP,
    messages,
)

KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}

# ---- requests ------------------------------------------------------------------------------------


def utf8(text: str) -> str:
    """Return the text. Raises UnicodeEncodeError, which is a ValueError, for half a character:
    JSON can spell one (\\ud800), and no message can hold it."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(utf8)]
Words = Annotated[str, Field(min_length=1), AfterValidator(utf8)]
Texts = Annotated[list[Words], Field(min_length=1, max_length=MAX_ITEMS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP), AfterValidator(utf8)]
Unused = Annotated[float | None, Field(ge=0, le=0)]  # a field that may ask for nothing only
MAX_FIELDS = 100  # of an object; each unknown one costs an error message


class Strict(BaseModel):
    """An object without unknown fields, whose values have the types that it says: no "1" for 1."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def limit_and_round(cls, fields):
        """Refuse too many fields. Make 2.0 an integer, which it is in JSON."""
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:
            raise ValueError(f"{len(fields)} fields: send those that are needed")
        whole = {k: int(x) for k, x in fields.items() if isinstance(x, float) and x.is_integer()}
        return fields | whole


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Strict):
    model: Text
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=1e-9, le=1)
    top_k: int | None = Field(None, ge=1, le=2**24)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
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
    prompt: Words | Texts
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
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
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_ITEMS)]


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

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
    model: Text
    input: Words | Texts
    """Texts; images and sounds as data URLs (data:image/png;base64,...)."""
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: None = None
    user: str | None = None


class SearchRequest(Strict):
    model: Text
    query: Words
    """A text, or an image or a sound as a data URL."""
    modality: Literal["text", "image", "audio"]
    top: int = Field(5, ge=1, le=MAX_TOP)


def read_item(text: str):
    """Return an input to embed: a text, or the file that a data URL holds."""
    kind, comma, data = text.partition(";base64,")
    name = kind.removeprefix("data:").partition("/")[0]
    if not comma or not kind.startswith("data:") or name not in ("image", "audio"):
        return messages.Input(text=text)
    try:
        return messages.Input(**{name: base64.b64decode(data, validate=True)})
    except ValueError as error:  # binascii.Error, or a character that is not ASCII
        raise HTTPException(400, f"a data URL is not base64: {error}") from None


# ---- replies -------------------------------------------------------------------------------------


def error_body(status: int, message: str) -> dict:
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def shown(token) -> str:
    """Return the text of a token; of a part of a character, its bytes."""
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)


class Offsets:
    """Where the tokens of one answer begin in its text, one token after another."""

    def __init__(self) -> None:
        # A character may take several tokens: the decoder returns it when it is whole.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.characters = 0  # that the decoder has returned

    def next(self, token) -> int:
        """Return the characters before the one that has the token's first byte."""
        self.characters += len(self.decoder.decode(token.token[:1]))
        is_part = bool(self.decoder.getstate()[0])  # of a character that is not yet whole
        start = self.characters + is_part - 1
        self.characters += len(self.decoder.decode(token.token[1:]))
        return start


def completion_logprobs(reply, offsets: Offsets) -> dict | None:
    """Return a reply's tokens as /v1/completions shows them."""
    if not reply.tokens:
        return None
    return {
        "tokens": [shown(token) for token in reply.tokens],
        "token_logprobs": [token.logprob for token in reply.tokens],
        "top_logprobs": [{shown(t): t.logprob for t in token.top} for token in reply.tokens],
        "text_offset": [offsets.next(token) for token in reply.tokens],
    }


def chat_logprobs(reply) -> dict | None:
    """Return a reply's tokens as /v1/chat/completions shows them."""

    def scored(token) -> dict:
        return {"token": shown(token), "logprob": token.logprob, "bytes": list(token.token)}

    content = [scored(t) | {"top_logprobs": list(map(scored, t.top))} for t in reply.tokens]
    return {"content": content} if content else None


def completion_choice(reply, index: int = 0, offsets: Offsets | None = None) -> dict:
    """Return an answer, or with `offsets` the next part of one."""
    return {
        "index": index,
        "text": reply.text,
        "logprobs": completion_logprobs(reply, offsets or Offsets()),
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
