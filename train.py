"""Train one preset: `python train.py v1-tiny`, `python train.py v1-tiny --steps 500 --lr 3e-3`, `python train.py --help`.

The whole loop stands below, for every version. What is learnt (data, batches, their gradients, evaluation) comes from a task,
of nanods/training/language_task.py or, for V3, matching.py; what is saved, and how, from nanods/training/checkpoint.py.
"""

import os

# Threads that wait for each other soon give the core away: by default they spin on, and two of them beside another program
# take nine times as long (LOG.md). For the OpenMP that PyTorch brings on Linux; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # a process that another has left would also print a stack of C++

import contextlib
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nanods import config as ladder
from nanods.config import Config
from nanods.data.download import write_atomic
from nanods.distributed import checkpoint as sharded_checkpoint
from nanods.distributed.data_parallel import orthogonalise_distributed
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.rendezvous import mark_started, run_distributed
from nanods.distributed.sharding import clip_grad_norm, to_local
from nanods.errors import UserError
from nanods.planner import cli as planner
from nanods.planner.cost import Mesh, memory_per_gpu
from nanods.planner.hardware import main_memory
from nanods.planner.memory import counts, meta_model, setting
from nanods.planner.search import choose_mesh
from nanods.training import checkpoint
from nanods.training.activation_checkpointing import checkpoint_blocks
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.inspection import LoadMonitor
from nanods.training.language_task import LanguageTask, load_metrics
from nanods.training.muon import STACKED, TABLES, Muon, fast_bf16, orthogonalise

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
RESULTS = Path(__file__).parent / "results" / "expected.json"


def main() -> None:
    if "--plan" in sys.argv:
        return planner.main()
    config = ladder.from_command_line(
        "Train one preset of nanods. With --plan: what it would need (--plan --help)."
    )
    mesh, why = choose_mesh(config, int(os.environ.get("WORLD_SIZE", 1)))
    processes = ProcessGroups(mesh, config.model.moe.n_expert, why)
    if processes.restarted:
        config = replace(
            config, resume=True
        )  # torchrun has started the processes again, since one had died
    train(config, processes)
    processes.destroy()


