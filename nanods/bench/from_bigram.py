"""Grow a GPT from a table of bigrams, one idea at a time: results/from_bigram.json.

    python -m nanods.bench.from_bigram            about 5 minutes on one thread

    Bigram         a table: which byte follows which
    OneToken       an embedding and an MLP instead of the table
    AveragedPast   each token also reads the mean of its past
    OneHead        it chooses what it reads: causal attention
    Positions      it knows how far back a token is: RoPE
    Heads          it reads several tokens at once
    Embedded       four such layers, each adding to one residual stream
    GPT            nanods/gpt.py: RMSNorm, QK-norm, squared ReLU, zero output projections; with Muon

Each model trains on the same windows of pydocs (equal tokens), and then writes a few bytes. The
learning rates were chosen by hand among two or three, once, with seed 0; nothing else was tuned.

Shapes: B batch, T tokens, C width, H heads, D = C / H, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanods.bench.runs import describe_machine, write_json
from nanods.config import PRESETS
from nanods.data.text import load_text
from nanods.errors import run
from nanods.flags import parse_args
from nanods.gpt import GPT, GPTConfig, apply_rope, rope_cos_sin
from nanods.training.optimizers import make_optimizers, set_learning_rate

V, C, H, N_LAYER = 256, 64, 4, 4
B, T = 16, 128
VAL_WINDOWS = 256


# ---- the models ----------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Row i of the table holds the logits of the byte after byte i."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)
        nn.init.zeros_(self.table.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)  # (B, T) -> (B, T, V)


class Embedded(nn.Module):
    """An embedding, layers that read x (B, T, C) and add to it, and a head."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, C)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(C, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class OneToken(nn.Module):
    """An MLP. The layers below change what `mix` adds to a token from the tokens before it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.out = nn.Linear(4 * C, C, bias=False)

    def mix(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.out(self.up(x).relu())


class AveragedPast(OneToken):
    """Every token before counts the same, however useful."""

    def mix(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.size(1) + 1)[:, None]
        return x.cumsum(dim=1) / count


class OneHead(OneToken):
    """A weighted mean of the past: the weights are a softmax of q . k / sqrt(D)."""

    n_head = 1

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(C, C, bias=False) for _ in range(3))

    def rotate(self, x: Tensor) -> Tensor:
        return x

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            for linear in (self.query, self.key, self.value)
        )
        q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.mT / q.size(-1) ** 0.5  # (B, H, T, T)
        is_future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(is_future, -torch.inf).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Positions(OneHead):
    """Without RoPE, attention reads a bag of bytes: the order of the past makes no difference."""

    def rotate(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.size(2))[None]
        return apply_rope(x, rope_cos_sin(positions, x.size(3), x.dtype, base=1000.0))


class Heads(Positions):
    """Each head reads with weights of its own."""

    n_head = H


class WholeGPT(nn.Module):
    """nanods/gpt.py in the same size, with logits alone as its output."""

    def __init__(self, conv_width: int = 1) -> None:
        super().__init__()
        size = {"n_layer": N_LAYER, "n_head": H, "n_embd": C, "context_length": T}
        self.gpt = GPT(GPTConfig(**size, conv_width=conv_width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)[0]


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One model of the sequence, and how it is trained."""

    make: Callable[[], nn.Module]
    lr: float
    optimizer: str = "adamw"
    decay: float = 0.5
    """Share of the steps, the last ones, in which the learning rate falls to zero."""
    equal_neurons: bool = False
    """Muon: scale the rows of each update to one length."""


STEPS = {
    "bigram table": Step(Bigram, 0.03),
    "embedding, MLP": Step(lambda: Embedded(OneToken()), 0.01),
    "mean of the past": Step(lambda: Embedded(AveragedPast()), 0.01),
    "causal attention": Step(lambda: Embedded(OneHead()), 0.01),
    "positions (RoPE)": Step(lambda: Embedded(Positions()), 0.01),
    "4 heads": Step(lambda: Embedded(Heads()), 0.01),
    "4 blocks": Step(lambda: Embedded(*(Heads() for _ in range(N_LAYER))), 0.005),
    "the whole GPT, Muon": Step(WholeGPT, 0.02, "muon"),
}


@cache
def tokens_of(split: str) -> Tensor:
    """Return the bytes of pydocs, "train" or "val"."""
    return torch.from_numpy(getattr(load_text("pydocs"), split).astype("int64"))


def train(step: Step, steps: int, seed: int) -> Iterator[tuple[nn.Module, float]]:
    """Train a model, and yield it with its loss (nats) on the batch before each update."""
    torch.manual_seed(seed)
    model, text = step.make(), tokens_of("train")
    schedule = {"warmup": 0.03, "decay": step.decay, "weight_decay": 0.0}
    update = {"optimizer": step.optimizer, "lr": step.lr, "equal_neurons": step.equal_neurons}
    config = replace(PRESETS["v0-tiny"], steps=steps, **update, **schedule)
    optimizers = make_optimizers(config, model)
    windows = torch.Generator().manual_seed(seed)  # the same for each model
    for i in range(steps):
        start = torch.randint(len(text) - T, (B, 1), generator=windows)
        batch = text[start + torch.arange(T + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        yield model, loss.item()
        loss.backward()
        set_learning_rate(optimizers, i, config)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def bits_per_byte(model: nn.Module) -> float:
    """Return the loss on the first windows of the validation text."""
    windows = tokens_of("val")[: VAL_WINDOWS * (T + 1)].view(VAL_WINDOWS, T + 1)
    losses = []
    for batch in windows.split(B):
        logits = model(batch[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    return sum(losses) / len(losses) / math.log(2)


@torch.no_grad()
def write(model: nn.Module, prompt: str = "The ", length: int = 120) -> str:
    """Return what the model writes after a prompt, with one random stream for all models."""
    stream = torch.Generator().manual_seed(0)
    tokens = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        p = model(tokens[:, -T:])[0, -1].softmax(dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=stream)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


# ---- the bench -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    steps: int = 300
    """Steps of each model, of 16 windows of 128 bytes."""
    seeds: int = 2
    """Seeds of each model."""
    results: Path = Path("results")
    """Directory of the result file."""


def measure(step: Step, steps: int, seeds: int) -> dict:
    """Train one model on each seed. Return its losses, and what it writes with seed 0."""
    start, losses, text = time.process_time(), [], ""
    for seed in range(seeds):
        for trained, _ in train(step, steps, seed):
            model = trained
        losses.append(bits_per_byte(model))
        text = text or write(model)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "lr": step.lr,
        "val_bpb": losses,
        "cpu_seconds": (time.process_time() - start) / seeds,
        "sample": text,
    }


def main() -> None:
    args = parse_args(Args, __doc__)
    torch.set_num_threads(1)
    models = {}
    for name, step in STEPS.items():
        models[name] = measure(step, args.steps, args.seeds)
        losses = ", ".join(f"{loss:.3f}" for loss in models[name]["val_bpb"])
        print(f"{name:20} {losses} bits per byte", flush=True)
    table = {"machine": describe_machine("fp32"), "steps": args.steps, "tokens_per_step": B * T}
    write_json(args.results / "from_bigram.json", table | {"models": models})


if __name__ == "__main__":
    run(main)
