"""Write docs/RESULTS.md, and the table of results in README.md, from results/*.json: `make docs`.

The figures of the two pages are computed in results_rows.py and results_rows_deployment.py. Pinned
by tests/bench/test_results_page.py: the committed pages are what this module writes, and the README
quotes no other figure.
"""

from nanods.bench import results_rows as rows
from nanods.bench import results_rows_deployment as deployment
from nanods.bench.results_rows import MACHINE, ROOT, Result
from nanods.data.download import write_atomic

BEGIN, END = "<!-- results: begin (make docs) -->", "<!-- results: end -->"
SECTIONS = {
    "Training": rows.training_results,
    "Time to a loss, generation": rows.speed_results,
    "V1: sparse attention": rows.attention_results,
    "V2: Mixture of Experts": rows.expert_results,
    "V3: one space for text, image and audio": rows.multimodal_results,
    "Several processes": rows.scaling_results,
    "Compression": deployment.compression_results,
    "Learning without forgetting": deployment.adaptation_results,
    "Serving": deployment.serving_results,
}


def table(results: list[Result], with_source: bool) -> str:
    """Return results as a Markdown table."""
    head = ["command", "what is measured", "result"] + (["source"] if with_source else [])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for result in results:
        cells = [f"`{result.command}`", result.what, result.figure]
        if with_source:
            cells.append(f"`results/{result.source}.json`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def results_page() -> str:
    """Return docs/RESULTS.md."""
    parts = [
        "# Results\n",
        "Made by `make docs` from `results/*.json`; each file is written by the command beside it.",
        f"Unless a row names another machine, figures are from {MACHINE}.",
        "Rows marked AMD EPYC are from 2 cores of a Zen 3 (AVX2, no bf16 units), those marked",
        "Intel from 2 cores of an Emerald Rapids (AVX-512 with bf16 instructions, AMX hidden). Of",
        "these only the Zen 5 is faster with bf16 than with fp32 (LOG.md). No GPU is among them.",
        "Numbers in parentheses are single seeds. Conclusions, and experiments that failed, are in",
        "[LOG.md](../LOG.md).\n",
        "A bench that trains models stores each run in `results/runs/` as soon as it is",
        "finished. If it was stopped, it continues when it is started again. Older results have",
        "no entry there: the command trains those runs again.\n",
    ]
    for title, make_results in SECTIONS.items():
        parts += [f"## {title}\n", table(make_results(), with_source=True), ""]
    return "\n".join(parts)


def readme_with_results(readme: str) -> str:
    """Return the README with its table of headline results made anew."""
    headlines = []
    for make_results in SECTIONS.values():
        headlines += [result for result in make_results() if result.headline]
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(headlines, with_source=False)}\n{END}{after}"


def main() -> None:
    readme = ROOT / "README.md"
    pages = {
        ROOT / "docs" / "RESULTS.md": results_page(),
        readme: readme_with_results(readme.read_text(encoding="utf-8")),
    }
    for path, text in pages.items():
        write_atomic(path, lambda file, text=text: file.write(text.encode()))
        print(f"wrote      {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
