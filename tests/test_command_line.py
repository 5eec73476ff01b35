"""The command line: flags typed with their default, words and outputs that are not UTF-8, and no
module that Windows lacks."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanods.config import PRESETS, from_command_line, resolve_resume, typed_flags
from nanods.errors import OS_ERROR_FIXES, UserError, run

ROOT = Path(__file__).parents[1]
V1 = PRESETS["v1-tiny"]


def test_typed_flags_are_named_as_the_fields_are():
    words = ["v1-tiny", "--lr=0.02", "--n_layer", "4", "--moe.no-normalise", "--prompt", "-1"]
    assert typed_flags(words) >= {"lr", "n-layer", "moe.normalise", "prompt"}
    assert "seed" not in typed_flags(words)


def test_a_flag_that_is_typed_with_the_default_is_not_ignored_by_resume():
    saved = replace(V1, lr=0.001)
    assert resolve_resume(V1, saved).lr == 0.001
    with pytest.raises(UserError, match=r"--lr 0.02 \(the run has 0.001\)"):
        resolve_resume(V1, saved, {"lr"})


def test_resume_keeps_what_was_saved_of_runtime_flags_that_are_not_typed():
    saved = replace(
        V1, save_every=14, device="cpu", activation_checkpointing=True, tensorboard=True
    )
    kept = resolve_resume(V1, saved)
    assert (kept.save_every, kept.device) == (14, "cpu")
    assert kept.activation_checkpointing and kept.tensorboard
    typed = {"save-every", "device", "activation-checkpointing", "tensorboard"}
    changed = resolve_resume(V1, saved, typed)
    assert (changed.save_every, changed.device) == (V1.save_every, V1.device)
    assert not changed.activation_checkpointing and not changed.tensorboard


def run_python(code, *words, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"from nanods.errors import run\n{code}", *words],
        capture_output=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **environment},
    )


def test_the_home_folder_that_a_shell_left_as_it_is_is_filled_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--data", "~/a text", "--val-data", "~/b", "--out-dir", "~/c"]
    config = from_command_line("", ["v1-tiny", *flags])
    assert (config.data, config.val_data) == (f"{tmp_path}/a text", f"{tmp_path}/b")
    assert config.out_dir == tmp_path / "c" and config.init_from is None
    assert from_command_line("", ["v1-tiny"]).data == V1.data


def test_characters_that_stdout_cannot_take_are_replaced():
    shown = run_python("run(lambda: print('caf\\u00e9 \\u4e2d'))", PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stdout.split()) == (0, [b"caf?", b"?"])


def test_ctrl_c_ends_without_a_traceback():
    shown = run_python("def main():\n    raise KeyboardInterrupt\n\nrun(main)")
    assert (shown.returncode, shown.stdout, shown.stderr) == (130, b"", b"")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_closes_stdout_ends_the_program_quietly(lines):
    """Also where Python writes to the pipe only as the program ends."""
    code = f"run(lambda: [print('a line') for _ in range({lines})] and None)"
    words = [sys.executable, "-c", f"from nanods.errors import run\n{code}"]
    pipe, closed = os.pipe()
    os.close(pipe)
    shown = subprocess.run(words, stdout=closed, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(closed)
    assert (shown.returncode, shown.stderr) == (141, b"")


@pytest.mark.parametrize("number", OS_ERROR_FIXES)
def test_an_error_of_the_system_names_no_flag_but_the_programs_own(number, capsys):
    def main():
        raise OSError(number, "", "runs/x")

    for how_to_choose, flags in (("", []), ("with --out", ["--out"])):
        with pytest.raises(SystemExit) as end:
            run(main, how_to_choose)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.startswith("error: runs/x: ")
        assert [word for word in err.split() if word.startswith("--")] == flags


def test_a_word_that_is_not_utf8_gets_a_message():
    shown = run_python("run(lambda: print('done'))", b"--prompt=caf\xe9", PYTHONUTF8="1")
    assert shown.returncode == 2 and not shown.stdout
    assert b"caf\\udce9 is not utf-8" in shown.stderr and b"Traceback" not in shown.stderr


def test_no_module_that_windows_lacks_is_imported_without_a_guard():
    posix_only = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "syslog"}
    for path in [*(ROOT / "nanods").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not those in a try
            if isinstance(node, ast.Import):
                assert not posix_only & {alias.name for alias in node.names}, path
