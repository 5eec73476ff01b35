import contextlib
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# No time limit for an example: a busy machine is no fault.
hypothesis.settings.register_profile("nanods", deadline=None)
hypothesis.settings.load_profile("nanods")

sys.path.insert(0, str(Path(__file__).parents[1]))  # where train.py and sample.py are

SIZE = {
    "n-layer": 2,
    "n-head": 2,
    "n-embd": 16,
    "context-length": 32,
    "batch-size": 4,
    "eval-every": 5,
}
TINY = [
    "--device",
    "cpu",
    *(word for name, value in SIZE.items() for word in (f"--{name}", str(value))),
]


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.setpgid(0, 0)  # some tests signal their whole process group


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


class Killed(BaseException):
    """Raised where a test has a program die: no program catches it."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Change to an empty folder that holds a text, text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANODS_DATA", str(tmp_path / "data"))
    (tmp_path / "text.txt").write_text(
        "".join(f"{n} times {n} makes {n * n}.\n" for n in range(150))
    )
    return tmp_path


@pytest.fixture
def program(request, workspace, monkeypatch, capsys):
    """Run train.py, sample.py, nanods/evaluate.py or nanods/data/check.py in this process:
    program("train", "v1-tiny", ...) -> (exit code, stdout, stderr).

    A run's pictures take longer than its few steps. They are left out, except in tests marked
    `pictures`.
    """
    import sample
    import train
    from nanods import evaluate
    from nanods.data import check
    from nanods.errors import run
    from nanods.training.contrastive_task import ContrastiveTask
    from nanods.training.instruction_task import InstructionTask
    from nanods.training.language_task import LanguageTask

    if not request.node.get_closest_marker("pictures"):
        for task in (LanguageTask, InstructionTask, ContrastiveTask):
            monkeypatch.setattr(task, "draw", lambda *_: [])
    mains = {"train": train.main, "sample": sample.main}
    mains |= {"evaluate": evaluate.main, "check": check.main}

    def call(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        code = 0
        try:
            run(mains[name])
        except SystemExit as error:
            code = error.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def killed_at(monkeypatch):
    """`with killed_at(step): program("train", ...)`: train.py dies as that step begins, counted
    from 0."""
    import train

    @contextlib.contextmanager
    def kill(step):
        real = train.set_learning_rate

        def set_learning_rate(optimizers, now, config):
            if now == step:
                raise Killed
            return real(optimizers, now, config)

        with monkeypatch.context() as patched:
            patched.setattr(train, "set_learning_rate", set_learning_rate)
            with pytest.raises(Killed):
                yield

    return kill


@pytest.fixture
def train_tiny(program):
    """Train for some seconds on text.txt: train_tiny("v1-tiny", "--steps", 6)."""

    def call(preset, *args):
        sparse = ["--attention.block-size", "8"] if preset >= "v1" else []
        few = ["--moe.n-expert", "4"] if preset >= "v2" else []
        data = ["--data", "scenes" if preset >= "v3" else "text.txt"]
        return program("train", preset, *TINY, *sparse, *few, *data, *args)

    return call
