"""What a monitor learns from the models: the numbers that they count anyway, and their canaries.

The threads that compute count what they do (`Engine.totals`, `Embedder.totals`). `ModelMetrics`
reads those numbers when Prometheus asks for them, so counting adds nothing to a step.

Pinned by tests/serving/test_model_metrics.py.
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanods.serving.canary import canary
from nanods.serving.embedder import Embedder
from nanods.serving.engine import Engine
from nanods.serving.models import ServedModel
from nanods.serving.monitor import Monitor


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
            running.add_metric([name], model.worker.count_running())
            waiting.add_metric([name], model.worker.count_waiting())
            if isinstance(model.worker, Engine):
                tokens.add_metric([name, "read"], totals.read_tokens)
                tokens.add_metric([name, "new"], totals.new_tokens)
            else:
                tokens.add_metric([name, "read"], totals.tokens)
                inputs.add_metric([name], totals.inputs)
            for layer, row in loads_by_layer(model.worker):
                for expert, count in enumerate(row):
                    experts.add_metric([name, layer, str(expert)], count)
        yield from (running, waiting, tokens, inputs, experts)


def loads_by_layer(worker: Engine | Embedder) -> Iterator[tuple[str, list[int]]]:
    """Yield the name of each layer with experts, and the load (E,) of these.

    The name is the layer's number; with a trunk per modality "text 0" and so on.
    """
    load = worker.totals.load
    if isinstance(worker, Engine):
        load = {} if load is None else {"shared": load}
    for trunk, by_layer in list(load.items()):  # a copy: the worker may add a trunk meanwhile
        for layer, row in enumerate(by_layer.tolist()):
            yield (str(layer) if trunk == "shared" else f"{trunk} {layer}"), row


def watch_models(monitor: Monitor, models: dict[str, ServedModel]) -> None:
    """Add the models' metrics and traffic to the monitor. Raises UserError for a damaged reference
    of traffic."""
    for name in models:
        monitor.watch_traffic(name)
    monitor.registry.register(ModelMetrics(models))


def start_canaries(monitor: Monitor, models: dict[str, ServedModel], minutes: float) -> None:
    """Start the models' canaries, one measurement every so many minutes; `Monitor.close` ends
    them."""
    for name, model in models.items():
        measure = canary(model, monitor.closed.is_set)
        if measure is None:
            print(f"notice     {name} has no canary: it has no gallery of partners")
        else:
            monitor.watch_quality(name, measure, 60 * minutes)
