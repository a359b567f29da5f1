"""Scores as Markdown, and a step of a run as text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis import history
from analysis.statistics import difference, interval, methods
from plumbing.errors import InputError


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = table
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]


NOTE = (
    "± standard error, interval and p (two-sided): bootstrap over runs and questions, paired for "
    "differences; generations and tokens per answer, of the first run"
)


def table(measured: Sequence[dict], against: str | None = None) -> str:
    """Results as Markdown, a table for each set of questions. Raises InputError.

    `against`: the row that differences are taken to; default: the first.
    """
    tables = cells_of(measured, against)
    return "\n".join([*(line for cells in tables for line in (*markdown(cells), "")), NOTE])


def cells_of(measured: Sequence[dict], against: str | None = None) -> list[list[list[str]]]:
    """The tables of `table`, each as rows of cells with the head first. Raises InputError."""
    tables = []
    for digest in dict.fromkeys(results["digest"] for results in measured):
        group = [results for results in measured if results["digest"] == digest]
        found, judged, total = methods(group), group[0]["judged"], group[0]["questions"]
        rival = against or next(iter(found))
        if rival not in found:
            there = ", ".join(found)
            raise InputError(f"there is no method {rival!r} to compare with, there are: {there}")
        what = f"{group[0]['settings']['task']}, {total} questions"
        head = [what, "runs", "score" if judged else "accuracy", "95% interval", "right"]
        cells = [[*head, f"minus {rival}", "p", "generations", "tokens"]]
        for name, m in found.items():
            d = difference(m, found[rival]) if name != rival else None
            row = [*scores_of(m, judged, total), *difference_of(d)]
            cells.append([name, *row, f"{m['generations']}", f"{m['tokens']:.0f}"])
        tables.append(cells)
    return tables


def scores_of(m: dict, judged: bool, total: int) -> list[str]:
    """Cells: runs, mean with its error, interval, how many answers are right."""
    values = m["scores"]  # (runs, questions)
    scored = int((~np.isnan(values).any(axis=0)).sum())
    if not scored:
        return [f"{len(values)}", "no labels", "", ""]
    i = interval(values, clip=True)
    few = f" (of {scored} questions)" if scored < total else ""  # a judge left the others open
    right = f"{np.nansum(values) * m['answers']:.0f} of {m['answers'] * scored * len(values)}"
    mean, ends = f"{i['mean']:.3f} ± {i['error']:.3f}{few}", f"{i['low']:.3f} to {i['high']:.3f}"
    return [f"{len(values)}", mean, ends, "" if judged else right]


def difference_of(d: dict | None) -> list[str]:
    """Cells: a difference with its interval, and p."""
    if d is None or np.isnan(d["mean"]):
        return ["", ""]
    p = "" if np.isnan(d["p"]) else "< 0.001" if d["p"] < 0.001 else f"{d['p']:.3f}"
    return [f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})", p]


# What the table does not show: the corner of a small table, and the part of the results.
PARTS = {
    "synthesis against": "mechanism",
    "pass@k": "pass",
    "of": "coverage",
    "per text": "style",
}


def explain(results: dict) -> str:
    """Counts of questions, pass@k and how texts are written, as small tables."""
    return "\n".join(line for cells in parts_of(results) for line in (*markdown(cells), ""))


def parts_of(results: dict) -> list[list[list[str]]]:
    """The tables of `explain`, each as rows of cells with the head first."""
    tables = []
    for corner, part in PARTS.items():
        if rows := results.get(part):
            cells = [[corner, *next(iter(rows.values()))]]
            for name, numbers in rows.items():
                shown = [f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in numbers.values()]
                cells.append([name, *shown])
            tables.append(cells)
    return tables


def show(run: Path, step: int) -> str:
    """Every question of a step of a run: rollouts across, criteria down. Raises InputError."""
    where = history.where_steps_are(run)
    if not where:
        raise InputError(f"{run} holds no rollouts.jsonl: give the folder of a run")
    if step not in where:
        counted = "it is counted from 0, and metrics.jsonl lists them"
        raise InputError(f"{run} has no step {step}: {counted}")
    rows = history.rows_at(run, where[step])
    marks, parts = {True: "yes", False: "no", None: "?"}, []
    for row in rows:
        parts += ["=" * 100, *(f"{m['role']}: {m['content']}" for m in row["question"])]
        parts += [f"\n--- rollout {i}\n{text}" for i, text in enumerate(row["rollouts"], start=1)]
        parts += [f"\n--- reference\n{row['reference']}\n"]
        table = [["", *(f"{i}" for i in range(1, len(row["rollouts"]) + 1))]]
        for k, criterion in enumerate(row.get("rubric", [])):
            table.append([criterion, *(marks[verdicts[k]] for verdicts in row["verdicts"])])
        table.append(["reward", *("-" if r is None else f"{r:.2f}" for r in row["rewards"])])
        parts += markdown(table)
    return "\n".join(parts)
