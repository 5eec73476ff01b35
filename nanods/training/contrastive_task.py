"""Contrastive learning: which caption, image and sound belong together (V3). The task protocol is
in nanods/training/task.py.

The loss compares every example of the batch with every other, so a batch in micro-batches needs
gradient caching (nanods/contrastive.py): `micro_batches` embeds all of them without a graph and
takes the gradient of the loss at the embeddings; `loss` then embeds one micro-batch again, with a
graph, and returns a surrogate whose gradient is the same. A batch of one micro-batch takes the loss
directly.

Evaluation is retrieval among held-out examples, in every direction. The data set is an
ExampleDataset (nanods/data/examples.py). Examples that share a file or a caption are duplicates: no
negatives of each other in the loss, and right answers in retrieval. Where the captions are labels,
few and repeated, evaluation also classifies. An example that lacks a modality has no part in the
losses and recalls of the pairs with it.

With a teacher (nanods/training/distill.py), the loss of the batch also compares its embeddings and
similarities with the teacher's.

Shapes: B examples of a batch, Q examples of the gallery, T tokens of a caption, M width of the
space, D of the teacher's, L layers, E experts, C labels.
"""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanods.config import Config
from nanods.contrastive import (
    all_pairs_loss,
    embedding_gradients,
    gather_with_gradient,
    local_rows,
    nearest_class,
    split_batch,
    surrogate_loss,
)
from nanods.data.caption_dataset import CaptionDataset
from nanods.data.examples import ExampleDataset, Examples, caption_key, duplicate_ids
from nanods.data.text import tokenizer_for
from nanods.data.tokenizer import BPETokenizer, ByteTokenizer
from nanods.errors import UserError
from nanods.multimodal import Multimodal
from nanods.training.commands import flag, sample_command, shorten
from nanods.training.contrastive_checks import (
    check_negatives,
    check_pairs,
    count_items,
    cut_captions,
    cut_sounds,
    describe_captions,
    describe_chance,
    describe_standard_error,
    expected_candidates,
    find_labels,
    mean_candidates,
)
from nanods.training.contrastive_data import (
    GENERATED_DATA,
    MAX_GALLERY,
    encode_captions,
    fit_modalities,
    load_dataset,
    missing_modalities,
    model_inputs,
    present_on,
    preset_modalities,
    saved_tokenizer,
)
from nanods.training.distill import PROJECTION, Teacher, embedding_loss, mix, projection_of
from nanods.training.language_task import forward_seconds
from nanods.training.metrics import load_metrics
from nanods.training.pictures import draw_multimodal_run
from nanods.training.retrieval import (
    EMBED_CHUNK,
    embed,
    logit_scale,
    retrieval_metrics,
    validation_loss,
)
from nanods.training.saved_gallery import save_gallery
from nanods.training.shared_experts import combine_loads, moe_losses


class Batch(NamedTuple):
    inputs: dict[str, Tensor]
    """What the model reads, by modality; each (B, ...)."""
    ids: Tensor
    """(B, N), of files and captions: examples that share one are not negatives of each other."""
    present: dict[str, Tensor] | None = None
    """By modality, (B,) bool: which examples have it. None: all have all."""


@dataclass(frozen=True)
class MicroBatch:
    inputs: dict[str, Tensor]  # by modality; each (b, ...)
    ids: Tensor  # (b, N)
    count: int
    """Micro-batches in the batch that this one is a part of."""
    cached: "CachedGradients | None" = None
    """Where the batch has several micro-batches: the gradient of its loss at this one's embeddings.
    """
    present: dict[str, Tensor] | None = None  # by modality: (b,) bool
    targets: dict[str, Tensor] | None = None  # by modality: the teacher's embeddings, (b, D)


@dataclass(frozen=True)
class CachedGradients:
    embeddings: dict[str, Tensor]
    """By modality: the gradient at this micro-batch's embeddings, (b, M)."""
    scale: Tensor | None
    """The gradient at the scale (1 / temperature); on the first micro-batch alone, since the batch
    has one scale."""
    projection: Tensor | None
    """The gradient at the projection to the teacher's space, where there is one; also on the first
    micro-batch alone."""
    metrics: dict[str, Tensor]
    """Those of the whole batch's loss."""


