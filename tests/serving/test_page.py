"""The page that a server shows: it loads nothing from elsewhere, and works in a browser."""

import re
from urllib.parse import quote

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from nanods.data.examples import Examples  # noqa: E402
from nanods.serving.models import embedding_model, language_model  # noqa: E402
from nanods.serving.rest import PAGE  # noqa: E402
from nanods.training.saved_gallery import SavedGallery  # noqa: E402
from tests.serving.browser import DRIVER, Browser  # noqa: E402
from tests.serving.test_server import Running, finished_run, is_idle, wait_until  # noqa: E402

in_a_browser = pytest.mark.skipif(
    DRIVER is None, reason="the page was not opened: no Chromium with chromedriver is installed"
)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        random = np.random.default_rng(0)
        images = random.random((3, 3, 32, 32), np.float32)
        mels, waves = random.random((3, 32, 32), np.float32), np.zeros((3, 8000), np.float32)
        examples = Examples(np.arange(3), ["a cat", "a dog", "<b>"], images, waves, mels)
        held_out = SavedGallery(examples, frozenset())
        patch.setattr("nanods.serving.models.held_out_examples", lambda *args: held_out)
        space = embedding_model("space", finished_run("v3-tiny", data="photos"), max_waiting=50)
    text = language_model("text", finished_run("v2-tiny"), slots=4, max_waiting=50)
    running = Running([text, space])
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_the_page_refers_to_nothing_elsewhere(server):
    page = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=.?//|@import|url\(", page)
    answer = httpx.get(server.url)
    assert answer.text == page and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


@in_a_browser
def test_the_page_generates_and_shows_what_was_used(server, browser):
    link = f"{server.url}/?model=text&prompt={quote('def f')}&tokens=40&seed=3"
    browser.open(link)
    browser.wait_for("return document.body.dataset.done")
    assert browser.run("return document.getElementById('error').textContent") == ""
    spans = browser.run(
        "return [...document.querySelectorAll('#text span')].map((s) => [s.textContent, s.title])"
    )
    assert spans[0] == ["def f", ""] and len(spans) == 41
    assert all(title.startswith("experts ") for _, title in spans[1:])
    body = {"model": "text", "prompt": "def f", "max_tokens": 40, "seed": 3, "temperature": 0.8}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20).json()
    assert "".join(text for text, _ in spans[1:]) == answer["choices"][0]["text"]
    # Point at the last character: its own block of 16 bytes is marked, as far as it had been read.
    browser.run(
        "const c = document.getElementById('colours'); c.value = 'blocks'; c.onchange();"
        "document.querySelector('#text span:last-child').dispatchEvent(new Event('pointerenter'))"
    )
    marked = browser.run(
        "return [...document.querySelectorAll('#text span')].map((s) => !!s.style.background)"
    )
    size = 16
    assert len(marked) == 45 and not marked[44]
    assert all(marked[43 // size * size : 44])


@in_a_browser
def test_the_panel_shows_what_the_server_does(server, browser):
    def shown(id):
        return browser.run(f"return document.getElementById('{id}').textContent")

    browser.open(f"{server.url}/?model=text&prompt=a&tokens=200&seed=3")
    browser.wait_for("return document.body.dataset.done")
    browser.wait_for("return document.querySelectorAll('#load i').length")
    bars = browser.run(
        "return [...document.querySelectorAll('#load i')].map((i) => [i.style.height, i.title])"
    )
    assert len(bars) == 16 and "100%" in [height for height, _ in bars]
    shares = [float(title.split(": ")[1].removesuffix("%")) for _, title in bars]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert browser.run("return document.getElementById('panel').checkVisibility()")
    assert browser.run("return document.getElementById('load').checkVisibility()")
    browser.wait_for("return document.getElementById('running').textContent === '0'")
    assert shown("waiting") == "0" and shown("alarms") == "none"
    server.monitor.set_alarm("latency", True, 1.0, 0.5)
    browser.run(
        "document.getElementById('count').value = 4000; document.getElementById('go').click()"
    )
    try:
        browser.wait_for("return Number(document.getElementById('speed').textContent) > 0")
        browser.wait_for("return document.getElementById('running').textContent === '1'")
        browser.wait_for("return document.getElementById('alarms').textContent === 'latency'")
    finally:
        server.monitor.set_alarm("latency", False, 0.0, 0.5)
        browser.run("document.getElementById('stop').click()")
    wait_until(lambda: is_idle(server.models["text"].worker))
    browser.open(f"{server.url}/?model=space&search=a+cat&among=text")
    browser.wait_for("return document.body.dataset.done")
    assert shown("speed-name") == "inputs per second"
    browser.wait_for("return document.getElementById('speed').textContent >= '0'")
    assert not browser.run("return document.getElementById('load').checkVisibility()")


@in_a_browser
def test_stop_ends_the_computing(server, browser):
    engine = server.models["text"].worker
    browser.open(f"{server.url}/?model=text")
    browser.wait_for("return document.body.dataset.done")
    before = engine.totals.cancelled
    browser.run("document.getElementById('count').value = 4000; "
                "document.getElementById('go').click()")  # fmt: skip
    browser.wait_for("return document.querySelectorAll('#text span').length > 3")
    browser.run("document.getElementById('stop').click()")
    browser.wait_for("return document.getElementById('stop').disabled")
    wait_until(lambda: is_idle(engine))
    assert engine.totals.cancelled == before + 1


@in_a_browser
def test_the_page_searches_and_escapes_captions(server, browser):
    browser.open(f"{server.url}/?model=space&search=a+cat&among=text")
    browser.wait_for("return document.body.dataset.done")
    found = browser.run(
        "return [...document.querySelectorAll('#results li')].map((li) => [li.innerText, "
        "li.querySelector('img').naturalWidth, li.querySelectorAll('audio').length, "
        "li.querySelectorAll('b').length])"
    )
    assert len(found) == 3 and "a cat" in found[0][0]
    assert all(rest == [32, 1, 0] for _, *rest in found)
    assert any("<b>" in text for text, *_ in found)


@in_a_browser
def test_the_page_shows_why_a_request_was_refused(server, browser):
    browser.open(f"{server.url}/?model=text&prompt={'x' * 100}")
    browser.wait_for("return document.body.dataset.done")
    shown = browser.run("return document.getElementById('error').textContent")
    assert shown.startswith("400: the prompt has 100 tokens; the model reads at most 64")
