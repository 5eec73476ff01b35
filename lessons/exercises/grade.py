"""Grade the exercises of a lesson: load a learner's file, test its functions, print one line each.

All lessons share this module. A grader is a list of `Step`s. Each step has a check: it runs
experiments on the learner's function and raises `Mistake` with the reason. sandbox.py runs the
grader in a process of its own, which the answer may end.
"""

import builtins
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import sandbox
import torch
from torch import Tensor, nn

TOLERANCE = 1e-9  # the largest allowed difference between two correct computations in fp64


class Mistake(Exception):  # noqa: N818 - the mistake is the learner's, not an error of the program
    """A mistake in the learner's function: what is wrong and where it shows, in one sentence."""


class NotDone(Exception):  # noqa: N818
    """The function still raises the bare NotImplementedError of the stub."""


class Unusable(Exception):  # noqa: N818
    """The file cannot be loaded, so nothing in it can be graded."""


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

    name: str
    optional: bool
    verdict: str  # "ok", "not done" or "wrong"
    message: str


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

        Raises Mistake if the function raises, returns the wrong type or changes its arguments;
        raises NotDone if it is still a stub.
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
            return self.function(*arguments)
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
    kind = ""
    if output.layout != torch.strided or output.is_nested:
        kind = "sparse or nested"
    elif output.device.type != "cpu":
        kind = f"{output.device.type} (device)"
    elif output.is_complex():
        kind = "complex"
    if kind:
        raise Mistake(f"returns a tensor{name} that is {kind}, not a plain one on the CPU")
    if output.dtype == torch.bool and not mask:
        raise Mistake(f"returns booleans{name}, of shape {tuple(output.shape)}, not numbers")


def expect_shape(output: Tensor, shape: tuple[int, ...], hint: str = "", when: str = "") -> None:
    """Raise Mistake unless the output has this shape. `hint` ends the message; `when`, which names
    a special case, takes its place."""
    if tuple(output.shape) != tuple(shape):
        hint = f", {when}" if when else hint
        raise Mistake(f"returns the wrong shape: {tuple(output.shape)}, not {tuple(shape)}{hint}")


def expect_dtype(output: Tensor, like: Tensor) -> None:
    """Raise Mistake unless the output has the dtype of the input `like`."""
    if output.dtype != like.dtype:
        raise Mistake(
            f"turns {str(like.dtype)[6:]} into {str(output.dtype)[6:]}: new tensors need the dtype "
            "of the old ones, and float() makes float32 of every type"
        )


def expect_integers(output: Tensor, what: str) -> None:
    """Raise Mistake unless the output holds integers. `what` names them in the message."""
    if output.dtype.is_floating_point or output.dtype == torch.bool:
        raise Mistake(f"{what} must be integers, and these are {str(output.dtype)[6:]}")


def expect_gradients(
    function: Callable,
    reference: Callable,
    tensors: dict[str, Tensor],
    tolerance: float = TOLERANCE,
) -> None:
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
        if (gradient - expected).abs().max() > tolerance:
            raise Mistake(
                f"the output is right, but the gradient of {name} is not: "
                "one of the paths to it is detached"
            )


def different_digits(a: float | Tensor, b: float | Tensor, digits: int = 4) -> tuple[str, str]:
    """Return two different numbers as text, with as many digits as tell them apart."""
    a, b = (x.item() if isinstance(x, Tensor) else x for x in (a, b))
    for count in range(digits, 17):
        texts = f"{a:.{count}f}", f"{b:.{count}f}"
        if texts[0] != texts[1]:
            return texts
    return repr(a), repr(b)


def first_index(condition: Tensor) -> list[int]:
    """Return the index of the first True in a boolean tensor."""
    return condition.nonzero()[0].tolist()


