"""V3 from the outside: what a run of train.py writes, what sample.py finds, and how they refuse
mistakes."""

import json
import shutil
import wave
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nanods.data import scenes
from nanods.data.sound import read_wav, write_wav
from nanods.training import checkpoint

DIRECTIONS = [
    f"{a}_{b}" for a in ("text", "image", "audio") for b in ("text", "image", "audio") if a != b
]


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.pictures
def test_a_run_learns_and_writes_its_files(train_tiny, workspace):
    few = (
        "--steps",
        30,
        "--eval-every",
        15,
        "--batch-size",
        32,
        "--n-embd",
        32,
        "--context-length",
        80,
    )
    code, out, err = train_tiny(
        "v3-tiny", *few, "--moe.n-expert", 1, "--multimodal.no-hard-batches"
    )
    assert code == 0, err
    for word in (
        "scenes: 16,416 training + 1,824 held-out examples",
        "MFLOP per example",
        "an untrained model's loss is ln 32 = 3.47",
        "recall@1",
        "query      ",
        "--query",
    ):
        assert word in out
    run = workspace / "runs/v3-tiny"
    for name in ("loss", "recall", "similarities", "neighbours", "space"):
        assert (run / f"{name}.png").stat().st_size > 5000
    assert not (run / "experts.png").exists()
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, 31)) and rows[-1]["examples"] == 30 * 32
    assert rows[0]["ce_loss"] == pytest.approx(np.log(32), abs=0.5)  # chance
    assert rows[-1]["ce_loss"] < 0.8 * np.log(32) and rows[-1]["val_loss"] < 0.8 * np.log(32)
    assert {f"recall1_{direction}" for direction in DIRECTIONS} <= rows[
        -1
    ].keys() and "examples_per_second" in rows[-1]
    assert rows[-1]["val_recall1"] == pytest.approx(
        np.mean([rows[-1][f"recall1_{direction}"] for direction in DIRECTIONS])
    )
    assert rows[-1]["val_recall1"] > 3 / 512  # three times chance
    assert checkpoint.load(run).state["examples"] == 960


@pytest.mark.pictures
def test_the_load_is_logged_by_modality(train_tiny, workspace):
    code, _, err = train_tiny(
        "v3-tiny", "--steps", 2, "--eval-every", 2, "--multimodal.entropy-coefficient", 0.1
    )
    assert code == 0, err
    last = rows_of(workspace / "runs/v3-tiny")[-1]
    loads = [np.array(last[f"load_{name}"]) for name in ("text", "image", "audio")]
    assert (
        loads[1].sum(axis=1).tolist() == [4 * 64 * 2] * 2
        and loads[2].sum(axis=1).tolist() == [4 * 16 * 2] * 2
    )
    assert (sum(loads) == last["load"]).all() and np.array(
        last["val_load_audio"]
    ).sum() == 512 * 16 * 2 * 2
    assert last["train_loss"] == pytest.approx(
        last["ce_loss"]
        + 0.1 * last["balance_loss"]
        + 0.001 * last["z_loss"]
        + 0.1 * last["entropy_loss"],
        rel=1e-5,
    )
    assert (workspace / "runs/v3-tiny/experts.png").exists()


def test_only_the_requested_pairs_are_compared(train_tiny, workspace):
    code, _, err = train_tiny(
        "v3-tiny", "--steps", 2, "--multimodal.pairs", "text-image", "audio-text"
    )
    assert code == 0, err
    row = rows_of(workspace / "runs/v3-tiny")[0]
    assert {name for name in row if name.startswith("loss_")} == {
        "loss_text_image",
        "loss_audio_text",
    }
    assert row["ce_loss"] == pytest.approx(
        (row["loss_text_image"] + row["loss_audio_text"]) / 2, rel=1e-6
    )


def test_a_run_starts_from_another_with_the_same_modalities(train_tiny, workspace):
    assert train_tiny("v3-tiny", "--steps", 2, "--moe.n-expert", 1)[0] == 0
    code, out, err = train_tiny(
        "v3-tiny", "--steps", 1, "--init-from", "runs/v3-tiny", "--out-dir", "on"
    )
    assert code == 0 and "each MLP copied to 4 experts" in out, err
    first, before = rows_of(workspace / "on")[0], rows_of(workspace / "runs/v3-tiny")[-1]
    assert first["val_loss"] == pytest.approx(before["val_loss"], abs=1e-2)  # bf16 at most
    code, _, err = train_tiny(
        "v3-tiny", "--init-from", "runs/v3-tiny", "--multimodal.width", 7, "--out-dir", "no"
    )
    assert code == 2 and "--multimodal.width 128 (asked for: 7)" in err


