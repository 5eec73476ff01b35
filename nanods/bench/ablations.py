"""Measure what each idea of the trunk is worth, left out alone: results/ablations.json and .png.

    python -m nanods.bench.ablations            about 10 minutes on one thread

The last model of from_bigram.py, in its size, on the same windows for the same steps. Each arm
replaces one function or one setting. The table has by how much the validation loss rises, in bits
per byte. Two arms instead add an idea that this model leaves out: the convolution of
nanods/conv.py, which v0-tiny to v2-tiny have, and --equal-neurons.

The learning rate was chosen for the whole model only, except for AdamW, which needs another one:
the best of ADAMW_RATES with the first seed.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from nanods import gpt, moe, plots
from nanods.bench.from_bigram import STEPS, Step, WholeGPT, bits_per_byte, train
from nanods.bench.jobs import PROBE_STEPS, FunctionJob
from nanods.bench.runs import write_json
from nanods.bench.stored_runs import machine_of, train_all
from nanods.errors import run
from nanods.flags import parse_args
from nanods.gpt import rms_norm

WHOLE = "nothing left out"
ADAMW_RATES = (0.0015, 0.005, 0.015, 0.05, 0.15)


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Seeds of each model."""
    steps: int = 300
    """Steps of each run."""
    results: Path = Path("results")
    """Directory of the table and the picture."""


# ---- what is left out ----------------------------------------------------------------------------


def without_norm_of(dim: int) -> Callable:
    """Return an rms_norm that does nothing to tensors of `dim` dimensions: the residual stream has
    3, queries and keys have 4."""
    return lambda x, gain=1.0: x if x.dim() == dim else rms_norm(x, gain)


def start_at_random() -> nn.Module:
    """Return a model whose output matrices start with values like all others', not at zero."""
    model = WholeGPT()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return model


def with_convolution() -> nn.Module:
    """Return a model whose MLPs also read the three tokens before theirs."""
    return WholeGPT(conv_width=4)


GPT_STEP = STEPS["the whole GPT, Muon"]
FUNCTIONS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "RoPE (no positions)": lambda: patch.object(gpt, "apply_rope", lambda x, rope: x),
    "RMSNorm before each layer": lambda: patch.object(gpt, "rms_norm", without_norm_of(3)),
    "QK-norm": lambda: patch.object(gpt, "rms_norm", without_norm_of(4)),
    "squared ReLU (GELU)": lambda: patch.object(moe, "squared_relu", F.gelu),
}
SETTINGS: dict[str, Step] = {
    "outputs that start at zero": replace(GPT_STEP, make=start_at_random),
    "falling learning rate": replace(GPT_STEP, decay=0.0),
}
ADDED: dict[str, Step] = {
    "added: convolution before the MLP": replace(GPT_STEP, make=with_convolution),
    "added: equal neurons in Muon": replace(GPT_STEP, equal_neurons=True),
}
MUON = "Muon (AdamW)"


def left_out(arm: str) -> contextlib.AbstractContextManager:
    """Return the context in which an arm trains and is evaluated."""
    return FUNCTIONS.get(arm, contextlib.nullcontext)()


def train_arm(
    arm: str, step: Step, steps: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[float]]:
    """Train an arm; return the model and the loss before each update."""
    wide = replace(step, make=lambda: step.make().to(dtype))
    with left_out(arm):
        models, losses = zip(*train(wide, steps, seed), strict=True)
    return models[-1], list(losses)


def arm_job(arm: str, step: Step, steps: int, seed: int) -> FunctionJob:
    name = f"{arm}, seed {seed}" if arm != MUON else f"{arm} at {step.lr:g}, seed {seed}"

    def result() -> dict:
        model, _ = train_arm(arm, step, steps, seed)
        with left_out(arm):
            val_bpb = bits_per_byte(model)
        print(f"{name}: {val_bpb:.3f} bits per byte", flush=True)
        return {"val_bpb": val_bpb}

    def probe() -> list[float]:
        return train_arm(arm, step, PROBE_STEPS, seed, torch.float64)[1]

    flags = {"arm": arm, "lr": step.lr, "decay": step.decay, "steps": steps, "seed": seed}
    return FunctionJob(name, flags, result, probe)


# ---- the table -----------------------------------------------------------------------------------


def main() -> None:
    """Train what is not stored yet, and write the table and the picture."""
    args = parse_args(Args, __doc__)
    done: list[FunctionJob] = []

    def measure(arm: str, step: Step, seeds: int = args.seeds) -> list[float]:
        jobs = [arm_job(arm, step, args.steps, seed) for seed in range(seeds)]
        done.extend(jobs)
        stored = train_all("ablations", jobs, results=args.results, workers=1)
        return [stored[job.name]["val_bpb"] for job in jobs]

    whole = measure(WHOLE, GPT_STEP)
    arms = {arm: measure(arm, GPT_STEP) for arm in FUNCTIONS}
    arms |= {arm: measure(arm, step) for arm, step in SETTINGS.items()}
    adamw = {rate: replace(GPT_STEP, optimizer="adamw", lr=rate) for rate in ADAMW_RATES}
    tuned = {rate: measure(MUON, step, seeds=1)[0] for rate, step in adamw.items()}
    best = min(tuned, key=tuned.get)
    arms[MUON] = measure(MUON, adamw[best])
    with_more = {arm: measure(arm, step) for arm, step in ADDED.items()}

    def minus_whole(val_bpb: dict[str, list[float]]) -> dict[str, list[float]]:
        by_loss = sorted(val_bpb.items(), key=lambda arm: -mean(arm[1]))
        return {
            arm: [value - w for value, w in zip(values, whole, strict=True)]
            for arm, values in by_loss
        }

    lost, added = minus_whole(arms), minus_whole(with_more)
    table = {
        "machine": machine_of("ablations", done, args.results),
        "steps": args.steps,
        "seeds": args.seeds,
        "adamw_lr": {"chosen": best, "val_bpb": tuned},
        "val_bpb": {WHOLE: whole, **arms, **with_more},
        "lost": lost,
        "added": added,
    }
    write_json(args.results / "ablations.json", table)
    figure = plots.dot_plot(
        lost | added,
        dict.fromkeys(lost | added, 0.0),
        f"bits per byte worse after {args.steps} steps",
        "Each idea left out alone, and two added",
        "the whole model",
    )
    plots.save(figure, args.results / "ablations.png")


if __name__ == "__main__":
    run(main)
