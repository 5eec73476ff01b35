"""Grade the exercises of a lesson: load a learner's file, test its functions, print one line each.

All lessons share this module. A grader is a list of `Step`s. Each step has a check: it runs
experiments on the learner's function and raises `Mistake` with the reason. Exit status: 0 if all
steps pass, 1 if some do not, 2 if the file cannot be loaded.
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

TOLERANCE = 1e-9  # the largest allowed difference between two correct computations in fp64
TIME_LIMIT = 10.0  # seconds for one call; each call takes milliseconds


class Mistake(Exception):  # noqa: N818 - the mistake is the learner's, not an error of the program
    """A mistake in the learner's function: what is wrong and where it shows, in one sentence."""


class NotDone(Exception):  # noqa: N818
    """The function still raises the bare NotImplementedError of the stub."""


class Unusable(Exception):  # noqa: N818
    """The file cannot be loaded, so nothing in it can be graded."""


class TimeLimitExceeded(BaseException):
    """A call took longer than TIME_LIMIT.

    This is not an Exception, because an `except Exception` in the learner's code must not catch it.
    """


@dataclass(frozen=True)
class Step:
    """One function of an exercise. `check(answer)` raises Mistake.

    optional: the step may stay undone.
    returns: the names of the returned tensors, if the function returns several.
    mask: the function returns booleans. For other steps booleans are a mistake.
    """

    name: str
    check: Callable[["Answer"], None]
    optional: bool = False
    returns: tuple[str, ...] = ()
    mask: bool = False


@dataclass(frozen=True)
class Result:
    """The grade of one step."""

    step: Step
    verdict: str  # "ok", "not done" or "wrong"
    message: str

    @property
    def passed(self) -> bool:
        """Return whether the exercise can still pass with this result."""
        return self.verdict == "ok" or (self.verdict == "not done" and self.step.optional)


class Crash(Mistake):
    """The learner's function raised an exception. `reason` names it and the line that raised it."""

    def __init__(self, error: BaseException, path: Path, when: str):
        text = (str(error).splitlines() or [""])[0]
        self.reason = f"{type(error).__name__}{line_of(error, path)}: {text[:110]}"
        super().__init__(f"raises {self.reason}" + (f" ({when})" if when else ""))


def line_of(error: BaseException, path: Path) -> str:
    """Return the last line of the learner's file in the traceback, as " at line 12".

    Returns "" if the traceback does not pass through that file.
    """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
    return f" at line {lines[-1]}" if lines else ""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeLimitExceeded if the body runs longer than TIME_LIMIT.

    Timer signals exist on Unix only, and only the main thread receives them. Elsewhere there is no
    limit.
    """
    has_timer = hasattr(signal, "setitimer")
    if not has_timer or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        if sys.gettrace() is None:  # no limit under a debugger, which waits for its user
            raise TimeLimitExceeded

    previous_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


class Answer:
    """Wrap a learner's function, and turn its faults into `Mistake`s.

    Call it like the function. The function receives copies of the tensors, so that a change in
    place can be detected. A Parameter is passed itself, since changing it may be the task.
    """

    def __init__(
        self, function: Callable, path: Path, returns: tuple[str, ...] = (), mask: bool = False
    ):
        self.function = function
        self.path = path
        self.returns = returns
        self.mask = mask

    def __call__(self, *arguments, when: str = "") -> Tensor | tuple[Tensor, ...]:
        """Return the function's output. `when` names the case in messages, as in "for T = 1".

        Raises Mistake if the function raises, does not return in time, returns the wrong type or
        changes its arguments; raises NotDone if it is still a stub.
        """
        copies = [copy_argument(argument) for argument in arguments]
        output = self.run(copies, when)
        self.expect_type(output)
        for number, (before, after) in enumerate(zip(arguments, copies, strict=True), 1):
            if isinstance(before, Tensor) and not equal_with_nan(before, after):
                raise Mistake(
                    f"changes its argument number {number} in place: "
                    "use masked_fill, not masked_fill_, and so on"
                )
        return output

    def run(self, arguments: list, when: str) -> object:
        """Call the function, and turn whatever it raises into Mistake or NotDone."""
        try:
            with time_limit():
                return self.function(*arguments)
        except TimeLimitExceeded as error:
            raise Mistake(
                f"does not return within {TIME_LIMIT:g} seconds{line_of(error, self.path)}: "
                "is there an endless loop?"
            ) from None
        except (Exception, SystemExit) as error:
            # A stub raises NotImplementedError without arguments; torch's own has a message.
            if isinstance(error, NotImplementedError) and not error.args:
                raise NotDone(traceback.extract_tb(error.__traceback__)[-1].name) from None
            raise Crash(error, self.path, when) from None

    def expect_type(self, output: object) -> None:
        """Raise Mistake unless the output is a tensor, or as many tensors as `returns` names."""
        if not self.returns:
            expect_tensor(output, mask=self.mask)
            return
        is_sequence = isinstance(output, tuple | list)
        if not is_sequence or len(output) != len(self.returns):
            count = f" of {len(output)}" if is_sequence else ""
            raise Mistake(
                f"returns {type_name(output)}{count}, "
                f"not the {len(self.returns)} tensors {', '.join(self.returns)}"
            )
        for tensor, name in zip(output, self.returns, strict=True):
            expect_tensor(tensor, f" as its {name}")


def copy_argument(argument: object) -> object:
    """Return a copy of a tensor, and anything else (Parameters too) unchanged."""
    if isinstance(argument, Tensor) and not isinstance(argument, nn.Parameter):
        return argument.clone()
    return argument


def equal_with_nan(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape and values. NaN equals NaN here."""
    return a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())