@pytest.mark.pictures
def test_training_on_a_folder_of_captioned_files(train_tiny, program, workspace):
    (workspace / "birds").mkdir()
    random = np.random.default_rng(0)
    for number in range(40):
        matplotlib.image.imsave(workspace / f"birds/{number}.png", random.random((40, 40, 3)))
    (workspace / "birds/broken.png").write_bytes(b"no image")
    (workspace / "birds/33.png").write_bytes(b"GIF89a")  # one of the held-out ones
    (workspace / "birds/notes.md").write_text("not for it")
    rows = "".join(f"{number}.png,bird number {number}\n" for number in [*range(40), "broken"])
    (workspace / "birds/captions.txt").write_text("image,caption\n" + rows)
    flags = (
        "--data",
        "birds",
        "--steps",
        20,
        "--eval-every",
        20,
    )
    code, out, err = train_tiny("v3-tiny", *flags)
    assert code == 0, err
    assert (
        "recall@1" in out
        and "2 corrupt files were skipped" in out
        and err.count("warning: skipped birds/33.png: a GIF image under the name .png") == 1
        and err.count("warning: skipped birds/broken.png") <= 1
    )
    before_training = out[: out.index("parameters")]
    for note in (
        "without audio, which the preset has",
        "held out: 4 of 41 images, by the hash of the file's name",
        "not read: 1 file (1 .md), the first: birds/notes.md",
        "decoded: 4 of 4 held-out and 37 of 37 training files; 2 of them cannot be and are skipped",
    ):
        assert f"\n           {note}" in before_training
    code, out, err = program("sample", "v3-tiny", "--query", "bird number 3")
    assert code == 0 and "image, the best of 3" in out, err
    saved = checkpoint.load(workspace / "runs/v3-tiny").state["config"]
    assert saved["multimodal"]["modalities"] == ["text", "image"]
    words = ("--multimodal.modalities", "text", "audio")
    code, _, err = train_tiny("v3-tiny", "--data", "birds", "--out-dir", "deaf", *words)
    assert code == 2 and "has no audio" in err


# ---- sample.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_three_steps(tmp_path_factory):
    """The path of a run that the first test trains."""
    return tmp_path_factory.mktemp("trained") / "v3-tiny"


@pytest.fixture
def trained(train_tiny, workspace, run_of_three_steps):
    """Put that run into the workspace."""
    if not (run_of_three_steps / "step_000003").exists():
        flags = ("--steps", 3, "--context-length", 80, "--out-dir", run_of_three_steps)
        assert train_tiny("v3-tiny", *flags)[0] == 0
    return Path(shutil.copytree(run_of_three_steps, workspace / "runs/v3-tiny"))


def test_each_modality_can_be_the_query(trained, program, workspace):
    shown = scenes.gallery(4)
    code, out, err = program(
        "sample", "v3-tiny", "--query", "A small RED circle, left of a  big blue square."
    )
    assert (
        code == 0
        and "image, the best of 512" in out
        and "audio, the best of 512" in out
        and "text, the" not in out
    ), err
    scores = [float(line.split()[1]) for line in out.splitlines() if line[:5].strip().endswith(".")]
    assert len(scores) == 10 and scores[:5] == sorted(scores[:5], reverse=True)
    assert (trained / "found.png").stat().st_size > 5000
    best = out.splitlines()[1].split(maxsplit=2)[2]
    index = scenes.gallery().captions.index(best)
    found = matplotlib.image.imread(trained / "found_image.png")[..., :3]
    np.testing.assert_allclose(
        found, scenes.gallery().images[index].transpose(1, 2, 0), atol=1 / 255
    )
    normalized_log_mel = out.splitlines()[7].split(maxsplit=2)[2]
    wave_of = scenes.gallery().waves[scenes.gallery().captions.index(normalized_log_mel)]
    np.testing.assert_allclose(read_wav(trained / "found_audio.wav"), wave_of, atol=1e-4)
    code, again, _ = program(
        "sample", "v3-tiny", "--image", trained / "found_image.png", "--top", 2
    )
    assert code == 0 and "text, the best of 512" in again and "image, the" not in again
    assert program("sample", "v3-tiny", "--audio", trained / "found_audio.wav")[0] == 0
    code, out, _ = program("sample", "v3-tiny")
    assert code == 0 and f"query      {shown.captions[0]}" in out
    code, out, _ = program("sample", "v3-tiny", "--query", "the " * 90)
    assert code == 0 and "cut        the query, of 90 tokens, after 80, as in training" in out