def train(config: Config, processes: ProcessGroups) -> None:
    saved = checkpoint.load(config.run_dir, processes.on_main_process) if config.resume else None
    if saved:
        config = ladder.resolve_resume(config, ladder.from_dict(saved.state["config"]))
        if saved.state["step"] >= config.steps:
            print(
                f"{config.run_dir} is finished: all {config.steps} steps are done. Sample it: python sample.py {config.run_dir}"
            )
            return
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    autocast = (
        torch.autocast(device.type, dtype)
        if dtype in (torch.bfloat16, torch.float16)
        else contextlib.nullcontext()
    )
    task = (ContrastiveTask if config.multimodal.modalities else LanguageTask)(
        config, device, autocast
    )
    rows_of_batch = processes.local_batch(config.batch_size)
    print(f"processes  {processes}")
    if saved and saved.state["data_sha256"] != task.data.sha256:
        raise UserError(
            f"--data {config.data} has changed since {saved.path} was saved: bring the old text back, or start anew"
        )

    torch.manual_seed(config.seed)
    model = (
        meta_model if processes.is_sharded and not processes.is_main_process else checkpoint.build
    )(config)
    model = model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if config.init_from and not saved:
        start = lambda: print(
            f"start      {checkpoint.warm_start(config, model, task.tokenizer.to_json())}"
        )  # noqa: E731
        processes.on_main_process(start) if processes.is_sharded else start()
    total, active, work = (
        *model.count_parameters(),
        task.work(model),
    )  # before the processes parts the model
    held, mesh = (
        counts(model),
        Mesh(" x ".join(processes.mesh_sizes), processes.world_size, processes.ep),
    )

    def needed(micro_batch: int) -> float:
        """Estimated bytes of a step, of each process (nanods/planner/memory.py)."""
        return sum(
            memory_per_gpu(config, held, mesh, setting(config, device.type, micro_batch)).values()
        )

    if processes.is_sharded and dtype == torch.float16:
        raise UserError(
            f"--dtype fp16, --mesh {mesh}: one process alone sees a gradient overflow; take bf16 or fp32"
        )
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    model = processes.shard_model(
        model, device, torch.bfloat16 if dtype == torch.bfloat16 else None
    )
    optimizers = make_optimizers(config, model, processes)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    scaler = torch.amp.GradScaler(
        device.type, enabled=dtype == torch.float16
    )  # fp16's small gradients would vanish
    own = config.batch_size // processes.batch_shards  # items of a step that are this process's
    micro_batch = config.micro_batch or (
        saved.state["micro_batch"]
        if saved
        else processes.min_over_processes(largest_micro_batch(own, needed, device))
    )
    if own % (micro_batch := min(micro_batch, own)):
        raise UserError(
            f"--micro-batch {micro_batch} does not divide the {own} items of each process: choose a divisor"
        )

    step, seconds, cpu_seconds, rows = 0, 0.0, 0.0, []
    if saved:
        (sharded_checkpoint if processes.is_sharded else checkpoint).restore(
            model, optimizers, saved
        )
        scaler.load_state_dict(saved.state["scaler"])
        step, seconds, cpu_seconds = (
            saved.state[key] for key in ("step", "seconds", "cpu_seconds")
        )
        rows = [
            row
            for row in checkpoint.read_metrics(config.run_dir / "metrics.jsonl")
            if row["step"] <= step
        ]
        print(f"resume     {saved.path}, after step {step}")
    else:
        if config.init_from:
            rows = [{"step": 0} | task.evaluate(model)]
            print(f"           validation loss {rows[0]['val_loss']:.6f} before the first step")
        processes.on_main_process(lambda: make_room(config.run_dir))
    fast = (
        torch.compile(model)
        if config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
        else model
    )

    def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
        batch = task.batch(step, rows_of_batch)
        loss, metrics = task.gradients(fast, batch, micro_batch, scaler.scale)
        processes.average_gradients(model)
        metrics["train_loss"] = torch.tensor(loss, dtype=torch.float64)
        metrics = processes.average_metrics(metrics)
        return metrics.pop("train_loss").item(), metrics

    def save() -> None:
        state = {
            "step": step,
            task.unit: step * task.units,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "data_sha256": task.data.sha256,
            "micro_batch": micro_batch,
            "scaler": scaler.state_dict(),
            "config": ladder.to_dict(config),
            "tokenizer": task.tokenizer.to_json(),
        }
        weights = model.state_dict()  # first: FSDP then gives back what evaluation has borrowed
        tensors = checkpoint.optimizer_tensors(model, optimizers)
        if processes.is_sharded:
            sharded_checkpoint.save(config.run_dir, step, model, weights, tensors, state, processes)
        else:
            processes.on_main_process(
                lambda: checkpoint.save(config.run_dir, step, weights, tensors, state)
            )

    per_step = time_step(gradients, model) + muon_seconds(optimizers[0])
    print(
        f"data       {task}\n"
        f"expected   {total / 1e6:.2f}M parameters ({active / 1e6:.2f}M active), {work}, about "
        f"{needed(micro_batch) / 2**30:.2f} GiB, {clock(per_step * (config.steps - step))} for {config.steps} steps of "
        f"{task.size()} (micro-batches of {micro_batch})"
    )
    if not saved:
        save()
    mark_started()
    stop, watch = [], LoadMonitor()
    for row in rows:
        if "load" in row:
            watch(torch.tensor(row["load"]))  # as if it had never stopped
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(signal.Signals(number).name))
    kept = "".join(
        json.dumps(row) + "\n" for row in rows
    )  # what a killed run wrote after its checkpoint is dropped
    processes.on_main_process(
        lambda: write_atomic(
            config.run_dir / "metrics.jsonl", lambda file: file.write(kept.encode())
        )
    )
    with (config.run_dir / "metrics.jsonl" if processes.is_main_process else Path(os.devnull)).open(
        "a", encoding="utf-8"
    ) as metrics:
        bar = tqdm(
            total=config.steps,
            initial=step,
            unit="step",
            disable=None if processes.is_main_process else True,
        )
        while step < config.steps and not processes.any_process(bool(stop)):
            start, cpu = time.perf_counter(), time.process_time()
            factor = schedule(step, config)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * factor
            loss, parts = gradients(step)
            updating = time.perf_counter()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = clip_grad_norm(model, config.clip)
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                bar.close()
                raise UserError(diverged(config, model, step, loss, config.lr * factor))
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            if "load" in parts:
                model.update_bias(parts["load"])
            step += 1
            now = time.perf_counter()
            elapsed = now - start
            seconds, cpu_seconds = seconds + elapsed, cpu_seconds + time.process_time() - cpu
            row = {
                "step": step,
                task.unit: step * task.units,
                "train_loss": loss,
                "lr": config.lr * factor,
            }
            load = parts.pop("load", None)
            row |= {name: value.tolist() for name, value in parts.items()}
            if load is not None:
                row |= load_metrics(load) | watch(load)
            if step % config.eval_every == 0 or step == config.steps:
                row |= task.evaluate(fast)
            row |= {
                f"{task.unit}_per_second": round(task.units / elapsed),
                "optimizer_seconds": now - updating,
                **(
                    {"communication_seconds": processes.communication_seconds}
                    if processes.world_size > 1
                    else {}
                ),
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
            }
            rows.append(row)
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            bar.update()
            if processes.is_main_process and (alarm := row.get("new_alarm")):
                bar.write(f"warning    step {step}: {alarm}", file=sys.stderr)
            bar.set_postfix_str(in_words(row, task.unit) + f", {memory(device)}")
            if step % config.save_every == 0 or step == config.steps:
                save()
        bar.close()
    if step < config.steps:
        if step % config.save_every:
            save()
        told = stop[0] if stop else "a signal elsewhere"
        print(
            f"{told}: saved after step {step}. Go on with: python train.py {config.preset} --resume --out-dir {config.run_dir}"
        )
    elif processes.is_main_process:
        report(
            config,
            task,
            checkpoint.load_model(checkpoint.load(config.run_dir)).to(device)
            if processes.is_sharded
            else model,
            rows,
        )


