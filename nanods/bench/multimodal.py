"""What V3 finds, and what it owes it to: results/multimodal.json and .png, and what train.py expects of v3-tiny.

    python -m nanods.bench.multimodal             50 minutes on 2 cores, two runs at a time; `make bench-v3`
    python -m nanods.bench.multimodal --seeds 1   half of that

v3-tiny on scenes, each run a train.py of its own on one thread, asked about 512 meanings that no training saw. A finished run
is taken as it is; delete its folder to repeat it.

    as it is      one trunk, all pairs of modalities
    emergent      image and sound are never pair_weights: only text with either
    separate      one trunk for each modality, the same steps (the article's claim V3.2)
    experts       16 experts a layer, 2 a token, each of half the MLP's width: the same arithmetic, LIMoE's entropy losses
    balanced      the same, balanced over all tokens and nothing else
    longer        no experts, for the time that they took
    random        batches drawn at random, where look-alikes seldom meet

`facts` is zero-shot classification from prompts: an item against its own caption in which one fact is replaced, by each value
that it could have (six shapes, eight colours, two sizes, four relations). `data` compares what a core makes of scenes in a
second with what the training takes.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import tyro
from torch import Tensor

from nanods import plots
from nanods.bench.runs import (
    describe_machine,
    flags_from_dict,
    median_seconds,
    run_training,
    update_expected,
    write_json,
)
from nanods.config import PRESETS, from_dict
from nanods.data import scenes
from nanods.data.random_bits import random_bits
from nanods.training import checkpoint
from nanods.training.contrastive_task import ContrastiveTask, encode_captions

EXPERTS = {"moe.n-expert": 16, "hidden-ratio": 2}
VARIANTS = {
    "as it is": {},
    "emergent": {"multimodal.pairs": ("text-image", "text-audio")},
    "separate": {"multimodal.no-shared": ()},
    "experts": EXPERTS | {"multimodal.entropy-coefficient": 0.02},
    "balanced": EXPERTS,
    "longer": {"steps": 1200},
    "random": {"multimodal.no-hard-batches": ()},
}
FEWER = {"experts": 1, "balanced": 1, "longer": 1, "random": 1}  # seeds at most
FACTS = {"shape": 0, "colour": 1, "size": 2, "relation": 3}  # columns of scenes.facts_of


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Seeds of each variant, but for the few of FEWER."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    results: Path = Path("results")
    """Where the table and the picture go."""
    runs: Path = Path("runs/multimodal")
    """Where the runs go."""
    only: tuple[str, ...] = tuple(VARIANTS)
    """Which variants."""


def flags(settings: dict) -> list[str]:
    """{"a": (1, 2), "no-b": ()} -> ["--a", "1", "2", "--no-b"]; other settings as `flags_from_dict`."""
    many = {name: value for name, value in settings.items() if isinstance(value, tuple)}
    words = [word for name, values in many.items() for word in (f"--{name}", *map(str, values))]
    return words + flags_from_dict(
        {name: value for name, value in settings.items() if name not in many}
    )


def run(args: Args, name: str, seed: int) -> dict:
    """One run in a process of its own -> its command and its figures."""
    out = args.runs / f"{name.replace(' ', '-')}-{seed}"
    command, rows = run_training(
        out, ["v3-tiny", *flags(VARIANTS[name] | {"seed": seed, "out-dir": out})]
    )
    last, first = rows[-1], rows[0]
    print(
        f"{out.name}: {last['cpu_seconds']:.0f} s, recall@1 {last['val_recall1']:.4f}", flush=True
    )
    told = {
        "seed": seed,
        "command": command,
        "cpu_seconds": last["cpu_seconds"],
        "loss_at_step_1": first["ce_loss"],
    }
    told |= {
        key: value
        for key, value in last.items()
        if "recall" in key or key in ("val_loss", "temperature")
    }
    told |= {key: value for key, value in last.items() if key.startswith("val_load_")}
    task, model = load_run(out)
    told["parameters"], told["parameters_active"] = model.count_parameters()
    told["examples_per_second"] = median(row["examples_per_second"] for row in rows)
    told["facts"] = fact_accuracy(task, model)
    told["curve"] = {
        "steps": [r["step"] for r in rows if "val_loss" in r],
        "recall1": [r["val_recall1"] for r in rows if "val_loss" in r],
    }
    return told


def load_run(out: Path) -> tuple[ContrastiveTask, torch.nn.Module]:
    """A finished run's task and model."""
    saved = checkpoint.load(out)
    task = ContrastiveTask(from_dict(saved.state["config"]), torch.device("cpu"))
    return task, checkpoint.load_model(saved)


# ---- one fact at a time ------------------------------------------------------------------------------------------------------


