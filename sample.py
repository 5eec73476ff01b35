"""Let a trained model write: `python sample.py v1-tiny`, `python sample.py runs/my-run --prompt
"def " --temperature 0.5`. Or, V3, let it find: `python sample.py v3-tiny --query "a red circle left
of a blue square"`, `--image FILE`, `--audio FILE`.
"""

import codecs
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.image
import numpy as np
import torch
import tyro
from torch import Tensor

from nanods import plots, plots_multimodal
from nanods.config import PRESETS, Config, from_dict
from nanods.data.caption_dataset import read_image, read_sound
from nanods.data.scenes import normalized_log_mel, vocabulary
from nanods.data.sound import write_wav
from nanods.data.tokenizer import tokenizer_from_json
from nanods.errors import UserError, run
from nanods.multimodal import MODALITIES
from nanods.training import checkpoint
from nanods.training.contrastive_task import (
    MAX_GALLERY,
    embed,
    encode_captions,
    load_dataset,
    model_inputs,
)


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
    query: str | None = None
    """V3: find what this text describes. Where nothing is asked, it is the first caption held out.
    """
    image: Path | None = None
    """V3: find what belongs to this JPEG or PNG."""
    audio: Path | None = None
    """V3: find what belongs to this WAV file."""
    gallery: Path | None = None
    """V3: where to look, a folder of images and WAV files. Default: what the training held out."""
    top: int = 5
    """V3: how many to show, best first."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check(args)
    out = Path("runs") / args.run if args.run in PRESETS else Path(args.run)
    if not out.is_dir():
        raise UserError(
            f"{out}: no such run. Presets: {', '.join(PRESETS)}; train one first, for example: make train-v1"
        )
    saved = checkpoint.load(out)
    config, tokenizer = (
        from_dict(saved.state["config"]),
        tokenizer_from_json(saved.state["tokenizer"]),
    )
    model = checkpoint.load_model(saved).to(args.device)
    if config.multimodal.modalities:
        find(args, config, model, tokenizer, out)
    elif args.query or args.image or args.audio or args.gallery:
        raise UserError(
            f"{out} writes and does not find: drop --query, --image, --audio and --gallery, or name a run of V3"
        )
    else:
        write(args, model, tokenizer)


# ---- V0 to V2 write ------------------------------------------------------------------------------


def write(args: Args, model, tokenizer) -> None:
    """Print what the model makes of the prompt, token by token."""
    text = read_prompt(args.prompt)
    prompt = torch.tensor([tokenizer.encode(text).tolist()], device=args.device)
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"---- sample {number + 1}")
        print(text.lstrip("\n"), end="")
        decoder, written = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
        tokens = model.generate(
            prompt,
            args.max_new_tokens,
            None,
            args.temperature,
            args.top_k,
            args.top_p,
            seed=args.seed + number,
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
        raise UserError(
            "--prompt is empty: the model continues a text, so give it at least one character"
        )
    return prompt


# ---- V3 finds ------------------------------------------------------------------------------------


@dataclass
class Gallery:
    """What there is to find, of one modality."""

    inputs: Tensor  # (Q, ...): what the model reads
    shown: list[str] | np.ndarray  # (Q, ...): what a picture shows of it
    captions: list[str]
    waves: np.ndarray | None = None


def find(args: Args, config: Config, model, tokenizer, out: Path) -> None:
    """Print what is nearest to the question, by modality; write found.png, a contact sheet, and the
    best image and sound."""
    galleries = (
        folder_galleries(args.gallery, config)
        if args.gallery
        else held_out_galleries(config, tokenizer)
    )
    name, inputs, shown = question(args, config, tokenizer)
    embedding = embed(model, {name: inputs.to(args.device)})[0][name][0]  # (M,)
    rows, files = [], [out / "found.png"]
    for kind in [kind for kind in galleries if kind != name] or [name]:
        gallery = galleries[kind]
        scores = embed(model, {kind: gallery.inputs.to(args.device)})[0][kind] @ embedding  # (Q,)
        best = scores.argsort(descending=True, stable=True)[: args.top].tolist()
        print(f"{kind}, the best of {len(scores)}:")
        for rank, i in enumerate(best, start=1):
            print(f"{rank:>4}. {scores[i]:6.3f}  {gallery.captions[i]}")
        rows.append(
            (
                shown,
                "",
                [(gallery.shown[i], gallery.captions[i], scores[i].item()) for i in best],
                None,
            )
        )
        if kind == "image":
            files.append(out / "found_image.png")
            matplotlib.image.imsave(files[-1], gallery.shown[best[0]].transpose(1, 2, 0))
        elif kind == "audio":
            files.append(out / "found_audio.wav")
            write_wav(files[-1], gallery.waves[best[0]])
    plots.save(plots_multimodal.neighbours(rows, "what the question finds, best first"), files[0])
    print(f"wrote      {', '.join(map(str, files))}")


def question(args: Args, config: Config, tokenizer) -> tuple[str, Tensor, str | np.ndarray]:
    """What is asked: its modality, what the model reads (a batch of one), and what a picture shows
    of it."""
    known, ends = config.multimodal.modalities, config.multimodal
    asked = {"text": args.query, "image": args.image, "audio": args.audio}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked and "text" in known:
        asked = {"text": load_dataset(config).gallery(1).captions[0]}
        print(f"question   {asked['text']}")
    flags = {"text": "--query", "image": "--image", "audio": "--audio"}
    if len(asked) != 1 or not asked.keys() <= set(known):
        raise UserError(
            f"{' and '.join(flags[name] for name in asked) or 'no question'}: ask this model one thing, by "
            f"{' or '.join(flags[name] for name in known)}"
        )
    ((name, value),) = asked.items()
    if name == "image":
        image = read_image(value, ends.image_size)
        return name, torch.from_numpy(image)[None], image
    if name == "audio":
        mel = normalized_log_mel(read_sound(value, ends.frames))
        return name, torch.from_numpy(mel)[None], mel
    text = " ".join(value.split())
    if config.data == "scenes":
        text = " ".join(word.strip(",.;:!?") for word in text.lower().split())
        for word in text.split():
            if word not in vocabulary():
                near = difflib.get_close_matches(word, vocabulary(), cutoff=0.7) or sorted(
                    vocabulary()
                )
                raise UserError(
                    f"--query: the model has never read {word!r}; it knows {', '.join(near)}"
                )
    tokens = len(tokenizer.encode(text))
    if not 1 <= tokens <= config.model.context_length:
        raise UserError(
            f"--query has {tokens} tokens: this model reads 1 to {config.model.context_length}"
        )
    return name, encode_captions([text], tokenizer, tokens), text


def held_out_galleries(config: Config, tokenizer) -> dict[str, Gallery]:
    """What the training held out, in each of its modalities."""
    data = load_dataset(config)
    items = data.gallery(min(MAX_GALLERY, len(data.held_out)))
    read = model_inputs(items, config, tokenizer)
    return {
        name: Gallery(x, getattr(items, MODALITIES[name].input_field), items.captions, items.waves)
        for name, x in read.items()
    }


def folder_galleries(folder: Path, config: Config) -> dict[str, Gallery]:
    """The images and sounds in a folder, under their names; files that cannot be read are counted
    and left out."""
    ends, found, skipped = config.multimodal, {"image": {}, "audio": {}}, []
    if not folder.is_dir():
        raise UserError(
            f"--gallery {folder}: no such folder; name one that holds images (jpg, png) or sounds (wav)"
        )
    for path in sorted(folder.iterdir()):
        kind = {".jpg": "image", ".jpeg": "image", ".png": "image", ".wav": "audio"}.get(
            path.suffix.lower()
        )
        if kind in ends.modalities:
            try:
                read = (
                    read_image(path, ends.image_size)
                    if kind == "image"
                    else read_sound(path, ends.frames)
                )
                found[kind][path.name] = read
            except UserError as error:
                skipped.append(str(error))
    if skipped:
        print(
            f"warning: {len(skipped)} files cannot be read, the first: {skipped[0]}",
            file=sys.stderr,
        )
    galleries = {}
    if found["image"]:
        images = np.stack(list(found["image"].values()))
        galleries["image"] = Gallery(torch.from_numpy(images), images, list(found["image"]))
    if found["audio"]:
        waves = np.stack(list(found["audio"].values()))
        mels = normalized_log_mel(waves)
        galleries["audio"] = Gallery(torch.from_numpy(mels), mels, list(found["audio"]), waves)
    if not galleries:
        raise UserError(
            f"--gallery {folder} is empty: it holds nothing that can be read and that this model knows "
            f"({', '.join(name for name in ends.modalities if name != 'text')}); put jpg, png or wav files into it"
        )
    return galleries


def check(args: Args) -> None:
    if args.num_samples < 1 or args.max_new_tokens < 1:
        raise UserError("--num-samples and --max-new-tokens must be at least 1")
    if args.temperature < 0:
        raise UserError(
            f"--temperature {args.temperature}: must be 0 (always the likeliest token) or above"
        )
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top-k {args.top_k}: must be at least 1")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.top < 1:
        raise UserError(f"--top {args.top}: at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this machine has none that PyTorch can use; leave the flag out"
        )


if __name__ == "__main__":
    run(main)
