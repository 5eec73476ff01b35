"""Diagrams name their parts and shapes, no word overlaps another or leaves its box, and
docs/architecture.png is what nanods/diagrams.py draws."""

import inspect
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from nanods import diagrams, plots
from nanods.diagrams import Diagram
from tests.test_plots import overlaps, words

ROOT = Path(__file__).parents[1]
DRAWINGS = {
    name: draw
    for name, draw in vars(diagrams).items()
    if inspect.isfunction(draw) and inspect.signature(draw).return_annotation is Diagram
}
PARTS = {
    "architecture": ["V0: dense GPT", "router: 2 of 16 experts", "one embedding each (B, M)"],
    "trunk": ["residual stream x (B, T, C)", "n_layer of them in a row", "logits (B, T, V)"],
    "attention": ["RoPE, RMSNorm to query_gain", "causal softmax", "(B, H, T, D)"],
    "block_attention": ["blocks (B, H, T, K)", "one causal softmax"],
    "expert_layer": ["probabilities (N, E)", "experts (N, K)", "weighted sum"],
    "contrastive_model": ["one trunk", "(B, T, C)", "cosines (B, B)"],
    "gradient_caching": ["no graph", "gradient (b, M)", "3. embed again"],
    "splits": ["dp", "fsdp", "tp", "ep", "sends gradients"],
    "tensor_parallel": ["(H/n, C)", "(N, H/n)", "(C, H/n)", "term (N, C)"],
    "expert_parallel": ["rows (N K, C)", "received (R, C)", "the last E/n"],
    "plan": ["bytes kept", "bytes sent", "seconds of a step"],
    "int8_layer": ["(N, C)", "int32", "one scale per row", "(N, F) fp32"],
    "engine": ["a slot is free", "cache: keys and values", "read it again"],
}


def test_each_diagram_has_a_test_of_its_parts():
    assert PARTS.keys() == DRAWINGS.keys()


@pytest.mark.parametrize("name", PARTS)
def test_a_diagram_names_its_parts_and_shapes_and_covers_none(name):
    figure = DRAWINGS[name]()
    assert all(part in words(figure) for part in PARTS[name])
    assert not overlaps(figure)


@pytest.mark.parametrize("name", PARTS)
def test_no_text_of_a_diagram_leaves_its_box(name):
    figure = DRAWINGS[name]()
    FigureCanvasAgg(figure).draw()
    boxes = [p.get_window_extent() for p in figure.drawing.patches if type(p) is FancyBboxPatch]
    for text in figure.drawing.texts:
        extent = text.get_window_extent()
        middle = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
        for box in boxes:
            if box.contains(*middle):
                assert box.x0 <= extent.x0 and extent.x1 <= box.x1, text.get_text()
                assert box.y0 <= extent.y0 and extent.y1 <= box.y1, text.get_text()


def test_the_splits_diagram_gives_each_process_its_half():
    colours = [to_hex(cell.get_facecolor()) for cell in diagrams.splits().drawing.patches]
    cells = [colour == to_hex(diagrams.HELD) for colour in colours]  # 16 weights, 4 tokens each
    counts = [(sum(cells[i : i + 16]), sum(cells[i + 16 : i + 20])) for i in range(0, 160, 20)]
    assert counts == [(16, 2)] * 2 + [(8, 2)] * 2 + [(8, 4)] * 2 + [(10, 2)] * 2


def test_a_diagram_prints_as_its_words_and_its_png_says_them_too(tmp_path):
    figure = diagrams.engine()
    assert repr(figure).startswith("Diagram: waiting requests | read the prompt alone, in chunks |")
    plots.save(figure, tmp_path / "engine.png")
    with Image.open(tmp_path / "engine.png") as picture:
        assert picture.text["Description"] == repr(figure)


def test_the_committed_drawing_of_the_architecture_is_current():
    with Image.open(ROOT / "docs" / "architecture.png") as picture:
        assert picture.text["Description"] == repr(diagrams.architecture()), "run `make docs`"
