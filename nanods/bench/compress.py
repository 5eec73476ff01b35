"""What compressing a model gains and costs: results/compress.json and compress_*.png.

    python -m nanods.bench.compress                  all parts; `make bench-compress`
    python -m nanods.bench.compress --only speed     one part

    speed        INT8 against fp32 and bf16: a layer by width and rows, whole models, experts, an
                 image-text pair; other INT8 products beside it        about 5 minutes on one thread
    leak         the change of a row's output when other rows change   1 minute
    sizes        trained v0-, v1-, v2- and v3-tiny, stored as INT8 and FP8: loss or recall, bytes
    qat          v1-tiny with weights of 4 and 2 bits, 3 seeds: rounded after training, and trained
                 with rounding (quantisation-aware training)
    distill-v3   V3 with 16 experts teaches a dense V3 with 3% of its parameters: with and without
                 the teacher, after equal steps and in equal time, 3 seeds
    distill-v1   V2 teaches V1, likewise

All parts but the first two train models with train.py, each on one thread, and store each result as
soon as it is there (stored_runs.py). A bench that is stopped goes on where it was. The fp32 runs of
v0-tiny to v2-tiny are those of `make results`, in runs/ladder.

How qat compares. All runs start from the same trained fp32 run and take CONTINUED_STEPS more steps
with the same batches and learning rates: one in fp32, the others with rounded weights. The first is
then rounded ("after training"), so both have seen equally many batches. The gap is its loss after
rounding minus its loss before; QAT closes the share of the gap by which its own loss is lower.

How a distillation compares. One teacher, of seed 0, teaches three students. Each student is also
trained alone: for as many steps, and for as much CPU time as training with the teacher takes.

Losses are evaluated on EVAL_TOKENS tokens, the same for all formats of a run.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nanods import plots, plots_compress
from nanods.bench.compress_speed import describe_processor, part_leak, part_speed
from nanods.bench.jobs import Job, ladder_job
from nanods.bench.runs import machine_words, measure_parts
from nanods.bench.stored_runs import TrainingArgs, machine_of, train_all
from nanods.errors import run
from nanods.flags import parse_args
from nanods.quantize import fake_quantize_model, grid_scale, quantize, round_to_grid
from nanods.training.finished_run import FinishedRun, load_run
from nanods.training.quantize import size_of
from nanods.training.task import Task, make_task

BENCH = "compress"
ALL_BITS = (8, 7, 6, 5, 4, 3, 2)
EVAL_TOKENS = 262_144
CONTINUED_STEPS = 400
CONTINUED = ("--steps", str(CONTINUED_STEPS), "--lr", "0.005")
QAT_BITS = (4, 2)
HISTOGRAM_NUMBERS = 20_000
DISTILLED = {
    "distill-v3": "a dense V3's recall@1, mean of six directions",
    "distill-v1": "V1's bits per byte (validation)",
}
V3_TEACHER = ("v3-tiny", "--moe.n-expert", "16", "--multimodal.entropy-coefficient", "0.02")
# The student of `make distill-v3`, for about a quarter of its steps.
V3_STUDENT = ("v3-tiny", "--n-layer", "2", "--n-embd", "64", "--steps", "200")
# A third of v1-tiny's steps, so that the comparison takes no more than an hour of CPU time.
V1_STUDENT = ("v1-tiny", "--steps", "400", "--eval-every", "400")


@dataclass(frozen=True)
class Args(TrainingArgs):
    only: Literal["all", "speed", "leak", "sizes", "qat", "distill-v3", "distill-v1"] = "all"
    """One part; the results of the other parts stay as they are."""
    seeds: int = 3
    """Seeds of qat and the distillations."""


# ---- runs ----------------------------------------------------------------------------------------


def trained(preset: str, seed: int) -> Job:
    """Return the run of an unchanged preset: of V0 to V2, the ladder's (`make results`)."""
    name = f"{preset} {seed}"
    if preset == "v3-tiny":
        return Job(name, (preset, "--seed", str(seed)))
    return ladder_job(preset, seed, name=name)


def continued(seed: int, runs: Path, bits: int | None = None) -> Job:
    """Return a run that continues v1-tiny, in fp32 or with weights of `bits`."""
    start = trained("v1-tiny", seed)
    folder = str(start.folder_in(runs, BENCH))
    words = ("v1-tiny", "--seed", str(seed), "--init-from", folder, *CONTINUED)
    if bits is None:
        return Job(f"continued {seed}", words, needs=start)
    return Job(f"qat {bits} bits {seed}", (*words, "--quantize", f"int{bits}"), needs=start)


