"""Time per generated token with the cache and by reading the whole context again: results/generation.json.

    python -m nanods.bench.generation            about 1 minute

4 layers, 4 heads, width 128, 1,024 tokens of context, one row, medians of the same run; dense (V0) and block-sparse (V1).
"""

from dataclasses import replace
from pathlib import Path

import torch

from nanods.bench.runs import median_seconds, write_json
from nanods.config import PRESETS
from nanods.gpt import GPT


@torch.no_grad()
def measure(preset: str, context: int = 1024) -> dict[str, float]:
    model = GPT(
        replace(PRESETS[preset].model, n_layer=4, n_head=4, n_embd=128, context_length=context)
    )
    tokens = torch.randint(0, model.config.vocab_size, (1, context))
    cache = model.new_cache(1)
    model(tokens[:, :-1], cache)
    lengths, max_length = cache.lengths, cache.max_length

    def cached() -> None:
        cache.lengths, cache.max_length = lengths, max_length  # write the same last place again
        model(tokens[:, -1:], cache)

    with_cache = 1e3 * median_seconds({"cached": cached}, 50)["cached"]
    without = 1e3 * median_seconds({"recomputed": lambda: model(tokens)}, 20)["recomputed"]
    return {"cached_ms": with_cache, "recomputed_ms": without, "ratio": without / with_cache}


def main() -> None:
    torch.set_num_threads(1)
    table = {
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "fp32"}
    }
    for preset in ("v0-tiny", "v1-tiny"):
        table[preset] = measure(preset)
        print(
            f"{preset}: {', '.join(f'{name} {value:.2f}' for name, value in table[preset].items())}",
            flush=True,
        )
    write_json(Path("results/generation.json"), table)


if __name__ == "__main__":
    main()
