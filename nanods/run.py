"""A run of train.py: set it up or resume it, forecast it, save it. The loop itself is in train.py.

This is where one process and many meet: what it calls is in nanods/training (one process),
nanods/distributed (many) and nanods/planner (memory).
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nanods import config as ladder
from nanods.build import build_meta_model, build_model
from nanods.command_line import resolve_resume, typed_flags
from nanods.config import Config
from nanods.data.tokenizer import tokenizer_from_json
from nanods.distributed import checkpoint as sharded_checkpoint
from nanods.distributed.data_parallel import orthogonalise_distributed
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.sharding import to_local
from nanods.errors import UserError
from nanods.ewc import Consolidation
from nanods.planner.memory import model_cost, step_config, teacher_bytes
from nanods.planner.search import largest_micro_batch, run_memory
from nanods.quantize import fake_quantize_model
from nanods.training import checkpoint, consolidation
from nanods.training.activation_checkpointing import checkpoint_blocks
from nanods.training.commands import sample_command
from nanods.training.distill import projection_of
from nanods.training.instruction_task import InstructionTask
from nanods.training.metrics import read_metrics
from nanods.training.muon import STACKED, Muon, orthogonalise
from nanods.training.optimizers import make_optimizers
from nanods.training.setup import (
    Precision,
    choose_device,
    choose_precision,
    lock_run_directory,
    prepare_run_directory,
)
from nanods.training.task import Task, accumulate_gradients, make_task
from nanods.training.teacher import (
    attach_projection,
    attach_teacher,
    load_teacher,
    require_same_teacher,
)
from nanods.training.tensorboard_log import require_tensorboard
from nanods.training.warm_start import warm_start


@dataclass
class Run:
    """What the loop works on: `set_up_run` makes it, the loop changes it, `save_run` writes it."""

    config: Config
    device: torch.device
    precision: Precision
    task: Task
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    micro_batch: int
    """Examples of this process in one forward and backward pass."""
    resumed: bool = False
    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time spent in them, without evaluation and saving."""
    cpu_seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    """The metrics of each step done, as in metrics.jsonl."""
    is_rounding: bool = False
    """Whether the model rounds its weights (quantisation-aware training)."""
    consolidation: Consolidation | None = None
    """What holds the weights near those of another run (--ewc)."""


# ---- set up --------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_run(config: Config, processes: ProcessGroups) -> Iterator[None]:
    """Keep other runs out of the run directory: the main process holds its lock for all."""
    with contextlib.ExitStack() as stack:
        lock = lock_run_directory(config.run_dir)
        processes.on_main_process(lambda: stack.enter_context(lock))
        yield