@pytest.mark.parametrize("name", ["found_image.png", "found_audio.wav", "found.png"])
def test_a_full_disk_leaves_what_was_found_before(trained, program, monkeypatch, name):
    (trained / name).write_bytes(b"found before")
    real = type(trained).replace

    def replace(temporary, path):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return real(temporary, path)

    monkeypatch.setattr(type(trained), "replace", replace)
    code, _, err = program("sample", "v3-tiny", "--query", "a small red circle")
    assert code == 2 and "the disk is full" in err and "Traceback" not in err
    assert (trained / name).read_bytes() == b"found before"


def test_a_folder_can_be_the_gallery(trained, program, workspace):
    folder, shown = workspace / "mine", scenes.gallery(4)
    folder.mkdir()
    for i in range(3):
        matplotlib.image.imsave(folder / f"{i}.png", shown.images[i].transpose(1, 2, 0))
    write_wav(folder / "one.wav", shown.waves[0])
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not for it")
    code, out, err = program(
        "sample", "v3-tiny", "--query", "a small red circle", "--gallery", folder
    )
    assert (
        code == 0
        and "image, the best of 3" in out
        and "audio, the best of 1" in out
        and "one.wav" in out
    )
    assert "1 files cannot be read" in err and "broken.png" in err
    assert "not read: 1 other files, the first: notes.txt" in err
    code, out, _ = program("sample", "v3-tiny", "--image", folder / "1.png", "--gallery", folder)
    assert code == 0 and "image, the" not in out and "audio, the best of 1" in out
    (folder / "one.wav").unlink()
    code, out, _ = program(
        "sample", "v3-tiny", "--image", folder / "1.png", "--gallery", folder
    )  # a gallery of images only
    score, name = out.splitlines()[1].split()[1:]
    assert code == 0 and name == "1.png" and float(score) == pytest.approx(1, abs=1e-3)


def test_bad_queries_are_refused_with_a_fix(trained, program, workspace):
    (workspace / "empty").mkdir()
    (workspace / "text.png").write_text("not an image")
    (workspace / "cut.wav").write_bytes(b"RIFF")
    with wave.open(str(workspace / "stereo.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(3)
        file.setframerate(44_100)
        file.writeframes(bytes(6 * 44_100))
    assert (
        program("sample", "v3-tiny", "--audio", "stereo.wav")[0] == 0
    )  # another rate, width and number of channels
    for flags, message in (
        (("--query", "a small purple circle"), "never read 'purple'"),
        (("--query", "a small sqare circle"), "it knows square"),
        (("--query", " "), "no word in it"),
        (("--query", "a circle", "--image", "text.png"), "give this model one query"),
        (("--image", "text.png"), "not a complete JPEG or PNG image"),
        (("--image", "nowhere.png"), "nowhere.png: cannot be read"),
        (("--audio", "cut.wav"), "cut.wav"),
        (("--gallery", "empty"), "--gallery empty is empty"),
        (("--gallery", "nowhere"), "no such folder"),
        (("--top", 0), "--top 0: must be at least 1"),
        # Typed with its default: what was asked for is not ignored.
        (("--seed", 0), "no text: drop --seed"),
        (("--temperature", 0.8, "--prompt=def"), "no text: drop --prompt and --temperature"),
    ):
        code, _, err = program("sample", "v3-tiny", *flags)
        assert code == 2 and message in err and "Traceback" not in err, (flags, err)


def test_a_language_model_refuses_queries(train_tiny, program):
    assert train_tiny("v0-tiny", "--steps", 1)[0] == 0
    for flags in (("--query", "a circle"), ("--top", 5)):
        code, _, err = program("sample", "v0-tiny", *flags)
        assert code == 2 and "generates text and neither retrieves nor classifies" in err


def test_impossible_settings_are_refused_with_a_fix(train_tiny):
    for flags, message in (
        (("--attention.kind", "block"), "take dense"),
        (("--n-head", 8), "multiple of 4"),
        (("--multimodal.modalities", "text", "smell"), "there are text, image, audio"),
        (("--multimodal.patch-size", 5), "does not divide"),
        (("--multimodal.pairs", "text-smell"), "no text-smell"),
        (("--data", "nowhere"), "no such folder"),
        (("--batch-size", 20_000), "there are 16,416 training examples"),
    ):
        code, _, err = train_tiny("v3-tiny", *flags)
        assert code == 2 and message in " ".join(err.replace("│", " ").split()), (flags, err)
