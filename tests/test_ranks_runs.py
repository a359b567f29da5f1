"""Whole runs on several ranks: who writes and speaks, what a dead rank leaves, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import train
from judge_server import Judge
from rank_helpers import finished, run, torchrun
from run_helpers import ROOT, SMALL, adapter, lines, metrics, same

STEPS = 8


def step_of(out):
    return torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run on two ranks without interruption, and what it printed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    return out, *run(2, *SMALL, "--steps", STEPS, "--out", out)


def test_rank_0_writes_the_run_and_speaks_alone(straight):
    out, printed, err = straight
    assert [row["step"] for row in metrics(out)] == list(range(STEPS))
    assert [len(row["rollouts"]) for row in lines(out / "rollouts.jsonl")] == [4] * 4 * STEPS
    assert printed.count("| trained: CaT |") == printed.count("task sums:") == 1
    assert err.count(f"{STEPS}/{STEPS}") <= 2  # one progress bar
    assert "Traceback" not in err
    # All ranks sample with the newest weights.
    assert all(row["sampling/logp_difference_max"] < 1e-4 for row in metrics(out))
    assert step_of(out) == STEPS


# ------------------------------------------------------------------------------------ a dead rank


def children(pid):
    """{rank: process} of what torchrun has started."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"\nPPid:\t{pid}\n" in (folder / "status").read_text():
                    words = (folder / "environ").read_text().split("\0")
                    environment = dict(word.split("=", 1) for word in words if "=" in word)
                    found[int(environment["RANK"])] = int(folder.name)
            except (OSError, KeyError):  # it has ended, or is no rank
                pass
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_within_a_minute_and_the_run_resumes_as_if_unbroken(
    straight, tmp_path, victim
):
    out = tmp_path / "run"
    log = out / "metrics.jsonl"
    process = torchrun(2, ROOT / "train.py", *SMALL, "--steps", STEPS, "--out", out)
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks = children(process.pid)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[victim], signal.SIGKILL)
        killed = time.monotonic()
    finally:
        status, _, _ = finished(process, timeout=60)
    assert status != 0
    assert time.monotonic() - killed < 60
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline, "a rank lives on"
        time.sleep(0.1)
    assert 1 <= step_of(out) < STEPS
    run(2, "--resume", "--out", out)
    assert metrics(out) == metrics(straight[0])
    assert same(adapter(out), adapter(straight[0]))
    resumed, unbroken = (path / "table.md" for path in (out, straight[0]))
    assert resumed.read_text().splitlines()[2:] == unbroken.read_text().splitlines()[2:]


# --------------------------------------------------------------------------------- what is refused


def test_another_number_of_ranks_is_refused(straight, tmp_path, capsys):
    before = (straight[0] / "metrics.jsonl").read_bytes()
    assert train.main(["--resume", "--out", str(straight[0])]) == 2
    assert "was started on 2 ranks, and not on 1" in capsys.readouterr().err
    status, _, err = finished(torchrun(3, ROOT / "train.py", "--resume", "--out", straight[0]))
    assert status != 0
    assert "was started on 2 ranks, and not on 3" in err
    assert (straight[0] / "metrics.jsonl").read_bytes() == before
    single = tmp_path / "single"
    assert train.main([*SMALL, "--steps", "1", "--out", str(single)]) == 0
    status, _, err = finished(torchrun(2, ROOT / "train.py", "--resume", "--out", single))
    assert status != 0
    assert "was started on 1 ranks, and not on 2" in err


UNLIKE = """
import os, sys
sys.path.insert(0, {root!r})
import train
sys.exit(train.main([*sys.argv[1:], *({extra!r}.split() if os.environ["RANK"] == "1" else [])]))
"""


def sums(path, numbers):
    """A file of questions."""
    path.write_text("".join(f'{{"prompt": "What is {n} + 1?"}}\n' for n in numbers))
    return path