def replace_fact(told: list[int], column: int) -> list[list[int]]:
    """A scene's facts (7,) with each value that one of them can have; not where the two objects would be alike."""
    counts = (len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SIZES), len(scenes.RELATIONS))
    all_of_them = [[*told[:column], value, *told[column + 1 :]] for value in range(counts[column])]
    return [each for each in all_of_them if each[:3] != each[4:]]


def fact_accuracy(task: ContrastiveTask, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """How often an item is nearest to the true one of the captions that differ in one fact: by fact, by modality."""
    told = scenes.facts_of(task.gallery.ids).tolist()
    embeddings, _ = task.embed(model, task.inputs(task.gallery))
    right = {}
    for fact, column in FACTS.items():
        choices = [replace_fact(scene, column) for scene in told]
        words = random_bits(
            11, 0, scenes.CAPTION, task.gallery.ids, 1
        )  # a wording that no item of the gallery has
        words[:, -1] = 0  # as told, not from the other side
        captions = [
            scenes.caption(each, row)
            for some, row in zip(choices, words.tolist(), strict=True)
            for each in some
        ]
        made, _ = task.embed(
            model, {"text": encode_captions(captions, task.tokenizer, task.config.model.context_length)}
        )
        right[fact] = {
            name: accuracy(e, made["text"].split([len(some) for some in choices]), choices, told)
            for name, e in embeddings.items()
            if name != "text"
        }
    return right


def accuracy(items: Tensor, prompts: tuple[Tensor, ...], choices: list, told: list) -> float:
    """The share of items (Q, M) nearest to their true prompt; each has its own prompts, the scenes of `choices`."""
    best = [
        choices[i][int((prompts[i] @ item).argmax())] == told[i] for i, item in enumerate(items)
    ]
    return sum(best) / len(best)


# ---- the table ---------------------------------------------------------------------------------------------------------------


def scenes_per_second(size: int = 128, turns: int = 20) -> float:
    """What one core makes of them, all three ways: the median of some batches."""
    steps = count()
    return (
        size / median_seconds({"scenes": lambda: scenes.batch(next(steps), size)}, turns)["scenes"]
    )


def spread(values: list[float]) -> dict:
    return {"mean": mean(values), "each": values}


def summary(runs: list[dict]) -> dict:
    """Each figure's mean over the seeds, and each."""
    names = [
        name for name, value in runs[0].items() if isinstance(value, int | float) and name != "seed"
    ]
    told = {name: spread([one[name] for one in runs]) for name in names}
    told["facts"] = {
        fact: {kind: spread([one["facts"][fact][kind] for one in runs]) for kind in kinds}
        for fact, kinds in runs[0]["facts"].items()
    }
    return told


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    jobs = [
        (name, seed)
        for seed in range(args.seeds)
        for name in args.only
        if seed < FEWER.get(name, args.seeds)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: run(args, *job), jobs))
    runs = {
        name: [row for job, row in zip(jobs, rows, strict=True) if job[0] == name]
        for name in args.only
    }
    made, taken = (
        scenes_per_second(),
        median(one["examples_per_second"] for of in runs.values() for one in of),
    )
    table = {
        "machine": describe_machine(),
        "data": {"name": "scenes", "sha256": scenes.SceneData().sha256},
        "steps": PRESETS["v3-tiny"].steps,
    }
    table |= {
        "pipeline": {"made_per_second": made, "taken_per_second": taken, "times": made / taken}
    }
    if {"as it is", "separate"} <= runs.keys():
        pairs = list(zip(runs["as it is"], runs["separate"], strict=True))
        table["shared against separate"] = {
            "share_of_parameters": pairs[0][0]["parameters"] / pairs[0][1]["parameters"],
            "recall1_lower_by": spread(
                [separate["val_recall1"] - shared["val_recall1"] for shared, separate in pairs]
            ),
            "text_image_lower_by": spread(
                [b["recall1_text_image"] - a["recall1_text_image"] for a, b in pairs]
            ),
        }
    table |= {"summary": {name: summary(of) for name, of in runs.items()}, "runs": runs}
    write_json(args.results / "multimodal.json", table)
    if "as it is" in runs:
        recalls = [one["val_recall1"] for one in runs["as it is"]]
        tolerance = max(0.02, 2 * (max(recalls) - min(recalls)))
        known = {
            "sha256": table["data"]["sha256"],
            "val_recall1": round(mean(recalls), 4),
            "tolerance": round(tolerance, 4),
        }
        update_expected(args.results / "expected.json", {"v3-tiny/scenes": known})
    curves = {
        name: (of[0]["curve"]["steps"], np.mean([one["curve"]["recall1"] for one in of], axis=0))
        for name, of in runs.items()
    }
    figure = plots.curves(
        curves, "optimizer step", "recall@1, mean of six directions", {"chance": 1 / 512}
    )
    plots.save(figure, args.results / "multimodal.png")


if __name__ == "__main__":
    main()
