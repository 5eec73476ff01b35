"""The figures that lessons/ARTICLE.md quotes are those of results/*.json."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from nanods.build import build_meta_model, build_model
from nanods.config import PRESETS
from nanods.planner.capacity import capacity_table
from nanods.planner.hardware import find_gpu
from nanods.planner.search import make_job, plan
from nanods.quantize import quantize
from nanods.serving import placement
from nanods.training.quantize import size_of

ROOT = Path(__file__).parents[2]
ARTICLE = (ROOT / "lessons" / "ARTICLE.md").read_text(encoding="utf-8")


def load(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def attention_figures():
    bench = load("attention")
    exponents, found = bench["time"]["exponents"], bench["recall"]["found"]["iid keys"]
    longer, memory = bench["time"]["sparse_65536_over_dense_16384"], bench["memory"]
    times_faster = {name: row["8192"] for name, row in bench["time"]["times_faster"].items()}
    tree = bench["tree"]
    return {
        "V1.1": [
            f"T^{exponents['tile']:.2f} with one selection per tile of queries",
            f"T^{exponents['flat']:.2f} with one per query",
            f"T^{exponents['dense']:.2f} for dense attention",
            f"it has {tree['tree_times_faster']['131072']:.2f} of the speed",
            f"are {tree['exponents']['tree']:.2f} and {tree['exponents']['flat']:.2f}",
            f"{found['8192']:.0%} at 8,192 tokens and {found['131072']:.0%} at 131,072",
        ],
        "V1.2": [
            f"{times_faster['tile']:.1f} times as fast as dense attention with one selection per "
            f"tile, and {times_faster['flat']:.1f} times with one per query"
        ],
        "V1.3": [
            f"take {longer['tile']:.2f} and {longer['flat']:.2f} of the time",
            f"{memory['over_dense']['tile']['16384']:.2f} and "
            f"{memory['over_dense']['flat']['16384']:.2f} of its bytes per token",
            f"{memory['unfused_over_tile_16384_one_head']:.0f} times less",
        ],
    }


def long_text_figures():
    bench = load("long_text")
    difference = bench["differences"]["tile"]

    dense_steps, V1_steps = (
        bench["runs"][name][0]["steps"] for name in ("dense", "tile, equal time")
    )

    def window_bits(window):
        rows = (bench["by_window"][name] for name in ("dense", "tile, equal time"))
        return [f"{row[window]:.3f}" for row in rows]

    short, long = window_bits("1024"), window_bits("4096")

    return {
        "V1.3": [
            f"{V1_steps / dense_steps:.1f} times as many steps",
            f"and {difference['bpb_minus_dense_at_equal_time']['mean']:+.3f} bits per byte",
            f"{dense_steps} steps of dense attention, {bench['seeds']} seeds",
            f"after equal steps it is {difference['bpb_minus_dense_at_equal_steps']['mean']:+.3f}",
            f"of a window of 1,024 tokens, costs {short[0]} (dense) and {short[1]} (V1, equal "
            f"time) bits per byte; of 4,096, {long[0]} and {long[1]}",
        ]
    }


def expert_figures():
    bench = load("experts")
    summary, gaps, domains = bench["summary"], bench["gaps"], bench["domains"]

    def row(text):
        return " / ".join(text(summary[n]) for n in ("none of them", "capacity alone", "all three"))

    byte, kind = (domains[name] for name in ("the byte", "the kind of text"))
    return {
        "V2.3": [
            row(lambda run: f"{run['train_load_max_over_mean']['mean']:.1f}"),
            row(lambda run: f"{run['dropped']['mean']:.1%}"),
            row(lambda run: f"{run['spikes']['mean']:.1f}"),
            row(lambda run: f"{run['val_bpb']['max'] - run['val_bpb']['min']:.3f}"),
        ],
        "V2.5": [
            f"{gaps['upcycled minus from scratch']['mean']:+.3f} bits per byte against a V2",
            f"{gaps['upcycled minus continued V1, equal steps']['mean']:+.3f} against continuing",
            f"{gaps['upcycled minus continued V1, equal time']['mean']:+.3f} for equal time",
        ],
        "V2.7": [
            f"{min(byte):.1%} to {max(byte):.1%} of the first choice of expert",
            f"{min(kind):.1%} to {max(kind):.1%}",
        ],
    }


def arithmetic_figures():
    bench = load("arithmetic")
    v1, wide, v2 = (bench["variants"][name] for name in ("v1", "v1-2f", "v2"))

    def steps(row):
        learnt = [step for step, _ in row["learnt"]]
        return f"{min(learnt)} to {max(learnt)}"

    sums = [f"{row['+']['mean']:.1%}" for row in (v2, wide, v1)]
    return {
        "V2.2": [
            f"{v2['seeds']} seeds, {bench['task']['steps']:,} steps, all with dense attention",
            f"V2 {v2['both']['mean']:.1%} right, V1 {v1['both']['mean']:.1%}",
            f"the same active FLOPs, {wide['both']['mean']:.1%}",
            f"after {steps(v2)} steps (V2), {steps(wide)} (the wide V1) and {steps(v1)} (V1)",
            f"in the end {sums[0]} (V2), {sums[1]} (the wide V1) and {sums[2]} (V1)",
            f"No run has more than {max(row['*']['max'] for row in (v1, wide, v2)):.0%}",
            f"takes {v2['cpu_seconds'] / v1['cpu_seconds']:.1f} times as long",
        ]
    }


def multimodal_figures():
    bench = load("multimodal")
    summary, shared = bench["summary"], bench["shared against separate"]
    names = [name for name in summary["as it is"] if re.fullmatch("recall1_[a-z]+_[a-z]+", name)]
    recalls = [summary["as it is"][name]["mean"] for name in names]
    emergent = summary["emergent"]["recall1_image_audio"]["mean"]
    relation = {
        name: summary[name]["facts"]["relation"]["image"]["mean"] for name in ("random", "as it is")
    }
    points = [-100 * gap for gap in shared["recall1_lower_by"]["each"]]
    return {
        "V3.1": [
            f"is {math.floor(1000 * min(recalls)) / 1000} or more in each of the six directions",
            f"and {emergent:.3f} from image to sound",
            f"for {relation['random']:.0%} of the images",
            f"for {relation['as it is']:.1%}",
        ],
        "V3.2": [
            f"{1 - shared['share_of_parameters']:.0%} fewer parameters",
            f"minus theirs is {-100 * shared['recall1_lower_by']['mean']:+.2f} points "
            f"({', '.join(f'{each:+.2f}' for each in points)})",
        ],
    }


def compression_figures():
    bench = load("compress")
    speed, leak = bench["speed"], bench["leak"]["models"]["v0-tiny"]
    layer, wide = speed["linear"]["1024"], speed["models"]["width 1024"]
    qat = bench["qat"]
    lost_8 = mean(run["8"] - fp32 for run, fp32 in zip(qat["by_bits"], qat["trained"], strict=True))
    closed = {bits: qat[f"{bits} bits"]["mean_closed"] for bits in (4, 2)}
    sizes, v3, v1 = bench["sizes"], bench["distill-v3"], bench["distill-v1"]
    kept = {key: mean(v3[key]) / v3["teacher"] for key in ("alone", "taught", "alone, equal time")}
    by_seed = [100 * (a - b) for a, b in zip(v3["taught"], v3["alone"], strict=True)]
    fp8_lost = [
        f"{sizes[preset]['lost']['fp8']:.4f}" for preset in ("v0-tiny", "v1-tiny", "v2-tiny")
    ]
    recall = sizes["v3-tiny"]["quality"]

    def lost(bits):
        return mean(qat[f"{bits} bits"]["after_training"]) - mean(qat["fp32"])

    def faster(row):
        return f"{row['times_faster']['INT8']:.2f}"

    def smaller(preset):
        model = build_model(PRESETS[preset])
        return f"{size_of(model) / size_of(quantize(model, 'fp8')):.2f}"

    return {
        "V3.5": [
            "is about {:.1f}, {:.1f} and {:.1f} times".format(
                *(layer[rows]["times_faster"]["INT8"] for rows in ("1", "16", "256"))
            ),
            f"is {faster(wide['prefill'])} times as fast in reading 256 tokens and "
            f"{faster(wide['step'])} in decoding",
            f"cost {lost(4):.3f} and {lost(2):.2f} bits per byte, and training with rounding "
            f"closes {closed[4]:.0%} and {closed[2]:.0%} of that gap",
            f"rounding to 8 bits costs {lost_8:.4f}",
            f"by {leak['one scale per tensor']['from_the_future']:.3f}, with one per row by "
            f"{leak['INT8']['from_the_future']:.3f}",
        ],
        "V3.6": [
            f"{faster(speed['pair']['width 1024'])} times as fast as fp32 at width 1024, and "
            f"{faster(speed['pair']['v3-tiny'])} times in `v3-tiny`"
        ],
        "D.3": [
            f"`v2-tiny` becomes {smaller('v2-tiny')} times smaller, `v1-tiny` "
            f"{smaller('v1-tiny')} and `v3-tiny` {smaller('v3-tiny')}",
            "lose " + ", ".join(fp8_lost[:2]) + f" and {fp8_lost[2]} bits per byte",
            f"goes from {recall['fp32']:.4f} to {recall['fp8']:.4f}",
        ],
        "D.5": [
            f"its recall@1 is {mean(v3['alone']):.3f} alone, {kept['alone']:.0%} of the teacher's "
            f"{v3['teacher']:.3f}, and {mean(v3['taught']):.3f} with the teacher (by seed "
            f"{', '.join(f'{x:+.1f}' for x in by_seed)} points), or {kept['taught']:.0%}",
            f"reaches {mean(v3['alone, equal time']):.3f}, or {kept['alone, equal time']:.0%}",
            f"{mean(v1['taught']):.3f} bits per byte, alone {mean(v1['alone']):.3f}, and alone for "
            f"the same time {mean(v1['alone, equal time']):.3f}",
        ],
    }


def adaptation_figures():
    bench = load("adapt")
    mixture, arms, new = bench["mixture"], bench["arms"], bench["new_task"]
    fall = {task: f"{mean(row['mixture_improves_by']):.0%}" for task, row in mixture.items()}
    general = mean(mixture["plain"]["mixture"]) - mean(mixture["plain"]["base"])
    after, directly = bench["directly"].values()
    plain, ewc, replay = (arms[name] for name in ("plain", "EWC", "replay 10%"))
    at_equal_gain = {
        name: mean(arms[name]["forgotten_over_plain_at_equal_gain"]) for name in ("EWC", "L2")
    }
    return {
        "V1.4": [
            f"fall by {fall['doctest']} (doctests), {fall['docstring']} (docstrings), "
            f"{fall['source']} (code) and {fall['dialogue']} (dialogues)",
            f"is documentation: {general:+.3f} bits per byte",
            f"the model loses {mean(plain['forgotten']):.3f}",
        ],
        "D.2": [
            f"{mean(after[new]):.3f} bits per byte after documentation, "
            f"{mean(directly[new]):.3f} if all",
            f"costs {mean(after['plain']):.2f} bits per byte after it and "
            f"{mean(directly['plain']):.2f} without",
        ],
        "D.6": [
            f"loses {mean(plain['forgotten']):.3f} bits per byte on documentation, EWC "
            f"{mean(ewc['forgotten']):.3f}, with {-mean(ewc['gain_minus_plain']):.3f} less gain "
            f"(lambda {bench['lambda']['EWC']:g}, chosen",
            f"that is {at_equal_gain['EWC']:.2f} of what plain",
            f"forgets {at_equal_gain['L2']:.2f} of it",
            f"forgets {mean(replay['forgotten_over_plain']):.2f} of it and gains as much as plain "
            f"({mean(replay['gain_minus_plain']):+.3f})",
        ],
    }


def serving_figures():
    bench, detectors = load("serve"), load("serve_alarms")["detectors"]
    embedder, placed = bench["embedder"], bench["placement"]

    def faster(name, way):
        return f"{embedder[name]['times_faster'][way]:.1f}"

    def each(detector, source, figure):
        return [row[figure] for row in detectors[detector][source].values()]

    singles, padded = "singles", "one padded queue"
    false = "false alarms per 10,000 requests"
    ours = each("block bootstrap", "recorded", false)
    textbook = each("textbook CUSUM", "recorded", false)
    full, mixture = (
        max(each("block bootstrap", "recorded", f"requests until noticed, German, {change}"))
        for change in ("full switch", "20% mixture")
    )
    one, many = (bench["rest"][name] for name in ("1 client", "16 clients"))
    times = {preset: bench["http"][preset]["times_faster"] for preset in ("v1-tiny", "v2-tiny")}
    step = {rows: f"a decoding step of {rows}" for rows in ("1 row", "32 rows")}
    step = {rows: placed[name]["times_faster"]["INT8 experts"] for rows, name in step.items()}
    return {
        "V3.3": [
            f"texts {faster('text', singles)} times as many a second, images "
            f"{faster('image', singles)}, sounds {faster('audio', singles)}, a mixture of the "
            f"three {faster('mixed', singles)}",
            f"{faster('text', padded)} times, images {faster('image', padded)}, sounds "
            f"{faster('audio', padded)}, the mixture {faster('mixed', padded)}",
            f"the mixture {faster('mixed', 'one padded pass')} times",
        ],
        "D.4": [
            f"REST takes {one['p50_difference']:.1f} ms more than gRPC (median of calls that take "
            f"{one['gRPC']['p50']:.0f} ms by gRPC), with 16 clients {many['p50_difference']:.0f} "
            f"ms more (beside {many['gRPC']['p50']:.0f})",
            f"{times['v1-tiny']['tokens_per_cpu_second']:.1f} (`v1-tiny`) and "
            f"{times['v2-tiny']['tokens_per_cpu_second']:.1f} times (`v2-tiny`) as many tokens",
        ],
        "D.7": [
            f"a decoding step of one row takes {1 / step['1 row']:.2f} of the time of fp32, of 32 "
            f"rows {1 / step['32 rows']:.2f}",
        ],
        "D.8": [
            f"raises {min(ours):.2f} to {max(ours):.2f} false alarms in 10,000 requests",
            f"within {full:.0f} requests and of one prompt in five within {mixture:.0f}",
            f"raises {textbook[0]:.0f} on independent requests, and {textbook[1]:.0f} and "
            f"{textbook[2]:.0f} on bursty and daily ones",
        ],
    }


def planner_figures():
    small = PRESETS["v1-small"]
    config = replace(small, model=replace(small.model, vocab_size=16_384))
    a100, v100 = (
        plan(make_job(config, find_gpu(name), 1, 100e9)) for name in ("a100-80gb", "v100-32gb")
    )
    flops = f"{a100.job.flops_per_token * a100.job.tokens:.1e}".replace("e+", "e")
    served = {
        row["preset"]: row["8 x a100-80gb"].split(" / ")[1]
        for row in capacity_table(("8 x a100-80gb",))
    }
    return {
        "V1.5": [
            f"takes {flops} FLOP",
            f"{a100.hours:.0f} hours on an A100 or {v100.hours:.0f} on a V100",
        ],
        "D.1": [
            f"serve {served['v2-small']} and {served['v2-base']} sequences of full context",
            f"`v2-full` serves {served['v2-full']}",
        ],
    }


def placement_figures():
    preset, gpu = PRESETS["v2-base"], find_gpu("rtx4090-24gb")
    speed = {"cuda": gpu.bandwidth, "cpu": 50e9}
    apart, whole = (
        placement.cost(build_meta_model(preset), placement.parse_rules(rules))
        for rules in (placement.EXPERTS_ON_CPU, ["*=cuda:bf16"])
    )
    assert apart.stored["cuda"] < gpu.usable_memory < whole.stored["cuda"]
    on_cpu = whole.read["cuda"] / speed["cpu"]
    return {
        "D.7": [
            f"`v2-base` in bf16 has {whole.stored['cuda'] / 1e9:.1f} GB",
            f"a token takes {1e3 * apart.seconds(speed):.0f} ms, with all of it on the CPU "
            f"{1e3 * on_cpu:.0f} ms",
            f"it would take {1e3 * whole.seconds(speed):.1f} ms (CPU memory at 50 GB/s",
        ]
    }


FIGURES = [attention_figures, long_text_figures, expert_figures]
FIGURES += [arithmetic_figures, multimodal_figures, compression_figures, serving_figures]
FIGURES += [planner_figures, placement_figures, adaptation_figures]


@pytest.mark.parametrize("figures", FIGURES, ids=lambda function: function.__name__)
def test_the_article_page_quotes_the_results(figures):
    for claim, texts in figures().items():
        row = next(line for line in ARTICLE.splitlines() if line.startswith(f"| {claim} |"))
        for text in texts:
            assert text in row
