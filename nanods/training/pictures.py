"""The pictures that a finished run leaves in its directory."""

from pathlib import Path

import numpy as np
import torch

from nanods import plots
from nanods.config import Config
from nanods.data.text import TextData
from nanods.gpt import GPT
from nanods.training.inspection import experts_of, sparsity_report

SHOWN = 384  # tokens of validation text that are coloured by their experts


def draw(config: Config, model: GPT, data: TextData, rows: list[dict]) -> list[Path]:
    """Loss; what V1's heads read; what V2's experts did. `rows` are those of metrics.jsonl -> the files written."""
    trained, validated = [row for row in rows if row["step"]], [row for row in rows if "val_loss" in row]
    train_loss = [row.get("ce_loss", row["train_loss"]) for row in trained]  # a run begun before V2 has no ce_loss
    steps, val_steps = [row["step"] for row in trained], [row["step"] for row in validated]
    figures = {"loss": plots.loss_curve(steps, train_loss, val_steps, [row["val_loss"] for row in validated])}
    window = torch.from_numpy(data.val[: config.model.context_length].astype("int64")).to(model.head.weight.device)
    if config.model.attention.kind == "block":
        figures["sparsity"] = plots.sparsity(sparsity_report(model, window))
    if config.model.moe.n_expert > 1:
        load, entropy, dropped = ([row[name] for row in trained] for name in ("load", "load_entropy", "dropped"))
        text = [data.tokenizer.decode([token]) for token in window[:SHOWN].tolist()]
        chosen = experts_of(model, window[:SHOWN])[..., 0]  # (L, T)
        val_load = np.array(validated[-1]["val_load"])
        figures["experts"] = plots.experts(steps, np.array(load), entropy, dropped, val_load, text, chosen)
    for name, figure in figures.items():
        plots.save(figure, config.out / f"{name}.png")
    return [config.out / f"{name}.png" for name in figures]
