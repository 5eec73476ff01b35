"""Train one preset: `python train.py v1-tiny`, `python train.py v1-tiny --steps 500 --lr 3e-3`,
`python train.py --help`.

The training loop is in `train`, the same for every version, on one process or many. What is learnt
(batches, loss, evaluation) is a task: nanods/training/task.py. `docs/ARCHITECTURE.md` follows one
batch through the files.
"""

import os

# OpenMP threads that wait for each other keep a core busy by default, which makes two of them nine
# times slower beside another program (LOG.md). PyTorch's OpenMP on Linux reads this when torch is
# imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# Otherwise a process that lost another one also prints a C++ stack.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import math
import sys
import time
from dataclasses import replace

import torch

from nanods.command_line import from_command_line
from nanods.distributed.process_groups import ProcessGroups
from nanods.distributed.rendezvous import mark_started, run_distributed
from nanods.distributed.sharding import clip_grad_norm
from nanods.errors import UserError
from nanods.flags import from_environment
from nanods.planner import cli as planner
from nanods.planner.search import choose_mesh
from nanods.run import (
    Run,
    add_penalty,
    keep_best,
    load_whole_model,
    lock_run,
    print_forecast,
    save_run,
    set_up_run,
    start_rounding,
)
from nanods.training.commands import resume_command
from nanods.training.inspection import LoadMonitor
from nanods.training.metrics import accumulate_metrics, load_metrics
from nanods.training.metrics_log import MetricsLog
from nanods.training.optimizers import set_learning_rate
from nanods.training.report import print_report
from nanods.training.setup import StopSignal, compile_model, explain_divergence


def main() -> None:
    if "--plan" in sys.argv:
        planner.main()
        return
    config = from_command_line(
        "Train one preset of nanods. With --plan: what it would need (--plan --help)."
    )
    mesh, reason = choose_mesh(config, from_environment("WORLD_SIZE", 1))
    processes = ProcessGroups(mesh, config.model.moe.n_expert, reason)
    if processes.restarted:  # torchrun has started the processes again, since one had died
        config = replace(config, resume=True)
    with lock_run(config, processes):
        run = set_up_run(config, processes)
        if run:
            train(run, processes)
    processes.destroy()


def train(run: Run, processes: ProcessGroups) -> None:
    """Train until the last step, or until SIGINT or SIGTERM: then save, to be continued with
    --resume."""
    config, task, model, optimizers = run.config, run.task, run.model, run.optimizers
    autocast, scaler = run.precision.autocast, run.precision.scaler
    local_batch = processes.local_batch(config.batch_size)  # which examples are this process's
    compiled = compile_model(config, model, run.device)
    print_forecast(run, compiled, processes)
    if not run.resumed:
        save_run(run, processes)
        keep_best(run, processes)
    mark_started()
    stop, monitor = StopSignal(), LoadMonitor(run.rows)
    log = MetricsLog(config, task, run.rows, processes.is_main_process)

    while run.step < config.steps and not processes.any_process(stop.received):
        start, cpu_start = time.perf_counter(), time.process_time()
        lr = set_learning_rate(optimizers, run.step, config)
        start_rounding(run)

        # Forward and backward: gradients add up over the micro-batches, then over the processes.
        metrics = {}
        batch = task.batch(run.step, local_batch)
        with autocast:
            micro_batches = task.micro_batches(compiled, batch, run.micro_batch)
        for micro_batch in micro_batches:
            with autocast:
                loss, micro_metrics = task.loss(compiled, micro_batch)
            scaler.scale(loss).backward()
            accumulate_metrics(metrics, micro_metrics, len(micro_batches))
        processes.average_gradients(model)
        metrics = processes.average_metrics(metrics)
        add_penalty(run, metrics)
        train_loss = metrics["train_loss"].item()
        backward_done = time.perf_counter()

        # Update: limit the gradient's norm, then step.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = clip_grad_norm(model, config.clip)
        overflows = not math.isfinite(grad_norm)
        if not math.isfinite(train_loss) or (overflows and not scaler.is_enabled()):
            log.close()
            raise UserError(explain_divergence(config, model, run.step, train_loss, lr))
        for optimizer in optimizers:
            if not overflows:  # in fp16 such a step is left out
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        load = metrics.pop("load", None)  # (L, E): tokens of each layer's experts
        if load is not None:
            model.update_bias(load, lr / config.lr)
        run.step += 1
        if run.device.type == "cuda":
            torch.cuda.synchronize()  # the optimizers' kernels count as part of the step
        done = time.perf_counter()
        run.seconds += done - start
        run.cpu_seconds += time.process_time() - cpu_start

        # Log, evaluate, save.
        row = {"step": run.step, task.unit: run.step * task.units_per_step}
        row |= {name: value.tolist() for name, value in metrics.items()} | {"lr": lr}
        if load is not None:
            row |= load_metrics(load) | monitor.update(load)
        is_last = run.step == config.steps
        if run.step % config.eval_every == 0 or is_last:
            with autocast:
                row |= task.evaluate(compiled)
        row |= {
            f"{task.unit}_per_second": round(task.units_per_step / (done - start)),
            "optimizer_seconds": done - backward_done,
            "seconds": run.seconds,
            "cpu_seconds": run.cpu_seconds,
        }
        if processes.world_size > 1:
            row["communication_seconds"] = processes.communication_seconds
        log.log(row)
        if run.step % config.save_every == 0 or is_last:
            save_run(run, processes)
        keep_best(run, processes)

    log.close()
    if run.step < config.steps:
        if run.step % config.save_every:
            save_run(run, processes)
        reason = stop.name or "a signal to another process"
        print(f"{reason}: saved after step {run.step}. Continue with: {resume_command(config)}")
    elif processes.is_main_process:
        print_report(config, task, load_whole_model(run, processes), run.rows)


if __name__ == "__main__":
    run_distributed(main, "with --out-dir")
