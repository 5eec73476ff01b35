"""What experts win and lose in training: results/experts.json and .png.

    python -m nanods.bench.experts             about 3 hours on 2 cores, two runs at a time; `make bench-experts`
    python -m nanods.bench.experts --seeds 1   a third of that

pydocs at the tiny preset, each run a train.py of its own on one thread. A finished run is taken as it is; delete its folder
to repeat it. The runs of v1-tiny and v2-tiny as they are stand in runs/ladder (`make results`).

    balance     v2-tiny with the balancing loss and with none; STEPS steps with the bias alone
    quality     V2 against V1 with hidden 2F (equal active FLOPs) and V1 as it is, at equal tokens; V1 at equal time
    upcycling   STEPS more steps from a trained V1: as V2, as V1, as V1 for as long as V2 took; and V2 from scratch
    stability   the article's three means together (capacity 1.25, balancing loss, warm start), a capacity without them, none
    domains     what the experts of a trained V2 go by: how much of the choice the byte, and the kind of text, explain

Time is CPU time of training on one thread, evaluations left out.
"""

import ast
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import tyro

from nanods import plots
from nanods.bench.runs import describe_machine, flags_from_dict, run_training, write_json
from nanods.config import PRESETS
from nanods.data.text import load_text
from nanods.training import checkpoint
from nanods.training.inspection import chosen_experts

STEPS = 400  # of the shorter runs: upcycling and stability
OFF = {"moe.balance-coefficient": 0, "moe.z-coefficient": 0}
FULL = PRESETS["v2-tiny"].steps
FEWER = {"none": 1, "bias": 1}  # seeds at most, of long runs; V1 at equal time has one
WINDOW = 50  # steps before, from which a spike stands out
EVERY = 50  # steps averaged into one column of the load's history


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Seeds of each variant, but for the few of FEWER."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    results: Path = Path("results")
    """Where the table and the picture go."""
    runs: Path = Path("runs/experts")
    """Where the runs go."""


def variants(seed: int) -> dict[str, tuple[str, dict]]:
    """What is trained, by name: preset and flags."""
    slow = {
        "lr": 0.005,
        "expert-lr": 0.005,
    }  # V1 had it when three quarters of its schedule were over
    warm = {"init-from": f"runs/ladder/v1-tiny-pydocs-{seed}", "steps": STEPS, **slow}
    limit = {"moe.capacity-factor": 1.25}
    return {
        "none": ("v2-tiny", OFF),
        "wide": ("v1-tiny", {"hidden-ratio": 8, "steps": FULL}),
        "v1": ("v1-tiny", {"steps": FULL}),
        "upcycled": ("v2-tiny", warm),
        "continued": ("v1-tiny", warm),
        "scratch": ("v2-tiny", {"steps": STEPS}),
        "all three": ("v2-tiny", warm | limit),
        "capacity alone": ("v2-tiny", OFF | limit | {"steps": STEPS}),
        "none of them": ("v2-tiny", OFF | {"steps": STEPS}),
        "bias": ("v2-tiny", OFF | {"moe.bias-rate": 0.001, "steps": STEPS}),
    }


def run(args: Args, name: str, preset: str, flags: dict, seed: int) -> dict:
    """One run in a process of its own -> its command and its figures."""
    out = args.runs / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    if "data" in flags:  # a preset as it is
        out = Path("runs/ladder") / f"{preset}-pydocs-{seed}"
    command, rows = run_training(
        out, [preset, *flags_from_dict(flags | {"seed": seed, "out-dir": out})]
    )
    print(
        f"{out.name}: {rows[-1]['cpu_seconds']:.0f} s, {rows[-1]['val_bpb']:.4f} bits per byte",
        flush=True,
    )
    return {"seed": seed, "command": command} | figures(rows)


def figures(rows: list[dict]) -> dict:
    """What a run's metrics say of it, the load's history among it."""
    last, steps = rows[-1], [row for row in rows if row["step"]]
    told = {name: last[name] for name in ("step", "val_loss", "val_bpb", "cpu_seconds")}
    if "optimizer_seconds" in last:  # not in runs older than V2
        told["optimizer_share_of_time"] = median(row["optimizer_seconds"] for row in steps) / (
            last["seconds"] / len(steps)
        )
    told["spikes"] = spikes([row.get("ce_loss", row["train_loss"]) for row in steps])
    if rows[0]["step"] == 0:
        told["val_loss_at_step_0"] = rows[0]["val_loss"]
    if "load" in last:
        load = np.array(last["val_load"])
        told |= {
            name: last[name] for name in ("val_load_max_over_mean", "val_load_entropy", "val_load")
        }
        told["val_load_least_over_mean"] = float((load / load.mean(axis=1, keepdims=True)).min())
        told["train_load_max_over_mean"] = mean(row["load_max_over_mean"] for row in steps)
        told["dropped"] = mean(row["dropped"] for row in steps)
        history = np.array([row["load"] for row in steps])  # (S, L, E)
        parts = [part.mean(axis=0) for part in np.split(history, range(EVERY, len(history), EVERY))]
        told["load_history"] = [
            (part / part.mean(axis=1, keepdims=True)).round(3).tolist() for part in parts
        ]
    return told


def spikes(losses: list[float]) -> int:
    """Steps whose loss stands more than 3 standard deviations above the mean of the WINDOW steps before."""
    before = np.lib.stride_tricks.sliding_window_view(np.array(losses), WINDOW)[:-1]
    return int((np.array(losses[WINDOW:]) > before.mean(axis=1) + 3 * before.std(axis=1)).sum())


def equal_steps(per_step: list[dict], seconds: list[dict]) -> int:
    """Steps that fit into the mean time of `seconds`, at the pace of `per_step`."""
    return round(
        mean(r["cpu_seconds"] for r in seconds)
        / mean(r["cpu_seconds"] / r["step"] for r in per_step)
    )


