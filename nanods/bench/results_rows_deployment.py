"""The rows of docs/RESULTS.md about deployment: compression, learning without forgetting, serving.

As in results_rows.py, every figure is computed here from a file in results/.
"""

from nanods.bench.results_rows import Result, each, load
from nanods.bench.runs import machine_words


def machines_of(table: dict) -> dict[str, str]:
    """Return the machine of each part of a table, in words."""
    return {part: machine_words(machine) for part, machine in table["machines"].items()}


def compression_results() -> list[Result]:
    table = load("compress")
    machines = machines_of(table)
    speed, leak = table["speed"], table["leak"]
    layer = speed["linear"]["1024"]
    processor = speed["processor"]
    instructions = " and ".join(processor["int8_instructions"])
    where = (
        f"one thread of an {processor['processor']} with {processor['instructions']}, "
        f"{f'with {instructions}' if instructions else 'without INT8 instructions'} "
        f"({processor['kernel']}, weights of {processor['weight_bits']} bits)"
    )

    def faster(row: dict, name: str = "INT8") -> str:
        return f"{row['times_faster'][name]:.2f}"

    wide = speed["models"]["width 1024"]
    with_one_scale = leak["models"]["v0-tiny"]["one scale per tensor"]
    results = [
        Result(
            "make bench-compress",
            f"linear layer 1024 to 4096, 1, 16 and 256 rows, against fp32, on {where}",
            f"INT8 {', '.join(faster(row) for row in layer.values())} times as fast; bf16 "
            f"{', '.join(faster(row, 'bf16') for row in layer.values())}",
            "compress",
        ),
        Result(
            "make bench-compress",
            f"GPT of width 1024, 4 layers, INT8 against fp32 ({machines['speed']}): reading 256 "
            "tokens, one decoding step",
            f"{faster(wide['prefill'])}, {faster(wide['step'])} times as fast",
            "compress",
        ),
        Result(
            "make bench-compress",
            f"16 INT8 experts of width 1024 on 2,048 tokens ({machines['speed']}); an image-text "
            "pair through a V3 of width 1024; through v3-tiny as it was until 2026-11-28",
            f"{faster(speed['experts'])}; {faster(speed['pair']['width 1024'])}; "
            f"{faster(speed['pair']['v3-tiny'])} times as fast as fp32",
            "compress",
        ),
        Result(
            "make bench-compress",
            "mean change of v0-tiny's logits (random weights) when the future of the text changes "
            f"({machines['leak']}): one activation scale per row; one per tensor (its rounding "
            "error)",
            f"{leak['models']['v0-tiny']['INT8']['from_the_future']:.3f}; "
            f"{with_one_scale['from_the_future']:.3f} ({with_one_scale['from_quantising']:.3f})",
            "compress",
        ),
    ]
    if "sizes" in table:
        for preset, row in table["sizes"].items():
            smaller, lost = row["times_smaller"], row["lost"]
            unit = "bits per byte" if row["metric"] == "val_bpb" else "recall@1"
            results.append(
                Result(
                    "make bench-compress",
                    f"{preset} stored as INT8; as FP8 ({row['machine']}): {unit} lost, and "
                    "times smaller than fp32",
                    f"{lost['int8']:.4f}, {smaller['int8']['fp32']:.2f}; "
                    f"{lost['fp8']:.4f}, {smaller['fp8']['fp32']:.2f}",
                    "compress",
                )
            )
    if "qat" in table:
        for bits in ("4 bits", "2 bits"):
            row = table["qat"][bits]
            results.append(
                Result(
                    "make bench-compress",
                    f"v1-tiny with weights of {bits}: share of the loss gap that training with "
                    f"rounding closes, {table['qat']['steps']} more steps ({machines['qat']})",
                    f"{row['mean_closed']:.0%} ({each([100 * x for x in row['closed']], 0)})",
                    "compress",
                )
            )
    taught = {
        "distill-v3": "a dense V3 taught by one with 16 experts: recall@1",
        "distill-v1": "V1 taught by V2: bits per byte",
    }
    for part, name in taught.items():
        if part not in table:
            continue
        row = table[part]
        figures = "; ".join(each(row[key], 4) for key in ("taught", "alone", "alone, equal time"))
        results.append(
            Result(
                "make bench-compress",
                f"{name} (the teacher's {row['teacher']:.4f}), {row['steps']['equal']} steps "
                f"({machines[part]}): with the teacher; without, equal steps; without, equal time",
                figures,
                "compress",
            )
        )
    return results


