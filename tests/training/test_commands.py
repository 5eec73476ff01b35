"""The commands that a run prints can be pasted: they give the run's own configuration back."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from nanods import config as ladder
from nanods.command_line import RUNTIME_ONLY_FIELDS, from_command_line
from nanods.config import PRESETS
from nanods.training.commands import (
    first_words,
    flag,
    resume_command,
    retry_command,
    sample_command,
    shorten,
)

STEPS = ["--steps", str(PRESETS["v0-tiny"].steps)]
FINETUNE = ["--stage", "finetune", "--init-from", "runs/v0", "--out-dir", "runs/tuned"]
FLAGS = {
    "v0-tiny": ["--data", "a text's $HOME.txt", "--out-dir", "runs/it's; rm -rf *", "--lr", "3e-2"],
    "v1-tiny": ["--attention.method", "tile", "--micro-batch", "2", "--save-every", "7"],
    "v2-tiny": ["--moe.no-normalise", "--activation-checkpointing", "--device", "cpu"],
    "v3-tiny": ["--multimodal.modalities", "text", "image", "--multimodal.no-shared"],
}


def parse(command):
    """Return the configuration of a printed `python train.py PRESET ...`, as a shell reads it."""
    _, program, *words = shlex.split(command)
    assert program == "train.py"
    return from_command_line("", words)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "adamw", "--lr", "0.02"],
        [*FINETUNE, "--data", "pydocs", *STEPS, "--lr", "0.02", "--expert-lr", "0.02"],
        FINETUNE,
    ],
    ids=["adamw", "finetune", "defaults"],
)
def test_a_command_writes_the_flags_whose_default_is_not_the_presets(flags):
    config = from_command_line("", ["v0-tiny", *flags])
    assert parse(retry_command(config)) == config
    assert parse(retry_command(config, lr=0.02)) == replace(config, lr=0.02)


def test_v3_is_fine_tuned_on_its_own_data_unless_others_are_named():
    words = ["v3-tiny", *FINETUNE]
    assert from_command_line("", words).data == "scenes"
    assert from_command_line("", [*words, "--data", "birds"]).data == "birds"
    assert from_command_line("", ["v0-tiny", *FINETUNE]).data == "instructions"


@pytest.mark.parametrize("preset", FLAGS)
def test_a_printed_command_keeps_the_flags_of_the_run(preset):
    config = from_command_line("", [preset, *FLAGS[preset]])
    assert parse(retry_command(config, lr=0.5)) == replace(config, lr=0.5)
    resumed = parse(resume_command(config))
    assert resumed.resume
    for name, value in ladder.flatten(resumed).items():
        kept = name in RUNTIME_ONLY_FIELDS and name != "resume"
        expected = config if kept else replace(PRESETS[preset], resume=True)
        assert value == ladder.flatten(expected)[name], name


def test_a_run_of_several_processes_is_continued_by_as_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    command = resume_command(from_command_line("", ["v2-tiny", "--mesh", "ep=4"]))
    launcher = "-m nanods.distributed.launch --standalone --nproc-per-node 4 train.py v2-tiny"
    assert command.endswith(f"{launcher} --resume --mesh ep=4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "--nnodes 2" in resume_command(PRESETS["v2-tiny"])


def test_paths_and_prompts_are_quoted_for_the_shell():
    command = sample_command(Path("my runs/$1"), *flag("prompt", "it's"), *flag("query", "-x"))
    words = shlex.split(command)[1:]
    assert words == ["sample.py", "my runs/$1", "--prompt", "it's", "--query=-x"]


def test_the_example_is_in_the_language_of_the_text():
    assert first_words("\n\x00\n---\nReturn the value of it\n") == "Return the value"
    chinese = "\u6211\u4eec\u7684" * 100
    assert first_words(chinese) == chinese[:24]
    assert first_words("\ufffd\ufffd\n\x1b[31m") == first_words("") == ""
    assert shorten("one two three", 9) == "one two" and shorten("x" * 100, 9) == "x" * 9