def set_up_run(config: Config, processes: ProcessGroups) -> Run | None:
    """Return a new run or, with --resume, the saved one; None if that is finished.

    Raises UserError for settings that do not fit the machine, the data, the processes or the saved
    run.
    """
    saved = checkpoint.load(config.run_dir, processes.on_main_process) if config.resume else None
    if saved:
        checkpoint.require_floats(saved)
        config = resolve_resume(
            config, ladder.from_dict(saved.state["config"]), typed_flags(sys.argv[1:])
        )
        if saved.state["step"] >= config.steps:
            print(
                f"{config.run_dir} is finished: all {config.steps} steps are done. "
                f"Sample it: {sample_command(config.run_dir)}"
            )
            return None
    if config.tensorboard:
        require_tensorboard()
    # These refuse what does not fit together before any data is loaded.
    build_meta_model(config)
    teacher = load_teacher(config) if config.teacher else None
    device = choose_device(config, processes.world_size)
    precision = choose_precision(config, device)
    tokenizer = tokenizer_from_json(saved.state["tokenizer"]) if saved else None
    task = make_task(config, device, tokenizer)
    config = task.config  # V3: with the modalities of the data
    processes.local_batch(config.batch_size)  # refuses a batch that does not divide
    print(f"processes  {processes}")
    if saved and saved.state["data_sha256"] != task.data.sha256:
        raise UserError(
            f"--data {config.data} has changed since {saved.path} was saved: "
            "restore the old data, or start a new run"
        )
    if saved and saved.state["tokenizer"] != task.tokenizer.to_json():
        raise UserError(
            f"--data {config.data}: its tokenizer is not the one that {saved.path} was saved with: "
            "restore the old data folder, or start a new run"
        )
    if processes.is_sharded and precision.dtype == torch.float16:
        raise UserError(
            f"--dtype fp16, --mesh {processes.mesh}: a gradient that overflows shows on one "
            "process only; use bf16 or fp32"
        )
    if config.quantize != "off" and precision.dtype == torch.float16:
        raise UserError(
            f"--quantize {config.quantize}, --dtype fp16: a sum of products of 8-bit integers "
            "exceeds what fp16 holds; use bf16 or fp32"
        )
    if config.quantize != "off" and processes.is_sharded:
        raise UserError(
            f"--quantize {config.quantize}, --mesh {processes.mesh}: a weight that is spread over "
            "processes has no scale of its own; use dp, or one process"
        )
    ewc_run = None
    if config.ewc:
        ewc_run = consolidation.check(config, processes.mesh if processes.is_sharded else None)
    if teacher:
        attach_teacher(task, teacher, device, precision.weights)
    if saved:
        require_same_teacher(saved, task)
    model = set_up_model(config, task, device, precision, processes, is_new=not saved)
    optimizers = make_run_optimizers(config, model, processes)
    micro_batch = choose_micro_batch(config, task, device, saved, processes)
    run = Run(config, device, precision, task, model, optimizers, micro_batch)
    if saved:
        restore_run(run, saved, processes)
        run.consolidation = load_consolidation(run)
        print(f"resume     {saved.path}, after step {run.step}")
        return run
    if config.init_from:
        with precision.autocast:
            run.rows = [{"step": 0} | task.evaluate(model)]
        print(f"           validation loss {run.rows[0]['val_loss']:.6f} before the first step")

    def prepare() -> None:
        held = None
        if ewc_run:  # before a run that is in the way is renamed: it may be this one
            held = consolidation.make(config, task, *ewc_run, device, precision.weights)
        prepare_run_directory(config.run_dir)
        task.save_examples(config.run_dir)
        if held:
            consolidation.save(held, config.run_dir)

    processes.on_main_process(prepare)
    run.consolidation = load_consolidation(run)
    return run


def load_consolidation(run: Run) -> Consolidation | None:
    """Return what --ewc holds the weights by, from the run's directory; None without --ewc."""
    if not run.config.ewc:
        return None
    return consolidation.load(run.config.run_dir, run.device, run.precision.weights)


def add_penalty(run: Run, metrics: dict[str, Tensor]) -> None:
    """Add the penalty of --ewc to the gradients and to the loss, if there is one.

    Once an optimizer step, after the gradients are averaged: not once a micro-batch or a process.
    """
    if run.consolidation:
        penalty = run.consolidation.penalty(run.model, run.config.ewc_lambda)
        run.precision.scaler.scale(penalty).backward()
        metrics["ewc_penalty"] = penalty.detach()
        metrics["train_loss"] = metrics["train_loss"] + penalty.detach()


def start_rounding(run: Run) -> None:
    """Round weights and activations from this step on, if --quantize asks for it."""
    bits = run.config.weight_bits(run.step)
    if bits and not run.is_rounding:
        fake_quantize_model(run.model, bits)
        run.is_rounding = True


def set_up_model(
    config: Config,
    task: Task,
    device: torch.device,
    precision: Precision,
    processes: ProcessGroups,
    is_new: bool,
) -> nn.Module:
    """Return the initial model, on its device: whole, or this process's part of it."""
    torch.manual_seed(config.seed)
    if processes.is_sharded and not processes.is_main_process:
        model = build_meta_model(config)  # the main process will send the weights
    else:
        model = build_model(config)
    model = model.to(precision.weights)
    if config.init_from and is_new:
        start = partial(print_warm_start, config, model, task)
        if processes.is_sharded:
            processes.on_main_process(start)
        else:
            start()
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    attach_projection(model, task)
    if projection_of(model) is not None and processes.is_sharded:
        raise UserError(
            f"--teacher {config.teacher}, --mesh {processes.mesh}: the teacher's embeddings have "
            f"another width than the student's {config.multimodal.width}, and the projection "
            "between them is not sharded; use dp, or --distill-cosine 0"
        )
    sent_as = torch.bfloat16 if precision.dtype == torch.bfloat16 else None
    return processes.shard_model(model, device, sent_as)


def make_run_optimizers(
    config: Config, model: nn.Module, processes: ProcessGroups
) -> list[torch.optim.Optimizer]:
    """Return the optimizers. Processes that hold the same matrices split Muon's orthogonalising
    among them; experts that one process holds alone it orthogonalises alone."""
    if processes.world_size == 1:
        return make_optimizers(config, model)
    alone = processes.mesh.ep > 1 and not processes.mesh.is_fsdp
    for_experts = orthogonalise if alone else orthogonalise_distributed
    return make_optimizers(config, model, orthogonalise_distributed, for_experts)