def evaluation_task(finished: FinishedRun) -> Task:
    """Return the task of a run, which evaluates EVAL_TOKENS tokens."""
    config = replace(finished.config, eval_tokens=EVAL_TOKENS, teacher=None)
    return make_task(config, torch.device("cpu"), finished.tokenizer)


def headline(task: Task, model: nn.Module) -> float:
    """Return bits per byte on the validation text, or for V3 the mean recall@1."""
    return float(task.evaluate(model)[task.headline_metric])


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy of a model that rounds its weights to `bits` and its activations to 8 bits."""
    model = copy.deepcopy(model).eval()
    fake_quantize_model(model, bits)
    return model


def measure_formats(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return a run's quality and size in fp32, INT8 and FP8, and V1's with fewer bits."""
    finished = load_run(str(out), "cpu")
    task = evaluation_task(finished)
    formats = {"fp32": finished.model}
    formats |= {format: quantize(finished.model, format) for format in ("int8", "fp8")}
    result = {"metric": task.headline_metric, "steps": finished.state["step"]}
    result["quality"] = {name: headline(task, model) for name, model in formats.items()}
    result["bytes"] = {name: size_of(model) for name, model in formats.items()}
    result["parameters"] = finished.model.count_parameters()[0]
    result["cpu_seconds"] = rows[-1]["cpu_seconds"]
    if job == trained("v1-tiny", finished.config.seed):  # qat compares these
        result["by_bits"] = quality_by_bits(task, finished.model, ALL_BITS)
    return result


def quality_by_bits(task: Task, model: nn.Module, all_bits: Sequence[int]) -> dict[str, float]:
    """Return the quality of a model with weights rounded to each number of bits."""
    return {str(bits): headline(task, rounded(model, bits)) for bits in all_bits}


