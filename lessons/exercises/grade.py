"""What the graders of all lessons share: load a learner's file, try its functions, say what is wrong in one line a step.

A grader is a list of `Step`s. Each has a check, which experiments on the learner's function and raises `Mistake` with the
reason. Exit status: 0 all steps pass, 1 some do not, 2 the file cannot be read or run at all.
"""

import argparse
import importlib.util
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

TOLERANCE = 1e-9  # what two ways to compute the same may differ by, in fp64
TIME_LIMIT = 10.0  # seconds for one call: each takes milliseconds


class Mistake(Exception):  # noqa: N818 - it is the learner's, not an error of the program
    """What is wrong, and where it shows: one sentence for the learner."""


class NotDone(Exception):  # noqa: N818
    """The function still raises the stub's bare NotImplementedError."""


class Unusable(Exception):  # noqa: N818
    """The file cannot be graded at all."""


class TimeLimitExceeded(BaseException):
    """A call has taken longer than TIME_LIMIT. Not an Exception, which the learner's own `except` might stop."""


@dataclass(frozen=True)
class Step:
    """One function to write. `check(answer)` raises Mistake; an optional step may stay undone.

    `returns` names what it returns, where that is several tensors; `mask`: that is booleans, elsewhere a mistake.
    """

    name: str
    check: Callable[["Answer"], None]
    optional: bool = False
    returns: tuple[str, ...] = ()
    mask: bool = False


@dataclass(frozen=True)
class Result:
    step: Step
    verdict: str  # "ok", "not done" or "wrong"
    message: str

    @property
    def passed(self) -> bool:
        return self.verdict == "ok" or (self.verdict == "not done" and self.step.optional)


class Crash(Mistake):
    """The learner's function raised an exception: which, and in which of its lines."""

    def __init__(self, error: BaseException, path: Path, when: str):
        text = (str(error).splitlines() or [""])[0]
        self.reason = f"{type(error).__name__}{line_of(error, path)}: {text[:110]}"
        super().__init__(f"raises {self.reason}" + (f" ({when})" if when else ""))


def line_of(error: BaseException, path: Path) -> str:
    """The last line of the learner's file that the error passed through, as " at line 12"; "" if none."""
    lines = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path
    ]
    return f" at line {lines[-1]}" if lines else ""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeLimitExceeded in what takes too long; where there is no such signal (Windows, other threads), wait for it."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*_) -> None:
        if sys.gettrace() is None:  # else a debugger waits for its user
            raise TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Answer:
    """A learner's function: called like it, on copies of the tensors, it raises Mistake for whatever it should not do.

    A Parameter is handed over itself, since it may be the learner's task to change it.
    """

    def __init__(
        self, function: Callable, path: Path, returns: tuple[str, ...] = (), mask: bool = False
    ):
        self.function, self.path, self.returns, self.mask = function, path, returns, mask

    def __call__(self, *arguments, when: str = "") -> Tensor | tuple[Tensor, ...]:
        given = [
            a.clone() if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) else a
            for a in arguments
        ]
        try:
            with time_limit():
                out = self.function(*given)
        except TimeLimitExceeded as error:
            raise Mistake(
                f"is not done after {TIME_LIMIT:g} seconds{line_of(error, self.path)}: an endless loop?"
            ) from None
        except (Exception, SystemExit) as error:
            if (
                isinstance(error, NotImplementedError) and not error.args
            ):  # torch's own always says what is missing
                raise NotDone(traceback.extract_tb(error.__traceback__)[-1].name) from None
            raise Crash(error, self.path, when) from None
        if not self.returns:
            expect_tensor(out, mask=self.mask)
        elif isinstance(out, tuple | list) and len(out) == len(self.returns):
            for part, name in zip(out, self.returns, strict=True):
                expect_tensor(part, f" as its {name}")
        else:
            number = f" of {len(out)}" if isinstance(out, tuple | list) else ""
            raise Mistake(
                f"returns {type_name(out)}{number}, not the {len(self.returns)} tensors {', '.join(self.returns)}"
            )
        for i, (before, after) in enumerate(zip(arguments, given, strict=True)):
            if isinstance(before, Tensor) and not equal_with_nan(before, after):
                raise Mistake(
                    f"changes its argument number {i + 1} in place: masked_fill, not masked_fill_, and the like"
                )
        return out


def equal_with_nan(a: Tensor, b: Tensor) -> bool:
    """Bit for bit but for NaN, which equals NaN here."""
    return a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())


