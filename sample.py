"""Sample a trained model.

V0 to V2 generate text:    python sample.py v1-tiny
                           python sample.py runs/my-run --prompt "def " --temperature 0.5
A fine-tuned run answers:  python sample.py runs/v1-tiny-finetuned --chat
V3 retrieves:              python sample.py v3-tiny --query "a red circle left of a blue square"
                           python sample.py v3-tiny --image FILE      (or --audio FILE)
V3 classifies:             python sample.py v3-tiny --image FILE --labels "cat, dog, boat"

Several processes split the attention heads between them (docs/SCALING.md):

    python -m nanods.distributed.launch --standalone --nproc-per-node 2 sample.py v1-tiny
"""

import codecs
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.image
import numpy as np
import torch
import tyro
from torch import Tensor

from nanods import plots, plots_multimodal
from nanods.command_line import typed_flags
from nanods.config import Config
from nanods.data.caption_dataset import read_image, read_sound
from nanods.data.examples import Examples, caption_key
from nanods.data.instructions import END, mark_ids, prompt_tokens
from nanods.data.scenes import check_scene_words, normalized_log_mel
from nanods.data.sound import RATE, samples_of, wav_seconds, write_wav
from nanods.distributed.rendezvous import run_distributed
from nanods.errors import UserError
from nanods.files import write_and_rename
from nanods.flags import from_environment, parse_args
from nanods.gpt import GPT
from nanods.multimodal import MODALITIES, Multimodal
from nanods.training.contrastive_data import encode_captions, held_out_examples, model_inputs
from nanods.training.finished_run import FinishedRun, load_run
from nanods.training.retrieval import embed, logit_scale
from nanods.training.saved_gallery import words_of
from nanods.training.zero_shot import (
    describe_cut_prompts,
    fill_template,
    label_probabilities,
    read_labels,
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
    chat: bool = False
    """Answer --prompt, or without one each line that is typed: for a run on instructions. The
    conversation so far is read again, as much of it as fits."""
    stop: str | None = None
    """End a continuation where this text appears."""
    seed: int = 0
    """Same seed, same text."""
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    """Where to compute."""
    query: str | None = None
    """V3: find what this text describes. Default: the first held-out caption."""
    image: Path | None = None
    """V3: find what matches this JPEG or PNG."""
    audio: Path | None = None
    """V3: find what matches this WAV file."""
    gallery: Path | None = None
    """V3: where to search, a folder of images and WAV files. Default: the held-out examples."""
    top: int = 5
    """V3: how many to show, best first."""
    labels: str | None = None
    """V3: classify the query instead: labels to choose from, between commas."""
    labels_file: Path | None = None
    """V3: a text file with such labels, one on each line."""
    prompt_template: str = "{}"
    """V3: what the model reads for each label, such as "a photo of a {}"."""


GENERATING = (
    "prompt", "num-samples", "max-new-tokens", "temperature", "top-k", "top-p", "stop", "seed",
    "chat",
)  # fmt: skip
RETRIEVING = (
    "query", "image", "audio", "gallery", "top", "labels", "labels-file", "prompt-template",
)  # fmt: skip


def main() -> None:
    args = parse_args(Args, __doc__)
    check_args(args)
    finished = load_run(args.run, args.device)
    is_v3 = bool(finished.config.multimodal.modalities)
    typed = typed_flags(sys.argv[1:])
    useless = [f"--{name}" for name in (GENERATING if is_v3 else RETRIEVING) if name in typed]
    if useless:
        does, other = "generates text and neither retrieves nor classifies", "a run of V3"
        if is_v3:
            does, other = "retrieves and classifies, and generates no text", "a run of V0 to V2"
        raise UserError(f"{finished.folder} {does}: drop {' and '.join(useless)}, or name {other}")
    if from_environment("WORLD_SIZE", 1) > 1:
        if args.chat and "prompt" not in typed:
            raise UserError("--chat: only one process can read what you type; give a --prompt")
        split_model(args, finished.model)
    if args.chat:
        chat(args, finished, "prompt" in typed)
    elif not is_v3:
        generate(args, finished.model, finished.tokenizer)
    elif args.labels is not None or args.labels_file:
        classify(args, finished)
    else:
        retrieve(args, finished.config, finished.model, finished.tokenizer, finished.folder)


def check_args(args: Args) -> None:
    """Raise UserError for values out of range."""
    if 0 < args.temperature < 1e-6:
        raise UserError(
            f"--temperature {args.temperature}: must be 0 (always the likeliest token), or 1e-6 or "
            "more"
        )
    if args.labels is not None and args.labels_file:
        raise UserError("--labels and --labels-file: give one of them")
    if args.labels is not None or args.labels_file:
        fill_template(args.prompt_template, [])
        if args.gallery:
            raise UserError("--gallery: labels are what the query is compared with; leave one out")
    elif args.prompt_template != Args.prompt_template:
        raise UserError("--prompt-template is for labels: give --labels, or leave it out")


def is_main_process() -> bool:
    """Return whether this process writes files: one of several does."""
    return from_environment("RANK", 0) == 0


def split_model(args: Args, model: GPT | Multimodal) -> None:
    """Connect to the other processes, keep this one's share of the model, and print what a token
    sends. Raises UserError if the heads do not divide, and for another device than the backend's.
    """
    from nanods.distributed.process_groups import ProcessGroups
    from nanods.distributed.tensor_parallel import all_reduced_numbers

    P = from_environment("WORLD_SIZE", 1)
    processes = ProcessGroups(f"tp={P}", mesh_reason=f"1/{P} of the heads each")
    if args.device != processes.device:
        raise UserError(f"--device {args.device}: several processes need {processes.device} here")
    processes.shard_model(model, torch.device(args.device))
    blocks = model.trunk_blocks(next(iter(model.tokens_per_example())))
    sizes = all_reduced_numbers(blocks)
    # A ring: each process sends 2 (P - 1) of P parts.
    sent = 2 * (P - 1) / P * sum(sizes) * next(model.parameters()).itemsize
    print(f"processes  {processes}: a token sends {sent:,.0f} bytes each, in {len(sizes)} sums")


# ---- V0 to V2: generate text ---------------------------------------------------------------------


def generate(args: Args, model: GPT, tokenizer) -> None:
    """Print continuations of the prompt, token by token."""
    text = read_prompt(args.prompt)
    prompt = torch.tensor([tokenizer.encode(text).tolist()], device=args.device)
    report_unread_tokens(prompt.shape[1], model.config.context_length)
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"---- sample {number + 1}")
        print(text.lstrip("\n"), end="")
        print_tokens(args, tokenizer, new_tokens(args, model, prompt, args.seed + number))