def measure_continued(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the quality of a continued or taught run, and of an fp32 one when it is rounded."""
    finished = load_run(str(out), "cpu")
    task = evaluation_task(finished)
    result = {
        "quality": headline(task, finished.model),  # QAT's rounds its weights
        "parameters": finished.model.count_parameters()[0],
        "cpu_seconds": rows[-1]["cpu_seconds"],
    }
    if finished.config.init_from and finished.config.quantize == "off":
        result["by_bits"] = quality_by_bits(task, finished.model, QAT_BITS)
    return result


def train(args: Args, jobs: Sequence[Job]) -> dict[str, dict]:
    """Return the results of jobs by their names; those not yet stored are trained."""

    def summarise(job: Job, out: Path, rows: list[dict]) -> dict:
        return (measure_continued if job.needs else measure_formats)(job, out, rows)

    return train_all(BENCH, jobs, summarise, args.results, args.runs, args.jobs)


# ---- sizes ---------------------------------------------------------------------------------------


def part_sizes(args: Args) -> dict:
    """Store trained models as INT8 and FP8: what is lost, and how small they become."""
    jobs = [trained(preset, 0) for preset in ("v0-tiny", "v1-tiny", "v2-tiny", "v3-tiny")]
    results = train(args, jobs)
    table = {}
    for job in jobs:
        result, preset = results[job.name], job.words[0]
        row = compare_formats(result)
        row["machine"] = machine_words(machine_of(BENCH, [job], args.results))
        table[preset] = row
        for format in ("int8", "fp8"):
            print(
                f"{preset}, {format}: {row['metric']} {row['quality'][format]:.4f} instead of "
                f"{row['quality']['fp32']:.4f}, {row['times_smaller'][format]['fp32']:.2f} times "
                f"smaller than fp32, {row['times_smaller'][format]['bf16']:.2f} than bf16",
                flush=True,
            )
    return table


def compare_formats(result: dict) -> dict:
    """Add to a run's qualities and sizes: what is lost, and how many times smaller it is."""
    quality, sizes = result["quality"], dict(result["bytes"])
    sizes["bf16"] = sizes["fp32"] // 2
    sign = 1 if result["metric"] == "val_bpb" else -1  # recall falls, loss rises
    smaller = {
        name: {other: sizes[other] / sizes[name] for other in ("fp32", "bf16")}
        for name in ("int8", "fp8")
    }
    lost = {name: sign * quality[name] - sign * quality["fp32"] for name in ("int8", "fp8")}
    return {**result, "bytes": sizes, "lost": lost, "times_smaller": smaller}


# ---- quantisation-aware training -----------------------------------------------------------------


def part_qat(args: Args) -> dict:
    """Compare rounding after training with training with rounding, at 4 and 2 bits."""
    base = [trained("v1-tiny", seed) for seed in range(args.seeds)]
    later = []
    for seed in range(args.seeds):
        later += [continued(seed, args.runs, bits) for bits in (None, *QAT_BITS)]
    runs = train(args, [*base, *later])
    table = {
        "steps": CONTINUED_STEPS,
        "seeds": args.seeds,
        "trained": [runs[job.name]["quality"]["fp32"] for job in base],
        "by_bits": [runs[job.name]["by_bits"] for job in base],
    }
    fp32 = [runs[f"continued {seed}"] for seed in range(args.seeds)]
    table["fp32"] = [run["quality"] for run in fp32]
    table["fp32_cpu_seconds"] = [run["cpu_seconds"] for run in fp32]
    for bits in QAT_BITS:
        qat = [runs[f"qat {bits} bits {seed}"] for seed in range(args.seeds)]
        table[f"{bits} bits"] = compare_rounding(
            [run["quality"] for run in fp32],
            [run["by_bits"][str(bits)] for run in fp32],
            [run["quality"] for run in qat],
        ) | {"cpu_seconds": [run["cpu_seconds"] for run in qat]}
        row = table[f"{bits} bits"]
        print(
            f"{bits} bits: fp32 {mean(table['fp32']):.4f}, rounded after training "
            f"{mean(row['after_training']):.4f}, QAT {mean(row['qat']):.4f} bits per byte; "
            f"{row['mean_closed']:.0%} of the gap closed",
            flush=True,
        )
    return table


def compare_rounding(fp32: list[float], after: list[float], qat: list[float]) -> dict:
    """Return which share of the gap QAT closes, seed by seed: all in bits per byte."""
    closed = [(a - q) / (a - f) for f, a, q in zip(fp32, after, qat, strict=True)]
    return {"after_training": after, "qat": qat, "closed": closed, "mean_closed": mean(closed)}


# ---- distillation --------------------------------------------------------------------------------


def part_distill_v3(args: Args) -> dict:
    return compare_students(args, Job("v3 teacher", V3_TEACHER), V3_STUDENT)


def part_distill_v1(args: Args) -> dict:
    return compare_students(args, trained("v2-tiny", 0), V1_STUDENT)


def compare_students(args: Args, teacher: Job, words: tuple[str, ...]) -> dict:
    """Train students `words` alone, taught, and alone for as long as the taught ones took."""
    preset = words[0]
    folder = str(teacher.folder_in(args.runs, BENCH))
    alone, taught = [], []
    for seed in range(args.seeds):
        with_seed = (*words, "--seed", str(seed))
        alone.append(Job(f"{preset} student alone {seed}", with_seed))
        with_teacher = (*with_seed, "--teacher", folder)
        taught.append(Job(f"{preset} student taught {seed}", with_teacher, needs=teacher))
    runs = train(args, [teacher, *alone, *taught])

    def each(jobs: list[Job], figure: str) -> list[float]:
        values = [runs[job.name][figure] for job in jobs]
        return [value["fp32"] if isinstance(value, dict) else value for value in values]

    steps = alone[0].config.steps
    slower = mean(each(taught, "cpu_seconds")) / mean(each(alone, "cpu_seconds"))
    longer = [
        Job(f"{job.name}, equal time", (*job.words, "--steps", str(round(slower * steps))))
        for job in alone
    ]
    runs |= train(args, longer)
    row = {
        "metric": runs[teacher.name]["metric"],
        "parameters": {"teacher": runs[teacher.name]["parameters"]}
        | {"student": runs[alone[0].name]["parameters"]},
        "steps": {"equal": steps, "equal time": longer[0].config.steps},
        "teacher": each([teacher], "quality")[0],
        "alone": each(alone, "quality"),
        "taught": each(taught, "quality"),
        "alone, equal time": each(longer, "quality"),
    }
    means = [f"{name} {mean(row[name]):.4f}" for name in ("alone", "taught", "alone, equal time")]
    print(f"{row['metric']}: teacher {row['teacher']:.4f}, {', '.join(means)}", flush=True)
    return row


# ---- histograms ----------------------------------------------------------------------------------


@torch.no_grad()
def layer_numbers(run_dir: Path) -> dict[str, Tensor]:
    """Return the weights (F, C) of an MLP of a trained language model, and its inputs (N, C)."""
    finished = load_run(str(run_dir), "cpu")
    layer = finished.model.blocks[1].mlp.up
    inputs = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    task = make_task(finished.config, torch.device("cpu"))
    finished.model(task.batch(0)[:1, :-1])
    handle.remove()
    return {"weights": layer.weight.detach(), "activations": inputs[0].flatten(0, -2)}


def draw_histograms(run_dir: Path, path: Path) -> None:
    """Draw the weights and activations of a layer before and after rounding."""
    numbers = layer_numbers(run_dir)
    panels = {
        "weights": {f"{bits} bits, one scale per channel": (bits, -1) for bits in (8, 4, 2)},
        "activations": {
            "8 bits, one scale per row": (8, -1),
            "8 bits, one scale for all rows": (8, None),
        },
    }
    generator = np.random.default_rng(0)
    before, after = {}, {}
    for kind, x in numbers.items():
        chosen = generator.permutation(x.numel())[:HISTOGRAM_NUMBERS]
        before[kind] = x.flatten().numpy()[chosen]
        after[kind] = {}
        for title, (bits, axis) in panels[kind].items():
            integers = round_to_grid(x, grid_scale(x, bits, axis), bits)
            after[kind][title] = integers.flatten().numpy()[chosen]
    plots.save(plots_compress.rounding_histograms(before, after), path)


# ---- all parts -----------------------------------------------------------------------------------


def draw(table: dict, args: Args) -> None:
    """Draw what has been measured."""
    if "speed" in table:
        plots.save(draw_speed(table["speed"]), args.results / "compress_speed.png")
    if "qat" in table:
        plots.save(draw_bits(table["qat"]), args.results / "compress_bits.png")
    if "sizes" in table:
        plots.save(draw_sizes(table["sizes"]), args.results / "compress_sizes.png")
    for part, metric in DISTILLED.items():
        if part in table:
            names = ("alone", "alone, equal time", "taught")
            dots = {"teacher": [table[part]["teacher"]]}
            dots |= {name: table[part][name] for name in names}
            plots.save(plots.dot_plot(dots, {}, metric), args.results / f"compress_{part}.png")
    run_dir = trained("v1-tiny", 0).folder_in(args.runs, BENCH)
    if (run_dir / "loss.png").exists():
        draw_histograms(run_dir, args.results / "compress_histograms.png")


def draw_speed(speed: dict):
    widths = [int(C) for C in speed["linear"]]
    panels = {}
    for rows in next(iter(speed["linear"].values())):
        lines = {}
        for name in ("bf16", "INT8"):
            ratios = [speed["linear"][str(C)][rows]["times_faster"][name] for C in widths]
            lines[name] = (widths, ratios)
        panels[f"{rows} row{'s' if rows != '1' else ''} at a time"] = lines
    kernel, processor = (speed["processor"][name] for name in ("kernel", "processor"))
    title = f"One linear layer, one thread of an {processor}"
    return plots_compress.speed_against_width(panels, {"INT8": f"INT8 ({kernel})"}, title)


def draw_bits(qat: dict):
    all_bits = list(qat["by_bits"][0])
    trained, runs = qat["trained"], qat["by_bits"]

    def above(values: list[float], reference: list[float]) -> float:
        return mean(x - y for x, y in zip(values, reference, strict=True))

    lines = {
        "rounded after training": (
            [int(bits) for bits in all_bits],
            [above([run[bits] for run in runs], trained) for bits in all_bits],
        ),
        f"trained {qat['steps']} more steps with rounding": (
            list(QAT_BITS),
            [above(qat[f"{bits} bits"]["qat"], qat["fp32"]) for bits in QAT_BITS],
        ),
    }
    seeds = f"v1-tiny, mean over seeds: {qat['seeds']}"
    title = f"Few bits need training with rounding ({seeds})"
    return plots_compress.error_against_bits(lines, "bits per byte above fp32", title)


def draw_sizes(sizes: dict):
    points = {}
    for preset, row in sizes.items():
        if row["metric"] == "val_bpb":
            points[preset] = {
                name: (row["bytes"][name] / 2**20, row["quality"][name])
                for name in ("fp32", "int8", "fp8")
            }
    title = "A quarter of the size, nearly the same loss"
    return plots_compress.size_against_quality(points, "bits per byte (validation)", title)


def main() -> None:
    args = parse_args(Args, __doc__)
    torch.set_num_threads(1)
    parts = {
        "speed": part_speed,
        "leak": part_leak,
        "sizes": lambda: part_sizes(args),
        "qat": lambda: part_qat(args),
        "distill-v3": lambda: part_distill_v3(args),
        "distill-v1": lambda: part_distill_v1(args),
    }
    path = args.results / "compress.json"
    draw(measure_parts(path, parts, args.only, describe_processor), args)


if __name__ == "__main__":
    run(main)
