"""Draw the pictures of README.md and docs/ARCHITECTURE.md: `make docs`.

    docs/architecture.png    V0 to V3, and what each version adds
    docs/overview.png        what the experts of runs/v2-tiny did, and what runs/v3-tiny finds

The second needs the two runs (`make train-v2 train-v3`) and is left as it is without them.
"""

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import torch
from matplotlib.figure import Figure

from nanods import diagrams, plots
from nanods.config import Config, from_dict
from nanods.data.text import load_text
from nanods.training import checkpoint
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.inspection import chosen_experts
from nanods.training.metrics import read_metrics
from nanods.training.pictures import draw_neighbours

DOCS = Path(__file__).parents[2] / "docs"
RUNS = Path("runs")
LAYER = 3  # the layer of V2 whose experts colour the text


def load_run(run_dir: Path) -> tuple[Config, torch.nn.Module, list[dict]]:
    """Return the configuration and the model of a run's last checkpoint, and the metrics of its
    steps up to there."""
    saved = checkpoint.load(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    trained = [row for row in rows if 1 <= row["step"] <= saved.state["step"]]
    return from_dict(saved.state["config"]), checkpoint.load_model(saved), trained


def overview(v2_dir: Path, v3_dir: Path) -> Figure:
    """Draw what the experts of a V2 run did and what a V3 run finds, from their checkpoints."""
    figure = Figure(figsize=(15, 6.6))
    grid = figure.add_gridspec(
        2,
        2,
        left=0.06,
        right=0.99,
        width_ratios=(1, 1.15),
        height_ratios=(1.2, 1),
        wspace=0.05,
        hspace=0.4,
    )

    config, model, trained = load_run(v2_dir)
    steps = f"step {trained[-1]['step']:,} of {config.steps:,}"
    figure.text(0.06, 0.95, f"make train-v2: the load of 16 experts ({steps})", fontsize=13)
    load = np.array([row["load"] for row in trained])  # (steps, L, E)
    load = load / load.mean(axis=-1, keepdims=True)  # in multiples of an even share
    plots.draw_load_over_time(
        figure.add_subplot(grid[0, 0]), [row["step"] for row in trained], load
    )
    data = load_text(config.data, config.model.vocab_size)
    window = torch.from_numpy(data.val[:256].astype("int64"))
    text = [data.tokenizer.decode([token]) for token in window.tolist()]
    first_choice = chosen_experts(model, window)[LAYER, :, 0]  # (T,)
    title = f"validation text, each byte coloured by its first expert in layer {LAYER}"
    plots.draw_text_by_expert(figure.add_subplot(grid[1, 0]), text, first_choice, title)

    config, model, trained = load_run(v3_dir)
    steps = f"step {trained[-1]['step']:,} of {config.steps:,}"
    figure.text(0.53, 0.95, f"make train-v3: what each query finds ({steps})", fontsize=13)
    task = ContrastiveTask(config, torch.device("cpu"))
    embeddings, _ = task.embed(model, task.inputs(task.gallery))
    arrays = {name: e.double().numpy() for name, e in embeddings.items()}
    picture = io.BytesIO()
    draw_neighbours(arrays, task.gallery).savefig(picture, dpi=150, bbox_inches="tight")
    picture.seek(0)
    axes = figure.add_subplot(grid[:, 1])
    axes.imshow(matplotlib.image.imread(picture))
    axes.axis("off")
    return figure


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    plots.save(diagrams.architecture(), DOCS / "architecture.png")
    print("wrote      docs/architecture.png")
    v2_dir, v3_dir = RUNS / "v2-tiny", RUNS / "v3-tiny"
    missing = [str(path) for path in (v2_dir, v3_dir) if not checkpoint.list_checkpoints(path)]
    if missing:
        names = " and ".join(missing)
        print(f"kept       docs/overview.png ({names} not found: make train-v2 train-v3)")
        return
    plots.save(overview(v2_dir, v3_dir), DOCS / "overview.png")
    print("wrote      docs/overview.png")


if __name__ == "__main__":
    main()