def print_warm_start(config: Config, model: nn.Module, task: Task) -> None:
    print(f"start      {warm_start(config, model, task.tokenizer.to_json())}")


def choose_micro_batch(
    config: Config,
    task: Task,
    device: torch.device,
    saved: checkpoint.Checkpoint | None,
    processes: ProcessGroups,
) -> int:
    """Return the micro-batch: as requested, as saved, or the largest that should fit in the memory
    of every process. A saved one that does not divide the examples of each process, which may be
    other processes now, becomes smaller."""
    local_batch_size = config.batch_size // processes.batch_shards
    if config.micro_batch:
        micro_batch = config.micro_batch
    elif saved:
        micro_batch = saved.state["micro_batch"]
    else:
        teacher = task.teacher.config if task.teacher else None
        largest = largest_micro_batch(config, processes.mesh, device, teacher)
        micro_batch = processes.min_over_processes(largest)
    micro_batch = min(micro_batch, local_batch_size)
    if saved and local_batch_size % micro_batch:
        divisor = math.gcd(micro_batch, local_batch_size)
        print(
            f"notice     micro-batches of {divisor}: the run's {micro_batch} does not divide the "
            f"{local_batch_size} examples of each process"
        )
        return divisor
    if local_batch_size % micro_batch:
        raise UserError(
            f"--micro-batch {micro_batch} does not divide the {local_batch_size} examples of each "
            "process: choose a divisor"
        )
    return micro_batch


# ---- forecast ------------------------------------------------------------------------------------


def print_forecast(run: Run, compiled: nn.Module, processes: ProcessGroups) -> None:
    """Print what the run needs: parameters, arithmetic, memory, and time, which two rehearsed
    batches and a part of an evaluation measure."""
    config, task = run.config, run.task
    whole = build_meta_model(config)  # `run.model` may be a part
    total, active = whole.count_parameters()
    cost = model_cost(whole)
    memory = run_memory(config, processes.mesh, run.device.type, run.micro_batch, cost)
    of_teacher, teacher_line = teacher_cost(run) if task.teacher else (0, "")
    memory += of_teacher
    seconds = time_batch(run, compiled, processes) + muon_seconds(run.optimizers)
    steps = range(run.step + 1, config.steps + 1)
    evaluations = sum(step % config.eval_every == 0 or step == config.steps for step in steps)
    with run.precision.autocast:
        each = task.evaluation_seconds(compiled)
    evaluating = evaluations * each
    print(
        f"data       {task.describe_data()}\n"
        f"expected   {total / 1e6:.2f}M parameters ({active / 1e6:.2f}M active), "
        f"{task.describe_flops(whole)}, about {memory / 2**30:.2f} GiB, "
        f"{format_duration(seconds * len(steps) + evaluating)} for {len(steps)} steps of "
        f"{task.describe_step()} (micro-batches of {run.micro_batch}); "
        f"evaluations ({evaluations}, {each:.2g} s each) take {format_duration(evaluating)} of it"
        f"{teacher_line}"
    )


def teacher_cost(run: Run) -> tuple[float, str]:
    """Return the bytes that the teacher adds, and the line of the forecast about it."""
    config, task, teacher = run.config, run.task, run.task.teacher
    step = step_config(config, run.device.type, run.micro_batch)
    memory = teacher_bytes(config, teacher.config, step)
    flops, unit = teacher.model.flops_per_example() / 3, task.unit.removesuffix("s")
    if unit == "token":
        flops /= teacher.config.model.context_length
    return memory, (
        f"\n           of it the teacher, which reads each batch too: {memory / 2**30:.2f} GiB and "
        f"{flops / 1e6:.4g} MFLOP per {unit}, forward only; the time includes it"
    )


def time_batch(run: Run, compiled: nn.Module, processes: ProcessGroups) -> float:
    """Run the last step's batch twice, forward and backward, throw the gradients away, and return
    the seconds of the second time. Steps of --short-context take less."""
    local_batch = processes.local_batch(run.config.batch_size)
    for _ in range(2):
        start = time.perf_counter()
        batch = run.task.batch(run.config.steps - 1, local_batch)
        metrics = accumulate_gradients(
            run.task, compiled, batch, run.micro_batch, run.precision.autocast
        )
        processes.average_gradients(run.model)
        processes.average_metrics(metrics)["train_loss"].item()  # waits for the GPU
        elapsed = time.perf_counter() - start
        run.model.zero_grad(set_to_none=True)
    return elapsed