# ---- before the first step ---------------------------------------------------------------------------------------------------


def choose_device(config: Config) -> torch.device:
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if config.device == "auto":
        name = next(name for name, there in present.items() if there)
        reason = f"the first of {', '.join(present)} that is there"
    elif present[config.device]:
        name, reason = config.device, "as asked"
    else:
        raise UserError(
            f"--device {config.device}: this machine has none that PyTorch can use; leave the flag out, or --device cpu"
        )
    print(
        f"device     {name} ({reason}), {torch.get_num_threads()} threads"
        if name == "cpu"
        else f"device     {name} ({reason})"
    )
    return torch.device(name)


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        name, reason = config.dtype, "as asked"
    elif fast_bf16(device):
        name, reason = "bf16", f"this {device.type.upper()} multiplies it in hardware"
    else:
        name, reason = (
            "fp32",
            f"this {device.type.upper()} is not known to multiply bf16 in hardware",
        )
    print(f"dtype      {name} ({reason})")
    return DTYPES[name]


def largest_micro_batch(own: int, needed: Callable[[int], float], device: torch.device) -> int:
    """The largest micro-batch (a divisor of the items of a process) that should take at most 80% of the memory that is free."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else main_memory()
    return next((n for n in range(own, 0, -1) if own % n == 0 and needed(n) <= 0.8 * free), 1)


def make_optimizers(
    config: Config, model: nn.Module, processes: ProcessGroups | None = None
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and, in turns, the experts'; AdamW for embeddings, the head, the routers' gates and single numbers.

    The processes of a processes deal out the orthogonalising of what they all hold."""
    named = dict(model.named_parameters())
    experts = [p for p in named.values() if p.ndim == 3]  # stacks (E, R, C)
    matrices = [p for name, p in named.items() if p.ndim == 2 and not name.endswith(TABLES)]
    others = [p for name, p in named.items() if p.ndim < 2 or name.endswith(TABLES)]
    shards, whole = (
        [p for p in others if isinstance(p, DTensor) == kind] for kind in (True, False)
    )  # AdamW mixes none
    groups = [{"params": some, "lr": config.lr / 2} for some in (shards, whole) if some]
    together = (
        orthogonalise_distributed if processes and processes.world_size > 1 else orthogonalise
    )
    muons = [{"params": matrices, "orthogonalise": together}]
    if experts and config.experts == "muon":
        alone = (
            orthogonalise if processes and processes.ep > 1 and not processes.fsdp else together
        )  # experts that one process owns
        muons.append(
            {
                "params": experts,
                "lr": config.expert_lr,
                "every": config.expert_every,
                "orthogonalise": alone,
            }
        )
    elif experts:
        groups.append(
            {"params": experts, "lr": config.expert_lr, "weight_decay": config.weight_decay}
        )
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.99), weight_decay=0.0, fused=True)
    return [Muon(muons, config.lr, config.momentum, config.weight_decay), adamw]


def time_step(gradients, model: nn.Module) -> float:
    """Seconds that one batch takes, forward and backward: the second of two, whose gradients are thrown away."""
    for _ in range(2):
        start = time.perf_counter()
        gradients(0)
        elapsed = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    return elapsed


