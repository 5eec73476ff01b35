"""Two steps of train.py, on made-up data: test_memory.py starts them in processes of their own, to weigh them."""

import contextlib
import json
import sys
from types import SimpleNamespace

import torch

from nanods import config as ladder
from nanods.training import checkpoint
from nanods.training.activation_checkpointing import checkpoint_blocks
from nanods.training.contrastive_task import ContrastiveTask
from nanods.training.language_task import LanguageTask


def made_up(config):
    """A batch of the right shapes, and as much of a task as computes gradients."""
    import train

    m, c, B = config.model, config.multimodal, config.batch_size
    dtype = train.DTYPES[config.dtype]
    autocast = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()
    task = SimpleNamespace(config=config, autocast=autocast, pairs=c.pair_weights())
    if not c.modalities:
        task.loss = lambda *args: LanguageTask.loss(task, *args)
        return LanguageTask, task, torch.randint(0, m.vocab_size, (B, m.context_length + 1))
    inputs = {
        "text": torch.randint(0, m.vocab_size, (B, m.context_length)),
        "image": torch.rand(B, 3, c.image_size, c.image_size),
        "audio": torch.randn(B, 32, c.frames),
    }
    return ContrastiveTask, task, ({name: inputs[name] for name in c.modalities}, torch.arange(B))


def steps(config):
    import train

    model = checkpoint.build(config)
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    optimizers = train.make_optimizers(config, model)
    kind, task, batch = made_up(config)
    for _ in range(2):
        kind.gradients(
            task, model, batch, config.micro_batch or config.batch_size, lambda loss: loss
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model, optimizers


if __name__ == "__main__":
    import torch._dynamo  # which the first optimizer imports

    from nanods.bench.runs import peak_memory_increase

    torch.set_num_threads(1)
    config = ladder.from_command_line("", sys.argv[1:])
    print(json.dumps(peak_memory_increase(lambda: steps(config))))
