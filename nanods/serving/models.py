"""The runs that a server serves, each with the thread that computes for it.

A language model (V0 to V2) has an engine (nanods/serving/engine.py), a model of several modalities
(V3) an embedder (nanods/serving/embedder.py) and a gallery to search.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import torch

from nanods.data.instructions import END, mark_ids
from nanods.errors import UserError
from nanods.gpt import GPT
from nanods.quantize import FORMATS
from nanods.serving.embedder import Embedder, embed_one_by_one, fixed_shape
from nanods.serving.engine import Engine
from nanods.serving.placement import parse_rules, place
from nanods.serving.search import Gallery
from nanods.training.contrastive_data import held_out_examples
from nanods.training.finished_run import FinishedRun, load_run
from nanods.training.saved_gallery import FILE


@dataclass
class ServedModel:
    name: str
    finished: FinishedRun
    operations: tuple[str, ...]
    """Of "generate", "chat", "embed", "search"."""
    worker: Engine | Embedder
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end an answer; empty unless the run was fine-tuned on answers."""
    gallery: Gallery | None = None
    thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        # A daemon: an error that ends the program does not wait for it.
        self.thread = Thread(target=self.worker.run, name=f"compute {self.name}", daemon=True)

    @property
    def created(self) -> float:
        """When the run was last saved, in seconds since 1970; 0 if it was never saved."""
        times = [0.0]
        for path in Path(self.finished.folder).glob("*"):
            with suppress(OSError):  # it has gone meanwhile, or is a link to nowhere
                times.append(path.stat().st_mtime)
        return max(times)


def language_model(name: str, finished: FinishedRun, slots: int, max_waiting: int) -> ServedModel:
    """Return a run of V0 to V2, to generate with."""
    worker = Engine(
        finished.model, finished.tokenizer.decode_bytes, slots=slots, max_waiting=max_waiting
    )
    if not finished.state.get("answers"):
        return ServedModel(name, finished, ("generate",), worker)
    end = frozenset({mark_ids(finished.tokenizer)[END]})
    return ServedModel(name, finished, ("generate", "chat"), worker, end_tokens=end)


def embedding_model(name: str, finished: FinishedRun, max_waiting: int) -> ServedModel:
    """Return a run of V3, to embed and search with; without held-out examples, to embed alone.

    Raises UserError if its saved examples are damaged.
    """
    worker = Embedder(finished.model, max_waiting=max_waiting)
    try:
        examples = held_out_examples(finished.config, finished.folder).examples
    except UserError as error:
        if (finished.folder / FILE).is_file():  # it is damaged
            raise
        print(f"notice     {name} searches nothing: {error}")
        return ServedModel(name, finished, ("embed",), worker)
    gallery = Gallery(finished.model, examples, finished.config, finished.tokenizer)
    return ServedModel(name, finished, ("embed", "search"), worker, gallery=gallery)


def place_model(finished: FinishedRun, device: str, rules: Sequence[str]) -> str:
    """Place the parts of a model by rules, what they leave out on `device`, in fp32.

    Returns what crosses where one token (V3: one input of each modality) is read. Raises UserError
    for rules that cannot be followed.
    """
    model = finished.model
    if finished.state.get("format") in FORMATS:
        raise UserError(
            f"--place: {finished.folder} is quantised already; serve the run that it was made from"
        )
    token = torch.zeros(1, dtype=torch.long)
    try:
        crossings = place(model, parse_rules([f"*={device}:fp32", *rules]))
        if isinstance(model, GPT):
            with torch.no_grad():
                model(token[None].to(model.embedding.weight.device), model.new_cache(1))
        else:
            shapes = {name: fixed_shape(model, name) for name in model.modalities}
            inputs = [
                (name, torch.zeros(shape) if shape else token) for name, shape in shapes.items()
            ]
            embed_one_by_one(model, inputs)
    except (RuntimeError, AssertionError) as error:  # a device that is not there, say
        words = " ".join(rules)
        raise UserError(f"--place {words}: the model cannot run so ({error})") from None
    return f"{crossings.bytes:,} bytes cross between devices, in {crossings.count} pieces"


def load_models(
    runs: Sequence[str], device: str, rules: Sequence[str], slots: int, max_waiting: int
) -> dict[str, ServedModel]:
    """Return the models of runs by name, which is that of a run's folder, placed by `rules`. Raises
    UserError for a run that is missing, for two of one name, and as `place_model`."""
    models: dict[str, ServedModel] = {}
    parse_rules(rules)
    for run in runs:
        finished = load_run(run, "cpu" if rules else device)
        name = finished.folder.resolve().name
        if name in models:
            raise UserError(f"{run}: another run is called {name} too; rename one of the folders")
        if rules:
            print(f"placed     {name}: to read an input, {place_model(finished, device, rules)}")
        if finished.config.multimodal.modalities:
            models[name] = embedding_model(name, finished, max_waiting)
        else:
            models[name] = language_model(name, finished, slots, max_waiting)
    return models
