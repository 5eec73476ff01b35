"""What a server of nanods gains, and what it costs: results/serve.json.

    python -m nanods.bench.serve                   all parts; `make bench-serve`
    python -m nanods.bench.serve --only engine     one part

    engine       v1-tiny and v2-tiny generate for 32 clients: continuous batching against one
                 request at a time and against static batches; times to the first token and between
                 tokens (serve_engine.py)
    embedder     v3-tiny embeds: batches against single inputs, by modality; mixed inputs in queues
                 by modality and length against one queue (serve_embedder.py)
    placement    a model whose experts alone are INT8, against one that is all fp32
                 (serve_placement.py)
    http         32 clients against one at a time, by REST (serve_http.py)
    rest         what REST adds to a call by gRPC (serve_http.py)
    litserve     the same model behind LitServe, from the extra peers (serve_http.py)

One thread computes, with random weights: the time does not depend on what a model has learnt. The
figures are medians of several turns in which the compared ways alternate. Seconds are CPU seconds
wherever a process is measured, so other programs on the machine do not count; where a client waits
(http, rest, litserve) milliseconds are wall time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanods import plots
from nanods.bench.runs import describe_machine, measure_parts
from nanods.bench.serve_embedder import part_embedder
from nanods.bench.serve_engine import CLIENTS, WAYS, part_engine
from nanods.bench.serve_http import part_http, part_litserve, part_rest
from nanods.bench.serve_placement import part_placement
from nanods.errors import run
from nanods.flags import parse_args

PARTS = {
    "engine": part_engine,
    "embedder": part_embedder,
    "placement": part_placement,
    "http": part_http,
    "rest": part_rest,
    "litserve": part_litserve,
}


@dataclass(frozen=True)
class Args:
    only: Literal["all", "engine", "embedder", "placement", "http", "rest", "litserve"] = "all"
    """One part; the results of the other parts stay as they are."""
    results: Path = Path("results")
    """Where to write the table and the picture."""


def draw(table: dict, args: Args) -> None:
    """Draw what has been measured."""
    panels = {}
    for preset, row in table.get("engine", {}).items():
        speeds = {way: row[way]["tokens_per_second"] for way in WAYS}
        panels[f"{preset}, {CLIENTS} clients: tokens per CPU second of the engine"] = speeds
    for preset, row in table.get("litserve", {}).items():
        if preset in table.get("engine", {}):
            speeds = {name: row[name]["tokens_per_cpu_second"] for name in ("nanods", "LitServe")}
            panels[f"{preset}, {CLIENTS} clients: tokens per CPU second of the server"] = speeds
    if panels:
        plots.save(plots.bars(panels, "tokens per CPU second"), args.results / "serve.png")


def main() -> None:
    args = parse_args(Args, __doc__)
    torch.set_num_threads(1)
    machine = describe_machine("fp32")
    draw(measure_parts(args.results / "serve.json", PARTS, args.only, lambda: machine), args)


if __name__ == "__main__":
    run(main)
