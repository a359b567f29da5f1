"""curves.png: a run step by step; comparison.png: what an answer is worth and what it costs."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

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


def curves(out: Path) -> None:
    """curves.png from metrics.jsonl: thin lines are steps, thick ones a running mean of ten."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, lines) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        for colour, (name, label) in enumerate(lines.items()):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if not points:
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
                continue
            x, y = zip(*points, strict=True)
            windows = [y[max(0, i - 9) : i + 1] for i in range(len(y))]
            smooth = [sum(window) / len(window) for window in windows]
            axis.plot(x, y, alpha=0.3, color=f"C{colour}")
            axis.plot(x, smooth, linewidth=2, color=f"C{colour}", label=label)
            axis.legend(fontsize=8)
    figure.supxlabel("step", fontsize=10)
    for axis in axes[0][:2]:
        axis.set_ylim(-0.02, 1.02)
    figure.savefig(out / "curves.png", dpi=120)


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
