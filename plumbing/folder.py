"""A run on disk, in a form that survives anything.

In the folder of a run:
    config.json      every setting, the git commit, the device, the versions
    metrics.jsonl    one line a step
    rollouts.jsonl   one line a question and step: q, o_1..o_G, s, R; with a judge the rubric,
                     verdicts and raw texts; the label, where there is one
    split.json       which questions were held out, where the task names them
    judge.jsonl      every answer of a judge behind a server, so that none is paid for twice
    checkpoint/      state.pt: the newest completed step; best.pt: the best validation score
    adapter/         the LoRA, for peft.PeftModel.from_pretrained
    results.json     the final comparison, question by question;  table.md: the same to read
    report.html      all of this to look at
    curves.png       the run step by step;  comparison.png: accuracy against generations
"""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from plumbing import ranks
from plumbing.errors import InputError

# Settings that were flags once, with the value that each now always has (in grpo.py, tasks.py,
# plumbing/progress.py).
FIXED = {
    "clip": 0.2, "importance_cap": 2.0, "mask_truncated": False, "validation_questions": 100,
    "patience": 5,
}  # fmt: skip


def write_json(path: Path, content: dict) -> None:
    """Written whole or not at all: under a temporary name first, then renamed at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def append(path: Path, rows: list[dict]) -> None:
    """Add one JSON line a row, so that a crash loses none of them. NaN becomes null."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            row = {k: finite_or_none(v) for k, v in row.items()}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_config(out: Path, settings: dict) -> None:
    """The settings, the git commit of the code (None outside a checkout), device and versions."""
    here, git, commit = Path(__file__).resolve().parent.parent, shutil.which("git"), None
    if git:
        command = [git, "-C", here, "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "math-verify")}
    if "vllm" in sys.modules:  # what it is installed as differs from build to build
        versions["vllm"] = sys.modules["vllm"].__version__
    content = {"settings": settings, "commit": commit, "device": device, "versions": versions}
    write_json(out / "config.json", content)


def create(out: Path, settings: dict) -> None:
    """Make the run's folder and write config.json. Rank 0 does. Raises InputError."""
    if ranks.RANK:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} exists and is not empty: name another folder with --out, or continue a "
            "training run with --resume"
        )
    try:
        (out / "checkpoint").mkdir(parents=True)
        write_config(out, settings)
    except OSError as error:
        way_out = "name another folder with --out"
        raise InputError(f"cannot write to {out} ({error.strerror}): {way_out}") from None


def saved_settings(out: Path) -> dict:
    """The settings of a run that exists, as of this version. Raises InputError."""
    try:
        content = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return upgraded(content["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        way_out = "give the folder of one"
        raise InputError(f"{out} holds no run (no config.json): {way_out}") from None


def upgraded(settings: dict) -> dict:
    """Settings of a run of any version, as this version has them.

    A former flag whose value is the one that is fixed now is dropped. Any other value stays, so
    that such a run is told apart in tables and refused by --resume.
    """
    settings = {"method": "grpo", **settings}
    settings.pop("judge_concurrency", None)  # it never changed a result
    if settings.pop("judge", "server") == "anchor":
        settings["judge_model"] = None
    if settings.pop("sleep", False):
        settings["engine_args"] = settings["engine_args"] | {"enable_sleep_mode": True}
    same = [key for key, value in FIXED.items() if settings.get(key) == value]
    return {key: value for key, value in settings.items() if key not in same}


def save_checkpoint(out: Path, state: dict, model, optimizer, best: bool = False) -> None:
    """Everything that the next step depends on.

    It replaces the one before in one rename: a crash leaves one of the two. `best`: it is also
    kept as the best so far, and first, so that no checkpoint believes in a best one that is not
    there. No random state is saved, because all randomness of a step is a function of (seed, step).
    """
    weights = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
    folder = out / "checkpoint"
    torch.save({**state, "weights": weights, "optimizer": optimizer.state_dict()}, folder / "tmp")
    if best:
        shutil.copy(folder / "tmp", folder / "best.tmp")
        os.replace(folder / "best.tmp", folder / "best.pt")
    os.replace(folder / "tmp", folder / "state.pt")


def load_checkpoint(out: Path, model, optimizer, best: bool = False) -> dict | None:
    """Put weights and optimizer back and return the rest of the state.

    None if no step had been completed. `best`: of the best validation, where there was one.
    """
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
    """Cut the logs back to `steps` completed steps: what is not in the checkpoint is done again.

    They only grow, so it is enough to cut them off at the first line of a later step, or at one
    that a crash left incomplete.
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
