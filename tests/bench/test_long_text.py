"""The long-text bench predicts the same text whatever the length of the window."""

import math

import numpy as np
import pytest
import torch

from nanods.bench import long_text


class Listener(torch.nn.Module):
    """Gives the true next token probability 1/2 from position `known` on, and 1/256 before; keeps
    what it has read."""

    def __init__(self, text, known):
        super().__init__()
        self.text, self.known, self.windows = text, known, []

    def forward(self, tokens):
        start = int(tokens[0, 0])  # the text counts upwards
        self.windows.append((start, start + tokens.size(1)))
        logits = torch.zeros(1, tokens.size(1), 256)
        for t in range(self.known, tokens.size(1)):
            logits[0, t, int(self.text[start + t + 1])] = math.log(255)
        return logits, []


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 4)
    monkeypatch.setattr(long_text, "WINDOWS", (4, 8, 16))
    monkeypatch.setattr(long_text, "N_PIECES", 3)


def test_the_same_tokens_are_predicted_in_windows_of_each_length(small):
    text = np.arange(60, dtype=np.uint8)
    model = Listener(text, known=4)
    bits = long_text.bits_by_window(model, text)
    ends = {length: [stop for start, stop in model.windows if stop - start == length]
            for length in (4, 8, 16)}  # fmt: skip
    assert ends[4] == ends[8] == ends[16] and len(set(ends[4])) == 3
    assert min(start for start, _ in model.windows) == 0 and max(ends[16]) == len(text) - 1
    # What a model knows from position 4 on helps in all windows but the shortest.
    assert list(bits) == ["4", "8", "16"]
    assert list(bits.values()) == pytest.approx([8, 1, 1], abs=1e-5)
