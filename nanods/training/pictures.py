"""The pictures that a finished run leaves in its directory."""

from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from nanods import plots, plots_multimodal
from nanods.config import Config
from nanods.contact_sheet import Cell, Row, save_contact_sheet
from nanods.data.examples import Examples, caption_key, duplicate_ids
from nanods.data.scenes import COLOURS, PALETTE, Scenes, facts_of
from nanods.data.text import TextData
from nanods.gpt import GPT
from nanods.multimodal import MODALITIES
from nanods.training.inspection import chosen_experts, sparsity_report

SHOWN_TOKENS = 384  # tokens of validation text that are coloured by their experts
SHOWN_EXAMPLES = 24  # held-out examples whose similarities are drawn
NO_TEXT = "(no text)"  # in place of the caption of an example without one
SHOWN_QUERIES = 4  # whose nearest neighbours are drawn, at least


def draw_language_run(config: Config, model: GPT, data: TextData, rows: list[dict]) -> list[Path]:
    """Draw the loss, what V1's heads read, and what V2's experts did. `rows` are those of
    metrics.jsonl. Returns the files."""
    trained, validated = split_rows(rows)
    steps = [row["step"] for row in trained]
    figures = {"loss": draw_losses(trained, validated)}
    text = data.val[: config.model.context_length].astype("int64")
    window = torch.from_numpy(text).to(model.head.weight.device)
    if config.model.attention.kind == "block":
        figures["sparsity"] = plots.sparsity(sparsity_report(model, window))
    if config.model.moe.n_expert > 1:
        shown = window[:SHOWN_TOKENS]
        figures["experts"] = plots.experts(
            steps,
            np.array([row["load"] for row in trained]),
            [row["load_entropy"] for row in trained],
            [row["dropped"] for row in trained],
            np.array(validated[-1]["val_load"]),
            [data.tokenizer.decode([token]) for token in shown.tolist()],
            chosen_experts(model, shown)[..., 0],  # (L, T): the likeliest expert
        )
    return save_figures(config, figures)


def draw_multimodal_run(
    config: Config,
    embeddings: dict[str, np.ndarray],
    gallery,
    scale: float,
    rows: list[dict],
    labels: list[str] = (),
    confusions: dict[str, np.ndarray] | None = None,
) -> list[Path]:
    """Draw loss and recall and, from the gallery's embeddings (Q, M) by modality, similarities, a
    map of the space, and what some examples find (as a page too if there are sounds); where the
    captions are C labels, also the confusions (C, C) by modality. Returns the files."""
    trained, validated = split_rows(rows)
    recalls = {}
    for pair in combinations(embeddings, 2):
        for a, b in (pair, pair[::-1]):
            if f"recall1_{a}_{b}" in validated[-1]:  # not if no example has both
                recalls[f"{a}->{b}"] = [row[f"recall1_{a}_{b}"] for row in validated]
    duplicates, chances = duplicates_in(gallery), []
    similarities, matching, names = {}, {}, {}
    for a, b in combinations(embeddings, 2):
        both = np.flatnonzero(gallery.has(a, b))
        if len(both) < 2:
            continue
        few = both[:SHOWN_EXAMPLES]
        if labels:  # examples of one label stand together
            few = np.array(sorted(few, key=lambda i: caption_key(gallery.captions[i])))
            names[f"{a}-{b}"] = [gallery.captions[i] or NO_TEXT for i in few]
        similarities[f"{a}-{b}"] = embeddings[a][few] @ embeddings[b][few].T
        matching[f"{a}-{b}"] = duplicates[few][:, few]
        chances.append(duplicates[both][:, both].mean())
    steps, chance = [row["step"] for row in validated], np.mean(chances)
    figures = {
        "loss": draw_losses(trained, validated, "example"),
        "recall": plots_multimodal.recall_over_time(steps, recalls, chance),
        "similarities": plots_multimodal.similarities(similarities, scale, matching, names),
        "neighbours": draw_neighbours(embeddings, gallery),
    }
    if confusions:
        figures["confusion"] = plots_multimodal.confusion(confusions, labels)
    if isinstance(gallery, Scenes):
        figures["space"] = draw_scene_map(embeddings, gallery)
    if config.model.moe.n_expert > 1:
        load = {name: np.array(validated[-1][f"val_load_{name}"]) for name in embeddings}
        figures["experts"] = plots_multimodal.load_by_modality(load)
    paths = save_figures(config, figures)
    if gallery.waves is not None:
        paths.append(config.run_dir / "sheet.html")
        save_sounding_sheet(paths[-1], embeddings, gallery)
    return paths


def duplicates_in(gallery) -> np.ndarray:
    """Return which examples of the gallery are duplicates of which, (Q, Q): each of itself, too."""
    ids = duplicate_ids(gallery)
    return (ids[:, None] == ids).any(axis=-1)


