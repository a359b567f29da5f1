"""Whole runs of the real command on the real tiny model: how tests start them and read them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--prompts-per-step 4 --group-size 4 --eval-questions 6 --max-new-tokens 48".split()
TIMES = re.compile("^(time/.*|step_time)$")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(out):
    """What each step logged, without its times: those differ from run to run."""
    rows = lines(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not TIMES.match(k)} for row in rows]


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def results_of(out, kind):
    rows = json.loads((out / "results.json").read_text())["rows"]
    (row,) = (r for r in rows if r["kind"] == kind)
    return row["values"]


def same(a, b):
    """Are two dicts of tensors the same, bit for bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(*arguments, **options):
    """A run in a process of its own, which a test may kill."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *map(str, arguments)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background makes its children ignore SIGINT.
    return subprocess.Popen(
        command,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def refused(program, arguments, capsys):
    """The one sentence of a `program` (a main function) that ends with status 2."""
    try:
        status = program(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def settings_in(out):
    return json.loads((out / "config.json").read_text())["settings"]
