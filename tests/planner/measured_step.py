"""Train two steps as train.py does, on random data, and print the memory that they took in bytes.

test_memory.py starts it in a process of its own.
"""

import contextlib
import json
import sys

import torch

from nanods.build import build_model
from nanods.command_line import from_command_line
from nanods.training.activation_checkpointing import checkpoint_blocks
from nanods.training.contrastive_task import Batch, ContrastiveTask
from nanods.training.language_task import LanguageTask
from nanods.training.optimizers import make_optimizers
from nanods.training.task import accumulate_gradients


def task_and_batch(config):
    """Return a task without a data set, and a batch of random inputs of the right shapes."""
    m, c, B = config.model, config.multimodal, config.batch_size
    cpu = torch.device("cpu")
    if not c.modalities:
        task = object.__new__(LanguageTask)
        task.config, task.device = config, cpu
        return task, torch.randint(0, m.vocab_size, (B, m.context_length + 1))
    task = object.__new__(ContrastiveTask)
    task.config, task.device, task.pair_weights = config, cpu, c.pair_weights()
    inputs = {
        "text": torch.randint(0, m.vocab_size, (B, m.context_length)),
        "image": torch.rand(B, 3, c.image_size, c.image_size),
        "audio": torch.randn(B, 32, c.frames),
    }
    return task, Batch({name: inputs[name] for name in c.modalities}, torch.arange(B))


def autocast(config):
    """Return the context in which the forward pass runs."""
    enabled = config.dtype == "bf16"
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()


def train_two_steps(config):
    """Return the model and its optimizers after two steps."""
    model = build_model(config)
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    optimizers = make_optimizers(config, model)
    task, batch = task_and_batch(config)
    for _ in range(2):
        micro_batch = config.micro_batch or config.batch_size
        accumulate_gradients(task, model, batch, micro_batch, autocast(config))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model, optimizers


if __name__ == "__main__":
    import torch._dynamo  # which the first optimizer imports

    from nanods.bench.runs import peak_memory_increase

    torch.set_num_threads(1)
    config = from_command_line("", sys.argv[1:])
    print(json.dumps(peak_memory_increase(lambda: train_two_steps(config))))
