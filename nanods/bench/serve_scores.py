"""Record the scores of real prompts, and make traffic of them, for nanods/bench/serve_alarms.py.

A prompt's score is its bits per byte under a trained run, which a server computes when it reads the
prompt. Prompts are pieces of a text that begin with a word and have 16 to 128 bytes. Normal traffic
has prompts of the run's validation text, cut into documents of 2,000 bytes. Changed traffic has
others mixed in:

    German    names of emoji in German, from the package emoji (extra emoji)
    base64    the validation text, encoded

The scores are real, their order is not: streams of any length draw them at random, as `resample`
says.

Shapes: D documents, N requests.
"""

import base64
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanods.data.emoji import name_in_words
from nanods.data.text import load_text
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.training.finished_run import load_run

PROMPT = (16, 128)  # bytes, drawn evenly between these
DOCUMENT = 2000  # bytes
PER_DOCUMENT, PER_LANGUAGE = 25, 300  # prompts recorded
DAY = 10_000  # requests
NEW_CLIENT = 0.2  # probability that a request comes from another client than the one before
LEAN = 0.5  # of the daily traffic: see `resample`

# ---- recording -----------------------------------------------------------------------------------


def draw_prompts(text: bytes, count: int, random: np.random.Generator) -> list[bytes]:
    """Return pieces of a text that begin with a word."""
    begins = [i for i in range(1, len(text) - PROMPT[1]) if text[i - 1 : i].isspace()]
    starts = random.choice(begins or range(len(text) - PROMPT[1]), count)
    lengths = random.integers(PROMPT[0], PROMPT[1] + 1, count)
    return [text[start : start + n] for start, n in zip(starts, lengths, strict=True)]


@torch.no_grad()
def bits_per_byte(model: GPT, prompts: list[bytes], size: int = 64) -> np.ndarray:
    """Return the scores of prompts, as the server reports them: without the first byte, which
    nothing stands before. The model's tokens are bytes."""
    scores = np.empty(len(prompts))
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for start in range(0, len(prompts), size):
        rows = by_length[start : start + size]
        tokens = [torch.tensor(list(prompts[i])) for i in rows]
        tokens = pad_sequence(tokens, batch_first=True, padding_value=-1)  # (B, T)
        logits, _ = model(tokens[:, :-1].clamp(min=0))
        targets = tokens[:, 1:]
        nats = F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none").sum(dim=1)
        scores[rows] = nats / (targets >= 0).sum(dim=1) / math.log(2)
    return scores


def german() -> bytes:
    """Return the names of emoji in German. Raises UserError without the package."""
    try:
        import emoji
    except ImportError:
        raise UserError("--run needs the package emoji: make setup EXTRAS=emoji") from None
    emoji.config.load_language("de")
    names = (entry["de"] for entry in emoji.EMOJI_DATA.values() if "de" in entry)
    return ", ".join(dict.fromkeys(map(name_in_words, names))).encode()


def record(run: str) -> dict:
    """Return the scores of prompts under a run: of each document, and of each other language.

    Scores are in thousandths, many in a string, which keeps the file small.
    """
    finished, random = load_run(run, "cpu"), np.random.default_rng(0)
    data = load_text(finished.config.data)
    if data.tokenizer.to_json() != finished.tokenizer.to_json() or data.val.max() > 255:
        raise UserError(f"--run {run}: record with a run whose tokens are bytes, such as v1-tiny")
    text = data.val.astype(np.uint8).tobytes()
    others = {"German": german(), "base64": base64.b64encode(text)}

    def scores(text: bytes, count: int) -> str:
        found = bits_per_byte(finished.model, draw_prompts(text, count, random))
        return " ".join(map(str, (1000 * found).round().astype(int)))

    starts = range(0, len(text) - DOCUMENT + 1, DOCUMENT)
    return {
        "run": finished.config.preset,
        "step": finished.state["step"],
        "data": {"name": data.name, "sha256": data.sha256},
        "documents": [scores(text[i : i + DOCUMENT], PER_DOCUMENT) for i in starts],
        "others": {name: scores(other, PER_LANGUAGE) for name, other in others.items()},
    }


def parse(scores: str) -> np.ndarray:
    """Return the scores in a string that `record` wrote."""
    return np.array(scores.split(), float) / 1000


# ---- traffic -------------------------------------------------------------------------------------


def resample(documents: list[np.ndarray], kind: str, N: int, seed: int) -> np.ndarray:
    """Return the scores of N requests, (N,), drawn from those of D documents.

    iid: each request from any document. bursty: a client sends five requests in a row on average,
    all from one document. daily: the same, and the documents that are asked about change with the
    hour: document d has weight exp(LEAN sin(2 pi hour / 24) z_d), where z_d is its mean score,
    standardised.
    """
    random = np.random.default_rng(seed)
    is_new = (random.random(N) < NEW_CLIENT) | (kind == "iid")
    is_new[0] = True
    starts = np.flatnonzero(is_new)
    means = np.array([scores.mean() for scores in documents])
    z = (means - means.mean()) / means.std()
    hours, chosen = starts % DAY * 24 // DAY, np.empty(len(starts), int)
    for hour in range(24):
        lean = LEAN * math.sin(2 * math.pi * hour / 24) if kind == "daily" else 0.0
        weights = np.exp(lean * z)
        at_hour = hours == hour
        chosen[at_hour] = random.choice(len(z), at_hour.sum(), p=weights / weights.sum())
    document = chosen[np.cumsum(is_new) - 1]  # (N,)
    sizes = np.array([len(scores) for scores in documents])
    places = np.cumsum(sizes) - sizes  # where a document's scores begin
    return np.concatenate(documents)[places[document] + random.integers(0, sizes[document])]
