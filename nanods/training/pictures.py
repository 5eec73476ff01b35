"""The pictures that a finished run leaves in its directory."""

from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from nanods import plots
from nanods import plots_multimodal as space
from nanods.config import Config
from nanods.data.scenes import COLOURS, PALETTE, Scenes, facts_of
from nanods.data.text import TextData
from nanods.gpt import GPT
from nanods.training.inspection import chosen_experts, sparsity_report

SHOWN = 384  # tokens of validation text that are coloured by their experts


def draw(config: Config, model: GPT, data: TextData, rows: list[dict]) -> list[Path]:
    """Loss; what V1's heads read; what V2's experts did. `rows` are those of metrics.jsonl -> the files written."""
    trained, validated = (
        [row for row in rows if row["step"]],
        [row for row in rows if "val_loss" in row],
    )
    steps = [row["step"] for row in trained]
    figures = {"loss": losses(trained, validated)}
    window = torch.from_numpy(data.val[: config.model.context_length].astype("int64")).to(
        model.head.weight.device
    )
    if config.model.attention.kind == "block":
        figures["sparsity"] = plots.sparsity(sparsity_report(model, window))
    if config.model.moe.n_expert > 1:
        load, entropy, dropped = (
            [row[name] for row in trained] for name in ("load", "load_entropy", "dropped")
        )
        text = [data.tokenizer.decode([token]) for token in window[:SHOWN].tolist()]
        chosen = chosen_experts(model, window[:SHOWN])[..., 0]  # (L, T)
        val_load = np.array(validated[-1]["val_load"])
        figures["experts"] = plots.experts(
            steps, np.array(load), entropy, dropped, val_load, text, chosen
        )
    return saved(config, figures)


def draw_multimodal(
    config: Config, embeddings: dict[str, np.ndarray], gallery, scale: float, rows: list[dict]
) -> list[Path]:
    """Loss; recall; and of the gallery's embeddings (Q, M) by modality: similarities, a map, and what some items find."""
    trained, validated = (
        [row for row in rows if row["step"]],
        [row for row in rows if "val_loss" in row],
    )
    recalls = {
        f"{a}->{b}": [row[f"recall1_{a}_{b}"] for row in validated]
        for pair in combinations(embeddings, 2)
        for a, b in (pair, pair[::-1])
    }
    few = {name: e[:24] for name, e in embeddings.items()}
    figures = {
        "loss": losses(trained, validated, "item"),
        "recall": space.recall_over_time(
            [row["step"] for row in validated], recalls, 1 / len(gallery.ids)
        ),
        "similarities": space.similarities(
            {f"{a}-{b}": few[a] @ few[b].T for a, b in combinations(few, 2)}, scale
        ),
        "neighbours": neighbours(embeddings, gallery),
    }
    if isinstance(gallery, Scenes):
        flat, shown = space.flatten_to_2d({name: e[:128] for name, e in embeddings.items()})
        colour = facts_of(gallery.ids[:128])[:, 1]  # of the left or upper object
        title = f"128 held-out scenes, by the colour of the left or upper object; {shown:.0%} of the variance"
        figures["space"] = space.space_map(
            flat, PALETTE[colour], [COLOURS[i] for i in colour], title
        )
    if config.model.moe.n_expert > 1:
        figures["experts"] = space.load_by_modality(
            {name: np.array(validated[-1][f"val_load_{name}"]) for name in embeddings}
        )
    return saved(config, figures)


def neighbours(embeddings: dict[str, np.ndarray], gallery) -> Figure:
    """What the gallery's first items find in another modality: two of each direction to something that can be seen."""
    seen = {"image": gallery.images, "audio": gallery.mels}
    shown = {"text": gallery.captions} | {
        name: items for name, items in seen.items() if items is not None
    }
    found = []
    directions = [(a, b) for b in embeddings for a in embeddings if a != b and b != "text"]
    for i, (a, b) in enumerate(directions):  # another item for each
        scores = embeddings[b] @ embeddings[a][i]
        best = np.argsort(-scores, kind="stable")[:5]
        results = [(shown[b][j], gallery.captions[j], float(scores[j])) for j in best]
        own = [place for place, j in enumerate(best) if gallery.ids[j] == gallery.ids[i]]
        query, words = (
            (gallery.captions[i], "") if a == "text" else (shown[a][i], gallery.captions[i])
        )
        found.append((query, words, results, own[0] if own else None))
    return space.neighbours(
        found, "what each finds among held-out items, best first (framed: its own)"
    )


def losses(trained: list[dict], validated: list[dict], unit: str = "token") -> Figure:
    """The loss in training and in validation."""
    train_loss = [
        row.get("ce_loss", row["train_loss"]) for row in trained
    ]  # a run begun before V2 has no ce_loss
    steps, val_steps = [row["step"] for row in trained], [row["step"] for row in validated]
    return plots.loss_curve(
        steps, train_loss, val_steps, [row["val_loss"] for row in validated], unit
    )


def saved(config: Config, figures: dict[str, Figure]) -> list[Path]:
    for name, figure in figures.items():
        plots.save(figure, config.run_dir / f"{name}.png")
    return [config.run_dir / f"{name}.png" for name in figures]
