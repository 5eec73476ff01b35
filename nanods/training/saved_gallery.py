"""The held-out examples of a run of V3 on files, kept in its directory: so sample.py needs no data.

The words of the training captions are kept too, to say which words of a query are unknown.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nanods.data.examples import Examples
from nanods.errors import UserError
from nanods.files import write_and_rename

FILE = "gallery.safetensors"
PRESENT = "present."  # begins the name of a mask in it
# Scripts without blanks between words: Thai, Lao, Burmese, Khmer, Chinese and Japanese.
NO_BLANKS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\ua4cf\uf900-\ufaff"
WORD = re.compile(rf"[{NO_BLANKS}]|[^\W{NO_BLANKS}]+")


class SavedGallery(NamedTuple):
    examples: Examples
    words: frozenset[str]
    """Those of the training captions."""


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case; of a script without blanks, its characters."""
    return WORD.findall(text.casefold())


def save_gallery(run_dir: Path, gallery: Examples, train_text: str) -> None:
    """Write the gallery and the words of the training captions.

    Images are stored with 8 bits and waves, which are only listened to, with 16.
    """
    arrays = {}
    present = gallery.present or {}
    fields = vars(gallery) | {PRESENT + name: x for name, x in present.items()}
    for name, values in fields.items():
        if isinstance(values, np.ndarray):
            if name == "images":
                values = np.round(255 * values).astype(np.uint8)
            elif name == "waves":
                values = np.round(32767 * np.clip(values, -1, 1)).astype(np.int16)
            arrays[name] = np.ascontiguousarray(values)
    words = sorted(set(words_of(train_text)))
    metadata = {"captions": json.dumps(gallery.captions), "words": json.dumps(words)}
    data = save(arrays, metadata)
    write_and_rename(run_dir / FILE, lambda file: file.write(data))


def load_gallery(run_dir: Path) -> SavedGallery | None:
    """Do the inverse of `save_gallery`. Returns None for a run without one; raises UserError for a
    damaged one."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        captions, words = json.loads(metadata["captions"]), json.loads(metadata["words"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete it, and sample.py reads the run's data instead"
        ) from None
    if "images" in arrays:
        arrays["images"] = arrays["images"].astype(np.float32) / np.float32(255)
    if "waves" in arrays:
        arrays["waves"] = arrays["waves"].astype(np.float32) / np.float32(32767)
    names = [name for name in arrays if name.startswith(PRESENT)]
    present = {name.removeprefix(PRESENT): arrays.pop(name) for name in names} or None
    examples = Examples(captions=captions, present=present, **arrays)
    return SavedGallery(examples, frozenset(words))