def type_name(output: object) -> str:
    """Return the output's type for a message: "a list", or "nothing" for None."""
    return "nothing" if output is None else f"a {type(output).__name__}"


def expect_tensor(output: object, name: str = "", mask: bool = False) -> None:
    """Raise Mistake unless the output is a tensor, of numbers unless it is a mask."""
    if not isinstance(output, Tensor):
        raise Mistake(f"returns {type_name(output)}{name}, not a tensor")
    if output.dtype == torch.bool and not mask:
        raise Mistake(f"returns booleans{name}, of shape {tuple(output.shape)}, not numbers")


def expect_shape(output: Tensor, shape: tuple[int, ...], hint: str = "") -> None:
    """Raise Mistake unless the output has this shape."""
    if tuple(output.shape) != tuple(shape):
        raise Mistake(f"returns the wrong shape: {tuple(output.shape)}, not {tuple(shape)}{hint}")


def expect_dtype(output: Tensor, like: Tensor) -> None:
    """Raise Mistake unless the output has the dtype of the input `like`."""
    if output.dtype != like.dtype:
        raise Mistake(
            f"turns {str(like.dtype)[6:]} into {str(output.dtype)[6:]}: "
            "new tensors need the dtype of the old ones"
        )


def expect_integers(output: Tensor, what: str) -> None:
    """Raise Mistake unless the output holds integers. `what` names them in the message."""
    if output.dtype.is_floating_point or output.dtype == torch.bool:
        raise Mistake(f"{what} must be integers, and these are {str(output.dtype)[6:]}")


def expect_gradients(function: Callable, reference: Callable, tensors: dict[str, Tensor]) -> None:
    """Raise Mistake unless `function` has the same gradients as `reference`.

    Both return the same output for `tensors`. The gradient of each tensor is compared for one
    random gradient of the output.
    """
    gradients = []
    for f in (function, reference):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
        output = f(*leaves)
        if not output.requires_grad:
            raise Mistake("no gradient flows at all: something is under no_grad(), or detached")
        generator = torch.Generator().manual_seed(3)
        output_grad = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        try:
            loss = (output * output_grad).sum()
            gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True))
        except RuntimeError as error:
            raise Mistake(f"the backward pass fails: {str(error).splitlines()[0][:110]}") from None
    for name, gradient, expected in zip(tensors, *gradients, strict=True):
        if gradient is None:
            raise Mistake(f"no gradient reaches {name}: it is detached, or used under no_grad()")
        if not gradient.isfinite().all():
            raise Mistake(f"the output is right, but the gradient of {name} is NaN or infinite")
        if (gradient - expected).abs().max() > TOLERANCE:
            raise Mistake(
                f"the output is right, but the gradient of {name} is not: "
                "one of the paths to it is detached"
            )


def first_index(condition: Tensor) -> list[int]:
    """Return the index of the first True in a boolean tensor."""
    return condition.nonzero()[0].tolist()


def load_file(path: Path) -> ModuleType:
    """Return the learner's file as a module. Its name need not be a Python name.

    Raises Unusable if the file does not exist or raises an exception while it is loaded.
    """
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
            f"{path} stops while it is loaded: "
            f"{type(error).__name__}{line_of(error, path)}: {error}"
        ) from None
    return module


def grade_step(step: Step, function: Callable | None, path: Path) -> Result:
    """Grade one function, defined in the file `path`. None: the file has no such function."""
    if not callable(function):
        return Result(step, "not done", "is not in the file: was it renamed or deleted?")
    try:
        step.check(Answer(function, path, step.returns, step.mask))
    except NotDone as not_done:
        stub = str(not_done)
        if stub not in (step.name, getattr(function, "__name__", step.name)):
            return Result(step, "not done", f"not done yet: it calls {stub}, which is not written")
        goal = (function.__doc__ or "").strip().split("\n")[0]
        return Result(step, "not done", f"not done yet: {goal}")
    except Mistake as mistake:
        return Result(step, "wrong", str(mistake))
    return Result(step, "ok", "OK")


def grade_file(path: Path, steps: list[Step]) -> list[Result]:
    """Grade all steps of a learner's file. Raises Unusable if it cannot be loaded."""
    path = Path(path).resolve()
    module = load_file(path)
    torch.manual_seed(0)
    return [grade_step(step, getattr(module, step.name, None), path) for step in steps]


def main(steps: list[Step], default: Path, arguments: list[str] | None = None) -> int:
    """Grade the file named on the command line, print one line a step, return the exit status."""
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
