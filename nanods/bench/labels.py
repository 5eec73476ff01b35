"""Classification by labels as captions, beside logistic regression: results/labels.json and .png.

    python -m nanods.bench.labels             5 minutes on 2 cores, two runs at a time
    python -m nanods.bench.labels --seeds 1   half of that

The first is `make bench-labels`. It needs the extra peers (scikit-learn).

The data are ten classes of drawn shapes at 64 pixels, each of its own size, colour, position and
angle, under noise: folders CLASS/*.png, as in docs/DATA.md. V3 learns from the images and the names
of their folders. Its zero-shot accuracy, which train.py reports, is checked to be what
`sample.py --labels` answers. Beside it stand two classifiers of scikit-learn on the same examples:

    logistic regression on pixels       the images as V3 reads them
    logistic regression on embeddings   the images as the trained V3 embeds them (a linear probe)

All are measured on the same held-out images, and in CPU-seconds. Finished runs are stored and not
repeated (stored_runs.py).
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image, ImageDraw

from nanods import plots
from nanods.bench.jobs import Job
from nanods.bench.runs import flags_from_dict, write_json
from nanods.bench.stored_runs import machine_of, train_all
from nanods.data.download import write_atomic
from nanods.errors import UserError, run
from nanods.flags import parse_args
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.finished_run import load_run
from nanods.training.zero_shot import label_probabilities

SIZE = 64  # pixels
NOISE = 0.25  # standard deviation, of values in 0 .. 1
# Corners of the shapes in a circle of radius 1; the round ones are drawn in `draw_shape`.
POLYGONS = {
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
    "bar": [(-1, -0.25), (1, -0.25), (1, 0.25), (-1, 0.25)],
    "cross": [
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ],
    "diamond": [(0, -1), (0.6, 0), (0, 1), (-0.6, 0)],
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "star": [
        (
            (1 - 0.6 * (i % 2)) * math.sin(math.pi * i / 5),
            (0.6 * (i % 2) - 1) * math.cos(math.pi * i / 5),
        )
        for i in range(10)
    ],
    "triangle": [(0, -1), (0.87, 0.5), (-0.87, 0.5)],
}
ROUND = ("circle", "half circle", "ring")
CLASSES = sorted([*POLYGONS, *ROUND])


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Seeds of V3's weights and batches."""
    steps: int = 300
    """Optimizer steps of each run."""
    per_class: int = 100
    """Training images of each class. Half as many are held out."""
    jobs: int = 2
    """Runs at a time."""
    runs: Path = Path("runs")
    """Where the images and the runs go; an unfinished run is resumed."""
    results: Path = Path("results")
    """Where the table and the picture go."""


# ---- the images ----------------------------------------------------------------------------------


