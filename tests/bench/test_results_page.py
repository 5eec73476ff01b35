"""The generated pages are current, and the README quotes no figure that is not on them."""

import re
from pathlib import Path

from nanods.bench import results_page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")


def test_the_results_page_is_what_the_results_say():
    assert results_page.results_page() == RESULTS, "run `make docs`"
    assert results_page.readme_with_results(README) == README, "run `make docs`"


def test_every_figure_of_the_readme_is_on_the_results_page():
    versions = {"3.11"}  # Python's
    figures = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", README)) - versions
    sizes = {"1.1"}  # MB of a download
    results = set(re.findall(r"\d+\.\d+", RESULTS))
    assert len(figures) > 20
    assert figures - sizes <= results, sorted(figures - sizes - results)


def test_the_readme_can_be_scanned_and_names_the_machine():
    assert len(README.splitlines()) <= 120
    table = README.split(results_page.BEGIN)[1].split(results_page.END)[0]
    assert 1 <= table.count("\n| `make") <= 8
    assert "AMD Zen 5" in README and results_page.MACHINE in RESULTS


def test_every_file_that_the_docs_name_exists():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
        for name in re.findall(r"`((?:nanods|tests|lessons)/[\w/.]+\.\w+)`", text):
            assert (ROOT / name).exists() or page.name == "MODIFYING.md", f"{page.name}: {name}"