def type_name(out: object) -> str:
    return "nothing" if out is None else f"a {type(out).__name__}"


def expect_tensor(out: object, name: str = "", mask: bool = False) -> None:
    if not isinstance(out, Tensor):
        raise Mistake(f"returns {type_name(out)}{name}, not a tensor")
    if out.dtype == torch.bool and not mask:
        raise Mistake(f"returns booleans{name}, of shape {tuple(out.shape)}, not numbers")


def expect_shape(out: Tensor, shape: tuple[int, ...], hint: str = "") -> None:
    if tuple(out.shape) != tuple(shape):
        raise Mistake(f"returns the wrong shape: {tuple(out.shape)}, not {tuple(shape)}{hint}")


def expect_dtype(out: Tensor, like: Tensor) -> None:
    if out.dtype != like.dtype:
        raise Mistake(
            f"turns {str(like.dtype)[6:]} into {str(out.dtype)[6:]}: new tensors need the dtype of the old ones"
        )


def expect_integers(out: Tensor, what: str) -> None:
    if out.dtype.is_floating_point or out.dtype == torch.bool:
        raise Mistake(f"{what} must be integers, and these are {str(out.dtype)[6:]}")


def expect_gradients(function: Callable, right: Callable, tensors: dict[str, Tensor]) -> None:
    """`function` returns what `right` returns; to each of the tensors must flow the same gradient, too."""
    grads = []
    for f in (function, right):
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        out = f(*leaves)
        if not out.requires_grad:
            raise Mistake("no gradient flows at all: something is under no_grad(), or detached")
        asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
        try:
            grads.append(torch.autograd.grad((out * asked).sum(), leaves, allow_unused=True))
        except RuntimeError as error:
            raise Mistake(f"the backward pass fails: {str(error).splitlines()[0][:110]}") from None
    for name, grad, wanted in zip(tensors, *grads, strict=True):
        if grad is None:
            raise Mistake(f"no gradient reaches {name}: it is detached, or used under no_grad()")
        if not grad.isfinite().all():
            raise Mistake(f"the output is right, but the gradient of {name} is NaN or infinite")
        if (grad - wanted).abs().max() > TOLERANCE:
            raise Mistake(
                f"the output is right, but the gradient of {name} is not: a part of its way is detached"
            )


def first_index(wrong: Tensor) -> list[int]:
    """Where the first True stands."""
    return wrong.nonzero()[0].tolist()


def load_file(path: Path) -> ModuleType:
    """Run the learner's file as a module, whatever its name."""
    spec = importlib.util.spec_from_file_location("exercise", path)
    if spec is None or not path.is_file():
        raise Unusable(f"{path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Unusable(f"{path}, line {error.lineno}: Python cannot read it: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise Unusable(
            f"{path} stops while it is loaded: {type(error).__name__}{line_of(error, path)}: {error}"
        ) from None
    return module


def grade_step(step: Step, function: Callable | None, path: Path) -> Result:
    if not callable(function):
        return Result(step, "not done", "is not in the file: was it renamed or deleted?")
    try:
        step.check(Answer(function, path, step.returns, step.mask))
    except NotDone as waits:
        if str(waits) not in (step.name, getattr(function, "__name__", step.name)):
            return Result(step, "not done", f"not done yet: it calls {waits}, which is not written")
        goal = (function.__doc__ or "").strip().split("\n")[0]
        return Result(step, "not done", f"not done yet: {goal}")
    except Mistake as mistake:
        return Result(step, "wrong", str(mistake))
    return Result(step, "ok", "OK")


def grade_file(path: Path, steps: list[Step]) -> list[Result]:
    path = Path(path).resolve()
    module = load_file(path)
    torch.manual_seed(0)
    return [grade_step(step, getattr(module, step.name, None), path) for step in steps]


def main(steps: list[Step], default: Path, arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Grade an exercise, step by step.")
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=default,
        help=f"your answers (default: {default.name})",
    )
    try:
        results = grade_file(parser.parse_args(arguments).file, steps)
    except Unusable as reason:
        print(reason)
        return 2
    width = max(len(step.name) for step in steps)
    for number, result in enumerate(results, 1):
        bonus = " (bonus)" if result.step.optional else ""
        print(f"{number} {result.step.name:<{width}}  {result.message}{bonus}")
    return 0 if all(result.passed for result in results) else 1
