"""curves.png: a run step by step; comparison.png: what an answer is worth and what it costs."""

from collections.abc import Sequence
from io import StringIO
from itertools import product
from pathlib import Path

from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.statistics import difference, interval, methods
from plumbing.errors import InputError

# Titles of the panels of curves.png -> the metrics in each -> what they are called there.
PANELS = {
    "Reward (share that agrees with the reference)": {"reward": "rollouts"},
    "True accuracy (labels, for the eye only)": {
        "accuracy/rollouts": "rollouts",
        "accuracy/reference": "reference",
    },
    "Questions a step where reference and majority differ": {
        "mechanism/differs": "differ",
        "mechanism/differs_right": "reference right",
        "mechanism/other_right": "majority right",
    },
    "KL to the initial policy (nats a token)": {"kl": "k3"},
    "Completion length (tokens)": {"completions/mean_length": "mean"},
    "Entropy of a question's answers (nats)": {"mechanism/entropy": "rollouts"},
}


SHARES = list(PANELS)[:2]  # from 0 to 1
# What only some runs measure: panels of report.html alone.
MORE_PANELS = {
    "Validation score": {"validation/score": "policy"},
    "Verdicts that are not known (share)": {"judge/unknown_rate": "of the judge's"},
}
STYLES = ("-", "--", ":")


def panel(axis, title: str, metrics: dict[str, str], logs: dict[str, list[dict]]) -> bool:
    """One panel: thin lines are steps, thick ones a running mean of ten. Was anything measured?

    `logs`: a run's name -> its metrics.jsonl. Of one run each metric has a colour. Of several runs
    each has a colour and each metric a style, and there are no thin lines.
    """
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    several, drawn = len(logs) > 1, {}  # what the legend says -> how its line looks
    for (n, (run, rows)), (k, (name, label)) in product(
        enumerate(logs.items()), enumerate(metrics.items())
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        width = 10 if 2 * len(y) > len(rows) else 1  # validation comes too seldom for a mean
        windows = [y[max(0, i + 1 - width) : i + 1] for i in range(len(y))]
        smooth = [sum(window) / len(window) for window in windows]
        if several:
            axis.plot(x, smooth, STYLES[k], linewidth=1.7, color=f"C{n % 10}")
            drawn |= {run: (f"C{n % 10}", "-")}
            drawn |= {label: ("grey", STYLES[k])} if len(metrics) > 1 else {}
        else:
            axis.plot(x, y, alpha=0.3, color=f"C{k}", linewidth=1)
            axis.plot(x, smooth, linewidth=2, color=f"C{k}")
            drawn |= {label: (f"C{k}", "-")}
    if title in SHARES:
        axis.set_ylim(-0.02, 1.02)
    if drawn:
        keys = [Line2D([], [], color=c, linestyle=s, label=k) for k, (c, s) in drawn.items()]
        axis.legend(handles=keys, fontsize=8)
    return bool(drawn)


def curves(path: Path, rows: list[dict]) -> None:
    """curves.png from the lines of metrics.jsonl."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, metrics) in zip(axes.flat, PANELS.items(), strict=True):
        if not panel(axis, title, metrics, {"": rows}):
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    figure.supxlabel("step", fontsize=10)
    figure.savefig(path, dpi=120)


def curves_svg(logs: dict[str, list[dict]]) -> list[tuple[str, str]]:
    """(title, SVG) of every panel that has something in it, for a page.

    Its ink and its first colours are the page's own, so that one picture suits light and dark.
    """
    found, inks = [], {"#000000": "currentColor"}
    inks |= {to_hex(f"C{n}"): f"var(--c{n})" for n in range(4)}
    # Text stays text; ids are the same for the same content.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        for title, metrics in (PANELS | MORE_PANELS).items():
            figure = Figure(figsize=(5.2, 3.1), layout="constrained")
            axis = figure.subplots()
            if not panel(axis, title, metrics, logs):
                continue
            axis.set_title("")
            axis.set_xlabel("step")
            axis.spines[["top", "right"]].set_visible(False)
            axis.get_legend().get_frame().set_alpha(0)
            text = StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(text, format="svg", transparent=True, metadata=nothing)
            svg = text.getvalue()[text.getvalue().index("<svg") :]
            for ink, own in inks.items():
                svg = svg.replace(ink, own)
            found.append((title, svg))
    return found


def comparison(path: Path, measured: Sequence[dict]) -> None:
    """A PNG: accuracy by the generations an answer costs, by G, and synthesis minus majority.

    Raises InputError where it cannot be written.
    """
    digest = measured[0]["digest"]
    found = methods([results for results in measured if results["digest"] == digest])
    first = next(m for m in found.values() if m["kind"] == "initial")
    selected = [m for m in found.values() if m["kind"] == "inference"]
    at_inference = {(m["aggregator"], m["size"]): m for m in selected}
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(4, 3, 3))

    def bar(axis, x, i, **style):
        ends = [[max(0, i["mean"] - i["low"])], [max(0, i["high"] - i["mean"])]]
        axis.errorbar(x, i["mean"], ends, capsize=2, **style)

    for colour, name in enumerate(dict.fromkeys(name for name, _ in at_inference)):
        ms = [m for (n, _), m in at_inference.items() if n == name]
        # A selection from one rollout is that rollout.
        ms = ms if ms[0]["size"] == 1 else [{**first, "size": 1}, *ms]
        for axis, cost in ((axes[0], "generations"), (axes[1], "size")):
            points = [interval(m["scores"], clip=True) for m in ms]
            x, y = [m[cost] for m in ms], [i["mean"] for i in points]
            axis.plot(x, y, color=f"C{colour}", label=name)
            for m, i in zip(ms, points, strict=True):
                bar(axis, m[cost], i, fmt="o", ms=3, color=f"C{colour}")
    for name, m in found.items():
        if m["kind"] == "trained":
            bar(axes[0], 1, i := interval(m["scores"], clip=True), fmt="*", ms=14, label=name)
            axes[0].axhline(i["mean"], lw=0.7, ls=":", color="grey")
    for (name, size), m in at_inference.items():
        if name == "synthesis" and (vote := at_inference.get(("majority", size))):
            bar(axes[2], size, difference(m, vote), fmt="o", color="C0")
    axes[2].axhline(0, color="grey", lw=0.7)
    titles = {
        "mean by cost": "generations per answer",
        "mean by G": "G",
        "synthesis minus majority, paired": "G",
    }
    for axis, (title, x) in zip(axes, titles.items(), strict=True):
        cost = "generations" if axis is axes[0] else "size"
        ticks = sorted({1, *(m[cost] for m in at_inference.values())})
        axis.set_xscale("log", base=2)
        axis.set(title=f"{title}, 95% intervals", xlabel=x, xticks=ticks, xticklabels=ticks)
    axes[0].legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): name another file") from None
