"""Means with intervals, paired differences, and runs of one method put together."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from plumbing.errors import InputError
from plumbing.folder import saved_settings, upgraded
from plumbing.settings import MAY_CHANGE

# Settings that reach answers of pi_0.
INFERENCE = "model eval_sampling max_new_tokens group_size judge_model".split()
PAPER_NAMES = {
    ("grpo", "synthesis"): "CaT",
    ("sft", "synthesis"): "CaT-SFT",
    ("grpo", "majority"): "TTRL",
}


def interval(values: np.ndarray, draws: int = 10_000, clip: bool = False) -> dict[str, float]:
    """Mean of `values` (runs, questions), its standard error, 95% interval, and p of a mean of 0.

    A hierarchical bootstrap: questions are drawn with replacement, the same ones for all runs, and
    so are runs. A few runs vary too little among themselves, by (R - 1) / R, and their spread is
    uncertain: deviations are scaled up, at the end to t's quantile with Satterthwaite's degrees of
    freedom. p is two-sided. Given the differences of two methods, question by question, it is a
    paired test. NaN is no value. `clip`: means are clipped to [0, 1], and not the values: the mean
    of all and those of the draws, as in HealthBench's own bootstrap.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    values = values[:, ~np.isnan(values).any(axis=0)]
    if values.size < 2:  # one value says nothing about its spread
        nothing = dict.fromkeys(("error", "low", "high", "p"), math.nan)
        return {"mean": values.mean() if values.size else math.nan, **nothing}
    rng, mean, variances = np.random.default_rng(0), values.mean(), {}
    means = np.full(draws, mean)
    for averages in (values.mean(axis=0), values.mean(axis=1)):  # of questions, of runs
        if (n := len(averages)) > 1:
            weights = rng.multinomial(n, [1 / n] * n, size=draws) / n - 1 / n  # (draws, n)
            means += math.sqrt(n / (n - 1)) * weights @ averages
            variances[n - 1] = variances.get(n - 1, 0) + averages.var(ddof=1) / n
    error, total = float(means.std()), sum(variances.values())
    freedom = total**2 / sum(v**2 / df for df, v in variances.items()) if total else 1
    means = mean + (means - mean) * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    beyond = min((means <= 1e-12).mean(), (means >= -1e-12).mean())  # draws on the far side of 0
    p = min(1.0, 2 * beyond + 1 / draws)
    if error < 1e-12:  # no spread at all: nothing is known about it
        p = math.nan if abs(mean) > 1e-12 else 1.0
    elif len(values) > 1:  # draws of a few runs cannot show how far their tail reaches
        p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
    found = np.array([mean, *np.quantile(means, [0.025, 0.975])])
    if clip:  # the error is the spread of what is reported: of the clipped means
        error, found = float(np.clip(means, 0, 1).std()), np.clip(found, 0, 1)
    mean, low, high = found
    return {"mean": mean, "error": error, "low": low, "high": high, "p": p}


def saved_results(out: Path) -> dict:
    """What an evaluation or a finished run has measured, with its settings. Raises InputError."""
    try:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        results = {"digest": results["digest"], **results, "settings": saved_settings(out)}
        if "trained" in results:
            results["trained"] = upgraded(results["trained"])
        return results
    except (OSError, ValueError, KeyError, TypeError):
        what = "holds no results.json of this version"
        raise InputError(f"{out} {what}: name finished runs or evaluations") from None


def method_of(run: dict) -> str:
    """What a run's settings are called: CaT, CaT-SFT, TTRL, or what they are."""
    method, aggregator, reward = run["method"], run["aggregator"], run["reward"]
    name = PAPER_NAMES.get((method, aggregator), f"{method} on {aggregator}")
    return name + (f", reward {reward}" if method == "grpo" and reward != "match" else "")


def name_of(row: dict, trained: str) -> str:
    what = f"{row.get('aggregator')} of {row.get('size')}"
    return {
        "initial": "initial policy",
        "inference": f"{what}, at inference",
        "trained": f"trained: {trained}",
        "on trained": f"{what} on trained: {trained}",
    }[row["kind"]]


def methods(measured: Sequence[dict]) -> dict[str, dict]:
    """Rows of one method put together: name -> the first row, with "runs": {seed: scores (Q,)}.

    Two runs are two seeds of one method only if nothing else differs that reaches the row. If
    something does, the names say what.
    """
    found, by_name = {}, {}
    for results in measured:
        # An evaluation has settings of its own, beside those of the run that trained.
        s, run = results["settings"], results.get("trained", results["settings"])
        for row in results["rows"]:
            same = {k: s[k] for k in INFERENCE} | {"boxed": s["reward"] == "match"}
            if "trained" in row["kind"]:
                same = {f"evaluated with {k}": v for k, v in same.items() if run.get(k, v) != v}
                no_matter = {"seed", *MAY_CHANGE} - {"steps"}
                same |= {k: v for k, v in run.items() if k not in no_matter}
            key = (name_of(row, method_of(run)), json.dumps(same, sort_keys=True))
            entry = found.setdefault(key, {**row, "runs": {}, "name": key[0]})
            entry["runs"].setdefault(s["seed"], np.array(row["values"], dtype=np.float64))
    for (name, same), entry in found.items():
        rivals = [json.loads(other) for n, other in found if n == name]
        for key, value in json.loads(same).items():
            if any(r.get(key) != value for r in rivals):
                name += f", {key} {value}"
        by_name[name] = entry | {"scores": np.stack(list(entry["runs"].values()))}  # (runs, Q)
    return by_name


def difference(a: dict, b: dict) -> dict[str, float] | None:
    """interval() of method a minus method b, paired by question and seed; None without a pair."""
    seeds = sorted(a["runs"].keys() & b["runs"].keys())
    pairs = [a["runs"][seed] - b["runs"][seed] for seed in seeds]
    return interval(np.stack(pairs)) if pairs else None


# What the paper counts in texts, to say how syntheses differ from rollouts.
STYLE = {
    "words": r"\S+",
    "lines": r"[^\n]+",
    "equations": r"=",
    "step words": r"(?i)\b(?:step|first|second|third|next|then|finally)\b",
    "verification words": r"(?i)\b(?:check|verif\w+|confirm\w*|indeed|correct\w*|double-check)\b",
}


def style(written: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means per text of STYLE, over all texts in `written`."""
    flat = [text for row in written for text in row]
    counts = {name: sum(len(re.findall(p, text)) for text in flat) for name, p in STYLE.items()}
    return {name: count / len(flat) for name, count in counts.items()}
