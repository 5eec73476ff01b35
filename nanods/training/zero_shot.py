"""Zero-shot classification: an example is compared with labels as it is with captions (CLIP,
Radford et al. 2021, arXiv:2103.00020, section 3.1).

Each label is written into a prompt, such as "a photo of a {}". The model's similarities with the
prompts, at its own temperature, give the probabilities of the labels.

Left out on purpose: the mean over several prompts of each label (CLIP's ensembling).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from nanods.config import Config
from nanods.data.decoding import decode_text
from nanods.data.examples import caption_key
from nanods.errors import UserError
from nanods.training.contrastive_data import encode_captions
from nanods.training.retrieval import embed, logit_scale

MOST_LABELS = 10_000


def read_labels(text: str | None, file: Path | None) -> tuple[list[str], list[str]]:
    """Return the labels of --labels, between commas, or of --labels-file, one on each line; and
    notices of what was left out.

    Labels that say the same, case and blanks aside, are one. Raises UserError unless there are
    between 2 and MOST_LABELS.
    """
    name = f"--labels {text}" if file is None else f"--labels-file {file}"
    given = text.split(",") if file is None else read_file(file).splitlines()
    labels: dict[str, str] = {}
    blank = repeated = 0
    for label in (" ".join(label.split()) for label in given):
        blank += not label
        repeated += bool(label) and caption_key(label) in labels
        if label:
            labels.setdefault(caption_key(label), label)
    form = "put commas between them" if file is None else "write one on each line"
    if len(labels) < 2:
        raise UserError(
            f"{name}: {len(labels) or 'no'} label{'' if len(labels) == 1 else 's'}; give two or "
            f"more, and {form}"
        )
    if len(labels) > MOST_LABELS:
        raise UserError(
            f"{name}: {len(labels):,} labels, and at most {MOST_LABELS:,} are compared; leave out "
            "some"
        )
    notices = []
    if repeated:
        notices.append(f"left out {repeated:,} of {len(given):,} labels, which repeat others")
    if blank and file is None:
        notices.append(f"left out {blank:,} of {len(given):,} labels, which are blank")
    return list(labels.values()), notices


def read_file(file: Path) -> str:
    """Return the text of --labels-file. Raises UserError if it is empty or no text."""
    try:
        return decode_text(str(file), file.read_bytes())
    except OSError as error:
        raise UserError(
            f"--labels-file {file}: cannot be read ({error.strerror}); give a text file with one "
            "label on each line"
        ) from None
    except UserError as error:
        raise UserError(str(error).replace("--data", "--labels-file", 1)) from None


def fill_template(template: str, labels: list[str]) -> list[str]:
    """Return the prompt of each label. Raises UserError unless the template has one {}."""
    if template.count("{}") != 1:
        raise UserError(
            f"--prompt-template {template!r}: write {{}} once, where the label is to stand, as in "
            "'a photo of a {}'"
        )
    return [" ".join(template.replace("{}", label).split()) for label in labels]


def describe_cut_prompts(prompts: list[str], tokenizer, max_tokens: int) -> str | None:
    """Return how many prompts are longer than the model reads, and how many of those end up equal,
    in words; None if none is."""
    cut = [tuple(ids) for ids in map(tokenizer.encode, prompts) if len(ids) > max_tokens]
    if not cut:
        return None
    equal = len(cut) - len({ids[:max_tokens] for ids in cut})
    same = f"; {equal:,} then equal to another: shorten them" if equal else ""
    return f"{len(cut):,} of {len(prompts):,} prompts after {max_tokens} tokens{same}"


@torch.no_grad()
def label_probabilities(
    model: nn.Module, embedding: Tensor, prompts: list[str], config: Config, tokenizer
) -> Tensor:
    """Return the probability of each of C prompts for an embedding (M,): (C,), fp64, on the CPU."""
    texts = encode_captions(prompts, tokenizer, config.model.context_length)
    classes, _ = embed(model, {"text": texts.to(embedding.device)})
    similarities = classes["text"].cpu().double() @ embedding.cpu().double()
    return (logit_scale(model) * similarities).softmax(dim=0)