@pytest.mark.parametrize(
    ("extra", "what"),
    [("--lr 0.02", "settings"), ("--data {tmp}/other.jsonl", "settings"), ("--engine auto", "")],
)
def test_ranks_that_were_started_differently_are_refused(tmp_path, extra, what):
    """On several machines the command is typed several times."""
    sums(tmp_path / "other.jsonl", range(8))
    script = tmp_path / "unlike.py"
    script.write_text(UNLIKE.format(root=str(ROOT), extra=extra.format(tmp=tmp_path)))
    arguments = [*SMALL, *"--task jsonl --model tiny --steps 1".split()]
    arguments += ["--data", sums(tmp_path / "one.jsonl", range(8)), "--out", tmp_path / "run"]
    status, _, err = finished(torchrun(2, script, *arguments))
    assert (status == 0) == (what == ""), err
    assert not what or f"the ranks do not have the same {what}" in err
    assert (tmp_path / "run").exists() == (what == "")


APART = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from plumbing import folder
real = folder.load_checkpoint
def apart(out, *given, **options):
    return real(Path({tmp!r}) / os.environ["RANK"], *given, **options)
folder.load_checkpoint = apart
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_checkpoint_that_only_one_rank_has_is_refused(tmp_path):
    """As on machines that do not share --out: each rank looks into a folder of its own.

    Rank 1's checkpoint is not there.
    """
    run(2, *SMALL, "--steps", "1", "--out", tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "1" / "checkpoint" / "state.pt").unlink()
    script = tmp_path / "apart.py"
    script.write_text(APART.format(root=str(ROOT), tmp=str(tmp_path)))
    before = (tmp_path / "0" / "metrics.jsonl").read_bytes()
    process = torchrun(2, script, "--resume", "--steps", "2", "--out", tmp_path / "0")
    status, _, err = finished(process)
    assert status != 0
    assert "the ranks do not have the same checkpoint" in err
    assert (tmp_path / "0" / "metrics.jsonl").read_bytes() == before


# ------------------------------------------------------------------- evaluation, judge, early stop


def test_what_two_ranks_have_trained_is_evaluated_on_two_as_on_one(straight, tmp_path):
    arguments = ["--adapter", straight[0], "--eval-sampling", '{"temperature": 0}']
    arguments += "--aggregators min-ppl --sizes 4 --eval-questions 5".split()
    out, _ = run(2, *arguments, "--out", tmp_path / "two", program=ROOT / "evaluate.py")
    assert out.count("| trained: CaT |") == 1
    command = [sys.executable, ROOT / "evaluate.py", *arguments, "--out", tmp_path / "one"]
    subprocess.run(command, check=True, capture_output=True)
    two, one = ((tmp_path / name / "table.md").read_text() for name in ("two", "one"))
    assert two == one


def test_a_judge_behind_a_server_is_asked_once_whatever_the_ranks(tmp_path):
    server, out = Judge(), tmp_path / "run"
    arguments = [*SMALL, *"--task jsonl --model tiny --reward judge --steps 2".split()]
    arguments += ["--data", sums(tmp_path / "questions.jsonl", range(6))]
    arguments += ["--judge-url", server.url, "--judge-model", "strict"]
    try:
        run(2, *arguments, "--out", out)
    finally:
        server.shutdown()
        server.server_close()
    answered = lines(out / "judge.jsonl")
    assert len(server.calls) == len(set(server.calls)) == len(answered) > 0
    assert all(row["judge/unknown_rate"] == 0 for row in metrics(out))


IMPATIENT = """
import sys
sys.path.insert(0, {root!r})
import train
from plumbing import progress
from recipes import cat_sft
progress.PATIENCE = 2
sys.exit(train.main(sys.argv[1:], cat_sft.METHOD))
"""


def test_all_ranks_stop_early_and_go_back_to_the_best_adapter(tmp_path):
    script, out = tmp_path / "impatient.py", tmp_path / "run"
    script.write_text(IMPATIENT.format(root=str(ROOT)))
    greedy = ["--eval-sampling", '{"temperature": 0}']
    arguments = [*SMALL, *"--lr 0.03 --validate-every 1 --steps 9".split(), *greedy]
    run(2, *arguments, "--out", out, program=script)
    scores = [row["validation/score"] for row in metrics(out)]
    assert scores.index(max(scores)) == len(scores) - 3 < 6  # the best is not the last
    arguments = ["--adapter", str(out), *greedy, "--out", str(tmp_path / "alone")]
    assert evaluate.main(arguments) == 0
    first, again = (
        [row for row in json.loads(path.read_text())["rows"] if row["kind"] == "trained"]
        for path in (out / "results.json", tmp_path / "alone" / "results.json")
    )
    assert len(first) == 1
    assert first == again  # answers and their lengths: no rank has asked the last adapter
