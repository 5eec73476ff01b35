"""What a monitor learns from the models: counters that they keep anyway, and their canaries.

The threads that compute count what they do (`Engine.totals`, `Embedder.totals`). `ModelMetrics`
reads those numbers when Prometheus asks for them, so counting adds nothing to a step. A canary
computes in a thread of its own, beside the model's thread. It uses the model's weights and no
request, no slot and no cache of the engine, so it changes no answer.

Pinned by tests/serving/test_model_metrics.py.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanods.serving.engine import Engine
from nanods.serving.models import ServedModel
from nanods.serving.monitor import Monitor, bits_per_token, canary_texts, partner_distance
from nanods.training.contrastive_data import model_inputs
from nanods.training.contrastive_task import embed

CANARY_EXAMPLES = 64  # of a gallery


class ModelMetrics:
    """What Prometheus reads of the models by name. For `CollectorRegistry.register`."""

    def __init__(self, models: dict[str, ServedModel]) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        unit = "requests; of V3: inputs"
        running = GaugeMetricFamily("nanods_running", f"Being computed ({unit})", labels=["model"])
        waiting = GaugeMetricFamily("nanods_waiting", f"Waiting ({unit})", labels=["model"])
        tokens = CounterMetricFamily(
            "nanods_model_tokens", "Tokens read and generated", labels=["model", "kind"]
        )
        inputs = CounterMetricFamily("nanods_inputs", "Inputs embedded", labels=["model"])
        experts = CounterMetricFamily(
            "nanods_expert_tokens",
            "Tokens that an expert has computed",
            labels=["model", "layer", "expert"],
        )
        for name, model in self.models.items():
            totals = model.worker.totals
            running.add_metric([name], model.running())
            waiting.add_metric([name], model.waiting())
            if isinstance(model.worker, Engine):
                tokens.add_metric([name, "read"], totals.read_tokens)
                tokens.add_metric([name, "new"], totals.new_tokens)
                load = [] if totals.load is None else totals.load.tolist()  # (L, E)
                for layer, row in enumerate(load):
                    for expert, count in enumerate(row):
                        experts.add_metric([name, str(layer), str(expert)], count)
            else:
                tokens.add_metric([name, "read"], totals.tokens)
                inputs.add_metric([name], totals.inputs)
        yield from (running, waiting, tokens, inputs, experts)


def canary(model: ServedModel) -> Callable[[], float] | None:
    """Return the function that measures a model's quality, where lower is better.

    V0 to V2: the bits per token of texts that the model has drawn itself, at the first call. V3:
    the distance between the embeddings of one example in two modalities, on average over examples
    of its gallery; None without such examples.
    """
    network = model.finished.model
    if isinstance(model.worker, Engine):
        texts = functools.cache(lambda: canary_texts(network))
        return lambda: bits_per_token(network, texts())
    if model.gallery is None or len(model.gallery.embeddings) < 2:
        return None
    examples, config = model.gallery.examples, model.finished.config
    rows = np.flatnonzero(examples.has(*model.gallery.embeddings))[:CANARY_EXAMPLES]
    if not len(rows):
        return None
    device = next(network.parameters()).device
    inputs = {
        name: x[rows].to(device)
        for name, x in model_inputs(examples, config, model.finished.tokenizer).items()
    }
    return lambda: partner_distance(embed(network, inputs)[0])


def watch_models(monitor: Monitor, models: dict[str, ServedModel], canary_minutes: float) -> None:
    """Add the models' metrics to the monitor. Start their canaries, unless `canary_minutes` is 0;
    `Monitor.close` ends them."""
    monitor.registry.register(ModelMetrics(models))
    for name, model in models.items() if canary_minutes else ():
        measure = canary(model)
        if measure is None:
            print(f"notice     {name} has no canary: it has no gallery of partners")
        else:
            monitor.start(monitor.run_canary, name, measure, 60 * canary_minutes)
