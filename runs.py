"""A run on disk, in a form that survives anything: written, continued, and read again as texts, tables and plots.

In the folder of a run:
    config.json      every setting, the git commit, the device, the versions
    metrics.jsonl    one line a step
    rollouts.jsonl   one line a question and step: q, o_1..o_G, s, R; with rubrics the criteria, verdicts and judge's texts
    split.json       which questions were held out, where the task names them
    judge.jsonl      every answer of a judge behind a server, so that none is paid for twice
    checkpoint/      state.pt: the newest completed step; best.pt: the one with the best validation score
    adapter/         the LoRA, for peft.PeftModel.from_pretrained
    results.json     the final comparison, question by question;  table.md: the same to read
    curves.png       reward, true accuracy, KL, completion length;  comparison.png: accuracy against generations
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from tasks import InputError

# What a resumed run may change: how far it goes, and what moves memory or work but not results (beyond rounding).
MAY_CHANGE = "steps eval_questions engine engine_args sleep micro_batch_tokens gradient_checkpointing".split()
MAY_CHANGE += ["judge_url", "judge_concurrency"]

INFERENCE = "model eval_sampling max_new_tokens group_size judge judge_model".split()  # what reaches answers of pi_0
PAPER_NAMES = {("grpo", "synthesis"): "CaT", ("sft", "synthesis"): "CaT-SFT", ("grpo", "majority"): "TTRL"}


def write_json(path: Path, content: dict) -> None:
    """Written whole or not at all: to a temporary name first, then renamed, which the file system does at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def append(path: Path, rows: list[dict]) -> None:
    """Add one JSON line a row, flushed: a crash of the program loses none of them. NaN becomes null, as JSON has none."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def log_step(out: Path, step: int, numbers: dict, batch, groups, references, rewards) -> None:
    """One step's lines in the logs: what a reading group wants to read (with rubrics: every verdict), and the numbers."""
    rows = []
    for i, (q, group, s) in enumerate(zip(batch, groups, references, strict=True)):
        values = [None if math.isnan(r) else r for r in rewards.values[i].tolist()]
        row = {"step": step, "question": q.messages, "rollouts": [o.text for o in group], "reference": s.text}
        rows.append(row | {"rewards": values} | (rewards.details[i] if rewards.details else {}))
    append(out / "rollouts.jsonl", rows)
    append(out / "metrics.jsonl", [{"step": step, **numbers}])


