"""V3 on real drawings, their names, and their names spoken: results/emoji.json and emoji.png.

    python -m nanods.bench.emoji             3 seeds; `make bench-emoji`
    python -m nanods.bench.emoji --seeds 1

It needs the extra emoji. Two runs at a time, one thread each; each is stored when it is finished
(stored_runs.py). All figures are for voices that training never hears (nanods/data/emoji.py):

    known    recall@1 among 512 names of the training set, drawn anew
    unseen   recall@5 among 200 names that training never reads, of which each word occurs in others

The mean over the seeds goes into results/expected.json, with which train.py compares its runs.
"""

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import mean

from nanods import plots
from nanods.bench.jobs import Job
from nanods.bench.runs import expected_entry, update_expected, write_json
from nanods.bench.stored_runs import machine_of, train_all
from nanods.config import PRESETS
from nanods.data.emoji import HELD_OUT_NAMES, EmojiData
from nanods.errors import run
from nanods.flags import parse_args
from nanods.training.contrastive_task import MAX_GALLERY

DIRECTIONS = list(permutations(EmojiData.modalities, 2))
UNSEEN_K = 5
CHANCE = UNSEEN_K / HELD_OUT_NAMES


@dataclass(frozen=True)
class Args:
    seeds: int = 3
    """Seeds of the weights and the batches."""
    results: Path = Path("results")
    """Where the table and the picture go."""
    runs: Path = Path("runs")
    """Where the runs go; an unfinished one is resumed."""


def last_recalls(job: Job, out: Path, rows: list[dict]) -> dict:
    """Return the figures of a finished run."""
    last = rows[-1]
    figures = {name: last[name] for name in ("val_recall1", "seconds", "cpu_seconds")}
    for a, b in DIRECTIONS:
        figures[f"known_{a}_{b}"] = last[f"recall1_{a}_{b}"]
        figures[f"unseen_{a}_{b}"] = last[f"unseen_recall{UNSEEN_K}_{a}_{b}"]
    return figures


def main() -> None:
    """Train with each seed what is not stored yet, and write the results."""
    args = parse_args(Args, __doc__)
    sizes = PRESETS["v3-emoji"].multimodal
    # The names are drawn and spoken once, before the processes start.
    sha256 = EmojiData(sizes.image_size, sizes.frames).sha256
    jobs = [Job(f"seed {i}", ("v3-emoji", "--seed", str(i))) for i in range(args.seeds)]
    stored = train_all("emoji", jobs, last_recalls, args.results, args.runs)
    runs = list(stored.values())
    figures = [f"{part}_{a}_{b}" for part in ("known", "unseen") for a, b in DIRECTIONS]
    summary = {name: mean(run[name] for run in runs) for name in figures}
    table = {
        "machine": machine_of("emoji", jobs, args.results),
        "gallery": {"known": MAX_GALLERY, "unseen": HELD_OUT_NAMES},
        "chance": {"known": 1 / MAX_GALLERY, "unseen": CHANCE},
        "summary": summary,
        "runs": runs,
    }
    write_json(args.results / "emoji.json", table)

    entry = expected_entry(sha256, "val_recall1", [run["val_recall1"] for run in runs])
    update_expected(args.results / "expected.json", {"v3-emoji/emoji": entry})

    print(f"{'':17} known, recall@1   unseen, recall@{UNSEEN_K} (times chance)")
    rows = {}
    for a, b in DIRECTIONS:
        known, unseen = summary[f"known_{a}_{b}"], summary[f"unseen_{a}_{b}"]
        print(f"{a:>6} -> {b:6} {known:>17.3f} {unseen:>18.3f} ({unseen / CHANCE:.0f})")
        rows[f"known: {a} to {b}"] = [run[f"known_{a}_{b}"] for run in runs]
    for a, b in DIRECTIONS:
        rows[f"unseen: {a} to {b}"] = [run[f"unseen_{a}_{b}"] for run in runs]
    xlabel = (
        f"recall@1 among {MAX_GALLERY} known names (chance {1 / MAX_GALLERY:.3f}), "
        f"recall@{UNSEEN_K} among {HELD_OUT_NAMES} unseen (chance {CHANCE})"
    )
    plots.save(plots.dot_plot(rows, {}, xlabel), args.results / "emoji.png")


if __name__ == "__main__":
    run(main)
