"""The bench of compressed models: what it compares, its runs, and its counter-example."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanods import config as ladder
from nanods.bench import compress, compress_speed
from nanods.bench.compress import compare_formats, compare_rounding, continued, trained
from nanods.bench.compress_speed import measure_leak, per_tensor
from nanods.build import build_meta_model
from nanods.command_line import from_command_line
from nanods.gpt import GPT, GPTConfig
from nanods.quantize import quantize

RUNS = Path("runs")


def test_the_share_of_the_gap_that_qat_closes():
    row = compare_rounding(fp32=[1.0, 2.0], after=[3.0, 3.0], qat=[1.5, 2.0])
    assert row["closed"] == [0.75, 1.0] and row["mean_closed"] == 0.875


@pytest.mark.parametrize(("metric", "sign"), [("val_bpb", 1), ("val_recall1", -1)])
def test_what_is_lost_is_a_higher_loss_or_a_lower_recall(metric, sign):
    quality = {"fp32": 0.5, "int8": 0.5 + sign * 0.01, "fp8": 0.5 + sign * 0.02}
    sizes = {"fp32": 400, "int8": 110, "fp8": 100}
    row = compare_formats({"metric": metric, "quality": quality, "bytes": sizes})
    assert row["lost"] == {"int8": pytest.approx(0.01), "fp8": pytest.approx(0.02)}
    assert row["times_smaller"]["fp8"] == {"fp32": 4.0, "bf16": 2.0}


def test_v0_to_v2_are_unchanged_share_the_runs_of_make_results_and_qat_starts_from_them():
    job = trained("v2-tiny", 1)
    assert job.folder_in(RUNS, "compress") == RUNS / "ladder/v2-tiny-pydocs-1"
    assert job.config == replace(ladder.PRESETS["v2-tiny"], seed=1)
    assert trained("v3-tiny", 0).folder_in(RUNS, "compress") == RUNS / "compress/v3-tiny-0"
    plain, rounding = continued(2, RUNS), continued(2, RUNS, 4)
    config = from_command_line("", list(rounding.words))
    assert config.init_from == "runs/ladder/v1-tiny-pydocs-2" and config.quantize == "int4"
    assert rounding.words[: len(plain.words)] == plain.words, "they differ in rounding alone"


def tiny_model():
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 32, "vocab_size": 64}
    return compress_speed.draw_zero_weights(GPT(GPTConfig(**size)))


@torch.no_grad()
def test_one_scale_per_tensor_reads_the_future_and_the_neighbours_and_ours_does_not():
    model = tiny_model()
    tokens, others = torch.randint(64, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    leaks = measure_leak(per_tensor(model), model, tokens, others)
    assert all(change > 1e-3 for change in leaks)
    ours = measure_leak(quantize(model), model, tokens, others)
    assert ours.from_quantising > 1e-3
    assert max(ours[1:]) < 1e-5, "no more than fp32's own rounding"


@torch.no_grad()
def test_a_decoding_step_does_not_lengthen_the_text():
    model = tiny_model()
    tokens = torch.randint(64, (1, 32))  # as long as the context
    step = compress_speed.decoding_step(model, tokens)
    step()
    step()


def test_speed_is_relative_to_fp32():
    assert compress_speed.times_faster({"fp32": 2.0, "INT8": 0.5}) == {"INT8": 4.0}


def test_the_processor_and_the_kernel_are_named():
    row = compress_speed.describe_processor()
    assert row["kernel"] and row["why"] and row["instructions"] and row["torch"]


def test_a_part_is_written_beside_the_others(tmp_path, monkeypatch):
    path = tmp_path / "compress.json"
    path.write_text(json.dumps({"leak": {"layers": {}}}))
    monkeypatch.setattr(compress, "part_sizes", lambda args: {"v0-tiny": {}})
    monkeypatch.setattr(compress, "draw", lambda table, args: None)
    arguments = ["compress", "--only", "sizes", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    compress.main()
    table = json.loads(path.read_text())
    assert table["sizes"] == {"v0-tiny": {}} and table["leak"] == {"layers": {}}
    assert list(table["machines"]) == ["sizes"] and "kernel" in table["machines"]["sizes"]


@pytest.fixture
def trainings(monkeypatch):
    """Replace train_all: note the jobs, and return a result for each."""
    jobs = []

    def train_all(bench, more, summarise, results, runs, workers):
        jobs.extend(more)
        table = {}
        for job in more:
            taught = "--teacher" in job.words
            quality = 0.9 if taught else 0.8
            table[job.name] = {
                "metric": "val_recall1",
                "parameters": 100,
                "quality": quality if job.needs else {"fp32": quality},
                "cpu_seconds": 30.0 if taught else 20.0,
                "by_bits": {str(bits): 0.8 + 1 / bits for bits in compress.ALL_BITS},
            }
        return table

    monkeypatch.setattr(compress, "train_all", train_all)
    return jobs


def test_students_are_compared_after_equal_steps_and_in_equal_time(trainings):
    row = compress.part_distill_v3(compress.Args(seeds=2))
    compress.part_distill_v1(compress.Args(seeds=2))
    assert row["alone"] == [0.8, 0.8] and row["taught"] == [0.9, 0.9]
    steps = row["steps"]
    assert steps["equal time"] == 1.5 * steps["equal"]
    jobs = {job.name: job for job in trainings}
    taught = jobs["v3-tiny student taught 1"]
    assert taught.needs.name == "v3 teacher" and "runs/compress/v3-teacher" in taught.words
    assert jobs["v1-tiny student alone 1, equal time"].config.steps == 600
    for job in trainings:
        job.config  # noqa: B018 - each command line is understood


def test_a_dense_student_has_at_most_a_quarter_of_its_teachers_parameters():
    counts = {}
    for name, words in {"teacher": compress.V3_TEACHER, "student": compress.V3_STUDENT}.items():
        config = from_command_line("", list(words))
        counts[name] = build_meta_model(config).count_parameters()[0]
    assert counts["student"] <= counts["teacher"] / 4


def test_qat_is_compared_with_the_fp32_run_of_as_many_steps(trainings):
    row = compress.part_qat(compress.Args(seeds=2))["2 bits"]
    assert row["after_training"] == [1.3, 1.3]
    assert {job.needs.name for job in trainings if job.needs} == {"v1-tiny 0", "v1-tiny 1"}
