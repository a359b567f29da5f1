"""What a run survives: kill -9, Ctrl-C, crashes between two writes, and a policy that blows up."""

import signal
import time

import pytest
import torch

import evaluate
import grpo
import train
from plumbing.engines import installed_engine
from run_helpers import SMALL, adapter, lines, metrics, refused, same, settings_in, start


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train.main([*SMALL, "--steps", "6", "--out", str(out)]) == 0
    return out


def kill_after(process, out, steps, signal_number):
    """(stdout, stderr) of a run that gets a signal when so many steps are logged."""
    deadline, log = time.monotonic() + 120, out / "metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal_number)
    return process.communicate(timeout=60)


def lines_that_parse(path):
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path):
    out = tmp_path / "run"
    process = start("--steps", 6, "--out", out)
    kill_after(process, out, 3, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(lines_that_parse(out / "metrics.jsonl")) < 6
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert same(adapter(out), adapter(straight))
    assert metrics(out) == metrics(straight)
    assert len(lines(out / "rollouts.jsonl")) == 24


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    out = tmp_path / "run"
    process = start("--steps", 50, "--out", out)
    # the third line is logged: the second step is saved
    _, error = kill_after(process, out, 3, signal.SIGINT)
    assert process.returncode == 130
    assert f"--resume --out {out}" in error
    assert "Traceback" not in error
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    done = torch.load(out / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert done >= 2


def test_a_crash_between_log_and_checkpoint_does_the_step_again(straight, tmp_path):
    """The log is ahead of the checkpoint, and its last line is cut short: resuming drops both."""
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "3", "--out", str(out)]) == 0
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "reward": 0.9}\n{"step": 4, "rew')
    assert train.main(["--resume", "--steps", "6", "--out", str(out)]) == 0
    assert metrics(out) == metrics(straight)
    assert settings_in(out)["steps"] == 6  # a plain --resume goes as far


def test_a_run_killed_before_its_first_step_starts_over(straight, tmp_path):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    (out / "checkpoint" / "state.pt").unlink()
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert metrics(out) == metrics(straight)[:2]


def test_three_updates_in_a_row_that_are_not_finite_stop_the_run(tmp_path, capsys, monkeypatch):
    real = grpo.advantages
    monkeypatch.setattr(grpo, "advantages", lambda *given: real(*given) * float("nan"))
    assert train.main([*SMALL, "--steps", "9", "--out", str(tmp_path / "run")]) == 1
    assert [row["update/skipped"] for row in metrics(tmp_path / "run")] == [1, 1, 1]
    error = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in error
    saved = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["weights"]
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_policy_that_has_blown_up_stops_with_a_sentence(tmp_path, capsys):
    assert train.main([*SMALL, "--steps", "5", "--lr", "1e30", "--out", str(tmp_path / "run")]) == 1
    assert "not finite" in capsys.readouterr().err


def test_resuming_with_another_setting_is_refused(straight, capsys):
    arguments = ["--resume", "--out", str(straight), "--lr", "0.5"]
    assert "--lr" in refused(train.main, arguments, capsys)


def test_what_changes_no_result_may_change_when_a_run_is_resumed(straight, tmp_path):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--steps", "2", "--out", str(out)]) == 0
    again = ["--micro-batch-tokens", "200", "--gradient-checkpointing", "--engine", "auto"]
    assert train.main(["--resume", "--out", str(out), "--steps", "3", *again]) == 0
    expected = metrics(straight)[2]
    for name, value in metrics(out)[2].items():
        assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    saved = settings_in(out)
    assert saved["gradient_checkpointing"] is True
    assert saved["engine"] == installed_engine()[0]  # "auto" is settled when resumed, too


def test_an_evaluation_is_not_a_run_to_be_resumed(tmp_path, capsys):
    out = tmp_path / "evaluation"
    small = "--eval-questions 2 --group-size 2 --max-new-tokens 24 --aggregators majority"
    assert evaluate.main([*small.split(), "--out", str(out)]) == 0
    before = (out / "table.md").read_bytes()
    assert "cannot be continued" in refused(train.main, ["--resume", "--out", str(out)], capsys)
    assert (out / "table.md").read_bytes() == before
