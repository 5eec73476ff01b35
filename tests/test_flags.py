"""Each numeric flag of each program has a range, and a number out of it is refused by name."""

import importlib
import math
import sys
import typing
from dataclasses import is_dataclass, replace

import pytest

from nanods.command_line import from_command_line
from nanods.config import PRESETS, Config, flatten
from nanods.errors import UserError, run
from nanods.flags import RANGES, check_ranges, from_environment

BENCHES = ("adapt", "arithmetic", "attention", "experts", "labels", "ladder", "long_text", "moe")
BENCHES += ("multimodal", "recall", "scale", "time_to_loss", "from_bigram")
PROGRAMS = {
    "sample": "Args",
    "nanods.training.quantize": "Args",
    "nanods.evaluate": "Args",
    "nanods.planner.cli": "PlanArgs",
    "nanods.serving.__main__": "Args",
    **{f"nanods.bench.{name}": "Args" for name in BENCHES},
}
LAUNCHER = ("nproc-per-node", "nnodes", "node-rank", "max-restarts", "master-port")
LAUNCHER += ("monitor-interval",)
# Beside them 2^63, 2^64 and nanoseconds since 1970; a denormal number; a number of 400 digits.
BAD = (math.nan, math.inf, -math.inf, -1, 2**63, -(2**63), 2**64, 1764119044123456789)
BAD += (5e-324, -5e-324, 1e308, 10**400)


def numeric_fields(cls, prefix=""):
    """Return the flags of a dataclass, nested ones included, whose values are numbers."""
    flags = set()
    for name, hint in typing.get_type_hints(cls).items():
        nested = {
            "model": "",
            "attention": "attention.",
            "moe": "moe.",
            "multimodal": "multimodal.",
        }
        if is_dataclass(hint):
            flags |= numeric_fields(hint, nested[name])
        elif {int, float} & {hint, *typing.get_args(hint)}:
            flags.add(prefix + name.replace("_", "-"))
    return flags


def all_flags():
    flags = numeric_fields(Config) | set(LAUNCHER)
    for module, name in PROGRAMS.items():
        flags |= numeric_fields(getattr(importlib.import_module(module), name))
    return flags


def test_every_numeric_flag_has_a_range_and_every_range_a_flag():
    assert all_flags() == RANGES.keys(), "nanods/flags.py declares the range of each numeric flag"


@pytest.mark.parametrize("flag", RANGES)
def test_numbers_out_of_range_are_refused_by_name(flag):
    low, high = RANGES[flag]
    check_ranges({flag: low})
    check_ranges({flag: high})
    for number in BAD:
        if not low <= number <= high:
            with pytest.raises(ValueError, match=f"^--{flag} "):
                check_ranges({flag: number})
            with pytest.raises(ValueError, match=f"^--{flag} "):
                check_ranges({flag: (low, number)})


@pytest.mark.parametrize("flag", sorted(numeric_fields(Config)))
def test_a_configuration_refuses_them(flag):
    for number in BAD:
        if not RANGES[flag][0] <= number <= RANGES[flag][1]:
            with pytest.raises(ValueError, match=flag.split(".")[-1].replace("-", "[-_]")):
                with_flag(PRESETS["v2-tiny"], flag, number)


def with_flag(config, flag, value):
    """Return the configuration with one field changed, by the name of its flag."""
    *parts, name = flag.replace("-", "_").split(".")
    if not parts and name not in Config.__dataclass_fields__:
        return replace(config, model=replace(config.model, **{name: value}))
    for part in parts:
        if part == "multimodal":
            return replace(config, multimodal=replace(config.multimodal, **{name: value}))
        changed = replace(getattr(config.model, part), **{name: value})
        return replace(config, model=replace(config.model, **{part: changed}))
    return replace(config, **{name: value})


@pytest.mark.parametrize(
    ("module", "words", "flag"),
    [
        ("train", ["v1-tiny", "--seed", "-1"], "--seed -1"),
        ("train", ["v1-tiny", "--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        ("train", ["v1-tiny", "--plan", "--tokens", "nan"], "--tokens nan"),
        ("train", ["v1-tiny", "--plan", "--mesh", "dp=65536,ep=2"], "--mesh dp=65536,ep=2"),
        ("sample", ["v1-tiny", "--seed", "-1"], "--seed -1"),
        ("sample", ["v1-tiny", "--temperature", "5e-324"], "--temperature 5e-324"),
        ("nanods.bench.time_to_loss", ["--steps", "700", "0"], "--steps 0"),
        ("nanods.distributed.launch", ["--nproc-per-node", "0", "train.py"], "--nproc-per-node 0"),
    ],
)
def test_each_program_checks_before_work_begins(monkeypatch, tmp_path, capsys, module, words, flag):
    program = importlib.import_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    with pytest.raises(SystemExit) as exit:
        run(program.main)
    assert exit.value.code == 2 and flag in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_flatten_names_the_flags_as_the_command_line_does():
    assert numeric_fields(Config) <= flatten(from_command_line("", ["v2-tiny"])).keys()


@pytest.mark.parametrize(
    ("name", "default", "texts"),
    [
        ("NANODS_TIMEOUT", 600.0, ("soon", "0", "-1", "nan", "inf")),
        ("WORLD_SIZE", 1, ("two", "0", "2.0")),
        ("MASTER_PORT", 0, ("abc", "70000")),
    ],
)
def test_a_number_in_the_environment_has_a_range_too(monkeypatch, name, default, texts):
    for text in texts:
        monkeypatch.setenv(name, text)
        with pytest.raises(UserError, match=rf"{name}={text}: must be a .*number from \d to \d+"):
            from_environment(name, default)
    monkeypatch.setenv(name, "7")
    assert from_environment(name, default) == 7
    monkeypatch.setenv(name, "")
    assert from_environment(name, default) == default
