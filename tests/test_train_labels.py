"""V3 on labels as captions: ten words, each the transcript of many sounds."""

import json
import shutil

import numpy as np
import pytest

from nanods.data.sound import write_wav

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SMALL = (
    *("--multimodal.modalities", "text", "audio", "--multimodal.width", 16, "--moe.n-expert", 1),
    *("--n-layer", 1, "--n-embd", 32, "--batch-size", 32, "--steps", 80, "--eval-every", 80),
)


def write_words(folder, seconds=1.0, per_word=40):
    """Write sounds of each word, a tone of the word's own pitch with noise, and transcripts."""
    folder.mkdir()
    random = np.random.default_rng(0)
    time = np.arange(round(8000 * seconds)) / 8000
    for number, word in enumerate(WORDS):
        for i in range(per_word):
            hertz = 200 * 1.35**number * random.uniform(0.98, 1.02)
            wave = 0.3 * np.sin(2 * np.pi * (hertz * time + random.uniform()))
            write_wav(folder / f"{word}_{i}.wav", wave + 0.02 * random.normal(size=len(time)))
            (folder / f"{word}_{i}.txt").write_text(word.title() if i % 2 else f" {word}\n")


@pytest.mark.pictures
def test_ten_words_are_learnt_reported_as_labels_and_found(train_tiny, program, workspace):
    write_words(workspace / "words")
    code, out, err = train_tiny("v3-tiny", "--data", "words", *SMALL)
    assert code == 0, err
    assert "held-out examples of 10 labels" in out
    assert "28 that are not its duplicates: an untrained model's loss is about ln 29 = 3.37" in out
    assert "zero-shot accuracy among 10 labels: audio" in out and "\ncut        nothing\n" in out
    run = workspace / "runs/v3-tiny"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("recall1_text_audio", "recall1_audio_text", "zero_shot_accuracy_audio"):
        assert last[name] >= 0.95, name
    assert last["ce_loss"] < 0.2 and last["val_loss"] < 0.2
    assert (run / "confusion.png").stat().st_size > 5000

    shutil.rmtree(workspace / "words")  # sample.py needs no data
    code, out, err = program("sample", "v3-tiny")
    assert code == 0 and "query      " in out and "notice" not in out, err
    query = out.splitlines()[0].split()[1]
    found = [line.split()[2] for line in out.splitlines() if line[:5].strip().endswith(".")]
    assert len(found) == 5 and found[0].casefold() == query.casefold()
    code, out, err = program("sample", "v3-tiny", "--query", "Elephants")
    assert code == 0 and "the model has read none of these words: elephants" in out, err
    code, out, err = program("sample", "v3-tiny", "--query", "seven elephants, " * 9)
    assert "words that the model has never read: elephants" in out
    assert "cut        the query, of 116 tokens, after 32, as in training" in out
    # Equal texts are shown once, whatever their case.
    write_wav(workspace / "long.wav", np.sin(np.arange(20_000)))
    code, out, err = program("sample", "v3-tiny", "--audio", "long.wav", "--top", 9)
    texts = [line.split()[2] for line in out.splitlines() if line[:5].strip().endswith(".")]
    assert 5 < len({text.casefold() for text in texts}) == len(texts), err
    assert f"text, the best of {len(texts)}:" in out or len(texts) == 9
    assert "cut        long.wav after 1.06 s, as in training" in out
    # Without the saved examples and without the data, a gallery and a query are asked for.
    (run / "gallery.safetensors").unlink()
    code, _, err = program("sample", "v3-tiny")
    assert code == 2 and "give --gallery FOLDER and a query" in err
    (workspace / "mine").mkdir()
    (workspace / "long.wav").rename(workspace / "mine/long.wav")
    code, out, err = program("sample", "v3-tiny", "--query", "seven", "--gallery", "mine")
    assert code == 0 and "cut        mine/long.wav after 1.06 s" in out, err


def test_a_run_of_few_captions_resumes_and_others_start_from_its_tokens(train_tiny, workspace):
    write_words(workspace / "words", per_word=4)
    write_words(workspace / "other", per_word=4)
    for path in (workspace / "other").glob("*.txt"):
        path.write_text(f"someone says {path.read_text()}")
    flags = ("v3-tiny", *SMALL, "--steps", 2, "--vocab-size", 384)
    code, out, err = train_tiny(*flags, "--data", "words")
    assert code == 0 and "a vocabulary of 2" in out and "captions give no more" in out, err
    code, out, err = train_tiny(*flags, "--data", "words", "--resume")
    assert code == 0 and "is finished" in out, err
    for flag, start in (("--init-from", "start"), ("--teacher", "teacher")):
        code, out, err = train_tiny(
            *flags, "--data", "other", flag, "runs/v3-tiny", "--out-dir", start
        )
        assert code == 0 and "captions are cut into tokens as in runs/v3-tiny" in out, err
        assert f"\n{start} " in out


def test_what_is_cut_or_has_no_negatives_is_said_before_the_first_step(train_tiny, workspace):
    write_words(workspace / "words", seconds=2.0, per_word=4)
    flags = ("--data", "words", *SMALL, "--steps", 1, "--batch-size", 2)
    flags = (*flags, "--vocab-size", 256, "--context-length", 4)
    code, out, err = train_tiny("v3-tiny", *flags)
    assert code == 0, err
    notices, _ = out.split("\nexpected ")
    assert (
        "cut        12 of " in notices and " captions after 4 tokens: --context-length 5" in notices
    )
    assert "cut        40 of 40 sounds after 1.06 s (median 2 s, longest 2 s)" in notices
    assert "--multimodal.frames 62 hears the longest to its end" in notices
    code, _, err = train_tiny("v3-tiny", *flags, "--batch-size", 1)
    assert code == 2 and "--batch-size 1: the loss compares" in err and "Traceback" not in err
    for text in (workspace / "words").glob("*.txt"):
        text.write_text("one word")
    code, _, err = train_tiny("v3-tiny", *flags)
    assert code == 2 and "examples have the caption 'one word'" in err
