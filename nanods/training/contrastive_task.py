"""What V3 learns: which caption, image and sound belong together.

`ContrastiveTask` gives train.py its batches, their gradients (at once, or in pieces by gradient caching: the loss compares the whole
batch either way) and its evaluation: retrieval among held-out items, in every direction. A data set is an object with `name`,
`sha256`, `modalities`, `train`, `held_out`, `text()`, `batch(step, size, seed)` and `gallery(size)`, the last two giving items
with `ids`, `captions`, `images` and `mels` (nanods/data/scenes.py, pairs.py). Batch `step` is a function of (seed, step, size).

Shapes: B items of a batch, Q items of the gallery, T tokens of a caption, M width of the space, L layers, E experts.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanods.config import Config
from nanods.contrastive import (
    all_pairs_loss,
    cached_gradients,
    chance_loss,
    gather_with_gradient,
    local_rows,
    median_rank,
    recall_at_k,
    unpack_encoded,
)
from nanods.data.caption_dataset import load_caption_dataset
from nanods.data.scenes import SceneData
from nanods.data.text import tokenizer_for
from nanods.errors import UserError
from nanods.moe import entropy_loss
from nanods.multimodal import MODALITIES, Multimodal
from nanods.training.language_task import Scale, accumulate_metrics, load_metrics
from nanods.training.pictures import draw_multimodal

GALLERY = 512  # held-out items among which each is to be found
PIECE = 64  # items embedded at a time where no gradient is needed


class ContrastiveTask:
    unit, figure, better = (
        "items",
        "val_recall1",
        "higher",
    )  # what is counted; what a run is judged by

    def __init__(
        self, config: Config, device: torch.device, autocast: AbstractContextManager, data=None
    ) -> None:
        """`data`: where it is not the one that the configuration names. Raises UserError if it lacks a modality."""
        self.config, self.device, self.autocast, c = config, device, autocast, config.multimodal
        self.data = data or load_dataset(config)
        if missing := [name for name in c.modalities if name not in self.data.modalities]:
            raise UserError(
                f"--data {config.data} has no {' and no '.join(missing)}: choose other data, or "
                f"--multimodal.modalities {' '.join(self.data.modalities)}"
            )
        if config.batch_size > len(self.data.train):
            raise UserError(
                f"--batch-size {config.batch_size:,}: there are {len(self.data.train):,} items; take fewer at a time"
            )
        self.tokenizer = tokenizer_for(
            self.data.text() if config.model.vocab_size > 256 else "", config.model.vocab_size
        )
        self.pairs, self.units = c.pair_weights(), config.batch_size  # of a step
        self.gallery = self.data.gallery(min(GALLERY, len(self.data.held_out)))

    def __str__(self) -> str:
        data = self.data
        return f"{data.name}: {len(data.train):,} + {len(data.held_out):,} things, sha256 {data.sha256[:12]}"

    def inputs(self, items) -> dict[str, Tensor]:
        """What the model reads of items, by modality."""
        return {
            name: x.to(self.device)
            for name, x in model_inputs(items, self.config, self.tokenizer).items()
        }

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs of a step's items, or of these rows of them, and their ids (B,)."""
        items = self.data.batch(step, self.config.batch_size, self.config.seed, rows)
        return self.inputs(items), torch.tensor(items.ids, device=self.device)

    def gradients(
        self, model: nn.Module, batch: tuple, micro_batch: int, scale: Scale
    ) -> tuple[float, dict[str, Tensor]]:
        """Add the gradient of the loss of the whole batch, this process's rows of it -> that loss, in nats, and its parts.

        `ce_loss` is the contrastive loss, the mean of the pairs' (`loss_text_image`, ...); by chance it is ln B. The experts'
        losses have the micro-batch as their unit, so their mean depends on its size; loads are sums.
        """
        (inputs, ids), parts, total = batch, {}, 0.0
        pieces = -(-len(ids) // micro_batch)

        def encode_piece(piece: dict[str, Tensor]):
            nonlocal total
            with self.autocast:
                embeddings, stats = model(piece)
            if self.config.model.moe.n_expert == 1:
                return embeddings
            own, told = moe_losses(stats, self.config)
            if torch.is_grad_enabled():
                total += own.item() / pieces
                accumulate_metrics(parts, told, pieces)
            return embeddings, scale(own)

        def loss(embeddings: dict[str, Tensor], temperature_scale: Tensor) -> Tensor:
            nonlocal total
            everyones = {name: gather_with_gradient(e) for name, e in embeddings.items()}
            rows = local_rows(
                len(ids)
            )  # these alone are counted, among all: the mean over the processes is the whole
            value, by_pair = all_pairs_loss(
                everyones, temperature_scale, self.pairs, gather_with_gradient(ids), rows
            )
            parts.update({f"loss_{pair.replace('-', '_')}": one for pair, one in by_pair.items()})
            parts.update(ce_loss=value.detach(), temperature=1 / temperature_scale.detach())
            total += value.item()
            return scale(value)

        if pieces == 1:
            embeddings, own = unpack_encoded(encode_piece(inputs))
            (loss(embeddings, model.temperature()) + (0 if own is None else own)).backward()
        else:
            cached_gradients(encode_piece, inputs, loss, micro_batch, model.temperature())
        return total, parts

    def embed(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs of Q items -> embeddings (Q, M) and, where there are experts, their load (L, E), by modality. In eval mode."""
        was_training = model.training
        with self.autocast:
            made = embed(model.eval(), inputs)
        model.train(was_training)
        return made

    def evaluate(self, model: nn.Module) -> dict:
        """Retrieval among the gallery's held-out items, each direction by itself.

        val_loss is the contrastive loss alone, of the gallery in batches of the training's size, in nats; recall1_A_B the
        share of the items of A that find their own in B first, recall5_A_B among the first five; median_rank_A_B; val_recall1
        the mean of the recall1. With experts also the load: val_load (L, E), its figures, and val_load_MODALITY.
        """
        embeddings, load = self.embed(model, self.inputs(self.gallery))
        ids = torch.tensor(self.gallery.ids, device=self.device)
        size = min(len(ids), self.config.batch_size)
        losses = [
            all_pairs_loss(
                {n: e[i : i + size] for n, e in embeddings.items()},
                logit_scale(model),
                self.pairs,
                ids[i : i + size],
            )
            for i in range(0, len(ids) - size + 1, size)
        ]
        row = {"val_loss": float(np.mean([loss.item() for loss, _ in losses]))}
        recalls = {}
        for a, b in permutations(embeddings, 2):
            pair = embeddings[a], embeddings[b]
            recalls[f"recall1_{a}_{b}"] = recall_at_k(*pair, 1, ids)
            row[f"recall5_{a}_{b}"] = recall_at_k(*pair, 5, ids)
            row[f"median_rank_{a}_{b}"] = median_rank(*pair, ids)
        row |= {"val_recall1": float(np.mean(list(recalls.values())))} | recalls
        if load:
            row |= {f"val_load_{name}": one.tolist() for name, one in load.items()}
            row |= {
                f"val_{name}": value
                for name, value in load_metrics(joined(load.values(), self.config)).items()
            }
        return row

    # ---- in words and pictures -----------------------------------------------------------------------------------------------

    def work(self, model: Multimodal) -> str:
        return f"{model.flops_per_example() / 1e6:.0f} MFLOP per item ({sum(model.tokens_per_example().values())} tokens at most)"

    def size(self) -> str:
        return f"{self.units} items, whose loss is ln {self.units} = {chance_loss(self.units):.2f} by chance"

    def got(self, row: dict) -> str:
        directions = {
            name[8:].replace("_", "->"): value
            for name, value in row.items()
            if name.startswith("recall1_")
        }
        each = ", ".join(f"{name} {value:.3f}" for name, value in directions.items())
        return f"recall@1 {row['val_recall1']:.4f} among {len(self.gallery.ids)} held-out items ({each})"

    def draw(self, model: Multimodal, rows: list[dict]) -> list[Path]:
        embeddings, _ = self.embed(model, self.inputs(self.gallery))
        found = {name: e.double().cpu().numpy() for name, e in embeddings.items()}
        return draw_multimodal(self.config, found, self.gallery, logit_scale(model), rows)

    def show(self, model: Multimodal) -> str:
        """What a few held-out captions find, and how to ask."""
        skipped = getattr(self.data, "skipped", 0)
        others = [name for name in self.config.multimodal.modalities if name != "text"]
        query = f"python sample.py {self.config.run_dir} --query '{self.gallery.captions[0]}'"
        if len(others) == len(self.config.multimodal.modalities):
            return f"next       python sample.py {self.config.run_dir} --{others[0]} FILE"
        embeddings, _ = self.embed(model, self.inputs(self.gallery))
        lines = (
            [f"data       {skipped} corrupt file{' was' if skipped == 1 else 's were'} skipped"]
            if skipped
            else []
        )
        for i in range(min(3, len(self.gallery.captions))):
            best = int((embeddings[others[0]] @ embeddings["text"][i]).argmax())
            lines.append(
                f"asked      {self.gallery.captions[i]}\n{others[0]:<10} of: {self.gallery.captions[best]}"
            )
        return "\n".join([*lines, "", f"next       {query}"])


def load_dataset(config: Config):
    """The data set of items that the configuration names. Raises UserError for one that cannot be read."""
    if config.data == "scenes":
        return SceneData(config.multimodal.hard_batches)
    return load_caption_dataset(
        Path(config.data), config.multimodal.image_size, config.multimodal.frames
    )


def model_inputs(items, config: Config, tokenizer) -> dict[str, Tensor]:
    """What a model reads of items, by modality; on the CPU."""
    read = {
        name: getattr(items, MODALITIES[name].input_field) for name in config.multimodal.modalities
    }
    most = config.model.context_length
    return {
        name: encode(x, tokenizer, most) if isinstance(x, list) else torch.from_numpy(x)
        for name, x in read.items()
    }


@torch.no_grad()
def embed(
    model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ContrastiveTask.embed, in the model's own mode and precision."""
    made, load = {}, {}
    for start in range(0, len(next(iter(inputs.values()))), PIECE):
        embeddings, stats = model({name: x[start : start + PIECE] for name, x in inputs.items()})
        for name, e in embeddings.items():
            made.setdefault(name, []).append(e)
            if "load" in stats[name][0]:
                load[name] = load.get(name, 0) + torch.stack(
                    [layer["load"] for layer in stats[name]]
                )
    return {name: torch.cat(parts) for name, parts in made.items()}, load


def encode(captions: list[str], tokenizer, most: int) -> Tensor:
    """Captions -> token ids (B, T), int64, -1 where one has ended. T is the longest one's length; all are cut at `most`."""
    rows = [tokenizer.encode(caption)[:most] for caption in captions]
    tokens = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)


@torch.no_grad()
def logit_scale(model: nn.Module) -> float:
    return model.temperature().item()


def joined(loads: Iterable[Tensor], config: Config) -> Tensor:
    """The loads (L, E) of the modalities: added up where they share a trunk, else one trunk's after the other's."""
    loads = list(loads)
    return torch.stack(loads).sum(dim=0) if config.multimodal.shared else torch.cat(loads)


def moe_losses(
    stats: dict[str, list[dict[str, Tensor]]], config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each modality's layers' stats -> the experts' losses, weighed and added up, and their parts.

    The balance is that of all tokens together where modalities share experts (of each modality, where they do not): an expert
    may serve one alone. `entropy_loss` is LIMoE's, for each modality, a mean over them and the layers.
    """
    moe, c, E = config.model.moe, config.multimodal, config.model.moe.n_expert
    groups = [list(stats)] if c.shared else [[name] for name in stats]
    parts = {name: [] for name in ("balance_loss", "z_loss", "entropy_loss", "dropped")}
    for group in groups:
        for layers in zip(
            *(stats[name] for name in group), strict=True
        ):  # a layer, as each modality went through it
            load = torch.stack([told["load"] for told in layers]).double()  # (modalities, E)
            share = (load.sum(dim=1, keepdim=True) / load.sum()).to(
                layers[0]["z_loss"].dtype
            )  # of the tokens
            importance = sum(
                part * told["importance"] for part, told in zip(share, layers, strict=True)
            )
            parts["balance_loss"].append(
                E * ((load.sum(dim=0) / load.sum()).to(importance.dtype) * importance).sum()
            )
            for name in ("z_loss", "dropped"):
                parts[name].append(
                    sum(part[0] * told[name] for part, told in zip(share, layers, strict=True))
                )
            parts["entropy_loss"] += [
                entropy_loss(told["token_entropy"], told["importance"], c.min_experts)
                for told in layers
            ]
    mean = {name: torch.stack(values).mean() for name, values in parts.items()}
    weights = {
        "balance_loss": moe.balance_coefficient,
        "z_loss": moe.z_coefficient,
        "entropy_loss": c.entropy_coefficient,
    }
    loads = {name: torch.stack([told["load"] for told in layers]) for name, layers in stats.items()}
    told = {f"load_{name}": load for name, load in loads.items()} | {
        "load": joined(loads.values(), config)
    }
    total = sum(weight * mean[name] for name, weight in weights.items())
    return total, {name: value.detach() for name, value in mean.items()} | told
