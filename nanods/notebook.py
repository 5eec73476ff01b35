"""What the notebooks in lessons/ share: where they run, tables, and the learner's own answers.

    start()                                          the first cell of each notebook
    compare("01", "topk_mask", scores, 4, reference=topk_mask)
    show_verdicts("V1.1", "V1.2")                    the last section of each notebook

`compare` runs the learner's function beside the reference, on the same tensors. It only shows that
both agree here: `make check-01` grades the function, on many more cases.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from IPython.display import Markdown, display
from torch import Tensor

ROOT = Path(__file__).parents[1]
ARTICLE = ROOT / "lessons" / "ARTICLE.md"
EXERCISES = ROOT / "lessons" / "exercises"
TOLERANCE = {torch.float64: 1e-9}  # all other types are fp32 or exact
TIMED_SECONDS = 0.2


def start(threads: int = 1) -> None:
    """Change to the repository's root, and fix the seed and the number of threads.

    So a notebook runs from any folder, and a second run gives the same results. The tensors are
    small: with two threads, each would wait for the other.
    """
    os.chdir(ROOT)
    torch.manual_seed(0)
    torch.set_num_threads(threads)


def show_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Display a table. `head` names its columns."""
    lines = [head, ["---"] * len(head), *rows]
    display(Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)))


def show_verdicts(*claims: str) -> None:
    """Display the rows of lessons/ARTICLE.md about these claims of the article, by their ids.

    tests/lessons/test_article.py compares the figures in those rows with results/.
    """
    rows = {}
    for line in ARTICLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        rows[cells[0]] = cells
    show_table(["id", "the article claims", "what is known"], [rows[claim] for claim in claims])


def compare(
    lesson: str,
    name: str,
    *arguments: object,
    reference: Callable,
    view: Callable = lambda output: output,
) -> None:
    """Print whether the learner's function `name` of an exercise agrees with `reference`, and how
    long it takes beside it. It does no harm if it is not written yet, or fails.

    `view`: what is compared of each output, where different ones are right."""
    (path,) = (p for p in EXERCISES.glob(f"{lesson}_*.py") if not p.stem.endswith("solutions"))
    print(f"yours      {verdict(path, name, arguments, reference, view)}")


def verdict(
    path: Path,
    name: str,
    arguments: Sequence[object],
    reference: Callable,
    view: Callable = lambda output: output,
) -> str:
    """Return what `compare` prints of the function `name` in the file `path`."""
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    try:
        yours = getattr(load(path), name)
        outputs = as_tuple(view(yours(*copies(arguments))))
    except NotImplementedError:
        return f"not written yet: {name} in {where}"
    except (Exception, SystemExit) as error:
        return f"raises {type(error).__name__}: {error}"
    expected = as_tuple(view(reference(*copies(arguments))))
    if len(outputs) != len(expected):
        return f"differs: {len(outputs)} results, not {len(expected)}"
    for output, right in zip(outputs, expected, strict=True):
        if difference := first_difference(output, right):
            return f"differs: {difference}"
    ratio = seconds(yours, arguments) / seconds(reference, arguments)
    return f"agrees; takes {ratio:.1f} times as long as the code above"


def load(path: Path) -> object:
    """Return a learner's file as a module."""
    spec = importlib.util.spec_from_file_location("exercise", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_tuple(outputs: object) -> tuple:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def copies(arguments: Iterable[object]) -> list[object]:
    """Return the arguments with copies of the tensors, which a function may change in place."""
    return [a.detach().clone() if type(a) is Tensor else a for a in arguments]


def first_difference(output: object, expected: object) -> str:
    """Return in words where two results differ, or ""."""
    if output is None:
        return "returns nothing"
    output, expected = torch.as_tensor(output).detach(), torch.as_tensor(expected).detach()
    if output.shape != expected.shape:
        return f"its shape is {tuple(output.shape)}, not {tuple(expected.shape)}"
    wide = torch.promote_types(output.dtype, expected.dtype)
    limit = TOLERANCE.get(min((output.dtype, expected.dtype), key=lambda t: t.itemsize), 1e-5)
    a, b = output.to(wide), expected.to(wide)
    same = torch.isclose(a.double(), b.double(), rtol=limit, atol=limit, equal_nan=True)
    if same.all():
        return ""
    where = (~same).nonzero()[0].tolist()
    given, right = (t[tuple(where)].item() for t in (output, expected))
    return f"{where if where else 'the result'} is {given:.6g}, not {right:.6g}"


def seconds(function: Callable, arguments: Sequence[object]) -> float:
    """Return the CPU seconds of a call, the least of those that fit into TIMED_SECONDS."""
    times, end = [], time.process_time() + TIMED_SECONDS
    while not times or time.process_time() < end:
        tensors = copies(arguments)
        start = time.process_time()
        function(*tensors)
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)
