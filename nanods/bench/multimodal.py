"""What V3 retrieves, and which part contributes how much: results/multimodal.json and .png.

Also writes what train.py expects of v3-tiny into results/expected.json.

    python -m nanods.bench.multimodal             75 minutes on 2 cores, two runs at a time
    python -m nanods.bench.multimodal --seeds 1   half of that

The first is `make bench-v3`.

Each run is v3-tiny on scenes in a process of its own, on one thread, evaluated on 512 meanings that
no training example has. Finished runs are stored and not repeated (stored_runs.py).

    as it is      the preset: one trunk, all pairs of modalities
    emergent      image and audio are never compared, only text with either
    separate      one trunk for each modality, the same steps (the article's claim V3.2)
    experts       16 experts a layer, 2 per token, each of half the MLP's width: the same FLOPs,
                  with LIMoE's entropy losses
    balanced      the same experts with the balance loss over all tokens alone
    longer        no experts, for the time that the experts took
    random        batches drawn at random, which seldom hold similar scenes

`facts` is zero-shot classification by prompts: an example is compared with its own caption and with
captions in which one fact has another value (six shapes, eight colours, two sizes, four relations).
`pipeline` compares the scenes that one core renders per second with those that training consumes.
If the runs of a variant come from several machines, the table has no mean of their times.
"""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanods import plots
from nanods.bench.jobs import Job
from nanods.bench.runs import (
    expected_entry,
    flags_from_dict,
    is_subset,
    machine_words,
    mean_and_each,
    median_seconds,
    update_expected,
    write_json,
)
from nanods.bench.stored_runs import TrainingArgs, machine_of, train_all
from nanods.config import PRESETS, from_dict
from nanods.data import scenes
from nanods.data.random_bits import random_bits
from nanods.errors import run
from nanods.flags import parse_args
from nanods.training import checkpoint
from nanods.training.contrastive_data import encode_captions
from nanods.training.contrastive_task import ContrastiveTask

EXPERTS = {"moe.n-expert": 16, "hidden-ratio": 2}
VARIANTS = {
    "as it is": {},
    "emergent": {"multimodal.pairs": ("text-image", "text-audio")},
    "separate": {"multimodal.shared": False},
    "experts": EXPERTS | {"multimodal.entropy-coefficient": 0.02},
    "balanced": EXPERTS,
    "longer": {"steps": 950},
    "random": {"multimodal.hard-batches": False},
}
MAX_SEEDS = {"experts": 1, "balanced": 1, "longer": 1}
FACTS = {"shape": 0, "colour": 1, "size": 2, "relation": 3}  # columns of scenes.facts_of
FACT_COUNTS = (
    len(scenes.SHAPES),
    len(scenes.COLOURS),
    len(scenes.SIZES),
    len(scenes.RELATIONS),
)


@dataclass(frozen=True)
class Args(TrainingArgs):
    seeds: int = 3
    """Seeds of each variant; experts, balanced and longer get one."""
    only: tuple[Literal[*VARIANTS], ...] = tuple(VARIANTS)
    """Variants to run. Only all of them make the table and the picture."""


# ---- runs ----------------------------------------------------------------------------------------


def variant_job(name: str, seed: int) -> Job:
    """Return the run of a variant."""
    return Job(f"{name}-{seed}", ("v3-tiny", *flags_from_dict(VARIANTS[name] | {"seed": seed})))