# ---- what the experts go by --------------------------------------------------------------------------------------------------


def kinds_of_text(size: int = 16_384) -> dict[str, bytes]:
    """Three domains that the interpreter brings along: the language reference, docstrings, and source code."""
    text = load_text("pydocs")
    reference, docstrings = (
        bytes(text.train[:size].astype("uint8")),
        bytes(text.val[:size].astype("uint8")),
    )
    return {
        "reference": reference,
        "docstrings": docstrings,
        "source": inspect.getsource(ast).encode()[:size],
    }


def explained(experts: np.ndarray, by: np.ndarray) -> float:
    """Share of the uncertainty about the expert that knowing `by` takes away: I(expert; by) / H(expert), both (N,).

    Less what a shuffled `by`, which knows nothing, would seem to explain: in a finite sample that is not 0.
    """

    def information(by: np.ndarray) -> float:
        joint = np.zeros((experts.max() + 1, by.max() + 1))
        np.add.at(joint, (experts, by), 1 / len(by))
        rows, columns = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
        there = joint > 0
        return float((joint[there] * np.log(joint[there] / (rows * columns)[there])).sum())

    shares = np.bincount(experts) / len(experts)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    return (information(by) - information(np.random.default_rng(0).permutation(by))) / entropy


def domains(run: Path) -> dict:
    """By layer: how much of a token's first expert its byte explains, the byte before it, and the kind of text."""
    model = checkpoint.load_model(checkpoint.load(run))
    bytes_, before, kind, chosen = [], [], [], []
    for number, text in enumerate(kinds_of_text().values()):
        for window in torch.tensor(list(text)).split(model.config.context_length):
            bytes_ += window[1:].tolist()
            before += window[:-1].tolist()
            kind += [number] * (len(window) - 1)
            chosen.append(chosen_experts(model, window)[:, 1:, 0])  # (L, T - 1)
    chosen = np.concatenate(chosen, axis=1)
    by = {"the byte": bytes_, "the byte before": before, "the kind of text": kind}
    return {
        name: [explained(layer, np.array(values)) for layer in chosen]
        for name, values in by.items()
    }


# ---- the table ---------------------------------------------------------------------------------------------------------------


def summary(runs: list[dict]) -> dict:
    names = [
        name
        for name, value in runs[0].items()
        if isinstance(value, int | float) and name not in ("seed", "step")
    ]
    values = {name: [run[name] for run in runs] for name in names}
    return {name: {"mean": mean(v), "least": min(v), "most": max(v)} for name, v in values.items()}


def gap(runs: dict[str, list[dict]], a: str, b: str) -> dict:
    """Bits per byte of a minus b, seed by seed."""
    each = [x["val_bpb"] - y["val_bpb"] for x, y in zip(runs[a], runs[b], strict=False)]
    return {"mean": mean(each), "each": each}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    sha256 = load_text("pydocs").sha256  # prepared before the first run
    ladder = {"v1 as it is": "v1-tiny", "loss": "v2-tiny"}
    jobs = [
        (name, preset, {"data": "pydocs"}, seed)
        for name, preset in ladder.items()
        for seed in range(args.seeds)
    ]
    for name in variants(0):
        jobs += [
            (name, *variants(seed)[name], seed)
            for seed in range(min(args.seeds, FEWER.get(name, args.seeds)))
        ]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda job: run(args, *job), jobs))
        runs = {
            name: [row for job, row in zip(jobs, rows, strict=True) if job[0] == name]
            for name, *_ in jobs
        }
        timed = [("v1, equal time", "v1-tiny", {"steps": equal_steps(runs["v1"], runs["loss"])}, 0)]
        more = equal_steps(runs["continued"], runs["upcycled"])
        for seed in range(args.seeds):
            preset, flags = variants(seed)["continued"]
            timed.append(("continued, equal time", preset, flags | {"steps": more}, seed))
        for job, row in zip(timed, pool.map(lambda job: run(args, *job), timed), strict=True):
            runs.setdefault(job[0], []).append(row)
    gaps = {
        "balanced minus unbalanced": gap(runs, "loss", "none"),
        "balanced minus unbalanced, short": gap(runs, "scratch", "none of them"),
        "V2 minus V1, equal tokens": gap(runs, "loss", "v1"),
        "V2 minus V1 as it is, which sees more tokens": gap(runs, "loss", "v1 as it is"),
        "V2 minus V1 with 2F, equal tokens and active FLOPs": gap(runs, "loss", "wide"),
        "V2 minus V1, equal time": gap(runs, "loss", "v1, equal time"),
        "upcycled minus from scratch": gap(runs, "upcycled", "scratch"),
        "upcycled minus continued V1, equal steps": gap(runs, "upcycled", "continued"),
        "upcycled minus continued V1, equal time": gap(runs, "upcycled", "continued, equal time"),
    }
    table = {
        "machine": describe_machine(),
        "data": {"name": "pydocs", "sha256": sha256},
        "steps": {"full": FULL, "short": STEPS},
    }
    table |= {"gaps": gaps, "summary": {name: summary(of) for name, of in runs.items()}}
    table |= {"domains": domains(Path("runs/ladder/v2-tiny-pydocs-0")), "runs": runs}
    for name, of in runs.items():
        for row in of if name not in ("loss", "none") else of[1:]:
            row.pop("load_history", None)  # two runs are enough for a picture
    write_json(args.results / "experts.json", table)
    shown = {name: [row["val_bpb"] for row in of] for name, of in runs.items()}
    plots.save(
        plots.dot_plot(shown, {}, "bits per byte on validation, one dot a seed"),
        args.results / "experts.png",
    )


if __name__ == "__main__":
    main()