def adaptation_results() -> list[Result]:
    table, command = load("adapt"), "make bench-adapt"
    new, steps = table["new_task"], table["steps"]
    setting = (
        f"{table['preset']}, {steps['base']} + {steps['fine-tuning']} steps, {table['seeds']} "
        f"seeds, one thread of an {table['machine']['cpu']}"
    )
    names = ("base", "mixture", "mixture from random weights")
    results = [
        Result(
            command,
            f"{task}, bits per byte of held-out modules ({setting}): base; fine-tuned on all tasks "
            "at once; all tasks from random weights, equal tokens",
            "; ".join(each(row[name], 3) for name in names),
            "adapt",
        )
        for task, row in table["mixture"].items()
    ]
    directly = "; ".join(each(row[new], 3) for row in table["directly"].values())
    results.append(
        Result(
            command,
            f"{new} alone, bits per byte: after the base; from random weights, equal tokens",
            directly,
            "adapt",
        )
    )
    for arm, row in table["arms"].items():
        what = (
            f"{new} learnt by {arm}: bits per byte gained; forgotten of documentation; of what "
            "plain fine-tuning forgets"
        )
        shares = each(row["forgotten_over_plain"], 2)
        figure = f"{each(row['gain'], 3)}; {each(row['forgotten'], 3)}; {shares}"
        results.append(Result(command, what, figure, "adapt"))
    return results


def serving_results() -> list[Result]:
    return [
        Result("make bench-serve", what, figures, file)
        for file, rows in {"serve": served_rows(), "serve_alarms": alarm_rows()}.items()
        for what, figures in rows
    ]


def served_rows() -> list[tuple[str, str]]:
    """Return what was measured of a server, and the figures."""
    table, rows = load("serve"), []
    machines = machines_of(table)
    for preset, row in table["engine"].items():
        ways = (*row["times_faster"], "continuous batching")
        rows.append(
            (
                f"{preset} generates for 32 clients (one thread; {machines['engine']}), tokens per "
                f"second: {'; '.join(ways)}",
                "; ".join(f"{row[way]['tokens_per_second']:.0f}" for way in ways),
            )
        )
    for preset, row in table["http"].items():
        one, many = row["one at a time"], row["32 clients"]
        waits = [many[key][p] for key in ("first_ms", "gap_ms") for p in ("p50", "p99")]
        rows.append(
            (
                f"{preset} by HTTP ({machines['http']}), tokens per CPU second of the server: one "
                "client; 32 clients. Milliseconds until the first token with 32 clients: p50, p99; "
                "between tokens: p50, p99",
                f"{one['tokens_per_cpu_second']:.0f}; {many['tokens_per_cpu_second']:.0f}. "
                "{:.0f}, {:.0f}; {:.0f}, {:.0f}".format(*waits),
            )
        )
    for clients, row in table["rest"].items():
        rows.append(
            (
                f"{clients}, v1-tiny, one token ({machines['rest']}): median milliseconds by gRPC; "
                "by REST",
                f"{row['gRPC']['p50']:.1f}; {row['REST']['p50']:.1f}",
            )
        )
    for preset in ("v1-tiny", "v2-tiny"):
        speeds = [table["litserve"][preset][name] for name in ("nanods", "LitServe")]
        rows.append(
            (
                f"{preset} for 32 clients by HTTP ({machines['litserve']}), answers sent as a "
                f"whole, tokens per CPU second: nanods; LitServe {table['litserve']['litserve']}",
                "; ".join(f"{row['tokens_per_cpu_second']:.0f}" for row in speeds),
            )
        )
    for name, row in table["embedder"].items():
        rows.append(
            (
                f"v3-tiny embeds {name} ({machines['embedder']}), items per second: one at a time; "
                "one queue for each modality and length; one queue padded to the longest text; one "
                "queue whose batches are one pass, padded to the longest input",
                "; ".join(f"{rate:.0f}" for rate in row["items_per_second"].values()),
            )
        )
    placed = {name: row for name, row in table["placement"].items() if "step" in name}
    rows.append(
        (
            f"INT8 experts beside an fp32 trunk of width 512 ({machines['placement']}), times as "
            f"fast as all in fp32: {'; '.join(placed)}",
            "; ".join(f"{row['times_faster']['INT8 experts']:.2f}" for row in placed.values()),
        )
    )
    return rows


def alarm_rows() -> list[tuple[str, str]]:
    """Return what was measured of the alarm on traffic, and the figures."""
    rows, false = [], "false alarms per 10,000 requests"
    detectors = load("serve_alarms")["detectors"]
    for name, sources in detectors.items():
        for source, kinds in sources.items():
            rows.append(
                (
                    f"{name}: false alarms in 10,000 requests, {source} scores: {'; '.join(kinds)}",
                    "; ".join(f"{row[false]:.2f}" for row in kinds.values()),
                )
            )
    ours = detectors["block bootstrap"]["recorded"]
    for change in ("full switch", "20% mixture"):
        rows.append(
            (
                f"block bootstrap: requests until it notices prompts in German, {change}, recorded "
                f"scores: {'; '.join(ours)}",
                "; ".join(
                    f"{row[f'requests until noticed, German, {change}']:.0f}"
                    for row in ours.values()
                ),
            )
        )
    return rows