def print_tokens(args: Args, tokenizer, tokens: Iterable[int]) -> str:
    """Print tokens as text while they come, up to --stop. Returns the text."""
    # A character may take several tokens: the decoder returns it when it is whole.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    for token in tokens:
        piece = decoder.decode(tokenizer.decode_bytes([token]))
        text += piece
        print(piece, end="", flush=True)
        if args.stop and args.stop in text:
            break
    print(decoder.decode(b"", final=True))
    return text


def new_tokens(args: Args, model: GPT, prompt: Tensor, seed: int, stop=()) -> Iterator[int]:
    """Yield the tokens that the model adds to a prompt (1, T), up to one of `stop`."""
    tokens = model.generate(
        prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=stop,
        seed=seed,
    )
    for token in tokens:
        yield int(token[0])


def chat(args: Args, finished: FinishedRun, is_asked: bool) -> None:
    """Answer the prompt of the command line if it `is_asked`, else each line of stdin.

    An answer ends where the model ends it (END), at --stop, or after --max-new-tokens. Raises
    UserError for a run that has not learnt to answer.
    """
    if not finished.state.get("answers"):
        raise UserError(
            f"{finished.folder} has not learnt to answer: train one on instructions (make "
            "finetune-v1), or leave --chat out"
        )
    if args.num_samples > 1:
        raise UserError("--num-samples: --chat gives one answer; leave one of them out")
    model, tokenizer = finished.model, finished.tokenizer
    end, messages = mark_ids(tokenizer)[END], []
    if not is_asked and sys.stdin.isatty():
        print("ask a question; an empty line ends the conversation")
    for text in [read_prompt(args.prompt)] if is_asked else questions():
        messages.append(("user", text))
        tokens = prompt_tokens(messages, tokenizer)
        report_unread_tokens(len(tokens), model.config.context_length)
        prompt = torch.tensor([tokens], device=args.device)
        tokens = new_tokens(args, model, prompt, args.seed + len(messages) // 2, stop=[end])
        answer = print_tokens(args, tokenizer, takewhile(lambda token: token != end, tokens))
        messages.append(("assistant", answer))


def report_unread_tokens(tokens: int, context_length: int) -> None:
    """Print that the beginning of a prompt is not read, if it is longer than the context."""
    if tokens > context_length:
        print(f"notice     only the last {context_length} tokens are read")


def questions() -> Iterator[str]:
    """Yield the lines that are typed, up to an empty one or the end of stdin."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def read_prompt(prompt: str) -> str:
    """Return the prompt, from a file if it is FILE:path. Raises UserError if it is empty."""
    if prompt.startswith("FILE:"):
        try:
            prompt = Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt {prompt}: cannot be read as UTF-8 text ({error})") from None
    if not prompt:
        raise UserError(
            "--prompt is empty: the model continues a text, so give it at least one character"
        )
    return prompt


# ---- V3: classify --------------------------------------------------------------------------------


def classify(args: Args, finished: FinishedRun) -> None:
    """Print the likeliest labels of the query."""
    config, tokenizer = finished.config, finished.tokenizer
    if "text" not in config.multimodal.modalities:
        raise UserError(
            f"{finished.folder} was trained on {' and '.join(config.multimodal.modalities)}, so it "
            "reads no labels: leave them out"
        )
    if args.query is None and not args.image and not args.audio:
        flags = [flag for name, flag in QUERY_FLAGS.items() if name in config.multimodal.modalities]
        raise UserError(f"--labels: say what to classify, by {' or '.join(flags)}")
    labels, notices = read_labels(args.labels, args.labels_file)
    prompts = fill_template(args.prompt_template, labels)
    query = read_query(args, config, tokenizer, finished.folder)
    for notice in notices:
        print(f"notice     {notice}")
    report_unknown_words(" ".join(prompts), config, finished.folder)
    if cut := describe_cut_prompts(prompts, tokenizer, config.model.context_length):
        print(f"cut        {cut}")
    embedding = embed_one_modality(finished.model, query.modality, query.inputs, args.device)[0]
    probabilities = label_probabilities(finished.model, embedding, prompts, config, tokenizer)
    print(
        f"labels     {len(labels):,}, each read as {args.prompt_template!r}; probabilities at the "
        f"model's temperature of {1 / logit_scale(finished.model):.4f}"
    )
    best = probabilities.argsort(descending=True, stable=True).tolist()[: args.top]
    for rank, i in enumerate(best, start=1):
        print(f"{rank:>4}. {probabilities[i]:6.4f}  {labels[i]}")
    if len(best) < len(labels):
        rest = (1 - probabilities[best].sum()).clamp(min=0)
        print(f"      {rest:6.4f}  the other {len(labels) - len(best):,} together")


# ---- V3: retrieve --------------------------------------------------------------------------------


@dataclass
class Query:
    modality: str
    inputs: Tensor  # (1, ...): what the model reads
    shown: str | np.ndarray  # what the picture shows


@dataclass
class Gallery:
    """The examples of one modality among which to search."""

    inputs: Tensor  # (Q, ...): what the model reads
    shown: list[str] | np.ndarray  # (Q, ...): what the picture shows
    captions: list[str]
    waves: np.ndarray | None = None  # of sounds, to save the best one


def retrieve(args: Args, config: Config, model: Multimodal, tokenizer, run_dir: Path) -> None:
    """Print the examples nearest to the query, by modality, and save the best ones.

    Writes found.png, a contact sheet, and found_image.png and found_audio.wav.
    """
    query = read_query(args, config, tokenizer, run_dir)
    if args.gallery:
        galleries = folder_galleries(args.gallery, config)
    else:
        galleries = held_out_galleries(config, tokenizer, run_dir)
    embedding = embed_one_modality(model, query.modality, query.inputs, args.device)[0]  # (M,)
    rows, files = [], [run_dir / "found.png"]
    others = [name for name in galleries if name != query.modality]
    for name in others or [query.modality]:
        gallery = galleries[name]
        targets = embed_one_modality(model, name, gallery.inputs, args.device)  # (Q, M)
        scores = (targets @ embedding).cpu()  # (Q,)
        best = scores.argsort(descending=True, stable=True).tolist()
        if name == "text":
            best = first_of_equal_texts(best, gallery.captions)
        print(f"{name}, the best of {len(best)}:")
        best = best[: args.top]
        for rank, i in enumerate(best, start=1):
            print(f"{rank:>4}. {scores[i]:6.3f}  {gallery.captions[i]}")
        results = [(gallery.shown[i], gallery.captions[i], scores[i].item()) for i in best]
        rows.append((query.shown, "", results, ()))
        if not is_main_process():
            continue
        if name == "image":
            files.append(run_dir / "found_image.png")
            pixels = gallery.shown[best[0]].transpose(1, 2, 0)
            write_and_rename(files[-1], lambda file, x=pixels: matplotlib.image.imsave(file, x))
        elif name == "audio":
            files.append(run_dir / "found_audio.wav")
            wave = gallery.waves[best[0]]
            write_and_rename(files[-1], lambda file, x=wave: write_wav(file, x))
    if is_main_process():
        plots.save(plots_multimodal.neighbours(rows, "what the query finds, best first"), files[0])
    print(f"wrote      {', '.join(map(str, files))}")


def first_of_equal_texts(best: list[int], captions: list[str]) -> list[int]:
    """Return the indices of captions, best first, without those that say what a better one says."""
    by_text = {}
    for i in best:
        by_text.setdefault(caption_key(captions[i]), i)
    return list(by_text.values())


def embed_one_modality(model: Multimodal, name: str, inputs: Tensor, device: str) -> Tensor:
    """Return the embeddings (Q, M) of the inputs of one modality."""
    embeddings, _ = embed(model, {name: inputs.to(device)})
    return embeddings[name]


QUERY_FLAGS = {"text": "--query", "image": "--image", "audio": "--audio"}


def read_query(args: Args, config: Config, tokenizer, run_dir: Path) -> Query:
    """Return the query of the command line, cut as the examples were in training. Raises UserError
    unless it is exactly one, of a modality that the model knows."""
    modalities, multimodal = config.multimodal.modalities, config.multimodal
    given = {"text": args.query, "image": args.image, "audio": args.audio}
    given = {name: value for name, value in given.items() if value is not None}
    if not given and "text" in modalities:
        given = {"text": next(filter(None, own_examples(config, run_dir).captions))}
        print(f"query      {given['text']}")
    if len(given) != 1 or not given.keys() <= set(modalities):
        flags = " and ".join(QUERY_FLAGS[name] for name in given) or "no query"
        known = [QUERY_FLAGS[name] for name in modalities if name in QUERY_FLAGS]
        raise UserError(f"{flags}: give this model one query, by {' or '.join(known)}")
    ((name, value),) = given.items()
    if name == "image":
        image = read_image(value, multimodal.image_size)
        return Query(name, torch.from_numpy(image)[None], image)
    if name == "audio":
        report_cut_sounds([value], multimodal.frames)
        mel = normalized_log_mel(read_sound(value, multimodal.frames))
        return Query(name, torch.from_numpy(mel)[None], mel)
    text = " ".join(value.split())
    tokens, max_tokens = len(tokenizer.encode(text)), config.model.context_length
    if not tokens:
        raise UserError("--query has no word in it: describe what to find")
    if config.data == "scenes":
        text = check_scene_words(text)
    elif args.query is not None:
        report_unknown_words(text, config, run_dir)
    if tokens > max_tokens:
        print(f"cut        the query, of {tokens} tokens, after {max_tokens}, as in training")
    return Query(name, encode_captions([text], tokenizer, max_tokens), text)


def report_unknown_words(text: str, config: Config, run_dir: Path) -> None:
    """Print which words of a query no training caption contains."""
    try:
        known = held_out_examples(config, run_dir).words
    except UserError:  # a gallery is given, and the run's own captions are gone
        return
    words = list(dict.fromkeys(words_of(text)))
    unknown = [word for word in words if word not in known]
    if not unknown:
        return
    some = ", ".join(word[:40] for word in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    if len(unknown) == len(words):
        print(f"notice     the model has read none of these words: {some}. Expect no good match")
    else:
        print(f"notice     words that the model has never read: {some}")


def report_cut_sounds(files: list[Path], frames: int) -> None:
    """Print how many sounds are longer than the model hears."""
    limit = samples_of(frames)
    cut = [file for file in files if round(wav_seconds(file) * RATE) > limit]
    if cut:
        first = f"{cut[0]}" if len(files) == 1 else f"{len(cut)} of {len(files)} sounds"
        print(f"cut        {first} after {limit / RATE:.3g} s, as in training")


def own_examples(config: Config, run_dir: Path) -> Examples:
    """Return the held-out examples of the run's data."""
    try:
        return held_out_examples(config, run_dir).examples
    except UserError as error:
        raise UserError(
            f"{error}, so search other ones: give --gallery FOLDER and a query"
        ) from None


def held_out_galleries(config: Config, tokenizer, run_dir: Path) -> dict[str, Gallery]:
    """Return the held-out examples of the run's data, by modality."""
    examples = own_examples(config, run_dir)
    galleries = {}
    for name, inputs in model_inputs(examples, config, tokenizer).items():
        shown = getattr(examples, MODALITIES[name].input_field)
        has = np.flatnonzero(examples.has(name))  # not the examples that lack this modality
        captions = [examples.captions[i] for i in has]
        shown = captions if name == "text" else shown[has]
        waves = None if examples.waves is None else examples.waves[has]
        galleries[name] = Gallery(inputs[has], shown, captions, waves)
    return galleries


def folder_galleries(folder: Path, config: Config) -> dict[str, Gallery]:
    """Return the images and sounds in a folder, captioned by their file names.

    Files that cannot be read are counted and left out. Raises UserError if none can be read.
    """
    if not folder.is_dir():
        raise UserError(
            f"--gallery {folder}: no such folder; name one that holds images (jpg, png) or sounds "
            "(wav)"
        )
    multimodal, images, waves, skipped, others = config.multimodal, {}, {}, [], []
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        try:
            if suffix in (".jpg", ".jpeg", ".png") and "image" in multimodal.modalities:
                images[path.name] = read_image(path, multimodal.image_size)
            elif suffix == ".wav" and "audio" in multimodal.modalities:
                waves[path.name] = read_sound(path, multimodal.frames)
            elif path.is_file() and not path.name.startswith("."):
                others.append(path.name)
        except UserError as error:
            skipped.append(str(error))
    if skipped:
        print(
            f"warning: {len(skipped)} files cannot be read, the first: {skipped[0]}",
            file=sys.stderr,
        )
    if others:
        print(f"not read: {len(others)} other files, the first: {others[0]}", file=sys.stderr)
    galleries = {}
    if images:
        stacked = np.stack(list(images.values()))
        galleries["image"] = Gallery(torch.from_numpy(stacked), stacked, list(images))
    if waves:
        report_cut_sounds([folder / name for name in waves], multimodal.frames)
        stacked = np.stack(list(waves.values()))
        mels = normalized_log_mel(stacked)
        galleries["audio"] = Gallery(torch.from_numpy(mels), mels, list(waves), stacked)
    if not galleries:
        readable = ", ".join(name for name in multimodal.modalities if name != "text")
        raise UserError(
            f"--gallery {folder} is empty: it holds nothing that can be read and that this model "
            f"knows ({readable}); put jpg, png or wav files into it"
        )
    return galleries


if __name__ == "__main__":
    run_distributed(main, "and copy the run there")