def muon_seconds(optimizers: list[torch.optim.Optimizer]) -> float:
    """Return the seconds that Muon takes per step, measured on one stack of its largest matrices; 0
    without Muon."""
    share_of_steps: dict[Tensor, float] = {}
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            for group in optimizer.param_groups:
                share_of_steps |= dict.fromkeys(group["params"], 1 / group["every"])
    if not share_of_steps:
        return 0.0
    largest = max(share_of_steps, key=Tensor.numel)
    matrices = min(STACKED, largest.shape[:-2].numel())
    stack = to_local(largest).new_ones(matrices, *largest.shape[-2:])
    for _ in range(2):  # the first may wait for libraries to load
        start = time.perf_counter()
        orthogonalise(stack).sum().item()  # waits for the GPU
        seconds_per_number = (time.perf_counter() - start) / stack.numel()
    return seconds_per_number * sum(p.numel() * share for p, share in share_of_steps.items())


def format_duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- on disk -------------------------------------------------------------------------------------


def save_run(run: Run, processes: ProcessGroups) -> None:
    """Write a checkpoint of the run. Every process must call it."""
    write_checkpoint(run, run.config.run_dir, run.config.keep_checkpoints, processes)


def keep_best(run: Run, processes: ProcessGroups) -> None:
    """Keep the run as RUN/best if its last step was evaluated, better than what is there.

    Every process must call it.
    """
    figure = last_figure(run)
    if figure is None:
        return
    run_dir = run.config.run_dir

    def is_best() -> bool:
        best = checkpoint.best_state(run_dir)
        if best is None or best.get("figure") is None:
            return math.isfinite(figure)
        higher = figure > best["figure"]
        return higher if run.task.higher_is_better else figure < best["figure"]

    if not processes.on_main_process(is_best):
        return
    if not processes.on_main_process(lambda: checkpoint.link_best(run_dir, run.step)):
        write_checkpoint(run, run_dir / checkpoint.BEST, 1, processes)


def last_figure(run: Run) -> float | None:
    """Return the headline metric of the last step, or None if it was not evaluated."""
    return run.rows[-1].get(run.task.headline_metric) if run.rows else None


def write_checkpoint(run: Run, folder: Path, keep: int, processes: ProcessGroups) -> None:
    """Write a checkpoint of the run into a folder that then holds the last `keep`."""
    state = {
        "step": run.step,
        "figure": last_figure(run),
        run.task.unit: run.step * run.task.units_per_step,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "data_sha256": run.task.data.sha256,
        "teacher_sha256": run.task.teacher.sha256 if run.task.teacher else None,
        "micro_batch": run.micro_batch,
        "scaler": run.precision.scaler.state_dict(),
        "config": ladder.to_dict(run.config),
        "tokenizer": run.task.tokenizer.to_json(),
        "answers": isinstance(run.task, InstructionTask),
    }
    weights = checkpoint.model_tensors(run.model)  # first: FSDP then frees what evaluation gathered
    tensors = checkpoint.optimizer_tensors(run.model, run.optimizers)
    if processes.is_sharded:
        sharded_checkpoint.save(
            folder, run.step, run.model, weights, tensors, state, processes, keep
        )
    else:
        write = partial(checkpoint.save, folder, run.step, weights, tensors, state, keep)
        processes.on_main_process(write)


def restore_run(run: Run, saved: checkpoint.Checkpoint, processes: ProcessGroups) -> None:
    """Set a run to where a checkpoint left it: weights, optimizers, random state, progress."""
    restore = sharded_checkpoint.restore if processes.is_sharded else checkpoint.restore
    restore(run.model, run.optimizers, saved)
    run.precision.scaler.load_state_dict(saved.state["scaler"])
    run.resumed, run.step = True, saved.state["step"]
    run.seconds, run.cpu_seconds = saved.state["seconds"], saved.state["cpu_seconds"]
    rows = read_metrics(run.config.run_dir / "metrics.jsonl")
    run.rows = [row for row in rows if row["step"] <= run.step]


def load_whole_model(run: Run, processes: ProcessGroups) -> nn.Module:
    """Return the whole model: from the last checkpoint, where each process holds a part of it."""
    if not processes.is_sharded:
        return run.model
    return checkpoint.load_model(checkpoint.load(run.config.run_dir)).to(run.device)