def muon_seconds(muon: Muon) -> float:
    """Seconds that Muon takes for one step, from one stack of its largest matrices."""
    share = {
        p: 1 / group["every"] for group in muon.param_groups for p in group["params"]
    }  # of the steps
    largest = max(share, key=Tensor.numel)
    stack = to_local(largest).new_ones(
        min(STACKED, largest.shape[:-2].numel()), *largest.shape[-2:]
    )
    start = time.perf_counter()
    orthogonalise(stack)
    return (
        (time.perf_counter() - start)
        * sum(p.numel() * part for p, part in share.items())
        / stack.numel()
    )


def clock(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def make_room(out: Path) -> None:
    """An empty run directory. A run that is in the way is renamed, not overwritten."""
    try:
        if out.is_dir() and (checkpoint.found(out) or (out / "metrics.jsonl").exists()):
            aside = out.with_name(f"{out.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
            out.rename(aside)
            print(
                f"moved      the run that was in {out} to {aside} (--resume would have gone on with it)"
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out-dir {out}: cannot be made ({error.strerror}); choose a folder that you may write to"
        ) from None


# ---- in between --------------------------------------------------------------------------------------------------------------


def schedule(step: int, config: Config) -> float:
    """The learning rate's factor: up in the first steps, then constant, then down to zero over the last ones."""
    up = (step + 1) / max(1, config.warmup * config.steps)
    down = (config.steps - step) / max(1, config.decay * config.steps)
    return min(1.0, up, down)


def in_words(row: dict, unit: str) -> str:
    """What the progress bar says of a step."""
    load = f", load {row['load_max_over_mean']:.1f}x" if "load" in row else ""
    return f"loss {row['ce_loss']:.3f}{load}, {row[f'{unit}_per_second']:,} {unit}/s" + (
        ", ALARM" if row.get("alarm") else ""
    )


def diverged(config: Config, model: nn.Module, step: int, loss: float, lr: float) -> str:
    """What to say when the loss is no longer a number: where it began, and how to go on before it."""
    faulty = [
        n
        for n, p in model.named_parameters()
        if not p.isfinite().all() or (p.grad is not None and not p.grad.isfinite().all())
    ]
    return (
        f"the loss became {loss} at step {step + 1}, learning rate {lr:.2e}; "
        f"first layer with values that are not finite: {faulty[0] if faulty else 'none'}. The last checkpoint is untouched: "
        f"try a smaller rate, python train.py {config.preset} --lr {config.lr / 2:g}"
    )


def memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )  # KiB on Linux
    return f"{peak / 2**30:.2f} GiB"


# ---- at the end --------------------------------------------------------------------------------------------------------------


def report(config: Config, task, model: nn.Module, rows: list[dict]) -> None:
    for path in task.draw(model, rows):
        print(f"picture    {path}")
    optimizer = sum(row.get("optimizer_seconds", 0) for row in rows)
    print(
        f"time       {rows[-1]['seconds']:.0f} s of training, {optimizer / rows[-1]['seconds']:.0%} of it the optimizers'"
    )
    print(verdict(config, task, rows[-1]))
    print(task.show(model))


def verdict(config: Config, task, last: dict) -> str:
    """Compare the last validation with what results/expected.json says for this preset, data and configuration."""
    got = task.got(last)
    expected = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known = expected.get(f"{config.preset}/{config.data}")
    free = {*ladder.RUNTIME_ONLY_FIELDS, "seed", "data", "eval-every", "micro-batch", "dtype"}
    ours, default = ladder.flatten(config), ladder.flatten(ladder.PRESETS[config.preset])
    changed = [f"--{name}" for name in ours if name not in free and ours[name] != default[name]]
    if known is None or changed:
        why = (
            f"{', '.join(changed)} changed"
            if changed
            else f"no figure of {config.preset} on {config.data}"
        )
        return f"got        {got}; nothing to compare with ({why})"
    tolerance, notice = known["tolerance"], ""
    if (
        known["sha256"] != task.data.sha256
    ):  # another Python's documentation, say: similar, not the same
        tolerance, notice = (
            5 * known["tolerance"],
            f" (another version of the data: {task.better} is no fault)",
        )
    off = (last[task.figure] - known[task.figure]) * (
        -1 if task.better == "higher" else 1
    )  # above 0 is worse
    ok = off <= tolerance and (notice or off >= -tolerance)
    return f"expected   {known[task.figure]:.4f} +- {tolerance:.3f}{notice}, got {got}: {'PASS' if ok else 'FAIL'}"


if __name__ == "__main__":
    run_distributed(main)
