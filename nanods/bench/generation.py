"""Measure the time per generated token with and without the cache: results/generation.json.

    python -m nanods.bench.generation            about 1 minute

Without the cache, each token reads the whole context again. 4 layers, 4 heads, width 128, 1,024
tokens of context, one row, median_seconds within one run; dense (V0) and block-sparse (V1).
"""

from dataclasses import replace
from pathlib import Path

import torch

from nanods.bench.runs import describe_machine, median_seconds, write_json
from nanods.config import PRESETS
from nanods.errors import run
from nanods.gpt import GPT


@torch.no_grad()
def measure(preset: str, context: int = 1024) -> dict[str, float]:
    """Return the milliseconds per token with and without the cache, and their ratio."""
    model = GPT(
        replace(PRESETS[preset].model, n_layer=4, n_head=4, n_embd=128, context_length=context)
    )
    tokens = torch.randint(0, model.config.vocab_size, (1, context))
    cache = model.new_cache(1)
    model(tokens[:, :-1], cache)
    lengths, max_length = cache.lengths, cache.max_length

    def cached_step() -> None:
        cache.lengths, cache.max_length = lengths, max_length  # overwrite the last position
        model(tokens[:, -1:], cache)

    def full_pass() -> None:
        model(tokens)

    cached = 1e3 * median_seconds({"cached": cached_step}, 50)["cached"]
    recomputed = 1e3 * median_seconds({"recomputed": full_pass}, 20)["recomputed"]
    return {"cached_ms": cached, "recomputed_ms": recomputed, "ratio": recomputed / cached}


def main() -> None:
    torch.set_num_threads(1)
    table = {"machine": describe_machine("fp32")}
    for preset in ("v0-tiny", "v1-tiny"):
        table[preset] = measure(preset)
        words = (f"{name} {value:.2f}" for name, value in table[preset].items())
        print(f"{preset}: {', '.join(words)}", flush=True)
    write_json(Path("results/generation.json"), table)


if __name__ == "__main__":
    run(main)
