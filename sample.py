"""Let a trained model write: `python sample.py v1-tiny`, `python sample.py runs/my-run --prompt "def " --temperature 0.5`."""

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanods.config import PRESETS
from nanods.data.tokenizer import tokenizer_from_json
from nanods.errors import UserError, run
from nanods.training import checkpoint


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """A run directory, or a preset (then runs/PRESET)."""
    prompt: str = "\n"
    """The text to continue; FILE:path reads it from a file."""
    num_samples: int = 1
    """How many continuations, each from its own random stream."""
    max_new_tokens: int = 500
    """Tokens of each continuation."""
    temperature: float = 0.8
    """0 takes the likeliest token, 1 samples from the model's probabilities."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the fewest likeliest tokens that reach this probability together."""
    stop: str | None = None
    """End a continuation where this text appears."""
    seed: int = 0
    """Same seed, same text."""
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    """Where to compute."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check(args)
    out = Path("runs") / args.run if args.run in PRESETS else Path(args.run)
    if not out.is_dir():
        raise UserError(f"{out}: no such run. Presets: {', '.join(PRESETS)}; train one first, for example: make train-v1")
    saved = checkpoint.load(out)
    tokenizer = tokenizer_from_json(saved.state["tokenizer"])
    model = checkpoint.saved_model(saved).to(args.device)
    text = read_prompt(args.prompt)
    prompt = torch.tensor([tokenizer.encode(text).tolist()], device=args.device)
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"---- sample {number + 1}")
        print(text.lstrip("\n"), end="")
        decoder, written = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
        tokens = model.generate(
            prompt, args.max_new_tokens, None, args.temperature, args.top_k, args.top_p, seed=args.seed + number
        )
        for token in tokens:  # a character may need several tokens: print it when it is whole
            piece = decoder.decode(tokenizer.decode_bytes([int(token[0])]))
            written += piece
            print(piece, end="", flush=True)
            if args.stop and args.stop in written:
                break
        print(decoder.decode(b"", final=True))


def read_prompt(prompt: str) -> str:
    if prompt.startswith("FILE:"):
        try:
            prompt = Path(prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt {prompt}: cannot be read as UTF-8 text ({error})") from None
    if not prompt:
        raise UserError("--prompt is empty: the model continues a text, so give it at least one character")
    return prompt


def check(args: Args) -> None:
    if args.num_samples < 1 or args.max_new_tokens < 1:
        raise UserError("--num-samples and --max-new-tokens must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: must be 0 (always the likeliest token) or above")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top-k {args.top_k}: must be at least 1")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has none that PyTorch can use; leave the flag out")


if __name__ == "__main__":
    run(main)
