"""report.html: what a run was, its curves, and who said what in it, in one file.

The page loads nothing and needs no server: page.html.j2 is its template, and page.css and page.js
go into it. Jinja2 escapes all that a model, a judge or a person wrote. As a second lock the page
allows one script only, its own, by its hash.
"""

import base64
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analysis import decisions, figures, history, tables
from analysis.statistics import method_of, saved_results
from plumbing.errors import InputError

HERE = Path(__file__).resolve().parent
BETWEEN = 8  # steps that are shown between the first and the last
IMITATED = "CaT-SFT rewards nobody: the policy imitates the reference."
LIMIT = 5_000_000  # bytes of questions on a page whose steps nobody named
SHORT = 44  # columns: texts whose lines are no longer stand closer together


def number(value: float | None, signed: bool = False) -> str:
    """As people write it: two digits and a real minus sign; "?" if it is not known."""
    if value is None:
        return "?"
    return f"{value:{'+' if signed else ''}.2f}".replace("-", "−")


@cache
def templates() -> Environment:
    """page.html.j2 and question.html.j2, with what they call."""
    page = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page.globals |= {
        "script": Markup(script),
        "script_hash": Markup(digest),
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "listed": decisions.listed,
    }
    page.filters |= {"number": number, "percent": lambda share: f"{share:.0%}"}
    return page


# --------------------------------------------------------------------------------- what is in a run


def about(run: Path) -> dict:
    """What a run was and has measured, for the template. Raises InputError."""
    config, rows = history.config_of(run), history.metrics(run)
    settings = config["settings"]
    results = saved_results(run) if (run / "results.json").exists() else None
    return {
        "name": run.resolve().name,
        "settings": settings,
        "method": method_of(settings),
        "unusual": history.unusual(settings),
        "config": config,
        "steps": len(rows),
        "minutes": results["minutes"] if results else sum(r.get("step_time", 0) for r in rows) / 60,
        "results": results,
        "tables": tables.cells_of([results]) if results else [],
        "parts": tables.parts_of(results) if results else [],
        "rows": {row["step"]: row for row in rows},
        "decided": decided(rows),
    }


def decided(rows: Sequence[dict]) -> dict:
    """Counts of questions over all steps of metrics.jsonl; None for one that a step lacks."""
    names = ("voted", "differs", "differs_right", "other_right", "new", "new_right")
    names += ("hopeless", "hopeless_right")
    found = {name: [row.get(f"mechanism/{name}") for row in rows] for name in names}
    return {name: None if None in each else sum(each) for name, each in found.items()}


def question(row: dict, number: int, settings: dict) -> dict:
    """A line of rollouts.jsonl, for the template."""
    A, size = decisions.pushes(row["rewards"]), len(row["rollouts"])
    found = decisions.vote(row) if settings["reward"] == "match" else None
    reference, rollouts = decisions.marked(row)
    rubric = decisions.criteria(row) if row.get("rubric") is not None else None
    said = []
    if found:
        said = [decisions.told(found, size), decisions.parting(row, found)]
    elif rubric:
        said = [decisions.compared(row, rubric)]
    imitated = settings["method"] == "sft"
    said.append(IMITATED if imitated else decisions.consequence(row, A, found))
    texts = [row["reference"], *row["rollouts"]]
    by_number = {n: o for o in (found["options"] if found else ()) for n in o["rollouts"]}
    nothing = {"answer": None, "right": False if found and found["truth"] is not None else None}
    cut = row.get("cut_off", [False] * (size + 1))
    asked, _, rest = row["question"][-1]["content"].partition("\n\n")
    silent = not imitated and not any(A)
    return {
        "step": row["step"],
        "number": number,
        "asked": (asked, rest and f"\n\n{rest}"),
        "messages": row["question"],
        "tag": decisions.HEADLINES[found["kind"]] if found else ("", shown_rewards(row, silent)),
        "vote": found,
        "size": size,
        "sentences": said,
        "reference": [
            {
                "text": text,
                "said": any(marks),
                "marks": marks,
                "owners": [n for n, mark in enumerate(marks, 1) if mark in ("same", "alike")],
            }
            for text, marks in reference
        ],
        "reference_cut": cut[size],
        "rollouts": [
            {
                "number": n,
                "lines": rollouts[n - 1],
                "reward": row["rewards"][n - 1],
                "A": A[n - 1],
                "answer": by_number.get(n, nothing)["answer"],
                "right": by_number.get(n, nothing)["right"],
                "cut": cut[n - 1],
                "tokens": row["tokens"][n - 1] if "tokens" in row else None,
            }
            for n in range(1, size + 1)
        ],
        "rubric": rubric,
        "physicians": row.get("physicians") if settings["reward"] != "physician" else None,
        "silent": silent,
        "imitated": imitated,
        "short": max(len(line) for text in texts for line in text.split("\n")) <= SHORT,
        "reward_kind": settings["reward"],
    }


def shown_rewards(row: dict, silent: bool) -> str:
    known = [reward for reward in row["rewards"] if reward is not None]
    span = f"Rewards {number(min(known))} to {number(max(known))}" if known else "No rewards"
    return f"{span}: teaches nothing" if silent else span