def run_figures(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the figures of a run, and how many scenes this machine renders per second."""
    first, last = rows[0], rows[-1]
    print(
        f"{job.name}: {last['cpu_seconds']:.0f} s, recall@1 {last['val_recall1']:.4f}", flush=True
    )
    metrics = {
        "cpu_seconds": last["cpu_seconds"],
        "loss_at_step_1": first["ce_loss"],
    }
    for key, value in last.items():
        if "recall" in key or key in ("val_loss", "temperature"):
            metrics[key] = value
    for key, value in last.items():
        if key.startswith("val_load_"):
            metrics[key] = value
    task, model = load_run(out)
    metrics["parameters"], metrics["parameters_active"] = model.count_parameters()
    metrics["examples_per_second"] = median(row["examples_per_second"] for row in rows)
    metrics["facts"] = fact_accuracy(task, model)
    evaluations = [row for row in rows if "val_loss" in row]
    metrics["curve"] = {
        "steps": [row["step"] for row in evaluations],
        "recall1": [row["val_recall1"] for row in evaluations],
    }
    metrics["scenes_per_second"] = scenes_per_second()
    return metrics


def load_run(out: Path) -> tuple[ContrastiveTask, torch.nn.Module]:
    """Return the task and the model of a finished run."""
    saved = checkpoint.load(out)
    task = ContrastiveTask(from_dict(saved.state["config"]), torch.device("cpu"))
    return task, checkpoint.load_model(saved)


# ---- zero-shot classification of one fact --------------------------------------------------------


def replace_fact(facts: list[int], column: int) -> list[list[int]]:
    """Return a scene's facts (7,) with each possible value of one fact, its own included.

    Scenes whose two objects would be equal are left out.
    """
    candidates = []
    for value in range(FACT_COUNTS[column]):
        candidate = [*facts[:column], value, *facts[column + 1 :]]
        if candidate[:3] != candidate[4:]:
            candidates.append(candidate)
    return candidates


def fact_accuracy(task: ContrastiveTask, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Classify one fact of each gallery example by prompts -> the accuracy by fact, by modality.

    The prompts are captions that differ in this fact alone; the nearest one is the answer.
    """
    all_facts = scenes.facts_of(task.gallery.ids).tolist()
    embeddings, _ = task.embed(model, task.inputs(task.gallery))
    # Variant 1: a wording that no caption of the gallery has.
    wordings = random_bits(11, 0, scenes.CAPTION, task.gallery.ids, 1)
    wordings[:, -1] = 0  # name the objects in the order of the facts
    wordings = wordings.tolist()
    result = {}
    for fact, column in FACTS.items():
        candidates = [replace_fact(facts, column) for facts in all_facts]
        captions = []
        for scene_candidates, wording in zip(candidates, wordings, strict=True):
            captions += [scenes.caption(candidate, wording) for candidate in scene_candidates]
        tokens = encode_captions(captions, task.tokenizer, task.config.model.context_length)
        text_embeddings, _ = task.embed(model, {"text": tokens})
        prompts = text_embeddings["text"].split([len(c) for c in candidates])
        result[fact] = {
            name: accuracy(e, prompts, candidates, all_facts)
            for name, e in embeddings.items()
            if name != "text"
        }
    return result


def accuracy(
    embeddings: Tensor, prompts: tuple[Tensor, ...], candidates: list, labels: list
) -> float:
    """Return the fraction of embeddings (Q, M) whose nearest prompt is the true one.

    prompts: (candidates, M) for each embedding; labels: the true candidate of each.
    """
    correct = 0
    for embedding, example_prompts, example_candidates, label in zip(
        embeddings, prompts, candidates, labels, strict=True
    ):
        nearest = int((example_prompts @ embedding).argmax())
        correct += example_candidates[nearest] == label
    return correct / len(embeddings)


# ---- the table -----------------------------------------------------------------------------------


def scenes_per_second(size: int = 128, turns: int = 20) -> float:
    """Return the scenes that one core renders per second, in all modalities (median batch)."""
    steps = count()
    seconds = median_seconds({"scenes": lambda: scenes.batch(next(steps), size)}, turns)
    return size / seconds["scenes"]


def summary(runs: list[dict]) -> dict:
    """Return the mean over the seeds, and each seed's value, of all metrics that are numbers.

    Times and speeds are left out if the runs come from several machines.
    """
    left_out = {"seed"}
    if len({run["machine"] for run in runs}) > 1:
        left_out |= {"cpu_seconds", "examples_per_second"}
    table = {}
    for name, value in runs[0].items():
        if isinstance(value, int | float) and name not in left_out:
            table[name] = mean_and_each([run[name] for run in runs])
    table["facts"] = {}
    for fact, modalities in runs[0]["facts"].items():
        table["facts"][fact] = {
            name: mean_and_each([run["facts"][fact][name] for run in runs]) for name in modalities
        }
    return table


def compare_trunks(shared_runs: list[dict], separate_runs: list[dict]) -> dict:
    """Compare one shared trunk with separate ones: share of parameters, loss of recall by seed."""
    pairs = list(zip(shared_runs, separate_runs, strict=True))
    first_shared, first_separate = pairs[0]

    def lower_by(name: str) -> dict:
        return mean_and_each([separate[name] - shared[name] for shared, separate in pairs])

    return {
        "share_of_parameters": first_shared["parameters"] / first_separate["parameters"],
        "recall1_lower_by": lower_by("val_recall1"),
        "text_image_lower_by": lower_by("recall1_text_image"),
    }


def draw_recall(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw recall against the step for each variant, the mean over its seeds."""
    curves = {}
    for name, of_variant in runs.items():
        recalls = [run["curve"]["recall1"] for run in of_variant]
        curves[name] = (of_variant[0]["curve"]["steps"], np.mean(recalls, axis=0))
    ylabel = "recall@1, mean of six directions"
    figure = plots.curves(curves, "optimizer step", ylabel, {"chance": 1 / 512})
    plots.save(figure, path)


def main() -> None:
    """Run all variants and seeds, then write the table, the picture and the expected recall."""
    args = parse_args(Args, __doc__)
    jobs = {}
    for seed in range(args.seeds):
        for name in args.only:
            if seed < MAX_SEEDS.get(name, args.seeds):
                jobs[name, seed] = variant_job(name, seed)
    all_jobs = list(jobs.values())
    results = train_all(
        "multimodal", all_jobs, run_figures, args.results, args.runs, workers=args.jobs
    )
    rendered = {name: result.pop("scenes_per_second") for name, result in results.items()}
    runs = {name: [] for name in args.only}
    for (name, seed), job in jobs.items():
        machine = machine_of("multimodal", [job], args.results)
        runs[name].append({"seed": seed, "machine": machine_words(machine)} | results[job.name])
    if is_subset("multimodal", args.only, VARIANTS):
        return

    preset_jobs = [job for (name, _), job in jobs.items() if name == "as it is"]
    made = median(rendered[job.name] for job in preset_jobs)
    taken = median(run["examples_per_second"] for run in runs["as it is"])
    sha256 = scenes.SceneData().sha256
    table = {
        "machine": machine_of("multimodal", all_jobs, args.results),
        "data": {"name": "scenes", "sha256": sha256},
        "steps": PRESETS["v3-tiny"].steps,
        "pipeline": {
            "made_per_second": made,
            "taken_per_second": taken,
            "times": made / taken,
        },
    }
    table["shared against separate"] = compare_trunks(runs["as it is"], runs["separate"])
    table["summary"] = {name: summary(of_variant) for name, of_variant in runs.items()}
    table["runs"] = runs
    write_json(args.results / "multimodal.json", table)
    recalls = [run["val_recall1"] for run in runs["as it is"]]
    entry = expected_entry(sha256, "val_recall1", recalls)
    update_expected(args.results / "expected.json", {"v3-tiny/scenes": entry})
    draw_recall(runs, args.results / "multimodal.png")


if __name__ == "__main__":
    run(main)
