"""V3 on a table whose rows have an image, a sound and a text, or two of them."""

import json

import numpy as np
import pytest
from PIL import Image

from nanods.data.sound import write_wav
from nanods.training import checkpoint, contrastive_task

WORDS = ["red", "green", "blue", "white"]
COLOURS = [(220, 30, 30), (30, 200, 30), (30, 30, 220), (250, 250, 250)]
SMALL = (
    *("--multimodal.width", 16, "--n-layer", 1, "--n-embd", 32, "--batch-size", 16),
    *("--steps", 8, "--eval-every", 4, "--save-every", 4, "--multimodal.frames", 8),
)


def write_table(folder, per_word=16):
    """Write images of one colour, its name, and a tone of its own. Every third row has a gap."""
    folder.mkdir()
    random, rows = np.random.default_rng(0), ["image,audio,label,split\n"]
    time = np.arange(2500) / 8000
    for i in range(per_word * len(WORDS)):
        word = i % len(WORDS)
        noise = random.integers(-25, 25, (32, 32, 3))
        pixels = np.clip(np.array(COLOURS[word]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        wave = 0.3 * np.sin(2 * np.pi * 300 * 1.7**word * time) + 0.01 * random.normal(size=2500)
        write_wav(folder / f"{i}.wav", wave)
        cells = [f"{i}.png", f"{i}.wav", WORDS[word]]
        if i % 3 == 0:
            cells[i // 3 % 3] = ""
        rows.append(",".join([*cells, "val" if i < 16 else "train"]) + "\n")
    (folder / "metadata.csv").write_text("".join(rows))


@pytest.mark.pictures
def test_a_run_counts_the_pairs_that_exist_and_resumes_bitwise(
    train_tiny, program, workspace, killed_at, monkeypatch
):
    write_table(workspace / "table")
    flags = ("--data", "table", *SMALL)
    code, out, err = train_tiny("v3-tiny", *flags, "--out-dir", "whole")
    assert code == 0, err
    assert "held-out examples of 4 labels" in out
    assert "of 48 training examples have text and image 37, text and audio 38, image and" in out
    assert "zero-shot accuracy among 4 labels: image" in out
    run = workspace / "whole"
    for name in ("similarities.png", "neighbours.png", "recall.png", "confusion.png", "sheet.html"):
        assert (run / name).stat().st_size > 5000
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss_text_audio"]) for row in rows)
    assert rows[-1]["recall1_image_text"] > 0.3

    with killed_at(6):
        train_tiny("v3-tiny", *flags, "--out-dir", "cut")
    monkeypatch.setattr(contrastive_task, "draw_multimodal_run", lambda *args: [])
    code, out, err = train_tiny("v3-tiny", *flags, "--resume", "--out-dir", "cut")
    assert code == 0 and "after step 4" in out, err
    paths = [checkpoint.load(workspace / name).path for name in ("whole", "cut")]
    whole, cut = ((path / "model.safetensors").read_bytes() for path in paths)
    assert whole == cut

    code, out, err = program("sample", "whole", "--query", "blue", "--top", 3)
    assert code == 0 and "image, the best of 14:" in out and "audio, the best of 14:" in out, err