KnownMistakes = dict[str, Callable[[], Tensor]]  # what a mistake returns, by message


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def is_close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Return whether a and b have the same shape and are close. False if one contains NaN."""
    return a.shape == b.shape and bool(((a - b).abs() < tolerance).all())


def raise_known_mistake(result: Tensor, known_mistakes: KnownMistakes, name: str = "") -> None:
    """Raise the Mistake whose value is `result`, if there is one. `name` precedes its message."""
    for message, value in known_mistakes.items():
        if is_close(result.double(), value().double()):
            raise Mistake(f"{name} {message}" if name else message)


def raise_different_element(result: Tensor, expected: Tensor, name: str) -> None:
    """Raise a Mistake with the first element that differs."""
    where = first_index(~((result - expected).abs() < TOLERANCE))
    given, right = different_digits(result[tuple(where)], expected[tuple(where)])
    raise Mistake(f"{name}{where if where else ''} is {given}, but {right} is correct")


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

    def result(verdict: str, message: str) -> Result:
        return Result(step.name, step.optional, verdict, message)

    if not callable(function):
        return result("not done", "is not in the file: was it renamed or deleted?")
    try:
        step.check(Answer(function, path, step.returns, step.mask))
    except NotDone as not_done:
        stub = str(not_done)
        if stub not in (step.name, getattr(function, "__name__", step.name)):
            return result("not done", f"not done yet: it calls {stub}, which is not written")
        goal = (function.__doc__ or "").strip().split("\n")[0]
        return result("not done", f"not done yet: {goal}")
    except Mistake as mistake:
        return result("wrong", str(mistake))
    return result("ok", "OK")


def grade_file(path: Path, steps: list[Step]) -> list[Result]:
    """Grade all steps of a learner's file in this process. Raises Unusable if it cannot be loaded.

    Nothing stops an answer here that runs forever or ends the process.
    """
    module = load_file(path)
    torch.manual_seed(0)
    return [grade_step(step, getattr(module, step.name, None), path) for step in steps]


# ---- the worker of sandbox.py --------------------------------------------------------------------


class Watch:
    """Notice if the answer replaces what the grader uses: functions of torch, or sys.stdout."""

    def __init__(self):
        self.stdout = sys.stdout
        self.before = self.functions()

    @staticmethod
    def functions() -> dict[str, object]:
        """Return the public functions of Python and torch, and all that torch.Tensor defines."""
        found = {}
        spaces = {"": builtins, "torch.": torch, "torch.nn.functional.": nn.functional}
        for prefix, module in spaces.items():
            for name, value in vars(module).items():
                if callable(value) and not name.startswith("_"):
                    found[prefix + name] = value
        for name, value in vars(Tensor).items():
            found[f"torch.Tensor.{name}"] = value
        return found

    def change(self) -> str:
        """Return what has been changed, as the end of a sentence, or ""."""
        after = self.functions()
        for name in sorted(self.before.keys() | after.keys()):
            value = after.get(name)
            # torch itself replaces some of its functions when more of its parts are imported.
            if value is not self.before.get(name) and not is_of_torch(value):
                return f"replaces {name}, which the grader uses too: give yours another name"
        try:
            os.fstat(1)
            is_open = not self.stdout.closed
        except OSError:
            is_open = False
        if not is_open or sys.stdout is not self.stdout:
            return "closes or replaces sys.stdout: print as you like, but leave it as it is"
        return ""


def is_of_torch(function: object) -> bool:
    return str(getattr(function, "__module__", "")).split(".")[0] == "torch"


class Worker:
    """Grade steps and write a record before and after each, for sandbox.py to read."""

    def __init__(self, path: Path, records: Path, steps: list[Step], time_limit: float):
        self.path, self.steps, self.time_limit = path, steps, time_limit
        self.file = records.open("a", encoding="utf-8")
        self.lock = threading.Lock()
        # The answer may replace these functions.
        self.dumps, self.exit, self.main_thread = json.dumps, os._exit, threading.get_ident()

    def write(self, step: int, **fields: object) -> None:
        with self.lock:
            self.file.write(self.dumps({"step": step, "count": len(self.steps), **fields}) + "\n")
            self.file.flush()

    def run(self, first: int) -> None:
        """Load the file and grade its steps from number `first` on. End the process."""
        watch = Watch()
        self.write(sandbox.LOADING)
        stop = self.start_timer(sandbox.LOADING, lambda why: {"unusable": f"{self.path} {why}"})
        try:
            module = load_file(self.path)
            if change := watch.change():
                raise Unusable(f"{self.path} {change}")
        except Unusable as reason:
            self.write(sandbox.LOADING, unusable=str(reason))
            self.exit(0)
        finally:
            stop()
        for number, step in enumerate(self.steps):
            if number < first:
                continue
            torch.manual_seed(0)
            self.write(number, name=step.name, optional=step.optional)
            stop = self.start_timer(number, lambda why, step=step: self.wrong(step, why))
            result = grade_step(step, getattr(module, step.name, None), self.path)
            stop()
            change = watch.change()
            self.write(number, **(self.wrong(step, change) if change else asdict(result)))
            if change:
                break  # a new worker grades the other steps
        self.exit(0)  # at once, although threads of the answer may still run

    @staticmethod
    def wrong(step: Step, message: str) -> dict:
        return asdict(Result(step.name, step.optional, "wrong", message))

    def start_timer(self, number: int, record: Callable[[str], dict]) -> Callable[[], None]:
        """End the process after the time limit, with a record. Return what cancels that."""
        is_done = threading.Event()
        start_cpu, start_clock = time.process_time(), time.monotonic()

        def watch() -> None:
            while not is_done.wait(0.1):
                cpu, clock = time.process_time() - start_cpu, time.monotonic() - start_clock
                if max(cpu, clock / sandbox.CLOCK_FACTOR) > self.time_limit:
                    stack = traceback.extract_stack(sys._current_frames()[self.main_thread])
                    lines = [line.lineno for line in stack if Path(line.filename) == self.path]
                    where = f" at line {lines[-1]}" if lines else ""
                    self.write(number, **record(sandbox.endless_loop(self.time_limit, where)))
                    self.exit(1)

        threading.Thread(target=watch, daemon=True).start()
        return is_done.set


def main(steps: list[Step], arguments: list[str] | None = None) -> int:
    """Run as the worker of sandbox.py, or, with a file only, grade it in this process.

    The second way is for debugging: breakpoint() works, and there is no time limit.
    """
    file, *rest = sys.argv[1:] if arguments is None else arguments
    path = Path(file).resolve()
    if rest:
        records, first, time_limit = rest
        Worker(path, Path(records), steps, float(time_limit)).run(int(first))
    try:
        results = grade_file(path, steps)
    except Unusable as reason:
        print(reason)
        return 2
    results = [asdict(result) for result in results]
    print("\n".join(sandbox.report(results)))
    return sandbox.OPEN if sandbox.open_steps(results) else 0
