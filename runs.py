"""A run on disk, in a form that survives anything: settings, logs, checkpoint, adapter, curves.

config.json      every setting, the git commit, the versions
    metrics.jsonl    one line a step
    rollouts.jsonl   one line a question and step: q, o_1..o_G, s, R; with rubrics the criteria, verdicts and judge's texts
    split.json       which questions were held out, where the task names them
    judge.jsonl      every answer of a judge behind a server, so that none is paid for twice
    checkpoint/      state.pt: the newest completed step; best.pt: the one with the best validation score
    adapter/         the LoRA, for peft.PeftModel.from_pretrained
    results.json     the final table;  curves.png: reward, true accuracy, KL, completion length
"""

import json
import math
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from tasks import InputError


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


def provenance() -> dict:
    """What made this run: the git commit of the code (None outside a checkout) and the versions of what it stands on."""
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    return {"commit": commit, "versions": {name: version(name) for name in ("torch", "transformers", "peft", "math-verify")}}


def write_config(out: Path, settings: dict) -> None:
    write_json(out / "config.json", {"settings": settings, **provenance()})


def create(out: Path, settings: dict) -> None:
    """Make the run's folder and write config.json. Raises InputError where there is a run already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: continue it with --resume, or name another folder with --out")
    try:
        (out / "checkpoint").mkdir(parents=True)
        write_config(out, settings)
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from None


def saved_settings(out: Path) -> dict:
    """The settings of a run that exists. Raises InputError."""
    try:
        return json.loads((out / "config.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, json.JSONDecodeError, KeyError):
        raise InputError(f"{out} holds no run to resume (no config.json): check --out, or leave --resume out") from None


def save_checkpoint(out: Path, state: dict, model, optimizer, best: bool = False) -> None:
    """Everything that the next step depends on. It replaces the one before in one rename: a crash leaves one of the two.
    `best`: it is also kept as the best so far, first, so that no checkpoint believes in a best one that is not there.

    There is no random state to save, because all randomness of a step is a function of (seed, step).
    """
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

    The logs only grow, so it is enough to cut them off at the first such line, or at one that a crash left incomplete.
    """
    for log in (out / "metrics.jsonl", out / "rollouts.jsonl"):
        if log.exists():
            end = 0
            with log.open("rb+") as file:
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] >= steps:
                        break
                    end += len(line)
                file.truncate(end)


def plot(out: Path) -> None:
    """curves.png from metrics.jsonl: thin lines are steps, thick ones a running mean of ten."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = {
        "Reward (share that agrees with the reference)": {"reward": "rollouts"},
        "True accuracy (labels, for the eye only)": {"accuracy/rollouts": "rollouts", "accuracy/reference": "reference"},
        "KL to the initial policy (nats a token)": {"kl": "k3"},
        "Completion length (tokens)": {"completions/mean_length": "mean"},
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        for colour, (name, label) in enumerate(lines.items()):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if not points:
                axis.text(0.5, 0.5, "no labels", ha="center", transform=axis.transAxes)
                continue
            x, y = zip(*points, strict=True)
            smooth = [sum(y[max(0, i - 9) : i + 1]) / len(y[max(0, i - 9) : i + 1]) for i in range(len(y))]
            axis.plot(x, y, alpha=0.3, color=f"C{colour}")
            axis.plot(x, smooth, linewidth=2, color=f"C{colour}", label=label)
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    for axis in axes[0]:
        axis.set_ylim(-0.02, 1.02)
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)
