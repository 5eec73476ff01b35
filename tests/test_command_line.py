"""The command line: flags typed with their default, words and outputs that are not UTF-8, and no
module that Windows lacks."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanods.command_line import from_command_line, resolve_resume, typed_flags
from nanods.config import PRESETS
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


def test_resuming_takes_the_saved_values_and_refuses_conflicts():
    preset = PRESETS["v1-tiny"]
    saved = replace(preset, steps=77, lr=0.5)
    assert resolve_resume(replace(preset, resume=True), saved).steps == 77
    assert resolve_resume(replace(preset, resume=True, steps=77), saved).lr == 0.5
    with pytest.raises(UserError, match=r"--steps 78 \(the run has 77\)"):
        resolve_resume(replace(preset, resume=True, steps=78), saved)
    with pytest.raises(UserError, match="--preset v0-tiny"):
        resolve_resume(PRESETS["v0-tiny"], saved)


def test_a_finetuned_run_is_resumed_where_it_was_begun():
    words = ["v1-tiny", "--stage", "finetune"]
    begun = from_command_line("", [*words, "--init-from", "runs/v1-tiny"])
    resumed = from_command_line("", [*words, "--resume"])
    assert begun.run_dir == resumed.run_dir != PRESETS["v1-tiny"].run_dir
    elsewhere = from_command_line("", [*words, "--resume", "--out-dir", "here"])
    assert str(elsewhere.run_dir) == "here"


# ---- flags without effect ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        ("v0-tiny --moe.scores sigmoid --expert-lr 0.1", "moe.scores expert-lr"),
        ("v0-tiny --moe.no-normalise", "moe.normalise"),
        ("v0-tiny --attention.block-size 8", "attention.block-size"),
        ("v0-tiny --attention.kind block --attention.block-size 8", ""),
        ("v0-tiny --moe.n-expert 4 --moe.scores sigmoid --moe.priority slot", "moe.priority"),
        ("v2-tiny --moe.capacity-factor 1 --moe.priority slot --expert-lr 0.1", ""),
        ("v2-tiny --optimizer adamw --momentum 0.8 --expert-every 2", "momentum expert-every"),
        ("v0-tiny --rope-base 5 --multimodal.width 9", "multimodal.width"),
        ("v3-tiny --rope-base 5 --multimodal.width 9", "rope-base"),
        ("v0-tiny --val-data t.txt --val-fraction 0.5", "val-fraction"),
        ("v2-tiny --distill-weight 0.1 --init-noise 0.1", "distill-weight init-noise"),
        ("v0-tiny --ewc-lambda 2 --ewc-fisher data", "ewc-lambda ewc-fisher"),
        ("v0-tiny --ewc runs/a --ewc-lambda 2 --init-noise 0.1", "init-noise"),
        ("v2-tiny --ewc runs/a --ewc-lambda 2 --init-noise 0.1", ""),
        ("v2-tiny --expert-optimizer adamw --expert-every 2", "expert-every"),
        ("v3-tiny --eval-tokens 900 --multimodal.no-hard-batches", "eval-tokens"),
        ("v3-tiny --mix sums=1", "mix"),
        ("v0-tiny --data fineweb-edu --val-fraction 0.5", "val-fraction"),
        ("v3-emoji --multimodal.no-hard-batches", "multimodal.hard-batches"),
        ("v0-tiny --short-parts 4", "short-parts"),
        ("v0-tiny --short-parts 4 --short-context 0.5", ""),
        ("v0-tiny --data instructions --short-context 0.5", "short-context"),
        ("v3-tiny --short-context 0.5", "short-context"),
        ("v0-tiny --sampling epochs", ""),
        ("v0-tiny --data instructions --sampling epochs", "sampling"),
        ("v3-tiny --sampling epochs", "sampling"),
        ("v0-tiny --quantize-from 5", "quantize-from"),
        ("v0-tiny --quantize int2 --quantize-from 5", ""),
        ("v0-tiny --quantize int2 --quantize-from 9 --steps 9", "quantize quantize-from"),
    ],
)
def test_flags_without_effect_are_named(capsys, words, unused):
    from_command_line("", words.split())
    lines = capsys.readouterr().out.splitlines()
    named = {line.split("--")[1].split(" ")[0] for line in lines if "has no effect" in line}
    assert named == set(unused.split())