class ContrastiveTask:
    unit = "examples"
    headline_metric = "val_recall1"
    higher_is_better = True
    teacher: Teacher | None = None  # what run.py sets for --teacher

    def __init__(
        self,
        config: Config,
        device: torch.device,
        data: ExampleDataset | None = None,
        tokenizer: ByteTokenizer | BPETokenizer | None = None,
        max_gallery: int = MAX_GALLERY,
    ) -> None:
        """`data` replaces the data set that the configuration names, `tokenizer` the one that its
        captions would give. Raises UserError if the data lack a modality that was asked for, or if
        no batch can have negatives."""
        self.device = device
        self.data = data or load_dataset(config)
        self.config = config = fit_modalities(config, self.data.modalities)
        if config.batch_size > len(self.data.train):
            raise UserError(
                f"--batch-size {config.batch_size:,}: there are {len(self.data.train):,} training "
                "examples; choose a smaller batch"
            )
        text = self.data.text()
        self.tokenizer = (
            tokenizer
            or saved_tokenizer(config.init_from or config.teacher)
            or tokenizer_for(text, config.model.vocab_size, at_most=True)
        )
        self.pair_weights, self.pair_shares = self.choose_pairs()
        self.units_per_step = config.batch_size
        self.gallery = self.data.gallery(min(max_gallery, len(self.data.held_out)))
        self.gallery_ids = torch.from_numpy(duplicate_ids(self.gallery)).to(device)  # (Q, N)
        self.gallery_present = present_on(self.gallery, device)
        with_both = [self.gallery.has(*pair).sum() for pair in self.pair_weights]
        if self.gallery.present and max(with_both) < 2:
            raise UserError(
                f"--data {config.data}: no two held-out examples have the same two modalities that "
                "the loss compares; hold out others, or give --val-data FOLDER"
            )
        self.more_galleries: dict[str, Examples] = getattr(self.data, "more_galleries", dict)()

        captions = text.split("\n") if text else []
        counts = Counter(map(caption_key, captions))
        if not text or getattr(self.data, "has_gaps", False):
            # Examples without a caption have none in common.
            counts.update(f"\n{i}" for i in range(len(self.data.train) - len(captions)))
        if (
            isinstance(self.data, CaptionDataset)
            and len({file for file, _ in self.data.train}) == 1
        ):
            raise UserError(
                f"--data {config.data}: all {len(self.data.train):,} training captions are of one "
                "file, so there is nothing to tell apart; add files"
            )
        self.warnings = check_negatives(config, counts, self.gallery)
        others = expected_candidates(counts, config.batch_size) - 1
        self.candidates = mean_candidates(others, self.pair_shares, self.pair_weights)
        self.warnings += check_pairs(others, self.pair_shares)
        held_out = list(filter(None, self.gallery.captions))
        self.labels = find_labels(captions, held_out)  # the captions, if they are
        self.cuts = self.describe_cuts([*captions, *held_out])

    def choose_pairs(self) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
        """Return the weights of the pairs of modalities that the loss compares, and for each pair
        the share of the training examples that have both.

        Raises UserError for a pair that was asked for and that no two examples have.
        """
        weights = self.config.multimodal.pair_weights()
        if not getattr(self.data, "has_gaps", False):
            return weights, dict.fromkeys(weights, 1.0)
        counts = self.data.pair_counts()
        counts.update({(b, a): count for (a, b), count in counts.items()})
        missing = [pair for pair in weights if counts[pair] < 2]
        if missing and (self.config.multimodal.pairs or len(missing) == len(weights)):
            raise UserError(
                f"--data {self.config.data}: fewer than two training examples have "
                f"{' or '.join(' and '.join(pair) for pair in missing)}; leave the pair out of "
                "--multimodal.pairs, or add examples that have both"
            )
        weights = {pair: weight for pair, weight in weights.items() if pair not in missing}
        return weights, {pair: counts[pair] / len(self.data.train) for pair in weights}

    def describe_cuts(self, captions: list[str]) -> list[str]:
        """Return what the model will not read of captions and sounds, in words."""
        config, data, cuts = self.config, self.data, []
        if "text" in config.multimodal.modalities:
            cuts.append(cut_captions(captions, self.tokenizer, config.model.context_length))
        if isinstance(data, CaptionDataset) and "audio" in config.multimodal.modalities:
            cuts.append(cut_sounds(data.sound_seconds(), len(data.sounds), config.multimodal))
        return list(filter(None, cuts))

    # ---- batches and loss ------------------------------------------------------------------------

    def inputs(self, examples) -> dict[str, Tensor]:
        """Return what the model reads of examples, by modality, on the device."""
        inputs = model_inputs(examples, self.config, self.tokenizer)
        return {name: x.to(self.device) for name, x in inputs.items()}

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the examples of a step's batch, or the `rows` of them."""
        examples = self.data.batch(step, self.config.batch_size, self.config.seed, rows)
        ids = torch.from_numpy(duplicate_ids(examples)).to(self.device)
        return Batch(self.inputs(examples), ids, present_on(examples, self.device))

    def micro_batches(self, model: nn.Module, batch: Batch, size: int) -> list[MicroBatch]:
        """Split a batch into micro-batches of `size`; where there are several, cache the gradients
        at the embeddings."""
        targets = None
        if self.teacher is not None:
            targets = self.teacher.embeddings(batch.inputs, size)
        if len(batch.ids) <= size:
            return [MicroBatch(batch.inputs, batch.ids, 1, present=batch.present, targets=targets)]
        parts, ids = split_batch(batch.inputs, size), batch.ids.split(size)
        with torch.no_grad():
            embedded = [model(part)[0] for part in parts]
        embeddings = {name: torch.cat([part[name] for part in embedded]) for name in parts[0]}
        metrics: dict[str, Tensor] = {}
        leaves, projection = dict(embeddings), projection_of(model)
        if projection is not None:
            leaves[PROJECTION] = projection

        def loss_of_batch(leaves: dict[str, Tensor], scale: Tensor) -> Tensor:
            by_modality = {name: leaves[name] for name in embeddings}
            loss, loss_metrics = self.batch_loss(
                by_modality, scale, batch.ids, batch.present, targets, leaves.get(PROJECTION)
            )
            metrics.update(loss_metrics)
            return loss

        _, gradients, scale_gradient = embedding_gradients(
            loss_of_batch, leaves, model.temperature().detach()
        )
        of_batch = scale_gradient, gradients.pop(PROJECTION, None)
        micro_batches = []
        for i, gradient in enumerate(split_batch(gradients, size)):
            cached = CachedGradients(gradient, *(of_batch if i == 0 else (None, None)), metrics)
            micro_batches.append(MicroBatch(parts[i], ids[i], len(parts), cached))
        return micro_batches

    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the micro-batch's share of the batch's loss, in nats, and its metrics.

        `ce_loss` is the contrastive loss of the whole batch, the mean over the pairs of modalities
        (`loss_text_image`, ...); an untrained model has ln B. With experts there are also their
        losses, means over one micro-batch, so their value depends on its size, and the load of each
        modality. With a teacher, `relation_loss` and `cosine_loss` are the distances to it.
        """
        embeddings, stats = model(micro_batch.inputs)
        scale, projection, cached = model.temperature(), projection_of(model), micro_batch.cached
        if cached is None:
            loss, metrics = self.batch_loss(
                embeddings,
                scale,
                micro_batch.ids,
                micro_batch.present,
                micro_batch.targets,
                projection,
            )
        else:
            loss, metrics = surrogate_loss(embeddings, cached.embeddings), cached.metrics
            if cached.scale is not None:
                loss = loss + scale * cached.scale
            if cached.projection is not None:
                loss = loss + (projection * cached.projection).sum()
        if self.config.model.moe.n_expert > 1:
            moe_loss, moe_metrics = moe_losses(stats, self.config)
            loss = loss + moe_loss / micro_batch.count
            train_loss = metrics["train_loss"] + moe_loss.detach()
            metrics = metrics | {"train_loss": train_loss} | moe_metrics
        return loss, metrics

    def batch_loss(
        self,
        embeddings: dict[str, Tensor],
        scale: Tensor,
        ids: Tensor,
        present: dict[str, Tensor] | None = None,
        targets: dict[str, Tensor] | None = None,
        projection: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this process's examples against those of all processes, and its
        metrics.

        embeddings: (B, M) by modality; ids (B, N); present: (B,) by modality; targets: embeddings
        of the teacher, (B, D) by modality; projection (D, M), where M and D differ.
        """
        gathered = {name: gather_with_gradient(e) for name, e in embeddings.items()}
        all_ids, rows = gather_with_gradient(ids), local_rows(len(ids))
        if present is not None:  # as integers, which every backend gathers
            present = {name: gather_with_gradient(x.long()) > 0 for name, x in present.items()}
        loss, by_pair = all_pairs_loss(
            gathered, scale, self.pair_weights, all_ids, rows, present=present
        )
        metrics = {"ce_loss": loss.detach(), "temperature": 1 / scale.detach()}
        for pair, pair_loss in by_pair.items():
            metrics[f"loss_{pair.replace('-', '_')}"] = pair_loss
        if targets is not None:
            targets = {name: gather_with_gradient(e) for name, e in targets.items()}
            distance, distances = embedding_loss(
                gathered, targets, self.pair_weights, self.config, projection, rows, present
            )
            loss = mix(loss, distance, self.config.distill_weight)
            metrics |= distances
        return loss, {"train_loss": loss.detach()} | metrics

    # ---- evaluation ------------------------------------------------------------------------------

    def embed(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the embeddings (Q, M) of inputs and, with experts, their load (L, E), by modality.
        In eval mode."""
        was_training = model.training
        embeddings, load = embed(model.eval(), inputs)
        model.train(was_training)
        return embeddings, load

    def evaluate(self, model: nn.Module) -> dict:
        """Return how well each held-out example of the gallery finds its partner or a duplicate of
        it, for each direction A -> B. Only examples that have both A and B count.

        val_loss          the contrastive loss alone, in nats, in batches of the training's size
        recall1_A_B       the share of A's examples for which a right answer in B ranks first
        recall5_A_B       the same among the first five
        median_rank_A_B   the median rank of the best right answer
        val_recall1       the mean of all recall1_A_B
        zero_shot_accuracy_MODALITY    where the captions are labels: the share of examples nearest
                                       to their own caption among all labels
        val_load, ...     with experts: the load (L, E) and its metrics, and val_load_MODALITY
        NAME_recall1_A_B, ...   the recalls and ranks among another gallery of the data set
        """
        embeddings, load = self.embed(model, self.inputs(self.gallery))
        metrics = {"val_loss": self.gallery_loss(embeddings, self.gallery_ids, logit_scale(model))}
        retrieval = retrieval_metrics(embeddings, self.gallery_ids, self.gallery_present)
        recalls = [value for name, value in retrieval.items() if name.startswith("recall1_")]
        metrics |= {"val_recall1": float(np.mean(recalls))} | retrieval
        for name, gallery in self.more_galleries.items():
            others, _ = self.embed(model, self.inputs(gallery))
            ids = torch.from_numpy(duplicate_ids(gallery)).to(self.device)
            present = present_on(gallery, self.device)
            for metric, value in retrieval_metrics(others, ids, present).items():
                metrics[f"{name}_{metric}"] = value
        for name, (truth, nearest) in self.classify(model, embeddings).items():
            metrics[f"zero_shot_accuracy_{name}"] = float((truth == nearest).mean())
        if load:
            metrics |= {f"val_load_{name}": counts.tolist() for name, counts in load.items()}
            total = combine_loads(load.values(), self.config)
            metrics |= {f"val_{name}": value for name, value in load_metrics(total).items()}
        return metrics

    @torch.no_grad()
    def evaluation_seconds(self, model: nn.Module) -> float:
        """Return the time of an evaluation, estimated from one of the chunks that it embeds."""
        start = time.perf_counter()
        inputs = self.inputs(self.gallery)
        preparing = (time.perf_counter() - start) / len(self.gallery.ids)
        galleries = [self.gallery, *self.more_galleries.values()]
        total = sum(len(gallery.ids) for gallery in galleries)
        chunk = {name: x[:EMBED_CHUNK] for name, x in inputs.items()}

        def forward() -> Tensor:
            return next(iter(self.embed(model, chunk)[0].values())).sum()

        examples = len(next(iter(chunk.values())))
        return total * (preparing + forward_seconds(model, forward) / examples)

    def classify(
        self, model: nn.Module, embeddings: dict[str, Tensor]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the label of each example of the gallery, (Q,) from 0 to C - 1, and the one it is
        nearest to (-1 for NaN), by modality without text; {} unless the captions are labels.

        Examples without the modality, or without a caption, are left out.
        """
        if not self.labels or "text" not in embeddings:
            return {}
        numbers = {key: i for i, key in enumerate(self.labels)}
        keys = map(caption_key, self.gallery.captions)
        truth = np.array([numbers.get(key, -1) for key in keys])  # -1: no caption
        texts = encode_captions(
            list(self.labels.values()), self.tokenizer, self.config.model.context_length
        )
        classes, _ = self.embed(model, {"text": texts.to(self.device)})
        classified = {}
        for name, e in embeddings.items():
            has = self.gallery.has(name, "text")
            if name != "text" and has.any():
                nearest = nearest_class(e, classes["text"]).cpu().numpy()
                classified[name] = truth[has], nearest[has]
        return classified

    def gallery_loss(self, embeddings: dict[str, Tensor], ids: Tensor, scale: float) -> float:
        """Return the contrastive loss of the gallery, at the chance level of the training's."""
        B = self.config.batch_size
        sizes = {pair: max(2, round(share * B)) for pair, share in self.pair_shares.items()}
        return validation_loss(
            embeddings, ids, scale, self.pair_weights, sizes, self.gallery_present
        )

    # ---- words and pictures ----------------------------------------------------------------------

    def save_examples(self, run_dir: Path) -> None:
        """Write the gallery, which sample.py searches, unless it can be generated again."""
        if self.config.data not in GENERATED_DATA:
            save_gallery(run_dir, self.gallery, self.data.text())

    def describe_data(self) -> str:
        """Return items and files, distinct captions, what is cut, which files cannot be read, and
        how sure an evaluation is."""
        data, text = self.data, self.data.text()
        labels = f" of {len(self.labels)} labels" if self.labels else ""
        files = count_items(data.items) if isinstance(data, CaptionDataset) else ""
        line = (
            f"{data.name}: {len(data.train):,} training + {len(data.held_out):,} held-out "
            f"examples{labels}{files}, sha256 {data.sha256[:12]}"
        )
        notes = data.notes() if hasattr(data, "notes") else []
        left_out = missing_modalities(preset_modalities(self.config), data.modalities)
        if left_out:
            notes = [f"without {' and '.join(left_out)}, which the preset has", *notes]
        learnt, most = self.tokenizer.vocab_size, self.config.model.vocab_size
        if text and (start := self.config.init_from or self.config.teacher):
            notes.append(f"captions are cut into tokens as in {start}")
        elif text and learnt < most:
            notes.append(f"a vocabulary of {learnt} tokens, not {most:,}: captions give no more")
        for pair in self.config.multimodal.pair_weights():
            if pair not in self.pair_weights:
                notes.append(f"not compared: {' and '.join(pair)}, which too few examples have")
        lines = [line, *(f"           {note}" for note in notes)]
        if captions := describe_captions(text.split("\n")):
            lines.append(f"captions   {captions}")
        lines += [f"cut        {cut}" for cut in self.cuts or ["nothing"]]
        error = describe_standard_error(self.gallery, self.config.multimodal.modalities)
        lines.append(f"evaluated  {error}")
        lines += [f"warning    {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def describe_step(self) -> str:
        return describe_chance(
            self.candidates, self.units_per_step, min(self.pair_shares.values()) < 1
        )

    def describe_flops(self, model: Multimodal) -> str:
        tokens = sum(model.tokens_per_example().values())
        return f"{model.flops_per_example() / 1e6:.0f} MFLOP per example ({tokens} tokens at most)"

    def describe_validation(self, metrics: dict) -> str:
        each = []
        for name, value in metrics.items():
            if name.startswith("recall1_"):
                each.append(f"{name.removeprefix('recall1_').replace('_', '->')} {value:.3f}")
        line = (
            f"recall@1 {metrics['val_recall1']:.4f} among {self.count_pairs()} held-out examples "
            f"({', '.join(each)})"
        )
        zero_shot = [
            f"{name.removeprefix('zero_shot_accuracy_')} {value:.3f}"
            for name, value in metrics.items()
            if name.startswith("zero_shot_accuracy_")
        ]
        if zero_shot:
            line += f"; zero-shot accuracy among {len(self.labels)} labels: {', '.join(zero_shot)}"
        for name, gallery in self.more_galleries.items():
            prefix = f"{name}_recall5_"
            each = [
                f"{metric.removeprefix(prefix).replace('_', '->')} {value:.3f}"
                for metric, value in metrics.items()
                if metric.startswith(prefix)
            ]
            line += f"; {name}: recall@5 among {len(gallery.ids)}: {', '.join(each)}"
        return line

    def count_pairs(self) -> str:
        """Return how many examples of the gallery a query is compared with, in words: "512", or "96
        to 104 of 120" where some lack a modality."""
        total = len(self.gallery.ids)
        pairs = combinations(self.config.multimodal.modalities, 2)
        counts = [int(count) for pair in pairs if (count := self.gallery.has(*pair).sum()) > 1]
        if min(counts, default=total) == total:
            return f"{total}"
        few, many = min(counts), max(counts)
        return f"{few} of {total}" if few == many else f"{few} to {many} of {total}"

    def draw(self, model: Multimodal, rows: list[dict]) -> list[Path]:
        """Draw loss, recall, similarities, neighbours, a map of the space of scenes, and a
        confusion matrix of labels."""
        embeddings, _ = self.embed(model, self.inputs(self.gallery))
        arrays = {name: e.cpu().double().numpy() for name, e in embeddings.items()}
        confusions, C = {}, len(self.labels)
        for name, (truth, nearest) in self.classify(model, embeddings).items():
            confusions[name] = np.zeros((C, C), np.int64)
            is_number = nearest >= 0
            np.add.at(confusions[name], (truth[is_number], nearest[is_number]), 1)
        return draw_multimodal_run(
            self.config,
            arrays,
            self.gallery,
            logit_scale(model),
            rows,
            list(self.labels.values()),
            confusions,
        )

    def show_examples(self, model: Multimodal) -> str:
        """Return what a few held-out captions find, and the command for a query."""
        modalities, run_dir = self.config.multimodal.modalities, self.config.run_dir
        others = [name for name in modalities if name != "text"]
        lines = []
        skipped = getattr(self.data, "skipped", 0)
        if skipped:
            were = "file was" if skipped == 1 else "files were"
            lines.append(f"data       {skipped} corrupt {were} skipped")
        if "text" not in modalities:
            query = sample_command(run_dir, f"--{others[0]}", "FILE")
            return "\n".join([*lines, f"next       {query}"])
        embeddings, _ = self.embed(model, self.inputs(self.gallery))
        both = np.flatnonzero(self.gallery.has("text", others[0]))
        captions = [self.gallery.captions[i] for i in both]
        texts, targets = embeddings["text"][both], embeddings[others[0]][both]
        for caption, text in zip(captions[:3], texts, strict=False):
            best = int((targets @ text).argmax())
            lines.append(f"query      {caption}\n{others[0]:<10} of: {captions[best]}")
        query = sample_command(run_dir, *flag("query", shorten(captions[0] if captions else "...")))
        return "\n".join([*lines, "", f"next       {query}"])
