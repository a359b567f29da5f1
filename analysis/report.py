"""What a run or an evaluation leaves to be looked at, and the table on screen."""

import resource
import time
from pathlib import Path

import torch

from analysis import figures, history, page
from analysis.tables import explain, table
from plumbing import folder, ranks


def pictures(out: Path) -> None:
    """curves.png and report.html of a run whose steps have ended."""
    figures.curves(out / "curves.png", history.metrics(out))
    page.write(out)


def save_comparison(out: Path, settings: dict, results: dict, started: float) -> None:
    """Writes results.json, table.md, comparison.png and report.html, and prints the table.

    Rank 0 does.
    """
    if ranks.RANK:
        return
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved() / 2**30  # of the GPU: engine and trainer
    else:  # of the process, in KiB on Linux; without the answer checker's 0.3 GiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    minutes = (time.perf_counter() - started) / 60
    folder.write_json(out / "results.json", results | {"minutes": minutes, "peak_gib": peak})
    measured = [results | {"settings": settings}]
    text = f"{table(measured)}\n\n{explain(results)}"
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    if any(score is not None for row in results["rows"] for score in row["values"]):  # labels
        figures.comparison(out / "comparison.png", measured)
    page.write(out)
    cost = f"{minutes:.1f} minutes, peak memory {peak:.2f} GiB"
    print(f"\n{text}\n\n{cost}; {out}/ holds it all: open report.html in a browser")