def save_sounding_sheet(
    path: Path, embeddings: dict[str, np.ndarray], gallery: Examples, queries: int = 6
) -> None:
    """Write what some examples of the gallery find, in each direction, as a page whose sounds
    play. The right answers are framed."""
    duplicates, rows = duplicates_in(gallery), []
    for number, (a, b) in enumerate(permutations(embeddings, 2)):
        both = np.flatnonzero(gallery.has(a, b))
        for i in np.roll(both, -number * queries)[:queries]:  # others for each direction
            scores = embeddings[b] @ embeddings[a][i]
            best = both[np.argsort(-scores[both], kind="stable")][:5]
            cells = [sheet_cell(gallery, i, a, "the query")]
            for j in best:
                note = f"cosine {scores[j]:.2f}"
                cells.append(sheet_cell(gallery, j, b, note, bool(duplicates[i, j])))
            rows.append(Row(f"{a} to {b}", cells))
    text = f"Among {len(duplicates)} held-out examples. Right answers are framed."
    save_contact_sheet(path, "What each query finds", rows, text)


def sheet_cell(gallery: Examples, i: int, modality: str, note: str, is_right: bool = False) -> Cell:
    """Return example i of the gallery, as the model reads it in one modality, and its caption."""
    caption = gallery.captions[i]
    if modality == "audio":
        return Cell(caption, None, gallery.waves[i], note, is_right)
    if modality == "image":
        return Cell(caption, gallery.images[i], None, note, is_right)
    return Cell(caption, None, None, note, is_right)


def draw_scene_map(embeddings: dict[str, np.ndarray], gallery: Scenes) -> Figure:
    """Draw 128 scenes of the gallery in two dimensions, coloured by their left or upper object."""
    points, variance = plots_multimodal.flatten_to_2d(
        {name: e[:128] for name, e in embeddings.items()}
    )
    colour = facts_of(gallery.ids[:128])[:, 1]
    title = (
        "128 held-out scenes, by the colour of the left or upper object; "
        f"{variance:.0%} of the variance"
    )
    names = [COLOURS[i] for i in colour]
    return plots_multimodal.space_map(points, PALETTE[colour], names, title)


def draw_neighbours(embeddings: dict[str, np.ndarray], gallery) -> Figure:
    """Draw what some of the gallery's examples, of different captions, find in another modality:
    one query for each direction to something visible, at least SHOWN_QUERIES in total."""
    shown = {name: getattr(gallery, MODALITIES[name].input_field) for name in embeddings}
    keys = np.array([caption_key(text) or f"\n{i}" for i, text in enumerate(gallery.captions)])
    captions = [text or NO_TEXT for text in gallery.captions]
    duplicates, rows, drawn = duplicates_in(gallery), [], set()
    directions = [(a, b) for b in embeddings for a in embeddings if a != b and b != "text"]
    directions = [pair for pair in directions if gallery.has(*pair).sum() > 1]
    if len(directions) == 1:  # text and one other
        directions.append(directions[0][::-1])
    rounds = -(-SHOWN_QUERIES // len(directions))
    queries = [direction for direction in directions for _ in range(rounds)]
    for a, b in queries:
        both = np.flatnonzero(gallery.has(a, b))
        i = next((i for i in both if keys[i] not in drawn), None)
        if i is None:
            continue
        drawn.add(keys[i])
        scores = embeddings[b] @ embeddings[a][i]
        best = both[np.argsort(-scores[both], kind="stable")]
        if b == "text":
            best = best[first_of_each(keys[best])]  # equal captions once
        best = best[:5]
        results = [(shown[b][j], captions[j], float(scores[j])) for j in best]
        if b == "text":
            results = [(None, caption, score) for _, caption, score in results]
        right = np.flatnonzero(duplicates[i, best]).tolist()
        query, caption = (shown[a][i], captions[i])
        if a == "text":
            query, caption = captions[i], ""
        rows.append((query, caption, results, right))
    title = "what each query finds among held-out examples, best first (framed: true matches)"
    return plots_multimodal.neighbours(rows, title)


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Return where each distinct value of an array occurs first, in order."""
    return np.sort(np.unique(keys, return_index=True)[1])


def split_rows(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return the rows of training steps, and those with an evaluation (a warm start has one before
    step 1)."""
    return [row for row in rows if row["step"]], [row for row in rows if "val_loss" in row]


def draw_losses(trained: list[dict], validated: list[dict], unit: str = "token") -> Figure:
    """Draw the loss in training, without the experts' auxiliary losses, and in validation."""
    train_loss, val_loss = (
        [row["ce_loss"] for row in trained],
        [row["val_loss"] for row in validated],
    )
    steps, val_steps = [row["step"] for row in trained], [row["step"] for row in validated]
    return plots.loss_curve(steps, train_loss, val_steps, val_loss, unit)


def save_figures(config: Config, figures: dict[str, Figure]) -> list[Path]:
    """Save figures as RUN/NAME.png and return the files."""
    paths = []
    for name, figure in figures.items():
        paths.append(config.run_dir / f"{name}.png")
        plots.save(figure, paths[-1])
    return paths
