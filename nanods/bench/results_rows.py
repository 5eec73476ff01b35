"""The rows of docs/RESULTS.md and of the README's table: what is measured, and the figure.

Every figure is computed here from a file in results/ that a command wrote. results_page.py writes
the pages. The rows about compression, adaptation and serving are in results_rows_deployment.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from nanods.bench.runs import machine_words

ROOT = Path(__file__).parents[2]
MACHINE = "2 cores of an AMD Zen 5 (bf16 in hardware), torch 2.13.0, no GPU"
SECOND_MACHINE = "AMD EPYC, fp32"  # for rows whose tables do not name it, or name both


@dataclass(frozen=True)
class Result:
    command: str
    what: str
    figure: str
    source: str
    """The file in results/ that the figure comes from."""
    headline: bool = False
    """Whether the README shows it too."""


def load(name: str) -> dict:
    """Return the table that a bench wrote to results/NAME.json."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def each(values: list[float], digits: int) -> str:
    """Return the values of several seeds as one string: "1.9307, 1.9236"."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def training_results() -> list[Result]:
    ladder, multimodal = load("ladder"), load("multimodal")

    def bits_per_byte(name: str) -> str:
        entry = ladder[name]
        seeds = each([run["val_bpb"] for run in entry["runs"]], 4)
        return f"{entry['mean_val_bpb']:.3f} bits per byte ({seeds})"

    machine = machine_words(ladder["machine"])
    shakespeare = ladder["v0-tiny/shakespeare"]["runs"][0]
    recalls = [run["val_recall1"] for run in multimodal["runs"]["as it is"]]
    recall = sum(recalls) / len(recalls)
    return [
        Result(
            "make train-v0",
            f"dense attention on pydocs, 3 seeds ({machine})",
            bits_per_byte("v0-tiny/pydocs"),
            "ladder",
            headline=True,
        ),
        Result(
            "make train-v1",
            f"the same with sparse attention, 3 seeds ({machine})",
            bits_per_byte("v1-tiny/pydocs"),
            "ladder",
            headline=True,
        ),
        Result(
            "make train-v2",
            f"V1 with 16 experts per layer, top-2, 3 seeds ({machine})",
            bits_per_byte("v2-tiny/pydocs"),
            "ladder",
            headline=True,
        ),
        Result(
            "make train-v3",
            "text, image and audio: recall@1 among 512 held-out scenes, mean of six directions, "
            f"3 seeds (chance 0.002; {machine_words(multimodal['machine'])})",
            f"{recall:.4f} ({each(recalls, 4)})",
            "multimodal",
            headline=True,
        ),
        Result(
            'make train-v0 ARGS="--data shakespeare"',
            "validation loss on tinyshakespeare, 1 seed (nanoGPT on an A100: 1.4697, with 10.7M "
            f"parameters; {machine})",
            f"{shakespeare['val_loss']:.4f} nats per character",
            "ladder",
            headline=True,
        ),
    ]


def speed_results() -> list[Result]:
    time_to_loss, generation = load("time_to_loss"), load("generation")
    grown = load("from_bigram")
    steps = {
        name: sum(model["val_bpb"]) / len(model["val_bpb"])
        for name, model in grown["models"].items()
    }
    curves = {name: run["step_cpu_seconds_val_loss"] for name, run in time_to_loss["runs"].items()}
    _, short_seconds, short_loss = curves["700 steps"][-1]
    _, long_seconds, long_loss = curves["3600 steps"][-1]
    return [
        Result(
            "make bench",
            "nanoGPT's laptop size on tinyshakespeare (its own recipe: 1.88 after 2,000 steps): "
            f"validation loss after CPU-seconds ({machine_words(time_to_loss['machine'])})",
            f"{short_loss:.3f} after {short_seconds:.0f} s, "
            f"{long_loss:.3f} after {long_seconds:.0f} s",
            "time_to_loss",
        ),
        Result(
            "make bench",
            "generating a token at 1,024 of context with the cache, against recomputing "
            f"({machine_words(generation['machine'])})",
            f"{generation['v0-tiny']['ratio']:.0f} times as fast (V0), "
            f"{generation['v1-tiny']['ratio']:.0f} (V1)",
            "generation",
        ),
        Result(
            "make bench",
            f"a GPT grown from a bigram table: bits per byte after {grown['steps']} steps each "
            f"({machine_words(grown['machine'])}), mean of 2 seeds",
            ", ".join(f"{name} {loss:.3f}" for name, loss in steps.items()),
            "from_bigram",
        ),
        ablations_result(),
    ]


def ablations_result() -> Result:
    table = load("ablations")
    return Result(
        "make bench-ablations",
        f"that GPT with one idea left out or added, {table['steps']} steps, {table['seeds']} seeds "
        f"({machine_words(table['machine'])}): bits per byte worse, by idea",
        "; ".join(
            f"{idea}: {each(lost, 3)}" for idea, lost in (table["lost"] | table["added"]).items()
        ),
        "ablations",
    )


def attention_results() -> list[Result]:
    attention, recall, long_text = load("attention"), load("recall"), load("long_text")
    faster = attention["time"]["times_faster"]
    longer = attention["time"]["sparse_65536_over_dense_16384"]
    found = {name: 100 * entry["mean"] for name, entry in recall["summary"].items()}
    gain, by_window = long_text["differences"]["tile"], long_text["by_window"]
    windows = ", ".join(f"{int(window):,}" for window in by_window["dense"])
    dense_steps, V1_steps = (
        long_text["runs"][name][0]["steps"] for name in ("dense", "tile, equal time")
    )
    return [
        Result(
            "make bench-v1",
            "forward and backward at 8,192 tokens against fused dense attention, selection "
            "included, one thread",
            f"{faster['tile']['8192']:.1f} times as fast (selection per tile), "
            f"{faster['flat']['8192']:.1f} (per query)",
            "attention",
            headline=True,
        ),
        Result(
            "make bench-v1",
            "the same at 65,536 tokens, over dense attention's time at 16,384",
            f"{longer['tile']:.2f} (per tile), {longer['flat']:.2f} (per query)",
            "attention",
        ),
        Result(
            "make bench-v1",
            "one decoding step at 65,536 tokens of context",
            f"attention {attention['decode']['attention_times_faster']:.1f} times as fast, "
            f"a model of 4 layers {attention['decode']['model_times_faster']:.1f}",
            "attention",
        ),
        Result(
            "make bench-recall",
            "recall of 16 pairs over 256 tokens, reading 64 keys, 3 seeds",
            ", ".join(f"{name} {found[name]:.1f}%" for name in found),
            "recall",
        ),
        Result(
            "make bench-long-text",
            f"pydocs at 4,096 tokens, 2 layers, {long_text['seeds']} seeds "
            f"({machine_words(long_text['machine'])}): V1 minus dense, bits per byte, after "
            f"{dense_steps} steps each; after equal time ({V1_steps:,} steps of V1)",
            "; ".join(
                each(gain[f"bpb_minus_dense_at_equal_{what}"]["each"], 3)
                for what in ("steps", "time")
            ),
            "long_text",
        ),
        Result(
            "make bench-long-text",
            f"the same held-out text last in windows of {windows} tokens: bits per byte, mean of "
            "the seeds, dense; V1, equal time",
            "; ".join(each(by_window[name].values(), 3) for name in ("dense", "tile, equal time")),
            "long_text",
        ),
    ]


def expert_results() -> list[Result]:
    moe, experts, arithmetic = load("moe"), load("experts"), load("arithmetic")
    balance = load("balance")
    gaps, summary = experts["gaps"], experts["summary"]

    def gap(name: str) -> str:
        return f"{gaps[name]['mean']:+.3f} ({each(gaps[name]['each'], 3)})"

    def load_of(name: str) -> str:
        row = summary[name]
        largest = row["val_load_max_over_mean"]["mean"]
        return f"{largest:.2f} and {row['val_load_entropy']['mean']:.3f}"

    def balanced(cure: str) -> str:
        row = balance["best"][cure]
        busiest = [run["val_load_max_over_mean"] for run in row["runs"]]
        words = f"{each(busiest, 2)} and {each(row['above_loss'], 3)}"
        return f"{cure} at {row['strength']:g}: {words}"

    def steps_to_learn(variant: str) -> str:
        learnt = arithmetic["variants"][variant]["learnt"]
        return ", ".join(f"{at[0]:,}" if at else "not reached" for at in learnt)

    right = {name: 100 * row["both"]["mean"] for name, row in arithmetic["variants"].items()}
    return [
        Result(
            "make bench-experts",
            "bits per byte: V2 minus V1 with MLPs of twice the width (equal tokens and active "
            f"FLOPs), 3 seeds ({machine_words(experts['machine'])})",
            gap("V2 minus V1 with 2F, equal tokens and active FLOPs"),
            "experts",
            headline=True,
        ),
        Result(
            "make bench-experts",
            "bits per byte: V2 minus a V1 that makes as many steps as fit into V2's time, "
            f"{len(gaps['V2 minus V1, equal time']['each'])} seeds",
            gap("V2 minus V1, equal time"),
            "experts",
        ),
        Result(
            "make bench-experts",
            "load of the busiest expert over the mean, and entropy of the load over ln E: with "
            "the balancing loss; without (1 seed)",
            f"{load_of('loss')}; {load_of('none')}",
            "experts",
        ),
        Result(
            "make bench-balance",
            "v2-tiny with 2 layers, 300 steps, each cure at its best strength "
            f"({machine_words(balance['machine'])}): load of the busiest expert over the mean, and "
            "bits per byte above the balancing loss, by seed",
            "; ".join(balanced(cure) for cure in ("loss", "bias", "bias, sigmoid")),
            "balance",
        ),
        Result(
            "make bench-experts",
            "bits per byte after 400 steps, V2 that starts from V1: minus from scratch; minus V1 "
            "continued for equal steps; for equal time (3 seeds each)",
            "; ".join(
                gap(f"upcycled minus {name}")
                for name in (
                    "from scratch",
                    "continued V1, equal steps",
                    "continued V1, equal time",
                )
            ),
            "experts",
        ),
        Result(
            "make bench-v2",
            "time of the MoE layer, forward and backward at 8,192 tokens, over one MLP of equal "
            "active FLOPs; the same where one expert gets half of the tokens",
            f"{moe['time']['over_dense']:.2f}; "
            f"{moe['skew']['half of the tokens']['over_dense']:.2f}",
            "moe",
        ),
        Result(
            "make bench-v2",
            "that MLP computed in chunks that fit the cache is faster: the MoE layer over it",
            f"{moe['time']['over_dense_in_chunks']:.2f}",
            "moe",
        ),
        Result(
            "make bench-v2",
            "sorted dispatch against one-hot masks; against masks by groups of 1,024 tokens",
            f"{moe['time']['times_faster_than_one_hot']:.1f} and "
            f"{moe['time']['times_faster_than_one_hot_in_groups']:.1f} times as fast",
            "moe",
        ),
        Result(
            "make bench-arithmetic",
            f"sums and products with held-out operands, {arithmetic['variants']['v2']['seeds']} "
            f"seeds, {arithmetic['task']['steps']:,} steps, dense attention "
            f"({machine_words(arithmetic['machine'])}): V2; V1 with MLPs of twice the width; V1",
            f"{right['v2']:.1f}%, {right['v1-2f']:.1f}%, {right['v1']:.1f}% right",
            "arithmetic",
        ),
        Result(
            "make bench-arithmetic",
            "the same runs: steps until 95% of the sums are right (tested every 100), by seed: V2; "
            "V1 with MLPs of twice the width; V1",
            "; ".join(steps_to_learn(name) for name in ("v2", "v1-2f", "v1")),
            "arithmetic",
        ),
    ]


def multimodal_results() -> list[Result]:
    table = load("multimodal")
    summary, shared = table["summary"], table["shared against separate"]
    machine = machine_words(table["machine"])

    def directions(name: str, *pairs: str) -> str:
        return ", ".join(f"{summary[name][f'recall1_{pair}']['mean']:.3f}" for pair in pairs)

    def facts(name: str) -> str:
        row = summary[name]["facts"]
        return ", ".join(
            f"{row[fact]['image']['mean']:.3f}" for fact in ("shape", "colour", "size", "relation")
        )

    lower = shared["recall1_lower_by"]
    return [
        Result(
            "make bench-v3",
            "recall@1: text to image and back, text to sound and back, image to sound and back "
            f"({machine}, as all figures of this bench)",
            directions(
                "as it is",
                "text_image",
                "image_text",
                "text_audio",
                "audio_text",
                "image_audio",
                "audio_image",
            ),
            "multimodal",
        ),
        Result(
            "make bench-v3",
            "recall@1, image to sound and back, where training never compared the two",
            directions("emergent", "image_audio", "audio_image"),
            "multimodal",
        ),
        Result(
            "make bench-v3",
            "one trunk for all modalities against one trunk each: share of the parameters, and "
            "recall@1 minus theirs (points, 3 seeds)",
            f"{100 * shared['share_of_parameters']:.1f}%, {-100 * lower['mean']:.2f} "
            f"({each([-100 * x for x in lower['each']], 2)})",
            "multimodal",
        ),
        emoji_result(),
        labels_result(),
        Result(
            "make bench-v3",
            "zero-shot, an image against captions that differ in shape, colour, size, relation",
            facts("as it is"),
            "multimodal",
        ),
        Result(
            "make bench-v3",
            "the same where batches are drawn at random, without hard negatives "
            f"({len(table['runs']['random'])} seeds)",
            facts("random"),
            "multimodal",
        ),
    ]


def emoji_result() -> Result:
    table = load("emoji")
    known, unseen = table["gallery"]["known"], table["gallery"]["unseen"]
    figures = {name: f"{value:.2f}" for name, value in table["summary"].items()}
    return Result(
        "make train-v3 DATA=emoji",
        "real drawings, their names, and the names spoken by held-out voices "
        f"({SECOND_MACHINE}), "
        f"{len(table['runs'])} seeds: recall@1 among {known} names, text to image, audio to text, "
        f"image to audio; recall@5 among {unseen} unseen names of known words, text to audio, text "
        f"to image (chance {table['chance']['known']:.3f} and {table['chance']['unseen']:.3f})",
        f"{figures['known_text_image']}, {figures['known_audio_text']}, "
        f"{figures['known_image_audio']}; {figures['unseen_text_audio']}, "
        f"{figures['unseen_text_image']}",
        "emoji",
        headline=True,
    )


def labels_result() -> Result:
    table = load("labels")
    summary, held_out = table["summary"], table["data"]["held_out"]
    machine = machine_words(table["machine"])
    v3_seconds = sum(run["cpu_seconds"] for run in table["runs"]) / len(table["runs"])
    pixels = table["logistic regression on pixels"]
    probe = summary["logistic regression on V3's embeddings"]
    zero_shot = each([run["accuracy"] for run in table["runs"]], 3)
    return Result(
        "make bench-labels",
        f"ten classes of drawn shapes under noise, {held_out} held-out images ({machine}): "
        "accuracy of V3, zero-shot, 3 seeds; of scikit-learn's logistic regression on V3's "
        "embeddings; on pixels; CPU-seconds of V3 and of the last",
        f"{summary['V3, zero-shot']:.3f} ({zero_shot}); {probe:.3f}; {pixels['accuracy']:.3f}; "
        f"{v3_seconds:.0f} s, {pixels['fit_cpu_seconds']:.0f} s",
        "labels",
    )


def scaling_results() -> list[Result]:
    table = load("scale")
    times, machine = table["times"], machine_words(table["machine"])
    return [
        Result(
            "make bench-scale",
            f"v2-tiny on two processes of one thread against one ({machine}): dp=2, ep=2, fsdp=2",
            f"{times['dp=2']:.2f}, {times['ep=2']:.2f}, {times['fsdp=2']:.2f} times the tokens "
            "per second",
            "scale",
        )
    ]
