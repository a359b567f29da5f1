"""What a run's folder holds so far: also of a run that is under way, or that was killed."""

import json
import re
from pathlib import Path

from plumbing.errors import InputError
from plumbing.folder import saved_settings
from plumbing.settings import DEFAULTS, eval_sampling
from tasks import TASKS

_STEP = re.compile(rb'\{"step": (\d+),')  # how plumbing/folder.py starts a line


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl; none if there is no such file. Raises InputError."""
    path = run / "metrics.jsonl"
    return [parsed(line, path) for line in whole_lines(path)] if path.exists() else []


def whole_lines(path: Path):
    """Its lines; without the last one, if that is still being written or a crash cut it off."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def parsed(line: bytes, path: Path) -> dict:
    try:
        row = json.loads(line)
        row["step"]  # every line has one
        return row
    except (ValueError, TypeError, KeyError):
        shown = line[:60].decode(errors="replace").strip()
        raise InputError(f"{path} has a line that is no step's: {shown!r}; remove it") from None


def where_steps_are(run: Path) -> dict[int, list[int]]:
    """{step: where each of its lines begins in rollouts.jsonl}; {} without that file.

    A long run of a real model logs a gigabyte: this reads it through and keeps nothing. Raises
    InputError.
    """
    path, found, start = run / "rollouts.jsonl", {}, 0
    for line in whole_lines(path) if path.exists() else ():
        step = int(match[1]) if (match := _STEP.match(line)) else parsed(line, path)["step"]
        found.setdefault(step, []).append(start)
        start += len(line)
    return found


def rows_at(run: Path, starts: list[int]) -> list[dict]:
    """The questions of a step of rollouts.jsonl, whose lines begin at `starts`."""
    path = run / "rollouts.jsonl"
    with path.open("rb") as file:
        return [parsed(file.readline(), path) for start in starts if file.seek(start) >= 0]


def config_of(run: Path) -> dict:
    """config.json, with the settings as of this version. Raises InputError."""
    settings = saved_settings(run)
    return json.loads((run / "config.json").read_text(encoding="utf-8")) | {"settings": settings}


def unusual(settings: dict) -> dict:
    """The settings that differ from what the task has without flags."""
    usual = DEFAULTS | TASKS[settings["task"]].settings if settings["task"] in TASKS else DEFAULTS
    temperature = settings.get("temperature", usual["temperature"])
    usual = usual | {"eval_sampling": eval_sampling({}, settings["model"], temperature)}
    named = {"task", "model", "method", "engine", "seed", "evaluation"}  # a page says them anyway
    return {k: v for k, v in settings.items() if k not in named and v != usual.get(k)}