def write_shapes(folder: Path, per_class: int) -> None:
    """Write folder/train/CLASS/*.png and half as many to folder/val/CLASS, unless they exist."""
    for split, count, seed in (("train", per_class, 0), ("val", per_class // 2, 1)):
        random = np.random.default_rng(seed)
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = draw_shape(name, random)
                path = folder / split / name / f"{i:04}.png"
                if not path.exists():
                    write_atomic(path, partial(image.save, format="PNG"))


def draw_shape(name: str, random: np.random.Generator) -> Image.Image:
    """Return a shape of random size, place, angle (up to 20 degrees) and colours, under noise."""
    scale = 4  # drawn at four times the size, then reduced: smooth edges
    radius = random.uniform(10, 20) * scale
    x, y = random.uniform(22, SIZE - 22, size=2) * scale
    angle = math.radians(random.uniform(-20, 20))
    background, colour = random.uniform(0, 0.4, size=3), random.uniform(0.6, 1, size=3)
    if random.random() < 0.5:
        background, colour = colour, background
    mask = Image.new("L", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(mask)
    box = (x - radius, y - radius, x + radius, y + radius)
    if name == "circle":
        draw.ellipse(box, fill=255)
    elif name == "ring":
        draw.ellipse(box, outline=255, width=round(0.35 * radius))
    elif name == "half circle":
        start = 180 + math.degrees(angle)
        draw.pieslice(box, start, start + 180, fill=255)
    else:
        cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
        draw.polygon(
            [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in POLYGONS[name]], 255
        )
    mask = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64)[..., None] / 255
    pixels = background * (1 - mask) + colour * mask + NOISE * random.normal(size=(SIZE, SIZE, 3))
    return Image.fromarray(np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8))


# ---- one run -------------------------------------------------------------------------------------


def shapes_folder(args: Args) -> Path:
    """Return where the images are."""
    return args.runs / "labels" / f"shapes-{args.per_class}"


def seed_job(args: Args, seed: int) -> Job:
    """Return the run of a seed. fp32: sample.py computes in it too."""
    flags = {
        "data": shapes_folder(args),
        "seed": seed,
        "steps": args.steps,
        "eval-every": args.steps,
        "batch-size": 64,
        "multimodal.image-size": SIZE,
        "multimodal.patch-size": 8,
        "dtype": "fp32",
    }
    name = f"{args.per_class}-per-class-{args.steps}-{seed}"
    return Job(name, ("v3-tiny", *flags_from_dict(flags)))


def run_figures(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the figures of a run, and of the two classifiers on the same examples."""
    last = rows[-1]
    splits, answers = embed_classes(out)
    (train_pixels, train_embeddings, labels), (pixels, embeddings, val_labels) = splits.values()
    linear = logistic_regression((train_embeddings, labels), (embeddings, val_labels))
    print(
        f"{job.name}: zero-shot {last['zero_shot_accuracy_image']:.3f} after "
        f"{last['cpu_seconds']:.0f} CPU-seconds, sample.py --labels {answers:.3f}, linear "
        f"probe {linear['accuracy']:.3f}",
        flush=True,
    )
    figures = {
        "accuracy": last["zero_shot_accuracy_image"],
        "recall1_image_text": last["recall1_image_text"],
        "cpu_seconds": last["cpu_seconds"],
        "sample.py --labels": answers,
        "linear": linear,
    }
    if job.config.seed == 0:  # the images are the same for each seed
        figures["pixels"] = logistic_regression((train_pixels, labels), (pixels, val_labels))
        figures["examples"] = {"train": len(labels), "held_out": len(val_labels)}
    return figures


# ---- the same examples, by two methods -----------------------------------------------------------


@torch.no_grad()
def embed_classes(out: Path) -> tuple[dict[str, tuple], float]:
    """Return the examples of a run by split, each as (pixels, embeddings, labels); and the accuracy
    of `sample.py --labels` on the held-out ones."""
    finished = load_run(str(out), "cpu")
    task = ContrastiveTask(finished.config, torch.device("cpu"))
    training = task.data.batch(0, len(task.data.train))
    numbers = {name: i for i, name in enumerate(CLASSES)}
    splits = {}
    for split, examples in (("train", training), ("val", task.gallery)):
        embeddings, _ = task.embed(finished.model, task.inputs(examples))
        labels = np.array([numbers[caption] for caption in examples.captions])
        pixels = examples.images.reshape(len(labels), -1)
        splits[split] = pixels, embeddings["image"], labels
    answers = [
        label_probabilities(
            finished.model, e, CLASSES, finished.config, finished.tokenizer
        ).argmax()
        for e in splits["val"][1]
    ]
    return splits, float((np.array(answers) == splits["val"][2]).mean())


def new_classifier():
    """Return scikit-learn's logistic regression on standardised features, not yet fitted."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise UserError(
            "this bench needs scikit-learn: make setup EXTRAS=peers, or pip install 'nanods[peers]'"
        ) from None
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def logistic_regression(train: tuple, val: tuple) -> dict:
    """Fit logistic regression to features (N, D) and labels (N,). Returns its accuracy on others,
    with the CPU-seconds of the fit and of all predictions."""
    model = new_classifier()
    start = time.process_time()
    model.fit(*train)
    fitted = time.process_time()
    predicted = model.predict(val[0])
    return {
        "accuracy": float((predicted == val[1]).mean()),
        "fit_cpu_seconds": fitted - start,
        "predict_cpu_seconds": time.process_time() - fitted,
    }


# ---- the table -----------------------------------------------------------------------------------


def main() -> None:
    """Draw the images, train V3 with each seed, fit the classifiers, and write the results."""
    args = parse_args(Args, __doc__)
    new_classifier()  # is refused before the training, where scikit-learn is missing
    write_shapes(shapes_folder(args), args.per_class)
    jobs = [seed_job(args, seed) for seed in range(args.seeds)]
    results = train_all("labels", jobs, run_figures, args.results, args.runs, workers=args.jobs)
    runs = [{"seed": seed} | results[job.name] for seed, job in enumerate(jobs)]
    linear = [result.pop("linear") for result in runs]
    pixels, examples = runs[0].pop("pixels"), runs[0].pop("examples")
    print(
        f"logistic regression on pixels: {pixels['accuracy']:.3f} after "
        f"{pixels['fit_cpu_seconds']:.1f} CPU-seconds"
    )
    table = {
        "machine": machine_of("labels", jobs, args.results) | {"dtype": "fp32"},
        "data": {
            "classes": CLASSES,
            **examples,
            "pixels": SIZE,
        },
        "steps": args.steps,
        "summary": {
            "V3, zero-shot": mean(result["accuracy"] for result in runs),
            "logistic regression on V3's embeddings": mean(row["accuracy"] for row in linear),
            "logistic regression on pixels": pixels["accuracy"],
        },
        "logistic regression on V3's embeddings": linear,
        "logistic regression on pixels": pixels,
        "runs": runs,
    }
    write_json(args.results / "labels.json", table)
    accuracies = {
        "V3, zero-shot": [result["accuracy"] for result in runs],
        "logistic regression on V3's embeddings": [row["accuracy"] for row in linear],
        "logistic regression on pixels": [pixels["accuracy"]],
    }
    xlabel = f"accuracy on {examples['held_out']} held-out images (chance {1 / len(CLASSES):.1f})"
    plots.save(plots.dot_plot(accuracies, {}, xlabel), args.results / "labels.png")


if __name__ == "__main__":
    run(main)