def write_config(out: Path, settings: dict) -> None:
    """The settings, the git commit of the code (None outside a checkout), device and versions of what it stands on."""
    here, git = Path(__file__).resolve().parent, shutil.which("git")
    commit = git and subprocess.run([git, "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "math-verify")}
    if "vllm" in sys.modules:  # what it is installed as differs from build to build
        versions["vllm"] = sys.modules["vllm"].__version__
    write_json(out / "config.json", {"settings": settings, "commit": commit or None, "device": device, "versions": versions})


def create(out: Path, settings: dict) -> None:
    """Make the run's folder and write config.json. Raises InputError where there is a run already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} exists and is not empty: name another folder with --out, or continue a training run with --resume"
        )
    try:
        (out / "checkpoint").mkdir(parents=True)
        write_config(out, settings)
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from None


def saved_settings(out: Path) -> dict:
    """The settings of a run that exists. Raises InputError."""
    try:
        return json.loads((out / "config.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} holds no run (no config.json): give the folder of one") from None


def save_checkpoint(out: Path, state: dict, model, optimizer, best: bool = False) -> None:
    """Everything that the next step depends on. It replaces the one before in one rename: a crash leaves one of the two.
    `best`: it is also kept as the best so far, first, so that no checkpoint believes in a best one that is not there.
    There is no random state to save, because all randomness of a step is a function of (seed, step, rank)."""
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    temporary = out / "checkpoint" / "state.tmp"
    torch.save({**state, "weights": weights, "optimizer": optimizer.state_dict()}, temporary)
    if best:
        shutil.copy(temporary, out / "checkpoint" / "best.tmp")
        os.replace(out / "checkpoint" / "best.tmp", out / "checkpoint" / "best.pt")
    os.replace(temporary, out / "checkpoint" / "state.pt")


def load_checkpoint(out: Path, model, optimizer, best: bool = False) -> dict | None:
    """Put weights and optimizer back and return the rest of the state; None if no step had been completed. `best`: of
    the best validation, where there was one."""
    kept = out / "checkpoint" / "best.pt"
    path = kept if best and kept.exists() else out / "checkpoint" / "state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    if state:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, saved in state.pop("weights").items():
                parameters[name].copy_(saved)
        optimizer.load_state_dict(state.pop("optimizer"))
    return state


def drop_lines_after(out: Path, steps: int) -> None:
    """Cut the logs back to `steps` completed steps: what was logged of a step that is not in the checkpoint is done again.
    They only grow, so it is enough to cut them off at the first such line, or at one that a crash left incomplete."""
    for log in (out / "metrics.jsonl", out / "rollouts.jsonl"):
        if log.exists():
            end = 0
            with log.open("rb+") as file:
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] >= steps:
                        break
                    end += len(line)
                file.truncate(end)


def show(run: Path, step: int) -> str:
    """Every question of a step of a run as a table: rollouts across, criteria down. Raises InputError."""
    try:
        lines = (run / "rollouts.jsonl").read_text(encoding="utf-8").split("\n")
    except OSError:
        raise InputError(f"{run} holds no rollouts.jsonl: give the folder of a run") from None
    rows = [row for line in lines if line.endswith("}") and (row := json.loads(line))["step"] == step]
    if not rows:
        raise InputError(f"{run} has no step {step}: it is counted from 0, and metrics.jsonl lists them")
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


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [table[0], ["---"] * len(table[0]), *table[1:]]]


def interval(values: np.ndarray, draws: int = 10_000, clip: bool = False) -> dict[str, float]:
    """Mean of `values` (runs, questions), its standard error and 95% interval, and the p-value of a mean of 0, two-sided.

    A hierarchical bootstrap: questions are drawn with replacement, the same ones for all runs, and so are runs. A few
    runs vary too little among themselves, by (R - 1) / R, and their spread is uncertain: deviations are scaled up, at the
    end to t's quantile with Satterthwaite's degrees of freedom. Given the differences of two methods, question by question,
    it is a paired test. NaN is no value. `clip`: the mean is clipped to [0, 1], as HealthBench wants it, not the values.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    values = values[:, ~np.isnan(values).any(axis=0)]
    if values.size < 2:
        return dict.fromkeys(("error", "low", "high", "p"), math.nan) | {"mean": values.mean() if values.size else math.nan}
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
    p = min(1.0, 2 * min((means <= 1e-12).mean(), (means >= -1e-12).mean()) + 1 / draws)  # draws on the far side of 0
    if error < 1e-12:  # no spread at all: nothing is known about it
        p = math.nan if abs(mean) > 1e-12 else 1.0
    elif len(values) > 1:  # draws of a few runs cannot show how far their tail reaches: t, with R - 1 degrees of freedom
        p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
    mean, low, high = np.clip([mean, *np.quantile(means, [0.025, 0.975])], *((0, 1) if clip else (None, None)))
    return {"mean": mean, "error": error, "low": low, "high": high, "p": p}


def saved_results(out: Path) -> dict:
    """What an evaluation or a finished run has measured, with its settings. Raises InputError."""
    try:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        return {"digest": results["digest"], **results, "settings": saved_settings(out)}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} holds no results.json of this version: name finished runs or evaluations") from None


def methods(measured: Sequence[dict]) -> dict[str, dict]:
    """Rows of the same method put together: name -> {"runs": {seed: scores (Q,)}, and the first row's own entries}."""
    found, by_name = {}, {}
    for results in measured:
        s, run = results["settings"], results.get("trained", results["settings"])  # an evaluation has settings of its own
        trained = PAPER_NAMES.get((run["method"], run["aggregator"]), f"{run['method']} on {run['aggregator']}")
        trained += f", reward {run['reward']}" if run["method"] == "grpo" and run["reward"] != "match" else ""
        for row in results["rows"]:
            name = {
                "initial": "initial policy",
                "inference": f"{row.get('aggregator')} of {row.get('size')}, at inference",
                "trained": f"trained: {trained}",
                "on trained": f"{row.get('aggregator')} of {row.get('size')} on trained: {trained}",
            }[row["kind"]]
            # Two runs are two seeds of one method only if nothing else differs that reaches this row.
            same = {k: s[k] for k in INFERENCE} | {"boxed": s["reward"] == "match"}
            if "trained" in row["kind"]:
                same = {f"evaluated with {k}": v for k, v in same.items() if run.get(k, v) != v}
                same |= {k: v for k, v in run.items() if k == "steps" or k not in ("seed", *MAY_CHANGE)}
            entry = found.setdefault((name, json.dumps(same, sort_keys=True)), {**row, "runs": {}, "name": name})
            entry["runs"].setdefault(s["seed"], np.array(row["values"], dtype=np.float64))
    for (name, same), entry in found.items():
        rivals = [json.loads(other) for n, other in found if n == name]
        differing = {k: v for k, v in json.loads(same).items() if any(r.get(k) != v for r in rivals)}
        scores = np.stack(list(entry["runs"].values()))  # (runs, questions)
        by_name[name + "".join(f", {k} {v}" for k, v in differing.items())] = entry | {"scores": scores}
    return by_name


def difference(a: dict, b: dict) -> dict[str, float] | None:
    """interval() of method a minus method b, paired by question and by seed; None if they have no seed in common."""
    seeds = sorted(a["runs"].keys() & b["runs"].keys())
    return interval(np.stack([a["runs"][seed] - b["runs"][seed] for seed in seeds])) if seeds else None


def table(measured: Sequence[dict], against: str | None = None) -> str:
    """Results as Markdown, a table for each set of questions; `against`: default the first method. Raises InputError."""
    lines = []
    for digest in dict.fromkeys(results["digest"] for results in measured):
        group = [results for results in measured if results["digest"] == digest]
        found, judged, total = methods(group), group[0]["judged"], group[0]["questions"]
        rival = against or next(iter(found))
        if rival not in found:
            raise InputError(f"there is no method {rival!r} to compare with, there are: {', '.join(found)}")
        cells = [[f"{group[0]['settings']['task']}, {total} questions", "runs", "score" if judged else "accuracy"]]
        cells[0] += ["95% interval", "right", f"minus {rival}", "p", "generations", "tokens"]
        for name, m in found.items():
            values = m["scores"]
            i, scored = interval(values, clip=True), int((~np.isnan(values).any(axis=0)).sum())
            d = difference(m, found[rival]) if name != rival else None
            answers = m["answers"] * scored * len(values)
            few = f" (of {scored} questions)" if 0 < scored < total else ""  # the judge left the others open
            row = [name, f"{len(values)}", "no labels" if not scored else f"{i['mean']:.3f} ± {i['error']:.3f}{few}"]
            row += [f"{i['low']:.3f} to {i['high']:.3f}" if scored else ""]
            row += [f"{np.nansum(values) * m['answers']:.0f} of {answers}" if scored and not judged else ""]
            row += [f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" if d and scored else ""]
            row += [("< 0.001" if d["p"] < 0.001 else f"{d['p']:.3f}") if d and d["p"] == d["p"] else ""]
            cells.append([*row, f"{m['generations']}", f"{m['tokens']:.0f}"])
        lines += [*markdown(cells), ""]
    note = "± standard error, interval and p (two-sided): bootstrap over runs and questions, paired for differences"
    return "\n".join([*lines, f"{note}; generations and tokens per answer, of the first run"])


def plot(out: Path) -> None:
    """curves.png from metrics.jsonl: thin lines are steps, thick ones a running mean of ten."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = {
        "Reward (share that agrees with the reference)": {"reward": "rollouts"},
        "True accuracy (labels, for the eye only)": {"accuracy/rollouts": "rollouts", "accuracy/reference": "reference"},
        "Questions a step where reference and majority differ": {"mechanism/differs": "differ"}
        | {"mechanism/differs_right": "reference right", "mechanism/other_right": "majority right"},
        "KL to the initial policy (nats a token)": {"kl": "k3"},
        "Completion length (tokens)": {"completions/mean_length": "mean"},
        "Entropy of a question's answers (nats)": {"mechanism/entropy": "rollouts"},
    }
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        for colour, (name, label) in enumerate(lines.items()):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if not points:
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
                continue
            x, y = zip(*points, strict=True)
            smooth = [sum(y[max(0, i - 9) : i + 1]) / len(y[max(0, i - 9) : i + 1]) for i in range(len(y))]
            axis.plot(x, y, alpha=0.3, color=f"C{colour}")
            axis.plot(x, smooth, linewidth=2, color=f"C{colour}", label=label)
            axis.legend(fontsize=8)
    figure.supxlabel("step", fontsize=10)
    for axis in axes[0][:2]:
        axis.set_ylim(-0.02, 1.02)
    figure.savefig(out / "curves.png", dpi=120)
