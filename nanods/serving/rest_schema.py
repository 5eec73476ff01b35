"""The JSON that the REST routes answer, as /openapi.json describes it.

Nothing is computed with these classes: nanods/serving/rest_json.py makes the answers, and
tests/serving/test_fuzz.py compares answers with what is said here.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorFields(Reply):
    message: str
    type: str
    param: None
    code: int
    """The status code."""


class Error(Reply):
    error: ErrorFields


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    preset: str
    parameters: int
    active_parameters: int
    context_length: int
    operations: list[Literal["generate", "chat", "embed", "search"]]
    modalities: list[Literal["text", "image", "audio"]]
    n_layer: int
    n_expert: int
    block_size: int
    is_bytes: bool


class Models(Reply):
    object: Literal["list"]
    data: list[Model]


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Trace(Reply):
    text: str
    position: int
    start: int
    experts: list[list[int]]
    blocks: list[list[int]]


class Choice(Reply):
    index: int
    finish_reason: Literal["stop", "length"]
    trace: list[Trace] = []


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Choice):
    text: str
    logprobs: TextLogprobs | None


class Completion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str


class ChatChoice(Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class Chat(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of little-endian fp32."""


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Reply):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Hit(Reply):
    index: int
    score: float
    caption: str
    image: str | None
    """A data URL; likewise audio."""
    audio: str | None


class Hits(Reply):
    object: Literal["list"]
    model: str
    data: list[Hit]


class Health(Reply):
    status: Literal["ok"]