def to_look_at(questions: Sequence[dict]) -> list[tuple[str, dict]]:
    """(title, question) of the two to read first: one where it worked and one where it did not."""
    kinds = (
        ("right", "left", "both right", "with"),
        ("wrong", "neither", "both wrong", "silent"),
    )
    titles = {"good": "A right decision", "bad": "A wrong decision", "": "A decision"}
    taught = sorted(questions, key=lambda q: q["silent"])  # rather one that has an effect
    pairs = []
    for several in kinds if questions and questions[0]["vote"] else ():
        first = next((q for k in several for q in taught if q["vote"]["kind"] == k), None)
        pairs.append((titles[first["tag"][0]] if first else "", first))
    judged = [q for q in questions if q["rubric"]]
    apart = [q for q in judged if not q["silent"]]
    best = max(apart, key=lambda q: max(abs(o["A"]) for o in q["rollouts"]), default=None)
    pairs.append(("A rubric that tells rollouts apart", best))
    flat = next((q for q in judged if q["silent"]), None)
    pairs.append(("A rubric that teaches nothing", flat))
    return [(title, q) for title, q in pairs if q]


# --------------------------------------------------------------------------------- which steps


def spread(steps: Sequence[int], between: int) -> list[int]:
    """The first, the last and `between` others, evenly.

    >>> spread(range(60), 8)
    [0, 7, 13, 20, 26, 33, 39, 46, 52, 59]
    """
    if len(steps) <= between + 2:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (between + 1))] for i in range(between + 2)]


def fitting(steps: Sequence[int], cards: Callable) -> list[int]:
    """As many of the first, the last and BETWEEN others as LIMIT allows; two at least."""
    between = BETWEEN
    while True:
        chosen = spread(steps, between)
        size = sum(len(html.encode()) for step in chosen for _, html in cards(step))
        if size <= LIMIT or between == 0:
            return chosen
        between = max(0, min(between - 1, LIMIT * len(chosen) // size - 2))


def within(limit: float, cards: Sequence[tuple]) -> list[tuple]:
    """The first of `cards` that take at most `limit` bytes together."""
    sizes = accumulate(len(html.encode()) for _, html in cards)
    return [card for card, size in zip(cards, sizes, strict=True) if size <= limit]


# --------------------------------------------------------------------------------- the pages


def distinct(names: Sequence[str]) -> list[str]:
    """Names of runs for a legend; of equal ones, all but the first get a number."""
    seen = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if n == 1 else f"{name} ({n})" for name, n in zip(names, seen, strict=True)]


def write(run: Path, steps: Sequence[int] | None = None) -> str:
    """report.html in the folder of a run; returns a sentence. Raises InputError.

    `steps`: whose questions are shown; default: as many as fit.
    """
    info, where = about(run), history.where_steps_are(run)
    if missing := sorted(set(steps or ()) - set(where)):
        logged = f"it has {len(where)} logged steps, from {min(where)} to {max(where)}"
        raise InputError(f"{run} has no step {missing[0]}: {logged if where else 'none is logged'}")
    draw = templates().get_template("question.html.j2").render

    @cache
    def cards(step: int) -> list[tuple[dict, str]]:
        rows = enumerate(history.rows_at(run, where[step]), start=1)
        made = [question(row, n, info["settings"]) for n, row in rows]
        return [(q, Markup(draw(q=q))) for q in made]

    chosen = sorted(set(steps)) if steps else fitting(sorted(where), cards)
    limit = math.inf if steps else LIMIT / max(1, len(chosen))
    shown = [(step, within(limit, cards(step)), len(where[step])) for step in chosen]
    questions = [q for _, part, _ in shown for q, _ in part]
    counts = {
        "differs": sum(bool(q["vote"] and q["vote"]["differs"]) for q in questions),
        "wrong": sum(bool(q["vote"] and q["vote"]["wrong"]) for q in questions),
        "hopeless": sum(bool(q["vote"] and q["vote"]["hopeless"]) for q in questions),
        "silent": sum(q["silent"] for q in questions),
    }
    first = [(title, Markup(draw(q=q, open=True))) for title, q in to_look_at(questions)]
    logged = {"shown": shown, "logged": len(where), "counts": counts, "first": first}
    return save(run / "report.html", [info], questions=len(questions), **logged)


def compare(runs: Sequence[Path], path: Path) -> str:
    """A page of several runs: curves in one plot, tables under each other. Raises InputError."""
    infos = [about(run) for run in runs]
    for info, run in zip(infos, runs, strict=True):
        info["link"] = os.path.relpath(run / "report.html", path.parent)
    measured = [info["results"] for info in infos if info["results"]]
    together = tables.cells_of(measured) if measured else []
    return save(path, infos, together=together)


def save(path: Path, infos: list[dict], **more) -> str:
    """Write the page, whole or not at all."""
    names = distinct([info["name"] for info in infos])
    logs = {name: list(info["rows"].values()) for name, info in zip(names, infos, strict=True)}
    given = {"runs": infos, "curves": figures.curves_svg(logs), "note": tables.NOTE, **more}
    html = templates().get_template("page.html.j2").render(given)
    temporary = path.with_suffix(".tmp")
    try:  # a judge's text may hold half a character, which UTF-8 cannot
        temporary.write_text(html, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror})") from None
    return f"{path} ({path.stat().st_size / 1000:,.0f} kB): open it in a browser"
