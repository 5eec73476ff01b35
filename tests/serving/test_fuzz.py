"""Random requests, made by schemathesis from the server's own OpenAPI document: it answers or
refuses each of them, and as the document says."""
# ruff: noqa: E402

import numpy as np
import pytest

for name in ("grpc_tools", "grpc_health", "grpc_reflection", "fastapi", "uvicorn", "httpx"):
    pytest.importorskip(name, reason="the extra serve is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from nanods.data.examples import Examples
from nanods.data.sound import normalized_log_mel, samples_of
from nanods.serving.grpc_server import MAX_NEW_TOKENS
from nanods.serving.models import embedding_model, language_model
from nanods.training.saved_gallery import SavedGallery
from tests.serving.test_server import Running, finished_run

load_all_checks()
MODELS = {"completions": "base", "chat/completions": "tuned", "embeddings": "space"}
MODELS |= {"search": "space"}
REFUSALS = (  # of what is right by the document; it cannot say these
    "the model reads at most",
    "a data URL is not base64",
    "there is no word in the text",
    "must be 0, or 1e-6 or more",
    "stream: send one prompt",
)


def gallery_run(monkeypatch):
    """Return a V3 of random weights with four examples, each of three modalities."""
    run, draw = finished_run("v3-tiny", data="photos"), np.random.default_rng(0)
    size, frames = run.config.multimodal.image_size, run.config.multimodal.frames
    images = draw.integers(0, 256, (4, 3, size, size)).astype(np.float32) / 255
    waves = draw.uniform(-1, 1, (4, samples_of(frames))).astype(np.float32)
    captions = ["a cat", "a dog", "a boat", "a tree"]
    examples = Examples(np.arange(4), captions, images, waves=waves, mels=normalized_log_mel(waves))
    held_out = SavedGallery(examples, frozenset())
    monkeypatch.setattr("nanods.serving.models.held_out_examples", lambda *args: held_out)
    return embedding_model("space", run, max_waiting=256)


@pytest.mark.parametrize("n", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_random_requests_are_answered_as_the_document_says(monkeypatch, n):
    """Seed 0; `n` requests of each operation, about half of which the document allows."""
    models = [
        language_model("base", finished_run("v2-tiny"), slots=8, max_waiting=256),
        language_model("tuned", finished_run("v1-tiny", answers=True), slots=8, max_waiting=256),
        gallery_run(monkeypatch),
    ]
    running = Running(models, timeout=60.0)
    seen = Counter()

    def check(case):
        route, body = case.path.removeprefix("/v1/"), case.body
        is_right = case.meta.generation.mode == GenerationMode.POSITIVE
        if isinstance(body, dict):
            if isinstance(body.get("model"), str):
                body["model"] = MODELS[route]  # random names would all be unknown
            for name in ("max_tokens", "max_completion_tokens"):
                if body.get(name) in range(8, MAX_NEW_TOKENS + 1):  # 4000.0 is, too
                    body[name] = 8
        answer = case.call(base_url=running.url, timeout=90)
        skipped = []
        if is_right and answer.status_code == 400 and any(w in answer.text for w in REFUSALS):
            skipped = [check for check in CHECKS.get_all() if "positive" in check.__name__]
        case.validate_response(answer, excluded_checks=skipped)
        assert "Traceback" not in answer.text
        seen[case.operation.label, answer.status_code] += 1

    try:
        document = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for operation in document.get_all_operations():
            right, wrong = (
                operation.ok().as_strategy(generation_mode=mode)
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            )
            run = settings(
                max_examples=n,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(seed(0)(given(right | wrong)(check)))
            run()
    finally:
        running.close()
    print(seen)
    assert {label for label, status in seen if status == 200} == {
        f"GET {path}" for path in ("/healthz", "/metrics", "/v1/models")
    } | {f"POST /v1/{route}" for route in MODELS}


def test_a_stream_is_answered_as_the_document_says():
    model = language_model("base", finished_run("v2-tiny"), slots=2, max_waiting=2)
    running = Running([model], timeout=60.0)
    try:
        document = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        case = document["/v1/completions"]["POST"].Case(
            body={"model": "base", "prompt": "a", "max_tokens": 3, "stream": True},
            media_type="application/json",
        )
        answer = case.call(base_url=running.url, timeout=90)
        assert answer.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(answer)
    finally:
        running.close()
